// SPDX-License-Identifier: Apache-2.0
//! The memory map that a guest is told of where there is no firmware to make one.

use super::split;
use crate::layout;

/// What a range of the guest's address space is to the guest (e820 types).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Free for the guest.
    Ram,
    /// Taken.
    Reserved,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map that firmware would hand over.
///
/// ECAM stands there because Linux uses it only where the map or the DSDT reserves it.
pub fn map(memory: u64) -> Vec<MapEntry> {
    let (low, high) = split(memory);
    let entry = |kind, base: u64, end: u64| MapEntry {
        base,
        size: end.saturating_sub(base),
        kind,
    };
    let mut entries = vec![
        entry(MapKind::Ram, 0, layout::CONVENTIONAL_END),
        entry(
            MapKind::Reserved,
            layout::CONVENTIONAL_END,
            layout::EXTENDED_START,
        ),
        entry(MapKind::Ram, layout::EXTENDED_START, low),
        entry(
            MapKind::Reserved,
            layout::ECAM_START,
            layout::ECAM_START.saturating_add(layout::ECAM_SIZE),
        ),
    ];
    if high > 0 {
        entries.push(entry(
            MapKind::Ram,
            layout::HIGH_RAM_START,
            layout::HIGH_RAM_START.saturating_add(high),
        ));
    }
    entries
}
