// SPDX-License-Identifier: Apache-2.0
//! What devices write to guest memory is marked while a migration runs ([`crate::migrate::marks`]): each kind of device is
//! given a chain, and after it has done with it every page that differs has a mark. The driver writes before the marks are
//! taken away, so all that are left are the device's.

use std::io::Write;

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::Ring;

use super::queue::testing::{rings, Driver, MEMORY};
use super::rig::{until, Guest, Rig, ALL_FEATURES, CID};
use super::vsock::Packet;
use crate::memory::PAGE;
use crate::migrate::marks;
use crate::pci::Place;

/// Where the first chain's buffers are, each in pages of its own.
const AT: u64 = 0x4_0000;
const ROOM: u64 = 0x6_0000;

const WRITE: u16 = 2;
const NEXT: u16 = 1;

fn content(rig: &Rig) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    rig.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// A function whose first `count` queues are set up.
fn start(rig: &Rig, place: Place, count: u16) -> (Guest<'_>, Vec<Driver>) {
    let mut guest = Guest::probe(rig, place);
    let queues: Vec<_> = (0..count)
        .map(|index| (index, rings(0x1_0000 + 0x3000 * u64::from(index), 8)))
        .collect();
    guest.start_queues(ALL_FEATURES, &queues);
    // Its thread has seen the rings, which are empty, and looks again when it is rung for.
    for device in &rig.devices.list {
        device.pause().unwrap();
        device.resume();
    }
    let drivers = queues.iter();
    let drivers = drivers.map(|(_, rings)| Driver::new(rig.memory.clone(), *rings));
    (guest, drivers.collect())
}

/// Offers `bytes` to be read and `room` bytes to be written.
fn offer(driver: &mut Driver, bytes: &[u8], room: u32) {
    driver.memory.write_slice(bytes, GuestAddress(AT)).unwrap();
    let len = bytes.len() as u32;
    match (len, room) {
        (0, _) => driver.descriptor(0, ROOM, room, WRITE, 0),
        (_, 0) => driver.descriptor(0, AT, len, 0, 0),
        _ => {
            driver.descriptor(0, AT, len, NEXT, 1);
            driver.descriptor(1, ROOM, room, WRITE, 0);
        }
    }
    driver.offer(0);
}

/// Has the device do what `begin` begins, until it has given a chain of `driver` back; gives the pages that differ, which all
/// have marks. What it shall not do before is offered by `begin`: it looks at its queues when it is resumed, too.
fn written(rig: &Rig, driver: &mut Driver, begin: impl FnOnce(&mut Driver)) -> Vec<u64> {
    // As when a migration begins: nobody writes meanwhile who has seen the marks off.
    for device in &rig.devices.list {
        device.pause().unwrap();
    }
    marks::switch(&rig.memory, true);
    let before = content(rig);
    for device in &rig.devices.list {
        device.resume();
    }
    begin(driver);
    until("the chain comes back", || {
        driver.used_index() == driver.available
    });
    for device in &rig.devices.list {
        device.pause().unwrap();
    }
    let (after, marked) = (content(rig), marks::take(&rig.memory));
    for device in &rig.devices.list {
        device.resume();
    }
    let pages = before
        .chunks(PAGE as usize)
        .zip(after.chunks(PAGE as usize));
    let pages = pages.zip((0..).step_by(PAGE as usize));
    let differ: Vec<u64> = pages
        .filter_map(|((before, after), at)| (before != after).then_some(at))
        .collect();
    for page in &differ {
        let (first, _) = marked.run(*page, PAGE).unwrap_or((u64::MAX, 0));
        assert_eq!(first, *page, "{page:#x} was written to and has no mark");
    }
    differ
}

/// Offers a chain to one queue, as [`offer`] does, and rings; the used ring and `ROOM` are written to.
fn offers_and_writes(
    rig: &Rig,
    guest: &Guest<'_>,
    drivers: &mut [Driver],
    index: usize,
    bytes: &[u8],
    room: u32,
) {
    let bell = guest.doorbell() + 4 * index as u64;
    let driver = &mut drivers[index];
    let differ = written(rig, driver, |driver| {
        offer(driver, bytes, room);
        assert!(rig.wiring.ring(bell));
    });
    assert!(differ.contains(&ROOM), "{differ:x?}");
    assert!(differ.contains(&driver.rings.used), "{differ:x?}");
}

#[test]
fn a_disk_marks_what_it_reads_and_how_it_went() {
    for ring in [None, Ring::new(64, 8).ok()] {
        let rig = Rig::new(ring);
        std::os::unix::fs::FileExt::write_all_at(&rig.file, &[7; 0x3000], 512).unwrap();
        let (guest, mut drivers) = start(&rig, Place::disk(0), 1);
        let mut request = [0; 16];
        request[8] = 1;
        offers_and_writes(&rig, &guest, &mut drivers, 0, &request, 0x3001);
    }
}

#[test]
fn a_disk_marks_the_pages_of_an_indirect_table() {
    let rig = Rig::new(None);
    std::os::unix::fs::FileExt::write_all_at(&rig.file, &[7; 512], 0).unwrap();
    let (guest, mut drivers) = start(&rig, Place::disk(0), 1);
    let driver = &mut drivers[0];
    driver
        .memory
        .write_slice(&[0; 16], GuestAddress(AT))
        .unwrap();
    driver.descriptor_at(0x5_0000, 0, AT, 16, NEXT, 1);
    driver.descriptor_at(0x5_0000, 1, ROOM - 100, 512, NEXT | WRITE, 2);
    driver.descriptor_at(0x5_0000, 2, ROOM + 0x5000, 1, WRITE, 0);
    driver.descriptor(0, 0x5_0000, 48, 4, 0);
    driver
        .memory
        .write_obj(9u8, GuestAddress(ROOM + 0x5000))
        .unwrap();
    let differ = written(&rig, driver, |driver| {
        driver.offer(0);
        assert!(rig.wiring.ring(guest.doorbell()))
    });
    assert!(
        [ROOM - 0x1000, ROOM, ROOM + 0x5000]
            .iter()
            .all(|page| differ.contains(page)),
        "{differ:x?}"
    );
}

#[test]
fn a_scsi_host_adapter_marks_its_answers_and_what_it_reads() {
    let rig = Rig::new(None);
    let (guest, mut drivers) = start(&rig, Place::SCSI, 3);
    // INQUIRY of the disk, 96 bytes, behind the 108 of the answer.
    let mut request = vec![1, 0, 0x40];
    request.resize(19, 0);
    request.extend([0x12, 0, 0, 0, 96, 0]);
    request.resize(51, 0);
    offers_and_writes(&rig, &guest, &mut drivers, 2, &request, 108 + 96);
}

#[test]
fn random_numbers_are_marked() {
    let rig = Rig::new(None);
    let (guest, mut drivers) = start(&rig, Place::RNG, 1);
    offers_and_writes(&rig, &guest, &mut drivers, 0, &[], 0x2000);
}

#[test]
fn an_interface_marks_frames_and_answers() {
    let rig = Rig::new(None);
    let (guest, mut drivers) = start(&rig, Place::nic(0), 5);
    offer(&mut drivers[0], &[], 0x3000);
    assert!(rig.wiring.ring(guest.doorbell()));
    let mut frame = [0; 12].to_vec();
    frame.resize(9000, 5);
    let differ = written(&rig, &mut drivers[0], |_| {
        assert_eq!(rig.wire[0].send(&frame).unwrap(), 9000);
    });
    assert!(differ.contains(&(ROOM + 0x1000)), "{differ:x?}");
    // VIRTIO_NET_CTRL_RX_PROMISC, on; the acknowledgement is 0.
    rig.memory.write_obj(9u8, GuestAddress(ROOM)).unwrap();
    offers_and_writes(&rig, &guest, &mut drivers, 4, &[0, 0, 1], 1);
}

#[test]
fn ports_mark_their_messages_and_bytes() {
    let rig = Rig::new(None);
    let (guest, mut drivers) = start(&rig, Place::PORTS, 6);
    // VIRTIO_CONSOLE_DEVICE_READY: then there is something to hear.
    offer(&mut drivers[3], &[0, 0, 0, 0, 0, 0, 1, 0], 0);
    assert!(rig.wiring.ring(guest.doorbell() + 12));
    until("it is heard", || drivers[3].used_index() == 1);
    rig.memory
        .write_slice(&[9; 64], GuestAddress(ROOM))
        .unwrap();
    offers_and_writes(&rig, &guest, &mut drivers, 2, &[], 64);
    // Port 0 is open, and the host writes to it.
    offer(&mut drivers[3], &[0, 0, 0, 0, 3, 0, 1, 0], 0);
    assert!(rig.wiring.ring(guest.doorbell() + 12));
    until("it is heard", || drivers[3].used_index() == 2);
    offer(&mut drivers[3], &[0, 0, 0, 0, 6, 0, 1, 0], 0);
    assert!(rig.wiring.ring(guest.doorbell() + 12));
    until("it is heard", || drivers[3].used_index() == 3);
    offer(&mut drivers[0], &[], 64);
    assert!(rig.wiring.ring(guest.doorbell()));
    let differ = written(&rig, &mut drivers[0], |_| {
        (&rig.far[0]).write_all(b"hello").unwrap();
    });
    assert!(differ.contains(&ROOM), "{differ:x?}");
}

#[test]
fn a_socket_device_marks_its_packets() {
    let rig = Rig::new(None);
    let (guest, mut drivers) = start(&rig, Place::VSOCK, 3);
    offer(&mut drivers[0], &[], 0x1000);
    assert!(rig.wiring.ring(guest.doorbell()));
    // Bytes of a connection that there is not are answered with a reset.
    let packet = Packet {
        src_cid: u64::from(CID),
        dst_cid: 2,
        src_port: 7,
        dst_port: 8,
        kind: 1,
        operation: 5,
        ..Packet::default()
    };
    let (received, sent) = drivers.split_at_mut(1);
    let differ = written(&rig, &mut received[0], |_| {
        offer(&mut sent[0], &packet.bytes(), 0);
        assert!(rig.wiring.ring(guest.doorbell() + 4));
    });
    assert!(differ.contains(&ROOM), "{differ:x?}");
}

#[test]
fn the_balloon_marks_what_it_empties() {
    let rig = Rig::new(None);
    let (guest, mut drivers) = start(&rig, Place::BALLOON, 4);
    rig.memory
        .write_slice(&[7; 64], GuestAddress(ROOM))
        .unwrap();
    let page = (ROOM / PAGE) as u32;
    offers_and_writes(&rig, &guest, &mut drivers, 0, &page.to_le_bytes(), 0);
}
