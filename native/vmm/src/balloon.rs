// SPDX-License-Identifier: Apache-2.0
//! The balloon's thread: it takes what the guest gives off the virtqueues and gives it to the host
//! ([`crate::io`] has a thread's life, [`crate::virtio::balloon`] what the requests mean).
//!
//! A thread of its own, because giving memory back can take milliseconds, and disks and networks should not wait for it.
//! One visit to a queue takes at most as many requests as the queue has entries; each is bounded.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use crate::error::{Error, Result};
use crate::io::{Command, IoThread, Mailbox, Port, Serve, Trouble};
use crate::poll::{self, unwatch, watch};
use crate::state;
use crate::thread::{Role, ThreadHook};
use crate::virtio::balloon::{Balloon, DEFLATE, INFLATE, REPORTING, STATISTICS};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::Fault;
use crate::virtio::{Activation, ActiveQueue, LiveConfig, Served};

/// Epoll's data for the mailbox and for the host's wishes; doorbells have the place of their queue.
const WAKE: u64 = u64::MAX;
const NUDGE: u64 = u64::MAX - 1;

/// Starts the thread; its device's port comes back. `trouble` hears of an end that nobody asked for.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread.
pub fn start(
    balloon: Arc<Balloon>,
    hook: &ThreadHook,
    trouble: &Trouble,
) -> Result<(IoThread, Vec<Port>)> {
    IoThread::start("balloon", Role::Memory, 1, hook, trouble, |mailbox| {
        Server::new(balloon, mailbox)
    })
}

struct Server {
    mailbox: Arc<Mailbox>,
    epoll: Epoll,
    balloon: Arc<Balloon>,
    active: Option<Active>,
    paused: bool,
    /// Queues to look at again although nobody rings.
    again: VecDeque<usize>,
    exiting: bool,
}

/// What the thread remembers besides its queues.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    told: u8,
    figures: Option<u16>,
}

struct Active {
    queues: Vec<ActiveQueue>,
    interrupt: Arc<Interrupt>,
    /// The configuration's generation when the driver was last told.
    told: u8,
    /// The request with the guest's figures, which is given back to ask for newer ones.
    figures: Option<u16>,
    broken: bool,
}

impl Server {
    fn new(balloon: Arc<Balloon>, mailbox: Arc<Mailbox>) -> Result<Server> {
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, mailbox.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        watch(&epoll, balloon.nudge.as_raw_fd(), EventSet::IN, NUDGE)?;
        Ok(Server {
            mailbox,
            epoll,
            balloon,
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
                self.balloon.forget();
                // Whoever asked may have gone.
                let _ = sender.send(());
            }
            Command::Save(_, sender) => {
                let _ = sender.send(self.active.as_ref().map(Active::saved));
            }
            Command::Pause(_, sender) => {
                self.paused = true;
                let _ = sender.send(());
            }
            Command::Resume(_) => {
                self.paused = false;
                self.look_at_all();
            }
            Command::Close(_, sender) => {
                self.paused = true;
                let _ = sender.send(Ok(()));
            }
            other @ (Command::Link(..) | Command::Add(..) | Command::Change(..)) => other.refuse(),
            Command::Exit => self.exiting = true,
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        for (place, queue) in activation.queues.iter().enumerate() {
            watch(
                &self.epoll,
                queue.kick.as_raw_fd(),
                EventSet::IN,
                place as u64,
            )?;
        }
        // Told once it is ready: what it read before may have changed since.
        let fresh = Own {
            told: self.balloon.generation().wrapping_sub(1),
            figures: None,
        };
        let restored = activation.restored.as_ref();
        let own = restored.and_then(|own| state::read(own).ok());
        let Own { told, figures } = own.unwrap_or(fresh);
        self.active = Some(Active {
            queues: activation.queues,
            broken: activation.interrupt.is_broken(),
            interrupt: activation.interrupt,
            told,
            figures,
        });
        self.look_at_all();
        Ok(())
    }

    /// The driver may have made requests available, and the host may have wishes, that nobody has looked at.
    fn look_at_all(&mut self) {
        let queues = self.active.as_ref().map_or(0, |active| active.queues.len());
        for place in 0..queues {
            soon(&mut self.again, place);
        }
        let _ = self.balloon.nudge.write(1);
    }

    /// Serves the queue at `place`; None: looks at the host's wishes.
    fn serve(&mut self, place: Option<usize>) {
        let Some(active) = self
            .active
            .as_mut()
            .filter(|active| !active.broken && !self.paused)
        else {
            return;
        };
        let outcome = match place {
            Some(place) => active.serve(place, &self.balloon),
            None => active.pass_on(&self.balloon).map(|()| false),
        };
        match (outcome, place) {
            (Ok(true), Some(place)) => soon(&mut self.again, place),
            (Ok(_), _) => {}
            (Err(_fault), _) => {
                self.balloon.broken();
                active.broken = true;
                active.interrupt.fail();
            }
        }
    }
}

impl Serve for Server {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::default(); 8];
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
                    NUDGE => {
                        let _ = self.balloon.nudge.read();
                        self.serve(None);
                    }
                    place => {
                        let active = self.active.as_ref();
                        let queue = active.and_then(|active| active.queues.get(place as usize));
                        if let Some(queue) = queue {
                            let _ = queue.kick.read();
                        }
                        self.serve(Some(place as usize));
                    }
                }
            }
            for _ in 0..self.again.len() {
                let place = self.again.pop_front();
                self.serve(place);
            }
        }
        Ok(())
    }
}

impl Active {
    fn saved(&self) -> Served {
        let queues = self.queues.iter();
        let own = Own {
            told: self.told,
            figures: self.figures,
        };
        Served {
            queues: queues
                .map(|queue| (queue.index, queue.queue.position()))
                .collect(),
            own: state::write(&own).unwrap_or_default(),
        }
    }

    /// Takes requests off a queue, up to its size; true if there may be more.
    fn serve(&mut self, place: usize, balloon: &Balloon) -> std::result::Result<bool, Fault> {
        let Some(ActiveQueue { index, queue, .. }) = self.queues.get_mut(place) else {
            return Ok(false);
        };
        let memory = queue.memory().clone();
        queue.disable_notifications()?;
        let mut more = true;
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop()? else {
                if queue.enable_notifications()? {
                    continue;
                }
                more = false;
                break;
            };
            let mut done = Some(chain.head);
            match *index {
                INFLATE => balloon.inflate(&chain, &memory)?,
                DEFLATE => balloon.deflate(&chain)?,
                STATISTICS => {
                    balloon.read_figures(&chain, &memory)?;
                    // There should be one; an earlier one is of no use any more.
                    done = self.figures.replace(chain.head);
                }
                REPORTING => balloon.report(&chain, &memory)?,
                _ => {}
            }
            if let Some(head) = done {
                queue.push(head, 0)?;
            }
        }
        if queue.wants_interrupt()? {
            self.interrupt.used(*index);
        }
        Ok(more)
    }

    /// Tells the driver what the host would like.
    fn pass_on(&mut self, balloon: &Balloon) -> std::result::Result<(), Fault> {
        let generation = balloon.generation();
        if generation != self.told {
            self.told = generation;
            self.interrupt.configured();
        }
        if balloon.take_wanted() {
            let statistics = self
                .queues
                .iter_mut()
                .find(|queue| queue.index == STATISTICS);
            if let (Some(head), Some(active)) = (self.figures.take(), statistics) {
                active.queue.push(head, 0)?;
                if active.queue.wants_interrupt()? {
                    self.interrupt.used(STATISTICS);
                }
            }
        }
        Ok(())
    }
}

/// Each queue once, however often its driver rings.
fn soon(again: &mut VecDeque<usize>, place: usize) {
    if !again.contains(&place) {
        again.push_back(place);
    }
}
