//! Behind a `PgBouncer` in transaction mode, which `.ci/pgbouncer` starts: a connection is one to the server for
//! a transaction only, and few sessions serve many connections.

use std::time::Duration;

use nexus::{
    Client, Database, Pooler, StartError, client::ConnectError, prelude::*, testing::TestDatabase,
};
use nexus_tests::{until, within};
use sqlx::{
    Connection as _, Executor as _, PgConnection, PgPool, Row as _, postgres::PgConnectOptions,
};
use tokio::sync::mpsc;

/// An order to a handler to behave in some way.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "bounced.order", key = number)]
struct Order {
    number: i64,
    say: String,
}

/// What follows from an order.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "bounced.follow_up")]
struct FollowUp {
    number: i64,
}

fn order(number: i64, say: &str) -> Order {
    Order {
        number,
        say: say.to_owned(),
    }
}

fn orders(count: i64) -> Vec<Order> {
    (0..count).map(|number| order(number, "")).collect()
}

type Saw = mpsc::UnboundedSender<(&'static str, i64)>;

#[handler(backoff = "fixed(10ms)", max_attempts = 1000, concurrency = 8)]
async fn books(order: Order, tx: &mut Tx) -> nexus::Result<Emit<FollowUp>> {
    sqlx::query("insert into effects (number) values ($1)")
        .bind(order.number)
        .execute(&mut **tx)
        .await?;
    let booked: i64 = sqlx::query_scalar("select count(*) from effects where number = $1")
        .bind(order.number)
        .fetch_one(&mut **tx)
        .await?;
    if booked != 1 {
        return Err(format!("order {} is booked {booked} times", order.number).into());
    }
    Ok(Emit(FollowUp {
        number: order.number,
    }))
}

#[handler]
async fn follows_up(follow_up: FollowUp, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into follow_ups (number) values ($1)")
        .bind(follow_up.number)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler]
async fn books_many(batch: Batch<Order>, tx: &mut Tx) -> nexus::Result {
    let numbers: Vec<i64> = batch.iter().map(|order| order.number).collect();
    sqlx::query("insert into batches (number) select * from unnest($1::bigint[])")
        .bind(numbers)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler(backoff = "fixed(10ms)", max_attempts = 2)]
async fn fails_as_told(order: Envelope<Order>, saw: State<Saw>) -> nexus::Result<Emit<FollowUp>> {
    let _ = saw.send(("fails_as_told", order.number));
    match order.say.as_str() {
        "always" => Err("as it was told".into()),
        "once" if order.attempt() == 1 => Err("as it was told".into()),
        _ => Ok(Emit(FollowUp {
            number: order.number,
        })),
    }
}

#[cron("* * * * * *")]
async fn ticks(tick: Tick, saw: State<Saw>) {
    let _ = saw.send(("ticks", tick.due_at().as_second()));
}

struct Test {
    /// The same database, through the pooler.
    url: String,
    pool: PgPool,
    sender: Saw,
    saw: mpsc::UnboundedReceiver<(&'static str, i64)>,
    _database: TestDatabase,
}

/// The URL of a database, through the pooler.
fn through_the_pooler(direct: &str) -> String {
    let door = std::env::var("NEXUS_PGBOUNCER").expect("`.ci/pgbouncer` runs these tests");
    let (account, rest) = direct.split_once('@').expect("the URL names a user");
    let (_, name) = rest.split_once('/').expect("the URL names a database");
    format!("{account}@{door}/{name}")
}

impl Test {
    async fn new() -> Self {
        let database = TestDatabase::new().await;
        let pool = database.pool().await;
        for table in ["effects", "follow_ups", "batches"] {
            let statement = format!("create table {table} (number bigint)");
            sqlx::query(sqlx::AssertSqlSafe(statement))
                .execute(&pool)
                .await
                .unwrap();
        }
        let (sender, saw) = mpsc::unbounded_channel();
        Self {
            url: through_the_pooler(database.url()),
            pool,
            sender,
            saw,
            _database: database,
        }
    }

    fn app<'a>(&self, handlers: impl IntoIterator<Item = &'a str>) -> App {
        App::discover()
            .only(handlers)
            .database_url(&self.url)
            .pooler(Pooler::Transaction)
            .idle_poll(Duration::from_millis(25))
            .state(self.sender.clone())
    }

    async fn numbers(&self, table: &str) -> Vec<i64> {
        let text = format!("select number from {table} order by 1");
        sqlx::query_scalar(sqlx::AssertSqlSafe(text))
            .fetch_all(&self.pool)
            .await
            .unwrap()
    }
}

async fn stop(app: nexus::Handle) {
    within("the node stops", app.shutdown()).await;
}

#[tokio::test]
async fn effects_follow_ups_and_completions_happen_once() {
    let test = Test::new().await;
    let one = nexus::start(test.app(["books", "follows_up"]))
        .await
        .unwrap();
    let two = nexus::start(test.app(["books", "follows_up"]))
        .await
        .unwrap();
    let database = Database::from_url(&test.url, "the test").unwrap();
    let database = database.pooler(Pooler::Transaction);
    let client = Client::connect(&database, "demo").await.unwrap();
    let all = orders(120);
    client.emit_all(&all[..40]).await.unwrap();
    for order in &all[40..80] {
        client.emit(order).await.unwrap();
    }
    for order in &all[80..100] {
        let mut tx = client.begin().await.unwrap();
        sqlx::query("select $1::bigint")
            .bind(order.number)
            .execute(&mut *tx)
            .await
            .unwrap();
        tx.emit(order).unwrap();
        tx.commit().await.unwrap();
    }
    for order in &all[100..] {
        let key = order.number.to_string();
        let first = client.emit(order).idempotency_key(&key).await.unwrap();
        let second = client.emit(order).idempotency_key(&key).await.unwrap();
        assert_eq!(first, second);
    }
    until("all is settled", || async {
        (test.numbers("follow_ups").await.len() >= 120).then_some(())
    })
    .await;
    within("all is settled", one.idle()).await.unwrap();
    let expected: Vec<i64> = (0..120).collect();
    assert_eq!(test.numbers("effects").await, expected);
    assert_eq!(test.numbers("follow_ups").await, expected);
    for stats in one.stats().into_iter().chain(two.stats()) {
        assert_eq!((stats.retried, stats.lost), (0, 0), "{stats:?}");
    }
    stop(one).await;
    stop(two).await;
}

#[tokio::test]
async fn batches_and_delayed_events_are_handled() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["books_many"])).await.unwrap();
    let client = app.client();
    client.emit_all(&orders(150)).await.unwrap();
    let later = client
        .emit(&order(150, ""))
        .after(Duration::from_millis(300))
        .await
        .unwrap();
    let never = client
        .emit(&order(151, ""))
        .after(Duration::from_hours(1))
        .await
        .unwrap();
    assert!(later != never && client.cancel(never).await.unwrap());
    until("all is booked", || async {
        (test.numbers("batches").await.len() >= 151).then_some(())
    })
    .await;
    within("all is settled", app.idle()).await.unwrap();
    assert_eq!(
        test.numbers("batches").await,
        (0..151).collect::<Vec<i64>>()
    );
    assert!(client.delayed(10).await.unwrap().is_empty());
    stop(app).await;
}

#[tokio::test]
async fn failures_are_retried_dead_lettered_and_redriven() {
    let mut test = Test::new().await;
    let app = nexus::start(test.app(["fails_as_told"])).await.unwrap();
    let client = app.client();
    client
        .emit_all(&[order(1, "once"), order(2, "always"), order(3, "")])
        .await
        .unwrap();
    within("all is settled", app.idle()).await.unwrap();
    let letters = client.dead_letters("default", 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].attempts), (1, 2));
    let stats = app.stats();
    assert_eq!(
        (stats[0].completed, stats[0].dead_lettered),
        (2, 1),
        "{stats:?}"
    );
    let redriven = client.redrive("default", &[letters[0].id]).await.unwrap();
    assert_eq!(redriven.messages, 1);
    let mut calls = 0;
    while calls < 6 {
        within("a handler is called", test.saw.recv())
            .await
            .unwrap();
        calls += 1;
    }
    let subscriptions = client.subscriptions().await.unwrap();
    assert!(subscriptions.iter().all(|row| row.is_live));
    stop(app).await;
}

#[tokio::test]
async fn scheduled_tasks_tick_once() {
    let mut test = Test::new().await;
    let one = nexus::start(test.app(["ticks"])).await.unwrap();
    let two = nexus::start(test.app(["ticks"])).await.unwrap();
    let mut due = Vec::new();
    while due.len() < 4 {
        due.push(within("it ticks", test.saw.recv()).await.unwrap().1);
    }
    due.sort_unstable();
    let expected: Vec<i64> = (due[0]..).take(due.len()).collect();
    assert_eq!(due, expected);
    let tasks = one.client().schedules().await.unwrap();
    assert_eq!(tasks.len(), 1);
    one.client().pause_schedule("ticks").await.unwrap();
    one.client().run_schedule_now("ticks").await.unwrap();
    one.client().resume_schedule("ticks").await.unwrap();
    stop(one).await;
    stop(two).await;
}

#[tokio::test]
async fn sessions_that_end_at_random_lose_and_double_nothing() {
    let test = Test::new().await;
    let app = test
        .app(["books", "follows_up"])
        .lease(Duration::from_secs(2));
    let app = nexus::start(app).await.unwrap();
    app.client().emit_all(&orders(300)).await.unwrap();
    let mut ended = 0_i64;
    while ended < 30 {
        let gone: i64 = sqlx::query_scalar(
            "select count(pg_terminate_backend(pid)) from (
                 select pid from pg_stat_activity
                 where datname = current_database() and application_name = 'nexus'
                 order by random() limit 1) a",
        )
        .fetch_one(&test.pool)
        .await
        .unwrap();
        ended += gone;
        tokio::task::yield_now().await;
    }
    until("all is settled", || async { app.idle().await.ok() }).await;
    let expected: Vec<i64> = (0..300).collect();
    assert_eq!(test.numbers("effects").await, expected);
    assert_eq!(test.numbers("follow_ups").await, expected);
    stop(app).await;
}

#[tokio::test]
async fn nothing_is_left_behind_in_the_sessions() {
    let test = Test::new().await;
    let app = nexus::start(test.app(["books", "follows_up"]))
        .await
        .unwrap();
    app.client().emit_all(&orders(50)).await.unwrap();
    within("all is settled", app.idle()).await.unwrap();
    stop(app).await;
    // Through the pooler: its sessions, one after the other.
    let options: sqlx::postgres::PgConnectOptions = test.url.parse().unwrap();
    let options = options.extra_float_digits(None);
    let pool = sqlx::postgres::PgPoolOptions::new()
        .max_connections(4)
        .connect_with(options)
        .await
        .unwrap();
    let mut sessions = Vec::new();
    for _ in 0..4 {
        let mut connection = pool.acquire().await.unwrap();
        sqlx::raw_sql("begin")
            .execute(&mut *connection)
            .await
            .unwrap();
        let row = sqlx::Executor::fetch_one(
            &mut *connection,
            sqlx::raw_sql(
                "select (select count(*) from pg_prepared_statements)
                        + (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
                        current_setting('enable_seqscan') || current_setting('statement_timeout')",
            ),
        )
        .await
        .unwrap();
        let left: i64 = sqlx::Row::get(&row, 0);
        let settings: String = sqlx::Row::get(&row, 1);
        assert_eq!((left, settings.as_str()), (0, "on0"));
        sessions.push(connection);
    }
}

#[tokio::test]
async fn a_pooler_that_was_not_told_of_is_refused() {
    let test = Test::new().await;
    let app = test.app(["books"]).pooler(Pooler::Session);
    let error = nexus::start(app).await.unwrap_err();
    assert!(
        matches!(&error, StartError::Connect(ConnectError::Pooled { .. })),
        "{error}"
    );
    assert!(
        error.to_string().contains("CORE_POOLER=transaction"),
        "{error}"
    );
}

#[tokio::test]
async fn a_schema_is_not_migrated_through_the_pooler() {
    let database = TestDatabase::empty().await;
    let url = through_the_pooler(database.url());
    let app = App::discover()
        .only(["books"])
        .database_url(&url)
        .pooler(Pooler::Transaction);
    let error = nexus::start(app).await.unwrap_err();
    assert!(
        matches!(
            &error,
            StartError::Connect(ConnectError::MigratesPooled { .. })
        ),
        "{error}"
    );
    let direct = Database::from_url(database.url(), "the test").unwrap();
    direct.migrate().await.unwrap();
    let (sender, _saw) = mpsc::unbounded_channel();
    let app = App::discover()
        .only(["books"])
        .database_url(&url)
        .pooler(Pooler::Transaction)
        .state::<Saw>(sender);
    stop(nexus::start(app).await.unwrap()).await;
}

#[tokio::test]
async fn the_pooler_is_diagnosed_unless_nexus_was_told_of_it() {
    let test = Test::new().await;
    let database = Database::from_url(&test.url, "the test").unwrap();
    let found = async |database: &Database| {
        let found = database.diagnose("demo").await.unwrap();
        found.iter().map(|finding| finding.id).collect::<Vec<_>>()
    };
    assert!(found(&database).await.contains(&"pooler-transaction"));
    // Every session of the pooler at once: nothing was set that others would meet.
    let options: PgConnectOptions = test.url.parse().unwrap();
    let options = options.extra_float_digits(None);
    let mut sessions = Vec::new();
    for _ in 0..6 {
        let mut session = PgConnection::connect_with(&options).await.unwrap();
        let asked =
            "begin; select current_setting('statement_timeout') || current_setting('lock_timeout')";
        let row = session.fetch_one(sqlx::raw_sql(asked)).await.unwrap();
        assert_eq!(row.get::<String, _>(0), "00");
        sessions.push(session);
    }
    drop(sessions);
    let told = database.pooler(Pooler::Transaction);
    Client::connect(&told, "demo").await.unwrap();
    // Twice, as what a check leaves behind in a session is met by the next one.
    for _ in 0..2 {
        let found = found(&told).await;
        assert!(!found.contains(&"pooler-transaction"), "{found:?}");
        assert!(!found.contains(&"not-checked"), "{found:?}");
    }
}
