// SPDX-License-Identifier: Apache-2.0
//! Advancing a task: planning its range step by step, parking it where the plan stops, and seeing
//! when it has ended.

use super::backend::IoOp;
use super::task::{After, Io};
use super::{Engine, ZEROS, ZERO_STEP};
use crate::buffer::{Buffer, IoVecs};
use crate::commit::Want;
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::{Need, Planned, Stop, ZeroStep};
use crate::qcow2::zero::Zeroing;
use crate::request::Op;

impl Engine {
    /// Plan and start as much of a task as can be.
    pub(super) fn advance(&mut self, key: u64) {
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
                    .plan_write(at, rest, task.durable && image.syncs(), &waiter)
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
                Err(Stop::Commit) => {
                    self.park(key);
                    let slot = self.tasks.get(key).map_or(0, |task| task.slot);
                    return self.join_commit(slot, &image, vec![waiter], Want::Room);
                }
                Err(Stop::Release { commit }) => {
                    return self.wait_for_room(key, &image, waiter, commit)
                }
                Err(Stop::Fail(error)) => {
                    if let Some(task) = self.tasks.get_mut(key) {
                        task.fail(error);
                    }
                }
            }
        }
        self.settle(key, &image);
    }

    pub(super) fn advance_zero(
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
            let step = image.plan_write(at, len, false, waiter)?;
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

    /// Clusters that were freed become free: not while anything is under way that was planned for the task before.
    fn wait_for_room(&mut self, key: u64, image: &Image, waiter: Waiter, commit: bool) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        if task.pending > 0 {
            // It is advanced again when that has ended.
            return;
        }
        task.parked = true;
        task.epoch = image.renew(task.epoch);
        if commit {
            let slot = task.slot;
            self.join_commit(slot, image, vec![waiter], Want::Commit);
        }
    }

    pub(super) fn park(&mut self, key: u64) {
        if let Some(task) = self.tasks.get_mut(key) {
            task.parked = true;
        }
    }

    pub(super) fn load(&mut self, key: u64, need: Need) {
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

    /// See whether a task has ended, or only its commit is missing.
    pub(super) fn settle(&mut self, key: u64, image: &Image) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        let through = task.error.is_some() || task.planned >= task.len;
        if !through || task.parked {
            return;
        }
        if task.pending > 0 {
            return;
        }
        if task.wants_commit() && !task.committed && task.error.is_none() {
            return self.wish_commit(key);
        }
        if let Some(task) = self.tasks.remove(key) {
            image.leave(task.epoch);
            if let Some(attached) = self.slots.get_mut(task.slot) {
                attached.tasks -= 1;
            }
            self.complete(task.id, task.error.map_or(Ok(()), Err));
        }
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
