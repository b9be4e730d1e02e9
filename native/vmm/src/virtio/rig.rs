// SPDX-License-Identifier: Apache-2.0
//! A whole bus without KVM, and a driver for it: what the tests of this directory stand on.
//!
//! Registers are reached through the MMIO bus as a vCPU would; doorbells and interrupts are the fake
//! wiring's; the disk is a file without a name, the tap a pair of sockets, and the I/O threads are real.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::mpsc::{channel, Receiver};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::{Format, Image, LayerFiles, OpenOptions, Ring};

use super::balloon::Balloon;
use super::queue::testing::{self, memory};
use super::queue::Rings;
use crate::bus::Bus;
use crate::config::MachineType;
use crate::device::Device;
use crate::devices::{assemble, Board, Devices, DiskSpec, NicSpec, Parts, ScsiSpec};
use crate::error::Result;
use crate::io::{Answer, Change};
use crate::layout::ECAM_START;
use crate::memory::GuestMemoryMmap;
use crate::net::{Link, Tap};
use crate::pci::testing::{host_bridge, FakeWiring};
use crate::pci::watchdog::Watchdog;
use crate::pci::Place;
use crate::ports::PortSpec;
use crate::thread::unconfined;

pub const DISK_BYTES: u64 = 1 << 20;
pub const ALL_FEATURES: u64 = u64::MAX;
pub const CID: u32 = 5;
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

pub struct Rig {
    pub mmio: Arc<Bus>,
    pub wiring: Arc<FakeWiring>,
    pub memory: Arc<GuestMemoryMmap>,
    pub devices: Devices,
    pub file: File,
    /// The other ends of the tap's two queues.
    pub wire: Vec<UnixDatagram>,
    pub balloon: Arc<Balloon>,
    /// The other ends of the named ports.
    pub far: Vec<UnixStream>,
    /// What was heard of I/O threads that ended.
    pub trouble: Arc<Mutex<Vec<String>>>,
}

impl Rig {
    /// Two disks on one file's worth of space each (the second read-only), a disk and two CD-ROM drives (the second
    /// empty) on a SCSI host adapter, a network interface with two queue
    /// pairs, a random number generator, a balloon, two named ports and a socket device.
    pub fn new(ring: Option<Ring>) -> Rig {
        let (ours, theirs): (Vec<_>, Vec<_>) =
            (0..2).map(|_| UnixDatagram::pair().unwrap()).unzip();
        for wire in &ours {
            wire.set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
        }
        let tap = Tap::sockets(theirs.into_iter().map(Into::into).collect());
        Rig::linked(ring, Link::Tap(tap), ours)
    }

    /// The same with another link.
    pub fn linked(ring: Option<Ring>, link: Link, wire: Vec<UnixDatagram>) -> Rig {
        let file = nameless_file();
        let root = image(file.try_clone().unwrap(), false);
        Rig::built(ring, (link, wire), (root, file))
    }

    /// The same with another first disk, which nobody looks at from outside.
    pub fn on(ring: Option<Ring>, root: Arc<Image>) -> Rig {
        let link = (Link::Tap(Tap::sockets(Vec::new())), Vec::new());
        Rig::built(ring, link, (root, nameless_file()))
    }

    fn built(
        ring: Option<Ring>,
        (link, wire): (Link, Vec<UnixDatagram>),
        (root, file): (Arc<Image>, File),
    ) -> Rig {
        let wiring = Arc::new(FakeWiring::default());
        let trouble = Arc::new(Mutex::new(Vec::new()));
        let heard = trouble.clone();
        let board = Board {
            machine_type: MachineType::Two,
            wiring: wiring.clone(),
            memory: memory(),
            mmio: Arc::new(Bus::new()),
            nic_rom: None,
            host: host_bridge(),
            vcpus: 2,
            trouble: Arc::new(move |reason| heard.lock().unwrap().push(reason)),
            ejected: Arc::new(|_| {}),
        };
        let (mmio, memory) = (board.mmio.clone(), board.memory.clone());
        let disks = vec![
            disk("root", root, false),
            disk("data", image(nameless_file(), true), true),
        ];
        let rings = ring.into_iter().collect();
        let nic = NicSpec {
            id: "net".to_owned(),
            mac: MAC,
            queues: 2,
            link,
            carrier: true,
            slot: None,
        };
        let balloon = Balloon::new(testing::MEMORY).unwrap();
        let (far, near): (Vec<_>, Vec<_>) = (0..2).map(|_| UnixStream::pair().unwrap()).unzip();
        let named = near.into_iter().zip(["agent", "org.vmbus.test"]);
        let named = named.map(|(socket, name)| {
            socket.set_nonblocking(true).unwrap();
            PortSpec {
                name: name.to_owned(),
                socket: socket.into(),
            }
        });
        let named = named.collect();
        let parts = Parts {
            disks,
            scsi: vec![
                scsi("system", Some(nameless_file()), false),
                scsi("cd", Some(nameless_file()), true),
                scsi("empty", None, true),
            ],
            nics: vec![nic],
            ports: named,
            vsock: Some(CID),
            watchdog: Some(Arc::new(Watchdog::new().unwrap())),
            rng: true,
            balloon: Some(balloon.clone()),
        };
        let devices = assemble(board, parts, rings, &unconfined()).unwrap();
        Rig {
            mmio,
            wiring,
            memory,
            devices,
            file,
            wire,
            balloon,
            far,
            trouble,
        }
    }

    pub fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.mmio.read(address, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub fn write(&self, address: u64, value: u64, len: usize) {
        self.mmio.write(address, &value.to_le_bytes()[..len]);
    }

    pub fn device(&self, id: &str) -> &Arc<dyn Device> {
        let mut list = self.devices.list.iter();
        list.find(|device| device.id() == id).unwrap()
    }

    /// Changes a device as the control thread would; how it went.
    pub fn change(&self, id: &str, change: Change) -> Result<()> {
        let told = self.begin_change(id, change);
        told.recv_timeout(Duration::from_secs(10))
            .unwrap()
            .map(|_| ())
    }

    /// The same; whoever waits hears how it went.
    pub fn begin_change(&self, id: &str, change: Change) -> Receiver<Result<String>> {
        let (tell, told) = channel();
        // Nobody may wait any more.
        let answer = Answer::new(move |result| drop(tell.send(result)));
        self.device(id).change(change, answer);
        told
    }

    pub fn sector(&self, index: u64) -> [u8; 512] {
        let mut sector = [0; 512];
        self.file.read_exact_at(&mut sector, index * 512).unwrap();
        sector
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for device in &self.devices.list {
            let stopped = device.pause().and_then(|()| device.stop());
            if !std::thread::panicking() && self.trouble.lock().unwrap().is_empty() {
                stopped.unwrap();
            }
        }
    }
}

pub fn nameless_file() -> File {
    // SAFETY: the name is a C string; the fd that comes back is ours.
    let file = unsafe {
        File::from_raw_fd(libc::memfd_create(
            c"disk".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        ))
    };
    file.set_len(DISK_BYTES).unwrap();
    file
}

/// An active raw image on a file.
pub fn image(file: File, read_only: bool) -> Arc<Image> {
    let layer = LayerFiles {
        format: Format::Raw,
        file,
        data_file: None,
        backing_name: None,
        data_name: None,
        secret: None,
    };
    let options = OpenOptions {
        read_only,
        locks: false,
        ..OpenOptions::default()
    };
    let image = Image::open_chain(vec![layer], options).unwrap();
    image.activate().unwrap();
    Arc::new(image)
}

fn scsi(id: &str, file: Option<File>, cdrom: bool) -> ScsiSpec {
    ScsiSpec {
        id: id.to_owned(),
        image: file.map(|file| image(file, cdrom)),
        cdrom,
        read_only: cdrom,
        name: id.to_owned(),
    }
}

fn disk(id: &str, image: Arc<Image>, read_only: bool) -> DiskSpec {
    DiskSpec {
        id: id.to_owned(),
        image,
        read_only,
        serial: format!("serial-{id}"),
        queues: 0,
        slot: None,
    }
}

/// A driver of one function, as a guest's would be.
pub struct Guest<'a> {
    pub rig: &'a Rig,
    pub config: u64,
    pub bar: u64,
    pub common: u64,
    pub notify: u64,
    pub isr: u64,
    pub device: u64,
    /// The PCI configuration access capability.
    pub access: u64,
    pub queue: testing::Driver,
    pub features: u64,
}

pub const REQUEST: u64 = 0x8000;
pub const STATUS: u64 = 0x8100;
pub const DATA: u64 = 0x9000;

impl<'a> Guest<'a> {
    /// Finds the function's structures through its capability list and switches memory and bus mastering on.
    pub fn probe(rig: &'a Rig, place: Place) -> Guest<'a> {
        let config = ECAM_START + (u64::from(place.devfn()) << 12);
        let mut guest = Guest {
            rig,
            config,
            bar: rig.read(config + 0x10, 4) & !0xf | rig.read(config + 0x14, 4) << 32,
            common: 0,
            notify: 0,
            isr: 0,
            device: 0,
            access: 0,
            queue: testing::Driver::new(rig.memory.clone(), testing::rings(0x1_0000, 8)),
            features: 0,
        };
        let mut at = rig.read(config + 0x34, 1);
        while at != 0 {
            if rig.read(config + at, 1) == 9 {
                let offset = rig.read(config + at + 8, 4);
                match rig.read(config + at + 3, 1) {
                    1 => guest.common = offset,
                    2 => guest.notify = offset,
                    3 => guest.isr = offset,
                    4 => guest.device = offset,
                    5 => guest.access = config + at,
                    kind => panic!("capability of unknown type {kind}"),
                }
            }
            at = rig.read(config + at + 1, 1);
        }
        rig.write(config + 4, 6, 2);
        guest
    }

    pub fn get(&self, register: u64, len: usize) -> u64 {
        self.rig.read(self.bar + self.common + register, len)
    }

    pub fn put(&self, register: u64, value: u64, len: usize) {
        self.rig
            .write(self.bar + self.common + register, value, len);
    }

    pub fn status(&self) -> u64 {
        self.get(20, 1)
    }

    /// Resets and sets up with one queue, accepting what is offered of `features`, up to DRIVER_OK.
    pub fn start(&mut self, features: u64, rings: Rings) {
        self.start_queues(features, &[(0, rings)]);
        self.queue = testing::Driver::new(self.rig.memory.clone(), rings);
    }

    /// The same with these queues; none of them is `self.queue`.
    pub fn start_queues(&mut self, features: u64, queues: &[(u16, Rings)]) {
        self.put(20, 0, 1);
        assert_eq!(self.status(), 0);
        self.put(20, 3, 1);
        self.features = 0;
        for half in 0..2 {
            self.put(0, half, 4);
            let accepted = self.get(4, 4) & (features >> (32 * half) & 0xffff_ffff | half);
            self.features |= accepted << (32 * half);
            self.put(8, half, 4);
            self.put(12, accepted, 4);
        }
        self.put(20, 11, 1);
        assert_eq!(self.status(), 11);
        for (index, rings) in queues {
            self.put(22, u64::from(*index), 2);
            self.put(24, u64::from(rings.size), 2);
            self.put(32, rings.descriptors, 8);
            self.put(40, rings.available, 8);
            self.put(48, rings.used, 8);
            self.put(28, 1, 2);
            // Rings of an earlier life are no concern of this one; the device looks at once.
            let place = GuestAddress(rings.descriptors);
            // A test may say where there is no memory.
            let _ = self.rig.memory.write_slice(&[0; 0x3000], place);
        }
        self.put(20, 15, 1);
    }

    /// Routes the vectors of configuration changes and of queue 0 to these data values, unmasked.
    pub fn use_msix(&self) {
        for vector in 0..2u64 {
            let entry = self.bar + 0x8000 + 16 * vector;
            self.rig.write(entry, 0xfee0_0000, 8);
            self.rig.write(entry + 8, 0x40 + vector, 4);
            self.rig.write(entry + 12, 0, 4);
        }
        let mut at = self.rig.read(self.config + 0x34, 1);
        while self.rig.read(self.config + at, 1) != 0x11 {
            at = self.rig.read(self.config + at + 1, 1);
        }
        self.rig.write(self.config + at + 2, 0x8000, 2);
        self.put(16, 0, 2);
        self.put(22, 0, 2);
        self.put(26, 1, 2);
    }

    pub fn doorbell(&self) -> u64 {
        self.bar + self.notify
    }

    /// Makes a block request available: header, then `out` bytes to read or `room` bytes to write at [`DATA`].
    pub fn offer(&mut self, kind: u32, sector: u64, out: u32, room: u32) {
        let header = u128::from(kind) | u128::from(sector) << 64;
        let memory = &self.rig.memory;
        memory
            .write_slice(&header.to_le_bytes(), GuestAddress(REQUEST))
            .unwrap();
        memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        self.queue.descriptor(0, REQUEST, 16, 1, 1);
        self.queue
            .descriptor(1, DATA, out + room, if room > 0 { 3 } else { 1 }, 2);
        self.queue.descriptor(2, STATUS, 1, 2, 0);
        self.queue.offer(0);
    }

    /// Rings and waits for the used ring to come to `index`; returns the status byte.
    pub fn ring_and_wait(&self, index: u16) -> u8 {
        assert!(self.rig.wiring.ring(self.doorbell()));
        self.wait(index)
    }

    pub fn wait(&self, index: u16) -> u8 {
        until("the request ends", || self.queue.used_index() == index);
        self.rig.memory.read_obj(GuestAddress(STATUS)).unwrap()
    }
}

/// Waits for what another thread brings about.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 10 s");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits for a moment in which all threads of this name sleep, those of other tests' machines included; one that goes
/// round and round never does.
pub fn until_asleep(name: &str) {
    let asleep = format!("({name}) S ");
    until("all sleep", || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let stats = tasks.filter_map(|task| {
            // Others end meanwhile.
            std::fs::read_to_string(task.ok()?.path().join("stat")).ok()
        });
        let mut ours = stats.filter(|stat| stat.contains(&format!("({name})")));
        ours.all(|stat| stat.contains(&asleep))
    });
}
