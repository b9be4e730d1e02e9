// SPDX-License-Identifier: Apache-2.0
//! Random guests against whole devices: no panic, no endless loop, and a device that still works afterwards.
//!
//! Of guests there are two: one hammers every register and all of configuration space with random accesses; one
//! sets a device up as a driver does and then offers random chains, mostly nearly right, since those get furthest. A
//! third kind of input is a machine's state that somebody has changed. The first seeds are always the same; with
//! FUZZ_SECONDS in the environment new ones follow for so long. A failure names its seed. A panic in the I/O thread
//! shows as a device that hangs up on `pause`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};
use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::Ring;

use super::net;
use super::queue::testing::{rings, Driver, MEMORY};
use super::rig::{image, nameless_file, until, Guest, Rig, ALL_FEATURES, DISK_BYTES};
use super::vsock::Packet;
use crate::io::Change;
use crate::layout::ECAM_START;
use crate::net::{Link, Stream};
use crate::pci::Place;
use crate::state::Stateful;

/// What FUZZ_SECONDS grants beyond the fixed seeds.
fn extra_time() -> Duration {
    let seconds = std::env::var("FUZZ_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(0))
}

/// Seeds 1 to `fixed`, then others while there is time.
fn seeds(fixed: u64) -> impl Iterator<Item = u64> {
    let deadline = Instant::now() + extra_time();
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = since_1970.as_nanos() as u64 | 1 << 63;
    (1..=fixed).chain((first..).take_while(move |_| Instant::now() < deadline))
}

/// Runs a test that may come to hang.
fn within_a_minute(test: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = channel::<()>();
    let thread = std::thread::spawn(move || {
        let _sender = sender;
        test();
    });
    let limit = Duration::from_secs(60) + extra_time();
    let ended = receiver.recv_timeout(limit);
    assert_eq!(ended, Err(RecvTimeoutError::Disconnected), "it hangs");
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// xorshift64*: all that is needed of randomness here.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 16) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// Numbers that break things, and plain ones.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.pick(&[0, 1, 0xff, 0xffff, 0xffff_ffff, u64::MAX, 1 << 63]),
            1 => 1 << self.below(64),
            2 => MEMORY.wrapping_add(self.below(64)).wrapping_sub(32),
            3 => self.next(),
            _ => self.below(0x2_0000),
        }
    }
}

/// On io_uring for even seeds, where the host has it.
fn rig(seed: u64) -> Rig {
    eprintln!("seed {seed}");
    let ring = if seed % 2 == 0 {
        Ring::new(64, 8).ok()
    } else {
        None
    };
    Rig::new(ring)
}

/// Each device answers a pause, then works for a driver that keeps the rules.
fn still_works(rig: &Rig, seed: u64) {
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

/// Sets most of the first `count` queues up, with `size` entries each; gives those, with their drivers.
fn start_most(
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
fn offer_on_one(
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

/// Once in four times each device is paused and goes on.
fn stand_still_at_times(random: &mut Random, rig: &Rig) {
    if random.one_in(4) {
        for device in &rig.devices.list {
            device.pause().unwrap();
            device.resume();
        }
    }
}

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

/// Writes a descriptor as it is meant, or with something wrong: address and length once in `odds.0` times, flags and
/// link once in `odds.1`.
fn describe(
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
fn offer_head(random: &mut Random, driver: &mut Driver, odds: u64) {
    driver.offer(if random.one_in(odds) {
        random.number() as u16
    } else {
        0
    });
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

#[test]
fn random_states_harm_nothing() {
    within_a_minute(random_states);
}

/// A machine's state, spoilt in some places, is refused or taken over; either way nothing panics, and a reset mends all.
fn random_states() {
    let rig = Rig::new(None);
    let mut disk = Guest::probe(&rig, Place::disk(0));
    disk.start(ALL_FEATURES, rings(0x1_0000, 8));
    let mut interface = Guest::probe(&rig, Place::nic(0));
    interface.start_queues(
        ALL_FEATURES,
        &[(0, rings(0x2_0000, 8)), (1, rings(0x3_0000, 8))],
    );
    for device in &rig.devices.list {
        device.pause().unwrap();
    }
    let saved = rig.devices.root.save().unwrap();
    let (mut refused, mut taken) = (0, 0);
    for seed in seeds(60) {
        eprintln!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x2127_599b_f432_5c37));
        let mut state = saved.clone();
        for _ in 0..random.below(4) {
            spoil(&mut random, &mut state);
        }
        let victim = Rig::new(None);
        for device in &victim.devices.list {
            device.pause().unwrap();
        }
        match victim.devices.root.restore(&state) {
            Ok(()) => taken += 1,
            Err(_) => refused += 1,
        }
        for device in &victim.devices.list {
            device.resume();
        }
        still_works(&victim, seed);
        assert_eq!(*victim.trouble.lock().unwrap(), [""; 0], "seed {seed}");
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
}

/// Changes something somewhere in a state.
fn spoil(random: &mut Random, state: &mut Value) {
    match state {
        Value::Object(fields) if !fields.is_empty() && !random.one_in(30) => {
            let place = random.below(fields.len() as u64) as usize;
            let name = fields.keys().nth(place).cloned().unwrap();
            if random.one_in(30) {
                fields.remove(&name);
            } else {
                spoil(random, &mut fields[&name]);
            }
        }
        Value::Array(items) if !items.is_empty() && !random.one_in(8) => {
            let place = random.below(items.len() as u64) as usize;
            match random.below(8) {
                0 => items.truncate(place),
                1 => items.push(items[place].clone()),
                _ => spoil(random, &mut items[place]),
            }
        }
        Value::String(text) if !text.is_empty() && !random.one_in(8) => {
            let place = random.below(text.len() as u64) as usize;
            let digit = random.pick(&["0", "7", "f", "g"]);
            text.replace_range(place..=place, digit);
        }
        other => {
            *other = match random.below(5) {
                0 => Value::Null,
                1 => json!(random.one_in(2)),
                2 => json!("f".repeat(random.below(600) as usize)),
                _ => json!(random.number()),
            }
        }
    }
}
