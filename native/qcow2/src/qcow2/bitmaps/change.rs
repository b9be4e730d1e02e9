// SPDX-License-Identifier: Apache-2.0
//! A change to the bitmaps is a list of steps, each durable before the next:
//!
//! | step                                             | after a cut behind it             |
//! |--------------------------------------------------|-----------------------------------|
//! | new clusters, tables and directory               | they leak                         |
//! | header names the directory (one sector)          | done; the old ones leak           |
//! | old clusters, tables and directory are freed     | done                              |

use std::ops::Range;

use super::content::{self, Table};
use super::directory::{set_extension, Directory, Entry};
use super::{qcow2_of, store};
use crate::blocking::{commit, settle};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::qcow2::snapshot::{file_of, free_area, new_table};
use crate::qcow2::Geometry;

/// A change to an image's bitmaps, before it is on the disk.
pub(super) struct Change<'a> {
    image: &'a Image,
    pub(super) geometry: Geometry,
    pub(super) size: u64,
    pub(super) directory: Directory,
    made: Vec<Range<u64>>,
    pub(super) dropped: Vec<Range<u64>>,
}

impl<'a> Change<'a> {
    /// None yet, of a directory as it is on the disk.
    pub(super) fn begin(
        image: &'a Image,
        geometry: Geometry,
        size: u64,
        directory: Directory,
    ) -> Change<'a> {
        Change {
            image,
            geometry,
            size,
            directory,
            made: Vec::new(),
            dropped: Vec::new(),
        }
    }

    pub(super) fn table(&self, entry: &Entry) -> Result<Table> {
        Table::read(file_of(self.image, &self.geometry)?, &self.geometry, entry)
    }

    pub(super) fn write(
        &mut self,
        entry: &Entry,
        table: &Table,
        touched: &dyn Fn(u64) -> bool,
        change: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Entry> {
        let written = content::write(
            self.image,
            &self.geometry,
            (entry, table),
            self.size,
            touched,
            change,
        )?;
        self.made.extend(written.made);
        self.dropped.extend(written.dropped);
        Ok(written.entry)
    }

    /// Write a consistent bitmap anew.
    pub(super) fn rewrite(
        &mut self,
        name: &str,
        change: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let place = self.directory.find_consistent(name)?;
        let Some(entry) = self.directory.entries.get(place).cloned() else {
            return Ok(());
        };
        let table = self.table(&entry)?;
        let entry = self.write(&entry, &table, &|_| true, change)?;
        if let Some(place) = self.directory.entries.get_mut(place) {
            *place = entry;
        }
        Ok(())
    }

    /// Name the new directory in the header, and free what is old.
    pub(super) fn switch(self, old: &Directory) -> Result<()> {
        let Change {
            image,
            geometry,
            mut directory,
            dropped,
            made,
            ..
        } = self;
        let named = name_directory(image, &geometry, &mut directory);
        if named.is_err() {
            content::free(image, made)?;
            return named;
        }
        image.lock().reread_metadata(image.files())?;
        if old.len > 0 {
            free_area(image, &geometry, old.offset, old.len)?;
        }
        for range in dropped {
            let offset = range.start << geometry.cluster_bits;
            let len = (range.end - range.start) << geometry.cluster_bits;
            free_area(image, &geometry, offset, len)?;
        }
        settle(image)
    }
}

fn name_directory(image: &Image, geometry: &Geometry, directory: &mut Directory) -> Result<()> {
    let words = directory.words()?;
    directory.offset = 0;
    if !words.is_empty() {
        directory.offset = new_table(image, geometry, &words)?.0;
    }
    commit(image)?;
    {
        let mut state = image.lock();
        let mut header = state.current_header()?;
        set_extension(&mut header, directory, &words);
        state.replace_header(header)?;
    }
    commit(image)
}

/// Change the bitmaps of an active image without requests under way.
pub(super) fn edit(image: &Image, change: impl FnOnce(&mut Change) -> Result<()>) -> Result<()> {
    image.writable()?;
    if !image.active() || image.lock().epochs.under_way() > 0 {
        return Err(Error::new(
            Kind::InvalidState,
            "bitmaps need an active image without requests under way",
        ));
    }
    let (header, _) = qcow2_of(image)?;
    if header.version < 3 {
        return Err(Error::unsupported(
            "Cannot store dirty bitmaps in qcow2 v2 files",
        ));
    }
    image.lock().check_sound()?;
    store(image)?;
    settle(image)?;
    let changed = edit_stored(image, change);
    let again = image.lock().begin_tracking(image.files());
    changed.and(again)
}

fn edit_stored(image: &Image, change: impl FnOnce(&mut Change) -> Result<()>) -> Result<()> {
    let (header, geometry) = qcow2_of(image)?;
    let old = Directory::read(file_of(image, &geometry)?, &header, &geometry)?;
    let mut begun = Change::begin(image, geometry, header.size, old.clone());
    match change(&mut begun) {
        Ok(()) => begun.switch(&old),
        Err(error) => {
            content::free(image, begun.made)?;
            settle(image)?;
            Err(error)
        }
    }
}
