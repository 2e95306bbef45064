//! Panics of nexus itself: a loop that is lost would leave a node that looks alive and does half of its work.

use std::time::Duration;

use nexus::{
    prelude::*,
    testing::{Place, Point, TestApp},
};

use crate::{Order, order};

#[handler(concurrency = 1)]
async fn panics_around(order: Order) -> nexus::Result {
    if order.say == "fail" {
        return Err("as it was told".into());
    }
    Ok(())
}

#[handler(concurrency = 1)]
async fn panics_around_a_transaction(_order: Order, tx: &mut Tx) -> nexus::Result {
    sqlx::query("select 1").execute(&mut **tx).await?;
    Ok(())
}

#[cron("@hourly")]
async fn panics_around_a_tick() {}

/// Lets something of nexus panic while it works on an event, and sees that the node does all of its work
/// afterwards.
async fn survives(handler: &str, point: impl Into<Place>, event: Order) {
    let app = TestApp::start(App::discover().only([handler])).await;
    let armed = app.panic_at(point);
    app.client().emit(&event).await.unwrap();
    armed.reached().await;
    // The message that was in hand comes back when its lease ends.
    app.advance(Duration::from_mins(1)).await;
    app.client().emit(&order(2, "")).await.unwrap();
    app.drained().await;
    let stats = app.shutdown().await;
    let ended = stats[0].completed + stats[0].dead_lettered;
    assert_eq!(ended, 2, "{stats:?}");
}

#[tokio::test]
async fn a_worker_that_panics_is_started_again() {
    survives("panics_around", Point::Claimed, order(1, "")).await;
}

#[tokio::test]
async fn a_settler_that_panics_over_a_completion_is_started_again() {
    survives("panics_around", Point::BeforeCommit, order(1, "")).await;
}

#[tokio::test]
async fn a_settler_that_panics_over_a_retry_is_started_again() {
    survives("panics_around", Point::BeforeRetry, order(1, "fail")).await;
}

#[tokio::test]
async fn an_attempt_that_panics_outside_of_its_handler_frees_its_slot() {
    let handler = "panics_around_a_transaction";
    survives(handler, Point::BeforeCommit, order(1, "")).await;
}

#[tokio::test]
async fn a_scheduler_that_panics_is_started_again() {
    let app = TestApp::start(App::discover().only(["panics_around_a_tick"])).await;
    let armed = app.panic_at(Point::BeforeTick);
    app.advance(Duration::from_hours(1)).await;
    armed.reached().await;
    app.settled().await;
    assert_eq!(app.ticks("panics_around_a_tick").await.len(), 1);
    app.shutdown().await;
}
