// SPDX-License-Identifier: Apache-2.0
//! A machine that goes on in another process, and hardly stands still on its way.
//!
//! RAM is sent while the guest runs, then what it has written to meanwhile, and so on until what is left can be sent within the
//! downtime that is allowed; then the machine stands, and the rest follows. The records are [`stream`]'s, the socket is
//! [`link`]'s; [`rounds`] is the source, [`receive`] the destination, [`marks`] knows which pages were written to. One thread of each
//! machine does it, asleep otherwise; the control thread does what has to do with the machine (`control/moving.rs`).
//!
//! # The stream
//!
//! | source | destination | meanwhile |
//! |---|---|---|
//! | preamble, facts; copies, if disks go along | | source runs |
//! | | accepted, or refused | the destination has compared the facts with its own machine's, and taken up the disks that it is to write |
//! | code, rom | | |
//! | all of the disks that go along, and of RAM; then rounds: disk, blocks, holes; pages, zeros; a round's end | | slowed, if rounds do not shrink |
//! | | synced, after each round with disks | what came of them is durable, so that little is left to do in the end |
//! | the last blocks and holes | | source stands |
//! | the last pages, variables, last | | its disks are durable and let go |
//! | | ready, or refused | everything is checked and loaded, copies are durable; other disks are untouched |
//! | go | | from here on the source does not run again by itself |
//! | | running, or refused | the destination has taken its disks up and goes on (or stands, as the source stood) |
//! | | | the source ends, reason `migrated` |
//!
//! `Still` comes in between where the source has something to wait for, so that silence means a broken connection.
//!
//! # Who has the machine
//!
//! | what breaks | source | destination |
//! |---|---|---|
//! | anything before `go` has been sent whole; a cancellation until then | is what it was | ends |
//! | the destination refuses, at whatever time | is what it was | ends, and has not run |
//! | the connection, after `go` and before `running` | stands, its disks let go, with an error that says so | runs, if `go` has come |
//!
//! In the last case nobody but a person can know. A source that is resumed then takes its disks up first, which the locks of a
//! destination that runs on the same files prevent; where the destination has copies, nothing does.
//!
//! # What is checked
//!
//! The facts, as of a saved machine ([`crate::save::facts`]). A disk that the guest may write is copied along, or is the same file at both
//! ends as far as a file system's numbers can tell, or is one of those that the destination's user answers for. Both sides must name the
//! same disks as copies: a source never makes a destination write where its user did not say so. Every record has a checksum and a number. A destination takes nothing that it would not take from a file, and it takes it in the
//! sealed worker. Its answers are records, too, and the source believes nothing else of it. The generation ID stays: it is the same machine.
//!
//! # How fast
//!
//! Rounds end when what is left divided by the speed is within the downtime, for disks and for memory, and with the time that the
//! destination took to make the last round durable (but for no more than half of the downtime). The speed is that of what is not zeros. A
//! round that leaves more than half of what it has sent makes the guest slower: its vCPUs stand for a part of each
//! [`rounds::PERIOD`], which grows to 99 %.
//!
//! Left out: several connections, compression and encryption (a tunnel has both), what is queued in sockets of the host (user-mode networks, vsock: their connections end, as with a restore).

pub mod changes;
pub mod copies;
#[cfg(test)]
mod copies_tests;
mod disks;
pub mod link;
pub mod marks;
mod mover;
pub mod receive;
pub mod rounds;
pub mod stream;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(crate) use copies::{Copied, Still};
pub(crate) use mover::{Mover, Tools};
use stream::Kind;

use crate::error::{Error, Kind as Trouble, Result};
use crate::save::facts::Facts;
use crate::save::States;

/// What a destination needs besides memory and firmware.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Last {
    /// What the parts remember.
    pub states: States,
    /// When the source stood, in nanoseconds since 1970, UTC, by its host.
    pub at: u64,
    /// It had not run.
    pub paused: bool,
}

/// Why a destination does not run the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    kind: String,
    argument: String,
    message: String,
}

impl Refusal {
    const WORDS_MAX: usize = 1000;

    fn bytes(error: &Error) -> Vec<u8> {
        let refusal = Refusal {
            kind: error.kind.as_str().to_owned(),
            argument: error.argument.chars().take(64).collect(),
            message: error.message.chars().take(Self::WORDS_MAX).collect(),
        };
        serde_json::to_vec(&refusal).unwrap_or_default()
    }

    /// What a destination said; what it may not say is left out.
    fn error(body: &[u8]) -> Error {
        let Ok(said) = serde_json::from_slice::<Refusal>(body) else {
            return stream::damaged("why the other side refuses");
        };
        let words = |text: &str, most: usize| -> String {
            text.chars()
                .filter(|c| !c.is_control())
                .take(most)
                .collect()
        };
        Error {
            kind: Trouble::named(&said.kind).unwrap_or(Trouble::Internal),
            argument: words(&said.argument, 64),
            message: format!(
                "the destination refuses: {}",
                words(&said.message, Self::WORDS_MAX)
            ),
        }
    }
}

/// A machine that leaves.
pub(crate) struct Sending {
    pub(crate) socket: OwnedFd,
    /// JSON of [`Facts`].
    pub(crate) facts: Vec<u8>,
    /// What of the firmware never changes.
    pub(crate) roms: Vec<(Kind, Vec<u8>)>,
    /// How long the guest may stand.
    pub(crate) downtime: Duration,
    /// Bytes a second; 0 for as many as go.
    pub(crate) bandwidth: u64,
    /// Disks that go along.
    pub(crate) copies: Vec<Copied>,
}

/// A machine that is expected.
pub(crate) struct Receiving {
    pub(crate) socket: OwnedFd,
    pub(crate) expected: Expected,
}

/// What it must be, and what becomes of what comes.
pub(crate) struct Expected {
    /// Of the machine that was built for it.
    pub(crate) own: Facts,
    /// Which parts of the firmware it has, and their bytes.
    pub(crate) roms: Vec<(Kind, u64)>,
    /// Disks that are written with what comes.
    pub(crate) copies: Vec<Copied>,
    /// Disks that are right although their files are others than the source's.
    pub(crate) separate: Vec<String>,
}

/// To the thread.
pub(crate) enum Order {
    Send(Box<Sending>),
    Receive(Box<Receiving>),
    /// The machine stands, and nothing is in flight.
    Stands,
    /// It is collected: JSON of [`Last`], and its firmware's variables.
    Last(Result<(Vec<u8>, Option<Vec<u8>>)>),
    /// What was to be taken up is; everything is loaded.
    Loaded(Result<()>),
    /// The machine goes on here.
    Runs(Result<()>),
    /// Stop, for this reason.
    Cancel(Error),
    Exit,
}

/// From the thread to the control thread.
pub(crate) enum Step {
    /// The machine is to stand.
    Halt,
    /// It does, and all that the vCPUs had to say is said: the control thread's to itself.
    Collect,
    Sent(Sent),
    /// The disks that are written with what comes are to be taken up.
    Claim,
    /// Load this, with the parts of the firmware.
    Arrived(Box<Last>, Vec<(Kind, Vec<u8>)>),
    /// The machine is ours.
    Go,
    Received(Result<String>),
}

/// What became of a machine that was to leave.
pub(crate) enum Sent {
    /// It has; with the statistics.
    Away(String),
    /// It has not.
    Stays(Error),
    /// Nobody knows.
    Unsure(Error),
}

/// How far it is.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of RAM.
    pub total: AtomicU64,
    /// Bytes that have gone through the socket.
    pub sent: AtomicU64,
    /// Bytes of RAM that are to be sent in this round.
    pub remaining: AtomicU64,
    /// Rounds before this one.
    pub round: AtomicU64,
    /// Bytes a second, so far.
    pub throughput: AtomicU64,
    /// Percent of the time that the vCPUs are held back.
    pub slowed: AtomicU64,
    /// Bytes of the disks that go along.
    pub disk_total: AtomicU64,
    /// Bytes of them that were sent, without those that are zeros.
    pub disk_sent: AtomicU64,
    /// Bytes of them that are to be sent in this round.
    pub disk_remaining: AtomicU64,
}

impl Progress {
    /// For so many bytes of RAM, and of disks.
    pub(crate) fn begin(&self, total: u64, disks: u64) {
        self.total.store(total, Ordering::Relaxed);
        self.remaining.store(total, Ordering::Relaxed);
        self.disk_total.store(disks, Ordering::Relaxed);
        self.disk_remaining.store(disks, Ordering::Relaxed);
        let others = [
            &self.sent,
            &self.round,
            &self.throughput,
            &self.slowed,
            &self.disk_sent,
        ];
        for counter in others {
            counter.store(0, Ordering::Relaxed);
        }
    }

    fn moved(&self, sent: u64, time: Duration) {
        self.sent.store(sent, Ordering::Relaxed);
        self.throughput
            .store(per_second(sent, time), Ordering::Relaxed);
    }

    /// As statistics.
    pub fn to_json(&self) -> serde_json::Value {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        serde_json::json!({
            "total": value(&self.total),
            "sent": value(&self.sent),
            "remaining": value(&self.remaining),
            "round": value(&self.round),
            "throughput": value(&self.throughput),
            "slowed": value(&self.slowed),
            "disk_total": value(&self.disk_total),
            "disk_sent": value(&self.disk_sent),
            "disk_remaining": value(&self.disk_remaining),
        })
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    let micros = time.as_micros().max(1);
    u64::try_from(u128::from(bytes).saturating_mul(1_000_000) / micros).unwrap_or(u64::MAX)
}
