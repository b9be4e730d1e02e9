// SPDX-License-Identifier: Apache-2.0
//! From a guest cluster to where its bytes are: the L1 and L2 tables.
//!
//! Entries come from the image and may be anything: an offset that is not a cluster's is an error,
//! one beyond the end of the file reads as zeros (the engine sees to that), and one that points into
//! metadata merely shows the guest metadata; nothing is ever written through an entry without the
//! COPIED flag, nor over metadata (overlap.rs), and check finds the rest.

use crate::bytes::{be64, put64};
use crate::cache::Class;
use crate::error::Error;
use crate::mailbox::Waiter;
use crate::plan::{Need, Planned};
use crate::qcow2::Geometry;
use crate::state::State;
use crate::types::{GuestCluster, HostOffset};

/// The cluster's refcount is exactly one: it may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3).
pub(crate) const ZERO: u64 = 1;
/// The offset in an L1 or standard L2 entry.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

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
}

/// What an L1 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct L2Table {
    pub(crate) offset: HostOffset,
    pub(crate) copied: bool,
}

/// Read an L1 entry.
pub(crate) fn decode_l1(geometry: &Geometry, entry: u64) -> Result<Option<L2Table>, Error> {
    let offset = entry & OFFSET;
    if offset == 0 {
        return Ok(None);
    }
    if offset % geometry.cluster() != 0 {
        return Err(Error::invalid(format!(
            "L2 table offset {offset:#x} is not a cluster's"
        )));
    }
    Ok(Some(L2Table {
        offset: HostOffset(offset),
        copied: entry & COPIED != 0,
    }))
}

/// Read an L2 entry.
pub(crate) fn decode_l2(geometry: &Geometry, entry: u64) -> Result<Mapping, Error> {
    if entry & COMPRESSED != 0 {
        if geometry.external_data() {
            return Err(Error::invalid(
                "a compressed cluster in an image with an external data file",
            ));
        }
        let shift = 62 - (geometry.cluster_bits - 8);
        let host = entry & ((1 << shift) - 1);
        let sectors = (entry >> shift) & ((1 << (geometry.cluster_bits - 8)) - 1);
        return Ok(Mapping::Compressed {
            host: HostOffset(host),
            stored: (sectors + 1) * 512 - (host & 511),
        });
    }
    let offset = entry & OFFSET;
    let copied = entry & COPIED != 0;
    if offset % geometry.cluster() != 0 {
        return Err(Error::invalid(format!(
            "data cluster offset {offset:#x} is not a cluster's"
        )));
    }
    // In an external data file offset 0 is a cluster like any other, told by the COPIED flag.
    let present = offset != 0 || (geometry.external_data() && copied);
    let host = present.then_some(HostOffset(offset));
    if entry & ZERO != 0 && geometry.version >= 3 {
        return Ok(Mapping::Zero { host, copied });
    }
    Ok(host.map_or(Mapping::Unallocated, |host| Mapping::Data { host, copied }))
}

/// The L2 entry of a compressed cluster.
pub(crate) fn encode_compressed(geometry: &Geometry, host: HostOffset, len: u64) -> u64 {
    let shift = 62 - (geometry.cluster_bits - 8);
    let sectors = (host.0 % 512 + len).div_ceil(512) - 1;
    COMPRESSED | sectors << shift | host.0
}

impl State {
    /// The entry number `index` of the table at `table`.
    pub(crate) fn table_entry(
        &mut self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
        waiter: &Waiter,
    ) -> Planned<u64> {
        let at = table.0.saturating_add(index.saturating_mul(8));
        let need = block_of(geometry, at);
        let block = self.cache.fetch(need, waiter)?;
        Ok(be64(block.bytes(), (at - need.offset.0) as usize).unwrap_or(0))
    }

    /// Change an entry whose block has been fetched under the same lock.
    pub(crate) fn set_table_entry(
        &mut self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
        entry: u64,
        class: Class,
    ) {
        let at = table.0.saturating_add(index.saturating_mul(8));
        let need = block_of(geometry, at);
        if let Some(bytes) = self.cache.modify(geometry.layer, need.offset, class) {
            put64(bytes, (at - need.offset.0) as usize, entry);
        }
    }

    /// The L2 table for a guest cluster.
    pub(crate) fn l2_table(
        &mut self,
        geometry: &Geometry,
        cluster: GuestCluster,
        waiter: &Waiter,
    ) -> Planned<Option<L2Table>> {
        let index = cluster.0 / geometry.l2_entries();
        let Some((l1, entries)) = self.l1(geometry.layer) else {
            return Ok(None);
        };
        if index >= entries {
            return Ok(None);
        }
        let entry = self.table_entry(geometry, l1, index, waiter)?;
        Ok(decode_l1(geometry, entry)?)
    }

    /// A guest cluster's mapping in one layer.
    pub(crate) fn lookup(
        &mut self,
        geometry: &Geometry,
        cluster: GuestCluster,
        waiter: &Waiter,
    ) -> Planned<Mapping> {
        let Some(table) = self.l2_table(geometry, cluster, waiter)? else {
            return Ok(Mapping::Unallocated);
        };
        let index = cluster.0 % geometry.l2_entries();
        let entry = self.table_entry(geometry, table.offset, index, waiter)?;
        Ok(decode_l2(geometry, entry)?)
    }
}

/// The cached block around a byte of the image file.
pub(crate) fn block_of(geometry: &Geometry, at: u64) -> Need {
    let block = geometry.block();
    Need {
        layer: geometry.layer,
        file: geometry.file,
        offset: HostOffset(at / block * block),
        len: block as usize,
    }
}
