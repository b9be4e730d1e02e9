// SPDX-License-Identifier: Apache-2.0
//! Making an image: a header, a refcount table with one block, and then growth to the size wanted
//! by the same code that resizes images later.

use std::fs::File;
use std::sync::Arc;

use crate::crypt::create::EncryptOptions;
use crate::crypt::keyslot::Area;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::options::{LayerFiles, OpenOptions};
use crate::plan::{Codec, Stop};
use crate::qcow2::entry::{L2Entry, Subclusters};
use crate::qcow2::header::{
    autoclear, extension, feature_names, incompatible, l1_entries, CryptMethod, Extension, Header,
    LAZY_REFCOUNTS, MIN_EXTENDED_BITS,
};
use crate::qcow2::preallocate::preallocate;
use crate::qcow2::refcount;
use crate::state::Layer;
use crate::types::{Format, GuestCluster};

/// How much is allocated when an image is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables; the data clusters are mapped but sparse on the host.
    Metadata,
    /// The same, and the host has allocated the space.
    Falloc,
    /// The same, and zeros were written.
    Full,
}

/// What a new image is to be. `Default` is what QEMU makes: version 3, clusters of 64 KiB, 16-bit
/// refcounts.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The disk's size in bytes; rounded up to 512.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes in a cluster: a power of two within 512 and 2 MiB.
    pub cluster_size: u64,
    /// 1 to 64, a power of two; version 2 has 16.
    pub refcount_bits: u32,
    /// L2 entries with subclusters (version 3, clusters of at least 16 KiB).
    pub extended_l2: bool,
    /// The compatible feature bit (version 3).
    pub lazy_refcounts: bool,
    /// Compress with zstd instead of zlib (version 3).
    pub zstd: bool,
    /// The backing file's name as it shall stand in the header, and its format.
    pub backing: Option<(String, Format)>,
    /// The external data file's name (version 3).
    pub data_name: Option<String>,
    /// The data file holds exactly the guest's bytes.
    pub data_raw: bool,
    /// What is allocated at once.
    pub preallocation: Preallocation,
    /// Encrypt with LUKS.
    pub encryption: Option<EncryptOptions>,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            zstd: false,
            backing: None,
            data_name: None,
            data_raw: false,
            preallocation: Preallocation::Off,
            encryption: None,
        }
    }
}

impl CreateOptions {
    /// The options as a header; InvalidArgument says which option is wrong.
    fn header(&self) -> Result<Header> {
        let refuse = |message: String| Err(Error::new(Kind::InvalidArgument, message));
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return refuse("Cluster size must be a power of two between 512 and 2048k".into());
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return refuse(
                "Refcount width must be a power of two and may not exceed 64 bits".into(),
            );
        }
        let newer = [
            (
                self.refcount_bits != 16,
                "Different refcount widths than 16 bits require compatibility level 1.1 or above",
            ),
            (
                self.lazy_refcounts,
                "Lazy refcounts only supported with compatibility level 1.1 and above",
            ),
            (
                self.extended_l2,
                "Extended L2 entries are only supported with compatibility level 1.1 and above",
            ),
            (
                self.zstd,
                "Non-zlib compression type is only supported with compatibility level 1.1 and above",
            ),
            (
                self.data_name.is_some(),
                "External data files are only supported with compatibility level 1.1 and above",
            ),
        ];
        match (self.version, newer.iter().find(|(asked, _)| *asked)) {
            (3, _) | (2, None) => {}
            (2, Some((_, message))) => {
                return refuse(format!("{message} (use version=v3 or greater)"))
            }
            (n, _) => return refuse(format!("version {n} is neither 2 nor 3")),
        }
        if self.extended_l2 && self.cluster_size < 1 << MIN_EXTENDED_BITS {
            return refuse("extended_l2 needs a cluster_size of at least 16k".into());
        }
        if self.data_raw && self.data_name.is_none() {
            return refuse("data-file-raw requires data-file".into());
        }
        if self.encryption.is_some()
            && self.preallocation != Preallocation::Off
            && (self.version == 2 || self.data_name.is_some())
        {
            return refuse(
                "encryption with preallocation needs compat 1.1, and no data_file".into(),
            );
        }
        if self.data_raw && self.backing.is_some() {
            return refuse("a backing file and data_file_raw exclude each other".into());
        }
        if self
            .backing
            .as_ref()
            .is_some_and(|(name, _)| name.is_empty() || name.len() > 1023)
        {
            return refuse("the backing file's name must have 1 to 1023 bytes".into());
        }
        if self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return refuse("a backing file and preallocation need extended_l2".into());
        }
        if let Some(encryption) = &self.encryption {
            encryption.header()?;
        }
        let mut extensions = Vec::new();
        if let Some((_, format)) = &self.backing {
            extensions.push(Extension {
                kind: extension::BACKING_FORMAT,
                data: format.to_string().into_bytes(),
            });
        }
        if let Some(name) = &self.data_name {
            extensions.push(Extension {
                kind: extension::DATA_FILE,
                data: name.clone().into_bytes(),
            });
        }
        if self.version == 3 {
            extensions.push(feature_names());
        }
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        Ok(Header {
            version: self.version,
            cluster_bits: self.cluster_size.trailing_zeros(),
            size: 0,
            crypt: CryptMethod::None,
            l1_entries: 0,
            l1_offset: 0,
            reftable_offset: self.cluster_size,
            reftable_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: bit(self.zstd, incompatible::COMPRESSION)
                | bit(self.data_name.is_some(), incompatible::DATA_FILE)
                | bit(self.extended_l2, incompatible::EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, LAZY_REFCOUNTS),
            autoclear: bit(self.data_raw, autoclear::DATA_FILE_RAW),
            refcount_order: self.refcount_bits.trailing_zeros(),
            codec: if self.zstd { Codec::Zstd } else { Codec::Zlib },
            backing_name: self.backing.as_ref().map(|(name, _)| name.clone()),
            extensions,
        })
    }
}

/// Make a qcow2 image in `file` (opened for reading and writing; what was in it is gone), with its
/// external data file where the options name one.
pub fn create_qcow2(file: &File, data_file: Option<&File>, options: &CreateOptions) -> Result<()> {
    let header = options.header()?;
    if data_file.is_some() != options.data_name.is_some() {
        return Err(Error::new(
            Kind::InvalidArgument,
            "a data file needs a name, and the name a file",
        ));
    }
    let size = options
        .size
        .checked_next_multiple_of(512)
        .filter(|size| *size <= i64::MAX as u64);
    let size = size.ok_or_else(|| {
        Error::new(
            Kind::InvalidArgument,
            "the disk would be larger than 2^63 bytes",
        )
    })?;
    if l1_entries(size, header.cluster_bits, header.extended_l2()) * 8 > 32 << 20 {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the disk is too large for its clusters: choose a larger cluster_size",
        ));
    }
    let target = BlockFile::new(clone(file)?)?;
    if target.regular {
        target.set_len(0)?;
    }
    write_empty(&target, &header)?;
    let layer = LayerFiles {
        format: Format::Qcow2,
        file: clone(file)?,
        data_file: data_file.map(clone).transpose()?,
        backing_name: None,
        data_name: options.data_name.clone(),
        secret: None,
    };
    // The backing file's name is written last, so that the image can be opened alone here. So is the
    // place of the LUKS header: until then there is nothing encrypted in the image.
    let image = Arc::new(Image::open_chain(vec![layer], OpenOptions::default())?);
    image.activate()?;
    let prepared = crate::qcow2::resize::resize(&image, size, false)
        .and_then(|()| {
            preallocate(
                &image,
                &[],
                0,
                options.preallocation,
                options.encryption.is_some(),
            )
        })
        .and_then(|()| match &options.backing {
            Some(_) if options.preallocation != Preallocation::Off => show_backing(&image),
            _ => Ok(()),
        })
        .and_then(|()| encrypt(&image, options));
    let closed = image.inactivate();
    let crypt = prepared?;
    closed?;
    if let (true, Some(data)) = (options.preallocation == Preallocation::Off, data_file) {
        BlockFile::new(clone(data)?)?.set_len(size)?;
    }
    if header.backing_name.is_some() || crypt.is_some() {
        let mut named = Header::read(&target)?;
        named.backing_name = header.backing_name;
        if let Some((offset, len)) = crypt {
            named.crypt = CryptMethod::Luks { offset, len };
            let data = [offset.to_be_bytes(), len.to_be_bytes()].concat();
            let kind = extension::CRYPTO;
            named.extensions.insert(0, Extension { kind, data });
        }
        target.write_at(&named.serialize()?, 0)?;
    }
    target.sync()
}

/// Header, refcount table and one refcount block; no L1 table yet.
fn write_empty(target: &BlockFile, header: &Header) -> Result<()> {
    let header = Header {
        backing_name: None,
        ..header.clone()
    };
    let cluster = 1usize << header.cluster_bits;
    let mut start = header.serialize()?;
    start.resize(3 * cluster, 0);
    crate::bytes::put64(&mut start, cluster, 2 * cluster as u64);
    if let Some(block) = start.get_mut(2 * cluster..) {
        (0..3).for_each(|n| refcount::set(block, header.refcount_order, n, 1));
    }
    target.write_at(&start, 0)
}

/// Make room for a LUKS header with its key material and write it; gives its place.
fn encrypt(image: &Arc<Image>, options: &CreateOptions) -> Result<Option<(u64, u64)>> {
    let Some(encryption) = &options.encryption else {
        return Ok(None);
    };
    let len = encryption.header()?.payload;
    let run = crate::blocking::run(image, |state, waiter| {
        state.allocate_area(image.files(), len.div_ceil(options.cluster_size), waiter)
    })?;
    let offset = run.first.0 * options.cluster_size;
    let missing = || Error::invalid("no such file");
    let file = image.files().first().ok_or_else(missing)?;
    let room = run.count * options.cluster_size;
    file.write_at(&vec![0; room as usize], offset)?;
    crate::crypt::create::write(&Area { file, offset, len }, encryption)?;
    Ok(Some((offset, len)))
}

/// Let every subcluster be the backing file's, in the clusters that they have now.
fn show_backing(image: &Arc<Image>) -> Result<()> {
    let geometry = match image.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => qcow2.geometry,
        _ => return Ok(()),
    };
    let clusters = image.size().div_ceil(geometry.cluster());
    for first in (0..clusters).step_by(geometry.l2_per_block() as usize) {
        crate::blocking::run(image, |state, waiter| {
            if state.cache.crowded() {
                return Err(Stop::Commit);
            }
            for cluster in first..clusters.min(first + geometry.l2_per_block()) {
                let Some(table) = state.l2_table(&geometry, GuestCluster(cluster), waiter)? else {
                    return Ok(());
                };
                let index = cluster % geometry.l2_entries();
                let mapping = state
                    .l2_entry(&geometry, table.offset, index, waiter)?
                    .decode(&geometry)?;
                let entry = L2Entry::parts(&geometry, mapping.host(), Subclusters::NONE);
                state.set_l2_entry(&geometry, table.offset, index, entry);
            }
            Ok(())
        })?;
    }
    crate::blocking::settle(image)
}

fn clone(file: &File) -> Result<File> {
    file.try_clone()
        .map_err(|e| Error::io("dup of the image's fd", &e))
}
