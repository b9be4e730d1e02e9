// SPDX-License-Identifier: Apache-2.0
//! I/O threads: they take requests off virtqueues, have an image engine carry them out, and give them back.
//!
//! A machine has a fixed number of them, one by default. Each has one engine (one ring) and serves whole
//! devices, all queues of several disks. It sleeps in epoll until a driver rings a doorbell (an ioeventfd),
//! the engine has something, or the machine sends a command. Guest memory itself is what the engine reads and
//! writes; it is never registered with the kernel.
//!
//! Fairness and bounds: one visit to a queue takes at most as many requests as the queue has entries, then all
//! others get their turn; a queue has at most that many requests in flight, however often a hostile driver
//! offers the same descriptors.
//!
//! | command | effect |
//! |---|---|
//! | start | queues are served |
//! | stop (the driver resets) | nothing new is begun; answered when nothing is in flight, the queues are gone |
//! | pause (the machine stands) | the same, but the queues stay |
//! | resume | the queues are looked at and served again |
//! | close | the image is made durable and let go |
//!
//! A driver that breaks a ring gets DEVICE_NEEDS_RESET; what is in flight then ends without an answer.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use serde_json::json;
use vm_memory::{Bytes, GuestAddress};
use vmbus_qcow2::{Completion, Engine, Image, Op, Request, Ring, Slot};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::thread::{spawn, Role, ThreadHook};
use crate::virtio::blk::{self, BlkRequest, Work, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED};
use crate::virtio::queue::Fault;
use crate::virtio::{rng, Activation, ActiveQueue, Backend};

/// What an I/O thread serves.
pub enum Served {
    /// A disk on an active image.
    Disk {
        /// What requests are checked against.
        disk: blk::Disk,
        /// Where they go.
        image: Arc<Image>,
        /// What has happened.
        counters: Arc<Counters>,
    },
    /// Random numbers.
    Rng,
}

/// What has happened on a disk since the machine was built.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    write_zeroes: AtomicU64,
    errors: AtomicU64,
    faults: AtomicU64,
}

impl Counters {
    fn completed(&self, op: Op, len: u64, failed: bool) {
        let (requests, bytes) = match op {
            Op::Read => (&self.reads, Some(&self.read_bytes)),
            Op::Write { .. } => (&self.writes, Some(&self.written_bytes)),
            Op::Flush => (&self.flushes, None),
            Op::Discard => (&self.discards, None),
            Op::WriteZeroes { .. } => (&self.write_zeroes, None),
        };
        requests.fetch_add(1, Ordering::Relaxed);
        if failed {
            self.errors.fetch_add(1, Ordering::Relaxed);
        } else if let Some(bytes) = bytes {
            bytes.fetch_add(len, Ordering::Relaxed);
        }
    }

    /// Requests by kind, bytes moved, requests that failed, and how often the driver broke the rules.
    pub fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "reads": get(&self.reads),
            "read_bytes": get(&self.read_bytes),
            "writes": get(&self.writes),
            "written_bytes": get(&self.written_bytes),
            "flushes": get(&self.flushes),
            "discards": get(&self.discards),
            "write_zeroes": get(&self.write_zeroes),
            "errors": get(&self.errors),
            "faults": get(&self.faults),
        })
    }
}

enum Command {
    Start(usize, Activation),
    Stop(usize, Sender<()>),
    Pause(usize, Sender<()>),
    Resume(usize),
    Close(usize, Sender<Result<()>>),
    Exit,
}

/// Commands on their way to the thread; None once it is gone, so that whoever waits for an answer is hung up on.
struct Mailbox {
    commands: Mutex<Option<Vec<Command>>>,
    wake: EventFd,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Option<Vec<Command>>> {
        self.commands.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn post(&self, command: Command) {
        if let Some(commands) = self.lock().as_mut() {
            commands.push(command);
            // A full counter wakes as well.
            let _ = self.wake.write(1);
        }
    }

    fn take(&self) -> Vec<Command> {
        let _ = self.wake.read();
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }
}

/// Called when an I/O thread ends although nobody told it to: its disks answer no more.
pub type Trouble = Arc<dyn Fn(String) + Send + Sync>;

/// Closes the mailbox when the thread ends, however it ends.
struct Closing {
    mailbox: Arc<Mailbox>,
    trouble: Trouble,
    /// Why it ends; None when it was told to.
    reason: Option<String>,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.mailbox.lock().take();
        if let Some(reason) = self.reason.take() {
            (self.trouble)(reason);
        }
    }
}

/// An I/O thread. Dropping it ends it, once nothing is in flight.
pub struct IoThread {
    index: usize,
    mailbox: Arc<Mailbox>,
    thread: Mutex<Option<JoinHandle<Result<Result<()>>>>>,
}

impl IoThread {
    /// Starts thread `index` on `ring` (None: plain system calls), to serve these; a port for each comes back.
    /// `trouble` hears of an end that nobody asked for.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no thread or the ring has no room for all files.
    pub fn start(
        index: usize,
        ring: Option<Ring>,
        served: Vec<Served>,
        hook: &ThreadHook,
        trouble: &Trouble,
    ) -> Result<(IoThread, Vec<Port>)> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::kernel("eventfd", e))?;
        let mailbox = Arc::new(Mailbox {
            commands: Mutex::new(Some(Vec::new())),
            wake,
        });
        let ports = (0..served.len())
            .map(|device| Port {
                mailbox: mailbox.clone(),
                device,
            })
            .collect();
        let mut closing = Closing {
            mailbox: mailbox.clone(),
            trouble: trouble.clone(),
            reason: None,
        };
        let (started, start) = channel();
        let thread = spawn(&format!("block-{index}"), Role::Block, hook, move || {
            let mut server = match Server::new(ring, served, closing.mailbox.clone()) {
                Ok(server) => server,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return Ok(());
                }
            };
            let _ = started.send(Ok(()));
            // Should it panic, this is why.
            closing.reason = Some(format!("I/O thread {index} panicked"));
            let result = server.run();
            closing.reason = result.as_ref().err().map(ToString::to_string);
            // The ring goes first: nobody is told that all is quiet while it is not.
            drop(server);
            drop(closing);
            result
        })?;
        let thread = IoThread {
            index,
            mailbox,
            thread: Mutex::new(Some(thread)),
        };
        match start.recv() {
            Ok(result) => result.map(|()| (thread, ports)),
            // It never came to its work: the hook failed.
            Err(_) => Err(thread
                .join()
                .err()
                .unwrap_or_else(|| Error::internal("the I/O thread ended at once"))),
        }
    }

    /// Waits for the thread's end; the second call finds nothing to wait for.
    fn join(&self) -> Result<()> {
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        match thread.map(JoinHandle::join) {
            None | Some(Ok(Ok(Ok(())))) => Ok(()),
            Some(Ok(Ok(Err(error)) | Err(error))) => Err(error),
            Some(Err(_)) => Err(Error::internal("the I/O thread panicked")),
        }
    }
}

impl Device for IoThread {
    fn id(&self) -> String {
        format!("io/{}", self.index)
    }

    fn stop(&self) -> Result<()> {
        self.mailbox.post(Command::Exit);
        self.join()
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// One served device, seen from outside of its thread.
#[derive(Clone)]
pub struct Port {
    mailbox: Arc<Mailbox>,
    device: usize,
}

impl Port {
    fn ask(&self, command: impl FnOnce(usize, Sender<()>) -> Command) -> Receiver<()> {
        let (sender, receiver) = channel();
        self.mailbox.post(command(self.device, sender));
        receiver
    }
}

impl Backend for Port {
    fn start(&self, activation: Activation) {
        self.mailbox.post(Command::Start(self.device, activation));
    }

    fn stop(&self) -> Receiver<()> {
        self.ask(Command::Stop)
    }
}

/// A served device, as the machine's control thread sees it.
pub struct IoDevice {
    id: String,
    port: Port,
    counters: Option<Arc<Counters>>,
}

impl IoDevice {
    /// The device behind `port`, with its name in events and statistics.
    pub fn new(id: String, port: Port, counters: Option<Arc<Counters>>) -> IoDevice {
        IoDevice { id, port, counters }
    }

    fn gone(&self) -> Error {
        Error::new(
            Kind::Internal,
            "",
            format!("{}: its I/O thread is gone", self.id),
        )
    }
}

impl Device for IoDevice {
    fn id(&self) -> String {
        self.id.clone()
    }

    fn pause(&self) -> Result<()> {
        let paused = self.port.ask(Command::Pause);
        paused.recv().map_err(|_| self.gone())
    }

    fn resume(&self) {
        self.port.mailbox.post(Command::Resume(self.port.device));
    }

    fn stop(&self) -> Result<()> {
        let (sender, receiver) = channel();
        let close = Command::Close(self.port.device, sender);
        self.port.mailbox.post(close);
        receiver.recv().map_err(|_| self.gone())?
    }

    fn stats(&self) -> serde_json::Value {
        match &self.counters {
            Some(counters) => counters.to_json(),
            None => serde_json::Value::Null,
        }
    }
}

/// Epoll's data for the mailbox and for the engine; doorbells have device and queue.
const WAKE: u64 = u64::MAX;
const ENGINE: u64 = u64::MAX - 1;

fn bell(device: usize, queue: usize) -> u64 {
    (device as u64) << 32 | queue as u64
}

/// The thread's own state.
struct Server {
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
    in_flight: usize,
    /// Who hears when nothing is in flight, and whether the queues go then.
    drains: Vec<(Sender<()>, bool)>,
}

enum Kinds {
    Disk {
        disk: blk::Disk,
        image: Arc<Image>,
        slot: Option<Slot>,
        counters: Arc<Counters>,
    },
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
    interrupt: Arc<crate::virtio::interrupt::Interrupt>,
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
    /// Guest address of the status byte.
    status: u64,
    op: Op,
    len: u64,
}

impl Server {
    fn new(ring: Option<Ring>, served: Vec<Served>, mailbox: Arc<Mailbox>) -> Result<Server> {
        let mut engine = match ring {
            Some(ring) => Engine::uring(ring),
            None => Engine::blocking().map_err(|e| Error::kernel("eventfd", e))?,
        };
        let mut devices = Vec::with_capacity(served.len());
        for served in served {
            let kind = match served {
                Served::Disk {
                    disk,
                    image,
                    counters,
                } => Kinds::Disk {
                    disk,
                    slot: Some(engine.attach(image.clone()).map_err(image_error)?),
                    image,
                    counters,
                },
                Served::Rng => Kinds::Rng,
            };
            devices.push(ServedDevice {
                kind,
                active: None,
                paused: false,
                in_flight: 0,
                drains: Vec::new(),
            });
        }
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), WAKE)?;
        watch(&epoll, engine.event_fd(), ENGINE)?;
        Ok(Server {
            mailbox,
            epoll,
            engine,
            devices,
            pending: Slab::default(),
            again: VecDeque::new(),
            exiting: false,
        })
    }

    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let mut done = Vec::new();
        while !(self.exiting && self.pending.is_empty()) {
            let timeout = if self.again.is_empty() { -1 } else { 0 };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => 0,
                Err(e) => return Err(Error::kernel("epoll_wait", e)),
            };
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

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Start(device, activation) => self.activate(device, activation)?,
            Command::Stop(device, sender) => self.drain(device, sender, true),
            Command::Pause(device, sender) => self.drain(device, sender, false),
            Command::Resume(device) => {
                if let Some(served) = self.devices.get_mut(device) {
                    served.paused = false;
                }
                self.look_at_all(device);
            }
            Command::Close(device, sender) => {
                let _ = sender.send(self.close(device));
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
            watch(&self.epoll, inner.kick.as_raw_fd(), bell(device, place))?;
            queues.push(ServedQueue {
                size: inner.queue.size(),
                inner,
                in_flight: 0,
            });
        }
        served.active = Some(Active {
            queues,
            activation: Shared {
                features: activation.features,
                interrupt: activation.interrupt,
            },
            halted: false,
            broken: false,
        });
        // The driver may have made requests available before it was ready.
        self.look_at_all(device);
        Ok(())
    }

    fn look_at_all(&mut self, device: usize) {
        let active = self.devices.get(device).and_then(|d| d.active.as_ref());
        let count = active.map_or(0, |active| active.queues.len());
        self.again.extend((0..count).map(|queue| (device, queue)));
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
        for (sender, stop) in served.drains.drain(..) {
            if stop {
                for queue in served.active.take().iter().flat_map(|a| &a.queues) {
                    unwatch(&self.epoll, queue.inner.kick.as_raw_fd());
                }
            }
            // Whoever asked may have gone.
            let _ = sender.send(());
        }
    }

    /// Makes the image durable and lets it go. Comes after a pause: nothing is in flight.
    fn close(&mut self, device: usize) -> Result<()> {
        let Some(served) = self.devices.get_mut(device) else {
            return Ok(());
        };
        served.paused = true;
        if let Kinds::Disk { image, slot, .. } = &mut served.kind {
            if let Some(slot) = slot.take() {
                self.engine.detach(slot).map_err(image_error)?;
                image.inactivate().map_err(image_error)?;
            }
        }
        Ok(())
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
        let Some(active) = served.active.as_mut().filter(|active| !active.halted) else {
            return Ok(());
        };
        let Some(queue) = active.queues.get_mut(place).filter(|_| !served.paused) else {
            return Ok(());
        };
        queue.inner.queue.disable_notifications()?;
        let memory = queue.inner.queue.memory().clone();
        let mut budget = queue.size;
        loop {
            // A queue this full goes on when something completes.
            if queue.in_flight >= queue.size {
                break;
            }
            if budget == 0 {
                self.again.push_back((device, place));
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
            match &served.kind {
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
                            let id = self.pending.insert(Pending {
                                device,
                                queue: place,
                                head,
                                status,
                                op: work.op,
                                len: work.len,
                            });
                            queue.in_flight += 1;
                            served.in_flight += 1;
                            let request = Request {
                                id,
                                op: work.op,
                                offset: work.offset,
                                len: work.len,
                                buffers: work.buffers,
                            };
                            // SAFETY: the buffers are guest memory, which the queue keeps mapped; the queue is
                            // not dropped while a request of it is in flight (`settle`).
                            unsafe { self.engine.submit(*slot, request) };
                        }
                        (Work::Done(status_byte, written), _) => {
                            if status_byte != STATUS_OK {
                                counters.errors.fetch_add(1, Ordering::Relaxed);
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
        if let Kinds::Disk { counters, .. } = &served.kind {
            counters.completed(pending.op, pending.len, result.is_err());
        }
        let Some(active) = served.active.as_mut() else {
            return Ok(());
        };
        let Some(queue) = active.queues.get_mut(pending.queue) else {
            return Ok(());
        };
        if queue.in_flight == queue.size {
            self.again.push_back((pending.device, pending.queue));
        }
        queue.in_flight -= 1;
        if active.broken {
            return Ok(());
        }
        let read = match pending.op {
            Op::Read => pending.len as u32,
            _ => 0,
        };
        // What was written is counted from the first byte: a read that failed may have left it as it was.
        let (status, written) = match result {
            Ok(()) => (STATUS_OK, read.saturating_add(1)),
            Err(error) => (status_of(&error), u32::from(read == 0)),
        };
        let ring = &mut queue.inner.queue;
        ring.memory()
            .write_obj(status, GuestAddress(pending.status))?;
        ring.push(pending.head, written)
    }

    fn fail(&mut self, device: usize) {
        if let Some(served) = self.devices.get_mut(device) {
            if let Kinds::Disk { counters, .. } = &served.kind {
                counters.faults.fetch_add(1, Ordering::Relaxed);
            }
            if let Some(active) = &mut served.active {
                active.halted = true;
                active.broken = true;
                active.activation.interrupt.fail();
            }
        }
    }
}

fn status_of(error: &vmbus_qcow2::Error) -> u8 {
    match error.kind() {
        vmbus_qcow2::Kind::NotSupported => STATUS_UNSUPPORTED,
        _ => STATUS_IOERR,
    }
}

/// An image's error, with its kind kept.
pub fn image_error(error: vmbus_qcow2::Error) -> Error {
    use vmbus_qcow2::Kind as Image;
    let kind = match error.kind() {
        Image::InvalidArgument => Kind::InvalidArgument,
        Image::ImageInvalid => Kind::ImageInvalid,
        Image::BackingChanged => Kind::BackingChanged,
        Image::NotSupported => Kind::NotSupported,
        Image::InUse => Kind::InUse,
        Image::InvalidState => Kind::InvalidState,
        Image::NoSpace | Image::Io => Kind::Unavailable,
    };
    Error::new(kind, "", error.message())
}

fn watch(epoll: &Epoll, fd: RawFd, data: u64) -> Result<()> {
    epoll
        .ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(EventSet::IN, data),
        )
        .map_err(|e| Error::kernel("epoll_ctl", e))
}

fn unwatch(epoll: &Epoll, fd: RawFd) {
    // It fails only for an fd that is not watched.
    let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

/// Requests by id, with ids that are used again.
#[derive(Default)]
struct Slab {
    entries: Vec<Option<Pending>>,
    free: Vec<usize>,
}

impl Slab {
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
