// SPDX-License-Identifier: Apache-2.0
//! The whole device against a driver of ours.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::{SOCKETS_MAX, WAITING_MAX};
use crate::error::{Kind, Result};
use crate::io::Change;
use crate::pci::Place;
use crate::state::Stateful;
use crate::virtio::queue::testing::{rings, Driver};
use crate::virtio::rig::{until, until_asleep, Guest, Rig, ALL_FEATURES, CID};
use crate::virtio::vsock::{
    Operation, Packet, CLOSED, EVENTS, FROM_GUEST, HEADER, HOST, NO_RECEIVE, NO_SEND, STREAM,
    TO_GUEST,
};

const WRITE: u16 = 2;
const PLACES: u64 = 0x4_0000;
/// What the driver says it has room for.
const ROOM: u32 = 4096;

struct Sockets<'a> {
    guest: Guest<'a>,
    queues: Vec<Driver>,
    /// Packets heard.
    heard: u16,
    said: u16,
}

impl<'a> Sockets<'a> {
    fn start(rig: &'a Rig) -> Sockets<'a> {
        let mut guest = Guest::probe(rig, Place::VSOCK);
        let list: Vec<_> = (0..3u16)
            .map(|index| (index, rings(0x1_0000 + 0x3000 * u64::from(index), 8)))
            .collect();
        guest.start_queues(ALL_FEATURES, &list);
        Sockets {
            guest,
            queues: list
                .into_iter()
                .map(|(_, rings)| Driver::new(rig.memory.clone(), rings))
                .collect(),
            heard: 0,
            said: 0,
        }
    }

    fn place(index: u16) -> u64 {
        PLACES + 0x2_0000 * u64::from(index)
    }

    fn give(&mut self, index: u16, len: u32, flags: u16) {
        let queue = &mut self.queues[usize::from(index)];
        queue.descriptor(0, Self::place(index), len, flags, 0);
        queue.offer(0);
        let bell = self.guest.doorbell() + 4 * u64::from(index);
        assert!(self.guest.rig.wiring.ring(bell));
    }

    /// A packet from the guest, taken by the device.
    fn say(&mut self, packet: Packet, data: &[u8]) {
        self.say_later(packet, data);
        let said = self.said;
        until("it is taken", || self.queues[1].used_index() == said);
    }

    fn say_later(&mut self, packet: Packet, data: &[u8]) {
        let mut bytes = packet.bytes();
        bytes.extend(data);
        let place = GuestAddress(Self::place(FROM_GUEST));
        self.guest.rig.memory.write_slice(&bytes, place).unwrap();
        self.give(FROM_GUEST, bytes.len() as u32, 0);
        self.said = self.said.wrapping_add(1);
    }

    /// The next packet for the guest.
    fn hear(&mut self) -> (Packet, Vec<u8>) {
        self.give(TO_GUEST, 0x2000, WRITE);
        self.listen()
    }

    fn listen(&mut self) -> (Packet, Vec<u8>) {
        self.heard = self.heard.wrapping_add(1);
        let heard = self.heard;
        until("a packet comes", || self.queues[0].used_index() == heard);
        let len = self.queues[0].used((heard - 1) % 8).1 as usize;
        let mut bytes = vec![0; len];
        let place = GuestAddress(Self::place(TO_GUEST));
        self.guest.rig.memory.read_slice(&mut bytes, place).unwrap();
        let packet = Packet::parse(bytes[..HEADER].try_into().unwrap());
        assert_eq!(packet.len as usize, len - HEADER);
        assert_eq!(packet.src_cid + packet.dst_cid, HOST + u64::from(CID));
        (packet, bytes.split_off(HEADER))
    }

    fn hear_only(&mut self, operation: Operation) -> Packet {
        let (packet, data) = self.hear();
        assert_eq!(Operation::of(packet.operation), Some(operation));
        assert_eq!(data, b"");
        packet
    }

    /// The host connects to a port of the guest's, which says yes.
    fn connected(&mut self, port: u32) -> (UnixStream, Ports) {
        let (socket, told) = connect(self.guest.rig, port);
        let request = self.hear_only(Operation::Request);
        assert_eq!((request.dst_port, request.src_cid), (port, HOST));
        let ports = Ports(port, request.src_port);
        self.say(ports.packet(Operation::Response), b"");
        assert_eq!(wait(&told).unwrap(), "");
        (socket, ports)
    }
}

/// The guest's and the host's.
#[derive(Clone, Copy)]
struct Ports(u32, u32);

impl Ports {
    fn packet(self, operation: Operation) -> Packet {
        Packet {
            src_cid: u64::from(CID),
            dst_cid: HOST,
            src_port: self.0,
            dst_port: self.1,
            kind: STREAM,
            operation: operation as u16,
            room: ROOM,
            ..Packet::default()
        }
    }

    fn data(self, bytes: &[u8]) -> Packet {
        Packet {
            len: bytes.len() as u32,
            ..self.packet(Operation::Data)
        }
    }

    fn ends(self, flags: u32) -> Packet {
        Packet {
            flags,
            ..self.packet(Operation::Shutdown)
        }
    }
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    (ours, theirs)
}

fn connect(rig: &Rig, port: u32) -> (UnixStream, Receiver<Result<String>>) {
    let (ours, theirs) = pair();
    let told = rig.begin_change("vsock", Change::Connect(port, theirs.into()));
    (ours, told)
}

fn accept(rig: &Rig, port: u32) -> (UnixStream, Receiver<Result<String>>) {
    let (ours, theirs) = pair();
    let told = rig.begin_change("vsock", Change::Accept(port, theirs.into()));
    (ours, told)
}

fn wait(told: &Receiver<Result<String>>) -> Result<String> {
    told.recv_timeout(Duration::from_secs(10)).unwrap()
}

fn read(mut socket: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    socket.read_exact(&mut bytes).unwrap();
    bytes
}

fn is_at_end(mut socket: &UnixStream) -> bool {
    match socket.read(&mut [0; 16]) {
        Ok(len) => len == 0,
        // It had not read what we sent.
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn bytes_go_both_ways_once_the_guest_has_said_yes() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1234);
    sockets.say(ports.data(b"hello"), b"hello");
    assert_eq!(read(&socket, 5), b"hello");
    (&socket).write_all(b"and back").unwrap();
    let (packet, data) = sockets.hear();
    assert_eq!(Operation::of(packet.operation), Some(Operation::Data));
    assert_eq!((packet.dst_port, packet.taken), (1234, 5));
    assert_eq!(data, b"and back");
    let stats = rig.device("vsock").stats();
    assert_eq!(
        (&stats["connected"], &stats["from-guest"]),
        (&1.into(), &5.into())
    );
    assert_eq!(stats["to-guest"], 8);
}

#[test]
fn a_guest_that_says_no_is_an_error_to_the_host() {
    let rig = Rig::new(None);
    let (_, told) = connect(&rig, 9);
    assert_eq!(
        wait(&told).unwrap_err().kind,
        Kind::InvalidState,
        "no driver"
    );
    let mut sockets = Sockets::start(&rig);
    let (socket, told) = connect(&rig, 9);
    let request = sockets.hear_only(Operation::Request);
    let ports = Ports(9, request.src_port);
    sockets.say(ports.packet(Operation::Reset), b"");
    let error = wait(&told).unwrap_err();
    assert_eq!((error.kind, &*error.argument), (Kind::Unavailable, "port"));
    assert!(is_at_end(&socket));
    // Another port of ours each time.
    let (_socket, _told) = connect(&rig, 9);
    assert_ne!(
        sockets.hear_only(Operation::Request).src_port,
        request.src_port
    );
}

#[test]
fn a_host_that_waits_no_more_takes_its_request_back() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, told) = connect(&rig, 9);
    let request = sockets.hear_only(Operation::Request);
    drop(socket);
    sockets.hear_only(Operation::Reset);
    assert!(wait(&told).is_err());
    sockets.say(Ports(9, request.src_port).packet(Operation::Response), b"");
    sockets.hear_only(Operation::Reset);
}

#[test]
fn the_guest_connects_to_a_port_where_the_host_waits_once_for_each_socket() {
    let rig = Rig::new(None);
    let (socket, told) = accept(&rig, 80);
    let mut sockets = Sockets::start(&rig);
    let ports = Ports(5000, 80);
    sockets.say(ports.packet(Operation::Request), b"");
    assert_eq!(wait(&told).unwrap(), "{\"port\":5000}");
    sockets.hear_only(Operation::Response);
    sockets.say(ports.data(b"GET"), b"GET");
    assert_eq!(read(&socket, 3), b"GET");
    // No socket is left.
    sockets.say(Ports(5001, 80).packet(Operation::Request), b"");
    assert_eq!(sockets.hear_only(Operation::Reset).dst_port, 5001);
    // One that was taken back is none.
    let (socket, told) = accept(&rig, 80);
    drop(socket);
    assert_eq!(wait(&told).unwrap_err().kind, Kind::Cancelled);
    sockets.say(Ports(5002, 80).packet(Operation::Request), b"");
    sockets.hear_only(Operation::Reset);
}

#[test]
fn nobody_sends_more_than_the_other_has_room_for() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    // To the guest: as much as it said, then a question.
    (&socket).write_all(&[7; 5000]).unwrap();
    let (packet, data) = sockets.hear();
    assert_eq!((packet.len, data.len()), (ROOM, 4096));
    sockets.hear_only(Operation::CreditRequest);
    let mut more = ports.packet(Operation::CreditUpdate);
    more.taken = 4000;
    sockets.say(more, b"");
    let (_, data) = sockets.hear();
    assert_eq!(data.len(), 5000 - 4096);
    // From it: what nobody reads is kept up to what we said, in the socket and beside it.
    socket.set_nonblocking(true).unwrap();
    let chunk = [8; 0x4000];
    let mut sent = 0u32;
    let mut taken = 0u32;
    while sent.wrapping_sub(taken) + 0x4000 <= 64 << 10 {
        sockets.say(ports.data(&chunk), &chunk);
        sent += 0x4000;
        // As a driver would find out: it asks.
        sockets.say(ports.packet(Operation::CreditRequest), b"");
        loop {
            let update = sockets.hear_only(Operation::CreditUpdate);
            taken = update.taken;
            if sockets.queues[0].used_index() == sockets.heard {
                break;
            }
        }
        assert!(sent < 4 << 20, "the socket is never full");
    }
    assert_eq!(sent - taken, 64 << 10, "the whole room is used");
    let mut got = 0;
    let mut part = vec![0; 1 << 20];
    until("all has come", || {
        match (&socket).read(&mut part) {
            Ok(len) => got += len,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        got == sent as usize
    });
    // It is told that there is room again without asking.
    let update = sockets.hear_only(Operation::CreditUpdate);
    assert!(update.taken > taken);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_the_connection() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    let (other, others) = sockets.connected(2);
    let data = vec![1; (64 << 10) + 1];
    sockets.say(ports.data(&data), &data);
    assert_eq!(sockets.hear_only(Operation::Reset).dst_port, 1);
    assert!(is_at_end(&socket));
    sockets.say(others.data(b"still"), b"still");
    assert_eq!(read(&other, 5), b"still");
}

#[test]
fn each_half_is_closed_for_itself() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    // The host sends no more, and still receives.
    (&socket).write_all(b"last").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(sockets.hear().1, b"last");
    assert_eq!(sockets.hear_only(Operation::Shutdown).flags, NO_SEND);
    sockets.say(ports.data(b"ok"), b"ok");
    assert_eq!(read(&socket, 2), b"ok");
    // The guest sends no more, either.
    sockets.say(ports.ends(NO_SEND), b"");
    assert!(is_at_end(&socket));
    sockets.say(ports.ends(CLOSED), b"");
    until("it is answered", || {
        sockets.hear().0.operation == Operation::Reset as u16
    });
}

#[test]
fn a_guest_that_ends_is_answered_with_a_reset_once_all_is_with_the_host() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    sockets.say(ports.data(b"bye"), b"bye");
    sockets.say(ports.ends(CLOSED), b"");
    sockets.hear_only(Operation::Reset);
    assert_eq!(read(&socket, 3), b"bye");
    assert!(is_at_end(&socket));
}

#[test]
fn what_a_guest_sent_before_it_ended_and_was_gone_still_reaches_the_host() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    let chunk = [3; 0x4000];
    let mut sent = 0;
    // Until the socket is full and something is kept: nothing is taken out of the room any more.
    let mut taken = u32::MAX;
    loop {
        sockets.say(ports.data(&chunk), &chunk);
        sent += chunk.len();
        sockets.say(ports.packet(Operation::CreditRequest), b"");
        let now = sockets.hear_only(Operation::CreditUpdate).taken;
        if now == taken {
            break;
        }
        taken = now;
    }
    sockets.say(ports.ends(CLOSED), b"");
    sockets.say(ports.packet(Operation::Reset), b"");
    // Its port may be used again meanwhile.
    let (other, told) = accept(&rig, ports.1);
    sockets.say(ports.packet(Operation::Request), b"");
    wait(&told).unwrap();
    assert_eq!(read(&socket, sent), vec![3; sent]);
    assert!(is_at_end(&socket));
    drop(other);
}

#[test]
fn a_host_that_closes_is_told_of_and_the_guest_resets() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    drop(socket);
    assert_eq!(sockets.hear_only(Operation::Shutdown).flags, CLOSED);
    // What it sends meanwhile is nobody's.
    sockets.say(ports.data(b"lost"), b"lost");
    sockets.say(ports.packet(Operation::Reset), b"");
    sockets.say(ports.data(b"late"), b"late");
    let mut operation = sockets.hear().0.operation;
    while operation != Operation::Reset as u16 {
        operation = sockets.hear().0.operation;
    }
}

#[test]
fn a_guest_that_receives_no_more_is_an_end_to_the_hosts_writing() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    sockets.say(ports.ends(NO_RECEIVE), b"");
    until("writing fails", || (&socket).write_all(b"x").is_err());
    sockets.say(ports.data(b"on"), b"on");
    assert_eq!(read(&socket, 2), b"on");
}

#[test]
fn what_makes_no_sense_is_answered_with_a_reset() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let stranger = Ports(77, 78);
    let alone = [
        Operation::Request,
        Operation::Response,
        Operation::Shutdown,
        Operation::Data,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ];
    for operation in alone {
        sockets.say(stranger.packet(operation), b"");
        let answer = sockets.hear_only(Operation::Reset);
        assert_eq!(
            (answer.src_port, answer.dst_port),
            (78, 77),
            "{operation:?}"
        );
    }
    let odd = [
        Packet {
            kind: 9,
            ..stranger.packet(Operation::Request)
        },
        Packet {
            dst_cid: 1,
            ..stranger.packet(Operation::Request)
        },
        Packet {
            operation: 99,
            ..stranger.packet(Operation::Request)
        },
    ];
    for packet in odd {
        sockets.say(packet, b"");
        sockets.give(TO_GUEST, 0x100, WRITE);
        sockets.heard += 1;
        let heard = sockets.heard;
        until("it is answered", || sockets.queues[0].used_index() == heard);
        let mut bytes = [0; HEADER];
        let place = GuestAddress(Sockets::place(TO_GUEST));
        rig.memory.read_slice(&mut bytes, place).unwrap();
        assert_eq!(Packet::parse(&bytes), packet.refusal());
    }
    // A reset is not answered with another, and what does not come from the guest not at all.
    sockets.say(stranger.packet(Operation::Reset), b"");
    let mut foreign = stranger.packet(Operation::Request);
    foreign.src_cid = HOST;
    sockets.say(foreign, b"");
    sockets.say(Ports(1, 2).packet(Operation::Data), b"");
    assert_eq!(sockets.hear_only(Operation::Reset).dst_port, 1);
    assert_eq!(rig.device("vsock").stats()["strange"], 1);
    // Of a connection, too: a second request, a second yes, no operation, bytes after the end.
    for operation in [Operation::Request, Operation::Response] {
        let (socket, ports) = sockets.connected(5);
        sockets.say(ports.packet(operation), b"");
        sockets.hear_only(Operation::Reset);
        assert!(is_at_end(&socket));
    }
    let (socket, ports) = sockets.connected(5);
    sockets.say(
        Packet {
            operation: 0,
            ..ports.packet(Operation::Data)
        },
        b"",
    );
    sockets.hear_only(Operation::Reset);
    assert!(is_at_end(&socket));
    let (_socket, ports) = sockets.connected(5);
    sockets.say(ports.ends(NO_SEND), b"");
    sockets.say(ports.data(b"x"), b"x");
    sockets.hear_only(Operation::Reset);
    // Before the yes.
    let (_socket, told) = connect(&rig, 6);
    let own = sockets.hear_only(Operation::Request).src_port;
    sockets.say(Ports(6, own).data(b"early"), b"early");
    sockets.hear_only(Operation::Reset);
    assert!(wait(&told).is_err());
}

#[test]
fn what_breaks_the_rings_rules_asks_for_a_reset_and_then_it_works_again() {
    let rig = Rig::new(None);
    // Queue; length and flags.
    for (index, len, flags) in [
        (FROM_GUEST, 43, 0),
        (FROM_GUEST, 64, WRITE),
        (TO_GUEST, 44, WRITE),
        (TO_GUEST, 64, 0),
    ] {
        let mut sockets = Sockets::start(&rig);
        let (socket, ports) = sockets.connected(1);
        (&socket).write_all(b"x").unwrap();
        let bytes = ports.packet(Operation::CreditUpdate).bytes();
        let place = GuestAddress(Sockets::place(FROM_GUEST));
        rig.memory.write_slice(&bytes, place).unwrap();
        sockets.give(index, len, flags);
        until("it needs a reset", || sockets.guest.status() & 0x40 != 0);
        assert!(is_at_end(&socket), "its connections are gone");
        let (_, told) = connect(&rig, 1);
        assert_eq!(wait(&told).unwrap_err().kind, Kind::InvalidState);
    }
    // Fewer bytes than the header says.
    let mut sockets = Sockets::start(&rig);
    let (_socket, ports) = sockets.connected(1);
    sockets.say_later(ports.data(b"four"), b"thr");
    until("it needs a reset", || sockets.guest.status() & 0x40 != 0);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    sockets.say(ports.data(b"works"), b"works");
    assert_eq!(read(&socket, 5), b"works");
    assert_eq!(rig.device("vsock").stats()["faults"], 5);
}

#[test]
fn a_driver_cannot_make_us_hold_more_and_more() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let stranger = Ports(77, 78);
    // Each is answered, and there is no room for the answers.
    for _ in 0..WAITING_MAX {
        sockets.say(stranger.packet(Operation::Data), b"");
    }
    let before = sockets.queues[1].used_index();
    sockets.say_later(stranger.packet(Operation::Data), b"");
    // The thread has looked at its doorbell when it has paused.
    rig.device("vsock").pause().unwrap();
    assert_eq!(sockets.queues[1].used_index(), before);
    rig.device("vsock").resume();
    sockets.hear_only(Operation::Reset);
    until("it is taken", || {
        sockets.queues[1].used_index() == before + 1
    });
}

#[test]
fn there_is_an_end_to_the_sockets() {
    let rig = Rig::new(None);
    let waiting: Vec<_> = (0..SOCKETS_MAX).map(|_| accept(&rig, 80)).collect();
    let (_socket, told) = accept(&rig, 81);
    let error = wait(&told).unwrap_err();
    assert_eq!((error.kind, &*error.argument), (Kind::Unavailable, "port"));
    for (socket, told) in waiting {
        drop(socket);
        assert_eq!(wait(&told).unwrap_err().kind, Kind::Cancelled);
    }
    let (_socket, told) = accept(&rig, 81);
    let mut sockets = Sockets::start(&rig);
    sockets.say(Ports(1, 81).packet(Operation::Request), b"");
    wait(&told).unwrap();
}

#[test]
fn a_reset_of_the_driver_ends_connections_and_not_what_waits() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, _) = sockets.connected(1);
    let (asking, told) = connect(&rig, 2);
    sockets.hear_only(Operation::Request);
    let (_waiting, accepted) = accept(&rig, 80);
    let mut sockets = Sockets::start(&rig);
    assert!(is_at_end(&socket));
    assert_eq!(wait(&told).unwrap_err().kind, Kind::Disconnected);
    drop(asking);
    sockets.say(Ports(3, 80).packet(Operation::Request), b"");
    wait(&accepted).unwrap();
    sockets.hear_only(Operation::Response);
}

#[test]
fn a_machine_that_goes_on_elsewhere_tells_its_driver_first_of_all() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    for device in &rig.devices.list {
        device.pause().unwrap();
    }
    let saved = rig.devices.root.save().unwrap();
    // Where it was saved it goes on as if nothing were.
    for device in &rig.devices.list {
        device.resume();
    }
    sockets.say(ports.data(b"still"), b"still");
    assert_eq!(read(&socket, 5), b"still");

    let other = Rig::new(None);
    for device in &other.devices.list {
        device.pause().unwrap();
    }
    let mut memory = vec![0; 0x2_0000];
    rig.memory
        .read_slice(&mut memory, GuestAddress(0x1_0000))
        .unwrap();
    other
        .memory
        .write_slice(&memory, GuestAddress(0x1_0000))
        .unwrap();
    other.devices.root.restore(&saved).unwrap();
    for device in &other.devices.list {
        device.resume();
    }
    let mut events = Driver::new(other.memory.clone(), rings(0x1_6000, 8));
    let place = GuestAddress(Sockets::place(EVENTS));
    other.memory.write_slice(&[9; 4], place).unwrap();
    events.descriptor(0, Sockets::place(EVENTS), 4, WRITE, 0);
    events.offer(0);
    let bell = Guest::probe(&other, Place::VSOCK).doorbell() + 4 * u64::from(EVENTS);
    assert!(other.wiring.ring(bell));
    until("it is told", || events.used_index() == 1);
    assert_eq!(events.used(0).1, 4);
    let mut event = [1; 4];
    other.memory.read_slice(&mut event, place).unwrap();
    assert_eq!(event, [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
}

#[test]
fn its_thread_sleeps_when_there_is_nothing_to_do() {
    let rig = Rig::new(None);
    let mut sockets = Sockets::start(&rig);
    let (socket, ports) = sockets.connected(1);
    sockets.say(ports.data(b"hello"), b"hello");
    sockets.give(TO_GUEST, 0x2000, WRITE);
    assert_eq!(read(&socket, 5), b"hello");
    until_asleep("vsock");
    // Nor does what the guest gives no room for keep it busy.
    (&socket).write_all(&[1; 10_000]).unwrap();
    sockets.listen();
    until_asleep("vsock");
}
