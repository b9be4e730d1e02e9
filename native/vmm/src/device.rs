// SPDX-License-Identifier: Apache-2.0
//! What the machine asks of every device that has a life of its own (a thread, state that a reset clears).
//!
//! The machine calls these from its control thread, never from a vCPU, and in this order: while vCPUs stand
//! still it calls `pause` on all devices; then `reset`, `resume` or `stop`. Registers are another matter: see
//! [`crate::bus::BusDevice`].

use std::os::fd::OwnedFd;

use crate::error::{Error, Result};
use crate::io::{Answer, Change};
use crate::migrate::Copied;
use crate::save::facts;
use crate::snapshots::Mark;
use crate::state::Stateful;

/// A device, as the control thread sees it.
pub trait Device: Send + Sync {
    /// Its name in events, errors and statistics, such as `disk/root`.
    fn id(&self) -> String;

    /// Finishes what it has begun and starts nothing more; returns when no request is in flight and
    /// guest memory is no longer touched.
    ///
    /// # Errors
    /// The I/O error that prevents it.
    fn pause(&self) -> Result<()> {
        Ok(())
    }

    /// Goes on after `pause`; what the guest asked for in the meantime is looked at.
    fn resume(&self) {}

    /// Back to the state after power-on; called paused, with the vCPUs standing still.
    fn reset(&self) {}

    /// Flushes what is volatile and ends the threads; called paused, once, last.
    ///
    /// # Errors
    /// The I/O error that prevents it.
    fn stop(&self) -> Result<()> {
        Ok(())
    }

    /// Another machine has come to the device's network, behind this socket.
    ///
    /// # Errors
    /// `InvalidArgument` for a device that is of no such network.
    fn link(&self, _peer: String, _socket: OwnedFd) -> Result<()> {
        Err(Error::invalid("device", "is not of an isolated network"))
    }

    /// The host changes the device, whatever its guest does meanwhile; `answer` hears when it is done.
    fn change(&self, change: Change, answer: Answer) {
        answer.give(Err(change.misplaced()));
    }

    /// What it is to a machine that is saved, and what lies behind it; None for what is no device of the guest's.
    ///
    /// # Errors
    /// `Unavailable` when the kernel does not tell of a file.
    fn facts(&self) -> Result<Option<facts::Device>> {
        Ok(None)
    }

    /// What it remembers besides what the PCI bus knows of its functions.
    fn stateful(&self) -> Option<&dyn Stateful> {
        None
    }

    /// Makes what lies behind it durable and lets it go: nothing is read or written until `take_up`. Called paused; no
    /// error if it is so already.
    ///
    /// # Errors
    /// The I/O error that prevents it.
    fn let_go(&self) -> Result<()> {
        Ok(())
    }

    /// Takes what lies behind it up again, as it is now; called paused.
    ///
    /// # Errors
    /// What is wrong with it.
    fn take_up(&self) -> Result<()> {
        Ok(())
    }

    /// A disk's content, for a migration that takes it along; None for what is no disk, and for a drive without a medium.
    fn content(&self) -> Option<Copied> {
        None
    }

    /// Does something with an internal snapshot of what lies behind it; called paused, taken up.
    ///
    /// # Errors
    /// What is wrong with it, by its id.
    fn mark(&self, _mark: Mark) -> Result<()> {
        Ok(())
    }

    /// Counters since the start, as a JSON object.
    fn stats(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}
