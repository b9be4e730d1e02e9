// SPDX-License-Identifier: Apache-2.0
//! The whole device against a driver of ours, with two ports.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use crate::pci::Place;
use crate::virtio::console::{FROM_GUEST, F_MULTIPORT, TO_GUEST};
use crate::virtio::queue::testing::{rings, Driver};
use crate::virtio::rig::{until, until_asleep, Guest, Rig, ALL_FEATURES};

const WRITE: u16 = 2;
const PLACES: u64 = 0x4_0000;
/// Of port 1.
const RX: u16 = 4;
const TX: u16 = 5;

struct Ports<'a> {
    guest: Guest<'a>,
    queues: Vec<Driver>,
}

impl<'a> Ports<'a> {
    fn start(rig: &'a Rig, features: u64) -> Ports<'a> {
        let mut guest = Guest::probe(rig, Place::PORTS);
        let list: Vec<_> = (0..6u16)
            .map(|index| (index, rings(0x1_0000 + 0x3000 * u64::from(index), 8)))
            .collect();
        guest.start_queues(features, &list);
        let queues = list.into_iter();
        Ports {
            guest,
            queues: queues
                .map(|(_, rings)| Driver::new(rig.memory.clone(), rings))
                .collect(),
        }
    }

    /// As a system would: it is told of the ports, and port 1 is opened.
    fn opened(rig: &'a Rig) -> Ports<'a> {
        let mut ports = Ports::start(rig, ALL_FEATURES);
        ports.say(0, 0, 1);
        ports.say(1, 3, 1);
        ports.say(1, 6, 1);
        ports
    }

    fn queue(&mut self, index: u16) -> &mut Driver {
        &mut self.queues[usize::from(index)]
    }

    fn place(index: u16) -> u64 {
        PLACES + 0x1_0000 * u64::from(index)
    }

    fn give(&mut self, index: u16, len: u32, flags: u16) {
        let queue = self.queue(index);
        queue.descriptor(0, Self::place(index), len, flags, 0);
        queue.offer(0);
        let bell = self.guest.doorbell() + 4 * u64::from(index);
        assert!(self.guest.rig.wiring.ring(bell));
    }

    fn write(&mut self, index: u16, bytes: &[u8]) {
        let place = GuestAddress(Self::place(index));
        self.guest.rig.memory.write_slice(bytes, place).unwrap();
        self.give(index, bytes.len() as u32, 0);
    }

    fn wait(&mut self, index: u16, used: u16) -> Vec<u8> {
        until("the queue moves", || self.queue(index).used_index() == used);
        let len = self.queue(index).used((used - 1) % 8).1;
        let mut bytes = vec![0; len as usize];
        let place = GuestAddress(Self::place(index));
        self.guest.rig.memory.read_slice(&mut bytes, place).unwrap();
        bytes
    }

    /// Says something on the control queue.
    fn say(&mut self, port: u32, event: u16, value: u16) {
        let used = self.queue(FROM_GUEST).used_index();
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.write(FROM_GUEST, &message);
        self.wait(FROM_GUEST, used.wrapping_add(1));
    }

    /// What is said to the driver next.
    fn hear(&mut self) -> Vec<u8> {
        let used = self.queue(TO_GUEST).used_index();
        self.give(TO_GUEST, 128, WRITE);
        self.wait(TO_GUEST, used.wrapping_add(1))
    }
}

#[test]
fn ports_are_told_of_by_number_and_by_name() {
    let rig = Rig::new(None);
    let mut ports = Ports::start(&rig, ALL_FEATURES);
    ports.say(0, 0, 1);
    assert_eq!(ports.hear(), [0, 0, 0, 0, 1, 0, 1, 0]);
    assert_eq!(ports.hear(), [1, 0, 0, 0, 1, 0, 1, 0]);
    ports.say(1, 3, 1);
    assert_eq!(ports.hear(), b"\x01\0\0\0\x07\0\x01\0org.vmbus.test\0");
    assert_eq!(
        ports.hear(),
        [1, 0, 0, 0, 6, 0, 1, 0],
        "the host has it open"
    );
    // What makes no sense is not answered.
    ports.say(9, 3, 1);
    ports.say(1, 99, 1);
    ports.give(TO_GUEST, 128, WRITE);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(ports.queue(TO_GUEST).used_index(), 4);
}

#[test]
fn bytes_go_both_ways_once_the_guest_has_the_port_open() {
    let rig = Rig::new(None);
    let mut ports = Ports::start(&rig, ALL_FEATURES);
    (&rig.far[1]).write_all(b"early").unwrap();
    ports.give(RX, 64, WRITE);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(ports.queue(RX).used_index(), 0, "nobody there reads it");
    ports.say(1, 6, 1);
    assert_eq!(ports.wait(RX, 1), b"early");
    ports.write(TX, b"hello");
    let mut got = [0; 5];
    (&rig.far[1]).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    // A port that was closed again keeps what comes for it.
    ports.say(1, 6, 0);
    ports.give(RX, 64, WRITE);
    (&rig.far[1]).write_all(b"later").unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(ports.queue(RX).used_index(), 1);
    let stats = rig.device("ports").stats();
    assert_eq!(stats["ports"]["org.vmbus.test"]["to-guest"], 5);
    assert_eq!(stats["ports"]["agent"]["from-guest"], 0);
}

#[test]
fn what_nobody_takes_waits_and_nothing_is_lost_or_said_twice() {
    let rig = Rig::new(None);
    let mut ports = Ports::opened(&rig);
    rig.far[1].set_nonblocking(true).unwrap();
    let chunk: Vec<u8> = (0..0xf000u32).map(|n| (n % 251) as u8).collect();
    // More than a socket holds; a pause in the middle of it changes nothing.
    let mut sent = 0;
    loop {
        ports.write(TX, &chunk);
        std::thread::sleep(Duration::from_millis(20));
        if ports.queue(TX).used_index() == sent {
            break;
        }
        sent += 1;
        assert!(sent < 40, "the socket is never full");
    }
    rig.device("ports").pause().unwrap();
    rig.device("ports").resume();
    let mut got: Vec<u8> = Vec::new();
    let mut part = vec![0; 1 << 20];
    until("all has come", || {
        match (&rig.far[1]).read(&mut part) {
            Ok(len) => got.extend(&part[..len]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        got.len() == (usize::from(sent) + 1) * chunk.len()
    });
    assert!(got.chunks(chunk.len()).all(|part| part == chunk));
    until("the last is used", || {
        ports.queue(TX).used_index() == sent + 1
    });
}

#[test]
fn a_driver_without_several_ports_has_the_first() {
    let rig = Rig::new(None);
    let mut ports = Ports::start(&rig, !F_MULTIPORT);
    ports.write(1, b"plain");
    let mut got = [0; 5];
    (&rig.far[0]).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"plain");
    (&rig.far[0]).write_all(b"back").unwrap();
    ports.give(0, 64, WRITE);
    assert_eq!(ports.wait(0, 1), b"back");
}

#[test]
fn a_port_whose_other_end_is_gone_takes_everything() {
    let mut rig = Rig::new(None);
    rig.far.clear();
    let mut ports = Ports::opened(&rig);
    ports.write(TX, b"nobody");
    ports.wait(TX, 1);
    assert_eq!(ports.guest.status(), 15);
}

#[test]
fn what_breaks_the_rules_asks_for_a_reset_and_then_it_works_again() {
    let rig = Rig::new(None);
    // Queue; length and flags.
    for (index, len, flags) in [
        (FROM_GUEST, 7, 0),
        (FROM_GUEST, 8, WRITE),
        (TO_GUEST, 4, WRITE),
        (TO_GUEST, 64, 0),
        (TX, 8, WRITE),
        (RX, 8, 0),
    ] {
        let mut ports = Ports::opened(&rig);
        (&rig.far[1]).write_all(b"x").unwrap();
        ports.give(index, len, flags);
        until("it needs a reset", || ports.guest.status() & 0x40 != 0);
        let mut ports = Ports::opened(&rig);
        ports.write(TX, b"works");
        let mut got = [0; 5];
        (&rig.far[1]).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"works");
    }
    assert_eq!(rig.device("ports").stats()["faults"], 6);
}

#[test]
fn a_driver_cannot_make_us_hold_more_and_more() {
    let rig = Rig::new(None);
    let mut ports = Ports::start(&rig, ALL_FEATURES);
    let message = [0, 0, 0, 0, 0, 0, 1, 0];
    // Each asks for two messages that it gives no room for.
    let mut told = 0;
    loop {
        ports.write(FROM_GUEST, &message);
        std::thread::sleep(Duration::from_millis(20));
        if ports.queue(FROM_GUEST).used_index() == told {
            break;
        }
        told += 1;
        assert!(told <= 33, "{told}");
    }
    // It goes on when there is room.
    ports.hear();
    ports.hear();
    until("it is heard", || {
        ports.queue(FROM_GUEST).used_index() == told + 1
    });
}

#[test]
fn its_thread_sleeps_when_there_is_nothing_to_do() {
    let rig = Rig::new(None);
    let mut ports = Ports::opened(&rig);
    ports.write(TX, b"hello");
    ports.give(RX, 64, WRITE);
    ports.give(TO_GUEST, 128, WRITE);
    until_asleep("ports");
}
