// SPDX-License-Identifier: Apache-2.0
//! Moving bytes: the extents of a read and the steps of a write as operations, through a bounce
//! buffer where the file wants another alignment than the request has.

use super::backend::IoOp;
use super::task::{After, Io, Job, Owner};
use super::work::{Packed, Plain, Sealed};
use super::Engine;
use crate::buffer::{self, Buffer, IoVecs};
use crate::crypt::cipher::SECTOR;
use crate::plan::{Allocation, Extents, FileId, Source, WriteStep};
use crate::request::Op;

/// Encrypted data is read and written in stretches of this size.
const STRETCH: u64 = 256 << 10;

impl Engine {
    pub(super) fn read(&mut self, key: u64, extents: &Extents) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        task.planned = task.len;
        let pieces = std::mem::take(&mut task.pieces);
        self.fetch(Owner::Task(key), extents, &pieces);
    }

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
                let durable = wanted && self.direct(slot, file);
                let enough = durable && self.on_disk(slot, at, len);
                if let Some(task) = self.tasks.get_mut(key).filter(|_| durable) {
                    task.alone += len;
                    task.direct += if enough { len } else { 0 };
                }
                let Some(alignment) = self.alignment(slot, file) else {
                    return;
                };
                if self.is_sealed(slot, file) {
                    return self.write_stretches(key, (slot, file, offset.0), &pieces, durable);
                }
                if buffer::refused(&pieces, alignment) {
                    let mut buffer = self.bounce(&pieces);
                    let pieces = IoVecs::from_slice(&[buffer.iovec(0, len as usize)]);
                    let op = IoOp::Write {
                        pieces,
                        offset: offset.0,
                        durable,
                    };
                    let after = After::Bounced { task: key, buffer };
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
                    durable,
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
            len: allocation.len,
            alone: allocation.alone,
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
        let (file, offset, task, alone) = (job.file, job.offset, job.task, job.alone);
        let expected = buffer::total(&pieces).unwrap_or(0);
        let wanted = self
            .tasks
            .get(task)
            .is_some_and(|task| task.durable && matches!(task.op, Op::Write { .. }));
        let durable = alone && wanted && self.direct(slot, file);
        if self.is_sealed(slot, file) {
            let plain = Plain {
                slot,
                file,
                offset,
                pieces,
                buffer: self.take_bounce(expected as usize),
                durable,
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
            durable,
        };
        self.start(Io {
            slot,
            file,
            op: IoOp::Write {
                pieces,
                offset,
                durable,
            },
            expected,
            after,
        });
    }

    /// Read `extents` into `pieces`.
    pub(super) fn fetch(&mut self, owner: Owner, extents: &Extents, pieces: &[libc::iovec]) {
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
                Source::Sealed {
                    file,
                    offset,
                    place,
                } => self.fetch_sealed(owner, *file, offset.0, *place, &part),
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
                    let mut buffer = self.take_bounce(len);
                    let op = IoOp::Read {
                        pieces: IoVecs::from_slice(&[buffer.iovec(0, len)]),
                        offset: start,
                    };
                    let packed = Packed {
                        front,
                        stored: *stored as usize,
                        codec: *codec,
                        cluster_size: *cluster_size as usize,
                        skip: *skip as usize,
                        pieces: part,
                        buffer,
                    };
                    let after = After::Expand { owner, packed };
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

    pub(super) fn fetch_plain(
        &mut self,
        owner: Owner,
        file: FileId,
        offset: u64,
        len: u64,
        part: IoVecs,
    ) {
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
        let mut buffer = self.take_bounce(length);
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

    /// Read encrypted data, a stretch at a time, so that one is decrypted while the next is read.
    fn fetch_sealed(
        &mut self,
        owner: Owner,
        file: FileId,
        offset: u64,
        place: u64,
        part: &[libc::iovec],
    ) {
        let len = buffer::total(part).unwrap_or(0);
        let mut done = 0;
        while done < len {
            let Some(slot) = self.counted_on(owner) else {
                return;
            };
            let unit = self.alignment(slot, file).unwrap_or(1).max(SECTOR) as u64;
            let start = (offset + done) / unit * unit;
            let skip = offset + done - start;
            let take = (len - done).min(STRETCH - skip);
            let length = (skip + take).next_multiple_of(unit) as usize;
            let mut buffer = self.take_bounce(length);
            let op = IoOp::Read {
                pieces: IoVecs::from_slice(&[buffer.iovec(0, length)]),
                offset: start,
            };
            let sealed = Sealed {
                slot,
                file,
                place: place.wrapping_add(done).wrapping_sub(skip),
                buffer,
                skip: skip as usize,
                pieces: buffer::subrange(part, done, take),
            };
            let after = After::Unseal { owner, sealed };
            self.start(Io {
                slot,
                file,
                op,
                expected: length as u64,
                after,
            });
            done += take;
        }
    }

    /// Whether what stands in a file is encrypted.
    fn is_sealed(&self, slot: u64, file: FileId) -> bool {
        let attached = self.slots.get(slot);
        attached.is_some_and(|attached| attached.image.sealer(file).is_ok())
    }

    pub(super) fn alignment(&self, slot: u64, file: FileId) -> Option<usize> {
        Some(self.slots.get(slot)?.image.files().get(file)?.alignment)
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
