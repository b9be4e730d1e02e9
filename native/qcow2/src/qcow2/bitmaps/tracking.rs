// SPDX-License-Identifier: Apache-2.0
//! What enabled bitmaps hear of while the image is open for writing.
//!
//! Only what was written since is held here; the bitmap's content stays in the file, marked in use, until both
//! are joined at the end. That takes at most `MOST` pieces of 4 KiB for all bitmaps of an image: beyond
//! that a piece is marked dirty as a whole. A bitmap that says too much makes a backup larger, never wrong.

use std::collections::HashMap;

use crate::qcow2::bitmaps::content;
use crate::state::State;

/// Bits in a piece.
const PIECE: u64 = 4096 * 8;
/// Pieces in all.
const MOST: usize = 4096;

enum Piece {
    All,
    Some(Box<[u8; 4096]>),
}

/// What one bitmap has to learn.
pub(crate) struct Tracked {
    pub(crate) name: String,
    pub(crate) granularity_bits: u32,
    /// Writes are recorded; else the bitmap only waits for its new size.
    pub(crate) enabled: bool,
    pieces: HashMap<u64, Piece>,
}

impl Tracked {
    pub(crate) fn new(name: &str, granularity_bits: u32, enabled: bool) -> Tracked {
        Tracked {
            name: name.to_owned(),
            granularity_bits,
            enabled,
            pieces: HashMap::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    fn mark(&mut self, at: u64, len: u64, room: &mut usize) {
        let mut bit = at >> self.granularity_bits;
        let end = ((at + len - 1) >> self.granularity_bits) + 1;
        while bit < end {
            let number = bit / PIECE;
            let until = end.min((number + 1) * PIECE);
            let first = bit % PIECE;
            let whole = first == 0 && until - bit == PIECE;
            let full = *room == 0;
            let piece = self.pieces.entry(number).or_insert_with(|| {
                if whole || full {
                    Piece::All
                } else {
                    *room -= 1;
                    Piece::Some(Box::new([0; 4096]))
                }
            });
            match piece {
                Piece::All => {}
                Piece::Some(_) if whole => {
                    *room += 1;
                    *piece = Piece::All;
                }
                Piece::Some(bits) => content::set(bits.as_mut_slice(), first..first + until - bit),
            }
            bit = until;
        }
    }

    /// Whether anything is to be learnt about `bits` bits from number `first` on.
    pub(crate) fn touches(&self, first: u64, bits: u64) -> bool {
        let pieces = first / PIECE..(first + bits).div_ceil(PIECE);
        if (pieces.end - pieces.start) as usize > self.pieces.len() {
            return self.pieces.keys().any(|number| pieces.contains(number));
        }
        pieces
            .into_iter()
            .any(|number| self.pieces.contains_key(&number))
    }

    /// Add what is held to a bitmap's bits, the first of which is number `first` (a multiple of 8).
    pub(crate) fn add_to(&self, bits: &mut [u8], first: u64) {
        let end = first + bits.len() as u64 * 8;
        for (number, piece) in &self.pieces {
            let start = number * PIECE;
            let (from, until) = (start.max(first), (start + PIECE).min(end));
            if from >= until {
                continue;
            }
            match piece {
                Piece::All => content::set(bits, from - first..until - first),
                Piece::Some(held) => {
                    let held = held.iter().skip(((from - start) / 8) as usize);
                    let here = bits.iter_mut().skip(((from - first) / 8) as usize);
                    let count = ((until - from) / 8) as usize;
                    here.zip(held)
                        .take(count)
                        .for_each(|(bits, held)| *bits |= held);
                }
            }
        }
    }
}

/// The bitmaps of an image that is open for writing.
#[derive(Default)]
pub(crate) struct Tracking {
    pub(crate) bitmaps: Vec<Tracked>,
    /// The disk's size has changed: all of them are written anew.
    pub(crate) resized: bool,
    /// Pieces in use.
    used: usize,
}

impl Tracking {
    /// Record a write, discard or zeroing.
    pub(crate) fn mark(&mut self, at: u64, len: u64) {
        if len == 0 || self.bitmaps.is_empty() {
            return;
        }
        let mut room = MOST.saturating_sub(self.used);
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.mark(at, len, &mut room);
        }
        self.used = MOST - room;
    }
}

impl State {
    /// The guest has written, or will have, these bytes.
    pub(crate) fn mark_dirty(&mut self, at: u64, len: u64) {
        self.tracking.mark(at, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(tracked: &Tracked, bits: u64) -> Vec<bool> {
        let mut bytes = vec![0; (bits / 8) as usize];
        tracked.add_to(&mut bytes, 0);
        (0..bits)
            .map(|bit| content::run(&bytes, bit, bit + 1).0)
            .collect()
    }

    #[test]
    fn what_was_written_is_dirty_and_nothing_else() {
        let mut tracking = Tracking::default();
        tracking.bitmaps.push(Tracked::new("b", 9, true));
        tracking.mark(700, 1);
        tracking.mark(5 * 512, 3 * 512);
        tracking.mark(PIECE * 512 - 1, 2);
        let seen = dirty(&tracking.bitmaps[0], PIECE + 8);
        let expected = |bit: &u64| [1, 5, 6, 7, PIECE - 1, PIECE].contains(bit);
        assert!((0..PIECE + 8).all(|bit| seen[bit as usize] == expected(&bit)));
    }

    #[test]
    fn memory_is_bounded_and_what_does_not_fit_is_dirty_as_a_whole() {
        let mut tracking = Tracking::default();
        tracking.bitmaps.push(Tracked::new("b", 9, true));
        for piece in 0..MOST as u64 + 50 {
            tracking.mark(piece * PIECE * 512, 512);
        }
        let pieces = &tracking.bitmaps[0].pieces;
        let held = pieces
            .values()
            .filter(|piece| matches!(piece, Piece::Some(_)));
        assert_eq!(held.count(), MOST);
        assert_eq!(pieces.len(), MOST + 50);
        // Whole pieces take no room.
        tracking.mark(0, PIECE * 512);
        assert_eq!(tracking.used, MOST - 1);
    }
}
