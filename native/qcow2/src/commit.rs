// SPDX-License-Identifier: Apache-2.0
//! The commit: how changed metadata gets to the disk so that a power cut at any moment leaves an
//! image that opens without repair, with leaked clusters at worst.
//!
//! A commit takes the dirty blocks as they are at its start and writes them in up to four phases
//! with an fdatasync after each; a phase without blocks is left out together with its sync.
//!
//! | phase | writes                                             | relies on being on disk before        |
//! |-------|----------------------------------------------------|---------------------------------------|
//! | 1     | refcount blocks; new tables nothing points to; L2 entries for fresh clusters that   | –    |
//! |       | are counted on disk (alloc/reserve.rs); the sync covers the guest's data too        |      |
//! | 2     | entries of the refcount table                      | the refcount blocks they point to     |
//! | 3     | the header                                         | the new tables it points to           |
//! | 4     | L2 and L1 entries                                  | refcounts, new L2 tables, and the data |
//!
//! So a mapping never reaches the disk before the refcounts, the table and the data that it needs.
//! A mapping enters the cache only when its data was written (or when its cluster is fresh: past
//! the old end of a regular file, never used, reading as zeros, without backing content; then what
//! a cut can leave there is the zeros that the guest saw before). Refcounts only grow in phase 1 of
//! the commit that links a cluster. They shrink in a *later* commit than the one that took the
//! cluster's last pointer off the disk, and only then, with no request under way that was planned
//! before, the cluster can be allocated again (`Freed`).
//!
//! One commit runs at a time. Whoever asks during one gets the next, all together. A failed commit
//! leaves its blocks dirty. After a failed fdatasync the kernel may have dropped data that was
//! reported written, so from then on every commit fails, until the image is closed (`Image::close`).

use std::collections::VecDeque;

use crate::cache::{Class, Dirty};
use crate::error::Result;
use crate::mailbox::Waiter;
use crate::plan::{CommitIo, CommitStep};
use crate::state::State;
use crate::types::HostOffset;

/// The most blocks that one write takes (IOV_MAX is 1024).
const RUN: usize = 512;

/// What somebody wants of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// That what is dirty now gets to the disk, and all data that was written.
    Commit,
    /// That less is dirty; the commit under way will do.
    Room,
}

/// Commits: the running one and who waits for the next.
#[derive(Default)]
pub(crate) struct Commits {
    running: Option<Running>,
    next: Vec<Waiter>,
}

#[derive(Default)]
struct Running {
    waiters: Vec<Waiter>,
    taken: Vec<Dirty>,
    phases: VecDeque<Vec<CommitIo>>,
    syncing: bool,
}

impl State {
    /// Wait for the end of a commit, but for room of one that begins after now. A step means that the caller
    /// drives a new commit.
    pub(crate) fn join_commit(&mut self, waiters: Vec<Waiter>, want: Want) -> Option<CommitStep> {
        match &mut self.commits.running {
            None => {
                self.commits.running = Some(Running {
                    waiters,
                    ..Running::default()
                });
                Some(self.commit_begin())
            }
            Some(running) if want == Want::Room => {
                running.waiters.extend(waiters);
                None
            }
            Some(_) => {
                self.commits.next.extend(waiters);
                None
            }
        }
    }

    /// Take what is dirty and lay out the phases.
    pub(crate) fn commit_begin(&mut self) -> CommitStep {
        let taken = self.cache.take_dirty();
        let given_back = self.freed_at_begin();
        if let Some(writer) = &mut self.writer {
            writer.reserve.at_begin();
        }
        let mut phases = VecDeque::new();
        let (image, data) = self.written_files();
        let sync = |files: &[Option<usize>]| -> Vec<CommitIo> {
            files
                .iter()
                .flatten()
                .map(|file| CommitIo::Sync { file: *file })
                .collect()
        };
        if !given_back.is_empty() {
            let file = image.unwrap_or(0);
            let punch = |(offset, len)| CommitIo::Punch { file, offset, len };
            phases.push_back(given_back.into_iter().map(punch).collect());
        }
        for classes in [
            &[Class::Unreferenced, Class::Fresh][..],
            &[Class::RefcountTable],
            &[Class::Header],
            &[Class::Mapping],
        ] {
            let writes = writes(&taken, classes, image.unwrap_or(0));
            let first = classes.contains(&Class::Unreferenced);
            if writes.is_empty() && !first {
                continue;
            }
            if !writes.is_empty() {
                phases.push_back(writes);
            }
            let syncs = if first {
                sync(&[image, data])
            } else {
                sync(&[image])
            };
            if !syncs.is_empty() {
                phases.push_back(syncs);
            }
        }
        let running = self.commits.running.get_or_insert_with(Running::default);
        running.taken = taken;
        running.phases = phases;
        self.commit_next(self.failed.clone().map_or(Ok(()), Err))
    }

    /// The last step has ended like this; what is next?
    pub(crate) fn commit_next(&mut self, result: Result<()>) -> CommitStep {
        let Some(running) = &mut self.commits.running else {
            return CommitStep::Done { again: false };
        };
        if let Err(error) = &result {
            if running.syncing {
                self.failed.get_or_insert(error.clone());
            }
        } else if let Some(ios) = running.phases.pop_front() {
            running.syncing = ios.iter().any(|io| matches!(io, CommitIo::Sync { .. }));
            return CommitStep::Io(ios);
        }
        let ended = self.commits.running.take().unwrap_or_default();
        self.cache.committed(&ended.taken, result.is_ok());
        self.freed_at_end(result.is_ok());
        if let Some(writer) = &mut self.writer {
            writer.reserve.at_end(result.is_ok());
        }
        ended
            .waiters
            .into_iter()
            .for_each(|waiter| waiter.finish(result.clone()));
        let waiters = std::mem::take(&mut self.commits.next);
        if waiters.is_empty() {
            return CommitStep::Done { again: false };
        }
        self.commits.running = Some(Running {
            waiters,
            ..Running::default()
        });
        CommitStep::Done { again: true }
    }
}

/// The blocks of some classes, neighbours joined into one write.
fn writes(taken: &[Dirty], classes: &[Class], file: usize) -> Vec<CommitIo> {
    let mut result: Vec<CommitIo> = Vec::new();
    let mut end = None;
    for dirty in taken.iter().filter(|dirty| classes.contains(&dirty.class)) {
        let here = dirty.key.1;
        if let (true, Some(CommitIo::Write { blocks, .. })) = (end == Some(here), result.last_mut())
        {
            if blocks.len() < RUN {
                blocks.push(dirty.block.clone());
                end = Some(here + dirty.block.len() as u64);
                continue;
            }
        }
        let blocks = vec![dirty.block.clone()];
        result.push(CommitIo::Write {
            file,
            offset: HostOffset(here),
            blocks,
        });
        end = Some(here + dirty.block.len() as u64);
    }
    result
}
