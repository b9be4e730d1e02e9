// SPDX-License-Identifier: Apache-2.0
//! Bytes between guest and host: named ports of virtio-console, and sockets of virtio-vsock. The host reads, writes, comes
//! and leaves meanwhile.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{
    describe, offer_head, offer_on_one, rig, stand_still_at_times, start_most, still_works,
};
use super::random::Random;
use super::seeds::{seeds, within_a_minute};
use crate::io::Change;
use crate::pci::Place;
use crate::virtio::queue::testing::Driver;
use crate::virtio::rig::{Guest, ALL_FEATURES};
use crate::virtio::vsock::Packet;

#[test]
fn random_words_on_ports_harm_nothing() {
    within_a_minute(random_words);
}

fn random_words() {
    for seed in seeds(40) {
        let rig = rig(seed);
        let mut random = Random(seed.wrapping_mul(0xd6e8_feb8_6659_fd93));
        for far in &rig.far {
            far.set_nonblocking(true).unwrap();
        }
        let mut guest = Guest::probe(&rig, Place::PORTS);
        for _ in 0..20 {
            let features = random.pick(&[ALL_FEATURES, 1 << 32, 1 << 32 | 1 << 28]);
            let mut drivers = start_most(&mut random, &mut guest, features, 6, 8);
            for _ in 0..40 {
                if random.one_in(6) {
                    // The host reads and writes, or not.
                    let mut far = &rig.far[random.below(2) as usize];
                    let mut bytes = [0; 4096];
                    let _ = far.read(&mut bytes);
                    let _ = far.write(&bytes[..random.below(4096) as usize]);
                }
                offer_on_one(&mut random, &guest, &mut drivers, offer_words);
            }
            stand_still_at_times(&mut random, &rig);
        }
        still_works(&rig, seed);
    }
}

/// A message, room for one, or bytes, but for a few things.
fn offer_words(random: &mut Random, index: u16, driver: &mut Driver) {
    const AT: u64 = 0x4_0000;
    if index == 3 {
        let mut message = [0u8; 8];
        message[0] = random.below(3) as u8;
        message[4] = random.below(9) as u8;
        message[6] = random.below(2) as u8;
        let place = GuestAddress(AT);
        driver.memory.write_slice(&message, place).unwrap();
    }
    let flags = if index % 2 == 0 { 2 } else { 0 };
    let len = match index {
        3 => 8,
        2 => random.pick(&[8u32, 64]),
        _ => random.pick(&[1u32, 64, 0x1000, 0x8000]),
    };
    describe(random, driver, 0, (AT, len, flags), (16, 24));
    offer_head(random, driver, 20);
}

#[test]
fn random_packets_on_sockets_harm_nothing() {
    within_a_minute(random_packets);
}

/// A guest that says anything on connections that are there, and on some that are not, while the host connects,
/// accepts, writes and leaves.
fn random_packets() {
    for seed in seeds(40) {
        let rig = rig(seed);
        let mut random = Random(seed.wrapping_mul(0xe703_7ed1_a0b4_28db));
        let mut guest = Guest::probe(&rig, Place::VSOCK);
        for _ in 0..20 {
            let features = random.pick(&[ALL_FEATURES, 1 << 32, 1 << 32 | 1 << 28]);
            let mut drivers = start_most(&mut random, &mut guest, features, 3, 8);
            let mut ours: Vec<UnixStream> = Vec::new();
            for _ in 0..60 {
                if random.one_in(4) {
                    let (socket, theirs) = UnixStream::pair().unwrap();
                    theirs.set_nonblocking(true).unwrap();
                    socket.set_nonblocking(true).unwrap();
                    let port = random.below(4) as u32;
                    let change = match random.one_in(2) {
                        true => Change::Connect(port, theirs.into()),
                        false => Change::Accept(port, theirs.into()),
                    };
                    drop(rig.begin_change("vsock", change));
                    ours.push(socket);
                }
                if let Some(mut socket) = ours.last() {
                    // One that was hung up on, or is full, is no concern of ours.
                    let _ = socket.write(&vec![1; random.below(9000) as usize]);
                    let _ = socket.read(&mut [0; 9000]);
                }
                if random.one_in(8) {
                    ours.pop();
                }
                offer_on_one(&mut random, &guest, &mut drivers, offer_packet);
            }
            stand_still_at_times(&mut random, &rig);
            rig.device("vsock").stats();
        }
        still_works(&rig, seed);
    }
}

/// A packet, or room for one, but for a few things.
fn offer_packet(random: &mut Random, index: u16, driver: &mut Driver) {
    let address = 0x4_0000 + random.below(16) * 0x4000;
    let len = random.pick(&[0u32, 0, 1, 100, 4096, 0x3000, 0x1_0001]);
    let packet = Packet {
        src_cid: random.pick(&[5, 5, 5, 5, 5, 2, 0]),
        dst_cid: random.pick(&[2, 2, 2, 2, 2, 5, 1]),
        src_port: random.below(4) as u32,
        // Those that the host connects from, and those on which it accepts.
        dst_port: random.below(4) as u32 + random.pick(&[0, 1 << 30]),
        len: if random.one_in(20) {
            random.number() as u32
        } else {
            len
        },
        kind: random.pick(&[1, 1, 1, 1, 1, 1, 2, 0]),
        operation: random.below(9) as u16,
        flags: random.below(5) as u32,
        room: random.pick(&[0, 1, 4096, 1 << 18, u32::MAX]),
        taken: random.pick(&[0, 1, 4096, u32::MAX]),
    };
    driver
        .memory
        .write_slice(&packet.bytes(), GuestAddress(address))
        .unwrap();
    let meant = match index {
        1 => (address, 44 + len, 0),
        2 => (address, 4, 2),
        _ => (address, random.pick(&[44, 45, 300, 4096, 0x4000]), 2),
    };
    describe(random, driver, 0, meant, (25, 25));
    offer_head(random, driver, 30);
}
