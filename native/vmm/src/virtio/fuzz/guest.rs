// SPDX-License-Identifier: Apache-2.0
//! A guest that does nearly the right thing: it sets a device's queues up as a driver does and offers descriptors as they
//! are meant, but for a few. What is offered is said by the family of devices.
//!
//! After each seed [`still_works`] has a driver that keeps the rules read from a disk: whatever a device went through,
//! a reset mends it, and the others do not know of it.

use vmbus_qcow2::Ring;

use super::random::Random;
use crate::pci::Place;
use crate::virtio::queue::testing::{rings, Driver};
use crate::virtio::rig::{Guest, Rig, ALL_FEATURES};

/// On io_uring for even seeds, where the host has it.
pub(super) fn rig(seed: u64) -> Rig {
    eprintln!("seed {seed}");
    let ring = if seed % 2 == 0 {
        Ring::new(64, 8).ok()
    } else {
        None
    };
    Rig::new(ring)
}

/// Sets most of the first `count` queues up, with `size` entries each; gives those, with their drivers.
pub(super) fn start_most(
    random: &mut Random,
    guest: &mut Guest,
    features: u64,
    count: u16,
    size: u16,
) -> Vec<(u16, Driver)> {
    let queues: Vec<_> = (0..count)
        .filter(|_| !random.one_in(8))
        .map(|index| (index, rings(0x1_0000 + 0x3000 * u64::from(index), size)))
        .collect();
    guest.start_queues(features, &queues);
    let driver = |rings| Driver::new(guest.rig.memory.clone(), rings);
    queues
        .into_iter()
        .map(|(index, rings)| (index, driver(rings)))
        .collect()
}

/// Lets `offer` put something into one of the queues, if there is one, and rings its bell.
pub(super) fn offer_on_one(
    random: &mut Random,
    guest: &Guest,
    drivers: &mut [(u16, Driver)],
    offer: fn(&mut Random, u16, &mut Driver),
) {
    let place = random.below(drivers.len().max(1) as u64) as usize;
    if let Some((index, driver)) = drivers.get_mut(place) {
        offer(random, *index, driver);
        let bell = guest.doorbell() + 4 * u64::from(*index);
        guest.rig.write(bell, 0, 2);
    }
}

/// Writes a descriptor as it is meant, or with something wrong: address and length once in `odds.0` times, flags and
/// link once in `odds.1`.
pub(super) fn describe(
    random: &mut Random,
    driver: &mut Driver,
    place: u16,
    meant: (u64, u32, u16),
    odds: (u64, u64),
) {
    let (mut address, mut len, mut flags) = meant;
    if random.one_in(odds.0) {
        address = random.number();
    }
    if random.one_in(odds.0) {
        len = random.number() as u32;
    }
    if random.one_in(odds.1) {
        flags = random.below(8) as u16;
    }
    let next = if random.one_in(odds.1) {
        random.number() as u16
    } else {
        place + 1
    };
    driver.descriptor(place, address, len, flags, next);
}

/// Offers the chain at 0, or once in `odds` times whatever.
pub(super) fn offer_head(random: &mut Random, driver: &mut Driver, odds: u64) {
    driver.offer(if random.one_in(odds) {
        random.number() as u16
    } else {
        0
    });
}

/// Once in four times each device is paused and goes on.
pub(super) fn stand_still_at_times(random: &mut Random, rig: &Rig) {
    if random.one_in(4) {
        for device in &rig.devices.list {
            device.pause().unwrap();
            device.resume();
        }
    }
}

/// Each device answers a pause, then works for a driver that keeps the rules.
pub(super) fn still_works(rig: &Rig, seed: u64) {
    for device in &rig.devices.list {
        device
            .pause()
            .unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
    for device in &rig.devices.list {
        device.reset();
    }
    for device in &rig.devices.list {
        device.resume();
    }
    let mut guest = Guest::probe(rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(0x1_0000, 8));
    guest.offer(0, 0, 0, 512);
    assert_eq!(guest.ring_and_wait(1), 0, "seed {seed}");
}
