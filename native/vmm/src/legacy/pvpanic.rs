// SPDX-License-Identifier: Apache-2.0
//! pvpanic: a port by which a guest says that its kernel has panicked (QEMU's docs/specs/pvpanic).
//!
//! Reading says which events are understood: a panic ends the machine with reason `guest-panic`; a crash that
//! a second kernel deals with is only the guest's own affair.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::cpu::gate::{Cause, Gate};

const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The port.
pub struct PvPanic(Arc<Gate>);

impl PvPanic {
    /// A port that tells `gate`.
    pub fn new(gate: Arc<Gate>) -> PvPanic {
        PvPanic(gate)
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _base: u64, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|event| event & PANICKED != 0) {
            self.0.raise(Cause::GuestPanic);
        }
    }
}
