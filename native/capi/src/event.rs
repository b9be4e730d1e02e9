// SPDX-License-Identifier: Apache-2.0
//! A machine's event as it crosses the ABI: a fixed struct whose details are JSON.

use std::ffi::c_char;

/// What happened.
///
/// | `kind` | what | `json` |
/// |---|---|---|
/// | 1 | request `id` is done | its result, "" if it has none |
/// | 2 | request `id` failed | `kind`, `argument`, `message` |
/// | 3 | the vCPUs run | "" |
/// | 4 | the vCPUs stand still | "" |
/// | 5 | the guest was reset and goes on | "" |
/// | 7 | the guest has let go of a device in a slot | `device`, `detail` |
/// | 8 | the guest let its watchdog's time pass | `action` |
/// | 6 | the machine has ended; no event follows | `reason`, `detail` |
#[repr(C)]
pub struct VmbusEvent {
    /// As above.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
    /// The request, for kinds 1 and 2; else 0.
    pub id: u64,
    /// NUL-terminated; valid until the next call with this machine.
    pub json: *const c_char,
}
