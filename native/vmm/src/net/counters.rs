// SPDX-License-Identifier: Apache-2.0
//! What an interface has done, counted by the network thread and read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use crate::io::Count;

/// One direction of one queue pair.
#[derive(Debug, Default)]
struct Direction {
    packets: AtomicU64,
    bytes: AtomicU64,
    drops: AtomicU64,
}

impl Direction {
    fn moved(&self, bytes: usize) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "packets": self.packets.load(Ordering::Relaxed),
            "bytes": self.bytes.load(Ordering::Relaxed),
            "drops": self.drops.load(Ordering::Relaxed),
        })
    }
}

#[derive(Debug, Default)]
struct Pair {
    received: Direction,
    transmitted: Direction,
}

/// What has happened on an interface since the machine was built.
#[derive(Debug)]
pub struct Counters {
    pairs: Vec<Pair>,
    filtered: AtomicU64,
    commands: AtomicU64,
    faults: AtomicU64,
    helped: AtomicU64,
}

impl Counters {
    /// Nothing yet, on `pairs` pairs.
    pub fn new(pairs: u16) -> Counters {
        Counters {
            pairs: (0..pairs).map(|_| Pair::default()).collect(),
            filtered: AtomicU64::new(0),
            commands: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            helped: AtomicU64::new(0),
        }
    }

    fn pair(&self, pair: u16, count: impl FnOnce(&Pair)) {
        if let Some(pair) = self.pairs.get(usize::from(pair)) {
            count(pair);
        }
    }

    /// The driver has got a frame of so many bytes.
    pub(super) fn received(&self, pair: u16, bytes: usize) {
        self.pair(pair, |pair| pair.received.moved(bytes));
    }

    /// A frame for the driver was dropped.
    pub(super) fn receive_dropped(&self, pair: u16) {
        self.pair(pair, |pair| {
            pair.received.drops.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// The tap has taken a frame of so many bytes.
    pub(super) fn transmitted(&self, pair: u16, bytes: usize) {
        self.pair(pair, |pair| pair.transmitted.moved(bytes));
    }

    /// The tap did not take a frame, or it was no frame.
    pub(super) fn transmit_dropped(&self, pair: u16) {
        self.pair(pair, |pair| {
            pair.transmitted.drops.fetch_add(1, Ordering::Relaxed);
        });
    }

    /// A frame was not for this driver.
    pub(super) fn filtered(&self) {
        self.filtered.fetch_add(1, Ordering::Relaxed);
    }

    /// A command was answered.
    pub(super) fn commanded(&self) {
        self.commands.fetch_add(1, Ordering::Relaxed);
    }

    /// The kernel serves so many of its queues (vhost-net); what it moves there is counted nowhere.
    pub(super) fn helped(&self, queues: usize) {
        self.helped.store(queues as u64, Ordering::Relaxed);
    }

    /// The driver broke the rules.
    pub(super) fn broken(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }
}

impl Count for Counters {
    /// For each pair and direction the frames moved, their bytes (without the virtio header) and the frames
    /// dropped; frames that were for somebody else, commands, how often the driver broke the rules, and how many queues
    /// vhost-net serves now.
    fn to_json(&self) -> serde_json::Value {
        let mut all = json!({
            "filtered": self.filtered.load(Ordering::Relaxed),
            "commands": self.commands.load(Ordering::Relaxed),
            "faults": self.faults.load(Ordering::Relaxed),
            "vhost": self.helped.load(Ordering::Relaxed),
        });
        // Named, not a list: the service hands on nothing but numbers under names.
        for (number, pair) in self.pairs.iter().enumerate() {
            if let Some(all) = all.as_object_mut() {
                let figures = json!({
                    "received": pair.received.to_json(),
                    "transmitted": pair.transmitted.to_json(),
                });
                all.insert(format!("pair-{number}"), figures);
            }
        }
        all
    }
}
