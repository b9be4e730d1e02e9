// SPDX-License-Identifier: Apache-2.0
//! One connection between a port of the guest's and a socket of the host's.
//!
//! *Credit* (virtio 1.2, 5.10.6.3). Each side says with every packet how much room it has for the connection and
//! how much it has taken out of there so far; the other never has more under way. What the guest sends goes right into the
//! socket; what that does not take is kept here, at most [`ROOM`] bytes, which is all that the guest may send. A guest that
//! sends more than that, or says what makes no sense now, loses the connection. What goes to the guest is
//! read from the socket right into its memory, as much as it has said it has room for.
//!
//! *Ends.* Each side has two halves that it may close for itself.
//!
//! | who | does | then |
//! |---|---|---|
//! | the host | shuts its writing down | the guest hears that no more is sent, once all is with it |
//! | the host | closes its socket | that no more is received, either; the guest answers with a reset |
//! | the guest | sends no more | the host reads an end of file, once all is with it |
//! | the guest | neither sends nor receives | the same; then a reset answers |
//! | the guest | resets | the host reads what was kept here if the guest had ended before, else nothing more |

use std::collections::VecDeque;
use std::io::{Error as IoError, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::io::Answer;
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::{Chain, Segments};
use crate::virtio::queue::Fault;
use crate::virtio::vsock::{Operation, Packet, CLOSED, HEADER, HOST, NO_RECEIVE, NO_SEND, STREAM};

/// Bytes of a connection that may wait for the host, and so how many the guest may have under way.
pub(super) const ROOM: u32 = 64 << 10;
/// The most pieces of guest memory that one call moves.
const PIECES: usize = 64;

/// Both ports: the guest's and the host's.
pub(super) type Ports = (u32, u32);

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Stays,
    /// It is over; nothing is said.
    Over,
    /// It is over, and the guest is told so.
    Reset,
    /// The guest knows it no more; what was kept still goes to the host.
    Drains,
}

pub(super) struct Connection {
    pub(super) ports: Ports,
    socket: OwnedFd,
    /// Who waits for the guest to say yes; None once it has.
    asking: Option<Answer>,
    /// The socket may have something, or room.
    readable: bool,
    writable: bool,
    /// The other end of the socket is closed.
    gone: bool,
    /// From the guest, not yet with the host.
    kept: VecDeque<u8>,
    /// Bytes that the host has had, modulo 2^32, and how many of them the guest was told of.
    taken: u32,
    told: u32,
    /// What the guest said of itself, and bytes that it was sent.
    room_there: u32,
    taken_there: u32,
    sent: u32,
    /// [`NO_SEND`], [`NO_RECEIVE`]: the guest's, the host's, and what of those the guest was told.
    guest_ended: u32,
    host_ended: u32,
    end_told: u32,
    /// What is to be said to the guest.
    request: bool,
    response: bool,
    credit: bool,
    /// It was asked for room, and has not said that it has some.
    asked: bool,
    /// Whether it stands in the line of those that have something to say.
    pub(super) queued: bool,
}

/// What a call on the socket brought.
enum Moved {
    Bytes(usize),
    Later,
    End,
}

impl Connection {
    fn new(ports: Ports, socket: OwnedFd) -> Connection {
        Connection {
            ports,
            socket,
            asking: None,
            readable: true,
            writable: true,
            gone: false,
            kept: VecDeque::new(),
            taken: 0,
            told: 0,
            room_there: 0,
            taken_there: 0,
            sent: 0,
            guest_ended: 0,
            host_ended: 0,
            end_told: 0,
            request: false,
            response: false,
            credit: false,
            asked: false,
            queued: false,
        }
    }

    /// The host wants to connect; `asking` hears what the guest says.
    pub(super) fn asked(ports: Ports, socket: OwnedFd, asking: Answer) -> Connection {
        Connection {
            asking: Some(asking),
            request: true,
            ..Connection::new(ports, socket)
        }
    }

    /// The guest wanted to, with this packet, and may.
    pub(super) fn accepted(ports: Ports, socket: OwnedFd, packet: &Packet) -> Connection {
        Connection {
            response: true,
            room_there: packet.room,
            taken_there: packet.taken,
            ..Connection::new(ports, socket)
        }
    }

    /// Who still waits for the guest's word, and is to hear that there will be none.
    pub(super) fn take_asking(&mut self) -> Option<Answer> {
        self.asking.take()
    }

    /// The socket has news; `gone`: its other end is closed.
    pub(super) fn woken(&mut self, gone: bool) -> Fate {
        self.readable = true;
        self.writable = true;
        self.gone |= gone;
        if self.gone && self.asking.is_some() {
            return Fate::Reset;
        }
        if self.gone && self.host_ended & NO_SEND != 0 {
            self.host_ended |= NO_RECEIVE;
        }
        self.flush()
    }

    /// The guest says something other than bytes.
    pub(super) fn heard(&mut self, operation: Operation, packet: &Packet) -> Fate {
        self.note(packet);
        match (operation, self.asking.is_some()) {
            (Operation::Response, true) => {
                if let Some(asking) = self.asking.take() {
                    asking.give(Ok(()));
                }
                Fate::Stays
            }
            (Operation::CreditUpdate, false) => Fate::Stays,
            (Operation::CreditRequest, false) => {
                self.credit = true;
                Fate::Stays
            }
            (Operation::Shutdown, false) => {
                self.guest_ended |= packet.flags & CLOSED;
                if self.guest_ended & NO_RECEIVE != 0 {
                    self.shut(libc::SHUT_RD);
                }
                self.flush()
            }
            (Operation::Reset, _) if self.guest_ended & NO_SEND != 0 && !self.kept.is_empty() => {
                Fate::Drains
            }
            (Operation::Reset, _) => Fate::Over,
            _ => Fate::Reset,
        }
    }

    /// The guest sends these bytes.
    ///
    /// # Errors
    /// A [`Fault`] when they are not RAM.
    pub(super) fn receive(
        &mut self,
        packet: &Packet,
        data: &Segments,
        memory: &GuestMemoryMmap,
    ) -> Result<Fate, Fault> {
        self.note(packet);
        let len = data.len();
        let room = u64::from(ROOM).saturating_sub(self.kept.len() as u64);
        if self.asking.is_some() || self.guest_ended & NO_SEND != 0 || len > room {
            return Ok(Fate::Reset);
        }
        let mut put = 0;
        if self.kept.is_empty() && self.host_ended & NO_RECEIVE == 0 {
            let iovecs = data.iovecs(memory)?;
            put = self.write(iovecs.get(..iovecs.len().min(PIECES)).unwrap_or_default());
            self.took(put);
        }
        let mut rest = vec![0; len.saturating_sub(put as u64) as usize];
        data.read_at(memory, put as u64, &mut rest)?;
        self.kept.extend(rest);
        Ok(self.flush())
    }

    /// Fills a chain of the guest's with what there is to say, if there is something: how many bytes.
    ///
    /// # Errors
    /// A [`Fault`] when it is not RAM.
    pub(super) fn speak(
        &mut self,
        cid: u64,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<u32>, Fault> {
        loop {
            if let Some((operation, flags)) = self.word() {
                return self.write_header(cid, chain, memory, operation, flags, 0);
            }
            if !self.may_read() {
                return Ok(None);
            }
            let in_flight = self.sent.wrapping_sub(self.taken_there);
            let room = self.room_there.saturating_sub(in_flight);
            if room == 0 {
                if std::mem::replace(&mut self.asked, true) {
                    return Ok(None);
                }
                let ask = Operation::CreditRequest;
                return self.write_header(cid, chain, memory, ask, 0, 0);
            }
            let mut body = chain.writable.clone();
            body.split_front(HEADER as u64);
            let body = body.split_front(u64::from(room).min(body.len()));
            let iovecs = body.unwrap_or_default().iovecs(memory)?;
            let iovecs = iovecs.get(..iovecs.len().min(PIECES)).unwrap_or_default();
            if iovecs.is_empty() {
                return Err(Fault::Request);
            }
            match self.read(iovecs) {
                Moved::Bytes(len) => {
                    let len = len as u32;
                    self.sent = self.sent.wrapping_add(len);
                    return self.write_header(cid, chain, memory, Operation::Data, 0, len);
                }
                Moved::Later => return Ok(None),
                Moved::End => {
                    self.host_ended |= NO_SEND;
                    if self.gone {
                        self.host_ended |= NO_RECEIVE;
                    }
                }
            }
        }
    }

    /// Bytes that the host has had.
    pub(super) fn taken(&self) -> u32 {
        self.taken
    }

    /// Bytes that the guest was sent.
    pub(super) fn sent(&self) -> u32 {
        self.sent
    }

    fn may_read(&self) -> bool {
        self.asking.is_none()
            && self.readable
            && self.host_ended & NO_SEND == 0
            && self.guest_ended & NO_RECEIVE == 0
    }

    /// What is to be said before any bytes.
    fn word(&mut self) -> Option<(Operation, u32)> {
        if std::mem::take(&mut self.request) {
            return Some((Operation::Request, 0));
        }
        if self.asking.is_some() {
            return None;
        }
        if std::mem::take(&mut self.response) {
            return Some((Operation::Response, 0));
        }
        if std::mem::take(&mut self.credit) {
            return Some((Operation::CreditUpdate, 0));
        }
        if self.host_ended != self.end_told {
            self.end_told = self.host_ended;
            return Some((Operation::Shutdown, self.host_ended));
        }
        None
    }

    fn write_header(
        &mut self,
        cid: u64,
        chain: &Chain,
        memory: &GuestMemoryMmap,
        operation: Operation,
        flags: u32,
        len: u32,
    ) -> Result<Option<u32>, Fault> {
        self.told = self.taken;
        let packet = Packet {
            src_cid: HOST,
            dst_cid: cid,
            src_port: self.ports.1,
            dst_port: self.ports.0,
            len,
            kind: STREAM,
            operation: operation as u16,
            flags,
            room: ROOM,
            taken: self.taken,
        };
        let written = chain.writable.write(memory, &packet.bytes())?;
        if (written as usize) < HEADER {
            return Err(Fault::Request);
        }
        Ok(Some(written.saturating_add(len)))
    }

    fn note(&mut self, packet: &Packet) {
        self.room_there = packet.room;
        self.taken_there = packet.taken;
        if self.room_there > self.sent.wrapping_sub(self.taken_there) {
            self.asked = false;
        }
    }

    /// Gives the host what was kept for it, as far as it takes it; what follows from that.
    fn flush(&mut self) -> Fate {
        while !self.kept.is_empty() && self.host_ended & NO_RECEIVE == 0 && self.writable {
            let (first, _) = self.kept.as_slices();
            let iovec = libc::iovec {
                iov_base: first.as_ptr().cast_mut().cast(),
                iov_len: first.len(),
            };
            let put = self.write(&[iovec]);
            self.kept.drain(..put.min(self.kept.len()));
            self.took(put);
        }
        if self.host_ended & NO_RECEIVE != 0 {
            // Nobody reads it.
            let lost = self.kept.len();
            self.kept.clear();
            self.took(lost);
        }
        if !self.kept.is_empty() || self.guest_ended & NO_SEND == 0 {
            return Fate::Stays;
        }
        self.shut(libc::SHUT_WR);
        if self.guest_ended == CLOSED {
            Fate::Reset
        } else {
            Fate::Stays
        }
    }

    /// Whether nothing is kept any more.
    pub(super) fn is_drained(&mut self, gone: bool) -> bool {
        self.writable = true;
        self.gone |= gone;
        let _ = self.flush();
        self.kept.is_empty()
    }

    fn took(&mut self, bytes: usize) {
        self.taken = self.taken.wrapping_add(bytes as u32);
        if self.taken.wrapping_sub(self.told) >= ROOM / 2 {
            self.credit = true;
        }
    }

    fn shut(&self, how: i32) {
        // SAFETY: an fd of ours; a socket whose other end is gone refuses, and that is as good.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), how) };
    }

    /// Writes as much as the socket takes: none is an answer, too.
    fn write(&mut self, iovecs: &[libc::iovec]) -> usize {
        if iovecs.is_empty() {
            return 0;
        }
        let fd = self.socket.as_raw_fd();
        // SAFETY: the iovecs are guest memory, which is mapped until the machine is gone, or ours; at most PIECES.
        let put = unsafe { libc::writev(fd, iovecs.as_ptr(), iovecs.len() as i32) };
        usize::try_from(put).unwrap_or_else(|_| {
            match IoError::last_os_error().kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => self.writable = false,
                // The host reads no more.
                _ => self.host_ended |= NO_RECEIVE,
            }
            0
        })
    }

    /// Reads into guest memory.
    fn read(&mut self, iovecs: &[libc::iovec]) -> Moved {
        let fd = self.socket.as_raw_fd();
        loop {
            // SAFETY: as above.
            let got = unsafe { libc::readv(fd, iovecs.as_ptr(), iovecs.len() as i32) };
            return match usize::try_from(got) {
                Ok(0) => Moved::End,
                Ok(len) => Moved::Bytes(len),
                Err(_) => match IoError::last_os_error().kind() {
                    ErrorKind::Interrupted => continue,
                    ErrorKind::WouldBlock => {
                        self.readable = false;
                        Moved::Later
                    }
                    // The other end closed before it had read all: ECONNRESET.
                    _ => Moved::End,
                },
            };
        }
    }
}
