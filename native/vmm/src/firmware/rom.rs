// SPDX-License-Identifier: Apache-2.0
//! Read-only memory: the firmware's code, an option ROM. Read from its file once, when the machine is built, so
//! that a file that changes afterwards changes no machine.

use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

use crate::boot::BootFile;
use crate::error::{Error, Result};
use crate::layout::FIRMWARE_END;

/// The least: what is seen below 1 MiB.
pub const FIRMWARE_MIN: u64 = 128 << 10;
/// The most: the highest 8 MiB below 4 GiB are the firmware's.
pub const FIRMWARE_MAX: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// The firmware's code, as it lies below 4 GiB, ending there.
///
/// # Errors
/// `ImageInvalid` for a file whose size no firmware has; what [`BootFile::read`] says.
pub fn firmware(file: &BootFile) -> Result<Arc<MmapRegion>> {
    let size = file.size()?;
    if size % PAGE != 0 || !(FIRMWARE_MIN..=FIRMWARE_MAX).contains(&size) {
        return Err(file.invalid(format!(
            "{size} bytes are no firmware: it has {FIRMWARE_MIN} to {FIRMWARE_MAX}, a multiple of {PAGE}"
        )));
    }
    let mut bytes = vec![0; size as usize];
    file.read(&mut bytes, 0)?;
    mapping(&bytes, size)
}

/// Where a firmware of `size` bytes begins.
pub fn firmware_base(size: u64) -> u64 {
    FIRMWARE_END.saturating_sub(size)
}

/// Memory of `size` bytes (a multiple of 4 KiB) that begins with `bytes` and goes on with ones, as an erased ROM.
///
/// # Errors
/// `Unavailable` when there is no memory.
pub fn mapping(bytes: &[u8], size: u64) -> Result<Arc<MmapRegion>> {
    let len = usize::try_from(size).map_err(|_| Error::internal("a ROM of that size"))?;
    let region = MmapRegion::new(len).map_err(|e| Error::kernel("mmap of a ROM", e))?;
    let whole = region.as_volatile_slice();
    let failed = |e| Error::internal(format!("filling a ROM: {e}"));
    whole.write_slice(bytes, 0).map_err(failed)?;
    let rest = vec![0xff; len.saturating_sub(bytes.len())];
    if !rest.is_empty() {
        whole.write_slice(&rest, bytes.len()).map_err(failed)?;
    }
    Ok(Arc::new(region))
}
