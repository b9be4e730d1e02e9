// SPDX-License-Identifier: Apache-2.0
//! The qcow2 format: one layer of a chain.
//!
//! | module     | job                                                  |
//! |------------|------------------------------------------------------|
//! | `header`   | the header, parsed and checked; `extensions`: what stands behind its fields |
//! | `mapping`  | guest cluster to host cluster (L1 and L2 tables)     |
//! | `entry`    | L2 entries, with and without subclusters             |
//! | `refcount` | how often each host cluster is used                  |
//! | `overlap`  | what each cluster of metadata holds: nothing else is written there |
//! | `alloc`    | finding clusters; `freed`: giving them back; `reftable`: room for more counts |
//! | `create`   | making images                                        |
//! | `amend`    | changing an image's options                          |
//! | `resize`   | growing and shrinking; `preallocate`: clusters before they are written |
//! | `bitmaps`  | persistent bitmaps                                   |
//! | `snapshot` | internal snapshots; `table`: the list of them, `tree`: what lies below one |
//! | `switch`   | changing counts, flags and tables all at once, for snapshots |
//! | `check`    | counting every pointer (`walk` finds them, `counts` keeps them); `repair` sets right |
//! | `write`    | planning writes; `packed`: compressed ones; `ticket`: what is written and not mapped yet |
//! | `zero`     | planning discards and zeroes                         |

pub(crate) mod alloc;
pub(crate) mod amend;
pub mod bitmaps;
pub(crate) mod check;
pub(crate) mod counts;
pub(crate) mod create;
pub(crate) mod entry;
mod extensions;
pub(crate) mod header;
pub(crate) mod mapping;
pub(crate) mod overlap;
pub(crate) mod packed;
pub(crate) mod preallocate;
pub(crate) mod refcount;
pub(crate) mod repair;
pub(crate) mod resize;
pub mod snapshot;
pub(crate) mod switch;
pub(crate) mod ticket;
pub(crate) mod walk;
mod walk_bitmaps;
pub(crate) mod write;
pub(crate) mod zero;

use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::plan::{Codec, FileId};
use crate::state::Described;
use header::{CryptMethod, Header};

/// The largest unit in which tables are cached.
const BLOCK: u64 = 4096;

/// What does not change about an open layer, small enough to copy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) layer: usize,
    /// The image file, with all metadata.
    pub(crate) file: FileId,
    /// Where guest data is: the image file, or the external data file.
    pub(crate) data: FileId,
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    pub(crate) codec: Codec,
    /// L2 entries of two words (entry.rs).
    pub(crate) extended_l2: bool,
    pub(crate) crypt: CryptMethod,
}

impl Geometry {
    /// Of an image that is looked at alone: files 0 and, where the data is elsewhere, 1.
    pub(crate) fn of(header: &Header) -> Geometry {
        Geometry {
            layer: 0,
            file: 0,
            data: usize::from(header.has_data_file()),
            version: header.version,
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            codec: header.codec,
            extended_l2: header.extended_l2(),
            crypt: header.crypt,
        }
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry_size()
    }

    /// Bytes of an L2 entry.
    pub(crate) fn l2_entry_size(&self) -> u64 {
        if self.extended_l2 {
            16
        } else {
            8
        }
    }

    /// L2 entries that stand in one cached block.
    pub(crate) fn l2_per_block(&self) -> u64 {
        self.block() / self.l2_entry_size()
    }

    /// What is mapped as one: a subcluster, or a cluster where there are none.
    pub(crate) fn subcluster(&self) -> u64 {
        if self.extended_l2 {
            self.cluster() / u64::from(entry::SUBCLUSTERS)
        } else {
            self.cluster()
        }
    }

    /// Bytes of a cached metadata block.
    pub(crate) fn block(&self) -> u64 {
        BLOCK.min(self.cluster())
    }

    /// Clusters that one refcount block counts.
    pub(crate) fn refblock_entries(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    pub(crate) fn max_refcount(&self) -> u64 {
        if self.refcount_order == 6 {
            u64::MAX
        } else {
            (1 << (1u32 << self.refcount_order)) - 1
        }
    }

    /// Whether guest data is encrypted: then a cluster that was never written does not read as zeros.
    pub(crate) fn sealed(&self) -> bool {
        self.crypt != CryptMethod::None
    }

    pub(crate) fn external_data(&self) -> bool {
        self.file != self.data
    }
}

/// A qcow2 layer.
pub(crate) struct Qcow2 {
    pub(crate) geometry: Geometry,
    pub(crate) header: Header,
}

impl Qcow2 {
    /// Read the header and compare the names in it with the caller's.
    pub(crate) fn open(layer: usize, files: &[BlockFile], described: &Described) -> Result<Qcow2> {
        let file = files
            .get(described.file)
            .ok_or_else(|| Error::invalid("no such file in the chain"))?;
        let header = Header::read(file)?;
        check_tables(file, &header)?;
        if header.backing_name != described.backing_name {
            return Err(changed(
                "backing",
                header.backing_name.as_deref(),
                described.backing_name.as_deref(),
            ));
        }
        let given = described.data != described.file;
        if header.has_data_file() != given {
            let message = if given {
                "the image has no external data file"
            } else {
                "the image's external data file is missing"
            };
            return Err(Error::new(Kind::BackingChanged, message));
        }
        if given && header.data_name() != described.data_name {
            return Err(changed(
                "data",
                header.data_name().as_deref(),
                described.data_name.as_deref(),
            ));
        }
        let geometry = Geometry {
            layer,
            file: described.file,
            data: described.data,
            ..Geometry::of(&header)
        };
        Ok(Qcow2 { geometry, header })
    }

    /// Read the header again (activation). What the layer is must not have changed.
    pub(crate) fn reread(&mut self, files: &[BlockFile]) -> Result<()> {
        let file = files
            .get(self.geometry.file)
            .ok_or_else(|| Error::invalid("no such file in the chain"))?;
        let header = Header::read(file)?;
        check_tables(file, &header)?;
        if header.crypt != self.header.crypt {
            return Err(Error::invalid(
                "the image's encryption has changed since it was opened",
            ));
        }
        let same = header.backing_name == self.header.backing_name
            && header.data_name() == self.header.data_name()
            && header.has_data_file() == self.header.has_data_file();
        if !same {
            return Err(Error::new(
                Kind::BackingChanged,
                "the header's file names have changed since the image was opened",
            ));
        }
        self.geometry.version = header.version;
        self.geometry.cluster_bits = header.cluster_bits;
        self.geometry.refcount_order = header.refcount_order;
        self.geometry.codec = header.codec;
        self.geometry.extended_l2 = header.extended_l2();
        self.header = header;
        Ok(())
    }

    /// Whether this version may write to the image at all.
    pub(crate) fn check_writable(&self) -> Result<()> {
        let bits = self.header.incompatible;
        if self.header.crypt == CryptMethod::Aes {
            return Err(Error::unsupported(
                "writing with the old AES encryption: convert the image to another one",
            ));
        }
        if bits & header::incompatible::CORRUPT != 0 {
            return Err(Error::invalid(
                "the image is marked corrupt: repair it with check -r all, or open it read-only",
            ));
        }
        if bits & header::incompatible::DIRTY != 0 {
            return Err(Error::unsupported(
                "writing to an image that was not closed (dirty bit): run check -r all first",
            ));
        }
        Ok(())
    }
}

/// A file cut short, or a header that points out of it.
fn check_tables(file: &BlockFile, header: &Header) -> Result<()> {
    let len = file.len()?;
    let l1_end = header
        .l1_offset
        .saturating_add(u64::from(header.l1_entries) * 8);
    if l1_end > len || header.reftable_offset >= len {
        return Err(Error::invalid(
            "the image file is cut short: its tables lie beyond its end",
        ));
    }
    Ok(())
}

fn changed(what: &str, found: Option<&str>, expected: Option<&str>) -> Error {
    let show = |name: Option<&str>| {
        name.map_or("none".to_owned(), |name| {
            format!("'{}'", name.escape_debug())
        })
    };
    let message = format!(
        "the header names the {what} file {}, not {}",
        show(found),
        show(expected)
    );
    Error::new(Kind::BackingChanged, message)
}
