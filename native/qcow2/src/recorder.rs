// SPDX-License-Identifier: Apache-2.0
//! What is written to a file, recorded while a test's workload runs: every write, sync and change of length, in order.
//!
//! The places that write call `note_*`; outside of `recorded` that costs a look at a thread's own variable, and in
//! builds that are no tests nothing is here.

use std::cell::RefCell;
use std::os::fd::RawFd;

use crate::engine::backend::IoOp;

/// What happened, in order.
#[derive(Clone)]
pub(crate) enum Event {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Len(u64),
    Sync,
    /// A write that was on the disk when it ended; it says nothing of others.
    Durable {
        offset: u64,
        data: Vec<u8>,
    },
    /// The guest wrote: sectors and value; None is a discard.
    Submitted {
        id: u64,
        first: usize,
        count: usize,
        value: Option<u8>,
    },
    /// A flush ended; all that was completed when it began is durable.
    Flushed {
        completed: Vec<u64>,
    },
    /// The disk as it is now can be gone back to.
    Taken,
    /// From here on the disk may be as it was then.
    Rewinding,
    /// It is.
    Rewound,
}

struct Recorder {
    /// Inodes: a file may be opened more than once.
    files: Vec<u64>,
    events: Vec<Event>,
    /// Which of the files each event is about.
    of: Vec<usize>,
}

impl Recorder {
    fn new(fds: &[RawFd]) -> Recorder {
        Recorder {
            files: fds.iter().map(|fd| inode(*fd)).collect(),
            events: Vec::new(),
            of: Vec::new(),
        }
    }
}

fn inode(fd: RawFd) -> u64 {
    // SAFETY: an all-zero stat is a valid value of the plain C struct.
    let mut status: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: `status` outlives the call.
    assert_eq!(unsafe { libc::fstat64(fd, &mut status) }, 0);
    status.st_ino
}

thread_local! {
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

/// An event of a file; None is the test's own.
pub(crate) fn note(fd: Option<RawFd>, event: impl FnOnce() -> Event) {
    RECORDER.with_borrow_mut(|recorder| {
        let Some(recorder) = recorder else { return };
        let file = match fd {
            None => Some(0),
            Some(fd) => recorder.files.iter().position(|file| *file == inode(fd)),
        };
        if let Some(file) = file {
            recorder.events.push(event());
            recorder.of.push(file);
        }
    });
}

pub(crate) fn note_write(fd: RawFd, offset: u64, data: &[u8]) {
    note(Some(fd), || Event::Write {
        offset,
        data: data.to_vec(),
    });
}

pub(crate) fn note_len(fd: RawFd, len: u64) {
    note(Some(fd), || Event::Len(len));
}

pub(crate) fn note_sync(fd: RawFd) {
    note(Some(fd), || Event::Sync);
}

pub(crate) fn note_op(fd: RawFd, op: &IoOp, moved: u64) {
    match op {
        IoOp::Write {
            pieces,
            offset,
            durable,
        } => {
            let mut data = vec![0; moved as usize];
            // SAFETY: the pieces are valid: they have just been written from.
            unsafe { crate::buffer::gather(pieces, &mut data) };
            match durable {
                true => note(Some(fd), || Event::Durable {
                    offset: *offset,
                    data,
                }),
                false => note_write(fd, *offset, &data),
            }
        }
        IoOp::Sync => note_sync(fd),
        // A hole reads as zeros, if it reaches the disk.
        IoOp::Fallocate { offset, len, .. } => note_write(fd, *offset, &vec![0; *len as usize]),
        IoOp::Read { .. } => {}
    }
}

/// What `body` writes to a file, and its syncs.
pub(crate) fn recorded(fd: RawFd, body: impl FnOnce()) -> Vec<Event> {
    let events = recorded_of(&[fd], body).into_iter();
    events.map(|(_, event)| event).collect()
}

/// The same for several files: which one, and what.
pub(crate) fn recorded_of(fds: &[RawFd], body: impl FnOnce()) -> Vec<(usize, Event)> {
    RECORDER.set(Some(Recorder::new(fds)));
    body();
    let recorder = RECORDER.take().unwrap();
    recorder.of.into_iter().zip(recorder.events).collect()
}

/// Whether this thread's operations are recorded: then they must be its own.
pub(crate) fn recording() -> bool {
    RECORDER.with_borrow(Option::is_some)
}
