// SPDX-License-Identifier: Apache-2.0
//! What an image says about itself: read without locks, without activating it, and without
//! looking at its backing file.

use std::fs::File;

use crate::crypt::info::{self, Encryption};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::locks::{self, Use};
use crate::plan::Codec;
use crate::qcow2::bitmaps::{self, Bitmap};
use crate::qcow2::header::{autoclear, extension, incompatible, Header, LAZY_REFCOUNTS};
use crate::qcow2::snapshot::{self, Snapshot};
use crate::qcow2::Geometry;
use crate::types::Format;

/// The description of an image file.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The disk's size in bytes.
    pub size: u64,
    /// Bytes that the file takes on the host.
    pub allocated: u64,
    /// Bytes that it is long.
    pub file_len: u64,
    /// A file, not a block device.
    pub regular: bool,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
}

/// A qcow2 header in the words of its documentation.
#[derive(Debug, Clone)]
pub struct Qcow2Info {
    /// 2 or 3.
    pub version: u32,
    /// Bytes.
    pub cluster_size: u64,
    /// 1 to 64.
    pub refcount_bits: u32,
    /// zstd instead of zlib.
    pub zstd: bool,
    /// The compatible feature bit.
    pub lazy_refcounts: bool,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// The image was not closed.
    pub dirty: bool,
    /// The image is known to be wrong.
    pub corrupt: bool,
    /// The backing file's name.
    pub backing_name: Option<String>,
    /// Its format, where the header says it.
    pub backing_format: Option<String>,
    /// The external data file's name.
    pub data_name: Option<String>,
    /// The data file holds exactly the guest's bytes.
    pub data_raw: bool,
    /// How guest data is encrypted.
    pub encryption: Option<Encryption>,
    /// The persistent bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
}

/// Describe the image in `file`. With `lock`, refused while somebody writes it.
pub fn info(file: &File, format: Format, lock: bool) -> Result<ImageInfo> {
    let file = BlockFile::new(
        file.try_clone()
            .map_err(|e| Error::io("dup of the image's fd", &e))?,
    )?;
    if lock {
        locks::lock(file.fd(), Use::Read)?;
    }
    let described = describe(&file, format);
    if lock {
        locks::unlock(file.fd());
    }
    described
}

fn describe(file: &BlockFile, format: Format) -> Result<ImageInfo> {
    if format == Format::Raw {
        return Ok(ImageInfo {
            size: file.len()?,
            allocated: file.allocated(),
            file_len: file.len()?,
            regular: file.regular,
            qcow2: None,
        });
    }
    let header = Header::read(file)?;
    let has = |bits: u64, bit: u64| bits & bit != 0;
    let (snapshots, _) = snapshot::read_table(file, &header)?;
    let qcow2 = Qcow2Info {
        version: header.version,
        cluster_size: 1 << header.cluster_bits,
        refcount_bits: 1 << header.refcount_order,
        zstd: header.codec == Codec::Zstd,
        lazy_refcounts: has(header.compatible, LAZY_REFCOUNTS),
        extended_l2: header.extended_l2(),
        dirty: has(header.incompatible, incompatible::DIRTY),
        corrupt: has(header.incompatible, incompatible::CORRUPT),
        backing_name: header.backing_name.clone(),
        backing_format: header.backing_format(),
        data_name: header.data_name(),
        data_raw: has(header.autoclear, autoclear::DATA_FILE_RAW),
        encryption: info::describe(file, &header)?,
        bitmaps: bitmaps::list_in(file, &header, &Geometry::of(&header))?,
        snapshots,
    };
    Ok(ImageInfo {
        size: header.size,
        allocated: file.allocated(),
        file_len: file.len()?,
        regular: file.regular,
        qcow2: Some(qcow2),
    })
}

/// Whether the file begins like a qcow2 image. For people who ask what a file is; what opens an image
/// is told the format instead.
pub fn looks_like_qcow2(file: &File) -> bool {
    let mut magic = [0u8; 4];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut magic, 0).is_ok() && magic == *b"QFI\xfb"
}

/// Let the header name another backing file, or none. Nothing else changes: the caller answers for
/// the content (`rebase -u`).
pub fn set_backing(file: &File, backing: Option<(&str, Option<Format>)>) -> Result<()> {
    let file = BlockFile::new(
        file.try_clone()
            .map_err(|e| Error::io("dup of the image's fd", &e))?,
    )?;
    locks::lock(file.fd(), Use::Write)?;
    let changed = rename(&file, backing);
    locks::unlock(file.fd());
    changed
}

fn rename(file: &BlockFile, backing: Option<(&str, Option<Format>)>) -> Result<()> {
    let mut header = Header::read(file)?;
    if backing.is_some_and(|(name, _)| name.is_empty() || name.len() > 1023) {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the backing file's name must have 1 to 1023 bytes",
        ));
    }
    if backing.is_some() && header.autoclear & autoclear::DATA_FILE_RAW != 0 {
        return Err(Error::new(
            Kind::InvalidArgument,
            "a backing file and data_file_raw exclude each other",
        ));
    }
    header
        .extensions
        .retain(|known| known.kind != extension::BACKING_FORMAT);
    if let Some((_, Some(format))) = backing {
        let data = format.to_string().into_bytes();
        header.extensions.insert(
            0,
            crate::qcow2::header::Extension {
                kind: extension::BACKING_FORMAT,
                data,
            },
        );
    }
    header.backing_name = backing.map(|(name, _)| name.to_owned());
    let mut cluster = header.serialize_short()?;
    cluster.resize(cluster.len().next_multiple_of(512), 0);
    file.write_at(&cluster, 0)?;
    file.sync()
}
