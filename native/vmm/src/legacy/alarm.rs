// SPDX-License-Identifier: Apache-2.0
//! What the real-time clock interrupts for (MC146818A, "Interrupts"): once a second, at a time of the day, many times a
//! second.
//!
//! | bit of B and C | what happened |
//! |---|---|
//! | UF | the second has changed |
//! | AF | it has become that of the alarm; a register of the alarm from 0xc0 on means any |
//! | PF | a period of register A's rate has passed since PIE was set |
//!
//! What happened stands in C until that is read, whether it interrupts or not. Nothing happens at a time of its own: whoever
//! looks says what time it is, and all that happened since the last look has happened now, once. A clock that is set, or steps
//! back, is looked at anew. An alarm whose time passed while the machine stood, or was a file, is late and not lost.

use std::time::Duration;

use super::calendar::from_bcd;

/// Bits of registers B (enabled) and C (pending).
pub(super) const PERIODIC: u8 = 0x40;
pub(super) const ALARM: u8 = 0x20;
pub(super) const UPDATE: u8 = 0x10;
pub(super) const ALL: u8 = PERIODIC | ALARM | UPDATE;
/// Of register C: one of those is pending and enabled.
pub(super) const REQUEST: u8 = 0x80;

const SECOND: i128 = 1_000_000_000;
const DAY: i64 = 86_400;
/// From here on a register of the alarm matches anything.
const ANY: u8 = 0xc0;

/// The time: the host's in nanoseconds, and the guest's in seconds and the nanoseconds within.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub(super) host: i128,
    pub(super) second: i64,
    pub(super) nanoseconds: u32,
}

/// Seconds, minutes and hours of the alarm, as the guest wrote them.
pub(super) type AlarmTime = [u8; 3];

/// What may interrupt.
#[derive(Debug)]
pub(super) struct Interrupts {
    pub(super) enabled: u8,
    pub(super) pending: u8,
    /// The guest's second when it was looked at last.
    pub(super) seen: i64,
    /// When the next period is over, by the host's time.
    due: i128,
}

impl Interrupts {
    /// No period has begun.
    pub(super) fn new(enabled: u8, pending: u8, seen: i64) -> Interrupts {
        Interrupts {
            enabled: enabled & ALL,
            pending: pending & ALL,
            seen,
            due: 0,
        }
    }

    /// Whether the line is to be high.
    pub(super) fn requests(&self) -> bool {
        self.pending & self.enabled != 0
    }

    /// Register C, which reading clears.
    pub(super) fn take(&mut self) -> u8 {
        let request = if self.requests() { REQUEST } else { 0 };
        std::mem::take(&mut self.pending) | request
    }

    /// The clock has been set: no second has passed.
    pub(super) fn begin_anew(&mut self, now: Moment) {
        self.seen = now.second;
    }

    /// A period begins now.
    pub(super) fn begin_period(&mut self, now: Moment, period: Option<Duration>) {
        self.due = now.host.saturating_add(length(period.unwrap_or_default()));
    }

    /// Looks at the clock; `alarm` is None while the time is being set, when no second passes.
    pub(super) fn look(&mut self, now: Moment, alarm: Option<AlarmTime>, period: Option<Duration>) {
        if let Some(alarm) = alarm {
            if now.second > self.seen {
                self.pending |= UPDATE;
                let first = self.seen.saturating_add(1);
                if next(alarm, first).is_some_and(|at| at <= now.second) {
                    self.pending |= ALARM;
                }
            }
            self.seen = now.second;
        }
        let Some(period) = period.map(length).filter(|_| self.enabled & PERIODIC != 0) else {
            return;
        };
        let late = now.host.saturating_sub(self.due);
        if late >= 0 {
            self.pending |= PERIODIC;
            let into = late.checked_rem(period).unwrap_or(0);
            self.due = now.host.saturating_sub(into).saturating_add(period);
        } else if late < period.saturating_neg() {
            // The host's clock was set back.
            self.due = now.host.saturating_add(period);
        }
    }

    /// In how long there is something to interrupt for; None while the line is high, or if there will be nothing.
    pub(super) fn wait(
        &self,
        now: Moment,
        alarm: Option<AlarmTime>,
        period: Option<Duration>,
    ) -> Option<Duration> {
        if self.requests() {
            return None;
        }
        let into = i128::from(now.nanoseconds);
        let until = |second: i64| {
            let seconds = i128::from(second.saturating_sub(now.second));
            seconds.saturating_mul(SECOND).saturating_sub(into)
        };
        let update = alarm.filter(|_| self.enabled & UPDATE != 0);
        let update = update.map(|_| until(now.second.saturating_add(1)));
        let at = alarm.filter(|_| self.enabled & ALARM != 0);
        let at = at.and_then(|alarm| next(alarm, now.second.saturating_add(1)));
        let periodic = period.filter(|_| self.enabled & PERIODIC != 0);
        let periodic = periodic.map(|_| self.due.saturating_sub(now.host));
        let first = [update, at.map(until), periodic]
            .into_iter()
            .flatten()
            .min();
        first.map(|wait| Duration::from_nanos(u64::try_from(wait.max(0)).unwrap_or(u64::MAX)))
    }
}

fn length(period: Duration) -> i128 {
    i128::try_from(period.as_nanos()).unwrap_or(i128::MAX)
}

/// The first second, `from` or later, at which the alarm is; None if it never is.
fn next(alarm: AlarmTime, from: i64) -> Option<i64> {
    let today = from.div_euclid(DAY).checked_mul(DAY)?;
    let within = match time_of_day(alarm, from.rem_euclid(DAY)) {
        Some(second) => second,
        None => time_of_day(alarm, 0)?.checked_add(DAY)?,
    };
    today.checked_add(within)
}

/// The same within a day.
fn time_of_day(alarm: AlarmTime, from: i64) -> Option<i64> {
    let [seconds, minutes, hours] = alarm;
    let (seconds, minutes, hours) = (field(seconds, 60)?, field(minutes, 60)?, field(hours, 24)?);
    let (hour, minute, second) = (from / 3600, from / 60 % 60, from % 60);
    // Each is the least that is possible once those before it are greater than they have to be.
    for h in hours.clone().filter(|h| *h >= hour) {
        for m in minutes.clone().filter(|m| h > hour || *m >= minute) {
            let late = h > hour || m > minute;
            if let Some(s) = seconds.clone().find(|s| late || *s >= second) {
                return Some(h.saturating_mul(60).saturating_add(m).saturating_mul(60) + s);
            }
        }
    }
    None
}

/// What a register of the alarm stands for, below `bound`; None for what is no time.
fn field(register: u8, bound: i64) -> Option<std::ops::Range<i64>> {
    if register >= ANY {
        return Some(0..bound);
    }
    let value = i64::from(from_bcd(register)?);
    (value < bound).then(|| value..value.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: i64 = 20_000 * DAY + 12 * 3600;

    fn at(second: i64, nanoseconds: u32) -> Moment {
        Moment {
            host: i128::from(second) * SECOND + i128::from(nanoseconds),
            second,
            nanoseconds,
        }
    }

    fn seen(second: i64, enabled: u8) -> Interrupts {
        Interrupts::new(enabled, 0, second)
    }

    #[test]
    fn an_alarm_is_found_by_its_registers() {
        assert_eq!(
            next([0x30, 0x15, 0x13], NOON),
            Some(NOON + 3600 + 15 * 60 + 30)
        );
        assert_eq!(next([0x00, 0x00, 0x12], NOON), Some(NOON));
        assert_eq!(next([0x00, 0x00, 0x12], NOON + 1), Some(NOON + DAY));
        // Each minute, each second, each hour at a quarter past.
        assert_eq!(next([0x05, 0xff, 0xff], NOON + 6), Some(NOON + 65));
        assert_eq!(next([0xc0, 0xc0, 0xc0], NOON + 6), Some(NOON + 6));
        assert_eq!(
            next([0x00, 0x15, 0xff], NOON + 16 * 60),
            Some(NOON + 75 * 60)
        );
        assert_eq!(
            next([0x00, 0x00, 0xff], NOON + 12 * 3600 - 1),
            Some(NOON + 12 * 3600)
        );
        // No times.
        for alarm in [[0x60, 0, 0], [0, 0x1a, 0], [0, 0, 0x24]] {
            assert_eq!(next(alarm, NOON), None);
        }
    }

    #[test]
    fn what_happened_since_the_last_look_has_happened_once() {
        let alarm = Some([0x10, 0x00, 0x12]);
        let mut interrupts = seen(NOON, ALARM);
        interrupts.look(at(NOON, 999_999_999), alarm, None);
        assert_eq!((interrupts.pending, interrupts.requests()), (0, false));
        interrupts.look(at(NOON + 9, 0), alarm, None);
        assert_eq!((interrupts.pending, interrupts.requests()), (UPDATE, false));
        interrupts.look(at(NOON + 5000, 0), alarm, None);
        assert!(interrupts.requests());
        assert_eq!(interrupts.take(), REQUEST | ALARM | UPDATE);
        assert_eq!(interrupts.take(), 0);
        interrupts.look(at(NOON + DAY, 0), alarm, None);
        assert_eq!(interrupts.take(), UPDATE);
        // A clock that steps back is looked at anew.
        interrupts.look(at(NOON, 0), alarm, None);
        assert_eq!(interrupts.take(), 0);
        interrupts.look(at(NOON + 10, 0), alarm, None);
        assert_eq!(interrupts.take(), REQUEST | ALARM | UPDATE);
    }

    #[test]
    fn periods_that_nobody_looked_at_are_one() {
        let period = Some(Duration::from_nanos(976_563));
        let mut interrupts = seen(NOON, PERIODIC);
        interrupts.begin_period(at(NOON, 0), period);
        interrupts.look(at(NOON, 976_562), None, period);
        assert_eq!(interrupts.pending, 0);
        interrupts.look(at(NOON, 3 * 976_563 + 5), None, period);
        assert_eq!(interrupts.take(), REQUEST | PERIODIC);
        let wait = interrupts.wait(at(NOON, 3 * 976_563 + 5), None, period);
        assert_eq!(wait, Some(Duration::from_nanos(976_558)));
        // The host's clock is set back.
        interrupts.look(at(NOON - 100, 0), None, period);
        assert_eq!(interrupts.wait(at(NOON - 100, 0), None, period), period);
    }

    #[test]
    fn the_wait_is_for_the_first_that_is_enabled() {
        let alarm = Some([0x10, 0x00, 0x12]);
        let now = at(NOON, 250_000_000);
        assert_eq!(seen(NOON, 0).wait(now, alarm, None), None);
        let wait = seen(NOON, ALARM).wait(now, alarm, None);
        assert_eq!(wait, Some(Duration::from_millis(9750)));
        let wait = seen(NOON, ALARM | UPDATE).wait(now, alarm, None);
        assert_eq!(wait, Some(Duration::from_millis(750)));
        // Not while the time is being set, and not while the line is high.
        assert_eq!(seen(NOON, ALARM | UPDATE).wait(now, None, None), None);
        let mut high = seen(NOON, UPDATE);
        high.pending = UPDATE;
        assert_eq!(high.wait(now, alarm, None), None);
    }
}
