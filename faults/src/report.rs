//! What a fault did, as a line.

use std::{fmt::Write as _, time::Duration};

use serde::Serialize;

/// What came of a fault.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Outcome {
    pub(crate) fault: &'static str,
    /// Work that is in the log, and ticks.
    pub(crate) emitted: u64,
    /// Effects of exactly-once handlers.
    pub(crate) effects: u64,
    /// Events, or effects of any handler, that are missing.
    pub(crate) lost: u64,
    /// Events, or effects of exactly-once handlers, that are there too often.
    pub(crate) doubled: u64,
    /// Effects of the at-least-once handler beyond the first.
    pub(crate) again: u64,
    /// From the end of the last disturbance until everything that was emitted had run.
    pub(crate) recovery_seconds: f64,
    pub(crate) seconds: f64,
    /// Figures of the fault's own.
    pub(crate) notes: Vec<String>,
    /// What must not be, beside the counts.
    pub(crate) violations: Vec<String>,
    /// Why it was not run.
    pub(crate) skipped: Option<String>,
}

impl Outcome {
    pub(crate) fn is_well(&self) -> bool {
        self.lost == 0 && self.doubled == 0 && self.violations.is_empty()
    }

    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    pub(crate) fn violation(&mut self, violation: impl Into<String>) {
        self.violations.push(violation.into());
    }

    /// Notes a violation unless something holds.
    pub(crate) fn require(&mut self, holds: bool, violation: impl FnOnce() -> String) {
        if !holds {
            self.violation(violation());
        }
    }

    /// What the table has no column for, a line each.
    pub(crate) fn details(&self) -> String {
        let mut text = String::new();
        for note in &self.notes {
            let _ = writeln!(text, "  {note}");
        }
        if let Some(reason) = &self.skipped {
            let _ = writeln!(text, "  NOT RUN: {reason}");
        }
        for violation in &self.violations {
            let _ = writeln!(text, "  WRONG: {violation}");
        }
        text
    }
}

/// The table of all faults, as Markdown.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let mut text = String::from(
        "| Fault | Emitted | Effects | Lost | Doubled | At least once, again | Recovery | Took | |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|---|\n",
    );
    for outcome in outcomes {
        let verdict = match &outcome.skipped {
            Some(_) => "not run",
            None if outcome.is_well() => "holds",
            None => "WRONG",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {:.1} s | {:.0} s | {verdict} |",
            outcome.fault,
            outcome.emitted,
            outcome.effects,
            outcome.lost,
            outcome.doubled,
            outcome.again,
            outcome.recovery_seconds,
            outcome.seconds,
        );
    }
    text
}

/// A time in seconds, for notes.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// The median and the largest, for notes.
pub(crate) fn spread(durations: &[Duration]) -> String {
    let mut sorted = durations.to_vec();
    sorted.sort();
    match sorted.as_slice() {
        [] => "none".to_owned(),
        sorted => format!(
            "median {}, at most {}",
            seconds(sorted[sorted.len() / 2]),
            seconds(sorted[sorted.len() - 1])
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_doubled_or_wrong_is_not_well() {
        let well = Outcome::default();
        assert!(well.is_well());
        let lost = Outcome {
            lost: 1,
            ..Outcome::default()
        };
        let doubled = Outcome {
            doubled: 1,
            ..Outcome::default()
        };
        let mut wrong = Outcome::default();
        wrong.require(1 > 2, || "one is not more than two".to_owned());
        for outcome in [&lost, &doubled, &wrong] {
            assert!(!outcome.is_well());
            assert!(table(std::slice::from_ref(outcome)).contains("WRONG"));
        }
        // Seeing an effect of an at-least-once handler again is allowed.
        let again = Outcome {
            again: 3,
            ..Outcome::default()
        };
        assert!(again.is_well());
    }
}
