// SPDX-License-Identifier: Apache-2.0
//! Internal snapshots: a second L1 table over the same L2 tables and clusters.
//!
//! Each of the operations changes counts, flags and tables of the whole image at once (switch.rs): after a
//! cut at any moment either nothing has happened or all of it has, and what is not used any more, or not
//! yet, leaks. `table` is the list of them, `tree` what lies below an L1 table.
//!
//! | operation | counts                                              | tables written anew                   |
//! |-----------|-----------------------------------------------------|---------------------------------------|
//! | create    | up below the L1 table                               | both L1 tables; L2 tables with COPIED flags, without them |
//! | delete    | down below the snapshot's L1 table                  | the L1 table; L2 tables of which clusters have become the disk's alone |
//! | apply     | up below the snapshot's L1 table, down below the old| the L1 table; before that COPIED flags below the snapshot's are cleared |

mod table;
mod tree;

use std::time::{SystemTime, UNIX_EPOCH};

use crate::blocking::{run, settle};
use crate::bytes::{be64, put32, put64};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::qcow2::entry::{COPIED, OFFSET};
use crate::qcow2::header::{field, l1_entries, Header};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::overlap::Holds;
use crate::qcow2::switch::Switch;
use crate::qcow2::{refcount, Geometry};
use crate::state::Layer;
use crate::types::HostOffset;

use table::serialize;
pub use table::Snapshot;
pub(crate) use table::{find, read_table};
use tree::{clear_flags, count_tree, with_flags, without_flags};

/// Bytes of an L1 table that are read at once.
const L1_PIECE: u64 = 1 << 20;

/// The snapshots of an image's active layer.
pub fn list(image: &Image) -> Result<Vec<Snapshot>> {
    let (header, geometry) = parts(image)?;
    let file = image.files().get(geometry.file).ok_or_else(no_file)?;
    Ok(read_table(file, &header)?.0)
}

/// Take a snapshot of an active image. No request may be under way.
pub fn create(image: &Image, name: &str) -> Result<Snapshot> {
    let (header, geometry) = begin(image)?;
    let (mut snapshots, old_len) = read_table(file_of(image, &geometry)?, &header)?;
    if snapshots.len() >= 65535 || name.len() > 65535 {
        return Err(Error::new(
            Kind::InvalidArgument,
            "too many snapshots, or too long a name",
        ));
    }
    let id = snapshots
        .iter()
        .filter_map(|snapshot| snapshot.id.parse::<u64>().ok())
        .max()
        .unwrap_or(0)
        + 1;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut snapshot = Snapshot {
        id: id.to_string(),
        name: name.to_owned(),
        date: (now.as_secs() as u32, now.subsec_nanos()),
        disk_size: Some(header.size),
        l1_entries: header.l1_entries,
        ..Snapshot::default()
    };
    snapshots.push(snapshot.clone());
    let l1 = read_l1(image, &geometry, header.l1_offset, header.l1_entries)?;
    let l1_len = l1.len() as u64 * 8;
    let own = l1.iter().filter(|entry| **entry & COPIED != 0).count() as u64;
    let table_len = serialize(&snapshots)?.len() as u64 * 8;
    // Before room is made for all of them.
    for entry in l1.iter().filter(|entry| **entry & COPIED != 0) {
        if let Some(table) = decode_l1(&geometry, *entry)? {
            image.lock().guard(&geometry, table.offset, Holds::L2)?;
        }
    }
    let mut switch = Switch::begin(image, &geometry, own, &[l1_len, l1_len, table_len])?;
    let done = without_flags(image, &geometry, &mut switch, l1).and_then(|l1| {
        count_tree(image, &geometry, &l1, true)?;
        let disk = switch.put(0, &l1)?;
        snapshot.l1_offset = switch.put(1, &l1)?.0;
        if let Some(last) = snapshots.last_mut() {
            last.l1_offset = snapshot.l1_offset;
        }
        Ok((disk, switch.put(2, &serialize(&snapshots)?)?))
    });
    let (disk, table) = match done {
        Ok(places) => places,
        Err(error) => return Err(switch.abandon(error)),
    };
    switch.retire(HostOffset(header.l1_offset), l1_len);
    switch.retire(HostOffset(header.snapshots_offset), old_len);
    switch.finish(|header, sector| {
        name_l1(header, sector, disk, snapshot.l1_entries);
        name_snapshots(header, sector, table, snapshots.len());
    })?;
    Ok(snapshot)
}

/// Delete a snapshot, by id or name.
pub fn delete(image: &Image, wanted: &str) -> Result<()> {
    let (header, geometry) = begin(image)?;
    let (mut snapshots, old_len) = read_table(file_of(image, &geometry)?, &header)?;
    let gone = snapshots.remove(find(&snapshots, wanted)?);
    let gone_l1 = read_l1(image, &geometry, gone.l1_offset, gone.l1_entries)?;
    let l1 = read_l1(image, &geometry, header.l1_offset, header.l1_entries)?;
    let l1_len = l1.len() as u64 * 8;
    let tables = l1.iter().filter(|entry| **entry & OFFSET != 0).count() as u64;
    let words = serialize(&snapshots)?;
    let mut switch = Switch::begin(image, &geometry, tables, &[l1_len, words.len() as u64 * 8])?;
    let done = count_tree(image, &geometry, &gone_l1, false)
        .and_then(|()| with_flags(image, &geometry, &mut switch, l1))
        .and_then(|l1| Ok((switch.put(0, &l1)?, switch.put(1, &words)?)));
    let (disk, table) = match done {
        Ok(places) => places,
        Err(error) => return Err(switch.abandon(error)),
    };
    switch.retire(HostOffset(header.l1_offset), l1_len);
    switch.retire(HostOffset(header.snapshots_offset), old_len);
    switch.retire(HostOffset(gone.l1_offset), gone_l1.len() as u64 * 8);
    let table = if snapshots.is_empty() {
        // Its area has become one that nothing points to.
        switch.retire(table, geometry.cluster());
        HostOffset(0)
    } else {
        table
    };
    switch.finish(|header, sector| {
        name_l1(header, sector, disk, header.l1_entries);
        name_snapshots(header, sector, table, snapshots.len());
    })
}

/// Go back to a snapshot, by id or name: the disk's content and size become what they were.
pub fn apply(image: &Image, wanted: &str) -> Result<()> {
    let (header, geometry) = begin(image)?;
    if !crate::qcow2::bitmaps::list(image)?.is_empty() {
        // They would not tell of what changes now; QEMU refuses too.
        let message =
            "Device has active dirty bitmaps: remove them before going back to a snapshot";
        return Err(Error::new(Kind::InvalidState, message));
    }
    let (snapshots, _) = read_table(file_of(image, &geometry)?, &header)?;
    let index = find(&snapshots, wanted)?;
    let snapshot = snapshots.get(index).cloned().unwrap_or_default();
    let size = snapshot
        .disk_size
        .filter(|size| *size > 0)
        .unwrap_or(header.size);
    let needed = l1_entries(size, geometry.cluster_bits, geometry.extended_l2);
    if needed > 4 << 20 || size > i64::MAX as u64 {
        return Err(Error::invalid("the snapshot's disk size is impossible"));
    }
    let mut new = read_l1(image, &geometry, snapshot.l1_offset, snapshot.l1_entries)?;
    let old = read_l1(image, &geometry, header.l1_offset, header.l1_entries)?;
    new.iter_mut().for_each(|entry| *entry &= !COPIED);
    new.resize(new.len().max(needed as usize), 0);
    clear_flags(image, &geometry, &new)?;
    let mut switch = Switch::begin(image, &geometry, 0, &[new.len() as u64 * 8])?;
    let done = count_tree(image, &geometry, &new, true)
        .and_then(|()| count_tree(image, &geometry, &old, false))
        .and_then(|()| switch.put(0, &new));
    let disk = match done {
        Ok(place) => place,
        Err(error) => return Err(switch.abandon(error)),
    };
    switch.retire(HostOffset(header.l1_offset), old.len() as u64 * 8);
    switch.finish(|header, sector| {
        name_l1(header, sector, disk, new.len() as u32);
        header.size = size;
        put64(sector, field::SIZE, size);
    })?;
    image.set_size(size);
    Ok(())
}

fn name_l1(header: &mut Header, sector: &mut [u8], offset: HostOffset, entries: u32) {
    header.l1_offset = offset.0;
    header.l1_entries = entries;
    put64(sector, field::L1_OFFSET, offset.0);
    put32(sector, field::L1_SIZE, entries);
}

fn name_snapshots(header: &mut Header, sector: &mut [u8], offset: HostOffset, number: usize) {
    header.snapshots = number as u32;
    header.snapshots_offset = offset.0;
    put32(sector, field::SNAPSHOTS, header.snapshots);
    put64(sector, field::SNAPSHOTS_OFFSET, offset.0);
}

fn begin(image: &Image) -> Result<(Header, Geometry)> {
    image.writable()?;
    let (_, geometry) = parts(image)?;
    if !image.active() || image.lock().epochs.under_way() > 0 {
        return Err(Error::new(
            Kind::InvalidState,
            "snapshots need an active image without requests under way",
        ));
    }
    if geometry.external_data() {
        return Err(Error::unsupported(
            "snapshots of an image with an external data file",
        ));
    }
    image.lock().check_sound()?;
    settle(image)?;
    parts(image)
}

fn parts(image: &Image) -> Result<(Header, Geometry)> {
    match image.lock().layers.first() {
        Some(Layer::Qcow2(qcow2)) => Ok((qcow2.header.clone(), qcow2.geometry)),
        _ => Err(Error::unsupported("snapshots in a raw image")),
    }
}

pub(crate) fn file_of<'a>(image: &'a Image, geometry: &Geometry) -> Result<&'a BlockFile> {
    image.files().get(geometry.file).ok_or_else(no_file)
}

pub(crate) fn read_l1(
    image: &Image,
    geometry: &Geometry,
    offset: u64,
    entries: u32,
) -> Result<Vec<u64>> {
    let file = file_of(image, geometry)?;
    if offset.saturating_add(u64::from(entries) * 8)
        > file.len()?.next_multiple_of(geometry.cluster())
    {
        return Err(Error::invalid(
            "an L1 table lies beyond the end of the file",
        ));
    }
    let len = u64::from(entries) * 8;
    let mut l1 = Vec::with_capacity(entries as usize);
    let mut piece = vec![0u8; len.min(L1_PIECE) as usize];
    for at in (0..len).step_by(L1_PIECE as usize) {
        let now = piece.get_mut(..(len - at).min(L1_PIECE) as usize);
        let now = now.unwrap_or(&mut []);
        file.read_at(now, offset + at)?;
        let words = now.chunks_exact(8);
        l1.extend(words.map(|entry| be64(entry, 0).unwrap_or(0)));
    }
    for entry in &l1 {
        decode_l1(geometry, *entry)?;
    }
    Ok(l1)
}

/// A new table with this content, durable with the next commit.
pub(crate) fn new_table(image: &Image, geometry: &Geometry, content: &[u64]) -> Result<HostOffset> {
    let clusters = (content.len() as u64 * 8)
        .div_ceil(geometry.cluster())
        .max(1);
    run(image, |state, waiter| {
        let area = state
            .allocate_area(image.files(), clusters, waiter)?
            .offset(geometry);
        state.put_table(geometry, area, clusters * geometry.cluster(), content);
        Ok(area)
    })
}

/// Clusters that nothing on disk points to any more.
pub(crate) fn free_area(image: &Image, geometry: &Geometry, offset: u64, len: u64) -> Result<()> {
    let mut state = image.lock();
    state
        .cache
        .forget(geometry.layer, HostOffset(offset), len, geometry.block());
    state
        .writer()?
        .freed
        .push(refcount::clusters(geometry, HostOffset(offset), len));
    Ok(())
}

fn no_file() -> Error {
    Error::invalid("no such file in the chain")
}
