// SPDX-License-Identifier: Apache-2.0
//! How one engine (or a blocking caller) tells another that what it waits for has come.
//!
//! A task that has to wait leaves a [`Waiter`] where the event will happen: a metadata block being
//! read, a cluster being allocated, a commit. Whoever brings the event about posts the task's key
//! to the waiter's mailbox. The eventfd is written only when the owner is not inside its own loop,
//! for then it looks into the box anyway before it leaves.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;

/// A message: the task, and the outcome where the event has one.
pub(crate) type Message = (u64, Option<Result<()>>);

/// One engine's letter box.
pub(crate) struct Mailbox {
    event: OwnedFd,
    awake: AtomicBool,
    messages: Mutex<Vec<Message>>,
}

/// Who waits.
#[derive(Clone)]
pub(crate) struct Waiter {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) task: u64,
}

impl Mailbox {
    pub(crate) fn new(event: OwnedFd) -> Mailbox {
        Mailbox {
            event,
            awake: AtomicBool::new(false),
            messages: Mutex::new(Vec::new()),
        }
    }

    /// The owner enters its loop: posts need not ring.
    pub(crate) fn enter(&self) {
        self.awake.store(true, Ordering::SeqCst);
    }

    /// The owner leaves its loop; it must take once more after this.
    pub(crate) fn leave(&self) {
        self.awake.store(false, Ordering::SeqCst);
    }

    pub(crate) fn take(&self) -> Vec<Message> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn post(&self, message: Message) {
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(message);
        self.ring_if_away();
    }

    /// Make the eventfd readable, unless the owner looks for news anyway before it leaves.
    pub(crate) fn ring_if_away(&self) {
        if !self.awake.load(Ordering::SeqCst) {
            self.ring();
        }
    }

    /// Make the eventfd readable.
    pub(crate) fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the buffer is 8 bytes, as eventfd(2) wants. A full counter is readable already.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Make the eventfd not readable.
    pub(crate) fn silence(&self) {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is 8 bytes; the fd is non-blocking, EAGAIN means it was silent.
        unsafe {
            libc::read(
                self.event.as_raw_fd(),
                count.as_mut_ptr().cast(),
                count.len(),
            )
        };
    }

    /// Wait until the eventfd is readable, and leave it so.
    pub(crate) fn wait_readable(&self) {
        let mut poll = libc::pollfd {
            fd: self.event.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd; EINTR only makes the caller look again.
        unsafe { libc::poll(&mut poll, 1, -1) };
    }

    /// Wait for a letter (a blocking caller's own box only).
    pub(crate) fn wait(&self) {
        self.wait_readable();
        self.silence();
    }
}

impl Waiter {
    /// Try again: what you waited for has changed.
    pub(crate) fn wake(self) {
        self.mailbox.post((self.task, None));
    }

    /// The event you waited for ended like this.
    pub(crate) fn finish(self, result: Result<()>) {
        self.mailbox.post((self.task, Some(result)));
    }
}
