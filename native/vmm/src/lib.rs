// SPDX-License-Identifier: Apache-2.0
//! The KVM machine of vmbus: vCPUs, memory, a subset of Intel's Q35, ACPI and the boot of a kernel.
//!
//! Read `machine.rs` first: it puts the parts together. Everything a guest can reach denies indexing,
//! unwrapping and panics by lint; a guest can end its own machine and nothing else.

#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic
    )
)]

pub mod abi;
pub mod acpi;
mod attend;
pub mod balloon;
pub mod block;
pub mod boot;
pub mod bus;
mod coders;
pub mod config;
mod control;
pub mod cpu;
pub mod crew;
pub mod device;
pub mod devices;
pub mod disks;
pub mod error;
pub mod firmware;
pub mod hotplug;
pub mod io;
pub mod irq;
pub mod layout;
pub mod legacy;
pub mod machine;
mod mailbox;
pub mod memory;
pub mod migrate;
pub mod net;
pub mod nics;
pub mod pci;
pub mod platform;
mod poll;
pub mod ports;
pub mod prefault;
pub mod save;
pub mod scsi;
pub mod slots;
pub mod snapshots;
pub mod state;
pub mod thread;
mod timer;
pub mod virtio;
pub mod vm;
pub mod vsock;

pub use config::Config;
pub use error::{Error, Kind, Result};
pub use machine::Machine;
pub use mailbox::{EndReason, Event, Request};
