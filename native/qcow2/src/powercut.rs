// SPDX-License-Identifier: Apache-2.0
//! Power cuts. Every write, flush and change of length of a workload is recorded; then the file is
//! built as it could be after a cut at any moment: everything before the last flush, and of what came
//! after it any subset in any order, torn at 512 bytes. Each such file must open without repair,
//! check without corruption (leaks are allowed), and hold all data whose flush was reported.
//!
//! The workload runs on a disk that completes operations in any order, eight requests at a time.

use std::collections::HashMap;
use std::fs::{File, OpenOptions as FileOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use smallvec::smallvec;

use crate::qcow2::{bitmaps, snapshot};
use crate::recorder::{note, recorded, Event};
use crate::{
    check, create_qcow2, resize, CreateOptions, Engine, Format, Image, LayerFiles, Op, OpenOptions,
    Repair, Request,
};

const SIZE: u64 = 1 << 20;
const SECTOR: usize = 512;

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

/// The disk as the guest may find it: per sector, the values it may have.
struct Guest {
    durable: Vec<Vec<u8>>,
    taken: Vec<Vec<u8>>,
    later: Vec<Vec<(u64, Option<u8>)>>,
}

impl Guest {
    fn may_be(&self, sector: usize, value: u8) -> bool {
        self.durable[sector].contains(&value)
            || self.later[sector]
                .iter()
                .any(|(_, later)| later.unwrap_or(0) == value)
    }

    fn flushed(&mut self, completed: &[u64]) {
        for (durable, later) in self.durable.iter_mut().zip(&mut self.later) {
            let count = later
                .iter()
                .rposition(|(id, _)| completed.contains(id))
                .map_or(0, |last| last + 1);
            for (_, value) in later.drain(..count) {
                match value {
                    Some(value) => *durable = vec![value],
                    None if durable.contains(&0) => {}
                    None => durable.push(0),
                }
            }
        }
    }
}

struct Bed {
    directory: PathBuf,
    backing: bool,
    options: CreateOptions,
    /// An enabled bitmap records the workload, and others come and go.
    bitmaps: bool,
    /// Open flags of the image.
    flags: i32,
}

impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

fn open(path: &Path) -> File {
    FileOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

impl Bed {
    fn new(name: &str, cluster_size: u64, refcount_bits: u32, backing: bool) -> Bed {
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

    fn image(&self, name: &str, read_only: bool) -> crate::Result<Arc<Image>> {
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
    fn has_flags(&self) -> bool {
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

    /// A bitmap that may be trusted knows of all that has changed.
    fn bitmap_tells(&self, image: &Image, content: &[u8], what: &str) {
        let listed = bitmaps::list(image).unwrap_or_else(|e| panic!("{what}: {e}"));
        let recording = listed.iter().find(|bitmap| bitmap.name == "recording");
        assert_eq!(recording.is_some(), self.bitmaps, "{what}");
        if recording.is_none_or(|bitmap| bitmap.in_use) {
            return;
        }
        let mut view = bitmaps::BitmapView::open(image, "recording").unwrap();
        for (sector, bytes) in content.chunks(SECTOR).enumerate() {
            let (dirty, _) = view.status(image, (sector * SECTOR) as u64, 1).unwrap();
            assert!(
                dirty || bytes[0] == 0,
                "{what}: sector {sector} has changed"
            );
        }
    }

    /// The new image's path.
    fn create(&self) -> PathBuf {
        let path = self.directory.join("image");
        let file = File::create_new(&path).map(|_| open(&path)).unwrap();
        create_qcow2(&file, None, &self.options).unwrap();
        path
    }

    /// Record a workload; gives the file as it was at the start.
    fn record(&self, random: &mut Random) -> (Vec<u8>, Vec<Event>) {
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

    /// Go through the recording and try `cuts` files.
    fn replay(&self, start: &[u8], events: &[Event], cuts: u64, random: &mut Random) -> u64 {
        let mut durable = start.to_vec();
        let mut volatile: Vec<Event> = Vec::new();
        let sectors = SIZE as usize / SECTOR;
        let initial = |sector: usize| {
            vec![if self.backing && sector < sectors / 2 {
                0xb5
            } else {
                0
            }]
        };
        let mut guest = Guest {
            durable: (0..sectors).map(initial).collect(),
            taken: Vec::new(),
            later: vec![Vec::new(); sectors],
        };
        let mut tried = 0;
        for (number, event) in events.iter().enumerate() {
            match event {
                Event::Sync => volatile
                    .drain(..)
                    .for_each(|event| apply(&mut durable, &event, &mut |_| true)),
                Event::Write { .. } | Event::Len(_) => volatile.push(event.clone()),
                Event::Durable { offset, data } => {
                    // What was written there before is never seen again.
                    let (start, end) = (*offset as usize, *offset as usize + data.len());
                    for earlier in &mut volatile {
                        if let Event::Write { offset, data: old } = earlier {
                            let first = *offset as usize;
                            let from = start.max(first);
                            let until = end.min(first + old.len());
                            if from < until {
                                old[from - first..until - first]
                                    .copy_from_slice(&data[from - start..until - start]);
                            }
                        }
                    }
                    // And the file is as long as that needs.
                    let data = data.clone();
                    let write = Event::Write {
                        offset: *offset,
                        data,
                    };
                    apply(&mut durable, &write, &mut |_| true);
                }
                Event::Submitted {
                    id,
                    first,
                    count,
                    value,
                } => {
                    guest.later[*first..first + count]
                        .iter_mut()
                        .for_each(|later| later.push((*id, *value)));
                }
                Event::Flushed { completed } => guest.flushed(completed),
                Event::Taken => guest.taken = guest.durable.clone(),
                Event::Rewinding => {
                    for (later, taken) in guest.later.iter_mut().zip(&guest.taken) {
                        later.extend(taken.iter().map(|value| (u64::MAX, Some(*value))));
                    }
                }
                Event::Rewound => {
                    guest.durable = guest.taken.clone();
                    guest.later.iter_mut().for_each(Vec::clear);
                }
            }
            let due = cuts * (number as u64 + 1) / events.len() as u64;
            while tried < due {
                tried += 1;
                self.cut(
                    &durable,
                    &volatile,
                    &guest,
                    random,
                    &format!("cut {tried} at event {number}"),
                );
            }
        }
        tried
    }

    fn cut(
        &self,
        durable: &[u8],
        volatile: &[Event],
        guest: &Guest,
        random: &mut Random,
        what: &str,
    ) {
        let mut file = durable.to_vec();
        let mut order: Vec<&Event> = volatile.iter().collect();
        match random.below(4) {
            0 => {}
            1 => order
                .iter()
                .for_each(|event| apply(&mut file, event, &mut |_| true)),
            kind => {
                for n in (1..order.len()).rev() {
                    order.swap(n, random.below(n as u64 + 1) as usize);
                }
                let chance = 1 + random.below(9);
                for event in order {
                    let whole = random.below(10) < chance;
                    apply(&mut file, event, &mut |_| {
                        if kind == 2 {
                            whole
                        } else {
                            random.below(10) < chance
                        }
                    });
                }
            }
        }
        let path = self.directory.join("cut");
        let target = FileOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        target.write_all_at(&file, 0).unwrap();
        let report = check(&target, Repair::None, false).unwrap();
        assert_eq!(
            report.corruptions,
            0,
            "{what}: {:?}",
            report.messages.iter().take(5).collect::<Vec<_>>()
        );
        let image = self
            .image("cut", true)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let extents =
            crate::blocking::run(&image, |state, waiter| state.plan_read(0, SIZE, waiter)).unwrap();
        let content = crate::blocking::fetch(&image, &extents).unwrap();
        self.bitmap_tells(&image, &content, what);
        for (sector, bytes) in content.chunks(SECTOR).enumerate() {
            let same = bytes.iter().all(|byte| *byte == bytes[0]);
            assert!(
                same && guest.may_be(sector, bytes[0]),
                "{what}: sector {sector} holds {:#x}, may be {:x?} or {:x?}",
                bytes[0],
                guest.durable[sector],
                guest.later[sector]
            );
        }
    }
}

pub(crate) fn apply(file: &mut Vec<u8>, event: &Event, keep: &mut dyn FnMut(usize) -> bool) {
    match event {
        Event::Len(len) if keep(0) => {
            // The length of a file changes in order; the one shortening is at the very end, when all
            // else is durable.
            file.resize(file.len().max(*len as usize), 0);
        }
        Event::Write { offset, data } => {
            let mut at = 0;
            while at < data.len() {
                // Sectors of the file are atomic.
                let start = *offset as usize + at;
                let end = (start / SECTOR + 1) * SECTOR;
                let len = (end - start).min(data.len() - at);
                if keep(at) {
                    if file.len() < start + len {
                        file.resize(start + len, 0);
                    }
                    file[start..start + len].copy_from_slice(&data[at..at + len]);
                }
                at += len;
            }
        }
        _ => {}
    }
}

fn workload(name: &str, cluster_size: u64, refcount_bits: u32, backing: bool) {
    cut(name, &Bed::new(name, cluster_size, refcount_bits, backing));
}

fn cut(name: &str, bed: &Bed) {
    cut_often(name, bed, 300);
}

fn cut_often(name: &str, bed: &Bed, usual: u64) {
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64;
    let seed = std::env::var("VMBUS_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(clock);
    let cuts = std::env::var("VMBUS_CUTS")
        .ok()
        .and_then(|cuts| cuts.parse().ok())
        .unwrap_or(usual);
    eprintln!("power cuts, {name}: VMBUS_SEED={seed} VMBUS_CUTS={cuts}");
    let mut random = Random(seed | 1);
    let (start, events) = bed.record(&mut random);
    assert_eq!(bed.replay(&start, &events, cuts, &mut random), cuts);
}

#[test]
fn small_clusters_survive_power_cuts() {
    workload("small", 512, 16, false);
}

#[test]
fn small_clusters_over_a_backing_file_survive_power_cuts() {
    workload("small-backing", 1024, 8, true);
}

#[test]
fn usual_clusters_over_a_backing_file_survive_power_cuts() {
    workload("usual-backing", 65536, 16, true);
}

#[test]
fn subclusters_survive_power_cuts() {
    subclusters("subclusters", 16384, false);
}

#[test]
fn subclusters_over_a_backing_file_survive_power_cuts() {
    subclusters("subclusters-backing", 65536, true);
}

#[test]
fn bitmaps_survive_power_cuts_or_say_that_they_did_not() {
    for (name, cluster_size) in [("bitmaps-small", 512), ("bitmaps", 65536)] {
        let mut bed = Bed::new(name, cluster_size, 16, false);
        bed.bitmaps = true;
        cut(name, &bed);
    }
}

fn subclusters(name: &str, cluster_size: u64, backing: bool) {
    let mut bed = Bed::new(name, cluster_size, 16, backing);
    bed.options.extended_l2 = true;
    cut(name, &bed);
}

/// Clusters are counted ahead (alloc/reserve.rs).
#[test]
fn a_flush_behind_a_new_cluster_is_one_sync() {
    let bed = Bed::new("ahead", 4096, 16, false);
    let path = bed.create();
    let image = bed.image("image", false).unwrap();
    let events = recorded(image.files()[0].as_raw_fd(), || {
        let mut disk = crate::Disk::blocking(image.clone()).unwrap();
        for cluster in 0..100 {
            disk.write(cluster * 8192, &[5; 512]).unwrap();
            disk.flush().unwrap();
        }
    });
    let is_sync = |event: &&Event| matches!(event, Event::Sync);
    let syncs = events.iter().filter(is_sync).count();
    // Two each while the reserve grows: 1, 2, 4 clusters.
    assert!((100..=110).contains(&syncs), "{syncs}");
    image.inactivate().unwrap();
    let report = check(&open(&path), Repair::None, false).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0));
}

#[test]
fn durable_writes_to_fresh_clusters_share_one_write_of_their_table_and_no_sync() {
    let mut bed = Bed::new("together", 4096, 16, false);
    bed.flags = libc::O_DIRECT;
    if !bed.has_flags() {
        return;
    }
    bed.create();
    let image = bed.image("image", false).unwrap();
    let mut disk = crate::Disk::blocking(image.clone()).unwrap();
    for cluster in 0..40 {
        // By and by enough is counted ahead.
        disk.write(cluster * 4096, &[5; 4096]).unwrap();
        disk.flush().unwrap();
    }
    drop(disk);
    let memory = std::cell::RefCell::new(crate::buffer::Buffer::from_bytes(&[7; 4096]));
    let durably = |first: u64, count: u64| {
        let mut engine = Engine::blocking().unwrap();
        let slot = engine.attach(image.clone()).unwrap();
        let events = recorded(image.files()[0].as_raw_fd(), || {
            for id in 0..count {
                let request = Request {
                    id,
                    op: Op::Write { fua: true },
                    offset: (first + id) * 4096,
                    len: 4096,
                    buffers: smallvec![memory.borrow_mut().iovec(0, 4096)],
                };
                // SAFETY: the memory outlives the engine.
                unsafe { engine.submit(slot, request) };
            }
            let mut done = Vec::new();
            while done.len() < count as usize {
                engine.wait(&mut done).unwrap();
            }
            assert!(done.iter().all(|completion| completion.result.is_ok()));
        });
        let alone = events
            .iter()
            .all(|event| matches!(event, Event::Durable { .. }));
        (alone, events.len())
    };
    // One of them may come to where more is counted ahead, which needs a sync.
    let rounds = [durably(100, 8), durably(110, 8)];
    assert!(rounds.contains(&(true, 8 + 1)), "{rounds:?}");
    // And where all that leads there is on the disk, nothing else is written.
    assert_eq!(durably(104, 3), (true, 3));
}

/// Durable writes go to the disk by themselves where they can (engine/mod.rs).
#[test]
fn durable_writes_to_o_direct_files_survive_power_cuts() {
    for (name, cluster_size, backing) in [("direct", 4096, false), ("direct-backing", 8192, true)] {
        let mut bed = Bed::new(name, cluster_size, 16, backing);
        bed.flags = libc::O_DIRECT;
        if !bed.has_flags() {
            return;
        }
        let mut random = Random(17);
        let (start, events) = bed.record(&mut random);
        let durable = events
            .iter()
            .filter(|event| matches!(event, Event::Durable { .. }))
            .count();
        assert!(durable > 5, "{durable}");
        assert_eq!(bed.replay(&start, &events, 300, &mut random), 300);
    }
}

#[test]
fn the_first_durable_write_of_many_in_a_row_makes_room_for_the_others() {
    let mut bed = Bed::new("row", 65536, 16, false);
    bed.flags = libc::O_DIRECT;
    if !bed.has_flags() {
        return;
    }
    bed.create();
    let image = bed.image("image", false).unwrap();
    let mut engine = Engine::blocking().unwrap();
    let slot = engine.attach(image.clone()).unwrap();
    let mut memory = crate::buffer::Buffer::from_bytes(&[7; 4096]);
    let mut write = |offset| {
        let request = Request {
            id: 0,
            op: Op::Write { fua: true },
            offset,
            len: 4096,
            buffers: smallvec![memory.iovec(0, 4096)],
        };
        // SAFETY: the memory outlives the engine.
        unsafe { engine.submit(slot, request) };
        let mut done = Vec::new();
        engine.wait(&mut done).unwrap();
        assert!(done.remove(0).result.is_ok());
    };
    // By and by enough is counted ahead, and the last write ends where the next cluster begins.
    (0..6).for_each(|cluster| write(cluster * 65536));
    write(7 * 65536 - 4096);
    let events = recorded(image.files()[0].as_raw_fd(), || {
        (0..16).for_each(|page| write(7 * 65536 + page * 4096));
    });
    let written: Vec<usize> = events
        .iter()
        .filter_map(|event| match event {
            Event::Durable { data, .. } => Some(data.len()),
            _ => None,
        })
        .collect();
    let [whole, _table, rest @ ..] = &written[..] else {
        panic!("{written:?}");
    };
    assert_eq!((*whole, events.len()), (65536, 17), "{written:?}");
    assert!(rest.iter().all(|len| *len == 4096), "{written:?}");
}

#[test]
fn encrypted_images_survive_power_cuts() {
    let mut bed = Bed::new("encrypted", 4096, 16, true);
    let secret = crate::Secret::new(b"passphrase".to_vec()).unwrap();
    bed.options.encryption = Some(crate::EncryptOptions {
        iteration_time: std::time::Duration::from_millis(1),
        ..crate::EncryptOptions::new(secret)
    });
    // Each is unlocked, which is meant to take its time.
    cut_often("encrypted", &bed, 40);
}

#[test]
fn one_bit_refcounts_survive_power_cuts() {
    workload("one-bit", 4096, 1, true);
}

#[test]
fn the_test_finds_a_write_that_comes_too_late() {
    // A mapping on disk before its data: what the commit order forbids.
    let bed = Bed::new("late", 4096, 16, false);
    let path = bed.create();
    let start = std::fs::read(&path).unwrap();
    let l1 = u64::from_be_bytes(start[40..48].try_into().unwrap());
    let stray = Event::Write {
        offset: l1,
        data: (1u64 << 63 | 0x10_0000).to_be_bytes().to_vec(),
    };
    let mut random = Random(1);
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        bed.replay(&start, &[stray], 20, &mut random);
    }));
    let _ = std::fs::remove_dir_all(&bed.directory);
    assert!(caught.is_err());
}
