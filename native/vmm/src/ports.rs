// SPDX-License-Identifier: Apache-2.0
//! The I/O thread for the named ports of virtio-console: it moves bytes between virtqueues and sockets
//! ([`crate::attend`] has the thread, [`crate::virtio::console`] what is said about ports).
//!
//! Each port has one end of a stream socket pair that never makes anybody wait; whoever holds the other end always
//! reads. Bytes go right between the socket and guest memory. What does not fit waits where it is: in the
//! guest's queue (how much of the first chain is gone is remembered) or in the socket, also while the guest has
//! not opened the port.

use std::collections::BTreeSet;
use std::io::{Error as IoError, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use vmm_sys_util::epoll::{Epoll, EventSet};

use crate::attend::{self, Attend, Desk, Taken, OWN};
use crate::config::Port;
use crate::error::{Error, Result};
use crate::io::{Count, IoThread, Port as IoPort, Trouble};
use crate::memory::GuestMemoryMmap;
use crate::poll::watch;
use crate::state::{self, State};
use crate::thread::{Role, ThreadHook};
use crate::virtio::chain::Chain;
use crate::virtio::console::{purpose, Conversation, Purpose};
use crate::virtio::queue::Fault;
use crate::virtio::Activation;

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
    let (thread, devices) = attend::start("ports", Role::Network, hook, trouble, |epoll| {
        Server::new(ports, counting, epoll)
    })?;
    Ok((thread, devices, counters))
}

struct Server {
    names: Vec<String>,
    sockets: Vec<Socket>,
    counters: Arc<Counters>,
}

struct Socket {
    /// None once the other end is gone.
    fd: Option<OwnedFd>,
    readable: bool,
    writable: bool,
}

/// What the thread remembers besides its queues.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    /// What the driver accepted, which is saved elsewhere.
    #[serde(skip)]
    features: u64,
    talk: Conversation,
    /// For each port, bytes of its first chain from the guest that are gone already.
    gone: Vec<u64>,
}

impl Server {
    fn new(ports: Vec<PortSpec>, counters: Arc<Counters>, epoll: &Epoll) -> Result<Server> {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let (mut names, mut sockets) = (Vec::new(), Vec::new());
        for (number, port) in ports.into_iter().enumerate() {
            watch(epoll, port.socket.as_raw_fd(), events, OWN | number as u64)?;
            names.push(port.name);
            sockets.push(Socket {
                fd: Some(port.socket),
                readable: true,
                writable: true,
            });
        }
        Ok(Server {
            names,
            sockets,
            counters,
        })
    }

    fn readable(&self, port: usize) -> bool {
        self.sockets.get(port).is_some_and(|socket| socket.readable)
    }

    fn writable(&self, port: usize) -> bool {
        self.sockets.get(port).is_some_and(|socket| socket.writable)
    }

    /// From the host's socket to the guest.
    fn receive(
        &mut self,
        port: usize,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<Taken, Fault> {
        let iovecs = chain.writable.iovecs(memory)?;
        if iovecs.is_empty() || !chain.readable.is_empty() {
            return Err(Fault::Request);
        }
        let iovecs = iovecs.get(..iovecs.len().min(PIECES)).unwrap_or_default();
        let socket = self.sockets.get_mut(port);
        match socket.map_or(Moving::Later, |socket| socket.read(iovecs)) {
            Moving::Done(len) => {
                if let Some((_, moved)) = self.counters.ports.get(port) {
                    moved.to_guest.fetch_add(len as u64, Ordering::Relaxed);
                }
                Ok(Taken::Used(chain.head, len as u32))
            }
            Moving::Later => Ok(Taken::Later),
        }
    }

    /// From the guest to the host's socket; `gone` bytes of the chain were there before.
    fn transmit(
        &mut self,
        port: usize,
        mut chain: Chain,
        memory: &GuestMemoryMmap,
        gone: &mut u64,
    ) -> std::result::Result<Taken, Fault> {
        if !chain.writable.is_empty() {
            return Err(Fault::Request);
        }
        let Some(socket) = self.sockets.get_mut(port) else {
            return Ok(Taken::Later);
        };
        let whole = chain.readable.len();
        let skipped = (*gone).min(whole);
        chain.readable.split_front(skipped);
        let iovecs = chain.readable.iovecs(memory)?;
        let iovecs = iovecs.get(..iovecs.len().min(PIECES)).unwrap_or_default();
        let Moving::Done(len) = socket.write(iovecs) else {
            return Ok(Taken::Later);
        };
        if let Some((_, moved)) = self.counters.ports.get(port) {
            moved.from_guest.fetch_add(len as u64, Ordering::Relaxed);
        }
        *gone = skipped.saturating_add(len as u64);
        if *gone < whole {
            return Ok(Taken::Later);
        }
        *gone = 0;
        Ok(Taken::Used(chain.head, 0))
    }
}

impl Attend for Server {
    type Own = Own;

    fn begin(&mut self, activation: &Activation) -> Own {
        let (features, ports) = (activation.features, self.sockets.len());
        let restored = activation.restored.as_ref();
        let own = restored
            .and_then(|own| state::read::<Own>(own).ok())
            .filter(|own| own.talk.fits(ports) && own.gone.len() == ports)
            .unwrap_or_else(|| Own {
                features,
                talk: Conversation::new(ports, features),
                gone: vec![0; ports],
            });
        Own { features, ..own }
    }

    fn save(own: &Own) -> State {
        state::write(own).unwrap_or_default()
    }

    fn broken(&mut self) {
        self.counters.faults.fetch_add(1, Ordering::Relaxed);
    }

    fn close(&mut self) {
        self.sockets.iter_mut().for_each(|socket| socket.fd = None);
    }

    fn woken(
        &mut self,
        port: u32,
        _events: EventSet,
        desk: &mut Desk<Own>,
    ) -> std::result::Result<(), Fault> {
        let port = port as usize;
        if let Some(socket) = self.sockets.get_mut(port) {
            socket.readable = true;
            socket.writable = true;
        }
        look_at(desk, |purpose| {
            purpose == Purpose::Receive(port) || purpose == Purpose::Transmit(port)
        });
        Ok(())
    }

    fn wants(&self, index: u16, own: &Own) -> bool {
        match purpose(index, own.features) {
            Purpose::Receive(port) => own.talk.is_open(port) && self.readable(port),
            Purpose::Transmit(port) => self.writable(port),
            Purpose::ToGuest => !own.talk.is_silent(),
            Purpose::FromGuest => own.talk.has_room(),
            Purpose::Unused => false,
        }
    }

    fn take(
        &mut self,
        index: u16,
        mut chain: Chain,
        memory: &GuestMemoryMmap,
        own: &mut Own,
    ) -> std::result::Result<Taken, Fault> {
        let head = chain.head;
        match purpose(index, own.features) {
            Purpose::FromGuest => {
                own.talk.heard(&mut chain, memory, &self.names)?;
                Ok(Taken::Used(head, 0))
            }
            Purpose::ToGuest => {
                let written = own.talk.next(&chain, memory)?;
                Ok(Taken::Used(head, written.unwrap_or(0)))
            }
            Purpose::Receive(port) => self.receive(port, &chain, memory),
            Purpose::Transmit(port) => match own.gone.get_mut(port) {
                Some(gone) => self.transmit(port, chain, memory, gone),
                None => Ok(Taken::Later),
            },
            Purpose::Unused => Ok(Taken::Later),
        }
    }

    fn serve(&mut self, place: usize, desk: &mut Desk<Own>) -> std::result::Result<bool, Fault> {
        let Some(driver) = desk.driver() else {
            return Ok(false);
        };
        let Some(index) = driver.queues.get(place).map(|queue| queue.index) else {
            return Ok(false);
        };
        let served = purpose(index, driver.own.features);
        let open = driver.own.talk.open().to_vec();
        let had_room = driver.own.talk.has_room();
        let more = desk.visit(place, self)?;
        let Some(talk) = desk.driver().map(|driver| &driver.own.talk) else {
            return Ok(more);
        };
        // Only what has changed is looked at.
        let speaks = !talk.is_silent();
        let opened = talk.open() != open;
        let has_room = !had_room && talk.has_room();
        match served {
            Purpose::FromGuest => look_at(desk, |purpose| match purpose {
                Purpose::ToGuest => speaks,
                Purpose::Receive(_) => opened,
                _ => false,
            }),
            Purpose::ToGuest if has_room => look_at(desk, |purpose| purpose == Purpose::FromGuest),
            _ => {}
        }
        Ok(more)
    }
}

/// The queues of a port, or all that are about messages.
fn look_at(desk: &mut Desk<Own>, wanted: impl Fn(Purpose) -> bool) {
    if let Some(features) = desk.driver().map(|driver| driver.own.features) {
        desk.look_at(|index| wanted(purpose(index, features)));
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

#[cfg(test)]
mod tests;
