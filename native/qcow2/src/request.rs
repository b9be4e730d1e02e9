// SPDX-License-Identifier: Apache-2.0
//! What an [`Engine`](crate::Engine) is asked and what it answers.

use smallvec::SmallVec;

use crate::error::Error;

/// What to do with a range of the guest's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffers from the disk.
    Read,
    /// Write the buffers; with `fua` the data is on stable storage at completion.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// All writes completed before are on stable storage at completion. Offset and length are 0.
    Flush,
    /// The guest does not need the range any more; it reads as zeros, or as before where the
    /// range does not cover a whole cluster.
    Discard,
    /// The range reads as zeros afterwards; with `unmap` the space may be given back.
    WriteZeroes {
        /// Whether allocated space may be freed.
        unmap: bool,
    },
}

/// One request. `offset` and `len` are bytes on the guest's disk; the buffers' lengths add up to
/// `len` for Read and Write, and there are none otherwise.
#[derive(Debug)]
pub struct Request {
    /// The caller's own number; it comes back in the [`Completion`].
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Guest memory.
    pub buffers: SmallVec<[libc::iovec; 4]>,
}

// SAFETY: the raw pointers are only an address and a length here; who may use the memory, and
// when, is the contract of `Engine::submit`.
unsafe impl Send for Request {}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The request's number.
    pub id: u64,
    /// How it ended. After an error the range of a write holds old and new data mixed, as on a disk.
    pub result: Result<(), Error>,
}
