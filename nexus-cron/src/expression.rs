//! The cron expressions that are accepted.
//!
//! ```text
//! expression   = nickname | [second] minute hour day-of-month month day-of-week
//! nickname     = "@yearly" | "@annually" | "@monthly" | "@weekly" | "@daily" | "@hourly"
//! field        = item {"," item}
//! item         = "*" ["/" step] | value | value "-" value ["/" step]
//! value        = a number; also "JAN" to "DEC", and "SUN" to "SAT" in any case (0 and 7 are Sunday)
//! day-of-month = also "L" (last day), "LW" (last weekday), "15W" (weekday nearest to the 15th)
//! day-of-week  = also "FRIL" (last Friday of the month), "FRI#2" (second Friday)
//! ```
//!
//! As in every cron, if day-of-month and day-of-week are both restricted (neither is `*`), a day
//! that fits one of them is due.
//!
//! This is a part of what `croner` reads with seconds optional and the year disallowed, which is how
//! the scheduler reads it; a test holds the two together. Left out is what `croner` takes silently
//! and then understands in a way that may surprise: `?`, a `+` before the day of the week, empty
//! items, steps that never repeat, names of months in other fields. Also refused is what is never
//! due, such as the 30th of February.

use std::ops::Range;

use crate::guess::{closest, did_you_mean};

/// A mistake and the bytes of the expression that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// The bytes of the expression.
    pub at: Range<usize>,
    /// What is wrong, and what to write instead.
    pub message: String,
}

impl Mistake {
    fn new(at: Range<usize>, message: impl Into<String>) -> Self {
        Self {
            at,
            message: message.into(),
        }
    }

    /// The message, and under the expression a line that points at the mistake.
    #[must_use]
    pub fn display_in(&self, text: &str) -> String {
        if text.trim().is_empty() {
            return self.message.clone();
        }
        // One column for each character, also for tabs and line breaks.
        let shown = text.replace(char::is_whitespace, " ");
        let indent = " ".repeat(text[..self.at.start].chars().count());
        let carets = "^".repeat(text[self.at.clone()].chars().count().max(1));
        format!("{}\n    {shown}\n    {indent}{carets}", self.message)
    }
}

const NICKNAMES: [&str; 6] = [
    "@yearly",
    "@annually",
    "@monthly",
    "@weekly",
    "@daily",
    "@hourly",
];

const MONTHS: [&str; 12] = [
    "JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC",
];
const WEEKDAYS: [&str; 7] = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"];

/// The longest that each month can be.
const DAYS_IN_MONTH: [u32; 12] = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];

/// One of the six fields, and what it allows.
struct Field {
    name: &'static str,
    min: u32,
    max: u32,
    /// Names for the values from `min` on.
    names: &'static [&'static str],
}

const FIELDS: [Field; 6] = [
    Field {
        name: "second",
        min: 0,
        max: 59,
        names: &[],
    },
    Field {
        name: "minute",
        min: 0,
        max: 59,
        names: &[],
    },
    Field {
        name: "hour",
        min: 0,
        max: 23,
        names: &[],
    },
    Field {
        name: DAY_OF_MONTH,
        min: 1,
        max: 31,
        names: &[],
    },
    Field {
        name: "month",
        min: 1,
        max: 12,
        names: &MONTHS,
    },
    Field {
        name: DAY_OF_WEEK,
        min: 0,
        max: 7,
        names: &WEEKDAYS,
    },
];
const DAY_OF_MONTH: &str = "day-of-month";
const DAY_OF_WEEK: &str = "day-of-week";

/// The values of a field, as bits; `None` if they depend on the month (`L`, `W`, `#`).
type Values = Option<u64>;

/// Checks an expression.
///
/// # Errors
///
/// Each field that is wrong is a mistake of its own.
pub fn check_expression(text: &str) -> Result<(), Vec<Mistake>> {
    let start = text.len() - text.trim_start().len();
    let whole = start..text.trim_end().len().max(start);
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err(vec![Mistake::new(
            whole,
            "the cron expression is empty; write five fields, such as `*/5 * * * *`",
        )]);
    }
    if trimmed.starts_with('@') {
        return check_nickname(trimmed).map_err(|message| vec![Mistake::new(whole, message)]);
    }
    let parts: Vec<Range<usize>> = trimmed
        .split_whitespace()
        .map(|part| {
            let from = part.as_ptr().addr() - text.as_ptr().addr();
            from..from + part.len()
        })
        .collect();
    let fields = match parts.len() {
        5 => &FIELDS[1..],
        6 => &FIELDS[..],
        count => {
            let year = if count == 7 {
                "; there is no field for the year"
            } else {
                ""
            };
            return Err(vec![Mistake::new(
                whole,
                format!(
                    "a cron expression has 5 fields (minute, hour, day-of-month, month, day-of-week), or 6 with seconds in front; this one has {count}{year}"
                ),
            )]);
        }
    };
    let (mut values, mut mistakes) = (Vec::new(), Vec::new());
    for (field, part) in fields.iter().zip(&parts) {
        match check_field(field, &text[part.clone()], part.start) {
            Ok(allowed) => values.push(allowed),
            Err(mistake) => mistakes.push(mistake),
        }
    }
    if !mistakes.is_empty() {
        return Err(mistakes);
    }
    let [.., days, months, _] = &*values else {
        return Ok(());
    };
    let [.., days_part, months_part, weekdays_part] = &*parts else {
        return Ok(());
    };
    if text[weekdays_part.clone()] == *"*"
        && let (Some(days), Some(months)) = (*days, *months)
        && never_due(days, months)
    {
        return Err(vec![Mistake::new(
            days_part.start..months_part.end,
            "this cron expression is never due: no month that it names has such a day",
        )]);
    }
    Ok(())
}

fn check_nickname(text: &str) -> Result<(), String> {
    let given = text.to_lowercase();
    if NICKNAMES.contains(&&*given) {
        return Ok(());
    }
    if let Some(instead) = given.strip_prefix("@every ").and_then(every) {
        return Err(format!(
            "unknown cron expression `{text}`; write `{instead}`"
        ));
    }
    Err(format!(
        "unknown cron expression `{text}`{}\nknown names: `{}`",
        did_you_mean(closest(&given, NICKNAMES)),
        NICKNAMES.join("`, `")
    ))
}

/// What other programs write as `@every 5m`, where there is an expression for it.
fn every(duration: &str) -> Option<String> {
    let duration = duration.trim();
    let unit = duration.len().checked_sub(1)?;
    let count = number(duration.get(..unit)?)?;
    let divides = |whole: u32| count > 0 && count < whole && whole.is_multiple_of(count);
    match (count, &duration[unit..]) {
        (1, "h") => Some("@hourly".to_owned()),
        (24, "h") => Some("@daily".to_owned()),
        (1, "m") => Some("* * * * *".to_owned()),
        (1, "s") => Some("* * * * * *".to_owned()),
        (_, "h") if divides(24) => Some(format!("0 */{count} * * *")),
        (_, "m") if divides(60) => Some(format!("*/{count} * * * *")),
        (_, "s") if divides(60) => Some(format!("*/{count} * * * * *")),
        _ => None,
    }
}

fn never_due(days: u64, months: u64) -> bool {
    let first_day = days.trailing_zeros();
    (1..=12_u32)
        .zip(DAYS_IN_MONTH)
        .filter(|(month, _)| months & (1 << month) != 0)
        .all(|(_, length)| first_day > length)
}

fn check_field(field: &Field, text: &str, offset: usize) -> Result<Values, Mistake> {
    let mut values: Values = Some(0);
    let mut from = offset;
    for item in text.split(',') {
        let mut at = from..from + item.len();
        from = at.end + 1;
        if item.is_empty() {
            // Shown at the comma that has nothing beside it.
            let comma = at.start.max(offset + 1) - 1;
            at = comma..comma + 1;
        }
        let item = check_item(field, item, item != text).map_err(|why| Mistake::new(at, why))?;
        values = values.zip(item).map(|(values, item)| values | item);
    }
    Ok(values)
}

fn check_item(field: &Field, item: &str, in_list: bool) -> Result<Values, String> {
    let Field { name, min, max, .. } = *field;
    let invalid = |reason: String| Err(format!("invalid {name} field `{item}`: {reason}"));
    if item.is_empty() {
        return Err(format!(
            "the {name} field has a comma with nothing beside it"
        ));
    }
    if item.contains('?') {
        return invalid("write `*` for any value".to_owned());
    }
    if item == "*" && in_list {
        return invalid("it covers the whole list already; write it alone".to_owned());
    }
    if depends_on_month(field, item)? {
        return Ok(None);
    }
    let (range, step) = match item.split_once('/') {
        Some((range, step)) => (range, Some(step)),
        None => (item, None),
    };
    let (first, last) = match (range.split_once('-'), step) {
        _ if range == "*" => (min, max),
        (Some((first, last)), _) => (value(field, first, false)?, value(field, last, true)?),
        (None, None) => {
            let only = value(field, range, false)?;
            (only, only)
        }
        (None, Some(step)) if range.is_empty() => {
            return invalid(format!("write `*/{step}` for steps over all values"));
        }
        (None, Some(step)) => {
            value(field, range, false)?;
            return invalid(format!(
                "a step needs a range; write `{range}-{max}/{step}`, or `*/{step}` for steps over all values"
            ));
        }
    };
    if first > last {
        return invalid(format!(
            "the range runs backwards; write `{first}-{max},{min}-{last}` if it goes across the end"
        ));
    }
    let step = match step.map(|step| (number(step), step)) {
        None => 1,
        Some((_, "")) => return invalid("the step behind `/` is missing".to_owned()),
        Some((None | Some(0), step)) => {
            return invalid(format!("`{step}` is no step; write a number from 1 on"));
        }
        Some((Some(step), _)) if step > last - first => {
            return invalid(format!(
                "a step of {step} never repeats between {first} and {last}; write `{first}` if it is to run once"
            ));
        }
        Some((Some(step), _)) => step,
    };
    Ok(Some(
        (first..=last)
            .step_by(step as usize)
            .fold(0, |bits, value| bits | 1 << value),
    ))
}

/// Whether an item is one of those that stand for another day in each month.
fn depends_on_month(field: &Field, item: &str) -> Result<bool, String> {
    if field.name == DAY_OF_MONTH {
        if let Some(day) = item.strip_suffix(['W', 'w']) {
            let is_last = day.eq_ignore_ascii_case("L");
            return if is_last {
                Ok(true)
            } else {
                value(field, day, false).map(|_| true)
            };
        }
        return Ok(item.eq_ignore_ascii_case("L"));
    }
    if field.name == DAY_OF_WEEK {
        if item.eq_ignore_ascii_case("L") {
            return Err(format!(
                "invalid {DAY_OF_WEEK} field `{item}`: write a day before it, as in `FRIL` for the last Friday of the month"
            ));
        }
        if let Some((day, nth)) = item.split_once('#') {
            value(field, day, false)?;
            return match number(nth) {
                Some(1..=5) => Ok(true),
                _ => Err(format!(
                    "invalid {DAY_OF_WEEK} field `{item}`: a month has such a day 1 to 5 times, as in `FRI#2`"
                )),
            };
        }
        if let Some(day) = item.strip_suffix(['L', 'l']) {
            return value(field, day, false).map(|_| true);
        }
    }
    Ok(false)
}

/// A single value of a field; `ends_range` makes Sunday the last day of the week.
fn value(field: &Field, text: &str, ends_range: bool) -> Result<u32, String> {
    let Field {
        name,
        min,
        max,
        names,
    } = *field;
    let is_named = |name: &str| name.eq_ignore_ascii_case(text);
    let named = match (min..).zip(names).find(|(_, name)| is_named(name)) {
        Some((0, _)) if ends_range => Some(7),
        named => named.map(|(value, _)| value),
    };
    named
        .or_else(|| number(text))
        .filter(|value| (min..=max).contains(value))
        .ok_or_else(|| {
            let named = match names {
                [first, .., last] => format!(", or {first} to {last}"),
                _ => String::new(),
            };
            let start = text.get(..3).unwrap_or_default();
            let meant = names.iter().find(|name| name.eq_ignore_ascii_case(start));
            format!(
                "invalid {name} field `{text}` (allowed: {min}-{max}{named}){}",
                did_you_mean(meant)
            )
        })
}

fn number(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.len() <= 4 && text.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use croner::parser::{CronParser, Seconds, Year};

    use super::*;

    const ACCEPTED: [&str; 24] = [
        "* * * * *",
        "*/5 * * * *",
        "0 9 * * 1-5",
        "0 9 * * MON-FRI",
        "0 9 * * sat-sun",
        "0 9 * * SUN-TUE",
        "0 0 1,15 * *",
        "0 0 1 jan,JUL *",
        "5-55/10 * * * *",
        "0 22-23,0-2 * * *",
        "30 * * * * *",
        "*/10 * * * * *",
        "  0   0 * * 7 ",
        "0 0 L * *",
        "0 0 LW * *",
        "0 0 15W,L * *",
        "0 0 * * FRIL",
        "0 0 * * 5L",
        "0 0 * * FRI#2,1#1",
        "0 0 29 2 *",
        "0 0 31 1-12 *",
        "0 0 30 2 MON",
        "@hourly",
        "@Daily",
    ];

    const REFUSED: [(&str, &str, &str); 42] = [
        ("*,5 * * * *", "*", "write it alone"),
        (
            "61 * * * *",
            "61",
            "invalid minute field `61` (allowed: 0-59)",
        ),
        (
            "* 24 * * *",
            "24",
            "invalid hour field `24` (allowed: 0-23)",
        ),
        (
            "* * 0 * *",
            "0",
            "invalid day-of-month field `0` (allowed: 1-31)",
        ),
        (
            "* * * 13 *",
            "13",
            "invalid month field `13` (allowed: 1-12, or JAN to DEC)",
        ),
        (
            "* * * * 8",
            "8",
            "invalid day-of-week field `8` (allowed: 0-7, or SUN to SAT)",
        ),
        ("60 * * * * *", "60", "invalid second field `60`"),
        ("* * * * MONDAY", "MONDAY", "did you mean `MON`?"),
        ("JAN * * * *", "JAN", "invalid minute field `JAN`"),
        ("1,2,x * * * *", "x", "invalid minute field `x`"),
        ("1,,2 * * * *", ",", "comma with nothing beside it"),
        ("1, * * * *", ",", "comma with nothing beside it"),
        ("* 5-40 * * *", "5-40", "invalid hour field `40`"),
        ("* 22-2 * * *", "22-2", "runs backwards; write `22-23,0-2`"),
        (
            "* * * * FRI-MON",
            "FRI-MON",
            "runs backwards; write `5-7,0-1`",
        ),
        ("/5 * * * *", "/5", "write `*/5`"),
        ("0/5 * * * *", "0/5", "write `0-59/5`, or `*/5`"),
        ("*/0 * * * *", "*/0", "`0` is no step"),
        ("*/ * * * *", "*/", "the step behind `/` is missing"),
        ("*/x * * * *", "*/x", "`x` is no step"),
        (
            "*/90 * * * *",
            "*/90",
            "a step of 90 never repeats between 0 and 59",
        ),
        ("0 0 ? * *", "?", "write `*`"),
        ("0 0 L-2 * *", "L-2", "invalid day-of-month field `L`"),
        ("0 0 * L *", "L", "invalid month field `L`"),
        ("0 0 * * L", "L", "write a day before it"),
        ("0 0 * * FRI#6", "FRI#6", "1 to 5 times"),
        ("0 0 32W * *", "32W", "invalid day-of-month field `32`"),
        ("* * * * +MON", "+MON", "invalid day-of-week field `+MON`"),
        ("* * *", "* * *", "this one has 3"),
        (
            "0 0 0 1 1 * 2030",
            "0 0 0 1 1 * 2030",
            "this one has 7; there is no field for the year",
        ),
        ("", "", "is empty"),
        ("  ", "", "is empty"),
        ("@dayly", "@dayly", "did you mean `@daily`?"),
        ("@reboot", "@reboot", "known names: `@yearly`"),
        ("@every 5m", "@every 5m", "; write `*/5 * * * *`"),
        ("@Every 1h", "@Every 1h", "; write `@hourly`"),
        ("@every 6h", "@every 6h", "; write `0 */6 * * *`"),
        ("@every 30s", "@every 30s", "; write `*/30 * * * * *`"),
        ("@every 7m", "@every 7m", "known names: `@yearly`"),
        ("@every ä", "@every ä", "known names: `@yearly`"),
        ("0 0 30 2 *", "30 2", "never due"),
        ("0 0 31 2,4,6 *", "31 2,4,6", "never due"),
    ];

    fn only_mistake(text: &str) -> Mistake {
        let mut mistakes = check_expression(text).unwrap_err();
        assert_eq!(mistakes.len(), 1, "{text:?}: {mistakes:?}");
        mistakes.remove(0)
    }

    #[test]
    fn says_all_that_is_wrong() {
        let mistakes = check_expression("61 24 * 13 *").unwrap_err();
        let at: Vec<_> = mistakes.into_iter().map(|mistake| mistake.at).collect();
        assert_eq!(at, [0..2, 3..5, 8..10]);
    }

    #[test]
    fn accepts_cron() {
        for text in ACCEPTED {
            assert_eq!(check_expression(text), Ok(()), "{text}");
        }
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        for (text, at, part) in REFUSED {
            let mistake = only_mistake(text);
            assert_eq!(&text[mistake.at.clone()], at, "{text:?}: {mistake:?}");
            assert!(mistake.message.contains(part), "{text:?}: {mistake:?}");
        }
    }

    #[test]
    fn points_at_the_mistake() {
        let text = "0 5-40 * * *";
        assert_eq!(
            only_mistake(text).display_in(text),
            "invalid hour field `40` (allowed: 0-23)\n    0 5-40 * * *\n      ^^^^"
        );
        let text = "0\t9 * * x";
        assert!(
            only_mistake(text)
                .display_in(text)
                .ends_with("\n    0 9 * * x\n            ^")
        );
    }

    /// What compiles must never be refused when the scheduler reads it.
    #[test]
    fn accepts_nothing_that_the_scheduler_refuses() {
        let scheduler = CronParser::builder()
            .seconds(Seconds::Optional)
            .year(Year::Disallowed)
            .build();
        let mut accepted = 0;
        for text in ACCEPTED {
            scheduler.parse(text).unwrap();
        }
        let atoms = [
            "*", "0", "1", "7", "31", "59", "JAN", "SUN", "fri", "L", "W", "#", "?", "+", "2000",
        ];
        let joints = ["", "-", "/", ",", "#", "L", "W"];
        for field in 0..6 {
            for first in atoms {
                for joint in joints {
                    for second in atoms.iter().chain(&[""]) {
                        for tail in ["", "/2", ",L", "-5", "#1", "W"] {
                            let mut fields = ["*"; 6];
                            let item = format!("{first}{joint}{second}{tail}");
                            fields[field] = &item;
                            let text = fields.join(" ");
                            if check_expression(&text).is_ok() {
                                accepted += 1;
                                assert!(scheduler.parse(&text).is_ok(), "{text}");
                            }
                        }
                    }
                }
            }
        }
        assert!(accepted > 500, "only {accepted} expressions were compared");
    }
}
