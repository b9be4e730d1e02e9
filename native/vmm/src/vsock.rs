// SPDX-License-Identifier: Apache-2.0
//! The I/O thread for virtio-vsock: connections between ports of the guest's and sockets of the host's
//! ([`crate::io`] has a thread's life, [`crate::virtio::vsock`] what is on the queues, [`connection`] one connection).
//!
//! A socket comes from the host either way, one end of a stream socket pair that never makes anybody wait:
//!
//! | the host | then |
//! |---|---|
//! | connects | the guest is asked; its yes or no is the answer to the host |
//! | accepts on a port | the socket waits for the guest to connect there; each serves for one connection |
//!
//! Either is taken back by closing the other end. A guest that connects to a port where no socket waits is refused. Time
//! limits are the business of whoever waits.
//!
//! A packet that belongs to no connection is answered with a reset, unless it is one; so is one of another type,
//! or to another CID than the host's. What does not come from the guest's own CID is dropped. While [`WAITING_MAX`] resets
//! wait for the guest to make room, nothing of its is looked at, so it cannot make us hold more.
//!
//! Connections end with the driver, and none is saved: a machine that goes on elsewhere tells its driver so first of
//! all (5.10.6.6), and the driver ends them on its side. What waits for the guest to connect stays.

mod connection;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use connection::{Connection, Fate, Ports};

use crate::error::{Error, Kind, Result};
use crate::io::{Answer, Change, Command, Count, IoThread, Mailbox, Port, Serve, Trouble};
use crate::poll::{self, unwatch, watch};
use crate::state;
use crate::thread::{Role, ThreadHook};
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::Fault;
use crate::virtio::vsock::{
    Operation, Packet, EVENTS, FROM_GUEST, HEADER, HOST, STREAM, TO_GUEST, TRANSPORT_RESET,
};
use crate::virtio::{Activation, ActiveQueue, Served};

/// Epoll's data for the mailbox; doorbells have the place of their queue, sockets this bit and their number.
const WAKE: u64 = u64::MAX;
const OF_SOCKET: u64 = 1 << 32;
/// Sockets of the host's, connected or waiting.
pub const SOCKETS_MAX: usize = 128;
/// Resets that may wait for room before none of the guest's packets are looked at.
const WAITING_MAX: usize = 64;
/// Where the host's own ports begin, and how many there are.
const OWN_PORTS: u32 = 1 << 30;

/// What has happened since the machine was built.
#[derive(Debug, Default)]
pub struct Counters {
    connected: AtomicU64,
    accepted: AtomicU64,
    to_guest: AtomicU64,
    from_guest: AtomicU64,
    resets: AtomicU64,
    strange: AtomicU64,
    faults: AtomicU64,
}

impl Count for Counters {
    /// Connections that the host and the guest began, bytes, resets by us, packets from elsewhere, broken rules.
    fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "connected": get(&self.connected),
            "accepted": get(&self.accepted),
            "to-guest": get(&self.to_guest),
            "from-guest": get(&self.from_guest),
            "resets": get(&self.resets),
            "strange": get(&self.strange),
            "faults": get(&self.faults),
        })
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Starts the thread; its device's port and counters come back. `trouble` hears of an end that nobody asked for.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread.
pub fn start(
    cid: u32,
    hook: &ThreadHook,
    trouble: &Trouble,
) -> Result<(IoThread, Vec<Port>, Arc<Counters>)> {
    let counters = Arc::new(Counters::default());
    let counting = counters.clone();
    let make = move |mailbox| Server::new(cid, counting, mailbox);
    let (thread, devices) = IoThread::start("vsock", Role::Network, 1, hook, trouble, make)?;
    Ok((thread, devices, counters))
}

struct Server {
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    table: Table,
    active: Option<Active>,
    paused: bool,
    /// Queues to look at again although nobody rings.
    again: VecDeque<usize>,
    exiting: bool,
}

/// A socket that waits for the guest to connect to its port.
struct Waiting {
    port: u32,
    socket: OwnedFd,
    answer: Answer,
}

/// The host's sockets, by numbers that are not given twice.
struct Table {
    cid: u64,
    counters: Arc<Counters>,
    last: u32,
    last_port: u32,
    /// In the order in which they came.
    waiting: BTreeMap<u32, Waiting>,
    connections: HashMap<u32, Connection>,
    by_ports: HashMap<Ports, u32>,
    /// Connections that have something to say, or may have; each is there once.
    line: VecDeque<u32>,
    resets: VecDeque<Packet>,
}

struct Active {
    queues: Vec<ActiveQueue>,
    interrupt: Arc<Interrupt>,
    /// The driver is to hear that all connections are gone.
    event: bool,
    broken: bool,
}

/// What the thread remembers besides its queues.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {}

impl Server {
    fn new(cid: u32, counters: Arc<Counters>, mailbox: Arc<Mailbox>) -> Result<Server> {
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        Ok(Server {
            mailbox,
            epoll,
            table: Table {
                cid: u64::from(cid),
                counters,
                last: 0,
                last_port: 0,
                waiting: BTreeMap::new(),
                connections: HashMap::new(),
                by_ports: HashMap::new(),
                line: VecDeque::new(),
                resets: VecDeque::new(),
            },
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
                for queue in self.active.take().iter().flat_map(|active| &active.queues) {
                    unwatch(&self.epoll, queue.kick.as_raw_fd());
                }
                self.table
                    .end_all("the guest's driver let go of the device");
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
                self.table.end_all("the machine is at its end");
                self.table.waiting.clear();
                let _ = sender.send(Ok(()));
            }
            Command::Change(_, _, Change::Connect(port, socket), answer) => {
                self.connect(port, socket, answer)
            }
            Command::Change(_, _, Change::Accept(port, socket), answer) => {
                self.accept(port, socket, answer)
            }
            other @ (Command::Link(..) | Command::Add(..) | Command::Change(..)) => other.refuse(),
            Command::Exit => self.exiting = true,
        }
        Ok(())
    }

    /// A socket that is to be connected, or to wait; its number.
    fn take_in(&mut self, socket: &OwnedFd) -> Result<u32> {
        if self
            .table
            .waiting
            .len()
            .saturating_add(self.table.connections.len())
            >= SOCKETS_MAX
        {
            let message = format!(
                "the machine has {SOCKETS_MAX} sockets connected or waiting already; close some"
            );
            return Err(Error::new(Kind::Unavailable, "port", message));
        }
        self.table.last = self.table.last.wrapping_add(1);
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let data = OF_SOCKET | u64::from(self.table.last);
        watch(&self.epoll, socket.as_raw_fd(), events, data)?;
        Ok(self.table.last)
    }

    fn connect(&mut self, port: u32, socket: OwnedFd, answer: Answer) {
        if self.active.as_ref().is_none_or(|active| active.broken) {
            let message = "no driver in the guest serves its vsock device";
            answer.give(Err(Error::new(Kind::InvalidState, "", message)));
            return;
        }
        match self.take_in(&socket) {
            Ok(number) => {
                let ports = (port, self.table.own_port());
                let connection = Connection::asked(ports, socket, answer);
                self.table.insert(number, connection);
                self.look_at(TO_GUEST);
            }
            Err(error) => answer.give(Err(error)),
        }
    }

    fn accept(&mut self, port: u32, socket: OwnedFd, answer: Answer) {
        match self.take_in(&socket) {
            Ok(number) => {
                let waiting = Waiting {
                    port,
                    socket,
                    answer,
                };
                self.table.waiting.insert(number, waiting);
            }
            Err(error) => answer.give(Err(error)),
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        for (place, queue) in activation.queues.iter().enumerate() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            watch(&self.epoll, queue.kick.as_raw_fd(), events, place as u64)?;
        }
        self.active = Some(Active {
            queues: activation.queues,
            broken: activation.interrupt.is_broken(),
            interrupt: activation.interrupt,
            event: activation.restored.is_some(),
        });
        self.look_at_all();
        Ok(())
    }

    fn look_at_all(&mut self) {
        for index in [EVENTS, FROM_GUEST, TO_GUEST] {
            self.look_at(index);
        }
    }

    fn look_at(&mut self, index: u16) {
        let queues = self.active.iter().flat_map(|active| &active.queues);
        let place = queues.enumerate().find(|(_, queue)| queue.index == index);
        if let Some((place, _)) = place {
            soon(&mut self.again, place);
        }
    }

    fn woken(&mut self, number: u32, events: EventSet) {
        let gone = events.contains(EventSet::HANG_UP) || events.contains(EventSet::ERROR);
        if gone {
            if let Some(waiting) = self.table.waiting.remove(&number) {
                let message = "whoever waited for the guest to connect has gone";
                let error = Error::new(Kind::Cancelled, "", message);
                waiting.answer.give(Err(error));
                return;
            }
        }
        self.table.woken(number, gone);
        self.look_at(TO_GUEST);
    }

    fn serve(&mut self, place: usize) {
        let active = self.active.as_mut();
        let Some(active) = active.filter(|active| !active.broken && !self.paused) else {
            return;
        };
        let Some(index) = active.queues.get(place).map(|queue| queue.index) else {
            return;
        };
        let was_full = !self.table.has_room();
        match active.serve(place, &mut self.table) {
            Ok(true) => soon(&mut self.again, place),
            Ok(false) => {}
            Err(_fault) => {
                count(&self.table.counters.faults, 1);
                active.broken = true;
                active.interrupt.fail();
                self.table
                    .end_all("the guest's driver broke the device's rules");
                return;
            }
        }
        match index {
            FROM_GUEST if self.table.has_words() => self.look_at(TO_GUEST),
            // There is room again for what answers the guest.
            TO_GUEST if was_full && self.table.has_room() => self.look_at(FROM_GUEST),
            _ => {}
        }
    }
}

impl Serve for Server {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 32];
        while !self.exiting {
            let timeout = if self.again.is_empty() { -1 } else { 0 };
            let found = poll::wait(&self.epoll, timeout, &mut events)?;
            for event in events.iter().take(found) {
                match event.data() {
                    WAKE => {
                        for command in self.mailbox.take() {
                            self.obey(command)?;
                        }
                    }
                    data if data & OF_SOCKET != 0 => {
                        self.woken(data as u32, event.event_set());
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
        Served {
            queues: queues
                .map(|queue| (queue.index, queue.queue.position()))
                .collect(),
            own: state::write(&Own {}).unwrap_or_default(),
        }
    }

    /// Takes chains off a queue, up to its size; true if there may be more to do.
    fn serve(&mut self, place: usize, table: &mut Table) -> std::result::Result<bool, Fault> {
        let Some(ActiveQueue { index, queue, .. }) = self.queues.get_mut(place) else {
            return Ok(false);
        };
        let memory = queue.memory().clone();
        queue.disable_notifications()?;
        let mut more = true;
        for _ in 0..queue.size() {
            let wanted = match *index {
                TO_GUEST => table.has_words(),
                FROM_GUEST => table.has_room(),
                EVENTS => self.event,
                _ => false,
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
            match *index {
                FROM_GUEST => {
                    table.heard(&mut chain, &memory)?;
                    queue.push(chain.head, 0)?;
                }
                TO_GUEST => {
                    if !chain.readable.is_empty() || chain.writable.len() <= HEADER as u64 {
                        return Err(Fault::Request);
                    }
                    match table.speak(&chain, &memory)? {
                        Some(written) => queue.push(chain.head, written)?,
                        None => queue.unpop(1),
                    }
                }
                _ => {
                    let written = chain.writable.write(&memory, &TRANSPORT_RESET)?;
                    if written as usize != TRANSPORT_RESET.len() {
                        return Err(Fault::Request);
                    }
                    self.event = false;
                    queue.push(chain.head, written)?;
                }
            }
        }
        if queue.wants_interrupt()? {
            self.interrupt.used(*index);
        }
        Ok(more)
    }
}

impl Table {
    /// A port of the host's that no connection has.
    fn own_port(&mut self) -> u32 {
        // There are far more than connections, each of which has one at most.
        loop {
            self.last_port = self.last_port.wrapping_add(1) % OWN_PORTS;
            let port = OWN_PORTS | self.last_port;
            if !self.by_ports.keys().any(|(_, own)| *own == port) {
                return port;
            }
        }
    }

    fn insert(&mut self, number: u32, connection: Connection) {
        self.by_ports.insert(connection.ports, number);
        self.connections.insert(number, connection);
        self.stand_in_line(number);
    }

    fn stand_in_line(&mut self, number: u32) {
        if let Some(connection) = self.connections.get_mut(&number) {
            if !std::mem::replace(&mut connection.queued, true) {
                self.line.push_back(number);
            }
        }
    }

    fn has_words(&self) -> bool {
        !self.resets.is_empty() || !self.line.is_empty()
    }

    fn has_room(&self) -> bool {
        self.resets.len() < WAITING_MAX
    }

    fn woken(&mut self, number: u32, gone: bool) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if self.by_ports.get(&connection.ports) != Some(&number) {
            // The guest has forgotten it.
            if connection.is_drained(gone) {
                self.connections.remove(&number);
            }
            return;
        }
        let fate = connection.woken(gone);
        self.decide(number, fate);
    }

    fn decide(&mut self, number: u32, fate: Fate) {
        match fate {
            Fate::Stays => self.stand_in_line(number),
            Fate::Over => self.remove(number),
            Fate::Reset => {
                if let Some(connection) = self.connections.get(&number) {
                    let (guest, own) = connection.ports;
                    let said = Packet {
                        src_cid: self.cid,
                        dst_cid: HOST,
                        src_port: guest,
                        dst_port: own,
                        kind: STREAM,
                        ..Packet::default()
                    };
                    self.refuse(&said);
                }
                self.remove(number);
            }
            Fate::Drains => {
                if let Some(connection) = self.connections.get(&number) {
                    self.by_ports.remove(&connection.ports);
                }
            }
        }
    }

    fn remove(&mut self, number: u32) {
        let Some(mut connection) = self.connections.remove(&number) else {
            return;
        };
        if self.by_ports.get(&connection.ports) == Some(&number) {
            self.by_ports.remove(&connection.ports);
        }
        if let Some(asking) = connection.take_asking() {
            let port = connection.ports.0;
            let message = format!("nothing in the guest takes connections on port {port}");
            asking.give(Err(Error::new(Kind::Unavailable, "port", message)));
        }
    }

    /// The guest knows of no connection any more; those who wait for one of them hear why.
    fn end_all(&mut self, why: &str) {
        for (_, mut connection) in self.connections.drain() {
            if let Some(asking) = connection.take_asking() {
                asking.give(Err(Error::new(Kind::Disconnected, "", why)));
            }
        }
        self.by_ports.clear();
        self.line.clear();
        self.resets.clear();
    }

    fn refuse(&mut self, packet: &Packet) {
        count(&self.counters.resets, 1);
        self.resets.push_back(packet.refusal());
    }

    /// A packet of the guest's.
    fn heard(
        &mut self,
        chain: &mut Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<(), Fault> {
        let header = chain.readable.take_front::<HEADER>(memory)?;
        let packet = Packet::parse(&header.ok_or(Fault::Request)?);
        let data = chain.readable.split_front(u64::from(packet.len));
        let data = data.ok_or(Fault::Request)?;
        if packet.src_cid != self.cid {
            count(&self.counters.strange, 1);
            return Ok(());
        }
        let operation = Operation::of(packet.operation);
        let ours = packet.dst_cid == HOST && packet.kind == STREAM;
        let ports = (packet.src_port, packet.dst_port);
        let number = self.by_ports.get(&ports).copied().filter(|_| ours);
        let known = number.and_then(|number| Some((number, self.connections.get_mut(&number)?)));
        let Some((number, connection)) = known else {
            match operation {
                Some(Operation::Reset) => {}
                Some(Operation::Request) if ours && self.begin(ports, &packet) => {}
                _ => self.refuse(&packet),
            }
            return Ok(());
        };
        let taken = connection.taken();
        let fate = match operation {
            Some(Operation::Data) => connection.receive(&packet, &data, memory)?,
            Some(operation) => connection.heard(operation, &packet),
            None => Fate::Reset,
        };
        let bytes = connection.taken().wrapping_sub(taken);
        count(&self.counters.from_guest, u64::from(bytes));
        if operation == Some(Operation::Response) && fate == Fate::Stays {
            count(&self.counters.connected, 1);
        }
        self.decide(number, fate);
        Ok(())
    }

    /// The guest would like to connect; false if nobody waits for that.
    fn begin(&mut self, ports: Ports, packet: &Packet) -> bool {
        let mut all = self.waiting.iter();
        let Some(number) = all
            .find(|(_, w)| w.port == ports.1)
            .map(|(number, _)| *number)
        else {
            return false;
        };
        let Some(waiting) = self.waiting.remove(&number) else {
            return false;
        };
        let connection = Connection::accepted(ports, waiting.socket, packet);
        self.insert(number, connection);
        count(&self.counters.accepted, 1);
        let words = json!({ "port": ports.0 });
        waiting.answer.give_more(Ok(words.to_string()));
        true
    }

    /// Fills a chain with the next packet for the guest, if there is one: how many bytes.
    fn speak(
        &mut self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<Option<u32>, Fault> {
        if let Some(packet) = self.resets.pop_front() {
            return Ok(Some(chain.writable.write(memory, &packet.bytes())?));
        }
        while let Some(number) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&number) else {
                continue;
            };
            connection.queued = false;
            let sent = connection.sent();
            if let Some(written) = connection.speak(self.cid, chain, memory)? {
                let bytes = connection.sent().wrapping_sub(sent);
                count(&self.counters.to_guest, u64::from(bytes));
                self.stand_in_line(number);
                return Ok(Some(written));
            }
        }
        Ok(None)
    }
}

fn soon(again: &mut VecDeque<usize>, place: usize) {
    if !again.contains(&place) {
        again.push_back(place);
    }
}

#[cfg(test)]
mod tests;
