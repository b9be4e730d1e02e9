// SPDX-License-Identifier: Apache-2.0
//! What a guest changes of a disk is noted while a migration wants to know ([`crate::migrate::changes`]), by whatever device it
//! has the disk, on a ring and without one, and whether it went well or not.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::Ring;

use crate::migrate::changes::{Blocks, Changed};
use crate::pci::Place;
use crate::virtio::queue::testing::rings;
use crate::virtio::rig::{image, nameless_file, Guest, Rig, ALL_FEATURES, DATA, DISK_BYTES};

const OUT: u32 = 1;
const IN: u32 = 0;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Sectors of a block.
const UNIT: u64 = Blocks::UNIT / 512;

fn watched(rig: &Rig, id: &str) -> Arc<Changed> {
    let content = rig.device(id).content().unwrap();
    content.changed.watch(DISK_BYTES);
    content.changed
}

/// The blocks that were changed since it was asked last.
fn changed(of: &Changed) -> Vec<(u64, u64)> {
    let blocks = of.take(DISK_BYTES);
    let first = blocks.run(0, DISK_BYTES);
    let next = first.and_then(|(begin, len)| blocks.run(begin + len, DISK_BYTES));
    first.into_iter().chain(next).collect()
}

#[test]
fn writes_zeroings_and_discards_are_noted_and_nothing_else() {
    for ring in [None, Ring::new(64, 8).ok()] {
        let rig = Rig::new(ring);
        let noted = watched(&rig, "disk/root");
        let mut guest = Guest::probe(&rig, Place::disk(0));
        guest.start(ALL_FEATURES, rings(0x1_0000, 8));
        let unit = Blocks::UNIT;
        let mut nth = 0;
        for (kind, wanted) in [
            (IN, vec![]),
            (FLUSH, vec![]),
            (OUT, vec![(2 * unit, unit)]),
            (DISCARD, vec![(3 * unit, unit)]),
            (WRITE_ZEROES, vec![(3 * unit, unit)]),
        ] {
            // Sector, sectors, flags.
            let segment = u128::from(3 * UNIT) | 4 << 64;
            rig.memory
                .write_slice(&segment.to_le_bytes(), GuestAddress(DATA))
                .unwrap();
            let (out, room) = match kind {
                IN => (0, 512),
                OUT => (512, 0),
                FLUSH => (0, 0),
                _ => (16, 0),
            };
            guest.offer(kind, 2 * UNIT + 1, out, room);
            nth += 1;
            assert_eq!(guest.ring_and_wait(nth), 0, "request {kind}");
            // It is given back a moment before its interrupt.
            rig.device("disk/root").pause().unwrap();
            rig.device("disk/root").resume();
            assert_eq!(changed(&noted), wanted, "request {kind}");
        }
    }
}

#[test]
fn a_write_that_fails_is_noted_for_a_part_of_it_may_be_there() {
    let file = nameless_file();
    let rig = Rig::on(None, image(file.try_clone().unwrap(), false));
    let noted = watched(&rig, "disk/root");
    let mut guest = Guest::probe(&rig, Place::disk(0));
    guest.start(ALL_FEATURES, rings(0x1_0000, 8));
    // SAFETY: a number for a file of ours.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(sealed, 0);
    guest.offer(OUT, 0, 512, 0);
    assert_eq!(guest.ring_and_wait(1), 1);
    assert_eq!(changed(&noted), [(0, Blocks::UNIT)]);
}
