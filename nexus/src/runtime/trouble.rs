//! Says what is wrong with the database once, and not at every try of every loop.
//!
//! While the database is away all loops fail, over and over, for one reason. What they report comes here:
//! the first failure is a warning, then one each minute says that it is still away, and a line tells when
//! it answers again. Errors of other kinds are told apart by what was attempted, and repeated ever more
//! seldom.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::store;

/// How often an outage that goes on is mentioned.
const REMIND_EVERY: Duration = Duration::from_mins(1);

/// A connection that breaks alone is told of at most this often.
const CALM: Duration = Duration::from_secs(10);

/// How long an error of the same kind is kept quiet at first; it doubles up to the longest time.
const QUIET: Duration = Duration::from_secs(10);
const LONGEST_QUIET: Duration = Duration::from_mins(10);

/// What the loops of a node have met. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trouble {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    outage: Option<Outage>,
    /// When an outage was told of last.
    told_at: Option<Instant>,
    others: HashMap<(&'static str, String), Told>,
}

#[derive(Debug)]
struct Outage {
    since: Instant,
    is_told: bool,
    is_read_only: bool,
    failures: u64,
}

/// An error of one kind.
#[derive(Debug)]
struct Told {
    at: Instant,
    quiet: Duration,
    unsaid: u64,
}

/// What is to be logged of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// Nothing.
    Quiet,
    /// The database is away.
    Away,
    /// It takes no writes.
    ReadOnly,
    /// It is away still, for so long.
    StillAway(Duration),
    /// Something else, which so many lines were kept quiet of.
    Other(u64),
}

impl Trouble {
    /// A loop has failed at `doing` and is going to try again.
    pub(crate) fn met(&self, doing: &'static str, error: &sqlx::Error) {
        let line = self.line(doing, error, Instant::now());
        match line {
            Line::Quiet => tracing::debug!(%error, "could not {doing}, trying again"),
            Line::Away => tracing::warn!(
                %error,
                "could not {doing}: the database is away or a connection was lost; trying again until it answers"
            ),
            Line::ReadOnly => tracing::warn!(
                %error,
                "could not {doing}: the database takes no writes, as after a failover; connecting again until it does"
            ),
            Line::StillAway(since) => tracing::warn!(
                %error, ?since,
                "could not {doing}: the database is still away, trying again until it answers"
            ),
            Line::Other(0) => tracing::warn!(%error, "could not {doing}, trying again"),
            Line::Other(unsaid) => {
                tracing::warn!(%error, unsaid, "could not {doing}, trying again and again");
            }
        }
    }

    /// The database has answered, and taken a write.
    pub(crate) fn is_over(&self) {
        let outage = self.lock().outage.take();
        if let Some(outage) = outage.filter(|outage| outage.is_told) {
            tracing::info!(
                after = ?outage.since.elapsed(),
                failures = outage.failures,
                "the database answers again"
            );
        }
    }

    fn line(&self, doing: &'static str, error: &sqlx::Error, now: Instant) -> Line {
        let mut state = self.lock();
        if !store::is_away(error) {
            let code = store::code(error).unwrap_or_default().into_owned();
            return state.other((doing, code), now);
        }
        let is_read_only = store::is_read_only(error);
        let told_at = state.told_at;
        let outage = state.outage.get_or_insert(Outage {
            since: now,
            is_told: false,
            is_read_only,
            failures: 0,
        });
        outage.failures += 1;
        let is_new = !outage.is_told || outage.is_read_only != is_read_only;
        outage.is_read_only = is_read_only;
        let quiet = if is_new { CALM } else { REMIND_EVERY };
        if told_at.is_some_and(|at| now.duration_since(at) < quiet) {
            return Line::Quiet;
        }
        outage.is_told = true;
        let line = match (is_new, is_read_only) {
            (false, _) => Line::StillAway(now.duration_since(outage.since)),
            (true, true) => Line::ReadOnly,
            (true, false) => Line::Away,
        };
        state.told_at = Some(now);
        line
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn other(&mut self, kind: (&'static str, String), now: Instant) -> Line {
        let Some(told) = self.others.get_mut(&kind) else {
            self.others.insert(
                kind,
                Told {
                    at: now,
                    quiet: QUIET,
                    unsaid: 0,
                },
            );
            return Line::Other(0);
        };
        let since = now.duration_since(told.at);
        if since < told.quiet {
            told.unsaid += 1;
            return Line::Quiet;
        }
        // It had passed meanwhile.
        told.quiet = if since > 2 * told.quiet {
            QUIET
        } else {
            (2 * told.quiet).min(LONGEST_QUIET)
        };
        told.at = now;
        Line::Other(std::mem::take(&mut told.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_once_and_then_each_minute() {
        let trouble = Trouble::default();
        let away = store::no_answer();
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        assert_eq!(trouble.line("claim", &away, at(0)), Line::Away);
        for second in 0..60 {
            assert_eq!(trouble.line("beat", &away, at(second)), Line::Quiet);
        }
        let still = Line::StillAway(Duration::from_mins(1));
        assert_eq!(trouble.line("claim", &away, at(60)), still);
        trouble.is_over();
        // One connection that breaks soon after is no news, the next outage is.
        assert_eq!(trouble.line("claim", &away, at(61)), Line::Quiet);
        trouble.is_over();
        assert_eq!(trouble.line("claim", &away, at(71)), Line::Away);
    }

    #[test]
    fn other_errors_are_repeated_ever_more_seldom() {
        let trouble = Trouble::default();
        let error = sqlx::Error::RowNotFound;
        let begun = Instant::now();
        let told = (0..100)
            .filter(|second| {
                let now = begun + Duration::from_secs(*second);
                trouble.line("claim", &error, now) != Line::Quiet
            })
            .collect::<Vec<u64>>();
        assert_eq!(told, [0, 10, 30, 70]);
        assert_eq!(trouble.line("adopt", &error, begun), Line::Other(0));
    }
}
