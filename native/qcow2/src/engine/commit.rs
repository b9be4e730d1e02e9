// SPDX-License-Identifier: Apache-2.0
//! Commits that this engine drives: the phases that `commit.rs` of the crate lays out, as operations.

use super::backend::IoOp;
use super::task::{After, CommitRun, Io};
use super::Engine;
use crate::buffer::{self, IoVecs};
use crate::commit::Want;
use crate::error::Result;
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::{CommitIo, CommitStep};

impl Engine {
    /// A task will wait for a commit that begins after now: it is asked for when all that can be planned now is
    /// planned, so that many share one.
    pub(super) fn wish_commit(&mut self, key: u64) {
        self.park(key);
        if let Some(task) = self.tasks.get_mut(key) {
            task.committing = true;
            if self.wishes.is_empty() {
                self.wished_at = self.taken;
            }
            self.wishes.push((task.slot, key));
        }
    }

    /// Whether commits were wished for, and nobody is on the way who was there before and will wish for one, too: one
    /// commit a little later costs half of what two do. (Who is parked may wait for one of these commits.)
    pub(super) fn may_ask(&self) -> bool {
        let comes = |key: &u64| {
            let task = self.tasks.get(*key);
            task.is_some_and(|task| task.number < self.wished_at && task.comes_to_commit())
        };
        !self.wishes.is_empty() && !self.tasks.keys().iter().any(comes)
    }

    /// Ask for the commits that were wished for.
    pub(super) fn ask_commits(&mut self) {
        if !self.may_ask() {
            return;
        }
        while let Some((slot, _)) = self.wishes.first().copied() {
            let (now, later): (Vec<_>, Vec<_>) =
                self.wishes.drain(..).partition(|wish| wish.0 == slot);
            self.wishes = later;
            let Some(image) = self.slots.get(slot).map(|attached| attached.image.clone()) else {
                continue;
            };
            let waiters = now.into_iter().map(|(_, task)| Waiter {
                mailbox: self.mailbox.clone(),
                task,
            });
            let waiters = waiters.collect();
            self.join_commit(slot, &image, waiters, Want::Commit);
        }
    }

    /// Join a commit, or drive a new one.
    pub(super) fn join_commit(
        &mut self,
        slot: u64,
        image: &Image,
        waiters: Vec<Waiter>,
        want: Want,
    ) {
        if let Some(step) = image.join_commit(waiters, want) {
            if let Some(attached) = self.slots.get_mut(slot) {
                attached.commit = Some(CommitRun {
                    pending: 0,
                    result: Ok(()),
                });
            }
            self.commit_step(slot, step);
        }
    }

    pub(super) fn commit_step(&mut self, slot: u64, step: CommitStep) {
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

    pub(super) fn commit_io(&mut self, slot: u64, mut io: CommitIo) {
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
                        durable: false,
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

    pub(super) fn commit_ended(&mut self, slot: u64, outcome: Result<()>) {
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
}
