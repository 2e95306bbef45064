//! What a program does with its database before it starts: `App::before_start`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use nexus::{Database, StartError, prelude::*, testing::TestDatabase};
use nexus_tests::within;
use sqlx::PgPool;

/// An order has been placed.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.placed")]
struct OrderPlaced {
    order_id: i64,
}

#[handler]
async fn book(order: OrderPlaced, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into bookings (order_id) values ($1)")
        .bind(order.order_id)
        .execute(tx)
        .await?;
    Ok(())
}

fn app(database: &TestDatabase) -> App {
    App::discover()
        .name("shop")
        .database_url(database.url())
        .idle_poll(Duration::from_millis(25))
}

async fn waiting(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo__shop")
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn tables_are_there_before_a_handler_runs() {
    let database = TestDatabase::new().await;
    nexus::start(app(&database)).await.unwrap().shutdown().await;
    let client = Database::from_url(database.url(), "the test").unwrap();
    let client = Client::connect(&client, "demo").await.unwrap();
    client.emit(&OrderPlaced { order_id: 7 }).await.unwrap();

    let prepared = app(&database)
        .before_start(|pool| async move {
            assert_eq!(waiting(&pool).await, 1);
            sqlx::query("create table bookings (order_id bigint)")
                .execute(&pool)
                .await?;
            Ok(())
        })
        .before_start(async |pool| {
            sqlx::query("alter table bookings add primary key (order_id)")
                .execute(&pool)
                .await?;
            Ok(())
        });
    let node = nexus::start(prepared).await.unwrap();
    within("all is settled", node.idle()).await.unwrap();
    let stats = &node.stats()[0];
    assert_eq!((stats.completed, stats.retried), (1, 0));
    node.shutdown().await;
}

#[tokio::test]
async fn nodes_that_start_together_prepare_one_by_one() {
    let database = TestDatabase::new().await;
    let (inside, runs) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let starts = (0..5).map(|_| {
        let (inside, runs) = (Arc::clone(&inside), Arc::clone(&runs));
        let prepared = app(&database)
            .pool_size(2)
            .before_start(move |pool| async move {
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                // Of two at once, one of these would fail.
                for _ in 0..5 {
                    sqlx::raw_sql(
                        "drop table if exists bookings; create table bookings (order_id bigint)",
                    )
                    .execute(&pool)
                    .await?;
                }
                inside.fetch_sub(1, Ordering::SeqCst);
                runs.fetch_add(1, Ordering::SeqCst);
                Ok(())
            });
        nexus::start(prepared)
    });
    for node in futures_util::future::join_all(starts).await {
        node.unwrap().shutdown().await;
    }
    assert_eq!(runs.load(Ordering::SeqCst), 5);
}

#[tokio::test]
async fn an_app_that_cannot_be_prepared_does_not_start_and_says_why() {
    let database = TestDatabase::new().await;
    let broken = app(&database).before_start(|pool| async move {
        sqlx::query("alter table orders add column paid boolean")
            .execute(&pool)
            .await?;
        Ok(())
    });
    let error = nexus::start(broken).await.unwrap_err();
    assert!(matches!(error, StartError::BeforeStart(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        "what `App::before_start` does failed: error returned from database: relation \"orders\" does not exist"
    );
    let nodes: i64 = sqlx::query_scalar("select count(*) from core.nodes")
        .fetch_one(&database.pool().await)
        .await
        .unwrap();
    assert_eq!(nodes, 0);

    // The turn is the next one's.
    let node = within(
        "it starts",
        nexus::start(app(&database).before_start(|_| async { Ok(()) })),
    );
    node.await.unwrap().shutdown().await;
}
