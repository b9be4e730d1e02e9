// SPDX-License-Identifier: Apache-2.0
//! The steps by which a worker closes itself, one export a step; the order is `vmbus/worker/main.py`'s.

use std::ffi::c_int;
use std::sync::{Mutex, OnceLock};

use vmbus_qcow2::Ring;
use vmbus_sandbox::{close, landlock, narrow, Profile, Role};

use crate::error::{guard, Failure};

static PROFILE: OnceLock<Profile> = OnceLock::new();

/// The profile in force, None before the filter: what a thread's further narrowing is cut from.
pub fn profile() -> Option<Profile> {
    PROFILE.get().copied()
}

fn role(number: u32) -> Result<Role, Failure> {
    match number {
        0 => Ok(Role::Main),
        1 => Ok(Role::Control),
        2 => Ok(Role::Vcpu),
        3 => Ok(Role::Block),
        4 => Ok(Role::Network),
        5 => Ok(Role::Memory),
        6 => Ok(Role::Crew),
        7 => Ok(Role::Migration),
        _ => Err(Failure::about(
            "InvalidArgument",
            "role",
            format!("role {number} is none of 0 (main) to 7 (migration)"),
        )),
    }
}

/// Makes `count` io_uring rings of `entries` requests and `files` files each, for the machine that will be
/// built. Returns how many there are: 0 where the host has io_uring switched off, and plain system calls serve.
#[no_mangle]
pub extern "C" fn vmbus_sandbox_rings(count: u32, entries: u32, files: u32) -> c_int {
    guard(|| {
        let mut made = Vec::new();
        for _ in 0..count {
            match Ring::new(entries, files) {
                Ok(ring) => made.push(ring),
                Err(error)
                    if made.is_empty()
                        && matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) =>
                {
                    return Ok(0)
                }
                Err(error) => {
                    return Err(Failure::new(
                        "Unavailable",
                        format!("an io_uring ring: {error}"),
                    ))
                }
            }
        }
        *rings()? = made;
        Ok(c_int::try_from(count).unwrap_or(c_int::MAX))
    })
}

/// The rings that were made and that no machine has taken yet.
pub fn take_rings() -> Result<Vec<Ring>, Failure> {
    Ok(std::mem::take(&mut *rings()?))
}

fn rings() -> Result<std::sync::MutexGuard<'static, Vec<Ring>>, Failure> {
    static RINGS: Mutex<Vec<Ring>> = Mutex::new(Vec::new());
    RINGS
        .lock()
        .map_err(|_| Failure::new("Internal", "the rings' lock is poisoned"))
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

/// Narrows the calling thread to a role: 0 main, 1 control, 2 vCPU, 3 block, 4 network, 5 memory, 6 crew, 7 migration.
#[no_mangle]
pub extern "C" fn vmbus_sandbox_narrow(number: u32) -> c_int {
    guard(|| {
        let role = role(number)?;
        let profile = profile()
            .ok_or_else(|| Failure::new("InvalidState", "the base filter comes before a role's"))?;
        narrow(role, profile)?;
        Ok(0)
    })
}
