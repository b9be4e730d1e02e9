// SPDX-License-Identifier: Apache-2.0
//! The control thread: carries requests out, and decides what follows when the guest does not go on.
//!
//! | state | Run | Pause | Resume | PowerButton | Reset | Stop | the guest resets | another cause |
//! |---|---|---|---|---|---|---|---|---|
//! | built | running | – | – | – | – | ended | | |
//! | running | – | paused | – | pressed | reset, running | ended | reset, running; or ended | ended |
//! | paused | – | – | running | pressed | reset, paused | ended | as running, then paused | ended |
//! | ended | – | – | – | – | – | – | | |
//!
//! "–" is answered with InvalidState; Stats is answered in every state, MemoryTarget, Prefault and CancelPrefault in all but the
//! last. A cause that was raised before a
//! reset is stale and forgotten. Besides, this thread moves the console's bytes.

mod keep;
mod moving;
mod restore;
mod save;
mod stats;
mod vcpus;

pub(crate) use keep::Keeping;
pub(crate) use moving::Moving;
pub(crate) use vcpus::VcpuThreads;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use crate::config::{OnReset, OnWatchdog};
use crate::cpu::gate::{Cause, Gate};
use crate::crew::Crew;
use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::hotplug::Hotplug;
use crate::io::{Answer, Change};
use crate::mailbox::{EndReason, Event, Mail, Mailbox, Request, Slot};
use crate::pci::watchdog::Watchdog;
use crate::platform::Platform;
use crate::poll::{self, watch};
use crate::prefault::Touch;
use crate::thread::panic_message;
use crate::virtio::balloon::Balloon;

const INBOX: u64 = 0;
const CONSOLE: u64 = 1;
const WATCHDOG: u64 = 2;
const CLOCK: u64 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Built,
    Running,
    Paused,
    Ended,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Built => "not started",
            State::Running => "running",
            State::Paused => "paused",
            State::Ended => "at its end",
        }
    }
}

/// The watchdog, and what it is for.
pub(crate) type Dog = (Arc<Watchdog>, OnWatchdog);

/// Everything the control thread works on.
pub(crate) struct Control {
    mailbox: Arc<Mailbox>,
    gate: Arc<Gate>,
    vcpus: VcpuThreads,
    devices: Vec<Arc<dyn Device>>,
    hotplug: Hotplug,
    watchdog: Option<Dog>,
    balloon: Option<Arc<Balloon>>,
    crew: Crew,
    platform: Platform,
    on_reset: OnReset,
    keeping: Keeping,
    moving: Moving,
    state: State,
    begin: Instant,
    resets: u64,
}

impl Control {
    pub(crate) fn new(
        mailbox: Arc<Mailbox>,
        gate: Arc<Gate>,
        vcpus: VcpuThreads,
        devices: (Vec<Arc<dyn Device>>, Hotplug, Option<Dog>),
        memory: (Option<Arc<Balloon>>, Crew),
        platform: Platform,
        (on_reset, keeping, moving): (OnReset, Keeping, Moving),
    ) -> Control {
        let (devices, hotplug, watchdog) = devices;
        let (balloon, crew) = memory;
        Control {
            mailbox,
            gate,
            vcpus,
            devices,
            hotplug,
            watchdog,
            balloon,
            crew,
            platform,
            on_reset,
            keeping,
            moving,
            state: State::Built,
            begin: Instant::now(),
            resets: 0,
        }
    }

    /// Until the machine is dropped.
    pub(crate) fn run(mut self) {
        // A bug ends the machine and says so, rather than leave everybody waiting.
        match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.end(EndReason::Error, error.to_string()),
            Err(panic) => self.end(EndReason::Error, panic_message(panic.as_ref())),
        }
        self.end(EndReason::Stopped, String::new());
    }

    fn serve(&mut self) -> Result<()> {
        let epoll = Epoll::new().map_err(|e| Error::kernel("epoll_create1", e))?;
        watch(&epoll, self.mailbox.inbox.fd(), EventSet::IN, INBOX)?;
        let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        watch(&epoll, self.platform.serial.socket(), both, CONSOLE)?;
        if let Some((watchdog, _)) = &self.watchdog {
            watch(&epoll, watchdog.timer(), EventSet::IN, WATCHDOG)?;
        }
        watch(&epoll, self.platform.cmos.timer(), EventSet::IN, CLOCK)?;
        let mut ready = [EpollEvent::default(); 4];
        loop {
            let count = poll::wait(&epoll, -1, &mut ready)?;
            for event in ready.iter().take(count) {
                match event.data() {
                    CONSOLE => self.platform.serial.socket_ready(),
                    WATCHDOG => self.watchdog_ended(),
                    CLOCK if self.state == State::Running => self.platform.cmos.wake(),
                    CLOCK => self.platform.cmos.sleep(),
                    _ => {}
                }
            }
            while let Some(mail) = self.mailbox.inbox.pop() {
                match mail {
                    Mail::Request(id, Request::Prefault) => self.begin_prefault(id),
                    Mail::Request(id, request) => {
                        let result = self.carry_out(request);
                        self.tell(Event::Done { id, result });
                    }
                    Mail::Change(id, device, change) => {
                        self.begin_change(id, &device, change);
                    }
                    Mail::Slot(id, slot) => {
                        let result = self.change(slot).map(|()| String::new());
                        self.tell(Event::Done { id, result });
                    }
                    Mail::Keep(id, keep) => self.keep(id, keep),
                    Mail::BeginSave => self.begin_save(),
                    Mail::Kept(result) => self.kept(result),
                    Mail::Move(step) => self.step(step),
                    Mail::Ejected(slot) => self.remove(slot),
                    Mail::Cause(cause, epoch) => self.follow(cause, epoch),
                    Mail::Quit => return Ok(()),
                }
            }
        }
    }

    fn tell(&self, event: Event) {
        self.mailbox.outbox.push(event);
    }

    fn carry_out(&mut self, request: Request) -> Result<String> {
        use Request::{
            CancelPrefault, CancelSave, MemoryTarget, Pause, PowerButton, Reset, Resume, Run,
            Stats, Stop,
        };
        use State::{Built, Paused, Running};
        match (request, self.state) {
            (Stats, _) => return Ok(self.stats()),
            (CancelSave, _) => self.cancel_keeping(),
            (request, _) if self.is_kept() && !self.moving.allows(request) => {
                return Err(keep::busy(&format!("{request:?}")))
            }
            (Run, Built) => {
                self.keeping.check_begin()?;
                self.gate.run();
                self.enter(Running);
            }
            (Pause, Running) => self.pause()?,
            (Resume, Paused) => {
                self.take_back()?;
                self.go_on();
            }
            (PowerButton, Running | Paused) => self.platform.pm.press_power_button(),
            (Reset, Running | Paused) => self.reset_or_end()?,
            (MemoryTarget(bytes), Built | Running | Paused) => self.set_memory_target(bytes)?,
            (CancelPrefault, Built | Running | Paused) => self.crew.cancel(),
            (Stop, Built | Running | Paused) => self.end(EndReason::Stopped, String::new()),
            (request, state) => {
                return Err(Error::new(
                    Kind::InvalidState,
                    "",
                    format!(
                        "{request:?} cannot be done: the machine is {}",
                        state.name()
                    ),
                ))
            }
        }
        Ok(String::new())
    }

    /// Devices come and go in every state but the last.
    fn change(&mut self, slot: Slot) -> Result<()> {
        if self.state == State::Ended {
            let message = "no device comes or goes: the machine is at its end";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        if self.is_kept() {
            return Err(keep::busy("a change of devices"));
        }
        match slot {
            Slot::Attach(number, arrival) => {
                let device = self.hotplug.attach(number, arrival)?;
                if self.state == State::Paused {
                    device.pause()?;
                }
                // Before the bus, which is reset after it, and the threads, which end after it.
                self.devices.insert(0, device);
                Ok(())
            }
            Slot::Link(id, peer, socket) => {
                let mut devices = self.devices.iter();
                let device = devices.find(|device| device.id() == id);
                let none = || Error::invalid("device", format!("there is no {id}"));
                device.ok_or_else(none)?.link(peer, socket)
            }
            Slot::AskBack(id) => self.hotplug.ask_back(&id),
            Slot::TakeBackTheQuestion(id) => self.hotplug.take_back_the_question(&id),
        }
    }

    /// The answer comes from the thread that serves the device.
    fn begin_change(&self, id: u64, name: &str, change: Change) {
        let mailbox = Arc::clone(&self.mailbox);
        let answer = Answer::new(move |result| mailbox.outbox.push(Event::Done { id, result }));
        if self.state == State::Ended {
            let message = "no device changes: the machine is at its end";
            answer.give(Err(Error::new(Kind::InvalidState, "", message)));
            return;
        }
        // These change what a saved machine, or one on its way, is said to be.
        if self.is_kept() && matches!(change, Change::Size(_) | Change::Medium { .. }) {
            answer.give(Err(keep::busy("a change of a disk")));
            return;
        }
        match self.devices.iter().find(|device| device.id() == name) {
            Some(device) => device.change(change, answer),
            None => answer.give(Err(Error::invalid("device", format!("there is no {name}")))),
        }
    }

    fn remove(&mut self, slot: u8) {
        if self.state == State::Ended {
            return;
        }
        let held = self.moving.hold_disks();
        let removed = self.hotplug.remove(slot);
        drop(held);
        if let Some((id, closed)) = removed {
            self.devices.retain(|device| device.id() != id);
            let detail = closed.err().map(|error| error.to_string());
            self.tell(Event::Detached {
                device: id,
                detail: detail.unwrap_or_default(),
            });
        }
    }

    /// The answer comes from the thread that finishes it.
    fn begin_prefault(&self, id: u64) {
        let begun = if self.state == State::Ended {
            let message = "there is no memory to touch: the machine is at its end";
            Err(Error::new(Kind::InvalidState, "", message))
        } else if self.is_kept() {
            Err(keep::busy("Prefault"))
        } else {
            let mailbox = Arc::clone(&self.mailbox);
            self.crew.begin(
                Arc::new(Touch),
                Box::new(move |result| {
                    let result = result.map(|bytes| json!({ "bytes": bytes }).to_string());
                    mailbox.outbox.push(Event::Done { id, result });
                }),
            )
        };
        if let Err(error) = begun {
            let result = Err(error);
            self.tell(Event::Done { id, result });
        }
    }

    fn set_memory_target(&self, bytes: u64) -> Result<()> {
        let balloon = self.balloon.as_ref().ok_or_else(|| {
            let message = "the machine has no balloon, so its memory stays as it is";
            Error::new(Kind::NotSupported, "", message)
        })?;
        balloon.set_target(bytes)
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        match state {
            State::Running => self.tell(Event::Running),
            State::Paused => self.tell(Event::Paused),
            State::Built | State::Ended => {}
        }
    }

    /// The guest does not go on, for this cause.
    fn follow(&mut self, cause: Cause, epoch: u64) {
        if self.state == State::Ended || epoch != self.gate.epoch() {
            return;
        }
        match cause {
            Cause::PowerOff => self.end(EndReason::GuestPoweroff, String::new()),
            Cause::Reset(_) if self.on_reset == OnReset::Restart => {
                // The end, if it came to that, has been told.
                let _ = self.reset_or_end();
            }
            Cause::Reset(means) => self.end(EndReason::GuestReset, format!("through the {means}")),
            Cause::GuestPanic => self.end(EndReason::GuestPanic, String::new()),
            Cause::TripleFault => self.end(EndReason::TripleFault, String::new()),
            Cause::KvmInternalError(detail) => self.end(EndReason::KvmInternalError, detail),
            Cause::GuestMisbehaved(detail) => self.end(EndReason::GuestMisbehaved, detail),
            Cause::IoError(detail) => self.end(EndReason::IoError, detail),
            Cause::Error(detail) => self.end(EndReason::Error, detail),
        }
    }

    /// The watchdog's timer has fired. While the machine stands, its time does, too.
    fn watchdog_ended(&mut self) {
        let ended = self
            .watchdog
            .as_ref()
            .filter(|(watchdog, _)| watchdog.has_ended());
        let Some(action) = ended.map(|(_, action)| *action) else {
            return;
        };
        if self.state != State::Running {
            return;
        }
        self.tell(Event::Watchdog(action));
        match action {
            OnWatchdog::None => {}
            OnWatchdog::Reset => self.follow(Cause::Reset("watchdog"), self.gate.epoch()),
            OnWatchdog::PowerOff => {
                let detail = "the guest let its watchdog's time pass";
                self.end(EndReason::Watchdog, detail.to_owned());
            }
            OnWatchdog::Pause => {
                // One that does not stand goes on.
                let _ = self.pause();
            }
        }
    }

    /// It runs, and stands from now on; if a part of it does not, all of it goes on.
    fn pause(&mut self) -> Result<()> {
        if let Err(error) = self.stand_still() {
            self.let_go();
            return Err(error);
        }
        self.enter(State::Paused);
        Ok(())
    }

    /// It stands, and runs from now on.
    fn go_on(&mut self) {
        self.let_go();
        self.enter(State::Running);
    }

    /// Does what takes a moment in which nothing moves; one that ran then goes on.
    fn while_it_stands(&self, what: impl Fn(&Control) -> Result<()>) -> Result<()> {
        if self.state != State::Running {
            return what(self);
        }
        let done = self.stand_still().and_then(|()| what(self));
        self.let_go();
        done
    }

    /// vCPUs first: a device that is paused is asked nothing more.
    fn stand_still(&self) -> Result<()> {
        self.gate.stand()?;
        self.devices.iter().try_for_each(|device| device.pause())
    }

    fn let_go(&self) {
        for device in &self.devices {
            device.resume();
        }
        self.platform.cmos.wake();
        self.gate.run();
    }

    /// Resets, and goes on if it ran; a machine that cannot be reset is at its end.
    fn reset_or_end(&mut self) -> Result<()> {
        let was_paused = self.state == State::Paused;
        if let Err(error) = self.reset() {
            self.end(EndReason::Error, format!("the reset failed: {error}"));
            return Err(error);
        }
        self.resets = self.resets.saturating_add(1);
        self.tell(Event::Reset);
        if !was_paused {
            self.let_go();
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<()> {
        if self.state != State::Paused {
            self.stand_still()?;
        }
        for device in &self.devices {
            device.reset();
        }
        self.platform.reset()?;
        self.gate.reset()
    }

    fn end(&mut self, reason: EndReason, detail: String) {
        if self.state == State::Ended {
            return;
        }
        self.crew.cancel();
        self.moving.cancel("the machine has ended");
        let mut trouble = Vec::new();
        if self.state != State::Paused {
            trouble.extend(self.stand_still().err());
        }
        let held = self.moving.hold_disks();
        // Each is to flush, whatever the others say.
        trouble.extend(self.devices.iter().filter_map(|device| device.stop().err()));
        drop(held);
        self.state = State::Ended;
        let event = match (reason, trouble.first()) {
            (
                EndReason::GuestPoweroff
                | EndReason::GuestReset
                | EndReason::Stopped
                | EndReason::Saved
                | EndReason::Migrated,
                Some(error),
            ) => Event::Ended {
                reason: EndReason::IoError,
                detail: error.to_string(),
            },
            _ => Event::Ended { reason, detail },
        };
        self.tell(event);
    }
}
