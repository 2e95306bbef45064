//! Cron expressions, the next tick, and what becomes of missed ones: pure arithmetic.
//!
//! # What an expression means when the clock changes
//!
//! An expression is read against the clock of its time zone (UTC without one). Twice a year most
//! clocks skip an hour or show one twice; some zones change by half an hour, some at midnight, and
//! Samoa once skipped a whole day. For all of them:
//!
//! | | local times that the clock skips | local times that it shows twice |
//! |---|---|---|
//! | **named times**: no `*` in hour, minute or second, such as `30 2 * * *`, `0 2,3 * * *`, `15 1-3 * * *` | due once, at the moment the gap ends | due the first time only |
//! | **by the clock**: a `*` or `*/n` in one of them, such as `* * * * *`, `0 * * * *`, `*/15 2 * * *` | not due: nothing shows them | due both times |
//!
//! So a nightly run is neither lost nor doubled, and what runs every hour or every five minutes does
//! so in real time. That is what Vixie cron and its descendants do; unlike them, a named time is also
//! made up for when the clock jumps by three hours or more. Several named times in one gap are due
//! once, and a due time that falls on the gap's end anyway is the same one.
//!
//! The day, month and day of the week are those of the named local time: `0 2 * * SUN` is due for the
//! Sunday whose two o'clock is missing. If day-of-month and day-of-week are both restricted (neither
//! is just `*`), a day that fits one of them is due.
//!
//! `croner` reads expressions and knows which days they name. The times are computed here: its own
//! search gives up at gaps of more than two hours, skips or doubles lists of hours such as
//! `0 2,3 * * *`, and finds other times backwards than forwards.

mod calendar;
#[cfg(test)]
mod clock;
mod daylight;
pub(crate) mod misfire;
pub(crate) mod pg_cron;

use std::time::Duration;

use calendar::Calendar;
use croner::{
    Cron,
    errors::CronError,
    parser::{CronParser, Seconds, Year},
};
use jiff::{Timestamp, tz::TimeZone};
use nexus_cron::{check_expression, check_time_zone};

pub use misfire::MisfireError;

/// What becomes of due times that no node was there to fire.
///
/// A due time counts as missed once it is later than the task's grace (default 60 s, at least 1 s); until then it
/// is fired for its own time, whatever the policy. What a policy fires carries its own due time
/// ([`Tick::due_at`](crate::Tick::due_at)).
///
/// As text it is what `#[cron]` and `nexus schedules add` take: `skip`, `fire_once`, or `fire_all(100)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Misfire {
    /// Missed due times are left out.
    Skip,
    /// However many were missed, the newest of them is fired. The default.
    #[default]
    FireOnce,
    /// Each missed due time is fired, oldest first, but no more than the newest `cap`.
    FireAll {
        /// From 1 to 1,000; older due times are left out.
        cap: u32,
    },
}

/// How late a due time may be fired for itself if a task does not say.
pub(crate) const DEFAULT_GRACE: Duration = Duration::from_mins(1);

/// When a scheduled task is due: a cron expression in a time zone.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    expression: String,
    calendar: Calendar,
    time_zone: TimeZone,
}

/// Why a schedule cannot be computed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScheduleError {
    #[error("cron expression `{expression}` is not valid: {reason}")]
    Expression { expression: String, reason: String },
    #[error("{reason}")]
    TimeZone { time_zone: String, reason: String },
    #[error("cron expression `{expression}` never comes due again")]
    Never { expression: String },
}

impl Schedule {
    /// Five fields, six with seconds first, or a name such as `@hourly`; UTC without a zone.
    pub(crate) fn parse(expression: &str, time_zone: Option<&str>) -> Result<Self, ScheduleError> {
        let invalid = |reason: String| ScheduleError::Expression {
            expression: expression.to_owned(),
            reason,
        };
        let cron = read(expression)
            .map_err(|error| invalid(mistakes(expression).unwrap_or_else(|| error.to_string())))?;
        if names_two_last_days(expression) {
            return Err(invalid("write `L` or `LW`, not both".to_owned()));
        }
        let time_zone = match time_zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|error| ScheduleError::TimeZone {
                time_zone: name.to_owned(),
                reason: zone_mistake(name).unwrap_or_else(|| error.to_string()),
            })?,
        };
        Ok(Self {
            expression: expression.to_owned(),
            calendar: Calendar::new(cron),
            time_zone,
        })
    }

    /// The first due time after `after`.
    pub(crate) fn next_after(&self, after: Timestamp) -> Result<Timestamp, ScheduleError> {
        daylight::first_after(&self.calendar, &self.time_zone, after).ok_or_else(|| {
            ScheduleError::Never {
                expression: self.expression.clone(),
            }
        })
    }

    /// The last due time at or before `now`; `None` if there is none in 400 years.
    pub(crate) fn previous(&self, now: Timestamp) -> Option<Timestamp> {
        daylight::last_until(&self.calendar, &self.time_zone, now)
    }
}

fn read(expression: &str) -> Result<Cron, CronError> {
    CronParser::builder()
        .seconds(Seconds::Optional)
        .year(Year::Disallowed)
        .build()
        .parse(expression)
}

/// What `#[cron]` would say of an expression; it accepts less than `croner`, whose errors do not say which
/// field is meant.
pub(crate) fn mistakes(expression: &str) -> Option<String> {
    let mistakes = check_expression(expression).err()?;
    let texts: Vec<String> = mistakes
        .into_iter()
        .map(|mistake| mistake.message.replace('\n', "; "))
        .collect();
    Some(texts.join("; "))
}

/// What `#[cron]` would say of a time zone.
pub(crate) fn zone_mistake(time_zone: &str) -> Option<String> {
    let text = check_time_zone(time_zone).err()?;
    Some(text.replace('\n', "; "))
}

/// Whether both the last day and the last working day are named; `croner` forgets the first of them.
fn names_two_last_days(expression: &str) -> bool {
    let expression = expression.to_uppercase();
    let names = |day: &str| expression.split([',', ' ', '\t']).any(|item| item == day);
    names("L") && names("LW")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        // Expressions of years that never come take long.
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_text_is_refused_or_has_times_in_order(
            text in prop_oneof!["[0-9*/,L#W?A-F -]{0,24}", "(([0-9]{1,2}|\\*|\\*/[0-9]{1,2}|[0-9]-[0-9]{1,2}) ){4}[0-9*]", "\\PC{0,16}"],
            seconds in -2_000_000_000_i64..8_000_000_000
        ) {
            let after = Timestamp::from_second(seconds).expect("it is between 1906 and 2223");
            if let Ok(schedule) = Schedule::parse(&text, Some("Europe/Berlin"))
                && let Ok(next) = schedule.next_after(after)
            {
                prop_assert!(next > after);
                prop_assert_eq!(schedule.previous(next), Some(next));
            }
        }
    }

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn says_which_field_is_wrong() {
        let reason = |expression: &str| {
            let error = Schedule::parse(expression, None).unwrap_err();
            error.to_string()
        };
        assert_eq!(
            reason("61 * * * *"),
            "cron expression `61 * * * *` is not valid: invalid minute field `61` (allowed: 0-59)"
        );
        assert_eq!(
            reason("0 0 9 * * MOO"),
            "cron expression `0 0 9 * * MOO` is not valid: invalid day-of-week field `MOO` (allowed: 0-7, or SUN to SAT)"
        );
        for (wrong, part) in [
            ("* * *", "this one has 3"),
            ("@dayly", "did you mean `@daily`?"),
            ("@every 5m", "write `*/5 * * * *`"),
            ("", "is empty; write five fields"),
        ] {
            assert!(reason(wrong).contains(part), "{}", reason(wrong));
        }
    }

    #[test]
    fn counts_in_the_zone_of_the_task() {
        let schedule = Schedule::parse("30 9 * * *", Some("Europe/Berlin")).unwrap();
        assert_eq!(
            schedule.next_after(at("2026-07-01T00:00:00Z")).unwrap(),
            at("2026-07-01T07:30:00Z")
        );
        assert_eq!(
            schedule.next_after(at("2026-12-01T00:00:00Z")).unwrap(),
            at("2026-12-01T08:30:00Z")
        );
    }

    #[test]
    fn takes_five_fields_six_fields_and_names() {
        let next = |expression: &str| {
            let schedule = Schedule::parse(expression, None).unwrap();
            schedule
                .next_after(at("2026-01-01T00:00:00Z"))
                .unwrap()
                .to_string()
        };
        assert_eq!(next("*/5 * * * *"), "2026-01-01T00:05:00Z");
        assert_eq!(next("*/10 * * * * *"), "2026-01-01T00:00:10Z");
        assert_eq!(next("@hourly"), "2026-01-01T01:00:00Z");
    }

    #[test]
    fn leap_days_come_when_the_calendar_has_them() {
        let leap_day = Schedule::parse("0 0 29 2 *", Some("Europe/Berlin")).unwrap();
        let next = |after| leap_day.next_after(at(after)).unwrap();
        assert_eq!(next("2026-01-01T00:00:00Z"), at("2028-02-28T23:00:00Z"));
        // 2000 was a leap year, 2100 is none.
        assert_eq!(next("1996-03-01T00:00:00Z"), at("2000-02-28T23:00:00Z"));
        assert_eq!(next("2096-03-01T00:00:00Z"), at("2104-02-28T23:00:00Z"));
        let before = leap_day.previous(at("2103-06-01T00:00:00Z")).unwrap();
        assert_eq!(before, at("2096-02-28T23:00:00Z"));
        let last = Schedule::parse("0 12 L 2 *", None).unwrap();
        let last = |after| last.next_after(at(after)).unwrap();
        assert_eq!(last("2100-01-01T00:00:00Z"), at("2100-02-28T12:00:00Z"));
        assert_eq!(last("2028-01-01T00:00:00Z"), at("2028-02-29T12:00:00Z"));
    }

    #[test]
    fn finds_what_is_due_once_in_decades() {
        // The leap day and a Monday: `+` asks for both.
        let monday = Schedule::parse("0 0 29 2 +MON", None).unwrap();
        let next = |after| monday.next_after(at(after)).unwrap();
        assert_eq!(next("2024-03-01T00:00:00Z"), at("2044-02-29T00:00:00Z"));
        assert_eq!(next("2072-03-01T00:00:00Z"), at("2112-02-29T00:00:00Z"));
    }

    #[test]
    fn what_never_comes_due_is_an_error_and_not_a_long_search() {
        for never in [
            "0 0 30 2 *",
            "* * 31 4,6,9,11 *",
            "0 0 31W 2 *",
            "0 0 1 1 +MON#5",
        ] {
            for zone in [None, Some("Europe/Berlin"), Some("Pacific/Apia")] {
                let schedule = Schedule::parse(never, zone).unwrap();
                let error = schedule.next_after(at("2026-01-01T00:00:00Z")).unwrap_err();
                assert!(error.to_string().contains(never), "{error}");
                assert_eq!(schedule.previous(at("2026-01-01T00:00:00Z")), None);
            }
        }
    }

    #[test]
    fn takes_any_time_that_can_be_stored() {
        let schedule = Schedule::parse("0 0 1 1 *", Some("Europe/Berlin")).unwrap();
        assert!(schedule.next_after(Timestamp::MAX).is_err());
        assert_eq!(schedule.previous(Timestamp::MIN), None);
        // Before there were time zones, clocks showed the mean time of the place.
        assert_eq!(
            schedule.next_after(at("1890-06-01T00:00:00Z")).unwrap(),
            at("1890-12-31T23:06:32Z")
        );
    }

    #[test]
    fn says_what_is_wrong() {
        let both = Schedule::parse("0 0 L,lw * *", None).unwrap_err();
        assert!(both.to_string().ends_with("write `L` or `LW`, not both"));
        assert!(Schedule::parse("61 * * * *", None).is_err());
        let error = Schedule::parse("* * * * *", Some("Europe/Berln")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown time zone `Europe/Berln`; did you mean `Europe/Berlin`?; a time zone is a name of the IANA database, such as `Europe/Berlin` or `UTC`"
        );
        let never = Schedule::parse("0 0 31 2 *", None).unwrap();
        assert!(never.next_after(at("2026-01-01T00:00:00Z")).is_err());
    }
}
