// SPDX-License-Identifier: Apache-2.0
//! Memory of our own through which data goes that cannot go straight: encrypted, compressed, or not aligned as the
//! file wants it. It is kept for the requests to come: zeroing it, and the page faults of new memory, would
//! cost as much as half of decrypting does.
//!
//! What was in it is somebody's data, so who takes a piece fills all of it: with what is read from a file (the engine
//! fills what lies past the end with zeros), or with what is gathered to be written.
//!
//! It is not registered with io_uring: that would be charged to the user's locked memory, of which a worker has little,
//! for the few per cent that looking up the pages takes.

use super::Engine;
use crate::buffer::Buffer;

/// Bytes kept.
const KEPT: usize = 8 << 20;
/// Pieces kept.
const PIECES: usize = 256;

/// Pieces that nobody uses.
#[derive(Default)]
pub(super) struct Bounces {
    free: Vec<Buffer>,
    bytes: usize,
}

impl Engine {
    /// A piece of `len` bytes, whatever is in it.
    pub(super) fn take_bounce(&mut self, len: usize) -> Buffer {
        if len == 0 {
            return Buffer::zeroed(0);
        }
        // The last ones are the warmest, and mostly of the size that is wanted again.
        let near = self.bounces.free.len().saturating_sub(8);
        for place in (near..self.bounces.free.len()).rev() {
            let fits = |buffer: &Buffer| (len..=4 * len.max(4096)).contains(&buffer.room());
            if self.bounces.free.get(place).is_some_and(fits) {
                let mut buffer = self.bounces.free.swap_remove(place);
                self.bounces.bytes -= buffer.room();
                buffer.resize(len);
                return buffer;
            }
        }
        Buffer::zeroed(len)
    }

    /// A piece is needed no more.
    pub(super) fn give_bounce(&mut self, buffer: Buffer) {
        let room = buffer.room();
        if room > 0 && self.bounces.free.len() < PIECES && self.bounces.bytes + room <= KEPT {
            self.bounces.bytes += room;
            self.bounces.free.push(buffer);
        }
    }
}
