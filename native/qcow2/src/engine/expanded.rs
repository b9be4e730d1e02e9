// SPDX-License-Identifier: Apache-2.0
//! Compressed clusters that were expanded. The last ones are kept, and reads of one that is being expanded wait for it:
//! so small reads in order, many at once, expand each cluster once.
//!
//! | a cluster is | who reads it                                  | it becomes the next when          |
//! |--------------|-----------------------------------------------|-----------------------------------|
//! | not here     | has it read and expanded                      | that has begun                    |
//! | coming       | waits with the others                         | it is expanded; an error tells all |
//! | kept         | copies from it, at once                       | others push it out, or its era ends |
//!
//! A cluster is known by where it lies, and by the *era* in which the plan found a mapping to it there (`State::era`,
//! looked at under the same lock). An era ends before any host cluster can become free, so while it lasts a place that
//! is mapped as compressed data has the same bytes; what is written, discarded or gone back to by a snapshot is not
//! mapped there any more. So nobody has to tell the engines anything, and each has its own clusters, without a lock.
//!
//! Compressed data is not encrypted (the format knows no such clusters), so nothing here has to be wiped.

use std::collections::{HashMap, VecDeque};

use super::task::Owner;
use super::work::Packed;
use super::Engine;
use crate::buffer::{self, IoVecs};
use crate::error::Result;
use crate::plan::FileId;

/// Bytes kept by an engine, or one cluster.
const KEPT: usize = 2 << 20;
/// Clusters kept.
const CLUSTERS: usize = 64;

/// Which cluster it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(super) slot: u64,
    pub(super) file: FileId,
    pub(super) offset: u64,
    pub(super) stored: u64,
    pub(super) era: u64,
}

/// Part of a cluster for a request or a job.
pub(super) struct Wanted {
    pub(super) owner: Owner,
    /// Bytes of the cluster before it.
    pub(super) skip: usize,
    pub(super) pieces: IoVecs,
}

impl Wanted {
    pub(super) fn copy(&self, cluster: &[u8]) {
        let wanted = cluster.get(self.skip..).unwrap_or(&[]);
        // SAFETY: the owner's memory is valid until it is counted off.
        unsafe { buffer::scatter(wanted, &self.pieces) };
    }
}

/// What an engine has.
#[derive(Default)]
pub(super) struct Expanded {
    /// Those under way, and who waits besides the one who had it read.
    coming: HashMap<Key, Vec<Wanted>>,
    /// The last used are last.
    kept: VecDeque<(Key, Vec<u8>)>,
    bytes: usize,
}

impl Expanded {
    fn find(&mut self, key: &Key) -> Option<&[u8]> {
        let place = self.kept.iter().rposition(|(kept, _)| kept == key)?;
        let found = self.kept.remove(place)?;
        self.kept.push_back(found);
        self.kept.back().map(|(_, cluster)| cluster.as_slice())
    }

    fn keep(&mut self, key: Key, cluster: Vec<u8>) {
        // What is of another era is never asked for again.
        self.forget(|kept| kept.slot == key.slot && kept.era != key.era);
        while self.kept.len() >= CLUSTERS
            || (self.bytes + cluster.len() > KEPT && !self.kept.is_empty())
        {
            self.bytes -= self.kept.pop_front().map_or(0, |(_, old)| old.len());
        }
        self.bytes += cluster.len();
        self.kept.push_back((key, cluster));
    }

    /// An image is served no more.
    pub(super) fn detach(&mut self, slot: u64) {
        self.forget(|kept| kept.slot == slot);
    }

    fn forget(&mut self, which: impl Fn(&Key) -> bool) {
        self.kept.retain(|(kept, _)| !which(kept));
        self.bytes = self.kept.iter().map(|(_, cluster)| cluster.len()).sum();
    }
}

impl Engine {
    /// Give `wanted` its part of a cluster that is here, now or when it has come; else give it back, counted on: the
    /// cluster is coming from now on, and whoever has it expanded says so to [`Engine::expanded`].
    pub(super) fn take_expanded(&mut self, key: Key, wanted: Wanted) -> Option<Wanted> {
        if let Some(cluster) = self.expanded.find(&key) {
            wanted.copy(cluster);
            return None;
        }
        self.counted_on(wanted.owner)?;
        match self.expanded.coming.get_mut(&key) {
            Some(waiting) => {
                waiting.push(wanted);
                None
            }
            None => {
                self.expanded.coming.insert(key, Vec::new());
                Some(wanted)
            }
        }
    }

    /// A cluster has been expanded, of which the one who had it read has its part; or that has failed.
    pub(super) fn expanded(&mut self, packed: Packed, outcome: Result<()>) {
        let Packed {
            key,
            wanted,
            buffer,
            cluster,
            ..
        } = packed;
        self.give_bounce(buffer);
        let waiting = self.expanded.coming.remove(&key).unwrap_or_default();
        let all = buffer::total(&wanted.pieces) == Some(cluster.len() as u64);
        // Who reads whole clusters does not come back for more of it.
        let keep = outcome.is_ok() && !(all && waiting.is_empty());
        self.counted_off(wanted.owner, outcome.clone());
        for one in waiting {
            if outcome.is_ok() {
                one.copy(&cluster);
            }
            self.counted_off(one.owner, outcome.clone());
        }
        if keep {
            self.expanded.keep(key, cluster);
        }
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing)]
mod tests {
    use std::fs::{File, OpenOptions as FileOptions};
    use std::sync::Arc;

    use smallvec::smallvec;

    use super::*;
    use crate::buffer::Buffer;
    use crate::compress::Packer;
    use crate::copy::write_packed;
    use crate::engine::Slot;
    use crate::plan::Codec;
    use crate::powercut::Random;
    use crate::{
        create_qcow2, CreateOptions, Format, Image, Kind, LayerFiles, Op, OpenOptions, Request,
    };

    const PAGE: u64 = 4096;

    fn image(name: &str, clusters: u64, cluster_size: u64) -> (Arc<Image>, File) {
        let name = format!("vmbus-expanded-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let open = || {
            let mut options = FileOptions::new();
            options.read(true).write(true).open(&path).unwrap()
        };
        File::create(&path).unwrap();
        let options = CreateOptions {
            size: clusters * cluster_size,
            cluster_size,
            ..CreateOptions::default()
        };
        create_qcow2(&open(), None, &options).unwrap();
        let layer = LayerFiles {
            format: Format::Qcow2,
            file: open(),
            data_file: None,
            backing_name: None,
            data_name: None,
            secret: None,
        };
        let file = open();
        std::fs::remove_file(path).unwrap();
        let image = Image::open_chain(vec![layer], OpenOptions::default()).unwrap();
        image.activate().unwrap();
        (Arc::new(image), file)
    }

    /// Bytes that pack to half, of which each cluster has its own.
    fn content(seed: u64, len: u64) -> Vec<u8> {
        let mut random = Random(seed << 8 | 1);
        (0..len).map(|_| random.below(16) as u8).collect()
    }

    fn pack(image: &Arc<Image>, cluster: u64, data: &[u8]) {
        let packed = Packer::new(Codec::Zlib).unwrap().pack(data).unwrap();
        write_packed(image, cluster, &packed).unwrap();
    }

    /// An engine that serves an image, and the memory of what is under way.
    struct Bed {
        engine: Engine,
        slot: Slot,
        memory: HashMap<u64, Buffer>,
        next: u64,
    }

    impl Bed {
        fn new(image: &Arc<Image>) -> Bed {
            let mut engine = Engine::reordering(7, None).unwrap();
            let slot = engine.attach(image.clone()).unwrap();
            Bed {
                engine,
                slot,
                memory: HashMap::new(),
                next: 0,
            }
        }

        fn begin(&mut self, op: Op, offset: u64, len: u64, data: &[u8]) -> u64 {
            let id = self.next;
            self.next += 1;
            let mut memory = Buffer::zeroed(len as usize);
            let moves = matches!(op, Op::Read | Op::Write { .. });
            memory.bytes_mut()[..data.len()].copy_from_slice(data);
            let buffers = match moves {
                true => smallvec![memory.iovec(0, len as usize)],
                false => smallvec![],
            };
            self.memory.insert(id, memory);
            let request = Request {
                id,
                op,
                offset,
                len,
                buffers,
            };
            // SAFETY: the memory is kept until the request has ended.
            unsafe { self.engine.submit(self.slot, request) };
            id
        }

        /// Wait for all; the bytes of each, or its error.
        fn ended(&mut self) -> HashMap<u64, Result<Vec<u8>>> {
            let mut done = Vec::new();
            while self.engine.pending() > 0 {
                self.engine.wait(&mut done).unwrap();
            }
            self.engine.poll(&mut done).unwrap();
            let mut bytes = |id: &u64| self.memory.remove(id).unwrap().bytes().to_vec();
            done.into_iter()
                .map(|one| (one.id, bytes(&one.id), one.result))
                .map(|(id, bytes, result)| (id, result.map(|()| bytes)))
                .collect()
        }

        fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>> {
            let id = self.begin(Op::Read, offset, len, &[]);
            self.ended().remove(&id).unwrap()
        }

        fn perform(&mut self, op: Op, offset: u64, len: u64, data: &[u8]) {
            let id = self.begin(op, offset, len, data);
            self.ended().remove(&id).unwrap().unwrap();
        }
    }

    #[test]
    fn reads_of_one_cluster_at_once_read_it_once_and_later_ones_not_at_all() {
        let (image, _) = image("once", 4, 65536);
        let data = content(1, 65536);
        pack(&image, 0, &content(0, 65536));
        pack(&image, 1, &data);
        let mut bed = Bed::new(&image);
        // Then the table is there.
        bed.read(0, PAGE).unwrap();
        let ids: Vec<u64> = (0..16)
            .map(|page| bed.begin(Op::Read, 65536 + page * PAGE, PAGE, &[]))
            .collect();
        assert_eq!(bed.engine.ios.len(), 1);
        let mut found = bed.ended();
        for (page, id) in ids.iter().enumerate() {
            let part = found.remove(id).unwrap().unwrap();
            assert!(part == data[page * PAGE as usize..][..PAGE as usize]);
        }
        let id = bed.begin(Op::Read, 65536 + 100, 5000, &[]);
        assert_eq!((bed.engine.ios.len(), bed.engine.done.len()), (0, 1));
        assert!(bed.ended().remove(&id).unwrap().unwrap() == data[100..5100]);
        assert!(bed.engine.expanded.coming.is_empty());
    }

    #[test]
    fn a_cluster_that_does_not_expand_is_an_error_for_all_who_wait_and_nothing_stays() {
        let (image, file) = image("damaged", 4, 65536);
        pack(&image, 0, &content(0, 65536));
        pack(&image, 1, &content(1, 65536));
        let place = {
            let room = image.lock().writer().unwrap().packed_tail.unwrap();
            room.0 - 20_000
        };
        let mut bed = Bed::new(&image);
        bed.read(0, PAGE).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 10_000], place).unwrap();
        let ids: Vec<u64> = (0..16)
            .map(|page| bed.begin(Op::Read, 65536 + page * PAGE, PAGE, &[]))
            .collect();
        let mut found = bed.ended();
        for id in ids {
            let error = found.remove(&id).unwrap().unwrap_err();
            assert_eq!(error.kind(), Kind::ImageInvalid);
        }
        assert!(bed.engine.expanded.coming.is_empty());
        assert_eq!(bed.engine.expanded.kept.len(), 1);
        bed.engine.detach(bed.slot).unwrap();
        assert_eq!(bed.engine.expanded.kept.len(), 0);
    }

    #[test]
    fn little_is_kept_and_nothing_of_what_was_read_whole() {
        for (cluster_size, most) in [(4096, 64), (65536, 32), (2 << 20, 1)] {
            let clusters = (3 * most).max(4);
            let (image, _) = image(&format!("little-{cluster_size}"), clusters, cluster_size);
            let mut bed = Bed::new(&image);
            for cluster in 0..clusters {
                pack(&image, cluster, &content(cluster, cluster_size));
            }
            for cluster in 0..clusters {
                bed.read(cluster * cluster_size, cluster_size).unwrap();
            }
            assert_eq!(bed.engine.expanded.kept.len(), 0);
            for cluster in 0..clusters {
                bed.read(cluster * cluster_size, 512).unwrap();
            }
            let kept = &bed.engine.expanded;
            assert_eq!(kept.kept.len() as u64, most, "{cluster_size}");
            assert_eq!(kept.bytes as u64, most * cluster_size);
        }
    }

    #[test]
    fn an_engine_that_goes_with_reads_waiting_leaves_nothing_under_way() {
        let (image, _) = image("goes", 4, 65536);
        pack(&image, 0, &content(0, 65536));
        let mut bed = Bed::new(&image);
        for page in 0..16 {
            bed.begin(Op::Read, page * PAGE, PAGE, &[]);
        }
        drop(bed.engine);
        image.inactivate().unwrap();
    }

    #[test]
    fn what_is_read_is_what_was_written_last_whatever_two_engines_have_kept() {
        const CLUSTERS: u64 = 24;
        let mut reused = 0;
        for seed in 1..6 {
            let (image, _) = image(&format!("last-{seed}"), CLUSTERS, PAGE);
            let mut random = Random(seed);
            let mut model = vec![vec![0; PAGE as usize]; CLUSTERS as usize];
            let mut beds = [Bed::new(&image), Bed::new(&image)];
            let mut places = std::collections::HashSet::new();
            for step in 0..600 {
                let cluster = random.below(CLUSTERS);
                let (at, place) = (cluster * PAGE, cluster as usize);
                let bed = &mut beds[random.below(2) as usize];
                match random.below(10) {
                    0..=2 => {
                        model[place] = content(seed << 20 | step, PAGE);
                        pack(&image, cluster, &model[place]);
                        let tail = image.lock().writer().unwrap().packed_tail;
                        reused += u64::from(!places.insert(tail));
                    }
                    3 => {
                        model[place][512..1024].fill(step as u8);
                        bed.perform(Op::Write { fua: false }, at + 512, 512, &[step as u8; 512]);
                    }
                    4 => {
                        model[place].fill(0);
                        bed.perform(Op::WriteZeroes { unmap: true }, at, PAGE, &[]);
                    }
                    5 => bed.perform(Op::Flush, 0, 0, &[]),
                    _ => {
                        let skip = random.below(8) * 512;
                        let found = bed.read(at + skip, 512).unwrap();
                        let wanted = &model[place][skip as usize..][..512];
                        assert!(found == wanted, "seed {seed}, step {step}");
                    }
                }
            }
            drop(beds);
            image.inactivate().unwrap();
        }
        // Else it would show nothing.
        assert!(reused > 20, "{reused}");
    }
}
