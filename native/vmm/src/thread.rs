// SPDX-License-Identifier: Apache-2.0
//! Threads, and the hook by which each narrows itself to what it needs.
//!
//! What a role may call is the sandbox crate's business; whoever builds a machine gives a hook, and
//! every thread of the core calls it first, with its role. In a worker it installs the role's seccomp
//! filter; in a test or an example it does nothing.

use std::any::Any;
use std::sync::{mpsc, Arc};
use std::thread::JoinHandle;

use crate::error::{Error, Result};

pub use vmbus_sandbox::Role;

/// Called first in each new thread.
pub type ThreadHook = Arc<dyn Fn(Role) -> Result<()> + Send + Sync>;

/// A hook that narrows nothing.
pub fn unconfined() -> ThreadHook {
    Arc::new(|_| Ok(()))
}

/// Starts a thread that calls `hook` with its role and then `body`; returns once the hook has succeeded.
/// Joined, the thread gives what `body` returned.
///
/// # Errors
/// What the hook said (`body` never runs then), or `Unavailable` when the kernel gives no thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    role: Role,
    hook: &ThreadHook,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    let hook = Arc::clone(hook);
    let (narrowed, outcome) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let result = hook(role);
            let _ = narrowed.send(result.clone());
            result.map(|()| body())
        })
        .map_err(|e| Error::kernel("a new thread", e))?;
    // A hook that panics drops its end.
    outcome
        .recv()
        .unwrap_or_else(|_| Err(Error::internal("a thread ended before it began")))?;
    Ok(thread)
}

/// What a panic said, for the detail of an end.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let words = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    format!("a bug of the core's: {words}")
}
