// SPDX-License-Identifier: Apache-2.0
//! What every PC has had since before PCI, as far as firmware and kernels still ask for it.
//!
//! The interrupt controllers and the PIT are KVM's own.

pub mod cmos;
pub mod i8042;
pub mod pm;
pub mod reset_control;
pub mod serial;
