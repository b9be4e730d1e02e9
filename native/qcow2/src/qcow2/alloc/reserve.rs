// SPDX-License-Identifier: Apache-2.0
//! Clusters counted ahead, so that a flush behind writes into new clusters needs one sync and not two.
//!
//! A mapping may reach the disk only behind the count of its cluster. So behind the end of a regular file some
//! clusters more than asked for are counted (the *reserve*); a commit writes their counts along with whatever it
//! writes first. A cluster handed out from it later is counted on disk already: if it is fresh and what it is
//! mapped for reads as zeros, its L2 entry needs nothing before it, neither count nor data, and goes to the
//! disk in the commit's first phase (`Class::Fresh`), under the one sync that covers the data as well.
//!
//! | a cluster of the reserve  | count on disk | leaves it when                                         |
//! |---------------------------|---------------|--------------------------------------------------------|
//! | counting                  | 0 or 1        | a commit that began with it so has ended well: counted |
//! | counted                   | 1             | handed out, fresh; or given back when the image closes |
//!
//! How many are counted ahead doubles as they are used, up to `AHEAD`: an image that is hardly written has
//! hardly any. The file is lengthened over them before they are counted. A power cut leaks them.
//! Left out: block devices (nothing behind the end is known to be zeros), and counts that stand in a block that is
//! not in the cache.

use std::ops::Range;

use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::Planned;
use crate::qcow2::alloc::{get_count, Run};
use crate::qcow2::Geometry;
use crate::state::State;
use crate::types::HostCluster;

/// The most bytes of clusters counted ahead.
const AHEAD: u64 = 8 << 20;

/// What is counted ahead.
#[derive(Default)]
pub(crate) struct Reserve {
    /// Counted in memory and nobody's, fresh.
    clusters: Range<u64>,
    /// How many were counted ahead at once.
    ahead: u64,
    /// Counts of the reserve's clusters below this one are on disk,
    counted: u64,
    /// and below this one they will be with the commit under way.
    counting: u64,
}

impl Reserve {
    pub(super) fn is_empty(&self) -> bool {
        self.clusters.is_empty()
    }

    fn len(&self) -> u64 {
        self.clusters.end - self.clusters.start
    }

    /// A commit begins: it takes along the counts as they are now.
    pub(crate) fn at_begin(&mut self) {
        self.counting = self.clusters.end;
    }

    /// It has ended.
    pub(crate) fn at_end(&mut self, ok: bool) {
        if ok {
            self.counted = self.counting;
        }
    }
}

impl State {
    /// Up to `max` clusters of the reserve in a row; None when it is empty.
    pub(super) fn take_reserved(&mut self, files: &[BlockFile], max: u64) -> Planned<Option<Run>> {
        let len = self.writer()?.reserve.len();
        if len == 0 {
            return Ok(None);
        }
        if len < max {
            self.count_more(files, max - len)?;
        }
        let reserve = &self.writer()?.reserve;
        let run = reserve.clusters.start..reserve.clusters.end.min(reserve.clusters.start + max);
        self.guard_data(run.clone(), "a new cluster")?;
        let reserve = &mut self.writer()?.reserve;
        reserve.clusters.start = run.end;
        let counted = run.end <= reserve.counted;
        self.count_ahead(files)?;
        Ok(Some(Run {
            first: HostCluster(run.start),
            count: run.end - run.start,
            fresh: true,
            counted,
        }))
    }

    /// Clusters behind the end are in demand: count more of them, when those that are left become few.
    pub(super) fn count_ahead(&mut self, files: &[BlockFile]) -> Planned<()> {
        let writer = self.writer()?;
        let most = (AHEAD >> writer.geometry.cluster_bits).max(1);
        let reserve = &mut writer.reserve;
        if reserve.len() * 2 > reserve.ahead {
            return Ok(());
        }
        reserve.ahead = (reserve.ahead * 2).clamp(1, most);
        let wanted = reserve.ahead;
        self.count_more(files, wanted)
    }

    /// Count up to `wanted` clusters behind the end, as far as that needs no reading, and the reserve stays one run.
    fn count_more(&mut self, files: &[BlockFile], wanted: u64) -> Planned<()> {
        let writer = self.writer()?;
        let geometry = writer.geometry;
        let (start, reserve) = (writer.end, &writer.reserve);
        if !writer.regular || !reserve.is_empty() && reserve.clusters.end != start {
            return Ok(());
        }
        let end = start + self.uncounted(&geometry, start, wanted);
        let sound = self.guard_counts(&geometry, start..end).is_ok()
            && self
                .guard_data(start..end, "clusters counted ahead")
                .is_ok();
        let writer = self.writer()?;
        // A disk that has no room for more than is needed is no error.
        if start == end || !sound || writer.lengthen(files, end).is_err() {
            return Ok(());
        }
        if writer.reserve.is_empty() {
            writer.reserve.clusters.start = start;
        }
        writer.reserve.clusters.end = end;
        writer.end = end;
        if writer.cursor == start {
            writer.cursor = end;
        }
        for cluster in start..end {
            self.set_refcount(&geometry, HostCluster(cluster), 1);
        }
        Ok(())
    }

    /// How many clusters from `at` on, at most `max`, have a count of zero that stands in one block of the cache.
    fn uncounted(&self, geometry: &Geometry, at: u64, max: u64) -> u64 {
        let Some(place) = self.count_place(geometry, HostCluster(at)) else {
            return 0;
        };
        let Some(block) = self.cache.peek(place.need.layer, place.need.offset) else {
            return 0;
        };
        let order = geometry.refcount_order;
        let here = ((geometry.block() * 8) >> order) - place.index;
        (0..here.min(max))
            .take_while(|n| get_count(block.bytes(), order, place.index + n) == 0)
            .count() as u64
    }

    /// The image is to be closed: what is left is free again.
    pub(crate) fn give_back_reserve(&mut self, waiter: &Waiter) -> Planned<()> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        let (geometry, clusters) = (writer.geometry, writer.reserve.clusters.clone());
        for cluster in clusters.clone() {
            self.refcount(&geometry, HostCluster(cluster), waiter)?;
        }
        let sound = self.check_sound().is_ok();
        if sound && self.guard_counts(&geometry, clusters.clone()).is_ok() {
            for cluster in clusters.clone() {
                self.set_refcount(&geometry, HostCluster(cluster), 0);
            }
            let writer = self.writer()?;
            writer.cursor = writer.cursor.min(clusters.start);
            if writer.end == clusters.end && !clusters.is_empty() {
                writer.end = clusters.start;
            }
        }
        // Of a damaged image they leak.
        self.writer()?.reserve = Reserve::default();
        Ok(())
    }
}
