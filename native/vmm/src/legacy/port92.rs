// SPDX-License-Identifier: Apache-2.0
//! Port 0x92 (ICH9 datasheet, 13.7.2): the A20 gate, which is always open here, and the fast reset.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::cpu::gate::{Cause, Gate};

const INIT_NOW: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// The port.
pub struct Port92(Arc<Gate>);

impl Port92 {
    /// A port that resets through `gate`.
    pub fn new(gate: Arc<Gate>) -> Port92 {
        Port92(gate)
    }
}

impl BusDevice for Port92 {
    fn read(&self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(A20);
    }

    fn write(&self, _base: u64, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|byte| byte & INIT_NOW != 0) {
            self.0.raise(Cause::Reset("port 0x92"));
        }
    }
}
