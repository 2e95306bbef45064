//! Transactions that end otherwise than planned.

use std::{mem, time::Duration};

use nexus::{EmitError, prelude::*};
use nexus_tests::within;
use sqlx::{Connection, PgConnection};

use crate::{Order, Saw, Side, Test, order, stop};

#[handler(backoff = "fixed(10ms)", max_attempts = 3)]
async fn uses_savepoints(order: Envelope<Order>, tx: &mut Tx) -> nexus::Result {
    async fn insert(connection: &mut PgConnection, number: i64) -> sqlx::Result<()> {
        sqlx::query("insert into effects values ($1)")
            .bind(number)
            .execute(connection)
            .await
            .map(drop)
    }
    insert(tx, order.number).await?;
    let first = order.attempt() == 1;
    match order.say.as_str() {
        "commit" => {
            let mut savepoint = tx.begin().await?;
            insert(&mut savepoint, order.number + 100).await?;
            savepoint.commit().await?;
        }
        "drop" => {
            let mut savepoint = tx.begin().await?;
            insert(&mut savepoint, order.number + 200).await?;
        }
        "forget" if first => mem::forget(tx.begin().await?),
        "cancel" if first => {
            cancel_a_begin(tx).await;
        }
        _ => {}
    }
    Ok(())
}

/// Begins a savepoint and drops the future when its statement is on its way.
async fn cancel_a_begin(connection: &mut PgConnection) {
    // A server that answers at once is asked again.
    while let Ok(begun) = tokio::time::timeout(Duration::ZERO, connection.begin()).await {
        begun.unwrap().commit().await.unwrap();
    }
}

/// Violates a constraint that is checked at the commit.
#[handler(backoff = "fixed(10ms)", max_attempts = 2)]
async fn violates_at_commit(order: Order, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into deferred values ($1), ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Its commit takes longer than its timeout.
#[handler(backoff = "fixed(10ms)", max_attempts = 2, timeout = "200ms")]
async fn commits_slowly(order: Order, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into slow values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Sends statements in each of the ways that a user of `sqlx` may try.
#[handler(max_attempts = 1)]
async fn sends_statements(order: Order, tx: &mut Tx) -> nexus::Result {
    async fn of_any<'c>(to: impl sqlx::PgExecutor<'c>, number: i64) -> sqlx::Result<()> {
        insert(number).execute(to).await.map(drop)
    }
    async fn of_connection(to: &mut PgConnection, number: i64) -> sqlx::Result<()> {
        insert(number).execute(to).await.map(drop)
    }
    async fn within<'c>(
        to: impl sqlx::Acquire<'c, Database = sqlx::Postgres>,
        number: i64,
    ) -> sqlx::Result<()> {
        let mut savepoint = to.begin().await?;
        insert(number).execute(&mut *savepoint).await?;
        savepoint.commit().await
    }
    let insert = |number| insert(order.number + number);
    insert(0).execute(&mut *tx).await?;
    insert(1).execute(&mut **tx).await?;
    of_any(&mut *tx, order.number + 2).await?;
    of_connection(tx, order.number + 3).await?;
    of_connection(&mut *tx, order.number + 4).await?;
    within(&mut *tx, order.number + 5).await?;
    sqlx::Executor::execute(&mut *tx, "select 1").await?;
    let described =
        sqlx::Executor::describe(&mut *tx, sqlx::SqlStr::from_static("select 1")).await?;
    assert_eq!(described.columns().len(), 1);
    let one: Option<i64> = sqlx::query_scalar("select number from effects where number = $1")
        .bind(order.number)
        .fetch_optional(&mut *tx)
        .await?;
    assert_eq!(one, Some(order.number));
    let all: Vec<i64> = sqlx::query_scalar("select number from effects order by number")
        .fetch_all(&mut *tx)
        .await?;
    assert_eq!(all.len(), 6);
    // The last one may take it away.
    insert(6).execute(tx).await?;
    Ok(())
}

type Statement = sqlx::query::Query<'static, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn insert(number: i64) -> Statement {
    sqlx::query("insert into effects values ($1)").bind(number)
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("dropped");
    }
}

#[handler(
    concurrency = 1,
    max_attempts = 2,
    backoff = "fixed(10ms)",
    timeout = "50ms"
)]
async fn panics_when_dropped(order: Order, saw: State<Saw>) {
    if order.say == "hang" {
        let _bomb = PanicsWhenDropped;
        std::future::pending::<()>().await;
    }
    let _ = saw.send(("survivor", order.number));
}

#[tokio::test]
async fn savepoints_that_are_dropped_forgotten_or_cancelled_lose_nothing() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["uses_savepoints"])).await.unwrap();
    let says = ["", "commit", "drop", "forget", "cancel"];
    let events: Vec<Order> = (0..)
        .zip(says)
        .map(|(number, say)| order(number, say))
        .collect();
    app.client().emit_all(&events).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(test.numbers("effects").await, [0, 1, 2, 3, 4, 101]);
    stop(app).await;
}

#[tokio::test]
async fn statements_are_sent_in_whichever_way_sqlx_knows() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["sends_statements"])).await.unwrap();
    app.client().emit(&order(10, "")).await.unwrap();
    within("it is idle", app.idle()).await.unwrap();
    assert_eq!(app.stats()[0].completed, 1, "{:?}", app.stats());

    // Outside of handlers a transaction is no reference.
    let mut tx = app.client().begin().await.unwrap();
    insert(20).execute(&mut tx).await.unwrap();
    insert(21).execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(
        test.numbers("effects").await,
        [10, 11, 12, 13, 14, 15, 16, 20, 21]
    );
    stop(app).await;
}

#[tokio::test]
async fn a_transaction_that_has_ended_unnoticed_is_not_committed() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["on_side"])).await.unwrap();
    let client = app.client();
    for cancelled in [true, false] {
        let mut tx = client.begin().await.unwrap();
        sqlx::query("insert into effects values (1)")
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.emit(&Side { number: 1 }).unwrap();
        if cancelled {
            cancel_a_begin(&mut tx).await;
        } else {
            mem::forget(tx.begin().await.unwrap());
        }
        let refused = tx.commit().await;
        assert!(matches!(refused, Err(EmitError::Commit(_))), "{refused:?}");
    }
    let logged: i64 = sqlx::query_scalar("select count(*) from core.event_log")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    assert_eq!((logged, test.numbers("effects").await), (0, vec![]));
    stop(app).await;
}

#[tokio::test]
async fn a_violation_that_shows_at_the_commit_is_a_failed_attempt() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["violates_at_commit"]))
        .await
        .unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].attempts, 2);
    let error = letters[0].error.as_deref().unwrap();
    assert!(error.contains("deferred_number_key"), "{error}");
    stop(app).await;
}

#[tokio::test]
async fn a_commit_that_takes_longer_than_the_timeout_is_a_failed_attempt() {
    let test = Test::new().await;
    sqlx::raw_sql(
        "create table slow (number bigint);
         create function sleep() returns trigger language plpgsql as
             $$ begin perform pg_sleep(30); return null; end $$;
         create constraint trigger slow after insert on slow deferrable initially deferred
             for each row execute function sleep()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    let app = nexus::start(test.app(["commits_slowly"])).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    stop(app).await;
}

#[tokio::test]
async fn a_panic_while_a_handler_is_dropped_is_a_failed_attempt() {
    let mut test = Test::new().await;
    let app = nexus::start(test.app(["panics_when_dropped"]))
        .await
        .unwrap();
    app.client().emit(&order(1, "hang")).await.unwrap();
    app.client().emit(&order(2, "")).await.unwrap();
    assert_eq!(test.next().await, ("survivor", 2));
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    stop(app).await;
}
