//! Scheduled tasks through deployments, outages and an operator's hands, and those made at run time.

use std::{cell::Cell, time::Duration};

use nexus::{
    __private::{CronDescriptor, Origin, TASKS, TaskDescriptor, TaskPayload, linkme},
    Misfire,
    client::{ScheduleError, ScheduledTask, TaskRun},
    jiff::{SignedDuration, Timestamp},
    prelude::*,
    testing::TestDatabase,
};
use nexus_tests::{until, within};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::mpsc;

/// The books of a shop are to be closed.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "books.due", version = 3, key = shop)]
struct BooksDue {
    shop: String,
    build: u32,
}

#[handler]
async fn close_books(due: Envelope<BooksDue>, saw: State<Saw>) {
    let _ = saw.send((due.shop.clone(), due.build, due.meta().due_at()));
}

type Saw = mpsc::UnboundedSender<(String, u32, Option<Timestamp>)>;

#[cron("0 * * * *")]
async fn every_hour() {}

#[cron("*/10 * * * *", name = "every_ten_minutes")]
async fn every_ten_minutes() {}

thread_local! {
    /// What a task that emits was compiled with; each test has a thread of its own.
    static BUILD: Cell<u32> = const { Cell::new(1) };
}

static CLOSE_OF_DAY: TaskDescriptor = TaskDescriptor {
    name: "close_of_day",
    formerly: &[],
    origin: Origin::new(concat!(module_path!(), "::CLOSE_OF_DAY"), file!(), line!()),
    schedule: CronDescriptor {
        expression: "0 22 * * *",
        time_zone: Some("Europe/Berlin"),
        misfire: Some(Misfire::FireAll { cap: 2 }),
        grace: Some(Duration::from_secs(5)),
    },
    event: <BooksDue as Event>::DESCRIPTOR,
    payload: |limit| {
        let due = BooksDue {
            shop: "all".to_owned(),
            build: BUILD.get(),
        };
        TaskPayload::of(&due, limit)
    },
};

#[linkme::distributed_slice(TASKS)]
#[linkme(crate = linkme)]
static REGISTRATION: &'static TaskDescriptor = &CLOSE_OF_DAY;

fn app(database: &TestDatabase, handlers: &[&str], saw: &Saw) -> App {
    App::discover()
        .only(handlers.iter().copied())
        .name("shop")
        .database_url(database.url())
        .idle_poll(Duration::from_millis(25))
        .state(saw.clone())
}

fn no_saw() -> Saw {
    mpsc::unbounded_channel().0
}

fn books(shop: &str) -> BooksDue {
    BooksDue {
        shop: shop.to_owned(),
        build: 0,
    }
}

async fn task(client: &Client, name: &str) -> ScheduledTask {
    let tasks = client.schedules().await.unwrap();
    tasks.into_iter().find(|task| task.name == name).unwrap()
}

async fn next_run(client: &Client, name: &str) -> Timestamp {
    until("its next run is computed", || async {
        task(client, name).await.next_run_at
    })
    .await
}

async fn now(pool: &PgPool) -> Timestamp {
    let micros: i64 =
        sqlx::query_scalar("select (extract(epoch from core.now()) * 1000000)::bigint")
            .fetch_one(pool)
            .await
            .unwrap();
    Timestamp::from_microsecond(micros).unwrap()
}

/// Moves the clock to `time`.
async fn advance_to(database: &TestDatabase, pool: &PgPool, time: Timestamp) {
    let by = time.duration_since(now(pool).await);
    database.advance(by.try_into().unwrap()).await;
}

/// Waits until all that was due is dealt with.
async fn caught_up(client: &Client, name: &str) {
    until("what was due is dealt with", || async {
        let next = task(client, name).await.next_run_at?;
        (next > now(client.pool()).await).then_some(())
    })
    .await;
}

/// The due times that were fired, oldest first.
async fn fired(client: &Client, name: &str) -> Vec<Timestamp> {
    let mut runs = client.schedule_history(name, 5_000).await.unwrap();
    runs.reverse();
    runs.into_iter()
        .filter(|run| run.event_id.is_some())
        .map(|run| run.due_at)
        .collect()
}

fn minutes(count: i64) -> SignedDuration {
    SignedDuration::from_mins(count)
}

fn seconds(count: i64) -> SignedDuration {
    SignedDuration::from_secs(count)
}

async fn client(database: &TestDatabase) -> Client {
    let database = nexus::Database::from_url(database.url(), "the test").unwrap();
    Client::connect(&database, "demo").await.unwrap()
}

#[tokio::test]
async fn a_tick_is_what_the_client_would_have_emitted() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["close_books"], &sender))
        .await
        .unwrap();
    let client = node.client();
    let task_id = client
        .schedule("tills", "0 * * * *", &books("north"))
        .await
        .unwrap();
    client.emit(&books("north")).await.unwrap();
    within("the emitted one is handled", saw.recv()).await;
    let due_at = next_run(client, "tills").await;
    advance_to(&database, client.pool(), due_at).await;
    let handled = within("the tick is handled", saw.recv()).await.unwrap();
    assert_eq!(handled, ("north".to_owned(), 0, Some(due_at)));
    within("all is settled", node.idle()).await.unwrap();

    let logged: Vec<(i64, Value)> = sqlx::query_as(
        "select event_id, to_jsonb(l) - array['event_id', 'emitted_at', 'tx_id'] from core.event_log l order by 1",
    )
    .fetch_all(client.pool())
    .await
    .unwrap();
    let [(emitted_id, emitted), (ticked_id, ticked)] = &logged[..] else {
        panic!("{logged:?}");
    };
    let mut expected = emitted.clone();
    assert_eq!(emitted["correlation_id"], emitted_id.to_string());
    expected["correlation_id"] = ticked_id.to_string().into();
    expected["producer_node_id"] = "scheduler".into();
    expected["scheduled_task_id"] = task_id.to_string().into();
    expected["metadata"] = ticked["metadata"].clone();
    assert_eq!(ticked, &expected);
    assert_eq!(
        ticked["metadata"]["dueAt"],
        due_at.strftime("%Y-%m-%dT%H:%M:%S.000Z").to_string()
    );
    node.shutdown().await;
}

#[tokio::test]
async fn a_task_that_emits_is_declared_with_all_that_it_says() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["close_books", "close_of_day"], &sender))
        .await
        .unwrap();
    let client = node.client();
    let declared = task(client, "close_of_day").await;
    assert_eq!(declared.app.as_deref(), Some("shop"));
    assert_eq!(declared.expression, "0 22 * * *");
    assert_eq!(declared.time_zone.as_deref(), Some("Europe/Berlin"));
    assert_eq!(declared.event_type, "books.due");
    assert_eq!(declared.event_version, 3);
    assert_eq!(declared.misfire, Misfire::FireAll { cap: 2 });
    assert_eq!(declared.grace, Duration::from_secs(5));
    assert_eq!(declared.scheduler, "nexus");
    assert!(declared.is_active && declared.last_run_at.is_none());
    let due_at = declared.next_run_at.unwrap();
    assert_eq!(due_at.in_tz("Europe/Berlin").unwrap().hour(), 22);
    advance_to(&database, client.pool(), due_at).await;
    let handled = within("the tick is handled", saw.recv()).await.unwrap();
    assert_eq!(handled, ("all".to_owned(), 1, Some(due_at)));
    let key: Option<String> = sqlx::query_scalar("select key from core.event_log")
        .fetch_one(client.pool())
        .await
        .unwrap();
    assert_eq!(key.as_deref(), Some("all"));
    node.shutdown().await;
}

/// Stops everything from a due time of `*/10 * * * *` until 65 minutes later, and returns what became
/// of the seven due times, with the first of them.
async fn after_an_outage(misfire: Misfire) -> (Timestamp, Vec<Timestamp>, Vec<TaskRun>) {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    client
        .schedule("tills", "*/10 * * * *", &books("north"))
        .misfire(misfire)
        .await
        .unwrap();
    let first = next_run(&client, "tills").await;
    advance_to(&database, client.pool(), first + minutes(65)).await;
    let node = nexus::start(app(&database, &["close_books"], &no_saw()))
        .await
        .unwrap();
    caught_up(&client, "tills").await;
    node.shutdown().await;
    assert_eq!(next_run(&client, "tills").await, first + minutes(70));
    let runs = client.schedule_history("tills", 100).await.unwrap();
    (first, fired(&client, "tills").await, runs)
}

#[tokio::test]
async fn skip_leaves_missed_ticks_out() {
    let (first, fired, runs) = after_an_outage(Misfire::Skip).await;
    assert_eq!(fired, []);
    let left_out = runs[0].left_out.unwrap();
    assert_eq!(
        (left_out.first, left_out.last),
        (first, first + minutes(60))
    );
    assert_eq!((left_out.count, runs.len()), (Some(7), 1));
}

#[tokio::test]
async fn fire_once_fires_the_newest_missed_tick() {
    let (first, fired, runs) = after_an_outage(Misfire::FireOnce).await;
    assert_eq!(fired, [first + minutes(60)]);
    let left_out = runs[1].left_out.unwrap();
    assert_eq!(
        (left_out.first, left_out.last),
        (first, first + minutes(50))
    );
    assert_eq!((left_out.count, runs.len()), (Some(6), 2));
}

#[tokio::test]
async fn fire_all_fires_missed_ticks_up_to_its_cap() {
    let (first, fired, runs) = after_an_outage(Misfire::FireAll { cap: 3 }).await;
    assert_eq!(fired, [40, 50, 60].map(|late| first + minutes(late)));
    let left_out = runs[3].left_out.unwrap();
    assert_eq!(
        (left_out.first, left_out.last),
        (first, first + minutes(30))
    );
    assert_eq!((left_out.count, runs.len()), (Some(4), 4));
}

#[tokio::test]
async fn large_events_are_fired_by_transactions_of_bounded_size() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let large = |name: &str| books(&format!("{name}{}", "x".repeat(1_000_000)));
    for task in 0..20 {
        client
            .schedule(format!("till-{task}"), "*/10 * * * *", &large("north"))
            .await
            .unwrap();
    }
    client
        .schedule("missed", "* * * * *", &large("south"))
        .misfire(Misfire::FireAll { cap: 20 })
        .await
        .unwrap();
    let first = next_run(&client, "till-0").await;
    advance_to(&database, client.pool(), first + minutes(65)).await;
    let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
        .await
        .unwrap();
    caught_up(&client, "missed").await;
    for task in 0..20 {
        caught_up(&client, &format!("till-{task}")).await;
    }
    node.shutdown().await;
    let (events, most): (i64, i64) = sqlx::query_as(
        "select sum(events)::bigint, max(events) from (
             select count(*) as events from core.event_log where event_type = 'books.due' group by tx_id) t",
    )
    .fetch_one(client.pool())
    .await
    .unwrap();
    assert!(events >= 40, "{events}");
    assert!(most <= 8, "{most}");
}

#[tokio::test]
async fn many_missed_ticks_are_fired_in_order_by_several_transactions() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    client
        .schedule("tills", "* * * * * *", &books("north"))
        .misfire(Misfire::FireAll { cap: 1_000 })
        .grace(Duration::from_hours(1))
        .await
        .unwrap();
    let first = next_run(&client, "tills").await;
    advance_to(&database, client.pool(), first + minutes(100)).await;
    let node = nexus::start(app(&database, &["close_books"], &no_saw()))
        .await
        .unwrap();
    caught_up(&client, "tills").await;
    node.shutdown().await;
    let fired = fired(&client, "tills").await;
    // A thousand before the hour of grace, and each second of it.
    assert!(fired.len() >= 4_600, "{}", fired.len());
    assert!(fired[0] >= first + minutes(100) - seconds(4_600));
    let gap = fired
        .windows(2)
        .find(|two| two[1].duration_since(two[0]) != seconds(1));
    assert_eq!(gap, None);
    let transactions: Vec<i64> = sqlx::query_scalar(
        "select count(*) from core.event_log group by tx_id order by min(event_id)",
    )
    .fetch_all(client.pool())
    .await
    .unwrap();
    assert!(
        transactions.iter().all(|&ticks| ticks <= 1_000),
        "{transactions:?}"
    );
    let in_order: bool = sqlx::query_scalar(
        "select bool_and(due_at > before) from (
             select due_at, lag(due_at, 1, '-infinity') over (order by event_id) as before from core.ticks
             where event_id is not null) t",
    )
    .fetch_one(client.pool())
    .await
    .unwrap();
    assert!(in_order);
}

#[tokio::test]
async fn a_tick_that_came_due_during_a_restart_is_fired_once() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let declared = app(&database, &["every_hour"], &no_saw());
    nexus::start(declared).await.unwrap().shutdown().await;
    let due_at = next_run(&client, "every_hour").await;
    advance_to(&database, client.pool(), due_at + seconds(20)).await;
    for _ in 0..2 {
        let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
            .await
            .unwrap();
        caught_up(&client, "every_hour").await;
        node.shutdown().await;
    }
    assert_eq!(fired(&client, "every_hour").await, [due_at]);
}

#[tokio::test]
async fn a_changed_payload_is_what_a_missed_tick_carries() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let client = client(&database).await;
    nexus::start(app(&database, &["close_books", "close_of_day"], &sender))
        .await
        .unwrap()
        .shutdown()
        .await;
    let due_at = next_run(&client, "close_of_day").await;
    advance_to(&database, client.pool(), due_at + minutes(30)).await;
    BUILD.set(2);
    let node = nexus::start(app(&database, &["close_books", "close_of_day"], &sender))
        .await
        .unwrap();
    let handled = within("the tick is handled", saw.recv()).await.unwrap();
    assert_eq!(handled, ("all".to_owned(), 2, Some(due_at)));
    node.shutdown().await;
}

#[tokio::test]
async fn an_old_build_that_restarts_takes_no_payload_back() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let start = |build| {
        BUILD.set(build);
        nexus::start(app(&database, &["close_books", "close_of_day"], &no_saw()))
    };
    let stored = || async {
        let build: i32 = sqlx::query_scalar(
            "select (payload ->> 'build')::int from core.scheduled_tasks where name = 'close_of_day'",
        )
        .fetch_one(client.pool())
        .await
        .unwrap();
        build
    };
    start(1).await.unwrap().shutdown().await;
    let new = start(2).await.unwrap();
    assert_eq!(stored().await, 2);
    let old = start(1).await.unwrap();
    assert_eq!(stored().await, 2);
    new.shutdown().await;
    until("the old build defines the app again", || async {
        (stored().await == 1).then_some(())
    })
    .await;
    old.shutdown().await;
}

#[tokio::test]
async fn due_times_of_an_expression_that_was_changed_are_not_fired() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let declared = || app(&database, &["every_ten_minutes"], &no_saw());
    nexus::start(declared()).await.unwrap().shutdown().await;
    // What an earlier build declared, and missed.
    let missed = next_run(&client, "every_ten_minutes").await;
    sqlx::query(
        "update core.scheduled_tasks set cron_expression = '5 * * * *', next_run_at = $1::timestamptz
         where name = 'every_ten_minutes'",
    )
    .bind((missed - minutes(5)).to_string())
    .execute(client.pool())
    .await
    .unwrap();
    advance_to(&database, client.pool(), missed + minutes(121)).await;
    let node = nexus::start(declared()).await.unwrap();
    let next = missed + minutes(130);
    assert_eq!(next_run(&client, "every_ten_minutes").await, next);
    advance_to(&database, client.pool(), next).await;
    until("it ticks", || async {
        (!fired(&client, "every_ten_minutes").await.is_empty()).then_some(())
    })
    .await;
    assert_eq!(fired(&client, "every_ten_minutes").await, [next]);
    node.shutdown().await;
}

#[tokio::test]
async fn a_task_that_comes_back_fires_nothing_of_the_past() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let start = |handler| nexus::start(app(&database, &[handler], &no_saw()));
    start("every_hour").await.unwrap().shutdown().await;
    let missed = next_run(&client, "every_hour").await;
    start("every_ten_minutes").await.unwrap().shutdown().await;
    let removed = task(&client, "every_hour").await;
    assert!(!removed.is_active);
    assert_eq!(removed.next_run_at, None);
    let error = client.run_schedule_now("every_hour").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "scheduled task `every_hour` is inactive: app `shop` no longer declares it"
    );
    advance_to(&database, client.pool(), missed + minutes(90)).await;
    let node = start("every_hour").await.unwrap();
    let next = missed + minutes(120);
    assert_eq!(next_run(&client, "every_hour").await, next);
    advance_to(&database, client.pool(), next).await;
    until("it ticks", || async {
        (!fired(&client, "every_hour").await.is_empty()).then_some(())
    })
    .await;
    assert_eq!(fired(&client, "every_hour").await, [next]);
    node.shutdown().await;
}

#[tokio::test]
async fn a_clock_that_goes_back_fires_nothing_twice() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
        .await
        .unwrap();
    let first = next_run(&client, "every_hour").await;
    for due_at in [first, first + minutes(60)] {
        advance_to(&database, client.pool(), due_at).await;
        until("it ticks", || async {
            fired(&client, "every_hour")
                .await
                .contains(&due_at)
                .then_some(())
        })
        .await;
    }
    sqlx::query("update core.test_clock set shift = shift - interval '90 minutes'")
        .execute(client.pool())
        .await
        .unwrap();
    // Another node, and one that has forgotten when the task is due next.
    node.shutdown().await;
    sqlx::query(
        "update core.scheduled_tasks set next_run_at = $1::timestamptz where name = 'every_hour'",
    )
    .bind(first.to_string())
    .execute(client.pool())
    .await
    .unwrap();
    let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
        .await
        .unwrap();
    let third = first + minutes(120);
    advance_to(&database, client.pool(), third).await;
    until("it ticks", || async {
        fired(&client, "every_hour")
            .await
            .contains(&third)
            .then_some(())
    })
    .await;
    assert_eq!(
        fired(&client, "every_hour").await,
        [first, first + minutes(60), third]
    );
    let events: i64 = sqlx::query_scalar(
        "select count(*) from core.event_log where event_type = 'tick.shop.every_hour'",
    )
    .fetch_one(client.pool())
    .await
    .unwrap();
    assert_eq!(events, 3);
    node.shutdown().await;
}

#[tokio::test]
async fn a_paused_task_stays_paused_until_it_is_resumed() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let start = || nexus::start(app(&database, &["every_hour"], &no_saw()));
    start().await.unwrap().shutdown().await;
    let missed = next_run(&client, "every_hour").await;
    client.pause_schedule("every_hour").await.unwrap();
    let paused_at = task(&client, "every_hour").await.paused_at;
    assert!(paused_at.is_some());
    // Paused again, deployed, run by pg_cron or by hand.
    client.pause_schedule("every_hour").await.unwrap();
    advance_to(&database, client.pool(), missed + minutes(90)).await;
    let node = start().await.unwrap();
    let paused = task(&client, "every_hour").await;
    assert_eq!((paused.paused_at, paused.next_run_at), (paused_at, None));
    assert!(paused.is_active);
    sqlx::query(
        "select core.run_scheduled_task(task_id), core.fire_tick(task_id, core.now(), null)
         from core.scheduled_tasks where name = 'every_hour'",
    )
    .execute(client.pool())
    .await
    .unwrap();
    assert_eq!(fired(&client, "every_hour").await, []);
    client.run_schedule_now("every_hour").await.unwrap();

    client.resume_schedule("every_hour").await.unwrap();
    let next = missed + minutes(120);
    assert_eq!(task(&client, "every_hour").await.next_run_at, Some(next));
    // Resumed twice is resumed once.
    advance_to(&database, client.pool(), next + seconds(5)).await;
    client.resume_schedule("every_hour").await.unwrap();
    until("it ticks", || async {
        fired(&client, "every_hour")
            .await
            .contains(&next)
            .then_some(())
    })
    .await;
    let runs = client.schedule_history("every_hour", 10).await.unwrap();
    let facts: Vec<(bool, bool)> = runs
        .iter()
        .map(|run| (run.is_manual, run.left_out.is_some()))
        .collect();
    assert_eq!(facts, [(false, false), (true, false)]);
    node.shutdown().await;
}

#[tokio::test]
async fn a_run_by_hand_moves_no_due_time() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["close_books", "close_of_day"], &sender))
        .await
        .unwrap();
    let client = node.client();
    let before = task(client, "close_of_day").await.next_run_at;
    let ids = [
        client.run_schedule_now("close_of_day").await.unwrap(),
        client.run_schedule_now("close_of_day").await.unwrap(),
    ];
    for _ in ids {
        let (shop, _, due_at) = within("it is handled", saw.recv()).await.unwrap();
        assert_eq!(shop, "all");
        assert!(due_at.is_some());
    }
    let after = task(client, "close_of_day").await;
    assert_eq!(after.next_run_at, before);
    assert!(after.last_run_at.is_some());
    let runs = client.schedule_history("close_of_day", 10).await.unwrap();
    let found: Vec<(Option<i64>, bool)> = runs
        .iter()
        .map(|run| (run.event_id, run.is_manual))
        .collect();
    assert_eq!(found, [(Some(ids[1]), true), (Some(ids[0]), true)]);
    let newest = client.schedule_history("close_of_day", 1).await.unwrap();
    assert_eq!(newest, runs[..1]);
    node.shutdown().await;
}

#[tokio::test]
async fn the_same_name_again_changes_the_task() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let id = client
        .schedule("tills", "0 * * * *", &books("north"))
        .await
        .unwrap();
    let due_at = next_run(&client, "tills").await;
    advance_to(&database, client.pool(), due_at + minutes(5)).await;
    // The program starts again and says the same, but for the payload: the missed tick is not lost.
    let again = client
        .schedule("tills", "0 * * * *", &books("south"))
        .await
        .unwrap();
    assert_eq!(again, id);
    assert_eq!(next_run(&client, "tills").await, due_at);
    // Another zone is another schedule: it counts from now on.
    let again = client
        .schedule("tills", "0 * * * *", &books("south"))
        .tz("Asia/Kathmandu")
        .misfire(Misfire::Skip)
        .grace(Duration::from_millis(1_500))
        .await
        .unwrap();
    assert_eq!(again, id);
    let changed = task(&client, "tills").await;
    // 5:45 hours before UTC.
    assert_eq!(changed.next_run_at, Some(due_at + minutes(15)));
    assert_eq!(changed.time_zone.as_deref(), Some("Asia/Kathmandu"));
    assert_eq!(changed.misfire, Misfire::Skip);
    assert_eq!(changed.grace, Duration::from_millis(1_500));
    assert_eq!(client.schedules().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_task_made_at_run_time_outlives_deployments() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let start = || nexus::start(app(&database, &["close_books", "close_of_day"], &sender));
    let node = start().await.unwrap();
    let payload = json!({ "shop": "north", "build": 7 });
    node.client()
        .schedule_json("tills", "*/10 * * * * *", "books.due", &payload)
        .event_version(3)
        .event_key("north")
        .await
        .unwrap();
    node.shutdown().await;
    BUILD.set(2);
    let node = start().await.unwrap();
    let tills = task(node.client(), "tills").await;
    assert_eq!((tills.app, tills.is_active), (None, true));
    let (shop, build, _) = within("it ticks", saw.recv()).await.unwrap();
    assert_eq!((shop.as_str(), build), ("north", 7));
    assert!(node.client().unschedule("tills").await.unwrap());
    assert!(!node.client().unschedule("tills").await.unwrap());
    node.shutdown().await;
}

#[tokio::test]
async fn a_task_is_made_with_the_transaction_or_not_at_all() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    for commits in [false, true] {
        let mut tx = client.begin().await.unwrap();
        client
            .schedule_in(&mut tx, "tills", "@daily", &books("north"))
            .await
            .unwrap();
        if commits {
            tx.commit().await.unwrap();
        } else {
            tx.rollback().await.unwrap();
        }
        let count = client.schedules().await.unwrap().len();
        assert_eq!(count, usize::from(commits));
    }
}

#[tokio::test]
async fn what_an_app_declares_is_its_own() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    // Made at run time first, then declared by a build.
    client
        .schedule("every_hour", "@yearly", &books("north"))
        .await
        .unwrap();
    let start = |handler| nexus::start(app(&database, &[handler], &no_saw()));
    start("every_hour").await.unwrap().shutdown().await;
    let declared = task(&client, "every_hour").await;
    assert_eq!(declared.app.as_deref(), Some("shop"));
    assert_eq!(declared.event_type, "tick.shop.every_hour");
    let message = "scheduled task `every_hour` is declared by app `shop`: change it there, or use another name";
    let refused = client.schedule("every_hour", "@daily", &books("north"));
    assert_eq!(refused.await.unwrap_err().to_string(), message);
    let refused = client.unschedule("every_hour").await;
    assert_eq!(refused.unwrap_err().to_string(), message);
    assert_eq!(task(&client, "every_hour").await, declared);

    // No longer declared, it is free.
    start("every_ten_minutes").await.unwrap().shutdown().await;
    client
        .schedule("every_hour", "@daily", &books("north"))
        .await
        .unwrap();
    let free = task(&client, "every_hour").await;
    assert_eq!(
        (free.id, free.app, free.is_active),
        (declared.id, None, true)
    );
}

#[tokio::test]
async fn what_cannot_be_scheduled_is_refused_with_the_reason() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    client
        .schedule("tills", "@daily", &books("north"))
        .await
        .unwrap();
    let event = books("north");
    let refused = [
        client.schedule("", "@daily", &event).await,
        client.schedule("x".repeat(101), "@daily", &event).await,
        client.schedule("a\0b", "@daily", &event).await,
        client.schedule("a", "61 * * * *", &event).await,
        client.schedule("a", "0 0 31 2 *", &event).await,
        client
            .schedule("a", "@daily", &event)
            .tz("Europe/Berln")
            .await,
        client
            .schedule("a", "@daily", &event)
            .misfire(Misfire::FireAll { cap: 0 })
            .await,
        client
            .schedule("a", "@daily", &event)
            .misfire(Misfire::FireAll { cap: 1_001 })
            .await,
        client.schedule("a", "@daily", &books("a\0b")).await,
        client
            .schedule_json("a", "@daily", "Books Due", &json!(1))
            .await,
        client
            .schedule_json("a", "@daily", "books.due", &json!({}))
            .event_version(0)
            .await,
        client
            .schedule_json("a", "@daily", "books.due", &"x".repeat(2_000_000))
            .await,
    ];
    let kinds: Vec<&str> = refused
        .iter()
        .map(|refused| match refused.as_ref().unwrap_err() {
            ScheduleError::Name(_) => "name",
            ScheduleError::Expression { .. } => "expression",
            ScheduleError::Never { .. } => "never",
            ScheduleError::TimeZone { .. } => "time zone",
            ScheduleError::Misfire { .. } => "misfire",
            ScheduleError::Event(_) => "event",
            ScheduleError::EventType(_) => "event type",
            ScheduleError::EventVersion => "version",
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(
        kinds,
        [
            "name",
            "name",
            "name",
            "expression",
            "never",
            "time zone",
            "misfire",
            "misfire",
            "event",
            "event type",
            "version",
            "event"
        ]
    );
    let unknown = "namespace `demo` has no scheduled task `till`; it has tills";
    for error in [
        client.pause_schedule("till").await.unwrap_err(),
        client.resume_schedule("till").await.unwrap_err(),
        client.run_schedule_now("till").await.unwrap_err(),
        client.schedule_history("till", 1).await.unwrap_err(),
    ] {
        assert_eq!(error.to_string(), unknown);
    }
    assert_eq!(client.schedules().await.unwrap().len(), 1);
}

/// What is said of an expression and a zone is what `#[cron]` says.
#[tokio::test]
async fn mistakes_in_schedules_are_told_as_the_macro_tells_them() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let event = books("north");
    for (expression, zone, text) in [
        (
            "61 24 * * *",
            "UTC",
            "cron expression `61 24 * * *` is not valid: invalid minute field `61` (allowed: 0-59); invalid hour field `24` (allowed: 0-23)",
        ),
        ("@every 5m", "UTC", "; write `*/5 * * * *`"),
        ("@dayly", "UTC", "; did you mean `@daily`?; known names: "),
        ("0 9 ? * MON", "UTC", "write `*` for any value"),
        (
            "@daily",
            "berlin",
            "unknown time zone `berlin`; did you mean `Europe/Berlin`?",
        ),
        ("@daily", "europe/berlin", "did you mean `Europe/Berlin`?"),
        (
            "report-7",
            "UTC",
            "cron expression `report-7` is not valid: a cron expression has 5 fields",
        ),
    ] {
        let error = client.schedule("a", expression, &event).tz(zone).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let swapped = client.schedule("0 9 * * 1-5", "report-7", &event).await;
    assert_eq!(
        swapped.unwrap_err().to_string(),
        "cron expression `report-7` is not valid: `0 9 * * 1-5` could be one, and stands in the place of the name: the name comes first"
    );
    assert_eq!(client.schedules().await.unwrap(), []);
}

#[tokio::test]
async fn a_task_that_cannot_be_computed_is_inactive_and_says_why() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["close_books"], &sender))
        .await
        .unwrap();
    let client = node.client();
    sqlx::query(
        "insert into core.scheduled_tasks (namespace, name, cron_expression, timezone, event_type, payload, event_version)
         values ('demo', 'tills', '* * * * * *', 'Europe/Berln', 'books.due', '{\"shop\": \"north\", \"build\": 0}', 3)",
    )
    .execute(client.pool())
    .await
    .unwrap();
    until("it is inactive", || async {
        (!task(client, "tills").await.is_active).then_some(())
    })
    .await;
    let stored = task(client, "tills").await;
    let reason = "unknown time zone `Europe/Berln`; did you mean `Europe/Berlin`?; a time zone is a name of the IANA database, such as `Europe/Berlin` or `UTC`";
    assert_eq!(stored.last_error.as_deref(), Some(reason));
    let error = client.run_schedule_now("tills").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("scheduled task `tills` is inactive: {reason}")
    );
    // Mended by hand.
    sqlx::query("update core.scheduled_tasks set timezone = 'Europe/Berlin', active = true where name = 'tills'")
        .execute(client.pool())
        .await
        .unwrap();
    within("it ticks", saw.recv()).await.unwrap();
    let mended = task(client, "tills").await;
    assert_eq!((mended.is_active, mended.last_error), (true, None));
    node.shutdown().await;
}

#[tokio::test]
async fn what_is_changed_by_hand_counts_from_then_on() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let start = || nexus::start(app(&database, &["every_hour"], &no_saw()));
    start().await.unwrap().shutdown().await;
    let due_at = next_run(&client, "every_hour").await;
    let pool = client.pool();
    let set = |what: &'static str| async move {
        let change = sqlx::AssertSqlSafe(format!(
            "update core.scheduled_tasks set {what} where name = 'every_hour'"
        ));
        sqlx::query(change).execute(pool).await.unwrap();
    };
    // Inactive by hand is inactive after a deployment, too.
    set("active = false").await;
    advance_to(&database, client.pool(), due_at + minutes(90)).await;
    let node = start().await.unwrap();
    assert!(!task(&client, "every_hour").await.is_active);
    set("active = true").await;
    assert_eq!(next_run(&client, "every_hour").await, due_at + minutes(120));
    set("paused_at = core.now()").await;
    advance_to(&database, client.pool(), due_at + minutes(150)).await;
    set("paused_at = null").await;
    assert_eq!(next_run(&client, "every_hour").await, due_at + minutes(180));
    // The first due time comes before any node has looked.
    node.shutdown().await;
    set("cron_expression = '*/10 * * * *'").await;
    advance_to(&database, client.pool(), due_at + minutes(160)).await;
    let tick_only = nexus::start(app(&database, &["close_books"], &no_saw()).name("other"))
        .await
        .unwrap();
    caught_up(&client, "every_hour").await;
    assert_eq!(fired(&client, "every_hour").await, [due_at + minutes(160)]);
    tick_only.shutdown().await;
}

#[tokio::test]
async fn a_tick_that_was_fired_before_is_left_out_of_a_set() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    client
        .schedule("tills", "@daily", &books("north"))
        .await
        .unwrap();
    let fire = "select (core.fire_ticks('demo', array[task_id, task_id, task_id],
                    array['2026-01-01', '2026-01-02', '2026-01-01']::timestamptz[], false)).event_ids
                from core.scheduled_tasks where name = 'tills'";
    let all = || async {
        let ids: Vec<Option<i64>> = sqlx::query_scalar(fire)
            .fetch_one(client.pool())
            .await
            .unwrap();
        ids.iter().map(Option::is_some).collect::<Vec<bool>>()
    };
    assert_eq!(all().await, [true, true, false]);
    assert_eq!(all().await, [false, false, false]);
    let logged: i64 = sqlx::query_scalar("select count(*) from core.event_log")
        .fetch_one(client.pool())
        .await
        .unwrap();
    assert_eq!(logged, 2);
}

#[tokio::test]
async fn a_transaction_that_fails_while_it_fires_loses_and_doubles_nothing() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["close_books"], &sender))
        .await
        .unwrap();
    let client = node.client();
    client
        .schedule("tills", "@daily", &books("north"))
        .await
        .unwrap();
    // The last thing of such a transaction fails, as if the connection were lost.
    sqlx::raw_sql(
        "create sequence attempts;
         create function fail() returns trigger language plpgsql as $$
         begin
             if nextval('attempts') <= 3 then
                 raise 'broken';
             end if;
             return new;
         end $$;
         create trigger fail before update of next_run_at on core.scheduled_tasks
             for each row execute function fail()",
    )
    .execute(client.pool())
    .await
    .unwrap();
    let due_at = next_run(client, "tills").await;
    advance_to(&database, client.pool(), due_at).await;
    let handled = within("the tick is handled", saw.recv()).await.unwrap();
    assert_eq!(handled.2, Some(due_at));
    within("all is settled", node.idle()).await.unwrap();
    assert!(saw.try_recv().is_err());
    assert_eq!(fired(client, "tills").await, [due_at]);
    let attempts: i64 = sqlx::query_scalar("select last_value from attempts")
        .fetch_one(client.pool())
        .await
        .unwrap();
    assert_eq!(attempts, 4);
    node.shutdown().await;
}

#[tokio::test]
async fn a_task_whose_event_cannot_be_emitted_holds_up_no_other() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    sqlx::raw_sql(
        "create function refuse() returns trigger language plpgsql as
             $$ begin if new.event_type = 'refused' then raise 'refused'; end if; return new; end $$;
         create trigger refuses before insert on core.event_log
             for each row execute function refuse()",
    )
    .execute(client.pool())
    .await
    .unwrap();
    for name in ["refused", "welcome"] {
        client
            .schedule_json(name, "* * * * * *", name, &json!({}))
            .misfire(Misfire::FireAll { cap: 100 })
            .await
            .unwrap();
    }
    let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
        .await
        .unwrap();
    until("the other task ticks", || async {
        (fired(&client, "welcome").await.len() > 2).then_some(())
    })
    .await;
    let refused = task(&client, "refused").await;
    assert!(refused.is_active);
    let error = refused.last_error.unwrap();
    assert!(error.contains("refused"), "{error}");
    assert_eq!(fired(&client, "refused").await, []);

    sqlx::query("drop trigger refuses on core.event_log")
        .execute(client.pool())
        .await
        .unwrap();
    database.advance(Duration::from_secs(61)).await;
    until(
        "it ticks, also for the time that it was put off",
        || async {
            let first = fired(&client, "refused").await.first().copied()?;
            (first == refused.next_run_at.unwrap()).then_some(())
        },
    )
    .await;
    assert_eq!(task(&client, "refused").await.last_error, None);
    within("the node stops", node.shutdown()).await;
}

#[tokio::test]
async fn a_time_that_never_comes_is_refused() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    client
        .schedule("tills", "0 9 * * *", &books("north"))
        .await
        .unwrap();
    for column in ["next_run_at", "due_after", "put_off_until"] {
        let statement = format!("update core.scheduled_tasks set {column} = '-infinity'");
        let refused = sqlx::query(sqlx::AssertSqlSafe(statement))
            .execute(client.pool())
            .await
            .unwrap_err();
        assert!(refused.to_string().contains("finite"), "{refused}");
    }
}

#[tokio::test]
async fn tasks_go_on_after_a_clock_that_was_ahead_is_set_back() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
        .await
        .unwrap();
    database.advance(Duration::from_hours(24 * 40)).await;
    until("it ticks", || async {
        (!fired(&client, "every_hour").await.is_empty()).then_some(())
    })
    .await;
    caught_up(&client, "every_hour").await;
    within("the node stops", node.shutdown()).await;
    sqlx::query("update core.test_clock set shift = shift - interval '40 days'")
        .execute(client.pool())
        .await
        .unwrap();
    let node = nexus::start(app(&database, &["every_hour"], &no_saw()))
        .await
        .unwrap();
    let next = next_run(&client, "every_hour").await;
    let latest = now(client.pool()).await + minutes(60);
    assert!(next <= latest, "{next} is after {latest}");
    within("the node stops", node.shutdown()).await;
}

/// As the node above, for one that goes on running.
#[tokio::test]
async fn a_node_computes_anew_what_a_clock_that_was_ahead_has_put_off() {
    let database = TestDatabase::new().await;
    let client = client(&database).await;
    client
        .schedule("tills", "0 * * * *", &books("north"))
        .await
        .unwrap();
    sqlx::query(
        "update core.scheduled_tasks
         set last_run_at = core.now() + interval '40 days', next_run_at = core.now() + interval '40 days'",
    )
    .execute(client.pool())
    .await
    .unwrap();
    // Looks after such things when it starts, and each minute.
    let node = nexus::start(app(&database, &["every_ten_minutes"], &no_saw()))
        .await
        .unwrap();
    until("the next run is near", || async {
        let next = task(&client, "tills").await.next_run_at?;
        (next <= now(client.pool()).await + minutes(60)).then_some(())
    })
    .await;
    assert_eq!(fired(&client, "tills").await, []);
    within("the node stops", node.shutdown()).await;
}
