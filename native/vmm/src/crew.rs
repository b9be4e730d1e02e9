// SPDX-License-Identifier: Apache-2.0
//! Threads that go over all of the guest's memory together: touching it before the guest does, saving it, restoring it.
//!
//! They are made when the machine is built, since none is later, and sleep. A round cuts memory into chunks that the
//! threads take one after the other; what is done with a chunk is the round's [`Work`]. The last thread of a round says
//! what became of it. One round at a time.
//!
//! What stops a round: all chunks done, a cancellation, the machine's end, or the first chunk that fails.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::error::{Error, Kind, Result};
use crate::memory::GuestMemoryMmap;
use crate::thread::{spawn, Role, ThreadHook};

/// Bytes that a thread takes at a time; a multiple of every page but those of 1 GiB.
const CHUNK: u64 = 32 << 20;
/// Less memory than this is one thread's work.
const SMALL: u64 = 256 << 20;
/// So much and more is worth four.
const LARGE: u64 = 16 << 30;

/// What is done with the guest's memory, by several threads at once.
pub trait Work: Send + Sync {
    /// Does it with a chunk.
    ///
    /// # Errors
    /// What stops the round.
    fn chunk(&self, chunk: Chunk) -> Result<()>;

    /// All chunks are done, or the round was stopped for this reason; called once, by the last thread.
    ///
    /// # Errors
    /// What becomes the round's result.
    fn conclude(&self, result: Result<u64>) -> Result<u64> {
        result
    }
}

/// Called once a round has ended, with the bytes of guest memory that it went over.
pub type Finished = Box<dyn FnOnce(Result<u64>) + Send>;

/// Some of the guest's memory, as the process sees it.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// Where it lies in the process.
    pub address: usize,
    /// Bytes.
    pub len: u64,
    /// Which bytes of the guest's RAM these are, counted from the first and without the hole below 4 GiB.
    pub offset: u64,
}

struct Shared {
    /// Keeps the chunks mapped.
    _memory: Arc<GuestMemoryMmap>,
    chunks: Vec<Chunk>,
    round: Mutex<Round>,
    wake: Condvar,
    next: AtomicUsize,
    done: AtomicU64,
    stop: AtomicBool,
}

#[derive(Default)]
struct Round {
    /// Grows with each round; 0 is none.
    number: u64,
    /// Threads that have not finished it.
    working: usize,
    work: Option<Arc<dyn Work>>,
    finished: Option<Finished>,
    error: Option<Error>,
    exit: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A thread's life.
    fn live(&self) {
        let mut seen = 0;
        loop {
            let work = {
                let mut round = self.lock();
                while round.number == seen && !round.exit {
                    round = self.wake.wait(round).unwrap_or_else(|e| e.into_inner());
                }
                if round.number == seen {
                    return;
                }
                seen = round.number;
                round.work.clone()
            };
            let outcome = work.map_or(Ok(()), |work| self.go_over(work.as_ref()));
            let mut round = self.lock();
            if let Err(error) = outcome {
                self.stop.store(true, Ordering::Release);
                round.error.get_or_insert(error);
            }
            round.working = round.working.saturating_sub(1);
            if round.working == 0 {
                self.conclude(round);
            }
        }
    }

    fn go_over(&self, work: &dyn Work) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::AcqRel)) else {
                break;
            };
            work.chunk(*chunk)?;
            self.done.fetch_add(chunk.len, Ordering::AcqRel);
        }
        Ok(())
    }

    fn conclude(&self, mut round: MutexGuard<'_, Round>) {
        let done = self.done.load(Ordering::Acquire);
        let result = match round.error.take() {
            Some(error) => Err(error),
            None if self.stop.load(Ordering::Acquire) => Err(Error::new(
                Kind::Cancelled,
                "",
                format!("it was stopped after {done} bytes"),
            )),
            None => Ok(done),
        };
        let finished = round.finished.take();
        let work = round.work.take();
        drop(round);
        let result = match work {
            Some(work) => work.conclude(result),
            None => result,
        };
        if let Some(finished) = finished {
            finished(result);
        }
    }
}

/// The threads. Dropping this stops a round and ends them.
pub struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Crew {
    /// Threads for `memory`, asleep: one, two or four, by its size.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no thread.
    pub fn new(memory: Arc<GuestMemoryMmap>, hook: &ThreadHook) -> Result<Crew> {
        let chunks = chunks(&memory)?;
        let bytes: u64 = chunks.iter().map(|chunk| chunk.len).sum();
        let count = match bytes {
            ..SMALL => 1,
            LARGE.. => 4,
            _ => 2,
        };
        let shared = Arc::new(Shared {
            _memory: memory,
            chunks,
            round: Mutex::default(),
            wake: Condvar::new(),
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        });
        let mut all = Crew {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        for index in 0..count {
            let shared = shared.clone();
            let name = format!("memory-{index}");
            let thread = spawn(&name, Role::Crew, hook, move || shared.live())?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Begins a round; `finished` hears of its end, from a thread of it.
    ///
    /// # Errors
    /// `InvalidState` while there is one.
    pub fn begin(&self, work: Arc<dyn Work>, finished: Finished) -> Result<()> {
        let mut round = self.shared.lock();
        if round.working > 0 || round.finished.is_some() {
            let message = "the machine's memory is being gone over already";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        self.shared.next.store(0, Ordering::Release);
        self.shared.done.store(0, Ordering::Release);
        self.shared.stop.store(false, Ordering::Release);
        round.number = round.number.wrapping_add(1);
        round.working = self.threads.len();
        round.work = Some(work);
        round.finished = Some(finished);
        round.error = None;
        drop(round);
        self.shared.wake.notify_all();
        Ok(())
    }

    /// Stops the round, if there is one; it ends when each thread is done with its chunk.
    pub fn cancel(&self) {
        let round = self.shared.lock();
        if round.working > 0 {
            self.shared.stop.store(true, Ordering::Release);
        }
    }

    /// Bytes of guest memory that the latest round has gone over.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Acquire)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.cancel();
        self.shared.lock().exit = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Cuts the guest's memory up; a chunk never shares a page with another.
fn chunks(memory: &GuestMemoryMmap) -> Result<Vec<Chunk>> {
    let mut chunks = Vec::new();
    let mut before: u64 = 0;
    for region in memory.iter() {
        // For hugetlbfs the preferred size of a transfer is the page's (fs/hugetlbfs/inode.c).
        let page = match region.file_offset() {
            Some(file) => file
                .file()
                .metadata()
                .map_err(|e| Error::kernel("fstat", e))?
                .blksize(),
            None => 0,
        };
        let size = CHUNK.max(page);
        let mut offset: u64 = 0;
        while offset < region.len() {
            let len = size.min(region.len().saturating_sub(offset));
            chunks.push(Chunk {
                address: region.as_ptr().wrapping_add(offset as usize) as usize,
                len,
                offset: before.saturating_add(offset),
            });
            offset = offset.saturating_add(len);
        }
        before = before.saturating_add(region.len());
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{channel, Receiver};
    use std::time::Duration;

    use super::*;
    use crate::config::MemoryKind;
    use crate::memory::{self, Plan};
    use crate::prefault::Touch;
    use crate::thread::unconfined;

    fn memory(bytes: u64) -> Arc<GuestMemoryMmap> {
        Arc::new(memory::create(&Plan::of(MemoryKind::Mergeable, bytes), None).unwrap())
    }

    fn begin(crew: &Crew) -> Receiver<Result<u64>> {
        let (sender, receiver) = channel();
        let finished = Box::new(move |result| sender.send(result).unwrap());
        crew.begin(Arc::new(Touch), finished).unwrap();
        receiver
    }

    /// How many pages of the first region are there (mincore(2)).
    fn present(memory: &GuestMemoryMmap) -> usize {
        let region = memory.iter().next().unwrap();
        let mut pages = vec![0u8; (region.len() / 4096) as usize];
        // SAFETY: the range is the region's mapping; there is a byte for each of its pages.
        let result = unsafe {
            libc::mincore(
                region.as_ptr().cast(),
                region.len() as usize,
                pages.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0);
        pages.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn a_round_touches_all_and_another_finds_it_so() {
        let memory = memory(80 << 20);
        let crew = Crew::new(memory.clone(), &unconfined()).unwrap();
        assert_eq!(present(&memory), 0);
        for _ in 0..2 {
            let result = begin(&crew).recv_timeout(Duration::from_secs(30)).unwrap();
            assert_eq!(result.unwrap(), 80 << 20);
            assert_eq!(present(&memory), (80 << 20) / 4096);
            assert_eq!(crew.done(), 80 << 20);
        }
    }

    #[test]
    fn what_was_written_stays() {
        use vm_memory::{Bytes, GuestAddress};
        let memory = memory(4 << 20);
        memory
            .write_obj(0x1234_u16, GuestAddress(0x20_0000))
            .unwrap();
        let crew = Crew::new(memory.clone(), &unconfined()).unwrap();
        begin(&crew).recv().unwrap().unwrap();
        assert_eq!(
            memory.read_obj::<u16>(GuestAddress(0x20_0000)).unwrap(),
            0x1234
        );
    }

    #[test]
    fn a_cancelled_round_ends_early_and_there_is_one_at_a_time() {
        let memory = memory(1 << 30);
        let crew = Crew::new(memory, &unconfined()).unwrap();
        let round = begin(&crew);
        crew.cancel();
        let error = round.recv().unwrap().unwrap_err();
        assert_eq!(error.kind, Kind::Cancelled);
        assert!(crew.done() < 1 << 30);
        let second = begin(&crew);
        let busy = crew.begin(Arc::new(Touch), Box::new(|_| ())).unwrap_err();
        assert_eq!(busy.kind, Kind::InvalidState);
        crew.cancel();
        assert!(second.recv().unwrap().is_err());
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        use std::os::fd::FromRawFd;
        // SAFETY: a fresh memfd, owned by nobody else.
        let file = unsafe {
            std::fs::File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), libc::MFD_CLOEXEC))
        };
        file.set_len(4 << 20).unwrap();
        let plan = Plan::of(MemoryKind::Shareable, 4 << 20);
        let memory =
            Arc::new(memory::create(&plan, Some(file.try_clone().unwrap().into())).unwrap());
        // What a seal prevents in a real one: the file is cut off under the mapping.
        file.set_len(0).unwrap();
        let crew = Crew::new(memory, &unconfined()).unwrap();
        let error = begin(&crew).recv().unwrap().unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable, "{error}");
        assert_eq!(crew.done(), 0);
    }

    #[test]
    fn dropping_ends_a_round() {
        let crew = Crew::new(memory(1 << 30), &unconfined()).unwrap();
        let round = begin(&crew);
        drop(crew);
        // Told before the threads were gone, one way or the other.
        round.recv_timeout(Duration::ZERO).unwrap().ok();
    }

    #[test]
    fn chunks_cover_every_byte_once() {
        let memory = memory(3 << 30);
        let chunks = chunks(&memory).unwrap();
        let total: u64 = chunks.iter().map(|chunk| chunk.len).sum();
        assert_eq!(total, 3 << 30);
        let mut ranges: Vec<_> = chunks.iter().map(|c| (c.address as u64, c.len)).collect();
        ranges.sort_unstable();
        assert!(ranges
            .windows(2)
            .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    }
}
