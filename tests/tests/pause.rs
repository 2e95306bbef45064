//! A group that is paused handles nothing until it is resumed, and loses nothing.

use std::time::Duration;

use nexus::{
    Client, Database,
    client::OperateError,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::until;
use sqlx::PgPool;
use tokio::sync::mpsc;

/// A bill to pay.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "bill.received")]
struct BillReceived {
    number: i64,
}

type Saw = mpsc::UnboundedSender<(&'static str, i64)>;

#[handler(group = "billing")]
async fn pay(bill: BillReceived, saw: State<Saw>) {
    let _ = saw.send(("pay", bill.number));
}

#[handler(group = "audit")]
async fn note(bill: BillReceived, saw: State<Saw>) {
    let _ = saw.send(("note", bill.number));
}

/// Fails once.
#[handler(group = "billing", backoff = "fixed(1ms)")]
async fn dispute(bill: Envelope<BillReceived>, saw: State<Saw>) -> nexus::Result {
    let _ = saw.send(("dispute", bill.number));
    if bill.attempt() == 1 {
        return Err("the line is engaged".into());
    }
    Ok(())
}

/// Works off a backlog in its own transactions.
#[handler(group = "books", concurrency = 2)]
async fn book(bills: Batch<BillReceived>, tx: &mut Tx) -> nexus::Result {
    let numbers: Vec<i64> = bills.iter().map(|bill| bill.number).collect();
    sqlx::query("insert into booked (number) select unnest($1::bigint[])")
        .bind(numbers)
        .execute(&mut **tx)
        .await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    Ok(())
}

fn app(handlers: &[&str], saw: &Saw) -> App {
    App::discover()
        .only(handlers.iter().copied())
        .state(saw.clone())
}

async fn waiting(pool: &PgPool, group: &str) -> i64 {
    let text = format!("select count(*) from pgmq.q_core_events_demo__{group}");
    sqlx::query_scalar(sqlx::AssertSqlSafe(text))
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_paused_group_waits_and_the_others_do_not() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = TestApp::start_on(&database, app(&["pay", "note"], &sender)).await;
    let client = node.client();
    assert!(client.pause_group("billing").await.unwrap());
    assert!(!client.pause_group("billing").await.unwrap());
    for number in 0..50 {
        client.emit(&BillReceived { number }).await.unwrap();
        // When it comes, a claim for the other group has had its chance.
        assert_eq!(saw.recv().await, Some(("note", number)));
    }
    // Another node does not know better.
    let other = TestApp::start_on(&database, app(&["pay"], &sender)).await;
    client.emit(&BillReceived { number: 50 }).await.unwrap();
    assert_eq!(saw.recv().await, Some(("note", 50)));
    let pool = database.pool().await;
    assert_eq!(waiting(&pool, "billing").await, 51);
    let read: i64 = sqlx::query_scalar(
        "select count(*) from pgmq.q_core_events_demo__billing where read_ct > 0",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(read, 0);

    assert!(client.resume_group("billing").await.unwrap());
    assert!(!client.resume_group("billing").await.unwrap());
    let mut paid = Vec::new();
    while paid.len() < 51 {
        let (who, number) = nexus_tests::within("a bill is paid", saw.recv())
            .await
            .unwrap();
        assert_eq!(who, "pay");
        paid.push(number);
    }
    paid.sort_unstable();
    assert_eq!(paid, (0..=50).collect::<Vec<i64>>());
    other.shutdown().await;
    node.shutdown().await;
}

#[tokio::test]
async fn a_retry_waits_as_well_and_a_pause_outlives_the_node() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = TestApp::start_on(&database, app(&["dispute"], &sender)).await;
    let pool = database.pool().await;
    node.client()
        .emit(&BillReceived { number: 1 })
        .await
        .unwrap();
    assert_eq!(saw.recv().await, Some(("dispute", 1)));
    assert_eq!(saw.recv().await, Some(("dispute", 1)));
    node.drained().await;
    let paused: bool = sqlx::query_scalar("select core.pause_group('demo', 'billing')")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(paused);
    node.client()
        .emit(&BillReceived { number: 2 })
        .await
        .unwrap();
    node.shutdown().await;
    let node = TestApp::start_on(&database, app(&["dispute", "note"], &sender)).await;
    node.client()
        .emit(&BillReceived { number: 3 })
        .await
        .unwrap();
    assert_eq!(saw.recv().await, Some(("note", 3)));
    assert_eq!(waiting(&pool, "billing").await, 2);
    let resumed: bool = sqlx::query_scalar("select core.resume_group('demo', 'billing')")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert!(resumed);
    node.drained().await;
    node.shutdown().await;
    drop(sender);
    let mut disputed = Vec::new();
    while let Some((_, number)) = saw.recv().await {
        disputed.push(number);
    }
    disputed.sort_unstable();
    assert_eq!(disputed, [2, 2, 3, 3]);
}

#[tokio::test]
async fn a_pause_stops_who_works_off_a_backlog() {
    const BILLS: i64 = 3_000;
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    sqlx::query("create table booked (number bigint)")
        .execute(&pool)
        .await
        .unwrap();
    let start = || {
        let app = App::discover()
            .database_url(database.url())
            .only(["book"])
            .batch_size(10);
        async { nexus::start(app).await.unwrap() }
    };
    start().await.shutdown().await;
    let connection = Database::from_url(database.url(), "the test").unwrap();
    let client = Client::connect(&connection, "demo").await.unwrap();
    let bills: Vec<_> = (0..BILLS).map(|number| BillReceived { number }).collect();
    client.emit_all(&bills).await.unwrap();
    let node = start().await;
    until("some are booked", || async {
        (waiting(&pool, "books").await < BILLS - 200).then_some(())
    })
    .await;
    client.pause_group("books").await.unwrap();
    // What was claimed by then is done when nothing changes any more, for longer than anything takes.
    let mut left = waiting(&pool, "books").await;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = waiting(&pool, "books").await;
        if std::mem::replace(&mut left, now) == now {
            break;
        }
    }
    assert!(left > 0, "all was booked before the pause");
    client.resume_group("books").await.unwrap();
    nexus_tests::within("all is booked", node.idle())
        .await
        .unwrap();
    node.shutdown().await;
    let booked: Vec<i64> = sqlx::query_scalar("select number from booked order by 1")
        .fetch_all(&pool)
        .await
        .unwrap();
    assert_eq!(booked, (0..BILLS).collect::<Vec<i64>>());
}

#[tokio::test]
async fn a_group_that_is_not_there_is_refused_by_name() {
    let database = TestDatabase::new().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let node = TestApp::start_on(&database, app(&["pay"], &sender)).await;
    let error = node.client().pause_group("biling").await.unwrap_err();
    assert!(
        matches!(error, OperateError::UnknownGroup { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("billing"), "{error}");
    let pool = database.pool().await;
    let error = sqlx::query("select core.pause_group('demo', 'biling')")
        .execute(&pool)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("has no group \"biling\""),
        "{error}"
    );
    node.shutdown().await;
}
