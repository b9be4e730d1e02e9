// SPDX-License-Identifier: Apache-2.0
//! The whole host adapter against a driver of ours: target 0 is a disk, 1 a CD-ROM drive, 2 one without a medium.

use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use crate::error::Kind;
use crate::io::Change;
use crate::migrate::changes::Blocks;
use crate::pci::Place;
use crate::virtio::queue::testing::{rings, Driver};
use crate::virtio::rig::{image, nameless_file, until, Guest, Rig, ALL_FEATURES, DISK_BYTES};

const REQUEST: u64 = 0x8000;
const ANSWER: u64 = 0x8200;
const DATA: u64 = 0x9000;
const CONTROL: u16 = 0;
const EVENTS: u16 = 1;
const COMMANDS: u16 = 2;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TEST_UNIT_READY: [u8; 6] = [0; 6];

/// What came of a command: response of the transport, status, sense key and code, bytes left, bytes used.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    response: u8,
    status: u8,
    sense: (u8, u8),
    left: u32,
    used: u32,
}

const GOOD: u8 = 0;
const CHECK: u8 = 2;

struct Scsi<'a> {
    guest: Guest<'a>,
    queues: Vec<Driver>,
}

impl<'a> Scsi<'a> {
    fn start(rig: &'a Rig) -> Scsi<'a> {
        let mut guest = Guest::probe(rig, Place::SCSI);
        let list: Vec<_> = (0..3u16)
            .map(|index| (index, rings(0x1_0000 + 0x3000 * u64::from(index), 8)))
            .collect();
        guest.start_queues(ALL_FEATURES, &list);
        let queues = list.into_iter();
        Scsi {
            guest,
            queues: queues
                .map(|(_, rings)| Driver::new(rig.memory.clone(), rings))
                .collect(),
        }
    }

    fn queue(&mut self, index: u16) -> &mut Driver {
        &mut self.queues[usize::from(index)]
    }

    fn ring(&self, index: u16) {
        let bell = self.guest.doorbell() + 4 * u64::from(index);
        assert!(self.guest.rig.wiring.ring(bell));
    }

    /// Sends a command to a target, with so many bytes at [`DATA`] to read (`out`) or to write.
    fn command(&mut self, target: u8, cdb: &[u8], out: u32, room: u32) -> Answer {
        let memory = self.guest.rig.memory.clone();
        let mut header = vec![1, target, 0x40, 0, 0, 0, 0, 0];
        header.resize(19, 0);
        header.extend(cdb);
        header.resize(51, 0);
        memory.write_slice(&header, GuestAddress(REQUEST)).unwrap();
        memory
            .write_slice(&[0xee; 108], GuestAddress(ANSWER))
            .unwrap();
        let before = self.queue(COMMANDS).used_index();
        let queue = self.queue(COMMANDS);
        // Cut in the middle of the command, and of the answer.
        queue.descriptor(0, REQUEST, 30, NEXT, 1);
        queue.descriptor(1, REQUEST + 30, 21, NEXT, if out > 0 { 2 } else { 3 });
        queue.descriptor(2, DATA, out, NEXT, 3);
        queue.descriptor(3, ANSWER, 50, NEXT | WRITE, 4);
        let more = if room > 0 { NEXT } else { 0 };
        queue.descriptor(4, ANSWER + 50, 58, more | WRITE, 5);
        queue.descriptor(5, DATA, room, WRITE, 0);
        queue.offer(0);
        self.ring(COMMANDS);
        until("the answer", || {
            self.queue(COMMANDS).used_index() == before.wrapping_add(1)
        });
        let mut bytes = [0; 108];
        memory.read_slice(&mut bytes, GuestAddress(ANSWER)).unwrap();
        let used = self.queue(COMMANDS).used(before % 8).1;
        Answer {
            response: bytes[11],
            status: bytes[10],
            sense: (bytes[12 + 2], bytes[12 + 12]),
            left: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            used,
        }
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let place = GuestAddress(DATA);
        self.guest.rig.memory.read_slice(&mut data, place).unwrap();
        data
    }

    /// Task management: its kind, for a target; the response.
    fn manage(&mut self, kind: u32, target: u8) -> u8 {
        let memory = self.guest.rig.memory.clone();
        let mut request = vec![0, 0, 0, 0];
        request.extend(kind.to_le_bytes());
        request.extend([1, target, 0x40, 0, 0, 0, 0, 0]);
        request.resize(24, 0);
        memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        let before = self.queue(CONTROL).used_index();
        let queue = self.queue(CONTROL);
        queue.descriptor(0, REQUEST, 24, NEXT, 1);
        queue.descriptor(1, ANSWER, 1, WRITE, 0);
        queue.offer(0);
        self.ring(CONTROL);
        until("the function", || {
            self.queue(CONTROL).used_index() == before.wrapping_add(1)
        });
        memory.read_obj(GuestAddress(ANSWER)).unwrap()
    }
}

fn medium(bytes: u64) -> Change {
    let file = nameless_file();
    file.set_len(bytes).unwrap();
    file.write_all_at(b"another", 0).unwrap();
    Change::Medium {
        medium: Some(image(file, true)),
        force: false,
    }
}

fn taken_out(force: bool) -> Change {
    Change::Medium {
        medium: None,
        force,
    }
}

#[test]
fn a_disk_is_written_and_read() {
    for ring in [None, vmbus_qcow2::Ring::new(64, 8).ok()] {
        let rig = Rig::new(ring);
        let mut scsi = Scsi::start(&rig);
        let content = rig.device("disk/system").content().unwrap();
        content.changed.watch(DISK_BYTES);
        let write = [0x2a, 0, 0, 0, 0, 5, 0, 0, 2, 0];
        rig.memory
            .write_slice(&[0x5a; 1024], GuestAddress(DATA))
            .unwrap();
        let done = scsi.command(0, &write, 1024, 0);
        assert_eq!((done.status, done.left, done.used), (GOOD, 0, 108));
        // A migration hears of it.
        let changed = content.changed.take(DISK_BYTES);
        assert_eq!(changed.run(0, DISK_BYTES), Some((0, Blocks::UNIT)));
        rig.memory
            .write_slice(&[0; 2048], GuestAddress(DATA))
            .unwrap();
        let read = [0x28, 0, 0, 0, 0, 6, 0, 0, 2, 0];
        let done = scsi.command(0, &read, 0, 2048);
        assert_eq!(
            (done.status, done.left, done.used),
            (GOOD, 1024, 108 + 1024)
        );
        let data = scsi.data(2048);
        assert_eq!(content.changed.take(DISK_BYTES).bytes(), 0);
        assert_eq!(data[..512], [0x5a; 512]);
        assert_eq!(data[512..], [0; 1536]);
        let flush = scsi.command(0, &[0x35], 0, 0);
        assert_eq!(flush.status, GOOD);
        let stats = rig.device("disk/system").stats();
        assert_eq!((&stats["writes"], &stats["reads"]), (&1.into(), &1.into()));
    }
}

#[test]
fn what_is_not_there_or_does_not_fit_is_told_by_the_transport() {
    let rig = Rig::new(None);
    let mut scsi = Scsi::start(&rig);
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0];
    assert_eq!(scsi.command(3, &TEST_UNIT_READY, 0, 0).response, 3);
    assert_eq!(scsi.command(0, &read, 0, 1023).response, 1);
    assert_eq!(scsi.command(0, &read, 16, 1024).response, 9);
    let none = scsi.command(2, &TEST_UNIT_READY, 0, 0);
    assert_eq!((none.status, none.sense), (CHECK, (2, 0x3a)));
    assert_eq!(scsi.command(0, &[0xff], 0, 0).sense, (5, 0x20));
    assert_eq!(scsi.guest.status(), 15);
}

#[test]
fn a_medium_is_put_in_and_taken_out() {
    let rig = Rig::new(None);
    let mut scsi = Scsi::start(&rig);
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    rig.change("disk/empty", medium(1 << 16)).unwrap();
    assert_eq!(scsi.command(2, &TEST_UNIT_READY, 0, 0).sense, (6, 0x28));
    assert_eq!(scsi.command(2, &read, 0, 2048).status, GOOD);
    assert_eq!(&scsi.data(8), b"another\0");

    let lock = |on| [0x1e, 0, 0, 0, on, 0];
    scsi.command(2, &lock(1), 0, 0);
    let refused = rig.change("disk/empty", taken_out(false)).unwrap_err();
    assert_eq!(refused.kind, Kind::InUse);
    assert_eq!(scsi.command(2, &read, 0, 2048).status, GOOD, "it stays");
    scsi.command(2, &lock(0), 0, 0);
    rig.change("disk/empty", taken_out(false)).unwrap();
    assert_eq!(scsi.command(2, &TEST_UNIT_READY, 0, 0).sense, (6, 0x28));
    assert_eq!(scsi.command(2, &read, 0, 2048).sense, (2, 0x3a));

    scsi.command(1, &lock(1), 0, 0);
    rig.change("disk/cd", taken_out(true)).unwrap();
    assert_eq!(scsi.command(1, &TEST_UNIT_READY, 0, 0).sense, (6, 0x28));
    for id in ["disk/system", "disk/root", "nic/net"] {
        let refused = rig.change(id, taken_out(true)).unwrap_err();
        assert_eq!(refused.kind, Kind::InvalidArgument, "{id}");
    }
}

#[test]
fn a_disk_that_grows_tells_by_an_event() {
    let rig = Rig::new(None);
    let mut scsi = Scsi::start(&rig);
    // The first finds no room; the driver hears that it missed something.
    rig.change("disk/system", Change::Size(2 * DISK_BYTES))
        .unwrap();
    let queue = scsi.queue(EVENTS);
    queue.descriptor(0, DATA, 16, WRITE, 0);
    queue.offer(0);
    scsi.ring(EVENTS);
    until("the event", || scsi.queue(EVENTS).used_index() == 1);
    assert_eq!(scsi.data(4), [0, 0, 0, 0x80]);
    scsi.queue(EVENTS).offer(0);
    scsi.ring(EVENTS);
    rig.change("disk/system", Change::Size(3 * DISK_BYTES))
        .unwrap();
    until("the event", || scsi.queue(EVENTS).used_index() == 2);
    assert_eq!(
        scsi.data(16),
        [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x2a, 9, 0, 0]
    );
    assert_eq!(scsi.command(0, &TEST_UNIT_READY, 0, 0).sense, (6, 0x2a));
    assert_eq!(scsi.command(0, &[0x25], 0, 8).status, GOOD);
    assert_eq!(
        scsi.data(4),
        ((3 * DISK_BYTES / 512 - 1) as u32).to_be_bytes()
    );
    let refused = rig.change("disk/cd", Change::Size(4 * DISK_BYTES));
    assert_eq!(refused.unwrap_err().kind, Kind::InvalidArgument);
}

#[test]
fn task_management_is_answered_and_a_reset_unit_says_so() {
    let rig = Rig::new(None);
    let mut scsi = Scsi::start(&rig);
    assert_eq!(scsi.manage(0, 0), 0, "nothing to abort");
    assert_eq!(scsi.command(0, &TEST_UNIT_READY, 0, 0).status, GOOD);
    assert_eq!(scsi.manage(5, 0), 0);
    assert_eq!(scsi.command(0, &TEST_UNIT_READY, 0, 0).sense, (6, 0x29));
    assert_eq!(scsi.manage(5, 9), 3, "no such target");
    assert_eq!(scsi.manage(99, 0), 9, "no such function");
    // One that waits when the driver goes is forgotten with it.
    rig.device("scsi").pause().unwrap();
    let queue = scsi.queue(CONTROL);
    queue.offer(0);
    scsi.ring(CONTROL);
    scsi.guest.put(20, 0, 1);
    until("the reset", || scsi.guest.status() == 0);
    rig.device("scsi").resume();
    let mut scsi = Scsi::start(&rig);
    assert_eq!(scsi.command(0, &TEST_UNIT_READY, 0, 0).status, GOOD);
}

#[test]
fn what_breaks_the_rules_asks_for_a_reset_and_then_it_works_again() {
    let rig = Rig::new(None);
    // Queue; length and flags of the first and of the second descriptor.
    for (queue, first, second) in [
        (COMMANDS, (50, NEXT), (108, WRITE)),
        (COMMANDS, (51, NEXT), (107, WRITE)),
        (COMMANDS, (51, 0), (0, 0)),
        (CONTROL, (3, NEXT), (1, WRITE)),
        (CONTROL, (24, 0), (0, 0)),
    ] {
        let mut scsi = Scsi::start(&rig);
        let driver = scsi.queue(queue);
        driver.descriptor(0, REQUEST, first.0, first.1, 1);
        driver.descriptor(1, ANSWER, second.0, second.1, 0);
        driver.offer(0);
        scsi.ring(queue);
        until("it needs a reset", || scsi.guest.status() & 0x40 != 0);
        let mut scsi = Scsi::start(&rig);
        assert_eq!(scsi.command(0, &TEST_UNIT_READY, 0, 0).status, GOOD);
    }
}
