//! The small app that is broken: what one of its processes does.
//!
//! Every handler notes its effect in a table without any unique key, so that a second effect shows.
//! It is a user of the public API and knows nothing of the faults.

use std::time::Duration;

use nexus::prelude::*;

/// The namespace of everything here.
pub(crate) const NAMESPACE: &str = "faults";

/// The name of the app, and so its group.
pub(crate) const APP: &str = "small";

/// Its scheduled task.
pub(crate) const CRON: &str = "every_second";

/// Handlers whose effect must happen exactly once for each event of their type.
pub(crate) const EXACTLY_ONCE: [&str; 4] = ["exact", "together", "follow", "side"];

/// All handlers and scheduled tasks of the app.
pub(crate) const ALL: [&str; 7] = [
    "exact", "together", "plain", "follow", "side", "pulse", CRON,
];

/// Something to do.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.work")]
pub(crate) struct Work {
    /// Says how it was emitted and what becomes of it: see [`Fate`] and `emitter`.
    pub(crate) number: i64,
    /// How long `exact` takes.
    pub(crate) takes_ms: u64,
}

/// What `exact` makes of work.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.followed")]
struct Followed {
    number: i64,
}

/// What `plain` makes of work.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.sided")]
struct Sided {
    number: i64,
}

/// What many scheduled tasks emit.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fault.pulsed")]
pub(crate) struct Pulsed {
    pub(crate) task: i64,
}

/// What becomes of work in the handler `exact`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It succeeds.
    Well,
    /// Its first attempt fails after its effect, which must roll back.
    FailsFirst,
    /// It is given up after its effect, which must roll back.
    IsGivenUp,
}

pub(crate) fn fate(number: i64) -> Fate {
    match number.rem_euclid(50) {
        17 => Fate::IsGivenUp,
        3 | 28 => Fate::FailsFirst,
        _ => Fate::Well,
    }
}

/// The process that notes the effect.
#[derive(Debug, Clone)]
pub(crate) struct Process(pub(crate) String);

const NOTE: &str =
    "insert into effects (handler, event_id, number, process) values ($1, $2, $3, $4)";

async fn note(
    connection: &mut sqlx::PgConnection,
    handler: &str,
    event_id: i64,
    number: i64,
    process: &Process,
) -> nexus::Result {
    sqlx::query(NOTE)
        .bind(handler)
        .bind(event_id)
        .bind(number)
        .bind(&process.0)
        .execute(connection)
        .await?;
    Ok(())
}

async fn note_all(
    connection: &mut sqlx::PgConnection,
    handler: &str,
    events: Vec<(i64, i64)>,
    process: &Process,
) -> nexus::Result {
    let (ids, numbers): (Vec<i64>, Vec<i64>) = events.into_iter().unzip();
    sqlx::query(
        "insert into effects (handler, event_id, number, process)
         select $1, e.id, e.number, $4 from unnest($2::bigint[], $3::bigint[]) as e (id, number)",
    )
    .bind(handler)
    .bind(ids)
    .bind(numbers)
    .bind(&process.0)
    .execute(connection)
    .await?;
    Ok(())
}

#[handler(backoff = "exponential(100ms..2s)", concurrency = 8)]
async fn exact(
    work: Envelope<Work>,
    process: State<Process>,
    tx: &mut Tx,
) -> nexus::Result<Emit<Followed>> {
    note(tx, "exact", work.event_id(), work.number, &process).await?;
    if work.takes_ms > 0 {
        tokio::time::sleep(Duration::from_millis(work.takes_ms)).await;
    }
    match fate(work.number) {
        Fate::FailsFirst if work.attempt() == 1 => Err(Error::retryable("the first attempt fails")),
        Fate::IsGivenUp => Err(Error::permanent("this work is not to be done")),
        _ => Ok(Emit(Followed {
            number: work.number,
        })),
    }
}

#[handler(backoff = "exponential(100ms..2s)")]
async fn together(work: Batch<Work>, process: State<Process>, tx: &mut Tx) -> nexus::Result {
    let is_bad = |item: &Envelope<Work>| item.number.rem_euclid(100) == 41 && item.attempt() == 1;
    let events = work.iter().map(|item| (item.event_id(), item.number));
    note_all(tx, "together", events.collect(), &process).await?;
    if work.iter().any(is_bad) {
        return Err(Error::retryable("one of the batch fails its first attempt"));
    }
    Ok(())
}

/// Without a transaction: its effect is noted at least once, what it returns is emitted once.
#[handler(backoff = "exponential(100ms..2s)", concurrency = 4)]
async fn plain(
    work: Envelope<Work>,
    process: State<Process>,
    client: Client,
) -> nexus::Result<Emit<Sided>> {
    if work.number.rem_euclid(50) == 31 && work.attempt() == 1 {
        return Err(Error::retryable("the first attempt fails"));
    }
    let mut connection = client.pool().acquire().await?;
    note(
        &mut connection,
        "plain",
        work.event_id(),
        work.number,
        &process,
    )
    .await?;
    Ok(Emit(Sided {
        number: work.number,
    }))
}

#[handler(backoff = "exponential(100ms..2s)", concurrency = 8)]
async fn follow(event: Envelope<Followed>, process: State<Process>, tx: &mut Tx) -> nexus::Result {
    note(tx, "follow", event.event_id(), event.number, &process).await
}

#[handler(backoff = "exponential(100ms..2s)")]
async fn side(events: Batch<Sided>, process: State<Process>, tx: &mut Tx) -> nexus::Result {
    let events = events.iter().map(|event| (event.event_id(), event.number));
    note_all(tx, "side", events.collect(), &process).await
}

#[handler(backoff = "exponential(100ms..2s)")]
async fn pulse(ticks: Batch<Pulsed>, process: State<Process>, tx: &mut Tx) -> nexus::Result {
    let events = ticks.iter().map(|tick| (tick.event_id(), tick.task));
    note_all(tx, "pulse", events.collect(), &process).await
}

#[cron("* * * * * *", backoff = "exponential(100ms..2s)")]
async fn every_second(tick: Tick, ctx: Ctx, process: State<Process>, tx: &mut Tx) -> nexus::Result {
    let due = tick.due_at().as_second();
    note(tx, CRON, ctx.meta().event_id(), due, &process).await
}

/// What one process of the app is told.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Settings {
    /// What the process is called in its effects.
    #[arg(long)]
    label: String,
    /// The handlers and scheduled tasks that it has.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// How long a claimed message is its own.
    #[arg(long, default_value_t = 10)]
    lease_seconds: u64,
}

/// Works until it is signalled.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    // So that a look into its log tells by which clock it runs.
    eprintln!("the clock shows {}", nexus::jiff::Timestamp::now());
    let app = App::discover()
        .name(APP)
        .namespace(NAMESPACE)
        .only(settings.only.iter().map(String::as_str))
        .lease(Duration::from_secs(settings.lease_seconds))
        .shutdown_timeout(Duration::from_secs(10))
        .state(Process(settings.label));
    Box::pin(nexus::run(app))
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))
}
