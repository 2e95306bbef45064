//! Every SQL statement of the runtime, a file per table family. Above this room nobody knows SQL.
//!
//! - [`event_log`]: append and fan out, partitions.
//! - [`delayed_emits`]: what is emitted later.
//! - [`queue`]: claim, extend, and the verdicts that end an attempt.
//! - [`dead_letters`]: list, count, redrive, purge.
//! - [`logged_events`], [`deliveries`], [`depths`]: the log, what became of its events, how much waits.
//! - [`nodes`], [`subscriptions`], [`scheduled_tasks`]: what the app registers.
//! - [`renames`]: handlers that had another name before.
//! - [`replays`]: events of the log that are delivered once more.
//! - [`retirements`]: subscriptions that are given up, and what they leave behind.
//! - [`pg_cron`]: what the server's extension is to fire.
//! - [`maintenance`]: what has to be done from time to time.
//! - [`roles`]: who may do what in which namespace.
//! - [`tokens`]: what programs show that come over HTTP.
//! - [`notify`]: the doorbell.
//! - [`free_sql`]: what somebody writes who looks into the database.
//! - [`horizon`]: who keeps the server from cleaning up.
//! - [`diagnosis`]: what else a look at a database finds out.
//!
//! Values are bound, never spliced. The names of queues stand in the text of statements; they come
//! from `core.queue_name` and hold nothing but `a-z`, `0-9` and `_`.

pub(crate) mod dead_letters;
pub(crate) mod delayed_emits;
pub(crate) mod deliveries;
pub(crate) mod depths;
pub(crate) mod diagnosis;
pub(crate) mod event_log;
pub(crate) mod free_sql;
pub(crate) mod horizon;
pub(crate) mod logged_events;
pub(crate) mod maintenance;
pub(crate) mod nodes;
pub(crate) mod notify;
pub(crate) mod pg_cron;
pub(crate) mod queue;
pub(crate) mod renames;
pub(crate) mod replays;
pub(crate) mod retirements;
pub(crate) mod roles;
pub(crate) mod scheduled_tasks;
pub(crate) mod subscriptions;
pub(crate) mod tokens;

use std::{error::Error as StdError, time::Duration};

use jiff::Timestamp;
use sqlx::{
    Encode, Postgres, Type,
    encode::IsNull,
    error::DatabaseError,
    postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo},
    types::Json,
};

/// JSON text, sent as `jsonb` as it is. `sqlx::types::Json` would parse it again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JsonText<'a>(pub(crate) &'a str);

impl Type<Postgres> for JsonText<'_> {
    fn type_info() -> PgTypeInfo {
        // By its id: sqlx looks a name up in the middle of a statement, which an unnamed one does not
        // survive.
        <Json<()> as Type<Postgres>>::type_info()
    }
}

impl PgHasArrayType for JsonText<'_> {
    fn array_type_info() -> PgTypeInfo {
        <Json<()> as PgHasArrayType>::array_type_info()
    }
}

impl Encode<'_, Postgres> for JsonText<'_> {
    fn encode_by_ref(
        &self,
        buffer: &mut PgArgumentBuffer,
    ) -> Result<IsNull, Box<dyn StdError + Send + Sync>> {
        // The version of jsonb's binary form, which is the text after it.
        buffer.push(1);
        buffer.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }
}

/// What a failed statement means for the caller; decided by SQLSTATE, never by text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A queue's table is gone.
    MissingTable,
    /// No partition of the log covers the time.
    MissingPartition,
    /// Repeating the statement can help: a lost connection, a deadlock, a server that restarts.
    Transient,
    /// Stopped by a `statement_timeout`, or by hand. Whose time was over, the caller knows.
    Cancelled,
    /// It cannot.
    Final,
}

/// Whether nothing that was stored or sent is to blame, so that the same may do at the next try.
pub(crate) fn is_passing(error: &sqlx::Error) -> bool {
    matches!(classify(error), Failure::Transient | Failure::Cancelled)
}

pub(crate) fn classify(error: &sqlx::Error) -> Failure {
    let (code, constraint) = match error {
        sqlx::Error::Database(error) => (error.code(), error.constraint()),
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::Protocol(_)
        | sqlx::Error::BeginFailed => {
            return Failure::Transient;
        }
        _ => return Failure::Final,
    };
    match code.as_deref() {
        Some("42P01") => Failure::MissingTable,
        // A row that fits into no partition violates no constraint that has a name.
        Some("23514") if constraint.is_none() => Failure::MissingPartition,
        Some("57014") => Failure::Cancelled,
        // Connection exceptions, serialization and deadlock, resources, shutdown, read-only after a failover.
        Some(code)
            if code.starts_with("08")
                || code.starts_with("40")
                || code.starts_with("53")
                || code.starts_with("57P")
                || code == "25006"
                || code == "55P03" =>
        {
            Failure::Transient
        }
        _ => Failure::Final,
    }
}

/// A deadlock or a serialization failure: the transaction was rolled back, and the same may succeed at
/// once.
pub(crate) fn is_conflict(error: &sqlx::Error) -> bool {
    is_conflict_code(code(error).as_deref())
}

fn is_conflict_code(code: Option<&str>) -> bool {
    matches!(code, Some("40001" | "40P01"))
}

/// The server takes no writes: a standby, or a primary that has become one.
pub(crate) fn is_read_only(error: &sqlx::Error) -> bool {
    code(error).as_deref() == Some("25006")
}

/// An earlier statement of the transaction has failed.
pub(crate) fn is_aborted(error: &sqlx::Error) -> bool {
    code(error).as_deref() == Some("25P02")
}

/// Nobody knows whether the statement was executed: the connection was lost, or gave no answer.
pub(crate) fn is_unanswered(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed)
}

/// The database is away, or the way to it; nobody else's statements will do any better.
pub(crate) fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut => true,
        error => code(error).is_some_and(|code| {
            code.starts_with("08")
                || code.starts_with("57P")
                || code.starts_with("53")
                || code == "25006"
        }),
    }
}

pub(crate) fn code(error: &sqlx::Error) -> Option<std::borrow::Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// What an error of the database in an error's chain of sources says, whoever wrapped it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blame {
    /// See [`is_conflict`].
    Conflict,
    /// See [`is_read_only`].
    ReadOnly,
    /// A connection was lost; whose, only a look at ours can tell.
    Lost,
    /// Something else, or no error of a database.
    Other,
}

/// Looks for an error of the database in the chain of sources.
pub(crate) fn blame(error: &(dyn StdError + 'static)) -> Blame {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<sqlx::Error>() {
            if is_unanswered(error) {
                return Blame::Lost;
            }
            if let Some(code) = code(error) {
                return blame_code(&code);
            }
        }
        // The sqlx error itself is hidden if `anyhow` has wrapped it without context.
        if let Some(error) = error.downcast_ref::<Box<dyn DatabaseError>>()
            && let Some(code) = error.code()
        {
            return blame_code(&code);
        }
        if error.is::<std::io::Error>() {
            return Blame::Lost;
        }
        next = error.source();
    }
    Blame::Other
}

fn blame_code(code: &str) -> Blame {
    match code {
        code if is_conflict_code(Some(code)) => Blame::Conflict,
        "25006" => Blame::ReadOnly,
        code if code.starts_with("08") || code.starts_with("57P") => Blame::Lost,
        _ => Blame::Other,
    }
}

/// How often work is repeated at once that met a deadlock or a serialization failure.
pub(crate) const MOST_CONFLICTS: u32 = 5;

/// A short pause before work is repeated after a conflict, of random length, so that those who met do not
/// meet again.
pub(crate) async fn pause_after_conflict(conflicts: u32) {
    let most = 10_000 * u64::from(conflicts.max(1));
    tokio::time::sleep(Duration::from_micros(fastrand::u64(500..=most))).await;
}

/// Does work that leaves nothing behind when it fails, and repeats it at once, a few times, while it meets
/// deadlocks and serialization failures.
pub(crate) async fn despite_conflicts<T, F: Future<Output = sqlx::Result<T>>>(
    mut work: impl FnMut() -> F,
) -> sqlx::Result<T> {
    let mut conflicts = 0;
    loop {
        // On the heap: work that is repeated is large.
        match Box::pin(work()).await {
            Err(error) if is_conflict(&error) && conflicts < MOST_CONFLICTS => {
                conflicts += 1;
                tracing::debug!(%error, conflicts, "a conflict, trying again at once");
                pause_after_conflict(conflicts).await;
            }
            done => return done,
        }
    }
}

/// Whether the role may not do what it tried.
pub(crate) fn is_denied(error: &sqlx::Error) -> bool {
    code(error).as_deref() == Some("42501")
}

/// What a check of ours in the schema says of a name; it names the reason.
pub(crate) fn refusal(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?;
    matches!(error.code().as_deref(), Some("22023" | "23505")).then(|| error.message().to_owned())
}

/// The same of a role or its rights.
pub(crate) fn refusal_of_roles(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?;
    matches!(
        error.code().as_deref(),
        Some("22023" | "23505" | "42501" | "0LP01" | "55P03")
    )
    .then(|| error.message().to_owned())
}

/// Waits for an answer of the database for a limited time. Whose connection may be in the middle of a
/// statement then has to close it.
pub(crate) async fn answered_within<T>(
    patience: Duration,
    work: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    let answer = tokio::time::timeout(patience, work).await;
    answer.unwrap_or_else(|_| Err(no_answer()))
}

/// The error of a statement that nobody answered in time.
pub(crate) fn no_answer() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "the database gave no answer in time",
    ))
}

/// The table of a queue, for the text of a statement.
pub(crate) fn table(queue: &str) -> String {
    let is_name = queue
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    debug_assert!(is_name, "{queue} is not the name of a queue");
    if is_name {
        format!("pgmq.q_{queue}")
    } else {
        // The schema lets no such name in; if one should come all the same, it is not read as SQL.
        "pgmq.q_".to_owned()
    }
}

/// A time read as microseconds since 1970 (`extract(epoch from …) * 1000000`).
pub(crate) fn timestamp(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX)
}

/// A duration in microseconds, to be bound as `$n * interval '1 microsecond'`.
pub(crate) fn micros(duration: std::time::Duration) -> i64 {
    // From now on so long is still a time that Postgres knows.
    let longest = i64::MAX / 2;
    duration
        .as_micros()
        .try_into()
        .unwrap_or(longest)
        .min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Refused(&'static str);

    impl std::fmt::Display for Refused {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "refused with {}", self.0)
        }
    }

    impl StdError for Refused {}

    impl DatabaseError for Refused {
        fn message(&self) -> &'static str {
            "refused"
        }

        fn code(&self) -> Option<std::borrow::Cow<'_, str>> {
            Some(self.0.into())
        }

        fn as_error(&self) -> &(dyn StdError + Send + Sync + 'static) {
            self
        }

        fn as_error_mut(&mut self) -> &mut (dyn StdError + Send + Sync + 'static) {
            self
        }

        fn into_error(self: Box<Self>) -> Box<dyn StdError + Send + Sync + 'static> {
            self
        }

        fn kind(&self) -> sqlx::error::ErrorKind {
            sqlx::error::ErrorKind::Other
        }
    }

    fn refused(code: &'static str) -> sqlx::Error {
        sqlx::Error::Database(Box::new(Refused(code)))
    }

    #[test]
    fn finds_the_error_of_the_database_whoever_wrapped_it() {
        type Boxed = Box<dyn StdError + Send + Sync>;
        let plain: Boxed = refused("40P01").into();
        assert_eq!(blame(&*plain), Blame::Conflict);
        let wrapped: Boxed = anyhow::Error::from(refused("40001")).into();
        assert_eq!(blame(&*wrapped), Blame::Conflict);
        let told: Boxed = anyhow::Error::from(refused("25006"))
            .context("booking")
            .into();
        assert_eq!(blame(&*told), Blame::ReadOnly);
        let lost: Boxed = anyhow::Error::from(no_answer()).context("booking").into();
        assert_eq!(blame(&*lost), Blame::Lost);
        let other: Boxed = refused("23505").into();
        assert_eq!(blame(&*other), Blame::Other);
        let text: Boxed = "40P01".into();
        assert_eq!(blame(&*text), Blame::Other);
    }
}
