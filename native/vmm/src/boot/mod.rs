// SPDX-License-Identifier: Apache-2.0
//! Direct boot: a kernel, an initrd and a command line put into guest memory, as firmware would.
//!
//! A bzImage is entered at its 64-bit entry, an ELF with a PVH note at its 32-bit one. Everything is done again
//! from the files at each reset. What the boot code itself writes lies below 640 KiB:
//!
//! | address | what |
//! |---|---|
//! | 0x500 | descriptor table (64-bit entry) |
//! | 0x6000 | hvm_start_info, module list, memory map (PVH) |
//! | 0x7000 | boot_params, the "zero page" (Linux) |
//! | 0x9000–0xf000 | page tables that map 4 GiB (64-bit entry) |
//! | 0x20000 | command line |
//!
//! ACPI tables lie from 0xe0000. The initrd lies as high below the end of low RAM as the kernel allows.

mod bzimage;
mod file;
mod pvh;
#[cfg(test)]
mod tests;

pub use file::BootFile;

use vm_memory::{Bytes, GuestAddress};

use crate::cpu::entry::Entry;
use crate::error::{Error, Result};
use crate::memory;
use crate::memory::GuestMemoryMmap;

const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
const PAGE: u64 = 0x1000;

/// What is booted.
pub struct Boot {
    /// A bzImage or a PVH ELF.
    pub kernel: BootFile,
    /// An initrd.
    pub initrd: Option<BootFile>,
    /// Without its NUL.
    pub cmdline: String,
    /// The machine's memory in bytes.
    pub memory: u64,
    /// Where the RSDP lies.
    pub rsdp: u64,
}

/// A module in guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Loaded {
    address: u64,
    size: u64,
}

impl Boot {
    /// Loads everything; says where the first vCPU begins.
    ///
    /// # Errors
    /// `ImageInvalid` for a kernel that is none or is cut off, `InvalidArgument` for what does not fit into
    /// the memory, each with the file as its argument.
    pub fn load(&self, memory: &GuestMemoryMmap) -> Result<Entry> {
        let mut magic = [0; 4];
        self.kernel.read(&mut magic, 0)?;
        if magic == *b"\x7fELF" {
            pvh::load(self, memory)
        } else {
            bzimage::load(self, memory)
        }
    }

    /// The end of RAM below the 32-bit hole.
    fn low_end(&self) -> u64 {
        memory::split(self.memory).0
    }

    /// Puts the initrd as high as it may lie: its last byte at most `last`, all of it above `kernel_end`.
    fn load_initrd(&self, memory: &GuestMemoryMmap, kernel_end: u64, last: u64) -> Result<Loaded> {
        let Some(initrd) = &self.initrd else {
            return Ok(Loaded::default());
        };
        let size = initrd.size()?;
        let end = self.low_end().min(last.saturating_add(1));
        let address = end
            .checked_sub(size)
            .map(|address| address & !(PAGE - 1))
            .filter(|address| *address >= kernel_end)
            .ok_or_else(|| {
                Error::invalid(
                    "initrd",
                    format!(
                        "{size} bytes do not fit between the kernel's end at {kernel_end:#x} and {end:#x}; give the machine more memory"
                    ),
                )
            })?;
        initrd.load(memory, GuestAddress(address), 0, size)?;
        Ok(Loaded { address, size })
    }

    fn write_cmdline(&self, memory: &GuestMemoryMmap) -> Result<()> {
        let mut line = self.cmdline.clone().into_bytes();
        line.push(0);
        write(memory, CMDLINE, &line)
    }
}

pub(crate) fn write(memory: &GuestMemoryMmap, address: u64, data: &[u8]) -> Result<()> {
    memory
        .write_slice(data, GuestAddress(address))
        .map_err(|e| Error::internal(format!("boot structures at {address:#x}: {e}")))
}
