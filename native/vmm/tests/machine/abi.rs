// SPDX-License-Identifier: Apache-2.0
//! What a guest reads is what the description of its machine says, byte by byte.

use std::collections::BTreeMap;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{json, Value};
use vmbus_vmm::config::MachineType;
use vmbus_vmm::{abi, Kind};

use crate::{build, requires_kvm, run};

const UUID: &str = "11111111-2222-4333-8444-555555555555";
const MEMORY: u64 = 64 << 20;
/// Leaf 1: APIC ID in EBX, OSXSAVE in ECX; leaf 0xd: XSAVE's size in EBX. They follow the guest's doing.
const FOLLOWS: [(&str, usize, u32); 3] = [
    ("00000001", 1, 0xff00_0000),
    ("00000001", 2, 1 << 27),
    ("0000000d.0", 1, u32::MAX),
];

/// A description as JSON, with `change` in place of what it has.
fn described(change: &Value) -> Value {
    let mut machine = json!({
        "machine_type": "vmbus-2", "uuid": UUID, "vcpus": 1, "memory": MEMORY,
        "cpu_model": "host", "disks": [], "nics": [], "rng": false, "balloon": false, "boot": null,
    });
    for (key, value) in change.as_object().unwrap() {
        machine[key] = value.clone();
    }
    abi::describe(&serde_json::from_value(machine).unwrap()).unwrap()
}

/// Lines of the guest that begin with `word`, in two parts each.
fn said<'a>(printed: &'a str, word: &str) -> BTreeMap<&'a str, &'a str> {
    let lines = printed
        .lines()
        .filter_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    lines.filter_map(|line| line.split_once(' ')).collect()
}

/// The named models that this host can run.
fn runnable() -> Vec<&'static str> {
    let mut names = vmbus_vmm::cpu::model::names();
    names.retain(|name| match build("hello", json!({ "cpu_model": *name })) {
        Ok(_) => *name != "host",
        Err(error) => {
            assert_eq!(error.kind, Kind::NotSupported, "{name}: {error}");
            false
        }
    });
    names
}

/// Whether CPUID is KVM's to answer.
fn answers_cpuid() -> bool {
    let drivers = ["/sys/module/kvm_intel", "/sys/module/kvm_amd"];
    drivers.iter().any(|driver| Path::new(driver).exists())
}

#[test]
fn a_guest_reads_the_registers_that_its_model_has_and_no_others() {
    requires_kvm!();
    let models = runnable();
    if models.is_empty() {
        eprintln!("absent: a host that runs a named model");
    }
    for model in models {
        let change = json!({ "cpu_model": model });
        let wanted = described(&change);
        let mut guest = run("registers", change);
        let printed = guest.until("registers: done");

        let mut found = serde_json::Map::new();
        for (msr, value) in said(&printed, "msr") {
            let msr = u32::from_str_radix(msr.trim_end_matches(':'), 16).unwrap();
            let msr = format!("{msr:08x}");
            let value = u64::from_str_radix(value, 16).unwrap();
            // A kernel that is entered directly finds memory write-back, as firmware leaves it.
            let value = match msr.as_str() {
                "000002ff" => u64::from(value != 0x806) * value,
                _ => value,
            };
            let follows = wanted["msrs"].get(&msr) == Some(&Value::Null);
            let value = (!follows).then(|| format!("{value:#x}"));
            found.insert(msr, json!(value));
        }
        assert_eq!(Value::Object(found), wanted["msrs"], "{model}");

        if !answers_cpuid() {
            eprintln!("absent: a KVM on a processor with virtualization: this one lets guests ask the host's CPUID");
            continue;
        }
        for (question, answer) in said(&printed, "cpuid") {
            let (leaf, subleaf) = question.trim_end_matches(':').split_once('.').unwrap();
            let leaf = format!("{:08x}", u32::from_str_radix(leaf, 16).unwrap());
            let indexed = format!("{leaf}.{}", u32::from_str_radix(subleaf, 16).unwrap());
            let known = |key: &str| wanted["cpuid"].get(key).map(|_| key.to_owned());
            let first = known(&leaf).filter(|_| subleaf == "0");
            let Some(key) = known(&indexed).or(first) else {
                continue;
            };
            for (place, register) in answer.split(' ').enumerate() {
                let follows = FOLLOWS
                    .iter()
                    .find(|(of, at, _)| *of == key && *at == place);
                let mask = !follows.map_or(0, |(_, _, bits)| *bits);
                let value = u32::from_str_radix(register, 16).unwrap();
                let text = wanted["cpuid"][&key][place].as_str().unwrap();
                let right = u32::from_str_radix(text, 16).unwrap();
                assert_eq!(value & mask, right & mask, "{model}: leaf {key}, {place}");
            }
        }
    }
}

#[test]
fn a_guest_finds_the_board_and_the_devices_that_are_described() {
    requires_kvm!();
    for (machine_type, _) in MachineType::ALL {
        finds_the_board(machine_type);
    }
}

fn finds_the_board(machine_type: &str) {
    let (lan, plugged) = ("52:54:00:12:34:56", "52:54:00:12:34:57");
    let common = json!({ "machine_type": machine_type, "vcpus": 2, "rng": true, "balloon": true, "uuid": UUID });
    let mut description = common.clone();
    description["watchdog"] = json!(true);
    description["ports"] = json!(["org.example.one", "two"]);
    description["disks"] = json!([
        { "id": "root", "read_only": false, "serial": "one", "queues": 0, "slot": 0, "bus": "blk", "cdrom": false },
        { "id": "plug", "read_only": true, "serial": "two", "queues": 1, "slot": 3, "bus": "blk", "cdrom": false },
        { "id": "cd", "read_only": true, "serial": "", "queues": 0, "slot": 0, "bus": "scsi", "cdrom": true },
    ]);
    description["nics"] = json!([
        { "id": "lan", "mac": lan, "queues": 0, "slot": 0 },
        { "id": "plugged", "mac": plugged, "queues": 2, "slot": 8 },
    ]);
    let mut config = common;
    description["vsock"] = json!(77);
    config["vsock"] = json!(77);
    config["watchdog"] = json!("none");
    config["ports"] = json!([port("org.example.one"), port("two")]);
    config["nics"] = json!([
        { "id": "lan", "mac": lan, "link": "hub", "tap_fds": [] },
        { "id": "plugged", "mac": plugged, "link": "hub", "tap_fds": [], "queues": 2, "slot": 8 },
    ]);
    config["disks"] = json!([
        { "id": "root", "layers": empty(), "serial": "one" },
        { "id": "plug", "layers": empty(), "serial": "two", "queues": 1, "slot": 3, "read_only": true },
        { "id": "cd", "layers": empty(), "bus": "scsi", "cdrom": true, "read_only": true },
    ]);
    let wanted = described(&description);
    let mut places = String::from("board");
    let mut pieces = Vec::new();
    for table in wanted["acpi"].as_array().unwrap() {
        pieces.push((number(&table["base"]), table["bytes"].as_str().unwrap()));
    }
    let smbios = &wanted["smbios"];
    pieces.push((0xf_0000, smbios["entry"].as_str().unwrap()));
    pieces.push((0xf_0020, smbios["structures"].as_str().unwrap()));
    for ((base, bytes), number) in pieces.iter().zip(["", "1", "2", "3"]) {
        places += &format!(" at{number}={base} len{number}={}", bytes.len() / 2);
    }
    config["kernel"] = json!({ "fd": crate::fd(crate::guest()), "cmdline": places });

    let mut guest = run("board", config);
    let printed = guest.until("board: done");
    compare(&printed, &wanted, &pieces);
}

fn compare(printed: &str, wanted: &Value, pieces: &[(u64, &str)]) {
    let memory = said(printed, "memory");
    for (base, bytes) in pieces {
        assert_eq!(memory[format!("{base:x}").as_str()], *bytes, "{base:x}");
    }
    let mut map = Vec::new();
    for entry in wanted["memory-map"].as_array().unwrap() {
        let kind = if entry["kind"] == "ram" { 1 } else { 2 };
        let (base, size) = (number(&entry["base"]), number(&entry["size"]));
        map.push(format!("map {base:x} {size:x} {kind}"));
    }
    let found: Vec<_> = printed
        .lines()
        .filter(|line| line.starts_with("map "))
        .collect();
    assert_eq!(found, map);

    let (functions, virtio) = (said(printed, "pci"), said(printed, "virtio"));
    let mut left = functions.len();
    for function in wanted["pci"].as_array().unwrap() {
        let place = function["place"].as_str().unwrap();
        let place = match place.strip_prefix("slot ") {
            Some(slot) => format!("{slot}.0.0"),
            None => {
                let (device, number) = place.split_once('.').unwrap();
                format!("0.{:x}.{number}", u8::from_str_radix(device, 16).unwrap())
            }
        };
        let name = &function["name"];
        assert_eq!(
            functions.get(place.as_str()).copied(),
            function["configuration"].as_str(),
            "{name}"
        );
        left -= 1;
        if let Some(model) = function.get("virtio") {
            let wanted = format!(
                "{:x} {} {} {}",
                number(&model["features"]),
                model["queues"],
                model["queue-size"],
                model["configuration"].as_str().unwrap()
            );
            assert_eq!(virtio[place.as_str()], wanted, "{name}");
        }
    }
    assert_eq!(left, 0, "functions that are not described");

    let items = said(printed, "fw-cfg");
    let described = wanted["fw-cfg"].as_object().unwrap();
    for (name, item) in described {
        let found = items[name.as_str()];
        match item["bytes"].as_str() {
            Some(bytes) => assert_eq!(found, bytes, "{name}"),
            None => assert_eq!(found.len() as u64, 2 * item["size"].as_u64().unwrap()),
        }
    }
    assert_eq!(items.len(), described.len());

    let clock = printed
        .lines()
        .find_map(|line| line.strip_prefix("cmos "))
        .unwrap();
    let wanted = wanted["cmos"].as_str().unwrap();
    for index in (0x0e..0x80).filter(|index| *index != 0x32) {
        let byte = 2 * index..2 * index + 2;
        assert_eq!(clock[byte.clone()], wanted[byte], "CMOS {index:#x}");
    }
}

fn number(text: &Value) -> u64 {
    u64::from_str_radix(text.as_str().unwrap().trim_start_matches("0x"), 16).unwrap()
}

/// The layers of an image without a byte.
fn empty() -> Value {
    // SAFETY: a fresh memfd, owned by nobody else.
    let fd = unsafe { libc::memfd_create(c"image".as_ptr(), 0) };
    json!([{ "fd": fd, "format": "raw" }])
}

/// A port to which nobody speaks.
fn port(name: &str) -> Value {
    let (ours, _) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    json!({ "name": name, "fd": ours.into_raw_fd() })
}
