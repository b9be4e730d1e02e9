// SPDX-License-Identifier: Apache-2.0
//! The life of an I/O thread: doorbells, commands and completions, in turn.
//!
//! Each round takes what epoll has, serves the queues that were rung or left over, and lets the engine go on.
//! Nothing in a round waits, and each part of it is bounded by the queues' sizes.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Sender;
use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::{Completion, Engine, Image, Op, Pool, Request, Ring, Slot};
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use super::scsi::{is_for_events, Adapter, Begun, Waiting};
use super::{grow, image_error, Counters, Served};
use crate::error::{Error, Result};
use crate::io::{Answer, Change, Command, Mailbox, Newcomer, Serve};
use crate::poll::{self, unwatch, watch};
use crate::scsi::sense::Sense;
use crate::virtio::blk::{self, BlkRequest, Work, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::live::ChangingConfig;
use crate::virtio::queue::Fault;
use crate::virtio::scsi::{write_event, Address};
use crate::virtio::{self, rng, Activation, ActiveQueue};

/// Epoll's data for the mailbox and for the engine; doorbells have device and queue.
const WAKE: u64 = u64::MAX;
const ENGINE: u64 = u64::MAX - 1;

fn bell(device: usize, queue: usize) -> u64 {
    (device as u64) << 32 | queue as u64
}

/// The thread's own state.
pub(super) struct Server {
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    engine: Engine,
    devices: Vec<ServedDevice>,
    pending: Slab,
    /// Queues to look at again although nobody rings: device and place in its list.
    again: VecDeque<(usize, usize)>,
    exiting: bool,
}

struct ServedDevice {
    kind: Kinds,
    active: Option<Active>,
    paused: bool,
    /// What lay behind it is gone, and its number free.
    closed: bool,
    in_flight: usize,
    /// Who hears when nothing is in flight, and whether the queues go then.
    drains: Vec<(Sender<()>, bool)>,
    /// What is done as soon as nothing is in flight; nothing is begun before.
    changes: VecDeque<(usize, Change, Answer)>,
}

enum Kinds {
    Disk {
        disk: blk::Disk,
        config: Arc<ChangingConfig>,
        image: Arc<Image>,
        slot: Option<Slot>,
        counters: Arc<Counters>,
    },
    Scsi(Adapter),
    Rng,
}

struct Active {
    queues: Vec<ServedQueue>,
    activation: Shared,
    /// The driver broke the rules, or is resetting the device: nothing new is begun.
    halted: bool,
    /// The driver broke the rules: nothing is given back either.
    broken: bool,
}

struct Shared {
    features: u64,
    interrupt: Arc<Interrupt>,
}

struct ServedQueue {
    inner: ActiveQueue,
    in_flight: u16,
    size: u16,
}

/// A request that the engine has.
struct Pending {
    device: usize,
    queue: usize,
    head: u16,
    to: To,
    op: Op,
    offset: u64,
    len: u64,
}

/// Who waits for a request.
enum To {
    /// A disk's driver, at the guest address of the status byte.
    Status(u64),
    /// A SCSI host adapter's.
    Reply(Waiting),
}

impl Serve for Server {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let mut done = Vec::new();
        while !(self.exiting && self.pending.is_empty()) {
            let timeout = if self.again.is_empty() { -1 } else { 0 };
            let count = poll::wait(&self.epoll, timeout, &mut events)?;
            for event in events.iter().take(count) {
                match event.data() {
                    WAKE => {
                        for command in self.mailbox.take() {
                            self.obey(command)?;
                        }
                    }
                    ENGINE => {}
                    data => self.rung((data >> 32) as usize, data as u32 as usize),
                }
            }
            for _ in 0..self.again.len() {
                if let Some((device, queue)) = self.again.pop_front() {
                    self.serve(device, queue);
                }
            }
            self.engine.poll(&mut done).map_err(image_error)?;
            self.complete(&mut done);
        }
        Ok(())
    }
}

impl Server {
    /// With everything attached and nothing active.
    pub(super) fn new(
        ring: Option<Ring>,
        served: Vec<Served>,
        pool: Option<Arc<Pool>>,
        mailbox: Arc<Mailbox>,
    ) -> Result<Server> {
        let mut engine = match ring {
            Some(ring) => Engine::uring(ring),
            None => Engine::blocking().map_err(|e| Error::kernel("eventfd", e))?,
        };
        if let Some(pool) = pool {
            engine.use_pool(&pool);
        }
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        watch(&epoll, engine.event_fd(), EventSet::IN, ENGINE)?;
        let mut server = Server {
            mailbox,
            epoll,
            engine,
            devices: Vec::with_capacity(served.len()),
            pending: Slab::default(),
            again: VecDeque::new(),
            exiting: false,
        };
        for served in served {
            server.add(served)?;
        }
        Ok(server)
    }

    /// Serves one more; its number comes back.
    fn add(&mut self, served: Served) -> Result<usize> {
        let kind = match served {
            Served::Disk {
                disk,
                config,
                image,
                counters,
            } => Kinds::Disk {
                disk,
                config,
                slot: Some(self.engine.attach(image.clone()).map_err(image_error)?),
                image,
                counters,
            },
            Served::Scsi(units) => Kinds::Scsi(Adapter::new(units, &mut self.engine)?),
            Served::Rng => Kinds::Rng,
        };
        let device = ServedDevice {
            kind,
            active: None,
            paused: false,
            closed: false,
            in_flight: 0,
            drains: Vec::new(),
            changes: VecDeque::new(),
        };
        let place = self.devices.iter().position(|device| device.closed);
        match place.and_then(|place| self.devices.get_mut(place).zip(Some(place))) {
            Some((vacant, place)) => {
                *vacant = device;
                Ok(place)
            }
            None => {
                self.devices.push(device);
                Ok(self.devices.len() - 1)
            }
        }
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Start(device, activation) => self.activate(device, activation)?,
            Command::Stop(device, sender) => self.drain(device, sender, true),
            Command::Pause(device, sender) => self.drain(device, sender, false),
            Command::Save(device, sender) => {
                let _ = sender.send(self.saved(device));
            }
            Command::Resume(device) => {
                if let Some(served) = self.devices.get_mut(device) {
                    served.paused = false;
                }
                self.look_at_all(device);
            }
            Command::Close(device, sender) => {
                let _ = sender.send(self.close(device));
            }
            Command::Add(newcomer, sender) => {
                let added = match newcomer {
                    Newcomer::Block(served) => self.add(served),
                    Newcomer::Network(_) => Err(Newcomer::misplaced()),
                };
                // Whoever asked may have gone.
                let _ = sender.send(added);
            }
            other @ Command::Link(..) => other.refuse(),
            Command::Change(device, unit, change, answer) => {
                if let Some(served) = self.devices.get_mut(device) {
                    served.changes.push_back((unit, change, answer));
                    self.settle(device);
                }
            }
            Command::Exit => self.exiting = true,
        }
        Ok(())
    }

    fn activate(&mut self, device: usize, activation: Activation) -> Result<()> {
        let Some(served) = self.devices.get_mut(device) else {
            return Ok(());
        };
        let mut queues = Vec::with_capacity(activation.queues.len());
        for (place, inner) in activation.queues.into_iter().enumerate() {
            watch(
                &self.epoll,
                inner.kick.as_raw_fd(),
                EventSet::IN,
                bell(device, place),
            )?;
            queues.push(ServedQueue {
                size: inner.queue.size(),
                inner,
                in_flight: 0,
            });
        }
        // A driver that had broken the rules before the machine was saved is served no more.
        let broken = activation.interrupt.is_broken();
        if let (Kinds::Scsi(adapter), Some(own)) = (&mut served.kind, &activation.restored) {
            adapter.take(own);
        }
        served.active = Some(Active {
            queues,
            activation: Shared {
                features: activation.features,
                interrupt: activation.interrupt,
            },
            halted: broken,
            broken,
        });
        // The driver may have made requests available before it was ready.
        self.look_at_all(device);
        Ok(())
    }

    fn saved(&self, device: usize) -> Option<virtio::Served> {
        let active = self.devices.get(device)?.active.as_ref()?;
        let queues = active.queues.iter();
        Some(virtio::Served {
            queues: queues
                .map(|queue| (queue.inner.index, queue.inner.queue.position()))
                .collect(),
            own: match &self.devices.get(device)?.kind {
                Kinds::Scsi(adapter) => adapter.saved().ok()?,
                _ => virtio::State::Null,
            },
        })
    }

    fn look_at_all(&mut self, device: usize) {
        let active = self.devices.get(device).and_then(|d| d.active.as_ref());
        let count = active.map_or(0, |active| active.queues.len());
        for queue in 0..count {
            soon(&mut self.again, (device, queue));
        }
    }

    fn drain(&mut self, device: usize, sender: Sender<()>, stop: bool) {
        let Some(served) = self.devices.get_mut(device) else {
            return;
        };
        match &mut served.active {
            Some(active) if stop => active.halted = true,
            _ if stop => {}
            _ => served.paused = true,
        }
        served.drains.push((sender, stop));
        self.settle(device);
    }

    /// Tells those who wait when nothing is in flight any more.
    fn settle(&mut self, device: usize) {
        let Some(served) = self.devices.get_mut(device) else {
            return;
        };
        if served.in_flight > 0 {
            return;
        }
        let mut changed = !served.changes.is_empty();
        for (unit, change, answer) in std::mem::take(&mut served.changes) {
            answer.give(served.change(unit, change, &mut self.engine));
        }
        changed |= served.release_held();
        for (sender, stop) in served.drains.drain(..) {
            if stop {
                if let Kinds::Scsi(adapter) = &mut served.kind {
                    adapter.forget();
                }
                for queue in served.active.take().iter().flat_map(|a| &a.queues) {
                    unwatch(&self.epoll, queue.inner.kick.as_raw_fd());
                }
            }
            // Whoever asked may have gone.
            let _ = sender.send(());
        }
        if changed {
            self.look_at_all(device);
        }
    }

    /// Makes the image durable and lets it go. Comes after a pause: nothing is in flight.
    fn close(&mut self, device: usize) -> Result<()> {
        let Some(served) = self.devices.get_mut(device) else {
            return Ok(());
        };
        served.paused = true;
        served.closed = served.active.is_none();
        match &mut served.kind {
            Kinds::Disk { image, slot, .. } => {
                if let Some(slot) = slot.take() {
                    self.engine.detach(slot).map_err(image_error)?;
                    image.close().map_err(image_error)?;
                }
                Ok(())
            }
            Kinds::Scsi(adapter) => adapter.close(&mut self.engine),
            Kinds::Rng => Ok(()),
        }
    }

    fn rung(&mut self, device: usize, queue: usize) {
        let active = self.devices.get(device).and_then(|d| d.active.as_ref());
        if let Some(queue) = active.and_then(|active| active.queues.get(queue)) {
            // Empty when another event of this round has served it.
            let _ = queue.inner.kick.read();
        }
        self.serve(device, queue);
    }

    /// Takes requests off a queue, up to its size, and begins them.
    fn serve(&mut self, device: usize, queue: usize) {
        if let Err(_fault) = self.try_serve(device, queue) {
            self.fail(device);
        }
    }

    fn try_serve(&mut self, device: usize, place: usize) -> std::result::Result<(), Fault> {
        let Some(served) = self.devices.get_mut(device) else {
            return Ok(());
        };
        let held = served.is_held();
        let Some(active) = served.active.as_mut().filter(|active| !active.halted) else {
            return Ok(());
        };
        let Some(queue) = active.queues.get_mut(place).filter(|_| !held) else {
            return Ok(());
        };
        if let (Kinds::Scsi(adapter), true) = (&mut served.kind, is_for_events(queue.inner.index)) {
            if adapter.has_missed() {
                served.tell_event(None);
            }
            return Ok(());
        }
        queue.inner.queue.disable_notifications()?;
        let memory = queue.inner.queue.memory().clone();
        let mut budget = queue.size;
        let mut settle = false;
        loop {
            // A queue this full goes on when something completes.
            if queue.in_flight >= queue.size {
                break;
            }
            if budget == 0 {
                soon(&mut self.again, (device, place));
                break;
            }
            let Some(chain) = queue.inner.queue.pop()? else {
                if queue.inner.queue.enable_notifications()? {
                    budget -= 1;
                    continue;
                }
                break;
            };
            budget -= 1;
            match &mut served.kind {
                Kinds::Scsi(adapter) => {
                    let head = chain.head;
                    match adapter.begin(queue.inner.index, place, chain, &memory)? {
                        Begun::Done(written) => queue.inner.queue.push(head, written)?,
                        Begun::Held => {
                            settle = served.in_flight == 0;
                            break;
                        }
                        Begun::Image {
                            slot,
                            work,
                            data,
                            waiting,
                        } => {
                            let buffers = data.iovecs(&memory)?;
                            let pending = Pending {
                                device,
                                queue: place,
                                head,
                                to: To::Reply(waiting),
                                op: work.op,
                                offset: work.offset,
                                len: work.len,
                            };
                            let request = self.pending.request(pending, buffers);
                            queue.in_flight += 1;
                            served.in_flight += 1;
                            // SAFETY: as below.
                            unsafe { self.engine.submit(slot, request) };
                        }
                    }
                }
                Kinds::Rng => {
                    let written = rng::answer(&chain, &memory)?;
                    queue.inner.queue.push(chain.head, written)?;
                }
                Kinds::Disk {
                    disk,
                    slot,
                    counters,
                    ..
                } => {
                    let head = chain.head;
                    let BlkRequest { status, work } =
                        blk::read_request(chain, &memory, disk, active.activation.features)?;
                    match (work, slot) {
                        (Work::Image(work), Some(slot)) => {
                            let pending = Pending {
                                device,
                                queue: place,
                                head,
                                to: To::Status(status),
                                op: work.op,
                                offset: work.offset,
                                len: work.len,
                            };
                            let request = self.pending.request(pending, work.buffers);
                            queue.in_flight += 1;
                            served.in_flight += 1;
                            // SAFETY: the buffers are guest memory, which the queue keeps mapped; the queue is
                            // not dropped while a request of it is in flight (`settle`).
                            unsafe { self.engine.submit(*slot, request) };
                        }
                        (Work::Done(status_byte, written), _) => {
                            if status_byte != STATUS_OK {
                                counters.refused();
                            }
                            memory.write_obj(status_byte, GuestAddress(status))?;
                            queue.inner.queue.push(head, written.saturating_add(1))?;
                        }
                        (Work::Image(_), None) => {
                            memory.write_obj(STATUS_IOERR, GuestAddress(status))?;
                            queue.inner.queue.push(head, 0)?;
                        }
                    }
                }
            }
        }
        if queue.inner.queue.wants_interrupt()? {
            active.activation.interrupt.used(queue.inner.index);
        }
        if settle {
            self.settle(device);
        }
        Ok(())
    }

    /// Gives completed requests back and tells their drivers, once a queue.
    fn complete(&mut self, done: &mut Vec<Completion>) {
        let mut touched: Vec<(usize, usize)> = Vec::new();
        for completion in done.drain(..) {
            let Some(pending) = self.pending.remove(completion.id) else {
                continue;
            };
            let place = (pending.device, pending.queue);
            if !touched.contains(&place) {
                touched.push(place);
            }
            let device = pending.device;
            if self.give_back(pending, completion.result).is_err() {
                self.fail(device);
            }
        }
        for (device, place) in touched {
            let active = self.devices.get_mut(device).and_then(|d| d.active.as_mut());
            if let Some(active) = active.filter(|active| !active.broken) {
                let queue = active.queues.get_mut(place);
                match queue.map(|queue| (queue.inner.queue.wants_interrupt(), queue)) {
                    Some((Ok(true), queue)) => active.activation.interrupt.used(queue.inner.index),
                    Some((Err(_), _)) => self.fail(device),
                    _ => {}
                }
            }
            self.settle(device);
        }
    }

    fn give_back(
        &mut self,
        pending: Pending,
        result: std::result::Result<(), vmbus_qcow2::Error>,
    ) -> std::result::Result<(), Fault> {
        let Some(served) = self.devices.get_mut(pending.device) else {
            return Ok(());
        };
        served.in_flight -= 1;
        let counters = match (&served.kind, &pending.to) {
            (Kinds::Disk { counters, .. }, _) => Some(&**counters),
            (Kinds::Scsi(adapter), To::Reply(waiting)) => adapter.counters(waiting),
            _ => None,
        };
        if let Some(counters) = counters {
            let range = (pending.offset, pending.len);
            counters.completed(pending.op, range, result.is_err());
        }
        let Some(active) = served.active.as_mut() else {
            return Ok(());
        };
        let Some(queue) = active.queues.get_mut(pending.queue) else {
            return Ok(());
        };
        if queue.in_flight == queue.size {
            soon(&mut self.again, (pending.device, pending.queue));
        }
        queue.in_flight -= 1;
        if active.broken {
            return Ok(());
        }
        let read = match pending.op {
            Op::Read => pending.len as u32,
            _ => 0,
        };
        let ring = &mut queue.inner.queue;
        let written = match (pending.to, &served.kind) {
            (To::Reply(waiting), Kinds::Scsi(adapter)) => {
                let done = (pending.op, pending.len);
                adapter.complete(&waiting, ring.memory(), done, result.is_err())?
            }
            (To::Reply(_), _) => 0,
            (To::Status(place), _) => {
                // What was written is counted from the first byte: a read that failed may have left it as it was.
                let (status, written) = match result {
                    Ok(()) => (STATUS_OK, read.saturating_add(1)),
                    Err(error) => (status_of(&error), u32::from(read == 0)),
                };
                ring.memory().write_obj(status, GuestAddress(place))?;
                written
            }
        };
        ring.push(pending.head, written)
    }

    fn fail(&mut self, device: usize) {
        if let Some(served) = self.devices.get_mut(device) {
            if let Kinds::Disk { counters, .. } = &served.kind {
                counters.broken();
            }
            if let Some(active) = &mut served.active {
                active.halted = true;
                active.broken = true;
                active.activation.interrupt.fail();
            }
        }
    }
}

impl ServedDevice {
    /// Whether nothing is to be begun.
    fn is_held(&self) -> bool {
        let waiting = match &self.kind {
            Kinds::Scsi(adapter) => adapter.holds(),
            _ => false,
        };
        self.paused || waiting || !self.changes.is_empty()
    }

    /// Nothing is in flight.
    fn change(&mut self, unit: usize, change: Change, engine: &mut Engine) -> Result<()> {
        match (change, &mut self.kind) {
            (
                Change::Size(size),
                Kinds::Disk {
                    disk,
                    config,
                    image,
                    slot: Some(_),
                    ..
                },
            ) => {
                grow(image, size)?;
                disk.capacity = size / blk::SECTOR;
                let shown = config.set(blk::CAPACITY, &disk.capacity.to_le_bytes());
                if let Some(active) = self.active.as_ref().filter(|_| shown) {
                    active.activation.interrupt.configured();
                }
                Ok(())
            }
            (Change::Size(size), Kinds::Scsi(adapter)) => {
                adapter.resize(unit, size)?;
                let address = Address::of(unit as u8);
                self.tell_event(Some((address, Sense::CAPACITY_CHANGED)));
                Ok(())
            }
            (Change::Medium { medium, force }, Kinds::Scsi(adapter)) => {
                adapter.change_medium(unit, medium, force, engine)
            }
            (change, _) => Err(change.misplaced()),
        }
    }

    /// An event for the driver of a SCSI host adapter; None for one that only says that there were others.
    fn tell_event(&mut self, about: Option<(Address, Sense)>) {
        let Kinds::Scsi(adapter) = &mut self.kind else {
            return;
        };
        let Some(active) = self.active.as_mut().filter(|active| !active.halted) else {
            return;
        };
        let mut queues = active.queues.iter_mut();
        let Some(queue) = queues.find(|queue| is_for_events(queue.inner.index)) else {
            return;
        };
        let ring = &mut queue.inner.queue;
        let written = (|| {
            let Some(chain) = ring.pop()? else {
                return Ok(false);
            };
            let written = write_event(&chain, ring.memory(), about, about.is_none())?;
            ring.push(chain.head, written)?;
            Ok::<_, Fault>(true)
        })();
        match written {
            Ok(true) => active.activation.interrupt.used(queue.inner.index),
            Ok(false) => adapter.miss(),
            Err(_fault) => {
                active.halted = true;
                active.broken = true;
                active.activation.interrupt.fail();
            }
        }
    }

    /// Nothing is in flight: task management that waited for that is answered. True if there was some.
    fn release_held(&mut self) -> bool {
        let Kinds::Scsi(adapter) = &mut self.kind else {
            return false;
        };
        let Some(active) = self.active.as_mut().filter(|_| adapter.holds()) else {
            return false;
        };
        if active.broken {
            adapter.forget();
            return false;
        }
        let memory = active
            .queues
            .first()
            .map(|queue| queue.inner.queue.memory().clone());
        let answered = memory.map_or(Ok(Vec::new()), |memory| adapter.release(&memory));
        let given = answered.and_then(|answered| {
            for (place, head, written) in answered {
                if let Some(queue) = active.queues.get_mut(place) {
                    queue.inner.queue.push(head, written)?;
                    active.activation.interrupt.used(queue.inner.index);
                }
            }
            Ok(())
        });
        if given.is_err() {
            active.halted = true;
            active.broken = true;
            active.activation.interrupt.fail();
        }
        true
    }
}

/// Each queue once, however often its driver rings.
fn soon(again: &mut VecDeque<(usize, usize)>, queue: (usize, usize)) {
    if !again.contains(&queue) {
        again.push_back(queue);
    }
}

fn status_of(error: &vmbus_qcow2::Error) -> u8 {
    match error.kind() {
        vmbus_qcow2::Kind::NotSupported => STATUS_UNSUPPORTED,
        _ => STATUS_IOERR,
    }
}

/// Requests by id, with ids that are used again.
#[derive(Default)]
struct Slab {
    entries: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl Slab {
    /// What the engine is to be given for `pending`.
    fn request(&mut self, pending: Pending, buffers: SmallVec<[libc::iovec; 4]>) -> Request {
        let (op, offset, len) = (pending.op, pending.offset, pending.len);
        Request {
            id: self.insert(pending),
            op,
            offset,
            len,
            buffers,
        }
    }

    fn insert(&mut self, pending: Pending) -> u64 {
        let place = self.free.pop().unwrap_or(self.entries.len());
        match self.entries.get_mut(place) {
            Some(entry) => *entry = Some(pending),
            None => self.entries.push(Some(pending)),
        }
        place as u64
    }

    fn remove(&mut self, id: u64) -> Option<Pending> {
        let place = usize::try_from(id).ok()?;
        let pending = self.entries.get_mut(place)?.take()?;
        self.free.push(place);
        Some(pending)
    }

    fn is_empty(&self) -> bool {
        self.entries.len() == self.free.len()
    }
}
