// SPDX-License-Identifier: Apache-2.0
//! Devices as a guest's driver meets them: found on the bus, negotiated with, used, moved, broken and reset.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::Ring;

use super::queue::testing::rings;
use super::queue::Rings;
use super::rig::{until, Guest, Rig, ALL_FEATURES, DATA, DISK_BYTES, STATUS};
use crate::error::Kind;
use crate::io::Change;
use crate::pci::Place;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const WRITE_ZEROES: u32 = 13;

const RINGS: u64 = 0x1_0000;

fn round_trip(rig: &Rig) {
    let mut guest = Guest::probe(rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    rig.memory
        .write_slice(&[0x5a; 1024], GuestAddress(DATA))
        .unwrap();
    guest.offer(OUT, 3, 1024, 0);
    assert_eq!(guest.ring_and_wait(1), 0);
    guest.offer(FLUSH, 0, 0, 0);
    assert_eq!(guest.ring_and_wait(2), 0);
    assert_eq!(rig.sector(3), [0x5a; 512]);
    assert_eq!(rig.sector(4), [0x5a; 512]);
    assert_eq!(rig.sector(5), [0; 512]);
    rig.memory
        .write_slice(&[0; 1024], GuestAddress(DATA))
        .unwrap();
    guest.offer(IN, 4, 0, 512);
    assert_eq!(guest.ring_and_wait(3), 0);
    assert_eq!(guest.queue.used(2), (0, 513));
    let mut data = [0; 1024];
    rig.memory
        .read_slice(&mut data, GuestAddress(DATA))
        .unwrap();
    assert_eq!(data[..512], [0x5a; 512]);
    assert_eq!(data[512..], [0; 512]);
    let stats = rig.device("disk/root").stats();
    assert_eq!(stats["reads"], 1);
    assert_eq!(stats["written_bytes"], 1024);
    assert_eq!(stats["flushes"], 1);
}

#[test]
fn a_disk_is_written_flushed_and_read_by_system_calls() {
    round_trip(&Rig::new(None));
}

#[test]
fn a_disk_is_written_flushed_and_read_by_io_uring() {
    match Ring::new(64, 8) {
        Ok(ring) => round_trip(&Rig::new(Some(ring))),
        Err(error) => eprintln!("absent: io_uring ({error})"),
    }
}

#[test]
fn the_configuration_tells_capacity_queues_and_serial_number() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    let device = guest.bar + guest.device;
    assert_eq!(rig.read(device, 8), DISK_BYTES / 512);
    // One queue a vCPU.
    assert_eq!(rig.read(device + 34, 2), 2);
    assert_eq!(guest.get(18, 2), 2);
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.offer(GET_ID, 0, 0, 20);
    assert_eq!(guest.ring_and_wait(1), 0);
    let mut id = [0; 20];
    rig.memory.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id[..12], b"serial-root\0");
}

#[test]
fn completions_raise_the_queues_vector() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.use_msix();
    guest.offer(IN, 0, 0, 512);
    guest.ring_and_wait(1);
    let mut raised = Vec::new();
    until("an interrupt", || {
        raised.extend(rig.wiring.raised());
        !raised.is_empty()
    });
    assert_eq!(raised, [(0xfee0_0000, 0x41)]);
    assert_eq!(rig.read(guest.bar + guest.isr, 1), 1);
    assert_eq!(rig.read(guest.bar + guest.isr, 1), 0);
}

#[test]
fn writes_of_zeroes_reach_the_image() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    rig.memory
        .write_slice(&[7; 512], GuestAddress(DATA))
        .unwrap();
    guest.offer(OUT, 9, 512, 0);
    assert_eq!(guest.ring_and_wait(1), 0);
    let segment = 9u128 | 1 << 64;
    rig.memory
        .write_slice(&segment.to_le_bytes(), GuestAddress(DATA))
        .unwrap();
    guest.offer(WRITE_ZEROES, 0, 16, 0);
    assert_eq!(guest.ring_and_wait(2), 0);
    assert_eq!(rig.sector(9), [0; 512]);
}

#[test]
fn a_disk_that_grows_tells_its_driver_and_takes_requests_behind_its_old_end() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    let capacity = guest.bar + guest.device;
    let sectors = DISK_BYTES / 512;
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.use_msix();
    guest.offer(OUT, sectors, 512, 0);
    assert_eq!(guest.ring_and_wait(1), 1, "it ends there");
    rig.wiring.raised();

    rig.change("disk/root", Change::Size(2 * DISK_BYTES))
        .unwrap();
    assert_eq!(rig.read(capacity, 8), 2 * sectors);
    assert_eq!(guest.get(21, 1), 1, "another generation");
    assert!(rig.wiring.raised().contains(&(0xfee0_0000, 0x40)));
    rig.memory
        .write_slice(&[0x77; 512], GuestAddress(DATA))
        .unwrap();
    guest.offer(OUT, 2 * sectors - 1, 512, 0);
    assert_eq!(guest.ring_and_wait(2), 0);
    assert_eq!(rig.sector(2 * sectors - 1), [0x77; 512]);
}

#[test]
fn a_size_that_cannot_be_is_refused_and_the_disk_stays_as_it_is() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    for (id, size, kind) in [
        ("disk/root", DISK_BYTES - 512, Kind::InvalidArgument),
        ("disk/root", DISK_BYTES + 1, Kind::InvalidArgument),
        ("disk/root", u64::MAX - 511, Kind::InvalidArgument),
        ("disk/data", 2 * DISK_BYTES, Kind::InvalidState),
        ("rng", DISK_BYTES, Kind::InvalidArgument),
        ("balloon", DISK_BYTES, Kind::InvalidArgument),
    ] {
        let refused = rig.change(id, Change::Size(size)).unwrap_err();
        assert_eq!(refused.kind, kind, "{id} {size}");
    }
    assert_eq!(rig.read(guest.bar + guest.device, 8), DISK_BYTES / 512);
    assert_eq!(guest.get(21, 1), 0);
    guest.offer(IN, 0, 0, 512);
    assert_eq!(guest.ring_and_wait(1), 0);
}

#[test]
fn a_disk_grows_between_requests_that_never_stop() {
    let rig = Rig::new(Ring::new(64, 8).ok());
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    for round in 1..=20 {
        guest.offer(OUT, 7, 4096, 0);
        assert!(rig.wiring.ring(guest.doorbell()));
        let size = DISK_BYTES + u64::from(round) * 4096;
        rig.change("disk/root", Change::Size(size)).unwrap();
        assert_eq!(guest.wait(round), 0);
    }
    // A paused machine's too.
    rig.device("disk/root").pause().unwrap();
    rig.change("disk/root", Change::Size(4 * DISK_BYTES))
        .unwrap();
    rig.device("disk/root").resume();
    assert_eq!(rig.read(guest.bar + guest.device, 8), 4 * DISK_BYTES / 512);
}

#[test]
fn a_read_only_disk_answers_writes_with_an_error() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(1));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    assert_eq!(guest.features & 1 << 5, 1 << 5);
    guest.offer(OUT, 0, 512, 0);
    assert_eq!(guest.ring_and_wait(1), 1);
    assert_eq!(rig.device("disk/data").stats()["errors"], 1);
}

#[test]
fn random_numbers_fill_the_request() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::RNG);
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.queue.descriptor(0, DATA, 64, 2, 0);
    guest.queue.offer(0);
    guest.ring_and_wait(1);
    assert_eq!(guest.queue.used(0), (0, 64));
    let mut bytes = [0; 64];
    rig.memory
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    assert_ne!(bytes, [0; 64]);
}

#[test]
fn doorbells_follow_a_moved_bar() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    assert!(rig.wiring.watched().is_empty());
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    assert_eq!(rig.wiring.watched(), [guest.doorbell()]);
    rig.write(guest.config + 0x10, 0xcff0_0000, 4);
    guest.bar = 0xcff0_0000;
    assert_eq!(rig.wiring.watched(), [guest.doorbell()]);
    guest.offer(IN, 0, 0, 512);
    assert_eq!(guest.ring_and_wait(1), 0);
    // Outside of the windows nothing is decoded, and nothing is watched.
    rig.write(guest.config + 0x10, 0x1000_0000, 4);
    assert!(rig.wiring.watched().is_empty());
    rig.write(guest.config + 0x10, 0xcff0_0000, 4);
    assert_eq!(rig.wiring.watched(), [guest.doorbell()]);
    rig.write(guest.config + 4, 0, 2);
    assert!(rig.wiring.watched().is_empty());
}

#[test]
fn a_notification_that_kvm_does_not_take_works_all_the_same() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.offer(IN, 0, 0, 512);
    rig.write(guest.doorbell(), 0, 2);
    assert_eq!(guest.wait(1), 0);
}

#[test]
fn a_reset_ends_the_queues_and_the_next_driver_starts_afresh() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    for _ in 0..3 {
        guest.start(ALL_FEATURES, rings(RINGS, 8));
        guest.offer(IN, 0, 0, 512);
        assert_eq!(guest.ring_and_wait(1), 0);
    }
    guest.put(20, 0, 1);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.get(28, 2), 0);
    assert!(rig.wiring.watched().is_empty());
    guest.offer(IN, 0, 0, 512);
    rig.write(guest.doorbell(), 0, 2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.queue.used_index(), 1);
}

#[test]
fn a_function_level_reset_resets_registers_and_bars() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    let home = guest.bar;
    rig.write(guest.config + 0x10, 0xcff0_0000, 4);
    guest.bar = 0xcff0_0000;
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    let mut at = rig.read(guest.config + 0x34, 1);
    while rig.read(guest.config + at, 1) != 0x10 {
        at = rig.read(guest.config + at + 1, 1);
    }
    rig.write(guest.config + at + 8, 0x8000, 2);
    assert_eq!(rig.read(guest.config + 4, 2), 0);
    assert_eq!(rig.read(guest.config + 0x10, 4) & !0xf, home);
    assert_eq!(rig.read(guest.bar, 4), 0xffff_ffff);
    assert!(rig.wiring.watched().is_empty());
    let mut guest = Guest::probe(&rig, Place::disk(0));
    assert_eq!(guest.status(), 0);
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.offer(IN, 0, 0, 512);
    assert_eq!(guest.ring_and_wait(1), 0);
}

#[test]
fn registers_are_reachable_through_configuration_space() {
    let rig = Rig::new(None);
    let guest = Guest::probe(&rig, Place::disk(0));
    // Memory decoding off: this is for firmware that cannot reach the BAR.
    rig.write(guest.config + 4, 0, 2);
    rig.write(guest.access + 4, 0, 1);
    rig.write(guest.access + 8, guest.common + 18, 4);
    rig.write(guest.access + 12, 2, 4);
    assert_eq!(rig.read(guest.access + 16, 2), 2);
    rig.write(guest.access + 8, guest.common + 20, 4);
    rig.write(guest.access + 12, 1, 4);
    rig.write(guest.access + 16, 3, 1);
    rig.write(guest.config + 4, 6, 2);
    assert_eq!(guest.status(), 3);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_mends_it() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.use_msix();
    guest.queue.offer(0x1234);
    assert!(rig.wiring.ring(guest.doorbell()));
    until("the device asks for a reset", || guest.status() & 0x40 != 0);
    assert_eq!(rig.wiring.raised(), [(0xfee0_0000, 0x40)]);
    assert_eq!(rig.read(guest.bar + guest.isr, 1) & 2, 2);
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.offer(IN, 0, 0, 512);
    assert_eq!(guest.ring_and_wait(1), 0);
    assert_eq!(rig.device("disk/root").stats()["faults"], 1);
}

#[test]
fn rings_outside_of_memory_ask_for_a_reset_at_once() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    let good = rings(RINGS, 8);
    for bad in [
        Rings {
            used: 0x1000_0000_0000,
            ..good
        },
        Rings {
            descriptors: u64::MAX - 15,
            ..good
        },
    ] {
        guest.start(ALL_FEATURES, bad);
        assert_eq!(guest.status() & 0x40, 0x40);
    }
    guest.start(ALL_FEATURES, good);
    assert_eq!(guest.status(), 15);
}

#[test]
fn a_paused_device_begins_nothing_until_it_resumes() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    let disk = rig.device("disk/root");
    disk.pause().unwrap();
    guest.offer(IN, 0, 0, 512);
    assert!(rig.wiring.ring(guest.doorbell()));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.queue.used_index(), 0);
    assert_eq!(
        rig.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(),
        0xff
    );
    disk.resume();
    assert_eq!(guest.wait(1), 0);
}

#[test]
fn a_machine_reset_brings_all_devices_back_to_power_on() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    rig.device("disk/root").pause().unwrap();
    rig.device("pci").reset();
    assert_eq!(rig.read(guest.config + 4, 2), 0);
    rig.device("disk/root").resume();
    let mut guest = Guest::probe(&rig, Place::disk(0));
    assert_eq!(guest.status(), 0);
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    guest.offer(IN, 0, 0, 512);
    assert_eq!(guest.ring_and_wait(1), 0);
}

#[test]
fn one_descriptor_offered_over_and_over_ends() {
    let rig = Rig::new(None);
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    for _ in 0..8 {
        guest.offer(IN, 0, 0, 512);
    }
    guest.ring_and_wait(8);
    assert_eq!(guest.status(), 15);
    assert_eq!(rig.device("disk/root").stats()["reads"], 8);
}

#[test]
fn an_io_thread_whose_ring_fails_is_heard_of_and_nobody_waits_for_it() {
    let ring = match Ring::new(64, 8) {
        Ok(ring) => ring,
        Err(error) => return eprintln!("absent: io_uring ({error})"),
    };
    let fd = ring.fd();
    let rig = Rig::new(Some(ring));
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    // The ring's number now names something that is none.
    let null = std::fs::File::open("/dev/null").unwrap();
    // SAFETY: both are fds; the ring's own stays open, as /dev/null.
    let renamed = unsafe { libc::dup2(null.as_raw_fd(), fd) };
    assert_eq!(renamed, fd);
    guest.offer(IN, 0, 0, 512);
    assert!(rig.wiring.ring(guest.doorbell()));
    until("the trouble", || !rig.trouble.lock().unwrap().is_empty());
    assert!(rig.device("disk/root").pause().is_err());
    assert!(rig.device("io/block-0").stop().is_err());
    guest.put(20, 0, 1);
    assert_eq!(guest.status(), 0);
}

/// Part of the machine type: a change here is a new version of it.
#[test]
fn features_and_limits_are_the_machine_types() {
    let rig = Rig::new(None);
    for (place, features, queues, size) in [
        (Place::disk(0), 0x1_3000_7646, 2, 256),
        (Place::disk(1), 0x1_3000_1666, 2, 256),
        (Place::RNG, 0x1_3000_0000u64, 1, 64),
    ] {
        let mut guest = Guest::probe(&rig, place);
        guest.start(ALL_FEATURES, rings(RINGS, 8));
        assert_eq!(guest.features, features, "{place:?}");
        assert_eq!(guest.get(18, 2), queues);
        guest.put(20, 0, 1);
        assert_eq!(guest.get(24, 2), size);
    }
    let device = Guest::probe(&rig, Place::disk(0)).bar + 0x2000;
    let config: Vec<u32> = (0..15)
        .map(|word| rig.read(device + 4 * word, 4) as u32)
        .collect();
    let expected = [
        2048,
        0,
        1 << 20,
        254,
        0,
        512,
        0x0008_0003,
        0,
        0x0002_0001,
        1 << 22,
        1,
        128,
        1 << 22,
        1,
        1,
    ];
    assert_eq!(config, expected);
}

#[test]
fn a_driver_that_floods_one_disk_does_not_hold_up_another() {
    const FLOOD: u64 = 0x2_0000;
    let rig = Rig::new(None);
    let mut flooder = Guest::probe(&rig, Place::disk(1));
    flooder.start(ALL_FEATURES, rings(FLOOD, 8));
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(RINGS, 8));
    let ended = AtomicBool::new(false);
    let deadline = Instant::now() + Duration::from_secs(20);
    let goes_on = || !ended.load(Ordering::Relaxed) && Instant::now() < deadline;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Get the serial number, over and over, without waiting for an answer.
            rig.memory
                .write_obj(GET_ID, GuestAddress(FLOOD + 0x4000))
                .unwrap();
            flooder.queue.descriptor(0, FLOOD + 0x4000, 16, 1, 1);
            flooder.queue.descriptor(1, FLOOD + 0x5000, 21, 2, 0);
            while goes_on() {
                flooder.queue.offer(0);
                if flooder.queue.available % 4 == 0 {
                    rig.write(flooder.doorbell(), 0, 2);
                }
                // Never so far ahead that it is a fault.
                while flooder
                    .queue
                    .available
                    .wrapping_sub(flooder.queue.used_index())
                    >= 8
                    && goes_on()
                {}
            }
        });
        for round in 1..=200 {
            guest.offer(IN, 0, 0, 512);
            assert_eq!(guest.ring_and_wait(round), 0);
        }
        ended.store(true, Ordering::Relaxed);
    });
    assert_eq!(rig.device("disk/data").stats()["faults"], 0);
    assert!(flooder.queue.used_index() > 0);
    rig.device("disk/data").pause().unwrap();
}
