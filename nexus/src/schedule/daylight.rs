//! Local times to real ones, also where the clock of a time zone is set.
//!
//! Between two changes of its offset the clock of a zone runs evenly, so everything here is counted
//! in stretches from one change to the next. The rules stand in the documentation of `schedule`.

use jiff::{
    SignedDuration, Timestamp,
    civil::DateTime,
    tz::{AmbiguousOffset, Offset, TimeZone},
};

use super::calendar::Calendar;

const SECOND: SignedDuration = SignedDuration::from_secs(1);

/// The first due time after `after`.
pub(super) fn first_after(
    calendar: &Calendar,
    zone: &TimeZone,
    after: Timestamp,
) -> Option<Timestamp> {
    let from = whole_second(after)?.checked_add(SECOND).ok()?;
    if calendar.repeats_within_the_day() {
        first_by_the_clock(calendar, zone, from)
    } else {
        first_named_time(calendar, zone, from)
    }
}

/// The last due time at or before `until`.
pub(super) fn last_until(
    calendar: &Calendar,
    zone: &TimeZone,
    until: Timestamp,
) -> Option<Timestamp> {
    let until = whole_second(until)?;
    if calendar.repeats_within_the_day() {
        last_by_the_clock(calendar, zone, until)
    } else {
        last_named_time(calendar, zone, until)
    }
}

/// Due is every moment at which the clock shows a time of the expression.
fn first_by_the_clock(
    calendar: &Calendar,
    zone: &TimeZone,
    mut from: Timestamp,
) -> Option<Timestamp> {
    loop {
        let offset = zone.to_offset(from);
        let found = calendar.first_from(offset.to_datetime(from))?;
        let found = offset.to_timestamp(found).ok()?;
        match zone.following(from).next() {
            Some(change) if change.timestamp() <= found => from = change.timestamp(),
            _ => return Some(found),
        }
    }
}

fn last_by_the_clock(
    calendar: &Calendar,
    zone: &TimeZone,
    mut until: Timestamp,
) -> Option<Timestamp> {
    loop {
        let offset = zone.to_offset(until);
        let found = calendar.last_until(offset.to_datetime(until))?;
        let found = offset.to_timestamp(found).ok()?;
        match last_change(zone, until) {
            Some(change) if found < change => until = change.checked_sub(SECOND).ok()?,
            _ => return Some(found),
        }
    }
}

/// Due is every time of the expression, once: a missing one when the gap ends, a doubled one when the
/// clock shows it first.
///
/// Due times are in the order of the local times, so it is enough to find the local time.
fn first_named_time(calendar: &Calendar, zone: &TimeZone, from: Timestamp) -> Option<Timestamp> {
    // What the clock shows for the second time has been due.
    let local = match clock_set_back(zone, from) {
        Some(shown_first) => shown_first,
        None => local_time_one_second_before(zone, from)?,
    };
    real_time(zone, calendar.first_from(local)?)
}

fn last_named_time(calendar: &Calendar, zone: &TimeZone, until: Timestamp) -> Option<Timestamp> {
    let local = match clock_set_back(zone, until) {
        // All that the clock shows for the second time has been due.
        Some(shown_first) => shown_first.checked_sub(SECOND).ok()?,
        None => zone.to_datetime(until),
    };
    real_time(zone, calendar.last_until(local)?)
}

/// The local time after the second before `from`, which is missing if the clock is set forward at
/// `from`.
fn local_time_one_second_before(zone: &TimeZone, from: Timestamp) -> Option<DateTime> {
    let before = zone.to_datetime(from.checked_sub(SECOND).ok()?);
    before.checked_add(SECOND).ok()
}

/// While the clock shows local times for the second time: the first local time that is new again.
fn clock_set_back(zone: &TimeZone, at: Timestamp) -> Option<DateTime> {
    let change = last_change(zone, at)?;
    let before = zone.to_offset(change.checked_sub(SECOND).ok()?);
    let new_again = before.to_datetime(change);
    (zone.to_datetime(at) < new_again).then_some(new_again)
}

/// When a local time is due.
fn real_time(zone: &TimeZone, local: DateTime) -> Option<Timestamp> {
    let at = |offset: Offset| offset.to_timestamp(local).ok();
    match zone.to_ambiguous_timestamp(local).offset() {
        AmbiguousOffset::Unambiguous { offset } => at(offset),
        AmbiguousOffset::Fold { before, .. } => at(before),
        // By the new offset a missing time is before the change, by the old one at or after it.
        AmbiguousOffset::Gap { after, .. } => zone
            .following(at(after)?)
            .next()
            .map(|change| change.timestamp()),
    }
}

/// When the offset was changed last, at or before `at`.
fn last_change(zone: &TimeZone, at: Timestamp) -> Option<Timestamp> {
    let change = zone.preceding(at.checked_add(SECOND).ok()?).next()?;
    Some(change.timestamp())
}

/// The second that a moment is in.
fn whole_second(at: Timestamp) -> Option<Timestamp> {
    Timestamp::from_second(
        at.as_nanosecond()
            .div_euclid(1_000_000_000)
            .try_into()
            .ok()?,
    )
    .ok()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::Schedule;

    /// All due times from one moment to before another, as the clock shows them.
    fn due(expression: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
        let schedule = Schedule::parse(expression, Some(zone)).unwrap();
        let [from, to]: [Timestamp; 2] = [from, to].map(|text| text.parse().unwrap());
        let before = from - super::SECOND;
        std::iter::successors(Some(before), |&last| schedule.next_after(last).ok())
            .skip(1)
            .take_while(|&at| at < to)
            .map(|at| {
                at.to_zoned(schedule.time_zone.clone())
                    .strftime("%d %H:%M %:z")
                    .to_string()
            })
            .collect()
    }

    /// The night in which Berlin has no time from 02:00 to 03:00.
    fn missing(expression: &str) -> Vec<String> {
        due(
            expression,
            "Europe/Berlin",
            "2026-03-28T23:00Z",
            "2026-03-29T02:30Z",
        )
    }

    /// The night in which Berlin has the time from 02:00 to 03:00 twice.
    fn doubled(expression: &str) -> Vec<String> {
        due(
            expression,
            "Europe/Berlin",
            "2026-10-24T22:00Z",
            "2026-10-25T02:30Z",
        )
    }

    #[test]
    fn a_nightly_run_in_the_missing_hour_is_due_when_the_gap_ends() {
        assert_eq!(missing("30 2 * * *"), ["29 03:00 +02:00"]);
        assert_eq!(missing("0 2 * * *"), ["29 03:00 +02:00"]);
        assert_eq!(missing("59 59 2 * * *"), ["29 03:00 +02:00"]);
        assert_eq!(missing("30 2 * * SUN"), ["29 03:00 +02:00"]);
    }

    #[test]
    fn a_nightly_run_in_the_doubled_hour_is_due_the_first_time() {
        assert_eq!(doubled("30 2 * * *"), ["25 02:30 +02:00"]);
        assert_eq!(doubled("0 2 * * *"), ["25 02:00 +02:00"]);
        assert_eq!(doubled("59 59 2 * * *"), ["25 02:59 +02:00"]);
    }

    #[test]
    fn runs_beside_the_missing_hour_are_where_they_always_are() {
        assert_eq!(missing("0 0 * * *"), ["29 00:00 +01:00"]);
        assert_eq!(missing("59 1 * * *"), ["29 01:59 +01:00"]);
        assert_eq!(missing("0 3 * * *"), ["29 03:00 +02:00"]);
        assert_eq!(doubled("59 1 * * *"), ["25 01:59 +02:00"]);
        assert_eq!(doubled("0 3 * * *"), ["25 03:00 +01:00"]);
    }

    #[test]
    fn several_runs_in_the_missing_hour_are_due_once() {
        assert_eq!(missing("0,20,40 2 * * *"), ["29 03:00 +02:00"]);
        assert_eq!(missing("0 2,3 * * *"), ["29 03:00 +02:00"]);
        assert_eq!(
            missing("15 1-3 * * *"),
            ["29 01:15 +01:00", "29 03:00 +02:00", "29 03:15 +02:00"]
        );
    }

    #[test]
    fn several_runs_in_the_doubled_hour_are_due_once_each() {
        assert_eq!(
            doubled("0,20,40 2 * * *"),
            ["25 02:00 +02:00", "25 02:20 +02:00", "25 02:40 +02:00"]
        );
        assert_eq!(
            doubled("0 2,3 * * *"),
            ["25 02:00 +02:00", "25 03:00 +01:00"]
        );
        assert_eq!(
            doubled("15 1-3 * * *"),
            ["25 01:15 +02:00", "25 02:15 +02:00", "25 03:15 +01:00"]
        );
    }

    #[test]
    fn hourly_runs_go_on_every_hour() {
        for hourly in ["0 * * * *", "@hourly", "0 */1 * * *"] {
            assert_eq!(
                missing(hourly),
                [
                    "29 00:00 +01:00",
                    "29 01:00 +01:00",
                    "29 03:00 +02:00",
                    "29 04:00 +02:00"
                ]
            );
            assert_eq!(
                doubled(hourly),
                [
                    "25 00:00 +02:00",
                    "25 01:00 +02:00",
                    "25 02:00 +02:00",
                    "25 02:00 +01:00",
                    "25 03:00 +01:00"
                ]
            );
        }
    }

    #[test]
    fn runs_every_two_hours_follow_the_clock() {
        assert_eq!(
            missing("0 */2 * * *"),
            ["29 00:00 +01:00", "29 04:00 +02:00"]
        );
        assert_eq!(
            doubled("0 */2 * * *"),
            ["25 00:00 +02:00", "25 02:00 +02:00", "25 02:00 +01:00"]
        );
    }

    #[test]
    fn runs_every_minute_or_few_go_on_in_real_time() {
        // Three and a half hours of real time, and four and a half.
        for (every, missed, shown) in [("* * * * *", 210, 270), ("*/5 * * * *", 42, 54)] {
            assert_eq!(missing(every).len(), missed);
            assert_eq!(doubled(every).len(), shown);
        }
        assert_eq!(missing("*/30 2 * * *"), [""; 0]);
        assert_eq!(doubled("*/30 2 * * *").len(), 4);
        assert_eq!(doubled("*/10 * * * * *").len(), 6 * 270);
    }

    #[test]
    fn daily_weekly_and_monthly_runs_at_a_missing_midnight() {
        let october = |expression| {
            due(
                expression,
                "America/Sao_Paulo",
                "2018-11-03T12:00Z",
                "2018-11-05T12:00Z",
            )
        };
        assert_eq!(october("0 0 * * *"), ["04 01:00 -02:00", "05 00:00 -02:00"]);
        assert_eq!(october("@daily"), ["04 01:00 -02:00", "05 00:00 -02:00"]);
        assert_eq!(october("@weekly"), ["04 01:00 -02:00"]);
        assert_eq!(october("0 0 4 * *"), ["04 01:00 -02:00"]);
        assert_eq!(october("0 1 * * *"), ["04 01:00 -02:00", "05 01:00 -02:00"]);
        let cairo = due(
            "0 0 L,26 4 *",
            "Africa/Cairo",
            "2024-04-25T00:00Z",
            "2024-05-01T00:00Z",
        );
        assert_eq!(cairo, ["26 01:00 +03:00", "30 00:00 +03:00"]);
        let beirut = due(
            "30 0 * * 0",
            "Asia/Beirut",
            "2022-03-26T00:00Z",
            "2022-03-28T00:00Z",
        );
        assert_eq!(beirut, ["27 01:00 +03:00"]);
    }

    #[test]
    fn a_midnight_that_comes_twice() {
        // 23:00 to 24:00 is shown twice, on the same day.
        let february = due(
            "0,59 0,23 * * *",
            "America/Sao_Paulo",
            "2018-02-18T00:00Z",
            "2018-02-18T04:00Z",
        );
        assert_eq!(
            february,
            [
                "17 23:00 -02:00",
                "17 23:59 -02:00",
                "18 00:00 -03:00",
                "18 00:59 -03:00"
            ]
        );
        // 00:00 to 01:00 is shown twice: the day begins twice.
        let havana = due(
            "0 0 * * *",
            "America/Havana",
            "2026-11-01T00:00Z",
            "2026-11-02T12:00Z",
        );
        assert_eq!(havana, ["01 00:00 -04:00", "02 00:00 -05:00"]);
    }

    #[test]
    fn changes_of_half_an_hour() {
        let missing = |expression| {
            due(
                expression,
                "Australia/Lord_Howe",
                "2026-10-03T13:30Z",
                "2026-10-03T17:00Z",
            )
        };
        assert_eq!(missing("15 2 * * *"), ["04 02:30 +11:00"]);
        assert_eq!(missing("45 2 * * *"), ["04 02:45 +11:00"]);
        assert_eq!(
            missing("0 * * * *"),
            ["04 00:00 +10:30", "04 01:00 +10:30", "04 03:00 +11:00"]
        );
        let doubled = |expression| {
            due(
                expression,
                "Australia/Lord_Howe",
                "2026-04-04T13:30Z",
                "2026-04-04T16:30Z",
            )
        };
        assert_eq!(doubled("45 1 * * *"), ["05 01:45 +11:00"]);
        assert_eq!(doubled("15 1 * * *"), ["05 01:15 +11:00"]);
        assert_eq!(
            doubled("45 * * * *"),
            [
                "05 00:45 +11:00",
                "05 01:45 +11:00",
                "05 01:45 +10:30",
                "05 02:45 +10:30"
            ]
        );
    }

    #[test]
    fn the_day_that_samoa_skipped() {
        let apia = |expression| {
            due(
                expression,
                "Pacific/Apia",
                "2011-12-29T10:00Z",
                "2011-12-31T10:00Z",
            )
        };
        assert_eq!(
            apia("0 9 * * *"),
            ["29 09:00 -10:00", "31 00:00 +14:00", "31 09:00 +14:00"]
        );
        assert_eq!(apia("0 9 * * FRI"), ["31 00:00 +14:00"]);
        assert_eq!(apia("0 0 30 * *"), ["31 00:00 +14:00"]);
        assert_eq!(
            apia("0 0 * * *"),
            ["29 00:00 -10:00", "31 00:00 +14:00", "01 00:00 +14:00"][..2]
        );
        assert_eq!(apia("0 */12 * * *").len(), 4);
    }

    #[test]
    fn both_hemispheres_and_both_directions() {
        let new_york = due(
            "30 2 * * *",
            "America/New_York",
            "2026-03-08T00:00Z",
            "2026-03-09T12:00Z",
        );
        assert_eq!(new_york, ["08 03:00 -04:00", "09 02:30 -04:00"]);
        let new_york = due(
            "30 1 * * *",
            "America/New_York",
            "2026-11-01T00:00Z",
            "2026-11-02T12:00Z",
        );
        assert_eq!(new_york, ["01 01:30 -04:00", "02 01:30 -05:00"]);
        let sydney = due(
            "30 2 * * *",
            "Australia/Sydney",
            "2026-10-03T12:00Z",
            "2026-10-04T20:00Z",
        );
        assert_eq!(sydney, ["04 03:00 +11:00", "05 02:30 +11:00"]);
        let sydney = due(
            "30 2 * * *",
            "Australia/Sydney",
            "2026-04-04T12:00Z",
            "2026-04-05T20:00Z",
        );
        assert_eq!(sydney, ["05 02:30 +11:00", "06 02:30 +10:00"]);
    }

    #[test]
    fn backwards_finds_the_same_times() {
        for (zone, middle) in [
            ("Europe/Berlin", "2026-03-29T01:00Z"),
            ("Europe/Berlin", "2026-10-25T01:00Z"),
            ("Pacific/Apia", "2011-12-30T10:00Z"),
            ("America/Sao_Paulo", "2018-11-04T03:00Z"),
        ] {
            let middle: Timestamp = middle.parse().unwrap();
            let day = jiff::SignedDuration::from_hours(24);
            for expression in [
                "30 2 * * *",
                "0 2,3 * * *",
                "15 1-3 * * *",
                "0 * * * *",
                "0 0 * * *",
                "0 9 30 * *",
            ] {
                let schedule = Schedule::parse(expression, Some(zone)).unwrap();
                let mut forwards = Vec::new();
                let mut at = middle - day;
                while let Some(next) = schedule
                    .next_after(at)
                    .ok()
                    .filter(|&next| next <= middle + day)
                {
                    forwards.push(next);
                    at = next;
                }
                let mut backwards = Vec::new();
                let mut at = middle + day;
                while let Some(previous) = schedule.previous(at).filter(|&at| at > middle - day) {
                    backwards.push(previous);
                    at = previous - super::SECOND;
                }
                backwards.reverse();
                assert_eq!(backwards, forwards, "{expression} in {zone}");
            }
        }
    }
}
