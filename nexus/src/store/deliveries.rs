//! What became of events: their messages, their dead letters, and whom they were sent to.

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr, types::Json};

use super::{table, timestamp};

/// A handler that takes an event by its type and version.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) event_id: i64,
    pub(crate) group: String,
    pub(crate) handler: String,
    /// False if it subscribed later, and was not owed the event.
    pub(crate) was_sent: bool,
}

/// The handlers that the events are for.
pub(crate) async fn targets(
    connection: &mut PgConnection,
    namespace: &str,
    event_ids: &[i64],
) -> sqlx::Result<Vec<Target>> {
    // As core.settle_subscriptions tells what is owed.
    let rows = sqlx::query(
        "select e.event_id, s.group_name, s.handler,
                coalesce(e.subscriptions_version >= s.since_version
                         or not pg_visible_in_snapshot(e.tx_id, s.first_snapshot), false)
         from core.event_log e
         join core.subscriptions s using (namespace, event_type)
         where e.namespace = $1 and e.event_id = any ($2)
           and not e.event_version = any (s.other_versions)
         order by 1, 2, 3",
    )
    .bind(namespace)
    .bind(event_ids)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Target {
            event_id: row.get(0),
            group: row.get(1),
            handler: row.get(2),
            was_sent: row.get(3),
        })
        .collect())
}

/// A message of an event, or a dead letter of it.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) event_id: i64,
    pub(crate) msg_id: i64,
    /// The handler's present name.
    pub(crate) handler: String,
    /// Failed ones.
    pub(crate) attempts: Option<u32>,
    pub(crate) errors: Value,
    /// Of a message: from when on it may be claimed. Of a letter: when it was given up.
    pub(crate) at: Timestamp,
    /// Of a message: a node has claimed it and its lease has not ended.
    pub(crate) is_held: bool,
    /// Of a message: it may be claimed.
    pub(crate) is_due: bool,
    /// Of a letter: why it is one.
    pub(crate) reason: Option<String>,
    pub(crate) error: Option<String>,
}

/// A handler by its present name, whatever name the message was sent under.
const PRESENT_NAME: &str = "coalesce(
    (select r.handler from core.renames r
     where r.namespace = $1 and r.group_name = $2 and r.former = q.headers ->> 'handler'),
    q.headers ->> 'handler', '')";

/// An id, or a number of attempts. A foreign program may have put anything there.
const WHOLE: &str = "'^[0-9]{1,18}$'";

/// The messages of the events in the queue of a group. Walks through the whole queue, whose only indexes are
/// those that claims need.
pub(crate) async fn messages(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    queue: &str,
    event_ids: &[i64],
) -> sqlx::Result<Vec<Found>> {
    let text = format!(
        "select case when q.headers ->> 'eventId' ~ {WHOLE} then (q.headers ->> 'eventId')::bigint end,
                q.msg_id, {PRESENT_NAME},
                case when q.headers ->> 'attempts' ~ {WHOLE} then (q.headers ->> 'attempts')::bigint end,
                coalesce(q.headers -> 'errors', '[]'),
                (extract(epoch from q.vt) * 1000000)::bigint,
                q.read_ct > 0 and q.vt > core.now() and not q.headers ? 'settled',
                q.vt <= core.now(), null, null
         from {table} q
         where q.headers ->> 'eventId' = any ($3::text[])
         order by q.msg_id",
        table = table(queue)
    );
    found(connection, text, namespace, group, event_ids).await
}

/// The dead letters of the events in the dead-letter queue of a group.
pub(crate) async fn letters(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    queue: &str,
    event_ids: &[i64],
) -> sqlx::Result<Vec<Found>> {
    let text = format!(
        "select (q.headers ->> 'eventId')::bigint, q.msg_id, {PRESENT_NAME},
                case when q.message ->> 'attempts' ~ {WHOLE} then (q.message ->> 'attempts')::bigint end,
                coalesce(q.message -> 'errors', '[]'),
                (extract(epoch from q.enqueued_at) * 1000000)::bigint,
                false, false, q.message ->> 'reason', q.message ->> 'error'
         from {table} q
         where q.headers ->> 'eventId' = any ($3::text[])
           -- There is an index on these.
           and q.headers ->> 'eventType' = any (array(
               select e.event_type from core.event_log e where e.namespace = $1 and e.event_id = any ($3::bigint[])))
         order by q.msg_id",
        table = table(&format!("{queue}_dlq"))
    );
    found(connection, text, namespace, group, event_ids).await
}

async fn found(
    connection: &mut PgConnection,
    text: String,
    namespace: &str,
    group: &str,
    event_ids: &[i64],
) -> sqlx::Result<Vec<Found>> {
    let event_ids: Vec<String> = event_ids.iter().map(ToString::to_string).collect();
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .persistent(false)
        .bind(namespace)
        .bind(group)
        .bind(event_ids)
        .fetch_all(connection)
        .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Found {
                event_id: row.get(0),
                msg_id: row.get(1),
                handler: row.get(2),
                attempts: row
                    .get::<Option<i64>, _>(3)
                    .and_then(|attempts| attempts.try_into().ok()),
                errors: row.try_get::<Json<Value>, _>(4)?.0,
                at: timestamp(row.get(5)),
                is_held: row.get(6),
                is_due: row.get(7),
                reason: row.get(8),
                error: row.get(9),
            })
        })
        .collect()
}
