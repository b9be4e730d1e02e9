// SPDX-License-Identifier: Apache-2.0
//! Checking and repairing in passes, and images made to keep a check busy for ever.
#![allow(missing_docs)]

mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::{open_file, qemu, run, Scratch};
use vmbus_qcow2::{
    check, check_within, create_qcow2, CheckReport, CreateOptions, Preallocation, Repair,
};

const COPIED: u64 = 1 << 63;

/// An image with all its tables.
fn image(scratch: &Scratch, size: u64, cluster_size: u64) -> PathBuf {
    let path = scratch.path("image");
    let options = CreateOptions {
        size,
        cluster_size,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    let file = std::fs::File::create_new(&path).map(|_| open_file(&path, true));
    create_qcow2(&file.expect("create"), None, &options).expect("create");
    path
}

fn word(path: &Path, at: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = open_file(path, false);
    file.read_exact_at(&mut bytes, at).expect("read");
    u64::from_be_bytes(bytes)
}

fn set(path: &Path, at: u64, value: u64) {
    let file = open_file(path, true);
    file.write_all_at(&value.to_be_bytes(), at).expect("write");
}

/// With so little memory that several passes are needed.
fn in_passes(path: &Path, repair: Repair) -> CheckReport {
    check_within(&open_file(path, true), repair, true, 0).expect("check")
}

#[test]
fn several_passes_find_and_repair_what_one_does() {
    let scratch = Scratch::new("passes");
    // More than half a million clusters: two passes.
    let path = image(&scratch, 320 << 20, 512);
    let sound = check(&open_file(&path, false), Repair::None, true).expect("check");
    assert_eq!((sound.corruptions, sound.leaks), (0, 0));
    assert_eq!(sound.allocated_clusters, 640 << 10);
    assert_eq!(in_passes(&path, Repair::None), sound);
    let l1 = word(&path, 40);
    let tables = word(&path, 36) >> 32;
    for n in [1, tables / 2, tables - 2] {
        let table = word(&path, l1 + n * 8) & !COPIED;
        // Two guest clusters on one host cluster: one counted too seldom, one leaked.
        let host = word(&path, table + 8);
        set(&path, table + 16, host);
    }
    let found = check(&open_file(&path, false), Repair::None, true).expect("check");
    assert_eq!((found.corruptions, found.leaks), (3, 3), "{found:?}");
    let mut again = in_passes(&path, Repair::None);
    again.messages = found.messages.clone();
    assert_eq!(again, found);
    let repaired = in_passes(&path, Repair::All);
    assert_eq!(
        (repaired.corruptions, repaired.leaks),
        (0, 0),
        "{repaired:?}"
    );
    if qemu() {
        run(&scratch.0, &["qemu-img", "check", "-q", "image"]);
    }
}

#[test]
fn leaks_in_every_pass_are_given_back() {
    let scratch = Scratch::new("leaks");
    let path = image(&scratch, 320 << 20, 512);
    let l1 = word(&path, 40);
    let tables = word(&path, 36) >> 32;
    for n in [0, tables / 2, tables - 1] {
        let table = word(&path, l1 + n * 8) & !COPIED;
        set(&path, table + 8, 0);
    }
    let repaired = in_passes(&path, Repair::Leaks);
    assert_eq!(
        (repaired.leaks_fixed, repaired.leaks, repaired.corruptions),
        (3, 0, 0),
        "{repaired:?}"
    );
}

#[test]
fn leaks_in_a_refcount_block_that_the_file_s_end_cuts_are_given_back() {
    let scratch = Scratch::new("cut");
    let path = image(&scratch, 1 << 20, 4096);
    let block = word(&path, word(&path, 48));
    let file = open_file(&path, true);
    file.set_len(block + 100).expect("truncate");
    for repair in [Repair::Leaks, Repair::All] {
        let found = check(&file, Repair::None, true).expect("check");
        let repaired = check(&file, repair, true).expect("check");
        assert!(found.leaks > 0 || repair == Repair::All, "{found:?}");
        assert_eq!(repaired.leaks, 0, "{repaired:?}");
        let len = file.metadata().expect("fstat").len();
        assert!(len <= block + 4096, "the file has grown to {len} bytes");
    }
}

#[test]
fn one_table_named_a_million_times_is_read_once() {
    let scratch = Scratch::new("named-often");
    let path = image(&scratch, 1 << 30, 65536);
    let l1 = word(&path, 40);
    let table = word(&path, l1);
    // A longer L1 table behind the end, of which each entry is the same.
    let entries = 1u64 << 20;
    let file = open_file(&path, true);
    let end = file.metadata().expect("stat").len().next_multiple_of(65536);
    let bytes: Vec<u8> = std::iter::repeat_n(table.to_be_bytes(), entries as usize)
        .flatten()
        .collect();
    file.write_all_at(&bytes, end).expect("write");
    set(&path, 40, end);
    file.write_all_at(&(entries as u32).to_be_bytes(), 36)
        .expect("write");
    set(&path, 24, entries << 29);
    let start = Instant::now();
    let report = check(&file, Repair::None, true).expect("check");
    // Reading it each time would be 64 GiB.
    assert!(start.elapsed() < Duration::from_secs(20));
    let text = report.messages.join("\n");
    assert!(text.contains("used 1048576 times"), "{text}");
}

#[test]
fn snapshots_without_end_over_one_l1_table_are_read_once() {
    let scratch = Scratch::new("snapshots");
    let path = image(&scratch, 1 << 30, 65536);
    let (l1, entries) = (word(&path, 40), (word(&path, 36) >> 32) as u32);
    let file = open_file(&path, true);
    let end = file.metadata().expect("stat").len().next_multiple_of(65536);
    let mut table = Vec::new();
    for n in 0..65_535u32 {
        let mut entry = vec![0u8; 40];
        entry[..8].copy_from_slice(&l1.to_be_bytes());
        entry[8..12].copy_from_slice(&entries.to_be_bytes());
        let id = n.to_string();
        entry[12..14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        entry.extend(id.as_bytes());
        entry.resize(entry.len().next_multiple_of(8), 0);
        table.extend(entry);
    }
    file.write_all_at(&table, end).expect("write");
    file.write_all_at(&65_535u32.to_be_bytes(), 60)
        .expect("write");
    set(&path, 64, end);
    let start = Instant::now();
    let report = check(&file, Repair::None, true).expect("check");
    assert!(start.elapsed() < Duration::from_secs(20));
    let text = report.messages.join("\n");
    assert!(text.contains("used 65536 times"), "{text}");
}
