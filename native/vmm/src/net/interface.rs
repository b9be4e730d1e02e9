// SPDX-License-Identifier: Apache-2.0
//! An interface while its driver runs: frames in, frames out, commands.
//!
//! A visit ends with the queue empty, the tap empty or the budget used up; "again" says the last.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use smallvec::SmallVec;

use super::engage::Changes;
use super::vhost::Engaged;
use super::{Counters, Link};
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::net::{
    purpose, Purpose, Settings, F_GUEST_TSO4, F_GUEST_TSO6, F_MRG_RXBUF, HEADER, HEADER_BUFFERS,
    MAC, MTU,
};
use crate::virtio::queue::{Fault, Queue};
use crate::virtio::{Activation, ActiveQueue, Served};

/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
pub(super) const VLAN: usize = 4;
/// The longest packet with its header: a TCP segment of 64 KiB (5.1.6.3.1).
pub(super) const LONGEST: usize = HEADER + ETHERNET + VLAN + 65536;
/// The longest that is no segment to be cut up, as far as the guest was told.
const FRAME: usize = HEADER + ETHERNET + VLAN + MTU as usize;
/// The most pieces of memory in one chain; two of these and one more are what a system call takes.
pub(super) const PIECES_MAX: usize = 511;

/// What is used again from call to call.
pub(super) struct Scratch {
    iovecs: Vec<libc::iovec>,
    /// What does not fit into the driver's buffers.
    overflow: Vec<u8>,
}

impl Default for Scratch {
    fn default() -> Scratch {
        Scratch {
            iovecs: Vec::new(),
            overflow: vec![0; LONGEST],
        }
    }
}

impl Scratch {
    fn overflow(&mut self) -> libc::iovec {
        libc::iovec {
            iov_base: self.overflow.as_mut_ptr().cast(),
            iov_len: self.overflow.len(),
        }
    }

    /// Throws away what the link has, up to more than its queues hold.
    pub(super) fn empty(&mut self, link: &mut Link) {
        for source in 0..link.sources() {
            self.empty_source(link, source);
        }
    }

    /// The same for one source; true if it may have more.
    pub(super) fn empty_source(&mut self, link: &mut Link, source: usize) -> bool {
        let overflow = self.overflow();
        for _ in 0..1024 {
            // SAFETY: the iovec is our own memory, which nothing else uses meanwhile.
            match unsafe { link.read(source, &[overflow]) } {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
                Ok(_) => {}
            }
        }
        true
    }
}

/// A chain taken off a receive queue.
struct Buffer {
    chain: Chain,
    iovecs: SmallVec<[libc::iovec; 4]>,
    len: usize,
}

/// A packet that fills all buffers there are and needs more: its length, and what is not in them.
pub(super) struct Held {
    len: usize,
    rest: Vec<u8>,
}

pub(super) struct ServedQueue {
    pub(super) inner: ActiveQueue,
    pub(super) purpose: Purpose,
    /// The kernel serves it.
    pub(super) engaged: Option<Engaged>,
    /// Buffers to be filled, in the ring's order, and their bytes and pieces.
    buffers: VecDeque<Buffer>,
    room: usize,
    pieces: usize,
    pub(super) held: Option<Held>,
}

/// From DRIVER_OK to the reset.
pub(super) struct Active {
    pub(super) queues: Vec<ServedQueue>,
    pub(super) settings: Settings,
    pub(super) features: u64,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) mergeable: bool,
    /// The tap filters as the settings say, and what it has for the driver may be left to the kernel.
    pub(super) armed: bool,
    pub(super) changes: Changes,
    /// Bytes of buffers that a packet may be expected to need.
    expected: usize,
    /// The driver broke the rules: nothing is done any more.
    pub(super) halted: bool,
}

impl Active {
    pub(super) fn new(activation: Activation, mac: [u8; MAC], pairs: u16) -> Active {
        let features = activation.features;
        let queues = activation.queues.into_iter();
        let mergeable = features & F_MRG_RXBUF != 0;
        let segments = features & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0;
        Active {
            queues: queues
                .map(|inner| ServedQueue {
                    purpose: purpose(inner.index, pairs, features),
                    inner,
                    engaged: None,
                    buffers: VecDeque::new(),
                    room: 0,
                    pieces: 0,
                    held: None,
                })
                .collect(),
            settings: activation
                .restored
                .and_then(|own| Settings::restored(mac, pairs, features, &own))
                .unwrap_or_else(|| Settings::new(mac, pairs, features)),
            halted: activation.interrupt.is_broken(),
            interrupt: activation.interrupt,
            features,
            mergeable,
            armed: false,
            changes: Changes::new(Instant::now()),
            expected: match (mergeable, segments) {
                (false, _) => 1,
                (true, false) => FRAME,
                (true, true) => LONGEST,
            },
        }
    }

    /// The queues that the driver has enabled.
    pub(super) fn len(&self) -> usize {
        self.queues.len()
    }

    pub(super) fn kicks(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.queues.iter().map(|queue| queue.inner.kick.as_raw_fd())
    }

    /// Pairs in use.
    pub(super) fn pairs(&self) -> u16 {
        self.settings.pairs
    }

    /// The address that the driver has now.
    pub(super) fn mac(&self) -> [u8; MAC] {
        self.settings.mac()
    }

    /// Whether the queue at `place` is one for receiving.
    pub(super) fn receives(&self, place: usize) -> bool {
        let queue = self.queues.get(place);
        queue.is_some_and(|queue| matches!(queue.purpose, Purpose::Receive(_)))
    }

    /// Whether the queue at `place` is the one for commands.
    pub(super) fn commands(&self, place: usize) -> bool {
        let queue = self.queues.get(place);
        queue.is_some_and(|queue| queue.purpose == Purpose::Control)
    }

    /// What is known of the queues, and what the driver has set by commands.
    pub(super) fn saved(&self) -> Served {
        let queues = self.queues.iter().map(|queue| &queue.inner);
        Served {
            queues: queues
                .map(|queue| (queue.index, queue.queue.position()))
                .collect(),
            own: self.settings.saved(),
        }
    }

    /// The configuration has changed.
    pub(super) fn configured(&self) {
        self.interrupt.configured();
    }

    /// The driver broke the rules.
    pub(super) fn fail(&mut self) {
        self.halted = true;
        self.interrupt.fail();
    }

    /// The machine pauses: what was taken off the receive queues and not filled is as if it never had been. A
    /// packet that waits for more buffers is dropped.
    pub(super) fn give_back(&mut self, counters: &Counters) {
        for queue in self.queues.iter_mut().filter(|_| !self.halted) {
            if let (Some(_), Purpose::Receive(pair)) = (queue.held.take(), queue.purpose) {
                counters.receive_dropped(pair);
            }
            queue.put_back();
        }
    }

    /// Takes what the link's source has; true for again.
    pub(super) fn receive(
        &mut self,
        source: usize,
        link: &mut Link,
        ready: &mut [bool],
        counters: &Counters,
        scratch: &mut Scratch,
    ) -> Result<bool, Fault> {
        let pair = (source % usize::from(self.settings.pairs.max(1))) as u16;
        let mut queues = self.queues.iter_mut();
        let queue = queues.find(|queue| queue.purpose == Purpose::Receive(pair));
        let (Some(queue), Some(ready), false) = (queue, ready.get_mut(source), self.halted) else {
            return Ok(false);
        };
        if queue.engaged.is_some() {
            return Ok(false);
        }
        queue.inner.queue.disable_notifications()?;
        let mut budget = queue.inner.queue.size().max(16);
        let mut again = false;
        while *ready {
            let Some(left) = budget.checked_sub(1) else {
                again = true;
                break;
            };
            budget = left;
            let wanted = match &queue.held {
                Some(held) => held.len,
                None => self.expected,
            };
            queue.gather(wanted)?;
            if let Some(held) = queue.held.take() {
                if queue.room >= held.len {
                    queue.finish(&held)?;
                    queue.sort(held.len, pair, &self.settings, counters)?;
                    continue;
                }
                if queue.can_grow() {
                    queue.held = Some(held);
                    if queue.inner.queue.enable_notifications()? {
                        continue;
                    }
                    break;
                }
                counters.receive_dropped(pair);
                continue;
            }
            if queue.buffers.is_empty() {
                if queue.inner.queue.enable_notifications()? {
                    continue;
                }
                break;
            }
            let buffers = if self.mergeable { usize::MAX } else { 1 };
            scratch.iovecs.clear();
            for buffer in queue.buffers.iter().take(buffers) {
                scratch.iovecs.extend_from_slice(&buffer.iovecs);
            }
            let overflow = scratch.overflow();
            scratch.iovecs.push(overflow);
            // SAFETY: the iovecs are guest memory, which the queue keeps mapped, and our own, which nothing else
            // uses meanwhile.
            let len = match unsafe { link.read(source, &scratch.iovecs) } {
                Ok(len) => len,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                // Nothing there, or the other end is gone: whatever comes is an edge.
                Err(_) => {
                    *ready = false;
                    break;
                }
            };
            let room = match queue.buffers.front() {
                Some(first) if !self.mergeable => first.len,
                _ => queue.room,
            };
            if len < HEADER + ETHERNET {
                counters.receive_dropped(pair);
            } else if len > room {
                let rest = scratch.overflow.get(..len.saturating_sub(room));
                match rest.filter(|_| self.mergeable) {
                    Some(rest) => {
                        queue.held = Some(Held {
                            len,
                            rest: rest.to_vec(),
                        });
                    }
                    None => counters.receive_dropped(pair),
                }
            } else {
                queue.sort(len, pair, &self.settings, counters)?;
            }
        }
        self.tell(pair)?;
        Ok(again)
    }

    fn tell(&mut self, pair: u16) -> Result<(), Fault> {
        let mut queues = self.queues.iter_mut();
        if let Some(queue) = queues.find(|queue| queue.purpose == Purpose::Receive(pair)) {
            if queue.inner.queue.wants_interrupt()? {
                self.interrupt.used(queue.inner.index);
            }
        }
        Ok(())
    }

    /// Serves a queue that the driver fills with frames, which are dropped without a `carrier`, or commands; true
    /// for again.
    pub(super) fn serve(
        &mut self,
        place: usize,
        link: &mut Link,
        carrier: bool,
        counters: &Counters,
    ) -> Result<bool, Fault> {
        let Some(queue) = self.queues.get_mut(place).filter(|_| !self.halted) else {
            return Ok(false);
        };
        let purpose = queue.purpose;
        if matches!(purpose, Purpose::Unused | Purpose::Receive(_)) || queue.engaged.is_some() {
            return Ok(false);
        }
        let index = queue.inner.index;
        let ring = &mut queue.inner.queue;
        let memory = ring.memory().clone();
        ring.disable_notifications()?;
        let mut budget = ring.size();
        let again = loop {
            if carrier && link.is_full() && matches!(purpose, Purpose::Transmit(_)) {
                // Its next edge is one for this queue too.
                break false;
            }
            let Some(left) = budget.checked_sub(1) else {
                break true;
            };
            budget = left;
            let Some(chain) = ring.pop()? else {
                if ring.enable_notifications()? {
                    continue;
                }
                break false;
            };
            let written = match purpose {
                Purpose::Transmit(pair) if !carrier => {
                    counters.transmit_dropped(pair);
                    0
                }
                Purpose::Transmit(pair) => {
                    transmit(&chain, &memory, pair, link, counters)?;
                    0
                }
                _ => {
                    counters.commanded();
                    self.settings.command(&chain, &memory)?
                }
            };
            ring.push(chain.head, written)?;
        };
        link.flush();
        if ring.wants_interrupt()? {
            self.interrupt.used(index);
        }
        Ok(again)
    }
}

impl ServedQueue {
    /// What was taken off the ring and not filled is as if it never had been.
    pub(super) fn put_back(&mut self) {
        self.inner.queue.unpop(self.buffers.len() as u16);
        self.buffers.clear();
        self.room = 0;
        self.pieces = 0;
    }

    /// Takes buffers off the ring until there is room for `wanted` bytes, or there are no more.
    fn gather(&mut self, wanted: usize) -> Result<(), Fault> {
        while self.room < wanted && self.pieces <= PIECES_MAX {
            let ring: &mut Queue = &mut self.inner.queue;
            let Some(chain) = ring.pop()? else {
                break;
            };
            // With the first bytes of a packet, each may have to hold the header (5.1.6.3.1).
            let len = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
            if !chain.readable.is_empty() || len < HEADER {
                return Err(Fault::Request);
            }
            let iovecs = chain.writable.iovecs(ring.memory())?;
            if iovecs.len() > PIECES_MAX {
                return Err(Fault::Pieces(iovecs.len()));
            }
            self.room = self.room.saturating_add(len);
            self.pieces = self.pieces.saturating_add(iovecs.len());
            self.buffers.push_back(Buffer { chain, iovecs, len });
        }
        Ok(())
    }

    /// Whether the driver can give more than it has: not when we hold all that the ring has, or all that one call
    /// takes.
    fn can_grow(&self) -> bool {
        self.buffers.len() < usize::from(self.inner.queue.size()) && self.pieces <= PIECES_MAX
    }

    /// Where the frame in the buffers goes to.
    fn destination(&self) -> Result<[u8; MAC], Fault> {
        let mut address = [0; MAC];
        let mut rest: &mut [u8] = &mut address;
        let mut skip = HEADER;
        for buffer in &self.buffers {
            let memory = self.inner.queue.memory();
            let got = buffer.chain.writable.read_at(memory, skip as u64, rest)?;
            skip = skip.saturating_sub(buffer.len);
            rest = std::mem::take(&mut rest).get_mut(got..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
        Ok(address)
    }

    /// Copies the rest of a packet that was held to the buffers that have come since.
    fn finish(&mut self, held: &Held) -> Result<(), Fault> {
        let mut start = 0usize;
        let first = held.len.saturating_sub(held.rest.len());
        let mut rest = held.rest.as_slice();
        for buffer in &self.buffers {
            let end = start.saturating_add(buffer.len);
            if end > first && !rest.is_empty() {
                let offset = first.saturating_sub(start) as u64;
                let memory = self.inner.queue.memory();
                let put = buffer.chain.writable.write_at(memory, offset, rest)?;
                rest = rest.get(put..).unwrap_or_default();
            }
            start = end;
        }
        Ok(())
    }

    /// Gives the driver the packet that is in the buffers if it wants it.
    fn sort(
        &mut self,
        len: usize,
        pair: u16,
        settings: &Settings,
        counters: &Counters,
    ) -> Result<(), Fault> {
        if settings.takes(&self.destination()?) {
            return self.deliver(len, pair, counters);
        }
        counters.filtered();
        Ok(())
    }

    /// Gives the driver the packet of `len` bytes that is in the buffers.
    fn deliver(&mut self, len: usize, pair: u16, counters: &Counters) -> Result<(), Fault> {
        let mut used: SmallVec<[(u16, u32); 64]> = SmallVec::new();
        let mut left = len;
        for buffer in &self.buffers {
            let written = left.min(buffer.len);
            used.push((buffer.chain.head, written as u32));
            left = left.saturating_sub(written);
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.buffers.front() {
            let count = (used.len() as u16).to_le_bytes();
            let memory = self.inner.queue.memory();
            first
                .chain
                .writable
                .write_at(memory, HEADER_BUFFERS, &count)?;
        }
        for buffer in self.buffers.drain(..used.len()) {
            self.room = self.room.saturating_sub(buffer.len);
            self.pieces = self.pieces.saturating_sub(buffer.iovecs.len());
        }
        self.inner.queue.push_together(used)?;
        counters.received(pair, len.saturating_sub(HEADER));
        Ok(())
    }
}

/// Sends one chain. What the link does not take is dropped, as a wire would.
fn transmit(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    pair: u16,
    link: &mut Link,
    counters: &Counters,
) -> Result<(), Fault> {
    let len = chain.readable.len();
    if !chain.writable.is_empty() || len < HEADER as u64 {
        return Err(Fault::Request);
    }
    if len <= LONGEST as u64 && link.send(pair, chain, memory)? {
        counters.transmitted(pair, (len as usize).saturating_sub(HEADER));
    } else {
        counters.transmit_dropped(pair);
    }
    Ok(())
}

/// Copies `parts`, one behind the other, to the iovecs as far as there is room; how many bytes there were in all.
///
/// # Safety
/// The iovecs are memory that may be written.
pub(super) unsafe fn scatter(iovecs: &[libc::iovec], parts: &[&[u8]]) -> usize {
    let mut room = iovecs.iter().copied();
    let mut place = room.next();
    for part in parts {
        let mut rest = *part;
        while let (Some(iovec), false) = (&mut place, rest.is_empty()) {
            let (here, after) = rest.split_at(rest.len().min(iovec.iov_len));
            let to: *mut u8 = iovec.iov_base.cast();
            // SAFETY: the caller's promise, and at most as many bytes as the iovec has.
            unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), to, here.len()) };
            // SAFETY: within the iovec, or one behind its end.
            iovec.iov_base = unsafe { to.add(here.len()) }.cast();
            iovec.iov_len = iovec.iov_len.saturating_sub(here.len());
            rest = after;
            if iovec.iov_len == 0 {
                place = room.next();
            }
        }
    }
    parts.iter().map(|part| part.len()).sum()
}
