//! From when on a new handler is delivered what is in the log, as it is written in `from`.
//!
//! ```text
//! from = "beginning" | "YYYY-MM-DDTHH:MM:SS[.fraction](Z | +HH:MM | -HH:MM)"
//! ```

use std::ops::RangeInclusive;

use crate::diagnostics::closest;

/// What a new handler asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum History {
    Beginning,
    /// Microseconds since 1970.
    Since(i64),
}

const FORMS: &str = "accepted: `beginning`, or a time such as `2026-01-31T00:00:00Z`";

/// What others call it.
const SYNONYMS: [&str; 6] = ["start", "begin", "earliest", "first", "all", "everything"];

/// Reads a start; the error is a sentence for the user.
pub(crate) fn parse(text: &str) -> Result<History, String> {
    if text == "beginning" {
        return Ok(History::Beginning);
    }
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        let word = text.trim().to_lowercase();
        let is_meant = SYNONYMS.contains(&word.as_str()) || closest(&word, ["beginning"]).is_some();
        return Err(if is_meant {
            format!("unknown start `{text}`; did you mean `beginning`?")
        } else {
            format!("unknown start `{text}`; {FORMS}")
        });
    }
    let Some((local, seconds_ahead)) = split_zone(text) else {
        return Err(if parse_local(text).is_some() {
            format!("`{text}` has no time zone; did you mean `{text}Z`?")
        } else if parse_date(text).is_some() {
            format!("`{text}` has no time of day; did you mean `{text}T00:00:00Z`?")
        } else {
            format!("`{text}` is not a time; {FORMS}")
        });
    };
    let micros = parse_local(local)
        .ok_or_else(|| format!("`{text}` is not a time, or there is no such day; {FORMS}"))?;
    Ok(History::Since(micros - seconds_ahead * 1_000_000))
}

/// The time without its zone, and how far that zone is ahead of UTC.
fn split_zone(text: &str) -> Option<(&str, i64)> {
    if let Some(local) = text.strip_suffix('Z') {
        return Some((local, 0));
    }
    let (local, zone) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let sign = match zone.as_bytes()[0] {
        b'+' => 1,
        b'-' if local.contains('T') => -1,
        _ => return None,
    };
    let (hours, minutes) = zone[1..].split_once(':')?;
    let seconds = number(hours, 2, 0..=23)? * 3_600 + number(minutes, 2, 0..=59)? * 60;
    Some((local, sign * seconds))
}

/// Microseconds since 1970, as if the zone were UTC.
fn parse_local(text: &str) -> Option<i64> {
    let (date, time) = text.split_once('T')?;
    let days = parse_date(date)?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let parts: Vec<&str> = time.split(':').collect();
    let [hour, minute, second] = parts[..] else {
        return None;
    };
    let seconds = number(hour, 2, 0..=23)? * 3_600
        + number(minute, 2, 0..=59)? * 60
        + number(second, 2, 0..=59)?;
    if fraction.is_empty() || fraction.len() > 6 {
        return None;
    }
    let micros = number(&format!("{fraction:0<6}"), 6, 0..=999_999)?;
    Some((days * 86_400 + seconds) * 1_000_000 + micros)
}

/// Days since 1970.
fn parse_date(text: &str) -> Option<i64> {
    let parts: Vec<&str> = text.split('-').collect();
    let [year, month, day] = parts[..] else {
        return None;
    };
    let year = number(year, 4, 1970..=9998)?;
    let month = number(month, 2, 1..=12)?;
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let lengths = [
        31,
        28 + i64::from(is_leap),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let months = usize::try_from(month - 1).ok()?;
    let day = number(day, 2, 1..=lengths[months])?;
    let past = year - 1;
    // 719,162 days lie before 1970.
    let days_before_year = past * 365 + past / 4 - past / 100 + past / 400 - 719_162;
    Some(days_before_year + lengths[..months].iter().sum::<i64>() + day - 1)
}

fn number(text: &str, digits: usize, range: RangeInclusive<i64>) -> Option<i64> {
    let is_number = text.len() == digits && text.bytes().all(|b| b.is_ascii_digit());
    let number = is_number.then(|| text.parse().ok())??;
    range.contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_meant() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00+05:30", 951_805_800),
            ("2024-03-01T00:00:00-08:00", 1_709_280_000),
            ("2026-01-31T00:00:00Z", 1_769_817_600),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
        ] {
            assert_eq!(
                parse(text),
                Ok(History::Since(seconds * 1_000_000)),
                "{text}"
            );
        }
        assert_eq!(
            parse("1970-01-01T00:00:01.5Z"),
            Ok(History::Since(1_500_000))
        );
    }

    #[test]
    fn what_is_not_a_time_is_refused() {
        for text in [
            "2026-02-29T00:00:00Z",
            "2100-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00Z",
            "2026-1-1T00:00:00Z",
            "2026-01-01 00:00:00Z",
            "2026-01-01T00:00:00.1234567Z",
            "2026-01-01T00:00:00+25:00",
            "2026-01-01T00:00:00é12:00",
            "7 days",
            "",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_was_meant_is_said() {
        for (text, meant) in [
            ("begining", "`beginning`"),
            ("earliest", "`beginning`"),
            ("2026-01-31", "`2026-01-31T00:00:00Z`"),
            ("2026-01-31T10:00:00", "`2026-01-31T10:00:00Z`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(&format!("did you mean {meant}?")), "{error}");
        }
    }
}
