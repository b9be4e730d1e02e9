// SPDX-License-Identifier: Apache-2.0
//! Dates of seconds since 1970, and seconds of dates; digits as a real-time clock has them.

/// Two digits.
pub(super) fn bcd(value: u16) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

/// None for what are no two digits.
pub(super) fn from_bcd(value: u8) -> Option<u16> {
    let (tens, ones) = (u16::from(value >> 4), u16::from(value & 0xf));
    (tens < 10 && ones < 10).then(|| tens.wrapping_mul(10).wrapping_add(ones))
}

/// A moment in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Calendar {
    pub(super) year: u16,
    pub(super) month: u16,
    pub(super) day: u16,
    pub(super) hour: u16,
    pub(super) minute: u16,
    pub(super) second: u16,
    /// 1 is Sunday.
    pub(super) day_of_week: u16,
}

impl Calendar {
    /// Days to a date by Howard Hinnant's `civil_from_days`.
    #[allow(clippy::arithmetic_side_effects)] // years are within i64 by far
    pub(super) fn from_unix(seconds: i64) -> Calendar {
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
    pub(super) fn to_unix(self) -> i64 {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_dates_agree_both_ways() {
        for day in (-200_000_i64..200_000).step_by(37) {
            let time = Calendar::from_unix(day * 86400 + 12345);
            assert_eq!(time.to_unix(), day * 86400 + 12345, "{time:?}");
        }
    }
}
