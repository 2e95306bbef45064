//! The fields of a cron expression against the calendar: which local times they name.
//!
//! Nothing here knows a time zone; `daylight` maps local times to real ones.

use croner::{Cron, CronPattern, Weekday};
use jiff::civil::{Date, DateTime, Time};

/// The calendar repeats after this many years, weekdays included: what is not due in as many is never
/// due.
const LONGEST_SEARCH_YEARS: i16 = 400;

/// The local times that an expression names.
#[derive(Debug, Clone)]
pub(super) struct Calendar {
    cron: Cron,
    hours: Values,
    minutes: Values,
    seconds: Values,
}

impl Calendar {
    pub(super) fn new(cron: Cron) -> Self {
        let pattern = &cron.pattern;
        let [hours, minutes, seconds] =
            [&pattern.hours, &pattern.minutes, &pattern.seconds].map(|field| {
                Values(
                    field
                        .values()
                        .iter()
                        .fold(0, |bits, value| bits | 1 << value),
                )
            });
        Self {
            cron,
            hours,
            minutes,
            seconds,
        }
    }

    /// The fields as they were read.
    pub(super) fn pattern(&self) -> &CronPattern {
        &self.cron.pattern
    }

    /// Whether the hour, the minute or the second is written with `*`.
    pub(super) fn repeats_within_the_day(&self) -> bool {
        let pattern = &self.cron.pattern;
        [&pattern.hours, &pattern.minutes, &pattern.seconds]
            .iter()
            .any(|field| field.from_wildcard)
    }

    /// The first local time at or after `from`.
    pub(super) fn first_from(&self, from: DateTime) -> Option<DateTime> {
        if let (true, Some(time)) = (self.names_day(from.date()), self.time_from(from.time())) {
            return Some(from.date().to_datetime(time));
        }
        let time = self.time_from(Time::midnight())?;
        let last_year = from.year().saturating_add(LONGEST_SEARCH_YEARS);
        let mut date = from.date().tomorrow().ok()?;
        while date.year() <= last_year {
            if !self.names_month(date) {
                date = date.last_of_month();
            } else if self.names_day(date) {
                return Some(date.to_datetime(time));
            }
            date = date.tomorrow().ok()?;
        }
        None
    }

    /// The last local time at or before `until`.
    pub(super) fn last_until(&self, until: DateTime) -> Option<DateTime> {
        if let (true, Some(time)) = (self.names_day(until.date()), self.time_until(until.time())) {
            return Some(until.date().to_datetime(time));
        }
        let time = self.time_until(Time::MAX)?;
        let first_year = until.year().saturating_sub(LONGEST_SEARCH_YEARS);
        let mut date = until.date().yesterday().ok()?;
        while date.year() >= first_year {
            if !self.names_month(date) {
                date = date.first_of_month();
            } else if self.names_day(date) {
                return Some(date.to_datetime(time));
            }
            date = date.yesterday().ok()?;
        }
        None
    }

    fn names_month(&self, date: Date) -> bool {
        self.cron
            .pattern
            .month_match(number(date.month()))
            .expect("a month of the calendar")
    }

    fn names_day(&self, date: Date) -> bool {
        self.names_month(date)
            && self
                .cron
                .pattern
                .day_match(
                    i32::from(date.year()),
                    number(date.month()),
                    number(date.day()),
                    weekday(date),
                )
                .expect("a day of the calendar")
    }

    fn time_from(&self, time: Time) -> Option<Time> {
        let [hour, minute, second] = [time.hour(), time.minute(), time.second()].map(number);
        let hour = if self.hours.has(hour) {
            let minute = if self.minutes.has(minute) {
                if let Some(second) = self.seconds.from(second) {
                    return at(hour, minute, second);
                }
                minute + 1
            } else {
                minute
            };
            if let Some(minute) = self.minutes.from(minute) {
                return at(hour, minute, self.seconds.from(0)?);
            }
            hour + 1
        } else {
            hour
        };
        at(
            self.hours.from(hour)?,
            self.minutes.from(0)?,
            self.seconds.from(0)?,
        )
    }

    fn time_until(&self, time: Time) -> Option<Time> {
        let [hour, minute, second] = [time.hour(), time.minute(), time.second()].map(number);
        // Up to and including; a value before the first is none.
        let before = |value: u32| value.checked_sub(1);
        let hour = if self.hours.has(hour) {
            let minute = if self.minutes.has(minute) {
                if let Some(second) = self.seconds.until(second) {
                    return at(hour, minute, second);
                }
                before(minute)
            } else {
                Some(minute)
            };
            if let Some(minute) = minute.and_then(|minute| self.minutes.until(minute)) {
                return at(hour, minute, self.seconds.until(59)?);
            }
            before(hour)?
        } else {
            hour
        };
        at(
            self.hours.until(hour)?,
            self.minutes.until(59)?,
            self.seconds.until(59)?,
        )
    }
}

/// The values of a field, as bits.
#[derive(Debug, Clone, Copy)]
struct Values(u64);

impl Values {
    fn has(self, value: u32) -> bool {
        self.0 & (1 << value) != 0
    }

    /// The first at or after `value`, which is below 64.
    fn from(self, value: u32) -> Option<u32> {
        let left = self.0 & (u64::MAX << value);
        (left != 0).then(|| left.trailing_zeros())
    }

    /// The last at or before `value`, which is below 64.
    fn until(self, value: u32) -> Option<u32> {
        let left = self.0 & (u64::MAX >> (63 - value));
        (left != 0).then(|| left.ilog2())
    }
}

/// Fields of jiff's times and dates are small and not negative.
fn number(field: i8) -> u32 {
    u32::from(field.unsigned_abs())
}

fn at(hour: u32, minute: u32, second: u32) -> Option<Time> {
    let [hour, minute, second] = [hour, minute, second].map(|field| i8::try_from(field).ok());
    Time::new(hour?, minute?, second?, 0).ok()
}

fn weekday(date: Date) -> Weekday {
    match date.weekday() {
        jiff::civil::Weekday::Sunday => Weekday::Sunday,
        jiff::civil::Weekday::Monday => Weekday::Monday,
        jiff::civil::Weekday::Tuesday => Weekday::Tuesday,
        jiff::civil::Weekday::Wednesday => Weekday::Wednesday,
        jiff::civil::Weekday::Thursday => Weekday::Thursday,
        jiff::civil::Weekday::Friday => Weekday::Friday,
        jiff::civil::Weekday::Saturday => Weekday::Saturday,
    }
}
