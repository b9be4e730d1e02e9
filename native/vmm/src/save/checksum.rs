// SPDX-License-Identifier: Apache-2.0
//! CRC-32C (RFC 3720, appendix B.4): the processor's own instruction where there is one.

/// The reversed polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLE: [u32; 256] = table();

#[allow(clippy::indexing_slicing)] // by the compiler, within its bounds
const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 != 0 {
                value >> 1 ^ POLYNOMIAL
            } else {
                value >> 1
            };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

/// The checksum of bytes that come piece by piece.
#[derive(Clone, Copy, Debug)]
pub struct Crc32c(u32);

impl Default for Crc32c {
    fn default() -> Self {
        Crc32c(!0)
    }
}

impl Crc32c {
    /// Adds more bytes.
    pub fn add(&mut self, data: &[u8]) {
        self.0 = if std::arch::is_x86_feature_detected!("sse4.2") {
            // SAFETY: the processor has just said that it has the instruction.
            unsafe { by_instruction(self.0, data) }
        } else {
            by_table(self.0, data)
        };
    }

    /// The checksum of all bytes so far.
    pub fn value(self) -> u32 {
        !self.0
    }
}

/// The checksum of `data`.
pub fn of(data: &[u8]) -> u32 {
    let mut crc = Crc32c::default();
    crc.add(data);
    crc.value()
}

/// # Safety
/// The processor has SSE 4.2.
#[target_feature(enable = "sse4.2")]
unsafe fn by_instruction(crc: u32, data: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u64, _mm_crc32_u8};
    let mut words = data.chunks_exact(8);
    let mut wide = u64::from(crc);
    for word in &mut words {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        #[allow(unused_unsafe)] // newer Rust calls it safe
        // SAFETY: the caller's promise.
        let next = unsafe { _mm_crc32_u64(wide, word) };
        wide = next;
    }
    words.remainder().iter().fold(wide as u32, |crc, byte| {
        #[allow(unused_unsafe)]
        // SAFETY: the caller's promise.
        unsafe {
            _mm_crc32_u8(crc, *byte)
        }
    })
}

fn by_table(crc: u32, data: &[u8]) -> u32 {
    data.iter().fold(crc, |crc, byte| {
        let entry = TABLE.get(((crc ^ u32::from(*byte)) & 0xff) as usize);
        crc >> 8 ^ entry.copied().unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_give_the_standards_values() {
        // RFC 3720, B.4.
        assert_eq!(of(&[0; 32]), 0x8a91_36aa);
        assert_eq!(of(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(!by_table(!0, b"123456789"), 0xe306_9283);
        let data: Vec<u8> = (0..1003u32).map(|i| (i * 31) as u8).collect();
        for len in [0, 1, 7, 8, 9, 1003] {
            assert_eq!(of(&data[..len]), !by_table(!0, &data[..len]), "{len}");
        }
    }
}
