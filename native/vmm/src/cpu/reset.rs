// SPDX-License-Identifier: Apache-2.0
//! A vCPU's reset state: read from KVM once, when the vCPU is new, and set again at each reset.
//!
//! KVM has no "reset" of its own. What it gives a new vCPU *is* the reset state, so all of it is read back
//! and kept. MSRs are those of the CPU model, with its values ([`super::msr`]); for the model `host` as many as KVM
//! lists, reads and takes back (some back ends list MSRs that they refuse). The time stamp counter is set to 0, which makes
//! KVM bring all vCPUs' counters into step.

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave, Msrs, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
};
use kvm_ioctls::VcpuFd;

use crate::cpu::cpuid::Vendor;
use crate::cpu::entry::Entry;
use crate::cpu::msr as model;
use crate::error::{Error, Result};

/// The time stamp counter.
pub const MSR_TSC: u32 = 0x10;
/// What was added to it.
pub const MSR_TSC_ADJUST: u32 = 0x3b;
/// When the local APIC's timer fires next.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;

/// What firmware leaves behind for a kernel that is entered directly: memory is write-back where page tables do not say
/// otherwise (Linux does without PAT when the MTRRs are off).
const WRITE_BACK: u64 = 1 << 11 | 6;

/// Registers that KVM lists but whose written value means an action, or that follow others.
const NOT_KEPT: [u32; 3] = [
    MSR_TSC,          // set to 0 instead
    MSR_TSC_DEADLINE, // part of the local APIC, disarmed by its reset
    MSR_TSC_ADJUST,   // set to 0 by writing the counter
];

/// Which MSRs a vCPU has.
#[derive(Clone, Copy, Debug)]
pub enum Registers<'a> {
    /// Of these, KVM_GET_MSR_INDEX_LIST, those that can be kept.
    Listed(&'a [u32]),
    /// Those of the named models of a vendor.
    Model(Vendor),
}

/// Whether firmware runs in the guest, or has run as far as the guest can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// It is to run.
    Ahead,
    /// A kernel is entered directly.
    Done,
}

/// What a new vCPU has.
pub struct ResetState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    /// All vector state; it includes what `fpu` has. None on a host without XSAVE.
    xsave: Option<Box<kvm_xsave>>,
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
}

impl ResetState {
    /// Reads the state of a vCPU that has its CPUID and has never run.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell; `NotSupported` when it has not the registers of the model.
    pub fn read(vcpu: &VcpuFd, registers: Registers<'_>) -> Result<ResetState> {
        let kernel = |what: &'static str| move |e| Error::kernel(what, e);
        Ok(ResetState {
            regs: vcpu.get_regs().map_err(kernel("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(kernel("KVM_GET_SREGS"))?,
            fpu: vcpu.get_fpu().map_err(kernel("KVM_GET_FPU"))?,
            xsave: vcpu.get_xsave().ok().map(Box::new),
            // Without XSAVE in its CPUID a vCPU has no XCR0, without guest debugging KVM may have no DRs.
            xcrs: vcpu.get_xcrs().ok(),
            debug: vcpu.get_debug_regs().ok(),
            lapic: vcpu.get_lapic().map_err(kernel("KVM_GET_LAPIC"))?,
            events: vcpu
                .get_vcpu_events()
                .map_err(kernel("KVM_GET_VCPU_EVENTS"))?,
            msrs: match registers {
                Registers::Listed(msrs) => keepable(vcpu, msrs),
                Registers::Model(vendor) => of_model(vcpu, vendor)?,
            },
        })
    }

    /// The MSRs that a vCPU remembers.
    pub fn msrs(&self) -> impl Iterator<Item = u32> + '_ {
        let kept = self.msrs.iter().map(|msr| msr.index);
        kept.chain(NOT_KEPT)
    }

    /// Puts the vCPU into its reset state; with `entry` it is the boot processor and begins there, else it
    /// waits for INIT and SIPI. What `firmware` sets up on every processor is set up if it is done.
    ///
    /// # Errors
    /// `Unavailable` when KVM refuses.
    pub fn restore(&self, vcpu: &VcpuFd, entry: Option<&Entry>, firmware: Firmware) -> Result<()> {
        let kernel = |what: &'static str| move |e| Error::kernel(what, e);
        let (mut regs, mut sregs) = (self.regs, self.sregs);
        if let Some(entry) = entry {
            entry.apply(&mut regs, &mut sregs);
        }
        vcpu.set_mp_state(kvm_mp_state {
            mp_state: match entry {
                Some(_) => KVM_MP_STATE_RUNNABLE,
                None => KVM_MP_STATE_UNINITIALIZED,
            },
        })
        .map_err(kernel("KVM_SET_MP_STATE"))?;
        vcpu.set_sregs(&sregs).map_err(kernel("KVM_SET_SREGS"))?;
        vcpu.set_regs(&regs).map_err(kernel("KVM_SET_REGS"))?;
        vcpu.set_fpu(&self.fpu).map_err(kernel("KVM_SET_FPU"))?;
        if let Some(xsave) = &self.xsave {
            // SAFETY: KVM reads more than the 4096 bytes of this structure only in a process that has asked for
            // AMX (arch_prctl), which this one never does.
            unsafe { vcpu.set_xsave(xsave) }.map_err(kernel("KVM_SET_XSAVE"))?;
        }
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(kernel("KVM_SET_XCRS"))?;
        }
        if let Some(debug) = &self.debug {
            vcpu.set_debug_regs(debug)
                .map_err(kernel("KVM_SET_DEBUGREGS"))?;
        }
        for msr in &self.msrs {
            set_msr(vcpu, *msr)?;
        }
        set_msr(vcpu, msr(MSR_TSC, 0))?;
        if firmware == Firmware::Done {
            set_msr(vcpu, msr(MSR_MTRR_DEFAULT_TYPE, WRITE_BACK))?;
        }
        vcpu.set_lapic(&self.lapic)
            .map_err(kernel("KVM_SET_LAPIC"))?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(kernel("KVM_SET_VCPU_EVENTS"))
    }
}

/// The listed MSRs that can be read and written back as they are.
fn keepable(vcpu: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    indices
        .iter()
        .filter(|index| !NOT_KEPT.contains(index))
        .filter_map(|index| Some(msr(*index, get_msr(vcpu, *index)?)))
        .filter(|msr| set_msr(vcpu, *msr).is_ok())
        .collect()
}

/// The MSRs of a named model with its values. One that cannot be written has its value already, and is not kept.
fn of_model(vcpu: &VcpuFd, vendor: Vendor) -> Result<Vec<kvm_msr_entry>> {
    let mut kept = Vec::new();
    for msr in model::values(vendor) {
        match (set_msr(vcpu, msr), get_msr(vcpu, msr.index)) {
            (Ok(()), _) => kept.push(msr),
            (Err(_), Some(value)) if value == msr.data => {}
            (Err(_), found) => {
                let found = found.map_or("nothing".to_owned(), |value| format!("{value:#x}"));
                let (index, data) = (msr.index, msr.data);
                let message = format!("MSR {index:#x} has {found} and does not take {data:#x}");
                return Err(model::unsupported(message));
            }
        }
    }
    Ok(kept)
}

/// An MSR's value, None where KVM does not tell.
pub(crate) fn get_msr(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[msr(index, 0)]).ok()?;
    let read = vcpu.get_msrs(&mut msrs).ok()?;
    (read == 1).then(|| msrs.as_slice().first().map(|msr| msr.data))?
}

/// One entry.
pub(crate) fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// Sets one.
pub(crate) fn set_msr(vcpu: &VcpuFd, msr: kvm_msr_entry) -> Result<()> {
    let msrs = Msrs::from_entries(&[msr]).map_err(|_| Error::internal("one MSR is too many"))?;
    match vcpu.set_msrs(&msrs) {
        Ok(1) => Ok(()),
        Ok(_) => Err(Error::kernel(
            "KVM_SET_MSRS",
            format!("MSR {:#x} is refused", msr.index),
        )),
        Err(e) => Err(Error::kernel("KVM_SET_MSRS", e)),
    }
}
