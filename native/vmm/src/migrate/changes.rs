// SPDX-License-Identifier: Apache-2.0
//! Which parts of a disk were changed while a migration copies it.
//!
//! As [`super::marks`] are for memory. The I/O thread that serves a disk notes each request that changes something when it is
//! given back by the engine: a write, a zeroing, a discard; of a disk with a function of its own as of one of the host adapter, and
//! whether it went well or not, for one that failed may have changed a part. Everything that a guest does to a disk
//! goes that way, and the host does nothing to it meanwhile: what changes a size or a medium, and snapshots, have to wait.
//!
//! Nothing is missed, for the note comes after the change: whoever takes notes away reads the disk afterwards, and a
//! change that was not yet there then is noted later. Requests in flight when it is switched on end later, too, so they are noted; there
//! are none, since the machine stands then. When the machine stands at last, nothing is in flight, and all that was noted is sent.
//!
//! A map has one bit for [`Blocks::UNIT`] bytes, or for more, so that it has no more than [`Blocks::MOST`] bits, and is there only while
//! it is needed. Else a request costs one load and a branch.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use vmbus_qcow2::Op;

use super::marks::{run, BITS};

/// What of a disk was changed, while somebody wants to know.
#[derive(Debug, Default)]
pub struct Changed {
    on: AtomicBool,
    map: Mutex<Option<Blocks>>,
}

impl Changed {
    fn lock(&self) -> MutexGuard<'_, Option<Blocks>> {
        self.map.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A request has ended.
    pub fn note(&self, op: Op, offset: u64, len: u64) {
        let changes = match op {
            Op::Read | Op::Flush => false,
            Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } => true,
        };
        if changes && self.on.load(Ordering::Acquire) {
            if let Some(blocks) = self.lock().as_mut() {
                blocks.add(offset, len);
            }
        }
    }

    /// From now on; nothing is noted yet. While nothing is in flight.
    pub fn watch(&self, size: u64) {
        *self.lock() = Some(Blocks::none(size));
        self.on.store(true, Ordering::Release);
    }

    /// No more.
    pub fn forget(&self) {
        self.on.store(false, Ordering::Release);
        *self.lock() = None;
    }

    /// Takes all notes away: what was changed.
    pub fn take(&self, size: u64) -> Blocks {
        let none = Blocks::none(size);
        match self.lock().as_mut() {
            Some(map) => std::mem::replace(map, none),
            None => none,
        }
    }
}

/// A set of blocks of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    unit: u64,
    size: u64,
    words: Vec<u64>,
}

impl Blocks {
    /// Bytes of a block, at least.
    pub const UNIT: u64 = 16 << 10;
    /// The most blocks that a disk is cut into.
    pub const MOST: u64 = 1 << 25;

    /// None of a disk of so many bytes.
    pub fn none(size: u64) -> Blocks {
        let mut unit = Blocks::UNIT;
        while size.div_ceil(unit) > Blocks::MOST {
            unit = unit.saturating_mul(2);
        }
        Blocks {
            unit,
            size,
            words: vec![0; size.div_ceil(unit).div_ceil(BITS) as usize],
        }
    }

    /// All of it.
    pub fn all(size: u64) -> Blocks {
        let mut blocks = Blocks::none(size);
        blocks.add(0, size);
        blocks
    }

    /// Those that a range touches, as far as it is on the disk.
    pub fn add(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        let Some(last) = end.checked_sub(1).filter(|last| *last >= offset) else {
            return;
        };
        let (first, last) = (offset / self.unit, last / self.unit);
        for number in first / BITS..=last / BITS {
            let begin = number.saturating_mul(BITS);
            let from = first.saturating_sub(begin);
            let to = last.saturating_sub(begin).min(BITS - 1);
            if let Some(word) = self.words.get_mut(number as usize) {
                *word |= u64::MAX << from & u64::MAX >> (BITS - 1 - to);
            }
        }
    }

    /// These and the others, which are of the same disk.
    pub fn join(&mut self, others: &Blocks) {
        for (word, other) in self.words.iter_mut().zip(&others.words) {
            *word |= other;
        }
    }

    /// How many bytes they have, at most.
    pub fn bytes(&self) -> u64 {
        let blocks = self.words.iter().map(|word| u64::from(word.count_ones()));
        let bytes = blocks.sum::<u64>().saturating_mul(self.unit);
        bytes.min(self.size)
    }

    /// The first run of neighbours at or behind byte `from`, at most to the next multiple of `most` bytes (or one block): where it
    /// begins and its bytes.
    pub fn run(&self, from: u64, most: u64) -> Option<(u64, u64)> {
        let (begin, count) = run(
            &self.words,
            from.div_ceil(self.unit),
            (most / self.unit).max(1),
        )?;
        let begin = begin.saturating_mul(self.unit);
        let len = count.saturating_mul(self.unit);
        Some((begin, len.min(self.size.saturating_sub(begin))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn all(blocks: &Blocks, most: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        let mut from = 0;
        while let Some((begin, len)) = blocks.run(from, most) {
            runs.push((begin, len));
            from = begin + len;
        }
        runs
    }

    #[test]
    fn what_changes_something_is_noted_while_somebody_watches() {
        let changed = Changed::default();
        let write = Op::Write { fua: false };
        changed.note(write, 0, 512);
        changed.watch(4 * MIB);
        assert_eq!(changed.take(4 * MIB).bytes(), 0);
        changed.note(Op::Read, 0, MIB);
        changed.note(Op::Flush, 0, 0);
        changed.note(write, Blocks::UNIT - 1, 2);
        changed.note(Op::Discard, MIB, 1);
        changed.note(Op::WriteZeroes { unmap: true }, 4 * MIB - 1, 1);
        let unit = Blocks::UNIT;
        let wanted = [(0, 2 * unit), (MIB, unit), (4 * MIB - unit, unit)];
        assert_eq!(all(&changed.take(4 * MIB), MIB), wanted);
        assert_eq!(changed.take(4 * MIB).bytes(), 0);
        changed.forget();
        changed.note(write, 0, 512);
        assert_eq!(changed.take(4 * MIB).bytes(), 0);
    }

    #[test]
    fn a_disk_is_covered_to_its_last_byte_and_no_further() {
        for size in [0, 1, 511, Blocks::UNIT, 64 * Blocks::UNIT + 5, 3 * MIB + 1] {
            let whole = Blocks::all(size);
            assert_eq!(whole.bytes(), size);
            let runs = all(&whole, MIB);
            assert_eq!(runs.iter().map(|(_, len)| len).sum::<u64>(), size);
            assert!(runs.iter().all(|(begin, len)| begin % MIB + len <= MIB));
        }
        let mut some = Blocks::none(MIB);
        some.add(MIB - 1, u64::MAX);
        some.add(MIB, 1);
        some.add(5, 0);
        assert_eq!(all(&some, MIB), [(MIB - Blocks::UNIT, Blocks::UNIT)]);
    }

    #[test]
    fn a_map_stays_small_however_large_the_disk_is() {
        let size = 1 << 50;
        let mut blocks = Blocks::none(size);
        assert!(blocks.words.len() as u64 <= Blocks::MOST / BITS);
        blocks.add(size - 1, 1);
        let (begin, len) = blocks.run(0, MIB).unwrap();
        assert_eq!(begin + len, size);
    }
}
