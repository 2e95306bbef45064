//! Scheduled tasks and their ticks.

use sqlx::{PgConnection, Row, types::Uuid};

use super::timestamp;

/// A task as a build declares it.
#[derive(Debug, Clone)]
pub(crate) struct TaskRow {
    pub(crate) name: String,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) event_type: String,
    pub(crate) next_run_at_micros: i64,
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
         where t.namespace = $1 and t.app <> $2 and t.name = any ($3) and t.active
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

/// Makes the app's tasks what its build declares: adds, changes, and deactivates what is gone. A
/// task whose schedule did not change keeps its next run.
pub(crate) async fn declare(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    tasks: &[TaskRow],
) -> sqlx::Result<()> {
    let names: Vec<&str> = tasks.iter().map(|task| task.name.as_str()).collect();
    sqlx::query(
        "update core.scheduled_tasks set active = false, updated_at = core.now()
         where namespace = $1 and app = $2 and active and name <> all ($3)",
    )
    .bind(namespace)
    .bind(app)
    .bind(&names)
    .execute(&mut *connection)
    .await?;
    sqlx::query(
        "insert into core.scheduled_tasks as t
             (namespace, app, name, cron_expression, timezone, event_type, payload, next_run_at)
         select $1, $2, d.name, d.expression, d.timezone, d.event_type, 'null',
                timestamptz 'epoch' + d.next_run_at * interval '1 microsecond'
         from unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::bigint[])
             as d (name, expression, timezone, event_type, next_run_at)
         on conflict (namespace, name) do update
             set app = excluded.app, cron_expression = excluded.cron_expression,
                 timezone = excluded.timezone, event_type = excluded.event_type, active = true,
                 next_run_at = excluded.next_run_at, updated_at = core.now()
             where (t.app, t.cron_expression, t.timezone, t.event_type, t.active)
                 is distinct from (excluded.app, excluded.cron_expression, excluded.timezone, excluded.event_type, true)",
    )
    .bind(namespace)
    .bind(app)
    .bind(&names)
    .bind(tasks.iter().map(|task| task.expression.as_str()).collect::<Vec<_>>())
    .bind(tasks.iter().map(|task| task.time_zone.as_deref()).collect::<Vec<_>>())
    .bind(tasks.iter().map(|task| task.event_type.as_str()).collect::<Vec<_>>())
    .bind(tasks.iter().map(|task| task.next_run_at_micros).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map(drop)
}

/// A task that is due.
#[derive(Debug)]
pub(crate) struct Due {
    pub(crate) task_id: Uuid,
    pub(crate) name: String,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    /// `None` for a task that somebody has just made by hand: its first time is not computed yet.
    pub(crate) at: Option<jiff::Timestamp>,
    pub(crate) now: jiff::Timestamp,
}

/// Locks due tasks until the transaction ends; those that another node has locked are skipped.
pub(crate) async fn lock_due(
    connection: &mut PgConnection,
    namespace: &str,
    limit: i64,
) -> sqlx::Result<Vec<Due>> {
    let rows = sqlx::query(
        "select task_id, name, cron_expression, timezone,
                (extract(epoch from next_run_at) * 1000000)::bigint,
                (extract(epoch from core.now()) * 1000000)::bigint
         from core.scheduled_tasks
         where namespace = $1 and active and scheduler = 'nexus'
           and (next_run_at is null or next_run_at <= core.now())
         order by next_run_at limit $2 for update skip locked",
    )
    .bind(namespace)
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Due {
            task_id: row.get(0),
            name: row.get(1),
            expression: row.get(2),
            time_zone: row.get(3),
            at: row.get::<Option<i64>, _>(4).map(timestamp),
            now: timestamp(row.get(5)),
        })
        .collect())
}

/// Emits the tick, unless it was fired before, and sets when the task is due next.
pub(crate) async fn fire(
    connection: &mut PgConnection,
    task_id: Uuid,
    due_at: jiff::Timestamp,
    next_run_at: jiff::Timestamp,
) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(
        "select core.fire_tick($1, timestamptz 'epoch' + $2 * interval '1 microsecond',
                               timestamptz 'epoch' + $3 * interval '1 microsecond')",
    )
    .bind(task_id)
    .bind(due_at.as_microsecond())
    .bind(next_run_at.as_microsecond())
    .fetch_one(connection)
    .await
}

/// Sets when a task is due for the first time.
pub(crate) async fn set_next_run(
    connection: &mut PgConnection,
    task_id: Uuid,
    next_run_at: jiff::Timestamp,
) -> sqlx::Result<()> {
    sqlx::query(
        "update core.scheduled_tasks set next_run_at = timestamptz 'epoch' + $2 * interval '1 microsecond'
         where task_id = $1",
    )
    .bind(task_id)
    .bind(next_run_at.as_microsecond())
    .execute(connection)
    .await
    .map(drop)
}

/// Stops a task that cannot be computed, so that it is not found due again and again.
pub(crate) async fn deactivate(connection: &mut PgConnection, task_id: Uuid) -> sqlx::Result<()> {
    sqlx::query("update core.scheduled_tasks set active = false, updated_at = core.now() where task_id = $1")
        .bind(task_id)
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
        "select (extract(epoch from min(next_run_at) - core.now()) * 1000000)::bigint
         from core.scheduled_tasks where namespace = $1 and active and scheduler = 'nexus'",
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

/// A scheduled task that had another name before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TaskRename {
    pub(crate) former: String,
    pub(crate) name: String,
    /// The ticks of a `#[cron]` function are named for it; `None` for a task that emits.
    pub(crate) event_type: Option<String>,
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
         set name = r.name, event_type = coalesce(r.event_type, t.event_type), app = $2, updated_at = core.now()
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
