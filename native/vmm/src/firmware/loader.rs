// SPDX-License-Identifier: Apache-2.0
//! The table loader: commands by which firmware fetches the ACPI tables, places them and fills in addresses.
//!
//! Source: QEMU's hw/acpi/bios-linker-loader.c and SeaBIOS's src/fw/romfile_loader.h, which define the format: each command
//! has 128 bytes, a number, and fields by the number; names are 56 bytes, zero-padded; numbers are little-endian.

use crate::acpi::{Sum, Tables, Target, GENERATION_OFFSET, RSDP_SUMS, RSDP_XSDT};

/// The tables but for the RSDP.
pub const TABLES: &str = "etc/acpi/tables";
/// The RSDP.
pub const RSDP: &str = "etc/acpi/rsdp";
/// The commands.
pub const COMMANDS: &str = "etc/table-loader";
/// The page with the generation ID.
pub const GENERATION: &str = "etc/vmgenid_guid";
/// Where firmware has put that page: it writes this file.
pub const GENERATION_ADDRESS: &str = "etc/vmgenid_addr";

const COMMAND: usize = 128;
const NAME: usize = 56;

const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
const WRITE_POINTER: u32 = 4;

/// Anywhere below 4 GiB.
const ZONE_HIGH: u8 = 1;
/// Below 1 MiB, where the RSDP is looked for.
const ZONE_FSEG: u8 = 2;

/// The commands for `tables`.
pub fn commands(tables: &Tables) -> Vec<u8> {
    let mut all = Vec::new();
    allocate(&mut all, GENERATION, 4096, ZONE_HIGH);
    allocate(&mut all, TABLES, 64, ZONE_HIGH);
    allocate(&mut all, RSDP, 16, ZONE_FSEG);
    for pointer in &tables.pointers {
        let target = match pointer.into {
            Target::Tables => TABLES,
            Target::Generation => GENERATION,
        };
        let mut command = begin(ADD_POINTER);
        command.extend(name(TABLES));
        command.extend(name(target));
        command.extend((pointer.at as u32).to_le_bytes());
        command.push(pointer.len as u8);
        end(&mut all, command);
    }
    for sum in &tables.sums {
        checksum(&mut all, TABLES, *sum);
    }
    let mut command = begin(ADD_POINTER);
    command.extend(name(RSDP));
    command.extend(name(TABLES));
    command.extend((RSDP_XSDT as u32).to_le_bytes());
    command.push(8);
    end(&mut all, command);
    for sum in RSDP_SUMS {
        checksum(&mut all, RSDP, sum);
    }
    let mut command = begin(WRITE_POINTER);
    command.extend(name(GENERATION_ADDRESS));
    command.extend(name(GENERATION));
    command.extend(0u32.to_le_bytes());
    command.extend((GENERATION_OFFSET as u32).to_le_bytes());
    command.push(8);
    end(&mut all, command);
    all
}

fn allocate(all: &mut Vec<u8>, file: &str, alignment: u32, zone: u8) {
    let mut command = begin(ALLOCATE);
    command.extend(name(file));
    command.extend(alignment.to_le_bytes());
    command.push(zone);
    end(all, command);
}

fn checksum(all: &mut Vec<u8>, file: &str, sum: Sum) {
    let mut command = begin(ADD_CHECKSUM);
    command.extend(name(file));
    for number in [sum.at, sum.start, sum.len] {
        command.extend((number as u32).to_le_bytes());
    }
    end(all, command);
}

fn begin(number: u32) -> Vec<u8> {
    number.to_le_bytes().to_vec()
}

fn end(all: &mut Vec<u8>, mut command: Vec<u8>) {
    command.resize(COMMAND, 0);
    all.extend(command);
}

/// A file's name as commands have it; the names here are all shorter than 56 bytes.
fn name(file: &str) -> [u8; NAME] {
    let mut field = [0; NAME];
    for (to, from) in field.iter_mut().zip(file.bytes()) {
        *to = from;
    }
    field
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::acpi::{self, View};
    use crate::pci::root::Taken;

    /// Firmware, as far as this file goes: carries the commands out on a memory of its own.
    fn load(files: &BTreeMap<&str, Vec<u8>>, commands: &[u8]) -> (Vec<u8>, BTreeMap<String, u64>) {
        let mut memory = vec![0u8; 0x20000];
        let mut places: BTreeMap<String, u64> = BTreeMap::new();
        let mut next = 0x1000u64;
        let text = |field: &[u8]| {
            String::from_utf8(field.split(|byte| *byte == 0).next().unwrap().to_vec()).unwrap()
        };
        let u32_at =
            |command: &[u8], at: usize| u32::from_le_bytes(command[at..at + 4].try_into().unwrap());
        for command in commands.chunks(COMMAND) {
            let file = text(&command[4..60]);
            match u32_at(command, 0) {
                ALLOCATE => {
                    next = next.next_multiple_of(u64::from(u32_at(command, 60)));
                    let content = &files[file.as_str()];
                    memory[next as usize..next as usize + content.len()].copy_from_slice(content);
                    places.insert(file, next);
                    next += content.len() as u64;
                }
                ADD_POINTER => {
                    let source = places[&text(&command[60..116])];
                    let at = places[&file] as usize + u32_at(command, 116) as usize;
                    let len = usize::from(command[120]);
                    let mut number = [0; 8];
                    number[..len].copy_from_slice(&memory[at..at + len]);
                    let number = u64::from_le_bytes(number) + source;
                    memory[at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
                }
                ADD_CHECKSUM => {
                    let base = places[&file] as usize;
                    let start = base + u32_at(command, 64) as usize;
                    let len = u32_at(command, 68) as usize;
                    let sum = memory[start..start + len]
                        .iter()
                        .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                    let at = base + u32_at(command, 60) as usize;
                    memory[at] = memory[at].wrapping_sub(sum);
                }
                WRITE_POINTER => {
                    let source = places[&text(&command[60..116])];
                    places.insert(file, source + u64::from(u32_at(command, 120)));
                }
                number => panic!("command {number}"),
            }
        }
        (memory, places)
    }

    #[test]
    fn firmware_that_follows_the_commands_gets_what_a_kernel_gets() {
        let tables = acpi::tables(&View {
            vcpus: 2,
            pci: Taken {
                ecam: Some((0xb000_0000, 0x1000_0000)),
                high: None,
            },
        });
        let files = BTreeMap::from([
            (TABLES, tables.bytes.clone()),
            (RSDP, tables.rsdp.clone()),
            (GENERATION, vec![0; 4096]),
        ]);
        let (memory, places) = load(&files, &commands(&tables));
        let u64_at =
            |at: u64| u64::from_le_bytes(memory[at as usize..at as usize + 8].try_into().unwrap());
        let sum = |at: u64, len: usize| {
            let range = &memory[at as usize..at as usize + len];
            range.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        };
        let rsdp = places[RSDP];
        assert_eq!((sum(rsdp, 20), sum(rsdp, 36)), (0, 0));
        let xsdt = u64_at(rsdp + 24);
        for index in 0..3 {
            let table = u64_at(xsdt + 36 + 8 * index);
            let len = u64_at(table + 4) as u32 as usize;
            assert_eq!(sum(table, len), 0);
        }
        // The address that the guest's system is told is the one that the machine is told.
        let generation = places[GENERATION_ADDRESS];
        assert_eq!(generation, places[GENERATION] + GENERATION_OFFSET);
        let name = memory
            .windows(6)
            .position(|window| window == b"\x08VGIA\x0c")
            .unwrap();
        assert_eq!(u64_at(name as u64 + 6) as u32 as u64, generation);
    }
}
