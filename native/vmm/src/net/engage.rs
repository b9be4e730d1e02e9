// SPDX-License-Identifier: Apache-2.0
//! Which of an interface's rings the kernel serves, and when: [`super::vhost`] behind a tap.
//!
//! | needed | to transmit | to receive |
//! |---|---|---|
//! | the broker gave /dev/vhost-net for each of the tap's queues | x | x |
//! | the machine runs, the cable is plugged in, the driver keeps the rules | x | x |
//! | nobody wants marks of what is written: no migration sends the machine's memory | x | x |
//! | the driver uses as many pairs as the tap has queues: else frames for one go to another | | x |
//! | it takes mergeable buffers: without them some kernels leave a part of the header as it was | | x |
//! | the tap filters as the driver said ([`super::filter`]), which a macvtap cannot | | x |
//! | the tap was empty since: what came before its filter is sorted here | | x |
//! | no command is being carried out: what it says holds for all that is received after its answer | | x |
//!
//! What the kernel does not serve is served here, by the same rules, and the driver cannot tell. Whenever one of this
//! changes the rings are taken back first, and left to the kernel again afterwards.
//!
//! A tap's filter is changed under a lock that all of the host's network shares, so a driver that changes its mind
//! [`BURST`] times and goes on more often than once a [`PAUSE`] is received for here.
//!
//! Left out: interrupts that go straight to the guest. The network thread hears of them first, for a vector may be masked.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::filter;
use super::interface::Active;
use super::vhost::Way;
use super::Tap;
use crate::migrate::marks;
use crate::virtio::net::Purpose;
use crate::virtio::queue::Fault;

/// How many changes of the filter are saved up, at most.
const BURST: u32 = 64;
/// How long it takes until there is one more.
const PAUSE: Duration = Duration::from_secs(1);

/// How often a driver may still change the filter of its tap.
pub(super) struct Changes {
    left: u32,
    since: Instant,
}

impl Changes {
    pub(super) fn new(now: Instant) -> Changes {
        Changes {
            left: BURST,
            since: now,
        }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.since).as_secs() / PAUSE.as_secs();
        if passed > 0 {
            self.since = now;
            let passed = u32::try_from(passed).unwrap_or(BURST);
            self.left = self.left.saturating_add(passed).min(BURST);
        }
        let left = self.left.checked_sub(1);
        self.left = left.unwrap_or(0);
        left.is_some()
    }
}

/// A ring whose server changes, and what is watched while it is ours: its doorbell and, to receive, the tap's queue.
pub(super) struct Shift {
    pub(super) place: usize,
    pub(super) kick: RawFd,
    pub(super) source: Option<(usize, RawFd)>,
}

/// What is watched instead while the kernel serves it.
pub(super) struct Left {
    pub(super) shift: Shift,
    pub(super) call: RawFd,
    pub(super) error: RawFd,
}

impl Active {
    /// Leaves the transmit queues to the kernel, as far as it takes them, and makes ready to leave it the others.
    pub(super) fn engage(&mut self, tap: &mut Tap) -> Vec<Left> {
        self.arm(tap);
        if self.halted || self.is_marked() {
            return Vec::new();
        }
        let transmits = |place: &usize| {
            let queue = self.queues.get(*place);
            queue.is_some_and(|queue| matches!(queue.purpose, Purpose::Transmit(_)))
        };
        let places: Vec<usize> = (0..self.queues.len()).filter(transmits).collect();
        let left = places.into_iter();
        left.filter_map(|place| self.leave(place, tap)).collect()
    }

    /// Sees to it that the tap filters as the driver says now, or that receiving stays here.
    fn arm(&mut self, tap: &mut Tap) {
        self.armed = tap.is_helped()
            && self.mergeable
            && !self.halted
            && !self.is_marked()
            && usize::from(self.settings.pairs) == tap.len()
            && self.filter(tap);
        if !self.armed {
            tap.unfilter();
        }
    }

    fn filter(&mut self, tap: &mut Tap) -> bool {
        let program = filter::program(&self.settings);
        tap.has_filter(&program)
            || (self.changes.take(Instant::now()) && tap.filter(program).is_ok())
    }

    /// Whether receiving may be left to the kernel once the tap is empty.
    pub(super) fn is_armed(&self) -> bool {
        self.armed
    }

    /// Leaves the kernel the queue for what comes from `source` of the tap, which was empty just now.
    pub(super) fn engage_receiving(&mut self, source: usize, tap: &mut Tap) -> Option<Left> {
        let mut queues = self.queues.iter_mut();
        let place = queues.position(
            |queue| matches!(queue.purpose, Purpose::Receive(pair) if usize::from(pair) == source),
        )?;
        let queue = self.queues.get_mut(place).filter(|_| self.armed)?;
        if queue.engaged.is_some() || queue.held.is_some() {
            return None;
        }
        queue.put_back();
        let left = self.leave(place, tap);
        // Not again and again.
        self.armed = left.is_some();
        left
    }

    fn leave(&mut self, place: usize, tap: &mut Tap) -> Option<Left> {
        let queue = self.queues.get_mut(place)?;
        let (way, pair) = way(queue.purpose).filter(|_| queue.engaged.is_none())?;
        let (helper, fd) = tap.helper(pair)?;
        let inner = &queue.inner;
        let engaged = helper.engage(way, &inner.queue, self.features, &inner.kick, fd);
        // Without the kernel's help it is served here.
        let engaged = engaged.ok()?;
        let left = Left {
            shift: Shift {
                place,
                kick: inner.kick.as_raw_fd(),
                source: (way == Way::Receive).then_some((pair, fd)),
            },
            call: engaged.call.as_raw_fd(),
            error: engaged.error.as_raw_fd(),
        };
        queue.engaged = Some(engaged);
        Some(left)
    }

    /// Takes back what the kernel serves, of both ways or of one; what to watch again comes back. (What was watched
    /// instead is closed.)
    ///
    /// # Errors
    /// Any [`Fault`] of a queue.
    pub(super) fn disengage(
        &mut self,
        only: Option<Way>,
        tap: &mut Tap,
    ) -> (Vec<Shift>, Result<(), Fault>) {
        let (mut shifts, mut outcome) = (Vec::new(), Ok(()));
        for (place, queue) in self.queues.iter_mut().enumerate() {
            let Some((way, pair)) = way(queue.purpose) else {
                continue;
            };
            if only.is_some_and(|only| only != way) {
                continue;
            }
            let Some(_until_it_has_let_go) = queue.engaged.take() else {
                continue;
            };
            let mut source = None;
            if let Some((helper, fd)) = tap.helper(pair) {
                outcome = outcome.and(helper.disengage(way, &mut queue.inner.queue));
                source = (way == Way::Receive).then_some((pair, fd));
            }
            let kick = queue.inner.kick.as_raw_fd();
            shifts.push(Shift {
                place,
                kick,
                source,
            });
            // The driver may have wanted to know of the last ones, and nobody knows whether it was told.
            self.interrupt.used(queue.inner.index);
        }
        (shifts, outcome)
    }

    /// Whether the kernel serves the queue at `place`.
    pub(super) fn is_engaged(&self, place: usize) -> bool {
        let queue = self.queues.get(place);
        queue.is_some_and(|queue| queue.engaged.is_some())
    }

    /// How many of its queues the kernel serves.
    pub(super) fn engaged(&self) -> usize {
        let queues = self.queues.iter();
        queues.filter(|queue| queue.engaged.is_some()).count()
    }

    /// The kernel has used requests of the queue at `place`, and the driver wants to know.
    pub(super) fn called(&self, place: usize) {
        if let Some(queue) = self.queues.get(place) {
            self.interrupt.used(queue.inner.index);
        }
    }

    fn is_marked(&self) -> bool {
        let queue = self.queues.first();
        queue.is_some_and(|queue| marks::is_on(queue.inner.queue.memory()))
    }
}

fn way(purpose: Purpose) -> Option<(Way, usize)> {
    match purpose {
        Purpose::Receive(pair) => Some((Way::Receive, usize::from(pair))),
        Purpose::Transmit(pair) => Some((Way::Transmit, usize::from(pair))),
        Purpose::Control | Purpose::Unused => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_changes_its_mind_all_the_time_has_to_wait() {
        let begun = Instant::now();
        let mut changes = Changes::new(begun);
        assert!((0..BURST).all(|_| changes.take(begun)));
        assert!(!changes.take(begun));
        assert!(changes.take(begun + PAUSE));
        assert!(!changes.take(begun + PAUSE));
        let later = begun + 1000 * PAUSE;
        assert!((0..BURST).all(|_| changes.take(later)));
        assert!(!changes.take(later));
    }
}
