// SPDX-License-Identifier: Apache-2.0
//! The control thread's part of saving a machine.
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

use std::fs::File;
use std::sync::Arc;

use serde_json::json;

use super::keep::{content, Job};
use super::{Control, State};
use crate::config::SaveTo;
use crate::error::{Error, Kind, Result};
use crate::mailbox::{EndReason, Event, Mail};
use crate::save::file::{target, Section};
use crate::save::pages::Writer;
use crate::snapshots;

impl Control {
    pub(super) fn stand_for_save(&mut self, id: u64, file: File, to: SaveTo) -> Result<()> {
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
            self.pause()?;
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

    pub(super) fn after_save(&mut self, id: u64, to: &SaveTo, ran: bool, result: Result<u64>) {
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
            self.come_back("a save", ran, answer);
        }
    }
}
