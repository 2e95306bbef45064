//! `Scheduler::PgCron`: the server fires scheduled tasks by the extension `pg_cron`, on a cluster of its
//! own that `.ci/pg_cron` starts. Tests have a namespace each; the extension knows one database.

use std::time::Duration;

use nexus::{Scheduler, StartError, jiff::Timestamp, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use sqlx::{AssertSqlSafe, PgPool, postgres::PgPoolOptions};
use tokio::sync::mpsc;

type Ticks = mpsc::UnboundedSender<Timestamp>;

#[cron("* * * * *")]
async fn every_minute(tick: Tick, ticks: State<Ticks>) {
    let _ = ticks.send(tick.due_at());
}

#[cron("*/5 9-17 * * MON-FRI", name = "office_hours")]
async fn in_the_office() {}

#[cron("30 2 */10 * 7", tz = "Etc/UTC")]
async fn nightly() {}

#[cron("*/10 * * * * *")]
async fn too_often() {}

#[cron("0 0 L * *")]
async fn on_the_last_day() {}

#[cron("0 9 * * *", tz = "Europe/Berlin")]
async fn in_the_morning() {}

#[cron("0 9 * * *", tz = "Asia/Kolkata")]
async fn in_india() {}

fn url(of: &str) -> String {
    let variable = format!("NEXUS_PG_CRON{of}_URL");
    std::env::var(&variable).unwrap_or_else(|_| {
        panic!("{variable} is not set: these tests need a server with pg_cron, run `.ci/pg_cron`")
    })
}

async fn pool(of: &str) -> PgPool {
    PgPoolOptions::new()
        .max_connections(3)
        .connect(&url(of))
        .await
        .unwrap()
}

fn app(namespace: &str, handlers: &[&str], scheduler: Scheduler) -> App {
    let (ticks, _) = mpsc::unbounded_channel::<Timestamp>();
    App::discover()
        .only(handlers.iter().copied())
        .database_url(url(""))
        .namespace(namespace)
        .scheduler(scheduler)
        .idle_poll(Duration::from_millis(25))
        .state(ticks)
}

#[derive(Debug, Clone, PartialEq, sqlx::FromRow)]
struct Job {
    name: String,
    schedule: String,
    is_active: bool,
}

fn job(name: &str, schedule: &str) -> Job {
    Job {
        name: name.to_owned(),
        schedule: schedule.to_owned(),
        is_active: true,
    }
}

/// The jobs of a namespace's tasks, by the names of the tasks.
async fn jobs(pool: &PgPool, namespace: &str) -> Vec<Job> {
    sqlx::query_as(
        "select t.name, j.schedule, j.active as is_active
         from cron.job j
         join core.scheduled_tasks t on t.job_id = j.jobid
             and j.jobname = t.namespace || '_' || t.name || '_' || translate(t.task_id::text, '-', '_')
             and j.command = format('select core.fire_due(%L)', t.task_id)
         where t.namespace = $1 order by t.name",
    )
    .bind(namespace)
    .fetch_all(pool)
    .await
    .unwrap()
}

/// All jobs that are called like those of a namespace.
async fn count_jobs(pool: &PgPool, namespace: &str) -> i64 {
    sqlx::query_scalar("select count(*) from cron.job where starts_with(jobname::text, $1)")
        .bind(format!("{namespace}_"))
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn execute(pool: &PgPool, statement: &str) {
    sqlx::query(AssertSqlSafe(statement.to_owned()))
        .execute(pool)
        .await
        .unwrap();
}

/// The due times of the ticks so far.
async fn ticks(pool: &PgPool, namespace: &str) -> Vec<Timestamp> {
    let micros: Vec<i64> = sqlx::query_scalar(
        "select (extract(epoch from k.due_at) * 1000000)::bigint
         from core.ticks k join core.scheduled_tasks t using (task_id)
         where t.namespace = $1 order by k.due_at",
    )
    .bind(namespace)
    .fetch_all(pool)
    .await
    .unwrap();
    micros
        .into_iter()
        .map(|micros| Timestamp::from_microsecond(micros).unwrap())
        .collect()
}

async fn one_more_tick(pool: &PgPool, namespace: &str) {
    let so_far = ticks(pool, namespace).await.len();
    until("another tick is fired", || async {
        (ticks(pool, namespace).await.len() > so_far).then_some(())
    })
    .await;
}

/// Runs of the job that `pg_cron` counts as done.
async fn runs(pool: &PgPool, namespace: &str) -> i64 {
    sqlx::query_scalar(
        "select count(*) from cron.job_run_details r
         join core.scheduled_tasks t on r.command = format('select core.fire_due(%L)', t.task_id)
         where t.namespace = $1 and r.status = 'succeeded'",
    )
    .bind(namespace)
    .fetch_one(pool)
    .await
    .unwrap()
}

#[tokio::test]
async fn changing_over_and_back_loses_and_doubles_no_tick() {
    let namespace = "over";
    let pool = pool("").await;
    let (sender, mut handled) = mpsc::unbounded_channel::<Timestamp>();
    let node = |scheduler| app(namespace, &["every_minute"], scheduler).state(sender.clone());

    // Both kinds at once, as in the middle of a roll-out; the newer decides.
    let old = nexus::start(node(Scheduler::Nexus)).await.unwrap();
    let new = nexus::start(node(Scheduler::PgCron)).await.unwrap();
    assert_eq!(
        jobs(&pool, namespace).await,
        [job("every_minute", "* * * * *")]
    );
    one_more_tick(&pool, namespace).await;
    until("pg_cron counts a run", || async {
        (runs(&pool, namespace).await > 0).then_some(())
    })
    .await;

    // Nobody at all.
    old.shutdown().await;
    new.shutdown().await;
    one_more_tick(&pool, namespace).await;
    // A node would have waited for a minute.
    let latest: f64 = sqlx::query_scalar(
        "select max(extract(epoch from k.fired_at - k.due_at))::float8
         from core.ticks k join core.scheduled_tasks t using (task_id) where t.namespace = $1",
    )
    .bind(namespace)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(latest < 60.0, "pg_cron has not fired: {latest} s late");

    let back = nexus::start(node(Scheduler::Nexus)).await.unwrap();
    assert_eq!(count_jobs(&pool, namespace).await, 0);
    one_more_tick(&pool, namespace).await;

    within("all is settled", back.idle()).await.unwrap();
    back.shutdown().await;
    let fired = ticks(&pool, namespace).await;
    for pair in fired.windows(2) {
        assert_eq!(pair[1].duration_since(pair[0]).as_secs(), 60, "{fired:?}");
    }
    let mut received = Vec::new();
    while let Ok(due_at) = handled.try_recv() {
        received.push(due_at);
    }
    received.sort();
    assert_eq!(received, fired);
}

#[tokio::test]
async fn jobs_follow_the_tasks() {
    let namespace = "follow";
    let pool = pool("").await;
    let both = ["in_the_office", "nightly"].map(|handler| match handler {
        "in_the_office" => "office_hours",
        other => other,
    });
    let start = async |handlers: &[&str]| {
        nexus::start(app(namespace, handlers, Scheduler::PgCron))
            .await
            .unwrap()
    };
    let becomes = async |what: &str, expected: &[Job]| {
        until(what, || async {
            let named = usize::try_from(count_jobs(&pool, namespace).await).unwrap();
            (named == expected.len() && jobs(&pool, namespace).await == expected).then_some(())
        })
        .await;
    };
    let nightly = job("nightly", "30 2 1,11,21,31 * 0");
    let office_hours = job("office_hours", "*/5 9-17 * * 1-5");
    let all = [nightly.clone(), office_hours.clone()];

    let node = start(&both).await;
    becomes("the tasks have jobs", &all).await;
    let ids = "select array_agg(job_id order by job_id) from core.scheduled_tasks where namespace = 'follow'";
    let before: Vec<i64> = sqlx::query_scalar(ids).fetch_one(&pool).await.unwrap();

    // A restart makes nothing anew, a removed task has no job, and one that is back has.
    node.shutdown().await;
    let node = start(&both).await;
    becomes("the tasks have jobs", &all).await;
    let after: Vec<i64> = sqlx::query_scalar(ids).fetch_one(&pool).await.unwrap();
    assert_eq!(before, after);
    node.shutdown().await;
    let node = start(&["nightly"]).await;
    becomes("the removed task's job is gone", &all[..1]).await;
    node.shutdown().await;
    let node = start(&both).await;
    becomes("the task is back", &all).await;

    // What somebody changed in the extension is changed back.
    execute(
        &pool,
        "select cron.schedule(jobname::text, '1 1 * * *', command) from cron.job
         where starts_with(jobname::text, 'follow_nightly')",
    )
    .await;
    becomes("the schedule is right again", &all).await;
    execute(
        &pool,
        "select cron.unschedule(jobid) from cron.job where starts_with(jobname::text, 'follow_')",
    )
    .await;
    becomes("the jobs are back", &all).await;

    // Paused: the job stays, inactive; without the right to do that it goes.
    let pause = "update core.scheduled_tasks set paused_at = core.now()
                 where namespace = 'follow' and name = 'nightly'";
    let resume = "update core.scheduled_tasks set paused_at = null where namespace = 'follow'";
    execute(&pool, pause).await;
    let paused = Job {
        is_active: false,
        ..nightly
    };
    becomes("the job is paused", &[paused, office_hours.clone()]).await;
    execute(&pool, resume).await;
    becomes("the job is resumed", &all).await;
    let admin = self::pool("_ADMIN").await;
    execute(
        &admin,
        "revoke execute on function cron.alter_job from nexus_app",
    )
    .await;
    execute(&pool, pause).await;
    becomes("the paused job is gone", &[office_hours]).await;
    execute(&pool, resume).await;
    becomes("the job is back", &all).await;

    // A task that is deleted by hand leaves no job behind.
    execute(
        &pool,
        "delete from core.scheduled_tasks where namespace = 'follow'",
    )
    .await;
    becomes("the orphans are gone", &[]).await;
    node.shutdown().await;
}

/// What an older build, or somebody by hand, gives another schedule is fired by nodes again; the
/// job that is left fires nothing.
#[tokio::test]
async fn a_schedule_changed_by_others_is_fired_by_nodes() {
    let namespace = "changed";
    let pool = pool("").await;
    let node = nexus::start(app(namespace, &["nightly"], Scheduler::PgCron))
        .await
        .unwrap();
    execute(
        &pool,
        "update core.scheduled_tasks set cron_expression = '* * * * * *' where namespace = 'changed'",
    )
    .await;
    one_more_tick(&pool, namespace).await;
    until("the job is gone", || async {
        (count_jobs(&pool, namespace).await == 0).then_some(())
    })
    .await;
    node.shutdown().await;
    // The next deployment declares what it says.
    let node = nexus::start(app(namespace, &["nightly"], Scheduler::PgCron))
        .await
        .unwrap();
    assert_eq!(
        jobs(&pool, namespace).await,
        [job("nightly", "30 2 1,11,21,31 * 0")]
    );
    node.shutdown().await;
}

async fn refusal(app: App) -> String {
    match nexus::start(app).await {
        Err(StartError::PgCron(problems)) => problems.to_string(),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it started"),
    }
}

#[tokio::test]
async fn what_pg_cron_cannot_keep_is_refused_all_at_once() {
    let namespace = "refused";
    let handlers = [
        "every_minute",
        "too_often",
        "on_the_last_day",
        "in_the_morning",
        "in_india",
    ];
    let refusal = refusal(app(namespace, &handlers, Scheduler::PgCron)).await;
    let lines: Vec<&str> = refusal.lines().skip(1).collect();
    assert_eq!(lines.len(), 4, "{refusal}");
    for (task, reason) in [
        ("too_often", "it names seconds"),
        ("on_the_last_day", "does not know `L`, `W` and `#`"),
        (
            "in_the_morning",
            "time zone Europe/Berlin, whose clock is changed",
        ),
        (
            "in_india",
            "time zone Asia/Kolkata, and pg_cron goes by GMT",
        ),
    ] {
        let line = lines
            .iter()
            .find(|line| line.contains(&format!("`{task}`")))
            .unwrap_or_else(|| panic!("{task} is not refused: {refusal}"));
        for part in [reason, "tests/tests/pg_cron.rs:", "`Scheduler::Nexus`"] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
    let pool = pool("").await;
    assert_eq!(count_jobs(&pool, namespace).await, 0);
    let tasks: i64 =
        sqlx::query_scalar("select count(*) from core.scheduled_tasks where namespace = 'refused'")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_eq!(tasks, 0);
}

#[tokio::test]
async fn a_server_that_is_not_set_up_for_it_is_refused() {
    let nightly = |url: String| app("setup", &["nightly"], Scheduler::PgCron).database_url(url);
    let elsewhere = refusal(nightly(url("_ELSEWHERE"))).await;
    assert!(
        elsewhere.contains("pg_cron is not set up in database `nexus_elsewhere`: as a superuser, run `create extension pg_cron`"),
        "{elsewhere}"
    );
    // The embedded server does not load it, or does not even have it.
    let embedded = TestDatabase::new().await;
    let told = refusal(nightly(embedded.url().to_owned())).await;
    assert!(
        told.contains(
            "the server has not loaded pg_cron: set `shared_preload_libraries = 'pg_cron'`"
        ) || told.contains("the server has no pg_cron: install it"),
        "{told}"
    );

    nexus::start(app("setup", &["nightly"], Scheduler::Nexus))
        .await
        .unwrap()
        .shutdown()
        .await;
    execute(
        &pool("").await,
        "select core.grant_namespace('setup', 'nexus_stranger')",
    )
    .await;
    let stranger = refusal(nightly(url("_STRANGER"))).await;
    assert!(
        stranger.contains(
            "role `nexus_stranger` may not make jobs of pg_cron: as a superuser, run `grant usage on schema cron to \"nexus_stranger\"`"
        ),
        "{stranger}"
    );
}
