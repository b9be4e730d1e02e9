// SPDX-License-Identifier: Apache-2.0
//! The firmware configuration device: items that are selected by a key and read byte by byte, or by one
//! transfer into memory.
//!
//! | port (from 0x510) | bytes | what |
//! |---|---|---|
//! | 0 | 2 | selector: key of an item; its reading begins anew |
//! | 1 | 1 | the next byte of the item; zero behind its end |
//! | 4 | 8 | the address of a transfer, big-endian; writing the lower half starts it |
//!
//! A transfer is 16 bytes in guest memory: control, length, address, all big-endian; control reads 0 when it is
//! done, 1 if it failed. Only items that are meant for it can be written, and only by a transfer. Source: QEMU's
//! docs/specs/fw_cfg.
//!
//! Items that depend on what firmware has done so far (the ACPI tables) are made when one of them is first selected
//! after a reset; their sizes are known before.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::bus::BusDevice;
use crate::error::Result;
use crate::firmware::files::{self, Content, Files};
use crate::memory::GuestMemoryMmap;
use crate::state::{self, Stateful};

const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const TRANSFER: u64 = 4;

const CONTROL_ERROR: u32 = 1 << 0;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;

/// What the transfer's address reads as: that there are transfers.
const SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// The longest transfer: no firmware needs as much, and a vCPU is to come back soon.
const TRANSFER_MAX: usize = 16 << 20;
/// Bytes that are copied at a time: a transfer of any length needs no memory of ours.
const PIECE: usize = 4096;

struct State {
    files: Files,
    key: u16,
    offset: usize,
    transfer: [u8; 8],
}

/// The device.
pub struct FwCfg {
    state: Mutex<State>,
    memory: Arc<GuestMemoryMmap>,
}

impl FwCfg {
    /// A device with these items, whose transfers go to `memory`.
    pub fn new(files: Files, memory: Arc<GuestMemoryMmap>) -> FwCfg {
        FwCfg {
            state: Mutex::new(State {
                files,
                key: 0,
                offset: 0,
                transfer: [0; 8],
            }),
            memory,
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.key = 0;
        state.offset = 0;
        state.transfer = [0; 8];
        state.files.reset();
    }

    /// What was last written to the item named `name`.
    pub fn written(&self, name: &str) -> Option<Vec<u8>> {
        self.lock().files.written(name)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Carries the transfer at `address` out; what cannot be read or written there is an error it tells, if it can.
    fn transfer(&self, state: &mut State, address: u64) {
        let mut request = [0; 16];
        let place = GuestAddress(address);
        if self.memory.read_slice(&mut request, place).is_err() {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, to @ ..] = request;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        let done = self.carry_out(state, control, len as usize, u64::from_be_bytes(to));
        let answer = if done.is_some() { 0 } else { CONTROL_ERROR };
        // A place that has gone in the meantime is the guest's loss.
        let _ = self.memory.write_slice(&answer.to_be_bytes(), place);
    }

    fn carry_out(&self, state: &mut State, control: u32, len: usize, to: u64) -> Option<()> {
        if control & CONTROL_SELECT != 0 {
            state.select((control >> 16) as u16);
        }
        if control & CONTROL_READ != 0 {
            self.read_item(state, len, to)
        } else if control & CONTROL_WRITE != 0 {
            self.write_item(state, len, to)
        } else {
            if control & CONTROL_SKIP != 0 {
                state.offset = state.offset.saturating_add(len);
            }
            Some(())
        }
    }

    /// Behind its end an item goes on with zeroes, as byte by byte. The guest asked for them all; it has to wait.
    fn read_item(&self, state: &mut State, len: usize, to: u64) -> Option<()> {
        if len > TRANSFER_MAX {
            return None;
        }
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < len {
            let part = piece.get_mut(..PIECE.min(len.checked_sub(done)?))?;
            state.read(part);
            let at = to.checked_add(done as u64)?;
            self.memory.write_slice(part, GuestAddress(at)).ok()?;
            done = done.checked_add(part.len())?;
        }
        Some(())
    }

    fn write_item(&self, state: &mut State, len: usize, from: u64) -> Option<()> {
        let offset = state.offset;
        let item = state.files.writable(state.key)?;
        let place = item.get_mut(offset..offset.checked_add(len)?)?;
        self.memory.read_slice(place, GuestAddress(from)).ok()?;
        state.offset = offset.checked_add(len)?;
        Some(())
    }
}

impl State {
    fn select(&mut self, key: u16) {
        self.key = key;
        self.offset = 0;
        self.files.prepare(key);
    }

    fn read(&mut self, data: &mut [u8]) {
        data.fill(0);
        if let Some(Content(bytes)) = self.files.item(self.key) {
            let rest = bytes.iter().skip(self.offset);
            for (to, from) in data.iter_mut().zip(rest) {
                *to = *from;
            }
        }
        self.offset = self.offset.saturating_add(data.len());
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    key: u16,
    offset: u64,
    transfer: [u8; 8],
    files: files::Saved,
}

impl Stateful for FwCfg {
    fn save(&self) -> Result<state::State> {
        let state = self.lock();
        state::write(&Saved {
            key: state.key,
            offset: state.offset as u64,
            transfer: state.transfer,
            files: state.files.saved(),
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let mut state = self.lock();
        state.files.take(saved.files)?;
        state.key = saved.key;
        state.offset = usize::try_from(saved.offset).unwrap_or(usize::MAX);
        state.transfer = saved.transfer;
        Ok(())
    }
}

impl BusDevice for FwCfg {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        match offset {
            DATA => self.lock().read(data),
            TRANSFER.. => {
                let rest = SIGNATURE.iter().skip((offset - TRANSFER) as usize);
                for (to, from) in data.iter_mut().zip(rest) {
                    *to = *from;
                }
            }
            _ => {}
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (SELECTOR, [low, high]) => state.select(u16::from_le_bytes([*low, *high])),
            (TRANSFER.., data) => {
                let start = (offset - TRANSFER) as usize;
                for (to, from) in state.transfer.iter_mut().skip(start).zip(data) {
                    *to = *from;
                }
                // The last byte of the lower half starts it.
                if start.saturating_add(data.len()) == 8 {
                    let address = u64::from_be_bytes(std::mem::take(&mut state.transfer));
                    self.transfer(&mut state, address);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::FW_CFG;
    use crate::virtio::queue::testing::memory;

    fn device() -> (FwCfg, Arc<GuestMemoryMmap>) {
        let memory = memory();
        let mut files = Files::new();
        files.add("etc/long", vec![7; 5000]);
        files.add_writable("etc/written", 8);
        files.add_prepared(vec![("etc/made", 3)], Box::new(|| vec![b"now".to_vec()]));
        (FwCfg::new(files, memory.clone()), memory)
    }

    fn select(device: &FwCfg, key: u16) {
        device.write(FW_CFG, SELECTOR, &key.to_le_bytes());
    }

    fn next(device: &FwCfg, count: usize) -> Vec<u8> {
        (0..count)
            .map(|_| {
                let mut byte = [0xff];
                device.read(FW_CFG, DATA, &mut byte);
                byte[0]
            })
            .collect()
    }

    fn key_of(device: &FwCfg, name: &str) -> u16 {
        select(device, 0x19);
        let count = u32::from_be_bytes(next(device, 4).try_into().unwrap());
        for _ in 0..count {
            let entry = next(device, 64);
            if entry[8..].starts_with(name.as_bytes()) {
                return u16::from_be_bytes([entry[4], entry[5]]);
            }
        }
        panic!("no {name}");
    }

    fn transfer(device: &FwCfg, memory: &GuestMemoryMmap, control: u32, len: u32, to: u64) -> u32 {
        let mut request = control.to_be_bytes().to_vec();
        request.extend(len.to_be_bytes());
        request.extend(to.to_be_bytes());
        memory.write_slice(&request, GuestAddress(0x100)).unwrap();
        device.write(FW_CFG, TRANSFER, &[0; 4]);
        device.write(FW_CFG, TRANSFER + 4, &0x100u32.to_be_bytes());
        let mut answer = [0; 4];
        memory.read_slice(&mut answer, GuestAddress(0x100)).unwrap();
        u32::from_be_bytes(answer)
    }

    #[test]
    fn firmware_knows_the_device_and_that_it_has_transfers() {
        let (device, _) = device();
        select(&device, 0);
        assert_eq!(next(&device, 6), b"QEMU\0\0");
        select(&device, 1);
        assert_eq!(next(&device, 4), [3, 0, 0, 0]);
        let mut signature = [0; 8];
        device.read(FW_CFG, TRANSFER, &mut signature);
        assert_eq!(&signature, b"QEMU CFG");
    }

    #[test]
    fn a_transfer_reads_goes_on_and_skips() {
        let (device, memory) = device();
        let key = u32::from(key_of(&device, "etc/long"));
        let control = key << 16 | CONTROL_SELECT | CONTROL_READ;
        assert_eq!(transfer(&device, &memory, control, 4998, 0x2000), 0);
        assert_eq!(
            memory.read_obj::<u16>(GuestAddress(0x2000 + 4996)).unwrap(),
            0x0707
        );
        // Two bytes are left, then zeroes.
        assert_eq!(transfer(&device, &memory, CONTROL_READ, 4, 0x2000), 0);
        assert_eq!(
            memory.read_obj::<u32>(GuestAddress(0x2000)).unwrap(),
            0x0707
        );
        select(&device, key as u16);
        assert_eq!(transfer(&device, &memory, CONTROL_SKIP, 4999, 0), 0);
        assert_eq!(next(&device, 2), [7, 0]);
    }

    #[test]
    fn only_what_is_meant_for_it_is_written_and_only_within_its_size() {
        let (device, memory) = device();
        memory
            .write_slice(b"firmware", GuestAddress(0x3000))
            .unwrap();
        let key = u32::from(key_of(&device, "etc/written"));
        let control = key << 16 | CONTROL_SELECT | CONTROL_WRITE;
        assert_eq!(transfer(&device, &memory, control, 8, 0x3000), 0);
        assert_eq!(device.written("etc/written").unwrap(), b"firmware");
        assert_eq!(
            transfer(&device, &memory, control, 9, 0x3000),
            CONTROL_ERROR
        );
        let long = u32::from(key_of(&device, "etc/long"));
        let control = long << 16 | CONTROL_SELECT | CONTROL_WRITE;
        assert_eq!(
            transfer(&device, &memory, control, 8, 0x3000),
            CONTROL_ERROR
        );
        device.reset();
        assert_eq!(device.written("etc/written").unwrap(), [0; 8]);
    }

    #[test]
    fn a_transfer_outside_of_memory_harms_nobody() {
        let (device, memory) = device();
        let key = u32::from(key_of(&device, "etc/long"));
        let control = key << 16 | CONTROL_SELECT | CONTROL_READ;
        assert_eq!(
            transfer(&device, &memory, control, 16, u64::MAX - 3),
            CONTROL_ERROR
        );
        assert_eq!(
            transfer(&device, &memory, control, u32::MAX, 0x2000),
            CONTROL_ERROR
        );
        device.write(FW_CFG, TRANSFER, &[0xff; 4]);
        device.write(FW_CFG, TRANSFER + 4, &[0xff; 4]);
    }

    #[test]
    fn what_depends_on_firmware_is_made_when_it_is_selected() {
        let (device, _) = device();
        let key = key_of(&device, "etc/made");
        select(&device, key);
        assert_eq!(next(&device, 4), b"now\0");
    }

    #[test]
    fn keys_that_are_none_read_zeroes() {
        let (device, _) = device();
        for key in [2, 0x18, 0x3fff, 0x8000, u16::MAX] {
            select(&device, key);
            assert_eq!(next(&device, 3), [0; 3], "{key:#x}");
        }
    }
}
