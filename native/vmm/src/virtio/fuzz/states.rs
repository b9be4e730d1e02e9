// SPDX-License-Identifier: Apache-2.0
//! A machine's saved state that somebody has changed, given to all of its devices.

use serde_json::{json, Value};

use super::guest::still_works;
use super::random::Random;
use super::seeds::{seeds, within_a_minute};
use crate::pci::Place;
use crate::state::Stateful;
use crate::virtio::queue::testing::rings;
use crate::virtio::rig::{Guest, Rig, ALL_FEATURES};

#[test]
fn random_states_harm_nothing() {
    within_a_minute(random_states);
}

/// A machine's state, spoilt in some places, is refused or taken over; either way nothing panics, and a reset mends all.
fn random_states() {
    let rig = Rig::new(None);
    let mut disk = Guest::probe(&rig, Place::disk(0));
    disk.start(ALL_FEATURES, rings(0x1_0000, 8));
    let mut interface = Guest::probe(&rig, Place::nic(0));
    interface.start_queues(
        ALL_FEATURES,
        &[(0, rings(0x2_0000, 8)), (1, rings(0x3_0000, 8))],
    );
    for device in &rig.devices.list {
        device.pause().unwrap();
    }
    let saved = rig.devices.root.save().unwrap();
    let (mut refused, mut taken) = (0, 0);
    for seed in seeds(60) {
        eprintln!("seed {seed}");
        let mut random = Random(seed.wrapping_mul(0x2127_599b_f432_5c37));
        let mut state = saved.clone();
        for _ in 0..random.below(4) {
            spoil(&mut random, &mut state);
        }
        let victim = Rig::new(None);
        for device in &victim.devices.list {
            device.pause().unwrap();
        }
        match victim.devices.root.restore(&state) {
            Ok(()) => taken += 1,
            Err(_) => refused += 1,
        }
        for device in &victim.devices.list {
            device.resume();
        }
        still_works(&victim, seed);
        assert_eq!(*victim.trouble.lock().unwrap(), [""; 0], "seed {seed}");
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
}

/// Changes something somewhere in a state.
fn spoil(random: &mut Random, state: &mut Value) {
    match state {
        Value::Object(fields) if !fields.is_empty() && !random.one_in(30) => {
            let place = random.below(fields.len() as u64) as usize;
            let name = fields.keys().nth(place).cloned().unwrap();
            if random.one_in(30) {
                fields.remove(&name);
            } else {
                spoil(random, &mut fields[&name]);
            }
        }
        Value::Array(items) if !items.is_empty() && !random.one_in(8) => {
            let place = random.below(items.len() as u64) as usize;
            match random.below(8) {
                0 => items.truncate(place),
                1 => items.push(items[place].clone()),
                _ => spoil(random, &mut items[place]),
            }
        }
        Value::String(text) if !text.is_empty() && !random.one_in(8) => {
            let place = random.below(text.len() as u64) as usize;
            let digit = random.pick(&["0", "7", "f", "g"]);
            text.replace_range(place..=place, digit);
        }
        other => {
            *other = match random.below(5) {
                0 => Value::Null,
                1 => json!(random.one_in(2)),
                2 => json!("f".repeat(random.below(600) as usize)),
                _ => json!(random.number()),
            }
        }
    }
}
