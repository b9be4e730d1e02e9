// SPDX-License-Identifier: Apache-2.0
//! What the metadata code hands to the engines: where bytes are, and what has to be done.
//!
//! Metadata code runs under the image's lock, never does input or output, and never waits. When
//! it cannot go on it says why ([`Stop`]); the engine sees to that and calls again from the start,
//! so every planning function looks things up before it changes anything, and each change leaves
//! a state from which calling again goes on.

use smallvec::SmallVec;

use crate::error::Error;
use crate::types::HostOffset;

/// A file of the chain, by its place in `Image::files`.
pub(crate) type FileId = usize;

/// Where a range's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// They are zeros.
    Zero,
    /// They stand in a file as they are.
    File { file: FileId, offset: HostOffset },
    /// They stand in a file, encrypted; the sectors' IVs count from byte `place` (crypt/mod.rs).
    Sealed {
        file: FileId,
        offset: HostOffset,
        place: u64,
    },
    /// They are in a compressed cluster, `skip` bytes into what it expands to; it was found there in this `era` of the
    /// image (`State::era`).
    Compressed {
        file: FileId,
        offset: HostOffset,
        stored: u64,
        codec: Codec,
        cluster_size: u64,
        skip: u64,
        era: u64,
    },
}

/// How a cluster is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    /// Raw deflate with a 4 KiB window.
    Zlib,
    /// One zstd frame.
    Zstd,
}

/// A piece of a read: `len` bytes, in the order of the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) len: u64,
    pub(crate) source: Source,
}

/// A read, piece by piece.
pub(crate) type Extents = SmallVec<[Extent; 4]>;

/// Append, joining what continues the last piece.
pub(crate) fn push_extent(extents: &mut Extents, extent: Extent) {
    if extent.len == 0 {
        return;
    }
    if let Some(last) = extents.last_mut() {
        let joins = match (&last.source, &extent.source) {
            (Source::Zero, Source::Zero) => true,
            (
                Source::File { file, offset },
                Source::File {
                    file: next,
                    offset: start,
                },
            ) => file == next && offset.plus(last.len) == *start,
            (
                Source::Sealed {
                    file,
                    offset,
                    place,
                },
                Source::Sealed {
                    file: next,
                    offset: start,
                    place: from,
                },
            ) => file == next && offset.plus(last.len) == *start && place + last.len == *from,
            _ => false,
        };
        if joins {
            last.len += extent.len;
            return;
        }
    }
    extents.push(extent);
}

/// The next step of a write.
#[derive(Debug)]
pub(crate) enum WriteStep {
    /// Write `len` bytes there; nothing else.
    InPlace {
        file: FileId,
        offset: HostOffset,
        len: u64,
    },
    /// Write into new clusters, then say so with `Image::finish`.
    Allocate(Box<Allocation>),
}

impl WriteStep {
    /// The request's bytes that this step takes.
    pub(crate) fn len(&self) -> u64 {
        match self {
            WriteStep::InPlace { len, .. } => *len,
            WriteStep::Allocate(allocation) => allocation.len,
        }
    }
}

/// New clusters for a write. The engine fetches `head` and `tail`, writes head, the guest's data
/// and tail at `offset` in one go, and reports the end under `ticket`: only then the mapping changes.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) ticket: u64,
    pub(crate) file: FileId,
    pub(crate) offset: HostOffset,
    pub(crate) len: u64,
    pub(crate) head: Extents,
    pub(crate) tail: Extents,
}

/// The next step of a discard or write-zeroes.
#[derive(Debug)]
pub(crate) enum ZeroStep {
    /// `len` bytes are done (or need nothing).
    Done { len: u64 },
    /// `len` bytes must be written as zeros, as a write would be.
    Write { len: u64 },
    /// Ask the file system: zero the range or give it back.
    Fallocate {
        file: FileId,
        offset: HostOffset,
        len: u64,
        punch: bool,
    },
}

impl ZeroStep {
    /// The request's bytes that this step takes, or that it is about.
    pub(crate) fn len(&self) -> u64 {
        match self {
            ZeroStep::Done { len } | ZeroStep::Write { len } | ZeroStep::Fallocate { len, .. } => {
                *len
            }
        }
    }
}

/// Why a plan cannot be made now.
#[derive(Debug)]
pub(crate) enum Stop {
    /// A metadata block must be read; the caller has become the one who reads it.
    Load(Need),
    /// Somebody else is at it; the waiter has been registered and will be woken.
    Wait,
    /// Too much is dirty: a commit has to end first.
    Commit,
    /// Nothing is free but what was freed and cannot be used yet (alloc/freed.rs): once nothing that was planned
    /// for the caller before is under way, a commit has to end first, or else the waiter is woken.
    Release {
        /// It takes a commit.
        commit: bool,
    },
    /// It cannot be done.
    Fail(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Fail(error)
    }
}

/// A metadata block to read: `len` bytes at `offset` of `file`, to be given to `Image::supply`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    pub(crate) layer: usize,
    pub(crate) file: FileId,
    pub(crate) offset: HostOffset,
    pub(crate) len: usize,
}

/// One thing to do for a commit. Those of one step may be done in any order.
#[derive(Debug)]
pub(crate) enum CommitIo {
    /// Write these blocks, which lie one behind the other.
    Write {
        file: FileId,
        offset: HostOffset,
        blocks: Vec<crate::cache::Block>,
    },
    /// fdatasync.
    Sync { file: FileId },
    /// Give the space of free clusters back to the host. If that fails, nothing is lost but space.
    Punch {
        file: FileId,
        offset: HostOffset,
        len: u64,
    },
}

/// What a commit wants next.
#[derive(Debug)]
pub(crate) enum CommitStep {
    /// Do these, then report.
    Io(Vec<CommitIo>),
    /// It has ended and everybody has been told; if `again`, more asked meanwhile: begin anew.
    Done { again: bool },
}

/// What a planning function gives: a plan, or why there is none yet.
pub(crate) type Planned<T> = Result<T, Stop>;
