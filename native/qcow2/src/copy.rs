// SPDX-License-Identifier: Apache-2.0
//! Copying whole disks, on all cores.
//!
//! Threads take the next piece each (pieces.rs), read what of it is data, leave out what is zeros, and write the rest.
//! Compressing threads do one cluster at a time.
//!
//! What goes through the host's page cache is moved by plain system calls, `STEP` bytes at a time, which stay in the
//! processor's cache between read and write: io_uring hands such writes to threads of its own, which then
//! contend for the file's lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::blocking::run;
use crate::compress::Packer;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::map::range_at;
use crate::pieces::{hole_at, through, Piece, Pieces, Progress, PIECE};
use crate::state::Layer;
use crate::types::GuestCluster;

/// Bytes moved at once through the page cache.
const STEP: u64 = 256 << 10;

/// How to copy.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Write compressed clusters (qcow2 only).
    pub compress: bool,
    /// Ranges of zeros of at least this many bytes are not written (a multiple of 512; 0: all is written).
    pub sparse: u64,
    /// The target reads as zeros where nothing was written.
    pub target_is_zero: bool,
    /// Leave alone what the source's first `above` layers do not have (the target has the same backing file).
    pub above: Option<usize>,
    /// Threads.
    pub threads: usize,
    /// Sectors that cannot be read become zeros instead of an error.
    pub salvage: bool,
    /// Bytes of the disk a second at most; 0 for as fast as it goes.
    pub rate: u64,
    /// The source's first byte goes to this byte of the target: for compressed copies the start of a cluster.
    pub shift: u64,
}

impl Default for CopyOptions {
    fn default() -> CopyOptions {
        let threads = std::thread::available_parallelism()
            .map_or(2, usize::from)
            .clamp(2, 16);
        CopyOptions {
            compress: false,
            sparse: 4096,
            target_is_zero: true,
            above: None,
            threads,
            salvage: false,
            rate: 0,
            shift: 0,
        }
    }
}

/// Make `target` hold what `source` holds. Both are active; the target is at least as large. Gives the bytes that
/// were salvaged as zeros.
pub fn copy(
    source: &Arc<Image>,
    target: &Arc<Image>,
    options: &CopyOptions,
    progress: &Progress,
) -> Result<u64> {
    if target.size().checked_sub(options.shift) < Some(source.size()) {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the target is smaller than the source",
        ));
    }
    target.writable()?;
    let cluster = match target.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => Some((qcow2.geometry.cluster(), qcow2.geometry.codec)),
        _ => None,
    };
    if options.compress && cluster.is_none() {
        return Err(Error::new(
            Kind::InvalidArgument,
            "only qcow2 images can be compressed",
        ));
    }
    if options.compress && cluster.is_some_and(|(size, _)| options.shift % size != 0) {
        return Err(Error::new(
            Kind::InvalidArgument,
            "compressed clusters are whole ones: the copy begins within one",
        ));
    }
    let piece = PIECE.max(cluster.map_or(0, |(size, _)| size));
    let packing = cluster.filter(|_| options.compress);
    let lost = AtomicU64::new(0);
    let work = Pieces {
        size: source.size(),
        piece,
        threads: options.threads,
        rate: options.rate,
    };
    let step = STEP.max(cluster.map_or(0, |(size, _)| size));
    let hole = |at| match options.sparse {
        // Zeros are written then, too.
        0 => Ok(0),
        _ => hole_at(source, at, options.above),
    };
    work.on_threads(progress, hole, || {
        let mut worker = Worker {
            from: through(source)?,
            to: through(target)?,
            step,
            options: options.clone(),
            packing: packing
                .map(|(size, codec)| Ok((size, Packer::new(codec)?)))
                .transpose()?,
            buffer: Vec::new(),
            lost: &lost,
        };
        Ok(move |piece: Piece| worker.piece(piece.start, piece.len).map(|()| true))
    })?;
    crate::blocking::commit(target)?;
    Ok(lost.into_inner())
}

struct Worker<'a> {
    from: Disk,
    to: Disk,
    step: u64,
    options: CopyOptions,
    packing: Option<(u64, Packer)>,
    buffer: Vec<u8>,
    lost: &'a AtomicU64,
}

impl Worker<'_> {
    fn piece(&mut self, start: u64, len: u64) -> Result<()> {
        let end = start + len;
        let mut at = start;
        while at < end {
            let range = range_at(self.from.image(), at, end - at)?;
            if self
                .options
                .above
                .is_some_and(|above| !range.present || range.depth >= above)
            {
                at += range.len;
                continue;
            }
            // Compressed clusters are whole ones, whatever the source's ranges are.
            let step = match &self.packing {
                Some((cluster, _)) if !range.zero || range.len < *cluster => {
                    (*cluster - at % *cluster).min(end - at)
                }
                Some((cluster, _)) => range.len / *cluster * *cluster,
                None if range.zero => range.len,
                None => range.len.min(self.step),
            };
            if range.zero && range.len >= step {
                self.zeros(at, step)?;
            } else {
                self.data(at, step)?;
            }
            at += step;
        }
        Ok(())
    }

    fn zeros(&mut self, at: u64, len: u64) -> Result<()> {
        let at = at + self.options.shift;
        let below = self.to.image().lock().layers.len() > 1;
        if self.options.sparse == 0 {
            self.buffer.clear();
            self.buffer.resize(len as usize, 0);
            return self.to.write(at, &self.buffer);
        }
        if !self.options.target_is_zero || below {
            return self.to.write_zeroes(at, len, true);
        }
        Ok(())
    }

    fn data(&mut self, at: u64, len: u64) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(len as usize, 0);
        self.fetch(at, &mut buffer)?;
        let written = if self.packing.is_some() {
            self.pack(at, &buffer)
        } else {
            self.plain(at, &buffer)
        };
        self.buffer = buffer;
        written
    }

    /// Read, and where that fails and is to be salvaged, again sector by sector.
    fn fetch(&mut self, at: u64, data: &mut [u8]) -> Result<()> {
        match self.from.read(at, data) {
            Err(_) if self.options.salvage => {}
            result => return result,
        }
        for (number, sector) in data.chunks_mut(512).enumerate() {
            if self.from.read(at + number as u64 * 512, sector).is_err() {
                sector.fill(0);
                self.lost.fetch_add(sector.len() as u64, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Write runs that are not zeros.
    fn plain(&mut self, at: u64, data: &[u8]) -> Result<()> {
        let unit = self.options.sparse as usize;
        if unit == 0 {
            return self.write(at, data);
        }
        let mut start = 0;
        while start < data.len() {
            let zero = is_zero(unit_at(data, start, unit));
            let mut end = (start + unit).min(data.len());
            while end < data.len() && is_zero(unit_at(data, end, unit)) == zero {
                end = (end + unit).min(data.len());
            }
            let run = data.get(start..end).unwrap_or(&[]);
            if zero {
                self.zeros(at + start as u64, run.len() as u64)?;
            } else {
                self.write(at + start as u64, run)?;
            }
            start = end;
        }
        Ok(())
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.to.write(at + self.options.shift, data)
    }

    fn pack(&mut self, at: u64, data: &[u8]) -> Result<()> {
        if is_zero(data) {
            return self.zeros(at, data.len() as u64);
        }
        let Some((cluster, packer)) = &mut self.packing else {
            return self.write(at, data);
        };
        // The disk's last cluster may be cut short; it is packed as if zeros followed.
        let mut whole = std::borrow::Cow::Borrowed(data);
        if (data.len() as u64) < *cluster {
            whole.to_mut().resize(*cluster as usize, 0);
        }
        match packer.pack(&whole) {
            Some(packed) => {
                let place = (at + self.options.shift) / *cluster;
                write_packed(self.to.image(), place, &packed)
            }
            None => self.write(at, data),
        }
    }
}

/// Store a guest cluster in packed form.
pub(crate) fn write_packed(image: &Arc<Image>, cluster: u64, packed: &[u8]) -> Result<()> {
    let files = image.files();
    let room = run(image, |state, waiter| {
        state.plan_packed(files, GuestCluster(cluster), packed.len() as u64, waiter)
    })?;
    let file = files
        .get(room.file)
        .ok_or_else(|| Error::invalid("no such file in the chain"))?;
    let written = file.write_at(packed, room.offset.0);
    image.finish(room.ticket, written.is_ok());
    written
}

fn unit_at(data: &[u8], start: usize, unit: usize) -> &[u8] {
    data.get(start..(start + unit).min(data.len()))
        .unwrap_or(&[])
}

pub(crate) fn is_zero(data: &[u8]) -> bool {
    let (before, words, after) = {
        // SAFETY: every bit pattern is a valid u128.
        unsafe { data.align_to::<u128>() }
    };
    before.iter().chain(after).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}
