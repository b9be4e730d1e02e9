// SPDX-License-Identifier: Apache-2.0
//! All that lies below an L1 table: its counts, and the COPIED flags in its L2 tables.
//!
//! Counts change in the copies that a switch has made (switch.rs), and an L2 table whose flags change is written to
//! one of its spare clusters, so that nothing on disk is different until the header changes.

use std::ops::Range;

use crate::blocking::run;
use crate::bytes::{be64, put64};
use crate::cache::{Block, Class};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::snapshot::file_of;
use crate::qcow2::switch::Switch;
use crate::qcow2::{refcount, Geometry};
use crate::state::State;
use crate::types::{HostCluster, HostOffset};

/// Count everything below an L1 table up or down by one, in the copies of the counts.
pub(super) fn count_tree(image: &Image, geometry: &Geometry, l1: &[u64], up: bool) -> Result<()> {
    let mut bytes = vec![0u8; geometry.cluster() as usize];
    for entry in l1 {
        let Some(table) = decode_l1(geometry, *entry)? else {
            continue;
        };
        file_of(image, geometry)?.read_at(&mut bytes, table.offset.0)?;
        let mut runs: Vec<Range<u64>> = vec![refcount::clusters(
            geometry,
            table.offset,
            geometry.cluster(),
        )];
        for entry in L2Entry::all(geometry, &bytes) {
            let range = match entry.decode(geometry)? {
                Mapping::Compressed { host, stored } => refcount::clusters(geometry, host, stored),
                mapping => match mapping.host() {
                    Some((host, _)) => refcount::clusters(geometry, host, geometry.cluster()),
                    None => continue,
                },
            };
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        for mut range in runs {
            // The range shrinks as it is counted, so that going on after a stop counts nothing twice.
            run(image, |state, waiter| {
                state.count_run(geometry, &mut range, up, waiter)
            })?;
        }
    }
    Ok(())
}

/// The L1 table as it is when no cluster below it is the disk's alone any more: the L2 tables that had flags
/// are written elsewhere.
pub(super) fn without_flags(
    image: &Image,
    geometry: &Geometry,
    switch: &mut Switch,
    mut l1: Vec<u64>,
) -> Result<Vec<u64>> {
    let file = file_of(image, geometry)?;
    let size = geometry.l2_entry_size() as usize;
    let mut bytes = vec![0u8; geometry.cluster() as usize];
    for entry in &mut l1 {
        let Some(table) = decode_l1(geometry, *entry)?.filter(|table| table.copied) else {
            continue;
        };
        file.read_at(&mut bytes, table.offset.0)?;
        for at in (0..bytes.len()).step_by(size) {
            let word = be64(&bytes, at).unwrap_or(0);
            put64(&mut bytes, at, word & !COPIED);
        }
        *entry = move_l2(image, geometry, switch, table.offset, &bytes)?.0;
    }
    Ok(l1)
}

/// Clear the COPIED flags in the L2 tables below a snapshot's L1 table, in place: one flag too few is right at any time.
///
/// QEMU sets them there when it deletes another snapshot that shared the tables: the clusters are that snapshot's
/// alone then, until the disk has them as well.
pub(super) fn clear_flags(image: &Image, geometry: &Geometry, l1: &[u64]) -> Result<()> {
    let file = file_of(image, geometry)?;
    let size = geometry.l2_entry_size() as usize;
    let mut bytes = vec![0u8; geometry.cluster() as usize];
    for entry in l1 {
        let Some(table) = decode_l1(geometry, *entry)? else {
            continue;
        };
        file.read_at(&mut bytes, table.offset.0)?;
        let mut flagged = false;
        for at in (0..bytes.len()).step_by(size) {
            let word = be64(&bytes, at).unwrap_or(0);
            flagged |= word & COPIED != 0;
            put64(&mut bytes, at, word & !COPIED);
        }
        if !flagged {
            continue;
        }
        let (layer, cluster, block) = (geometry.layer, geometry.cluster(), geometry.block());
        let offset = table.offset;
        image.lock().guard_l2(geometry, table)?;
        file.write_at(&bytes, offset.0)?;
        image.lock().cache.forget(layer, offset, cluster, block);
    }
    Ok(())
}

/// The L1 table with flags as the copied counts say; L2 tables whose flags change are written elsewhere.
pub(super) fn with_flags(
    image: &Image,
    geometry: &Geometry,
    switch: &mut Switch,
    mut l1: Vec<u64>,
) -> Result<Vec<u64>> {
    let file = file_of(image, geometry)?;
    let size = geometry.l2_entry_size() as usize;
    let mut before = vec![0u8; geometry.cluster() as usize];
    let mut counts = Counts::default();
    for entry in &mut l1 {
        let Some(table) = decode_l1(geometry, *entry)? else {
            continue;
        };
        let cluster = table.offset.0 >> geometry.cluster_bits;
        if counts.get(image, geometry, cluster)? != 1 {
            *entry &= !COPIED;
            continue;
        }
        file.read_at(&mut before, table.offset.0)?;
        let mut after = before.clone();
        for (n, l2) in L2Entry::all(geometry, &before).enumerate() {
            let Some((host, false)) = l2.decode(geometry)?.host() else {
                continue;
            };
            let cluster = host.0 >> geometry.cluster_bits;
            if counts.get(image, geometry, cluster)? == 1 {
                put64(&mut after, n * size, l2.word | COPIED);
            }
        }
        *entry = if after == before {
            table.offset.0 | COPIED
        } else {
            move_l2(image, geometry, switch, table.offset, &after)?.0 | COPIED
        };
    }
    Ok(l1)
}

/// Write an L2 table with this content elsewhere; its old place is nobody's once the header changes.
fn move_l2(
    image: &Image,
    geometry: &Geometry,
    switch: &mut Switch,
    old: HostOffset,
    content: &[u8],
) -> Result<HostOffset> {
    let place = switch.spare()?;
    file_of(image, geometry)?.write_at(content, place.0)?;
    let mut state = image.lock();
    let (layer, cluster, block) = (geometry.layer, geometry.cluster(), geometry.block());
    state.cache.forget(layer, place, cluster, block);
    drop(state);
    switch.retire(old, cluster);
    Ok(place)
}

/// Refcounts of neighbours, with one look into the cache for many.
#[derive(Default)]
struct Counts {
    clusters: Range<u64>,
    block: Option<Block>,
}

impl Counts {
    fn get(&mut self, image: &Image, geometry: &Geometry, cluster: u64) -> Result<u64> {
        if !self.clusters.contains(&cluster) {
            let found = run(image, |state, waiter| {
                let Some(place) = state.count_place(geometry, HostCluster(cluster)) else {
                    return Ok(None);
                };
                let block = state.cache.fetch(place.need, waiter)?.clone();
                Ok(Some((block, cluster - place.index)))
            })?;
            let Some((block, start)) = found else {
                return Ok(0);
            };
            self.block = Some(block);
            self.clusters = start..start + ((geometry.block() * 8) >> geometry.refcount_order);
        }
        let bytes = self.block.as_ref().map_or(&[][..], |block| block.bytes());
        Ok(refcount::get(
            bytes,
            geometry.refcount_order,
            cluster - self.clusters.start,
        ))
    }
}

impl State {
    /// Count a run of clusters up or down by one; what is done is cut off the front of `range`.
    fn count_run(
        &mut self,
        geometry: &Geometry,
        range: &mut Range<u64>,
        up: bool,
        waiter: &Waiter,
    ) -> Planned<()> {
        while !range.is_empty() {
            if self.cache.crowded() {
                return Err(Stop::Commit);
            }
            let Some(place) = self.count_place(geometry, HostCluster(range.start)) else {
                return Err(Stop::Fail(Error::invalid(format!(
                    "cluster {:#x} is in use, but not counted",
                    range.start
                ))));
            };
            let order = geometry.refcount_order;
            let here =
                (((geometry.block() * 8) >> order) - place.index).min(range.end - range.start);
            self.guard_counts(geometry, range.start..range.start + 1)?;
            let block = self.cache.fetch(place.need, waiter)?;
            let counts = |n: u64| refcount::get(block.bytes(), order, place.index + n);
            if up && (0..here).any(|n| counts(n) >= geometry.max_refcount()) {
                return Err(Stop::Fail(Error::unsupported(
                    "a refcount would exceed the image's refcount width",
                )));
            }
            if let Some(bytes) =
                self.cache
                    .modify(geometry.layer, place.need.offset, Class::Unreferenced)
            {
                for n in place.index..place.index + here {
                    let count = refcount::get(bytes, order, n);
                    let next = if up {
                        count + 1
                    } else {
                        count.saturating_sub(1)
                    };
                    refcount::set(bytes, order, n, next);
                }
            }
            if !up {
                self.may_be_free(geometry, range.start..range.start + here);
            }
            range.start += here;
        }
        Ok(())
    }
}
