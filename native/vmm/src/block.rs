// SPDX-License-Identifier: Apache-2.0
//! I/O threads for disks: they take requests off virtqueues, have an image engine carry them out, and give them
//! back ([`crate::io`] has a thread's life).
//!
//! Each has one engine (one ring) and serves several disks. Guest memory itself is what the engine reads and
//! writes; it is never registered with the kernel.
//!
//! Fairness and bounds: one visit to a queue takes at most as many requests as the queue has entries, then all
//! others get their turn; a queue has at most that many requests in flight, however often a hostile driver
//! offers the same descriptors.
//!
//! A disk grows between two requests: nothing more is begun, and when nothing is in flight the image is resized
//! (which is a matter of metadata) and the driver told.

#[cfg(test)]
mod changed_tests;
#[cfg(test)]
mod coded_tests;
mod counters;
mod scsi;
#[cfg(test)]
mod scsi_tests;
mod server;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmbus_qcow2::{Image, Pool, Ring};

use crate::error::{Error, Kind, Result};
use crate::io::{IoThread, Port, Trouble};
use crate::thread::{Role, ThreadHook};
use crate::virtio::blk;
use crate::virtio::live::ChangingConfig;

pub use counters::Counters;
pub use scsi::ScsiUnit;
use server::Server;

/// What an I/O thread serves.
pub enum Served {
    /// A disk on an active image.
    Disk {
        /// What requests are checked against.
        disk: blk::Disk,
        /// What the guest sees of it.
        config: Arc<ChangingConfig>,
        /// Where they go.
        image: Arc<Image>,
        /// What has happened.
        counters: Arc<Counters>,
    },
    /// A SCSI host adapter with these units, by target.
    Scsi(Vec<ScsiUnit>),
    /// Random numbers.
    Rng,
}

/// Starts thread `index` on `ring` (None: plain system calls), to serve these; a port for each comes back.
/// `trouble` hears of an end that nobody asked for; `pool` helps with compressed and encrypted images.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread or the ring has no room for all files.
pub fn start(
    index: usize,
    ring: Option<Ring>,
    served: Vec<Served>,
    pool: Option<Arc<Pool>>,
    hook: &ThreadHook,
    trouble: &Trouble,
) -> Result<(IoThread, Vec<Port>)> {
    let name = format!("block-{index}");
    IoThread::start(&name, Role::Block, served.len(), hook, trouble, |mailbox| {
        Server::new(ring, served, pool, mailbox)
    })
}

/// Lets an image grow that nothing is in flight of.
fn grow(image: &Image, size: u64) -> Result<()> {
    if size % blk::SECTOR != 0 {
        let message = format!("{size} is not a multiple of {}", blk::SECTOR);
        return Err(Error::invalid("size", message));
    }
    vmbus_qcow2::resize(image, size, false).map_err(|error| Error {
        argument: "size".to_owned(),
        ..image_error(error)
    })
}

/// How long the locks of an image are waited for. Those of a process that was killed outlive it by up to a second or two: the
/// kernel takes its rings apart later, by itself, and they hold its files.
const PATIENCE: Duration = Duration::from_secs(3);
const AGAIN: Duration = Duration::from_millis(20);

/// Takes up an image, whose last user may just have been killed.
///
/// # Errors
/// As [`Image::activate`]; `InUse` when it is still so after three seconds.
pub fn activate(image: &Image) -> vmbus_qcow2::Result<()> {
    let begin = Instant::now();
    loop {
        match image.activate() {
            Err(error)
                if error.kind() == vmbus_qcow2::Kind::InUse && begin.elapsed() < PATIENCE =>
            {
                std::thread::sleep(AGAIN);
            }
            done => return done,
        }
    }
}

/// An image's error, with its kind kept.
pub fn image_error(error: vmbus_qcow2::Error) -> Error {
    use vmbus_qcow2::Kind as Image;
    let kind = match error.kind() {
        Image::InvalidArgument => Kind::InvalidArgument,
        Image::ImageInvalid => Kind::ImageInvalid,
        Image::BackingChanged => Kind::BackingChanged,
        Image::NotSupported => Kind::NotSupported,
        Image::AccessDenied => Kind::AccessDenied,
        Image::InUse => Kind::InUse,
        Image::InvalidState => Kind::InvalidState,
        Image::NoSpace | Image::Io => Kind::Unavailable,
    };
    Error::new(kind, "", error.message())
}

/// The same, with the argument or the device that it is about.
pub fn error_of(argument: &str, error: vmbus_qcow2::Error) -> Error {
    Error {
        argument: argument.to_owned(),
        ..image_error(error)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions as FileOptions};
    use std::path::Path;

    use vmbus_qcow2::{Format, LayerFiles, OpenOptions};

    use super::*;

    fn image(path: &Path) -> Image {
        let file = FileOptions::new().read(true).write(true).open(path);
        let layer = LayerFiles {
            format: Format::Raw,
            file: file.unwrap(),
            data_file: None,
            backing_name: None,
            data_name: None,
            secret: None,
        };
        Image::open_chain(vec![layer], OpenOptions::default()).unwrap()
    }

    #[test]
    fn locks_that_go_in_a_moment_are_waited_for() {
        let path = std::env::temp_dir().join(format!("vmbus-patience-{}", std::process::id()));
        File::create(&path).unwrap().set_len(4096).unwrap();
        let (last, next) = (image(&path), image(&path));
        last.activate().unwrap();
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(last);
        });
        assert_eq!(
            next.activate().unwrap_err().kind(),
            vmbus_qcow2::Kind::InUse
        );
        activate(&next).unwrap();
        other.join().unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
