// SPDX-License-Identifier: Apache-2.0
//! Boot by firmware: SeaBIOS or OVMF, as the distribution has it, begins at the reset vector and finds its machine
//! as on QEMU's Q35.
//!
//! | file | what |
//! |---|---|
//! | [`rom`] | its code, read-only below 4 GiB |
//! | [`flash`] | its variables, in a file of the machine's own |
//! | [`shadow`] | the end of its code below 1 MiB, or the RAM there |
//! | [`loader`] | the ACPI tables, and how it is to place them |
//! | [`smbios`] | what the machine is called |
//! | [`files`] | all that the configuration device (`legacy/fw_cfg.rs`) gives it |
//!
//! A machine that boots a kernel has the same devices; its tables are put into memory, too.

pub mod files;
pub mod flash;
pub mod loader;
pub mod rom;
pub mod shadow;
pub mod smbios;

use std::sync::Arc;

use crate::acpi;
use crate::layout;
use crate::memory;
use crate::pci::root::Root;
use crate::pci::{Place, Seat};
use files::Files;

/// What is told about a machine.
pub struct Facts {
    /// Its type, as `vmbus-1`.
    pub machine_type: String,
    /// Its UUID, in the order of its text.
    pub uuid: [u8; 16],
    /// How many vCPUs there are.
    pub vcpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// What is booted, in this order; nothing else is.
    pub boot: Vec<BootDevice>,
    /// Whether SeaBIOS offers its boot menu.
    pub menu: bool,
    /// The generation ID after power-on.
    pub generation: [u8; 16],
}

/// A device that can be booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootDevice {
    /// virtio-blk.
    Disk(Seat),
    /// This target of the SCSI host adapter.
    Scsi(u8),
    /// virtio-net.
    Network(Seat),
}

/// All that the configuration device gives. The tables are made from where `root` has its memory then.
pub fn files(facts: &Facts, root: Arc<Root>) -> Files {
    let mut files = Files::new();
    let (low, _) = memory::split(facts.memory);
    let vcpus = u16::from(facts.vcpus).to_le_bytes();
    files.set(0x02, facts.uuid.to_vec());
    files.set(0x03, low.to_le_bytes().to_vec());
    files.set(0x04, vec![1, 0]);
    files.set(0x05, vcpus.to_vec());
    files.set(0x0e, u16::from(facts.menu).to_le_bytes().to_vec());
    files.set(0x0f, vcpus.to_vec());
    files.add("etc/e820", e820(facts.memory));
    let vcpus = facts.vcpus;
    let tables = move |root: &Root| {
        acpi::tables(&acpi::View {
            vcpus,
            pci: root.taken(),
        })
    };
    let now = tables(&root);
    let commands = loader::commands(&now);
    files.add_prepared(
        vec![
            (loader::RSDP, now.rsdp.len()),
            (loader::TABLES, now.bytes.len()),
            (loader::COMMANDS, commands.len()),
        ],
        Box::new(move || {
            let tables = tables(&root);
            let commands = loader::commands(&tables);
            vec![tables.rsdp, tables.bytes, commands]
        }),
    );
    files.add(loader::GENERATION, generation_page(facts.generation));
    files.add_writable(loader::GENERATION_ADDRESS, 8);
    let (anchor, structures) = smbios::tables(facts, 0);
    files.add("etc/smbios/smbios-anchor", anchor);
    files.add("etc/smbios/smbios-tables", structures);
    files.add("etc/sercon-port", layout::COM1.to_le_bytes().to_vec());
    files.add("bootorder", boot_order(&facts.boot));
    files
}

/// The page of the generation ID. Its 16 bytes stand as they are.
pub fn generation_page(id: [u8; 16]) -> Vec<u8> {
    let mut page = vec![0; 4096];
    let place = page.iter_mut().skip(acpi::GENERATION_OFFSET as usize);
    for (to, from) in place.zip(id) {
        *to = from;
    }
    page
}

fn e820(bytes: u64) -> Vec<u8> {
    const RAM: u32 = 1;
    let (low, high) = memory::split(bytes);
    let mut map = Vec::new();
    for (start, size) in [(0, low), (layout::HIGH_RAM_START, high)] {
        if size > 0 {
            map.extend(start.to_le_bytes());
            map.extend(size.to_le_bytes());
            map.extend(RAM.to_le_bytes());
        }
    }
    map
}

/// Open Firmware's device paths, as QEMU writes them and SeaBIOS and OVMF read them. The last line says to stop there.
fn boot_order(devices: &[BootDevice]) -> Vec<u8> {
    let mut lines: Vec<String> = devices
        .iter()
        .map(|device| match device {
            BootDevice::Disk(seat) => format!("{}/disk@0,0", node("scsi", *seat)),
            BootDevice::Scsi(target) => {
                let adapter = node("scsi", Seat::Bus0(Place::SCSI));
                format!("{adapter}/channel@0/disk@{target:x},0")
            }
            BootDevice::Network(seat) => format!("{}/ethernet-phy@0", node("ethernet", *seat)),
        })
        .collect();
    lines.push("HALT".to_owned());
    let mut text = lines.join("\n").into_bytes();
    text.push(0);
    text
}

fn node(kind: &str, seat: Seat) -> String {
    let at = |place: Place| match place.function {
        0 => format!("{:x}", place.device),
        function => format!("{:x},{function:x}", place.device),
    };
    match seat {
        Seat::Bus0(place) => format!("/pci@i0cf8/{kind}@{}", at(place)),
        Seat::Slot(index) => {
            let bridge = at(Place::root_port(index));
            format!("/pci@i0cf8/pci-bridge@{bridge}/{kind}@0")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_order_names_devices_as_firmware_reads_them() {
        let order = boot_order(&[
            BootDevice::Network(Seat::Bus0(Place::nic(0))),
            BootDevice::Disk(Seat::Bus0(Place::disk(9))),
            BootDevice::Disk(Seat::Slot(1)),
            BootDevice::Scsi(10),
        ]);
        let wanted = "/pci@i0cf8/ethernet@3/ethernet-phy@0\n\
            /pci@i0cf8/scsi@2,1/disk@0,0\n\
            /pci@i0cf8/pci-bridge@10,1/scsi@0/disk@0,0\n\
            /pci@i0cf8/scsi@7/channel@0/disk@a,0\n\
            HALT\0";
        assert_eq!(String::from_utf8(order).unwrap(), wanted);
    }

    #[test]
    fn the_memory_map_has_what_lies_above_4_gib() {
        let map = e820(3 << 30);
        assert_eq!(map.len(), 40);
        assert_eq!(map[8..16], (2u64 << 30).to_le_bytes());
        assert_eq!(map[20..28], (1u64 << 32).to_le_bytes());
        assert_eq!(map[28..36], (1u64 << 30).to_le_bytes());
    }
}
