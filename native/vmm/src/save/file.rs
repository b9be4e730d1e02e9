// SPDX-License-Identifier: Apache-2.0
//! The header and the sections of a saved machine.
//!
//! | header, from | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `VMBUSSAV` |
//! | 8 | 4 | version of the format |
//! | 12 | 4 | CRC-32C of the 4 KiB, with zeros here |
//! | 16 | 8 | use mark: [`FRESH`] or [`USED`] |
//! | 24 | 8 | length of the file |
//! | 32 | 4 | how many sections there are |
//! | 36 | 4 | zeros |
//! | 40 | 32 each | a section: kind, CRC-32C (0 for memory, which has the index), offset, length, zeros (8) |
//!
//! The rest of the 4 KiB is zeros.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::checksum;
use super::FORMAT;
use crate::error::{Error, Kind, Result};

/// Where sections begin and what they are filled up to.
pub const PAGE: u64 = 4096;
const MAGIC: [u8; 8] = *b"VMBUSSAV";
/// No machine has gone on from this file.
pub const FRESH: u64 = 0x4853_4552_465f_4d56;
/// One has.
pub const USED: u64 = 0x2144_4553_555f_4d56;
const ENTRIES: usize = 40;
const ENTRY: usize = 32;
/// Sections of a file; there are seven kinds.
const SECTIONS_MAX: usize = 16;

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Section {
    /// JSON of [`super::facts::Facts`].
    Facts,
    /// JSON of [`super::States`].
    State,
    /// The firmware's code.
    Code,
    /// Its variables.
    Variables,
    /// The option ROM.
    Rom,
    /// Of memory.
    Index,
    /// RAM.
    Memory,
}

/// Each with its number in the file and the most bytes that it may have.
const KINDS: [(Section, u32, u64); 7] = [
    (Section::Facts, 1, 4 << 20),
    (Section::State, 2, 16 << 20),
    (Section::Code, 3, 8 << 20),
    (Section::Variables, 4, 8 << 20),
    (Section::Rom, 5, 8 << 20),
    (Section::Index, 6, 64 << 20),
    (Section::Memory, 7, 1 << 40),
];

impl Section {
    fn number(self) -> u32 {
        let known = KINDS.iter().find(|(kind, _, _)| *kind == self);
        known.map_or(0, |(_, number, _)| *number)
    }
}

/// Where a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// What it holds.
    pub kind: Section,
    /// Its checksum; 0 for memory.
    pub crc: u32,
    /// Where it begins.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// A machine has gone on from this file.
    pub used: bool,
    /// Bytes of the file.
    pub len: u64,
    /// In the order of their offsets.
    pub sections: Vec<Place>,
}

/// A file that is damaged or foreign.
pub fn damaged(what: impl std::fmt::Display) -> Error {
    let message = format!("no saved machine, or a damaged one: {what}");
    Error::new(Kind::ImageInvalid, "file", message)
}

/// What the kernel said when the file was written.
pub fn cannot_write(error: std::io::Error) -> Error {
    Error::new(
        Kind::Unavailable,
        "file",
        format!("the file cannot be written: {error}"),
    )
}

impl Header {
    /// A header for sections that are laid out one behind the other.
    pub fn layout(sections: &[(Section, u32, u64)]) -> Header {
        let mut next = PAGE;
        let mut places = Vec::new();
        for (kind, crc, len) in sections {
            places.push(Place {
                kind: *kind,
                crc: *crc,
                offset: next,
                len: *len,
            });
            next = next.saturating_add(len.next_multiple_of(PAGE));
        }
        Header {
            used: false,
            len: next,
            sections: places,
        }
    }

    /// Where a section is.
    pub fn find(&self, kind: Section) -> Option<Place> {
        self.sections
            .iter()
            .find(|place| place.kind == kind)
            .copied()
    }

    /// The 4 KiB.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PAGE as usize);
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(if self.used { USED } else { FRESH }.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend((self.sections.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        for place in &self.sections {
            bytes.extend(place.kind.number().to_le_bytes());
            bytes.extend(place.crc.to_le_bytes());
            bytes.extend(place.offset.to_le_bytes());
            bytes.extend(place.len.to_le_bytes());
            bytes.extend([0; 8]);
        }
        bytes.resize(PAGE as usize, 0);
        let crc = checksum::of(&bytes);
        if let Some(place) = bytes.get_mut(12..16) {
            place.copy_from_slice(&crc.to_le_bytes());
        }
        bytes
    }

    /// Reads the header of a file of `len` bytes.
    ///
    /// # Errors
    /// `ImageInvalid` for anything that [`Header::bytes`] would not have written; `NotSupported` for a newer format.
    pub fn parse(bytes: &[u8], len: u64) -> Result<Header> {
        let mut page: [u8; PAGE as usize] = bytes
            .try_into()
            .map_err(|_| damaged("it is shorter than its header"))?;
        if !page.starts_with(&MAGIC) {
            return Err(damaged("it does not begin with VMBUSSAV"));
        }
        let version = u32_at(&page, 8);
        let crc = u32_at(&page, 12);
        if let Some(place) = page.get_mut(12..16) {
            place.fill(0);
        }
        if checksum::of(&page) != crc {
            return Err(damaged("the header's checksum is wrong"));
        }
        if version != FORMAT {
            let message =
                format!("format {version} is not known; up to {FORMAT} is: use a newer vmbus");
            return Err(Error::new(Kind::NotSupported, "file", message));
        }
        let used = match u64_at(&page, 16) {
            FRESH => false,
            USED => true,
            _ => return Err(damaged("the use mark is none")),
        };
        let count = u32_at(&page, 32) as usize;
        if count > SECTIONS_MAX {
            return Err(damaged(format!("{count} sections")));
        }
        let entries = page.get(ENTRIES..).unwrap_or_default();
        let sections = entries.chunks_exact(ENTRY).take(count).map(place);
        let header = Header {
            used,
            len: u64_at(&page, 24),
            sections: sections.collect::<Result<_>>()?,
        };
        header.check(len)?;
        if header
            .bytes()
            .get(16..)
            .is_none_or(|own| !page.ends_with(own))
        {
            return Err(damaged("the header has something where nothing belongs"));
        }
        Ok(header)
    }

    fn check(&self, len: u64) -> Result<()> {
        if self.len != len {
            let message = format!("it has {len} bytes, and should have {}", self.len);
            return Err(damaged(message));
        }
        let kinds: Vec<_> = self.sections.iter().map(|place| place.kind).collect();
        let sizes: Vec<_> = self
            .sections
            .iter()
            .map(|place| (place.kind, place.crc, place.len))
            .collect();
        let needed = [
            Section::Facts,
            Section::State,
            Section::Index,
            Section::Memory,
        ];
        let sorted = kinds
            .iter()
            .zip(kinds.iter().skip(1))
            .all(|(one, next)| one < next);
        let whole = needed.iter().all(|kind| kinds.contains(kind));
        let own = Header {
            used: self.used,
            ..Header::layout(&sizes)
        };
        if !sorted || !whole || own != *self {
            return Err(damaged(
                "its sections are not where and what they should be",
            ));
        }
        Ok(())
    }
}

fn place(entry: &[u8]) -> Result<Place> {
    let number = u32_at(entry, 0);
    let known = KINDS.iter().find(|(_, known, _)| *known == number);
    let (kind, _, most) = known.ok_or_else(|| damaged(format!("section {number} is not known")))?;
    let len = u64_at(entry, 16);
    if len > *most {
        return Err(damaged(format!("a {kind:?} section of {len} bytes")));
    }
    Ok(Place {
        kind: *kind,
        crc: u32_at(entry, 4),
        offset: u64_at(entry, 8),
        len,
    })
}

/// The little-endian number at a place; 0 behind the end.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>);
    field.map_or(0, |field| u32::from_le_bytes(*field))
}

/// As [`u32_at`], of eight bytes.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk::<8>);
    field.map_or(0, |field| u64::from_le_bytes(*field))
}

/// A saved machine that was opened and whose header is good.
pub struct Saved {
    /// The file.
    pub file: File,
    /// What it says of itself.
    pub header: Header,
}

impl Saved {
    /// Reads the header.
    ///
    /// # Errors
    /// `ImageInvalid` for a file that is none; `NotSupported` for one of a newer format.
    pub fn open(file: File) -> Result<Saved> {
        let found = file
            .metadata()
            .map_err(|e| damaged(format!("fstat: {e}")))?;
        if !found.is_file() {
            return Err(damaged("it is no regular file"));
        }
        let mut page = vec![0; PAGE as usize];
        file.read_exact_at(&mut page, 0)
            .map_err(|e| damaged(format!("its header cannot be read: {e}")))?;
        let header = Header::parse(&page, found.len())?;
        Ok(Saved { file, header })
    }

    /// Where a section is that every file has.
    ///
    /// # Errors
    /// `ImageInvalid` when this one has not.
    pub fn place(&self, kind: Section) -> Result<Place> {
        let place = self.header.find(kind);
        place.ok_or_else(|| damaged(format!("there is no {kind:?} section")))
    }

    /// A section's bytes, checked; None when the file has none of this kind. Not for memory.
    ///
    /// # Errors
    /// `ImageInvalid` when they are not what was written.
    pub fn section(&self, kind: Section) -> Result<Option<Vec<u8>>> {
        let Some(place) = self.header.find(kind) else {
            return Ok(None);
        };
        let mut bytes = vec![0; place.len.next_multiple_of(PAGE) as usize];
        self.file
            .read_exact_at(&mut bytes, place.offset)
            .map_err(|e| damaged(format!("the {kind:?} section cannot be read: {e}")))?;
        let rest = bytes.split_off(place.len as usize);
        if checksum::of(&bytes) != place.crc || rest.iter().any(|byte| *byte != 0) {
            return Err(damaged(format!(
                "the checksum of the {kind:?} section is wrong"
            )));
        }
        Ok(Some(bytes))
    }

    /// From now on a machine has gone on from this file; whether one had before. One that cannot be marked tells nobody,
    /// so it counts as used.
    pub fn mark_used(&self) -> bool {
        let used = Header {
            used: true,
            ..self.header.clone()
        };
        self.header.used || self.file.write_all_at(&used.bytes(), 0).is_err()
    }
}

/// Takes a file to save to: a regular one, open for writing, with nothing in it.
///
/// # Errors
/// `InvalidArgument` for another one.
pub fn target(file: &File) -> Result<()> {
    let wrong = |message: String| Error::invalid("file", message);
    let found = file
        .metadata()
        .map_err(|e| wrong(format!("fstat of the file: {e}")))?;
    if !found.is_file() || found.len() > 0 {
        return Err(wrong(
            "a machine is saved to an empty regular file; give a new one".to_owned(),
        ));
    }
    // SAFETY: F_GETFL takes no pointer.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags & libc::O_ACCMODE == libc::O_RDONLY || flags & libc::O_APPEND != 0 {
        return Err(wrong(
            "the file is not open for writing anywhere in it".to_owned(),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header::layout(&[
            (Section::Facts, 1, 100),
            (Section::State, 2, 5000),
            (Section::Index, 3, 40),
            (Section::Memory, 0, 4 << 20),
        ])
    }

    #[test]
    fn a_header_comes_back_as_it_was_written() {
        let header = header();
        assert_eq!(header.find(Section::Index).unwrap().offset, 4 * PAGE);
        assert_eq!(Header::parse(&header.bytes(), header.len).unwrap(), header);
        let used = Header {
            used: true,
            ..header
        };
        assert!(Header::parse(&used.bytes(), used.len).unwrap().used);
    }

    #[test]
    fn every_flipped_bit_and_every_other_length_is_refused() {
        let header = header();
        let bytes = header.bytes();
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = Header::parse(&bytes, header.len).unwrap_err();
            assert_eq!(error.kind, Kind::ImageInvalid, "bit {bit}");
        }
        for len in [0, PAGE, header.len - 1, header.len + 1] {
            assert!(Header::parse(&bytes, len).is_err(), "{len}");
        }
    }

    #[test]
    fn sections_that_lie_elsewhere_are_refused_whatever_the_checksum_says() {
        let good = header();
        let mut moved = good.clone();
        moved.sections[1].offset = PAGE;
        let mut missing = good.clone();
        missing.sections.remove(2);
        let mut twice = good.clone();
        twice.sections[1].kind = Section::Facts;
        for header in [moved, missing, twice] {
            assert!(
                Header::parse(&header.bytes(), header.len).is_err(),
                "{header:?}"
            );
        }
        let mut newer = good.bytes();
        newer[8..16].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
        let crc = checksum::of(&newer);
        newer[12..16].copy_from_slice(&crc.to_le_bytes());
        let error = Header::parse(&newer, good.len).unwrap_err();
        assert_eq!(error.kind, Kind::NotSupported);
    }
}
