// SPDX-License-Identifier: Apache-2.0
//! Checking an image: every pointer in its tables is counted and compared with the refcounts.
//!
//! The walk goes over header, L1 and L2 tables, snapshots, bitmaps and the refcount structure itself.
//! Counts are kept for a window of clusters at a time, so memory stays within 64 MiB whatever size the
//! image claims; a larger image is walked once a window. Nothing is written here except by repair.rs.
//!
//! What is wrong is one of two things, as in qemu-img: a *leak* (counted more often than used: space is
//! lost, nothing else) or a *corruption* (counted less often than used, or a pointer that leads
//! nowhere). Findings are counted without limit and described up to a number.

use std::collections::HashMap;
use std::fs::File;

use crate::bytes::{be16, be32, be64};
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::locks::{self, Use};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED};
use crate::qcow2::header::{autoclear, extension, CryptMethod, Header};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::{refcount, snapshot, Geometry};

/// Clusters counted in one pass: 2 bytes each.
const WINDOW: u64 = 24 << 20;
/// Findings that are described.
const MESSAGES: usize = 200;
/// Refcount blocks held at once for the check of COPIED flags, in bytes.
const BLOCK_CACHE: usize = 8 << 20;

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// Leaked clusters.
    Leaks,
    /// Everything that can be.
    All,
}

/// What was found. Clusters are counted, each as often as something is wrong with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// End of the last cluster in use, in bytes.
    pub image_end: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of those, mapped to a host cluster.
    pub allocated_clusters: u64,
    /// Of those, not behind their predecessor on the host.
    pub fragmented_clusters: u64,
    /// Of those, compressed.
    pub compressed_clusters: u64,
    /// Clusters counted less often than used, and impossible pointers.
    pub corruptions: u64,
    /// Of the corruptions, COPIED flags that do not fit the refcount while the use does them no harm: what
    /// an interrupted snapshot operation leaves.
    pub stale_flags: u64,
    /// Clusters counted more often than used.
    pub leaks: u64,
    /// Of the corruptions, repaired.
    pub corruptions_fixed: u64,
    /// Of the leaks, repaired.
    pub leaks_fixed: u64,
    /// The first findings in words.
    pub messages: Vec<String>,
}

impl CheckReport {
    fn corrupt(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.say(message);
    }

    pub(crate) fn say(&mut self, message: impl FnOnce() -> String) {
        if self.messages.len() < MESSAGES {
            self.messages.push(message());
        }
    }
}

/// Check the qcow2 image in `file`, and repair it as asked. Its backing file is not looked at.
pub fn check(file: &File, repair: Repair, lock: bool) -> Result<CheckReport> {
    let file = BlockFile::new(
        file.try_clone()
            .map_err(|e| Error::io("dup of the image's fd", &e))?,
    )?;
    if lock {
        locks::lock(
            file.fd(),
            if repair == Repair::None {
                Use::Read
            } else {
                Use::Write
            },
        )?;
    }
    let report = Checker::new(&file).and_then(|mut checker| {
        let mut report = checker.run()?;
        if repair != Repair::None {
            crate::qcow2::repair::repair(&file, &mut checker, &mut report, repair)?;
        }
        Ok(report)
    });
    if lock {
        locks::unlock(file.fd());
    }
    report
}

/// Repair an image that was not closed. The caller holds its locks.
pub(crate) fn repair_dirty(file: &BlockFile) -> Result<()> {
    let mut checker = Checker::new(file)?;
    let mut report = checker.run()?;
    crate::qcow2::repair::repair(file, &mut checker, &mut report, Repair::All)?;
    if report.corruptions > 0 {
        let message = "the image was not closed, and repairing it leaves corruptions: see check";
        return Err(Error::invalid(message));
    }
    Ok(())
}

/// The counts of one window.
pub(crate) struct Window {
    pub(crate) first: u64,
    pub(crate) counts: Vec<u16>,
}

impl Window {
    fn count(&mut self, clusters: std::ops::Range<u64>) {
        let end = self.first + self.counts.len() as u64;
        for cluster in clusters.start.max(self.first)..clusters.end.min(end) {
            if let Some(count) = self.counts.get_mut((cluster - self.first) as usize) {
                *count = count.saturating_add(1);
            }
        }
    }
}

/// The check of one image.
pub(crate) struct Checker<'a> {
    pub(crate) file: &'a BlockFile,
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    pub(crate) file_len: u64,
    pub(crate) reftable: Vec<u64>,
    blocks: HashMap<u64, Vec<u8>>,
    /// The block used last, out of `blocks`: neighbours' counts stand together.
    current: (u64, Vec<u8>),
    /// Leave out the refcount structure (repair makes a new one).
    pub(crate) without_refcounts: bool,
    first_pass: bool,
    highest: u64,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(file: &'a BlockFile) -> Result<Checker<'a>> {
        let header = Header::read(file)?;
        // Only whether the data is elsewhere matters here, not where.
        let geometry = Geometry::of(&header);
        let reftable = read_reftable(file, &header)?;
        Ok(Checker {
            file,
            file_len: file.len()?,
            header,
            geometry,
            reftable,
            blocks: HashMap::new(),
            current: (u64::MAX, Vec::new()),
            without_refcounts: false,
            first_pass: true,
            highest: 0,
        })
    }

    pub(crate) fn recheck(&mut self) -> Result<CheckReport> {
        self.run()
    }

    fn run(&mut self) -> Result<CheckReport> {
        let mut report = CheckReport {
            total_clusters: self.header.size.div_ceil(self.geometry.cluster()),
            ..CheckReport::default()
        };
        let clusters = self.clusters();
        let mut first = 0;
        while first < clusters.max(1) {
            let len = WINDOW.min(clusters - first);
            let window = self.window(first, len, &mut report)?;
            self.compare(&window, &mut report)?;
            if report.stale_flags > 0 && window.counts.len() as u64 == clusters {
                self.dangerous_flags(&window, &mut report)?;
            }
            self.first_pass = false;
            first += WINDOW;
        }
        report.image_end = (self.highest + 1) << self.geometry.cluster_bits;
        Ok(report)
    }

    /// Clusters that can be counted: those of the file, and those that a refcount block covers.
    pub(crate) fn clusters(&self) -> u64 {
        let in_file = self.file_len.div_ceil(self.geometry.cluster());
        let covered = self
            .reftable
            .iter()
            .rposition(|offset| *offset != 0)
            .map_or(0, |n| n as u64 + 1);
        in_file.max(
            covered
                .saturating_mul(self.geometry.refblock_entries())
                .min(in_file + self.geometry.refblock_entries()),
        )
    }

    /// Count everything that points into a window of clusters.
    pub(crate) fn window(
        &mut self,
        first: u64,
        len: u64,
        report: &mut CheckReport,
    ) -> Result<Window> {
        let mut window = Window {
            first,
            counts: vec![0; len as usize],
        };
        window.count(0..1);
        if !self.without_refcounts {
            let geometry = self.geometry;
            let table = u64::from(self.header.reftable_clusters) * geometry.cluster();
            self.count(
                &mut window,
                report,
                "refcount table",
                self.header.reftable_offset,
                table,
            );
            for index in 0..self.reftable.len() {
                let Some(offset) = self
                    .reftable
                    .get(index)
                    .copied()
                    .filter(|offset| *offset != 0)
                else {
                    continue;
                };
                if offset % geometry.cluster() != 0 {
                    self.once(report, || {
                        format!("refcount block {index}: offset {offset:#x} is not a cluster's")
                    });
                    continue;
                }
                self.count(
                    &mut window,
                    report,
                    "refcount block",
                    offset,
                    geometry.cluster(),
                );
            }
        }
        if let CryptMethod::Luks { offset, len } = self.header.crypt {
            self.count(&mut window, report, "LUKS header", offset, len);
        }
        self.walk_l1(
            &mut window,
            report,
            self.header.l1_offset,
            u64::from(self.header.l1_entries),
            true,
        )?;
        self.walk_snapshots(&mut window, report)?;
        self.walk_bitmaps(&mut window, report)?;
        Ok(window)
    }

    /// Count the clusters of a range; a range outside of the file is a corruption (once).
    fn count(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        what: &str,
        offset: u64,
        len: u64,
    ) {
        let cluster = self.geometry.cluster();
        // The file's last cluster may be cut short.
        if offset.saturating_add(len) >= self.file_len.saturating_add(cluster) {
            self.once(report, || {
                format!("{what} at {offset:#x} reaches beyond the end of the file")
            });
            return;
        }
        window.count(
            offset >> self.geometry.cluster_bits..offset.saturating_add(len).div_ceil(cluster),
        );
    }

    /// Structural findings are reported in the first pass only.
    fn once(&self, report: &mut CheckReport, message: impl FnOnce() -> String) {
        if self.first_pass {
            report.corrupt(message);
        }
    }

    /// Read a table of `entries` 8-byte entries piece by piece.
    fn table(
        &self,
        offset: u64,
        entries: u64,
        mut each: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        const PIECE: u64 = 65536;
        let mut bytes = vec![0u8; (entries.min(PIECE) * 8) as usize];
        let mut done = 0;
        while done < entries {
            let now = PIECE.min(entries - done);
            let piece = bytes.get_mut(..(now * 8) as usize).unwrap_or(&mut []);
            self.file.read_at(piece, offset + done * 8)?;
            for (n, entry) in piece.chunks_exact(8).enumerate() {
                each(done + n as u64, be64(entry, 0).unwrap_or(0))?;
            }
            done += now;
        }
        Ok(())
    }

    fn walk_l1(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        offset: u64,
        entries: u64,
        active: bool,
    ) -> Result<()> {
        if entries == 0 {
            return Ok(());
        }
        self.count(window, report, "L1 table", offset, entries * 8);
        if offset >= self.file_len {
            return Ok(());
        }
        // The table itself may be 32 MiB: it is read in pieces, and so are the L2 tables.
        let mut next_data = 0;
        let file = self.file;
        let mut piece = Vec::new();
        let mut at = 0;
        while at < entries {
            let now = (entries - at).min(8192);
            piece.resize((now * 8) as usize, 0);
            file.read_at(&mut piece, offset + at * 8)?;
            for n in 0..now {
                let entry = be64(&piece, (n * 8) as usize).unwrap_or(0);
                self.walk_l1_entry(window, report, (at + n, entry), active, &mut next_data)?;
            }
            at += now;
        }
        Ok(())
    }

    fn walk_l1_entry(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        (index, entry): (u64, u64),
        active: bool,
        next_data: &mut u64,
    ) -> Result<()> {
        let table = match decode_l1(&self.geometry, entry) {
            Ok(None) => return Ok(()),
            Ok(Some(table)) => table,
            Err(error) => {
                self.once(report, || format!("L1 entry {index}: {error}"));
                return Ok(());
            }
        };
        self.count(
            window,
            report,
            "L2 table",
            table.offset.0,
            self.geometry.cluster(),
        );
        if table.offset.0.saturating_add(self.geometry.cluster())
            > self.file_len.next_multiple_of(self.geometry.cluster())
        {
            return Ok(());
        }
        if active && self.first_pass {
            self.check_copied(report, table.offset.0, table.copied, || {
                format!("L1 entry {index}")
            })?;
        }
        let mut bytes = vec![0u8; self.geometry.cluster() as usize];
        self.file.read_at(&mut bytes, table.offset.0)?;
        let geometry = self.geometry;
        for (n, entry) in L2Entry::all(&geometry, &bytes).enumerate() {
            if entry != L2Entry::default() {
                self.walk_l2_entry(
                    window,
                    report,
                    (index * geometry.l2_entries() + n as u64, entry),
                    active,
                    next_data,
                )?;
            }
        }
        Ok(())
    }

    fn walk_l2_entry(
        &mut self,
        window: &mut Window,
        report: &mut CheckReport,
        (cluster, entry): (u64, L2Entry),
        active: bool,
        next_data: &mut u64,
    ) -> Result<()> {
        let size = self.geometry.cluster();
        let mapping = match entry.decode(&self.geometry) {
            Ok(mapping) => mapping,
            Err(error) => {
                self.once(report, || format!("guest cluster {cluster:#x}: {error}"));
                return Ok(());
            }
        };
        let (host, len, copied) = match (mapping, mapping.host()) {
            (Mapping::Compressed { host, stored }, _) => {
                if entry.word & COPIED != 0 && active {
                    self.once(report, || {
                        format!("guest cluster {cluster:#x}: compressed and marked as copied")
                    });
                }
                (host.0, stored, None)
            }
            (_, Some((host, copied))) => (host.0, size, Some(copied)),
            (_, None) => return Ok(()),
        };
        if active && self.first_pass {
            report.allocated_clusters += 1;
            report.compressed_clusters += u64::from(copied.is_none());
            report.fragmented_clusters +=
                u64::from(copied.is_none() || (*next_data != 0 && *next_data != host));
            *next_data = host + size;
        }
        if self.geometry.external_data() {
            return Ok(());
        }
        // A compressed cluster's last sector may lie behind the end of the file.
        let len = if copied.is_none() {
            len.min(self.file_len.saturating_sub(host).max(1))
        } else {
            len
        };
        self.count(window, report, "data cluster", host, len);
        if let (true, true, Some(copied)) = (active, self.first_pass, copied) {
            self.check_copied(report, host, copied, || {
                format!("guest cluster {cluster:#x}")
            })?;
        }
        Ok(())
    }

    /// The COPIED flag says that the refcount is one, no more and no less.
    fn check_copied(
        &mut self,
        report: &mut CheckReport,
        offset: u64,
        copied: bool,
        what: impl FnOnce() -> String,
    ) -> Result<()> {
        if self.without_refcounts {
            return Ok(());
        }
        let count = self.refcount(offset >> self.geometry.cluster_bits)?;
        if (count == 1) != copied {
            report.stale_flags += 1;
            report.corrupt(|| {
                format!(
                    "{}: the COPIED flag is {copied}, but the refcount is {count}",
                    what()
                )
            });
        }
        Ok(())
    }

    /// A flag on a cluster that is used more than once is not merely stale.
    fn dangerous_flags(&mut self, window: &Window, report: &mut CheckReport) -> Result<()> {
        let geometry = self.geometry;
        let shared = |offset: u64| {
            window
                .counts
                .get((offset >> geometry.cluster_bits) as usize)
                .is_some_and(|count| *count > 1)
        };
        let mut tables = Vec::new();
        let mut dangerous = 0;
        self.table(
            self.header.l1_offset,
            u64::from(self.header.l1_entries),
            |_, entry| {
                if let Ok(Some(table)) = decode_l1(&geometry, entry) {
                    dangerous += u64::from(table.copied && shared(table.offset.0));
                    tables.push((table.offset.0, table.copied));
                }
                Ok(())
            },
        )?;
        for (offset, own) in tables {
            let mut bytes = vec![0u8; geometry.cluster() as usize];
            self.file.read_at(&mut bytes, offset)?;
            for entry in L2Entry::all(&geometry, &bytes) {
                let host = entry
                    .decode(&geometry)
                    .ok()
                    .and_then(|mapping| mapping.host());
                if let Some((host, true)) = host {
                    dangerous += u64::from(own && shared(host.0));
                }
            }
        }
        report.stale_flags = report.stale_flags.saturating_sub(dangerous);
        Ok(())
    }

    /// A cluster's refcount on disk.
    pub(crate) fn refcount(&mut self, cluster: u64) -> Result<u64> {
        let per_block = self.geometry.refblock_entries();
        let index = cluster / per_block;
        if self.current.0 != index && !self.load_block(index)? {
            return Ok(0);
        }
        Ok(refcount::get(
            &self.current.1,
            self.geometry.refcount_order,
            cluster % per_block,
        ))
    }

    /// Make refcount block `index` the current one; false if there is none.
    fn load_block(&mut self, index: u64) -> Result<bool> {
        let offset = self.reftable.get(index as usize).copied().unwrap_or(0);
        if offset == 0 || offset % self.geometry.cluster() != 0 {
            return Ok(false);
        }
        let (old, content) = std::mem::replace(&mut self.current, (u64::MAX, Vec::new()));
        if old != u64::MAX {
            if (self.blocks.len() + 2) << self.geometry.cluster_bits > BLOCK_CACHE {
                self.blocks.clear();
            }
            self.blocks.insert(old, content);
        }
        let block = match self.blocks.remove(&index) {
            Some(block) => block,
            None => {
                let mut block = vec![0u8; self.geometry.cluster() as usize];
                self.file.read_at(&mut block, offset)?;
                block
            }
        };
        self.current = (index, block);
        Ok(true)
    }

    fn walk_snapshots(&mut self, window: &mut Window, report: &mut CheckReport) -> Result<()> {
        if self.header.snapshots == 0 {
            return Ok(());
        }
        let (snapshots, len) = match snapshot::read_table(self.file, &self.header) {
            Ok(table) => table,
            Err(error) => {
                self.once(report, || format!("snapshot table: {error}"));
                return Ok(());
            }
        };
        self.count(
            window,
            report,
            "snapshot table",
            self.header.snapshots_offset,
            len,
        );
        for snapshot in snapshots {
            if snapshot.l1_offset % self.geometry.cluster() != 0 {
                self.once(report, || {
                    format!(
                        "snapshot {}: L1 table offset {:#x}",
                        snapshot.id, snapshot.l1_offset
                    )
                });
                continue;
            }
            self.walk_l1(
                window,
                report,
                snapshot.l1_offset,
                u64::from(snapshot.l1_entries),
                false,
            )?;
        }
        Ok(())
    }

    /// Bitmaps: the directory, each bitmap's table, and the clusters that it names.
    fn walk_bitmaps(&mut self, window: &mut Window, report: &mut CheckReport) -> Result<()> {
        // Without its autoclear bit the extension does not count, and what it names is a leak.
        let counts = self.header.autoclear & autoclear::BITMAPS != 0;
        let extension = self.header.extension(extension::BITMAPS);
        let Some(extension) = extension.filter(|_| counts) else {
            return Ok(());
        };
        let number = be32(extension, 0).unwrap_or(0);
        let (len, offset) = (
            be64(extension, 8).unwrap_or(0),
            be64(extension, 16).unwrap_or(0),
        );
        let cluster = self.geometry.cluster();
        if number > 65535
            || len > 64 << 20
            || offset % cluster != 0
            || offset.saturating_add(len) > self.file_len
        {
            self.once(report, || "the bitmap directory is impossible".to_owned());
            return Ok(());
        }
        self.count(window, report, "bitmap directory", offset, len);
        let mut at = 0;
        for _ in 0..number {
            let mut entry = [0u8; 24];
            if at + 24 > len {
                self.once(report, || "the bitmap directory is cut short".to_owned());
                return Ok(());
            }
            self.file.read_at(&mut entry, offset + at)?;
            let (table, entries) = (
                be64(&entry, 0).unwrap_or(0),
                u64::from(be32(&entry, 8).unwrap_or(0)),
            );
            let names =
                u64::from(be16(&entry, 18).unwrap_or(0)) + u64::from(be32(&entry, 20).unwrap_or(0));
            at += (24 + names).next_multiple_of(8);
            if table % cluster != 0
                || entries > 8 << 20
                || table.saturating_add(entries * 8) > self.file_len
            {
                self.once(report, || {
                    format!("a bitmap's table at {table:#x} is impossible")
                });
                continue;
            }
            self.count(window, report, "bitmap table", table, entries * 8);
            let mut clusters = Vec::new();
            self.table(table, entries, |_, entry| {
                let data = entry & 0x00ff_ffff_ffff_fe00;
                if data != 0 {
                    clusters.push(data);
                }
                Ok(())
            })?;
            for data in clusters {
                self.count(window, report, "bitmap data", data, cluster);
            }
        }
        Ok(())
    }

    /// Compare a window's counts with the refcounts on disk.
    fn compare(&mut self, window: &Window, report: &mut CheckReport) -> Result<()> {
        for (n, used) in window.counts.iter().enumerate() {
            let cluster = window.first + n as u64;
            let counted = self.refcount(cluster)?;
            let used = u64::from(*used);
            if used > 0 || counted > 0 {
                self.highest = self.highest.max(cluster);
            }
            if counted == used || (used == u64::from(u16::MAX) && counted > used) {
                continue;
            }
            if counted > used {
                report.leaks += 1;
                report.say(|| {
                    format!("leaked cluster {cluster:#x}: refcount {counted}, used {used} times")
                });
            } else {
                report.corrupt(|| {
                    format!("cluster {cluster:#x}: refcount {counted}, used {used} times")
                });
            }
        }
        Ok(())
    }
}

/// As refcount::read_table, but impossible entries are kept, to be reported.
fn read_reftable(file: &BlockFile, header: &Header) -> Result<Vec<u64>> {
    let mut raw = vec![0u8; (u64::from(header.reftable_clusters) << header.cluster_bits) as usize];
    file.read_at(&mut raw, header.reftable_offset)?;
    Ok(raw
        .chunks_exact(8)
        .map(|bytes| be64(bytes, 0).unwrap_or(0) & refcount::OFFSET)
        .collect())
}
