//! A server that takes no writes, as after a failover, and one that is not there yet.

use std::{
    future::IntoFuture,
    sync::{Arc, Mutex},
    time::Duration,
};

use nexus::{Client, Database};
use nexus_tests::{until, within};
use tracing::field::{Field, Visit};

use crate::{
    Test, order, orders,
    proxy::{Line, Proxy},
    stop,
};

/// The warnings of this thread.
#[derive(Debug, Clone, Default)]
pub(crate) struct Warnings(Arc<Mutex<Vec<String>>>);

impl Warnings {
    pub(crate) fn of(&self, part: &str) -> usize {
        let lines = self.0.lock().unwrap();
        lines.iter().filter(|line| line.contains(part)).count()
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        if *event.metadata().level() <= tracing::Level::WARN {
            let mut message = Message(String::new());
            event.record(&mut message);
            self.0.lock().unwrap().push(message.0);
        }
    }
}

/// From now on the warnings of this thread, which a test of one thread has all loops of its node on but that of
/// the heartbeat.
pub(crate) fn warnings() -> (Warnings, tracing::subscriber::DefaultGuard) {
    use tracing_subscriber::layer::SubscriberExt;
    let warnings = Warnings::default();
    let subscriber = tracing_subscriber::registry().with(warnings.clone());
    (warnings, tracing::subscriber::set_default(subscriber))
}

async fn execute(test: &Test, statement: &str) {
    // The sessions of the test write all the same.
    let statement = format!("set default_transaction_read_only = off; {statement}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .execute(&test.pool)
        .await
        .unwrap();
}

/// Makes new sessions take no writes, and ends those that are there.
async fn fail_over(test: &Test) {
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    execute(
        test,
        &format!("alter database {name} set default_transaction_read_only = on"),
    )
    .await;
    sqlx::query(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity
         where datname = current_database() and application_name = 'nexus'",
    )
    .execute(&test.pool)
    .await
    .unwrap();
}

/// Makes new sessions take writes. Those that are there do not.
async fn promote(test: &Test) {
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    execute(
        test,
        &format!("alter database {name} reset default_transaction_read_only"),
    )
    .await;
}

#[tokio::test]
async fn a_server_that_takes_no_writes_is_left_and_nothing_is_lost() {
    let mut test = Test::new().await;
    let (warnings, _guard) = warnings();
    let app = test
        .app(["has_an_effect", "counts_sides", "gated"])
        .lease(Duration::from_secs(2));
    let app = nexus::start(app).await.unwrap();
    let client = app.client().clone();
    client.emit_all(&orders(20)).await.unwrap();
    until("all have an effect", || async {
        (test.numbers("sides").await.len() == 20).then_some(())
    })
    .await;
    // One handler runs, whose verdict meets the server that takes no writes.
    test.next().await;
    fail_over(&test).await;
    test.gate.add_permits(20);
    // Every connection of the pool gets to know that server.
    let last = order(20, "");
    for _ in 0..20 {
        let refused = within("the emit is answered", client.emit(&last).into_future()).await;
        assert!(refused.is_err(), "{refused:?}");
    }
    promote(&test).await;
    until("an emit is taken", || async {
        client.emit(&last).await.ok()
    })
    .await;
    test.gate.add_permits(20);
    until("all is settled", || async { app.idle().await.ok() }).await;
    let all: Vec<i64> = (0..21).collect();
    assert_eq!(test.numbers("effects").await, all);
    assert_eq!(test.numbers("sides").await, all);
    let letters = client.dead_letters("default", 10).await.unwrap();
    assert!(letters.is_empty(), "{letters:?}");
    // Each loop has failed many times meanwhile. The thread of the heartbeat, whose warnings are not seen
    // here, may have told of it before them.
    let told = warnings.of("the database");
    assert!(told <= 4, "{warnings:?}");
    stop(app).await;
}

#[tokio::test]
async fn a_start_waits_for_a_database_that_is_coming_up() {
    let test = Test::new().await;
    let (warnings, _guard) = warnings();
    let proxy = Proxy::new(&test.database).await;
    proxy.state.send(Line::Down).unwrap();
    let app = test
        .app(["on_side"])
        .database_url(&proxy.url)
        .connect_timeout(Duration::from_mins(2));
    let starting = tokio::spawn(nexus::start(app));
    until("it says what it waits for", || async {
        (warnings.of("waiting for the database") > 0).then_some(())
    })
    .await;
    assert!(!starting.is_finished());
    proxy.state.send(Line::Up).unwrap();
    let app = within("it starts", starting).await.unwrap().unwrap();
    stop(app).await;
}

#[tokio::test]
async fn a_start_waits_for_a_server_that_takes_writes() {
    let test = Test::new().await;
    fail_over(&test).await;
    let impatient = test
        .app(["on_side"])
        .connect_timeout(Duration::from_secs(1));
    let error = nexus::start(impatient).await.unwrap_err().to_string();
    assert!(error.contains("the server takes no writes"), "{error}");
    let starting = tokio::spawn(nexus::start(test.app(["on_side"])));
    promote(&test).await;
    let app = within("it starts", starting).await.unwrap().unwrap();
    stop(app).await;
}

#[tokio::test]
async fn what_waiting_cannot_mend_is_an_error_at_once() {
    let test = Test::new().await;
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    let elsewhere = test.database.url().replace(&name, "nexus_no_such_database");
    let database = Database::from_url(&elsewhere, "the test").unwrap();
    let begun = std::time::Instant::now();
    let error = Client::connect(&database, "demo").await.unwrap_err();
    assert!(
        matches!(error, nexus::client::ConnectError::Unusable { .. }),
        "{error}"
    );
    assert!(begun.elapsed() < Duration::from_secs(20));
    // A name that does not resolve may do so soon.
    let unresolved = Database::from_url("postgres://ada@nowhere.invalid/shop", "the test").unwrap();
    let unresolved = unresolved.connect_timeout(Duration::from_secs(1));
    let error = Client::connect(&unresolved, "demo").await.unwrap_err();
    assert!(
        matches!(error, nexus::client::ConnectError::NotUp { .. }),
        "{error}"
    );
}
