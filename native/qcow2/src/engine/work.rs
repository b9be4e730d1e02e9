// SPDX-License-Identifier: Apache-2.0
//! What takes processor time on the way of data: expanding a compressed cluster, decrypting what was read, encrypting what
//! is to be written. A [`Piece`] has all that it needs, so that any thread can do it ([`super::pool`]); what follows
//! is the engine's again.

use std::collections::VecDeque;
use std::sync::Arc;

use super::backend::IoOp;
use super::expanded::{Key, Wanted};
use super::pool::{Lending, Pool};
use super::task::{After, Io, Owner};
use super::Engine;
use crate::buffer::{self, Buffer, IoVecs};
use crate::compress;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::plan::{Codec, FileId};

/// Bytes of a cluster from which on it is worth another thread's while to expand it,
const EXPAND: usize = 8 << 10;
/// and of data, to encrypt or decrypt it. Either takes about 10 µs, as long as waking a thread.
const CIPHER: usize = 32 << 10;

/// A compressed cluster.
pub(crate) struct Packed {
    pub(super) key: Key,
    /// For whom it was read.
    pub(super) wanted: Wanted,
    pub(super) buffer: Buffer,
    /// Where it begins in the buffer.
    pub(super) front: usize,
    pub(super) codec: Codec,
    pub(super) cluster_size: usize,
    /// What it expands to, once it has been.
    pub(super) cluster: Vec<u8>,
}

/// Sectors that were read, of which some bytes are wanted; the IVs count from byte `place`.
pub(crate) struct Sealed {
    pub(super) slot: u64,
    pub(super) file: FileId,
    pub(super) place: u64,
    pub(super) buffer: Buffer,
    pub(super) skip: usize,
    pub(super) pieces: IoVecs,
}

/// Bytes that are to stand encrypted at `offset` of a file.
pub(crate) struct Plain {
    pub(super) slot: u64,
    pub(super) file: FileId,
    pub(super) offset: u64,
    pub(super) pieces: IoVecs,
    pub(super) buffer: Buffer,
    pub(super) durable: bool,
}

enum What {
    Expand(Packed),
    Unseal(Arc<Image>, Sealed),
    Seal(Arc<Image>, Plain),
}

/// Work for a request or a job, and how it went.
pub(super) struct Piece {
    owner: Owner,
    what: What,
    result: Result<()>,
}

// SAFETY: the raw pointers of a piece are memory of a request, which is valid until its completion, or of its own and
// its job's buffers. An engine completes no request and frees no job before it has the piece back, nor does it end
// before; it touches none of that memory while it is lent.
unsafe impl Send for Piece {}

impl Piece {
    fn new(owner: Owner, what: What) -> Piece {
        Piece {
            owner,
            what,
            // What stands there if whoever has it in hand does not come to its end.
            result: Err(Error::new(
                Kind::InvalidState,
                "the work of a request was left off",
            )),
        }
    }

    /// Whether others may have it.
    fn is_heavy(&self) -> bool {
        match &self.what {
            What::Expand(packed) => packed.cluster_size >= EXPAND,
            What::Unseal(_, Sealed { buffer, .. }) | What::Seal(_, Plain { buffer, .. }) => {
                buffer.len() >= CIPHER
            }
        }
    }

    /// Do it.
    pub(super) fn work(&mut self) {
        self.result = match &mut self.what {
            What::Expand(packed) => expand(packed),
            What::Unseal(image, sealed) => unseal(image, sealed),
            What::Seal(image, plain) => seal(image, plain),
        };
    }
}

fn expand(packed: &mut Packed) -> Result<()> {
    let end = packed.front.saturating_add(packed.key.stored as usize);
    let stored = packed.buffer.bytes().get(packed.front..end).unwrap_or(&[]);
    packed.cluster = compress::expand(packed.codec, stored, packed.cluster_size)?;
    packed.wanted.copy(&packed.cluster);
    Ok(())
}

fn unseal(image: &Image, sealed: &mut Sealed) -> Result<()> {
    let bytes = sealed.buffer.bytes_mut();
    image.sealer(sealed.file)?.open(sealed.place, bytes);
    let wanted = bytes.get(sealed.skip..).unwrap_or(&[]);
    // SAFETY: the owner's memory is valid until it is counted off.
    unsafe { buffer::scatter(wanted, &sealed.pieces) };
    Ok(())
}

fn seal(image: &Image, plain: &mut Plain) -> Result<()> {
    let bytes = plain.buffer.bytes_mut();
    // SAFETY: as above.
    unsafe { buffer::gather(&plain.pieces, bytes) };
    image.sealer(plain.file)?.seal(plain.offset, bytes);
    Ok(())
}

/// Pieces that wait for this engine, and the pool that may help.
#[derive(Default)]
pub(super) struct Workload {
    own: VecDeque<Piece>,
    lending: Option<Lending>,
}

impl Workload {
    /// Whether the engine has something to do or to look at.
    pub(super) fn has_news(&self) -> bool {
        !self.own.is_empty() || self.lending.as_ref().is_some_and(Lending::has_news)
    }
}

impl Engine {
    /// Have the pool's threads help with compressed and encrypted data.
    pub fn use_pool(&mut self, pool: &Arc<Pool>) {
        self.workload.lending = Some(Lending::new(pool.clone(), self.mailbox.clone()));
    }

    /// A compressed cluster has been read.
    pub(super) fn expand(&mut self, packed: Packed) {
        self.see_to(Piece::new(packed.wanted.owner, What::Expand(packed)));
    }

    /// Encrypted data has been read.
    pub(super) fn unseal(&mut self, owner: Owner, sealed: Sealed) {
        match self.image(sealed.slot) {
            Some(image) => self.see_to(Piece::new(owner, What::Unseal(image, sealed))),
            None => self.counted_off(owner, Err(Error::invalid("no cipher for encrypted data"))),
        }
    }

    /// Data is to be encrypted and written.
    pub(super) fn seal(&mut self, owner: Owner, plain: Plain) {
        match self.image(plain.slot) {
            Some(image) => self.see_to(Piece::new(owner, What::Seal(image, plain))),
            None => self.counted_off(owner, Err(Error::invalid("no cipher for encrypted data"))),
        }
    }

    fn image(&self, slot: u64) -> Option<Arc<Image>> {
        Some(self.slots.get(slot)?.image.clone())
    }

    /// Light work is done at once; the rest as soon as it is known how much there is.
    fn see_to(&mut self, mut piece: Piece) {
        if self.workload.lending.is_some() && piece.is_heavy() {
            return self.workload.own.push_back(piece);
        }
        piece.work();
        self.finish(piece);
    }

    /// Take what others have done, and do one piece of what waits. False if there was nothing.
    pub(super) fn work(&mut self) -> bool {
        let Some(lending) = &mut self.workload.lending else {
            return false;
        };
        let (finished, waiting) = lending.back();
        let next = waiting.or_else(|| self.workload.own.pop_front());
        if !self.workload.own.is_empty() {
            lending.lend(self.workload.own.drain(..));
        }
        let any = !finished.is_empty() || next.is_some();
        for piece in finished {
            self.finish(piece);
        }
        if let Some(mut piece) = next {
            piece.work();
            self.finish(piece);
        }
        any
    }

    /// The engine goes: nothing more is lent, and what is not done is left off.
    pub(super) fn end_work(&mut self) {
        let Workload { own, lending } = std::mem::take(&mut self.workload);
        let lent = lending.map_or(Vec::new(), Lending::all_back);
        for mut piece in own.into_iter().chain(lent) {
            piece.result = Err(Error::new(Kind::InvalidState, "the engine has gone"));
            self.finish(piece);
        }
    }

    /// What follows when work is done.
    fn finish(&mut self, piece: Piece) {
        let Piece {
            owner,
            what,
            result,
        } = piece;
        match what {
            What::Expand(packed) => self.expanded(packed, result),
            What::Unseal(_, Sealed { buffer, .. }) => {
                self.give_bounce(buffer);
                self.counted_off(owner, result);
            }
            What::Seal(_, plain) => self.write_sealed(owner, plain, result),
        }
    }

    fn write_sealed(&mut self, owner: Owner, plain: Plain, result: Result<()>) {
        let Plain {
            slot,
            file,
            offset,
            mut buffer,
            durable,
            ..
        } = plain;
        let expected = buffer.len() as u64;
        let pieces = IoVecs::from_slice(&[buffer.iovec(0, buffer.len())]);
        let after = match owner {
            Owner::Task(task) => After::Bounced { task, buffer },
            Owner::Job(job) => After::JobWritten {
                job,
                buffer: Some(buffer),
            },
        };
        if result.is_err() {
            return self.after(after, result);
        }
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
}
