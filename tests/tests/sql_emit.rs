//! Events come in by SQL as well as by the client: `core.emit` stores what `Client::emit` stores,
//! and what a foreign program sends by plain `pgmq.send` is adopted, whole or not at all, once, and
//! whatever else lies in the queue.

use std::{collections::BTreeMap, time::Duration};

use nexus::{Database, prelude::*, testing::TestDatabase};
use nexus_tests::within;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgPool, Row, SqlSafeStr};
use tokio::sync::mpsc;

/// Goods have left.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "goods.shipped", version = 2, key = parcel)]
struct GoodsShipped {
    parcel: String,
    weight: Option<f64>,
}

type Saw = mpsc::UnboundedSender<(&'static str, GoodsShipped, nexus::EnvelopeMeta)>;

#[handler]
async fn track(event: Envelope<GoodsShipped>, saw: State<Saw>) {
    let _ = saw.send(("track", event.event().clone(), event.meta().clone()));
}

#[handler]
async fn notify(event: Envelope<GoodsShipped>, saw: State<Saw>) {
    let _ = saw.send(("notify", event.event().clone(), event.meta().clone()));
}

#[handler(group = "billing")]
async fn bill(event: Envelope<GoodsShipped>, saw: State<Saw>) {
    let _ = saw.send(("bill", event.event().clone(), event.meta().clone()));
}

struct Test {
    database: TestDatabase,
    pool: PgPool,
    app: nexus::Handle,
    saw: mpsc::UnboundedReceiver<(&'static str, GoodsShipped, nexus::EnvelopeMeta)>,
}

impl Test {
    /// An app with all three handlers.
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let (sender, saw) = mpsc::unbounded_channel();
        let app = App::discover()
            .idle_poll(Duration::from_millis(25))
            .database_url(database.url())
            .max_payload_bytes(100_000)
            .state::<Saw>(sender);
        let app = nexus::start(app).await.unwrap();
        Self {
            pool: database.pool().await,
            database,
            app,
            saw,
        }
    }

    /// The same subscriptions, and nobody who takes messages out of the queues.
    async fn stopped() -> (TestDatabase, PgPool) {
        let test = Self::new().await;
        test.app.shutdown().await;
        (test.database, test.pool)
    }

    async fn send(&self, body: &Value) -> i64 {
        send(&self.pool, "core_events_demo", body).await
    }

    /// What the three handlers were given of the next event.
    async fn next(&mut self) -> BTreeMap<&'static str, (GoodsShipped, nexus::EnvelopeMeta)> {
        let mut seen = BTreeMap::new();
        while seen.len() < 3 {
            let (who, event, meta) = within("a handler runs", self.saw.recv()).await.unwrap();
            assert!(seen.insert(who, (event, meta)).is_none(), "{who} ran twice");
        }
        seen
    }

    async fn idle(&self) {
        within("all is settled", self.app.idle()).await.unwrap();
    }
}

async fn send(pool: &PgPool, queue: &str, body: &Value) -> i64 {
    sqlx::query_scalar("select pgmq.send($1, $2)")
        .bind(queue)
        .bind(body)
        .fetch_one(pool)
        .await
        .unwrap()
}

async fn rows(pool: &PgPool, query: &str) -> Vec<Value> {
    let text = AssertSqlSafe(format!("select to_jsonb(q) from ({query}) q")).into_sql_str();
    sqlx::query_scalar(text).fetch_all(pool).await.unwrap()
}

async fn count(pool: &PgPool, query: &str) -> i64 {
    let text = AssertSqlSafe(format!("select count(*) from ({query}) q")).into_sql_str();
    sqlx::query_scalar(text).fetch_one(pool).await.unwrap()
}

/// `core.emit` for an event of the type above, with options.
async fn emit(pool: &PgPool, payload: &Value, options: &Value) -> sqlx::Result<i64> {
    sqlx::query_scalar("select core.emit('demo', 'goods.shipped', $1, $2)")
        .bind(payload)
        .bind(options)
        .fetch_one(pool)
        .await
}

/// The text of the database's refusal.
fn refusal<T: std::fmt::Debug>(result: sqlx::Result<T>) -> String {
    result
        .unwrap_err()
        .as_database_error()
        .expect("the database refuses")
        .message()
        .to_owned()
}

fn parcel() -> Value {
    json!({"parcel": "p-1", "weight": 1.5})
}

/// Log rows and messages of all queues, without what differs between any two events.
async fn stored(pool: &PgPool, event_id: i64) -> (Value, Vec<Value>) {
    let log = rows(
        pool,
        &format!(
            "select to_jsonb(l) - '{{event_id,emitted_at,producer_node_id,tx_id}}'::text[] as row,
                    tableoid::regclass = ('core.event_log_' || to_char(emitted_at at time zone 'UTC', 'YYYY_MM'))::regclass as placed
             from core.event_log l where event_id = {event_id}"
        ),
    )
    .await;
    assert_eq!(log.len(), 1);
    let messages = rows(
        pool,
        &format!(
            "select queue, message - '{{emittedAt,producerNodeId}}'::text[] as message, headers - 'eventId' as headers,
                    read_ct, last_read_at, vt = core.now() or vt > now() - interval '1 minute' as due
             from (select 'main' as queue, * from pgmq.q_core_events_demo
                   union all select 'billing', * from pgmq.q_core_events_demo__billing) m
             where (headers ->> 'eventId')::bigint = {event_id}
             order by queue, headers ->> 'handler'"
        ),
    )
    .await;
    (log[0].clone(), messages)
}

#[tokio::test]
async fn stores_what_the_client_stores() {
    let (database, pool) = Test::stopped().await;
    let database = Database::from_url(database.url(), "the test").unwrap();
    let client = nexus::Client::connect(&database, "demo").await.unwrap();
    let event = GoodsShipped {
        parcel: "p-1".to_owned(),
        weight: Some(1.5),
    };
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    let by_client = client
        .emit(&event)
        .correlation_id("order-9")
        .traceparent(trace)
        .await
        .unwrap();
    let options =
        json!({"version": 2, "key": "p-1", "correlationId": "order-9", "traceparent": trace});
    let by_sql = emit(&pool, &parcel(), &options).await.unwrap();
    let (client_row, client_messages) = stored(&pool, by_client).await;
    assert_eq!(client_messages.len(), 3);
    assert_eq!((client_row, client_messages), stored(&pool, by_sql).await);

    // Without a correlation id, an event's own id is it.
    let by_client = client.emit(&event).await.unwrap();
    let by_sql = emit(&pool, &parcel(), &json!({"version": 2, "key": "p-1"}))
        .await
        .unwrap();
    for id in [by_client, by_sql] {
        let (row, messages) = stored(&pool, id).await;
        assert_eq!(row["row"]["correlation_id"], id.to_string());
        assert!(
            messages
                .iter()
                .all(|m| m["message"]["correlationId"] == json!(id.to_string())),
            "{messages:?}"
        );
    }
    let time = "select distinct message ->> 'emittedAt' ~ '^\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\d\\.\\d{3}Z$' as is
                from pgmq.q_core_events_demo";
    assert_eq!(rows(&pool, time).await, [json!({"is": true})]);
}

/// The trace context of a request.
const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[tokio::test]
async fn options_reach_the_handlers() {
    let mut test = Test::new().await;
    let options = json!({
        "version": 2, "key": "k", "correlationId": "c", "causationId": "17", "producerNodeId": "cron-box",
        "traceparent": TRACE, "tracestate": "a=b", "metadata": {"who": "me"},
    });
    let id = emit(&test.pool, &parcel(), &options).await.unwrap();
    let seen = test.next().await;
    for (who, (event, meta)) in &seen {
        assert_eq!(
            (event.parcel.as_str(), event.weight),
            ("p-1", Some(1.5)),
            "{who}"
        );
        assert_eq!(meta.event_id(), id);
        assert_eq!(meta.key(), Some("k"));
        assert_eq!(meta.correlation_id(), Some("c"));
        assert_eq!(meta.causation_id(), Some("17"));
        assert_eq!(meta.producer_node_id(), "cron-box");
        assert_eq!(meta.traceparent(), Some(TRACE));
    }
    let log = rows(&test.pool, "select metadata from core.event_log").await;
    assert_eq!(
        log[0]["metadata"],
        json!({"who": "me", "traceparent": TRACE, "tracestate": "a=b"})
    );

    // What has not the form of a trace context is not passed on, and costs nothing else.
    for bad in ["00-1", ""] {
        let options = json!({"version": 2, "traceparent": bad, "tracestate": "a=b"});
        emit(&test.pool, &parcel(), &options).await.unwrap();
        for (who, (_, meta)) in &test.next().await {
            assert_eq!(meta.traceparent(), None, "{who}");
        }
    }
    test.app.shutdown().await;
}

#[tokio::test]
async fn wrong_arguments_are_refused_with_the_reason() {
    let (_database, pool) = Test::stopped().await;
    for (options, reason) in [
        (
            json!({"corelationId": "x"}),
            "unknown option of core.emit: corelationId",
        ),
        (
            json!({"version": 0}),
            "versions of events count from 1, found 0",
        ),
        (
            json!({"version": "two"}),
            "invalid input syntax for type integer: \"two\"",
        ),
        (
            json!({"metadata": 5}),
            "option \"metadata\" of core.emit must be an object without \"envelope\", found 5",
        ),
        (
            json!({"metadata": {"envelope": 1}}),
            "must be an object without \"envelope\"",
        ),
        (json!([]), "cannot call jsonb_object_keys on an array"),
    ] {
        let said = refusal(emit(&pool, &parcel(), &options).await);
        assert!(said.contains(reason), "{options}: {said}");
    }
    for (call, reason) in [
        (
            "select core.emit('nowhere', 'a.b', '{}')",
            "namespace \"nowhere\" is not known",
        ),
        (
            "select core.emit(null, 'a.b', '{}')",
            "namespace \"<NULL>\" is not known",
        ),
        (
            "select core.emit('demo', null, '{}')",
            "an event needs an event type",
        ),
        (
            "select core.emit('demo', '', '{}')",
            "an event needs an event type",
        ),
        (
            "select core.emit('demo', repeat('x', 3000), '{}')",
            "is longer than 100 bytes",
        ),
    ] {
        let said = refusal(sqlx::raw_sql(call).execute(&pool).await);
        assert!(said.contains(reason), "{call}: {said}");
    }
    assert_eq!(count(&pool, "select from core.event_log").await, 0);
}

#[tokio::test]
async fn null_arguments_are_as_good_as_none() {
    let (_database, pool) = Test::stopped().await;
    let id: i64 = sqlx::query_scalar("select core.emit('demo', 'goods.shipped', null, null)")
        .fetch_one(&pool)
        .await
        .unwrap();
    let (row, messages) = stored(&pool, id).await;
    assert_eq!(row["row"]["payload"], Value::Null);
    assert_eq!(row["row"]["metadata"], json!({}));
    assert_eq!(messages[0]["message"]["payload"], Value::Null);
    let nulls = json!({
        "version": null, "key": null, "correlationId": null, "causationId": null, "idempotencyKey": null,
        "producerNodeId": null, "traceparent": null, "tracestate": null, "metadata": null,
    });
    let id = emit(&pool, &parcel(), &nulls).await.unwrap();
    let (row, messages) = stored(&pool, id).await;
    assert_eq!(row["row"]["event_version"], 1);
    assert_eq!(row["row"]["metadata"], json!({}));
    assert_eq!(row["row"]["correlation_id"], id.to_string());
    assert!(messages[0]["message"].get("key").is_none());
    assert_eq!(count(&pool, "select from core.idempotency_keys").await, 0);
}

#[tokio::test]
async fn an_idempotency_key_is_for_one_event() {
    let (database, pool) = Test::stopped().await;
    let key = json!({"idempotencyKey": "order-1", "version": 2});
    let first = emit(&pool, &parcel(), &key).await.unwrap();
    // The order of fields is no difference, what they hold is.
    let again = emit(&pool, &json!({"weight": 1.5, "parcel": "p-1"}), &key)
        .await
        .unwrap();
    assert_eq!(first, again);
    let said = refusal(emit(&pool, &json!({"parcel": "p-2"}), &key).await);
    assert_eq!(
        said,
        format!("idempotency key \"order-1\" was used for another event (id {first})")
    );
    assert_eq!(count(&pool, "select from core.event_log").await, 1);
    assert_eq!(count(&pool, "select from pgmq.q_core_events_demo").await, 2);

    // Keys of the client and of SQL are the same keys.
    let connection = Database::from_url(database.url(), "the test").unwrap();
    let client = nexus::Client::connect(&connection, "demo").await.unwrap();
    let event = GoodsShipped {
        parcel: "p-1".to_owned(),
        weight: Some(1.5),
    };
    assert_eq!(
        client
            .emit(&event)
            .idempotency_key("order-1")
            .await
            .unwrap(),
        first
    );
    // Another namespace has keys of its own.
    sqlx::raw_sql("select core.ensure_group('other', 'default')")
        .execute(&pool)
        .await
        .unwrap();
    let elsewhere =
        sqlx::query_scalar::<_, i64>("select core.emit('other', 'goods.shipped', $1, $2)")
            .bind(parcel())
            .bind(&key)
            .fetch_one(&pool)
            .await
            .unwrap();
    assert_ne!(elsewhere, first);

    database.advance(Duration::from_mins(24 * 60 - 1)).await;
    assert_eq!(emit(&pool, &parcel(), &key).await.unwrap(), first);
    database.advance(Duration::from_mins(2)).await;
    let later = emit(&pool, &json!({"parcel": "p-2"}), &key).await.unwrap();
    assert_ne!(later, first);
    assert_eq!(
        emit(&pool, &json!({"parcel": "p-2"}), &key).await.unwrap(),
        later
    );
    // What has expired is forgotten by maintenance, what has not stays.
    sqlx::raw_sql("select core.maintain('demo')")
        .execute(&pool)
        .await
        .unwrap();
    assert_eq!(
        count(
            &pool,
            "select from core.idempotency_keys where namespace = 'demo'"
        )
        .await,
        1
    );
}

#[tokio::test]
async fn one_key_emitted_at_once_by_many_is_one_event() {
    let (_database, pool) = Test::stopped().await;
    let mut emits = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let pool = pool.clone();
        emits.spawn(async move {
            emit(&pool, &parcel(), &json!({"idempotencyKey": "once"}))
                .await
                .unwrap()
        });
    }
    let mut ids = within("all emit", emits.join_all()).await;
    ids.dedup();
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert_eq!(count(&pool, "select from core.event_log").await, 1);
    assert_eq!(count(&pool, "select from pgmq.q_core_events_demo").await, 2);
}

#[tokio::test]
async fn a_hostile_session_changes_nothing() {
    let (_database, pool) = Test::stopped().await;
    let plain = emit(&pool, &parcel(), &json!({"version": 2}))
        .await
        .unwrap();
    let mut connection = pool.acquire().await.unwrap();
    sqlx::raw_sql(
        "create schema evil;
         create function evil.now() returns timestamptz language sql as $$ select timestamptz '2001-01-01' $$;
         create function evil.to_char(timestamp, text) returns text language sql as $$ select 'evil' $$;
         create function evil.lower(text) returns text language sql as $$ select 'evil' $$;
         create function evil.cat(jsonb, jsonb) returns jsonb language sql as $$ select '\"evil\"'::jsonb $$;
         create operator evil.|| (leftarg = jsonb, rightarg = jsonb, function = evil.cat);
         create table evil.event_log (id int);
         set search_path = evil, pg_catalog;
         set timezone = 'Pacific/Kiritimati';
         set datestyle = 'German'",
    )
    .execute(&mut *connection)
    .await
    .unwrap();
    let row = sqlx::query(
        "select core.emit('demo', 'goods.shipped', $1, '{\"version\": 2}'),
                core.queue_name('My-App', 'Group'), core.iso_time('2026-01-31 23:59:59.9999+00'),
                abs(extract(epoch from core.now() - clock_timestamp())) < 60,
                core.append_event_log('demo', 'a.b', '{}', 'n'), core.ensure_partitions(14)",
    )
    .bind(parcel())
    .fetch_one(&mut *connection)
    .await
    .unwrap();
    assert_eq!(row.get::<String, _>(1), "core_events_my_app__group");
    assert_eq!(row.get::<String, _>(2), "2026-01-31T23:59:59.999Z");
    assert!(row.get::<bool, _>(3), "core.now() is the time");
    assert_eq!(row.get::<i32, _>(5), 2, "two more months");
    let (mut expected, messages) = stored(&pool, plain).await;
    let hostile = row.get::<i64, _>(0);
    expected["row"]["correlation_id"] = json!(hostile.to_string());
    let (found, hostile_messages) = stored(&pool, hostile).await;
    assert_eq!(found, expected);
    assert_eq!(messages.len(), hostile_messages.len());
    let at = rows(
        &pool,
        "select distinct emitted_at > now() - interval '1 hour' as is from core.event_log",
    )
    .await;
    assert_eq!(at, [json!({"is": true})]);
    connection.close().await.unwrap();
}

#[tokio::test]
async fn what_a_foreign_program_sends_is_an_event_like_any_other() {
    let mut test = Test::new().await;
    let envelope = json!({
        "namespace": "demo", "eventType": "goods.shipped", "payload": {"parcel": "p-7", "weight": null},
        "emittedAt": "2026-03-01T10:00:00.250Z", "producerNodeId": "node-js-1", "eventVersion": 2,
        "scheduledTaskId": null, "broadcast": true, "tenant": {"id": 5, "tags": [null]},
    });
    test.send(&envelope).await;
    let seen = test.next().await;
    for (who, (event, meta)) in &seen {
        assert_eq!(
            (event.parcel.as_str(), event.weight),
            ("p-7", None),
            "{who}"
        );
        assert_eq!(meta.emitted_at().to_string(), "2026-03-01T10:00:00.25Z");
        assert_eq!(meta.producer_node_id(), "node-js-1");
        assert_eq!(
            meta.correlation_id(),
            Some(meta.event_id().to_string().as_str())
        );
        assert_eq!(meta.unknown_fields()["broadcast"], true);
        assert_eq!(
            meta.unknown_fields()["tenant"],
            json!({"id": 5, "tags": [null]})
        );
        assert_eq!(meta.unknown_fields().len(), 2);
    }
    test.idle().await;
    let log = rows(&test.pool, "select * from core.event_log").await;
    assert_eq!(log.len(), 1);
    assert_eq!(log[0]["payload"], envelope["payload"]);
    assert_eq!(log[0]["producer_node_id"], "node-js-1");
    assert_eq!(log[0]["metadata"]["messageId"], 1);
    assert_eq!(log[0]["metadata"]["envelope"]["tenant"], envelope["tenant"]);
    assert_eq!(
        count(&test.pool, "select from pgmq.q_core_events_demo").await,
        0
    );
    test.app.shutdown().await;
}

/// Takes any payload, so that missing fields can be looked at.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "goods.lost")]
struct GoodsLost {
    #[serde(default)]
    why: Option<String>,
}

#[handler]
async fn search(event: Envelope<GoodsLost>, saw: State<Saw>) {
    let shown = GoodsShipped {
        parcel: format!("{:?}", event.why),
        weight: None,
    };
    let _ = saw.send(("search", shown, event.meta().clone()));
}

#[tokio::test]
async fn missing_fields_and_nulls_get_the_originals_defaults() {
    let mut test = Test::new().await;
    let before = seconds_now(&test.pool).await;
    for body in [
        json!({"eventType": "goods.lost"}),
        json!({"eventType": "goods.lost", "namespace": null, "emittedAt": null, "producerNodeId": null,
               "eventVersion": null, "key": null, "correlationId": null, "causationId": null,
               "scheduledTaskId": null, "dueAt": null, "payload": {}}),
    ] {
        test.send(&body).await;
        let (who, event, meta) = within("a handler runs", test.saw.recv()).await.unwrap();
        assert_eq!((who, event.parcel.as_str()), ("search", "None"), "{body}");
        assert_eq!(meta.producer_node_id(), "unknown");
        assert_eq!(meta.namespace(), "demo");
        assert_eq!(meta.event_version(), 1);
        assert_eq!(meta.key(), None);
        assert_eq!(meta.scheduled_task_id(), None);
        assert!(
            meta.emitted_at().to_string() >= before,
            "the time it was sent"
        );
        assert!(
            meta.unknown_fields().is_empty(),
            "{:?}",
            meta.unknown_fields()
        );
    }
    // Numbers that name something become text; a time without a zone is UTC, offsets count.
    for (time, shown) in [
        ("2026-03-01 10:00:00", "2026-03-01T10:00:00Z"),
        (
            "2026-03-01T10:00:00.123456+02:00",
            "2026-03-01T08:00:00.123Z",
        ),
    ] {
        test.send(&json!({
            "eventType": "goods.lost", "key": 5, "correlationId": 6, "causationId": 7, "producerNodeId": 8,
            "eventVersion": "1", "emittedAt": time,
            "scheduledTaskId": "123E4567-E89B-12D3-A456-426614174000",
        }))
        .await;
        let (_, _, meta) = within("a handler runs", test.saw.recv()).await.unwrap();
        assert_eq!(meta.key(), Some("5"));
        assert_eq!(
            (meta.correlation_id(), meta.causation_id()),
            (Some("6"), Some("7"))
        );
        assert_eq!(meta.producer_node_id(), "8");
        assert_eq!(meta.emitted_at().to_string(), shown);
        assert_eq!(
            meta.scheduled_task_id().unwrap().to_string(),
            "123e4567-e89b-12d3-a456-426614174000"
        );
    }
    test.idle().await;
    assert_eq!(
        count(&test.pool, "select from pgmq.q_core_events_demo_dlq").await,
        0
    );
    test.app.shutdown().await;
}

/// The time of the database as envelopes write it, to the second.
async fn seconds_now(pool: &PgPool) -> String {
    let text: String = sqlx::query_scalar("select core.iso_time(core.now())")
        .fetch_one(pool)
        .await
        .unwrap();
    text[..19].to_owned()
}

/// A message as it should be.
fn well_formed() -> Value {
    json!({"eventType": "goods.shipped", "eventVersion": 2, "payload": parcel()})
}

/// Messages that are no envelopes, and what is said about each.
fn malformed() -> Vec<(Value, &'static str)> {
    let good = well_formed();
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body
    };
    vec![
        (json!(5), "an envelope is a JSON object, found number"),
        (json!("text"), "an envelope is a JSON object, found string"),
        (json!([good]), "an envelope is a JSON object, found array"),
        (Value::Null, "an envelope is a JSON object, found null"),
        (json!({}), "the envelope has no \"eventType\" text"),
        (
            with("eventType", json!(7)),
            "the envelope has no \"eventType\" text",
        ),
        (
            with("eventType", json!("x".repeat(200))),
            "\"eventType\" is longer than 100 bytes",
        ),
        (
            with("namespace", json!("other")),
            "for namespace \"other\", this queue belongs to \"demo\"",
        ),
        (with("namespace", json!({})), "\"namespace\" is an object"),
        (
            with("emittedAt", json!("soon")),
            "\"emittedAt\" is \"soon\", a time as in ISO 8601 is needed",
        ),
        (
            with("emittedAt", json!("infinity")),
            "a time as in ISO 8601 is needed",
        ),
        (
            with("emittedAt", json!(1_700_000_000)),
            "a time as in ISO 8601 is needed",
        ),
        (
            with("emittedAt", json!("2026-13-01T00:00:00Z")),
            "out of range",
        ),
        (
            with("eventVersion", json!(1.5)),
            "\"eventVersion\" is 1.5, a whole number from 1 is needed",
        ),
        (
            with("eventVersion", json!("new")),
            "\"eventVersion\" is new, a whole number",
        ),
        (
            with("eventVersion", json!(0)),
            "\"eventVersion\" is 0, a whole number",
        ),
        (
            with("eventVersion", json!(99_999_999_999_i64)),
            "a whole number from 1 is needed",
        ),
        (
            with("scheduledTaskId", json!("nightly")),
            "invalid input syntax for type uuid",
        ),
        (with("key", json!([1])), "\"key\" is an array"),
        (
            with("payload", json!({"parcel": "x".repeat(300_000)})),
            "the message is larger than",
        ),
    ]
}

#[tokio::test]
async fn what_is_no_envelope_becomes_a_dead_letter_and_holds_nobody_up() {
    let mut test = Test::new().await;
    let (good, wrong) = (well_formed(), malformed());
    for (body, _) in &wrong {
        test.send(body).await;
        test.send(&good).await;
    }
    // Headers that are no object, and no body at all.
    sqlx::raw_sql(
        "insert into pgmq.q_core_events_demo (vt, message, headers) values (now(), '{}', '5'), (now(), '{}', 'null'),
             (now(), '{}', '[\"settled\"]'), (now(), null, null)",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    for _ in 0..3 * wrong.len() {
        within("a handler runs", test.saw.recv()).await.unwrap();
    }
    test.idle().await;
    assert!(
        test.saw.try_recv().is_err(),
        "nothing but the good ones runs"
    );

    let letters = rows(
        &test.pool,
        "select message from pgmq.q_core_events_demo_dlq order by msg_id",
    )
    .await;
    assert_eq!(letters.len(), wrong.len() + 4);
    let errors: Vec<&str> = letters
        .iter()
        .map(|letter| letter["message"]["error"].as_str().unwrap())
        .collect();
    for (body, reason) in &wrong {
        let letter = letters
            .iter()
            .find(|letter| letter["message"]["originalEvent"] == *body)
            .unwrap_or_else(|| panic!("{body} is among the dead letters"));
        let error = letter["message"]["error"].as_str().unwrap();
        assert!(error.contains(reason), "{reason}: {error}; {errors:?}");
        assert_eq!(letter["message"]["reason"], "Malformed message");
    }
    assert_eq!(
        count(&test.pool, "select from core.event_log").await,
        i64::try_from(wrong.len()).unwrap()
    );
    test.app.shutdown().await;
}

#[tokio::test]
async fn a_dead_letter_has_the_originals_fields() {
    let mut test = Test::new().await;
    // The wrong payload for its type: adopted, and given up by each handler on its own.
    test.send(&json!({"eventType": "goods.shipped", "eventVersion": 2, "payload": {"weight": "heavy"}, "extra": 1}))
        .await;
    test.send(&json!(5)).await;
    test.idle().await;
    let letters = rows(
        &test.pool,
        "select message, headers from (select * from pgmq.q_core_events_demo_dlq
                                       union all select * from pgmq.q_core_events_demo__billing_dlq) l
         order by message ->> 'handler'",
    )
    .await;
    let handlers: Vec<&Value> = letters
        .iter()
        .map(|letter| &letter["message"]["handler"])
        .collect();
    assert_eq!(
        handlers,
        [
            &json!("bill"),
            &json!("notify"),
            &json!("track"),
            &Value::Null
        ]
    );
    for letter in &letters {
        let body = &letter["message"];
        let fields: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(
            fields,
            [
                "attempts",
                "error",
                "errors",
                "failedAt",
                "handler",
                "originalEvent",
                "reason"
            ]
        );
        let at = body["failedAt"].as_str().unwrap();
        assert!(
            at.len() == 24 && at.ends_with('Z') && *at >= *"2026",
            "{at}"
        );
        assert!(
            body["reason"].is_string() && body["error"].is_string(),
            "{body}"
        );
    }
    assert_eq!(
        letters[0]["message"]["originalEvent"]["payload"],
        json!({"weight": "heavy"})
    );
    assert_eq!(letters[0]["message"]["originalEvent"]["extra"], 1);
    assert_eq!(letters[3]["message"]["originalEvent"], 5);
    assert!(test.saw.try_recv().is_err());
    test.app.shutdown().await;
}

const ADOPT: &str =
    "select count(*), count(event_id) from core.adopt('demo', 'core_events_demo', 100, 100000)";

#[tokio::test]
async fn adoption_is_all_or_nothing() {
    let (_database, pool) = Test::stopped().await;
    let body = json!({"eventType": "goods.shipped", "payload": parcel()});
    send(&pool, "core_events_demo", &body).await;
    let left = |pool: PgPool| async move {
        (
            count(
                &pool,
                "select from pgmq.q_core_events_demo where headers is null",
            )
            .await,
            count(&pool, "select from core.event_log").await,
            count(
                &pool,
                "select from pgmq.q_core_events_demo where headers is not null",
            )
            .await,
            count(&pool, "select from pgmq.q_core_events_demo__billing").await,
        )
    };
    // The adopter dies before it commits.
    let mut tx = pool.begin().await.unwrap();
    let row = sqlx::query(ADOPT).fetch_one(&mut *tx).await.unwrap();
    assert_eq!((row.get::<i64, _>(0), row.get::<i64, _>(1)), (1, 1));
    tx.rollback().await.unwrap();
    assert_eq!(left(pool.clone()).await, (1, 0, 0, 0));
    // A queue it has to go to is gone: the message stays where it is, and is no dead letter.
    sqlx::raw_sql("alter table pgmq.q_core_events_demo__billing rename to away")
        .execute(&pool)
        .await
        .unwrap();
    let error = sqlx::query(ADOPT).fetch_one(&pool).await.unwrap_err();
    assert_eq!(
        error.as_database_error().unwrap().code().as_deref(),
        Some("42P01")
    );
    sqlx::raw_sql("alter table pgmq.away rename to q_core_events_demo__billing")
        .execute(&pool)
        .await
        .unwrap();
    assert_eq!(left(pool.clone()).await, (1, 0, 0, 0));
    assert_eq!(
        count(&pool, "select from pgmq.q_core_events_demo_dlq").await,
        0
    );

    sqlx::query(ADOPT).execute(&pool).await.unwrap();
    assert_eq!(left(pool.clone()).await, (0, 1, 2, 1));
}

#[tokio::test]
async fn adopters_at_the_same_time_adopt_once() {
    let (_database, pool) = Test::stopped().await;
    for n in 0..200 {
        let body = json!({"eventType": "goods.shipped", "payload": {"parcel": n.to_string()}});
        send(&pool, "core_events_demo", &body).await;
    }
    let mut adopters = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        adopters.spawn(async move {
            let mut adopted = 0;
            loop {
                let row = sqlx::query(ADOPT).fetch_one(&pool).await.unwrap();
                adopted += row.get::<i64, _>(1);
                if row.get::<i64, _>(0) == 0 {
                    return adopted;
                }
            }
        });
    }
    let adopted: i64 = within("all adopt", adopters.join_all()).await.iter().sum();
    assert_eq!(adopted, 200);
    assert_eq!(
        count(&pool, "select distinct payload from core.event_log").await,
        200
    );
    assert_eq!(count(&pool, "select from core.event_log").await, 200);
    assert_eq!(
        count(&pool, "select from pgmq.q_core_events_demo").await,
        400
    );
    assert_eq!(
        count(&pool, "select from pgmq.q_core_events_demo__billing").await,
        200
    );
}
