// SPDX-License-Identifier: Apache-2.0
//! What a machine is built from, and what is asked of it later, as it crosses the C ABI in JSON.
//!
//! The fields are those of `vmbus/wire/definition.py` with each file replaced by its fd. [`Files`] takes the
//! fds over first of all, so that a build that fails closes every one of them exactly once.
//!
//! | module | what it has | what it builds on |
//! |---|---|---|
//! | `devices` | disks, interfaces and ports | |
//! | `machine` | [`Config`]: memory, vCPUs, what boots, and the devices | `devices` |
//! | `check` | what can be told from a configuration's numbers alone, and their limits | `machine` |
//! | `files` | the fds that a configuration names, owned | `machine`, `devices` |
//! | `requests` | what is asked of a machine that is built: saving, changes, connections | `devices`, `files` |

mod check;
mod devices;
mod files;
mod machine;
mod requests;
#[cfg(test)]
mod tests;

pub use check::{
    uuid_bytes, MachineType, CMDLINE_MAX, MEMORY_MAX, MEMORY_MIN, NODES_MAX, VCPUS_MAX,
};
pub use devices::{Disk, DiskBus, Layer, LinkKind, Nic, Port};
pub use files::Files;
pub use machine::{Config, Firmware, Kernel, MemoryKind, OnReset, OnWatchdog};
pub use requests::{
    ChangeKind, DeviceChange, MediumChange, Peer, ReceiveFrom, RestoreFrom, Revert, SaveTo, SendTo,
    VsockEnd,
};
