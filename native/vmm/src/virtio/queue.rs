// SPDX-License-Identifier: Apache-2.0
//! A split virtqueue, the device's side (virtio 1.2, 2.7), with indirect descriptors and event indexes.
//!
//! The rings are the guest's: every access goes through guest memory's own bounds check, no index is trusted, and
//! no chain is followed for more descriptors than the longest legal one has. What breaks the rules is a
//! [`Fault`]; the device then stops and asks for a reset (2.1.1, DEVICE_NEEDS_RESET). An own implementation
//! rather than the `virtio-queue` crate, because that one ends a broken chain silently and this one must tell.

use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::chain::{Chain, Segment};
use crate::memory::GuestMemoryMmap;
use crate::migrate::marks;

/// The largest queue that any device here offers, and so the longest legal chain.
pub const SIZE_MAX: u16 = 256;

const DESCRIPTOR: u64 = 16;
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;

const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;

/// How a driver broke the rules.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// An address that is not RAM, or a ring that is not aligned.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// A queue size that is zero, no power of two or too large.
    #[error("queue size {0}")]
    Size(u16),
    /// A ring that is not where a ring may be.
    #[error("ring at {0:#x}")]
    Ring(u64),
    /// More became available than the ring holds.
    #[error("available index {0} after {1}")]
    Available(u16, u16),
    /// A descriptor that does not exist.
    #[error("descriptor {0}")]
    Descriptor(u16),
    /// A chain that is too long, or goes in circles.
    #[error("chain of more than {SIZE_MAX} descriptors")]
    Long,
    /// An indirect descriptor where there may be none, or of an odd length.
    #[error("indirect table of {0} bytes")]
    Indirect(u32),
    /// A readable descriptor after a writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// A request that lacks its header or its status byte.
    #[error("request without header or status")]
    Request,
    /// More pieces of memory than one system call takes.
    #[error("{0} pieces of memory in one request")]
    Pieces(usize),
}

/// Where a driver has put its rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rings {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring ("driver area").
    pub available: u64,
    /// The used ring ("device area").
    pub used: u64,
}

/// What was negotiated that changes how the rings work.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingFeatures {
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_index: bool,
}

/// How far a queue has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    next_available: u16,
    next_used: u16,
    told: u16,
}

/// A queue in use.
pub struct Queue {
    memory: Arc<GuestMemoryMmap>,
    rings: Rings,
    features: RingFeatures,
    /// The available entry to look at next.
    next_available: u16,
    /// The used entry to write next.
    next_used: u16,
    /// `next_used` when the driver was last told.
    told: u16,
}

impl Queue {
    /// A queue with rings that lie in RAM.
    ///
    /// # Errors
    /// Any [`Fault`] of size, place or alignment.
    pub fn new(
        memory: Arc<GuestMemoryMmap>,
        rings: Rings,
        features: RingFeatures,
    ) -> Result<Queue, Fault> {
        let size = rings.size;
        if !size.is_power_of_two() || size > SIZE_MAX {
            return Err(Fault::Size(size));
        }
        let entries = u64::from(size);
        // Table 2.7: alignment and bytes of each part.
        for (address, align, bytes) in [
            (rings.descriptors, 16, DESCRIPTOR * entries),
            (rings.available, 2, 6 + 2 * entries),
            (rings.used, 4, 6 + 8 * entries),
        ] {
            if address % align != 0 || !memory.check_range(GuestAddress(address), bytes as usize) {
                return Err(Fault::Ring(address));
            }
        }
        Ok(Queue {
            memory,
            rings,
            features,
            next_available: 0,
            next_used: 0,
            told: 0,
        })
    }

    /// How far it has come. Chains that were popped and not pushed are forgotten: there are none while it stands still.
    pub fn position(&self) -> Position {
        Position {
            next_available: self.next_available,
            next_used: self.next_used,
            told: self.told,
        }
    }

    /// Goes on from there.
    pub fn go_on_from(&mut self, position: Position) {
        self.next_available = position.next_available;
        self.next_used = position.next_used;
        self.told = position.told;
    }

    /// Where it is.
    pub fn rings(&self) -> Rings {
        self.rings
    }

    /// The available entry to look at next.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    /// Somebody else has served the queue meanwhile, and looks at `next_available` next. The used ring, which that one
    /// has written to, is written once more: so the pages that it is in are known to have changed.
    ///
    /// # Errors
    /// `Fault::Memory` when the used ring is not RAM.
    pub fn taken_back(&mut self, next_available: u16) -> Result<(), Fault> {
        let mut ring = vec![0; 6 + 8 * usize::from(self.rings.size)];
        self.memory.read_slice(&mut ring, at(self.rings.used, 0))?;
        self.memory.write_slice(&ring, at(self.rings.used, 0))?;
        self.next_available = next_available;
        self.next_used = self.load(self.rings.used, 2, Ordering::Acquire)?;
        self.told = self.next_used;
        Ok(())
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.rings.size
    }

    /// The memory that the queue is in.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// The next request that the driver has made available, if there is one.
    ///
    /// # Errors
    /// Any [`Fault`]; the queue must not be used again.
    pub fn pop(&mut self) -> Result<Option<Chain>, Fault> {
        let index = self.available_index()?;
        let waiting = index.wrapping_sub(self.next_available);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > self.rings.size {
            return Err(Fault::Available(index, self.next_available));
        }
        let entry = self.slot(self.next_available);
        let head = self.load(self.rings.available, 4 + 2 * entry, Ordering::Relaxed)?;
        let chain = self.walk(head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// The last `count` chains that were popped, none of which was pushed, are as if they never had been.
    pub fn unpop(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_sub(count);
    }

    /// Gives chain `head` back, with `len` bytes written to it.
    ///
    /// # Errors
    /// `Fault::Memory` when the used ring is not RAM any more.
    pub fn push(&mut self, head: u16, len: u32) -> Result<(), Fault> {
        self.push_together([(head, len)])
    }

    /// Gives chains back so that the driver sees all of them at once, or none.
    ///
    /// # Errors
    /// `Fault::Memory` when the used ring is not RAM any more.
    pub fn push_together(
        &mut self,
        chains: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), Fault> {
        let marking = marks::is_on(&self.memory);
        for (head, len) in chains {
            if marking {
                self.mark(head)?;
            }
            let entry = u64::from(head) | u64::from(len) << 32;
            let place = 4 + 8 * self.slot(self.next_used);
            self.memory
                .write_slice(&entry.to_le_bytes(), at(self.rings.used, place))?;
            self.next_used = self.next_used.wrapping_add(1);
        }
        self.store(self.rings.used, 2, self.next_used, Ordering::Release)
    }

    /// Marks what may have been written to a chain that is given back. Its driver may not have touched it (2.7.13), so it is
    /// what it was.
    fn mark(&self, head: u16) -> Result<(), Fault> {
        for segment in self.walk(head)?.writable.iter() {
            let address = GuestAddress(segment.address);
            for slice in self.memory.get_slices(address, segment.len as usize) {
                let slice = slice?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
        Ok(())
    }

    /// Whether the driver wants to be told about what was pushed since the last time.
    ///
    /// # Errors
    /// `Fault::Memory` when the available ring is not RAM any more.
    pub fn wants_interrupt(&mut self) -> Result<bool, Fault> {
        if self.told == self.next_used {
            return Ok(false);
        }
        // The used index must be visible before we look whether the driver waits for it.
        fence(Ordering::SeqCst);
        let told = std::mem::replace(&mut self.told, self.next_used);
        if !self.features.event_index {
            let flags = self.load(self.rings.available, 0, Ordering::Relaxed)?;
            return Ok(flags & AVAILABLE_NO_INTERRUPT == 0);
        }
        let place = 4 + 2 * u64::from(self.rings.size);
        let event = self.load(self.rings.available, place, Ordering::Relaxed)?;
        // vring_need_event of 2.7.10.1
        let since_event = self.next_used.wrapping_sub(event).wrapping_sub(1);
        Ok(since_event < self.next_used.wrapping_sub(told))
    }

    /// Asks the driver to notify us of the next request; true if there is one already.
    ///
    /// # Errors
    /// `Fault::Memory` when the rings are not RAM any more.
    pub fn enable_notifications(&mut self) -> Result<bool, Fault> {
        if self.features.event_index {
            let place = 4 + 8 * u64::from(self.rings.size);
            self.store(
                self.rings.used,
                place,
                self.next_available,
                Ordering::Relaxed,
            )?;
        } else {
            self.store(self.rings.used, 0, 0, Ordering::Relaxed)?;
        }
        // The wish must be visible before we look whether the driver has gone ahead.
        fence(Ordering::SeqCst);
        Ok(self.available_index()? != self.next_available)
    }

    /// Tells the driver that we look by ourselves.
    ///
    /// # Errors
    /// `Fault::Memory` when the used ring is not RAM any more.
    pub fn disable_notifications(&mut self) -> Result<(), Fault> {
        // With event indexes, one that lies behind says the same.
        if self.features.event_index {
            return Ok(());
        }
        self.store(self.rings.used, 0, USED_NO_NOTIFY, Ordering::Relaxed)
    }

    /// Follows the chain from `head` (2.7.5).
    fn walk(&self, head: u16) -> Result<Chain, Fault> {
        let mut chain = Chain {
            head,
            ..Chain::default()
        };
        let mut table = self.rings.descriptors;
        let mut entries = self.rings.size;
        let mut in_indirect = false;
        let mut index = head;
        // One more than the longest chain, for a descriptor that only names the indirect table.
        for _ in 0..=SIZE_MAX {
            if index >= entries {
                return Err(Fault::Descriptor(index));
            }
            let mut bytes = [0; DESCRIPTOR as usize];
            self.memory
                .read_slice(&mut bytes, at(table, DESCRIPTOR * u64::from(index)))?;
            let value = u128::from_le_bytes(bytes);
            let address = value as u64;
            let len = (value >> 64) as u32;
            let flags = (value >> 96) as u16;
            let next = (value >> 112) as u16;
            if flags & DESCRIPTOR_INDIRECT != 0 {
                let count = len / DESCRIPTOR as u32;
                if in_indirect
                    || !self.features.indirect
                    || flags & DESCRIPTOR_NEXT != 0
                    || len % DESCRIPTOR as u32 != 0
                    || !(1..=u32::from(SIZE_MAX)).contains(&count)
                {
                    return Err(Fault::Indirect(len));
                }
                in_indirect = true;
                (table, entries, index) = (address, count as u16, 0);
                continue;
            }
            if len > 0 {
                let segment = Segment { address, len };
                if flags & DESCRIPTOR_WRITE != 0 {
                    chain.writable.0.push(segment);
                } else if chain.writable.is_empty() {
                    chain.readable.0.push(segment);
                } else {
                    return Err(Fault::Order);
                }
            }
            if flags & DESCRIPTOR_NEXT == 0 {
                return Ok(chain);
            }
            index = next;
        }
        Err(Fault::Long)
    }

    fn available_index(&self) -> Result<u16, Fault> {
        self.load(self.rings.available, 2, Ordering::Acquire)
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index & self.rings.size.wrapping_sub(1))
    }

    fn load(&self, ring: u64, place: u64, order: Ordering) -> Result<u16, Fault> {
        Ok(u16::from_le(self.memory.load(at(ring, place), order)?))
    }

    fn store(&self, ring: u64, place: u64, value: u16, order: Ordering) -> Result<(), Fault> {
        Ok(self.memory.store(value.to_le(), at(ring, place), order)?)
    }
}

/// An address that wraps around is not RAM: the bounds check finds it.
fn at(base: u64, offset: u64) -> GuestAddress {
    GuestAddress(base.wrapping_add(offset))
}

#[cfg(test)]
pub(crate) mod testing {
    //! The driver's side of a queue, for tests.

    use super::*;

    pub const MEMORY: u64 = 0x10_0000;

    pub fn memory() -> Arc<GuestMemoryMmap> {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap())
    }

    pub fn rings(base: u64, size: u16) -> Rings {
        Rings {
            size,
            descriptors: base,
            available: base + 0x1000,
            used: base + 0x2000,
        }
    }

    pub struct Driver {
        pub memory: Arc<GuestMemoryMmap>,
        pub rings: Rings,
        pub available: u16,
    }

    impl Driver {
        pub fn new(memory: Arc<GuestMemoryMmap>, rings: Rings) -> Driver {
            Driver {
                memory,
                rings,
                available: 0,
            }
        }

        pub fn descriptor_at(
            &self,
            table: u64,
            index: u16,
            address: u64,
            len: u32,
            flags: u16,
            next: u16,
        ) {
            let value = u128::from(address)
                | u128::from(len) << 64
                | u128::from(flags) << 96
                | u128::from(next) << 112;
            self.memory
                .write_slice(
                    &value.to_le_bytes(),
                    GuestAddress(table + 16 * u64::from(index)),
                )
                .unwrap();
        }

        pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
            self.descriptor_at(self.rings.descriptors, index, address, len, flags, next);
        }

        pub fn offer(&mut self, head: u16) {
            let slot = u64::from(self.available % self.rings.size);
            self.put(self.rings.available + 4 + 2 * slot, head);
            self.available = self.available.wrapping_add(1);
            self.put(self.rings.available + 2, self.available);
        }

        pub fn put(&self, address: u64, value: u16) {
            self.memory.write_obj(value, GuestAddress(address)).unwrap();
        }

        pub fn get(&self, address: u64) -> u16 {
            self.memory.read_obj(GuestAddress(address)).unwrap()
        }

        pub fn used_index(&self) -> u16 {
            self.get(self.rings.used + 2)
        }

        pub fn used(&self, index: u16) -> (u32, u32) {
            let slot = u64::from(index % self.rings.size);
            let entry: u64 = self
                .memory
                .read_obj(GuestAddress(self.rings.used + 4 + 8 * slot))
                .unwrap();
            (entry as u32, (entry >> 32) as u32)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::*;
    use super::*;

    const ALL: RingFeatures = RingFeatures {
        indirect: true,
        event_index: true,
    };
    const NONE: RingFeatures = RingFeatures {
        indirect: false,
        event_index: false,
    };

    fn pair(features: RingFeatures) -> (Driver, Queue) {
        let memory = memory();
        let rings = rings(0, 8);
        let queue = Queue::new(memory.clone(), rings, features).unwrap();
        (Driver::new(memory, rings), queue)
    }

    #[test]
    fn a_chain_comes_out_as_the_driver_laid_it() {
        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(3, 0x8000, 16, DESCRIPTOR_NEXT, 5);
        driver.descriptor(5, 0x9000, 512, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, 0);
        driver.descriptor(0, 0xa000, 1, DESCRIPTOR_WRITE, 7);
        assert!(queue.pop().unwrap().is_none());
        driver.offer(3);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(
            (chain.head, chain.readable.len(), chain.writable.len()),
            (3, 16, 513)
        );
        queue.push(3, 513).unwrap();
        assert_eq!(driver.used_index(), 1);
        assert_eq!(driver.used(0), (3, 513));
        assert!(queue.pop().unwrap().is_none());
    }

    #[test]
    fn an_indirect_table_is_followed_once() {
        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(0, 0x8000, 4, DESCRIPTOR_NEXT, 1);
        driver.descriptor(1, 0x4000, 32, DESCRIPTOR_INDIRECT, 0);
        driver.descriptor_at(0x4000, 0, 0x9000, 8, DESCRIPTOR_NEXT, 1);
        driver.descriptor_at(0x4000, 1, 0xa000, 2, DESCRIPTOR_WRITE, 0);
        driver.offer(0);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (12, 2));
        driver.descriptor_at(0x4000, 0, 0x4000, 32, DESCRIPTOR_INDIRECT, 0);
        driver.offer(0);
        assert!(matches!(queue.pop(), Err(Fault::Indirect(32))));
    }

    #[test]
    fn indirect_needs_the_feature_and_a_whole_table() {
        let (mut driver, mut queue) = pair(NONE);
        driver.descriptor(0, 0x4000, 16, DESCRIPTOR_INDIRECT, 0);
        driver.offer(0);
        assert!(matches!(queue.pop(), Err(Fault::Indirect(16))));
        for len in [0, 15, 17, 16 * 257, u32::MAX] {
            let (mut driver, mut queue) = pair(ALL);
            driver.descriptor(0, 0x4000, len, DESCRIPTOR_INDIRECT, 0);
            driver.offer(0);
            assert!(matches!(queue.pop(), Err(Fault::Indirect(_))), "{len}");
        }
    }

    #[test]
    fn circles_end() {
        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(0, 0x8000, 4, DESCRIPTOR_NEXT, 1);
        driver.descriptor(1, 0x8000, 0, DESCRIPTOR_NEXT, 0);
        driver.offer(0);
        assert!(matches!(queue.pop(), Err(Fault::Long)));
    }

    #[test]
    fn indexes_out_of_range_are_faults() {
        let (mut driver, mut queue) = pair(ALL);
        driver.offer(8);
        assert!(matches!(queue.pop(), Err(Fault::Descriptor(8))));
        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(0, 0, 1, DESCRIPTOR_NEXT, 0xffff);
        driver.offer(0);
        assert!(matches!(queue.pop(), Err(Fault::Descriptor(0xffff))));
        let (mut driver, mut queue) = pair(ALL);
        driver.available = 8;
        driver.offer(0);
        assert!(matches!(queue.pop(), Err(Fault::Available(9, 0))));
    }

    #[test]
    fn readable_after_writable_is_a_fault() {
        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(0, 0x8000, 1, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE, 1);
        driver.descriptor(1, 0x8000, 1, 0, 0);
        driver.offer(0);
        assert!(matches!(queue.pop(), Err(Fault::Order)));
    }

    #[test]
    fn rings_must_lie_aligned_in_ram() {
        let memory = memory();
        let good = rings(0, 8);
        for bad in [
            Rings { size: 0, ..good },
            Rings { size: 3, ..good },
            Rings { size: 512, ..good },
            Rings {
                descriptors: 8,
                ..good
            },
            Rings {
                descriptors: MEMORY,
                ..good
            },
            Rings {
                available: 1,
                ..good
            },
            Rings {
                used: MEMORY - 64,
                ..good
            },
            Rings { used: 2, ..good },
            Rings {
                used: u64::MAX - 3,
                ..good
            },
        ] {
            assert!(Queue::new(memory.clone(), bad, ALL).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn event_indexes_say_when_to_interrupt() {
        let (driver, mut queue) = pair(ALL);
        let used_event = driver.rings.available + 4 + 16;
        assert!(!queue.wants_interrupt().unwrap());
        driver.put(used_event, 1);
        queue.push(0, 0).unwrap();
        assert!(!queue.wants_interrupt().unwrap());
        queue.push(0, 0).unwrap();
        assert!(queue.wants_interrupt().unwrap());
        assert!(!queue.wants_interrupt().unwrap());
    }

    #[test]
    fn without_event_indexes_a_flag_says_so() {
        let (driver, mut queue) = pair(NONE);
        queue.push(0, 0).unwrap();
        assert!(queue.wants_interrupt().unwrap());
        driver.put(driver.rings.available, AVAILABLE_NO_INTERRUPT);
        queue.push(0, 0).unwrap();
        assert!(!queue.wants_interrupt().unwrap());
    }

    #[test]
    fn notifications_are_asked_for_and_declined() {
        let (mut driver, mut queue) = pair(NONE);
        queue.disable_notifications().unwrap();
        assert_eq!(driver.get(driver.rings.used), USED_NO_NOTIFY);
        assert!(!queue.enable_notifications().unwrap());
        assert_eq!(driver.get(driver.rings.used), 0);
        driver.offer(0);
        assert!(queue.enable_notifications().unwrap());

        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(0, 0x8000, 1, 0, 0);
        driver.offer(0);
        queue.pop().unwrap();
        assert!(!queue.enable_notifications().unwrap());
        assert_eq!(driver.get(driver.rings.used + 4 + 64), 1);
    }

    #[test]
    fn what_somebody_else_has_served_is_gone_on_with_and_marked() {
        let (mut driver, mut queue) = pair(RingFeatures::default());
        for head in 0..3 {
            driver.descriptor(head, 0x8000, 16, DESCRIPTOR_WRITE, 0);
            driver.offer(head);
        }
        // Somebody else has taken two and given them back, and nobody saw it write.
        let used = queue.rings().used;
        driver
            .memory
            .write_obj(2u16, GuestAddress(used + 2))
            .unwrap();
        marks::switch(&driver.memory, true);
        queue.taken_back(2).unwrap();
        let marked = marks::take(&driver.memory).run(0, 1 << 20).unwrap();
        assert_eq!(marked, (used & !0xfff, 0x1000));
        assert_eq!(queue.pop().unwrap().unwrap().head, 2);
        queue.push(2, 16).unwrap();
        assert_eq!(driver.used_index(), 3);
        assert!(queue.pop().unwrap().is_none());
    }

    #[test]
    fn indexes_wrap_around() {
        let (mut driver, mut queue) = pair(ALL);
        driver.descriptor(0, 0x8000, 1, 0, 0);
        for round in 0..70_000u32 {
            driver.offer(0);
            assert_eq!(queue.pop().unwrap().unwrap().head, 0, "{round}");
            queue.push(0, 0).unwrap();
        }
        assert_eq!(driver.used_index(), 70_000u32 as u16);
    }
}
