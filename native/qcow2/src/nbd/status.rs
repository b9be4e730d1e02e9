// SPDX-License-Identifier: Apache-2.0
//! Block status: which ranges are holes, which are zeros, and which a bitmap has as written.

use std::collections::HashMap;

use crate::error::Error;
use crate::image::Image;
use crate::map::range_at;
use crate::nbd::wire::{self, chunk, flag, RequestHeader};
use crate::qcow2::bitmaps::BitmapView;

/// The most ranges in one answer.
const MAX_RANGES: usize = 2048;

/// The contexts that a client has chosen.
pub(super) struct Contexts {
    pub(super) numbers: Vec<u32>,
    /// Those of them that are bitmaps.
    pub(super) views: HashMap<u32, BitmapView>,
}

impl Contexts {
    /// The answer to a request whose range ends at `end`, which lies on the disk.
    pub(super) fn answer(
        &mut self,
        image: &Image,
        header: &RequestHeader,
        end: u64,
    ) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        for (place, context) in self.numbers.clone().into_iter().enumerate() {
            let ranges = self.ranges(image, context, header, end)?;
            let len = 4 + 8 * ranges.len() as u32;
            let last = place + 1 == self.numbers.len();
            out.extend(wire::one_chunk(
                chunk::BLOCK_STATUS,
                header.cookie,
                len,
                last,
            ));
            out.extend(context.to_be_bytes());
            for (len, state) in ranges {
                out.extend(len.to_be_bytes());
                out.extend(state.to_be_bytes());
            }
        }
        Ok(out)
    }

    /// The ranges of a request in one context: length and state of each.
    fn ranges(
        &mut self,
        image: &Image,
        context: u32,
        header: &RequestHeader,
        end: u64,
    ) -> Result<Vec<(u32, u32)>, Error> {
        let limit = if header.flags & flag::REQUEST_ONE != 0 {
            1
        } else {
            MAX_RANGES
        };
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        let mut at = header.offset;
        while at < end {
            let (len, state) = match self.views.get_mut(&context) {
                Some(view) => {
                    let (dirty, len) = view.status(image, at, end - at)?;
                    (len, if dirty { wire::STATE_DIRTY } else { 0 })
                }
                None => {
                    let range = range_at(image, at, end - at)?;
                    let hole = if range.data { 0 } else { wire::STATE_HOLE };
                    let zero = if range.zero { wire::STATE_ZERO } else { 0 };
                    (range.len, hole | zero)
                }
            };
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let full = ranges.len() == limit;
            match ranges.last_mut() {
                Some(last) if last.1 == state => last.0 = last.0.saturating_add(len),
                _ if full => break,
                _ => ranges.push((len, state)),
            }
            at += u64::from(len);
        }
        Ok(ranges)
    }
}
