// SPDX-License-Identifier: Apache-2.0
//! MSI-X (PCI 3.0, 6.8.2): the capability, the table and the pending bits of one function.
//!
//! Each vector has an eventfd, bound to a GSI of its own by KVM's irqfd. Raising an unmasked vector is one
//! write to that eventfd, from any thread, without an exit. What the guest writes into the table becomes the
//! GSI's route the moment the vector is (or gets) unmasked. A masked vector only sets its pending bit;
//! unmasking delivers it. Vector mask, function mask, MSI-X enable and bus master enable all gate alike.
//!
//! A vector's state is behind a small lock that is never held across a call into KVM, so that raising from
//! an I/O thread never waits for a routing update. The order on unmasking is route first, then open the gate.
//! INTx is left out: every driver of modern virtio either uses MSI-X or polls.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::config::{ConfigSpace, CAPABILITY_MSIX, COMMAND, COMMAND_MASTER};
use super::Wiring;
use crate::error::{Error, Result};
use crate::irq::MsiMessage;
use crate::state;

/// Bytes of a table entry.
const ENTRY: u64 = 16;
/// Message control: MSI-X enable.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors masked.
const FUNCTION_MASK: u16 = 1 << 14;

/// One vector.
struct Vector {
    event: EventFd,
    gsi: u32,
    gate: Mutex<Gate>,
}

impl Vector {
    fn new(wiring: &dyn Wiring) -> Result<Vector> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|e| Error::kernel("eventfd", e))?;
        let gsi = wiring.allocate()?;
        if let Err(error) = wiring.connect(&event, gsi) {
            wiring.release(&event, gsi);
            return Err(error);
        }
        Ok(Vector {
            event,
            gsi,
            gate: Mutex::default(),
        })
    }
}

fn release(wiring: &dyn Wiring, vectors: &[Vector]) {
    for vector in vectors {
        wiring.release(&vector.event, vector.gsi);
    }
}

#[derive(Default)]
struct Gate {
    /// Delivered at once, rather than kept pending.
    open: bool,
    pending: bool,
}

/// All the vectors of a function, shared with the threads that raise them.
pub struct Vectors(Vec<Vector>);

impl Vectors {
    /// Raises vector `index`; nothing happens if there is no such vector (0xffff is "none").
    pub fn raise(&self, index: u16) {
        let Some(vector) = self.0.get(usize::from(index)) else {
            return;
        };
        let mut gate = lock(&vector.gate);
        if gate.open {
            signal(&vector.event);
        } else {
            gate.pending = true;
        }
    }

    fn pending(&self, index: usize) -> bool {
        self.0
            .get(index)
            .is_some_and(|vector| lock(&vector.gate).pending)
    }
}

/// A table entry, as the guest wrote it.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
}

impl Entry {
    const RESET: Entry = Entry {
        address: 0,
        data: 0,
        masked: true,
    };

    fn bytes(&self) -> [u8; ENTRY as usize] {
        let value =
            u128::from(self.address) | u128::from(self.data) << 64 | u128::from(self.masked) << 96;
        value.to_le_bytes()
    }

    fn from_bytes(bytes: [u8; ENTRY as usize]) -> Entry {
        let value = u128::from_le_bytes(bytes);
        Entry {
            address: value as u64,
            data: (value >> 64) as u32,
            masked: (value >> 96) & 1 != 0,
        }
    }
}

/// What a table and its pending bits remember.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    table: Vec<Entry>,
    /// The vectors that are pending.
    pending: Vec<u16>,
}

impl Drop for Msix {
    /// A function that is gone holds no interrupts.
    fn drop(&mut self) {
        release(self.wiring.as_ref(), &self.vectors.0);
    }
}

/// The table and the capability of one function.
pub struct Msix {
    wiring: Arc<dyn Wiring>,
    vectors: Arc<Vectors>,
    table: Vec<Entry>,
    /// Where the capability lies in configuration space.
    capability: u16,
    /// Enabled, not masked as a whole, bus master: what the configuration space says.
    enabled: bool,
}

impl Msix {
    /// Adds the capability for `count` vectors (1 to 2048) with the table and the pending bits at these
    /// offsets within BAR `bar`.
    ///
    /// # Errors
    /// `Unavailable` when there are no more GSIs, eventfds or irqfds.
    pub fn new(
        wiring: Arc<dyn Wiring>,
        space: &mut ConfigSpace,
        count: u16,
        bar: u8,
        table: u32,
        pending: u32,
    ) -> Result<Msix> {
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&count.wrapping_sub(1).to_le_bytes());
        body.extend_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body.extend_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let capability = space.add_capability(CAPABILITY_MSIX, &body)?;
        space.allow(capability + 2, &(ENABLE | FUNCTION_MASK).to_le_bytes());
        let mut vectors = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            match Vector::new(wiring.as_ref()) {
                Ok(vector) => vectors.push(vector),
                Err(error) => {
                    release(wiring.as_ref(), &vectors);
                    return Err(error);
                }
            }
        }
        Ok(Msix {
            wiring,
            table: vec![Entry::RESET; vectors.len()],
            vectors: Arc::new(Vectors(vectors)),
            capability,
            enabled: false,
        })
    }

    /// The vectors, for whoever raises them.
    pub fn vectors(&self) -> Arc<Vectors> {
        Arc::clone(&self.vectors)
    }

    /// Takes over what the configuration space says now; called after every write to it.
    pub fn configuration_changed(&mut self, space: &ConfigSpace) {
        let control = space.u16(self.capability + 2);
        let enabled = control & (ENABLE | FUNCTION_MASK) == ENABLE
            && space.u16(COMMAND) & COMMAND_MASTER != 0;
        if enabled != self.enabled {
            self.enabled = enabled;
            for index in 0..self.table.len() {
                self.update(index);
            }
        }
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = (offset % ENTRY) as usize;
        if let Some(entry) = self.table.get((offset / ENTRY) as usize) {
            for (byte, value) in data.iter_mut().zip(entry.bytes().iter().skip(within)) {
                *byte = *value;
            }
        }
    }

    /// The guest writes the table: aligned words of 4 or 8 bytes; others are undefined and ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let index = (offset / ENTRY) as usize;
        let within = (offset % ENTRY) as usize;
        if !matches!(data.len(), 4 | 8) || within % data.len() != 0 {
            return;
        }
        let Some(entry) = self.table.get_mut(index) else {
            return;
        };
        let mut bytes = entry.bytes();
        for (byte, value) in bytes.iter_mut().skip(within).zip(data) {
            *byte = *value;
        }
        *entry = Entry::from_bytes(bytes);
        self.update(index);
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (place, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(place).saturating_mul(8);
            *byte = (0..8)
                .filter(|bit| self.vectors.pending(first.saturating_add(*bit)))
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// Back to the state after power-on: disabled, all vectors masked, nothing pending.
    ///
    /// The configuration space has been reset already.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.table.fill(Entry::RESET);
        for index in 0..self.table.len() {
            self.update(index);
        }
        for vector in &self.vectors.0 {
            lock(&vector.gate).pending = false;
        }
    }

    /// What it remembers; whether it is enabled, the configuration space knows.
    pub fn saved(&self) -> Saved {
        let pending = (0..self.table.len()).filter(|index| self.vectors.pending(*index));
        Saved {
            table: self.table.clone(),
            pending: pending.map(|index| index as u16).collect(),
        }
    }

    /// Takes over what another one remembered; `space` has been restored already. What is pending and not masked is
    /// delivered.
    ///
    /// # Errors
    /// `ImageInvalid` for another number of vectors.
    pub fn take(&mut self, saved: &Saved, space: &ConfigSpace) -> Result<()> {
        if saved.table.len() != self.table.len() {
            return Err(state::invalid(format!(
                "{} vectors where there are {}",
                saved.table.len(),
                self.table.len()
            )));
        }
        self.table.clone_from(&saved.table);
        for index in &saved.pending {
            let vector = self.vectors.0.get(usize::from(*index));
            let vector = vector.ok_or_else(|| state::invalid("a vector that there is not"))?;
            lock(&vector.gate).pending = true;
        }
        self.configuration_changed(space);
        Ok(())
    }

    /// Routes a vector as its entry says and opens or closes its gate.
    fn update(&self, index: usize) {
        let (Some(entry), Some(vector)) = (self.table.get(index), self.vectors.0.get(index)) else {
            return;
        };
        let open = self.enabled && !entry.masked;
        // A vector that cannot be routed stays closed: the guest's own address may be no local APIC's, and
        // KVM may refuse the table. Its interrupts stay pending.
        let open = open
            && self
                .wiring
                .route(
                    vector.gsi,
                    MsiMessage {
                        address: entry.address,
                        data: entry.data,
                    },
                )
                .is_ok();
        let mut gate = lock(&vector.gate);
        gate.open = open;
        if open && gate.pending {
            gate.pending = false;
            signal(&vector.event);
        }
    }
}

fn signal(event: &EventFd) {
    // The only failure of a non-blocking eventfd is a full counter: then the interrupt is due anyway.
    let _ = event.write(1);
}

fn lock(gate: &Mutex<Gate>) -> MutexGuard<'_, Gate> {
    gate.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::super::config::Identity;
    use super::super::testing::FakeWiring;
    use super::*;

    fn function() -> (Arc<FakeWiring>, ConfigSpace, Msix) {
        let wiring = Arc::new(FakeWiring::default());
        let mut space = ConfigSpace::new(Identity {
            vendor: 1,
            device: 2,
            revision: 0,
            class: 0,
            header: 0,
            subsystem: (0, 0),
        });
        let msix = Msix::new(wiring.clone(), &mut space, 3, 0, 0x8000, 0x9000).unwrap();
        (wiring, space, msix)
    }

    fn enable(space: &mut ConfigSpace, msix: &mut Msix, control: u16) {
        space.write(COMMAND, &COMMAND_MASTER.to_le_bytes());
        space.write(msix.capability + 2, &control.to_le_bytes());
        msix.configuration_changed(space);
    }

    fn program(msix: &mut Msix, index: u64, address: u64, data: u32, masked: u32) {
        msix.write_table(index * 16, &address.to_le_bytes());
        msix.write_table(index * 16 + 8, &data.to_le_bytes());
        msix.write_table(index * 16 + 12, &masked.to_le_bytes());
    }

    #[test]
    fn the_capability_tells_count_and_places() {
        let (_, space, msix) = function();
        let at = msix.capability;
        assert_eq!(space.u8(at), 0x11);
        assert_eq!(space.u16(at + 2), 2);
        assert_eq!(space.u32(at + 4), 0x8000);
        assert_eq!(space.u32(at + 8), 0x9000);
    }

    #[test]
    fn an_unmasked_vector_is_raised_with_the_guests_message() {
        let (wiring, mut space, mut msix) = function();
        program(&mut msix, 1, 0xfee0_1000, 0x41, 0);
        enable(&mut space, &mut msix, ENABLE);
        msix.vectors().raise(1);
        assert_eq!(wiring.raised(), [(0xfee0_1000, 0x41)]);
    }

    #[test]
    fn a_masked_vector_stays_pending_until_it_is_unmasked() {
        let (wiring, mut space, mut msix) = function();
        enable(&mut space, &mut msix, ENABLE);
        program(&mut msix, 2, 0xfee0_0000, 0x50, 1);
        msix.vectors().raise(2);
        assert_eq!(wiring.raised(), []);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [4, 0, 0, 0, 0, 0, 0, 0]);
        program(&mut msix, 2, 0xfee0_0000, 0x51, 0);
        assert_eq!(wiring.raised(), [(0xfee0_0000, 0x51)]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn function_mask_and_bus_master_gate_all_vectors() {
        let (wiring, mut space, mut msix) = function();
        program(&mut msix, 0, 0xfee0_0000, 0x60, 0);
        enable(&mut space, &mut msix, ENABLE | FUNCTION_MASK);
        msix.vectors().raise(0);
        assert_eq!(wiring.raised(), []);
        enable(&mut space, &mut msix, ENABLE);
        assert_eq!(wiring.raised(), [(0xfee0_0000, 0x60)]);
        space.write(COMMAND, &[0, 0]);
        msix.configuration_changed(&space);
        msix.vectors().raise(0);
        assert_eq!(wiring.raised(), []);
    }

    #[test]
    fn a_reset_masks_and_forgets_all() {
        let (wiring, mut space, mut msix) = function();
        program(&mut msix, 0, 0xfee0_0000, 0x60, 0);
        msix.vectors().raise(0);
        msix.reset();
        enable(&mut space, &mut msix, ENABLE);
        assert_eq!(wiring.raised(), []);
        let mut entry = [0xff; 16];
        msix.read_table(0, &mut entry[..8]);
        msix.read_table(8, &mut entry[8..]);
        assert_eq!(u128::from_le_bytes(entry), 1 << 96);
    }

    #[test]
    fn accesses_beyond_the_table_are_harmless() {
        let (_, _, mut msix) = function();
        msix.write_table(u64::MAX - 15, &[1; 8]);
        msix.write_table(3 * 16, &[1; 4]);
        msix.write_table(3, &[1; 4]);
        let mut data = [0xff; 8];
        msix.read_table(u64::MAX - 15, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_pending(u64::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
        msix.vectors().raise(0xffff);
    }
}
