//! Scheduled tasks and their ticks.

use std::{collections::HashSet, time::Duration};

use sqlx::{PgConnection, Row, types::Uuid};

use super::{JsonText, timestamp};
use crate::schedule::{Misfire, misfire::LeftOut};

/// A task as a build declares it, or a client makes it.
#[derive(Debug, Clone)]
pub(crate) struct TaskRow {
    pub(crate) name: String,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) event_type: String,
    pub(crate) event_version: u32,
    /// JSON.
    pub(crate) payload: String,
    pub(crate) key: Option<String>,
    pub(crate) misfire: Misfire,
    pub(crate) grace: Duration,
    pub(crate) next_run_at: jiff::Timestamp,
}

/// A task of this name that another live app declares.
pub(crate) async fn other_app(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    names: &[String],
) -> sqlx::Result<Option<(String, String)>> {
    sqlx::query_as(
        "select t.name, t.app from core.scheduled_tasks t
         where t.namespace = $1 and t.app <> $2 and t.name = any ($3) and t.removed_at is null
           and exists (select from core.nodes n
                       where n.namespace = t.namespace and n.app = t.app and core.is_live(n.last_heartbeat))
         limit 1",
    )
    .bind(namespace)
    .bind(app)
    .bind(names)
    .fetch_optional(connection)
    .await
}

/// Makes the app's tasks what its build declares: adds, changes, and deactivates what is gone.
/// Returns the names of those that were made at run time and belong to the app from now on.
pub(crate) async fn declare(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    tasks: &[TaskRow],
) -> sqlx::Result<Vec<String>> {
    let names: Vec<&str> = tasks.iter().map(|task| task.name.as_str()).collect();
    sqlx::query(
        "update core.scheduled_tasks
         set active = false, removed_at = core.now(), updated_at = core.now()
         where namespace = $1 and app = $2 and removed_at is null and name <> all ($3)",
    )
    .bind(namespace)
    .bind(app)
    .bind(&names)
    .execute(&mut *connection)
    .await?;
    let taken_over = sqlx::query_scalar(
        "select name from core.scheduled_tasks
         where namespace = $1 and app is null and name = any ($2) order by name",
    )
    .bind(namespace)
    .bind(&names)
    .fetch_all(&mut *connection)
    .await?;
    store(connection, namespace, Some(app), tasks).await?;
    Ok(taken_over)
}

/// What Postgres can still subtract from a time.
const LONGEST_GRACE: Duration = Duration::from_hours(24 * 3_650);

/// Adds and changes tasks of an app, or of nobody; those of nobody do not take over what an app
/// declares.
///
/// A task whose schedule did not change keeps its next run, which may have been missed. One that was
/// inactive because its app had removed it or because it could not be computed is active again; one
/// that somebody made inactive or paused stays so.
pub(crate) async fn store(
    connection: &mut PgConnection,
    namespace: &str,
    app: Option<&str>,
    tasks: &[TaskRow],
) -> sqlx::Result<()> {
    sqlx::query(
        "insert into core.scheduled_tasks as t
             (namespace, app, name, cron_expression, timezone, event_type, event_version, payload,
              event_key, misfire_policy, misfire_cap, grace_ms, next_run_at)
         select $1, $2, d.name, d.expression, d.timezone, d.event_type, d.event_version, d.payload,
                d.key, d.policy, d.cap, d.grace_ms,
                timestamptz 'epoch' + d.next_run_at * interval '1 microsecond'
         from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::int[], $8::jsonb[], $9::text[],
                     $10::text[], $11::int[], $12::bigint[], $13::bigint[])
             as d (name, expression, timezone, event_type, event_version, payload, key, policy, cap,
                   grace_ms, next_run_at)
         on conflict (namespace, name) do update
             set app = excluded.app, cron_expression = excluded.cron_expression,
                 timezone = excluded.timezone, event_type = excluded.event_type,
                 event_version = excluded.event_version, payload = excluded.payload,
                 event_key = excluded.event_key, misfire_policy = excluded.misfire_policy,
                 misfire_cap = excluded.misfire_cap, grace_ms = excluded.grace_ms,
                 active = t.active or t.removed_at is not null or t.last_error is not null,
                 removed_at = null, last_error = null, put_off_until = null, updated_at = core.now(),
                 next_run_at = case
                     when t.active and (t.cron_expression, t.timezone)
                         is not distinct from (excluded.cron_expression, excluded.timezone)
                     -- Later is only what was computed by a clock that was ahead.
                     then least(t.next_run_at, excluded.next_run_at) else excluded.next_run_at end
             where (excluded.app is not null or t.app is null or t.removed_at is not null)
               and (t.app, t.cron_expression, t.timezone, t.event_type, t.event_version, t.payload,
                    t.event_key, t.misfire_policy, t.misfire_cap, t.grace_ms,
                    t.removed_at is not null or t.last_error is not null
                        or t.next_run_at > excluded.next_run_at)
                 is distinct from
                   (excluded.app, excluded.cron_expression, excluded.timezone, excluded.event_type,
                    excluded.event_version, excluded.payload, excluded.event_key,
                    excluded.misfire_policy, excluded.misfire_cap, excluded.grace_ms, false)",
    )
    .bind(namespace)
    .bind(app)
    .bind(column(tasks, |task| task.name.as_str()))
    .bind(column(tasks, |task| task.expression.as_str()))
    .bind(column(tasks, |task| task.time_zone.as_deref()))
    .bind(column(tasks, |task| task.event_type.as_str()))
    .bind(column(tasks, |task| {
        i32::try_from(task.event_version).unwrap_or(i32::MAX)
    }))
    .bind(column(tasks, |task| JsonText(&task.payload)))
    .bind(column(tasks, |task| task.key.as_deref()))
    .bind(column(tasks, |task| policy(task.misfire).0))
    .bind(column(tasks, |task| policy(task.misfire).1))
    .bind(column(tasks, |task| {
        i64::try_from(task.grace.min(LONGEST_GRACE).as_millis()).unwrap_or(i64::MAX)
    }))
    .bind(column(tasks, |task| task.next_run_at.as_microsecond()))
    .execute(connection)
    .await
    .map(drop)
}

fn column<'a, T>(tasks: &'a [TaskRow], get: impl Fn(&'a TaskRow) -> T) -> Vec<T> {
    tasks.iter().map(get).collect()
}

/// A policy as two columns; the cap of one that has none is the table's default.
fn policy(misfire: Misfire) -> (&'static str, i32) {
    match misfire {
        Misfire::Skip => ("skip", 100),
        Misfire::FireOnce => ("fire_once", 100),
        Misfire::FireAll { cap } => ("fire_all", i32::try_from(cap).unwrap_or(i32::MAX)),
    }
}

fn misfire(policy: &str, cap: i32) -> Misfire {
    match policy {
        "skip" => Misfire::Skip,
        "fire_all" => Misfire::FireAll {
            cap: cap.unsigned_abs(),
        },
        _ => Misfire::FireOnce,
    }
}

/// A task that is due.
#[derive(Debug)]
pub(crate) struct Due {
    pub(crate) task_id: Uuid,
    pub(crate) name: String,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) misfire: Misfire,
    pub(crate) grace: Duration,
    /// `None` for a task that somebody has made or changed by hand: its time is not computed yet.
    pub(crate) at: Option<jiff::Timestamp>,
    /// No due time up to here counts.
    pub(crate) after: jiff::Timestamp,
    pub(crate) now: jiff::Timestamp,
    /// The size of the payload as text.
    pub(crate) payload_bytes: usize,
}

/// Due tasks, locked. The scheduler stands in the text, because each has an index of its own.
macro_rules! lock_due {
    ($scheduler:literal, $until:literal) => {
        concat!(
            "select task_id, name, cron_expression, timezone, misfire_policy, misfire_cap, grace_ms,
                    (extract(epoch from next_run_at) * 1000000)::bigint,
                    (extract(epoch from due_after) * 1000000)::bigint,
                    (extract(epoch from core.now()) * 1000000)::bigint,
                    octet_length(payload::text)
             from core.scheduled_tasks
             where namespace = $1 and active and paused_at is null
               and (put_off_until is null or put_off_until <= core.now()) and scheduler = '",
            $scheduler,
            "' and coalesce(next_run_at, timestamptz 'epoch') <= ",
            $until,
            " order by coalesce(next_run_at, timestamptz 'epoch') limit $2 for update skip locked"
        )
    };
}

/// Locks due tasks until the transaction ends; those that another node has locked are skipped.
pub(crate) async fn lock_due(
    connection: &mut PgConnection,
    namespace: &str,
    limit: usize,
) -> sqlx::Result<Vec<Due>> {
    lock_tasks(
        connection,
        lock_due!("nexus", "core.now()"),
        namespace,
        limit,
    )
    .await
}

/// The same for tasks that `pg_cron` should have fired a minute ago or more.
pub(crate) async fn lock_overdue(
    connection: &mut PgConnection,
    namespace: &str,
    limit: usize,
) -> sqlx::Result<Vec<Due>> {
    let statement = lock_due!("pg_cron", "core.now() - interval '1 minute'");
    lock_tasks(connection, statement, namespace, limit).await
}

async fn lock_tasks(
    connection: &mut PgConnection,
    statement: &'static str,
    namespace: &str,
    limit: usize,
) -> sqlx::Result<Vec<Due>> {
    let rows = sqlx::query(statement)
        .bind(namespace)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| Due {
            task_id: row.get(0),
            name: row.get(1),
            expression: row.get(2),
            time_zone: row.get(3),
            misfire: misfire(row.get(4), row.get(5)),
            grace: Duration::from_millis(row.get::<i64, _>(6).unsigned_abs()),
            at: row.get::<Option<i64>, _>(7).map(timestamp),
            after: timestamp(row.get(8)),
            now: timestamp(row.get(9)),
            payload_bytes: row.get::<i32, _>(10).unsigned_abs() as usize,
        })
        .collect())
}

/// Emits the ticks, unless they were fired before: by each the id of its event, and the queues that
/// got messages.
pub(crate) async fn fire(
    connection: &mut PgConnection,
    namespace: &str,
    ticks: &[(Uuid, jiff::Timestamp)],
) -> sqlx::Result<(Vec<Option<i64>>, Vec<String>)> {
    let (task_ids, due_at): (Vec<Uuid>, Vec<i64>) = ticks
        .iter()
        .map(|(task_id, due_at)| (*task_id, due_at.as_microsecond()))
        .unzip();
    sqlx::query_as(
        "select f.event_ids, coalesce(f.queues, '{}')
         from (select array_agg(timestamptz 'epoch' + d.at * interval '1 microsecond' order by d.n) as due_at
               from unnest($3::bigint[]) with ordinality as d (at, n)) as d
         cross join lateral core.fire_ticks($1, $2, d.due_at, false) as f",
    )
    .bind(namespace)
    .bind(task_ids)
    .bind(due_at)
    .fetch_one(connection)
    .await
}

/// Sets when tasks are due next, and that those of `fired` have run.
pub(crate) async fn set_next_runs(
    connection: &mut PgConnection,
    next: &[(Uuid, jiff::Timestamp)],
    fired: &HashSet<Uuid>,
) -> sqlx::Result<()> {
    let task_ids: Vec<Uuid> = next.iter().map(|next| next.0).collect();
    let next_run_at: Vec<i64> = next.iter().map(|next| next.1.as_microsecond()).collect();
    let is_fired: Vec<bool> = next.iter().map(|next| fired.contains(&next.0)).collect();
    sqlx::query(
        "update core.scheduled_tasks t
         set next_run_at = timestamptz 'epoch' + n.next_run_at * interval '1 microsecond',
             last_run_at = case when n.is_fired then core.now() else t.last_run_at end,
             put_off_until = case when n.is_fired then null else t.put_off_until end,
             last_error = case when n.is_fired then null else t.last_error end,
             updated_at = case when n.is_fired then core.now() else t.updated_at end
         from unnest($1::uuid[], $2::bigint[], $3::boolean[]) as n (task_id, next_run_at, is_fired)
         where t.task_id = n.task_id",
    )
    .bind(task_ids)
    .bind(next_run_at)
    .bind(is_fired)
    .execute(connection)
    .await
    .map(drop)
}

/// Records due times that nobody fires.
pub(crate) async fn leave_out(
    connection: &mut PgConnection,
    task_id: Uuid,
    left_out: LeftOut,
) -> sqlx::Result<()> {
    sqlx::query(
        "insert into core.ticks (task_id, due_at, left_out_from, left_out)
         values ($1, timestamptz 'epoch' + $2 * interval '1 microsecond',
                 timestamptz 'epoch' + $3 * interval '1 microsecond', $4)
         on conflict do nothing",
    )
    .bind(task_id)
    .bind(left_out.last.as_microsecond())
    .bind(left_out.first.as_microsecond())
    .bind(left_out.count.map(i64::from))
    .execute(connection)
    .await
    .map(drop)
}

/// Leaves a task alone for a minute whose event cannot be emitted.
pub(crate) async fn put_off(
    connection: &mut PgConnection,
    task_id: Uuid,
    error: &str,
) -> sqlx::Result<()> {
    sqlx::query(
        "update core.scheduled_tasks
         set put_off_until = core.now() + interval '1 minute', last_error = $2, updated_at = core.now()
         where task_id = $1",
    )
    .bind(task_id)
    .bind(error)
    .execute(connection)
    .await
    .map(drop)
}

/// Has the next runs computed again of tasks that ran by a clock which has been set back since: theirs
/// are as far in the future as the clock was ahead. Returns their names.
pub(crate) async fn reschedule_the_future(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar(
        "update core.scheduled_tasks
         set next_run_at = null, due_after = core.now(), last_run_at = core.now(), updated_at = core.now()
         where namespace = $1 and active and last_run_at > core.now() + interval '1 minute'
         returning name",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await
}

/// Stops a task that cannot be computed, so that it is not found due again and again. It may have been
/// fired before, for the last time.
pub(crate) async fn deactivate(
    connection: &mut PgConnection,
    task_id: Uuid,
    error: &str,
    is_fired: bool,
) -> sqlx::Result<()> {
    sqlx::query(
        "update core.scheduled_tasks
         set active = false, last_error = $2, next_run_at = null, updated_at = core.now(),
             last_run_at = case when $3 then core.now() else last_run_at end
         where task_id = $1",
    )
    .bind(task_id)
    .bind(error)
    .bind(is_fired)
    .execute(connection)
    .await
    .map(drop)
}

/// Microseconds until the next task is due, by the clock of the database; `None` without tasks.
pub(crate) async fn until_next(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(
        "select (extract(epoch from min(coalesce(next_run_at, timestamptz 'epoch')) - core.now()) * 1000000)::bigint
         from core.scheduled_tasks
         where namespace = $1 and active and paused_at is null and scheduler = 'nexus'
           and (put_off_until is null or put_off_until <= core.now())",
    )
    .bind(namespace)
    .fetch_one(connection)
    .await
}

/// The time, by the clock of the database.
pub(crate) async fn now(connection: &mut PgConnection) -> sqlx::Result<jiff::Timestamp> {
    sqlx::query_scalar("select (extract(epoch from core.now()) * 1000000)::bigint")
        .fetch_one(connection)
        .await
        .map(timestamp)
}

/// A task as it is stored.
#[derive(Debug)]
pub(crate) struct StoredTask {
    pub(crate) task_id: Uuid,
    pub(crate) name: String,
    pub(crate) app: Option<String>,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) event_type: String,
    pub(crate) event_version: u32,
    pub(crate) misfire: Misfire,
    pub(crate) grace: Duration,
    pub(crate) scheduler: String,
    pub(crate) active: bool,
    pub(crate) removed_at: Option<jiff::Timestamp>,
    pub(crate) paused_at: Option<jiff::Timestamp>,
    pub(crate) next_run_at: Option<jiff::Timestamp>,
    pub(crate) last_run_at: Option<jiff::Timestamp>,
    pub(crate) last_error: Option<String>,
}

/// The tasks of the namespace in the order of their names, or only the one of this name.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
    name: Option<&str>,
) -> sqlx::Result<Vec<StoredTask>> {
    let rows = sqlx::query(
        "select task_id, name, app, cron_expression, timezone, event_type, event_version,
                misfire_policy, misfire_cap, grace_ms, scheduler, active,
                (extract(epoch from removed_at) * 1000000)::bigint,
                (extract(epoch from paused_at) * 1000000)::bigint,
                (extract(epoch from next_run_at) * 1000000)::bigint,
                (extract(epoch from last_run_at) * 1000000)::bigint,
                last_error
         from core.scheduled_tasks
         where namespace = $1 and ($2::text is null or name = $2)
         order by name",
    )
    .bind(namespace)
    .bind(name)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| StoredTask {
            task_id: row.get(0),
            name: row.get(1),
            app: row.get(2),
            expression: row.get(3),
            time_zone: row.get(4),
            event_type: row.get(5),
            event_version: row.get::<i32, _>(6).unsigned_abs(),
            misfire: misfire(row.get(7), row.get(8)),
            grace: Duration::from_millis(row.get::<i64, _>(9).unsigned_abs()),
            scheduler: row.get(10),
            active: row.get(11),
            removed_at: row.get::<Option<i64>, _>(12).map(timestamp),
            paused_at: row.get::<Option<i64>, _>(13).map(timestamp),
            next_run_at: row.get::<Option<i64>, _>(14).map(timestamp),
            last_run_at: row.get::<Option<i64>, _>(15).map(timestamp),
            last_error: row.get(16),
        })
        .collect())
}

/// Pauses a task, unless it is paused; false if there is none of this name.
pub(crate) async fn pause(
    connection: &mut PgConnection,
    namespace: &str,
    name: &str,
) -> sqlx::Result<bool> {
    sqlx::query(
        "update core.scheduled_tasks set paused_at = coalesce(paused_at, core.now())
         where namespace = $1 and name = $2",
    )
    .bind(namespace)
    .bind(name)
    .execute(connection)
    .await
    .map(|done| done.rows_affected() > 0)
}

/// Locks a task until the transaction ends.
pub(crate) async fn lock(
    connection: &mut PgConnection,
    namespace: &str,
    name: &str,
) -> sqlx::Result<()> {
    sqlx::query("select from core.scheduled_tasks where namespace = $1 and name = $2 for update")
        .bind(namespace)
        .bind(name)
        .execute(connection)
        .await
        .map(drop)
}

/// Resumes a task that is paused; what came due meanwhile is not fired.
pub(crate) async fn resume(
    connection: &mut PgConnection,
    task_id: Uuid,
    next_run_at: jiff::Timestamp,
) -> sqlx::Result<()> {
    sqlx::query(
        "update core.scheduled_tasks
         set paused_at = null, next_run_at = timestamptz 'epoch' + $2 * interval '1 microsecond'
         where task_id = $1 and paused_at is not null",
    )
    .bind(task_id)
    .bind(next_run_at.as_microsecond())
    .execute(connection)
    .await
    .map(drop)
}

/// Emits a task's event now: its id, and the queues that it goes to. `None` if the task is gone.
pub(crate) async fn run_now(
    connection: &mut PgConnection,
    task_id: Uuid,
) -> sqlx::Result<Option<(i64, Vec<String>)>> {
    sqlx::query_as(
        "select core.run_task_now(t.task_id), array(
             select distinct s.queue_name from core.subscriptions s
             where s.namespace = t.namespace and s.event_type = t.event_type)
         from core.scheduled_tasks t
         where t.task_id = $1",
    )
    .bind(task_id)
    .fetch_optional(connection)
    .await
}

/// Removes a task with its history, unless an app declares it; false if there is none of this name.
pub(crate) async fn remove(
    connection: &mut PgConnection,
    namespace: &str,
    name: &str,
) -> sqlx::Result<bool> {
    sqlx::query_scalar("select core.remove_task($1, $2)")
        .bind(namespace)
        .bind(name)
        .fetch_one(connection)
        .await
}

/// What became of a due time, or of several that were left out.
#[derive(Debug)]
pub(crate) struct StoredTick {
    pub(crate) due_at: jiff::Timestamp,
    pub(crate) fired_at: jiff::Timestamp,
    pub(crate) event_id: Option<i64>,
    pub(crate) is_manual: bool,
    pub(crate) left_out_from: Option<jiff::Timestamp>,
    pub(crate) left_out: Option<i64>,
}

/// The newest ticks of a task.
pub(crate) async fn history(
    connection: &mut PgConnection,
    task_id: Uuid,
    limit: i64,
) -> sqlx::Result<Vec<StoredTick>> {
    let rows = sqlx::query(
        "select (extract(epoch from due_at) * 1000000)::bigint,
                (extract(epoch from fired_at) * 1000000)::bigint,
                event_id, is_manual,
                (extract(epoch from left_out_from) * 1000000)::bigint,
                left_out
         from core.ticks where task_id = $1 order by due_at desc limit $2",
    )
    .bind(task_id)
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| StoredTick {
            due_at: timestamp(row.get(0)),
            fired_at: timestamp(row.get(1)),
            event_id: row.get(2),
            is_manual: row.get(3),
            left_out_from: row.get::<Option<i64>, _>(4).map(timestamp),
            left_out: row.get(5),
        })
        .collect())
}

/// A scheduled task that had another name before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TaskRename {
    pub(crate) former: String,
    pub(crate) name: String,
    /// The ticks of a `#[cron]` function are named for it; `None` for a task that emits.
    pub(crate) event_type: Option<String>,
}

/// The renames that a build takes back by being older: it declares a name that a task of its app had before,
/// and not the one that the task has now.
pub(crate) async fn taken_back(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    names: &[&str],
) -> sqlx::Result<Vec<TaskRename>> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "select t.name, d.name
         from core.scheduled_tasks t
         join unnest($3::text[]) as d (name) on d.name = any (t.formerly)
         where t.namespace = $1 and t.app = $2 and t.name <> all ($3)
         order by 1, array_position(t.formerly, d.name) desc",
    )
    .bind(namespace)
    .bind(app)
    .bind(names)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|(former, name)| TaskRename {
            former,
            name,
            event_type: None,
        })
        .collect())
}

/// Gives tasks of the app their new names. They keep their ids, and so their ticks and history, and their
/// next runs. Where a task of the new name exists, both stay as they are; so do tasks that belong to no
/// app, and those of another live one.
pub(crate) async fn rename(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    renames: &[TaskRename],
) -> sqlx::Result<()> {
    // Of several former names of one task the first that exists is taken.
    sqlx::query(
        "update core.scheduled_tasks t
         set name = r.name, event_type = coalesce(r.event_type, t.event_type), app = $2, updated_at = core.now(),
             formerly = array_append(array_remove(array_remove(t.formerly, t.name), r.name), t.name)
         from (select distinct on (r.name) r.*
               from unnest($3::text[], $4::text[], $5::text[]) with ordinality as r (former, name, event_type, n)
               join core.scheduled_tasks f on f.namespace = $1 and f.name = r.former
               order by r.name, r.n) r
         where t.namespace = $1 and t.name = r.former and t.app is not null
           and not exists (select from core.scheduled_tasks o where o.namespace = $1 and o.name = r.name)
           and (t.app = $2 or not exists (
               select from core.nodes n
               where n.namespace = t.namespace and n.app = t.app and core.is_live(n.last_heartbeat)))",
    )
    .bind(namespace)
    .bind(app)
    .bind(renames.iter().map(|rename| rename.former.as_str()).collect::<Vec<_>>())
    .bind(renames.iter().map(|rename| rename.name.as_str()).collect::<Vec<_>>())
    .bind(renames.iter().map(|rename| rename.event_type.as_deref()).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map(drop)
}

#[cfg(all(test, feature = "testing"))]
mod renaming {
    use super::*;
    use crate::testing::TestDatabase;

    fn renamed(former: &str, name: &str) -> TaskRename {
        TaskRename {
            former: former.to_owned(),
            name: name.to_owned(),
            event_type: None,
        }
    }

    #[tokio::test]
    async fn a_task_keeps_all_but_its_name_and_takes_no_name_that_is_in_use() {
        let database = TestDatabase::new().await;
        let mut connection = database.pool().await.acquire().await.unwrap();
        sqlx::raw_sql(
            "select core.ensure_group('demo', 'default');
             insert into core.scheduled_tasks (namespace, name, cron_expression, event_type, app, next_run_at)
             select 'demo', name, '@daily', 'morning.came', app, '2026-01-01'
             from (values ('dawn', 'shop'), ('noon', 'shop'), ('midday', 'shop'), ('dusk', 'other'), ('night', null)) t (name, app);
             insert into core.nodes (node_id, namespace, app) values ('n', 'demo', 'other')",
        )
        .execute(&mut *connection)
        .await
        .unwrap();
        let renames = [
            // Of several names the first that exists.
            renamed("never", "morning"),
            renamed("dawn", "morning"),
            // Both exist already.
            renamed("noon", "midday"),
            // A live app's.
            renamed("dusk", "evening"),
            // Made by hand.
            renamed("night", "midnight"),
        ];
        rename(&mut connection, "demo", "shop", &renames)
            .await
            .unwrap();
        let found: Vec<(String, Option<String>, String, bool)> = sqlx::query_as(
            "select name, app, event_type, next_run_at = '2026-01-01' from core.scheduled_tasks order by 1",
        )
        .fetch_all(&mut *connection)
        .await
        .unwrap();
        let task = |name: &str, app: Option<&str>| {
            let app = app.map(str::to_owned);
            (name.to_owned(), app, "morning.came".to_owned(), true)
        };
        assert_eq!(
            found,
            [
                task("dusk", Some("other")),
                task("midday", Some("shop")),
                task("morning", Some("shop")),
                task("night", None),
                task("noon", Some("shop")),
            ]
        );
    }
}
