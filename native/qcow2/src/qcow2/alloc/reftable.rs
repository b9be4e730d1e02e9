// SPDX-License-Identifier: Apache-2.0
//! Making room to count: refcount blocks, and a larger refcount table.
//!
//! A new block goes to the first free cluster that it covers itself, and is named by the table in the commit
//! that writes it. A larger table is laid out behind the end of the image together with the blocks that its own
//! place needs; the header names it once all of that is durable, and the old one is freed. On a block
//! device there is nothing behind the end, so the table cannot grow there.

use crate::buffer::Buffer;
use crate::bytes::{put32, put64};
use crate::cache::Class;
use crate::error::{Error, Kind};
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::header::field;
use crate::qcow2::overlap::Holds;
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{HostCluster, HostOffset};

impl State {
    /// Make sure that a refcount block covers `cluster`; a new one goes to the free cluster `place`.
    /// True when something was made, and free clusters must be looked for again.
    pub(super) fn ensure_counted(
        &mut self,
        files: &[BlockFile],
        cluster: HostCluster,
        place: HostCluster,
        waiter: &Waiter,
    ) -> Planned<bool> {
        let geometry = self.geometry()?;
        let index = cluster.0 / geometry.refblock_entries();
        if index >= self.writer()?.reftable.len() as u64 {
            self.grow_reftable(files, index, waiter)?;
            return Ok(true);
        }
        if self.count_place(&geometry, cluster).is_some() {
            return Ok(false);
        }
        // The new block counts itself, unless an older one counts its place.
        self.refcount(&geometry, place, waiter)?;
        self.new_refblock(files, place, index)?;
        Ok(true)
    }

    /// Put a refcount block for table entry `index` into the free cluster `at`, which it covers itself.
    fn new_refblock(&mut self, files: &[BlockFile], at: HostCluster, index: u64) -> Planned<()> {
        let geometry = self.geometry()?;
        let offset = HostOffset(at.0 << geometry.cluster_bits);
        self.guard_data(at.0..at.0 + 1, "a new refcount block")?;
        let writer = self.writer()?;
        let place = writer.reftable_offset.plus(index * 8);
        self.guard(&geometry, place, Holds::RefcountTable)?;
        let writer = self.writer()?;
        if writer.regular {
            writer.lengthen(files, at.0 + 1)?;
        }
        writer.end = writer.end.max(at.0 + 1);
        if let Some(entry) = writer.reftable.get_mut(index as usize) {
            *entry = offset.0;
        }
        writer.metadata.add(at.0..at.0 + 1, Holds::RefcountBlock);
        self.put_zero_table(&geometry, offset);
        self.set_refcount(&geometry, at, 1);
        self.reftable_dirty(index, Class::RefcountTable)
    }

    /// A cluster of zeros in the cache, which nothing on disk points to yet.
    pub(crate) fn put_zero_table(&mut self, geometry: &Geometry, offset: HostOffset) {
        let block = geometry.block();
        for n in 0..geometry.cluster() / block {
            let zeros = Buffer::zeroed(block as usize);
            self.cache.put(
                geometry.layer,
                offset.plus(n * block),
                zeros,
                Some(Class::Unreferenced),
            );
        }
    }

    /// Put the block of the refcount table with entry `index` into the cache, dirty.
    fn reftable_dirty(&mut self, index: u64, class: Class) -> Planned<()> {
        let geometry = self.geometry()?;
        let block = geometry.block();
        let writer = self.writer()?;
        let first = index * 8 / block * block / 8;
        let offset = writer.reftable_offset.plus(first * 8);
        let mut content = Buffer::zeroed(block as usize);
        let entries = writer
            .reftable
            .iter()
            .skip(first as usize)
            .take(block as usize / 8);
        entries
            .enumerate()
            .for_each(|(n, entry)| put64(content.bytes_mut(), n * 8, *entry));
        self.cache.put(geometry.layer, offset, content, Some(class));
        Ok(())
    }

    /// Move the refcount table to behind the end of the image, large enough for entry `index` and
    /// half as much again. Table and the refcount blocks for its own place are laid out together.
    fn grow_reftable(&mut self, files: &[BlockFile], index: u64, waiter: &Waiter) -> Planned<()> {
        let geometry = self.geometry()?;
        let (cluster, per_block) = (geometry.cluster(), geometry.refblock_entries());
        let writer = self.writer()?;
        if !writer.regular {
            return Err(Stop::Fail(Error::unsupported(
                "growing the refcount table on a block device",
            )));
        }
        let entries_per_cluster = cluster / 8;
        let start = writer.end;
        let mut table_clusters = (index + 1 + index / 2).div_ceil(entries_per_cluster);
        let mut blocks;
        loop {
            // Refcount blocks for all clusters from `start` to the end of the new area, as far as
            // they are missing; the area contains them, so go round until it fits.
            blocks = 0;
            let mut missing: Vec<u64>;
            loop {
                let last = (start + table_clusters + blocks - 1) / per_block;
                missing = (start / per_block..=last)
                    .filter(|n| {
                        writer
                            .reftable
                            .get(*n as usize)
                            .is_none_or(|offset| *offset == 0)
                    })
                    .collect();
                if missing.len() as u64 <= blocks {
                    break;
                }
                blocks = missing.len() as u64;
            }
            let needed = ((start + table_clusters + blocks) / per_block + 1)
                .max(index + 1)
                .div_ceil(entries_per_cluster);
            if needed <= table_clusters {
                break;
            }
            table_clusters = needed;
        }
        if table_clusters * cluster > (8 << 20).max(cluster) {
            return Err(Stop::Fail(Error::new(
                Kind::NoSpace,
                "the refcount table would be larger than the format's readers take",
            )));
        }
        let end = start + table_clusters + blocks;
        // Counts that stand in blocks that exist already are fetched before anything changes.
        for cluster in start..end {
            self.refcount(&geometry, HostCluster(cluster), waiter)?;
        }
        self.guard_data(start..end, "a new refcount table")?;
        self.guard_counts(&geometry, start..end)?;
        let writer = self.writer()?;
        writer.lengthen(files, end)?;
        writer.end = end;
        let table = start..start + table_clusters;
        writer.metadata.add(table, Holds::RefcountTable);
        let old = (writer.reftable_offset, writer.reftable.len() as u64 * 8);
        writer
            .reftable
            .resize((table_clusters * entries_per_cluster) as usize, 0);
        writer.reftable_offset = HostOffset(start << geometry.cluster_bits);
        let mut place = start + table_clusters;
        for n in start / per_block..=(end - 1) / per_block {
            let writer = self.writer()?;
            let Some(entry) = writer.reftable.get_mut(n as usize) else {
                break;
            };
            if *entry == 0 && place < end {
                let offset = HostOffset(place << geometry.cluster_bits);
                *entry = offset.0;
                writer.metadata.add(place..place + 1, Holds::RefcountBlock);
                self.put_zero_table(&geometry, offset);
                place += 1;
            }
        }
        for cluster in start..end {
            self.set_refcount(&geometry, HostCluster(cluster), 1);
        }
        let writer = self.writer()?;
        let (offset, entries) = (writer.reftable_offset, writer.reftable.len() as u64);
        put64(writer.header.bytes_mut(), field::REFTABLE_OFFSET, offset.0);
        put32(
            writer.header.bytes_mut(),
            field::REFTABLE_CLUSTERS,
            table_clusters as u32,
        );
        writer
            .freed
            .push(refcount::clusters(&geometry, old.0, old.1));
        self.cache
            .forget(geometry.layer, old.0, old.1, geometry.block());
        for first in (0..entries).step_by((geometry.block() / 8) as usize) {
            self.reftable_dirty(first, Class::Unreferenced)?;
        }
        self.header_dirty()
    }
}
