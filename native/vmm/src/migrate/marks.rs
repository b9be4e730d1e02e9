// SPDX-License-Identifier: Apache-2.0
//! Which pages of the guest's RAM were written to while a migration runs.
//!
//! KVM's log has what vCPUs write, not what this process does. So the guest's memory carries a bit for each page,
//! and nobody who writes has to remember it:
//!
//! | who writes | who marks |
//! |---|---|
//! | a device, through [`vm_memory`] (rings, status bytes, replies, boot) | `vm_memory`, after each write |
//! | the kernel for a device, through an iovec (frames, sectors) | the queue, when the chain is given back ([`crate::virtio::queue`]) |
//! | the kernel for a loader, with pread() | the loader ([`crate::boot::file`]) |
//! | the balloon, which empties pages | [`crate::memory::discard`] |
//! | a vCPU | KVM; [`crate::slots::Slots::harvest`] brings it here |
//! | a vCPU, into a slot that goes away | the slot, all of it ([`crate::slots`]) |
//!
//! Nothing is missed, for the mark comes after the write: whoever takes a mark away reads the page afterwards, and
//! whoever writes after that marks again. Marks are switched on while the machine stands still, so nobody who wrote before
//! can have seen them off and write after the first round has read. A chain that is never given back has nothing that
//! its driver may look at.
//!
//! While no migration runs, a write costs one load and a branch.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::GuestMemoryBackend;

use crate::memory::{GuestMemoryMmap, PAGE};

/// Bits of a word.
pub(super) const BITS: u64 = 64;

/// The marks of one region of RAM.
#[derive(Debug, Default)]
pub struct Marks {
    on: AtomicBool,
    words: Box<[AtomicU64]>,
}

impl Marks {
    #[cold]
    fn mark(&self, offset: usize, len: usize) {
        let Some(last) = (offset as u64).checked_add(len as u64).filter(|_| len > 0) else {
            return;
        };
        let first = offset as u64 / PAGE;
        let last = last.saturating_sub(1) / PAGE;
        for number in first / BITS..=last / BITS {
            let Some(word) = self.words.get(number as usize) else {
                return;
            };
            let from = first.saturating_sub(number.saturating_mul(BITS));
            let to = last
                .saturating_sub(number.saturating_mul(BITS))
                .min(BITS - 1);
            word.fetch_or(
                u64::MAX << from & u64::MAX >> (BITS - 1 - to),
                Ordering::SeqCst,
            );
        }
    }
}

impl<'a> WithBitmapSlice<'a> for Marks {
    type S = RefSlice<'a, Marks>;
}

impl Bitmap for Marks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.on.load(Ordering::Relaxed) {
            self.mark(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE;
        let word = self.words.get((page / BITS) as usize);
        word.is_some_and(|word| word.load(Ordering::SeqCst) >> (page % BITS) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Marks> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for Marks {
    fn with_len(len: usize) -> Marks {
        let words = (len as u64).div_ceil(PAGE * BITS);
        Marks {
            on: AtomicBool::new(false),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// A set of pages of RAM, which are counted from the first and without the hole below 4 GiB. RAM has a multiple of
/// 1 MiB, and so has each of its regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages(Vec<u64>);

impl Pages {
    /// All of RAM.
    pub fn all(memory: &GuestMemoryMmap) -> Pages {
        let words: usize = memory.iter().map(|r| marks(r).words.len()).sum();
        Pages(vec![u64::MAX; words])
    }

    /// How many bytes they have.
    pub fn bytes(&self) -> u64 {
        let pages: u64 = self.0.iter().map(|word| u64::from(word.count_ones())).sum();
        pages.saturating_mul(PAGE)
    }

    /// These and the others.
    pub fn add(&mut self, others: &Pages) {
        for (word, other) in self.0.iter_mut().zip(&others.0) {
            *word |= other;
        }
    }

    /// The first run of neighbours at or behind byte `from`, at most to the next multiple of `most` bytes: where it begins and
    /// its bytes.
    pub fn run(&self, from: u64, most: u64) -> Option<(u64, u64)> {
        let (begin, count) = run(&self.0, from / PAGE, most / PAGE)?;
        Some((begin.saturating_mul(PAGE), count.saturating_mul(PAGE)))
    }
}

/// The first run of set bits at or behind bit `from`, at most to the next multiple of `most`: where it begins and how many.
pub(super) fn run(words: &[u64], from: u64, most: u64) -> Option<(u64, u64)> {
    let mut bit = from;
    loop {
        let word = words.get((bit / BITS) as usize)? >> (bit % BITS);
        if word != 0 {
            bit = bit.saturating_add(u64::from(word.trailing_zeros()));
            break;
        }
        bit = (bit / BITS).saturating_add(1).saturating_mul(BITS);
    }
    let begin = bit;
    let end = (begin / most).saturating_add(1).saturating_mul(most);
    while bit < end {
        let Some(word) = words.get((bit / BITS) as usize) else {
            break;
        };
        let here = u64::from((word >> (bit % BITS)).trailing_ones());
        let left = BITS.saturating_sub(bit % BITS);
        bit = bit.saturating_add(here.min(left));
        if here < left {
            break;
        }
    }
    Some((begin, bit.min(end).saturating_sub(begin)))
}

fn marks(region: &vm_memory::GuestRegionMmap<Marks>) -> &Marks {
    vm_memory::mmap::MmapRegion::bitmap(region)
}

/// Whether writes are marked.
pub fn is_on(memory: &GuestMemoryMmap) -> bool {
    let first = memory.iter().next();
    first.is_some_and(|region| marks(region).on.load(Ordering::Relaxed))
}

/// Switches marking on or off; nothing is marked afterwards. On: while nobody writes.
pub fn switch(memory: &GuestMemoryMmap, on: bool) {
    for region in memory.iter() {
        let marks = marks(region);
        marks.on.store(on, Ordering::SeqCst);
        for word in &marks.words {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// Takes all marks away: the pages that had one.
pub fn take(memory: &GuestMemoryMmap) -> Pages {
    let words = memory.iter().flat_map(|region| &marks(region).words);
    Pages(words.map(|word| word.swap(0, Ordering::SeqCst)).collect())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), 1 << 20),
            (GuestAddress(1 << 32), 1 << 20),
        ])
        .unwrap()
    }

    fn all(pages: &Pages, most: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let mut from = 0;
        while let Some((begin, len)) = pages.run(from, most) {
            runs.push((begin, len));
            from = begin + len;
        }
        runs
    }

    #[test]
    fn writes_are_marked_while_it_is_on_and_each_is_taken_once() {
        let memory = memory();
        memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
        switch(&memory, true);
        assert_eq!(take(&memory).bytes(), 0);
        memory
            .write_slice(&[1; 0x2000], GuestAddress(0x7fff))
            .unwrap();
        memory
            .write_obj(1u64, GuestAddress((1 << 32) + 0x1000))
            .unwrap();
        memory
            .store(1u16, GuestAddress(0xf_f000), Ordering::Relaxed)
            .unwrap();
        let pages = take(&memory);
        let wanted = [(0x7000, 0x3000), (0xf_f000, 0x1000), (0x10_1000, 0x1000)];
        assert_eq!(all(&pages, 1 << 20), wanted);
        assert_eq!(take(&memory).bytes(), 0);
        switch(&memory, false);
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(take(&memory).bytes(), 0);
    }

    #[test]
    fn runs_end_where_they_are_to_be_cut() {
        let memory = memory();
        let whole = Pages::all(&memory);
        assert_eq!(whole.bytes(), 2 << 20);
        let cut = all(&whole, 1 << 19);
        assert_eq!(cut.len(), 4);
        assert!(cut.iter().all(|(_, len)| *len == 1 << 19));
        assert_eq!(all(&whole, 1 << 24), [(0, 2 << 20)]);
        let mut some = take(&memory);
        switch(&memory, true);
        memory
            .write_slice(&[1; 66 * 4096], GuestAddress(0x3d000))
            .unwrap();
        some.add(&take(&memory));
        assert_eq!(all(&some, 1 << 24), [(0x3d000, 66 * 4096)]);
    }
}
