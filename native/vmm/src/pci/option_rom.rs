// SPDX-License-Identifier: Apache-2.0
//! An expansion ROM BAR (PCI 3.0, 6.2.5.2): code of a device that firmware copies and runs.
//!
//! While it decodes, the guest reads it as memory where KVM shows it, so that copying it takes no exits.

use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

use super::config::{touches, ConfigSpace};
use super::{Seat, Window, Wiring};

/// The register.
const REGISTER: u16 = 0x30;
const ENABLE: u32 = 1;
/// What a window of this ROM has as its BAR.
pub const BAR: u8 = 6;

/// The ROM of one function.
pub struct OptionRom {
    seat: Seat,
    memory: Arc<MmapRegion>,
}

impl OptionRom {
    /// Declares the BAR, which decodes nothing yet. The ROM's size is a power of two.
    pub fn new(space: &mut ConfigSpace, seat: Seat, memory: Arc<MmapRegion>) -> OptionRom {
        let mask = !(memory.size() as u32).wrapping_sub(1);
        space.allow(REGISTER, &(mask | ENABLE).to_le_bytes());
        OptionRom { seat, memory }
    }

    /// What it decodes now.
    pub fn window(&self, space: &ConfigSpace) -> Option<Window> {
        let register = space.u32(REGISTER);
        (register & ENABLE != 0 && space.memory_enabled()).then(|| Window {
            bar: BAR,
            base: u64::from(register & !0x7ff),
            size: self.memory.size() as u64,
        })
    }

    /// Whether a write may have moved it.
    pub fn touched(register: u16, len: usize) -> bool {
        touches(register, len, REGISTER, 4) || touches(register, len, 4, 2)
    }

    /// Has KVM show it where it is now.
    pub fn show(&self, space: &ConfigSpace, wiring: &dyn Wiring) {
        let rom = self.window(space);
        let rom = rom.map(|window| (window.base, self.memory.clone()));
        // Where something else is already, reads arrive here.
        let _ = wiring.show_rom(self.seat, rom);
    }

    /// The guest reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let whole = self.memory.as_volatile_slice();
        // The window has the ROM's size.
        let _ = whole.read_slice(data, offset as usize);
    }
}
