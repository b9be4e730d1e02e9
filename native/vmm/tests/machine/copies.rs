// SPDX-License-Identifier: Apache-2.0
//! Machines that take along what is on their disks, which their guests write to all the time.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use serde_json::{json, Value};
use vmbus_vmm::config::{ChangeKind, DeviceChange, ReceiveFrom, SendTo};
use vmbus_vmm::migrate::stream::{preamble, Header, Kind as Record, COPIES, PLAIN, PREAMBLE};
use vmbus_vmm::{EndReason, Error, Event, Kind, Request};

use crate::migrate::{kind, waiting, Between, Fate, Random, Way, RECEIVE, SEND, WRITES};
use crate::{requires_kvm, run, Running, PATIENCE};

const SIZE: u64 = 4 << 20;

/// A disk without a name: zeros but for a few places, none of which the guest writes to.
fn disk(seed: u8) -> File {
    // SAFETY: the name is a C string; the fd that comes back is ours.
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), flags))
    };
    file.set_len(SIZE).unwrap();
    if seed > 0 {
        for place in [64 << 10, 1 << 20, SIZE - 4096] {
            file.write_all_at(&[seed; 4096], place).unwrap();
        }
    }
    file
}

fn with(disk: &File) -> Value {
    let fd = disk.try_clone().unwrap().into_raw_fd();
    json!({ "disks": [{ "id": "root", "layers": [{ "fd": fd, "format": "raw" }] }] })
}

fn content(disk: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn root() -> Vec<String> {
    vec!["disk/root".to_owned()]
}

impl Running {
    fn send_with(&self, socket: impl Into<OwnedFd>, copy: Vec<String>) {
        let to = SendTo {
            fd: socket.into().into_raw_fd(),
            downtime: 300,
            bandwidth: 0,
            copy,
        };
        self.machine.send(SEND, &to).unwrap();
    }

    fn receive_with(&self, socket: impl Into<OwnedFd>, copy: Vec<String>, separate: Vec<String>) {
        let from = ReceiveFrom {
            fd: socket.into().into_raw_fd(),
            paused: true,
            copy,
            separate,
        };
        self.machine.receive(RECEIVE, &from).unwrap();
    }
}

/// Whose guest has written for a while.
fn writing(disk: &File) -> Running {
    let mut source = run(WRITES, with(disk));
    source.until("loop: beat");
    source
}

/// The guest goes on here, and writes to its disk.
fn goes_on(source: &mut Running, disk: &File) {
    let newest = |disk: &File| {
        let bytes = content(disk);
        let numbers = bytes.chunks(512).take(64);
        let numbers = numbers.map(|sector| u64::from_le_bytes(sector[..8].try_into().unwrap()));
        numbers.max().unwrap()
    };
    let before = newest(disk);
    source.drain();
    let begin = std::time::Instant::now();
    while newest(disk) < before + 64 {
        let text = source.drain();
        assert!(!text.contains("status"), "{text}");
        assert!(begin.elapsed() < PATIENCE, "no writes");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// What became of both when somebody in between judged so.
fn between(
    source: &Running,
    destination: &Running,
    judge: impl FnMut(Way, &[u8; 32], &mut Vec<u8>) -> Fate + Send + 'static,
) -> (Result<Value, Error>, Result<Value, Error>) {
    let mut judge = judge;
    let (between, here, there) = Between::new(Box::new(move |way, _, header, body| {
        judge(way, header, body)
    }));
    destination.receive_with(there, root(), Vec::new());
    source.send_with(here, root());
    let sent = source.answer(SEND).0;
    let received = destination.answer(RECEIVE).0;
    drop(between);
    (sent, received)
}

#[test]
fn what_a_guest_writes_meanwhile_is_in_the_copy() {
    requires_kvm!();
    // The destination's disk is empty, or has an older content.
    for old in [0, 9] {
        let (here, there) = (disk(3), disk(old));
        let mut source = writing(&here);
        let mut destination = waiting(WRITES, with(&there));
        let (sent, received) = between(&source, &destination, |_, _, _| Fate::Pass);
        let sent = sent.unwrap();
        received.unwrap();
        assert_eq!(source.end(), (EndReason::Migrated, String::new()));
        assert!(sent["disk_sent"].as_u64().unwrap() > 0, "{sent}");
        // It stands: both are what they were when the machine was handed on.
        assert!(content(&here) == content(&there), "old {old}: {sent}");
        source.drain();
        destination.must(Request::Resume);
        let text = destination.until("loop: beat");
        assert!(
            !text.contains("status") && !text.contains("begins"),
            "{text}"
        );
    }
}

#[test]
fn a_larger_disk_at_the_destination_has_grown_for_its_guest_and_a_smaller_one_is_refused() {
    requires_kvm!();
    let mode = format!("{WRITES} sizes");
    let here = disk(3);
    let mut source = run(&mode, with(&here));
    source.until(&format!("loop: {} sectors", SIZE / 512));
    let small = disk(0);
    small.set_len(SIZE / 2).unwrap();
    let destination = waiting(&mode, with(&small));
    let (sent, received) = between(&source, &destination, |_, _, _| Fate::Pass);
    for error in [sent.unwrap_err(), received.unwrap_err()] {
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "disk/root")
        );
    }
    goes_on(&mut source, &here);
    let large = disk(0);
    large.set_len(2 * SIZE).unwrap();
    large.write_all_at(&[1; 4096], SIZE).unwrap();
    let mut destination = waiting(&mode, with(&large));
    let (sent, received) = between(&source, &destination, |_, _, _| Fate::Pass);
    sent.unwrap();
    received.unwrap();
    assert!(content(&here) == content(&large));
    let mut behind = [7; 4096];
    large.read_exact_at(&mut behind, SIZE).unwrap();
    assert_eq!(behind, [0; 4096]);
    destination.must(Request::Resume);
    destination.until(&format!("loop: {} sectors", 2 * SIZE / 512));
}

#[test]
fn a_guest_that_writes_more_to_its_disk_than_goes_through_is_slowed_until_it_fits() {
    requires_kvm!();
    // Over 1 MiB, again and again.
    let mode = "disk-loop sector=0 count=2048 beat=50";
    let (here, there) = (disk(0), disk(0));
    let mut source = run(mode, with(&here));
    source.until("loop: beat");
    let destination = waiting(mode, with(&there));
    let (ours, theirs) = UnixStream::pair().unwrap();
    destination.receive_with(theirs, root(), Vec::new());
    let to = SendTo {
        fd: ours.into_raw_fd(),
        downtime: 50,
        bandwidth: 1 << 20,
        copy: root(),
    };
    source.machine.send(SEND, &to).unwrap();
    let sent = source.answer(SEND).0.unwrap();
    destination.answer(RECEIVE).0.unwrap();
    assert!(sent["slowed"].as_u64().unwrap() > 0, "{sent}");
    assert!(sent["rounds"].as_u64().unwrap() > 1, "{sent}");
    assert!(content(&here) == content(&there), "{sent}");
}

#[test]
fn statistics_tell_of_disks() {
    requires_kvm!();
    let (here, there) = (disk(3), disk(0));
    let mut source = writing(&here);
    let destination = waiting(WRITES, with(&there));
    let (at_round, round) = std::sync::mpsc::channel();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let (between, ours, theirs) = Between::new(Box::new(move |_, _, header, _| {
        if kind(header) == Record::Round {
            let _ = at_round.send(());
            let _ = wait.recv();
        }
        Fate::Pass
    }));
    destination.receive_with(theirs, root(), Vec::new());
    source.send_with(ours, root());
    round.recv_timeout(PATIENCE).unwrap();
    let stats: Value = serde_json::from_str(&source.ask(Request::Stats).0.unwrap()).unwrap();
    let migration = &stats["migration"];
    assert_eq!(migration["disk_total"], SIZE, "{migration}");
    assert!(migration["disk_sent"].as_u64().unwrap() > 0, "{migration}");
    assert!(
        migration["disk_remaining"].as_u64().unwrap() <= SIZE,
        "{migration}"
    );
    // What a disk or a medium is must not change meanwhile.
    let change = DeviceChange {
        device: "disk/root".to_owned(),
        change: ChangeKind::Size(2 * SIZE),
    };
    source.machine.change(3000, change);
    let error = source.answer(3000).0.unwrap_err();
    assert_eq!(error.kind, Kind::InvalidState);
    drop(go_on);
    source.answer(SEND).0.unwrap();
    destination.answer(RECEIVE).0.unwrap();
    drop(between);
}

#[test]
fn a_connection_that_breaks_at_any_record_of_a_disk_leaves_the_machine_where_it_is() {
    requires_kvm!();
    use Record::{Blocks, Copies, Disk, Holes, Ready, Round, Synced};
    let here = disk(3);
    let mut source = writing(&here);
    for last in [Copies, Disk, Blocks, Holes, Round, Synced, Ready] {
        let there = disk(0);
        let destination = waiting(WRITES, with(&there));
        let (sent, received) = between(&source, &destination, move |_, header, _| {
            match kind(header) == last {
                true => Fate::Cut,
                false => Fate::Pass,
            }
        });
        assert_eq!(sent.unwrap_err().kind, Kind::Disconnected, "{last:?}");
        assert_eq!(received.unwrap_err().kind, Kind::Disconnected, "{last:?}");
        assert_eq!(destination.end().0, EndReason::Error, "{last:?}");
        goes_on(&mut source, &here);
    }
}

#[test]
fn a_bit_that_flips_in_a_record_of_a_disk_is_noticed() {
    requires_kvm!();
    use Record::{Blocks, Copies, Disk, Holes, Synced};
    let here = disk(3);
    let mut source = writing(&here);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for spoilt in [Copies, Disk, Blocks, Holes, Synced] {
        let there = disk(0);
        let destination = waiting(WRITES, with(&there));
        let (place, bit) = (random.below(1 << 32) as usize, 1 << random.below(8));
        let mut done = false;
        let (between, ours, theirs) = Between::new(Box::new(move |_, _, header, body| {
            if kind(header) == spoilt && !done {
                done = true;
                // Not in what says where the next record begins.
                match body.len() {
                    0 => header[16 + place % 16] ^= bit,
                    len => body[place % len] ^= bit,
                }
            }
            Fate::Pass
        }));
        destination.receive_with(theirs, root(), Vec::new());
        source.send_with(ours, root());
        let sent = source.answer(SEND).0.unwrap_err();
        destination.answer(RECEIVE).0.unwrap_err();
        drop(between);
        assert_eq!(sent.kind, Kind::ImageInvalid, "{spoilt:?}: {sent}");
        assert_eq!(destination.end().0, EndReason::Error, "{spoilt:?}");
        goes_on(&mut source, &here);
    }
}

#[test]
fn one_that_is_stopped_at_any_moment_of_its_disk_runs_in_one_place() {
    requires_kvm!();
    let here = disk(3);
    let mut source = writing(&here);
    for seed in 1..=8u64 {
        let there = disk(0);
        let destination = waiting(WRITES, with(&there));
        let when = Random(seed.wrapping_mul(0xd134_2543_de82_ef95)).below(16) as usize;
        let (tell, told) = std::sync::mpsc::channel();
        let (between, ours, theirs) = Between::new(Box::new(move |way, number, _, _| {
            if way == Way::ToDestination && number == when {
                let _ = tell.send(());
            }
            Fate::Pass
        }));
        destination.receive_with(theirs, root(), Vec::new());
        source.send_with(ours, root());
        told.recv_timeout(PATIENCE).unwrap();
        source.machine.request(2000, Request::CancelSave);
        let sent = source.answer(SEND).0;
        let received = destination.answer(RECEIVE).0;
        drop(between);
        match sent {
            Ok(_) => {
                // It was too late.
                received.unwrap();
                assert!(content(&here) == content(&there), "seed {seed}");
                drop(source);
                source = writing(&here);
            }
            Err(error) => {
                assert_eq!(error.kind, Kind::Cancelled, "seed {seed}: {error}");
                received.unwrap_err();
                goes_on(&mut source, &here);
            }
        }
    }
}

#[test]
fn a_disk_that_cannot_be_written_at_the_destination_is_told_by_name() {
    requires_kvm!();
    let (here, there) = (disk(3), disk(0));
    let mut source = writing(&here);
    let destination = waiting(WRITES, with(&there));
    let mut first = true;
    let seal = there.try_clone().unwrap();
    let (sent, received) = between(&source, &destination, move |_, header, _| {
        if kind(header) == Record::Blocks && std::mem::take(&mut first) {
            // SAFETY: a number for a file of ours.
            let sealed =
                unsafe { libc::fcntl(seal.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
            assert_eq!(sealed, 0);
        }
        Fate::Pass
    });
    for error in [sent.unwrap_err(), received.unwrap_err()] {
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::Unavailable, "disk/root"),
            "{error}"
        );
    }
    assert_eq!(destination.end().0, EndReason::Error);
    goes_on(&mut source, &here);
}

#[test]
fn both_sides_name_the_same_disks_or_nothing_moves() {
    requires_kvm!();
    let here = disk(3);
    let mut source = writing(&here);
    let other = vec!["disk/other".to_owned()];
    for copy in [other, vec!["rng".to_owned()], [root(), root()].concat()] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        source.send_with(ours, copy);
        let error = source.answer(SEND).0.unwrap_err();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "copy")
        );
    }
    // Another file, which nobody answers for; one that comes unasked, or does not come.
    for (sends, receives, argument) in [
        (Vec::new(), Vec::new(), "disk/root"),
        (root(), Vec::new(), "disk/root"),
        (Vec::new(), root(), "copy"),
    ] {
        let there = disk(0);
        let destination = waiting(WRITES, with(&there));
        let (ours, theirs) = UnixStream::pair().unwrap();
        destination.receive_with(theirs, receives, Vec::new());
        source.send_with(ours, sends);
        let sent = source.answer(SEND).0.unwrap_err();
        let received = destination.answer(RECEIVE).0.unwrap_err();
        for error in [sent, received] {
            assert_eq!(
                (error.kind, error.argument.as_str()),
                (Kind::InvalidArgument, argument),
                "{error}"
            );
        }
        assert_eq!(content(&there), vec![0; SIZE as usize]);
        goes_on(&mut source, &here);
    }
    let there = disk(0);
    let destination = waiting(WRITES, with(&there));
    let (ours, theirs) = UnixStream::pair().unwrap();
    destination.receive_with(theirs, Vec::new(), root());
    source.send_with(ours, Vec::new());
    source.answer(SEND).0.unwrap();
    assert_eq!(destination.answer(RECEIVE).1, [Event::Paused]);
}

#[test]
fn only_a_source_that_copies_says_that_it_needs_a_newer_destination() {
    requires_kvm!();
    let here = disk(3);
    let mut source = writing(&here);
    for (copy, version) in [(Vec::new(), PLAIN), (root(), COPIES)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        source.send_with(ours, copy);
        let mut begin = [0; PREAMBLE];
        theirs.read_exact(&mut begin).unwrap();
        assert_eq!(begin, preamble(version));
        // What a destination of before says to a version that it does not know.
        let body = json!({
            "kind": "NotSupported", "argument": "socket",
            "message": "format 2 of the stream is not known here; up to 1 is: the destination needs a newer vmbus",
        });
        let body = body.to_string().into_bytes();
        let header = Header::of(Record::Refused, 0, (0, 0), &body).bytes();
        theirs.write_all(&[&header[..], &body].concat()).unwrap();
        let error = source.answer(SEND).0.unwrap_err();
        assert_eq!(error.kind, Kind::NotSupported);
        assert!(error.message.contains("newer vmbus"), "{error}");
        goes_on(&mut source, &here);
    }
}
