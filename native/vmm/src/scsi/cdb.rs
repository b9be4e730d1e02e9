// SPDX-License-Identifier: Apache-2.0
//! The fields of a command descriptor block, whose places depend on its length (SPC-4, 4.2).

/// The longest that is taken.
pub const LEN: usize = 32;

/// A command.
#[derive(Clone, Copy, Debug)]
pub struct Cdb(pub [u8; LEN]);

impl Cdb {
    /// Its operation code.
    pub fn opcode(&self) -> u8 {
        self.byte(0)
    }

    /// Byte `place`.
    pub fn byte(&self, place: usize) -> u8 {
        self.0.get(place).copied().unwrap_or(0)
    }

    /// Two bytes.
    pub fn be16(&self, place: usize) -> u16 {
        u16::from_be_bytes([self.byte(place), self.byte(place + 1)])
    }

    /// Four.
    pub fn be32(&self, place: usize) -> u32 {
        u32::from(self.be16(place)) << 16 | u32::from(self.be16(place + 2))
    }

    /// Eight.
    pub fn be64(&self, place: usize) -> u64 {
        u64::from(self.be32(place)) << 32 | u64::from(self.be32(place + 4))
    }

    /// Block and count of a command that moves blocks, by the length that its operation code says.
    pub fn range(&self) -> (u64, u64) {
        match self.opcode() >> 5 {
            0 => {
                let lba = self.be32(0) & 0x1f_ffff;
                // 0 is 256 here (SBC-3, 5.7).
                let count = u64::from(self.byte(4)).wrapping_sub(1) & 0xff;
                (u64::from(lba), count + 1)
            }
            1 | 2 => (u64::from(self.be32(2)), u64::from(self.be16(7))),
            5 => (u64::from(self.be32(2)), u64::from(self.be32(6))),
            _ => (self.be64(2), u64::from(self.be32(10))),
        }
    }

    /// Whether the blocks are to be on stable storage before the answer.
    pub fn force_unit_access(&self) -> bool {
        self.opcode() >> 5 != 0 && self.byte(1) & 8 != 0
    }
}
