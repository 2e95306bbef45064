//! How late scheduled tasks are fired and handled when many are due at the same moment.
//!
//! `cargo run --release -p nexus-benches --bin lateness -- --tasks 1000 --seconds 30`

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use clap::Parser;
use nexus::{Database, jiff::Timestamp, prelude::*};
use nexus_benches::{BenchServer, Spread, load, median};
use sqlx::PgPool;

/// Every task is due at every second, so that all of them are due at once.
#[derive(Debug, Parser)]
struct Arguments {
    /// Scheduled tasks, each due every second.
    #[arg(long, default_value_t = 1_000)]
    tasks: u32,
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 30)]
    seconds: u32,
    /// Nodes, all in this process.
    #[arg(long, default_value_t = 1)]
    nodes: u32,
    /// Runs, each in a database of its own; the median by p99 of firing is reported.
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// A task was due.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "task.due")]
struct TaskDue {
    task: u32,
}

/// When ticks were due, and how late their handler began, in milliseconds.
type Handled = Arc<Mutex<Vec<(Timestamp, f64)>>>;

#[handler(concurrency = 64)]
async fn on_due(due: Envelope<TaskDue>, handled: State<Handled>) {
    // The server's clock is this machine's.
    let now = Timestamp::now();
    if let Some(due_at) = due.meta().due_at() {
        let late = now.duration_since(due_at).as_secs_f64() * 1_000.0;
        let mut handled = handled.lock().unwrap_or_else(PoisonError::into_inner);
        handled.push((due_at, late));
    }
}

/// Left out of the figures: the first seconds, in which connections and plans are made.
const WARM_UP: i64 = 5;

#[derive(Debug, Clone, Copy, Serialize)]
struct Run {
    /// From the due time to the transaction that fires, by the clock of the database.
    fired: Spread,
    /// From the due time to the start of the handler.
    handled: Spread,
    /// Ticks that were fired in the time that was measured.
    ticks: i64,
    /// Ticks that should have been.
    expected: i64,
    /// The load of the machine at the end of the run.
    load: Option<f64>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let server = BenchServer::start()?;
    if !arguments.json {
        println!(
            "{} tasks due each second, {} s, {} nodes, {server}, load {:?}",
            arguments.tasks,
            arguments.seconds,
            arguments.nodes,
            load()
        );
    }
    let mut runs = Vec::new();
    for number in 1..=arguments.runs.max(1) {
        let run = measure(&arguments, &server).await?;
        if !arguments.json {
            println!(
                "run {number}: fired {}; handled {}; {} of {} ticks, load {:?}",
                run.fired, run.handled, run.ticks, run.expected, run.load
            );
        }
        runs.push(run);
    }
    let median = median(&runs, |run| run.fired.p99);
    if arguments.json {
        let figures = serde_json::json!({
            "bench": "lateness", "tasks": arguments.tasks, "seconds": arguments.seconds,
            "nodes": arguments.nodes, "unit": "ms", "median": median, "runs": runs,
        });
        println!("{figures:#}");
    } else {
        println!("median: fired {}; handled {}", median.fired, median.handled);
    }
    Ok(())
}

async fn measure(arguments: &Arguments, server: &BenchServer) -> anyhow::Result<Run> {
    let database = server.database("lateness").await?;
    let handled = Handled::default();
    let app = || {
        App::discover()
            .database_url(database.url())
            .state(Arc::clone(&handled))
    };
    let connected = Database::from_url(database.url(), "the benchmark")?;
    connected.migrate().await?;
    let client = Client::connect(&connected, "demo").await?;
    for task in 0..arguments.tasks {
        client
            .schedule(format!("task-{task}"), "* * * * * *", &TaskDue { task })
            .await?;
    }
    let mut nodes = Vec::new();
    for _ in 0..arguments.nodes.max(1) {
        nodes.push(nexus::start(app()).await?);
    }
    let from = Timestamp::now().as_second() + WARM_UP;
    let to = from + i64::from(arguments.seconds);
    let left = Duration::from_secs(u64::from(arguments.seconds) + WARM_UP.unsigned_abs() + 1);
    tokio::time::sleep(left).await;
    let load = load();
    for node in nodes {
        node.shutdown().await;
    }
    let (fired, ticks) = fired(client.pool(), from, to).await?;
    client.pool().close().await;
    database.remove().await?;
    let handled = handled.lock().unwrap_or_else(PoisonError::into_inner);
    let handled = handled
        .iter()
        .filter(|(due_at, _)| (from..to).contains(&due_at.as_second()))
        .map(|&(_, late)| late)
        .collect();
    Ok(Run {
        fired,
        handled: Spread::of(handled),
        ticks,
        expected: i64::from(arguments.tasks) * i64::from(arguments.seconds),
        load,
    })
}

/// How late the ticks of these seconds were fired, and how many there were.
async fn fired(pool: &PgPool, from: i64, to: i64) -> anyhow::Result<(Spread, i64)> {
    let late: Vec<f64> = sqlx::query_scalar(
        "select (extract(epoch from fired_at - due_at) * 1000)::float8 from core.ticks
         where due_at >= to_timestamp($1) and due_at < to_timestamp($2) and event_id is not null",
    )
    .bind(from)
    .bind(to)
    .fetch_all(pool)
    .await?;
    let ticks = i64::try_from(late.len())?;
    Ok((Spread::of(late), ticks))
}
