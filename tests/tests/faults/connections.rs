//! Connections that break or fall silent.

use std::{
    future::IntoFuture,
    time::{Duration, Instant},
};

use nexus::{Client, Database, EmitError, prelude::*};
use nexus_tests::{until, within};

use crate::{
    Order, Saw, Test, order, orders,
    proxy::{Line, Proxy},
    stop,
};

/// Runs until it is told to stop, whatever happens to the database.
#[handler]
async fn endless(order: Order, saw: State<Saw>, tx: &mut Tx) -> nexus::Result {
    let _ = saw.send(("endless", order.number));
    sqlx::query("select pg_sleep(600)")
        .execute(&mut **tx)
        .await?;
    Ok(())
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
    // About 4 s; what has no bound takes for ever, and a busy machine its time.
    assert!(
        begun.elapsed() < Duration::from_mins(1),
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
        // On a slow machine the server may notice first that nobody listens, and give it up.
        let sleeping: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event = 'PgSleep'",
        )
        .fetch_one(&test.pool)
        .await
        .unwrap();
        (sleeping == 0).then_some(())
    })
    .await;
    proxy.state.send(Line::Up).unwrap();
    until("the node is idle", || async { app.idle().await.ok() }).await;
    assert_eq!(app.stats()[0].lost, 0, "{:?}", app.stats());
    stop(app).await;
}

#[tokio::test]
async fn whoever_asks_a_silent_database_is_told_so_after_a_while() {
    let test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let database = Database::from_url(&proxy.url, "the test").unwrap();
    let client = Client::connect(&database, "demo").await.unwrap();
    client.emit(&order(1, "")).await.unwrap();
    let mut tx = client.begin().await.unwrap();
    tx.emit(&order(2, "")).unwrap();
    // A connection that was used a moment ago is not asked whether it is alive, so that the emit's fate would be
    // unknown.
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.state.send(Line::Silent).unwrap();
    let impatient = database.connect_timeout(Duration::from_secs(1));
    let (third, letters, schedules, begun, committed, connected) = within(
        "all are answered",
        Box::pin(async {
            let third = order(3, "");
            tokio::join!(
                client.emit(&third).into_future(),
                client.dead_letters("default", 1),
                client.schedules(),
                client.begin(),
                tx.commit(),
                Client::connect(&impatient, "demo"),
            )
        }),
    )
    .await;
    assert!(matches!(third, Err(EmitError::Connect(_))), "{third:?}");
    assert!(letters.is_err() && schedules.is_err() && begun.is_err());
    // The events of the transaction were to be stored, its commit was not sent.
    assert!(
        matches!(
            committed,
            Err(EmitError::Append { .. } | EmitError::Unknown(_))
        ),
        "{committed:?}"
    );
    let error = connected.unwrap_err().to_string();
    assert!(
        error.contains("is not usable after 1s of waiting"),
        "{error}"
    );
    proxy.state.send(Line::Up).unwrap();
    let fourth = order(4, "");
    within("it answers again", client.emit(&fourth).into_future())
        .await
        .unwrap();
}

#[tokio::test]
async fn pooled_connections_that_fell_silent_cost_nobody_an_emit() {
    let test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let database = Database::from_url(&proxy.url, "the test").unwrap();
    let client = Client::connect(&database, "demo").await.unwrap();
    let events = orders(4);
    let emit_all = || async {
        let emits = events.iter().map(|event| client.emit(event).into_future());
        within("all are answered", futures_util::future::join_all(emits)).await
    };
    for emitted in emit_all().await {
        emitted.unwrap();
    }
    // One that was used a moment ago is not asked whether it is alive.
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.state.send(Line::Hole).unwrap();
    for emitted in emit_all().await {
        emitted.unwrap();
    }
}

#[tokio::test]
async fn an_emit_whose_answer_was_lost_says_that_its_fate_is_unknown() {
    let test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let database = Database::from_url(&proxy.url, "the test").unwrap();
    let client = Client::connect(&database, "demo").await.unwrap();
    client.emit(&order(1, "")).await.unwrap();
    sqlx::raw_sql(
        "create function sleep() returns trigger language plpgsql as
             $$ begin perform pg_sleep(0.5); return new; end $$;
         create trigger slow before insert on core.event_log
             for each row execute function sleep()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    let event = order(2, "");
    let emitting = client.emit(&event).into_future();
    let broken = async {
        until("the event is being stored", || async {
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
        proxy.state.send(Line::Down).unwrap();
    };
    let (emitted, ()) = tokio::join!(emitting, broken);
    assert!(matches!(emitted, Err(EmitError::Unknown(_))), "{emitted:?}");
}

#[tokio::test]
async fn a_node_goes_on_once_a_silent_database_answers_again() {
    let test = Test::new().await;
    let proxy = Proxy::new(&test.database).await;
    let app = test
        .app(["has_an_effect", "counts_sides"])
        .database_url(&proxy.url)
        .lease(Duration::from_secs(2));
    let app = nexus::start(app).await.unwrap();
    test.client().await.emit_all(&orders(300)).await.unwrap();
    for (line, share) in [(Line::Silent, 50), (Line::Hole, 100), (Line::Down, 150)] {
        until("some are handled", || async {
            (test.numbers("sides").await.len() >= share).then_some(())
        })
        .await;
        proxy.state.send(line).unwrap();
        // Long enough for leases to end.
        tokio::time::sleep(Duration::from_secs(3)).await;
        proxy.state.send(Line::Up).unwrap();
    }
    until("all is settled", || async { app.idle().await.ok() }).await;
    let all: Vec<i64> = (0..300).collect();
    assert_eq!(test.numbers("effects").await, all);
    assert_eq!(test.numbers("sides").await, all);
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
