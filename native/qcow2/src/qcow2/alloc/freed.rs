// SPDX-License-Identifier: Apache-2.0
//! Freed clusters on their way back to being free: the lower half of the table in `alloc`.
//!
//! A commit takes along what was unlinked before it began. Once it has ended nothing on disk points there any
//! more, but requests planned before may still read it, so it waits for the epoch to pass (epoch.rs). Clusters
//! that were discarded give their space back to the host in between, with a commit of their own. Only then are
//! they counted down, and can be found again.

use std::collections::VecDeque;

use crate::mailbox::Waiter;
use crate::plan::Planned;
use crate::state::State;
use crate::types::{HostCluster, HostOffset};

/// More freed runs than this wait for a commit before more is freed.
const FREED_MAX: usize = 65_536;
/// The most ranges whose space one commit gives back.
const PUNCHES: usize = 256;

/// Freed clusters on their way (see the table above).
#[derive(Default)]
pub(crate) struct Freed {
    freed: Vec<std::ops::Range<u64>>,
    committing: Vec<std::ops::Range<u64>>,
    waiting: VecDeque<(u64, std::ops::Range<u64>)>,
    /// The same for clusters that were ours alone, and whose space goes back to the host first.
    discarded: Vec<std::ops::Range<u64>>,
    discarding: Vec<std::ops::Range<u64>>,
    to_punch: VecDeque<(u64, std::ops::Range<u64>)>,
    punching: Vec<(u64, std::ops::Range<u64>)>,
}

impl Freed {
    /// The clusters of `range` lose one pointer.
    pub(crate) fn push(&mut self, range: std::ops::Range<u64>) {
        append(&mut self.freed, range);
    }

    /// The same, and nobody else points to them: their space is given back before they are used again.
    pub(crate) fn give_back(&mut self, range: std::ops::Range<u64>) {
        append(&mut self.discarded, range);
    }

    pub(super) fn is_empty(&self) -> bool {
        let lists = [
            &self.freed,
            &self.committing,
            &self.discarded,
            &self.discarding,
        ];
        let queues = [&self.waiting, &self.to_punch];
        lists.iter().all(|list| list.is_empty())
            && queues.iter().all(|queue| queue.is_empty())
            && self.punching.is_empty()
    }
}

fn append(ranges: &mut Vec<std::ops::Range<u64>>, range: std::ops::Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

impl State {
    /// Whether something must be committed before more is freed.
    pub(crate) fn too_much_freed(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| {
            writer.freed.freed.len() + writer.freed.discarded.len() > FREED_MAX
        })
    }

    /// A commit takes the unlinked mappings along.
    ///
    /// Gives the ranges (host offset and length) whose space this commit gives back.
    pub(crate) fn freed_at_begin(&mut self) -> Vec<(HostOffset, u64)> {
        let Some(writer) = &mut self.writer else {
            return Vec::new();
        };
        let freed = &mut writer.freed;
        freed.committing.append(&mut freed.freed);
        freed.discarding.append(&mut freed.discarded);
        while freed.punching.len() < PUNCHES {
            match freed.to_punch.pop_front() {
                Some((epoch, range)) if self.epochs.passed(epoch) => {
                    freed.punching.push((epoch, range))
                }
                Some(early) => {
                    freed.to_punch.push_front(early);
                    break;
                }
                None => break,
            }
        }
        let bits = writer.geometry.cluster_bits;
        let bytes = |(_, range): &(u64, std::ops::Range<u64>)| {
            (
                HostOffset(range.start << bits),
                (range.end - range.start) << bits,
            )
        };
        freed.punching.iter().map(bytes).collect()
    }

    /// The commit has ended: what it unlinked waits for the requests planned before, or for the next.
    pub(crate) fn freed_at_end(&mut self, ok: bool) {
        let Some(writer) = &mut self.writer else {
            return;
        };
        let freed = &mut writer.freed;
        // Space that could not be given back is merely not given back.
        freed.waiting.extend(freed.punching.drain(..));
        if freed.committing.is_empty() && freed.discarding.is_empty() {
            return;
        }
        if ok {
            let epoch = self.epochs.close();
            freed
                .waiting
                .extend(freed.committing.drain(..).map(|range| (epoch, range)));
            freed
                .to_punch
                .extend(freed.discarding.drain(..).map(|range| (epoch, range)));
        } else {
            freed.freed.append(&mut freed.committing);
            freed.discarded.append(&mut freed.discarding);
        }
    }

    /// Count down what nobody can use any more.
    pub(crate) fn release_freed(&mut self, waiter: &Waiter) -> Planned<()> {
        loop {
            let Some(writer) = &mut self.writer else {
                return Ok(());
            };
            let geometry = writer.geometry;
            let Some((epoch, range)) = writer.freed.waiting.front_mut() else {
                return Ok(());
            };
            if !self.epochs.passed(*epoch) {
                return Ok(());
            }
            if range.is_empty() {
                writer.freed.waiting.pop_front();
                continue;
            }
            let cluster = range.start;
            if self.check_sound().is_err()
                || self.guard_counts(&geometry, cluster..cluster + 1).is_err()
            {
                // Of a damaged image nothing is counted down: what was freed leaks.
                self.writer()?.freed.waiting.clear();
                return Ok(());
            }
            let left = self.adjust_refcount(&geometry, HostCluster(cluster), false, waiter)?;
            let writer = self.writer()?;
            if left == 0 {
                writer.metadata.forget(cluster);
                writer.cursor = writer.cursor.min(cluster);
            }
            if let Some((_, range)) = writer.freed.waiting.front_mut() {
                range.start += 1;
            }
        }
    }
}
