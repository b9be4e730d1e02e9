// SPDX-License-Identifier: Apache-2.0
//! A vCPU's reset state: read from KVM once, when the vCPU is new, and set again at each reset.
//!
//! KVM has no "reset" of its own. What it gives a new vCPU *is* the reset state, so all of it is read back
//! and kept, MSRs included (as many as KVM lists, reads and takes back: some back ends list MSRs that they
//! refuse). The time stamp counter is set to 0, which makes KVM bring all vCPUs' counters into step.

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave, Msrs, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
};
use kvm_ioctls::VcpuFd;

use crate::cpu::entry::Entry;
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
    /// `msrs` is KVM_GET_MSR_INDEX_LIST.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell.
    pub fn read(vcpu: &VcpuFd, msrs: &[u32]) -> Result<ResetState> {
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
            msrs: keepable(vcpu, msrs),
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
    let readable = |index: u32| {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            ..Default::default()
        }])
        .ok()?;
        (vcpu.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice().first().copied())?
    };
    indices
        .iter()
        .filter(|index| !NOT_KEPT.contains(index))
        .filter_map(|index| readable(*index))
        .filter(|msr| set_msr(vcpu, *msr).is_ok())
        .collect()
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
