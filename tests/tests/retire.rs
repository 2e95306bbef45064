//! Subscriptions that no build declares any more: reported, retired, and what becomes of their messages.

use std::time::Duration;

use nexus::{
    Handle,
    client::{Leftovers, ReplayState, RetireError},
    prelude::*,
    testing::TestDatabase,
};
use nexus_tests::{Log, until, within};
use sqlx::{AssertSqlSafe, PgPool, SqlSafeStr};
use tokio::sync::mpsc;

/// A parcel has arrived.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.arrived")]
struct Arrived {
    n: u32,
}

/// A parcel has arrived, as it is told now.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.arrived", version = 2)]
struct ArrivedV2 {
    n: u32,
}

type Saw = mpsc::UnboundedSender<(&'static str, u32)>;

#[handler]
async fn weigh(parcel: Arrived, saw: State<Saw>) {
    let _ = saw.send(("weigh", parcel.n));
}

#[handler]
async fn label(parcel: Arrived, saw: State<Saw>) {
    let _ = saw.send(("label", parcel.n));
}

#[handler]
async fn stack(parcel: Envelope<Arrived>, saw: State<Saw>) {
    let _ = saw.send(("stack", parcel.n));
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

    async fn start(&self, handlers: &[&str]) -> Handle {
        let app = App::discover()
            .only(handlers.iter().copied())
            .name("depot")
            .database_url(self.database.url())
            .idle_poll(Duration::from_millis(25))
            .state(self.sender.clone());
        nexus::start(app).await.unwrap()
    }

    /// A node of a build without `weigh`, which was subscribed before and for which messages wait.
    async fn after_weigh_is_gone(&mut self, waiting: u32) -> Handle {
        self.start(&["weigh"]).await.shutdown().await;
        let node = self.start(&["label"]).await;
        let parcels: Vec<Arrived> = (0..waiting).map(|n| Arrived { n }).collect();
        node.client().emit_all(&parcels).await.unwrap();
        within("all is handled", node.idle()).await.unwrap();
        self.seen();
        node
    }

    fn seen(&mut self) -> Vec<(&'static str, u32)> {
        let mut seen = Vec::new();
        while let Ok(next) = self.saw.try_recv() {
            seen.push(next);
        }
        seen.sort_unstable();
        seen
    }

    async fn count(&self, query: &str) -> i64 {
        let text = AssertSqlSafe(format!("select count(*) from ({query}) q")).into_sql_str();
        sqlx::query_scalar(text)
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    async fn settled(&self) {
        until("the retired subscription is over", || async {
            let open = "select from core.retirements where settled_at is null";
            (self.count(open).await == 0).then_some(())
        })
        .await;
    }
}

const WAITING: &str =
    "select from pgmq.q_core_events_demo__depot where headers ->> 'handler' = 'weigh'";

#[tokio::test]
async fn what_waits_is_kept_as_dead_letters_and_runs_when_the_handler_comes_back() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(2_500).await;
    let client = node.client();
    let plan = client.retire_dry_run("depot", "weigh").await.unwrap();
    assert_eq!((plan.messages, plan.left), (2_500, 2_500));
    assert_eq!(
        test.count(WAITING).await,
        2_500,
        "a dry run changes nothing"
    );

    let done = client
        .retire("depot", "weigh", Leftovers::KeepAsDeadLetters)
        .await
        .unwrap();
    assert_eq!((done.messages, done.left), (2_500, 0));
    let handlers: Vec<String> = client
        .subscriptions()
        .await
        .unwrap()
        .into_iter()
        .map(|subscription| subscription.handler)
        .collect();
    assert_eq!(handlers, ["label"]);
    let retired = "select from pgmq.q_core_events_demo__depot_dlq where message ->> 'reason' = 'Retired'
        and message ->> 'handler' = 'weigh' and message ->> 'error' like 'the handler was retired at %'";
    assert_eq!(test.count(retired).await, 2_500);

    // Nothing is sent to it any more.
    client.emit(&Arrived { n: 10_000 }).await.unwrap();
    within("all is handled", node.idle()).await.unwrap();
    assert_eq!(test.seen(), [("label", 10_000)]);
    assert_eq!(test.count(WAITING).await, 0);

    // A redriven one waits, until a build has the handler again.
    let ids: Vec<i64> = sqlx::query_scalar(
        "select msg_id from pgmq.q_core_events_demo__depot_dlq
         where message -> 'originalEvent' -> 'payload' ->> 'n' in ('7', '8')",
    )
    .fetch_all(&test.pool)
    .await
    .unwrap();
    sqlx::query(
        "with d as (
             delete from pgmq.q_core_events_demo__depot_dlq where msg_id = any ($1) returning message, headers
         )
         insert into pgmq.q_core_events_demo__depot (vt, message, headers)
         select core.now(), message -> 'originalEvent', (headers - 'abandoned') || '{\"attempts\": 0}' from d",
    )
    .bind(ids)
    .execute(&test.pool)
    .await
    .unwrap();
    test.settled().await;
    assert_eq!(test.count(WAITING).await, 2);
    let back = test.start(&["weigh", "label"]).await;
    client.emit(&Arrived { n: 10_001 }).await.unwrap();
    for node in [&back, &node] {
        within("all is handled", node.idle()).await.unwrap();
    }
    let seen = test.seen();
    assert_eq!(
        seen,
        [
            ("label", 10_001),
            ("weigh", 7),
            ("weigh", 8),
            ("weigh", 10_001)
        ]
    );
    back.shutdown().await;
    node.shutdown().await;
}

#[tokio::test]
async fn what_waits_is_dropped_and_stays_in_the_log() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(3).await;
    let done = node
        .client()
        .retire("depot", "weigh", Leftovers::Drop)
        .await
        .unwrap();
    assert_eq!((done.messages, done.left), (3, 0));
    assert_eq!(test.count(WAITING).await, 0);
    assert_eq!(
        test.count("select from pgmq.q_core_events_demo__depot_dlq")
            .await,
        0
    );
    assert_eq!(test.count("select from core.event_log").await, 3);
    // The queue is there for the others.
    node.client().emit(&Arrived { n: 3 }).await.unwrap();
    within("all is handled", node.idle()).await.unwrap();
    assert_eq!(test.seen(), [("label", 3)]);
    node.shutdown().await;
}

#[tokio::test]
async fn a_handler_that_a_live_build_declares_is_refused() {
    let test = Test::new().await;
    let node = test.start(&["weigh"]).await;
    let client = node.client();
    let build: String = sqlx::query_scalar("select build_id from core.nodes")
        .fetch_one(&test.pool)
        .await
        .unwrap();
    let declared = format!(
        "handler \"weigh\" of group \"depot\" is declared by node \"{}\" (app \"depot\", build {build}): stop its nodes first (a killed one counts as live for 15 s)",
        node.node_id()
    );
    for error in [
        client
            .retire("depot", "weigh", Leftovers::Drop)
            .await
            .unwrap_err(),
        client.retire_dry_run("depot", "weigh").await.unwrap_err(),
    ] {
        assert!(matches!(error, RetireError::Declared { .. }), "{error:?}");
        assert_eq!(error.to_string(), declared);
    }
    let error = client
        .retire("depot", "sing", Leftovers::Drop)
        .await
        .unwrap_err();
    assert!(
        matches!(error, RetireError::NotSubscribed { .. }),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "handler \"sing\" of group \"depot\" is not subscribed in namespace \"demo\""
    );
    assert_eq!(test.count("select from core.subscriptions").await, 1);
    node.shutdown().await;
}

#[tokio::test]
async fn of_two_operators_one_retires_it() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(50).await;
    let client = node.client();
    let (one, two) = tokio::join!(
        client.retire("depot", "weigh", Leftovers::KeepAsDeadLetters),
        client.retire("depot", "weigh", Leftovers::Drop),
    );
    let (done, refused) = match (one, two) {
        (Ok(done), Err(refused)) | (Err(refused), Ok(done)) => (done, refused),
        both => panic!("{both:?}"),
    };
    assert_eq!((done.messages, done.left), (50, 0));
    let said = refused.to_string();
    assert!(
        said.contains("is not subscribed") && said.contains(": it was retired at 2"),
        "{said}"
    );
    node.shutdown().await;
}

#[tokio::test]
async fn what_open_transactions_still_send_shares_the_fate() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(2).await;
    let client = node.client();
    let mut by_client = test.pool.begin().await.unwrap();
    client
        .emit_in(&mut by_client, &Arrived { n: 2 })
        .await
        .unwrap();
    let mut old = test.pool.begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select from core.event_log")
        .execute(&mut *old)
        .await
        .unwrap();

    let done = client
        .retire("depot", "weigh", Leftovers::KeepAsDeadLetters)
        .await
        .unwrap();
    assert_eq!((done.messages, done.left), (2, 0));
    by_client.commit().await.unwrap();
    // Planned as of its snapshot, in which the handler is subscribed.
    sqlx::raw_sql("select core.emit('demo', 'parcel.arrived', '{\"n\": 3}')")
        .execute(&mut *old)
        .await
        .unwrap();
    let open = "select from core.retirements where settled_at is null";
    assert_eq!(test.count(open).await, 1, "a transaction is still open");
    old.commit().await.unwrap();
    test.settled().await;
    assert_eq!(test.count(WAITING).await, 0);
    let letters =
        "select from pgmq.q_core_events_demo__depot_dlq where message ->> 'reason' = 'Retired'";
    assert_eq!(test.count(letters).await, 4);
    within("all is handled", node.idle()).await.unwrap();
    assert_eq!(test.seen(), [("label", 2), ("label", 3)]);
    node.shutdown().await;
}

#[tokio::test]
async fn a_handler_that_comes_back_gets_what_commits_after_it_once() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(5).await;
    let client = node.client();
    // Each of them is sent to the subscription that is about to be retired.
    let mut by_client = test.pool.begin().await.unwrap();
    client
        .emit_in(&mut by_client, &Arrived { n: 100 })
        .await
        .unwrap();
    let mut old = test.pool.begin().await.unwrap();
    sqlx::raw_sql("set transaction isolation level repeatable read; select from core.event_log")
        .execute(&mut *old)
        .await
        .unwrap();
    // Nobody has got round to the messages when the handler is there again.
    sqlx::raw_sql(
        "begin;
         select core.retire('demo', 'depot', 'weigh', 'drop');
         select core.subscribe('demo', 'depot', '[{\"group\": \"depot\", \"handler\": \"weigh\",
             \"eventType\": \"parcel.arrived\", \"eventVersion\": 1}]');
         commit",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    client.emit(&Arrived { n: 101 }).await.unwrap();
    by_client.commit().await.unwrap();
    sqlx::raw_sql("select core.emit('demo', 'parcel.arrived', '{\"n\": 102}')")
        .execute(&mut *old)
        .await
        .unwrap();
    old.commit().await.unwrap();
    let back = test.start(&["weigh", "label"]).await;
    until("the subscription settles", || async {
        let open = "select from core.subscriptions where since_snapshot is not null";
        (test.count(open).await == 0).then_some(())
    })
    .await;
    for node in [&back, &node] {
        within("all is handled", node.idle()).await.unwrap();
    }
    let mut expected = Vec::new();
    expected.extend([100, 101, 102].map(|n| ("label", n)));
    expected.extend([100, 101, 102].map(|n| ("weigh", n)));
    assert_eq!(test.seen(), expected);
    back.shutdown().await;
    node.shutdown().await;
}

#[tokio::test]
async fn a_build_that_starts_at_the_same_moment_is_subscribed() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(0).await;
    for round in 0..4 {
        let (retired, back) = tokio::join!(
            node.client().retire("depot", "weigh", Leftovers::Drop),
            test.start(&["weigh", "label"]),
        );
        assert!(
            matches!(retired, Ok(_) | Err(RetireError::Declared { .. })),
            "{retired:?}"
        );
        back.client().emit(&Arrived { n: round }).await.unwrap();
        for node in [&back, &node] {
            within("all is handled", node.idle()).await.unwrap();
        }
        assert_eq!(test.seen(), [("label", round), ("weigh", round)]);
        back.shutdown().await;
    }
    node.shutdown().await;
}

#[tokio::test]
async fn nodes_finish_what_an_operator_has_begun() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(2_500).await;
    sqlx::raw_sql("select core.retire('demo', 'depot', 'weigh', 'dead_letter')")
        .execute(&test.pool)
        .await
        .unwrap();
    test.settled().await;
    assert_eq!(test.count(WAITING).await, 0);
    assert_eq!(
        test.count("select from pgmq.q_core_events_demo__depot_dlq")
            .await,
        2_500
    );
    node.shutdown().await;
}

#[tokio::test]
async fn its_replays_end_with_it() {
    let mut test = Test::new().await;
    let node = test.after_weigh_is_gone(300).await;
    let client = node.client();
    let id = client
        .replay("depot")
        .handler("weigh")
        .start()
        .await
        .unwrap();
    until("messages of the replay wait", || async {
        let status = client.replay_status(id).await.unwrap().unwrap();
        (status.waiting > 0).then_some(())
    })
    .await;
    client
        .retire("depot", "weigh", Leftovers::Drop)
        .await
        .unwrap();
    let status = client.replay_status(id).await.unwrap().unwrap();
    assert_eq!(status.state, ReplayState::Cancelled);
    assert_eq!(status.error.as_deref(), Some("its handler was retired"));
    assert_eq!(test.count(WAITING).await, 0);
    node.shutdown().await;
}

#[tokio::test]
async fn a_version_that_nobody_runs_is_reported_and_retired() {
    let test = Test::new().await;
    let node = test.start(&["stack"]).await;
    let client = node.client();
    client.emit(&ArrivedV2 { n: 1 }).await.unwrap();
    client.emit(&ArrivedV2 { n: 2 }).await.unwrap();
    let report = client.subscriptions().await.unwrap();
    assert_eq!(
        (
            report[0].event_version,
            report[0].waiting,
            report[0].unserved
        ),
        (Some(1), 2, 2)
    );
    assert!(report[0].is_live);

    let error = client
        .retire_version("depot", "stack", 1, Leftovers::Drop)
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("version 1 of handler \"stack\" of group \"depot\" is run by node"),
        "{error}"
    );
    let moved = client
        .retire_version("depot", "stack", 2, Leftovers::KeepAsDeadLetters)
        .await
        .unwrap();
    assert_eq!(moved, 2);
    let letters =
        "select from pgmq.q_core_events_demo__depot_dlq where message ->> 'reason' = 'Retired'";
    assert_eq!(test.count(letters).await, 2);
    assert_eq!(client.subscriptions().await.unwrap()[0].unserved, 0);
    node.shutdown().await;
}

#[tokio::test]
async fn a_live_node_whose_handler_was_retired_subscribes_again() {
    let mut test = Test::new().await;
    let node = test.start(&["weigh"]).await;
    // Taken for dead meanwhile, as after a pause of its process.
    sqlx::raw_sql(
        "begin;
         update core.nodes set last_heartbeat = core.now() - interval '1 minute';
         select core.retire('demo', 'depot', 'weigh', 'drop');
         commit",
    )
    .execute(&test.pool)
    .await
    .unwrap();
    until("it is subscribed again", || async {
        (test.count("select from core.subscriptions").await == 1).then_some(())
    })
    .await;
    node.client().emit(&Arrived { n: 1 }).await.unwrap();
    within("all is handled", node.idle()).await.unwrap();
    assert_eq!(test.seen(), [("weigh", 1)]);
    node.shutdown().await;
}

#[tokio::test]
async fn what_nobody_runs_is_warned_of_at_the_start() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(move || writer.clone())
        .init();
    let test = Test::new().await;
    let app = |handlers: &[&str]| {
        App::discover()
            .only(handlers.iter().copied())
            .name("reported")
            .database_url(test.database.url())
            .state(test.sender.clone())
    };
    nexus::start(app(&["weigh", "stack"]))
        .await
        .unwrap()
        .shutdown()
        .await;
    let client = Client::connect(
        &nexus::Database::from_url(test.database.url(), "the test").unwrap(),
        "demo",
    )
    .await
    .unwrap();
    client.emit(&Arrived { n: 1 }).await.unwrap();
    client.emit(&ArrivedV2 { n: 2 }).await.unwrap();
    let node = nexus::start(app(&["stack"])).await.unwrap();
    for expected in [
        "group=\"reported\" handler=\"weigh\" event_type=\"parcel.arrived\" waiting=\"2\"",
        "no live build declares this handler; what is sent to it waits until one does, or until it is retired (Client::retire). If this build should: ",
        "no live build runs this handler for this version; its messages wait until one does, or until they are retired (Client::retire_version) group=\"reported\" handler=\"stack\" event_type=\"parcel.arrived\" version=\"2\" waiting=\"1\"",
    ] {
        until(expected, || async {
            log.text().contains(expected).then_some(())
        })
        .await;
    }
    node.shutdown().await;
}
