// SPDX-License-Identifier: Apache-2.0
//! Requests, and what a machine does between them.

use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_vmm::{EndReason, Event, Kind, Request};

use crate::{build, requires_kvm, run, Running};

fn stats(guest: &mut Running) -> Value {
    let (result, _) = guest.ask(Request::Stats);
    serde_json::from_str(&result.unwrap()).unwrap()
}

fn exits(guest: &mut Running) -> Vec<u64> {
    let stats = stats(guest);
    let vcpus = stats["vcpus"].as_array().unwrap();
    vcpus
        .iter()
        .map(|vcpu| vcpu["exits"].as_u64().unwrap())
        .collect()
}

#[test]
fn nothing_runs_before_run() {
    requires_kvm!();
    let mut guest = build("hello", json!({})).unwrap();
    guest.silence(Duration::from_millis(300));
    assert_eq!(exits(&mut guest), [0]);
}

#[test]
fn a_request_that_does_not_fit_the_state_is_refused() {
    requires_kvm!();
    let mut guest = build("idle", json!({})).unwrap();
    let refused = |guest: &mut Running, request| {
        let (result, events) = guest.ask(request);
        assert_eq!(result.unwrap_err().kind, Kind::InvalidState, "{request:?}");
        assert_eq!(events, [], "{request:?}");
    };
    for request in [
        Request::Pause,
        Request::Resume,
        Request::Reset,
        Request::PowerButton,
    ] {
        refused(&mut guest, request);
    }
    guest.must(Request::Run);
    refused(&mut guest, Request::Run);
    refused(&mut guest, Request::Resume);
    guest.must(Request::Pause);
    refused(&mut guest, Request::Pause);
    guest.must(Request::Stop);
    refused(&mut guest, Request::Run);
    refused(&mut guest, Request::Stop);
}

#[test]
fn all_vcpus_of_a_paused_machine_stand_still() {
    requires_kvm!();
    let mut guest = run("smp cpus=4 busy", json!({ "vcpus": 4 }));
    guest.until("busy");
    assert_eq!(guest.must(Request::Pause), [Event::Paused]);
    let at_pause = exits(&mut guest);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(exits(&mut guest), at_pause);
    assert_eq!(guest.must(Request::Resume), [Event::Running]);
    let begin = Instant::now();
    loop {
        let now = exits(&mut guest);
        if now.iter().zip(&at_pause).all(|(now, then)| now > then) {
            break;
        }
        assert!(
            begin.elapsed() < crate::PATIENCE,
            "{now:?} after {at_pause:?}"
        );
    }
}

#[test]
fn pauses_and_resumes_in_quick_succession_lose_no_output() {
    requires_kvm!();
    let mut guest = run("flood count=300", json!({}));
    let mut rounds = 0;
    while !guest.drain().contains("flooded") {
        // It may have powered off before it was paused, or while it was.
        let requests = [Request::Pause, Request::Resume];
        if requests
            .into_iter()
            .any(|request| guest.ask(request).0.is_err())
        {
            break;
        }
        // Else it would never get to an instruction.
        std::thread::sleep(Duration::from_millis(2));
        rounds += 1;
    }
    assert!(rounds > 3, "only {rounds} rounds");
    let text = guest.until("flooded");
    let lines: Vec<&str> = text.lines().take(300).collect();
    let wanted: Vec<String> = (0..300).map(|i| format!("line {i}")).collect();
    assert_eq!(lines, wanted);
}

#[test]
fn a_reset_from_outside_starts_all_over_and_a_paused_machine_stays_paused() {
    requires_kvm!();
    let mut guest = run("smp cpus=2 busy", json!({ "vcpus": 2 }));
    guest.until("busy");
    for _ in 0..3 {
        assert_eq!(guest.must(Request::Reset), [Event::Reset]);
    }
    guest.must(Request::Pause);
    assert_eq!(guest.must(Request::Reset), [Event::Reset]);
    let at_reset = exits(&mut guest);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(exits(&mut guest), at_reset);
    guest.must(Request::Resume);
    let begin = Instant::now();
    // Both processors came up once more, after the last reset.
    loop {
        let now = exits(&mut guest);
        if now
            .iter()
            .zip(&at_reset)
            .all(|(now, then)| *now > then + 50)
        {
            break;
        }
        assert!(
            begin.elapsed() < crate::PATIENCE,
            "{now:?} after {at_reset:?}"
        );
    }
    assert_eq!(stats(&mut guest)["resets"], 4);
}

#[test]
fn sixteen_vcpus_come_up() {
    requires_kvm!();
    let mut guest = run("smp cpus=16", json!({ "vcpus": 16 }));
    guest.until("smp: processors ffff of ffff");
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
}

#[test]
fn the_pit_wakes_a_sleeping_guest() {
    requires_kvm!();
    let mut guest = run("ticks count=5", json!({}));
    guest.until("ticks: 5");
}

#[test]
fn a_console_that_nobody_reads_stops_the_guest_and_nothing_is_lost() {
    requires_kvm!();
    let mut guest = run("flood count=40000", json!({}));
    // Until the socket is full: then the number of written bytes no longer grows.
    let mut written = 0;
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let now = stats(&mut guest)["console"]["written"].as_u64().unwrap();
        if now == written && now > 0 {
            break;
        }
        written = now;
    }
    // Pause, reset and so on work while the guest waits.
    guest.must(Request::Pause);
    guest.must(Request::Resume);
    let text = guest.until(&format!("line {}\n", written / 12));
    for (line, i) in text.lines().zip(0..written / 12) {
        assert_eq!(line, format!("line {i}"));
    }
}

#[test]
fn what_is_typed_arrives() {
    requires_kvm!();
    let mut guest = build("echo", json!({})).unwrap();
    guest.send("typed before the start; ");
    guest.must(Request::Run);
    guest.send("and after, longer than any FIFO is deep. ");
    guest.until("typed before the start; and after, longer than any FIFO is deep. ");
    guest.send("q");
    guest.until("bye");
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
}

#[test]
fn the_guest_finds_its_memory_beyond_four_gib_and_its_initrd() {
    requires_kvm!();
    let initrd: Vec<u8> = (0..100_001u32).map(|i| (i * 7) as u8).collect();
    let path = std::env::temp_dir().join(format!("vmbus-initrd-{}", std::process::id()));
    std::fs::write(&path, &initrd).unwrap();
    let kernel = json!({ "fd": crate::fd(crate::guest()), "initrd_fd": crate::fd(&path), "cmdline": "memory" });
    let mut guest = run("", json!({ "kernel": kernel, "memory": 3u64 << 30 }));
    let text = guest.until("last word: 123456789abcdef");
    std::fs::remove_file(&path).unwrap();
    let sum: u64 = initrd.iter().map(|byte| u64::from(*byte)).sum();
    assert!(
        text.contains(&format!("module: 100001 bytes, sum {sum}")),
        "{text}"
    );
    assert!(text.contains("map: 100000000 40000000 1"), "{text}");
    assert!(text.contains("map: 100000 7ff00000 1"), "{text}");
}
