// SPDX-License-Identifier: Apache-2.0
//! Machines that are written to a file, and go on from it.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use serde_json::{json, Value};
use vmbus_vmm::acpi::{GENERATION_OFFSET, GENERATION_PAGE};
use vmbus_vmm::config::{RestoreFrom, SaveTo};
use vmbus_vmm::save::file::{Saved, Section};
use vmbus_vmm::{EndReason, Error, Event, Kind, Request};

use crate::firmware::{bootable, requires_seabios, Directory, SEABIOS};
use crate::network::{begun, learnt, nic, ping, tap};
use crate::{build, fd, requires_kvm, run, Running, PATIENCE};

const MIB: u64 = 1 << 20;

/// A file without a name.
pub(crate) fn file() -> File {
    // SAFETY: the name is a C string; the fd that comes back is ours.
    unsafe { File::from_raw_fd(libc::memfd_create(c"saved".as_ptr(), libc::MFD_CLOEXEC)) }
}

pub(crate) fn copy(file: &File) -> i32 {
    file.try_clone().unwrap().into_raw_fd()
}

impl Running {
    /// Waits for the answer to request `id`; gives it and the events before it.
    pub(crate) fn answer(&self, id: u64) -> (Result<Value, Error>, Vec<Event>) {
        let mut before = Vec::new();
        loop {
            match self.event() {
                Event::Done { id: of, result } if of == id => {
                    let result = result.map(|json| serde_json::from_str(&json).unwrap());
                    return (result, before);
                }
                event => before.push(event),
            }
        }
    }

    fn save(&mut self, file: &File, end: bool) -> (Result<Value, Error>, Vec<Event>) {
        let to = SaveTo {
            fd: copy(file),
            end,
            snapshot: None,
        };
        self.machine.save(1000, &to).unwrap();
        self.answer(1000)
    }

    /// Saves it and sees it end; gives the bytes written.
    pub(crate) fn save_and_end(&mut self, file: &File) -> u64 {
        let (result, _) = self.save(file, true);
        let bytes = result.unwrap()["bytes"].as_u64().unwrap();
        assert_eq!(self.end(), (EndReason::Saved, String::new()));
        bytes
    }

    fn restore(&mut self, file: &File) -> Result<Value, Error> {
        let from = RestoreFrom {
            fd: Some(copy(file)),
            changed_disks: false,
            revert: None,
        };
        self.machine.restore(1001, &from).unwrap();
        let (result, events) = self.answer(1001);
        if result.is_ok() {
            assert_eq!(events, [Event::Paused]);
        }
        result
    }
}

/// Another machine like it, which goes on from the file.
fn go_on(file: &File, cmdline: &str, change: Value) -> Running {
    let mut guest = restored(file, cmdline, change).unwrap();
    assert_eq!(guest.must(Request::Resume), [Event::Running]);
    guest
}

fn restored(file: &File, cmdline: &str, mut change: Value) -> Result<Running, Error> {
    change["restore"] = true.into();
    let mut guest = build(cmdline, change)?;
    guest.restore(file)?;
    Ok(guest)
}

#[test]
fn a_guest_goes_on_where_it_was() {
    requires_kvm!();
    let count = 900;
    let cmdline = format!("flood count={count}");
    let (file, again) = (file(), file());
    let mut first = run(&cmdline, json!({}));
    first.until("line 20\n");
    let written = first.save_and_end(&file);
    assert!(
        written < 8 * MIB,
        "{written} bytes of a guest that uses little"
    );
    assert!(file.metadata().unwrap().blocks() * 512 <= written + MIB);
    assert_eq!(file.metadata().unwrap().len() & 4095, 0);
    let mut text = first.drain();

    let mut second = go_on(&file, &cmdline, json!({}));
    second.until("\nline 3");
    second.save_and_end(&again);
    text += &second.drain();

    let mut third = go_on(&again, &cmdline, json!({}));
    text += &third.until("flooded");
    let lines: Vec<_> = text.lines().take(count).map(str::to_owned).collect();
    let wanted: Vec<_> = (0..count).map(|i| format!("line {i}")).collect();
    assert_eq!(lines, wanted);
    assert_eq!(third.end().0, EndReason::GuestPoweroff);
}

#[test]
fn all_vcpus_and_their_timers_go_on() {
    requires_kvm!();
    let file = file();
    let smp = json!({ "vcpus": 4 });
    let mut guest = run("smp cpus=4 busy", smp.clone());
    guest.until("busy");
    guest.save_and_end(&file);
    let mut guest = go_on(&file, "smp cpus=4 busy", smp);
    let exits = |guest: &mut Running| {
        let stats: Value = serde_json::from_str(&guest.ask(Request::Stats).0.unwrap()).unwrap();
        let vcpus = stats["vcpus"].as_array().unwrap().clone();
        vcpus
            .iter()
            .all(|vcpu| vcpu["exits"].as_u64().unwrap() > 10)
    };
    let begin = Instant::now();
    while !exits(&mut guest) {
        assert!(begin.elapsed() < PATIENCE, "a vCPU does not go on");
        std::thread::sleep(Duration::from_millis(20));
    }

    let file = self::file();
    let mut guest = run("ticks count=60", json!({}));
    std::thread::sleep(Duration::from_millis(200));
    guest.save_and_end(&file);
    assert!(!guest.drain().contains("ticks: 60"));
    go_on(&file, "ticks count=60", json!({})).until("ticks: 60");
}

#[test]
fn keys_that_were_typed_and_not_read_are_not_lost_and_a_paused_machine_can_be_saved() {
    requires_kvm!();
    let file = file();
    let mut guest = run("echo", json!({}));
    guest.until("ready");
    guest.must(Request::Pause);
    guest.save_and_end(&file);
    let mut guest = restored(&file, "echo", json!({})).unwrap();
    guest.silence(Duration::from_millis(100));
    guest.send("after q");
    guest.must(Request::Resume);
    guest.until("after q");
    guest.until("bye");
}

#[test]
fn a_machine_that_stays_goes_on_as_it_was() {
    requires_kvm!();
    let file = file();
    let mut guest = run("flood", json!({}));
    guest.until("line 5\n");
    let (result, events) = guest.save(&file, false);
    result.unwrap();
    assert_eq!(events, [Event::Paused, Event::Running]);
    let after = lines(&guest.drain()).pop().unwrap();
    guest.until(&format!("line {}\n", after + 100));
    // And from there it can be gone back to, twice.
    for _ in 0..2 {
        let mut back = go_on(&file, "flood", json!({}));
        let begin = Instant::now();
        let first = loop {
            if let Some(first) = lines(&back.drain()).first() {
                break *first;
            }
            assert!(begin.elapsed() < PATIENCE, "no line: {}", back.drain());
            std::thread::sleep(Duration::from_millis(5));
        };
        // Between them is the one in which it was saved.
        assert!(first <= after + 2, "{first} after {after}");
    }
}

/// The numbers of the whole lines of a flood; where it was begun or ended, there is a part of one.
fn lines(text: &str) -> Vec<u64> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole
        .lines()
        .filter_map(|line| line.strip_prefix("line ")?.parse().ok())
        .collect()
}

/// A disk of 1 MiB without a name.
fn disk() -> File {
    let disk = file();
    disk.set_len(MIB).unwrap();
    disk
}

fn with_disk(disk: &File) -> Value {
    json!({ "disks": [{ "id": "root", "layers": [{ "fd": copy(disk), "format": "raw" }] }] })
}

fn word(disk: &File, sector: u64) -> u64 {
    let mut bytes = [0; 8];
    disk.read_exact_at(&mut bytes, sector * 512).unwrap();
    u64::from_le_bytes(bytes)
}

#[test]
fn writes_to_a_disk_go_on_and_a_disk_that_was_written_meanwhile_is_refused() {
    requires_kvm!();
    let (file, disk) = (file(), disk());
    let mode = "disk-loop sector=0 count=64 beat=50";
    let mut guest = run(mode, with_disk(&disk));
    guest.until("loop: beat");
    guest.save_and_end(&file);
    let newest = |disk: &File| (0..64).map(|sector| word(disk, sector)).max().unwrap();
    let before = newest(&disk);

    let mut guest = go_on(&file, mode, with_disk(&disk));
    let begin = Instant::now();
    while newest(&disk) < before + 100 {
        // A console that nobody reads holds the guest up.
        guest.drain();
        assert!(begin.elapsed() < PATIENCE, "no writes after {before}");
        std::thread::sleep(Duration::from_millis(20));
    }
    guest.must(Request::Pause);
    let all: Vec<u64> = (0..64).map(|sector| word(&disk, sector)).collect();
    let (low, high) = (all.iter().min().unwrap(), all.iter().max().unwrap());
    assert!(high - low < 64, "none was left out: {all:?}");
    drop(guest);

    let error = restored(&file, mode, with_disk(&disk)).err().unwrap();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Kind::Changed, "disk/root")
    );
}

#[test]
fn a_file_that_is_refused_leaves_disk_and_file_as_they_were() {
    requires_kvm!();
    let (file, disk) = (file(), disk());
    let mode = "disk-loop sector=0 count=8 beat=20";
    let mut guest = run(mode, with_disk(&disk));
    guest.until("loop: beat");
    guest.save_and_end(&file);
    let modified = disk.metadata().unwrap().mtime_nsec();
    let last = file.metadata().unwrap().len() - 1;
    file.set_len(last).unwrap();
    let error = restored(&file, mode, with_disk(&disk)).err().unwrap();
    assert_eq!(error.kind, Kind::ImageInvalid);
    assert_eq!(disk.metadata().unwrap().mtime_nsec(), modified);
    file.set_len(last + 1).unwrap();
    go_on(&file, mode, with_disk(&disk)).until("loop: beat");
}

#[test]
fn every_section_notices_a_flipped_bit_and_every_cut() {
    requires_kvm!();
    let file = file();
    let small = json!({ "memory": 4 * MIB });
    let mut guest = run("flood", small.clone());
    guest.until("line 5\n");
    guest.save_and_end(&file);
    let len = file.metadata().unwrap().len();
    let mut whole = vec![0; len as usize];
    file.read_exact_at(&mut whole, 0).unwrap();
    let pages = len / 4096;
    let mut seed = 0x9e37_79b9_u64;
    let mut random = |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    // One bit in each page of the file: header, facts, state, index, memory, holes; and some more.
    let flips = (0..pages).map(|page| page * 4096);
    let flips: Vec<u64> = flips.map(|at| at + random(4096)).collect();
    // All but memory is in front; of memory, some.
    let flips = flips.iter().enumerate();
    let flips = flips.filter(|(page, _)| *page < 12 || page % 40 == 0);
    for (_, &at) in flips {
        let bit = 1 << random(8);
        file.write_all_at(&[whole[at as usize] ^ bit], at).unwrap();
        let error = restored(&file, "flood", small.clone()).err();
        let error = error.unwrap_or_else(|| panic!("bit {bit:#x} at {at:#x} went unnoticed"));
        assert_eq!(error.kind, Kind::ImageInvalid, "at {at:#x}: {error}");
        file.write_all_at(&whole[at as usize..][..1], at).unwrap();
    }
    for cut in [0, 1, 4095, 4096, 8192, len / 2, len - 4096, len - 1] {
        file.set_len(cut).unwrap();
        let error = restored(&file, "flood", small.clone()).err().unwrap();
        assert_eq!(error.kind, Kind::ImageInvalid, "cut at {cut}: {error}");
    }
    file.set_len(0).unwrap();
    file.write_all_at(&whole, 0).unwrap();
    go_on(&file, "flood", small).until("\nline ");
}

#[test]
fn another_machine_is_refused_by_what_differs() {
    requires_kvm!();
    let file = file();
    let mut guest = run("echo", json!({}));
    guest.until("ready");
    guest.save_and_end(&file);
    let refused = |change: Value| {
        let error = restored(&file, "echo", change).err().unwrap();
        (error.kind, error.argument)
    };
    let invalid = |argument: &str| (Kind::InvalidArgument, argument.to_owned());
    assert_eq!(refused(json!({ "memory": 65 * MIB })), invalid("memory"));
    assert_eq!(refused(json!({ "vcpus": 2 })), invalid("vcpus"));
    assert_eq!(refused(json!({ "rng": true })), invalid("rng"));
    assert_eq!(refused(with_disk(&disk())), invalid("disk/root"));
    // A machine that is to go on cannot begin, and one that has begun cannot go on from elsewhere.
    let mut guest = build("echo", json!({ "restore": true })).unwrap();
    let error = guest.ask(Request::Run).0.unwrap_err();
    assert_eq!(error.kind, Kind::InvalidState);
    let mut guest = run("echo", json!({}));
    assert_eq!(guest.restore(&file).unwrap_err().kind, Kind::InvalidState);
    guest.until("ready");
}

#[test]
fn what_cannot_be_written_to_is_refused_and_the_machine_goes_on() {
    requires_kvm!();
    let mut guest = run("flood", json!({}));
    guest.until("line 5\n");
    let null = File::open("/dev/null").unwrap();
    let full = file();
    full.set_len(1).unwrap();
    let path = format!("/proc/self/fd/{}", full.as_raw_fd());
    for file in [&null, &full, &File::open(path).unwrap()] {
        let (result, events) = guest.save(file, true);
        let error = result.unwrap_err();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "file")
        );
        assert_eq!(events, []);
    }
    assert_eq!(full.metadata().unwrap().len(), 1);
    guest.until("line 200\n");
}

#[test]
fn a_full_disk_leaves_the_machine_as_it_was_and_nothing_on_the_disk() {
    requires_kvm!();
    let Some(directory) = small_disk() else {
        return;
    };
    let path = directory.join("saved");
    let mut guest = run("flood", json!({}));
    guest.until("line 5\n");
    let file = File::create_new(&path).unwrap();
    let (result, events) = guest.save(&file, true);
    let error = result.unwrap_err();
    assert_eq!(error.kind, Kind::Unavailable);
    assert!(error.message.contains("No space"), "{error}");
    assert_eq!(events, [Event::Paused, Event::Running]);
    assert_eq!(path.metadata().unwrap().blocks(), 0);
    assert_eq!(path.metadata().unwrap().len(), 0);
    guest.until("line 200\n");
    std::process::Command::new("umount")
        .arg("-l")
        .arg(&directory)
        .status()
        .unwrap();
    std::fs::remove_dir(directory).unwrap();
}

/// A file system of 64 KiB in a mount namespace of this thread's own; None where that is not allowed.
pub(crate) fn small_disk() -> Option<std::path::PathBuf> {
    let directory = std::env::temp_dir().join(format!("vmbus-small-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = std::ffi::CString::new(directory.to_str().unwrap()).unwrap();
    // SAFETY: all are C strings; only this thread's view of the file system changes.
    let mounted = unsafe {
        libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) == 0
            && libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(
                c"small".as_ptr(),
                path.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                c"size=64k".as_ptr().cast(),
            ) == 0
    };
    if !mounted {
        eprintln!("absent: a mount namespace");
        return None;
    }
    Some(directory)
}

#[test]
fn a_save_that_is_cancelled_leaves_the_machine_as_it_was() {
    requires_kvm!();
    let file = file();
    let mut guest = run("flood", json!({ "memory": 2048 * MIB }));
    guest.until("line 5\n");
    guest
        .machine
        .save(
            7,
            &SaveTo {
                fd: copy(&file),
                end: true,
                snapshot: None,
            },
        )
        .unwrap();
    guest.machine.request(8, Request::Resume);
    guest.machine.request(9, Request::CancelSave);
    let (mut cancelled, mut busy) = (None, None);
    while cancelled.is_none() || busy.is_none() {
        match guest.event() {
            Event::Done { id: 7, result } => cancelled = Some(result.unwrap_err().kind),
            Event::Done { id: 8, result } => busy = Some(result.unwrap_err().kind),
            _ => {}
        }
    }
    assert_eq!(busy, Some(Kind::InvalidState));
    assert_eq!(cancelled, Some(Kind::Cancelled));
    assert_eq!(file.metadata().unwrap().len(), 0);
    guest.until("line 200\n");
}

/// The generation ID of a guest that booted without firmware, as its file has it.
pub(crate) fn generation(file: &File) -> [u8; 16] {
    let saved = Saved::open(file.try_clone().unwrap()).unwrap();
    let memory = saved.place(Section::Memory).unwrap();
    let mut id = [0; 16];
    let at = memory.offset + GENERATION_PAGE + GENERATION_OFFSET;
    file.read_exact_at(&mut id, at).unwrap();
    id
}

#[test]
fn the_second_that_goes_on_from_a_file_has_a_generation_of_its_own() {
    requires_kvm!();
    let first = file();
    let mut guest = run("echo", json!({}));
    guest.until("ready");
    guest.save_and_end(&first);
    let id = generation(&first);
    assert_ne!(id, [0; 16]);
    let generation_of_next = |from: &File| {
        let next = file();
        let mut guest = restored(from, "echo", json!({})).unwrap();
        guest.save_and_end(&next);
        generation(&next)
    };
    assert_eq!(generation_of_next(&first), id, "nobody else has that past");
    let second = generation_of_next(&first);
    let third = generation_of_next(&first);
    assert!(id != second && id != third && second != third);
    // One that cannot be marked as used may have been used.
    let other = file();
    let mut guest = run("echo", json!({}));
    guest.until("ready");
    guest.save_and_end(&other);
    let path = format!("/proc/self/fd/{}", other.as_raw_fd());
    let only_readable = File::open(path).unwrap();
    assert_ne!(generation_of_next(&only_readable), generation(&other));
}

#[test]
fn firmware_goes_on_with_the_variables_that_it_had() {
    requires_seabios!();
    let directory = Directory::new("seabios-saved");
    let disk = bootable(&directory.0, "booted", false);
    let path = directory.0.join("booted");
    let variables = |byte: u8| {
        let variables = file();
        variables.write_all_at(&[byte; 64 << 10], 0).unwrap();
        variables
    };
    let machine = |disk: Value, variables: &File| {
        let code = fd(SEABIOS);
        let firmware =
            json!({ "code_fd": code, "variables_fd": copy(variables), "boot": ["disk/booted"] });
        json!({ "kernel": null, "disks": [disk], "firmware": firmware })
    };
    let (file, first, second) = (file(), variables(1), variables(2));
    let mut guest = run("", machine(disk, &first));
    guest.until("SeaBIOS");
    guest.save_and_end(&file);
    assert!(!guest.drain().contains("booted"), "it was too quick");
    let image = fd(&path);
    let again =
        json!({ "id": "booted", "layers": [{ "fd": image, "format": "raw" }], "read_only": true });
    let error = restored(&file, "", machine(again, &second)).err().unwrap();
    assert_eq!(error.argument, "disk/booted", "{error}");
    let mut byte = [0];
    second.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [2], "a refusal changes nothing");

    let disk = File::options().read(true).write(true).open(&path).unwrap();
    let again =
        json!({ "id": "booted", "layers": [{ "fd": disk.into_raw_fd(), "format": "raw" }] });
    let mut guest = go_on(&file, "", machine(again, &second));
    guest.until("booted");
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
    second.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn a_network_interface_goes_on_with_another_tap() {
    requires_kvm!();
    let Some(fds) = tap(2) else {
        return;
    };
    let file = file();
    let mut guest = run("net-echo count=100", nic(&fds));
    begun(&mut guest, 1);
    assert_eq!(ping(2, 1000), 2);
    guest.save_and_end(&file);
    drop(guest);
    // In a network of its own again, with nothing but its name in common with the one before.
    let fds = tap(2).unwrap();
    let mut guest = go_on(&file, "net-echo count=100", nic(&fds));
    // The guest has said nothing here.
    learnt();
    assert_eq!(ping(2, 1000), 2);
    assert_eq!(guest.must(Request::Pause), [Event::Paused]);
}

/// A clone of the machine in the file, which is only read.
fn cloned(file: &File, cmdline: &str, mut change: Value) -> Result<Running, Error> {
    let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    change["restore"] = true.into();
    change["clone_fd"] = read_only.into_raw_fd().into();
    let guest = build(cmdline, change)?;
    let from = RestoreFrom {
        fd: None,
        changed_disks: true,
        revert: None,
    };
    guest.machine.restore(1002, &from).unwrap();
    guest.answer(1002).0.map(|_| guest)
}

#[test]
fn clones_go_on_from_one_file_each_with_memory_and_a_generation_of_its_own() {
    requires_kvm!();
    let (file, disk) = (file(), disk());
    let mode = "disk-loop sector=0 count=64 beat=50";
    let mut guest = run(mode, with_disk(&disk));
    guest.until("loop: beat");
    guest.save_and_end(&file);
    let before = whole(&file);
    let mut generations = vec![generation(&file)];
    for _ in 0..2 {
        let mut clone = cloned(&file, mode, with_disk(&disk)).unwrap();
        assert_eq!(clone.must(Request::Resume), [Event::Running]);
        clone.until("loop: beat");
        assert!(!clone.drain().contains("begins"));
        // It is a machine like any other.
        let again = self::file();
        clone.save_and_end(&again);
        generations.push(generation(&again));
        go_on(&again, mode, with_disk(&disk)).until("loop: beat");
    }
    generations.sort_unstable();
    generations.dedup();
    assert_eq!(generations.len(), 3);
    assert!(whole(&file) == before, "what clones write is their own");
}

fn whole(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_clone_of_a_file_whose_header_state_or_index_is_damaged_never_runs() {
    requires_kvm!();
    let file = file();
    let mut guest = run("echo", json!({}));
    guest.until("ready");
    guest.save_and_end(&file);
    let saved = Saved::open(file.try_clone().unwrap()).unwrap();
    let mut places = vec![20];
    for kind in [Section::Facts, Section::State, Section::Index] {
        let place = saved.place(kind).unwrap();
        places.extend([place.offset, place.offset + place.len / 2]);
    }
    for place in places {
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], place).unwrap();
        let error = cloned(&file, "echo", json!({})).err().unwrap();
        assert_eq!(error.kind, Kind::ImageInvalid, "at {place}: {error}");
        file.write_all_at(&byte, place).unwrap();
    }
    let refused = |change: Value| cloned(&file, "echo", change).err().unwrap();
    let error = refused(json!({ "memory": 65 * MIB }));
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Kind::InvalidArgument, "memory")
    );
    let error = refused(json!({ "locked": true }));
    assert_eq!(error.argument, "clone_fd");
    cloned(&file, "echo", json!({})).unwrap();
}
