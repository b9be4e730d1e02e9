// SPDX-License-Identifier: Apache-2.0
//! The I/O thread for the named ports of virtio-console: it moves bytes between virtqueues and sockets
//! ([`crate::io`] has a thread's life, [`crate::virtio::console`] what is said about ports).
//!
//! Each port has one end of a stream socket pair that never makes anybody wait; whoever holds the other end always
//! reads. Bytes go right between the socket and guest memory. What does not fit waits where it is: in the
//! guest's queue (how much of the first chain is gone is remembered) or in the socket, also while the guest has
//! not opened the port. A visit to a queue takes at most as many chains as it has entries.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Error as IoError, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use crate::config::Port;
use crate::error::{Error, Result};
use crate::io::{Command, Count, IoThread, Mailbox, Port as IoPort, Serve, Trouble};
use crate::poll::{self, unwatch, watch};
use crate::state;
use crate::thread::{Role, ThreadHook};
use crate::virtio::console::{purpose, Conversation, Purpose};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::Fault;
use crate::virtio::{Activation, ActiveQueue, Served};

/// Epoll's data for the mailbox; doorbells have the place of their queue, sockets this bit and their port.
const WAKE: u64 = u64::MAX;
const OF_SOCKET: u64 = 1 << 32;
/// The longest name.
const NAME_MAX: usize = 63;
/// The most pieces of guest memory that one call moves.
const PIECES: usize = 64;

/// A port of the definition.
pub struct PortSpec {
    /// As the guest sees it.
    pub name: String,
    /// One end of a non-blocking SOCK_STREAM socket pair.
    pub socket: OwnedFd,
}

/// Takes all of them. `files` has their sockets, in the same order.
///
/// # Errors
/// `InvalidArgument`, with the port as the argument.
pub fn open(ports: &[Port], files: Vec<OwnedFd>) -> Result<Vec<PortSpec>> {
    let mut names = BTreeSet::new();
    let mut specs = Vec::with_capacity(ports.len());
    for (port, socket) in ports.iter().zip(files) {
        let name = port.name.as_bytes();
        let fits = (1..=NAME_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
        if !fits || !names.insert(name) {
            return Err(Error::invalid(
                "ports",
                format!("{:?} is no name of a port, or of two", port.name),
            ));
        }
        specs.push(PortSpec {
            name: port.name.clone(),
            socket,
        });
    }
    Ok(specs)
}

/// What has gone through a port.
#[derive(Debug, Default)]
struct Moved {
    to_guest: AtomicU64,
    from_guest: AtomicU64,
}

/// What has happened since the machine was built.
#[derive(Debug)]
pub struct Counters {
    ports: Vec<(String, Moved)>,
    faults: AtomicU64,
}

impl Count for Counters {
    /// Bytes of each port by its name, and how often the driver broke the rules.
    fn to_json(&self) -> serde_json::Value {
        let ports = self.ports.iter().map(|(name, moved)| {
            let bytes = json!({
                "to-guest": moved.to_guest.load(Ordering::Relaxed),
                "from-guest": moved.from_guest.load(Ordering::Relaxed),
            });
            (name.clone(), bytes)
        });
        let ports: serde_json::Map<_, _> = ports.collect();
        json!({ "ports": ports, "faults": self.faults.load(Ordering::Relaxed) })
    }
}

/// Starts the thread; its device's port and counters come back. `trouble` hears of an end that nobody asked for.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread.
pub fn start(
    ports: Vec<PortSpec>,
    hook: &ThreadHook,
    trouble: &Trouble,
) -> Result<(IoThread, Vec<IoPort>, Arc<Counters>)> {
    let named = ports
        .iter()
        .map(|port| (port.name.clone(), Moved::default()));
    let counters = Arc::new(Counters {
        ports: named.collect(),
        faults: AtomicU64::new(0),
    });
    let counting = counters.clone();
    let (thread, devices) = IoThread::start("ports", Role::Network, 1, hook, trouble, |mailbox| {
        Server::new(ports, counting, mailbox)
    })?;
    Ok((thread, devices, counters))
}

struct Server {
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    names: Vec<String>,
    sockets: Vec<Socket>,
    counters: Arc<Counters>,
    active: Option<Active>,
    paused: bool,
    /// Queues to look at again although nobody rings.
    again: VecDeque<usize>,
    exiting: bool,
}

struct Socket {
    /// None once the other end is gone.
    fd: Option<OwnedFd>,
    readable: bool,
    writable: bool,
}

struct Active {
    queues: Vec<(ActiveQueue, Purpose)>,
    interrupt: Arc<Interrupt>,
    talk: Conversation,
    /// For each port, bytes of its first chain from the guest that are gone already.
    gone: Vec<u64>,
    broken: bool,
}

/// What the thread remembers besides its queues.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    talk: Conversation,
    gone: Vec<u64>,
}

impl Server {
    fn new(ports: Vec<PortSpec>, counters: Arc<Counters>, mailbox: Arc<Mailbox>) -> Result<Server> {
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let (mut names, mut sockets) = (Vec::new(), Vec::new());
        for (number, port) in ports.into_iter().enumerate() {
            let data = OF_SOCKET | number as u64;
            watch(&epoll, port.socket.as_raw_fd(), events, data)?;
            names.push(port.name);
            sockets.push(Socket {
                fd: Some(port.socket),
                readable: true,
                writable: true,
            });
        }
        Ok(Server {
            mailbox,
            epoll,
            names,
            sockets,
            counters,
            active: None,
            paused: false,
            again: VecDeque::new(),
            exiting: false,
        })
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Start(_, activation) => self.activate(activation)?,
            Command::Stop(_, sender) => {
                for (queue, _) in self.active.take().iter().flat_map(|active| &active.queues) {
                    unwatch(&self.epoll, queue.kick.as_raw_fd());
                }
                // Whoever asked may have gone.
                let _ = sender.send(());
            }
            Command::Pause(_, sender) => {
                self.paused = true;
                let _ = sender.send(());
            }
            Command::Save(_, sender) => {
                let _ = sender.send(self.active.as_ref().map(Active::saved));
            }
            Command::Resume(_) => {
                self.paused = false;
                self.look_at_all();
            }
            Command::Close(_, sender) => {
                self.paused = true;
                self.sockets.iter_mut().for_each(|socket| socket.fd = None);
                let _ = sender.send(Ok(()));
            }
            other @ (Command::Link(..) | Command::Add(..) | Command::Change(..)) => other.refuse(),
            Command::Exit => self.exiting = true,
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        for (place, queue) in activation.queues.iter().enumerate() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            watch(&self.epoll, queue.kick.as_raw_fd(), events, place as u64)?;
        }
        let (features, ports) = (activation.features, self.sockets.len());
        let restored = activation.restored.as_ref();
        let own = restored
            .and_then(|own| state::read::<Own>(own).ok())
            .filter(|own| own.talk.fits(ports) && own.gone.len() == ports)
            .unwrap_or_else(|| Own {
                talk: Conversation::new(ports, features),
                gone: vec![0; ports],
            });
        let queues = activation.queues.into_iter();
        self.active = Some(Active {
            queues: queues
                .map(|queue| {
                    let purpose = purpose(queue.index, features);
                    (queue, purpose)
                })
                .collect(),
            broken: activation.interrupt.is_broken(),
            interrupt: activation.interrupt,
            talk: own.talk,
            gone: own.gone,
        });
        self.look_at_all();
        Ok(())
    }

    fn look_at_all(&mut self) {
        let queues = self.active.as_ref().map_or(0, |active| active.queues.len());
        for place in 0..queues {
            soon(&mut self.again, place);
        }
    }

    /// The queues of a port, or all that are about messages.
    fn look_at(&mut self, wanted: impl Fn(Purpose) -> bool) {
        let active = self.active.iter().flat_map(|active| &active.queues);
        let places = active
            .enumerate()
            .filter(|(_, (_, purpose))| wanted(*purpose));
        for (place, _) in places {
            soon(&mut self.again, place);
        }
    }

    fn serve(&mut self, place: usize) {
        let active = self.active.as_mut();
        let Some(active) = active.filter(|active| !active.broken && !self.paused) else {
            return;
        };
        let Some((_, purpose)) = active.queues.get(place) else {
            return;
        };
        let purpose = *purpose;
        let open = active.talk.open().to_vec();
        let had_room = active.talk.has_room();
        match active.serve(place, &mut self.sockets, &self.names, &self.counters) {
            Ok(true) => soon(&mut self.again, place),
            Ok(false) => {}
            Err(_fault) => {
                self.counters.faults.fetch_add(1, Ordering::Relaxed);
                active.broken = true;
                active.interrupt.fail();
            }
        }
        // Only what has changed is looked at, or this would never come to rest.
        let speaks = !active.talk.is_silent();
        let opened = active.talk.open() != open;
        let has_room = !had_room && active.talk.has_room();
        match purpose {
            Purpose::FromGuest => self.look_at(|purpose| match purpose {
                Purpose::ToGuest => speaks,
                Purpose::Receive(_) => opened,
                _ => false,
            }),
            Purpose::ToGuest if has_room => self.look_at(|purpose| purpose == Purpose::FromGuest),
            _ => {}
        }
    }
}

impl Serve for Server {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 32];
        while !self.exiting {
            let timeout = if self.again.is_empty() { -1 } else { 0 };
            let count = poll::wait(&self.epoll, timeout, &mut events)?;
            for event in events.iter().take(count) {
                match event.data() {
                    WAKE => {
                        for command in self.mailbox.take() {
                            self.obey(command)?;
                        }
                    }
                    data if data & OF_SOCKET != 0 => {
                        let port = (data & (OF_SOCKET - 1)) as usize;
                        if let Some(socket) = self.sockets.get_mut(port) {
                            socket.readable = true;
                            socket.writable = true;
                        }
                        self.look_at(|purpose| {
                            purpose == Purpose::Receive(port) || purpose == Purpose::Transmit(port)
                        });
                    }
                    place => soon(&mut self.again, place as usize),
                }
            }
            for _ in 0..self.again.len() {
                if let Some(place) = self.again.pop_front() {
                    self.serve(place);
                }
            }
        }
        Ok(())
    }
}

impl Active {
    fn saved(&self) -> Served {
        let queues = self.queues.iter();
        #[derive(Serialize)]
        struct Borrowed<'a> {
            talk: &'a Conversation,
            gone: &'a [u64],
        }
        let own = Borrowed {
            talk: &self.talk,
            gone: &self.gone,
        };
        Served {
            queues: queues
                .map(|(queue, _)| (queue.index, queue.queue.position()))
                .collect(),
            own: state::write(&own).unwrap_or_default(),
        }
    }

    /// Takes chains off a queue, up to its size; true if there may be more to do.
    fn serve(
        &mut self,
        place: usize,
        sockets: &mut [Socket],
        names: &[String],
        counters: &Counters,
    ) -> std::result::Result<bool, Fault> {
        let Some((ActiveQueue { index, queue, .. }, purpose)) = self.queues.get_mut(place) else {
            return Ok(false);
        };
        let memory = queue.memory().clone();
        queue.disable_notifications()?;
        let mut more = true;
        for _ in 0..queue.size() {
            let wanted = match *purpose {
                Purpose::Receive(port) => {
                    self.talk.is_open(port) && sockets.get(port).is_some_and(|s| s.readable)
                }
                Purpose::Transmit(port) => sockets.get(port).is_some_and(|s| s.writable),
                Purpose::ToGuest => !self.talk.is_silent(),
                Purpose::FromGuest => self.talk.has_room(),
                Purpose::Unused => false,
            };
            if !wanted {
                more = false;
                break;
            }
            let Some(mut chain) = queue.pop()? else {
                if queue.enable_notifications()? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head;
            match *purpose {
                Purpose::FromGuest => {
                    self.talk.heard(&mut chain, &memory, names)?;
                    queue.push(head, 0)?;
                }
                Purpose::ToGuest => {
                    let written = self.talk.next(&chain, &memory)?;
                    queue.push(head, written.unwrap_or(0))?;
                }
                Purpose::Receive(port) => {
                    let iovecs = chain.writable.iovecs(&memory)?;
                    if iovecs.is_empty() || !chain.readable.is_empty() {
                        return Err(Fault::Request);
                    }
                    let iovecs = iovecs.get(..iovecs.len().min(PIECES)).unwrap_or_default();
                    let socket = sockets.get_mut(port);
                    match socket.map_or(Moving::Later, |socket| socket.read(iovecs)) {
                        Moving::Done(len) => {
                            if let Some((_, moved)) = counters.ports.get(port) {
                                moved.to_guest.fetch_add(len as u64, Ordering::Relaxed);
                            }
                            queue.push(head, len as u32)?;
                        }
                        Moving::Later => queue.unpop(1),
                    }
                }
                Purpose::Transmit(port) => {
                    if !chain.writable.is_empty() {
                        return Err(Fault::Request);
                    }
                    let (Some(gone), Some(socket)) =
                        (self.gone.get_mut(port), sockets.get_mut(port))
                    else {
                        return Ok(false);
                    };
                    let whole = chain.readable.len();
                    let skipped = (*gone).min(whole);
                    chain.readable.split_front(skipped);
                    let iovecs = chain.readable.iovecs(&memory)?;
                    let iovecs = iovecs.get(..iovecs.len().min(PIECES)).unwrap_or_default();
                    match socket.write(iovecs) {
                        Moving::Done(len) => {
                            if let Some((_, moved)) = counters.ports.get(port) {
                                moved.from_guest.fetch_add(len as u64, Ordering::Relaxed);
                            }
                            *gone = skipped.saturating_add(len as u64);
                            if *gone >= whole {
                                *gone = 0;
                                queue.push(head, 0)?;
                            } else {
                                queue.unpop(1);
                            }
                        }
                        Moving::Later => queue.unpop(1),
                    }
                }
                Purpose::Unused => {}
            }
        }
        if queue.wants_interrupt()? {
            self.interrupt.used(*index);
        }
        Ok(more)
    }
}

/// What became of a call.
enum Moving {
    Done(usize),
    Later,
}

impl Socket {
    /// Reads into guest memory.
    fn read(&mut self, iovecs: &[libc::iovec]) -> Moving {
        let Some(fd) = &self.fd else {
            self.readable = false;
            return Moving::Later;
        };
        // SAFETY: the iovecs are guest memory, which the queue keeps mapped; there are at most PIECES.
        let got = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) };
        match usize::try_from(got) {
            Ok(len) if len > 0 => Moving::Done(len),
            Ok(_) => {
                // The other end is gone for good.
                self.fd = None;
                self.readable = false;
                Moving::Later
            }
            Err(_) => {
                self.readable = IoError::last_os_error().kind() == ErrorKind::Interrupted;
                Moving::Later
            }
        }
    }

    /// Writes from guest memory; without another end everything is taken, and lost.
    fn write(&mut self, iovecs: &[libc::iovec]) -> Moving {
        let all = iovecs.iter().map(|iovec| iovec.iov_len).sum();
        let Some(fd) = self.fd.as_ref().filter(|_| all > 0) else {
            return Moving::Done(all);
        };
        // SAFETY: as above.
        let put = unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as i32) };
        match usize::try_from(put) {
            Ok(len) => Moving::Done(len),
            Err(_) => match IoError::last_os_error().kind() {
                ErrorKind::Interrupted => Moving::Later,
                ErrorKind::WouldBlock => {
                    self.writable = false;
                    Moving::Later
                }
                _ => {
                    self.fd = None;
                    Moving::Done(all)
                }
            },
        }
    }
}

fn soon(again: &mut VecDeque<usize>, place: usize) {
    if !again.contains(&place) {
        again.push_back(place);
    }
}

#[cfg(test)]
mod tests;
