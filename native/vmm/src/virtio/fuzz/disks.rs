// SPDX-License-Identifier: Apache-2.0
//! Disks: requests of virtio-blk in all shapes of chains (virtio-rng is given the same), commands of SCSI while the host
//! changes the medium, and resets while requests are under way.

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{
    describe, offer_head, offer_on_one, rig, stand_still_at_times, start_most, still_works,
};
use super::random::Random;
use super::seeds::{seeds, within_a_minute};
use crate::io::Change;
use crate::pci::Place;
use crate::virtio::queue::testing::{rings, Driver};
use crate::virtio::rig::{image, nameless_file, until, Guest, ALL_FEATURES, DISK_BYTES};

#[test]
fn random_chains_harm_nothing() {
    within_a_minute(random_chains);
}

fn random_chains() {
    for seed in seeds(60) {
        let rig = rig(seed);
        let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95));
        let place = random.pick(&[Place::disk(0), Place::disk(0), Place::disk(1), Place::RNG]);
        let mut guest = Guest::probe(&rig, place);
        for _ in 0..40 {
            let features =
                random.pick(&[ALL_FEATURES, 1 << 32, 1 << 32 | 1 << 28, 1 << 32 | 1 << 29]);
            guest.start(features, rings(0x1_0000, random.pick(&[1, 8, 16])));
            if random.one_in(3) {
                guest.use_msix();
            }
            for _ in 0..1 + random.below(20) {
                offer_something(&mut random, &mut guest);
                rig.write(guest.doorbell(), 0, 2);
            }
            stand_still_at_times(&mut random, &rig);
        }
        still_works(&rig, seed);
    }
}

/// A chain that is a request but for a few things.
fn offer_something(random: &mut Random, guest: &mut Guest) {
    let size = guest.queue.rings.size;
    let header = 0x4000 + random.below(64) * 16;
    let kind = random.pick(&[0u32, 0, 1, 1, 4, 8, 11, 13, 99]);
    let sector = if random.one_in(4) {
        random.number()
    } else {
        random.below(DISK_BYTES / 512)
    };
    let value = u128::from(kind) | u128::from(sector) << 64;
    let memory = &guest.rig.memory;
    memory
        .write_slice(&value.to_le_bytes(), GuestAddress(header))
        .unwrap();
    let indirect = random.one_in(3);
    let (table, entries) = if indirect {
        (0x6000, 20)
    } else {
        (guest.queue.rings.descriptors, size)
    };
    let count = 1 + random.below(u64::from(entries).min(6)) as u16;
    for index in 0..count {
        let last = index + 1 == count;
        let (mut address, mut len, mut flags) = match index {
            0 => (header, 16, 0),
            _ if last => (0x5000, 1, 2),
            _ => (
                0x8000 + random.below(16) * 512,
                512 * random.below(4) as u32,
                if kind == 0 { 2 } else { 0 },
            ),
        };
        if !last {
            flags |= 1;
        }
        let mut next = index + 1;
        if random.one_in(12) {
            address = random.number();
        }
        if random.one_in(12) {
            len = random.number() as u32;
        }
        if random.one_in(20) {
            flags = random.below(8) as u16;
        }
        if random.one_in(20) {
            next = random.number() as u16;
        }
        guest
            .queue
            .descriptor_at(table, index, address, len, flags, next);
    }
    if indirect {
        let len = if random.one_in(8) {
            random.number() as u32
        } else {
            16 * u32::from(count)
        };
        guest.queue.descriptor(0, table, len, 4, 0);
    }
    let head = if random.one_in(20) {
        random.number() as u16
    } else {
        0
    };
    guest.queue.offer(head);
    if random.one_in(30) {
        let index = random.number() as u16;
        guest.queue.put(guest.queue.rings.available + 2, index);
    }
}

#[test]
fn random_scsi_commands_harm_nothing() {
    within_a_minute(random_scsi_commands);
}

fn random_scsi_commands() {
    for seed in seeds(40) {
        let rig = rig(seed);
        let mut random = Random(seed.wrapping_mul(0x8ebc_6af0_9c88_c6e3));
        let mut guest = Guest::probe(&rig, Place::SCSI);
        for _ in 0..20 {
            let features = random.pick(&[ALL_FEATURES, 1 << 32, 1 << 32 | 1 << 28]);
            let mut drivers = start_most(&mut random, &mut guest, features, 4, 8);
            for _ in 0..40 {
                if random.one_in(10) {
                    let force = random.one_in(2);
                    let medium = random.one_in(2).then(|| image(nameless_file(), true));
                    // What the host does meanwhile; a drive that is locked keeps its medium.
                    let _ = rig.change("disk/cd", Change::Medium { medium, force });
                }
                offer_on_one(&mut random, &guest, &mut drivers, offer_command);
            }
            stand_still_at_times(&mut random, &rig);
        }
        still_works(&rig, seed);
    }
}

/// A command, task management or room for an event, but for a few things.
fn offer_command(random: &mut Random, index: u16, driver: &mut Driver) {
    const AT: u64 = 0x4_0000;
    let opcodes = [
        0x00, 0x03, 0x08, 0x12, 0x1a, 0x1b, 0x1e, 0x25, 0x28, 0x2a, 0x35, 0x41, 0x42, 0x43, 0x46,
        0x4a, 0x51, 0x5a, 0x88, 0x8a, 0x93, 0x9e, 0xa0, 0xbd,
    ];
    let mut header = [0u8; 51];
    if index == 0 {
        header[0] = random.below(4) as u8;
        header[4] = random.below(9) as u8;
        header[8] = 1;
        header[9] = random.below(4) as u8;
    } else {
        header[0] = 1;
        header[1] = random.below(4) as u8;
        header[2] = 0x40;
        for byte in &mut header[19..] {
            *byte = if random.one_in(3) {
                random.next() as u8
            } else {
                0
            };
        }
        header[19] = random.pick(&opcodes);
    }
    driver
        .memory
        .write_slice(&header, GuestAddress(AT))
        .unwrap();
    let write = random.one_in(2);
    let data = (AT + 0x4000, random.pick(&[16u32, 512, 2048, 0x8000]));
    let answer = (AT + 0x1000, 108, 2 | if write { 0 } else { 1 });
    let chain = match index {
        0 => vec![(AT, 24, 1), (AT + 0x1000, 8, 2)],
        1 => vec![(AT + 0x2000, 16, 2)],
        _ if write => vec![(AT, 51, 1), (data.0, data.1, 1), answer],
        _ => vec![(AT, 51, 1), answer, (data.0, data.1, 2)],
    };
    for (place, meant) in chain.into_iter().enumerate() {
        describe(random, driver, place as u16, meant, (16, 24));
    }
    offer_head(random, driver, 20);
}

#[test]
fn resets_in_the_middle_of_everything_leave_nothing_behind() {
    within_a_minute(resets);
}

fn resets() {
    let rig = rig(2);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    for round in 0..200u64 {
        guest.start(ALL_FEATURES, rings(0x1_0000, 8));
        for _ in 0..8 {
            guest.offer(1, round % 100, 512, 0);
        }
        rig.write(guest.doorbell(), 0, 2);
        guest.put(20, 0, 1);
        until("the reset ends", || guest.status() == 0);
        // What was not done by now is never done.
        let used = guest.queue.used_index();
        assert!(used <= 8);
        std::thread::sleep(Duration::from_micros(50));
        assert_eq!(guest.queue.used_index(), used);
    }
    still_works(&rig, 0);
}
