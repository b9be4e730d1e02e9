// SPDX-License-Identifier: Apache-2.0
//! Where each range of a disk comes from: which layer, data or zeros, at which offset. What
//! `map` shows and what copying goes by.

use crate::blocking::run;
use crate::error::Result;
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::Planned;
use crate::qcow2::entry::{Mapping, Part};
use crate::state::{Layer, State};
use crate::types::GuestCluster;

/// What a range of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// The layer that decides, 0 being the active one.
    pub depth: usize,
    /// Some layer has it (else it is in none, and reads as zeros).
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// There is data for it in a file.
    pub data: bool,
    /// That data is compressed.
    pub compressed: bool,
    /// Where in the layer's file, unless compressed.
    pub offset: Option<u64>,
}

impl Range {
    fn joins(&self, next: &Range) -> bool {
        let follows = match (self.offset, next.offset) {
            (Some(here), Some(there)) => here + self.len == there,
            (None, None) => true,
            _ => false,
        };
        let same = |range: &Range| {
            (
                range.depth,
                range.present,
                range.zero,
                range.data,
                range.compressed,
            )
        };
        follows && same(self) == same(next)
    }
}

/// The range that begins at `at`, as long as it is of one kind, at most `len` bytes.
pub fn range_at(image: &Image, at: u64, len: u64) -> Result<Range> {
    let end = at.saturating_add(len).min(image.size());
    let mut range = step(image, at, end)?;
    while range.start + range.len < end {
        let next = step(image, range.start + range.len, end)?;
        if !range.joins(&next) {
            break;
        }
        range.len += next.len;
    }
    Ok(range)
}

/// What is at `at`, up to `end` at most: not all of that range, but found by one look at each layer.
pub(crate) fn step(image: &Image, at: u64, end: u64) -> Result<Range> {
    run(image, |state, waiter| state.range(image, at, end, waiter))
}

impl State {
    /// One cluster's worth at most, or a raw file's extent, or what one block of a table says is not there.
    fn range(&mut self, image: &Image, at: u64, end: u64, waiter: &Waiter) -> Planned<Range> {
        let mut len = end.saturating_sub(at);
        let mut range = Range {
            start: at,
            len,
            depth: 0,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
        };
        for depth in 0..self.layers.len() {
            range.depth = depth;
            let geometry = match self.layers.get(depth) {
                Some(Layer::Raw(raw)) => {
                    let inside = raw.size.saturating_sub(at).min(len);
                    if inside == 0 {
                        // This layer is shorter: the one above decides.
                        range.depth = depth.saturating_sub(1);
                        break;
                    }
                    let file = image.files().get(raw.file);
                    let data = file.and_then(|file| file.next_data(at, at + inside));
                    range.present = true;
                    range.offset = Some(at);
                    match data {
                        Some((start, hole)) if start == at => {
                            (range.len, range.zero, range.data) = (hole - at, false, true);
                        }
                        Some((start, _)) => range.len = start - at,
                        None => range.len = inside,
                    }
                    return Ok(range);
                }
                Some(Layer::Qcow2(qcow2)) => {
                    let inside = qcow2.header.size.saturating_sub(at).min(len);
                    if inside == 0 {
                        // This layer is shorter: the one above decides.
                        range.depth = depth.saturating_sub(1);
                        break;
                    }
                    len = inside;
                    qcow2.geometry
                }
                None => break,
            };
            let size = geometry.cluster();
            let cluster = GuestCluster(at >> geometry.cluster_bits);
            let bare = self.bare(&geometry, cluster, waiter)?;
            if bare > 0 {
                len = len.min(bare.saturating_mul(size) - at % size);
                (range.len, range.offset) = (len, None);
                continue;
            }
            let mapping = self.lookup(&geometry, cluster, waiter)?;
            let (part, run) = mapping.run(&geometry, at % size);
            len = len.min(run);
            range.len = len;
            // Nobody can use the place of encrypted data.
            let place = mapping.host().filter(|_| !geometry.sealed());
            range.offset = place.map(|(host, _)| host.0 + at % size);
            if part == Part::Below {
                continue;
            }
            (range.present, range.zero, range.data) =
                (true, part == Part::Zero, part == Part::Data);
            range.compressed = matches!(mapping, Mapping::Compressed { .. });
            return Ok(range);
        }
        range.len = len;
        Ok(range)
    }
}
