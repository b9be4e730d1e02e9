// SPDX-License-Identifier: Apache-2.0
//! What every PC has had since before PCI, as far as firmware and kernels still ask for it.
//!
//! The interrupt controllers and the PIT are KVM's own.

mod alarm;
mod calendar;
pub mod cmos;
pub mod fw_cfg;
pub mod i8042;
pub mod pm;
pub mod port92;
pub mod pvpanic;
pub mod reset_control;
pub mod serial;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bus::BusDevice;
    use crate::cpu::gate::Gate;
    use crate::irq::Line;
    use crate::layout;

    struct Nothing;
    impl BusDevice for Nothing {
        fn read(&self, _: u64, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: u64, _: &[u8]) {}
    }

    /// Every offset, with every width from 1 to 8 bytes, with random values: nothing panics.
    #[test]
    fn no_access_is_too_strange() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let gate = Arc::new(Gate::new(0, Arc::new(|_, _| ())));
        let line = || Line::with(|_| ());
        let memory = crate::virtio::queue::testing::memory();
        let mut files = crate::firmware::files::Files::new();
        files.add_writable("etc/written", 8);
        let devices: [(u64, u64, Box<dyn BusDevice>); 9] = [
            (
                layout::FW_CFG,
                layout::FW_CFG_SIZE,
                Box::new(fw_cfg::FwCfg::new(files, memory)),
            ),
            (
                layout::PORT_92,
                1,
                Box::new(port92::Port92::new(gate.clone())),
            ),
            (
                layout::PVPANIC,
                1,
                Box::new(pvpanic::PvPanic::new(gate.clone())),
            ),
            (
                layout::COM1,
                8,
                Box::new(serial::Serial::new(ours.into(), line())),
            ),
            (
                layout::PM_BASE,
                layout::PM_SIZE,
                Box::new(pm::PowerManagement::new(line(), gate.clone())),
            ),
            (
                layout::CMOS,
                2,
                Box::new(cmos::Cmos::new(1 << 30, 16, line()).unwrap()),
            ),
            (
                layout::I8042_DATA,
                1,
                Box::new(i8042::I8042::new(gate.clone())),
            ),
            (
                layout::I8042_COMMAND,
                1,
                Box::new(i8042::I8042::new(gate.clone())),
            ),
            (
                layout::PCI_CONFIG,
                8,
                Box::new(reset_control::ResetControl::new(
                    gate.clone(),
                    Arc::new(Nothing),
                )),
            ),
        ];
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let (base, size, device) = &devices[random as usize % devices.len()];
            let offset = (random >> 8) % size;
            let len = (1 + (random >> 16) % 8).min(size - offset) as usize;
            let mut data = random.to_le_bytes();
            if random >> 63 == 0 {
                device.write(*base, offset, &data[..len]);
            } else {
                device.read(*base, offset, &mut data[..len]);
            }
        }
    }
}
