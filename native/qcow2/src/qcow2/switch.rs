// SPDX-License-Identifier: Apache-2.0
//! Changing refcounts, flags and tables of an image all at once.
//!
//! Taking, deleting and going back to a snapshot change the counts of very many clusters, and with them the
//! COPIED flags in many tables. In place that cannot be cut in two without flags that do not fit their
//! counts. So nothing in use is changed: the refcount table with its blocks is copied, the copy is
//! changed; tables whose entries change are written elsewhere; and one sector, the header's first, makes
//! all of the new ones the image's.
//!
//! | step                                                      | after a cut behind it          |
//! |-----------------------------------------------------------|--------------------------------|
//! | `begin`: room for everything new is allocated, durably    | leaks                          |
//! | the copies are written and changed; nothing names them    | leaks                          |
//! | `finish`: they are durable, then the header names them    | done; what was before leaks    |
//! | what was before is freed                                  | done                           |
//!
//! An error before the header was written goes back to what was before (`abandon`). It takes as much room
//! again as the tables have, which is free again afterwards.

use std::ops::Range;

use crate::blocking::{commit, run, settle};
use crate::buffer::Buffer;
use crate::bytes::{put32, put64};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::header::{field, Header};
use crate::qcow2::snapshot::{file_of, free_area};
use crate::qcow2::Geometry;
use crate::state::Layer;
use crate::types::HostOffset;

/// Bytes of a table that are written at once, at least.
const PIECE: usize = 1 << 20;

/// A change under way. No request may be.
pub(crate) struct Switch<'a> {
    image: &'a Image,
    geometry: Geometry,
    before: Before,
    /// All that was allocated for the change.
    made: Vec<(HostOffset, u64)>,
    /// Clusters for tables that are written elsewhere.
    spare: Vec<HostOffset>,
    /// Areas for larger tables, in the order asked for.
    pub(crate) areas: Vec<HostOffset>,
    /// What nothing points to once the header has changed.
    retired: Vec<(HostOffset, u64)>,
}

/// What is gone back to if the change fails.
struct Before {
    header: Header,
    sector: Buffer,
    table: (HostOffset, Vec<u64>),
}

impl<'a> Switch<'a> {
    /// Allocate `spare` clusters and an area for each of `areas` (bytes), and copy the refcounts.
    pub(crate) fn begin(
        image: &'a Image,
        geometry: &Geometry,
        spare: u64,
        areas: &[u64],
    ) -> Result<Switch<'a>> {
        let before = {
            let mut state = image.lock();
            let Some(Layer::Qcow2(qcow2)) = state.layers.first() else {
                return Err(Error::unsupported("tables of a raw image"));
            };
            let header = qcow2.header.clone();
            let writer = state.writer()?;
            Before {
                header,
                sector: writer.header.clone(),
                table: (HostOffset(0), Vec::new()),
            }
        };
        let mut switch = Switch {
            image,
            geometry: *geometry,
            before,
            made: Vec::new(),
            spare: Vec::new(),
            areas: Vec::new(),
            retired: Vec::new(),
        };
        match switch.prepare(spare, areas) {
            Ok(()) => Ok(switch),
            Err(error) => Err(switch.abandon(error)),
        }
    }

    fn prepare(&mut self, spare: u64, areas: &[u64]) -> Result<()> {
        let cluster = self.geometry.cluster();
        for len in areas {
            let area = self.area(len.div_ceil(cluster).max(1))?;
            self.areas.push(area);
        }
        // Allocating may make more refcount blocks, and even a larger table, which are to be copied as well.
        let mut blocks = Vec::new();
        let table = loop {
            let table_len = self.table()?.1.len() as u64 * 8;
            let table = self.area(table_len.div_ceil(cluster))?;
            while (blocks.len() as u64) < self.blocks()? + spare {
                self.clusters(self.blocks()? + spare, &mut blocks)?;
            }
            if self.table()?.1.len() as u64 * 8 == table_len {
                break table;
            }
        };
        // What was freed for a larger table counts in the copy, too.
        settle(self.image)?;
        self.before.table = self.table()?;
        {
            // The refcount table may have moved: go back to the header as it is now.
            let mut state = self.image.lock();
            self.before.sector = state.writer()?.header.clone();
            if let Some(Layer::Qcow2(qcow2)) = state.layers.first() {
                self.before.header = qcow2.header.clone();
            }
        }
        self.copy_counts(table, &mut blocks)?;
        self.spare = blocks;
        Ok(())
    }

    /// Copy every refcount block to a cluster taken from `room`; the counts in use are the copies then.
    fn copy_counts(&mut self, table: HostOffset, room: &mut Vec<HostOffset>) -> Result<()> {
        let geometry = self.geometry;
        let cluster = geometry.cluster();
        let file = file_of(self.image, &geometry)?;
        let (old, mut entries) = self.before.table.clone();
        let mut block = vec![0u8; cluster as usize];
        for entry in entries.iter_mut().filter(|entry| **entry != 0) {
            let place = room
                .pop()
                .ok_or_else(|| Error::invalid("refcount blocks came up unseen"))?;
            file.read_at(&mut block, *entry)?;
            file.write_at(&block, place.0)?;
            self.retired.push((HostOffset(*entry), cluster));
            *entry = place.0;
        }
        self.retired.push((old, entries.len() as u64 * 8));
        let len = (entries.len() as u64 * 8).next_multiple_of(cluster);
        let mut state = self.image.lock();
        for place in entries.iter().filter(|entry| **entry != 0) {
            let place = HostOffset(*place);
            state
                .cache
                .forget(geometry.layer, place, cluster, geometry.block());
        }
        state.put_table(&geometry, table, len, &entries);
        state.writer()?.replace_refcount_table(table, entries);
        Ok(())
    }

    /// A cluster for a table that is written elsewhere.
    pub(crate) fn spare(&mut self) -> Result<HostOffset> {
        self.spare
            .pop()
            .ok_or_else(|| Error::invalid("more tables change than there are"))
    }

    /// Put a table into an area; it is durable before the header names it.
    pub(crate) fn put(&self, area: usize, content: &[u64]) -> Result<HostOffset> {
        let place = *self
            .areas
            .get(area)
            .ok_or_else(|| Error::invalid("no such area"))?;
        // It may be 32 MiB long: it does not go through the cache.
        let file = file_of(self.image, &self.geometry)?;
        let unit = (PIECE as u64).max(self.geometry.cluster()) as usize;
        let mut bytes = Vec::with_capacity(unit);
        let mut at = place;
        for piece in content.chunks(unit / 8) {
            bytes.clear();
            piece
                .iter()
                .for_each(|word| bytes.extend(word.to_be_bytes()));
            let cluster = self.geometry.cluster() as usize;
            bytes.resize(bytes.len().next_multiple_of(cluster), 0);
            file.write_at(&bytes, at.0)?;
            self.forget(at, bytes.len() as u64);
            at = at.plus(bytes.len() as u64);
        }
        Ok(place)
    }

    fn forget(&self, place: HostOffset, len: u64) {
        let mut state = self.image.lock();
        let (layer, block) = (self.geometry.layer, self.geometry.block());
        state.cache.forget(layer, place, len, block);
    }

    /// What nothing will point to.
    pub(crate) fn retire(&mut self, offset: HostOffset, len: u64) {
        self.retired.push((offset, len));
    }

    /// Let the header name what is new, changed further by `change` (the header and its first block), and
    /// free what was before.
    pub(crate) fn finish(self, change: impl FnOnce(&mut Header, &mut [u8])) -> Result<()> {
        // The copies and all new tables first, then the header.
        if let Err(error) = commit(self.image) {
            return Err(self.abandon(error));
        }
        let named = self.name(change).and_then(|()| commit(self.image));
        if let Err(error) = named {
            return Err(self.abandon(error));
        }
        for (offset, len) in self.retired.iter().filter(|(_, len)| *len > 0) {
            free_area(self.image, &self.geometry, offset.0, *len)?;
        }
        let cluster = self.geometry.cluster();
        for place in &self.spare {
            free_area(self.image, &self.geometry, place.0, cluster)?;
        }
        self.image.lock().reread_metadata(self.image.files())?;
        settle(self.image)
    }

    fn name(&self, change: impl FnOnce(&mut Header, &mut [u8])) -> Result<()> {
        let mut state = self.image.lock();
        let mut header = self.before.header.clone();
        let writer = state.writer()?;
        let (offset, table) = writer.refcount_table();
        header.reftable_offset = offset.0;
        header.reftable_clusters =
            (table.len() as u64 * 8).div_ceil(self.geometry.cluster()) as u32;
        let sector = writer.header.bytes_mut();
        put64(sector, field::REFTABLE_OFFSET, header.reftable_offset);
        put32(sector, field::REFTABLE_CLUSTERS, header.reftable_clusters);
        change(&mut header, sector);
        if let Some(Layer::Qcow2(qcow2)) = state.layers.first_mut() {
            qcow2.header = header;
        }
        state.cache_header()
    }

    /// Go back to what was before; gives the error on.
    pub(crate) fn abandon(self, error: Error) -> Error {
        let back = || -> Result<()> {
            let mut state = self.image.lock();
            if let Some(Layer::Qcow2(qcow2)) = state.layers.first_mut() {
                qcow2.header = self.before.header.clone();
            }
            let (offset, table) = self.before.table.clone();
            if !table.is_empty() {
                let writer = state.writer()?;
                writer.header = self.before.sector.clone();
                writer.replace_refcount_table(offset, table);
                state.cache_header()?;
            }
            drop(state);
            for (offset, len) in &self.made {
                free_area(self.image, &self.geometry, offset.0, *len)?;
            }
            settle(self.image)
        };
        // What cannot be freed now leaks.
        let _ = back();
        error
    }

    fn table(&self) -> Result<(HostOffset, Vec<u64>)> {
        let mut state = self.image.lock();
        let (offset, table) = state.writer()?.refcount_table();
        Ok((offset, table.to_vec()))
    }

    fn blocks(&self) -> Result<u64> {
        let mut state = self.image.lock();
        let (_, table) = state.writer()?.refcount_table();
        Ok(table.iter().filter(|entry| **entry != 0).count() as u64)
    }

    fn area(&mut self, clusters: u64) -> Result<HostOffset> {
        let geometry = self.geometry;
        let image = self.image;
        let area = run(image, |state, waiter| {
            state.allocate_area(image.files(), clusters, waiter)
        })?;
        let offset = area.offset(&geometry);
        self.made.push((offset, clusters * geometry.cluster()));
        Ok(offset)
    }

    /// Allocate until `places` has `wanted` clusters, or until a run ends.
    fn clusters(&mut self, wanted: u64, places: &mut Vec<HostOffset>) -> Result<()> {
        let geometry = self.geometry;
        let image = self.image;
        let missing = wanted.saturating_sub(places.len() as u64);
        let found = run(image, |state, waiter| {
            state.allocate(image.files(), missing, waiter)
        })?;
        let range: Range<u64> = found.first.0..found.first.0 + found.count;
        places.extend(range.map(|cluster| HostOffset(cluster << geometry.cluster_bits)));
        let len = found.count * geometry.cluster();
        self.made.push((found.offset(&geometry), len));
        Ok(())
    }
}
