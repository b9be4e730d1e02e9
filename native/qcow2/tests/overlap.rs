// SPDX-License-Identifier: Apache-2.0
//! A damaged image whose pointers lead into its own metadata: whatever the guest does, no table is
//! overwritten; the image is marked corrupt, and takes no more writes until it was repaired.
#![allow(missing_docs)]

mod support;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use support::{active, layer, open_file, Scratch};
use vmbus_qcow2::{
    check, create_qcow2, resize, snapshot, CreateOptions, Disk, Format, Image, OpenOptions, Repair,
};

const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;
/// Clusters that one L2 table maps, in bytes of the disk.
const REACH: u64 = CLUSTER / 8 * CLUSTER;

/// An image with data in two L2 tables and a snapshot that shares the first of them.
struct Bed {
    _scratch: Scratch,
    path: PathBuf,
}

impl Bed {
    fn new(name: &str) -> Bed {
        let scratch = Scratch::new(&format!("overlap-{name}"));
        let path = scratch.path("image");
        let options = CreateOptions {
            size: 4 * REACH,
            cluster_size: CLUSTER,
            ..CreateOptions::default()
        };
        let file = std::fs::File::create_new(&path).map(|_| open_file(&path, true));
        create_qcow2(&file.expect("create"), None, &options).expect("create");
        let bed = Bed {
            _scratch: scratch,
            path,
        };
        let image = bed.open().expect("open");
        let mut disk = Disk::blocking(image.clone()).expect("disk");
        disk.write(0, &[1; 8192]).expect("write");
        snapshot::create(&image, "one").expect("snapshot");
        disk.write(REACH, &[2; 8192]).expect("write");
        image.inactivate().expect("close");
        bed
    }

    fn open(&self) -> vmbus_qcow2::Result<Arc<Image>> {
        active(
            vec![layer(&self.path, Format::Qcow2, None, true)],
            OpenOptions::default(),
        )
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        let file = open_file(&self.path, false);
        file.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    }

    fn set(&self, at: u64, value: u64) {
        let file = open_file(&self.path, true);
        file.write_all_at(&value.to_be_bytes(), at).expect("write");
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn l2(&self, index: u64) -> u64 {
        self.word(self.l1() + index * 8) & !COPIED
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    fn refcount_block(&self) -> u64 {
        self.word(self.refcount_table())
    }

    fn snapshot_l1(&self) -> u64 {
        self.word(self.word(64))
    }

    fn cluster(&self, at: u64) -> Vec<u8> {
        let mut bytes = vec![0; CLUSTER as usize];
        let file = open_file(&self.path, false);
        file.read_exact_at(&mut bytes, at).expect("read");
        bytes
    }

    /// Do something that must be refused. The clusters at `kept` are as they were, the image is marked
    /// corrupt, takes no more writes, and holds what was written before.
    fn refuses(
        &self,
        kept: &[u64],
        act: impl FnOnce(&Arc<Image>, &mut Disk) -> vmbus_qcow2::Result<()>,
    ) {
        let before: Vec<Vec<u8>> = kept.iter().map(|at| self.cluster(*at)).collect();
        let image = self.open().expect("open");
        let mut disk = Disk::blocking(image.clone()).expect("disk");
        disk.write(REACH + 4096, &[9; 4096])
            .expect("a write that is nobody's concern");
        let error = act(&image, &mut disk).expect_err("it must be refused");
        assert!(error.to_string().contains("damaged"), "{error}");
        let again = disk
            .write(REACH, &[7; 512])
            .expect_err("no more writes are taken");
        assert!(again.to_string().contains("damaged"), "{again}");
        let mut seen = [0; 4096];
        disk.read(REACH + 4096, &mut seen)
            .expect("reads go on being served");
        assert_eq!(seen, [9; 4096]);
        disk.flush().expect("what was written before is durable");
        image.inactivate().expect("close");
        for (at, before) in kept.iter().zip(before) {
            assert!(self.cluster(*at) == before, "cluster {at:#x} has changed");
        }
        assert_eq!(self.word(72) & 2, 2, "it is not marked corrupt");
        let error = self.open().err().expect("a corrupt image is not written");
        assert!(error.to_string().contains("corrupt"), "{error}");
    }
}

#[test]
fn data_is_not_written_in_place_over_a_refcount_block() {
    let bed = Bed::new("refcount-block");
    let block = bed.refcount_block();
    bed.set(bed.l2(1), block | COPIED);
    bed.refuses(&[block], |_, disk| disk.write(REACH, &[3; 512]));
}

#[test]
fn a_run_of_data_ends_before_metadata() {
    let bed = Bed::new("run");
    // The second cluster of the write is the L1 table.
    let l1 = bed.l1();
    bed.set(bed.l2(1) + 2 * 8, l1 | COPIED);
    bed.refuses(&[l1], |_, disk| disk.write(REACH + 4096, &[9; 8192]));
}

#[test]
fn an_l2_table_that_is_the_l1_table_is_not_written() {
    let bed = Bed::new("l1-as-l2");
    let l1 = bed.l1();
    bed.set(l1 + 2 * 8, l1 | COPIED);
    let before = bed.cluster(l1);
    bed.refuses(&[l1], |_, disk| disk.write(2 * REACH, &[3; 512]));
    assert_eq!(bed.cluster(l1), before);
}

#[test]
fn a_snapshots_l2_table_is_not_written_as_the_disks_own() {
    let bed = Bed::new("shared-l2");
    let table = bed.l2(0);
    bed.set(bed.l1(), table | COPIED);
    bed.refuses(&[table, bed.snapshot_l1()], |_, disk| {
        disk.write(3 * 4096, &[3; 512])
    });
}

#[test]
fn one_l2_table_in_two_places_is_not_written() {
    let bed = Bed::new("twice");
    bed.set(bed.l1() + 2 * 8, bed.l2(1) | COPIED);
    let table = bed.l2(1);
    // Not even what went before is allowed: it would show in both places.
    let image = bed.open().expect("open");
    let mut disk = Disk::blocking(image.clone()).expect("disk");
    let before = bed.cluster(table);
    disk.write(2 * REACH + 4 * 4096, &[3; 512])
        .expect_err("it would show in two places");
    image.inactivate().expect("close");
    assert_eq!(bed.cluster(table), before);
}

#[test]
fn clusters_that_hold_tables_are_not_handed_out_however_free_they_are_called() {
    for (name, place) in [
        ("l1", Bed::l1 as fn(&Bed) -> u64),
        ("l2", |bed| bed.l2(1)),
        ("snapshot", |bed| bed.word(64)),
        ("snapshot-l1", Bed::snapshot_l1),
        ("table", Bed::refcount_table),
        ("block", Bed::refcount_block),
    ] {
        let bed = Bed::new(&format!("free-{name}"));
        let cluster = place(&bed) / CLUSTER;
        let counts = open_file(&bed.path, true);
        counts
            .write_all_at(&[0, 0], bed.refcount_block() + 2 * cluster)
            .expect("write");
        // What is allocated before, from other free clusters, is counted and mapped.
        let changes = ["l2", "block"].contains(&name);
        let kept = if changes { vec![] } else { vec![place(&bed)] };
        bed.refuses(&kept, |_, disk| {
            disk.write(REACH + 8 * 4096, &vec![3; 64 * 4096])
        });
    }
}

#[test]
fn a_discard_does_not_free_a_table_of_a_snapshot() {
    let bed = Bed::new("discard");
    let table = bed.snapshot_l1();
    bed.set(bed.l2(1), table | COPIED);
    bed.refuses(&[table], |_, disk| disk.discard(REACH, 4096));
}

#[test]
fn snapshots_and_sizes_are_refused_once_an_image_was_found_damaged() {
    let bed = Bed::new("later");
    bed.set(bed.l2(1), bed.refcount_block() | COPIED);
    bed.refuses(&[], |image, disk| {
        disk.write(REACH, &[3; 512]).expect_err("damaged");
        snapshot::create(image, "two").expect_err("damaged");
        snapshot::delete(image, "one").expect_err("damaged");
        resize(image, 8 * REACH, false)
    });
}

#[test]
fn a_refcount_block_that_is_named_twice_is_not_written() {
    let bed = Bed::new("block-twice");
    let block = bed.refcount_block();
    bed.set(bed.refcount_table() + 8, block);
    let before = bed.cluster(block);
    let image = bed.open().expect("open");
    let mut disk = Disk::blocking(image.clone()).expect("disk");
    disk.write(3 * REACH, &[3; 512])
        .expect_err("its counts are two clusters' at once");
    image.inactivate().expect("close");
    assert_eq!(bed.cluster(block), before);
}

#[test]
fn what_was_refused_is_written_after_a_repair() {
    let bed = Bed::new("repaired");
    let cluster = bed.l2(1) / CLUSTER;
    let counts = open_file(&bed.path, true);
    counts
        .write_all_at(&[0, 0], bed.refcount_block() + 2 * cluster)
        .expect("write");
    bed.refuses(&[], |_, disk| {
        disk.write(REACH + 8 * 4096, &vec![3; 64 * 4096])
    });
    let report = check(&open_file(&bed.path, true), Repair::All, true).expect("repair");
    assert_eq!(report.corruptions, 0, "{:?}", report.messages);
    let image = bed.open().expect("open");
    let mut disk = Disk::blocking(image.clone()).expect("disk");
    disk.write(REACH + 8 * 4096, &vec![3; 64 * 4096])
        .expect("write");
    image.inactivate().expect("close");
}
