// SPDX-License-Identifier: Apache-2.0
//! The devices of a machine: disks with their chains, network interfaces, named ports. Only their fields; their fds are
//! taken over in `files`, and what a field may hold is checked where the device is made.

use std::os::fd::RawFd;

use serde::Deserialize;

/// A disk: its whole chain, active layer first.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Names it in events and errors.
    pub id: String,
    /// At least one; none for a CD-ROM drive without a medium.
    pub layers: Vec<Layer>,
    /// What it is connected by.
    #[serde(default)]
    pub bus: DiskBus,
    /// A CD-ROM drive: on the SCSI bus.
    #[serde(default)]
    pub cdrom: bool,
    /// Whether the guest may write.
    #[serde(default)]
    pub read_only: bool,
    /// Up to 20 printable ASCII characters.
    #[serde(default)]
    pub serial: String,
    /// Virtqueues; 0 for one a vCPU.
    #[serde(default)]
    pub queues: u16,
    /// The hotplug slot it sits in, 1 to 8; None for a place on bus 0, where it stays.
    #[serde(default)]
    pub slot: Option<u8>,
    /// What becomes of writes of zeros: `off` (also when empty), `on` or `unmap`.
    #[serde(default)]
    pub detect_zeroes: String,
}

/// What a disk is connected by.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// A function of its own: virtio-blk.
    #[default]
    Blk,
    /// The host adapter: virtio-scsi.
    Scsi,
}

/// One image of a chain.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The image.
    pub fd: RawFd,
    /// `qcow2` or `raw`, never guessed.
    pub format: String,
    /// The backing file name that the header must have; None for none.
    #[serde(default)]
    pub backing_name: Option<String>,
    /// The data file name that the header must have; None for none.
    #[serde(default)]
    pub data_name: Option<String>,
    /// The external data file.
    #[serde(default)]
    pub data_fd: Option<RawFd>,
    /// A file that holds the passphrase of an encrypted image.
    #[serde(default)]
    pub secret_fd: Option<RawFd>,
}

/// A virtio-net device.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Names it in events and errors.
    pub id: String,
    /// Six lower-case hexadecimal bytes with colons.
    pub mac: String,
    /// Queue pairs; 0 for one a vCPU.
    #[serde(default)]
    pub queues: u16,
    /// The hotplug slot it sits in, 1 to 8; None for a place on bus 0, where it stays.
    #[serde(default)]
    pub slot: Option<u8>,
    /// Whether the cable is plugged in at the start.
    #[serde(default = "yes")]
    pub carrier: bool,
    /// What `tap_fds` are.
    #[serde(default)]
    pub link: LinkKind,
    /// The host's end: a tap's queues, at least one; a stream's socket.
    pub tap_fds: Vec<RawFd>,
    /// An opened /dev/vhost-net for each queue of a tap, or none.
    #[serde(default)]
    pub vhost_fds: Vec<RawFd>,
}

/// What an interface's descriptors are.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LinkKind {
    /// The queues of a tap, at least one.
    #[default]
    Tap,
    /// One stream socket, which carries frames with their length before them.
    Stream,
    /// Nothing yet: the sockets of other machines come by [`Peer`].
    Hub,
}

/// A named port of virtio-console.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// As the guest sees it.
    pub name: String,
    /// One end of a non-blocking SOCK_STREAM socket pair.
    pub fd: RawFd,
}

fn yes() -> bool {
    true
}
