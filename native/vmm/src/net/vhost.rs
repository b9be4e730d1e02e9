// SPDX-License-Identifier: Apache-2.0
//! vhost-net: the host's kernel moves frames between a tap and the driver's rings, with no call of ours in between.
//!
//! One opened /dev/vhost-net serves one queue pair, each of its two rings by itself. A ring is *engaged* while the
//! kernel serves it, and disengaged before anything else is to be done with it; then this process goes on where the
//! kernel has come to, and the other way round. So a machine that is saved, restored or moved never knows whether the
//! one or the other served it. When which is, [`super::engage`] has.
//!
//! | | engaged | disengaged |
//! |---|---|---|
//! | the doorbell | the kernel's | watched by the network thread |
//! | used requests | `call` is written, and the thread raises the queue's vector | the thread does both |
//! | a broken ring | `error` is written, and the device asks for a reset | the same, by [`super::interface`] |
//! | packets | not counted | counted |
//!
//! Left out on purpose: dirty pages are not logged by the kernel (VHOST_F_LOG_ALL). Nothing is engaged while
//! [`crate::migrate::marks`] are wanted. Source: linux/vhost.h, drivers/vhost/{vhost,net}.c.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemoryMmap;
use crate::virtio::net::F_MRG_RXBUF;
use crate::virtio::queue::{Fault, Queue};
use crate::virtio::F_RING;

const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0x0000_af01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const GET_VRING_BASE: libc::c_ulong = 0xc008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

const NONE: RawFd = -1;

/// `struct vhost_vring_state` and, with a descriptor for the number, `struct vhost_vring_file`.
#[repr(C)]
struct Ring {
    index: u32,
    value: u32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// The rings of a vhost-net device, by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Way {
    /// To the driver.
    Receive = 0,
    /// From the driver.
    Transmit = 1,
}

/// An opened /dev/vhost-net.
pub(super) struct Vhost {
    device: File,
    owned: bool,
}

/// What is heard of a queue that is engaged.
pub(super) struct Engaged {
    /// Written when requests were used and the driver wants to know.
    pub(super) call: EventFd,
    /// Written when the driver broke the rules.
    pub(super) error: EventFd,
}

impl Vhost {
    pub(super) fn new(device: OwnedFd) -> Vhost {
        Vhost {
            device: File::from(device),
            owned: false,
        }
    }

    /// The kernel serves `queue` from where it stands.
    ///
    /// # Errors
    /// What the kernel says; the queue is still ours.
    pub(super) fn engage(
        &mut self,
        way: Way,
        queue: &Queue,
        features: u64,
        kick: &EventFd,
        tap: RawFd,
    ) -> io::Result<Engaged> {
        let begun = self.begin(way, queue, features, kick, tap);
        if begun.is_err() {
            self.let_go(way);
        }
        begun
    }

    fn begin(
        &mut self,
        way: Way,
        queue: &Queue,
        features: u64,
        kick: &EventFd,
        tap: RawFd,
    ) -> io::Result<Engaged> {
        if !self.owned {
            // SAFETY: the request takes no argument.
            check(unsafe { libc::ioctl(self.device.as_raw_fd(), SET_OWNER as _, 0) })?;
            self.owned = true;
        }
        let engaged = Engaged {
            call: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            error: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        };
        let rings = queue.rings();
        let entries = u64::from(rings.size);
        let addresses = Addresses {
            index: way as u32,
            flags: 0,
            descriptors: mapped(queue.memory(), rings.descriptors, 16 * entries)?,
            used: mapped(queue.memory(), rings.used, 6 + 8 * entries)?,
            available: mapped(queue.memory(), rings.available, 6 + 2 * entries)?,
            log: 0,
        };
        let table = memory_table(queue.memory())?;
        let features = features & (F_RING | F_MRG_RXBUF);
        // SAFETY: the request reads 64 bits.
        unsafe { self.ask(SET_FEATURES, &features) }?;
        // SAFETY: the request reads a header and as many regions as that says, which is what the table is.
        check(unsafe { libc::ioctl(self.device.as_raw_fd(), SET_MEM_TABLE as _, table.as_ptr()) })?;
        self.ring(way, SET_VRING_NUM, u32::from(rings.size))?;
        self.ring(way, SET_VRING_BASE, u32::from(queue.next_available()))?;
        // SAFETY: the request reads a vhost_vring_addr, and the rings stay mapped as long as the queue is in use.
        unsafe { self.ask(SET_VRING_ADDR, &addresses) }?;
        self.file(way, SET_VRING_CALL, engaged.call.as_raw_fd())?;
        self.file(way, SET_VRING_ERR, engaged.error.as_raw_fd())?;
        self.file(way, SET_VRING_KICK, kick.as_raw_fd())?;
        self.file(way, NET_SET_BACKEND, tap)?;
        // What was offered before the kernel listened.
        kick.write(1)?;
        Ok(engaged)
    }

    /// `queue` is ours again, from where the kernel has come to. Nothing of the guest's is touched by it any more.
    ///
    /// # Errors
    /// `Fault::Memory` when its rings are not RAM.
    pub(super) fn disengage(&self, way: Way, queue: &mut Queue) -> Result<(), Fault> {
        self.let_go(way);
        let mut base = Ring {
            index: way as u32,
            value: 0,
        };
        // SAFETY: the request reads and writes a vhost_vring_state, which outlives the call.
        let asked = unsafe { libc::ioctl(self.device.as_raw_fd(), GET_VRING_BASE as _, &mut base) };
        if asked < 0 {
            return Err(Fault::Request);
        }
        queue.taken_back(base.value as u16)
    }

    /// Without a backend it does nothing, and has done all that it began; what is not there is no matter.
    fn let_go(&self, way: Way) {
        for request in [
            NET_SET_BACKEND,
            SET_VRING_KICK,
            SET_VRING_CALL,
            SET_VRING_ERR,
        ] {
            let _ = self.file(way, request, NONE);
        }
    }

    fn ring(&self, way: Way, request: libc::c_ulong, value: u32) -> io::Result<()> {
        let ring = Ring {
            index: way as u32,
            value,
        };
        // SAFETY: the requests read a vhost_vring_state or a vhost_vring_file.
        unsafe { self.ask(request, &ring) }
    }

    fn file(&self, way: Way, request: libc::c_ulong, fd: RawFd) -> io::Result<()> {
        self.ring(way, request, fd as u32)
    }

    /// # Safety
    /// The request reads a `T`.
    unsafe fn ask<T>(&self, request: libc::c_ulong, argument: &T) -> io::Result<()> {
        // SAFETY: the caller's promise.
        check(unsafe {
            libc::ioctl(
                self.device.as_raw_fd(),
                request as _,
                std::ptr::from_ref(argument),
            )
        })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Where a piece of guest memory is mapped here.
fn mapped(memory: &GuestMemoryMmap, address: u64, bytes: u64) -> io::Result<u64> {
    let slice = memory.get_slice(GuestAddress(address), bytes as usize);
    let slice = slice.map_err(io::Error::other)?;
    Ok(slice.ptr_guard_mut().as_ptr() as u64)
}

/// `struct vhost_memory`: a header, and for each region its address, size, place here, and 64 bits of nothing.
fn memory_table(memory: &GuestMemoryMmap) -> io::Result<Vec<u64>> {
    // The number of regions and padding are 32 bits each.
    let mut table = vec![memory.num_regions() as u64];
    for region in memory.iter() {
        let start = region.start_addr().0;
        table.extend([start, region.len(), mapped(memory, start, region.len())?, 0]);
    }
    Ok(table)
}
