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

/// What a range of the guest's address space is to the guest (e820 types).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapKind {
    /// Free for the guest.
    Ram,
    /// Taken.
    Reserved,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: MapKind,
}

/// The memory map that firmware would hand over.
///
/// ECAM stands there because Linux uses it only where the map or the DSDT reserves it.
pub fn map(memory: u64) -> Vec<MapEntry> {
    let (low, high) = split(memory);
    let entry = |kind, base: u64, end: u64| MapEntry {
        base,
        size: end.saturating_sub(base),
        kind,
    };
    let mut entries = vec![
        entry(MapKind::Ram, 0, layout::CONVENTIONAL_END),
        entry(
            MapKind::Reserved,
            layout::CONVENTIONAL_END,
            layout::EXTENDED_START,
        ),
        entry(MapKind::Ram, layout::EXTENDED_START, low),
        entry(
            MapKind::Reserved,
            layout::ECAM_START,
            layout::ECAM_START.saturating_add(layout::ECAM_SIZE),
        ),
    ];
    if high > 0 {
        entries.push(entry(
            MapKind::Ram,
            layout::HIGH_RAM_START,
            layout::HIGH_RAM_START.saturating_add(high),
        ));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_two_gib_lies_above_the_hole() {
        assert_eq!(split(1 << 30), (1 << 30, 0));
        assert_eq!(split(3 << 30), (2 << 30, 1 << 30));
        let map = map(3 << 30);
        let last = map.last().unwrap();
        assert_eq!((last.base, last.size), (1 << 32, 1 << 30));
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile(1 << 20);
        let error = create(&Plan::of(MemoryKind::Shareable, 4 << 20), Some(file)).unwrap_err();
        assert_eq!(error.argument, "memory_fd");
    }

    #[test]
    fn shareable_memory_is_the_file() {
        use std::os::unix::fs::FileExt;
        use vm_memory::Bytes;
        let file = tempfile(4 << 20);
        let other = File::from(file.try_clone().unwrap());
        let memory = create(&Plan::of(MemoryKind::Shareable, 4 << 20), Some(file)).unwrap();
        memory
            .write_obj(0x1234_u16, GuestAddress(0x20_0000))
            .unwrap();
        let mut seen = [0; 2];
        other.read_exact_at(&mut seen, 0x20_0000).unwrap();
        assert_eq!(seen, [0x34, 0x12]);
    }

    #[test]
    fn what_is_discarded_reads_zero_and_is_the_hosts_again() {
        use vm_memory::Bytes;
        for (kind, file) in [
            (MemoryKind::Mergeable, None),
            (MemoryKind::Shareable, Some(tempfile(4 << 20))),
        ] {
            let memory = create(&Plan::of(kind, 4 << 20), file).unwrap();
            let fill = |from: u64| {
                memory
                    .write_slice(&[7; 0x4000], GuestAddress(from))
                    .unwrap()
            };
            fill(0x1000);
            // Parts of a page stay, and so does what lies beyond the end.
            assert_eq!(
                discard(&memory, 0x1800, 0x2000).unwrap(),
                0x1000,
                "{kind:?}"
            );
            let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
            assert_eq!(
                [byte(0x1fff), byte(0x2000), byte(0x2fff), byte(0x3000)],
                [7, 0, 0, 7]
            );
            fill((4 << 20) - 0x4000);
            assert_eq!(
                discard(&memory, (4 << 20) - 0x1000, u64::MAX).unwrap(),
                0x1000
            );
            assert_eq!(discard(&memory, u64::MAX - 0x2000, 0x1000).unwrap(), 0);
            assert_eq!(discard(&memory, 4 << 20, 0x1000).unwrap(), 0);
            assert_eq!(byte((4 << 20) - 1), 0);
        }
    }

    /// The flags of the mapping at an address, as /proc/self/smaps has them.
    fn flags(address: u64) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            if let Some((range, _)) = line.split_once(' ').filter(|(r, _)| r.contains('-')) {
                let (start, end) = range.split_once('-').unwrap();
                let number = |text| u64::from_str_radix(text, 16).unwrap();
                inside = (number(start)..number(end)).contains(&address);
            } else if let Some(flags) = line.strip_prefix("VmFlags: ").filter(|_| inside) {
                return flags.split(' ').map(str::to_owned).collect();
            }
        }
        panic!("no mapping at {address:#x}");
    }

    fn flags_of(plan: &Plan, file: Option<OwnedFd>) -> Vec<String> {
        let memory = create(plan, file).unwrap();
        flags(memory.get_host_address(GuestAddress(0)).unwrap() as u64)
    }

    #[test]
    fn only_what_is_to_be_merged_is_offered_to_ksm_and_none_goes_to_children_or_dumps() {
        let ksm = std::path::Path::new("/sys/kernel/mm/ksm").exists();
        for (kind, merge, mergeable) in [
            (MemoryKind::Mergeable, true, ksm),
            (MemoryKind::Mergeable, false, false),
            (MemoryKind::Shareable, false, false),
        ] {
            let file = (kind == MemoryKind::Shareable).then(|| tempfile(4 << 20));
            let merge = Plan {
                merge,
                ..Plan::of(kind, 4 << 20)
            };
            let flags = flags_of(&merge, file);
            let has = |flag: &str| flags.iter().any(|f| f == flag);
            assert_eq!(has("mg"), mergeable, "{kind:?}: {flags:?}");
            assert!(has("dc") && has("dd"), "{kind:?}: {flags:?}");
        }
        let merged_process = std::fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
        assert!(
            !merged_process.contains("ksm_merge_any: yes"),
            "never the whole process"
        );
    }

    #[test]
    fn shareable_memory_asks_for_huge_pages() {
        let thp =
            std::path::Path::new("/sys/kernel/mm/transparent_hugepage/shmem_enabled").exists();
        let plan = Plan::of(MemoryKind::Shareable, 4 << 20);
        let flags = flags_of(&plan, Some(tempfile(4 << 20)));
        assert_eq!(flags.iter().any(|flag| flag == "hg"), thp, "{flags:?}");
    }

    #[test]
    fn locked_memory_stays_and_beyond_the_limit_it_is_refused() {
        let plan = Plan {
            locked: true,
            ..Plan::of(MemoryKind::Mergeable, 4 << 20)
        };
        let flags = flags_of(&plan, None);
        assert!(flags.iter().any(|flag| flag == "lo"), "{flags:?}");
    }

    #[test]
    fn memory_is_bound_to_nodes_that_there_are() {
        let plan = |nodes| Plan {
            nodes,
            ..Plan::of(MemoryKind::Mergeable, 4 << 20)
        };
        let memory = create(&plan(vec![0]), None).unwrap();
        let address = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
        if let Some(line) = maps
            .lines()
            .find(|line| line.starts_with(&format!("{address:x} ")))
        {
            assert!(line.contains("bind:0"), "{line}");
        }
        let error = create(&plan(vec![1023]), None).unwrap_err();
        assert_eq!(error.argument, "memory_nodes");
    }

    fn tempfile(len: u64) -> OwnedFd {
        use std::os::fd::FromRawFd;
        // SAFETY: a fresh memfd, owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
        file.set_len(len).unwrap();
        file.into()
    }
}
