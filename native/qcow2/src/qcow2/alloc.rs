// SPDX-License-Identifier: Apache-2.0
//! Host clusters: finding free ones, giving them back, and growing the refcount structures.
//!
//! Free clusters below the image's end are found by scanning the refcounts from a cursor; behind the
//! end the file grows (block devices end at their capacity). A cluster taken from behind the end of
//! a regular file is *fresh*: it was never used and reads as zeros, since the file is lengthened
//! before the cluster is handed out. It stays fresh only for that first use.
//!
//! A cluster's life:
//!
//! | state     | refcount on disk | who may point to it on disk | leaves it when                                   |
//! |-----------|------------------|------------------------------|--------------------------------------------------|
//! | free      | 0                | nobody                       | allocated: count 1 in memory                     |
//! | allocated | 0 or 1           | nobody                       | a commit wrote the count, a later phase the link |
//! | used      | ≥ 1              | a table                      | unlinked in memory: `freed`                      |
//! | freed     | ≥ 1              | perhaps the table still      | a commit wrote the table without it              |
//! | waiting   | ≥ 1              | nobody                       | all requests planned before have ended           |
//! | punching  | ≥ 1              | nobody                       | its space was given back (discards only)         |
//! | released  | 1 or 0           | nobody                       | count 0 in memory: free                          |
//!
//! Whenever the power goes, the count on disk is at least the number of pointers on disk.

use std::collections::{HashMap, VecDeque};

use crate::buffer::Buffer;
use crate::bytes::{put32, put64};
use crate::cache::Class;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::header::field;
use crate::qcow2::overlap::{Holds, Metadata};
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{GuestCluster, HostCluster, HostOffset};

/// The file is lengthened by at least this many bytes, and by at most `GROW_MAX`.
const GROW_MIN: u64 = 1 << 20;
const GROW_MAX: u64 = 64 << 20;
/// More freed runs than this wait for a commit before more is freed.
const FREED_MAX: usize = 65_536;
/// The most ranges whose space one commit gives back.
const PUNCHES: usize = 256;

/// What writing to the active qcow2 layer needs in memory.
pub(crate) struct Writer {
    pub(crate) geometry: Geometry,
    /// The first block of the header, to be changed in place.
    pub(crate) header: Buffer,
    /// The refcount table: offsets of refcount blocks, 0 for none.
    pub(crate) reftable: Vec<u64>,
    reftable_offset: HostOffset,
    /// For the overlap check.
    pub(crate) metadata: Metadata,
    /// The next cluster behind all that were ever used.
    end: u64,
    /// The file's length, in bytes.
    file_len: u64,
    regular: bool,
    /// Below this nothing is free.
    cursor: u64,
    /// Where the next packed cluster may go.
    pub(crate) packed_tail: Option<HostOffset>,
    pub(crate) freed: Freed,
    pub(crate) tickets: HashMap<u64, crate::qcow2::write::Ticket>,
    pub(crate) next_ticket: u64,
    /// Guest clusters with an allocation under way, and its ticket.
    pub(crate) busy: HashMap<GuestCluster, u64>,
}

/// Freed clusters on their way (see the table above).
#[derive(Default)]
pub(crate) struct Freed {
    freed: Vec<std::ops::Range<u64>>,
    committing: Vec<std::ops::Range<u64>>,
    waiting: VecDeque<(u64, std::ops::Range<u64>)>,
    /// The same for clusters that were ours alone, and whose space goes back to the host first.
    discarded: Vec<std::ops::Range<u64>>,
    discarding: Vec<std::ops::Range<u64>>,
    to_punch: VecDeque<(u64, std::ops::Range<u64>)>,
    punching: Vec<(u64, std::ops::Range<u64>)>,
}

impl Freed {
    /// The clusters of `range` lose one pointer.
    pub(crate) fn push(&mut self, range: std::ops::Range<u64>) {
        append(&mut self.freed, range);
    }

    /// The same, and nobody else points to them: their space is given back before they are used again.
    pub(crate) fn give_back(&mut self, range: std::ops::Range<u64>) {
        append(&mut self.discarded, range);
    }

    fn is_empty(&self) -> bool {
        let lists = [
            &self.freed,
            &self.committing,
            &self.discarded,
            &self.discarding,
        ];
        let queues = [&self.waiting, &self.to_punch];
        lists.iter().all(|list| list.is_empty())
            && queues.iter().all(|queue| queue.is_empty())
            && self.punching.is_empty()
    }
}

fn append(ranges: &mut Vec<std::ops::Range<u64>>, range: std::ops::Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Newly allocated clusters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) first: HostCluster,
    pub(crate) count: u64,
    pub(crate) fresh: bool,
}

impl Run {
    pub(crate) fn offset(&self, geometry: &Geometry) -> HostOffset {
        HostOffset(self.first.0 << geometry.cluster_bits)
    }
}

impl Writer {
    pub(crate) fn open(
        geometry: Geometry,
        file: &BlockFile,
        layer: &crate::qcow2::Qcow2,
    ) -> Result<Writer> {
        let mut header = Buffer::zeroed(geometry.block() as usize);
        file.read_at(header.bytes_mut(), 0)?;
        let reftable = refcount::read_table(file, &layer.header)?;
        let metadata = Metadata::read(file, &layer.header, &geometry, &reftable)?;
        let file_len = file.len()?;
        let clusters = if file.regular {
            file_len.div_ceil(geometry.cluster())
        } else {
            file_len >> geometry.cluster_bits
        };
        Ok(Writer {
            geometry,
            header,
            reftable,
            reftable_offset: HostOffset(layer.header.reftable_offset),
            metadata,
            end: clusters,
            file_len,
            regular: file.regular,
            cursor: 0,
            packed_tail: None,
            freed: Freed::default(),
            tickets: HashMap::new(),
            next_ticket: 1,
            busy: HashMap::new(),
        })
    }

    /// Bytes of the file up to the end of its last cluster in use or handed out.
    pub(crate) fn used_len(&self) -> u64 {
        self.end << self.geometry.cluster_bits
    }

    /// Count in other blocks from now on.
    pub(crate) fn replace_refcount_table(&mut self, offset: HostOffset, table: Vec<u64>) {
        self.reftable_offset = offset;
        self.reftable = table;
    }

    /// Cover clusters up to `end` with file, growing in steps.
    fn lengthen(&mut self, files: &[BlockFile], end: u64) -> Result<()> {
        let wanted = end
            .checked_shl(self.geometry.cluster_bits)
            .filter(|len| *len < 1 << 55);
        let wanted = wanted.ok_or_else(|| {
            Error::new(
                Kind::NoSpace,
                "the image file would be larger than the format allows",
            )
        })?;
        if wanted > self.file_len {
            let file = files
                .get(self.geometry.file)
                .ok_or_else(|| Error::invalid("no such file in the chain"))?;
            let step = (self.file_len / 16).clamp(GROW_MIN, GROW_MAX);
            let len = (wanted + step).next_multiple_of(self.geometry.cluster());
            // A file system may refuse the step (a file size limit) and yet have room for what is needed.
            file.set_len(len).or_else(|_| file.set_len(wanted))?;
            self.file_len = file.len()?;
        }
        Ok(())
    }

    /// Where the refcount table is, and what stands in it.
    pub(crate) fn refcount_table(&self) -> (HostOffset, &[u64]) {
        (self.reftable_offset, &self.reftable)
    }
}

impl State {
    /// Allocate up to `max` clusters in a row. The counts are 1 in memory afterwards; the caller
    /// links the clusters.
    pub(crate) fn allocate(
        &mut self,
        files: &[BlockFile],
        max: u64,
        waiter: &Waiter,
    ) -> Planned<Run> {
        if self.cache.crowded() {
            return Err(Stop::Commit);
        }
        self.release_freed(waiter)?;
        loop {
            let run = self.find(max, waiter)?;
            let geometry = self.geometry()?;
            if self.ensure_counted(files, run.first, run.first, waiter)? {
                continue;
            }
            // All counts of the run stand in one cached block: fetch it before anything changes.
            self.refcount(&geometry, run.first, waiter)?;
            return self.take(files, run);
        }
    }

    /// Allocate `count` clusters in a row, for a table.
    pub(crate) fn allocate_area(
        &mut self,
        files: &[BlockFile],
        count: u64,
        waiter: &Waiter,
    ) -> Planned<Run> {
        if self.cache.crowded() {
            return Err(Stop::Commit);
        }
        let geometry = self.geometry()?;
        let writer = self.writer()?;
        let mut start = if writer.regular {
            writer.end
        } else {
            writer.cursor
        };
        let mut at = start;
        while at < start.saturating_add(count) {
            let writer = self.writer()?;
            if !writer.regular && start + count > writer.end {
                return Err(Stop::Fail(full()));
            }
            if self.ensure_counted(files, HostCluster(at), HostCluster(start), waiter)? {
                start = start.max(self.writer()?.end.min(start + 1));
                at = start;
                continue;
            }
            if self.refcount(&geometry, HostCluster(at), waiter)? != 0 {
                start = at + 1;
            }
            at += 1;
        }
        self.take(
            files,
            Run {
                first: HostCluster(start),
                count,
                fresh: false,
            },
        )
    }

    /// Make sure that a refcount block covers `cluster`; a new one goes to the free cluster `place`.
    /// True when something was made, and free clusters must be looked for again.
    fn ensure_counted(
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

    /// Hand out a free run whose counts are all in the cache.
    fn take(&mut self, files: &[BlockFile], run: Run) -> Planned<Run> {
        let geometry = self.geometry()?;
        let end = run.first.0 + run.count;
        self.guard_data(run.first.0..end, "a new cluster")?;
        self.guard_counts(&geometry, run.first.0..end)?;
        let writer = self.writer()?;
        if writer.regular {
            writer.lengthen(files, end)?;
        }
        let fresh = writer.regular && run.first.0 >= writer.end;
        writer.end = writer.end.max(end);
        if writer.cursor == run.first.0 {
            writer.cursor = end;
        }
        for cluster in run.first.0..end {
            self.set_refcount(&geometry, HostCluster(cluster), 1);
        }
        Ok(Run { fresh, ..run })
    }

    /// A free run whose counts stand in one cached block.
    fn find(&mut self, max: u64, waiter: &Waiter) -> Planned<Run> {
        let geometry = self.geometry()?;
        loop {
            let writer = self.writer()?;
            let (end, at) = (writer.end, writer.cursor);
            if at >= end && !writer.regular {
                return Err(Stop::Fail(full()));
            }
            let limit = if at >= end { u64::MAX } else { end };
            let (start, free) = self.scan(&geometry, at, limit, max, waiter)?;
            self.writer()?.cursor = start;
            if free > 0 {
                return Ok(Run {
                    first: HostCluster(start),
                    count: free.min(max),
                    fresh: false,
                });
            }
        }
    }

    /// Within one block of counts from `at`, below `limit`: the first free cluster and how many
    /// follow (at most `max`); with none free, where to go on.
    fn scan(
        &mut self,
        geometry: &Geometry,
        at: u64,
        limit: u64,
        max: u64,
        waiter: &Waiter,
    ) -> Planned<(u64, u64)> {
        let per_block = geometry.refblock_entries();
        let Some(place) = self.count_place(geometry, HostCluster(at)) else {
            // No refcount block: all that it would cover is free.
            let until = (at / per_block + 1).saturating_mul(per_block).min(limit);
            return Ok((at, (until - at).min(max)));
        };
        let order = geometry.refcount_order;
        let block = self.cache.fetch(place.need, waiter)?;
        let here = ((geometry.block() * 8) >> order) - place.index;
        let counts =
            (0..here.min(limit - at)).map(|n| get_count(block.bytes(), order, place.index + n));
        let mut start = at;
        let mut free = 0;
        for count in counts {
            match (count, free) {
                (0, _) => free += 1,
                (_, 0) => start += 1,
                _ => break,
            }
            if free >= max {
                break;
            }
        }
        Ok((start, free))
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

    /// Write the header's first block with the next commit.
    pub(crate) fn header_dirty(&mut self) -> Planned<()> {
        Ok(self.cache_header()?)
    }

    /// As [`State::header_dirty`], outside of a plan.
    pub(crate) fn cache_header(&mut self) -> Result<()> {
        let writer = self.writer()?;
        let (layer, header) = (writer.geometry.layer, writer.header.clone());
        self.cache
            .put(layer, HostOffset(0), header, Some(Class::Header));
        Ok(())
    }

    /// Whether something must be committed before more is freed.
    pub(crate) fn too_much_freed(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| {
            writer.freed.freed.len() + writer.freed.discarded.len() > FREED_MAX
        })
    }

    /// A commit takes the unlinked mappings along.
    ///
    /// Gives the ranges (host offset and length) whose space this commit gives back.
    pub(crate) fn freed_at_begin(&mut self) -> Vec<(HostOffset, u64)> {
        let Some(writer) = &mut self.writer else {
            return Vec::new();
        };
        let freed = &mut writer.freed;
        freed.committing.append(&mut freed.freed);
        freed.discarding.append(&mut freed.discarded);
        while freed.punching.len() < PUNCHES {
            match freed.to_punch.pop_front() {
                Some((epoch, range)) if self.epochs.passed(epoch) => {
                    freed.punching.push((epoch, range))
                }
                Some(early) => {
                    freed.to_punch.push_front(early);
                    break;
                }
                None => break,
            }
        }
        let bits = writer.geometry.cluster_bits;
        let bytes = |(_, range): &(u64, std::ops::Range<u64>)| {
            (
                HostOffset(range.start << bits),
                (range.end - range.start) << bits,
            )
        };
        freed.punching.iter().map(bytes).collect()
    }

    /// The commit has ended: what it unlinked waits for the requests planned before, or for the next.
    pub(crate) fn freed_at_end(&mut self, ok: bool) {
        let Some(writer) = &mut self.writer else {
            return;
        };
        let freed = &mut writer.freed;
        // Space that could not be given back is merely not given back.
        freed.waiting.extend(freed.punching.drain(..));
        if freed.committing.is_empty() && freed.discarding.is_empty() {
            return;
        }
        if ok {
            let epoch = self.epochs.close();
            freed
                .waiting
                .extend(freed.committing.drain(..).map(|range| (epoch, range)));
            freed
                .to_punch
                .extend(freed.discarding.drain(..).map(|range| (epoch, range)));
        } else {
            freed.freed.append(&mut freed.committing);
            freed.discarded.append(&mut freed.discarding);
        }
    }

    /// Count down what nobody can use any more.
    pub(crate) fn release_freed(&mut self, waiter: &Waiter) -> Planned<()> {
        loop {
            let Some(writer) = &mut self.writer else {
                return Ok(());
            };
            let geometry = writer.geometry;
            let Some((epoch, range)) = writer.freed.waiting.front_mut() else {
                return Ok(());
            };
            if !self.epochs.passed(*epoch) {
                return Ok(());
            }
            if range.is_empty() {
                writer.freed.waiting.pop_front();
                continue;
            }
            let cluster = range.start;
            if self.check_sound().is_err()
                || self.guard_counts(&geometry, cluster..cluster + 1).is_err()
            {
                // Of a damaged image nothing is counted down: what was freed leaks.
                self.writer()?.freed.waiting.clear();
                return Ok(());
            }
            let left = self.adjust_refcount(&geometry, HostCluster(cluster), false, waiter)?;
            let writer = self.writer()?;
            if left == 0 {
                writer.metadata.forget(cluster);
                writer.cursor = writer.cursor.min(cluster);
            }
            if let Some((_, range)) = writer.freed.waiting.front_mut() {
                range.start += 1;
            }
        }
    }

    /// Before the counts of these clusters are changed.
    pub(crate) fn guard_counts(
        &mut self,
        geometry: &Geometry,
        clusters: std::ops::Range<u64>,
    ) -> Result<()> {
        let per_block = geometry.refblock_entries();
        for index in clusters.start / per_block..clusters.end.div_ceil(per_block) {
            let block = self.writer()?.reftable.get(index as usize).copied();
            if let Some(offset) = block.filter(|offset| *offset != 0) {
                self.guard(geometry, HostOffset(offset), Holds::RefcountBlock)?;
            }
        }
        Ok(())
    }

    /// A cluster's count has sunk: look for free ones from there.
    pub(crate) fn may_be_free(&mut self, cluster: u64) {
        if let Some(writer) = &mut self.writer {
            writer.cursor = writer.cursor.min(cluster);
        }
    }

    /// Whether a commit would change anything on the disk.
    pub(crate) fn unsettled(&self) -> bool {
        self.cache.has_dirty()
            || self
                .writer
                .as_ref()
                .is_some_and(|writer| !writer.freed.is_empty())
    }

    /// Whether a cluster lies in the image file. What does not is never written to, whatever a table
    /// says: a damaged pointer would make a file of any size.
    pub(crate) fn check_inside(&mut self, geometry: &Geometry, host: HostOffset) -> Result<()> {
        if host.0 >> geometry.cluster_bits < self.writer()?.end {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a table points to {host}, beyond the end of the image file: run check"
        )))
    }

    /// The writer of the active qcow2 layer.
    pub(crate) fn writer(&mut self) -> Result<&mut Writer> {
        self.writer
            .as_mut()
            .ok_or_else(|| Error::new(Kind::InvalidState, "the image is not open for writing"))
    }

    fn geometry(&mut self) -> Result<Geometry> {
        self.writer().map(|writer| writer.geometry)
    }
}

fn full() -> Error {
    Error::new(
        Kind::NoSpace,
        "the block device that holds the image is full",
    )
}

fn get_count(bytes: &[u8], order: u32, index: u64) -> u64 {
    refcount::get(bytes, order, index)
}
