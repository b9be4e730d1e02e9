// SPDX-License-Identifier: Apache-2.0
//! A synchronous face on an image, for tools, tests and the Python binding: one request at a time,
//! through an engine of its own.

use std::sync::Arc;

use smallvec::{smallvec, SmallVec};

use crate::engine::{Engine, Slot};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::request::{Op, Request};
use crate::ring::Ring;

/// An image with an engine of its own.
pub struct Disk {
    engine: Engine,
    slot: Slot,
    image: Arc<Image>,
}

impl Disk {
    /// Serve `image` by plain system calls.
    pub fn blocking(image: Arc<Image>) -> Result<Disk> {
        let engine = Engine::blocking().map_err(|e| Error::io("eventfd", &e))?;
        Disk::on(engine, image)
    }

    /// Serve `image` by io_uring, or by plain system calls where the host has that switched off.
    pub fn new(image: Arc<Image>) -> Result<Disk> {
        #[cfg(test)]
        if crate::recorder::recording() || crate::interrupted::pending() {
            return Disk::blocking(image);
        }
        match Ring::new(64, image.file_count()) {
            Ok(ring) => Disk::on(Engine::uring(ring), image),
            Err(_) => Disk::blocking(image),
        }
    }

    fn on(mut engine: Engine, image: Arc<Image>) -> Result<Disk> {
        let slot = engine.attach(image.clone())?;
        Ok(Disk {
            engine,
            slot,
            image,
        })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Fill `data` from byte `offset` of the disk.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<()> {
        let piece = libc::iovec {
            iov_base: data.as_mut_ptr().cast(),
            iov_len: data.len(),
        };
        self.perform(Op::Read, offset, data.len() as u64, smallvec![piece])
    }

    /// Write `data` at byte `offset` of the disk.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        match self.sectors(offset, data.len() as u64) {
            None => self.write_at(offset, data),
            Some((start, len)) => {
                // Whole sectors are encrypted: what lies around the data is read first.
                let mut around = vec![0; len as usize];
                self.read(start, &mut around)?;
                let skip = (offset - start) as usize;
                if let Some(place) = around.get_mut(skip..skip + data.len()) {
                    place.copy_from_slice(data);
                }
                self.write_at(start, &around)
            }
        }
    }

    /// The whole sectors around a range that an encrypted image cannot write as it is.
    fn sectors(&self, offset: u64, len: u64) -> Option<(u64, u64)> {
        const UNIT: u64 = 512;
        let aligned = offset % UNIT == 0 && len % UNIT == 0;
        let end = offset.checked_add(len)?;
        if aligned || len == 0 || end > self.image.size() || !self.image.encrypted() {
            return None;
        }
        let start = offset / UNIT * UNIT;
        Some((
            start,
            end.next_multiple_of(UNIT).min(self.image.size()) - start,
        ))
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let piece = libc::iovec {
            iov_base: data.as_ptr().cast_mut().cast(),
            iov_len: data.len(),
        };
        self.perform(
            Op::Write { fua: false },
            offset,
            data.len() as u64,
            smallvec![piece],
        )
    }

    /// Make all writes durable.
    pub fn flush(&mut self) -> Result<()> {
        self.perform(Op::Flush, 0, 0, smallvec![])
    }

    /// Discard a range.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<()> {
        if self.sectors(offset, len).is_some() {
            // A discard may be left undone.
            return Ok(());
        }
        self.perform(Op::Discard, offset, len, smallvec![])
    }

    /// Make a range read as zeros; with `unmap` its space may be given back.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        if self.sectors(offset, len).is_some() {
            return self.write(offset, &vec![0; len as usize]);
        }
        self.perform(Op::WriteZeroes { unmap }, offset, len, smallvec![])
    }

    fn perform(
        &mut self,
        op: Op,
        offset: u64,
        len: u64,
        buffers: SmallVec<[libc::iovec; 4]>,
    ) -> Result<()> {
        let request = Request {
            id: 0,
            op,
            offset,
            len,
            buffers,
        };
        let mut done = Vec::with_capacity(1);
        // SAFETY: the buffers are borrowed by our callers for the whole of this call, and we
        // wait for the completion. (If the ring itself breaks, Engine's Drop waits or leaks.)
        unsafe { self.engine.submit(self.slot, request) };
        while done.is_empty() {
            self.engine.wait(&mut done)?;
        }
        done.pop().map_or(Ok(()), |completion| completion.result)
    }
}
