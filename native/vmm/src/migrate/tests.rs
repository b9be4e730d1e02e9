// SPDX-License-Identifier: Apache-2.0
//! The stream without machines: what may come, what may not, and what comes of a far side that does nothing.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};

use super::copies::Targets;
use super::link::Link;
use super::receive::{Intake, Next};
use super::stream::{Header, Kind, COPIES, HEADER, PAGES_MAX, PLAIN};
use super::Order;
use crate::error::{Error, Kind as Trouble, Result};
use crate::layout::HIGH_RAM_START;
use crate::mailbox::Queue;
use crate::memory::{GuestMemoryMmap, PAGE};
use crate::save::facts::Facts;
use crate::virtio::fuzz::random::Random;
use crate::virtio::fuzz::seeds::{seeds, within_a_minute};
use crate::virtio::rig::{image, nameless_file, DISK_BYTES};

const MIB: u64 = 1 << 20;
const CODE: [u8; 300] = [3; 300];

fn memory() -> GuestMemoryMmap {
    let low = (GuestAddress(0), MIB as usize);
    GuestMemoryMmap::from_ranges(&[low, (GuestAddress(HIGH_RAM_START), MIB as usize)]).unwrap()
}

fn facts() -> Facts {
    serde_json::from_value(json!({
        "hardware": {
            "machine_type": "vmbus-1", "cpu_model": "x86-64-v2-intel-1", "cpuid": [], "vcpus": 1,
            "memory": 2 * MIB, "firmware": true,
        },
        "uuid": "", "devices": {}, "saved_at": 0, "version": "",
    }))
    .unwrap()
}

fn last() -> Vec<u8> {
    let platform = json!({ "irqchips": [], "pit": "", "clock": null, "parts": {} });
    let states = json!({ "vcpus": [], "platform": platform, "devices": {} });
    json!({ "states": states, "at": 1, "paused": false })
        .to_string()
        .into_bytes()
}

/// A record: what, where in RAM, and its body.
type Record = (Kind, (u64, u64), Vec<u8>);

type Change<'a> = &'a dyn Fn(&mut Vec<Record>);

/// Those of a machine that comes as it should.
fn lawful() -> Vec<Record> {
    vec![
        (Kind::Facts, (0, 0), serde_json::to_vec(&facts()).unwrap()),
        (Kind::Code, (0, 0), CODE.to_vec()),
        (Kind::Zeros, (0, MIB), Vec::new()),
        (Kind::Pages, (MIB, 2 * PAGE), vec![9; 2 * PAGE as usize]),
        (Kind::Zeros, (MIB - PAGE, 2 * PAGE), Vec::new()),
        (Kind::Round, (0, PAGE), Vec::new()),
        (Kind::Still, (0, 0), Vec::new()),
        (
            Kind::Pages,
            (MIB - PAGE, 2 * PAGE),
            vec![7; 2 * PAGE as usize],
        ),
        (Kind::Last, (0, 0), last()),
        (Kind::Go, (0, 0), Vec::new()),
    ]
}

fn bytes(records: &[Record]) -> Vec<u8> {
    let numbered = records.iter().zip(0..);
    let each = numbered.map(|((kind, ram, body), number)| {
        let header = Header::of(*kind, number, *ram, body);
        [&header.bytes()[..], body].concat()
    });
    each.collect::<Vec<_>>().concat()
}

/// Takes a stream in as the destination does; whether it got so far as to run.
fn take(memory: &GuestMemoryMmap, stream: &[u8]) -> Result<bool> {
    take_with(memory, Targets::default(), PLAIN, stream)
}

/// The same of a stream of this version, with these disks to be written.
fn take_with(
    memory: &GuestMemoryMmap,
    targets: Targets,
    version: u32,
    mut stream: &[u8],
) -> Result<bool> {
    let (own, expected) = (facts(), [(Kind::Code, CODE.len() as u64)]);
    let mut intake = Intake::new(memory, (&own, &expected), (targets, &[]), version);
    for number in 0.. {
        let Some((header, rest)) = stream.split_first_chunk::<HEADER>() else {
            return Ok(false);
        };
        let header = Header::parse(header)?;
        let Some(body) = rest.get(..header.len as usize) else {
            return Ok(false);
        };
        header.check(number, body)?;
        stream = &rest[body.len()..];
        match intake.take(&header, body)? {
            Next::Go => return Ok(true),
            Next::Sync | Next::Load(..) => intake.sync()?,
            Next::More | Next::Accept => {}
        }
    }
    unreachable!("a stream has an end")
}

fn word(memory: &GuestMemoryMmap, address: u64) -> u16 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn pages_come_where_they_belong_across_the_hole() {
    let memory = memory();
    assert!(take(&memory, &bytes(&lawful())).unwrap());
    let found = [
        0,
        MIB - PAGE - 2,
        MIB - PAGE,
        MIB - 2,
        HIGH_RAM_START,
        HIGH_RAM_START + PAGE,
    ];
    let found = found.map(|address| word(&memory, address));
    assert_eq!(found, [0, 0, 0x0707, 0x0707, 0x0707, 0x0909]);
    assert_eq!(word(&memory, HIGH_RAM_START + 2 * PAGE), 0);
}

#[test]
fn what_does_not_belong_where_it_comes_is_refused() {
    let refused = |change: Change| {
        let mut records = lawful();
        change(&mut records);
        take(&memory(), &bytes(&records)).map(|_| ()).unwrap_err()
    };
    let damaged: [Change; 11] = [
        &|r| drop(r.remove(0)),
        &|r| r.insert(1, r[0].clone()),
        // Firmware twice, not at all, or what the machine does not have.
        &|r| r.insert(2, r[1].clone()),
        &|r| drop(r.remove(1)),
        &|r| drop(r.remove(8)),
        &|r| r.insert(1, (Kind::Go, (0, 0), Vec::new())),
        &|r| r.insert(9, r[3].clone()),
        // Beyond RAM, and around its end.
        &|r| r[2].1 = (2 * MIB, PAGE),
        &|r| r[2].1 = (MIB, MIB + PAGE),
        &|r| r[2].1 = (!(PAGE - 1), 2 * PAGE),
        &|r| r[8].2.truncate(5),
    ];
    for (number, change) in damaged.iter().enumerate() {
        assert_eq!(
            refused(change).kind,
            Trouble::ImageInvalid,
            "change {number}"
        );
    }
    for kind in [Kind::Accepted, Kind::Running, Kind::Refused] {
        let error = refused(&|r| r.insert(2, (kind, (0, 0), Vec::new())));
        assert_eq!(error.kind, Trouble::ImageInvalid, "{kind:?}");
    }
    let error = refused(&|r| r[1].2.push(3));
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Trouble::InvalidArgument, "firmware")
    );
    let error = refused(&|r| r[1].0 = Kind::Rom);
    assert_eq!(error.argument, "firmware");
    let error = refused(&|r| {
        let other = json!({ "vcpus": 1 }).to_string();
        r[0].2 = other.into_bytes();
    });
    assert_eq!(error.kind, Trouble::ImageInvalid);
}

#[test]
fn random_streams_harm_nothing() {
    within_a_minute(random_streams);
}

/// Records that are mostly lawful: RAM is what they say, nothing else is, and none of it panics.
fn random_streams() {
    let (mut ran, mut refused) = (0, 0);
    for seed in seeds(200) {
        let mut random = Random(seed.wrapping_mul(0xa076_1d64_78bd_642f));
        let memory = memory();
        let mut model = vec![0u8; 2 * MIB as usize];
        let mut records = lawful();
        for _ in 0..random.below(6) {
            let place = 2 + random.below(records.len() as u64 - 3) as usize;
            let ram = (random.below(520) * PAGE, (1 + random.below(8)) * PAGE);
            let record = match random.below(8) {
                0 => (Kind::Zeros, ram, Vec::new()),
                1 => (Kind::Zeros, (random.number(), random.number()), Vec::new()),
                2 => records[random.below(records.len() as u64) as usize].clone(),
                _ => (Kind::Pages, ram, vec![random.next() as u8; ram.1 as usize]),
            };
            records.insert(place, record);
        }
        let mut stream = bytes(&records);
        let spoilt = random.one_in(3);
        if spoilt {
            match random.below(3) {
                0 => stream.truncate(random.below(stream.len() as u64) as usize),
                1 => {
                    let at = random.below(stream.len() as u64) as usize;
                    stream[at] ^= 1 << random.below(8);
                }
                _ => drop(stream.remove(random.below(stream.len() as u64) as usize)),
            }
        }
        match take(&memory, &stream) {
            Ok(true) => {
                assert!(!spoilt, "seed {seed}: a spoilt stream ran");
                for (kind, (place, len), body) in &records {
                    let there = *place as usize..(place + len) as usize;
                    match kind {
                        Kind::Pages => model[there].copy_from_slice(body),
                        Kind::Zeros => model[there].fill(0),
                        _ => {}
                    }
                }
                let mut found = vec![0; MIB as usize];
                for (begin, half) in [0, HIGH_RAM_START].iter().zip(model.chunks(MIB as usize)) {
                    memory.read_slice(&mut found, GuestAddress(*begin)).unwrap();
                    assert!(found == half, "seed {seed}");
                }
                ran += 1;
            }
            _ => refused += 1,
        }
    }
    assert!(ran > 0 && refused > 0, "{ran} ran, {refused} were refused");
}

/// The records of a source that sends what is on a disk of [`DISK_BYTES`], too.
fn lawful_with_a_disk() -> Vec<Record> {
    let mut records = lawful();
    let list = json!({ "disks": [{ "id": "disk/root", "size": DISK_BYTES }] });
    records.insert(1, (Kind::Copies, (0, 0), list.to_string().into_bytes()));
    let disk = [
        (Kind::Disk, (0, 0), Vec::new()),
        (Kind::Blocks, (0x1000, 0x2000), vec![5; 0x2000]),
        (Kind::Holes, (0x2000, 0x1000), Vec::new()),
        (Kind::Round, (0, 0), Vec::new()),
        (Kind::Blocks, (DISK_BYTES - 512, 512), vec![6; 512]),
    ];
    records.splice(5..5, disk);
    records
}

/// A disk that has something on it already, and what is written there with what comes.
fn old_disk() -> (std::fs::File, Targets) {
    let file = nameless_file();
    file.write_all_at(&vec![1; DISK_BYTES as usize], 0).unwrap();
    let image = image(file.try_clone().unwrap(), false);
    let targets = Targets::of(vec![("disk/root".to_owned(), image)]).unwrap();
    (file, targets)
}

#[test]
fn what_is_on_a_disk_comes_where_it_belongs() {
    let (file, targets) = old_disk();
    let stream = bytes(&lawful_with_a_disk());
    assert!(take_with(&memory(), targets, COPIES, &stream).unwrap());
    let mut found = vec![0; DISK_BYTES as usize];
    file.read_exact_at(&mut found, 0).unwrap();
    let mut wanted = vec![1; DISK_BYTES as usize];
    wanted[0x1000..0x2000].fill(5);
    wanted[0x2000..0x3000].fill(0);
    wanted[DISK_BYTES as usize - 512..].fill(6);
    assert!(found == wanted);
}

#[test]
fn what_is_behind_a_smaller_disk_becomes_zeros() {
    let (file, targets) = old_disk();
    let mut records = lawful_with_a_disk();
    let half = DISK_BYTES / 2;
    let list = json!({ "disks": [{ "id": "disk/root", "size": half }] });
    records[1].2 = list.to_string().into_bytes();
    records[9].1 = (half - 512, 512);
    assert!(take_with(&memory(), targets, COPIES, &bytes(&records)).unwrap());
    let mut found = vec![7; DISK_BYTES as usize];
    file.read_exact_at(&mut found, 0).unwrap();
    let (disk, behind) = found.split_at(half as usize);
    assert!(disk.ends_with(&[6; 512]));
    assert!(behind.iter().all(|byte| *byte == 0));
    // It has no byte there.
    records[9].1 = (half - 256, 512);
    let (_file, targets) = old_disk();
    let error = take_with(&memory(), targets, COPIES, &bytes(&records)).unwrap_err();
    assert_eq!(error.kind, Trouble::ImageInvalid);
}

#[test]
fn what_does_not_belong_on_a_disk_is_refused() {
    let refused = |version: u32, change: Change| {
        let (_file, targets) = old_disk();
        let mut records = lawful_with_a_disk();
        change(&mut records);
        let taken = take_with(&memory(), targets, version, &bytes(&records));
        taken.map(|_| ()).unwrap_err()
    };
    let listed = |disks: serde_json::Value| {
        let body = json!({ "disks": disks }).to_string().into_bytes();
        (Kind::Copies, (0, 0), body)
    };
    let damaged: [Change; 9] = [
        // Not announced, announced twice or too late, or a disk that there is not.
        &|r| drop(r.remove(1)),
        &|r| r.insert(2, r[1].clone()),
        &|r| r.swap(1, 2),
        &|r| r[5].1 .0 = 1,
        &|r| r[5].1 .0 = u64::MAX,
        &|r| drop(r.remove(5)),
        // Beyond its end, and around the end of everything.
        &|r| r[6].1 .0 = DISK_BYTES - 0x1000,
        &|r| r[7].1 = (u64::MAX - 1, 4),
        &|r| r[7].1 = (0, u64::MAX),
    ];
    for (number, change) in damaged.iter().enumerate() {
        let error = refused(COPIES, change);
        assert_eq!(
            error.kind,
            Trouble::ImageInvalid,
            "change {number}: {error}"
        );
    }
    let about = |change: Change| {
        let error = refused(COPIES, change);
        (error.kind, error.argument)
    };
    let invalid = |argument: &str| (Trouble::InvalidArgument, argument.to_owned());
    let size = DISK_BYTES;
    assert_eq!(about(&|r| r[1] = listed(json!([]))), invalid("copy"));
    let twice = json!([{ "id": "disk/root", "size": size }, { "id": "disk/root", "size": size }]);
    assert_eq!(about(&|r| r[1] = listed(twice.clone())), invalid("copy"));
    let other = json!([{ "id": "disk/data", "size": size }]);
    assert_eq!(about(&|r| r[1] = listed(other.clone())), invalid("copy"));
    // Larger than the image here, and smaller than what comes then.
    let larger = json!([{ "id": "disk/root", "size": size + 512 }]);
    assert_eq!(
        about(&|r| r[1] = listed(larger.clone())),
        invalid("disk/root")
    );
    // A source that does not know of copies.
    let error = refused(PLAIN, &|_| {});
    assert_eq!((error.kind, error.argument), invalid("copy"));
    // A destination that does not want any.
    let stream = bytes(&lawful_with_a_disk());
    let error = take_with(&memory(), Targets::default(), COPIES, &stream).unwrap_err();
    assert_eq!((error.kind, error.argument), invalid("copy"));
}

#[test]
fn random_streams_with_disks_harm_nothing() {
    within_a_minute(random_streams_with_disks);
}

/// Disks are what the records say up to the first that is refused, and nothing panics.
fn random_streams_with_disks() {
    let (mut ran, mut refused) = (0, 0);
    for seed in seeds(100) {
        let mut random = Random(seed.wrapping_mul(0xd1b5_4a32_d192_ed03));
        let (file, targets) = old_disk();
        let mut records = lawful_with_a_disk();
        for _ in 0..random.below(8) {
            let place = 6 + random.below(records.len() as u64 - 8) as usize;
            let len = 1 + random.below(0x3000);
            let there = (random.below(DISK_BYTES - len), len);
            let record = match random.below(8) {
                0 => (Kind::Holes, there, Vec::new()),
                1 => (Kind::Holes, (random.number(), random.number()), Vec::new()),
                2 => (Kind::Disk, (random.below(2), 0), Vec::new()),
                3 => records[random.below(records.len() as u64) as usize].clone(),
                _ => (Kind::Blocks, there, vec![random.next() as u8; len as usize]),
            };
            records.insert(place, record);
        }
        let mut stream = bytes(&records);
        let spoilt = random.one_in(4);
        if spoilt {
            let at = random.below(stream.len() as u64) as usize;
            stream[at] ^= 1 << random.below(8);
        }
        match take_with(&memory(), targets, COPIES, &stream) {
            Ok(true) => {
                assert!(!spoilt, "seed {seed}: a spoilt stream ran");
                let mut model = vec![1; DISK_BYTES as usize];
                for (kind, (place, len), body) in &records {
                    let there = *place as usize..(place + len) as usize;
                    match kind {
                        Kind::Blocks => model[there].copy_from_slice(body),
                        Kind::Holes => model[there].fill(0),
                        _ => {}
                    }
                }
                let mut found = vec![0; DISK_BYTES as usize];
                file.read_exact_at(&mut found, 0).unwrap();
                assert!(found == model, "seed {seed}");
                ran += 1;
            }
            _ => refused += 1,
        }
    }
    assert!(ran > 0 && refused > 0, "{ran} ran, {refused} were refused");
}

#[test]
fn an_error_of_a_disk_is_told_by_its_name() {
    let file = nameless_file();
    let read_only = image(file, true);
    let targets = Targets::of(vec![("disk/root".to_owned(), read_only)]).unwrap();
    let stream = bytes(&lawful_with_a_disk());
    let error = take_with(&memory(), targets, COPIES, &stream).unwrap_err();
    assert_eq!(error.argument, "disk/root");
    // It cannot be written to.
    let file = nameless_file();
    let image = image(file.try_clone().unwrap(), false);
    let targets = Targets::of(vec![("disk/root".to_owned(), image)]).unwrap();
    // SAFETY: a number for a file of ours.
    let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
    assert_eq!(sealed, 0);
    let error = take_with(&memory(), targets, COPIES, &stream).unwrap_err();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Trouble::Unavailable, "disk/root")
    );
}

fn pair() -> (Link, UnixStream, Arc<Queue<Order>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let orders = Arc::new(Queue::new().unwrap());
    let link = Link::new(ours.into(), Arc::clone(&orders)).unwrap();
    (link, theirs, orders)
}

#[test]
fn a_far_side_that_does_nothing_counts_as_gone() {
    let patience = Duration::from_millis(50);
    let (link, mut theirs, _orders) = pair();
    let mut link = link.with_patience(patience);
    // A part of a record is not one.
    theirs.write_all(&[1; 20]).unwrap();
    let begin = Instant::now();
    assert_eq!(link.take().unwrap_err().kind, Trouble::Disconnected);
    assert!(begin.elapsed() >= patience);
    // Nobody reads.
    let room = vec![1; PAGES_MAX as usize];
    for _ in 0..8 {
        link.put(Kind::Pages, (0, PAGES_MAX), &room);
    }
    let error = link.flush(Duration::from_millis(10), || ()).unwrap_err();
    assert_eq!(error.kind, Trouble::Disconnected);
    assert!(error.message.contains("took nothing"), "{error}");
}

#[test]
fn an_order_to_stop_is_heard_whatever_is_waited_for_until_it_is_too_late() {
    let stop = || Order::Cancel(Error::new(Trouble::Cancelled, "", "stop"));
    let (mut link, mut theirs, orders) = pair();
    let later = Arc::clone(&orders);
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        later.push(stop());
    });
    assert_eq!(link.take().unwrap_err().kind, Trouble::Cancelled);
    thread.join().unwrap();
    link.put(Kind::Still, (0, 0), &[]);
    orders.push(stop());
    let error = link.flush(Duration::from_millis(10), || ()).unwrap_err();
    assert_eq!(error.kind, Trouble::Cancelled);
    link.ignore_orders();
    orders.push(stop());
    link.flush(Duration::from_millis(10), || ()).unwrap();
    theirs
        .write_all(&Header::of(Kind::Running, 0, (0, 0), &[]).bytes())
        .unwrap();
    orders.push(stop());
    assert_eq!(link.take().unwrap().0.kind, Kind::Running);
    // The end of the machine is heard all the same.
    orders.push(Order::Exit);
    assert!(link.take().is_err() && link.exits());
}

#[test]
fn what_the_far_side_said_before_it_left_is_what_is_told() {
    let (mut link, mut theirs, _orders) = pair();
    let why = Error::new(Trouble::InUse, "disk/root", "somebody has it");
    let body = super::Refusal::bytes(&why);
    let header = Header::of(Kind::Refused, 0, (0, 0), &body).bytes();
    theirs.write_all(&[&header[..], &body].concat()).unwrap();
    drop(theirs);
    link.put(Kind::Still, (0, 0), &[]);
    let error = link.flush(Duration::from_millis(10), || ()).unwrap_err();
    assert_eq!(
        (error.kind, error.argument.as_str()),
        (Trouble::InUse, "disk/root")
    );
    assert!(error.message.ends_with("somebody has it"), "{error}");
}
