// SPDX-License-Identifier: Apache-2.0
//! A virtio device as a PCI function (virtio 1.2, 4.1), modern only.
//!
//! One 64-bit BAR of 64 KiB holds everything:
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | device configuration |
//! | 0x3000 | notifications: queue n at 4 × n |
//! | 0x8000 | MSI-X table: vectors are configuration, then queues |
//! | 0x9000 | MSI-X pending bits |
//!
//! The same registers are reachable through configuration space (VIRTIO_PCI_CAP_PCI_CFG), which firmware uses
//! for BARs it cannot address. While the device runs, the notification addresses are ioeventfds: they follow
//! when the guest moves the BAR, and where KVM will not watch an address, the write arrives here and rings
//! the same eventfd.
//!
//! A reset waits up to a second for what is in flight. If that is not enough the status keeps reading
//! non-zero, as the specification allows (2.4.2), and until then the device ignores its driver: guest memory
//! is never written after a status of 0 was read. Bus master enable gates interrupts only.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use super::common::{self, Action, Common};
use super::interrupt::Interrupt;
use super::queue::{Queue, RingFeatures};
use super::{Activation, ActiveQueue, Backend, Model, Served, F_EVENT_IDX, F_INDIRECT_DESC};
use crate::error::{Error, Result};
use crate::memory::GuestMemoryMmap;
use crate::pci::config::{
    express_capability, touches, Bar64, ConfigSpace, Identity, CAPABILITY_VENDOR, KIND_ENDPOINT,
    KIND_INTEGRATED, MULTIFUNCTION,
};
use crate::pci::msix::{self, Msix};
use crate::pci::option_rom::{self, OptionRom};
use crate::pci::root::in_window;
use crate::pci::{Function, Seat, Window, Wiring, BAR_STRIDE};
use crate::state::{self, Bytes, Stateful};

const BAR: Bar64 = Bar64 {
    index: 0,
    size: BAR_STRIDE,
};
/// Each part of the BAR begins at a multiple of this.
const PART: u64 = 0x1000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x8000;
const PENDING: u64 = 0x9000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STRIDE: u32 = 4;

/// cfg_type values of 4.1.4.
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// How long a reset waits for what is in flight.
const DRAIN: Duration = Duration::from_secs(1);

/// The vendor of all virtio devices.
pub const VENDOR: u16 = 0x1af4;

/// The PCI device number of a virtio device type.
pub const fn device_id(device_type: u16) -> u16 {
    0x1040 + device_type
}

/// A virtio device's PCI function.
pub struct VirtioPci(Mutex<State>);

struct State {
    wiring: Arc<dyn Wiring>,
    memory: Arc<GuestMemoryMmap>,
    backend: Arc<dyn Backend>,
    model: Model,
    space: ConfigSpace,
    msix: Msix,
    interrupt: Arc<Interrupt>,
    common: Common,
    /// One for each queue.
    kicks: Vec<Arc<EventFd>>,
    /// The backend has been started and not stopped.
    running: bool,
    /// A reset waits for this.
    draining: Option<Receiver<()>>,
    /// The queues whose doorbells KVM watches, and the BAR's address it does so for.
    doorbells: Option<(u64, Vec<u16>)>,
    /// Code for firmware.
    rom: Option<OptionRom>,
    /// Where the PCI Express and the PCI configuration access capabilities lie.
    express: u16,
    access: u16,
}

impl VirtioPci {
    /// The function at `seat` of a device as `model` says, whose requests `backend` carries out.
    ///
    /// # Errors
    /// `Unavailable` when there is no GSI or eventfd left.
    pub fn new(
        seat: Seat,
        model: Model,
        wiring: Arc<dyn Wiring>,
        memory: Arc<GuestMemoryMmap>,
        backend: Arc<dyn Backend>,
        rom: Option<Arc<MmapRegion>>,
    ) -> Result<VirtioPci> {
        let (header, address, kind) = match seat {
            Seat::Bus0(place) if place.function == 0 => {
                (MULTIFUNCTION, place.bar_address(), KIND_INTEGRATED)
            }
            Seat::Bus0(place) => (0, place.bar_address(), KIND_INTEGRATED),
            // Its BAR gets an address from whoever sees it plugged in.
            Seat::Slot(_) => (0, 0, KIND_ENDPOINT),
        };
        let mut space = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: device_id(model.device_type),
            revision: 1,
            class: model.class,
            header,
            subsystem: (0x1af4, 0x1100),
        });
        BAR.declare(&mut space, address);
        let vectors = model.queues + 1;
        let msix = Msix::new(
            wiring.clone(),
            &mut space,
            vectors,
            BAR.index,
            TABLE as u32,
            PENDING as u32,
        )?;
        let notify_len = NOTIFY_STRIDE * u32::from(model.queues);
        let stride = NOTIFY_STRIDE.to_le_bytes();
        add_structure(&mut space, CAP_COMMON, 0, common::SIZE, &[])?;
        add_structure(&mut space, CAP_NOTIFY, NOTIFY as u32, notify_len, &stride)?;
        add_structure(&mut space, CAP_ISR, ISR as u32, 1, &[])?;
        let config_len = model.config.len() as u32;
        if config_len > 0 {
            add_structure(&mut space, CAP_DEVICE, DEVICE as u32, config_len, &[])?;
        }
        let access = add_structure(&mut space, CAP_PCI, 0, 0, &[0; 4])?;
        // BAR, offset, length and data of the access window are the driver's.
        space.allow(access + 4, &[0xff]);
        space.allow(access + 8, &[0xff; 12]);
        // Device capabilities: role-based error reporting, function level reset.
        let express = express_capability(&mut space, kind, 1 << 15 | 1 << 28, None)?;
        let rom = rom.map(|memory| OptionRom::new(&mut space, seat, memory));
        space.seal();
        let interrupt = Arc::new(Interrupt::new(msix.vectors(), vectors, model.queues));
        let kicks = (0..model.queues)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|e| Error::kernel("eventfd", e))?;
        Ok(VirtioPci(Mutex::new(State {
            wiring,
            memory,
            backend,
            common: Common::new(&model, interrupt.clone()),
            model,
            space,
            msix,
            interrupt,
            kicks,
            running: false,
            draining: None,
            doorbells: None,
            rom,
            express,
            access,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Adds a virtio_pci_cap; `tail` is what some types have behind it.
fn add_structure(
    space: &mut ConfigSpace,
    kind: u8,
    offset: u32,
    length: u32,
    tail: &[u8],
) -> Result<u16> {
    let mut body = vec![16 + tail.len() as u8, kind, BAR.index, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&length.to_le_bytes());
    body.extend_from_slice(tail);
    space.add_capability(CAPABILITY_VENDOR, &body)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    space: Bytes,
    msix: msix::Saved,
    interrupt: state::State,
    common: common::Saved,
    /// None while no queue is served.
    served: Option<Served>,
    /// Of a configuration that changes.
    #[serde(default)]
    config: state::State,
}

impl Stateful for VirtioPci {
    fn save(&self) -> Result<state::State> {
        let mut state = self.lock();
        // Nothing is in flight, so a reset that waited for that is over.
        state.settle();
        let served = match state.running {
            true => {
                let saved = state.backend.saved().recv();
                saved.map_err(|_| Error::internal("the I/O thread is gone"))?
            }
            false => None,
        };
        let live = state.model.live.as_ref();
        state::write(&Saved {
            space: state.space.saved(),
            msix: state.msix.saved(),
            interrupt: state.interrupt.save()?,
            common: state.common.saved(),
            served,
            config: live
                .map(|live| live.save())
                .transpose()?
                .unwrap_or_default(),
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let mut guard = self.lock();
        let state = &mut *guard;
        state.space.take(&saved.space)?;
        state.interrupt.restore(&saved.interrupt)?;
        state.common.take(saved.common)?;
        if let Some(live) = &state.model.live {
            live.restore(&saved.config)?;
        }
        state.msix.take(&saved.msix, &state.space)?;
        let live = state.model.live.as_ref();
        if live.is_some_and(|live| live.has_news()) && state.common.is_ready() {
            state.interrupt.configured();
        }
        if let Some(rom) = &state.rom {
            rom.show(&state.space, state.wiring.as_ref());
        }
        match saved.served {
            Some(served) if state.common.is_ready() => state.go_on(served),
            Some(_) => Err(state::invalid("queues without a driver")),
            // One that broke its rules before its queues were served stays as it is.
            None => Ok(()),
        }
    }
}

impl Function for VirtioPci {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        let mut state = self.lock();
        if touches(register, data.len(), state.access + 16, 4) {
            state.access_read();
        }
        state.space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.space.write(register, data);
        if touches(register, data.len(), state.access + 16, 4) {
            state.access_write();
            return false;
        }
        if initiates_reset(state.express, register, data) {
            state.reset();
            return true;
        }
        state.msix.configuration_changed(&state.space);
        let moved = BAR.touched(register, data.len()) || touches(register, data.len(), 4, 2);
        if moved {
            state.place_doorbells();
        }
        let rom_moved = OptionRom::touched(register, data.len());
        if let Some(rom) = state.rom.as_ref().filter(|_| rom_moved) {
            rom.show(&state.space, state.wiring.as_ref());
        }
        moved || rom_moved
    }

    fn windows(&self) -> Vec<Window> {
        let state = self.lock();
        let base = BAR.address(&state.space);
        if !state.space.memory_enabled() {
            return Vec::new();
        }
        let mut windows = vec![Window {
            bar: BAR.index,
            base,
            size: BAR.size,
        }];
        windows.extend(state.rom.as_ref().and_then(|rom| rom.window(&state.space)));
        windows
    }

    fn read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let mut state = self.lock();
        match &state.rom {
            Some(rom) if bar == option_rom::BAR => rom.read(offset, data),
            _ => state.read(offset, data),
        }
    }

    fn write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == BAR.index {
            self.lock().write(offset, data);
        }
    }

    fn reset(&self) {
        self.lock().reset();
    }
}

/// Whether a write sets "initiate function level reset" (bit 15 of device control).
fn initiates_reset(express: u16, register: u16, data: &[u8]) -> bool {
    let place = (express + 9).checked_sub(register).map(usize::from);
    place
        .and_then(|place| data.get(place))
        .is_some_and(|byte| byte & 0x80 != 0)
}

impl State {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let within = offset % PART;
        match offset - within {
            0 => {
                self.settle();
                self.common.read(within, data);
            }
            ISR => {
                data.fill(0);
                if let (0, Some(byte)) = (within, data.first_mut()) {
                    *byte = self.interrupt.take_isr();
                }
            }
            DEVICE => {
                data.fill(0);
                if let Some(live) = &self.model.live {
                    live.read(within, data);
                    return;
                }
                let config = self.model.config.iter().skip(within as usize);
                for (byte, value) in data.iter_mut().zip(config) {
                    *byte = *value;
                }
            }
            TABLE => self.msix.read_table(within, data),
            PENDING => self.msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let within = offset % PART;
        match offset - within {
            0 => {
                self.settle();
                if self.draining.is_some() {
                    return;
                }
                match self.common.write(within, data) {
                    Action::None => {}
                    Action::Reset => self.reset_device(),
                    Action::Activate => self.activate(),
                }
            }
            DEVICE => {
                if let Some(live) = &self.model.live {
                    live.write(within, data);
                }
            }
            NOTIFY => {
                let queue = (within / u64::from(NOTIFY_STRIDE)) as usize;
                if let (true, Some(kick)) = (self.running, self.kicks.get(queue)) {
                    // It fails only when the counter is full: then the queue is looked at anyway.
                    let _ = kick.write(1);
                }
            }
            TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }

    /// What the access capability points at, if that is a register of ours: offset and width.
    fn access_target(&self) -> Option<(u64, usize)> {
        let bar = self.space.u8(self.access + 4);
        let offset = self.space.u32(self.access + 8);
        let len = self.space.u32(self.access + 12);
        let valid = bar == BAR.index
            && matches!(len, 1 | 2 | 4)
            && offset % len == 0
            && u64::from(offset) < BAR.size;
        valid.then_some((u64::from(offset), len as usize))
    }

    fn access_read(&mut self) {
        if let Some((offset, len)) = self.access_target() {
            let mut data = [0; 4];
            if let Some(data) = data.get_mut(..len) {
                self.read(offset, data);
            }
            self.space.put(self.access + 16, &data);
        }
    }

    fn access_write(&mut self) {
        if let Some((offset, len)) = self.access_target() {
            let data = self.space.u32(self.access + 16).to_le_bytes();
            if let Some(data) = data.get(..len) {
                self.write(offset, data);
            }
        }
    }

    /// DRIVER_OK: hands the enabled queues over. One that is not where a ring may be breaks the device.
    fn activate(&mut self) {
        match self.queues() {
            Some(queues) => self.start(queues, None),
            None => self.interrupt.fail(),
        }
    }

    /// As they were served in a machine that was saved.
    fn go_on(&mut self, served: Served) -> Result<()> {
        let mut queues = self
            .queues()
            .ok_or_else(|| state::invalid("a ring that is not where one may be"))?;
        let numbers = served.queues.iter().map(|(index, _)| *index);
        if !numbers.eq(queues.iter().map(|queue| queue.index)) {
            return Err(state::invalid("other queues than the driver has enabled"));
        }
        for (queue, (_, position)) in queues.iter_mut().zip(served.queues) {
            queue.queue.go_on_from(position);
        }
        self.start(queues, Some(served.own));
        Ok(())
    }

    /// What the driver has enabled; None when a ring is not where one may be.
    fn queues(&self) -> Option<Vec<ActiveQueue>> {
        let features = self.common.features();
        let ring_features = RingFeatures {
            indirect: features & F_INDIRECT_DESC != 0,
            event_index: features & F_EVENT_IDX != 0,
        };
        let enabled = self.common.enabled();
        let queues = enabled.map(|(index, rings)| {
            Some(ActiveQueue {
                index,
                queue: Queue::new(self.memory.clone(), rings, ring_features).ok()?,
                kick: self.kicks.get(usize::from(index))?.clone(),
            })
        });
        queues.collect()
    }

    fn start(&mut self, queues: Vec<ActiveQueue>, restored: Option<state::State>) {
        self.backend.start(Activation {
            queues,
            features: self.common.features(),
            interrupt: self.interrupt.clone(),
            restored,
        });
        self.running = true;
        self.place_doorbells();
    }

    /// The driver's reset: everything but the PCI configuration.
    fn reset_device(&mut self) {
        if self.running {
            self.running = false;
            self.place_doorbells();
            self.draining = Some(self.backend.stop());
        }
        if let Some(drained) = &self.draining {
            if drained.recv_timeout(DRAIN) == Err(RecvTimeoutError::Timeout) {
                return;
            }
            self.draining = None;
        }
        self.finish_reset();
    }

    /// Ends a reset that has been waiting, if it can.
    fn settle(&mut self) {
        if let Some(drained) = &self.draining {
            if drained.try_recv() != Err(TryRecvError::Empty) {
                self.draining = None;
                self.finish_reset();
            }
        }
    }

    fn finish_reset(&mut self) {
        // A ring of the bell before the reset is nothing to the next driver.
        for kick in &self.kicks {
            let _ = kick.read();
        }
        self.common.reset();
    }

    /// Function level reset, and power-on.
    fn reset(&mut self) {
        self.space.reset();
        if let Some(rom) = &self.rom {
            rom.show(&self.space, self.wiring.as_ref());
        }
        self.reset_device();
        self.msix.reset();
    }

    /// Has KVM watch the notification addresses where they are now, while the device runs.
    fn place_doorbells(&mut self) {
        let base = BAR.address(&self.space);
        let wanted = self.running && self.space.memory_enabled() && in_window(base, BAR.size);
        let wanted = wanted.then_some(base);
        if self.doorbells.as_ref().map(|(base, _)| *base) == wanted {
            return;
        }
        if let Some((base, queues)) = self.doorbells.take() {
            for index in queues {
                if let Some(kick) = self.kicks.get(usize::from(index)) {
                    self.wiring.unwatch(kick, doorbell(base, index));
                }
            }
        }
        if let Some(base) = wanted {
            let watched = self.common.enabled().filter_map(|(index, _)| {
                let kick = self.kicks.get(usize::from(index))?;
                let watched = self.wiring.watch(kick, doorbell(base, index));
                watched.is_ok().then_some(index)
            });
            self.doorbells = Some((base, watched.collect()));
        }
    }
}

fn doorbell(base: u64, index: u16) -> u64 {
    base.wrapping_add(NOTIFY)
        .wrapping_add(u64::from(NOTIFY_STRIDE) * u64::from(index))
}
