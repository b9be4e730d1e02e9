// SPDX-License-Identifier: Apache-2.0
//! What CPUID says.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use crate::error::{Error, Result};

/// All that KVM can give.
///
/// # Errors
/// `Unavailable` when KVM does not tell.
pub fn supported(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| Error::kernel("KVM_GET_SUPPORTED_CPUID", e))
}
