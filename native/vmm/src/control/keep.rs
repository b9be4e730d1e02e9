// SPDX-License-Identifier: Apache-2.0
//! The control thread's part of saving a machine and going on from a file ([`crate::save`] has the file): what is asked, what a
//! machine's parts remember, and what becomes of it. The steps are in [`super::save`] and [`super::restore`].

use std::fs::File;
use std::sync::{Arc, Mutex};

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use super::{Control, State};
use crate::config::{Revert, SaveTo};
use crate::cpu::gate::Errand;
use crate::cpu::state::VcpuState;
use crate::error::{Error, Kind, Result};
use crate::mailbox::{EndReason, Event, Keep, Mail};
use crate::memory::GuestMemoryMmap;
use crate::save::facts::{self, Facts, Hardware};
use crate::save::file::{damaged, Saved, Section};
use crate::save::States;
use crate::snapshots::{self, Tidy};
use crate::state;

/// Where a vCPU's thread writes its state down, or finds it with the nanoseconds that have passed since.
pub(crate) type VcpuPlace = Arc<Mutex<Option<(VcpuState, u64)>>>;

/// What it takes to write the machine down.
pub(crate) struct Keeping {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) vcpus: Vec<VcpuPlace>,
    hardware: Hardware,
    uuid: String,
    /// The firmware's code, its variables and the option ROM, where there are some.
    pub(super) roms: Vec<(Section, Arc<MmapRegion>)>,
    /// The machine begins by going on from a file.
    pub(super) awaits: bool,
    /// This one, whose memory it has.
    pub(super) image: Option<Arc<Saved>>,
    pub(super) job: Option<Job>,
}

pub(super) enum Job {
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

    pub(super) fn send(&self, work: Arc<dyn crate::crew::Work>) -> Result<()> {
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

    /// It stands, and is to be what it was before `what`: its disks are taken up, it goes on if it ran, and `answer` is told. Without
    /// its disks it is at its end.
    pub(super) fn come_back(&mut self, what: &str, ran: bool, answer: Event) {
        let taken = self.devices.iter().try_for_each(|device| device.take_up());
        if taken.is_ok() && ran {
            self.go_on();
        }
        self.tell(answer);
        if let Err(error) = taken {
            let detail = format!("a disk cannot be taken up after {what}: {error}");
            self.end(EndReason::IoError, detail);
        }
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

    /// Disks that nobody has taken up yet are taken up for it.
    fn tidy(&self, what: &Tidy) -> Result<()> {
        let devices = &self.devices;
        match self.state {
            State::Ended => {
                let message = "no snapshot is removed: the machine is at its end";
                Err(Error::new(Kind::InvalidState, "", message))
            }
            State::Built if self.keeping.awaits => {
                devices.iter().try_for_each(|device| device.take_up())?;
                let done = snapshots::tidy(devices, what);
                devices.iter().try_for_each(|device| device.let_go())?;
                done
            }
            State::Built | State::Running | State::Paused => {
                self.while_it_stands(|control| snapshots::tidy(&control.devices, what))
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
