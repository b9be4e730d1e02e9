// SPDX-License-Identifier: Apache-2.0
//! Power cuts. Every write, flush and change of length of a workload is recorded; then the file is
//! built as it could be after a cut at any moment: everything before the last flush, and of what came
//! after it any subset in any order, torn at 512 bytes. Each such file must open without repair,
//! check without corruption (leaks are allowed), and hold all data whose flush was reported.
//!
//! The workload runs on a disk that completes operations in any order, eight requests at a time.

//!
//! `bed` has the workload and its recording, `replay` the cuts.

mod bed;
mod replay;

use std::os::fd::AsRawFd;

use smallvec::smallvec;

use crate::recorder::{recorded, Event};
use crate::{check, Engine, Op, Repair, Request};
pub(crate) use bed::Random;
use bed::{open, Bed};
pub(crate) use replay::apply;

const SIZE: u64 = 1 << 20;
const SECTOR: usize = 512;

fn workload(name: &str, cluster_size: u64, refcount_bits: u32, backing: bool) {
    cut(name, &Bed::new(name, cluster_size, refcount_bits, backing));
}

fn cut(name: &str, bed: &Bed) {
    cut_often(name, bed, 300);
}

fn cuts_wanted(usual: u64) -> u64 {
    std::env::var("VMBUS_CUTS")
        .ok()
        .and_then(|cuts| cuts.parse().ok())
        .unwrap_or(usual)
}

fn cut_often(name: &str, bed: &Bed, usual: u64) {
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let seed = std::env::var("VMBUS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(clock);
    let cuts = cuts_wanted(usual);
    eprintln!("power cuts, {name}: VMBUS_SEED={seed} VMBUS_CUTS={cuts}");
    let mut random = Random(seed | 1);
    let (start, events) = bed.record(&mut random);
    assert_eq!(bed.replay(&start, &events, cuts, &mut random), cuts);
}

#[test]
fn small_clusters_survive_power_cuts() {
    workload("small", 512, 16, false);
}

#[test]
fn small_clusters_over_a_backing_file_survive_power_cuts() {
    workload("small-backing", 1024, 8, true);
}

#[test]
fn usual_clusters_over_a_backing_file_survive_power_cuts() {
    workload("usual-backing", 65536, 16, true);
}

#[test]
fn subclusters_survive_power_cuts() {
    subclusters("subclusters", 16384, false);
}

#[test]
fn subclusters_over_a_backing_file_survive_power_cuts() {
    subclusters("subclusters-backing", 65536, true);
}

#[test]
fn bitmaps_survive_power_cuts_or_say_that_they_did_not() {
    for (name, cluster_size) in [("bitmaps-small", 512), ("bitmaps", 65536)] {
        let mut bed = Bed::new(name, cluster_size, 16, false);
        bed.bitmaps = true;
        cut(name, &bed);
    }
}

fn subclusters(name: &str, cluster_size: u64, backing: bool) {
    let mut bed = Bed::new(name, cluster_size, 16, backing);
    bed.options.extended_l2 = true;
    cut(name, &bed);
}

/// Clusters are counted ahead (alloc/reserve.rs).
#[test]
fn a_flush_behind_a_new_cluster_is_one_sync() {
    let bed = Bed::new("ahead", 4096, 16, false);
    let path = bed.create();
    let image = bed.image("image", false).unwrap();
    let events = recorded(image.files()[0].as_raw_fd(), || {
        let mut disk = crate::Disk::blocking(image.clone()).unwrap();
        for cluster in 0..100 {
            disk.write(cluster * 8192, &[5; 512]).unwrap();
            disk.flush().unwrap();
        }
    });
    let is_sync = |event: &&Event| matches!(event, Event::Sync);
    let syncs = events.iter().filter(is_sync).count();
    // Two each while the reserve grows: 1, 2, 4 clusters.
    assert!((100..=110).contains(&syncs), "{syncs}");
    image.inactivate().unwrap();
    let report = check(&open(&path), Repair::None, false).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0));
}

#[test]
fn durable_writes_under_way_together_share_one_write_of_their_table_and_one_sync() {
    let mut bed = Bed::new("together", 4096, 16, false);
    bed.flags = libc::O_DIRECT;
    if !bed.has_flags() {
        return;
    }
    bed.create();
    let image = bed.image("image", false).unwrap();
    let mut disk = crate::Disk::blocking(image.clone()).unwrap();
    for cluster in 0..40 {
        // By and by enough is counted ahead.
        disk.write(cluster * 4096, &[5; 4096]).unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    let memory = std::cell::RefCell::new(crate::buffer::Buffer::from_bytes(&[7; 4096]));
    let durably = |first: u64, count: u64| {
        // They end one by one.
        let mut engine = Engine::reordering(first, None).unwrap();
        let slot = engine.attach(image.clone()).unwrap();
        let events = recorded(image.files()[0].as_raw_fd(), || {
            for id in 0..count {
                let request = Request {
                    id,
                    op: Op::Write { fua: true },
                    offset: (first + id) * 4096,
                    len: 4096,
                    buffers: smallvec![memory.borrow_mut().iovec(0, 4096)],
                };
                // SAFETY: the memory outlives the engine.
                unsafe { engine.submit(slot, request) };
            }
            let mut done = Vec::new();
            while done.len() < count as usize {
                engine.wait(&mut done).unwrap();
            }
            assert!(done.iter().all(|completion| completion.result.is_ok()));
        });
        let count = |kind: fn(&Event) -> bool| events.iter().filter(|event| kind(event)).count();
        (
            count(|event| matches!(event, Event::Durable { .. })),
            count(|event| matches!(event, Event::Write { .. })),
            count(|event| matches!(event, Event::Sync)),
        )
    };
    // One of them may come to where more is counted ahead, which needs another sync.
    let rounds = [durably(100, 8), durably(110, 8)];
    assert!(rounds.contains(&(0, 8 + 1, 1)), "{rounds:?}");
    // And where all that leads there is on the disk, nothing else is written.
    assert_eq!(durably(104, 3), (3, 0, 0));
}

/// Durable writes go to the disk by themselves where they can (engine/mod.rs).
#[test]
fn durable_writes_to_o_direct_files_survive_power_cuts() {
    for (name, cluster_size, backing) in [("direct", 4096, false), ("direct-backing", 8192, true)] {
        let mut bed = Bed::new(name, cluster_size, 16, backing);
        bed.flags = libc::O_DIRECT;
        if !bed.has_flags() {
            return;
        }
        let mut random = Random(17);
        let (start, events) = bed.record(&mut random);
        let durable = events
            .iter()
            .filter(|event| matches!(event, Event::Durable { .. }))
            .count();
        assert!(durable > 5, "{durable}");
        let cuts = cuts_wanted(300);
        assert_eq!(bed.replay(&start, &events, cuts, &mut random), cuts);
    }
}

#[test]
fn the_first_durable_write_of_many_in_a_row_makes_room_for_the_others() {
    let mut bed = Bed::new("row", 65536, 16, false);
    bed.flags = libc::O_DIRECT;
    if !bed.has_flags() {
        return;
    }
    bed.create();
    let image = bed.image("image", false).unwrap();
    let mut engine = Engine::blocking().unwrap();
    let slot = engine.attach(image.clone()).unwrap();
    let mut memory = crate::buffer::Buffer::from_bytes(&[7; 4096]);
    let mut write = |offset| {
        let request = Request {
            id: 0,
            op: Op::Write { fua: true },
            offset,
            len: 4096,
            buffers: smallvec![memory.iovec(0, 4096)],
        };
        // SAFETY: the memory outlives the engine.
        unsafe { engine.submit(slot, request) };
        let mut done = Vec::new();
        engine.wait(&mut done).unwrap();
        assert!(done.remove(0).result.is_ok());
    };
    // By and by enough is counted ahead, and the last write ends where the next cluster begins.
    (0..6).for_each(|cluster| write(cluster * 65536));
    write(7 * 65536 - 4096);
    let events = recorded(image.files()[0].as_raw_fd(), || {
        (0..16).for_each(|page| write(7 * 65536 + page * 4096));
    });
    let written: Vec<(bool, usize)> = events
        .iter()
        .filter_map(|event| match event {
            Event::Durable { data, .. } => Some((true, data.len())),
            Event::Write { data, .. } => Some((false, data.len())),
            _ => None,
        })
        .collect();
    let [whole, _table, rest @ ..] = &written[..] else {
        panic!("{written:?}");
    };
    // One of the events is the sync of these two.
    assert_eq!((*whole, events.len()), ((false, 65536), 18), "{written:?}");
    assert!(rest.iter().all(|one| *one == (true, 4096)), "{written:?}");
}

#[test]
fn encrypted_images_survive_power_cuts() {
    let mut bed = Bed::new("encrypted", 4096, 16, true);
    let secret = crate::Secret::new(b"passphrase".to_vec()).unwrap();
    bed.options.encryption = Some(crate::EncryptOptions {
        iteration_time: std::time::Duration::from_millis(1),
        ..crate::EncryptOptions::new(secret)
    });
    // Each is unlocked, which is meant to take its time.
    cut_often("encrypted", &bed, 40);
}

#[test]
fn one_bit_refcounts_survive_power_cuts() {
    workload("one-bit", 4096, 1, true);
}

#[test]
fn the_test_finds_a_write_that_comes_too_late() {
    // A mapping on disk before its data: what the commit order forbids.
    let bed = Bed::new("late", 4096, 16, false);
    let path = bed.create();
    let start = std::fs::read(&path).unwrap();
    let l1 = u64::from_be_bytes(start[40..48].try_into().unwrap());
    let stray = Event::Write {
        offset: l1,
        data: (1u64 << 63 | 0x10_0000).to_be_bytes().to_vec(),
    };
    let mut random = Random(1);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        bed.replay(&start, &[stray], 20, &mut random);
    }));
    let _ = std::fs::remove_dir_all(&bed.directory);
    assert!(caught.is_err());
}
