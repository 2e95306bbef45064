//! Which due times to fire after a while in which nobody was there to fire them.
//!
//! Nothing walks through an outage: a task of every second that was away for a year costs a question
//! for each due time that is fired.

use std::{fmt, str::FromStr};

use jiff::{SignedDuration, Timestamp};

use super::{Misfire, Schedule, ScheduleError};

/// The most that [`Misfire::FireAll`] may ask for.
pub(crate) const LARGEST_CAP: u32 = 1_000;

impl Misfire {
    pub(crate) fn check(self) -> Result<(), CapError> {
        match self {
            Self::FireAll { cap } if cap == 0 || cap > LARGEST_CAP => Err(CapError { cap }),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Misfire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skip => f.write_str("skip"),
            Self::FireOnce => f.write_str("fire_once"),
            Self::FireAll { cap } => write!(f, "fire_all({cap})"),
        }
    }
}

/// A text is no [`Misfire`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected skip, fire_once, or fire_all(100) with a cap from 1 to {LARGEST_CAP}")]
#[non_exhaustive]
pub struct MisfireError;

impl FromStr for Misfire {
    type Err = MisfireError;

    fn from_str(text: &str) -> Result<Self, MisfireError> {
        let cap = || {
            let cap = text.strip_prefix("fire_all(")?.strip_suffix(')')?;
            cap.parse().ok()
        };
        let misfire = match text {
            "skip" => Self::Skip,
            "fire_once" => Self::FireOnce,
            _ => Self::FireAll {
                cap: cap().ok_or(MisfireError)?,
            },
        };
        misfire.check().map_err(|_| MisfireError)?;
        Ok(misfire)
    }
}

/// [`Misfire::FireAll`] asks for none, or for too many.
#[derive(Debug, thiserror::Error)]
#[error("misfire policy `fire_all` takes a cap from 1 to {LARGEST_CAP}, found {cap}")]
pub(crate) struct CapError {
    pub(crate) cap: u32,
}

/// Due times that are left out are counted up to here.
const COUNTED: u32 = 1_000;

/// What is due.
#[derive(Debug)]
pub(crate) struct Firing {
    /// To be fired now, oldest first.
    pub(crate) due: Vec<Timestamp>,
    pub(crate) left_out: Option<LeftOut>,
    /// The first due time after these. It may have passed, if there was more to fire than the limit.
    pub(crate) next: Result<Timestamp, ScheduleError>,
}

/// Due times in a row that nobody fires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeftOut {
    pub(crate) first: Timestamp,
    pub(crate) last: Timestamp,
    /// `None` if there are more than a thousand.
    pub(crate) count: Option<u32>,
}

/// What to fire of the due times from `at`, which has come, up to `now`: at most `limit`, the rest is
/// found when asked again from [`Firing::next`].
pub(crate) fn firing(
    schedule: &Schedule,
    misfire: Misfire,
    grace: SignedDuration,
    at: Timestamp,
    now: Timestamp,
    limit: usize,
) -> Firing {
    // A node that looks a moment late has missed nothing.
    let grace = grace.max(SignedDuration::from_secs(1));
    let missed_before = now.checked_sub(grace).unwrap_or(Timestamp::MIN);
    let mut next = if at < missed_before {
        first_kept(schedule, misfire, at, missed_before)
    } else {
        Ok(at)
    };
    let kept_from = *next.as_ref().unwrap_or(&missed_before);
    let left_out = (at < kept_from).then(|| LeftOut {
        first: at,
        last: newest_before(schedule, at, kept_from),
        count: count(schedule, at, kept_from, COUNTED),
    });
    let mut due = Vec::new();
    while let Ok(time) = next
        && time <= now
        && due.len() < limit
    {
        due.push(time);
        next = schedule.next_after(time);
    }
    Firing {
        due,
        left_out,
        next,
    }
}

/// The first due time that the policy does not leave out. The due time `at` is before `bound`, up to
/// which due times count as missed.
fn first_kept(
    schedule: &Schedule,
    misfire: Misfire,
    at: Timestamp,
    bound: Timestamp,
) -> Result<Timestamp, ScheduleError> {
    let cap = match misfire {
        // One that is due just at the bound is not missed.
        Misfire::Skip => return schedule.next_after(bound - SignedDuration::from_nanos(1)),
        Misfire::FireOnce => 1,
        Misfire::FireAll { cap } => cap.clamp(1, LARGEST_CAP),
    };
    if count(schedule, at, bound, cap).is_some() {
        return Ok(at);
    }
    let mut first = newest_before(schedule, at, bound);
    for _ in 1..cap {
        first = newest_before(schedule, at, first);
    }
    Ok(first)
}

/// How many due times there are from the due time `at` until before `bound`; `None` if more than
/// `most`.
fn count(schedule: &Schedule, at: Timestamp, bound: Timestamp, most: u32) -> Option<u32> {
    let mut counted = 0;
    let mut time = Ok(at);
    while let Ok(due) = time
        && due < bound
    {
        if counted == most {
            return None;
        }
        counted += 1;
        time = schedule.next_after(due);
    }
    Some(counted)
}

/// The newest due time before `bound`, which comes after the due time `at`.
fn newest_before(schedule: &Schedule, at: Timestamp, bound: Timestamp) -> Timestamp {
    // `at` need not be one of the schedule's: somebody may have set it by hand.
    bound
        .checked_sub(SignedDuration::from_nanos(1))
        .ok()
        .and_then(|before| schedule.previous(before))
        .map_or(at, |newest| newest.max(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: SignedDuration = SignedDuration::from_secs(60);

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn schedule(expression: &str) -> Schedule {
        Schedule::parse(expression, None).unwrap()
    }

    /// The same by looking at every due time up to `now`.
    fn by_walking(
        mut all: Vec<Timestamp>,
        misfire: Misfire,
        grace: SignedDuration,
        now: Timestamp,
    ) -> (Vec<Timestamp>, Vec<Timestamp>) {
        let missed = all
            .iter()
            .filter(|&&due| now.duration_since(due) > grace.max(SignedDuration::from_secs(1)))
            .count();
        let cap = match misfire {
            Misfire::Skip => 0,
            Misfire::FireOnce => 1,
            Misfire::FireAll { cap } => cap as usize,
        };
        let fired = all.split_off(missed.saturating_sub(cap));
        (fired, all)
    }

    #[test]
    fn policies_are_read_as_they_are_told() {
        for text in ["skip", "fire_once", "fire_all(100)", "fire_all(1000)"] {
            let misfire: Misfire = text.parse().unwrap();
            assert_eq!(misfire.to_string(), text);
        }
        for text in [
            "",
            "fire_all",
            "fire_all(x)",
            "fire_all(0)",
            "fire_all(1001)",
            "Skip",
        ] {
            assert_eq!(text.parse::<Misfire>(), Err(MisfireError), "{text}");
        }
    }

    #[test]
    fn agrees_with_a_walk_through_every_due_time() {
        let policies = [
            Misfire::Skip,
            Misfire::FireOnce,
            Misfire::FireAll { cap: 1 },
            Misfire::FireAll { cap: 7 },
            Misfire::FireAll { cap: 1_000 },
        ];
        let start = at("2026-03-28T20:00:00Z");
        for expression in [
            "* * * * * *",
            "*/7 * * * * *",
            "0 * * * *",
            "*/5 8-9 * * 1",
            "* * * * * 0",
            "30 2 * * *",
            "0 0 1 * *",
        ] {
            for zone in [None, Some("Europe/Berlin")] {
                let schedule = Schedule::parse(expression, zone).unwrap();
                let from = schedule.next_after(start).unwrap();
                let mut walk = vec![from];
                for outage_ms in [
                    0, 1, 999, 1_000, 59_999, 60_000, 60_001, 3_600_500, 20_000_000,
                ] {
                    let now = from + SignedDuration::from_millis(outage_ms);
                    let next = loop {
                        let next = schedule.next_after(*walk.last().unwrap()).unwrap();
                        if next > now {
                            break next;
                        }
                        walk.push(next);
                    };
                    for grace in [0, 500, 1_000, 60_000, 7_200_000] {
                        let grace = SignedDuration::from_millis(grace);
                        for misfire in policies {
                            let (due, left_out) = by_walking(walk.clone(), misfire, grace, now);
                            let what = format!(
                                "{expression} {zone:?} {misfire:?} grace {grace} outage {outage_ms} ms"
                            );
                            let found = firing(&schedule, misfire, grace, from, now, usize::MAX);
                            assert_eq!(found.due, due, "{what}");
                            assert_eq!(found.next.unwrap(), next, "{what}");
                            let expected = left_out.last().map(|&last| LeftOut {
                                first: left_out[0],
                                last,
                                count: u32::try_from(left_out.len()).ok().filter(|&n| n <= COUNTED),
                            });
                            assert_eq!(found.left_out, expected, "{what}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_year_of_missed_seconds_is_not_walked_through() {
        let schedule = schedule("* * * * * *");
        let (from, now) = (at("2025-01-01T00:00:00Z"), at("2026-01-01T00:00:00.25Z"));
        let found = firing(&schedule, Misfire::FireOnce, GRACE, from, now, 100);
        assert_eq!(found.due.len(), 61);
        assert_eq!(found.due[0], at("2025-12-31T23:59:00Z"));
        assert_eq!(found.next.unwrap(), at("2026-01-01T00:00:01Z"));
        let left_out = LeftOut {
            first: from,
            last: at("2025-12-31T23:58:59Z"),
            count: None,
        };
        assert_eq!(found.left_out, Some(left_out));

        let all = Misfire::FireAll { cap: LARGEST_CAP };
        let found = firing(&schedule, all, GRACE, from, now, 100);
        assert_eq!(found.due.len(), 100);
        assert_eq!(found.due[0], at("2025-12-31T23:42:21Z"));
        assert_eq!(found.next.unwrap(), at("2025-12-31T23:44:01Z"));
    }

    #[test]
    fn in_steps_it_fires_what_it_fires_at_once() {
        let schedule = schedule("*/10 * * * * *");
        let misfire = Misfire::FireAll { cap: 25 };
        let (from, now) = (at("2026-01-01T00:00:00Z"), at("2026-01-01T02:00:03Z"));
        let at_once = firing(&schedule, misfire, GRACE, from, now, usize::MAX);
        let (mut due, mut next, mut steps) = (Vec::new(), from, 0);
        while next <= now {
            let step = firing(&schedule, misfire, GRACE, next, now, 4);
            assert_eq!(
                step.left_out.is_some(),
                steps == 0,
                "left out once, at first"
            );
            due.extend(step.due);
            next = step.next.unwrap();
            steps += 1;
        }
        assert_eq!(due, at_once.due);
        // 25 that were missed, and 6 within the grace.
        assert_eq!((due.len(), steps), (31, 8));
    }

    #[test]
    fn the_last_tick_of_a_schedule_that_ends_is_fired() {
        let schedule = schedule("0 0 1 1 *");
        let last = at("9999-01-01T00:00:00Z");
        let found = firing(&schedule, Misfire::FireOnce, GRACE, last, last, 10);
        assert_eq!(found.due, [last]);
        assert!(found.next.is_err(), "{:?}", found.next);
    }

    #[test]
    fn a_time_that_was_set_by_hand_is_fired() {
        let schedule = schedule("0 * * * *");
        let odd = at("2026-01-01T00:20:00.5Z");
        let found = firing(&schedule, Misfire::Skip, GRACE, odd, odd, 10);
        assert_eq!(found.due, [odd]);
        assert_eq!(found.next.unwrap(), at("2026-01-01T01:00:00Z"));
    }
}
