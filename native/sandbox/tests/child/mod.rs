// SPDX-License-Identifier: Apache-2.0
//! A forked child in which a test closes the process and then tries things.

use std::time::{Duration, Instant};

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It returned this value (0..=255).
    Value(i32),
    /// This signal killed it.
    Signal(i32),
}

/// Runs `body` in a forked child and returns how that ended; kills it after 10 s.
pub fn run(body: impl FnOnce() -> i32) -> End {
    // SAFETY: the child only runs `body` and leaves by _exit; glibc keeps malloc usable after fork.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let value = body();
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(value) };
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut status = 0;
    loop {
        // SAFETY: `pid` is our child, `status` a valid int.
        let done = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
        if done == pid {
            break;
        }
        if Instant::now() > deadline {
            // SAFETY: `pid` is our child and not yet reaped.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if libc::WIFSIGNALED(status) {
        End::Signal(libc::WTERMSIG(status))
    } else {
        End::Value(libc::WEXITSTATUS(status))
    }
}

/// A raw system call: its errno, or 0 when it succeeded.
pub fn errno_of(number: i64, args: [u64; 6]) -> i32 {
    let [a, b, c, d, e, f] = args;
    // SAFETY: made in a child that may well be harmed by it; the arguments are chosen by the test.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
    } else {
        0
    }
}
