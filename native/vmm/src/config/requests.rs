// SPDX-License-Identifier: Apache-2.0
//! What is asked of a machine that is built: to be saved or to go on from a file, to go elsewhere or come from there, to change a device or a medium, to
//! take the socket of a connection or of another machine.

use std::os::fd::{OwnedFd, RawFd};

use serde::Deserialize;

use super::devices::Disk;
use super::files::take;
use crate::error::Result;
use crate::io::Change;

/// Where a machine is saved to.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaveTo {
    /// An empty regular file, open for writing.
    pub fd: RawFd,
    /// The machine ends when it is saved, with reason `saved`.
    #[serde(default)]
    pub end: bool,
    /// Together with it an internal snapshot of this name is taken of each disk, and the machine goes on.
    #[serde(default)]
    pub snapshot: Option<String>,
}

impl SaveTo {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_file(&self) -> Result<OwnedFd> {
        take("file", self.fd)
    }
}

/// Where a machine goes on from.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreFrom {
    /// A saved machine, open for reading; for writing too, if it is to be marked as used. None: the file that the machine was
    /// built with.
    #[serde(default)]
    pub fd: Option<RawFd>,
    /// Even if the files of its disks are others, or were written since.
    #[serde(default)]
    pub changed_disks: bool,
    /// The disks go back, too.
    #[serde(default)]
    pub revert: Option<Revert>,
}

/// How a machine's disks go back with it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revert {
    /// To the internal snapshot of this name.
    pub to: String,
    /// What they held before becomes one of this name, until somebody drops it.
    pub aside: String,
}

impl RestoreFrom {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_file(&self) -> Result<Option<OwnedFd>> {
        self.fd.map(|fd| take("file", fd)).transpose()
    }
}

/// Where a machine goes to while it runs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendTo {
    /// A connected stream socket, at whose other end a machine is to receive it.
    pub fd: RawFd,
    /// For how many milliseconds it may stand on its way.
    pub downtime: u64,
    /// Bytes a second, at most; 0 for as many as go.
    #[serde(default)]
    pub bandwidth: u64,
    /// Disks whose content goes along, such as `disk/root`.
    #[serde(default)]
    pub copy: Vec<String>,
}

impl SendTo {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_socket(&self) -> Result<OwnedFd> {
        take("socket", self.fd)
    }
}

/// Where a machine comes from.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveFrom {
    /// A connected stream socket, at whose other end a machine is sent.
    pub fd: RawFd,
    /// It does not go on at once, even if it ran.
    #[serde(default)]
    pub paused: bool,
    /// Disks that are written with what comes, such as `disk/root`: just those that the source sends.
    #[serde(default)]
    pub copy: Vec<String>,
    /// Disks whose files are others than the source's, and hold what those hold.
    #[serde(default)]
    pub separate: Vec<String>,
}

impl ReceiveFrom {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_socket(&self) -> Result<OwnedFd> {
        take("socket", self.fd)
    }
}

/// A change of a device while the machine has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceChange {
    /// Its name, such as `nic/lan`.
    pub device: String,
    /// What becomes of it.
    pub change: ChangeKind,
}

/// What can be changed.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// A network interface's cable: plugged in or not.
    Carrier(bool),
    /// A disk's bytes.
    Size(u64),
}

impl From<ChangeKind> for Change {
    fn from(kind: ChangeKind) -> Change {
        match kind {
            ChangeKind::Carrier(up) => Change::Carrier(up),
            ChangeKind::Size(bytes) => Change::Size(bytes),
        }
    }
}

/// Another medium for a CD-ROM drive.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MediumChange {
    /// The drive with its new medium's layers, or with none.
    pub disk: Disk,
    /// Even if the guest has locked it.
    pub force: bool,
}

/// A socket for a connection between a port of the guest's and one of the host's.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockEnd {
    /// The guest's port, or with `accept` the host's.
    pub port: u32,
    /// It waits for the guest to connect; else the guest is asked.
    pub accept: bool,
    /// One end of a non-blocking SOCK_STREAM socket pair.
    pub fd: RawFd,
}

impl VsockEnd {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_file(&self) -> Result<OwnedFd> {
        take("fd", self.fd)
    }
}

/// Another machine of an isolated network.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// The device whose network it is, such as `nic/lan`.
    pub device: String,
    /// The other machine's name.
    pub peer: String,
    /// A SOCK_SEQPACKET socket whose other end it has.
    pub fd: RawFd,
}

impl Peer {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_file(&self) -> Result<OwnedFd> {
        take("fd", self.fd)
    }
}
