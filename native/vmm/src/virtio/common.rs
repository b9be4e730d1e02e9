// SPDX-License-Identifier: Apache-2.0
//! The common configuration registers (virtio 1.2, 4.1.4.3) and the life of a device that they drive.
//!
//! | status | what happens |
//! |---|---|
//! | 0 written | the device is reset; reads 0 once nothing is in flight |
//! | FEATURES_OK | kept only if the driver took a subset of the offer, with VERSION_1; features are then fixed |
//! | DRIVER_OK | needs FEATURES_OK; the enabled queues are served from here on |
//! | DEVICE_NEEDS_RESET | set by the device: the driver broke a ring |
//!
//! Bits are never cleared but by a reset. Registers of queues are fixed once DRIVER_OK is set. This file knows
//! no guest memory and no threads: [`Common::write`] says what is to be done.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::interrupt::Interrupt;
use super::queue::Rings;
use super::{LiveConfig, Model, F_VERSION_1};
use crate::error::Result;
use crate::state;

/// Bytes of the structure, up to and with `queue_device`.
pub const SIZE: u32 = 56;

/// The driver is ready.
pub const STATUS_DRIVER_OK: u8 = 4;
/// The driver has accepted features.
pub const STATUS_FEATURES_OK: u8 = 8;
/// The device needs a reset.
pub const STATUS_NEEDS_RESET: u8 = 0x40;
/// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED: what a driver may set.
const STATUS_DRIVERS: u8 = 0x8f;

/// What a write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// The driver resets the device.
    Reset,
    /// The driver is ready.
    Activate,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueRegisters {
    rings: Rings,
    enabled: bool,
}

/// What the registers remember; the vectors are the interrupts'.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    offer_select: u32,
    driver_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The registers of one device.
pub struct Common {
    interrupt: Arc<Interrupt>,
    offered: u64,
    queue_size: u16,
    offer_select: u32,
    driver_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    live: Option<Arc<dyn LiveConfig>>,
}

impl Common {
    /// The registers after power-on.
    pub fn new(model: &Model, interrupt: Arc<Interrupt>) -> Common {
        let queue = QueueRegisters {
            rings: Rings {
                size: model.queue_size,
                ..Rings::default()
            },
            enabled: false,
        };
        Common {
            interrupt,
            offered: model.features,
            queue_size: model.queue_size,
            offer_select: 0,
            driver_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: vec![queue; usize::from(model.queues)],
            live: model.live.clone(),
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.interrupt.reset();
        self.offer_select = 0;
        self.driver_select = 0;
        self.driver_features = 0;
        self.status = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.enabled = false;
            queue.rings = Rings {
                size: self.queue_size,
                ..Rings::default()
            };
        }
    }

    /// What the registers remember.
    pub fn saved(&self) -> Saved {
        Saved {
            offer_select: self.offer_select,
            driver_select: self.driver_select,
            driver_features: self.driver_features,
            status: self.status,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
        }
    }

    /// Takes over what those of another device like this remembered.
    ///
    /// # Errors
    /// `ImageInvalid` for what no driver could have set.
    pub fn take(&mut self, saved: Saved) -> Result<()> {
        let accepted = saved.status & STATUS_FEATURES_OK != 0;
        let ready = saved.status & STATUS_DRIVER_OK != 0;
        if saved.status & !STATUS_DRIVERS != 0
            || ready && !accepted
            || accepted && !self.acceptable(saved.driver_features)
        {
            return Err(state::invalid(format!(
                "status {:#x} with features {:#x}, of {:#x} offered",
                saved.status, saved.driver_features, self.offered
            )));
        }
        let sizes = |queue: &QueueRegisters| {
            queue.rings.size.is_power_of_two() && queue.rings.size <= self.queue_size
        };
        if saved.queues.len() != self.queues.len() || !saved.queues.iter().all(sizes) {
            return Err(state::invalid("other queues than the device has"));
        }
        self.offer_select = saved.offer_select;
        self.driver_select = saved.driver_select;
        self.driver_features = saved.driver_features;
        self.status = saved.status;
        self.queue_select = saved.queue_select;
        self.queues = saved.queues;
        Ok(())
    }

    /// Whether the driver is ready.
    pub fn is_ready(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0
    }

    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & F_VERSION_1 != 0
    }

    /// The features that the driver accepted.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// The enabled queues: number and rings.
    pub fn enabled(&self) -> impl Iterator<Item = (u16, Rings)> + '_ {
        (0u16..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.enabled)
            .map(|(index, queue)| (index, queue.rings))
    }

    /// The driver reads, with any width.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (byte, value) in data.iter_mut().zip(image.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }

    fn image(&self) -> [u8; SIZE as usize] {
        let mut image = [0; SIZE as usize];
        let mut put = |offset: usize, value: u64, len: usize| {
            for (byte, new) in image
                .iter_mut()
                .skip(offset)
                .zip(value.to_le_bytes())
                .take(len)
            {
                *byte = new;
            }
        };
        put(0, u64::from(self.offer_select), 4);
        put(4, half(self.offered, self.offer_select), 4);
        put(8, u64::from(self.driver_select), 4);
        put(12, half(self.driver_features, self.driver_select), 4);
        put(16, u64::from(self.interrupt.config_vector()), 2);
        put(18, self.queues.len() as u64, 2);
        put(20, u64::from(self.status()), 1);
        // config_generation
        let generation = self.live.as_ref().map_or(0, |live| live.generation());
        put(21, u64::from(generation), 1);
        put(22, u64::from(self.queue_select), 2);
        // A queue that does not exist has size 0 (4.1.4.3.1).
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(24, u64::from(queue.rings.size), 2);
            put(
                26,
                u64::from(self.interrupt.queue_vector(self.queue_select)),
                2,
            );
            put(28, u64::from(queue.enabled), 2);
            put(30, u64::from(self.queue_select), 2);
            put(32, queue.rings.descriptors, 8);
            put(40, queue.rings.available, 8);
            put(48, queue.rings.used, 8);
        }
        image
    }

    fn status(&self) -> u8 {
        if self.interrupt.is_broken() {
            self.status | STATUS_NEEDS_RESET
        } else {
            self.status
        }
    }

    /// The driver writes a register; what has another width, or is not writable now, changes nothing.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut bytes = [0; 8];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0, 4) => self.offer_select = value as u32,
            (8, 4) => self.driver_select = value as u32,
            (12, 4) if self.status & STATUS_FEATURES_OK == 0 => match self.driver_select {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                _ => {}
            },
            (16, 2) => self.interrupt.set_config_vector(value as u16),
            (20, 1) => return self.write_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (26, 2) => self
                .interrupt
                .set_queue_vector(self.queue_select, value as u16),
            _ => self.write_queue(offset, value, data.len()),
        }
        Action::None
    }

    fn write_queue(&mut self, offset: u64, value: u64, len: usize) {
        let running = self.status & STATUS_DRIVER_OK != 0;
        let largest = self.queue_size;
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        if running || queue.enabled {
            return;
        }
        let rings = &mut queue.rings;
        match (offset, len) {
            (24, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= largest {
                    rings.size = size;
                }
            }
            (28, 2) => queue.enabled = value == 1,
            (32, 8) => rings.descriptors = value,
            (32, 4) => set_low(&mut rings.descriptors, value),
            (36, 4) => set_high(&mut rings.descriptors, value),
            (40, 8) => rings.available = value,
            (40, 4) => set_low(&mut rings.available, value),
            (44, 4) => set_high(&mut rings.available, value),
            (48, 8) => rings.used = value,
            (48, 4) => set_low(&mut rings.used, value),
            (52, 4) => set_high(&mut rings.used, value),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        let mut new = (value & STATUS_DRIVERS) & !self.status;
        if !self.acceptable(self.driver_features) {
            new &= !STATUS_FEATURES_OK;
        }
        if (self.status | new) & STATUS_FEATURES_OK == 0 {
            new &= !STATUS_DRIVER_OK;
        }
        self.status |= new;
        if new & STATUS_DRIVER_OK != 0 {
            Action::Activate
        } else {
            Action::None
        }
    }
}

/// The half of a feature set that a selector names.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

fn set_low(place: &mut u64, value: u64) {
    *place = (*place & !0xffff_ffff) | (value & 0xffff_ffff);
}

fn set_high(place: &mut u64, value: u64) {
    *place = (*place & 0xffff_ffff) | value << 32;
}

#[cfg(test)]
mod tests {
    use super::super::interrupt::NO_VECTOR;
    use super::super::F_RING;
    use super::*;
    use crate::pci::config::{ConfigSpace, Identity};
    use crate::pci::msix::Msix;
    use crate::pci::testing::FakeWiring;

    fn common() -> Common {
        let model = Model {
            device_type: 2,
            class: 0x018000,
            features: F_RING | 1 << 9,
            queues: 2,
            queue_size: 64,
            config: Vec::new(),
            live: None,
        };
        let mut space = ConfigSpace::new(Identity {
            vendor: 0,
            device: 0,
            revision: 0,
            class: 0,
            header: 0,
            subsystem: (0, 0),
        });
        let wiring = Arc::new(FakeWiring::default());
        let msix = Msix::new(wiring, &mut space, 3, 0, 0, 0x800).unwrap();
        Common::new(&model, Arc::new(Interrupt::new(msix.vectors(), 3, 2)))
    }

    fn get(common: &Common, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        common.read(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn put(common: &mut Common, offset: u64, value: u64, len: usize) -> Action {
        common.write(offset, &value.to_le_bytes()[..len])
    }

    fn accept(common: &mut Common, features: u64) {
        for select in 0..2u32 {
            put(common, 8, u64::from(select), 4);
            put(common, 12, half(features, select), 4);
        }
        put(common, 20, 1 | 2 | 8, 1);
    }

    #[test]
    fn the_offer_is_read_in_halves() {
        let mut common = common();
        assert_eq!(get(&common, 4, 4), F_RING & 0xffff_ffff | 1 << 9);
        put(&mut common, 0, 1, 4);
        assert_eq!(get(&common, 4, 4), 1);
        put(&mut common, 0, 2, 4);
        assert_eq!(get(&common, 4, 4), 0);
        assert_eq!(get(&common, 18, 2), 2);
    }

    #[test]
    fn features_ok_is_kept_only_for_a_legal_choice() {
        for (features, ok) in [
            (F_RING, true),
            (F_VERSION_1, true),
            (1 << 9, false),
            (F_VERSION_1 | 1 << 10, false),
            (0, false),
        ] {
            let mut common = common();
            accept(&mut common, features);
            assert_eq!(get(&common, 20, 1) & 8 != 0, ok, "{features:#x}");
            assert_eq!(put(&mut common, 20, 0xf, 1) == Action::Activate, ok);
        }
    }

    #[test]
    fn features_are_fixed_once_accepted() {
        let mut common = common();
        accept(&mut common, F_VERSION_1);
        put(&mut common, 8, 0, 4);
        put(&mut common, 12, 1 << 9, 4);
        assert_eq!(common.features(), F_VERSION_1);
    }

    #[test]
    fn status_bits_stay_until_the_driver_writes_zero() {
        let mut common = common();
        accept(&mut common, F_VERSION_1);
        put(&mut common, 20, 1, 1);
        assert_eq!(get(&common, 20, 1), 1 | 2 | 8);
        assert_eq!(put(&mut common, 20, 0, 1), Action::Reset);
        common.reset();
        assert_eq!(get(&common, 20, 1), 0);
        assert_eq!(common.features(), 0);
    }

    #[test]
    fn a_queue_is_set_up_then_fixed() {
        let mut common = common();
        put(&mut common, 22, 1, 2);
        assert_eq!(get(&common, 24, 2), 64);
        assert_eq!(get(&common, 30, 2), 1);
        for bad in [0, 3, 128] {
            put(&mut common, 24, bad, 2);
            assert_eq!(get(&common, 24, 2), 64);
        }
        put(&mut common, 24, 16, 2);
        put(&mut common, 32, 0x1_0000_1000, 8);
        put(&mut common, 40, 0x2000, 4);
        put(&mut common, 44, 0x2, 4);
        put(&mut common, 48, 0x3000, 4);
        put(&mut common, 28, 1, 2);
        put(&mut common, 32, 0, 8);
        put(&mut common, 28, 0, 2);
        let rings = Rings {
            size: 16,
            descriptors: 0x1_0000_1000,
            available: 0x2_0000_2000,
            used: 0x3000,
        };
        assert_eq!(common.enabled().collect::<Vec<_>>(), [(1, rings)]);
    }

    #[test]
    fn a_queue_that_does_not_exist_reads_zero() {
        let mut common = common();
        put(&mut common, 22, 2, 2);
        assert_eq!(get(&common, 24, 2), 0);
        put(&mut common, 28, 1, 2);
        assert_eq!(common.enabled().count(), 0);
    }

    #[test]
    fn vectors_that_do_not_exist_become_none() {
        let mut common = common();
        put(&mut common, 16, 2, 2);
        assert_eq!(get(&common, 16, 2), 2);
        put(&mut common, 16, 3, 2);
        assert_eq!(get(&common, 16, 2), u64::from(NO_VECTOR));
        put(&mut common, 26, 1, 2);
        assert_eq!(get(&common, 26, 2), 1);
    }

    #[test]
    fn a_broken_device_says_so() {
        let mut common = common();
        accept(&mut common, F_VERSION_1);
        common.interrupt.fail();
        assert_eq!(get(&common, 20, 1) & 0x40, 0x40);
        common.reset();
        assert_eq!(get(&common, 20, 1), 0);
    }
}
