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

mod counters;
mod server;

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vmbus_qcow2::{Image, Ring};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::thread::{spawn, Role, ThreadHook};
use crate::virtio::{blk, Activation, Backend};

pub use counters::Counters;
use server::Server;

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
