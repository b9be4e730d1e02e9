// SPDX-License-Identifier: Apache-2.0
//! A machine: its parts put together in order, and the face that `capi` sees.
//!
//! Threads of a machine:
//!
//! | thread | number | what it does |
//! |---|---|---|
//! | vcpu-N | one a vCPU | KVM_RUN, registers of devices (`cpu/run.rs`) |
//! | control | 1 | requests, causes, the console's bytes (`control.rs`) |
//! | block-N | one an I/O ring | disks (`block.rs`) |
//! | network | one, if there are interfaces | their frames (`net.rs`) |
//! | migration | 1 | moves the machine elsewhere, or takes one in (`migrate`) |
//! | memory-N | one to four | touch, save and restore memory (`crew.rs`) |
//! | balloon | one, if there is a balloon | memory that the guest gives back (`balloon.rs`) |
//!
//! All are started within [`Machine::build`], by its caller's thread, and each narrows itself first thing by the hook.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::mmap::MmapRegion;
use vmbus_qcow2::Ring;

use crate::acpi;
use crate::boot::{Boot, BootFile};
use crate::config::{
    Config, DeviceChange, Disk, Files, MachineType, MediumChange, Nic, Peer, ReceiveFrom,
    RestoreFrom, SaveTo, SendTo, VsockEnd,
};
use crate::control::{Control, Keeping, Moving, VcpuThreads};
use crate::cpu::entry::Entry;
use crate::cpu::flags;
use crate::cpu::gate::{self, Cause, Gate};
use crate::cpu::model;
use crate::cpu::msr;
use crate::cpu::reset::{Registers, ResetState};
use crate::cpu::run::Vcpu;
use crate::crew::Crew;
use crate::devices::{self, Board, Devices, Parts};
use crate::disks;
use crate::error::{Error, Kind, Result};
use crate::firmware::flash::Flash;
use crate::firmware::shadow::{self, Shadow};
use crate::firmware::{self, rom, smbios, BootDevice, Facts};
use crate::hotplug::Arrival;
use crate::io::Change;
use crate::irq::Line;
use crate::layout;
use crate::legacy::cmos::Cmos;
use crate::legacy::fw_cfg::FwCfg;
use crate::legacy::i8042::I8042;
use crate::legacy::pm::PowerManagement;
use crate::legacy::port92::Port92;
use crate::legacy::pvpanic::PvPanic;
use crate::legacy::reset_control::ResetControl;
use crate::legacy::serial::Serial;
use crate::mailbox::{Event, Keep, Mail, Mailbox, Request, Slot};
use crate::memory;
use crate::memory::GuestMemoryMmap;
use crate::migrate::{Still, Tools};
use crate::nics;
use crate::pci::host::HostBridge;
use crate::pci::root::Root;
use crate::pci::watchdog::Watchdog;
use crate::pci::{Function, KvmWiring};
use crate::platform::{self, Legacy, Platform, Start};
use crate::ports;

use crate::save::facts::{Answer, Hardware};
use crate::save::file::{Saved, Section};
use crate::save::mapped;
use crate::slots::{self, Source, View};
use crate::snapshots::Tidy;
use crate::thread::{self, Role, ThreadHook};
use crate::virtio;
use crate::virtio::balloon::Balloon;
use crate::vm::Vm;

/// A machine, from its build to its drop, which ends it.
pub struct Machine {
    mailbox: Arc<Mailbox>,
    control: Option<JoinHandle<Result<()>>>,
}

impl Machine {
    /// Builds a machine that stands still; takes over the fds that `config` names, whatever the result.
    ///
    /// # Errors
    /// The first thing that is wrong with the configuration, a file or this host, with the field.
    pub fn build(config: Config, rings: Vec<Ring>, hook: ThreadHook) -> Result<Machine> {
        let files = config.take_files()?;
        config.check()?;
        let Files {
            kvm,
            console,
            memory: memory_file,
            kernel,
            firmware,
            variables,
            nic_rom,
            initrd,
            disks,
            nics,
            ports,
            clone: clone_file,
        } = files;
        let kernel = kernel.map(|fd| BootFile::new(fd, "kernel")).transpose()?;
        let initrd = initrd.map(|fd| BootFile::new(fd, "initrd")).transpose()?;
        let code = firmware
            .map(|fd| rom::firmware(&BootFile::new(fd, "firmware")?))
            .transpose()?;
        let nic_rom = nic_rom
            .map(|fd| {
                let file = BootFile::new(fd, "firmware/nic-rom")?;
                rom::option_rom(
                    &file,
                    virtio::pci::VENDOR,
                    virtio::pci::device_id(virtio::net::DEVICE_TYPE),
                )
            })
            .transpose()?;
        let disks = disks::open(&config.disks, disks, !config.restore)?;
        let nics = nics::open(&config.nics, nics)?;
        let ports = ports::open(&config.ports, ports)?;
        gate::install_kick_handler()?;
        // SAFETY: the fd is ours, and is given away.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let fd = create_vm(&kvm)?;
        let ram = memory::create(&config.memory_plan(), memory_file)?;
        let vm = Vm::new(fd, ram);
        memory::register(&vm.slots, &vm.memory, config.memory)?;
        let flash = match &code {
            Some(code) => show_firmware(&vm, code, variables)?,
            None => None,
        };

        let mailbox = Arc::new(Mailbox::new()?);
        let sink = Arc::clone(&mailbox);
        let gate = Arc::new(Gate::new(
            usize::from(config.vcpus),
            Arc::new(move |cause, epoch| sink.inbox.push(Mail::Cause(cause, epoch))),
        ));
        let host = Arc::new(host_bridge(&vm, code.clone(), &gate));
        // Firmware begins with PAM as after power-on, a kernel as firmware leaves it.
        host.reset();
        // Behind all memory slots: KVM changes one in 10 ms rather than 10 us while the grace period that making
        // the irqchip begins is not over.
        platform::create_irqchip(&vm)?;
        let entry = Arc::new(Mutex::new(None));
        let (vcpus, cpuid) = create_vcpus(&kvm, &vm, &config, &gate, &entry)?;
        // Nothing more is asked of /dev/kvm.
        drop(kvm);

        let mut roms = Vec::new();
        roms.extend(code.map(|code| (Section::Code, code)));
        let variables = flash.as_ref().map(|flash| flash.content());
        roms.extend(variables.map(|content| (Section::Variables, content)));
        roms.extend(nic_rom.clone().map(|rom| (Section::Rom, rom)));
        let board = Board {
            machine_type: MachineType::named(&config.machine_type)?,
            wiring: Arc::new(KvmWiring::new(&vm)),
            memory: Arc::clone(&vm.memory),
            mmio: Arc::clone(&vm.mmio),
            nic_rom,
            host,
            vcpus: config.vcpus,
            trouble: {
                let gate = Arc::clone(&gate);
                Arc::new(move |detail| gate.raise(Cause::IoError(detail)))
            },
            ejected: {
                let mailbox = Arc::clone(&mailbox);
                Arc::new(move |slot| mailbox.inbox.push(Mail::Ejected(slot)))
            },
        };
        let balloon = config.balloon.then(|| Balloon::new(config.memory));
        let balloon = balloon.transpose()?;
        let watchdog = config.watchdog.map(|_| Watchdog::new().map(Arc::new));
        let watchdog = watchdog.transpose()?;
        let parts = Parts {
            disks: disks.block,
            scsi: disks.scsi,
            nics,
            ports,
            vsock: config.vsock,
            watchdog: watchdog.clone(),
            rng: config.rng,
            balloon: balloon.clone(),
        };
        let memory = Arc::clone(&board.memory);
        let crew = Crew::new(Arc::clone(&memory), &hook)?;
        let mut devices = devices::assemble(board, parts, rings, &hook)?;
        devices.list.extend(flash.map(|flash| flash as _));
        let facts = facts(&config, &devices)?;
        let files = firmware::files(&facts, Arc::clone(&devices.root));
        let legacy = Legacy {
            serial: Arc::new(Serial::new(
                console,
                Line::new(Arc::clone(&vm.fd), layout::COM1_IRQ),
            )),
            pm: Arc::new(PowerManagement::new(
                Line::new(Arc::clone(&vm.fd), layout::SCI),
                Arc::clone(&gate),
            )),
            cmos: Arc::new(Cmos::new(
                config.memory,
                config.vcpus,
                Line::new(Arc::clone(&vm.fd), layout::RTC_IRQ),
            )?),
            i8042: Arc::new(I8042::new(Arc::clone(&gate))),
            reset_control: Arc::new(ResetControl::new(Arc::clone(&gate), devices.config_ports)),
            fw_cfg: Arc::new(FwCfg::new(files, Arc::clone(&vm.memory))),
            port92: Arc::new(Port92::new(Arc::clone(&gate))),
            pvpanic: Arc::new(PvPanic::new(Arc::clone(&gate))),
        };
        legacy.insert(&vm)?;
        let start = match kernel {
            None => Start::Firmware,
            Some(kernel) => Start::Kernel {
                boot: Boot {
                    kernel,
                    initrd,
                    cmdline: config
                        .kernel
                        .map(|kernel| kernel.cmdline)
                        .unwrap_or_default(),
                    memory: config.memory,
                    rsdp: acpi::RSDP,
                },
                tables: tables(&facts, &devices.root)?,
            },
        };
        let platform = Platform::new(vm, legacy, start, entry)?;
        platform.reset()?;
        // Last: until here memory is made and written to as any machine's is.
        let image = clone_file.map(|file| clone_from(file, &memory, config.merge));
        let image = image.transpose()?;
        let hardware = Hardware {
            machine_type: facts.machine_type.clone(),
            cpu_model: config.cpu_model.clone(),
            cpuid,
            vcpus: config.vcpus,
            memory: config.memory,
            firmware: config.firmware.is_some(),
        };
        let moving = Moving::new(
            Tools {
                memory: Arc::clone(&memory),
                slots: Arc::clone(&platform.vm().slots),
                gate: Arc::clone(&gate),
                mailbox: Arc::clone(&mailbox),
                progress: Arc::default(),
                still: Still::default(),
            },
            &hook,
        )?;
        let keeping = Keeping::new(
            memory,
            vcpus.iter().map(|vcpu| Arc::clone(&vcpu.saved)).collect(),
            (hardware, config.uuid.clone()),
            roms,
            config.restore,
            image,
        );
        let vcpus = VcpuThreads::start(Arc::clone(&gate), vcpus, &hook)?;
        gate.reset()?;
        let control = Control::new(
            Arc::clone(&mailbox),
            gate,
            vcpus,
            (devices.list, devices.hotplug, watchdog.zip(config.watchdog)),
            (balloon, crew),
            platform,
            (config.on_reset, keeping, moving),
        );
        let control = thread::spawn("control", Role::Control, &hook, move || control.run())?;
        Ok(Machine {
            mailbox,
            control: Some(control),
        })
    }

    /// Asks for something; the answer is [`Event::Done`] with the same id. Never blocks.
    pub fn request(&self, id: u64, request: Request) {
        self.mailbox.inbox.push(Mail::Request(id, request));
    }

    /// Opens a disk's images and asks for the disk in the slot that it names; the answer is [`Event::Done`] with
    /// the same id. Takes over the fds that it names, whatever the result. Opening may take long.
    ///
    /// # Errors
    /// What is wrong with the disk or its images; then nothing was asked.
    pub fn attach_disk(&self, id: u64, disk: &Disk) -> Result<()> {
        let files = disk.take_files()?;
        let slot = named_slot(disk.slot)?;
        let opened = disks::open(std::slice::from_ref(disk), vec![files], true)?;
        if !opened.scsi.is_empty() {
            let message = "a disk of the SCSI host adapter does not come while the machine runs";
            return Err(Error::new(Kind::NotSupported, "bus", message));
        }
        for spec in opened.block {
            self.ask(id, Slot::Attach(slot, Arrival::Disk(spec)));
        }
        Ok(())
    }

    /// The same for a network interface.
    ///
    /// # Errors
    /// What is wrong with the interface; then nothing was asked.
    pub fn attach_nic(&self, id: u64, nic: &Nic) -> Result<()> {
        let files = nic.take_files()?;
        let slot = named_slot(nic.slot)?;
        for spec in nics::open(std::slice::from_ref(nic), vec![files])? {
            self.ask(id, Slot::Attach(slot, Arrival::Nic(spec)));
        }
        Ok(())
    }

    /// Asks the guest to let go of a device in a slot, such as `nic/lan`; [`Event::Done`] says that it was asked,
    /// [`Event::Detached`] that it has.
    pub fn detach(&self, id: u64, device: &str) {
        self.ask(id, Slot::AskBack(device.to_owned()));
    }

    /// The guest may keep the device: nobody waits any more.
    pub fn keep(&self, id: u64, device: &str) {
        self.ask(id, Slot::TakeBackTheQuestion(device.to_owned()));
    }

    /// Writes the machine to a file; the answer is [`Event::Done`] with the same id, with the bytes written. Takes over
    /// the fd that is named.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn save(&self, id: u64, to: &SaveTo) -> Result<()> {
        let file = to.take_file()?.into();
        let mail = Mail::Keep(id, Keep::Save(file, to.clone()));
        self.mailbox.inbox.push(mail);
        Ok(())
    }

    /// Goes on from a file; then the machine is paused, and the answer is [`Event::Done`] with the same id. Takes over the fd
    /// that is named.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn restore(&self, id: u64, from: &RestoreFrom) -> Result<()> {
        let file = from.take_file()?.map(Into::into);
        let mail = Mail::Keep(id, Keep::Restore(file, from.clone()));
        self.mailbox.inbox.push(mail);
        Ok(())
    }

    /// Has the machine go on at the other end of a socket, where a machine receives it; then this one ends, and the answer is
    /// [`Event::Done`] with the same id. Takes over the fd that is named.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn send(&self, id: u64, to: &SendTo) -> Result<()> {
        let mail = Mail::Keep(id, Keep::Send(to.take_socket()?, to.clone()));
        self.mailbox.inbox.push(mail);
        Ok(())
    }

    /// Goes on with the machine that is sent from the other end of a socket; the answer is [`Event::Done`] with the same id.
    /// Takes over the fd that is named.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn receive(&self, id: u64, from: &ReceiveFrom) -> Result<()> {
        let mail = Mail::Keep(id, Keep::Receive(from.take_socket()?, from.clone()));
        self.mailbox.inbox.push(mail);
        Ok(())
    }

    /// Removes what snapshots that were broken off have left on the disks; in any state, which stays. The answer is
    /// [`Event::Done`] with the same id.
    pub fn tidy(&self, id: u64, what: Tidy) {
        self.mailbox.inbox.push(Mail::Keep(id, Keep::Tidy(what)));
    }

    /// Another machine has come to an isolated network; takes over the fd that is named.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn link(&self, id: u64, peer: &Peer) -> Result<()> {
        let socket = peer.take_file()?;
        self.ask(
            id,
            Slot::Link(peer.device.clone(), peer.peer.clone(), socket),
        );
        Ok(())
    }

    /// Puts another medium into a CD-ROM drive, or takes its medium out; takes over the fds that the drive's layers name.
    /// Answered by an event with this id.
    ///
    /// # Errors
    /// What is wrong with the medium; then nothing was asked.
    pub fn change_medium(&self, id: u64, change: &MediumChange) -> Result<()> {
        let files = change.disk.take_files()?;
        if !change.disk.cdrom {
            return Err(Error::invalid("device", "is no CD-ROM drive"));
        }
        let what = Change::Medium {
            medium: disks::open_medium(&change.disk, files, true)?,
            force: change.force,
        };
        let device = format!("disk/{}", change.disk.id);
        self.mailbox.inbox.push(Mail::Change(id, device, what));
        Ok(())
    }

    /// Changes a device that the guest uses. Answered by an event with this id.
    pub fn change(&self, id: u64, change: DeviceChange) {
        let mail = Mail::Change(id, change.device, change.change.into());
        self.mailbox.inbox.push(mail);
    }

    /// Connects a socket to a port of the guest's, or has it wait for the guest to connect to one of the host's; takes
    /// over the fd that is named. Answered by an event with this id when they are connected; of an accepted one it says the
    /// guest's port.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd.
    pub fn vsock(&self, id: u64, end: &VsockEnd) -> Result<()> {
        let socket = end.take_file()?;
        let what = match end.accept {
            true => Change::Accept(end.port, socket),
            false => Change::Connect(end.port, socket),
        };
        let mail = Mail::Change(id, "vsock".to_owned(), what);
        self.mailbox.inbox.push(mail);
        Ok(())
    }

    fn ask(&self, id: u64, slot: Slot) {
        self.mailbox.inbox.push(Mail::Slot(id, slot));
    }

    /// Readable while [`Machine::next_event`] has something.
    pub fn event_fd(&self) -> RawFd {
        self.mailbox.outbox.fd()
    }

    /// The oldest event not yet taken. Never blocks.
    pub fn next_event(&self) -> Option<Event> {
        self.mailbox.outbox.pop()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.mailbox.inbox.push(Mail::Quit);
        if let Some(control) = self.control.take() {
            let _ = control.join();
        }
    }
}

fn named_slot(slot: Option<u8>) -> Result<u8> {
    slot.ok_or_else(|| Error::invalid("slot", "a device that is attached needs a slot, 1 to 8"))
}

/// The code lies below 4 GiB, ending there, and its variables, if it has any, below it.
fn show_firmware(
    vm: &Vm,
    code: &Arc<MmapRegion>,
    variables: Option<OwnedFd>,
) -> Result<Option<Arc<Flash>>> {
    let size = code.size() as u64;
    let view = View {
        base: rom::firmware_base(size),
        size,
        source: Source::Mapping(Arc::clone(code), 0),
        read_only: true,
    };
    let begin = view.base;
    vm.slots.set(slots::FIRMWARE, Some(view))?;
    let Some(fd) = variables else {
        return Ok(None);
    };
    let flash = Arc::new(Flash::new(fd, begin, Some(Arc::clone(&vm.slots)))?);
    let (base, size) = flash.place();
    vm.mmio.insert(base, size, Arc::clone(&flash) as _)?;
    flash.show()?;
    Ok(Some(flash))
}

/// The host bridge, whose PAM registers move what is seen below 1 MiB.
fn host_bridge(vm: &Vm, code: Option<Arc<MmapRegion>>, gate: &Arc<Gate>) -> HostBridge {
    let pam = match code {
        Some(_) => shadow::ALL_FIRMWARE,
        None => shadow::ALL_RAM,
    };
    let area = Shadow::new(Arc::clone(&vm.slots), Arc::clone(&vm.memory), code);
    let gate = Arc::clone(gate);
    let on_pam = Box::new(move |pam| {
        if let Err(error) = area.apply(pam) {
            gate.raise(Cause::Error(format!("PAM: {error}")));
        }
    });
    HostBridge::new(layout::ECAM_START, pam, on_pam)
}

/// What firmware is told.
fn facts(config: &Config, devices: &Devices) -> Result<Facts> {
    let boot = config.firmware.iter().flat_map(|firmware| &firmware.boot);
    let boot = boot.map(|id| {
        if let Some(target) = devices.targets.get(id) {
            return Ok(BootDevice::Scsi(*target));
        }
        let seat = devices.seats.get(id).copied();
        match (seat, id.split_once('/')) {
            (Some(seat), Some(("disk", _))) => Ok(BootDevice::Disk(seat)),
            (Some(seat), Some(("nic", _))) => Ok(BootDevice::Network(seat)),
            _ => Err(Error::invalid(
                "firmware.boot",
                format!("{id:?} is no disk or interface of the machine"),
            )),
        }
    });
    Ok(Facts {
        machine_type: config.machine_type.clone(),
        uuid: config.uuid_bytes()?,
        vcpus: config.vcpus,
        memory: config.memory,
        boot: boot.collect::<Result<_>>()?,
        menu: config
            .firmware
            .as_ref()
            .is_some_and(|firmware| firmware.menu),
        generation: random()?,
    })
}

/// A generation ID that no machine had.
pub(crate) fn random() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    // SAFETY: the pointer and the length are those of `id`, which the kernel fills.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    // So few bytes are never given in part.
    match usize::try_from(got) {
        Ok(len) if len == id.len() => Ok(id),
        _ => Err(Error::kernel("getrandom", std::io::Error::last_os_error())),
    }
}

/// What firmware would leave in memory for a kernel.
fn tables(facts: &Facts, root: &Root) -> Result<Vec<(u64, Vec<u8>)>> {
    let view = acpi::View {
        vcpus: facts.vcpus,
        pci: root.taken(),
    };
    let mut tables = acpi::tables(&view).placed()?;
    let page = firmware::generation_page(facts.generation);
    tables.push((acpi::GENERATION_PAGE, page));
    let (entry, structures) = smbios::tables(facts, smbios::STRUCTURES);
    tables.push((smbios::ENTRY, entry));
    tables.push((smbios::STRUCTURES, structures));
    Ok(tables)
}

/// The machine that was saved to this file, whose memory is this one's now.
fn clone_from(file: OwnedFd, memory: &GuestMemoryMmap, merge: bool) -> Result<Arc<Saved>> {
    let saved = Saved::open(file.into())?;
    mapped::map(&saved, memory, merge)?;
    Ok(Arc::new(saved))
}

fn create_vm(kvm: &Kvm) -> Result<VmFd> {
    loop {
        match kvm.create_vm() {
            Ok(vm) => return Ok(vm),
            // A signal came while the kernel made it.
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => {
                return Err(Error::new(
                    Kind::Unavailable,
                    "kvm_fd",
                    format!("KVM_CREATE_VM: {e}"),
                ))
            }
        }
    }
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &Vm,
    config: &Config,
    gate: &Arc<Gate>,
    entry: &Arc<Mutex<Option<Entry>>>,
) -> Result<(Vec<Vcpu>, Vec<Answer>)> {
    let answers = model::answers(kvm, &config.cpu_model)?;
    let named = answers.vendor().filter(|_| config.cpu_model != model::HOST);
    let listed = kvm
        .get_msr_index_list()
        .map_err(|e| Error::kernel("KVM_GET_MSR_INDEX_LIST", e))?;
    if let Some(vendor) = named {
        msr::confine(&vm.fd, vendor)?;
    }
    let registers = named.map_or(Registers::Listed(listed.as_slice()), Registers::Model);
    let mut first = answers.clone();
    first.set_topology(0, u32::from(config.vcpus));
    let vcpus = (0..usize::from(config.vcpus))
        .map(|index| {
            let fd = vm
                .fd
                .create_vcpu(index as u64)
                .map_err(|e| Error::kernel("KVM_CREATE_VCPU", e))?;
            let mut own = answers.clone();
            own.set_topology(index as u32, u32::from(config.vcpus));
            fd.set_cpuid2(&own.to_kvm()?)
                .map_err(|e| Error::kernel("KVM_SET_CPUID2", e))?;
            if named.is_some() {
                msr::confine_kvm(&fd)?;
            }
            Ok(Vcpu {
                index,
                reset: ResetState::read(&fd, registers)?,
                invariant_tsc: own.has(flags::INVARIANT_TSC),
                fd,
                entry: Arc::clone(entry),
                pio: Arc::clone(&vm.pio),
                mmio: Arc::clone(&vm.mmio),
                gate: Arc::clone(gate),
                counters: Arc::default(),
                saved: Arc::default(),
            })
        })
        .collect::<Result<_>>()?;
    Ok((vcpus, first.list()))
}
