// SPDX-License-Identifier: Apache-2.0
//! The host's end of an interface: a tap, with a descriptor for each of its queues.
//!
//! The broker made it (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, several queues), put it on its bridge and deletes it. All
//! that is set here is what frames look like (the length of the header, and what the driver lets the host
//! leave to it) and, where the kernel serves the driver, which of them it gets. Source: linux/if_tun.h.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::vhost::Vhost;
use crate::virtio::net::{F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6, HEADER};

const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNATTACHFILTER: libc::c_ulong = 0x4010_54d5;
const TUNDETACHFILTER: libc::c_ulong = 0x4010_54d6;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;
const TUN_F_TSO_ECN: libc::c_ulong = 8;

/// Sets O_NONBLOCK.
pub(super) fn non_blocking(file: &File) -> io::Result<()> {
    // SAFETY: these commands take and give ints.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    let flags = flags | libc::O_NONBLOCK;
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A tap.
pub struct Tap {
    queues: Vec<File>,
    /// Whether it is one; in tests it may be a socket, which has nothing to set.
    real: bool,
    /// One for each queue, or none.
    helpers: Vec<Vhost>,
    /// The filter on it; empty for none.
    filter: Vec<libc::sock_filter>,
}

impl Tap {
    /// The tap whose queues these are, with nothing left to the driver.
    ///
    /// # Errors
    /// What the kernel says of a descriptor that is no tap.
    pub fn new(queues: Vec<OwnedFd>) -> io::Result<Tap> {
        let tap = Tap::of(queues, true)?;
        for queue in &tap.queues {
            let header = HEADER as libc::c_int;
            // SAFETY: the request reads an int, which outlives the call.
            let result = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETVNETHDRSZ as _, &header) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        tap.leave_to_driver(0)?;
        Ok(tap)
    }

    /// With `helpers`, an opened /dev/vhost-net for each of its queues.
    pub fn helped(mut self, helpers: Vec<OwnedFd>) -> Tap {
        self.helpers = helpers.into_iter().map(Vhost::new).collect();
        self
    }

    /// The helper of a queue, and the queue.
    pub(super) fn helper(&mut self, queue: usize) -> Option<(&mut Vhost, RawFd)> {
        let fd = self.queues.get(queue)?.as_raw_fd();
        Some((self.helpers.get_mut(queue)?, fd))
    }

    /// Whether it has helpers.
    pub(super) fn is_helped(&self) -> bool {
        !self.helpers.is_empty()
    }

    /// Whether what comes for the driver goes through just this program.
    pub(super) fn has_filter(&self, program: &[libc::sock_filter]) -> bool {
        let same = |(a, b): (&libc::sock_filter, &libc::sock_filter)| {
            (a.code, a.jt, a.jf, a.k) == (b.code, b.jt, b.jf, b.k)
        };
        self.filter.len() == program.len() && self.filter.iter().zip(program).all(same)
    }

    /// What comes for the driver goes through this program first, on all queues.
    ///
    /// # Errors
    /// What the kernel says, such as that a macvtap has none. Then it may be on some queues.
    pub(super) fn filter(&mut self, program: Vec<libc::sock_filter>) -> io::Result<()> {
        let argument = libc::sock_fprog {
            len: u16::try_from(program.len()).unwrap_or_default(),
            filter: program.as_ptr().cast_mut(),
        };
        let queue = self.fd(0)?;
        // SAFETY: the request reads the program, which outlives the call.
        let result = unsafe { libc::ioctl(queue, TUNATTACHFILTER as _, &argument) };
        self.filter = program;
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Everything comes through again.
    pub(super) fn unfilter(&mut self) {
        let (Ok(queue), false) = (self.fd(0), self.filter.is_empty()) else {
            return;
        };
        self.filter.clear();
        // SAFETY: the request ignores its argument. It fails for one that has none, and that is as well.
        unsafe { libc::ioctl(queue, TUNDETACHFILTER as _, 0) };
    }

    /// Datagram sockets in the place of a tap.
    #[cfg(test)]
    pub fn sockets(queues: Vec<OwnedFd>) -> Tap {
        Tap::of(queues, false).unwrap()
    }

    fn of(queues: Vec<OwnedFd>, real: bool) -> io::Result<Tap> {
        let queues: Vec<File> = queues.into_iter().map(File::from).collect();
        for queue in &queues {
            non_blocking(queue)?;
        }
        Ok(Tap {
            queues,
            real,
            helpers: Vec::new(),
            filter: Vec::new(),
        })
    }

    /// What a driver that accepted `features` takes: frames without a checksum, TCP segments longer than a frame.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn leave_to_driver(&self, features: u64) -> io::Result<()> {
        let Some(queue) = self.queues.first().filter(|_| self.real) else {
            return Ok(());
        };
        let mut offloads = 0;
        // Without checksums there is no segmentation (5.1.3.1).
        if features & F_GUEST_CSUM != 0 {
            offloads |= TUN_F_CSUM;
            for (feature, offload) in [
                (F_GUEST_TSO4, TUN_F_TSO4),
                (F_GUEST_TSO6, TUN_F_TSO6),
                (F_GUEST_ECN, TUN_F_TSO_ECN),
            ] {
                if features & feature != 0 {
                    offloads |= offload;
                }
            }
            // ECN is a property of segmentation, and refused alone.
            if offloads & (TUN_F_TSO4 | TUN_F_TSO6) == 0 {
                offloads = TUN_F_CSUM;
            }
        }
        // SAFETY: the argument is the set itself, not a pointer.
        let result = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD as _, offloads) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The descriptors, in order.
    pub fn fds(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.queues.iter().map(AsRawFd::as_raw_fd)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.queues.len()
    }

    /// Whether it has been let go.
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Lets it go.
    pub fn close(&mut self) {
        self.helpers.clear();
        self.queues.clear();
    }

    /// Reads one packet with its header from a queue; its length, or `WouldBlock` when there is none.
    ///
    /// # Errors
    /// What the kernel says, such as that the tap is gone.
    ///
    /// # Safety
    /// The iovecs are memory that may be written.
    pub unsafe fn read(&self, queue: usize, iovecs: &[libc::iovec]) -> io::Result<usize> {
        let fd = self.fd(queue)?;
        // SAFETY: the caller's promise; the kernel takes no more of them than it is told there are.
        let len = unsafe { libc::readv(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        usize::try_from(len).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one packet with its header to a queue.
    ///
    /// # Errors
    /// What the kernel says, such as that it is no packet.
    ///
    /// # Safety
    /// The iovecs are memory that may be read.
    pub unsafe fn write(&self, queue: usize, iovecs: &[libc::iovec]) -> io::Result<usize> {
        let fd = self.fd(queue)?;
        // SAFETY: as above.
        let len = unsafe { libc::writev(fd, iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        usize::try_from(len).map_err(|_| io::Error::last_os_error())
    }

    fn fd(&self, queue: usize) -> io::Result<RawFd> {
        let queue = self.queues.get(queue);
        queue
            .map(AsRawFd::as_raw_fd)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }
}
