// SPDX-License-Identifier: Apache-2.0
//! Errors of the device: a workload is run again and again, and each time the next operation of its
//! engine fails, alone or with all that follow. Errors are reported by some request; the image
//! never becomes corrupt (leaks are allowed); what was reported written is there if the image could
//! be closed, and otherwise each sector holds something that was written to it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions as FileOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use smallvec::smallvec;

use crate::engine::backend::Faults;
use crate::{
    check, create_qcow2, CreateOptions, Engine, Format, Image, LayerFiles, Op, OpenOptions, Repair,
    Request,
};

const SIZE: u64 = 512 << 10;
const SECTOR: usize = 512;

fn open(path: &Path) -> File {
    FileOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn image(directory: &Path, flags: i32, read_only: bool) -> Arc<Image> {
    let layer = |name: &str, format, backing_name: Option<&str>| LayerFiles {
        format,
        file: FileOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(directory.join(name))
            .unwrap(),
        data_file: None,
        backing_name: backing_name.map(str::to_owned),
        data_name: None,
        secret: None,
    };
    let layers = vec![
        layer("image", Format::Qcow2, Some("base")),
        layer("base", Format::Raw, None),
    ];
    let options = OpenOptions {
        read_only,
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(layers, options).unwrap();
    image.activate().unwrap();
    Arc::new(image)
}

/// Per sector: what it must hold if all goes well, and all that was ever written to it.
struct Model {
    sure: Vec<Option<u8>>,
    ever: Vec<Vec<u8>>,
}

/// One run; false when the workload ended before the fault came.
fn run(directory: &Path, options: &CreateOptions, flags: i32, faults: Faults) -> bool {
    let path = directory.join("image");
    let _ = std::fs::remove_file(&path);
    create_qcow2(
        &File::create_new(&path).map(|_| open(&path)).unwrap(),
        None,
        options,
    )
    .unwrap();
    let image = image(directory, flags, false);
    let sectors = SIZE as usize / SECTOR;
    let mut model = Model {
        sure: vec![Some(0xb5); sectors],
        ever: vec![vec![0xb5]; sectors],
    };
    let errors = workload(&image, faults, &mut model);
    let closed = image.inactivate().is_ok();
    let report = check(&open(&path), Repair::None, false).unwrap();
    assert_eq!(report.corruptions, 0, "{:?}", report.messages);
    verify(directory, &model, closed);
    errors > 0
}

fn workload(image: &Arc<Image>, faults: Faults, model: &mut Model) -> u64 {
    let mut engine = Engine::reordering(faults.at, Some(faults)).unwrap();
    let slot = engine.attach(image.clone()).unwrap();
    let mut memory: HashMap<u64, (usize, usize, Option<u8>, Vec<u8>)> = HashMap::new();
    let mut errors = 0;
    for id in 0..60u64 {
        // Always the same requests; neighbours in time do not overlap.
        let first = (id as usize * 173) % (sectors() - 64);
        let count = 1 + (id as usize * 7) % 24;
        let (op, value) = match id % 6 {
            0 | 1 | 4 => (Op::Write { fua: id % 9 == 0 }, Some(id as u8 + 1)),
            2 => (Op::WriteZeroes { unmap: id % 4 == 0 }, Some(0)),
            3 => (Op::Discard, None),
            _ => (Op::Flush, None),
        };
        let (first, count) = if op == Op::Flush {
            (0, 0)
        } else {
            (first, count)
        };
        let mut data = vec![
            value.unwrap_or(0);
            if matches!(op, Op::Write { .. }) {
                count * SECTOR
            } else {
                0
            }
        ];
        let piece = libc::iovec {
            iov_base: data.as_mut_ptr().cast(),
            iov_len: data.len(),
        };
        let buffers = if data.is_empty() {
            smallvec![]
        } else {
            smallvec![piece]
        };
        for sector in first..first + count {
            model.ever[sector].push(value.unwrap_or(0));
            model.sure[sector] = None;
        }
        memory.insert(id, (first, count, value, data));
        let (offset, len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        // SAFETY: the memory stays in the map until the completion.
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
        while memory.len() > 3 || (id == 59 && !memory.is_empty()) {
            let mut done = Vec::new();
            engine.poll(&mut done).unwrap();
            for completion in done {
                let (first, count, value, _) = memory.remove(&completion.id).unwrap();
                errors += u64::from(completion.result.is_err());
                if let (Ok(()), Some(value)) = (completion.result, value) {
                    let under_way = |sector: usize| {
                        memory
                            .values()
                            .any(|(at, length, ..)| (*at..at + length).contains(&sector))
                    };
                    for sector in (first..first + count).filter(|sector| !under_way(*sector)) {
                        model.sure[sector] = Some(value);
                    }
                }
            }
        }
    }
    engine.detach(slot).unwrap();
    errors
}

fn sectors() -> usize {
    SIZE as usize / SECTOR
}

fn verify(directory: &Path, model: &Model, closed: bool) {
    let image = image(directory, 0, true);
    let extents =
        crate::blocking::run(&image, |state, waiter| state.plan_read(0, SIZE, waiter)).unwrap();
    let content = crate::blocking::fetch(&image, &extents).unwrap();
    for (sector, bytes) in content.chunks(SECTOR).enumerate() {
        let value = bytes[0];
        assert!(
            bytes.iter().all(|byte| *byte == value),
            "sector {sector} is torn"
        );
        assert!(
            model.ever[sector].contains(&value),
            "sector {sector} holds {value:#x}, never written"
        );
        if let (true, Some(sure)) = (closed, model.sure[sector]) {
            assert_eq!(value, sure, "sector {sector}");
        }
    }
}

#[test]
fn an_error_at_any_operation_is_reported_and_corrupts_nothing() {
    at_every_operation("plain", 1024, false, 0);
}

#[test]
fn an_error_at_any_operation_leaves_subclusters_right() {
    at_every_operation("subclusters", 16384, true, 0);
}

/// There, durable writes go to the disk by themselves (engine/mod.rs).
#[test]
fn an_error_at_any_operation_on_an_o_direct_file_corrupts_nothing() {
    at_every_operation("direct", 4096, false, libc::O_DIRECT);
}

fn at_every_operation(name: &str, cluster_size: u64, extended_l2: bool, flags: i32) {
    let directory =
        std::env::temp_dir().join(format!("vmbus-faults-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("base"), vec![0xb5; SIZE as usize]).unwrap();
    let probe = FileOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(directory.join("base"));
    if probe.is_err() {
        return eprintln!("not run: the temporary directory's file system has no O_DIRECT");
    }
    let options = CreateOptions {
        size: SIZE,
        cluster_size,
        extended_l2,
        backing: Some(("base".to_owned(), Format::Raw)),
        ..CreateOptions::default()
    };
    for (lasting, errno) in [(false, libc::EIO), (true, libc::ENOSPC)] {
        // Space that cannot be given back is nobody's error: a few runs without one are not yet the end.
        let (mut at, mut quiet) = (0, 0);
        while quiet < 20 {
            let faults = Faults { at, lasting, errno };
            quiet = if run(&directory, &options, flags, faults) {
                0
            } else {
                quiet + 1
            };
            at += 1;
        }
        assert!(at > 100, "the workload has only {at} operations");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}
