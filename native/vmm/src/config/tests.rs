// SPDX-License-Identifier: Apache-2.0
//! Configurations that are machines, and what is said of those that are none.

use super::*;

fn config(json: &str) -> Config {
    let mut all: serde_json::Value = serde_json::from_str(
        r#"{"machine_type": "vmbus-1", "uuid": "01234567-89ab-4cde-8f01-23456789abcd", "vcpus": 1, "memory": 16777216, "cpu_model": "host",
            "kvm_fd": 900, "console_fd": 901, "kernel": {"fd": 902}}"#,
    )
    .unwrap();
    let change: serde_json::Value = serde_json::from_str(json).unwrap();
    for (key, value) in change.as_object().unwrap() {
        all[key] = value.clone();
    }
    serde_json::from_value(all).unwrap()
}

#[test]
fn the_defaults_are_a_machine() {
    config("{}").check().unwrap();
}

#[test]
fn what_is_out_of_range_is_named() {
    for (json, argument) in [
        (r#"{"vcpus": 0}"#, "vcpus"),
        (r#"{"vcpus": 17}"#, "vcpus"),
        (r#"{"memory": 0}"#, "memory"),
        (r#"{"memory": 16777217}"#, "memory"),
        (r#"{"memory": 4398046511104}"#, "memory"),
        (r#"{"machine_type": "vmbus-9"}"#, "machine_type"),
        (r#"{"memory_kind": "huge"}"#, "memory_fd"),
        (r#"{"memory_fd": 9}"#, "memory_fd"),
        (r#"{"clone_fd": 9}"#, "clone_fd"),
        (
            r#"{"clone_fd": 9, "restore": true, "memory_kind": "shareable", "memory_fd": 8}"#,
            "clone_fd",
        ),
        (
            r#"{"clone_fd": 9, "restore": true, "locked": true}"#,
            "clone_fd",
        ),
        (
            r#"{"memory_kind": "shareable", "memory_fd": 9, "merge": true}"#,
            "merge",
        ),
        (r#"{"locked": true, "balloon": true}"#, "balloon"),
        (r#"{"memory_nodes": [0, 1024]}"#, "memory_nodes"),
        (
            r#"{"memory_kind": "huge", "memory_fd": 9, "balloon": true}"#,
            "balloon",
        ),
        (
            r#"{"kernel": {"fd": 3, "cmdline": "a\u0000b"}}"#,
            "kernel.cmdline",
        ),
        (r#"{"kernel": null}"#, "kernel"),
        (r#"{"firmware": {"code_fd": 5}}"#, "kernel"),
        (
            r#"{"uuid": "01234567-89ab-4cde-8f0-123456789abcd"}"#,
            "uuid",
        ),
        (
            r#"{"uuid": "01234567-89ab-4cde-8f01-23456789abc+"}"#,
            "uuid",
        ),
    ] {
        assert_eq!(
            config(json).check().unwrap_err().argument,
            argument,
            "{json}"
        );
    }
}

#[test]
fn the_uuid_is_as_it_is_written() {
    let config = config(r#"{"kernel": null, "firmware": {"code_fd": 5, "boot": ["disk/root"]}}"#);
    config.check().unwrap();
    assert_eq!(
        config.uuid_bytes().unwrap()[..5],
        [1, 0x23, 0x45, 0x67, 0x89]
    );
}

#[test]
fn an_fd_that_stands_there_twice_is_refused() {
    let error = config(r#"{"kernel": {"fd": 902, "initrd_fd": 902}}"#).take_files();
    assert_eq!(error.err().unwrap().argument, "kernel.initrd_fd");
    let nic = r#"{"nics": [{"id": "net", "mac": "52:54:00:00:00:01", "tap_fds": [903, 900]}]}"#;
    let error = config(nic).take_files();
    assert_eq!(error.err().unwrap().argument, "nics[0].tap_fds[1]");
}
