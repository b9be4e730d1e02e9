// SPDX-License-Identifier: Apache-2.0
//! A link over a stream socket: frames with their length before them, as QEMU's socket back end has it and passt
//! speaks it (4 bytes, big-endian; QEMU net/stream.c, passt tap.c).
//!
//! A stream loses nothing, so it is never written to in part and given up: what the socket does not take waits in
//! `outgoing`, and while more than `FULL` bytes wait, no transmit queue is served ([`Stream::is_full`]); the
//! socket's next edge goes on with both. What the driver leaves to the host, the host's end of a tap, is done here
//! ([`super::frames`]); what arrives has its checksums and is no longer than a frame.
//!
//! The other end is a process that has to do with the outside world: a length that no frame has ends the link,
//! as its hanging up does. The guest then has a cable with nothing at its other end.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::frames;
use super::interface::{scatter, ETHERNET, LONGEST};
use super::tap::non_blocking;
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::Chain;
use crate::virtio::net::HEADER;
use crate::virtio::queue::Fault;

/// Bytes of the length before a frame.
const LENGTH: usize = 4;
/// The longest frame that is taken.
const FRAME_MAX: usize = LONGEST - HEADER;
/// With more than so many bytes waiting, the driver has to wait too.
const FULL: usize = 256 << 10;

/// The link.
pub struct Stream {
    /// None once it has ended.
    socket: Option<File>,
    incoming: Vec<u8>,
    /// Where in `incoming` there is something.
    filled: Range<usize>,
    outgoing: Vec<u8>,
    /// How much of it has been written.
    written: usize,
    packet: Vec<u8>,
    frame: Vec<u8>,
}

impl Stream {
    /// The link over `socket`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(socket: OwnedFd) -> io::Result<Stream> {
        let socket = File::from(socket);
        non_blocking(&socket)?;
        Ok(Stream {
            socket: Some(socket),
            incoming: vec![0; 2 * (LENGTH + FRAME_MAX)],
            filled: 0..0,
            outgoing: Vec::new(),
            written: 0,
            packet: Vec::new(),
            frame: Vec::new(),
        })
    }

    /// Its descriptor, unless it has ended.
    pub fn fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Lets it go.
    pub fn close(&mut self) {
        self.socket = None;
        self.outgoing.clear();
        self.written = 0;
    }

    /// Whether the driver must wait.
    pub fn is_full(&self) -> bool {
        self.outgoing.len().saturating_sub(self.written) > FULL
    }

    /// Whether something waits to be written.
    pub fn is_waiting(&self) -> bool {
        self.written < self.outgoing.len()
    }

    /// Takes the packet of a chain; whether it could.
    ///
    /// # Errors
    /// A [`Fault`] for memory that is not RAM.
    pub fn send(&mut self, chain: &Chain, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        if self.socket.is_none() {
            return Ok(false);
        }
        let Stream {
            packet,
            frame,
            outgoing,
            ..
        } = self;
        packet.resize(chain.readable.len() as usize, 0);
        chain.readable.read_at(memory, 0, packet)?;
        let taken = frames::cut(packet, frame, |frame| {
            outgoing.extend_from_slice(&(frame.len() as u32).to_be_bytes());
            outgoing.extend_from_slice(frame);
        });
        if self.is_full() {
            self.flush();
        }
        Ok(taken.is_some())
    }

    /// Writes what waits, as far as the socket takes it.
    pub fn flush(&mut self) {
        while let (Some(socket), Some(rest @ [_, ..])) =
            (&mut self.socket, self.outgoing.get(self.written..))
        {
            match socket.write_vectored(&[IoSlice::new(rest)]) {
                Ok(len) => self.written = self.written.saturating_add(len),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The next edge goes on.
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.close(),
            }
        }
        self.outgoing.clear();
        self.written = 0;
    }

    /// Puts the next frame, behind an empty header, into the iovecs; its length with that.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; others when the link has ended.
    ///
    /// # Safety
    /// The iovecs are memory that may be written.
    pub unsafe fn read(&mut self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        let frame = loop {
            if let Some(frame) = self.next()? {
                break frame;
            }
            self.fill()?;
        };
        let bytes = self.incoming.get(frame).unwrap_or_default();
        // SAFETY: the caller's promise.
        Ok(unsafe { scatter(iovecs, &[&[0; HEADER], bytes]) })
    }

    /// Takes a frame that is there as a whole off the front.
    fn next(&mut self) -> io::Result<Option<Range<usize>>> {
        let there = self.incoming.get(self.filled.clone()).unwrap_or_default();
        let Some((length, rest)) = there.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let len = u32::from_be_bytes(*length) as usize;
        if !(ETHERNET..=FRAME_MAX).contains(&len) {
            self.close();
            return Err(ErrorKind::InvalidData.into());
        }
        if rest.len() < len {
            return Ok(None);
        }
        let start = self.filled.start.saturating_add(LENGTH);
        let frame = start..start.saturating_add(len);
        self.filled.start = frame.end;
        Ok(Some(frame))
    }

    /// Reads what the socket has, behind what is there.
    fn fill(&mut self) -> io::Result<()> {
        let socket = self.socket.as_mut().ok_or(ErrorKind::NotConnected)?;
        let there = self.filled.len();
        if self.filled.end <= self.incoming.len() {
            self.incoming.copy_within(self.filled.clone(), 0);
        }
        self.filled = 0..there;
        let room = self.incoming.get_mut(there..).unwrap_or_default();
        match socket.read_vectored(&mut [IoSliceMut::new(room)]) {
            Ok(0) => {
                self.close();
                Err(ErrorKind::UnexpectedEof.into())
            }
            Ok(len) => {
                self.filled.end = there.saturating_add(len);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }
}
