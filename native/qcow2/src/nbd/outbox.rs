// SPDX-License-Identifier: Apache-2.0
//! Answers on their way to a client: many at once, from where they lie.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Write};
use std::os::unix::net::UnixStream;

use crate::buffer::Buffer;
use crate::nbd::memory::Memory;

/// Pieces sent at once.
const BUNCH: usize = 128;

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

/// What the client has not taken yet.
#[derive(Default)]
pub(super) struct Outbox {
    answers: VecDeque<Answer>,
    /// Bytes of the first that are sent.
    sent: usize,
}

impl Outbox {
    pub(super) fn say(&mut self, bytes: Vec<u8>) {
        self.answers.push_back(Answer::Words(bytes));
    }

    /// What was read; its memory is held until the client has taken it.
    pub(super) fn data(&mut self, memory: Buffer) {
        self.answers.push_back(Answer::Data(memory));
    }

    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Send what the socket takes.
    pub(super) fn send(&mut self, socket: &mut UnixStream, memory: &mut Memory) -> io::Result<()> {
        while !self.answers.is_empty() {
            let mut skip = self.sent;
            let mut pieces = [IoSlice::new(&[]); BUNCH];
            let mut wanted = 0;
            for (piece, answer) in pieces.iter_mut().zip(&self.answers) {
                let bytes = answer.bytes().get(skip..).unwrap_or(&[]);
                skip = 0;
                wanted += bytes.len();
                *piece = IoSlice::new(bytes);
            }
            let count = pieces.len().min(self.answers.len());
            match socket.write_vectored(pieces.get(..count).unwrap_or(&[])) {
                Ok(count) => {
                    self.taken(count, memory);
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
    fn taken(&mut self, count: usize, memory: &mut Memory) {
        self.sent += count;
        while let Some(first) = self.answers.front() {
            let len = first.bytes().len();
            if self.sent < len {
                return;
            }
            self.sent -= len;
            if let Some(Answer::Data(data)) = self.answers.pop_front() {
                memory.release(data);
            }
        }
    }
}
