// SPDX-License-Identifier: Apache-2.0
//! A machine's counters, as JSON.

use serde_json::json;

use super::{Control, State};

impl Control {
    pub(super) fn stats(&self) -> String {
        use std::sync::atomic::Ordering::Relaxed;
        let vcpus: Vec<_> = self
            .vcpus
            .counters
            .iter()
            .map(|counters| {
                json!({
                    "exits": counters.exits.load(Relaxed),
                    "pio": counters.pio.load(Relaxed),
                    "mmio": counters.mmio.load(Relaxed),
                })
            })
            .collect();
        let devices: serde_json::Map<_, _> = self
            .devices
            .iter()
            .map(|device| (device.id(), device.stats()))
            .filter(|(_, stats)| !stats.is_null())
            .collect();
        let (written, read) = self.platform.serial.stats();
        let mut stats = json!({
            "state": match self.state {
                State::Built => "configured",
                State::Running => "running",
                State::Paused => "paused",
                State::Ended => "ended",
            },
            "uptime_ms": u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX),
            "resets": self.resets,
            "vcpus": vcpus,
            "console": { "written": written, "read": read },
            "memory": { "prefaulted": self.crew.done(), "total": self.keeping.memory() },
            "devices": devices,
        });
        if let (Some(migration), Some(stats)) = (self.moving.stats(), stats.as_object_mut()) {
            stats.insert("migration".to_owned(), migration);
        }
        stats.to_string()
    }
}
