//! What an emitted event is promised: stored with its transaction or not at all, delivered to every
//! handler on its own, its effect once with `&mut Tx`.

use std::{sync::Arc, time::Duration};

use nexus::{
    Database,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::{until, within};
use tokio::sync::{Semaphore, mpsc};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.placed", key = order_id)]
struct OrderPlaced {
    order_id: u32,
    note: String,
}

/// What follows from it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.booked")]
struct OrderBooked {
    order_id: u32,
}

fn order(order_id: u32) -> OrderPlaced {
    OrderPlaced {
        order_id,
        note: format!("order {order_id}"),
    }
}

/// What handlers saw, told to the test.
type Saw = mpsc::UnboundedSender<(&'static str, u32, EnvelopeFacts)>;

#[derive(Debug, Clone)]
struct EnvelopeFacts {
    event_id: i64,
    attempt: u32,
    correlation: Option<String>,
    causation: Option<String>,
    traceparent: Option<String>,
    tracestate: Option<String>,
    key: Option<String>,
    delivery_key: String,
}

fn facts(meta: &nexus::EnvelopeMeta) -> EnvelopeFacts {
    EnvelopeFacts {
        event_id: meta.event_id(),
        attempt: meta.attempt(),
        correlation: meta.correlation_id().map(str::to_owned),
        causation: meta.causation_id().map(str::to_owned),
        traceparent: meta.traceparent().map(str::to_owned),
        tracestate: meta.tracestate().map(str::to_owned),
        key: meta.key().map(str::to_owned),
        delivery_key: meta.delivery_key(),
    }
}

fn tell(saw: &Saw, who: &'static str, order_id: u32, meta: &nexus::EnvelopeMeta) {
    // The test may have ended already.
    let _ = saw.send((who, order_id, facts(meta)));
}

#[handler]
async fn first(order: Envelope<OrderPlaced>, saw: State<Saw>) {
    tell(&saw, "first", order.order_id, order.meta());
}

#[handler]
async fn second(order: Envelope<OrderPlaced>, saw: State<Saw>) {
    tell(&saw, "second", order.order_id, order.meta());
}

#[handler(group = "audit")]
async fn third(order: Envelope<OrderPlaced>, saw: State<Saw>) {
    tell(&saw, "third", order.order_id, order.meta());
}

/// Books in the handler's transaction and emits what follows; fails for odd orders at first.
#[handler(backoff = "fixed(10ms)")]
async fn book(order: Envelope<OrderPlaced>, tx: &mut Tx) -> nexus::Result<Emit<OrderBooked>> {
    sqlx::query("insert into bookings (order_id) values ($1)")
        .bind(i64::from(order.order_id))
        .execute(&mut **tx)
        .await?;
    tx.emit(&OrderBooked {
        order_id: order.order_id + 1000,
    })?;
    if order.order_id % 2 == 1 && order.attempt() == 1 {
        return Err("the first attempt of odd orders fails".into());
    }
    Ok(Emit(OrderBooked {
        order_id: order.order_id,
    }))
}

#[handler]
async fn after_booking(booked: Envelope<OrderBooked>, saw: State<Saw>) {
    tell(&saw, "after_booking", booked.order_id, booked.meta());
}

/// Returns what follows without a transaction.
#[handler]
async fn forward(order: OrderPlaced) -> Option<Emit<OrderBooked>> {
    (order.order_id < 5).then_some(Emit(OrderBooked {
        order_id: order.order_id,
    }))
}

/// Blocks until the test lets it go.
#[handler(name = "slow", concurrency = 2)]
async fn slow(order: Envelope<OrderPlaced>, gate: State<Arc<Semaphore>>, saw: State<Saw>) {
    tell(&saw, "slow begins", order.order_id, order.meta());
    gate.acquire()
        .await
        .expect("the gate is never closed")
        .forget();
    tell(&saw, "slow ends", order.order_id, order.meta());
}

/// Inserts with the transaction, then waits: whoever takes the message away meanwhile wins.
#[handler(name = "contested", concurrency = 1)]
async fn contested(
    order: Envelope<OrderPlaced>,
    gate: State<Arc<Semaphore>>,
    saw: State<Saw>,
    tx: &mut Tx,
) -> nexus::Result {
    sqlx::query("insert into bookings (order_id) values ($1)")
        .bind(i64::from(order.order_id))
        .execute(&mut **tx)
        .await?;
    tell(&saw, "contested", order.order_id, order.meta());
    gate.acquire().await?.forget();
    Ok(())
}

struct Test {
    database: TestDatabase,
    saw: mpsc::UnboundedReceiver<(&'static str, u32, EnvelopeFacts)>,
    sender: Saw,
    gate: Arc<Semaphore>,
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let pool = database.pool().await;
        sqlx::query("create table bookings (order_id bigint)")
            .execute(&pool)
            .await
            .unwrap();
        let (sender, saw) = mpsc::unbounded_channel();
        Self {
            database,
            saw,
            sender,
            gate: Arc::new(Semaphore::new(0)),
        }
    }

    fn app<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> App {
        App::discover()
            .only(handlers)
            .state(self.sender.clone())
            .state(Arc::clone(&self.gate))
    }

    async fn next(&mut self) -> (&'static str, u32, EnvelopeFacts) {
        within("a handler runs", self.saw.recv())
            .await
            .expect("the sender is kept")
    }

    async fn bookings(&self) -> Vec<i64> {
        let pool = self.database.pool().await;
        sqlx::query_scalar("select order_id from bookings order by 1")
            .fetch_all(&pool)
            .await
            .unwrap()
    }
}

#[tokio::test]
async fn every_handler_of_every_group_gets_its_own_copy() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["first", "second", "third"])).await;
    let id = app.client().emit(&order(7)).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        let (who, order_id, facts) = test.next().await;
        assert_eq!((order_id, facts.event_id, facts.attempt), (7, id, 1));
        assert_eq!(facts.key.as_deref(), Some("7"));
        seen.push((who, facts.delivery_key));
    }
    seen.sort();
    let keys = ["default/first", "default/second", "audit/third"];
    for ((who, key), expected) in seen.iter().zip(keys) {
        assert_eq!(*key, format!("demo/{id}/{expected}"), "{who}");
    }
    app.drained().await;
    assert!(
        app.stats().iter().all(|stats| stats.completed == 1),
        "{:?}",
        app.stats()
    );
    app.shutdown().await;
}

#[tokio::test]
async fn effects_follow_ups_and_completion_commit_together_and_once() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["book", "after_booking"])).await;
    let orders: Vec<OrderPlaced> = (0..20).map(order).collect();
    app.client().emit_all(&orders).await.unwrap();
    app.drained().await;

    // Odd orders ran twice; what their first attempt inserted and emitted was rolled back.
    assert_eq!(test.bookings().await, (0..20).collect::<Vec<i64>>());
    let mut followed = Vec::new();
    for _ in 0..40 {
        followed.push(test.next().await.1);
    }
    followed.sort_unstable();
    assert_eq!(followed, (0..20).chain(1000..1020).collect::<Vec<u32>>());
    let book = app
        .stats()
        .into_iter()
        .find(|stats| stats.handler == "book")
        .unwrap();
    assert_eq!(
        (book.completed, book.retried, book.dead_lettered),
        (20, 10, 0)
    );
    app.shutdown().await;
    assert!(
        test.saw.try_recv().is_err(),
        "a follow-up was delivered twice"
    );
}

#[tokio::test]
async fn a_returned_event_is_stored_with_the_completion() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["forward", "after_booking"])).await;
    app.client()
        .emit_all(&(0..10).map(order).collect::<Vec<_>>())
        .await
        .unwrap();
    app.drained().await;
    let mut followed = Vec::new();
    for _ in 0..5 {
        followed.push(test.next().await.1);
    }
    followed.sort_unstable();
    assert_eq!(followed, [0, 1, 2, 3, 4]);
    app.shutdown().await;
}

#[tokio::test]
async fn emits_of_a_transaction_commit_or_vanish_with_it() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["first"])).await;
    let pool = test.database.pool().await;

    let mut tx = pool.begin().await.unwrap();
    app.client().emit_in(&mut tx, &order(1)).await.unwrap();
    tx.rollback().await.unwrap();
    let mut tx = app.client().begin().await.unwrap();
    tx.emit(&order(2)).unwrap();
    tx.rollback().await.unwrap();
    let mut tx = app.client().begin().await.unwrap();
    tx.emit(&order(3)).unwrap();
    drop(tx);

    let mut tx = pool.begin().await.unwrap();
    app.client().emit_in(&mut tx, &order(4)).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = app.client().begin().await.unwrap();
    tx.emit_all(&[order(5), order(6)]).unwrap();
    tx.commit().await.unwrap();

    app.drained().await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(test.next().await.1);
    }
    seen.sort_unstable();
    assert_eq!(seen, [4, 5, 6]);
    let logged: i64 = sqlx::query_scalar("select count(*) from core.event_log")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(logged, 3);
    app.shutdown().await;
}

/// A claim begins at the newest message that was claimed, or a little before: only a sweep finds these.
#[tokio::test]
async fn what_commits_late_is_handled_while_newer_events_are() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["first"])).await;
    let client = app.client();
    let mut late = test.database.pool().await.begin().await.unwrap();
    client.emit_in(&mut late, &order(1000)).await.unwrap();
    for round in 0..10_u32 {
        let orders: Vec<OrderPlaced> = (0..50).map(|n| order(round * 50 + n)).collect();
        client.emit_all(&orders).await.unwrap();
        for _ in &orders {
            assert_ne!(test.next().await.1, 1000, "it is not committed yet");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    late.commit().await.unwrap();
    assert_eq!(test.next().await.1, 1000);
    app.drained().await;
    app.shutdown().await;
}

#[tokio::test]
async fn what_follows_inherits_correlation_causation_and_trace() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["forward", "after_booking"])).await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let id = app
        .client()
        .emit(&order(1))
        .correlation_id("checkout-9")
        .traceparent(trace)
        .tracestate("congo=t61")
        .await
        .unwrap();
    let (_, _, facts) = test.next().await;
    assert_eq!(facts.correlation.as_deref(), Some("checkout-9"));
    assert_eq!(facts.causation, Some(id.to_string()));
    assert_eq!(facts.traceparent.as_deref(), Some(trace));
    assert_eq!(facts.tracestate.as_deref(), Some("congo=t61"));

    // Nobody gave one: the first event's id joins all that follows.
    let id = app.client().emit(&order(2)).await.unwrap();
    let (_, _, facts) = test.next().await;
    assert_eq!(facts.correlation, Some(id.to_string()));
    app.shutdown().await;
}

#[tokio::test]
async fn an_event_nobody_wants_is_in_the_log() {
    let test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["after_booking"])).await;
    let id = app.client().emit(&order(1)).await.unwrap();
    let pool = test.database.pool().await;
    let row: (String, String, serde_json::Value) = sqlx::query_as(
        "select event_type, producer_node_id, payload from core.event_log where event_id = $1",
    )
    .bind(id)
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(row.0, "order.placed");
    assert_eq!(row.1, app.node_id());
    assert_eq!(row.2, serde_json::to_value(order(1)).unwrap());
    app.shutdown().await;
}

#[tokio::test]
async fn a_slow_handler_holds_nobody_up() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["slow", "first"])).await;
    app.client()
        .emit_all(&(0..300).map(order).collect::<Vec<_>>())
        .await
        .unwrap();
    // Two of the slow ones are stuck, 298 wait, and the other handler gets everything.
    let mut fast = 0;
    while fast < 300 {
        if test.next().await.0 == "first" {
            fast += 1;
        }
    }
    test.gate.add_permits(300);
    app.drained().await;
    app.shutdown().await;
}

#[tokio::test]
async fn replicas_compete_and_other_apps_get_their_own_copy() {
    let mut test = Test::new().await;
    let one = TestApp::start_on(&test.database, test.app(["first"]).name("shop")).await;
    let two = TestApp::start_on(&test.database, test.app(["first"]).name("shop")).await;
    let other = TestApp::start_on(&test.database, test.app(["first"]).name("warehouse")).await;
    one.client()
        .emit_all(&(0..200).map(order).collect::<Vec<_>>())
        .await
        .unwrap();
    one.drained().await;
    let completed = |app: &TestApp| app.stats()[0].completed;
    assert_eq!(completed(&one) + completed(&two), 200);
    assert_eq!(completed(&other), 200);
    for app in [one, two, other] {
        app.shutdown().await;
    }
    let mut seen = 0;
    while test.saw.try_recv().is_ok() {
        seen += 1;
    }
    assert_eq!(seen, 400);
}

#[tokio::test]
async fn namespaces_are_apart() {
    let mut test = Test::new().await;
    let here = TestApp::start_on(&test.database, test.app(["first"]).namespace("here")).await;
    let there = TestApp::start_on(&test.database, test.app(["first"]).namespace("there")).await;
    here.client().emit(&order(1)).await.unwrap();
    here.drained().await;
    assert_eq!(
        (here.stats()[0].completed, there.stats()[0].completed),
        (1, 0)
    );
    assert_eq!(test.next().await.1, 1);
    here.shutdown().await;
    there.shutdown().await;
}

#[tokio::test]
async fn a_stolen_lease_refuses_the_verdict_and_rolls_back() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["contested"])).await;
    app.client().emit(&order(1)).await.unwrap();
    assert_eq!(test.next().await.0, "contested");
    // Somebody else claims the message while the handler runs.
    let pool = test.database.pool().await;
    sqlx::query("update pgmq.q_core_events_demo set read_ct = read_ct + 1, vt = now()")
        .execute(&pool)
        .await
        .unwrap();
    test.gate.add_permits(2);
    // It runs again, and only that run counts.
    assert_eq!(test.next().await.0, "contested");
    app.drained().await;
    assert_eq!(test.bookings().await, [1]);
    assert_eq!((app.stats()[0].completed, app.stats()[0].lost), (1, 1));
    app.shutdown().await;
}

#[tokio::test]
async fn a_stolen_lease_stops_a_handler_that_still_runs() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(
        &test.database,
        test.app(["contested"]).lease(Duration::from_secs(2)),
    )
    .await;
    app.client().emit(&order(1)).await.unwrap();
    assert_eq!(test.next().await.0, "contested");
    let pool = test.database.pool().await;
    sqlx::query("update pgmq.q_core_events_demo set read_ct = read_ct + 1, vt = now()")
        .execute(&pool)
        .await
        .unwrap();
    // The gate stays shut: the control thread notices, and the message is claimed again.
    assert_eq!(test.next().await.0, "contested");
    test.gate.add_permits(1);
    app.drained().await;
    assert_eq!(test.bookings().await, [1]);
    app.shutdown().await;
}

#[tokio::test]
async fn a_long_handler_keeps_its_lease() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(
        &test.database,
        test.app(["slow"]).lease(Duration::from_secs(1)),
    )
    .await;
    app.client().emit(&order(1)).await.unwrap();
    assert_eq!(test.next().await.0, "slow begins");
    // The lease is extended: more than three of them pass, by the clock of the database.
    let pool = test.database.pool().await;
    let claimed: (i32, i64) = sqlx::query_as(
        "select read_ct, (extract(epoch from vt) * 1000)::bigint from pgmq.q_core_events_demo",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    until("the lease is extended by three of its lengths", || async {
        let vt: i64 = sqlx::query_scalar(
            "select (extract(epoch from vt) * 1000)::bigint from pgmq.q_core_events_demo",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        (vt > claimed.1 + 3_000).then_some(())
    })
    .await;
    test.gate.add_permits(1);
    let (who, _, facts) = test.next().await;
    assert_eq!((who, facts.attempt), ("slow ends", 1));
    app.drained().await;
    app.shutdown().await;
}

#[tokio::test]
async fn a_stopping_node_gives_back_at_once_and_counts_no_attempt() {
    let mut test = Test::new().await;
    let impatient = test
        .app(["slow"])
        .shutdown_timeout(Duration::from_millis(50));
    let app = TestApp::start_on(&test.database, impatient).await;
    app.client()
        .emit_all(&(0..10).map(order).collect::<Vec<_>>())
        .await
        .unwrap();
    assert_eq!(test.next().await.0, "slow begins");
    assert_eq!(test.next().await.0, "slow begins");
    within("the node stops", app.shutdown()).await;

    let pool = test.database.pool().await;
    let waiting: (i64, i64) = sqlx::query_as(
        "select count(*) filter (where vt <= now()), count(*) filter (where headers ? 'attempts')
         from pgmq.q_core_events_demo",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(waiting, (10, 0));
    let nodes: i64 = sqlx::query_scalar("select count(*) from core.nodes")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(nodes, 0, "the node deregistered");

    test.gate.add_permits(10);
    let app = TestApp::start_on(&test.database, test.app(["slow"])).await;
    app.drained().await;
    assert_eq!(app.stats()[0].completed, 10);
    app.shutdown().await;
}

#[tokio::test]
async fn a_stopping_node_lets_running_handlers_finish() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["slow"])).await;
    app.client().emit(&order(1)).await.unwrap();
    assert_eq!(test.next().await.0, "slow begins");
    let stopping = tokio::spawn(app.shutdown());
    test.gate.add_permits(1);
    within("the node stops", stopping).await.unwrap();
    assert_eq!(test.next().await.0, "slow ends");
    let pool = test.database.pool().await;
    let left: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(left, 0, "the message was completed");
}

#[tokio::test]
async fn one_idempotency_key_is_one_event() {
    let mut test = Test::new().await;
    let app = TestApp::start_on(&test.database, test.app(["first"])).await;
    let emits = (0..50).map(|_| {
        let client = app.client().clone();
        tokio::spawn(async move {
            client
                .emit(&order(1))
                .idempotency_key("once")
                .await
                .unwrap()
        })
    });
    let mut ids = Vec::new();
    for emit in emits.collect::<Vec<_>>() {
        ids.push(within("an emit returns", emit).await.unwrap());
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    app.drained().await;
    assert_eq!(app.stats()[0].completed, 1);
    assert_eq!(test.next().await.2.event_id, ids[0]);

    let error = app
        .client()
        .emit(&order(2))
        .idempotency_key("once")
        .await
        .unwrap_err();
    assert!(
        matches!(error, nexus::EmitError::KeyUsedForAnotherEvent { .. }),
        "{error}"
    );
    // A day later the key may be used again.
    test.database.advance(Duration::from_hours(25)).await;
    let later = app
        .client()
        .emit(&order(2))
        .idempotency_key("once")
        .await
        .unwrap();
    assert_ne!(later, ids[0]);
    app.shutdown().await;
}

/// What emits keep at hand for the next one comes back to the pool, for whoever uses that itself.
#[tokio::test]
async fn a_client_that_rests_gives_its_connections_back() {
    let database = TestDatabase::new().await;
    let connected = Database::from_url(database.url(), "the test").unwrap();
    let client = Client::connect(&connected.pool_size(2), "demo")
        .await
        .unwrap();
    assert_eq!(client.pool().options().get_max_connections(), 2);
    client.emit(&order(1)).await.unwrap();
    let both = async {
        let one = client.pool().acquire().await.unwrap();
        let other = client.pool().acquire().await.unwrap();
        (one, other)
    };
    within("the pool lends both", both).await;
}
