// SPDX-License-Identifier: Apache-2.0
//! Planning a write: in place where the cluster is ours alone, else into new clusters.
//!
//! New clusters are written before they are mapped. Until then a *ticket* keeps other writes to the
//! same guest clusters waiting; reads go on with the old mapping. What of a cluster the guest does
//! not write is copied around the data (head and tail), from wherever the guest sees it now.
//!
//! With subclusters only those are copied which the guest writes a part of. The others stay what they are, as
//! bits of the new entry; only what was data in a cluster that is not ours alone must move with it.
//!
//! One case is mapped at once, so that small writes into a new cluster need not wait for each other:
//! a fresh cluster (alloc) for a range that reads as zeros now. Before the data is written, and
//! after a power cut that loses it, the cluster's zeros are what the guest saw before. If its count is on
//! disk already (alloc/reserve.rs), the mapping may go there together with the data, under one sync.
//!
//! Durable writes one behind the other are an exception to the exception: the first in a fresh cluster writes all of it,
//! zeros behind its data, while the others wait. These then overwrite what the host's file system has a place for,
//! and it need not find one, and sync its journal, for each of them.

use crate::cache::Class;
use crate::error::Error;
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Allocation, Extents, Planned, Source, Stop, WriteStep};
use crate::qcow2::entry::{L2Entry, Mapping, Part, SUBCLUSTERS};
use crate::qcow2::mapping::block_of;
use crate::qcow2::ticket::{host_clusters, Ticket, Written};
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{GuestCluster, HostOffset};

/// The most bytes allocated for one step of a write.
const RUN_BYTES: u64 = 4 << 20;

/// A run of guest clusters that need new host clusters.
struct Target {
    first: GuestCluster,
    count: u64,
    /// The cluster's own host cluster, to be used again.
    kept: Option<HostOffset>,
    /// What the first and the last of them are now.
    ends: [Mapping; 2],
}

impl State {
    pub(crate) fn plan_write_qcow2(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        (at, len): (u64, u64),
        durable: bool,
        waiter: &Waiter,
    ) -> Planned<WriteStep> {
        let step = self.next_step(geometry, files, (at, len), durable, waiter)?;
        if durable {
            self.writer()?.last_end = at + step.len();
        }
        Ok(step)
    }

    fn next_step(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        (at, len): (u64, u64),
        durable: bool,
        waiter: &Waiter,
    ) -> Planned<WriteStep> {
        let cluster = GuestCluster(at >> geometry.cluster_bits);
        self.check_sound()?;
        self.wait_if_busy(cluster, waiter)?;
        let mapping = self.lookup(geometry, cluster, waiter)?;
        let (part, run) = mapping.run(geometry, at % geometry.cluster());
        match (part, mapping.host()) {
            (Part::Data, Some((host, true))) => {
                self.check_data(geometry, host)?;
                self.in_place(geometry, at, len, (host, run), waiter)
            }
            _ => {
                let whole = durable && self.writer()?.last_end == at;
                self.allocating(geometry, files, (at, len), whole, waiter)
            }
        }
    }

    /// Stop when an allocation for the cluster is under way.
    pub(crate) fn wait_if_busy(&mut self, cluster: GuestCluster, waiter: &Waiter) -> Planned<()> {
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        let ticket = writer
            .busy
            .get(&cluster)
            .and_then(|ticket| writer.tickets.get_mut(ticket));
        match ticket {
            None => Ok(()),
            Some(ticket) => {
                ticket.waiters.push(waiter.clone());
                Err(Stop::Wait)
            }
        }
    }

    pub(crate) fn busy(&self, cluster: GuestCluster) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.busy.contains_key(&cluster))
    }

    /// Before data is written to a cluster to which a mapping points.
    fn check_data(&mut self, geometry: &Geometry, host: HostOffset) -> Result<(), Error> {
        if geometry.external_data() {
            return Ok(());
        }
        self.check_inside(geometry, host)?;
        let clusters = refcount::clusters(geometry, host, geometry.cluster());
        self.guard_data(clusters, "guest data")
    }

    /// Before what a mapping points to is freed.
    pub(crate) fn check_freed(
        &mut self,
        geometry: &Geometry,
        mapping: Mapping,
    ) -> Result<(), Error> {
        match host_clusters(geometry, mapping) {
            Some(clusters) => self.guard_data(clusters, "freeing guest data"),
            None => Ok(()),
        }
    }

    fn in_place(
        &mut self,
        geometry: &Geometry,
        at: u64,
        len: u64,
        (host, run): (HostOffset, u64),
        waiter: &Waiter,
    ) -> Planned<WriteStep> {
        let size = geometry.cluster();
        let offset = host.plus(at % size);
        let mut done = run.min(len);
        while done < len && (at + done) % size == 0 {
            let next = GuestCluster((at + done) >> geometry.cluster_bits);
            let follows = Mapping::Data {
                host: offset.plus(done),
                copied: true,
            };
            // A stop here only ends the run: what is known so far can be written.
            if self.busy(next)
                || !matches!(self.peek(geometry, next, waiter), Some(mapping) if mapping == follows)
                || self.check_data(geometry, offset.plus(done)).is_err()
            {
                break;
            }
            done += size.min(len - done);
        }
        Ok(WriteStep::InPlace {
            file: geometry.data,
            offset,
            len: done,
        })
    }

    /// A mapping if it is in the cache.
    fn peek(
        &mut self,
        geometry: &Geometry,
        cluster: GuestCluster,
        _waiter: &Waiter,
    ) -> Option<Mapping> {
        let (l1, entries) = self.l1(geometry.layer)?;
        let index = cluster.0 / geometry.l2_entries();
        if index >= entries {
            return None;
        }
        let entry = self.cached_entry(geometry, l1, index)?;
        let table = crate::qcow2::mapping::decode_l1(geometry, entry).ok()??;
        let index = cluster.0 % geometry.l2_entries();
        let entry = self.cached_l2_entry(geometry, table.offset, index)?;
        entry.decode(geometry).ok()
    }

    fn cached_entry(&self, geometry: &Geometry, table: HostOffset, index: u64) -> Option<u64> {
        let at = table.0.saturating_add(index.saturating_mul(8));
        let need = block_of(geometry, at);
        let block = self.cache.peek(need.layer, need.offset)?;
        crate::bytes::be64(block.bytes(), (at - need.offset.0) as usize)
    }

    /// With `whole` a fresh cluster is written to its end.
    fn allocating(
        &mut self,
        geometry: &Geometry,
        files: &[BlockFile],
        (at, len): (u64, u64),
        whole: bool,
        waiter: &Waiter,
    ) -> Planned<WriteStep> {
        if self.cache.crowded() || self.too_much_freed() {
            return Err(Stop::Commit);
        }
        let table = self.writable_l2(
            geometry,
            files,
            GuestCluster(at >> geometry.cluster_bits),
            waiter,
        )?;
        let target = self.target(geometry, at, len, waiter)?;
        // Everything that may stop comes before the allocation.
        let start = target.first.0 << geometry.cluster_bits;
        let end = (target.first.0 + target.count) << geometry.cluster_bits;
        let len = len.min(end - at);
        let mut parts = target.written(geometry, at, len);
        let unit = geometry.cluster() / u64::from(SUBCLUSTERS);
        let from = start + u64::from(parts.from) * unit;
        let until = match target.ends_in_own_data(geometry, at + len) {
            true => at + len,
            false => end - u64::from(SUBCLUSTERS - parts.until) * unit,
        };
        let mut head = Extents::new();
        self.resolve(0, from, at - from, waiter, &mut head)?;
        let mut tail = Extents::new();
        self.resolve(0, at + len, until - at - len, waiter, &mut tail)?;
        let mut before = Extents::new();
        self.resolve(0, start, end - start, waiter, &mut before)?;

        if let Some(host) = target.kept {
            self.check_data(geometry, host)?;
        }
        let mut class = Class::Mapping;
        let (host, count, fresh) = match target.kept {
            Some(host) => (host, 1, false),
            None if geometry.external_data() => (HostOffset(start), target.count, false),
            None => {
                let run = self.allocate(files, target.count, waiter)?;
                if run.counted {
                    class = Class::Fresh;
                }
                // What was never written is not zeros once it is decrypted.
                let zeros = run.fresh && !geometry.sealed();
                (run.offset(geometry), run.count, zeros)
            }
        };
        // Fewer than asked for: the step ends with the last cluster.
        let end = start + count * geometry.cluster();
        let len = len.min(end - at);
        if count < target.count {
            tail.clear();
            parts.until = SUBCLUSTERS;
        }
        // The tables were looked at before; allocating may have changed the cache, not the tables.
        let bare = fresh && zeros(&before);
        let to_fill = whole && bare && !tail.is_empty() && at == start;
        if bare && !to_fill {
            for n in 0..count {
                let entry = L2Entry::data(geometry, host.plus(n * geometry.cluster()));
                let index = (target.first.0 + n) % geometry.l2_entries();
                let old = self.mapped(geometry, table, index);
                self.set_l2_entry_as(geometry, table, index, entry, class);
                self.free_mapping(geometry, old);
            }
            return Ok(WriteStep::InPlace {
                file: geometry.data,
                offset: host.plus(at - start),
                len,
            });
        }
        if fresh && zeros(&tail) && !to_fill {
            tail.clear();
        }
        let mut offset = host.plus(from - start);
        if fresh && zeros(&head) {
            head.clear();
            offset = host.plus(at - start);
        }
        let kept = target.kept.is_some() || geometry.external_data();
        let ticket = self.issue(
            geometry,
            Ticket {
                first: target.first,
                count,
                table,
                host,
                parts,
                kept,
                class: if to_fill { class } else { Class::Mapping },
                packed: None,
                waiters: Vec::new(),
            },
        )?;
        Ok(WriteStep::Allocate(Box::new(Allocation {
            ticket,
            file: geometry.data,
            offset,
            len,
            head,
            tail,
        })))
    }

    /// The clusters from `at` on that need new host clusters, within one cached block of the L2 table.
    fn target(
        &mut self,
        geometry: &Geometry,
        at: u64,
        len: u64,
        waiter: &Waiter,
    ) -> Planned<Target> {
        let first = GuestCluster(at >> geometry.cluster_bits);
        let own = |mapping: Mapping| {
            let host = mapping.host();
            host.and_then(|(host, copied)| copied.then_some(host))
        };
        let mapping = self.lookup(geometry, first, waiter)?;
        if let Some(host) = own(mapping) {
            return Ok(Target {
                first,
                count: 1,
                kept: Some(host),
                ends: [mapping; 2],
            });
        }
        let per_block = geometry.l2_per_block();
        let last = ((at + len - 1) >> geometry.cluster_bits)
            .min(first.0 / per_block * per_block + per_block - 1)
            .min(first.0 + (RUN_BYTES >> geometry.cluster_bits).max(1) - 1);
        let mut count = 1;
        let mut ends = [mapping; 2];
        while first.0 + count <= last {
            let next = GuestCluster(first.0 + count);
            let mapping = self.lookup(geometry, next, waiter)?;
            if self.busy(next) || own(mapping).is_some() {
                break;
            }
            ends = [ends[0], mapping];
            count += 1;
        }
        Ok(Target {
            first,
            count,
            kept: None,
            ends,
        })
    }
}

impl Target {
    /// What becomes data when `len` bytes from `at` are written. Subclusters that the guest writes a part of
    /// are made whole; with a new place, data on both sides moves there, and what lies between.
    fn written(&self, geometry: &Geometry, at: u64, len: u64) -> Written {
        if !geometry.extended_l2 {
            return Written::ALL;
        }
        let (size, unit) = (geometry.cluster(), geometry.subcluster());
        let mut from = (at % size / unit) as u32;
        let mut until = ((at + len - 1) % size / unit) as u32 + 1;
        if self.kept.is_some() || geometry.external_data() {
            return Written { from, until };
        }
        let [first, last] = self.ends.map(|mapping| mapping.parts());
        from = from.min(first.data_span().map_or(from, |span| span.start));
        until = until.max(last.data_span().map_or(until, |span| span.end));
        Written { from, until }
    }

    /// Whether byte `end` lies within a subcluster of data that is ours alone: others may be writing behind it
    /// in place, so what is there is not touched.
    fn ends_in_own_data(&self, geometry: &Geometry, end: u64) -> bool {
        let [_, last] = self.ends;
        let (part, _) = last.run(geometry, (end - 1) % geometry.cluster());
        self.kept.is_some() && part == Part::Data
    }
}

/// Whether all of it reads as zeros.
pub(crate) fn zeros(extents: &Extents) -> bool {
    extents.iter().all(|extent| extent.source == Source::Zero)
}
