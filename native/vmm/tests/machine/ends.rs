// SPDX-License-Identifier: Apache-2.0
//! Every way to end or to begin again is told apart.

use serde_json::json;
use vmbus_vmm::{EndReason, Event, Kind, Request};

use crate::{requires_kvm, run};

#[test]
fn a_guest_that_powers_off_ends_its_machine() {
    requires_kvm!();
    let mut guest = run("hello and=more", json!({}));
    guest.until("hello: hello and=more");
    assert_eq!(guest.end(), (EndReason::GuestPoweroff, String::new()));
}

#[test]
fn a_triple_fault_is_one() {
    requires_kvm!();
    let guest = run("triple-fault", json!({}));
    assert_eq!(guest.end(), (EndReason::TripleFault, String::new()));
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_told_with_its_suberror() {
    requires_kvm!();
    let guest = run("bad-instruction", json!({}));
    let (reason, detail) = guest.end();
    assert_eq!(reason, EndReason::KvmInternalError);
    assert!(
        detail.contains("0xd0000000") && detail.contains("suberror"),
        "{detail}"
    );
}

#[test]
fn a_guest_resets_itself_in_place_by_either_register() {
    requires_kvm!();
    for means in ["cf9", "i8042"] {
        let mut guest = run(&format!("reset-once {means}"), json!({}));
        guest.until("first boot");
        assert_eq!(guest.event(), Event::Reset, "{means}");
        // The power management block is reset as well.
        guest.until("second boot: rsdp there, pm1 enable 0");
        assert_eq!(guest.end().0, EndReason::GuestPoweroff, "{means}");
    }
}

#[test]
fn a_reset_ends_the_machine_where_the_definition_says_so() {
    requires_kvm!();
    let guest = run("reset-once cf9", json!({ "on_reset": "end" }));
    let (reason, detail) = guest.end();
    assert_eq!(reason, EndReason::GuestReset);
    assert!(detail.contains("0xcf9"), "{detail}");
}

#[test]
fn a_kernel_that_is_gone_at_the_reset_ends_the_machine() {
    requires_kvm!();
    let path = std::env::temp_dir().join(format!("vmbus-kernel-{}", std::process::id()));
    std::fs::copy(crate::guest(), &path).unwrap();
    let kernel = json!({ "fd": crate::fd(&path), "cmdline": "idle" });
    let mut guest = run("", json!({ "kernel": kernel }));
    guest.until("idle");
    std::fs::write(&path, b"").unwrap();
    let (result, events) = guest.ask(Request::Reset);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(result.unwrap_err().kind, Kind::ImageInvalid);
    let [Event::Ended {
        reason: EndReason::Error,
        detail,
    }] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert!(detail.contains("cut off"), "{detail}");
}

#[test]
fn stop_ends_a_machine_in_any_state() {
    requires_kvm!();
    for pause in [false, true] {
        let mut guest = run("idle", json!({}));
        guest.until("idle");
        if pause {
            guest.must(Request::Pause);
        }
        let before = guest.must(Request::Stop);
        let stopped = Event::Ended {
            reason: EndReason::Stopped,
            detail: String::new(),
        };
        assert_eq!(before, [stopped], "paused: {pause}");
    }
}

#[test]
fn the_power_button_is_a_status_bit() {
    requires_kvm!();
    let mut guest = run("wait-power-button", json!({}));
    guest.until("waiting");
    guest.must(Request::PowerButton);
    guest.until("power button");
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
}

#[test]
fn the_power_button_wakes_a_sleeping_guest_by_the_sci_once() {
    requires_kvm!();
    let mut guest = run("sci", json!({}));
    guest.until("sleeping");
    guest.must(Request::PowerButton);
    guest.until("sci: 1, status 0");
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
}
