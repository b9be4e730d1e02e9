// SPDX-License-Identifier: Apache-2.0
//! SMBIOS 3.0 (DSP0134 3.0.0): what the machine is called, its processors and its memory.
//!
//! Firmware adds a structure of type 0 about itself and places all of it; for a kernel that is booted directly the entry
//! point lies at [`ENTRY`], where kernels look for it, and the structures behind it.

use super::Facts;
use crate::layout;
use crate::memory;

/// Where the entry point lies for a direct boot.
pub const ENTRY: u64 = 0xf_0000;
/// Where the structures lie then.
pub const STRUCTURES: u64 = 0xf_0020;
const ENTRY_LEN: usize = 24;

const MANUFACTURER: &str = "vmbus";

/// Both parts for such a machine: the entry point, whose address field is `structures`, and the structures.
pub fn tables(facts: &Facts, structures: u64) -> (Vec<u8>, Vec<u8>) {
    let (machine_type, memory) = (facts.machine_type.as_str(), facts.memory);
    let mut all = Vec::new();
    system(&mut all, machine_type, facts.uuid);
    chassis(&mut all, machine_type);
    for index in 0..u16::from(facts.vcpus) {
        processor(&mut all, index, machine_type);
    }
    memory_array(&mut all, memory);
    memory_device(&mut all, memory);
    mapped(&mut all, memory);
    // 32: no boot error.
    structure(&mut all, 32, 0x2000, &[0; 7], &[]);
    structure(&mut all, 127, 0x7f00, &[], &[]);
    (entry_point(structures, all.len()), all)
}

fn entry_point(structures: u64, len: usize) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    // Checksum, length, version 3.0, docrev, entry point revision 1, reserved.
    entry.extend([0, ENTRY_LEN as u8, 3, 0, 0, 1, 0]);
    entry.extend((len as u32).to_le_bytes());
    entry.extend(structures.to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = entry.get_mut(5) {
        *checksum = 0u8.wrapping_sub(sum);
    }
    entry
}

/// A structure: its header, `body` and the strings that bytes of the body number from 1.
fn structure(all: &mut Vec<u8>, kind: u8, handle: u16, body: &[u8], strings: &[&str]) {
    all.extend([kind, body.len().saturating_add(4) as u8]);
    all.extend(handle.to_le_bytes());
    all.extend(body);
    for string in strings {
        all.extend(string.bytes());
        all.push(0);
    }
    if strings.is_empty() {
        all.push(0);
    }
    all.push(0);
}

/// 7.2: manufacturer, product, version; the UUID has its first three fields little-endian.
fn system(all: &mut Vec<u8>, machine_type: &str, uuid: [u8; 16]) {
    let [a, b, c, d, e, f, g, h, rest @ ..] = uuid;
    let mut body = vec![1, 2, 3, 0];
    body.extend([d, c, b, a, f, e, h, g]);
    body.extend(rest);
    // Woken by the power switch; no SKU, no family.
    body.extend([6, 0, 0]);
    let strings = [MANUFACTURER, "Virtual Machine", machine_type];
    structure(all, 1, 0x0100, &body, &strings);
}

/// 7.4: "other", states safe.
fn chassis(all: &mut Vec<u8>, machine_type: &str) {
    let mut body = vec![1, 1, 2, 0, 0, 3, 3, 3, 2];
    body.extend([0; 8]);
    structure(all, 3, 0x0300, &body, &[MANUFACTURER, machine_type]);
}

/// 7.5: a central processor, one core, enabled.
fn processor(all: &mut Vec<u8>, index: u16, machine_type: &str) {
    const FAMILY_OTHER: u8 = 1;
    let mut body = vec![1, 3, FAMILY_OTHER, 2];
    // ID, version, voltage, external clock, speeds: not known.
    body.extend([0; 8]);
    body.extend([3, 0, 0, 0, 0, 0, 0, 0]);
    // Populated and enabled; upgrade "other"; no caches.
    body.extend([0x41, 1]);
    body.extend([0xff; 6]);
    // Serial, asset, part; one core, one enabled, one thread; 64-bit capable.
    body.extend([0, 0, 0, 1, 1, 1, 4, 0]);
    // Family 2, and the counts of 16 bits.
    body.extend([FAMILY_OTHER, 0, 1, 0, 1, 0, 1, 0]);
    let socket = format!("CPU {index}");
    let handle = 0x0400u16.saturating_add(index);
    structure(
        all,
        4,
        handle,
        &body,
        &[&socket, MANUFACTURER, machine_type],
    );
}

/// 7.17: system memory, multi-bit ECC, one device.
fn memory_array(all: &mut Vec<u8>, memory: u64) {
    let mut body = vec![1, 3, 6];
    body.extend(0x8000_0000u32.to_le_bytes());
    body.extend([0xfe, 0xff, 1, 0]);
    body.extend(memory.to_le_bytes());
    structure(all, 16, 0x1000, &body, &[]);
}

/// 7.18: a DIMM of RAM, its size in MiB.
fn memory_device(all: &mut Vec<u8>, memory: u64) {
    let mib = memory >> 20;
    let (size, extended) = match u16::try_from(mib) {
        Ok(size) if size < 0x7fff => (size, 0),
        _ => (0x7fff, mib as u32),
    };
    let mut body = 0x1000u16.to_le_bytes().to_vec();
    // No error information; widths not known.
    body.extend([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    body.extend(size.to_le_bytes());
    // DIMM, no set, the locator, RAM of no special kind; speed, manufacturer, serial, asset, part, rank.
    body.extend([9, 0, 1, 0, 7, 2, 0, 0, 0, 2, 0, 0, 0, 0]);
    body.extend(extended.to_le_bytes());
    // Speeds and voltages.
    body.extend([0; 8]);
    structure(all, 17, 0x1100, &body, &["DIMM 0", MANUFACTURER]);
}

/// 7.20: which addresses the memory has.
fn mapped(all: &mut Vec<u8>, bytes: u64) {
    let (low, high) = memory::split(bytes);
    for (handle, start, size) in [(0x1300u16, 0, low), (0x1301, layout::HIGH_RAM_START, high)] {
        if size == 0 {
            continue;
        }
        let last = start.saturating_add(size).saturating_sub(1);
        // The fields of 32 bits say that those of 64 have it.
        let mut body = vec![0xff; 8];
        body.extend(0x1000u16.to_le_bytes());
        body.push(1);
        body.extend(start.to_le_bytes());
        body.extend(last.to_le_bytes());
        structure(all, 19, handle, &body, &[]);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const UUID: [u8; 16] = [
        0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0x4d, 0xef, 0x81, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd,
        0xef,
    ];

    fn facts() -> Facts {
        Facts {
            machine_type: "vmbus-1".to_owned(),
            uuid: UUID,
            vcpus: 2,
            memory: 3 << 30,
            boot: Vec::new(),
            menu: false,
            generation: [0; 16],
        }
    }

    #[test]
    fn the_entry_point_says_where_and_how_much() {
        let (entry, structures) = tables(&facts(), STRUCTURES);
        assert_eq!((entry.len(), &entry[..5]), (ENTRY_LEN, &b"_SM3_"[..]));
        assert_eq!(
            entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        let len = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        assert_eq!(len as usize, structures.len());
        assert!(ENTRY + ENTRY_LEN as u64 <= STRUCTURES);
    }

    /// `dmidecode` reads a dump whose structures follow the entry point.
    #[test]
    fn dmidecode_understands_the_tables() {
        let (entry, structures) = tables(&facts(), 32);
        let path = std::env::temp_dir().join(format!("vmbus-smbios-{}", std::process::id()));
        let mut dump = entry;
        dump.resize(32, 0);
        dump.extend(structures);
        std::fs::write(&path, dump).unwrap();
        let ran = Command::new("dmidecode")
            .arg("--from-dump")
            .arg(&path)
            .output();
        std::fs::remove_file(&path).unwrap();
        let Ok(ran) = ran else {
            eprintln!("absent: dmidecode");
            return;
        };
        let text = String::from_utf8_lossy(&ran.stdout).into_owned();
        for wanted in [
            "UUID: 12345678-9abc-4def-8123-456789abcdef",
            "Product Name: Virtual Machine",
            "Version: vmbus-1",
            "Socket Designation: CPU 1",
            "Size: 3 GB",
            "Ending Address: 0x000000013FFFFFFF",
            "End Of Table",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in {text}");
        }
        assert!(
            !text.contains("Wrong DMI")
                && !text.contains("<OUT OF SPEC>")
                && !text.contains("TRUNCATED"),
            "{text}"
        );
    }
}
