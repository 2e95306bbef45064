//! Delayed emits: an event that is emitted later is stored with your transaction, is emitted once by
//! whichever node is there when it is due, to the subscriptions of that moment, and can be cancelled
//! until then. What cannot be emitted is kept and holds up nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::{Command, Stdio},
    time::Duration,
};

use nexus::{
    Client, Database, EmitError,
    event::EncodeError,
    jiff::{SignedDuration, Timestamp},
    prelude::*,
    testing::TestDatabase,
};
use nexus_tests::{until, within};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool, SqlSafeStr};
use tokio::sync::mpsc;

/// An egg is done.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "egg.done", version = 2, key = n)]
struct EggDone {
    n: i64,
}

/// Somebody puts an egg on.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "egg.put_on")]
struct EggPutOn {
    n: i64,
    key: Option<String>,
    then: String,
}

/// Nobody wants it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "egg.forgotten")]
struct EggForgotten {}

/// As the victim declares it.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "victim.work")]
struct Work {
    number: i64,
    then: String,
}

type Saw = mpsc::UnboundedSender<(&'static str, i64, nexus::EnvelopeMeta)>;

#[handler]
async fn eat(egg: Envelope<EggDone>, saw: State<Saw>) {
    let _ = saw.send(("eat", egg.n, egg.meta().clone()));
}

#[handler(group = "kitchen")]
async fn clean_up(egg: Envelope<EggDone>, saw: State<Saw>) {
    let _ = saw.send(("clean_up", egg.n, egg.meta().clone()));
}

#[handler(max_attempts = 2, backoff = "fixed(1s)")]
async fn put_on(egg: Envelope<EggPutOn>, tx: &mut Tx, saw: State<Saw>) -> nexus::Result {
    tx.emit(&EggDone { n: egg.n })?.after(FIVE_MINUTES);
    if let Some(key) = &egg.key {
        tx.emit(&EggDone { n: egg.n + 100 })?
            .after(FIVE_MINUTES)
            .idempotency_key(key);
    }
    let _ = saw.send(("put_on", egg.n, egg.meta().clone()));
    match &*egg.then {
        "fail" => Err(Error::permanent("the egg is broken")),
        _ => Ok(()),
    }
}

const FIVE_MINUTES: Duration = Duration::from_mins(5);
const HOUR: Duration = Duration::from_hours(1);

struct Test {
    database: TestDatabase,
    pool: PgPool,
    client: Client,
    sender: Saw,
    saw: mpsc::UnboundedReceiver<(&'static str, i64, nexus::EnvelopeMeta)>,
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let (sender, saw) = mpsc::unbounded_channel();
        Self {
            client: client(&database, "demo").await,
            pool: database.pool().await,
            database,
            sender,
            saw,
        }
    }

    async fn start<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> nexus::Handle {
        let app = App::discover()
            .only(handlers)
            .database_url(self.database.url())
            .idle_poll(Duration::from_millis(25))
            .state(self.sender.clone());
        nexus::start(app).await.unwrap()
    }

    async fn next(&mut self) -> (&'static str, i64, nexus::EnvelopeMeta) {
        within("a handler runs", self.saw.recv()).await.unwrap()
    }

    /// Which handler has seen which egg since the last time, once nothing is left to do.
    async fn seen(&mut self, app: &nexus::Handle) -> Vec<(&'static str, i64)> {
        within("all is handled", app.idle()).await.unwrap();
        let mut seen = Vec::new();
        while let Ok((who, n, _)) = self.saw.try_recv() {
            seen.push((who, n));
        }
        seen.sort_unstable();
        seen
    }

    async fn waiting(&self) -> Vec<i64> {
        let waiting = self.client.delayed(1_000).await.unwrap();
        waiting.iter().map(|event| event.event_id).collect()
    }

    /// The ids in the log, and how often each is there.
    async fn logged(&self) -> BTreeMap<i64, i64> {
        let rows: Vec<(i64, i64)> =
            sqlx::query_as("select event_id, count(*) from core.event_log group by 1")
                .fetch_all(&self.pool)
                .await
                .unwrap();
        rows.into_iter().collect()
    }

    async fn now(&self) -> Timestamp {
        let micros: i64 =
            sqlx::query_scalar("select (extract(epoch from core.now()) * 1000000)::bigint")
                .fetch_one(&self.pool)
                .await
                .unwrap();
        Timestamp::from_microsecond(micros).unwrap()
    }
}

async fn client(database: &TestDatabase, namespace: &str) -> Client {
    let database = Database::from_url(database.url(), "the test").unwrap();
    Client::connect(&database, namespace).await.unwrap()
}

fn eggs(numbers: impl IntoIterator<Item = i64>) -> Vec<EggDone> {
    numbers.into_iter().map(|n| EggDone { n }).collect()
}

async fn count(pool: &PgPool, query: &str) -> i64 {
    let text = AssertSqlSafe(format!("select count(*) from ({query}) q")).into_sql_str();
    sqlx::query_scalar(text).fetch_one(pool).await.unwrap()
}

async fn execute(pool: &PgPool, statements: &str) {
    sqlx::raw_sql(AssertSqlSafe(statements.to_owned()).into_sql_str())
        .execute(pool)
        .await
        .unwrap();
}

async fn emit_by_sql(pool: &PgPool, options: &Value) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "select core.emit('demo', 'egg.done', '{\"n\": 7}', '{\"version\": 2}' || $1)",
    )
    .bind(options)
    .fetch_one(pool)
    .await
}

#[tokio::test]
async fn is_emitted_when_it_is_due_and_not_before() {
    let mut test = Test::new().await;
    let app = test.start(["eat", "clean_up"]).await;
    let begun = test.now().await;
    let hour = test
        .client
        .emit(&EggDone { n: 60 })
        .after(HOUR)
        .correlation_id("breakfast")
        .await
        .unwrap();
    let before = test
        .client
        .emit(&EggDone { n: 59 })
        .at(begun + SignedDuration::from_mins(59))
        .await
        .unwrap();
    let ended = test.now().await;

    let waiting = test.client.delayed(10).await.unwrap();
    assert_eq!(
        waiting.iter().map(|e| e.event_id).collect::<Vec<_>>(),
        [before, hour],
        "those that are due first come first"
    );
    assert_eq!(test.client.delayed(1).await.unwrap().len(), 1);
    let last = &waiting[1];
    assert_eq!(
        (
            &*last.event_type,
            last.event_version,
            last.key.as_deref(),
            last.idempotency_key.as_deref(),
            &*last.correlation_id,
            last.error.as_deref()
        ),
        ("egg.done", 2, Some("60"), None, "breakfast", None)
    );
    assert!(begun <= last.requested_at && last.requested_at <= ended);
    assert_eq!(last.due_at, last.requested_at + HOUR);
    assert!(test.logged().await.is_empty());

    test.database.advance(Duration::from_mins(59)).await;
    assert_eq!(test.seen(&app).await, [("clean_up", 59), ("eat", 59)]);
    assert_eq!(test.waiting().await, [hour]);

    test.database.advance(Duration::from_mins(1)).await;
    let (_, n, meta) = test.next().await;
    assert_eq!((n, meta.event_id()), (60, hour));
    // What was noted when it was asked for, and the time at which it was emitted.
    assert_eq!(meta.event_type(), "egg.done");
    assert_eq!(meta.event_version(), 2);
    assert_eq!(meta.key(), Some("60"));
    assert_eq!(meta.correlation_id(), Some("breakfast"));
    assert_eq!(meta.causation_id(), None);
    assert!(meta.producer_node_id().starts_with("client-"));
    let due_at = last.due_at.as_millisecond();
    assert!(meta.emitted_at().as_millisecond() >= due_at);
    let logged: (Value, i64) = sqlx::query_as(
        "select metadata, (extract(epoch from emitted_at) * 1000)::bigint
         from core.event_log where event_id = $1",
    )
    .bind(hour)
    .fetch_one(&test.pool)
    .await
    .unwrap();
    assert!(logged.1 >= due_at);
    let noted = |name: &str| -> Timestamp { logged.0[name].as_str().unwrap().parse().unwrap() };
    assert_eq!(noted("dueAt").as_millisecond(), due_at);
    assert_eq!(
        noted("requestedAt").as_millisecond(),
        last.requested_at.as_millisecond()
    );
    assert_eq!(test.seen(&app).await.len(), 1, "the other handler's");
    assert!(test.waiting().await.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn what_is_due_already_is_emitted_at_once() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let now = test.now().await;
    let past = [Timestamp::MIN, Timestamp::UNIX_EPOCH, now];
    for (n, time) in (0..).zip(past) {
        test.client.emit(&EggDone { n }).at(time).await.unwrap();
    }
    let at_once = test.client.emit(&EggDone { n: 3 }).after(Duration::ZERO);
    at_once.await.unwrap();
    // A later option replaces an earlier one.
    let twice = test.client.emit(&EggDone { n: 4 }).after(HOUR).at(now);
    twice.await.unwrap();
    emit_by_sql(&test.pool, &json!({ "at": "1999-12-31T23:59:59Z" }))
        .await
        .unwrap();
    emit_by_sql(&test.pool, &json!({ "after": "-1 day" }))
        .await
        .unwrap();
    assert_eq!(test.logged().await.len(), 7);
    assert!(test.waiting().await.is_empty());
    let expected: Vec<_> = [0, 1, 2, 3, 4, 7, 7].map(|n| ("eat", n)).into();
    assert_eq!(test.seen(&app).await, expected);
    app.shutdown().await;
}

#[tokio::test]
async fn is_emitted_soon_after_it_is_due_while_time_goes_by() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    // By the app, which wakes itself, by another process's client, which rings, and by SQL.
    let by_app = app.client().emit(&EggDone { n: 1 });
    by_app.after(Duration::from_millis(30)).await.unwrap();
    let by_client = test.client.emit(&EggDone { n: 2 });
    by_client.after(Duration::from_millis(60)).await.unwrap();
    emit_by_sql(&test.pool, &json!({ "after": "90 milliseconds" }))
        .await
        .unwrap();
    let mut tx = app.client().begin().await.unwrap();
    tx.emit(&EggDone { n: 3 })
        .unwrap()
        .after(Duration::from_millis(20));
    tx.commit().await.unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < 4 {
        seen.insert(test.next().await.1);
    }
    assert_eq!(seen, BTreeSet::from([1, 2, 3, 7]));
    app.shutdown().await;
}

#[tokio::test]
async fn a_cancelled_event_is_never_emitted() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let ids = test
        .client
        .emit_all(&eggs(1..=3))
        .after(HOUR)
        .await
        .unwrap();
    let other = client(&test.database, "other").await;
    assert!(
        !other.cancel(ids[1]).await.unwrap(),
        "another namespace's event"
    );
    assert!(test.client.cancel(ids[1]).await.unwrap());
    assert!(
        !test.client.cancel(ids[1]).await.unwrap(),
        "it is cancelled already"
    );
    assert!(
        !test.client.cancel(i64::MAX).await.unwrap(),
        "there never was such an event"
    );
    let by_sql: Vec<bool> = sqlx::query_scalar("select core.cancel($1) from generate_series(1, 2)")
        .bind(ids[2])
        .fetch_all(&test.pool)
        .await
        .unwrap();
    assert_eq!(by_sql, [true, false]);

    test.database.advance(HOUR).await;
    assert_eq!(test.seen(&app).await, [("eat", 1)]);
    assert!(!test.client.cancel(ids[0]).await.unwrap(), "it was emitted");
    assert_eq!(test.logged().await, BTreeMap::from([(ids[0], 1)]));
    app.shutdown().await;
}

#[tokio::test]
async fn of_cancelling_and_emitting_exactly_one_happens() {
    let test = Test::new().await;
    let (first, second) = (test.start(["eat"]).await, test.start(["eat"]).await);
    for round in 0..10 {
        let ids = test
            .client
            .emit_all(&eggs(0..500))
            .after(HOUR)
            .await
            .unwrap();
        // Newest first, some before the clock is moved, the rest while nodes emit. The oldest is left to
        // them, so that both sides win some in every round.
        let (oldest, others) = ids.split_first().unwrap();
        let started = tokio::sync::Notify::new();
        let is_moved = tokio::sync::Notify::new();
        let cancelling = async {
            let mut cancelled = BTreeSet::new();
            for (n, &id) in others.iter().rev().enumerate() {
                if n == 20 {
                    is_moved.notified().await;
                }
                if !test.client.cancel(id).await.unwrap() {
                    break;
                }
                cancelled.insert(id);
                started.notify_one();
            }
            cancelled
        };
        let advancing = async {
            started.notified().await;
            test.database.advance(HOUR).await;
            is_moved.notify_one();
        };
        let (cancelled, ()) = tokio::join!(cancelling, advancing);
        within("what is due is emitted", first.idle())
            .await
            .unwrap();
        let logged = test.logged().await;
        assert!(!cancelled.is_empty() && logged.contains_key(oldest));
        for id in &ids {
            let emitted = logged.get(id).copied().unwrap_or(0);
            let is_cancelled = cancelled.contains(id);
            assert_eq!(
                emitted + i64::from(is_cancelled),
                1,
                "round {round}, event {id}: emitted {emitted} times, cancelled: {is_cancelled}"
            );
        }
    }
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn belongs_to_the_transaction_it_was_asked_for_in() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let client = &test.client;
    let mut undone = test.pool.begin().await.unwrap();
    let id = client
        .emit_in(&mut undone, &EggDone { n: 1 })
        .after(HOUR)
        .await
        .unwrap();
    assert!(!client.cancel(id).await.unwrap(), "nobody else sees it yet");
    undone.rollback().await.unwrap();

    let mut done = test.pool.begin().await.unwrap();
    let kept = client
        .emit_in(&mut done, &EggDone { n: 2 })
        .after(HOUR)
        .await
        .unwrap();
    let withdrawn = client
        .emit_in(&mut done, &EggDone { n: 3 })
        .after(HOUR)
        .await
        .unwrap();
    assert!(client.cancel_in(&mut done, withdrawn).await.unwrap());
    done.commit().await.unwrap();
    assert_eq!(test.waiting().await, [kept]);

    let mut tx = client.begin().await.unwrap();
    tx.emit(&EggDone { n: 4 }).unwrap().after(HOUR);
    tx.rollback().await.unwrap();
    let mut tx = client.begin().await.unwrap();
    tx.emit(&EggDone { n: 5 }).unwrap().after(HOUR);
    tx.emit(&EggDone { n: 6 }).unwrap();
    tx.emit(&EggDone { n: 7 })
        .unwrap()
        .at(test.now().await + SignedDuration::from_hours(1))
        .correlation_id("lunch");
    tx.commit().await.unwrap();
    assert_eq!(test.seen(&app).await, [("eat", 6)]);
    test.database.advance(HOUR * 2).await;
    assert_eq!(test.seen(&app).await, [("eat", 2), ("eat", 5), ("eat", 7)]);
    app.shutdown().await;
}

#[tokio::test]
async fn a_cancellation_belongs_to_its_transaction_too() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let ids = test
        .client
        .emit_all(&eggs(1..=3))
        .after(HOUR)
        .await
        .unwrap();
    let mut committed = test.pool.begin().await.unwrap();
    let mut undone = test.pool.begin().await.unwrap();
    assert!(test.client.cancel_in(&mut committed, ids[0]).await.unwrap());
    assert!(test.client.cancel_in(&mut undone, ids[1]).await.unwrap());
    // Neither holds up what is due beside it.
    test.database.advance(HOUR).await;
    assert_eq!(test.next().await.1, 3);
    assert_eq!(test.logged().await.len(), 1);
    committed.commit().await.unwrap();
    undone.rollback().await.unwrap();
    assert_eq!(test.next().await.1, 2);
    assert!(test.seen(&app).await.is_empty());
    assert_eq!(
        test.logged().await,
        BTreeMap::from([(ids[1], 1), (ids[2], 1)])
    );
    app.shutdown().await;
}

#[tokio::test]
async fn a_handlers_delayed_events_commit_with_its_completion() {
    let mut test = Test::new().await;
    let app = test.start(["eat", "put_on"]).await;
    let put_on = |n: i64, key: Option<&str>, then: &str| EggPutOn {
        n,
        key: key.map(str::to_owned),
        then: then.to_owned(),
    };
    let client = &test.client;
    let cause = client
        .emit(&put_on(1, Some("one"), ""))
        .correlation_id("breakfast")
        .traceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .await
        .unwrap();
    client.emit(&put_on(2, None, "fail")).await.unwrap();
    assert_eq!(test.seen(&app).await, [("put_on", 1), ("put_on", 2)]);
    assert_eq!(test.waiting().await.len(), 2);
    test.database.advance(FIVE_MINUTES).await;
    let (_, n, meta) = test.next().await;
    assert!(n == 1 || n == 101);
    assert_eq!(meta.correlation_id(), Some("breakfast"));
    assert_eq!(meta.causation_id(), Some(&*cause.to_string()));
    assert_eq!(
        meta.traceparent(),
        Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    );
    assert_eq!(meta.producer_node_id(), app.node_id());
    assert_eq!(test.seen(&app).await.len(), 1);

    // The key was used for another event, which is the handler's own mistake; what it stored beside
    // it is undone with it.
    let client = &test.client;
    client.emit(&put_on(3, Some("one"), "")).await.unwrap();
    until("the first attempt fails", || async {
        (app.stats().iter().map(|stats| stats.retried).sum::<u64>() == 1).then_some(())
    })
    .await;
    test.database.advance(Duration::from_secs(2)).await;
    assert_eq!(test.seen(&app).await, [("put_on", 3), ("put_on", 3)]);
    assert!(test.waiting().await.is_empty());
    let letters = test.client.dead_letters("default", 10).await.unwrap();
    let errors: Vec<&str> = letters
        .iter()
        .map(|letter| letter.error.as_deref().unwrap())
        .collect();
    assert_eq!(
        errors,
        [
            "idempotency key `one` was used for another event",
            "the egg is broken"
        ]
    );
    app.shutdown().await;
}

#[tokio::test]
async fn events_of_one_transaction_may_share_an_idempotency_key() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let mut tx = test.client.begin().await.unwrap();
    for _ in 0..2 {
        tx.emit(&EggDone { n: 1 }).unwrap().idempotency_key("one");
        tx.emit(&EggDone { n: 2 })
            .unwrap()
            .idempotency_key("two")
            .after(HOUR);
    }
    tx.commit().await.unwrap();
    assert_eq!(test.seen(&app).await, [("eat", 1)]);
    assert_eq!(test.waiting().await.len(), 1);

    let mut tx = test.client.begin().await.unwrap();
    tx.emit(&EggDone { n: 3 }).unwrap();
    tx.emit(&EggDone { n: 4 }).unwrap().idempotency_key("two");
    let error = tx.commit().await.unwrap_err();
    assert!(
        matches!(&error, EmitError::KeyUsedForAnotherEvent { key } if key == "two"),
        "{error:?}"
    );
    assert!(test.seen(&app).await.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn many_nodes_emit_each_event_once() {
    let mut test = Test::new().await;
    let mut ids = Vec::new();
    for from in (0..3_000).step_by(500) {
        let some = eggs(from..from + 500);
        ids.extend(test.client.emit_all(&some).after(HOUR).await.unwrap());
    }
    let mut apps = Vec::new();
    for _ in 0..4 {
        apps.push(test.start(["eat"]).await);
    }
    test.database.advance(HOUR).await;
    let mut seen = test.seen(&apps[0]).await;
    for app in &apps {
        seen.extend(test.seen(app).await);
    }
    seen.sort_unstable();
    let expected: Vec<_> = (0..3_000).map(|n| ("eat", n)).collect();
    assert_eq!(seen, expected);
    assert_eq!(
        test.logged().await,
        ids.into_iter().map(|id| (id, 1)).collect()
    );
    for app in apps {
        app.shutdown().await;
    }
}

/// Waits for a statement that emits delayed events and is held up, and returns its backend.
async fn emitting_backend(pool: &PgPool) -> i32 {
    until("a node is in the middle of emitting", || async {
        sqlx::query_scalar(
            "select pid from pg_stat_activity
             where datname = current_database() and query like '%core.emit_due%'
               and wait_event_type = 'Lock' and pid <> pg_backend_pid()",
        )
        .fetch_optional(pool)
        .await
        .unwrap()
    })
    .await
}

#[tokio::test]
async fn a_node_that_loses_its_connection_while_it_emits_loses_and_doubles_nothing() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let ids = test
        .client
        .emit_all(&eggs(0..50))
        .after(HOUR)
        .await
        .unwrap();
    let mut lock = test.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table core.event_log in share row exclusive mode")
        .execute(&mut *lock)
        .await
        .unwrap();
    test.database.advance(HOUR).await;
    let backend = emitting_backend(&test.pool).await;
    sqlx::query("select pg_terminate_backend($1)")
        .bind(backend)
        .execute(&test.pool)
        .await
        .unwrap();
    until("it is ended", || async {
        let left = sqlx::query("select from pg_stat_activity where pid = $1")
            .bind(backend)
            .fetch_optional(&test.pool)
            .await;
        left.unwrap().is_none().then_some(())
    })
    .await;
    assert_eq!(test.waiting().await, ids, "nothing was emitted yet");
    lock.rollback().await.unwrap();
    let expected: Vec<_> = (0..50).map(|n| ("eat", n)).collect();
    assert_eq!(test.seen(&app).await, expected);
    assert_eq!(
        test.logged().await,
        ids.into_iter().map(|id| (id, 1)).collect()
    );
    app.shutdown().await;
}

#[tokio::test]
async fn a_node_that_is_killed_while_it_emits_loses_and_doubles_nothing() {
    let test = Test::new().await;
    execute(
        &test.pool,
        "create table effects (number bigint primary key)",
    )
    .await;
    let victim = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_victim"));
        command
            .env("CORE_DATABASE_URL", test.database.url())
            .env("VICTIM_HANDLERS", "work")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    };
    assert!(victim().status().unwrap().success(), "it registers");
    let works: Vec<Work> = (0..50)
        .map(|number| Work {
            number,
            then: String::new(),
        })
        .collect();
    let ids = test.client.emit_all(&works).after(HOUR).await.unwrap();
    let mut lock = test.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table core.event_log in share row exclusive mode")
        .execute(&mut *lock)
        .await
        .unwrap();
    test.database.advance(HOUR).await;
    let mut killed = victim().env("VICTIM_STAYS", "1").spawn().unwrap();
    emitting_backend(&test.pool).await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    lock.rollback().await.unwrap();

    assert!(victim().status().unwrap().success());
    assert!(test.waiting().await.is_empty());
    let done = count(&test.pool, "select from effects").await;
    assert_eq!(done, 50);
    assert_eq!(
        test.logged().await,
        ids.into_iter().map(|id| (id, 1)).collect()
    );
}

#[tokio::test]
async fn waits_for_a_node_to_come() {
    let mut test = Test::new().await;
    let id = test
        .client
        .emit(&EggDone { n: 1 })
        .after(HOUR)
        .await
        .unwrap();
    test.database.advance(HOUR * 24).await;
    assert_eq!(test.waiting().await, [id]);
    // Overdue, and still to be cancelled.
    let late = test
        .client
        .emit(&EggDone { n: 2 })
        .after(HOUR)
        .await
        .unwrap();
    test.database.advance(HOUR * 24).await;
    assert!(test.client.cancel(late).await.unwrap());
    let app = test.start(["eat"]).await;
    assert_eq!(test.seen(&app).await, [("eat", 1)]);
    app.shutdown().await;
}

#[tokio::test]
async fn goes_to_the_subscriptions_of_the_moment_it_is_due() {
    let mut test = Test::new().await;
    let first = test.start(["eat"]).await;
    test.client
        .emit(&EggDone { n: 1 })
        .after(HOUR)
        .await
        .unwrap();
    let nobodys = test
        .client
        .emit(&EggForgotten {})
        .after(HOUR)
        .await
        .unwrap();
    let second = test.start(["eat", "clean_up"]).await;
    test.database.advance(HOUR).await;
    assert_eq!(test.seen(&second).await, [("clean_up", 1), ("eat", 1)]);
    assert!(
        test.logged().await.contains_key(&nobodys),
        "nobody wants it, and it is in the log all the same"
    );
    let as_of_now = count(
        &test.pool,
        "select from core.event_log join core.namespaces using (namespace, subscriptions_version)",
    )
    .await;
    assert_eq!(as_of_now, 2);
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn a_handler_that_starts_while_it_is_being_emitted_gets_it_once() {
    let mut test = Test::new().await;
    let first = test.start(["eat"]).await;
    first.shutdown().await;
    test.client
        .emit(&EggDone { n: 1 })
        .after(HOUR)
        .await
        .unwrap();
    test.database.advance(HOUR).await;
    // As a node does it that is slow to commit.
    let mut slow = PgConnection::connect(test.database.url()).await.unwrap();
    let mut tx = slow.begin().await.unwrap();
    let emitted: i32 = sqlx::query_scalar("select emitted from core.emit_due('demo', 100, false)")
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    assert_eq!(emitted, 1);
    let second = test.start(["eat", "clean_up"]).await;
    assert_eq!(test.waiting().await.len(), 1);
    tx.commit().await.unwrap();
    until("the new subscription is settled", || async {
        let open = count(
            &test.pool,
            "select from core.subscriptions where since_snapshot is not null",
        )
        .await;
        (open == 0).then_some(())
    })
    .await;
    assert_eq!(test.seen(&second).await, [("clean_up", 1), ("eat", 1)]);
    second.shutdown().await;
}

#[tokio::test]
async fn an_idempotency_key_covers_the_delayed_event() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let client = test.client.clone();
    let emit = |n: i64, delay: Duration| {
        let client = client.clone();
        async move {
            let emission = client.emit(&EggDone { n }).idempotency_key("breakfast");
            emission.after(delay).await
        }
    };
    let two_days = HOUR * 48;
    let id = emit(1, two_days).await.unwrap();
    assert_eq!(
        test.client.delayed(10).await.unwrap()[0]
            .idempotency_key
            .as_deref(),
        Some("breakfast")
    );
    assert_eq!(
        emit(1, HOUR).await.unwrap(),
        id,
        "a repetition moves nothing"
    );
    assert_eq!(emit(1, Duration::ZERO).await.unwrap(), id);
    let by_sql = json!({ "idempotencyKey": "breakfast", "after": "1 hour" });
    let error = emit_by_sql(&test.pool, &by_sql).await.unwrap_err();
    assert!(
        error.to_string().contains("was used for another event"),
        "{error}"
    );
    assert!(matches!(
        emit(2, HOUR).await,
        Err(EmitError::KeyUsedForAnotherEvent { .. })
    ));
    assert_eq!(test.waiting().await, [id]);

    // The 24 hours begin when it is due.
    test.database.advance(HOUR * 47).await;
    assert_eq!(emit(1, HOUR).await.unwrap(), id);
    test.database.advance(HOUR).await;
    assert_eq!(test.seen(&app).await, [("eat", 1)]);
    test.database.advance(HOUR * 23).await;
    assert_eq!(emit(1, HOUR).await.unwrap(), id);
    test.database.advance(HOUR).await;
    let again = emit(2, HOUR).await.unwrap();
    assert_ne!(again, id);

    // Cancelled, the event never was, and the key is free.
    assert!(test.client.cancel(again).await.unwrap());
    let last = emit(3, HOUR).await.unwrap();
    assert_eq!(test.waiting().await, [last]);
    let by_sql = json!({ "idempotencyKey": "dinner", "after": "1 hour" });
    let dinner = emit_by_sql(&test.pool, &by_sql).await.unwrap();
    assert_eq!(emit_by_sql(&test.pool, &by_sql).await.unwrap(), dinner);
    assert!(test.client.cancel(dinner).await.unwrap());
    assert_ne!(emit_by_sql(&test.pool, &by_sql).await.unwrap(), dinner);
    test.database.advance(HOUR).await;
    assert_eq!(test.seen(&app).await, [("eat", 3), ("eat", 7)]);
    app.shutdown().await;
}

#[tokio::test]
async fn delays_from_sql_are_those_of_the_client() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    let now = test.now().await;
    let id = emit_by_sql(
        &test.pool,
        &json!({
            "after": "1 hour 30 minutes", "at": null, "version": 2, "key": "7", "correlationId": "c",
            "causationId": "5", "producerNodeId": "psql", "metadata": { "by": "hand" },
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        }),
    )
    .await
    .unwrap();
    let waiting = test.client.delayed(10).await.unwrap();
    assert_eq!(waiting.len(), 1);
    assert_eq!(
        waiting[0].due_at,
        waiting[0].requested_at + Duration::from_mins(90)
    );
    assert!(waiting[0].requested_at >= now);
    test.database.advance(HOUR * 2).await;
    let (_, n, meta) = test.next().await;
    assert_eq!((n, meta.event_id()), (7, id));
    assert_eq!(meta.event_version(), 2);
    assert_eq!(
        (meta.key(), meta.correlation_id(), meta.causation_id()),
        (Some("7"), Some("c"), Some("5"))
    );
    assert_eq!(meta.producer_node_id(), "psql");
    assert!(meta.traceparent().is_some());
    let by: Value = sqlx::query_scalar("select metadata -> 'by' from core.event_log")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    assert_eq!(by, "hand");

    // A time without a zone is UTC, whatever the session's is.
    let mut connection = test.pool.acquire().await.unwrap();
    sqlx::raw_sql(
        "set timezone = 'Asia/Tokyo';
         select core.emit('demo', 'egg.done', '{\"n\": 1}', '{\"at\": \"2033-05-18 03:33:20\"}');
         reset timezone",
    )
    .execute(&mut *connection)
    .await
    .unwrap();
    drop(connection);
    let waiting = test.client.delayed(10).await.unwrap();
    assert_eq!(waiting[0].due_at.as_second(), 2_000_000_000);
    app.shutdown().await;
}

#[tokio::test]
async fn delays_from_sql_that_make_no_sense_are_refused() {
    let test = Test::new().await;
    for (options, reason) in [
        (
            json!({ "after": "1 hour", "at": "2033-05-18T03:33:20Z" }),
            "exclude each other",
        ),
        (json!({ "after": 5 }), "option \"after\" of core.emit is 5"),
        (
            json!({ "after": "300" }),
            "option \"after\" of core.emit is \"300\"",
        ),
        (
            json!({ "after": "a while" }),
            "invalid input syntax for type interval",
        ),
        (
            json!({ "at": "tomorrow" }),
            "option \"at\" of core.emit is \"tomorrow\"",
        ),
        (
            json!({ "at": "infinity" }),
            "option \"at\" of core.emit is \"infinity\"",
        ),
        (json!({ "at": "2033-13-01T00:00:00Z" }), "out of range"),
        (
            json!({ "at": ["2033-05-18T03:33:20Z"] }),
            "option \"at\" of core.emit is [",
        ),
        (json!({ "after": "11 years" }), "ten years is the most"),
        (
            json!({ "at": "9999-05-18T03:33:20Z" }),
            "ten years is the most",
        ),
        (
            json!({ "later": "1 hour" }),
            "unknown option of core.emit: later",
        ),
    ] {
        let error = emit_by_sql(&test.pool, &options).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{options}: {error}");
    }
    assert!(test.waiting().await.is_empty());
    assert!(test.logged().await.is_empty());
}

#[tokio::test]
async fn delays_over_ten_years_are_refused_before_anything_is_sent() {
    let test = Test::new().await;
    let client = &test.client;
    let refused = |error: EmitError| {
        assert!(
            matches!(
                &error,
                EmitError::Encode(EncodeError::DelayTooLong { event_type, .. }) if event_type == "egg.done"
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("ten years"), "{error}");
    };
    let egg = EggDone { n: 1 };
    let year = HOUR * 24 * 365;
    refused(client.emit(&egg).after(Duration::MAX).await.unwrap_err());
    refused(client.emit(&egg).after(year * 11).await.unwrap_err());
    refused(client.emit(&egg).at(Timestamp::MAX).await.unwrap_err());
    let all = client.emit_all([&egg, &egg]).after(Duration::MAX);
    refused(all.await.unwrap_err());
    let mut tx = client.begin().await.unwrap();
    refused(
        client
            .emit_in(&mut tx, &egg)
            .after(Duration::MAX)
            .await
            .unwrap_err(),
    );
    client
        .emit_in(&mut tx, &egg)
        .after(year * 10)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let mut tx = client.begin().await.unwrap();
    tx.emit(&egg).unwrap().after(HOUR);
    tx.emit(&egg).unwrap().after(Duration::MAX);
    refused(tx.commit().await.unwrap_err());
    assert_eq!(test.waiting().await.len(), 1);
}

#[tokio::test]
async fn a_lost_queue_and_a_missing_partition_are_mended() {
    let mut test = Test::new().await;
    // Nobody but who emits looks at the kitchen's queue.
    test.start(["eat", "clean_up"]).await.shutdown().await;
    let app = test.start(["eat"]).await;
    let mut tx = test.pool.begin().await.unwrap();
    let soon = test.client.emit_in(&mut tx, &EggDone { n: 1 });
    soon.after(Duration::from_millis(1)).await.unwrap();
    execute(&test.pool, "drop table pgmq.q_core_events_demo__kitchen").await;
    tx.commit().await.unwrap();
    assert_eq!(test.next().await.1, 1);

    let mut tx = test.pool.begin().await.unwrap();
    // Unlike the client's statement, this takes no lock on the log, which the table below is part of.
    sqlx::raw_sql(
        "select core.emit('demo', 'egg.done', '{\"n\": 2}', '{\"version\": 2, \"after\": \"1 millisecond\"}')",
    )
    .execute(&mut *tx)
    .await
    .unwrap();
    let this_month: String =
        sqlx::query_scalar("select to_char(core.now() at time zone 'UTC', 'YYYY_MM')")
            .fetch_one(&test.pool)
            .await
            .unwrap();
    execute(
        &test.pool,
        &format!("drop table core.event_log_{this_month}"),
    )
    .await;
    tx.commit().await.unwrap();
    assert_eq!(test.next().await.1, 2);
    app.shutdown().await;

    let app = test.start(["clean_up"]).await;
    assert_eq!(test.seen(&app).await, [("clean_up", 1), ("clean_up", 2)]);
    app.shutdown().await;
}

#[tokio::test]
async fn an_event_that_cannot_be_emitted_is_kept_and_holds_up_nothing() {
    let mut test = Test::new().await;
    let app = test.start(["eat"]).await;
    execute(
        &test.pool,
        "create function refuse() returns trigger language plpgsql as $$
         begin
             if new.message #>> '{payload,n}' in ('5', '6') then
                 raise 'egg % is rotten', new.message #>> '{payload,n}';
             end if;
             return new;
         end $$;
         create trigger refuse before insert on pgmq.q_core_events_demo
             for each row execute function refuse()",
    )
    .await;
    let ids = test
        .client
        .emit_all(&eggs(0..20))
        .after(HOUR)
        .await
        .unwrap();
    test.database.advance(HOUR).await;
    let expected: Vec<_> = (0..20)
        .filter(|n| ![5, 6].contains(n))
        .map(|n| ("eat", n))
        .collect();
    assert_eq!(test.seen(&app).await, expected);
    let kept = test.client.delayed(10).await.unwrap();
    let kept: Vec<_> = kept
        .iter()
        .map(|event| (event.event_id, event.error.as_deref().unwrap()))
        .collect();
    assert_eq!(
        kept,
        [(ids[5], "egg 5 is rotten"), (ids[6], "egg 6 is rotten")]
    );
    // What comes later goes by; it is tried again, and can be given up.
    test.client
        .emit(&EggDone { n: 30 })
        .after(Duration::from_secs(30))
        .await
        .unwrap();
    test.database.advance(Duration::from_secs(61)).await;
    assert_eq!(test.seen(&app).await, [("eat", 30)]);
    assert_eq!(test.waiting().await, [ids[5], ids[6]]);
    assert!(test.client.cancel(ids[6]).await.unwrap());
    execute(&test.pool, "drop trigger refuse on pgmq.q_core_events_demo").await;
    test.database.advance(Duration::from_secs(121)).await;
    assert_eq!(test.seen(&app).await, [("eat", 5)]);
    assert!(test.waiting().await.is_empty());
    assert!(!test.logged().await.contains_key(&ids[6]));
    app.shutdown().await;
}

#[tokio::test]
async fn going_back_is_refused_while_delayed_events_wait() {
    let test = Test::new().await;
    let step = nexus_migrations::MIGRATIONS
        .iter()
        .find(|step| step.name.ends_with("delayed_emits"))
        .unwrap();
    let options = test.database.url().parse().unwrap();
    let id = test
        .client
        .emit(&EggDone { n: 1 })
        .after(HOUR)
        .await
        .unwrap();
    let error = nexus_migrations::down(&options, step.version - 1)
        .await
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("1 delayed events are waiting"), "{source}");
    assert!(test.client.cancel(id).await.unwrap());
    nexus_migrations::down(&options, step.version - 1)
        .await
        .unwrap();
    // And what was there before works: no such option, as ever.
    let error = emit_by_sql(&test.pool, &json!({ "after": "1 hour" }))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("unknown option"), "{error}");
    emit_by_sql(&test.pool, &json!({})).await.unwrap();
}
