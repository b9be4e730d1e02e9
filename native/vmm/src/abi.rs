// SPDX-License-Identifier: Apache-2.0
//! All that a guest can see of a machine, as JSON: what a machine type promises not to change.
//!
//! It follows from the machine type and the definition alone. Nothing here asks KVM, the host or a file: devices are built on
//! a wiring that connects nothing, their configuration spaces read as a guest would, tables made as for a guest. So
//! two hosts and two versions of vmbus can be compared by comparing texts: keys are sorted, bytes are hexadecimal.
//!
//! Left out: what differs from start to start (the generation ID, the clock) and from host to host (CPU model `host`); the
//! contents of firmware, which its store keeps; MSRs, which follow KVM's and the CPU model.

use std::collections::BTreeMap;
use std::sync::mpsc::{channel, Receiver};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{json, Map, Value};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi;
use crate::bus::Bus;
use crate::config::DiskBus;
use crate::cpu::model;
use crate::devices::{DISKS_MAX, NICS_MAX, QUEUES_MAX, SCSI};
use crate::error::{Error, Kind, Result};
use crate::firmware::{self, rom, shadow, smbios, BootDevice, Facts};
use crate::irq::MsiMessage;
use crate::layout;
use crate::memory::{self, MapKind};
use crate::nics;
use crate::pci::config::{COMMAND, COMMAND_MEMORY};
use crate::pci::host::HostBridge;
use crate::pci::lpc::LpcBridge;
use crate::pci::root::Root;
use crate::pci::root_port::RootPort;
use crate::pci::watchdog::Watchdog;
use crate::pci::{Function, Place, Seat, Wiring, ROOT_PORTS};
use crate::scsi::cdb::{self, Cdb};
use crate::scsi::{Outcome, Unit, INQUIRY};
use crate::virtio::balloon::Balloon;
use crate::virtio::net::PAIRS_MAX;
use crate::virtio::pci::VirtioPci;
use crate::virtio::{blk, console, net, rng, scsi, vsock, Activation, Backend, Model};

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
}

/// A disk.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    id: String,
    read_only: bool,
    serial: String,
    queues: u16,
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
}

/// Connects nothing: a description raises no interrupt.
struct Nowhere;

impl Wiring for Nowhere {
    fn watch(&self, _: &EventFd, _: u64) -> Result<()> {
        Ok(())
    }
    fn unwatch(&self, _: &EventFd, _: u64) {}
    fn show_rom(&self, _: Seat, _: Option<(u64, Arc<MmapRegion>)>) -> Result<()> {
        Ok(())
    }
    fn allocate(&self) -> Result<u32> {
        Ok(layout::GSI_MSI_FIRST)
    }
    fn connect(&self, _: &EventFd, _: u32) -> Result<()> {
        Ok(())
    }
    fn release(&self, _: &EventFd, _: u32) {}
    fn route(&self, _: u32, _: MsiMessage) -> Result<()> {
        Ok(())
    }
}

impl Backend for Nowhere {
    fn start(&self, _: Activation) {}
    fn stop(&self) -> Receiver<()> {
        channel().1
    }
    fn saved(&self) -> Receiver<Option<crate::virtio::Served>> {
        channel().1
    }
}

/// A function with what virtio says of it.
type Described = (Place, String, Arc<dyn Function>, Option<Model>);

/// Describes `machine`.
///
/// # Errors
/// `InvalidArgument` and `NotSupported` as for building it.
pub fn describe(machine: &Machine) -> Result<Value> {
    if machine.machine_type != crate::config::MACHINE_TYPE {
        let message = format!("{:?} is not known", machine.machine_type);
        return Err(Error::new(Kind::NotSupported, "machine_type", message));
    }
    let host = Arc::new(HostBridge::new(
        layout::ECAM_START,
        match machine.boot {
            Some(_) => shadow::ALL_FIRMWARE,
            None => shadow::ALL_RAM,
        },
        Box::new(|_| ()),
    ));
    let functions = functions(machine)?;
    let mut all: Vec<_> = functions
        .iter()
        .map(|(p, _, f, _)| (*p, f.clone()))
        .collect();
    let ports: Vec<_> = (0..ROOT_PORTS)
        .map(|index| RootPort::new(Arc::new(Nowhere), index, Arc::new(|_| ())).map(Arc::new))
        .collect::<Result<_>>()?;
    let mut pci = vec![function(Place::HOST, "host bridge", host.as_ref(), None)];
    for (place, name, device, model) in &functions {
        pci.push(function(*place, name, device.as_ref(), model.as_ref()));
    }
    for (index, port) in (0..).zip(&ports) {
        let name = format!("root port, slot {}", index + 1);
        pci.push(function(
            Place::root_port(index),
            &name,
            port.as_ref(),
            None,
        ));
    }
    all.sort_by_key(|(place, _)| *place);
    let root = Root::new(host, all, ports, &Bus::new())?;
    let facts = facts(machine, &functions)?;
    Ok(json!({
        "machine-type": machine.machine_type,
        "memory-map": memory_map(machine.memory),
        "places": places(),
        "ports": ports_table(),
        "pci": pci,
        "acpi": tables(machine, &root)?,
        "smbios": smbios_tables(&facts),
        "fw-cfg": fw_cfg(&facts, root),
        "cpuid": cpuid(machine)?,
        "scsi": units(machine),
        "port-names": machine.ports,
    }))
}

/// What the units of the SCSI host adapter say they are, by target: all that INQUIRY has.
fn units(machine: &Machine) -> Value {
    let scsi = machine.disks.iter().filter(|disk| disk.is_scsi());
    let describe = |disk: &Disk| {
        let mut unit = disk.unit();
        let mut pages = Map::new();
        let mut ask = |page: Option<u8>| {
            let mut cdb = [0; cdb::LEN];
            let start = [INQUIRY, u8::from(page.is_some()), page.unwrap_or(0), 1, 0];
            cdb.iter_mut().zip(start).for_each(|(to, from)| *to = from);
            match unit.command(&Cdb(cdb), &[]) {
                Outcome::Good(bytes) => Some(hex(&bytes)),
                _ => None,
            }
        };
        let inquiry = ask(None);
        for page in 0..=u8::MAX {
            if let Some(bytes) = ask(Some(page)) {
                pages.insert(format!("{page:02x}"), json!(bytes));
            }
        }
        json!({ "id": disk.id, "inquiry": inquiry, "pages": pages })
    };
    scsi.map(describe).collect()
}

fn functions(machine: &Machine) -> Result<Vec<Described>> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])
        .map_err(|e| Error::internal(format!("a page of memory: {e}")))?;
    let memory = Arc::new(memory);
    let rom = match (&machine.boot, machine.nics.is_empty()) {
        (Some(_), false) => Some(rom::mapping(&[], rom::OPTION_ROM)?),
        _ => None,
    };
    let virtio = |place: Place, name: String, model: Model, rom: Option<Arc<MmapRegion>>| {
        let device = VirtioPci::new(
            Seat::Bus0(place),
            model.clone(),
            Arc::new(Nowhere),
            memory.clone(),
            Arc::new(Nowhere),
            rom,
        )?;
        Ok::<Described, Error>((place, name, Arc::new(device), Some(model)))
    };
    let scsi = machine.disks.iter().filter(|disk| disk.is_scsi()).count();
    let block = machine.disks.len().saturating_sub(scsi);
    if scsi > scsi::TARGETS_MAX || block > DISKS_MAX || machine.nics.len() > NICS_MAX {
        return Err(Error::invalid(
            "disks",
            "more devices than there are places",
        ));
    }
    let queues = |wanted: u16, most: u16| match wanted {
        0 => u16::from(machine.vcpus).clamp(1, most),
        wanted => wanted.min(most),
    };
    let mut all: Vec<Described> = Vec::new();
    let block = machine.disks.iter().filter(|disk| !disk.is_scsi());
    for (index, disk) in (0..).zip(block) {
        let model =
            blk::Disk::new(0, disk.read_only, &disk.serial).model(queues(disk.queues, QUEUES_MAX));
        all.push(virtio(
            Place::disk(index),
            format!("disk/{}", disk.id),
            model,
            None,
        )?);
    }
    for (index, nic) in (0..).zip(&machine.nics) {
        let mac = nics::address(&nic.mac)
            .ok_or_else(|| Error::invalid("nics", format!("{:?} is no address", nic.mac)))?;
        let model = net::model(mac, queues(nic.queues, PAIRS_MAX), true);
        let name = format!("nic/{}", nic.id);
        all.push(virtio(Place::nic(index), name, model, rom.clone())?);
    }
    if machine.disks.iter().any(Disk::is_scsi) {
        let model = scsi::model(u16::from(machine.vcpus).clamp(1, scsi::QUEUES_MAX));
        all.push(virtio(Place::SCSI, SCSI.to_owned(), model, None)?);
    }
    if machine.watchdog {
        let watchdog: Arc<dyn Function> = Arc::new(Watchdog::new()?);
        all.push((Place::WATCHDOG, "watchdog".to_owned(), watchdog, None));
    }
    if !machine.ports.is_empty() {
        let model = console::model(machine.ports.len());
        all.push(virtio(Place::PORTS, "ports".to_owned(), model, None)?);
    }
    if let Some(cid) = machine.vsock {
        all.push(virtio(
            Place::VSOCK,
            "vsock".to_owned(),
            vsock::model(cid),
            None,
        )?);
    }
    if machine.rng {
        all.push(virtio(Place::RNG, "rng".to_owned(), rng::model(), None)?);
    }
    if machine.balloon {
        let model = Balloon::new(machine.memory)?.model();
        all.push(virtio(Place::BALLOON, "balloon".to_owned(), model, None)?);
    }
    let bridge: Arc<dyn Function> = Arc::new(LpcBridge::new());
    all.push((Place::LPC, "LPC bridge".to_owned(), bridge, None));
    Ok(all)
}

fn function(place: Place, name: &str, device: &dyn Function, model: Option<&Model>) -> Value {
    let mut space = [0; 256];
    for (register, word) in (0u16..).step_by(4).zip(space.chunks_mut(4)) {
        device.config_read(register, word);
    }
    // A BAR has its address from the beginning, and shows it once its function decodes memory.
    device.config_write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    let windows = device.windows();
    device.reset();
    let bars: Vec<_> = windows
        .iter()
        .map(|window| json!({"bar": window.bar, "base": number(window.base), "size": window.size}))
        .collect();
    let mut value = json!({
        "place": format!("{:02x}.{}", place.device, place.function),
        "name": name,
        "configuration": hex(&space),
        "bars": bars,
    });
    if let (Some(model), Some(map)) = (model, value.as_object_mut()) {
        let virtio = json!({
            "type": model.device_type,
            "features": number(model.features),
            "queues": model.queues,
            "queue-size": model.queue_size,
            "configuration": hex(&model.config),
        });
        map.insert("virtio".to_owned(), virtio);
    }
    value
}

fn facts(machine: &Machine, functions: &[Described]) -> Result<Facts> {
    let places: BTreeMap<&str, Place> = functions
        .iter()
        .map(|(place, name, _, _)| (name.as_str(), *place))
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
        let place = places.get(id.as_str()).copied();
        match (place, id.split_once('/')) {
            (Some(place), Some(("disk", _))) => Ok(BootDevice::Disk(Seat::Bus0(place))),
            (Some(place), Some(("nic", _))) => Ok(BootDevice::Network(Seat::Bus0(place))),
            _ => Err(Error::invalid("boot", format!("{id:?} is no device"))),
        }
    });
    Ok(Facts {
        machine_type: machine.machine_type.clone(),
        uuid: crate::config::uuid_bytes(&machine.uuid)?,
        vcpus: machine.vcpus,
        memory: machine.memory,
        boot: boot.collect::<Result<_>>()?,
        menu: false,
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
    let files = firmware::files(facts, root);
    let made_late = [
        firmware::loader::RSDP,
        firmware::loader::TABLES,
        firmware::loader::COMMANDS,
        firmware::loader::GENERATION,
    ];
    let files = files.named().map(|(name, bytes)| {
        let mut value = json!({"size": bytes.len()});
        if let (false, Some(map)) = (made_late.contains(&name), value.as_object_mut()) {
            map.insert("bytes".to_owned(), hex(bytes).into());
        }
        (name.to_owned(), value)
    });
    Value::Object(files.collect())
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
            "machine_type": "vmbus-0", "uuid": "01234567-89ab-4cde-8f01-23456789abcd", "vcpus": 2,
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
