// SPDX-License-Identifier: Apache-2.0
//! From a recording to files as a cut could leave them, and what each must hold.

use std::fs::OpenOptions as FileOptions;
use std::os::unix::fs::FileExt;

use super::bed::{Bed, Random};
use super::{SECTOR, SIZE};
use crate::qcow2::bitmaps;
use crate::recorder::Event;
use crate::{check, Image, Repair};

/// The disk as the guest may find it: per sector, the values it may have.
struct Guest {
    durable: Vec<Vec<u8>>,
    taken: Vec<Vec<u8>>,
    later: Vec<Vec<(u64, Option<u8>)>>,
}

impl Guest {
    fn may_be(&self, sector: usize, value: u8) -> bool {
        self.durable[sector].contains(&value)
            || self.later[sector]
                .iter()
                .any(|(_, later)| later.unwrap_or(0) == value)
    }

    fn flushed(&mut self, completed: &[u64]) {
        for (durable, later) in self.durable.iter_mut().zip(&mut self.later) {
            let count = later
                .iter()
                .rposition(|(id, _)| completed.contains(id))
                .map_or(0, |last| last + 1);
            for (_, value) in later.drain(..count) {
                match value {
                    Some(value) => *durable = vec![value],
                    None if durable.contains(&0) => {}
                    None => durable.push(0),
                }
            }
        }
    }
}

impl Bed {
    /// A bitmap that may be trusted knows of all that has changed.
    fn bitmap_tells(&self, image: &Image, content: &[u8], what: &str) {
        let listed = bitmaps::list(image).unwrap_or_else(|e| panic!("{what}: {e}"));
        let recording = listed.iter().find(|bitmap| bitmap.name == "recording");
        assert_eq!(recording.is_some(), self.bitmaps, "{what}");
        if recording.is_none_or(|bitmap| bitmap.in_use) {
            return;
        }
        let mut view = bitmaps::BitmapView::open(image, "recording").unwrap();
        for (sector, bytes) in content.chunks(SECTOR).enumerate() {
            let (dirty, _) = view.status(image, (sector * SECTOR) as u64, 1).unwrap();
            assert!(
                dirty || bytes[0] == 0,
                "{what}: sector {sector} has changed"
            );
        }
    }

    /// Go through the recording and try `cuts` files.
    pub(super) fn replay(
        &self,
        start: &[u8],
        events: &[Event],
        cuts: u64,
        random: &mut Random,
    ) -> u64 {
        let mut durable = start.to_vec();
        let mut volatile: Vec<Event> = Vec::new();
        let sectors = SIZE as usize / SECTOR;
        let initial = |sector: usize| {
            vec![if self.backing && sector < sectors / 2 {
                0xb5
            } else {
                0
            }]
        };
        let mut guest = Guest {
            durable: (0..sectors).map(initial).collect(),
            taken: Vec::new(),
            later: vec![Vec::new(); sectors],
        };
        let mut tried = 0;
        for (number, event) in events.iter().enumerate() {
            match event {
                Event::Sync => volatile
                    .drain(..)
                    .for_each(|event| apply(&mut durable, &event, &mut |_| true)),
                Event::Write { .. } | Event::Len(_) => volatile.push(event.clone()),
                Event::Durable { offset, data } => {
                    // What was written there before is never seen again.
                    let (start, end) = (*offset as usize, *offset as usize + data.len());
                    for earlier in &mut volatile {
                        if let Event::Write { offset, data: old } = earlier {
                            let first = *offset as usize;
                            let from = start.max(first);
                            let until = end.min(first + old.len());
                            if from < until {
                                old[from - first..until - first]
                                    .copy_from_slice(&data[from - start..until - start]);
                            }
                        }
                    }
                    // And the file is as long as that needs.
                    let data = data.clone();
                    let write = Event::Write {
                        offset: *offset,
                        data,
                    };
                    apply(&mut durable, &write, &mut |_| true);
                }
                Event::Submitted {
                    id,
                    first,
                    count,
                    value,
                } => {
                    guest.later[*first..first + count]
                        .iter_mut()
                        .for_each(|later| later.push((*id, *value)));
                }
                Event::Flushed { completed } => guest.flushed(completed),
                Event::Taken => guest.taken = guest.durable.clone(),
                Event::Rewinding => {
                    for (later, taken) in guest.later.iter_mut().zip(&guest.taken) {
                        later.extend(taken.iter().map(|value| (u64::MAX, Some(*value))));
                    }
                }
                Event::Rewound => {
                    guest.durable = guest.taken.clone();
                    guest.later.iter_mut().for_each(Vec::clear);
                }
            }
            let due = cuts * (number as u64 + 1) / events.len() as u64;
            while tried < due {
                tried += 1;
                self.cut(
                    &durable,
                    &volatile,
                    &guest,
                    random,
                    &format!("cut {tried} at event {number}"),
                );
            }
        }
        tried
    }

    fn cut(
        &self,
        durable: &[u8],
        volatile: &[Event],
        guest: &Guest,
        random: &mut Random,
        what: &str,
    ) {
        let mut file = durable.to_vec();
        let mut order: Vec<&Event> = volatile.iter().collect();
        match random.below(4) {
            0 => {}
            1 => order
                .iter()
                .for_each(|event| apply(&mut file, event, &mut |_| true)),
            kind => {
                for n in (1..order.len()).rev() {
                    order.swap(n, random.below(n as u64 + 1) as usize);
                }
                let chance = 1 + random.below(9);
                for event in order {
                    let whole = random.below(10) < chance;
                    apply(&mut file, event, &mut |_| {
                        if kind == 2 {
                            whole
                        } else {
                            random.below(10) < chance
                        }
                    });
                }
            }
        }
        let path = self.directory.join("cut");
        let target = FileOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        target.write_all_at(&file, 0).unwrap();
        let report = check(&target, Repair::None, false).unwrap();
        assert_eq!(
            report.corruptions,
            0,
            "{what}: {:?}",
            report.messages.iter().take(5).collect::<Vec<_>>()
        );
        let image = self
            .image("cut", true)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        let extents =
            crate::blocking::run(&image, |state, waiter| state.plan_read(0, SIZE, waiter)).unwrap();
        let content = crate::blocking::fetch(&image, &extents).unwrap();
        self.bitmap_tells(&image, &content, what);
        for (sector, bytes) in content.chunks(SECTOR).enumerate() {
            let same = bytes.iter().all(|byte| *byte == bytes[0]);
            assert!(
                same && guest.may_be(sector, bytes[0]),
                "{what}: sector {sector} holds {:#x}, may be {:x?} or {:x?}",
                bytes[0],
                guest.durable[sector],
                guest.later[sector]
            );
        }
    }
}

pub(crate) fn apply(file: &mut Vec<u8>, event: &Event, keep: &mut dyn FnMut(usize) -> bool) {
    match event {
        Event::Len(len) if keep(0) => {
            // The length of a file changes in order; the one shortening is at the very end, when all
            // else is durable.
            file.resize(file.len().max(*len as usize), 0);
        }
        Event::Write { offset, data } => {
            let mut at = 0;
            while at < data.len() {
                // Sectors of the file are atomic.
                let start = *offset as usize + at;
                let end = (start / SECTOR + 1) * SECTOR;
                let len = (end - start).min(data.len() - at);
                if keep(at) {
                    if file.len() < start + len {
                        file.resize(start + len, 0);
                    }
                    file[start..start + len].copy_from_slice(&data[at..at + len]);
                }
                at += len;
            }
        }
        _ => {}
    }
}
