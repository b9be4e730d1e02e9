// SPDX-License-Identifier: Apache-2.0
//! The socket between source and destination, and what may interrupt the waiting for it.
//!
//! It may be any connected stream socket, blocking or not: nothing here waits but in poll(2), where an order to stop is
//! heard, too. A far side that neither takes nor gives a byte for [`SILENCE`] counts as gone.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::stream::{self, Header, Kind, HEADER, PREAMBLE};
use super::{Order, Refusal};
use crate::error::{Error, Kind as Trouble, Result};
use crate::mailbox::Queue;

/// How long the far side may be silent while something is waited for.
pub const SILENCE: Duration = Duration::from_secs(60);
/// Records wait until there are so many bytes of them.
const FULL: usize = 512 << 10;
const BUFFER: usize = 256 << 10;

/// The far side is gone.
fn gone(what: impl std::fmt::Display) -> Error {
    let message = format!("the connection with the other side is broken: {what}");
    Error::new(Trouble::Disconnected, "socket", message)
}

/// One end.
pub struct Link {
    socket: OwnedFd,
    orders: Arc<Queue<Order>>,
    /// Orders that are not about the link.
    kept: VecDeque<Order>,
    /// Records that are not sent yet.
    out: Vec<u8>,
    /// Numbers of the next records.
    sends: u32,
    takes: u32,
    /// What was received and not taken yet.
    received: Vec<u8>,
    taken: usize,
    body: Vec<u8>,
    /// Bytes sent or received.
    moved: u64,
    /// Orders to stop come too late.
    deaf: bool,
    /// The machine is dropped.
    exit: bool,
    /// How long the far side may be silent.
    patience: Duration,
}

impl Link {
    /// # Errors
    /// `InvalidArgument` for what is no connected stream socket.
    pub(super) fn new(socket: OwnedFd, orders: Arc<Queue<Order>>) -> Result<Link> {
        if option(&socket, libc::SO_TYPE) != Some(libc::SOCK_STREAM) || !is_connected(&socket) {
            let message = "is no connected stream socket";
            return Err(Error::invalid("socket", message));
        }
        Ok(Link {
            socket,
            orders,
            kept: VecDeque::new(),
            out: Vec::with_capacity(FULL.saturating_add(2 << 20)),
            sends: 0,
            takes: 0,
            received: Vec::with_capacity(BUFFER),
            taken: 0,
            body: Vec::new(),
            moved: 0,
            deaf: false,
            exit: false,
            patience: SILENCE,
        })
    }

    /// Bytes that have gone through.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    /// Bytes of records that wait.
    pub fn waiting(&self) -> u64 {
        self.out.len() as u64
    }

    #[cfg(test)]
    pub(super) fn with_patience(mut self, patience: Duration) -> Link {
        self.patience = patience;
        self
    }

    /// From now on orders to stop come too late.
    pub(super) fn ignore_orders(&mut self) {
        self.deaf = true;
    }

    /// The machine is dropped: the thread is to end.
    pub(super) fn exits(&self) -> bool {
        self.exit
    }

    /// Sends the preamble with what follows.
    pub(super) fn begin(&mut self, version: u32) {
        self.out.extend(stream::preamble(version));
    }

    /// Puts a record behind the others.
    pub(super) fn put(&mut self, kind: Kind, ram: (u64, u64), body: &[u8]) {
        let header = Header::of(kind, self.sends, ram, body);
        self.sends = self.sends.wrapping_add(1);
        self.out.extend(header.bytes());
        self.out.extend(body);
    }

    /// Whether enough waits.
    pub(super) fn is_full(&self) -> bool {
        self.out.len() >= FULL
    }

    /// Sends what waits; `idle` is called at least every `tick`.
    ///
    /// # Errors
    /// `Disconnected`; what an order to stop says; what the far side says of why it does not read on.
    pub(super) fn flush(&mut self, tick: Duration, mut idle: impl FnMut()) -> Result<()> {
        let mut sent = 0;
        let mut since = Instant::now();
        while sent < self.out.len() {
            self.hear()?;
            match usize::try_from(self.send_from(sent)) {
                Ok(len) => {
                    sent = sent.saturating_add(len);
                    self.moved = self.moved.saturating_add(len as u64);
                    since = Instant::now();
                }
                Err(_) => match would_wait() {
                    None => {
                        self.wait(libc::POLLOUT, tick)?;
                        if since.elapsed() > self.patience {
                            return Err(gone(format!("it took nothing for {:?}", self.patience)));
                        }
                    }
                    Some(error) => {
                        let error = gone(error);
                        return Err(self.last_words().unwrap_or(error));
                    }
                },
            }
            idle();
        }
        self.out.clear();
        Ok(())
    }

    /// Sends what waits as far as the socket takes it: nobody waits when a machine ends.
    pub(super) fn send_at_once(&mut self) {
        self.send_from(0);
        self.out.clear();
    }

    /// One send(2) of what waits behind the first `sent` bytes.
    fn send_from(&self, sent: usize) -> isize {
        let rest = self.out.get(sent..).unwrap_or_default();
        let fd = self.socket.as_raw_fd();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the bytes are ours.
        unsafe { libc::send(fd, rest.as_ptr().cast(), rest.len(), flags) }
    }

    /// Why the far side has ended the connection, if it said so.
    fn last_words(&mut self) -> Option<Error> {
        // Not more than what has been received is looked at.
        self.deaf = true;
        for _ in 0..2 {
            let (header, body) = self.take_before(Instant::now()).ok()?;
            if header.kind == Kind::Refused {
                return Some(Refusal::error(&body));
            }
        }
        None
    }

    /// The preamble of a source: the version of its stream.
    ///
    /// # Errors
    /// As [`stream::check_preamble`]; as [`Link::take`].
    pub(super) fn take_preamble(&mut self) -> Result<u32> {
        let mut bytes = [0; PREAMBLE];
        self.read(&mut bytes, Instant::now() + self.patience)?;
        stream::check_preamble(&bytes)
    }

    /// The next record, whole.
    ///
    /// # Errors
    /// `ImageInvalid`; `Disconnected`; what an order to stop says.
    pub(super) fn take(&mut self) -> Result<(Header, Vec<u8>)> {
        self.take_before(Instant::now() + self.patience)
    }

    fn take_before(&mut self, deadline: Instant) -> Result<(Header, Vec<u8>)> {
        let mut bytes = [0; HEADER];
        self.read(&mut bytes, deadline)?;
        let header = Header::parse(&bytes)?;
        let mut body = std::mem::take(&mut self.body);
        body.resize(header.len as usize, 0);
        self.read(&mut body, deadline)?;
        header.check(self.takes, &body)?;
        self.takes = self.takes.wrapping_add(1);
        Ok((header, body))
    }

    /// Until something has come, for [`Link::take`]; `idle` is called at least every `tick`.
    ///
    /// # Errors
    /// `Disconnected` when nothing comes; what an order to stop says.
    pub(super) fn expect(&mut self, tick: Duration, mut idle: impl FnMut()) -> Result<()> {
        let since = Instant::now();
        while self.taken >= self.received.len() {
            self.hear()?;
            let mut byte = 0u8;
            let place: *mut u8 = &mut byte;
            let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
            // SAFETY: there is room for one byte.
            let there = unsafe { libc::recv(self.socket.as_raw_fd(), place.cast(), 1, flags) };
            if there >= 0 || would_wait().is_some() {
                // Also what the end of the connection is: whoever takes hears of it.
                return Ok(());
            }
            if since.elapsed() > self.patience {
                return Err(gone(format!("it said nothing for {:?}", self.patience)));
            }
            self.wait(libc::POLLIN, tick)?;
            idle();
        }
        Ok(())
    }

    /// The room of a body is used again.
    pub(super) fn give_back(&mut self, body: Vec<u8>) {
        self.body = body;
    }

    fn read(&mut self, mut place: &mut [u8], deadline: Instant) -> Result<()> {
        loop {
            let rest = self.received.get(self.taken..).unwrap_or_default();
            let len = rest.len().min(place.len());
            let (here, after) = place.split_at_mut(len);
            here.copy_from_slice(rest.get(..len).unwrap_or_default());
            self.taken = self.taken.saturating_add(len);
            place = after;
            if place.is_empty() {
                return Ok(());
            }
            self.fill(deadline)?;
        }
    }

    /// Receives something; nothing is left in the buffer.
    fn fill(&mut self, deadline: Instant) -> Result<()> {
        self.taken = 0;
        self.received.resize(BUFFER, 0);
        let len = self.receive(deadline);
        self.received.truncate(len.as_ref().map_or(0, |len| *len));
        len.map(drop)
    }

    fn receive(&mut self, deadline: Instant) -> Result<usize> {
        loop {
            self.hear()?;
            // SAFETY: the buffer is ours.
            let result = unsafe {
                libc::recv(
                    self.socket.as_raw_fd(),
                    self.received.as_mut_ptr().cast(),
                    self.received.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            match usize::try_from(result) {
                Ok(0) => return Err(gone("it was closed")),
                Ok(len) => {
                    self.moved = self.moved.saturating_add(len as u64);
                    return Ok(len);
                }
                Err(_) => {
                    if let Some(error) = would_wait() {
                        return Err(gone(error));
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(gone(format!("it said nothing for {:?}", self.patience)));
            }
            self.wait(libc::POLLIN, left)?;
        }
    }

    /// An order that is about something else than the link. `Ok(None)` when none has come within the time.
    ///
    /// # Errors
    /// What an order to stop says; `Disconnected` when the far side is gone meanwhile.
    pub(super) fn order(&mut self, time: Duration) -> Result<Option<Order>> {
        self.hear()?;
        if let Some(order) = self.kept.pop_front() {
            return Ok(Some(order));
        }
        self.wait(0, time)?;
        self.hear()?;
        Ok(self.kept.pop_front())
    }

    /// Waits for the bandwidth's sake.
    ///
    /// # Errors
    /// What an order to stop says.
    pub(super) fn pause(&mut self, time: Duration) -> Result<()> {
        self.wait(0, time)?;
        self.hear()
    }

    /// Takes the orders that have come.
    fn hear(&mut self) -> Result<()> {
        while let Some(order) = self.orders.pop() {
            match order {
                Order::Cancel(_) if self.deaf => {}
                Order::Cancel(why) => return Err(why),
                Order::Exit => {
                    self.exit = true;
                    return Err(Error::new(Trouble::Cancelled, "", "the machine is gone"));
                }
                order => self.kept.push_back(order),
            }
        }
        Ok(())
    }

    /// Until the socket is ready for `events`, or broken, or an order comes.
    fn wait(&self, events: libc::c_short, time: Duration) -> Result<()> {
        let watched = |fd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        // One that nothing is waited for is left out, for a broken one is always ready.
        let socket = if events == 0 {
            -1
        } else {
            self.socket.as_raw_fd()
        };
        let mut fds = [
            watched(socket, events),
            watched(self.orders.fd(), libc::POLLIN),
        ];
        // Rounded up: not to wait for less than a millisecond is to wait not at all.
        let time = time.saturating_add(Duration::from_micros(999)).as_millis();
        let time = i32::try_from(time).unwrap_or(i32::MAX);
        // SAFETY: two pollfds, ours.
        let result = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, time) };
        let error = std::io::Error::last_os_error();
        match result {
            0.. => Ok(()),
            _ if error.raw_os_error() == Some(libc::EINTR) => Ok(()),
            _ => Err(Error::kernel("poll", error)),
        }
    }
}

/// None when the call is to be made again once the socket is ready.
fn would_wait() -> Option<std::io::Error> {
    let error = std::io::Error::last_os_error();
    let again = [libc::EAGAIN, libc::EWOULDBLOCK, libc::EINTR];
    let waits = error
        .raw_os_error()
        .is_some_and(|number| again.contains(&number));
    (!waits).then_some(error)
}

/// A number that the kernel knows of a socket; None for what is none.
fn option(socket: &OwnedFd, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = std::mem::size_of_val(&value) as libc::socklen_t;
    let place: *mut libc::c_int = &mut value;
    // SAFETY: there is room for the number, and `len` says how much.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            place.cast(),
            &mut len,
        )
    };
    (result == 0).then_some(value)
}

fn is_connected(socket: &OwnedFd) -> bool {
    // SAFETY: all zeros is an address of no family.
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut len = std::mem::size_of_val(&address) as libc::socklen_t;
    let place: *mut libc::sockaddr_storage = &mut address;
    // SAFETY: there is room for any address, and `len` says how much.
    unsafe { libc::getpeername(socket.as_raw_fd(), place.cast(), &mut len) == 0 }
}
