// SPDX-License-Identifier: Apache-2.0
//! Copying and comparing whole disks, on all cores.
//!
//! The disk is cut into pieces; threads take the next piece each, read what of it is data, leave out
//! what is zeros, and write the rest. A piece is a few clusters of a plain image, so that one piece's
//! clusters lie together on the host. Compressing threads do one cluster at a time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::blocking::run;
use crate::compress::Packer;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::map::range_at;
use crate::state::Layer;
use crate::types::GuestCluster;

const PIECE: u64 = 2 << 20;

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
    let pace = (options.threads, options.rate);
    on_threads(source.size(), piece, pace, progress, || {
        let mut worker = Worker {
            from: Disk::new(source.clone())?,
            to: Disk::new(target.clone())?,
            options: options.clone(),
            packing: packing
                .map(|(size, codec)| Ok((size, Packer::new(codec)?)))
                .transpose()?,
            buffer: Vec::new(),
            lost: &lost,
        };
        Ok(move |at, len| worker.piece(at, len).map(|()| true))
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
    on_threads(
        left.size().min(right.size()),
        PIECE,
        (threads, 0),
        progress,
        || {
            let (mut one, mut other) = (Disk::new(left.clone())?, Disk::new(right.clone())?);
            let first = &first;
            Ok(move |at, len| {
                let at_difference = difference(&mut one, &mut other, at, len)?;
                if let Some(found) = at_difference {
                    first.fetch_min(found, Ordering::SeqCst);
                }
                // Pieces before this one are being looked at by others; none behind it matters.
                Ok(first.load(Ordering::SeqCst) > at)
            })
        },
    )?;
    Ok(Some(first.load(Ordering::SeqCst)).filter(|at| *at != u64::MAX))
}

/// Whether a range of an image holds anything but zeros; gives the first such byte.
pub fn first_nonzero(image: &Arc<Image>, start: u64, end: u64) -> Result<Option<u64>> {
    let mut disk = Disk::new(image.clone())?;
    let mut at = start;
    let mut buffer = Vec::new();
    while at < end {
        let range = range_at(image, at, PIECE.min(end - at))?;
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

/// Call a worker of each thread for the pieces of `size` bytes until one fails or wants no more.
pub(crate) fn on_threads<W>(
    size: u64,
    piece: u64,
    (threads, rate): (usize, u64),
    progress: &Progress,
    worker: impl Fn() -> Result<W> + Sync,
) -> Result<()>
where
    W: FnMut(u64, u64) -> Result<bool>,
{
    progress.total.store(size, Ordering::Relaxed);
    progress.done.store(0, Ordering::Relaxed);
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let body = || -> Result<()> {
        let mut work = worker()?;
        while !stop.load(Ordering::Relaxed) {
            let at = next.fetch_add(piece, Ordering::SeqCst);
            if at >= size {
                break;
            }
            if progress.cancel.load(Ordering::Relaxed) {
                return Err(Error::new(Kind::InvalidState, "cancelled"));
            }
            let len = piece.min(size - at);
            if !work(at, len)? {
                stop.store(true, Ordering::Relaxed);
            }
            let done = progress.done.fetch_add(len, Ordering::Relaxed) + len;
            // Not before its time; a wish to end is heard in between.
            while rate > 0 && begun.elapsed().as_secs_f64() < done as f64 / rate as f64 {
                if stop.load(Ordering::Relaxed) || progress.cancel.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    };
    if threads <= 1 {
        return body();
    }
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, 64) {
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

struct Worker<'a> {
    from: Disk,
    to: Disk,
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
                None => range.len,
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
