// SPDX-License-Identifier: Apache-2.0
//! virtio 1.2 devices on PCI, modern only.
//!
//! | file | what |
//! |---|---|
//! | [`queue`], [`chain`] | the split ring and one request of it |
//! | [`common`] | the common configuration registers and the life of a device |
//! | [`interrupt`] | what a device raises, from any thread |
//! | [`live`] | a configuration that changes while it is looked at |
//! | [`pci`] | the PCI function around all that |
//! | [`balloon`], [`blk`], [`console`], [`net`], [`rng`], [`scsi`], [`vsock`] | what the requests of a kind of device mean |
//!
//! Requests are carried out on I/O threads ([`crate::io`]), never on a vCPU. A device's feature list is
//! part of the machine type: what the host can or cannot do never shows in it.
//!
//! Left out: packed rings, queue reset, legacy and transitional interfaces, INTx, notification data.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod common;
pub mod console;
pub mod interrupt;
pub mod live;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod scsi;
pub mod vsock;

use std::fmt::Debug;
use std::sync::mpsc::Receiver;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use interrupt::Interrupt;
use queue::{Position, Queue};

pub use crate::state::State;
use crate::state::Stateful;

/// Descriptors may name tables of descriptors (virtio 1.2, 6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say at which index they want to be told.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// The device is a modern one; drivers must accept it.
pub const F_VERSION_1: u64 = 1 << 32;
/// What every device here offers.
pub const F_RING: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// What a device shows the guest, fixed before it runs.
#[derive(Clone, Debug)]
pub struct Model {
    /// The device type of virtio 1.2, 5.
    pub device_type: u16,
    /// PCI class, as 0xBBSSPP.
    pub class: u32,
    /// The features offered.
    pub features: u64,
    /// Virtqueues, 1 to 32.
    pub queues: u16,
    /// The largest size of each, a power of two of at most [`queue::SIZE_MAX`].
    pub queue_size: u16,
    /// The device-specific configuration; none of it is writable, unless it is `live`.
    pub config: Vec<u8>,
    /// A device whose configuration changes; `config` is then what it begins with.
    pub live: Option<Arc<dyn LiveConfig>>,
}

/// A device-specific configuration that the device changes, or the driver.
pub trait LiveConfig: Stateful + Debug + Send + Sync {
    /// Another one after each change that is not the driver's (virtio 1.2, 2.5.1).
    fn generation(&self) -> u8;

    /// Whether it is another than the driver knew that goes on with it now.
    fn has_news(&self) -> bool {
        false
    }

    /// The driver reads, with any width; `data` is all zeros beforehand.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The driver writes, with any width.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A queue that the driver has enabled.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// Its rings.
    pub queue: Queue,
    /// Written when the driver notifies us.
    pub kick: Arc<EventFd>,
}

/// What a device works with from DRIVER_OK until it is reset.
pub struct Activation {
    /// The enabled queues.
    pub queues: Vec<ActiveQueue>,
    /// The features that the driver accepted.
    pub features: u64,
    /// How to tell the driver.
    pub interrupt: Arc<Interrupt>,
    /// The driver was ready before, in a machine that was saved: what [`Served::own`] was then. The thread is paused,
    /// and begins with that; None for a driver that has just become ready.
    pub restored: Option<State>,
}

/// What the thread that serves a device's queues knows of them.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Served {
    /// Each queue that the driver has enabled, by its number, and how far it has come.
    pub queues: Vec<(u16, Position)>,
    /// What the kind of device knows besides: null if nothing.
    pub own: State,
}

/// Whoever carries out a device's requests.
pub trait Backend: Send + Sync {
    /// The driver is ready: serve the queues.
    fn start(&self, activation: Activation);

    /// The device is being reset: begin nothing more. The receiver hears (or is hung up on) when no
    /// request is in flight and guest memory is no longer touched.
    fn stop(&self) -> Receiver<()>;

    /// The device stands still: what is known of its queues. None for one whose driver is not ready. Hung up on when the
    /// thread is gone.
    fn saved(&self) -> Receiver<Option<Served>>;
}

#[cfg(test)]
pub(crate) mod fuzz;
#[cfg(test)]
mod marked;
#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod speed;
#[cfg(test)]
mod tests;
