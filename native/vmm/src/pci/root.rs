// SPDX-License-Identifier: Apache-2.0
//! The root complex: finds the function that a configuration or memory access is for.
//!
//! Configuration space is reached by ports 0xcf8/0xcfc (mechanism #1) and by the ECAM, whose place the host
//! bridge's PCIEXBAR says. All of the memory bus that is nobody else's comes here, and which function decodes
//! what in it is looked up here: first the ECAM, then the BARs. So firmware and guest may put either anywhere, even over
//! each other (the lowest function then wins, and nobody is harmed). What lies over RAM or the interrupt controllers
//! is never asked for.
//!
//! What is in a slot is function 0 of device 0 on the bus that the slot's root port says; it decodes only what
//! that port's windows pass on.
//!
//! Functions are called without a lock of this file held. The bus holds the root, which holds no bus.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, RwLock};

use serde::{Deserialize, Serialize};

use super::host::HostBridge;
use super::root_port::RootPort;
use super::{Function, Place, Window};
use crate::bus::{Bus, BusDevice};
use crate::error::{Error, Kind, Result};
use crate::layout::PCI32_START;
use crate::state::{self, State, Stateful};

/// A function's registers in the ECAM: 4 KiB.
const ECAM_FUNCTION: u64 = 0x1000;

/// A root port and what is plugged into its slot.
struct Slot {
    port: Arc<RootPort>,
    function: RwLock<Option<Arc<dyn Function>>>,
}

impl Slot {
    fn empty(port: Arc<RootPort>) -> Slot {
        Slot {
            port,
            function: RwLock::default(),
        }
    }

    fn function(&self) -> Option<Arc<dyn Function>> {
        let function = self.function.read().unwrap_or_else(|e| e.into_inner());
        function.clone()
    }
}

/// Bus 0 and what is on it, and the slots.
pub struct Root {
    host: Arc<HostBridge>,
    functions: Vec<(Place, Arc<dyn Function>)>,
    slots: Vec<Slot>,
    decoded: RwLock<Vec<(Window, Arc<dyn Function>)>>,
    /// What was written to port 0xcf8.
    address: AtomicU32,
    /// Where the ECAM is, and its size.
    ecam: RwLock<Option<(u64, u64)>>,
}

/// What the bus takes of the address space, for the tables that tell the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The ECAM and its size.
    pub ecam: Option<(u64, u64)>,
    /// From the first to behind the last BAR or bridge window above 4 GiB.
    pub high: Option<(u64, u64)>,
}

impl Root {
    /// A bus with the host bridge, `functions` and root ports with empty slots, whose memory is all of `mmio` that is nobody
    /// else's.
    ///
    /// # Errors
    /// `Internal` when two functions have one place.
    pub fn new(
        host: Arc<HostBridge>,
        mut functions: Vec<(Place, Arc<dyn Function>)>,
        ports: Vec<Arc<RootPort>>,
        mmio: &Bus,
    ) -> Result<Arc<Root>> {
        for (index, port) in (0..).zip(&ports) {
            functions.push((Place::root_port(index), port.clone()));
        }
        functions.push((Place::HOST, host.clone()));
        functions.sort_by_key(|(place, _)| *place);
        let places = functions.iter().map(|(place, _)| place);
        if places.clone().zip(places.skip(1)).any(|(a, b)| a == b) {
            return Err(Error::internal("two PCI functions have one place"));
        }
        let root = Arc::new(Root {
            host,
            functions,
            slots: ports.into_iter().map(Slot::empty).collect(),
            decoded: RwLock::default(),
            address: AtomicU32::new(0),
            ecam: RwLock::new(None),
        });
        mmio.set_fallback(Arc::new(Memory(root.clone())));
        root.place_ecam();
        root.decode();
        Ok(root)
    }

    /// What it takes now.
    pub fn taken(&self) -> Taken {
        let high = self.functions.iter().flat_map(|(_, function)| {
            let bars = function.windows().into_iter();
            bars.map(|window| (window.base, window.base.saturating_add(window.size)))
                .chain(prefetchable_window(function.as_ref()))
        });
        Taken {
            ecam: *self.ecam.read().unwrap_or_else(|e| e.into_inner()),
            high: high
                .filter(|(base, _)| *base >= 1 << 32)
                .reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))),
        }
    }

    /// Ports 0xcf8 to 0xcff, for whoever has the reset control register among them.
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(Arc::clone(self)))
    }

    /// Back to the state after power-on: every function, the ECAM and the address port.
    pub fn reset(&self) {
        for (_, function) in &self.functions {
            function.reset();
        }
        for function in self.slots.iter().filter_map(Slot::function) {
            function.reset();
        }
        self.address.store(0, Ordering::Relaxed);
        self.place_ecam();
        self.decode();
    }

    /// Puts a function into slot `index`, and tells the guest.
    ///
    /// # Errors
    /// `InvalidState` when it is taken, `Internal` when there is no such slot.
    pub fn plug(&self, index: u8, function: Arc<dyn Function>) -> Result<()> {
        let slot = self.slot(index)?;
        {
            let mut place = slot.function.write().unwrap_or_else(|e| e.into_inner());
            if place.is_some() {
                let message = format!("slot {} has a device", u16::from(index) + 1);
                return Err(Error::new(Kind::InvalidState, "slot", message));
            }
            *place = Some(function);
        }
        self.decode();
        slot.port.plug();
        Ok(())
    }

    /// Takes a function out of its slot, and tells the guest.
    pub fn unplug(&self, index: u8) -> Option<Arc<dyn Function>> {
        let slot = self.slot(index).ok()?;
        let function = slot
            .function
            .write()
            .unwrap_or_else(|e| e.into_inner())
            .take()?;
        self.decode();
        slot.port.unplug();
        Some(function)
    }

    fn slot(&self, index: u8) -> Result<&Slot> {
        self.slots
            .get(usize::from(index))
            .ok_or_else(|| Error::internal(format!("there is no slot with index {index}")))
    }

    fn function(&self, bus: u8, devfn: u8) -> Option<Arc<dyn Function>> {
        if bus != 0 {
            let mut slots = self.slots.iter().filter(|_| devfn == 0);
            return slots
                .find(|slot| slot.port.secondary() == bus)
                .and_then(Slot::function);
        }
        let found = self
            .functions
            .binary_search_by_key(&devfn, |(place, _)| place.devfn());
        found
            .ok()
            .and_then(|index| self.functions.get(index))
            .map(|(_, function)| function.clone())
    }

    fn config_read(&self, bus: u8, devfn: u8, register: u16, data: &mut [u8]) {
        if let Some(function) = self.function(bus, devfn) {
            function.config_read(register, data);
        }
    }

    fn config_write(&self, bus: u8, devfn: u8, register: u16, data: &[u8]) {
        let Some(function) = self.function(bus, devfn) else {
            return;
        };
        if function.config_write(register, data) {
            self.decode();
        }
        if (bus, devfn) == (0, Place::HOST.devfn()) && HostBridge::places_ecam(register, data.len())
        {
            self.place_ecam();
        }
    }

    /// Asks all functions what they decode.
    fn decode(&self) {
        let mut decoded = self.decoded.write().unwrap_or_else(|e| e.into_inner());
        decoded.clear();
        for (_, function) in &self.functions {
            for window in function.windows() {
                decoded.push((window, Arc::clone(function)));
            }
        }
        for slot in &self.slots {
            let Some(function) = slot.function() else {
                continue;
            };
            for window in function.windows() {
                if slot.port.forwards(window.base, window.size) {
                    decoded.push((window, Arc::clone(&function)));
                }
            }
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u8, u64, Arc<dyn Function>)> {
        let decoded = self.decoded.read().unwrap_or_else(|e| e.into_inner());
        decoded.iter().find_map(|(window, function)| {
            let offset = address.checked_sub(window.base)?;
            let end = offset.checked_add(len as u64)?;
            (end <= window.size).then(|| (window.bar, offset, Arc::clone(function)))
        })
    }

    fn place_ecam(&self) {
        *self.ecam.write().unwrap_or_else(|e| e.into_inner()) = self.host.ecam();
    }

    /// The offset in the ECAM, if `address` lies in it.
    fn in_ecam(&self, address: u64) -> Option<u64> {
        let (base, size) = (*self.ecam.read().unwrap_or_else(|e| e.into_inner()))?;
        address.checked_sub(base).filter(|offset| *offset < size)
    }
}

/// What the whole bus remembers: each function by its place, those in slots by the slot's number.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    address: u32,
    functions: BTreeMap<String, State>,
}

impl Root {
    /// All functions, by a name that their place gives them.
    fn named(&self) -> Vec<(String, Arc<dyn Function>)> {
        let fixed = self.functions.iter().map(|(place, function)| {
            let name = format!("{:02x}.{}", place.device, place.function);
            (name, Arc::clone(function))
        });
        let slots = (1..).zip(&self.slots);
        let plugged = slots.filter_map(|(number, slot): (u8, _)| {
            Some((format!("slot-{number}"), slot.function()?))
        });
        fixed.chain(plugged).collect()
    }
}

impl Stateful for Root {
    fn save(&self) -> Result<State> {
        let functions = self.named().into_iter().map(|(name, function)| {
            let state = function.save().map_err(state::about(&name))?;
            Ok((name, state))
        });
        state::write(&Saved {
            address: self.address.load(Ordering::Relaxed),
            functions: functions.collect::<Result<_>>()?,
        })
    }

    /// The functions must be the same; where they are is restored with them.
    fn restore(&self, state: &State) -> Result<()> {
        let mut saved: Saved = state::read(state)?;
        self.address
            .store(saved.address & 0x80ff_fffc, Ordering::Relaxed);
        for (name, function) in self.named() {
            let state = saved.functions.remove(&name);
            let state = state.ok_or_else(|| state::invalid(format!("PCI {name} is missing")))?;
            function.restore(&state).map_err(state::about(&name))?;
        }
        if let Some((name, _)) = saved.functions.first_key_value() {
            return Err(state::invalid(format!("PCI {name} is not in this machine")));
        }
        self.place_ecam();
        self.decode();
        Ok(())
    }
}

/// What a bridge forwards above 4 GiB (PCI-to-PCI Bridge Architecture 1.2, 3.2.5.9): from, and behind the last.
fn prefetchable_window(function: &dyn Function) -> Option<(u64, u64)> {
    let mut header = [0];
    function.config_read(0x0e, &mut header);
    if header[0] & 0x7f != 1 {
        return None;
    }
    let mut halves = [0; 4];
    function.config_read(0x24, &mut halves);
    let (mut base_high, mut last_high) = ([0; 4], [0; 4]);
    function.config_read(0x28, &mut base_high);
    function.config_read(0x2c, &mut last_high);
    let [base0, base1, last0, last1] = halves;
    let whole = |low: u16, high: [u8; 4]| {
        u64::from(u32::from_le_bytes(high)) << 32 | u64::from(low & 0xfff0) << 16
    };
    let base = whole(u16::from_le_bytes([base0, base1]), base_high);
    let last = whole(u16::from_le_bytes([last0, last1]), last_high) | 0xf_ffff;
    (base <= last).then(|| (base, last.saturating_add(1)))
}

/// Ports 0xcf8 to 0xcff.
struct ConfigPorts(Arc<Root>);

impl ConfigPorts {
    /// The function and register that a data access is for, if the address port enables it.
    fn target(&self, offset: u64, len: usize) -> Option<(u8, u8, u16)> {
        let address = self.0.address.load(Ordering::Relaxed);
        let within = offset.checked_sub(4)?;
        if address >> 31 == 0 || within.saturating_add(len as u64) > 4 {
            return None;
        }
        let [register, devfn, bus, _] = address.to_le_bytes();
        Some((bus, devfn, u16::from(register & 0xfc) | within as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            *data = self.0.address.load(Ordering::Relaxed).to_le_bytes();
        } else if let Some((bus, devfn, register)) = self.target(offset, data.len()) {
            self.0.config_read(bus, devfn, register, data);
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        if let (0, Ok(data)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0
                .address
                .store(u32::from_le_bytes(data) & 0x80ff_fffc, Ordering::Relaxed);
        } else if let Some((bus, devfn, register)) = self.target(offset, data.len()) {
            self.0.config_write(bus, devfn, register, data);
        }
    }
}

/// Bus, device, function and register that an offset into the ECAM means.
fn ecam_target(offset: u64, len: usize) -> Option<(u8, u8, u16)> {
    let register = offset % ECAM_FUNCTION;
    if !matches!(len, 1 | 2 | 4) || register + len as u64 > ECAM_FUNCTION {
        return None;
    }
    Some(((offset >> 20) as u8, (offset >> 12) as u8, register as u16))
}

/// All memory that is nobody else's: the ECAM and the BARs. Its base is 0, so offsets are addresses.
struct Memory(Arc<Root>);

impl BusDevice for Memory {
    fn read(&self, _base: u64, address: u64, data: &mut [u8]) {
        if let Some(offset) = self.0.in_ecam(address) {
            if let Some((bus, devfn, register)) = ecam_target(offset, data.len()) {
                self.0.config_read(bus, devfn, register, data);
            }
        } else if let Some((bar, offset, function)) = self.0.find(address, data.len()) {
            function.read(bar, offset, data);
        }
    }

    fn write(&self, _base: u64, address: u64, data: &[u8]) {
        if let Some(offset) = self.0.in_ecam(address) {
            if let Some((bus, devfn, register)) = ecam_target(offset, data.len()) {
                self.0.config_write(bus, devfn, register, data);
            }
        } else if let Some((bar, offset, function)) = self.0.find(address, data.len()) {
            function.write(bar, offset, data);
        }
    }
}

/// Whether `size` bytes at `base` are where a BAR is meant to lie: above low RAM.
pub fn in_window(base: u64, size: u64) -> bool {
    base >= PCI32_START && base.checked_add(size).is_some()
}

#[cfg(test)]
mod tests {
    use super::super::lpc::LpcBridge;
    use super::super::testing::{host_bridge, FakeWiring};
    use super::*;
    use crate::config::MachineType;
    use crate::layout::{ECAM_START, MMIO32_START, PCI_CONFIG};

    struct Fixture {
        pio: Bus,
        mmio: Arc<Bus>,
        root: Arc<Root>,
    }

    fn fixture() -> Fixture {
        let wiring = Arc::new(FakeWiring::default());
        let (pio, mmio) = (Bus::new(), Arc::new(Bus::new()));
        let functions: Vec<(Place, Arc<dyn Function>)> =
            vec![(Place::LPC, Arc::new(LpcBridge::new(MachineType::Two)))];
        let ports = (0..2).map(|index| {
            let port = RootPort::new(wiring.clone(), index, Arc::new(|_| {}));
            Arc::new(port.unwrap())
        });
        let root = Root::new(host_bridge(), functions, ports.collect(), &mmio).unwrap();
        pio.insert(PCI_CONFIG, 8, root.config_ports()).unwrap();
        Fixture { pio, mmio, root }
    }

    impl Fixture {
        fn port(&self, address: u32, len: usize) -> u32 {
            assert!(self.pio.write(0xcf8, &address.to_le_bytes()));
            let mut data = [0; 4];
            self.pio
                .read(0xcfc + u64::from(address & 3), &mut data[..len]);
            u32::from_le_bytes(data)
        }

        fn memory(&self, address: u64) -> u32 {
            let mut data = [0; 4];
            self.mmio.read(address, &mut data);
            u32::from_le_bytes(data)
        }
    }

    #[test]
    fn both_mechanisms_reach_the_same_functions() {
        let f = fixture();
        assert_eq!(f.port(0x8000_0000, 4), 0x29c0_8086);
        assert_eq!(f.port(0x8000_f800, 4), 0x2918_8086);
        assert_eq!(f.port(0x8000_f802, 2), 0x2918);
        assert_eq!(f.memory(ECAM_START), 0x29c0_8086);
        assert_eq!(f.memory(ECAM_START + (0xf8 << 12)), 0x2918_8086);
        assert_eq!(f.memory(ECAM_START + (0x81 << 12)), 0x000c_1b36);
        assert_eq!(f.memory(ECAM_START + (0x81 << 12) + 0x100), 0);
    }

    #[test]
    fn absent_functions_and_buses_read_ones() {
        let f = fixture();
        for address in [
            ECAM_START + (1 << 12),
            ECAM_START + (1 << 20),
            ECAM_START + (0xff << 20),
        ] {
            assert_eq!(f.memory(address), u32::MAX, "{address:#x}");
        }
        assert_eq!(f.port(0x8001_0000, 4), u32::MAX);
        assert_eq!(f.port(0x0000_0000, 4), u32::MAX);
    }

    #[test]
    fn the_ecam_follows_pciexbar() {
        let f = fixture();
        f.pio.write(0xcf8, &0x8000_0060u32.to_le_bytes());
        f.pio.write(0xcfc, &0xa000_0001u32.to_le_bytes());
        assert_eq!(f.memory(ECAM_START), u32::MAX);
        assert_eq!(f.memory(0xa000_0000), 0x29c0_8086);
        f.root.reset();
        assert_eq!(f.memory(ECAM_START), 0x29c0_8086);
        assert_eq!(f.memory(0xa000_0000), u32::MAX);
    }

    #[test]
    fn an_ecam_over_bars_hides_them_until_it_moves_on() {
        let f = fixture();
        let bar = Place::root_port(0).bar_address();
        assert_eq!(f.memory(bar + 12), 1);
        let target = MMIO32_START as u32 | 1;
        f.mmio.write(ECAM_START + 0x60, &target.to_le_bytes());
        assert_eq!(f.memory(ECAM_START), u32::MAX);
        assert_eq!(f.memory(MMIO32_START), 0x29c0_8086);
        assert_ne!(f.memory(bar + 12), 1);
        f.mmio
            .write(MMIO32_START + 0x60, &0xe000_0001u32.to_le_bytes());
        assert_eq!(f.memory(0xe000_0000), 0x29c0_8086);
        assert_eq!(f.memory(bar + 12), 1);
    }

    #[test]
    fn what_is_taken_above_4_gib_follows_bars_and_bridge_windows() {
        let f = fixture();
        let ports = |first: u64, last: u64| Some((first << 32, last << 32));
        let taken = f.root.taken();
        assert_eq!(taken.ecam, Some((ECAM_START, 0x1000_0000)));
        assert_eq!(taken.high, ports(0x80, 0x88));
        let config = ECAM_START + (0x80 << 12);
        // Root port 0's window is closed, port 1's stays; a BAR of port 0 goes far up.
        f.mmio.write(config + 0x24, &0x0000_fff0u32.to_le_bytes());
        f.mmio.write(config + 0x2c, &[0; 4]);
        assert_eq!(f.root.taken().high, ports(0x84, 0x88));
        f.mmio.write(config + 0x14, &0x100u32.to_le_bytes());
        let (first, end) = f.root.taken().high.unwrap();
        assert_eq!((first, end >> 32), (0x84 << 32, 0x100));
    }

    #[test]
    fn a_moved_bar_is_found_at_its_new_place_only() {
        let f = fixture();
        let old = Place::root_port(1).bar_address();
        // The MSI-X entry's mask bit.
        assert_eq!(f.memory(old + 12), 1);
        let config = ECAM_START + (0x81 << 12);
        f.mmio.write(config + 0x10, &0xcfff_0000u32.to_le_bytes());
        assert_eq!(f.memory(old + 12), u32::MAX);
        assert_eq!(f.memory(0xcfff_000c), 1);
        f.mmio.write(config + 0x14, &0x81u32.to_le_bytes());
        assert_eq!(f.memory(0x81_cfff_000c), 1);
        f.mmio.write(config + 4, &[0, 0]);
        assert_eq!(f.memory(0x81_cfff_000c), u32::MAX);
    }

    #[test]
    fn bars_over_each_other_harm_nobody() {
        let f = fixture();
        let first = Place::root_port(0).bar_address();
        let config = ECAM_START + (0x81 << 12);
        f.mmio.write(config + 0x10, &(first as u32).to_le_bytes());
        f.mmio.write(first + 8, &0x1234u32.to_le_bytes());
        assert_eq!(f.memory(first + 8), 0x1234);
        f.mmio.write(config + 0x10, &0xcfff_0000u32.to_le_bytes());
        assert_eq!(f.memory(0xcfff_0008), 0);
        assert_eq!(f.memory(first + 8), 0x1234);
    }

    #[test]
    fn accesses_that_no_register_fits_read_ones() {
        let f = fixture();
        let mut data = [0; 8];
        f.mmio.read(ECAM_START, &mut data);
        assert_eq!(data, [0xff; 8]);
        let mut data = [0; 4];
        f.mmio.read(ECAM_START + 0xffe, &mut data);
        assert_eq!(data, [0xff; 4]);
        f.pio.read(0xcfd, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(in_window(MMIO32_START, 0x1000));
        assert!(!in_window(PCI32_START - 1, 0x1000));
        assert!(!in_window(u64::MAX, 1));
    }
}
