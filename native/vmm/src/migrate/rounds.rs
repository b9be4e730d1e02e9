// SPDX-License-Identifier: Apache-2.0
//! The source: rounds over the guest's memory while it runs, then the rest ([`super`] has the whole).

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use serde_json::json;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

use super::changes::Blocks;
use super::copies::{Copied, Source};
use super::disks;
use super::link::Link;
use super::marks::{self, Pages};
use super::mover::Tools;
use super::stream::{self, Kind, BLOCKS_MAX, PAGES_MAX};
use super::{per_second, Order, Refusal, Sent, Step};
use crate::error::{Error, Result};
use crate::memory::{self, PAGE};
use crate::save::pages::{is_zero, show, Holes};

/// Of which the vCPUs stand a part while they are slowed.
pub const PERIOD: Duration = Duration::from_millis(20);
/// How often the destination hears of us while we wait for something else.
const STILL: Duration = Duration::from_secs(5);
/// How much slower a guest becomes at first, and then each time.
const FIRST: u64 = 20;
const MORE: u64 = 10;
const MOST: u64 = 99;
const SLICE_MIN: Duration = Duration::from_millis(1);
/// At most in one piece, if somebody was very late.
const HELD_MAX: Duration = Duration::from_millis(250);
/// Fewer bytes say nothing about the speed.
const SAMPLE: u64 = 1 << 20;
/// So many bytes are there already, or are faulted in as quickly page by page.
const FEW: u64 = 16 * PAGE;
/// Waiting for less is not worth it.
const SLACK: Duration = Duration::from_millis(2);

/// Sends one machine.
pub(super) struct Sender {
    pub(super) link: Link,
    pub(super) tools: Tools,
    downtime: Duration,
    bandwidth: u64,
    holes: Holes,
    pub(super) begin: Instant,
    pub(super) pace: Pace,
    speed: Speed,
    /// Disks that go along, and the speed of these.
    pub(super) sources: Vec<Source>,
    pub(super) disk_speed: Speed,
    /// When the bandwidth allows for more.
    due: Instant,
    pub(super) room: Vec<u8>,
    /// `go` has gone out whole.
    given_away: bool,
}

/// Bytes that were moved, and the time that it took: in this round, and in those before.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Speed {
    now: (u64, Duration),
    before: (u64, Duration),
}

impl Speed {
    pub(super) fn add(&mut self, bytes: u64, time: Duration) {
        self.now = (
            self.now.0.saturating_add(bytes),
            self.now.1.saturating_add(time),
        );
    }

    fn overall(self) -> (u64, Duration) {
        (
            self.before.0.saturating_add(self.now.0),
            self.before.1.saturating_add(self.now.1),
        )
    }

    fn next_round(&mut self) {
        self.before = self.overall();
        self.now = (0, Duration::ZERO);
    }

    /// How long so many bytes take.
    fn time_for(self, bytes: u64) -> Duration {
        if bytes == 0 {
            return Duration::ZERO;
        }
        match if self.now.0 >= SAMPLE {
            self.now
        } else {
            self.overall()
        } {
            (0, _) => Duration::MAX,
            (moved, time) => time.mul_f64(bytes as f64 / moved as f64),
        }
    }
}

/// A machine that stands for the last part.
struct Stood {
    since: Instant,
    /// What its parts remember: JSON of [`super::Last`].
    last: Vec<u8>,
    /// The firmware's.
    variables: Option<Vec<u8>>,
}

/// How the vCPUs are held back: for so long, after they ran, that the part of the time is right, however late this is.
pub(super) struct Pace {
    percent: u64,
    held_until: Instant,
}

impl Pace {
    /// How long they may run in one piece: what is left of [`PERIOD`], but not so little that it is not worth it.
    fn slice(&self) -> Duration {
        let part = PERIOD.saturating_mul(100u64.saturating_sub(self.percent) as u32) / 100;
        part.max(SLICE_MIN)
    }

    pub(super) fn keep(&mut self, tools: &Tools) {
        let now = Instant::now();
        let ran = now.saturating_duration_since(self.held_until);
        if self.percent == 0 || ran < self.slice() {
            return;
        }
        let free = 100u64.saturating_sub(self.percent).max(1);
        let held = ran.saturating_mul(self.percent as u32) / free as u32;
        let held = held.min(HELD_MAX);
        tools.gate.hold(held);
        self.held_until = now.checked_add(held).unwrap_or(now);
    }

    /// When to look again.
    pub(super) fn tick(&self) -> Duration {
        let next = self.held_until.checked_add(self.slice());
        let left = next.map(|next| next.saturating_duration_since(Instant::now()));
        left.unwrap_or(PERIOD).clamp(SLICE_MIN, PERIOD)
    }

    /// A round has left `left` bytes of RAM, and put `sent` bytes through.
    fn adapt(&mut self, left: u64, sent: u64) {
        if left > sent / 2 {
            self.percent = match self.percent {
                0 => FIRST,
                percent => percent.saturating_add(MORE).min(MOST),
            };
        }
    }
}

impl Sender {
    /// For a guest that may stand for so long, through so many bytes a second.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no eventfd.
    pub(super) fn new(
        link: Link,
        tools: Tools,
        (downtime, bandwidth): (Duration, u64),
        copies: Vec<Copied>,
    ) -> Result<Sender> {
        let now = Instant::now();
        let sources = copies.into_iter();
        let sources = sources.map(|copied| Source::new(copied, &tools.still));
        Ok(Sender {
            holes: Holes::of(&tools.memory),
            link,
            downtime,
            bandwidth,
            begin: now,
            pace: Pace {
                percent: 0,
                held_until: now,
            },
            speed: Speed::default(),
            sources: sources.collect::<Result<_>>()?,
            disk_speed: Speed::default(),
            due: now,
            room: vec![0; PAGES_MAX.max(BLOCKS_MAX) as usize],
            given_away: false,
            tools,
        })
    }

    pub(super) fn exits(&self) -> bool {
        self.link.exits()
    }

    pub(super) fn send(&mut self, facts: &[u8], roms: &[(Kind, Vec<u8>)]) -> Sent {
        match self.try_send(facts, roms) {
            Ok(statistics) => Sent::Away(statistics),
            Err(Failure::Known(error)) => Sent::Stays(error),
            Err(Failure::Broken(error)) if self.given_away => Sent::Unsure(error),
            Err(Failure::Broken(error)) => Sent::Stays(error),
        }
    }

    fn try_send(
        &mut self,
        facts: &[u8],
        roms: &[(Kind, Vec<u8>)],
    ) -> std::result::Result<String, Failure> {
        let copies = !self.sources.is_empty();
        self.link.begin(if copies {
            stream::COPIES
        } else {
            stream::PLAIN
        });
        self.link.put(Kind::Facts, (0, 0), facts);
        if copies {
            let list = self.copies()?;
            self.link.put(Kind::Copies, (0, 0), &list);
        }
        self.flush()?;
        self.answer(Kind::Accepted)?;
        for (kind, bytes) in roms {
            self.link.put(*kind, (0, 0), bytes);
        }
        let (mut left, blocks) = self.rounds()?;
        let Stood {
            since: stood,
            last,
            variables,
        } = self.halt(blocks)?;
        self.tools.slots.harvest()?;
        left.add(&marks::take(&self.tools.memory));
        self.pages(&left)?;
        if let Some(variables) = variables {
            self.link.put(Kind::Variables, (0, 0), &variables);
        }
        self.link.put(Kind::Last, (0, 0), &last);
        self.flush()?;
        self.answer(Kind::Ready)?;
        self.link.put(Kind::Go, (0, 0), &[]);
        self.flush()?;
        self.given_away = true;
        self.link.ignore_orders();
        self.answer(Kind::Running)?;
        let downtime = stood.elapsed();
        let progress = &self.tools.progress;
        progress.remaining.store(0, Relaxed);
        progress.moved(self.link.moved(), self.begin.elapsed());
        let millis = |time: Duration| time.as_micros().div_ceil(1000) as u64;
        Ok(json!({
            "downtime_ms": millis(downtime),
            "sent": self.link.moved(),
            "rounds": progress.round.load(Relaxed),
            "seconds": self.begin.elapsed().as_secs_f64(),
            "throughput": per_second(self.link.moved(), self.begin.elapsed()),
            "slowed": progress.slowed.load(Relaxed),
            "disk_sent": progress.disk_sent.load(Relaxed),
        })
        .to_string())
    }

    /// Until what is left is little; that is given back.
    fn rounds(&mut self) -> std::result::Result<(Pages, Vec<Blocks>), Failure> {
        let mut pages = Pages::all(&self.tools.memory);
        let mut blocks = self.all_blocks();
        loop {
            let round = pages.bytes().saturating_add(disks::bytes(&blocks));
            let before = self.link.moved();
            self.speed.next_round();
            self.disk_speed.next_round();
            self.blocks(&blocks)?;
            self.pages(&pages)?;
            self.link.put(Kind::Round, (0, round), &[]);
            self.flush()?;
            let sent = self.link.moved().saturating_sub(before);
            let settled = self.settle()?;
            self.tools.slots.harvest()?;
            pages = marks::take(&self.tools.memory);
            blocks = self.changed_blocks();
            let (left, disks) = (pages.bytes(), disks::bytes(&blocks));
            let progress = &self.tools.progress;
            progress.round.fetch_add(1, Relaxed);
            progress.remaining.store(left, Relaxed);
            progress.disk_remaining.store(disks, Relaxed);
            let time = self.speed.time_for(left);
            let time = time.saturating_add(self.disk_speed.time_for(disks));
            // What takes that long however little there is must not keep it from ever coming to its end.
            if time.saturating_add(settled.min(self.downtime / 2)) <= self.downtime {
                return Ok((pages, blocks));
            }
            self.pace.adapt(left.saturating_add(disks), sent);
            progress.slowed.store(self.pace.percent, Relaxed);
        }
    }

    /// Has the machine stand. What is left of disks is sent before these are let go.
    fn halt(&mut self, mut blocks: Vec<Blocks>) -> std::result::Result<Stood, Failure> {
        self.pace.percent = 0;
        let stood = Instant::now();
        self.tools.tell(Step::Halt);
        loop {
            match self.link.order(STILL)? {
                Some(Order::Stands) => {
                    for (blocks, last) in blocks.iter_mut().zip(self.changed_blocks()) {
                        blocks.join(&last);
                    }
                    self.blocks(&blocks)?;
                    self.tools.tell(Step::Collect);
                }
                Some(Order::Last(last)) => {
                    let (last, variables) = last?;
                    return Ok(Stood {
                        since: stood,
                        last,
                        variables,
                    });
                }
                Some(_) => {}
                None if stood.elapsed() >= STILL => {
                    self.link.put(Kind::Still, (0, 0), &[]);
                    self.flush()?;
                }
                None => {}
            }
        }
    }

    pub(super) fn answer(&mut self, wanted: Kind) -> std::result::Result<(), Failure> {
        let (header, body) = self.link.take().map_err(Failure::Broken)?;
        match header.kind {
            kind if kind == wanted => Ok(()),
            Kind::Refused => Err(Failure::Known(Refusal::error(&body))),
            kind => Err(Failure::Broken(stream::damaged(format!(
                "the other side answers {kind:?} in place of {wanted:?}"
            )))),
        }
    }

    fn pages(&mut self, pages: &Pages) -> Result<()> {
        let mut left = pages.bytes();
        let mut from = 0;
        while let Some((offset, len)) = pages.run(from, PAGES_MAX) {
            let begin = Instant::now();
            let before = self.link.waiting();
            let sent = self.link.moved();
            self.run(offset, len)?;
            let filled = self.link.waiting().saturating_sub(before);
            if self.link.is_full() {
                self.flush()?;
            }
            self.spare_bandwidth(filled)?;
            self.pace.keep(&self.tools);
            if filled > len / 2 {
                self.speed.add(len, begin.elapsed());
            }
            left = left.saturating_sub(len);
            from = offset.saturating_add(len);
            let progress = &self.tools.progress;
            progress.remaining.store(left, Relaxed);
            if self.link.moved() != sent {
                progress.moved(self.link.moved(), self.begin.elapsed());
            }
        }
        let begin = Instant::now();
        self.flush()?;
        self.speed.add(0, begin.elapsed());
        Ok(())
    }

    /// Puts a run of pages behind what waits.
    fn run(&mut self, offset: u64, len: u64) -> Result<()> {
        if self.holes.has(offset, len) {
            self.link.put(Kind::Zeros, (offset, len), &[]);
            return Ok(());
        }
        let mut room = std::mem::take(&mut self.room);
        let place = room.get_mut(..len as usize).unwrap_or_default();
        let read = read(&self.tools, offset, place);
        // What is sent is what is read here, whatever the guest does to it.
        let mut at = offset;
        let mut rest: &[u8] = place;
        while let Some(page) = rest.first_chunk::<{ PAGE as usize }>() {
            let zero = is_zero(page);
            let same = rest.chunks_exact(PAGE as usize);
            let count = same.take_while(|page| is_zero(page) == zero).count();
            let (now, later) = rest.split_at(count.saturating_mul(PAGE as usize));
            let ram = (at, now.len() as u64);
            match zero {
                true => self.link.put(Kind::Zeros, ram, &[]),
                false => self.link.put(Kind::Pages, ram, now),
            }
            at = at.saturating_add(now.len() as u64);
            rest = later;
        }
        self.room = room;
        read
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        let (link, pace, tools) = (&mut self.link, &mut self.pace, &self.tools);
        link.flush(pace.tick(), || pace.keep(tools))
    }

    /// Waits until no more than the bandwidth was used. What was not used before is not made up for: the speed that is
    /// measured is what can be relied on.
    pub(super) fn spare_bandwidth(&mut self, bytes: u64) -> Result<()> {
        if self.bandwidth == 0 {
            return Ok(());
        }
        let time = Duration::from_secs_f64(bytes as f64 / self.bandwidth as f64);
        let now = Instant::now();
        self.due = self.due.max(now).checked_add(time).unwrap_or(now);
        loop {
            let wait = self.due.saturating_duration_since(Instant::now());
            if wait < SLACK {
                return Ok(());
            }
            self.pace.keep(&self.tools);
            self.flush()?;
            self.link.pause(wait.min(self.pace.tick()))?;
        }
    }
}

/// Copies RAM, counted without the hole.
fn read(tools: &Tools, offset: u64, place: &mut [u8]) -> Result<()> {
    let (region, within) = memory::locate(&tools.memory, offset)
        .ok_or_else(|| Error::internal("no such place in RAM"))?;
    if place.len() as u64 > FEW {
        show(region.as_ptr().wrapping_add(within as usize), place.len());
    }
    let address = GuestAddress(region.start_addr().0.saturating_add(within));
    let read = tools.memory.read_slice(place, address);
    read.map_err(|e| Error::internal(format!("RAM: {e}")))
}

/// Why the machine has not left.
pub(super) enum Failure {
    /// Somebody who knows has said that it never will run there.
    Known(Error),
    /// It depends on how far it was.
    Broken(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Broken(error)
    }
}
