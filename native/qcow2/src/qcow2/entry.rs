// SPDX-License-Identifier: Apache-2.0
//! L2 entries: what one says about its guest cluster.
//!
//! An entry is one word: where the cluster is, and flags. With *extended L2 entries* a second word
//! follows, with two bits for each of the cluster's 32 subclusters: whether it is in the host cluster, and
//! whether it reads as zeros. A subcluster with neither is the backing file's. (QEMU,
//! docs/interop/qcow2, "Extended L2 Entries".)
//!
//! An entry whose subclusters are all alike decodes to the same [`Mapping`] as a plain entry does; what
//! is mixed is [`Mapping::Split`]. So only the places that make or read parts of clusters know of
//! subclusters at all.

use crate::bytes::be64;
use crate::error::Error;
use crate::qcow2::Geometry;
use crate::types::HostOffset;

/// The cluster's refcount is exactly one: it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, without extended entries).
const ZERO: u64 = 1;
/// The offset in an L1 or standard L2 entry.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of a cluster, where there are any.
pub(crate) const SUBCLUSTERS: u32 = 32;

/// A guest cluster's mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// The backing file's, or zeros without one.
    Unallocated,
    /// Zeros; `host` is a cluster that is kept for it.
    Zero {
        host: Option<HostOffset>,
        copied: bool,
    },
    /// A cluster of the data file.
    Data { host: HostOffset, copied: bool },
    /// Compressed, `stored` bytes at most.
    Compressed { host: HostOffset, stored: u64 },
    /// Its subclusters differ, or all of them are the backing file's though it has a host cluster.
    Split {
        host: Option<HostOffset>,
        copied: bool,
        parts: Subclusters,
    },
}

impl Mapping {
    /// The host cluster (not of a compressed one), and whether it is ours alone.
    pub(crate) fn host(&self) -> Option<(HostOffset, bool)> {
        match *self {
            Mapping::Data { host, copied } => Some((host, copied)),
            Mapping::Zero { host, copied } | Mapping::Split { host, copied, .. } => {
                host.map(|host| (host, copied))
            }
            Mapping::Unallocated | Mapping::Compressed { .. } => None,
        }
    }

    /// The state of byte `skip` of the cluster, and how many bytes from there on have it.
    pub(crate) fn run(&self, geometry: &Geometry, skip: u64) -> (Part, u64) {
        let parts = self.parts();
        let unit = geometry.cluster() / u64::from(SUBCLUSTERS);
        let first = (skip / unit) as u32;
        let part = parts.part(first);
        let end = (first..SUBCLUSTERS)
            .find(|index| parts.part(*index) != part)
            .unwrap_or(SUBCLUSTERS);
        (part, u64::from(end) * unit - skip)
    }

    /// The state of each subcluster; for a compressed cluster as if it were plain.
    pub(crate) fn parts(&self) -> Subclusters {
        match self {
            Mapping::Unallocated => Subclusters::NONE,
            Mapping::Zero { .. } => Subclusters::ZEROS,
            Mapping::Data { .. } | Mapping::Compressed { .. } => Subclusters::DATA,
            Mapping::Split { parts, .. } => *parts,
        }
    }
}

/// What a subcluster is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The backing file's.
    Below,
    /// Zeros.
    Zero,
    /// In the host cluster.
    Data,
}

/// The states of a cluster's subclusters. A set bit of `data` and of `zero` exclude each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subclusters {
    data: u32,
    zero: u32,
}

impl Subclusters {
    pub(crate) const NONE: Subclusters = Subclusters { data: 0, zero: 0 };
    pub(crate) const DATA: Subclusters = Subclusters {
        data: u32::MAX,
        zero: 0,
    };
    pub(crate) const ZEROS: Subclusters = Subclusters {
        data: 0,
        zero: u32::MAX,
    };

    pub(crate) fn part(&self, index: u32) -> Part {
        match (self.data >> index & 1, self.zero >> index & 1) {
            (0, 0) => Part::Below,
            (0, _) => Part::Zero,
            _ => Part::Data,
        }
    }

    /// The same with the subclusters `range` in another state.
    pub(crate) fn with(&self, range: std::ops::Range<u32>, part: Part) -> Subclusters {
        let bits = mask(&range);
        let (data, zero) = (self.data & !bits, self.zero & !bits);
        match part {
            Part::Below => Subclusters { data, zero },
            Part::Zero => Subclusters {
                data,
                zero: zero | bits,
            },
            Part::Data => Subclusters {
                data: data | bits,
                zero,
            },
        }
    }

    /// The same without what is in the host cluster.
    pub(crate) fn without_data(&self) -> Subclusters {
        Subclusters { data: 0, ..*self }
    }

    /// From the first to behind the last subcluster that is in the host cluster.
    pub(crate) fn data_span(&self) -> Option<std::ops::Range<u32>> {
        (self.data != 0)
            .then(|| self.data.trailing_zeros()..SUBCLUSTERS - self.data.leading_zeros())
    }

    fn bitmap(&self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.data)
    }
}

fn mask(range: &std::ops::Range<u32>) -> u32 {
    let below = |end: u32| ((1u64 << end.min(SUBCLUSTERS)) - 1) as u32;
    below(range.end) & !below(range.start)
}

/// An entry as it stands in an L2 table. `bitmap` is 0 without extended entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct L2Entry {
    pub(crate) word: u64,
    pub(crate) bitmap: u64,
}

impl L2Entry {
    /// The entry that begins at `at` of a table's bytes.
    pub(crate) fn at(geometry: &Geometry, bytes: &[u8], at: usize) -> Option<L2Entry> {
        let bitmap = if geometry.extended_l2 {
            be64(bytes, at + 8)?
        } else {
            0
        };
        Some(L2Entry {
            word: be64(bytes, at)?,
            bitmap,
        })
    }

    /// All entries in a piece of a table.
    pub(crate) fn all<'a>(
        geometry: &'a Geometry,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = L2Entry> + 'a {
        let size = geometry.l2_entry_size() as usize;
        bytes
            .chunks_exact(size)
            .map(move |entry| L2Entry::at(geometry, entry, 0).unwrap_or_default())
    }

    /// A cluster of data that is ours alone.
    pub(crate) fn data(geometry: &Geometry, host: HostOffset) -> L2Entry {
        L2Entry::parts(geometry, Some((host, true)), Subclusters::DATA)
    }

    /// Zeros; `host` is kept for them, and is ours alone. Only version 3 has them.
    pub(crate) fn zeros(geometry: &Geometry, host: Option<HostOffset>) -> L2Entry {
        let host = host.map(|host| (host, true));
        let entry = L2Entry::parts(geometry, host, Subclusters::ZEROS);
        if geometry.extended_l2 {
            entry
        } else {
            L2Entry {
                word: entry.word | ZERO,
                bitmap: 0,
            }
        }
    }

    /// Subclusters in these states (all data, without extended entries).
    pub(crate) fn parts(
        geometry: &Geometry,
        host: Option<(HostOffset, bool)>,
        parts: Subclusters,
    ) -> L2Entry {
        let word = match host {
            Some((host, copied)) => host.0 | if copied { COPIED } else { 0 },
            None => 0,
        };
        let bitmap = if geometry.extended_l2 {
            parts.bitmap()
        } else {
            0
        };
        L2Entry { word, bitmap }
    }

    /// A compressed cluster of `len` bytes.
    pub(crate) fn compressed(geometry: &Geometry, host: HostOffset, len: u64) -> L2Entry {
        let shift = 62 - (geometry.cluster_bits - 8);
        let sectors = (host.0 % 512 + len).div_ceil(512) - 1;
        L2Entry {
            word: COMPRESSED | sectors << shift | host.0,
            bitmap: 0,
        }
    }

    /// What the entry says; an error where the format does not allow it.
    pub(crate) fn decode(&self, geometry: &Geometry) -> Result<Mapping, Error> {
        if self.word & COMPRESSED != 0 {
            return self.decode_compressed(geometry);
        }
        let offset = self.word & OFFSET;
        let copied = self.word & COPIED != 0;
        if offset % geometry.cluster() != 0 {
            return Err(Error::invalid(format!(
                "data cluster offset {offset:#x} is not a cluster's"
            )));
        }
        // In an external data file offset 0 is a cluster like any other, told by the COPIED flag.
        let present = offset != 0 || (geometry.external_data() && copied);
        let host = present.then_some(HostOffset(offset));
        if geometry.extended_l2 {
            return self.decode_parts(host, copied);
        }
        if self.word & ZERO != 0 && geometry.version >= 3 {
            return Ok(Mapping::Zero { host, copied });
        }
        Ok(host.map_or(Mapping::Unallocated, |host| Mapping::Data { host, copied }))
    }

    fn decode_compressed(&self, geometry: &Geometry) -> Result<Mapping, Error> {
        if geometry.external_data() {
            return Err(Error::invalid(
                "a compressed cluster in an image with an external data file",
            ));
        }
        if self.bitmap != 0 {
            return Err(Error::invalid("a compressed cluster with subclusters"));
        }
        let shift = 62 - (geometry.cluster_bits - 8);
        let host = self.word & ((1 << shift) - 1);
        let sectors = (self.word >> shift) & ((1 << (geometry.cluster_bits - 8)) - 1);
        Ok(Mapping::Compressed {
            host: HostOffset(host),
            stored: (sectors + 1) * 512 - (host & 511),
        })
    }

    fn decode_parts(&self, host: Option<HostOffset>, copied: bool) -> Result<Mapping, Error> {
        let parts = Subclusters {
            data: self.bitmap as u32,
            zero: (self.bitmap >> 32) as u32,
        };
        if parts.data & parts.zero != 0 {
            return Err(Error::invalid(
                "a subcluster that is data and zeros at the same time",
            ));
        }
        if parts.data != 0 && host.is_none() {
            return Err(Error::invalid(
                "subclusters of data in a cluster that has no place",
            ));
        }
        Ok(match (host, parts) {
            (None, Subclusters::NONE) => Mapping::Unallocated,
            (Some(host), Subclusters::DATA) => Mapping::Data { host, copied },
            (host, Subclusters::ZEROS) => Mapping::Zero { host, copied },
            (host, parts) => Mapping::Split {
                host,
                copied,
                parts,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Codec;

    fn geometry(extended_l2: bool) -> Geometry {
        Geometry {
            layer: 0,
            file: 0,
            data: 0,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            codec: Codec::Zlib,
            extended_l2,
            crypt: crate::qcow2::header::CryptMethod::None,
        }
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same() {
        let host = HostOffset(0x50000);
        let mixed = Subclusters::DATA
            .with(3..9, Part::Zero)
            .with(30..32, Part::Below);
        for extended in [false, true] {
            let geometry = geometry(extended);
            let data = L2Entry::data(&geometry, host).decode(&geometry).unwrap();
            assert_eq!(data, Mapping::Data { host, copied: true });
            let zeros = L2Entry::zeros(&geometry, None).decode(&geometry).unwrap();
            assert_eq!(
                zeros,
                Mapping::Zero {
                    host: None,
                    copied: false
                }
            );
            let packed = L2Entry::compressed(&geometry, HostOffset(0x50123), 700);
            let decoded = packed.decode(&geometry).unwrap();
            assert!(
                matches!(decoded, Mapping::Compressed { host: HostOffset(0x50123), stored } if stored >= 700)
            );
        }
        let geometry = geometry(true);
        let split = L2Entry::parts(&geometry, Some((host, false)), mixed).decode(&geometry);
        assert_eq!(
            split.unwrap(),
            Mapping::Split {
                host: Some(host),
                copied: false,
                parts: mixed
            }
        );
        assert_eq!(mixed.data_span(), Some(0..30));
        assert_eq!(mixed.part(8), Part::Zero);
        assert_eq!(mixed.part(9), Part::Data);
        assert_eq!(mixed.part(31), Part::Below);
    }

    #[test]
    fn subclusters_that_contradict_themselves_are_errors() {
        let geometry = geometry(true);
        let word = 0x50000 | COPIED;
        let bad = [
            L2Entry {
                word,
                bitmap: 1 << 32 | 1,
            },
            L2Entry { word: 0, bitmap: 1 },
            L2Entry {
                word: COMPRESSED | word,
                bitmap: 1 << 40,
            },
        ];
        bad.iter()
            .for_each(|entry| assert!(entry.decode(&geometry).is_err(), "{entry:?}"));
    }
}
