// SPDX-License-Identifier: Apache-2.0
//! Comparing whole disks, on all cores, and looking for what is not zero.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::disk::Disk;
use crate::error::Result;
use crate::image::Image;
use crate::map::{range_at, step};
use crate::pieces::{hole_at, through, Piece, Pieces, Progress, PIECE};

/// The first byte in which the disks differ, within the smaller one's size; None if none does.
pub fn compare(
    left: &Arc<Image>,
    right: &Arc<Image>,
    threads: usize,
    progress: &Progress,
) -> Result<Option<u64>> {
    let first = AtomicU64::new(u64::MAX);
    let work = Pieces {
        size: left.size().min(right.size()),
        piece: PIECE,
        threads,
        rate: 0,
    };
    let hole = |at| Ok(hole_at(left, at, None)?.min(hole_at(right, at, None)?));
    work.on_threads(progress, hole, || {
        let (mut one, mut other) = (through(left)?, through(right)?);
        let first = &first;
        Ok(move |piece: Piece| {
            if !piece.hole {
                let found = difference(&mut one, &mut other, piece.start, piece.len)?;
                first.fetch_min(found.unwrap_or(u64::MAX), Ordering::SeqCst);
            }
            // Pieces before this one are being looked at by others; none behind it matters.
            Ok(first.load(Ordering::SeqCst) > piece.start)
        })
    })?;
    Ok(Some(first.load(Ordering::SeqCst)).filter(|at| *at != u64::MAX))
}

/// Whether a range of an image holds anything but zeros; gives the first such byte.
pub fn first_nonzero(image: &Arc<Image>, start: u64, end: u64) -> Result<Option<u64>> {
    let mut disk = Disk::new(image.clone())?;
    let mut at = start;
    let mut buffer = Vec::new();
    while at < end {
        let range = step(image, at, end)?;
        if !range.zero {
            buffer.resize(range.len as usize, 0);
            disk.read(at, &mut buffer)?;
            if let Some(found) = buffer.iter().position(|byte| *byte != 0) {
                return Ok(Some(at + found as u64));
            }
        }
        at += range.len;
    }
    Ok(None)
}

fn difference(one: &mut Disk, other: &mut Disk, at: u64, len: u64) -> Result<Option<u64>> {
    let zero =
        |disk: &Disk| range_at(disk.image(), at, len).map(|range| range.zero && range.len >= len);
    if zero(one)? && zero(other)? {
        return Ok(None);
    }
    let (mut left, mut right) = (vec![0; len as usize], vec![0; len as usize]);
    one.read(at, &mut left)?;
    other.read(at, &mut right)?;
    if left == right {
        return Ok(None);
    }
    let found = left
        .iter()
        .zip(&right)
        .position(|(a, b)| a != b)
        .unwrap_or(0);
    Ok(Some(at + found as u64))
}
