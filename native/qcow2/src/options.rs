// SPDX-License-Identifier: Apache-2.0
//! What the caller says of an image: its files, and how they are to be used.

use std::fs::File;

use crate::crypt::Secret;
use crate::error::{Error, Kind, Result};
use crate::types::Format;

/// One layer of a chain: files that the caller has opened, and what the header must say.
#[derive(Debug)]
pub struct LayerFiles {
    /// The format of `file`.
    pub format: Format,
    /// The image file.
    pub file: File,
    /// The external data file, if the image has one.
    pub data_file: Option<File>,
    /// The backing file's name as the header must have it; None for no backing file.
    pub backing_name: Option<String>,
    /// The data file's name as the header must have it.
    pub data_name: Option<String>,
    /// The passphrase of an encrypted image.
    pub secret: Option<Secret>,
}

/// What becomes of writes whose bytes are all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// The range is zeroed by its mapping where that can be; its space stays.
    On,
    /// The same, and its space is given back.
    Unmap,
}

impl std::str::FromStr for DetectZeroes {
    type Err = Error;

    fn from_str(name: &str) -> Result<DetectZeroes> {
        match name {
            "off" => Ok(DetectZeroes::Off),
            "on" => Ok(DetectZeroes::On),
            "unmap" => Ok(DetectZeroes::Unmap),
            _ => Err(Error::new(
                Kind::InvalidArgument,
                "detect-zeroes is off, on or unmap",
            )),
        }
    }
}

/// How to open a chain.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// No writes to the active layer. Lower layers are never written.
    pub read_only: bool,
    /// Bytes of metadata that may be cached (at least 1 MiB; default 32 MiB).
    pub cache: usize,
    /// Take QEMU's locks in `activate` (default).
    pub locks: bool,
    /// The space of discarded clusters goes back to the host (default).
    pub discard: bool,
    /// Flushes reach the disk (default). Without, they keep their order in memory only: for an image that
    /// is made anew and of no use unless it gets finished.
    pub sync: bool,
    /// What becomes of writes whose bytes are all zeros (default: they are written).
    pub detect_zeroes: DetectZeroes,
    /// Show the disk as it was in this internal snapshot (id or name); only with `read_only`.
    pub snapshot: Option<String>,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            cache: 32 << 20,
            locks: true,
            discard: true,
            sync: true,
            detect_zeroes: DetectZeroes::Off,
            snapshot: None,
        }
    }
}
