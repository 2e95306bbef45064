//! A scheduled task ticks once per due time in the whole cluster, in its own time zone.

use std::time::Duration;

use nexus::{jiff::Timestamp, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use tokio::sync::mpsc;

type Ticks = mpsc::UnboundedSender<(&'static str, Timestamp)>;

#[cron("0 3 * * *", tz = "America/New_York")]
async fn nightly(tick: Tick, ticks: State<Ticks>) {
    let _ = ticks.send(("nightly", tick.due_at()));
}

#[cron("* * * * * *")]
async fn every_second(tick: Tick, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into seconds (due_at) values ($1::timestamptz)")
        .bind(tick.due_at().to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Takes nothing at all.
#[cron("@hourly", name = "hourly_report", max_attempts = 1)]
async fn report() {}

fn app(database: &TestDatabase, handler: &str, ticks: &Ticks) -> App {
    App::discover()
        .only([handler])
        .database_url(database.url())
        .idle_poll(Duration::from_millis(25))
        .state(ticks.clone())
}

#[tokio::test]
async fn several_nodes_tick_once_in_the_zone_of_the_task() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut ticks) = mpsc::unbounded_channel();
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(
            nexus::start(app(&database, "nightly", &sender))
                .await
                .unwrap(),
        );
    }
    let mut due = Vec::new();
    for _ in 0..3 {
        // Just past the task's next run.
        let seconds: f64 = sqlx::query_scalar(
            "select extract(epoch from next_run_at - core.now())::float8 + 1 from core.scheduled_tasks",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        database.advance(Duration::from_secs_f64(seconds)).await;
        let (_, due_at) = within("the task ticks", ticks.recv()).await.unwrap();
        let local = due_at.in_tz("America/New_York").unwrap();
        assert_eq!((local.hour(), local.minute()), (3, 0));
        due.push(due_at);
    }
    due.dedup();
    assert_eq!(due.len(), 3);
    for node in nodes {
        within("all is settled", node.idle()).await.unwrap();
        node.shutdown().await;
    }
    assert!(ticks.try_recv().is_err(), "a tick was handled twice");
    let fired: (i64, i64) = sqlx::query_as(
        "select (select count(*) from core.ticks), (select count(*) from core.event_log where scheduled_task_id is not null)",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(fired, (3, 3));
}

#[tokio::test]
async fn every_second_of_a_busy_cluster_ticks_once() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    sqlx::query("create table seconds (due_at timestamptz primary key)")
        .execute(&pool)
        .await
        .unwrap();
    let (sender, _ticks) = mpsc::unbounded_channel();
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(
            nexus::start(app(&database, "every_second", &sender))
                .await
                .unwrap(),
        );
    }
    // Half a minute of missed ticks, within the grace: each is made up for.
    database.advance(Duration::from_secs(30)).await;
    until("thirty ticks have their effect", || async {
        let count: i64 = sqlx::query_scalar("select count(*) from seconds")
            .fetch_one(&pool)
            .await
            .unwrap();
        (count >= 30).then_some(())
    })
    .await;
    for node in nodes {
        node.shutdown().await;
    }
    // The primary key would have refused a second tick; no second is missing in between either.
    let gaps: i64 = sqlx::query_scalar(
        "select count(*) from (select due_at - lag(due_at) over (order by due_at) as gap from seconds) g
         where gap <> interval '1 second'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(gaps, 0);
}

#[tokio::test]
async fn a_long_outage_is_made_up_for_once() {
    let database = TestDatabase::new().await;
    let (sender, mut ticks) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, "nightly", &sender))
        .await
        .unwrap();
    node.shutdown().await;
    database.advance(Duration::from_hours(120)).await;
    let node = nexus::start(app(&database, "nightly", &sender))
        .await
        .unwrap();
    within("the task ticks", ticks.recv()).await.unwrap();
    within("all is settled", node.idle()).await.unwrap();
    node.shutdown().await;
    assert!(
        ticks.try_recv().is_err(),
        "a long outage was made up for more than once"
    );
}

#[tokio::test]
async fn a_restart_keeps_the_task_and_a_removed_one_is_deactivated() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, _ticks) = mpsc::unbounded_channel();
    for _ in 0..2 {
        nexus::start(app(&database, "hourly_report", &sender))
            .await
            .unwrap()
            .shutdown()
            .await;
    }
    let tasks = "select name, event_type, cron_expression, timezone, active from core.scheduled_tasks order by 1";
    let rows: Vec<(String, String, String, Option<String>, bool)> =
        sqlx::query_as(tasks).fetch_all(&pool).await.unwrap();
    let hourly = |active| {
        (
            "hourly_report".to_owned(),
            "tick.default.hourly_report".to_owned(),
            "@hourly".to_owned(),
            None,
            active,
        )
    };
    assert_eq!(rows, [hourly(true)]);
    nexus::start(app(&database, "nightly", &sender))
        .await
        .unwrap()
        .shutdown()
        .await;
    let rows: Vec<(String, String, String, Option<String>, bool)> =
        sqlx::query_as(tasks).fetch_all(&pool).await.unwrap();
    assert_eq!(rows[0], hourly(false));
    assert_eq!(rows[1].3.as_deref(), Some("America/New_York"));
}

/// The extension itself is tested in `pg_cron.rs`; here there is none, as after it was switched off.
#[tokio::test]
async fn what_pg_cron_leaves_for_a_minute_is_fired_by_a_node() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, _ticks) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, "hourly_report", &sender))
        .await
        .unwrap();
    let (due_at, until_due): (f64, f64) = sqlx::query_as(
        "update core.scheduled_tasks set scheduler = 'pg_cron', pg_cron_schedule = '0 * * * *'
         returning extract(epoch from next_run_at)::float8,
                   extract(epoch from next_run_at - core.now())::float8",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    let ticks = async || -> Vec<(f64, f64)> {
        sqlx::query_as(
            "select extract(epoch from due_at)::float8, extract(epoch from fired_at - due_at)::float8
             from core.ticks",
        )
        .fetch_all(&pool)
        .await
        .unwrap()
    };
    database
        .advance(Duration::from_secs_f64(until_due + 20.0))
        .await;
    assert_eq!(ticks().await, [], "a node did not wait for pg_cron");
    database.advance(Duration::from_secs(45)).await;
    let fired = until("a node fires the tick", || async {
        Some(ticks().await).filter(|ticks| !ticks.is_empty())
    })
    .await;
    assert_eq!(fired.len(), 1);
    assert!((fired[0].0 - due_at).abs() < 0.5, "{fired:?}, due {due_at}");
    assert!(fired[0].1 >= 60.0, "{fired:?}");
    let next: f64 = sqlx::query_scalar(
        "select extract(epoch from next_run_at)::float8 from core.scheduled_tasks",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!((next - due_at - 3600.0).abs() < 0.5, "{next}, due {due_at}");
    node.shutdown().await;
}

/// Tasks as `pg_cron` fires them, by SQL alone.
#[tokio::test]
async fn a_run_of_pg_cron_makes_up_for_years_and_stays_small() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    sqlx::raw_sql(
        "select core.ensure_group('demo', 'default');
         insert into core.scheduled_tasks
             (namespace, name, cron_expression, pg_cron_schedule, misfire_policy, misfire_cap, next_run_at,
              payload, event_type, app, scheduler)
         select 'demo', t.*, 'digest.due', 'shop', 'pg_cron'
         from (values
             ('skip', '* * * * *', '* * * * *', 'skip', 100, timestamptz '2006-01-01 00:00:00Z', '{}'::jsonb),
             ('once', '* * * * *', '* * * * *', 'fire_once', 100, '2006-01-01 00:00:00Z', '{}'),
             ('all', '* * * * *', '* * * * *', 'fire_all', 1000, '2006-01-01 00:00:00Z', '{}'),
             ('yearly', '0 0 1 1 *', '0 0 1 1 *', 'fire_all', 5, '1996-01-01 00:00:00Z', '{}'),
             ('large', '* * * * *', '* * * * *', 'fire_all', 20, '2006-01-01 00:00:00Z',
              to_jsonb(repeat('x', 1000000)))
             ) t",
    )
    .execute(&pool)
    .await
    .unwrap();
    let fire = async |name: &str| {
        // What it may take is far more than it takes, and far less than looking at every minute of twenty years.
        let mut connection = pool.acquire().await.unwrap();
        sqlx::raw_sql("set statement_timeout = '15s'")
            .execute(&mut *connection)
            .await
            .unwrap();
        sqlx::query("select core.fire_due(task_id) from core.scheduled_tasks where name = $1")
            .bind(name)
            .execute(&mut *connection)
            .await
            .unwrap();
    };
    // Fired ticks, whether they are the newest without a gap, what was left out, and whether all is done.
    let fired = async |name: &str| -> (i64, bool, Option<String>, Option<i64>, bool) {
        sqlx::query_as(
            "select count(k.event_id),
                    coalesce(bool_and(k.due_at > k.fired_at - interval '1 minute' * (c.fired + 1)), true),
                    to_char(min(k.left_out_from) at time zone 'UTC', 'YYYY'), sum(k.left_out)::bigint,
                    min(t.next_run_at) > core.now()
             from core.scheduled_tasks t
             left join core.ticks k using (task_id)
             cross join lateral (select count(event_id) as fired from core.ticks where task_id = t.task_id) c
             where t.name = $1 and (k.event_id is not null or k.left_out_from is not null)
             group by t.task_id",
        )
        .bind(name)
        .fetch_one(&pool)
        .await
        .unwrap()
    };
    for (name, cap) in [("skip", 0), ("once", 1), ("all", 1_000)] {
        fire(name).await;
        fire(name).await;
        let (count, are_newest, first, left_out, is_done) = fired(name).await;
        // And what was due within the minute of grace.
        assert!((cap..=cap + 3).contains(&count), "{name}: {count}");
        assert!(are_newest && is_done, "{name}");
        assert_eq!((first.as_deref(), left_out), (Some("2006"), None), "{name}");
    }
    fire("yearly").await;
    let (count, _, first, left_out, is_done) = fired("yearly").await;
    assert_eq!((count, first.as_deref(), is_done), (5, Some("1996"), true));
    assert!(left_out.unwrap() >= 25, "{left_out:?}");

    fire("large").await;
    let (count, .., is_done) = fired("large").await;
    assert_eq!((count, is_done), (8, false));
    fire("large").await;
    fire("large").await;
    let (count, are_newest, _, left_out, is_done) = fired("large").await;
    assert!(
        (20..=23).contains(&count) && are_newest && is_done,
        "{count}"
    );
    assert_eq!(left_out, None);
}

/// Handles what a task made by hand emits.
#[handler]
async fn digest(event: Envelope<DigestDue>, ticks: State<Ticks>) {
    assert_eq!(event.limit, 100);
    assert!(event.meta().scheduled_task_id().is_some());
    assert_eq!(event.meta().producer_node_id(), "scheduler");
    let _ = ticks.send((
        "digest",
        event.meta().due_at().expect("a tick has a due time"),
    ));
}

/// The event of a task that is made by hand, as the original system makes them.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "digest.due")]
struct DigestDue {
    limit: u32,
}

#[tokio::test]
async fn a_task_made_by_hand_waits_for_its_time() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut ticks) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, "digest", &sender))
        .await
        .unwrap();
    sqlx::query(
        "insert into core.scheduled_tasks (namespace, name, cron_expression, event_type, payload)
         values ('demo', 'digest', '0 * * * *', 'digest.due', '{\"limit\": 100}')",
    )
    .execute(&pool)
    .await
    .unwrap();
    until("its first time is computed", || async {
        sqlx::query_scalar::<_, bool>(
            "select next_run_at > core.now() from core.scheduled_tasks where next_run_at is not null",
        )
        .fetch_optional(&pool)
        .await
        .unwrap()
        .map(|is_ahead| assert!(is_ahead))
    })
    .await;
    let fired: i64 = sqlx::query_scalar("select count(*) from core.ticks")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(fired, 0);
    database.advance(Duration::from_hours(1)).await;
    let (_, due_at) = within("the task ticks", ticks.recv()).await.unwrap();
    assert_eq!(due_at.as_second() % 3600, 0);
    // Run by hand, and by pg_cron, it ticks as well.
    sqlx::query("select core.run_scheduled_task(task_id) from core.scheduled_tasks")
        .execute(&pool)
        .await
        .unwrap();
    within("the task ticks", ticks.recv()).await.unwrap();
    node.shutdown().await;
}
