// SPDX-License-Identifier: Apache-2.0
//! The ICH9's power management block: PM1 events and control, the PM timer, GPE0, SMI_EN.
//!
//! | port (from 0x600) | bytes | register | source |
//! |---|---|---|---|
//! | 0x00 | 2 | PM1_STS, write 1 to clear | ACPI 6.5, 4.8.4.1 |
//! | 0x02 | 2 | PM1_EN | |
//! | 0x04 | 4 | PM1_CNT: SCI_EN always set, SLP_TYP, SLP_EN | ACPI 6.5, 4.8.4.2 |
//! | 0x08 | 4 | PM_TMR: 3.579545 MHz, 32 bits | ACPI 6.5, 4.8.3.3 |
//! | 0x20 | 8 | GPE0_STS, write 1 to clear | ACPI 6.5, 4.8.5 |
//! | 0x28 | 8 | GPE0_EN | |
//! | 0x30 | 4 | SMI_EN | ICH9 datasheet, 13.8.3.7 |
//!
//! The system is always in ACPI mode. There is no SMM: SMI_EN reads as if firmware had set it up long ago,
//! which makes SeaBIOS and OVMF leave it alone. The PM timer never interrupts; no kernel asks it to.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::cpu::gate::{Cause, Gate};
use crate::error::Result;
use crate::irq::Line;
use crate::state::{self, Stateful};

/// The power button was pressed.
const PWRBTN: u16 = 1 << 8;
/// Bits of PM1_STS that exist: TMR, GBL, PWRBTN, SLPBTN, RTC, WAK.
const STATUS_MASK: u16 = 0x8721;
/// Bits of PM1_EN that exist.
const ENABLE_MASK: u16 = 0x0721;
const SCI_EN: u32 = 1;
const SLP_EN: u32 = 1 << 13;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP_MASK: u32 = 0b111 << SLP_TYP_SHIFT;
/// SLP_TYP of S5, as the DSDT's `\_S5` and OVMF's reset library have it.
pub const SLP_TYP_S5: u8 = 0;
/// APMC_EN and GBL_SMI_EN.
const SMI_EN: u32 = 0x21;
/// Ticks a second.
const TIMER_HZ: u128 = 3_579_545;

#[derive(Default)]
struct State {
    status: u16,
    enable: u16,
    control: u32,
    gpe_status: u64,
    gpe_enable: u64,
}

/// The block.
pub struct PowerManagement {
    state: Mutex<State>,
    sci: Line,
    gate: Arc<Gate>,
    begin: Instant,
    /// Nanoseconds that the timer had run before `begin`.
    before: AtomicU64,
}

impl PowerManagement {
    /// A block that interrupts through `sci` and powers off through `gate`.
    pub fn new(sci: Line, gate: Arc<Gate>) -> PowerManagement {
        PowerManagement {
            state: Mutex::default(),
            sci,
            gate,
            begin: Instant::now(),
            before: AtomicU64::new(0),
        }
    }

    /// Presses the power button: a fixed event, which the guest may take or leave.
    pub fn press_power_button(&self) {
        let mut state = self.lock();
        state.status |= PWRBTN;
        self.update(&state);
    }

    /// Raises general purpose event `number`, 0 to 63, which the guest's `\\_GPE` has a method for.
    pub fn raise_event(&self, number: u8) {
        let mut state = self.lock();
        state.gpe_status |= 1u64.checked_shl(u32::from(number)).unwrap_or(0);
        self.update(&state);
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        *state = State::default();
        self.update(&state);
    }

    fn update(&self, state: &State) {
        let fixed = state.status & state.enable != 0;
        self.sci
            .set(fixed || state.gpe_status & state.gpe_enable != 0);
    }

    fn timer(&self) -> u32 {
        let ticks = u128::from(self.run()).wrapping_mul(TIMER_HZ) / 1_000_000_000;
        ticks as u32
    }

    /// Nanoseconds that the timer has run.
    fn run(&self) -> u64 {
        let now = u64::try_from(self.begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        now.wrapping_add(self.before.load(Ordering::Acquire))
    }

    /// So many nanoseconds passed while the machine was a file.
    pub fn pass(&self, nanoseconds: u64) {
        self.before.fetch_add(nanoseconds, Ordering::AcqRel);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The whole register file as bytes, from the 4-byte register that holds `offset`.
    fn register(&self, offset: u64) -> u32 {
        if offset == 0x08 {
            return self.timer();
        }
        let state = self.lock();
        match offset {
            0x00 => u32::from(state.status) | u32::from(state.enable) << 16,
            0x04 => state.control | SCI_EN,
            0x20 => state.gpe_status as u32,
            0x24 => (state.gpe_status >> 32) as u32,
            0x28 => state.gpe_enable as u32,
            0x2c => (state.gpe_enable >> 32) as u32,
            0x30 => SMI_EN,
            _ => 0,
        }
    }

    fn control(&self, value: u32) {
        self.lock().control = value & SLP_TYP_MASK;
        let sleep_type = (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT;
        if value & SLP_EN != 0 && sleep_type == u32::from(SLP_TYP_S5) {
            self.gate.raise(Cause::PowerOff);
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    status: u16,
    enable: u16,
    control: u32,
    gpe_status: u64,
    gpe_enable: u64,
    /// Nanoseconds that the timer had run.
    run: u64,
}

impl Stateful for PowerManagement {
    fn save(&self) -> Result<state::State> {
        let run = self.run();
        let state = self.lock();
        state::write(&Saved {
            status: state.status,
            enable: state.enable,
            control: state.control,
            gpe_status: state.gpe_status,
            gpe_enable: state.gpe_enable,
            run,
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let now = self.run();
        self.pass(saved.run.wrapping_sub(now));
        let mut state = self.lock();
        *state = State {
            status: saved.status & STATUS_MASK,
            enable: saved.enable & ENABLE_MASK,
            control: saved.control & SLP_TYP_MASK,
            gpe_status: saved.gpe_status,
            gpe_enable: saved.gpe_enable,
        };
        self.update(&state);
        Ok(())
    }
}

impl BusDevice for PowerManagement {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        let mut at = offset;
        // One register a time: a timer read is one look at the clock.
        let mut held = (at & !3, self.register(at & !3));
        for byte in data {
            if at & !3 != held.0 {
                held = (at & !3, self.register(at & !3));
            }
            *byte = (held.1 >> ((at & 3) * 8)) as u8;
            at = at.wrapping_add(1);
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let mut value = [0u8; 8];
        let Some(place) = value.get_mut(..data.len()) else {
            return;
        };
        place.copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        let mut state = self.lock();
        match (offset, data.len()) {
            (0x00, 2 | 4) => {
                state.status &= !(value as u16 & STATUS_MASK);
                if data.len() == 4 {
                    state.enable = (value >> 16) as u16 & ENABLE_MASK;
                }
                self.update(&state);
            }
            // A byte of PM1_STS: ACPICA never does, firmware may.
            (0x00 | 0x01, 1) => {
                state.status &= !((value as u16) << (offset * 8));
                self.update(&state);
            }
            (0x02, 2) => {
                state.enable = value as u16 & ENABLE_MASK;
                self.update(&state);
            }
            (0x04, 2 | 4) => {
                drop(state);
                self.control(value as u32);
            }
            (0x20..=0x27, 1 | 2 | 4) => {
                state.gpe_status &= !(value << ((offset & 7) * 8));
                self.update(&state);
            }
            (0x28..=0x2f, 1 | 2 | 4) => {
                let shift = (offset & 7) * 8;
                let mask = (u64::MAX >> (64 - 8 * data.len())) << shift;
                state.gpe_enable = state.gpe_enable & !mask | value << shift & mask;
                self.update(&state);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::layout::PM_BASE;

    #[test]
    fn a_general_purpose_event_interrupts_while_it_is_enabled_and_not_cleared() {
        let level = Arc::new(AtomicBool::new(false));
        let seen = level.clone();
        let sci = Line::with(move |level| seen.store(level, Ordering::SeqCst));
        let pm = PowerManagement::new(sci, Arc::new(Gate::new(0, Arc::new(|_, _| ()))));
        pm.raise_event(5);
        assert!(!level.load(Ordering::SeqCst));
        pm.write(PM_BASE, 0x28, &[1 << 5]);
        assert!(level.load(Ordering::SeqCst));
        let mut status = [0; 4];
        pm.read(PM_BASE, 0x20, &mut status);
        assert_eq!(status, [1 << 5, 0, 0, 0]);
        pm.write(PM_BASE, 0x20, &[1 << 5]);
        assert!(!level.load(Ordering::SeqCst));
        // An event beyond the block is none.
        pm.raise_event(200);
        pm.read(PM_BASE, 0x24, &mut status);
        assert_eq!(status, [0; 4]);
    }
}
