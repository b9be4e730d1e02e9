// SPDX-License-Identifier: Apache-2.0
//! The host's end of an interface, whatever it is: the same to the thread that serves it, and to the guest.

use std::io;
use std::os::fd::RawFd;

use smallvec::SmallVec;

use super::hub::{Hub, MEMBERS_MAX};
use super::interface::PIECES_MAX;
use super::stream::Stream;
use super::Tap;
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Fault;

/// A link.
pub enum Link {
    /// A tap, whose kernel does what the driver leaves to the host.
    Tap(Tap),
    /// A stream of plain frames.
    Stream(Box<Stream>),
    /// The other machines of an isolated network.
    Hub(Box<Hub>),
}

impl Link {
    /// What a driver that accepted `features` takes.
    pub(super) fn leave_to_driver(&self, features: u64) {
        if let Link::Tap(tap) = self {
            // One that is being deleted refuses; no frame will come from it.
            let _ = tap.leave_to_driver(features);
        }
    }

    /// What to watch, for both directions; the place in the list is the number of a source.
    pub(super) fn fds(&self) -> SmallVec<[RawFd; 8]> {
        match self {
            Link::Tap(tap) => tap.fds().collect(),
            Link::Stream(stream) => stream.fd().into_iter().collect(),
            // Its members come later.
            Link::Hub(_) => SmallVec::new(),
        }
    }

    /// How many sources there are.
    pub(super) fn sources(&self) -> usize {
        match self {
            Link::Tap(tap) => tap.len(),
            Link::Stream(_) => 1,
            Link::Hub(_) => MEMBERS_MAX,
        }
    }

    /// Lets it go.
    pub(super) fn close(&mut self) {
        match self {
            Link::Tap(tap) => tap.close(),
            Link::Stream(stream) => stream.close(),
            Link::Hub(hub) => hub.close(),
        }
    }

    /// Whether transmit queues have to wait until the link can be written to.
    pub(super) fn is_full(&self) -> bool {
        match self {
            Link::Tap(_) | Link::Hub(_) => false,
            Link::Stream(stream) => stream.is_full(),
        }
    }

    /// Whether something waits until the link can be written to.
    pub(super) fn is_waiting(&self) -> bool {
        match self {
            Link::Tap(_) | Link::Hub(_) => false,
            Link::Stream(stream) => stream.is_waiting(),
        }
    }

    /// Writes what waits.
    pub(super) fn flush(&mut self) {
        if let Link::Stream(stream) = self {
            stream.flush();
        }
    }

    /// Sends the packet of a chain that the driver's pair has; false when it is dropped, as a wire would.
    pub(super) fn send(
        &mut self,
        pair: u16,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, Fault> {
        match self {
            Link::Tap(tap) => {
                let iovecs = chain.readable.iovecs(memory)?;
                if iovecs.len() > PIECES_MAX {
                    return Err(Fault::Pieces(iovecs.len()));
                }
                let queue = usize::from(pair).checked_rem(tap.len()).unwrap_or(0);
                // SAFETY: the iovecs are guest memory, which the queue keeps mapped.
                Ok(unsafe { tap.write(queue, &iovecs) }.is_ok())
            }
            Link::Stream(stream) => stream.send(chain, memory),
            Link::Hub(hub) => hub.send(chain, memory),
        }
    }

    /// Sends a packet of ours where somebody learns from it; it may get lost, as on a wire.
    pub(super) fn announce(&self, packet: &[u8]) {
        if let Link::Tap(tap) = self {
            let iovec = libc::iovec {
                iov_base: packet.as_ptr().cast_mut().cast(),
                iov_len: packet.len(),
            };
            // SAFETY: the packet lives through the call, which only reads it.
            let _ = unsafe { tap.write(0, &[iovec]) };
        }
    }

    /// Reads one packet with its header from a source; its length, or `WouldBlock` when there is none.
    ///
    /// # Errors
    /// What the kernel says, such as that the other end is gone.
    ///
    /// # Safety
    /// The iovecs are memory that may be written.
    pub(super) unsafe fn read(
        &mut self,
        source: usize,
        iovecs: &[libc::iovec],
    ) -> io::Result<usize> {
        match self {
            // SAFETY: the caller's promise.
            Link::Tap(tap) => unsafe { tap.read(source, iovecs) },
            // SAFETY: as above.
            Link::Stream(stream) => unsafe { stream.read(iovecs) },
            // SAFETY: as above.
            Link::Hub(hub) => unsafe { hub.read(source, iovecs) },
        }
    }
}
