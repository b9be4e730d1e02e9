// SPDX-License-Identifier: Apache-2.0
//! The reset control register at port 0xcf9 (ICH9 datasheet, 13.7.5), which is ACPI's reset register too.
//!
//! It lies within the range of PCI configuration mechanism #1 (0xcf8 to 0xcff), so this device takes the
//! whole range and hands on what is not a byte at 0xcf9.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::cpu::gate::{Cause, Gate};
use crate::error::Result;
use crate::layout::{PCI_CONFIG, RESET_CONTROL};
use crate::state::{self, State, Stateful};

/// Resets when it goes from 0 to 1.
const RST_CPU: u8 = 1 << 2;
/// Bits that are kept: FULL_RST, RST_CPU, SYS_RST.
const MASK: u8 = 0b1110;

/// The register, in front of the PCI host bridge.
pub struct ResetControl {
    value: AtomicU8,
    gate: Arc<Gate>,
    pci: Arc<dyn BusDevice>,
}

impl ResetControl {
    /// The register; `pci` has the other ports of 0xcf8 to 0xcff.
    pub fn new(gate: Arc<Gate>, pci: Arc<dyn BusDevice>) -> ResetControl {
        ResetControl {
            value: AtomicU8::new(0),
            gate,
            pci,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        self.value.store(0, Ordering::Relaxed);
    }

    const OFFSET: u64 = RESET_CONTROL - PCI_CONFIG;
}

impl Stateful for ResetControl {
    fn save(&self) -> Result<State> {
        state::write(&self.value.load(Ordering::Relaxed))
    }

    fn restore(&self, state: &State) -> Result<()> {
        let value: u8 = state::read(state)?;
        self.value.store(value & MASK, Ordering::Relaxed);
        Ok(())
    }
}

impl BusDevice for ResetControl {
    fn read(&self, base: u64, offset: u64, data: &mut [u8]) {
        match data {
            [byte] if offset == Self::OFFSET => *byte = self.value.load(Ordering::Relaxed),
            _ => self.pci.read(base, offset, data),
        }
    }

    fn write(&self, base: u64, offset: u64, data: &[u8]) {
        match data {
            [byte] if offset == Self::OFFSET => {
                let before = self.value.swap(byte & MASK, Ordering::Relaxed);
                if byte & !before & RST_CPU != 0 {
                    self.gate.raise(Cause::Reset("port 0xcf9"));
                }
            }
            _ => self.pci.write(base, offset, data),
        }
    }
}
