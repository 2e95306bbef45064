//! Events that are emitted later.
//!
//! They are stored by the statement of [`super::event_log`], and by `core.emit`.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::{PgConnection, Row};

use super::timestamp;

/// What is rung for an event that is due soon. No queue has this name.
pub(crate) const BELL: &str = "delayed";

/// Within this time every node looks by itself for what is due, so that for an event that is due
/// later nothing is rung.
pub(crate) const NOTICED_WITHIN: Duration = Duration::from_millis(500);

/// What became of the events that were due.
#[derive(Debug)]
pub(crate) struct Emitted {
    pub(crate) count: i32,
    /// The queues that got messages.
    pub(crate) queues: Vec<String>,
    /// Those that could not be emitted, with the reason.
    pub(crate) failed: Vec<(i64, String)>,
    /// How long until the next one is to be taken up; zero if another node has it locked.
    pub(crate) next_in: Option<Duration>,
}

/// Emits what is due, at most `limit`; see `core.emit_due`.
pub(crate) async fn emit_due(
    connection: &mut PgConnection,
    namespace: &str,
    limit: i32,
    isolate: bool,
) -> sqlx::Result<Emitted> {
    let row = sqlx::query(
        "select emitted, queues, failed, errors, next_in from core.emit_due($1, $2, $3)",
    )
    .bind(namespace)
    .bind(limit)
    .bind(isolate)
    .fetch_one(connection)
    .await?;
    let (failed, errors): (Vec<i64>, Vec<String>) = (row.get(2), row.get(3));
    Ok(Emitted {
        count: row.get(0),
        queues: row.get(1),
        failed: failed.into_iter().zip(errors).collect(),
        next_in: row
            .get::<Option<i64>, _>(4)
            .map(|micros| Duration::from_micros(micros.try_into().unwrap_or(0))),
    })
}

/// Microseconds until an event is to be taken up next, by the clock of the database; `None` without any. Takes a
/// tenth of what [`emit_due`] does that finds nothing.
pub(crate) async fn until_next(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(
        "select (extract(epoch from min(next_try_at) - core.now()) * 1000000)::bigint
         from core.delayed_emits where namespace = $1",
    )
    .bind(namespace)
    .fetch_one(connection)
    .await
}

/// Removes an event that waits in the namespace; see `core.cancel`.
pub(crate) async fn cancel(
    connection: &mut PgConnection,
    namespace: &str,
    event_id: i64,
) -> sqlx::Result<bool> {
    let is_cancelled: Option<bool> = sqlx::query_scalar(
        "select core.cancel(event_id) from core.delayed_emits where event_id = $1 and namespace = $2",
    )
    .bind(event_id)
    .bind(namespace)
    .fetch_optional(connection)
    .await?;
    Ok(is_cancelled.unwrap_or(false))
}

/// An event that waits.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) event_id: i64,
    pub(crate) event_type: String,
    pub(crate) event_version: i32,
    pub(crate) key: Option<String>,
    pub(crate) idempotency_key: Option<String>,
    pub(crate) correlation_id: String,
    pub(crate) requested_at: Timestamp,
    pub(crate) due_at: Timestamp,
    pub(crate) error: Option<String>,
}

/// The events that wait in the namespace, those that are due first.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
    limit: i64,
) -> sqlx::Result<Vec<Waiting>> {
    let rows = sqlx::query(
        "select event_id, event_type, event_version, key, idempotency_key, correlation_id,
                (extract(epoch from requested_at) * 1000000)::bigint,
                (extract(epoch from due_at) * 1000000)::bigint, error
         from core.delayed_emits
         where namespace = $1
         order by next_try_at, event_id limit $2",
    )
    .bind(namespace)
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Waiting {
            event_id: row.get(0),
            event_type: row.get(1),
            event_version: row.get(2),
            key: row.get(3),
            idempotency_key: row.get(4),
            correlation_id: row.get(5),
            requested_at: timestamp(row.get(6)),
            due_at: timestamp(row.get(7)),
            error: row.get(8),
        })
        .collect())
}
