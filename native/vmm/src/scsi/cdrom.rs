// SPDX-License-Identifier: Apache-2.0
//! What only CD-ROM drives are asked (MMC-6), and the drive itself: a tray that guest and host open, and a lock that
//! is the guest's.
//!
//! | | the tray | the medium |
//! |---|---|---|
//! | the guest ejects it (unlocked) | opens | stays in it, and cannot be read |
//! | the guest loads it | closes | is the same, and new to the guest |
//! | the host takes the medium out | is open | is gone |
//! | the host puts one in | closes | is new to the guest |
//!
//! A locked drive refuses the guest's own eject and tells the host so; the guest hears of the host's wish when
//! it asks for events, as systems do every second or two.

use serde::{Deserialize, Serialize};

use super::cdb::Cdb;
use super::sense::Sense;
use super::{Outcome, Unit};

/// Bytes of a block.
pub const BLOCK: u64 = 2048;

/// GET EVENT STATUS NOTIFICATION.
pub const EVENTS: u8 = 0x4a;
const READ_TOC: u8 = 0x43;
const CONFIGURATION: u8 = 0x46;
const DISC_INFORMATION: u8 = 0x51;
const SET_SPEED: u8 = 0xbb;
const MECHANISM: u8 = 0xbd;

/// Media events (MMC-6, table 5.7.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// Nothing has happened.
    #[default]
    None = 0,
    /// The host wants the medium.
    EjectRequest = 1,
    /// There is a new one.
    NewMedium = 2,
    /// It is gone.
    Removal = 3,
}

/// What a guest could tell of a unit, as it stands in a machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remembered {
    pub(super) drive: Drive,
    pub(super) attention: Option<Sense>,
    /// Bytes of the medium that the guest knows.
    pub(super) size: Option<u64>,
}

/// The mechanism.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    open: bool,
    locked: bool,
    event: Event,
}

impl Drive {
    pub(super) fn reset(&mut self) {
        self.locked = false;
        self.event = Event::None;
    }

    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    pub(super) fn lock(&mut self, locked: bool) {
        self.locked = locked;
    }

    pub(super) fn start_stop(&mut self, cdb: &Cdb) -> Result<Outcome, Sense> {
        // LOEJ says that it is about the tray, START which way.
        match cdb.byte(4) & 3 {
            2 if self.locked && !self.open => return Err(Sense::LOCKED),
            2 if !self.open => {
                self.open = true;
                self.event = Event::Removal;
            }
            3 if self.open => {
                self.open = false;
                self.event = Event::NewMedium;
            }
            _ => {}
        }
        Ok(Outcome::Good(Vec::new()))
    }

    /// Read error recovery, and what the drive can (MMC-6, 7.4 and MMC-3, 5.5.10).
    pub(super) fn mode_pages(&self) -> [Vec<u8>; 2] {
        let mut recovery = vec![0; 12];
        recovery.splice(..2, [0x01, 10]);
        let mut able = vec![0; 22];
        let locked = if self.locked { 2 } else { 0 };
        // A tray; it can be locked, is or is not, and ejects.
        able.splice(..7, [0x2a, 20, 0, 0, 0, 0, 0x29 | locked]);
        [recovery, able]
    }
}

impl Unit {
    /// The guest has locked the drive with a medium in it.
    pub fn is_locked(&self) -> bool {
        self.drive.locked && !self.drive.open && self.size.is_some()
    }

    /// The guest is to hear that the host wants the medium.
    pub fn ask_for_medium(&mut self) {
        self.drive.event = Event::EjectRequest;
    }

    /// The host has put a medium of so many bytes in, or taken the medium out.
    pub fn set_medium(&mut self, size: Option<u64>) {
        self.size = size;
        self.drive.open = size.is_none();
        self.drive.locked = false;
        self.drive.event = match size {
            Some(_) => Event::NewMedium,
            None => Event::Removal,
        };
        self.attention = Some(Sense::MEDIUM_CHANGED);
    }

    pub(super) fn cdrom_command(&mut self, cdb: &Cdb) -> Result<Outcome, Sense> {
        match cdb.opcode() {
            EVENTS => self.events(cdb),
            READ_TOC => self.contents(cdb),
            CONFIGURATION => {
                let profile: u16 = match self.blocks() {
                    // More than a CD holds is a DVD.
                    Some(blocks) if blocks > 405_000 => 0x10,
                    Some(_) => 8,
                    None => 0,
                };
                let mut bytes = vec![0, 0, 0, 0, 0, 0];
                bytes.extend(profile.to_be_bytes());
                // The profiles; core; a removable medium in a tray that locks and ejects.
                bytes.extend([0, 0, 3, 8, 0, 0x10, 0, 0, 0, 8, 0, 0]);
                bytes.extend([0, 1, 11, 8, 0, 0, 0, 1, 1, 0, 0, 0]);
                bytes.extend([0, 3, 3, 4, 0x29, 0, 0, 0]);
                let len = (bytes.len() as u32).saturating_sub(4).to_be_bytes();
                bytes.splice(..4, len);
                Ok(super::cut(bytes, u32::from(cdb.be16(7))))
            }
            DISC_INFORMATION => {
                self.ready()?;
                // Finalized, one session of one track, for any use.
                let mut bytes = vec![0, 32, 0x0e, 1, 1, 1, 1, 0x20];
                bytes.resize(34, 0);
                Ok(super::cut(bytes, u32::from(cdb.be16(7))))
            }
            MECHANISM => {
                let open = if self.drive.open { 0x10 } else { 0 };
                let bytes = vec![0, open, 0, 0, 0, 0, 0, 0];
                Ok(super::cut(bytes, u32::from(cdb.be16(8))))
            }
            SET_SPEED => Ok(Outcome::Good(Vec::new())),
            _ => Err(Sense::UNKNOWN_COMMAND),
        }
    }

    /// The guest polls for what has happened to the medium; each event is told once.
    fn events(&mut self, cdb: &Cdb) -> Result<Outcome, Sense> {
        const MEDIA: u8 = 0x10;
        if cdb.byte(1) & 1 == 0 {
            return Err(Sense::BAD_FIELD);
        }
        if cdb.byte(4) & MEDIA == 0 {
            // None of the classes there are.
            return Ok(super::cut(vec![0, 2, 0x80, MEDIA], u32::from(cdb.be16(7))));
        }
        let event = std::mem::take(&mut self.drive.event);
        let open = u8::from(self.drive.open);
        let present = u8::from(self.size.is_some()) << 1;
        let bytes = vec![0, 6, 4, MEDIA, event as u8, open | present, 0, 0];
        Ok(super::cut(bytes, u32::from(cdb.be16(7))))
    }

    /// One data track (MMC-6, 6.26).
    fn contents(&self, cdb: &Cdb) -> Result<Outcome, Sense> {
        let blocks = self.ready()?;
        let minutes = cdb.byte(1) & 2 != 0;
        let place = |block: u64| match u32::try_from(block).unwrap_or(u32::MAX) {
            block if minutes => {
                // 75 blocks a second, and the first is two seconds in.
                let block = block.saturating_add(150);
                let fields = [block / 75 / 60, block / 75 % 60, block % 75];
                let [minute, second, frame] = fields.map(|field| field.min(255) as u8);
                [0, minute, second, frame]
            }
            block => block.to_be_bytes(),
        };
        let track = |number: u8, block: u64| {
            let [a, b, c, d] = place(block);
            [0, 0x14, number, 0, a, b, c, d]
        };
        let mut bytes = vec![0, 0, 1, 1];
        match (cdb.byte(2) & 0x0f, cdb.byte(6)) {
            (0, 0 | 1) => {
                bytes.extend(track(1, 0));
                bytes.extend(track(0xaa, blocks));
            }
            (0, 0xaa) => bytes.extend(track(0xaa, blocks)),
            // The last session's first track.
            (1, _) => bytes.extend(track(1, 0)),
            _ => return Err(Sense::BAD_FIELD),
        }
        let len = (bytes.len() as u16).saturating_sub(2).to_be_bytes();
        bytes.splice(..2, len);
        Ok(super::cut(bytes, u32::from(cdb.be16(7))))
    }
}
