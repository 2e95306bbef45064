//! Dead letters: shown and redriven.

use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::{table, timestamp};

/// A dead letter as it is stored.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) msg_id: i64,
    pub(crate) body: String,
    pub(crate) event_id: Option<i64>,
    pub(crate) failed_at: jiff::Timestamp,
}

/// The dead letters of a queue, newest first.
pub(crate) async fn list(
    connection: &mut PgConnection,
    queue: &str,
    limit: i64,
) -> sqlx::Result<Vec<Stored>> {
    // Plain select: pgmq.read would count as a reading and hide the message for a while.
    let text = format!(
        "select msg_id, message::text, (headers ->> 'eventId')::bigint,
                (extract(epoch from enqueued_at) * 1000000)::bigint
         from {table} order by msg_id desc limit $1",
        table = table(&format!("{queue}_dlq"))
    );
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(limit)
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| Stored {
            msg_id: row.get(0),
            body: row.get(1),
            event_id: row.get(2),
            failed_at: timestamp(row.get(3)),
        })
        .collect())
}

/// Puts dead letters back into their queue with their identity and the history of their errors,
/// all attempts before them. Returns how many there were.
pub(crate) async fn redrive(
    connection: &mut PgConnection,
    queue: &str,
    msg_ids: &[i64],
) -> sqlx::Result<u64> {
    let text = format!(
        "with d as (
             delete from {letters} where msg_id = any ($1) returning msg_id, message, headers
         )
         insert into {queue} (vt, message, headers)
         select core.now(), message -> 'originalEvent',
                case when headers ? 'handler'
                     then (headers - 'abandoned') || '{{\"attempts\": 0}}' end
         from d order by msg_id",
        letters = table(&format!("{queue}_dlq")),
        queue = table(queue),
    );
    let done = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(msg_ids)
        .execute(connection)
        .await?;
    Ok(done.rows_affected())
}
