//! Builds, apps and programs side by side: who defines what, what waits, and what is refused.

use std::{
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use nexus::{StartError, prelude::*, testing::TestDatabase};
use nexus_tests::{until, within};
use sqlx::Connection;
use tokio::sync::mpsc;

/// Something that happened.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "thing.happened")]
struct ThingHappened {
    number: u32,
}

/// Declared by the program `victim`, too, with other fields.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "shared.fact")]
struct SharedFact {
    number: u32,
}

/// Something happened, as it is told now.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "thing.happened", version = 2)]
struct ThingHappenedV2 {
    number: u32,
}

type Saw = mpsc::UnboundedSender<(&'static str, u32)>;

#[handler]
async fn old_handler(thing: ThingHappened, saw: State<Saw>) {
    let _ = saw.send(("old", thing.number));
}

#[handler]
async fn new_handler(thing: ThingHappened, saw: State<Saw>) {
    let _ = saw.send(("new", thing.number));
}

#[handler]
async fn second_version(thing: ThingHappenedV2, saw: State<Saw>) {
    let _ = saw.send(("second", thing.number));
}

/// In another group, where nobody takes version 2 yet.
#[handler(group = "elsewhere")]
async fn elsewhere(thing: ThingHappened, saw: State<Saw>) {
    let _ = saw.send(("elsewhere", thing.number));
}

#[handler(group = "facts")]
async fn on_fact(fact: SharedFact, saw: State<Saw>) {
    let _ = saw.send(("fact", fact.number));
}

fn app(database: &TestDatabase, handlers: &[&str], saw: &Saw) -> App {
    App::discover()
        .only(handlers.iter().copied())
        .name("shop")
        .database_url(database.url())
        .idle_poll(Duration::from_millis(25))
        .state(saw.clone())
}

#[tokio::test]
async fn what_only_a_vanished_handler_can_run_waits_and_is_reported() {
    let database = TestDatabase::new().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    nexus::start(app(&database, &["old_handler"], &sender))
        .await
        .unwrap()
        .shutdown()
        .await;

    // The next build has another handler instead; the event goes to both subscriptions.
    let node = nexus::start(app(&database, &["new_handler"], &sender))
        .await
        .unwrap();
    node.client()
        .emit(&ThingHappened { number: 1 })
        .await
        .unwrap();
    assert_eq!(
        within("the new one runs", saw.recv()).await,
        Some(("new", 1))
    );
    within("all is settled", node.idle()).await.unwrap();
    let report = node.client().subscriptions().await.unwrap();
    let facts: Vec<(&str, bool, i64)> = report
        .iter()
        .map(|subscription| {
            (
                subscription.handler.as_str(),
                subscription.is_live,
                subscription.waiting,
            )
        })
        .collect();
    assert_eq!(facts, [("new_handler", true, 0), ("old_handler", false, 1)]);
    node.shutdown().await;

    // A build that has it again gets what waited.
    let node = nexus::start(app(&database, &["old_handler"], &sender))
        .await
        .unwrap();
    assert_eq!(
        within("the old one runs", saw.recv()).await,
        Some(("old", 1))
    );
    within("all is settled", node.idle()).await.unwrap();
    node.shutdown().await;
}

#[tokio::test]
async fn a_message_of_another_version_waits_for_a_build_that_can_run_it() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["old_handler"], &sender))
        .await
        .unwrap();
    for (number, version) in [(1, 2), (2, 1)] {
        sqlx::query("select core.emit('demo', 'thing.happened', jsonb_build_object('number', $1::int), jsonb_build_object('version', $2::int))")
            .bind(number)
            .bind(version)
            .execute(&pool)
            .await
            .unwrap();
    }
    assert_eq!(within("version 1 runs", saw.recv()).await, Some(("old", 2)));
    node.shutdown().await;
    let left: Vec<(String, i32)> = sqlx::query_as(
        "select headers ->> 'eventVersion', read_ct from pgmq.q_core_events_demo__shop",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    assert_eq!(left, [("2".to_owned(), 0)], "version 2 was never claimed");
}

#[tokio::test]
async fn two_versions_go_to_the_handlers_that_take_them() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let handlers = ["old_handler", "second_version", "elsewhere"];
    let node = nexus::start(app(&database, &handlers, &sender))
        .await
        .unwrap();
    let client = node.client();
    client.emit(&ThingHappened { number: 1 }).await.unwrap();
    client.emit(&ThingHappenedV2 { number: 2 }).await.unwrap();
    // By the other ways into the queues, and in a version that nobody takes.
    let emit = "select core.emit('demo', 'thing.happened', jsonb_build_object('number', $1::int), jsonb_build_object('version', $2::int) || $3)";
    for (number, version, options) in [
        (3, 1, "{}"),
        (4, 2, "{}"),
        (5, 3, "{}"),
        (6, 1, "{\"after\": \"1 ms\"}"),
        (7, 2, "{\"after\": \"1 ms\"}"),
    ] {
        sqlx::query(emit)
            .bind(number)
            .bind(version)
            .bind(serde_json::from_str::<serde_json::Value>(options).unwrap())
            .execute(&pool)
            .await
            .unwrap();
    }
    for version in [1, 2] {
        sqlx::query(
            "with t as (
                 insert into core.scheduled_tasks (namespace, name, cron_expression, event_type, event_version, payload)
                 values ('demo', 't' || $1, '@yearly', 'thing.happened', $1, jsonb_build_object('number', 7 + $1))
                 returning task_id
             )
             select task_id from t",
        )
        .bind(version)
        .execute(&pool)
        .await
        .unwrap();
    }
    sqlx::raw_sql("select core.run_task_now(task_id) from core.scheduled_tasks")
        .execute(&pool)
        .await
        .unwrap();
    let mut seen = Vec::new();
    for _ in 0..12 {
        seen.extend(within("what is due is handled", saw.recv()).await);
    }
    seen.sort_unstable();
    let mut expected = Vec::new();
    expected.extend([1, 3, 6, 8].map(|number| ("elsewhere", number)));
    expected.extend([1, 3, 6, 8].map(|number| ("old", number)));
    expected.extend([2, 4, 7, 9].map(|number| ("second", number)));
    assert_eq!(seen, expected);
    node.shutdown().await;
    // A version that nobody takes waits for all of them, one that others of the group take for nobody.
    for (queue, waiting) in [
        ("shop", vec![("old_handler", "3"), ("second_version", "3")]),
        (
            "elsewhere",
            vec![
                ("elsewhere", "2"),
                ("elsewhere", "2"),
                ("elsewhere", "2"),
                ("elsewhere", "2"),
                ("elsewhere", "3"),
            ],
        ),
    ] {
        let text = format!(
            "select headers ->> 'handler', headers ->> 'eventVersion' from pgmq.q_core_events_demo__{queue} order by 1, 2"
        );
        let left: Vec<(String, String)> = sqlx::query_as(sqlx::AssertSqlSafe(text))
            .fetch_all(&pool)
            .await
            .unwrap();
        let left: Vec<(&str, &str)> = left
            .iter()
            .map(|(handler, version)| (handler.as_str(), version.as_str()))
            .collect();
        assert_eq!(left, waiting);
    }
}

#[tokio::test]
async fn an_old_build_that_restarts_during_a_roll_out_takes_nothing_back() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    nexus::start(app(&database, &["old_handler"], &sender))
        .await
        .unwrap()
        .shutdown()
        .await;
    let new = nexus::start(app(&database, &["old_handler", "tidy_up"], &sender))
        .await
        .unwrap();
    let old = nexus::start(app(&database, &["old_handler"], &sender))
        .await
        .unwrap();
    let active: bool =
        sqlx::query_scalar("select active from core.scheduled_tasks where name = 'tidy_up'")
            .fetch_one(&pool)
            .await
            .unwrap();
    assert!(active, "the old build deactivated a task of the new one");
    new.shutdown().await;
    // Rolled back: the old build, which has been running all along, defines the app now.
    until("the old build defines the app", || async {
        let active: bool =
            sqlx::query_scalar("select active from core.scheduled_tasks where name = 'tidy_up'")
                .fetch_one(&pool)
                .await
                .unwrap();
        (!active).then_some(())
    })
    .await;
    old.shutdown().await;
}

#[cron("@daily")]
async fn tidy_up() {}

#[tokio::test]
async fn a_second_boot_under_one_id_fences_the_first() {
    let database = TestDatabase::new().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let node = |lease| {
        app(&database, &["old_handler"], &sender)
            .node_id("till-1")
            .lease(lease)
    };
    let first = nexus::start(node(Duration::from_secs(1))).await.unwrap();
    let second = nexus::start(node(Duration::from_secs(10))).await.unwrap();
    within("the first is fenced", first.fenced()).await;
    // It takes no more work, though nobody has told it to stop.
    let things: Vec<ThingHappened> = (0..50).map(|number| ThingHappened { number }).collect();
    second.client().emit_all(&things).await.unwrap();
    within("all is settled", second.idle()).await.unwrap();
    assert_eq!(second.stats()[0].completed, 50);
    let stats = first.shutdown().await;
    assert_eq!(stats[0].completed, 0);
    // The first one's farewell does not remove the second.
    let pool = database.pool().await;
    let epoch: i64 = sqlx::query_scalar("select epoch from core.nodes where node_id = 'till-1'")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(epoch, 2);
    second.shutdown().await;
}

#[tokio::test]
async fn an_id_that_lives_in_another_namespace_is_refused() {
    let database = TestDatabase::new().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let node = |namespace: &str| {
        app(&database, &["old_handler"], &sender)
            .node_id("till-1")
            .namespace(namespace)
    };
    let first = nexus::start(node("one")).await.unwrap();
    let error = nexus::start(node("two")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "node id `till-1` is used by a live node in namespace `one`: choose another CORE_NODE_ID"
    );
    first.shutdown().await;
}

#[tokio::test]
async fn a_node_taken_for_dead_registers_again() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let impatient = app(&database, &["old_handler"], &sender).lease(Duration::from_secs(1));
    let node = nexus::start(impatient).await.unwrap();
    sqlx::query("delete from core.nodes")
        .execute(&pool)
        .await
        .unwrap();
    until("the node registers again", || async {
        let ids: Vec<String> = sqlx::query_scalar("select node_id from core.nodes")
            .fetch_all(&pool)
            .await
            .unwrap();
        (ids == [node.node_id()]).then_some(())
    })
    .await;
    node.shutdown().await;
}

/// What ends the wait of [`blocks`].
#[derive(Clone)]
struct Gate(Arc<Mutex<std::sync::mpsc::Receiver<()>>>);

#[handler]
async fn blocks(thing: ThingHappened, gate: State<Gate>, saw: State<Saw>) {
    // Holds the thread, as a handler should not.
    let is_open = gate
        .0
        .lock()
        .unwrap()
        .recv_timeout(Duration::from_secs(20))
        .is_ok();
    let _ = saw.send((if is_open { "released" } else { "gave up" }, thing.number));
}

/// Watches, from a thread and a connection of its own, how a blocked node lives for longer than two
/// leases of a second.
async fn watch_a_blocked_node(url: &str) {
    let mut connection = sqlx::PgConnection::connect(url).await.unwrap();
    let begun = loop {
        let begun: Option<(f64,)> = sqlx::query_as(
            "select extract(epoch from core.now())::float8
             from pgmq.q_core_events_demo__shop where read_ct = 1",
        )
        .fetch_optional(&mut connection)
        .await
        .unwrap();
        match begun {
            Some((begun,)) => break begun,
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    loop {
        let (now, last_heartbeat, leased_until, claims): (f64, f64, f64, i32) = sqlx::query_as(
            "select extract(epoch from core.now())::float8,
                    extract(epoch from n.last_heartbeat)::float8,
                    extract(epoch from q.vt)::float8, q.read_ct
             from core.nodes n, pgmq.q_core_events_demo__shop q",
        )
        .fetch_one(&mut connection)
        .await
        .expect("the node and its message stay where they are");
        assert_eq!(claims, 1, "the message was claimed again");
        if last_heartbeat > begun + 2.5 && leased_until > begun + 3.0 {
            return;
        }
        assert!(
            now < begun + 15.0,
            "the heart stopped, or the lease was not extended"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_node_whose_threads_are_all_blocked_stays_alive() {
    let database = TestDatabase::new().await;
    let pool = database.pool().await;
    let (sender, mut saw) = mpsc::unbounded_channel();
    let (open, gate) = std::sync::mpsc::channel();
    let blocked = app(&database, &["blocks"], &sender)
        .state(Gate(Arc::new(Mutex::new(gate))))
        .lease(Duration::from_secs(1));
    let node = nexus::start(blocked).await.unwrap();
    let url = database.url().to_owned();
    let watch = std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(watch_a_blocked_node(&url));
        open.send(()).unwrap();
    });
    // From the claim on, nothing moves here until the watch is over.
    node.client()
        .emit(&ThingHappened { number: 1 })
        .await
        .unwrap();
    assert_eq!(
        within("the handler ends", saw.recv()).await,
        Some(("released", 1))
    );
    watch.join().unwrap();
    within("all is settled", node.idle()).await.unwrap();
    assert!(saw.try_recv().is_err(), "it ran twice");
    let letters: i64 = sqlx::query_scalar("select count(*) from pgmq.q_core_events_demo__shop_dlq")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(letters, 0);
    node.shutdown().await;
}

/// Runs another program against the database and returns what it says when it refuses to start.
fn other_program(database: &TestDatabase, app: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_victim"))
        .env("CORE_DATABASE_URL", database.url())
        .env("VICTIM_APP", app)
        .env("VICTIM_HANDLERS", "keep")
        .output()
        .unwrap();
    assert!(!output.status.success(), "the other program started");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn two_programs_under_one_app_name_are_refused() {
    let database = TestDatabase::new().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["old_handler"], &sender))
        .await
        .unwrap();
    let said = other_program(&database, "shop");
    assert!(
        said.contains("app `shop` in namespace `demo` is run by program `deploy`"),
        "{said}"
    );
    assert!(
        said.contains("this is `victim`") && said.contains("App::name"),
        "{said}"
    );
    node.shutdown().await;
}

#[tokio::test]
async fn two_apps_that_declare_an_event_type_differently_are_refused() {
    let database = TestDatabase::new().await;
    let (sender, _saw) = mpsc::unbounded_channel();
    let node = nexus::start(app(&database, &["on_fact"], &sender))
        .await
        .unwrap();
    let said = other_program(&database, "warehouse");
    assert!(
        said.contains("event type `shared.fact` version 1 is declared differently by app `shop` and by app `warehouse`"),
        "{said}"
    );
    node.shutdown().await;
}

#[tokio::test]
async fn a_missing_state_or_unknown_handler_is_refused_before_anything_runs() {
    let database = TestDatabase::new().await;
    let stateless = App::discover()
        .only(["old_handler", "no_such"])
        .database_url(database.url());
    let Err(StartError::Problems(problems)) = nexus::start(stateless).await else {
        panic!("the app started");
    };
    let text = problems.to_string();
    assert_eq!(problems.iter().count(), 2, "{text}");
    assert!(text.contains("App::only names `no_such`"), "{text}");
    assert!(
        text.contains("deploy::old_handler") && text.contains("State<"),
        "{text}"
    );
    assert!(text.contains("tests/deploy.rs:"), "{text}");
}
