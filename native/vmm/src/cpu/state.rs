// SPDX-License-Identifier: Apache-2.0
//! What a vCPU remembers: registers, local APIC, MSRs, pending events.
//!
//! The kernel's structures go into the state as they are; their layout is its ABI. Their order is not free:
//! KVM_GET_MP_STATE comes first, for it takes in an INIT or SIPI that waits, which changes registers; the APIC's base
//! (in sregs) comes before the APIC, and the deadline of its timer after it.
//!
//! The time stamp counter goes on as if it had run while the machine was a file. All vCPUs are restored within a
//! second, so KVM brings their counters into step again. Its frequency is saved; where CPUID promises that it stays
//! ([`flags::INVARIANT_TSC`](crate::cpu::flags::INVARIANT_TSC)), the machine goes on with it or not at all.

use std::collections::BTreeMap;

use kvm_bindings::{
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave, KVM_MP_STATE_SIPI_RECEIVED,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::cpu::reset::{get_msr, msr, set_msr, MSR_TSC, MSR_TSC_ADJUST, MSR_TSC_DEADLINE};
use crate::error::{Error, Kind, Result};
use crate::state::{self, bytes_of, from_bytes, Bytes, Plain};

// SAFETY: structures of numbers, whose gaps are fields (include/uapi/asm/kvm.h).
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_fpu {}
// SAFETY: as above; what lies behind its 4096 bytes is not part of it.
unsafe impl Plain for kvm_xsave {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}

/// The state of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp_state: u32,
    regs: Bytes,
    sregs: Bytes,
    fpu: Bytes,
    xsave: Option<Bytes>,
    xcrs: Option<Bytes>,
    debug: Option<Bytes>,
    lapic: Bytes,
    events: Bytes,
    msrs: BTreeMap<u32, u64>,
    /// How fast the time stamp counter runs, where KVM tells.
    tsc_khz: Option<u32>,
}

impl VcpuState {
    /// Reads a vCPU that is not in KVM_RUN. `msrs` are those that can be read and written back.
    ///
    /// # Errors
    /// `Unavailable` when KVM does not tell.
    pub fn read(vcpu: &VcpuFd, msrs: impl Iterator<Item = u32>) -> Result<VcpuState> {
        let kernel = |what: &'static str| move |e| Error::kernel(what, e);
        let mp_state = vcpu.get_mp_state().map_err(kernel("KVM_GET_MP_STATE"))?;
        Ok(VcpuState {
            mp_state: mp_state.mp_state,
            regs: bytes_of(&vcpu.get_regs().map_err(kernel("KVM_GET_REGS"))?),
            sregs: bytes_of(&vcpu.get_sregs().map_err(kernel("KVM_GET_SREGS"))?),
            fpu: bytes_of(&vcpu.get_fpu().map_err(kernel("KVM_GET_FPU"))?),
            xsave: vcpu.get_xsave().ok().map(|xsave| bytes_of(&xsave)),
            xcrs: vcpu.get_xcrs().ok().map(|xcrs| bytes_of(&xcrs)),
            debug: vcpu.get_debug_regs().ok().map(|debug| bytes_of(&debug)),
            msrs: msrs
                .filter_map(|index| Some((index, get_msr(vcpu, index)?)))
                .collect(),
            lapic: bytes_of(&vcpu.get_lapic().map_err(kernel("KVM_GET_LAPIC"))?),
            events: bytes_of(
                &vcpu
                    .get_vcpu_events()
                    .map_err(kernel("KVM_GET_VCPU_EVENTS"))?,
            ),
            tsc_khz: vcpu.get_tsc_khz().ok(),
        })
    }

    /// Gives a vCPU this state, `passed` nanoseconds later; `invariant_tsc`: its time stamp counter keeps its frequency.
    ///
    /// # Errors
    /// `ImageInvalid` for state that is none; `NotSupported` for a register, or a frequency, that this host's KVM does
    /// not take; `Unavailable` when KVM refuses the rest.
    pub fn write(&self, vcpu: &VcpuFd, passed: u64, invariant_tsc: bool) -> Result<()> {
        let kernel = |what: &'static str| move |e| Error::kernel(what, e);
        if self.mp_state > KVM_MP_STATE_SIPI_RECEIVED {
            return Err(state::invalid(format!(
                "{} is no state of a vCPU",
                self.mp_state
            )));
        }
        vcpu.set_mp_state(kvm_mp_state {
            mp_state: self.mp_state,
        })
        .map_err(kernel("KVM_SET_MP_STATE"))?;
        vcpu.set_sregs(&from_bytes::<kvm_sregs>(&self.sregs)?)
            .map_err(kernel("KVM_SET_SREGS"))?;
        vcpu.set_regs(&from_bytes::<kvm_regs>(&self.regs)?)
            .map_err(kernel("KVM_SET_REGS"))?;
        vcpu.set_fpu(&from_bytes::<kvm_fpu>(&self.fpu)?)
            .map_err(kernel("KVM_SET_FPU"))?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(&from_bytes::<kvm_xcrs>(xcrs)?)
                .map_err(kernel("KVM_SET_XCRS"))?;
        }
        if let Some(xsave) = &self.xsave {
            let xsave = from_bytes::<kvm_xsave>(xsave)?;
            // SAFETY: KVM reads more than the 4096 bytes of this structure only in a process that has asked for
            // AMX (arch_prctl), which this one never does.
            unsafe { vcpu.set_xsave(&xsave) }.map_err(kernel("KVM_SET_XSAVE"))?;
        }
        if let Some(debug) = &self.debug {
            vcpu.set_debug_regs(&from_bytes::<kvm_debugregs>(debug)?)
                .map_err(kernel("KVM_SET_DEBUGREGS"))?;
        }
        let clock = [MSR_TSC, MSR_TSC_ADJUST, MSR_TSC_DEADLINE];
        for (index, value) in self.msrs.iter().filter(|(index, _)| !clock.contains(index)) {
            put_msr(vcpu, *index, *value)?;
        }
        self.write_counter(vcpu, passed, invariant_tsc)?;
        vcpu.set_lapic(&from_bytes::<kvm_lapic_state>(&self.lapic)?)
            .map_err(kernel("KVM_SET_LAPIC"))?;
        if let Some(deadline) = self.msrs.get(&MSR_TSC_DEADLINE) {
            put_msr(vcpu, MSR_TSC_DEADLINE, *deadline)?;
        }
        vcpu.set_vcpu_events(&from_bytes::<kvm_vcpu_events>(&self.events)?)
            .map_err(kernel("KVM_SET_VCPU_EVENTS"))
    }

    /// The time stamp counter, at the speed that it had where the host can do that.
    fn write_counter(&self, vcpu: &VcpuFd, passed: u64, invariant: bool) -> Result<()> {
        let Some(counter) = self.msrs.get(&MSR_TSC) else {
            return Ok(());
        };
        let own = vcpu.get_tsc_khz().ok();
        set_speed(self.tsc_khz, own, invariant, |khz| {
            vcpu.set_tsc_khz(khz).is_ok()
        })?;
        let khz = u128::from(self.tsc_khz.unwrap_or(0));
        let ticks = u128::from(passed).saturating_mul(khz) / 1_000_000;
        let ahead = u64::try_from(ticks).unwrap_or(0);
        set_msr(vcpu, msr(MSR_TSC, counter.wrapping_add(ahead)))?;
        match self.msrs.get(&MSR_TSC_ADJUST) {
            Some(adjust) => put_msr(vcpu, MSR_TSC_ADJUST, *adjust),
            None => Ok(()),
        }
    }
}

/// Sees to it that the counter runs at `saved` kHz, where this host's runs at `own`; `scale` has KVM change that.
fn set_speed(
    saved: Option<u32>,
    own: Option<u32>,
    invariant: bool,
    mut scale: impl FnMut(u32) -> bool,
) -> Result<()> {
    let Some(khz) = saved.filter(|khz| *khz > 0) else {
        return match invariant {
            true => Err(state::invalid(
                "an invariant time stamp counter without its frequency",
            )),
            false => Ok(()),
        };
    };
    // Within 250 parts in a million it is the same clock, measured twice.
    let same = own.is_none_or(|own| own.abs_diff(khz) <= khz / 4000);
    // A host that cannot scale runs it at its own speed, if nothing was promised.
    if same || scale(khz) || !invariant {
        return Ok(());
    }
    let own = own.unwrap_or(0);
    let message = format!(
        "the machine was promised a time stamp counter of {khz} kHz; this host's has {own} kHz and cannot be scaled"
    );
    Err(Error::new(Kind::NotSupported, "cpu_model", message))
}

/// One that has the value already may be one that cannot be written.
fn put_msr(vcpu: &VcpuFd, index: u32, value: u64) -> Result<()> {
    if get_msr(vcpu, index) == Some(value) {
        return Ok(());
    }
    set_msr(vcpu, msr(index, value)).map_err(|error| {
        let message =
            format!("this host's KVM does not take {value:#x} in MSR {index:#x}: {error}");
        Error::new(Kind::NotSupported, "cpu_model", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invariant_counter_keeps_its_frequency_or_the_machine_does_not_go_on() {
        let never = |_| false;
        let kind = |result: Result<()>| result.map_err(|error| error.kind);
        // The same clock, measured twice.
        assert_eq!(
            kind(set_speed(Some(3_000_000), Some(3_000_700), true, never)),
            Ok(())
        );
        assert_eq!(
            kind(set_speed(Some(3_000_000), Some(2_400_000), true, never)),
            Err(Kind::NotSupported)
        );
        assert_eq!(
            kind(set_speed(Some(3_000_000), Some(2_400_000), false, never)),
            Ok(())
        );
        assert_eq!(
            kind(set_speed(None, Some(1), true, never)),
            Err(Kind::ImageInvalid)
        );
        let mut asked = Vec::new();
        let mut scales = |khz| {
            asked.push(khz);
            true
        };
        set_speed(Some(3_000_000), Some(2_400_000), true, &mut scales).unwrap();
        set_speed(Some(3_000_000), Some(3_000_000), true, &mut scales).unwrap();
        assert_eq!(asked, [3_000_000]);
    }
}
