//! Bad input gets an error or a dead letter that says what was found and what to do, disturbs
//! nothing else and loses nothing.

use std::process::Command;

use nexus::{
    EmitError,
    event::EncodeError,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_tests::{until, within};
use tokio::sync::mpsc;

/// A note.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "note.taken")]
struct NoteTaken {
    text: String,
    weight: f64,
}

fn note(text: &str) -> NoteTaken {
    NoteTaken {
        text: text.to_owned(),
        weight: 1.0,
    }
}

type Saw = mpsc::UnboundedSender<String>;

#[handler(backoff = "fixed(10ms)", max_attempts = 2)]
async fn read(note: NoteTaken, saw: State<Saw>) {
    let _ = saw.send(note.text);
}

async fn start(database: &TestDatabase) -> (TestApp, mpsc::UnboundedReceiver<String>) {
    let (sender, saw) = mpsc::unbounded_channel::<String>();
    let app = App::discover().state::<Saw>(sender);
    (TestApp::start_on(database, app).await, saw)
}

async fn letters(app: &TestApp) -> Vec<(String, String)> {
    let letters = app.dead_letters().await;
    let mut found: Vec<_> = letters
        .into_iter()
        .map(|letter| (letter.reason, letter.error.unwrap_or_default()))
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn what_cannot_be_stored_is_refused_before_it_is_sent() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    let mut tx = app.client().begin().await.unwrap();
    let refused = |error: EmitError| match error {
        EmitError::Encode(error) => error,
        other => panic!("{other}"),
    };
    let error = app
        .client()
        .emit_in(&mut tx, &note("a\0b"))
        .await
        .unwrap_err();
    assert!(matches!(refused(error), EncodeError::NulCharacter { .. }));
    let heavy = NoteTaken {
        text: String::new(),
        weight: f64::NAN,
    };
    let error = app.client().emit_in(&mut tx, &heavy).await.unwrap_err();
    assert!(matches!(refused(error), EncodeError::NotFinite { .. }));
    let error = app
        .client()
        .emit_in(&mut tx, &note(&"x".repeat(1024 * 1024)))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the payload of event `note.taken` has 1048603 bytes, the limit is 1048576"
    );
    // The transaction is not aborted by any of it.
    tx.emit(&note("good")).unwrap();
    tx.commit().await.unwrap();
    assert_eq!(
        within("the good one runs", saw.recv()).await.as_deref(),
        Some("good")
    );
    app.shutdown().await;
}

#[tokio::test]
async fn malformed_messages_become_dead_letters_and_the_others_run() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    let pool = database.pool().await;
    for (body, headers) in [
        // Headers like ours around a body that is no envelope, and headers that are half ours.
        (
            "\"hello\"",
            "{\"handler\": \"read\", \"eventVersion\": 1, \"eventId\": 1, \"subscription\": 1}",
        ),
        (
            "{\"eventType\": \"note.taken\", \"payload\": {}}",
            "{\"handler\": \"read\", \"eventVersion\": 1}",
        ),
        (
            "{\"eventType\": \"other.type\", \"payload\": {}, \"emittedAt\": \"2026-01-01T00:00:00Z\"}",
            "{\"handler\": \"read\", \"eventVersion\": 1, \"eventId\": 1, \"subscription\": 1}",
        ),
    ] {
        sqlx::query("select pgmq.send('core_events_demo', $1::jsonb, $2::jsonb)")
            .bind(body)
            .bind(headers)
            .execute(&pool)
            .await
            .unwrap();
    }
    app.client().emit(&note("good")).await.unwrap();
    assert_eq!(
        within("the good one runs", saw.recv()).await.as_deref(),
        Some("good")
    );
    app.drained().await;
    let letters = letters(&app).await;
    assert_eq!(letters.len(), 3, "{letters:?}");
    assert!(
        letters[0].1.contains("no envelope") || letters[1].1.contains("no envelope"),
        "{letters:?}"
    );
    assert!(
        letters
            .iter()
            .any(|(_, error)| error.contains("missing field `eventId`")),
        "{letters:?}"
    );
    assert!(
        letters
            .iter()
            .any(|(_, error)| error
                == "the message is a `other.type`, the handler takes `note.taken`"),
        "{letters:?}"
    );
    app.shutdown().await;
}

#[tokio::test]
async fn a_message_for_a_handler_that_nobody_has_becomes_a_dead_letter() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    let pool = database.pool().await;
    // A handler of no group; one of another group; and headers that cannot be read besides.
    for headers in [
        "{\"handler\": \"nobody\", \"eventVersion\": 1, \"eventId\": 1, \"subscription\": 7, \"attempts\": 3}",
        "{\"handler\": \"read2\", \"eventVersion\": 1, \"eventId\": 2, \"subscription\": 1}",
        "{\"handler\": \"zz\", \"eventVersion\": 1, \"attempts\": []}",
    ] {
        sqlx::query("select pgmq.send('core_events_demo', '{}'::jsonb, $1::jsonb)")
            .bind(headers)
            .execute(&pool)
            .await
            .unwrap();
    }
    // Waits for a version that a build may bring yet: it stays.
    sqlx::query(
        "select pgmq.send('core_events_demo', '{}'::jsonb,
             '{\"handler\": \"read\", \"eventVersion\": 2, \"eventId\": 3, \"subscription\": 1}'::jsonb)",
    )
    .execute(&pool)
    .await
    .unwrap();
    app.client().emit(&note("good")).await.unwrap();
    assert_eq!(
        within("the good one runs", saw.recv()).await.as_deref(),
        Some("good")
    );
    app.advance(std::time::Duration::from_mins(2)).await;
    until("they are given up", || async {
        (letters(&app).await.len() >= 3).then_some(())
    })
    .await;
    for (letter, handler) in letters(&app).await.iter().zip(["nobody", "read2", "zz"]) {
        assert_eq!(letter.0, "Unknown handler");
        assert!(
            letter
                .1
                .contains(&format!("no handler `{handler}` is subscribed")),
            "{letter:?}"
        );
    }
    let left: Vec<String> =
        sqlx::query_scalar("select headers ->> 'eventVersion' from pgmq.q_core_events_demo")
            .fetch_all(&pool)
            .await
            .unwrap();
    assert_eq!(left, ["2"]);
    app.shutdown().await;
}

#[tokio::test]
async fn messages_that_no_claim_looks_for_are_adopted_or_dead_lettered() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    let pool = database.pool().await;
    let envelope = |text: &str| {
        format!(
            "{{\"eventType\": \"note.taken\", \"payload\": {{\"text\": \"{text}\", \"weight\": 1}}}}"
        )
    };
    for (body, headers) in [
        (envelope("none"), "{\"handler\": \"read\"}"),
        (
            envelope("word"),
            "{\"handler\": \"read\", \"eventVersion\": \"new\"}",
        ),
        (
            envelope("zero"),
            "{\"handler\": \"read\", \"eventVersion\": 0}",
        ),
        (envelope("nobody's"), "{\"eventVersion\": 1}"),
        ("5".to_owned(), "{\"handler\": \"read\"}"),
    ] {
        sqlx::query("select pgmq.send('core_events_demo', $1::jsonb, $2::jsonb)")
            .bind(body)
            .bind(headers)
            .execute(&pool)
            .await
            .unwrap();
    }
    let mut texts = Vec::new();
    for _ in 0..4 {
        texts.extend(within("an adopted one runs", saw.recv()).await);
    }
    texts.sort();
    assert_eq!(texts, ["nobody's", "none", "word", "zero"]);
    until("the other is refused", || async {
        (!letters(&app).await.is_empty()).then_some(())
    })
    .await;
    app.drained().await;
    assert_eq!(
        letters(&app).await,
        [(
            "Malformed message".to_owned(),
            "an envelope is a JSON object, found number".to_owned()
        )]
    );
    let left: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(left, 0);
    app.shutdown().await;
}

/// Numbers, of which a large list is longer as stored than as sent.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "numbers.drawn")]
struct NumbersDrawn {
    numbers: Vec<u8>,
}

#[handler]
async fn count(drawn: NumbersDrawn, saw: State<Saw>) {
    let _ = saw.send(drawn.numbers.len().to_string());
}

#[tokio::test]
async fn what_may_be_emitted_is_never_too_large_to_be_claimed() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    // As stored: {"numbers": [1, 1, …]}
    let most = (1024 * 1024 - "{\"numbers\": []}".len() + ", ".len()) / "1, ".len();
    let drawn = |count| NumbersDrawn {
        numbers: vec![1; count],
    };
    app.client().emit(&drawn(most)).await.unwrap();
    assert_eq!(
        within("it is handled", saw.recv()).await,
        Some(most.to_string())
    );
    let error = app.client().emit(&drawn(most + 1)).await.unwrap_err();
    assert!(
        matches!(
            error,
            EmitError::Encode(EncodeError::TooLarge { bytes, .. }) if bytes > 1024 * 1024
        ),
        "{error}"
    );
    app.drained().await;
    assert_eq!(letters(&app).await, []);
    app.shutdown().await;
}

#[tokio::test]
async fn an_oversized_body_is_dead_lettered_unread() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    let pool = database.pool().await;
    sqlx::query(
        "select core.emit('demo', 'note.taken', jsonb_build_object('text', repeat('x', 3000000), 'weight', 1))",
    )
    .execute(&pool)
    .await
    .unwrap();
    app.client().emit(&note("good")).await.unwrap();
    assert_eq!(
        within("the good one runs", saw.recv()).await.as_deref(),
        Some("good")
    );
    app.drained().await;
    let letters = letters(&app).await;
    assert_eq!(
        letters,
        [(
            "Too large".to_owned(),
            "the message is larger than 1114112 bytes".to_owned()
        )]
    );
    app.shutdown().await;
}

#[tokio::test]
async fn a_queue_that_was_dropped_by_hand_comes_back() {
    let database = TestDatabase::new().await;
    let (app, mut saw) = start(&database).await;
    let pool = database.pool().await;
    app.client().emit(&note("before")).await.unwrap();
    assert_eq!(
        within("it runs", saw.recv()).await.as_deref(),
        Some("before")
    );
    app.drained().await;
    sqlx::query("select pgmq.drop_queue('core_events_demo')")
        .execute(&pool)
        .await
        .unwrap();
    // In a transaction of ours the refusal says what to do; outside of one it is mended.
    app.client().emit(&note("after")).await.unwrap();
    assert_eq!(
        within("it runs", saw.recv()).await.as_deref(),
        Some("after")
    );
    // The new table serves claims by the same index, and has its queue registered.
    let index: String = sqlx::query_scalar(
        "select indexdef from pg_indexes where indexname = 'q_core_events_demo_vt_idx'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(index.contains("handler"), "{index}");
    // Messages of foreign programs are found by an index of their own, however many others there
    // are, and whether the planner knows of them or not.
    sqlx::raw_sql(
        r#"insert into pgmq.q_core_events_demo (vt, message, headers)
           select core.now(), '{}', '{"handler": "nobody", "eventVersion": 1}'
           from generate_series(1, 20000)"#,
    )
    .execute(&pool)
    .await
    .unwrap();
    for analyze in ["", "analyze pgmq.q_core_events_demo"] {
        sqlx::raw_sql(analyze).execute(&pool).await.unwrap();
        let plan: Vec<String> = sqlx::query_scalar(
            "explain select q.msg_id from pgmq.q_core_events_demo q
             where ((q.headers ->> 'handler') is not null and (q.headers ->> 'eventVersion') ~ '^[1-9][0-9]*$') is not true
               and q.vt <= core.now()
             order by q.msg_id limit 100 for update skip locked",
        )
        .fetch_all(&pool)
        .await
        .unwrap();
        let plan = plan.join("\n");
        assert!(plan.contains("q_core_events_demo_foreign_idx"), "{plan}");
    }
    app.shutdown().await;
}

#[tokio::test]
async fn a_dropped_queue_in_a_transaction_is_an_error_that_says_what_to_do() {
    let database = TestDatabase::new().await;
    let (app, _saw) = start(&database).await;
    let client = app.client().clone();
    // Loads the plan while the queue is there.
    client.emit(&note("before")).await.unwrap();
    app.drained().await;
    app.shutdown().await;
    let pool = database.pool().await;
    sqlx::query("select pgmq.drop_queue('core_events_demo')")
        .execute(&pool)
        .await
        .unwrap();
    let client = nexus::Client::connect(
        &nexus::Database::from_url(database.url(), "the test").unwrap(),
        client.namespace(),
    )
    .await
    .unwrap();
    sqlx::query("select pgmq.drop_queue('core_events_demo')")
        .execute(&pool)
        .await
        .unwrap();
    let mut tx = pool.begin().await.unwrap();
    let error = client.emit_in(&mut tx, &note("lost")).await.unwrap_err();
    assert!(matches!(error, EmitError::MissingQueue { .. }), "{error}");
    assert!(
        error.to_string().contains("emit outside of a transaction"),
        "{error}"
    );
}

/// What a program says that does not start.
fn said(variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_victim"));
    command
        .env_remove("DATABASE_URL")
        .env_remove("CORE_DATABASE_URL")
        .env("VICTIM_HANDLERS", "work");
    for (name, value) in variables {
        command.env(name, value);
    }
    let output = command.output().unwrap();
    assert!(!output.status.success(), "it started");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn bad_values_in_the_environment_are_named_with_what_is_accepted() {
    let text = said(&[
        ("CORE_DATABASE_URL", "postgres://nobody@localhost/none"),
        ("CORE_NAMESPACE", "my__space"),
        ("CORE_VISIBILITY_TIMEOUT_SECONDS", "soon"),
    ]);
    assert!(
        text.contains("CORE_NAMESPACE is `my__space`, which is refused"),
        "{text}"
    );
    assert!(
        text.contains("CORE_VISIBILITY_TIMEOUT_SECONDS is `soon`, which is refused: a whole number of seconds from 1 to 43200"),
        "{text}"
    );
    let text = said(&[
        ("VICTIM_STAYS", "1"),
        ("CORE_LOG_LEVEL", "nexus=loud"),
        ("CORE_BATCH_SIZE", "0"),
        ("DATABASE_URL", "mysql://ada:s3cret@db/shop"),
    ]);
    for refused in [
        "CORE_LOG_LEVEL is `nexus=loud`, which is refused",
        "CORE_BATCH_SIZE is `0`, which is refused",
        "DATABASE_URL is `mysql://…`, which is refused: it is not a database URL such as postgres://",
    ] {
        assert!(text.contains(refused), "no {refused} in {text}");
    }
    assert!(!text.contains("s3cret"), "{text}");
    let error = nexus::Database::from_url("mysql://ada:s3cret@db/shop", "SHOP_URL").unwrap_err();
    let text = nexus::Error::from(error).to_string();
    assert!(
        text.starts_with("SHOP_URL is not a database URL such as postgres://")
            && text.ends_with("it begins with mysql://"),
        "{text}"
    );
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_without_the_password() {
    let text = said(&[
        ("DATABASE_URL", "postgres://ada:s3cret@127.0.0.1:1/shop"),
        ("CORE_CONNECT_TIMEOUT_SECONDS", "0"),
    ]);
    assert!(
        text.contains("DATABASE_URL is set but 127.0.0.1:1/shop is not usable"),
        "{text}"
    );
    assert!(!text.contains("s3cret"), "{text}");
    let text = said(&[("DATABASE_URL", "postgres//ada:s3cret@nowhere")]);
    assert!(
        text.contains("DATABASE_URL is not a database URL such as"),
        "{text}"
    );
    assert!(!text.contains("s3cret"), "{text}");
}

#[tokio::test]
async fn a_role_without_rights_is_told_which_ones() {
    let database = TestDatabase::empty().await;
    let pool = database.pool().await;
    // Roles belong to the whole server, so its name is as unique as the database's.
    let name: String = sqlx::query_scalar("select current_database()::text")
        .fetch_one(&pool)
        .await
        .unwrap();
    let role = format!("{name}_app");
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "create role {role} login password 'x'"
    )))
    .execute(&pool)
    .await
    .unwrap();
    // Put the role in the place of the user that the URL names.
    let (scheme, rest) = database.url().split_once("://").expect("it is a URL");
    let (_, host) = rest.split_once('@').expect("the URL names a user");
    let url = format!("{scheme}://{role}:x@{host}");
    let text = said(&[("DATABASE_URL", &url)]);
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop role {role}")))
        .execute(&pool)
        .await
        .unwrap();
    assert!(
        text.contains(&format!("role `{role}` lacks rights in database `{name}`")),
        "{text}"
    );
    assert!(
        text.contains(&format!("grant create on database {name} to {role}")),
        "{text}"
    );
}
