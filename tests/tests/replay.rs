//! Events of the log are delivered once more, or as history to a new handler: each once, marked, in
//! bounds, at a rate, through kills and beside new events.

use std::{sync::Arc, time::Duration};

use nexus::{
    Handle,
    client::{ReplayState, ReplayStatus},
    prelude::*,
    testing::{Fault, Point, TestApp, TestDatabase},
};
use nexus_tests::{until, within};
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgPool, SqlSafeStr};
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

/// A sensor was read.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "sensor.read")]
struct Reading {
    n: u32,
}

/// A sensor was read, as it is told now.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "sensor.read", version = 2)]
struct ReadingV2 {
    n: u32,
}

/// A sensor was moved.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "sensor.moved")]
struct Moved {
    n: u32,
}

/// Who saw which event, and whether a replay delivered it.
type Saw = mpsc::UnboundedSender<(&'static str, u32, bool)>;

#[handler(group = "live")]
async fn live(event: Envelope<Reading>, saw: State<Saw>) {
    let _ = saw.send(("live", event.n, event.is_replayed()));
}

#[handler(group = "live")]
async fn moves(event: Envelope<Moved>, saw: State<Saw>) {
    let _ = saw.send(("moves", event.n, event.is_replayed()));
}

/// The same subscription as `live` in a later build.
#[handler(group = "live", formerly = "live", from = "beginning")]
async fn renamed(event: Envelope<Reading>, saw: State<Saw>) {
    let _ = saw.send(("renamed", event.n, event.is_replayed()));
}

#[handler(group = "history", from = "beginning")]
async fn history(event: Envelope<Reading>, saw: State<Saw>) {
    let _ = saw.send(("history", event.n, event.is_replayed()));
}

#[handler(group = "history", from = "2031-06-15T12:00:00Z")]
async fn since(event: Envelope<Reading>, saw: State<Saw>) {
    let _ = saw.send(("since", event.n, event.is_replayed()));
}

#[handler(group = "gated", concurrency = 1)]
async fn gated(event: Envelope<Reading>, gate: State<Arc<Semaphore>>, saw: State<Saw>) {
    let _open = gate.acquire().await;
    let _ = saw.send(("gated", event.n, event.is_replayed()));
}

/// Keeps a trace of each delivery that had an effect.
#[handler(group = "archive")]
async fn archive(event: Envelope<Reading>, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into archived (n, replay) values ($1, $2)")
        .bind(i64::from(event.n))
        .bind(event.replay_id())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

struct Test {
    database: TestDatabase,
    pool: PgPool,
    sender: Saw,
    saw: mpsc::UnboundedReceiver<(&'static str, u32, bool)>,
    gate: Arc<Semaphore>,
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let pool = database.pool().await;
        sqlx::raw_sql("create table archived (n bigint, replay uuid)")
            .execute(&pool)
            .await
            .unwrap();
        let (sender, saw) = mpsc::unbounded_channel();
        Self {
            pool,
            database,
            sender,
            saw,
            gate: Arc::new(Semaphore::new(0)),
        }
    }

    fn app<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> App {
        App::discover()
            .only(handlers)
            .idle_poll(Duration::from_millis(25))
            .state(self.sender.clone())
            .state(Arc::clone(&self.gate))
    }

    async fn start<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> Handle {
        let app = self.app(handlers).database_url(self.database.url());
        nexus::start(app).await.unwrap()
    }

    /// A node that a test can kill.
    async fn node<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> TestApp {
        TestApp::start_on(&self.database, self.app(handlers)).await
    }

    /// What was seen so far, in order.
    fn seen(&mut self) -> Vec<(&'static str, u32, bool)> {
        let mut seen = Vec::new();
        while let Ok(next) = self.saw.try_recv() {
            seen.push(next);
        }
        seen.sort_unstable();
        seen
    }

    async fn count(&self, query: &str) -> i64 {
        let text = AssertSqlSafe(format!("select count(*) from ({query}) q")).into_sql_str();
        sqlx::query_scalar(text)
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    /// Numbers that were archived by a replay, in order.
    async fn archived(&self, replay: Uuid) -> Vec<i64> {
        sqlx::query_scalar("select n from archived where replay = $1 order by n")
            .bind(replay)
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }
}

async fn emit(client: &Client, numbers: impl IntoIterator<Item = u32>) -> Vec<i64> {
    let events: Vec<Reading> = numbers.into_iter().map(|n| Reading { n }).collect();
    client.emit_all(&events).await.unwrap()
}

async fn status(client: &Client, id: Uuid) -> ReplayStatus {
    client.replay_status(id).await.unwrap().unwrap()
}

async fn finished(client: &Client, id: Uuid) -> ReplayStatus {
    until("the replay ends", || async {
        let status = status(client, id).await;
        (status.state != ReplayState::Running && status.waiting == 0).then_some(status)
    })
    .await
}

fn rows(who: &'static str, numbers: &[u32], is_replayed: bool) -> Vec<(&'static str, u32, bool)> {
    numbers.iter().map(|&n| (who, n, is_replayed)).collect()
}

#[tokio::test]
async fn history_and_new_events_meet_without_gap_or_overlap() {
    let mut test = Test::new().await;
    let first = test.start(["live"]).await;
    let client = first.client();
    emit(client, [1, 2, 3]).await;
    let mut by_client = test.pool.begin().await.unwrap();
    client
        .emit_in(&mut by_client, &Reading { n: 4 })
        .await
        .unwrap();
    let mut by_sql = test.pool.begin().await.unwrap();
    sqlx::raw_sql("select core.emit('demo', 'sensor.read', '{\"n\": 5}')")
        .execute(&mut *by_sql)
        .await
        .unwrap();
    // Begun before, with a snapshot in which nobody has registered.
    let mut old = test.pool.begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select from core.event_log")
        .execute(&mut *old)
        .await
        .unwrap();

    let second = test.start(["history"]).await;
    emit(client, [6]).await;
    by_client.commit().await.unwrap();
    by_sql.commit().await.unwrap();
    sqlx::raw_sql("select core.emit('demo', 'sensor.read', '{\"n\": 7}')")
        .execute(&mut *old)
        .await
        .unwrap();
    old.commit().await.unwrap();
    until("the subscriptions settle", || async {
        let open = "select from core.subscriptions where since_snapshot is not null";
        (test.count(open).await == 0).then_some(())
    })
    .await;
    for app in [&first, &second] {
        within("all is handled", app.idle()).await.unwrap();
    }
    let mut expected = rows("history", &[1, 2, 3], true);
    expected.extend(rows("history", &[4, 5, 6, 7], false));
    expected.extend(rows("live", &[1, 2, 3, 4, 5, 6, 7], false));
    expected.sort_unstable();
    assert_eq!(test.seen(), expected);

    // It is subscribed by now.
    second.shutdown().await;
    let second = test.start(["history"]).await;
    within("all is handled", second.idle()).await.unwrap();
    assert_eq!(test.seen(), []);
    assert_eq!(second.client().replays(10).await.unwrap().len(), 1);
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn history_begins_at_the_time_that_is_asked_for() {
    let mut test = Test::new().await;
    let node = test.node(["live"]).await;
    for (at, n) in [
        ("2031-06-15T11:59:59Z", 1),
        ("2031-06-15T12:00:00Z", 2),
        ("2031-06-16T00:00:00Z", 3),
    ] {
        test.database.freeze().await;
        test.database.travel_to(at.parse().unwrap()).await;
        emit(node.client(), [n]).await;
    }
    test.database.unfreeze().await;
    node.settled().await;
    test.seen();
    let late = test.node(["since"]).await;
    late.settled().await;
    assert_eq!(test.seen(), rows("since", &[2, 3], true));
}

#[tokio::test]
async fn a_handler_that_is_subscribed_or_renamed_ignores_from() {
    let mut test = Test::new().await;
    let node = test.start(["live"]).await;
    emit(node.client(), [1, 2]).await;
    within("all is handled", node.idle()).await.unwrap();
    node.shutdown().await;
    test.seen();

    let node = test.start(["renamed"]).await;
    emit(node.client(), [3]).await;
    within("all is handled", node.idle()).await.unwrap();
    assert_eq!(test.seen(), rows("renamed", &[3], false));
    assert_eq!(node.client().replays(10).await.unwrap().len(), 0);
    node.shutdown().await;
}

#[tokio::test]
async fn a_replay_delivers_what_lies_between_its_bounds() {
    let mut test = Test::new().await;
    let node = test.start(["live", "moves"]).await;
    let client = node.client();
    let ids = emit(client, 1..=6).await;
    client.emit(&Moved { n: 7 }).await.unwrap();
    let between = test.database.now().await;
    emit(client, [8, 9]).await;
    within("all is handled", node.idle()).await.unwrap();
    test.seen();

    let replays = [
        (
            client
                .replay("live")
                .handler("live")
                .first_id(ids[2])
                .last_id(ids[4]),
            rows("live", &[3, 4, 5], true),
        ),
        (
            client.replay("live").handler("live").since(between),
            rows("live", &[8, 9], true),
        ),
        (
            client.replay("live").until(between).first_id(ids[5]),
            [rows("live", &[6], true), rows("moves", &[7], true)].concat(),
        ),
        (
            client.replay("live").event_type("sensor.moved"),
            rows("moves", &[7], true),
        ),
        (
            client
                .replay("live")
                .handler("moves")
                .until(between)
                .last_id(ids[0]),
            Vec::new(),
        ),
    ];
    for (replay, expected) in replays {
        let estimate = replay.clone().dry_run().await.unwrap();
        assert_eq!(estimate.messages, expected.len() as u64);
        let id = replay.start().await.unwrap();
        let status = finished(client, id).await;
        assert_eq!(
            (status.state, status.messages),
            (ReplayState::Finished, expected.len() as u64)
        );
        within("all is handled", node.idle()).await.unwrap();
        assert_eq!(test.seen(), expected);
    }
    node.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_replayed_is_refused_with_what_there_is() {
    let test = Test::new().await;
    let node = test.start(["live", "moves"]).await;
    let client = node.client();
    let now = test.database.now().await;
    for (replay, text) in [
        (
            client.replay("nobody"),
            "namespace \"demo\" has no group \"nobody\"",
        ),
        (
            client.replay("live").handler("dead"),
            "group \"live\" of namespace \"demo\" has no handler \"dead\", it has \"live\", \"moves\"",
        ),
        (
            client
                .replay("live")
                .handler("live")
                .event_type("sensor.moved"),
            "handler \"live\" takes no events of type \"sensor.moved\"",
        ),
        (
            client.replay("live").event_type("sensor.red"),
            "group \"live\" takes no events of type \"sensor.red\"",
        ),
        (
            client.replay("live").first_id(5).last_id(4),
            "nothing lies between the bounds of the replay: 5 is not before 4",
        ),
        (
            client.replay("live").rate(0.0),
            "a replay has a rate of 0.0001 to 1000000 messages a second and 1 to 100000 waiting messages, not 0 and 1000",
        ),
        (
            client.replay("live").rate(f64::NAN),
            "a replay has a rate of 0.0001 to 1000000 messages a second and 1 to 100000 waiting messages, not NaN and 1000",
        ),
        (
            client.replay("live").max_waiting(0),
            "a replay has a rate of 0.0001 to 1000000 messages a second and 1 to 100000 waiting messages, not none and 0",
        ),
        (client.replay("a__b"), "group"),
    ] {
        let error = replay.start().await.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let error = client
        .replay("live")
        .since(now)
        .until(now)
        .start()
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("nothing lies between"),
        "{error}"
    );
    assert_eq!(client.replays(10).await.unwrap().len(), 0);
    node.shutdown().await;
}

#[tokio::test]
async fn a_dry_run_starts_nothing_and_says_when_it_estimates() {
    let test = Test::new().await;
    let node = test.start(["live", "moves"]).await;
    let client = node.client();
    emit(client, 0..30).await;
    client.emit(&ReadingV2 { n: 30 }).await.unwrap();
    let estimate = client.replay("live").dry_run().await.unwrap();
    assert_eq!(
        (estimate.events, estimate.messages, estimate.left_out),
        (31, 30, 1)
    );
    assert!(!estimate.is_estimate);
    assert!(estimate.first_at <= estimate.last_at && estimate.first_at.is_some());
    // Of more events than it may count it knows the magnitude.
    sqlx::raw_sql("analyze core.event_log")
        .execute(&test.pool)
        .await
        .unwrap();
    let (events, is_estimate): (i64, bool) = sqlx::query_as(
        "select events, is_estimate from core.estimate_replay('demo', 'live', 'live', null, null, null, null, null, 10)",
    )
    .fetch_one(&test.pool)
    .await
    .unwrap();
    assert!((10..=100).contains(&events) && is_estimate, "{events}");
    assert_eq!(client.replays(10).await.unwrap().len(), 0);
    node.shutdown().await;
}

#[tokio::test]
async fn versions_that_the_handler_does_not_take_are_left_out_and_counted() {
    let mut test = Test::new().await;
    let node = test.start(["live"]).await;
    let client = node.client();
    emit(client, [1]).await;
    client.emit(&ReadingV2 { n: 2 }).await.unwrap();
    emit(client, [3]).await;
    let id = client.replay("live").start().await.unwrap();
    let status = finished(client, id).await;
    assert_eq!((status.events, status.messages, status.left_out), (3, 2, 1));
    until("both are handled", || async {
        let left =
            "select from pgmq.q_core_events_demo__live where headers ->> 'eventVersion' = '1'";
        (test.count(left).await == 0).then_some(())
    })
    .await;
    let mut expected = rows("live", &[1, 3], false);
    expected.extend(rows("live", &[1, 3], true));
    expected.sort_unstable();
    assert_eq!(test.seen(), expected);
    node.shutdown().await;
}

/// A namespace with a subscription, and nobody who handles.
async fn without_apps() -> Test {
    let test = Test::new().await;
    sqlx::raw_sql(
        "select core.ensure_group('demo', 'default'), core.ensure_group('demo', 'g');
         select core.subscribe('demo', 'g', '[{\"group\": \"g\", \"handler\": \"h\", \"eventType\": \"sensor.read\"},
             {\"group\": \"g\", \"handler\": \"tick\", \"eventType\": \"tick.g.tick\", \"eventVersion\": 1}]')",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    test
}

async fn messages(pool: &PgPool) -> Vec<(Value, Value)> {
    sqlx::query_as("select message, headers from pgmq.q_core_events_demo__g order by msg_id")
        .fetch_all(pool)
        .await
        .unwrap()
}

const START: &str =
    "select core.start_replay('demo', 'g', $1, null, null, null, null, null, null, null)";

#[tokio::test]
async fn what_is_replayed_is_the_message_of_the_emit_with_a_mark() {
    let test = without_apps().await;
    sqlx::raw_sql(
        "insert into core.scheduled_tasks (task_id, namespace, name, cron_expression, event_type, payload)
         values ('123e4567-e89b-12d3-a456-426614174000', 'demo', 't', '* * * * *', 'sensor.read', '{\"n\": 3}');
         select pgmq.send('core_events_demo', '{\"eventType\": \"sensor.read\", \"payload\": {\"n\": 2},
             \"emittedAt\": \"2026-01-01T00:00:00.000Z\", \"producerNodeId\": \"js\", \"room\": \"7\"}')",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    sqlx::raw_sql(
        "select core.emit('demo', 'sensor.read', '{\"n\": 1}', '{\"version\": 4, \"key\": \"k\",
             \"correlationId\": \"c\", \"causationId\": \"9\", \"traceparent\": \"00-1\", \"tracestate\": \"a=b\",
             \"metadata\": {\"dueAt\": \"x\"}}');
         select count(*) from core.adopt('demo', 'core_events_demo', 10, 100000);
         select core.fire_tick('123e4567-e89b-12d3-a456-426614174000', '2026-01-02T00:00:00Z', null);
         select core.emit('demo', 'sensor.read', '{\"n\": 4}', '{\"after\": \"1 minute\"}');
         update core.delayed_emits set due_at = core.now(), next_try_at = core.now();
         select core.emit_due('demo', 10, false);",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    let sent = messages(&test.pool).await;
    assert_eq!(sent.len(), 4, "{sent:?}");
    sqlx::raw_sql("delete from pgmq.q_core_events_demo__g")
        .execute(&test.pool)
        .await
        .unwrap();
    let id: Uuid = sqlx::query_scalar(START)
        .bind("h")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    sqlx::query("select core.drive_replay($1, 1000)")
        .bind(id)
        .execute(&test.pool)
        .await
        .unwrap();
    let mut replayed = messages(&test.pool).await;
    for (_, headers) in &mut replayed {
        let mark = headers.as_object_mut().unwrap().remove("replay");
        assert_eq!(mark, Some(Value::String(id.to_string())));
    }
    let by_id = |(_, headers): &(Value, Value)| headers["eventId"].as_i64();
    let mut sent = sent;
    sent.sort_by_key(by_id);
    replayed.sort_by_key(by_id);
    assert_eq!(replayed, sent);
}

#[tokio::test]
async fn what_is_emitted_later_is_not_replayed_and_ticks_only_if_they_are_named() {
    let test = without_apps().await;
    sqlx::raw_sql(
        "select core.emit('demo', 'sensor.read', '{\"n\": 1}');
         select core.emit('demo', 'tick.g.tick', 'null');
         -- In the log only; a replay asks for what is there.
         select core.append_event_log('demo', 'sensor.read', '{\"n\": 2}', 'n')",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    let mut open = test.pool.begin().await.unwrap();
    sqlx::raw_sql("select core.emit('demo', 'sensor.read', '{\"n\": 3}')")
        .execute(&mut *open)
        .await
        .unwrap();
    let mut found = Vec::new();
    for handler in [None, Some("tick")] {
        let id: Uuid = sqlx::query_scalar(START)
            .bind(handler)
            .fetch_one(&test.pool)
            .await
            .unwrap();
        found.push(id);
    }
    open.commit().await.unwrap();
    sqlx::raw_sql("delete from pgmq.q_core_events_demo__g")
        .execute(&test.pool)
        .await
        .unwrap();
    let mut numbers = Vec::new();
    for id in found {
        let state: String = sqlx::query_scalar("select state from core.drive_replay($1, 1000)")
            .bind(id)
            .fetch_one(&test.pool)
            .await
            .unwrap();
        assert_eq!(state, "finished");
        let of_it: Vec<Option<i64>> = messages(&test.pool)
            .await
            .iter()
            .filter(|(_, headers)| headers["replay"] == id.to_string())
            .map(|(body, _)| body["payload"]["n"].as_i64())
            .collect();
        numbers.push(of_it);
    }
    assert_eq!(numbers, [vec![Some(1), Some(2)], vec![None]]);
}

#[tokio::test]
async fn a_node_that_dies_in_mid_replay_loses_and_doubles_nothing() {
    for point in [Point::BeforeReplay, Point::AfterReplay] {
        let test = Test::new().await;
        let node = test.node(["archive"]).await;
        emit(node.client(), 0..200).await;
        node.settled().await;
        // Some batches go well.
        let crash = node.arm(Fault::crash(point));
        let id = node
            .client()
            .replay("archive")
            .max_waiting(20)
            .start()
            .await
            .unwrap();
        crash.reached().await;
        let other = test.node(["archive"]).await;
        let died = other.arm(Fault::crash(Point::AfterReplay));
        died.reached().await;
        let last = test.node(["archive"]).await;
        // The leases of the dead end.
        last.advance(Duration::from_secs(11)).await;
        last.settled().await;
        let status = finished(last.client(), id).await;
        assert_eq!(
            (status.state, status.messages),
            (ReplayState::Finished, 200)
        );
        assert_eq!(
            test.archived(id).await,
            (0..200).collect::<Vec<i64>>(),
            "{point:?}"
        );
    }
}

#[tokio::test]
async fn two_nodes_drive_one_replay_and_double_nothing() {
    let test = Test::new().await;
    let one = test.node(["archive"]).await;
    let two = test.node(["archive"]).await;
    emit(one.client(), 0..600).await;
    one.settled().await;
    let mut ids = Vec::new();
    for node in [&one, &two, &one] {
        ids.push(
            node.client()
                .replay("archive")
                .max_waiting(50)
                .start()
                .await
                .unwrap(),
        );
    }
    one.settled().await;
    for id in ids {
        let status = finished(two.client(), id).await;
        assert_eq!(
            (status.state, status.events, status.messages),
            (ReplayState::Finished, 600, 600)
        );
        assert_eq!(test.archived(id).await, (0..600).collect::<Vec<i64>>());
    }
}

#[tokio::test]
async fn a_cancelled_replay_takes_back_what_waits() {
    let mut test = Test::new().await;
    // The node holds a few messages at most, so that others wait in the queue.
    let app = test.app(["gated"]).batch_size(5);
    let app = app.database_url(test.database.url());
    let node = nexus::start(app).await.unwrap();
    let client = node.client();
    // Nobody is subscribed to what is replayed but the gate.
    test.gate.add_permits(1_000);
    emit(client, 0..300).await;
    within("all is handled", node.idle()).await.unwrap();
    test.seen();
    let permits = test.gate.available_permits();
    test.gate.forget_permits(permits);

    let id = client.replay("gated").start().await.unwrap();
    until("messages wait", || async {
        let status = status(client, id).await;
        (status.waiting > 20).then_some(())
    })
    .await;
    assert!(client.cancel_replay(id).await.unwrap());
    assert!(
        !client.cancel_replay(id).await.unwrap(),
        "it was cancelled before"
    );
    assert!(
        !client.cancel_replay(Uuid::new_v4()).await.unwrap(),
        "there is none"
    );
    test.gate.add_permits(1_000);
    let status = finished(client, id).await;
    within("all is handled", node.idle()).await.unwrap();
    let seen = test.seen().len() as u64;
    assert_eq!(status.state, ReplayState::Cancelled);
    assert_eq!(seen + status.taken_back, status.messages);
    assert!(status.taken_back > 0 && status.messages < 300, "{status:?}");
    node.shutdown().await;
}

#[tokio::test]
async fn a_rate_is_kept_by_the_clock_of_the_database() {
    let mut test = Test::new().await;
    let node = test.node(["live"]).await;
    emit(node.client(), 0..10).await;
    node.settled().await;
    test.seen();
    test.database.freeze().await;
    let id = node
        .client()
        .replay("live")
        .rate(2.0)
        .start()
        .await
        .unwrap();
    let put = async |wanted: u64| {
        until("the messages are put", || async {
            let status = status(node.client(), id).await;
            (status.messages >= wanted).then_some(())
        })
        .await;
        // As often as anybody asks, there are no more before the clock has moved.
        until("somebody has asked again", || async {
            let sent: Option<i32> =
                sqlx::query_scalar("select sent from core.drive_replay($1, 1000)")
                    .bind(id)
                    .fetch_one(&test.pool)
                    .await
                    .unwrap();
            sent
        })
        .await;
        assert_eq!(status(node.client(), id).await.messages, wanted);
    };
    put(0).await;
    for (millis, wanted) in [(500, 1), (1_000, 3), (250, 3), (250, 4)] {
        test.database.advance(Duration::from_millis(millis)).await;
        put(wanted).await;
    }
    // What could not be sent meanwhile is made up for by a second's worth, not by all of it.
    test.database.advance(Duration::from_hours(1)).await;
    put(6).await;
    test.database.unfreeze().await;
    node.client().cancel_replay(id).await.unwrap();
    node.settled().await;
    assert_eq!(test.seen().len(), 6);
}

#[tokio::test]
async fn new_events_do_not_wait_for_the_end_of_a_replay() {
    let mut test = Test::new().await;
    let node = test.start(["gated"]).await;
    let client = node.client();
    test.gate.add_permits(10_000);
    emit(client, 0..2_000).await;
    within("all is handled", node.idle()).await.unwrap();
    test.seen();
    let permits = test.gate.available_permits();
    test.gate.forget_permits(permits);

    // The handler gets nowhere: the replay waits for it with few messages.
    let id = client.replay("gated").start().await.unwrap();
    until("messages wait", || async {
        (status(client, id).await.waiting > 0).then_some(())
    })
    .await;
    for _ in 0..20 {
        sqlx::query("select core.drive_replay($1, 1000)")
            .bind(id)
            .execute(&test.pool)
            .await
            .unwrap();
    }
    // Beside what the node has claimed in advance.
    let waiting = status(client, id).await.messages;
    assert!(waiting <= 250, "{waiting} messages");
    client.emit(&Reading { n: 9_999 }).await.unwrap();
    test.gate.add_permits(10_000);
    let mut before = 0;
    while within("the new event is handled", test.saw.recv()).await != Some(("gated", 9_999, false))
    {
        before += 1;
    }
    assert!(before <= 250, "after {before} replayed ones");
    let status = finished(client, id).await;
    assert_eq!(status.messages, 2_000);
    node.shutdown().await;
}

#[tokio::test]
async fn a_replay_follows_a_renamed_handler() {
    let mut test = Test::new().await;
    let node = test.start(["live"]).await;
    emit(node.client(), 0..5).await;
    within("all is handled", node.idle()).await.unwrap();
    test.seen();
    // So slow that its handler has another name before the first message.
    let id = node
        .client()
        .replay("live")
        .handler("live")
        .rate(0.01)
        .start()
        .await
        .unwrap();
    node.shutdown().await;
    let node = test.node(["renamed"]).await;
    for _ in 0..5 {
        node.advance(Duration::from_secs(101)).await;
        node.settled().await;
    }
    let status = finished(node.client(), id).await;
    assert_eq!(status.messages, 5);
    assert_eq!(test.seen(), rows("renamed", &[0, 1, 2, 3, 4], true));
}

#[tokio::test]
async fn what_a_dump_brought_from_another_server_is_replayed() {
    let test = without_apps().await;
    // Restored rows keep the ids of transactions that this server will have years later, or never.
    let inserted = sqlx::query(
        "insert into core.event_log (namespace, event_type, payload, producer_node_id, tx_id)
         select 'demo', 'sensor.read', '{\"n\": 1}', 'old', (1000000000000 + i)::text::xid8
         from generate_series(1, 3) i",
    );
    inserted.execute(&test.pool).await.unwrap();
    let id: Uuid = sqlx::query_scalar(START)
        .bind("h")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    // What is emitted after the start of a replay is no part of it.
    sqlx::query("select core.emit('demo', 'sensor.read', '{\"n\": 4}')")
        .execute(&test.pool)
        .await
        .unwrap();
    sqlx::query("select core.drive_replay($1, 1000)")
        .bind(id)
        .execute(&test.pool)
        .await
        .unwrap();
    let mut replayed: Vec<i64> = messages(&test.pool)
        .await
        .into_iter()
        .filter(|(_, headers)| headers.get("replay").is_some())
        .map(|(_, headers)| headers["eventId"].as_i64().unwrap())
        .collect();
    replayed.sort_unstable();
    assert_eq!(replayed, [1, 2, 3]);
}
