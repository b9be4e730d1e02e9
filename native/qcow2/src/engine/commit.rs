// SPDX-License-Identifier: Apache-2.0
//! Commits that this engine drives: the phases that `commit.rs` of the crate lays out, as operations.

use super::backend::IoOp;
use super::task::{After, CommitRun, Io};
use super::Engine;
use crate::buffer::{self, IoVecs};
use crate::error::Result;
use crate::image::Image;
use crate::mailbox::Waiter;
use crate::plan::{CommitIo, CommitStep};

impl Engine {
    /// Join a commit; with `fresh`, one that begins after now.
    pub(super) fn join_commit(&mut self, key: u64, image: &Image, waiter: Waiter, fresh: bool) {
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
