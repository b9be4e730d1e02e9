// SPDX-License-Identifier: Apache-2.0
//! Checking an image: every pointer in its tables is counted and compared with the refcounts.
//!
//! The walk (walk.rs) goes over header, L1 and L2 tables, snapshots, bitmaps and the refcount structure
//! itself. Counts are kept for a window of clusters at a time (counts.rs), so memory stays within 64 MiB,
//! or what the caller allows, whatever size the image claims; a larger image is walked once a window.
//! Nothing is written here except by repair.rs.
//!
//! What is wrong is one of two things, as in qemu-img: a *leak* (counted more often than used: space is
//! lost, nothing else) or a *corruption* (counted less often than used, a pointer that leads nowhere, or
//! a COPIED flag that does not fit the count). Findings are counted without limit and described up to a
//! number.

use std::collections::HashMap;
use std::fs::File;

use crate::bytes::be64;
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::locks::{self, Use};
use crate::qcow2::counts::{self, Window, FLAGGED, UNFLAGGED};
use crate::qcow2::header::Header;
use crate::qcow2::{refcount, Geometry};

/// What a check may hold unless the caller says otherwise, in bytes.
pub const CHECK_MEMORY: usize = 64 << 20;
/// Of that, what is not for counts: the refcount table, the L2 tables known, blocks.
const OTHER: usize = 28 << 20;
/// The fewest clusters counted in one pass.
const LEAST: u64 = 1 << 19;
/// Findings that are described.
const MESSAGES: usize = 200;
/// Refcount blocks held at once, in bytes.
const BLOCK_CACHE: usize = 4 << 20;

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
    pub(crate) fn corrupt(&mut self, message: impl FnOnce() -> String) {
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
    check_within(file, repair, lock, CHECK_MEMORY)
}

/// As [`check`], holding about `memory` bytes at most (at least 29 MiB are taken). With less of it the
/// tables of a large image are read more often.
pub fn check_within(file: &File, repair: Repair, lock: bool, memory: usize) -> Result<CheckReport> {
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
    let report = Checker::new(&file, memory).and_then(|mut checker| {
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
    let mut checker = Checker::new(file, CHECK_MEMORY)?;
    let mut report = checker.run()?;
    crate::qcow2::repair::repair(file, &mut checker, &mut report, Repair::All)?;
    if report.corruptions > 0 {
        let message = "the image was not closed, and repairing it leaves corruptions: see check";
        return Err(Error::invalid(message));
    }
    Ok(())
}

/// The check of one image.
pub(crate) struct Checker<'a> {
    pub(crate) file: &'a BlockFile,
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    pub(crate) file_len: u64,
    pub(crate) memory: usize,
    pub(crate) reftable: Vec<u64>,
    blocks: HashMap<u64, Vec<u8>>,
    /// The block used last, out of `blocks`: neighbours' counts stand together.
    current: (u64, Vec<u8>),
    /// Leave out the refcount structure (repair makes a new one).
    pub(crate) without_refcounts: bool,
    pub(crate) first_pass: bool,
    highest: u64,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(file: &'a BlockFile, memory: usize) -> Result<Checker<'a>> {
        let header = Header::read(file)?;
        // Only whether the data is elsewhere matters here, not where.
        let geometry = Geometry::of(&header);
        let reftable = read_reftable(file, &header)?;
        Ok(Checker {
            file,
            file_len: file.len()?,
            header,
            geometry,
            memory,
            reftable,
            blocks: HashMap::new(),
            current: (u64::MAX, Vec::new()),
            without_refcounts: false,
            first_pass: true,
            highest: 0,
        })
    }

    pub(crate) fn run(&mut self) -> Result<CheckReport> {
        let mut report = CheckReport {
            total_clusters: self.header.size.div_ceil(self.geometry.cluster()),
            ..CheckReport::default()
        };
        let clusters = self.clusters();
        let step = self.window_len();
        let mut first = 0;
        while first < clusters.max(1) {
            let window = self.window(first, step.min(clusters - first), &mut report)?;
            self.compare(&window, &mut report)?;
            self.first_pass = false;
            first += step;
        }
        report.image_end = (self.highest + 1) << self.geometry.cluster_bits;
        Ok(report)
    }

    /// Clusters that are counted in one pass: whole refcount blocks.
    pub(crate) fn window_len(&self) -> u64 {
        let per_block = self.geometry.refblock_entries();
        let wanted = (self.memory.saturating_sub(OTHER) as u64 / 2).max(LEAST);
        (wanted / per_block).max(1) * per_block
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

    /// Compare a window's counts with the refcounts on disk, a refcount block at a time.
    fn compare(&mut self, window: &Window, report: &mut CheckReport) -> Result<()> {
        let per_block = self.geometry.refblock_entries();
        let all = window.clusters();
        let mut start = all.start;
        while start < all.end {
            let end = (start / per_block + 1)
                .saturating_mul(per_block)
                .min(all.end);
            let counted = self.load_block(start / per_block)?;
            let cells = window.cells(start..end);
            if counted || cells.iter().any(|cell| *cell != 0) {
                self.compare_block(window, start, cells, counted, report);
            }
            start = end;
        }
        Ok(())
    }

    fn compare_block(
        &mut self,
        window: &Window,
        first: u64,
        cells: &[u16],
        counted: bool,
        report: &mut CheckReport,
    ) {
        let block = if counted { &self.current.1[..] } else { &[] };
        let order = self.geometry.refcount_order;
        let mut words = block.chunks_exact(2);
        for (n, cell) in cells.iter().enumerate() {
            // Two bytes are what nearly all images have.
            let stored = if order == 4 {
                let word = words.next().and_then(|word| word.try_into().ok());
                u64::from(word.map_or(0, u16::from_be_bytes))
            } else {
                refcount::get(block, order, n as u64)
            };
            if *cell == 0 && stored == 0 {
                continue;
            }
            let cluster = first + n as u64;
            self.highest = self.highest.max(cluster);
            let flags = cell & (FLAGGED | UNFLAGGED);
            let right = match flags {
                0 => true,
                FLAGGED => stored == 1,
                UNFLAGGED => stored != 1,
                _ => false,
            };
            if counts::count(*cell) == Some(stored) && right {
                continue;
            }
            let used = window.used(cluster);
            compare_counts(report, cluster, stored, used);
            if !right && !self.without_refcounts {
                // A flag on a cluster that is used more than once is not merely stale.
                let shared = used.is_none_or(|used| used > 1);
                report.stale_flags += u64::from(!(flags & FLAGGED != 0 && shared));
                report.corrupt(|| {
                    let flagged = match flags {
                        FLAGGED => "set",
                        UNFLAGGED => "not set",
                        _ => "set in one place only",
                    };
                    format!("cluster {cluster:#x}: the COPIED flag is {flagged}, but the refcount is {stored}")
                });
            }
        }
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
}

fn compare_counts(report: &mut CheckReport, cluster: u64, stored: u64, used: Option<u64>) {
    match used {
        Some(used) if stored > used => {
            report.leaks += 1;
            report.say(|| format!("Leaked cluster {cluster} refcount={stored} reference={used}"));
        }
        Some(used) if stored < used => {
            report.corrupt(|| format!("cluster {cluster:#x}: refcount {stored}, used {used} times"))
        }
        // Used more often than could be counted.
        None if stored < 1 << 14 => {
            report.corrupt(|| format!("cluster {cluster:#x}: refcount {stored}, used more often"))
        }
        _ => {}
    }
}

/// As refcount::read_table, but impossible entries are kept, to be reported.
fn read_reftable(file: &BlockFile, header: &Header) -> Result<Vec<u64>> {
    const PIECE: u64 = 1 << 20;
    let len = u64::from(header.reftable_clusters) << header.cluster_bits;
    let mut table = Vec::with_capacity((len / 8) as usize);
    let mut piece = vec![0u8; len.min(PIECE) as usize];
    for at in (0..len).step_by(PIECE as usize) {
        let now = piece.get_mut(..(len - at).min(PIECE) as usize);
        let now = now.unwrap_or(&mut []);
        file.read_at(now, header.reftable_offset.saturating_add(at))?;
        let entries = now.chunks_exact(8);
        table.extend(entries.map(|entry| be64(entry, 0).unwrap_or(0) & refcount::OFFSET));
    }
    Ok(table)
}
