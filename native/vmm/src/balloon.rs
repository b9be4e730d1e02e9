// SPDX-License-Identifier: Apache-2.0
//! The balloon's thread: it takes what the guest gives off the virtqueues and gives it to the host
//! ([`crate::attend`] has the thread, [`crate::virtio::balloon`] what the requests mean).
//!
//! A thread of its own, because giving memory back can take milliseconds, and disks and networks should not wait for it.
//! Each request is bounded.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use crate::attend::{self, Attend, Desk, Driver, Taken, OWN};
use crate::error::Result;
use crate::io::{IoThread, Port, Trouble};
use crate::memory::GuestMemoryMmap;
use crate::poll::watch;
use crate::state::{self, State};
use crate::thread::{Role, ThreadHook};
use crate::virtio::balloon::{Balloon, DEFLATE, INFLATE, REPORTING, STATISTICS};
use crate::virtio::chain::Chain;
use crate::virtio::queue::Fault;
use crate::virtio::{Activation, LiveConfig};

/// Starts the thread; its device's port comes back. `trouble` hears of an end that nobody asked for.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread.
pub fn start(
    balloon: Arc<Balloon>,
    hook: &ThreadHook,
    trouble: &Trouble,
) -> Result<(IoThread, Vec<Port>)> {
    attend::start("balloon", Role::Memory, hook, trouble, |epoll| {
        watch(epoll, balloon.nudge.as_raw_fd(), EventSet::IN, OWN)?;
        Ok(Server { balloon })
    })
}

struct Server {
    balloon: Arc<Balloon>,
}

/// What the thread remembers besides its queues.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Own {
    /// The configuration's generation when the driver was last told.
    told: u8,
    /// The request with the guest's figures, which is given back to ask for newer ones.
    figures: Option<u16>,
}

impl Attend for Server {
    type Own = Own;

    fn begin(&mut self, activation: &Activation) -> Own {
        let restored = activation.restored.as_ref();
        // Told once it is ready: what it read before may have changed since.
        restored
            .and_then(|own| state::read(own).ok())
            .unwrap_or_else(|| Own {
                told: self.balloon.generation().wrapping_sub(1),
                figures: None,
            })
    }

    fn save(own: &Own) -> State {
        state::write(own).unwrap_or_default()
    }

    /// The host may have wishes that nobody has looked at.
    fn resume(&mut self, _desk: &mut Desk<Own>) {
        let _ = self.balloon.nudge.write(1);
    }

    fn let_go(&mut self) {
        self.balloon.forget();
    }

    fn broken(&mut self) {
        self.balloon.broken();
    }

    fn woken(
        &mut self,
        _data: u32,
        _events: EventSet,
        desk: &mut Desk<Own>,
    ) -> std::result::Result<(), Fault> {
        let _ = self.balloon.nudge.read();
        desk.driver()
            .map_or(Ok(()), |driver| pass_on(&self.balloon, driver))
    }

    fn take(
        &mut self,
        index: u16,
        chain: Chain,
        memory: &GuestMemoryMmap,
        own: &mut Own,
    ) -> std::result::Result<Taken, Fault> {
        match index {
            INFLATE => self.balloon.inflate(&chain, memory)?,
            DEFLATE => self.balloon.deflate(&chain)?,
            STATISTICS => {
                self.balloon.read_figures(&chain, memory)?;
                // There should be one; an earlier one is of no use any more.
                let earlier = own.figures.replace(chain.head);
                return Ok(earlier.map_or(Taken::Kept, |head| Taken::Used(head, 0)));
            }
            REPORTING => self.balloon.report(&chain, memory)?,
            _ => {}
        }
        Ok(Taken::Used(chain.head, 0))
    }
}

/// Tells the driver what the host would like.
fn pass_on(balloon: &Balloon, driver: &mut Driver<Own>) -> std::result::Result<(), Fault> {
    let generation = balloon.generation();
    if generation != driver.own.told {
        driver.own.told = generation;
        driver.interrupt.configured();
    }
    if balloon.take_wanted() {
        let statistics = driver
            .queues
            .iter_mut()
            .find(|queue| queue.index == STATISTICS);
        if let (Some(head), Some(active)) = (driver.own.figures.take(), statistics) {
            active.queue.push(head, 0)?;
            if active.queue.wants_interrupt()? {
                driver.interrupt.used(STATISTICS);
            }
        }
    }
    Ok(())
}
