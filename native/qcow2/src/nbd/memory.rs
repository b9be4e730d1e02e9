// SPDX-License-Identifier: Apache-2.0
//! Memory for requests, of which some is kept for those to come.
//!
//! A piece may hold what an earlier request left: a write fills all of it before it begins, and of a read only that is
//! sent which succeeded, and so filled all of it.

use crate::buffer::Buffer;

/// Bytes kept.
const MAX_SPARE: usize = 16 << 20;
/// Pieces kept.
const PIECES: usize = 256;

/// What requests hold, and what is kept for others.
#[derive(Default)]
pub(super) struct Memory {
    held: usize,
    spare: Vec<Buffer>,
    spare_bytes: usize,
}

impl Memory {
    /// Bytes that requests hold.
    pub(super) fn held(&self) -> usize {
        self.held
    }

    pub(super) fn hold(&mut self, len: usize) -> Buffer {
        self.held += len;
        match self.spare.iter().rposition(|spare| spare.len() == len) {
            Some(place) => {
                self.spare_bytes -= len;
                self.spare.swap_remove(place)
            }
            None => Buffer::zeroed(len),
        }
    }

    /// A request needs it no more.
    pub(super) fn release(&mut self, memory: Buffer) {
        let len = memory.len();
        self.held -= len;
        if len > MAX_SPARE {
            return;
        }
        while self.spare_bytes + len > MAX_SPARE || self.spare.len() >= PIECES {
            self.spare_bytes -= self.spare.pop().map_or(0, |old| old.len());
        }
        self.spare_bytes += len;
        self.spare.push(memory);
    }
}
