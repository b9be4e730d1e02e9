// SPDX-License-Identifier: Apache-2.0
//! The header of a qcow2 file: parsed into a typed value once, with every bound checked here, so
//! that nothing behind it checks again. (QEMU, docs/interop/qcow2; the limits are QEMU's.)

use crate::bytes::{be32, be64, put32, put64};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::plan::Codec;

pub(crate) use super::extensions::{extension, feature_names, Extension};
use super::extensions::{parse_extensions, refuse_unknown};

const MAGIC: u32 = 0x5146_49fb;
/// Length of the version 3 header without extras, and as we write it (with the compression type).
const V3_LENGTH: u32 = 104;
const OUR_LENGTH: u32 = 112;
const V2_LENGTH: u32 = 72;
/// The largest refcount and L1 tables that QEMU takes, in bytes.
const MAX_REFTABLE: u64 = 8 << 20;
const MAX_L1: u64 = 32 << 20;
/// The most snapshots, and the longest backing file name.
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_NAME: u32 = 1023;
/// The smallest clusters that have subclusters: 16 KiB.
pub(crate) const MIN_EXTENDED_BITS: u32 = 14;
/// A LUKS header alone, and far more than one with eight slots of the longest keys takes.
const MIN_LUKS: u64 = 592;
const MAX_LUKS: u64 = 64 << 20;

/// Where fields stand that are changed in place.
pub(crate) mod field {
    pub(crate) const BACKING_OFFSET: usize = 8;
    pub(crate) const SIZE: usize = 24;
    pub(crate) const L1_SIZE: usize = 36;
    pub(crate) const L1_OFFSET: usize = 40;
    pub(crate) const REFTABLE_OFFSET: usize = 48;
    pub(crate) const REFTABLE_CLUSTERS: usize = 56;
    pub(crate) const SNAPSHOTS: usize = 60;
    pub(crate) const SNAPSHOTS_OFFSET: usize = 64;
    pub(crate) const INCOMPATIBLE: usize = 72;
    pub(crate) const AUTOCLEAR: usize = 88;
    pub(crate) const REFCOUNT_ORDER: usize = 96;
}

/// Incompatible features.
pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1 << 0;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    pub(crate) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible features.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Autoclear features.
pub(crate) mod autoclear {
    pub(crate) const BITMAPS: u64 = 1 << 0;
    pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;
}

/// How guest data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CryptMethod {
    None,
    /// QEMU's old AES, which is read only to get away from it.
    Aes,
    /// LUKS; its header with key material takes `len` bytes at `offset`.
    Luks {
        offset: u64,
        len: u64,
    },
}

impl CryptMethod {
    fn parse(method: u32, extensions: &[Extension], cluster_bits: u32) -> Result<CryptMethod> {
        match method {
            0 => Ok(CryptMethod::None),
            1 => Ok(CryptMethod::Aes),
            2 => {
                let pointer = extensions
                    .iter()
                    .find(|extension| extension.kind == extension::CRYPTO)
                    .filter(|extension| extension.data.len() == 16)
                    .and_then(|extension| {
                        Some((be64(&extension.data, 0)?, be64(&extension.data, 8)?))
                    });
                let (offset, len) = pointer.ok_or_else(|| {
                    Error::invalid(
                        "the image is encrypted, but does not say where its LUKS header is",
                    )
                })?;
                if offset == 0 || offset % (1 << cluster_bits) != 0 || offset >= 1 << 56 {
                    return Err(Error::invalid(format!(
                        "the LUKS header's offset {offset:#x} is impossible"
                    )));
                }
                if !(MIN_LUKS..=MAX_LUKS).contains(&len) {
                    return Err(Error::invalid(format!(
                        "a LUKS header of {len} bytes is impossible"
                    )));
                }
                Ok(CryptMethod::Luks { offset, len })
            }
            n => Err(Error::invalid(format!(
                "encryption method {n} does not exist"
            ))),
        }
    }

    fn number(self) -> u32 {
        match self {
            CryptMethod::None => 0,
            CryptMethod::Aes => 1,
            CryptMethod::Luks { .. } => 2,
        }
    }
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size: u64,
    pub(crate) crypt: CryptMethod,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) refcount_order: u32,
    pub(crate) codec: Codec,
    pub(crate) backing_name: Option<String>,
    pub(crate) extensions: Vec<Extension>,
}

impl Header {
    /// Read and check the header of `file`.
    pub(crate) fn read(file: &BlockFile) -> Result<Header> {
        let mut start = [0u8; OUR_LENGTH as usize];
        file.read_at(&mut start, 0)?;
        if be32(&start, 0) != Some(MAGIC) {
            return Err(Error::invalid("Image is not in qcow2 format"));
        }
        let cluster_bits = be32(&start, 20).unwrap_or(0);
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::invalid(format!(
                "cluster size 2^{cluster_bits} is not within 512 bytes and 2 MiB"
            )));
        }
        let mut cluster = vec![0u8; 1 << cluster_bits];
        file.read_at(&mut cluster, 0)?;
        Header::parse(&cluster)
    }

    /// Parse the image's first cluster.
    pub(crate) fn parse(cluster: &[u8]) -> Result<Header> {
        let short = || Error::invalid("the header is cut short");
        let word = |at: usize| be32(cluster, at).ok_or_else(short);
        let long = |at: usize| be64(cluster, at).ok_or_else(short);
        if word(0)? != MAGIC {
            return Err(Error::invalid("Image is not in qcow2 format"));
        }
        let version = word(4)?;
        if !(2..=3).contains(&version) {
            return Err(Error::unsupported(format!("qcow2 version {version}")));
        }
        let (length, features, order) = if version == 3 {
            (word(100)?, [long(72)?, long(80)?, long(88)?], word(96)?)
        } else {
            (V2_LENGTH, [0; 3], 4)
        };
        if version == 3
            && (length < V3_LENGTH || length as usize > cluster.len() || length % 8 != 0)
        {
            return Err(Error::invalid(format!(
                "header length {length} is impossible"
            )));
        }
        let [incompatible, compatible, autoclear] = features;
        let extensions = parse_extensions(cluster, length as usize, long(field::BACKING_OFFSET)?)?;
        refuse_unknown(incompatible, &extensions)?;
        let compression = if length > V3_LENGTH {
            cluster.get(104).copied().unwrap_or(0)
        } else {
            0
        };
        let codec = match (compression, incompatible & incompatible::COMPRESSION != 0) {
            (0, false) => Codec::Zlib,
            (1, true) => Codec::Zstd,
            (kind @ 2.., true) => {
                return Err(Error::unsupported(format!("compression type {kind}")))
            }
            _ => {
                return Err(Error::invalid(
                    "compression type and feature bit contradict each other",
                ))
            }
        };
        let header = Header {
            version,
            cluster_bits: word(20)?,
            size: long(field::SIZE)?,
            crypt: CryptMethod::parse(word(32)?, &extensions, word(20)?.min(21))?,
            l1_entries: word(field::L1_SIZE)?,
            l1_offset: long(field::L1_OFFSET)?,
            reftable_offset: long(field::REFTABLE_OFFSET)?,
            reftable_clusters: word(field::REFTABLE_CLUSTERS)?,
            snapshots: word(field::SNAPSHOTS)?,
            snapshots_offset: long(field::SNAPSHOTS_OFFSET)?,
            incompatible,
            compatible,
            autoclear,
            refcount_order: order,
            codec,
            backing_name: parse_name(cluster, long(field::BACKING_OFFSET)?, word(16)?)?,
            extensions,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<()> {
        let invalid = |message: String| Err(Error::invalid(message));
        if !(9..=21).contains(&self.cluster_bits) {
            return invalid(format!(
                "cluster size 2^{} is not within 512 bytes and 2 MiB",
                self.cluster_bits
            ));
        }
        if self.extended_l2() && self.cluster_bits < MIN_EXTENDED_BITS {
            return invalid(
                "extended L2 entries need clusters of at least 16 KiB: a subcluster is a sector or more"
                    .into(),
            );
        }
        if self.refcount_order > 6 {
            return invalid(format!(
                "refcount width 2^{} is more than 64 bits",
                self.refcount_order
            ));
        }
        let cluster = 1u64 << self.cluster_bits;
        let aligned = |offset: u64| offset % cluster == 0 && offset < 1 << 56;
        if self.reftable_offset == 0 || !aligned(self.reftable_offset) {
            return invalid(format!(
                "the refcount table's offset {:#x} is impossible",
                self.reftable_offset
            ));
        }
        if self.reftable_clusters == 0
            || u64::from(self.reftable_clusters) * cluster > MAX_REFTABLE.max(cluster)
        {
            return invalid(format!(
                "a refcount table of {} clusters is impossible",
                self.reftable_clusters
            ));
        }
        if !aligned(self.l1_offset) || (self.l1_offset == 0 && self.l1_entries > 0) {
            return invalid(format!(
                "the L1 table's offset {:#x} is impossible",
                self.l1_offset
            ));
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1 {
            return invalid(format!(
                "an L1 table of {} entries is impossible",
                self.l1_entries
            ));
        }
        if self.size > i64::MAX as u64
            || u64::from(self.l1_entries)
                < l1_entries(self.size, self.cluster_bits, self.extended_l2())
        {
            return invalid(format!(
                "an L1 table of {} entries cannot map {} bytes",
                self.l1_entries, self.size
            ));
        }
        if self.snapshots > MAX_SNAPSHOTS || !aligned(self.snapshots_offset) {
            return invalid(format!(
                "a table of {} snapshots at {:#x} is impossible",
                self.snapshots, self.snapshots_offset
            ));
        }
        if self.has_data_file() && self.snapshots > 0 {
            return invalid("an image with an external data file cannot have snapshots".into());
        }
        Ok(())
    }

    pub(crate) fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    pub(crate) fn extended_l2(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    pub(crate) fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions
            .iter()
            .find(|extension| extension.kind == kind)
            .map(|extension| extension.data.as_slice())
    }

    /// The external data file's name, as the extension has it.
    pub(crate) fn data_name(&self) -> Option<String> {
        self.extension(extension::DATA_FILE)
            .map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// The backing file's format, as the extension has it.
    pub(crate) fn backing_format(&self) -> Option<String> {
        self.extension(extension::BACKING_FORMAT)
            .map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// The same in one sector if that can be, so that it is replaced at once: the feature names, which are there
    /// for people, are left out before it grows beyond.
    pub(crate) fn serialize_short(&self) -> Result<Vec<u8>> {
        let whole = self.serialize()?;
        if whole.len() <= 512 {
            return Ok(whole);
        }
        let mut without = self.clone();
        without
            .extensions
            .retain(|known| known.kind != extension::FEATURE_NAMES);
        without.serialize()
    }

    /// The header as it stands in the first cluster, zeros behind it.
    pub(crate) fn serialize(&self) -> Result<Vec<u8>> {
        let length = if self.version == 3 {
            OUR_LENGTH
        } else {
            V2_LENGTH
        };
        let mut out = vec![0u8; length as usize];
        put32(&mut out, 0, MAGIC);
        put32(&mut out, 4, self.version);
        put32(&mut out, 20, self.cluster_bits);
        put64(&mut out, field::SIZE, self.size);
        put32(&mut out, 32, self.crypt.number());
        put32(&mut out, field::L1_SIZE, self.l1_entries);
        put64(&mut out, field::L1_OFFSET, self.l1_offset);
        put64(&mut out, field::REFTABLE_OFFSET, self.reftable_offset);
        put32(&mut out, field::REFTABLE_CLUSTERS, self.reftable_clusters);
        put32(&mut out, field::SNAPSHOTS, self.snapshots);
        put64(&mut out, field::SNAPSHOTS_OFFSET, self.snapshots_offset);
        if self.version == 3 {
            put64(&mut out, field::INCOMPATIBLE, self.incompatible);
            put64(&mut out, 80, self.compatible);
            put64(&mut out, field::AUTOCLEAR, self.autoclear);
            put32(&mut out, 96, self.refcount_order);
            put32(&mut out, 100, length);
            if let Some(kind) = out.get_mut(104) {
                *kind = u8::from(self.codec == Codec::Zstd);
            }
        }
        for extension in &self.extensions {
            out.extend_from_slice(&extension.kind.to_be_bytes());
            out.extend_from_slice(&(extension.data.len() as u32).to_be_bytes());
            out.extend_from_slice(&extension.data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend_from_slice(&[0; 8]);
        if let Some(name) = &self.backing_name {
            let at = out.len() as u64;
            put64(&mut out, field::BACKING_OFFSET, at);
            put32(&mut out, 16, name.len() as u32);
            out.extend_from_slice(name.as_bytes());
        }
        if out.len() > 1 << self.cluster_bits {
            // The feature names are there for people; in a small cluster they make room.
            let mut without = self.clone();
            without
                .extensions
                .retain(|known| known.kind != extension::FEATURE_NAMES);
            if without.extensions.len() < self.extensions.len() {
                return without.serialize();
            }
            return Err(Error::new(
                Kind::InvalidArgument,
                "header, extensions and names do not fit into one cluster",
            ));
        }
        Ok(out)
    }
}

/// L1 entries that a disk of `size` bytes needs.
pub(crate) fn l1_entries(size: u64, cluster_bits: u32, extended_l2: bool) -> u64 {
    size.div_ceil(1u64 << (2 * cluster_bits - if extended_l2 { 4 } else { 3 }))
}

fn parse_name(cluster: &[u8], offset: u64, len: u32) -> Result<Option<String>> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let start = offset as usize;
    let name = if len > MAX_NAME || offset > cluster.len() as u64 {
        None
    } else {
        cluster.get(start..start + len as usize)
    };
    let name = name.ok_or_else(|| {
        Error::invalid("the backing file's name does not lie in the first cluster")
    })?;
    match std::str::from_utf8(name) {
        Ok(name) => Ok(Some(name.to_owned())),
        Err(_) => Err(Error::invalid("the backing file's name is not UTF-8")),
    }
}
