// SPDX-License-Identifier: Apache-2.0
//! The host bridge of Q35 (8086:29c0, "Intel 3 Series Express Chipset", 316966-002, chapter 5).
//!
//! PCIEXBAR places the ECAM, which [`super::root`] looks up. PAM says what lies from 0xc0000 to 0xfffff; whoever makes the
//! bridge hears of each change. SMRAM is kept as state only: there is no SMM.

use std::sync::{Mutex, MutexGuard};

use super::config::{touches, ConfigSpace, Identity};
use super::{Function, Window};
use crate::error::Result;
use crate::firmware::shadow::REGISTERS;
use crate::state::{self, State, Stateful};

/// Where the ECAM is (64 bits).
const PCIEXBAR: u16 = 0x60;
/// PAM0 to PAM6: who decodes 0xc0000 to 0xfffff.
const PAM: u16 = 0x90;
/// System management RAM control, and its extension.
const SMRAM: u16 = 0x9d;

/// Hears what PAM0 to PAM6 say now.
pub type OnPam = Box<dyn Fn([u8; REGISTERS]) + Send + Sync>;

/// 00:00.0.
pub struct HostBridge {
    space: Mutex<ConfigSpace>,
    on_pam: OnPam,
}

impl HostBridge {
    /// The bridge, with the ECAM of 256 buses at `ecam` (a multiple of 256 MiB) and these PAM registers after power-on.
    pub fn new(ecam: u64, pam: [u8; REGISTERS], on_pam: OnPam) -> HostBridge {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x29c0,
            revision: 0,
            class: 0x060000,
            header: 0,
            subsystem: (0x1af4, 0x1100),
        });
        space.put(PCIEXBAR, &(ecam | 1).to_le_bytes());
        // Enable, length, and the address bits that the shortest length (64 MiB) leaves.
        space.allow(PCIEXBAR, &0xff_fc00_0007u64.to_le_bytes());
        space.put(PAM, &pam);
        space.allow(PAM, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]);
        space.put(SMRAM, &[0x02, 0x38]);
        space.allow(SMRAM, &[0x78, 0x07]);
        space.seal();
        HostBridge {
            space: Mutex::new(space),
            on_pam,
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// With the lock held, so that the last to be told is the last that was written.
    fn tell_pam(&self, space: &ConfigSpace) {
        let mut pam = [0; REGISTERS];
        space.read(PAM, &mut pam);
        (self.on_pam)(pam);
    }

    /// Where the ECAM is now and how many bytes it has; None when it is off.
    pub fn ecam(&self) -> Option<(u64, u64)> {
        let space = self.lock();
        let low = space.u32(PCIEXBAR);
        let size = match (low & 1, low >> 1 & 3) {
            (1, 0) => 0x1000_0000,
            (1, 1) => 0x800_0000,
            (1, 2) => 0x400_0000,
            _ => return None,
        };
        let address = u64::from(space.u32(PCIEXBAR + 4)) << 32 | u64::from(low);
        Some((address & !(size - 1), size))
    }

    /// Whether a write there may have moved the ECAM.
    pub fn places_ecam(register: u16, len: usize) -> bool {
        touches(register, len, PCIEXBAR, 8)
    }
}

impl Stateful for HostBridge {
    fn save(&self) -> Result<State> {
        state::write(&self.lock().saved())
    }

    fn restore(&self, state: &State) -> Result<()> {
        let mut space = self.lock();
        space.take(&state::read(state)?)?;
        self.tell_pam(&space);
        Ok(())
    }
}

impl Function for HostBridge {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.lock().read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> bool {
        let mut space = self.lock();
        space.write(register, data);
        if touches(register, data.len(), PAM, REGISTERS) {
            self.tell_pam(&space);
        }
        false
    }

    fn windows(&self) -> Vec<Window> {
        Vec::new()
    }

    fn read(&self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn reset(&self) {
        let mut space = self.lock();
        space.reset();
        self.tell_pam(&space);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::firmware::shadow::{ALL_FIRMWARE, ALL_RAM};

    #[test]
    fn pciexbar_places_sizes_and_hides_the_ecam() {
        let bridge = HostBridge::new(0xb000_0000, ALL_RAM, Box::new(|_| ()));
        assert_eq!(bridge.ecam(), Some((0xb000_0000, 0x1000_0000)));
        bridge.config_write(PCIEXBAR, &0xe400_0005u32.to_le_bytes());
        assert_eq!(bridge.ecam(), Some((0xe400_0000, 0x400_0000)));
        bridge.config_write(PCIEXBAR, &[0]);
        assert_eq!(bridge.ecam(), None);
        bridge.reset();
        assert_eq!(bridge.ecam(), Some((0xb000_0000, 0x1000_0000)));
    }

    #[test]
    fn pam_registers_keep_what_firmware_writes_and_tell_it() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = told.clone();
        let on_pam = Box::new(move |pam| sink.lock().unwrap().push(pam));
        let bridge = HostBridge::new(0xb000_0000, ALL_FIRMWARE, on_pam);
        bridge.config_write(PAM, &[0xff; 4]);
        bridge.config_write(PAM + 4, &[0xff; 3]);
        bridge.config_write(PAM - 4, &[0xff; 4]);
        let mut data = [0; 8];
        bridge.config_read(PAM, &mut data);
        assert_eq!(data, [0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33, 0]);
        bridge.reset();
        let half = [0x30, 0x33, 0x33, 0x33, 0, 0, 0];
        assert_eq!(*told.lock().unwrap(), [half, ALL_RAM, ALL_FIRMWARE]);
    }
}
