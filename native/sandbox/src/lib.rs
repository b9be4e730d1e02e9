// SPDX-License-Identifier: Apache-2.0
//! How a worker closes itself, for ever, before it reads the first byte of an image.
//!
//! Three walls, each of which holds when another has a hole:
//!
//! - [`landlock`]: no path can be opened, no TCP port bound or connected to, no signal or abstract socket
//!   reaches out of the process (as far as the running kernel's Landlock goes);
//! - [`close`]: the base seccomp filter of one of two fixed [`Profile`]s, on all threads;
//! - [`narrow`]: a further filter for one thread, by its [`Role`].
//!
//! What a filter lets through is written in `roles.rs` (system calls) and `ioctls.rs` (requests); what a
//! refused call meets, and why, stands in `filter.rs`. The order of the steps is the worker's
//! (`vmbus/worker/main.py`).

mod filter;
mod ioctls;
pub mod landlock;
mod roles;

pub use filter::{close, narrow, Profile};
pub use roles::Role;

/// Why a wall could not be put up. The worker ends: it never runs half closed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A filter that does not compile: a bug of ours.
    #[error("the seccomp filter does not compile: {0}")]
    Compile(#[from] seccompiler::BackendError),
    /// The kernel refused a filter.
    #[error("the kernel refused the seccomp filter: {0}")]
    Install(seccompiler::Error),
    /// The kernel has Landlock but refused the rule set.
    #[error("the kernel refused the Landlock rule set: {0}")]
    Landlock(std::io::Error),
}
