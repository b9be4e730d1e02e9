// SPDX-License-Identifier: Apache-2.0
//! The ACPI tables that firmware would build, for a kernel that is booted directly.
//!
//! They lie in the reserved area below 1 MiB, where a kernel that was told no address searches for the RSDP
//! (ACPI 6.5, 5.2.5.1), one after the other: RSDP, XSDT, FADT, MADT, MCFG, FACS, DSDT. All of it depends on
//! the machine type and the number of vCPUs only.

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

/// Where the RSDP lies.
pub const RSDP: u64 = 0xe_0000;

const OEM: [u8; 6] = *b"VMBUS ";
const OEM_TABLE: [u8; 8] = *b"VMBUS-0 ";
const REVISION: u32 = 1;
/// FACS has to lie on 64 bytes; the others do as well.
const ALIGNMENT: u64 = 64;

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

/// The tables in memory: each with its address.
///
/// # Errors
/// `Internal` when they outgrow their place.
pub fn tables(vcpus: u8) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut area = Area {
        next: RSDP + ALIGNMENT,
        tables: Vec::new(),
    };
    let dsdt = area.put(dsdt::table(vcpus));
    let facs = area.put(bytes(&FACS::new()));
    let entries = [
        area.put(fadt(dsdt, facs)),
        area.put(madt(vcpus)),
        area.put(mcfg()),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = area.put(bytes(&xsdt));
    area.tables.push((RSDP, bytes(&Rsdp::new(OEM, xsdt))));
    if area.next > layout::EXTENDED_START {
        return Err(Error::internal("the ACPI tables outgrow their place"));
    }
    Ok(area.tables)
}

struct Area {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl Area {
    fn put(&mut self, table: Vec<u8>) -> u64 {
        let address = self.next;
        let end = address.saturating_add(table.len() as u64);
        self.next = end.next_multiple_of(ALIGNMENT);
        self.tables.push((address, table));
        address
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

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 255);
    bytes(&mcfg)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    fn named(tables: &[(u64, Vec<u8>)], signature: &[u8; 4]) -> Vec<u8> {
        let found = tables
            .iter()
            .find(|(_, table)| table.starts_with(signature));
        found.unwrap().1.clone()
    }

    #[test]
    fn tables_neither_meet_nor_leave_their_area() {
        let mut tables = tables(16).unwrap();
        tables.sort();
        let ends: Vec<u64> = tables
            .iter()
            .map(|(at, table)| at + table.len() as u64)
            .collect();
        for (end, (next, _)) in ends.iter().zip(&tables[1..]) {
            assert!(end <= next, "{end:#x} {next:#x}");
        }
        assert!(tables[0].0 == RSDP && *ends.last().unwrap() <= 0x10_0000);
    }

    #[test]
    fn every_table_adds_up_to_zero() {
        for (address, table) in tables(3).unwrap() {
            if !table.starts_with(b"FACS") {
                let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0, "{address:#x}");
            }
        }
    }

    #[test]
    fn the_madt_has_all_processors_and_enables_those_that_are_there() {
        let madt = named(&tables(3).unwrap(), b"APIC");
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
            std::fs::write(&path, named(&tables(4).unwrap(), signature)).unwrap();
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
        for word in ["PNP0A08", "_OSC", "_PRT", "_S5", "PNP0501", "PNP0B00"] {
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
