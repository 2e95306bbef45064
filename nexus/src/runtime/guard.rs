//! Names whoever keeps the server from cleaning up the queues.

use std::time::{Duration, Instant};

use super::Node;
use crate::store::horizon::{self, Holder};

/// How long a snapshot may be held before its holder is named.
const PATIENCE: Duration = Duration::from_secs(30);

/// After so long the holder is named again; it doubles each time.
const AGAIN_AFTER: Duration = Duration::from_mins(1);

/// What the node knows of the holder so far.
#[derive(Debug, Default)]
pub(super) struct Guard {
    watched: Option<Watched>,
}

#[derive(Debug)]
struct Watched {
    /// Who holds what.
    identity: (String, Option<i32>, String, String),
    /// Where the server does not say how long it has been held, what we saw ourselves counts.
    seen_at: Instant,
    named: Option<(Instant, Duration)>,
}

impl Guard {
    /// Looks once, and names a holder that has been there for too long.
    pub(super) async fn look(&mut self, node: &Node) -> sqlx::Result<()> {
        let mut connection = node.connection().await?;
        let holder = horizon::oldest_holder(&mut connection).await?;
        connection.give_back().await?;
        if let Some((holder, age)) = self.overdue(holder, Instant::now()) {
            tracing::warn!(
                holder = holder.kind,
                pid = holder.pid,
                name = holder.name,
                user = holder.user,
                state = holder.state,
                transactions = holder.transactions,
                age_seconds = age.as_secs(),
                "somebody keeps PostgreSQL from cleaning up the queues, which slows claims down: end that transaction, or drop what holds it"
            );
        }
        Ok(())
    }

    /// The holder and how long it has been there, if it is to be named now.
    fn overdue(&mut self, holder: Option<Holder>, now: Instant) -> Option<(Holder, Duration)> {
        let Some(holder) = holder else {
            self.watched = None;
            return None;
        };
        let identity = (
            holder.kind.clone(),
            holder.pid,
            holder.name.clone(),
            holder.xmin.clone(),
        );
        let watched = match &mut self.watched {
            Some(watched) if watched.identity == identity => watched,
            other => other.insert(Watched {
                identity,
                seen_at: now,
                named: None,
            }),
        };
        let seen = now.duration_since(watched.seen_at);
        let age = holder.age.unwrap_or_default().max(seen);
        let is_due = watched
            .named
            .is_none_or(|(at, pause)| now.duration_since(at) >= pause);
        if age < PATIENCE || !is_due {
            return None;
        }
        let pause = watched.named.map_or(AGAIN_AFTER, |(_, pause)| 2 * pause);
        watched.named = Some((now, pause));
        Some((holder, age))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(xmin: &str, age: Option<u64>) -> Holder {
        Holder {
            kind: "session".to_owned(),
            pid: Some(7),
            name: "report".to_owned(),
            user: None,
            state: None,
            xmin: xmin.to_owned(),
            transactions: 1,
            age: age.map(Duration::from_secs),
        }
    }

    #[test]
    fn a_holder_is_named_once_and_then_ever_more_seldom() {
        let mut guard = Guard::default();
        let begun = Instant::now();
        let named: Vec<u64> = (0..500)
            .step_by(10)
            .filter(|&second| {
                let now = begun + Duration::from_secs(second);
                guard
                    .overdue(Some(holder("1", Some(second))), now)
                    .is_some()
            })
            .collect();
        assert_eq!(named, [30, 90, 210, 450]);
        // Another snapshot of the same session is another matter, and so is none.
        let now = begun + Duration::from_secs(510);
        assert!(guard.overdue(Some(holder("2", Some(5))), now).is_none());
        assert!(guard.overdue(Some(holder("2", Some(40))), now).is_some());
        assert!(guard.overdue(None, now).is_none());
    }

    #[test]
    fn where_the_server_does_not_say_how_long_what_was_seen_counts() {
        let mut guard = Guard::default();
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        assert!(guard.overdue(Some(holder("1", None)), at(0)).is_none());
        assert!(guard.overdue(Some(holder("1", None)), at(20)).is_none());
        let (_, age) = guard.overdue(Some(holder("1", None)), at(40)).unwrap();
        assert_eq!(age, Duration::from_secs(40));
    }
}
