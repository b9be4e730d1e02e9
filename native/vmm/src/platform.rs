// SPDX-License-Identifier: Apache-2.0
//! The board: KVM's interrupt controllers and timer, the legacy devices, and what firmware leaves in memory.
//!
//! Made once; [`Platform::reset`] brings all of it back to the state after power-on, with the kernel loaded anew.

use std::sync::{Arc, Mutex};

use kvm_bindings::{
    kvm_irqchip, kvm_pit_config, kvm_pit_state2, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::VmFd;

use crate::boot::Boot;
use crate::cpu::entry::Entry;
use crate::error::{Error, Result};
use crate::layout;
use crate::legacy::cmos::Cmos;
use crate::legacy::i8042::I8042;
use crate::legacy::pm::PowerManagement;
use crate::legacy::reset_control::ResetControl;
use crate::legacy::serial::Serial;
use crate::vm::Vm;

/// Makes KVM's irqchip and PIT. Before any vCPU, so that each gets its local APIC.
///
/// # Errors
/// `Unavailable` when KVM refuses.
pub fn create_irqchip(vm: &VmFd) -> Result<()> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(|e| Error::kernel("KVM_SET_IDENTITY_MAP_ADDR", e))?;
    vm.set_tss_address(layout::TSS as usize)
        .map_err(|e| Error::kernel("KVM_SET_TSS_ADDR", e))?;
    vm.create_irq_chip()
        .map_err(|e| Error::kernel("KVM_CREATE_IRQCHIP", e))?;
    // Port 0x61, which old timer code reads, is part of it.
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(|e| Error::kernel("KVM_CREATE_PIT2", e))
}

/// The interrupt controllers and the PIT as KVM made them.
struct Chips {
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
}

impl Chips {
    fn read(vm: &VmFd) -> Result<Chips> {
        let irqchips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(|e| Error::kernel("KVM_GET_IRQCHIP", e))?;
            Ok(chip)
        })
        .collect::<Result<_>>()?;
        let pit = vm
            .get_pit2()
            .map_err(|e| Error::kernel("KVM_GET_PIT2", e))?;
        Ok(Chips { irqchips, pit })
    }

    fn restore(&self, vm: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip)
                .map_err(|e| Error::kernel("KVM_SET_IRQCHIP", e))?;
        }
        vm.set_pit2(&self.pit)
            .map_err(|e| Error::kernel("KVM_SET_PIT2", e))
    }
}

/// The legacy devices of a machine.
pub struct Legacy {
    /// COM1.
    pub serial: Arc<Serial>,
    /// The power management block.
    pub pm: Arc<PowerManagement>,
    /// The real-time clock.
    pub cmos: Arc<Cmos>,
    /// The keyboard controller.
    pub i8042: Arc<I8042>,
    /// Port 0xcf9.
    pub reset_control: Arc<ResetControl>,
}

impl Legacy {
    /// Puts each at its ports.
    ///
    /// # Errors
    /// `InvalidArgument` when a range is taken.
    pub fn insert(&self, vm: &Vm) -> Result<()> {
        let pio = &vm.pio;
        pio.insert(layout::COM1, 8, Arc::clone(&self.serial) as _)?;
        pio.insert(layout::PM_BASE, layout::PM_SIZE, Arc::clone(&self.pm) as _)?;
        pio.insert(layout::CMOS, 2, Arc::clone(&self.cmos) as _)?;
        pio.insert(layout::I8042_DATA, 1, Arc::clone(&self.i8042) as _)?;
        pio.insert(layout::I8042_COMMAND, 1, Arc::clone(&self.i8042) as _)?;
        pio.insert(layout::PCI_CONFIG, 8, Arc::clone(&self.reset_control) as _)
    }
}

/// The board of one machine.
pub struct Platform {
    vm: Vm,
    chips: Chips,
    /// COM1.
    pub serial: Arc<Serial>,
    /// The power management block.
    pub pm: Arc<PowerManagement>,
    cmos: Arc<Cmos>,
    i8042: Arc<I8042>,
    reset_control: Arc<ResetControl>,
    boot: Boot,
    /// The ACPI tables, as they lie in memory from their address on.
    tables: Vec<(u64, Vec<u8>)>,
    entry: Arc<Mutex<Option<Entry>>>,
}

impl Platform {
    /// Takes everything together. Memory is not yet written: the first [`Platform::reset`] does that.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell its chips' state.
    pub fn new(
        vm: Vm,
        legacy: Legacy,
        boot: Boot,
        tables: Vec<(u64, Vec<u8>)>,
        entry: Arc<Mutex<Option<Entry>>>,
    ) -> Result<Platform> {
        Ok(Platform {
            chips: Chips::read(&vm.fd)?,
            vm,
            serial: legacy.serial,
            pm: legacy.pm,
            cmos: legacy.cmos,
            i8042: legacy.i8042,
            reset_control: legacy.reset_control,
            boot,
            tables,
            entry,
        })
    }

    /// Everything back to the state after power-on; the vCPUs stand, and are reset afterwards.
    ///
    /// # Errors
    /// What [`Boot::load`] says about the files, or `Unavailable` when KVM refuses.
    pub fn reset(&self) -> Result<()> {
        self.serial.reset();
        self.pm.reset();
        self.cmos.reset();
        self.i8042.reset();
        self.reset_control.reset();
        self.chips.restore(&self.vm.fd)?;
        for (address, table) in &self.tables {
            crate::boot::write(&self.vm.memory, *address, table)?;
        }
        let entry = self.boot.load(&self.vm.memory)?;
        *self.entry.lock().unwrap_or_else(|e| e.into_inner()) = Some(entry);
        Ok(())
    }
}
