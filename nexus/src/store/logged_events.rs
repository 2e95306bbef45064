//! Reading the log.

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{
    AssertSqlSafe, PgConnection, Postgres, QueryBuilder, Row, SqlSafeStr, postgres::PgRow,
    types::Json,
};

use super::timestamp;

/// Which events to list; what is `None` does not matter.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    pub(crate) event_type: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) since: Option<Timestamp>,
    pub(crate) until: Option<Timestamp>,
    pub(crate) before_id: Option<i64>,
    pub(crate) after_id: Option<i64>,
    pub(crate) is_oldest_first: bool,
    pub(crate) committed: Option<Committed>,
}

/// When an event was committed: after everything that the first snapshot sees, and before everything that the
/// second one does not.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) after: Moment,
    pub(crate) before: Moment,
}

/// What was committed at a moment, and when the oldest transaction began that was open then.
#[derive(Debug, Clone)]
pub(crate) struct Moment {
    snapshot: String,
    oldest_micros: i64,
}

pub(crate) async fn moment(connection: &mut PgConnection) -> sqlx::Result<Moment> {
    // Before the snapshot: in one statement with it, a transaction that commits between the two would be in neither.
    let oldest_micros = sqlx::query_scalar(
        "select (extract(epoch from core.oldest_transaction_start()) * 1000000)::bigint",
    )
    .fetch_one(&mut *connection)
    .await?;
    let snapshot = sqlx::query_scalar("select pg_current_snapshot()::text")
        .fetch_one(connection)
        .await?;
    Ok(Moment {
        snapshot,
        oldest_micros,
    })
}

/// An event of the log.
#[derive(Debug)]
pub(crate) struct Logged {
    pub(crate) event_id: i64,
    pub(crate) event_type: String,
    pub(crate) event_version: i32,
    pub(crate) emitted_at: Timestamp,
    pub(crate) producer: String,
    pub(crate) key: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) causation_id: Option<String>,
    pub(crate) payload: Value,
    pub(crate) metadata: Value,
}

const COLUMNS: &str =
    "event_id, event_type, event_version, (extract(epoch from emitted_at) * 1000000)::bigint,
    producer_node_id, key, correlation_id, causation_id, payload, metadata";

fn read(row: &PgRow) -> sqlx::Result<Logged> {
    Ok(Logged {
        event_id: row.try_get(0)?,
        event_type: row.try_get(1)?,
        event_version: row.try_get(2)?,
        emitted_at: timestamp(row.try_get(3)?),
        producer: row.try_get(4)?,
        key: row.try_get(5)?,
        correlation_id: row.try_get(6)?,
        causation_id: row.try_get(7)?,
        payload: row.try_get::<Json<_>, _>(8)?.0,
        metadata: row.try_get::<Json<_>, _>(9)?.0,
    })
}

/// The events of a namespace, by their ids.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
    wanted: &Wanted,
    limit: i64,
) -> sqlx::Result<Vec<Logged>> {
    let mut query = QueryBuilder::<Postgres>::new(format!(
        "select {COLUMNS} from core.event_log where namespace = "
    ));
    query.push_bind(namespace);
    for (column, value) in [
        ("event_type", &wanted.event_type),
        ("key", &wanted.key),
        ("correlation_id", &wanted.correlation_id),
    ] {
        if let Some(value) = value {
            query
                .push(format_args!(" and {column} = "))
                .push_bind(value);
        }
    }
    for (condition, time) in [(">=", wanted.since), ("<", wanted.until)] {
        if let Some(time) = time {
            since_1970(&mut query, condition, time.as_microsecond());
        }
    }
    for (condition, event_id) in [("<", wanted.before_id), (">", wanted.after_id)] {
        if let Some(event_id) = event_id {
            query
                .push(format_args!(" and event_id {condition} "))
                .push_bind(event_id);
        }
    }
    if let Some(committed) = &wanted.committed {
        // For the partitions: no event that is looked for was emitted by a transaction that began earlier.
        since_1970(&mut query, ">=", committed.after.oldest_micros);
        query
            .push(" and not pg_visible_in_snapshot(tx_id, ")
            .push_bind(committed.after.snapshot.as_str())
            .push("::pg_snapshot) and pg_visible_in_snapshot(tx_id, ")
            .push_bind(committed.before.snapshot.as_str())
            .push("::pg_snapshot)");
    }
    let order = if wanted.is_oldest_first { "" } else { " desc" };
    query
        .push(format_args!(" order by event_id{order} limit "))
        .push_bind(limit);
    // Not prepared: the best plan depends on what is asked for.
    let rows = query
        .build()
        .persistent(false)
        .fetch_all(connection)
        .await?;
    rows.iter().map(read).collect()
}

fn since_1970(query: &mut QueryBuilder<Postgres>, condition: &str, micros: i64) {
    query
        .push(format_args!(
            " and emitted_at {condition} timestamptz 'epoch' + interval '1 microsecond' * "
        ))
        .push_bind(micros);
}

/// One event of a namespace.
pub(crate) async fn get(
    connection: &mut PgConnection,
    namespace: &str,
    event_id: i64,
) -> sqlx::Result<Option<Logged>> {
    let text =
        format!("select {COLUMNS} from core.event_log where event_id = $2 and namespace = $1");
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(namespace)
        .bind(event_id)
        .fetch_optional(connection)
        .await?;
    row.as_ref().map(read).transpose()
}
