//! What became of events: their messages, their dead letters, and whom they were sent to.

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr, types::Json};

use super::{subscriptions::GroupRow, table, timestamp};

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
    pub(crate) group: String,
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
    /// Of a letter, and only of one: why it is one.
    pub(crate) reason: Option<String>,
    pub(crate) error: Option<String>,
}

/// An id, or a number of attempts. A foreign program may have put anything there.
const WHOLE: &str = "'^[0-9]{1,18}$'";

/// The messages and dead letters of the events in the queues of these groups.
///
/// One statement, and so one snapshot: what moves from the queue to the dead letters or back is in one of them. It
/// walks through the queues, whose only indexes are those that claims need.
pub(crate) async fn found(
    connection: &mut PgConnection,
    namespace: &str,
    groups: &[GroupRow],
    event_ids: &[i64],
) -> sqlx::Result<Vec<Found>> {
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let mut parts = Vec::with_capacity(2 * groups.len());
    for (index, GroupRow { queue, .. }) in groups.iter().enumerate() {
        let group = format!("($3::text[])[{}]", index + 1);
        // The handler's present name, whatever name it was sent under.
        let handler = format!(
            "coalesce((select r.handler from core.renames r
                       where r.namespace = $1 and r.group_name = {group} and r.former = q.headers ->> 'handler'),
                      q.headers ->> 'handler', '')"
        );
        parts.push(format!(
            "select (q.headers ->> 'eventId')::bigint, q.msg_id, {group}, {handler},
                    case when q.headers ->> 'attempts' ~ {WHOLE} then (q.headers ->> 'attempts')::bigint end,
                    coalesce(q.headers -> 'errors', '[]'), q.vt,
                    q.read_ct > 0 and q.vt > core.now() and not q.headers ? 'settled', q.vt <= core.now(),
                    null::text, null::text
             from {table} q
             where q.headers ->> 'eventId' = any ($2)",
            table = table(queue)
        ));
        parts.push(format!(
            "select (q.headers ->> 'eventId')::bigint, q.msg_id, {group}, {handler},
                    case when q.message ->> 'attempts' ~ {WHOLE} then (q.message ->> 'attempts')::bigint end,
                    coalesce(q.message -> 'errors', '[]'), q.enqueued_at,
                    false, false, coalesce(q.message ->> 'reason', ''), q.message ->> 'error'
             from {table} q
             where q.headers ->> 'eventId' = any ($2)
               -- There is an index on these.
               and q.headers ->> 'eventType' = any (array(
                   select e.event_type from core.event_log e
                   where e.namespace = $1 and e.event_id = any ($2::text[]::bigint[])))",
            table = table(&format!("{queue}_dlq"))
        ));
    }
    let text = format!(
        "select event_id, msg_id, group_name, handler, attempts, errors,
                (extract(epoch from at) * 1000000)::bigint, is_held, is_due, reason, error
         from ({}) as f (event_id, msg_id, group_name, handler, attempts, errors, at, is_held, is_due, reason, error)
         order by event_id, group_name, handler, msg_id",
        parts.join(" union all ")
    );
    let names: Vec<&str> = groups.iter().map(|row| row.group.as_str()).collect();
    let event_ids: Vec<String> = event_ids.iter().map(ToString::to_string).collect();
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .persistent(false)
        .bind(namespace)
        .bind(event_ids)
        .bind(names)
        .fetch_all(connection)
        .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Found {
                event_id: row.get(0),
                msg_id: row.get(1),
                group: row.get(2),
                handler: row.get(3),
                attempts: row
                    .get::<Option<i64>, _>(4)
                    .and_then(|attempts| attempts.try_into().ok()),
                errors: row.try_get::<Json<Value>, _>(5)?.0,
                at: timestamp(row.get(6)),
                is_held: row.get(7),
                is_due: row.get(8),
                reason: row.get(9),
                error: row.get(10),
            })
        })
        .collect()
}
