//! An original nexus-core is taken over in place: every row is where nexus finds it or in the schema that is kept, all or
//! nothing of it, not while its nodes run, and without a word of it nothing touches it.

use std::str::FromStr;

use nexus::{
    Client, Database, StartError, UntypedHandler,
    client::{Adopted, ConnectError},
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use nexus_migrations::{MigrateError, down, up, verify};
use nexus_tests::{until, within};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::sync::mpsc;

fn options(database: &TestDatabase) -> PgConnectOptions {
    PgConnectOptions::from_str(database.url()).unwrap()
}

/// Sessions that have sent to the original's queues count as its nodes: this one is gone afterwards.
async fn execute(database: &TestDatabase, statement: &str) {
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(statement.to_owned()))
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
}

async fn ask<T>(database: &TestDatabase, query: &'static str) -> T
where
    T: Send + Unpin + sqlx::Type<sqlx::Postgres> + for<'r> sqlx::Decode<'r, sqlx::Postgres>,
{
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let answer = sqlx::query_scalar(query).fetch_one(&mut connection).await;
    connection.close().await.unwrap();
    answer.unwrap()
}

async fn original() -> TestDatabase {
    let database = TestDatabase::empty().await;
    // What stays of it is pgmq.
    up(&options(&database)).await.unwrap();
    down(&options(&database), 0).await.unwrap();
    execute(&database, include_str!("original.sql")).await;
    database
}

fn of(database: &TestDatabase) -> Database {
    Database::from_url(database.url(), "the test").unwrap()
}

async fn refused(adoption: nexus::client::Adoption<'_>) -> MigrateError {
    match adoption.run().await {
        Err(ConnectError::Schema(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// All rows of the original and of the queues, as a text.
async fn rows(database: &TestDatabase, schema: &str) -> String {
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let mut lines = Vec::new();
    for table in [
        format!("{schema}.namespaces"),
        format!("{schema}.nodes"),
        format!("{schema}.event_log"),
        format!("{schema}.scheduled_tasks"),
        "pgmq.q_core_events_demo".to_owned(),
        "pgmq.q_core_events_demo_dlq".to_owned(),
        "pgmq.\"q_core_events_my-shop\"".to_owned(),
        "pgmq.\"q_core_events_my-shop_dlq\"".to_owned(),
        "pgmq.\"q_my-shop_dlq\"".to_owned(),
        "pgmq.meta".to_owned(),
        "partman.part_config".to_owned(),
    ] {
        let query = format!("select string_agg(t::text, E'\\n' order by t::text) from {table} t");
        let rows: Option<String> = sqlx::query_scalar(AssertSqlSafe(query))
            .fetch_one(&mut connection)
            .await
            .unwrap();
        lines.extend([table, rows.unwrap_or_default()]);
    }
    connection.close().await.unwrap();
    lines.join("\n")
}

/// What is to be taken over of `original.sql`.
fn check_counts(adopted: &Adopted) {
    let own = |name: &str| (name.to_owned(), name.to_owned());
    assert_eq!(adopted.namespaces, [own("demo"), own("my-shop")]);
    let counts = [
        adopted.nodes,
        adopted.events,
        adopted.messages,
        adopted.dead_letters,
    ];
    assert_eq!(counts.map(|count| count.rows), [2, 243, 4, 3]);
    assert!(counts.iter().all(|count| !count.is_estimate));
    assert_eq!((adopted.tasks, adopted.repeated_tasks), (5, 2));
    assert_eq!(
        adopted.zoned_tasks,
        [("demo".to_owned(), "report".to_owned())]
    );
    let [unreadable] = adopted.unreadable_tasks.as_slice() else {
        panic!("{adopted:#?}");
    };
    assert_eq!(unreadable.name, "month end");
    assert!(unreadable.error.contains("0 0 $ * *"), "{unreadable:?}");
    let left: Vec<_> = adopted
        .left
        .iter()
        .map(|left| (left.what, left.rows))
        .collect();
    assert_eq!(left, [("nodes", 1), ("scheduled tasks", 1)]);
    assert_eq!((adopted.cron_jobs, adopted.partman_tables), (0, 1));
    assert!(!adopted.is_cron_hidden);
}

#[tokio::test]
async fn it_is_refused_and_left_alone_until_it_is_adopted() {
    let database = original().await;
    let before = rows(&database, "core").await;
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let errors = [
        up(&options(&database)).await.unwrap_err(),
        down(&options(&database), 0).await.unwrap_err(),
        verify(&mut connection).await.unwrap_err(),
    ];
    connection.close().await.unwrap();
    for error in errors {
        assert!(matches!(error, MigrateError::OriginalSchema), "{error}");
        assert!(error.to_string().contains("nexus migrate adopt"), "{error}");
    }
    let app = App::discover().database_url(database.url());
    let started = nexus::start(app).await.unwrap_err();
    assert!(
        matches!(
            started,
            StartError::Schema(MigrateError::OriginalSchema)
                | StartError::Connect(ConnectError::Schema(MigrateError::OriginalSchema))
        ),
        "{started:?}"
    );

    check_counts(&of(&database).adopt().dry_run().await.unwrap());
    assert_eq!(rows(&database, "core").await, before);
}

#[tokio::test]
async fn every_row_is_kept_where_nexus_finds_it() {
    let database = original().await;
    let before = rows(&database, "core").await;
    check_counts(&of(&database).adopt().run().await.unwrap());

    // Of the tables nothing has changed, but for their schema; what waited has moved to where it is claimed from.
    let until_queues = |text: String| text.split("pgmq.q_").next().unwrap().to_owned();
    assert_eq!(
        until_queues(rows(&database, "core_original").await).replace("core_original.", "core."),
        until_queues(before)
    );
    let lost: i64 = ask(
        &database,
        "select count(*) from (
             select event_id, namespace, event_type, payload, emitted_at, producer_node_id, scheduled_task_id from core_original.event_log
             except all
             select event_id, namespace, event_type, payload, emitted_at, producer_node_id, scheduled_task_id from core.event_log) as l",
    )
    .await;
    assert_eq!(lost, 0);
    let partman: String = ask(
        &database,
        "select string_agg(parent_table, ' ') from partman.part_config",
    )
    .await;
    assert_eq!(partman, "public.other");

    let client = Client::attach(&of(&database), "demo").await.unwrap();
    let listed = client.events().list(1_000).await.unwrap();
    assert_eq!(listed.len(), 163);
    let odd = client
        .events()
        .event_type("Order/Paid")
        .list(9)
        .await
        .unwrap();
    assert_eq!(odd[0].payload, json!("text"));
    assert_eq!(odd[0].metadata, json!({"original": [1]}));
    let shown = client.event(odd[0].event_id).await.unwrap().unwrap();
    assert_eq!(shown.producer, "server-1a2b3c");
    let nodes = client.nodes().await.unwrap();
    assert_eq!(nodes.len(), 1);
    assert_eq!(nodes[0].display_name.as_deref(), Some("worker"));
    assert!(!nodes[0].is_live);

    let tasks = client.schedules().await.unwrap();
    let mut told: Vec<_> = tasks
        .iter()
        .map(|task| (task.name.as_str(), task.expression.as_str(), task.is_active))
        .collect();
    told.sort_unstable();
    assert_eq!(
        told,
        [
            ("cleanup", "*/5 * * * *", true),
            ("cleanup_44444444", "0 3 * * *", true),
            ("month end", "0 0 $ * *", true),
            ("report", "0 9 * * 1-5", true),
        ]
    );
    let letters = client.dead_letters("default", 100).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].event_type.as_deref(), Some("user.created"));
    assert_eq!(letters[0].reason, "Handler execution error");
    assert_eq!(letters[0].error.as_deref(), Some("Error: no mailbox 17"));
    assert_eq!(letters[0].original["payload"], json!({"userId": 2001}));
    assert!(letters[0].fingerprint.is_some());
    let shop = Client::attach(&of(&database), "my-shop").await.unwrap();
    assert_eq!(shop.dead_letters("default", 100).await.unwrap().len(), 2);

    // There is nothing that could be adopted once more.
    let again = refused(of(&database).adopt()).await;
    assert!(
        again.to_string().contains("that of nexus already"),
        "{again}"
    );
}

#[tokio::test]
async fn what_waited_is_delivered_and_what_is_emitted_comes_after_it() {
    let database = original().await;
    of(&database).adopt().run().await.unwrap();
    let (sender, mut heard) = mpsc::unbounded_channel();
    let start = |namespace: &'static str| {
        let sender = sender.clone();
        let greet = move |event: Envelope<Value>, _| {
            let told = (event["userId"].as_i64(), event.event_id());
            let _ = sender.send(told);
            async { Ok(()) }
        };
        let app = App::discover()
            .namespace(namespace)
            .handle(UntypedHandler::new("user.created", "greet", greet));
        TestApp::start_on(&database, app)
    };
    let demo = start("demo").await;
    let shop = start("my-shop").await;
    let mut users = Vec::new();
    for _ in 0..3 {
        let (user, event_id) = within("a delivery", heard.recv()).await.unwrap();
        assert!(event_id > 243, "{event_id}");
        users.push(user.unwrap());
    }
    users.sort_unstable();
    assert_eq!(users, [1001, 1002, 1003]);
    // The one that was no envelope, beside the one that was there.
    let letters = until("two dead letters", async || {
        let letters = demo.client().dead_letters("default", 100).await.unwrap();
        (letters.len() == 2).then_some(letters)
    })
    .await;
    assert!(
        letters
            .iter()
            .any(|letter| letter.reason == "Malformed message")
    );
    // It is redriven like any other.
    let old = letters
        .iter()
        .find(|letter| letter.reason != "Malformed message")
        .unwrap();
    let client = demo.client();
    client.redrive("default", &[old.id]).await.unwrap();
    let (user, _) = within("a redrive", heard.recv()).await.unwrap();
    assert_eq!(user, Some(2001));
    // A node has looked at the tasks.
    let task = until("the unreadable task to be inactive", async || {
        let tasks = demo.client().schedules().await.unwrap();
        let task = tasks.into_iter().find(|task| task.name == "month end");
        task.filter(|task| !task.is_active)
    })
    .await;
    assert!(task.last_error.unwrap().contains("0 0 $ * *"));
    demo.settled().await;
    shop.settled().await;
}

#[tokio::test]
async fn its_nodes_are_in_the_way() {
    let database = original().await;
    execute(
        &database,
        "update core.nodes set last_heartbeat = now() where node_id = 'worker-1a2b3c'",
    )
    .await;
    let error = refused(of(&database).adopt()).await;
    assert!(matches!(error, MigrateError::OriginalInUse { .. }));
    assert!(
        error
            .to_string()
            .contains("node `worker-1a2b3c` was heard of at"),
        "{error}"
    );
    let beat = "update core.nodes set last_heartbeat = now() - interval '6 minutes'";
    execute(&database, beat).await;
    let mut node = PgConnection::connect(database.url()).await.unwrap();
    sqlx::query("select * from pgmq.read('core_events_demo', 0, 1)")
        .execute(&mut node)
        .await
        .unwrap();
    let error = refused(of(&database).adopt()).await.to_string();
    assert!(error.contains("has called pgmq"), "{error}");
    assert!(of(&database).adopt().dry_run().await.is_err());

    // Who holds a lock is not waited for for ever, whatever was said; nor is anything half done then.
    let before = rows(&database, "core").await;
    sqlx::raw_sql("begin; insert into core.namespaces (namespace) values ('new')")
        .execute(&mut node)
        .await
        .unwrap();
    let error = refused(of(&database).adopt().force()).await.to_string();
    assert!(error.contains("holds a lock"), "{error}");
    sqlx::raw_sql("rollback").execute(&mut node).await.unwrap();
    assert_eq!(rows(&database, "core").await, before);
    let adopted = of(&database).adopt().force().run().await.unwrap();
    check_counts(&adopted);
}

#[tokio::test]
async fn interrupted_it_has_done_nothing_and_is_repeated() {
    let database = original().await;
    let before = rows(&database, "core").await;
    // Keeps it from its last step.
    let mut holder = PgConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql("begin; lock table pgmq.q_core_events_demo in access share mode")
        .execute(&mut holder)
        .await
        .unwrap();
    let its = of(&database);
    let running = tokio::spawn(async move { its.adopt().run().await });
    let waits = "select min(pid) from pg_locks where relation = 'pgmq.q_core_events_demo'::regclass and not granted";
    let pid: i32 = until("it to wait", async || {
        let pids: Option<i32> = ask(&database, waits).await;
        pids
    })
    .await;
    sqlx::query("select pg_terminate_backend($1)")
        .bind(pid)
        .execute(&mut holder)
        .await
        .unwrap();
    running.await.unwrap().unwrap_err();
    sqlx::raw_sql("rollback")
        .execute(&mut holder)
        .await
        .unwrap();
    assert_eq!(rows(&database, "core").await, before);
    holder.close().await.unwrap();

    // Two at once: one does it.
    let (one, other) = (of(&database), of(&database));
    let both = tokio::join!(one.adopt().run(), other.adopt().run());
    let done = [both.0, both.1];
    assert_eq!(
        done.iter().filter(|done| done.is_ok()).count(),
        1,
        "{done:?}"
    );
    check_counts(done.iter().flatten().next().unwrap());
}

#[tokio::test]
async fn names_that_nexus_cannot_have_are_given_others() {
    let database = original().await;
    execute(
        &database,
        "insert into core.namespaces (namespace) values ('my_shop'), ('a:b.c');
         insert into core.event_log (namespace, event_type, payload, producer_node_id) values ('1st', 'a.b', '{}', 'x');
         select pgmq.create('core_events_a:b.c');
         select pgmq.send('core_events_a:b.c', '{\"namespace\": \"a:b.c\", \"eventType\": \"a.b\", \"payload\": [1]}')",
    )
    .await;
    let error = refused(of(&database).adopt().rename("none", "other")).await;
    let MigrateError::OriginalNames { problems } = &error else {
        panic!("{error}");
    };
    assert_eq!(problems.len(), 4, "{problems:#?}");
    for told in [
        "`1st` as `1st`: it must start with a letter",
        "`a:b.c` as `a:b.c`: only letters",
        "`my-shop` and `my_shop`",
        "`none`: there is no such namespace",
    ] {
        assert!(
            problems.iter().any(|problem| problem.starts_with(told)),
            "{told}: {problems:#?}"
        );
    }
    let database_of = of(&database);
    let adoption = database_of
        .adopt()
        .rename("1st", "first")
        .rename("a:b.c", "abc")
        .rename("my_shop", "shop2");
    let adopted = adoption.run().await.unwrap();
    assert!(
        adopted
            .namespaces
            .contains(&("1st".to_owned(), "first".to_owned()))
    );
    let first = Client::attach(&database_of, "first").await.unwrap();
    assert_eq!(first.events().list(9).await.unwrap().len(), 1);

    let (sender, mut heard) = mpsc::unbounded_channel();
    let listen = UntypedHandler::new("a.b", "listen", move |event, _| {
        let _ = sender.send(event.into_event());
        async { Ok(()) }
    });
    let app = App::discover().namespace("abc").handle(listen);
    let app = TestApp::start_on(&database, app).await;
    assert_eq!(within("a delivery", heard.recv()).await, Some(json!([1])));
    app.shutdown().await;
}

#[tokio::test]
async fn who_may_not_is_told_so() {
    let database = original().await;
    let before = rows(&database, "core").await;
    let powerless = options(&database).options([("role", "pg_signal_backend")]);
    let how = nexus_migrations::adopt::How::default();
    let error = nexus_migrations::adopt::adopt(&powerless, &how)
        .await
        .unwrap_err();
    assert!(matches!(error, MigrateError::NotAllowed { .. }), "{error}");
    assert_eq!(rows(&database, "core").await, before);
    // The owner of the original cannot make the schema beside it.
    let owner = format!("nexus_adopt_{}", uuid::Uuid::new_v4().simple());
    let run = async |statements: &str| {
        let statements = statements.replace("OWNER", &owner);
        let name: String = ask(&database, "select quote_ident(current_database())").await;
        execute(
            &database,
            &statements.replace("DATABASE", &format!("database {name}")),
        )
        .await;
    };
    run(
        "create role OWNER; grant OWNER to current_user; grant create on DATABASE to OWNER;
         alter schema core owner to OWNER; revoke create on DATABASE from OWNER",
    )
    .await;
    let error = refused(of(&database).adopt()).await.to_string();
    run("alter schema core owner to current_user; drop role OWNER").await;
    assert!(
        error.contains(&format!(
            "role `{owner}`, which owns schema core, may not make schemas"
        )),
        "{error}"
    );
    let empty = TestDatabase::empty().await;
    let error = refused(of(&empty).adopt()).await.to_string();
    assert!(error.contains("there is no schema `core`"), "{error}");
}
