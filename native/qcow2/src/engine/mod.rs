// SPDX-License-Identifier: Apache-2.0
//! The engine of an I/O thread: it takes requests for several images, asks each image's metadata
//! code for a plan, carries the plan out, and reports.
//!
//! A request is a [`Task`]. It is *advanced* until its whole range is planned: each step of the plan
//! becomes operations of the [`Backend`], all under way at once. Where the plan stops, the task is
//! *parked*:
//!
//! | the image says  | the engine does                                     | the task goes on when          |
//! |-----------------|-----------------------------------------------------|--------------------------------|
//! | `Load`          | reads the metadata block through the ring           | the block was supplied         |
//! | `Wait`          | nothing: a waiter is registered                     | it is woken through the mailbox|
//! | `Commit`        | joins a commit, or drives a new one                 | the commit has ended           |
//! | `Fail`          | fails the task; what is under way still ends        | -                              |
//!
//! So a metadata miss, an allocation or a flush of one request never holds up another, and nothing
//! on the I/O thread blocks: metadata is read and written through the ring as well. (One exception:
//! a regular image file is lengthened with ftruncate in steps of many clusters, which is a matter of
//! the inode only.)
//!
//! Requests on overlapping ranges are unordered, as on a disk. No guest memory is kept beyond a
//! request's completion, and none is registered with the kernel.

pub(crate) mod backend;
pub(crate) mod task;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use crate::buffer::{self, Buffer, IoVecs};
use crate::compress;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::mailbox::{Mailbox, Waiter};
use crate::plan::{
    Allocation, CommitIo, CommitStep, Extents, FileId, Need, Planned, Source, Stop, WriteStep,
    ZeroStep,
};
use crate::qcow2::zero::Zeroing;
use crate::request::{Completion, Op, Request};
use crate::ring::{event_fd, Ring};
use crate::slab::Slab;
use backend::{Backend, Blocking, IoOp, Uring};
use task::{After, CommitRun, Io, Job, Owner, Task};

/// Zeros are written from one buffer of this size, named as often as needed.
const ZEROS: usize = 64 * 1024;
/// The most zeros written by one operation: what fits into IOV_MAX pieces, and keeps others alive.
const ZERO_STEP: u64 = 4 << 20;

/// An image attached to an [`Engine`]; what `attach` gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u64);

struct Attached {
    image: Arc<Image>,
    handles: Vec<u32>,
    commit: Option<CommitRun>,
    tasks: usize,
}

/// One per I/O thread; serves several images. Not shared between threads.
pub struct Engine {
    backend: Backend,
    mailbox: Arc<Mailbox>,
    event: RawFd,
    slots: Slab<Attached>,
    tasks: Slab<Task>,
    jobs: Slab<Job>,
    ios: Slab<Box<Io>>,
    runnable: VecDeque<u64>,
    done: Vec<Completion>,
    zeros: Buffer,
}

impl Engine {
    /// An engine on a ring that was made before the sandbox closed.
    pub fn uring(ring: Ring) -> Engine {
        let (uring, event) = Uring::new(ring);
        Engine::new(Backend::Uring(Box::new(uring)), event)
    }

    /// An engine on plain system calls: `submit` does the whole work, `poll` reports it.
    pub fn blocking() -> std::io::Result<Engine> {
        Ok(Engine::new(
            Backend::Blocking(Blocking::default()),
            event_fd()?,
        ))
    }

    /// An engine whose operations end in any order, and some not well.
    #[cfg(test)]
    pub(crate) fn reordering(
        seed: u64,
        faults: Option<backend::Faults>,
    ) -> std::io::Result<Engine> {
        let disk = backend::Reordering::new(seed, faults);
        Ok(Engine::new(Backend::Reordering(disk), event_fd()?))
    }

    fn new(backend: Backend, event: std::os::fd::OwnedFd) -> Engine {
        let fd = event.as_raw_fd();
        Engine {
            backend,
            mailbox: Arc::new(Mailbox::new(event)),
            event: fd,
            slots: Slab::new(),
            tasks: Slab::new(),
            jobs: Slab::new(),
            ios: Slab::new(),
            runnable: VecDeque::new(),
            done: Vec::new(),
            zeros: Buffer::zeroed(ZEROS),
        }
    }

    /// Serve `image` too. Fails when the ring's file table is full.
    pub fn attach(&mut self, image: Arc<Image>) -> Result<Slot> {
        let mut handles = Vec::new();
        for file in image.files() {
            match self.backend.register(file.fd()) {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    handles
                        .into_iter()
                        .for_each(|handle| self.backend.unregister(handle));
                    return Err(error);
                }
            }
        }
        Ok(Slot(self.slots.insert(Attached {
            image,
            handles,
            commit: None,
            tasks: 0,
        })))
    }

    /// Serve the image no more. Refused with InvalidState while a request of it is under way.
    pub fn detach(&mut self, slot: Slot) -> Result<()> {
        let attached = self.slots.get(slot.0).ok_or_else(no_slot)?;
        if attached.tasks > 0 || attached.commit.is_some() {
            return Err(Error::new(
                Kind::InvalidState,
                "requests of this image are under way",
            ));
        }
        if let Some(attached) = self.slots.remove(slot.0) {
            attached
                .handles
                .into_iter()
                .for_each(|handle| self.backend.unregister(handle));
        }
        Ok(())
    }

    /// Begin a request. Every request gets exactly one completion from `poll`, also when it is refused.
    ///
    /// # Safety
    /// The buffers are valid (writable for reads) until the completion with this id is returned.
    pub unsafe fn submit(&mut self, slot: Slot, request: Request) {
        self.mailbox.enter();
        if let Err(error) = self.accept(slot, &request) {
            self.complete(request.id, Err(error));
        } else if let Some(attached) = self.slots.get_mut(slot.0) {
            attached.tasks += 1;
            let epoch = attached.image.enter();
            let task = Task {
                id: request.id,
                slot: slot.0,
                op: request.op,
                offset: request.offset,
                len: request.len,
                pieces: request.buffers,
                planned: 0,
                zeros_until: 0,
                pending: 0,
                parked: false,
                committing: false,
                committed: false,
                epoch,
                error: None,
            };
            let key = self.tasks.insert(task);
            self.runnable.push_back(key);
            self.run();
        }
        self.mailbox.leave();
        self.mind_mail();
    }

    /// Submit what is queued, reap what has ended, never wait. An error is one of the ring itself.
    pub fn poll(&mut self, done: &mut Vec<Completion>) -> Result<()> {
        self.mailbox.enter();
        self.mailbox.silence();
        let result = self.turn(false);
        self.mailbox.leave();
        done.append(&mut self.done);
        self.mind_mail();
        result
    }

    /// As `poll`, but wait until at least one completion is there (or nothing is under way).
    pub fn wait(&mut self, done: &mut Vec<Completion>) -> Result<()> {
        loop {
            self.poll(done)?;
            if !done.is_empty() || self.tasks.len() == 0 {
                return Ok(());
            }
            self.mailbox.wait_readable();
        }
    }

    /// Readable when `poll` has work.
    pub fn event_fd(&self) -> RawFd {
        self.event
    }

    /// Requests under way.
    pub fn pending(&self) -> usize {
        self.tasks.len()
    }

    fn accept(&self, slot: Slot, request: &Request) -> Result<()> {
        let attached = self.slots.get(slot.0).ok_or_else(no_slot)?;
        let refuse = |message: &str| Err(Error::new(Kind::InvalidArgument, message));
        let end = request.offset.checked_add(request.len);
        if end.is_none_or(|end| end > attached.image.size()) {
            return refuse("the range does not lie on the disk");
        }
        let moves_data = matches!(request.op, Op::Read | Op::Write { .. });
        let expected = if moves_data { request.len } else { 0 };
        if buffer::total(&request.buffers) != Some(expected) {
            return refuse("the buffers' lengths do not add up to the request's");
        }
        if !matches!(request.op, Op::Read | Op::Flush) {
            attached.image.writable()?;
        }
        Ok(())
    }

    fn complete(&mut self, id: u64, result: Result<()>) {
        self.done.push(Completion { id, result });
    }

    /// After leaving: letters that came meanwhile, and completions not fetched, make the eventfd readable.
    fn mind_mail(&mut self) {
        let letters = self.mailbox.take();
        let idle = letters.is_empty() && self.runnable.is_empty();
        self.deliver(letters);
        if !idle || !self.done.is_empty() || self.backend.has_news() {
            self.mailbox.ring();
        }
    }

    fn deliver(&mut self, letters: Vec<crate::mailbox::Message>) {
        for (key, outcome) in letters {
            let Some(task) = self.tasks.get_mut(key) else {
                continue;
            };
            if let Some(result) = outcome {
                if task.committing {
                    task.committed = true;
                }
                if let Err(error) = result {
                    task.fail(error);
                }
            }
            if task.parked {
                task.parked = false;
                self.runnable.push_back(key);
            }
        }
    }

    /// Go round until nothing moves any more.
    fn turn(&mut self, wait: bool) -> Result<()> {
        let mut ended = Vec::new();
        loop {
            let letters = self.mailbox.take();
            self.deliver(letters);
            self.run();
            if wait {
                self.backend.wait(&mut ended)?;
            } else {
                self.backend.turn(&mut ended)?;
            }
            let quiet = ended.is_empty();
            for (token, result) in ended.drain(..) {
                self.ended(token, result);
            }
            if quiet && self.runnable.is_empty() {
                return Ok(());
            }
        }
    }

    fn run(&mut self) {
        while let Some(key) = self.runnable.pop_front() {
            self.advance(key);
        }
    }

    /// Plan and start as much of a task as can be.
    fn advance(&mut self, key: u64) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        let Some(attached) = self.slots.get(task.slot) else {
            return;
        };
        if task.parked {
            return;
        }
        let image = attached.image.clone();
        let waiter = Waiter {
            mailbox: self.mailbox.clone(),
            task: key,
        };
        while let Some(task) = self.tasks.get_mut(key) {
            if task.error.is_some() || task.planned >= task.len {
                break;
            }
            let at = task.offset + task.planned;
            let rest = task.len - task.planned;
            let op = task.op;
            let stopped = match op {
                Op::Read => image
                    .plan_read(at, rest, &waiter)
                    .map(|extents| self.read(key, &extents)),
                Op::Write { .. } => image
                    .plan_write(at, rest, &waiter)
                    .map(|step| self.write_data(key, step)),
                Op::Flush => Ok(()),
                Op::Discard | Op::WriteZeroes { .. } => {
                    self.advance_zero(key, at, rest, &image, &waiter)
                }
            };
            match stopped {
                Ok(()) => {}
                Err(Stop::Load(need)) => return self.load(key, need),
                Err(Stop::Wait) => return self.park(key),
                Err(Stop::Commit) => return self.join_commit(key, &image, waiter, false),
                Err(Stop::Fail(error)) => {
                    if let Some(task) = self.tasks.get_mut(key) {
                        task.fail(error);
                    }
                }
            }
        }
        self.settle(key, &image, waiter);
    }

    fn advance_zero(
        &mut self,
        key: u64,
        at: u64,
        rest: u64,
        image: &Image,
        waiter: &Waiter,
    ) -> Planned<()> {
        let Some(task) = self.tasks.get_mut(key) else {
            return Ok(());
        };
        if task.zeros_until > at {
            let len = rest.min(task.zeros_until - at).min(ZERO_STEP);
            let step = image.plan_write(at, len, waiter)?;
            let pieces = repeat(self.zeros.iovec(0, ZEROS), step.len());
            self.write(key, step, pieces);
            return Ok(());
        }
        let unmap = !matches!(task.op, Op::WriteZeroes { unmap: false });
        let required = task.op != Op::Discard;
        match image.plan_zero(at, rest, Zeroing { required, unmap }, waiter)? {
            ZeroStep::Done { len } => task.planned += len,
            ZeroStep::Write { len } => task.zeros_until = at + len,
            ZeroStep::Fallocate {
                file,
                offset,
                len,
                punch,
            } => {
                task.planned += len;
                task.pending += 1;
                let slot = task.slot;
                let how = if punch {
                    libc::FALLOC_FL_PUNCH_HOLE
                } else {
                    libc::FALLOC_FL_ZERO_RANGE
                };
                let op = IoOp::Fallocate {
                    mode: how | libc::FALLOC_FL_KEEP_SIZE,
                    offset: offset.0,
                    len,
                };
                let after = After::Zeroed {
                    task: key,
                    offset: at,
                    len,
                    required,
                };
                self.start(Io {
                    slot,
                    file,
                    op,
                    expected: 0,
                    after,
                });
            }
        }
        Ok(())
    }

    fn park(&mut self, key: u64) {
        if let Some(task) = self.tasks.get_mut(key) {
            task.parked = true;
        }
    }

    fn load(&mut self, key: u64, need: Need) {
        self.park(key);
        let Some(slot) = self.tasks.get(key).map(|task| task.slot) else {
            return;
        };
        let mut buffer = Buffer::zeroed(need.len);
        let pieces = IoVecs::from_slice(&[buffer.iovec(0, need.len)]);
        let op = IoOp::Read {
            pieces,
            offset: need.offset.0,
        };
        let after = After::Loaded {
            slot,
            need,
            buffer,
            task: key,
        };
        self.start(Io {
            slot,
            file: need.file,
            op,
            expected: need.len as u64,
            after,
        });
    }

    /// Join a commit; with `fresh`, one that begins after now.
    fn join_commit(&mut self, key: u64, image: &Image, waiter: Waiter, fresh: bool) {
        self.park(key);
        let Some(slot) = self.tasks.get(key).map(|task| task.slot) else {
            return;
        };
        if let Some(step) = image.join_commit(waiter, fresh) {
            if let Some(attached) = self.slots.get_mut(slot) {
                attached.commit = Some(CommitRun {
                    pending: 0,
                    result: Ok(()),
                });
            }
            self.commit_step(slot, step);
        }
    }

    fn commit_step(&mut self, slot: u64, step: CommitStep) {
        let mut step = step;
        loop {
            let Some(attached) = self.slots.get_mut(slot) else {
                return;
            };
            match step {
                CommitStep::Done { again: false } => {
                    attached.commit = None;
                    return;
                }
                CommitStep::Done { again: true } => step = attached.image.commit_begin(),
                CommitStep::Io(ios) if ios.is_empty() => step = attached.image.commit_next(Ok(())),
                CommitStep::Io(ios) => {
                    attached.commit = Some(CommitRun {
                        pending: ios.len() as u32,
                        result: Ok(()),
                    });
                    return ios.into_iter().for_each(|io| self.commit_io(slot, io));
                }
            }
        }
    }

    fn commit_io(&mut self, slot: u64, mut io: CommitIo) {
        let (file, op, expected) = match &mut io {
            CommitIo::Sync { file } => (*file, IoOp::Sync, 0),
            CommitIo::Punch { file, offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                (
                    *file,
                    IoOp::Fallocate {
                        mode,
                        offset: offset.0,
                        len: *len,
                    },
                    0,
                )
            }
            CommitIo::Write {
                file,
                offset,
                blocks,
            } => {
                let piece = |block: &crate::cache::Block| {
                    let bytes = block.bytes();
                    libc::iovec {
                        iov_base: bytes.as_ptr().cast_mut().cast(),
                        iov_len: bytes.len(),
                    }
                };
                let pieces: IoVecs = blocks.iter().map(piece).collect();
                let expected = buffer::total(&pieces).unwrap_or(0);
                (
                    *file,
                    IoOp::Write {
                        pieces,
                        offset: offset.0,
                    },
                    expected,
                )
            }
        };
        self.start(Io {
            slot,
            file,
            op,
            expected,
            after: After::Commit { slot, io },
        });
    }

    /// See whether a task has ended, or only its commit is missing.
    fn settle(&mut self, key: u64, image: &Image, waiter: Waiter) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        let through = task.error.is_some() || task.planned >= task.len;
        if task.pending > 0 || !through || task.parked {
            return;
        }
        if task.wants_commit() && !task.committed && task.error.is_none() {
            task.committing = true;
            return self.join_commit(key, image, waiter, true);
        }
        if let Some(task) = self.tasks.remove(key) {
            image.leave(task.epoch);
            if let Some(attached) = self.slots.get_mut(task.slot) {
                attached.tasks -= 1;
            }
            self.complete(task.id, task.error.map_or(Ok(()), Err));
        }
    }

    fn read(&mut self, key: u64, extents: &Extents) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        task.planned = task.len;
        let pieces = std::mem::take(&mut task.pieces);
        self.fetch(Owner::Task(key), extents, &pieces);
    }

    fn write_data(&mut self, key: u64, step: WriteStep) {
        let Some(task) = self.tasks.get(key) else {
            return;
        };
        let pieces = buffer::subrange(&task.pieces, task.planned, step.len());
        self.write(key, step, pieces);
    }

    fn write(&mut self, key: u64, step: WriteStep, pieces: IoVecs) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        task.pending += 1;
        let slot = task.slot;
        match step {
            WriteStep::InPlace { file, offset, len } => {
                task.planned += len;
                let Some(alignment) = self.alignment(slot, file) else {
                    return;
                };
                if buffer::refused(&pieces, alignment) {
                    let mut buffer = Buffer::zeroed(len as usize);
                    // SAFETY: the pieces are valid until completion (submit's contract).
                    unsafe { buffer::gather(&pieces, buffer.bytes_mut()) };
                    let pieces = IoVecs::from_slice(&[buffer.iovec(0, len as usize)]);
                    let op = IoOp::Write {
                        pieces,
                        offset: offset.0,
                    };
                    let after = After::Bounced {
                        task: key,
                        _buffer: buffer,
                    };
                    return self.start(Io {
                        slot,
                        file,
                        op,
                        expected: len,
                        after,
                    });
                }
                let op = IoOp::Write {
                    pieces,
                    offset: offset.0,
                };
                self.start(Io {
                    slot,
                    file,
                    op,
                    expected: len,
                    after: After::Owner(Owner::Task(key)),
                });
            }
            WriteStep::Allocate(allocation) => {
                task.planned += allocation.len;
                self.begin_job(key, *allocation, pieces);
            }
        }
    }

    fn begin_job(&mut self, task: u64, allocation: Allocation, pieces: IoVecs) {
        let length =
            |extents: &Extents| extents.iter().map(|extent| extent.len).sum::<u64>() as usize;
        let mut head = Buffer::zeroed(length(&allocation.head));
        let mut tail = Buffer::zeroed(length(&allocation.tail));
        let head_piece = IoVecs::from_slice(&[head.iovec(0, head.len())]);
        let tail_piece = IoVecs::from_slice(&[tail.iovec(0, tail.len())]);
        let job = Job {
            task,
            ticket: allocation.ticket,
            file: allocation.file,
            offset: allocation.offset.0,
            head,
            tail,
            pieces,
            // One for this function itself, so that the job does not go on before all is started.
            pending: 1,
            error: None,
        };
        // A Buffer's memory does not move with it.
        let key = self.jobs.insert(job);
        self.fetch(Owner::Job(key), &allocation.head, &head_piece);
        self.fetch(Owner::Job(key), &allocation.tail, &tail_piece);
        self.counted_off(Owner::Job(key), Ok(()));
    }

    /// Write a job's clusters, now that head and tail are there.
    fn write_job(&mut self, key: u64) {
        let Some(job) = self.jobs.get_mut(key) else {
            return;
        };
        let Some(slot) = self.tasks.get(job.task).map(|task| task.slot) else {
            return;
        };
        let mut pieces = IoVecs::new();
        if job.head.len() > 0 {
            pieces.push(job.head.iovec(0, job.head.len()));
        }
        pieces.extend_from_slice(&job.pieces);
        if job.tail.len() > 0 {
            pieces.push(job.tail.iovec(0, job.tail.len()));
        }
        let (file, offset) = (job.file, job.offset);
        let expected = buffer::total(&pieces).unwrap_or(0);
        let mut bounce = None;
        if self
            .alignment(slot, file)
            .is_some_and(|unit| buffer::refused(&pieces, unit))
        {
            let mut buffer = Buffer::zeroed(expected as usize);
            // SAFETY: head and tail are the job's, the guest's pieces are valid until completion.
            unsafe { buffer::gather(&pieces, buffer.bytes_mut()) };
            pieces = IoVecs::from_slice(&[buffer.iovec(0, expected as usize)]);
            bounce = Some(buffer);
        }
        let after = After::JobWritten {
            job: key,
            _buffer: bounce,
        };
        self.start(Io {
            slot,
            file,
            op: IoOp::Write { pieces, offset },
            expected,
            after,
        });
    }

    /// Read `extents` into `pieces`.
    fn fetch(&mut self, owner: Owner, extents: &Extents, pieces: &[libc::iovec]) {
        let mut at = 0;
        for extent in extents {
            let part = buffer::subrange(pieces, at, extent.len);
            at += extent.len;
            match &extent.source {
                // SAFETY: a read's buffers are writable until completion; a job's are its own.
                Source::Zero => unsafe { buffer::fill_zero(&part) },
                Source::File { file, offset } => {
                    self.fetch_plain(owner, *file, offset.0, extent.len, part)
                }
                Source::Compressed {
                    file,
                    offset,
                    stored,
                    codec,
                    cluster_size,
                    skip,
                } => {
                    let Some(slot) = self.counted_on(owner) else {
                        return;
                    };
                    let unit = self.alignment(slot, *file).unwrap_or(1) as u64;
                    let start = offset.0 / unit * unit;
                    let front = (offset.0 - start) as usize;
                    let len = (front as u64 + stored).next_multiple_of(unit) as usize;
                    let mut buffer = Buffer::zeroed(len);
                    let op = IoOp::Read {
                        pieces: IoVecs::from_slice(&[buffer.iovec(0, len)]),
                        offset: start,
                    };
                    let after = After::Expand {
                        owner,
                        buffer,
                        front,
                        stored: *stored as usize,
                        codec: *codec,
                        cluster_size: *cluster_size as usize,
                        skip: *skip as usize,
                        pieces: part,
                    };
                    self.start(Io {
                        slot,
                        file: *file,
                        op,
                        expected: len as u64,
                        after,
                    });
                }
            }
        }
    }

    fn fetch_plain(&mut self, owner: Owner, file: FileId, offset: u64, len: u64, part: IoVecs) {
        let Some(slot) = self.counted_on(owner) else {
            return;
        };
        let unit = self.alignment(slot, file).unwrap_or(1);
        let aligned = offset % unit as u64 == 0 && !buffer::refused(&part, unit);
        if aligned {
            let op = IoOp::Read {
                pieces: part,
                offset,
            };
            return self.start(Io {
                slot,
                file,
                op,
                expected: len,
                after: After::Owner(owner),
            });
        }
        let start = offset / unit as u64 * unit as u64;
        let skip = (offset - start) as usize;
        let length = (skip as u64 + len).next_multiple_of(unit as u64) as usize;
        let mut buffer = Buffer::zeroed(length);
        let op = IoOp::Read {
            pieces: IoVecs::from_slice(&[buffer.iovec(0, length)]),
            offset: start,
        };
        let after = After::Scatter {
            owner,
            buffer,
            skip,
            pieces: part,
        };
        self.start(Io {
            slot,
            file,
            op,
            expected: length as u64,
            after,
        });
    }

    fn alignment(&self, slot: u64, file: FileId) -> Option<usize> {
        Some(self.slots.get(slot)?.image.files().get(file)?.alignment)
    }

    /// One more operation under way for the owner; gives its slot.
    fn counted_on(&mut self, owner: Owner) -> Option<u64> {
        match owner {
            Owner::Task(key) => {
                let task = self.tasks.get_mut(key)?;
                task.pending += 1;
                Some(task.slot)
            }
            Owner::Job(key) => {
                let job = self.jobs.get_mut(key)?;
                job.pending += 1;
                Some(self.tasks.get(job.task)?.slot)
            }
        }
    }

    fn start(&mut self, io: Io) {
        let handle = self
            .slots
            .get(io.slot)
            .and_then(|attached| attached.handles.get(io.file).copied());
        let token = self.ios.insert(Box::new(io));
        match (handle, self.ios.get(token)) {
            // SAFETY: the Io is boxed and kept until its token comes back, with the memory it owns;
            // the guest's memory is valid until the completion (submit's contract).
            (Some(handle), Some(io)) => unsafe { self.backend.push(token, handle, &io.op) },
            _ => self.ended(token, -libc::EBADF),
        }
    }

    /// An operation has ended: go on where it was cut short, else do what comes after.
    fn ended(&mut self, token: u64, result: i32) {
        let Some(mut io) = self.ios.remove(token) else {
            return;
        };
        if result == -libc::EINTR || result == -libc::EAGAIN {
            return self.start(*io);
        }
        if result >= 0 && io.expected > 0 && (result as u64) < io.expected {
            let moved = result as u64;
            let rest = io.expected - moved;
            let unit = self.alignment(io.slot, io.file).unwrap_or(1) as u64;
            match &mut io.op {
                IoOp::Read { pieces, .. } if moved == 0 || moved % unit != 0 => {
                    // SAFETY: as for the read itself. Past the end of a file there are zeros.
                    unsafe { buffer::fill_zero(&buffer::subrange(pieces, moved, rest)) };
                }
                IoOp::Read { pieces, offset } | IoOp::Write { pieces, offset } if moved > 0 => {
                    *pieces = buffer::subrange(pieces, moved, rest);
                    *offset += moved;
                    io.expected = rest;
                    return self.start(*io);
                }
                _ => {
                    return self.after(
                        io.after,
                        Err(Error::os("short write to the image", libc::EIO)),
                    )
                }
            }
        }
        let outcome = if result < 0 {
            Err(Error::os(describe(&io.op), result))
        } else {
            Ok(())
        };
        self.after(io.after, outcome);
    }

    fn after(&mut self, after: After, outcome: Result<()>) {
        match after {
            After::Owner(owner) => self.counted_off(owner, outcome),
            After::Scatter {
                owner,
                buffer,
                skip,
                pieces,
            } => {
                // SAFETY: the owner's memory is valid until it is counted off.
                unsafe { buffer::scatter(buffer.bytes().get(skip..).unwrap_or(&[]), &pieces) };
                self.counted_off(owner, outcome);
            }
            After::Expand {
                owner,
                buffer,
                front,
                stored,
                codec,
                cluster_size,
                skip,
                pieces,
            } => {
                let outcome = outcome.and_then(|()| {
                    let packed = buffer
                        .bytes()
                        .get(front..front.saturating_add(stored))
                        .unwrap_or(&[]);
                    let cluster = compress::expand(codec, packed, cluster_size)?;
                    // SAFETY: as above.
                    unsafe { buffer::scatter(cluster.get(skip..).unwrap_or(&[]), &pieces) };
                    Ok(())
                });
                self.counted_off(owner, outcome);
            }
            After::Bounced { task, .. } => self.counted_off(Owner::Task(task), outcome),
            After::JobWritten { job, .. } => self.job_written(job, outcome),
            After::Zeroed {
                task,
                offset,
                len,
                required,
            } => {
                self.zeroed(task, offset, len, required, outcome);
            }
            After::Loaded {
                slot,
                need,
                buffer,
                task,
            } => {
                if let Some(attached) = self.slots.get(slot) {
                    let failed = outcome.clone().err();
                    attached.image.supply(need, outcome.map(|()| buffer));
                    if let Some(task) = self.tasks.get_mut(task) {
                        task.parked = false;
                        if let Some(error) = failed {
                            task.fail(error.context("read metadata"));
                        }
                    }
                    self.runnable.push_back(task);
                }
            }
            After::Commit {
                slot,
                io: CommitIo::Punch { .. },
            } => self.commit_ended(slot, Ok(())),
            After::Commit { slot, .. } => self.commit_ended(slot, outcome),
        }
    }

    fn commit_ended(&mut self, slot: u64, outcome: Result<()>) {
        let Some(attached) = self.slots.get_mut(slot) else {
            return;
        };
        let Some(run) = attached.commit.as_mut() else {
            return;
        };
        run.pending -= 1;
        if run.result.is_ok() {
            run.result = outcome;
        }
        if run.pending == 0 {
            let result = std::mem::replace(&mut run.result, Ok(()));
            let step = attached.image.commit_next(result);
            self.commit_step(slot, step);
        }
    }

    fn job_written(&mut self, key: u64, outcome: Result<()>) {
        let Some(job) = self.jobs.remove(key) else {
            return;
        };
        let attached = self
            .tasks
            .get(job.task)
            .and_then(|task| self.slots.get(task.slot));
        if let Some(attached) = attached {
            attached.image.finish(job.ticket, outcome.is_ok());
        }
        self.counted_off(Owner::Task(job.task), outcome);
    }

    fn zeroed(&mut self, key: u64, offset: u64, len: u64, required: bool, outcome: Result<()>) {
        let cannot = outcome.as_ref().is_err_and(|error| {
            matches!(
                error.errno(),
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENODEV | libc::EINVAL | libc::ENOSYS)
            )
        });
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        if cannot && required {
            // This stretch again, as a write of zeros. Stretches of one task end in order: a raw
            // image's zeroing is a single stretch.
            task.planned = offset - task.offset;
            task.zeros_until = offset + len;
            task.pending -= 1;
            return self.runnable.push_back(key);
        }
        self.counted_off(Owner::Task(key), if cannot { Ok(()) } else { outcome });
    }

    fn counted_off(&mut self, owner: Owner, outcome: Result<()>) {
        match owner {
            Owner::Task(key) => {
                let Some(task) = self.tasks.get_mut(key) else {
                    return;
                };
                task.pending -= 1;
                if let Err(error) = outcome {
                    task.fail(error);
                }
                if task.pending == 0 && !task.parked {
                    self.runnable.push_back(key);
                }
            }
            Owner::Job(key) => {
                let Some(job) = self.jobs.get_mut(key) else {
                    return;
                };
                job.pending -= 1;
                if let Err(error) = outcome {
                    job.error.get_or_insert(error);
                }
                if job.pending == 0 {
                    match job.error.take() {
                        None => self.write_job(key),
                        Some(error) => self.job_written(key, Err(error)),
                    }
                }
            }
        }
    }
}

impl Drop for Engine {
    /// Wait for what is under way: the kernel still writes into its buffers.
    fn drop(&mut self) {
        while self.ios.len() > 0 {
            if self.turn(true).is_err() {
                // The ring is broken; freeing the memory it may still write to would be worse.
                let ios = std::mem::replace(&mut self.ios, Slab::new());
                std::mem::forget(ios);
                return;
            }
        }
    }
}

fn no_slot() -> Error {
    Error::new(Kind::InvalidArgument, "no such slot")
}

fn describe(op: &IoOp) -> &'static str {
    match op {
        IoOp::Read { .. } => "read from the image",
        IoOp::Write { .. } => "write to the image",
        IoOp::Sync => "flush the image",
        IoOp::Fallocate { .. } => "zero a range of the image",
    }
}

/// `len` bytes made of one piece over and over.
fn repeat(piece: libc::iovec, len: u64) -> IoVecs {
    let mut rest = len as usize;
    let mut pieces = IoVecs::new();
    while rest > 0 {
        let take = rest.min(piece.iov_len);
        pieces.push(libc::iovec {
            iov_base: piece.iov_base,
            iov_len: take,
        });
        rest -= take;
    }
    pieces
}
