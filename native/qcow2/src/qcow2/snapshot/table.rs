// SPDX-License-Identifier: Apache-2.0
//! The snapshot table: parsed into snapshots, found by id or name, and written again.
//!
//! Layout: QEMU's docs/interop/qcow2.txt, "Snapshots". Whatever the header says, no more than
//! [`MAX_TABLE`] bytes are looked at.

use crate::bytes::{be16, be32, be64, put32, put64};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::qcow2::header::Header;

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

/// A snapshot table in words.
pub(super) fn serialize(snapshots: &[Snapshot]) -> Result<Vec<u64>> {
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
