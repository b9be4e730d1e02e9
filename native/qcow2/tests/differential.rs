// SPDX-License-Identifier: Apache-2.0
//! Long random sequences on our engine and on qemu-io, in turn on the same image: after each turn
//! the content equals the model's for both, and `qemu-img check` finds nothing. The seed is printed;
//! VMBUS_SEED runs a sequence again.
#![allow(missing_docs)]

mod support;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::process::Command;

use smallvec::smallvec;
use support::{active, layer, qemu, run, Random, Scratch};
use vmbus_qcow2::{Completion, Engine, Format, LayerFiles, Op, OpenOptions, Request, Ring};

/// The disk's size; with clusters of 512 bytes that is 12288 of them, and more than one refcount
/// table.
const SIZE: u64 = 6 << 20;

/// One layout to be tested.
struct Case {
    name: &'static str,
    options: &'static str,
    backing: Option<Format>,
    data_file: bool,
}

const CASES: &[Case] = &[
    Case {
        name: "plain",
        options: "cluster_size=65536",
        backing: None,
        data_file: false,
    },
    Case {
        name: "v2",
        options: "compat=0.10",
        backing: None,
        data_file: false,
    },
    Case {
        name: "tiny-clusters",
        options: "cluster_size=512",
        backing: None,
        data_file: false,
    },
    Case {
        name: "tiny-clusters-1-bit",
        options: "cluster_size=512,refcount_bits=1",
        backing: None,
        data_file: false,
    },
    Case {
        name: "tiny-clusters-64-bit",
        options: "cluster_size=512,refcount_bits=64",
        backing: None,
        data_file: false,
    },
    Case {
        name: "4k-8-bit",
        options: "cluster_size=4096,refcount_bits=8",
        backing: None,
        data_file: false,
    },
    Case {
        name: "2m",
        options: "cluster_size=2097152",
        backing: None,
        data_file: false,
    },
    Case {
        name: "on-raw",
        options: "cluster_size=65536",
        backing: Some(Format::Raw),
        data_file: false,
    },
    Case {
        name: "on-qcow2",
        options: "cluster_size=4096,refcount_bits=32",
        backing: Some(Format::Qcow2),
        data_file: false,
    },
    Case {
        name: "v2-on-raw",
        options: "compat=0.10,cluster_size=8192",
        backing: Some(Format::Raw),
        data_file: false,
    },
    Case {
        name: "preallocated",
        options: "preallocation=metadata,cluster_size=16384",
        backing: None,
        data_file: false,
    },
    Case {
        name: "data-file",
        options: "data_file=data,cluster_size=32768",
        backing: None,
        data_file: true,
    },
    Case {
        name: "raw-data-file",
        options: "data_file=data,data_file_raw=on",
        backing: None,
        data_file: true,
    },
    Case {
        name: "subclusters",
        options: "extended_l2=on,cluster_size=16384",
        backing: None,
        data_file: false,
    },
    Case {
        name: "subclusters-on-raw",
        options: "extended_l2=on",
        backing: Some(Format::Raw),
        data_file: false,
    },
    Case {
        name: "subclusters-on-qcow2",
        options: "extended_l2=on,cluster_size=32768",
        backing: Some(Format::Qcow2),
        data_file: false,
    },
    Case {
        name: "subclusters-2m",
        options: "extended_l2=on,cluster_size=2097152",
        backing: Some(Format::Raw),
        data_file: false,
    },
    Case {
        name: "subclusters-data-file",
        options: "extended_l2=on,data_file=data",
        backing: None,
        data_file: true,
    },
    Case {
        name: "subclusters-preallocated",
        options: "extended_l2=on,preallocation=metadata",
        backing: Some(Format::Raw),
        data_file: false,
    },
];

/// What the disk must hold, and which sectors were discarded since that was last asked.
struct Model {
    bytes: Vec<u8>,
    unsure: Vec<bool>,
}

impl Model {
    fn new() -> Model {
        Model {
            bytes: vec![0; SIZE as usize],
            unsure: vec![false; SIZE as usize / 512],
        }
    }

    fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        self.bytes[offset as usize..(offset + len) as usize].fill(byte);
        self.unsure[offset as usize / 512..(offset + len) as usize / 512].fill(false);
    }

    fn unsure(&mut self, offset: u64, len: u64) {
        self.unsure[offset as usize / 512..(offset + len) as usize / 512].fill(true);
    }

    fn compare(&self, offset: u64, read: &[u8]) {
        for (n, byte) in read.iter().enumerate() {
            let at = offset as usize + n;
            let good = *byte == self.bytes[at] || (self.unsure[at / 512] && *byte == 0);
            assert!(
                good,
                "read at {at:#x}: {byte:#x} is not {:#x}",
                self.bytes[at]
            );
        }
    }
}

#[test]
fn random_sequences_agree_with_qemu() {
    if !qemu() {
        return;
    }
    let mut random = Random::seeded("differential");
    let only = std::env::var("VMBUS_CASE").ok();
    for case in CASES
        .iter()
        .filter(|case| only.as_deref().is_none_or(|name| name == case.name))
    {
        let start = std::time::Instant::now();
        let rounds = std::env::var("VMBUS_ROUNDS")
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(1);
        for uring in [true, false] {
            sequence(case, uring, rounds, &mut random);
        }
        eprintln!("case {}: {:.1} s", case.name, start.elapsed().as_secs_f64());
    }
}

fn sequence(case: &Case, uring: bool, rounds: u32, random: &mut Random) {
    eprintln!(
        "case {} on {}, state {}",
        case.name,
        if uring { "io_uring" } else { "system calls" },
        random.0
    );
    let scratch = Scratch::new(&format!("diff-{}-{uring}", case.name));
    let mut model = Model::new();
    create(case, &scratch, &mut model.bytes, random);
    for round in 0..rounds {
        ours(case, &scratch, uring, &mut model, random);
        verify(case, &scratch, &mut model, &format!("ours, round {round}"));
        theirs(case, &scratch, &mut model, random);
        verify(case, &scratch, &mut model, &format!("qemu, round {round}"));
    }
}

fn create(case: &Case, scratch: &Scratch, model: &mut [u8], random: &mut Random) {
    let mut words = vec![
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        case.options,
    ];
    if let Some(format) = case.backing {
        // The backing file is shorter than the disk: behind its end the guest sees zeros.
        let len = SIZE as usize / 3 * 2 / 512 * 512;
        for start in (0..len).step_by(65536) {
            if random.below(3) > 0 {
                let byte = random.next() as u8;
                model[start..(start + 65536).min(len)].fill(byte);
            }
        }
        std::fs::write(scratch.path("base.raw"), &model[..len]).expect("base");
        let name = if format == Format::Raw {
            "base.raw"
        } else {
            "base"
        };
        if format == Format::Qcow2 {
            run(
                &scratch.0,
                &[
                    "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "base.raw", "base",
                ],
            );
        }
        words.extend([
            "-b",
            name,
            "-F",
            if format == Format::Raw {
                "raw"
            } else {
                "qcow2"
            },
        ]);
    }
    let size = SIZE.to_string();
    words.extend(["image", &size]);
    run(&scratch.0, &words);
}

fn chain(case: &Case, scratch: &Scratch) -> Vec<LayerFiles> {
    let backing = case.backing.map(|format| {
        if format == Format::Raw {
            "base.raw"
        } else {
            "base"
        }
    });
    let mut top = layer(&scratch.path("image"), Format::Qcow2, backing, true);
    if case.data_file {
        top.data_file = Some(support::open_file(&scratch.path("data"), true));
        top.data_name = Some("data".to_owned());
    }
    let mut layers = vec![top];
    if let (Some(name), Some(format)) = (backing, case.backing) {
        layers.push(layer(&scratch.path(name), format, None, false));
    }
    layers
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Write(u8),
    Zero(bool),
    Discard,
    Read,
    Flush,
}

fn pick(random: &mut Random) -> (Action, u64, u64) {
    let action = match random.below(10) {
        0..=4 => Action::Write(random.next() as u8 | 1),
        5 => Action::Zero(true),
        6 => Action::Zero(false),
        7 => Action::Discard,
        8 => Action::Read,
        _ => Action::Flush,
    };
    let unit = 512;
    // Mostly small, sometimes large, sometimes to the very end.
    let span = [8, 64, 512, 4096][random.below(4) as usize];
    let len = (1 + random.below(span)) * unit;
    let len = len.min(SIZE);
    let offset = if random.below(16) == 0 {
        SIZE - len
    } else {
        random.below((SIZE - len) / unit + 1) * unit
    };
    (action, offset, len)
}

fn ours(case: &Case, scratch: &Scratch, uring: bool, model: &mut Model, random: &mut Random) {
    let image = active(chain(case, scratch), OpenOptions::default()).expect("open");
    let mut engine = match uring {
        true => Engine::uring(Ring::new(32, image.file_count()).expect("ring")),
        false => Engine::blocking().expect("engine"),
    };
    let slot = engine.attach(image.clone()).expect("attach");
    let mut under_way: HashMap<u64, (Action, u64, u64, Vec<u8>)> = HashMap::new();
    for id in 0..200 {
        let (action, offset, len) = pick(random);
        // Overlapping requests are unordered, so none overlap here.
        let overlaps = |n: &(Action, u64, u64, Vec<u8>)| n.1 < offset + len && offset < n.1 + n.2;
        while under_way.len() >= 16 || under_way.values().any(overlaps) {
            reap(&mut engine, &mut under_way, model);
        }
        let mut memory = match action {
            Action::Write(byte) => vec![byte; len as usize],
            Action::Read => vec![0xee; len as usize],
            _ => Vec::new(),
        };
        let op = match action {
            Action::Write(byte) => Op::Write { fua: byte > 250 },
            Action::Zero(unmap) => Op::WriteZeroes { unmap },
            Action::Discard => Op::Discard,
            Action::Read => Op::Read,
            Action::Flush => Op::Flush,
        };
        let buffers = match memory.is_empty() {
            true => smallvec![],
            false => {
                let half = memory.len() / 2;
                let base = memory.as_mut_ptr();
                smallvec![
                    libc::iovec {
                        iov_base: base.cast(),
                        iov_len: half
                    },
                    libc::iovec {
                        iov_base: base.wrapping_add(half).cast(),
                        iov_len: memory.len() - half
                    }
                ]
            }
        };
        let (offset, len) = if matches!(action, Action::Flush) {
            (0, 0)
        } else {
            (offset, len)
        };
        under_way.insert(id, (action, offset, len, memory));
        // SAFETY: the memory stays in the map until its completion.
        unsafe {
            engine.submit(
                slot,
                Request {
                    id,
                    op,
                    offset,
                    len,
                    buffers,
                },
            )
        };
    }
    while !under_way.is_empty() {
        reap(&mut engine, &mut under_way, model);
    }
    engine.detach(slot).expect("detach");
    image.inactivate().expect("inactivate");
}

fn reap(
    engine: &mut Engine,
    under_way: &mut HashMap<u64, (Action, u64, u64, Vec<u8>)>,
    model: &mut Model,
) {
    let mut done: Vec<Completion> = Vec::new();
    engine.wait(&mut done).expect("wait");
    for completion in done {
        completion.result.expect("request");
        let (action, offset, len, memory) = under_way.remove(&completion.id).expect("known id");
        match action {
            Action::Write(byte) => model.fill(offset, len, byte),
            Action::Zero(_) => model.fill(offset, len, 0),
            Action::Discard => model.unsure(offset, len),
            Action::Read => model.compare(offset, &memory),
            Action::Flush => {}
        }
    }
}

fn theirs(case: &Case, scratch: &Scratch, model: &mut Model, random: &mut Random) {
    let mut script = String::new();
    for _ in 0..60 {
        let (action, offset, len) = pick(random);
        let _ = match action {
            Action::Write(byte) => {
                model.fill(offset, len, byte);
                writeln!(script, "write -q -P {byte} {offset} {len}")
            }
            Action::Zero(unmap) => {
                model.fill(offset, len, 0);
                writeln!(
                    script,
                    "write -q -z {} {offset} {len}",
                    if unmap { "-u" } else { "" }
                )
            }
            Action::Discard if !case.data_file => {
                model.unsure(offset, len);
                writeln!(script, "discard -q {offset} {len}")
            }
            _ => writeln!(script, "flush"),
        };
    }
    let script_file = scratch.path("script");
    std::fs::write(&script_file, script).expect("script");
    let input = std::fs::File::open(&script_file).expect("script");
    let output = Command::new("qemu-io")
        .args(["-f", "qcow2", "-d", "unmap", "image"])
        .current_dir(&scratch.0)
        .stdin(input)
        .output()
        .expect("qemu-io");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && !text.contains("failed"),
        "{text}"
    );
}

/// Content and check, as QEMU sees it and as we do.
fn verify(case: &Case, scratch: &Scratch, model: &mut Model, after: &str) {
    let check = run(&scratch.0, &["qemu-img", "check", "-f", "qcow2", "image"]);
    assert!(
        check.contains("No errors"),
        "{} after {after}: {check}",
        case.name
    );
    run(
        &scratch.0,
        &[
            "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "image", "now",
        ],
    );
    let theirs = std::fs::read(scratch.path("now")).expect("now");
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let image = active(chain(case, scratch), options).expect("open");
    let mut disk = vmbus_qcow2::Disk::new(image).expect("disk");
    let mut ours = vec![0xee; SIZE as usize];
    disk.read(0, &mut ours).expect("read");
    disk.image().inactivate().expect("inactivate");
    assert_same(
        &ours,
        &theirs,
        &format!("{}: we and QEMU read differently after {after}", case.name),
    );
    for (at, byte) in ours.iter().enumerate() {
        // A discarded sector reads as before or as zeros; from now on as it is.
        if model.unsure[at / 512] && *byte == 0 {
            model.bytes[at] = 0;
        }
    }
    model.unsure.fill(false);
    assert_same(
        &ours,
        &model.bytes,
        &format!("{}: content after {after}", case.name),
    );
}

fn assert_same(left: &[u8], right: &[u8], what: &str) {
    assert_eq!(left.len(), right.len(), "{what}: length");
    if let Some(at) = left.iter().zip(right).position(|(a, b)| a != b) {
        let bad = left.iter().zip(right).filter(|(a, b)| a != b).count();
        panic!(
            "{what}: {bad} bytes, first at {at:#x}: {:#x} is not {:#x}",
            left[at], right[at]
        );
    }
}

#[test]
fn a_header_that_names_another_backing_file_is_refused() {
    if !qemu() {
        return;
    }
    let scratch = Scratch::new("changed");
    run(
        &scratch.0,
        &["qemu-img", "create", "-q", "-f", "raw", "base", "1M"],
    );
    run(
        &scratch.0,
        &[
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top",
        ],
    );
    let open = |name: Option<&str>, below: bool| {
        let mut layers = vec![layer(&scratch.path("top"), Format::Qcow2, name, true)];
        if below {
            layers.push(layer(&scratch.path("base"), Format::Raw, None, false));
        }
        vmbus_qcow2::Image::open_chain(layers, OpenOptions::default())
            .err()
            .map(|e| e.kind())
    };
    assert_eq!(open(Some("base"), true), None);
    for (name, below) in [
        (Some("other"), true),
        (None, true),
        (None, false),
        (Some("base"), false),
    ] {
        assert_eq!(
            open(name, below),
            Some(vmbus_qcow2::Kind::BackingChanged),
            "{name:?} {below}"
        );
    }
}

#[test]
fn an_image_in_use_by_qemu_is_refused_and_the_reverse() {
    if !qemu() {
        return;
    }
    let scratch = Scratch::new("locks");
    run(
        &scratch.0,
        &["qemu-img", "create", "-q", "-f", "qcow2", "image", "1M"],
    );
    let path = scratch.path("image");
    let image = active(
        vec![layer(&path, Format::Qcow2, None, true)],
        OpenOptions::default(),
    )
    .expect("open");
    let (ok, text) = support::try_run(
        &scratch.0,
        &["qemu-io", "-f", "qcow2", "-c", "write 0 512", "image"],
    );
    assert!(!ok && text.contains("lock"), "{text}");
    image.inactivate().expect("inactivate");
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2", "image"])
        .current_dir(&scratch.0)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("qemu-io");
    // The prompt means that the image is open.
    let mut prompt = [0u8; 8];
    std::io::Read::read_exact(holder.stdout.as_mut().expect("stdout"), &mut prompt)
        .expect("prompt");
    let refused = active(
        vec![layer(&path, Format::Qcow2, None, true)],
        OpenOptions::default(),
    )
    .err();
    drop(holder.stdin.take());
    holder.wait().expect("qemu-io");
    assert_eq!(refused.expect("in use").kind(), vmbus_qcow2::Kind::InUse);
}
