// SPDX-License-Identifier: Apache-2.0
//! The network interface, on each kind of link: frames and commands of the guest's, and wires on which anything arrives.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress};

use super::guest::{
    describe, offer_head, offer_on_one, rig, stand_still_at_times, start_most, still_works,
};
use super::random::Random;
use super::seeds::{seeds, within_a_minute};
use crate::net::{Link, Stream};
use crate::pci::Place;
use crate::virtio::net;
use crate::virtio::queue::testing::Driver;
use crate::virtio::rig::{Guest, Rig, ALL_FEATURES};

#[test]
fn random_frames_and_commands_harm_nothing() {
    within_a_minute(|| {
        random_frames(|seed| {
            let rig = rig(seed);
            let wires = rig.wire.iter().map(|wire| {
                wire.set_nonblocking(true).unwrap();
                File::from(OwnedFd::from(wire.try_clone().unwrap()))
            });
            let wires = wires.collect();
            (rig, wires)
        });
    });
}

/// The other end says anything, lengths of frames among it, and is soon hung up on.
#[test]
fn random_frames_on_a_stream_harm_nothing() {
    within_a_minute(|| {
        random_frames(|_| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let link = Link::Stream(Box::new(Stream::new(theirs.into()).unwrap()));
            let rig = Rig::linked(None, link, Vec::new());
            (rig, vec![File::from(OwnedFd::from(ours))])
        });
    });
}

#[test]
fn random_frames_in_an_isolated_network_harm_nothing() {
    within_a_minute(|| {
        random_frames(|_| {
            let rig = Rig::linked(None, Link::Hub(Box::default()), Vec::new());
            let member = |name: &str| {
                let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK;
                let mut fds = [0; 2];
                // SAFETY: room for two fds.
                let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
                assert_eq!(made, 0);
                // SAFETY: both are new and ours.
                let (ours, theirs) =
                    unsafe { (File::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
                rig.device("nic/net").link(name.to_owned(), theirs).unwrap();
                ours
            };
            let members = vec![member("a"), member("b")];
            (rig, members)
        });
    });
}

/// A driver of the network interface that does nearly the right thing on all five queues, and wires on which
/// anything arrives meanwhile.
fn random_frames(make: impl Fn(u64) -> (Rig, Vec<File>)) {
    for seed in seeds(20) {
        let (rig, mut wires) = make(seed);
        let mut random = Random(seed.wrapping_mul(0xa076_1d64_78bd_642f));
        let mut guest = Guest::probe(&rig, Place::nic(0));
        for _ in 0..25 {
            let features = random.pick(&[
                ALL_FEATURES,
                ALL_FEATURES & !net::F_MRG_RXBUF,
                1 << 32,
                1 << 32 | net::F_MRG_RXBUF | 1 << 28,
            ]);
            let size = random.pick(&[1, 8, 16]);
            let mut drivers = start_most(&mut random, &mut guest, features, 5, size);
            for _ in 0..60 {
                if random.one_in(3) {
                    let mut packet = vec![0; random.pick(&[0, 11, 12, 26, 600, 9000, 65_000])];
                    if let Some(bytes) = packet.get_mut(12..26) {
                        bytes.fill(random.next() as u8);
                    }
                    let wire = random.below(wires.len() as u64) as usize;
                    // A full socket is no concern of the device's, and one that it has hung up on is its right.
                    let _ = wires[wire].write(&packet);
                    continue;
                }
                offer_on_one(&mut random, &guest, &mut drivers, offer_frame);
            }
            stand_still_at_times(&mut random, &rig);
            let mut bytes = [0; 1 << 17];
            for wire in &mut wires {
                while matches!(wire.read(&mut bytes), Ok(1..)) {}
            }
        }
        still_works(&rig, seed);
    }
}

/// A buffer, frame or command but for a few things.
fn offer_frame(random: &mut Random, index: u16, driver: &mut Driver) {
    let count = 1 + random.below(u64::from(driver.rings.size).min(4)) as u16;
    for place in 0..count {
        let mut flags = u16::from(place + 1 < count);
        let address = 0x4_0000 + random.below(64) * 2048;
        let mut len = random.pick(&[1u32, 6, 12, 14, 26, 1500, 2048, 0x1_1000]);
        match index {
            0 | 2 => flags |= 2,
            // Commands end with a byte for the answer.
            4 if place + 1 == count && place > 0 => (len, flags) = (1, 2),
            4 => {
                let command = random.next() & 0xffff_ff01_0007 | random.below(3) << 16;
                let place = GuestAddress(address);
                driver.memory.write_obj(command, place).unwrap();
                len = random.pick(&[2, 3, 4, 8, 10, 16]);
            }
            _ => {}
        }
        describe(random, driver, place, (address, len, flags), (25, 40));
    }
    offer_head(random, driver, 40);
}
