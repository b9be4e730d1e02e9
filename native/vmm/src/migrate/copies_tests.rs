// SPDX-License-Identifier: Apache-2.0
//! Disks that are copied while somebody writes to them: whatever is done to them, the copy is what they are in the end.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use vmbus_qcow2::{
    compare, copy, create_qcow2, CopyOptions, CreateOptions, Disk, EncryptOptions, Format, Image,
    LayerFiles, Op, OpenOptions, Progress, Secret,
};

use super::changes::{Blocks, Changed};
use super::copies::{grains, list, Copied, Piece, Source, Still, Targets};
use super::stream::BLOCKS_MAX;
use crate::virtio::fuzz::random::Random;

const SIZE: u64 = (6 << 20) + 512;

fn file() -> File {
    // SAFETY: the name is a C string; the fd that comes back is ours.
    unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) }
}

fn layer(file: &File, format: Format, backing: Option<&str>) -> LayerFiles {
    LayerFiles {
        format,
        file: File::from(file.as_fd().try_clone_to_owned().unwrap()),
        data_file: None,
        backing_name: backing.map(str::to_owned),
        data_name: None,
        secret: None,
    }
}

fn open(layers: Vec<LayerFiles>) -> Arc<Image> {
    let options = OpenOptions {
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(layers, options).unwrap();
    image.activate().unwrap();
    Arc::new(image)
}

/// A disk of one layer, or of two.
fn disk(format: Format, below: bool) -> Arc<Image> {
    let top = file();
    match format {
        Format::Raw => {
            top.set_len(SIZE).unwrap();
            open(vec![layer(&top, format, None)])
        }
        Format::Qcow2 => {
            let base = file();
            base.set_len(SIZE).unwrap();
            let backing = below.then(|| ("base".to_owned(), Format::Raw));
            let options = CreateOptions {
                size: SIZE,
                backing,
                ..CreateOptions::default()
            };
            create_qcow2(&top, None, &options).unwrap();
            let mut layers = vec![layer(&top, format, below.then_some("base"))];
            if below {
                let lower = open(vec![layer(&base, Format::Raw, None)]);
                scribble(&lower, &Changed::default(), &mut Random(99), 40);
                layers.push(layer(&base, Format::Raw, None));
            }
            open(layers)
        }
    }
}

/// Does something to a disk, and notes it as its I/O thread does.
fn scribble(image: &Arc<Image>, changed: &Changed, random: &mut Random, times: usize) {
    let mut disk = Disk::blocking(Arc::clone(image)).unwrap();
    for _ in 0..times {
        let sectors = 1 + random.below(600);
        let len = sectors * 512;
        let offset = random.below((SIZE - len) / 512 + 1) * 512;
        let op = match random.below(8) {
            0 => Op::Discard,
            1 => Op::WriteZeroes { unmap: true },
            2 => Op::WriteZeroes { unmap: false },
            _ => Op::Write { fua: false },
        };
        match op {
            Op::Discard => disk.discard(offset, len).unwrap(),
            Op::WriteZeroes { unmap } => disk.write_zeroes(offset, len, unmap).unwrap(),
            _ => disk
                .write(offset, &vec![random.next() as u8; len as usize])
                .unwrap(),
        }
        changed.note(op, offset, len);
    }
}

/// What the rounds do with blocks, without the socket between.
fn send(source: &mut Source, targets: &mut Targets, blocks: &Blocks, room: &mut [u8]) {
    let mut from = 0;
    while let Some((begin, len)) = blocks.run(from, 1 << 30) {
        let (mut at, end) = (begin, begin + len);
        from = end;
        while at < end {
            match source.piece(at, end, room).unwrap() {
                Piece::Hole(len) => {
                    targets.clear(at, len).unwrap();
                    at += len;
                }
                Piece::Data(len) => {
                    let mut place = at;
                    for (zero, grain) in grains(&room[..len as usize]) {
                        match zero {
                            true => targets.clear(place, grain.len() as u64).unwrap(),
                            false => targets.write(place, grain).unwrap(),
                        }
                        place += grain.len() as u64;
                    }
                    at += len;
                }
            }
        }
    }
}

fn copied_while_it_changes(from: Arc<Image>, to: Arc<Image>, seed: u64) {
    let still = Still::default();
    let changed = Arc::new(Changed::default());
    scribble(&from, &changed, &mut Random(seed | 1), 60);
    // An older copy, which is overwritten.
    scribble(&to, &changed, &mut Random(seed | 1), 30);
    changed.watch(SIZE);
    let copied = |image: &Arc<Image>| Copied {
        id: "disk/root".to_owned(),
        image: Arc::clone(image),
        changed: Arc::clone(&changed),
    };
    let mut source = Source::new(copied(&from), &still).unwrap();
    let mut targets = Targets::new(vec![copied(&to)], &still).unwrap();
    targets
        .expect(&list(std::slice::from_ref(&source)))
        .unwrap();
    targets.choose(0).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let guest = std::thread::spawn({
        let (from, changed, stop) = (Arc::clone(&from), Arc::clone(&changed), Arc::clone(&stop));
        move || {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            let mut times = 0;
            while !stop.load(Ordering::SeqCst) || times < 50 {
                scribble(&from, &changed, &mut random, 1);
                times += 1;
            }
        }
    });
    let mut room = vec![0; BLOCKS_MAX as usize];
    send(&mut source, &mut targets, &Blocks::all(SIZE), &mut room);
    for _ in 0..4 {
        let blocks = source.take();
        send(&mut source, &mut targets, &blocks, &mut room);
        targets.sync().unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    guest.join().unwrap();
    // The last before it stands.
    scribble(&from, &changed, &mut Random(seed ^ 0x5555), 1);
    let blocks = source.take();
    assert!(blocks.bytes() > 0);
    send(&mut source, &mut targets, &blocks, &mut room);
    targets.sync().unwrap();
    drop((source, targets));
    let differs = compare(&from, &to, 1, &Progress::default()).unwrap();
    assert_eq!(differs, None, "seed {seed}");
}

#[test]
fn a_copy_of_any_format_is_what_the_disk_is_in_the_end() {
    let formats = [Format::Raw, Format::Qcow2];
    for (number, (from, to)) in formats
        .iter()
        .flat_map(|from| formats.iter().map(move |to| (*from, *to)))
        .enumerate()
    {
        for seed in 0..3 {
            let seed = 10 * number as u64 + seed + 1;
            copied_while_it_changes(disk(from, false), disk(to, false), seed);
        }
    }
}

#[test]
fn layers_below_are_seen_at_the_source_and_covered_at_the_destination() {
    for seed in 100..103 {
        copied_while_it_changes(disk(Format::Qcow2, true), disk(Format::Raw, false), seed);
        copied_while_it_changes(disk(Format::Qcow2, true), disk(Format::Qcow2, true), seed);
    }
}

#[test]
fn compressed_and_encrypted_images_are_read_and_written_as_what_they_hold() {
    let raw = disk(Format::Raw, false);
    scribble(&raw, &Changed::default(), &mut Random(5), 60);
    let packed = disk(Format::Qcow2, false);
    let how = CopyOptions {
        compress: true,
        ..CopyOptions::default()
    };
    copy(&raw, &packed, &how, &Progress::default()).unwrap();
    copied_while_it_changes(packed, disk(Format::Raw, false), 200);
    copied_while_it_changes(encrypted(), disk(Format::Raw, false), 201);
    copied_while_it_changes(disk(Format::Raw, false), encrypted(), 202);
}

fn encrypted() -> Arc<Image> {
    let secret = Secret::new(b"passphrase".to_vec()).unwrap();
    let top = file();
    let options = CreateOptions {
        size: SIZE,
        encryption: Some(EncryptOptions {
            iteration_time: Duration::from_millis(1),
            ..EncryptOptions::new(secret.clone())
        }),
        ..CreateOptions::default()
    };
    create_qcow2(&top, None, &options).unwrap();
    open(vec![LayerFiles {
        secret: Some(secret),
        ..layer(&top, Format::Qcow2, None)
    }])
}

#[test]
fn a_disk_that_is_nearly_empty_goes_in_a_few_looks_and_stays_empty() {
    let size = 1 << 40;
    let top = file();
    let options = CreateOptions {
        size,
        ..CreateOptions::default()
    };
    create_qcow2(&top, None, &options).unwrap();
    let from = open(vec![layer(&top, Format::Qcow2, None)]);
    let mut disk = Disk::blocking(Arc::clone(&from)).unwrap();
    disk.write(size - 512, &[7; 512]).unwrap();
    let copied = Copied {
        id: "disk/root".to_owned(),
        image: Arc::clone(&from),
        changed: Arc::default(),
    };
    let mut source = Source::new(copied, &Still::default()).unwrap();
    let mut room = vec![0; BLOCKS_MAX as usize];
    let (mut at, mut looks, mut data) = (0, 0, 0);
    while at < size {
        looks += 1;
        match source.piece(at, size, &mut room).unwrap() {
            Piece::Hole(len) => at += len,
            Piece::Data(len) => {
                data += len;
                at += len;
            }
        }
    }
    assert!(data <= 64 << 10, "{data}");
    assert!(looks < 6000, "{looks}");
}

#[test]
fn an_image_that_is_let_go_is_read_no_more() {
    let image = disk(Format::Raw, false);
    let still = Still::default();
    let copied = Copied {
        id: "disk/root".to_owned(),
        image: Arc::clone(&image),
        changed: Arc::default(),
    };
    let mut source = Source::new(copied.clone(), &still).unwrap();
    let mut targets = Targets::new(vec![copied], &still).unwrap();
    targets
        .expect(&list(std::slice::from_ref(&source)))
        .unwrap();
    targets.choose(0).unwrap();
    let mut room = vec![0; BLOCKS_MAX as usize];
    targets.write(0, &[1; 4096]).unwrap();
    source.piece(0, SIZE, &mut room).unwrap();
    image.inactivate().unwrap();
    let error = source.piece(0, SIZE, &mut room).unwrap_err();
    assert_eq!(error.argument, "disk/root");
    targets.write(0, &[1; 4096]).unwrap_err();
    targets.clear(0, 4096).unwrap_err();
}
