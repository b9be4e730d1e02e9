// SPDX-License-Identifier: Apache-2.0
//! One client's requests: read from its socket, put to an engine, answered as they end.
//!
//! One thread a connection, waiting in poll(2) for the socket and the engine. Requests end in any
//! order. What a client can make the server hold is bounded: `MAX_PENDING` requests, `MAX_HELD` bytes
//! (those that it has not read yet among them) and `MAX_ANSWERS`; beyond them its socket is not read. A client that breaks the protocol loses its
//! connection; what it had begun still ends.
//!
//! System calls are shared by requests: their headers are read many at once (`inbox`), and answers sent so (`outbox`).
//!
//! Block status is looked up on this thread, by plain system calls. It would wait for ever for a block
//! that this connection's own engine is reading, so it is answered when nothing else is under way, and
//! nothing behind it is read from the socket before.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::smallvec;

use crate::buffer::Buffer;
use crate::engine::{Engine, Pool, Slot};
use crate::error::{Error, Kind};
use crate::image::Image;
use crate::nbd::handshake::{broken, Agreed, MAX_REQUEST};
use crate::nbd::inbox::{Arriving, Came, Inbox};
use crate::nbd::memory::Memory;
use crate::nbd::outbox::Outbox;
use crate::nbd::status::Contexts;
use crate::nbd::wire::{self, chunk, errno, flag, Command, RequestHeader};
use crate::qcow2::bitmaps::BitmapView;
use crate::request::{Completion, Op, Request};
use crate::ring::Ring;

const MAX_PENDING: usize = 256;
const MAX_HELD: usize = 64 << 20;
/// Answers that wait for the client to read them.
const MAX_ANSWERS: usize = 1024;
/// How long a client is waited for once the server is to stop.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often the wish to stop is looked at, in milliseconds.
const TICK: i32 = 200;

/// What is known about a request under way.
struct Pending {
    header: RequestHeader,
    memory: Option<Buffer>,
}

/// A connection behind its handshake. (The engine is dropped first: it waits for what is under way.)
pub(crate) struct Connection {
    engine: Engine,
    slot: Slot,
    image: Arc<Image>,
    structured: bool,
    contexts: Contexts,
    pending: HashMap<u64, Pending>,
    next_id: u64,
    inbox: Inbox,
    arriving: Option<Arriving>,
    /// Block status that waits for all before it.
    asked: Option<RequestHeader>,
    out: Outbox,
    memory: Memory,
    leaving: bool,
}

impl Connection {
    pub(crate) fn new(
        image: Arc<Image>,
        bitmaps: &[String],
        agreed: Agreed,
        pool: Option<&Arc<Pool>>,
    ) -> Result<Connection, Error> {
        let mut views = HashMap::new();
        for (name, number) in bitmaps.iter().zip(1..) {
            if agreed.contexts.contains(&number) {
                views.insert(number, BitmapView::open(&image, name)?);
            }
        }
        let mut engine = match Ring::new(128, image.file_count()) {
            Ok(ring) => Engine::uring(ring),
            Err(_) => Engine::blocking().map_err(|e| Error::io("eventfd", &e))?,
        };
        if let Some(pool) = pool {
            engine.use_pool(pool);
        }
        let slot = engine.attach(image.clone())?;
        Ok(Connection {
            engine,
            slot,
            image,
            structured: agreed.structured,
            contexts: Contexts {
                numbers: agreed.contexts,
                views,
            },
            pending: HashMap::new(),
            next_id: 0,
            inbox: Inbox::new(),
            arriving: None,
            asked: None,
            out: Outbox::default(),
            memory: Memory::default(),
            leaving: false,
        })
    }

    /// Serve until the client leaves or `stop` is set.
    pub(crate) fn serve(&mut self, socket: &mut UnixStream, stop: &AtomicBool) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let mut stopping: Option<Instant> = None;
        loop {
            if stop.load(Ordering::Relaxed) {
                self.leaving = true;
                if stopping.get_or_insert_with(Instant::now).elapsed() > FAREWELL {
                    return Ok(());
                }
            }
            let idle = self.pending.is_empty() && self.asked.is_none() && self.out.is_empty();
            if self.leaving && idle {
                return Ok(());
            }
            let full = self.full();
            // What waits in the inbox is nothing that poll tells of.
            let ready = !self.leaving && !full && self.has_come();
            let mut wanted = if self.leaving || full {
                0
            } else {
                libc::POLLIN
            };
            if !self.out.is_empty() {
                wanted |= libc::POLLOUT;
            }
            let mut polls = [
                libc::pollfd {
                    fd: socket.as_raw_fd(),
                    events: wanted,
                    revents: 0,
                },
                libc::pollfd {
                    fd: self.engine.event_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                },
            ];
            // SAFETY: two valid pollfds.
            let count = unsafe { libc::poll(polls.as_mut_ptr(), 2, if ready { 0 } else { TICK }) };
            if count < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error());
            }
            let [on_socket, _] = polls;
            if on_socket.revents & (libc::POLLERR | libc::POLLNVAL) != 0 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let told = on_socket.revents & (libc::POLLIN | libc::POLLHUP) != 0;
            if (told || ready) && !self.leaving && !full {
                self.receive(socket)?;
            }
            self.reap()?;
            self.answer_asked();
            self.out.send(socket, &mut self.memory)?;
        }
    }

    fn full(&self) -> bool {
        self.pending.len() >= MAX_PENDING
            || self.memory.held() > MAX_HELD
            || self.out.len() >= MAX_ANSWERS
            || self.asked.is_some()
    }

    fn answer_asked(&mut self) {
        if self.pending.is_empty() {
            if let Some(header) = self.asked.take() {
                self.block_status(&header);
            }
        }
    }

    fn block_status(&mut self, header: &RequestHeader) {
        let end = header.offset.checked_add(u64::from(header.len));
        let inside = end.filter(|end| *end <= self.image.size() && header.len > 0);
        let Some(end) = inside.filter(|_| !self.contexts.numbers.is_empty()) else {
            return self.fail(header, errno::INVAL);
        };
        match self.contexts.answer(&self.image, header, end) {
            Ok(answer) => self.out.say(answer),
            Err(error) => self.fail(header, number(&error)),
        }
    }

    /// Whether the inbox has enough to go on with.
    fn has_come(&self) -> bool {
        let least = match self.arriving {
            Some(_) => 1,
            None => RequestHeader::LEN,
        };
        self.inbox.front().len() >= least
    }

    /// Take what the socket has, as far as there is room for it.
    fn receive(&mut self, socket: &mut UnixStream) -> io::Result<()> {
        loop {
            self.take_in()?;
            if self.full() || self.leaving {
                return Ok(());
            }
            match self.inbox.fill(socket, self.arriving.as_mut())? {
                Came::More => {}
                Came::All => return self.take_in(),
                Came::End => {
                    self.leaving = true;
                    return Ok(());
                }
            }
        }
    }

    /// Begin the requests that have come whole, until there are enough.
    fn take_in(&mut self) -> io::Result<()> {
        while !self.full() && !self.leaving {
            let came = self.inbox.front();
            if let Some(mut arriving) = self.arriving.take() {
                let count = arriving.take(came);
                self.inbox.take(count);
                if arriving.missing() > 0 {
                    self.arriving = Some(arriving);
                    return Ok(());
                }
                let Arriving { header, memory, .. } = arriving;
                let fua = header.flags & flag::FUA != 0;
                self.begin(header, Op::Write { fua }, Some(memory));
                continue;
            }
            let Some(head) = came.get(..RequestHeader::LEN) else {
                return Ok(());
            };
            let header =
                RequestHeader::parse(head).ok_or_else(|| broken("a request without its magic"))?;
            self.inbox.take(RequestHeader::LEN);
            self.dispatch(header)?;
        }
        Ok(())
    }

    fn dispatch(&mut self, header: RequestHeader) -> io::Result<()> {
        let moves_data = matches!(header.command, Command::Read | Command::Write);
        if moves_data && (header.len > MAX_REQUEST || header.len == 0) {
            if header.command == Command::Write && header.len > 0 {
                // Its data would have to be read and thrown away.
                return Err(broken("a write larger than agreed"));
            }
            self.fail(&header, errno::INVAL);
            return Ok(());
        }
        match header.command {
            Command::Disconnect => self.leaving = true,
            Command::Read => {
                let memory = self.memory.hold(header.len as usize);
                self.begin(header, Op::Read, Some(memory));
            }
            Command::Write => {
                let memory = self.memory.hold(header.len as usize);
                self.arriving = Some(Arriving::new(header, memory));
            }
            Command::Flush => self.begin(header, Op::Flush, None),
            Command::Trim => self.begin(header, Op::Discard, None),
            Command::WriteZeroes => {
                let unmap = header.flags & flag::NO_HOLE == 0;
                self.begin(header, Op::WriteZeroes { unmap }, None);
            }
            Command::BlockStatus => self.asked = Some(header),
            Command::Other(_) => self.fail(&header, errno::NOTSUP),
        }
        Ok(())
    }

    fn begin(&mut self, header: RequestHeader, op: Op, memory: Option<Buffer>) {
        let id = self.next_id;
        self.next_id += 1;
        let entry = self.pending.entry(id).or_insert(Pending { header, memory });
        let buffers = match &mut entry.memory {
            Some(memory) => smallvec![memory.iovec(0, header.len as usize)],
            None => smallvec![],
        };
        let (offset, len) = if op == Op::Flush {
            (0, 0)
        } else {
            (header.offset, u64::from(header.len))
        };
        // SAFETY: the memory stays in `pending` until the completion; if the connection is dropped
        // before, its engine goes first and waits.
        unsafe {
            self.engine.submit(
                self.slot,
                Request {
                    id,
                    op,
                    offset,
                    len,
                    buffers,
                },
            )
        };
    }

    fn reap(&mut self) -> io::Result<()> {
        let mut done = Vec::new();
        self.engine
            .poll(&mut done)
            .map_err(|e| io::Error::other(e.to_string()))?;
        done.into_iter()
            .for_each(|completion| self.answer(completion));
        Ok(())
    }

    fn answer(&mut self, completion: Completion) {
        let Some(Pending { header, memory }) = self.pending.remove(&completion.id) else {
            return;
        };
        let read = completion.result.is_ok() && header.command == Command::Read;
        let memory = match memory {
            // What was read is held until the client has taken it.
            Some(memory) if read => Some(memory),
            Some(memory) => {
                self.memory.release(memory);
                None
            }
            None => None,
        };
        if let Err(error) = completion.result {
            return self.fail(&header, number(&error));
        }
        // Trim and write-zeroes with FUA: their metadata is made durable by a flush behind them.
        let fua = header.flags & flag::FUA != 0;
        if fua && matches!(header.command, Command::Trim | Command::WriteZeroes) {
            let plain = RequestHeader { flags: 0, ..header };
            return self.begin(plain, Op::Flush, None);
        }
        match (header.command, memory) {
            (Command::Read, Some(memory)) => {
                if self.structured {
                    let mut words =
                        wire::last_chunk(chunk::OFFSET_DATA, header.cookie, header.len + 8);
                    words.extend(header.offset.to_be_bytes());
                    self.out.say(words);
                } else {
                    self.out.say(wire::simple(0, header.cookie));
                }
                self.out.data(memory);
            }
            _ => self.out.say(wire::simple(0, header.cookie)),
        }
    }

    fn fail(&mut self, header: &RequestHeader, error: u32) {
        let structured =
            matches!(header.command, Command::Read | Command::BlockStatus) && self.structured;
        if !structured {
            return self.out.say(wire::simple(error, header.cookie));
        }
        let mut out = wire::last_chunk(chunk::ERROR, header.cookie, 6);
        out.extend(error.to_be_bytes());
        out.extend(0u16.to_be_bytes());
        self.out.say(out);
    }
}

fn number(error: &Error) -> u32 {
    match error.kind() {
        Kind::NoSpace => errno::NOSPC,
        Kind::InvalidArgument => errno::INVAL,
        Kind::InvalidState => errno::PERM,
        Kind::NotSupported => errno::NOTSUP,
        _ => errno::IO,
    }
}
