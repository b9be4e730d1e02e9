// SPDX-License-Identifier: Apache-2.0
//! Looking at a bitmap: which ranges of the disk are dirty.

use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::qcow2::bitmaps::content::{self, Table};
use crate::qcow2::bitmaps::directory::{Directory, Entry};
use crate::qcow2::bitmaps::qcow2_of;
use crate::qcow2::snapshot::file_of;
use crate::qcow2::Geometry;

/// A bitmap that is looked at. It stays what it was when it was opened, but for what the image has
/// recorded since.
pub struct BitmapView {
    geometry: Geometry,
    entry: Entry,
    table: Table,
    size: u64,
    loaded: Option<(u64, Vec<u8>)>,
}

impl BitmapView {
    /// Open a bitmap of an image's active layer, by name. One that is not consistent is refused.
    pub fn open(image: &Image, name: &str) -> Result<BitmapView> {
        let (header, geometry) = qcow2_of(image)?;
        let file = file_of(image, &geometry)?;
        let directory = Directory::read(file, &header, &geometry)?;
        let recording = image
            .lock()
            .tracking
            .bitmaps
            .iter()
            .any(|tracked| tracked.name == name);
        // What this image records is marked in use by ourselves.
        let place = if recording {
            directory.find(name)?
        } else {
            directory.find_consistent(name)?
        };
        let entry = directory.entries.get(place).cloned();
        let entry = entry.ok_or_else(|| Error::invalid("no such bitmap"))?;
        let table = Table::read(file, &geometry, &entry)?;
        Ok(BitmapView {
            geometry,
            table,
            entry,
            size: header.size,
            loaded: None,
        })
    }

    /// The disk's size when the bitmap was opened.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether byte `at` is dirty, and how many bytes from there on are so too, at most `len`.
    pub fn status(&mut self, image: &Image, at: u64, len: u64) -> Result<(bool, u64)> {
        let end = at.saturating_add(len).min(self.size);
        if at >= end {
            let message = "the range does not lie on the disk";
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let bits = self.entry.granularity_bits;
        let last = ((end - 1) >> bits) + 1;
        let first = at >> bits;
        let (dirty, mut until) = self.run(image, first, last)?;
        while until < last {
            let (next, behind) = self.run(image, until, last)?;
            if next != dirty {
                break;
            }
            until = behind;
        }
        Ok((dirty, (until << bits).min(end) - at))
    }

    /// The run of equal bits from `at`, as far as the piece of the table reaches.
    fn run(&mut self, image: &Image, at: u64, end: u64) -> Result<(bool, u64)> {
        let per_piece = self.geometry.cluster() * 8;
        let index = at / per_piece;
        let start = index * per_piece;
        let until = end.min(start + per_piece);
        let touched =
            image.lock().tracking.bitmaps.iter().any(|tracked| {
                tracked.name == self.entry.name && tracked.touches(start, per_piece)
            });
        if let (Some(dirty), false) = (self.table.uniform(index), touched) {
            return Ok((dirty, until));
        }
        if self
            .loaded
            .as_ref()
            .is_none_or(|(loaded, _)| *loaded != index)
        {
            let file = file_of(image, &self.geometry)?;
            self.loaded = Some((index, self.table.load(file, &self.geometry, index)?));
        }
        let stored = self.loaded.as_ref().map_or(&[][..], |(_, bits)| bits);
        let (dirty, behind) = if touched {
            let mut bits = stored.to_vec();
            let state = image.lock();
            let recorded = state.tracking.bitmaps.iter();
            recorded
                .filter(|tracked| tracked.name == self.entry.name)
                .for_each(|tracked| tracked.add_to(&mut bits, start));
            content::run(&bits, at - start, until - start)
        } else {
            content::run(stored, at - start, until - start)
        };
        Ok((dirty, start + behind))
    }
}
