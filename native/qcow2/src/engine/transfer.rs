// SPDX-License-Identifier: Apache-2.0
//! Writing: the steps of a write as operations, through memory of our own where the data is to be encrypted, or the file
//! wants another alignment than the request has. And starting operations.

use super::backend::IoOp;
use super::task::{After, Io, Job, Owner};
use super::work::Plain;
use super::Engine;
use crate::buffer::{self, Buffer, IoVecs};
use crate::plan::{Allocation, Extents, FileId, WriteStep};
use crate::request::Op;

/// Encrypted data is read and written in stretches of this size.
pub(super) const STRETCH: u64 = 256 << 10;

impl Engine {
    pub(super) fn write_data(&mut self, key: u64, step: WriteStep) {
        let Some(task) = self.tasks.get(key) else {
            return;
        };
        let pieces = buffer::subrange(&task.pieces, task.planned, step.len());
        self.write(key, step, pieces);
    }

    pub(super) fn write(&mut self, key: u64, step: WriteStep, pieces: IoVecs) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        task.pending += 1;
        let slot = task.slot;
        match step {
            WriteStep::InPlace { file, offset, len } => {
                let at = task.offset + task.planned;
                let wanted = task.durable && matches!(task.op, Op::Write { .. });
                task.planned += len;
                // What leads there is on the disk: so no commit is needed, only the data itself.
                let durable = wanted && self.direct(slot, file) && self.on_disk(slot, at, len);
                if let Some(task) = self.tasks.get_mut(key).filter(|_| durable) {
                    task.direct += len;
                }
                let Some(alignment) = self.alignment(slot, file) else {
                    return;
                };
                if self.is_sealed(slot, file) {
                    return self.write_stretches(key, (slot, file, offset.0), &pieces, durable);
                }
                let (pieces, after) = if buffer::refused(&pieces, alignment) {
                    let mut buffer = self.bounce(&pieces);
                    let bounced = IoVecs::from_slice(&[buffer.iovec(0, len as usize)]);
                    (bounced, After::Bounced { task: key, buffer })
                } else {
                    (pieces, After::Owner(Owner::Task(key)))
                };
                let op = IoOp::Write {
                    pieces,
                    offset: offset.0,
                    durable,
                };
                self.start(Io {
                    slot,
                    file,
                    op,
                    expected: len,
                    after,
                });
            }
            WriteStep::Allocate(allocation) => {
                task.planned += allocation.len;
                self.begin_job(key, *allocation, pieces);
            }
        }
    }

    /// Encrypt and write a stretch at a time, so that the disk is busy meanwhile. The task has been
    /// counted on once.
    fn write_stretches(
        &mut self,
        key: u64,
        (slot, file, offset): (u64, FileId, u64),
        pieces: &[libc::iovec],
        durable: bool,
    ) {
        let len = buffer::total(pieces).unwrap_or(0);
        let mut done = 0;
        while done < len {
            let take = (len - done).min(STRETCH);
            self.counted_on(Owner::Task(key));
            let plain = Plain {
                slot,
                file,
                offset: offset + done,
                pieces: buffer::subrange(pieces, done, take),
                buffer: self.take_bounce(take as usize),
                durable,
            };
            self.seal(Owner::Task(key), plain);
            done += take;
        }
        self.counted_off(Owner::Task(key), Ok(()));
    }

    /// Whether a durable write is made so by itself: not where other writes lie in the kernel's cache.
    fn direct(&self, slot: u64, file: FileId) -> bool {
        let attached = self.slots.get(slot);
        attached.is_some_and(|attached| attached.image.syncs())
            && self.alignment(slot, file).is_some_and(|unit| unit > 1)
    }

    /// Whether data written in place there is durable once it is on the disk itself.
    fn on_disk(&self, slot: u64, at: u64, len: u64) -> bool {
        let attached = self.slots.get(slot);
        attached.is_some_and(|attached| attached.image.on_disk(at, len))
    }

    /// The pieces' bytes in memory of our own.
    fn bounce(&mut self, pieces: &[libc::iovec]) -> Buffer {
        let mut buffer = self.take_bounce(buffer::total(pieces).unwrap_or(0) as usize);
        // SAFETY: the pieces are a request's, valid until its completion (submit's contract), or a job's.
        unsafe { buffer::gather(pieces, buffer.bytes_mut()) };
        buffer
    }

    pub(super) fn begin_job(&mut self, task: u64, allocation: Allocation, pieces: IoVecs) {
        let length =
            |extents: &Extents| extents.iter().map(|extent| extent.len).sum::<u64>() as usize;
        let mut head = self.take_bounce(length(&allocation.head));
        let mut tail = self.take_bounce(length(&allocation.tail));
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
    pub(super) fn write_job(&mut self, key: u64) {
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
        if self.is_sealed(slot, file) {
            let plain = Plain {
                slot,
                file,
                offset,
                pieces,
                buffer: self.take_bounce(expected as usize),
                durable: false,
            };
            return self.seal(Owner::Job(key), plain);
        }
        let mut bounce = None;
        if self
            .alignment(slot, file)
            .is_some_and(|unit| buffer::refused(&pieces, unit))
        {
            let mut buffer = self.bounce(&pieces);
            pieces = IoVecs::from_slice(&[buffer.iovec(0, expected as usize)]);
            bounce = Some(buffer);
        }
        let after = After::JobWritten {
            job: key,
            buffer: bounce,
        };
        self.start(Io {
            slot,
            file,
            op: IoOp::Write {
                pieces,
                offset,
                durable: false,
            },
            expected,
            after,
        });
    }

    /// Whether what stands in a file is encrypted.
    fn is_sealed(&self, slot: u64, file: FileId) -> bool {
        let attached = self.slots.get(slot);
        attached.is_some_and(|attached| attached.image.sealer(file).is_ok())
    }

    pub(super) fn alignment(&self, slot: u64, file: FileId) -> Option<usize> {
        Some(self.slots.get(slot)?.image.files().get(file)?.alignment)
    }

    /// For which image the owner is.
    pub(super) fn slot_of(&self, owner: Owner) -> Option<u64> {
        let task = match owner {
            Owner::Task(key) => key,
            Owner::Job(key) => self.jobs.get(key)?.task,
        };
        Some(self.tasks.get(task)?.slot)
    }

    /// One more operation under way for the owner; gives its slot.
    pub(super) fn counted_on(&mut self, owner: Owner) -> Option<u64> {
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

    pub(super) fn start(&mut self, io: Io) {
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
}
