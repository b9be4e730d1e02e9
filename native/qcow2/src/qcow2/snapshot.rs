// SPDX-License-Identifier: Apache-2.0
//! Internal snapshots: a second L1 table over the same L2 tables and clusters.
//!
//! Each of the operations changes counts, flags and tables of the whole image at once (switch.rs): after a
//! cut at any moment either nothing has happened or all of it has, and what is not used any more, or not
//! yet, leaks.
//!
//! | operation | counts                                              | tables written anew                   |
//! |-----------|-----------------------------------------------------|---------------------------------------|
//! | create    | up below the L1 table                               | both L1 tables; L2 tables with COPIED flags, without them |
//! | delete    | down below the snapshot's L1 table                  | the L1 table; L2 tables of which clusters have become the disk's alone |
//! | apply     | up below the snapshot's L1 table, down below the old| the L1 table                          |

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::blocking::{run, settle};
use crate::bytes::{be16, be32, be64, put32, put64};
use crate::cache::{Block, Class};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED, OFFSET};
use crate::qcow2::header::{field, l1_entries, Header};
use crate::qcow2::mapping::decode_l1;
use crate::qcow2::overlap::Holds;
use crate::qcow2::switch::Switch;
use crate::qcow2::{refcount, Geometry};
use crate::state::{Layer, State};
use crate::types::{HostCluster, HostOffset};

/// The largest snapshot table (QEMU takes 64 MiB; names and all, 65,535 snapshots need a third of this),
/// and the extra data of one entry that QEMU takes.
const MAX_TABLE: u64 = 16 << 20;
const MAX_EXTRA: u32 = 1024;
/// Bytes of an L1 table that are read at once.
const L1_PIECE: u64 = 1 << 20;

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    /// A number as a string, unique in the image.
    pub id: String,
    /// The user's name for it.
    pub name: String,
    /// When it was made: seconds since 1970 and nanoseconds.
    pub date: (u32, u32),
    /// The guest's running time in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of saved machine state behind the disk.
    pub vm_state_size: u64,
    /// The disk's size then, in bytes; None in images older than that field.
    pub disk_size: Option<u64>,
    /// Instructions executed, where QEMU counts them.
    pub icount: Option<u64>,
    pub(crate) l1_offset: u64,
    pub(crate) l1_entries: u32,
    /// Extra data that this version does not know.
    pub(crate) extra: Vec<u8>,
}

impl Snapshot {
    fn parse(bytes: &[u8]) -> Option<(Snapshot, usize)> {
        let extra_len = be32(bytes, 36)?;
        let (id_len, name_len) = (usize::from(be16(bytes, 12)?), usize::from(be16(bytes, 14)?));
        if extra_len > MAX_EXTRA {
            return None;
        }
        let extra_end = 40 + extra_len as usize;
        let extra = bytes.get(40..extra_end)?;
        let id = bytes.get(extra_end..extra_end + id_len)?;
        let name = bytes.get(extra_end + id_len..extra_end + id_len + name_len)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let snapshot = Snapshot {
            id: text(id),
            name: text(name),
            date: (be32(bytes, 16)?, be32(bytes, 20)?),
            vm_clock: be64(bytes, 24)?,
            vm_state_size: be64(extra, 0).unwrap_or(u64::from(be32(bytes, 32)?)),
            disk_size: be64(extra, 8),
            icount: be64(extra, 16).filter(|icount| *icount != u64::MAX),
            l1_offset: be64(bytes, 0)?,
            l1_entries: be32(bytes, 8)?,
            extra: extra.get(24..).unwrap_or(&[]).to_vec(),
        };
        Some((
            snapshot,
            (extra_end + id_len + name_len).next_multiple_of(8),
        ))
    }

    fn serialize(&self) -> Vec<u8> {
        let mut out = vec![0u8; 40];
        put64(&mut out, 0, self.l1_offset);
        put32(&mut out, 8, self.l1_entries);
        put32(
            &mut out,
            12,
            (self.id.len() as u32) << 16 | self.name.len() as u32,
        );
        put32(&mut out, 16, self.date.0);
        put32(&mut out, 20, self.date.1);
        put64(&mut out, 24, self.vm_clock);
        put32(&mut out, 32, u32::try_from(self.vm_state_size).unwrap_or(0));
        put32(&mut out, 36, 24 + self.extra.len() as u32);
        out.extend(self.vm_state_size.to_be_bytes());
        out.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        out.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(&self.extra);
        out.extend(self.id.as_bytes());
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

/// Read the snapshot table; also gives its length in bytes.
pub(crate) fn read_table(file: &BlockFile, header: &Header) -> Result<(Vec<Snapshot>, u64)> {
    if header.snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    let room = file
        .len()?
        .saturating_sub(header.snapshots_offset)
        .min(MAX_TABLE);
    let mut snapshots = Vec::new();
    let mut at = 0u64;
    let mut piece = Vec::new();
    for _ in 0..header.snapshots {
        // An entry is at most 40 + 1024 + 2 × 65535 bytes long.
        piece.resize((room - at.min(room)).min(40 + 1024 + 2 * 65536) as usize, 0);
        file.read_at(&mut piece, header.snapshots_offset.saturating_add(at))?;
        let (snapshot, len) = Snapshot::parse(&piece)
            .ok_or_else(|| Error::invalid("the snapshot table is cut short"))?;
        if snapshot.l1_entries > 4 << 20 {
            return Err(Error::invalid(format!(
                "snapshot '{}' has an impossible L1 table",
                snapshot.name.escape_debug()
            )));
        }
        snapshots.push(snapshot);
        at += len as u64;
        // The last entry's padding may lie behind the end of the file.
        if at > room.next_multiple_of(8) {
            return Err(Error::invalid(
                "the snapshot table is cut short or larger than 16 MiB",
            ));
        }
    }
    Ok((snapshots, at))
}

/// The snapshots of an image's active layer.
pub fn list(image: &Image) -> Result<Vec<Snapshot>> {
    let (header, geometry) = parts(image)?;
    let file = image.files().get(geometry.file).ok_or_else(no_file)?;
    Ok(read_table(file, &header)?.0)
}

/// The snapshot with this id, else with this name.
pub(crate) fn find(snapshots: &[Snapshot], wanted: &str) -> Result<usize> {
    let by_id = snapshots.iter().position(|snapshot| snapshot.id == wanted);
    let found = by_id.or_else(|| {
        snapshots
            .iter()
            .position(|snapshot| snapshot.name == wanted)
    });
    found.ok_or_else(|| {
        Error::new(
            Kind::InvalidArgument,
            format!("no snapshot '{}'", wanted.escape_debug()),
        )
    })
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

/// A snapshot table in words.
fn serialize(snapshots: &[Snapshot]) -> Result<Vec<u64>> {
    let mut bytes: Vec<u8> = snapshots.iter().flat_map(Snapshot::serialize).collect();
    if bytes.len() as u64 > MAX_TABLE {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the snapshot table would be too large",
        ));
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let words = bytes.chunks_exact(8);
    Ok(words.map(|word| be64(word, 0).unwrap_or(0)).collect())
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

/// Count everything below an L1 table up or down by one, in the copies of the counts.
fn count_tree(image: &Image, geometry: &Geometry, l1: &[u64], up: bool) -> Result<()> {
    let mut bytes = vec![0u8; geometry.cluster() as usize];
    for entry in l1 {
        let Some(table) = decode_l1(geometry, *entry)? else {
            continue;
        };
        file_of(image, geometry)?.read_at(&mut bytes, table.offset.0)?;
        let mut runs: Vec<Range<u64>> = vec![refcount::clusters(
            geometry,
            table.offset,
            geometry.cluster(),
        )];
        for entry in L2Entry::all(geometry, &bytes) {
            let range = match entry.decode(geometry)? {
                Mapping::Compressed { host, stored } => refcount::clusters(geometry, host, stored),
                mapping => match mapping.host() {
                    Some((host, _)) => refcount::clusters(geometry, host, geometry.cluster()),
                    None => continue,
                },
            };
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        for mut range in runs {
            // The range shrinks as it is counted, so that going on after a stop counts nothing twice.
            run(image, |state, waiter| {
                state.count_run(geometry, &mut range, up, waiter)
            })?;
        }
    }
    Ok(())
}

/// The L1 table as it is when no cluster below it is the disk's alone any more: the L2 tables that had flags
/// are written elsewhere.
fn without_flags(
    image: &Image,
    geometry: &Geometry,
    switch: &mut Switch,
    mut l1: Vec<u64>,
) -> Result<Vec<u64>> {
    let file = file_of(image, geometry)?;
    let size = geometry.l2_entry_size() as usize;
    let mut bytes = vec![0u8; geometry.cluster() as usize];
    for entry in &mut l1 {
        let Some(table) = decode_l1(geometry, *entry)?.filter(|table| table.copied) else {
            continue;
        };
        file.read_at(&mut bytes, table.offset.0)?;
        for at in (0..bytes.len()).step_by(size) {
            let word = be64(&bytes, at).unwrap_or(0);
            put64(&mut bytes, at, word & !COPIED);
        }
        *entry = move_l2(image, geometry, switch, table.offset, &bytes)?.0;
    }
    Ok(l1)
}

/// The L1 table with flags as the copied counts say; L2 tables whose flags change are written elsewhere.
fn with_flags(
    image: &Image,
    geometry: &Geometry,
    switch: &mut Switch,
    mut l1: Vec<u64>,
) -> Result<Vec<u64>> {
    let file = file_of(image, geometry)?;
    let size = geometry.l2_entry_size() as usize;
    let mut before = vec![0u8; geometry.cluster() as usize];
    let mut counts = Counts::default();
    for entry in &mut l1 {
        let Some(table) = decode_l1(geometry, *entry)? else {
            continue;
        };
        let cluster = table.offset.0 >> geometry.cluster_bits;
        if counts.get(image, geometry, cluster)? != 1 {
            *entry &= !COPIED;
            continue;
        }
        file.read_at(&mut before, table.offset.0)?;
        let mut after = before.clone();
        for (n, l2) in L2Entry::all(geometry, &before).enumerate() {
            let Some((host, false)) = l2.decode(geometry)?.host() else {
                continue;
            };
            let cluster = host.0 >> geometry.cluster_bits;
            if counts.get(image, geometry, cluster)? == 1 {
                put64(&mut after, n * size, l2.word | COPIED);
            }
        }
        *entry = if after == before {
            table.offset.0 | COPIED
        } else {
            move_l2(image, geometry, switch, table.offset, &after)?.0 | COPIED
        };
    }
    Ok(l1)
}

/// Write an L2 table with this content elsewhere; its old place is nobody's once the header changes.
fn move_l2(
    image: &Image,
    geometry: &Geometry,
    switch: &mut Switch,
    old: HostOffset,
    content: &[u8],
) -> Result<HostOffset> {
    let place = switch.spare()?;
    file_of(image, geometry)?.write_at(content, place.0)?;
    let mut state = image.lock();
    let (layer, cluster, block) = (geometry.layer, geometry.cluster(), geometry.block());
    state.cache.forget(layer, place, cluster, block);
    drop(state);
    switch.retire(old, cluster);
    Ok(place)
}

/// Refcounts of neighbours, with one look into the cache for many.
#[derive(Default)]
struct Counts {
    clusters: Range<u64>,
    block: Option<Block>,
}

impl Counts {
    fn get(&mut self, image: &Image, geometry: &Geometry, cluster: u64) -> Result<u64> {
        if !self.clusters.contains(&cluster) {
            let found = run(image, |state, waiter| {
                let Some(place) = state.count_place(geometry, HostCluster(cluster)) else {
                    return Ok(None);
                };
                let block = state.cache.fetch(place.need, waiter)?.clone();
                Ok(Some((block, cluster - place.index)))
            })?;
            let Some((block, start)) = found else {
                return Ok(0);
            };
            self.block = Some(block);
            self.clusters = start..start + ((geometry.block() * 8) >> geometry.refcount_order);
        }
        let bytes = self.block.as_ref().map_or(&[][..], |block| block.bytes());
        Ok(refcount::get(
            bytes,
            geometry.refcount_order,
            cluster - self.clusters.start,
        ))
    }
}

impl State {
    /// Count a run of clusters up or down by one; what is done is cut off the front of `range`.
    fn count_run(
        &mut self,
        geometry: &Geometry,
        range: &mut Range<u64>,
        up: bool,
        waiter: &Waiter,
    ) -> Planned<()> {
        while !range.is_empty() {
            if self.cache.crowded() {
                return Err(Stop::Commit);
            }
            let Some(place) = self.count_place(geometry, HostCluster(range.start)) else {
                return Err(Stop::Fail(Error::invalid(format!(
                    "cluster {:#x} is in use, but not counted",
                    range.start
                ))));
            };
            let order = geometry.refcount_order;
            let here =
                (((geometry.block() * 8) >> order) - place.index).min(range.end - range.start);
            self.guard_counts(geometry, range.start..range.start + 1)?;
            let block = self.cache.fetch(place.need, waiter)?;
            let counts = |n: u64| refcount::get(block.bytes(), order, place.index + n);
            if up && (0..here).any(|n| counts(n) >= geometry.max_refcount()) {
                return Err(Stop::Fail(Error::unsupported(
                    "a refcount would exceed the image's refcount width",
                )));
            }
            if let Some(bytes) =
                self.cache
                    .modify(geometry.layer, place.need.offset, Class::Unreferenced)
            {
                for n in place.index..place.index + here {
                    let count = refcount::get(bytes, order, n);
                    let next = if up {
                        count + 1
                    } else {
                        count.saturating_sub(1)
                    };
                    refcount::set(bytes, order, n, next);
                }
            }
            if !up {
                self.may_be_free(range.start);
            }
            range.start += here;
        }
        Ok(())
    }
}

fn no_file() -> Error {
    Error::invalid("no such file in the chain")
}
