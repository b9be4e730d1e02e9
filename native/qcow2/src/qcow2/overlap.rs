// SPDX-License-Identifier: Apache-2.0
//! The overlap check: nothing is written to a cluster that holds something else.
//!
//! For each cluster of metadata of the image that is open for writing, `Metadata` knows what it holds. It
//! is made when the image is opened, kept up as tables come and go, and made anew after snapshot
//! operations. It is asked before
//!
//! | what is written                    | what its cluster may hold                                |
//! |------------------------------------|----------------------------------------------------------|
//! | guest data in place, a punched hole| no metadata                                              |
//! | anything newly allocated           | no metadata                                              |
//! | an L1 or L2 entry                  | that table of the active disk, once: none of a snapshot's|
//! | a refcount, a refcount table entry | that table, once                                         |
//!
//! and before a cluster to which a mapping pointed is freed. A sound image never answers no. One that
//! does is damaged: it is marked corrupt in its header (version 3), nothing is written to it through a
//! mapping any more, and each such request says why. What was written before still reaches the disk.
//!
//! Sizes are bounded: 4 bytes and two of flags a cluster, `MOST` clusters. What of a table larger than
//! that is not known is not held against anybody; the snapshots' L2 tables are known as long as their
//! L1 tables together are at most `SNAPSHOT_L1`.

use std::collections::HashMap;

use crate::bytes::{be16, be32, be64, put64};
use crate::error::{Error, Result};
use crate::file::BlockFile;
use crate::qcow2::header::{autoclear, extension, field, incompatible, CryptMethod, Header};
use crate::qcow2::mapping::{decode_l1, L2Table};
use crate::qcow2::{refcount, snapshot, Geometry};
use crate::state::{Layer, State};
use crate::types::HostOffset;

/// The most clusters that are known.
const MOST: usize = 7 << 19;
/// The most bytes of snapshots' L1 tables that are read.
const SNAPSHOT_L1: u64 = 16 << 20;

/// What a cluster of metadata holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holds {
    /// The image's header.
    Header = 1,
    /// The L1 table of the active disk.
    L1 = 2,
    /// An L2 table of the active disk.
    L2 = 4,
    /// The refcount table.
    RefcountTable = 8,
    /// A refcount block.
    RefcountBlock = 16,
    /// The snapshot table, or a snapshot's L1 table.
    Snapshots = 32,
    /// An L2 table of a snapshot.
    SnapshotL2 = 64,
    /// The bitmap directory, a bitmap's table, or a bitmap.
    Bitmaps = 128,
    /// The LUKS header with its key material.
    Luks = 512,
}

/// Two of the same kind lie there.
const TWICE: u16 = 256;

/// What is known about the clusters of one image.
#[derive(Default)]
pub(crate) struct Metadata {
    known: HashMap<u32, u16>,
    /// The first reason why the image was found damaged.
    corrupt: Option<Error>,
}

impl Metadata {
    /// Read what the tables of an image say. Tables that cannot be read are left out: whoever uses them
    /// meets the error.
    pub(crate) fn read(
        file: &BlockFile,
        header: &Header,
        geometry: &Geometry,
        reftable: &[u64],
    ) -> Result<Metadata> {
        let mut metadata = Metadata::default();
        let cluster = geometry.cluster();
        let range = |offset: u64, len: u64| refcount::clusters(geometry, HostOffset(offset), len);
        metadata.add(range(0, 1), Holds::Header);
        metadata.add(
            range(
                header.reftable_offset,
                u64::from(header.reftable_clusters) * cluster,
            ),
            Holds::RefcountTable,
        );
        for offset in reftable.iter().filter(|offset| **offset != 0) {
            metadata.add(range(*offset, cluster), Holds::RefcountBlock);
        }
        let l1_len = u64::from(header.l1_entries) * 8;
        metadata.add(range(header.l1_offset, l1_len), Holds::L1);
        metadata.add_l2(file, geometry, (header.l1_offset, l1_len), Holds::L2)?;
        if let CryptMethod::Luks { offset, len } = header.crypt {
            metadata.add(range(offset, len), Holds::Luks);
        }
        metadata.add_snapshots(file, header, geometry)?;
        metadata.add_bitmaps(file, header, geometry)?;
        Ok(metadata)
    }

    fn add_snapshots(
        &mut self,
        file: &BlockFile,
        header: &Header,
        geometry: &Geometry,
    ) -> Result<()> {
        let Ok((snapshots, len)) = snapshot::read_table(file, header) else {
            return Ok(());
        };
        let range = |offset: u64, len: u64| refcount::clusters(geometry, HostOffset(offset), len);
        self.add(range(header.snapshots_offset, len), Holds::Snapshots);
        let mut room = SNAPSHOT_L1;
        let file_len = file.len()?;
        for snapshot in snapshots {
            let len = u64::from(snapshot.l1_entries) * 8;
            if snapshot.l1_offset.saturating_add(len) > file_len {
                continue;
            }
            self.add(range(snapshot.l1_offset, len), Holds::Snapshots);
            room = room.saturating_sub(len);
            if room > 0 {
                let l1 = (snapshot.l1_offset, len);
                self.add_l2(file, geometry, l1, Holds::SnapshotL2)?;
            }
        }
        Ok(())
    }

    /// The L2 tables that an L1 table (offset and bytes) points to.
    fn add_l2(
        &mut self,
        file: &BlockFile,
        geometry: &Geometry,
        (offset, len): (u64, u64),
        holds: Holds,
    ) -> Result<()> {
        const PIECE: u64 = 64 << 10;
        let mut piece = vec![0; len.min(PIECE) as usize];
        for at in (0..len).step_by(PIECE as usize) {
            let now = piece.get_mut(..(len - at).min(PIECE) as usize);
            let now = now.unwrap_or(&mut []);
            file.read_at(now, offset.saturating_add(at))?;
            for entry in now.chunks_exact(8) {
                let entry = be64(entry, 0).unwrap_or(0);
                if let Ok(Some(table)) = decode_l1(geometry, entry) {
                    let clusters = refcount::clusters(geometry, table.offset, geometry.cluster());
                    self.add(clusters, holds);
                }
            }
        }
        Ok(())
    }

    fn add_bitmaps(
        &mut self,
        file: &BlockFile,
        header: &Header,
        geometry: &Geometry,
    ) -> Result<()> {
        let counts = header.autoclear & autoclear::BITMAPS != 0;
        let Some(extension) = header.extension(extension::BITMAPS).filter(|_| counts) else {
            return Ok(());
        };
        let number = be32(extension, 0).unwrap_or(0).min(65535);
        let len = be64(extension, 8).unwrap_or(0).min(64 << 20);
        let offset = be64(extension, 16).unwrap_or(0);
        let file_len = file.len()?;
        let range = |offset: u64, len: u64| refcount::clusters(geometry, HostOffset(offset), len);
        self.add(range(offset, len), Holds::Bitmaps);
        let mut at = 0;
        for _ in 0..number {
            let mut entry = [0u8; 24];
            if at + 24 > len {
                break;
            }
            file.read_at(&mut entry, offset.saturating_add(at))?;
            let table = be64(&entry, 0).unwrap_or(0);
            let table_len = u64::from(be32(&entry, 8).unwrap_or(0)) * 8;
            if table.saturating_add(table_len) <= file_len {
                self.add(range(table, table_len), Holds::Bitmaps);
            }
            let names = u64::from(be16(&entry, 18).unwrap_or(0));
            let extra = u64::from(be32(&entry, 20).unwrap_or(0));
            at += (24 + names + extra).next_multiple_of(8);
        }
        Ok(())
    }

    /// These clusters hold this from now on.
    pub(crate) fn add(&mut self, clusters: std::ops::Range<u64>, holds: Holds) {
        for cluster in clusters.start..clusters.end.min(u64::from(u32::MAX)) {
            if self.known.len() >= MOST {
                return;
            }
            let bits = self.known.entry(cluster as u32).or_insert(0);
            // A snapshot's L2 table may be another's and the active disk's; they share it by count.
            if *bits & holds as u16 != 0 && holds != Holds::SnapshotL2 {
                *bits |= TWICE;
            }
            *bits |= holds as u16;
        }
    }

    /// The cluster no longer holds this.
    pub(crate) fn remove(&mut self, cluster: u64, holds: Holds) {
        if let Some(bits) = u32::try_from(cluster)
            .ok()
            .and_then(|cluster| self.known.get_mut(&cluster))
        {
            *bits &= !(holds as u16);
        }
    }

    /// Nothing points to the cluster any more.
    pub(crate) fn forget(&mut self, cluster: u64) {
        if let Ok(cluster) = u32::try_from(cluster) {
            self.known.remove(&cluster);
        }
    }

    fn bits(&self, cluster: u64) -> u16 {
        u32::try_from(cluster)
            .ok()
            .and_then(|cluster| self.known.get(&cluster).copied())
            .unwrap_or(0)
    }

    /// What in these clusters forbids writing data to them.
    fn in_the_way(&self, mut clusters: std::ops::Range<u64>) -> Option<(u64, u16)> {
        clusters.find_map(|cluster| match self.bits(cluster) {
            0 => None,
            bits => Some((cluster, bits)),
        })
    }
}

impl State {
    /// Refuse to write to an image that was found damaged.
    pub(crate) fn check_sound(&mut self) -> Result<()> {
        match &self.writer()?.metadata.corrupt {
            None => Ok(()),
            Some(error) => Err(error.clone()),
        }
    }

    /// Before an entry of a table is changed: its cluster holds nothing but that table.
    pub(crate) fn guard(
        &mut self,
        geometry: &Geometry,
        at: HostOffset,
        holds: Holds,
    ) -> Result<()> {
        self.guard_as(geometry, at, holds as u16)
    }

    /// Before an L2 table is unlinked, or its flags are cleared: it is one, perhaps a snapshot's, too.
    pub(crate) fn guard_l2(&mut self, geometry: &Geometry, table: L2Table) -> Result<()> {
        let shared = if table.copied {
            0
        } else {
            Holds::SnapshotL2 as u16
        };
        self.guard_as(geometry, table.offset, Holds::L2 as u16 | shared)
    }

    fn guard_as(&mut self, geometry: &Geometry, at: HostOffset, allowed: u16) -> Result<()> {
        let cluster = at.0 >> geometry.cluster_bits;
        match self.writer()?.metadata.bits(cluster) & !allowed {
            0 => Ok(()),
            others => Err(self.found_corrupt(cluster, others, "a table's entry")),
        }
    }

    /// Before guest data is written, or a cluster is handed out, freed or punched: no metadata lies there.
    pub(crate) fn guard_data(&mut self, clusters: std::ops::Range<u64>, what: &str) -> Result<()> {
        match self.writer()?.metadata.in_the_way(clusters) {
            None => Ok(()),
            Some((cluster, bits)) => Err(self.found_corrupt(cluster, bits, what)),
        }
    }

    /// Mark the image corrupt; the first reason stays.
    fn found_corrupt(&mut self, cluster: u64, bits: u16, what: &str) -> Error {
        let error = Error::invalid(format!(
            "{what} would overwrite {} in host cluster {cluster:#x}: the image is damaged and takes no more \
             writes, run check -r all",
            name(bits)
        ));
        let Ok(writer) = self.writer() else {
            return error;
        };
        if writer.metadata.corrupt.is_none() {
            writer.metadata.corrupt = Some(error.clone());
            if writer.geometry.version >= 3 {
                let header = writer.header.bytes_mut();
                let now = be64(header, field::INCOMPATIBLE).unwrap_or(0);
                put64(header, field::INCOMPATIBLE, now | incompatible::CORRUPT);
                if let Some(Layer::Qcow2(qcow2)) = self.layers.first_mut() {
                    qcow2.header.incompatible |= incompatible::CORRUPT;
                }
                // It goes to the disk with the next commit, which the writer of an image cannot leave out.
                let _ = self.cache_header();
            }
        }
        error
    }

    /// Learn anew what the clusters hold: tables were made or dropped, and all of it is on the disk.
    pub(crate) fn reread_metadata(&mut self, files: &[BlockFile]) -> Result<()> {
        let Some(Layer::Qcow2(qcow2)) = self.layers.first() else {
            return Ok(());
        };
        let (header, geometry) = (qcow2.header.clone(), qcow2.geometry);
        let file = files
            .get(geometry.file)
            .ok_or_else(|| Error::invalid("no such file in the chain"))?;
        let writer = self.writer()?;
        let corrupt = writer.metadata.corrupt.take();
        let (offset, reftable) = writer.refcount_table();
        let header = Header {
            reftable_offset: offset.0,
            reftable_clusters: (reftable.len() as u64 * 8).div_ceil(geometry.cluster()) as u32,
            ..header
        };
        let mut metadata = Metadata::read(file, &header, &geometry, reftable)?;
        metadata.corrupt = corrupt;
        writer.metadata = metadata;
        Ok(())
    }
}

fn name(bits: u16) -> &'static str {
    let names = [
        (Holds::Header, "the header"),
        (Holds::L1, "the L1 table"),
        (Holds::RefcountTable, "the refcount table"),
        (Holds::RefcountBlock, "a refcount block"),
        (Holds::Snapshots, "a table of a snapshot"),
        (Holds::SnapshotL2, "an L2 table of a snapshot"),
        (Holds::Bitmaps, "a bitmap's table"),
        (Holds::Luks, "the LUKS header"),
        (Holds::L2, "an L2 table"),
    ];
    names
        .into_iter()
        .find(|(holds, _)| bits & *holds as u16 != 0)
        .map_or("a table that is used twice", |(_, name)| name)
}
