// SPDX-License-Identifier: Apache-2.0
//! The walk of a check over everything in an image that points to a cluster.
//!
//! An L2 table is read once a pass, however many L1 tables share it: first all L1 tables are read and
//! the L2 tables that they name are noted with how often; then each is walked with that weight. (An
//! image of a few megabytes could otherwise name one table many millions of times.) Only so many tables
//! are noted; what is beyond that is walked each time. The active L1 table is walked in the disk's
//! order, and the host is told of the tables to come, so that it reads ahead.

use std::collections::HashMap;

use crate::bytes::be64;
use crate::error::Result;
use crate::qcow2::check::{CheckReport, Checker};
use crate::qcow2::counts::{Window, FLAGGED, UNFLAGGED};
use crate::qcow2::entry::{L2Entry, Mapping, COMPRESSED, COPIED, OFFSET};
use crate::qcow2::header::CryptMethod;
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::snapshot;

/// L2 tables that are noted.
const NOTED: usize = 900_000;
/// Entries of a table that are read at once.
pub(super) const PIECE: u64 = 8192;
/// How far the host is told of tables ahead, in bytes of them.
const AHEAD: u64 = 4 << 20;

/// An L1 table, and how many use it.
struct Root {
    offset: u64,
    entries: u64,
    times: u32,
    active: bool,
}

/// What is noted about L2 tables: how often they are named; 0 once they were walked.
type Noted = HashMap<u64, u32>;

impl Checker<'_> {
    /// Count everything that points into a window of clusters.
    pub(crate) fn window(
        &mut self,
        first: u64,
        len: u64,
        report: &mut CheckReport,
    ) -> Result<Window> {
        let roots = self.roots(report);
        let mut noted = Noted::new();
        for root in &roots {
            self.note(root, &mut noted)?;
        }
        let mut window = Window::new(first, len);
        window.add_all(0..1, 1);
        if !self.without_refcounts {
            self.walk_refcounts(&mut window, report);
        }
        if let CryptMethod::Luks { offset, len } = self.header.crypt {
            self.count(&mut window, report, "LUKS header", offset, len, 1);
        }
        for root in &roots {
            self.walk_l1(&mut window, report, root, &mut noted)?;
        }
        self.walk_bitmaps(&mut window, report)?;
        if let Ok((_, table)) = snapshot::read_table(self.file, &self.header) {
            let offset = self.header.snapshots_offset;
            self.count(&mut window, report, "snapshot table", offset, table, 1);
        }
        Ok(window)
    }

    fn walk_refcounts(&mut self, window: &mut Window, report: &mut CheckReport) {
        let cluster = self.geometry.cluster();
        let table = u64::from(self.header.reftable_clusters) * cluster;
        let offset = self.header.reftable_offset;
        self.count(window, report, "refcount table", offset, table, 1);
        for index in 0..self.reftable.len() {
            let Some(offset) = self.reftable.get(index).copied().filter(|at| *at != 0) else {
                continue;
            };
            if offset % cluster != 0 {
                self.once(report, || {
                    format!("refcount block {index}: offset {offset:#x} is not a cluster's")
                });
                continue;
            }
            self.count(window, report, "refcount block", offset, cluster, 1);
        }
    }

    /// All L1 tables: the active one first.
    fn roots(&self, report: &mut CheckReport) -> Vec<Root> {
        let mut roots = vec![Root {
            offset: self.header.l1_offset,
            entries: u64::from(self.header.l1_entries),
            times: 1,
            active: true,
        }];
        let snapshots = match snapshot::read_table(self.file, &self.header) {
            Ok((snapshots, _)) => snapshots,
            Err(error) => {
                self.once(report, || format!("snapshot table: {error}"));
                return roots;
            }
        };
        let mut places: HashMap<(u64, u64), usize> = HashMap::new();
        let mut room = self.file_len;
        for snapshot in snapshots {
            let (offset, entries) = (snapshot.l1_offset, u64::from(snapshot.l1_entries));
            if offset % self.geometry.cluster() != 0 {
                self.once(report, || {
                    format!("snapshot {}: L1 table offset {offset:#x}", snapshot.id)
                });
                continue;
            }
            if let Some(root) = places
                .get(&(offset, entries))
                .and_then(|place| roots.get_mut(*place))
            {
                root.times += 1;
                continue;
            }
            match room.checked_sub(entries * 8) {
                Some(left) => room = left,
                None => {
                    self.once(report, || {
                        "the snapshots' L1 tables are larger than the file".to_owned()
                    });
                    break;
                }
            }
            places.insert((offset, entries), roots.len());
            roots.push(Root {
                offset,
                entries,
                times: 1,
                active: false,
            });
        }
        roots
    }

    /// A piece of a root's L1 entries, from entry `at` on.
    fn l1_piece(&self, root: &Root, at: u64, words: &mut Vec<u64>) -> Result<()> {
        let mut bytes = vec![0; ((root.entries - at).min(PIECE) * 8) as usize];
        self.file.read_at(&mut bytes, root.offset + at * 8)?;
        words.clear();
        let entries = bytes.chunks_exact(8);
        words.extend(entries.map(|entry| be64(entry, 0).unwrap_or(0)));
        Ok(())
    }

    fn note(&self, root: &Root, noted: &mut Noted) -> Result<()> {
        if root.offset >= self.file_len {
            return Ok(());
        }
        let mut words = Vec::new();
        for at in (0..root.entries).step_by(PIECE as usize) {
            self.l1_piece(root, at, &mut words)?;
            for word in words.iter().filter(|word| **word & OFFSET != 0) {
                let offset = word & OFFSET;
                if noted.len() < NOTED || noted.contains_key(&offset) {
                    let times = noted.entry(offset).or_insert(0);
                    *times = times.saturating_add(root.times);
                }
            }
        }
        Ok(())
    }

    fn walk_l1(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        root: &Root,
        noted: &mut Noted,
    ) -> Result<()> {
        if root.entries == 0 {
            return Ok(());
        }
        let len = root.entries * 8;
        self.count(window, report, "L1 table", root.offset, len, root.times);
        if root.offset >= self.file_len {
            return Ok(());
        }
        let ahead = (AHEAD >> self.geometry.cluster_bits).clamp(1, PIECE) as usize;
        let mut place = Place {
            next_data: 0,
            table: vec![0u8; self.geometry.cluster() as usize],
        };
        let mut words = Vec::new();
        for at in (0..root.entries).step_by(PIECE as usize) {
            self.l1_piece(root, at, &mut words)?;
            for (n, word) in words.iter().enumerate() {
                if n % ahead == 0 {
                    let next = words.get(n..(n + 2 * ahead).min(words.len()));
                    self.announce(next.unwrap_or(&[]), noted);
                }
                let entry = (at + n as u64, *word);
                self.walk_l1_entry(window, report, entry, root, noted, &mut place)?;
            }
        }
        Ok(())
    }

    /// Let the host read ahead what will be walked.
    fn announce(&self, words: &[u64], noted: &Noted) {
        for word in words {
            let offset = word & OFFSET;
            if offset != 0 && offset < self.file_len && noted.get(&offset) != Some(&0) {
                self.file.will_need(offset, self.geometry.cluster());
            }
        }
    }

    fn walk_l1_entry(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        (index, entry): (u64, u64),
        root: &Root,
        noted: &mut Noted,
        place: &mut Place,
    ) -> Result<()> {
        let table = match decode_l1(&self.geometry, entry) {
            Ok(None) => return Ok(()),
            Ok(Some(table)) => table,
            Err(error) => {
                self.once(report, || format!("L1 entry {index}: {error}"));
                return Ok(());
            }
        };
        let offset = table.offset.0;
        let cluster = self.geometry.cluster();
        self.count(window, report, "L2 table", offset, cluster, root.times);
        if offset.saturating_add(cluster) > self.file_len.next_multiple_of(cluster) {
            return Ok(());
        }
        if root.active {
            let flag = if table.copied { FLAGGED } else { UNFLAGGED };
            window.add(offset >> self.geometry.cluster_bits, 0, flag);
        }
        let weight = match noted.get_mut(&offset) {
            Some(0) => return Ok(()),
            Some(times) => std::mem::replace(times, 0),
            None => root.times,
        };
        self.file.read_at(&mut place.table, offset)?;
        let walk = Walk {
            first: index * self.geometry.l2_entries(),
            weight,
            active: root.active,
        };
        self.walk_l2(window, report, &walk, &place.table, &mut place.next_data);
        Ok(())
    }

    fn walk_l2(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        walk: &Walk,
        bytes: &[u8],
        next_data: &mut u64,
    ) {
        let geometry = self.geometry;
        if geometry.extended_l2 || geometry.external_data() {
            for (n, entry) in L2Entry::all(&geometry, bytes).enumerate() {
                self.walk_l2_entry(window, report, walk, (n as u64, entry), next_data);
            }
            return;
        }
        // Nearly all entries are plain ones: a cluster's offset, with or without the flag.
        let (size, bits) = (geometry.cluster(), geometry.cluster_bits);
        let odd = COMPRESSED | !(COPIED | OFFSET) | (size - 1);
        let limit = self.file_len.next_multiple_of(size).saturating_sub(size);
        let guest = walk.active && self.first_pass;
        let words = bytes.chunks_exact(8);
        for (n, word) in words.enumerate() {
            let word = word.try_into().map_or(0, u64::from_be_bytes);
            if word == 0 {
                continue;
            }
            let host = word & OFFSET;
            if word & odd != 0 || host == 0 || host > limit {
                let entry = L2Entry { word, bitmap: 0 };
                self.walk_l2_entry(window, report, walk, (n as u64, entry), next_data);
                continue;
            }
            let flag = match (walk.active, word & COPIED != 0) {
                (false, _) => 0,
                (true, true) => FLAGGED,
                (true, false) => UNFLAGGED,
            };
            if guest {
                report.allocated_clusters += 1;
                report.fragmented_clusters += u64::from(*next_data != 0 && *next_data != host);
                *next_data = host + size;
            }
            window.add(host >> bits, walk.weight, flag);
        }
    }

    fn walk_l2_entry(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        walk: &Walk,
        (n, entry): (u64, L2Entry),
        next_data: &mut u64,
    ) {
        let cluster = walk.first + n;
        let size = self.geometry.cluster();
        let mapping = match entry.decode(&self.geometry) {
            Ok(mapping) => mapping,
            Err(error) => {
                return self.once(report, || format!("guest cluster {cluster:#x}: {error}"))
            }
        };
        let (host, len, copied) = match (mapping, mapping.host()) {
            (Mapping::Compressed { host, stored }, _) => {
                if entry.word & COPIED != 0 && walk.active {
                    self.once(report, || {
                        format!("guest cluster {cluster:#x}: compressed and marked as copied")
                    });
                }
                (host.0, stored, None)
            }
            (_, Some((host, copied))) => (host.0, size, Some(copied)),
            (_, None) => return,
        };
        if walk.active && self.first_pass {
            report.allocated_clusters += 1;
            report.compressed_clusters += u64::from(copied.is_none());
            report.fragmented_clusters +=
                u64::from(copied.is_none() || (*next_data != 0 && *next_data != host));
            *next_data = host + size;
        }
        if self.geometry.external_data() {
            return;
        }
        // A compressed cluster's last sector may lie behind the end of the file.
        let len = if copied.is_none() {
            len.min(self.file_len.saturating_sub(host).max(1))
        } else {
            len
        };
        self.count(window, report, "data cluster", host, len, walk.weight);
        if let (true, Some(copied)) = (walk.active, copied) {
            let flag = if copied { FLAGGED } else { UNFLAGGED };
            window.add(host >> self.geometry.cluster_bits, 0, flag);
        }
    }

    /// Count the clusters of a range; a range outside of the file is a corruption (once).
    pub(super) fn count(
        &self,
        window: &mut Window,
        report: &mut CheckReport,
        what: &str,
        offset: u64,
        len: u64,
        times: u32,
    ) {
        let cluster = self.geometry.cluster();
        // The file's last cluster may be cut short.
        if offset.saturating_add(len) >= self.file_len.saturating_add(cluster) {
            return self.once(report, || {
                format!("{what} at {offset:#x} reaches beyond the end of the file")
            });
        }
        let end = offset.saturating_add(len).div_ceil(cluster);
        window.add_all(offset >> self.geometry.cluster_bits..end, times);
    }

    /// Structural findings are reported in the first pass only.
    pub(super) fn once(&self, report: &mut CheckReport, message: impl FnOnce() -> String) {
        if self.first_pass {
            report.corrupt(message);
        }
    }
}

/// How an L2 table is walked.
struct Walk {
    /// The guest cluster of its first entry.
    first: u64,
    /// For how many it counts.
    weight: u32,
    /// It is the active disk's.
    active: bool,
}

/// Where the walk of an L1 table is.
struct Place {
    /// Where the next data cluster would be if it were behind its predecessor; 0 before the first.
    next_data: u64,
    /// Room for an L2 table.
    table: Vec<u8>,
}
