// SPDX-License-Identifier: Apache-2.0
//! The steps by which a worker closes itself, one export a step; the order is `vmbus/worker/main.py`'s.

use std::ffi::c_int;
use std::sync::OnceLock;

use vmbus_sandbox::{close, landlock, narrow, Profile, Role};

use crate::error::{guard, Failure};

static PROFILE: OnceLock<Profile> = OnceLock::new();

/// The profile in force: what a thread's further narrowing is cut from. Plain until one is chosen.
pub fn profile() -> Profile {
    *PROFILE.get().unwrap_or(&Profile::Plain)
}

fn role(number: u32) -> Result<Role, Failure> {
    match number {
        0 => Ok(Role::Main),
        1 => Ok(Role::Control),
        2 => Ok(Role::Vcpu),
        3 => Ok(Role::Block),
        4 => Ok(Role::Network),
        _ => Err(Failure::about(
            "InvalidArgument",
            "role",
            format!("role {number} is none of 0 (main) to 4 (network)"),
        )),
    }
}

/// Landlock, deny everything; for a process with one thread. Returns the ABI in force, 0 where the kernel has none.
#[no_mangle]
pub extern "C" fn vmbus_sandbox_landlock() -> c_int {
    guard(|| Ok(c_int::try_from(landlock::deny_all()?).unwrap_or(c_int::MAX)))
}

/// The base filter on all threads: profile 0 is plain, 1 vfio. Once.
#[no_mangle]
pub extern "C" fn vmbus_sandbox_seccomp(profile: u32) -> c_int {
    guard(|| {
        let profile = match profile {
            0 => Profile::Plain,
            1 => Profile::Vfio,
            _ => {
                return Err(Failure::about(
                    "InvalidArgument",
                    "profile",
                    format!("profile {profile} is neither 0 (plain) nor 1 (vfio)"),
                ))
            }
        };
        PROFILE
            .set(profile)
            .map_err(|_| Failure::new("InvalidState", "the filter is in force already"))?;
        close(profile)?;
        Ok(0)
    })
}

/// Narrows the calling thread to a role: 0 main, 1 control, 2 vCPU, 3 block, 4 network.
#[no_mangle]
pub extern "C" fn vmbus_sandbox_narrow(number: u32) -> c_int {
    guard(|| {
        narrow(role(number)?, profile())?;
        Ok(0)
    })
}
