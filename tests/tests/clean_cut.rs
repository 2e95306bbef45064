//! A handler that starts today gets every event that is committed after its registration, once, and
//! none that was committed before: also the events of transactions that were open meanwhile and
//! could not know of it.

use std::time::Duration;

use nexus::{prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, SqlSafeStr};
use tokio::sync::mpsc;

/// Somebody knocked.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "door.knocked")]
struct Knocked {
    n: u32,
}

type Saw = mpsc::UnboundedSender<(&'static str, u32)>;

#[handler]
async fn early(event: Knocked, saw: State<Saw>) {
    let _ = saw.send(("early", event.n));
}

#[handler]
async fn late(event: Knocked, saw: State<Saw>) {
    let _ = saw.send(("late", event.n));
}

#[handler(group = "elsewhere")]
async fn late_elsewhere(event: Knocked, saw: State<Saw>) {
    let _ = saw.send(("late_elsewhere", event.n));
}

struct Test {
    database: TestDatabase,
    pool: PgPool,
    sender: Saw,
    saw: mpsc::UnboundedReceiver<(&'static str, u32)>,
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let (sender, saw) = mpsc::unbounded_channel();
        Self {
            pool: database.pool().await,
            database,
            sender,
            saw,
        }
    }

    async fn start<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> nexus::Handle {
        let app = App::discover()
            .only(handlers)
            .database_url(self.database.url())
            .idle_poll(Duration::from_millis(25))
            .state(self.sender.clone());
        nexus::start(app).await.unwrap()
    }

    /// What all handlers have seen once nothing is left, in order.
    async fn seen(&mut self, apps: &[&nexus::Handle]) -> Vec<(&'static str, u32)> {
        settled(&self.pool).await;
        for app in apps {
            within("all is handled", app.idle()).await.unwrap();
        }
        let mut seen = Vec::new();
        while let Ok(next) = self.saw.try_recv() {
            seen.push(next);
        }
        seen.sort_unstable();
        seen
    }
}

/// Waits until no subscription has anything left to look for, so that nothing is scanned any more.
async fn settled(pool: &PgPool) {
    until("the subscriptions settle", || async {
        let open = count(
            pool,
            "select from core.subscriptions where since_snapshot is not null",
        )
        .await;
        (open == 0).then_some(())
    })
    .await;
}

async fn count(pool: &PgPool, query: &str) -> i64 {
    let text = AssertSqlSafe(format!("select count(*) from ({query}) q")).into_sql_str();
    sqlx::query_scalar(text).fetch_one(pool).await.unwrap()
}

async fn execute(connection: &mut PgConnection, statement: &'static str) {
    sqlx::raw_sql(statement).execute(connection).await.unwrap();
}

async fn emit_by_sql(connection: &mut PgConnection, n: u32) {
    sqlx::query("select core.emit('demo', 'door.knocked', jsonb_build_object('n', $1::int))")
        .bind(i32::try_from(n).unwrap())
        .execute(connection)
        .await
        .unwrap();
}

#[tokio::test]
async fn open_transactions_are_delivered_once_and_earlier_events_are_not() {
    let mut test = Test::new().await;
    let first = test.start(["early"]).await;
    let client = first.client();
    client.emit(&Knocked { n: 1 }).await.unwrap();
    // Emitted under the subscriptions of now, committed after the others have registered.
    let mut by_client = test.pool.begin().await.unwrap();
    client
        .emit_in(&mut by_client, &Knocked { n: 2 })
        .await
        .unwrap();
    let mut by_sql = test.pool.begin().await.unwrap();
    emit_by_sql(&mut by_sql, 3).await;
    let mut undone = test.pool.begin().await.unwrap();
    emit_by_sql(&mut undone, 4).await;

    let second = test.start(["late", "late_elsewhere"]).await;
    client.emit(&Knocked { n: 5 }).await.unwrap();
    by_client.commit().await.unwrap();
    undone.rollback().await.unwrap();
    // This one knows of the new handlers by now, and still owes its first event.
    emit_by_sql(&mut by_sql, 6).await;
    by_sql.commit().await.unwrap();

    let mut expected = Vec::new();
    expected.extend([1, 2, 3, 5, 6].map(|n| ("early", n)));
    expected.extend([2, 3, 5, 6].map(|n| ("late", n)));
    expected.extend([2, 3, 5, 6].map(|n| ("late_elsewhere", n)));
    assert_eq!(test.seen(&[&first, &second]).await, expected);
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn a_transaction_with_an_old_snapshot_may_emit_long_after() {
    let mut test = Test::new().await;
    let first = test.start(["early"]).await;
    let mut snapshots = Vec::new();
    for _ in 0..2 {
        let mut connection = test.pool.acquire().await.unwrap();
        execute(
            &mut connection,
            "begin isolation level repeatable read; select count(*) from core.event_log",
        )
        .await;
        snapshots.push(connection);
    }
    let second = test.start(["late"]).await;
    // The snapshot keeps the cut open, however often it is looked at.
    for _ in 0..3 {
        sqlx::raw_sql("select core.settle_subscriptions('demo')")
            .execute(&test.pool)
            .await
            .unwrap();
    }
    assert_eq!(
        count(
            &test.pool,
            "select from core.subscriptions where handler = 'late' and since_snapshot is null"
        )
        .await,
        0
    );
    // Both see the subscriptions as of their snapshot.
    first
        .client()
        .emit_in(&mut snapshots[0], &Knocked { n: 1 })
        .await
        .unwrap();
    emit_by_sql(&mut snapshots[1], 2).await;
    for connection in &mut snapshots {
        execute(connection, "commit").await;
    }
    // The client has learnt the old subscriptions from it, and unlearns them.
    first.client().emit(&Knocked { n: 3 }).await.unwrap();
    let mut expected = Vec::new();
    expected.extend([1, 2, 3].map(|n| ("early", n)));
    expected.extend([1, 2, 3].map(|n| ("late", n)));
    assert_eq!(test.seen(&[&first, &second]).await, expected);
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test]
async fn savepoints_are_no_gap() {
    let mut test = Test::new().await;
    let first = test.start(["early"]).await;
    let mut tx = test.pool.begin().await.unwrap();
    execute(&mut tx, "savepoint a").await;
    first
        .client()
        .emit_in(&mut tx, &Knocked { n: 1 })
        .await
        .unwrap();
    execute(&mut tx, "rollback to a").await;
    first
        .client()
        .emit_in(&mut tx, &Knocked { n: 2 })
        .await
        .unwrap();
    execute(&mut tx, "savepoint b").await;
    emit_by_sql(&mut tx, 3).await;
    let second = test.start(["late"]).await;
    execute(&mut tx, "release b").await;
    tx.commit().await.unwrap();
    let expected = [("early", 2), ("early", 3), ("late", 2), ("late", 3)];
    assert_eq!(test.seen(&[&first, &second]).await, expected);
    first.shutdown().await;
    second.shutdown().await;
}

/// A namespace with one subscription, and no app that would settle on its own.
async fn without_apps() -> (TestDatabase, PgPool) {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    sqlx::raw_sql("select core.ensure_group('demo', 'default'), core.ensure_group('demo', 'new')")
        .execute(&pool)
        .await
        .unwrap();
    (database, pool)
}

const SUBSCRIBE: &str = "select core.subscribe('demo', 'new',
    '[{\"group\": \"new\", \"handler\": \"late\", \"eventType\": \"door.knocked\"}]')";

const NEW_QUEUE: &str = "select from pgmq.q_core_events_demo__new";

async fn messages(pool: &PgPool) -> Vec<Value> {
    sqlx::query_scalar("select message from pgmq.q_core_events_demo__new order by msg_id")
        .fetch_all(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn nodes_that_settle_at_once_deliver_once() {
    let (database, pool) = without_apps().await;
    let mut open = Vec::new();
    let emitters = sqlx::postgres::PgPoolOptions::new()
        .max_connections(20)
        .connect(database.url())
        .await
        .unwrap();
    for n in 0..20 {
        let mut tx = emitters.begin().await.unwrap();
        emit_by_sql(&mut tx, n).await;
        open.push(tx);
    }
    sqlx::raw_sql(SUBSCRIBE).execute(&pool).await.unwrap();
    let mut nodes = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        nodes.spawn(async move {
            until("the subscription settles", || async {
                sqlx::raw_sql("select core.settle_subscriptions('demo')")
                    .execute(&pool)
                    .await
                    .unwrap();
                let open = count(
                    &pool,
                    "select from core.subscriptions where since_snapshot is not null",
                )
                .await;
                (open == 0).then_some(())
            })
            .await;
        });
    }
    for tx in open {
        tx.commit().await.unwrap();
        tokio::task::yield_now().await;
    }
    within("all nodes are done", nodes.join_all()).await;
    assert_eq!(count(&pool, NEW_QUEUE).await, 20);
    assert_eq!(
        count(
            &pool,
            "select distinct headers ->> 'eventId' from pgmq.q_core_events_demo__new"
        )
        .await,
        20
    );
}

#[tokio::test]
async fn what_is_owed_is_the_message_the_emit_would_have_sent() {
    let (_database, pool) = without_apps().await;
    sqlx::raw_sql(
        "insert into core.scheduled_tasks (task_id, namespace, name, cron_expression, event_type, payload)
         values ('123e4567-e89b-12d3-a456-426614174000', 'demo', 't', '* * * * *', 'door.knocked', '{\"n\": 3}');
         select pgmq.send('core_events_demo', '{\"eventType\": \"door.knocked\", \"payload\": {\"n\": 2},
             \"emittedAt\": \"2026-01-01T00:00:00.000Z\", \"producerNodeId\": \"js\", \"room\": \"7\"}')",
    )
    .execute(&pool)
    .await
    .unwrap();
    let emits = "select core.emit('demo', 'door.knocked', '{\"n\": 1}', '{\"version\": 4, \"key\": \"k\",
             \"correlationId\": \"c\", \"causationId\": \"9\", \"traceparent\": \"00-1\", \"metadata\": {\"dueAt\": \"x\"}}');
         select count(*) from core.adopt('demo', 'core_events_demo', 10, 100000);
         select core.fire_tick('123e4567-e89b-12d3-a456-426614174000', '2026-01-02T00:00:00Z', null);";
    let mut owed = pool.begin().await.unwrap();
    execute(&mut owed, emits).await;
    // In the log only: nobody was to be told, and nobody is.
    execute(
        &mut owed,
        "select core.append_event_log('demo', 'door.knocked', '{\"n\": 4}', 'n')",
    )
    .await;
    sqlx::raw_sql(SUBSCRIBE).execute(&pool).await.unwrap();
    owed.commit().await.unwrap();
    sqlx::raw_sql("select core.settle_subscriptions('demo')")
        .execute(&pool)
        .await
        .unwrap();
    let settled = messages(&pool).await;
    assert_eq!(settled.len(), 3, "{settled:?}");
    assert_eq!(settled[1]["room"], "7");
    assert_eq!(settled[1]["emittedAt"], "2026-01-01T00:00:00.000Z");
    assert_eq!(settled[2]["dueAt"], "2026-01-02T00:00:00.000Z");
    assert!(settled[0].get("dueAt").is_none(), "{}", settled[0]);
    let trace = "select from pgmq.q_core_events_demo__new where headers ->> 'traceparent' = '00-1'
                 and headers ->> 'handler' = 'late' and headers ->> 'eventVersion' = '4'";
    assert_eq!(count(&pool, trace).await, 1);

    // The same again, now that the subscription is known: sent by the emits themselves.
    sqlx::raw_sql(
        "select pgmq.send('core_events_demo', '{\"eventType\": \"door.knocked\", \"payload\": {\"n\": 2},
             \"emittedAt\": \"2026-01-01T00:00:00.000Z\", \"producerNodeId\": \"js\", \"room\": \"7\"}');
         delete from core.ticks",
    )
    .execute(&pool)
    .await
    .unwrap();
    sqlx::raw_sql(emits).execute(&pool).await.unwrap();
    sqlx::raw_sql("select core.settle_subscriptions('demo')")
        .execute(&pool)
        .await
        .unwrap();
    let sent = messages(&pool).await;
    assert_eq!(sent.len(), 6);
    for (mut settled, mut sent) in sent[..3].iter().cloned().zip(sent[3..].iter().cloned()) {
        let is_foreign = settled["producerNodeId"] == "js";
        for body in [&mut settled, &mut sent] {
            let body = body.as_object_mut().unwrap();
            if body["correlationId"] != json!("c") {
                body.remove("correlationId");
            }
            if !is_foreign {
                body.remove("emittedAt");
            }
        }
        assert_eq!(settled, sent);
    }
}

#[tokio::test]
async fn another_event_type_is_a_new_cut() {
    let (_database, pool) = without_apps().await;
    sqlx::raw_sql(SUBSCRIBE).execute(&pool).await.unwrap();
    let settle = || async {
        sqlx::raw_sql("select core.settle_subscriptions('demo')")
            .execute(&pool)
            .await
            .unwrap();
        let open = count(
            &pool,
            "select from core.subscriptions where since_snapshot is not null",
        )
        .await;
        (open == 0).then_some(())
    };
    until("the first cut settles", settle).await;
    sqlx::raw_sql("select core.emit('demo', 'window.broken', '{\"n\": 1}')")
        .execute(&pool)
        .await
        .unwrap();
    let mut open = pool.begin().await.unwrap();
    execute(
        &mut open,
        "select core.emit('demo', 'window.broken', '{\"n\": 2}')",
    )
    .await;
    sqlx::raw_sql(
        "select core.subscribe('demo', 'new',
             '[{\"group\": \"new\", \"handler\": \"late\", \"eventType\": \"window.broken\"}]')",
    )
    .execute(&pool)
    .await
    .unwrap();
    open.commit().await.unwrap();
    until("the second cut settles", settle).await;
    let payloads: Vec<Value> = messages(&pool)
        .await
        .iter()
        .map(|m| m["payload"].clone())
        .collect();
    assert_eq!(payloads, [json!({"n": 2})]);
    // Registering the same again is no change.
    let version = "select from core.namespaces where subscriptions_version = 2";
    assert_eq!(count(&pool, version).await, 1);
}

#[tokio::test]
async fn sessions_that_hide_their_state_are_waited_for() {
    let (_database, pool) = without_apps().await;
    // To a role that may not read statistics, sessions of others show neither state nor type.
    sqlx::raw_sql("select core.grant_namespace('demo', 'pg_signal_backend')")
        .execute(&pool)
        .await
        .unwrap();
    let mut open = pool.acquire().await.unwrap();
    execute(&mut open, "begin").await;
    emit_by_sql(&mut open, 1).await;
    let mut old = pool.acquire().await.unwrap();
    execute(
        &mut old,
        "begin isolation level repeatable read; select count(*) from core.event_log",
    )
    .await;

    let mut low = pool.acquire().await.unwrap();
    execute(&mut low, "set role pg_signal_backend").await;
    execute(&mut low, SUBSCRIBE).await;
    for _ in 0..3 {
        execute(&mut low, "select core.settle_subscriptions('demo')").await;
    }
    emit_by_sql(&mut old, 2).await;
    execute(&mut old, "commit").await;
    execute(&mut open, "commit").await;
    until("the subscription settles", || async {
        sqlx::raw_sql(
            "set role pg_signal_backend; select core.settle_subscriptions('demo'); reset role",
        )
        .execute(&pool)
        .await
        .unwrap();
        let open = count(
            &pool,
            "select from core.subscriptions where since_snapshot is not null",
        )
        .await;
        (open == 0).then_some(())
    })
    .await;
    let mut payloads: Vec<i64> = messages(&pool)
        .await
        .iter()
        .map(|m| m["payload"]["n"].as_i64().unwrap())
        .collect();
    payloads.sort_unstable();
    assert_eq!(payloads, [1, 2]);
}

#[tokio::test]
async fn nothing_is_looked_for_once_it_is_quiet() {
    let test = Test::new().await;
    let app = test.start(["early", "late", "late_elsewhere"]).await;
    settled(&test.pool).await;
    // A restart of the same build registers nothing new, so nothing has to be settled again.
    app.shutdown().await;
    let app = test.start(["early", "late", "late_elsewhere"]).await;
    assert_eq!(
        count(
            &test.pool,
            "select from core.subscriptions where since_snapshot is not null"
        )
        .await,
        0
    );
    assert_eq!(
        count(
            &test.pool,
            "select from core.namespaces where subscriptions_version = 1"
        )
        .await,
        1
    );
    app.shutdown().await;
}
