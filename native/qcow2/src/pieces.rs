// SPDX-License-Identifier: Apache-2.0
//! A disk cut into pieces, which threads see to.
//!
//! A piece is a few clusters of a plain image, so that one piece's clusters lie together on the host; where tables or a
//! file's map say that nothing is, it is all of that, so that a nearly empty disk takes no longer for being large.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::map::step;

/// Bytes of a piece.
pub(crate) const PIECE: u64 = 2 << 20;

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
