// SPDX-License-Identifier: Apache-2.0
//! What goes in and out of a machine: requests and causes to its control thread, events from it.
//!
//! Both ways are a queue and an eventfd; nobody waits for the other side. The eventfd of a queue is readable
//! while there is something in it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::config::{OnWatchdog, ReceiveFrom, RestoreFrom, SaveTo, SendTo};
use crate::cpu::gate::Cause;
use crate::error::{Error, Result};
use crate::hotplug::Arrival;
use crate::io::Change;
use crate::migrate::Step;
use crate::snapshots::Tidy;

/// What a machine is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Let the vCPUs go for the first time.
    Run,
    /// Stop all vCPUs and devices.
    Pause,
    /// Let them go on.
    Resume,
    /// Press the ACPI power button.
    PowerButton,
    /// Pull the reset line.
    Reset,
    /// Stop, flush the disks and end.
    Stop,
    /// Count.
    Stats,
    /// Ask the guest to get by with so many bytes of its memory.
    MemoryTarget(u64),
    /// Touch all of the guest's memory; answered when that is done, with the bytes.
    Prefault,
    /// Stop doing that.
    CancelPrefault,
    /// Stop saving, restoring, sending or receiving.
    CancelSave,
}

/// Why a machine ended; the names are those of `vmbus/wire/worker.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The guest powered itself off.
    GuestPoweroff,
    /// The guest reset itself, and the definition says to end then.
    GuestReset,
    /// It was told to stop.
    Stopped,
    /// It is in a file now.
    Saved,
    /// It goes on elsewhere.
    Migrated,
    /// The guest's kernel panicked and said so.
    GuestPanic,
    /// The guest's processor shut down.
    TripleFault,
    /// KVM could not go on.
    KvmInternalError,
    /// A driver broke its device's rules beyond repair.
    GuestMisbehaved,
    /// The guest let its watchdog's time pass.
    Watchdog,
    /// A disk failed.
    IoError,
    /// Anything else.
    Error,
}

impl EndReason {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            EndReason::GuestPoweroff => "guest-poweroff",
            EndReason::GuestReset => "guest-reset",
            EndReason::Stopped => "stopped",
            EndReason::Saved => "saved",
            EndReason::Migrated => "migrated",
            EndReason::GuestPanic => "guest-panic",
            EndReason::TripleFault => "triple-fault",
            EndReason::KvmInternalError => "kvm-internal-error",
            EndReason::GuestMisbehaved => "guest-misbehaved",
            EndReason::Watchdog => "watchdog",
            EndReason::IoError => "io-error",
            EndReason::Error => "error",
        }
    }
}

/// What a machine tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Request `id` was carried out or not; the result is JSON, or "" where there is nothing to say.
    Done {
        /// As given with the request.
        id: u64,
        /// JSON or "".
        result: Result<String>,
    },
    /// The vCPUs run.
    Running,
    /// The vCPUs and devices stand still.
    Paused,
    /// The machine was reset and is what it was before (running or paused).
    Reset,
    /// The guest has let go of a device in a slot, which is closed now.
    Detached {
        /// Its name, such as `nic/lan`.
        device: String,
        /// What went wrong when it was flushed, or "".
        detail: String,
    },
    /// The guest let its watchdog's time pass, and this happens now.
    Watchdog(OnWatchdog),
    /// The machine is at its end; the last event but for the answers to requests.
    Ended {
        /// Why.
        reason: EndReason,
        /// A sentence for people, or "".
        detail: String,
    },
}

/// What is asked about a slot, or a device.
pub(crate) enum Slot {
    /// Another machine, by its name, has come to the network of the device of this name, behind this socket.
    Link(String, String, OwnedFd),
    /// Put a device into slot 1 to 8.
    Attach(u8, Arrival),
    /// Ask the guest for the device of this name.
    AskBack(String),
    /// It may keep it.
    TakeBackTheQuestion(String),
}

/// What is done with a file or a socket.
pub(crate) enum Keep {
    /// Write the machine to it.
    Save(File, SaveTo),
    /// Go on from it, or from what the machine was built with.
    Restore(Option<File>, RestoreFrom),
    /// Remove what broken off snapshots have left on the disks.
    Tidy(Tidy),
    /// Have the machine go on at the other end.
    Send(OwnedFd, SendTo),
    /// Go on with the machine that comes from there.
    Receive(OwnedFd, ReceiveFrom),
}

/// To the control thread.
pub(crate) enum Mail {
    Request(u64, Request),
    Slot(u64, Slot),
    /// Change the device of this name.
    Change(u64, String, Change),
    Keep(u64, Keep),
    /// The vCPUs stand, and all that they had to say is said: the save can begin.
    BeginSave,
    /// The crew is done with the guest's memory: bytes of the file, or why not.
    Kept(Result<u64>),
    /// The thread that migrates has come so far.
    Move(Step),
    /// The guest has let go of what is in the slot with this index.
    Ejected(u8),
    /// With the gate's epoch at the time.
    Cause(Cause, u64),
    /// The machine is dropped.
    Quit,
}

/// One direction.
pub(crate) struct Queue<T> {
    items: Mutex<VecDeque<T>>,
    event: EventFd,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Result<Queue<T>> {
        Ok(Queue {
            items: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK).map_err(|e| Error::kernel("eventfd", e))?,
        })
    }

    pub(crate) fn push(&self, item: T) {
        let mut items = self.lock();
        items.push_back(item);
        // The counter cannot overflow: it is never more than the length of the queue.
        let _ = self.event.write(1);
    }

    pub(crate) fn pop(&self) -> Option<T> {
        let mut items = self.lock();
        let item = items.pop_front();
        if items.is_empty() {
            let _ = self.event.read();
        }
        item
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<T>> {
        self.items.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Both directions.
pub(crate) struct Mailbox {
    pub(crate) inbox: Queue<Mail>,
    pub(crate) outbox: Queue<Event>,
}

impl Mailbox {
    pub(crate) fn new() -> Result<Mailbox> {
        Ok(Mailbox {
            inbox: Queue::new()?,
            outbox: Queue::new()?,
        })
    }
}
