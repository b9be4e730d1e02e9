// SPDX-License-Identifier: Apache-2.0
//! One client's requests: read from its socket, put to an engine, answered as they end.
//!
//! One thread a connection, waiting in poll(2) for the socket and the engine. Requests end in any
//! order. What a client can make the server hold is bounded: `MAX_PENDING` requests, `MAX_HELD` bytes
//! (those that it has not read yet among them) and `MAX_ANSWERS`; beyond them its socket is not read. A client that breaks the protocol loses its
//! connection; what it had begun still ends.
//!
//! System calls are shared by requests: headers (and what came with them) are read into an inbox many at once, and
//! answers are sent many at once from where they lie. Only the data of a large write is read straight to its place.
//!
//! Block status is looked up on this thread, by plain system calls. It would wait for ever for a block
//! that this connection's own engine is reading, so it is answered when nothing else is under way, and
//! nothing behind it is read from the socket before.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::smallvec;

use crate::buffer::Buffer;
use crate::engine::{Engine, Slot};
use crate::error::{Error, Kind};
use crate::image::Image;
use crate::map::range_at;
use crate::nbd::handshake::{broken, Agreed, MAX_REQUEST};
use crate::nbd::wire::{self, chunk, errno, flag, Command, RequestHeader};
use crate::qcow2::bitmaps::BitmapView;
use crate::request::{Completion, Op, Request};
use crate::ring::Ring;

const MAX_PENDING: usize = 256;
const MAX_HELD: usize = 64 << 20;
/// Answers that wait for the client to read them.
const MAX_ANSWERS: usize = 1024;
/// Bytes read from the socket at once while headers come.
const INBOX: usize = 64 << 10;
/// Pieces sent at once.
const BUNCH: usize = 128;
/// Bytes of memory kept for the requests to come.
const MAX_SPARE: usize = 16 << 20;
/// How long a client is waited for once the server is to stop.
const FAREWELL: Duration = Duration::from_secs(2);
/// The most ranges in one answer about block status.
const MAX_RANGES: usize = 2048;
/// How often the wish to stop is looked at, in milliseconds.
const TICK: i32 = 200;

/// What waits to be sent.
enum Answer {
    Words(Vec<u8>),
    /// What was read.
    Data(Buffer),
}

impl Answer {
    fn bytes(&self) -> &[u8] {
        match self {
            Answer::Words(bytes) => bytes,
            Answer::Data(memory) => memory.bytes(),
        }
    }
}

/// What is known about a request under way.
struct Pending {
    header: RequestHeader,
    memory: Option<Buffer>,
}

/// A request whose data has not all come yet.
struct Arriving {
    header: RequestHeader,
    memory: Buffer,
    got: usize,
}

impl Arriving {
    fn missing(&self) -> usize {
        self.memory.len() - self.got
    }

    /// Copy what is still missing from the front of `came`; gives how much that was.
    fn take(&mut self, came: &[u8]) -> usize {
        let count = self.missing().min(came.len());
        let room = self.memory.bytes_mut().get_mut(self.got..self.got + count);
        if let (Some(room), Some(came)) = (room, came.get(..count)) {
            room.copy_from_slice(came);
        }
        self.got += count;
        count
    }
}

/// A connection behind its handshake. (The engine is dropped first: it waits for what is under way.)
pub(crate) struct Connection {
    engine: Engine,
    slot: Slot,
    image: Arc<Image>,
    agreed: Agreed,
    /// The bitmaps that the client has chosen, by their context's number.
    views: HashMap<u32, BitmapView>,
    pending: HashMap<u64, Pending>,
    next_id: u64,
    /// What came from the socket; from `inbox_taken` to `inbox_got` it is not looked at yet.
    inbox: Box<[u8]>,
    inbox_taken: usize,
    inbox_got: usize,
    arriving: Option<Arriving>,
    /// Block status that waits for all before it.
    asked: Option<RequestHeader>,
    out: VecDeque<Answer>,
    out_sent: usize,
    held: usize,
    /// Memory of requests that have ended.
    spare: Vec<Buffer>,
    spare_bytes: usize,
    leaving: bool,
}

impl Connection {
    pub(crate) fn new(
        image: Arc<Image>,
        bitmaps: &[String],
        agreed: Agreed,
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
        let slot = engine.attach(image.clone())?;
        Ok(Connection {
            engine,
            slot,
            image,
            agreed,
            views,
            pending: HashMap::new(),
            next_id: 0,
            inbox: vec![0; INBOX].into_boxed_slice(),
            inbox_taken: 0,
            inbox_got: 0,
            arriving: None,
            asked: None,
            out: VecDeque::new(),
            out_sent: 0,
            held: 0,
            spare: Vec::new(),
            spare_bytes: 0,
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
            self.send(socket)?;
        }
    }

    fn full(&self) -> bool {
        self.pending.len() >= MAX_PENDING
            || self.held > MAX_HELD
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

    /// Whether the inbox has enough to go on with.
    fn has_come(&self) -> bool {
        let least = match self.arriving {
            Some(_) => 1,
            None => RequestHeader::LEN,
        };
        self.inbox_got - self.inbox_taken >= least
    }

    /// Take what the socket has, as far as there is room for it.
    fn receive(&mut self, socket: &mut UnixStream) -> io::Result<()> {
        loop {
            self.take_in()?;
            if self.full() || self.leaving {
                return Ok(());
            }
            let large = self.arriving.as_mut().filter(|one| one.missing() >= INBOX);
            let (room, direct) = match large {
                Some(one) => (one.memory.bytes_mut().get_mut(one.got..), true),
                None => {
                    self.inbox.copy_within(self.inbox_taken..self.inbox_got, 0);
                    self.inbox_got -= self.inbox_taken;
                    self.inbox_taken = 0;
                    (self.inbox.get_mut(self.inbox_got..), false)
                }
            };
            let room = room.unwrap_or(&mut []);
            let wanted = room.len();
            let count = match socket.read(room) {
                Ok(0) => {
                    self.leaving = true;
                    return Ok(());
                }
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            match &mut self.arriving {
                Some(arriving) if direct => arriving.got += count,
                _ => self.inbox_got += count,
            }
            if count < wanted {
                // The socket is empty, or poll says otherwise.
                return self.take_in();
            }
        }
    }

    /// Begin the requests that have come whole, until there are enough.
    fn take_in(&mut self) -> io::Result<()> {
        while !self.full() && !self.leaving {
            let came = self
                .inbox
                .get(self.inbox_taken..self.inbox_got)
                .unwrap_or(&[]);
            if let Some(mut arriving) = self.arriving.take() {
                self.inbox_taken += arriving.take(came);
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
            self.inbox_taken += RequestHeader::LEN;
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
                let memory = self.hold(header.len as usize);
                self.begin(header, Op::Read, Some(memory));
            }
            Command::Write => {
                let memory = self.hold(header.len as usize);
                self.arriving = Some(Arriving {
                    header,
                    memory,
                    got: 0,
                });
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

    /// Memory for a request. It may hold what an earlier one left: a write fills all of it before it begins, and
    /// of a read only that is sent which succeeded, and so filled all of it.
    fn hold(&mut self, len: usize) -> Buffer {
        self.held += len;
        match self.spare.iter().rposition(|spare| spare.len() == len) {
            Some(place) => {
                self.spare_bytes -= len;
                self.spare.swap_remove(place)
            }
            None => Buffer::zeroed(len),
        }
    }

    /// A request needs its memory no more.
    fn release(&mut self, memory: Buffer) {
        let len = memory.len();
        self.held -= len;
        if len > MAX_SPARE {
            return;
        }
        while self.spare_bytes + len > MAX_SPARE || self.spare.len() >= MAX_PENDING {
            self.spare_bytes -= self.spare.pop().map_or(0, |old| old.len());
        }
        self.spare_bytes += len;
        self.spare.push(memory);
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
                self.release(memory);
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
                if self.agreed.structured {
                    let mut words =
                        wire::last_chunk(chunk::OFFSET_DATA, header.cookie, header.len + 8);
                    words.extend(header.offset.to_be_bytes());
                    self.say(words);
                } else {
                    self.say(wire::simple(0, header.cookie));
                }
                self.out.push_back(Answer::Data(memory));
            }
            _ => self.say(wire::simple(0, header.cookie)),
        }
    }

    fn say(&mut self, bytes: Vec<u8>) {
        self.out.push_back(Answer::Words(bytes));
    }

    fn fail(&mut self, header: &RequestHeader, error: u32) {
        let structured = matches!(header.command, Command::Read | Command::BlockStatus)
            && self.agreed.structured;
        if !structured {
            return self.say(wire::simple(error, header.cookie));
        }
        let mut out = wire::last_chunk(chunk::ERROR, header.cookie, 6);
        out.extend(error.to_be_bytes());
        out.extend(0u16.to_be_bytes());
        self.say(out);
    }

    /// Which ranges are holes and which are zeros.
    fn block_status(&mut self, header: &RequestHeader) {
        let end = header
            .offset
            .checked_add(u64::from(header.len))
            .filter(|end| *end <= self.image.size());
        let contexts = self.agreed.contexts.clone();
        let Some(end) = end.filter(|_| !contexts.is_empty() && header.len > 0) else {
            return self.fail(header, errno::INVAL);
        };
        let mut out = Vec::new();
        for (place, context) in contexts.iter().enumerate() {
            let ranges = match self.ranges(*context, header, end) {
                Ok(ranges) => ranges,
                Err(error) => return self.fail(header, number(&error)),
            };
            let len = 4 + 8 * ranges.len() as u32;
            let last = place + 1 == contexts.len();
            out.extend(wire::one_chunk(
                chunk::BLOCK_STATUS,
                header.cookie,
                len,
                last,
            ));
            out.extend(context.to_be_bytes());
            for (len, state) in ranges {
                out.extend(len.to_be_bytes());
                out.extend(state.to_be_bytes());
            }
        }
        self.say(out);
    }

    /// The ranges of a request in one context: length and state of each.
    fn ranges(
        &mut self,
        context: u32,
        header: &RequestHeader,
        end: u64,
    ) -> Result<Vec<(u32, u32)>, Error> {
        let limit = if header.flags & flag::REQUEST_ONE != 0 {
            1
        } else {
            MAX_RANGES
        };
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        let mut at = header.offset;
        while at < end {
            let (len, state) = match self.views.get_mut(&context) {
                Some(view) => {
                    let (dirty, len) = view.status(&self.image, at, end - at)?;
                    (len, if dirty { wire::STATE_DIRTY } else { 0 })
                }
                None => {
                    let range = range_at(&self.image, at, end - at)?;
                    let hole = if range.data { 0 } else { wire::STATE_HOLE };
                    let zero = if range.zero { wire::STATE_ZERO } else { 0 };
                    (range.len, hole | zero)
                }
            };
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let full = ranges.len() == limit;
            match ranges.last_mut() {
                Some(last) if last.1 == state => last.0 = last.0.saturating_add(len),
                _ if full => break,
                _ => ranges.push((len, state)),
            }
            at += u64::from(len);
        }
        Ok(ranges)
    }

    fn send(&mut self, socket: &mut UnixStream) -> io::Result<()> {
        while !self.out.is_empty() {
            let mut skip = self.out_sent;
            let mut pieces = [IoSlice::new(&[]); BUNCH];
            let mut wanted = 0;
            for (piece, answer) in pieces.iter_mut().zip(&self.out) {
                let bytes = answer.bytes().get(skip..).unwrap_or(&[]);
                skip = 0;
                wanted += bytes.len();
                *piece = IoSlice::new(bytes);
            }
            let count = pieces.len().min(self.out.len());
            match socket.write_vectored(pieces.get(..count).unwrap_or(&[])) {
                Ok(count) => {
                    self.sent(count);
                    if count < wanted {
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The client has taken `count` bytes more.
    fn sent(&mut self, count: usize) {
        self.out_sent += count;
        while let Some(first) = self.out.front() {
            let len = first.bytes().len();
            if self.out_sent < len {
                return;
            }
            self.out_sent -= len;
            if let Some(Answer::Data(memory)) = self.out.pop_front() {
                self.release(memory);
            }
        }
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
