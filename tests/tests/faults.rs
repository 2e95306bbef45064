//! What goes wrong beside a handler must not stop, lose or double anything: pools run dry,
//! connections break, savepoints are abandoned, messages have to run alone, servers fall silent.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use nexus::{Client, Database, EmitError, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{Semaphore, mpsc, watch},
};

/// An order to a handler to behave in some way.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.order")]
struct Order {
    number: i64,
    say: String,
}

/// Something that only some handlers want.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.side")]
struct Side {
    number: i64,
}

fn order(number: i64, say: &str) -> Order {
    Order {
        number,
        say: say.to_owned(),
    }
}

fn orders(count: i64) -> Vec<Order> {
    (0..count).map(|number| order(number, "")).collect()
}

type Saw = mpsc::UnboundedSender<(&'static str, i64)>;
type Gate = Arc<Semaphore>;

async fn pass(gate: &Gate) {
    gate.acquire()
        .await
        .expect("the gate is never closed")
        .forget();
}

#[handler(concurrency = 1)]
async fn one_by_one(order: Order, saw: State<Saw>) {
    let _ = saw.send(("one_by_one", order.number));
}

#[handler(group = "others", concurrency = 1)]
async fn one_by_one_elsewhere(order: Order, saw: State<Saw>) {
    let _ = saw.send(("elsewhere", order.number));
}

#[handler]
async fn on_side(side: Side, saw: State<Saw>) {
    let _ = saw.send(("on_side", side.number));
}

/// Keeps a slot for about half a second.
#[handler(concurrency = 50)]
async fn steady(order: Order) {
    tokio::time::sleep(Duration::from_millis(
        300 + order.number.unsigned_abs() * 37 % 400,
    ))
    .await;
}

#[handler(concurrency = 1)]
async fn gated(order: Order, saw: State<Saw>, gate: State<Gate>) {
    let _ = saw.send(("gated", order.number));
    pass(&gate).await;
}

/// Holds a connection for as long as the gate is closed.
#[handler]
async fn holds_a_connection(
    order: Order,
    saw: State<Saw>,
    gate: State<Gate>,
    tx: &mut Tx,
) -> nexus::Result {
    sqlx::query("select 1").execute(&mut **tx).await?;
    let _ = saw.send(("holds", order.number));
    pass(&gate).await;
    Ok(())
}

/// Emits beside its transaction, which takes a second connection.
#[handler(backoff = "fixed(10ms)", max_attempts = 1)]
async fn emits_beside(order: Order, client: Client, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into effects values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    client
        .emit(&Side {
            number: order.number,
        })
        .await?;
    Ok(())
}

#[handler(backoff = "fixed(10ms)", max_attempts = 3)]
async fn uses_savepoints(order: Envelope<Order>, tx: &mut Tx) -> nexus::Result {
    async fn insert(connection: &mut PgConnection, number: i64) -> sqlx::Result<()> {
        sqlx::query("insert into effects values ($1)")
            .bind(number)
            .execute(connection)
            .await
            .map(drop)
    }
    insert(tx, order.number).await?;
    let first = order.attempt() == 1;
    match order.say.as_str() {
        "commit" => {
            let mut savepoint = tx.begin().await?;
            insert(&mut savepoint, order.number + 100).await?;
            savepoint.commit().await?;
        }
        "drop" => {
            let mut savepoint = tx.begin().await?;
            insert(&mut savepoint, order.number + 200).await?;
        }
        "forget" if first => mem::forget(tx.begin().await?),
        "cancel" if first => {
            cancel_a_begin(tx).await;
        }
        _ => {}
    }
    Ok(())
}

/// Begins a savepoint and drops the future when its statement is on its way.
async fn cancel_a_begin(connection: &mut PgConnection) {
    // A server that answers at once is asked again.
    while let Ok(begun) = tokio::time::timeout(Duration::ZERO, connection.begin()).await {
        begun.unwrap().commit().await.unwrap();
    }
}

/// Violates a constraint that is checked at the commit.
#[handler(backoff = "fixed(10ms)", max_attempts = 2)]
async fn violates_at_commit(order: Order, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into deferred values ($1), ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Its commit takes longer than its timeout.
#[handler(backoff = "fixed(10ms)", max_attempts = 2, timeout = "200ms")]
async fn commits_slowly(order: Order, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into slow values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Emits more events than one statement stores.
#[handler(max_attempts = 1)]
async fn emits_thousands(order: Order, tx: &mut Tx) -> nexus::Result<Emit<Side>> {
    let sides: Vec<Side> = (0..order.number).map(|number| Side { number }).collect();
    tx.emit_all(&sides)?;
    Ok(Emit(Side {
        number: order.number,
    }))
}

/// Returns nearly a megabyte; many such attempts end together.
#[handler(concurrency = 20, max_attempts = 1)]
async fn returns_much(order: Order, gate: State<Gate>) -> Emit<Weight> {
    pass(&gate).await;
    Emit(Weight {
        number: order.number,
        ballast: "x".repeat(900_000),
    })
}

/// Something heavy that nobody wants.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.weight")]
struct Weight {
    number: i64,
    ballast: String,
}

/// Returns an event that is over the limit.
#[handler(max_attempts = 1)]
async fn returns_too_much(order: Order) -> Option<Emit<Order>> {
    (order.say != "enough").then(|| {
        Emit(Order {
            say: "x".repeat(5_000),
            ..order
        })
    })
}

/// JSON that Postgres refuses: no numeric is that large.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.huge")]
struct Huge {
    #[serde(serialize_with = "huge")]
    number: f64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it like this"
)]
fn huge<S: serde::Serializer>(_: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    let text = serde_json::value::RawValue::from_string("1e200000".to_owned());
    text.expect("it is JSON").serialize(serializer)
}

#[handler(max_attempts = 2, backoff = "fixed(10ms)")]
async fn returns_what_is_refused(_order: Order) -> Emit<Huge> {
    Emit(Huge { number: 0.0 })
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

#[handler(
    concurrency = 1,
    max_attempts = 2,
    backoff = "fixed(10ms)",
    timeout = "50ms"
)]
async fn panics_when_dropped(order: Order, saw: State<Saw>) {
    if order.say == "hang" {
        let _bomb = PanicsWhenDropped;
        std::future::pending::<()>().await;
    }
    let _ = saw.send(("survivor", order.number));
}

#[handler(backoff = "fixed(10ms)", max_attempts = 1000, concurrency = 8)]
async fn has_an_effect(order: Order, tx: &mut Tx) -> nexus::Result<Emit<Side>> {
    sqlx::query("insert into effects values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    Ok(Emit(Side {
        number: order.number,
    }))
}

#[handler]
async fn counts_sides(side: Side, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into sides values ($1)")
        .bind(side.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler(group = "newcomer")]
async fn newcomer(order: Envelope<Order>, saw: State<Saw>) {
    let _ = saw.send(("newcomer", order.number));
}

/// Runs until it is told to stop, whatever happens to the database.
#[handler]
async fn endless(order: Order, saw: State<Saw>, tx: &mut Tx) -> nexus::Result {
    let _ = saw.send(("endless", order.number));
    sqlx::query("select pg_sleep(600)")
        .execute(&mut **tx)
        .await?;
    Ok(())
}

struct Test {
    database: TestDatabase,
    pool: PgPool,
    sender: Saw,
    saw: mpsc::UnboundedReceiver<(&'static str, i64)>,
    gate: Gate,
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let pool = database.pool().await;
        for table in [
            "create table effects (number bigint)",
            "create table sides (number bigint)",
            "create table deferred (number bigint unique deferrable initially deferred)",
        ] {
            sqlx::query(table).execute(&pool).await.unwrap();
        }
        let (sender, saw) = mpsc::unbounded_channel();
        Self {
            database,
            pool,
            sender,
            saw,
            gate: Arc::new(Semaphore::new(0)),
        }
    }

    fn app<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> App {
        App::discover()
            .only(handlers)
            .database_url(self.database.url())
            .idle_poll(Duration::from_millis(25))
            .state(self.sender.clone())
            .state(Arc::clone(&self.gate))
    }

    async fn next(&mut self) -> (&'static str, i64) {
        within("a handler runs", self.saw.recv())
            .await
            .expect("the sender is kept")
    }

    async fn numbers(&self, table: &str) -> Vec<i64> {
        let text = format!("select number from {table} order by 1");
        sqlx::query_scalar(sqlx::AssertSqlSafe(text))
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }

    async fn client(&self) -> Client {
        let database = Database::from_url(self.database.url(), "the test").unwrap();
        Client::connect(&database, "demo").await.unwrap()
    }

    /// Subscribes the handlers and emits while nobody runs.
    async fn prepare<'a>(&self, handlers: impl IntoIterator<Item = &'a str>, events: &[Order]) {
        nexus::start(self.app(handlers))
            .await
            .unwrap()
            .shutdown()
            .await;
        self.client().await.emit_all(events).await.unwrap();
    }
}

async fn stop(app: nexus::Handle) {
    within("the node stops", app.shutdown()).await;
}

#[tokio::test]
async fn a_message_that_has_to_run_alone_waits_for_its_neighbours_and_they_for_it() {
    let mut test = Test::new().await;
    let handlers = ["one_by_one", "one_by_one_elsewhere"];
    test.prepare(handlers, &orders(200)).await;
    for queue in ["q_core_events_demo", "q_core_events_demo__others"] {
        let statement = format!(
            "update pgmq.{queue} set read_ct = 3, headers = headers || '{{\"abandoned\": 2}}' where msg_id in (5, 150)"
        );
        sqlx::query(sqlx::AssertSqlSafe(statement))
            .execute(&test.pool)
            .await
            .unwrap();
    }
    let app = nexus::start(test.app(handlers)).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    assert!(
        app.stats().iter().all(|stats| stats.completed == 200),
        "{:?}",
        app.stats()
    );
    stop(app).await;
    let mut runs = 0;
    while test.saw.try_recv().is_ok() {
        runs += 1;
    }
    assert_eq!(runs, 400);
}

#[tokio::test]
async fn a_busy_handler_is_not_slowed_to_the_poll_by_an_idle_one() {
    let test = Test::new().await;
    test.prepare(["one_by_one", "on_side"], &orders(3_000))
        .await;
    let app = nexus::start(test.app(["one_by_one", "on_side"]).batch_size(5))
        .await
        .unwrap();
    let begun = Instant::now();
    within("all is settled", app.idle()).await.unwrap();
    // A batch for each poll would take half a minute.
    assert!(
        begun.elapsed() < Duration::from_secs(12),
        "{:?}",
        begun.elapsed()
    );
    stop(app).await;
}

#[tokio::test]
async fn an_idle_handler_is_polled_for_while_another_is_busy() {
    let mut test = Test::new().await;
    test.prepare(["steady", "on_side"], &orders(1_000)).await;
    let app = test
        .app(["steady", "on_side"])
        .batch_size(1_000)
        .idle_poll(Duration::from_millis(250));
    let app = nexus::start(app.shutdown_timeout(Duration::ZERO))
        .await
        .unwrap();
    until("the other handler is busy", || async {
        (app.stats().iter().any(|stats| stats.completed > 100)).then_some(())
    })
    .await;
    // Rings no bell.
    sqlx::query("select core.emit('demo', 'fault.side', '{\"number\": 7}')")
        .execute(&test.pool)
        .await
        .unwrap();
    let begun = Instant::now();
    assert_eq!(test.next().await, ("on_side", 7));
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    stop(app).await;
}

#[tokio::test]
async fn what_a_busy_node_has_no_slot_for_another_node_runs() {
    let mut test = Test::new().await;
    test.prepare(["gated"], &orders(2)).await;
    let one = nexus::start(test.app(["gated"])).await.unwrap();
    let first = test.next().await;
    let two = nexus::start(test.app(["gated"])).await.unwrap();
    let second = test.next().await;
    assert_ne!(first, second);
    test.gate.add_permits(2);
    // Each node counts what it has stored itself.
    within("all is settled", one.idle()).await.unwrap();
    within("all is settled", two.idle()).await.unwrap();
    assert_eq!((one.stats()[0].completed, two.stats()[0].completed), (1, 1));
    stop(one).await;
    stop(two).await;
}

#[tokio::test]
async fn a_node_whose_runtime_has_ended_holds_nothing() {
    let mut test = Test::new().await;
    let app = test.app(["gated"]).lease(Duration::from_secs(1));
    let (started, is_started) = tokio::sync::oneshot::channel();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let app = nexus::start(app).await.unwrap();
            app.client().emit(&order(1, "")).await.unwrap();
            // Dropped without a shutdown, the node goes on until the runtime ends.
            drop(app);
        });
        started.send(()).unwrap();
        ended.recv().unwrap();
    });
    within("the node starts", is_started).await.unwrap();
    assert_eq!(test.next().await, ("gated", 1));
    end.send(()).unwrap();
    thread.join().unwrap();
    let app = nexus::start(test.app(["gated"])).await.unwrap();
    assert_eq!(test.next().await, ("gated", 1));
    test.gate.add_permits(1);
    within("all is settled", app.idle()).await.unwrap();
    stop(app).await;
}

#[tokio::test]
async fn handlers_that_hold_every_connection_do_not_hold_up_the_node() {
    let mut test = Test::new().await;
    let app = test
        .app(["holds_a_connection", "on_side", "on_tick"])
        .pool_size(2);
    let app = nexus::start(app).await.unwrap();
    let client = test.client().await;
    client.emit_all(&orders(8)).await.unwrap();
    assert_eq!(test.next().await.0, "holds");
    // Everything else goes on: other handlers are settled, ticks fire, foreign messages are adopted.
    client.emit(&Side { number: 1 }).await.unwrap();
    sqlx::query(
        "select pgmq.send('core_events_demo', '{\"eventType\": \"fault.side\", \"payload\": {\"number\": 2}, \"emittedAt\": \"2026-01-01T00:00:00Z\"}')",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    let completed = |app: &nexus::Handle, name: &str| {
        app.stats()
            .iter()
            .find(|stats| stats.handler == name)
            .map_or(0, |stats| stats.completed)
    };
    until("the others are settled", || async {
        (completed(&app, "on_side") == 2 && completed(&app, "on_tick") > 0).then_some(())
    })
    .await;
    test.gate.add_permits(8);
    until("all are settled", || async {
        (completed(&app, "holds_a_connection") == 8).then_some(())
    })
    .await;
    assert!(
        app.stats()
            .iter()
            .all(|stats| stats.retried + stats.snoozed == 0),
        "{:?}",
        app.stats()
    );
    stop(app).await;
}

#[cron("* * * * * *")]
async fn on_tick() {}

#[tokio::test]
async fn handlers_that_emit_beside_their_transaction_do_not_starve_each_other() {
    let test = Test::new().await;
    let app = test.app(["emits_beside", "counts_sides"]).pool_size(2);
    let app = nexus::start(app).await.unwrap();
    test.client().await.emit_all(&orders(50)).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    assert!(
        app.client()
            .dead_letters("default", 100)
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(test.numbers("effects").await, (0..50).collect::<Vec<i64>>());
    assert_eq!(test.numbers("sides").await, (0..50).collect::<Vec<i64>>());
    stop(app).await;
}

#[tokio::test]
async fn savepoints_that_are_dropped_forgotten_or_cancelled_lose_nothing() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["uses_savepoints"])).await.unwrap();
    let says = ["", "commit", "drop", "forget", "cancel"];
    let events: Vec<Order> = (0..)
        .zip(says)
        .map(|(number, say)| order(number, say))
        .collect();
    app.client().emit_all(&events).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(test.numbers("effects").await, [0, 1, 2, 3, 4, 101]);
    stop(app).await;
}

#[tokio::test]
async fn a_transaction_that_has_ended_unnoticed_is_not_committed() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["on_side"])).await.unwrap();
    let client = app.client();
    for cancelled in [true, false] {
        let mut tx = client.begin().await.unwrap();
        sqlx::query("insert into effects values (1)")
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.emit(&Side { number: 1 }).unwrap();
        if cancelled {
            cancel_a_begin(&mut tx).await;
        } else {
            mem::forget(tx.begin().await.unwrap());
        }
        let refused = tx.commit().await;
        assert!(matches!(refused, Err(EmitError::Commit(_))), "{refused:?}");
    }
    let logged: i64 = sqlx::query_scalar("select count(*) from core.event_log")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    assert_eq!((logged, test.numbers("effects").await), (0, vec![]));
    stop(app).await;
}

#[tokio::test]
async fn a_violation_that_shows_at_the_commit_is_a_failed_attempt() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["violates_at_commit"]))
        .await
        .unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].attempts, 2);
    let error = letters[0].error.as_deref().unwrap();
    assert!(error.contains("deferred_number_key"), "{error}");
    stop(app).await;
}

#[tokio::test]
async fn a_commit_that_takes_longer_than_the_timeout_is_a_failed_attempt() {
    let test = Test::new().await;
    sqlx::raw_sql(
        "create table slow (number bigint);
         create function sleep() returns trigger language plpgsql as
             $$ begin perform pg_sleep(30); return null; end $$;
         create constraint trigger slow after insert on slow deferrable initially deferred
             for each row execute function sleep()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    let app = nexus::start(test.app(["commits_slowly"])).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    stop(app).await;
}

/// From now on notes how much each statement appends to the log.
async fn weigh_statements(test: &Test) {
    sqlx::raw_sql(
        "create table rows (number bigint);
         create table bytes (number bigint);
         create function weigh() returns trigger language plpgsql as $$ begin
             insert into public.rows select count(*) from stored;
             insert into public.bytes select coalesce(sum(octet_length(payload::text)), 0) from stored;
             return null;
         end $$;
         create trigger weighs after insert on core.event_log
             referencing new table as stored for each statement execute function weigh()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn what_a_transaction_emits_is_stored_in_statements_of_bounded_size() {
    let test = Test::new().await;
    test.prepare(["emits_thousands"], &[order(2_500, "")]).await;
    weigh_statements(&test).await;
    let app = nexus::start(test.app(["emits_thousands"])).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(app.stats()[0].completed, 1, "{:?}", app.stats());
    stop(app).await;
    let rows = test.numbers("rows").await;
    assert!(rows.iter().all(|rows| *rows <= 1_000), "{rows:?}");
    let stored: Vec<i64> = sqlx::query_scalar(
        "select (payload ->> 'number')::bigint from core.event_log
         where event_type = 'fault.side' order by event_id",
    )
    .fetch_all(&test.pool)
    .await
    .unwrap();
    assert_eq!(stored, (0..=2_500).collect::<Vec<i64>>());
}

#[tokio::test]
async fn what_many_handlers_return_is_stored_in_statements_of_bounded_size() {
    let test = Test::new().await;
    test.prepare(["returns_much"], &orders(20)).await;
    weigh_statements(&test).await;
    let app = nexus::start(test.app(["returns_much"])).await.unwrap();
    until("all are claimed", || async {
        let claimed: i64 =
            sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo where read_ct > 0")
                .fetch_one(&test.pool)
                .await
                .unwrap();
        (claimed == 20).then_some(())
    })
    .await;
    test.gate.add_permits(20);
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(app.stats()[0].completed, 20, "{:?}", app.stats());
    stop(app).await;
    let bytes = test.numbers("bytes").await;
    assert!(
        bytes.iter().all(|bytes| *bytes <= 8 * 1024 * 1024),
        "{bytes:?}"
    );
    assert_eq!(test.numbers("rows").await.iter().sum::<i64>(), 20);
}

#[tokio::test]
async fn what_cannot_be_stored_is_refused_before_it_aborts_a_transaction() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["on_side"])).await.unwrap();
    let client = app.client();
    let mut tx = test.pool.begin().await.unwrap();
    let event = order(1, "");
    let bad = "a\0b";
    for refused in [
        client.emit_in(&mut tx, &event).correlation_id(bad).await,
        client.emit_in(&mut tx, &event).traceparent(bad).await,
        client.emit_in(&mut tx, &event).idempotency_key(bad).await,
        client
            .emit_in(&mut tx, &event)
            .idempotency_key("x".repeat(5_000))
            .await,
    ] {
        assert!(matches!(refused, Err(EmitError::Encode(_))), "{refused:?}");
    }
    // The transaction goes on.
    client.emit_in(&mut tx, &event).await.unwrap();
    tx.commit().await.unwrap();
    stop(app).await;
}

#[tokio::test]
async fn a_returned_event_over_the_limit_is_refused_like_any_other() {
    let test = Test::new().await;
    let app = test.app(["returns_too_much"]).max_payload_bytes(1_000);
    let app = nexus::start(app).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    let error = letters[0].error.as_deref().unwrap();
    assert!(error.contains("the limit is 1000"), "{error}");
    stop(app).await;
}

#[tokio::test]
async fn a_returned_event_that_the_server_refuses_is_a_failed_attempt() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["returns_what_is_refused"]))
        .await
        .unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    stop(app).await;
}

#[tokio::test]
async fn a_panic_while_a_handler_is_dropped_is_a_failed_attempt() {
    let mut test = Test::new().await;
    let app = nexus::start(test.app(["panics_when_dropped"]))
        .await
        .unwrap();
    app.client().emit(&order(1, "hang")).await.unwrap();
    app.client().emit(&order(2, "")).await.unwrap();
    assert_eq!(test.next().await, ("survivor", 2));
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    stop(app).await;
}

#[tokio::test]
async fn a_handler_that_starts_amid_emits_gets_each_event_once() {
    let mut test = Test::new().await;
    let emitter = nexus::start(test.app(["on_side"])).await.unwrap();
    let stopped = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..4)
        .map(|task| {
            let (client, stopped, pool) = (
                emitter.client().clone(),
                Arc::clone(&stopped),
                test.pool.clone(),
            );
            tokio::spawn(async move {
                let mut number = task * 1_000_000;
                while !stopped.load(Ordering::Relaxed) {
                    number += 1;
                    let event = order(number, "");
                    match number % 3 {
                        0 => drop(client.emit(&event).await.unwrap()),
                        1 => {
                            let mut tx = client.begin().await.unwrap();
                            tx.emit(&event).unwrap();
                            tx.commit().await.unwrap();
                        }
                        _ => {
                            let mut tx = pool.begin().await.unwrap();
                            sqlx::query("set transaction isolation level repeatable read")
                                .execute(&mut *tx)
                                .await
                                .unwrap();
                            client.emit_in(&mut tx, &event).await.unwrap();
                            tx.commit().await.unwrap();
                        }
                    }
                }
                number
            })
        })
        .collect();
    let logged = || async {
        sqlx::query_scalar::<_, i64>("select count(*) from core.event_log")
            .fetch_one(&test.pool)
            .await
            .unwrap()
    };
    until("emits are under way", || async {
        (logged().await > 200).then_some(())
    })
    .await;
    let node = nexus::start(test.app(["newcomer"])).await.unwrap();
    // Committed after the registration, so owed for certain.
    let since: i64 = sqlx::query_scalar("select max(event_id) from core.event_log")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    let enough = logged().await + 500;
    until("emits go on", || async {
        (logged().await > enough).then_some(())
    })
    .await;
    stopped.store(true, Ordering::Relaxed);
    for task in tasks {
        within("the emitter ends", task).await.unwrap();
    }
    let owed: Vec<i64> = sqlx::query_scalar(
        "select (payload ->> 'number')::bigint from core.event_log
         where event_type = 'fault.order' and event_id > $1 + 10",
    )
    .bind(since)
    .fetch_all(&test.pool)
    .await
    .unwrap();
    until("the cut is settled", || async {
        let unsettled: i64 = sqlx::query_scalar(
            "select count(*) from core.subscriptions where since_snapshot is not null",
        )
        .fetch_one(&test.pool)
        .await
        .unwrap();
        (unsettled == 0).then_some(())
    })
    .await;
    within("all is settled", node.idle()).await.unwrap();
    let mut seen: HashMap<i64, usize> = HashMap::new();
    while let Ok((_, number)) = test.saw.try_recv() {
        *seen.entry(number).or_default() += 1;
    }
    assert!(
        seen.values().all(|times| *times == 1),
        "an event was delivered twice"
    );
    let missing: Vec<&i64> = owed
        .iter()
        .filter(|number| !seen.contains_key(number))
        .collect();
    assert!(
        missing.is_empty(),
        "{} of {} are missing",
        missing.len(),
        owed.len()
    );
    stop(node).await;
    stop(emitter).await;
}

#[tokio::test]
async fn connections_that_break_at_random_lose_and_double_nothing() {
    let test = Test::new().await;
    let app = test
        .app(["has_an_effect", "counts_sides"])
        .lease(Duration::from_secs(2));
    let app = nexus::start(app).await.unwrap();
    test.client().await.emit_all(&orders(1_500)).await.unwrap();
    let mut broken = 0_u64;
    while broken < 60 {
        let gone: i64 = sqlx::query_scalar(
            "select count(pg_terminate_backend(pid)) from (
                 select pid from pg_stat_activity
                 where datname = current_database() and application_name = 'nexus'
                 order by random() limit 2) a",
        )
        .fetch_one(&test.pool)
        .await
        .unwrap();
        broken += gone.unsigned_abs();
        tokio::task::yield_now().await;
    }
    // The connection that asks may be one of the broken ones.
    until("all is settled", || async { app.idle().await.ok() }).await;
    assert_eq!(
        test.numbers("effects").await,
        (0..1_500).collect::<Vec<i64>>()
    );
    assert_eq!(
        test.numbers("sides").await,
        (0..1_500).collect::<Vec<i64>>()
    );
    stop(app).await;
}

#[tokio::test]
async fn peeks_of_the_original_system_take_nothing_away() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["has_an_effect", "counts_sides"]))
        .await
        .unwrap();
    let client = test.client().await;
    let peeks = async {
        loop {
            sqlx::query("select * from pgmq.read('core_events_demo', 0, 10)")
                .execute(&test.pool)
                .await
                .unwrap();
        }
    };
    let work = async {
        for chunk in orders(600).chunks(20) {
            client.emit_all(chunk).await.unwrap();
        }
        within("all is settled", app.idle()).await.unwrap();
    };
    tokio::select! {
        () = peeks => {}
        () = work => {}
    }
    assert_eq!(
        test.numbers("effects").await,
        (0..600).collect::<Vec<i64>>()
    );
    assert_eq!(test.numbers("sides").await, (0..600).collect::<Vec<i64>>());
    assert!(
        app.client()
            .dead_letters("default", 10)
            .await
            .unwrap()
            .is_empty()
    );
    stop(app).await;
}

/// Passes connections on to the test's server until it is told to fall silent or to refuse.
struct Proxy {
    url: String,
    state: watch::Sender<Line>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Up,
    /// Connections stay open and nothing comes through.
    Silent,
    /// Connections are broken and refused.
    Down,
}

impl Proxy {
    async fn new(database: &TestDatabase) -> Self {
        let target: sqlx::postgres::PgConnectOptions = database.url().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (_, rest) = database.url().split_once("://").expect("it is a URL");
        let (account, _) = rest.split_once('@').expect("the URL names a user");
        let name = target.get_database().expect("the URL names a database");
        let url = format!("postgres://{account}@127.0.0.1:{port}/{name}?sslmode=disable");
        let (state, watched) = watch::channel(Line::Up);
        tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                tokio::spawn(pass_on(from, target.clone(), watched.clone()));
            }
        });
        Self { url, state }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn pass_on(
    mut from: TcpStream,
    target: sqlx::postgres::PgConnectOptions,
    mut line: watch::Receiver<Line>,
) {
    let mut state = *line.borrow_and_update();
    while state == Line::Silent {
        // Held open until something changes.
        if line.changed().await.is_err() {
            return;
        }
        state = *line.borrow_and_update();
    }
    if state == Line::Down {
        return;
    }
    let changed = async {
        let _ = line.changed().await;
        *line.borrow_and_update()
    };
    let mut to: Box<dyn Stream> = if let Some(folder) = target.get_socket() {
        let path = folder.join(format!(".s.PGSQL.{}", target.get_port()));
        Box::new(UnixStream::connect(path).await.unwrap())
    } else {
        let address = (target.get_host(), target.get_port());
        Box::new(TcpStream::connect(address).await.unwrap())
    };
    let state = tokio::select! {
        _ = copy_bidirectional(&mut from, &mut to) => return,
        state = changed => state,
    };
    if state == Line::Silent {
        // Both ends stay open, and nothing is read any more.
        let _ = line.changed().await;
    }
}

async fn stops_although_the_database_is(line: Line) {
    let mut test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let app = test
        .app(["endless", "gated"])
        .database_url(&proxy.url)
        .lease(Duration::from_secs(3))
        .shutdown_timeout(Duration::from_millis(500));
    let app = nexus::start(app).await.unwrap();
    app.client().emit_all(&orders(5)).await.unwrap();
    for _ in 0..6 {
        test.next().await;
    }
    proxy.state.send(line).unwrap();
    // The handler without a transaction ends, and its verdict has nowhere to go.
    test.gate.add_permits(1);
    let begun = Instant::now();
    stop(app).await;
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_verdict_whose_answer_was_lost_is_not_counted_as_lost() {
    let mut test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let app = test.app(["gated"]).database_url(&proxy.url);
    let app = nexus::start(app).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    test.next().await;
    sqlx::raw_sql(
        "create function sleep() returns trigger language plpgsql as
             $$ begin perform pg_sleep(0.5); return old; end $$;
         create trigger slow before delete on pgmq.q_core_events_demo
             for each row execute function sleep()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    test.gate.add_permits(1);
    until("the verdict is being stored", || async {
        let sleeping: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event = 'PgSleep'",
        )
        .fetch_one(&test.pool)
        .await
        .unwrap();
        (sleeping == 1).then_some(())
    })
    .await;
    // The server stores it, and can tell nobody.
    proxy.state.send(Line::Down).unwrap();
    until("the verdict is stored", || async {
        let left: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo")
            .fetch_one(&test.pool)
            .await
            .unwrap();
        (left == 0).then_some(())
    })
    .await;
    proxy.state.send(Line::Up).unwrap();
    until("the node is idle", || async { app.idle().await.ok() }).await;
    assert_eq!(app.stats()[0].lost, 0, "{:?}", app.stats());
    stop(app).await;
}

#[tokio::test]
async fn stops_although_the_database_is_silent() {
    stops_although_the_database_is(Line::Silent).await;
}

#[tokio::test]
async fn stops_although_the_database_is_down() {
    stops_although_the_database_is(Line::Down).await;
}
