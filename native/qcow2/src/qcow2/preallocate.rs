// SPDX-License-Identifier: Apache-2.0
//! Clusters for a range of the disk before anything is written to it: `metadata` maps them, `falloc` has the
//! host keep their space, `full` writes zeros into it.
//!
//! What has a cluster already is left alone, so a disk that grows gets them for its new end only. In an encrypted
//! image the new ones are zero clusters that keep their place: what was never written is not zeros once
//! it is decrypted.

use crate::blocking::{run, settle};
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::plan::{WriteStep, ZeroStep};
use crate::qcow2::create::Preallocation;
use crate::qcow2::resize::write_zeros;
use crate::qcow2::zero::Zeroing;

/// Allocate every cluster from byte `start` of the disk to its end. `lengths` are those that the chain's files had
/// before: up to there nothing is changed in them but what a cluster is reused for.
pub(crate) fn preallocate(
    image: &Image,
    lengths: &[u64],
    start: u64,
    how: Preallocation,
    encrypted: bool,
) -> Result<()> {
    if how == Preallocation::Off {
        return Ok(());
    }
    let mut at = start;
    while at < image.size() {
        let rest = image.size() - at;
        let step = run(image, |state, waiter| {
            state.plan_write(image.files(), at, rest, false, waiter)
        })?;
        // A fresh cluster is mapped already, and reads as zeros; others are written with zeros.
        if let WriteStep::Allocate(_) = &step {
            write_zeros(image, &step)?;
        }
        if encrypted {
            keep_as_zeros(image, at, step.len())?;
        }
        at += step.len();
    }
    settle(image)?;
    for (number, file) in image.files().iter().enumerate() {
        if file.regular && file.writable {
            let from = lengths.get(number).copied().unwrap_or(0);
            reserve(file, from, how)?;
        }
    }
    Ok(())
}

/// Let the host keep space for a file's bytes from `from` to its end.
pub(crate) fn reserve(file: &BlockFile, from: u64, how: Preallocation) -> Result<()> {
    let len = file.len()?;
    if from >= len {
        return Ok(());
    }
    match how {
        Preallocation::Falloc => file.fallocate(0, from, len - from),
        Preallocation::Full => write_zeros_into_holes(file, from, len),
        Preallocation::Off | Preallocation::Metadata => Ok(()),
    }
}

fn keep_as_zeros(image: &Image, mut at: u64, len: u64) -> Result<()> {
    let how = Zeroing {
        required: true,
        unmap: false,
    };
    let end = at + len;
    while at < end {
        let step = run(image, |state, waiter| {
            state.plan_zero(image.files(), at, end - at, how, waiter)
        })?;
        match step {
            ZeroStep::Done { len } => at += len,
            ZeroStep::Write { .. } | ZeroStep::Fallocate { .. } => {
                return Err(Error::unsupported(
                    "preallocation cannot keep clusters as zeros",
                ))
            }
        }
    }
    Ok(())
}

fn write_zeros_into_holes(file: &BlockFile, from: u64, len: u64) -> Result<()> {
    let zeros = vec![0u8; 1 << 20];
    let mut at = from;
    while at < len {
        let (data, end) = file.next_data(at, len).unwrap_or((len, len));
        while at < data {
            let step = (data - at).min(zeros.len() as u64);
            file.write_at(zeros.get(..step as usize).unwrap_or(&[]), at)?;
            at += step;
        }
        at = end.max(at);
    }
    Ok(())
}
