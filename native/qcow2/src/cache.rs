// SPDX-License-Identifier: Apache-2.0
//! The metadata cache: blocks of the images' tables, by layer and host offset.
//!
//! A block is at most 4 KiB (a whole cluster where clusters are smaller), so that a miss in a large
//! table reads what is needed and not the table. Nothing of an image is held outside of it: whatever
//! sizes a header claims, memory stays within the cache's capacity. States of a block:
//!
//! | state      | meaning                                     | leaves it by                        |
//! |------------|---------------------------------------------|-------------------------------------|
//! | loading    | somebody reads it; others wait              | `supply`                            |
//! | clean      | as on disk                                  | eviction, `modify`                  |
//! | dirty      | newer than on disk, with a class            | `take_dirty`                        |
//! | committing | being written (it may be dirty again)       | `committed`                         |
//!
//! Only clean, unpinned blocks are evicted, and only where a plan stops (a miss) or a commit ends: within
//! one plan, what was fetched stays. The writer keeps the number of dirty ones down by
//! committing (see commit.rs). Blocks are shared with the commit that writes them: modifying one
//! then copies it, so a commit writes the state that it took, never a later one.

use std::collections::HashMap;
use std::sync::Arc;

use crate::buffer::Buffer;
use crate::error::Result;
use crate::mailbox::Waiter;
use crate::plan::{Need, Planned, Stop};
use crate::types::HostOffset;

/// A block's content.
pub(crate) type Block = Arc<Buffer>;

/// Layer and host offset.
pub(crate) type Key = (usize, u64);

/// What a dirty block holds, which says when a commit may write it (commit.rs, "order").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// A refcount block, or a table to which nothing on disk points yet.
    Unreferenced,
    /// An entry of the refcount table in use.
    RefcountTable,
    /// The image's header.
    Header,
    /// An L2 or L1 table in use.
    Mapping,
    /// An L2 table in use of which only entries for clusters have changed that are counted on disk, were never
    /// used and are mapped where zeros were (alloc/reserve.rs).
    Fresh,
}

struct Entry {
    key: Key,
    block: Option<Block>,
    waiters: Vec<Waiter>,
    dirty: Option<Class>,
    committing: bool,
    pins: u32,
    used: bool,
}

/// The cache of one image with its chain.
pub(crate) struct Cache {
    places: HashMap<Key, usize>,
    entries: Vec<Option<Entry>>,
    free: Vec<usize>,
    hand: usize,
    capacity: usize,
    dirty: usize,
}

/// A dirty block taken by a commit.
#[derive(Debug, Clone)]
pub(crate) struct Dirty {
    pub(crate) key: Key,
    pub(crate) class: Class,
    pub(crate) block: Block,
}

impl Cache {
    /// A cache of at most about `capacity` blocks.
    pub(crate) fn new(capacity: usize) -> Cache {
        Cache {
            places: HashMap::new(),
            entries: Vec::new(),
            free: Vec::new(),
            hand: 0,
            capacity: capacity.max(64),
            dirty: 0,
        }
    }

    /// Whether so much is dirty that a commit should come first.
    pub(crate) fn crowded(&self) -> bool {
        self.dirty > self.capacity / 2
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.dirty > 0
    }

    /// The block named by `need`; if it is absent the caller must read it.
    pub(crate) fn fetch(&mut self, need: Need, waiter: &Waiter) -> Planned<&Block> {
        let key = (need.layer, need.offset.0);
        let place = match self.places.get(&key) {
            Some(place) => *place,
            None => {
                self.trim();
                self.insert(key, None, None);
                return Err(Stop::Load(need));
            }
        };
        match self.entries.get_mut(place).and_then(Option::as_mut) {
            Some(Entry {
                block: Some(block),
                used,
                ..
            }) => {
                *used = true;
                Ok(block)
            }
            Some(entry) => {
                entry.waiters.push(waiter.clone());
                Err(Stop::Wait)
            }
            // The map names only live entries.
            None => Err(Stop::Load(need)),
        }
    }

    /// A block, if it is here.
    pub(crate) fn peek(&self, layer: usize, offset: HostOffset) -> Option<&Block> {
        let place = *self.places.get(&(layer, offset.0))?;
        self.entries.get(place)?.as_ref()?.block.as_ref()
    }

    /// Whether the disk has a block as it is here: it was not changed since the last commit that wrote it ended.
    pub(crate) fn on_disk(&self, layer: usize, offset: HostOffset) -> bool {
        let entry = self
            .places
            .get(&(layer, offset.0))
            .and_then(|place| self.entries.get(*place)?.as_ref());
        entry.is_none_or(|entry| entry.dirty.is_none() && !entry.committing)
    }

    /// What was read for a `Stop::Load`.
    pub(crate) fn supply(&mut self, need: Need, content: Result<Buffer>) {
        let key = (need.layer, need.offset.0);
        let Some(place) = self.places.get(&key).copied() else {
            return;
        };
        let Some(entry) = self.entries.get_mut(place).and_then(Option::as_mut) else {
            return;
        };
        entry.waiters.drain(..).for_each(Waiter::wake);
        match content {
            Ok(buffer) if entry.block.is_none() => entry.block = Some(Arc::new(buffer)),
            Ok(_) => {}
            Err(_) => self.remove(place),
        }
    }

    /// A present block, to be changed; it becomes dirty as `class` unless it is so in a stricter way.
    pub(crate) fn modify(
        &mut self,
        layer: usize,
        offset: HostOffset,
        class: Class,
    ) -> Option<&mut [u8]> {
        let entry = self.entry((layer, offset.0))?;
        entry.block.as_ref()?;
        let newly = entry.dirty.is_none();
        // A table that nothing points to yet stays so until it was written once.
        let dirty = entry.dirty.map_or(class, |now| now.min(class));
        entry.dirty = Some(dirty);
        entry.used = true;
        if newly {
            self.dirty += 1;
        }
        let entry = self.entry((layer, offset.0))?;
        Some(Arc::make_mut(entry.block.as_mut()?).bytes_mut())
    }

    /// Put a block there, whatever was there before.
    pub(crate) fn put(
        &mut self,
        layer: usize,
        offset: HostOffset,
        content: Buffer,
        class: Option<Class>,
    ) {
        let key = (layer, offset.0);
        match self.places.get(&key).copied() {
            None => self.insert(key, Some(Arc::new(content)), class),
            Some(place) => {
                let Some(entry) = self.entries.get_mut(place).and_then(Option::as_mut) else {
                    return;
                };
                self.dirty -= usize::from(entry.dirty.is_some());
                entry.waiters.drain(..).for_each(Waiter::wake);
                entry.block = Some(Arc::new(content));
                entry.dirty = class;
            }
        }
        self.dirty += usize::from(class.is_some());
    }

    /// Forget all blocks in a range whose clusters hold no metadata any more, dirty or not.
    pub(crate) fn forget(&mut self, layer: usize, offset: HostOffset, len: u64, block: u64) {
        let mut at = offset.0;
        while at < offset.0.saturating_add(len) {
            if let Some(place) = self.places.get(&(layer, at)).copied() {
                if let Some(entry) = self.entries.get_mut(place).and_then(Option::as_mut) {
                    self.dirty -= usize::from(entry.dirty.take().is_some());
                    entry.pins = 0;
                    if !entry.committing {
                        self.remove(place);
                    }
                }
            }
            at = at.saturating_add(block.max(1));
        }
    }

    /// Keep a present block from being evicted until `unpin`.
    pub(crate) fn pin(&mut self, layer: usize, offset: HostOffset) {
        if let Some(entry) = self.entry((layer, offset.0)) {
            entry.pins += 1;
        }
    }

    pub(crate) fn unpin(&mut self, layer: usize, offset: HostOffset) {
        if let Some(entry) = self.entry((layer, offset.0)) {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }

    /// All dirty blocks, sorted by offset; they are committing now.
    pub(crate) fn take_dirty(&mut self) -> Vec<Dirty> {
        let mut taken = Vec::with_capacity(self.dirty);
        for entry in self.entries.iter_mut().flatten() {
            if let (Some(class), Some(block)) = (entry.dirty, &entry.block) {
                taken.push(Dirty {
                    key: entry.key,
                    class,
                    block: block.clone(),
                });
                entry.dirty = None;
                entry.committing = true;
            }
        }
        self.dirty = 0;
        taken.sort_by_key(|dirty| dirty.key);
        taken
    }

    /// A commit has ended; if it failed, its blocks are dirty again as they were.
    pub(crate) fn committed(&mut self, taken: &[Dirty], ok: bool) {
        for dirty in taken {
            let Some(entry) = self.entry(dirty.key) else {
                continue;
            };
            entry.committing = false;
            if !ok {
                let newly = entry.dirty.is_none();
                entry.dirty = Some(entry.dirty.map_or(dirty.class, |now| now.min(dirty.class)));
                self.dirty += usize::from(newly);
            }
        }
        self.trim();
    }

    /// Drop everything (deactivation, or a re-read of all metadata).
    pub(crate) fn clear(&mut self) {
        for entry in self.entries.iter_mut().flatten() {
            entry.waiters.drain(..).for_each(Waiter::wake);
        }
        self.places.clear();
        self.entries.clear();
        self.free.clear();
        self.hand = 0;
        self.dirty = 0;
    }

    fn entry(&mut self, key: Key) -> Option<&mut Entry> {
        let place = *self.places.get(&key)?;
        self.entries.get_mut(place)?.as_mut()
    }

    fn insert(&mut self, key: Key, block: Option<Block>, dirty: Option<Class>) {
        let entry = Entry {
            key,
            block,
            waiters: Vec::new(),
            dirty,
            committing: false,
            pins: 0,
            used: true,
        };
        let place = match self.free.pop() {
            Some(place) => {
                if let Some(empty) = self.entries.get_mut(place) {
                    *empty = Some(entry);
                }
                place
            }
            None => {
                self.entries.push(Some(entry));
                self.entries.len() - 1
            }
        };
        self.places.insert(key, place);
    }

    fn remove(&mut self, place: usize) {
        if let Some(entry) = self.entries.get_mut(place).and_then(Option::take) {
            self.dirty -= usize::from(entry.dirty.is_some());
            self.places.remove(&entry.key);
            self.free.push(place);
        }
    }

    /// Make room for one more block.
    fn trim(&mut self) {
        while self.places.len() >= self.capacity && self.evict() {}
    }

    /// Second chance: the first clean block that was not used since the hand last passed. False when
    /// there is none.
    fn evict(&mut self) -> bool {
        for _ in 0..2 * self.entries.len() {
            self.hand = if self.hand + 1 < self.entries.len() {
                self.hand + 1
            } else {
                0
            };
            let Some(entry) = self.entries.get_mut(self.hand).and_then(Option::as_mut) else {
                continue;
            };
            let held = entry.block.is_none()
                || entry.dirty.is_some()
                || entry.committing
                || entry.pins > 0;
            if held {
                continue;
            }
            if std::mem::replace(&mut entry.used, false) {
                continue;
            }
            self.remove(self.hand);
            return true;
        }
        false
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::mailbox::Mailbox;
    use crate::ring::event_fd;

    fn need(offset: u64) -> Need {
        Need {
            layer: 0,
            file: 0,
            offset: HostOffset(offset),
            len: 512,
        }
    }

    fn waiter() -> Waiter {
        Waiter {
            mailbox: Arc::new(Mailbox::new(event_fd().unwrap())),
            task: 7,
        }
    }

    #[test]
    fn one_reads_and_the_others_wait() {
        let mut cache = Cache::new(64);
        let waiter = waiter();
        assert!(matches!(cache.fetch(need(0), &waiter), Err(Stop::Load(_))));
        assert!(matches!(cache.fetch(need(0), &waiter), Err(Stop::Wait)));
        cache.supply(need(0), Ok(Buffer::zeroed(512)));
        assert_eq!(waiter.mailbox.take().len(), 1);
        assert!(cache.fetch(need(0), &waiter).is_ok());
    }

    #[test]
    fn dirty_blocks_outlive_a_flood_of_clean_ones() {
        let mut cache = Cache::new(64);
        let waiter = waiter();
        cache.put(
            0,
            HostOffset(0),
            Buffer::from_bytes(&[9; 512]),
            Some(Class::Mapping),
        );
        for n in 1..1000 {
            cache.put(0, HostOffset(n * 512), Buffer::zeroed(512), None);
        }
        cache.committed(&[], true);
        assert!(cache.places.len() <= 64);
        assert_eq!(cache.fetch(need(0), &waiter).unwrap().bytes()[0], 9);
    }

    #[test]
    fn a_commit_writes_the_state_that_it_took() {
        let mut cache = Cache::new(64);
        cache.put(
            0,
            HostOffset(0),
            Buffer::zeroed(512),
            Some(Class::Unreferenced),
        );
        let taken = cache.take_dirty();
        cache.modify(0, HostOffset(0), Class::Mapping).unwrap()[0] = 5;
        assert_eq!(taken[0].block.bytes()[0], 0);
        cache.committed(&taken, false);
        let again = cache.take_dirty();
        assert_eq!(
            (again[0].block.bytes()[0], again[0].class),
            (5, Class::Unreferenced)
        );
    }
}
