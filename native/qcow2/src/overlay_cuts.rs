// SPDX-License-Identifier: Apache-2.0
//! Commit, rebase and shrinking, cut off at any moment and failing at each of their operations in turn: what
//! is seen through the image that they were called on is as it was, no file is corrupt, and running them
//! again completes them.
//!
//! What is written to the files is recorded together, each file's flush counting for that file alone; then both
//! are built as they could be after a cut (powercut.rs), and QEMU looks at some of these, too.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::interrupted::failing;
use crate::powercut::{apply, Random};
use crate::recorder::{recorded_of, Event};
use crate::{
    check, commit_into, create_qcow2, empty, info, rebase, resize, set_backing, CopyOptions,
    CreateOptions, Disk, Format, Image, LayerFiles, OpenOptions, Progress, Repair, Result,
};

const SIZE: u64 = 160 << 10;

/// The overlay `top` on `base`, which is shorter, and `other`, on which it may come to lie.
struct Bed {
    directory: PathBuf,
    seen: Vec<u8>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn bytes(image: &Arc<Image>) -> Vec<u8> {
    let mut data = vec![0; image.size() as usize];
    let mut disk = Disk::blocking(image.clone()).unwrap();
    disk.read(0, &mut data).unwrap();
    data
}

impl Bed {
    fn new(name: &str, clusters: (u64, u64), refcount_bits: u32) -> Bed {
        let directory =
            std::env::temp_dir().join(format!("vmbus-overlay-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut bed = Bed {
            directory,
            seen: Vec::new(),
        };
        let make = |name: &str, size, cluster_size, backing: Option<&str>| {
            let path = bed.directory.join(name);
            let options = CreateOptions {
                size,
                cluster_size,
                refcount_bits,
                backing: backing.map(|name| (name.to_owned(), Format::Qcow2)),
                ..CreateOptions::default()
            };
            let file = File::create_new(&path).map(|_| open(&path)).unwrap();
            create_qcow2(&file, None, &options).unwrap();
        };
        make("base", SIZE / 2, clusters.0, None);
        make("other", SIZE, clusters.0, None);
        make("top", SIZE, clusters.1, Some("base"));
        let write = |names: &[&str], pieces: &[(u64, u64, u8)]| {
            let image = bed.image(names, false);
            let mut disk = Disk::blocking(image.clone()).unwrap();
            for (at, len, value) in pieces {
                match value {
                    0 => disk.write_zeroes(*at, *len, true).unwrap(),
                    value => disk.write(*at, &vec![*value; *len as usize]).unwrap(),
                }
            }
            drop(disk);
            image.inactivate().unwrap();
        };
        write(&["base"], &[(0, 50_000, 1), (61_440, 10_000, 2)]);
        write(
            &["other"],
            &[
                (0, 40_000, 1),
                (40_960, 50_000, 3),
                (SIZE - 30_720, 9_000, 4),
            ],
        );
        write(
            &["top", "base"],
            &[
                (10_240, 9_000, 5),
                (30_720, 12_288, 0),
                (SIZE / 2 - 5_120, 40_960, 6),
            ],
        );
        bed.seen = bytes(&bed.image(&["top", "base"], true));
        bed
    }

    fn image(&self, names: &[&str], read_only: bool) -> Arc<Image> {
        let layer = |(n, name): (usize, &&str)| LayerFiles {
            format: Format::Qcow2,
            file: open(&self.directory.join(name)),
            data_file: None,
            // The copies of a cut name the originals.
            backing_name: names
                .get(n + 1)
                .map(|name| name.trim_start_matches("cut-").to_owned()),
            data_name: None,
            secret: None,
        };
        let layers = names.iter().enumerate().map(layer).collect();
        let options = OpenOptions {
            read_only,
            locks: false,
            ..OpenOptions::default()
        };
        let image = Image::open_chain(layers, options).unwrap();
        image.activate().unwrap();
        Arc::new(image)
    }

    fn backing(&self, name: &str) -> String {
        let found = info(&open(&self.directory.join(name)), Format::Qcow2, false).unwrap();
        found.qcow2.unwrap().backing_name.unwrap()
    }

    /// Both files are sound, and the overlay shows what it showed; of a shrunk one its beginning.
    fn verify(&self, prefix: &str, what: &str, qemu: bool) {
        let top = format!("{prefix}top");
        let below = self.backing(&top);
        let below = match below.as_str() {
            "base" => format!("{prefix}base"),
            other => other.to_owned(),
        };
        for name in [&top, &below] {
            let path = self.directory.join(name);
            let report = check(&open(&path), Repair::None, false).unwrap();
            assert_eq!(
                report.corruptions, 0,
                "{what}, {name}: {:?}",
                report.messages
            );
            if qemu {
                let words = ["check", "-q", "-f", "qcow2"];
                let done = Command::new("qemu-img").args(words).arg(&path).output();
                let done = done.unwrap();
                assert!(
                    matches!(done.status.code(), Some(0 | 3)),
                    "{what}, {name}: {done:?}"
                );
            }
        }
        let seen = bytes(&self.image(&[&top, &below], true));
        assert!(seen.len() <= self.seen.len(), "{what}");
        if let Some(at) = seen.iter().zip(&self.seen).position(|(a, b)| a != b) {
            let (is, was) = (seen[at], self.seen[at]);
            panic!("{what}: byte {at} of the overlay is {is}, and was {was}");
        }
    }
}

type Work = fn(&Bed, &str) -> Result<()>;

/// As `vmbus-img commit` does it.
fn commit(bed: &Bed, prefix: &str) -> Result<()> {
    let (top, base) = (format!("{prefix}top"), format!("{prefix}base"));
    let options = CopyOptions {
        threads: 1,
        ..CopyOptions::default()
    };
    let target = bed.image(&[&base], false);
    let overlay = bed.image(&[&top, &base], true);
    let done = commit_into(&overlay, &target, 1, &options, &Progress::default());
    drop(overlay);
    let closed = target.inactivate();
    drop(target);
    done.and(closed)?;
    let overlay = bed.image(&[&top, &base], false);
    let done = empty(&overlay);
    done.and(overlay.inactivate())
}

/// As `vmbus-img rebase` does it.
fn onto_other(bed: &Bed, prefix: &str) -> Result<()> {
    put_on_other(bed, prefix, false)
}

fn onto_other_packed(bed: &Bed, prefix: &str) -> Result<()> {
    put_on_other(bed, prefix, true)
}

fn put_on_other(bed: &Bed, prefix: &str, compress: bool) -> Result<()> {
    let (top, base) = (format!("{prefix}top"), format!("{prefix}base"));
    if bed.backing(&top) == "other" {
        return Ok(());
    }
    let options = CopyOptions {
        threads: 1,
        compress,
        ..CopyOptions::default()
    };
    let overlay = bed.image(&[&top, &base], false);
    let other = bed.image(&["other"], true);
    let done = rebase(&overlay, Some(&other), &options, &Progress::default());
    done.and(overlay.inactivate())?;
    let file = open(&bed.directory.join(&top));
    set_backing(&file, Some(("other", Some(Format::Qcow2))))
}

fn shrink(bed: &Bed, prefix: &str) -> Result<()> {
    let (top, base) = (format!("{prefix}top"), format!("{prefix}base"));
    let image = bed.image(&[&top, &base], false);
    let done = resize(&image, SIZE / 2 + 1024, true);
    done.and(image.inactivate())
}

/// The files as they could be after a cut, for `cuts` cuts.
fn cut(name: &str, bed: &Bed, work: Work, cuts: u64) {
    let cuts = std::env::var("VMBUS_CUTS").map_or(cuts, |cuts| cuts.parse().unwrap());
    let names = ["top", "base"];
    let paths = names.map(|name| bed.directory.join(name));
    let start = paths.clone().map(|path| std::fs::read(path).unwrap());
    let fds = paths.clone().map(|path| open(&path));
    let events = recorded_of(&[fds[0].as_raw_fd(), fds[1].as_raw_fd()], || {
        work(bed, "").unwrap();
    });
    bed.verify("", name, true);
    let mut random = Random(0x0ddc0ffee);
    let mut durable = start.clone();
    let mut since: Vec<(usize, &Event)> = Vec::new();
    let (mut tried, mut completed) = (0, 0);
    for (number, (file, event)) in events.iter().enumerate() {
        match event {
            Event::Sync => since.retain(|(of, earlier)| {
                if of == file {
                    apply(&mut durable[*of], earlier, &mut |_| true);
                }
                of != file
            }),
            other => since.push((*file, other)),
        }
        let due = cuts * (number as u64 + 1) / events.len() as u64;
        while tried < due {
            tried += 1;
            let mut cut = durable.clone();
            let (chance, whole) = (random.below(11), random.below(2) == 0);
            let mut order: Vec<_> = since.iter().collect();
            for n in (1..order.len()).rev() {
                order.swap(n, random.below(n as u64 + 1) as usize);
            }
            for (of, event) in order {
                let all = random.below(10) < chance;
                apply(&mut cut[*of], event, &mut |_| {
                    if whole {
                        all
                    } else {
                        random.below(10) < chance
                    }
                });
            }
            for (name, content) in names.iter().zip(&cut) {
                std::fs::write(bed.directory.join(format!("cut-{name}")), content).unwrap();
            }
            let what = format!("{name}, cut {tried} behind event {number}");
            bed.verify("cut-", &what, tried % 20 == 0);
            if tried % 5 == 0 {
                work(bed, "cut-").unwrap_or_else(|e| panic!("{what}: again: {e}"));
                bed.verify("cut-", &format!("{what}, completed"), false);
                completed += 1;
            }
        }
    }
    assert_eq!(tried, cuts);
    assert!(completed >= cuts / 5);
}

/// An error at each operation in turn, alone or with all that follow.
fn fail(name: &str, bed: &Bed, work: Work) {
    for lasting in [false, true] {
        for at in 0.. {
            for name in ["top", "base"] {
                let copy = bed.directory.join(format!("cut-{name}"));
                std::fs::copy(bed.directory.join(name), copy).unwrap();
            }
            let (done, struck) = failing(at, lasting, || {
                // What cannot even be opened has not begun.
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(bed, "cut-")))
            });
            let what = format!("{name}, error {at}, lasting: {lasting}");
            bed.verify("cut-", &what, at % 20 == 0);
            if !struck {
                assert!(matches!(done, Ok(Ok(()))), "{what}: {done:?}");
                assert!(at > 20, "{name} has only {at} operations");
                break;
            }
            work(bed, "cut-").unwrap_or_else(|e| panic!("{what}: again: {e}"));
            bed.verify("cut-", &format!("{what}, again"), false);
        }
    }
}

const SHAPES: [(&str, (u64, u64), u32); 3] = [
    ("small", (1024, 512), 16),
    ("usual", (65536, 65536), 16),
    ("mixed", (4096, 16384), 1),
];

fn cut_each(name: &str, work: Work) {
    for (shape, clusters, bits) in SHAPES {
        let name = format!("{name}-{shape}");
        cut(&name, &Bed::new(&name, clusters, bits), work, 50);
    }
}

fn fail_in_mixed(name: &str, work: Work) {
    fail(name, &Bed::new(name, (4096, 16384), 8), work);
}

#[test]
fn a_commit_may_be_cut_off_anywhere() {
    cut_each("commit-cut", commit);
}

#[test]
fn a_commit_may_fail_anywhere() {
    fail_in_mixed("commit-fail", commit);
}

#[test]
fn a_rebase_may_be_cut_off_anywhere() {
    cut_each("rebase-cut", onto_other);
}

#[test]
fn a_compressing_rebase_may_be_cut_off_anywhere() {
    cut_each("packed-cut", onto_other_packed);
}

#[test]
fn a_rebase_may_fail_anywhere() {
    fail_in_mixed("rebase-fail", onto_other);
}

#[test]
fn shrinking_may_be_cut_off_anywhere() {
    cut_each("shrink-cut", shrink);
}

#[test]
fn shrinking_an_overlay_may_fail_anywhere() {
    fail_in_mixed("shrink-fail", shrink);
}
