// SPDX-License-Identifier: Apache-2.0
//! Reference counts of host clusters: 1 to 64 bits each, in refcount blocks that the refcount table
//! points to. The table of the active layer is held in memory (QEMU's limit of 8 MiB holds); the
//! blocks go through the metadata cache.

use crate::bytes::{be16, be32, be64, put32, put64};
use crate::cache::Class;
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::header::Header;
use crate::qcow2::mapping::block_of;
use crate::qcow2::Geometry;
use crate::state::State;
use crate::types::{HostCluster, HostOffset};

/// The offset in a refcount table entry.
pub(crate) const OFFSET: u64 = 0xffff_ffff_ffff_fe00;

/// Entry number `index` of the counts in `bytes`, each 2^order bits. Narrow ones fill a byte from
/// its low end.
pub(crate) fn get(bytes: &[u8], order: u32, index: u64) -> u64 {
    let at = ((index << order) / 8) as usize;
    match order {
        0..=2 => {
            let byte = bytes.get(at).copied().unwrap_or(0);
            let bits = 1u64 << order;
            let shift = (index << order) % 8;
            u64::from(byte) >> shift & ((1 << bits) - 1)
        }
        3 => bytes.get(at).copied().map_or(0, u64::from),
        4 => be16(bytes, at).map_or(0, u64::from),
        5 => be32(bytes, at).map_or(0, u64::from),
        _ => be64(bytes, at).unwrap_or(0),
    }
}

/// Set what [`get`] reads; `value` fits (the caller compares with the largest refcount).
pub(crate) fn set(bytes: &mut [u8], order: u32, index: u64, value: u64) {
    let at = ((index << order) / 8) as usize;
    match order {
        0..=2 => {
            if let Some(byte) = bytes.get_mut(at) {
                let bits = 1u32 << order;
                let shift = ((index << order) % 8) as u32;
                let mask = ((1u16 << bits) - 1) << shift;
                *byte = (*byte & !(mask as u8)) | ((value as u8) << shift & mask as u8);
            }
        }
        3 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value as u8;
            }
        }
        4 => {
            if let Some(place) = bytes.get_mut(at..at + 2) {
                place.copy_from_slice(&(value as u16).to_be_bytes());
            }
        }
        5 => put32(bytes, at, value as u32),
        _ => put64(bytes, at, value),
    }
}

/// Read a whole refcount table; every entry is checked to be a cluster's offset.
pub(crate) fn read_table(file: &BlockFile, header: &Header) -> Result<Vec<u64>> {
    let bytes = (u64::from(header.reftable_clusters) << header.cluster_bits) as usize;
    let mut raw = vec![0u8; bytes];
    file.read_at(&mut raw, header.reftable_offset)?;
    let cluster = 1u64 << header.cluster_bits;
    let entry = |bytes: &[u8]| {
        let entry = be64(bytes, 0).unwrap_or(0) & OFFSET;
        if entry % cluster == 0 && entry < 1 << 56 {
            Ok(entry)
        } else {
            Err(Error::invalid(format!(
                "refcount block offset {entry:#x} is not a cluster's"
            )))
        }
    };
    raw.chunks_exact(8).map(entry).collect()
}

/// Where a cluster's count is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// The cached block.
    pub(crate) need: crate::plan::Need,
    /// The count's number within it.
    pub(crate) index: u64,
}

impl State {
    /// Where the count of `cluster` stands; None when no refcount block covers it (its count is 0).
    pub(crate) fn count_place(&self, geometry: &Geometry, cluster: HostCluster) -> Option<Place> {
        let per_block = geometry.refblock_entries();
        let table = &self.writer.as_ref()?.reftable;
        let refblock = *table.get((cluster.0 / per_block) as usize)?;
        if refblock == 0 {
            return None;
        }
        let index = cluster.0 % per_block;
        let need = block_of(
            geometry,
            refblock + ((index << geometry.refcount_order) / 8),
        );
        let first = ((need.offset.0 - refblock) * 8) >> geometry.refcount_order;
        Some(Place {
            need,
            index: index - first,
        })
    }

    /// The refcount of a cluster.
    pub(crate) fn refcount(
        &mut self,
        geometry: &Geometry,
        cluster: HostCluster,
        waiter: &Waiter,
    ) -> Planned<u64> {
        match self.count_place(geometry, cluster) {
            None => Ok(0),
            Some(place) => {
                let block = self.cache.fetch(place.need, waiter)?;
                Ok(get(block.bytes(), geometry.refcount_order, place.index))
            }
        }
    }

    /// Set a refcount whose block has been fetched under the same lock.
    pub(crate) fn set_refcount(&mut self, geometry: &Geometry, cluster: HostCluster, value: u64) {
        let Some(place) = self.count_place(geometry, cluster) else {
            return;
        };
        if let Some(bytes) =
            self.cache
                .modify(geometry.layer, place.need.offset, Class::Unreferenced)
        {
            set(bytes, geometry.refcount_order, place.index, value);
        }
        if value == 0 {
            self.era += 1;
            self.forget_packed(geometry, cluster.0..cluster.0 + 1);
        }
    }

    /// Count a cluster up or down by one. A count of zero is not taken below (the image is wrong
    /// there; check says so), one at its maximum is an error.
    pub(crate) fn adjust_refcount(
        &mut self,
        geometry: &Geometry,
        cluster: HostCluster,
        up: bool,
        waiter: &Waiter,
    ) -> Planned<u64> {
        let now = self.refcount(geometry, cluster, waiter)?;
        if up && now >= geometry.max_refcount() {
            let message = format!("the refcount of cluster {:#x} is at its maximum", cluster.0);
            return Err(Stop::Fail(Error::unsupported(message)));
        }
        let next = if up { now + 1 } else { now.saturating_sub(1) };
        self.set_refcount(geometry, cluster, next);
        Ok(next)
    }
}

/// The clusters that `len` bytes at `offset` touch.
pub(crate) fn clusters(geometry: &Geometry, offset: HostOffset, len: u64) -> std::ops::Range<u64> {
    let bits = geometry.cluster_bits;
    offset.0 >> bits..offset.0.saturating_add(len).div_ceil(1 << bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_to_themselves() {
        for order in 0..=6u32 {
            let mut bytes = vec![0u8; 64];
            let max = if order == 6 {
                u64::MAX
            } else {
                (1u64 << (1 << order)) - 1
            };
            let count = (64 * 8) >> order;
            for index in (0..count).step_by(2) {
                set(&mut bytes, order, index, max);
            }
            for index in 0..count {
                assert_eq!(
                    get(&bytes, order, index),
                    if index % 2 == 0 { max } else { 0 },
                    "order {order}"
                );
            }
        }
    }

    #[test]
    fn narrow_counts_fill_a_byte_from_its_low_end() {
        let mut bytes = [0u8; 1];
        set(&mut bytes, 1, 1, 3);
        assert_eq!(bytes, [0b0000_1100]);
    }
}
