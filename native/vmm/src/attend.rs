// SPDX-License-Identifier: Apache-2.0
//! The I/O thread of one device that does its work at once, without a ring: memory is given back, bytes go to a
//! socket ([`crate::io`] has a thread's life and its commands).
//!
//! A queue is looked at when its driver rings, when the device has a reason ([`Desk::look_at`]), and again while there
//! may be more. One visit takes at most as many chains as the queue has entries, so that no queue keeps the others
//! waiting. A device looks only at what has changed, or its thread would never come to rest.
//!
//! A driver that breaks a ring, or the device's rules, gets DEVICE_NEEDS_RESET and is not served any more.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use crate::error::{Error, Result};
use crate::io::{Answer, Change, Command, IoThread, Mailbox, Port, Serve, Trouble};
use crate::memory::GuestMemoryMmap;
use crate::poll::{self, unwatch, watch};
use crate::state::State;
use crate::thread::{Role, ThreadHook};
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::Fault;
use crate::virtio::{Activation, ActiveQueue, Served};

/// Epoll's data for the mailbox; doorbells have the place of their queue.
const WAKE: u64 = u64::MAX;
/// What a device watches has this bit and 32 bits of its own.
pub(crate) const OWN: u64 = 1 << 32;

/// What became of a chain.
pub(crate) enum Taken {
    /// This one is done, with so many bytes written.
    Used(u16, u32),
    /// It is the device's until it says so.
    Kept,
    /// It stays in the queue.
    Later,
}

/// A device, seen from its thread.
pub(crate) trait Attend {
    /// What is remembered of a driver, besides its queues.
    type Own;

    /// A driver has come, or goes on where it was saved.
    fn begin(&mut self, activation: &Activation) -> Self::Own;

    /// What [`Attend::begin`] finds as `restored` later.
    fn save(own: &Self::Own) -> State;

    /// All queues will be looked at, with a new driver or after a pause.
    fn resume(&mut self, _desk: &mut Desk<Self::Own>) {}

    /// The driver has let go of the device.
    fn let_go(&mut self) {}

    /// The driver has broken the rules.
    fn broken(&mut self);

    /// The machine is at its end.
    fn close(&mut self) {}

    /// The host changes something.
    fn change(&mut self, change: Change, answer: Answer, _desk: &mut Desk<Self::Own>) {
        answer.give(Err(change.misplaced()));
    }

    /// Something that the device watches has something.
    fn woken(
        &mut self,
        data: u32,
        events: EventSet,
        desk: &mut Desk<Self::Own>,
    ) -> std::result::Result<(), Fault>;

    /// Whether a chain of queue `index` could be taken now.
    fn wants(&self, _index: u16, _own: &Self::Own) -> bool {
        true
    }

    /// A chain of queue `index`.
    fn take(
        &mut self,
        index: u16,
        chain: Chain,
        memory: &GuestMemoryMmap,
        own: &mut Self::Own,
    ) -> std::result::Result<Taken, Fault>;

    /// Serves the queue at `place`; true if there may be more.
    fn serve(
        &mut self,
        place: usize,
        desk: &mut Desk<Self::Own>,
    ) -> std::result::Result<bool, Fault>
    where
        Self: Sized,
    {
        desk.visit(place, self)
    }
}

/// What a driver has given.
pub(crate) struct Driver<O> {
    pub(crate) queues: Vec<ActiveQueue>,
    pub(crate) interrupt: Arc<Interrupt>,
    pub(crate) own: O,
    broken: bool,
}

/// What there is to do.
pub(crate) struct Desk<O> {
    pub(crate) epoll: Epoll,
    driver: Option<Driver<O>>,
    paused: bool,
    /// Queues to look at again although nobody rings.
    again: VecDeque<usize>,
}

impl<O> Desk<O> {
    /// The driver, unless it may not be served.
    pub(crate) fn driver(&mut self) -> Option<&mut Driver<O>> {
        let paused = self.paused;
        let driver = self.driver.as_mut();
        driver.filter(|driver| !driver.broken && !paused)
    }

    /// Whether there is a driver, though perhaps in a machine that stands still.
    pub(crate) fn has_driver(&self) -> bool {
        self.driver.as_ref().is_some_and(|driver| !driver.broken)
    }

    /// The queues with such indices will be looked at.
    pub(crate) fn look_at(&mut self, wanted: impl Fn(u16) -> bool) {
        let queues = self.driver.iter().flat_map(|driver| &driver.queues);
        let places = queues
            .enumerate()
            .filter(|(_, queue)| wanted(queue.index))
            .map(|(place, _)| place);
        for place in places {
            soon(&mut self.again, place);
        }
    }

    /// Takes chains off a queue, up to its size, while the device wants some; true if there may be more.
    pub(crate) fn visit<D: Attend<Own = O>>(
        &mut self,
        place: usize,
        device: &mut D,
    ) -> std::result::Result<bool, Fault> {
        let Some(driver) = self.driver() else {
            return Ok(false);
        };
        let Some(ActiveQueue { index, queue, .. }) = driver.queues.get_mut(place) else {
            return Ok(false);
        };
        let memory = queue.memory().clone();
        queue.disable_notifications()?;
        let mut more = true;
        for _ in 0..queue.size() {
            if !device.wants(*index, &driver.own) {
                more = false;
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.enable_notifications()? {
                    continue;
                }
                more = false;
                break;
            };
            match device.take(*index, chain, &memory, &mut driver.own)? {
                Taken::Used(head, written) => queue.push(head, written)?,
                Taken::Kept => {}
                Taken::Later => queue.unpop(1),
            }
        }
        if queue.wants_interrupt()? {
            driver.interrupt.used(*index);
        }
        Ok(more)
    }
}

/// Each queue once, however often its driver rings.
fn soon(again: &mut VecDeque<usize>, place: usize) {
    if !again.contains(&place) {
        again.push_back(place);
    }
}

/// Starts the thread of a device that `make` makes in it; its port comes back. `trouble` hears of an end that nobody
/// asked for.
///
/// # Errors
/// What `make` says, or `Unavailable` when the kernel gives no thread.
pub(crate) fn start<D: Attend>(
    name: &str,
    role: Role,
    hook: &ThreadHook,
    trouble: &Trouble,
    make: impl FnOnce(&Epoll) -> Result<D> + Send + 'static,
) -> Result<(IoThread, Vec<Port>)> {
    IoThread::start(name, role, 1, hook, trouble, |mailbox| {
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        Ok(Attendant {
            mailbox,
            device: make(&epoll)?,
            desk: Desk {
                epoll,
                driver: None,
                paused: false,
                again: VecDeque::new(),
            },
            exiting: false,
        })
    })
}

struct Attendant<D: Attend> {
    mailbox: Arc<Mailbox>,
    device: D,
    desk: Desk<D::Own>,
    exiting: bool,
}

impl<D: Attend> Attendant<D> {
    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Start(_, activation) => self.begin(activation)?,
            Command::Stop(_, sender) => {
                let driver = self.desk.driver.take();
                for queue in driver.iter().flat_map(|driver| &driver.queues) {
                    unwatch(&self.desk.epoll, queue.kick.as_raw_fd());
                }
                self.device.let_go();
                // Whoever asked may have gone.
                let _ = sender.send(());
            }
            Command::Pause(_, sender) => {
                self.desk.paused = true;
                let _ = sender.send(());
            }
            Command::Save(_, sender) => {
                let _ = sender.send(self.desk.driver.as_ref().map(saved::<D>));
            }
            Command::Resume(_) => {
                self.desk.paused = false;
                self.look_at_all();
            }
            Command::Close(_, sender) => {
                self.desk.paused = true;
                self.device.close();
                let _ = sender.send(Ok(()));
            }
            Command::Change(_, _, change, answer) => {
                self.device.change(change, answer, &mut self.desk)
            }
            other @ (Command::Link(..) | Command::Add(..)) => other.refuse(),
            Command::Exit => self.exiting = true,
        }
        Ok(())
    }

    fn begin(&mut self, activation: Activation) -> Result<()> {
        for (place, queue) in activation.queues.iter().enumerate() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            watch(
                &self.desk.epoll,
                queue.kick.as_raw_fd(),
                events,
                place as u64,
            )?;
        }
        self.desk.driver = Some(Driver {
            own: self.device.begin(&activation),
            broken: activation.interrupt.is_broken(),
            queues: activation.queues,
            interrupt: activation.interrupt,
        });
        self.look_at_all();
        Ok(())
    }

    /// The driver may have made chains available that nobody has looked at.
    fn look_at_all(&mut self) {
        self.device.resume(&mut self.desk);
        self.desk.look_at(|_| true);
    }

    fn serve(&mut self, place: usize) {
        if self.desk.driver().is_none() {
            return;
        }
        match self.device.serve(place, &mut self.desk) {
            Ok(true) => soon(&mut self.desk.again, place),
            Ok(false) => {}
            Err(fault) => self.fail(fault),
        }
    }

    fn fail(&mut self, _fault: Fault) {
        if let Some(driver) = &mut self.desk.driver {
            driver.broken = true;
            driver.interrupt.fail();
        }
        self.device.broken();
    }
}

impl<D: Attend> Serve for Attendant<D> {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 32];
        while !self.exiting {
            let timeout = if self.desk.again.is_empty() { -1 } else { 0 };
            let count = poll::wait(&self.desk.epoll, timeout, &mut events)?;
            for event in events.iter().take(count) {
                match event.data() {
                    WAKE => {
                        for command in self.mailbox.take() {
                            self.obey(command)?;
                        }
                    }
                    data if data & OWN != 0 => {
                        let events = event.event_set();
                        let woken = self.device.woken(data as u32, events, &mut self.desk);
                        woken.unwrap_or_else(|fault| self.fail(fault));
                    }
                    place => soon(&mut self.desk.again, place as usize),
                }
            }
            for _ in 0..self.desk.again.len() {
                if let Some(place) = self.desk.again.pop_front() {
                    self.serve(place);
                }
            }
        }
        Ok(())
    }
}

fn saved<D: Attend>(driver: &Driver<D::Own>) -> Served {
    let queues = driver.queues.iter();
    Served {
        queues: queues
            .map(|queue| (queue.index, queue.queue.position()))
            .collect(),
        own: D::save(&driver.own),
    }
}
