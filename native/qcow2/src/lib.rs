// SPDX-License-Identifier: Apache-2.0
//! Disk images for vmbus: qcow2 and raw, chains of them, and the engines that do the I/O.
//!
//! | module     | job                                                                    |
//! |------------|------------------------------------------------------------------------|
//! | `image`    | opened files in, activate and inactivate, the lock                     |
//! | `state`    | what stands under the lock; the chain as a whole                       |
//! | `resolve`  | where the bytes of a read come from                                    |
//! | `cache`    | metadata blocks in memory                                              |
//! | `commit`   | the order in which metadata reaches the disk (the proof against cuts)  |
//! | `epoch`    | when a freed cluster may be used again                                 |
//! | `crypt`    | encrypted images: LUKS, ciphers, key slots                             |
//! | `plan`     | what metadata code tells an engine                                     |
//! | `engine`   | requests in, plans carried out, completions out                        |
//! | `ring`     | one I/O thread's io_uring, made before the sandbox closes              |
//! | `locks`    | QEMU's locks on image files                                            |
//!
//! Bytes that come from an image or a guest never lead to a panic: the format code is held to
//! lints against indexing and unwrapping, and every size is checked where it is read.

#![deny(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
#![cfg_attr(
    test,
    allow(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic
    )
)]

mod bench;
mod blocking;
mod buffer;
mod bytes;
mod cache;
mod commit;
mod compare;
mod compress;
mod copy;
mod crypt;
mod disk;
mod engine;
mod epoch;
mod error;
#[cfg(test)]
mod faults;
mod file;
mod image;
mod info;
#[cfg(test)]
mod interrupted;
mod locks;
mod mailbox;
mod map;
mod nbd;
mod options;
mod overlay;
#[cfg(test)]
mod overlay_cuts;
mod pieces;
mod plan;
#[cfg(test)]
mod powercut;
mod qcow2;
#[cfg(test)]
mod recorder;
mod request;
mod resolve;
mod ring;
mod slab;
mod state;
mod types;

pub use bench::{bench, BenchOptions};
pub use compare::{compare, first_nonzero};
pub use copy::{copy, CopyOptions};
pub use crypt::amend::{amend_keys, KeyChange};
pub use crypt::create::EncryptOptions;
pub use crypt::info::{Encryption, LuksInfo};
pub use crypt::{fuzz_luks_header, Secret};
pub use disk::Disk;
pub use engine::{Engine, Pool, Slot};
pub use error::{Error, Kind, Result};
pub use file::Stamp;
pub use image::{Image, MAX_LAYERS};
pub use info::{info, looks_like_qcow2, set_backing, ImageInfo, Qcow2Info};
pub use map::{range_at, Range};
pub use nbd::{serve, serve_client, ServeOptions};
pub use options::{DetectZeroes, LayerFiles, OpenOptions};
pub use overlay::{commit_into, rebase};
pub use pieces::Progress;
pub use qcow2::amend::{amend, set_refcount_bits, AmendOptions};
pub use qcow2::bitmaps::{self, Bitmap, BitmapView};
pub use qcow2::check::{check, check_within, CheckReport, Repair, CHECK_MEMORY};
pub use qcow2::create::{create_qcow2, CreateOptions, Preallocation};
pub use qcow2::resize::{empty, resize, resize_with};
pub use qcow2::snapshot::{self, Snapshot};
pub use request::{Completion, Op, Request};
pub use ring::Ring;
pub use types::{Format, GuestCluster, GuestOffset, HostCluster, HostOffset};
