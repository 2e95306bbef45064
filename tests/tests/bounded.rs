//! What waits, what is large, what never ends and what floods a queue takes no more memory of a process
//! than a bounded part, and holds up nobody else. `NEXUS_TESTS_LONG` makes the numbers ten times as large,
//! but for the payloads (`.ci/long`).

#![cfg(target_os = "linux")]

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
};

use nexus::{Client, Database, prelude::*, testing::TestDatabase};
use nexus_tests::until;
use sqlx::PgPool;

/// As the holder declares it.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "holder.small")]
struct Small {
    number: i64,
}

/// As the holder declares it.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "holder.large")]
struct Large {
    number: i64,
    text: String,
}

/// As the holder declares it.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "holder.endless")]
struct Endless {
    blocks: bool,
}

const QUEUE: &str = "pgmq.q_core_events_demo__holder";

/// How many times as much in the long run.
fn scale() -> i64 {
    if std::env::var_os("NEXUS_TESTS_LONG").is_some() {
        10
    } else {
        1
    }
}

/// The process whose memory is measured.
struct Holder {
    process: Child,
    said: BufReader<ChildStdout>,
}

impl Holder {
    fn start(database: &TestDatabase) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_holder"))
            .env("CORE_DATABASE_URL", database.url())
            .env_remove("CORE_NODE_ID")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = BufReader::new(process.stdout.take().expect("its output is piped"));
        let mut holder = Self { process, said };
        assert_eq!(holder.line(), "started");
        holder
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Ends it, and returns the most memory that it has had, in MiB.
    fn peak(mut self) -> u64 {
        drop(self.process.stdin.take());
        let peak: u64 = self.line().parse().unwrap();
        assert!(self.process.wait().unwrap().success());
        peak / 1024
    }
}

/// The tables, and the subscriptions of the holder.
async fn prepare(database: &TestDatabase) -> PgPool {
    let pool = database.pool().await;
    sqlx::query("create table handled (kind text, number bigint)")
        .execute(&pool)
        .await
        .unwrap();
    let registered = Holder::start(database);
    registered.peak();
    pool
}

async fn client(database: &TestDatabase) -> Client {
    let database = Database::from_url(database.url(), "the test").unwrap();
    Client::connect(&database, "demo").await.unwrap()
}

async fn handled(pool: &PgPool, kind: &str) -> i64 {
    sqlx::query_scalar("select count(*) from handled where kind = $1")
        .bind(kind)
        .fetch_one(pool)
        .await
        .unwrap()
}

/// Waits for as long as there is progress.
async fn until_handled(pool: &PgPool, kind: &str, wanted: i64) {
    let mut so_far = handled(pool, kind).await;
    while so_far < wanted {
        so_far = until("more messages are handled", || async {
            let now = handled(pool, kind).await;
            (now > so_far).then_some(now)
        })
        .await;
    }
}

async fn count(pool: &PgPool, rows: &str) -> i64 {
    sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select count(*) {rows}")))
        .fetch_one(pool)
        .await
        .unwrap()
}

/// Puts messages into the queue as an emit of each would.
async fn fill(pool: &PgPool, count: i64) {
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "insert into {QUEUE} (vt, message, headers)
         select core.now(),
                core.envelope('demo', 'holder.small', jsonb_build_object('number', n), core.now(), 'test', 1,
                              null, n::text, null),
                core.headers(n, 1, s.subscription_id, s.handler, '{{}}')
         from generate_series(1, $1) n, core.subscriptions s where s.handler = 'take_small'"
    )))
    .bind(count)
    .execute(pool)
    .await
    .unwrap();
}

#[tokio::test]
async fn memory_does_not_grow_with_what_waits() {
    let mut peaks = Vec::new();
    for waiting in [3_000, 100_000 * scale()] {
        let database = TestDatabase::new().await;
        let pool = prepare(&database).await;
        fill(&pool, waiting).await;
        let holder = Holder::start(&database);
        until_handled(&pool, "small", 3_000).await;
        peaks.push(holder.peak());
    }
    println!("with 3,000 and many messages waiting: {peaks:?} MiB");
    assert!(peaks[1] < peaks[0] + 16, "{peaks:?} MiB");
}

#[tokio::test]
async fn memory_does_not_grow_with_the_largest_payloads() {
    let database = TestDatabase::new().await;
    let pool = prepare(&database).await;
    let client = client(&database).await;
    // Each twice: to a handler of one, and to one of batches of a hundred. Half of them are stored in a
    // fraction of their size.
    let count = 200;
    let texts = ["x".repeat(1_000_000), random_text(1_000_000)];
    for (number, text) in (0..count).zip(texts.iter().cycle()) {
        let text = text.clone();
        client.emit(&Large { number, text }).await.unwrap();
    }
    let holder = Holder::start(&database);
    until_handled(&pool, "large", count).await;
    until_handled(&pool, "many", count).await;
    let peak = holder.peak();
    println!("with {} payloads of a megabyte: {peak} MiB", 2 * count);
    // Two handlers with up to 72 MiB of payloads each, what of them is decoded, and what a claim needs.
    assert!(peak < 300, "{peak} MiB");
}

fn random_text(length: usize) -> String {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b'a' + u8::try_from(state % 26).expect("it is less than 26"))
    };
    std::iter::repeat_with(next).take(length).collect()
}

#[tokio::test]
async fn handlers_that_never_return_hold_up_nobody() {
    let database = TestDatabase::new().await;
    let pool = prepare(&database).await;
    let client = client(&database).await;
    // Two of these run, one of them without ever giving its thread back; the others wait.
    let endless: Vec<Endless> = (0..20).map(|n| Endless { blocks: n == 0 }).collect();
    client.emit_all(&endless).await.unwrap();
    let holder = Holder::start(&database);
    let running =
        format!("from {QUEUE} where headers ->> 'handler' = 'never_return' and read_ct > 0");
    until("they run", || async {
        (count(&pool, &running).await >= 2).then_some(())
    })
    .await;
    let many = 2_000 * scale();
    let small: Vec<Small> = (0..many).map(|number| Small { number }).collect();
    client.emit_all(&small).await.unwrap();
    until_handled(&pool, "small", many).await;
    // A message that may kill its process would run alone, which it cannot for an hour.
    let mut transaction = pool.begin().await.unwrap();
    client
        .emit_in(&mut transaction, &Small { number: many })
        .await
        .unwrap();
    let suspected = sqlx::query(sqlx::AssertSqlSafe(format!(
        "update {QUEUE} set headers = headers || '{{\"abandoned\": 2}}' where headers ->> 'handler' = 'take_small'"
    )));
    let suspected = suspected.execute(&mut *transaction).await.unwrap();
    assert_eq!(suspected.rows_affected(), 1);
    transaction.commit().await.unwrap();
    until_handled(&pool, "small", many + 1).await;
    client.emit_all(&small[..100]).await.unwrap();
    let many = many + 101;
    until_handled(&pool, "small", many).await;
    // Both are still held, by their first claim.
    let held = format!(
        "from {QUEUE} where headers ->> 'handler' = 'never_return' and read_ct = 1
             and vt > core.now() and not headers ? 'abandoned'"
    );
    let held = count(&pool, &held).await;
    assert!(held >= 2, "{held}");
    assert_eq!(handled(&pool, "small").await, many);
    let peak = holder.peak();
    println!("beside handlers that never return: {peak} MiB");
    assert!(peak < 150, "{peak} MiB");
}

#[tokio::test]
async fn a_flood_of_foreign_messages_holds_up_nobody() {
    let database = TestDatabase::new().await;
    let pool = prepare(&database).await;
    let client = client(&database).await;
    let flood = 10_000 * scale();
    // Every tenth is no envelope.
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "insert into {QUEUE} (vt, message)
         select core.now(), case when n % 10 = 0 then '\"hello\"'
             else jsonb_build_object('eventType', 'foreign.sent', 'payload', jsonb_build_object('n', n)) end
         from generate_series(1, $1) n"
    )))
    .bind(flood)
    .execute(&pool)
    .await
    .unwrap();
    let holder = Holder::start(&database);
    let small: Vec<Small> = (0..200).map(|number| Small { number }).collect();
    client.emit_all(&small).await.unwrap();
    until_handled(&pool, "small", 200).await;
    let foreign = format!("from {QUEUE} where headers is null");
    let mut left = count(&pool, &foreign).await;
    assert!(left > 0, "the flood was over before the others ran");
    while left > 0 {
        let before = left;
        left = until("the flood gets less", || async {
            let left = count(&pool, &foreign).await;
            (left < before).then_some(left)
        })
        .await;
    }
    let logged = count(
        &pool,
        "from core.event_log where event_type = 'foreign.sent'",
    )
    .await;
    let letters = count(&pool, &format!("from {QUEUE}_dlq")).await;
    assert_eq!((logged, letters), (flood / 10 * 9, flood / 10));
    let peak = holder.peak();
    println!("with a flood of {flood} foreign messages: {peak} MiB");
    assert!(peak < 150, "{peak} MiB");
}
