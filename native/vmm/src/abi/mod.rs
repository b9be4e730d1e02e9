// SPDX-License-Identifier: Apache-2.0
//! All that a guest can see of a machine, as JSON: what a machine type promises not to change.
//!
//! It follows from the machine type and the definition alone. Nothing here asks KVM, the host or a file: devices are built on
//! a wiring that connects nothing, their configuration spaces read as a guest would, tables made as for a guest. So
//! two hosts and two versions of vmbus can be compared by comparing texts: keys are sorted, bytes are hexadecimal.
//!
//! Devices in hotplug slots are there as at the machine's start. `mode_registers` and `mode_board` of the bare-metal guests
//! read the same and are compared with it.
//!
//! | key | what |
//! |---|---|
//! | `pci` | configuration spaces as after power-on, in full up to the last byte that is not zero; BARs; what virtio offers |
//! | `acpi`, `smbios` | as they lie in memory for a kernel that is booted directly; firmware places the same tables |
//! | `fw-cfg` | numbered items and files |
//! | `cpuid`, `msrs` | of the first vCPU; null for the model `host`. Bits that follow the guest's own CR4 and XCR0 are as it has them when both are all on |
//! | `places`, `ports` | of what has no BAR, and what is kept for devices to come |
//!
//! Left out: what differs from start to start (the generation ID, the clock) and from host to host (CPU model `host`); the
//! contents of firmware, which its store keeps. An MSR that is null follows the time or the way into the kernel.

mod devices;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{json, Map, Value};

use crate::acpi;
use crate::bus::Bus;
use crate::config::{DiskBus, MachineType};
use crate::cpu::model;
use crate::cpu::msr;
use crate::error::{Error, Result};
use crate::firmware::files::DIRECTORY;
use crate::firmware::{self, shadow, smbios, BootDevice, Facts};
use crate::layout;
use crate::legacy::cmos;
use crate::memory::{self, MapKind};
use crate::pci::host::HostBridge;
use crate::pci::root::Root;
use crate::pci::root_port::RootPort;
use crate::pci::{Function, Seat, PASSTHROUGH, ROOT_PORTS};
use crate::scsi::Unit;
use devices::{Described, Nowhere};

/// A machine, as far as a guest can see what is said here.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// As in [`crate::config::Config`].
    pub machine_type: String,
    /// As there.
    pub uuid: String,
    /// As there.
    pub vcpus: u8,
    /// As there.
    pub memory: u64,
    /// As there.
    pub cpu_model: String,
    /// In their order; images are not looked at, so capacities read zero.
    pub disks: Vec<Disk>,
    /// In their order.
    pub nics: Vec<Nic>,
    /// Whether there is a watchdog.
    #[serde(default)]
    pub watchdog: bool,
    /// The names of the ports.
    #[serde(default)]
    pub ports: Vec<String>,
    /// The guest's CID.
    #[serde(default)]
    pub vsock: Option<u32>,
    /// As there.
    pub rng: bool,
    /// As there.
    pub balloon: bool,
    /// `disk/ID` and `nic/ID`; None for a kernel that is booted directly.
    pub boot: Option<Vec<String>>,
    /// Whether SeaBIOS offers its boot menu.
    #[serde(default)]
    pub menu: bool,
}

/// A disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    id: String,
    read_only: bool,
    serial: String,
    queues: u16,
    /// The hotplug slot, from 1; 0 for a place on bus 0.
    #[serde(default)]
    slot: u8,
    #[serde(default)]
    bus: DiskBus,
    #[serde(default)]
    cdrom: bool,
}

impl Disk {
    fn is_scsi(&self) -> bool {
        self.cdrom || self.bus == DiskBus::Scsi
    }

    /// The same as [`crate::devices::ScsiSpec`] has, without an image.
    fn unit(&self) -> Unit {
        let name = crate::disks::scsi_name(&self.serial, &self.id);
        if self.cdrom {
            Unit::cdrom(&name, None)
        } else {
            Unit::disk(&name, 0, self.read_only)
        }
    }
}

/// A network interface.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    id: String,
    mac: String,
    queues: u16,
    /// As a disk's.
    #[serde(default)]
    slot: u8,
}

/// Describes `machine`.
///
/// # Errors
/// `InvalidArgument` and `NotSupported` as for building it.
pub fn describe(machine: &Machine) -> Result<Value> {
    let machine_type = MachineType::named(&machine.machine_type)?;
    let host = Arc::new(HostBridge::new(
        layout::ECAM_START,
        match machine.boot {
            Some(_) => shadow::ALL_FIRMWARE,
            None => shadow::ALL_RAM,
        },
        Box::new(|_| ()),
    ));
    let ports: Vec<_> = (0..ROOT_PORTS)
        .map(|index| RootPort::new(Arc::new(Nowhere), index, Arc::new(|_| ())).map(Arc::new))
        .collect::<Result<_>>()?;
    let described = devices::all(machine, machine_type)?;
    let mut pci = vec![devices::host(host.as_ref())];
    let mut on_bus = Vec::new();
    for device in &described {
        match device.seat {
            Seat::Bus0(place) => on_bus.push((place, device.function.clone())),
            Seat::Slot(index) => {
                let port = ports.get(usize::from(index));
                let port = port.ok_or_else(|| Error::invalid("slot", "there is no such slot"))?;
                port.plug();
                port.reset();
            }
        }
        pci.push(device.describe());
    }
    for (index, port) in (0..).zip(&ports) {
        pci.push(devices::root_port(index, port.as_ref()));
    }
    let root = Root::new(host, on_bus, ports, &Bus::new())?;
    let facts = facts(machine, &described)?;
    Ok(json!({
        "machine-type": machine.machine_type,
        "memory-map": memory_map(machine.memory),
        "places": places(),
        "ports": ports_table(),
        "pci": pci,
        "acpi": tables(machine, &root)?,
        "smbios": smbios_tables(&facts),
        "fw-cfg": fw_cfg(&facts, root),
        "cmos": hex(&cmos::sizes(machine.memory, machine.vcpus)),
        "cpuid": cpuid(machine)?,
        "msrs": msrs(machine)?,
        "scsi": devices::units(machine),
        "port-names": machine.ports,
    }))
}

fn facts(machine: &Machine, described: &[Described]) -> Result<Facts> {
    let seats: BTreeMap<&str, Seat> = described
        .iter()
        .map(|device| (device.name.as_str(), device.seat))
        .collect();
    let targets = machine.disks.iter().filter(|disk| disk.is_scsi());
    let targets: BTreeMap<String, u8> = targets
        .zip(0..)
        .map(|(disk, target)| (format!("disk/{}", disk.id), target))
        .collect();
    let boot = machine.boot.iter().flatten().map(|id| {
        if let Some(target) = targets.get(id) {
            return Ok(BootDevice::Scsi(*target));
        }
        let seat = seats.get(id.as_str()).copied();
        match (seat, id.split_once('/')) {
            (Some(seat), Some(("disk", _))) => Ok(BootDevice::Disk(seat)),
            (Some(seat), Some(("nic", _))) => Ok(BootDevice::Network(seat)),
            _ => Err(Error::invalid("boot", format!("{id:?} is no device"))),
        }
    });
    Ok(Facts {
        machine_type: machine.machine_type.clone(),
        uuid: crate::config::uuid_bytes(&machine.uuid)?,
        vcpus: machine.vcpus,
        memory: machine.memory,
        boot: boot.collect::<Result<_>>()?,
        menu: machine.menu,
        generation: [0; 16],
    })
}

fn memory_map(bytes: u64) -> Value {
    let entry = |entry: memory::MapEntry| {
        json!({
            "base": number(entry.base),
            "size": number(entry.size),
            "kind": match entry.kind { MapKind::Ram => "ram", MapKind::Reserved => "reserved" },
        })
    };
    memory::map(bytes).into_iter().map(entry).collect()
}

fn places() -> Value {
    json!({
        "ecam": number(layout::ECAM_START),
        "mmio32": number(layout::MMIO32_START),
        "mmio32-size": number(layout::MMIO32_SIZE),
        "mmio64": number(layout::MMIO64_START),
        "mmio64-size": number(layout::MMIO64_SIZE),
        "io-apic": number(layout::IOAPIC_START),
        "local-apic": number(layout::LAPIC_START),
        "firmware-end": number(layout::FIRMWARE_END),
        "kept": {
            "tpm": number(layout::TPM_START),
            "tpm-size": number(layout::TPM_SIZE),
            "virtio-mem": number(layout::MEMORY_DEVICE_END),
            "passthrough-slots": PASSTHROUGH,
        },
    })
}

fn ports_table() -> Value {
    let table = [
        ("i8042-data", layout::I8042_DATA, 1),
        ("i8042-command", layout::I8042_COMMAND, 1),
        ("cmos", layout::CMOS, 2),
        ("port-92", layout::PORT_92, 1),
        ("com1", layout::COM1, 8),
        ("pvpanic", layout::PVPANIC, 1),
        ("fw-cfg", layout::FW_CFG, layout::FW_CFG_SIZE),
        ("power-management", layout::PM_BASE, layout::PM_SIZE),
        ("pci-configuration", layout::PCI_CONFIG, 8),
        ("reset-control", layout::RESET_CONTROL, 1),
    ];
    let ports: Map<_, _> = table
        .into_iter()
        .map(|(name, base, size)| (name.to_owned(), json!({"base": number(base), "size": size})))
        .collect();
    Value::Object(ports)
}

fn tables(machine: &Machine, root: &Root) -> Result<Value> {
    let view = acpi::View {
        vcpus: machine.vcpus,
        pci: root.taken(),
    };
    let placed = acpi::tables(&view).placed()?;
    let placed = placed.into_iter();
    Ok(placed
        .map(|(base, bytes)| json!({"base": number(base), "bytes": hex(&bytes)}))
        .collect())
}

fn smbios_tables(facts: &Facts) -> Value {
    let (entry, structures) = smbios::tables(facts, smbios::STRUCTURES);
    json!({"entry": hex(&entry), "structures": hex(&structures)})
}

fn fw_cfg(facts: &Facts, root: Arc<Root>) -> Value {
    let mut files = firmware::files(facts, root);
    // As they are made for firmware that reads them before it has moved anything.
    files.prepare_all();
    let mut all = Map::new();
    for (key, bytes) in files.numbered().filter(|(key, _)| *key <= DIRECTORY) {
        all.insert(format!("{key:04x}"), json!({"bytes": hex(bytes)}));
    }
    for (name, bytes) in files.named() {
        let mut value = json!({"size": bytes.len()});
        if let (true, Some(map)) = (name != firmware::loader::GENERATION, value.as_object_mut()) {
            map.insert("bytes".to_owned(), hex(bytes).into());
        }
        all.insert(name.to_owned(), value);
    }
    Value::Object(all)
}

fn cpuid(machine: &Machine) -> Result<Value> {
    if machine.cpu_model == model::HOST {
        return Ok(Value::Null);
    }
    let mut answers = model::frozen(&machine.cpu_model)?;
    answers.set_topology(0, u32::from(machine.vcpus));
    let entries = answers.entries().map(|(leaf, subleaf, registers)| {
        let name = match subleaf {
            Some(subleaf) => format!("{leaf:08x}.{subleaf}"),
            None => format!("{leaf:08x}"),
        };
        let registers: Vec<_> = registers.iter().map(|r| format!("{r:08x}")).collect();
        (name, json!(registers))
    });
    Ok(Value::Object(entries.collect()))
}

/// By their numbers; null where the value follows something else.
fn msrs(machine: &Machine) -> Result<Value> {
    if machine.cpu_model == model::HOST {
        return Ok(Value::Null);
    }
    let vendor = model::frozen(&machine.cpu_model)?.vendor();
    let vendor = vendor.ok_or_else(|| Error::internal("a model without a vendor"))?;
    let registers = msr::registers(vendor).map(|(index, value)| {
        let value = match value {
            msr::Value::Set(value) => number(value).into(),
            msr::Value::Follows => Value::Null,
        };
        (format!("{index:08x}"), value)
    });
    Ok(Value::Object(registers.collect()))
}

/// Numbers beyond 53 bits are not JSON's.
fn number(value: u64) -> String {
    format!("{value:#x}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(change: Value) -> Machine {
        let mut all = json!({
            "machine_type": "vmbus-1", "uuid": "01234567-89ab-4cde-8f01-23456789abcd", "vcpus": 2,
            "memory": 1u64 << 30, "cpu_model": "x86-64-v2-intel-1", "rng": true, "balloon": true, "boot": null,
            "disks": [{"id": "root", "read_only": false, "serial": "one", "queues": 0}],
            "nics": [{"id": "lan", "mac": "52:54:00:12:34:56", "queues": 1}],
        });
        for (key, value) in change.as_object().unwrap() {
            all[key] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn a_description_is_the_same_each_time() {
        let text = |change| describe(&machine(change)).unwrap().to_string();
        assert_eq!(text(json!({})), text(json!({})));
        let uefi = json!({"boot": ["nic/lan", "disk/root"]});
        assert_eq!(text(uefi.clone()), text(uefi.clone()));
        assert_ne!(text(uefi), text(json!({})));
        assert_ne!(text(json!({"vcpus": 3})), text(json!({})));
    }

    #[test]
    fn it_names_what_the_guest_finds_and_where() {
        let found = describe(&machine(json!({"boot": ["disk/root"]}))).unwrap();
        let named = |name: &str| {
            let mut functions = found["pci"].as_array().unwrap().iter();
            functions.find(|function| function["name"] == name).unwrap()
        };
        assert_eq!(named("disk/root")["place"], "01.0");
        assert_eq!(named("disk/root")["virtio"]["queues"], 2);
        assert_eq!(named("nic/lan")["bars"][0]["base"], "0xc0180000");
        assert!(named("LPC bridge")["configuration"]
            .as_str()
            .unwrap()
            .starts_with("86801829"));
        let order = found["fw-cfg"]["bootorder"]["bytes"].as_str().unwrap();
        assert!(order.starts_with(&hex(b"/pci@i0cf8/scsi@1/disk@0,0\nHALT")));
        assert_eq!(found["cpuid"]["00000000"][1], "756e6547");
    }

    #[test]
    fn what_cannot_be_built_cannot_be_described() {
        for (change, argument) in [
            (json!({"machine_type": "vmbus-9"}), "machine_type"),
            (json!({"cpu_model": "486"}), "cpu_model"),
            (json!({"boot": ["disk/none"]}), "boot"),
            (json!({"uuid": "none"}), "uuid"),
        ] {
            let error = describe(&machine(change)).unwrap_err();
            assert_eq!(error.argument, argument);
        }
    }
}
