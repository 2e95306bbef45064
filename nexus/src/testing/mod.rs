//! The test kit (feature `testing`): your app, on a real Postgres, in a test.
//!
//! ```toml
//! [dev-dependencies]
//! nexus = { version = "0.1", features = ["testing"] }
//! ```
//!
//! A test starts an app on a database of its own, emits, waits until everything that follows has
//! settled, and looks at what came of it:
//!
//! ```standalone_crate
//! use nexus::{prelude::*, testing::TestApp};
//!
//! #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! #[event(type = "user.created")]
//! struct UserCreated { email: String }
//!
//! #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! #[event(type = "mail.sent")]
//! struct MailSent { to: String }
//!
//! #[handler]
//! async fn send_welcome(user: UserCreated) -> Emit<MailSent> {
//!     Emit(MailSent { to: user.email })
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> nexus::Result { a_new_user_is_welcomed().await }
//! # /*
//! #[tokio::test]
//! # */
//! async fn a_new_user_is_welcomed() -> nexus::Result {
//!     let app = TestApp::start(App::discover().only(["send_welcome"])).await;
//!     app.client().emit(&UserCreated { email: "ada@example.org".into() }).await?;
//!     app.settled().await;
//!     assert_eq!(app.only_emitted::<MailSent>().await.to, "ada@example.org");
//!     Ok(())
//! }
//! ```
//!
//! Nothing is mocked: the handler ran in a worker, its event went through the log and the queue. What
//! the kit finds wrong is a panic whose text begins with the file and line of the test.
//!
//! # Contents
//!
//! 1. [Where tests run](#where-tests-run)
//! 2. [What was emitted](#what-was-emitted)
//! 3. [Waiting](#waiting)
//! 4. [Time](#time)
//! 5. [One handler alone](#one-handler-alone)
//! 6. [Attempts, dead letters, ticks](#attempts-dead-letters-ticks)
//! 7. [Failing and crashing](#failing-and-crashing)
//! 8. [Without a database](#without-a-database)
//!
//! # Where tests run
//!
//! On the server of `CORE_DATABASE_URL` or `DATABASE_URL` if one is set, whose role must be allowed to
//! create databases; else on an embedded one that all tests of the machine share, and that stops by
//! itself. It is another one than that of `cargo run`. Each test gets a database, copied from a template
//! that is migrated once per server and schema. Nothing but databases named `nexus_t_…` is touched, so
//! tests run beside a database in use; they run in parallel, in one process or in one each (nextest). What
//! a test leaves behind, even one that was killed, is dropped by a later one.
//!
//! [`TestDatabase`] is the database alone, for tests of your own SQL or of a start that fails.
//! [`TestApp::start_on`] starts an app on one, with tables of yours in it, or several nodes:
//!
//! ```standalone_crate
//! use nexus::{prelude::*, testing::{TestApp, TestDatabase}};
//! # #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! # #[event(type = "order.placed")]
//! # struct OrderPlaced { order_id: i64 }
//!
//! #[handler]
//! async fn book(order: OrderPlaced, tx: &mut Tx) -> nexus::Result {
//!     sqlx::query("insert into bookings values ($1)")
//!         .bind(order.order_id)
//!         .execute(&mut *tx)
//!         .await?;
//!     Ok(())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> nexus::Result {
//! let database = TestDatabase::new().await;
//! sqlx::query("create table bookings (order_id bigint)").execute(&database.pool().await).await?;
//! let one = TestApp::start_on(&database, App::discover()).await;
//! let two = TestApp::start_on(&database, App::discover()).await;
//! one.client().emit(&OrderPlaced { order_id: 7 }).await?;
//! two.settled().await; // all that is in the database
//! let booked: Vec<i64> = sqlx::query_scalar("select * from bookings").fetch_all(one.pool()).await?;
//! assert_eq!(booked, [7]);
//! # Ok(())
//! # }
//! ```
//!
//! # What was emitted
//!
//! [`TestApp::emitted`] has all events of a type, in order, as [`Emitted`]: the event, its id, its time,
//! what it follows from. [`TestApp::only_emitted`] expects exactly one, and says what there is instead.
//!
//! # Waiting
//!
//! [`TestApp::settled`] waits until nothing is due and nothing runs, in the whole database: messages,
//! those of foreign programs, ticks, delayed emits, what new subscriptions are owed. Retries and snoozes
//! that wait for a later time are left alone. [`TestApp::drained`] moves the clock to them as well, until
//! nothing is left. Both give up after two minutes, or five while attempts go on;
//! [`TestApp::settled_within`] after a time of your own. The text of [`NotSettled`] says what is still open
//! and why: which handler runs for how long on which node, at which attempt, after which error; which lease
//! a dead node holds; which version no node runs.
//!
//! Never sleep in a test: wait for what should happen, and move the clock for what should come later.
//!
//! # Time
//!
//! Everything in nexus goes by the clock of the database, and the kit moves it:
//!
//! ```standalone_crate
//! use std::time::Duration;
//! use nexus::{prelude::*, testing::TestApp};
//!
//! #[cron("@hourly")]
//! async fn cleanup() {}
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let app = TestApp::start(App::discover()).await;
//! app.advance(Duration::from_secs(3_600)).await;
//! app.settled().await;
//! assert_eq!(app.ticks("cleanup").await.len(), 1);
//!
//! // The half day after New Year, hour by hour.
//! app.travel_to("2031-01-01T00:00:00Z".parse().unwrap()).await;
//! app.settled().await; // a long outage, which is made up for once
//! let before = app.ticks("cleanup").await.len();
//! app.live_through(Duration::from_secs(12 * 3_600)).await;
//! assert_eq!(app.ticks("cleanup").await.len() - before, 12);
//! # }
//! ```
//!
//! [`TestApp::advance`] and [`TestApp::travel_to`] leap, however far, in milliseconds. What came due on
//! the way is due now, as after an outage of that length: of ticks that were missed the misfire policy
//! of their task decides. [`TestApp::live_through`] stops at each moment at which something is due.
//! Leases of handlers that run move along, so no leap takes a message from them.
//! [`TestApp::freeze`] stops the clock. The clock of the process (`Timestamp::now`, timeouts of handlers)
//! does not move: where your own code takes the time from the database (`core.now()`) or from the
//! envelope, tests can move it.
//!
//! # One handler alone
//!
//! [`TestApp::run_handler`] calls one handler with an envelope that you shape, without worker and queue,
//! and returns how the attempt would end. [`TestApp::rehearse_handler`] rolls back what it did:
//!
//! ```standalone_crate
//! use std::time::Duration;
//! use nexus::{prelude::*, testing::{Ended, TestApp, TestEnvelope}};
//! # #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! # #[event(type = "order.placed")]
//! # struct OrderPlaced { amount: i64 }
//! # struct Limit(i64);
//!
//! #[handler(max_attempts = 3)]
//! async fn charge(order: OrderPlaced, limit: State<Limit>) -> nexus::Result {
//!     if order.amount > limit.0 {
//!         return Err(Error::snooze(Duration::from_secs(60)));
//!     }
//!     Err("the card was refused".into())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let app = TestApp::without_workers(App::discover().state(Limit(100))).await;
//!
//! let big = TestEnvelope::of(&OrderPlaced { amount: 500 });
//! let ran = app.run_handler("charge", big).await;
//! assert_eq!(ran.ended, Ended::Snoozed { after: Duration::from_secs(60) });
//!
//! let last = TestEnvelope::of(&OrderPlaced { amount: 50 }).attempt(3);
//! let ran = app.run_handler("charge", last).await;
//! assert!(matches!(ran.ended, Ended::DeadLettered { .. }));
//! assert_eq!(ran.error(), Some("the card was refused"));
//! # }
//! ```
//!
//! [`TestApp::without_workers`] starts an app whose handlers run only when they are told to.
//!
//! # Attempts, dead letters, ticks
//!
//! [`TestApp::attempts`] has every call that a node made of a handler, and how it [`Ended`];
//! [`TestApp::dead_letters`] and [`TestApp::only_dead_letter`] what was given up;
//! [`TestApp::ticks`] what a scheduled task has fired.
//!
//! ```standalone_crate
//! use nexus::{prelude::*, testing::TestApp};
//! # #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! # #[event(type = "order.placed")]
//! # struct OrderPlaced { order_id: i64 }
//!
//! #[handler(max_attempts = 10, backoff = "exponential(1s..1h)")]
//! async fn notify(_order: OrderPlaced) -> nexus::Result {
//!     Err("no route to host".into())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> nexus::Result {
//! let app = TestApp::start(App::discover()).await;
//! app.client().emit(&OrderPlaced { order_id: 7 }).await?;
//! app.drained().await; // ten attempts, in a moment
//! assert_eq!(app.attempts("notify").len(), 10);
//! let letter = app.only_dead_letter().await;
//! assert_eq!(letter.error.as_deref(), Some("no route to host"));
//! # Ok(())
//! # }
//! ```
//!
//! # Failing and crashing
//!
//! [`nexus::checkpoint`](crate::checkpoint) names a place in a handler, and costs nothing outside of
//! tests. [`Point`] has the places of the runtime: after a claim, and before and after each kind of
//! verdict is stored. A test lets them [fail](TestApp::fail_at), [panic](TestApp::panic_at) or the whole node
//! [crash](TestApp::crash_at) there; a [`Fault`] says for which handler and how often.
//!
//! ```standalone_crate
//! use std::time::Duration;
//! use nexus::{prelude::*, testing::{Point, TestApp, TestDatabase}};
//! # #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! # #[event(type = "order.placed")]
//! # struct OrderPlaced { order_id: i64 }
//!
//! #[handler]
//! async fn book(order: OrderPlaced, tx: &mut Tx) -> nexus::Result {
//!     sqlx::query("insert into bookings values ($1)").bind(order.order_id).execute(&mut *tx).await?;
//!     nexus::checkpoint("booked").await?;
//!     Ok(())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> nexus::Result {
//! let database = TestDatabase::new().await;
//! sqlx::query("create table bookings (order_id bigint)").execute(&database.pool().await).await?;
//! let one = TestApp::start_on(&database, App::discover()).await;
//! let crash = one.crash_at(Point::BeforeCommit); // or at "booked"
//! one.client().emit(&OrderPlaced { order_id: 7 }).await?;
//! crash.reached().await;
//!
//! // Another node takes over when the lease of the dead one has ended.
//! let two = TestApp::start_on(&database, App::discover()).await;
//! two.advance(Duration::from_secs(11)).await;
//! two.settled().await;
//! let booked: Vec<i64> = sqlx::query_scalar("select * from bookings").fetch_all(two.pool()).await?;
//! assert_eq!(booked, [7]); // once
//! # Ok(())
//! # }
//! ```
//!
//! A crash ends all tasks of the node, in this process. Where a real kill is wanted, let the test start
//! a program of yours with the URL of its [`TestDatabase`] as `DATABASE_URL`, and kill that.
//!
//! # Without a database
//!
//! [`assert_valid`] finds what does not fit together in an app, [`assert_catalogue`] a stored name that
//! was changed by mistake; a line each.

mod app;
mod checks;
mod database;
pub(crate) mod decoding;
mod emitted;
mod fault;
mod isolated;
mod server;
mod settled;

pub use crate::runtime::points::{Attempt, Ended, Place, Point};
pub use app::{FiredTick, TestApp};
pub use checks::{assert_catalogue, assert_valid};
pub use database::TestDatabase;
pub use emitted::Emitted;
pub use fault::{Armed, Fault};
pub use isolated::{Ran, TestEnvelope};
pub use settled::NotSettled;

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection, SqlSafeStr};

/// What the kit adds to a migrated database.
const KIT: &str = concat!(include_str!("clock.sql"), include_str!("watch.sql"));

/// Connects, and waits for its turn where tests have taken all connections of the server.
async fn connect(url: &str) -> sqlx::Result<PgConnection> {
    let began = Instant::now();
    loop {
        match PgConnection::connect(url).await {
            Err(sqlx::Error::Database(error))
                if error.code().as_deref() == Some("53300")
                    && began.elapsed() < settled::PATIENCE =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            other => return other,
        }
    }
}

/// Runs one statement on a connection of its own.
async fn execute(url: &str, statement: &str) -> sqlx::Result<()> {
    let mut connection = connect(url).await?;
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()).into_sql_str())
        .execute(&mut connection)
        .await?;
    connection.close().await
}
