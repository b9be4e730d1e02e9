// SPDX-License-Identifier: Apache-2.0
//! The board: KVM's interrupt controllers and timer, the legacy devices, and what firmware leaves in memory.
//!
//! Made once; [`Platform::reset`] brings all of it back to the state after power-on, with the kernel loaded anew.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::acpi;
use crate::boot::Boot;
use crate::cpu::entry::Entry;
use crate::error::{Error, Kind, Result};
use crate::firmware::loader;
use crate::layout;
use crate::legacy::cmos::Cmos;
use crate::legacy::fw_cfg::FwCfg;
use crate::legacy::i8042::I8042;
use crate::legacy::pm::PowerManagement;
use crate::legacy::port92::Port92;
use crate::legacy::pvpanic::PvPanic;
use crate::legacy::reset_control::ResetControl;
use crate::legacy::serial::Serial;
use crate::state::{self, bytes_of, from_bytes, Bytes, Plain, State, Stateful};
use crate::vm::Vm;

/// The general purpose event that says that the generation ID is new; the DSDT's `_E05`.
const GENERATION_EVENT: u8 = 5;

/// Makes KVM's irqchip and PIT, with the pins' routes. Before any vCPU, so that each gets its local APIC.
///
/// # Errors
/// `Unavailable` when KVM refuses.
pub fn create_irqchip(vm: &Vm) -> Result<()> {
    let fd = &vm.fd;
    fd.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(|e| Error::kernel("KVM_SET_IDENTITY_MAP_ADDR", e))?;
    fd.set_tss_address(layout::TSS as usize)
        .map_err(|e| Error::kernel("KVM_SET_TSS_ADDR", e))?;
    fd.create_irq_chip()
        .map_err(|e| Error::kernel("KVM_CREATE_IRQCHIP", e))?;
    // Port 0x61, which old timer code reads, is part of it.
    fd.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(|e| Error::kernel("KVM_CREATE_PIT2", e))?;
    vm.irq.begin()
}

// SAFETY: structures of numbers, whose gaps are fields (include/uapi/asm/kvm.h).
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_pit_state2 {}

/// What the board remembers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    /// Both 8259s and the I/O APIC.
    irqchips: Vec<Bytes>,
    pit: Bytes,
    /// kvm-clock, in nanoseconds; None where KVM does not tell.
    clock: Option<u64>,
    /// Legacy devices by their name.
    parts: BTreeMap<String, State>,
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
    /// The firmware configuration device.
    pub fw_cfg: Arc<FwCfg>,
    /// The A20 gate and the fast reset.
    pub port92: Arc<Port92>,
    /// The port of a panicking kernel.
    pub pvpanic: Arc<PvPanic>,
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
        pio.insert(layout::PORT_92, 1, Arc::clone(&self.port92) as _)?;
        pio.insert(layout::PVPANIC, 1, Arc::clone(&self.pvpanic) as _)?;
        pio.insert(
            layout::FW_CFG,
            layout::FW_CFG_SIZE,
            Arc::clone(&self.fw_cfg) as _,
        )?;
        pio.insert(layout::PCI_CONFIG, 8, Arc::clone(&self.reset_control) as _)
    }
}

/// How a machine begins.
pub enum Start {
    /// At the reset vector, where firmware is.
    Firmware,
    /// With a kernel in memory.
    Kernel {
        /// The kernel.
        boot: Boot,
        /// What firmware would leave in memory, each piece with its address.
        tables: Vec<(u64, Vec<u8>)>,
    },
}

/// The board of one machine.
pub struct Platform {
    vm: Vm,
    chips: Chips,
    /// COM1.
    pub serial: Arc<Serial>,
    /// The power management block.
    pub pm: Arc<PowerManagement>,
    /// The clock.
    pub(crate) cmos: Arc<Cmos>,
    i8042: Arc<I8042>,
    reset_control: Arc<ResetControl>,
    fw_cfg: Arc<FwCfg>,
    start: Start,
    entry: Arc<Mutex<Option<Entry>>>,
}

impl Platform {
    /// What it is made on.
    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Gives the machine a new generation ID and tells the guest. Whoever makes the guest's past another's calls this:
    /// a restore, a revert, a clone; before the vCPUs go on.
    ///
    /// # Errors
    /// `InvalidState` when firmware has not yet said where the ID lies: then no system has read the old one.
    pub fn renew_generation(&self, id: [u8; 16]) -> Result<()> {
        let address = match &self.start {
            Start::Kernel { .. } => acpi::GENERATION_PAGE.saturating_add(acpi::GENERATION_OFFSET),
            Start::Firmware => {
                let written = self.fw_cfg.written(loader::GENERATION_ADDRESS);
                let address = written.and_then(|bytes| bytes.try_into().ok());
                address
                    .map(u64::from_le_bytes)
                    .filter(|address| *address != 0)
                    .ok_or_else(|| {
                        let message = "the firmware has not placed the generation ID yet";
                        Error::new(Kind::InvalidState, "", message)
                    })?
            }
        };
        crate::boot::write(&self.vm.memory, address, &id)?;
        self.pm.raise_event(GENERATION_EVENT);
        Ok(())
    }

    /// What remembers, in the order in which it is restored.
    fn parts(&self) -> [(&'static str, &dyn Stateful); 6] {
        [
            ("serial", self.serial.as_ref()),
            ("power", self.pm.as_ref()),
            ("clock", self.cmos.as_ref()),
            ("keyboard", self.i8042.as_ref()),
            ("reset", self.reset_control.as_ref()),
            ("fw-cfg", self.fw_cfg.as_ref()),
        ]
    }

    /// What the board remembers; the vCPUs stand.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell.
    pub fn save(&self) -> Result<PlatformState> {
        let chips = Chips::read(&self.vm.fd)?;
        let parts = self.parts().into_iter();
        Ok(PlatformState {
            irqchips: chips.irqchips.iter().map(bytes_of).collect(),
            pit: bytes_of(&chips.pit),
            clock: self.vm.fd.get_clock().ok().map(|clock| clock.clock),
            parts: parts
                .map(|(name, part)| Ok((name.to_owned(), part.save()?)))
                .collect::<Result<_>>()?,
        })
    }

    /// Takes over what another board remembered, `passed` nanoseconds later. After the vCPUs, before the devices.
    ///
    /// # Errors
    /// `ImageInvalid` for state that is none; `Unavailable` when KVM refuses it.
    pub fn restore(&self, saved: &PlatformState, passed: u64) -> Result<()> {
        let irqchips = saved.irqchips.iter().map(from_bytes::<kvm_irqchip>);
        let irqchips: Vec<kvm_irqchip> = irqchips.collect::<Result<_>>()?;
        let own = self.chips.irqchips.iter().map(|chip| chip.chip_id);
        if !own.eq(irqchips.iter().map(|chip| chip.chip_id)) {
            return Err(state::invalid("other interrupt controllers"));
        }
        let pit = from_bytes(&saved.pit)?;
        Chips { irqchips, pit }.restore(&self.vm.fd)?;
        if let Some(clock) = saved.clock {
            let clock = kvm_clock_data {
                clock: clock.saturating_add(passed),
                ..Default::default()
            };
            self.vm
                .fd
                .set_clock(&clock)
                .map_err(|e| Error::kernel("KVM_SET_CLOCK", e))?;
        }
        let mut states = saved.parts.clone();
        for (name, part) in self.parts() {
            let state = states.remove(name);
            let state = state.ok_or_else(|| state::invalid(format!("{name} is missing")))?;
            part.restore(&state).map_err(state::about(name))?;
        }
        if let Some((name, _)) = states.first_key_value() {
            return Err(state::invalid(format!("{name} is not known")));
        }
        self.pm.pass(passed);
        Ok(())
    }

    /// Takes everything together. Memory is not yet written: the first [`Platform::reset`] does that.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell its chips' state.
    pub fn new(
        vm: Vm,
        legacy: Legacy,
        start: Start,
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
            fw_cfg: legacy.fw_cfg,
            start,
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
        self.fw_cfg.reset();
        self.chips.restore(&self.vm.fd)?;
        let entry = match &self.start {
            Start::Firmware => Entry::Reset,
            Start::Kernel { boot, tables } => {
                for (address, table) in tables {
                    crate::boot::write(&self.vm.memory, *address, table)?;
                }
                boot.load(&self.vm.memory)?
            }
        };
        *self.entry.lock().unwrap_or_else(|e| e.into_inner()) = Some(entry);
        Ok(())
    }
}
