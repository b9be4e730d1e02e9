// SPDX-License-Identifier: Apache-2.0
//! The I/O thread for virtio-vsock: connections between ports of the guest's and sockets of the host's
//! ([`crate::attend`] has the thread, [`crate::virtio::vsock`] what is on the queues, [`connection`] one connection).
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
use vmm_sys_util::epoll::{Epoll, EventSet};

use connection::{Connection, Fate, Ports};

use crate::attend::{self, Attend, Desk, Taken, OWN};
use crate::error::{Error, Kind, Result};
use crate::io::{Answer, Change, Count, IoThread, Port, Trouble};
use crate::memory::GuestMemoryMmap;
use crate::poll::watch;
use crate::state::{self, State};
use crate::thread::{Role, ThreadHook};
use crate::virtio::chain::Chain;
use crate::virtio::queue::Fault;
use crate::virtio::vsock::{
    Operation, Packet, EVENTS, FROM_GUEST, HEADER, HOST, STREAM, TO_GUEST, TRANSPORT_RESET,
};
use crate::virtio::Activation;

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
    let (thread, devices) = attend::start("vsock", Role::Network, hook, trouble, move |_| {
        Ok(Server::new(cid, counting))
    })?;
    Ok((thread, devices, counters))
}

struct Server {
    table: Table,
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

/// What the thread remembers besides its queues.
struct Own {
    /// The driver is to hear that all connections are gone.
    event: bool,
}

/// What is saved of it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {}

impl Server {
    fn new(cid: u32, counters: Arc<Counters>) -> Server {
        Server {
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
        }
    }

    /// A socket that is to be connected, or to wait; its number.
    fn take_in(&mut self, socket: &OwnedFd, epoll: &Epoll) -> Result<u32> {
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
        let data = OWN | u64::from(self.table.last);
        watch(epoll, socket.as_raw_fd(), events, data)?;
        Ok(self.table.last)
    }

    fn connect(&mut self, port: u32, socket: OwnedFd, answer: Answer, desk: &mut Desk<Own>) {
        if !desk.has_driver() {
            let message = "no driver in the guest serves its vsock device";
            answer.give(Err(Error::new(Kind::InvalidState, "", message)));
            return;
        }
        match self.take_in(&socket, &desk.epoll) {
            Ok(number) => {
                let ports = (port, self.table.own_port());
                let connection = Connection::asked(ports, socket, answer);
                self.table.insert(number, connection);
                desk.look_at(|index| index == TO_GUEST);
            }
            Err(error) => answer.give(Err(error)),
        }
    }

    fn accept(&mut self, port: u32, socket: OwnedFd, answer: Answer, epoll: &Epoll) {
        match self.take_in(&socket, epoll) {
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
}

impl Attend for Server {
    type Own = Own;

    fn begin(&mut self, activation: &Activation) -> Own {
        Own {
            event: activation.restored.is_some(),
        }
    }

    fn save(_own: &Own) -> State {
        state::write(&Kept {}).unwrap_or_default()
    }

    fn resume(&mut self, desk: &mut Desk<Own>) {
        for wanted in [EVENTS, FROM_GUEST, TO_GUEST] {
            desk.look_at(|index| index == wanted);
        }
    }

    fn let_go(&mut self) {
        self.table
            .end_all("the guest's driver let go of the device");
    }

    fn broken(&mut self) {
        count(&self.table.counters.faults, 1);
        self.table
            .end_all("the guest's driver broke the device's rules");
    }

    fn close(&mut self) {
        self.table.end_all("the machine is at its end");
        self.table.waiting.clear();
    }

    fn change(&mut self, change: Change, answer: Answer, desk: &mut Desk<Own>) {
        match change {
            Change::Connect(port, socket) => self.connect(port, socket, answer, desk),
            Change::Accept(port, socket) => self.accept(port, socket, answer, &desk.epoll),
            other => answer.give(Err(other.misplaced())),
        }
    }

    fn woken(
        &mut self,
        number: u32,
        events: EventSet,
        desk: &mut Desk<Own>,
    ) -> std::result::Result<(), Fault> {
        let gone = events.contains(EventSet::HANG_UP) || events.contains(EventSet::ERROR);
        if gone {
            if let Some(waiting) = self.table.waiting.remove(&number) {
                let message = "whoever waited for the guest to connect has gone";
                let error = Error::new(Kind::Cancelled, "", message);
                waiting.answer.give(Err(error));
                return Ok(());
            }
        }
        self.table.woken(number, gone);
        desk.look_at(|index| index == TO_GUEST);
        Ok(())
    }

    fn wants(&self, index: u16, own: &Own) -> bool {
        match index {
            TO_GUEST => self.table.has_words(),
            FROM_GUEST => self.table.has_room(),
            EVENTS => own.event,
            _ => false,
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
        match index {
            FROM_GUEST => {
                self.table.heard(&mut chain, memory)?;
                Ok(Taken::Used(head, 0))
            }
            TO_GUEST => {
                if !chain.readable.is_empty() || chain.writable.len() <= HEADER as u64 {
                    return Err(Fault::Request);
                }
                let written = self.table.speak(&chain, memory)?;
                Ok(written.map_or(Taken::Later, |written| Taken::Used(head, written)))
            }
            _ => {
                let written = chain.writable.write(memory, &TRANSPORT_RESET)?;
                if written as usize != TRANSPORT_RESET.len() {
                    return Err(Fault::Request);
                }
                own.event = false;
                Ok(Taken::Used(head, written))
            }
        }
    }

    fn serve(&mut self, place: usize, desk: &mut Desk<Own>) -> std::result::Result<bool, Fault> {
        let queues = desk.driver().map(|driver| &driver.queues);
        let Some(index) = queues.and_then(|queues| Some(queues.get(place)?.index)) else {
            return Ok(false);
        };
        let was_full = !self.table.has_room();
        let more = desk.visit(place, self)?;
        match index {
            FROM_GUEST if self.table.has_words() => desk.look_at(|index| index == TO_GUEST),
            // There is room again for what answers the guest.
            TO_GUEST if was_full && self.table.has_room() => {
                desk.look_at(|index| index == FROM_GUEST)
            }
            _ => {}
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

#[cfg(test)]
mod tests;
