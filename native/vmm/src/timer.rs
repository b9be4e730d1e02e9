// SPDX-License-Identifier: Apache-2.0
//! A timer of the kernel's, armed by vCPUs, that wakes the control thread.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::{Error, Result};

/// Readable once its time has passed, until that is taken note of.
#[derive(Debug)]
pub(crate) struct Timer(OwnedFd);

impl Timer {
    /// One that is not armed.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives none.
    pub(crate) fn new() -> Result<Timer> {
        let flags = libc::TFD_NONBLOCK | libc::TFD_CLOEXEC;
        // SAFETY: it takes no pointers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        if fd < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Error::kernel("timerfd_create", error));
        }
        // SAFETY: the fd has just been made, and nobody else has it.
        Ok(Timer(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Has it end after so long, or never.
    pub(crate) fn arm(&self, left: Option<Duration>) {
        // None left would disarm it.
        let left = left.map(|left| left.max(Duration::from_nanos(1)));
        let left = left.unwrap_or_default();
        let none = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = libc::itimerspec {
            it_interval: none,
            it_value: libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: i64::from(left.subsec_nanos()),
            },
        };
        // SAFETY: the structure outlives the call, and nothing is asked back. It fails only for bad numbers.
        unsafe { libc::timerfd_settime(self.fd(), 0, &value, std::ptr::null_mut()) };
    }

    /// It is not readable any more.
    pub(crate) fn note(&self) {
        let mut count = [0u8; 8];
        // SAFETY: the pointer and the length are those of `count`. What there is to read says nothing further.
        unsafe { libc::read(self.fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}
