// SPDX-License-Identifier: Apache-2.0
//! A machine: its memory, its vCPUs, what it boots, its devices, and what happens when its guest ends or hangs.

use std::os::fd::RawFd;

use serde::Deserialize;

use super::devices::{Disk, Nic, Port};
use crate::memory::Plan;

/// A machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The name of a [`MachineType`](super::MachineType).
    pub machine_type: String,
    /// The machine's UUID in its usual form.
    pub uuid: String,
    /// 1 to 16.
    pub vcpus: u8,
    /// Bytes, a multiple of 1 MiB, at least 4 MiB.
    pub memory: u64,
    /// How memory is made.
    #[serde(default)]
    pub memory_kind: MemoryKind,
    /// For `shareable` and `huge`: a sealed memfd of at least `memory` bytes.
    #[serde(default)]
    pub memory_fd: Option<RawFd>,
    /// Mergeable memory is offered to KSM; without this it only could be.
    #[serde(default)]
    pub merge: bool,
    /// Memory stays in RAM once it is touched, within RLIMIT_MEMLOCK.
    #[serde(default)]
    pub locked: bool,
    /// NUMA nodes that memory comes from, and no others; none: wherever the kernel takes it.
    #[serde(default)]
    pub memory_nodes: Vec<u16>,
    /// `host` or the name of a model; see `cpu::model`.
    pub cpu_model: String,
    /// `/dev/kvm`; closed once the machine is built.
    pub kvm_fd: RawFd,
    /// One end of a non-blocking SOCK_STREAM socketpair.
    pub console_fd: RawFd,
    /// A kernel that is booted directly.
    #[serde(default)]
    pub kernel: Option<Kernel>,
    /// Else the firmware that boots.
    #[serde(default)]
    pub firmware: Option<Firmware>,
    /// virtio-blk disks, in the order of their PCI devices.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// virtio-net devices.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// The named ports of virtio-console.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// The guest's CID; with one there is a virtio-vsock device.
    #[serde(default)]
    pub vsock: Option<u32>,
    /// Whether there is a virtio-rng device.
    #[serde(default)]
    pub rng: bool,
    /// Whether there is a virtio-balloon device; never with huge memory, which is the guest's for good.
    #[serde(default)]
    pub balloon: bool,
    /// What happens when the guest resets itself.
    #[serde(default)]
    pub on_reset: OnReset,
    /// A watchdog, and what happens to a guest that lets its time pass; None for no watchdog.
    #[serde(default)]
    pub watchdog: Option<OnWatchdog>,
    /// The machine goes on from a file: it cannot begin otherwise, and its disks are not used before.
    #[serde(default)]
    pub restore: bool,
    /// With `restore`: the file, whose memory becomes the machine's without being read; only of kind mergeable, not locked. It
    /// must be one that nobody changes.
    #[serde(default)]
    pub clone_fd: Option<RawFd>,
}

/// How the guest's memory is made.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum MemoryKind {
    /// Private and anonymous, such as KSM can merge.
    #[default]
    Mergeable,
    /// A sealed memfd, for helpers in other processes.
    Shareable,
    /// A sealed hugetlb memfd, reserved.
    Huge,
}

/// Direct boot of a kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// A bzImage, or an ELF with a PVH note.
    pub fd: RawFd,
    /// An initrd.
    #[serde(default)]
    pub initrd_fd: Option<RawFd>,
    /// At most 2047 bytes, without NUL.
    #[serde(default)]
    pub cmdline: String,
}

/// Boot by firmware.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Firmware {
    /// Its code: 128 KiB to 8 MiB, read once.
    pub code_fd: RawFd,
    /// Its variables: a file open for reading and writing, which the guest changes.
    #[serde(default)]
    pub variables_fd: Option<RawFd>,
    /// The option ROM of all network interfaces.
    #[serde(default)]
    pub nic_rom_fd: Option<RawFd>,
    /// `disk/ID` and `nic/ID`: what is booted, in this order, and nothing else.
    #[serde(default)]
    pub boot: Vec<String>,
    /// Whether SeaBIOS offers its boot menu.
    #[serde(default)]
    pub menu: bool,
}

/// What happens when the guest resets itself.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// The machine starts again in place.
    #[default]
    Restart,
    /// The machine ends with reason `guest-reset`.
    End,
}

/// What happens to a guest that lets its watchdog's time pass.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum OnWatchdog {
    /// It is told of, and no more.
    None,
    /// As if the guest had pulled the reset line.
    Reset,
    /// The machine ends.
    PowerOff,
    /// The machine stands still.
    Pause,
}

impl Config {
    /// How the guest's memory is made.
    pub fn memory_plan(&self) -> Plan {
        Plan {
            kind: self.memory_kind,
            memory: self.memory,
            merge: self.merge,
            locked: self.locked,
            nodes: self.memory_nodes.clone(),
        }
    }
}

impl OnWatchdog {
    /// The name in the definition.
    pub const fn as_str(self) -> &'static str {
        match self {
            OnWatchdog::None => "none",
            OnWatchdog::Reset => "reset",
            OnWatchdog::PowerOff => "poweroff",
            OnWatchdog::Pause => "pause",
        }
    }
}
