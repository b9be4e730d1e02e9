// SPDX-License-Identifier: Apache-2.0
//! Reading: the extents of a read as operations, through memory of our own where the data is compressed, encrypted, or the
//! file wants another alignment than the request has.

use super::backend::IoOp;
use super::expanded::{Key, Wanted};
use super::task::{After, Io, Owner};
use super::transfer::STRETCH;
use super::work::{Packed, Sealed};
use super::Engine;
use crate::buffer::{self, Buffer, IoVecs};
use crate::crypt::cipher::SECTOR;
use crate::plan::{Codec, Extents, FileId, Source};

impl Engine {
    pub(super) fn read(&mut self, key: u64, extents: &Extents) {
        let Some(task) = self.tasks.get_mut(key) else {
            return;
        };
        task.planned = task.len;
        let pieces = std::mem::take(&mut task.pieces);
        self.fetch(Owner::Task(key), extents, &pieces);
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
                    era,
                } => {
                    let Some(slot) = self.slot_of(owner) else {
                        return;
                    };
                    let key = Key {
                        slot,
                        file: *file,
                        offset: offset.0,
                        stored: *stored,
                        era: *era,
                    };
                    let wanted = Wanted {
                        owner,
                        skip: *skip as usize,
                        pieces: part,
                    };
                    if let Some(wanted) = self.take_expanded(key, wanted) {
                        self.fetch_packed(key, (*codec, *cluster_size as usize), wanted);
                    }
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
        let length = (skip as u64 + len).next_multiple_of(unit as u64);
        self.fetch_bounced((slot, file, start), length, |buffer| After::Scatter {
            owner,
            buffer,
            skip,
            pieces: part,
        });
    }

    /// Read and expand a compressed cluster.
    fn fetch_packed(&mut self, key: Key, (codec, size): (Codec, usize), wanted: Wanted) {
        let unit = self.alignment(key.slot, key.file).unwrap_or(1) as u64;
        let start = key.offset / unit * unit;
        let front = key.offset - start;
        let len = (front + key.stored).next_multiple_of(unit);
        self.fetch_bounced((key.slot, key.file, start), len, |buffer| {
            let packed = Packed {
                key,
                wanted,
                front: front as usize,
                codec,
                cluster_size: size,
                buffer,
                cluster: Vec::new(),
            };
            After::Expand { packed }
        });
    }

    /// Read `len` bytes from `offset` of a file into memory of our own, which `after` takes.
    fn fetch_bounced(
        &mut self,
        (slot, file, offset): (u64, FileId, u64),
        len: u64,
        after: impl FnOnce(Buffer) -> After,
    ) {
        let mut buffer = self.take_bounce(len as usize);
        let pieces = IoVecs::from_slice(&[buffer.iovec(0, len as usize)]);
        self.start(Io {
            slot,
            file,
            op: IoOp::Read { pieces, offset },
            expected: len,
            after: after(buffer),
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
            let length = (skip + take).next_multiple_of(unit);
            self.fetch_bounced((slot, file, start), length, |buffer| {
                let sealed = Sealed {
                    slot,
                    file,
                    place: place.wrapping_add(done).wrapping_sub(skip),
                    buffer,
                    skip: skip as usize,
                    pieces: buffer::subrange(part, done, take),
                };
                After::Unseal { owner, sealed }
            });
            done += take;
        }
    }
}
