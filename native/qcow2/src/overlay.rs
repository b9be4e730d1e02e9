// SPDX-License-Identifier: Apache-2.0
//! The two operations between an overlay and what lies below it: commit and rebase.
//!
//! What is seen through the overlay is the same before, within and after them, wherever they end:
//!
//! | operation | step                                     | seen through the overlay then                       |
//! |-----------|------------------------------------------|-----------------------------------------------------|
//! | commit    | the image below grows, where it is shorter | what is new there reads as zeros, as nothing did  |
//! |           | the overlay's clusters are written below | its own clusters still come first                   |
//! |           | all of that is durable                   | the same                                            |
//! |           | the overlay is emptied, cluster by cluster | the same bytes, from below                        |
//! | rebase    | what differs is written into the overlay | the same bytes, its own now                         |
//! |           | all of that is durable                   | the same                                            |
//! |           | the header names the other image (`set_backing`, one sector) | the same: the rest is equal there |
//!
//! Running one again that was cut short completes it. The image below a commit may be partly changed by then:
//! who reads it by itself, or through another overlay, sees that.

use std::sync::Arc;

use crate::compress::Packer;
use crate::copy::{copy, is_zero, write_packed, CopyOptions};
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::map::range_at;
use crate::pieces::{hole_at, through, Piece, Pieces, Progress};
use crate::qcow2::resize::resize;
use crate::state::Layer;

const PIECE: u64 = 2 << 20;
/// What is compared, and copied if it differs; a whole cluster when it is compressed.
const UNIT: u64 = 65536;

/// Let `target`, which is layer `depth` of the overlay's chain with those below it, hold all that the layers above
/// it do. `options` say at which speed. The overlay is emptied by [`crate::empty`], opened for writing.
pub fn commit_into(
    overlay: &Arc<Image>,
    target: &Arc<Image>,
    depth: usize,
    options: &CopyOptions,
    progress: &Progress,
) -> Result<()> {
    if overlay.size() > target.size() {
        resize(target, overlay.size(), false)?;
    }
    let options = CopyOptions {
        above: Some(depth),
        target_is_zero: false,
        compress: false,
        ..options.clone()
    };
    copy(overlay, target, &options, progress).map(drop)
}

/// Let the overlay hold itself what reads otherwise in `new` (zeros, for none) than in what is below it now.
/// Afterwards its header may name `new` instead. `options` say whether what is copied gets compressed, and at which speed.
pub fn rebase(
    overlay: &Arc<Image>,
    new: Option<&Arc<Image>>,
    options: &CopyOptions,
    progress: &Progress,
) -> Result<()> {
    let compress = options.compress;
    overlay.writable()?;
    let (cluster, codec) = match overlay.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => (qcow2.geometry.cluster(), qcow2.geometry.codec),
        _ => {
            return Err(Error::new(
                Kind::NotSupported,
                "a raw image has no backing file",
            ))
        }
    };
    if compress && overlay.encrypted() {
        return Err(Error::new(
            Kind::NotSupported,
            "an encrypted image's clusters are not compressed",
        ));
    }
    let work = Pieces {
        size: overlay.size(),
        piece: PIECE,
        threads: options.threads,
        rate: options.rate,
    };
    // Where both read as zeros nothing is to be done, whoever says so.
    let hole = |at| {
        let below = match new {
            Some(new) if at < new.size() => hole_at(new, at, None)?,
            _ => u64::MAX,
        };
        Ok(below.min(hole_at(overlay, at, None)?))
    };
    work.on_threads(progress, hole, || {
        let mut worker = Worker {
            overlay: through(overlay)?,
            new: new.map(through).transpose()?,
            unit: if compress { cluster } else { UNIT },
            packer: compress.then(|| Packer::new(codec)).transpose()?,
        };
        Ok(move |piece: Piece| {
            if !piece.hole {
                worker.piece(piece.start, piece.len)?;
            }
            Ok(true)
        })
    })?;
    crate::blocking::commit(overlay)
}

struct Worker {
    overlay: Disk,
    new: Option<Disk>,
    unit: u64,
    packer: Option<Packer>,
}

impl Worker {
    fn piece(&mut self, start: u64, len: u64) -> Result<()> {
        let end = start + len;
        let mut at = start;
        while at < end {
            let range = range_at(self.overlay.image(), at, end - at)?;
            if !(range.present && range.depth == 0) {
                self.range(at, range.len)?;
            }
            at += range.len;
        }
        Ok(())
    }

    /// A range that the overlay does not hold itself.
    fn range(&mut self, start: u64, len: u64) -> Result<()> {
        let mut seen = vec![0; len as usize];
        self.overlay.read(start, &mut seen)?;
        let next = self.below(start, len)?;
        let mut at = start;
        while at < start + len {
            let step = (self.unit - at % self.unit).min(start + len - at);
            let within = (at - start) as usize..(at - start + step) as usize;
            let (now, then) = (seen.get(within.clone()), next.get(within));
            if let (Some(now), true) = (now, now != then) {
                self.write(at, now)?;
            }
            at += step;
        }
        Ok(())
    }

    /// What is there in the new backing file, which may be shorter.
    fn below(&mut self, start: u64, len: u64) -> Result<Vec<u8>> {
        let mut data = vec![0; len as usize];
        if let Some(new) = &mut self.new {
            let inside = new.image().size().saturating_sub(start).min(len) as usize;
            if let Some(part) = data.get_mut(..inside).filter(|part| !part.is_empty()) {
                new.read(start, part)?;
            }
        }
        Ok(data)
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        let unit = self.unit as usize;
        if let Some(packer) = &mut self.packer {
            let last = at + data.len() as u64 == self.overlay.image().size();
            let whole = at % self.unit == 0 && (data.len() == unit || last);
            if whole && !is_zero(data) {
                let mut padded = data.to_vec();
                padded.resize(unit, 0);
                if let Some(packed) = packer.pack(&padded) {
                    return write_packed(self.overlay.image(), at / self.unit, &packed);
                }
            }
        }
        // Zeros too are written: it is the old backing file that makes the range read as zeros, so that
        // zeroing it would do nothing.
        self.overlay.write(at, data)
    }
}
