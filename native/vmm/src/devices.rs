// SPDX-License-Identifier: Apache-2.0
//! Puts a machine's PCI devices together: which there are, where they sit, and which I/O thread serves each.
//!
//! The order of the result is the order in which the control thread stops them: disks let go of their images
//! before their threads end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::json;
use vm_memory::mmap::MmapRegion;
use vmbus_qcow2::{Image, Ring};

use crate::balloon;
use crate::block::{self, Counters, ScsiUnit, Served};
use crate::bus::{Bus, BusDevice};
use crate::coders::Coders;
use crate::config::MachineType;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::hotplug::{Arrival, Hotplug};
use crate::io::{Behind, Count, IoDevice, IoUnit, Port, Trouble};
use crate::memory::GuestMemoryMmap;
use crate::net::{self, Link};
use crate::pci::host::HostBridge;
use crate::pci::lpc::LpcBridge;
use crate::pci::root::Root;
use crate::pci::root_port::{Ejected, RootPort};
use crate::pci::watchdog::Watchdog;
use crate::pci::{Function, Place, Seat, Wiring, ROOT_PORTS};
use crate::ports::{self, PortSpec};
use crate::scsi::Unit;
use crate::state::Stateful;
use crate::thread::ThreadHook;
use crate::virtio::balloon::Balloon;
use crate::virtio::console::{self, PORTS_MAX};
use crate::virtio::live::ChangingConfig;
use crate::virtio::net::{self as virtio_net, MAC, PAIRS_MAX};
use crate::virtio::pci::VirtioPci;
use crate::virtio::scsi::{self, TARGETS_MAX};
use crate::virtio::{blk, rng, vsock as virtio_vsock, Model};
use crate::vsock;

/// The most disks there are places for.
pub const DISKS_MAX: usize = 16;
/// The most network interfaces there are places for.
pub const NICS_MAX: usize = 16;
/// The name of the SCSI host adapter.
pub const SCSI: &str = "scsi";
/// The most queues of one disk.
pub const QUEUES_MAX: u16 = 16;

/// A disk of the definition, its image opened and active.
pub struct DiskSpec {
    /// Names it in events, errors and statistics.
    pub id: String,
    /// Its chain.
    pub image: Arc<Image>,
    /// The guest may not write.
    pub read_only: bool,
    /// Up to 20 printable ASCII characters.
    pub serial: String,
    /// Virtqueues, at most 16; 0 for one a vCPU.
    pub queues: u16,
    /// The hotplug slot it sits in, 1 to 8; None for a place on bus 0.
    pub slot: Option<u8>,
}

/// A disk or CD-ROM drive of the SCSI host adapter.
pub struct ScsiSpec {
    /// Names it in events, errors and statistics.
    pub id: String,
    /// Its chain, opened and active; None for a drive without a medium.
    pub image: Option<Arc<Image>>,
    /// A CD-ROM drive.
    pub cdrom: bool,
    /// The guest may not write.
    pub read_only: bool,
    /// What it says its name is.
    pub name: String,
}

impl ScsiSpec {
    /// As its guest sees it.
    fn unit(&self) -> Unit {
        let size = self.image.as_ref().map(|image| image.size());
        if self.cdrom {
            Unit::cdrom(&self.name, size)
        } else {
            Unit::disk(&self.name, size.unwrap_or(0), self.read_only)
        }
    }
}

/// A network interface of the definition, with its link.
pub struct NicSpec {
    /// Names it in events, errors and statistics.
    pub id: String,
    /// Its hardware address.
    pub mac: [u8; MAC],
    /// Queue pairs, at most 8; 0 for one a vCPU.
    pub queues: u16,
    /// The host's end.
    pub link: Link,
    /// Whether the cable is plugged in.
    pub carrier: bool,
    /// The hotplug slot it sits in, 1 to 8; None for a place on bus 0.
    pub slot: Option<u8>,
}

/// What a machine has besides the board: its devices as the definition says.
#[derive(Default)]
pub struct Parts {
    /// In the order of their places, at most [`DISKS_MAX`].
    pub disks: Vec<DiskSpec>,
    /// By target, at most [`TARGETS_MAX`]; with any there is a host adapter.
    pub scsi: Vec<ScsiSpec>,
    /// In the order of their places, at most [`NICS_MAX`].
    pub nics: Vec<NicSpec>,
    /// Named ports, at most [`PORTS_MAX`]; with any there is a device for them.
    pub ports: Vec<PortSpec>,
    /// The guest's CID; with one there is a device for sockets.
    pub vsock: Option<u32>,
    /// A watchdog.
    pub watchdog: Option<Arc<Watchdog>>,
    /// Whether there is a random number generator.
    pub rng: bool,
    /// The balloon, if there is one.
    pub balloon: Option<Arc<Balloon>>,
}

/// What devices are built on.
pub struct Board {
    /// What it shows a guest.
    pub machine_type: MachineType,
    /// KVM's part.
    pub wiring: Arc<dyn Wiring>,
    /// The guest's RAM.
    pub memory: Arc<GuestMemoryMmap>,
    /// Where memory BARs and the ECAM go.
    pub mmio: Arc<Bus>,
    /// The host bridge.
    pub host: Arc<HostBridge>,
    /// The option ROM of network interfaces, of [`crate::firmware::rom::OPTION_ROM`] bytes.
    pub nic_rom: Option<Arc<MmapRegion>>,
    /// How many vCPUs there are.
    pub vcpus: u8,
    /// Hears of an I/O thread that ended although nobody told it to.
    pub trouble: Trouble,
    /// Hears of a guest that has let go of what is in a slot.
    pub ejected: Ejected,
}

/// The devices of a machine.
pub struct Devices {
    /// Ports 0xcf8 to 0xcff, but for the reset control register.
    pub config_ports: Arc<dyn BusDevice>,
    /// As the control thread sees them.
    pub list: Vec<Arc<dyn Device>>,
    /// What comes and goes.
    pub hotplug: Hotplug,
    /// The bus they are on.
    pub root: Arc<Root>,
    /// Where each is that was there at the start, by its id, such as `disk/root`.
    pub seats: BTreeMap<String, Seat>,
    /// The targets of those that the SCSI host adapter has.
    pub targets: BTreeMap<String, u8>,
}

/// Builds them: one I/O thread for each ring, or one with plain system calls when there is none, some that help these
/// with compressed and encrypted images, one for all network interfaces, those to come included, and one for the balloon, if
/// there is one.
///
/// # Errors
/// `InvalidArgument` for more disks, interfaces or queues than there may be; `Unavailable` when the kernel gives no thread,
/// eventfd or GSI, or a ring has no room for all files.
pub fn assemble(
    board: Board,
    parts: Parts,
    rings: Vec<Ring>,
    hook: &ThreadHook,
) -> Result<Devices> {
    let Parts {
        disks,
        scsi: units_wanted,
        nics,
        ports: named,
        vsock: cid,
        watchdog,
        rng: with_rng,
        balloon,
    } = parts;
    if disks.len() > DISKS_MAX {
        return Err(Error::invalid(
            "disks",
            format!("{} disks; at most {DISKS_MAX} have a place", disks.len()),
        ));
    }
    if nics.len() > NICS_MAX {
        return Err(Error::invalid(
            "nics",
            format!("{} interfaces; at most {NICS_MAX} have a place", nics.len()),
        ));
    }
    if units_wanted.len() > TARGETS_MAX {
        return Err(Error::invalid(
            "disks",
            format!(
                "{} on the SCSI bus; at most {TARGETS_MAX} have a target",
                units_wanted.len()
            ),
        ));
    }
    let (plugged, disks): (Vec<_>, Vec<_>) = disks.into_iter().partition(|d| d.slot.is_some());
    let mut arrivals: Vec<(u8, Arrival)> = Vec::new();
    arrivals.extend(
        plugged
            .into_iter()
            .filter_map(|d| Some((d.slot?, Arrival::Disk(d)))),
    );
    let (plugged, nics): (Vec<_>, Vec<_>) = nics.into_iter().partition(|n| n.slot.is_some());
    arrivals.extend(
        plugged
            .into_iter()
            .filter_map(|n| Some((n.slot?, Arrival::Nic(n)))),
    );
    let mut images = disks.iter().map(|disk| &disk.image);
    let mut media = units_wanted.iter().filter_map(|unit| unit.image.as_ref());
    let mut later = arrivals.iter().filter_map(|(_, arrival)| match arrival {
        Arrival::Disk(disk) => Some(&disk.image),
        Arrival::Nic(_) => None,
    });
    let coded = |image: &Arc<Image>| image.is_coded();
    let coders = match images.any(coded) || media.any(coded) || later.any(coded) {
        true => Coders::new(board.vcpus, hook)?,
        false => None,
    };
    let mut rings: Vec<Option<Ring>> = rings.into_iter().map(Some).collect();
    if rings.is_empty() {
        rings.push(None);
    }
    // What each thread will serve, and what becomes of the ports it gives for that.
    let mut shares: Vec<Vec<(Served, Endpoint)>> = rings.iter().map(|_| Vec::new()).collect();
    for (index, disk) in disks.into_iter().enumerate() {
        let endpoint = disk_endpoint(&board, index, &disk)?;
        let place = index % shares.len();
        if let Some(share) = shares.get_mut(place) {
            share.push(endpoint);
        }
    }
    if let Some(share) = shares.first_mut().filter(|_| with_rng) {
        let endpoint = Endpoint {
            id: "rng".to_owned(),
            seat: Seat::Bus0(Place::RNG),
            model: rng::model(),
            counters: None,
            rom: None,
            behind: Behind::default(),
        };
        share.push((Served::Rng, endpoint));
    }

    let targets: BTreeMap<_, _> = units_wanted
        .iter()
        .zip(0u8..)
        .map(|(unit, target)| (format!("disk/{}", unit.id), target))
        .collect();
    let mut units: Vec<IoUnit> = Vec::new();
    if let Some(share) = shares.last_mut().filter(|_| !units_wanted.is_empty()) {
        let served = units_wanted.into_iter().map(|spec| {
            let counters = Arc::new(Counters::default());
            let medium = Arc::new(Mutex::new(spec.image.clone()));
            let unit = spec.unit();
            units.push(IoUnit {
                id: format!("disk/{}", spec.id),
                same: json!({ "read-only": spec.read_only, "cdrom": spec.cdrom, "name": spec.name }),
                medium: medium.clone(),
                counters: counters.clone(),
                changed: Arc::clone(&counters.changed),
            });
            ScsiUnit {
                unit,
                medium,
                counters,
            }
        });
        let served = Served::Scsi(served.collect());
        let queues = u16::from(board.vcpus).clamp(1, scsi::QUEUES_MAX);
        let endpoint = Endpoint {
            id: SCSI.to_owned(),
            seat: Seat::Bus0(Place::SCSI),
            model: scsi::model(queues),
            counters: None,
            rom: None,
            behind: Behind::default(),
        };
        share.push((served, endpoint));
    }

    let mut functions: Vec<(Place, Arc<dyn Function>)> =
        vec![(Place::LPC, Arc::new(LpcBridge::new(board.machine_type)))];
    let mut list: Vec<Arc<dyn Device>> = Vec::new();
    let mut threads = Vec::new();
    let mut served_by = Vec::new();
    for (index, (ring, share)) in rings.into_iter().zip(shares).enumerate() {
        let (served, endpoints): (Vec<_>, Vec<_>) = share.into_iter().unzip();
        let pool = coders.as_ref().map(|coders| coders.pool().clone());
        let (thread, ports) = block::start(index, ring, served, pool, hook, &board.trouble)?;
        threads.push(Arc::new(thread));
        served_by.extend(endpoints.into_iter().zip(ports));
    }
    let share = (0..)
        .zip(nics)
        .map(|(index, nic)| nic_endpoint(&board, index, nic));
    let share = share.collect::<Result<Vec<_>>>()?;
    let (served, endpoints): (Vec<_>, Vec<_>) = share.into_iter().unzip();
    let (network, ports) = net::start(served, hook, &board.trouble)?;
    let network = Arc::new(network);
    served_by.extend(endpoints.into_iter().zip(ports));
    let mut others: Vec<Arc<dyn Device>> = Vec::new();
    if let Some(balloon) = balloon {
        let (thread, ports) = balloon::start(balloon.clone(), hook, &board.trouble)?;
        let endpoint = Endpoint {
            id: "balloon".to_owned(),
            seat: Seat::Bus0(Place::BALLOON),
            model: balloon.model(),
            counters: Some(balloon),
            rom: None,
            behind: Behind::default(),
        };
        served_by.extend([endpoint].into_iter().zip(ports));
        others.push(Arc::new(thread));
    }
    if named.len() > PORTS_MAX {
        return Err(Error::invalid(
            "ports",
            format!("{} ports; at most {PORTS_MAX} fit", named.len()),
        ));
    }
    if !named.is_empty() {
        let model = console::model(named.len());
        let names: Vec<_> = named.iter().map(|port| port.name.clone()).collect();
        let (thread, ports, counters) = ports::start(named, hook, &board.trouble)?;
        let endpoint = Endpoint {
            id: "ports".to_owned(),
            seat: Seat::Bus0(Place::PORTS),
            model,
            counters: Some(counters),
            rom: None,
            behind: Behind {
                same: json!({ "names": names }),
                ..Behind::default()
            },
        };
        served_by.extend([endpoint].into_iter().zip(ports));
        others.push(Arc::new(thread));
    }
    if let Some(cid) = cid {
        let (thread, ports, counters) = vsock::start(cid, hook, &board.trouble)?;
        let endpoint = Endpoint {
            id: "vsock".to_owned(),
            seat: Seat::Bus0(Place::VSOCK),
            model: virtio_vsock::model(cid),
            counters: Some(counters),
            rom: None,
            behind: Behind {
                same: json!({ "cid": cid }),
                ..Behind::default()
            },
        };
        served_by.extend([endpoint].into_iter().zip(ports));
        others.push(Arc::new(thread));
    }
    let mut seats = BTreeMap::new();
    for (endpoint, port) in served_by {
        seats.insert(endpoint.id.clone(), endpoint.seat);
        let Seat::Bus0(place) = endpoint.seat else {
            continue;
        };
        functions.push((place, endpoint.function(&board, &port)?));
        if endpoint.id == SCSI {
            let behind = units.drain(..).enumerate();
            list.extend(behind.map(|(number, unit)| unit.device(port.clone(), number)));
        }
        let device = IoDevice::new(endpoint.id, port, endpoint.counters, endpoint.behind);
        list.push(Arc::new(device));
    }
    if let Some(watchdog) = watchdog {
        functions.push((Place::WATCHDOG, watchdog.clone()));
        list.push(watchdog);
    }
    let root_ports = (0..ROOT_PORTS)
        .map(|index| {
            RootPort::new(board.wiring.clone(), index, board.ejected.clone()).map(Arc::new)
        })
        .collect::<Result<Vec<_>>>()?;
    let root = Root::new(
        board.host.clone(),
        functions,
        root_ports.clone(),
        &board.mmio,
    )?;
    let config_ports = root.config_ports();
    let mut hotplug = Hotplug::new(
        board,
        root.clone(),
        root_ports,
        threads.clone(),
        network.clone(),
    );
    for (slot, arrival) in arrivals {
        let device = hotplug.attach(slot, arrival)?;
        seats.insert(device.id(), Seat::Slot(slot.wrapping_sub(1)));
        list.push(device);
    }
    // What is in a slot from the beginning is no news to the guest, at the first start as at every other.
    root.reset();
    list.push(Arc::new(PciDevice(root.clone())));
    list.extend(threads.into_iter().map(|thread| thread as Arc<dyn Device>));
    list.push(network);
    list.extend(others);
    list.extend(coders.map(|coders| Arc::new(coders) as Arc<dyn Device>));
    Ok(Devices {
        config_ports,
        list,
        hotplug,
        root,
        seats,
        targets,
    })
}

/// A device between its thread and its place on the bus.
pub(crate) struct Endpoint {
    /// Its name in events and statistics.
    pub(crate) id: String,
    seat: Seat,
    model: Model,
    /// What has happened.
    pub(crate) counters: Option<Arc<dyn Count>>,
    rom: Option<Arc<MmapRegion>>,
    /// What of it is saved besides its function.
    pub(crate) behind: Behind,
}

impl Endpoint {
    /// Its place on the bus, as `port` serves it.
    pub(crate) fn function(&self, board: &Board, port: &Port) -> Result<Arc<dyn Function>> {
        Ok(Arc::new(VirtioPci::new(
            self.seat,
            self.model.clone(),
            board.wiring.clone(),
            board.memory.clone(),
            Arc::new(port.clone()),
            self.rom.clone(),
        )?))
    }
}

fn seat(slot: Option<u8>, place: Place) -> Seat {
    slot.map_or(Seat::Bus0(place), |number| {
        Seat::Slot(number.wrapping_sub(1))
    })
}

pub(crate) fn disk_endpoint(
    board: &Board,
    index: usize,
    spec: &DiskSpec,
) -> Result<(Served, Endpoint)> {
    let queues = match spec.queues {
        0 => u16::from(board.vcpus).clamp(1, QUEUES_MAX),
        1..=QUEUES_MAX => spec.queues,
        queues => {
            return Err(Error::invalid(
                format!("disks[{index}].queues"),
                format!("{queues} is more than {QUEUES_MAX}"),
            ))
        }
    };
    let disk = blk::Disk::new(spec.image.size(), spec.read_only, &spec.serial);
    let counters = Arc::new(Counters::default());
    let (model, config) = changing(disk.model(queues));
    let endpoint = Endpoint {
        id: format!("disk/{}", spec.id),
        seat: seat(spec.slot, Place::disk(index as u8)),
        model,
        counters: Some(counters.clone()),
        rom: None,
        behind: Behind {
            same: json!({ "read-only": spec.read_only, "serial": spec.serial }),
            image: Some(spec.image.clone()),
            changed: Arc::clone(&counters.changed),
        },
    };
    let served = Served::Disk {
        disk,
        config,
        image: spec.image.clone(),
        counters,
    };
    Ok((served, endpoint))
}

/// A device whose configuration the thread that serves it changes.
fn changing(mut model: Model) -> (Model, Arc<ChangingConfig>) {
    let config = Arc::new(ChangingConfig::new(model.config.clone()));
    model.live = Some(config.clone());
    (model, config)
}

pub(crate) fn nic_endpoint(
    board: &Board,
    index: u8,
    spec: NicSpec,
) -> Result<(net::Served, Endpoint)> {
    let pairs = match spec.queues {
        0 => u16::from(board.vcpus).clamp(1, PAIRS_MAX),
        1..=PAIRS_MAX => spec.queues,
        queues => {
            return Err(Error::invalid(
                format!("nics[{index}].queues"),
                format!("{queues} is more than {PAIRS_MAX}"),
            ))
        }
    };
    let counters = Arc::new(net::Counters::new(pairs));
    let (model, config) = changing(virtio_net::model(spec.mac, pairs, spec.carrier));
    let endpoint = Endpoint {
        id: format!("nic/{}", spec.id),
        seat: seat(spec.slot, Place::nic(index)),
        model,
        counters: Some(counters.clone()),
        rom: board.nic_rom.clone(),
        behind: Behind {
            same: json!({ "mac": spec.mac, "pairs": pairs }),
            ..Behind::default()
        },
    };
    let served = net::Served {
        link: spec.link,
        carrier: spec.carrier,
        config,
        mac: spec.mac,
        pairs,
        counters,
    };
    Ok((served, endpoint))
}

/// The whole bus, which a reset of the machine resets.
struct PciDevice(Arc<Root>);

impl Device for PciDevice {
    fn id(&self) -> String {
        "pci".to_owned()
    }

    fn stateful(&self) -> Option<&dyn Stateful> {
        Some(self.0.as_ref())
    }

    fn reset(&self) {
        self.0.reset();
    }
}
