// SPDX-License-Identifier: Apache-2.0
//! KVM's memory slots: which piece of host memory the guest finds at which address.
//!
//! | slot | what |
//! |---|---|
//! | 0, 1, 2 | RAM below the shadow area, above it, above 4 GiB |
//! | 3 – 15 | the thirteen segments of the shadow area, 0xc0000 to 0xfffff ([`crate::firmware::shadow`]) |
//! | 16 | the firmware's code |
//! | 17 | its variables |
//! | 32 – 287 | the option ROM of the function on bus 0 with devfn slot − 32 |
//! | 288 – 295 | the option ROM of what is in hotplug slot slot − 287 |
//!
//! KVM changes neither the memory nor the writability of a slot that exists, so a change takes the slot away
//! and adds it again. A vCPU that meets the gap makes an MMIO exit: a read finds ones, a write is lost. Only the
//! guest's own writes to PAM, to the flash or to a ROM BAR cause such changes, so only it can harm itself.
//!
//! While a migration runs, KVM logs what vCPUs write to slots that show RAM, and [`Slots::harvest`] brings that to the
//! marks of the memory. The log of a slot goes with the slot: all that it showed is then marked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::error::{Error, Result};
use crate::memory::GuestMemoryMmap;
use crate::memory::PAGE;

/// RAM from 0 to the shadow area.
pub const RAM_BASE: u32 = 0;
/// RAM from 1 MiB to the 32-bit hole.
pub const RAM_LOW: u32 = 1;
/// RAM from 4 GiB.
pub const RAM_HIGH: u32 = 2;
/// The first segment of the shadow area.
pub const SHADOW: u32 = 3;
/// The firmware's code.
pub const FIRMWARE: u32 = 16;
/// The firmware's variables.
pub const VARIABLES: u32 = 17;
/// The option ROM of function 0 of device 0; others follow by devfn.
pub const OPTION_ROMS: u32 = 32;

/// Host memory that a slot shows.
#[derive(Clone)]
pub enum Source {
    /// The guest's RAM at this guest address, whatever address the slot has.
    Ram(Arc<GuestMemoryMmap>, u64),
    /// A mapping of ours, from this offset on.
    Mapping(Arc<MmapRegion>, u64),
}

impl Source {
    /// The host address, if `size` bytes are there.
    fn host(&self, size: u64) -> Option<u64> {
        match self {
            Source::Ram(memory, address) => {
                let len = usize::try_from(size).ok()?;
                let slice = memory.get_slice(GuestAddress(*address), len).ok()?;
                Some(slice.ptr_guard().as_ptr() as u64)
            }
            Source::Mapping(mapping, offset) => {
                let end = offset.checked_add(size)?;
                (end <= mapping.size() as u64)
                    .then(|| (mapping.as_ptr() as u64).checked_add(*offset))?
            }
        }
    }
}

/// What a slot shows, and where.
#[derive(Clone)]
pub struct View {
    /// The first guest-physical address, a multiple of 4 KiB.
    pub base: u64,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
    /// From where.
    pub source: Source,
    /// Whether the guest's writes exit instead.
    pub read_only: bool,
}

impl View {
    /// Whether a vCPU's writes to it are writes to RAM.
    fn is_logged(&self) -> bool {
        matches!(self.source, Source::Ram(..)) && !self.read_only
    }

    /// Marks RAM behind `len` bytes from `offset` on.
    fn mark(&self, offset: u64, len: u64) -> Result<()> {
        let Source::Ram(memory, address) = &self.source else {
            return Ok(());
        };
        let address = GuestAddress(address.saturating_add(offset));
        let slice = memory.get_slice(address, len as usize);
        let slice = slice.map_err(|e| Error::internal(format!("a slot's memory: {e}")))?;
        slice.bitmap().mark_dirty(0, slice.len());
        Ok(())
    }
}

/// What KVM knows of a slot: base, size, host address, read-only.
type Placed = (u64, u64, u64, bool);

/// The slots of one VM.
pub struct Slots {
    vm: Arc<VmFd>,
    present: Mutex<Present>,
}

#[derive(Default)]
struct Present {
    slots: BTreeMap<u32, (Placed, View)>,
    /// Writes to RAM are logged.
    logs: bool,
}

impl Slots {
    /// None is in use yet.
    pub fn new(vm: Arc<VmFd>) -> Slots {
        Slots {
            vm,
            present: Mutex::default(),
        }
    }

    /// Makes `slot` show `view`, or nothing; free if it does already.
    ///
    /// # Errors
    /// `Internal` for a view of memory that is not there; `Unavailable` when KVM refuses: the slot then shows nothing.
    pub fn set(&self, slot: u32, view: Option<View>) -> Result<()> {
        let wanted = match view {
            Some(view) => {
                let host = view.source.host(view.size).ok_or_else(|| {
                    Error::internal(format!("slot {slot} shows memory that is not there"))
                })?;
                Some(((view.base, view.size, host, view.read_only), view))
            }
            None => None,
        };
        let mut present = self.lock();
        let before = present.slots.get(&slot).map(|(placed, _)| *placed);
        if before == wanted.as_ref().map(|(placed, _)| *placed) {
            return Ok(());
        }
        if let Some((base, _, host, _)) = before {
            self.ask(slot, (base, 0, host, false), false)?;
            let gone = present.slots.remove(&slot);
            if let Some((_, view)) = gone.filter(|(_, view)| present.logs && view.is_logged()) {
                view.mark(0, view.size)?;
            }
        }
        if let Some((placed, view)) = wanted {
            self.ask(slot, placed, present.logs && view.is_logged())?;
            present.slots.insert(slot, (placed, view));
        }
        Ok(())
    }

    /// From now on the vCPUs' writes to RAM are logged, or no longer.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses: some slots may be logged then.
    pub fn log(&self, on: bool) -> Result<()> {
        let mut present = self.lock();
        present.logs = on;
        let logged = present.slots.iter().filter(|(_, (_, v))| v.is_logged());
        logged
            .map(|(slot, (placed, _))| self.ask(*slot, *placed, on))
            .fold(Ok(()), Result::and)
    }

    /// Marks the pages of RAM that vCPUs have written to since the last time, or since logging began.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses.
    pub fn harvest(&self) -> Result<()> {
        let present = self.lock();
        for (slot, (_, view)) in present.slots.iter().filter(|(_, (_, v))| v.is_logged()) {
            let log = self.vm.get_dirty_log(*slot, view.size as usize);
            let log = log.map_err(|e| Error::kernel("KVM_GET_DIRTY_LOG", e))?;
            for (word, number) in log.into_iter().zip(0u64..) {
                let mut left = word;
                while left != 0 {
                    let first = left.trailing_zeros();
                    let count = (left >> first).trailing_ones();
                    let page = number.saturating_mul(64).saturating_add(u64::from(first));
                    let len = u64::from(count).saturating_mul(PAGE);
                    view.mark(page.saturating_mul(PAGE), len)?;
                    left &= u64::MAX
                        .checked_shl(first.saturating_add(count))
                        .unwrap_or(0);
                }
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn ask(&self, slot: u32, (base, size, host, read_only): Placed, log: bool) -> Result<()> {
        let mut flags = if read_only { KVM_MEM_READONLY } else { 0 };
        if log {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: base,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the host memory lives as long as the slot shows it: `present` holds its owner until the slot
        // is taken away, or for ever, and the VM goes with the last holder of `vm`, after or with this.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|e| Error::kernel("KVM_SET_USER_MEMORY_REGION", e))
    }
}
