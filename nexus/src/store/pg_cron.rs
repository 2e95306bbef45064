//! The extension `pg_cron`, and the scheduled tasks that it fires (`core.fire_due`).

use sqlx::{PgConnection, types::Uuid};

/// What a server has of `pg_cron`, as far as the role may see it.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) role: String,
    pub(crate) database: String,
    pub(crate) extension: Extension,
    /// It is in `shared_preload_libraries`.
    pub(crate) is_loaded: bool,
    /// The only database in which it works; `None` if the role may not see it.
    pub(crate) own_database: Option<String>,
    /// The role may make jobs.
    pub(crate) may_schedule: bool,
    /// `None` if the role may not see it.
    pub(crate) time_zone: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extension {
    /// The server has no files of it.
    Missing,
    Available,
    /// `create extension` was done, in this database.
    Created,
}

/// Looks at the server. Not inside a transaction: what the role may not see is an error of a statement.
pub(crate) async fn server(connection: &mut PgConnection) -> sqlx::Result<Server> {
    let (role, database, is_available, is_created, may_schedule): (_, _, bool, bool, _) =
        sqlx::query_as(
            "select current_user::text, current_database()::text,
                exists (select from pg_available_extensions where name = 'pg_cron'),
                exists (select from pg_extension where extname = 'pg_cron'),
                -- Names in a schema that the role may not use cannot be looked up.
                case when has_schema_privilege(to_regnamespace('cron')::oid, 'usage')
                    then coalesce(has_function_privilege(
                        to_regprocedure('cron.schedule(text,text,text)')::oid, 'execute'), false)
                    else false end",
        )
        .fetch_one(&mut *connection)
        .await?;
    let own_database = setting(connection, "cron.database_name").await?;
    let time_zone = setting(connection, "cron.timezone").await?;
    Ok(Server {
        role,
        database,
        extension: match (is_created, is_available) {
            (true, _) => Extension::Created,
            (false, true) => Extension::Available,
            (false, false) => Extension::Missing,
        },
        is_loaded: own_database != Setting::Unknown,
        own_database: match own_database {
            Setting::Is(database) => Some(database),
            Setting::Unknown | Setting::Hidden => None,
        },
        may_schedule,
        time_zone: match time_zone {
            Setting::Is(zone) => Some(zone),
            // Before pg_cron had the setting.
            Setting::Unknown => Some("GMT".to_owned()),
            Setting::Hidden => None,
        },
    })
}

#[derive(Debug, PartialEq)]
enum Setting {
    Is(String),
    Unknown,
    /// There is such a setting, but the role may not see it.
    Hidden,
}

async fn setting(connection: &mut PgConnection, name: &str) -> sqlx::Result<Setting> {
    let value: sqlx::Result<Option<String>> =
        sqlx::query_scalar("select nullif(current_setting($1, true), '')")
            .bind(name)
            .fetch_one(connection)
            .await;
    match value {
        Ok(Some(value)) => Ok(Setting::Is(value)),
        Ok(None) => Ok(Setting::Unknown),
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42501") => {
            Ok(Setting::Hidden)
        }
        Err(error) => Err(error),
    }
}

/// Gives an app's tasks to `pg_cron`, by name and schedule, and all others of the app to its nodes; makes
/// and removes jobs accordingly.
pub(crate) async fn assign(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    tasks: &[(&str, &str)],
) -> sqlx::Result<()> {
    let (names, schedules): (Vec<&str>, Vec<&str>) = tasks.iter().copied().unzip();
    sqlx::query(
        "update core.scheduled_tasks t
         set scheduler = a.scheduler, pg_cron_schedule = a.schedule, updated_at = core.now()
         from (select t.task_id, d.schedule,
                      case when d.schedule is null then 'nexus' else 'pg_cron' end as scheduler
               from core.scheduled_tasks t
               left join unnest($3::text[], $4::text[]) as d (name, schedule) on d.name = t.name
               where t.namespace = $1 and t.app = $2) as a
         where t.task_id = a.task_id
           and (t.scheduler, t.pg_cron_schedule) is distinct from (a.scheduler, a.schedule)",
    )
    .bind(namespace)
    .bind(app)
    .bind(names)
    .bind(schedules)
    .execute(&mut *connection)
    .await?;
    sync_jobs(connection, namespace, app).await.map(drop)
}

/// Makes `pg_cron`'s jobs what the app's tasks say; returns how many were changed. The transaction must hold
/// the lock on registrations.
pub(crate) async fn sync_jobs(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
) -> sqlx::Result<i32> {
    sqlx::query_scalar("select core.sync_cron_jobs($1, $2)")
        .bind(namespace)
        .bind(app)
        .fetch_one(connection)
        .await
}

/// What `pg_cron` said of the last run of a task's job, if that failed.
pub(crate) async fn last_failure(
    connection: &mut PgConnection,
    task_id: Uuid,
) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(
        "select case r.status when 'failed' then coalesce(r.return_message, 'failed') end
         from core.scheduled_tasks t
         join cron.job_run_details r on r.jobid = t.job_id
         where t.task_id = $1
         order by r.runid desc limit 1",
    )
    .bind(task_id)
    .fetch_optional(connection)
    .await
    .map(Option::flatten)
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use jiff::{SignedDuration, Timestamp, tz::TimeZone};
    use sqlx::{Connection, PgConnection, types::Uuid};

    use crate::{
        schedule::{
            Misfire, Schedule,
            misfire::{LeftOut, firing},
        },
        store::{scheduled_tasks, timestamp},
        testing::TestDatabase,
    };

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// A schedule, and how `pg_cron` reads it.
    fn both(expression: &str, zone: &str) -> (Schedule, String) {
        let schedule = Schedule::parse(expression, Some(zone)).unwrap();
        let written = schedule
            .for_pg_cron(&TimeZone::get(zone).unwrap(), at("2026-01-01T00:00:00Z"))
            .unwrap();
        (schedule, written)
    }

    /// Due times after a moment.
    fn due_after(schedule: &Schedule, after: Timestamp) -> impl Iterator<Item = Timestamp> {
        std::iter::successors(schedule.next_after(after).ok(), |&due| {
            schedule.next_after(due).ok()
        })
    }

    async fn due_times(
        connection: &mut PgConnection,
        (written, zone): (&str, &str),
        from: Timestamp,
        to: Timestamp,
    ) -> Vec<Timestamp> {
        let times: Vec<i64> = sqlx::query_scalar(
            "select (extract(epoch from d) * 1000000)::bigint
             from core.due_times($1, $2, timestamptz 'epoch' + $3 * interval '1 microsecond',
                                 timestamptz 'epoch' + $4 * interval '1 microsecond') as d",
        )
        .bind(written)
        .bind(zone)
        .bind(from.as_microsecond())
        .bind(to.as_microsecond())
        .fetch_all(connection)
        .await
        .unwrap();
        times.into_iter().map(timestamp).collect()
    }

    async fn next_due(
        connection: &mut PgConnection,
        (written, zone): (&str, &str),
        after: Timestamp,
    ) -> Timestamp {
        let micros = sqlx::query_scalar(
            "select (extract(epoch from core.next_due(
                 $1, $2, timestamptz 'epoch' + $3 * interval '1 microsecond')) * 1000000)::bigint",
        )
        .bind(written)
        .bind(zone)
        .bind(after.as_microsecond())
        .fetch_one(connection)
        .await
        .unwrap();
        timestamp(micros)
    }

    fn random_expression(random: &mut fastrand::Rng) -> String {
        let mut field = |min: u8, max: u8| {
            let a = random.u8(min..=max);
            let b = random.u8(a..=max);
            let step = random.u8(1..=9);
            match random.u8(..8) {
                0..=2 => "*".to_owned(),
                3 => format!("*/{step}"),
                4 => a.to_string(),
                5 => format!("{a}-{b}"),
                6 => format!("{b},{a}"),
                _ => format!("{a}-{b}/{step}"),
            }
        };
        [
            field(0, 59),
            field(0, 23),
            field(1, 28),
            field(1, 12),
            field(0, 7),
        ]
        .join(" ")
    }

    #[tokio::test]
    async fn sql_computes_the_due_times_of_a_schedule() {
        const EXPRESSIONS: [&str; 11] = [
            "* * * * *",
            "*/5 * * * *",
            "0 9 * * MON-FRI",
            "0 0 29 2 *",
            "0 0 13 * FRI",
            "30 2 */10 3,10 7",
            "@yearly",
            "@weekly",
            "0 0 31 * *",
            "0 0 1-31 * 1",
            "59 23 31 12 *",
        ];
        let database = TestDatabase::new().await;
        let mut connection = PgConnection::connect(database.url()).await.unwrap();
        let mut random = fastrand::Rng::with_seed(11);
        let mut expressions = EXPRESSIONS.map(str::to_owned).to_vec();
        expressions.extend((0..25).map(|_| random_expression(&mut random)));
        let mut compared = 0;
        for expression in &expressions {
            // From the one it is eight years to the next leap day but one.
            for (zone, start) in [
                ("UTC", at("2096-02-28T07:30:20Z")),
                ("Asia/Kolkata", at("2026-12-31T18:29:00Z")),
            ] {
                let (schedule, written) = both(expression, zone);
                let written = (written.as_str(), zone);
                // As many as come in two years.
                let end = start + SignedDuration::from_hours(24 * 731);
                let expected: Vec<Timestamp> = due_after(&schedule, start)
                    .take(100)
                    .take_while(|&due| due <= end)
                    .collect();
                let from = start + SignedDuration::from_micros(1);
                if let Some(&last) = expected.last() {
                    let listed = due_times(&mut connection, written, from, last).await;
                    assert_eq!(listed, expected, "{expression} in {zone}");
                }
                let mut after = start;
                for due in due_after(&schedule, start).take(3) {
                    let next = next_due(&mut connection, written, after).await;
                    assert_eq!(next, due, "{expression} in {zone} after {after}");
                    after = due;
                }
                compared += expected.len();
            }
        }
        assert!(compared > 2_000, "{compared}");
    }

    /// A task that `pg_cron` fires, due since a moment.
    async fn insert(
        connection: &mut PgConnection,
        expression: &str,
        written: &str,
        misfire: (&str, i32, SignedDuration),
        due_since: Timestamp,
    ) -> Uuid {
        let (policy, cap, grace) = misfire;
        sqlx::query(
            "insert into core.namespaces (namespace) values ('demo') on conflict do nothing",
        )
        .execute(&mut *connection)
        .await
        .unwrap();
        sqlx::query_scalar(
            "insert into core.scheduled_tasks
                 (namespace, name, cron_expression, event_type, scheduler, pg_cron_schedule,
                  misfire_policy, misfire_cap, grace_ms, next_run_at)
             values ('demo', 'task', $1, 'tick.task', 'pg_cron', $2, $3, $4, $5,
                     timestamptz 'epoch' + $6 * interval '1 microsecond')
             returning task_id",
        )
        .bind(expression)
        .bind(written)
        .bind(policy)
        .bind(cap)
        .bind(i64::try_from(grace.as_millis()).unwrap())
        .bind(due_since.as_microsecond())
        .fetch_one(connection)
        .await
        .unwrap()
    }

    async fn fire_due(connection: &mut PgConnection, task_id: Uuid) {
        sqlx::query("select core.fire_due($1)")
            .bind(task_id)
            .execute(connection)
            .await
            .unwrap();
    }

    /// What was fired, what was left out, and when the task is due next.
    async fn state(
        connection: &mut PgConnection,
        task_id: Uuid,
    ) -> (Vec<Timestamp>, Option<LeftOut>, Option<Timestamp>) {
        let ticks: Vec<(i64, Option<i64>, Option<i64>)> = sqlx::query_as(
            "select (extract(epoch from due_at) * 1000000)::bigint,
                    (extract(epoch from left_out_from) * 1000000)::bigint, left_out
             from core.ticks where task_id = $1 order by due_at",
        )
        .bind(task_id)
        .fetch_all(&mut *connection)
        .await
        .unwrap();
        let next: Option<i64> = sqlx::query_scalar(
            "select (extract(epoch from next_run_at) * 1000000)::bigint
             from core.scheduled_tasks where task_id = $1",
        )
        .bind(task_id)
        .fetch_one(connection)
        .await
        .unwrap();
        let fired = ticks.iter().filter(|tick| tick.1.is_none());
        let left_out = ticks.iter().find_map(|&(last, first, count)| {
            Some(LeftOut {
                first: timestamp(first?),
                last: timestamp(last),
                count: count.map(|count| count.try_into().unwrap()),
            })
        });
        (
            fired.map(|tick| timestamp(tick.0)).collect(),
            left_out,
            next.map(timestamp),
        )
    }

    /// Late by a moment, by minutes or by days: the same as a node would fire.
    #[tokio::test]
    async fn fires_late_what_a_node_would_fire() {
        const EXPRESSIONS: [&str; 6] = [
            "* * * * *",
            "*/5 * * * *",
            "7 * * * *",
            "30 2 * * *",
            "0 0 * * MON",
            "0 0 1 1 *",
        ];
        let database = TestDatabase::new().await;
        let mut connection = PgConnection::connect(database.url()).await.unwrap();
        let mut random = fastrand::Rng::with_seed(13);
        let mut seen = [false; 3];
        for round in 0..120 {
            let expression = EXPRESSIONS[round % EXPRESSIONS.len()];
            let (schedule, written) = both(expression, "UTC");
            let cap = random.i32(1..20);
            let (policy, misfire) = match random.u8(..3) {
                0 => ("skip", Misfire::Skip),
                1 => ("fire_once", Misfire::FireOnce),
                _ => (
                    "fire_all",
                    Misfire::FireAll {
                        cap: cap.unsigned_abs(),
                    },
                ),
            };
            let grace = SignedDuration::from_secs([0, 60, 600, 7200][random.usize(..4)]);
            let outage = SignedDuration::from_secs(
                [5, 90, 1000, 20_000, 400_000][random.usize(..5)] + random.i64(0..60),
            );
            // One transaction, so that time stands still.
            let mut tx = connection.begin().await.unwrap();
            let now = scheduled_tasks::now(&mut tx).await.unwrap();
            let due_since = schedule.previous(now - outage).unwrap();
            let misfire_row = (policy, cap, grace);
            let task_id = insert(&mut tx, expression, &written, misfire_row, due_since).await;
            fire_due(&mut tx, task_id).await;
            let minute = SignedDuration::from_mins(1);
            let expected = firing(
                &schedule,
                misfire,
                grace.max(minute),
                due_since,
                now,
                usize::MAX,
            );
            seen[0] |= expected.due.len() > 1;
            seen[1] |= expected.due.is_empty();
            seen[2] |= expected.left_out.is_some();
            let expected = (expected.due, expected.left_out, expected.next.ok());
            let context = format!("`{expression}`, {misfire_row:?}, since {due_since} at {now}");
            assert_eq!(state(&mut tx, task_id).await, expected, "{context}");
            // A second run, and one that comes early, find nothing.
            fire_due(&mut tx, task_id).await;
            assert_eq!(state(&mut tx, task_id).await, expected, "{context}");
            tx.rollback().await.unwrap();
        }
        assert_eq!(seen, [true; 3]);
    }

    #[tokio::test]
    async fn fires_nothing_of_a_task_that_is_not_for_pg_cron() {
        let database = TestDatabase::new().await;
        let mut connection = PgConnection::connect(database.url()).await.unwrap();
        let grace = SignedDuration::from_mins(1);
        let due_since = scheduled_tasks::now(&mut connection).await.unwrap();
        let once = ("fire_once", 100, grace);
        let (expression, written) = ("* * * * *", "* * * * *");
        let task_id = insert(&mut connection, expression, written, once, due_since).await;
        for change in [
            "active = false",
            "paused_at = now()",
            "scheduler = 'nexus'",
            // Whoever changes the schedule gives the task back to the nodes.
            "cron_expression = '*/2 * * * *'",
            "timezone = 'Asia/Kolkata'",
        ] {
            let mut tx = connection.begin().await.unwrap();
            let change = format!("update core.scheduled_tasks set {change}");
            sqlx::query(sqlx::AssertSqlSafe(change.clone()))
                .execute(&mut *tx)
                .await
                .unwrap();
            fire_due(&mut tx, task_id).await;
            assert_eq!(state(&mut tx, task_id).await.0, [], "{change}");
            tx.rollback().await.unwrap();
        }
        fire_due(&mut connection, Uuid::nil()).await;
        fire_due(&mut connection, task_id).await;
        assert_eq!(state(&mut connection, task_id).await.0, [due_since]);
    }

    /// The first time of a task that was resumed or changed is not computed yet.
    #[tokio::test]
    async fn computes_the_first_time_itself() {
        let database = TestDatabase::new().await;
        let mut connection = PgConnection::connect(database.url()).await.unwrap();
        let now = scheduled_tasks::now(&mut connection).await.unwrap();
        let once = ("fire_once", 100, SignedDuration::from_mins(1));
        let (schedule, written) = both("30 2 * * *", "UTC");
        let task_id = insert(&mut connection, "30 2 * * *", &written, once, now).await;
        sqlx::query(
            "update core.scheduled_tasks set next_run_at = null, due_after = core.now() - interval '1 day'",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        fire_due(&mut connection, task_id).await;
        let (fired, left_out, next) = state(&mut connection, task_id).await;
        let now = scheduled_tasks::now(&mut connection).await.unwrap();
        assert_eq!(fired, [schedule.previous(now).unwrap()]);
        assert_eq!((left_out, next), (None, schedule.next_after(now).ok()));
        sqlx::query("update core.scheduled_tasks set next_run_at = null, due_after = core.now()")
            .execute(&mut connection)
            .await
            .unwrap();
        fire_due(&mut connection, task_id).await;
        assert_eq!(
            state(&mut connection, task_id).await,
            (fired, left_out, next)
        );
    }

    #[tokio::test]
    async fn names_of_jobs_fit_and_keep_the_id() {
        let database = TestDatabase::new().await;
        let mut connection = PgConnection::connect(database.url()).await.unwrap();
        for (name, start) in [
            ("nightly", "demo_nightly_"),
            (
                "n_of_more_than_enough_letters",
                "demo_n_of_more_than_enough_",
            ),
            ("prüfungen_über_über_über", "demo_prüfungen_über_üb_"),
        ] {
            let job: String = sqlx::query_scalar(
                "select core.cron_job_name('demo', $1, '00000000-0000-0000-0000-00000000abcd')",
            )
            .bind(name)
            .fetch_one(&mut connection)
            .await
            .unwrap();
            assert!(job.len() <= 63, "{job}");
            assert_eq!(job, format!("{start}00000000_0000_0000_0000_00000000abcd"));
        }
    }
}
