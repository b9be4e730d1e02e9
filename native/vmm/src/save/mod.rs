// SPDX-License-Identifier: Apache-2.0
//! A machine as a file: what it is made of, how it is written and what is checked before it goes on.
//!
//! # The file, format version 1
//!
//! All numbers are little-endian. Sections begin at multiples of 4 KiB, in the order of the header's list; what lies between
//! two of them is zeros.
//!
//! | section | what |
//! |---|---|
//! | header | 4 KiB: magic, version, checksum, use mark, length of the file, the list of sections ([`file`]) |
//! | facts | JSON: what a machine must be to go on from here ([`facts`]) |
//! | state | JSON: what its parts remember ([`crate::state`], [`States`]) |
//! | code, variables, rom | the firmware's code, its variables, the option ROM of network interfaces, where there are some |
//! | index | for each MiB of RAM: which of its pages are not zeros, and a checksum over those ([`pages`]) |
//! | memory | RAM, each page at its place; pages of zeros are holes of the file and are never written |
//!
//! A page's place in the file is its place in RAM, so a whole file can be mapped, and writing needs no order: threads write
//! where they are. What a hole costs is nothing, and the bytes written are the bytes that the guest has touched.
//!
//! # Guarantees
//!
//! - The header is written last, after everything else is durable: a file that is cut off in the making has none, and is no file of
//!   this kind.
//! - Every byte of the file is under a CRC-32C (which finds any one flipped bit, and any burst of up to 32), or is checked to be zero;
//!   the length stands in the header. What does not fit is refused before the machine runs an instruction, and the machine
//!   that was to be restored is ended. A checksum is no signature: a file from somebody else is as good as its parser, which
//!   runs in the sealed worker only, and restores nothing that a guest could not have done to its machine by itself.
//! - A save that fails, or is cancelled, leaves the machine as it was and the file empty.
//! - Disks are durable and inactive while the file is written, so that what the file says of them holds.
//! - The use mark says whether a machine has gone on from this file already. The second one that does is another machine with the
//!   same past: its generation ID is new.
//!
//! # The clock
//!
//! kvm-clock, time stamp counters and the ACPI timer go on as if they had run all the time: by the host's time between
//! save and restore, or by none if that went backwards. The real-time clock is the host's anyway.
//!
//! # The order of a restore
//!
//! Facts, index and memory; then vCPUs, interrupt controllers, PIT and kvm-clock; then devices, whose interrupt lines are driven
//! as their state says. Devices are paused meanwhile, and begin where they were when the machine goes on.
//!
//! Left out: compression and encryption (a file system has both), and saving to what cannot seek: migration has a format of its own.

pub mod checksum;
pub mod facts;
pub mod file;
pub mod mapped;
pub mod pages;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpu::state::VcpuState;
use crate::platform::PlatformState;
use crate::state::State;

/// The format that this crate writes; it reads all up to it.
pub const FORMAT: u32 = 1;

/// What the parts of a machine remember.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct States {
    /// By their number.
    pub vcpus: Vec<VcpuState>,
    /// The board.
    pub platform: PlatformState,
    /// Devices that have state besides what [`crate::pci::root::Root`] knows, by their id; the bus itself is `pci`.
    pub devices: BTreeMap<String, State>,
}
