//! What is too large, or refused by the server.

use nexus::{EmitError, prelude::*};
use nexus_tests::{until, within};

use crate::{Gate, Order, Side, Test, order, orders, pass, stop};

/// Emits more events than one statement stores.
#[handler(max_attempts = 1)]
async fn emits_thousands(order: Order, tx: &mut Tx) -> nexus::Result<Emit<Side>> {
    let sides: Vec<Side> = (0..order.number).map(|number| Side { number }).collect();
    tx.emit_all(&sides)?;
    Ok(Emit(Side {
        number: order.number,
    }))
}

/// Returns nearly a megabyte; many such attempts end together.
#[handler(concurrency = 20, max_attempts = 1)]
async fn returns_much(order: Order, gate: State<Gate>) -> Emit<Weight> {
    pass(&gate).await;
    Emit(Weight {
        number: order.number,
        ballast: "x".repeat(900_000),
    })
}

/// Something heavy that nobody wants.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.weight")]
struct Weight {
    number: i64,
    ballast: String,
}

/// Returns an event that is over the limit.
#[handler(max_attempts = 1)]
async fn returns_too_much(order: Order) -> Option<Emit<Order>> {
    (order.say != "enough").then(|| {
        Emit(Order {
            say: "x".repeat(5_000),
            ..order
        })
    })
}

/// JSON that Postgres refuses: no numeric is that large.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.huge")]
struct Huge {
    #[serde(serialize_with = "huge")]
    number: f64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde calls it like this"
)]
fn huge<S: serde::Serializer>(_: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    let text = serde_json::value::RawValue::from_string("1e200000".to_owned());
    text.expect("it is JSON").serialize(serializer)
}

#[handler(max_attempts = 2, backoff = "fixed(10ms)")]
async fn returns_what_is_refused(_order: Order) -> Emit<Huge> {
    Emit(Huge { number: 0.0 })
}

/// From now on notes how much each statement appends to the log.
async fn weigh_statements(test: &Test) {
    sqlx::raw_sql(
        "create table rows (number bigint);
         create table bytes (number bigint);
         create function weigh() returns trigger language plpgsql as $$ begin
             insert into public.rows select count(*) from stored;
             insert into public.bytes select coalesce(sum(octet_length(payload::text)), 0) from stored;
             return null;
         end $$;
         create trigger weighs after insert on core.event_log
             referencing new table as stored for each statement execute function weigh()",
    )
    .execute(&test.pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn what_a_transaction_emits_is_stored_in_statements_of_bounded_size() {
    let test = Test::new().await;
    test.prepare(["emits_thousands"], &[order(2_500, "")]).await;
    weigh_statements(&test).await;
    let app = nexus::start(test.app(["emits_thousands"])).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(app.stats()[0].completed, 1, "{:?}", app.stats());
    stop(app).await;
    let rows = test.numbers("rows").await;
    assert!(rows.iter().all(|rows| *rows <= 1_000), "{rows:?}");
    let stored: Vec<i64> = sqlx::query_scalar(
        "select (payload ->> 'number')::bigint from core.event_log
         where event_type = 'fault.side' order by event_id",
    )
    .fetch_all(&test.pool)
    .await
    .unwrap();
    assert_eq!(stored, (0..=2_500).collect::<Vec<i64>>());
}

#[tokio::test]
async fn what_many_handlers_return_is_stored_in_statements_of_bounded_size() {
    let test = Test::new().await;
    test.prepare(["returns_much"], &orders(20)).await;
    weigh_statements(&test).await;
    let app = nexus::start(test.app(["returns_much"])).await.unwrap();
    until("all are claimed", || async {
        let claimed: i64 =
            sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo where read_ct > 0")
                .fetch_one(&test.pool)
                .await
                .unwrap();
        (claimed == 20).then_some(())
    })
    .await;
    test.gate.add_permits(20);
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(app.stats()[0].completed, 20, "{:?}", app.stats());
    stop(app).await;
    let bytes = test.numbers("bytes").await;
    assert!(
        bytes.iter().all(|bytes| *bytes <= 8 * 1024 * 1024),
        "{bytes:?}"
    );
    assert_eq!(test.numbers("rows").await.iter().sum::<i64>(), 20);
}

#[tokio::test]
async fn what_cannot_be_stored_is_refused_before_it_aborts_a_transaction() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["on_side"])).await.unwrap();
    let client = app.client();
    let mut tx = test.pool.begin().await.unwrap();
    let event = order(1, "");
    let bad = "a\0b";
    for refused in [
        client.emit_in(&mut tx, &event).correlation_id(bad).await,
        client.emit_in(&mut tx, &event).traceparent(bad).await,
        client.emit_in(&mut tx, &event).traceparent("xyz").await,
        client.emit_in(&mut tx, &event).idempotency_key(bad).await,
        client
            .emit_in(&mut tx, &event)
            .idempotency_key("x".repeat(5_000))
            .await,
    ] {
        assert!(matches!(refused, Err(EmitError::Encode(_))), "{refused:?}");
    }
    // The transaction goes on.
    client.emit_in(&mut tx, &event).await.unwrap();
    tx.commit().await.unwrap();
    stop(app).await;
}

#[tokio::test]
async fn a_returned_event_over_the_limit_is_refused_like_any_other() {
    let test = Test::new().await;
    let app = test.app(["returns_too_much"]).max_payload_bytes(1_000);
    let app = nexus::start(app).await.unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    let error = letters[0].error.as_deref().unwrap();
    assert!(error.contains("the limit is 1000"), "{error}");
    stop(app).await;
}

#[tokio::test]
async fn a_returned_event_that_the_server_refuses_is_a_failed_attempt() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["returns_what_is_refused"]))
        .await
        .unwrap();
    app.client().emit(&order(1, "")).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    stop(app).await;
}
