// SPDX-License-Identifier: Apache-2.0
//! Persistent bitmaps: which parts of the disk were written since a moment, for incremental backups.
//!
//! | module      | job                                                         |
//! |-------------|-------------------------------------------------------------|
//! | `directory` | the list of bitmaps in the image                            |
//! | `change`    | a change to them, step by step                              |
//! | `content`   | a bitmap's table and bits, written anew and never in place  |
//! | `tracking`  | what is recorded while the image is open                    |
//! | `view`      | looking at a bitmap                                         |
//!
//! While an image is open for writing, each enabled bitmap is marked in use on the disk before the first write
//! could be missed, and what is written is recorded in memory. Closing joins the two and takes the mark
//! away. Where that does not happen the mark stays, and everybody knows that the bitmap says too little: it is
//! *inconsistent*, and can only be removed.
//!
//! Resizing marks all bitmaps in use first, since none fits the disk between the old size and the new one.

mod change;
pub(crate) mod content;
pub(crate) mod directory;
pub(crate) mod tracking;
mod view;

use crate::bytes::{be32, be64};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::qcow2::header::{extension, field, Header};
use crate::qcow2::snapshot::file_of;
use crate::qcow2::Geometry;
use crate::state::{Layer, State};
use change::{edit, Change};
use content::Table;
use directory::{set_extension, Directory, Entry, AUTO, IN_USE};
use tracking::Tracked;
pub use view::BitmapView;

/// A persistent bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Writes are recorded in it.
    pub enabled: bool,
    /// It was not closed, and may say too little.
    pub in_use: bool,
}

/// The bitmaps of an image's active layer.
pub fn list(image: &Image) -> Result<Vec<Bitmap>> {
    let (header, geometry) = qcow2_of(image)?;
    let mut found = list_in(file_of(image, &geometry)?, &header, &geometry)?;
    let state = image.lock();
    for bitmap in &mut found {
        let ours = |tracked: &Tracked| tracked.name == bitmap.name;
        bitmap.in_use &= !state.tracking.bitmaps.iter().any(ours);
    }
    Ok(found)
}

/// As the file has them.
pub(crate) fn list_in(
    file: &BlockFile,
    header: &Header,
    geometry: &Geometry,
) -> Result<Vec<Bitmap>> {
    let directory = Directory::read(file, header, geometry)?;
    let described = |entry: &Entry| Bitmap {
        name: entry.name.clone(),
        granularity: 1 << entry.granularity_bits,
        enabled: entry.flags & AUTO != 0,
        in_use: entry.in_use(),
    };
    Ok(directory.entries.iter().map(described).collect())
}

/// The granularity that QEMU chooses: a cluster, but within 4 KiB and 64 KiB.
pub fn default_granularity(image: &Image) -> Result<u64> {
    Ok(qcow2_of(image)?.1.cluster().clamp(4096, 65536))
}

/// Add an empty bitmap with a bit for each `granularity` bytes (512 to 2 GiB, a power of two).
pub fn add(image: &Image, name: &str, granularity: u64, enabled: bool) -> Result<()> {
    edit(image, |change| {
        let known = &change.directory.entries;
        if known.iter().any(|entry| entry.name == name) {
            let message = format!("Bitmap already exists: {}", name.escape_debug());
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let entry = Entry::new(name, granularity, if enabled { AUTO } else { 0 })?;
        let entry = change.write(&entry, &Table::default(), &|_| false, &mut |_, _| Ok(()))?;
        change.directory.entries.push(entry);
        Ok(())
    })
}

/// Remove a bitmap, consistent or not.
pub fn remove(image: &Image, name: &str) -> Result<()> {
    edit(image, |change| {
        let gone = change.directory.find(name)?;
        let entry = change.directory.entries.remove(gone);
        // The table of a bitmap in use may be anything; what it cannot name leaks.
        let table = match change.table(&entry) {
            Err(_) if entry.in_use() => Table::default(),
            table => table?,
        };
        change
            .dropped
            .extend(table.all_clusters(&change.geometry, &entry));
        Ok(())
    })
}

/// Let a bitmap say that nothing was written.
pub fn clear(image: &Image, name: &str) -> Result<()> {
    edit(image, |change| {
        change.rewrite(name, &mut |_, bits| {
            bits.fill(0);
            Ok(())
        })
    })
}

/// Record writes in a bitmap from now on, or no more.
pub fn set_enabled(image: &Image, name: &str, enabled: bool) -> Result<()> {
    edit(image, |change| {
        let place = change.directory.find_consistent(name)?;
        if let Some(entry) = change.directory.entries.get_mut(place) {
            entry.flags = if enabled { AUTO } else { 0 };
        }
        Ok(())
    })
}

/// Let a bitmap say what it says and what another one says, perhaps of another image (active; the same may
/// be given). Disks of different sizes are refused.
pub fn merge(image: &Image, name: &str, source: &Image, source_name: &str) -> Result<()> {
    edit(image, |change| {
        let mut view = BitmapView::open(source, source_name)?;
        let size = change.size;
        if view.size() != size {
            let message = format!(
                "Bitmaps are of different sizes (destination size is {size}, source size is {}) and can't be merged",
                view.size()
            );
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let place = change.directory.find_consistent(name)?;
        let granularity_bits = change
            .directory
            .entries
            .get(place)
            .map_or(0, |entry| entry.granularity_bits);
        let per_piece = change.geometry.cluster() * 8;
        change.rewrite(name, &mut |index, bits| {
            let first = index * per_piece;
            let mut at = first << granularity_bits;
            let end = size.min((first + per_piece) << granularity_bits);
            while at < end {
                let (dirty, len) = view.status(source, at, end - at)?;
                if dirty {
                    let last = (at + len - 1) >> granularity_bits;
                    content::set(bits, (at >> granularity_bits) - first..last + 1 - first);
                }
                at += len;
            }
            Ok(())
        })
    })
}

/// Join what was recorded with the bitmaps in the file, and take away the marks. Afterwards nothing is
/// recorded. No request may be under way.
pub(crate) fn store(image: &Image) -> Result<()> {
    if image.lock().tracking.bitmaps.is_empty() {
        return Ok(());
    }
    let tracking = std::mem::take(&mut image.lock().tracking);
    let (header, geometry) = qcow2_of(image)?;
    let file = file_of(image, &geometry)?;
    let old = Directory::read(file, &header, &geometry)?;
    let mut change = Change::begin(image, geometry, header.size, old.clone());
    let mut rewritten = false;
    for (place, entry) in old.entries.iter().enumerate() {
        let known = tracking.bitmaps.iter();
        let Some(tracked) = known.clone().find(|tracked| tracked.name == entry.name) else {
            continue;
        };
        let mut entry = entry.clone();
        entry.flags &= !IN_USE;
        if !tracked.is_empty() || tracking.resized {
            rewritten = true;
            let table = change.table(&entry)?;
            let per_piece = geometry.cluster() * 8;
            entry = change.write(
                &entry,
                &table,
                &|index| tracked.touches(index * per_piece, per_piece),
                &mut |index, bits| {
                    tracked.add_to(bits, index * per_piece);
                    Ok(())
                },
            )?;
        }
        if let Some(place) = change.directory.entries.get_mut(place) {
            *place = entry;
        }
    }
    if rewritten {
        return change.switch(&old);
    }
    write_flags(file, &change.directory, &old)
}

/// Write in place the flags that differ; each of them stands in one sector.
fn write_flags(file: &BlockFile, directory: &Directory, old: &Directory) -> Result<()> {
    let entries = directory.entries.iter().zip(&old.entries);
    for ((new, old), place) in entries.zip(old.flag_places()) {
        if new.flags != old.flags {
            file.write_at(&new.flags.to_be_bytes(), place)?;
        }
    }
    file.sync()
}

/// Before the disk's size changes: no bitmap is of use until all are stored in their new size. Refused
/// when there is one that cannot be trusted.
pub(crate) fn prepare_resize(image: &Image, size: u64) -> Result<()> {
    let (header, geometry) = qcow2_of(image)?;
    let file = file_of(image, &geometry)?;
    let old = Directory::read(file, &header, &geometry)?;
    if old.entries.is_empty() {
        return Ok(());
    }
    if let Some(bad) = list(image)?.iter().find(|bitmap| bitmap.in_use) {
        let message = format!(
            "Bitmap '{}' is inconsistent and cannot be resized: remove it first",
            bad.name.escape_debug()
        );
        return Err(Error::new(Kind::InvalidState, message));
    }
    for entry in &old.entries {
        entry.check_size(&geometry, size)?;
    }
    let mut marked = old.clone();
    let mut state = image.lock();
    state.tracking.resized = true;
    for entry in &mut marked.entries {
        if !entry.in_use() {
            entry.flags |= IN_USE;
            let waiting = Tracked::new(&entry.name, entry.granularity_bits, false);
            state.tracking.bitmaps.push(waiting);
        }
    }
    drop(state);
    write_flags(file, &marked, &old)
}

impl State {
    /// Mark the enabled bitmaps in use and record for them from now on. An extension that does not count is
    /// taken out of the header, as what it names is lost.
    pub(crate) fn begin_tracking(&mut self, files: &[BlockFile]) -> Result<()> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first() else {
            return Ok(());
        };
        let geometry = qcow2.geometry;
        let missing = || Error::invalid("no such file in the chain");
        let file = files.get(geometry.file).ok_or_else(missing)?;
        let old = Directory::read(file, &qcow2.header, &geometry)?;
        if old.entries.is_empty() {
            if qcow2.header.extension(extension::BITMAPS).is_some() {
                let mut header = self.current_header()?;
                set_extension(&mut header, &Directory::default(), &[]);
                self.replace_header(header)?;
            }
            return Ok(());
        }
        let mut marked = old.clone();
        let fresh = |entry: &&mut Entry| entry.flags == AUTO;
        for entry in marked.entries.iter_mut().filter(fresh) {
            entry.flags |= IN_USE;
            let tracked = Tracked::new(&entry.name, entry.granularity_bits, true);
            self.tracking.bitmaps.push(tracked);
        }
        if self.tracking.bitmaps.is_empty() {
            return Ok(());
        }
        write_flags(file, &marked, &old)
    }

    /// The header as it will be with the next commit.
    pub(crate) fn current_header(&mut self) -> Result<Header> {
        let writer = self.writer()?;
        let bytes = writer.header.bytes();
        let reftable = (
            be64(bytes, field::REFTABLE_OFFSET),
            be32(bytes, field::REFTABLE_CLUSTERS),
        );
        match (self.layers.first(), reftable) {
            (Some(Layer::Qcow2(qcow2)), (Some(offset), Some(clusters))) => Ok(Header {
                reftable_offset: offset,
                reftable_clusters: clusters,
                ..qcow2.header.clone()
            }),
            _ => Err(Error::invalid("the image has no header")),
        }
    }

    /// Write another header with the next commit.
    pub(crate) fn replace_header(&mut self, header: Header) -> Result<()> {
        let bytes = header.serialize_short()?;
        let block = self.writer()?.header.bytes_mut();
        if bytes.len() > block.len() {
            return Err(Error::new(
                Kind::InvalidArgument,
                "header, extensions and names do not fit into 4 KiB",
            ));
        }
        // Where it fits into a sector, what stands behind it does not matter, and the change is atomic.
        let end = bytes.len().next_multiple_of(512).min(block.len());
        let (now, _) = block.split_at_mut(end);
        now.fill(0);
        now.iter_mut()
            .zip(&bytes)
            .for_each(|(place, byte)| *place = *byte);
        if let Some(Layer::Qcow2(qcow2)) = self.layers.first_mut() {
            qcow2.header = header;
        }
        self.cache_header()
    }
}

/// Behind a change of the disk's size: the bitmaps have it, too, and record again.
pub(crate) fn end_resize(image: &Image) -> Result<()> {
    if !image.lock().tracking.resized {
        return Ok(());
    }
    store(image)?;
    image.lock().begin_tracking(image.files())
}

/// The header and shape of an image's active layer.
pub(crate) fn qcow2_of(image: &Image) -> Result<(Header, Geometry)> {
    match image.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => Ok((qcow2.header.clone(), qcow2.geometry)),
        _ => Err(Error::unsupported("bitmaps in a raw image")),
    }
}
