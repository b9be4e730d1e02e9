// SPDX-License-Identifier: Apache-2.0
//! How often each cluster of a stretch of an image is pointed to: what a check counts.
//!
//! Two bytes a cluster: fourteen bits of count, and whether the active tables point there with the
//! COPIED flag, without it, or both. Counts that do not fit stand in a table of their own, which is
//! bounded; beyond that it is known only that there are many.

use std::collections::HashMap;
use std::ops::Range;

/// The active tables point there with the COPIED flag.
pub(crate) const FLAGGED: u16 = 0x8000;
/// The active tables point there without it.
pub(crate) const UNFLAGGED: u16 = 0x4000;
/// The count; all bits set for one that does not fit.
const COUNT: u16 = 0x3fff;
/// Counts that do not fit, at most.
const LARGE: usize = 1 << 16;

/// A stretch of clusters with their counts.
pub(crate) struct Window {
    pub(crate) first: u64,
    cells: Vec<u16>,
    large: HashMap<u64, u64>,
}

impl Window {
    /// `len` clusters from `first` on, counted zero times.
    pub(crate) fn new(first: u64, len: u64) -> Window {
        Window {
            first,
            cells: vec![0; len as usize],
            large: HashMap::new(),
        }
    }

    /// The clusters that are counted.
    pub(crate) fn clusters(&self) -> Range<u64> {
        self.first..self.first + self.cells.len() as u64
    }

    /// The cells of a part of the window.
    pub(crate) fn cells(&self, clusters: Range<u64>) -> &[u16] {
        let at = |cluster: u64| cluster.saturating_sub(self.first) as usize;
        self.cells
            .get(at(clusters.start)..at(clusters.end))
            .unwrap_or(&[])
    }

    /// `times` more pointers to a cluster, with these flags; elsewhere than in the window it is nobody's.
    #[inline]
    pub(crate) fn add(&mut self, cluster: u64, times: u32, flags: u16) {
        let place = cluster.wrapping_sub(self.first);
        let Some(cell) = usize::try_from(place)
            .ok()
            .and_then(|place| self.cells.get_mut(place))
        else {
            return;
        };
        let sum = u32::from(*cell & COUNT).saturating_add(times);
        if sum < u32::from(COUNT) {
            *cell = (*cell & !COUNT) | sum as u16 | flags;
            return;
        }
        let before = u64::from(*cell & COUNT);
        let known = before < u64::from(COUNT) || self.large.contains_key(&cluster);
        *cell |= COUNT | flags;
        if known && (self.large.len() < LARGE || self.large.contains_key(&cluster)) {
            *self.large.entry(cluster).or_insert(before) += u64::from(times);
        }
    }

    /// `times` more pointers to each cluster of a range.
    pub(crate) fn add_all(&mut self, clusters: Range<u64>, times: u32) {
        let all = self.clusters();
        for cluster in clusters.start.max(all.start)..clusters.end.min(all.end) {
            self.add(cluster, times, 0);
        }
    }

    /// How often a cluster is pointed to; None for more often than could be counted.
    pub(crate) fn used(&self, cluster: u64) -> Option<u64> {
        let cell = usize::try_from(cluster.wrapping_sub(self.first))
            .ok()
            .and_then(|place| self.cells.get(place))
            .copied()
            .unwrap_or(0);
        if cell & COUNT < COUNT {
            return Some(u64::from(cell & COUNT));
        }
        self.large.get(&cluster).copied()
    }
}

/// A cell's count, if it is one that fits.
#[inline]
pub(crate) fn count(cell: u16) -> Option<u64> {
    (cell & COUNT < COUNT).then_some(u64::from(cell & COUNT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_do_not_fit_a_cell_are_still_right() {
        let mut window = Window::new(100, 10);
        window.add(105, 16_000, 0);
        assert_eq!(window.used(105), Some(16_000));
        window.add(105, 383, FLAGGED);
        assert_eq!(window.used(105), Some(16_383));
        window.add(105, 70_000, 0);
        assert_eq!(window.used(105), Some(86_383));
        assert_eq!(window.cells(105..106)[0] & FLAGGED, FLAGGED);
        assert_eq!(window.used(104), Some(0));
    }

    #[test]
    fn more_large_counts_than_are_kept_are_told_as_unknown() {
        let mut window = Window::new(0, LARGE as u64 + 5);
        window.add_all(0..LARGE as u64 + 5, 20_000);
        assert_eq!(window.used(0), Some(20_000));
        assert_eq!(window.used(LARGE as u64 + 4), None);
        window.add(LARGE as u64 + 4, 1, 0);
        assert_eq!(window.used(LARGE as u64 + 4), None);
    }

    #[test]
    fn what_lies_outside_of_the_window_is_not_counted() {
        let mut window = Window::new(100, 10);
        window.add_all(0..1000, 1);
        window.add(99, 1, FLAGGED);
        window.add(110, 1, FLAGGED);
        assert!(window.cells(100..110).iter().all(|cell| *cell == 1));
    }
}
