// SPDX-License-Identifier: Apache-2.0
//! Repairing what a check found.
//!
//! Leaks: the counts are lowered in place. Corruptions of the refcounts: a whole new refcount
//! structure is laid out behind the end of the image and the header switched to it, in one sector;
//! the old one is never trusted and never written, and the image is as it was until the switch.
//! Then the COPIED flags are set right, and the dirty and corrupt bits cleared. Pointers that lead
//! nowhere are not repaired: nobody knows where they should lead.
//!
//! All of it goes by windows of clusters, as the check does, and holds no more.

use crate::bytes::{be64, put32, put64};
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::qcow2::check::{CheckReport, Checker, Repair};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED};
use crate::qcow2::header::{autoclear, extension, field, incompatible, Header};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::{refcount, Geometry};

/// Repair as asked; the report then counts what was fixed, and what is left.
pub(crate) fn repair(
    file: &BlockFile,
    checker: &mut Checker,
    report: &mut CheckReport,
    how: Repair,
) -> Result<()> {
    let unclean = checker.header.incompatible & (incompatible::DIRTY | incompatible::CORRUPT) != 0;
    if how == Repair::All && (report.corruptions > 0 || unclean) {
        forget_bitmaps(file, checker)?;
        rebuild(file, checker, checker.header.refcount_order)?;
    } else if report.leaks > 0 {
        forget_bitmaps(file, checker)?;
        lower(file, checker)?;
    } else {
        return Ok(());
    }
    let again = Checker::new(file, checker.memory)?.run()?;
    report.corruptions_fixed = report.corruptions.saturating_sub(again.corruptions);
    report.leaks_fixed = report.leaks.saturating_sub(again.leaks);
    report.corruptions = again.corruptions;
    report.leaks = again.leaks;
    report.image_end = again.image_end;
    if how == Repair::All && unclean && again.corruptions == 0 {
        let mut header = Header::read(file)?;
        header.incompatible &= !(incompatible::DIRTY | incompatible::CORRUPT);
        write_field(file, field::INCOMPATIBLE, header.incompatible)?;
        file.sync()?;
    }
    Ok(())
}

/// Take a bitmap extension that does not count out of the header: what it names is about to be freed.
fn forget_bitmaps(file: &BlockFile, checker: &mut Checker) -> Result<()> {
    let header = &mut checker.header;
    let counts = header.autoclear & autoclear::BITMAPS != 0;
    if counts || header.extension(extension::BITMAPS).is_none() {
        return Ok(());
    }
    header
        .extensions
        .retain(|known| known.kind != extension::BITMAPS);
    let mut first = header.serialize_short()?;
    first.resize(first.len().next_multiple_of(512), 0);
    file.write_at(&first, 0)?;
    file.sync()
}

/// Lower every count that is higher than the use.
fn lower(file: &BlockFile, checker: &mut Checker) -> Result<()> {
    let geometry = checker.geometry;
    let per_block = geometry.refblock_entries();
    let (clusters, step) = (checker.clusters(), checker.window_len());
    for first in (0..clusters).step_by(step as usize) {
        let len = step.min(clusters - first);
        let window = checker.window(first, len, &mut CheckReport::default())?;
        for index in first / per_block..(first + len).div_ceil(per_block) {
            let offset = checker.reftable.get(index as usize).copied().unwrap_or(0);
            // A block behind the file's end counts nothing; one that the end cuts may, and is written whole.
            let outside = offset >= checker.file_len;
            if offset == 0 || offset % geometry.cluster() != 0 || outside {
                continue;
            }
            let mut block = vec![0u8; geometry.cluster() as usize];
            file.read_at(&mut block, offset)?;
            let mut changed = false;
            for n in 0..per_block {
                let used = window.used(index * per_block + n);
                let stored = refcount::get(&block, geometry.refcount_order, n);
                if let Some(used) = used.filter(|used| stored > *used) {
                    refcount::set(&mut block, geometry.refcount_order, n, used);
                    changed = true;
                }
            }
            if changed {
                file.write_at(&block, offset)?;
            }
        }
    }
    file.sync()?;
    fix_copied(file, checker.memory)
}

/// A new refcount structure behind the end, with counts of 2^`order` bits.
pub(crate) fn rebuild(file: &BlockFile, checker: &mut Checker, order: u32) -> Result<()> {
    let laid_out = lay_out(file, checker, order);
    if laid_out.is_err() && file.regular {
        // What was written behind the end is nobody's.
        let _ = file.set_len(checker.file_len);
    }
    let (table, clusters) = laid_out?;
    let mut first = [0u8; 512];
    file.read_at(&mut first, 0)?;
    put64(&mut first, field::REFTABLE_OFFSET, table);
    put32(&mut first, field::REFTABLE_CLUSTERS, clusters as u32);
    if checker.header.version >= 3 {
        put32(&mut first, field::REFCOUNT_ORDER, order);
    }
    file.write_at(&first, 0)?;
    file.sync()?;
    fix_copied(file, checker.memory)
}

/// Write refcount blocks and a table to which nothing points yet; gives the table's offset and clusters.
fn lay_out(file: &BlockFile, checker: &mut Checker, order: u32) -> Result<(u64, u64)> {
    checker.without_refcounts = true;
    let geometry = Geometry {
        refcount_order: order,
        ..checker.geometry
    };
    let (cluster, per_block) = (geometry.cluster(), geometry.refblock_entries());
    let start = checker.file_len.div_ceil(cluster);
    let (mut blocks, mut table) = (1, 1);
    loop {
        let end = start + blocks + table;
        let (more_blocks, more_table) = (
            end.div_ceil(per_block),
            (end.div_ceil(per_block) * 8).div_ceil(cluster),
        );
        if (more_blocks, more_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (more_blocks, more_table);
    }
    if table * cluster > (8 << 20).max(cluster) {
        return Err(Error::unsupported(
            "rebuilding the refcounts of an image this large",
        ));
    }
    let end = start + blocks + table;
    let mut entries = vec![0u8; (table * cluster) as usize];
    // Whole blocks of the new width.
    let step = (checker.window_len() / per_block).max(1) * per_block;
    for first in (0..end).step_by(step as usize) {
        let len = step.min(end - first);
        let window = checker.window(first, len, &mut CheckReport::default())?;
        for index in first / per_block..(first + len).div_ceil(per_block) {
            let mut block = vec![0u8; cluster as usize];
            for n in 0..per_block {
                let place = index * per_block + n;
                let used = if (start..end).contains(&place) {
                    Some(1)
                } else {
                    window.used(place)
                };
                let used = used.filter(|used| *used <= geometry.max_refcount());
                let used = used.ok_or_else(|| {
                    Error::unsupported(
                        "a cluster is used more often than the refcount width can count",
                    )
                })?;
                refcount::set(&mut block, geometry.refcount_order, n, used);
            }
            let offset = (start + index) * cluster;
            file.write_at(&block, offset)?;
            put64(&mut entries, (index * 8) as usize, offset);
        }
    }
    file.write_at(&entries, (start + blocks) * cluster)?;
    file.sync()?;
    Ok(((start + blocks) * cluster, table))
}

/// Set the COPIED flags of the active tables by the counts, which are right now.
fn fix_copied(file: &BlockFile, memory: usize) -> Result<()> {
    let mut checker = Checker::new(file, memory)?;
    let geometry = checker.geometry;
    let flag = |entry: u64, on: bool| if on { entry | COPIED } else { entry & !COPIED };
    // What is not in the file has no flags to set, and writing it would make the file that large.
    let in_file = checker.file_len.saturating_sub(checker.header.l1_offset);
    let entries = u64::from(checker.header.l1_entries).min(in_file.div_ceil(8));
    const PIECE: u64 = 8192;
    for at in (0..entries).step_by(PIECE as usize) {
        let place = checker.header.l1_offset + at * 8;
        let mut l1 = vec![0u8; ((entries - at).min(PIECE) * 8) as usize];
        file.read_at(&mut l1, place)?;
        let before = l1.clone();
        for index in 0..l1.len() / 8 {
            let entry = be64(&l1, index * 8).unwrap_or(0);
            let Ok(Some(table)) = decode_l1(&geometry, entry) else {
                continue;
            };
            if table.offset.0 >= checker.file_len {
                continue;
            }
            let once = checker.refcount(table.offset.0 >> geometry.cluster_bits)? == 1;
            put64(&mut l1, index * 8, flag(entry, once));
            fix_l2(file, &mut checker, table.offset.0)?;
        }
        if l1 != before {
            file.write_at(&l1, place)?;
        }
    }
    file.sync()
}

fn fix_l2(file: &BlockFile, checker: &mut Checker, offset: u64) -> Result<()> {
    let geometry = checker.geometry;
    let flag = |entry: u64, on: bool| if on { entry | COPIED } else { entry & !COPIED };
    let mut l2 = vec![0u8; geometry.cluster() as usize];
    file.read_at(&mut l2, offset)?;
    let before = l2.clone();
    for (n, entry) in L2Entry::all(&geometry, &before).enumerate() {
        let right = match entry.decode(&geometry) {
            Ok(Mapping::Compressed { .. }) => flag(entry.word, false),
            Ok(mapping) => match mapping.host() {
                Some((host, _)) if !geometry.external_data() => {
                    let once = checker.refcount(host.0 >> geometry.cluster_bits)? == 1;
                    flag(entry.word, once)
                }
                _ => entry.word,
            },
            Err(_) => entry.word,
        };
        put64(&mut l2, n * geometry.l2_entry_size() as usize, right);
    }
    if l2 != before {
        file.write_at(&l2, offset)?;
    }
    Ok(())
}

fn write_field(file: &BlockFile, at: usize, value: u64) -> Result<()> {
    let mut first = [0u8; 512];
    file.read_at(&mut first, 0)?;
    put64(&mut first, at, value);
    file.write_at(&first, 0)
}
