// SPDX-License-Identifier: Apache-2.0
//! What a guest can see of a machine, as JSON (native/vmm/src/abi/mod.rs). Needs no KVM, no file and no privilege.

use std::ffi::c_int;

use crate::error::{borrowed, guard, Failure};

/// Describes the machine that `json` names: writes JSON to `text` if it fits into `room` bytes. Returns its length in
/// bytes, so that a call with too little room says how much is needed.
///
/// # Safety
/// `json` points to `len` bytes, `text` to `room` writable ones.
#[no_mangle]
pub unsafe extern "C" fn vmbus_abi_describe(
    json: *const u8,
    len: usize,
    text: *mut u8,
    room: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let request = unsafe { borrowed(json, len) };
        let machine = serde_json::from_slice(request).map_err(|e| {
            Failure::about(
                "InvalidArgument",
                String::new(),
                format!("no description: {e}"),
            )
        })?;
        let described = vmbus_vmm::abi::describe(&machine)?.to_string();
        if described.len() <= room {
            // SAFETY: the caller's promise; the text is a new string of ours.
            unsafe { std::ptr::copy_nonoverlapping(described.as_ptr(), text, described.len()) };
        }
        c_int::try_from(described.len()).map_err(|_| {
            Failure::about(
                "Internal",
                String::new(),
                "a description of more than 2 GiB".to_owned(),
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_without_room_says_how_much_is_needed() {
        let json = br#"{"machine_type": "vmbus-1", "uuid": "01234567-89ab-4cde-8f01-23456789abcd", "vcpus": 1,
            "memory": 67108864, "cpu_model": "host", "disks": [], "nics": [], "rng": true, "balloon": false,
            "boot": null}"#;
        let ask = |text: &mut [u8]| {
            // SAFETY: both slices are what their lengths say.
            unsafe { vmbus_abi_describe(json.as_ptr(), json.len(), text.as_mut_ptr(), text.len()) }
        };
        let needed = ask(&mut []);
        assert!(needed > 1000);
        let mut text = vec![0; needed as usize];
        assert_eq!(ask(&mut text), needed);
        let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(value["machine-type"], "vmbus-1");
    }
}
