//! The CMOS clock of a PC (Motorola MC146818 data sheet): the host's time in UTC, read-only.

use std::time::{SystemTime, UNIX_EPOCH};

const STATUS_A: u8 = 0x0A;
const STATUS_B: u8 = 0x0B;
const STATUS_D: u8 = 0x0D;
const CENTURY: u8 = 0x32;
/// Divider and rate as a PC's firmware leaves them; no update in progress.
const A: u8 = 0x26;
/// Hours count to 24, digits are BCD.
const B: u8 = 0x02;
const VALID: u8 = 0x80;

/// The clock's index register; the time is taken from the host at each read.
#[derive(Default)]
pub struct Cmos {
    index: u8,
}

impl Cmos {
    /// Chooses a register; the top bit masks NMIs on a PC and is ignored.
    pub fn select(&mut self, index: u8) {
        self.index = index & 0x7F;
    }

    /// The chosen register.
    pub fn read(&self) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        register(self.index, now.map_or(0, |passed| passed.as_secs()))
    }
}

fn bcd(value: u64) -> u8 {
    (value / 10 % 10 * 16 + value % 10) as u8
}

fn register(index: u8, seconds: u64) -> u8 {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let (year, month, day) = civil(days);
    match index {
        0 => bcd(rest % 60),
        2 => bcd(rest / 60 % 60),
        4 => bcd(rest / 3600),
        // Day 0 was a Thursday; Sunday is 1.
        6 => bcd((days + 4) % 7 + 1),
        7 => bcd(day),
        8 => bcd(month),
        9 => bcd(year % 100),
        CENTURY => bcd(year / 100),
        STATUS_A => A,
        STATUS_B => B,
        STATUS_D => VALID,
        _ => 0,
    }
}

/// Year, month and day of a day after 1970-01-01 (proleptic Gregorian, counted in years that begin in March).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = year + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(19_722), (2023, 12, 31));
        assert_eq!(civil(19_723), (2024, 1, 1));
    }

    #[test]
    fn registers() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let at = 1_709_251_198;
        let read = |index| register(index, at);
        assert_eq!([read(4), read(2), read(0)], [0x23, 0x59, 0x58]);
        assert_eq!(
            [read(CENTURY), read(9), read(8), read(7)],
            [0x20, 0x24, 0x02, 0x29]
        );
        assert_eq!(read(6), 5);
        assert_eq!(read(STATUS_A) & 0x80, 0);
    }
}
