// SPDX-License-Identifier: Apache-2.0
//! Numbers out of libFuzzer's bytes. What is not there any more is zero, so every input means something.

/// The bytes that are left.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of them.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Whether none are left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next `len` bytes as a number, the first being the highest.
    pub fn number(&mut self, len: usize) -> u64 {
        let (now, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        now.iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// A number below `limit`, out of as many bytes as that takes.
    pub fn below(&mut self, limit: u64) -> u64 {
        let len = (64 - limit.leading_zeros() as usize).div_ceil(8);
        self.number(len) % limit.max(1)
    }

    /// Whatever is left.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }
}
