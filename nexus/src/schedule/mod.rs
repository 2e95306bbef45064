//! Cron expressions, the next tick, and what becomes of missed ones: pure arithmetic.

pub(crate) mod misfire;

use std::time::Duration;

use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};
use jiff::{Timestamp, tz::TimeZone};

/// What becomes of due times that no node was there to fire.
///
/// A due time counts as missed once it is later than the task's grace (default 60 s); until then it
/// is fired for its own time, whatever the policy. What a policy fires carries its own due time
/// ([`Tick::due_at`](crate::Tick::due_at)).
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
    cron: Cron,
    time_zone: TimeZone,
}

/// Why a schedule cannot be computed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ScheduleError {
    #[error("cron expression `{expression}` is not valid: {reason}")]
    Expression { expression: String, reason: String },
    #[error("time zone `{time_zone}` is not known")]
    TimeZone {
        time_zone: String,
        source: jiff::Error,
    },
    #[error("cron expression `{expression}` never comes due again")]
    Never { expression: String },
}

impl Schedule {
    /// Five fields, six with seconds first, or a name such as `@hourly`; UTC without a zone.
    pub(crate) fn parse(expression: &str, time_zone: Option<&str>) -> Result<Self, ScheduleError> {
        let cron = CronParser::builder()
            .seconds(Seconds::Optional)
            .year(Year::Disallowed)
            .build()
            .parse(expression)
            .map_err(|error| ScheduleError::Expression {
                expression: expression.to_owned(),
                reason: error.to_string(),
            })?;
        let time_zone = match time_zone {
            None => TimeZone::UTC,
            Some(name) => TimeZone::get(name).map_err(|source| ScheduleError::TimeZone {
                time_zone: name.to_owned(),
                source,
            })?,
        };
        Ok(Self { cron, time_zone })
    }

    /// The first due time after `after`.
    pub(crate) fn next_after(&self, after: Timestamp) -> Result<Timestamp, ScheduleError> {
        let after = after.to_zoned(self.time_zone.clone());
        self.cron
            .find_next_occurrence(&after, false)
            .map(|next| next.timestamp())
            .map_err(|_| ScheduleError::Never {
                expression: self.cron.as_str().to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
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
    fn says_what_is_wrong() {
        assert!(Schedule::parse("61 * * * *", None).is_err());
        let error = Schedule::parse("* * * * *", Some("Europe/Berln")).unwrap_err();
        assert_eq!(error.to_string(), "time zone `Europe/Berln` is not known");
        let never = Schedule::parse("0 0 31 2 *", None).unwrap();
        assert!(never.next_after(at("2026-01-01T00:00:00Z")).is_err());
    }
}
