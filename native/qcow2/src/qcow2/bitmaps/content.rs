// SPDX-License-Identifier: Apache-2.0
//! A bitmap's content: a table of clusters, each of them bits of the disk in order, lowest bit first.
//! A table entry without a cluster says that its bits are all zeros or all ones.

use std::ops::Range;

use crate::bytes::be64;
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::qcow2::bitmaps::directory::Entry;
use crate::qcow2::snapshot::{file_of, new_table};
use crate::qcow2::{refcount, Geometry};
use crate::types::HostOffset;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// A bitmap's table, as it stands in the file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table(Vec<u64>);

impl Table {
    pub(crate) fn read(file: &BlockFile, geometry: &Geometry, entry: &Entry) -> Result<Table> {
        let len = u64::from(entry.table_entries) * 8;
        let broken = || {
            Error::invalid(format!(
                "the table of bitmap '{}' is broken",
                entry.name.escape_debug()
            ))
        };
        if entry.table.saturating_add(len) > file.len()? {
            return Err(broken());
        }
        let mut bytes = vec![0; len as usize];
        file.read_at(&mut bytes, entry.table)?;
        let table: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| be64(word, 0).unwrap_or(0))
            .collect();
        let sound = |word: &u64| {
            let offset = word & OFFSET;
            word & !(OFFSET | ALL_ONES) == 0
                && offset % geometry.cluster() == 0
                && (offset == 0 || word & ALL_ONES == 0)
        };
        if table.iter().all(sound) {
            Ok(Table(table))
        } else {
            Err(broken())
        }
    }

    fn word(&self, index: u64) -> u64 {
        self.0.get(index as usize).copied().unwrap_or(0)
    }

    /// The bits of table entry `index`: a cluster of them.
    pub(crate) fn load(
        &self,
        file: &BlockFile,
        geometry: &Geometry,
        index: u64,
    ) -> Result<Vec<u8>> {
        let size = geometry.cluster() as usize;
        let word = self.word(index);
        match word & OFFSET {
            0 => Ok(vec![if word & ALL_ONES != 0 { 0xff } else { 0 }; size]),
            offset => {
                let mut bytes = vec![0; size];
                file.read_at(&mut bytes, offset)?;
                Ok(bytes)
            }
        }
    }

    /// Whether all bits of entry `index` are alike without looking, and what they are.
    pub(crate) fn uniform(&self, index: u64) -> Option<bool> {
        let word = self.word(index);
        (word & OFFSET == 0).then_some(word & ALL_ONES != 0)
    }

    /// The clusters that the table names.
    pub(crate) fn clusters(&self, geometry: &Geometry) -> Vec<Range<u64>> {
        let named = self.0.iter().map(|word| word & OFFSET);
        named
            .filter(|offset| *offset != 0)
            .map(|offset| refcount::clusters(geometry, HostOffset(offset), geometry.cluster()))
            .collect()
    }

    /// All clusters of a bitmap, those of the table itself included.
    pub(crate) fn all_clusters(&self, geometry: &Geometry, entry: &Entry) -> Vec<Range<u64>> {
        let mut clusters = self.clusters(geometry);
        if entry.table != 0 {
            let len = u64::from(entry.table_entries) * 8;
            clusters.push(refcount::clusters(geometry, HostOffset(entry.table), len));
        }
        clusters
    }
}

/// A bitmap written anew, not yet named by a directory.
pub(crate) struct Written {
    pub(crate) entry: Entry,
    /// Clusters that only the old one has, to be freed when the new one is named.
    pub(crate) dropped: Vec<Range<u64>>,
    /// Clusters that only the new one has, to be freed when it comes to nothing.
    pub(crate) made: Vec<Range<u64>>,
}

/// Write a bitmap for a disk of `size` bytes: the old content with what `change` makes of a table entry's bits (those
/// for which `touched` says so). Clusters are never written in place; those that stay the same are shared.
pub(crate) fn write(
    image: &Image,
    geometry: &Geometry,
    (entry, old): (&Entry, &Table),
    size: u64,
    touched: &dyn Fn(u64) -> bool,
    change: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Written> {
    let mut made = Vec::new();
    let result = write_all(
        image,
        geometry,
        (entry, old),
        size,
        touched,
        change,
        &mut made,
    );
    match result {
        Ok(new) => {
            let kept: std::collections::HashSet<u64> = new
                .1
                .clusters(geometry)
                .iter()
                .map(|range| range.start)
                .collect();
            let mut dropped = old.all_clusters(geometry, entry);
            dropped.retain(|range| !kept.contains(&range.start));
            Ok(Written {
                entry: new.0,
                dropped,
                made,
            })
        }
        Err(error) => {
            free(image, made)?;
            Err(error)
        }
    }
}

/// Give clusters back that nothing on the disk points to.
pub(crate) fn free(image: &Image, clusters: Vec<Range<u64>>) -> Result<()> {
    let mut state = image.lock();
    let writer = state.writer()?;
    clusters
        .into_iter()
        .for_each(|range| writer.freed.push(range));
    Ok(())
}

fn write_all(
    image: &Image,
    geometry: &Geometry,
    (entry, old): (&Entry, &Table),
    size: u64,
    touched: &dyn Fn(u64) -> bool,
    change: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    made: &mut Vec<Range<u64>>,
) -> Result<(Entry, Table)> {
    entry.check_size(geometry, size)?;
    let file = file_of(image, geometry)?;
    let count = entry.clusters(geometry, size).max(1);
    let per_cluster = geometry.cluster() * 8;
    let mut words = Vec::with_capacity(count as usize);
    for index in 0..count {
        let word = old.word(index);
        // What stands behind the end of the disk would show when it grows again.
        let last = index + 1 == count;
        if !touched(index) && !last {
            words.push(word);
            continue;
        }
        let before = old.load(file, geometry, index)?;
        let mut bits = before.clone();
        if touched(index) {
            change(index, &mut bits)?;
        }
        let valid = entry
            .bits(size)
            .saturating_sub(index * per_cluster)
            .min(per_cluster);
        clear_from(&mut bits, valid);
        words.push(if bits.iter().all(|byte| *byte == 0) {
            0
        } else if bits == before {
            word
        } else {
            let place = crate::blocking::run(image, |state, waiter| {
                state.allocate(image.files(), 1, waiter)
            })?
            .offset(geometry);
            made.push(refcount::clusters(geometry, place, geometry.cluster()));
            file.write_at(&bits, place.0)?;
            place.0
        });
    }
    let table = new_table(image, geometry, &words)?;
    made.push(refcount::clusters(geometry, table, words.len() as u64 * 8));
    let entry = Entry {
        table: table.0,
        table_entries: words.len() as u32,
        ..entry.clone()
    };
    Ok((entry, Table(words)))
}

/// Clear all bits from number `first` on.
fn clear_from(bits: &mut [u8], first: u64) {
    let whole = first.div_ceil(8) as usize;
    bits.iter_mut().skip(whole).for_each(|byte| *byte = 0);
    if first % 8 != 0 {
        if let Some(byte) = bits.get_mut((first / 8) as usize) {
            *byte &= (1u8 << (first % 8)) - 1;
        }
    }
}

/// Set bits.
pub(crate) fn set(bits: &mut [u8], range: Range<u64>) {
    let mut at = range.start;
    while at < range.end {
        let place = (at / 8) as usize;
        if at % 8 == 0 && range.end - at >= 8 {
            let bytes = ((range.end - at) / 8) as usize;
            bits.iter_mut()
                .skip(place)
                .take(bytes)
                .for_each(|byte| *byte = 0xff);
            at += bytes as u64 * 8;
            continue;
        }
        if let Some(byte) = bits.get_mut(place) {
            *byte |= 1 << (at % 8);
        }
        at += 1;
    }
}

/// Whether a bit is set, and the first after it, below `end`, that is otherwise.
pub(crate) fn run(bits: &[u8], at: u64, end: u64) -> (bool, u64) {
    let bit = |n: u64| {
        bits.get((n / 8) as usize)
            .is_some_and(|byte| byte >> (n % 8) & 1 != 0)
    };
    let set = bit(at);
    let mut until = at + 1;
    let skipped = if set { 0xff } else { 0 };
    while until < end {
        if until % 8 == 0 && end - until >= 8 && bits.get((until / 8) as usize) == Some(&skipped) {
            until += 8;
        } else if bit(until) == set {
            until += 1;
        } else {
            break;
        }
    }
    (set, until)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_found_and_cleared_behind_the_end() {
        let mut bits = vec![0u8; 16];
        set(&mut bits, 5..77);
        assert_eq!(run(&bits, 0, 128), (false, 5));
        assert_eq!(run(&bits, 5, 128), (true, 77));
        assert_eq!(run(&bits, 77, 128), (false, 128));
        clear_from(&mut bits, 70);
        assert_eq!(run(&bits, 5, 128), (true, 70));
        clear_from(&mut bits, 0);
        assert_eq!(bits, vec![0; 16]);
    }
}
