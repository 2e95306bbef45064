//! What goes wrong beside a handler must not stop, lose or double anything.
//!
//! - [`sharing`]: handlers, nodes and pools that get in each other's way,
//! - [`transactions`]: transactions that end otherwise than planned,
//! - [`limits`]: what is too large, or refused by the server,
//! - [`connections`]: connections that break or fall silent, by way of a [`proxy`],
//! - [`conflicts`]: deadlocks, serialization failures, and errors that a handler keeps to itself,
//! - [`failover`]: a server that takes no writes, or is not there yet,
//! - [`fencing`]: what a worker cannot do any more that has lost its lease,
//! - [`horizon`]: whoever keeps the server from cleaning up,
//! - [`liveness`]: nodes that are busy, blocked or dead,
//! - [`panics`]: panics of nexus itself,
//! - [`races`]: who comes or looks while events flow,
//! - [`collecting`]: the figures of the namespace.

mod collecting;
mod conflicts;
mod connections;
mod failover;
mod fencing;
mod horizon;
mod limits;
mod liveness;
mod panics;
mod proxy;
mod races;
mod sharing;
mod transactions;

use std::{sync::Arc, time::Duration};

use nexus::{Client, Database, prelude::*, testing::TestDatabase};
use nexus_tests::within;
use sqlx::PgPool;
use tokio::sync::{Semaphore, mpsc};

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

#[handler]
async fn on_side(side: Side, saw: State<Saw>) {
    let _ = saw.send(("on_side", side.number));
}

#[handler(concurrency = 1)]
async fn gated(order: Order, saw: State<Saw>, gate: State<Gate>) {
    let _ = saw.send(("gated", order.number));
    pass(&gate).await;
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
