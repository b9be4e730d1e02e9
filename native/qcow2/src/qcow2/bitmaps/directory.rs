// SPDX-License-Identifier: Apache-2.0
//! The bitmap directory: one entry a persistent bitmap, named by a header extension. (QEMU,
//! docs/interop/qcow2, "Bitmaps extension"; the limits are QEMU's.)
//!
//! The extension counts only while its autoclear bit is set: a program that does not know bitmaps clears
//! the bit when it writes to the image, and what the extension names is then of no use to anybody.

use crate::bytes::{be16, be32, be64, put32, put64};
use crate::error::{Error, Kind, Result};
use crate::file::BlockFile;
use crate::qcow2::header::{autoclear, extension, Extension, Header};
use crate::qcow2::Geometry;

/// The bitmap is being changed, or was when its writer ended without closing: its content is not to be trusted.
pub(crate) const IN_USE: u32 = 1 << 0;
/// Writes to the disk are recorded in it.
pub(crate) const AUTO: u32 = 1 << 1;

const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
const MAX_NAME: usize = 1023;
const MAX_BYTES: u64 = 512 << 20;
const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;
const DIRTY_TRACKING: u8 = 1;
const FIXED: u64 = 24;

/// An entry, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) table: u64,
    pub(crate) table_entries: u32,
    pub(crate) flags: u32,
    pub(crate) granularity_bits: u32,
    pub(crate) name: String,
}

impl Entry {
    /// A new one without a table yet.
    pub(crate) fn new(name: &str, granularity: u64, flags: u32) -> Result<Entry> {
        let refuse = |message: String| Err(Error::new(Kind::InvalidArgument, message));
        if name.is_empty() {
            return refuse("Bitmap name must not be empty".into());
        }
        if name.len() > MAX_NAME {
            return refuse(format!("Bitmap name is longer than {MAX_NAME} bytes"));
        }
        let bits = granularity.trailing_zeros();
        if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
            return refuse("Granularity must be a power of two between 512 bytes and 2 GiB".into());
        }
        Ok(Entry {
            table: 0,
            table_entries: 0,
            flags,
            granularity_bits: bits,
            name: name.to_owned(),
        })
    }

    pub(crate) fn in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Bits for a disk of `size` bytes.
    pub(crate) fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }

    /// Clusters, and table entries, for a disk of `size` bytes.
    pub(crate) fn clusters(&self, geometry: &Geometry, size: u64) -> u64 {
        self.bits(size).div_ceil(8).div_ceil(geometry.cluster())
    }

    /// Refuse what no reader would take.
    pub(crate) fn check_size(&self, geometry: &Geometry, size: u64) -> Result<()> {
        if self.clusters(geometry, size) << geometry.cluster_bits > MAX_BYTES {
            let message = "Too much space will be occupied by the bitmap. Use larger granularity";
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        (FIXED + self.name.len() as u64).next_multiple_of(8)
    }

    fn parse(bytes: &[u8]) -> Option<(Entry, u64)> {
        let [kind, granularity] = *bytes.get(16..18)? else {
            return None;
        };
        let extra = be32(bytes, 20)?;
        let name_len = usize::from(be16(bytes, 18)?);
        let name = bytes.get(FIXED as usize..FIXED as usize + name_len)?;
        let entry = Entry {
            table: be64(bytes, 0)?,
            table_entries: be32(bytes, 8)?,
            flags: be32(bytes, 12)?,
            granularity_bits: u32::from(granularity),
            name: std::str::from_utf8(name).ok()?.to_owned(),
        };
        let sound = extra == 0
            && kind == DIRTY_TRACKING
            && name_len > 0
            && name_len <= MAX_NAME
            && GRANULARITY_BITS.contains(&entry.granularity_bits)
            && entry.flags & !(IN_USE | AUTO) == 0
            && entry.table != 0
            && entry.table_entries != 0;
        let len = entry.len();
        sound.then_some((entry, len))
    }

    fn serialize(&self) -> Vec<u8> {
        let mut out = vec![0; FIXED as usize];
        put64(&mut out, 0, self.table);
        put32(&mut out, 8, self.table_entries);
        put32(&mut out, 12, self.flags);
        let kinds =
            u32::from(DIRTY_TRACKING) << 24 | self.granularity_bits << 16 | self.name.len() as u32;
        put32(&mut out, 16, kinds);
        out.extend(self.name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }
}

/// The directory of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) entries: Vec<Entry>,
}

impl Directory {
    /// Read it; empty where the image has none (that counts).
    pub(crate) fn read(
        file: &BlockFile,
        header: &Header,
        geometry: &Geometry,
    ) -> Result<Directory> {
        let Some((number, len, offset)) = extension_of(header) else {
            return Ok(Directory::default());
        };
        let broken = || Error::invalid("the bitmap directory is broken");
        let cluster = geometry.cluster();
        let end = offset.saturating_add(len);
        if number == 0
            || number > MAX_BITMAPS
            || len == 0
            || len > MAX_DIRECTORY
            || offset % cluster != 0
            || offset == 0
            || end > file.len()?
        {
            return Err(broken());
        }
        let mut entries = Vec::new();
        let mut at = offset;
        let mut piece = Vec::new();
        while at < end {
            piece.resize((FIXED + MAX_NAME as u64 + 1).min(end - at) as usize, 0);
            file.read_at(&mut piece, at)?;
            let (entry, len) = Entry::parse(&piece).ok_or_else(broken)?;
            let bytes = u64::from(entry.table_entries) << geometry.cluster_bits;
            let short = !entry.in_use()
                && u64::from(entry.table_entries) < entry.clusters(geometry, header.size);
            if entry.table % cluster != 0 || bytes > MAX_BYTES || short || at + len > end {
                return Err(broken());
            }
            at += len;
            entries.push(entry);
            if entries.len() > number as usize {
                return Err(broken());
            }
        }
        if entries.len() != number as usize {
            return Err(broken());
        }
        Ok(Directory {
            offset,
            len,
            entries,
        })
    }

    /// The place of an entry.
    pub(crate) fn find(&self, name: &str) -> Result<usize> {
        let place = self.entries.iter().position(|entry| entry.name == name);
        place.ok_or_else(|| {
            let message = format!("Dirty bitmap '{}' not found", name.escape_debug());
            Error::new(Kind::InvalidArgument, message)
        })
    }

    /// The same, refused where the bitmap cannot be trusted.
    pub(crate) fn find_consistent(&self, name: &str) -> Result<usize> {
        let place = self.find(name)?;
        if self.entries.get(place).is_some_and(Entry::in_use) {
            let message = format!(
                "Bitmap '{}' is inconsistent and cannot be used: only removing it is possible",
                name.escape_debug()
            );
            return Err(Error::new(Kind::InvalidState, message));
        }
        Ok(place)
    }

    /// The directory's bytes, as big-endian words.
    pub(crate) fn words(&self) -> Result<Vec<u64>> {
        let bytes: Vec<u8> = self.entries.iter().flat_map(Entry::serialize).collect();
        if self.entries.len() > MAX_BITMAPS as usize || bytes.len() as u64 > MAX_DIRECTORY {
            let message = "Maximum number of persistent bitmaps is already reached";
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        let words = bytes.chunks_exact(8);
        Ok(words.map(|word| be64(word, 0).unwrap_or(0)).collect())
    }

    /// Where the flags of each entry stand in the file.
    pub(crate) fn flag_places(&self) -> Vec<u64> {
        let mut at = self.offset;
        let place = |entry: &Entry| {
            let here = at + 12;
            at += entry.len();
            here
        };
        self.entries.iter().map(place).collect()
    }
}

/// Number, bytes and offset of the directory, if the extension counts.
fn extension_of(header: &Header) -> Option<(u32, u64, u64)> {
    if header.autoclear & autoclear::BITMAPS == 0 {
        return None;
    }
    let data = header.extension(extension::BITMAPS)?;
    Some((
        be32(data, 0).unwrap_or(0),
        be64(data, 8).unwrap_or(0),
        be64(data, 16).unwrap_or(0),
    ))
}

/// Let a header name this directory, or none.
pub(crate) fn set_extension(header: &mut Header, directory: &Directory, words: &[u64]) {
    header
        .extensions
        .retain(|known| known.kind != extension::BITMAPS);
    header.autoclear &= !autoclear::BITMAPS;
    if directory.entries.is_empty() {
        return;
    }
    let mut data = vec![0; 24];
    put32(&mut data, 0, directory.entries.len() as u32);
    put64(&mut data, 8, words.len() as u64 * 8);
    put64(&mut data, 16, directory.offset);
    let kind = extension::BITMAPS;
    header.extensions.push(Extension { kind, data });
    header.autoclear |= autoclear::BITMAPS;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let mut entry = Entry::new("nightly", 1 << 31, AUTO).unwrap();
        entry.table = 0x50000;
        entry.table_entries = 7;
        let bytes = entry.serialize();
        assert_eq!(Entry::parse(&bytes), Some((entry, bytes.len() as u64)));
    }

    #[test]
    fn impossible_names_and_granularities_are_refused() {
        for (name, granularity) in [("", 512), ("x", 0), ("x", 256), ("x", 768), ("x", 1 << 32)] {
            assert!(
                Entry::new(name, granularity, 0).is_err(),
                "{name} {granularity}"
            );
        }
        assert!(Entry::new(&"n".repeat(1024), 512, 0).is_err());
        assert!(Entry::new(&"n".repeat(1023), 512, 0).is_ok());
    }
}
