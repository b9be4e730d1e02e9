// SPDX-License-Identifier: Apache-2.0
//! Internal snapshots: a second L1 table over the same L2 tables and clusters.
//!
//! Each of the operations is a list of steps, and each step is durable before the next begins. What
//! a power cut between them leaves is told on the right; nothing of it needs repair.
//!
//! | create                                                | after a cut behind it              |
//! |-------------------------------------------------------|------------------------------------|
//! | copy of the L1 table, counts up, COPIED flags cleared | counts too high: leaks             |
//! | new snapshot table                                    | the same                           |
//! | header names it                                       | done; the old table leaks          |
//!
//! | delete                          |                                     |
//! |---------------------------------|-------------------------------------|
//! | new snapshot table              | a leaked table                      |
//! | header names it                 | the snapshot is gone, its clusters leak |
//! | counts down                     | COPIED flags are missing            |
//! | COPIED flags set                | done                                |
//!
//! | apply                                    |                                     |
//! |------------------------------------------|-------------------------------------|
//! | copy of the snapshot's L1, counts up     | leaks                               |
//! | header names it, and the disk's size     | applied; the old state leaks        |
//! | counts down, COPIED flags set            | done                                |
//!
//! A missing COPIED flag costs a needless copy at the next write; check -r sets it.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::blocking::{commit, run, settle};
use crate::bytes::{be16, be32, be64, put32, put64};
use crate::cache::{Block, Class};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
use crate::qcow2::entry::{L2Entry, Mapping, COPIED};
use crate::qcow2::header::{field, l1_entries, Header};
use crate::qcow2::mapping::{block_of, decode_l1};
use crate::qcow2::overlap::Holds;
use crate::qcow2::{refcount, Geometry};
use crate::state::{Layer, State};
use crate::types::{HostCluster, HostOffset};

/// The largest snapshot table (QEMU takes 64 MiB; names and all, 65,535 snapshots need a third of this),
/// and the extra data of one entry that QEMU takes.
const MAX_TABLE: u64 = 16 << 20;
const MAX_EXTRA: u32 = 1024;

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
    let l1 = read_l1(image, &geometry, header.l1_offset, header.l1_entries)?;
    let copy: Vec<u64> = l1.iter().map(|entry| entry & !COPIED).collect();
    let area = new_table(image, &geometry, &copy)?;
    count_or_free(image, &geometry, &l1, area)?;
    clear_copied(image, &geometry, header.l1_offset, &l1)?;
    let id = snapshots
        .iter()
        .filter_map(|snapshot| snapshot.id.parse::<u64>().ok())
        .max()
        .unwrap_or(0)
        + 1;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let snapshot = Snapshot {
        id: id.to_string(),
        name: name.to_owned(),
        date: (now.as_secs() as u32, now.subsec_nanos()),
        disk_size: Some(header.size),
        l1_offset: area.0,
        l1_entries: header.l1_entries,
        ..Snapshot::default()
    };
    snapshots.push(snapshot.clone());
    switch_table(image, &geometry, &header, &snapshots, old_len)?;
    settle(image)?;
    image.lock().reread_metadata(image.files())?;
    Ok(snapshot)
}

/// Delete a snapshot, by id or name.
pub fn delete(image: &Image, wanted: &str) -> Result<()> {
    let (header, geometry) = begin(image)?;
    let (mut snapshots, old_len) = read_table(file_of(image, &geometry)?, &header)?;
    let gone = snapshots.remove(find(&snapshots, wanted)?);
    let l1 = read_l1(image, &geometry, gone.l1_offset, gone.l1_entries)?;
    switch_table(image, &geometry, &header, &snapshots, old_len)?;
    count_tree(image, &geometry, &l1, false)?;
    image.lock().reread_metadata(image.files())?;
    free_area(
        image,
        &geometry,
        gone.l1_offset,
        u64::from(gone.l1_entries) * 8,
    )?;
    set_copied(image, &geometry)?;
    settle(image)
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
    let area = new_table(image, &geometry, &new)?;
    count_or_free(image, &geometry, &new, area)?;
    commit(image)?;
    {
        let mut state = image.lock();
        state.set_l1(area, new.len() as u32)?;
        if let Some(Layer::Qcow2(qcow2)) = state.layers.first_mut() {
            qcow2.header.size = size;
        }
        put64(state.writer()?.header.bytes_mut(), field::SIZE, size);
        state.cache_header()?;
    }
    commit(image)?;
    image.set_size(size);
    count_tree(image, &geometry, &old, false)?;
    image.lock().reread_metadata(image.files())?;
    free_area(
        image,
        &geometry,
        header.l1_offset,
        u64::from(header.l1_entries) * 8,
    )?;
    set_copied(image, &geometry)?;
    settle(image)
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
    let mut bytes = vec![0u8; entries as usize * 8];
    file_of(image, geometry)?.read_at(&mut bytes, offset)?;
    let l1: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|entry| be64(entry, 0).unwrap_or(0))
        .collect();
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

/// Write a new snapshot table and let the header name it.
fn switch_table(
    image: &Image,
    geometry: &Geometry,
    header: &Header,
    snapshots: &[Snapshot],
    old_len: u64,
) -> Result<()> {
    let mut bytes: Vec<u8> = snapshots.iter().flat_map(Snapshot::serialize).collect();
    if bytes.len() as u64 > MAX_TABLE {
        return Err(Error::new(
            Kind::InvalidArgument,
            "the snapshot table would be too large",
        ));
    }
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let offset = if snapshots.is_empty() {
        HostOffset(0)
    } else {
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| be64(word, 0).unwrap_or(0))
            .collect();
        new_table(image, geometry, &words)?
    };
    commit(image)?;
    {
        let mut state = image.lock();
        if let Some(Layer::Qcow2(qcow2)) = state.layers.first_mut() {
            qcow2.header.snapshots = snapshots.len() as u32;
            qcow2.header.snapshots_offset = offset.0;
        }
        let first = state.writer()?.header.bytes_mut();
        put32(first, field::SNAPSHOTS, snapshots.len() as u32);
        put64(first, field::SNAPSHOTS_OFFSET, offset.0);
        state.cache_header()?;
    }
    commit(image)?;
    if old_len > 0 {
        free_area(image, geometry, header.snapshots_offset, old_len)?;
    }
    Ok(())
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

/// Count everything below an L1 table up or down by one. (Both are allowed at once: up before
/// anything on disk points there, down after nothing does.) Counting up is undone when it fails.
fn count_tree(image: &Image, geometry: &Geometry, l1: &[u64], up: bool) -> Result<()> {
    let mut counted = 0;
    let result = count_some(image, geometry, l1, up, u64::MAX, &mut counted);
    if result.is_err() && up {
        count_some(image, geometry, l1, false, counted, &mut 0)?;
    }
    result
}

/// Count up for a new L1 table at `area`; if that fails the table goes, too.
fn count_or_free(image: &Image, geometry: &Geometry, l1: &[u64], area: HostOffset) -> Result<()> {
    let result = count_tree(image, geometry, l1, true);
    if result.is_err() {
        free_area(image, geometry, area.0, (l1.len() as u64 * 8).max(1))?;
        settle(image)?;
    }
    result
}

/// Count the first `limit` clusters below an L1 table; `counted` tells how many were, also after an error.
fn count_some(
    image: &Image,
    geometry: &Geometry,
    l1: &[u64],
    up: bool,
    limit: u64,
    counted: &mut u64,
) -> Result<()> {
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
            range.end = range.end.min(range.start.saturating_add(limit - *counted));
            let start = range.start;
            // The range shrinks as it is counted, so that going on after a stop counts nothing twice.
            let result = run(image, |state, waiter| {
                state.count_run(geometry, &mut range, up, waiter)
            });
            *counted += range.start - start;
            result?;
        }
    }
    Ok(())
}

/// No cluster below the active L1 table is ours alone any more.
fn clear_copied(image: &Image, geometry: &Geometry, l1_offset: u64, l1: &[u64]) -> Result<()> {
    for (index, entry) in l1.iter().enumerate() {
        let Some(table) = decode_l1(geometry, *entry)? else {
            continue;
        };
        each_block(image, geometry, table.offset, |_, entries, _| {
            entries.iter_mut().for_each(|entry| entry.word &= !COPIED);
            Ok(())
        })?;
        run(image, |state, waiter| {
            let l1 = HostOffset(l1_offset);
            let entry = state.table_entry(geometry, l1, index as u64, waiter)?;
            state.guard(geometry, l1.plus(index as u64 * 8), Holds::L1)?;
            state.set_table_entry(geometry, l1, index as u64, entry & !COPIED, Class::Mapping);
            Ok(())
        })?;
    }
    Ok(())
}

/// Set the COPIED flag wherever the refcount has become one.
fn set_copied(image: &Image, geometry: &Geometry) -> Result<()> {
    let (l1, entries) = image
        .lock()
        .l1(geometry.layer)
        .unwrap_or((HostOffset(0), 0));
    for index in 0..entries {
        let table = run(image, |state, waiter| {
            let entry = state.table_entry(geometry, l1, index, waiter)?;
            let Some(table) = decode_l1(geometry, entry)? else {
                return Ok(None);
            };
            let cluster = HostCluster(table.offset.0 >> geometry.cluster_bits);
            if !table.copied && state.refcount(geometry, cluster, waiter)? == 1 {
                state.guard(geometry, l1.plus(index * 8), Holds::L1)?;
                state.set_table_entry(geometry, l1, index, entry | COPIED, Class::Mapping);
            }
            Ok(Some(table))
        })?;
        let Some(table) = table else { continue };
        each_block(image, geometry, table.offset, |state, entries, waiter| {
            let mut counts = Counts::default();
            for entry in entries.iter_mut() {
                let Some((host, false)) = entry.decode(geometry)?.host() else {
                    continue;
                };
                if counts.get(state, geometry, host.0 >> geometry.cluster_bits, waiter)? == 1 {
                    entry.word |= COPIED;
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Refcounts of neighbours, with one look into the cache for many.
#[derive(Default)]
struct Counts {
    clusters: Range<u64>,
    first: u64,
    block: Option<Block>,
}

impl Counts {
    fn get(
        &mut self,
        state: &mut State,
        geometry: &Geometry,
        cluster: u64,
        waiter: &Waiter,
    ) -> Planned<u64> {
        if !self.clusters.contains(&cluster) {
            let Some(place) = state.count_place(geometry, HostCluster(cluster)) else {
                return Ok(0);
            };
            self.block = Some(state.cache.fetch(place.need, waiter)?.clone());
            let start = cluster - place.index;
            self.clusters = start..start + ((geometry.block() * 8) >> geometry.refcount_order);
            self.first = start;
        }
        let bytes = self.block.as_ref().map_or(&[][..], |block| block.bytes());
        Ok(refcount::get(
            bytes,
            geometry.refcount_order,
            cluster - self.first,
        ))
    }
}

/// Let `change` look at an L2 table's entries, a cached block at a time, and write back what it
/// changed. A stop repeats the block.
fn each_block(
    image: &Image,
    geometry: &Geometry,
    table: HostOffset,
    mut change: impl FnMut(&mut State, &mut [L2Entry], &Waiter) -> Planned<()>,
) -> Result<()> {
    let block = geometry.block();
    for at in (0..geometry.cluster()).step_by(block as usize) {
        run(image, |state, waiter| {
            if state.cache.crowded() {
                return Err(Stop::Commit);
            }
            let need = block_of(geometry, table.0 + at);
            let bytes = state.cache.fetch(need, waiter)?.bytes();
            let before: Vec<L2Entry> = L2Entry::all(geometry, bytes).collect();
            let mut entries = before.clone();
            change(state, &mut entries, waiter)?;
            if entries != before {
                state.guard(geometry, table, Holds::L2)?;
                if let Some(bytes) = state
                    .cache
                    .modify(geometry.layer, need.offset, Class::Mapping)
                {
                    let size = geometry.l2_entry_size() as usize;
                    // Only flags are changed here, which are in the first word.
                    for (n, entry) in entries.iter().enumerate() {
                        put64(bytes, n * size, entry.word);
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
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
