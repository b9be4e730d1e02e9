// SPDX-License-Identifier: Apache-2.0
//! vCPUs: what they are (CPUID and MSRs), their state at reset, and the threads that run them.

pub mod cpuid;
pub mod entry;
pub mod flags;
pub mod gate;
pub mod model;
pub mod msr;
pub mod reset;
pub mod run;
pub mod state;
