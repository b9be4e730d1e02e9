// SPDX-License-Identifier: Apache-2.0
//! What follows when an operation has ended: going on where it was cut short, handing its bytes over,
//! counting it off.

use super::backend::IoOp;
use super::task::{After, Owner};
use super::work::Sealed;
use super::Engine;
use crate::buffer;
use crate::error::{Error, Result};
use crate::plan::CommitIo;

impl Engine {
    /// An operation has ended: go on where it was cut short, else do what comes after.
    pub(super) fn ended(&mut self, token: u64, result: i32) {
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
                IoOp::Read { pieces, offset } | IoOp::Write { pieces, offset, .. } if moved > 0 => {
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
            let error = Error::os(describe(&io.op), result);
            if let IoOp::Write { durable: true, .. } = io.op {
                if let Some(attached) = self.slots.get(io.slot) {
                    attached.image.durable_write_failed(&error);
                }
            }
            Err(error)
        } else {
            Ok(())
        };
        self.after(io.after, outcome);
    }

    pub(super) fn after(&mut self, after: After, outcome: Result<()>) {
        match after {
            After::Owner(owner) => self.counted_off(owner, outcome),
            After::Scatter {
                owner,
                buffer,
                skip,
                pieces,
            } => {
                if outcome.is_ok() {
                    // SAFETY: the owner's memory is valid until it is counted off.
                    unsafe { buffer::scatter(buffer.bytes().get(skip..).unwrap_or(&[]), &pieces) };
                }
                self.give_bounce(buffer);
                self.counted_off(owner, outcome);
            }
            After::Unseal { owner, sealed } if outcome.is_ok() => self.unseal(owner, sealed),
            After::Expand { packed } if outcome.is_ok() => self.expand(packed),
            After::Expand { packed } => self.expanded(packed, outcome),
            After::Unseal {
                owner,
                sealed: Sealed { buffer, .. },
            } => {
                self.give_bounce(buffer);
                self.counted_off(owner, outcome);
            }
            After::Bounced { task, buffer } => {
                self.give_bounce(buffer);
                self.counted_off(Owner::Task(task), outcome);
            }
            After::JobWritten { job, buffer } => {
                if let Some(buffer) = buffer {
                    self.give_bounce(buffer);
                }
                self.job_written(job, outcome);
            }
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

    pub(super) fn job_written(&mut self, key: u64, outcome: Result<()>) {
        let Some(job) = self.jobs.remove(key) else {
            return;
        };
        self.give_bounce(job.head);
        self.give_bounce(job.tail);
        let attached = self
            .tasks
            .get(job.task)
            .and_then(|task| self.slots.get(task.slot));
        if let Some(attached) = attached {
            attached.image.finish(job.ticket, outcome.is_ok());
        }
        self.counted_off(Owner::Task(job.task), outcome);
    }

    pub(super) fn zeroed(
        &mut self,
        key: u64,
        offset: u64,
        len: u64,
        required: bool,
        outcome: Result<()>,
    ) {
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

    pub(super) fn counted_off(&mut self, owner: Owner, outcome: Result<()>) {
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

fn describe(op: &IoOp) -> &'static str {
    match op {
        IoOp::Read { .. } => "read from the image",
        IoOp::Write { .. } => "write to the image",
        IoOp::Sync => "flush the image",
        IoOp::Fallocate { .. } => "zero a range of the image",
    }
}
