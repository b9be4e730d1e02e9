// SPDX-License-Identifier: Apache-2.0
//! An image, and a workload on it that is recorded: requests that end in any order, snapshots, bitmaps, sizes.

use std::collections::HashMap;
use std::fs::{File, OpenOptions as FileOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::smallvec;

use super::{SECTOR, SIZE};
use crate::qcow2::{bitmaps, snapshot};
use crate::recorder::{note, recorded, Event};
use crate::{
    create_qcow2, resize, CreateOptions, Engine, Format, Image, LayerFiles, Op, OpenOptions,
    Request,
};

/// A request under way: offset, length, its memory, and for a flush what was completed before.
type UnderWay = (u64, u64, Vec<u8>, Option<Vec<u64>>);

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit
    }
}

pub(super) struct Bed {
    pub(super) directory: PathBuf,
    pub(super) backing: bool,
    pub(super) options: CreateOptions,
    /// An enabled bitmap records the workload, and others come and go.
    pub(super) bitmaps: bool,
    /// Open flags of the image.
    pub(super) flags: i32,
}

impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

pub(super) fn open(path: &Path) -> File {
    FileOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

impl Bed {
    pub(super) fn new(name: &str, cluster_size: u64, refcount_bits: u32, backing: bool) -> Bed {
        let directory =
            std::env::temp_dir().join(format!("vmbus-cut-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("base"), vec![0xb5; SIZE as usize / 2]).unwrap();
        let backing_name = backing.then(|| ("base".to_owned(), Format::Raw));
        let options = CreateOptions {
            size: SIZE,
            cluster_size,
            refcount_bits,
            backing: backing_name,
            ..CreateOptions::default()
        };
        Bed {
            directory,
            backing,
            options,
            bitmaps: false,
            flags: 0,
        }
    }

    pub(super) fn image(&self, name: &str, read_only: bool) -> crate::Result<Arc<Image>> {
        let layer = |name: &str, format, backing_name: Option<String>| LayerFiles {
            format,
            file: FileOptions::new()
                .read(true)
                .write(true)
                .custom_flags(self.flags)
                .open(self.directory.join(name))
                .unwrap(),
            data_file: None,
            backing_name,
            data_name: None,
            secret: (format == Format::Qcow2)
                .then(|| {
                    self.options
                        .encryption
                        .as_ref()
                        .map(|how| how.secret.clone())
                })
                .flatten(),
        };
        let mut layers = vec![layer(
            name,
            Format::Qcow2,
            self.backing.then(|| "base".to_owned()),
        )];
        if self.backing {
            layers.push(layer("base", Format::Raw, None));
        }
        let image = Image::open_chain(
            layers,
            OpenOptions {
                read_only,
                locks: false,
                ..OpenOptions::default()
            },
        )?;
        image.activate()?;
        Ok(Arc::new(image))
    }

    /// Whether the file system knows the open flags; says so if not.
    pub(super) fn has_flags(&self) -> bool {
        let probe = FileOptions::new()
            .read(true)
            .custom_flags(self.flags)
            .open(self.directory.join("base"));
        if probe.is_err() {
            eprintln!("not run: the temporary directory's file system has no O_DIRECT");
        }
        probe.is_ok()
    }

    fn snapshots(&self) -> bool {
        self.options.refcount_bits > 1
    }

    /// The new image's path.
    pub(super) fn create(&self) -> PathBuf {
        let path = self.directory.join("image");
        let file = File::create_new(&path).map(|_| open(&path)).unwrap();
        create_qcow2(&file, None, &self.options).unwrap();
        path
    }

    /// Record a workload; gives the file as it was at the start.
    pub(super) fn record(&self, random: &mut Random) -> (Vec<u8>, Vec<Event>) {
        let path = self.create();
        let image = self.image("image", false).unwrap();
        if self.bitmaps {
            bitmaps::add(&image, "recording", 4096, true).unwrap();
        }
        let start = std::fs::read(&path).unwrap();
        let events = recorded(image.files()[0].as_raw_fd(), || {
            for part in 0..3 {
                self.requests(&image, part * 1000, random);
                if self.snapshots() {
                    self.snapshot_work(&image, part);
                }
                if self.bitmaps {
                    let name = format!("part {part}");
                    bitmaps::add(&image, &name, 512, part == 0).unwrap();
                    bitmaps::merge(&image, &name, &image, "recording").unwrap();
                    if part == 2 {
                        bitmaps::remove(&image, "part 0").unwrap();
                    }
                }
                resize(&image, SIZE + (part + 1) * 65536 * 4, false).unwrap();
            }
            image.inactivate().unwrap();
        });
        (start, events)
    }

    /// All that snapshots do, over the three parts of a workload.
    fn snapshot_work(&self, image: &Arc<Image>, part: u64) {
        // Each of them begins by making durable what was completed.
        let completed = || Event::Flushed {
            completed: (0..=part * 1000 + 999).collect(),
        };
        match part {
            0 => {
                snapshot::create(image, "one").unwrap();
                note(None, completed);
                note(None, || Event::Taken);
            }
            1 => {
                snapshot::create(image, "two").unwrap();
                note(None, completed);
                // Bitmaps forbid going back.
                if !self.bitmaps {
                    note(None, || Event::Rewinding);
                    snapshot::apply(image, "one").unwrap();
                    note(None, || Event::Rewound);
                }
            }
            _ => {
                snapshot::delete(image, "one").unwrap();
                note(None, completed);
                snapshot::delete(image, "two").unwrap();
            }
        }
    }

    fn requests(&self, image: &Arc<Image>, first_id: u64, random: &mut Random) {
        let mut engine = Engine::reordering(random.below(1 << 40), None).unwrap();
        let slot = engine.attach(image.clone()).unwrap();
        let mut under_way: HashMap<u64, UnderWay> = HashMap::new();
        let mut completed = Vec::new();
        let mut durable = Vec::new();
        let mut id = first_id;
        let mut behind = None;
        while id < first_id + 120 || !under_way.is_empty() {
            if id < first_id + 120 && under_way.len() < 8 {
                id += 1;
                let span = [8, 40, 300][random.below(3) as usize];
                let len = (1 + random.below(span)) * 512;
                let offset = match behind.take() {
                    // Behind the one before, for a while.
                    Some(end) if random.below(5) > 0 && end + len <= SIZE => end,
                    _ => random.below((SIZE - len) / 512) * 512,
                };
                if under_way
                    .values()
                    .any(|(at, length, ..)| *at < offset + len && offset < at + length)
                {
                    continue;
                }
                behind = (id / 40 % 2 == 1).then_some(offset + len);
                let value = random.below(255) as u8 + 1;
                let (op, value) = match random.below(12) {
                    0..=6 => (
                        Op::Write {
                            fua: random.below(4) == 0,
                        },
                        Some(value),
                    ),
                    7 => (Op::WriteZeroes { unmap: true }, Some(0)),
                    8 => (Op::WriteZeroes { unmap: false }, Some(0)),
                    9 => (Op::Discard, None),
                    _ => (Op::Flush, None),
                };
                if op == (Op::Write { fua: true }) {
                    durable.push(id);
                }
                let mut memory = if matches!(op, Op::Write { .. }) {
                    vec![value.unwrap(); len as usize]
                } else {
                    vec![]
                };
                let piece = libc::iovec {
                    iov_base: memory.as_mut_ptr().cast(),
                    iov_len: memory.len(),
                };
                let buffers = if memory.is_empty() {
                    smallvec![]
                } else {
                    smallvec![piece]
                };
                let flush = op == Op::Flush;
                let (offset, len) = if flush { (0, 0) } else { (offset, len) };
                if !flush {
                    let (first, count) = (offset as usize / SECTOR, len as usize / SECTOR);
                    note(None, || Event::Submitted {
                        id,
                        first,
                        count,
                        value,
                    });
                }
                under_way.insert(id, (offset, len, memory, flush.then(|| completed.clone())));
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
            }
            let mut done = Vec::new();
            engine.poll(&mut done).unwrap();
            for completion in done {
                completion.result.unwrap();
                let (.., flush) = under_way.remove(&completion.id).unwrap();
                if let Some(completed) = flush {
                    note(None, || Event::Flushed { completed });
                }
                if durable.contains(&completion.id) {
                    let completed = vec![completion.id];
                    note(None, || Event::Flushed { completed });
                }
                completed.push(completion.id);
            }
        }
        engine.detach(slot).unwrap();
    }
}
