//! Handlers, nodes and pools that get in each other's way.

use std::time::{Duration, Instant};

use nexus::{Client, prelude::*};
use nexus_tests::{until, within};

use crate::{Gate, Order, Saw, Side, Test, order, orders, pass, stop};

#[handler(concurrency = 1)]
async fn one_by_one(order: Order, saw: State<Saw>) {
    let _ = saw.send(("one_by_one", order.number));
}

#[handler(group = "others", concurrency = 1)]
async fn one_by_one_elsewhere(order: Order, saw: State<Saw>) {
    let _ = saw.send(("elsewhere", order.number));
}

/// Keeps a slot for about half a second.
#[handler(concurrency = 50)]
async fn steady(order: Order) {
    tokio::time::sleep(Duration::from_millis(
        300 + order.number.unsigned_abs() * 37 % 400,
    ))
    .await;
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
    async fn takes<const N: usize>(handlers: [&'static str; N]) -> Duration {
        let test = Test::new().await;
        test.prepare(handlers, &orders(3_000)).await;
        let app = nexus::start(test.app(handlers).batch_size(5))
            .await
            .unwrap();
        let begun = Instant::now();
        within("all is settled", app.idle()).await.unwrap();
        let took = begun.elapsed();
        stop(app).await;
        took
    }
    // A batch for each poll takes half a minute, however fast the machine is; so what it takes is compared with
    // what the same machine takes for the same alone.
    let alone = takes(["one_by_one"]).await;
    let beside = takes(["one_by_one", "on_side"]).await;
    assert!(
        beside < alone * 4 + Duration::from_secs(5),
        "{beside:?}, alone {alone:?}"
    );
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
