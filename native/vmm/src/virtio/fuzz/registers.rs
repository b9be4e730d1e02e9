// SPDX-License-Identifier: Apache-2.0
//! A guest that hammers every register and all of configuration space of every device with random accesses.

use super::guest::{rig, still_works};
use super::random::Random;
use super::seeds::{seeds, within_a_minute};
use crate::layout::ECAM_START;
use crate::pci::Place;

#[test]
fn random_register_accesses_harm_nothing() {
    within_a_minute(random_register_accesses);
}

fn random_register_accesses() {
    for seed in seeds(30) {
        let rig = rig(seed);
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let places = [
            Place::HOST,
            Place::LPC,
            Place::RNG,
            Place::disk(0),
            Place::disk(1),
            Place::nic(0),
            Place::BALLOON,
            Place::SCSI,
            Place::PORTS,
            Place::VSOCK,
            Place::WATCHDOG,
            Place::root_port(3),
        ];
        for _ in 0..3000 {
            let place = random.pick(&places);
            let config = ECAM_START + (u64::from(place.devfn()) << 12);
            let len = random.pick(&[1usize, 2, 4, 8]);
            let address = match random.below(4) {
                0 => config + random.below(0x120),
                1 => place.bar_address() + random.below(0x40),
                2 => place.bar_address() + (random.below(16) << 12) + random.below(0x60),
                _ => place.bar_address() + random.below(0x1_0000),
            };
            if random.one_in(3) {
                rig.read(address, len);
            } else {
                let value = random.number();
                rig.write(address, value, len);
            }
            // Keep the devices reachable most of the time.
            if random.one_in(20) {
                rig.write(config + 0x10, place.bar_address(), 8);
                rig.write(config + 4, 6, 2);
            }
        }
        still_works(&rig, seed);
    }
}
