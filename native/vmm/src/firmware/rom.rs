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
/// What KVM shows at a time.
pub const PAGE: u64 = 4096;
/// Bytes of an option ROM's BAR.
pub const OPTION_ROM: u64 = 256 << 10;

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

/// An option ROM for devices of this vendor and number: the images in a file are for another number of the same
/// device, as in QEMU, which patches them alike.
///
/// # Errors
/// `ImageInvalid` for a file that is none, or too long; what [`BootFile::read`] says.
pub fn option_rom(file: &BootFile, vendor: u16, device: u16) -> Result<Arc<MmapRegion>> {
    let size = file.size()?;
    if !(512..=OPTION_ROM).contains(&size) {
        return Err(file.invalid(format!(
            "{size} bytes are no option ROM: it has 512 to {OPTION_ROM}"
        )));
    }
    let mut bytes = vec![0; size as usize];
    file.read(&mut bytes, 0)?;
    if !patch(&mut bytes, vendor, device) {
        return Err(file.invalid("it has no PCI data structure: no option ROM"));
    }
    mapping(&bytes, OPTION_ROM)
}

/// Writes the identity into the first image (PCI Firmware Specification 3.3, 5.1.2) and keeps its sum, which byte 6 makes zero.
fn patch(bytes: &mut [u8], vendor: u16, device: u16) -> bool {
    if !bytes.starts_with(&[0x55, 0xaa]) {
        return false;
    }
    let Some(&[low, high]) = bytes.get(0x18..0x1a) else {
        return false;
    };
    let data = usize::from(u16::from_le_bytes([low, high]));
    let [v0, v1] = vendor.to_le_bytes();
    let [d0, d1] = device.to_le_bytes();
    let Some(structure) = bytes.get_mut(data..data.saturating_add(8)) else {
        return false;
    };
    let [b'P', b'C', b'I', b'R', identity @ ..] = structure else {
        return false;
    };
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    let before = sum(identity);
    for (to, from) in identity.iter_mut().zip([v0, v1, d0, d1]) {
        *to = from;
    }
    let change = sum(identity).wrapping_sub(before);
    if let Some(balance) = bytes.get_mut(6) {
        *balance = balance.wrapping_sub(change);
    }
    true
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

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut rom = vec![0u8; 1024];
        rom[..3].copy_from_slice(&[0x55, 0xaa, 2]);
        rom[0x18] = 0x40;
        rom[0x40..0x48].copy_from_slice(b"PCIR\xf4\x1a\x00\x10");
        let sum = rom.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        rom[6] = 0u8.wrapping_sub(sum);
        rom
    }

    #[test]
    fn an_option_rom_gets_the_device_s_identity_and_still_adds_up() {
        let mut rom = image();
        assert!(patch(&mut rom, 0x1af4, 0x1041));
        assert_eq!(rom[0x44..0x48], [0xf4, 0x1a, 0x41, 0x10]);
        assert_eq!(rom.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }

    #[test]
    fn what_is_no_option_rom_is_told() {
        for change in [0usize, 0x19, 0x40] {
            let mut rom = image();
            rom[change] = 0xee;
            assert!(!patch(&mut rom, 1, 2), "{change:#x}");
        }
        assert!(!patch(&mut [0x55, 0xaa], 1, 2));
    }
}
