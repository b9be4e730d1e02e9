// SPDX-License-Identifier: Apache-2.0
//! An ELF kernel with a PVH entry (Xen's HVM direct boot ABI).
//!
//! Source: ELF-64 Object File Format; xen/include/public/elfnote.h and arch-x86/hvm/start_info.h.
//! The file is hostile: every number is checked against the file, the RAM and the others before it is used.

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info, XEN_HVM_MEMMAP_TYPE_RAM,
    XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
};
use vm_memory::{Bytes, GuestAddress};

use super::{write, Boot, Loaded, CMDLINE, START_INFO};
use crate::cpu::entry::Entry;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::GuestMemoryMmap;
use crate::memory::{self, MapKind};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PROGRAM_HEADERS_MAX: u16 = 64;
/// All notes together; a vmlinux has less than 1 KiB of them.
const NOTES_MAX: u64 = 64 << 10;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

const MODULES: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;

/// One program header.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

pub(super) fn load(boot: &Boot, memory: &GuestMemoryMmap) -> Result<Entry> {
    let segments = segments(boot)?;
    let eip = entry(boot, &segments)?;
    let end = load_segments(boot, memory, &segments)?;
    if !segments.iter().any(|s| s.kind == PT_LOAD && holds(s, eip)) {
        return Err(boot.kernel.invalid(format!(
            "the PVH entry {eip:#x} lies in none of its segments"
        )));
    }
    let initrd = boot.load_initrd(memory, end, u64::from(u32::MAX))?;
    boot.write_cmdline(memory)?;
    write_start_info(boot, memory, initrd)?;
    Ok(Entry::Pvh {
        eip,
        start_info: START_INFO as u32,
    })
}

fn segments(boot: &Boot) -> Result<Vec<Segment>> {
    let mut header = [0; HEADER];
    boot.kernel.read(&mut header, 0)?;
    let u16_at = |at| field::<2>(&header, at).map(u16::from_le_bytes);
    let u64_at = |at| field::<8>(&header, at).map(u64::from_le_bytes);
    // EI_CLASS 2: 64 bits; EI_DATA 1: little-endian.
    if field::<2>(&header, 4) != Some([2, 1]) || u16_at(18) != Some(MACHINE_X86_64) {
        return Err(boot.kernel.invalid("an ELF file, but not for 64-bit x86"));
    }
    let (Some(table), Some(size), Some(count)) = (u64_at(32), u16_at(54), u16_at(56)) else {
        return Err(Error::internal("the ELF header's fields"));
    };
    if usize::from(size) != PROGRAM_HEADER || !(1..=PROGRAM_HEADERS_MAX).contains(&count) {
        return Err(boot.kernel.invalid(format!(
            "{count} program headers of {size} bytes; 1 to {PROGRAM_HEADERS_MAX} of {PROGRAM_HEADER} can be loaded"
        )));
    }
    (0..u64::from(count))
        .map(|index| {
            let mut bytes = [0; PROGRAM_HEADER];
            let at = table
                .checked_add(index.saturating_mul(PROGRAM_HEADER as u64))
                .ok_or_else(|| boot.kernel.invalid("its program headers lie nowhere"))?;
            boot.kernel.read(&mut bytes, at)?;
            let u64_at = |at| field::<8>(&bytes, at).map_or(0, u64::from_le_bytes);
            Ok(Segment {
                kind: field::<4>(&bytes, 0).map_or(0, u32::from_le_bytes),
                offset: u64_at(8),
                address: u64_at(24),
                file_size: u64_at(32),
                memory_size: u64_at(40),
            })
        })
        .collect()
}

/// Loads what is to be loaded; says where the highest of it ends.
fn load_segments(boot: &Boot, memory: &GuestMemoryMmap, segments: &[Segment]) -> Result<u64> {
    let mut kernel_end = 0;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD) {
        let end = segment.address.checked_add(segment.memory_size);
        let Some(end) = end.filter(|_| segment.file_size <= segment.memory_size) else {
            return Err(boot
                .kernel
                .invalid("a segment is larger than its place in memory"));
        };
        if segment.address < layout::EXTENDED_START || end > boot.low_end() {
            return Err(boot.kernel.invalid(format!(
                "a segment wants {:#x} to {end:#x}; RAM for it is {:#x} to {:#x}",
                segment.address,
                layout::EXTENDED_START,
                boot.low_end()
            )));
        }
        boot.kernel.load(
            memory,
            GuestAddress(segment.address),
            segment.offset,
            segment.file_size,
        )?;
        // At a reset, this memory is not fresh.
        zero(
            memory,
            segment.address.saturating_add(segment.file_size),
            end,
        )?;
        kernel_end = end.max(kernel_end);
    }
    Ok(kernel_end)
}

fn holds(segment: &Segment, address: u32) -> bool {
    u64::from(address)
        .checked_sub(segment.address)
        .is_some_and(|offset| offset < segment.file_size)
}

/// The PVH entry, from the notes.
fn entry(boot: &Boot, segments: &[Segment]) -> Result<u32> {
    for segment in segments.iter().filter(|s| s.kind == PT_NOTE) {
        if segment.file_size > NOTES_MAX {
            return Err(boot.kernel.invalid("more than 64 KiB of notes"));
        }
        let mut notes = vec![0; segment.file_size as usize];
        boot.kernel.read(&mut notes, segment.offset)?;
        if let Some(entry) = find_entry(&notes) {
            return Ok(entry);
        }
    }
    Err(boot.kernel.invalid(
        "an ELF file without a PVH entry (note Xen 18); build Linux with CONFIG_PVH, or give a bzImage",
    ))
}

fn find_entry(notes: &[u8]) -> Option<u32> {
    let mut rest = notes;
    loop {
        let u32_at = |at| field::<4>(rest, at).map(u32::from_le_bytes);
        let (name_size, value_size, kind) = (u32_at(0)?, u32_at(4)?, u32_at(8)?);
        let name = rest.get(12..)?.get(..name_size as usize)?;
        let after = rest.get(12..)?.get(aligned(name_size)?..)?;
        let value = after.get(..value_size as usize)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return field::<4>(value, 0).map(u32::from_le_bytes);
        }
        rest = after.get(aligned(value_size)?..)?;
    }
}

fn aligned(size: u32) -> Option<usize> {
    Some((size.checked_add(3)? & !3) as usize)
}

fn zero(memory: &GuestMemoryMmap, from: u64, to: u64) -> Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = from;
    while at < to {
        let len = to.saturating_sub(at).min(ZEROES.len() as u64);
        write(memory, at, ZEROES.get(..len as usize).unwrap_or(&[]))?;
        at = at.saturating_add(len);
    }
    Ok(())
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

fn write_start_info(boot: &Boot, memory: &GuestMemoryMmap, initrd: Loaded) -> Result<()> {
    let map = memory::map(boot.memory);
    let failed = |e| Error::internal(format!("the PVH start information: {e}"));
    for (index, entry) in (0u64..).zip(&map) {
        let entry = hvm_memmap_table_entry {
            addr: entry.base,
            size: entry.size,
            type_: match entry.kind {
                MapKind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
                MapKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
            },
            reserved: 0,
        };
        let at = MEMORY_MAP
            .saturating_add(index.saturating_mul(size_of::<hvm_memmap_table_entry>() as u64));
        memory.write_obj(entry, GuestAddress(at)).map_err(failed)?;
    }
    let module = hvm_modlist_entry {
        paddr: initrd.address,
        size: initrd.size,
        ..Default::default()
    };
    memory
        .write_obj(module, GuestAddress(MODULES))
        .map_err(failed)?;
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.size > 0),
        modlist_paddr: if initrd.size > 0 { MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory
        .write_obj(start_info, GuestAddress(START_INFO))
        .map_err(failed)
}
