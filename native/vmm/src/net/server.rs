// SPDX-License-Identifier: Apache-2.0
//! The life of the network thread: doorbells, commands and taps, in turn.
//!
//! Nothing in a round waits, and each part of it is bounded by the queues' sizes. Nothing is in flight between
//! rounds but buffers that were taken off a receive queue and not yet filled; a pause gives them back.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use super::announce::{self, Announcement, Clock};
use super::engage::Left;
use super::interface::{Active, Scratch};
use super::vhost::Way;
use super::{Counters, Link, Served};
use crate::error::{Error, Kind, Result};
use crate::io::{Change, Command, Mailbox, Newcomer, Serve};
use crate::poll::{self, unwatch, watch};
use crate::virtio::live::ChangingConfig;
use crate::virtio::net::{self, MAC};
use crate::virtio::queue::Fault;
use crate::virtio::Activation;

/// Epoll's data for the mailbox.
const WAKE: u64 = u64::MAX;
/// Set in the data of a tap's queue, clear in that of a virtqueue.
const OF_TAP: u64 = 1 << 31;

/// Set in the data of what is heard of a queue that the kernel serves: it has used requests, it found a broken ring.
const OF_CALL: u64 = 1 << 30;
const OF_ERROR: u64 = 1 << 29;

/// What there is to do: a device, and the place of its queue or of its tap's in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Queue(usize, usize),
    Tap(usize, usize),
    Call(usize, usize),
    Error(usize, usize),
}

impl Job {
    fn data(self) -> u64 {
        match self {
            Job::Queue(device, place) => (device as u64) << 32 | place as u64,
            Job::Tap(device, place) => (device as u64) << 32 | OF_TAP | place as u64,
            Job::Call(device, place) => (device as u64) << 32 | OF_CALL | place as u64,
            Job::Error(device, place) => (device as u64) << 32 | OF_ERROR | place as u64,
        }
    }

    fn of(data: u64) -> Job {
        let device = (data >> 32) as usize;
        let place = (data & (OF_ERROR - 1)) as usize;
        match data & (OF_TAP | OF_CALL | OF_ERROR) {
            OF_TAP => Job::Tap(device, place),
            OF_CALL => Job::Call(device, place),
            OF_ERROR => Job::Error(device, place),
            _ => Job::Queue(device, place),
        }
    }

    fn device(self) -> usize {
        match self {
            Job::Queue(device, _)
            | Job::Tap(device, _)
            | Job::Call(device, _)
            | Job::Error(device, _) => device,
        }
    }
}

/// The thread's own state.
pub(super) struct Server {
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    devices: Vec<Interface>,
    /// What to do although nobody rings; each job once.
    again: VecDeque<Job>,
    scratch: Scratch,
    /// When an interface has something to announce.
    clock: Clock,
    exiting: bool,
}

struct Interface {
    link: Link,
    carrier: bool,
    config: Arc<ChangingConfig>,
    /// Which of the link's sources may have something.
    ready: Vec<bool>,
    mac: [u8; MAC],
    pairs: u16,
    counters: Arc<Counters>,
    active: Option<Active>,
    announcement: Announcement,
    paused: bool,
    /// Its link is gone, and its number free.
    closed: bool,
}

impl Server {
    /// With all links watched and nothing active.
    pub(super) fn new(served: Vec<Served>, mailbox: Arc<Mailbox>) -> Result<Server> {
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        let mut server = Server {
            mailbox,
            epoll,
            devices: Vec::with_capacity(served.len()),
            again: VecDeque::new(),
            scratch: Scratch::default(),
            clock: Clock::default(),
            exiting: false,
        };
        for nic in served {
            server.add(nic)?;
        }
        Ok(server)
    }

    /// Serves one more; its number comes back.
    fn add(&mut self, nic: Served) -> Result<usize> {
        let closed = self.devices.iter().position(|interface| interface.closed);
        let device = closed.unwrap_or(self.devices.len());
        for (place, fd) in nic.link.fds().into_iter().enumerate() {
            // Edges only: a driver without buffers must not keep this thread awake.
            let mut events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if matches!(nic.link, Link::Stream(_)) {
                events |= EventSet::OUT;
            }
            watch(&self.epoll, fd, events, Job::Tap(device, place).data())?;
        }
        let interface = Interface {
            ready: vec![true; nic.link.sources()],
            link: nic.link,
            carrier: nic.carrier,
            config: nic.config,
            mac: nic.mac,
            pairs: nic.pairs,
            counters: nic.counters,
            active: None,
            announcement: Announcement::default(),
            paused: false,
            closed: false,
        };
        match self.devices.get_mut(device) {
            Some(vacant) => *vacant = interface,
            None => self.devices.push(interface),
        }
        Ok(device)
    }
}

impl Serve for Server {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 64];
        while !self.exiting {
            let timeout = match self.again.is_empty() {
                true => self.clock.timeout(),
                false => 0,
            };
            let count = poll::wait(&self.epoll, timeout, &mut events)?;
            for event in events.iter().take(count) {
                if event.data() == WAKE {
                    for command in self.mailbox.take() {
                        self.obey(command)?;
                    }
                } else {
                    self.rung(Job::of(event.data()))?;
                }
            }
            for _ in 0..self.again.len() {
                if let Some(job) = self.again.pop_front() {
                    self.serve(job)?;
                }
            }
            if self.clock.has_struck() {
                self.announce();
            }
        }
        Ok(())
    }
}

impl Server {
    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Start(device, activation) => self.activate(device, activation)?,
            Command::Stop(device, sender) => {
                self.disengage(device, None)?;
                let active = self.devices.get_mut(device).and_then(|d| d.active.take());
                for kick in active.iter().flat_map(Active::kicks) {
                    unwatch(&self.epoll, kick);
                }
                if let Some(interface) = self.devices.get_mut(device) {
                    interface.announcement.drop();
                }
                // Whoever asked may have gone.
                let _ = sender.send(());
            }
            Command::Save(device, sender) => {
                let active = self.devices.get(device).and_then(|d| d.active.as_ref());
                let _ = sender.send(active.map(Active::saved));
            }
            Command::Pause(device, sender) => {
                self.disengage(device, None)?;
                if let Some(interface) = self.devices.get_mut(device) {
                    interface.paused = true;
                    if let Some(active) = &mut interface.active {
                        active.give_back(&interface.counters);
                    }
                }
                let _ = sender.send(());
            }
            Command::Resume(device) => {
                if let Some(interface) = self.devices.get_mut(device) {
                    interface.paused = false;
                }
                self.engage(device)?;
                self.look_at_all(device);
                self.clock.now();
            }
            Command::Close(device, sender) => {
                self.disengage(device, None)?;
                if let Some(interface) = self.devices.get_mut(device) {
                    interface.paused = true;
                    interface.link.close();
                    interface.closed = interface.active.is_none();
                }
                let _ = sender.send(Ok(()));
            }
            Command::Add(newcomer, sender) => {
                let added = match newcomer {
                    Newcomer::Network(served) => self.add(served),
                    Newcomer::Block(_) => Err(Newcomer::misplaced()),
                };
                // Whoever asked may have gone.
                let _ = sender.send(added);
            }
            Command::Link(device, peer, socket, sender) => {
                let _ = sender.send(self.link(device, peer, socket));
            }
            Command::Change(device, _, Change::Carrier(up), answer) => {
                self.disengage(device, None)?;
                self.set_carrier(device, up);
                self.engage(device)?;
                answer.give(Ok(()));
            }
            other @ Command::Change(..) => other.refuse(),
            Command::Exit => self.exiting = true,
        }
        Ok(())
    }

    /// Another machine has come to the network of an interface.
    fn link(&mut self, device: usize, peer: String, socket: OwnedFd) -> Result<()> {
        let interface = self.devices.get_mut(device);
        let Some(Interface {
            link: Link::Hub(hub),
            ready,
            ..
        }) = interface
        else {
            return Err(Error::invalid("device", "is not of an isolated network"));
        };
        let (place, fd) = hub
            .join(peer, socket)
            .map_err(|e| Error::new(Kind::Unavailable, "peer", format!("cannot join: {e}")))?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        watch(&self.epoll, fd, events, Job::Tap(device, place).data())?;
        if let Some(ready) = ready.get_mut(place) {
            *ready = true;
        }
        soon(&mut self.again, Job::Tap(device, place));
        Ok(())
    }

    /// The driver is told. What the link has for an interface without a cable is dropped now, and from now on.
    fn set_carrier(&mut self, device: usize, up: bool) {
        let Some(interface) = self.devices.get_mut(device) else {
            return;
        };
        interface.carrier = up;
        let status = net::status(up).to_le_bytes();
        let shown = interface.config.set(net::STATUS, &status);
        if let Some(active) = interface.active.as_ref().filter(|_| shown) {
            active.configured();
        }
        self.look_at_all(device);
        self.clock.now();
    }

    fn activate(&mut self, device: usize, activation: Activation) -> Result<()> {
        let Some(interface) = self.devices.get_mut(device) else {
            return Ok(());
        };
        for (place, queue) in activation.queues.iter().enumerate() {
            let job = Job::Queue(device, place);
            // Edges here too: each ring of the bell is one, and nobody has to read how often it rang.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            watch(&self.epoll, queue.kick.as_raw_fd(), events, job.data())?;
        }
        interface.link.leave_to_driver(activation.features);
        // Frames for the driver before may be such as this one cannot take.
        self.scratch.empty(&mut interface.link);
        interface.ready.fill(true);
        if activation.restored.is_some() {
            interface.announcement.begin();
        }
        interface.active = Some(Active::new(activation, interface.mac, interface.pairs));
        self.engage(device)?;
        // The driver may have made requests available before it was ready.
        self.look_at_all(device);
        Ok(())
    }

    /// Leaves to the kernel what it can do, if it is to be done now.
    fn engage(&mut self, device: usize) -> Result<()> {
        let Some(Interface {
            link: Link::Tap(tap),
            active: Some(active),
            counters,
            ready,
            carrier: true,
            paused: false,
            ..
        }) = self.devices.get_mut(device)
        else {
            return Ok(());
        };
        let left = active.engage(tap);
        counters.helped(active.engaged());
        if active.is_armed() {
            // As far as is known, each of its queues has something from before the filter.
            for (place, ready) in ready.iter_mut().enumerate() {
                *ready = true;
                soon(&mut self.again, Job::Tap(device, place));
            }
        }
        left.into_iter()
            .try_for_each(|left| self.leave(device, &left))
    }

    /// Leaves the kernel what comes from a source that is empty, if it may be.
    fn engage_receiving(&mut self, device: usize, source: usize) -> Result<()> {
        let Some(Interface {
            link: Link::Tap(tap),
            active: Some(active),
            counters,
            carrier: true,
            paused: false,
            ..
        }) = self.devices.get_mut(device)
        else {
            return Ok(());
        };
        let left = active.engage_receiving(source, tap);
        counters.helped(active.engaged());
        left.map_or(Ok(()), |left| self.leave(device, &left))
    }

    /// Watches what is heard of a ring that the kernel serves, and nothing else of it.
    fn leave(&self, device: usize, left: &Left) -> Result<()> {
        let place = left.shift.place;
        unwatch(&self.epoll, left.shift.kick);
        if let Some((_, fd)) = left.shift.source {
            unwatch(&self.epoll, fd);
        }
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let (call, error) = (Job::Call(device, place), Job::Error(device, place));
        watch(&self.epoll, left.call, events, call.data())?;
        watch(&self.epoll, left.error, events, error.data())
    }

    /// Takes all of that back, or what goes one way.
    fn disengage(&mut self, device: usize, only: Option<Way>) -> Result<()> {
        let Some(Interface {
            link: Link::Tap(tap),
            active: Some(active),
            counters,
            ready,
            ..
        }) = self.devices.get_mut(device)
        else {
            return Ok(());
        };
        let (shifts, outcome) = active.disengage(only, tap);
        counters.helped(active.engaged());
        if outcome.is_err() {
            counters.broken();
            active.fail();
        }
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for shift in shifts {
            let job = Job::Queue(device, shift.place);
            watch(&self.epoll, shift.kick, events, job.data())?;
            soon(&mut self.again, job);
            if let Some((source, fd)) = shift.source {
                let job = Job::Tap(device, source);
                watch(&self.epoll, fd, events, job.data())?;
                if let Some(ready) = ready.get_mut(source) {
                    *ready = true;
                }
                soon(&mut self.again, job);
            }
        }
        Ok(())
    }

    fn look_at_all(&mut self, device: usize) {
        let Some(interface) = self.devices.get(device) else {
            return;
        };
        let queues = interface.active.as_ref().map_or(0, Active::len);
        let taps = interface.link.sources();
        for job in (0..queues).map(|place| Job::Queue(device, place)) {
            soon(&mut self.again, job);
        }
        for job in (0..taps).map(|place| Job::Tap(device, place)) {
            soon(&mut self.again, job);
        }
    }

    /// Says for the guests that have just come here where they are.
    fn announce(&mut self) {
        let mut more = false;
        for interface in &mut self.devices {
            let heard = interface.carrier && !interface.paused && interface.announcement.is_due();
            if let Some(active) = interface.active.as_ref().filter(|_| heard) {
                interface.link.announce(&announce::packet(active.mac()));
                interface.announcement.said();
                more |= interface.announcement.is_due();
            }
        }
        self.clock.later(more);
    }

    fn rung(&mut self, job: Job) -> Result<()> {
        if let Some(interface) = self.devices.get_mut(job.device()) {
            if let Job::Tap(device, place) = job {
                if let Some(ready) = interface.ready.get_mut(place) {
                    *ready = true;
                }
                if interface.link.is_waiting() {
                    interface.link.flush();
                    let queues = interface.active.as_ref().map_or(0, Active::len);
                    for place in 0..queues {
                        soon(&mut self.again, Job::Queue(device, place));
                    }
                }
            }
        }
        self.serve(job)
    }

    fn serve(&mut self, job: Job) -> Result<()> {
        let Job::Queue(device, place) = job else {
            return self.attend(job);
        };
        let interface = self.devices.get(device);
        let active = interface.and_then(|interface| interface.active.as_ref());
        if !active.is_some_and(|active| active.commands(place)) {
            return self.attend(job);
        }
        // What the driver says holds for all that it gets after the answer, whoever serves it.
        self.disengage(device, Some(Way::Receive))?;
        self.attend(job)?;
        self.engage(device)
    }

    fn attend(&mut self, job: Job) -> Result<()> {
        let Some(interface) = self.devices.get_mut(job.device()) else {
            return Ok(());
        };
        let Interface {
            link,
            carrier,
            ready,
            counters,
            active: Some(active),
            paused: false,
            ..
        } = interface
        else {
            return Ok(());
        };
        let outcome = match job {
            Job::Call(_, place) => {
                active.called(place);
                Ok(false)
            }
            // One that was taken back meanwhile is looked at here.
            Job::Error(_, place) if !active.is_engaged(place) => Ok(false),
            Job::Error(..) => Err(Fault::Request),
            Job::Tap(_, place) if !*carrier => {
                let (more, ready) = (self.scratch.empty_source(link, place), ready.get_mut(place));
                if let Some(ready) = ready {
                    *ready = more;
                }
                Ok(more)
            }
            Job::Tap(_, place) => active.receive(place, link, ready, counters, &mut self.scratch),
            Job::Queue(device, place) if active.receives(place) => {
                // Buffers have come: for whatever the tap has waiting.
                for (place, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
                    soon(&mut self.again, Job::Tap(device, place));
                }
                Ok(false)
            }
            Job::Queue(device, place) => {
                let pairs = active.pairs();
                let outcome = active.serve(place, link, *carrier, counters);
                if active.pairs() != pairs {
                    for place in 0..link.sources() {
                        soon(&mut self.again, Job::Tap(device, place));
                    }
                }
                outcome
            }
        };
        let emptied = match job {
            Job::Tap(_, place) if active.is_armed() && ready.get(place) == Some(&false) => {
                Some(place)
            }
            _ => None,
        };
        match outcome {
            Ok(true) => soon(&mut self.again, job),
            Ok(false) => {
                if let Some(source) = emptied {
                    self.engage_receiving(job.device(), source)?;
                }
            }
            Err(_fault) => {
                counters.broken();
                active.fail();
                self.disengage(job.device(), None)?;
            }
        }
        Ok(())
    }
}

fn soon(again: &mut VecDeque<Job>, job: Job) {
    if !again.contains(&job) {
        again.push_back(job);
    }
}
