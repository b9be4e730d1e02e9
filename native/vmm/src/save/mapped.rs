// SPDX-License-Identifier: Apache-2.0
//! Instant clones: the guest's RAM is a saved machine's file, mapped copy-on-write, and is read when the guest reads it.
//!
//! In the file each page lies at its place, and what is not there is a hole, which reads as zeros: so the memory section is the
//! guest's RAM as it is. It is mapped over the RAM of a machine that was built, privately: what a clone writes is its own, what it
//! only reads is the page cache's, once for all clones of the file.
//!
//! What is checked before the guest runs: the header, the facts, the state and the index, each by its checksum, and that the memory
//! has the right size. What is not: the memory, which nobody has read yet. So the file must be one that nobody can write to or
//! shorten, or a clone finds other memory than was saved, or dies of SIGBUS: the service copies it once into a file of its own,
//! which it protects by fs-verity where there is that.
//!
//! Left out: memory of other kinds than mergeable, which is a file already, and is shared or reserved. A page that the
//! guest gives back (balloon, free page reporting) reads as it was saved when the guest takes it again, not as zeros; virtio
//! promises neither, and both are the guest's own.

use std::os::fd::AsRawFd;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::file::{Saved, Section};
use crate::error::{Error, Result};
use crate::memory;
use crate::memory::GuestMemoryMmap;

/// Maps the memory of a saved machine over RAM that has just been made, of kind mergeable; `merge` as it was made.
///
/// # Errors
/// `ImageInvalid` for a file without as much memory; `Unavailable` when the kernel refuses.
pub fn map(saved: &Saved, memory: &GuestMemoryMmap, merge: bool) -> Result<()> {
    let place = saved.place(Section::Memory)?;
    let wanted: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    if place.len != wanted {
        let message = format!(
            "the machine was saved with {} bytes of memory, and this one has {wanted}",
            place.len
        );
        return Err(Error::invalid("memory", message));
    }
    let mut offset = place.offset;
    for region in memory.iter() {
        let len = region.len() as usize;
        let at = i64::try_from(offset).map_err(|_| Error::invalid("file", "is too long"))?;
        // SAFETY: the range is exactly one mapping of ours, which is replaced by one that is as readable, writable and long. It
        // holds guest memory and nothing else, which is only ever read and written as memory that changes by itself.
        let mapped = unsafe {
            libc::mmap(
                region.as_ptr().cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                saved.file.as_raw_fd(),
                at,
            )
        };
        if mapped == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(Error::kernel("mmap of a saved machine's memory", error));
        }
        memory::advise_private(region.as_ptr(), len, merge)?;
        offset = offset.saturating_add(region.len());
    }
    Ok(())
}
