// SPDX-License-Identifier: Apache-2.0
//! The shadow area, 0xc0000 to 0xfffff: RAM or firmware, as the host bridge's PAM registers say.
//!
//! Each of thirteen segments is in one of three states ("Intel 3 Series Express Chipset", 316966-002, 5.1.22):
//!
//! | reads | writes | the guest finds |
//! |---|---|---|
//! | RAM | RAM | RAM |
//! | RAM | – | RAM that it cannot write |
//! | – | any | the last 128 KiB of the firmware from 0xe0000 on; below, and without firmware, nothing |
//!
//! The fourth, reads from firmware and writes to RAM, is what no memory slot can do; as in QEMU, writes are lost
//! then. Devices always reach the RAM: these registers are the processors'.

use std::sync::{Arc, Mutex};

use vm_memory::mmap::MmapRegion;

use crate::error::Result;
use crate::layout::{EXTENDED_START, SHADOW_START};
use crate::memory::GuestMemoryMmap;
use crate::slots::{self, Slots, Source, View};

/// PAM0 to PAM6.
pub const REGISTERS: usize = 7;
/// All of it RAM: what firmware leaves behind, and what a machine without firmware begins with.
pub const ALL_RAM: [u8; REGISTERS] = [0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33];
/// All of it firmware: the state after power-on.
pub const ALL_FIRMWARE: [u8; REGISTERS] = [0; REGISTERS];

/// The firmware is seen from here on.
const ALIAS_START: u64 = 0xe_0000;

/// The area of one machine.
pub struct Shadow {
    slots: Arc<Slots>,
    ram: Arc<GuestMemoryMmap>,
    firmware: Option<Arc<MmapRegion>>,
    /// One change at a time.
    present: Mutex<[u8; REGISTERS]>,
}

/// A segment: its address, its size, its PAM register and the shift of its two bits there.
const fn segment(index: u64) -> (u64, u64, usize, u32) {
    match index {
        // PAM0 has one, the largest, in its upper half.
        12 => (0xf_0000, 0x1_0000, 0, 4),
        _ => (
            SHADOW_START + index * 0x4000,
            0x4000,
            1 + (index / 2) as usize,
            (index % 2) as u32 * 4,
        ),
    }
}

impl Shadow {
    /// The area with nothing in it; [`Shadow::apply`] fills it. `firmware` has at least 128 KiB.
    pub fn new(
        slots: Arc<Slots>,
        ram: Arc<GuestMemoryMmap>,
        firmware: Option<Arc<MmapRegion>>,
    ) -> Shadow {
        Shadow {
            slots,
            ram,
            firmware,
            present: Mutex::new(ALL_FIRMWARE),
        }
    }

    /// Shows what these registers say.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses; segments behind the one that failed are as before.
    pub fn apply(&self, pam: [u8; REGISTERS]) -> Result<()> {
        let mut present = self.present.lock().unwrap_or_else(|e| e.into_inner());
        *present = pam;
        for (index, slot) in (0..13).zip(slots::SHADOW..) {
            let (base, size, register, shift) = segment(index);
            let bits = pam.get(register).map_or(0, |value| value >> shift & 3);
            let view = match bits {
                1 | 3 => Some(View {
                    base,
                    size,
                    source: Source::Ram(self.ram.clone(), base),
                    read_only: bits == 1,
                }),
                _ => self.alias(base, size),
            };
            self.slots.set(slot, view)?;
        }
        Ok(())
    }

    fn alias(&self, base: u64, size: u64) -> Option<View> {
        let firmware = self.firmware.as_ref().filter(|_| base >= ALIAS_START)?;
        let offset = (firmware.size() as u64).checked_sub(EXTENDED_START.checked_sub(base)?)?;
        Some(View {
            base,
            size,
            source: Source::Mapping(firmware.clone(), offset),
            read_only: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fill_the_area_and_each_has_bits_of_its_own() {
        let mut segments: Vec<_> = (0..13).map(segment).collect();
        segments.sort_unstable();
        let mut next = SHADOW_START;
        for (base, size, ..) in &segments {
            assert_eq!(*base, next);
            next += size;
        }
        assert_eq!(next, EXTENDED_START);
        let mut bits: Vec<_> = segments.iter().map(|s| (s.2, s.3)).collect();
        bits.sort_unstable();
        bits.dedup();
        assert_eq!(bits.len(), 13);
        assert!(
            !bits.contains(&(0, 0)),
            "the lower half of PAM0 is not used"
        );
    }
}
