// SPDX-License-Identifier: Apache-2.0
//! The LPC bridge of ICH9 (8086:2918; "Intel I/O Controller Hub 9", 316972-004, chapter 13).
//!
//! Its registers are state that firmware writes and reads back. The power management block that PMBASE
//! points at is elsewhere and does not move: PMBASE and ACPI_CNTL are preset to where it is, which is also
//! where SeaBIOS and OVMF put it. From `vmbus-2` on it says that it decodes I/O and memory and masters the bus,
//! which cannot be turned off (13.1.3): OVMF takes no serial port and no keyboard from a bridge that does not.

use std::sync::Mutex;

use super::config::{
    ConfigSpace, Identity, COMMAND, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MASTER,
    COMMAND_MEMORY, MULTIFUNCTION,
};
use super::{Function, Window};
use crate::config::MachineType;
use crate::error::Result;
use crate::layout::PM_BASE;
use crate::state::{self, State, Stateful};

/// 00:1f.0.
pub struct LpcBridge(Mutex<ConfigSpace>);

/// Registers that are plain state: offset and writable bits.
const STATE: [(u16, &[u8]); 12] = [
    // PMBASE, ACPI_CNTL (enable, SCI's line)
    (0x40, &[0x80, 0xff]),
    (0x44, &[0x87]),
    // GPIOBASE, GPIO control
    (0x48, &[0x80, 0xff]),
    (0x4c, &[0x10]),
    // PIRQ A to D, serial IRQ control, PIRQ E to H
    (0x60, &[0x8f, 0x8f, 0x8f, 0x8f]),
    (0x64, &[0xff]),
    (0x68, &[0x8f, 0x8f, 0x8f, 0x8f]),
    // LPC I/O decode ranges and enables, generic decode ranges 1 to 4
    (0x80, &[0x77, 0x13, 0x0f, 0x3f]),
    (
        0x84,
        &[
            0xfd, 0xff, 0xfc, 0, 0xfd, 0xff, 0xfc, 0, 0xfd, 0xff, 0xfc, 0, 0xfd, 0xff, 0xfc, 0,
        ],
    ),
    // General power management configuration 1 to 3
    (0xa0, &[0x1f, 0x06, 0, 0, 0xf7, 0xff]),
    // BIOS control
    (0xdc, &[0x1f]),
    // RCBA
    (0xf0, &[0x01, 0xc0, 0xff, 0xff]),
];

impl LpcBridge {
    /// The bridge as `machine_type` has it, with ACPI enabled at its place.
    pub fn new(machine_type: MachineType) -> LpcBridge {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x2918,
            revision: 2,
            class: 0x060100,
            header: MULTIFUNCTION,
            subsystem: (0x1af4, 0x1100),
        });
        if machine_type >= MachineType::Two {
            let decodes = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER;
            space.put(COMMAND, &decodes.to_le_bytes());
            space.allow(COMMAND, &COMMAND_INTX_DISABLE.to_le_bytes());
        }
        for (register, mask) in STATE {
            space.allow(register, mask);
        }
        // Bit 0: these are I/O addresses.
        space.put(0x40, &(PM_BASE as u32 | 1).to_le_bytes());
        space.put(0x44, &[0x80]);
        space.put(0x48, &[0x01]);
        space.put(0x60, &[0x80; 4]);
        space.put(0x64, &[0x10]);
        space.put(0x68, &[0x80; 4]);
        // COM1 and the keyboard controller are decoded.
        space.put(0x82, &0x0401u16.to_le_bytes());
        space.seal();
        LpcBridge(Mutex::new(space))
    }
}

impl Stateful for LpcBridge {
    fn save(&self) -> Result<State> {
        state::write(&self.0.lock().unwrap_or_else(|e| e.into_inner()).saved())
    }

    fn restore(&self, state: &State) -> Result<()> {
        let mut space = self.0.lock().unwrap_or_else(|e| e.into_inner());
        space.take(&state::read(state)?)
    }
}

impl Function for LpcBridge {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.0
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> bool {
        self.0
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .write(register, data);
        false
    }

    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }

    fn read(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(bridge: &LpcBridge, register: u16) -> u32 {
        let mut data = [0; 4];
        bridge.config_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn firmware_finds_acpi_on_at_its_place() {
        let bridge = LpcBridge::new(MachineType::Two);
        assert_eq!(u32_at(&bridge, 0), 0x2918_8086);
        assert_eq!(u32_at(&bridge, 0x40), 0x601);
        assert_eq!(u32_at(&bridge, 0x44), 0x80);
        bridge.config_write(0x40, &0x601u32.to_le_bytes());
        assert_eq!(u32_at(&bridge, 0x40), 0x601);
    }

    /// SioBusDxe of OVMF looks for both before it takes the serial port.
    #[test]
    fn it_decodes_whatever_is_written_from_the_second_type_on() {
        for (machine_type, decodes) in [(MachineType::One, 0), (MachineType::Two, 7)] {
            let bridge = LpcBridge::new(machine_type);
            assert_eq!(u32_at(&bridge, COMMAND) & 7, decodes);
            bridge.config_write(COMMAND, &[0, 0]);
            assert_eq!(u32_at(&bridge, COMMAND) & 7, decodes);
        }
        let first = LpcBridge::new(MachineType::One);
        first.config_write(COMMAND, &[7, 0]);
        assert_eq!(u32_at(&first, COMMAND) & 7, 6);
    }

    #[test]
    fn rcba_keeps_its_address_and_enable_bit() {
        let bridge = LpcBridge::new(MachineType::Two);
        bridge.config_write(0xf0, &0xfed1_ffffu32.to_le_bytes());
        assert_eq!(u32_at(&bridge, 0xf0), 0xfed1_c001);
        bridge.reset();
        assert_eq!(u32_at(&bridge, 0xf0), 0);
    }
}
