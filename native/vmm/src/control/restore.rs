// SPDX-License-Identifier: Apache-2.0
//! The control thread's part of going on from a file.
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
use std::sync::Arc;

use serde_json::json;

use super::keep::Job;
use super::{Control, State};
use crate::config::{RestoreFrom, Revert};
use crate::error::{Error, Kind, Result};
use crate::io::{Answer, Change};
use crate::mailbox::{EndReason, Event, Mail};
use crate::save::facts::{self, Disks, Facts};
use crate::save::file::{damaged, Saved, Section};
use crate::save::pages::Reader;
use crate::save::States;
use crate::snapshots;

impl Control {
    pub(super) fn begin_restore(
        &mut self,
        id: u64,
        file: Option<File>,
        from: RestoreFrom,
    ) -> Result<()> {
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
    pub(super) fn go_on_from(
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

    fn renew_generation(&self) -> Result<()> {
        match self.platform.renew_generation(crate::machine::random()?) {
            // Nobody has read the old one.
            Err(error) if error.kind == Kind::InvalidState => Ok(()),
            other => other,
        }
    }

    pub(super) fn after_restore(&mut self, id: u64, result: Result<u64>) {
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

fn parse<T: serde::de::DeserializeOwned>(saved: &Saved, kind: Section) -> Result<T> {
    let bytes = saved.section(kind)?.unwrap_or_default();
    serde_json::from_slice(&bytes).map_err(|e| damaged(format!("the {kind:?} section: {e}")))
}
