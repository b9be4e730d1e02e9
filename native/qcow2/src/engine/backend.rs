// SPDX-License-Identifier: Apache-2.0
//! The two ways to carry out an I/O operation: io_uring, and plain system calls for hosts without
//! it and for tests. Both take operations under a token and give back token and result.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{OwnedFd, RawFd};

use io_uring::{opcode, squeue, types};

use crate::buffer::IoVecs;
use crate::error::{Error, Kind, Result};
use crate::ring::Ring;

/// One operation on one file.
#[derive(Debug)]
pub(crate) enum IoOp {
    Read {
        pieces: IoVecs,
        offset: u64,
    },
    /// With `durable` it has ended when the data is on the disk.
    Write {
        pieces: IoVecs,
        offset: u64,
        durable: bool,
    },
    Sync,
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
}

/// Where operations go.
pub(crate) enum Backend {
    Uring(Box<Uring>),
    Blocking(Blocking),
    /// A disk that completes in any order, for the power cut tests.
    #[cfg(test)]
    Reordering(Reordering),
}

impl Backend {
    /// Make a file known; the handle names it in [`Backend::push`].
    pub(crate) fn register(&mut self, fd: RawFd) -> Result<u32> {
        match self {
            Backend::Uring(uring) => uring.register(fd),
            Backend::Blocking(_) => Ok(fd as u32),
            #[cfg(test)]
            Backend::Reordering(_) => Ok(fd as u32),
        }
    }

    /// Forget a file.
    pub(crate) fn unregister(&mut self, handle: u32) {
        if let Backend::Uring(uring) = self {
            uring.unregister(handle);
        }
    }

    /// Start an operation.
    ///
    /// # Safety
    /// The pieces of a read or write, and the list of them, stay valid until the token comes back.
    pub(crate) unsafe fn push(&mut self, token: u64, handle: u32, op: &IoOp) {
        match self {
            Backend::Uring(uring) => uring.push(token, handle, op),
            // SAFETY: the caller's promise.
            Backend::Blocking(blocking) => blocking
                .done
                .push_back((token, unsafe { execute(handle as RawFd, op) })),
            #[cfg(test)]
            Backend::Reordering(disk) => disk.waiting.push((token, handle, std::ptr::from_ref(op))),
        }
    }

    /// Hand what is queued to the kernel and fetch what has ended.
    pub(crate) fn turn(&mut self, ended: &mut Vec<(u64, i32)>) -> Result<()> {
        match self {
            Backend::Uring(uring) => uring.turn(ended, 0),
            Backend::Blocking(blocking) => {
                ended.extend(blocking.done.drain(..));
                Ok(())
            }
            #[cfg(test)]
            Backend::Reordering(disk) => {
                disk.turn(ended);
                Ok(())
            }
        }
    }

    /// Whether something has ended that no event told of.
    pub(crate) fn has_news(&self) -> bool {
        match self {
            Backend::Uring(_) => false,
            Backend::Blocking(blocking) => !blocking.done.is_empty(),
            #[cfg(test)]
            Backend::Reordering(disk) => !disk.waiting.is_empty(),
        }
    }

    /// As [`Backend::turn`], but wait for at least one end if anything is under way.
    pub(crate) fn wait(&mut self, ended: &mut Vec<(u64, i32)>) -> Result<()> {
        match self {
            Backend::Uring(uring) if uring.under_way > 0 => uring.turn(ended, 1),
            other => other.turn(ended),
        }
    }
}

/// The io_uring backend.
pub(crate) struct Uring {
    ring: io_uring::IoUring,
    /// Places of the file table that are free.
    free: Vec<u32>,
    /// Operations that did not fit into the queues; they go in as others end.
    waiting: VecDeque<squeue::Entry>,
    /// Operations in the queues. Never more than the completion queue holds.
    under_way: u32,
}

impl Uring {
    pub(crate) fn new(ring: Ring) -> (Uring, OwnedFd) {
        let Ring {
            uring,
            event,
            files,
        } = ring;
        let free = (0..files).rev().collect();
        (
            Uring {
                ring: uring,
                free,
                waiting: VecDeque::new(),
                under_way: 0,
            },
            event,
        )
    }

    fn register(&mut self, fd: RawFd) -> Result<u32> {
        let place = self.free.pop().ok_or_else(|| {
            Error::new(
                Kind::NotSupported,
                "the I/O thread's ring has no room for another file: make it larger",
            )
        })?;
        match self.ring.submitter().register_files_update(place, &[fd]) {
            Ok(_) => Ok(place),
            Err(e) => {
                self.free.push(place);
                Err(Error::io("register a file with io_uring", &e))
            }
        }
    }

    fn unregister(&mut self, place: u32) {
        // A place that cannot be emptied is not used again.
        if self
            .ring
            .submitter()
            .register_files_update(place, &[-1])
            .is_ok()
        {
            self.free.push(place);
        }
    }

    fn push(&mut self, token: u64, handle: u32, op: &IoOp) {
        let file = types::Fixed(handle);
        let entry = match op {
            IoOp::Read { pieces, offset } => {
                opcode::Readv::new(file, pieces.as_ptr().cast(), pieces.len() as u32)
                    .offset(*offset)
                    .build()
            }
            IoOp::Write {
                pieces,
                offset,
                durable,
            } => opcode::Writev::new(file, pieces.as_ptr().cast(), pieces.len() as u32)
                .offset(*offset)
                .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            IoOp::Sync => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            IoOp::Fallocate { mode, offset, len } => opcode::Fallocate::new(file, *len)
                .offset(*offset)
                .mode(*mode)
                .build(),
        };
        self.waiting.push_back(entry.user_data(token));
        self.fill();
    }

    fn fill(&mut self) {
        let limit = self.ring.params().cq_entries();
        while self.under_way < limit {
            let Some(entry) = self.waiting.front() else {
                return;
            };
            // SAFETY: the memory an entry names stays valid until its token is reaped (push's contract).
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                if self.ring.submit().is_err() {
                    return;
                }
                continue;
            }
            self.waiting.pop_front();
            self.under_way += 1;
        }
    }

    fn turn(&mut self, ended: &mut Vec<(u64, i32)>, want: usize) -> Result<()> {
        loop {
            self.fill();
            let unsent = !self.ring.submission().is_empty();
            if unsent || want > 0 {
                match self.ring.submit_and_wait(want) {
                    Ok(_) => {}
                    Err(e)
                        if matches!(
                            e.raw_os_error(),
                            Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                        ) => {}
                    Err(e) => return Err(Error::io("io_uring_enter", &e)),
                }
            }
            let before = ended.len();
            for entry in self.ring.completion() {
                ended.push((entry.user_data(), entry.result()));
            }
            self.under_way -= (ended.len() - before) as u32;
            if self.waiting.is_empty() || ended.len() == before {
                return Ok(());
            }
        }
    }
}

/// The blocking backend: an operation has ended when it has been pushed.
#[derive(Default)]
pub(crate) struct Blocking {
    done: VecDeque<(u64, i32)>,
}

/// Operations are carried out when the engine turns, a few at a time, in any order.
#[cfg(test)]
pub(crate) struct Reordering {
    waiting: Vec<(u64, u32, *const IoOp)>,
    random: u64,
    faults: Option<Faults>,
}

/// Operation number `at` fails, and with `lasting` all that follow.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    pub(crate) at: u64,
    pub(crate) lasting: bool,
    pub(crate) errno: i32,
}

#[cfg(test)]
impl Reordering {
    pub(crate) fn new(seed: u64, faults: Option<Faults>) -> Reordering {
        Reordering {
            waiting: Vec::new(),
            random: seed | 1,
            faults,
        }
    }

    fn fault(&mut self) -> Option<i32> {
        let faults = self.faults.as_mut()?;
        let errno = faults.errno;
        if faults.at > 0 {
            faults.at -= 1;
            return None;
        }
        if !faults.lasting {
            self.faults = None;
        }
        Some(errno)
    }

    fn turn(&mut self, ended: &mut Vec<(u64, i32)>) {
        for _ in 0..2.min(self.waiting.len()) {
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let place = (self.random >> 33) as usize % self.waiting.len();
            let (token, handle, op) = self.waiting.swap_remove(place);
            let result = match self.fault() {
                Some(errno) => -errno,
                // SAFETY: the operation lives until its token comes back (push's contract).
                None => unsafe { execute(handle as RawFd, &*op) },
            };
            ended.push((token, result));
        }
    }
}

/// # Safety
/// The pieces are valid memory.
unsafe fn execute(fd: RawFd, op: &IoOp) -> i32 {
    #[cfg(test)]
    if crate::interrupted::strike("engine").is_err() {
        return -libc::EIO;
    }
    loop {
        let result = match op {
            // SAFETY: the caller's promise; the list of pieces is borrowed for the call.
            IoOp::Read { pieces, offset } => unsafe {
                libc::preadv64(fd, pieces.as_ptr(), pieces.len() as i32, *offset as i64)
            },
            IoOp::Write {
                pieces,
                offset,
                durable,
            } => {
                let (list, count) = (pieces.as_ptr(), pieces.len() as i32);
                // SAFETY: as above.
                let moved = unsafe { libc::pwritev64(fd, list, count, *offset as i64) };
                // A call of its own: the sandbox knows no pwritev2.
                // SAFETY: no pointers.
                match moved >= 0 && *durable && unsafe { libc::fdatasync(fd) } < 0 {
                    true => -1,
                    false => moved,
                }
            }
            // SAFETY: no pointers.
            IoOp::Sync => unsafe { libc::fdatasync(fd) as isize },
            // SAFETY: no pointers.
            IoOp::Fallocate { mode, offset, len } => unsafe {
                libc::fallocate64(fd, *mode, *offset as i64, *len as i64) as isize
            },
        };
        if result >= 0 {
            #[cfg(test)]
            crate::recorder::note_op(fd, op, result as u64);
            return i32::try_from(result).unwrap_or(i32::MAX);
        }
        let errno = io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
        if errno != libc::EINTR {
            return -errno;
        }
    }
}
