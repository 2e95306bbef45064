//! Durations and backoffs, as they are written in options.
//!
//! ```text
//! duration = part {part}            parts from the longest unit to the shortest, blanks allowed
//! part     = integer unit           30s, 1m 30s, 500ms
//! unit     = "ms" | "s" | "m" | "h" | "d"
//! backoff  = "exponential(" duration ".." duration ")"
//!          | "fixed(" duration ")"
//! ```

use std::time::Duration;

use crate::diagnostics::{closest, did_you_mean};

/// From the longest to the shortest: the unit and its length in milliseconds.
const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// What people write for a unit that has another name here.
const UNIT_SYNONYMS: [(&str, &[&str]); 5] = [
    ("d", &["day", "days"]),
    ("h", &["hr", "hrs", "hour", "hours"]),
    ("m", &["min", "mins", "minute", "minutes"]),
    ("s", &["sec", "secs", "second", "seconds"]),
    (
        "ms",
        &[
            "msec",
            "msecs",
            "milli",
            "millis",
            "millisecond",
            "milliseconds",
        ],
    ),
];

/// Far beyond any sensible delay, and far below what overflows a timestamp.
const LONGEST: Duration = Duration::from_hours(8760);

/// Delays between attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    pub(crate) first: Duration,
    /// Equal to `first` for a fixed delay.
    pub(crate) max: Duration,
}

/// Reads a duration that is not zero; the error is a sentence for the user.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("it is empty; write a duration such as `30s` or `1m 30s`".to_owned());
    }
    let mut total: u64 = 0;
    let mut shortest_unit = None;
    let mut rest = text;
    while !rest.is_empty() {
        let (digits, unit, after) = split_part(rest);
        rest = after;
        if digits.is_empty() || unit.starts_with(['.', ',']) {
            return Err(format!(
                "`{text}` is no duration; write whole numbers with a unit, such as `30s`, `1m 30s` or `500ms`"
            ));
        }
        if unit.is_empty() {
            let is_whole = digits.len() == text.len();
            let guess = is_whole.then(|| format!("{digits}s"));
            return Err(format!("`{digits}` has no unit{}", did_you_mean(guess)));
        }
        let Some(index) = UNITS.iter().position(|&(name, _)| name == unit) else {
            return Err(format!(
                "`{digits}{unit}` has the unknown unit `{unit}`{}\nunits: `ms`, `s`, `m`, `h`, `d`",
                did_you_mean(meant_unit(unit).map(|unit| format!("{digits}{unit}")))
            ));
        };
        if shortest_unit.is_some_and(|shortest| index <= shortest) {
            return Err(format!(
                "`{text}` has its parts out of order; write each unit once, the longest first, as in `1m 30s`"
            ));
        }
        shortest_unit = Some(index);
        total = digits
            .parse::<u64>()
            .ok()
            .and_then(|count| count.checked_mul(UNITS[index].1))
            .and_then(|length| total.checked_add(length))
            .filter(|&total| Duration::from_millis(total) <= LONGEST)
            .ok_or_else(|| format!("`{text}` is too long; the longest is `365d`"))?;
    }
    if total == 0 {
        return Err(format!("`{text}` is zero; the shortest is `1ms`"));
    }
    Ok(Duration::from_millis(total))
}

/// The digits and the unit at the start, and what follows them.
fn split_part(text: &str) -> (&str, &str, &str) {
    let (digits, rest) = text.split_at(end_of(text, |c| c.is_ascii_digit()));
    let rest = rest.trim_start();
    let (unit, rest) = rest.split_at(end_of(rest, |c| !c.is_ascii_digit() && !c.is_whitespace()));
    (digits, unit, rest.trim_start())
}

fn end_of(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

fn meant_unit(unit: &str) -> Option<&'static str> {
    let unit = unit.to_lowercase();
    UNIT_SYNONYMS
        .iter()
        .find(|(name, synonyms)| *name == unit || synonyms.contains(&&*unit))
        .map(|&(name, _)| name)
}

/// Reads a backoff; the error is a sentence for the user.
pub(crate) fn parse_backoff(text: &str) -> Result<Backoff, String> {
    const FORMS: &str = "accepted: `exponential(1s..10m)`, which doubles from the first delay up to the second, and `fixed(5s)`";
    let text = text.trim();
    if parse_duration(text).is_ok() {
        return Err(format!(
            "`{text}` is only a duration; did you mean `fixed({text})`?"
        ));
    }
    let (kind, bounds) = match text.split_once('(') {
        Some((kind, rest)) => (kind.trim_end(), rest.strip_suffix(')').map(str::trim)),
        None => (text, None),
    };
    match (kind, bounds) {
        ("exponential", Some(bounds)) => exponential(bounds),
        ("fixed", Some(bounds)) => match bounds.split_once("..") {
            Some(_) => Err(format!(
                "`fixed` takes one delay; did you mean `exponential({bounds})`?"
            )),
            None => parse_duration(bounds).map(|delay| Backoff {
                first: delay,
                max: delay,
            }),
        },
        ("exponential" | "fixed", None) => {
            Err(format!("`{text}` lacks its delays in parentheses\n{FORMS}"))
        }
        _ => {
            let meant = closest(kind, ["exponential", "fixed"]);
            let meant = meant.map(|meant| format!("{meant}{}", &text[kind.len()..]));
            Err(format!(
                "`{text}` is no backoff{}\n{FORMS}",
                did_you_mean(meant)
            ))
        }
    }
}

fn exponential(bounds: &str) -> Result<Backoff, String> {
    let Some((first_text, max_text)) = bounds.split_once("..") else {
        return Err(format!(
            "`exponential` takes the first delay and the longest; did you mean `exponential({bounds}..10m)`?"
        ));
    };
    let (first_text, max_text) = (first_text.trim(), max_text.trim());
    if let Some(max_text) = max_text.strip_prefix('=') {
        return Err(format!(
            "the longest delay is always included; write `exponential({first_text}..{})`",
            max_text.trim()
        ));
    }
    let (first, max) = (parse_duration(first_text)?, parse_duration(max_text)?);
    if first > max {
        return Err(format!(
            "`{bounds}` runs backwards; did you mean `exponential({max_text}..{first_text})`?"
        ));
    }
    Ok(Backoff { first, max })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(text: &str) -> u128 {
        parse_duration(text).unwrap().as_millis()
    }

    #[test]
    fn reads_durations() {
        assert_eq!(ms("30s"), 30_000);
        assert_eq!(ms("1m 30s"), 90_000);
        assert_eq!(ms("1m30s"), 90_000);
        assert_eq!(ms(" 250 ms "), 250);
        assert_eq!(ms("1d 2h"), 93_600_000);
        assert_eq!(ms("365d"), LONGEST.as_millis());
    }

    #[test]
    fn says_what_is_wrong_with_a_duration() {
        for (text, part) in [
            ("30", "`30` has no unit; did you mean `30s`?"),
            ("1m 30", "`30` has no unit"),
            ("30sec", "unknown unit `sec`; did you mean `30s`?"),
            ("5M", "unknown unit `M`; did you mean `5m`?"),
            ("5 weeks", "unknown unit `weeks`\nunits"),
            ("1.5s", "is no duration"),
            ("-1s", "is no duration"),
            ("soon", "is no duration"),
            ("", "it is empty"),
            ("0s", "is zero"),
            ("30s 1m", "out of order"),
            ("1s 1s", "out of order"),
            ("366d", "too long"),
            ("99999999999999999999d", "too long"),
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_duration_is_read_as_it_is_written(ms in 1..=365 * 86_400_000_u64, blanks in any::<bool>()) {
            let (mut rest, mut parts) = (ms, Vec::new());
            for (unit, length) in UNITS {
                if rest >= length {
                    parts.push(format!("{}{unit}", rest / length));
                    rest %= length;
                }
            }
            let text = parts.join(if blanks { "  " } else { "" });
            prop_assert_eq!(parse_duration(&text), Ok(Duration::from_millis(ms)));
            let backoff = Backoff { first: Duration::from_millis(ms), max: Duration::from_millis(ms) };
            prop_assert_eq!(parse_backoff(&format!("fixed({text})")), Ok(backoff));
        }

        #[test]
        fn no_text_is_too_strange(text in "\\PC{0,40}", near in "[0-9dhms ().,a-z]{0,40}") {
            for text in [text, near] {
                if let Ok(duration) = parse_duration(&text) {
                    prop_assert!(!duration.is_zero() && duration <= LONGEST);
                }
                let _ = parse_backoff(&text);
            }
        }
    }

    #[test]
    fn reads_backoffs() {
        let seconds = |first, max| Backoff {
            first: Duration::from_secs(first),
            max: Duration::from_secs(max),
        };
        assert_eq!(parse_backoff("exponential(1s..10m)"), Ok(seconds(1, 600)));
        assert_eq!(
            parse_backoff(" exponential ( 5s .. 5s ) "),
            Ok(seconds(5, 5))
        );
        assert_eq!(parse_backoff("fixed(1m 30s)"), Ok(seconds(90, 90)));
    }

    #[test]
    fn says_what_is_wrong_with_a_backoff() {
        for (text, part) in [
            ("5s", "did you mean `fixed(5s)`?"),
            ("exponental(1s..2s)", "did you mean `exponential(1s..2s)`?"),
            ("linear(1s)", "`linear(1s)` is no backoff\naccepted"),
            ("", "is no backoff"),
            ("exponential", "lacks its delays"),
            ("exponential(1s..10m", "lacks its delays"),
            ("exponential(1s)", "did you mean `exponential(1s..10m)`?"),
            ("exponential(1s..=10m)", "write `exponential(1s..10m)`"),
            (
                "exponential(10m..1s)",
                "did you mean `exponential(1s..10m)`?",
            ),
            ("exponential(1..10m)", "`1` has no unit"),
            ("fixed(1s..2s)", "did you mean `exponential(1s..2s)`?"),
            ("fixed(0s)", "is zero"),
        ] {
            let error = parse_backoff(text).unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
