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
//! | `Release`       | the same if that helps; what was planned ends first | that, or other requests, ended |
//! | `Fail`          | fails the task; what is under way still ends        | -                              |
//!
//! So a metadata miss, an allocation or a flush of one request never holds up another, and nothing
//! on the I/O thread blocks: metadata is read and written through the ring as well. (One exception:
//! a regular image file is lengthened with ftruncate in steps of many clusters, which is a matter of
//! the inode only.)
//!
//! A flush, and a write that is to be on the disk when it ends, end with a commit: one for all that were under way when
//! the first of them had got so far. But a durable write to an O_DIRECT file in place, to where the disk has all that
//! leads there, is written with RWF_DSYNC and waits for nothing and nobody.
//!
//! Requests on overlapping ranges are unordered, as on a disk. No guest memory is kept beyond a
//! request's completion, and none is registered with the kernel.
//!
//! | module     | job                                                                    |
//! |------------|------------------------------------------------------------------------|
//! | `advance`  | planning a task step by step, parking it                               |
//! | `fetch`    | reads as operations, bounced where needed                              |
//! | `transfer` | writes as operations, bounced where needed                             |
//! | `commit`   | commits that this engine drives                                        |
//! | `outcome`  | what follows when an operation has ended                               |
//! | `task`     | what is kept about a request and an operation                          |
//! | `bounce`   | memory of our own for data on its way                                  |
//! | `work`     | expanding, encrypting, decrypting                                      |
//! | `expanded` | compressed clusters that were expanded, for the next reads             |
//! | `pool`     | threads that help with that                                            |
//! | `backend`  | io_uring, or plain system calls                                        |

mod advance;
pub(crate) mod backend;
mod bounce;
mod commit;
mod expanded;
mod fetch;
mod outcome;
mod pool;
pub(crate) mod task;
mod transfer;
mod work;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use crate::buffer::{self, Buffer};
use crate::crypt::cipher::SECTOR;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::mailbox::Mailbox;
use crate::options::DetectZeroes;
use crate::request::{Completion, Op, Request};
use crate::ring::{event_fd, Ring};
use crate::slab::Slab;
use backend::{Backend, Blocking, Uring};
use bounce::Bounces;
use expanded::Expanded;
use task::{CommitRun, Io, Job, Task};
use work::Workload;

pub use pool::Pool;

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
    bounces: Bounces,
    workload: Workload,
    expanded: Expanded,
    /// Tasks for which a commit is to be asked: slot and task.
    wishes: Vec<(u64, u64)>,
    /// How many tasks had been taken when the first of these wishes came.
    wished_at: u64,
    /// How many tasks have been taken.
    taken: u64,
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
            bounces: Bounces::default(),
            workload: Workload::default(),
            expanded: Expanded::default(),
            wishes: Vec::new(),
            wished_at: 0,
            taken: 0,
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
        self.expanded.detach(slot.0);
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
            // SAFETY: the caller's promise about the buffers.
            let op = unsafe { as_zeroes(&attached.image, &request) };
            let task = Task {
                id: request.id,
                slot: slot.0,
                op,
                durable: matches!(request.op, Op::Flush | Op::Write { fua: true }),
                direct: 0,
                offset: request.offset,
                len: request.len,
                pieces: request.buffers,
                planned: 0,
                zeros_until: 0,
                pending: 0,
                parked: false,
                committing: false,
                committed: false,
                number: self.taken,
                epoch,
                error: None,
            };
            self.taken += 1;
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
        if self.workload.has_news() {
            self.mailbox.ring();
        }
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
            if attached.image.encrypted() && (request.offset | request.len) % SECTOR as u64 != 0 {
                return refuse("encrypted images are written in sectors of 512 bytes");
            }
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
        if !idle || self.may_ask() || !self.done.is_empty() || self.backend.has_news() {
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
        let mut worked = false;
        loop {
            let letters = self.mailbox.take();
            self.deliver(letters);
            self.run();
            self.ask_commits();
            if wait {
                self.backend.wait(&mut ended)?;
            } else {
                self.backend.turn(&mut ended)?;
            }
            let mut quiet = ended.is_empty();
            for (token, result) in ended.drain(..) {
                self.ended(token, result);
            }
            let hear = !self.done.is_empty() && self.runnable.is_empty();
            if worked && hear && self.workload.has_news() {
                // Whoever asked hears of it before there is more work.
                return Ok(());
            }
            let busy = self.work();
            worked |= busy;
            quiet &= !busy;
            if quiet && self.runnable.is_empty() && !self.may_ask() {
                return Ok(());
            }
        }
    }

    fn run(&mut self) {
        while let Some(key) = self.runnable.pop_front() {
            self.advance(key);
        }
    }
}

impl Drop for Engine {
    /// Bring to an end what is under way: the kernel still writes into its buffers, and others wait for
    /// the clusters, blocks and commits that this engine is at. Requests plan nothing more; those that
    /// wait for another engine are left off.
    fn drop(&mut self) {
        for key in self.tasks.keys() {
            if let Some(task) = self.tasks.get_mut(key) {
                task.fail(Error::new(Kind::InvalidState, "the engine has gone"));
            }
        }
        self.end_work();
        while self.ios.len() > 0 {
            if self.turn(true).is_err() {
                // The ring is broken; freeing the memory it may still write to would be worse.
                let ios = std::mem::replace(&mut self.ios, Slab::new());
                std::mem::forget(ios);
                break;
            }
        }
        for key in self.tasks.keys() {
            let Some(task) = self.tasks.remove(key) else {
                continue;
            };
            if let Some(attached) = self.slots.get(task.slot) {
                attached.image.leave(task.epoch);
            }
        }
        // The kernel takes a ring apart when it finds the time: until then it would keep the files, and with them the
        // room of those that are deleted.
        for key in self.slots.keys() {
            let handles = self.slots.remove(key).map(|attached| attached.handles);
            for handle in handles.into_iter().flatten() {
                self.backend.unregister(handle);
            }
        }
    }
}

/// What is done for a request: a write of zeros may be a zeroing (`OpenOptions::detect_zeroes`).
///
/// # Safety
/// The buffers are valid.
unsafe fn as_zeroes(image: &Image, request: &Request) -> Op {
    let unmap = match image.detect_zeroes() {
        DetectZeroes::Off => return request.op,
        DetectZeroes::On => false,
        DetectZeroes::Unmap => true,
    };
    let write = matches!(request.op, Op::Write { .. }) && request.len > 0;
    // SAFETY: the caller's promise.
    if write && unsafe { buffer::all_zero(&request.buffers) } {
        return Op::WriteZeroes { unmap };
    }
    request.op
}

fn no_slot() -> Error {
    Error::new(Kind::InvalidArgument, "no such slot")
}
