// SPDX-License-Identifier: Apache-2.0
//! What comes from a client's socket: headers, and what came with them, many at once into one buffer; only the data of
//! a large write is read straight to its place.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use crate::buffer::Buffer;
use crate::nbd::wire::RequestHeader;

/// Bytes read from the socket at once while headers come.
const INBOX: usize = 64 << 10;

/// A request whose data has not all come yet.
pub(super) struct Arriving {
    pub(super) header: RequestHeader,
    pub(super) memory: Buffer,
    got: usize,
}

impl Arriving {
    pub(super) fn new(header: RequestHeader, memory: Buffer) -> Arriving {
        Arriving {
            header,
            memory,
            got: 0,
        }
    }

    pub(super) fn missing(&self) -> usize {
        self.memory.len() - self.got
    }

    /// Copy what is still missing from the front of `came`; gives how much that was.
    pub(super) fn take(&mut self, came: &[u8]) -> usize {
        let count = self.missing().min(came.len());
        let room = self.memory.bytes_mut().get_mut(self.got..self.got + count);
        if let (Some(room), Some(came)) = (room, came.get(..count)) {
            room.copy_from_slice(came);
        }
        self.got += count;
        count
    }
}

/// How a read of the socket ended.
pub(super) enum Came {
    /// There may be more.
    More,
    /// The socket is empty, or poll says otherwise.
    All,
    /// The client has hung up.
    End,
}

/// What came and is not looked at yet.
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    taken: usize,
    got: usize,
}

impl Inbox {
    pub(super) fn new() -> Inbox {
        Inbox {
            bytes: vec![0; INBOX].into_boxed_slice(),
            taken: 0,
            got: 0,
        }
    }

    pub(super) fn front(&self) -> &[u8] {
        self.bytes.get(self.taken..self.got).unwrap_or(&[])
    }

    /// `count` bytes of the front have been looked at.
    pub(super) fn take(&mut self, count: usize) {
        self.taken = (self.taken + count).min(self.got);
    }

    /// Read once, straight to what is arriving if much of it is missing.
    pub(super) fn fill(
        &mut self,
        socket: &mut UnixStream,
        arriving: Option<&mut Arriving>,
    ) -> io::Result<Came> {
        let large = arriving.filter(|one| one.missing() >= INBOX);
        let direct = large.is_some();
        let (room, count) = match large {
            Some(one) => {
                let room = one.memory.bytes_mut().get_mut(one.got..).unwrap_or(&mut []);
                let count = socket.read(room);
                let room = room.len();
                one.got += count.as_ref().map_or(0, |count| *count);
                (room, count)
            }
            None => {
                self.bytes.copy_within(self.taken..self.got, 0);
                self.got -= self.taken;
                self.taken = 0;
                let room = self.bytes.get_mut(self.got..).unwrap_or(&mut []);
                (room.len(), socket.read(room))
            }
        };
        match count {
            Ok(0) => Ok(Came::End),
            Ok(count) => {
                self.got += if direct { 0 } else { count };
                Ok(if count < room { Came::All } else { Came::More })
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Came::All),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Came::More),
            Err(e) => Err(e),
        }
    }
}
