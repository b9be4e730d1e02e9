// SPDX-License-Identifier: Apache-2.0
//! Images with random damage: every operation ends with a result or a named error, soon and within
//! bounded memory, and a read-only look writes nothing. VMBUS_SEED runs a sequence again,
//! VMBUS_MUTATIONS sets their number.
#![allow(missing_docs)]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{layer, open_file, Random, Scratch};
use vmbus_qcow2::{
    check, copy, create_qcow2, info, range_at, resize, snapshot, CopyOptions, CreateOptions, Disk,
    Format, Image, OpenOptions, Progress, Repair,
};

/// No single operation on an image this small may take longer.
const PATIENCE: Duration = Duration::from_secs(20);
const SIZE: u64 = 1 << 20;

/// A small image with something of everything: data, zero clusters, compressed clusters, a snapshot.
fn sample(scratch: &Scratch, cluster_size: u64, refcount_bits: u32) -> Vec<u8> {
    let path = scratch.path("sample");
    let options = CreateOptions {
        size: SIZE,
        cluster_size,
        refcount_bits,
        ..CreateOptions::default()
    };
    let file = std::fs::File::create(&path)
        .map(|_| open_file(&path, true))
        .expect("create");
    create_qcow2(&file, None, &options).expect("create");
    let text = scratch.path("text");
    std::fs::write(&text, b"words that compress, ".repeat(20_000)).expect("text");
    let target = open(&path, Format::Qcow2, true).expect("open");
    let source = open(&text, Format::Raw, false).expect("open");
    let packed = CopyOptions {
        compress: true,
        threads: 1,
        ..CopyOptions::default()
    };
    copy(&source, &target, &packed, &Progress::default()).expect("copy");
    let mut disk = Disk::blocking(target.clone()).expect("disk");
    disk.write(SIZE / 2, &[0x77; 100_000]).expect("write");
    disk.write_zeroes(SIZE / 2 + 65536, 65536, false)
        .expect("zero");
    if refcount_bits > 1 {
        snapshot::create(&target, "one").expect("snapshot");
    }
    disk.write(SIZE / 2, &[0x78; 10_000]).expect("write");
    target.inactivate().expect("inactivate");
    std::fs::read(&path).expect("read")
}

fn open(path: &Path, format: Format, write: bool) -> vmbus_qcow2::Result<Arc<Image>> {
    let options = OpenOptions {
        read_only: !write,
        cache: 8 << 20,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(vec![layer(path, format, None, write)], options)?;
    image.activate()?;
    Ok(Arc::new(image))
}

/// Damage where it hurts: small numbers and pointers, mostly in tables.
fn mutate(image: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let len = image.len() as u64;
        let at = match random.below(4) {
            0 => random.below(112),
            1 => random.below(len / 8) * 8,
            2 => {
                // The start of a cluster, as tables have their entries there.
                random.below(len / 512) * 512 + random.below(8) * 8
            }
            _ => random.below(len),
        } as usize;
        let value = match random.below(6) {
            0 => random.next(),
            1 => 0,
            2 => u64::MAX,
            3 => {
                (random.below(len / 512) * 512) | [0, 1 << 63, 1 << 62, 1][random.below(4) as usize]
            }
            4 => 1 << random.below(64),
            _ => random.below(256),
        };
        let width = [1, 2, 4, 8][random.below(4) as usize];
        let bytes = value.to_be_bytes();
        for (n, byte) in bytes[8 - width..].iter().enumerate() {
            if let Some(place) = image.get_mut(at + n) {
                *place = *byte;
            }
        }
    }
    if random.below(20) == 0 {
        image.truncate(random.below(image.len() as u64) as usize);
    }
}

fn timed<T>(what: &str, body: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = body();
    assert!(
        start.elapsed() < PATIENCE,
        "{what} took {:?}",
        start.elapsed()
    );
    result
}

fn exercise(path: &Path, random: &mut Random) {
    let before = std::fs::read(path).expect("read");
    let file = open_file(path, false);
    let _ = timed("info", || info(&file, Format::Qcow2, true));
    let _ = timed("check", || check(&file, Repair::None, true));
    if let Ok(image) = timed("open", || open(path, Format::Qcow2, false)) {
        let end = image.size().min(4 * SIZE);
        let mut disk = Disk::new(image.clone()).expect("disk");
        let mut buffer = vec![0; 65536];
        timed("read", || {
            for at in (0..end.saturating_sub(65536)).step_by(65536) {
                let _ = disk.read(at, &mut buffer);
                let _ = range_at(&image, at, 65536);
            }
        });
        let _ = snapshot::list(&image);
        image.inactivate().expect("nothing to write");
    }
    assert!(
        std::fs::read(path).expect("read") == before,
        "a read-only look wrote"
    );
    if let Ok(image) = timed("open for writing", || open(path, Format::Qcow2, true)) {
        let mut disk = Disk::new(image.clone()).expect("disk");
        timed("writes", || {
            for _ in 0..20 {
                let at = random.below(SIZE - 70_000);
                let _ = match random.below(4) {
                    0 => disk.discard(at, 70_000),
                    1 => disk.write_zeroes(at, 70_000, true),
                    _ => disk.write(at, &[random.next() as u8; 7000]),
                };
            }
            let _ = disk.flush();
        });
        match random.below(4) {
            0 => drop(timed("snapshot", || snapshot::create(&image, "two"))),
            1 => drop(timed("apply", || snapshot::apply(&image, "one"))),
            2 => drop(timed("delete", || snapshot::delete(&image, "one"))),
            _ => drop(timed("resize", || resize(&image, SIZE * 2, true))),
        }
        let _ = timed("close", || image.inactivate());
    }
    let file = open_file(path, true);
    let _ = timed("repair", || check(&file, Repair::All, true));
    // Whatever a pointer says, the file grows by what was written, not by where it points.
    let len = file.metadata().expect("metadata").len();
    assert!(
        len < before.len() as u64 + (64 << 20),
        "the file has grown to {len} bytes"
    );
}

#[test]
fn damaged_images_give_errors_and_never_panics() {
    let mut random = Random::seeded("mutated");
    let count = std::env::var("VMBUS_MUTATIONS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(400u64);
    let scratch = Scratch::new("mutated");
    let samples: Vec<Vec<u8>> = [(512, 16), (4096, 1), (65536, 16), (2048, 64)]
        .map(|(size, bits)| sample(&scratch, size, bits))
        .into();
    for number in 0..count {
        let state = random.0;
        let mut image = samples[random.below(samples.len() as u64) as usize].clone();
        mutate(&mut image, &mut random);
        let path = scratch.path("damaged");
        std::fs::File::create(&path)
            .and_then(|file| file.write_all_at(&image, 0))
            .expect("write");
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            exercise(&path, &mut random)
        }));
        if done.is_err() {
            std::fs::write(scratch.path("culprit"), &image).expect("culprit");
            panic!(
                "mutation {number} of state {state}: see {}",
                scratch.path("culprit").display()
            );
        }
    }
}
