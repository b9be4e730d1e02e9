// SPDX-License-Identifier: Apache-2.0
//! epoll, as the threads of a machine use it.

use std::os::fd::RawFd;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::error::{Error, Result};

/// Has `epoll` tell of these events of `fd`, with `data`.
///
/// # Errors
/// `Unavailable` when the kernel refuses.
pub(crate) fn watch(epoll: &Epoll, fd: RawFd, events: EventSet, data: u64) -> Result<()> {
    epoll
        .ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
        .map_err(|e| Error::kernel("epoll_ctl", e))
}

/// Takes that back.
pub(crate) fn unwatch(epoll: &Epoll, fd: RawFd) {
    // It fails only for an fd that is not watched.
    let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

/// Waits for events: for ever with -1, not at all with 0. How many there are; none after a signal.
///
/// # Errors
/// `Unavailable` when the kernel refuses.
pub(crate) fn wait(epoll: &Epoll, timeout: i32, events: &mut [EpollEvent]) -> Result<usize> {
    match epoll.wait(timeout, events) {
        Ok(count) => Ok(count),
        Err(e) if e.raw_os_error() == Some(libc::EINTR) => Ok(0),
        Err(e) => Err(Error::kernel("epoll_wait", e)),
    }
}
