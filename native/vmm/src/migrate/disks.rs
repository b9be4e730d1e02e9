// SPDX-License-Identifier: Apache-2.0
//! The source's rounds over disks that go along ([`super::copies`] reads them, [`super::changes`] knows what was changed).

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::changes::Blocks;
use super::copies::{grains, list, Piece, Source};
use super::rounds::{Failure, Sender};
use super::stream::{Kind, BLOCKS_MAX};
use crate::error::{Error, Result};

/// What is looked at in one go: long holes are found in it, and a disk that is nearly empty takes few looks.
const STRETCH: u64 = 1 << 30;

impl Sender {
    /// What there is to send, as a record's body.
    pub(super) fn copies(&self) -> Result<Vec<u8>> {
        let list = serde_json::to_vec(&list(&self.sources));
        list.map_err(|e| Error::internal(format!("copies: {e}")))
    }

    /// All of all disks.
    pub(super) fn all_blocks(&self) -> Vec<Blocks> {
        let all = self.sources.iter().map(|source| Blocks::all(source.size()));
        all.collect()
    }

    /// What was changed of each since it was asked last.
    pub(super) fn changed_blocks(&self) -> Vec<Blocks> {
        self.sources.iter().map(Source::take).collect()
    }

    /// Sends these blocks of the disks.
    pub(super) fn blocks(&mut self, blocks: &[Blocks]) -> Result<()> {
        let mut sources = std::mem::take(&mut self.sources);
        let mut left = bytes(blocks);
        let sent = (0..).zip(sources.iter_mut().zip(blocks));
        let sent = sent.into_iter().try_for_each(|(number, (source, blocks))| {
            self.blocks_of(number, source, blocks, &mut left)
        });
        self.sources = sources;
        sent?;
        let begin = Instant::now();
        self.flush()?;
        self.disk_speed.add(0, begin.elapsed());
        Ok(())
    }

    fn blocks_of(
        &mut self,
        number: u64,
        source: &mut Source,
        blocks: &Blocks,
        left: &mut u64,
    ) -> Result<()> {
        let mut from = 0;
        let mut chosen = false;
        while let Some((begin, len)) = blocks.run(from, STRETCH) {
            if !chosen {
                self.link.put(Kind::Disk, (number, 0), &[]);
                chosen = true;
            }
            let end = begin.saturating_add(len);
            let mut at = begin;
            while at < end {
                let len = self.piece(source, at, end)?;
                at = at.saturating_add(len);
                *left = left.saturating_sub(len);
                self.tools.progress.disk_remaining.store(*left, Relaxed);
            }
            from = end;
        }
        Ok(())
    }

    /// Sends what is at `at`; how many bytes of the disk it was.
    fn piece(&mut self, source: &mut Source, at: u64, end: u64) -> Result<u64> {
        let begin = Instant::now();
        let (before, moved) = (self.link.waiting(), self.link.moved());
        let mut room = std::mem::take(&mut self.room);
        let piece = source.piece(at, end, &mut room);
        let mut data = 0;
        let len = match piece {
            Ok(Piece::Hole(len)) => {
                self.link.put(Kind::Holes, (at, len), &[]);
                Ok(len)
            }
            Ok(Piece::Data(len)) => {
                let mut place = at;
                for (zero, grain) in grains(room.get(..len as usize).unwrap_or_default()) {
                    let there = (place, grain.len() as u64);
                    place = place.saturating_add(there.1);
                    if zero {
                        self.link.put(Kind::Holes, there, &[]);
                    } else {
                        self.link.put(Kind::Blocks, there, grain);
                        data += there.1;
                    }
                }
                Ok(len)
            }
            Err(error) => Err(error),
        };
        self.room = room;
        let len = len?;
        let filled = self.link.waiting().saturating_sub(before);
        if self.link.is_full() {
            self.flush()?;
        }
        self.spare_bandwidth(filled)?;
        // An order to stop is heard even where nothing but holes is found.
        self.link.pause(Duration::ZERO)?;
        self.pace.keep(&self.tools);
        let progress = &self.tools.progress;
        progress.disk_sent.fetch_add(data, Relaxed);
        if self.link.moved() != moved {
            progress.moved(self.link.moved(), self.begin.elapsed());
        }
        if data > 0 {
            self.disk_speed.add(data, begin.elapsed());
        }
        Ok(len.max(1))
    }

    /// Until what the destination has of disks is durable, so that little of that is left for the end.
    pub(super) fn settle(&mut self) -> std::result::Result<Duration, Failure> {
        if self.sources.is_empty() {
            return Ok(Duration::ZERO);
        }
        let begin = Instant::now();
        let (pace, tools) = (&mut self.pace, &self.tools);
        self.link.expect(pace.tick(), || pace.keep(tools))?;
        self.answer(Kind::Synced)?;
        Ok(begin.elapsed())
    }
}

/// How many bytes blocks have.
pub(super) fn bytes(blocks: &[Blocks]) -> u64 {
    let bytes = blocks.iter().map(Blocks::bytes);
    bytes.fold(0, u64::saturating_add)
}

const _: () = assert!(BLOCKS_MAX <= STRETCH);
