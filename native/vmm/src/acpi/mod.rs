// SPDX-License-Identifier: Apache-2.0
//! The ACPI tables: RSDP, XSDT, FADT, MADT, MCFG, FACS, DSDT.
//!
//! They are built once for both ways to the guest: with every address as an offset from the first table and every
//! checksum zero, and a list of where these are. A kernel that is booted directly finds them, placed, in the
//! reserved area below 1 MiB, where it searches for the RSDP (ACPI 6.5, 5.2.5.1); firmware gets them as files and
//! places them itself by the same list ([`crate::firmware::loader`]).
//!
//! All of it depends on the machine type, the number of vCPUs and where PCI's memory lies ([`View`]), and its length on
//! the number of vCPUs alone: firmware reads the files' sizes before it moves PCI's memory.

mod dsdt;

use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::Aml;

use crate::config::VCPUS_MAX;
use crate::error::{Error, Result};
use crate::layout;
use crate::legacy::cmos::CENTURY;
use crate::pci::root::Taken;

/// Where the RSDP lies.
pub const RSDP: u64 = 0xe_0000;

const OEM: [u8; 6] = *b"VMBUS ";
const OEM_TABLE: [u8; 8] = *b"VMBUS-1 ";
const REVISION: u32 = 1;
/// FACS has to lie on 64 bytes; the others do as well.
const ALIGNMENT: usize = 64;

/// IAPC_BOOT_ARCH: legacy devices exist; there is no VGA to be probed for. The keyboard controller is not
/// announced: there is nothing behind it.
const BOOT_ARCHITECTURE: u16 = 1 | 1 << 2;
/// A latency that says there is no C2 and no C3.
const NO_C_STATE: u16 = 0xfff;
/// RST_CPU and SYS_RST.
const RESET_VALUE: u8 = 6;

/// MADT, local APIC: the processor is there.
const ENABLED: u32 = 1;
/// MADT, local APIC: it is not, and may come later.
const ONLINE_CAPABLE: u32 = 2;
/// MPS INTI flags: active high, level-triggered.
const LEVEL_HIGH: u16 = 0xd;

/// Where the generation ID lies in its page, which is 4 KiB on 4 KiB: 40 bytes in, so that no table scanner takes the
/// page for a table ("Virtual Machine Generation ID", Microsoft, 2012; QEMU's docs/specs/vmgenid).
pub const GENERATION_OFFSET: u64 = 40;
/// The page of the generation ID, for a kernel that is booted directly.
pub const GENERATION_PAGE: u64 = 0xe_f000;

/// What the tables depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// How many vCPUs there are.
    pub vcpus: u8,
    /// Where PCI's memory lies.
    pub pci: Taken,
}

/// A field that holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// Where it is.
    pub at: usize,
    /// Its bytes, 4 or 8.
    pub len: usize,
    /// What its value is an offset into.
    pub into: Target,
}

/// What a pointer points into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The tables.
    Tables,
    /// The page of the generation ID.
    Generation,
}

/// A byte that makes a range add up to zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Where it is.
    pub at: usize,
    /// The first byte of the range.
    pub start: usize,
    /// Its bytes.
    pub len: usize,
}

/// The tables, not yet placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tables {
    /// All but the RSDP.
    pub bytes: Vec<u8>,
    /// The addresses in them.
    pub pointers: Vec<Pointer>,
    /// Their checksums.
    pub sums: Vec<Sum>,
    /// The RSDP; its one address, of the XSDT, is at [`RSDP_XSDT`].
    pub rsdp: Vec<u8>,
}

/// Where the RSDP has the XSDT's address.
pub const RSDP_XSDT: usize = 24;
/// The checksums of the RSDP: of the part that ACPI 1.0 knew, and of all.
pub const RSDP_SUMS: [Sum; 2] = [
    Sum {
        at: 8,
        start: 0,
        len: 20,
    },
    Sum {
        at: 32,
        start: 0,
        len: 36,
    },
];

/// The tables of a machine.
pub fn tables(view: &View) -> Tables {
    let mut tables = Tables {
        bytes: Vec::new(),
        pointers: Vec::new(),
        sums: Vec::new(),
        rsdp: Vec::new(),
    };
    let dsdt = dsdt::table(view);
    let generation = dsdt::generation_pointer(&dsdt);
    let dsdt = tables.put(&dsdt, &[]);
    if let Some(at) = generation {
        tables.point(dsdt.saturating_add(at), 4, Target::Generation);
    }
    let facs = tables.put(&bytes(&FACS::new()), &[]);
    let entries = [
        // FIRMWARE_CTRL, DSDT, X_DSDT.
        tables.put(
            &fadt(dsdt as u64, facs as u64),
            &[(36, 4), (40, 4), (140, 8)],
        ),
        tables.put(&madt(view.vcpus), &[]),
        tables.put(&mcfg(view.pci.ecam), &[]),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    let mut pointers = Vec::new();
    for (entry, at) in entries.into_iter().zip((36..).step_by(8)) {
        xsdt.add_entry(entry as u64);
        pointers.push((at, 8));
    }
    let xsdt = tables.put(&bytes(&xsdt), &pointers);
    tables.rsdp = bytes(&Rsdp::new(OEM, xsdt as u64));
    for sum in RSDP_SUMS {
        clear(&mut tables.rsdp, sum.at);
    }
    tables
}

impl Tables {
    /// Adds a table; `pointers` are the offset and length of the addresses in it. Returns its offset.
    fn put(&mut self, table: &[u8], pointers: &[(usize, usize)]) -> usize {
        let at = self.bytes.len().next_multiple_of(ALIGNMENT);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        for (offset, len) in pointers {
            self.point(at.saturating_add(*offset), *len, Target::Tables);
        }
        // The FACS has none.
        if !table.starts_with(b"FACS") {
            let sum = Sum {
                at: at.saturating_add(9),
                start: at,
                len: table.len(),
            };
            clear(&mut self.bytes, sum.at);
            self.sums.push(sum);
        }
        at
    }

    fn point(&mut self, at: usize, len: usize, into: Target) {
        self.pointers.push(Pointer { at, len, into });
    }

    /// As they lie in memory: each piece with its address.
    ///
    /// # Errors
    /// `Internal` when they outgrow their place.
    pub fn placed(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        let base = RSDP.saturating_add(ALIGNMENT as u64);
        if base.saturating_add(self.bytes.len() as u64) > GENERATION_PAGE {
            return Err(Error::internal("the ACPI tables outgrow their place"));
        }
        let mut placed = self.bytes.clone();
        for pointer in &self.pointers {
            let target = match pointer.into {
                Target::Tables => base,
                Target::Generation => GENERATION_PAGE,
            };
            add(&mut placed, pointer.at, pointer.len, target);
        }
        let mut rsdp = self.rsdp.clone();
        add(&mut rsdp, RSDP_XSDT, 8, base);
        for sum in &self.sums {
            balance(&mut placed, *sum);
        }
        for sum in RSDP_SUMS {
            balance(&mut rsdp, sum);
        }
        Ok(vec![(base, placed), (RSDP, rsdp)])
    }
}

fn clear(bytes: &mut [u8], at: usize) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte = 0;
    }
}

/// Adds to the little-endian number of `len` bytes at `at`.
fn add(bytes: &mut [u8], at: usize, len: usize, value: u64) {
    let Some(field) = at.checked_add(len).and_then(|end| bytes.get_mut(at..end)) else {
        return;
    };
    let mut number = [0; 8];
    for (to, from) in number.iter_mut().zip(&*field) {
        *to = *from;
    }
    let sum = u64::from_le_bytes(number).wrapping_add(value).to_le_bytes();
    for (to, from) in field.iter_mut().zip(sum) {
        *to = from;
    }
}

fn balance(bytes: &mut [u8], sum: Sum) {
    let range = bytes.iter().skip(sum.start).take(sum.len);
    let total = range.fold(0u8, |total, byte| total.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(sum.at) {
        *byte = byte.wrapping_sub(total);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let pm = layout::PM_BASE as u32;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_32(dsdt as u32)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // no fixed sleep button; the power button is fixed
        .flag(Flags::FixRtc) // the clock does not wake
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = (layout::SCI as u16).into();
    fadt.pm1a_evt_blk = pm.into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = (pm + 0x04).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = (pm + 0x08).into();
    fadt.pm_tmr_len = 4;
    fadt.gpe0_blk = (pm + 0x20).into();
    fadt.gpe0_blk_len = 16;
    fadt.p_lvl2_lat = NO_C_STATE.into();
    fadt.p_lvl3_lat = NO_C_STATE.into();
    fadt.century = CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::RESET_CONTROL,
    );
    fadt.reset_value = RESET_VALUE;
    bytes(&fadt.finalize())
}

/// The interrupt controllers (ACPI 6.5, 5.2.12). All processors that the machine type knows have their entry.
fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, REVISION);
    madt.append_slice(&(layout::LAPIC_START as u32).to_le_bytes());
    madt.append_slice(&1u32.to_le_bytes()); // PCAT_COMPAT: there are 8259s, too
    for id in 0..VCPUS_MAX {
        let flags = if id < vcpus { ENABLED } else { ONLINE_CAPABLE };
        madt.append_slice(&[0, 8, id, id]);
        madt.append_slice(&flags.to_le_bytes());
    }
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&(layout::IOAPIC_START as u32).to_le_bytes());
    madt.append_slice(&0u32.to_le_bytes());
    // ISA line 0, the PIT, comes in at pin 2; the SCI is level-triggered.
    for (line, pin, flags) in [(0, 2, 0), (layout::SCI as u8, layout::SCI, LEVEL_HIGH)] {
        madt.append_slice(&[2, 10, 0, line]);
        madt.append_slice(&pin.to_le_bytes());
        madt.append_slice(&flags.to_le_bytes());
    }
    // NMIs of all processors come in at LINT1.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.as_slice().to_vec()
}

/// Where the ECAM is; without one the table says so by an entry of no buses at address 0.
fn mcfg(ecam: Option<(u64, u64)>) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    let (base, size) = ecam.unwrap_or((0, 1 << 20));
    // 1 MiB a bus.
    let last = (size >> 20).clamp(1, 256).saturating_sub(1);
    mcfg.add_ecam(base, 0, 0, last as u8);
    bytes(&mcfg)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    fn view(vcpus: u8) -> View {
        View {
            vcpus,
            pci: Taken {
                ecam: Some((layout::ECAM_START, layout::ECAM_SIZE)),
                high: None,
            },
        }
    }

    /// All tables but the RSDP, taken apart by their lengths.
    fn apart(vcpus: u8) -> Vec<Vec<u8>> {
        let (_, placed) = tables(&view(vcpus)).placed().unwrap().remove(0);
        let mut rest = &placed[..];
        let mut found = Vec::new();
        while rest.len() >= 36 {
            let len = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
            found.push(rest[..len].to_vec());
            rest = &rest[len.next_multiple_of(ALIGNMENT).min(rest.len())..];
        }
        found
    }

    fn named(vcpus: u8, signature: &[u8; 4]) -> Vec<u8> {
        let mut tables = apart(vcpus).into_iter();
        tables
            .find(|table| table.starts_with(signature))
            .unwrap_or_default()
    }

    #[test]
    fn every_table_adds_up_to_zero_once_it_is_placed() {
        let tables = apart(3);
        assert_eq!(tables.len(), 6);
        for table in tables.iter().filter(|table| !table.starts_with(b"FACS")) {
            let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "{:?}", &table[..4]);
        }
    }

    #[test]
    fn a_kernel_gets_from_the_rsdp_to_every_table() {
        let placed = tables(&view(2)).placed().unwrap();
        let (base, bytes) = &placed[0];
        let (at, rsdp) = &placed[1];
        assert_eq!((*at, &rsdp[..8]), (RSDP, &b"RSD PTR "[..]));
        assert!(base + bytes.len() as u64 <= GENERATION_PAGE);
        let number = |from: &[u8]| u64::from_le_bytes(from.try_into().unwrap());
        let table = |address: u64| &bytes[(address - base) as usize..];
        let xsdt = table(number(&rsdp[24..32]));
        let pointers = xsdt[36..60].chunks(8).map(number);
        let signatures: Vec<_> = pointers.map(|at| table(at)[..4].to_vec()).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = table(number(&xsdt[36..44]));
        assert!(table(number(&fadt[140..148])).starts_with(b"DSDT"));
        let short = |from: &[u8]| u64::from(u32::from_le_bytes(from.try_into().unwrap()));
        assert!(table(short(&fadt[40..44])).starts_with(b"DSDT"));
        assert!(table(short(&fadt[36..40])).starts_with(b"FACS"));
    }

    #[test]
    fn the_generation_id_is_where_the_dsdt_says() {
        let dsdt = named(1, b"DSDT");
        let at = dsdt::generation_pointer(&dsdt).unwrap();
        let address = u32::from_le_bytes(dsdt[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from(address), GENERATION_PAGE + GENERATION_OFFSET);
    }

    #[test]
    fn the_length_depends_on_the_vcpus_alone() {
        let plain = tables(&view(4));
        for (ecam, high) in [
            (None, None),
            (Some((0xe000_0000, 0x1000_0000)), None),
            (Some((0x8000_0000, 0x400_0000)), Some((1 << 32, 1 << 51))),
            (Some((1 << 40, 0x1000_0000)), Some((0x80 << 32, 0x81 << 32))),
            (Some((0, 0x1000_0000)), Some((u64::MAX - 1, u64::MAX))),
        ] {
            let moved = tables(&View {
                vcpus: 4,
                pci: Taken { ecam, high },
            });
            assert_eq!(moved.bytes.len(), plain.bytes.len(), "{ecam:x?} {high:x?}");
            assert_eq!(moved.pointers, plain.pointers);
            assert_eq!(moved.sums, plain.sums);
        }
    }

    #[test]
    fn the_madt_has_all_processors_and_enables_those_that_are_there() {
        let madt = named(3, b"APIC");
        let processors: Vec<(u8, u8)> = madt[44..]
            .chunks(8)
            .take(16)
            .map(|entry| (entry[3], entry[4]))
            .collect();
        let wanted: Vec<(u8, u8)> = (0..16).map(|id| (id, if id < 3 { 1 } else { 2 })).collect();
        assert_eq!(processors, wanted);
    }

    /// `iasl` takes every table apart, and puts the DSDT together again without a complaint.
    #[test]
    fn iasl_understands_the_tables() {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("absent: iasl");
            return;
        }
        let directory = std::env::temp_dir().join(format!("vmbus-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        for signature in [b"FACP", b"APIC", b"MCFG", b"DSDT", b"XSDT"] {
            let name = String::from_utf8_lossy(signature).to_lowercase();
            let path = directory.join(format!("{name}.aml"));
            std::fs::write(&path, named(4, signature)).unwrap();
            let text = iasl(&directory, &["-d", path.to_str().unwrap()]);
            assert!(
                !text.contains("Error") && !text.contains("Invalid"),
                "{name}: {text}"
            );
        }
        let source = directory.join("dsdt.dsl");
        let text = iasl(&directory, &["-p", "again", source.to_str().unwrap()]);
        assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
        let source = std::fs::read_to_string(source).unwrap();
        for word in [
            "PNP0A08",
            "_OSC",
            "_PRT",
            "_S5",
            "PNP0501",
            "PNP0B00",
            "QEMU0001",
            "QEMU0002",
            "VM_Gen_Counter",
        ] {
            assert!(source.contains(word), "{word} is missing in {source}");
        }
        std::fs::remove_dir_all(directory).unwrap();
    }

    fn iasl(directory: &Path, arguments: &[&str]) -> String {
        let output = Command::new("iasl")
            .current_dir(directory)
            .args(arguments)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).into_owned()
    }
}
