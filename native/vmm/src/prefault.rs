// SPDX-License-Identifier: Apache-2.0
//! Touching the guest's memory before the guest does, so that it never waits for a page ([`crate::crew`] has the threads).
//!
//! Pages are faulted in with MADV_POPULATE_WRITE (madvise(2), Linux 5.14): what is there already stays as it is, and a
//! running guest only ever waits for one chunk. The kernel may refuse (no memory left, which for huge memory cannot
//! be, since it is reserved); what was touched by then stays touched.

use crate::crew::{Chunk, Work};
use crate::error::{Error, Kind, Result};

/// The work of it.
pub struct Touch;

impl Work for Touch {
    fn chunk(&self, chunk: Chunk) -> Result<()> {
        loop {
            let place = chunk.address as *mut libc::c_void;
            // SAFETY: the range lies in a mapping of the guest's memory, which `Shared` keeps; the advice
            // changes nothing in it.
            if unsafe { libc::madvise(place, chunk.len as usize, libc::MADV_POPULATE_WRITE) } == 0 {
                return Ok(());
            }
            let error = std::io::Error::last_os_error();
            match error.raw_os_error() {
                // A signal, or pages that were just being moved.
                Some(libc::EINTR | libc::EAGAIN) => {}
                Some(libc::EINVAL) => {
                    let message = "the kernel has no MADV_POPULATE_WRITE (before 5.14)";
                    return Err(Error::new(Kind::NotSupported, "prefault", message));
                }
                _ => return Err(Error::kernel("touching the guest's memory", error)),
            }
        }
    }
}
