// SPDX-License-Identifier: Apache-2.0
//! A PCIe root port with a hotplug slot (PCIe 3.0, 6.7).
//!
//! Bus number and windows are assigned before the guest runs, wide enough for what may be plugged in, since
//! a guest without firmware cannot make room later. The slot has an attention button and a power
//! indicator; its events go by the port's one MSI-X vector. I/O windows are left out: nothing here has an
//! I/O BAR.
//!
//! | what the host does | what the guest sees | what the guest does |
//! |---|---|---|
//! | plugs a device in | presence and the link's state change | configures it at once; the indicator is on |
//! | asks for it back | the attention button is pressed | lets go of it, turns the indicator off: the host takes it |
//! | takes the question back | nothing | if it lets go after all, the device is shown to it anew |
//!
//! There is no power controller, so that a guest which switches a slot off of its own accord keeps the device and
//! may switch it on again. A reset of the machine answers a question like consent: nobody holds the device then.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::config::{
    express_capability, touches, Bar64, ConfigSpace, Identity, KIND_ROOT_PORT, LINK_STATUS,
    MULTIFUNCTION, SLOT_CONTROL, SLOT_STATUS,
};
use super::msix::{self, Msix};
use super::{
    Function, Place, Window, Wiring, PORT_MEMORY, PORT_MEMORY_SIZE, PORT_PREFETCHABLE,
    PORT_PREFETCHABLE_SIZE,
};
use crate::error::Result;
use crate::state::{self, Bytes, Stateful};

const BAR: Bar64 = Bar64 {
    index: 0,
    size: 0x1000,
};
/// Where the MSI-X pending bits lie in the BAR; the table is at 0.
const PENDING: u64 = 0x800;
/// Primary, secondary and subordinate bus number.
const BUSES: u16 = 0x18;
/// Memory base and limit, prefetchable base and limit, and the upper halves of the latter: to 0x30.
const MEMORY: u16 = 0x20;
const PREFETCHABLE: u16 = 0x24;
const PREFETCHABLE_UPPER: u16 = 0x28;
const WINDOWS_SIZE: usize = 16;

/// Link status: the link is up.
const LINK_ACTIVE: u16 = 1 << 13;
/// Slot status, and the enables in slot control at the same bits: the attention button was pressed.
const ATTENTION: u16 = 1 << 0;
/// Presence changed.
const PRESENCE_CHANGED: u16 = 1 << 3;
/// Slot status only: something is in the slot.
const PRESENT: u16 = 1 << 6;
/// Slot status: the link came up or went down; its enable is bit 12.
const LINK_CHANGED: u16 = 1 << 8;
const LINK_CHANGED_ENABLE: u16 = 1 << 12;
/// Slot control: hotplug interrupts.
const INTERRUPT_ENABLE: u16 = 1 << 5;
/// Slot control: the power indicator, and two of its states.
const INDICATOR: u16 = 3 << 8;
const INDICATOR_BLINKS: u16 = 2 << 8;
const INDICATOR_OFF: u16 = 3 << 8;

/// Called, by a vCPU's thread or in a reset, when the guest has let go of what is in slot `index`.
pub type Ejected = Arc<dyn Fn(u8) + Send + Sync>;

/// 00:10.x.
pub struct RootPort {
    index: u8,
    ejected: Ejected,
    state: Mutex<State>,
}

struct State {
    space: ConfigSpace,
    msix: Msix,
    /// Where the PCI Express capability lies.
    express: u16,
    /// The slot has a device.
    occupied: bool,
    question: Question,
    /// A hotplug interrupt is due: raised when this becomes true.
    due: bool,
}

/// Whether the host wants the device back.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Question {
    None,
    Asked,
    /// Taken back before the guest answered; it may still do so.
    TakenBack,
}

impl RootPort {
    /// Root port `index`, 0 to 7, with an empty slot.
    ///
    /// # Errors
    /// `Unavailable` when there is no GSI or eventfd left.
    pub fn new(wiring: Arc<dyn Wiring>, index: u8, ejected: Ejected) -> Result<RootPort> {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x000c,
            revision: 0,
            class: 0x060400,
            header: 1 | MULTIFUNCTION,
            subsystem: (0, 0),
        });
        let number = u64::from(index);
        BAR.declare(&mut space, Place::root_port(index).bar_address());
        space.put(BUSES, &[0, index + 1, index + 1]);
        space.allow(BUSES, &[0xff; 3]);
        // Secondary status.
        space.allow_clear(0x1e, &[0x00, 0xf9]);
        let memory = PORT_MEMORY + number * PORT_MEMORY_SIZE;
        let last = memory + PORT_MEMORY_SIZE - 1;
        space.put(MEMORY, &window_half(memory).to_le_bytes());
        space.put(MEMORY + 2, &window_half(last).to_le_bytes());
        space.allow(MEMORY, &[0xf0, 0xff, 0xf0, 0xff]);
        let memory = PORT_PREFETCHABLE + number * PORT_PREFETCHABLE_SIZE;
        let last = memory + PORT_PREFETCHABLE_SIZE - 1;
        // The low nibble says: a 64-bit window.
        space.put(PREFETCHABLE, &(window_half(memory) | 1).to_le_bytes());
        space.put(PREFETCHABLE + 2, &(window_half(last) | 1).to_le_bytes());
        space.allow(PREFETCHABLE, &[0xf0, 0xff, 0xf0, 0xff]);
        space.put(PREFETCHABLE_UPPER, &((memory >> 32) as u32).to_le_bytes());
        space.put(PREFETCHABLE_UPPER + 4, &((last >> 32) as u32).to_le_bytes());
        space.allow(PREFETCHABLE_UPPER, &[0xff; 8]);
        // Bridge control: parity, SERR, ISA, VGA, master abort, secondary bus reset.
        space.allow(0x3e, &[0x7f, 0x00]);
        // Memory decoding and bus mastering are on, for what is plugged in.
        space.put(super::config::COMMAND, &[0x06, 0x00]);
        let msix = Msix::new(wiring, &mut space, 1, BAR.index, 0, PENDING as u32)?;
        // Device capabilities: payload 128 bytes, role-based error reporting.
        let slot = Some(u16::from(index) + 1);
        let express = express_capability(&mut space, KIND_ROOT_PORT, 1 << 15, slot)?;
        space.seal();
        Ok(RootPort {
            index,
            ejected,
            state: Mutex::new(State {
                space,
                msix,
                express,
                occupied: false,
                question: Question::None,
                due: false,
            }),
        })
    }

    /// The bus behind the port, as the guest numbers it now.
    pub fn secondary(&self) -> u8 {
        self.lock().space.u8(BUSES + 1)
    }

    /// Whether the port passes accesses to all of this range on to its slot.
    pub fn forwards(&self, base: u64, size: u64) -> bool {
        let state = self.lock();
        let space = &state.space;
        let half = |register: u16| u64::from(space.u16(register) & 0xfff0) << 16;
        let upper = |register: u16| u64::from(space.u32(register)) << 32;
        let memory = (half(MEMORY), half(MEMORY + 2));
        let prefetchable = (
            upper(PREFETCHABLE_UPPER) | half(PREFETCHABLE),
            upper(PREFETCHABLE_UPPER + 4) | half(PREFETCHABLE + 2),
        );
        let last = base.saturating_add(size.saturating_sub(1));
        let within = |(first, end): (u64, u64)| first <= base && last <= end | 0xf_ffff;
        space.memory_enabled() && (within(memory) || within(prefetchable))
    }

    /// A device is in the slot from now on.
    pub fn plug(&self) {
        self.lock().occupy(true);
    }

    /// The slot is empty from now on.
    pub fn unplug(&self) {
        self.lock().occupy(false);
    }

    /// Presses the attention button: the guest is to let go of the device. [`Ejected`] is the answer.
    pub fn ask_back(&self) {
        let mut state = self.lock();
        state.question = Question::Asked;
        // A guest whose indicator blinks has seen an earlier press; it would take another as "never mind".
        if state.indicator() != INDICATOR_BLINKS {
            state.announce(ATTENTION);
        }
    }

    /// The host wants the device back no more.
    pub fn take_back_the_question(&self) {
        let mut state = self.lock();
        if state.question == Question::Asked {
            state.question = Question::TakenBack;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl State {
    fn occupy(&mut self, occupied: bool) {
        self.occupied = occupied;
        self.question = Question::None;
        self.show_presence();
        self.announce(PRESENCE_CHANGED | LINK_CHANGED);
    }

    fn show_presence(&mut self) {
        let express = self.express;
        let mut set = |register: u16, bit: u16| {
            let value = self.space.u16(express + register);
            let value = if self.occupied {
                value | bit
            } else {
                value & !bit
            };
            self.space.put(express + register, &value.to_le_bytes());
        };
        set(LINK_STATUS, LINK_ACTIVE);
        set(SLOT_STATUS, PRESENT);
    }

    /// Sets bits of the slot's status and interrupts the guest if it wants to know.
    fn announce(&mut self, bits: u16) {
        let status = self.express + SLOT_STATUS;
        let value = self.space.u16(status) | bits;
        self.space.put(status, &value.to_le_bytes());
        self.interrupt();
    }

    /// One interrupt each time that there begins to be an enabled event (6.7.3.4).
    fn interrupt(&mut self) {
        let status = self.space.u16(self.express + SLOT_STATUS);
        let control = self.space.u16(self.express + SLOT_CONTROL);
        let link = status & LINK_CHANGED != 0 && control & LINK_CHANGED_ENABLE != 0;
        let enabled = status & control & (ATTENTION | PRESENCE_CHANGED) != 0 || link;
        let due = enabled && control & INTERRUPT_ENABLE != 0;
        if due && !self.due {
            self.msix.vectors().raise(0);
        }
        self.due = due;
    }

    fn indicator(&self) -> u16 {
        self.space.u16(self.express + SLOT_CONTROL) & INDICATOR
    }

    /// What follows when the guest turns the power indicator off; true if the device is to be taken.
    fn let_go(&mut self) -> bool {
        match self.question {
            _ if !self.occupied => false,
            Question::None => false,
            Question::Asked => true,
            Question::TakenBack => {
                self.occupy(true);
                false
            }
        }
    }
}

/// Address bits 31:20, as a base or limit register has them.
fn window_half(address: u64) -> u16 {
    (address >> 16) as u16 & 0xfff0
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    space: Bytes,
    msix: msix::Saved,
    question: Question,
    due: bool,
}

/// Whether the slot has a device is the definition's, and the space of another one is refused.
impl Stateful for RootPort {
    fn save(&self) -> Result<state::State> {
        let state = self.lock();
        state::write(&Saved {
            space: state.space.saved(),
            msix: state.msix.saved(),
            question: state.question,
            due: state.due,
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let mut guard = self.lock();
        let state = &mut *guard;
        state.space.take(&saved.space)?;
        state.msix.take(&saved.msix, &state.space)?;
        state.question = saved.question;
        state.due = saved.due;
        Ok(())
    }
}

impl Function for RootPort {
    fn config_read(&self, register: u16, data: &mut [u8]) {
        self.lock().space.read(register, data);
    }

    fn config_write(&self, register: u16, data: &[u8]) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        let control = state.express + SLOT_CONTROL;
        let before = state.indicator();
        state.space.write(register, data);
        state.msix.configuration_changed(&state.space);
        let moved = touches(register, data.len(), super::config::COMMAND, 2)
            || BAR.touched(register, data.len())
            || touches(register, data.len(), MEMORY, WINDOWS_SIZE);
        if touches(register, data.len(), control, 4) {
            let turned_off = state.indicator() == INDICATOR_OFF && before != INDICATOR_OFF;
            let ejected = turned_off && state.let_go();
            state.interrupt();
            drop(guard);
            if ejected {
                (self.ejected)(self.index);
            }
        }
        moved
    }

    fn windows(&self) -> Vec<Window> {
        let state = self.lock();
        if !state.space.memory_enabled() {
            return Vec::new();
        }
        vec![Window {
            bar: BAR.index,
            base: BAR.address(&state.space),
            size: BAR.size,
        }]
    }

    fn read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        match offset.checked_sub(PENDING) {
            Some(offset) => state.msix.read_pending(offset, data),
            None => state.msix.read_table(offset, data),
        }
    }

    fn write(&self, _bar: u8, offset: u64, data: &[u8]) {
        if offset < PENDING {
            self.lock().msix.write_table(offset, data);
        }
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.space.reset();
        state.msix.reset();
        state.due = false;
        state.show_presence();
        let ejected = state.occupied && state.question == Question::Asked;
        state.question = Question::None;
        drop(state);
        if ejected {
            (self.ejected)(self.index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::FakeWiring;
    use super::*;

    fn at(index: u8) -> RootPort {
        RootPort::new(Arc::new(FakeWiring::default()), index, Arc::new(|_| {})).unwrap()
    }

    fn u32_at(port: &RootPort, register: u16) -> u32 {
        let mut data = [0; 4];
        port.config_read(register, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn bus_and_windows_are_assigned_before_the_guest_runs() {
        let port = at(2);
        assert_eq!(u32_at(&port, 0x18), 0x0003_0300);
        // 0xd4000000 to 0xd5ffffff
        assert_eq!(u32_at(&port, 0x20), 0xd5f0_d400);
        // 0x88_00000000 to 0x8b_ffffffff
        assert_eq!(u32_at(&port, 0x24), 0xfff1_0001);
        assert_eq!(u32_at(&port, 0x28), 0x88);
        assert_eq!(u32_at(&port, 0x2c), 0x8b);
    }

    #[test]
    fn the_slot_says_hotplug_and_its_number() {
        let port = at(4);
        let mut at = u32_at(&port, 0x34) as u8;
        loop {
            let header = u32_at(&port, u16::from(at));
            if header & 0xff == 0x10 {
                // Version 2, root port, slot implemented.
                assert_eq!(header >> 16, 0x142);
                break;
            }
            at = (header >> 8) as u8;
            assert_ne!(at, 0, "no PCI Express capability");
        }
        let slot = u32_at(&port, u16::from(at) + 20);
        assert_eq!(slot >> 19, 5);
        assert_eq!(slot & 0x40, 0x40);
        // Nothing is present, the link is down.
        assert_eq!(u32_at(&port, u16::from(at) + 24) >> 16, 0);
        assert_eq!(u32_at(&port, u16::from(at) + 16) >> 16 & 0x2000, 0);
    }

    #[test]
    fn its_bar_decodes_only_while_memory_is_enabled() {
        let port = at(0);
        assert_eq!(port.windows().len(), 1);
        assert!(port.config_write(4, &[0, 0]));
        assert_eq!(port.windows(), []);
    }

    #[test]
    fn a_port_takes_over_what_a_guest_did_to_another_and_nothing_else() {
        let port = at(3);
        // Bus numbers, the power indicator, the vector.
        port.config_write(0x18, &[0, 9, 9]);
        port.write(0, 0, &0xfee0_1000u64.to_le_bytes());
        port.plug();
        port.ask_back();
        let state = port.save().unwrap();
        let other = at(3);
        other.plug();
        other.restore(&state).unwrap();
        assert_eq!(other.save().unwrap(), state);
        assert_eq!(other.secondary(), 9);
        // One whose slot is empty, and one in another place.
        for other in [at(3), at(4)] {
            assert!(other.restore(&state).is_err());
        }
    }
}
