//! Who comes or looks while events flow.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nexus::prelude::*;
use nexus_tests::{until, within};

use crate::{Order, Saw, Test, order, orders, stop};

#[handler(group = "newcomer")]
async fn newcomer(order: Envelope<Order>, saw: State<Saw>) {
    let _ = saw.send(("newcomer", order.number));
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
