//! How much waits in queues, and for how long. Nothing here counts a whole table.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::table;

/// Messages of a queue, of which at most one more than was asked for are looked at.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) messages: i64,
    /// Of these: those that have failed before.
    pub(crate) failed: i64,
}

/// Counts messages of a queue, up to `most` and one.
pub(crate) async fn of_queue(
    connection: &mut PgConnection,
    queue: &str,
    most: i64,
) -> sqlx::Result<Counted> {
    let text = format!(
        "select count(*), count(*) filter (where coalesce(q.headers ->> 'attempts', '0') <> '0')
         from (select headers from {table} limit $1 + 1) q",
        table = table(queue)
    );
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(most)
        .fetch_one(connection)
        .await?;
    Ok(Counted {
        messages: row.get(0),
        failed: row.get(1),
    })
}

/// What waits for a handler, under a former name of it as well.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// Up to the limit, and one.
    pub(crate) messages: i64,
    /// How long the oldest message has been there that may be claimed.
    pub(crate) lag: Option<Duration>,
}

/// Counts what waits for a handler, up to `most` and one.
pub(crate) async fn of_handler(
    connection: &mut PgConnection,
    subscription_id: i64,
    queue: &str,
    most: i64,
) -> sqlx::Result<Waiting> {
    // From one version to the next in the index that claims walk, and in each to the first message.
    let text = format!(
        "with recursive name as materialized (
             select s.handler as name from core.subscriptions s where s.subscription_id = $1
             union
             select r.former from core.subscriptions s
             join core.renames r using (namespace, group_name, handler)
             where s.subscription_id = $1
         ), v (name, version) as (
             select name, '' from name
             union all
             select v.name, (select m.headers ->> 'eventVersion' from {table} m
                             where m.headers ->> 'handler' = v.name and m.headers ->> 'eventVersion' > v.version
                             order by m.headers ->> 'eventVersion' limit 1)
             from v where v.version is not null
         )
         select (select count(*) from (
                     select from name n
                     cross join lateral (
                         -- In the order of the index, so that nothing else is cheaper.
                         select from {table} m where m.headers ->> 'handler' = n.name
                         order by m.headers ->> 'eventVersion', m.vt limit $2 + 1) m
                     limit $2 + 1) counted),
                (select (extract(epoch from core.now() - min(oldest.vt)) * 1000000)::bigint
                 from v
                 cross join lateral (
                     select m.vt from {table} m
                     where m.headers ->> 'handler' = v.name and m.headers ->> 'eventVersion' = v.version
                       and m.vt <= core.now()
                     order by m.vt limit 1) oldest)",
        table = table(queue)
    );
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(subscription_id)
        .bind(most)
        .fetch_one(connection)
        .await?;
    Ok(Waiting {
        messages: row.get(0),
        lag: row
            .get::<Option<i64>, _>(1)
            .map(|micros| Duration::from_micros(micros.max(0).unsigned_abs())),
    })
}
