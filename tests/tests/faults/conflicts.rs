//! Deadlocks and serialization failures, which are nobody's fault, and errors that a handler keeps to itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use nexus::prelude::*;
use nexus_tests::within;
use tokio::sync::Barrier;

use crate::{Order, Side, Test, order, stop};

/// How often handlers were called.
#[derive(Debug, Clone, Default)]
struct Calls(Arc<AtomicUsize>);

impl Calls {
    /// Counts a call and returns how many were before it.
    fn count(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

/// Two of them lock two rows in opposite order.
#[handler(max_attempts = 1)]
async fn locks_two_rows(
    order: Order,
    calls: State<Calls>,
    barrier: State<Arc<Barrier>>,
    tx: &mut Tx,
) -> nexus::Result {
    let is_first = calls.count() < 2;
    let rows = if order.number == 1 { [1, 2] } else { [2, 1] };
    for row in rows {
        sqlx::query("update rows set touched = touched + 1 where number = $1")
            .bind(row)
            .execute(&mut **tx)
            .await
            .context("booking")?;
        if is_first && row == rows[0] {
            barrier.wait().await;
        }
    }
    sqlx::query("insert into effects values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Reads a snapshot in which the row that it updates is older than it is now.
#[handler(max_attempts = 1)]
async fn updates_what_has_changed(
    order: Order,
    calls: State<Calls>,
    client: Client,
    tx: &mut Tx,
) -> nexus::Result {
    sqlx::query("set transaction isolation level repeatable read")
        .execute(&mut **tx)
        .await?;
    sqlx::query("select count(*) from rows")
        .execute(&mut **tx)
        .await?;
    if calls.count() == 0 {
        sqlx::query("update rows set touched = 10")
            .execute(client.pool())
            .await?;
    }
    sqlx::query("update rows set touched = touched + $1")
        .bind(order.number)
        .execute(&mut **tx)
        .await
        .map_err(anyhow::Error::from)?;
    Ok(())
}

/// Meets a serialization failure each time.
#[handler(max_attempts = 2, backoff = "fixed(10ms)")]
async fn never_serializes(_order: Order, calls: State<Calls>, tx: &mut Tx) -> nexus::Result {
    calls.count();
    sqlx::query("do $$ begin raise exception using errcode = '40001'; end $$")
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler(max_attempts = 1)]
async fn passes_on(order: Order) -> Emit<Side> {
    Emit(Side {
        number: order.number,
    })
}

#[handler(max_attempts = 1)]
async fn passes_on_in_a_transaction(order: Order, tx: &mut Tx) -> nexus::Result {
    tx.emit(&Side {
        number: order.number + 1_000,
    })?;
    Ok(())
}

/// Keeps an error to itself.
#[handler(max_attempts = 2, backoff = "fixed(10ms)")]
async fn swallows_an_error(_order: Order, tx: &mut Tx) {
    let refused = sqlx::query("select 1 / 0").execute(&mut **tx).await;
    assert!(refused.is_err());
}

async fn with_rows() -> Test {
    let test = Test::new().await;
    sqlx::raw_sql(
        "create table rows (number bigint primary key, touched bigint not null default 0);
         insert into rows values (1), (2)",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    test
}

#[tokio::test]
async fn of_two_handlers_in_a_deadlock_both_succeed_and_no_attempt_counts() {
    let test = with_rows().await;
    let app = test
        .app(["locks_two_rows"])
        .state(Calls::default())
        .state(Arc::new(Barrier::new(2)));
    let app = nexus::start(app).await.unwrap();
    app.client()
        .emit_all(&[order(1, ""), order(2, "")])
        .await
        .unwrap();
    within("all is settled", app.idle()).await.unwrap();
    // A second attempt would be one too many.
    assert_eq!(test.numbers("effects").await, [1, 2]);
    let stats = &app.stats()[0];
    assert_eq!((stats.completed, stats.dead_lettered), (2, 0), "{stats:?}");
    stop(app).await;
}

#[tokio::test]
async fn a_serialization_failure_runs_the_handler_again_at_once() {
    let test = with_rows().await;
    let app = test
        .app(["updates_what_has_changed"])
        .state(Calls::default());
    let app = nexus::start(app).await.unwrap();
    app.client().emit(&order(5, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let touched: Vec<i64> = sqlx::query_scalar("select touched from rows")
        .fetch_all(&test.pool)
        .await
        .unwrap();
    assert_eq!(touched, [15, 15]);
    assert_eq!(app.stats()[0].completed, 1, "{:?}", app.stats());
    stop(app).await;
}

#[tokio::test]
async fn conflicts_without_end_become_failed_attempts() {
    let test = Test::new().await;
    let calls = Calls::default();
    let app = test.app(["never_serializes"]).state(calls.clone());
    let app = nexus::start(app).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    // Each attempt is one call and five repetitions.
    assert_eq!(calls.count(), 12);
    stop(app).await;
}

/// What nexus itself stores is repeated as well: emits, completions, ticks, delayed events.
#[tokio::test]
async fn what_nexus_stores_itself_is_repeated_at_once() {
    let mut test = Test::new().await;
    let app = test.app([
        "passes_on",
        "passes_on_in_a_transaction",
        "on_side",
        "on_the_second",
    ]);
    let app = nexus::start(app).await.unwrap();
    // Every other statement that appends to the log meets a serialization failure. A sequence counts what
    // is rolled back, too.
    sqlx::raw_sql(
        "create sequence appended;
         create function quarrel() returns trigger language plpgsql as $$ begin
             if nextval('public.appended') % 2 = 0 then
                 raise exception 'a quarrel' using errcode = '40001';
             end if;
             return null;
         end $$;
         create trigger quarrels after insert on core.event_log
             for each statement execute function quarrel()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    app.client()
        .emit(&Side { number: 3 })
        .after(Duration::from_millis(100))
        .await
        .unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let (handler, number) = test.next().await;
        assert_eq!(handler, "on_side");
        seen.push(number);
    }
    seen.sort_unstable();
    assert_eq!(seen, [1, 3, 1_001]);
    for stats in app.stats() {
        assert_eq!((stats.retried, stats.dead_lettered), (0, 0), "{stats:?}");
    }
    stop(app).await;
}

#[cron("* * * * * *")]
async fn on_the_second() {}

#[tokio::test]
async fn an_error_that_a_handler_keeps_to_itself_is_a_failed_attempt_that_says_so() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["swallows_an_error"])).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    let error = letters[0].error.as_deref().unwrap();
    assert!(
        error.starts_with("a statement of the handler failed and the handler returned `Ok`"),
        "{error}"
    );
    stop(app).await;
}
