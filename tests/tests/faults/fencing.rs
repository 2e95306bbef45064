//! A worker that has lost its lease can do nothing with it any more.

use std::time::Duration;

use nexus::prelude::*;
use nexus_tests::{until, within};

use crate::{Gate, Order, Saw, Side, Test, order, pass, stop};

/// Ends as it is told once the gate opens, without a transaction.
#[handler(max_attempts = 2)]
async fn ends_as_told(
    order: Order,
    saw: State<Saw>,
    gate: State<Gate>,
) -> nexus::Result<Option<Emit<Side>>> {
    let _ = saw.send(("ends_as_told", order.number));
    pass(&gate).await;
    match order.say.as_str() {
        "complete" => Ok(None),
        "emit" => Ok(Some(Emit(Side { number: 1 }))),
        "retry" => Err("as it was told".into()),
        "snooze" => Err(Error::snooze(Duration::from_mins(1))),
        _ => Err(Error::permanent("as it was told")),
    }
}

/// The same with one, of which an effect and an event are to be seen.
#[handler(max_attempts = 2)]
async fn ends_as_told_in_a_transaction(
    order: Order,
    saw: State<Saw>,
    gate: State<Gate>,
    tx: &mut Tx,
) -> nexus::Result {
    let _ = saw.send(("ends_as_told_in_a_transaction", order.number));
    sqlx::query("insert into effects values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    tx.emit(&Side { number: 2 })?;
    pass(&gate).await;
    match order.say.as_str() {
        "complete" => Ok(()),
        "retry" => Err("as it was told".into()),
        _ => Err(Error::permanent("as it was told")),
    }
}

async fn a_stolen_message_is_left_alone(handler: &'static str, say: &str) {
    let mut test = Test::new().await;
    let app = nexus::start(test.app([handler])).await.unwrap();
    app.client().emit(&order(1, say)).await.unwrap();
    assert_eq!(test.next().await.0, handler);
    let stolen: String = sqlx::query_scalar(
        "update pgmq.q_core_events_demo
         set read_ct = read_ct + 1, vt = now() + interval '1 hour', headers = headers || '{\"thief\": true}'
         returning headers::text || vt || read_ct",
    )
    .fetch_one(&test.pool)
    .await
    .unwrap();
    test.gate.add_permits(1);
    until("the loss is noticed", || async {
        (app.stats()[0].lost == 1).then_some(())
    })
    .await;
    // The thief has the message as it took it, and nothing else has come of it.
    let left: String =
        sqlx::query_scalar("select headers::text || vt || read_ct from pgmq.q_core_events_demo")
            .fetch_one(&test.pool)
            .await
            .unwrap();
    assert_eq!(left, stolen);
    let logged: i64 =
        sqlx::query_scalar("select count(*) from core.event_log where event_type = 'fault.side'")
            .fetch_one(&test.pool)
            .await
            .unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((logged, letters.len()), (0, 0));
    assert!(test.numbers("effects").await.is_empty());
    let stats = &app.stats()[0];
    assert_eq!(
        (stats.completed, stats.retried, stats.dead_lettered),
        (0, 0, 0),
        "{stats:?}"
    );
    stop(app).await;
}

#[tokio::test]
async fn it_cannot_complete() {
    a_stolen_message_is_left_alone("ends_as_told", "complete").await;
}

#[tokio::test]
async fn it_cannot_store_a_returned_event() {
    a_stolen_message_is_left_alone("ends_as_told", "emit").await;
}

#[tokio::test]
async fn it_cannot_retry() {
    a_stolen_message_is_left_alone("ends_as_told", "retry").await;
}

#[tokio::test]
async fn it_cannot_snooze() {
    a_stolen_message_is_left_alone("ends_as_told", "snooze").await;
}

#[tokio::test]
async fn it_cannot_dead_letter() {
    a_stolen_message_is_left_alone("ends_as_told", "dead-letter").await;
}

#[tokio::test]
async fn it_cannot_commit_or_emit_with_its_transaction() {
    a_stolen_message_is_left_alone("ends_as_told_in_a_transaction", "complete").await;
}

#[tokio::test]
async fn it_cannot_retry_with_its_transaction() {
    a_stolen_message_is_left_alone("ends_as_told_in_a_transaction", "retry").await;
}

#[tokio::test]
async fn it_cannot_dead_letter_with_its_transaction() {
    a_stolen_message_is_left_alone("ends_as_told_in_a_transaction", "dead-letter").await;
}

#[tokio::test]
async fn a_node_whose_id_was_taken_fires_no_ticks() {
    let test = Test::new().await;
    let app = test.app(["on_each_second"]).node_id("twin");
    let app = nexus::start(app).await.unwrap();
    let ticks = || async {
        sqlx::query_scalar::<_, i64>("select count(*) from core.ticks")
            .fetch_one(&test.pool)
            .await
            .unwrap()
    };
    until("it ticks", || async { (ticks().await > 0).then_some(()) }).await;
    // Whoever fires at this moment is waited for.
    let mut tx = test.pool.begin().await.unwrap();
    for statement in [
        "select from core.scheduled_tasks for update",
        "update core.nodes set epoch = nextval('core.node_epochs')",
    ] {
        sqlx::query(statement).execute(&mut *tx).await.unwrap();
    }
    let before: i64 = sqlx::query_scalar("select count(*) from core.ticks")
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
    within("it notices", app.fenced()).await;
    assert_eq!(ticks().await, before);
    stop(app).await;
}

#[cron("* * * * * *")]
async fn on_each_second() {}
