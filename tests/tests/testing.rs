//! The test kit, a test per feature: how a user's tests look, and that the kit finds what it should.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use nexus::{
    jiff::Timestamp,
    prelude::*,
    testing::{Ended, Fault, Point, TestApp, TestDatabase, TestEnvelope},
};
use nexus_tests::within;
use tokio::sync::Semaphore;

/// An order has come in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.placed", key = order_id)]
struct OrderPlaced {
    order_id: i64,
    amount: i64,
}

/// It has been paid for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.charged")]
struct OrderCharged {
    order_id: i64,
}

/// And sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.shipped")]
struct OrderShipped {
    order_id: i64,
}

fn order(order_id: i64) -> OrderPlaced {
    OrderPlaced {
        order_id,
        amount: 100,
    }
}

/// Charges in the database; refuses what is free, and waits for the big ones.
#[handler(max_attempts = 3, backoff = "fixed(1h)", timeout = "20s")]
async fn charge(order: Envelope<OrderPlaced>, tx: &mut Tx) -> nexus::Result<Emit<OrderCharged>> {
    sqlx::query("insert into charges (order_id, attempt) values ($1, $2)")
        .bind(order.order_id)
        .bind(i64::from(order.attempt()))
        .execute(&mut **tx)
        .await?;
    nexus::checkpoint("charged").await?;
    match order.amount {
        0 => Err(Error::permanent("nothing to charge")),
        1_000.. => Err(Error::snooze(Duration::from_mins(10))),
        ..0 => Err("the card was refused".into()),
        _ => Ok(Emit(OrderCharged {
            order_id: order.order_id,
        })),
    }
}

#[handler]
async fn ship(order: OrderCharged) -> Emit<OrderShipped> {
    Emit(OrderShipped {
        order_id: order.order_id,
    })
}

/// Calls out, which no transaction takes back.
#[handler(max_attempts = 5, backoff = "fixed(10ms)")]
async fn notify(order: Envelope<OrderPlaced>, calls: State<Arc<AtomicU32>>) -> nexus::Result {
    nexus::checkpoint("before the call").await?;
    calls.fetch_add(1, Ordering::Relaxed);
    nexus::checkpoint("called").await?;
    if order.amount < 0 {
        return Err(format!("no route to host {}", order.attempt()).into());
    }
    Ok(())
}

/// Does not end before the test lets it.
#[handler(concurrency = 1)]
async fn wait(order: OrderPlaced, gate: State<Arc<Semaphore>>) -> nexus::Result {
    let _ = order;
    gate.acquire().await?.forget();
    Ok(())
}

#[handler]
async fn count(orders: Batch<OrderPlaced>, tx: &mut Tx) -> nexus::Result {
    for order in &orders {
        sqlx::query("insert into charges (order_id, attempt) values ($1, 0)")
            .bind(order.order_id)
            .execute(&mut **tx)
            .await?;
    }
    Ok(())
}

#[cron("@hourly")]
async fn cleanup(tick: Tick, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into charges (order_id, attempt) values ($1, 0)")
        .bind(tick.due_at().as_second())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[cron("30 2 * * *", tz = "Europe/Berlin")]
async fn nightly() {}

/// A database with the table that the handlers write to.
async fn database() -> TestDatabase {
    let database = TestDatabase::new().await;
    sqlx::query("create table charges (order_id bigint, attempt bigint)")
        .execute(&database.pool().await)
        .await
        .unwrap();
    database
}

/// Where it is half past an hour, so that what is due every hour comes due once within an hour, whatever the time
/// is that the test runs at.
async fn database_at_half_past() -> TestDatabase {
    let database = database().await;
    let now = database.now().await.as_second();
    let hours = now.div_euclid(3_600) + 1;
    let half_past = Timestamp::from_second(hours * 3_600 + 1_800).unwrap();
    database.travel_to(half_past).await;
    database
}

async fn start<'a>(handlers: impl IntoIterator<Item = &'a str>) -> TestApp {
    TestApp::start_on(&database().await, App::discover().only(handlers)).await
}

async fn charges(app: &TestApp) -> Vec<i64> {
    sqlx::query_scalar("select order_id from charges order by 1")
        .fetch_all(app.pool())
        .await
        .unwrap()
}

/// The text that a failing assertion of the kit panics with.
async fn complaint<T>(assertion: impl Future<Output = T>) -> String {
    use nexus_tests::catch_panic;
    catch_panic(AssertUnwindSafe(assertion))
        .await
        .expect("the assertion fails")
}

#[tokio::test]
async fn an_app_on_a_database_of_its_own() {
    let one = TestApp::start(App::discover().only(["ship"])).await;
    let other = TestApp::start(App::discover().only(["ship"])).await;
    one.client()
        .emit(&OrderCharged { order_id: 1 })
        .await
        .unwrap();
    one.settled().await;
    assert_eq!(one.only_emitted::<OrderShipped>().await.order_id, 1);
    assert!(other.emitted::<OrderShipped>().await.is_empty());
    assert_ne!(one.node_id(), other.node_id());
    assert_eq!(one.shutdown().await[0].completed, 1);
    // `other` is dropped, which stops it.
}

#[tokio::test]
async fn an_app_that_does_not_start_says_why_and_where() {
    let line = line!() + 1;
    let text = complaint(TestApp::start(App::discover().only(["shp"]))).await;
    assert!(
        text.starts_with(&format!("tests/tests/testing.rs:{line}:")),
        "{text}"
    );
    assert!(text.contains("`shp`, which is no handler"), "{text}");
}

#[tokio::test]
async fn what_was_emitted_is_typed_and_in_order() {
    let app = start(["charge", "ship"]).await;
    let first = app
        .client()
        .emit(&order(1))
        .correlation_id("basket-9")
        .await
        .unwrap();
    app.client().emit(&order(2)).await.unwrap();
    app.settled().await;
    let placed = app.emitted::<OrderPlaced>().await;
    assert_eq!(placed[0].event, order(1));
    assert_eq!(placed[1].event, order(2));
    assert_eq!(
        (placed[0].event_id, placed[0].key.as_deref()),
        (first, Some("1"))
    );
    let shipped = app.emitted::<OrderShipped>().await;
    assert_eq!(shipped.len(), 2);
    let of_first = shipped.iter().find(|event| event.order_id == 1).unwrap();
    assert_eq!(of_first.correlation_id.as_deref(), Some("basket-9"));

    let text = complaint(app.only_emitted::<OrderPlaced>()).await;
    assert!(
        text.contains("expected one `order.placed`, 2 were emitted"),
        "{text}"
    );
    assert!(
        text.contains(&format!("event {first}: {{\"order_id\":1,\"amount\":100}}")),
        "{text}"
    );
}

#[tokio::test]
async fn an_event_that_is_missing_is_answered_with_those_that_are_there() {
    let app = start(["ship"]).await;
    let text = complaint(app.only_emitted::<OrderShipped>()).await;
    assert!(
        text.contains("expected one `order.shipped`, none was emitted; nothing else was"),
        "{text}"
    );
    app.client().emit(&order(1)).await.unwrap();
    let text = complaint(app.only_emitted::<OrderShipped>()).await;
    assert!(
        text.contains("the log has `order.placed` version 1: 1"),
        "{text}"
    );

    // Who should have emitted it says why it has not.
    let app = start(["charge"]).await;
    for amount in [-1, 0] {
        let refused = OrderPlaced {
            order_id: 1,
            amount,
        };
        app.client().emit(&refused).await.unwrap();
    }
    app.settled().await;
    let text = complaint(app.only_emitted::<OrderCharged>()).await;
    assert!(
        text.contains("waiting for a later time (`drained()`")
            && text.contains("(attempt 1 failed: the card was refused)"),
        "{text}"
    );
    assert!(
        text.contains("\ndead letters:\n- handler `charge`:") && text.contains("nothing to charge"),
        "{text}"
    );
}

#[tokio::test]
async fn settled_waits_for_all_that_follows() {
    let app = start(["charge", "ship"]).await;
    let orders: Vec<OrderPlaced> = (0..50).map(order).collect();
    app.client().emit_all(&orders).await.unwrap();
    // By somebody who rings no bell, too.
    sqlx::query("select core.emit('demo', 'order.placed', '{\"order_id\": 50, \"amount\": 1}')")
        .execute(app.pool())
        .await
        .unwrap();
    app.settled().await;
    assert_eq!(charges(&app).await, (0..51).collect::<Vec<i64>>());
    assert_eq!(app.emitted::<OrderShipped>().await.len(), 51);
}

#[tokio::test]
async fn settled_waits_for_what_foreign_programs_sent() {
    let app = start(["ship"]).await;
    sqlx::query("select pgmq.send('core_events_demo', $1::jsonb)")
        .bind(
            r#"{"namespace": "demo", "eventType": "order.charged", "payload": {"order_id": 4},
                "emittedAt": "2026-01-01T00:00:00Z", "producerNodeId": "old"}"#,
        )
        .execute(app.pool())
        .await
        .unwrap();
    app.settled().await;
    assert_eq!(app.only_emitted::<OrderShipped>().await.order_id, 4);
}

#[tokio::test]
async fn what_is_still_open_is_said_with_its_reason() {
    let gate = Arc::new(Semaphore::new(0));
    let database = database().await;
    let app = TestApp::start_on(
        &database,
        App::discover()
            .only(["wait", "charge"])
            .state(Arc::clone(&gate)),
    )
    .await;
    let refused = OrderPlaced {
        order_id: 1,
        amount: -1,
    };
    let id = app.client().emit(&refused).await.unwrap();
    app.client().emit_all(&[order(2), order(3)]).await.unwrap();
    let node = app.node_id();
    let event = format!("event {id} (`order.placed`), attempt");
    let expected = [
        (
            "handler `wait` has been running for ",
            format!(" on node `{node}`: {event} 1"),
        ),
        // In the node's buffer at first, later given back, because another node may have a free slot.
        (
            "handler `wait` ",
            ": 2 messages, the first is event ".to_owned(),
        ),
        (
            "handler `charge` in ",
            format!(": {event} 2 (attempt 1 failed: the card was refused)"),
        ),
    ];
    // Until the node has got so far.
    nexus_tests::until("everything is where it stays", || async {
        let limit = Duration::from_millis(20);
        let open = app.settled_within(limit).await.unwrap_err();
        let mut lines = open.open().iter().chain(open.waiting());
        let is_there = lines.clone().count() == expected.len()
            && expected.iter().all(|(start, end)| {
                lines.any(|line| line.starts_with(start) && line.contains(end))
            });
        is_there.then_some(())
    })
    .await;
    gate.add_permits(3);
    app.settled().await;
}

#[tokio::test]
async fn what_no_node_runs_is_not_waited_for_long() {
    let database = database().await;
    let app = TestApp::start_on(&database, App::discover().only(["ship"])).await;
    sqlx::query(
        "select core.emit('demo', 'order.charged', '{\"order_id\": 1}', '{\"version\": 7}')",
    )
    .execute(app.pool())
    .await
    .unwrap();
    let open = app
        .settled_within(Duration::from_mins(1))
        .await
        .unwrap_err();
    assert!(
        open.open()[0].contains("handler `ship` for version 7 is run by no live node"),
        "{open}"
    );
}

/// As on a machine that is so busy that they do not come.
async fn make_heartbeats_late(pool: &sqlx::PgPool) {
    sqlx::raw_sql(
        "create function core.test_late() returns trigger language plpgsql as $$
         begin
             new.last_heartbeat := core.now() - interval '1 minute';
             return new;
         end $$;
         create trigger late before insert or update on core.nodes for each row execute function core.test_late()",
    )
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_node_whose_heartbeat_is_late_lives_through_every_tick() {
    let database = database().await;
    make_heartbeats_late(&database.pool().await).await;
    database
        .travel_to("2027-06-01T12:00:00Z".parse().unwrap())
        .await;
    let app = TestApp::start_on(&database, App::discover().only(["nightly"])).await;
    app.live_through(Duration::from_hours(24 * 5)).await;
    assert_eq!(app.ticks("nightly").await.len(), 5);
}

#[tokio::test]
async fn a_node_whose_heartbeat_is_late_is_waited_for() {
    let database = database().await;
    let pool = database.pool().await;
    let start = || TestApp::start_on(&database, App::discover().only(["ship"]));
    start().await.shutdown().await;
    sqlx::query("select core.emit('demo', 'order.charged', '{\"order_id\": 1}')")
        .execute(&pool)
        .await
        .unwrap();
    make_heartbeats_late(&pool).await;
    // Nothing can be claimed.
    let mut tx = pool.begin().await.unwrap();
    sqlx::raw_sql("lock table pgmq.q_core_events_demo in exclusive mode")
        .execute(&mut *tx)
        .await
        .unwrap();
    let app = start().await;
    let (settled, ()) = tokio::join!(app.settled_within(Duration::from_mins(1)), async {
        // Longer than it would take to give up.
        tokio::time::sleep(Duration::from_secs(7)).await;
        tx.rollback().await.unwrap();
    });
    settled.unwrap();
    assert_eq!(app.only_emitted::<OrderShipped>().await.order_id, 1);
}

#[tokio::test]
async fn a_transaction_that_may_owe_an_event_is_waited_for() {
    let database = database().await;
    let pool = database.pool().await;
    let emitter =
        TestApp::start_on(&database, App::discover().name("emitter").only(["charge"])).await;
    let mut tx = pool.begin().await.unwrap();
    emitter
        .client()
        .emit_in(&mut tx, &OrderCharged { order_id: 1 })
        .await
        .unwrap();
    // Began before the handler was registered, so it does not know of it.
    let app = TestApp::start_on(&database, App::discover().name("shop").only(["ship"])).await;
    let open = app
        .settled_within(Duration::from_millis(100))
        .await
        .unwrap_err();
    // That of the other app may be open as well.
    let owed = "handler `ship` may be owed a `order.charged`";
    assert!(open.open().iter().any(|line| line.contains(owed)), "{open}");
    tx.commit().await.unwrap();
    app.settled().await;
    assert_eq!(app.only_emitted::<OrderShipped>().await.order_id, 1);
}

#[tokio::test]
async fn retries_come_due_when_the_clock_moves() {
    let app = start(["charge"]).await;
    let refused = OrderPlaced {
        order_id: 1,
        amount: -1,
    };
    app.client().emit(&refused).await.unwrap();
    app.settled().await;
    assert_eq!(app.attempts("charge").len(), 1);
    let text = complaint(app.only_dead_letter()).await;
    assert!(
        text.contains(
            "expected one dead letter, found none\nwaiting for a later time (`drained()`"
        ),
        "{text}"
    );
    assert!(
        text.contains("attempt 2 (attempt 1 failed: the card was refused)"),
        "{text}"
    );
    // An hour with a jitter of a fifth.
    app.advance(Duration::from_mins(73)).await;
    app.settled().await;
    let attempts = app.attempts("charge");
    assert_eq!(attempts.len(), 2);
    assert!(
        matches!(&attempts[1].ended, Some(Ended::Retried { error, after })
            if error == "the card was refused" && after.as_secs().abs_diff(3600) <= 720),
        "{attempts:?}"
    );
    app.drained().await;
    assert_eq!(app.attempts("charge").len(), 3);
    let letter = app.only_dead_letter().await;
    assert_eq!(
        (letter.reason.as_str(), letter.attempts),
        ("Attempts exhausted", 3)
    );
    assert!(
        charges(&app).await.is_empty(),
        "all attempts were rolled back"
    );
}

#[tokio::test]
async fn delayed_emits_come_due_when_the_clock_moves() {
    let app = start(["ship"]).await;
    let charged = OrderCharged { order_id: 1 };
    let hour = Duration::from_hours(1);
    app.client().emit(&charged).after(hour).await.unwrap();
    app.settled().await;
    assert!(app.emitted::<OrderShipped>().await.is_empty());
    app.advance(hour).await;
    app.settled().await;
    assert_eq!(app.only_emitted::<OrderShipped>().await.order_id, 1);
    app.client().emit(&charged).after(hour).await.unwrap();
    app.drained().await;
    assert_eq!(app.emitted::<OrderShipped>().await.len(), 2);
}

#[tokio::test]
async fn ticks_come_due_when_the_clock_moves() {
    let database = database_at_half_past().await;
    let app = TestApp::start_on(&database, App::discover().only(["cleanup"])).await;
    assert!(app.ticks("cleanup").await.is_empty());
    app.advance(Duration::from_hours(1)).await;
    app.settled().await;
    let ticks = app.ticks("cleanup").await;
    assert_eq!(ticks.len(), 1);
    assert_eq!(ticks[0].due_at.as_second() % 3600, 0);
    assert_eq!(charges(&app).await, [ticks[0].due_at.as_second()]);
    // A leap of a year is an outage of a year: the newest of the missed ticks is fired.
    app.advance(Duration::from_hours(24 * 365)).await;
    app.settled().await;
    assert_eq!(app.ticks("cleanup").await.len(), 2);
    let text = complaint(app.ticks("clean_up")).await;
    assert!(
        text.contains("no scheduled task `clean_up`, but `cleanup`"),
        "{text}"
    );
}

#[tokio::test]
async fn every_tick_of_a_month_is_lived_through() {
    let app = start(["nightly"]).await;
    // The night in March without half past two is one of them, for the moment that it is then.
    app.travel_to("2027-03-14T12:00:00Z".parse().unwrap()).await;
    app.settled().await;
    let before = app.ticks("nightly").await.len();
    app.live_through(Duration::from_hours(24 * 30)).await;
    let ticks = app.ticks("nightly").await.split_off(before);
    assert_eq!(ticks.len(), 30);
    let mut days: Vec<_> = ticks
        .iter()
        .map(|tick| tick.due_at.in_tz("Europe/Berlin").unwrap().date())
        .collect();
    days.dedup();
    assert_eq!(days.len(), 30);
    assert!(
        ticks
            .iter()
            .all(|tick| tick.fired_at.duration_since(tick.due_at).as_secs() < 10)
    );
    assert_eq!(app.attempts("nightly").len(), before + 30);
}

#[tokio::test]
async fn the_clock_can_be_set_and_stopped() {
    let app = start(["charge", "ship"]).await;
    app.freeze().await;
    let new_year: Timestamp = "2031-01-01T00:00:00Z".parse().unwrap();
    app.travel_to(new_year).await;
    app.client().emit(&order(1)).await.unwrap();
    app.settled().await;
    assert_eq!(app.only_emitted::<OrderPlaced>().await.emitted_at, new_year);
    assert_eq!(
        app.only_emitted::<OrderShipped>().await.emitted_at,
        new_year
    );
    assert_eq!(app.now().await, new_year);
    app.unfreeze().await;
    assert!(app.now().await > new_year);
    // And back, to a month that has passed.
    app.travel_to("2020-02-29T12:00:00Z".parse().unwrap()).await;
    app.client().emit(&order(2)).await.unwrap();
    app.settled().await;
    assert_eq!(app.emitted::<OrderShipped>().await.len(), 2);
}

#[tokio::test]
async fn a_clock_that_moves_takes_no_lease_from_a_handler_that_runs() {
    let gate = Arc::new(Semaphore::new(0));
    let app = TestApp::start(App::discover().only(["wait"]).state(Arc::clone(&gate))).await;
    let orders: Vec<OrderPlaced> = (0..20).map(order).collect();
    app.client().emit_all(&orders).await.unwrap();
    for _ in 0..20 {
        app.advance(Duration::from_hours(1)).await;
        gate.add_permits(1);
    }
    app.settled().await;
    let stats = app.shutdown().await;
    assert_eq!((stats[0].completed, stats[0].lost), (20, 0));
}

#[tokio::test]
async fn a_handler_runs_alone_with_an_envelope_of_the_tests_shape() {
    let database = database().await;
    let app = TestApp::start_on(&database, App::discover().only(["charge"])).await;
    let done = app.run_handler("charge", TestEnvelope::of(&order(1))).await;
    assert!(done.is_completed(), "{done:?}");
    assert_eq!(
        done.emitted::<OrderCharged>(),
        [OrderCharged { order_id: 1 }]
    );
    assert_eq!(charges(&app).await, [1]);
    assert_eq!(app.only_emitted::<OrderCharged>().await.order_id, 1);

    let refused = OrderPlaced {
        order_id: 2,
        amount: -1,
    };
    let second = app
        .run_handler("charge", TestEnvelope::of(&refused).attempt(2))
        .await;
    assert!(matches!(second.ended, Ended::Retried { .. }), "{second:?}");
    assert_eq!(second.error(), Some("the card was refused"));
    let last = app
        .run_handler("charge", TestEnvelope::of(&refused).attempt(3))
        .await;
    assert!(
        matches!(&last.ended, Ended::DeadLettered { reason, .. } if reason == "Attempts exhausted"),
        "{last:?}"
    );

    let free = OrderPlaced {
        order_id: 3,
        amount: 0,
    };
    let free = app.run_handler("charge", TestEnvelope::of(&free)).await;
    assert!(
        matches!(&free.ended, Ended::DeadLettered { reason, .. } if reason == "Permanent error"),
        "{free:?}"
    );
    let big = OrderPlaced {
        order_id: 4,
        amount: 5_000,
    };
    let big = app.run_handler("charge", TestEnvelope::of(&big)).await;
    assert_eq!(
        big.ended,
        Ended::Snoozed {
            after: Duration::from_mins(10)
        }
    );
    let raw = TestEnvelope::raw("order.placed", &serde_json::json!({ "order_id": "five" }));
    let undecodable = app.run_handler("charge", raw).await;
    assert!(
        undecodable.error().unwrap().contains("at `order_id`"),
        "{undecodable:?}"
    );
    // Only the one that succeeded has an effect, and no message was involved.
    assert_eq!(charges(&app).await, [1]);
    assert!(app.attempts("charge").is_empty());

    let text =
        complaint(app.run_handler("charge", TestEnvelope::of(&OrderCharged { order_id: 1 }))).await;
    assert!(
        text.contains("takes `order.placed` version 1, here is `order.charged` version 1"),
        "{text}"
    );
    let text = complaint(app.run_handler("chrage", TestEnvelope::of(&order(1)))).await;
    assert!(
        text.contains("no handler `chrage`; it has `charge` (the linker leaves out a crate"),
        "{text}"
    );
}

#[tokio::test]
async fn a_handler_is_rehearsed_and_leaves_nothing() {
    let app = start(["charge", "count", "cleanup"]).await;
    let ran = app
        .rehearse_handler("charge", TestEnvelope::of(&order(1)))
        .await;
    assert!(ran.is_completed());
    assert_eq!(
        ran.emitted::<OrderCharged>(),
        [OrderCharged { order_id: 1 }]
    );
    let batch: Vec<TestEnvelope> = vec![
        TestEnvelope::of(&order(2)),
        TestEnvelope::raw("order.placed", &serde_json::json!(null)),
    ];
    let ran = app.rehearse_handler("count", batch).await;
    assert_eq!(
        (ran.is_completed(), ran.rejected.len(), ran.rejected[0].0),
        (true, 1, 1)
    );
    let at: Timestamp = "2026-03-29T01:00:00Z".parse().unwrap();
    let ran = app
        .rehearse_handler("cleanup", TestEnvelope::tick(at))
        .await;
    assert!(ran.is_completed(), "{ran:?}");
    assert!(charges(&app).await.is_empty());
    assert!(app.emitted::<OrderCharged>().await.is_empty());
}

#[tokio::test]
async fn a_handler_that_hangs_times_out_alone_as_well() {
    /// Longer than it may take.
    #[handler(timeout = "100ms", max_attempts = 1)]
    async fn hang(order: OrderPlaced, tx: &mut Tx) -> nexus::Result {
        let _ = order;
        sqlx::query("select pg_sleep(60)")
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
    let app = TestApp::without_workers(App::discover().only(["hang"])).await;
    let ran = app.run_handler("hang", TestEnvelope::of(&order(1))).await;
    assert!(
        ran.error().unwrap().contains("timed out") || ran.error().unwrap().contains("timeout"),
        "{ran:?}"
    );
}

#[tokio::test]
async fn a_starved_handler_is_told_that_it_took_too_long() {
    /// Asks the database for nothing until its time is over.
    #[handler(timeout = "200ms", max_attempts = 1)]
    async fn starve(order: OrderPlaced, tx: &mut Tx) -> nexus::Result {
        let _ = order;
        std::thread::sleep(Duration::from_millis(600));
        sqlx::query("select pg_sleep(60)")
            .execute(&mut **tx)
            .await?;
        Ok(())
    }
    let app = TestApp::without_workers(App::discover().only(["starve"])).await;
    let ran = app.run_handler("starve", TestEnvelope::of(&order(1))).await;
    assert!(ran.error().unwrap().contains("timed out after"), "{ran:?}");
}

#[tokio::test]
async fn an_app_without_workers_emits_and_does_nothing_else() {
    let app = TestApp::without_workers(App::discover().only(["ship", "cleanup"])).await;
    app.client()
        .emit(&OrderCharged { order_id: 1 })
        .await
        .unwrap();
    app.advance(Duration::from_hours(2)).await;
    assert_eq!(app.emitted::<OrderCharged>().await.len(), 1);
    let waiting = app.client().subscriptions().await.unwrap();
    let ship = waiting
        .iter()
        .find(|subscription| subscription.handler == "ship");
    assert_eq!(ship.unwrap().waiting, 1);
    let open = app
        .settled_within(Duration::from_millis(1))
        .await
        .unwrap_err();
    assert_eq!(open.open().len(), 1, "{open}");
    assert!(app.ticks("cleanup").await.is_empty());
    // Its handlers run when they are told to.
    assert!(
        app.run_handler("ship", TestEnvelope::of(&OrderCharged { order_id: 1 }))
            .await
            .is_completed()
    );
    assert_eq!(app.only_emitted::<OrderShipped>().await.order_id, 1);
}

fn notifier() -> (App, Arc<AtomicU32>) {
    let calls = Arc::new(AtomicU32::new(0));
    let app = App::discover().only(["notify"]).state(Arc::clone(&calls));
    (app, calls)
}

#[tokio::test]
async fn attempts_and_dead_letters_are_told() {
    let (app, calls) = notifier();
    let app = TestApp::start(app).await;
    let unreachable = OrderPlaced {
        order_id: 1,
        amount: -1,
    };
    let id = app.client().emit(&unreachable).await.unwrap();
    app.drained().await;
    let attempts = app.attempts("notify");
    let numbers: Vec<u32> = attempts.iter().map(|attempt| attempt.number).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    assert!(
        attempts
            .iter()
            .all(|attempt| attempt.event_id == id && attempt.messages == 1)
    );
    assert_eq!(
        attempts[4].ended,
        Some(Ended::DeadLettered {
            reason: "Attempts exhausted".to_owned(),
            error: "no route to host 5".to_owned(),
        })
    );
    assert_eq!(calls.load(Ordering::Relaxed), 5);
    let letter = app.only_dead_letter().await;
    assert_eq!((letter.event_id, letter.errors.len()), (Some(id), 5));

    app.client().emit(&unreachable).await.unwrap();
    app.drained().await;
    let text = complaint(app.only_dead_letter()).await;
    assert!(text.contains("expected one dead letter, found 2"), "{text}");
    assert!(
        text.contains("`order.placed`, Attempts exhausted after attempt 5: no route to host 5"),
        "{text}"
    );
}

#[tokio::test]
async fn a_checkpoint_fails_or_panics_as_often_as_asked() {
    let (app, calls) = notifier();
    let app = TestApp::start(app).await;
    let failing = app.arm(Fault::fail("before the call").of("notify").times(2));
    let panicking = app.panic_at("called");
    app.client().emit(&order(1)).await.unwrap();
    app.drained().await;
    assert_eq!((failing.hits(), panicking.hits()), (2, 1));
    let ends: Vec<_> = app
        .attempts("notify")
        .into_iter()
        .map(|attempt| match attempt.ended {
            Some(Ended::Retried { error, .. }) => error,
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(
        ends,
        [
            "failed at checkpoint `before the call`, as the test asked",
            "failed at checkpoint `before the call`, as the test asked",
            "the handler panicked: panicked at checkpoint `called`, as the test asked",
            "Some(Completed)",
        ]
    );
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

/// Lets the node die at a place while it handles an order, and lets another take over.
async fn crash_at(fault: Fault) -> TestApp {
    let database = database().await;
    let handlers = || App::discover().only(["charge", "ship"]);
    let first = TestApp::start_on(&database, handlers()).await;
    let crash = first.arm(fault);
    first.client().emit(&order(1)).await.unwrap();
    crash.reached().await;
    assert!(first.has_crashed());
    let second = TestApp::start_on(&database, handlers()).await;
    // The lease of the dead node ends.
    second.advance(Duration::from_secs(11)).await;
    second.settled().await;
    second
}

#[tokio::test]
async fn an_effect_happens_once_wherever_its_node_dies() {
    let faults = [
        Fault::crash(Point::Claimed),
        Fault::crash("charged"),
        Fault::crash(Point::BeforeCommit),
        Fault::crash(Point::AfterCommit),
        Fault::crash(Point::BeforeCommit).of("ship"),
        Fault::crash(Point::AfterCommit).of("ship"),
    ];
    for fault in faults {
        let what = format!("{fault:?}");
        let app = crash_at(fault).await;
        assert_eq!(charges(&app).await, [1], "{what}");
        assert_eq!(app.emitted::<OrderCharged>().await.len(), 1, "{what}");
        assert_eq!(app.emitted::<OrderShipped>().await.len(), 1, "{what}");
        assert!(app.dead_letters().await.is_empty(), "{what}");
    }
}

#[tokio::test]
async fn a_verdict_is_stored_once_wherever_its_node_dies() {
    for point in [
        Point::BeforeRetry,
        Point::AfterRetry,
        Point::BeforeDeadLetter,
        Point::AfterDeadLetter,
    ] {
        let database = database().await;
        let (app, _) = notifier();
        let first = TestApp::start_on(&database, app).await;
        let crash = first.crash_at(point);
        let unreachable = OrderPlaced {
            order_id: 1,
            amount: -1,
        };
        first.client().emit(&unreachable).await.unwrap();
        crash.reached().await;
        let (app, _) = notifier();
        let second = TestApp::start_on(&database, app).await;
        second.advance(Duration::from_secs(11)).await;
        second.drained().await;
        let letter = second.only_dead_letter().await;
        let attempts: Vec<u32> = letter.errors.iter().map(|error| error.attempt).collect();
        assert_eq!(attempts, [1, 2, 3, 4, 5], "{point:?}");
    }
}

#[tokio::test]
async fn a_leap_ends_what_dead_nodes_held() {
    let unreachable = OrderPlaced {
        order_id: 1,
        amount: -1,
    };
    let held = |app: &TestApp| {
        let pool = app.pool().clone();
        async move {
            sqlx::query_scalar::<_, i64>(
                "select count(*) from core.test_messages() where state = 'held'",
            )
            .fetch_one(&pool)
            .await
            .unwrap()
        }
    };
    let places = [
        Fault::crash(Point::Claimed),
        Fault::crash("called"),
        Fault::crash(Point::BeforeRetry),
    ];
    for place in places {
        let app = TestApp::start(notifier().0).await;
        let crash = app.arm(place);
        app.client().emit(&unreachable).await.unwrap();
        crash.reached().await;
        assert_eq!(held(&app).await, 1, "{crash:?}");
        app.advance(Duration::from_secs(11)).await;
        assert_eq!(held(&app).await, 0, "{crash:?}");
    }
}

#[tokio::test]
async fn a_tick_is_fired_once_wherever_its_node_dies() {
    for point in [Point::BeforeTick, Point::AfterTick] {
        let database = database_at_half_past().await;
        let first = TestApp::start_on(&database, App::discover().only(["cleanup"])).await;
        let crash = first.arm(Fault::crash(point).of("cleanup"));
        first.advance(Duration::from_hours(1)).await;
        crash.reached().await;
        let second = TestApp::start_on(&database, App::discover().only(["cleanup"])).await;
        second.settled().await;
        assert_eq!(second.ticks("cleanup").await.len(), 1, "{point:?}");
        assert_eq!(charges(&second).await.len(), 1, "{point:?}");
    }
}

#[tokio::test]
async fn an_answer_that_is_lost_leads_to_no_second_effect() {
    let app = start(["charge", "ship"]).await;
    let lost = [
        app.arm(Fault::fail(Point::BeforeCommit).of("charge")),
        app.arm(Fault::fail(Point::AfterCommit).of("charge")),
        app.arm(Fault::fail(Point::BeforeCommit).of("ship")),
        app.arm(Fault::fail(Point::AfterCommit).of("ship")),
    ];
    app.client().emit(&order(1)).await.unwrap();
    app.drained().await;
    assert!(lost.iter().all(|fault| fault.hits() == 1), "{lost:?}");
    assert_eq!(charges(&app).await, [1]);
    assert_eq!(app.emitted::<OrderShipped>().await.len(), 1);
    let ends: Vec<_> = app
        .attempts("charge")
        .into_iter()
        .map(|attempt| attempt.ended)
        .collect();
    assert!(
        ends.iter()
            .all(|end| matches!(end, Some(Ended::Disturbed { .. }))),
        "{ends:?}"
    );
}

#[tokio::test]
async fn a_node_that_has_died_is_named_with_what_it_held() {
    let gate = Arc::new(Semaphore::new(0));
    let app = TestApp::start(App::discover().only(["wait"]).state(Arc::clone(&gate))).await;
    app.client().emit(&order(1)).await.unwrap();
    nexus_tests::until("the handler runs", || async {
        (app.attempts("wait").len() == 1).then_some(())
    })
    .await;
    app.crash();
    let open = app
        .settled_within(Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(
        open.open()[0].contains(&format!(
            "was taken by node `{}`, which crashed",
            app.node_id()
        )),
        "{open}"
    );
    // Its attempt has no end.
    assert_eq!(app.attempts("wait")[0].ended, None);
}

#[tokio::test]
async fn what_a_dropped_app_held_comes_to_the_next() {
    let gate = Arc::new(Semaphore::new(0));
    let app = || App::discover().only(["wait"]).state(Arc::clone(&gate));
    let first = TestApp::start(app()).await;
    let database = first.database().clone();
    first.client().emit(&order(1)).await.unwrap();
    nexus_tests::until("the handler runs", || async {
        (first.attempts("wait").len() == 1).then_some(())
    })
    .await;
    drop(first);
    let second = TestApp::start_on(&database, app()).await;
    gate.add_permits(1);
    second.advance(Duration::from_secs(11)).await;
    second.settled().await;
    assert_eq!(second.shutdown().await[0].completed, 1);
}

#[tokio::test]
async fn a_place_that_nobody_reaches_is_told_with_those_that_were() {
    let (app, _) = notifier();
    let app = TestApp::start(app).await;
    let fault = app.fail_at("befor the call");
    app.client().emit(&order(1)).await.unwrap();
    app.settled().await;
    let mut hits = std::pin::pin!(fault.reached());
    let early = tokio::time::timeout(Duration::from_millis(20), &mut hits).await;
    assert!(early.is_err());
    assert_eq!(fault.hits(), 0);
    assert_eq!(app.checkpoints(), ["before the call", "called"]);
}

#[tokio::test]
async fn an_app_in_an_empty_database_gets_the_kits_functions() {
    let database = TestDatabase::empty().await;
    let app = within(
        "it starts",
        TestApp::start_on(&database, App::discover().only(["ship"])),
    )
    .await;
    app.client()
        .emit(&OrderCharged { order_id: 1 })
        .await
        .unwrap();
    app.advance(Duration::from_hours(1)).await;
    app.settled().await;
    assert_eq!(app.emitted::<OrderShipped>().await.len(), 1);
}
