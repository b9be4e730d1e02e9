// SPDX-License-Identifier: Apache-2.0
//! What can be told of a configuration from its numbers alone: limits, and what does not go together. It touches no fd;
//! what takes a look at a file, or at the host, is checked by who builds the part.

use super::machine::{Config, MemoryKind};
use crate::error::{Error, Kind, Result};
use crate::layout;
use crate::virtio::vsock::{CID_LEAST, CID_MOST};

/// A machine type. What it shows a guest is frozen (tests/abi/TYPE.json): a change needs a type of its own beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MachineType {
    /// `vmbus-1`.
    One,
    /// `vmbus-2`: the LPC bridge says that it decodes, without which OVMF uses no serial port.
    Two,
}

impl MachineType {
    /// Those that this crate builds, oldest first.
    pub const ALL: [(&'static str, MachineType); 2] =
        [("vmbus-1", MachineType::One), ("vmbus-2", MachineType::Two)];

    /// The one that is called `name`.
    ///
    /// # Errors
    /// `NotSupported` when there is none.
    pub fn named(name: &str) -> Result<MachineType> {
        let known = MachineType::ALL;
        if let Some((_, found)) = known.iter().find(|(each, _)| *each == name) {
            return Ok(*found);
        }
        let message = format!(
            "{name:?} is not known; {} are",
            known.map(|(each, _)| each).join(" and ")
        );
        Err(Error::new(Kind::NotSupported, "machine_type", message))
    }
}

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

impl Config {
    /// Checks what can be told from the numbers alone.
    ///
    /// # Errors
    /// `InvalidArgument` or `NotSupported`, with the field.
    pub fn check(&self) -> Result<()> {
        MachineType::named(&self.machine_type)?;
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
