// SPDX-License-Identifier: Apache-2.0
//! The devices of a machine that is described: built as for a machine, on a wiring that connects nothing, and read as a
//! guest would.

use std::sync::mpsc::{channel, Receiver};
use std::sync::Arc;

use serde_json::{json, Map, Value};
use vm_memory::mmap::MmapRegion;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{hex, number, Disk, Machine};
use crate::config::MachineType;
use crate::devices::{DISKS_MAX, NICS_MAX, QUEUES_MAX, SCSI};
use crate::error::{Error, Result};
use crate::firmware::rom;
use crate::irq::MsiMessage;
use crate::layout;
use crate::memory::GuestMemoryMmap;
use crate::nics;
use crate::pci::config::{COMMAND, COMMAND_MEMORY, MULTIFUNCTION, SPACE};
use crate::pci::host::HostBridge;
use crate::pci::lpc::LpcBridge;
use crate::pci::root_port::RootPort;
use crate::pci::watchdog::Watchdog;
use crate::pci::{Function, Place, Seat, Wiring};
use crate::scsi::cdb::{self, Cdb};
use crate::scsi::{Outcome, INQUIRY};
use crate::virtio::balloon::Balloon;
use crate::virtio::net::PAIRS_MAX;
use crate::virtio::pci::VirtioPci;
use crate::virtio::{blk, console, net, rng, scsi, vsock, Activation, Backend, Model};

/// The header type, and the BAR of an endpoint's option ROM (PCI 3.0, 6.1).
const HEADER_TYPE: u16 = 0x0e;
const ROM_BAR: u16 = 0x30;
/// Bytes of a function's configuration space (PCIe 3.0, 7.2).
const EXTENDED_SPACE: usize = 4096;

/// Connects nothing: a description raises no interrupt.
pub(super) struct Nowhere;

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

/// A device, where it is, and what virtio says of it.
pub(super) struct Described {
    pub(super) seat: Seat,
    pub(super) name: String,
    pub(super) function: Arc<dyn Function>,
    model: Option<Model>,
}

impl Described {
    pub(super) fn describe(&self) -> Value {
        let place = match self.seat {
            Seat::Bus0(place) => text(place),
            Seat::Slot(index) => format!("slot {}", u16::from(index).saturating_add(1)),
        };
        function(
            place,
            &self.name,
            self.function.as_ref(),
            self.model.as_ref(),
        )
    }
}

/// The host bridge.
pub(super) fn host(bridge: &HostBridge) -> Value {
    function(text(Place::HOST), "host bridge", bridge, None)
}

/// Root port `index`.
pub(super) fn root_port(index: u8, port: &RootPort) -> Value {
    let name = format!("root port, slot {}", u16::from(index).saturating_add(1));
    function(text(Place::root_port(index)), &name, port, None)
}

fn text(place: Place) -> String {
    format!("{:02x}.{}", place.device, place.function)
}

/// All but the host bridge and the root ports.
///
/// # Errors
/// As for building the machine.
pub(super) fn all(machine: &Machine, machine_type: MachineType) -> Result<Vec<Described>> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)])
        .map_err(|e| Error::internal(format!("a page of memory: {e}")))?;
    let memory = Arc::new(memory);
    let rom = machine.boot.as_ref();
    let rom = rom
        .map(|_| rom::mapping(&[], rom::OPTION_ROM))
        .transpose()?;
    let virtio = |seat: Seat, name: String, model: Model, rom: Option<Arc<MmapRegion>>| {
        let device = VirtioPci::new(
            seat,
            model.clone(),
            Arc::new(Nowhere),
            memory.clone(),
            Arc::new(Nowhere),
            rom,
        )?;
        Ok::<_, Error>(Described {
            seat,
            name,
            function: Arc::new(device),
            model: Some(model),
        })
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
    let mut all = Vec::new();
    let mut places = (0..).map(Place::disk);
    for disk in machine.disks.iter().filter(|disk| !disk.is_scsi()) {
        let seat = seat(disk.slot, &mut places);
        let queues = queues(disk.queues, QUEUES_MAX);
        let model = blk::Disk::new(0, disk.read_only, &disk.serial).model(queues);
        all.push(virtio(seat, format!("disk/{}", disk.id), model, None)?);
    }
    let mut places = (0..).map(Place::nic);
    for nic in &machine.nics {
        let seat = seat(nic.slot, &mut places);
        let mac = nics::address(&nic.mac)
            .ok_or_else(|| Error::invalid("nics", format!("{:?} is no address", nic.mac)))?;
        let model = net::model(mac, queues(nic.queues, PAIRS_MAX), true);
        all.push(virtio(seat, format!("nic/{}", nic.id), model, rom.clone())?);
    }
    let mut add = |place: Place, name: &str, model: Model| {
        all.push(virtio(Seat::Bus0(place), name.to_owned(), model, None)?);
        Ok::<_, Error>(())
    };
    if machine.disks.iter().any(Disk::is_scsi) {
        let model = scsi::model(u16::from(machine.vcpus).clamp(1, scsi::QUEUES_MAX));
        add(Place::SCSI, SCSI, model)?;
    }
    if !machine.ports.is_empty() {
        add(Place::PORTS, "ports", console::model(machine.ports.len()))?;
    }
    if let Some(cid) = machine.vsock {
        add(Place::VSOCK, "vsock", vsock::model(cid))?;
    }
    if machine.rng {
        add(Place::RNG, "rng", rng::model())?;
    }
    if machine.balloon {
        let model = Balloon::new(machine.memory)?.model();
        add(Place::BALLOON, "balloon", model)?;
    }
    let mut add = |place: Place, name: &str, function: Arc<dyn Function>| {
        all.push(Described {
            seat: Seat::Bus0(place),
            name: name.to_owned(),
            function,
            model: None,
        });
    };
    if machine.watchdog {
        add(Place::WATCHDOG, "watchdog", Arc::new(Watchdog::new()?));
    }
    add(
        Place::LPC,
        "LPC bridge",
        Arc::new(LpcBridge::new(machine_type)),
    );
    Ok(all)
}

/// Where a device is: in the slot that it names, or at the next of its kind's places.
fn seat(slot: u8, places: &mut impl Iterator<Item = Place>) -> Seat {
    match slot.checked_sub(1) {
        Some(index) => Seat::Slot(index),
        None => Seat::Bus0(places.next().unwrap_or(Place::HOST)),
    }
}

/// Bytes of the option ROM, as who writes ones to its BAR learns it; 0 for none. Bridges have theirs elsewhere, and none here.
fn rom_size(device: &dyn Function) -> u32 {
    let (mut header, mut bar) = ([0], [0; 4]);
    device.config_read(HEADER_TYPE, &mut header);
    if header[0] & !MULTIFUNCTION != 0 {
        return 0;
    }
    device.config_write(ROM_BAR, &(!1u32).to_le_bytes());
    device.config_read(ROM_BAR, &mut bar);
    u32::from_le_bytes(bar).wrapping_neg()
}

fn function(place: String, name: &str, device: &dyn Function, model: Option<&Model>) -> Value {
    let mut space = vec![0; EXTENDED_SPACE];
    for (register, word) in (0u16..).step_by(4).zip(space.chunks_mut(4)) {
        device.config_read(register, word);
    }
    while space.len() > SPACE && space.ends_with(&[0; 4]) {
        space.truncate(space.len().saturating_sub(4));
    }
    // A BAR has its address from the beginning, and shows it once its function decodes memory.
    device.config_write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
    let windows = device.windows();
    let rom = rom_size(device);
    device.reset();
    let bars: Vec<_> = windows
        .iter()
        .map(|window| json!({"bar": window.bar, "base": number(window.base), "size": window.size}))
        .collect();
    let mut value = json!({
        "place": place,
        "name": name,
        "configuration": hex(&space),
        "bars": bars,
        "rom-size": rom,
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

/// What the units of the SCSI host adapter say they are, by target: all that INQUIRY has.
pub(super) fn units(machine: &Machine) -> Value {
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
