// SPDX-License-Identifier: Apache-2.0
//! A guest's memory: what it gives back, and what it may try.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_vmm::{EndReason, Event, Kind, Request};

use crate::{build, requires_kvm, run, Running};

const MIB: u64 = 1 << 20;
const MEMORY: u64 = 64 * MIB;

/// A memfd of `bytes`, sealed as the broker's are, and the same to look at.
fn memory_file(bytes: u64) -> (i32, File) {
    // SAFETY: a fresh memfd, owned by nobody else.
    let file = unsafe {
        File::from_raw_fd(libc::memfd_create(
            c"memory".as_ptr(),
            libc::MFD_ALLOW_SEALING,
        ))
    };
    file.set_len(bytes).unwrap();
    let fd = file.try_clone().unwrap().into_raw_fd();
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes a number.
    assert_eq!(unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) }, 0);
    (fd, file)
}

fn held(file: &File) -> u64 {
    512 * file.metadata().unwrap().blocks()
}

fn balloon(guest: &mut Running) -> Value {
    let (result, _) = guest.ask(Request::Stats);
    let all: Value = serde_json::from_str(&result.unwrap()).unwrap();
    all["devices"]["balloon"].clone()
}

/// Asks until the balloon's figures are such.
fn until(guest: &mut Running, condition: impl Fn(&Value) -> bool) -> Value {
    let begin = Instant::now();
    loop {
        let figures = balloon(guest);
        if condition(&figures) {
            return figures;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{figures}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guest_gives_memory_back_and_takes_it_again() {
    requires_kvm!();
    for kind in ["mergeable", "shareable"] {
        let mut config = json!({ "balloon": true, "memory_kind": kind });
        let mut file = None;
        if kind == "shareable" {
            let (fd, kept) = memory_file(MEMORY);
            config["memory_fd"] = json!(fd);
            file = Some(kept);
        }
        let mut guest = run("balloon touch=16", config);
        guest.until("touched 4096 pages");
        if let Some(file) = &file {
            assert!(held(file) >= 16 * MIB, "{}", held(file));
        }
        guest.must(Request::MemoryTarget(MEMORY - 12 * MIB));
        guest.until("balloon: 3072 pages");
        let figures = until(&mut guest, |figures| figures["ballooned"] == 12 * MIB);
        assert_eq!(figures["target"], MEMORY - 12 * MIB, "{figures}");
        assert_eq!(figures["inflated"], 12 * MIB, "{figures}");
        assert_eq!(
            [&figures["refused"], &figures["faults"]],
            [0, 0],
            "{figures}"
        );
        if let Some(file) = &file {
            assert!(held(file) < 8 * MIB, "{}", held(file));
        }
        guest.must(Request::MemoryTarget(MEMORY));
        let said = guest.until("balloon: 0 pages");
        assert!(!said.contains("holds"), "{said}");
        let figures = until(&mut guest, |figures| figures["ballooned"] == 0);
        assert_eq!(figures["deflated"], 12 * MIB, "{figures}");
        if let Some(file) = &file {
            assert!(held(file) >= 16 * MIB, "{}", held(file));
        }
    }
}

#[test]
fn a_guest_says_how_its_memory_is_when_it_is_asked() {
    requires_kvm!();
    let mut guest = run("balloon touch=16", json!({ "balloon": true }));
    guest.until("touched 4096 pages");
    let figures = until(&mut guest, |figures| figures["guest"]["free"] == 16 * MIB);
    assert_eq!(figures["guest"]["total"], 32 * MIB);
    guest.must(Request::MemoryTarget(MEMORY - 4 * MIB));
    guest.until("balloon: 1024 pages");
    // Older than a second, they are asked for anew.
    until(&mut guest, |figures| figures["guest"]["free"] == 12 * MIB);
}

#[test]
fn free_pages_that_a_guest_reports_are_the_hosts() {
    requires_kvm!();
    let (fd, file) = memory_file(MEMORY);
    let config = json!({ "balloon": true, "memory_kind": "shareable", "memory_fd": fd });
    let mut guest = run("report touch=16", config);
    guest.until("touched");
    assert!(held(&file) >= 16 * MIB);
    guest.send("x");
    guest.until("report: 0 of 16 first pages left");
    // It has read the first page of each MiB again.
    assert!(held(&file) < 4 * MIB, "{}", held(&file));
    assert_eq!(balloon(&mut guest)["reported"], 16 * MIB);
}

#[test]
fn the_balloon_stands_while_the_machine_does_and_is_empty_after_a_reset() {
    requires_kvm!();
    let mut guest = run("balloon touch=16", json!({ "balloon": true }));
    guest.until("touched");
    guest.must(Request::Pause);
    guest.must(Request::MemoryTarget(MEMORY - 8 * MIB));
    guest.silence(Duration::from_millis(100));
    assert_eq!(balloon(&mut guest)["ballooned"], 0);
    guest.must(Request::Resume);
    guest.until("balloon: 2048 pages");
    guest.must(Request::Reset);
    until(&mut guest, |figures| {
        figures["ballooned"] == 8 * MIB && figures["inflated"] == 16 * MIB
    });
}

#[test]
fn a_hostile_guest_harms_only_itself() {
    requires_kvm!();
    let mut guest = run("balloon-hostile touch=16", json!({ "balloon": true }));
    let said = guest.until("hostile: done");
    for line in [
        "pages that are not RAM: taken",
        "one page, over and over: taken",
        "pages that were never given: taken",
        "a list of an odd length: taken",
        "nothing: taken",
        "a list of 4 GiB: needs a reset",
        "a list that is not RAM: needs a reset",
        "a free page that is to be read: needs a reset",
        "free memory beyond all there is: taken",
        "its own rings: taken",
        "asked for 0, gave ffffffff",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let figures = balloon(&mut guest);
    assert_eq!(figures["faults"], 3, "{figures}");
    assert_eq!(figures["ballooned"], MEMORY, "{figures}");
    guest.send("x");
    let (reason, detail) = guest.end();
    assert_eq!(reason, EndReason::GuestPoweroff, "{detail}");
}

#[test]
fn a_target_that_cannot_be_is_refused() {
    requires_kvm!();
    let mut guest = build("idle", json!({ "balloon": true })).unwrap();
    for bad in [0, 4095, MEMORY + 4096, u64::MAX] {
        let error = guest.ask(Request::MemoryTarget(bad)).0.unwrap_err();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "target")
        );
    }
    let mut guest = build("idle", json!({})).unwrap();
    let error = guest.ask(Request::MemoryTarget(MEMORY)).0.unwrap_err();
    assert_eq!(error.kind, Kind::NotSupported);
}

#[test]
fn memory_is_touched_before_the_guest_runs_or_while_it_does() {
    requires_kvm!();
    let (fd, file) = memory_file(MEMORY);
    let config = json!({ "memory_kind": "shareable", "memory_fd": fd });
    let mut guest = build("idle", config).unwrap();
    assert!(held(&file) < 8 * MIB);
    let (result, _) = guest.ask(Request::Prefault);
    assert_eq!(result.unwrap(), json!({ "bytes": MEMORY }).to_string());
    assert_eq!(held(&file), MEMORY);
    guest.must(Request::Run);
    guest.until("idle");
    guest.must(Request::CancelPrefault);
    let (again, _) = guest.ask(Request::Prefault);
    assert_eq!(again.unwrap(), json!({ "bytes": MEMORY }).to_string());
    guest.must(Request::Stop);
    let error = guest.ask(Request::Prefault).0.unwrap_err();
    assert_eq!(error.kind, Kind::InvalidState);
}

#[test]
fn touching_is_given_up_when_it_is_cancelled_or_the_machine_ends() {
    requires_kvm!();
    for end in [Request::CancelPrefault, Request::Stop] {
        let mut guest = build("idle", json!({ "memory": 1u64 << 30 })).unwrap();
        guest.machine.request(77, Request::Prefault);
        guest.machine.request(78, end);
        let (mut result, mut ended) = (None, false);
        while result.is_none() || !ended {
            match guest.event() {
                Event::Done {
                    id: 77,
                    result: touched,
                } => result = Some(touched),
                Event::Done { id: 78, .. } => ended = true,
                _ => {}
            }
        }
        assert_eq!(
            result.unwrap().unwrap_err().kind,
            Kind::Cancelled,
            "{end:?}"
        );
        let (stats, _) = guest.ask(Request::Stats);
        let stats: Value = serde_json::from_str(&stats.unwrap()).unwrap();
        assert!(stats["memory"]["prefaulted"].as_u64().unwrap() < 1 << 30);
    }
}
