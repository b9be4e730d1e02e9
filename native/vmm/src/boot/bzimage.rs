// SPDX-License-Identifier: Apache-2.0
//! A Linux bzImage, entered at its 64-bit entry.
//!
//! Source: Documentation/arch/x86/boot.rst (boot protocol 2.12 and later) and
//! Documentation/arch/x86/zero-page.rst. The setup code is not run: what it would find out stands in the
//! zero page.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{write, Boot, CMDLINE, GDT, PAGE, PAGE_TABLES, ZERO_PAGE};
use crate::cpu::entry::{self, Entry};
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::GuestMemoryMmap;
use crate::memory::{self, MapKind};

/// Where the setup header begins in the file and in the zero page.
const HEADER_START: usize = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448; // "HdrS"
/// The first protocol with xloadflags.
const VERSION_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const SECTOR: u64 = 512;
/// The 64-bit entry's distance from the protected-mode code's start.
const ENTRY_64: u64 = 0x200;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn load(boot: &Boot, memory: &GuestMemoryMmap) -> Result<Entry> {
    let mut header = read_header(boot)?;
    let setup = setup_size(&header);
    let code = boot.kernel.size()?.saturating_sub(setup);
    // syssize is in paragraphs; the file may be longer (a signature), never shorter.
    let wanted = u64::from(header.syssize).saturating_mul(16);
    if code < wanted {
        return Err(boot.kernel.invalid(format!(
            "the file is cut off: {wanted} bytes of kernel announced, {code} there"
        )));
    }
    let address = place(boot, &header, code)?;
    boot.kernel
        .load(memory, GuestAddress(address), setup, code)?;
    // init_size is what the decompressor needs, from the load address on.
    let end = address.saturating_add(u64::from(header.init_size).max(code));
    let initrd = boot.load_initrd(memory, end, u64::from(header.initrd_addr_max))?;
    boot.write_cmdline(memory)?;
    header.type_of_loader = LOADER_UNDEFINED;
    header.code32_start = address as u32;
    header.cmd_line_ptr = CMDLINE as u32;
    header.ramdisk_image = initrd.address as u32;
    header.ramdisk_size = initrd.size as u32;
    write_zero_page(boot, memory, header)?;
    write_page_tables(memory)?;
    let gdt: Vec<u8> = entry::GDT.iter().flat_map(|d| d.to_le_bytes()).collect();
    write(memory, GDT, &gdt)?;
    Ok(Entry::Linux64 {
        rip: address.saturating_add(ENTRY_64),
        boot_params: ZERO_PAGE,
        page_table: PAGE_TABLES,
        gdt: GDT,
    })
}

fn read_header(boot: &Boot) -> Result<setup_header> {
    let mut bytes = [0; size_of::<setup_header>()];
    boot.kernel.read(&mut bytes, HEADER_START as u64)?;
    // SAFETY: setup_header is a packed structure of integers, so any bytes are one, and it has no alignment.
    let header: setup_header = unsafe { std::mem::transmute(bytes) };
    let (flag, magic, version) = (header.boot_flag, header.header, header.version);
    if flag != BOOT_FLAG || magic != MAGIC {
        return Err(boot
            .kernel
            .invalid("neither a Linux bzImage nor an ELF file"));
    }
    if version < VERSION_MIN {
        return Err(boot.kernel.invalid(format!(
            "boot protocol {}.{:02}; 2.12 (Linux 3.8) is the oldest that can be booted",
            version >> 8,
            version & 0xff
        )));
    }
    if header.loadflags & LOADED_HIGH == 0 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(boot
            .kernel
            .invalid("a Linux kernel, but not a 64-bit bzImage"));
    }
    let (longest, given) = (header.cmdline_size as usize, boot.cmdline.len());
    if given > longest {
        return Err(Error::invalid(
            "kernel.cmdline",
            format!("{given} bytes; this kernel takes {longest}"),
        ));
    }
    Ok(header)
}

/// The bytes of real-mode code in front: the boot sector and `setup_sects` more, for which 0 means 4.
fn setup_size(header: &setup_header) -> u64 {
    let sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    sectors.saturating_add(1).saturating_mul(SECTOR)
}

/// Where the kernel wants to lie, if it and what it needs to unpack itself fit there.
fn place(boot: &Boot, header: &setup_header, code: u64) -> Result<u64> {
    let address = header.pref_address;
    let end = address.checked_add(u64::from(header.init_size).max(code));
    if address < layout::EXTENDED_START || address % PAGE != 0 {
        return Err(boot
            .kernel
            .invalid(format!("it wants to be loaded at {address:#x}")));
    }
    match end {
        Some(end) if end <= boot.low_end() => Ok(address),
        _ => Err(Error::invalid(
            "memory",
            format!(
                "the kernel needs {} bytes from {address:#x} on; RAM ends at {:#x}",
                header.init_size.max(code as u32) as u64,
                boot.low_end()
            ),
        )),
    }
}

fn write_zero_page(boot: &Boot, memory: &GuestMemoryMmap, header: setup_header) -> Result<()> {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: boot.rsdp,
        ..Default::default()
    };
    let map = memory::map(boot.memory);
    // Packed: a copy is filled and put back whole.
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.base,
            size: entry.size,
            r#type: match entry.kind {
                MapKind::Ram => E820_RAM,
                MapKind::Reserved => E820_RESERVED,
            },
        };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    memory
        .write_obj(params, GuestAddress(ZERO_PAGE))
        .map_err(|e| Error::internal(format!("the zero page: {e}")))
}

/// The first 4 GiB onto themselves, by pages of 2 MiB: a PML4, a PDPT, four page directories.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<()> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let pdpt = PAGE_TABLES + PAGE;
    let directories = pdpt + PAGE;
    let table = |entries: &mut dyn Iterator<Item = u64>| {
        let mut page: Vec<u8> = entries.flat_map(u64::to_le_bytes).collect();
        page.resize(page.len().next_multiple_of(PAGE as usize), 0);
        page
    };
    write(
        memory,
        PAGE_TABLES,
        &table(&mut std::iter::once(pdpt | PRESENT_WRITABLE)),
    )?;
    write(
        memory,
        pdpt,
        &table(&mut (0..4).map(|i| (directories + i * PAGE) | PRESENT_WRITABLE)),
    )?;
    write(
        memory,
        directories,
        &table(&mut (0..4 * 512).map(|i| (i << 21) | PRESENT_WRITABLE | LARGE)),
    )
}
