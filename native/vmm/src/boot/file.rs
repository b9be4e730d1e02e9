// SPDX-License-Identifier: Apache-2.0
//! A file that is booted: opened by somebody else, read by `pread` only, each time anew.
//!
//! Nothing is mapped and the shared file offset is never used or moved. A file that shrinks while it
//! is read is an error, never a fault.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileMemoryError, VolatileSlice,
};

use crate::error::{Error, Kind, Result};
use crate::memory::GuestMemoryMmap;

/// A kernel or an initrd.
pub struct BootFile {
    file: File,
    /// What errors call it.
    argument: &'static str,
}

impl BootFile {
    /// Takes the file over.
    ///
    /// # Errors
    /// `InvalidArgument` if it is not a regular file.
    pub fn new(fd: OwnedFd, argument: &'static str) -> Result<BootFile> {
        let file = File::from(fd);
        let kind = file
            .metadata()
            .map_err(|e| Error::invalid(argument, format!("fstat: {e}")))?
            .file_type();
        if !kind.is_file() {
            let what = if kind.is_dir() {
                "a directory"
            } else {
                "a device, a pipe or a socket"
            };
            return Err(Error::invalid(
                argument,
                format!("{what} cannot be booted; give a regular file"),
            ));
        }
        Ok(BootFile { file, argument })
    }

    /// Its present length in bytes.
    ///
    /// # Errors
    /// `Unavailable` when the kernel does not tell.
    pub fn size(&self) -> Result<u64> {
        Ok(self
            .file
            .metadata()
            .map_err(|e| Error::new(Kind::Unavailable, self.argument, format!("fstat: {e}")))?
            .len())
    }

    /// An error about what is in it.
    pub fn invalid(&self, message: impl Into<String>) -> Error {
        Error::new(Kind::ImageInvalid, self.argument, message)
    }

    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// `ImageInvalid` when the file is shorter; `Unavailable` when it cannot be read.
    pub fn read(&self, data: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(data, offset)
            .map_err(|e| self.failed(e, offset, data.len() as u64))
    }

    /// Copies `len` bytes from `offset` to guest memory.
    ///
    /// # Errors
    /// As [`BootFile::read`]; `InvalidArgument` when they do not fit into RAM there.
    pub fn load(
        &self,
        memory: &GuestMemoryMmap,
        to: GuestAddress,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let size = usize::try_from(len).map_err(|_| self.invalid("too large"))?;
        let room = memory.get_slice(to, size).map_err(|_| {
            Error::invalid(
                "memory",
                format!("{len} bytes of {} do not fit at {:#x}", self.argument, to.0),
            )
        })?;
        let mut source = Positioned {
            file: &self.file,
            offset,
        };
        let mut room = room;
        source
            .read_exact_volatile(&mut room)
            .map_err(|error| match error {
                VolatileMemoryError::IOError(e) => self.failed(e, offset, len),
                other => Error::internal(format!("reading {}: {other}", self.argument)),
            })
    }

    fn failed(&self, error: std::io::Error, offset: u64, len: u64) -> Error {
        // pread takes no offset beyond i64 (EINVAL), where no file has anything.
        let nowhere = i64::try_from(offset).is_err();
        if nowhere || error.kind() == std::io::ErrorKind::UnexpectedEof {
            self.invalid(format!(
                "the file is cut off: {len} bytes at {offset} are not all there"
            ))
        } else {
            Error::new(
                Kind::Unavailable,
                self.argument,
                format!("reading {len} bytes at {offset}: {error}"),
            )
        }
    }
}

/// Reads on from `offset` without the file's own.
struct Positioned<'a> {
    file: &'a File,
    offset: u64,
}

impl ReadVolatile for Positioned<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        let offset = libc::off_t::try_from(self.offset)
            .map_err(|_| VolatileMemoryError::IOError(std::io::ErrorKind::UnexpectedEof.into()))?;
        let room = buffer.ptr_guard_mut();
        // SAFETY: the guard's pointer and length are a live piece of guest memory, which may change under
        // us but not go away; the kernel is the only one to write there.
        let read = unsafe {
            libc::pread(
                self.file.as_raw_fd(),
                room.as_ptr().cast(),
                room.len(),
                offset,
            )
        };
        let read = usize::try_from(read)
            .map_err(|_| VolatileMemoryError::IOError(std::io::Error::last_os_error()))?;
        buffer.bitmap().mark_dirty(0, read);
        self.offset = self.offset.saturating_add(read as u64);
        Ok(read)
    }
}
