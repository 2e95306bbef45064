//! The tests that the guide's page on testing shows, as it shows them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nexus::{
    prelude::*,
    testing::{Point, TestApp, TestDatabase},
};

/// An order has been placed.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.placed", key = order_id)]
struct OrderPlaced {
    order_id: i64,
}

/// An order has been paid for.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.paid", key = order_id)]
struct OrderPaid {
    order_id: i64,
}

/// The bank, which is open unless a test says otherwise.
#[derive(Default)]
struct Bank {
    is_closed: AtomicBool,
}

#[handler(max_attempts = 3, backoff = "fixed(1m)")]
async fn charge(
    order: OrderPlaced,
    bank: State<Arc<Bank>>,
    tx: &mut Tx,
) -> nexus::Result<Emit<OrderPaid>> {
    if bank.is_closed.load(Ordering::Relaxed) {
        return Err("the bank is closed".into());
    }
    sqlx::query("insert into payments (order_id) values ($1)")
        .bind(order.order_id)
        .execute(&mut *tx)
        .await?;
    Ok(Emit(OrderPaid {
        order_id: order.order_id,
    }))
}

#[cron("0 2 * * *", tz = "Europe/Berlin")]
async fn close_day(tick: Tick, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into closed_days (until) values (to_timestamp($1))")
        .bind(tick.due_at().as_second())
        .execute(&mut *tx)
        .await?;
    Ok(())
}

async fn shop(bank: &Arc<Bank>) -> TestApp {
    shop_on(&TestDatabase::new().await, bank).await
}

async fn shop_on(database: &TestDatabase, bank: &Arc<Bank>) -> TestApp {
    let app = App::discover()
        .state(Arc::clone(bank))
        .before_start(create_tables);
    TestApp::start_on(database, app).await
}

async fn create_tables(pool: sqlx::PgPool) -> nexus::Result {
    sqlx::raw_sql(
        "create table if not exists payments (order_id bigint);
         create table if not exists closed_days (until timestamptz)",
    )
    .execute(&pool)
    .await?;
    Ok(())
}

#[tokio::test]
async fn an_order_is_charged() -> nexus::Result {
    let app = shop(&Arc::default()).await;
    app.client().emit(&OrderPlaced { order_id: 7 }).await?;
    app.settled().await;

    assert_eq!(app.only_emitted::<OrderPaid>().await.order_id, 7);
    let payments: Vec<i64> = sqlx::query_scalar("select order_id from payments")
        .fetch_all(app.pool())
        .await?;
    assert_eq!(payments, [7]);
    Ok(())
}

#[tokio::test]
async fn it_is_given_up_after_three_attempts() -> nexus::Result {
    let bank = Arc::new(Bank::default());
    let app = shop(&bank).await;
    bank.is_closed.store(true, Ordering::Relaxed);
    app.client().emit(&OrderPlaced { order_id: 7 }).await?;
    app.drained().await; // moves the clock to each retry

    let letter = app.only_dead_letter().await;
    assert_eq!(letter.reason, "Attempts exhausted");
    assert_eq!(letter.error.as_deref(), Some("the bank is closed"));
    assert_eq!(app.attempts("charge").len(), 3);
    Ok(())
}

#[tokio::test]
async fn days_are_closed_at_two_also_without_a_two_o_clock() -> nexus::Result {
    let database = TestDatabase::new().await;
    database.travel_to("2027-03-26T12:00:00Z".parse()?).await;
    let app = shop_on(&database, &Arc::default()).await;
    app.live_through(Duration::from_hours(72)).await;

    let due = app
        .ticks("close_day")
        .await
        .into_iter()
        .map(|tick| tick.due_at.to_string());
    assert_eq!(
        due.collect::<Vec<_>>(),
        [
            "2027-03-27T01:00:00Z",
            "2027-03-28T01:00:00Z",
            "2027-03-29T00:00:00Z"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn a_crash_before_the_commit_charges_once() -> nexus::Result {
    let bank = Arc::new(Bank::default());
    let app = shop(&bank).await;
    let crash = app.crash_at(Point::BeforeCommit);
    app.client().emit(&OrderPlaced { order_id: 7 }).await?;
    crash.reached().await;

    let next = shop_on(app.database(), &bank).await;
    next.advance(Duration::from_secs(20)).await; // the lease of the dead node ends
    next.settled().await;
    let payments: Vec<i64> = sqlx::query_scalar("select order_id from payments")
        .fetch_all(next.pool())
        .await?;
    assert_eq!(payments, [7]);
    Ok(())
}

#[test]
fn the_app_fits_together() {
    nexus::testing::assert_valid(&App::discover().state(Arc::new(Bank::default())));
}

#[test]
fn stored_names_have_not_changed() {
    nexus::testing::assert_catalogue(&App::discover(), "tests/guide.catalogue.json");
}

/// Every item of this file that the page shows, it shows as it is.
#[test]
fn the_guide_shows_what_is_run() {
    let this = include_str!("guide.rs");
    let page = include_str!("../../nexus/src/guide/testing.md");
    let shown: Vec<&str> = this
        .split("\n\n")
        .filter(|item| {
            !item.contains("include_str!") && !item.starts_with("//! ") && !item.starts_with("use ")
        })
        .collect();
    assert!(shown.len() > 10, "{} items", shown.len());
    for item in shown {
        assert!(
            page.contains(item.trim_end()),
            "the page does not show\n{item}"
        );
    }
}
