// SPDX-License-Identifier: Apache-2.0
//! Freed clusters on their way back to being free: the lower half of the table in `alloc`.
//!
//! A commit takes along what was unlinked before it began. Once it has ended nothing on disk points there any
//! more, but requests planned before may still read it, so it waits for the epoch to pass (epoch.rs). Clusters
//! that were discarded give their space back to the host in between, with a commit of their own. Only then are
//! they counted down, and can be found again.
//!
//! On a block device, which cannot grow, a write may find nothing free but these. Then it makes the commits that bring
//! them back itself, and looks again; "full" is what it is only when none are left on their way.

use std::collections::VecDeque;

use crate::epoch::Epochs;
use crate::error::{Error, Kind};
use crate::mailbox::Waiter;
use crate::plan::{Planned, Stop};
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

    /// Whether a commit moves any of it on.
    fn wants_commit(&self, epochs: &Epochs) -> bool {
        let lists = [
            &self.freed,
            &self.committing,
            &self.discarded,
            &self.discarding,
        ];
        let ready = |(epoch, _): &(u64, std::ops::Range<u64>)| epochs.passed(*epoch);
        lists.iter().any(|list| !list.is_empty())
            || !self.punching.is_empty()
            || self.to_punch.front().is_some_and(ready)
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

fn full() -> Error {
    Error::new(
        Kind::NoSpace,
        "the block device that holds the image is full",
    )
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

    /// No cluster is free, and the file cannot grow: whether waiting helps.
    pub(super) fn no_room(&mut self, waiter: &Waiter) -> Stop {
        let Some(writer) = self.writer.as_ref().filter(|one| !one.freed.is_empty()) else {
            return Stop::Fail(full());
        };
        let commit = writer.freed.wants_commit(&self.epochs);
        if !commit {
            self.epochs.wait(waiter.clone());
        }
        Stop::Release { commit }
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs::{File, OpenOptions as FileOptions};
    use std::path::Path;
    use std::sync::Arc;

    use smallvec::smallvec;

    use crate::buffer::Buffer;
    use crate::engine::Slot;
    use crate::{
        check, create_qcow2, CreateOptions, Engine, Format, Image, Kind, LayerFiles, Op,
        OpenOptions, Repair, Request, Result,
    };

    const SIZE: u64 = 8 << 20;
    const CLUSTER: u64 = 4096;
    const DEVICE: u64 = 1 << 20;

    fn open(path: &Path) -> File {
        FileOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap()
    }

    /// An image on what cannot grow.
    fn on_a_device(path: &Path) -> Arc<Image> {
        let _ = std::fs::remove_file(path);
        let options = CreateOptions {
            size: SIZE,
            cluster_size: CLUSTER,
            ..CreateOptions::default()
        };
        create_qcow2(&open(path), None, &options).unwrap();
        open(path).set_len(DEVICE).unwrap();
        let layer = LayerFiles {
            format: Format::Qcow2,
            file: open(path),
            data_file: None,
            backing_name: None,
            data_name: None,
            secret: None,
        };
        let image = Image::open_chain(vec![layer], OpenOptions::default()).unwrap();
        image.activate().unwrap();
        image.lock().writer().unwrap().regular = false;
        Arc::new(image)
    }

    /// Requests of one cluster each (but the discard), eight under way at once; what became of each.
    fn all(engine: &mut Engine, slot: Slot, requests: &[(Op, u64, u64)]) -> Vec<Result<()>> {
        let mut outcomes: HashMap<u64, Result<()>> = HashMap::new();
        let mut memory = Vec::new();
        let mut done = Vec::new();
        for (id, (op, offset, len)) in (0..).zip(requests) {
            let mut buffers = smallvec![];
            if matches!(op, Op::Write { .. }) {
                let mut data = Buffer::zeroed(*len as usize);
                data.bytes_mut().fill((offset / CLUSTER % 250) as u8 + 1);
                buffers.push(data.iovec(0, *len as usize));
                memory.push(data);
            }
            let request = Request {
                id,
                op: *op,
                offset: *offset,
                len: *len,
                buffers,
            };
            // SAFETY: the memory is kept to the end.
            unsafe { engine.submit(slot, request) };
            while engine.pending() >= 8 {
                engine.wait(&mut done).unwrap();
            }
        }
        while engine.pending() > 0 {
            engine.wait(&mut done).unwrap();
        }
        engine.poll(&mut done).unwrap();
        outcomes.extend(done.into_iter().map(|one| (one.id, one.result)));
        (0..requests.len() as u64)
            .map(|id| outcomes.remove(&id).unwrap())
            .collect()
    }

    #[test]
    fn what_was_discarded_on_a_full_device_is_written_again_without_a_flush() {
        let path = std::env::temp_dir().join(format!("vmbus-full-{}", std::process::id()));
        let write = |cluster: u64| (Op::Write { fua: false }, cluster * CLUSTER, CLUSTER);
        for seed in 0..8 {
            let image = on_a_device(&path);
            let mut engine = Engine::reordering(seed, None).unwrap();
            let slot = engine.attach(image.clone()).unwrap();
            let first: Vec<_> = (0..DEVICE / CLUSTER).map(write).collect();
            let outcomes = all(&mut engine, slot, &first);
            let written = outcomes.iter().filter(|one| one.is_ok()).count() as u64;
            assert!((100..DEVICE / CLUSTER).contains(&written), "{written}");
            let mut errors = outcomes.iter().filter_map(|one| one.as_ref().err());
            assert!(errors.all(|error| error.kind() == Kind::NoSpace));
            // Nobody waits between these; the last of them find room only behind several commits.
            let mut second = vec![(Op::Discard, 0, DEVICE)];
            second.extend((1000..1000 + written - 8).map(write));
            let outcomes = all(&mut engine, slot, &second);
            assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
            let beyond: Vec<_> = (0..16).map(write).collect();
            let outcomes = all(&mut engine, slot, &beyond);
            assert!(outcomes.iter().any(Result::is_err));
            drop(engine);
            let mut disk = crate::Disk::blocking(image.clone()).unwrap();
            for (_, at, len) in &second[1..] {
                let mut data = vec![0; *len as usize];
                disk.read(*at, &mut data).unwrap();
                assert!(data
                    .iter()
                    .all(|byte| *byte == (at / CLUSTER % 250) as u8 + 1));
            }
            drop(disk);
            image.inactivate().unwrap();
            let report = check(&open(&path), Repair::None, false).unwrap();
            assert_eq!((report.leaks, report.corruptions), (0, 0), "seed {seed}");
        }
        std::fs::remove_file(&path).unwrap();
    }
}
