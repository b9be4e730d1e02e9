// SPDX-License-Identifier: Apache-2.0
//! RAM in the file: the index, and the work of writing and reading it ([`crate::crew`] has the threads).
//!
//! The index has 40 bytes for each MiB ([`BLOCK`]): a bit for each page that is not all zeros, lowest bit of the first
//! byte first; the CRC-32C of those pages, one behind the other; four bytes of zeros. RAM is counted from its first byte,
//! without the hole below 4 GiB.
//!
//! Pages are written right out of guest memory and read right into it, as many at a time as lie side by side. While it is
//! written nobody else touches it: vCPUs and devices stand still. While it is read, the machine has not begun.
//!
//! Scanning for zeros reads memory that the guest never touched, which costs the host a page table and no page: the kernel
//! fills that in for a block at a time (MADV_POPULATE_READ, a quarter of the time of a fault a page). Memory in a file
//! (shareable) is asked for its holes first, for reading one would fill it.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::checksum::Crc32c;
use super::file::{cannot_write, damaged, Header, Saved, Section, PAGE};
use crate::crew::{Chunk, Work};
use crate::error::{Error, Result};
use crate::memory::GuestMemoryMmap;

/// Bytes of RAM that have an entry in the index.
pub const BLOCK: u64 = 1 << 20;
/// Bytes of an entry.
const ENTRY: usize = 40;
const PAGES: usize = (BLOCK / PAGE) as usize;

/// Bytes of the index for so much RAM.
pub fn index_len(memory: u64) -> u64 {
    memory / BLOCK * ENTRY as u64
}

/// Which pages of a block are not zeros, and their checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    pages: [u8; PAGES / 8],
    crc: u32,
}

impl Entry {
    fn has(&self, page: usize) -> bool {
        let byte = self.pages.get(page / 8).copied().unwrap_or(0);
        byte >> (page % 8) & 1 != 0
    }

    fn set(&mut self, page: usize) {
        if let Some(byte) = self.pages.get_mut(page / 8) {
            *byte |= 1 << (page % 8);
        }
    }

    fn bytes(&self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        let crc = self.crc.to_le_bytes();
        for (place, byte) in bytes.iter_mut().zip(self.pages.iter().chain(&crc)) {
            *place = *byte;
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Entry> {
        let (pages, rest) = bytes.split_first_chunk()?;
        let (crc, rest) = rest.split_first_chunk()?;
        let entry = Entry {
            pages: *pages,
            crc: u32::from_le_bytes(*crc),
        };
        (rest == [0; 4]).then_some(entry)
    }

    /// First page and number of each run of pages that are all there (or all not).
    fn runs(&self) -> Vec<(bool, usize, usize)> {
        let mut runs: Vec<(bool, usize, usize)> = Vec::new();
        for page in 0..PAGES {
            let there = self.has(page);
            match runs.last_mut() {
                Some((kind, _, count)) if *kind == there => *count += 1,
                _ => runs.push((there, page, 1)),
            }
        }
        runs
    }
}

/// The index of a file, checked.
pub struct Index(Vec<Entry>);

impl Index {
    /// Reads it.
    ///
    /// # Errors
    /// `ImageInvalid` when it is damaged, or of another machine's memory.
    pub fn read(saved: &Saved, memory: u64) -> Result<Index> {
        let bytes = saved.section(Section::Index)?.unwrap_or_default();
        if bytes.len() as u64 != index_len(memory) {
            return Err(damaged("the index is not that of its memory"));
        }
        let entries = bytes.chunks_exact(ENTRY).map(Entry::parse);
        let entries: Option<Vec<_>> = entries.collect();
        entries.map(Index).ok_or_else(|| damaged("the index"))
    }

    fn entry(&self, offset: u64) -> Result<Entry> {
        let entry = self.0.get((offset / BLOCK) as usize).copied();
        entry.ok_or_else(|| Error::internal("the index has no such block"))
    }
}

/// The blocks of a chunk: offset in RAM and what is there.
fn blocks(chunk: Chunk) -> impl Iterator<Item = (u64, *mut u8)> {
    (0..chunk.len / BLOCK).map(move |block| {
        let within = block.saturating_mul(BLOCK);
        let address = (chunk.address as *mut u8).wrapping_add(within as usize);
        (chunk.offset.saturating_add(within), address)
    })
}

/// Has the kernel map what is going to be read all at once; without it (before Linux 5.14) each page is faulted in.
pub(crate) fn show(address: *const u8, len: usize) {
    // SAFETY: the advice changes nothing that anybody reads, and for a range that is not mapped it is an error.
    unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_POPULATE_READ) };
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(64)
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

/// A region of RAM that is a mapping of a file: where it begins in RAM, its bytes, the file and where in that it begins.
#[derive(Clone, Copy)]
struct Backed {
    begin: u64,
    len: u64,
    fd: RawFd,
    start: u64,
}

/// Where memory that is a mapping of files has holes, which reading through the mapping would fill.
pub(crate) struct Holes {
    backed: Vec<Backed>,
    /// Keeps the files open.
    _memory: Arc<GuestMemoryMmap>,
}

impl Holes {
    pub(crate) fn of(memory: &Arc<GuestMemoryMmap>) -> Holes {
        let mut begin: u64 = 0;
        let mut backed = Vec::new();
        for region in memory.iter() {
            if let Some(source) = region.file_offset() {
                backed.push(Backed {
                    begin,
                    len: region.len(),
                    fd: source.file().as_raw_fd(),
                    start: source.start(),
                });
            }
            begin = begin.saturating_add(region.len());
        }
        Holes {
            backed,
            _memory: Arc::clone(memory),
        }
    }

    /// Whether nothing of `len` bytes from `offset` on was ever written, as the file behind it says. One that cannot tell says no.
    pub(crate) fn has(&self, offset: u64, len: u64) -> bool {
        let find = |region: &&Backed| offset.wrapping_sub(region.begin) < region.len;
        self.backed.iter().find(find).is_some_and(|region| {
            let at = offset.wrapping_sub(region.begin).wrapping_add(region.start);
            let data = next_data(region.fd, at);
            data.is_none_or(|data| data >= at.saturating_add(len))
        })
    }
}

/// Writes RAM to a file, and then what makes it a saved machine.
pub struct Writer {
    file: Arc<File>,
    /// Where RAM begins in it.
    base: u64,
    entries: Mutex<Vec<Entry>>,
    written: AtomicU64,
    holes: Holes,
    /// The sections but index and memory, with their bytes.
    others: Vec<(Section, Vec<u8>)>,
    header: Header,
}

impl Writer {
    /// For a machine that stands still, whose other sections are these.
    ///
    /// # Errors
    /// `Unavailable` when the file does not take even them; it is empty then.
    pub fn new(
        file: Arc<File>,
        memory: Arc<GuestMemoryMmap>,
        others: Vec<(Section, Vec<u8>)>,
    ) -> Result<Writer> {
        let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        let known = others.iter().map(|(kind, bytes)| {
            let crc = super::checksum::of(bytes);
            (*kind, crc, bytes.len() as u64)
        });
        let sections: Vec<_> = known
            .chain([
                (Section::Index, 0, index_len(bytes)),
                (Section::Memory, 0, bytes),
            ])
            .collect();
        let header = Header::layout(&sections);
        let base = header.find(Section::Memory).map_or(0, |place| place.offset);
        file.set_len(header.len).map_err(cannot_write)?;
        Ok(Writer {
            file,
            base,
            entries: Mutex::new(vec![Entry::default(); (bytes / BLOCK) as usize]),
            written: AtomicU64::new(0),
            holes: Holes::of(&memory),
            others,
            header,
        })
    }

    /// Bytes that the file has taken.
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn block(&self, offset: u64, address: *const u8) -> Result<()> {
        if self.holes.has(offset, BLOCK) {
            return Ok(());
        }
        show(address, BLOCK as usize);
        // SAFETY: the block is guest memory, which the crew keeps mapped and nobody writes to meanwhile.
        let block = unsafe { std::slice::from_raw_parts(address, BLOCK as usize) };
        let mut entry = Entry::default();
        let mut crc = Crc32c::default();
        for (number, page) in block.chunks_exact(PAGE as usize).enumerate() {
            if !is_zero(page) {
                entry.set(number);
                crc.add(page);
            }
        }
        let runs = entry.runs().into_iter().filter(|(there, _, _)| *there);
        for (_, first, count) in runs {
            let from = first.saturating_mul(PAGE as usize);
            let len = count.saturating_mul(PAGE as usize);
            let bytes = block.get(from..).and_then(|rest| rest.get(..len));
            let at = self.base.saturating_add(offset).saturating_add(from as u64);
            self.put(bytes.unwrap_or_default(), at)?;
        }
        entry.crc = crc.value();
        if let Some(place) = self.entries().get_mut((offset / BLOCK) as usize) {
            *place = entry;
        }
        Ok(())
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(cannot_write)?;
        self.written
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// All of RAM is written: the rest, and the header last of all.
    fn finish(&self) -> Result<()> {
        let mut index = Vec::with_capacity(self.entries().len().saturating_mul(ENTRY));
        for entry in self.entries().iter() {
            index.extend(entry.bytes());
        }
        let mut header = self.header.clone();
        for place in &mut header.sections {
            let other = self.others.iter().find(|(kind, _)| *kind == place.kind);
            let bytes = match other {
                Some((_, bytes)) => bytes,
                None if place.kind == Section::Index => {
                    place.crc = super::checksum::of(&index);
                    &index
                }
                None => continue,
            };
            self.put(bytes, place.offset)?;
        }
        self.file.sync_data().map_err(cannot_write)?;
        self.put(&header.bytes(), 0)?;
        self.file.sync_data().map_err(cannot_write)
    }
}

impl Work for Writer {
    fn chunk(&self, chunk: Chunk) -> Result<()> {
        for (offset, address) in blocks(chunk) {
            self.block(offset, address)?;
        }
        // The disk may begin; a file system that cannot be told does so later.
        let at = self.base.saturating_add(chunk.offset);
        // SAFETY: no pointer is passed.
        unsafe {
            libc::sync_file_range(
                self.file.as_raw_fd(),
                at as i64,
                chunk.len as i64,
                libc::SYNC_FILE_RANGE_WRITE,
            );
        }
        Ok(())
    }

    fn conclude(&self, result: Result<u64>) -> Result<u64> {
        let result = result.and_then(|_| self.finish());
        if result.is_err() {
            // What there is of it is no use to anybody.
            let _ = self.file.set_len(0);
        }
        result.map(|()| self.written())
    }
}

/// Reads RAM from a file.
pub struct Reader {
    saved: Arc<Saved>,
    base: u64,
    index: Index,
    /// Memory may hold something where zeros belong.
    wipe: bool,
    _memory: Arc<GuestMemoryMmap>,
}

impl Reader {
    /// For a machine with the same amount of memory, which is emptied.
    ///
    /// # Errors
    /// `ImageInvalid` for a damaged index, or that of another machine's memory.
    pub fn new(saved: Arc<Saved>, memory: Arc<GuestMemoryMmap>) -> Result<Reader> {
        let bytes = memory.iter().map(GuestMemoryRegion::len).sum();
        let place = saved.place(Section::Memory)?;
        if place.len != bytes || place.crc != 0 {
            return Err(damaged(format!("it has {} bytes of RAM", place.len)));
        }
        Ok(Reader {
            base: place.offset,
            index: Index::read(&saved, bytes)?,
            // Locked memory does not go; it is written over.
            wipe: crate::memory::discard(&memory, 0, u64::MAX).is_err(),
            saved,
            _memory: memory,
        })
    }

    fn block(&self, offset: u64, address: *mut u8) -> Result<()> {
        let entry = self.index.entry(offset)?;
        // SAFETY: the block is guest memory, which `_memory` keeps mapped and nobody else touches meanwhile.
        let block = unsafe { std::slice::from_raw_parts_mut(address, BLOCK as usize) };
        let mut crc = Crc32c::default();
        for (there, first, count) in entry.runs() {
            let from = first.saturating_mul(PAGE as usize);
            let len = count.saturating_mul(PAGE as usize);
            let at = self.base.saturating_add(offset).saturating_add(from as u64);
            let place = block.get_mut(from..).and_then(|rest| rest.get_mut(..len));
            let place = place.unwrap_or_default();
            if !there {
                self.check_gap(at, len as u64)?;
                if self.wipe {
                    place.fill(0);
                }
                continue;
            }
            self.saved
                .file
                .read_exact_at(place, at)
                .map_err(|e| damaged(format!("its memory cannot be read: {e}")))?;
            crc.add(place);
        }
        // That of no pages is 0.
        if crc.value() != entry.crc {
            let message = format!("the checksum of the memory at {offset:#x} is wrong");
            return Err(damaged(message));
        }
        Ok(())
    }

    /// Where the index says zeros there is nothing else: a hole, or zeros that somebody's copying wrote.
    fn check_gap(&self, start: u64, len: u64) -> Result<()> {
        let end = start.saturating_add(len);
        let mut at = start;
        let mut page = [0; PAGE as usize];
        while let Some(data) = next_data(self.saved.file.as_raw_fd(), at).filter(|at| *at < end) {
            at = data.max(at) & !(PAGE - 1);
            self.saved
                .file
                .read_exact_at(&mut page, at)
                .map_err(|e| damaged(format!("its memory cannot be read: {e}")))?;
            if !is_zero(&page) {
                return Err(damaged(format!(
                    "there is something at {at:#x} where zeros belong"
                )));
            }
            at = at.saturating_add(PAGE);
        }
        Ok(())
    }
}

impl Work for Reader {
    fn chunk(&self, chunk: Chunk) -> Result<()> {
        blocks(chunk).try_for_each(|(offset, address)| self.block(offset, address))
    }
}

/// Where the next data of a file is, from `at` on; None when there is none. A file that cannot tell has it at `at`.
fn next_data(fd: RawFd, at: u64) -> Option<u64> {
    let from = i64::try_from(at).ok()?;
    // SAFETY: no pointer is passed; nobody uses the file's position.
    let found = unsafe { libc::lseek(fd, from, libc::SEEK_DATA) };
    match u64::try_from(found) {
        Ok(found) => Some(found),
        Err(_) => {
            let nothing = std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO);
            (!nothing).then_some(at)
        }
    }
}
