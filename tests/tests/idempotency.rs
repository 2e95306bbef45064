//! An idempotency key stores one event, and everybody who uses it gets the id of that event: at once, from
//! transactions that end in any order and any way, in any order of keys, and until the key expires.

use std::time::Duration;

use nexus::{
    EmitError,
    event::EncodeError,
    prelude::*,
    testing::{Ended, TestApp, TestEnvelope},
};
use nexus_tests::{until, within};
use serde_json::json;
use sqlx::{PgPool, postgres::PgPoolOptions};

/// A payment was made.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "payment.made")]
struct PaymentMade {
    order: u32,
}

/// An order was paid.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.paid")]
struct OrderPaid {
    order: u32,
}

/// Emits with a key that is none.
#[handler]
async fn book(payment: PaymentMade, tx: &mut Tx) -> nexus::Result {
    tx.emit(&OrderPaid {
        order: payment.order,
    })?
    .idempotency_key("");
    Ok(())
}

async fn start() -> (TestApp, PgPool) {
    let app = TestApp::without_workers(App::discover()).await;
    let pool = PgPoolOptions::new()
        .max_connections(50)
        .connect(app.database().url())
        .await
        .unwrap();
    (app, pool)
}

async fn logged(pool: &PgPool) -> Vec<i64> {
    sqlx::query_scalar("select event_id from core.event_log order by 1")
        .fetch_all(pool)
        .await
        .unwrap()
}

/// How many sessions of the test wait for a lock.
async fn waiting(pool: &PgPool, wanted: i64) {
    until("sessions wait for the key", || async {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (waiting == wanted).then_some(())
    })
    .await;
}

async fn all<T: Send + 'static>(emits: Vec<tokio::task::JoinHandle<T>>) -> Vec<T> {
    let mut results = Vec::new();
    for emit in emits {
        results.push(within("an emit returns", emit).await.unwrap());
    }
    results
}

#[tokio::test]
async fn fifty_emits_from_rust_and_sql_at_once_are_one_event() {
    let (app, pool) = start().await;
    let emits = (0..50).map(|n| {
        let (client, pool) = (app.client().clone(), pool.clone());
        tokio::spawn(async move {
            let event = PaymentMade { order: 1 };
            match n % 3 {
                0 => client.emit(&event).idempotency_key("k").await.unwrap(),
                1 => {
                    let mut tx = pool.begin().await.unwrap();
                    let emit = client.emit_in(&mut tx, &event).idempotency_key("k");
                    let id = emit.await.unwrap();
                    tx.commit().await.unwrap();
                    id
                }
                _ => sqlx::query_scalar("select core.emit('demo', 'payment.made', $1, $2)")
                    .bind(json!({"order": 1}))
                    .bind(json!({"idempotencyKey": "k"}))
                    .fetch_one(&pool)
                    .await
                    .unwrap(),
            }
        })
    });
    let ids = all(emits.collect()).await;
    let logged = logged(&pool).await;
    assert_eq!(logged.len(), 1);
    assert!(ids.iter().all(|id| *id == logged[0]), "{ids:?}, {logged:?}");
}

#[tokio::test]
async fn who_waits_for_a_transaction_that_rolls_back_stores_the_event() {
    let (app, pool) = start().await;
    let client = app.client();
    let event = PaymentMade { order: 1 };
    let mut first = pool.begin().await.unwrap();
    let emit = client.emit_in(&mut first, &event).idempotency_key("k");
    let gone = emit.await.unwrap();

    // Ten that commit and ten that roll back, in whatever order they get the key.
    let emits = (0..20).map(|n| {
        let (client, pool) = (client.clone(), pool.clone());
        tokio::spawn(async move {
            let mut tx = pool.begin().await.unwrap();
            let emit = client.emit_in(&mut tx, &PaymentMade { order: 1 });
            let id = emit.idempotency_key("k").await.unwrap();
            if n % 2 == 0 {
                tx.commit().await.unwrap();
                Some(id)
            } else {
                tx.rollback().await.unwrap();
                None
            }
        })
    });
    let emits: Vec<_> = emits.collect();
    waiting(&pool, 20).await;
    first.rollback().await.unwrap();
    let ids: Vec<i64> = all(emits).await.into_iter().flatten().collect();
    let logged = logged(&pool).await;
    assert_eq!(logged.len(), 1);
    assert_ne!(logged[0], gone);
    assert_eq!(ids, vec![logged[0]; 10]);
}

#[tokio::test]
async fn keys_in_opposite_orders_do_not_wait_for_each_other() {
    let (app, pool) = start().await;
    let client = app.client();
    // Within one statement, and in as many as more than a thousand events take. Capitals are sorted
    // differently by the database and by Rust.
    for (round, count) in [4_u32, 4, 4, 1_500].into_iter().enumerate() {
        let key = move |n: u32| {
            let prefix = if n.is_multiple_of(2) { "a" } else { "B" };
            format!("{round}-{prefix}{n}")
        };
        let emits = [false, true].map(|is_reversed| {
            let client = client.clone();
            tokio::spawn(async move {
                let mut tx = client.begin().await.unwrap();
                let mut orders: Vec<u32> = (0..count).collect();
                if is_reversed {
                    orders.reverse();
                }
                for order in orders {
                    tx.emit(&PaymentMade { order })
                        .unwrap()
                        .idempotency_key(key(order));
                }
                tx.commit().await
            })
        });
        for committed in all(emits.into()).await {
            committed.unwrap();
        }
        let events: i64 = sqlx::query_scalar(
            "select count(*) from core.event_log l
             join core.idempotency_keys k using (event_id) where k.key like $1 || '-%'",
        )
        .bind(round.to_string())
        .fetch_one(&pool)
        .await
        .unwrap();
        assert_eq!(events, i64::from(count));
    }
    assert_eq!(logged(&pool).await.len(), 4 * 3 + 1_500);
}

#[tokio::test]
async fn an_expired_key_is_taken_by_one_of_those_who_use_it_at_once() {
    let (app, pool) = start().await;
    let client = app.client();
    let mut lives = Vec::new();
    for _ in 0..3 {
        // Maintenance, which forgets expired keys, comes in between.
        let emits = (0..30).map(|n| {
            let (client, pool) = (client.clone(), pool.clone());
            tokio::spawn(async move {
                if n % 10 == 5 {
                    sqlx::raw_sql("select core.maintain('demo')")
                        .execute(&pool)
                        .await
                        .unwrap();
                    return None;
                }
                let event = PaymentMade { order: 1 };
                Some(client.emit(&event).idempotency_key("k").await.unwrap())
            })
        });
        let ids: Vec<i64> = all(emits.collect()).await.into_iter().flatten().collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        lives.push(ids[0]);
        assert_eq!(logged(&pool).await, lives);
        app.advance(Duration::from_hours(24) - Duration::from_mins(1))
            .await;
        let again = client.emit(&PaymentMade { order: 1 }).idempotency_key("k");
        assert_eq!(again.await.unwrap(), ids[0]);
        app.advance(Duration::from_mins(2)).await;
    }
}

#[tokio::test]
async fn a_key_that_is_none_is_refused() {
    let (app, pool) = start().await;
    let client = app.client();
    let event = PaymentMade { order: 1 };
    let is_empty =
        |error: &EmitError| matches!(error, EmitError::Encode(EncodeError::KeyEmpty { .. }));
    let error = client.emit(&event).idempotency_key("").await.unwrap_err();
    assert!(is_empty(&error), "{error}");
    assert_eq!(
        error.to_string(),
        "the idempotency key of event `payment.made` is empty: leave it out for an event that needs none"
    );
    let mut tx = client.begin().await.unwrap();
    let error = client.emit_in(&mut tx, &event).idempotency_key("").await;
    assert!(is_empty(&error.unwrap_err()));
    tx.emit(&event).unwrap().idempotency_key("");
    assert!(is_empty(&tx.commit().await.unwrap_err()));

    for (key, said) in [
        (
            String::new(),
            "the idempotency key is empty: leave it out for an event that needs none",
        ),
        (
            "x".repeat(1_001),
            "the idempotency key has 1001 bytes, the limit is 1000: use a hash of it",
        ),
    ] {
        let refused = sqlx::query("select core.emit('demo', 'payment.made', '{}', $1)")
            .bind(json!({ "idempotencyKey": key }))
            .execute(&pool)
            .await
            .unwrap_err();
        assert_eq!(refused.as_database_error().unwrap().message(), said);
    }
    assert!(logged(&pool).await.is_empty());

    // In a handler it is an error that no further attempt can mend.
    let ran = app.run_handler("book", TestEnvelope::of(&event)).await;
    let is_given_up = matches!(&ran.ended, Ended::DeadLettered { .. });
    assert!(is_given_up, "{:?}", ran.ended);
    assert!(ran.error().unwrap().contains("is empty"), "{:?}", ran.ended);
}
