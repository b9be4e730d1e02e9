// SPDX-License-Identifier: Apache-2.0
//! What the tests share: scratch directories, QEMU's tools, a seeded generator, a model of a disk.
#![allow(dead_code, missing_docs)]

use std::fs::{File, OpenOptions as FileOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vmbus_qcow2::{Format, Image, LayerFiles, OpenOptions, Result};

/// A directory that goes with the test.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("vmbus-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("scratch directory");
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.0.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// Whether QEMU's tools are here; says so by name when they are not.
pub fn qemu() -> bool {
    let here = Command::new("qemu-img").arg("--version").output().is_ok();
    if !here {
        eprintln!("SKIPPED: qemu-img is missing (package qemu-utils)");
    }
    here
}

/// Run a tool in `directory`; its output, which must be a success.
pub fn run(directory: &Path, words: &[&str]) -> String {
    let (ok, text) = try_run(directory, words);
    assert!(ok, "{words:?}: {text}");
    text
}

pub fn try_run(directory: &Path, words: &[&str]) -> (bool, String) {
    let output = Command::new(words[0])
        .args(&words[1..])
        .current_dir(directory)
        .output()
        .expect(words[0]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// xorshift64*: the same numbers for the same seed.
pub struct Random(pub u64);

impl Random {
    /// From VMBUS_SEED or the clock; printed, so that a failure can be had again.
    pub fn seeded(test: &str) -> Random {
        let clock = || {
            std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |d| d.as_nanos() as u64)
        };
        let seed = std::env::var("VMBUS_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(clock);
        eprintln!("{test}: VMBUS_SEED={seed}");
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}

pub fn open_file(path: &Path, write: bool) -> File {
    FileOptions::new()
        .read(true)
        .write(write)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A layer with the backing name its header has.
pub fn layer(path: &Path, format: Format, backing: Option<&str>, write: bool) -> LayerFiles {
    LayerFiles {
        format,
        file: open_file(path, write),
        data_file: None,
        backing_name: backing.map(str::to_owned),
        data_name: None,
        secret: None,
    }
}

pub fn active(layers: Vec<LayerFiles>, options: OpenOptions) -> Result<Arc<Image>> {
    let image = Image::open_chain(layers, options)?;
    image.activate()?;
    Ok(Arc::new(image))
}
