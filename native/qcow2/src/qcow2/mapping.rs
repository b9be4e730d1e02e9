// SPDX-License-Identifier: Apache-2.0
//! From a guest cluster to where its bytes are: the L1 and L2 tables.
//!
//! Entries come from the image and may be anything: an offset that is not a cluster's is an error,
//! one beyond the end of the file reads as zeros (the engine sees to that), and one that points into
//! metadata merely shows the guest metadata; nothing is ever written through an entry without the
//! COPIED flag, nor over metadata (overlap.rs), and check finds the rest.

use std::ops::Range;

use crate::bytes::{be64, put64};
use crate::cache::Class;
use crate::error::Error;
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Need, Planned};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED, OFFSET};
use crate::qcow2::overlap::Holds;
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{GuestCluster, HostOffset};

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

    /// Entry number `index` of the L2 table at `table`.
    pub(crate) fn l2_entry(
        &mut self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
        waiter: &Waiter,
    ) -> Planned<L2Entry> {
        let (need, at) = l2_place(geometry, table, index);
        let block = self.cache.fetch(need, waiter)?;
        Ok(L2Entry::at(geometry, block.bytes(), at).unwrap_or_default())
    }

    /// The same, if it is in the cache.
    pub(crate) fn cached_l2_entry(
        &self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
    ) -> Option<L2Entry> {
        let (need, at) = l2_place(geometry, table, index);
        let block = self.cache.peek(need.layer, need.offset)?;
        L2Entry::at(geometry, block.bytes(), at)
    }

    /// Change an L2 entry whose block has been fetched under the same lock.
    pub(crate) fn set_l2_entry(
        &mut self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
        entry: L2Entry,
    ) {
        self.set_l2_entry_as(geometry, table, index, entry, Class::Mapping);
    }

    /// The same; `class` says what must be on disk before.
    pub(crate) fn set_l2_entry_as(
        &mut self,
        geometry: &Geometry,
        table: HostOffset,
        index: u64,
        entry: L2Entry,
        class: Class,
    ) {
        let (need, at) = l2_place(geometry, table, index);
        if let Some(bytes) = self.cache.modify(geometry.layer, need.offset, class) {
            put64(bytes, at, entry.word);
            if geometry.extended_l2 {
                put64(bytes, at + 8, entry.bitmap);
            }
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

    /// How many guest clusters from this one on the layer does not have, as far as one block of the L1 table or of
    /// an L2 table tells; 0 if it has this one.
    pub(crate) fn bare(
        &mut self,
        geometry: &Geometry,
        cluster: GuestCluster,
        waiter: &Waiter,
    ) -> Planned<u64> {
        let per_table = geometry.l2_entries();
        let (index, within) = (cluster.0 / per_table, cluster.0 % per_table);
        let Some((l1, entries)) = self.l1(geometry.layer) else {
            return Ok(0);
        };
        if index >= entries {
            return Ok(u64::MAX >> geometry.cluster_bits);
        }
        if let Some(table) = self.l2_table(geometry, cluster, waiter)? {
            let (need, at) = l2_place(geometry, table.offset, within);
            let block = self.cache.fetch(need, waiter)?;
            let rest = block.bytes().get(at..).unwrap_or(&[]);
            let bare = L2Entry::all(geometry, rest)
                .take_while(|entry| matches!(entry.decode(geometry), Ok(Mapping::Unallocated)));
            return Ok(bare.count() as u64);
        }
        let at = l1.0.saturating_add(index.saturating_mul(8));
        let need = block_of(geometry, at);
        let block = self.cache.fetch(need, waiter)?;
        let rest = block.bytes().get((at - need.offset.0) as usize..);
        let tables = rest.unwrap_or(&[]).chunks_exact(8);
        let none = tables
            .take((entries - index) as usize)
            .take_while(|word| be64(word, 0).is_some_and(|entry| entry & OFFSET == 0))
            .count() as u64;
        Ok((none * per_table).saturating_sub(within))
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
        let entry = self.l2_entry(geometry, table.offset, index, waiter)?;
        Ok(entry.decode(geometry)?)
    }

    /// The L2 table for `cluster`, ours alone: made, or copied from one shared with a snapshot. Its
    /// block with the cluster's entry is in the cache afterwards.
    pub(crate) fn writable_l2(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        cluster: GuestCluster,
        waiter: &Waiter,
    ) -> Planned<HostOffset> {
        let index = cluster.0 / geometry.l2_entries();
        let entry = cluster.0 % geometry.l2_entries();
        let (l1, _) = self
            .l1(geometry.layer)
            .ok_or_else(|| Error::invalid("the image has no L1 table"))?;
        let old = self.l2_table(geometry, cluster, waiter)?;
        if let Some(table) = old.filter(|table| table.copied) {
            self.check_inside(geometry, table.offset)?;
            self.guard(geometry, table.offset, Holds::L2)?;
            self.l2_entry(geometry, table.offset, entry, waiter)?;
            return Ok(table.offset);
        }
        let block = geometry.block();
        let blocks = geometry.cluster() / block;
        if let Some(table) = old {
            for n in 0..blocks {
                self.cache
                    .fetch(block_of(geometry, table.offset.0 + n * block), waiter)?;
            }
        }
        self.guard(geometry, l1.plus(index * 8), Holds::L1)?;
        if let Some(table) = old {
            self.guard_l2(geometry, table)?;
        }
        let run = self.allocate(files, 1, waiter)?;
        let offset = run.offset(geometry);
        let metadata = &mut self.writer()?.metadata;
        metadata.add(run.first.0..run.first.0 + 1, Holds::L2);
        if let Some(table) = old {
            metadata.remove(table.offset.0 >> geometry.cluster_bits, Holds::L2);
        }
        match old {
            None => self.put_zero_table(geometry, offset),
            Some(table) => {
                for n in 0..blocks {
                    let copy = self
                        .cache
                        .peek(geometry.layer, table.offset.plus(n * block))
                        .map(|block| (**block).clone());
                    let copy =
                        copy.ok_or_else(|| Error::invalid("an L2 table's block left the cache"))?;
                    self.cache.put(
                        geometry.layer,
                        offset.plus(n * block),
                        copy,
                        Some(Class::Unreferenced),
                    );
                }
                self.writer()?.freed.push(refcount::clusters(
                    geometry,
                    table.offset,
                    geometry.cluster(),
                ));
            }
        }
        // The block of the L1 table was fetched by l2_table.
        self.set_table_entry(geometry, l1, index, offset.0 | COPIED, Class::Mapping);
        Ok(offset)
    }
}

impl State {
    /// Whether the header and the table entries of guest clusters are on disk as they are in the cache. Those whose
    /// tables are not in the cache are taken for changed.
    pub(crate) fn mapped_on_disk(&self, geometry: &Geometry, clusters: Range<u64>) -> bool {
        let Some((l1, _)) = self.l1(geometry.layer) else {
            return false;
        };
        let clean = |offset| self.cache.on_disk(geometry.layer, offset);
        let mut cluster = clusters.start;
        while cluster < clusters.end {
            let place = l1.0.saturating_add(cluster / geometry.l2_entries() * 8);
            let need = block_of(geometry, place);
            let table = self
                .cache
                .peek(geometry.layer, need.offset)
                .and_then(|block| be64(block.bytes(), (place - need.offset.0) as usize))
                .and_then(|entry| decode_l1(geometry, entry).ok().flatten());
            let Some(table) = table.filter(|_| clean(need.offset)) else {
                return false;
            };
            let (need, _) = l2_place(geometry, table.offset, cluster % geometry.l2_entries());
            if !clean(need.offset) {
                return false;
            }
            let per_block = geometry.l2_per_block();
            cluster = (cluster / per_block + 1) * per_block;
        }
        clean(HostOffset(0))
    }
}

/// The cached block with an L2 entry, and where it begins in that block. (An entry's size divides the block's.)
pub(crate) fn l2_place(geometry: &Geometry, table: HostOffset, index: u64) -> (Need, usize) {
    let at = table
        .0
        .saturating_add(index.saturating_mul(geometry.l2_entry_size()));
    let need = block_of(geometry, at);
    (need, (at - need.offset.0) as usize)
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
