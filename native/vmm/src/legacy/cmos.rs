// SPDX-License-Identifier: Apache-2.0
//! The real-time clock and its CMOS memory (MC146818), at ports 0x70 and 0x71.
//!
//! Time is the host's, UTC, in BCD and 24 hours; what the guest sets is kept as an offset. Memory sizes stand
//! where a PC's firmware puts them, because SeaBIOS and OVMF read them there. There are no periodic, alarm
//! or update interrupts: Linux falls back to polling.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::error::Result;
use crate::layout;
use crate::state::{self, Bytes, Stateful};

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
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

struct State {
    index: u8,
    memory: [u8; 128],
    status_a: u8,
    status_b: u8,
    /// Guest's time minus the host's, in seconds.
    offset: i64,
    /// The time as the guest writes it while SET is on.
    setting: [u8; 128],
}

/// The clock.
pub struct Cmos {
    state: Mutex<State>,
    /// Seconds and nanoseconds since 1970, UTC.
    now: fn() -> (i64, u32),
}

impl Cmos {
    /// A clock of a machine with `memory` bytes of RAM and `vcpus` vCPUs.
    pub fn new(memory: u64, vcpus: u8) -> Cmos {
        Cmos::with_clock(memory, vcpus, host_time)
    }

    fn with_clock(memory: u64, vcpus: u8, now: fn() -> (i64, u32)) -> Cmos {
        Cmos {
            state: Mutex::new(State {
                index: 0,
                memory: sizes(memory, vcpus),
                status_a: STATUS_A_DEFAULT,
                status_b: STATUS_B_DEFAULT,
                offset: 0,
                setting: [0; 128],
            }),
            now,
        }
    }

    /// Back to the state after power-on; the clock and the memory have a battery.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.index = 0;
        state.status_a = STATUS_A_DEFAULT;
        state.status_b = STATUS_B_DEFAULT;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn read_register(&self) -> u8 {
        let state = self.lock();
        let (seconds, nanoseconds) = (self.now)();
        let time = Calendar::from_unix(seconds.saturating_add(state.offset));
        match state.index {
            STATUS_A if nanoseconds >= UPDATE_NANOSECONDS && state.status_b & SET == 0 => {
                state.status_a | UPDATE_IN_PROGRESS
            }
            STATUS_A => state.status_a,
            STATUS_B => state.status_b,
            STATUS_C => 0,
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
        match index {
            STATUS_A => state.status_a = value & !UPDATE_IN_PROGRESS,
            STATUS_B => {
                let was_set = state.status_b & SET != 0;
                // The format and the interrupt enables are not ours to change.
                state.status_b = value & SET | STATUS_B_DEFAULT;
                let (seconds, _) = (self.now)();
                if value & SET != 0 && !was_set {
                    let time = Calendar::from_unix(seconds.saturating_add(state.offset));
                    state.setting = time.registers();
                } else if value & SET == 0 && was_set {
                    if let Some(time) = Calendar::from_registers(&state.setting) {
                        state.offset = time.to_unix().saturating_sub(seconds);
                    }
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
}

impl Stateful for Cmos {
    fn save(&self) -> Result<state::State> {
        let state = self.lock();
        state::write(&Saved {
            index: state.index,
            memory: Bytes(state.memory.to_vec()),
            status_a: state.status_a,
            status_b: state.status_b,
            offset: state.offset,
            setting: Bytes(state.setting.to_vec()),
        })
    }

    fn restore(&self, state: &state::State) -> Result<()> {
        let saved: Saved = state::read(state)?;
        *self.lock() = State {
            index: saved.index & 0x7f,
            memory: saved.memory.array()?,
            status_a: saved.status_a & !UPDATE_IN_PROGRESS,
            status_b: saved.status_b & SET | STATUS_B_DEFAULT,
            // As far as a guest can set it: to the year 9999 and back.
            offset: saved.offset.clamp(-(1 << 39), 1 << 39),
            setting: saved.setting.array()?,
        };
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

/// The memory sizes where firmware looks for them.
fn sizes(memory: u64, vcpus: u8) -> [u8; 128] {
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

fn bcd(value: u16) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

fn from_bcd(value: u8) -> Option<u16> {
    let (tens, ones) = (u16::from(value >> 4), u16::from(value & 0xf));
    (tens < 10 && ones < 10).then(|| tens.wrapping_mul(10).wrapping_add(ones))
}

/// A moment in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Calendar {
    year: u16,
    month: u16,
    day: u16,
    hour: u16,
    minute: u16,
    second: u16,
    /// 1 is Sunday.
    day_of_week: u16,
}

impl Calendar {
    /// Days to a date by Howard Hinnant's `civil_from_days`.
    #[allow(clippy::arithmetic_side_effects)] // years are within i64 by far
    fn from_unix(seconds: i64) -> Calendar {
        let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
        let z = days + 719_468;
        let era = z.div_euclid(146_097);
        let day_of_era = z.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let month = if shifted < 10 {
            shifted + 3
        } else {
            shifted - 9
        };
        Calendar {
            year: (year_of_era + era * 400 + i64::from(month <= 2)) as u16,
            month: month as u16,
            day: (day_of_year - (153 * shifted + 2) / 5 + 1) as u16,
            hour: (second / 3600) as u16,
            minute: (second / 60 % 60) as u16,
            second: (second % 60) as u16,
            day_of_week: ((days + 4).rem_euclid(7) + 1) as u16,
        }
    }

    /// The inverse, by `days_from_civil`.
    #[allow(clippy::arithmetic_side_effects)] // all fields are small
    fn to_unix(self) -> i64 {
        let year = i64::from(self.year) - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let shifted = (i64::from(self.month) + 9) % 12;
        let day_of_year = (153 * shifted + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86400
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    fn registers(&self) -> [u8; 128] {
        let mut registers = [0; 128];
        for (index, value) in [
            (SECONDS, self.second),
            (MINUTES, self.minute),
            (HOURS, self.hour),
            (DAY_OF_WEEK, self.day_of_week),
            (DAY, self.day),
            (MONTH, self.month),
            (YEAR, self.year % 100),
            (CENTURY, self.year / 100),
        ] {
            put(&mut registers, index, bcd(value));
        }
        registers
    }

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
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let cmos = Cmos::with_clock(64 << 20, 1, || (1_709_251_198, 0));
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
        let cmos = Cmos::with_clock(64 << 20, 1, || (1_709_251_198, 0));
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
    fn days_and_dates_agree_both_ways() {
        for day in (-200_000_i64..200_000).step_by(37) {
            let time = Calendar::from_unix(day * 86400 + 12345);
            assert_eq!(time.to_unix(), day * 86400 + 12345, "{time:?}");
        }
    }

    #[test]
    fn firmware_finds_the_memory_size() {
        let cmos = Cmos::new(5 << 30, 4);
        let low = u32::from(get(&cmos, 0x34)) | u32::from(get(&cmos, 0x35)) << 8;
        assert_eq!((u64::from(low) << 16) + (16 << 20), 2 << 30);
        let high = u64::from(get(&cmos, 0x5b))
            | u64::from(get(&cmos, 0x5c)) << 8
            | u64::from(get(&cmos, 0x5d)) << 16;
        assert_eq!(high << 16, 3 << 30);
        assert_eq!(get(&cmos, 0x5f), 3);
    }
}
