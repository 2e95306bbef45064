//! What holds for any name, any event and any message: cases are made up, and a failing one is shrunk.
//!
//! The database is a real one; what a case has stored is rolled back.

use std::{collections::BTreeMap, fmt::Debug};

use nexus::{
    __private::decode_message,
    event::check_name,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseResult, TestRunner},
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

/// Of each kind of field one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fact.found", version = 3, key = key)]
struct FactFound {
    key: String,
    signed: i64,
    unsigned: u64,
    ratio: f64,
    narrow: f32,
    text: Option<String>,
    #[serde(default)]
    named: BTreeMap<String, Vec<Option<bool>>>,
    #[serde(default)]
    parts: Vec<FactFound>,
}

/// What a foreign program sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "foreign.sent")]
#[serde(transparent)]
struct ForeignSent(Value);

#[handler]
async fn learn(_fact: FactFound) {}

#[handler]
async fn hear(_sent: ForeignSent) {}

/// Runs as many cases; each gets a connection in a transaction.
#[expect(
    clippy::needless_pass_by_value,
    reason = "closures are passed where they are written"
)]
fn check<S: Strategy<Value: Debug>>(
    cases: u32,
    strategy: &S,
    url: &str,
    case: impl AsyncFn(&mut PgConnection, S::Value) -> TestCaseResult,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let connection = runtime.block_on(PgConnection::connect(url)).unwrap();
    let connection = tokio::sync::Mutex::new(connection);
    // A failure is reported with the case, there is no file to keep.
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let checked = TestRunner::new(config).run(strategy, |value| {
        runtime.block_on(async {
            let mut connection = connection.lock().await;
            let mut tx = connection.begin().await.unwrap();
            let result = case(&mut tx, value).await;
            tx.rollback().await.unwrap();
            result
        })
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}

fn database() -> TestDatabase {
    block_on(TestDatabase::new())
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future)
}

/// Names, most of which are nearly right.
fn names() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[A-Za-z][A-Za-z0-9_-]{0,34}",
        2 => "[a-z][a-c_-]{0,6}(_dlq|-DLQ|_|-|__|default|DEFAULT)?",
        1 => "[a-zİıß0-9_. -]{0,12}",
        1 => "\\PC{0,8}",
    ]
}

/// What the database adds to the rules that both know: it stands in the names of queues.
fn can_name_a_queue(name: &str) -> bool {
    let part = name.replace('-', "_").to_ascii_lowercase();
    !part.ends_with('_') && !part.ends_with("_dlq")
}

async fn queue_name(connection: &mut PgConnection, namespace: &str, group: &str) -> String {
    sqlx::query_scalar("select core.queue_name($1, $2)")
        .bind(namespace)
        .bind(group)
        .fetch_one(connection)
        .await
        .unwrap()
}

async fn is_accepted(connection: &mut PgConnection, namespace: &str, group: &str) -> bool {
    let mut savepoint = connection.begin().await.unwrap();
    let accepted = sqlx::query("select core.check_queue_name($1, $2)")
        .bind(namespace)
        .bind(group)
        .execute(&mut *savepoint)
        .await;
    let code = match &accepted {
        Ok(_) => None,
        Err(error) => error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code),
    };
    // Anything else is no answer.
    assert!(
        accepted.is_ok() || code.as_deref() == Some("22023"),
        "{accepted:?}"
    );
    savepoint.rollback().await.unwrap();
    accepted.is_ok()
}

#[test]
fn rust_and_the_database_refuse_the_same_names() {
    let database = database();
    let both = (names(), names());
    check(
        1_500,
        &both,
        database.url(),
        async |connection, (namespace, group)| {
            let in_rust = [("namespace", &namespace), ("group", &group)]
                .iter()
                .all(|(what, name)| check_name(what, name).is_ok() && can_name_a_queue(name));
            let queue = queue_name(connection, &namespace, &group).await;
            let is_short = queue.chars().count() + "_dlq".len() <= 47;
            let in_database = is_accepted(connection, &namespace, &group).await;
            prop_assert_eq!(in_rust && is_short, in_database, "{:?}", queue);
            if in_database {
                prop_assert!(
                    queue
                        .bytes()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
                );
            }
            Ok(())
        },
    );
}

#[test]
fn groups_share_a_queue_only_if_they_differ_in_case_and_hyphens() {
    let database = database();
    // Few letters, so that many of them meet.
    let name = || "[ab][ab_-]{0,3}|default|[ab]_dlq";
    let four = (name(), name(), name(), name());
    check(
        2_000,
        &four,
        database.url(),
        async |connection, (one, group, other, its_group)| {
            if !is_accepted(connection, &one, &group).await
                || !is_accepted(connection, &other, &its_group).await
            {
                return Ok(());
            }
            let part = |name: &str| name.replace('-', "_").to_ascii_lowercase();
            let is_same = part(&one) == part(&other) && part(&group) == part(&its_group);
            let queue = queue_name(connection, &one, &group).await;
            let its_queue = queue_name(connection, &other, &its_group).await;
            prop_assert_eq!(queue == its_queue, is_same, "{} {}", queue, its_queue);
            // Nor is one the dead-letter queue of the other.
            prop_assert_ne!(format!("{queue}_dlq"), its_queue);
            Ok(())
        },
    );
}

/// Any text that Postgres stores.
fn texts() -> impl Strategy<Value = String> {
    prop_oneof![
        "[^\0]{0,12}",
        "[a-z\"\\\\/\u{1}\u{7f}\u{2028}\u{10ffff}]{0,8}",
    ]
}

fn facts() -> impl Strategy<Value = FactFound> {
    let numbers = (any::<i64>(), any::<u64>(), finite(), prop::num::f32::NORMAL);
    let named = prop::collection::btree_map(
        texts(),
        prop::collection::vec(any::<Option<bool>>(), 0..3),
        0..3,
    );
    let fact = (texts(), numbers, prop::option::of(texts()), named).prop_map(
        |(key, (signed, unsigned, ratio, narrow), text, named)| FactFound {
            key,
            signed,
            unsigned,
            ratio,
            narrow,
            text,
            named,
            parts: Vec::new(),
        },
    );
    fact.prop_recursive(3, 8, 3, |inner| {
        (inner.clone(), prop::collection::vec(inner, 0..3))
            .prop_map(|(fact, parts)| FactFound { parts, ..fact })
    })
}

fn finite() -> impl Strategy<Value = f64> {
    use prop::num::f64::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO
}

type Row = (String, String, i64, String);

async fn message_of(connection: &mut PgConnection, handler: &str) -> Option<Row> {
    sqlx::query_as(
        "select q.headers::text, q.message::text, (q.headers ->> 'eventId')::bigint, core.iso_time(l.emitted_at)
         from pgmq.q_core_events_demo q
         left join core.event_log l on l.event_id = (q.headers ->> 'eventId')::bigint
         where q.headers ->> 'handler' = $1",
    )
    .bind(handler)
    .fetch_optional(connection)
    .await
    .unwrap()
}

#[test]
fn what_is_emitted_is_what_arrives() {
    let app = block_on(TestApp::without_workers(App::discover()));
    let client = app.client();
    let correlation = prop::option::of(texts());
    let trace = prop::option::of("00-[0-9a-f]{31}1-[0-9a-f]{15}1-0[01]");
    let cases = (facts(), correlation, trace);
    let url = app.database().url();
    check(
        400,
        &cases,
        url,
        async |connection, (fact, correlation, trace)| {
            let mut emission = client.emit_in(connection, &fact);
            if let Some(correlation) = &correlation {
                emission = emission.correlation_id(correlation);
            }
            if let Some(trace) = &trace {
                emission = emission.traceparent(trace);
            }
            let id = emission
                .await
                .map_err(|error| TestCaseError::fail(format!("{error:?}")))?;
            let (headers, body, event_id, emitted_at) = message_of(connection, "learn")
                .await
                .expect("there is a message");
            prop_assert_eq!(event_id, id);
            let envelope =
                decode_message::<FactFound>(&headers, &body).map_err(TestCaseError::fail)?;
            prop_assert_eq!(envelope.event(), &fact);
            let meta = envelope.meta();
            prop_assert_eq!(meta.event_id(), id);
            prop_assert_eq!(meta.event_type(), "fact.found");
            prop_assert_eq!(meta.event_version(), 3);
            prop_assert_eq!(meta.namespace(), "demo");
            prop_assert_eq!(meta.key(), Some(fact.key.as_str()));
            prop_assert_eq!(meta.emitted_at(), emitted_at.parse().expect("it is a time"));
            let correlation = correlation.unwrap_or_else(|| id.to_string());
            prop_assert_eq!(meta.correlation_id(), Some(correlation.as_str()));
            prop_assert_eq!(meta.traceparent(), trace.as_deref());
            prop_assert!(meta.unknown_fields().is_empty());
            Ok(())
        },
    );
}

/// Any JSON that Postgres stores.
fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e15..1e15_f64).prop_map(Value::from),
        texts().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(texts(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// Bodies that foreign programs may send: envelopes with any field missing, of the wrong type or unknown,
/// and what is no envelope at all.
fn foreign_bodies() -> impl Strategy<Value = Value> {
    let one_of = |good: Vec<Value>| {
        prop_oneof![
            20 => prop::sample::select(good).prop_map(Some),
            5 => Just(None),
            1 => json_values().prop_map(Some),
        ]
    };
    let uuid = "6f1c0e5a-0f0a-4a3e-9d65-0d1f2b3c4d5e";
    let fields = (
        prop_oneof![12 => Just(Some(json!("foreign.sent"))), 1 => one_of(vec![json!("")])],
        prop::option::of(json_values()),
        one_of(vec![
            json!("2026-01-02T03:04:05.678Z"),
            json!("2026-01-02 03:04"),
            json!("1999-12-31T23:59:59+14:00"),
            json!("2026-02-30T00:00:00Z"),
            json!("0044-03-15T12:00:00Z"),
            json!("tomorrow"),
        ]),
        one_of(vec![
            json!(1),
            json!("1"),
            json!(0),
            json!(1.5),
            json!(1e9),
            json!(null),
        ]),
        one_of(vec![
            json!("demo"),
            json!("demo"),
            json!("other"),
            json!(null),
        ]),
        one_of(vec![
            json!(uuid),
            json!(uuid.to_uppercase()),
            json!("no uuid"),
        ]),
        one_of(vec![json!("k"), json!(7), json!(true)]),
        prop::collection::btree_map("[a-z]{1,3}|dueAt|headers", json_values(), 0..3),
    );
    let envelope = fields.prop_map(
        |(event_type, payload, at, version, namespace, task, key, unknown)| {
            let known = [
                ("eventType", event_type),
                ("payload", payload),
                ("emittedAt", at),
                ("eventVersion", version),
                ("namespace", namespace),
                ("scheduledTaskId", task),
                ("key", key.clone()),
                ("correlationId", key),
            ];
            let known = known
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?)));
            Value::Object(unknown.into_iter().chain(known).collect())
        },
    );
    prop_oneof![8 => envelope, 1 => json_values()]
}

#[test]
fn any_foreign_message_is_adopted_whole_or_becomes_a_dead_letter() {
    let app = block_on(TestApp::without_workers(App::discover()));
    let url = app.database().url();
    let adopted = std::cell::Cell::new(0);
    check(1_000, &foreign_bodies(), url, async |connection, body| {
        sqlx::query("insert into pgmq.q_core_events_demo (vt, message) values (core.now(), $1)")
            .bind(&body)
            .execute(&mut *connection)
            .await
            .unwrap();
        let (event_id, refused): (Option<i64>, Option<String>) = sqlx::query_as(
            "select event_id, refused from core.adopt('demo', 'core_events_demo', 10, 1000000)",
        )
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
        let letters: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo_dlq")
            .fetch_one(&mut *connection)
            .await
            .unwrap();
        let message = message_of(connection, "hear").await;
        if let Some(reason) = refused {
            prop_assert!(!reason.is_empty() && event_id.is_none() && message.is_none());
            prop_assert_eq!(letters, 1);
            return Ok(());
        }
        prop_assert_eq!(letters, 0);
        let logged: Value =
            sqlx::query_scalar("select payload from core.event_log where event_id = $1")
                .bind(event_id)
                .fetch_one(&mut *connection)
                .await
                .unwrap();
        let payload = body.get("payload").cloned().unwrap_or_else(|| json!({}));
        prop_assert_eq!(&logged, &payload);
        if body["eventType"] != "foreign.sent" {
            return Ok(());
        }
        adopted.set(adopted.get() + 1);
        let (headers, text, ..) = message.expect("the subscription has a message");
        let envelope =
            decode_message::<ForeignSent>(&headers, &text).map_err(TestCaseError::fail)?;
        prop_assert_eq!(&envelope.event().0, &payload);
        let unknown: BTreeMap<&String, &Value> = envelope.meta().unknown_fields().iter().collect();
        let sent: BTreeMap<&String, &Value> = body
            .as_object()
            .expect("what is adopted is an object")
            .iter()
            .filter(|(name, _)| name.len() <= 3 && *name != "key" || *name == "headers")
            .collect();
        for (name, value) in &sent {
            prop_assert_eq!(unknown.get(*name), Some(value), "{}", name);
        }
        Ok(())
    });
    assert!(adopted.get() > 100, "only {} were adopted", adopted.get());
}

#[test]
fn a_fingerprint_is_of_type_and_payload() {
    let database = database();
    let event = || {
        (
            "[a-b ]{1,3}",
            prop_oneof![json_values(), texts().prop_map(Value::from)],
        )
    };
    check(
        1_000,
        &(event(), event()),
        database.url(),
        async |connection, (one, other)| {
            let (same, fields_in_another_order): (bool, bool) = sqlx::query_as(
            "select core.event_fingerprint($1, $2) = core.event_fingerprint($3, $4),
                    core.event_fingerprint($1, $2) = core.event_fingerprint($1, ($2::text || ' ')::jsonb)",
        )
        .bind(&one.0)
        .bind(&one.1)
        .bind(&other.0)
        .bind(&other.1)
        .fetch_one(connection)
        .await
        .unwrap();
            prop_assert_eq!(same, one == other);
            prop_assert!(fields_in_another_order);
            Ok(())
        },
    );
}

/// What the fuzz target starts from, and what it has found, is read without a panic.
#[test]
fn the_corpus_of_the_fuzz_target_is_read() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/message");
    let mut read = 0;
    for file in std::fs::read_dir(corpus).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let (headers, body) = text.split_once('\n').expect("headers and body");
        let decoded = decode_message::<ForeignSent>(headers, body);
        if let Ok(envelope) = &decoded {
            assert!(envelope.attempt() >= 1, "{}", path.display());
        }
        // What names its handler gets a reason.
        assert!(
            decoded.is_ok() || decoded.is_err_and(|why| !why.is_empty()),
            "{}",
            path.display()
        );
        read += 1;
    }
    assert!(read >= 9, "only {read} files");
}
