// SPDX-License-Identifier: Apache-2.0
//! The model-specific registers of a vCPU with a named model: which a guest can reach, and what they hold after power-on.
//!
//! KVM has more of them with each version, and some take their value from the host. Here the list is the model's: what is not in it
//! answers with a general protection fault, on every host (KVM_X86_SET_MSR_FILTER); what is has the value of the list after
//! power-on, and is saved. A host whose KVM lacks one, or takes another value only, is refused. The x2APIC's
//! registers, 0x800 to 0x8ff, are the local APIC's, and KVM leaves them out of every filter.
//!
//! The list is what systems read without asking CPUID first: a processor of the model's time has these. Left out is what CPUID
//! does not show: performance counters, TSC_ADJUST, TSC_AUX, speculation control, feature control, power.
//!
//! Sources: Intel SDM volume 4; AMD APM volume 2, appendix A; Documentation/virt/kvm/x86/msr.rst.

use kvm_bindings::{
    kvm_enable_cap, kvm_msr_entry, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MSR_FILTER_MAX_RANGES,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};

use crate::cpu::cpuid::Vendor;
use crate::error::{Error, Kind, Result};

/// What a register holds after power-on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// This.
    Set(u64),
    /// What something else says: the time, or the way into the kernel (`entry.rs`).
    Follows,
}

/// Registers that follow each other and begin alike.
struct Run {
    vendor: Option<Vendor>,
    first: u32,
    count: u32,
    value: Value,
}

const fn both(first: u32, count: u32, value: Value) -> Run {
    Run {
        vendor: None,
        first,
        count,
        value,
    }
}

const fn only(vendor: Vendor, first: u32, value: Value) -> Run {
    Run {
        vendor: Some(vendor),
        first,
        count: 1,
        value,
    }
}

use Value::{Follows, Set};
use Vendor::{Amd, Intel};

const REGISTERS: [Run; 39] = [
    both(0x10, 1, Follows),                     // TSC
    both(0x11, 2, Set(0)),                      // KVM's clocks, at their first numbers
    only(Intel, 0x17, Set(0)),                  // PLATFORM_ID
    both(0x1b, 1, Follows),                     // APIC_BASE
    only(Intel, 0x2a, Set(0)),                  // EBL_CR_POWERON
    only(Intel, 0x8b, Set(0x1_0000_0000)),      // BIOS_SIGN_ID: the microcode's revision
    only(Amd, 0x8b, Set(0x0100_0065)),          // PATCH_LEVEL
    only(Intel, 0xce, Set(0x8000_0000)),        // PLATFORM_INFO: CPUID may be made to fault
    both(0xfe, 1, Set(0x508)),                  // MTRRCAP: 8 variable, fixed, write-combining
    only(Intel, 0x140, Set(0)),                 // MISC_FEATURES_ENABLES
    both(0x174, 3, Set(0)),                     // SYSENTER_CS, ESP, EIP
    both(0x179, 1, Set(0x20)),                  // MCG_CAP: 32 banks
    both(0x17a, 1, Set(0)),                     // MCG_STATUS
    only(Intel, 0x1a0, Set(0x1801)),            // MISC_ENABLE: fast strings, no BTS, no PEBS
    both(0x1d9, 1, Set(0)),                     // DEBUGCTL
    both(0x200, 16, Set(0)),                    // MTRR_PHYSBASE and PHYSMASK 0 to 7
    both(0x250, 1, Set(0)),                     // MTRR_FIX64K
    both(0x258, 2, Set(0)),                     // MTRR_FIX16K
    both(0x268, 8, Set(0)),                     // MTRR_FIX4K
    both(0x277, 1, Set(0x0007_0406_0007_0406)), // PAT
    both(0x2ff, 1, Set(0)),                     // MTRR_DEF_TYPE
    both(0x400, 128, Set(0)),                   // 32 banks: MC_CTL, STATUS, ADDR, MISC
    both(0x6e0, 1, Follows),                    // TSC_DEADLINE
    both(0x4b56_4d00, 2, Set(0)),               // KVM's wall clock and system time
    both(0x4b56_4d03, 2, Set(0)),               // KVM's steal time, end of interrupt
    both(0x4b56_4d05, 1, Set(1)),               // KVM's poll control: the host may
    both(0xc000_0080, 1, Follows),              // EFER
    both(0xc000_0081, 4, Set(0)),               // STAR, LSTAR, CSTAR, FMASK
    both(0xc000_0100, 2, Follows),              // FS_BASE, GS_BASE
    both(0xc000_0102, 1, Set(0)),               // KERNEL_GS_BASE
    only(Amd, 0xc001_0010, Set(0)),             // SYSCFG
    only(Amd, 0xc001_0015, Set(0)),             // HWCR
    only(Amd, 0xc001_001f, Set(0)),             // NB_CFG
    only(Amd, 0xc001_0055, Set(0)),             // INT_PENDING_MSG
    only(Amd, 0xc001_0058, Set(0)),             // MMIO_CONF_BASE
    only(Amd, 0xc001_0112, Set(0)),             // TSEG base
    only(Amd, 0xc001_0113, Set(0)),             // TSEG mask
    only(Amd, 0xc001_1022, Set(0)),             // DC_CFG
    only(Amd, 0xc001_102a, Set(0)),             // BU_CFG2
];

/// The registers of a processor of `vendor`, in their order.
pub fn registers(vendor: Vendor) -> impl Iterator<Item = (u32, Value)> {
    let runs = REGISTERS
        .iter()
        .filter(move |run| run.vendor.is_none_or(|only| only == vendor));
    runs.flat_map(|run| {
        (run.first..run.first.saturating_add(run.count)).map(|msr| (msr, run.value))
    })
}

/// Lets the guest reach these registers and no others, in all vCPUs that there are and will be.
///
/// # Errors
/// `NotSupported` for a KVM that cannot do this (before Linux 5.10).
pub fn confine(vm: &VmFd, vendor: Vendor) -> Result<()> {
    /// Registers that one range of the filter covers: their numbers without the last nine bits are equal.
    const BLOCK: u32 = 512;
    let mut blocks: Vec<(u32, [u8; BLOCK as usize / 8])> = Vec::new();
    for (msr, _) in registers(vendor) {
        let base = msr & !(BLOCK - 1);
        let place = blocks.iter().position(|(first, _)| *first == base);
        let place = place.unwrap_or_else(|| {
            blocks.push((base, [0; BLOCK as usize / 8]));
            blocks.len().saturating_sub(1)
        });
        let bit = msr & (BLOCK - 1);
        let byte = blocks
            .get_mut(place)
            .and_then(|(_, bits)| bits.get_mut(bit as usize / 8));
        if let Some(byte) = byte {
            *byte |= 1 << (bit % 8);
        }
    }
    debug_assert!(blocks.len() <= KVM_MSR_FILTER_MAX_RANGES as usize);
    let ranges: Vec<_> = blocks
        .iter()
        .map(|(base, bits)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *base,
            msr_count: BLOCK,
            bitmap: bits,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(|e| unsupported(format!("KVM_X86_SET_MSR_FILTER: {e}")))
}

/// Lets the guest use what its CPUID shows of KVM, and no more.
///
/// # Errors
/// `NotSupported` for a KVM that cannot do this (before Linux 5.10).
pub fn confine_kvm(vcpu: &VcpuFd) -> Result<()> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        ..Default::default()
    };
    cap.args = [1, 0, 0, 0];
    vcpu.enable_cap(&cap)
        .map_err(|e| unsupported(format!("KVM_CAP_ENFORCE_PV_FEATURE_CPUID: {e}")))
}

/// What is to be set at a reset.
pub fn values(vendor: Vendor) -> impl Iterator<Item = kvm_msr_entry> {
    registers(vendor).filter_map(|(index, value)| match value {
        Set(data) => Some(super::reset::msr(index, data)),
        Follows => None,
    })
}

/// A host on which no named model runs.
pub(super) fn unsupported(what: String) -> Error {
    let message = format!("this host's KVM cannot run a named model: {what}; `host` can");
    Error::new(Kind::NotSupported, "cpu_model", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_register_is_listed_once_and_in_order() {
        for vendor in [Intel, Amd] {
            let all: Vec<u32> = registers(vendor).map(|(msr, _)| msr).collect();
            assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "{all:x?}");
            let reached = |msr| all.contains(&msr);
            assert!(reached(0x10) && reached(0x47f) && !reached(0x480) && !reached(0x3b));
        }
    }
}
