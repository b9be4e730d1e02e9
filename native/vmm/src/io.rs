// SPDX-License-Identifier: Apache-2.0
//! I/O threads: their start, their mailbox and their end. What they do in between is their kind's business
//! ([`crate::block`], [`crate::net`]).
//!
//! A machine has a fixed number of them. Each serves whole devices, all queues of several, and sleeps in epoll
//! until a driver rings a doorbell (an ioeventfd), what lies behind the device has something, or the machine
//! sends a command.
//!
//! | command | effect |
//! |---|---|
//! | start | queues are served |
//! | stop (the driver resets) | nothing new is begun; answered when nothing is in flight, the queues are gone |
//! | pause (the machine stands) | the same, but the queues stay |
//! | save | answered with what is known of the queues; comes after a pause |
//! | resume | the queues are looked at and served again |
//! | close | what lies behind the device is let go, an image made durable before |
//! | add | a further device is served; it takes the number of one that was closed, if there is any |
//! | change | the host changes the device while it is served ([`Change`]); answered when it is done |
//!
//! A driver that breaks a ring gets DEVICE_NEEDS_RESET; what is in flight then ends without an answer.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vmbus_qcow2::Image;
use vmm_sys_util::eventfd::EventFd;

use crate::block;
use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::migrate::changes::Changed;
use crate::migrate::Copied;
use crate::net;
use crate::save::facts;
use crate::snapshots::{self, Mark};
use crate::state::State;
use crate::thread::{spawn, Role, ThreadHook};
use crate::virtio::{Activation, Backend, Served};

/// The work of a thread.
pub(crate) trait Serve {
    /// Until it is told to exit and nothing is in flight.
    fn run(&mut self) -> Result<()>;
}

/// What a device has done, counted by its thread and read by anybody.
pub trait Count: Send + Sync {
    /// The counters, as a JSON object.
    fn to_json(&self) -> serde_json::Value;
}

/// What a thread is told; the numbers are its devices'.
pub(crate) enum Command {
    Start(usize, Activation),
    Stop(usize, Sender<()>),
    Save(usize, Sender<Option<Served>>),
    Pause(usize, Sender<()>),
    Resume(usize),
    Close(usize, Sender<Result<()>>),
    Add(Newcomer, Sender<Result<usize>>),
    Link(usize, String, OwnedFd, Sender<Result<()>>),
    /// The device, and its unit where it has several.
    Change(usize, usize, Change, Answer),
    Exit,
}

impl Command {
    /// Answers what only threads of another kind do: a device that comes, a link, a change.
    pub(crate) fn refuse(self) {
        // Whoever asked may have gone.
        match self {
            Command::Add(_, sender) => {
                let _ = sender.send(Err(Newcomer::misplaced()));
            }
            Command::Link(_, _, _, sender) => {
                let _ = sender.send(Err(Newcomer::misplaced()));
            }
            Command::Change(_, _, change, answer) => answer.give(Err(change.misplaced())),
            _ => {}
        }
    }
}

/// What the host changes of a device that its guest uses.
pub enum Change {
    /// A network interface's cable is plugged in, or pulled.
    Carrier(bool),
    /// A disk has so many bytes from now on.
    Size(u64),
    /// Another medium is put into a drive, or its medium taken out.
    Medium {
        /// An active image, read-only.
        medium: Option<Arc<Image>>,
        /// Even if the guest has locked it.
        force: bool,
    },
    /// A socket of the host's is connected to a port of the guest's; answered when the guest has said yes.
    Connect(u32, OwnedFd),
    /// It is given to the guest's next connection to a port of the host's; answered then.
    Accept(u32, OwnedFd),
}

impl Change {
    /// The answer of a device of another kind.
    pub(crate) fn misplaced(&self) -> Error {
        let what = match self {
            Change::Carrier(_) => "a link",
            Change::Size(_) => "a size that can be changed",
            Change::Medium { .. } => "a medium that can be changed",
            Change::Connect(..) | Change::Accept(..) => "ports that can be connected to",
        };
        Error::invalid("device", format!("has not {what}"))
    }
}

/// Who hears how a change went; whoever drops it unheard says that the thread is gone.
pub struct Answer(Option<Box<dyn FnOnce(Result<String>) + Send>>);

impl Answer {
    /// `tell` gets JSON, or "" where there is nothing to say.
    pub(crate) fn new(tell: impl FnOnce(Result<String>) + Send + 'static) -> Answer {
        Answer(Some(Box::new(tell)))
    }

    pub(crate) fn give(self, result: Result<()>) {
        self.give_more(result.map(|()| String::new()));
    }

    pub(crate) fn give_more(mut self, result: Result<String>) {
        if let Some(tell) = self.0.take() {
            tell(result);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Err(Error::internal("the device's I/O thread is gone")));
        }
    }
}

/// A device that comes while its thread runs.
pub(crate) enum Newcomer {
    Block(block::Served),
    Network(net::Served),
}

impl Newcomer {
    /// The answer of a thread that serves another kind.
    pub(crate) fn misplaced() -> Error {
        Error::internal("a device came to an I/O thread of another kind")
    }
}

/// Commands on their way to the thread; None once it is gone, so that whoever waits for an answer is hung up on.
pub(crate) struct Mailbox {
    commands: Mutex<Option<Vec<Command>>>,
    /// Readable while there is something.
    pub(crate) wake: EventFd,
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

    /// What has come since the last time.
    pub(crate) fn take(&self) -> Vec<Command> {
        let _ = self.wake.read();
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }
}

/// Called when an I/O thread ends although nobody told it to: its devices answer no more.
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
    name: String,
    mailbox: Arc<Mailbox>,
    thread: Mutex<Option<JoinHandle<Result<Result<()>>>>>,
}

impl IoThread {
    /// Starts a thread that serves what `make` makes in it: `count` devices, a port for each comes back.
    /// `trouble` hears of an end that nobody asked for.
    ///
    /// # Errors
    /// What `make` says, or `Unavailable` when the kernel gives no thread.
    pub(crate) fn start<S: Serve>(
        name: &str,
        role: Role,
        count: usize,
        hook: &ThreadHook,
        trouble: &Trouble,
        make: impl FnOnce(Arc<Mailbox>) -> Result<S> + Send + 'static,
    ) -> Result<(IoThread, Vec<Port>)> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::kernel("eventfd", e))?;
        let mailbox = Arc::new(Mailbox {
            commands: Mutex::new(Some(Vec::new())),
            wake,
        });
        let ports = (0..count)
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
        let panicked = format!("I/O thread {name} panicked");
        let thread = spawn(name, role, hook, move || {
            let mut server = match make(closing.mailbox.clone()) {
                Ok(server) => server,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return Ok(());
                }
            };
            let _ = started.send(Ok(()));
            // Should it panic, this is why.
            closing.reason = Some(panicked);
            let result = server.run();
            closing.reason = result.as_ref().err().map(ToString::to_string);
            // The ring goes first: nobody is told that all is quiet while it is not.
            drop(server);
            drop(closing);
            result
        })?;
        let thread = IoThread {
            name: name.to_owned(),
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

    /// Has the thread serve a further device.
    ///
    /// # Errors
    /// `Unavailable` when it has no room for it; `Internal` when it is gone.
    pub(crate) fn add(&self, newcomer: Newcomer) -> Result<Port> {
        let (sender, receiver) = channel();
        self.mailbox.post(Command::Add(newcomer, sender));
        let gone = |_| Error::internal(format!("I/O thread {} is gone", self.name));
        Ok(Port {
            device: receiver.recv().map_err(gone)??,
            mailbox: self.mailbox.clone(),
        })
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
        format!("io/{}", self.name)
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
    fn ask<T>(&self, command: impl FnOnce(usize, Sender<T>) -> Command) -> Receiver<T> {
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

    fn saved(&self) -> Receiver<Option<Served>> {
        self.ask(Command::Save)
    }
}

/// A served device, as the machine's control thread sees it.
pub struct IoDevice {
    id: String,
    port: Port,
    counters: Option<Arc<dyn Count>>,
    behind: Behind,
}

/// What a device is to a machine that is saved, and what lies behind it.
#[derive(Clone, Default)]
pub(crate) struct Behind {
    /// What must be the same where the machine goes on; null if that is no more than what the guest sees.
    pub(crate) same: State,
    /// A disk's image.
    pub(crate) image: Option<Arc<Image>>,
    /// What its guest changes of that while a migration wants to know.
    pub(crate) changed: Arc<Changed>,
}

impl IoDevice {
    /// The device behind `port`, with its name in events and statistics.
    pub(crate) fn new(
        id: String,
        port: Port,
        counters: Option<Arc<dyn Count>>,
        behind: Behind,
    ) -> IoDevice {
        IoDevice {
            id,
            port,
            counters,
            behind,
        }
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

    fn link(&self, peer: String, socket: OwnedFd) -> Result<()> {
        let (sender, receiver) = channel();
        let link = Command::Link(self.port.device, peer, socket, sender);
        self.port.mailbox.post(link);
        receiver.recv().map_err(|_| self.gone())?
    }

    fn change(&self, change: Change, answer: Answer) {
        let change = Command::Change(self.port.device, 0, change, answer);
        self.port.mailbox.post(change);
    }

    fn facts(&self) -> Result<Option<facts::Device>> {
        let image = self.behind.image.as_deref();
        facts_of(&self.id, self.behind.same.clone(), image).map(Some)
    }

    fn let_go(&self) -> Result<()> {
        let image = self.behind.image.as_ref();
        let done = image.map_or(Ok(()), |image| image.inactivate());
        done.map_err(|error| block::error_of(&self.id, error))
    }

    fn take_up(&self) -> Result<()> {
        let image = self.behind.image.as_ref();
        let done = image.map_or(Ok(()), |image| block::activate(image));
        done.map_err(|error| block::error_of(&self.id, error))
    }

    fn content(&self) -> Option<Copied> {
        Some(Copied {
            id: self.id.clone(),
            image: self.behind.image.clone()?,
            changed: Arc::clone(&self.behind.changed),
        })
    }

    fn mark(&self, mark: Mark) -> Result<()> {
        snapshots::mark(&self.id, self.behind.image.as_deref(), mark)
    }

    fn stats(&self) -> serde_json::Value {
        match &self.counters {
            Some(counters) => counters.to_json(),
            None => serde_json::Value::Null,
        }
    }
}

/// What a device with an image is to a machine that is saved.
fn facts_of(id: &str, mut same: State, image: Option<&Image>) -> Result<facts::Device> {
    let stamps = image.map(Image::stamps).transpose();
    let stamps = stamps.map_err(|error| block::error_of(id, error))?;
    let stamps = stamps.into_iter().flatten();
    let files = stamps.map(|stamp| facts::FileStamp {
        identity: stamp.identity,
        len: stamp.len,
        modified: stamp.modified,
    });
    if let (Some(image), Some(same)) = (image, same.as_object_mut()) {
        same.insert("size".to_owned(), image.size().into());
    }
    Ok(facts::Device {
        same,
        files: files.collect(),
    })
}

/// What is in a drive now, which its thread changes: a disk's image, or a medium.
pub(crate) type Medium = Arc<Mutex<Option<Arc<Image>>>>;

/// One of several units of a served device, which is paused and stopped as a whole: by another.
pub(crate) struct IoUnit {
    /// Its name in events and statistics.
    pub(crate) id: String,
    /// What must be the same where the machine goes on.
    pub(crate) same: State,
    /// What is in it.
    pub(crate) medium: Medium,
    /// What has happened.
    pub(crate) counters: Arc<dyn Count>,
    /// What the guest changes of it while a migration wants to know.
    pub(crate) changed: Arc<Changed>,
}

/// The same, behind a port.
struct Unit {
    unit: IoUnit,
    port: Port,
    number: usize,
}

impl IoUnit {
    /// Unit `number` behind `port`.
    pub(crate) fn device(self, port: Port, number: usize) -> Arc<dyn Device> {
        Arc::new(Unit {
            unit: self,
            port,
            number,
        })
    }

    fn image(&self) -> Option<Arc<Image>> {
        let medium = self.medium.lock().unwrap_or_else(|e| e.into_inner());
        medium.clone()
    }
}

impl Device for Unit {
    fn id(&self) -> String {
        self.unit.id.clone()
    }

    fn change(&self, change: Change, answer: Answer) {
        let change = Command::Change(self.port.device, self.number, change, answer);
        self.port.mailbox.post(change);
    }

    fn facts(&self) -> Result<Option<facts::Device>> {
        let image = self.unit.image();
        facts_of(&self.unit.id, self.unit.same.clone(), image.as_deref()).map(Some)
    }

    fn let_go(&self) -> Result<()> {
        let done = self.unit.image().map_or(Ok(()), |image| image.inactivate());
        done.map_err(|error| block::error_of(&self.unit.id, error))
    }

    fn take_up(&self) -> Result<()> {
        let done = self
            .unit
            .image()
            .map_or(Ok(()), |image| block::activate(&image));
        done.map_err(|error| block::error_of(&self.unit.id, error))
    }

    fn content(&self) -> Option<Copied> {
        Some(Copied {
            id: self.unit.id.clone(),
            image: self.unit.image()?,
            changed: Arc::clone(&self.unit.changed),
        })
    }

    fn mark(&self, mark: Mark) -> Result<()> {
        snapshots::mark(&self.unit.id, self.unit.image().as_deref(), mark)
    }

    fn stats(&self) -> serde_json::Value {
        self.unit.counters.to_json()
    }
}
