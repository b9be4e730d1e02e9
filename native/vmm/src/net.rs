// SPDX-License-Identifier: Apache-2.0
//! The I/O thread for networks: it moves frames between virtqueues and links ([`crate::io`] has a thread's life).
//!
//! A link is a tap, a stream socket to a helper process ([`stream`]), or sockets to other machines ([`hub`]). What
//! follows is about taps; the stream has one source, and makes transmit queues wait instead of dropping.
//!
//! One thread serves all interfaces of a machine, all queues. Frames are read and written with readv and writev
//! right in guest memory: a received one into as many of the driver's buffers as the longest packet could fill,
//! of which those that it did not fill are kept for the next; a transmitted one from where the driver has it.
//!
//! | rung | done |
//! |---|---|
//! | a transmit queue (edge-triggered) | each chain is written to the pair's queue of the tap, and given back |
//! | a receive queue | there are buffers: what the tap has is read |
//! | the control queue | its commands are carried out |
//! | the tap (edge-triggered) | it is read until it is empty, or the driver has no more buffers |
//!
//! A tap has as many queues as the broker made. Queue n of it feeds pair n modulo the pairs that the driver uses,
//! so a driver that uses one pair gets everything, whatever the tap has. The kernel sends the frames of a flow
//! to the queue that the flow was last written to.
//!
//! Fairness and bounds: one visit moves at most as many frames as the ring has entries, then all others get
//! their turn. The driver is interrupted once a visit and queue, and only if it wants to be. A packet too long
//! for the buffers there are waits for more, unless there cannot be more: then it is dropped. So is what the
//! tap does not take, and what came for the driver before this one. What breaks a ring gets DEVICE_NEEDS_RESET.
//!
//! An interface that goes on from a file announces its guest's address where it is now ([`announce`]).
//!
//! While the cable is pulled, everything is dropped in both directions, whatever the driver makes of the news.
//!
//! Where the broker gives /dev/vhost-net too, the kernel serves the queues of a tap ([`vhost`]) whenever nothing else is
//! to be done with them and it can do so exactly ([`engage`]); without it, this thread.
//!
//! Left out: io_uring. A tap never makes its reader wait, so there is nothing to have in flight, and a call moves a
//! whole packet.

mod announce;
mod counters;
mod engage;
mod filter;
mod frames;
mod hub;
mod interface;
mod link;
#[cfg(test)]
mod link_tests;
mod server;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

use std::sync::Arc;

use crate::error::Result;
use crate::io::{IoThread, Port, Trouble};
use crate::thread::{Role, ThreadHook};
use crate::virtio::live::ChangingConfig;
use crate::virtio::net::MAC;

pub use counters::Counters;
pub use hub::Hub;
pub use link::Link;
use server::Server;
pub use stream::Stream;
pub use tap::Tap;

/// An interface that the thread serves.
pub struct Served {
    /// Where its frames go and come from.
    pub link: Link,
    /// Whether the cable is plugged in.
    pub carrier: bool,
    /// What the guest sees of it.
    pub config: Arc<ChangingConfig>,
    /// Its hardware address.
    pub mac: [u8; MAC],
    /// Its queue pairs.
    pub pairs: u16,
    /// What has happened.
    pub counters: Arc<Counters>,
}

/// Starts the thread; a port for each interface comes back. `trouble` hears of an end that nobody asked for.
///
/// # Errors
/// `Unavailable` when the kernel gives no thread.
pub fn start(
    served: Vec<Served>,
    hook: &ThreadHook,
    trouble: &Trouble,
) -> Result<(IoThread, Vec<Port>)> {
    IoThread::start(
        "network",
        Role::Network,
        served.len(),
        hook,
        trouble,
        |mailbox| Server::new(served, mailbox),
    )
}
