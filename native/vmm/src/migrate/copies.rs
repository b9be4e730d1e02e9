// SPDX-License-Identifier: Apache-2.0
//! Disks whose content goes along, at either end ([`super`] has the whole).
//!
//! Each end reads or writes through an engine of its own on plain system calls, in the thread that migrates: one request at a time, of
//! [`BLOCKS_MAX`] bytes at most, so that no more memory is needed however large the disk is, and no more of the host's disk is taken than one
//! reader takes. The engine of the guest's own requests goes on beside it; what both need is under the image's lock.
//!
//! What is sent is what the guest can see of the disk, of all layers: ranges that are nowhere, or zeros by their mapping, as holes
//! without a byte; of the rest, [`GRAIN`] bytes that are all zeros, too. The destination leaves alone what is zeros there already.
//!
//! Whoever lets go of an image holds [`Still`] meanwhile: no request of ours is under way then, and the next finds an image that is
//! not active, which is an error of the migration.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vmbus_qcow2::{range_at, Disk, Image};

use super::changes::{Blocks, Changed};
use super::stream::{damaged, BLOCKS_MAX};
use crate::block::error_of;
use crate::error::{Error, Result};

/// Zeros are looked for in pieces of so many bytes.
const GRAIN: u64 = 64 << 10;
/// The longest hole in one record, and in one request.
pub const HOLE_MAX: u64 = 256 << 20;
/// So many bytes may wait at the destination until they are made durable.
const UNSYNCED_MAX: u64 = 256 << 20;

/// Held while a disk is read or written, and by whoever lets go of one.
#[derive(Clone, Default)]
pub(crate) struct Still(Arc<Mutex<()>>);

impl Still {
    pub(crate) fn hold(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// What the source says of its copies, in the order in which it numbers them.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    disks: Vec<Listed>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    /// Such as `disk/root`.
    id: String,
    /// Bytes.
    size: u64,
}

/// A disk whose content is to go along, or is to come.
#[derive(Clone)]
pub struct Copied {
    /// Such as `disk/root`.
    pub id: String,
    /// Its chain.
    pub image: Arc<Image>,
    /// What its guest changes meanwhile.
    pub changed: Arc<Changed>,
}

/// What is at a place of the source's disk.
#[derive(Clone, Copy, Debug)]
pub(super) enum Piece {
    /// So many bytes of zeros.
    Hole(u64),
    /// So many bytes of data, in the reader's room.
    Data(u64),
}

/// One disk at the source.
pub(super) struct Source {
    id: String,
    changed: Arc<Changed>,
    size: u64,
    disk: Disk,
    still: Still,
}

impl Source {
    pub(super) fn new(copied: Copied, still: &Still) -> Result<Source> {
        let about = |error| error_of(&copied.id, error);
        Ok(Source {
            size: copied.image.size(),
            disk: Disk::blocking(copied.image).map_err(about)?,
            id: copied.id,
            changed: copied.changed,
            still: still.clone(),
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// What was changed since it was asked last.
    pub(super) fn take(&self) -> Blocks {
        self.changed.take(self.size)
    }

    /// What is at `at`, in one piece that does not reach beyond `end`; data is read into `room`, of [`BLOCKS_MAX`] bytes.
    pub(super) fn piece(&mut self, at: u64, end: u64, room: &mut [u8]) -> Result<Piece> {
        let still = self.still.clone();
        let _held = still.hold();
        self.try_piece(at, end, room)
            .map_err(|error| error_of(&self.id, error))
    }

    fn try_piece(&mut self, at: u64, end: u64, room: &mut [u8]) -> vmbus_qcow2::Result<Piece> {
        let left = end.saturating_sub(at);
        let image = Arc::clone(self.disk.image());
        let mut range = range_at(&image, at, left.min(BLOCKS_MAX))?;
        if range.zero && range.len == BLOCKS_MAX {
            range = range_at(&image, at, left.min(HOLE_MAX))?;
        }
        if range.zero {
            return Ok(Piece::Hole(range.len.min(left)));
        }
        let len = range.len.min(left).min(room.len() as u64);
        let place = room.get_mut(..len as usize).unwrap_or_default();
        self.disk.read(at, place)?;
        Ok(Piece::Data(len))
    }
}

/// What the source is told of them.
pub(super) fn list(sources: &[Source]) -> List {
    let disks = sources.iter().map(|source| Listed {
        id: source.id.clone(),
        size: source.size,
    });
    List {
        disks: disks.collect(),
    }
}

/// Runs of data that are all zeros, or not: whether, and how many bytes.
pub(super) fn grains(mut data: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    let is_zero = |grain: &[u8]| grain.iter().all(|byte| *byte == 0);
    std::iter::from_fn(move || {
        let mut grains = data.chunks(GRAIN as usize);
        let first = grains.next()?;
        let zero = is_zero(first);
        let same = grains.take_while(|grain| is_zero(grain) == zero);
        let len = same.fold(first.len(), |len, grain| len.saturating_add(grain.len()));
        let (now, later) = data.split_at(len);
        data = later;
        Some((zero, now))
    })
}

/// One disk at the destination.
struct Target {
    id: String,
    disk: Disk,
    size: u64,
    /// Bytes of the source's disk, once they are known; what is behind them is made zeros, and new to the guest.
    sent: u64,
    whole: bool,
}

/// The disks that are written to at the destination.
#[derive(Default)]
pub struct Targets {
    /// In the source's order, once that is known.
    list: Vec<Target>,
    /// The one that is written to.
    chosen: Option<usize>,
    unsynced: u64,
    still: Still,
}

impl Targets {
    pub(super) fn new(wanted: Vec<Copied>, still: &Still) -> Result<Targets> {
        let list = wanted.into_iter().map(|copied| {
            let about = |error| error_of(&copied.id, error);
            Ok(Target {
                size: copied.image.size(),
                disk: Disk::blocking(copied.image).map_err(about)?,
                id: copied.id,
                sent: 0,
                whole: false,
            })
        });
        Ok(Targets {
            list: list.collect::<Result<_>>()?,
            chosen: None,
            unsynced: 0,
            still: still.clone(),
        })
    }

    /// For tests and fuzzing: active images, by their disks' ids.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no eventfd.
    pub fn of(images: Vec<(String, Arc<Image>)>) -> Result<Targets> {
        let wanted = images.into_iter().map(|(id, image)| Copied {
            id,
            image,
            changed: Arc::default(),
        });
        Targets::new(wanted.collect(), &Still::default())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn has(&self, id: &str) -> bool {
        self.list.iter().any(|target| target.id == id)
    }

    /// Whether the source sends just those that are expected.
    ///
    /// # Errors
    /// `InvalidArgument` if not.
    pub(super) fn expect(&mut self, list: &List) -> Result<()> {
        let refuse = |message: String| Err(Error::invalid("copy", message));
        let mut ordered = Vec::with_capacity(self.list.len());
        for listed in &list.disks {
            let place = self.list.iter().position(|target| target.id == listed.id);
            let Some(mut target) = place.map(|place| self.list.remove(place)) else {
                let id: String = listed.id.chars().take(64).collect();
                return refuse(format!(
                    "the source sends what is on {id:?}, and the destination was not told to write that"
                ));
            };
            if target.size < listed.size {
                let message = format!(
                    "is a disk of {} bytes, and its image at the destination has no more than {}",
                    listed.size, target.size
                );
                return Err(Error::invalid(target.id, message));
            }
            target.sent = listed.size;
            ordered.push(target);
        }
        if let Some(left) = self.list.first() {
            return refuse(format!(
                "the destination waits for what is on {}, which the source does not send",
                left.id
            ));
        }
        self.list = ordered;
        Ok(())
    }

    /// What comes next is of this one.
    pub(super) fn choose(&mut self, number: u64) -> Result<()> {
        let number = usize::try_from(number).ok();
        let chosen = number.filter(|number| *number < self.list.len());
        self.chosen = Some(chosen.ok_or_else(|| damaged("a disk that was not announced"))?);
        Ok(())
    }

    fn at(&mut self, place: u64, len: u64) -> Result<&mut Target> {
        let chosen = self.chosen.and_then(|chosen| self.list.get_mut(chosen));
        let target = chosen.ok_or_else(|| damaged("what is on a disk, and not on which"))?;
        match place.checked_add(len) {
            Some(end) if end <= target.sent => Ok(target),
            _ => Err(damaged(format!("{} has no byte {place:#x}", target.id))),
        }
    }

    pub(super) fn write(&mut self, place: u64, data: &[u8]) -> Result<()> {
        let still = self.still.clone();
        let _held = still.hold();
        let target = self.at(place, data.len() as u64)?;
        let written = target.disk.write(place, data);
        written.map_err(|error| error_of(&target.id, error))?;
        self.unsynced = self.unsynced.saturating_add(data.len() as u64);
        if self.unsynced >= UNSYNCED_MAX {
            self.flush()?;
        }
        Ok(())
    }

    pub(super) fn clear(&mut self, place: u64, len: u64) -> Result<()> {
        if len > HOLE_MAX {
            return Err(damaged(format!("a hole of {len} bytes")));
        }
        let still = self.still.clone();
        let _held = still.hold();
        let target = self.at(place, len)?;
        let cleared = clear(&mut target.disk, place, len);
        let written = cleared.map_err(|error| error_of(&target.id, error))?;
        self.unsynced = self.unsynced.saturating_add(written);
        Ok(())
    }

    /// Makes all of it durable.
    pub(super) fn sync(&mut self) -> Result<()> {
        let still = self.still.clone();
        let _held = still.hold();
        for target in self.list.iter_mut().filter(|target| !target.whole) {
            let behind = target.size.saturating_sub(target.sent);
            let cleared = clear(&mut target.disk, target.sent, behind);
            cleared.map_err(|error| error_of(&target.id, error))?;
            target.whole = true;
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        for target in &mut self.list {
            let flushed = target.disk.flush();
            flushed.map_err(|error| error_of(&target.id, error))?;
        }
        self.unsynced = 0;
        Ok(())
    }
}

/// Makes a range zeros, where it is not; how many bytes it was asked for. In pieces, so that no request is endless.
fn clear(disk: &mut Disk, place: u64, len: u64) -> vmbus_qcow2::Result<u64> {
    let end = place.saturating_add(len);
    let (mut at, mut cleared) = (place, 0u64);
    while at < end {
        let range = range_at(disk.image(), at, end.saturating_sub(at).min(HOLE_MAX))?;
        let now = range.len.clamp(1, end.saturating_sub(at));
        if !range.zero {
            disk.write_zeroes(at, now, true)?;
            cleared = cleared.saturating_add(now);
        }
        at = at.saturating_add(now);
    }
    Ok(cleared)
}
