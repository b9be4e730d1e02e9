// SPDX-License-Identifier: Apache-2.0
//! The interrupt routing table: which GSI raises which pin or which MSI.
//!
//! KVM replaces the whole table at a time (KVM_SET_GSI_ROUTING), so it is kept here: the fixed routes of
//! the 24 pins (to the 8259s and to the I/O APIC; the PIT's line 0 reaches pin 2, as on a PC) and the MSI routes
//! that devices ask for. A GSI without a route raises nothing, which is what a masked vector wants.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    kvm_irq_routing_entry, KvmIrqRouting, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI,
};
use kvm_ioctls::VmFd;

use crate::error::{Error, Kind, Result};
use crate::layout::GSI_MSI_FIRST;

/// KVM_MAX_IRQ_ROUTES of x86.
const ROUTES_MAX: u32 = 4096;

/// What a device writes to raise an MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// The 64-bit address: a local APIC.
    pub address: u64,
    /// Vector and delivery mode.
    pub data: u32,
}

/// The table of one VM.
pub struct Routing {
    vm: Arc<VmFd>,
    /// GSI to message; None for one that is taken but has no route.
    messages: Mutex<BTreeMap<u32, Option<MsiMessage>>>,
}

impl Routing {
    /// The table of a VM whose irqchip may yet have to be made: the pins, no MSI.
    pub fn new(vm: Arc<VmFd>) -> Routing {
        Routing {
            vm,
            messages: Mutex::new(BTreeMap::new()),
        }
    }

    /// Tells KVM the pins' routes, once the irqchip is there.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses the table.
    pub fn begin(&self) -> Result<()> {
        self.commit(&BTreeMap::new())
    }

    /// A GSI for an MSI vector, without a route yet.
    ///
    /// # Errors
    /// `Unavailable` when KVM's table could not hold one more.
    pub fn allocate(&self) -> Result<u32> {
        let mut messages = self.messages.lock().unwrap_or_else(|e| e.into_inner());
        // 40 entries go to the pins: 16 to the 8259s, 24 to the I/O APIC.
        let gsi = (GSI_MSI_FIRST..ROUTES_MAX - 40)
            .find(|gsi| !messages.contains_key(gsi))
            .ok_or_else(|| Error::new(Kind::Unavailable, "", "all interrupt routes are taken"))?;
        messages.insert(gsi, None);
        Ok(gsi)
    }

    /// Gives a GSI back; its route goes.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses the table.
    pub fn release(&self, gsi: u32) -> Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(|e| e.into_inner());
        match messages.remove(&gsi) {
            Some(Some(_)) => self.commit(&messages),
            _ => Ok(()),
        }
    }

    /// Routes a GSI to `message`, or nowhere (None: the vector is masked).
    ///
    /// # Errors
    /// `Internal` for a GSI that was not allocated; `Unavailable` when KVM refuses the table, which stays as it was.
    pub fn set(&self, gsi: u32, message: Option<MsiMessage>) -> Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(|e| e.into_inner());
        let slot = messages
            .get_mut(&gsi)
            .ok_or_else(|| Error::internal(format!("GSI {gsi} is not allocated")))?;
        if *slot == message {
            return Ok(());
        }
        let before = std::mem::replace(slot, message);
        let committed = self.commit(&messages);
        if committed.is_err() {
            // The guest chose the message. One that KVM refuses must not stay: every later table would hold it.
            messages.insert(gsi, before);
        }
        committed
    }

    fn commit(&self, messages: &BTreeMap<u32, Option<MsiMessage>>) -> Result<()> {
        let mut entries = pins();
        entries.extend(
            messages
                .iter()
                .filter_map(|(gsi, message)| Some(msi(*gsi, (*message)?))),
        );
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| Error::internal("the interrupt routing table is too long"))?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(|e| Error::kernel("KVM_SET_GSI_ROUTING", e))
    }
}

/// ISA lines 0 to 15 go to an 8259 and the I/O APIC, 16 to 23 to the latter; line 2 is the 8259s' cascade.
fn pins() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(64);
    for gsi in 0..GSI_MSI_FIRST {
        match gsi {
            0..=7 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            8..=15 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
            _ => {}
        }
        match gsi {
            0 => entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, 2)),
            2 => {}
            _ => entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
        }
    }
    entries
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

/// A pin of the interrupt controllers that one device drives.
pub struct Line {
    drive: Box<dyn Fn(bool) + Send + Sync>,
    level: Mutex<bool>,
}

impl Line {
    /// Pin `gsi` of `vm`, low.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Line {
        Line::with(move |level| {
            // KVM refuses only without an irqchip, and a machine has one before it has devices.
            let _ = vm.set_irq_line(gsi, level);
        })
    }

    /// A line that calls `drive` at each change.
    pub fn with(drive: impl Fn(bool) + Send + Sync + 'static) -> Line {
        Line {
            drive: Box::new(drive),
            level: Mutex::new(false),
        }
    }

    /// Drives the line; free if it has that level already.
    pub fn set(&self, level: bool) {
        let mut present = self.level.lock().unwrap_or_else(|e| e.into_inner());
        if *present != level {
            *present = level;
            (self.drive)(level);
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_enable_cap, KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS};

    use super::*;

    fn message(address: u64) -> Option<MsiMessage> {
        Some(MsiMessage {
            address,
            data: 0x31,
        })
    }

    /// With 32-bit APIC ids KVM takes no message whose upper address has any of its low 8 bits set.
    #[test]
    fn a_message_that_kvm_refuses_spoils_no_other_vector() {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("absent: /dev/kvm");
            return;
        }
        let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        cap.args[0] = u64::from(KVM_X2APIC_API_USE_32BIT_IDS);
        vm.enable_cap(&cap).unwrap();
        let routing = Routing::new(Arc::new(vm));
        routing.begin().unwrap();
        let (refused, other) = (routing.allocate().unwrap(), routing.allocate().unwrap());
        routing.set(refused, message(0xfee0_0000)).unwrap();

        let error = routing.set(refused, message(0xff_fee0_0000)).unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable);
        routing.set(other, message(0xfee0_1000)).unwrap();
        // It has what it had: setting that again changes nothing, another message is taken.
        let kept = *routing.messages.lock().unwrap().get(&refused).unwrap();
        assert_eq!(kept, message(0xfee0_0000));
        routing.set(refused, message(0xfee0_2000)).unwrap();
    }
}
