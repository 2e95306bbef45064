//! The app that is measured.

use std::{
    io::{Read as _, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use nexus::{Database, Handle, prelude::*};
use nexus_benches::BenchDatabase;
use sqlx::PgPool;

/// The queue of the one group, as a table.
pub(crate) const QUEUE: &str = "pgmq.q_core_events_bench__bench";

/// Connections of a node: one more than the most handlers that hold one at once.
const POOL: u32 = 33;

/// What is emitted.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "bench.job")]
pub(crate) struct Job {
    pub(crate) id: i64,
    /// When it was emitted, in nanoseconds since 1970.
    pub(crate) at: i64,
    pad: String,
}

impl Job {
    /// Of about so many bytes as JSON.
    pub(crate) fn new(id: i64, bytes: usize) -> Self {
        let pad = "x".repeat(bytes.saturating_sub(55));
        let at = now();
        Self { id, at, pad }
    }
}

/// Nanoseconds since 1970: the clock of the machine, which all processes share.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    })
}

/// From the emits to the starts of the handler, in milliseconds.
pub(crate) type Waits = Arc<Mutex<Vec<f64>>>;

#[handler]
async fn no_op(_job: Job) {}

#[handler]
async fn note_wait(job: Job, waits: State<Waits>) {
    waits
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(millis_since(&job));
}

/// How long ago the job was made.
#[expect(clippy::cast_precision_loss, reason = "no run takes long enough")]
pub(crate) fn millis_since(job: &Job) -> f64 {
    (now() - job.at) as f64 / 1e6
}

/// Longer than it is watched.
#[handler(concurrency = 1_000)]
async fn hold(_job: Job) {
    tokio::time::sleep(Duration::from_secs(20)).await;
}

async fn insert(job: &Job, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into effects (job_id, note) values ($1, 'done')")
        .bind(job.id)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler(concurrency = 8)]
async fn insert_8(job: Job, tx: &mut Tx) -> nexus::Result {
    insert(&job, tx).await
}

#[handler(concurrency = 32)]
async fn insert_32(job: Job, tx: &mut Tx) -> nexus::Result {
    insert(&job, tx).await
}

#[handler(concurrency = 8)]
async fn insert_all(jobs: Batch<Job>, tx: &mut Tx) -> nexus::Result {
    let ids: Vec<i64> = jobs.iter().map(|job| job.id).collect();
    sqlx::query("insert into effects (job_id, note) select unnest($1::bigint[]), 'done'")
        .bind(ids)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

pub(crate) fn app(url: &str, handler: &str, batch_size: usize) -> (App, Waits) {
    let waits = Waits::default();
    let app = App::discover()
        .name("bench")
        .namespace("bench")
        .database_url(url)
        .only([handler])
        .pool_size(POOL)
        .batch_size(batch_size)
        .state(Arc::clone(&waits));
    (app, waits)
}

/// Makes schema, subscription and table, and returns a pool for what the benchmark itself asks.
pub(crate) async fn prepare(database: &BenchDatabase, handler: &str) -> anyhow::Result<PgPool> {
    let node = nexus::start(app(database.url(), handler, 100).0).await?;
    node.shutdown().await;
    let pool = PgPool::connect(database.url()).await?;
    sqlx::raw_sql("create table effects (job_id bigint not null, note text not null)")
        .execute(&pool)
        .await?;
    Ok(pool)
}

pub(crate) async fn client(database: &BenchDatabase) -> anyhow::Result<Client> {
    let database = Database::from_url(database.url(), "the benchmark")?;
    Ok(Client::connect(&database, "bench").await?)
}

/// Emits `count` events, a thousand at a time. The checkpoint is before that, so that what is measured writes
/// hardly any page as a whole into the log of the server.
pub(crate) async fn fill(
    client: &Client,
    pool: &PgPool,
    count: i64,
    bytes: usize,
) -> anyhow::Result<()> {
    sqlx::raw_sql("checkpoint").execute(pool).await?;
    let mut id = 0;
    while id < count {
        let jobs: Vec<Job> = (id..count.min(id + 1_000))
            .map(|id| Job::new(id, bytes))
            .collect();
        client.emit_all(&jobs).await?;
        id += 1_000;
    }
    sqlx::raw_sql("analyze").execute(pool).await?;
    Ok(())
}

/// Waits until nothing is left in the queue. The look walks over what was deleted there, so it is not to be
/// taken often.
pub(crate) async fn drained(pool: &PgPool) -> anyhow::Result<()> {
    let text = format!("select not exists (select from {QUEUE})");
    while !sqlx::query_scalar::<_, bool>(sqlx::AssertSqlSafe(text.as_str()))
        .fetch_one(pool)
        .await?
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Waits until the nodes have completed so many messages, and nothing is left in the queue.
pub(crate) async fn completed(nodes: &[Handle], events: i64, pool: &PgPool) -> anyhow::Result<()> {
    let completed = || {
        let stats = nodes.iter().flat_map(Handle::stats);
        stats.map(|stats| stats.completed).sum::<u64>()
    };
    while completed() < events.unsigned_abs() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drained(pool).await
}

pub(crate) async fn start(
    database: &BenchDatabase,
    handler: &str,
    batch_size: usize,
) -> anyhow::Result<(Handle, Waits)> {
    let (app, waits) = app(database.url(), handler, batch_size);
    Ok((nexus::start(app).await?, waits))
}

/// A node in a process of its own, which is killed when this is dropped.
pub(crate) struct Apart {
    process: Child,
    input: Option<ChildStdin>,
}

impl Apart {
    pub(crate) fn start(database: &BenchDatabase, handler: &str) -> anyhow::Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["node", handler])
            .env("CORE_DATABASE_URL", database.url())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start a process")?;
        let input = process.stdin.take();
        // A byte says that it has started.
        let mut said = [0];
        let output = process
            .stdout
            .as_mut()
            .context("it has a standard output")?;
        output
            .read_exact(&mut said)
            .context("the node did not start")?;
        Ok(Self { process, input })
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Stops it gently, and returns what it has measured.
    pub(crate) fn stop(mut self) -> anyhow::Result<Vec<f64>> {
        self.input = None;
        let mut said = Vec::new();
        if let Some(output) = &mut self.process.stdout {
            output.read_to_end(&mut said)?;
        }
        Ok(serde_json::from_slice(&said)?)
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The other side of [`Apart`].
pub(crate) async fn run_apart(handler: &str) -> anyhow::Result<()> {
    let url = std::env::var("CORE_DATABASE_URL")?;
    let (app, waits) = app(&url, handler, 100);
    let node = nexus::start(app).await?;
    let mut output = std::io::stdout();
    output.write_all(b".")?;
    output.flush()?;
    let closed = || std::io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(closed).await??;
    node.shutdown().await;
    let waits = waits.lock().unwrap_or_else(PoisonError::into_inner);
    output.write_all(&serde_json::to_vec(&*waits)?)?;
    Ok(())
}
