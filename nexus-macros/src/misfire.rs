//! What becomes of missed due times, as it is written in options.
//!
//! ```text
//! misfire = "skip" | "fire_once" | "fire_all(" integer ")"
//! ```

use crate::diagnostics::{closest, did_you_mean};

/// What becomes of due times that no node was there to fire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Misfire {
    Skip,
    FireOnce,
    FireAll { cap: u32 },
}

/// What one transaction fires at most; `core.scheduled_tasks` has the same limit.
const LARGEST_CAP: u32 = 1_000;

/// What other schedulers call it.
const SYNONYMS: [(&str, &str); 7] = [
    ("ignore", "skip"),
    ("none", "skip"),
    ("never", "skip"),
    ("once", "fire_once"),
    ("coalesce", "fire_once"),
    ("all", "fire_all(10)"),
    ("catch_up", "fire_all(10)"),
];

/// Reads a policy; the error is a sentence for the user.
pub(crate) fn parse(text: &str) -> Result<Misfire, String> {
    const FORMS: &str =
        "accepted: `skip`, `fire_once`, and `fire_all(10)`, which fires at most the newest 10";
    let text = text.trim();
    let (kind, cap) = match text.split_once('(') {
        Some((kind, rest)) => (kind.trim_end(), rest.strip_suffix(')').map(str::trim)),
        None => (text, None),
    };
    match (kind, cap) {
        ("skip", None) if text == kind => Ok(Misfire::Skip),
        ("fire_once", None) if text == kind => Ok(Misfire::FireOnce),
        ("fire_all", Some(cap)) => parse_cap(cap),
        ("fire_all", None) => Err(format!(
            "`{text}` lacks the most due times to fire; write `fire_all(10)`"
        )),
        ("skip" | "fire_once", _) => Err(format!(
            "`{kind}` takes nothing in parentheses; write `{kind}`"
        )),
        _ => {
            let word = kind.to_lowercase().replace(['-', ' '], "_");
            let synonym = SYNONYMS
                .iter()
                .find(|(name, _)| *name == word)
                .map(|&(_, meant)| meant);
            let meant = synonym.map(str::to_owned).or_else(|| {
                closest(&word, ["skip", "fire_once", "fire_all"]).map(|meant| {
                    if meant == "fire_all" {
                        format!("fire_all({})", cap.unwrap_or("10"))
                    } else {
                        meant.to_owned()
                    }
                })
            });
            Err(format!(
                "`{text}` is no policy{}\n{FORMS}",
                did_you_mean(meant)
            ))
        }
    }
}

fn parse_cap(cap: &str) -> Result<Misfire, String> {
    let digits = cap.replace('_', "");
    match digits.parse::<u64>() {
        Ok(0) => Err("`fire_all(0)` fires nothing; did you mean `skip`?".to_owned()),
        Ok(count) => match u32::try_from(count) {
            Ok(cap) if cap <= LARGEST_CAP => Ok(Misfire::FireAll { cap }),
            _ => Err(format!(
                "`fire_all({cap})` is too much; the most is `fire_all({LARGEST_CAP})`"
            )),
        },
        Err(_) => Err(format!(
            "`{cap}` is not a number of due times; write `fire_all(10)`"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_policies() {
        assert_eq!(parse("skip"), Ok(Misfire::Skip));
        assert_eq!(parse(" fire_once "), Ok(Misfire::FireOnce));
        assert_eq!(parse("fire_all(10)"), Ok(Misfire::FireAll { cap: 10 }));
        assert_eq!(
            parse("fire_all ( 1_000 )"),
            Ok(Misfire::FireAll { cap: 1_000 })
        );
    }

    #[test]
    fn says_what_is_wrong_with_a_policy() {
        for (text, part) in [
            ("", "`` is no policy\naccepted"),
            ("Skip", "did you mean `skip`?"),
            ("fire-once", "did you mean `fire_once`?"),
            ("fire_al(3)", "did you mean `fire_all(3)`?"),
            ("all", "did you mean `fire_all(10)`?"),
            ("once", "did you mean `fire_once`?"),
            ("fire_all", "lacks the most due times"),
            ("fire_all(", "lacks the most due times"),
            ("fire_all()", "`` is not a number of due times"),
            ("fire_all(many)", "`many` is not a number of due times"),
            ("fire_all(-1)", "`-1` is not a number of due times"),
            ("fire_all(0)", "did you mean `skip`?"),
            ("fire_all(3000000000)", "is too much"),
            ("skip(3)", "takes nothing in parentheses"),
            ("tomorrow", "`tomorrow` is no policy\naccepted"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
