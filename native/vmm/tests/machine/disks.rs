// SPDX-License-Identifier: Apache-2.0
//! Disks and the PCI bus, as the bare-metal driver of tests/guests finds them.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_qcow2::Ring;
use vmbus_vmm::{EndReason, Event, Kind, Request};

use crate::{build, build_with, requires_kvm, run, run_with, Running, PATIENCE};

const SECTORS: u64 = 2048;

/// A disk image of 1 MiB without a name, with each sector's number in its first word.
fn image() -> File {
    // SAFETY: the name is a C string; the fd that comes back is ours.
    let file =
        unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(SECTORS * 512).unwrap();
    for sector in 0..SECTORS {
        file.write_all_at(&sector.to_le_bytes(), sector * 512)
            .unwrap();
    }
    file
}

fn disk(file: &File, change: Value) -> Value {
    let fd = file.try_clone().unwrap().into_raw_fd();
    let mut disk = json!({ "id": "root", "layers": [{ "fd": fd, "format": "raw" }] });
    for (key, value) in change.as_object().unwrap() {
        disk[key] = value.clone();
    }
    disk
}

fn words(file: &File, sector: u64) -> Vec<u64> {
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, sector * 512).unwrap();
    let words = bytes.chunks_exact(8);
    words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

/// FNV-1a, as the guest computes it.
fn checksum(file: &File, sector: u64) -> u64 {
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, sector * 512).unwrap();
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// All that the guest prints until it powers off.
fn until_power_off(guest: &mut Running) -> String {
    let begin = Instant::now();
    loop {
        let printed = guest.drain();
        match guest.machine.next_event() {
            Some(Event::Ended { reason, .. }) => {
                assert_eq!(reason, EndReason::GuestPoweroff, "{printed}");
                return guest.drain();
            }
            Some(event) => panic!("{event:?}"),
            None => assert!(begin.elapsed() < PATIENCE, "no end; console: {printed}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The same, of which one line must be this.
fn must_print(guest: &mut Running, line: &str) -> String {
    let printed = until_power_off(guest);
    let found = printed.lines().any(|printed| printed == line);
    assert!(found, "{line:?} was not printed, but: {printed}");
    printed
}

fn writes(guest: &mut Running) -> u64 {
    let stats: Value = serde_json::from_str(&guest.ask(Request::Stats).0.unwrap()).unwrap();
    // A device that counts nothing is not there, rather than null.
    let devices = stats["devices"].as_object().unwrap();
    assert!(devices.values().all(Value::is_object), "{stats}");
    stats["devices"]["disk/root"]["writes"].as_u64().unwrap()
}

/// What a guest of this machine type sees on bus 0: part of the type.
#[test]
fn every_function_has_its_place() {
    requires_kvm!();
    let (a, b) = (image(), image());
    let disks = json!([disk(&a, json!({})), disk(&b, json!({ "id": "data" }))]);
    let mut guest = run("pci-list", json!({ "disks": disks, "rng": true }));
    let mut expected = vec![
        "pci: 0.0 29c08086 class 60000 bar 0".to_owned(),
        "pci: 1.0 10421af4 class 18000 bar c008000c".to_owned(),
        "pci: 1.1 10421af4 class 18000 bar c009000c".to_owned(),
        "pci: 5.0 10441af4 class ff00 bar c028000c".to_owned(),
    ];
    expected
        .extend((0..8).map(|port| format!("pci: 10.{port} c1b36 class 60400 bar c08{port}000c")));
    expected.push("pci: 1f.0 29188086 class 60100 bar 0".to_owned());
    let printed = until_power_off(&mut guest);
    assert_eq!(printed.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_guest_reads_what_is_on_the_disk() {
    requires_kvm!();
    let file = image();
    let mut guest = run(
        "disk-read sector=2047",
        json!({ "vcpus": 2, "disks": [disk(&file, json!({}))] }),
    );
    let sum = checksum(&file, 2047);
    let line = format!("sector 2047: status 0, checksum {sum:x}");
    let printed = must_print(&mut guest, &line);
    assert!(printed.contains("2048 sectors, 2 queues"), "{printed}");
}

fn pattern(rings: Vec<Ring>) {
    let file = image();
    let disks = json!({ "disks": [disk(&file, json!({}))] });
    let mut guest = run_with("disk-pattern sector=100 count=9 seed=77", disks, rings);
    must_print(&mut guest, "pattern: done, 9 sectors from 100");
    assert_eq!(words(&file, 99)[0], 99);
    for sector in 100..109 {
        let expected: Vec<u64> = (0..64).map(|word| 77 + sector * 64 + word).collect();
        assert_eq!(words(&file, sector), expected);
    }
    assert_eq!(words(&file, 109)[0], 109);
}

#[test]
fn a_guest_writes_by_system_calls() {
    requires_kvm!();
    pattern(Vec::new());
}

#[test]
fn a_guest_writes_by_io_uring() {
    requires_kvm!();
    match Ring::new(64, 16) {
        Ok(ring) => pattern(vec![ring]),
        Err(error) => eprintln!("absent: io_uring ({error})"),
    }
}

#[test]
fn each_of_several_io_threads_serves_its_disks() {
    requires_kvm!();
    let files = [image(), image(), image()];
    let disks: Vec<Value> = (0..)
        .zip(&files)
        .map(|(index, file)| disk(file, json!({ "id": format!("d{index}") })))
        .collect();
    let rings: Result<Vec<Ring>, _> = (0..2).map(|_| Ring::new(64, 16)).collect();
    let Ok(rings) = rings else {
        eprintln!("absent: io_uring");
        return;
    };
    let mut guest = run_with(
        "disk-pattern disk=1 seed=5 count=2",
        json!({ "disks": disks }),
        rings,
    );
    must_print(&mut guest, "pattern: done, 2 sectors from 0");
    assert_eq!(words(&files[0], 1)[0], 1);
    assert_eq!(words(&files[1], 1)[0], 5 + 64);
    assert_eq!(words(&files[2], 1)[0], 1);
}

#[test]
fn completions_interrupt_the_guest() {
    requires_kvm!();
    for vcpus in [1, 2] {
        let file = image();
        let disks = json!([disk(&file, json!({}))]);
        let mut guest = run("disk-interrupt", json!({ "vcpus": vcpus, "disks": disks }));
        assert_eq!(until_power_off(&mut guest), "interrupt: 8 of 8\n");
    }
}

#[test]
fn the_serial_number_and_the_read_only_bit_reach_the_guest() {
    requires_kvm!();
    let file = image();
    let change = json!({ "serial": "WD-1234567890abcdefg", "read_only": true });
    let mut guest = run("disk-id", json!({ "disks": [disk(&file, change.clone())] }));
    must_print(&mut guest, "id: status 0, WD-1234567890abcdefg");
    let mut guest = run("disk-pattern", json!({ "disks": [disk(&file, change)] }));
    must_print(&mut guest, "pattern: sector 0: status 1");
    assert_eq!(words(&file, 1)[0], 1);
}

#[test]
fn zeroes_are_written_and_ranges_discarded() {
    requires_kvm!();
    let file = image();
    let disks = json!([disk(&file, json!({}))]);
    let mut guest = run("disk-zero sector=8 count=16", json!({ "disks": disks }));
    must_print(&mut guest, "zero: read status 0, first word 0");
    assert_eq!(words(&file, 7)[0], 7);
    assert_eq!(words(&file, 23)[0], 0);
    assert_eq!(words(&file, 24)[0], 24);
}

#[test]
fn a_guest_that_breaks_the_rules_of_virtio_harms_itself_alone() {
    requires_kvm!();
    let file = image();
    let disks = json!([disk(&file, json!({ "read_only": true }))]);
    let mut guest = run("disk-hostile", json!({ "disks": disks }));
    let printed = must_print(&mut guest, "hostile: alive");
    let attempts: Vec<&str> = printed
        .lines()
        .filter(|line| line.ends_with("works after a reset"))
        .collect();
    assert_eq!(attempts.len(), 28, "{printed}");
    for (name, outcome) in [
        ("circle", "needs reset"),
        ("address nowhere", "needs reset"),
        ("index jumps", "needs reset"),
        ("used ring nowhere", "needs reset"),
        ("sector beyond the end", "carries on"),
        ("bells", "carries on"),
    ] {
        let line = format!("hostile: {name}: {outcome}, works after a reset");
        assert!(attempts.contains(&line.as_str()), "{line} in {printed}");
    }
    for sector in 0..SECTORS {
        assert_eq!(words(&file, sector)[0], sector);
    }
}

#[test]
fn a_paused_machine_writes_nothing() {
    requires_kvm!();
    let file = image();
    let disks = json!([disk(&file, json!({}))]);
    let mut guest = run("disk-loop beat=50", json!({ "disks": disks }));
    guest.until("loop: beat");
    for _ in 0..3 {
        guest.must(Request::Pause);
        let (before, first) = (writes(&mut guest), words(&file, 0));
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!((writes(&mut guest), words(&file, 0)), (before, first));
        guest.must(Request::Resume);
        let begin = Instant::now();
        while writes(&mut guest) == before {
            assert!(begin.elapsed() < PATIENCE, "it does not go on");
        }
    }
    guest.must(Request::PowerButton);
    let printed = must_print(&mut guest, "loop: flush status 0");
    let ended: u64 = printed
        .lines()
        .find_map(|line| line.strip_prefix("loop: ended at ")?.trim().parse().ok())
        .unwrap();
    // Sector s holds the last sequence number that was its turn.
    for sector in 0..64.min(ended) {
        let sequence = (ended - 1 - sector) / 64 * 64 + sector;
        assert_eq!(
            words(&file, sector)[0],
            sequence,
            "sector {sector} of {ended}"
        );
    }
}

#[test]
fn a_reset_in_the_middle_of_writing_starts_the_guest_again() {
    requires_kvm!();
    let file = image();
    let disks = json!([disk(&file, json!({}))]);
    let mut guest = run("disk-loop beat=50", json!({ "disks": disks }));
    guest.until("loop: beat");
    for round in 1..=3 {
        let before = writes(&mut guest);
        while writes(&mut guest) == before {}
        assert_eq!(guest.must(Request::Reset), [Event::Reset]);
        let begin = Instant::now();
        while guest.drain().matches("loop: begins").count() <= round {
            assert!(begin.elapsed() < PATIENCE, "it did not begin again");
        }
    }
    let end = Event::Ended {
        reason: EndReason::Stopped,
        detail: String::new(),
    };
    assert_eq!(guest.must(Request::Stop), [end]);
}

#[test]
fn a_stopped_machine_has_let_go_of_its_image() {
    requires_kvm!();
    let file = image();
    let disks = json!([disk(&file, json!({}))]);
    let mut guest = run("disk-loop beat=50", json!({ "disks": disks }));
    guest.until("loop: beat");
    guest.must(Request::Stop);
    let first = words(&file, 0);
    // Nobody holds its locks: another machine may have it.
    let disks = json!([disk(&file, json!({}))]);
    let mut second = run("disk-read sector=0", json!({ "disks": disks }));
    let sum = checksum(&file, 0);
    must_print(
        &mut second,
        &format!("sector 0: status 0, checksum {sum:x}"),
    );
    assert_eq!(words(&file, 0), first);
    drop(guest);
}

#[test]
fn random_numbers_differ_from_start_to_start() {
    requires_kvm!();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mut guest = run("random", json!({ "rng": true }));
        let printed = until_power_off(&mut guest);
        assert!(printed.starts_with("random: used, 32 bytes, "), "{printed}");
        seen.push(printed);
    }
    assert_ne!(seen[0], seen[1]);
    let mut guest = run("random", json!({}));
    assert_eq!(until_power_off(&mut guest), "random: none\n");
}

#[test]
fn what_is_wrong_with_a_disk_is_named() {
    requires_kvm!();
    let file = image();
    let error = |disks: Value| build("idle", json!({ "disks": disks })).err().unwrap();
    let bad = error(json!([disk(&file, json!({ "queues": 17 }))]));
    assert_eq!(
        (bad.kind, bad.argument.as_str()),
        (Kind::InvalidArgument, "disks[0].queues")
    );
    let layers = json!([{ "fd": image().into_raw_fd(), "format": "vmdk" }]);
    let bad = error(json!([
        disk(&file, json!({})),
        disk(&file, json!({ "id": "other", "layers": layers }))
    ]));
    assert_eq!(
        (bad.kind, bad.argument.as_str()),
        (Kind::InvalidArgument, "disk/other")
    );
    let many: Vec<Value> = (0..17)
        .map(|i| disk(&image(), json!({ "id": format!("d{i}") })))
        .collect();
    assert_eq!(error(json!(many)).argument, "disks");
    // A ring with a file table that is too small.
    if let Ok(ring) = Ring::new(8, 1) {
        let disks = json!([
            disk(&image(), json!({})),
            disk(&image(), json!({ "id": "other" }))
        ]);
        assert!(build_with("idle", json!({ "disks": disks }), vec![ring]).is_err());
    }
}
