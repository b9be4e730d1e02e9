// SPDX-License-Identifier: Apache-2.0
//! Snapshots of whole machines: memory in a file, disks in themselves, all or none.

use std::fs::File;
use std::sync::Arc;

use serde_json::{json, Value};
use vmbus_qcow2::{
    create_qcow2, snapshot, CreateOptions, Disk, Format, Image, LayerFiles, OpenOptions,
};
use vmbus_vmm::config::{ChangeKind, DeviceChange, RestoreFrom, Revert, SaveTo};
use vmbus_vmm::snapshots::Tidy;
use vmbus_vmm::{Error, Event, Kind, Request};

use crate::save::{copy, file, generation, small_disk};
use crate::{build, requires_kvm, run, Running};

const MODE: &str = "disk-loop sector=0 count=64 beat=50";

fn qcow2() -> File {
    let disk = file();
    let options = CreateOptions {
        size: 1 << 20,
        ..CreateOptions::default()
    };
    create_qcow2(&disk, None, &options).unwrap();
    disk
}

/// A machine with these disks, the first of which its guest writes to.
fn with(disks: &[(&str, &File, &str)]) -> Value {
    let disks: Vec<Value> = disks
        .iter()
        .map(|(id, file, format)| {
            json!({ "id": id, "layers": [{ "fd": copy(file), "format": format }] })
        })
        .collect();
    json!({ "disks": disks })
}

fn open(disk: &File, read_only: bool) -> Arc<Image> {
    let layer = LayerFiles {
        format: Format::Qcow2,
        file: disk.try_clone().unwrap(),
        data_file: None,
        backing_name: None,
        data_name: None,
        secret: None,
    };
    let options = OpenOptions {
        read_only,
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(vec![layer], options).unwrap();
    image.activate().unwrap();
    Arc::new(image)
}

fn names(disk: &File) -> Vec<String> {
    let list = snapshot::list(&open(disk, true)).unwrap();
    list.into_iter().map(|snapshot| snapshot.name).collect()
}

/// The newest number that the guest has written.
fn newest(disk: &File) -> u64 {
    let mut disk = Disk::new(open(disk, true)).unwrap();
    let mut word = [0; 8];
    let sectors = (0..64).map(|sector| {
        disk.read(sector * 512, &mut word).unwrap();
        u64::from_le_bytes(word)
    });
    sectors.max().unwrap()
}

fn snapshot(guest: &mut Running, file: &File, name: &str) -> (Result<Value, Error>, Vec<Event>) {
    let to = SaveTo {
        fd: copy(file),
        end: false,
        snapshot: Some(name.to_owned()),
    };
    guest.machine.save(2000, &to).unwrap();
    guest.answer(2000)
}

/// A snapshot that fails, for `argument`: nothing is in its file, and the guest goes on.
fn refused_snapshot(mut guest: Running, kind: Kind, argument: &str) {
    let memory = file();
    let (result, events) = snapshot(&mut guest, &memory, "one");
    let error = result.unwrap_err();
    assert_eq!((error.kind, error.argument.as_str()), (kind, argument));
    assert_eq!(events, [Event::Paused, Event::Running]);
    assert_eq!(memory.metadata().unwrap().len(), 0);
    guest.wrote(0);
}

fn revert(file: &File, to: &str, machine: Value) -> Result<Running, Error> {
    revert_in(MODE, file, to, machine)
}

fn revert_in(mode: &str, file: &File, to: &str, mut machine: Value) -> Result<Running, Error> {
    machine["restore"] = true.into();
    let guest = build(mode, machine)?;
    let from = RestoreFrom {
        fd: Some(copy(file)),
        changed_disks: false,
        revert: Some(Revert {
            to: to.to_owned(),
            aside: "aside".to_owned(),
        }),
    };
    guest.machine.restore(2001, &from).unwrap();
    guest.answer(2001).0.map(|_| guest)
}

fn tidy(guest: &mut Running, undo: &[&str], drop: &[&str]) -> Result<Value, Error> {
    let all = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    let what = Tidy {
        undo: all(undo),
        drop: all(drop),
    };
    guest.machine.tidy(2002, what);
    let (result, _) = guest.answer_or_nothing(2002);
    result
}

impl Running {
    /// An answer that may be empty.
    fn answer_or_nothing(&mut self, id: u64) -> (Result<Value, Error>, Vec<Event>) {
        let mut before = Vec::new();
        loop {
            match self.event() {
                Event::Done { id: of, result } if of == id => {
                    return (result.map(|_| Value::Null), before);
                }
                event => before.push(event),
            }
        }
    }

    /// Until the guest has written so much more than `least`.
    fn wrote(&mut self, least: u64) -> u64 {
        loop {
            self.until("loop: beat");
            let text = self.drain();
            let beats = text
                .lines()
                .filter_map(|l| l.strip_prefix("loop: beat ")?.parse().ok());
            if let Some(beat) = beats.max().filter(|beat: &u64| *beat > least) {
                return beat;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn a_machine_goes_back_with_its_disks_and_has_another_generation() {
    requires_kvm!();
    let (root, data, memory) = (qcow2(), qcow2(), file());
    let machine = || with(&[("root", &root, "qcow2"), ("data", &data, "qcow2")]);
    let mut guest = run(MODE, machine());
    let beat = guest.wrote(100);
    let (result, events) = snapshot(&mut guest, &memory, "one");
    result.unwrap();
    assert_eq!(events, [Event::Paused, Event::Running]);
    guest.wrote(beat + 64);
    guest.must(Request::Pause);
    drop(guest);
    let later = newest(&root);
    assert_eq!(
        (names(&root), names(&data)),
        (vec!["one".to_owned()], vec!["one".to_owned()])
    );

    let mut guest = revert(&memory, "one", machine()).unwrap();
    tidy(&mut guest, &[], &["aside"]).unwrap();
    let again = file();
    snapshot(&mut guest, &again, "two").0.unwrap();
    assert_ne!(generation(&memory), generation(&again));
    drop(guest);
    assert!(
        newest(&root) < later,
        "the disk went on from where it was: {later}"
    );
    assert_eq!(names(&root), ["one", "two"]);
    // And to the second, whose disk is what it was.
    let mut guest = revert(&again, "two", machine()).unwrap();
    tidy(&mut guest, &[], &["aside", "one", "none"]).unwrap();
    guest.must(Request::Resume);
    guest.wrote(0);
    tidy(&mut guest, &[], &["two"]).unwrap();
    guest.wrote(0);
    drop(guest);
    assert_eq!((names(&root), names(&data)), (vec![], vec![]));
}

#[test]
fn a_raw_disk_is_refused_by_name_and_none_has_a_snapshot() {
    requires_kvm!();
    let (root, raw) = (qcow2(), file());
    raw.set_len(1 << 20).unwrap();
    let disks = [("root", &root, "qcow2"), ("data", &raw, "raw")];
    let mut guest = run(MODE, with(&disks));
    guest.wrote(100);
    refused_snapshot(guest, Kind::NotSupported, "disk/data");
    assert_eq!(names(&root), Vec::<String>::new());
}

#[test]
fn one_full_disk_leaves_the_others_and_the_machine_as_they_were() {
    requires_kvm!();
    let Some(directory) = small_disk() else {
        return;
    };
    let path = directory.join("data");
    let full = File::create_new(&path).unwrap();
    let options = CreateOptions {
        size: 1 << 20,
        cluster_size: 4096,
        ..CreateOptions::default()
    };
    create_qcow2(&full, None, &options).unwrap();
    // No room for another table.
    let filler = File::create_new(directory.join("filler")).unwrap();
    while std::io::Write::write(&mut &filler, &[1; 4096]).is_ok() {}
    let root = qcow2();
    let disks = [("root", &root, "qcow2"), ("data", &full, "qcow2")];
    let mut guest = run(MODE, with(&disks));
    guest.wrote(100);
    refused_snapshot(guest, Kind::Unavailable, "disk/data");
    assert_eq!((names(&root), names(&full)), (vec![], vec![]));
    let unmounted = std::process::Command::new("umount")
        .arg("-l")
        .arg(&directory)
        .status();
    assert!(unmounted.unwrap().success());
    std::fs::remove_dir(directory).unwrap();
}

#[test]
fn a_way_back_that_fails_or_is_broken_off_leaves_the_disks_as_they_were() {
    requires_kvm!();
    let (root, data, memory) = (qcow2(), qcow2(), file());
    let machine = || with(&[("root", &root, "qcow2"), ("data", &data, "qcow2")]);
    let mut guest = run(MODE, machine());
    let beat = guest.wrote(100);
    snapshot(&mut guest, &memory, "one").0.unwrap();
    guest.wrote(beat + 64);
    guest.must(Request::Pause);
    drop(guest);
    let later = newest(&root);
    // Somebody has deleted one of them.
    snapshot::delete(&open(&data, false), "one").unwrap();
    let error = revert(&memory, "one", machine()).err().unwrap();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Kind::Changed, "disk/data")
    );
    assert_eq!(
        (newest(&root), names(&root)),
        (later, vec!["one".to_owned()])
    );

    // What a worker leaves that is killed on its way: one disk is back, the other not yet.
    for disk in [&root, &data] {
        snapshot::create(&open(disk, false), "aside").unwrap();
    }
    let image = open(&root, false);
    snapshot::apply(&image, "one").unwrap();
    image.inactivate().unwrap();
    drop(image);
    assert!(newest(&root) < later);
    for _ in 0..2 {
        let mut waiting = machine();
        waiting["restore"] = true.into();
        let mut guest = build(MODE, waiting).unwrap();
        tidy(&mut guest, &["aside"], &["none"]).unwrap();
        drop(guest);
        assert_eq!(
            (newest(&root), names(&root)),
            (later, vec!["one".to_owned()])
        );
        assert_eq!(names(&data), Vec::<String>::new());
    }
}

#[test]
fn a_disk_that_has_grown_since_has_its_size_again() {
    requires_kvm!();
    let mode = format!("{MODE} sizes");
    let (root, memory) = (qcow2(), file());
    let machine = || with(&[("root", &root, "qcow2")]);
    let mut guest = run(&mode, machine());
    guest.until("loop: 2048 sectors");
    snapshot(&mut guest, &memory, "one").0.unwrap();
    let change = DeviceChange {
        device: "disk/root".to_owned(),
        change: ChangeKind::Size(2 << 20),
    };
    guest.machine.change(2003, change);
    guest.answer_or_nothing(2003).0.unwrap();
    guest.until("loop: 4096 sectors");
    guest.must(Request::Pause);
    drop(guest);

    let mut guest = revert_in(&mode, &memory, "one", machine()).unwrap();
    guest.must(Request::Resume);
    let said = guest.until("loop: 2048 sectors");
    assert!(!said.contains("4096"), "{said}");
    guest.must(Request::Pause);
    drop(guest);
    assert_eq!(open(&root, true).size(), 1 << 20);
}
