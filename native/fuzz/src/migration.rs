// SPDX-License-Identifier: Apache-2.0
//! What a hostile source sends to a machine that is received: records, after the socket and before the devices.
//!
//! The first byte chooses the version, and whether the input is the stream as it is or describes one: a byte for each record's
//! kind, and its place, its length and what fills it, with checksum and number as they should be unless a
//! bit of the kind says otherwise. Checked are: nothing panics, memory is bounded, nothing is written beyond RAM or the disk,
//! both hold what the accepted records say, and the disk is as sound as before.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::{check, create_qcow2, CreateOptions, Disk, Format, Repair};
use vmbus_vmm::config::MemoryKind;
use vmbus_vmm::memory::{create, Plan};
use vmbus_vmm::migrate::copies::Targets;
use vmbus_vmm::migrate::receive::{Intake, Next};
use vmbus_vmm::migrate::stream::{Header, Kind, COPIES, HEADER, PLAIN};
use vmbus_vmm::save::facts::Facts;

use crate::disk::{file, open, CACHE};
use crate::input::Input;
use crate::memory::{bounded, LIMIT};

const RAM: u64 = 1 << 20;
const DISK: u64 = 1 << 20;
const CODE: u64 = 64;
/// In the order of what is chosen by a byte; those that a stream is made of come first.
const KINDS: [Kind; 12] = [
    Kind::Pages,
    Kind::Zeros,
    Kind::Disk,
    Kind::Blocks,
    Kind::Holes,
    Kind::Round,
    Kind::Still,
    Kind::Code,
    Kind::Last,
    Kind::Go,
    Kind::Facts,
    Kind::Copies,
];
const FACTS: &str = r#"{"hardware":{"machine_type":"vmbus-1","cpu_model":"x86-64-v2-intel-1","cpuid":[],"vcpus":1,
    "memory":1048576,"firmware":true},"uuid":"","devices":{},"saved_at":0,"version":""}"#;
const LIST: &str = r#"{"disks":[{"id":"disk/root","size":1048576}]}"#;
const LAST: &str = r#"{"states":{"vcpus":[],"platform":{"irqchips":[],"pit":"","clock":null,"parts":{}},"devices":{}},
    "at":1,"paused":false}"#;

/// The stream that an input describes.
fn described(input: &mut Input<'_>, version: u32) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut number = 0;
    let mut put = |kind, at, body: &[u8], spoilt: bool| {
        let mut bytes = Header::of(kind, number, at, body).bytes();
        number += 1;
        if spoilt {
            bytes[4] ^= 1;
        }
        stream.extend(bytes);
        stream.extend(body);
    };
    put(Kind::Facts, (0, 0), FACTS.as_bytes(), false);
    if version == COPIES {
        put(Kind::Copies, (0, 0), LIST.as_bytes(), false);
    }
    put(Kind::Code, (0, 0), &[3; CODE as usize], false);
    while !input.is_empty() {
        let choice = input.number(1);
        let kind = KINDS[(choice & 0x3f) as usize % KINDS.len()];
        let unit = match kind {
            Kind::Pages | Kind::Zeros => 4096,
            _ => 512,
        };
        // Beyond the end, now and then.
        let place = input.number(2) % (RAM / unit + 2) * unit;
        let len = (input.number(1) % 16 + 1) * unit;
        let filled = vec![input.number(1) as u8; len as usize];
        let spoilt = choice >= 0xf8;
        match kind {
            Kind::Pages | Kind::Blocks => put(kind, (place, len), &filled, spoilt),
            // The end of everything, if the top bit says so.
            Kind::Zeros | Kind::Holes if choice & 0x40 != 0 => {
                put(kind, (!(unit - 1), len), &[], spoilt);
            }
            Kind::Zeros | Kind::Holes => put(kind, (place, len), &[], spoilt),
            Kind::Disk => put(kind, (choice >> 6, 0), &[], spoilt),
            Kind::Round => put(kind, (0, len), &[], spoilt),
            Kind::Code => put(kind, (0, 0), &filled[..CODE as usize], spoilt),
            Kind::Facts => put(kind, (0, 0), FACTS.as_bytes(), spoilt),
            Kind::Copies => put(kind, (0, 0), LIST.as_bytes(), spoilt),
            Kind::Last => put(kind, (0, 0), LAST.as_bytes(), spoilt),
            _ => put(kind, (0, 0), &[], spoilt),
        }
    }
    stream
}

/// What RAM and the disk should hold.
struct Model {
    ram: Vec<u8>,
    disk: Vec<u8>,
    /// What of RAM a record that was refused may have written to before its end was seen: the machine never runs.
    spoilt: Range<usize>,
}

impl Model {
    /// A record was accepted.
    fn take(&mut self, header: &Header, body: &[u8]) {
        let (at, len) = (header.place as usize, header.bytes as usize);
        match header.kind {
            Kind::Pages => self.ram[at..][..len].copy_from_slice(body),
            Kind::Zeros => self.ram[at..][..len].fill(0),
            Kind::Blocks => self.disk[at..][..len].copy_from_slice(body),
            Kind::Holes => self.disk[at..][..len].fill(0),
            _ => {}
        }
    }

    /// A record was refused.
    fn refuse(&mut self, header: &Header) {
        if matches!(header.kind, Kind::Pages | Kind::Zeros) {
            let clip = |at: u64| at.min(RAM) as usize;
            self.spoilt = clip(header.place)..clip(header.place.saturating_add(header.bytes));
        }
    }
}

/// Takes a stream in, up to the first record that is refused.
fn take(intake: &mut Intake<'_>, mut stream: &[u8], model: &mut Model) {
    for number in 0.. {
        let Some((header, rest)) = stream.split_first_chunk::<HEADER>() else {
            return;
        };
        let Ok(header) = Header::parse(header) else {
            return;
        };
        let Some(body) = rest.get(..header.len as usize) else {
            return;
        };
        if header.check(number, body).is_err() {
            return;
        }
        match intake.take(&header, body) {
            Ok(Next::Sync) => intake.sync().expect("sync"),
            Ok(Next::Go) => return,
            Err(_) => return model.refuse(&header),
            Ok(_) => model.take(&header, body),
        }
        stream = &rest[body.len()..];
    }
}

/// The target.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let first = input.number(1);
    let version = if first & 1 == 0 { COPIES } else { PLAIN };
    let stream = match first & 2 {
        0 => described(&mut input, version),
        _ => input.rest().to_vec(),
    };
    let memory = create(&Plan::of(MemoryKind::Mergeable, RAM), None).expect("RAM");
    let format = [Format::Raw, Format::Qcow2][usize::from(first & 4 != 0)];
    let disk = file(&[]);
    match format {
        Format::Raw => disk.set_len(DISK).expect("ftruncate"),
        Format::Qcow2 => {
            let options = CreateOptions {
                size: DISK,
                cluster_size: 4096,
                ..CreateOptions::default()
            };
            create_qcow2(&disk, None, &options).expect("create");
        }
    }
    let image = open(&disk, format, false).expect("open");
    let own: Facts = serde_json::from_str(FACTS).expect("facts");
    let expected = [(Kind::Code, CODE)];
    let mut model = Model {
        ram: vec![0; RAM as usize],
        disk: vec![0; DISK as usize],
        spoilt: 0..0,
    };
    bounded("a stream", LIMIT + CACHE, || {
        let wanted = match version {
            COPIES => vec![("disk/root".to_owned(), Arc::clone(&image))],
            _ => Vec::new(),
        };
        let targets = Targets::of(wanted).expect("targets");
        let mut intake = Intake::new(&memory, (&own, &expected), (targets, &[]), version);
        take(&mut intake, &stream, &mut model);
    });
    let mut found = vec![0; RAM as usize];
    memory
        .read_slice(&mut found, GuestAddress(0))
        .expect("read RAM");
    found[model.spoilt.clone()].copy_from_slice(&model.ram[model.spoilt.clone()]);
    assert!(found == model.ram, "RAM is not what came");
    let mut reader = Disk::blocking(Arc::clone(&image)).expect("reader");
    reader.read(0, &mut found).expect("read the disk");
    assert!(found == model.disk, "the disk is not what came");
    drop(reader);
    image.inactivate().expect("inactivate");
    if format == Format::Qcow2 {
        let report = check(&disk, Repair::None, false).expect("check");
        assert_eq!(report.corruptions, 0, "{:?}", report.messages);
    }
}
