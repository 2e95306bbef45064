//! An app that runs as a role which is bound to its namespace has all that an app has, beside another
//! one that does the same in another namespace.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nexus::{
    Client, Database, StartError,
    client::{ConnectError, SqlAccess, SqlError},
    prelude::*,
};
use nexus_tests::{until, within};
use sqlx::PgPool;
use tokio::sync::Notify;

use super::{Test, execute, refused, scalar, texts};

/// Something to do.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "work.wanted", key = number)]
struct Wanted {
    number: i32,
}

/// It is done.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "work.done")]
struct Done {
    number: i32,
}

async fn note(tx: &mut Tx, what: &str, number: i32) -> nexus::Result {
    sqlx::query("insert into effects (what, number) values ($1, $2)")
        .bind(what)
        .bind(number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler]
async fn work(wanted: Wanted, tx: &mut Tx) -> nexus::Result<Emit<Done>> {
    note(tx, "work", wanted.number).await?;
    Ok(Emit(Done {
        number: wanted.number,
    }))
}

#[handler(group = "counting")]
async fn count(done: Batch<Done>, tx: &mut Tx) -> nexus::Result {
    for done in &done {
        note(tx, "count", done.number).await?;
    }
    Ok(())
}

#[handler(max_attempts = 2, backoff = "fixed(1ms)")]
async fn refuse(done: Done, gate: State<Gate>) -> nexus::Result {
    if done.number == 13 && !gate.is_mended.load(Ordering::Acquire) {
        return Err("thirteen".into());
    }
    Ok(())
}

#[handler(formerly = "refuse")]
async fn accept(done: Done, tx: &mut Tx) -> nexus::Result {
    note(tx, "accept", done.number).await
}

#[cron("* * * * * *")]
async fn every_second(_tick: Tick, ticked: State<Gate>) {
    ticked.ticked.notify_one();
}

#[derive(Clone, Default)]
struct Gate {
    is_mended: Arc<AtomicBool>,
    ticked: Arc<Notify>,
}

fn app(url: &str, namespace: &str, handlers: &[&str], gate: &Gate) -> App {
    App::discover()
        .only(handlers.iter().copied())
        .name("plant")
        .namespace(namespace)
        .database_url(url)
        .idle_poll(Duration::from_millis(25))
        .pool_size(5)
        .state(gate.clone())
}

const FIRST: &[&str] = &["work", "count", "refuse", "every_second"];
const SECOND: &[&str] = &["work", "count", "accept", "every_second"];

async fn effects(pool: &PgPool, what: &str) -> Vec<i32> {
    sqlx::query_scalar("select number from effects where what = $1 order by 1")
        .bind(what)
        .fetch_all(pool)
        .await
        .unwrap()
}

/// A whole life of an app, as the role that the URL names.
struct Life {
    url: String,
    pool: PgPool,
    namespace: &'static str,
    first_number: i32,
    gate: Gate,
}

impl Life {
    async fn live(url: String, namespace: &'static str, first_number: i32) {
        let pool = PgPool::connect(&url).await.unwrap();
        execute(&pool, "create table effects (what text, number int)").await;
        let life = Self {
            url,
            pool,
            namespace,
            first_number,
            gate: Gate::default(),
        };
        let first = life.start(FIRST).await;
        life.emit_in_every_way(first.client()).await;
        within("it ticks", life.gate.ticked.notified()).await;
        life.schedule(first.client()).await;
        life.redrive(first.client()).await;
        within("nothing is left", first.idle()).await.unwrap();
        life.rename(first).await;
        // Whoever asks without a namespace sees one.
        let seen = texts(&life.pool, "select distinct namespace from core.event_log").await;
        assert_eq!(seen, [namespace]);
        life.pool.close().await;
    }

    async fn start(&self, handlers: &[&str]) -> nexus::Handle {
        let app = app(&self.url, self.namespace, handlers, &self.gate);
        within("the app starts", nexus::start(app)).await.unwrap()
    }

    fn wanted(&self, number: i32) -> Wanted {
        Wanted {
            number: self.first_number + number,
        }
    }

    fn by_sql(&self, number: i32) -> String {
        format!(
            "select core.emit('{}', 'work.wanted', '{{\"number\": {}}}')",
            self.namespace,
            self.first_number + number
        )
    }

    async fn emit_in_every_way(&self, client: &Client) {
        client.emit(&self.wanted(1)).await.unwrap();
        client
            .emit_all(&[self.wanted(2), self.wanted(3)])
            .await
            .unwrap();
        let mut ids = Vec::new();
        for _ in 0..2 {
            let four = self.wanted(4);
            ids.push(client.emit(&four).idempotency_key("four").await.unwrap());
        }
        assert_eq!(ids[0], ids[1]);
        let mut tx = client.begin().await.unwrap();
        tx.emit(&self.wanted(5)).unwrap();
        tx.commit().await.unwrap();
        let mut tx = self.pool.begin().await.unwrap();
        client.emit_in(&mut tx, &self.wanted(6)).await.unwrap();
        tx.commit().await.unwrap();
        let (never, soon) = (self.wanted(7), self.wanted(8));
        let never = client.emit(&never).after(Duration::from_hours(1));
        assert!(client.cancel(never.await.unwrap()).await.unwrap());
        let soon = client.emit(&soon).after(Duration::from_millis(20));
        soon.await.unwrap();
        execute(&self.pool, &self.by_sql(9)).await;
        // As a foreign program does.
        execute(
            &self.pool,
            &format!(
                "select pgmq.send('core_events_{}',
                     '{{\"eventType\": \"work.wanted\", \"payload\": {{\"number\": {}}}}}')",
                self.namespace,
                self.first_number + 10
            ),
        )
        .await;
        let expected: Vec<i32> = [1, 2, 3, 4, 5, 6, 8, 9, 10]
            .map(|number| self.first_number + number)
            .into();
        until("all is done and counted", || async {
            (effects(&self.pool, "count").await == expected).then_some(())
        })
        .await;
        assert_eq!(effects(&self.pool, "work").await, expected);
    }

    /// A task that is made at run time.
    async fn schedule(&self, client: &Client) {
        client
            .schedule("hourly", "0 * * * *", &self.wanted(11))
            .await
            .unwrap();
        client.pause_schedule("hourly").await.unwrap();
        client.resume_schedule("hourly").await.unwrap();
        client.run_schedule_now("hourly").await.unwrap();
        assert_eq!(client.schedules().await.unwrap().len(), 2);
        let runs = client.schedule_history("hourly", 10).await.unwrap();
        assert_eq!(runs.len(), 1);
        assert!(client.unschedule("hourly").await.unwrap());
    }

    /// A dead letter, which is redriven once its handler is mended.
    async fn redrive(&self, client: &Client) {
        let thirteen = format!(
            "select core.emit('{}', 'work.done', '{{\"number\": 13}}')",
            self.namespace
        );
        execute(&self.pool, &thirteen).await;
        let letter = until("there is a dead letter", || async {
            let letters = client.dead_letters("plant", 10).await.unwrap();
            letters.first().map(|letter| letter.id)
        })
        .await;
        self.gate.is_mended.store(true, Ordering::Release);
        assert_eq!(
            client.redrive("plant", &[letter]).await.unwrap().messages,
            1
        );
        until("it is handled", || async {
            let letters = client.dead_letters("plant", 10).await.unwrap();
            letters.is_empty().then_some(())
        })
        .await;
        let subscriptions = client.subscriptions().await.unwrap();
        assert!(
            subscriptions
                .iter()
                .all(|subscription| subscription.is_live)
        );
    }

    /// The next build has a handler of another name, and registers while a transaction is open.
    async fn rename(&self, first: nexus::Handle) {
        let told = until("the figures of the namespace are collected", || async {
            let text = first.metrics();
            text.contains("nexus_nodes{").then_some(text)
        })
        .await;
        let namespace = &self.namespace;
        let own = format!("nexus_nodes{{namespace=\"{namespace}\",state=\"live\"}} 1\n");
        assert!(told.contains(&own), "{told}");
        let mut open = self.pool.begin().await.unwrap();
        execute(&mut *open, &self.by_sql(20)).await;
        within("it stops", first.shutdown()).await;
        execute(&self.pool, &self.by_sql(21)).await;
        let second = self.start(SECOND).await;
        open.commit().await.unwrap();
        let accepted = vec![self.first_number + 20, self.first_number + 21];
        until("the renamed handler gets all", || async {
            (effects(&self.pool, "accept").await == accepted).then_some(())
        })
        .await;
        let renames = "select count(*) from core.renames where former = 'refuse'";
        assert_eq!(scalar::<i64>(&self.pool, renames).await, 1);
        execute(
            &self.pool,
            &format!(
                "insert into core.idempotency_keys values ('{0}', 'old', 1, '', core.now() - interval '1 hour');
                 select core.maintain('{0}')",
                self.namespace
            ),
        )
        .await;
        let keys = texts(&self.pool, "select key from core.idempotency_keys").await;
        assert_eq!(keys, ["four"]);
        within("it stops", second.shutdown()).await;
        let nodes: i64 = scalar(&self.pool, "select count(*) from core.nodes").await;
        assert_eq!(nodes, 0, "the node has deregistered");
    }
}

#[tokio::test]
async fn bound_roles_run_whole_apps_beside_each_other() {
    let test = Test::new().await;
    let mut apps = tokio::task::JoinSet::new();
    for (namespace, first) in [("a", 100), ("b", 200)] {
        let role = test.tenant(namespace, "app").await;
        test.own_schema(&role).await;
        apps.spawn(Life::live(test.url_of(&role), namespace, first));
    }
    while let Some(app) = apps.join_next().await {
        app.unwrap();
    }
    test.end().await;
}

#[tokio::test]
async fn a_role_for_all_namespaces_runs_apps_and_makes_namespaces() {
    let test = Test::new().await;
    for suffix in ["admin", "app", "read"] {
        test.name_role(suffix);
    }
    execute(
        &test.pool,
        &format!("select core.create_roles('{}')", test.name),
    )
    .await;
    let login = test.role("login").await;
    execute(&test.pool, &format!("grant {}_app to {login}", test.name)).await;
    test.own_schema(&login).await;
    Life::live(test.url_of(&login), "fresh", 100).await;
    let mut session = test.connect_as(&login).await;
    for statement in [
        "drop table core.nodes",
        "delete from core.nodes",
        "select pgmq.drop_queue('core_events_fresh')",
        "alter table core.nodes add column x int",
        "select core.grant_namespace('fresh', 'nexus_none')",
    ] {
        refused(&mut session, statement).await;
    }
    drop(session);

    // Who may only read sees the same, and a client of it can look at everything.
    let reader = test.role("reader").await;
    execute(&test.pool, &format!("grant {}_read to {reader}", test.name)).await;
    let database = Database::from_url(&test.url_of(&reader), "the test").unwrap();
    let client = Client::connect(&database, "fresh").await.unwrap();
    assert_eq!(client.dead_letters("plant", 10).await.unwrap().len(), 0);
    assert!(!client.subscriptions().await.unwrap().is_empty());
    assert_eq!(client.schedules().await.unwrap().len(), 1);
    client.emit(&Wanted { number: 1 }).await.unwrap_err();
    client.pool().close().await;
    let mut session = test.connect_as(&reader).await;
    let events: i64 = scalar(&mut session, "select count(*) from core.event_log").await;
    assert!(events > 10);
    for statement in [
        "select core.emit('fresh', 'work.wanted', '{}')",
        "select core.ensure_group('fresh', 'new')",
        "select core.ensure_partitions()",
        "update core.nodes set display_name = 'x'",
        "delete from pgmq.q_core_events_fresh",
    ] {
        refused(&mut session, statement).await;
    }
    drop(session);
    test.end().await;
}

#[tokio::test]
async fn an_app_of_another_namespace_is_told_who_has_to_do_what() {
    let test = Test::new().await;
    let role = test.tenant("a", "app").await;
    let gate = Gate::default();
    let error = nexus::start(app(&test.url_of(&role), "b", FIRST, &gate))
        .await
        .unwrap_err();
    let StartError::Denied { namespace, source } = error else {
        panic!("{error}")
    };
    assert_eq!(namespace, "b");
    let expected = format!("select core.grant_namespace('b', '{role}')");
    assert!(source.to_string().contains(&expected), "{source}");
    let database = Database::from_url(&test.url_of(&role), "the test").unwrap();
    let error = Client::connect(&database, "b").await.unwrap_err();
    assert!(matches!(error, ConnectError::Namespace { .. }), "{error}");
    assert!(error.to_string().contains(&expected), "{error}");

    // A node id that another namespace uses, which the role may not see.
    execute(
        &test.pool,
        "select core.ensure_group('b', 'default');
         insert into core.nodes (node_id, namespace) values ('till-1', 'b')",
    )
    .await;
    let taken = app(&test.url_of(&role), "a", FIRST, &gate).node_id("till-1");
    let error = nexus::start(taken).await.unwrap_err();
    assert!(matches!(error, StartError::NodeIdTaken { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "node id `till-1` is used by a node in another namespace: choose another CORE_NODE_ID"
    );
    test.end().await;
}

/// NOTIFY knows no privileges. A false ring costs a look, and nothing else.
#[tokio::test]
async fn false_rings_disturb_nobody() {
    let test = Test::new().await;
    let a = test.tenant("a", "app").await;
    let b = test.tenant("b", "app").await;
    test.own_schema(&a).await;
    let url = test.url_of(&a);
    let pool = PgPool::connect(&url).await.unwrap();
    execute(&pool, "create table effects (what text, number int)").await;
    let gate = Gate::default();
    let running = nexus::start(app(&url, "a", FIRST, &gate)).await.unwrap();
    let mut attacker = test.connect_as(&b).await;
    for number in 1..=20 {
        execute(
            &mut attacker,
            "select pg_notify('nexus_a', q), pg_notify('nexus_a', q || n), pg_notify('nexus_a', repeat('x', 7000))
             from unnest('{core_events_a__plant,core_events_a__counting,core_events_a,delayed}'::text[]) q,
                  generate_series(1, 20) n",
        )
        .await;
        running.client().emit(&Wanted { number }).await.unwrap();
    }
    until("all is counted", || async {
        (effects(&pool, "count").await.len() == 20).then_some(())
    })
    .await;
    within("nothing is left", running.idle()).await.unwrap();
    assert_eq!(effects(&pool, "work").await, (1..=20).collect::<Vec<_>>());
    let stats = running.shutdown().await;
    assert!(stats.iter().all(|handler| handler.lost == 0), "{stats:?}");
    drop(attacker);
    pool.close().await;
    test.end().await;
}

/// Old partitions are dropped by the owner. A node of another role leaves them to it, without a word.
#[tokio::test]
async fn partitions_are_made_by_bound_roles_and_dropped_by_the_owner() {
    let test = Test::new().await;
    let role = test.tenant("a", "app").await;
    let partitions = "select inhrelid::regclass::text from pg_inherits
                      where inhparent = 'core.event_log'::regclass order by 1";
    let before = texts(&test.pool, partitions).await;
    test.database.advance(Duration::from_hours(24 * 250)).await;
    let gate = Gate::default();
    let only = |url: &str| app(url, "a", &["count"], &gate);
    let bound = nexus::start(only(&test.url_of(&role))).await.unwrap();
    until("the months ahead are there", || async {
        (texts(&test.pool, partitions).await.len() > before.len()).then_some(())
    })
    .await;
    // Its events go there.
    let mut session = test.connect_as(&role).await;
    execute(&mut session, "select core.emit('a', 'x', '{}')").await;
    drop(session);
    within("it stops", bound.shutdown()).await;
    let after = texts(&test.pool, partitions).await;
    assert!(before.iter().all(|name| after.contains(name)), "{after:?}");
    let owners = nexus::start(only(test.database.url())).await.unwrap();
    until("the expired months are gone", || async {
        let left = texts(&test.pool, partitions).await;
        (!left.contains(&before[0])).then_some(())
    })
    .await;
    within("it stops", owners.shutdown()).await;

    // Without a node of the owner's.
    test.database.advance(Duration::from_hours(24 * 60)).await;
    let retention = Duration::from_hours(24 * 183);
    let theirs = Database::from_url(&test.url_of(&role), "the test").unwrap();
    let error = theirs.drop_expired_log(retention).await.unwrap_err();
    assert!(
        error.to_string().contains("which owns schema `core`"),
        "{error}"
    );
    let mine = Database::from_url(test.database.url(), "the test").unwrap();
    let dropped = mine.drop_expired_log(retention).await.unwrap();
    assert!(!dropped.is_empty());
    let log = super::secrets::logged();
    assert!(!log.contains("must be owner"), "{log}");
    test.end().await;
}

#[tokio::test]
async fn whoever_may_only_read_sees_all_of_its_namespace_and_nothing_of_another() {
    let test = Test::new().await;
    let owner = Database::from_url(test.database.url(), "the test").unwrap();
    let shop = Client::connect(&owner, "shop").await.unwrap();
    let mall = Client::connect(&owner, "mall").await.unwrap();
    let event_id = shop.emit(&Wanted { number: 1 }).await.unwrap();
    let other = mall.emit(&Wanted { number: 2 }).await.unwrap();

    let reader = test.tenant("shop", "read").await;
    let database = Database::from_url(&test.url_of(&reader), "the test").unwrap();
    let client = Client::attach(&database, "shop").await.unwrap();
    let mut tail = client.events().tail().await.unwrap();
    let later = shop.emit(&Wanted { number: 3 }).await.unwrap();
    let told = tail.next(10).await.unwrap();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].event_id, later);
    assert!(client.event(event_id).await.unwrap().is_some());
    assert!(client.event(other).await.unwrap().is_none());
    assert_eq!(client.events().list(10).await.unwrap().len(), 2);
    assert!(
        client
            .deliveries(&[event_id, other])
            .await
            .unwrap()
            .is_empty()
    );
    let groups = client.groups().await.unwrap();
    let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
    assert_eq!(names, ["default"]);
    assert!(client.nodes().await.unwrap().is_empty());
    assert!(client.event_types().await.unwrap().is_empty());
    assert!(client.schedules().await.unwrap().is_empty());
    assert!(client.replays(10).await.unwrap().is_empty());
    assert!(client.dead_letters("default", 10).await.unwrap().is_empty());
    client.xmin_holder().await.unwrap();
    let metrics = client.namespace_metrics().await.unwrap();
    assert_eq!((metrics.groups.len(), metrics.partitions_ahead), (1, 12));
    let counted = client
        .sql(
            "select count(*) from core.event_log",
            SqlAccess::ReadOnly,
            1,
        )
        .await
        .unwrap();
    assert_eq!(counted[0].rows[0][0], 2);

    client.emit(&Wanted { number: 4 }).await.unwrap_err();
    client.reap_nodes().await.unwrap_err();
    let refused = client
        .sql("delete from core.nodes", SqlAccess::Write, 1)
        .await;
    assert!(
        matches!(refused, Err(SqlError::Refused { .. })),
        "{refused:?}"
    );
    let refused = Client::attach(&database, "mall").await.unwrap_err();
    let ConnectError::UnknownNamespace { known, .. } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(known, ["shop"]);
    test.end().await;
}
