// SPDX-License-Identifier: Apache-2.0
//! The firmware's variables: flash memory with Intel's command set, kept in a file of the machine's own.
//!
//! While it is an array, the guest reads it as memory (a read-only slot that shows the mapped file); every write exits and
//! is a command:
//!
//! | written | then | then it reads as |
//! |---|---|---|
//! | 0xff, 0x50 (clear status) | | array |
//! | 0x70 | | status |
//! | 0x10, 0x40 | the bytes to program | status, 0x80 set |
//! | 0x20 | 0xd0: the block of 4 KiB is ones | status, 0x80 set |
//! | 0x60 | 0xd0 or 0x01: unlock, lock, which do nothing | status, 0x80 set |
//! | anything else | | status, 0x30 set: a command that is none |
//!
//! A sequence that breaks off sets 0x30, too, and changes nothing. Programming sets bytes, as in QEMU, whose flash
//! OVMF's driver (QemuFlashFvbServicesRuntimeDxe) was written against; CFI queries are left out, which it does not make.
//! Source: "Common Flash Memory Interface and Command Sets", Intel AP-646; QEMU's hw/block/pflash_cfi01.c.
//!
//! The file is mapped shared, so that what the guest was told is programmed is in the page cache at once and outlives this
//! process; it is made durable when the machine stops.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, VolatileMemory};

use super::rom::{FIRMWARE_MAX, PAGE};
use crate::bus::BusDevice;
use crate::device::Device;
use crate::error::{Error, Kind, Result};
use crate::slots::{self, Slots, Source, View};
use crate::state::{self, Stateful};

/// What an erase erases.
const BLOCK: u64 = 4096;
/// The last operation is over.
const STATUS_READY: u8 = 0x80;
/// Program and erase failed both: a sequence of commands that is none.
const STATUS_SEQUENCE: u8 = 0x30;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    Array,
    Status,
    /// The next write is data.
    Program,
    /// The next write confirms.
    Erase,
    /// The next write says which.
    Lock,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    mode: Mode,
    status: u8,
}

/// The flash of one machine.
pub struct Flash {
    base: u64,
    file: File,
    memory: Arc<MmapRegion>,
    slots: Option<Arc<Slots>>,
    state: Mutex<State>,
}

impl Flash {
    /// A flash that ends at `end`, where the code begins, with the contents of `fd`.
    ///
    /// # Errors
    /// `ImageInvalid` for a file of a size that no flash has; `Unavailable` when it cannot be mapped.
    pub fn new(fd: OwnedFd, end: u64, slots: Option<Arc<Slots>>) -> Result<Flash> {
        let file = File::from(fd);
        let wrong = |message: String| Error::new(Kind::ImageInvalid, "variables", message);
        let found = file.metadata().map_err(|e| wrong(format!("fstat: {e}")))?;
        let size = found.len();
        if !found.is_file() || size == 0 || size % PAGE != 0 || size > FIRMWARE_MAX {
            return Err(wrong(format!(
                "{size} bytes are no flash: a regular file has up to {FIRMWARE_MAX}, a multiple of {PAGE}"
            )));
        }
        let mapped = file
            .try_clone()
            .map_err(|e| Error::kernel("dup of the variables", e))?;
        let memory = MmapRegion::build(
            Some(FileOffset::new(mapped, 0)),
            size as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
        )
        .map_err(|e| Error::kernel("mmap of the variables", e))?;
        Ok(Flash {
            base: end.saturating_sub(size),
            file,
            memory: Arc::new(memory),
            slots,
            state: Mutex::new(State {
                mode: Mode::Array,
                status: 0,
            }),
        })
    }

    /// What it holds.
    pub fn content(&self) -> Arc<MmapRegion> {
        self.memory.clone()
    }

    /// Where it begins, and its bytes.
    pub fn place(&self) -> (u64, u64) {
        (self.base, self.memory.size() as u64)
    }

    /// Shows the array, or lets reads exit.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses; reads then exit, which is as good.
    pub fn show(&self) -> Result<()> {
        let array = self.lock().mode == Mode::Array;
        self.show_array(array)
    }

    fn show_array(&self, array: bool) -> Result<()> {
        let Some(slots) = &self.slots else {
            return Ok(());
        };
        let (base, size) = self.place();
        let view = array.then(|| View {
            base,
            size,
            source: Source::Mapping(self.memory.clone(), 0),
            read_only: true,
        });
        slots.set(slots::VARIABLES, view)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Writes where the flash has room; what does not fit is cut, and tells by the status.
    fn program(&self, offset: u64, data: &[u8]) -> bool {
        let whole = self.memory.as_volatile_slice();
        whole.write_slice(data, offset as usize).is_ok()
    }
}

/// The contents are a section of their own in the file ([`Flash::content`]).
impl Stateful for Flash {
    fn save(&self) -> Result<state::State> {
        state::write(&*self.lock())
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: State = state::read(state)?;
        let mut state = self.lock();
        *state = saved;
        self.show_array(state.mode == Mode::Array)
    }
}

impl BusDevice for Flash {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        match state.mode {
            Mode::Array => {
                let whole = self.memory.as_volatile_slice();
                // Within the range, so within the mapping.
                let _ = whole.read_slice(data, offset as usize);
            }
            _ => data.fill(state.status),
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let Some(command) = data.first() else { return };
        let mut state = self.lock();
        let before = state.mode;
        let (mode, status) = match (before, command) {
            (Mode::Program, _) => match self.program(offset, data) {
                true => (Mode::Status, STATUS_READY),
                false => (Mode::Status, STATUS_READY | STATUS_SEQUENCE),
            },
            (Mode::Erase, 0xd0) => {
                let block = offset - offset % BLOCK;
                self.program(block, &[0xff; BLOCK as usize]);
                (Mode::Status, STATUS_READY)
            }
            (Mode::Lock, 0xd0 | 0x01) => (Mode::Status, STATUS_READY),
            (Mode::Erase | Mode::Lock, _) => (Mode::Status, STATUS_READY | STATUS_SEQUENCE),
            (_, 0xff) => (Mode::Array, state.status),
            (_, 0x50) => (Mode::Array, 0),
            (_, 0x70) => (Mode::Status, state.status),
            (_, 0x10 | 0x40) => (Mode::Program, state.status),
            (_, 0x20) => (Mode::Erase, state.status),
            (_, 0x60) => (Mode::Lock, state.status),
            _ => (Mode::Status, STATUS_READY | STATUS_SEQUENCE),
        };
        state.mode = mode;
        state.status = status;
        if (before == Mode::Array) != (mode == Mode::Array) {
            // With the lock held, so that the slot is what the mode is. Where KVM refuses, reads exit.
            let _ = self.show_array(mode == Mode::Array);
        }
    }
}

impl Device for Flash {
    fn id(&self) -> String {
        "flash".to_owned()
    }

    fn stateful(&self) -> Option<&dyn Stateful> {
        Some(self)
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.mode = Mode::Array;
        state.status = 0;
        let _ = self.show_array(true);
    }

    fn stop(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::new(Kind::Unavailable, "variables", format!("fdatasync: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const END: u64 = 0xfff0_0000;

    fn flash() -> (Flash, File) {
        use std::os::fd::FromRawFd;
        // SAFETY: a fresh memfd, owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"variables".as_ptr(), 0)) };
        file.write_all_at(&vec![0xaa; 3 * BLOCK as usize], 0)
            .unwrap();
        let other = file.try_clone().unwrap();
        (Flash::new(file.into(), END, None).unwrap(), other)
    }

    fn byte(flash: &Flash, offset: u64) -> u8 {
        let mut data = [0];
        flash.read(0, offset, &mut data);
        data[0]
    }

    #[test]
    fn it_ends_where_the_code_begins() {
        let (flash, _) = flash();
        assert_eq!(flash.place(), (END - 3 * BLOCK, 3 * BLOCK));
        assert_eq!(byte(&flash, 5), 0xaa);
    }

    /// QemuFlashDetected() of OVMF.
    #[test]
    fn ovmf_tells_it_from_ram_and_rom() {
        let (flash, file) = flash();
        flash.write(0, 0, &[0x50]);
        assert_eq!(byte(&flash, 0), 0xaa);
        flash.write(0, 0, &[0x70]);
        assert_eq!(byte(&flash, 0), 0);
        flash.write(0, 0, &[0xff]);
        assert_eq!(byte(&flash, 0), 0xaa);
        let mut first = [0];
        file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [0xaa]);
    }

    #[test]
    fn what_is_programmed_and_erased_is_in_the_file() {
        let (flash, file) = flash();
        for (offset, value) in [(BLOCK, 0x12), (BLOCK + 1, 0x34)] {
            flash.write(0, offset, &[0x10]);
            flash.write(0, offset, &[value]);
            assert_eq!(byte(&flash, 0), STATUS_READY);
        }
        flash.write(0, 2 * BLOCK + 7, &[0x20]);
        flash.write(0, 2 * BLOCK + 7, &[0xd0]);
        flash.write(0, 0, &[0xff]);
        assert_eq!((byte(&flash, BLOCK), byte(&flash, 2 * BLOCK)), (0x12, 0xff));
        let mut whole = vec![0; 3 * BLOCK as usize];
        file.read_exact_at(&mut whole, 0).unwrap();
        assert_eq!(whole[..BLOCK as usize], [0xaa; BLOCK as usize]);
        assert_eq!(whole[BLOCK as usize..][..3], [0x12, 0x34, 0xaa]);
        assert_eq!(whole[2 * BLOCK as usize..], [0xff; BLOCK as usize]);
    }

    #[test]
    fn a_sequence_that_breaks_off_changes_nothing_and_says_so() {
        let (flash, file) = flash();
        for sequence in [[0x20, 0x70], [0x60, 0x12], [0x99, 0x70]] {
            for command in sequence {
                flash.write(0, 0, &[command]);
            }
            assert_eq!(
                byte(&flash, 0) & STATUS_SEQUENCE,
                STATUS_SEQUENCE,
                "{sequence:x?}"
            );
            flash.write(0, 0, &[0x50]);
        }
        let mut whole = vec![0; 3 * BLOCK as usize];
        file.read_exact_at(&mut whole, 0).unwrap();
        assert!(whole.iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn random_commands_stay_within_the_file() {
        let (flash, file) = flash();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let len = 1 + (random >> 16) % 8;
            let offset = (random >> 20) % (3 * BLOCK - len);
            let mut data = random.to_be_bytes();
            if random >> 63 == 0 {
                data[0] = [0xff, 0x50, 0x70, 0x10, 0x20, 0xd0, 0x60, 0x01][(random % 8) as usize];
                flash.write(0, offset, &data[..len as usize]);
            } else {
                flash.read(0, offset, &mut data[..len as usize]);
            }
        }
        assert_eq!(file.metadata().unwrap().len(), 3 * BLOCK);
    }

    #[test]
    fn a_file_that_is_no_flash_is_refused() {
        for size in [0u64, 100, FIRMWARE_MAX + 4096] {
            use std::os::fd::FromRawFd;
            // SAFETY: a fresh memfd, owned by nobody else.
            let file = unsafe { File::from_raw_fd(libc::memfd_create(c"variables".as_ptr(), 0)) };
            file.set_len(size).unwrap();
            let error = Flash::new(file.into(), END, None).err().unwrap();
            assert_eq!(
                (error.kind, error.argument.as_str()),
                (Kind::ImageInvalid, "variables")
            );
        }
    }
}
