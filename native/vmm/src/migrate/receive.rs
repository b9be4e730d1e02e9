// SPDX-License-Identifier: Apache-2.0
//! The destination: what comes is checked and put where it belongs ([`super`] has the whole).
//!
//! [`Intake`] is the parser, without a socket; [`Receiver`] the conversation.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::copies::{List, Targets};
use super::link::Link;
use super::mover::Tools;
use super::stream::{damaged, Header, Kind, COPIES};
use super::{per_second, Expected, Last, Order, Refusal, Step};
use crate::error::{Error, Result};
use crate::memory::{self, GuestMemoryMmap, PAGE};
use crate::save::facts::{Disks, Facts};

/// A part of the firmware, with its bytes.
pub type Rom = (Kind, Vec<u8>);

/// What is to happen after a record.
#[derive(Debug)]
pub enum Next {
    /// More comes.
    More,
    /// The facts fit.
    Accept,
    /// What came of disks so far is to be durable, and that to be said.
    Sync,
    /// Everything is there.
    Load(Box<Last>, Vec<Rom>),
    /// The machine is ours.
    Go,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Facts,
    Copies,
    Memory,
    Go,
    Done,
}

/// Takes records in, in the order in which they may come.
pub struct Intake<'a> {
    memory: &'a GuestMemoryMmap,
    own: &'a Facts,
    expected: &'a [(Kind, u64)],
    /// Disks whose files may be others than the source's although nothing comes of them.
    separate: &'a [String],
    targets: Targets,
    version: u32,
    stage: Stage,
    roms: Vec<Rom>,
    /// Bytes of RAM that the source has yet to send in this round, as it says.
    left: u64,
}

impl<'a> Intake<'a> {
    /// For a machine that is `own`, with these parts of firmware, of a stream of this version; what is on disks goes to `targets`.
    pub fn new(
        memory: &'a GuestMemoryMmap,
        (own, expected): (&'a Facts, &'a [(Kind, u64)]),
        (targets, separate): (Targets, &'a [String]),
        version: u32,
    ) -> Self {
        Intake {
            memory,
            own,
            expected,
            separate,
            targets,
            version,
            stage: Stage::Facts,
            roms: Vec::new(),
            left: 0,
        }
    }

    /// A whole record.
    ///
    /// # Errors
    /// `ImageInvalid` for one that does not belong here; what [`Facts::check`] says of another machine.
    pub fn take(&mut self, header: &Header, body: &[u8]) -> Result<Next> {
        match (self.stage, header.kind) {
            (Stage::Facts, Kind::Facts) => {
                self.facts(body)?;
                if self.version >= COPIES {
                    self.stage = Stage::Copies;
                    return Ok(Next::More);
                }
                self.targets.expect(&List::default())?;
                self.stage = Stage::Memory;
                return Ok(Next::Accept);
            }
            (Stage::Copies, Kind::Copies) => {
                let list = serde_json::from_slice(body);
                let list = list.map_err(|e| damaged(format!("its copies: {e}")))?;
                self.targets.expect(&list)?;
                self.stage = Stage::Memory;
                return Ok(Next::Accept);
            }
            (Stage::Memory, Kind::Disk) => self.targets.choose(header.place)?,
            (Stage::Memory, Kind::Blocks) => self.targets.write(header.place, body)?,
            (Stage::Memory, Kind::Holes) => self.targets.clear(header.place, header.bytes)?,
            (Stage::Memory, Kind::Code | Kind::Rom | Kind::Variables) => {
                self.rom(header.kind, body)?;
            }
            (Stage::Memory, Kind::Pages) => self.fill(header.place, body)?,
            (Stage::Memory, Kind::Zeros) => self.empty(header.place, header.bytes)?,
            (Stage::Memory, Kind::Round) => {
                self.left = header.bytes;
                if self.version >= COPIES {
                    return Ok(Next::Sync);
                }
            }
            (Stage::Memory, Kind::Still) => {}
            (Stage::Memory, Kind::Last) => {
                let last = serde_json::from_slice(body);
                let last = last.map_err(|e| damaged(format!("its state: {e}")))?;
                if self.roms.len() != self.expected.len() {
                    return Err(damaged("a part of the firmware is missing"));
                }
                self.stage = Stage::Go;
                return Ok(Next::Load(Box::new(last), std::mem::take(&mut self.roms)));
            }
            (Stage::Go, Kind::Go) => {
                self.stage = Stage::Done;
                return Ok(Next::Go);
            }
            (_, kind) => return Err(damaged(format!("{kind:?} where it does not belong"))),
        }
        Ok(Next::More)
    }

    fn facts(&self, body: &[u8]) -> Result<()> {
        let facts = serde_json::from_slice::<Facts>(body);
        let facts = facts.map_err(|e| damaged(format!("its facts: {e}")))?;
        let copied = |id: &str| self.targets.has(id);
        let facts = facts.with_grown(self.own, copied);
        facts.check(self.own, Disks::Any)?;
        let right = |id: &str| self.targets.has(id) || self.separate.iter().any(|one| one == id);
        facts.check_shared(self.own, right)
    }

    /// Makes durable what has come of disks.
    ///
    /// # Errors
    /// What is wrong with one, by its id.
    pub fn sync(&mut self) -> Result<()> {
        self.targets.sync()
    }

    fn rom(&mut self, kind: Kind, body: &[u8]) -> Result<()> {
        let expected = self.expected.iter().find(|(known, _)| *known == kind);
        if expected.map(|(_, len)| *len) != Some(body.len() as u64) {
            let message = format!("the machine comes with {kind:?} of another size");
            return Err(Error::invalid("firmware", message));
        }
        if self.roms.iter().any(|(known, _)| *known == kind) {
            return Err(damaged(format!("{kind:?} comes twice")));
        }
        self.roms.push((kind, body.to_vec()));
        Ok(())
    }

    /// The guest address of RAM that is counted without the hole, and how much is there in one piece.
    fn place(&self, offset: u64) -> Result<(u64, u64)> {
        let (region, within) = memory::locate(self.memory, offset)
            .ok_or_else(|| damaged(format!("RAM has no byte {offset:#x}")))?;
        let address = region.start_addr().0.saturating_add(within);
        Ok((address, region.len().saturating_sub(within)))
    }

    fn fill(&self, offset: u64, body: &[u8]) -> Result<()> {
        let (mut offset, mut rest) = (offset, body);
        while !rest.is_empty() {
            let (address, there) = self.place(offset)?;
            let (now, later) = rest.split_at(rest.len().min(there as usize));
            let written = self.memory.write_slice(now, GuestAddress(address));
            written.map_err(|e| damaged(format!("RAM: {e}")))?;
            offset = offset.saturating_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    fn empty(&self, offset: u64, len: u64) -> Result<()> {
        let (mut offset, mut left) = (offset, len);
        while left > 0 {
            let (address, there) = self.place(offset)?;
            let now = left.min(there);
            empty(self.memory, address, now)?;
            offset = offset.saturating_add(now);
            left = left.saturating_sub(now);
        }
        Ok(())
    }
}

/// Makes RAM zeros, at no cost where it can be given back to the host; memory that is locked, or in huge pages, cannot.
fn empty(memory: &GuestMemoryMmap, address: u64, len: u64) -> Result<()> {
    if memory::discard(memory, address, len).is_ok() {
        return Ok(());
    }
    let zeros = [0; PAGE as usize];
    for page in 0..len / PAGE {
        let place = GuestAddress(address.saturating_add(page.saturating_mul(PAGE)));
        let written = memory.write_slice(&zeros, place);
        written.map_err(|e| damaged(format!("RAM: {e}")))?;
    }
    Ok(())
}

/// Receives one machine.
pub(super) struct Receiver {
    link: Link,
    tools: Tools,
    begin: Instant,
}

impl Receiver {
    pub(super) fn new(link: Link, tools: Tools) -> Receiver {
        Receiver {
            link,
            tools,
            begin: Instant::now(),
        }
    }

    pub(super) fn exits(&self) -> bool {
        self.link.exits()
    }

    /// Until the machine goes on here; with the statistics.
    pub(super) fn receive(&mut self, job: &Expected) -> Result<String> {
        let received = self.try_receive(job);
        if let Err(error) = &received {
            // The source may be gone as well.
            self.link.put(Kind::Refused, (0, 0), &Refusal::bytes(error));
            self.link.send_at_once();
        }
        received
    }

    fn try_receive(&mut self, job: &Expected) -> Result<String> {
        let memory = std::sync::Arc::clone(&self.tools.memory);
        let version = self.link.take_preamble()?;
        let targets = Targets::new(job.copies.clone(), &self.tools.still)?;
        let copies = !targets.is_empty();
        let mut intake = Intake::new(
            &memory,
            (&job.own, &job.roms),
            (targets, &job.separate),
            version,
        );
        loop {
            let (header, body) = self.link.take()?;
            let next = intake.take(&header, &body)?;
            self.link.give_back(body);
            match next {
                Next::More => self.show(&intake),
                Next::Accept => {
                    if copies {
                        self.tools.tell(Step::Claim);
                        self.done()?;
                    }
                    // What was made for a machine that begins is not this one's.
                    for region in memory.iter() {
                        empty(&memory, region.start_addr().0, region.len())?;
                    }
                    self.say(Kind::Accepted)?;
                }
                Next::Sync => {
                    intake.sync()?;
                    self.say(Kind::Synced)?;
                    self.show(&intake);
                }
                Next::Load(last, roms) => {
                    intake.sync()?;
                    self.tools.tell(Step::Arrived(last, roms));
                    self.done()?;
                    self.say(Kind::Ready)?;
                }
                Next::Go => break,
            }
        }
        // Its engines let go of the disks.
        drop(intake);
        self.link.ignore_orders();
        self.tools.tell(Step::Go);
        self.done()?;
        // It runs here, whether the source hears that or not.
        let _ = self.say(Kind::Running);
        Ok(json!({
            "received": self.link.moved(),
            "seconds": self.begin.elapsed().as_secs_f64(),
            "throughput": per_second(self.link.moved(), self.begin.elapsed()),
        })
        .to_string())
    }

    fn show(&self, intake: &Intake<'_>) {
        let progress = &self.tools.progress;
        progress.moved(self.link.moved(), self.begin.elapsed());
        progress.remaining.store(intake.left, Relaxed);
    }

    fn say(&mut self, kind: Kind) -> Result<()> {
        self.link.put(kind, (0, 0), &[]);
        self.link.flush(Duration::from_secs(1), || ())
    }

    /// Waits for what the control thread makes of it.
    fn done(&mut self) -> Result<()> {
        loop {
            let order = self.link.order(Duration::from_secs(60))?;
            if let Some(Order::Loaded(result) | Order::Runs(result)) = order {
                return result;
            }
        }
    }
}
