// SPDX-License-Identifier: Apache-2.0
//! A PCIe root port with an empty hotplug slot.
//!
//! Bus number and windows are assigned before the guest runs, wide enough for what may be plugged in, since
//! a guest without firmware cannot make room later. The slot has an attention button and a power
//! indicator; its events go by the port's one MSI-X vector. I/O windows are left out: nothing here has an
//! I/O BAR.

use std::sync::{Arc, Mutex, MutexGuard};

use super::config::{express_capability, Bar64, ConfigSpace, Identity, MULTIFUNCTION};
use super::msix::Msix;
use super::{
    Function, Place, Window, Wiring, PORT_MEMORY, PORT_MEMORY_SIZE, PORT_PREFETCHABLE,
    PORT_PREFETCHABLE_SIZE,
};
use crate::error::Result;

const BAR: Bar64 = Bar64 {
    index: 0,
    size: 0x1000,
};
/// Where the MSI-X pending bits lie in the BAR; the table is at 0.
const PENDING: u64 = 0x800;

/// 00:10.x.
pub struct RootPort(Mutex<State>);

struct State {
    space: ConfigSpace,
    msix: Msix,
}

impl RootPort {
    /// Root port `index`, 0 to 7.
    ///
    /// # Errors
    /// `Unavailable` when there is no GSI or eventfd left.
    pub fn new(wiring: Arc<dyn Wiring>, index: u8) -> Result<RootPort> {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x000c,
            revision: 0,
            class: 0x060400,
            header: 1 | MULTIFUNCTION,
            subsystem: (0, 0),
        });
        let number = u64::from(index);
        BAR.declare(&mut space, Place::root_port(index).bar_address());
        // Primary, secondary and subordinate bus.
        space.put(0x18, &[0, index + 1, index + 1]);
        space.allow(0x18, &[0xff; 3]);
        // Secondary status.
        space.allow_clear(0x1e, &[0x00, 0xf9]);
        let memory = PORT_MEMORY + number * PORT_MEMORY_SIZE;
        let last = memory + PORT_MEMORY_SIZE - 1;
        space.put(0x20, &window_half(memory).to_le_bytes());
        space.put(0x22, &window_half(last).to_le_bytes());
        space.allow(0x20, &[0xf0, 0xff, 0xf0, 0xff]);
        let memory = PORT_PREFETCHABLE + number * PORT_PREFETCHABLE_SIZE;
        let last = memory + PORT_PREFETCHABLE_SIZE - 1;
        // The low nibble says: a 64-bit window.
        space.put(0x24, &(window_half(memory) | 1).to_le_bytes());
        space.put(0x26, &(window_half(last) | 1).to_le_bytes());
        space.allow(0x24, &[0xf0, 0xff, 0xf0, 0xff]);
        space.put(0x28, &((memory >> 32) as u32).to_le_bytes());
        space.put(0x2c, &((last >> 32) as u32).to_le_bytes());
        space.allow(0x28, &[0xff; 8]);
        // Bridge control: parity, SERR, ISA, VGA, master abort, secondary bus reset.
        space.allow(0x3e, &[0x7f, 0x00]);
        // Memory decoding and bus mastering are on, for what is plugged in.
        space.put(super::config::COMMAND, &[0x06, 0x00]);
        let msix = Msix::new(wiring, &mut space, 1, BAR.index, 0, PENDING as u32)?;
        // Device capabilities: payload 128 bytes, role-based error reporting.
        express_capability(&mut space, 4, 1 << 15, Some(u16::from(index) + 1))?;
        space.seal();
        Ok(RootPort(Mutex::new(State { space, msix })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Address bits 31:20, as a base or limit register has them.
fn window_half(address: u64) -> u16 {
    (address >> 16) as u16 & 0xfff0
}

impl Function for RootPort {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.lock().space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.space.write(register, data);
        state.msix.configuration_changed(&state.space);
        register < super::config::BAR0 + 8
    }

    fn windows(&self) -> Vec<Window> {
        let state = self.lock();
        if !state.space.memory_enabled() {
            return Vec::new();
        }
        vec![Window {
            bar: BAR.index,
            base: BAR.address(&state.space),
            size: BAR.size,
        }]
    }

    fn read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        match offset.checked_sub(PENDING) {
            Some(offset) => state.msix.read_pending(offset, data),
            None => state.msix.read_table(offset, data),
        }
    }

    fn write(&self, _bar: u8, offset: u64, data: &[u8]) {
        if offset < PENDING {
            self.lock().msix.write_table(offset, data);
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.space.reset();
        state.msix.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeWiring;
    use super::*;

    fn u32_at(port: &RootPort, register: u16) -> u32 {
        let mut data = [0; 4];
        port.config_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn bus_and_windows_are_assigned_before_the_guest_runs() {
        let port = RootPort::new(Arc::new(FakeWiring::default()), 2).unwrap();
        assert_eq!(u32_at(&port, 0x18), 0x0003_0300);
        // 0xd4000000 to 0xd5ffffff
        assert_eq!(u32_at(&port, 0x20), 0xd5f0_d400);
        // 0x88_00000000 to 0x8b_ffffffff
        assert_eq!(u32_at(&port, 0x24), 0xfff1_0001);
        assert_eq!(u32_at(&port, 0x28), 0x88);
        assert_eq!(u32_at(&port, 0x2c), 0x8b);
    }

    #[test]
    fn the_slot_says_hotplug_and_its_number() {
        let port = RootPort::new(Arc::new(FakeWiring::default()), 4).unwrap();
        let mut at = u32_at(&port, 0x34) as u8;
        loop {
            let header = u32_at(&port, u16::from(at));
            if header & 0xff == 0x10 {
                // Version 2, root port, slot implemented.
                assert_eq!(header >> 16, 0x142);
                break;
            }
            at = (header >> 8) as u8;
            assert_ne!(at, 0, "no PCI Express capability");
        }
        let slot = u32_at(&port, u16::from(at) + 20);
        assert_eq!(slot >> 19, 5);
        assert_eq!(slot & 0x40, 0x40);
        // Nothing is present, the link is down.
        assert_eq!(u32_at(&port, u16::from(at) + 24) >> 16, 0);
        assert_eq!(u32_at(&port, u16::from(at) + 16) >> 16 & 0x2000, 0);
    }

    #[test]
    fn its_bar_decodes_only_while_memory_is_enabled() {
        let port = RootPort::new(Arc::new(FakeWiring::default()), 0).unwrap();
        assert_eq!(port.windows().len(), 1);
        assert!(port.config_write(4, &[0, 0]));
        assert_eq!(port.windows(), []);
    }
}
