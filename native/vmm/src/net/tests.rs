// SPDX-License-Identifier: Apache-2.0
//! The whole device against a driver of ours, with sockets for a tap.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use vm_memory::{Bytes, GuestAddress};

use super::{Link, Tap};

use crate::io::Change;
use crate::pci::Place;
use crate::virtio::net::{F_MRG_RXBUF, HEADER};
use crate::virtio::queue::testing::{rings, Driver};
use crate::virtio::rig::{until, Guest, Rig, ALL_FEATURES, MAC};

pub(super) const RX: u16 = 0;
pub(super) const TX: u16 = 1;
const RX2: u16 = 2;
pub(super) const TX2: u16 = 3;
const CONTROL: u16 = 4;
const WRITE: u16 = 2;
const SIZE: u16 = 8;
/// Where buffer n of queue q lies.
const BUFFERS: u64 = 0x4_0000;

pub(super) struct Nic<'a> {
    pub(super) guest: Guest<'a>,
    queues: Vec<(u16, Driver)>,
}

impl<'a> Nic<'a> {
    fn start(rig: &'a Rig, features: u64, indexes: &[u16]) -> Nic<'a> {
        let mut guest = Guest::probe(rig, Place::nic(0));
        let list: Vec<_> = indexes
            .iter()
            .map(|index| (*index, rings(0x1_0000 + 0x3000 * u64::from(*index), SIZE)))
            .collect();
        guest.start_queues(features, &list);
        // The thread takes its commands in order: now it has begun, and thrown away what came before.
        rig.device("nic/net").pause().unwrap();
        rig.device("nic/net").resume();
        let queues = list
            .into_iter()
            .map(|(index, rings)| (index, Driver::new(rig.memory.clone(), rings)))
            .collect();
        Nic { guest, queues }
    }

    pub(super) fn all(rig: &'a Rig) -> Nic<'a> {
        Nic::start(rig, ALL_FEATURES, &[RX, TX, RX2, TX2, CONTROL])
    }

    pub(super) fn queue(&mut self, index: u16) -> &mut Driver {
        let mut queues = self.queues.iter_mut();
        &mut queues.find(|(number, _)| *number == index).unwrap().1
    }

    fn ring(&self, index: u16) {
        let bell = self.guest.doorbell() + 4 * u64::from(index);
        assert!(self.guest.rig.wiring.ring(bell));
    }

    fn place(index: u16, buffer: u16) -> u64 {
        BUFFERS + 0x1_0000 * u64::from(index) + 0x1000 * u64::from(buffer)
    }

    /// Gives buffers 0, 1, … of these lengths to receive into.
    pub(super) fn buffers(&mut self, index: u16, lens: &[u32]) {
        for (buffer, len) in (0..).zip(lens) {
            let queue = self.queue(index);
            queue.descriptor(buffer, Self::place(index, buffer), *len, WRITE, 0);
            queue.offer(buffer);
        }
        self.ring(index);
    }

    /// Sends a frame in two descriptors, cut inside the header.
    pub(super) fn send(&mut self, index: u16, packet: &[u8]) {
        let (first, second) = (Self::place(index, 0), Self::place(index, 1));
        let memory = &self.guest.rig.memory;
        let (head, tail) = packet.split_at(7);
        memory.write_slice(head, GuestAddress(first)).unwrap();
        memory.write_slice(tail, GuestAddress(second)).unwrap();
        let queue = self.queue(index);
        queue.descriptor(0, first, head.len() as u32, 1, 1);
        queue.descriptor(1, second, tail.len() as u32, 0, 0);
        queue.offer(0);
        self.ring(index);
    }

    /// Gives a command; its answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        let place = Self::place(CONTROL, 0);
        let memory = self.guest.rig.memory.clone();
        memory.write_slice(bytes, GuestAddress(place)).unwrap();
        let queue = self.queue(CONTROL);
        let before = queue.used_index();
        queue.descriptor(0, place, bytes.len() as u32, 1, 1);
        queue.descriptor(1, place + 0x800, 1, WRITE, 0);
        queue.offer(0);
        self.ring(CONTROL);
        self.wait(CONTROL, before + 1);
        memory.read_obj(GuestAddress(place + 0x800)).unwrap()
    }

    pub(super) fn wait(&mut self, index: u16, used: u16) {
        until("the queue moves", || self.queue(index).used_index() == used);
    }

    pub(super) fn bytes(&self, index: u16, buffer: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let place = GuestAddress(Self::place(index, buffer));
        self.guest.rig.memory.read_slice(&mut bytes, place).unwrap();
        bytes
    }
}

/// A packet as the wire has it: an empty header and a frame of `len` bytes to this address.
pub(super) fn packet(to: [u8; 6], len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend(to);
    packet.extend((6..len).map(|n| n as u8));
    packet
}

pub(super) fn stats(rig: &Rig) -> serde_json::Value {
    rig.device("nic/net").stats()
}

#[test]
fn the_driver_reads_its_address_and_how_many_pairs_there_are() {
    let rig = Rig::new(None);
    let guest = Guest::probe(&rig, Place::nic(0));
    let device = guest.bar + guest.device;
    assert_eq!(rig.read(device, 4).to_le_bytes()[..4], MAC[..4]);
    assert_eq!(rig.read(device + 6, 2), 1);
    assert_eq!(rig.read(device + 8, 2), 2);
    assert_eq!(rig.read(device + 10, 2), 1500);
    assert_eq!(guest.get(18, 2), 5);
    assert_eq!(rig.read(guest.config, 4), 0x1041_1af4);
}

#[test]
fn a_frame_goes_out_as_it_is() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    for (queue, wire) in [(TX, 0), (TX2, 1)] {
        let sent = packet([1; 6], 300);
        nic.send(queue, &sent);
        let mut got = [0; 2000];
        let len = rig.wire[wire].recv(&mut got).unwrap();
        assert_eq!(got[..len], sent);
        nic.wait(queue, 1);
        assert_eq!(nic.queue(queue).used(0), (0, 0));
    }
    assert_eq!(stats(&rig)["pair-1"]["transmitted"]["bytes"], 300);
}

#[test]
fn a_tap_whose_helpers_refuse_is_served_all_the_same() {
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..2).map(|_| UnixDatagram::pair().unwrap()).unzip();
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let tap = Tap::sockets(theirs.into_iter().map(Into::into).collect());
    let link = Link::Tap(tap.helped(vec![null(), null()]));
    let rig = Rig::linked(None, link, ours);
    let mut nic = Nic::all(&rig);
    for round in 1..3 {
        assert_eq!(nic.command(&[4, 0, 2, 0]), 0);
        nic.send(TX2, &packet([1; 6], 300));
        let mut got = [0; 2000];
        assert_eq!(rig.wire[1].recv(&mut got).unwrap(), HEADER + 300);
        nic.wait(TX2, round);
        rig.wire[1].send(&packet(MAC, 100)).unwrap();
        nic.buffers(RX2, &[2048]);
        nic.wait(RX2, round);
        assert_eq!(stats(&rig)["vhost"], 0);
        rig.device("nic/net").pause().unwrap();
        rig.device("nic/net").resume();
    }
    assert_eq!(stats(&rig)["faults"], 0);
}

#[test]
fn a_frame_that_arrives_fills_one_buffer() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    nic.guest.use_msix();
    let sent = packet(MAC, 100);
    rig.wire[0].send(&sent).unwrap();
    nic.buffers(RX, &[2048, 2048]);
    nic.wait(RX, 1);
    assert_eq!(nic.queue(RX).used(0), (0, 112));
    let got = nic.bytes(RX, 0, 112);
    assert_eq!(got[10..12], [1, 0]);
    assert_eq!(got[12..], sent[12..]);
    until("the interrupt", || {
        rig.wiring.raised().contains(&(0xfee0_0000, 0x41))
    });
    // The second buffer is still there.
    rig.wire[0].send(&sent).unwrap();
    nic.wait(RX, 2);
    assert_eq!(nic.queue(RX).used(1), (1, 112));
}

#[test]
fn a_long_packet_fills_several_buffers_and_all_are_used_at_once() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    let sent = packet(MAC, 5000);
    nic.buffers(RX, &[1500, 2000, 1600]);
    rig.wire[0].send(&sent).unwrap();
    until("the packet", || nic.queue(RX).used_index() != 0);
    assert_eq!(nic.queue(RX).used_index(), 3);
    assert_eq!(nic.queue(RX).used(2), (2, 1512));
    assert_eq!(nic.bytes(RX, 0, 12)[10..], [3, 0]);
    assert_eq!(stats(&rig)["pair-0"]["received"]["packets"], 1);
}

#[test]
fn what_does_not_fit_into_the_buffers_waits_for_more() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    let sent = packet(MAC, 3000);
    nic.buffers(RX, &[1000, 1000]);
    rig.wire[0].send(&sent).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(nic.queue(RX).used_index(), 0);
    for buffer in 2..4 {
        let place = Nic::place(RX, buffer);
        nic.queue(RX).descriptor(buffer, place, 700, WRITE, 0);
        nic.queue(RX).offer(buffer);
    }
    nic.ring(RX);
    nic.wait(RX, 4);
    let mut got = Vec::new();
    for (index, len) in [(0, 1000), (1, 1000), (2, 700), (3, 312)] {
        assert_eq!(nic.queue(RX).used(index), (u32::from(index), len));
        got.extend(nic.bytes(RX, index, len as usize));
    }
    assert_eq!(got[10..12], [4, 0]);
    assert_eq!(got[12..], sent[12..]);
}

#[test]
fn what_can_never_fit_is_dropped() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    nic.buffers(RX, &[64; SIZE as usize]);
    rig.wire[0].send(&packet(MAC, 1000)).unwrap();
    rig.wire[0].send(&packet(MAC, 20)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(nic.queue(RX).used(0), (0, 32));
    assert_eq!(stats(&rig)["pair-0"]["received"]["drops"], 1);
}

#[test]
fn without_mergeable_buffers_a_packet_has_one_buffer() {
    let rig = Rig::new(None);
    let mut nic = Nic::start(&rig, ALL_FEATURES & !F_MRG_RXBUF, &[RX]);
    nic.buffers(RX, &[128, 2048]);
    rig.wire[0].send(&packet(MAC, 1000)).unwrap();
    rig.wire[0].send(&packet(MAC, 100)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(nic.queue(RX).used(0), (0, 112));
    assert_eq!(nic.bytes(RX, 0, 12)[10..], [1, 0]);
    assert_eq!(stats(&rig)["pair-0"]["received"]["drops"], 1);
}

#[test]
fn frames_for_others_are_filtered_once_the_driver_says_so() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    nic.buffers(RX, &[2048; 4]);
    rig.wire[0].send(&packet([2; 6], 50)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(nic.command(&[0, 0, 0]), 0);
    rig.wire[0].send(&packet([2; 6], 50)).unwrap();
    rig.wire[0].send(&packet([0xff; 6], 60)).unwrap();
    nic.wait(RX, 2);
    assert_eq!(nic.queue(RX).used(1), (1, 72));
    assert_eq!(stats(&rig)["filtered"], 1);
    assert_eq!(nic.command(&[0, 0, 1]), 0);
    rig.wire[0].send(&packet([2; 6], 80)).unwrap();
    nic.wait(RX, 3);
    assert_eq!(nic.queue(RX).used(2), (2, 92));
}

#[test]
fn one_pair_gets_everything_until_the_driver_uses_more() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    nic.buffers(RX, &[2048; 4]);
    nic.buffers(RX2, &[2048; 4]);
    rig.wire[1].send(&packet(MAC, 50)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(nic.command(&[4, 0, 2, 0]), 0);
    rig.wire[1].send(&packet(MAC, 50)).unwrap();
    nic.wait(RX2, 1);
    assert_eq!(nic.queue(RX).used_index(), 1);
}

#[test]
fn a_paused_interface_moves_nothing_and_loses_nothing() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    nic.buffers(RX, &[2048; 4]);
    rig.wire[0].send(&packet(MAC, 50)).unwrap();
    nic.wait(RX, 1);
    let device = rig.device("nic/net").clone();
    device.pause().unwrap();
    rig.wire[0].send(&packet(MAC, 60)).unwrap();
    nic.send(TX, &packet([1; 6], 70));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(nic.queue(RX).used_index(), 1);
    assert_eq!(nic.queue(TX).used_index(), 0);
    device.resume();
    nic.wait(RX, 2);
    assert_eq!(nic.queue(RX).used(1), (1, 72));
    nic.wait(TX, 1);
}

#[test]
fn a_new_driver_does_not_get_what_came_for_the_old_one() {
    let rig = Rig::new(None);
    let nic = Nic::all(&rig);
    nic.guest.put(20, 0, 1);
    until("the reset", || nic.guest.status() == 0);
    rig.wire[0].send(&packet(MAC, 50)).unwrap();
    let mut nic = Nic::all(&rig);
    rig.wire[0].send(&packet(MAC, 60)).unwrap();
    nic.buffers(RX, &[2048; 4]);
    nic.wait(RX, 1);
    assert_eq!(nic.queue(RX).used(0), (0, 72));
}

#[test]
fn a_pulled_cable_carries_nothing_and_the_driver_is_told() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    nic.guest.use_msix();
    nic.buffers(RX, &[2048; 4]);
    rig.change("nic/net", Change::Carrier(false)).unwrap();
    let status = nic.guest.bar + nic.guest.device + 6;
    assert_eq!(rig.read(status, 2), 0);
    assert_eq!(nic.guest.get(21, 1), 1, "another generation");
    assert!(rig.wiring.raised().contains(&(0xfee0_0000, 0x40)));
    assert_eq!(rig.read(nic.guest.bar + nic.guest.isr, 1) & 2, 2);
    rig.wire[0].send(&packet(MAC, 50)).unwrap();
    nic.send(TX, &packet([1; 6], 50));
    nic.wait(TX, 1);
    assert_eq!(stats(&rig)["pair-0"]["transmitted"]["drops"], 1);
    // To pull it once more is no news.
    rig.change("nic/net", Change::Carrier(false)).unwrap();
    assert_eq!(rig.wiring.raised(), []);

    rig.change("nic/net", Change::Carrier(true)).unwrap();
    assert_eq!(rig.read(status, 2), 1);
    assert!(rig.wiring.raised().contains(&(0xfee0_0000, 0x40)));
    rig.wire[0].send(&packet(MAC, 60)).unwrap();
    nic.wait(RX, 1);
    assert_eq!(
        nic.queue(RX).used(0),
        (0, 72),
        "what came meanwhile is lost"
    );
    nic.send(TX, &packet([1; 6], 70));
    let mut got = [0; 100];
    assert_eq!(rig.wire[0].recv(&mut got).unwrap(), 82);
    let size = rig.change("nic/net", Change::Size(512));
    assert_eq!(size.unwrap_err().argument, "device");
}

#[test]
fn what_breaks_the_rules_asks_for_a_reset_and_then_it_works_again() {
    let rig = Rig::new(None);
    // Queue, descriptor's length and flags.
    for (queue, len, flags) in [
        (RX, 2048, 0),
        (RX, 11, WRITE),
        (RX, 0, WRITE),
        (TX, 11, 0),
        (TX, 100, WRITE),
        (CONTROL, 8, 0),
        (CONTROL, 8, WRITE),
    ] {
        let mut nic = Nic::all(&rig);
        nic.queue(queue)
            .descriptor(0, Nic::place(queue, 0), len, flags, 0);
        nic.queue(queue).offer(0);
        rig.wire[0].send(&packet(MAC, 50)).unwrap();
        nic.ring(queue);
        if queue == RX {
            // A buffer is looked at when there is something for it.
            rig.wire[0].send(&packet(MAC, 50)).unwrap();
        }
        until("it needs a reset", || nic.guest.status() & 0x40 != 0);
        let mut nic = Nic::all(&rig);
        nic.send(TX, &packet([1; 6], 50));
        let mut got = [0; 100];
        assert_eq!(rig.wire[0].recv(&mut got).unwrap(), 62);
    }
    assert_eq!(stats(&rig)["faults"], 7);
}

#[test]
fn a_frame_that_the_tap_does_not_take_is_dropped() {
    let rig = Rig::new(None);
    let mut nic = Nic::all(&rig);
    let far = 0x9_0000;
    nic.queue(TX).descriptor(0, far, 0x1_1000, 0, 0);
    nic.queue(TX).offer(0);
    nic.ring(TX);
    nic.wait(TX, 1);
    assert_eq!(stats(&rig)["pair-0"]["transmitted"]["drops"], 1);
    assert_eq!(nic.guest.status(), 15);
}
