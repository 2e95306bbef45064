//! What it costs to collect the metrics of a namespace in which much waits, idle and while events flow.
//!
//! `cargo run --release -p nexus-benches --bin collecting`

use std::time::{Duration, Instant};

use clap::Parser;
use nexus::{Client, Database, prelude::*};
use nexus_benches::{BenchServer, Spread, load};
use sqlx::{PgPool, Row};

#[derive(Debug, Parser)]
struct Arguments {
    /// Messages that wait in one group, a quarter of them for a retry.
    #[arg(long, default_value_t = 1_000_000)]
    messages: i32,
    /// Dead letters of that group.
    #[arg(long, default_value_t = 1_000_000)]
    letters: i32,
    /// Groups; in each of the others a thousandth of that.
    #[arg(long, default_value_t = 100)]
    groups: i32,
    /// How often to collect, idle and then under load.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
}

/// Something to do while figures are collected.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "job.due")]
struct JobDue {
    number: i64,
    padding: String,
}

#[handler]
async fn work(_job: JobDue) {}

const NAMESPACE: &str = "bench";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let server = BenchServer::start()?;
    println!("{server}");
    let database = server.database("collecting").await?;
    let node = App::discover()
        .namespace(NAMESPACE)
        .database_url(database.url())
        .pool_size(10);
    let node = nexus::start(node).await?;
    // As a program of its own, so that the figures are of one asker.
    let client = Database::from_url(database.url(), "the server of the benchmark")?;
    let client = Client::connect(&client, NAMESPACE).await?;
    fill(client.pool(), &arguments).await?;

    report("idle", &client, &arguments).await?;
    let emitting = tokio::spawn(emit(node.client().clone()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = node.stats()[0].completed;
    let begun = Instant::now();
    report("while events flow", &client, &arguments).await?;
    let handled = node.stats()[0].completed - before;
    println!(
        "{handled} messages were handled within {:?}",
        begun.elapsed()
    );
    emitting.abort();
    println!("load of the machine: {:?}", load());
    node.shutdown().await;
    drop(client);
    database.remove().await
}

async fn emit(client: Client) {
    for number in 0.. {
        let padding = "x".repeat(200);
        let jobs: Vec<JobDue> = (0..20)
            .map(|_| JobDue {
                number,
                padding: padding.clone(),
            })
            .collect();
        if client.emit_all(&jobs).await.is_err() {
            return;
        }
    }
}

async fn fill(pool: &PgPool, arguments: &Arguments) -> anyhow::Result<()> {
    for group in 1..=arguments.groups {
        let queue: String = sqlx::query_scalar("select core.ensure_group($1, $2)")
            .bind(NAMESPACE)
            .bind(format!("group{group:03}"))
            .fetch_one(pool)
            .await?;
        let part = if group == 1 { 1 } else { 1_000 };
        // Five handlers, of which nobody runs any.
        let messages = format!(
            "insert into pgmq.q_{queue} (read_ct, vt, message, headers)
             select case when waits then 1 else 0 end,
                    core.now() + case when waits then interval '1 hour' else interval '-1 minute' end + n * interval '1 microsecond',
                    jsonb_build_object('eventType', 'page.sent', 'payload', repeat('x', 200)),
                    jsonb_build_object('eventId', n::text, 'handler', 'handler' || n % 5, 'eventVersion', '1', 'attempts', waits::int)
                    || case when waits then '{{\"settled\": true}}' else '{{}}' end::jsonb
             from (select n, n % 4 = 0 as waits from generate_series(1, $1) n) _"
        );
        sqlx::query(sqlx::AssertSqlSafe(messages))
            .bind(arguments.messages / part)
            .execute(pool)
            .await?;
        let letters = format!(
            "insert into pgmq.q_{queue}_dlq (vt, message, headers)
             select core.now(), jsonb_build_object('reason', 'Handler error', 'error', repeat('x', 200)),
                    jsonb_build_object('eventId', n::text, 'handler', 'handler' || n % 5, 'eventType', 'page.sent', 'fingerprint', 'a')
             from generate_series(1, $1) n"
        );
        sqlx::query(sqlx::AssertSqlSafe(letters))
            .bind(arguments.letters / part)
            .execute(pool)
            .await?;
    }
    // So that nobody gives up what waits for handlers that there are not.
    sqlx::query(
        "select core.subscribe($1, 'another', jsonb_agg(jsonb_build_object(
             'group', group_name, 'handler', 'handler' || n, 'eventType', 'page.sent', 'eventVersion', 1)))
         from core.groups, generate_series(0, 4) n where namespace = $1 and group_name like 'group%'",
    )
    .bind(NAMESPACE)
    .execute(pool)
    .await?;
    sqlx::query("vacuum analyze").execute(pool).await?;
    sqlx::query("checkpoint").execute(pool).await?;
    Ok(())
}

/// Collects, and says how long it took and what each statement did.
async fn report(when: &str, client: &Client, arguments: &Arguments) -> anyhow::Result<()> {
    // Once for what is not in memory yet.
    client.namespace_metrics().await?;
    sqlx::query("select pg_stat_statements_reset()")
        .execute(client.pool())
        .await?;
    let mut took = Vec::new();
    for _ in 0..arguments.rounds {
        took.push(client.namespace_metrics().await?.took.as_secs_f64() * 1_000.0);
    }
    println!("\n{when}: {}", Spread::of(took));
    // In one statement the groups differ by the names of their tables.
    let statements = sqlx::query(
        "select case when query like '%pair (handler, version)%' and query like '%q_core_events_bench\\_\\_group001 %'
                         then 'the large group'
                     when query like '%pair (handler, version)%' then 'another group'
                     when query like '%month (begins)%' then 'the namespace'
                     when query like '%pg_prepared_xacts%' then 'the oldest transaction'
                     when query like '%paused_at%core.groups%' then 'the groups' end as what,
                sum(calls)::bigint, (sum(total_exec_time) / sum(calls))::float8, min(min_exec_time)::float8, max(max_exec_time)::float8,
                ((sum(shared_blks_hit) + sum(shared_blks_read)) / sum(calls))::float8
         from pg_stat_statements
         where dbid = (select oid from pg_database where datname = current_database())
           and query not like '%pg_stat_statements%' and query not like 'insert%'
         group by what having count(*) > 0 order by 3 desc",
    )
    .fetch_all(client.pool())
    .await?;
    println!(
        "| Statement | calls | least ms | mean ms | most ms | pages |\n|---|---|---|---|---|---|"
    );
    for row in statements {
        if let Some(what) = row.get::<Option<String>, _>(0) {
            let calls: i64 = row.get(1);
            let (mean, least, most): (f64, f64, f64) = (row.get(2), row.get(3), row.get(4));
            let pages: f64 = row.get(5);
            println!("| {what} | {calls} | {least:.2} | {mean:.2} | {most:.2} | {pages:.0} |");
        }
    }
    Ok(())
}
