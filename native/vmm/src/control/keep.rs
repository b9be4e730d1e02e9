// SPDX-License-Identifier: Apache-2.0
//! The control thread's part of saving a machine and going on from a file ([`crate::save`] has the file).
//!
//! | step of a save | who |
//! |---|---|
//! | the vCPUs and devices stand; what the vCPUs had to say before is dealt with first (`BeginSave` comes behind it) | control |
//! | disks are durable and let go; states and facts are collected | control |
//! | memory, then the rest, then the header | crew |
//! | the machine ends; or takes its disks up and goes on as it was, as after any failure before | control |
//!
//! With a snapshot, disks stay taken up, since nobody writes to them, and each gets its own after the header
//! ([`crate::snapshots`]); should one fail, the file is empty again. On the way back they follow the devices.
//!
//! | step of a restore | who |
//! |---|---|
//! | header, facts, states are read and compared | control |
//! | memory | crew |
//! | vCPUs, board, devices; disks are taken up; the use mark | control |
//!
//! A machine that cannot be restored is at its end: it is half another's. Nothing else is done meanwhile.

use std::fs::File;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use crate::memory::GuestMemoryMmap;
use serde_json::json;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use super::{Control, State};
use crate::config::{RestoreFrom, Revert, SaveTo};
use crate::cpu::gate::Errand;
use crate::cpu::state::VcpuState;
use crate::error::{Error, Kind, Result};
use crate::io::{Answer, Change};
use crate::mailbox::{EndReason, Event, Keep, Mail};
use crate::save::facts::{self, Disks, Facts, Hardware};
use crate::save::file::{damaged, target, Saved, Section};
use crate::save::pages::{Reader, Writer};
use crate::save::States;
use crate::snapshots::{self, Tidy};
use crate::state;

/// Where a vCPU's thread writes its state down, or finds it with the nanoseconds that have passed since.
pub(crate) type VcpuPlace = Arc<Mutex<Option<(VcpuState, u64)>>>;

/// What it takes to write the machine down.
pub(crate) struct Keeping {
    pub(super) memory: Arc<GuestMemoryMmap>,
    vcpus: Vec<VcpuPlace>,
    hardware: Hardware,
    uuid: String,
    /// The firmware's code, its variables and the option ROM, where there are some.
    pub(super) roms: Vec<(Section, Arc<MmapRegion>)>,
    /// The machine begins by going on from a file.
    pub(super) awaits: bool,
    /// This one, whose memory it has.
    pub(super) image: Option<Arc<Saved>>,
    job: Option<Job>,
}

enum Job {
    Save {
        id: u64,
        file: Arc<File>,
        to: SaveTo,
        ran: bool,
        /// It was stopped before it began.
        stopped: bool,
    },
    Restore {
        id: u64,
        saved: Arc<Saved>,
        facts: Box<Facts>,
        states: Box<States>,
        revert: Option<Revert>,
    },
}

/// Something that cannot be done now.
pub(super) fn busy(what: &str) -> Error {
    let message = format!("{what} has to wait: the machine is being saved, restored or moved");
    Error::new(Kind::InvalidState, "", message)
}

impl Keeping {
    pub(crate) fn new(
        memory: Arc<GuestMemoryMmap>,
        vcpus: Vec<VcpuPlace>,
        (hardware, uuid): (Hardware, String),
        roms: Vec<(Section, Arc<MmapRegion>)>,
        awaits: bool,
        image: Option<Arc<Saved>>,
    ) -> Keeping {
        Keeping {
            memory,
            vcpus,
            hardware,
            uuid,
            roms,
            awaits,
            image,
            job: None,
        }
    }

    pub(super) fn busy(&self) -> bool {
        self.job.is_some()
    }

    /// Bytes of RAM.
    pub(super) fn memory(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Whether the machine may begin at its beginning.
    pub(super) fn check_begin(&self) -> Result<()> {
        if self.awaits {
            let message = "the machine goes on from a file; restore it";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        Ok(())
    }
}

impl Control {
    /// Whether nothing else is to be done with the whole machine.
    pub(super) fn is_kept(&self) -> bool {
        self.keeping.busy() || self.moving.busy()
    }

    /// Begins what was asked for; the answer comes when it is done.
    pub(super) fn keep(&mut self, id: u64, keep: Keep) {
        let begun = match keep {
            _ if self.is_kept() => Err(busy("another file or socket")),
            Keep::Save(file, to) => self.stand_for_save(id, file, to),
            Keep::Restore(file, from) => self.begin_restore(id, file, from),
            Keep::Tidy(what) => self.tidy(&what).map(|()| {
                let result = Ok(String::new());
                self.tell(Event::Done { id, result });
            }),
            Keep::Send(socket, to) => self.begin_send(id, socket, &to),
            Keep::Receive(socket, from) => self.begin_receive(id, socket, &from),
        };
        if let Err(error) = begun {
            self.tell(Event::Done {
                id,
                result: Err(error),
            });
        }
    }

    /// Stops it; no error if there is nothing to stop.
    pub(super) fn cancel_keeping(&mut self) {
        if let Some(Job::Save { stopped, .. }) = &mut self.keeping.job {
            *stopped = true;
        }
        if self.keeping.busy() {
            self.crew.cancel();
        }
        self.moving.cancel("it was stopped");
    }

    fn stand_for_save(&mut self, id: u64, file: File, to: SaveTo) -> Result<()> {
        let ran = match self.state {
            State::Running => true,
            State::Paused => false,
            state => {
                let message = format!("it cannot be saved: the machine is {}", state.name());
                return Err(Error::new(Kind::InvalidState, "", message));
            }
        };
        target(&file)?;
        if ran {
            if let Err(error) = self.stand_still() {
                self.let_go();
                return Err(error);
            }
            self.enter(State::Paused);
        }
        self.keeping.job = Some(Job::Save {
            id,
            file: Arc::new(file),
            to,
            ran,
            stopped: false,
        });
        self.mailbox.inbox.push(Mail::BeginSave);
        Ok(())
    }

    pub(super) fn begin_save(&mut self) {
        let Some(Job::Save {
            file, to, stopped, ..
        }) = &self.keeping.job
        else {
            return;
        };
        let (file, with_disks) = (Arc::clone(file), to.snapshot.is_some());
        let begun = if *stopped {
            let message = "it was stopped before it began";
            Err(Error::new(Kind::Cancelled, "", message))
        } else if self.state == State::Paused {
            self.write_down(&file, with_disks)
        } else {
            let message = "the guest ended the machine before it was saved";
            Err(Error::new(Kind::InvalidState, "", message))
        };
        if let Err(error) = begun {
            self.kept(Err(error));
        }
    }

    /// Collects everything but memory and sends the crew.
    fn write_down(&mut self, file: &Arc<File>, with_disks: bool) -> Result<()> {
        if with_disks {
            snapshots::check(&self.devices)?;
        } else {
            self.devices.iter().try_for_each(|device| device.let_go())?;
        }
        let states = self.states()?;
        let facts = self.facts()?;
        let json = |value: serde_json::Result<Vec<u8>>| {
            value.map_err(|e| Error::internal(format!("state: {e}")))
        };
        let mut sections = vec![
            (Section::Facts, json(serde_json::to_vec(&facts))?),
            (Section::State, json(serde_json::to_vec(&states))?),
        ];
        for (kind, rom) in &self.keeping.roms {
            sections.push((*kind, content(rom)?));
        }
        let memory = Arc::clone(&self.keeping.memory);
        let writer = Writer::new(Arc::clone(file), memory, sections)?;
        self.send(Arc::new(writer))
    }

    fn send(&self, work: Arc<dyn crate::crew::Work>) -> Result<()> {
        let mailbox = Arc::clone(&self.mailbox);
        let finished = Box::new(move |result| mailbox.inbox.push(Mail::Kept(result)));
        self.crew.begin(work, finished)
    }

    pub(super) fn states(&self) -> Result<States> {
        self.gate.errand(Errand::Save)?;
        let vcpus = self.keeping.vcpus.iter().map(|place| {
            let saved = place.lock().unwrap_or_else(|e| e.into_inner()).take();
            saved
                .map(|(state, _)| state)
                .ok_or_else(|| Error::internal("a vCPU has not said its state"))
        });
        let devices = self.devices.iter();
        let devices = devices.filter_map(|device| Some((device.id(), device.stateful()?)));
        Ok(States {
            vcpus: vcpus.collect::<Result<_>>()?,
            platform: self.platform.save()?,
            devices: devices
                .map(|(id, device)| {
                    let state = device.save().map_err(state::about(&id))?;
                    Ok((id.clone(), state))
                })
                .collect::<Result<_>>()?,
        })
    }

    pub(super) fn facts(&self) -> Result<Facts> {
        let devices = self.devices.iter();
        let devices = devices.filter_map(|device| {
            let facts = device.facts().transpose()?;
            Some(facts.map(|facts| (device.id(), facts)))
        });
        Ok(Facts {
            hardware: self.keeping.hardware.clone(),
            uuid: self.keeping.uuid.clone(),
            devices: devices.collect::<Result<_>>()?,
            saved_at: facts::now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }

    /// The crew is done with it.
    pub(super) fn kept(&mut self, result: Result<u64>) {
        match self.keeping.job.take() {
            Some(Job::Save {
                id, file, to, ran, ..
            }) => {
                let taken = to.snapshot.as_deref().map_or(Ok(()), |name| {
                    // Not of a machine whose memory is not there.
                    result
                        .as_ref()
                        .map_or(Ok(()), |_| snapshots::take(&self.devices, name))
                });
                let result = result.and_then(|bytes| taken.map(|()| bytes));
                if result.is_err() {
                    // Nobody is to find half of a machine.
                    let _ = file.set_len(0);
                }
                self.after_save(id, &to, ran, result);
            }
            Some(Job::Restore {
                id,
                saved,
                facts,
                states,
                revert,
            }) => {
                let result =
                    result.and_then(|_| self.go_on_from(&saved, &facts, &states, revert.as_ref()));
                self.after_restore(id, result);
            }
            None => {}
        }
    }

    fn after_save(&mut self, id: u64, to: &SaveTo, ran: bool, result: Result<u64>) {
        let saved = result.is_ok();
        let answer = Event::Done {
            id,
            result: result.map(|bytes| json!({ "bytes": bytes }).to_string()),
        };
        if self.state != State::Paused {
            self.tell(answer);
        } else if saved && to.end {
            self.tell(answer);
            self.end(EndReason::Saved, String::new());
        } else {
            let taken = self.devices.iter().try_for_each(|device| device.take_up());
            match taken {
                Ok(()) if ran => {
                    self.let_go();
                    self.enter(State::Running);
                    self.tell(answer);
                }
                Ok(()) => self.tell(answer),
                Err(error) => {
                    self.tell(answer);
                    let detail = format!("a disk cannot be taken up after a save: {error}");
                    self.end(EndReason::IoError, detail);
                }
            }
        }
    }

    fn begin_restore(&mut self, id: u64, file: Option<File>, from: RestoreFrom) -> Result<()> {
        if self.state != State::Built || !self.keeping.awaits {
            let message = "only a machine that was built to be restored is";
            return Err(Error::new(Kind::InvalidState, "", message));
        }
        if let Err(error) = self.read_up(id, file, from) {
            self.after_restore(id, Err(error));
        }
        Ok(())
    }

    /// Reads everything but memory and sends the crew, unless memory is there.
    fn read_up(&mut self, id: u64, file: Option<File>, from: RestoreFrom) -> Result<()> {
        let (saved, mapped) = match (file, self.keeping.image.take()) {
            (Some(file), None) => (Arc::new(Saved::open(file)?), false),
            (None, Some(image)) => (image, true),
            _ => {
                return Err(Error::invalid(
                    "file",
                    "is given once: to build it, or to go on",
                ))
            }
        };
        let facts: Facts = parse(&saved, Section::Facts)?;
        let disks = match (&from.revert, from.changed_disks) {
            (Some(_), _) => Disks::GoingBack,
            (None, true) => Disks::Any,
            (None, false) => Disks::Same,
        };
        facts.check(&self.facts()?, disks)?;
        let states: States = parse(&saved, Section::State)?;
        if states.vcpus.len() != self.keeping.vcpus.len() {
            return Err(damaged("another number of vCPUs"));
        }
        for (kind, rom) in &self.keeping.roms {
            let found = saved.header.find(*kind).map(|place| place.len);
            if found != Some(rom.size() as u64) {
                return Err(Error::invalid(
                    "firmware",
                    format!("the machine was saved with {kind:?} of another size"),
                ));
            }
        }
        // Reads the index, too.
        let reader = Reader::new(Arc::clone(&saved), Arc::clone(&self.keeping.memory))?;
        if mapped {
            self.mailbox.inbox.push(Mail::Kept(Ok(0)));
        } else {
            self.send(Arc::new(reader))?;
        }
        self.keeping.job = Some(Job::Restore {
            id,
            saved,
            facts: Box::new(facts),
            states: Box::new(states),
            revert: from.revert,
        });
        Ok(())
    }

    /// Memory is there: all parts take over what they remembered.
    fn go_on_from(
        &mut self,
        saved: &Saved,
        facts: &Facts,
        states: &States,
        revert: Option<&Revert>,
    ) -> Result<u64> {
        let roms = self.keeping.roms.iter().map(|(kind, _)| {
            let bytes = saved.section(*kind)?;
            Ok((*kind, bytes.unwrap_or_default()))
        });
        // All of the file is good before anything outside of this process is changed.
        let roms = roms.collect::<Result<Vec<_>>>()?;
        self.load(states, facts.saved_at, &roms)?;
        self.devices
            .iter()
            .try_for_each(|device| device.take_up())?;
        if let Some(revert) = revert {
            self.go_back(facts, revert)?;
        }
        if revert.is_some() || saved.mark_used() {
            self.renew_generation()?;
        }
        Ok(self.keeping.memory())
    }

    /// All parts take over what they remembered, at that time, of the host's clock; `roms` are whole.
    pub(super) fn load(&self, states: &States, at: u64, roms: &[(Section, Vec<u8>)]) -> Result<()> {
        if states.vcpus.len() != self.keeping.vcpus.len() {
            return Err(damaged("another number of vCPUs"));
        }
        for (kind, rom) in &self.keeping.roms {
            let bytes = roms.iter().find(|(known, _)| known == kind);
            let bytes = bytes.map_or(&[] as &[u8], |(_, bytes)| bytes);
            let whole = rom.as_volatile_slice();
            whole
                .write_slice(bytes, 0)
                .map_err(|e| Error::internal(format!("firmware: {e}")))?;
        }
        self.devices.iter().try_for_each(|device| device.pause())?;
        let passed = facts::now().saturating_sub(at);
        for (place, state) in self.keeping.vcpus.iter().zip(&states.vcpus) {
            *place.lock().unwrap_or_else(|e| e.into_inner()) = Some((state.clone(), passed));
        }
        self.gate.errand(Errand::Restore)?;
        self.platform.restore(&states.platform, passed)?;
        let mut others = states.devices.clone();
        for device in &self.devices {
            let Some(part) = device.stateful() else {
                continue;
            };
            let id = device.id();
            let state = others.remove(&id);
            let state = state.ok_or_else(|| state::invalid(format!("{id} is missing")))?;
            part.restore(&state).map_err(state::about(&id))?;
        }
        if let Some((id, _)) = others.first_key_value() {
            return Err(state::invalid(format!("{id} is not known")));
        }
        Ok(())
    }

    /// The disks, too, become what they were.
    fn go_back(&self, facts: &Facts, revert: &Revert) -> Result<()> {
        let before = self.facts()?;
        snapshots::go_back(&self.devices, &revert.to, &revert.aside)?;
        let same = self.facts().and_then(|now| facts.check(&now, Disks::Any));
        let shown = same.and_then(|()| self.show_sizes(&before, facts));
        shown.map_err(|error| snapshots::undone(&self.devices, &revert.aside, error))
    }

    /// A disk that has another size than it was built with shows that.
    fn show_sizes(&self, before: &Facts, now: &Facts) -> Result<()> {
        for device in &self.devices {
            let id = device.id();
            let size = |facts: &Facts| facts.devices.get(&id).and_then(facts::Device::size);
            let Some(size) = size(now).filter(|new| size(before) != Some(*new)) else {
                continue;
            };
            let (sender, receiver) = channel();
            let answer = Answer::new(move |result| {
                let _ = sender.send(result);
            });
            device.change(Change::Size(size), answer);
            let gone = |_| Error::internal(format!("{id}: its I/O thread is gone"));
            receiver.recv().map_err(gone)??;
        }
        Ok(())
    }

    /// Disks that nobody has taken up yet are taken up for it.
    fn tidy(&mut self, what: &Tidy) -> Result<()> {
        let devices = &self.devices;
        match self.state {
            State::Ended => {
                let message = "no snapshot is removed: the machine is at its end";
                Err(Error::new(Kind::InvalidState, "", message))
            }
            State::Running => {
                let done = self.stand_still();
                let done = done.and_then(|()| snapshots::tidy(&self.devices, what));
                self.let_go();
                done
            }
            State::Built if self.keeping.awaits => {
                devices.iter().try_for_each(|device| device.take_up())?;
                let done = snapshots::tidy(devices, what);
                devices.iter().try_for_each(|device| device.let_go())?;
                done
            }
            State::Built | State::Paused => snapshots::tidy(devices, what),
        }
    }

    fn renew_generation(&self) -> Result<()> {
        match self.platform.renew_generation(crate::machine::random()?) {
            // Nobody has read the old one.
            Err(error) if error.kind == Kind::InvalidState => Ok(()),
            other => other,
        }
    }

    fn after_restore(&mut self, id: u64, result: Result<u64>) {
        match result {
            Ok(bytes) => {
                self.keeping.awaits = false;
                self.enter(State::Paused);
                let result = Ok(json!({ "bytes": bytes }).to_string());
                self.tell(Event::Done { id, result });
            }
            Err(error) => {
                let detail = error.to_string();
                self.tell(Event::Done {
                    id,
                    result: Err(error),
                });
                self.end(EndReason::Error, detail);
            }
        }
    }
}

/// What is in a part of the firmware.
pub(super) fn content(rom: &MmapRegion) -> Result<Vec<u8>> {
    let mut bytes = vec![0; rom.size()];
    let whole = rom.as_volatile_slice();
    let read = whole.read_slice(&mut bytes, 0);
    read.map_err(|e| Error::internal(format!("firmware: {e}")))?;
    Ok(bytes)
}

fn parse<T: serde::de::DeserializeOwned>(saved: &Saved, kind: Section) -> Result<T> {
    let bytes = saved.section(kind)?.unwrap_or_default();
    serde_json::from_slice(&bytes).map_err(|e| damaged(format!("the {kind:?} section: {e}")))
}
