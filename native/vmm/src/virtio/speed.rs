// SPDX-License-Identifier: Apache-2.0
//! Devices alone: how many requests and packets a second an I/O thread serves for a driver that does nothing else
//! (`python -m bench.devices` runs these, and says what they are measured beside).

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::Ring;

use super::queue::testing::{rings, Driver};
use super::rig::{Guest, Rig, ALL_FEATURES, DISK_BYTES};
use super::F_EVENT_IDX;
use crate::net::{Link, Tap};
use crate::pci::Place;

const RINGS: u64 = 0x1_0000;
const SIZE: u16 = 128;
const DEPTH: u16 = 32;
const BLOCK: u32 = 4096;
const HEADERS: u64 = 0x4_0000;
const DATA: u64 = 0x5_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const NO_NOTIFY: u16 = 1;
const PACKET: u32 = 1012; // with the 12 bytes of its header
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const SPAN: Duration = Duration::from_secs(2);

/// How many a second of what `more` does, which says how many it did.
fn rate(mut more: impl FnMut() -> u64) -> f64 {
    let (begin, mut count) = (Instant::now(), 0);
    while begin.elapsed() < SPAN {
        for _ in 0..64 {
            count += more();
        }
    }
    count as f64 / begin.elapsed().as_secs_f64()
}

/// Keeps DEPTH chains, whose heads are three apart, under way in a queue.
fn driven(guest: &Guest, mut driver: Driver, queue: u16) -> f64 {
    let bell = guest.doorbell() + 4 * u64::from(queue);
    let ring = |driver: &Driver| {
        if driver.get(driver.rings.used) & NO_NOTIFY == 0 {
            guest.rig.wiring.ring(bell);
        }
    };
    for slot in 0..DEPTH {
        driver.offer(3 * slot);
    }
    ring(&driver);
    let mut seen = 0u16;
    rate(|| {
        let used = driver.used_index();
        let fresh = used.wrapping_sub(seen);
        while seen != used {
            let (head, _) = driver.used(seen);
            driver.offer(head as u16);
            seen = seen.wrapping_add(1);
        }
        if fresh > 0 {
            ring(&driver);
        }
        u64::from(fresh)
    })
}

#[test]
#[ignore = "a measurement"]
fn disk() {
    let rig = Rig::new(Some(Ring::new(128, 8).unwrap()));
    rig.file
        .write_all_at(&vec![7; DISK_BYTES as usize], 0)
        .unwrap();
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES & !F_EVENT_IDX, rings(RINGS, SIZE));
    let driver = Driver::new(rig.memory.clone(), rings(RINGS, SIZE));
    for slot in 0..DEPTH {
        let (head, header) = (3 * slot, HEADERS + 0x20 * u64::from(slot));
        let sector = u128::from(u64::from(slot) * u64::from(BLOCK) / 512);
        let bytes = (sector << 64).to_le_bytes();
        rig.memory
            .write_slice(&bytes, GuestAddress(header))
            .unwrap();
        let data = DATA + u64::from(BLOCK) * u64::from(slot);
        driver.descriptor(head, header, 16, NEXT, head + 1);
        driver.descriptor(head + 1, data, BLOCK, NEXT | WRITE, head + 2);
        driver.descriptor(head + 2, header + 16, 1, WRITE, 0);
    }
    let device = driven(&guest, driver, 0);
    let mut data = vec![0; BLOCK as usize];
    let limit = rate(|| {
        rig.file.read_exact_at(&mut data, 0).unwrap();
        1
    });
    println!("MEASURED {{\"device\": {device:.0}, \"limit\": {limit:.0}}}");
}

/// A tap that goes nowhere, in a network of this thread's own. Needs root.
fn tap() -> File {
    // SAFETY: it changes this thread's network namespace, and nothing else.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // struct ifreq: the name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    request[16..18].copy_from_slice(&0x5002u16.to_le_bytes());
    // SAFETY: the request reads and writes a struct ifreq, which outlives the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    let words = ["link", "set", "tap0", "up"];
    assert!(Command::new("ip").args(words).status().unwrap().success());
    file
}

#[test]
#[ignore = "a measurement"]
fn network() {
    let file = tap();
    let link = Link::Tap(Tap::new(vec![file.try_clone().unwrap().into()]).unwrap());
    let rig = Rig::linked(None, link, Vec::new());
    let mut guest = Guest::probe(&rig, Place::nic(0));
    let queue = rings(RINGS, SIZE);
    guest.start_queues(ALL_FEATURES & !F_EVENT_IDX, &[(1, queue)]);
    let driver = Driver::new(rig.memory.clone(), queue);
    // A frame from our address to everybody, of a protocol that nobody speaks.
    let mut packet = vec![0u8; PACKET as usize];
    packet[12..18].fill(0xff);
    packet[18..24].copy_from_slice(&super::rig::MAC);
    packet[24..26].copy_from_slice(&[0x88, 0xb5]);
    rig.memory.write_slice(&packet, GuestAddress(DATA)).unwrap();
    for slot in 0..DEPTH {
        driver.descriptor(3 * slot, DATA, PACKET, 0, 0);
    }
    let device = driven(&guest, driver, 1);
    let limit = rate(|| {
        assert_eq!(
            std::io::Write::write(&mut &file, &packet).unwrap(),
            packet.len()
        );
        1
    });
    println!("MEASURED {{\"device\": {device:.0}, \"limit\": {limit:.0}}}");
}
