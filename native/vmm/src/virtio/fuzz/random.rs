// SPDX-License-Identifier: Apache-2.0
//! Random numbers: the same for a seed on every host, since a failure is found again by its seed alone.

use crate::virtio::queue::testing::MEMORY;

/// xorshift64*: all that is needed of randomness here.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    pub(crate) fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// Numbers that break things, and plain ones.
    pub(crate) fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.pick(&[0, 1, 0xff, 0xffff, 0xffff_ffff, u64::MAX, 1 << 63]),
            1 => 1 << self.below(64),
            2 => MEMORY.wrapping_add(self.below(64)).wrapping_sub(32),
            3 => self.next(),
            _ => self.below(0x2_0000),
        }
    }
}
