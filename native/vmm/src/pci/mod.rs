// SPDX-License-Identifier: Apache-2.0
//! PCI Express: bus 0 with the host bridge, the LPC bridge, root ports and endpoints.
//!
//! Where everything sits is part of the machine type, so that a guest finds its devices where they were.
//! Later kinds of device are appended; nothing moves. Functions of one device are told apart by the
//! definition's order, so functions without a gap.
//!
//! | device.function | what |
//! |---|---|
//! | 00.0 | host bridge, 8086:29c0 |
//! | 01.0 – 02.7 | disks 0 to 15 (virtio-blk), in the definition's order |
//! | 03.0 – 04.7 | network interfaces 0 to 15 (virtio-net), in the definition's order |
//! | 05.0 | random numbers (virtio-rng); the place is kept when there is none |
//! | 06.0 | balloon (virtio-balloon); the place is kept when there is none |
//! | 06.1 – 06.7 | free |
//! | 07.0 | SCSI host adapter (virtio-scsi); the place is kept when there is none |
//! | 07.1 – 07.7 | free |
//! | 08.0 | named ports (virtio-console); the place is kept when there are none |
//! | 08.1 – 08.7 | free |
//! | 09.0 | watchdog, 8086:25ab; the place is kept when there is none |
//! | 09.1 – 09.7 | free |
//! | 0a.0 | sockets (virtio-vsock); the place is kept when there are none |
//! | 0a.1 – 0a.7 | free |
//! | 0b.0 | kept for memory that comes while the machine runs (virtio-mem) |
//! | 0b.1 – 0f.7 | free |
//! | 10.0 – 10.7 | root ports for hotplug, slots 1 to 8, buses 1 to 8 |
//! | 11.0 – 11.7 | kept for eight more root ports, slots 9 to 16, buses 9 to 16 |
//! | 12.0 – 1e.7 | free |
//! | 1f.0 | LPC bridge, 8086:2918 |
//!
//! All BARs are assigned before the guest runs, since direct boot has no firmware that would:
//!
//! | addresses, from the 32-bit window's start | what |
//! |---|---|
//! | + 64 KiB × (8 × device + function) | the BAR of that function; 16 MiB in all |
//! | + 256 MiB + 32 MiB × n | the memory window of root port n |
//!
//! A device of the host's that is passed through sits in a slot; the windows leave room for sixteen. A TPM is no PCI device
//! ([`crate::layout::TPM_START`]).
//!
//! Root port n's prefetchable window is 16 GiB × n into the 64-bit window. A guest may move all of this:
//! [`root`] follows.

pub mod config;
pub mod host;
pub mod lpc;
pub mod msix;
pub mod option_rom;
pub mod root;
pub mod root_port;
pub mod watchdog;

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vm_memory::mmap::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::irq::{MsiMessage, Routing};
use crate::layout::{MMIO32_START, MMIO64_START};
use crate::slots::{self, Slots, Source, View};
use crate::state::Stateful;
use crate::vm::Vm;

/// Where a function sits on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

impl Place {
    /// The host bridge.
    pub const HOST: Place = Place::new(0, 0);
    /// The random number generator.
    pub const RNG: Place = Place::new(5, 0);
    /// The balloon.
    pub const BALLOON: Place = Place::new(6, 0);
    /// The SCSI host adapter.
    pub const SCSI: Place = Place::new(7, 0);
    /// The named ports.
    pub const PORTS: Place = Place::new(8, 0);
    /// The watchdog.
    pub const WATCHDOG: Place = Place::new(9, 0);
    /// Sockets.
    pub const VSOCK: Place = Place::new(0xa, 0);
    /// The LPC bridge.
    pub const LPC: Place = Place::new(0x1f, 0);

    const fn new(device: u8, function: u8) -> Place {
        Place { device, function }
    }

    /// Disk `index`, 0 to 15.
    pub const fn disk(index: u8) -> Place {
        Place::new(1 + index / 8, index % 8)
    }

    /// Network interface `index`, 0 to 15.
    pub const fn nic(index: u8) -> Place {
        Place::new(3 + index / 8, index % 8)
    }

    /// Root port `index`, 0 to 7.
    pub const fn root_port(index: u8) -> Place {
        Place::new(0x10, index)
    }

    /// Device and function as one byte, as configuration addresses have them.
    pub const fn devfn(self) -> u8 {
        self.device << 3 | self.function
    }

    /// The address its BAR has before the guest moves it.
    pub const fn bar_address(self) -> u64 {
        MMIO32_START + BAR_STRIDE * self.devfn() as u64
    }
}

/// Where a device sits for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seat {
    /// On bus 0, from the machine's start to its end.
    Bus0(Place),
    /// In the slot of root port `n`, 0 to 7: it may come and go.
    Slot(u8),
}

/// What [`Place::bar_address`] leaves to each function: no BAR here is larger.
pub const BAR_STRIDE: u64 = 0x1_0000;
/// How many root ports there are.
pub const ROOT_PORTS: u8 = 8;
/// Slots that devices of the host's can be passed through in: as many as the windows leave room for.
pub const PASSTHROUGH: u8 = 16;
/// The memory window of root port 0; the others follow.
pub const PORT_MEMORY: u64 = MMIO32_START + 0x1000_0000;
/// Bytes of each.
pub const PORT_MEMORY_SIZE: u64 = 0x200_0000;
/// The prefetchable window of root port 0; the others follow.
pub const PORT_PREFETCHABLE: u64 = MMIO64_START;
/// Bytes of each.
pub const PORT_PREFETCHABLE_SIZE: u64 = 0x4_0000_0000;

/// Memory that a function decodes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The BAR it belongs to.
    pub bar: u8,
    /// Its first guest-physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// A PCI function. Calls come from several vCPU threads at once.
pub trait Function: Stateful + Send + Sync {
    /// The guest reads 1, 2 or 4 bytes of configuration space; `register` and the end are below 4096.
    fn config_read(&self, register: u16, data: &mut [u8]);

    /// The guest writes configuration space; true if [`Function::windows`] may have changed.
    fn config_write(&self, register: u16, data: &[u8]) -> bool;

    /// What it decodes now: nothing while its command register says so.
    fn windows(&self) -> Vec<Window>;

    /// The guest reads 1 to 8 bytes within a BAR; `data` is all ones beforehand.
    fn read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes 1 to 8 bytes within a BAR.
    fn write(&self, bar: u8, offset: u64, data: &[u8]);

    /// Back to the state after power-on.
    fn reset(&self);
}

/// What functions need of KVM: doorbells that need no exit, and interrupts.
pub trait Wiring: Send + Sync {
    /// Guest writes at `address` are counted on `event` from now on.
    ///
    /// # Errors
    /// `Unavailable` when the address is taken; the write then arrives by [`Function::write`].
    fn watch(&self, event: &EventFd, address: u64) -> Result<()>;

    /// Takes that back.
    fn unwatch(&self, event: &EventFd, address: u64);

    /// Shows the guest `rom` at `base` as memory, or takes it away: the option ROM of the function at `seat`.
    ///
    /// # Errors
    /// `Unavailable` when something else is there; reads then arrive by [`Function::read`].
    fn show_rom(&self, seat: Seat, rom: Option<(u64, Arc<MmapRegion>)>) -> Result<()>;

    /// A GSI for an MSI.
    ///
    /// # Errors
    /// `Unavailable` when there is none left.
    fn allocate(&self) -> Result<u32>;

    /// Each write to `event` raises `gsi`.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses.
    fn connect(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// Takes that back, and the GSI may be allocated again.
    fn release(&self, event: &EventFd, gsi: u32);

    /// Says what raising `gsi` sends.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses.
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<()>;
}

/// The wiring of a real machine. It holds no bus, since buses hold functions, and those hold this.
pub struct KvmWiring {
    vm: Arc<VmFd>,
    irq: Arc<Routing>,
    slots: Arc<Slots>,
}

impl KvmWiring {
    /// The wiring of `vm`.
    pub fn new(vm: &Vm) -> KvmWiring {
        KvmWiring {
            vm: vm.fd.clone(),
            irq: vm.irq.clone(),
            slots: vm.slots.clone(),
        }
    }
}

impl Wiring for KvmWiring {
    fn watch(&self, event: &EventFd, address: u64) -> Result<()> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|e| Error::kernel("KVM_IOEVENTFD", e))
    }

    fn unwatch(&self, event: &EventFd, address: u64) {
        // It fails only for what was never registered.
        let _ = self
            .vm
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
    }

    fn show_rom(&self, seat: Seat, rom: Option<(u64, Arc<MmapRegion>)>) -> Result<()> {
        let number = match seat {
            Seat::Bus0(place) => u32::from(place.devfn()),
            Seat::Slot(index) => 256 + u32::from(index),
        };
        let slot = slots::OPTION_ROMS.saturating_add(number);
        let view = rom.map(|(base, memory)| View {
            base,
            size: memory.size() as u64,
            source: Source::Mapping(memory, 0),
            read_only: true,
        });
        self.slots.set(slot, view)
    }

    fn allocate(&self) -> Result<u32> {
        self.irq.allocate()
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.vm
            .register_irqfd(event, gsi)
            .map_err(|e| Error::kernel("KVM_IRQFD", e))
    }

    fn release(&self, event: &EventFd, gsi: u32) {
        // Both fail only for what was never connected.
        let _ = self.vm.unregister_irqfd(event, gsi);
        let _ = self.irq.release(gsi);
    }

    fn route(&self, gsi: u32, message: MsiMessage) -> Result<()> {
        self.irq.set(gsi, Some(message))
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! KVM's part, played by maps.

    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// A host bridge whose PAM nobody follows.
    pub fn host_bridge() -> Arc<super::host::HostBridge> {
        let ecam = crate::layout::ECAM_START;
        let pam = crate::firmware::shadow::ALL_RAM;
        Arc::new(super::host::HostBridge::new(ecam, pam, Box::new(|_| ())))
    }

    #[derive(Default)]
    pub struct FakeWiring(Mutex<State>);

    #[derive(Default)]
    struct State {
        doorbells: BTreeMap<u64, EventFd>,
        lines: BTreeMap<u32, (EventFd, Option<MsiMessage>)>,
        next: u32,
    }

    impl FakeWiring {
        /// The messages raised since the last call, as (address, data).
        pub fn raised(&self) -> Vec<(u64, u32)> {
            let state = self.0.lock().unwrap();
            let lines = state.lines.values();
            let fired = lines.filter(|(event, _)| event.read().is_ok());
            fired
                .filter_map(|(_, message)| message.map(|m| (m.address, m.data)))
                .collect()
        }

        /// Rings the doorbell at an address as KVM would; false if nothing is watched there.
        pub fn ring(&self, address: u64) -> bool {
            let state = self.0.lock().unwrap();
            let bell = state.doorbells.get(&address);
            bell.map(|event| event.write(1).unwrap()).is_some()
        }

        pub fn watched(&self) -> Vec<u64> {
            self.0.lock().unwrap().doorbells.keys().copied().collect()
        }
    }

    impl Wiring for FakeWiring {
        fn watch(&self, event: &EventFd, address: u64) -> Result<()> {
            let mut state = self.0.lock().unwrap();
            if state.doorbells.contains_key(&address) {
                return Err(Error::kernel("fake ioeventfd", "taken"));
            }
            state.doorbells.insert(address, event.try_clone().unwrap());
            Ok(())
        }
        fn unwatch(&self, _: &EventFd, address: u64) {
            self.0.lock().unwrap().doorbells.remove(&address);
        }
        fn show_rom(&self, _: Seat, _: Option<(u64, Arc<MmapRegion>)>) -> Result<()> {
            Ok(())
        }
        fn allocate(&self) -> Result<u32> {
            let mut state = self.0.lock().unwrap();
            state.next += 1;
            Ok(state.next)
        }
        fn connect(&self, event: &EventFd, gsi: u32) -> Result<()> {
            let event = event.try_clone().unwrap();
            self.0.lock().unwrap().lines.insert(gsi, (event, None));
            Ok(())
        }
        fn release(&self, _: &EventFd, gsi: u32) {
            self.0.lock().unwrap().lines.remove(&gsi);
        }
        fn route(&self, gsi: u32, message: MsiMessage) -> Result<()> {
            let mut state = self.0.lock().unwrap();
            state.lines.get_mut(&gsi).unwrap().1 = Some(message);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;

    #[test]
    fn places_and_windows_never_meet() {
        let mut places = vec![Place::HOST, Place::RNG, Place::LPC];
        for index in 0..16 {
            places.push(Place::disk(index));
            places.push(Place::nic(index));
        }
        places.extend((0..ROOT_PORTS).map(Place::root_port));
        let mut devfns: Vec<u8> = places.iter().map(|place| place.devfn()).collect();
        devfns.sort_unstable();
        devfns.dedup();
        assert_eq!(devfns.len(), places.len());
        assert!(Place::LPC.bar_address() + BAR_STRIDE <= PORT_MEMORY);
        let ports = u64::from(PASSTHROUGH);
        assert!(
            PORT_MEMORY + ports * PORT_MEMORY_SIZE <= MMIO32_START + crate::layout::MMIO32_SIZE
        );
        assert!(ports * PORT_PREFETCHABLE_SIZE <= crate::layout::MMIO64_SIZE);
        // What is kept for a TPM is nobody else's.
        let (tpm, end) = (layout::TPM_START, layout::TPM_START + layout::TPM_SIZE);
        let taken = [layout::PCI32_END, layout::IOAPIC_START + 0x1000];
        assert!(taken.iter().all(|others| *others <= tpm));
        let next = [layout::LAPIC_START, layout::IDENTITY_MAP];
        assert!(next.iter().all(|others| end <= *others));
    }
}
