// SPDX-License-Identifier: Apache-2.0
//! Touching the guest's memory before the guest does, on several threads, so that it never waits for a page.
//!
//! The threads are made when the machine is built, since none is later, and sleep. A round cuts memory into chunks
//! that the threads take one after the other and fault in with MADV_POPULATE_WRITE (madvise(2), Linux 5.14):
//! what is there already stays as it is, and a running guest only ever waits for one chunk. The last thread of a round
//! says what became of it. One round at a time.
//!
//! What stops a round: all chunks done, a cancellation, the machine's end, or the kernel's refusal (no memory left, which
//! for huge memory cannot be, since it is reserved). What was touched by then stays touched.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, Kind, Result};
use crate::thread::{spawn, Role, ThreadHook};

/// Bytes that a thread touches at a time; a multiple of every page but those of 1 GiB.
const CHUNK: u64 = 32 << 20;
/// Less memory than this is one thread's work.
const SMALL: u64 = 256 << 20;
/// So much and more is worth four.
const LARGE: u64 = 16 << 30;

/// Called once a round has ended, with the bytes that were touched.
pub type Finished = Box<dyn FnOnce(Result<u64>) + Send>;

/// Some of the guest's memory, as the process sees it.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    address: usize,
    len: u64,
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
    finished: Option<Finished>,
    error: Option<Error>,
    exit: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Round> {
        self.round.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A thread's life.
    fn work(&self) {
        let mut seen = 0;
        loop {
            {
                let mut round = self.lock();
                while round.number == seen && !round.exit {
                    round = self.wake.wait(round).unwrap_or_else(|e| e.into_inner());
                }
                if round.number == seen {
                    return;
                }
                seen = round.number;
            }
            let outcome = self.touch_all();
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

    fn touch_all(&self) -> Result<()> {
        while !self.stop.load(Ordering::Acquire) {
            let Some(chunk) = self.chunks.get(self.next.fetch_add(1, Ordering::AcqRel)) else {
                break;
            };
            chunk.touch()?;
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
        drop(round);
        if let Some(finished) = finished {
            finished(result);
        }
    }
}

impl Chunk {
    fn touch(self) -> Result<()> {
        loop {
            let place = self.address as *mut libc::c_void;
            // SAFETY: the range lies in a mapping of the guest's memory, which `Shared` keeps; the advice
            // changes nothing in it.
            if unsafe { libc::madvise(place, self.len as usize, libc::MADV_POPULATE_WRITE) } == 0 {
                return Ok(());
            }
            let error = std::io::Error::last_os_error();
            match error.raw_os_error() {
                // A signal, or pages that were just being moved.
                Some(libc::EINTR | libc::EAGAIN) => {}
                Some(libc::EINVAL) => {
                    let message = "the kernel has no MADV_POPULATE_WRITE (before 5.14)";
                    return Err(Error::new(Kind::NotSupported, "prefault", message));
                }
                _ => return Err(Error::kernel("touching the guest's memory", error)),
            }
        }
    }
}

/// The threads. Dropping this stops a round and ends them.
pub struct Prefault {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Prefault {
    /// Threads for `memory`, asleep: one, two or four, by its size.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no thread.
    pub fn new(memory: Arc<GuestMemoryMmap>, hook: &ThreadHook) -> Result<Prefault> {
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
        let mut all = Prefault {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        for index in 0..count {
            let shared = shared.clone();
            let name = format!("memory-{index}");
            let thread = spawn(&name, Role::Memory, hook, move || shared.work())?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Begins a round; `finished` hears of its end, from a thread of it.
    ///
    /// # Errors
    /// `InvalidState` while there is one.
    pub fn begin(&self, finished: Finished) -> Result<()> {
        let mut round = self.shared.lock();
        if round.working > 0 {
            let message = "the machine's memory is being touched already";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        self.shared.next.store(0, Ordering::Release);
        self.shared.done.store(0, Ordering::Release);
        self.shared.stop.store(false, Ordering::Release);
        round.number = round.number.wrapping_add(1);
        round.working = self.threads.len();
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

    /// Bytes that the latest round has touched.
    pub fn done(&self) -> u64 {
        self.shared.done.load(Ordering::Acquire)
    }
}

impl Drop for Prefault {
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
            });
            offset = offset.saturating_add(len);
        }
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
    use crate::thread::unconfined;

    fn memory(bytes: u64) -> Arc<GuestMemoryMmap> {
        Arc::new(memory::create(&Plan::of(MemoryKind::Mergeable, bytes), None).unwrap())
    }

    fn begin(prefault: &Prefault) -> Receiver<Result<u64>> {
        let (sender, receiver) = channel();
        let finished = Box::new(move |result| sender.send(result).unwrap());
        prefault.begin(finished).unwrap();
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
        let prefault = Prefault::new(memory.clone(), &unconfined()).unwrap();
        assert_eq!(present(&memory), 0);
        for _ in 0..2 {
            let result = begin(&prefault)
                .recv_timeout(Duration::from_secs(30))
                .unwrap();
            assert_eq!(result.unwrap(), 80 << 20);
            assert_eq!(present(&memory), (80 << 20) / 4096);
            assert_eq!(prefault.done(), 80 << 20);
        }
    }

    #[test]
    fn what_was_written_stays() {
        use vm_memory::{Bytes, GuestAddress};
        let memory = memory(4 << 20);
        memory
            .write_obj(0x1234_u16, GuestAddress(0x20_0000))
            .unwrap();
        let prefault = Prefault::new(memory.clone(), &unconfined()).unwrap();
        begin(&prefault).recv().unwrap().unwrap();
        assert_eq!(
            memory.read_obj::<u16>(GuestAddress(0x20_0000)).unwrap(),
            0x1234
        );
    }

    #[test]
    fn a_cancelled_round_ends_early_and_there_is_one_at_a_time() {
        let memory = memory(1 << 30);
        let prefault = Prefault::new(memory, &unconfined()).unwrap();
        let round = begin(&prefault);
        prefault.cancel();
        let error = round.recv().unwrap().unwrap_err();
        assert_eq!(error.kind, Kind::Cancelled);
        assert!(prefault.done() < 1 << 30);
        let second = begin(&prefault);
        let busy = prefault.begin(Box::new(|_| ())).unwrap_err();
        assert_eq!(busy.kind, Kind::InvalidState);
        prefault.cancel();
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
        let prefault = Prefault::new(memory, &unconfined()).unwrap();
        let error = begin(&prefault).recv().unwrap().unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable, "{error}");
        assert_eq!(prefault.done(), 0);
    }

    #[test]
    fn dropping_ends_a_round() {
        let prefault = Prefault::new(memory(1 << 30), &unconfined()).unwrap();
        let round = begin(&prefault);
        drop(prefault);
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
