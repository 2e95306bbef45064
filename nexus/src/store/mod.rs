//! Every SQL statement of the runtime, a file per table family. Above this room nobody knows SQL.
//!
//! - [`event_log`]: append and fan out, partitions.
//! - [`delayed_emits`]: what is emitted later.
//! - [`queue`]: claim, extend, and the verdicts that end an attempt.
//! - [`dead_letters`]: list, count, redrive, purge.
//! - [`nodes`], [`subscriptions`], [`scheduled_tasks`]: what the app registers.
//! - [`renames`]: handlers that had another name before.
//! - [`replays`]: events of the log that are delivered once more.
//! - [`retirements`]: subscriptions that are given up, and what they leave behind.
//! - [`pg_cron`]: what the server's extension is to fire.
//! - [`maintenance`]: what has to be done from time to time.
//! - [`notify`]: the doorbell.
//!
//! Values are bound, never spliced. The names of queues stand in the text of statements; they come
//! from `core.queue_name` and hold nothing but `a-z`, `0-9` and `_`.

pub(crate) mod dead_letters;
pub(crate) mod delayed_emits;
pub(crate) mod event_log;
pub(crate) mod maintenance;
pub(crate) mod nodes;
pub(crate) mod notify;
pub(crate) mod pg_cron;
pub(crate) mod queue;
pub(crate) mod renames;
pub(crate) mod replays;
pub(crate) mod retirements;
pub(crate) mod scheduled_tasks;
pub(crate) mod subscriptions;

use std::{error::Error as StdError, time::Duration};

use jiff::Timestamp;
use sqlx::{
    Encode, Postgres, Type,
    encode::IsNull,
    postgres::{PgArgumentBuffer, PgHasArrayType, PgTypeInfo},
};

/// JSON text, sent as `jsonb` as it is. `sqlx::types::Json` would parse it again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JsonText<'a>(pub(crate) &'a str);

impl Type<Postgres> for JsonText<'_> {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("jsonb")
    }
}

impl PgHasArrayType for JsonText<'_> {
    fn array_type_info() -> PgTypeInfo {
        PgTypeInfo::with_name("_jsonb")
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
    let code = match error {
        sqlx::Error::Database(error) => error.code(),
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Protocol(_) => {
            return Failure::Transient;
        }
        _ => return Failure::Final,
    };
    match code.as_deref() {
        Some("42P01") => Failure::MissingTable,
        Some("23514") => Failure::MissingPartition,
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

/// What a check of ours in the schema says of a name; it names the reason.
pub(crate) fn refusal(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?;
    matches!(error.code().as_deref(), Some("22023" | "23505")).then(|| error.message().to_owned())
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
    debug_assert!(
        queue
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
        "{queue} is not the name of a queue"
    );
    format!("pgmq.q_{queue}")
}

/// A time read as microseconds since 1970 (`extract(epoch from …) * 1000000`).
pub(crate) fn timestamp(micros: i64) -> Timestamp {
    Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX)
}

/// A duration in microseconds, to be bound as `$n * interval '1 microsecond'`.
pub(crate) fn micros(duration: std::time::Duration) -> i64 {
    duration.as_micros().try_into().unwrap_or(i64::MAX / 2)
}
