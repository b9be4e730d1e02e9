// SPDX-License-Identifier: Apache-2.0
//! The guest's RAM: made, registered with KVM, and described to the guest.
//!
//! One of three kinds (see [`MemoryKind`]). Only this memory is offered to KSM, never the worker's own; it is
//! left out of core dumps and of children.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap as _;
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};

use crate::config::{MemoryKind, NODES_MAX};
use crate::crew::{Chunk, Work as _};
use crate::error::{Error, Kind, Result};
use crate::layout;
use crate::migrate::marks::Marks;
use crate::prefault::Touch;
use crate::slots::{self, Slots, Source, View};

mod map;

pub use map::{map, MapEntry, MapKind};

/// The guest's RAM, with marks for a migration.
pub type GuestMemoryMmap = vm_memory::GuestMemoryMmap<Marks>;

/// How much of `memory` lies below the 32-bit hole, and how much above.
pub fn split(memory: u64) -> (u64, u64) {
    let low = memory.min(layout::LOW_RAM_MAX);
    (low, memory.saturating_sub(low))
}

/// How the guest's RAM is made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where its pages come from.
    pub kind: MemoryKind,
    /// Bytes.
    pub memory: u64,
    /// Offered to KSM.
    pub merge: bool,
    /// Pages stay once they are there.
    pub locked: bool,
    /// NUMA nodes that pages come from; empty for any.
    pub nodes: Vec<u16>,
}

impl Plan {
    /// Memory of a kind, neither offered to KSM nor locked nor bound.
    pub fn of(kind: MemoryKind, memory: u64) -> Plan {
        Plan {
            kind,
            memory,
            merge: false,
            locked: false,
            nodes: Vec::new(),
        }
    }
}

/// Makes the guest's RAM.
///
/// # Errors
/// `InvalidArgument` for a file that is too short, or nodes that the host lacks; `AccessDenied` when it may not be
/// locked; `Unavailable` when there is no memory.
pub fn create(plan: &Plan, file: Option<OwnedFd>) -> Result<GuestMemoryMmap> {
    let memory = plan.memory;
    let file = file.map(File::from);
    if let Some(file) = &file {
        let len = file
            .metadata()
            .map_err(|e| Error::invalid("memory_fd", format!("fstat: {e}")))?
            .len();
        // A shorter file would be a SIGBUS at the guest's first touch.
        if len < memory {
            return Err(Error::invalid(
                "memory_fd",
                format!("the file has {len} bytes; the machine needs {memory}"),
            ));
        }
    }
    let (low, high) = split(memory);
    let mut regions = vec![region(plan, &file, 0, low, 0)?];
    if high > 0 {
        regions.push(region(plan, &file, low, high, layout::HIGH_RAM_START)?);
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|e| Error::internal(format!("the memory map: {e}")))
}

fn region(
    plan: &Plan,
    file: &Option<File>,
    offset: u64,
    size: u64,
    address: u64,
) -> Result<GuestRegionMmap<Marks>> {
    let size = usize::try_from(size).map_err(|_| Error::invalid("memory", "too much"))?;
    let (source, flags) = match file {
        Some(file) => {
            let file = file
                .try_clone()
                .map_err(|e| Error::kernel("dup of memory_fd", e))?;
            (Some(FileOffset::new(file, offset)), libc::MAP_SHARED)
        }
        // What the guest never touches costs nothing.
        None => (
            None,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        ),
    };
    let mapping = MmapRegion::build(source, size, libc::PROT_READ | libc::PROT_WRITE, flags)
        .map_err(|e| Error::kernel("mmap of the guest's memory", e))?;
    advise(mapping.as_ptr(), size, libc::MADV_DONTFORK)?;
    advise(mapping.as_ptr(), size, libc::MADV_DONTDUMP)?;
    // What a kernel without KSM, or without huge pages in shmem, refuses (EINVAL) the machine only misses.
    match plan.kind {
        MemoryKind::Mergeable if plan.merge => {
            let _ = advise(mapping.as_ptr(), size, libc::MADV_MERGEABLE);
        }
        MemoryKind::Shareable => {
            let _ = advise(mapping.as_ptr(), size, libc::MADV_HUGEPAGE);
        }
        MemoryKind::Mergeable | MemoryKind::Huge => {}
    }
    if !plan.nodes.is_empty() {
        bind(&mapping, &plan.nodes)?;
    }
    if plan.locked {
        lock(&mapping)?;
    }
    if matches!(plan.kind, MemoryKind::Huge) && !plan.nodes.is_empty() {
        take(&mapping, &plan.nodes)?;
    }
    GuestRegionMmap::new(mapping, GuestAddress(address))
        .ok_or_else(|| Error::internal("a memory region wraps around"))
}

/// What holds of all mergeable memory, for a mapping of a guest's RAM that replaces another.
///
/// # Errors
/// `Unavailable` when the kernel refuses.
pub fn advise_private(address: *mut u8, size: usize, merge: bool) -> Result<()> {
    advise(address, size, libc::MADV_DONTFORK)?;
    advise(address, size, libc::MADV_DONTDUMP)?;
    if merge {
        // A kernel without KSM refuses.
        let _ = advise(address, size, libc::MADV_MERGEABLE);
    }
    Ok(())
}

fn advise(address: *mut u8, size: usize, advice: libc::c_int) -> Result<()> {
    // SAFETY: the range is exactly one mapping of ours, and none of the advices used here changes
    // its contents.
    let result = unsafe { libc::madvise(address.cast(), size, advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::kernel("madvise", std::io::Error::last_os_error()))
    }
}

/// From now on its pages come from these NUMA nodes only (mbind(2)). Before anything is touched.
fn bind(mapping: &MmapRegion<Marks>, nodes: &[u16]) -> Result<()> {
    let mut mask = [0u64; NODES_MAX as usize / 64];
    for node in nodes {
        if let Some(word) = mask.get_mut(usize::from(*node) / 64) {
            *word |= 1 << (node % 64);
        }
    }
    // SAFETY: the range is one mapping of ours; the mask has as many bits as are said, and one more, as the kernel
    // wants it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            mapping.as_ptr(),
            mapping.size(),
            libc::MPOL_BIND,
            mask.as_ptr(),
            u64::from(NODES_MAX) + 1,
            0,
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL) => Err(Error::invalid(
            "memory_nodes",
            format!("the host has no memory on any of the nodes {nodes:?}"),
        )),
        _ => Err(Error::kernel("mbind of the guest's memory", error)),
    }
}

/// Huge pages are reserved on the host, not on a node: the first touch of one that its nodes have not would be a
/// SIGBUS. So they are taken here, or not at all.
fn take(mapping: &MmapRegion<Marks>, nodes: &[u16]) -> Result<()> {
    let whole = Chunk {
        address: mapping.as_ptr() as usize,
        len: mapping.size() as u64,
        offset: 0,
    };
    Touch.chunk(whole).map_err(|_| {
        let message = format!("the NUMA nodes {nodes:?} have too few free huge pages");
        Error::new(Kind::Unavailable, "memory_nodes", message)
    })
}

/// Its pages stay in RAM once they are there (mlock2(2), MLOCK_ONFAULT).
fn lock(mapping: &MmapRegion<Marks>) -> Result<()> {
    // SAFETY: the range is one mapping of ours, and its contents do not change.
    let result = unsafe {
        libc::mlock2(
            mapping.as_ptr().cast(),
            mapping.size(),
            libc::MLOCK_ONFAULT as _,
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EPERM | libc::ENOMEM) => Err(Error::new(
            Kind::AccessDenied,
            "locked",
            "RLIMIT_MEMLOCK allows less than the machine's memory to be locked",
        )),
        _ => Err(Error::kernel("mlock2 of the guest's memory", error)),
    }
}

/// Where byte `offset` of RAM is, counted without the hole below 4 GiB: its region, and the byte of that.
pub fn locate(memory: &GuestMemoryMmap, offset: u64) -> Option<(&GuestRegionMmap<Marks>, u64)> {
    let mut within = offset;
    for region in memory.iter() {
        match within.checked_sub(region.len()) {
            Some(behind) => within = behind,
            None => return Some((region, within)),
        }
    }
    None
}

/// Bytes of a page of the host, and the least that a guest can give back.
pub const PAGE: u64 = 4096;

/// Gives the host back what lies in whole pages between `start` and `start + len`; the guest finds zeros there.
/// What is not RAM is left out. Returns how many bytes that were.
///
/// # Errors
/// The kernel's: the memory is locked, or its file does not allow it.
pub fn discard(memory: &GuestMemoryMmap, start: u64, len: u64) -> std::io::Result<u64> {
    let end = start.saturating_add(len);
    let mut discarded: u64 = 0;
    for region in memory.iter() {
        let first = region.start_addr().raw_value();
        let Some(from) = start.max(first).checked_next_multiple_of(PAGE) else {
            continue;
        };
        let to = end.min(first.saturating_add(region.len())) & !(PAGE - 1);
        let Some(bytes) = to.checked_sub(from).filter(|bytes| *bytes > 0) else {
            continue;
        };
        // Private memory is simply dropped; of a file, dropping the mapping would leave the pages in it.
        let advice = match region.file_offset() {
            Some(_) => libc::MADV_REMOVE,
            None => libc::MADV_DONTNEED,
        };
        let place = region
            .as_ptr()
            .wrapping_add(from.wrapping_sub(first) as usize);
        // SAFETY: the range lies in a mapping of ours that holds guest memory and nothing else, which is only ever
        // read and written as memory that changes by itself.
        if unsafe { libc::madvise(place.cast(), bytes as usize, advice) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let within = from.wrapping_sub(first) as usize;
        region.bitmap().mark_dirty(within, bytes as usize);
        discarded = discarded.saturating_add(bytes);
    }
    Ok(discarded)
}

/// Shows the guest its RAM, but for the shadow area, which is [`crate::firmware::shadow`]'s.
///
/// # Errors
/// `Unavailable` when KVM refuses.
pub fn register(slots: &Slots, memory: &Arc<GuestMemoryMmap>, bytes: u64) -> Result<()> {
    let (low, high) = split(bytes);
    for (slot, base, end) in [
        (slots::RAM_BASE, 0, layout::SHADOW_START),
        (slots::RAM_LOW, layout::EXTENDED_START, low),
        (
            slots::RAM_HIGH,
            layout::HIGH_RAM_START,
            layout::HIGH_RAM_START.saturating_add(high),
        ),
    ] {
        let view = (end > base).then(|| View {
            base,
            size: end.saturating_sub(base),
            source: Source::Ram(memory.clone(), base),
            read_only: false,
        });
        slots.set(slot, view)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
