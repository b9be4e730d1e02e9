// SPDX-License-Identifier: Apache-2.0
//! The control thread's part of a migration ([`crate::migrate`] has the whole).
//!
//! | step of the source | who |
//! |---|---|
//! | everything stands for a moment: marks of memory and of disks that go along, and KVM's log, are switched on | control |
//! | rounds; meanwhile the machine may be paused, go on, be reset or stopped | migration |
//! | the machine stands | control |
//! | what is left of disks that go along | migration |
//! | what the vCPUs had to say before is dealt with (`Collect` comes behind it) | control |
//! | disks are durable and let go; states are collected | control |
//! | the rest; the destination says that it goes on | migration |
//! | the machine ends; or takes its disks up and goes on as it was; or stands, when nobody knows | control |
//!
//! | step of the destination | who |
//! |---|---|
//! | the machine's facts, for comparing | control |
//! | disks that are written with what comes are taken up | control |
//! | memory, disks, firmware, states | migration |
//! | all parts load what they remembered | control |
//! | all disks are taken up; it goes on, or stands as the source stood | control |
//!
//! A destination that does not get so far is at its end.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::keep::content;
use super::{Control, State};
use crate::config::{ReceiveFrom, SendTo};
use crate::error::{Error, Kind, Result};
use crate::mailbox::{EndReason, Event, Request};
use crate::migrate::marks;
use crate::migrate::stream::Kind as Record;
use crate::migrate::{
    Copied, Expected, Last, Mover, Order, Progress, Receiving, Sending, Sent, Step, Still, Tools,
};
use crate::save::facts;
use crate::save::file::Section;
use crate::slots::Slots;
use crate::thread::ThreadHook;

/// The longest downtime that may be asked for.
const DOWNTIME_MAX: u64 = 3_600_000;

/// What an error is about when nobody knows where the machine runs.
const UNSURE: &str = "unsure";

/// What it takes to move the machine.
pub(crate) struct Moving {
    mover: Mover,
    slots: Arc<Slots>,
    progress: Arc<Progress>,
    job: Option<Job>,
    /// Held while a disk is let go of that the other thread may be at.
    still: Still,
    /// Another machine may have gone on from this one, which stands and has let go of its disks.
    away: bool,
}

enum Job {
    Send {
        id: u64,
        /// Once it stands for the last part: whether it ran before.
        ran: Option<bool>,
        /// Disks that go along.
        copies: Vec<Copied>,
    },
    Receive {
        id: u64,
        paused: bool,
        /// Disks that are written with what comes.
        copy: Vec<String>,
        /// It goes on here.
        runs: bool,
    },
}

impl Moving {
    /// # Errors
    /// `Unavailable` when the kernel gives no thread.
    pub(crate) fn new(tools: Tools, hook: &ThreadHook) -> Result<Moving> {
        Ok(Moving {
            slots: Arc::clone(&tools.slots),
            progress: Arc::clone(&tools.progress),
            still: tools.still.clone(),
            mover: Mover::new(tools, hook)?,
            job: None,
            away: false,
        })
    }

    pub(super) fn busy(&self) -> bool {
        self.job.is_some()
    }

    /// Whether the last part of a migration has begun.
    fn is_to_stand(&self) -> bool {
        matches!(self.job, Some(Job::Send { ran: Some(_), .. }))
    }

    /// What may be asked of a machine while its memory goes: what does not change what it is made of.
    pub(super) fn allows(&self, request: Request) -> bool {
        let rounds = matches!(self.job, Some(Job::Send { ran: None, .. }));
        let harmless = matches!(
            request,
            Request::Pause
                | Request::Resume
                | Request::PowerButton
                | Request::Reset
                | Request::Stop
        );
        rounds && harmless
    }

    /// While this is held, the other thread is at no disk.
    pub(super) fn hold_disks(&self) -> std::sync::MutexGuard<'_, ()> {
        self.still.hold()
    }

    pub(super) fn stats(&self) -> Option<serde_json::Value> {
        self.busy().then(|| self.progress.to_json())
    }

    /// Stops it, unless it is too late; no error if there is nothing to stop.
    pub(super) fn cancel(&self, why: &str) {
        if self.busy() {
            self.mover
                .order(Order::Cancel(Error::new(Kind::Cancelled, "", why)));
        }
    }
}

/// What a part of the firmware is in the stream, and whether it never changes.
fn record(section: Section) -> Option<(Record, bool)> {
    match section {
        Section::Code => Some((Record::Code, true)),
        Section::Rom => Some((Record::Rom, true)),
        Section::Variables => Some((Record::Variables, false)),
        Section::Facts | Section::State | Section::Index | Section::Memory => None,
    }
}

impl Control {
    pub(super) fn begin_send(&mut self, id: u64, socket: OwnedFd, to: &SendTo) -> Result<()> {
        if !matches!(self.state, State::Running | State::Paused) {
            let message = format!("it cannot be moved: the machine is {}", self.state.name());
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        if self.moving.away {
            let message = "the machine may run elsewhere: resume it or stop it";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        if !(1..=DOWNTIME_MAX).contains(&to.downtime) {
            let message = format!("is 1 to {DOWNTIME_MAX} ms");
            return Err(Error::invalid("downtime", message));
        }
        let facts = serde_json::to_vec(&self.facts()?);
        let facts = facts.map_err(|e| Error::internal(format!("facts: {e}")))?;
        let roms = self.keeping.roms.iter().filter_map(|(section, rom)| {
            let (kind, constant) = record(*section)?;
            constant.then(|| Ok((kind, content(rom)?)))
        });
        let roms = roms.collect::<Result<_>>()?;
        let copies = self.contents(&to.copy)?;
        let watch = |control: &Control| control.watch(&copies);
        if let Err(error) = self.while_it_stands(watch) {
            self.forget(&copies);
            return Err(error);
        }
        let sizes = copies.iter().map(|copied| copied.image.size());
        let disks = sizes.fold(0, u64::saturating_add);
        self.moving.progress.begin(self.keeping.memory(), disks);
        self.moving.job = Some(Job::Send {
            id,
            ran: None,
            copies: copies.clone(),
        });
        self.moving.mover.order(Order::Send(Box::new(Sending {
            socket,
            facts,
            roms,
            downtime: Duration::from_millis(to.downtime),
            bandwidth: to.bandwidth,
            copies,
        })));
        Ok(())
    }

    /// The disks of these names.
    fn contents(&self, ids: &[String]) -> Result<Vec<Copied>> {
        let mut contents: Vec<Copied> = Vec::with_capacity(ids.len());
        for id in ids {
            let refuse = |what| Err(Error::invalid("copy", format!("{id} {what}")));
            let device = self.devices.iter().find(|device| device.id() == *id);
            let Some(content) = device.and_then(|device| device.content()) else {
                return refuse("is no disk that the machine has");
            };
            if content.image.read_only() {
                return refuse(
                    "is read-only: what is on its file does not change, and can be copied before",
                );
            }
            if contents.iter().any(|other| other.id == *id) {
                return refuse("is there twice");
            }
            contents.push(content);
        }
        Ok(contents)
    }

    fn watch(&self, copies: &[Copied]) -> Result<()> {
        marks::switch(&self.keeping.memory, true);
        for copied in copies {
            copied.changed.watch(copied.image.size());
        }
        self.moving.slots.log(true)
    }

    fn forget(&self, copies: &[Copied]) {
        // It costs the guest something that is not needed any more, and that is all.
        let _ = self.moving.slots.log(false);
        marks::switch(&self.keeping.memory, false);
        for copied in copies {
            copied.changed.forget();
        }
    }

    pub(super) fn begin_receive(
        &mut self,
        id: u64,
        socket: OwnedFd,
        from: &ReceiveFrom,
    ) -> Result<()> {
        if self.state != State::Built || !self.keeping.awaits || self.keeping.image.is_some() {
            let message = "only a machine that was built to go on receives one";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        let own = self.facts()?;
        let roms = self.keeping.roms.iter();
        let roms = roms.filter_map(|(section, rom)| Some((record(*section)?.0, rom.size() as u64)));
        let copies = self.contents(&from.copy)?;
        let sizes = copies.iter().map(|copied| copied.image.size());
        let disks = sizes.fold(0, u64::saturating_add);
        self.moving.progress.begin(self.keeping.memory(), disks);
        self.moving.job = Some(Job::Receive {
            id,
            paused: from.paused,
            copy: from.copy.clone(),
            runs: false,
        });
        self.moving.mover.order(Order::Receive(Box::new(Receiving {
            socket,
            expected: Expected {
                own,
                roms: roms.collect(),
                copies,
                separate: from.separate.clone(),
            },
        })));
        Ok(())
    }

    /// The thread that migrates has come so far.
    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Halt => {
                if let Err(error) = self.halt() {
                    self.moving.mover.order(Order::Last(Err(error)));
                }
            }
            // Not for one that was stopped meanwhile.
            Step::Collect if self.moving.is_to_stand() => {
                let last = self.collect();
                self.moving.mover.order(Order::Last(last));
            }
            Step::Collect => {}
            Step::Sent(sent) => self.sent(sent),
            Step::Claim => {
                let claimed = self.claim();
                self.moving.mover.order(Order::Loaded(claimed));
            }
            Step::Arrived(last, roms) => {
                let loaded = self.arrived(&last, roms);
                self.moving.mover.order(Order::Loaded(loaded));
            }
            Step::Go => {
                let runs = self.go();
                self.moving.mover.order(Order::Runs(runs));
            }
            Step::Received(result) => self.received(result),
        }
    }

    fn halt(&mut self) -> Result<()> {
        let now_runs = match self.state {
            State::Running => true,
            State::Paused => false,
            State::Built | State::Ended => return Err(ended()),
        };
        if now_runs {
            self.pause()?;
        }
        if let Some(Job::Send { ran, .. }) = &mut self.moving.job {
            *ran = Some(now_runs);
        }
        self.moving.mover.order(Order::Stands);
        Ok(())
    }

    /// What the destination needs besides memory; disks are let go.
    fn collect(&mut self) -> Result<(Vec<u8>, Option<Vec<u8>>)> {
        let Some(Job::Send { ran: Some(ran), .. }) = self.moving.job else {
            return Err(ended());
        };
        if self.state != State::Paused {
            return Err(ended());
        }
        self.devices.iter().try_for_each(|device| device.let_go())?;
        let last = Last {
            states: self.states()?,
            at: facts::now(),
            paused: !ran,
        };
        let last = serde_json::to_vec(&last);
        let last = last.map_err(|e| Error::internal(format!("state: {e}")))?;
        let mut roms = self.keeping.roms.iter();
        let variables = roms.find(|(section, _)| *section == Section::Variables);
        let variables = variables.map(|(_, rom)| content(rom)).transpose()?;
        Ok((last, variables))
    }

    fn sent(&mut self, sent: Sent) {
        let Some(Job::Send { id, ran, copies }) = self.moving.job.take() else {
            return;
        };
        self.forget(&copies);
        if self.state == State::Running {
            // Networks leave to the kernel again what they did themselves for the marks.
            let _ = self.while_it_stands(|_| Ok(()));
        }
        let stood = ran.is_some() && self.state == State::Paused;
        match sent {
            Sent::Away(statistics) => {
                let result = Ok(statistics);
                self.tell(Event::Done { id, result });
                self.end(EndReason::Migrated, String::new());
            }
            Sent::Unsure(error) if stood => {
                self.moving.away = true;
                let message = format!(
                    "the machine may run at the destination or not, and stands here: look there, then stop it here or resume it ({error})"
                );
                let argument = UNSURE.to_owned();
                let result = Err(Error {
                    message,
                    argument,
                    ..error
                });
                self.tell(Event::Done { id, result });
            }
            Sent::Stays(error) | Sent::Unsure(error) => {
                let result = Err(error);
                let answer = Event::Done { id, result };
                match stood {
                    true => self.come_back("a migration", ran == Some(true), answer),
                    false => self.tell(answer),
                }
            }
        }
    }

    /// Somebody who knows says that the machine is here.
    pub(super) fn take_back(&mut self) -> Result<()> {
        if self.moving.away {
            self.devices
                .iter()
                .try_for_each(|device| device.take_up())?;
            self.moving.away = false;
        }
        Ok(())
    }

    /// The source is the right one: what it sends of disks will be written.
    fn claim(&mut self) -> Result<()> {
        let Some(Job::Receive { copy, .. }) = &self.moving.job else {
            return Err(ended());
        };
        if self.state != State::Built {
            return Err(ended());
        }
        let mut disks = self.devices.iter();
        disks.try_for_each(|device| match copy.contains(&device.id()) {
            true => device.take_up(),
            false => Ok(()),
        })
    }

    fn arrived(&mut self, last: &Last, roms: Vec<(Record, Vec<u8>)>) -> Result<()> {
        let Some(Job::Receive { paused, .. }) = &mut self.moving.job else {
            return Err(ended());
        };
        *paused |= last.paused;
        if self.state != State::Built {
            return Err(ended());
        }
        let sections = roms.into_iter().filter_map(|(kind, bytes)| {
            let mut known = self.keeping.roms.iter().map(|(section, _)| *section);
            let is = |section: &Section| record(*section).is_some_and(|(its, _)| its == kind);
            Some((known.find(is)?, bytes))
        });
        let sections: Vec<_> = sections.collect();
        self.load(&last.states, last.at, &sections)
    }

    fn go(&mut self) -> Result<()> {
        let Some(Job::Receive { paused, runs, .. }) = &mut self.moving.job else {
            return Err(ended());
        };
        if self.state != State::Built {
            return Err(ended());
        }
        self.devices
            .iter()
            .try_for_each(|device| device.take_up())?;
        *runs = true;
        let paused = *paused;
        self.keeping.awaits = false;
        if paused {
            self.enter(State::Paused);
        } else {
            self.go_on();
        }
        Ok(())
    }

    fn received(&mut self, result: Result<String>) {
        let Some(Job::Receive { id, runs, .. }) = self.moving.job.take() else {
            return;
        };
        let failed = result.as_ref().err().map(ToString::to_string);
        self.tell(Event::Done { id, result });
        if let Some(detail) = failed.filter(|_| !runs) {
            self.end(EndReason::Error, detail);
        }
    }
}

fn ended() -> Error {
    let message = "the machine ended before it was moved";
    Error::new(Kind::InvalidState, "", message)
}
