// SPDX-License-Identifier: Apache-2.0
//! SCSI: what a disk and a CD-ROM drive make of a command (SPC-4, SBC-3, MMC-6).
//!
//! | file | what |
//! |---|---|
//! | [`cdb`] | the fields of a command |
//! | [`sense`] | why it was not carried out |
//! | [`disk`] | commands of disks |
//! | [`cdrom`] | commands of CD-ROM drives, whose medium comes and goes |
//! | this | commands of both, and the state of a unit |
//!
//! Nothing here does I/O or knows guest memory: a command becomes bytes to answer with, a reason why not, or an
//! operation on the image, which `block/scsi.rs` carries out. All lengths are bounded by the command's own.
//!
//! Left out: reservations, asynchronous events, tagged priorities (all commands are simple), sense in descriptor
//! format, audio, and everything that writes to a CD.

pub mod cdb;
pub mod cdrom;
pub mod disk;
pub mod sense;

use vmbus_qcow2::Op;

use cdb::Cdb;
use cdrom::Remembered;
use sense::Sense;

/// What becomes of a command.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; these bytes are for the guest.
    Good(Vec<u8>),
    /// It is not.
    Check(Sense),
    /// The image is asked.
    Image(Work),
}

/// An operation on the image.
#[derive(Debug, PartialEq, Eq)]
pub struct Work {
    /// Which.
    pub op: Op,
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What sort of unit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// A disk.
    Disk,
    /// A CD-ROM drive.
    CdRom,
}

/// A logical unit.
#[derive(Debug)]
pub struct Unit {
    sort: Sort,
    /// Names it to the guest.
    name: String,
    read_only: bool,
    /// Bytes of the medium; None where there is none.
    size: Option<u64>,
    /// What the next command is told instead of being carried out.
    attention: Option<Sense>,
    drive: cdrom::Drive,
}

impl Unit {
    /// A disk of `size` bytes.
    pub fn disk(name: &str, size: u64, read_only: bool) -> Unit {
        Unit {
            sort: Sort::Disk,
            name: name.to_owned(),
            read_only,
            size: Some(size),
            attention: None,
            drive: cdrom::Drive::default(),
        }
    }

    /// A CD-ROM drive with a medium of `size` bytes, or without one.
    pub fn cdrom(name: &str, size: Option<u64>) -> Unit {
        Unit {
            sort: Sort::CdRom,
            read_only: true,
            size,
            ..Unit::disk(name, 0, true)
        }
    }

    /// Whether its medium comes and goes.
    pub fn is_cdrom(&self) -> bool {
        self.sort == Sort::CdRom
    }

    /// Back to the state after power-on. The medium, and whether the tray is open, is not the guest's.
    pub fn reset(&mut self) {
        self.attention = None;
        self.drive.reset();
    }

    /// The unit alone was reset by the guest, who is told.
    pub fn reset_by_guest(&mut self) {
        self.reset();
        self.attention = Some(Sense::RESET);
    }

    /// It has so many bytes from now on.
    pub fn grew(&mut self, size: u64) {
        self.size = Some(size);
        self.attention = Some(Sense::CAPACITY_CHANGED);
    }

    /// What a guest could tell of it.
    pub fn remembered(&self) -> Remembered {
        Remembered {
            drive: self.drive.clone(),
            attention: self.attention,
            size: self.size,
        }
    }

    /// Goes on with what another one remembered. That there is another medium, or another size, is news.
    pub fn take(&mut self, state: Remembered) {
        self.attention = state.attention;
        if self.size == state.size {
            self.drive = state.drive;
        } else if self.is_cdrom() {
            self.set_medium(self.size);
        } else {
            self.attention = Some(Sense::CAPACITY_CHANGED);
        }
    }

    /// Bytes of a block.
    fn block(&self) -> u64 {
        match self.sort {
            Sort::Disk => disk::BLOCK,
            Sort::CdRom => cdrom::BLOCK,
        }
    }

    /// Blocks; None where there is nothing to read.
    fn blocks(&self) -> Option<u64> {
        let size = self.size.filter(|_| !self.drive.is_open());
        size.map(|size| size / self.block())
    }

    /// What becomes of a command with these parameters (the first of what the guest sends with it).
    pub fn command(&mut self, cdb: &Cdb, parameters: &[u8]) -> Outcome {
        let opcode = cdb.opcode();
        // These are answered whatever has happened (SPC-4, 5.14).
        let always = matches!(
            opcode,
            INQUIRY | REPORT_LUNS | REQUEST_SENSE | cdrom::EVENTS
        );
        if let Some(attention) = self.attention.take_if(|_| !always) {
            return Outcome::Check(attention);
        }
        match self.carry_out(cdb, parameters) {
            Ok(outcome) => outcome,
            Err(sense) => Outcome::Check(sense),
        }
    }

    fn carry_out(&mut self, cdb: &Cdb, parameters: &[u8]) -> Result<Outcome, Sense> {
        match cdb.opcode() {
            INQUIRY => self.inquiry(cdb),
            REPORT_LUNS => {
                let list = [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                Ok(cut(list.to_vec(), cdb.be32(6)))
            }
            REQUEST_SENSE => {
                let sense = self.attention.take().unwrap_or(Sense::NONE);
                Ok(cut(sense.bytes().to_vec(), u32::from(cdb.byte(4))))
            }
            TEST_UNIT_READY => self.ready().map(|_| Outcome::Good(Vec::new())),
            READ_6 | READ_10 | READ_12 | READ_16 => self.blocks_work(cdb, Op::Read),
            READ_CAPACITY_10 => {
                let last = self.ready()?.saturating_sub(1);
                let mut bytes = u32::try_from(last)
                    .unwrap_or(u32::MAX)
                    .to_be_bytes()
                    .to_vec();
                bytes.extend((self.block() as u32).to_be_bytes());
                Ok(Outcome::Good(bytes))
            }
            MODE_SENSE_6 | MODE_SENSE_10 => self.mode_sense(cdb),
            START_STOP => match self.sort {
                Sort::Disk => Ok(Outcome::Good(Vec::new())),
                Sort::CdRom => self.drive.start_stop(cdb),
            },
            PREVENT_REMOVAL => {
                self.drive.lock(cdb.byte(4) & 1 != 0);
                Ok(Outcome::Good(Vec::new()))
            }
            _ => match self.sort {
                Sort::Disk => self.disk_command(cdb, parameters),
                Sort::CdRom => self.cdrom_command(cdb),
            },
        }
    }

    /// Blocks of the medium.
    fn ready(&self) -> Result<u64, Sense> {
        let none = if self.drive.is_open() {
            Sense::TRAY_OPEN
        } else {
            Sense::NO_MEDIUM
        };
        self.blocks().ok_or(none)
    }

    /// An operation on the blocks that the command names.
    fn blocks_work(&self, cdb: &Cdb, op: Op) -> Result<Outcome, Sense> {
        let (first, count) = cdb.range();
        let blocks = self.ready()?;
        let end = first.checked_add(count).filter(|end| *end <= blocks);
        end.ok_or(Sense::OUT_OF_RANGE)?;
        if op != Op::Read && self.read_only {
            return Err(Sense::PROTECTED);
        }
        let limit = match op {
            Op::Read | Op::Write { .. } => TRANSFER_MAX,
            _ => disk::RANGE_MAX,
        };
        if count > limit {
            return Err(Sense::BAD_FIELD);
        }
        if count == 0 {
            return Ok(Outcome::Good(Vec::new()));
        }
        Ok(Outcome::Image(Work {
            op,
            offset: first.saturating_mul(self.block()),
            len: count.saturating_mul(self.block()),
        }))
    }

    fn inquiry(&self, cdb: &Cdb) -> Result<Outcome, Sense> {
        let sort = match self.sort {
            Sort::Disk => 0,
            Sort::CdRom => 5,
        };
        let room = u32::from(cdb.be16(3));
        if cdb.byte(1) & 1 == 0 {
            if cdb.byte(2) != 0 {
                return Err(Sense::BAD_FIELD);
            }
            let removable = if self.is_cdrom() { 0x80 } else { 0 };
            // SPC-3, response format 2, 31 bytes behind these five, commands are queued.
            let mut bytes = vec![sort, removable, 5, 0x12, 31, 0, 0, 2];
            bytes.extend(VENDOR);
            bytes.extend(match self.sort {
                Sort::Disk => b"Virtual disk    ",
                Sort::CdRom => b"Virtual CD-ROM  ",
            });
            bytes.extend(b"1   ");
            return Ok(cut(bytes, room));
        }
        let page = cdb.byte(2);
        let body = match page {
            0 => self.pages().to_vec(),
            0x80 => self.name.as_bytes().to_vec(),
            0x83 => {
                // One designator: ASCII, by the vendor's name (SPC-4, 7.8.6.4).
                let mut designator = VENDOR.to_vec();
                designator.extend(self.name.as_bytes());
                let mut body = vec![2, 1, 0, designator.len() as u8];
                body.extend(designator);
                body
            }
            0xb0 if self.sort == Sort::Disk => disk::limits(),
            0xb1 if self.sort == Sort::Disk => disk::characteristics(),
            0xb2 if self.sort == Sort::Disk => disk::provisioning(self.read_only),
            _ => return Err(Sense::BAD_FIELD),
        };
        let mut bytes = vec![sort, page];
        bytes.extend((body.len() as u16).to_be_bytes());
        bytes.extend(body);
        Ok(cut(bytes, room))
    }

    /// Pages of vital product data that there are.
    fn pages(&self) -> &'static [u8] {
        match self.sort {
            Sort::Disk => &[0, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
            Sort::CdRom => &[0, 0x80, 0x83],
        }
    }

    fn mode_sense(&self, cdb: &Cdb) -> Result<Outcome, Sense> {
        // Saved values are not kept (SPC-4, 6.11.1).
        if cdb.byte(2) >> 6 == 3 {
            return Err(Sense::BAD_FIELD);
        }
        let changeable = cdb.byte(2) >> 6 == 1;
        let wanted = cdb.byte(2) & 0x3f;
        let known: [Vec<u8>; 2] = match self.sort {
            Sort::Disk => disk::mode_pages(),
            Sort::CdRom => self.drive.mode_pages(),
        };
        let mut pages = Vec::new();
        for mut page in known {
            if wanted == 0x3f || page.first() == Some(&wanted) {
                if changeable {
                    page.iter_mut().skip(2).for_each(|byte| *byte = 0);
                }
                pages.extend(page);
            }
        }
        if pages.is_empty() {
            return Err(Sense::BAD_FIELD);
        }
        // Write protection; a disk knows forced unit access.
        let specific = match self.sort {
            Sort::Disk if self.read_only => 0x90,
            Sort::Disk => 0x10,
            Sort::CdRom => 0,
        };
        let (mut bytes, room) = if cdb.opcode() == MODE_SENSE_6 {
            let len = pages.len() as u8 + 3;
            (vec![len, 0, specific, 0], u32::from(cdb.byte(4)))
        } else {
            let len = (pages.len() as u16 + 6).to_be_bytes();
            let header = vec![len[0], len[1], 0, specific, 0, 0, 0, 0];
            (header, u32::from(cdb.be16(7)))
        };
        bytes.extend(pages);
        Ok(cut(bytes, room))
    }
}

/// The bytes of an answer that the guest has room for.
fn cut(mut bytes: Vec<u8>, room: u32) -> Outcome {
    bytes.truncate(room as usize);
    Outcome::Good(bytes)
}

/// Blocks in one transfer.
pub const TRANSFER_MAX: u64 = 0xffff;
const VENDOR: &[u8; 8] = b"VMBUS   ";

const TEST_UNIT_READY: u8 = 0x00;
const REQUEST_SENSE: u8 = 0x03;
const READ_6: u8 = 0x08;
/// The guest asks what a unit is.
pub const INQUIRY: u8 = 0x12;
const MODE_SENSE_6: u8 = 0x1a;
const START_STOP: u8 = 0x1b;
const PREVENT_REMOVAL: u8 = 0x1e;
const READ_CAPACITY_10: u8 = 0x25;
const READ_10: u8 = 0x28;
const MODE_SENSE_10: u8 = 0x5a;
const READ_16: u8 = 0x88;
const REPORT_LUNS: u8 = 0xa0;
const READ_12: u8 = 0xa8;

#[cfg(test)]
mod tests;
