// SPDX-License-Identifier: Apache-2.0
//! Repairing what a check found.
//!
//! Leaks: the counts are lowered in place. Corruptions of the refcounts: a whole new refcount
//! structure is laid out behind the end of the image and the header switched to it, in one sector;
//! the old one is never trusted and never written, and the image is as it was until the switch.
//! Then the COPIED flags are set right, and the dirty and corrupt bits cleared. Pointers that lead
//! nowhere are not repaired: nobody knows where they should lead.

use crate::bytes::{be64, put32, put64};
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::qcow2::check::{CheckReport, Checker, Repair, Window};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED};
use crate::qcow2::header::{autoclear, extension, field, incompatible, Header};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::refcount;

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
        rebuild(file, checker)?;
    } else if report.leaks > 0 {
        forget_bitmaps(file, checker)?;
        lower(file, checker)?;
    } else {
        return Ok(());
    }
    let mut after = Checker::new(file)?;
    let again = after.recheck()?;
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
    let window = whole(checker)?;
    let per_block = geometry.refblock_entries();
    for (index, offset) in checker.reftable.iter().enumerate() {
        if *offset == 0 || *offset % geometry.cluster() != 0 {
            continue;
        }
        let mut block = vec![0u8; geometry.cluster() as usize];
        file.read_at(&mut block, *offset)?;
        let mut changed = false;
        for n in 0..per_block {
            let used = used(&window, index as u64 * per_block + n);
            if refcount::get(&block, geometry.refcount_order, n) > used
                && used < u64::from(u16::MAX)
            {
                refcount::set(&mut block, geometry.refcount_order, n, used);
                changed = true;
            }
        }
        if changed {
            file.write_at(&block, *offset)?;
        }
    }
    file.sync()?;
    fix_copied(file, checker, &window)
}

/// A new refcount structure behind the end.
fn rebuild(file: &BlockFile, checker: &mut Checker) -> Result<()> {
    checker.without_refcounts = true;
    let mut window = whole(checker)?;
    let geometry = checker.geometry;
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
    window.counts.resize(end as usize, 0);
    window
        .counts
        .iter_mut()
        .skip(start as usize)
        .for_each(|count| *count = 1);
    let mut entries = vec![0u8; (table * cluster) as usize];
    for index in 0..blocks {
        let mut block = vec![0u8; cluster as usize];
        for n in 0..per_block {
            let used = used(&window, index * per_block + n);
            if used > geometry.max_refcount() {
                return Err(Error::unsupported(
                    "a cluster is used more often than the refcount width can count",
                ));
            }
            refcount::set(&mut block, geometry.refcount_order, n, used);
        }
        let offset = (start + index) * cluster;
        file.write_at(&block, offset)?;
        put64(&mut entries, (index * 8) as usize, offset);
    }
    file.write_at(&entries, (start + blocks) * cluster)?;
    file.sync()?;
    let mut first = [0u8; 512];
    file.read_at(&mut first, 0)?;
    put64(
        &mut first,
        field::REFTABLE_OFFSET,
        (start + blocks) * cluster,
    );
    put32(&mut first, field::REFTABLE_CLUSTERS, table as u32);
    file.write_at(&first, 0)?;
    file.sync()?;
    fix_copied(file, checker, &window)
}

/// Set the COPIED flags of the active tables by the counts.
fn fix_copied(file: &BlockFile, checker: &Checker, window: &Window) -> Result<()> {
    let geometry = checker.geometry;
    let once = |offset: u64| used(window, offset >> geometry.cluster_bits) == 1;
    let flag = |entry: u64, on: bool| if on { entry | COPIED } else { entry & !COPIED };
    let l1_len = u64::from(checker.header.l1_entries) * 8;
    if checker.header.l1_offset.saturating_add(l1_len) > checker.file_len {
        // A table that is not in the file has no flags to set; writing it would make the file that large.
        return Ok(());
    }
    let mut l1 = vec![0u8; checker.header.l1_entries as usize * 8];
    file.read_at(&mut l1, checker.header.l1_offset)?;
    let l1_before = l1.clone();
    for index in 0..checker.header.l1_entries as usize {
        let entry = be64(&l1, index * 8).unwrap_or(0);
        let Ok(Some(table)) = decode_l1(&geometry, entry) else {
            continue;
        };
        if table.offset.0.saturating_add(geometry.cluster()) > checker.file_len {
            continue;
        }
        put64(&mut l1, index * 8, flag(entry, once(table.offset.0)));
        let mut l2 = vec![0u8; geometry.cluster() as usize];
        file.read_at(&mut l2, table.offset.0)?;
        let before = l2.clone();
        for (n, entry) in L2Entry::all(&geometry, &before).enumerate() {
            let right = match entry.decode(&geometry) {
                Ok(Mapping::Compressed { .. }) => flag(entry.word, false),
                Ok(mapping) => match mapping.host() {
                    Some((host, _)) if !geometry.external_data() => flag(entry.word, once(host.0)),
                    _ => entry.word,
                },
                Err(_) => entry.word,
            };
            put64(&mut l2, n * geometry.l2_entry_size() as usize, right);
        }
        if l2 != before {
            file.write_at(&l2, table.offset.0)?;
        }
    }
    if l1 != l1_before {
        file.write_at(&l1, checker.header.l1_offset)?;
    }
    file.sync()
}

/// The use of every cluster at once: repair wants all of it in memory.
fn whole(checker: &mut Checker) -> Result<Window> {
    let clusters = checker.clusters();
    if clusters > 32 << 20 {
        return Err(Error::unsupported(
            "repairing an image of more than 32 Mi clusters",
        ));
    }
    checker.window(0, clusters, &mut CheckReport::default())
}

fn used(window: &Window, cluster: u64) -> u64 {
    window
        .counts
        .get(cluster as usize)
        .copied()
        .map_or(0, u64::from)
}

fn write_field(file: &BlockFile, at: usize, value: u64) -> Result<()> {
    let mut first = [0u8; 512];
    file.read_at(&mut first, 0)?;
    put64(&mut first, at, value);
    file.write_at(&first, 0)
}
