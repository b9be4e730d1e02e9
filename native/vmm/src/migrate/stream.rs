// SPDX-License-Identifier: Apache-2.0
//! The records of the stream, as bytes.
//!
//! The source begins with a preamble: `VMBUSMIG`, the version of the format (4 bytes), zeros (4). Then both sides send
//! records: a header and a body. All numbers are little-endian.
//!
//! | header, from | bytes | what |
//! |---|---|---|
//! | 0 | 4 | kind ([`Kind`]) |
//! | 4 | 4 | CRC-32C of the header, with zeros here, and the body |
//! | 8 | 4 | bytes of the body |
//! | 12 | 4 | number of the record, from 0 in each direction: none is lost, twice there or out of order |
//! | 16 | 8 | pages, zeros: which byte of RAM is the first, without the hole below 4 GiB; blocks, holes: which byte of the disk; disk: its place in the list of copies, from 0; else 0 |
//! | 24 | 8 | pages, zeros: how many bytes of RAM; blocks, holes: how many of the disk; round: bytes that it had; else 0 |
//!
//! | version | what is new |
//! |---|---|
//! | 1 | |
//! | 2 | disks' content: copies, disk, blocks, holes; synced. A source that copies nothing writes version 1, which any destination reads |

use crate::error::{Error, Kind as Trouble, Result};
use crate::memory::PAGE;
use crate::save::checksum::Crc32c;
use crate::save::file::{u32_at, u64_at};

/// The version of a stream without disks' content.
pub const PLAIN: u32 = 1;
/// The version of a stream with it, and the last that is read.
pub const COPIES: u32 = 2;
const MAGIC: [u8; 8] = *b"VMBUSMIG";
/// Bytes of the preamble.
pub const PREAMBLE: usize = 16;
/// Bytes of a header.
pub const HEADER: usize = 32;
/// Most bytes of RAM in one record.
pub const PAGES_MAX: u64 = 1 << 20;
/// Most bytes of a disk in one record that has them.
pub const BLOCKS_MAX: u64 = 1 << 20;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// JSON of [`crate::save::facts::Facts`]: what is to come.
    Facts,
    /// The firmware's code.
    Code,
    /// The option ROM of network interfaces.
    Rom,
    /// RAM with what is in it.
    Pages,
    /// RAM that is zeros.
    Zeros,
    /// A round is over.
    Round,
    /// Nothing is new, but somebody is there.
    Still,
    /// The firmware's variables.
    Variables,
    /// JSON of [`super::Last`]: what the parts of the machine remember. RAM is complete.
    Last,
    /// JSON of [`super::copies::List`]: the disks whose content comes, too.
    Copies,
    /// What follows is of this disk.
    Disk,
    /// A part of a disk with what is in it.
    Blocks,
    /// A part of a disk that is zeros.
    Holes,
    /// The machine is the destination's.
    Go,
    /// The destination takes the machine.
    Accepted,
    /// JSON of [`super::Refusal`]: the destination will never run it.
    Refused,
    /// Everything is there and loaded.
    Ready,
    /// The machine is the destination's, and goes on.
    Running,
    /// What came of disks in this round is durable.
    Synced,
}

/// Each with its number and the most bytes that its body may have.
const KINDS: [(Kind, u32, u32); 19] = [
    (Kind::Facts, 1, 4 << 20),
    (Kind::Code, 2, 8 << 20),
    (Kind::Rom, 3, 8 << 20),
    (Kind::Pages, 4, PAGES_MAX as u32),
    (Kind::Zeros, 5, 0),
    (Kind::Round, 6, 0),
    (Kind::Still, 7, 0),
    (Kind::Variables, 8, 8 << 20),
    (Kind::Last, 9, 16 << 20),
    (Kind::Go, 10, 0),
    (Kind::Copies, 11, 64 << 10),
    (Kind::Disk, 12, 0),
    (Kind::Blocks, 13, BLOCKS_MAX as u32),
    (Kind::Holes, 14, 0),
    (Kind::Accepted, 16, 0),
    (Kind::Refused, 17, 64 << 10),
    (Kind::Ready, 18, 0),
    (Kind::Running, 19, 0),
    (Kind::Synced, 20, 0),
];

/// A header whose numbers make sense; whether the record is whole, its checksum says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Of header and body.
    pub crc: u32,
    /// Bytes of the body.
    pub len: u32,
    /// Where the record stands in its direction.
    pub number: u32,
    /// The first byte of RAM.
    pub place: u64,
    /// How many.
    pub bytes: u64,
}

/// A stream that is none, or was damaged on its way.
pub fn damaged(what: impl std::fmt::Display) -> Error {
    let message = format!("what came is no machine, or was damaged on its way: {what}");
    Error::new(Trouble::ImageInvalid, "socket", message)
}

/// What the source says first.
pub fn preamble(version: u32) -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    let parts = MAGIC.into_iter().chain(version.to_le_bytes());
    for (place, byte) in bytes.iter_mut().zip(parts) {
        *place = byte;
    }
    bytes
}

/// The version of a source whose stream can be read.
///
/// # Errors
/// `ImageInvalid` for something else; `NotSupported` for a newer format.
pub fn check_preamble(bytes: &[u8; PREAMBLE]) -> Result<u32> {
    if !bytes.starts_with(&MAGIC) {
        return Err(damaged("it does not begin with VMBUSMIG"));
    }
    let version = u32_at(bytes, 8);
    if u32_at(bytes, 12) != 0 {
        return Err(damaged("the preamble"));
    }
    if !(PLAIN..=COPIES).contains(&version) {
        let message = format!(
            "format {version} of the stream is not known here; up to {COPIES} is: the destination needs a newer vmbus"
        );
        return Err(Error::new(Trouble::NotSupported, "socket", message));
    }
    Ok(version)
}

impl Header {
    /// The header of a record with this body, complete.
    pub fn of(kind: Kind, number: u32, (place, bytes): (u64, u64), body: &[u8]) -> Header {
        let mut header = Header {
            kind,
            crc: 0,
            len: u32::try_from(body.len()).unwrap_or(u32::MAX),
            number,
            place,
            bytes,
        };
        header.crc = header.checksum(body);
        header
    }

    /// What stands on the wire.
    pub fn bytes(&self) -> [u8; HEADER] {
        let number = KINDS.iter().find(|(kind, _, _)| *kind == self.kind);
        let words = [
            number.map_or(0, |known| known.1),
            self.crc,
            self.len,
            self.number,
        ];
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        let rest = [self.place, self.bytes];
        let rest = rest.iter().flat_map(|word| word.to_le_bytes());
        let mut bytes = [0; HEADER];
        for (place, byte) in bytes.iter_mut().zip(words.chain(rest)) {
            *place = byte;
        }
        bytes
    }

    fn checksum(&self, body: &[u8]) -> u32 {
        let mut crc = Crc32c::default();
        crc.add(&Header { crc: 0, ..*self }.bytes());
        crc.add(body);
        crc.value()
    }

    /// Reads one.
    ///
    /// # Errors
    /// `ImageInvalid` for a kind or a length that there is not.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Header> {
        let number = u32_at(bytes, 0);
        let known = KINDS.iter().find(|(_, known, _)| *known == number);
        let &(kind, _, most) =
            known.ok_or_else(|| damaged(format!("a record of kind {number}")))?;
        let header = Header {
            kind,
            crc: u32_at(bytes, 4),
            len: u32_at(bytes, 8),
            number: u32_at(bytes, 12),
            place: u64_at(bytes, 16),
            bytes: u64_at(bytes, 24),
        };
        if header.len > most {
            return Err(damaged(format!("{} bytes of {kind:?}", header.len)));
        }
        let ram = matches!(kind, Kind::Pages | Kind::Zeros);
        let whole = header.place % PAGE == 0 && header.bytes % PAGE == 0 && header.bytes > 0;
        let fits = match kind {
            Kind::Pages => whole && header.bytes == u64::from(header.len),
            Kind::Zeros => whole,
            Kind::Blocks => header.bytes > 0 && header.bytes == u64::from(header.len),
            Kind::Holes => header.bytes > 0,
            Kind::Disk => header.bytes == 0,
            Kind::Round => header.place == 0,
            _ => header.place == 0 && header.bytes == 0,
        };
        if !fits {
            let what = if ram { "a place in RAM" } else { "a header" };
            return Err(damaged(what));
        }
        Ok(header)
    }

    /// Whether the record is the one with this number, and whole.
    ///
    /// # Errors
    /// `ImageInvalid`.
    pub fn check(&self, number: u32, body: &[u8]) -> Result<()> {
        if self.crc != self.checksum(body) {
            return Err(damaged(format!("the checksum of record {number}")));
        }
        if self.number != number {
            return Err(damaged(format!(
                "record {} in place of {number}",
                self.number
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_no_bit_may_differ() {
        let body = [7; 4096];
        let header = Header::of(Kind::Pages, 3, (0x5000, 4096), &body);
        let bytes = header.bytes();
        assert_eq!(Header::parse(&bytes).unwrap(), header);
        header.check(3, &body).unwrap();
        assert!(header.check(4, &body).is_err());
        for bit in 0..HEADER * 8 {
            let mut other = bytes;
            other[bit / 8] ^= 1 << (bit % 8);
            let read = Header::parse(&other);
            assert!(
                read.and_then(|read| read.check(3, &body)).is_err(),
                "bit {bit}"
            );
        }
        let mut other = body;
        other[4095] ^= 0x80;
        assert!(header.check(3, &other).is_err());
    }

    #[test]
    fn a_newer_format_is_told_from_something_else() {
        for version in [PLAIN, COPIES] {
            assert_eq!(check_preamble(&preamble(version)).unwrap(), version);
        }
        assert_eq!(preamble(PLAIN), *b"VMBUSMIG\x01\0\0\0\0\0\0\0");
        let mut newer = preamble(COPIES);
        newer[8] += 1;
        assert_eq!(
            check_preamble(&newer).unwrap_err().kind,
            Trouble::NotSupported
        );
        assert_eq!(
            check_preamble(b"GET / HTTP/1.1\r\n").unwrap_err().kind,
            Trouble::ImageInvalid
        );
    }
}
