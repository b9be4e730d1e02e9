// SPDX-License-Identifier: Apache-2.0
//! A SCSI host adapter, as an I/O thread serves it: commands become answers or operations on the units' images.
//!
//! Task management waits until nothing is in flight, and nothing is begun before: then no task is left that could be
//! aborted. What it resets is told to the guest as a unit attention.

use std::sync::{Arc, MutexGuard};

use serde::{Deserialize, Serialize};
use vmbus_qcow2::{Engine, Image, Op, Slot};

use super::{image_error, Counters};
use crate::error::{Error, Kind, Result};
use crate::io::Medium;
use crate::memory::GuestMemoryMmap;
use crate::scsi::cdrom::Remembered;
use crate::scsi::{disk, sense::Sense, Outcome, Unit, Work};
use crate::virtio::chain::{Chain, Segments};
use crate::virtio::queue::Fault;
use crate::virtio::scsi::{self, Address, Command, Management, Reply, Response, CONTROL, EVENTS};

/// A unit of the definition, before it is served.
pub struct ScsiUnit {
    /// Its image, if there is one: always, but for a CD-ROM drive. Kept as it is by whoever serves the unit.
    pub(crate) medium: Medium,
    /// What it is.
    pub unit: Unit,
    /// What has happened.
    pub counters: Arc<Counters>,
}

struct Attached {
    unit: Unit,
    image: Option<(Arc<Image>, Slot)>,
    medium: Medium,
    counters: Arc<Counters>,
}

/// The adapter.
pub(super) struct Adapter {
    units: Vec<Attached>,
    /// Task management that waits until nothing is in flight.
    held: Vec<Held>,
    /// An event found no room.
    missed: bool,
}

struct Held {
    queue: usize,
    head: u16,
    place: Segments,
    asked: Management,
}

/// A command that its image has.
#[derive(Debug)]
pub(super) struct Waiting {
    unit: usize,
    reply: Reply,
}

/// What becomes of a chain.
pub(super) enum Begun {
    /// It is answered, with so many bytes.
    Done(u32),
    /// It is kept until nothing is in flight.
    Held,
    /// The image has it.
    Image {
        slot: Slot,
        work: Work,
        data: Segments,
        waiting: Waiting,
    },
}

/// What a machine's state has of it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    units: Vec<Remembered>,
}

impl Adapter {
    pub(super) fn new(units: Vec<ScsiUnit>, engine: &mut Engine) -> Result<Adapter> {
        let attach = |unit: ScsiUnit| {
            let medium = lock(&unit.medium).clone();
            let image = medium.map(|image| attach(engine, image)).transpose()?;
            Ok(Attached {
                unit: unit.unit,
                image,
                medium: unit.medium,
                counters: unit.counters,
            })
        };
        Ok(Adapter {
            units: units.into_iter().map(attach).collect::<Result<_>>()?,
            held: Vec::new(),
            missed: false,
        })
    }

    /// A chain from a queue, whose number and place in the list these are.
    pub(super) fn begin(
        &mut self,
        queue: u16,
        place: usize,
        chain: Chain,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<Begun, Fault> {
        let head = chain.head;
        if queue == CONTROL {
            let (asked, answer) = scsi::management(chain, memory)?;
            let response = match asked {
                Management::Tasks { address, .. } => match self.unit_at(address) {
                    Ok(_) => {
                        self.held.push(Held {
                            queue: place,
                            head,
                            place: answer,
                            asked,
                        });
                        return Ok(Begun::Held);
                    }
                    Err(response) => response,
                },
                Management::Asynchronous => Response::Ok,
                Management::Unknown => Response::Failure,
            };
            let written = scsi::answer_management(&answer, memory, &asked, response)?;
            return Ok(Begun::Done(written));
        }
        self.command(scsi::command(chain, memory)?, memory)
    }

    fn command(
        &mut self,
        command: Command,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<Begun, Fault> {
        let Command {
            address,
            cdb,
            data_out,
            data_in,
            reply,
        } = command;
        let refused = match self.unit_at(address) {
            _ if !data_out.is_empty() && !data_in.is_empty() => Response::Failure,
            Err(response) => response,
            Ok(number) => match self.units.get_mut(number) {
                None => Response::BadTarget,
                Some(attached) => {
                    let mut parameters = Vec::new();
                    if disk::has_parameters(cdb.opcode()) {
                        parameters.resize(data_out.len().min(disk::PARAMETERS as u64) as usize, 0);
                        data_out.read_at(memory, 0, &mut parameters)?;
                    }
                    match attached.unit.command(&cdb, &parameters) {
                        Outcome::Good(bytes) => {
                            let written = data_in.write(memory, &bytes)?;
                            let moved = u64::from(written).max(parameters.len() as u64);
                            return Ok(Begun::Done(reply.good(memory, moved, written)?));
                        }
                        Outcome::Check(sense) => {
                            attached.counters.refused();
                            return Ok(Begun::Done(reply.check(memory, sense)?));
                        }
                        Outcome::Image(work) => {
                            let (data, moves) = match work.op {
                                Op::Read => (data_in, true),
                                Op::Write { .. } => (data_out, true),
                                _ => (Segments::default(), false),
                            };
                            match &attached.image {
                                _ if moves && data.len() < work.len => Response::Overrun,
                                None => {
                                    let written = reply.check(memory, Sense::NO_MEDIUM)?;
                                    return Ok(Begun::Done(written));
                                }
                                Some((_, slot)) => {
                                    return Ok(Begun::Image {
                                        slot: *slot,
                                        data: first(data, &work, moves),
                                        work,
                                        waiting: Waiting {
                                            unit: number,
                                            reply,
                                        },
                                    })
                                }
                            }
                        }
                    }
                }
            },
        };
        Ok(Begun::Done(reply.refuse(memory, refused)?))
    }

    /// The number of the unit there.
    fn unit_at(&self, address: Address) -> std::result::Result<usize, Response> {
        let target = address.target().filter(|target| *target < self.units.len());
        match (target, address.unit()) {
            (None, _) => Err(Response::BadTarget),
            (Some(target), 0) => Ok(target),
            (Some(_), _) => Err(Response::IncorrectLun),
        }
    }

    /// Of the unit whose image has a command.
    pub(super) fn counters(&self, waiting: &Waiting) -> Option<&Counters> {
        let attached = self.units.get(waiting.unit);
        attached.map(|attached| &*attached.counters)
    }

    /// The image has carried a command out, or not; how many bytes the answer has.
    pub(super) fn complete(
        &self,
        waiting: &Waiting,
        memory: &GuestMemoryMmap,
        (op, len): (Op, u64),
        failed: bool,
    ) -> std::result::Result<u32, Fault> {
        if failed {
            let sense = match op {
                Op::Read => Sense::UNREADABLE,
                _ => Sense::UNWRITABLE,
            };
            return waiting.reply.check(memory, sense);
        }
        let to_guest = match op {
            Op::Read => u32::try_from(len).unwrap_or(u32::MAX),
            _ => 0,
        };
        let moved = match op {
            Op::Read | Op::Write { .. } => len,
            _ => 0,
        };
        waiting.reply.good(memory, moved, to_guest)
    }

    /// Whether something waits until nothing is in flight.
    pub(super) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Nothing is in flight: what was kept is answered. Place in the list of queues, head, bytes.
    pub(super) fn release(
        &mut self,
        memory: &GuestMemoryMmap,
    ) -> std::result::Result<Vec<(usize, u16, u32)>, Fault> {
        let mut answered = Vec::with_capacity(self.held.len());
        for held in std::mem::take(&mut self.held) {
            if let Management::Tasks { address, reset } = held.asked {
                let target = address.target().filter(|_| reset);
                if let Some(attached) = target.and_then(|target| self.units.get_mut(target)) {
                    attached.unit.reset_by_guest();
                }
            }
            let written = scsi::answer_management(&held.place, memory, &held.asked, Response::Ok)?;
            answered.push((held.queue, held.head, written));
        }
        Ok(answered)
    }

    /// The driver is gone: so is what it asked for.
    pub(super) fn forget(&mut self) {
        self.held.clear();
        self.missed = false;
        for attached in &mut self.units {
            attached.unit.reset();
        }
    }

    /// Whether a driver is to be told that it missed something, as soon as it has room.
    pub(super) fn has_missed(&mut self) -> bool {
        std::mem::take(&mut self.missed)
    }

    /// There was no room for an event.
    pub(super) fn miss(&mut self) {
        self.missed = true;
    }

    /// A disk grows. Nothing is in flight.
    pub(super) fn resize(&mut self, number: usize, size: u64) -> Result<()> {
        let none = || Error::invalid("device", "is no disk whose size can be changed");
        let attached = self.units.get_mut(number).ok_or_else(none)?;
        let image = attached
            .image
            .as_ref()
            .filter(|_| !attached.unit.is_cdrom());
        let (image, _) = image.ok_or_else(none)?;
        super::grow(image, size)?;
        attached.unit.grew(size);
        Ok(())
    }

    /// The medium of a drive is another, or none. Nothing is in flight.
    ///
    /// # Errors
    /// `InUse` when the guest has locked it, unless `force`; it is asked for the medium then.
    pub(super) fn change_medium(
        &mut self,
        number: usize,
        medium: Option<Arc<Image>>,
        force: bool,
        engine: &mut Engine,
    ) -> Result<()> {
        let drive = self.units.get_mut(number);
        let drive = drive.filter(|attached| attached.unit.is_cdrom());
        let Some(drive) = drive else {
            return Err(Error::invalid("device", "is no CD-ROM drive"));
        };
        if drive.unit.is_locked() && !force {
            drive.unit.ask_for_medium();
            let message = "the guest has locked the drive, and has been asked for the medium; \
                           try again when it has let go of it, or use force";
            return Err(Error::new(Kind::InUse, "medium", message));
        }
        let size = medium.as_ref().map(|medium| medium.size());
        let new = medium.map(|medium| attach(engine, medium)).transpose()?;
        *lock(&drive.medium) = new.as_ref().map(|(image, _)| image.clone());
        let old = std::mem::replace(&mut drive.image, new);
        drive.unit.set_medium(size);
        match old {
            Some(old) => detach(engine, old),
            None => Ok(()),
        }
    }

    /// All images are let go.
    pub(super) fn close(&mut self, engine: &mut Engine) -> Result<()> {
        let images = self.units.iter_mut().filter_map(|unit| unit.image.take());
        let closed: Vec<_> = images.map(|image| detach(engine, image)).collect();
        closed.into_iter().collect()
    }

    /// What the guest could tell of the units.
    pub(super) fn saved(&self) -> Result<crate::state::State> {
        let units = self.units.iter().map(|attached| attached.unit.remembered());
        crate::state::write(&Saved {
            units: units.collect(),
        })
    }

    /// Goes on with what another one remembered; as after power-on if it cannot be read.
    pub(super) fn take(&mut self, state: &crate::state::State) {
        let saved = crate::state::read::<Saved>(state);
        let saved = saved.map_or(Vec::new(), |saved| saved.units);
        for (attached, saved) in self.units.iter_mut().zip(saved) {
            attached.unit.take(saved);
        }
    }
}

/// The part of the guest's memory that the operation moves.
fn first(mut data: Segments, work: &Work, moves: bool) -> Segments {
    data.split_front(work.len)
        .filter(|_| moves)
        .unwrap_or_default()
}

fn lock(medium: &Medium) -> MutexGuard<'_, Option<Arc<Image>>> {
    medium.lock().unwrap_or_else(|e| e.into_inner())
}

fn attach(engine: &mut Engine, image: Arc<Image>) -> Result<(Arc<Image>, Slot)> {
    let slot = engine.attach(image.clone()).map_err(image_error)?;
    Ok((image, slot))
}

fn detach(engine: &mut Engine, (image, slot): (Arc<Image>, Slot)) -> Result<()> {
    engine.detach(slot).map_err(image_error)?;
    image.close().map_err(image_error)
}

/// Whether a queue's chains wait there until there is something to tell.
pub(super) fn is_for_events(queue: u16) -> bool {
    queue == EVENTS
}
