// SPDX-License-Identifier: Apache-2.0
//! Threads, and the hook by which each narrows itself to what it needs.
//!
//! The sandbox is none of this crate's business except here: whoever builds a machine gives a hook, and
//! every thread of the core calls it first, with its role. In a worker it installs the role's seccomp
//! filter; in a test or an example it does nothing.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::error::{Error, Result};

/// What a thread does, and so which calls it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// KVM_RUN and the devices' registers.
    Vcpu,
    /// Images: reads, writes, its io_uring.
    Block,
    /// Taps: reads and writes.
    Network,
    /// The machine's control thread: everything above, for new threads inherit its filter.
    Control,
}

/// Called first in each new thread.
pub type ThreadHook = Arc<dyn Fn(Role) -> Result<()> + Send + Sync>;

/// A hook that narrows nothing.
pub fn unconfined() -> ThreadHook {
    Arc::new(|_| Ok(()))
}

/// Starts a thread that calls `hook` with its role and then `body`.
///
/// A thread whose hook fails never runs `body`: the error is `join`'s result.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    role: Role,
    hook: &ThreadHook,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    let hook = Arc::clone(hook);
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            hook(role)?;
            Ok(body())
        })
        .map_err(|e| Error::kernel("a new thread", e))
}
