// SPDX-License-Identifier: Apache-2.0
//! Growing and shrinking the disk.
//!
//! Growing: a larger L1 table is written elsewhere and the header switches to it together with the
//! size, in one sector. What the new range could show (of a longer backing file, or behind the old
//! end within the last cluster) is zeroed before the size changes hands.
//! Shrinking: the size first, then what lies behind it is unlinked and freed; a power cut between
//! leaves mappings behind the end, which are harmless.

use crate::blocking::{commit, run, settle};
use crate::bytes::{put32, put64};
use crate::cache::Class;
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::plan::{Planned, WriteStep, ZeroStep};
use crate::qcow2::create::Preallocation;
use crate::qcow2::entry::L2Entry;
use crate::qcow2::header::{field, l1_entries};
use crate::qcow2::mapping::{block_of, decode_l1};
use crate::qcow2::overlap::Holds;
use crate::qcow2::preallocate::{preallocate, reserve};
use crate::qcow2::zero::Zeroing;
use crate::qcow2::{refcount, Geometry};
use crate::state::{Layer, State};
use crate::types::HostOffset;

/// Change an active image's size to `size` bytes. No request may be under way. Shrinking loses data
/// and must be asked for.
pub fn resize(image: &Image, size: u64, shrink: bool) -> Result<()> {
    resize_with(image, size, shrink, Preallocation::Off)
}

/// The same, and what a growing disk gains is preallocated; if that fails it does not grow.
pub fn resize_with(
    image: &Image,
    size: u64,
    shrink: bool,
    preallocation: Preallocation,
) -> Result<()> {
    let old = image.size();
    if preallocation != Preallocation::Off && size < old {
        return Err(Error::new(
            Kind::InvalidArgument,
            "Preallocation can only be used for growing images",
        ));
    }
    let (raw, encrypted) = match image.lock().layers.first() {
        Some(Layer::Qcow2(_)) => (false, image.encrypted()),
        _ => (true, false),
    };
    if raw && preallocation == Preallocation::Metadata {
        return Err(Error::new(
            Kind::InvalidArgument,
            "Unsupported preallocation mode: metadata",
        ));
    }
    let lengths: Vec<u64> = image
        .files()
        .iter()
        .map(BlockFile::len)
        .collect::<Result<_>>()?;
    change(image, size, shrink)?;
    let done = match image.files().first() {
        Some(file) if raw => reserve(file, old, preallocation),
        _ => preallocate(image, &lengths, old, preallocation, encrypted),
    };
    if done.is_err() && size > old && change(image, old, true).is_err() {
        // There is no room for what has to be written before the header: the size alone, then.
        take_back(image, old)?;
    }
    done
}

/// Let the header say the old size, and change nothing else: what is mapped behind the end is nobody's.
fn take_back(image: &Image, old: u64) -> Result<()> {
    let geometry = match image.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => qcow2.geometry,
        _ => return Ok(()),
    };
    set_size(image, &geometry, old)?;
    let missing = || Error::invalid("no such file");
    let file = image.files().get(geometry.file).ok_or_else(missing)?;
    file.write_at(&old.to_be_bytes(), field::SIZE as u64)?;
    file.sync()
}

fn change(image: &Image, size: u64, shrink: bool) -> Result<()> {
    image.writable()?;
    let size = size
        .checked_next_multiple_of(512)
        .filter(|size| *size <= i64::MAX as u64);
    let size = size.ok_or_else(|| {
        Error::new(
            Kind::InvalidArgument,
            "the disk would be larger than 2^63 bytes",
        )
    })?;
    let old = image.size();
    if size < old && !shrink {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the disk would lose its end: use --shrink",
        ));
    }
    if image.lock().epochs.under_way() > 0 {
        return Err(Error::new(
            Kind::InvalidState,
            "requests of this image are under way",
        ));
    }
    let qcow2 = image.lock().writer.is_some();
    if qcow2 {
        image.lock().check_sound()?;
    }
    let geometry = match image.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => {
            if size != old && qcow2.header.snapshots > 0 && qcow2.header.version < 3 {
                return Err(Error::unsupported(
                    "resizing an image of version 2 that has snapshots",
                ));
            }
            Some(qcow2.geometry)
        }
        _ => None,
    };
    let Some(geometry) = geometry else {
        return resize_raw(image, size);
    };
    if size != old {
        crate::qcow2::bitmaps::prepare_resize(image, size)?;
    }
    settle(image)?;
    if geometry.external_data() {
        if let Some(data) = image.files().get(geometry.data).filter(|data| data.regular) {
            data.set_len(size)?;
        }
    }
    if size >= old {
        grow(image, &geometry, old, size)?;
    } else {
        set_size(image, &geometry, size)?;
        commit(image)?;
        shrink_tables(image, &geometry, size)?;
    }
    settle(image)?;
    crate::qcow2::bitmaps::end_resize(image)
}

/// Let an active image hold nothing of its own any more: everything reads as in its backing file. No
/// request may be under way.
pub fn empty(image: &Image) -> Result<()> {
    image.writable()?;
    let geometry = match image.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => qcow2.geometry,
        _ => return Err(Error::unsupported("emptying a raw image")),
    };
    if image.lock().epochs.under_way() > 0 {
        return Err(Error::new(
            Kind::InvalidState,
            "requests of this image are under way",
        ));
    }
    settle(image)?;
    shrink_tables(image, &geometry, 0)?;
    settle(image)
}

fn resize_raw(image: &Image, size: u64) -> Result<()> {
    let file = image
        .files()
        .first()
        .ok_or_else(|| Error::invalid("no such file"))?;
    if file.regular {
        file.set_len(size)?;
    } else {
        // Whoever made it has resized it; the image follows.
        let len = file.len()?;
        if len != size {
            let message = format!("a block device is as large as it is, {len} bytes");
            return Err(Error::new(Kind::InvalidArgument, message));
        }
    }
    if let Some(Layer::Raw(raw)) = image.lock().layers.first_mut() {
        raw.size = size;
    }
    image.set_size(size);
    Ok(())
}

fn grow(image: &Image, geometry: &Geometry, old: u64, size: u64) -> Result<()> {
    let needed = l1_entries(size, geometry.cluster_bits, geometry.extended_l2);
    if needed * 8 > 32 << 20 {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the disk is too large for its clusters",
        ));
    }
    run(image, |state, waiter| {
        let (_, entries) = state.l1(geometry.layer).unwrap_or((HostOffset(0), 0));
        if needed <= entries {
            return Ok(());
        }
        move_l1(state, image, geometry, needed, waiter)
    })?;
    set_size(image, geometry, size)?;
    // What could show through in the new range. Until the commit the old size stands on the disk.
    let mut at = old;
    let end = if image.lock().layers.len() > 1 {
        size
    } else {
        old.next_multiple_of(geometry.cluster()).min(size)
    };
    while at < end {
        at += zero_step(image, at, end - at)?;
    }
    Ok(())
}

fn zero_step(image: &Image, at: u64, len: u64) -> Result<u64> {
    let how = Zeroing {
        required: true,
        unmap: true,
    };
    match run(image, |state, waiter| {
        state.plan_zero(image.files(), at, len, how, waiter)
    })? {
        ZeroStep::Done { len } | ZeroStep::Fallocate { len, .. } => Ok(len),
        ZeroStep::Write { len } => {
            let len = len.min(1 << 20);
            let step = run(image, |state, waiter| {
                state.plan_write(image.files(), at, len, false, waiter)
            })?;
            write_zeros(image, &step)?;
            Ok(step.len())
        }
    }
}

pub(crate) fn write_zeros(image: &Image, step: &WriteStep) -> Result<()> {
    let missing = || Error::invalid("no such file");
    match step {
        WriteStep::InPlace { file, offset, len } => image
            .files()
            .get(*file)
            .ok_or_else(missing)?
            .write_data_at(&vec![0; *len as usize], offset.0),
        WriteStep::Allocate(allocation) => {
            let file = image.files().get(allocation.file).ok_or_else(missing)?;
            let mut data = crate::blocking::fetch(image, &allocation.head)?;
            data.resize(data.len() + allocation.len as usize, 0);
            data.extend(crate::blocking::fetch(image, &allocation.tail)?);
            let written = file.write_data_at(&data, allocation.offset.0);
            image.finish(allocation.ticket, written.is_ok());
            written
        }
    }
}

/// Copy the L1 table to a larger place; the header in memory names it afterwards.
fn move_l1(
    state: &mut State,
    image: &Image,
    geometry: &Geometry,
    entries: u64,
    waiter: &crate::mailbox::Waiter,
) -> Planned<()> {
    let (old, old_entries) = state.l1(geometry.layer).unwrap_or((HostOffset(0), 0));
    let mut content = Vec::with_capacity(old_entries as usize);
    for index in 0..old_entries {
        content.push(state.table_entry(geometry, old, index, waiter)?);
    }
    let clusters = (entries * 8).div_ceil(geometry.cluster()).max(1);
    let run = state.allocate_area(image.files(), clusters, waiter)?;
    let new = run.offset(geometry);
    state.put_table(geometry, new, clusters * geometry.cluster(), &content);
    state
        .cache
        .forget(geometry.layer, old, old_entries * 8, geometry.block());
    if old_entries > 0 {
        state
            .writer()?
            .freed
            .push(refcount::clusters(geometry, old, old_entries * 8));
    }
    state.set_l1(new, entries as u32)?;
    Ok(())
}

fn set_size(image: &Image, geometry: &Geometry, size: u64) -> Result<()> {
    let mut state = image.lock();
    if let Some(Layer::Qcow2(qcow2)) = state.layers.get_mut(geometry.layer) {
        qcow2.header.size = size;
    }
    put64(state.writer()?.header.bytes_mut(), field::SIZE, size);
    state.cache_header()?;
    image.set_size(size);
    Ok(())
}

/// Unlink everything behind the end of the disk.
fn shrink_tables(image: &Image, geometry: &Geometry, size: u64) -> Result<()> {
    let first_cluster = size.div_ceil(geometry.cluster());
    let (l1, entries) = image
        .lock()
        .l1(geometry.layer)
        .unwrap_or((HostOffset(0), 0));
    let first_table = first_cluster / geometry.l2_entries();
    for index in first_table..entries {
        let from = if index == first_table {
            first_cluster % geometry.l2_entries()
        } else {
            0
        };
        for entry in from..geometry.l2_entries() {
            let more = run(image, |state, waiter| {
                unlink(state, image, geometry, (index, entry), waiter)
            })?;
            if !more {
                break;
            }
        }
        if from > 0 {
            continue;
        }
        run(image, |state, waiter| {
            let entry = state.table_entry(geometry, l1, index, waiter)?;
            if let Some(table) = decode_l1(geometry, entry)? {
                state.guard(geometry, l1.plus(index * 8), Holds::L1)?;
                state.guard_l2(geometry, table)?;
                state.set_table_entry(geometry, l1, index, 0, Class::Mapping);
                state.cache.forget(
                    geometry.layer,
                    table.offset,
                    geometry.cluster(),
                    geometry.block(),
                );
                state.writer()?.freed.push(refcount::clusters(
                    geometry,
                    table.offset,
                    geometry.cluster(),
                ));
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Unlink one cluster; false when there is no table for it at all.
fn unlink(
    state: &mut State,
    image: &Image,
    geometry: &Geometry,
    (index, entry): (u64, u64),
    waiter: &crate::mailbox::Waiter,
) -> Planned<bool> {
    if state.cache.crowded() || state.too_much_freed() {
        return Err(crate::plan::Stop::Commit);
    }
    let cluster = crate::types::GuestCluster(index * geometry.l2_entries() + entry);
    let Some(table) = state.l2_table(geometry, cluster, waiter)? else {
        return Ok(false);
    };
    let old = state.l2_entry(geometry, table.offset, entry, waiter)?;
    if old != L2Entry::default() {
        let table = state.writable_l2(geometry, image.files(), cluster, waiter)?;
        let mapping = old.decode(geometry)?;
        state.set_l2_entry(geometry, table, entry, L2Entry::default());
        state.discard_mapping(geometry, mapping);
    }
    Ok(true)
}

impl State {
    /// A table in the cache, which nothing on disk points to yet: `content`, then zeros.
    pub(crate) fn put_table(
        &mut self,
        geometry: &Geometry,
        offset: HostOffset,
        len: u64,
        content: &[u64],
    ) {
        let block = geometry.block();
        let per_block = (block / 8) as usize;
        for n in 0..len / block {
            let mut bytes = crate::buffer::Buffer::zeroed(block as usize);
            let part = content.iter().skip(n as usize * per_block).take(per_block);
            part.enumerate()
                .for_each(|(n, entry)| put64(bytes.bytes_mut(), n * 8, *entry));
            let at = block_of(geometry, offset.0 + n * block).offset;
            self.cache
                .put(geometry.layer, at, bytes, Some(Class::Unreferenced));
        }
    }

    /// The header names another L1 table from the next commit on.
    pub(crate) fn set_l1(&mut self, offset: HostOffset, entries: u32) -> Result<()> {
        if let Some(Layer::Qcow2(qcow2)) = self.layers.first_mut() {
            qcow2.header.l1_offset = offset.0;
            qcow2.header.l1_entries = entries;
        }
        let writer = self.writer()?;
        let clusters = refcount::clusters(&writer.geometry, offset, u64::from(entries) * 8);
        writer.metadata.add(clusters, Holds::L1);
        put64(writer.header.bytes_mut(), field::L1_OFFSET, offset.0);
        put32(writer.header.bytes_mut(), field::L1_SIZE, entries);
        self.cache_header()
    }
}
