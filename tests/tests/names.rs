//! A namespace or group that cannot name a queue is refused with the reason, however it comes in;
//! what is accepted works to the last character.

use std::time::Duration;

use nexus::{StartError, prelude::*, testing::TestDatabase};
use nexus_tests::within;
use sqlx::PgPool;
use tokio::sync::mpsc;

/// Somebody was named.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "name.given")]
struct NameGiven {
    name: String,
}

type Saw = mpsc::UnboundedSender<String>;

#[handler]
async fn greet(event: NameGiven, saw: State<Saw>) {
    let _ = saw.send(event.name);
}

fn app(database: &TestDatabase) -> (App, mpsc::UnboundedReceiver<String>) {
    let (sender, saw) = mpsc::unbounded_channel();
    let app = App::discover()
        .database_url(database.url())
        .idle_poll(Duration::from_millis(25))
        .state::<Saw>(sender);
    (app, saw)
}

/// What the database answers to a group.
async fn ensure(
    pool: &PgPool,
    namespace: Option<&str>,
    group: Option<&str>,
) -> Result<String, String> {
    sqlx::query_scalar("select core.ensure_group($1, $2)")
        .bind(namespace)
        .bind(group)
        .fetch_one(pool)
        .await
        .map_err(|error| error.as_database_error().unwrap().message().to_owned())
}

async fn insert(pool: &PgPool, namespace: Option<&str>) -> Result<(), String> {
    sqlx::query("insert into core.namespaces (namespace) values ($1)")
        .bind(namespace)
        .execute(pool)
        .await
        .map(drop)
        .map_err(|error| error.as_database_error().unwrap().message().to_owned())
}

const REFUSED: [(&str, &str); 15] = [
    ("", "it is empty"),
    ("1st", "it must start with a letter"),
    ("_a", "it must start with a letter"),
    ("-a", "it must start with a letter"),
    ("ärger", "it must start with a letter"),
    ("aä", "only letters, digits, _ and - are allowed"),
    ("a b", "only letters, digits, _ and - are allowed"),
    ("a.b", "only letters, digits, _ and - are allowed"),
    (
        "a\"; drop schema core; --",
        "only letters, digits, _ and - are allowed",
    ),
    ("a\n", "only letters, digits, _ and - are allowed"),
    (
        "a__b",
        "__ separates namespace and group in the names of queues",
    ),
    (
        "a-_b",
        "__ separates namespace and group in the names of queues",
    ),
    ("a_", "it must not end in _ or -"),
    ("a-", "it must not end in _ or -"),
    (
        "a-DLQ",
        "names that end in _dlq belong to dead-letter queues",
    ),
];

#[tokio::test]
async fn names_that_cannot_name_a_queue_are_refused_by_the_database() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    for (name, reason) in REFUSED {
        let expected = format!("namespace \"{name}\" is refused: {reason}");
        assert_eq!(
            ensure(&pool, Some(name), Some("default")).await,
            Err(expected.clone())
        );
        assert_eq!(insert(&pool, Some(name)).await, Err(expected));
        let expected = format!("group \"{name}\" is refused: {reason}");
        assert_eq!(ensure(&pool, Some("fine"), Some(name)).await, Err(expected));
    }
    assert_eq!(
        ensure(&pool, None, Some("default")).await,
        Err("namespace \"<NULL>\" is refused: it is empty".to_owned())
    );
    assert_eq!(
        ensure(&pool, Some("fine"), None).await,
        Err("group \"<NULL>\" is refused: it is empty".to_owned())
    );
    insert(&pool, None).await.unwrap_err();
    let left: i64 = sqlx::query_scalar(
        "select (select count(*) from core.namespaces) + (select count(*) from pgmq.meta)",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(left, 0, "what is refused leaves nothing behind");
}

#[tokio::test]
async fn names_that_cannot_name_a_queue_are_a_start_up_error() {
    let database = TestDatabase::new().await;
    for (name, reason) in REFUSED {
        let (app, _saw) = app(&database);
        let error = nexus::start(app.namespace(name)).await.unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("is refused: ") && said.contains("namespace"),
            "{name:?}: {said}"
        );
        if let StartError::Name { reason: said } = error {
            assert_eq!(said, format!("namespace \"{name}\" is refused: {reason}"));
        }
        let (app, _saw) = self::app(&database);
        let said = nexus::start(app.name(name)).await.unwrap_err().to_string();
        assert!(said.contains("is refused: "), "app {name:?}: {said}");
    }
}

#[tokio::test]
async fn the_names_of_queues_are_counted_with_all_that_is_added() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    // `core_events_` + 31 + `_dlq` are 47.
    let longest = "n".repeat(31);
    let too_long = "n".repeat(32);
    assert_eq!(
        ensure(&pool, Some(&too_long), Some("default")).await,
        Err(format!(
            "namespace \"{too_long}\" with group \"default\" is refused: the queue name \
             core_events_{too_long}_dlq has 48 characters, pgmq allows 47"
        ))
    );
    insert(&pool, Some(&too_long)).await.unwrap_err();
    assert!(
        ensure(&pool, Some(&longest), Some("g"))
            .await
            .unwrap_err()
            .contains("has 50 characters")
    );
    // With a group: 20 + `__` + 9.
    let namespace = "m".repeat(20);
    assert_eq!(
        ensure(&pool, Some(&namespace), Some("ggggggggg")).await,
        Ok(format!("core_events_{namespace}__ggggggggg"))
    );
    assert!(
        ensure(&pool, Some(&namespace), Some("gggggggggg"))
            .await
            .unwrap_err()
            .contains("has 48 characters")
    );

    let (app, _saw) = app(&database);
    let error = nexus::start(app.namespace(&too_long)).await.unwrap_err();
    assert!(matches!(error, StartError::Name { .. }), "{error}");
    assert!(
        error
            .to_string()
            .ends_with("has 48 characters, pgmq allows 47"),
        "{error}"
    );
}

/// Emits by the client, by SQL and by a foreign program, fails one, and reads the dead letter.
async fn works(database: &TestDatabase, namespace: &str, name: &str, queue: &str) {
    let (app, mut saw) = app(database);
    let app = nexus::start(app.namespace(namespace).name(name))
        .await
        .unwrap();
    let pool = database.pool().await;
    app.client()
        .emit(&NameGiven {
            name: "client".to_owned(),
        })
        .await
        .unwrap();
    sqlx::query("select core.emit($1, 'name.given', '{\"name\": \"sql\"}')")
        .bind(namespace)
        .execute(&pool)
        .await
        .unwrap();
    sqlx::query("select pgmq.send(core.queue_name_for_namespace($1), jsonb_build_object('eventType', 'name.given',
                     'namespace', $1, 'payload', '{\"name\": \"foreign\"}'::jsonb))")
        .bind(namespace)
        .execute(&pool)
        .await
        .unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(within("the handler runs", saw.recv()).await.unwrap());
    }
    seen.sort();
    assert_eq!(seen, ["client", "foreign", "sql"]);
    sqlx::query("select core.emit($1, 'name.given', '{\"name\": 5}')")
        .bind(namespace)
        .execute(&pool)
        .await
        .unwrap();
    within("all is handled", app.idle()).await.unwrap();
    let letters = app.client().dead_letters(name, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    let tables: Vec<String> = sqlx::query_scalar(
        "select queue_name from pgmq.meta where queue_name = any($1) order by 1",
    )
    .bind([queue.to_owned(), format!("{queue}_dlq")])
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(tables, [queue.to_owned(), format!("{queue}_dlq")]);
    app.shutdown().await;
}

#[tokio::test]
async fn the_longest_names_work() {
    let database = TestDatabase::new().await;
    let longest = "n".repeat(31);
    works(
        &database,
        &longest,
        "default",
        &format!("core_events_{longest}"),
    )
    .await;
    let namespace = "m".repeat(20);
    works(
        &database,
        &namespace,
        "ggggggggg",
        &format!("core_events_{namespace}__ggggggggg"),
    )
    .await;
}

#[tokio::test]
async fn a_hyphen_and_upper_case_work_and_become_the_queues_own_spelling() {
    let database = TestDatabase::new().await;
    works(&database, "my-app", "default", "core_events_my_app").await;
    works(
        &database,
        "My-Other-App",
        "Send-Mail",
        "core_events_my_other_app__send_mail",
    )
    .await;
}

#[tokio::test]
async fn names_that_would_share_a_queue_are_refused() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    ensure(&pool, Some("my-app"), Some("send-mail"))
        .await
        .unwrap();
    for other in ["my_app", "My-App", "MY_APP"] {
        for group in ["default", "send-mail", "else"] {
            assert_eq!(
                ensure(&pool, Some(other), Some(group)).await,
                Err(format!(
                    "namespace \"{other}\" is refused: it differs from the existing \"my-app\" only in case or in - and _"
                ))
            );
        }
        assert!(
            insert(&pool, Some(other))
                .await
                .unwrap_err()
                .contains("namespaces_queue_part")
        );
    }
    for other in ["send_mail", "Send-Mail"] {
        assert_eq!(
            ensure(&pool, Some("my-app"), Some(other)).await,
            Err(format!(
                "group \"{other}\" is refused: it differs from the existing \"send-mail\" only in case or in - and _"
            ))
        );
    }
    let (app, _saw) = app(&database);
    let error = nexus::start(app.namespace("My_App")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "namespace \"My_App\" is refused: it differs from the existing \"my-app\" only in case or in - and _"
    );
    let (app, _saw) = self::app(&database);
    let error = nexus::start(app.namespace("my-app").name("Send_Mail"))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("group \"Send_Mail\" is refused"),
        "{error}"
    );
}

#[tokio::test]
async fn spellings_that_come_at_once_end_with_one_of_them() {
    let database = TestDatabase::new().await;
    let mut starters = tokio::task::JoinSet::new();
    for (namespace, group) in [
        ("app-a", "x"),
        ("app_a", "y"),
        ("App-A", "z"),
        ("APP_A", "default"),
    ] {
        let pool = database.pool().await;
        starters.spawn(async move { ensure(&pool, Some(namespace), Some(group)).await });
    }
    let answers = within("all answer", starters.join_all()).await;
    let accepted = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!(accepted, 1, "{answers:?}");
    for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert!(refused.contains("only in case or in - and _"), "{refused}");
    }
}

#[tokio::test]
async fn ensuring_a_group_again_changes_nothing_and_restores_a_lost_queue() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let mut starters = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let pool = pool.clone();
        starters.spawn(async move { ensure(&pool, Some("shop"), Some("billing")).await });
    }
    for answer in within("all answer", starters.join_all()).await {
        assert_eq!(answer.as_deref(), Ok("core_events_shop__billing"));
    }
    sqlx::raw_sql("select pgmq.send('core_events_shop__billing', '{}')")
        .execute(&pool)
        .await
        .unwrap();
    ensure(&pool, Some("shop"), Some("billing")).await.unwrap();
    let kept: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_shop__billing")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(kept, 1);
    sqlx::raw_sql("select pgmq.drop_queue('core_events_shop__billing')")
        .execute(&pool)
        .await
        .unwrap();
    ensure(&pool, Some("shop"), Some("billing")).await.unwrap();
    // With the index that a claim walks, also after pgmq.create has been called again.
    sqlx::raw_sql("select pgmq.create('core_events_shop__billing')")
        .execute(&pool)
        .await
        .unwrap();
    let index: String = sqlx::query_scalar(
        "select indexdef from pg_indexes where indexname = 'q_core_events_shop__billing_vt_idx'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert!(
        index.contains("handler") && index.contains("eventVersion"),
        "{index}"
    );
}
