// SPDX-License-Identifier: Apache-2.0
//! Landlock, deny everything: a rule set that handles every access right the kernel knows and allows none.
//!
//! Guarantees, as far as the kernel's ABI goes: nothing can be opened, made, removed, renamed or truncated by
//! path; no TCP bind or connect (ABI 4); no ioctl on a device opened later (ABI 5); no connect to an abstract
//! socket and no signal to a process outside (ABI 6). Descriptors that are already open are untouched.
//! A rule set binds the calling thread and the threads it makes later, so it is called while there is one.
//!
//! A kernel without Landlock is not an error: `/` is empty and seccomp denies the calls as well. The ABI in
//! force is returned so that it can be said. Source: Documentation/userspace-api/landlock.rst.

use std::io;

use crate::Error;

/// Access rights to files that ABI n handles: the low bits of `handled_access_fs`.
const FS_BITS: [(u32, u32); 4] = [(1, 13), (2, 14), (3, 15), (5, 16)];
/// LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP (ABI 4).
const NET_ALL: u64 = 0b11;
/// LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL (ABI 6).
const SCOPE_ALL: u64 = 0b11;
const CREATE_RULESET_VERSION: u32 = 1;

/// `struct landlock_ruleset_attr` as of ABI 6; an older kernel takes a prefix of it.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// The length of the prefix that ABI `abi` knows, and the rights to handle.
fn ruleset(abi: u32) -> (RulesetAttr, usize) {
    let bits = FS_BITS
        .iter()
        .rev()
        .find(|(since, _)| abi >= *since)
        .map_or(0, |(_, bits)| *bits);
    let attr = RulesetAttr {
        handled_access_fs: (1 << bits) - 1,
        handled_access_net: if abi >= 4 { NET_ALL } else { 0 },
        scoped: if abi >= 6 { SCOPE_ALL } else { 0 },
    };
    let size = match abi {
        0..=3 => 8,
        4..=5 => 16,
        _ => 24,
    };
    (attr, size)
}

/// The Landlock ABI of the running kernel; 0 if it has none or it is not enabled.
pub fn abi() -> u32 {
    // SAFETY: with CREATE_RULESET_VERSION the kernel reads no memory (null, 0) and returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}

/// Denies everything that the kernel's Landlock can deny; returns the ABI in force, 0 for none.
///
/// Needs no_new_privs, which it sets. Cannot be undone.
///
/// # Errors
/// The kernel has Landlock but refuses the rule set.
pub fn deny_all() -> Result<u32, Error> {
    let abi = abi();
    if abi == 0 {
        return Ok(0);
    }
    let (attr, size) = ruleset(abi);
    // SAFETY: PR_SET_NO_NEW_PRIVS takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(Error::Landlock(io::Error::last_os_error()));
    }
    // SAFETY: `attr` is a valid landlock_ruleset_attr of at least `size` bytes and outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::from_ref(&attr),
            size,
            0u32,
        )
    };
    if fd < 0 {
        return Err(Error::Landlock(io::Error::last_os_error()));
    }
    // SAFETY: `fd` is the rule set made above; the call takes integers only.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd, 0u32) };
    let error = io::Error::last_os_error();
    // SAFETY: `fd` is ours and used nowhere else.
    unsafe { libc::syscall(libc::SYS_close, fd) };
    if result != 0 {
        return Err(Error::Landlock(error));
    }
    Ok(abi)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_abi_asks_for_exactly_what_its_kernel_knows() {
        for (abi, bits, net, scoped, size) in [
            (1, 13, 0, 0, 8),
            (2, 14, 0, 0, 8),
            (3, 15, 0, 0, 8),
            (4, 15, 3, 0, 16),
            (5, 16, 3, 0, 16),
            (6, 16, 3, 3, 24),
            (9, 16, 3, 3, 24),
        ] {
            let (attr, length) = ruleset(abi);
            assert_eq!(attr.handled_access_fs, (1u64 << bits) - 1, "ABI {abi}");
            assert_eq!(
                (attr.handled_access_net, attr.scoped, length),
                (net, scoped, size),
                "ABI {abi}"
            );
        }
    }
}
