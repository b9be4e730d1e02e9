// SPDX-License-Identifier: Apache-2.0
//! A machine as an opaque handle: made, asked, listened to, freed.
//!
//! Making, attaching a disk and freeing may take long (images are opened, threads are waited for); the rest returns
//! at once. Requests may come from several threads; events are taken by one. The machine's threads narrow themselves by the seccomp profile of
//! the process, if it was closed by one; a process without the filter (a test) runs them as they are.

use std::ffi::{c_int, CString};
use std::sync::{Arc, Mutex};

use serde::Deserialize;
use vmbus_sandbox::narrow;
use vmbus_vmm::thread::ThreadHook;
use vmbus_vmm::{Event, Machine, Request};

use crate::error::{borrowed, guard, Failure};
use crate::event::VmbusEvent;
use crate::sandbox;

/// A machine. Only ever seen through a pointer.
pub struct VmbusMachine {
    machine: Machine,
    /// What the last event's `json` points to.
    json: Mutex<CString>,
}

/// Builds the machine that `json` (native/vmm/src/config) describes, standing still.
///
/// Takes over the fds that it names, whatever the result; an fd that is named twice, or JSON that is no
/// configuration, leaves all of them with the caller.
///
/// # Safety
/// `json` points to `len` bytes; `out` to a place for the handle.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_new(
    json: *const u8,
    len: usize,
    out: *mut *mut VmbusMachine,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let json = unsafe { borrowed(json, len) };
        let config = serde_json::from_slice(json).map_err(|error| {
            Failure::about(
                "InvalidArgument",
                "definition",
                format!("the configuration: {error}"),
            )
        })?;
        let machine = Machine::build(config, sandbox::take_rings()?, hook())?;
        let handle = Box::new(VmbusMachine {
            machine,
            json: Mutex::default(),
        });
        // SAFETY: the caller's promise.
        unsafe { out.write(Box::into_raw(handle)) };
        Ok(0)
    })
}

/// How a thread of the core narrows itself.
fn hook() -> ThreadHook {
    Arc::new(|role| {
        let Some(profile) = sandbox::profile() else {
            return Ok(());
        };
        narrow(role, profile)
            .map_err(|error| vmbus_vmm::Error::kernel("a thread's seccomp filter", error))
    })
}

/// The handle behind a pointer that the caller got from `vmbus_machine_new`.
///
/// # Safety
/// `machine` is null or such a pointer, and not freed.
unsafe fn handle<'a>(machine: *const VmbusMachine) -> Result<&'a VmbusMachine, Failure> {
    // SAFETY: the caller's promise; a handle is only ever shared.
    unsafe { machine.as_ref() }.ok_or_else(|| Failure::new("InvalidArgument", "no machine"))
}

/// What a caller's JSON says; `what` it is about is named where it is no such JSON.
fn decode<'a, T: Deserialize<'a>>(json: &'a [u8], what: &str) -> Result<T, Failure> {
    serde_json::from_slice(json)
        .map_err(|error| Failure::about("InvalidArgument", what, format!("the {what}: {error}")))
}

/// Asks for something: 0 run, 1 pause, 2 resume, 3 power button, 4 reset, 5 stop, 6 stats,
/// 7 memory target of `argument` bytes (the others have no argument: 0), 8 prefault, 9 cancel prefault, 10 cancel a save or a restore, sending or receiving. The answer is an event with the same `id`.
///
/// # Safety
/// `machine` is a handle that is not freed.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_request(
    machine: *mut VmbusMachine,
    operation: u32,
    argument: u64,
    id: u64,
) -> c_int {
    guard(|| {
        let request = match operation {
            0 => Request::Run,
            1 => Request::Pause,
            2 => Request::Resume,
            3 => Request::PowerButton,
            4 => Request::Reset,
            5 => Request::Stop,
            6 => Request::Stats,
            7 => Request::MemoryTarget(argument),
            8 => Request::Prefault,
            9 => Request::CancelPrefault,
            10 => Request::CancelSave,
            _ => {
                return Err(Failure::about(
                    "InvalidArgument",
                    "operation",
                    format!("operation {operation} is none of 0 (run) to 10 (cancel save)"),
                ))
            }
        };
        // SAFETY: the caller's promise.
        unsafe { handle(machine) }?.machine.request(id, request);
        Ok(0)
    })
}

/// Asks about a device in a hotplug slot: 0 attach a disk, 1 attach a network interface (`json` is a `Disk` or a
/// `Nic` of native/vmm/src/config with a slot; takes over the fds that it names, whatever the result, unless
/// it is no such JSON), 2 ask the guest to let go of the device whose name `json` is, 3 let it keep it; or 4 put another medium into a
/// CD-ROM drive (`json` is a `MediumChange`, whose fds are taken over likewise), 5 connect a socket with the guest, or have it wait
/// for the guest (`json` is a `VsockEnd`, whose fd is taken over likewise). The answer
/// is an event with the same `id`. Attaching a disk opens its images and may take long.
///
/// # Safety
/// As `vmbus_machine_request`; `json` points to `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_slot(
    machine: *const VmbusMachine,
    operation: u32,
    id: u64,
    json: *const u8,
    len: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let json = unsafe { borrowed(json, len) };
        // SAFETY: the caller's promise.
        let machine = &unsafe { handle(machine) }?.machine;
        match operation {
            0 => machine.attach_disk(id, &decode(json, "device")?)?,
            1 => machine.attach_nic(id, &decode(json, "device")?)?,
            2 => machine.detach(id, decode(json, "device")?),
            3 => machine.keep(id, decode(json, "device")?),
            4 => machine.change_medium(id, &decode(json, "device")?)?,
            5 => machine.vsock(id, &decode(json, "socket")?)?,
            _ => {
                return Err(Failure::about(
                    "InvalidArgument",
                    "operation",
                    format!("operation {operation} is none of 0 (attach a disk) to 5 (a socket)"),
                ))
            }
        }
        Ok(0)
    })
}

/// What is done with a file: 0 save the machine to it (`json` is a `SaveTo` of native/vmm/src/config), 1 go on from it (a
/// `RestoreFrom`); 2 tidy up after snapshots that were broken off (a `Tidy` of snapshots.rs, without a file); or, with a socket in the
/// file's place, 3 have it go on at the other end (a `SendTo`), 4 go on with the machine that comes from there (a `ReceiveFrom`). Takes over the fd
/// that it names unless it is no such JSON. The answer is an event with the same `id`.
///
/// # Safety
/// As `vmbus_machine_request`; `json` points to `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_keep(
    machine: *const VmbusMachine,
    operation: u32,
    id: u64,
    json: *const u8,
    len: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let json = unsafe { borrowed(json, len) };
        // SAFETY: the caller's promise.
        let machine = &unsafe { handle(machine) }?.machine;
        match operation {
            0 => machine.save(id, &decode(json, "file")?)?,
            1 => machine.restore(id, &decode(json, "file")?)?,
            2 => machine.tidy(id, decode(json, "tidy")?),
            3 => machine.send(id, &decode(json, "socket")?)?,
            4 => machine.receive(id, &decode(json, "socket")?)?,
            _ => {
                return Err(Failure::about(
                    "InvalidArgument",
                    "operation",
                    format!("operation {operation} is none of 0 (save) to 4 (receive)"),
                ))
            }
        }
        Ok(0)
    })
}

/// Another machine has come to an isolated network: `json` is a `Peer` of native/vmm/src/config, whose fd is taken
/// over unless it is no such JSON. The answer is an event with the same `id`.
///
/// # Safety
/// As `vmbus_machine_request`; `json` points to `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_link(
    machine: *mut VmbusMachine,
    id: u64,
    json: *const u8,
    len: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let json = unsafe { borrowed(json, len) };
        let peer = decode(json, "peer")?;
        // SAFETY: the caller's promise.
        unsafe { handle(machine) }?.machine.link(id, &peer)?;
        Ok(0)
    })
}

/// Changes a device that the guest uses: `json` is a `DeviceChange` of native/vmm/src/config. The answer is an
/// event with the same `id`.
///
/// # Safety
/// As `vmbus_machine_request`; `json` points to `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_change(
    machine: *mut VmbusMachine,
    id: u64,
    json: *const u8,
    len: usize,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let json = unsafe { borrowed(json, len) };
        let change = decode(json, "change")?;
        // SAFETY: the caller's promise.
        unsafe { handle(machine) }?.machine.change(id, change);
        Ok(0)
    })
}

/// An fd that is readable while there is an event to take. It belongs to the machine.
///
/// # Safety
/// As `vmbus_machine_request`.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_event_fd(machine: *mut VmbusMachine) -> c_int {
    // SAFETY: the caller's promise.
    guard(|| Ok(unsafe { handle(machine) }?.machine.event_fd()))
}

/// Takes the oldest event: 1 if there was one, 0 if not.
///
/// # Safety
/// As `vmbus_machine_request`; `out` points to a place for the event.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_next_event(
    machine: *mut VmbusMachine,
    out: *mut VmbusEvent,
) -> c_int {
    guard(|| {
        // SAFETY: the caller's promise.
        let machine = unsafe { handle(machine) }?;
        let Some(event) = machine.machine.next_event() else {
            return Ok(0);
        };
        let (kind, id, json) = describe(event);
        let mut kept = machine.json.lock().unwrap_or_else(|e| e.into_inner());
        *kept = CString::new(json)
            .map_err(|_| Failure::new("Internal", "an event with a NUL in its JSON"))?;
        let event = VmbusEvent {
            kind,
            reserved: 0,
            id,
            json: kept.as_ptr(),
        };
        // SAFETY: the caller's promise.
        unsafe { out.write(event) };
        Ok(1)
    })
}

/// The kind (see [`VmbusEvent`]), the request and the details of an event.
fn describe(event: Event) -> (u32, u64, String) {
    match event {
        Event::Done {
            id,
            result: Ok(json),
        } => (1, id, json),
        Event::Done {
            id,
            result: Err(error),
        } => (2, id, Failure::from(error).json()),
        Event::Running => (3, 0, String::new()),
        Event::Paused => (4, 0, String::new()),
        Event::Reset => (5, 0, String::new()),
        Event::Detached { device, detail } => {
            let json = serde_json::json!({"device": device, "detail": detail});
            (7, 0, json.to_string())
        }
        Event::Watchdog(action) => {
            let json = serde_json::json!({ "action": action.as_str() });
            (8, 0, json.to_string())
        }
        Event::Ended { reason, detail } => {
            let json = serde_json::json!({"reason": reason.as_str(), "detail": detail});
            (6, 0, json.to_string())
        }
    }
}

/// Ends the machine, waits for its threads and gives everything back. Null is ignored.
///
/// # Safety
/// `machine` is null or a handle that is not freed and not in use; it is gone afterwards.
#[no_mangle]
pub unsafe extern "C" fn vmbus_machine_free(machine: *mut VmbusMachine) {
    guard(|| {
        if !machine.is_null() {
            // SAFETY: the caller's promise: `Box::into_raw` made it and nobody uses it any more.
            drop(unsafe { Box::from_raw(machine) });
        }
        Ok(0)
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;
    use vmbus_vmm::EndReason;

    fn last_error() -> serde_json::Value {
        // SAFETY: a C string of this thread, valid until its next call.
        let text = unsafe { CStr::from_ptr(crate::error::vmbus_error()) };
        serde_json::from_slice(text.to_bytes()).unwrap()
    }

    fn new(json: &str) -> c_int {
        let mut out = std::ptr::null_mut();
        // SAFETY: a string and a place for the handle.
        unsafe { vmbus_machine_new(json.as_ptr(), json.len(), &mut out) }
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_the_place() {
        for (json, words) in [
            ("", "EOF"),
            ("[]", "invalid"),
            ("{}", "missing field"),
            (
                "{\"machine_type\": \"vmbus-1\", \"colour\": 1}",
                "unknown field `colour`",
            ),
        ] {
            assert_eq!(new(json), -1, "{json}");
            let error = last_error();
            assert_eq!(error["kind"], "InvalidArgument", "{json}");
            assert!(
                error["message"].as_str().unwrap().contains(words),
                "{json}: {error}"
            );
        }
    }

    #[test]
    fn no_machine_is_an_error_and_freeing_none_is_not() {
        let none = std::ptr::null_mut();
        // SAFETY: null is looked at, not followed.
        unsafe {
            assert_eq!(vmbus_machine_request(none, 0, 0, 1), -1);
            assert_eq!(vmbus_machine_event_fd(none), -1);
            vmbus_machine_free(none);
        }
        assert_eq!(last_error()["message"], "no machine");
    }

    #[test]
    fn events_say_what_happened() {
        let ended = describe(Event::Ended {
            reason: EndReason::TripleFault,
            detail: "at 0x\"10\"".into(),
        });
        assert_eq!(ended.0, 6);
        let json: serde_json::Value = serde_json::from_str(&ended.2).unwrap();
        assert_eq!(json["reason"], "triple-fault");
        assert_eq!(json["detail"], "at 0x\"10\"");
        let failed = describe(Event::Done {
            id: 7,
            result: Err(vmbus_vmm::Error::invalid("memory", "too small")),
        });
        assert_eq!((failed.0, failed.1), (2, 7));
        let json: serde_json::Value = serde_json::from_str(&failed.2).unwrap();
        assert_eq!(json["kind"], "InvalidArgument");
        assert_eq!(json["argument"], "memory");
    }
}
