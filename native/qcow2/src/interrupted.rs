// SPDX-License-Identifier: Apache-2.0
//! Operations on a whole image (snapshots, sizes, emptying) with an error at each of their reads, writes,
//! flushes and changes of length in turn, alone or with all that follow: the error is reported, what is seen
//! through the image is as it was or as it was to be, and the file is sound but for leaks.

use std::cell::Cell;
use std::fs::{File, OpenOptions as FileOptions};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::qcow2::snapshot;
use crate::{
    check, create_qcow2, empty, resize, CreateOptions, Disk, Format, Image, LayerFiles,
    OpenOptions, Repair,
};

const SIZE: u64 = 256 << 10;

thread_local! {
    /// How many operations go well before one fails, and whether all after it do, too.
    static FAULT: Cell<Option<(u64, bool)>> = const { Cell::new(None) };
    static STRUCK: Cell<bool> = const { Cell::new(false) };
}

/// Let operation `at` of `body` fail, and with `lasting` all that follow; tells whether it came to that.
pub(crate) fn failing<T>(at: u64, lasting: bool, body: impl FnOnce() -> T) -> (T, bool) {
    STRUCK.set(false);
    FAULT.set(Some((at, lasting)));
    let result = body();
    FAULT.set(None);
    (result, STRUCK.get())
}

/// Whether an error is to come: then this thread's operations must be its own.
pub(crate) fn pending() -> bool {
    FAULT.get().is_some()
}

/// Called before each operation on a file that is not an io_uring's.
pub(crate) fn strike(what: &str) -> Result<()> {
    match FAULT.get() {
        None => Ok(()),
        Some((0, lasting)) => {
            STRUCK.set(true);
            if !lasting {
                FAULT.set(None);
            }
            Err(Error::os(format!("injected: {what}"), libc::EIO))
        }
        Some((left, lasting)) => {
            FAULT.set(Some((left - 1, lasting)));
            Ok(())
        }
    }
}

fn open(path: &Path) -> File {
    let mut options = FileOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

fn image(path: &Path) -> Arc<Image> {
    let layer = LayerFiles {
        format: Format::Qcow2,
        file: open(path),
        data_file: None,
        backing_name: None,
        data_name: None,
        secret: None,
    };
    let options = OpenOptions {
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(vec![layer], options).unwrap();
    image.activate().unwrap();
    Arc::new(image)
}

fn content(image: &Arc<Image>) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    let mut disk = Disk::blocking(image.clone()).unwrap();
    disk.read(0, &mut bytes).unwrap();
    bytes
}

/// Data, zeros, a snapshot, and changes since.
fn sample(path: &Path, cluster_size: u64) {
    let options = CreateOptions {
        size: SIZE,
        cluster_size,
        ..CreateOptions::default()
    };
    let file = File::create_new(path).map(|_| open(path)).unwrap();
    create_qcow2(&file, None, &options).unwrap();
    let image = image(path);
    let mut disk = Disk::blocking(image.clone()).unwrap();
    disk.write(0, &[1; 40_000]).unwrap();
    disk.write_zeroes(20_000, 20_000, false).unwrap();
    snapshot::create(&image, "one").unwrap();
    disk.write(8192, &[2; 30_000]).unwrap();
    disk.write(SIZE - 20_000, &[3; 20_000]).unwrap();
    drop(disk);
    image.inactivate().unwrap();
}

/// One run with an error at operation `at`; false when the work ended before it came.
fn run(
    path: &Path,
    fault: (u64, bool),
    before: &[u8],
    after: &[u8],
    work: fn(&Image) -> Result<()>,
) -> bool {
    let image = image(path);
    STRUCK.set(false);
    FAULT.set(Some(fault));
    let done = work(&image);
    FAULT.set(None);
    let what = format!("{fault:?}: {done:?}");
    let seen = content(&image);
    if done.is_ok() {
        assert!(seen == after, "{what}: the disk is not as it was to be");
    } else {
        assert!(
            seen == before || seen == after,
            "{what}: the disk is neither as it was nor as it was to be"
        );
    }
    // After a failed flush it cannot be closed in order; what is on the disk is sound all the same.
    let closed = image.inactivate();
    assert!(closed.is_ok() || done.is_err(), "{what}: {closed:?}");
    drop(image);
    let report = check(&open(path), Repair::None, false).unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {:?}", report.messages);
    let again = self::image(path);
    let kept = content(&again);
    assert!(
        kept == before || kept == after,
        "{what}: the file holds neither what it held nor what it was to hold"
    );
    STRUCK.get()
}

fn everywhere(name: &str, cluster_size: u64, work: fn(&Image) -> Result<()>) {
    let directory = std::env::temp_dir().join(format!(
        "vmbus-interrupted-{}-{name}-{cluster_size}",
        std::process::id()
    ));
    std::fs::create_dir_all(&directory).unwrap();
    let (model, path) = (directory.join("model"), directory.join("image"));
    sample(&model, cluster_size);
    let started = std::fs::read(&model).unwrap();
    let before = content(&image(&model));
    std::fs::write(&path, &started).unwrap();
    let after = {
        let image = image(&path);
        work(&image).unwrap();
        let after = content(&image);
        image.inactivate().unwrap();
        after
    };
    for lasting in [false, true] {
        let mut at = 0;
        loop {
            std::fs::write(&path, &started).unwrap();
            if !run(&path, (at, lasting), &before, &after, work) {
                break;
            }
            at += 1;
        }
        assert!(at > 10, "{name} has only {at} operations");
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn taking_a_snapshot_may_fail_anywhere() {
    for cluster_size in [1024, 16384] {
        everywhere("create", cluster_size, |image| {
            snapshot::create(image, "two").map(drop)
        });
    }
}

#[test]
fn deleting_a_snapshot_may_fail_anywhere() {
    for cluster_size in [1024, 16384] {
        everywhere("delete", cluster_size, |image| {
            snapshot::delete(image, "one")
        });
    }
}

#[test]
fn going_back_to_a_snapshot_may_fail_anywhere() {
    for cluster_size in [1024, 16384] {
        everywhere("apply", cluster_size, |image| snapshot::apply(image, "one"));
    }
}

#[test]
fn shrinking_may_fail_anywhere() {
    for cluster_size in [1024, 16384] {
        everywhere("shrink", cluster_size, |image| {
            resize(image, SIZE / 4 - 512, true)
        });
    }
}

#[test]
fn growing_may_fail_anywhere() {
    everywhere("grow", 1024, |image| resize(image, 4 * SIZE, false));
}

#[test]
fn emptying_is_all_or_nothing_of_each_cluster() {
    // What is emptied is gone cluster by cluster; only soundness is asked of it.
    let directory =
        std::env::temp_dir().join(format!("vmbus-interrupted-{}-empty", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("image");
    sample(&path, 4096);
    let started = std::fs::read(&path).unwrap();
    for at in 0.. {
        std::fs::write(&path, &started).unwrap();
        let image = image(&path);
        STRUCK.set(false);
        FAULT.set(Some((at, true)));
        let done = empty(&image);
        FAULT.set(None);
        let struck = STRUCK.get();
        assert_eq!(done.is_err(), struck, "{at}: {done:?}");
        let _ = image.inactivate();
        drop(image);
        let report = check(&open(&path), Repair::None, false).unwrap();
        assert_eq!(report.corruptions, 0, "{at}: {:?}", report.messages);
        if !struck {
            break;
        }
    }
    std::fs::remove_dir_all(&directory).unwrap();
}
