// SPDX-License-Identifier: Apache-2.0
//! A link to the machines of one isolated network: a socket to each of them, and no process in between.
//!
//! Each pair of machines in a network has a pair of sockets (SOCK_SEQPACKET, a frame a datagram), which the service
//! makes when the later of the two starts; so every interface is a port of a switch that is spread over them all.
//! A frame goes to the one member from which its destination was heard, else, as one for a group does, to all.
//!
//! As a switch does, it drops what a member does not take just now: one that stands still holds up nobody. A member
//! that ends is forgotten with what was heard from it; one that comes again under its name replaces itself. All of
//! them are one owner's: what they say of their addresses is believed, and costs a table of bounded size.
//!
//! What the driver leaves to the host is done by the sender ([`super::frames`]).

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::frames;
use super::interface::{scatter, ETHERNET, LONGEST};
use super::tap::non_blocking;
use crate::memory::GuestMemoryMmap;
use crate::virtio::chain::Chain;
use crate::virtio::net::{HEADER, MAC};
use crate::virtio::queue::Fault;

/// The most members beside this machine.
pub const MEMBERS_MAX: usize = 63;
/// The longest frame that is taken.
const FRAME_MAX: usize = LONGEST - HEADER;
/// Addresses that are remembered; with one more all are forgotten.
const LEARNED_MAX: usize = 1024;

struct Member {
    name: String,
    socket: File,
}

/// The link.
pub struct Hub {
    members: Vec<Option<Member>>,
    /// From which member an address was heard last.
    learned: HashMap<[u8; MAC], usize>,
    packet: Vec<u8>,
    frame: Vec<u8>,
    arrived: Vec<u8>,
}

impl Default for Hub {
    fn default() -> Hub {
        Hub {
            members: (0..MEMBERS_MAX).map(|_| None).collect(),
            learned: HashMap::new(),
            packet: Vec::new(),
            frame: Vec::new(),
            arrived: vec![0; FRAME_MAX],
        }
    }
}

impl Hub {
    /// The member `name` is behind `socket`; its place and what to watch.
    ///
    /// # Errors
    /// What the kernel says; `StorageFull` when there is no place.
    pub fn join(&mut self, name: String, socket: OwnedFd) -> io::Result<(usize, RawFd)> {
        let socket = File::from(socket);
        non_blocking(&socket)?;
        let same = |member: &Option<Member>| member.as_ref().is_some_and(|m| m.name == name);
        let again = self.members.iter().position(same);
        let place = again.or_else(|| self.members.iter().position(Option::is_none));
        let place = place.ok_or(ErrorKind::StorageFull)?;
        let fd = socket.as_raw_fd();
        if let Some(member) = self.members.get_mut(place) {
            *member = Some(Member { name, socket });
        }
        Ok((place, fd))
    }

    /// Forgets the member at `place`.
    fn leave(&mut self, place: usize) {
        if let Some(member) = self.members.get_mut(place) {
            *member = None;
        }
        self.learned.retain(|_, at| *at != place);
    }

    /// Forgets all of them.
    pub fn close(&mut self) {
        self.members.fill_with(|| None);
        self.learned.clear();
    }

    /// Sends the packet of a chain; false if it is malformed.
    ///
    /// # Errors
    /// A [`Fault`] for memory that is not RAM.
    pub fn send(&mut self, chain: &Chain, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        let Hub {
            members,
            learned,
            packet,
            frame,
            ..
        } = self;
        packet.resize(chain.readable.len() as usize, 0);
        chain.readable.read_at(memory, 0, packet)?;
        let mut gone = Vec::new();
        let taken = frames::cut(packet, frame, |frame| {
            let to = frame.first_chunk::<MAC>().and_then(|to| learned.get(to));
            for (place, member) in members.iter_mut().enumerate() {
                let Some(member) = member.as_mut().filter(|_| to.is_none_or(|to| *to == place))
                else {
                    continue;
                };
                match member.socket.write_vectored(&[IoSlice::new(frame)]) {
                    Err(e) if e.kind() != ErrorKind::WouldBlock => gone.push(place),
                    // A full socket is a frame that is lost.
                    _ => {}
                }
            }
        });
        for place in gone {
            self.leave(place);
        }
        Ok(taken.is_some())
    }

    /// Puts the next frame of the member at `place`, behind an empty header, into the iovecs; its length with that.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; others when the member has ended.
    ///
    /// # Safety
    /// The iovecs are memory that may be written.
    pub unsafe fn read(&mut self, place: usize, iovecs: &[libc::iovec]) -> io::Result<usize> {
        loop {
            let member = self.members.get_mut(place).and_then(Option::as_mut);
            let socket = &mut member.ok_or(ErrorKind::NotConnected)?.socket;
            let len = match socket.read_vectored(&mut [IoSliceMut::new(&mut self.arrived)]) {
                Ok(len @ 1..) => len,
                Ok(_) => {
                    self.leave(place);
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Err(e) => {
                    if !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
                        self.leave(place);
                    }
                    return Err(e);
                }
            };
            let frame = self.arrived.get(..len).unwrap_or_default();
            let from = frame.get(MAC..).and_then(|rest| rest.first_chunk::<MAC>());
            let (Some(from), true) = (from, len >= ETHERNET) else {
                continue;
            };
            let [first, ..] = from;
            if first & 1 == 0 {
                if self.learned.len() >= LEARNED_MAX && !self.learned.contains_key(from) {
                    self.learned.clear();
                }
                self.learned.insert(*from, place);
            }
            // SAFETY: the caller's promise.
            return Ok(unsafe { scatter(iovecs, &[&[0; HEADER], frame]) });
        }
    }
}
