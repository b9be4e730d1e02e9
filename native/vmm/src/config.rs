// SPDX-License-Identifier: Apache-2.0
//! What a machine is built from, as it crosses the C ABI in JSON.
//!
//! The fields are those of `vmbus/wire/definition.py` with each file replaced by its fd. [`Files`] takes the
//! fds over first of all, so that a build that fails closes every one of them exactly once.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use serde::Deserialize;

use crate::disks::LayerFds;
use crate::error::{Error, Kind, Result};
use crate::io::Change;
use crate::layout;
use crate::memory::Plan;
use crate::virtio::vsock::{CID_LEAST, CID_MOST};

/// The machine type that this crate builds. What it shows a guest is frozen (tests/abi/vmbus-1.json): a change needs a type
/// of its own beside it.
pub const MACHINE_TYPE: &str = "vmbus-1";
/// The greatest number of vCPUs; the MADT has a place for each of them.
pub const VCPUS_MAX: u8 = 16;
/// The least memory that holds the boot structures and a small kernel: 4 MiB.
pub const MEMORY_MIN: u64 = 4 << 20;
/// The greatest: low RAM and what fits between 4 GiB and the 64-bit MMIO window.
pub const MEMORY_MAX: u64 = layout::LOW_RAM_MAX + (layout::HIGH_RAM_END - layout::HIGH_RAM_START);
/// NUMA nodes are numbered below this.
pub const NODES_MAX: u16 = 1024;
/// The longest kernel command line, without its NUL.
pub const CMDLINE_MAX: usize = 2047;

/// A machine.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Always `vmbus-1`.
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
}

fn yes() -> bool {
    true
}

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

impl SaveTo {
    /// Takes over the fd.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn take_file(&self) -> Result<OwnedFd> {
        take("file", self.fd)
    }
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

fn take(argument: &str, fd: RawFd) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::invalid(argument, "is not an fd"));
    }
    Ok(own(fd))
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

/// A named port of virtio-console.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// As the guest sees it.
    pub name: String,
    /// One end of a non-blocking SOCK_STREAM socket pair.
    pub fd: RawFd,
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

/// The files of a machine, owned.
pub struct Files {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The console's socket.
    pub console: OwnedFd,
    /// The memory's file.
    pub memory: Option<OwnedFd>,
    /// The kernel.
    pub kernel: Option<OwnedFd>,
    /// The firmware's code.
    pub firmware: Option<OwnedFd>,
    /// Its variables.
    pub variables: Option<OwnedFd>,
    /// The option ROM of network interfaces.
    pub nic_rom: Option<OwnedFd>,
    /// The initrd.
    pub initrd: Option<OwnedFd>,
    /// For each disk, for each layer: the image and its data file.
    pub disks: Vec<Vec<LayerFds>>,
    /// For each NIC: the descriptors of its link.
    pub nics: Vec<Vec<OwnedFd>>,
    /// For each port: its socket.
    pub ports: Vec<OwnedFd>,
    /// The saved machine that it is a clone of.
    pub clone: Option<OwnedFd>,
}

impl Config {
    /// Takes over every fd that the configuration names.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd, or that stands there twice (then none is taken over).
    pub fn take_files(&self) -> Result<Files> {
        each_stands_once(self.fds())?;
        Ok(Files {
            kvm: own(self.kvm_fd),
            console: own(self.console_fd),
            memory: self.memory_fd.map(own),
            kernel: self.kernel.as_ref().map(|kernel| own(kernel.fd)),
            firmware: self.firmware.as_ref().map(|code| own(code.code_fd)),
            variables: self.firmware.as_ref().and_then(|f| f.variables_fd).map(own),
            nic_rom: self.firmware.as_ref().and_then(|f| f.nic_rom_fd).map(own),
            initrd: self.kernel.as_ref().and_then(|k| k.initrd_fd).map(own),
            disks: self.disks.iter().map(Disk::own_files).collect(),
            nics: self.nics.iter().map(Nic::own_files).collect(),
            ports: self.ports.iter().map(|port| own(port.fd)).collect(),
            clone: self.clone_fd.map(own),
        })
    }

    /// Checks what can be told from the numbers alone.
    ///
    /// # Errors
    /// `InvalidArgument` or `NotSupported`, with the field.
    pub fn check(&self) -> Result<()> {
        if self.machine_type != MACHINE_TYPE {
            return Err(Error::new(
                Kind::NotSupported,
                "machine_type",
                format!("{:?} is not known; {MACHINE_TYPE} is", self.machine_type),
            ));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(Error::invalid(
                "vcpus",
                format!("{} is not between 1 and {VCPUS_MAX}", self.vcpus),
            ));
        }
        if self.memory % (1 << 20) != 0 || !(MEMORY_MIN..=MEMORY_MAX).contains(&self.memory) {
            return Err(Error::invalid(
                "memory",
                format!(
                    "{} bytes is not a multiple of 1 MiB between {MEMORY_MIN} and {MEMORY_MAX}",
                    self.memory
                ),
            ));
        }
        self.uuid_bytes()?;
        let plain = self.memory_kind == MemoryKind::Mergeable && !self.locked;
        if self.clone_fd.is_some() && !(self.restore && plain) {
            let message = "a clone has memory of kind mergeable, not locked, and is restored";
            return Err(Error::invalid("clone_fd", message));
        }
        match (&self.kernel, &self.firmware) {
            (Some(kernel), None) => {
                if kernel.cmdline.len() > CMDLINE_MAX || kernel.cmdline.contains('\0') {
                    return Err(Error::invalid(
                        "kernel.cmdline",
                        format!("longer than {CMDLINE_MAX} bytes, or with a NUL in it"),
                    ));
                }
            }
            (None, Some(_)) => {}
            _ => {
                return Err(Error::invalid(
                    "kernel",
                    "a machine boots either a kernel or firmware",
                ))
            }
        }
        if self.merge && self.memory_kind != MemoryKind::Mergeable {
            return Err(Error::invalid(
                "merge",
                "KSM merges private memory only; make it mergeable",
            ));
        }
        if self.balloon && self.locked {
            return Err(Error::invalid(
                "balloon",
                "locked memory stays where it is; a balloon could give nothing back",
            ));
        }
        if let Some(cid) = self
            .vsock
            .filter(|cid| !(CID_LEAST..=CID_MOST).contains(cid))
        {
            return Err(Error::invalid(
                "vsock",
                format!("{cid} is no CID of a guest: {CID_LEAST} to {CID_MOST} are"),
            ));
        }
        if let Some(node) = self.memory_nodes.iter().find(|node| **node >= NODES_MAX) {
            return Err(Error::invalid(
                "memory_nodes",
                format!("{node} is not below {NODES_MAX}"),
            ));
        }
        if self.balloon && self.memory_kind == MemoryKind::Huge {
            return Err(Error::invalid(
                "balloon",
                "huge memory is reserved for its machine; a balloon could give nothing back",
            ));
        }
        match (self.memory_kind, self.memory_fd) {
            (MemoryKind::Mergeable, Some(_)) => Err(Error::invalid(
                "memory_fd",
                "mergeable memory has no file; give shareable or huge as memory_kind",
            )),
            (MemoryKind::Shareable | MemoryKind::Huge, None) => Err(Error::invalid(
                "memory_fd",
                "shareable and huge memory need a file",
            )),
            _ => Ok(()),
        }
    }

    /// The UUID, in the order of its text.
    ///
    /// # Errors
    /// `InvalidArgument` when it is none.
    pub fn uuid_bytes(&self) -> Result<[u8; 16]> {
        uuid_bytes(&self.uuid)
    }

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

    fn fds(&self) -> Vec<(String, RawFd)> {
        let mut fds = vec![
            ("kvm_fd".to_owned(), self.kvm_fd),
            ("console_fd".to_owned(), self.console_fd),
        ];
        fds.extend(self.memory_fd.map(|fd| ("memory_fd".to_owned(), fd)));
        fds.extend(self.clone_fd.map(|fd| ("clone_fd".to_owned(), fd)));
        if let Some(kernel) = &self.kernel {
            fds.push(("kernel.fd".to_owned(), kernel.fd));
            let initrd = kernel.initrd_fd;
            fds.extend(initrd.map(|fd| ("kernel.initrd_fd".to_owned(), fd)));
        }
        if let Some(firmware) = &self.firmware {
            fds.push(("firmware.code_fd".to_owned(), firmware.code_fd));
            for (name, fd) in [
                ("firmware.variables_fd", firmware.variables_fd),
                ("firmware.nic_rom_fd", firmware.nic_rom_fd),
            ] {
                fds.extend(fd.map(|fd| (name.to_owned(), fd)));
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            fds.extend(disk.fds(&format!("disks[{index}].")));
        }
        for (index, port) in self.ports.iter().enumerate() {
            fds.push((format!("ports[{index}].fd"), port.fd));
        }
        for (index, nic) in self.nics.iter().enumerate() {
            fds.extend(nic.fds(&format!("nics[{index}].")));
        }
        fds
    }
}

impl Disk {
    /// Takes over every fd that the disk names, as [`Config::take_files`] does: for each layer, the image and its
    /// data file.
    ///
    /// # Errors
    /// As there.
    pub fn take_files(&self) -> Result<Vec<LayerFds>> {
        each_stands_once(self.fds(""))?;
        Ok(self.own_files())
    }

    fn own_files(&self) -> Vec<LayerFds> {
        let layers = self.layers.iter();
        layers
            .map(|layer| LayerFds {
                image: own(layer.fd),
                data: layer.data_fd.map(own),
                secret: layer.secret_fd.map(own),
            })
            .collect()
    }

    fn fds(&self, prefix: &str) -> Vec<(String, RawFd)> {
        let mut fds = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            fds.push((format!("{prefix}layers[{index}].fd"), layer.fd));
            let data = layer.data_fd;
            fds.extend(data.map(|fd| (format!("{prefix}layers[{index}].data_fd"), fd)));
            let secret = layer.secret_fd;
            fds.extend(secret.map(|fd| (format!("{prefix}layers[{index}].secret_fd"), fd)));
        }
        fds
    }
}

impl Nic {
    /// Takes over the queues of the tap, as [`Config::take_files`] does.
    ///
    /// # Errors
    /// As there.
    pub fn take_files(&self) -> Result<Vec<OwnedFd>> {
        each_stands_once(self.fds(""))?;
        Ok(self.own_files())
    }

    fn own_files(&self) -> Vec<OwnedFd> {
        self.tap_fds.iter().map(|fd| own(*fd)).collect()
    }

    fn fds(&self, prefix: &str) -> Vec<(String, RawFd)> {
        let named = |(index, fd): (usize, &RawFd)| (format!("{prefix}tap_fds[{index}]"), *fd);
        self.tap_fds.iter().enumerate().map(named).collect()
    }
}

fn each_stands_once(fds: Vec<(String, RawFd)>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (argument, fd) in fds {
        if fd < 0 || !seen.insert(fd) {
            let message = format!("fd {fd} is not an fd of its own");
            return Err(Error::invalid(argument, message));
        }
    }
    Ok(())
}

/// A UUID's bytes, in the order of its text.
///
/// # Errors
/// `InvalidArgument` when it is none.
pub fn uuid_bytes(text: &str) -> Result<[u8; 16]> {
    let wrong = || {
        let message = format!("{text:?} is no UUID: 32 hex digits as 8-4-4-4-12");
        Error::invalid("uuid", message)
    };
    let groups: Vec<&str> = text.split('-').collect();
    let digits = groups.concat();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    if lengths != [8, 4, 4, 4, 12] || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let number = u128::from_str_radix(&digits, 16).map_err(|_| wrong())?;
    Ok(number.to_be_bytes())
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the contract of `Machine::build` gives us the fds that the configuration names, and
    // `take_files` has checked that each stands there once, so nobody else closes it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        let mut all: serde_json::Value = serde_json::from_str(
            r#"{"machine_type": "vmbus-1", "uuid": "01234567-89ab-4cde-8f01-23456789abcd", "vcpus": 1, "memory": 16777216, "cpu_model": "host",
                "kvm_fd": 900, "console_fd": 901, "kernel": {"fd": 902}}"#,
        )
        .unwrap();
        let change: serde_json::Value = serde_json::from_str(json).unwrap();
        for (key, value) in change.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn the_defaults_are_a_machine() {
        config("{}").check().unwrap();
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        for (json, argument) in [
            (r#"{"vcpus": 0}"#, "vcpus"),
            (r#"{"vcpus": 17}"#, "vcpus"),
            (r#"{"memory": 0}"#, "memory"),
            (r#"{"memory": 16777217}"#, "memory"),
            (r#"{"memory": 4398046511104}"#, "memory"),
            (r#"{"machine_type": "vmbus-9"}"#, "machine_type"),
            (r#"{"memory_kind": "huge"}"#, "memory_fd"),
            (r#"{"memory_fd": 9}"#, "memory_fd"),
            (r#"{"clone_fd": 9}"#, "clone_fd"),
            (
                r#"{"clone_fd": 9, "restore": true, "memory_kind": "shareable", "memory_fd": 8}"#,
                "clone_fd",
            ),
            (
                r#"{"clone_fd": 9, "restore": true, "locked": true}"#,
                "clone_fd",
            ),
            (
                r#"{"memory_kind": "shareable", "memory_fd": 9, "merge": true}"#,
                "merge",
            ),
            (r#"{"locked": true, "balloon": true}"#, "balloon"),
            (r#"{"memory_nodes": [0, 1024]}"#, "memory_nodes"),
            (
                r#"{"memory_kind": "huge", "memory_fd": 9, "balloon": true}"#,
                "balloon",
            ),
            (
                r#"{"kernel": {"fd": 3, "cmdline": "a\u0000b"}}"#,
                "kernel.cmdline",
            ),
            (r#"{"kernel": null}"#, "kernel"),
            (r#"{"firmware": {"code_fd": 5}}"#, "kernel"),
            (
                r#"{"uuid": "01234567-89ab-4cde-8f0-123456789abcd"}"#,
                "uuid",
            ),
            (
                r#"{"uuid": "01234567-89ab-4cde-8f01-23456789abc+"}"#,
                "uuid",
            ),
        ] {
            assert_eq!(
                config(json).check().unwrap_err().argument,
                argument,
                "{json}"
            );
        }
    }

    #[test]
    fn the_uuid_is_as_it_is_written() {
        let config =
            config(r#"{"kernel": null, "firmware": {"code_fd": 5, "boot": ["disk/root"]}}"#);
        config.check().unwrap();
        assert_eq!(
            config.uuid_bytes().unwrap()[..5],
            [1, 0x23, 0x45, 0x67, 0x89]
        );
    }

    #[test]
    fn an_fd_that_stands_there_twice_is_refused() {
        let error = config(r#"{"kernel": {"fd": 902, "initrd_fd": 902}}"#).take_files();
        assert_eq!(error.err().unwrap().argument, "kernel.initrd_fd");
        let nic = r#"{"nics": [{"id": "net", "mac": "52:54:00:00:00:01", "tap_fds": [903, 900]}]}"#;
        let error = config(nic).take_files();
        assert_eq!(error.err().unwrap().argument, "nics[0].tap_fds[1]");
    }
}
