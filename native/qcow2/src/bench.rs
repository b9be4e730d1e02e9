// SPDX-License-Identifier: Apache-2.0
//! A load on an image, as `qemu-img bench` makes it: requests of one size, a fixed number under way
//! at a time, each a step behind the one before, round and round the disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::smallvec;

use crate::buffer::Buffer;
use crate::engine::Engine;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::request::{Op, Request};
use crate::ring::Ring;

/// The load.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// Requests in all.
    pub count: u64,
    /// Requests under way at once (at most 4096).
    pub depth: u64,
    /// Bytes of a request.
    pub size: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes from one request to the next; 0 means `size`.
    pub step: u64,
    /// Places in no order instead of a step (always the same ones).
    pub random: bool,
    /// Write instead of read.
    pub write: bool,
    /// The byte to write.
    pub pattern: u8,
    /// Each write is on stable storage at its end.
    pub fua: bool,
    /// A flush behind every so many requests; 0 for none.
    pub flush_interval: u64,
}

/// Put the load on an active image; gives the time it took.
pub fn bench(image: &Arc<Image>, options: &BenchOptions) -> Result<Duration> {
    let refuse = |message: &str| Err(Error::new(Kind::InvalidArgument, message));
    if options.size == 0 || options.size > 64 << 20 || options.depth == 0 || options.depth > 4096 {
        return refuse("a request has 1 byte to 64 MiB, and 1 to 4096 are under way");
    }
    if options
        .offset
        .checked_add(options.size)
        .is_none_or(|end| end > image.size())
    {
        return refuse("the first request does not lie on the disk");
    }
    let mut memory: Vec<Buffer> = Vec::new();
    for _ in 0..options.depth {
        let mut buffer = Buffer::zeroed(options.size as usize);
        buffer.bytes_mut().fill(options.pattern);
        memory.push(buffer);
    }
    let mut engine = match Ring::new(256, image.file_count()) {
        Ok(ring) => Engine::uring(ring),
        Err(_) => Engine::blocking().map_err(|e| Error::io("eventfd", &e))?,
    };
    let slot = engine.attach(image.clone())?;
    let mut places = Places {
        at: options.offset,
        seed: 1,
        options: options.clone(),
        end: image.size(),
    };
    let start = Instant::now();
    let mut begun = 0;
    let mut ended = 0;
    let mut free: Vec<u64> = (0..options.depth).collect();
    let mut done = Vec::new();
    while ended < options.count {
        while begun < options.count {
            let Some(id) = free.pop() else { break };
            begun += 1;
            let offset = places.next();
            let len = options.size;
            let buffers = match memory.get_mut(id as usize) {
                Some(buffer) => smallvec![buffer.iovec(0, len as usize)],
                None => smallvec![],
            };
            let op = if options.write {
                Op::Write { fua: options.fua }
            } else {
                Op::Read
            };
            // SAFETY: `memory` outlives the engine's requests: it is declared before, and all end below
            // or in the engine's Drop.
            unsafe {
                engine.submit(
                    slot,
                    Request {
                        id,
                        op,
                        offset,
                        len,
                        buffers,
                    },
                )
            };
            if options.flush_interval > 0 && begun % options.flush_interval == 0 {
                let flush = Request {
                    id: u64::MAX,
                    op: Op::Flush,
                    offset: 0,
                    len: 0,
                    buffers: smallvec![],
                };
                // SAFETY: a flush has no buffers.
                unsafe { engine.submit(slot, flush) };
            }
        }
        engine.wait(&mut done)?;
        for completion in done.drain(..) {
            completion.result?;
            if completion.id != u64::MAX {
                ended += 1;
                free.push(completion.id);
            }
        }
    }
    while engine.pending() > 0 {
        engine.wait(&mut done)?;
        done.drain(..)
            .try_for_each(|completion| completion.result)?;
    }
    let took = start.elapsed();
    drop(engine);
    Ok(took)
}

struct Places {
    at: u64,
    seed: u64,
    options: BenchOptions,
    end: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        let size = self.options.size;
        if self.options.random {
            self.seed = self
                .seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let slots = (self.end - self.options.offset) / size;
            return self.options.offset + (self.seed >> 20) % slots * size;
        }
        let here = self.at;
        let step = if self.options.step == 0 {
            size
        } else {
            self.options.step
        };
        self.at = self.at.saturating_add(step) % self.end.max(1);
        if self.at.saturating_add(size) > self.end {
            self.at = self.options.offset;
        }
        here
    }
}
