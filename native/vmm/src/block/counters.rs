// SPDX-License-Identifier: Apache-2.0
//! What a disk has done, counted by its I/O thread and read by anybody.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use serde_json::json;
use vmbus_qcow2::Op;

use crate::io::Count;
use crate::migrate::changes::Changed;

/// What has happened on a disk since the machine was built.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    write_zeroes: AtomicU64,
    errors: AtomicU64,
    faults: AtomicU64,
    /// What a migration is to know of it.
    pub(crate) changed: Arc<Changed>,
}

impl Counters {
    /// A request has ended.
    pub(super) fn completed(&self, op: Op, (offset, len): (u64, u64), failed: bool) {
        self.changed.note(op, offset, len);
        let (requests, bytes) = match op {
            Op::Read => (&self.reads, Some(&self.read_bytes)),
            Op::Write { .. } => (&self.writes, Some(&self.written_bytes)),
            Op::Flush => (&self.flushes, None),
            Op::Discard => (&self.discards, None),
            Op::WriteZeroes { .. } => (&self.write_zeroes, None),
        };
        requests.fetch_add(1, Ordering::Relaxed);
        if failed {
            self.errors.fetch_add(1, Ordering::Relaxed);
        } else if let Some(bytes) = bytes {
            bytes.fetch_add(len, Ordering::Relaxed);
        }
    }

    /// A request was refused before it came to the image.
    pub(super) fn refused(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// The driver broke the rules.
    pub(super) fn broken(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }
}

impl Count for Counters {
    /// Requests by kind, bytes moved, requests that failed, and how often the driver broke the rules.
    fn to_json(&self) -> serde_json::Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "reads": get(&self.reads),
            "read_bytes": get(&self.read_bytes),
            "writes": get(&self.writes),
            "written_bytes": get(&self.written_bytes),
            "flushes": get(&self.flushes),
            "discards": get(&self.discards),
            "write_zeroes": get(&self.write_zeroes),
            "errors": get(&self.errors),
            "faults": get(&self.faults),
        })
    }
}
