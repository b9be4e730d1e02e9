// SPDX-License-Identifier: Apache-2.0
//! The balloon: page numbers, figures and free pages that may be anything, while the host sets targets that may be, too.

use vm_memory::{Bytes, GuestAddress};

use super::guest::{
    describe, offer_head, offer_on_one, rig, stand_still_at_times, start_most, still_works,
};
use super::random::Random;
use super::seeds::{seeds, within_a_minute};
use crate::pci::Place;
use crate::virtio::queue::testing::{Driver, MEMORY};
use crate::virtio::rig::{Guest, ALL_FEATURES};

#[test]
fn random_balloons_harm_nothing() {
    within_a_minute(random_balloons);
}

fn random_balloons() {
    for seed in seeds(40) {
        let rig = rig(seed);
        let mut random = Random(seed.wrapping_mul(0xa076_1d64_78bd_642f));
        let mut guest = Guest::probe(&rig, Place::BALLOON);
        for _ in 0..20 {
            let features = random.pick(&[ALL_FEATURES, 1 << 32, 1 << 32 | 1 << 28]);
            let size = random.pick(&[1, 8, 16]);
            let mut drivers = start_most(&mut random, &mut guest, features, 4, size);
            for _ in 0..40 {
                if random.one_in(6) {
                    // What the host does meanwhile; a target that cannot be is refused.
                    let _ = rig.balloon.set_target(random.number() & !0xfff);
                    rig.device("balloon").stats();
                }
                offer_on_one(&mut random, &guest, &mut drivers, offer_pages);
            }
            stand_still_at_times(&mut random, &rig);
            let actual = random.number();
            rig.write(guest.bar + guest.device + 4, actual, 4);
            assert!(rig.device("balloon").stats()["ballooned"].as_u64().unwrap() <= MEMORY);
        }
        still_works(&rig, seed);
    }
}

/// Page numbers, figures or free pages, but for a few things. The disk's rings and requests may be among the pages.
fn offer_pages(random: &mut Random, index: u16, driver: &mut Driver) {
    let count = 1 + random.below(u64::from(driver.rings.size).min(3)) as u16;
    for place in 0..count {
        let flags = u16::from(place + 1 < count) | if index == 3 { 2 } else { 0 };
        let address = 0x4_0000 + random.below(64) * 0x1000;
        let len = random.pick(&[4u32, 10, 64, 1000, 1024, 0x1000, 0x2000]);
        for word in 0..8 {
            let page = random.number() as u32;
            driver
                .memory
                .write_obj(page, GuestAddress(address + 4 * word))
                .unwrap();
        }
        describe(random, driver, place, (address, len, flags), (12, 20));
    }
    offer_head(random, driver, 20);
}
