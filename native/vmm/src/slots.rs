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

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::error::{Error, Result};

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

/// What KVM knows of a slot: base, size, host address, read-only.
type Placed = (u64, u64, u64, bool);

/// The slots of one VM.
pub struct Slots {
    vm: Arc<VmFd>,
    present: Mutex<BTreeMap<u32, (Placed, View)>>,
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
        let mut present = self.present.lock().unwrap_or_else(|e| e.into_inner());
        let before = present.get(&slot).map(|(placed, _)| *placed);
        if before == wanted.as_ref().map(|(placed, _)| *placed) {
            return Ok(());
        }
        if let Some((base, _, host, _)) = before {
            self.ask(slot, (base, 0, host, false))?;
            present.remove(&slot);
        }
        if let Some((placed, view)) = wanted {
            self.ask(slot, placed)?;
            present.insert(slot, (placed, view));
        }
        Ok(())
    }

    fn ask(&self, slot: u32, (base, size, host, read_only): Placed) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
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
