// SPDX-License-Identifier: Apache-2.0
//! What an engine keeps about a request and about each operation it has under way.

use super::backend::IoOp;
use super::work::{Packed, Sealed};
use crate::buffer::{Buffer, IoVecs};
use crate::error::{Error, Result};
use crate::plan::{CommitIo, FileId, Need};
use crate::request::Op;

/// A request from its submission to its completion.
pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) slot: u64,
    pub(crate) op: Op,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) pieces: IoVecs,
    /// Bytes planned so far, from `offset`.
    pub(crate) planned: u64,
    /// Up to here a zeroing request goes on as a write of zeros.
    pub(crate) zeros_until: u64,
    /// Operations and jobs under way for it.
    pub(crate) pending: u32,
    /// It waits for a message or a metadata block.
    pub(crate) parked: bool,
    /// Set once the range is through and only the commit is missing.
    pub(crate) committing: bool,
    /// The commit it asked for has ended.
    pub(crate) committed: bool,
    /// It ends when all of it is on the disk.
    pub(crate) durable: bool,
    /// Bytes of it that go there by themselves (RWF_DSYNC), and need nothing else.
    pub(crate) direct: u64,
    /// Which one it is of all that the engine has taken.
    pub(crate) number: u64,
    /// What `Image::enter` gave.
    pub(crate) epoch: u64,
    pub(crate) error: Option<Error>,
}

impl Task {
    /// Remember the first error; the rest of the request is not begun any more.
    pub(crate) fn fail(&mut self, error: Error) {
        self.error.get_or_insert(error);
    }

    /// Whether its data is on its way, and it will ask for a commit when that has got there.
    pub(crate) fn comes_to_commit(&self) -> bool {
        self.wants_commit() && !self.parked && !self.committing && self.pending > 0
    }

    /// Whether the request ends with a commit.
    pub(crate) fn wants_commit(&self) -> bool {
        self.durable && (self.direct < self.len || self.op == Op::Flush)
    }
}

/// A write into new clusters: head and tail are fetched, then all is written at once.
pub(crate) struct Job {
    pub(crate) task: u64,
    pub(crate) ticket: u64,
    pub(crate) file: FileId,
    pub(crate) offset: u64,
    pub(crate) head: Buffer,
    pub(crate) tail: Buffer,
    pub(crate) pieces: IoVecs,
    pub(crate) pending: u32,
    pub(crate) error: Option<Error>,
}

/// For whom bytes are read.
#[derive(Clone, Copy)]
pub(crate) enum Owner {
    Task(u64),
    Job(u64),
}

/// What to do when an operation has ended.
pub(crate) enum After {
    /// Count it off.
    Owner(Owner),
    /// Copy what was read to where it belongs; `skip` bytes of alignment come first.
    Scatter {
        owner: Owner,
        buffer: Buffer,
        skip: usize,
        pieces: IoVecs,
    },
    /// Decrypt and copy.
    Unseal { owner: Owner, sealed: Sealed },
    /// Expand and copy.
    Expand { packed: Packed },
    /// A bounced write, whose memory is kept until now.
    Bounced { task: u64, buffer: Buffer },
    /// The data of a [`Job`] is written; a bounce buffer may go.
    JobWritten { job: u64, buffer: Option<Buffer> },
    /// fallocate ended; if the file system cannot, discards are done and zeroes are written instead.
    Zeroed {
        task: u64,
        offset: u64,
        len: u64,
        required: bool,
    },
    /// A metadata block has come.
    Loaded {
        slot: u64,
        need: Need,
        buffer: Buffer,
        task: u64,
    },
    /// Part of a commit.
    Commit { slot: u64, io: CommitIo },
}

/// An operation under way.
pub(crate) struct Io {
    pub(crate) slot: u64,
    pub(crate) file: FileId,
    pub(crate) op: IoOp,
    /// Bytes that it should move; 0 for those that move none.
    pub(crate) expected: u64,
    pub(crate) after: After,
}

/// A commit that this engine drives.
pub(crate) struct CommitRun {
    pub(crate) pending: u32,
    pub(crate) result: Result<()>,
}
