// SPDX-License-Identifier: Apache-2.0
//! The real-time clock and its CMOS memory (MC146818), at ports 0x70 and 0x71.
//!
//! Time is the host's, UTC, in BCD and 24 hours; what the guest sets is kept as an offset. Memory sizes stand
//! where a PC's firmware puts them, because SeaBIOS and OVMF read them there.
//!
//! It interrupts by IRQ 8 ([`super::alarm`]): a timer of the kernel's wakes the control thread, which calls [`Cmos::wake`], at
//! least every ten seconds while there is something to wait for, since the host's clock may be set. While the machine stands it
//! interrupts for nothing; `wake` is called when it goes on. Binary registers, 12 hours and the square wave are left out.

use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::alarm::{self, AlarmTime, Interrupts, Moment, PERIODIC, UPDATE};
use super::calendar::{bcd, from_bcd, Calendar};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::irq::Line;
use crate::layout;
use crate::state::{self, Bytes, Stateful};
use crate::timer::Timer;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const DAY_OF_WEEK: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// The place that FADT's CENTURY names.
pub const CENTURY: u8 = 0x32;

/// The time is about to change; it is not to be read.
const UPDATE_IN_PROGRESS: u8 = 0x80;
/// The usual divider and rate.
const STATUS_A_DEFAULT: u8 = 0x26;
/// No update while the time is being set.
const SET: u8 = 0x80;
/// 24 hours, BCD.
const STATUS_B_DEFAULT: u8 = 0x02;
/// RAM and time are valid.
const VALID: u8 = 0x80;
/// An update takes 244 µs before the second.
const UPDATE_NANOSECONDS: u32 = 1_000_000_000 - 244_000;
/// The host's clock is looked at again after so long.
const WAIT_MAX: Duration = Duration::from_secs(10);

struct State {
    index: u8,
    memory: [u8; 128],
    status_a: u8,
    status_b: u8,
    /// Guest's time minus the host's, in seconds.
    offset: i64,
    /// The time as the guest writes it while SET is on.
    setting: [u8; 128],
    interrupts: Interrupts,
    /// Whether the timer is.
    armed: bool,
}

impl State {
    fn moment(&self, (seconds, nanoseconds): (i64, u32)) -> Moment {
        let host = i128::from(seconds).saturating_mul(1_000_000_000);
        Moment {
            host: host.saturating_add(i128::from(nanoseconds)),
            second: seconds.saturating_add(self.offset),
            nanoseconds,
        }
    }

    /// None while the time is being set.
    fn alarm(&self) -> Option<AlarmTime> {
        let register = |index| byte(&self.memory, index);
        let alarm = [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM].map(register);
        (self.status_b & SET == 0).then_some(alarm)
    }

    /// Register A's rate, if it has one.
    fn period(&self) -> Option<Duration> {
        // 1 and 2 are what 8 and 9 are.
        let shift = match self.status_a & 0xf {
            0 => return None,
            rate @ 1..=2 => rate.wrapping_add(6),
            rate => rate.wrapping_sub(1),
        };
        let ticks = 1u64.checked_shl(u32::from(shift)).unwrap_or(1);
        Some(Duration::from_nanos(
            ticks.saturating_mul(1_000_000_000) / 32_768,
        ))
    }

    fn look(&mut self, now: Moment) {
        let (alarm, period) = (self.alarm(), self.period());
        self.interrupts.look(now, alarm, period);
    }
}

/// The clock.
pub struct Cmos {
    state: Mutex<State>,
    line: Line,
    timer: Timer,
    /// Seconds and nanoseconds since 1970, UTC.
    now: fn() -> (i64, u32),
}

impl Cmos {
    /// A clock of a machine with `memory` bytes of RAM and `vcpus` vCPUs, which interrupts through `line`.
    ///
    /// # Errors
    /// `Unavailable` when the kernel gives no timer.
    pub fn new(memory: u64, vcpus: u8, line: Line) -> Result<Cmos> {
        Cmos::with_clock(memory, vcpus, line, host_time)
    }

    fn with_clock(memory: u64, vcpus: u8, line: Line, now: fn() -> (i64, u32)) -> Result<Cmos> {
        let interrupts = Interrupts::new(0, 0, now().0);
        Ok(Cmos {
            line,
            timer: Timer::new()?,
            state: Mutex::new(State {
                index: 0,
                memory: sizes(memory, vcpus),
                status_a: STATUS_A_DEFAULT,
                status_b: STATUS_B_DEFAULT,
                offset: 0,
                setting: [0; 128],
                interrupts,
                armed: false,
            }),
            now,
        })
    }

    /// Readable when [`Cmos::wake`] is to be called.
    pub fn timer(&self) -> RawFd {
        self.timer.fd()
    }

    /// The timer is readable, but the machine stands: it is when it goes on that this matters.
    pub fn sleep(&self) {
        self.timer.note();
        self.lock().armed = false;
    }

    /// The timer is readable, or the machine goes on.
    pub fn wake(&self) {
        self.timer.note();
        let mut state = self.lock();
        let now = state.moment((self.now)());
        state.look(now);
        self.settle(&mut state, now);
    }

    /// The line as it is to be, and the timer for when it will be another.
    fn settle(&self, state: &mut State, now: Moment) {
        self.line.set(state.interrupts.requests());
        let wait = state.interrupts.wait(now, state.alarm(), state.period());
        if wait.is_some() || state.armed {
            self.timer.arm(wait.map(|wait| wait.min(WAIT_MAX)));
        }
        state.armed = wait.is_some();
    }

    /// Back to the state after power-on; the clock and the memory have a battery.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.index = 0;
        state.status_a = STATUS_A_DEFAULT;
        state.status_b = STATUS_B_DEFAULT;
        state.interrupts.enabled = 0;
        state.interrupts.pending = 0;
        let now = state.moment((self.now)());
        state.interrupts.begin_anew(now);
        self.settle(&mut state, now);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read_register(&self) -> u8 {
        let mut state = self.lock();
        let (seconds, nanoseconds) = (self.now)();
        let time = Calendar::from_unix(seconds.saturating_add(state.offset));
        match state.index {
            STATUS_A if nanoseconds >= UPDATE_NANOSECONDS && state.status_b & SET == 0 => {
                state.status_a | UPDATE_IN_PROGRESS
            }
            STATUS_A => state.status_a,
            STATUS_B => state.status_b | state.interrupts.enabled,
            STATUS_C => {
                let now = state.moment((seconds, nanoseconds));
                state.look(now);
                let pending = state.interrupts.take();
                self.settle(&mut state, now);
                pending
            }
            STATUS_D => VALID,
            index if is_time(index) && state.status_b & SET != 0 => byte(&state.setting, index),
            SECONDS => bcd(time.second),
            MINUTES => bcd(time.minute),
            HOURS => bcd(time.hour),
            DAY_OF_WEEK => bcd(time.day_of_week),
            DAY => bcd(time.day),
            MONTH => bcd(time.month),
            YEAR => bcd(time.year % 100),
            CENTURY => bcd(time.year / 100),
            index => byte(&state.memory, index),
        }
    }

    fn write_register(&self, value: u8) {
        let mut state = self.lock();
        let index = state.index;
        let (seconds, nanoseconds) = (self.now)();
        let now = state.moment((seconds, nanoseconds));
        // What has happened by now has happened by the rules until now.
        state.look(now);
        match index {
            STATUS_A => {
                state.status_a = value & !UPDATE_IN_PROGRESS;
                let period = state.period();
                state.interrupts.begin_period(now, period);
            }
            STATUS_B => {
                let was_set = state.status_b & SET != 0;
                // The format is not the guest's to change.
                state.status_b = value & SET | STATUS_B_DEFAULT;
                let enabled = value & alarm::ALL;
                if enabled & PERIODIC & !state.interrupts.enabled != 0 {
                    let period = state.period();
                    state.interrupts.begin_period(now, period);
                }
                // Setting the time ends the interrupts of updates (MC146818A, "Register B").
                let ended = if value & SET != 0 { UPDATE } else { 0 };
                state.interrupts.enabled = enabled & !ended;
                if value & SET != 0 && !was_set {
                    let time = Calendar::from_unix(seconds.saturating_add(state.offset));
                    state.setting = registers(&time);
                } else if value & SET == 0 && was_set {
                    if let Some(time) = from_registers(&state.setting) {
                        state.offset = time.to_unix().saturating_sub(seconds);
                    }
                    let now = state.moment((seconds, nanoseconds));
                    state.interrupts.begin_anew(now);
                }
            }
            STATUS_C | STATUS_D => {}
            index if is_time(index) => {
                if state.status_b & SET != 0 {
                    put(&mut state.setting, index, value);
                }
            }
            index => put(&mut state.memory, index, value),
        }
        let now = state.moment((seconds, nanoseconds));
        self.settle(&mut state, now);
    }
}

/// The time is not part of it: the clock goes on with the host's.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    index: u8,
    memory: Bytes,
    status_a: u8,
    status_b: u8,
    offset: i64,
    setting: Bytes,
    /// Register C.
    #[serde(default)]
    pending: u8,
    /// The guest's second that it has last noticed.
    #[serde(default)]
    seen: Option<i64>,
}

impl Stateful for Cmos {
    fn save(&self) -> Result<state::State> {
        let state = self.lock();
        state::write(&Saved {
            index: state.index,
            memory: Bytes(state.memory.to_vec()),
            status_a: state.status_a,
            status_b: state.status_b | state.interrupts.enabled,
            offset: state.offset,
            setting: Bytes(state.setting.to_vec()),
            pending: state.interrupts.pending,
            seen: Some(state.interrupts.seen),
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        let mut state = self.lock();
        let interrupts = Interrupts::new(saved.status_b, saved.pending, 0);
        *state = State {
            index: saved.index & 0x7f,
            memory: saved.memory.array()?,
            status_a: saved.status_a & !UPDATE_IN_PROGRESS,
            status_b: saved.status_b & SET | STATUS_B_DEFAULT,
            // As far as a guest can set it: to the year 9999 and back.
            offset: saved.offset.clamp(-(1 << 39), 1 << 39),
            setting: saved.setting.array()?,
            interrupts,
            armed: state.armed,
        };
        let now = state.moment((self.now)());
        state.interrupts.seen = saved.seen.unwrap_or(now.second).min(now.second);
        let period = state.period();
        state.interrupts.begin_period(now, period);
        self.line.set(state.interrupts.requests());
        Ok(())
    }
}

impl BusDevice for Cmos {
    fn read(&self, _base: u64, offset: u64, data: &mut [u8]) {
        if let (1, [byte]) = (offset, data) {
            *byte = self.read_register();
        }
    }

    fn write(&self, _base: u64, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Bit 7 masks the NMI, which nothing here raises.
            (0, [index]) => self.lock().index = index & 0x7f,
            (1, [value]) => self.write_register(*value),
            _ => {}
        }
    }
}

/// The memory of a new clock: sizes of RAM where firmware looks for them.
pub fn sizes(memory: u64, vcpus: u8) -> [u8; 128] {
    let (low, high) = crate::memory::split(memory);
    let mut cmos = [0; 128];
    let mut put16 = |index: u8, value: u64| {
        let value = u16::try_from(value).unwrap_or(u16::MAX);
        put(&mut cmos, index, value as u8);
        put(&mut cmos, index.wrapping_add(1), (value >> 8) as u8);
    };
    let above_1m = low.saturating_sub(layout::EXTENDED_START);
    put16(0x15, layout::CONVENTIONAL_END >> 10);
    put16(0x17, above_1m >> 10);
    put16(0x30, above_1m >> 10);
    put16(0x34, low.saturating_sub(16 << 20) >> 16);
    // Above 4 GiB, 24 bits of 64 KiB.
    put16(0x5b, (high >> 16) & 0xffff);
    put(&mut cmos, 0x5d, (high >> 32) as u8);
    put(&mut cmos, 0x5f, vcpus.saturating_sub(1));
    cmos
}

fn host_time() -> (i64, u32) {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(time) => (
            i64::try_from(time.as_secs()).unwrap_or(0),
            time.subsec_nanos(),
        ),
        Err(_) => (0, 0),
    }
}

fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECONDS | MINUTES | HOURS | DAY_OF_WEEK | DAY | MONTH | YEAR | CENTURY
    )
}

fn byte(memory: &[u8; 128], index: u8) -> u8 {
    memory.get(usize::from(index)).copied().unwrap_or(0xff)
}

fn put(memory: &mut [u8; 128], index: u8, value: u8) {
    if let Some(place) = memory.get_mut(usize::from(index)) {
        *place = value;
    }
}

/// A time as the registers show it.
fn registers(time: &Calendar) -> [u8; 128] {
    let mut registers = [0; 128];
    for (index, value) in [
        (SECONDS, time.second),
        (MINUTES, time.minute),
        (HOURS, time.hour),
        (DAY_OF_WEEK, time.day_of_week),
        (DAY, time.day),
        (MONTH, time.month),
        (YEAR, time.year % 100),
        (CENTURY, time.year / 100),
    ] {
        put(&mut registers, index, bcd(value));
    }
    registers
}

/// The time that they show; None for what is none.
fn from_registers(registers: &[u8; 128]) -> Option<Calendar> {
    let read = |index| from_bcd(byte(registers, index));
    let time = Calendar {
        year: read(CENTURY)?.checked_mul(100)?.checked_add(read(YEAR)?)?,
        month: read(MONTH)?,
        day: read(DAY)?,
        hour: read(HOURS)?,
        minute: read(MINUTES)?,
        second: read(SECONDS)?,
        day_of_week: 1,
    };
    ((1..=12).contains(&time.month)
        && (1..=31).contains(&time.day)
        && time.hour < 24
        && time.minute < 60
        && time.second < 60)
        .then_some(time)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::Arc;

    use super::*;

    thread_local! {
        /// Seconds and nanoseconds since 1970.
        static NOW: Cell<(i64, u32)> = const { Cell::new((0, 0)) };
    }

    /// A clock that stands at a time.
    fn at(seconds: i64) -> Cmos {
        counted(seconds).0
    }

    /// The same, and how often its line went high.
    fn counted(seconds: i64) -> (Cmos, Arc<AtomicUsize>) {
        NOW.set((seconds, 0));
        let count = Arc::new(AtomicUsize::new(0));
        let counting = count.clone();
        let line = Line::with(move |level| {
            counting.fetch_add(usize::from(level), Ordering::Relaxed);
        });
        let cmos = Cmos::with_clock(64 << 20, 1, line, || NOW.get()).unwrap();
        (cmos, count)
    }

    /// Whether the kernel's timer ends within ten seconds.
    fn rings(cmos: &Cmos) -> bool {
        let mut poll = libc::pollfd {
            fd: cmos.timer(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which outlives the call.
        unsafe { libc::poll(&mut poll, 1, 10_000) == 1 }
    }

    fn get(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(layout::CMOS, 0, &[index]);
        let mut data = [0];
        cmos.read(layout::CMOS, 1, &mut data);
        data[0]
    }

    fn set(cmos: &Cmos, index: u8, value: u8) {
        cmos.write(layout::CMOS, 0, &[index]);
        cmos.write(layout::CMOS, 1, &[value]);
    }

    #[test]
    fn the_time_is_in_bcd() {
        // `date -u -d '2024-02-29 23:59:58' +%s`; a Thursday.
        let cmos = at(1_709_251_198);
        let read: Vec<u8> = [
            CENTURY,
            YEAR,
            MONTH,
            DAY,
            HOURS,
            MINUTES,
            SECONDS,
            DAY_OF_WEEK,
        ]
        .iter()
        .map(|index| get(&cmos, *index))
        .collect();
        assert_eq!(read, [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58, 0x05]);
    }

    #[test]
    fn a_time_that_the_guest_set_goes_on_from_there() {
        let cmos = at(1_709_251_198);
        set(&cmos, STATUS_B, SET | STATUS_B_DEFAULT);
        set(&cmos, YEAR, 0x31);
        set(&cmos, DAY, 0x28);
        set(&cmos, STATUS_B, STATUS_B_DEFAULT);
        assert_eq!(
            (get(&cmos, YEAR), get(&cmos, DAY), get(&cmos, HOURS)),
            (0x31, 0x28, 0x23)
        );
        // 29 February 2031 is no day; the clock goes on with what it makes of it.
        set(&cmos, STATUS_B, SET | STATUS_B_DEFAULT);
        set(&cmos, MONTH, 0x99);
        set(&cmos, STATUS_B, STATUS_B_DEFAULT);
        assert_eq!(get(&cmos, MONTH), 0x02);
    }

    #[test]
    fn firmware_finds_the_memory_size() {
        let cmos = Cmos::new(5 << 30, 4, Line::with(|_| {})).unwrap();
        let low = u32::from(get(&cmos, 0x34)) | u32::from(get(&cmos, 0x35)) << 8;
        assert_eq!((u64::from(low) << 16) + (16 << 20), 2 << 30);
        let high = u64::from(get(&cmos, 0x5b))
            | u64::from(get(&cmos, 0x5c)) << 8
            | u64::from(get(&cmos, 0x5d)) << 16;
        assert_eq!(high << 16, 3 << 30);
        assert_eq!(get(&cmos, 0x5f), 3);
    }

    #[test]
    fn each_cause_interrupts_until_it_is_read() {
        // 23:59:58 on that day.
        let (cmos, count) = counted(1_709_251_198);
        for (index, value) in [
            (SECONDS_ALARM, 0x00),
            (MINUTES_ALARM, 0x00),
            (HOURS_ALARM, 0x00),
        ] {
            set(&cmos, index, value);
        }
        set(&cmos, STATUS_B, alarm::ALARM | STATUS_B_DEFAULT);
        assert_eq!(get(&cmos, STATUS_B), alarm::ALARM | STATUS_B_DEFAULT);
        NOW.set((1_709_251_199, 0));
        cmos.wake();
        assert_eq!(count.load(Ordering::Relaxed), 0);
        NOW.set((1_709_251_200, 0));
        cmos.wake();
        cmos.wake();
        assert_eq!(count.load(Ordering::Relaxed), 1, "at midnight, once");
        assert_eq!(get(&cmos, STATUS_C), alarm::REQUEST | alarm::ALARM | UPDATE);
        assert_eq!(get(&cmos, STATUS_C), 0);
        set(&cmos, STATUS_B, UPDATE | STATUS_B_DEFAULT);
        NOW.set((1_709_251_201, 5));
        cmos.wake();
        assert_eq!(count.load(Ordering::Relaxed), 2);
        assert_eq!(get(&cmos, STATUS_C), alarm::REQUEST | UPDATE);
        // While the time is being set no second passes, and updates interrupt no more.
        set(&cmos, STATUS_B, SET | UPDATE | STATUS_B_DEFAULT);
        assert_eq!(get(&cmos, STATUS_B), SET | STATUS_B_DEFAULT);
        NOW.set((1_709_251_300, 0));
        cmos.wake();
        assert_eq!(get(&cmos, STATUS_C), 0);
        cmos.reset();
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn the_kernels_timer_rings_for_what_is_enabled() {
        let (cmos, count) = counted(1_709_251_198);
        set(&cmos, STATUS_B, PERIODIC | STATUS_B_DEFAULT);
        assert!(rings(&cmos), "1024 times a second");
        NOW.set((1_709_251_198, 1_000_000));
        cmos.wake();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert_eq!(get(&cmos, STATUS_C), alarm::REQUEST | PERIODIC);
        assert!(rings(&cmos), "it is armed again");
        // While the machine stands nothing happens; afterwards it does.
        cmos.sleep();
        NOW.set((1_709_251_198, 9_000_000));
        assert_eq!(count.load(Ordering::Relaxed), 1);
        cmos.wake();
        assert_eq!(count.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn an_alarm_that_passed_while_the_machine_was_a_file_is_late_and_not_lost() {
        let (cmos, _) = counted(1_709_251_198);
        set(&cmos, STATUS_B, alarm::ALARM | STATUS_B_DEFAULT);
        let saved = cmos.save().unwrap();
        let (other, count) = counted(1_709_251_198 + 3600);
        other.restore(&saved).unwrap();
        assert_eq!(get(&other, STATUS_B), alarm::ALARM | STATUS_B_DEFAULT);
        assert_eq!(count.load(Ordering::Relaxed), 0);
        other.wake();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        // A line that was high is.
        let saved = other.save().unwrap();
        let (third, count) = counted(1_709_251_198 + 3600);
        third.restore(&saved).unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert_eq!(
            get(&third, STATUS_C),
            alarm::REQUEST | alarm::ALARM | UPDATE
        );
    }
}
