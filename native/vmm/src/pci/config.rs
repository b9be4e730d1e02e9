// SPDX-License-Identifier: Apache-2.0
//! The configuration space of one PCI function: bytes, which of their bits the guest may write, and which a
//! written one clears.
//!
//! 256 bytes are kept; the extended space above them reads zero, which says that a PCIe function has no
//! extended capability. Everything the guest reads here was put there before it ran, or written by itself
//! through the masks: sizing a BAR needs no code of its own, because the bits below a BAR's size are not
//! writable (PCI 3.0, 6.2.5.1).

use crate::error::{Error, Result};
use crate::state::{self, Bytes};

/// Bytes of the conventional configuration space.
pub const SPACE: usize = 256;

/// The command register (PCI 3.0, 6.2.2).
pub const COMMAND: u16 = 0x04;
/// The function decodes its I/O BARs, a bridge what is behind it.
pub const COMMAND_IO: u16 = 1;
/// The function decodes its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// The function may access memory: virtqueues, MSIs.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// The function raises no INTx.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// The status register.
pub const STATUS: u16 = 0x06;
/// The first base address register.
pub const BAR0: u16 = 0x10;
/// The offset of the first capability.
pub const CAPABILITIES: u16 = 0x34;
/// Where capabilities begin: behind the header.
const CAPABILITIES_START: usize = 0x40;

/// Header type: this device has more functions than function 0.
pub const MULTIFUNCTION: u8 = 0x80;

/// What identifies a function, in the order of the header.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and programming interface, as 0xBBSSPP.
    pub class: u32,
    /// Header type: 0 for an endpoint, 1 for a bridge, with or without [`MULTIFUNCTION`].
    pub header: u8,
    /// Subsystem vendor and subsystem (endpoints only).
    pub subsystem: (u16, u16),
}

/// The bytes and their masks.
#[derive(Clone)]
pub struct ConfigSpace {
    bytes: [u8; SPACE],
    /// Bits that take the value written.
    writable: [u8; SPACE],
    /// Bits that a written one clears.
    clearable: [u8; SPACE],
    /// The bytes after power-on, taken by [`ConfigSpace::seal`].
    initial: [u8; SPACE],
    /// Where the next capability goes.
    next: usize,
    /// The byte that will point at the next capability.
    link: usize,
}

impl ConfigSpace {
    /// A header, with the command register's memory, bus master and INTx disable bits writable.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; SPACE],
            writable: [0; SPACE],
            clearable: [0; SPACE],
            initial: [0; SPACE],
            next: CAPABILITIES_START,
            link: CAPABILITIES as usize,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8).to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x0e, &[identity.header]);
        if identity.header & !MULTIFUNCTION == 0 {
            space.put(0x2c, &identity.subsystem.0.to_le_bytes());
            space.put(0x2e, &identity.subsystem.1.to_le_bytes());
        }
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        // Cache line size and interrupt line are the guest's own notes.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Adds a capability whose bytes after the link are `body`; returns where it lies.
    ///
    /// # Errors
    /// `Internal` when the space is full: the functions of this crate are laid out to fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Result<u16> {
        let at = self.next;
        let end = at + 2 + body.len();
        if end > SPACE {
            return Err(Error::internal("a PCI function has too many capabilities"));
        }
        self.put(self.link as u16, &[at as u8]);
        self.put(at as u16, &[id, 0]);
        self.put(at as u16 + 2, body);
        // Status bit 4: there is a capability list.
        self.put(STATUS, &[0x10]);
        self.link = at + 1;
        self.next = (end + 3) & !3;
        Ok(at as u16)
    }

    /// Sets bytes, whatever the guest may do with them.
    pub fn put(&mut self, offset: u16, data: &[u8]) {
        overwrite(&mut self.bytes, offset, data);
    }

    /// Lets the guest write the bits set in `mask`.
    pub fn allow(&mut self, offset: u16, mask: &[u8]) {
        overwrite(&mut self.writable, offset, mask);
    }

    /// Lets the guest clear the bits set in `mask` by writing ones.
    pub fn allow_clear(&mut self, offset: u16, mask: &[u8]) {
        overwrite(&mut self.clearable, offset, mask);
    }

    /// Takes what is there now as the state after power-on.
    pub fn seal(&mut self) {
        self.initial = self.bytes;
    }

    /// Back to the sealed state.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// All of it, for a state.
    pub fn saved(&self) -> Bytes {
        Bytes(self.bytes.to_vec())
    }

    /// Takes over what a guest wrote to another one like it.
    ///
    /// # Errors
    /// `ImageInvalid` for the space of another function: what no guest can write is not the same.
    pub fn take(&mut self, saved: &Bytes) -> Result<()> {
        let saved = saved.array::<SPACE>()?;
        let guests = self.writable.iter().zip(&self.clearable);
        let guests = guests.map(|(writable, clearable)| writable | clearable);
        let mut bytes = self.bytes;
        for (place, ((byte, new), guests)) in (0u16..).zip(bytes.iter_mut().zip(saved).zip(guests))
        {
            if (*byte ^ new) & !guests != 0 {
                let message = format!("another function: register {place:#x} has {new:#04x}");
                return Err(state::invalid(message));
            }
            *byte = new;
        }
        self.bytes = bytes;
        Ok(())
    }

    /// What the guest reads; zeroes in the extended space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (place, byte) in (usize::from(offset)..).zip(data.iter_mut()) {
            *byte = self.bytes.get(place).copied().unwrap_or(0);
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (place, value) in (usize::from(offset)..).zip(data) {
            let (Some(byte), Some(writable), Some(clearable)) = (
                self.bytes.get_mut(place),
                self.writable.get(place),
                self.clearable.get(place),
            ) else {
                return;
            };
            *byte = (*byte & !writable) | (value & writable);
            *byte &= !(value & clearable);
        }
    }

    /// One byte; zero in the extended space.
    pub fn u8(&self, offset: u16) -> u8 {
        self.bytes.get(usize::from(offset)).copied().unwrap_or(0)
    }

    /// Two bytes.
    pub fn u16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Four bytes.
    pub fn u32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Whether the function decodes memory.
    pub fn memory_enabled(&self) -> bool {
        self.u16(COMMAND) & COMMAND_MEMORY != 0
    }
}

/// Whether an access of `len` bytes at `offset` touches the `size` bytes at `start`.
pub fn touches(offset: u16, len: usize, start: u16, size: usize) -> bool {
    let (offset, start) = (usize::from(offset), usize::from(start));
    offset < start.saturating_add(size) && start < offset.saturating_add(len)
}

fn overwrite(array: &mut [u8; SPACE], offset: u16, data: &[u8]) {
    for (place, value) in array.iter_mut().skip(usize::from(offset)).zip(data) {
        *place = *value;
    }
}

/// A 64-bit memory BAR, in two consecutive registers.
#[derive(Clone, Copy, Debug)]
pub struct Bar64 {
    /// The first register's number, 0 to 4.
    pub index: u8,
    /// Bytes: a power of two of at least 16.
    pub size: u64,
}

impl Bar64 {
    /// The first register's offset.
    pub const fn register(&self) -> u16 {
        BAR0 + self.index as u16 * 4
    }

    /// Declares the BAR, prefetchable so that a bridge may place it above 4 GiB, with a first address.
    pub fn declare(&self, space: &mut ConfigSpace, address: u64) {
        const MEMORY_64_PREFETCHABLE: u64 = 0xc;
        let mask = !self.size.wrapping_sub(1);
        let value = (address & mask) | MEMORY_64_PREFETCHABLE;
        space.put(self.register(), &value.to_le_bytes());
        space.allow(self.register(), &mask.to_le_bytes());
    }

    /// The address in the registers now.
    pub fn address(&self, space: &ConfigSpace) -> u64 {
        let low = u64::from(space.u32(self.register()) & !0xf);
        let high = u64::from(space.u32(self.register() + 4));
        high << 32 | low
    }

    /// Whether a write of `len` bytes at `offset` may have moved it.
    pub fn touched(&self, offset: u16, len: usize) -> bool {
        touches(offset, len, self.register(), 8)
    }
}

/// Device/port types of the PCI Express capability: an endpoint on a link.
pub const KIND_ENDPOINT: u8 = 0;
/// A root port.
pub const KIND_ROOT_PORT: u8 = 4;
/// An endpoint on the root complex's own bus.
pub const KIND_INTEGRATED: u8 = 9;
/// Offsets within the PCI Express capability: link control.
pub const LINK_CONTROL: u16 = 16;
/// Link status.
pub const LINK_STATUS: u16 = 18;
/// Slot control.
pub const SLOT_CONTROL: u16 = 24;
/// Slot status.
pub const SLOT_STATUS: u16 = 26;

/// The PCI Express capability (PCIe 3.0, 7.8), version 2, as 58 bytes behind the link.
///
/// `kind` is the device/port type (bits 7:4 of the capabilities register): 0 for an endpoint, 4 for a root port, 9
/// for an integrated endpoint; `slot` is the number of the slot a root port implements.
pub fn express_capability(
    space: &mut ConfigSpace,
    kind: u8,
    device: u32,
    slot: Option<u16>,
) -> Result<u16> {
    let mut body = [0u8; 58];
    let implemented = u16::from(slot.is_some()) << 8;
    let reports_state = u32::from(slot.is_some()) << 20;
    // Link capabilities: 2.5 GT/s, x1; a port reports its state. An integrated endpoint has no link.
    let link = if kind == KIND_INTEGRATED {
        0
    } else {
        reports_state | 0x11
    };
    let fields: [(usize, u32); 4] = [
        (0, u32::from(2 | u16::from(kind) << 4 | implemented)),
        (2, device),
        (10, link),
        (18, slot.map_or(0, slot_capabilities)),
    ];
    for (place, value) in fields {
        for (byte, new) in body.iter_mut().skip(place).zip(value.to_le_bytes()) {
            *byte |= new;
        }
    }
    let at = space.add_capability(CAPABILITY_EXPRESS, &body)?;
    // Device control: error reporting, relaxed ordering, payload sizes, no snoop; status: errors clear.
    space.allow(at + 8, &[0xff, 0x7f]);
    space.allow_clear(at + 10, &[0x0f]);
    if link != 0 {
        // Link control: disable, common clock, retrain is not kept.
        space.allow(at + LINK_CONTROL, &[0x5b]);
        // Link status: 2.5 GT/s x1.
        space.put(at + LINK_STATUS, &0x0011u16.to_le_bytes());
    }
    if slot.is_some() {
        // Slot control: enables, indicators, power; slot status: attention, presence, link changes clear.
        space.allow(at + SLOT_CONTROL, &[0xff, 0x17]);
        space.allow_clear(at + SLOT_STATUS, &[0x1f, 0x01]);
        // Root control: error reporting, PME.
        space.allow(at + 28, &[0x1f]);
    }
    Ok(at)
}

/// Attention button, power indicator, hotplug capable, no "command completed"; the physical slot's number.
fn slot_capabilities(number: u16) -> u32 {
    const ATTENTION_BUTTON: u32 = 1 << 0;
    const POWER_INDICATOR: u32 = 1 << 4;
    const HOTPLUG: u32 = 1 << 6;
    const NO_COMMAND_COMPLETED: u32 = 1 << 18;
    ATTENTION_BUTTON | POWER_INDICATOR | HOTPLUG | NO_COMMAND_COMPLETED | u32::from(number) << 19
}

/// Capability IDs (PCI Code and ID Assignment).
pub const CAPABILITY_VENDOR: u8 = 0x09;
/// PCI Express.
pub const CAPABILITY_EXPRESS: u8 = 0x10;
/// MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x018000,
            header: 0,
            subsystem: (0x1af4, 0x1100),
        })
    }

    #[test]
    fn the_header_reads_as_the_specification_lays_it_out() {
        let space = endpoint();
        assert_eq!(space.u32(0), 0x1042_1af4);
        assert_eq!(space.u32(8), 0x0180_0001);
        assert_eq!(space.u8(0x0e), 0);
        assert_eq!(space.u32(0x2c), 0x1100_1af4);
    }

    #[test]
    fn sizing_a_bar_reads_back_its_size_and_type() {
        let mut space = endpoint();
        let bar = Bar64 {
            index: 0,
            size: 0x10000,
        };
        bar.declare(&mut space, 0xc001_0000);
        assert_eq!(bar.address(&space), 0xc001_0000);
        space.write(BAR0, &[0xff; 4]);
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(space.u32(BAR0), 0xffff_000c);
        assert_eq!(space.u32(BAR0 + 4), 0xffff_ffff);
        space.write(BAR0, &0x8765_4321u32.to_le_bytes());
        space.write(BAR0 + 4, &0x80u32.to_le_bytes());
        assert_eq!(bar.address(&space), 0x80_8765_0000);
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let mut space = endpoint();
        let first = space.add_capability(0x09, &[1, 2, 3]).unwrap();
        let second = express_capability(&mut space, 9, 0, None).unwrap();
        assert_eq!(space.u8(CAPABILITIES), first as u8);
        assert_eq!(space.u8(first + 1), second as u8);
        assert_eq!(space.u8(second), CAPABILITY_EXPRESS);
        assert_eq!(space.u8(second + 1), 0);
        assert_eq!(space.u16(STATUS) & 0x10, 0x10);
        assert!(space.add_capability(0x09, &[0; 200]).is_err());
    }

    #[test]
    fn only_writable_bits_change_and_written_ones_clear_status_bits() {
        let mut space = endpoint();
        space.write(0, &[0; 4]);
        assert_eq!(space.u16(0), 0x1af4);
        space.put(0x50, &[0xff]);
        space.allow_clear(0x50, &[0x0f]);
        space.write(0x50, &[0x05]);
        assert_eq!(space.u8(0x50), 0xfa);
    }

    #[test]
    fn a_reset_restores_the_sealed_state() {
        let mut space = endpoint();
        space.put(COMMAND, &[2, 0]);
        space.seal();
        space.write(COMMAND, &[6, 4]);
        assert_eq!(space.u16(COMMAND), 0x406);
        space.reset();
        assert_eq!(space.u16(COMMAND), 2);
    }

    #[test]
    fn the_extended_space_reads_zero_and_takes_no_writes() {
        let mut space = endpoint();
        space.write(0x100, &[0xff; 4]);
        space.write(0xfff, &[0xff; 4]);
        assert_eq!(space.u32(0x100), 0);
        assert_eq!(space.u32(0xfe), 0);
    }
}
