// SPDX-License-Identifier: Apache-2.0
//! Devices in the slots of root ports: they come and go while the machine runs.
//!
//! | step | who | what |
//! |---|---|---|
//! | attach | control thread | an I/O thread serves the device, the function is put into its slot, the guest is told |
//! | ask back | control thread | the port's attention button is pressed |
//! | ejected | vCPU | the guest has let go: the control thread hears |
//! | remove | control thread | the guest is told, the device is reset, flushed and closed |
//!
//! All threads were started with the machine, and serve what comes; so nothing here needs a call that the sandbox
//! has closed. A slot's number is part of the definition, so a device is where it was when the machine starts anew.

use std::sync::Arc;

use crate::device::Device;
use crate::devices::{disk_endpoint, nic_endpoint, Board, DiskSpec, NicSpec};
use crate::error::{Error, Kind, Result};
use crate::io::{IoDevice, IoThread, Newcomer};
use crate::pci::root::Root;
use crate::pci::root_port::RootPort;

/// A device on its way into a slot.
pub enum Arrival {
    /// A disk, its image opened and active.
    Disk(DiskSpec),
    /// A network interface.
    Nic(NicSpec),
}

/// What is in a slot.
struct Occupant {
    /// 0 to 7.
    slot: u8,
    device: Arc<IoDevice>,
}

/// The slots, and what it takes to fill them.
pub struct Hotplug {
    board: Board,
    root: Arc<Root>,
    ports: Vec<Arc<RootPort>>,
    disks: Vec<Arc<IoThread>>,
    network: Arc<IoThread>,
    occupants: Vec<Occupant>,
}

impl Hotplug {
    pub(crate) fn new(
        board: Board,
        root: Arc<Root>,
        ports: Vec<Arc<RootPort>>,
        disks: Vec<Arc<IoThread>>,
        network: Arc<IoThread>,
    ) -> Hotplug {
        Hotplug {
            board,
            root,
            ports,
            disks,
            network,
            occupants: Vec::new(),
        }
    }

    /// Puts a device into slot `number`, 1 to 8, and tells the guest. The device comes back, for the list of those
    /// that are paused, reset and stopped.
    ///
    /// # Errors
    /// `InvalidArgument` for a slot that there is not, an id that is taken or too many queues; `InvalidState` for
    /// a slot in use; `Unavailable` when the kernel has no more interrupts or the thread no more room.
    pub fn attach(&mut self, number: u8, arrival: Arrival) -> Result<Arc<dyn Device>> {
        let slot = number
            .checked_sub(1)
            .filter(|slot| usize::from(*slot) < self.ports.len())
            .ok_or_else(|| {
                let message = format!("{number} is no slot; they are 1 to {}", self.ports.len());
                Error::invalid("slot", message)
            })?;
        let board = &self.board;
        let (newcomer, endpoint, thread) = match arrival {
            Arrival::Disk(spec) => {
                let threads = self.disks.len().max(1);
                let thread = self.disks.get(usize::from(slot) % threads);
                let (served, endpoint) = disk_endpoint(board, 0, &spec)?;
                let thread = thread.ok_or_else(|| Error::internal("no I/O thread for disks"))?;
                (Newcomer::Block(served), endpoint, thread)
            }
            Arrival::Nic(spec) => {
                let (served, endpoint) = nic_endpoint(board, 0, spec)?;
                (Newcomer::Network(served), endpoint, &self.network)
            }
        };
        if self.occupants.iter().any(|o| o.device.id() == endpoint.id) {
            let message = format!("{} is attached already", endpoint.id);
            return Err(Error::new(Kind::InvalidState, "id", message));
        }
        let port = thread.add(newcomer)?;
        let device = Arc::new(IoDevice::new(
            endpoint.id.clone(),
            port.clone(),
            endpoint.counters.clone(),
            endpoint.behind.clone(),
        ));
        let function = endpoint.function(board, &port);
        match function.and_then(|function| self.root.plug(slot, function)) {
            Ok(()) => {
                let occupant = Occupant {
                    slot,
                    device: device.clone(),
                };
                self.occupants.push(occupant);
                Ok(device)
            }
            Err(error) => {
                // The guest has never seen it.
                let _ = device.pause().and_then(|()| device.stop());
                Err(error)
            }
        }
    }

    /// Asks the guest to let go of device `id`, such as `nic/lan`.
    ///
    /// # Errors
    /// `InvalidArgument` when nothing of that name is in a slot.
    pub fn ask_back(&self, id: &str) -> Result<()> {
        self.port(id).map(|port| port.ask_back())
    }

    /// Takes the question back.
    ///
    /// # Errors
    /// As [`Hotplug::ask_back`].
    pub fn take_back_the_question(&self, id: &str) -> Result<()> {
        self.port(id).map(|port| port.take_back_the_question())
    }

    /// Takes what is in slot index `slot` out of it and closes it; vCPUs may be running. Its name comes back, and
    /// what went wrong when it was flushed.
    pub fn remove(&mut self, slot: u8) -> Option<(String, Result<()>)> {
        let place = self.occupants.iter().position(|o| o.slot == slot)?;
        let Occupant { device, .. } = self.occupants.swap_remove(place);
        if let Some(function) = self.root.unplug(slot) {
            // Its queues go; nothing of it is in flight any more.
            function.reset();
        }
        let closed = device.pause().and_then(|()| device.stop());
        Some((device.id(), closed))
    }

    fn port(&self, id: &str) -> Result<&RootPort> {
        let occupant = self.occupants.iter().find(|o| o.device.id() == id);
        let port = occupant.and_then(|o| self.ports.get(usize::from(o.slot)));
        port.map(Arc::as_ref).ok_or_else(|| {
            let message = format!("{id} is in no slot; only what is in one can be detached");
            Error::new(Kind::InvalidArgument, "id", message)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Mutex;

    use crate::memory::GuestMemoryMmap;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::bus::Bus;
    use crate::config::MachineType;
    use crate::devices::{assemble, Devices, Parts};
    use crate::layout::ECAM_START;
    use crate::net::{Link, Tap};
    use crate::pci::testing::{host_bridge, FakeWiring};
    use crate::pci::{Place, PORT_PREFETCHABLE};

    struct Fixture {
        mmio: Arc<Bus>,
        devices: Devices,
        ejected: Arc<Mutex<Vec<u8>>>,
    }

    fn fixture(nics: Vec<NicSpec>) -> Fixture {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let (mmio, ejected) = (Arc::new(Bus::new()), Arc::new(Mutex::new(Vec::new())));
        let heard = ejected.clone();
        let board = Board {
            machine_type: MachineType::Two,
            wiring: Arc::new(FakeWiring::default()),
            memory: Arc::new(memory),
            mmio: mmio.clone(),
            nic_rom: None,
            host: host_bridge(),
            vcpus: 1,
            trouble: Arc::new(|detail| panic!("{detail}")),
            ejected: Arc::new(move |slot| heard.lock().unwrap().push(slot)),
        };
        let hook: crate::thread::ThreadHook = Arc::new(|_| Ok(()));
        let parts = Parts {
            nics,
            ..Parts::default()
        };
        let devices = assemble(board, parts, Vec::new(), &hook).unwrap();
        Fixture {
            mmio,
            devices,
            ejected,
        }
    }

    fn nic(id: &str, slot: Option<u8>) -> NicSpec {
        let (tap, _) = UnixDatagram::pair().unwrap();
        NicSpec {
            id: id.to_owned(),
            mac: [0x52, 0x54, 0, 0, 0, 1],
            queues: 1,
            carrier: true,
            link: Link::Tap(Tap::sockets(vec![OwnedFd::from(tap)])),
            slot,
        }
    }

    impl Fixture {
        fn read(&self, address: u64) -> u32 {
            let mut data = [0; 4];
            self.mmio.read(address, &mut data);
            u32::from_le_bytes(data)
        }

        /// Word `register` of the PCI Express capability of the first root port.
        fn express(&self, register: u64) -> u64 {
            let port = ECAM_START + (u64::from(Place::root_port(0).devfn()) << 12);
            let mut at = u64::from(self.read(port + 0x34) & 0xff);
            while self.read(port + at) & 0xff != 0x10 {
                at = u64::from(self.read(port + at) >> 8 & 0xff);
            }
            port + at + register
        }

        fn indicator_off(&self) {
            let control = self.express(24);
            self.mmio.write(control, &0x0300u16.to_le_bytes());
        }
    }

    /// Configuration space of what is behind the first port.
    const BEHIND: u64 = ECAM_START + (1 << 20);

    #[test]
    fn a_device_comes_is_found_behind_its_port_and_goes_with_consent() {
        let mut f = fixture(Vec::new());
        assert_eq!(f.read(BEHIND), u32::MAX);
        let device = f
            .devices
            .hotplug
            .attach(1, Arrival::Nic(nic("lan", Some(1))));
        assert_eq!(device.unwrap().id(), "nic/lan");
        assert_eq!(f.read(BEHIND), 0x1041_1af4);
        // Present, presence and link changed; the link is up.
        assert_eq!(f.read(f.express(24)) >> 16, 0x148);
        assert_eq!(f.read(f.express(16)) >> 29 & 1, 1);
        // A BAR within the port's window decodes.
        f.mmio
            .write(BEHIND + 0x10, &(PORT_PREFETCHABLE as u32).to_le_bytes());
        let upper = (PORT_PREFETCHABLE >> 32) as u32;
        f.mmio.write(BEHIND + 0x14, &upper.to_le_bytes());
        f.mmio.write(BEHIND + 4, &[6, 0]);
        assert_eq!(f.read(PORT_PREFETCHABLE + 16) >> 16, 3);
        // One that the port does not pass on does not.
        f.mmio.write(BEHIND + 0x14, &(upper + 0x10).to_le_bytes());
        assert_eq!(f.read(PORT_PREFETCHABLE + 16), u32::MAX);

        f.indicator_off();
        assert!(f.ejected.lock().unwrap().is_empty(), "nobody asked for it");
        f.mmio.write(f.express(24), &0x0100u16.to_le_bytes());
        f.devices.hotplug.ask_back("nic/lan").unwrap();
        assert_eq!(f.read(f.express(24)) >> 16 & 1, 1, "the button");
        f.indicator_off();
        assert_eq!(*f.ejected.lock().unwrap(), [0]);
        let (id, closed) = f.devices.hotplug.remove(0).unwrap();
        assert_eq!((id.as_str(), closed.is_ok()), ("nic/lan", true));
        assert_eq!(f.read(BEHIND), u32::MAX);
        assert_eq!(f.read(f.express(24)) >> 16 & 0x40, 0);
        assert!(f.devices.hotplug.remove(0).is_none());
    }

    #[test]
    fn a_slot_serves_a_hundred_devices_one_after_the_other() {
        let mut f = fixture(Vec::new());
        for _ in 0..100 {
            let device = f
                .devices
                .hotplug
                .attach(3, Arrival::Nic(nic("lan", Some(3))));
            assert!(device.is_ok());
            f.devices.hotplug.remove(2).unwrap().1.unwrap();
        }
    }

    #[test]
    fn a_question_taken_back_leaves_the_device_even_if_the_guest_lets_go() {
        let mut f = fixture(Vec::new());
        let device = f
            .devices
            .hotplug
            .attach(1, Arrival::Nic(nic("lan", Some(1))));
        device.unwrap();
        f.devices.hotplug.ask_back("nic/lan").unwrap();
        f.devices.hotplug.take_back_the_question("nic/lan").unwrap();
        // The guest clears what it has seen, then lets go.
        f.mmio.write(f.express(26), &0x0109u16.to_le_bytes());
        f.indicator_off();
        assert!(f.ejected.lock().unwrap().is_empty());
        assert_eq!(f.read(f.express(24)) >> 16, 0x148, "it is shown anew");
    }

    #[test]
    fn what_is_in_a_slot_by_definition_is_there_at_the_start_and_after_a_reset() {
        let f = fixture(vec![nic("lan", Some(1)), nic("wan", None)]);
        assert_eq!(f.read(BEHIND), 0x1041_1af4);
        let wan = ECAM_START + (u64::from(Place::nic(0).devfn()) << 12);
        assert_eq!(f.read(wan), 0x1041_1af4, "the first on bus 0");
        for device in &f.devices.list {
            device.reset();
        }
        assert_eq!(f.read(BEHIND), 0x1041_1af4);
        assert_eq!(f.read(f.express(24)) >> 16 & 0x40, 0x40);
        f.devices.hotplug.ask_back("nic/lan").unwrap();
        for device in &f.devices.list {
            device.reset();
        }
        assert_eq!(
            *f.ejected.lock().unwrap(),
            [0],
            "nobody holds it after a reset"
        );
    }

    #[test]
    fn what_cannot_be_attached_or_detached_is_named() {
        let mut f = fixture(vec![nic("lan", Some(1))]);
        let mut refused = |slot, id| {
            let arrival = Arrival::Nic(nic(id, Some(slot)));
            let error = f.devices.hotplug.attach(slot, arrival).err().unwrap();
            (error.kind, error.argument)
        };
        let slot = "slot".to_owned();
        assert_eq!(refused(0, "a"), (Kind::InvalidArgument, slot.clone()));
        assert_eq!(refused(9, "a"), (Kind::InvalidArgument, slot.clone()));
        assert_eq!(refused(1, "a"), (Kind::InvalidState, slot));
        assert_eq!(refused(2, "lan"), (Kind::InvalidState, "id".to_owned()));
        let error = f.devices.hotplug.ask_back("nic/wan").unwrap_err();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "id")
        );
    }
}
