// SPDX-License-Identifier: Apache-2.0
//! An opened file or block device of the host: its size, what O_DIRECT demands, and synchronous
//! input and output for what happens outside the engines (opening, checking, metadata tools).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};

use crate::buffer::Buffer;
use crate::crypt::Sealer;
use crate::error::{Error, Kind, Result};

/// The file with what never changes about it.
pub(crate) struct BlockFile {
    file: File,
    /// A regular file: it can grow, and what lies past its old end reads as zeros.
    pub(crate) regular: bool,
    /// Opened for writing.
    pub(crate) writable: bool,
    /// What buffers, lengths and offsets must be multiples of; 1 without O_DIRECT.
    pub(crate) alignment: usize,
    /// (device, inode), or (device number, 0) of a block device: tells the same file opened twice.
    pub(crate) identity: (u64, u64),
    /// The cipher of the guest data in it, where that is encrypted.
    pub(crate) sealer: Option<Sealer>,
}

/// By what a file is known again, and whether it was written since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// (device, inode), or (device number, 0) of a block device.
    pub identity: (u64, u64),
    /// Bytes.
    pub len: u64,
    /// Nanoseconds since 1970 at which it was last written; 0 for a block device, which does not tell.
    pub modified: i128,
}

impl BlockFile {
    /// As it is now.
    pub(crate) fn stamp(&self) -> Result<Stamp> {
        let found = self
            .file
            .metadata()
            .map_err(|e| Error::io("fstat of the image", &e))?;
        let modified = i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec());
        Ok(Stamp {
            identity: self.identity,
            len: self.len()?,
            modified: if self.regular { modified } else { 0 },
        })
    }

    /// Take over an opened file. Only regular files and block devices are images.
    pub(crate) fn new(file: File) -> Result<BlockFile> {
        let metadata = file
            .metadata()
            .map_err(|e| Error::io("fstat of the image", &e))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(
                Kind::InvalidArgument,
                "the image is neither a regular file nor a block device",
            ));
        }
        // SAFETY: F_GETFL takes no pointer.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(Error::io(
                "F_GETFL of the image",
                &io::Error::last_os_error(),
            ));
        }
        let alignment = if flags & libc::O_DIRECT != 0 {
            direct_alignment(&file)
        } else {
            1
        };
        let identity = if kind.is_block_device() {
            (metadata.rdev(), 0)
        } else {
            (metadata.dev(), metadata.ino())
        };
        Ok(BlockFile {
            regular: kind.is_file(),
            writable: flags & libc::O_ACCMODE != libc::O_RDONLY,
            alignment,
            identity,
            sealer: None,
            file,
        })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The length now, in bytes; a block device's capacity.
    pub(crate) fn len(&self) -> Result<u64> {
        let length = if self.regular {
            self.file.metadata().map(|metadata| metadata.len())
        } else {
            (&self.file).seek(SeekFrom::End(0))
        };
        length.map_err(|e| Error::io("size of the image file", &e))
    }

    /// Bytes allocated on the host (st_blocks), 0 for a device.
    pub(crate) fn allocated(&self) -> u64 {
        self.file
            .metadata()
            .map(|metadata| metadata.blocks().saturating_mul(512))
            .unwrap_or(0)
    }

    /// Fill `data` from `offset`; what lies past the end of the file reads as zeros.
    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> Result<()> {
        #[cfg(test)]
        crate::interrupted::strike("read")?;
        if self.alignment > 1 {
            return self.read_aligned(data, offset);
        }
        read_full(&self.file, data, offset)
            .map_err(|e| Error::io(format_args!("read at {offset:#x}"), &e))
    }

    fn read_aligned(&self, data: &mut [u8], offset: u64) -> Result<()> {
        let unit = self.alignment as u64;
        let start = offset / unit * unit;
        let end = offset
            .saturating_add(data.len() as u64)
            .div_ceil(unit)
            .saturating_mul(unit);
        let mut bounce = Buffer::zeroed((end - start) as usize);
        read_full(&self.file, bounce.bytes_mut(), start)
            .map_err(|e| Error::io(format_args!("read at {offset:#x}"), &e))?;
        let skip = (offset - start) as usize;
        if let Some(part) = bounce.bytes().get(skip..skip + data.len()) {
            data.copy_from_slice(part);
        }
        Ok(())
    }

    /// Tell the host that a range will be read soon.
    pub(crate) fn will_need(&self, offset: u64, len: u64) {
        if self.alignment == 1 {
            // SAFETY: no pointers; it is advice, and may fail.
            unsafe {
                libc::posix_fadvise(
                    self.fd(),
                    offset as i64,
                    len as i64,
                    libc::POSIX_FADV_WILLNEED,
                )
            };
        }
    }

    /// Write all of `data` at `offset`; with O_DIRECT unaligned edges are read first.
    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        #[cfg(test)]
        crate::interrupted::strike("write")?;
        let failed = |e: io::Error| Error::io(format_args!("write at {offset:#x}"), &e);
        #[cfg(test)]
        crate::recorder::note_write(self.fd(), offset, data);
        if self.alignment == 1 {
            return self.file.write_all_at(data, offset).map_err(failed);
        }
        let unit = self.alignment as u64;
        let start = offset / unit * unit;
        let end = offset
            .saturating_add(data.len() as u64)
            .div_ceil(unit)
            .saturating_mul(unit);
        let mut bounce = Buffer::zeroed((end - start) as usize);
        if start != offset || end - start != data.len() as u64 {
            self.read_at(bounce.bytes_mut(), start)?;
        }
        let skip = (offset - start) as usize;
        if let Some(part) = bounce.bytes_mut().get_mut(skip..skip + data.len()) {
            part.copy_from_slice(data);
        }
        self.file
            .write_all_at(bounce.bytes(), start)
            .map_err(failed)
    }

    /// Write guest data: as [`BlockFile::write_at`], encrypted first where the file's data is.
    pub(crate) fn write_data_at(&self, data: &[u8], offset: u64) -> Result<()> {
        match &self.sealer {
            None => self.write_at(data, offset),
            Some(sealer) => {
                let mut sealed = data.to_vec();
                sealer.seal(offset, &mut sealed);
                self.write_at(&sealed, offset)
            }
        }
    }

    /// fdatasync.
    pub(crate) fn sync(&self) -> Result<()> {
        #[cfg(test)]
        crate::interrupted::strike("sync")?;
        #[cfg(test)]
        crate::recorder::note_sync(self.fd());
        self.file
            .sync_data()
            .map_err(|e| Error::io("fdatasync", &e))
    }

    /// Set a regular file's length.
    pub(crate) fn set_len(&self, len: u64) -> Result<()> {
        #[cfg(test)]
        crate::interrupted::strike("length")?;
        #[cfg(test)]
        crate::recorder::note_len(self.fd(), len);
        self.file
            .set_len(len)
            .map_err(|e| Error::io(format_args!("set the file's length to {len}"), &e))
    }

    /// fallocate(2) with `mode`.
    pub(crate) fn fallocate(&self, mode: i32, offset: u64, len: u64) -> Result<()> {
        #[cfg(test)]
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            crate::recorder::note_write(self.fd(), offset, &vec![0; len as usize]);
        }
        // SAFETY: no pointers.
        let done = unsafe { libc::fallocate64(self.fd(), mode, offset as i64, len as i64) };
        if done == 0 {
            Ok(())
        } else {
            Err(Error::io("fallocate", &io::Error::last_os_error()))
        }
    }

    /// The next range with data at or after `offset`, as SEEK_DATA and SEEK_HOLE say; None when
    /// only a hole follows. A file system that cannot tell answers "all data".
    pub(crate) fn next_data(&self, offset: u64, end: u64) -> Option<(u64, u64)> {
        if offset >= end {
            return None;
        }
        // SAFETY: lseek takes no pointers. All our I/O is positioned, so the offset is nobody's.
        let data = unsafe { libc::lseek64(self.fd(), offset as i64, libc::SEEK_DATA) };
        if data < 0 {
            let nothing = io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO);
            return if nothing && self.regular {
                None
            } else {
                Some((offset, end))
            };
        }
        // SAFETY: as above.
        let hole = unsafe { libc::lseek64(self.fd(), data, libc::SEEK_HOLE) };
        let hole = if hole < data {
            end
        } else {
            (hole as u64).min(end)
        };
        if data as u64 >= end {
            None
        } else {
            Some((data as u64, hole))
        }
    }
}

impl AsRawFd for BlockFile {
    fn as_raw_fd(&self) -> RawFd {
        self.fd()
    }
}

fn read_full(file: &File, data: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What O_DIRECT wants on this file: STATX_DIOALIGN (Linux 6.1) where the file system tells, else 4096.
fn direct_alignment(file: &File) -> usize {
    const STATX_DIOALIGN: u32 = 0x2000;
    // SAFETY: an all-zero statx is a valid value of the plain C struct.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH means the fd itself; `status` outlives the call.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            STATX_DIOALIGN,
            &mut status,
        )
    };
    if done == 0 && status.stx_mask & STATX_DIOALIGN != 0 && status.stx_dio_offset_align != 0 {
        return status.stx_dio_offset_align.max(status.stx_dio_mem_align) as usize;
    }
    4096
}
