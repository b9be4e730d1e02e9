// SPDX-License-Identifier: Apache-2.0
//! One I/O thread's io_uring, made before the sandbox closes.
//!
//! The ring is created disabled, given its eventfd, a sparse table of files and its restrictions,
//! and only then enabled. From then on the kernel itself refuses everything but the six data
//! operations, on files of the table only, and every registration but an update of that table;
//! io_uring_setup can be denied by seccomp afterwards. Guest memory is never registered
//! (it would be pinned: no merging, no ballooning).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{opcode, IoUring};

/// `IORING_REGISTER_FILES_UPDATE` of linux/io_uring.h: the one registration left open.
const REGISTER_FILES_UPDATE: u8 = 6;
/// `IOSQE_FIXED_FILE`: each request names a file of the table, never an fd.
const FLAG_FIXED_FILE: u8 = 1 << 0;

/// An enabled, restricted ring with its completion eventfd.
pub struct Ring {
    pub(crate) uring: IoUring,
    pub(crate) event: OwnedFd,
    pub(crate) files: u32,
}

impl Ring {
    /// A ring for `entries` requests (rounded up to a power of two by the kernel) and a table of
    /// at most `files` files. Fails with ENOSYS or EPERM where the host has io_uring switched off:
    /// use [`Engine::blocking`](crate::Engine::blocking) then.
    pub fn new(entries: u32, files: u32) -> io::Result<Ring> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            // What has ended is looked at when the thread enters the kernel anyway, as it does before each look at
            // the ring: interrupting it for that costs more than the looking.
            .setup_coop_taskrun()
            .dontfork()
            .build(entries)?;
        let event = event_fd()?;
        let submitter = uring.submitter();
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_files_sparse(files)?;
        let mut rules = [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_allowed(FLAG_FIXED_FILE),
            Restriction::sqe_flags_required(FLAG_FIXED_FILE),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ];
        submitter.register_restrictions(&mut rules)?;
        submitter.register_enable_rings()?;
        Ok(Ring {
            uring,
            event,
            files,
        })
    }

    /// The ring's fd, for the list of fds that a worker may hold.
    pub fn fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

/// A non-blocking, close-on-exec eventfd.
pub(crate) fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: eventfd takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this fd; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
