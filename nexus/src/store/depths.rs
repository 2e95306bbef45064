//! How much waits, and for how long. Nothing here counts a whole table.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::{queue::TO_CLAIM, table, timestamp};

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
    let row = sqlx::query(AssertSqlSafe(count_messages(queue)).into_sql_str())
        .bind(most)
        .fetch_one(connection)
        .await?;
    Ok(Counted {
        messages: row.get(0),
        failed: row.get(1),
    })
}

/// All messages of a queue, and those that have failed before, up to `$1` and one.
fn count_messages(queue: &str) -> String {
    // By the index, so that the empty pages of a queue that was long once are not walked through.
    format!(
        "select count(*), count(*) filter (where coalesce(q.headers ->> 'attempts', '0') <> '0')
         from (select headers from {table} order by msg_id limit $1 + 1) q",
        table = table(queue)
    )
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
        lag: row.get::<Option<i64>, _>(1).map(since),
    })
}

/// What waits in the queue of a group, and what was given up. No number is more than the limit and one.
#[derive(Debug)]
pub(crate) struct OfGroup {
    pub(crate) messages: i64,
    /// Of those that were counted: those that have failed before.
    pub(crate) failed: i64,
    /// Claimed, and the lease has not ended.
    pub(crate) leased: i64,
    /// How long the oldest message has been there that may be claimed, whoever it is for.
    pub(crate) lag: Option<Duration>,
    pub(crate) dead_letters: i64,
}

/// Handlers, each with a version of its event, that are told apart in a queue. What somebody writes there by hand
/// must not make the walk a long one.
const MOST_PAIRS: i64 = 500;

/// Prepares the transaction for [`of_group`]: by the indexes, and no statement for long.
pub(crate) async fn prepare(connection: &mut PgConnection) -> sqlx::Result<()> {
    let text = format!("{TO_CLAIM}; set local statement_timeout = '10s'");
    sqlx::raw_sql(AssertSqlSafe(text).into_sql_str())
        .execute(connection)
        .await
        .map(drop)
}

/// Counts what is in the queue of a group and among its dead letters, up to `most` and one.
pub(crate) async fn of_group(
    connection: &mut PgConnection,
    queue: &str,
    most: i64,
) -> sqlx::Result<OfGroup> {
    // From one handler and version to the next in the index that claims walk. What is leased comes back soon, so it is
    // among the first that are not due yet, of which all handlers together have `most` looked at.
    let text = format!(
        "with recursive pair (handler, version) as (
             (select m.headers ->> 'handler', m.headers ->> 'eventVersion' from {table} m
              where m.headers ->> 'handler' is not null and m.headers ->> 'eventVersion' is not null
              order by 1, 2 limit 1)
             union all
             select next.* from pair p
             cross join lateral (
                 select m.headers ->> 'handler', m.headers ->> 'eventVersion' from {table} m
                 where (m.headers ->> 'handler', m.headers ->> 'eventVersion') > (p.handler, p.version)
                 order by 1, 2 limit 1) next
         ), p as materialized (
             select handler, version from pair limit {MOST_PAIRS}
         )
         select waiting.messages, waiting.failed,
                (select count(*) from p
                 cross join lateral (
                     select m.read_ct, m.headers from {table} m
                     where m.headers ->> 'handler' = p.handler and m.headers ->> 'eventVersion' = p.version
                       and m.vt > core.now()
                     order by m.vt limit $1 / (select count(*) from p) + 1) soon
                 where soon.read_ct > 0 and not soon.headers ? 'settled'),
                (select (extract(epoch from core.now() - min(oldest.vt)) * 1000000)::bigint from p
                 cross join lateral (
                     select m.vt from {table} m
                     where m.headers ->> 'handler' = p.handler and m.headers ->> 'eventVersion' = p.version
                       and m.vt <= core.now()
                     order by m.vt limit 1) oldest),
                (select count(*) from (select from {letters} order by msg_id limit $1 + 1) letters)
         from ({messages}) waiting (messages, failed)",
        messages = count_messages(queue),
        table = table(queue),
        letters = table(&format!("{queue}_dlq")),
    );
    // Each queue is asked with a text of its own, which would push the statements of claims and verdicts out of what
    // the connection keeps.
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .persistent(false)
        .bind(most)
        .fetch_one(connection)
        .await?;
    Ok(OfGroup {
        messages: row.get(0),
        failed: row.get(1),
        leased: row.get(2),
        lag: row.get::<Option<i64>, _>(3).map(since),
        dead_letters: row.get(4),
    })
}

/// What the namespace is like as a whole. No number of rows is more than the limit and one.
#[derive(Debug)]
pub(crate) struct OfNamespace {
    pub(crate) at: Timestamp,
    pub(crate) live_nodes: i64,
    pub(crate) silent_nodes: i64,
    /// Due for more than a minute.
    pub(crate) overdue_tasks: i64,
    pub(crate) delayed_emits: i64,
    pub(crate) running_replays: i64,
    /// Partitions of the log for months to come.
    pub(crate) partitions_ahead: i64,
    /// Until the first moment that no partition is there for.
    pub(crate) headroom: Duration,
}

/// Counts what belongs to no group, up to `most` and one of each.
pub(crate) async fn of_namespace(
    connection: &mut PgConnection,
    namespace: &str,
    most: i64,
) -> sqlx::Result<OfNamespace> {
    let row = sqlx::query(
        "with month (begins) as (
             -- The names are those that core.ensure_partitions gives.
             select to_date(right(c.relname, 7), 'YYYY_MM')::timestamp
             from pg_inherits i join pg_class c on c.oid = i.inhrelid
             where i.inhparent = 'core.event_log'::regclass and not i.inhdetachpending
               and c.relname ~ '^event_log_[0-9]{4}_[0-9]{2}$'
         ), present (at, begins) as (
             select core.now() at time zone 'UTC', date_trunc('month', core.now() at time zone 'UTC')
         )
         select (extract(epoch from core.now()) * 1000000)::bigint,
                n.live, n.silent,
                (select count(*) from (
                     select from core.scheduled_tasks t
                     where t.namespace = $1 and t.active and t.paused_at is null
                       and coalesce(t.next_run_at, t.due_after) < core.now() - interval '1 minute'
                     limit $2 + 1) t),
                (select count(*) from (
                     select from core.delayed_emits d where d.namespace = $1
                     order by d.next_try_at, d.event_id limit $2 + 1) d),
                (select count(*) from (
                     select from core.replays r where r.namespace = $1 and r.state = 'running' limit $2 + 1) r),
                (select count(*) from month m, present where m.begins > present.begins),
                (select coalesce((extract(epoch from min(m.begins + interval '1 month') - min(present.at)) * 1000000)::bigint, 0)
                 from month m, present
                 where m.begins >= present.begins
                   and exists (select from month this where this.begins = present.begins)
                   and not exists (select from month next where next.begins = m.begins + interval '1 month'))
         from (
             select count(*) filter (where core.is_live(last_heartbeat)),
                    count(*) filter (where not core.is_live(last_heartbeat))
             from core.nodes where namespace = $1
         ) n (live, silent)",
    )
    .bind(namespace)
    .bind(most)
    .fetch_one(connection)
    .await?;
    Ok(OfNamespace {
        at: timestamp(row.get(0)),
        live_nodes: row.get(1),
        silent_nodes: row.get(2),
        overdue_tasks: row.get(3),
        delayed_emits: row.get(4),
        running_replays: row.get(5),
        partitions_ahead: row.get(6),
        headroom: since(row.get(7)),
    })
}

/// A time that has passed, in microseconds. The clock may have been set back.
fn since(micros: i64) -> Duration {
    Duration::from_micros(micros.max(0).unsigned_abs())
}
