//! Which schedules the extension `pg_cron` can keep, and how it reads them.
//!
//! It looks once a minute, at the clock of one time zone, and reads five fields without `L`, `W` and
//! `#`. Its expressions are written anew, with numbers only: it would read some differently, such as
//! `*/2 * MON` in the last three fields (it takes a step for no restriction), `SAT-SUN` and `@yearly`.

use jiff::{Timestamp, tz::TimeZone};

use super::Schedule;

/// Why `pg_cron` cannot keep a schedule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotForPgCron {
    #[error("it names seconds, and pg_cron looks once a minute")]
    Seconds,
    #[error("pg_cron does not know `L`, `W` and `#`")]
    Days,
    #[error("pg_cron does not know `+`, which asks for both kinds of days")]
    BothDays,
    #[error(
        "it is for time zone {zone}, whose clock is changed, and pg_cron neither runs what falls into a missing hour nor tells a doubled one"
    )]
    ClockChanges { zone: String },
    #[error("it is for time zone {zone}, and pg_cron goes by {server}")]
    OtherZone { zone: String, server: String },
}

impl Schedule {
    /// The expression as `pg_cron` reads it, whose clock shows the time of `server`: `*`, numbers,
    /// ranges and steps.
    pub(crate) fn for_pg_cron(
        &self,
        server: &TimeZone,
        now: Timestamp,
    ) -> Result<String, NotForPgCron> {
        let pattern = self.calendar.pattern();
        if pattern.seconds.values() != [0] {
            return Err(NotForPgCron::Seconds);
        }
        if pattern.days.has_modifiers() || pattern.days_of_week.has_modifiers() {
            return Err(NotForPgCron::Days);
        }
        let any_day = pattern.is_dom_wildcard();
        let any_weekday = pattern.is_dow_wildcard();
        if pattern.matches_dom_and_dow() && !any_day && !any_weekday {
            return Err(NotForPgCron::BothDays);
        }
        let is_changed = |zone: &TimeZone| {
            // Some of the listed changes are none of the offset.
            let offset = zone.to_offset(now);
            zone.following(now).any(|change| change.offset() != offset)
        };
        if is_changed(&self.time_zone) {
            return Err(NotForPgCron::ClockChanges {
                zone: name(&self.time_zone),
            });
        }
        if is_changed(server) || server.to_offset(now) != self.time_zone.to_offset(now) {
            return Err(NotForPgCron::OtherZone {
                zone: name(&self.time_zone),
                server: name(server),
            });
        }
        let days = |any: bool, values: Vec<u16>| {
            if any { "*".to_owned() } else { ranges(&values) }
        };
        Ok(format!(
            "{} {} {} {} {}",
            steps(&pattern.minutes.values(), 60),
            steps(&pattern.hours.values(), 24),
            days(any_day, pattern.days.values()),
            if pattern.months.values().len() == 12 {
                "*".to_owned()
            } else {
                ranges(&pattern.months.values())
            },
            days(any_weekday, pattern.days_of_week.values()),
        ))
    }
}

fn name(zone: &TimeZone) -> String {
    zone.iana_name().unwrap_or("UTC").to_owned()
}

/// Values from 0 to before `end`: as `*` or `*/n` if they are that.
fn steps(values: &[u16], end: u16) -> String {
    if let [0, step, ..] = *values
        && values.iter().copied().eq((0..end).step_by(step.into()))
    {
        return match step {
            1 => "*".to_owned(),
            step => format!("*/{step}"),
        };
    }
    ranges(values)
}

/// Values as a list, in which three in a row are a range.
fn ranges(values: &[u16]) -> String {
    let items: Vec<String> = values
        .chunk_by(|a, b| a + 1 == *b)
        .flat_map(|row| match row {
            [first, .., last] if row.len() > 2 => vec![format!("{first}-{last}")],
            few => few.iter().map(ToString::to_string).collect(),
        })
        .collect();
    items.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(expression: &str, zone: Option<&str>, server: &str) -> Result<String, NotForPgCron> {
        Schedule::parse(expression, zone).unwrap().for_pg_cron(
            &TimeZone::get(server).unwrap(),
            "2026-06-01T00:00:00Z".parse().unwrap(),
        )
    }

    #[test]
    fn writes_what_pg_cron_reads_the_same() {
        for (expression, expected) in [
            ("* * * * *", "* * * * *"),
            ("*/5 * * * *", "*/5 * * * *"),
            ("0 0 */6 * * *", "0 */6 * * *"),
            ("5-59/20 0-2,22 * * *", "5,25,45 0-2,22 * * *"),
            ("0 9 * * MON-FRI", "0 9 * * 1-5"),
            ("0 9 * * sat-sun", "0 9 * * 0,6"),
            ("0 9 * * 7", "0 9 * * 0"),
            ("0 0 */10 JAN,jul 1", "0 0 1,11,21,31 1,7 1"),
            ("0 0 1-31 * 1", "0 0 1-31 * 1"),
            ("0 0 ? * 0-7", "0 0 * * 0-6"),
            ("59 23 31 12 *", "59 23 31 12 *"),
            ("0-59/7 */23 * * *", "*/7 */23 * * *"),
            ("@hourly", "0 * * * *"),
            ("@weekly", "0 0 * * 0"),
            ("@yearly", "0 0 1 1 *"),
        ] {
            assert_eq!(
                written(expression, None, "GMT").as_deref(),
                Ok(expected),
                "{expression}"
            );
        }
    }

    #[test]
    fn says_what_pg_cron_cannot_keep() {
        assert_eq!(
            written("*/10 * * * * *", None, "GMT"),
            Err(NotForPgCron::Seconds)
        );
        assert_eq!(
            written("30 0 9 * * *", None, "GMT"),
            Err(NotForPgCron::Seconds)
        );
        for days in [
            "0 0 L * *",
            "0 0 LW * *",
            "0 0 15W,3 * *",
            "0 0 * * 5L",
            "0 0 * * FRI#2",
        ] {
            assert_eq!(
                written(days, None, "GMT"),
                Err(NotForPgCron::Days),
                "{days}"
            );
        }
        assert_eq!(
            written("0 0 13 * +FRI", None, "GMT"),
            Err(NotForPgCron::BothDays)
        );
        let nine = |zone, server| written("0 9 * * *", Some(zone), server);
        assert!(nine("Etc/UTC", "GMT").is_ok());
        assert!(nine("Africa/Abidjan", "GMT").is_ok());
        assert!(nine("Asia/Kolkata", "Asia/Kolkata").is_ok());
        // Its clock was changed until 2019.
        assert!(nine("America/Sao_Paulo", "Etc/GMT+3").is_ok());
        assert_eq!(
            nine("Asia/Kolkata", "GMT").unwrap_err().to_string(),
            "it is for time zone Asia/Kolkata, and pg_cron goes by GMT"
        );
        assert!(matches!(
            nine("Europe/Berlin", "Europe/Berlin"),
            Err(NotForPgCron::ClockChanges { .. })
        ));
        assert!(matches!(
            nine("UTC", "Europe/Berlin"),
            Err(NotForPgCron::OtherZone { .. })
        ));
    }
}
