// SPDX-License-Identifier: Apache-2.0
//! Host clusters: finding free ones (here), counting some ahead (`reserve`), giving them back (`freed`), and
//! growing the refcount structures (`reftable`).
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
//! | reserved  | 0 or 1           | nobody                       | handed out; given back at the end (`reserve`)    |
//! | allocated | 0 or 1           | nobody                       | a commit wrote the count, a later phase the link |
//! | used      | ≥ 1              | a table                      | unlinked in memory: `freed`                      |
//! | freed     | ≥ 1              | perhaps the table still      | a commit wrote the table without it              |
//! | waiting   | ≥ 1              | nobody                       | all requests planned before have ended           |
//! | punching  | ≥ 1              | nobody                       | its space was given back (discards only)         |
//! | released  | 1 or 0           | nobody                       | count 0 in memory: free                          |
//!
//! Whenever the power goes, the count on disk is at least the number of pointers on disk.

mod freed;
mod reftable;
mod reserve;

use std::collections::HashMap;
use std::ops::Range;

use crate::buffer::Buffer;
use crate::cache::Class;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::overlap::{Holds, Metadata};
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{GuestCluster, HostCluster, HostOffset};
use freed::Freed;
use reserve::Reserve;

/// The file is lengthened by at least this many bytes, and by at most `GROW_MAX`.
const GROW_MIN: u64 = 1 << 20;
const GROW_MAX: u64 = 64 << 20;

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
    /// The next cluster behind all that were ever used or are counted ahead.
    end: u64,
    /// The file's length, in bytes.
    file_len: u64,
    regular: bool,
    /// Below this nothing is free.
    cursor: u64,
    /// Where the next packed cluster may go.
    pub(crate) packed_tail: Option<HostOffset>,
    pub(crate) freed: Freed,
    pub(crate) reserve: Reserve,
    pub(crate) tickets: HashMap<u64, crate::qcow2::ticket::Ticket>,
    pub(crate) next_ticket: u64,
    /// Where the last durable write that was planned ended on the disk.
    pub(crate) last_end: u64,
    /// Guest clusters with an allocation under way, and its ticket.
    pub(crate) busy: HashMap<GuestCluster, u64>,
}

/// Newly allocated clusters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) first: HostCluster,
    pub(crate) count: u64,
    pub(crate) fresh: bool,
    /// Their counts are on disk.
    pub(crate) counted: bool,
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
            reserve: Reserve::default(),
            tickets: HashMap::new(),
            next_ticket: 1,
            last_end: 0,
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
            let Some(run) = self.find(max, waiter)? else {
                match self.take_reserved(files, max)? {
                    Some(run) => return Ok(run),
                    None => continue,
                }
            };
            let geometry = self.geometry()?;
            if self.ensure_counted(files, run.first, run.first, waiter)? {
                continue;
            }
            // All counts of the run stand in one cached block: fetch it before anything changes.
            self.refcount(&geometry, run.first, waiter)?;
            let run = self.take(files, run)?;
            if run.fresh {
                self.count_ahead(files)?;
            }
            return Ok(run);
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
        self.release_freed(waiter)?;
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
                return Err(self.no_room(waiter));
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
                counted: false,
            },
        )
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

    /// A free run whose counts stand in one cached block; None when the reserve is next.
    fn find(&mut self, max: u64, waiter: &Waiter) -> Planned<Option<Run>> {
        let geometry = self.geometry()?;
        loop {
            let writer = self.writer()?;
            let (end, at) = (writer.end, writer.cursor);
            if at >= end && !writer.reserve.is_empty() {
                return Ok(None);
            }
            if at >= end && !writer.regular {
                return Err(self.no_room(waiter));
            }
            let limit = if at >= end { u64::MAX } else { end };
            let (start, free) = self.scan(&geometry, at, limit, max, waiter)?;
            self.writer()?.cursor = start;
            if free > 0 {
                return Ok(Some(Run {
                    first: HostCluster(start),
                    count: free.min(max),
                    fresh: false,
                    counted: false,
                }));
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

    /// The counts of these clusters have sunk: free ones are looked for from there, and nothing more is packed into them.
    pub(crate) fn may_be_free(&mut self, geometry: &Geometry, clusters: Range<u64>) {
        if let Some(writer) = &mut self.writer {
            writer.cursor = writer.cursor.min(clusters.start);
        }
        self.era += 1;
        self.forget_packed(geometry, clusters);
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

fn get_count(bytes: &[u8], order: u32, index: u64) -> u64 {
    refcount::get(bytes, order, index)
}
