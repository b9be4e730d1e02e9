// SPDX-License-Identifier: Apache-2.0
//! Copying and comparing whole disks, on all cores.
//!
//! The disk is cut into pieces; threads take the next piece each, read what of it is data, leave out
//! what is zeros, and write the rest. A piece is a few clusters of a plain image, so that one piece's
//! clusters lie together on the host; where tables or a file's map say that nothing is, it is all of that, so
//! that a nearly empty disk takes no longer for being large. Compressing threads do one cluster at a time.
//!
//! What goes through the host's page cache is moved by plain system calls, `STEP` bytes at a time, which stay in the
//! processor's cache between read and write: io_uring hands such writes to threads of its own, which then
//! contend for the file's lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::blocking::run;
use crate::compress::Packer;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::map::{range_at, step};
use crate::state::Layer;
use crate::types::GuestCluster;

const PIECE: u64 = 2 << 20;
/// Bytes moved at once through the page cache.
const STEP: u64 = 256 << 10;

/// How far a long operation is, and the wish to end it; shared between threads.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes done.
    pub done: AtomicU64,
    /// Bytes in all; 0 while unknown.
    pub total: AtomicU64,
    /// Set to end the operation with an error soon.
    pub cancel: AtomicBool,
}

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

/// How many bytes from `at` on read as zeros by what one look at the tables tells, or are to be left alone because
/// only layers from `above` on have them.
pub(crate) fn hole_at(image: &Image, at: u64, above: Option<usize>) -> Result<u64> {
    let range = step(image, at, image.size())?;
    let below = above.is_some_and(|above| !range.present || range.depth >= above);
    Ok(if range.zero || below { range.len } else { 0 })
}

/// A face on the image: io_uring where a file of it is opened with O_DIRECT.
pub(crate) fn through(image: &Arc<Image>) -> Result<Disk> {
    if image.files().iter().any(|file| file.alignment > 1) {
        return Disk::new(image.clone());
    }
    Disk::blocking(image.clone())
}

/// A part of a disk that one thread sees to.
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// The tables told that nothing is there.
    pub(crate) hole: bool,
}

/// A disk to be gone through.
pub(crate) struct Pieces {
    /// Bytes.
    pub(crate) size: u64,
    /// Bytes of a piece that is not a hole.
    pub(crate) piece: u64,
    pub(crate) threads: usize,
    /// Bytes a second at most, holes left out; 0 for as fast as it goes.
    pub(crate) rate: u64,
}

impl Pieces {
    /// Call a worker of each thread for the next piece until all are done, one fails or one wants no more. `hole`
    /// says how many bytes from a place on need no piece of their own.
    pub(crate) fn on_threads<W>(
        &self,
        progress: &Progress,
        hole: impl Fn(u64) -> Result<u64> + Sync,
        worker: impl Fn() -> Result<W> + Sync,
    ) -> Result<()>
    where
        W: FnMut(Piece) -> Result<bool>,
    {
        progress.total.store(self.size, Ordering::Relaxed);
        progress.done.store(0, Ordering::Relaxed);
        let begun = Instant::now();
        let next = Mutex::new(0);
        let stop = AtomicBool::new(false);
        let moved = AtomicU64::new(0);
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let body = || -> Result<()> {
            let mut work = worker()?;
            while !stop.load(Ordering::Relaxed) {
                let Some(piece) = self.take(&next, &hole)? else {
                    break;
                };
                if progress.cancel.load(Ordering::Relaxed) {
                    return Err(Error::new(Kind::InvalidState, "cancelled"));
                }
                let (len, hole) = (piece.len, piece.hole);
                if !work(piece)? {
                    stop.store(true, Ordering::Relaxed);
                }
                progress.done.fetch_add(len, Ordering::Relaxed);
                if hole || self.rate == 0 {
                    continue;
                }
                let moved = moved.fetch_add(len, Ordering::Relaxed) + len;
                // Not before its time; a wish to end is heard in between.
                while begun.elapsed().as_secs_f64() < moved as f64 / self.rate as f64 {
                    if stop.load(Ordering::Relaxed) || progress.cancel.load(Ordering::Relaxed) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
            Ok(())
        };
        if self.threads <= 1 {
            return body();
        }
        std::thread::scope(|scope| {
            for _ in 0..self.threads.clamp(1, 64) {
                scope.spawn(|| {
                    if let Err(error) = body() {
                        stop.store(true, Ordering::Relaxed);
                        failed
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .get_or_insert(error);
                    }
                });
            }
        });
        failed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    /// The next piece. All begin at multiples of a piece's size.
    fn take(&self, next: &Mutex<u64>, hole: impl Fn(u64) -> Result<u64>) -> Result<Option<Piece>> {
        let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
        let start = *next;
        if start >= self.size {
            return Ok(None);
        }
        let rest = self.size - start;
        let empty = match hole(start)?.min(rest) {
            all if all == rest => all,
            some => some / self.piece * self.piece,
        };
        let len = if empty > 0 {
            empty
        } else {
            self.piece.min(rest)
        };
        *next = start + len;
        Ok(Some(Piece {
            start,
            len,
            hole: empty > 0,
        }))
    }
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
