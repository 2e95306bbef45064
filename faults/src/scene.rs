//! A database with the processes that use it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use nexus::{Client, Database};
use rustix::process::Signal;
use sqlx::PgPool;
use tempfile::TempDir;

use crate::{
    app::{ALL, CRON, NAMESPACE, Work},
    audit::{self, Ticks},
    cluster::Cluster,
    ledger::Ledger,
    process::{Running, Start, read_log},
    proxy::Proxy,
    report::{Outcome, seconds},
    suite::database,
};

/// How long anything may take before a fault counts as failed: generous, because machines are shared.
pub(crate) const PATIENCE: Duration = Duration::from_mins(3);

/// Numbers of work that the suite sends by hand begin here.
pub(crate) const BY_HAND: i64 = 1_000_000_000_000;

/// Each emitter that is started gets so many numbers.
const RANGE: i64 = 1_000_000;

pub(crate) struct Scene {
    url: String,
    server: PathBuf,
    database: String,
    pub(crate) pool: PgPool,
    pub(crate) ledger: Ledger,
    pub(crate) outcome: Outcome,
    slots: Vec<Slot>,
    ranges: i64,
    by_hand: i64,
    logs: Option<TempDir>,
    begun: Instant,
}

/// What a process is.
#[derive(Debug, Clone)]
enum Kind {
    Node {
        only: Vec<String>,
        lease: Duration,
    },
    Emitter {
        rate: f64,
        takes: Duration,
        count: Option<i64>,
    },
}

/// A process that is started again when it ends, for as long as it is wanted.
struct Slot {
    label: String,
    kind: Kind,
    proxy: Option<Proxy>,
    environment: BTreeMap<String, String>,
    is_wanted: bool,
    process: Option<Running>,
}

/// How a node is started.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) only: Vec<String>,
    pub(crate) lease: Duration,
    pub(crate) has_proxy: bool,
    pub(crate) environment: BTreeMap<String, String>,
}

impl Node {
    /// One with all handlers and a lease of so long.
    pub(crate) fn new(lease: Duration) -> Self {
        Self {
            only: ALL.map(str::to_owned).to_vec(),
            lease,
            has_proxy: false,
            environment: BTreeMap::new(),
        }
    }

    pub(crate) fn behind_a_proxy(mut self) -> Self {
        self.has_proxy = true;
        self
    }
}

/// The place of a process in its scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place(usize);

impl Scene {
    /// A new database with the schema and the app's tables.
    pub(crate) async fn new(cluster: &Cluster, name: &'static str) -> anyhow::Result<Self> {
        let database = database(name);
        cluster.create_database(&database).await?;
        let url = cluster.url(&database);
        Database::from_url(&url, "the suite")?.migrate().await?;
        let pool = cluster.pool(&database);
        sqlx::raw_sql(
            "create table effects (
                 handler text, event_id bigint, number bigint, process text,
                 at timestamptz default clock_timestamp()
             );
             create index on effects (at);
             create table orders (number bigint);
             alter table effects owner to faults;
             alter table orders owner to faults;",
        )
        .execute(&pool)
        .await?;
        let logs = tempfile::Builder::new()
            .prefix(&format!("nexus-faults-{name}."))
            .tempdir()?;
        Ok(Self {
            url,
            server: cluster.socket(),
            database,
            pool,
            ledger: Ledger::default(),
            outcome: Outcome {
                fault: name,
                ..Outcome::default()
            },
            slots: Vec::new(),
            ranges: 0,
            by_hand: BY_HAND,
            logs: Some(logs),
            begun: Instant::now(),
        })
    }

    /// A client of the suite's own, past every proxy.
    pub(crate) async fn client(&self) -> anyhow::Result<Client> {
        let database = Database::from_url(&self.url, "the suite")?;
        Ok(Client::connect(&database, NAMESPACE).await?)
    }

    pub(crate) async fn add_node(&mut self, node: Node) -> anyhow::Result<Place> {
        let kind = Kind::Node {
            only: node.only,
            lease: node.lease,
        };
        self.add(kind, node.has_proxy, node.environment).await
    }

    /// Emits so many each second, each of which takes the handler `exact` so long.
    pub(crate) async fn add_emitter(
        &mut self,
        rate: f64,
        takes: Duration,
        has_proxy: bool,
    ) -> anyhow::Result<Place> {
        let kind = Kind::Emitter {
            rate,
            takes,
            count: None,
        };
        self.add(kind, has_proxy, BTreeMap::new()).await
    }

    async fn add(
        &mut self,
        kind: Kind,
        has_proxy: bool,
        environment: BTreeMap<String, String>,
    ) -> anyhow::Result<Place> {
        let what = match kind {
            Kind::Node { .. } => "node",
            Kind::Emitter { .. } => "emitter",
        };
        let proxy = if has_proxy {
            Some(Proxy::new(self.server.clone()).await?)
        } else {
            None
        };
        let place = Place(self.slots.len());
        self.slots.push(Slot {
            label: format!("{what}-{}", place.0),
            kind,
            proxy,
            environment,
            is_wanted: true,
            process: None,
        });
        self.start(place)?;
        Ok(place)
    }

    /// Starts a process, unless it runs.
    pub(crate) fn start(&mut self, place: Place) -> anyhow::Result<()> {
        let folder = self.logs.as_ref().context("the scene is over")?.path();
        let slot = &mut self.slots[place.0];
        slot.is_wanted = true;
        if slot.process.as_mut().is_some_and(Running::is_running) {
            return Ok(());
        }
        let arguments: Vec<String> = match &slot.kind {
            Kind::Node { only, lease } => vec![
                "node".to_owned(),
                format!("--label={}", slot.label),
                format!("--only={}", only.join(",")),
                format!("--lease-seconds={}", lease.as_secs()),
            ],
            Kind::Emitter { rate, takes, count } => {
                self.ranges += 1;
                let mut arguments = vec![
                    "emitter".to_owned(),
                    format!("--from={}", self.ranges * RANGE),
                    format!("--rate={rate}"),
                    format!("--takes-ms={}", takes.as_millis()),
                ];
                arguments.extend(count.map(|count| format!("--count={count}")));
                arguments
            }
        };
        let url = match &slot.proxy {
            Some(proxy) => proxy.url(&self.database),
            None => self.url.clone(),
        };
        let start = Start {
            url,
            log: folder.join(format!("{}.log", slot.label)),
            ledger: self.ledger.clone(),
            environment: slot.environment.clone(),
        };
        let process = Running::start(&arguments, &start)?;
        if let Some(proxy) = &slot.proxy {
            proxy.belongs_to(process.pid());
        }
        slot.process = Some(process);
        Ok(())
    }

    /// What a node has from its next start on.
    pub(crate) fn redeploy(&mut self, place: Place, handlers: Vec<String>) {
        if let Kind::Node { only, .. } = &mut self.slots[place.0].kind {
            *only = handlers;
        }
    }

    /// Starts again what has ended and is wanted.
    pub(crate) fn tend(&mut self) -> anyhow::Result<()> {
        for index in 0..self.slots.len() {
            if self.slots[index].is_wanted {
                self.start(Place(index))?;
            }
        }
        Ok(())
    }

    /// Lets time pass, in which what ends is started again.
    pub(crate) async fn pass(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        loop {
            self.tend()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            tokio::time::sleep(left.min(Duration::from_millis(200))).await;
        }
    }

    /// Kills a process; [`tend`](Self::tend) starts it again.
    pub(crate) async fn kill(&mut self, place: Place) -> anyhow::Result<()> {
        if let Some(process) = &mut self.slots[place.0].process {
            process.signal(Signal::KILL);
            process.end(PATIENCE).await?;
        }
        Ok(())
    }

    pub(crate) fn signal(&mut self, place: Place, signal: Signal) {
        if let Some(process) = &mut self.slots[place.0].process {
            process.signal(signal);
        }
    }

    pub(crate) fn is_running(&mut self, place: Place) -> bool {
        let process = self.slots[place.0].process.as_mut();
        process.is_some_and(Running::is_running)
    }

    /// Asks a process to stop, and not to be started again.
    pub(crate) fn ask_to_stop(&mut self, place: Place) {
        self.slots[place.0].is_wanted = false;
        self.signal(place, Signal::TERM);
    }

    /// Waits until a process that was asked to stop has done so.
    pub(crate) async fn wait_for_end(&mut self, place: Place) -> anyhow::Result<()> {
        if let Some(process) = &mut self.slots[place.0].process {
            process.end(PATIENCE).await?;
        }
        Ok(())
    }

    /// Kills a process for good.
    pub(crate) async fn remove(&mut self, place: Place) -> anyhow::Result<()> {
        self.slots[place.0].is_wanted = false;
        self.kill(place).await
    }

    pub(crate) fn proxy(&self, place: Place) -> &Proxy {
        let proxy = self.slots[place.0].proxy.as_ref();
        proxy.expect("the process was added with a proxy")
    }

    /// Every place that has a proxy.
    pub(crate) fn proxied(&self) -> Vec<Place> {
        (0..self.slots.len())
            .filter(|index| self.slots[*index].proxy.is_some())
            .map(Place)
            .collect()
    }

    /// What a process has logged since the scene began.
    pub(crate) fn log(&self, place: Place) -> String {
        let folder = self.logs.as_ref().expect("the scene is not over");
        read_log(
            &folder
                .path()
                .join(format!("{}.log", self.slots[place.0].label)),
        )
    }

    /// Everything that nodes have logged.
    pub(crate) fn node_logs(&self) -> String {
        (0..self.slots.len())
            .filter(|index| matches!(self.slots[*index].kind, Kind::Node { .. }))
            .map(|index| self.log(Place(index)))
            .collect()
    }

    /// Waits until a question is answered with yes; ended processes are started again meanwhile.
    pub(crate) async fn until(&mut self, what: &str, question: &'static str) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            self.tend()?;
            let answer = sqlx::query_scalar::<_, bool>(question)
                .fetch_one(&self.pool)
                .await;
            if let Ok(true) = answer {
                return Ok(());
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "within {PATIENCE:?} this did not happen: {what} ({answer:?})"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until every handler has subscribed, so that what is emitted from now on reaches all.
    pub(crate) async fn ready(&mut self) -> anyhow::Result<()> {
        self.until(
            "every handler subscribes",
            "select count(*) = 7 from core.subscriptions where namespace = 'faults'",
        )
        .await
    }

    /// Waits until so many emits more have been acknowledged.
    pub(crate) async fn emitted(&mut self, more: usize) -> anyhow::Result<()> {
        let goal = self.ledger.acknowledged() + more;
        let begun = Instant::now();
        while self.ledger.acknowledged() < goal {
            self.pass(Duration::from_millis(50)).await?;
            ensure!(begun.elapsed() < PATIENCE, "nothing is acknowledged");
        }
        Ok(())
    }

    /// Sends work into the namespace's queue as a foreign program does.
    pub(crate) async fn send_by_hand(&mut self) -> anyhow::Result<()> {
        self.by_hand += 1;
        let number = self.by_hand;
        self.ledger.read(&format!("sent {number}"));
        let work = Work {
            number,
            takes_ms: 0,
        };
        let envelope = serde_json::json!({ "eventType": "fault.work", "payload": work });
        sqlx::query("select pgmq.send('core_events_faults', $1::jsonb)")
            .bind(envelope.to_string())
            .execute(&self.pool)
            .await?;
        self.ledger.read(&format!("acknowledged {number} 0"));
        Ok(())
    }

    /// Lets the emitters finish what they have begun.
    pub(crate) async fn stop_emitting(&mut self) -> anyhow::Result<()> {
        for slot in &mut self.slots {
            if matches!(slot.kind, Kind::Emitter { .. }) {
                slot.is_wanted = false;
                let Some(process) = &mut slot.process else {
                    continue;
                };
                process.signal(Signal::CONT);
                process.close_input();
                process.end(PATIENCE).await?;
            }
        }
        // What they said last is on its way through a pipe.
        tokio::time::sleep(Duration::from_millis(100)).await;
        Ok(())
    }

    /// Pauses every scheduled task.
    pub(crate) async fn stop_ticking(&mut self) -> anyhow::Result<()> {
        let client = self.client().await?;
        for task in client.schedules().await? {
            client.pause_schedule(&task.name).await?;
        }
        client.pool().close().await;
        Ok(())
    }

    /// Waits until everything that was emitted has run, and notes how long that took.
    ///
    /// The disturbance is over when this is called. Emitters are stopped and scheduled tasks paused first.
    pub(crate) async fn recover(&mut self) -> anyhow::Result<()> {
        let calm_since = Instant::now();
        self.stop_emitting().await?;
        self.stop_ticking().await?;
        self.drained().await?;
        self.outcome.recovery_seconds = calm_since.elapsed().as_secs_f64();
        Ok(())
    }

    async fn drained(&mut self) -> anyhow::Result<()> {
        let done = self
            .until(
                "everything that was emitted has run",
                "select not exists (select from pgmq.q_core_events_faults)
                    and not exists (select from pgmq.q_core_events_faults__small)
                    and not exists (select from core.delayed_emits)",
            )
            .await;
        let Err(error) = done else {
            return Ok(());
        };
        let left: Vec<(Option<String>, i64, Option<i32>)> = sqlx::query_as(
            "select headers ->> 'handler', count(*), max(read_ct)
             from (table pgmq.q_core_events_faults union all table pgmq.q_core_events_faults__small) q
             group by 1",
        )
        .fetch_all(&self.pool)
        .await?;
        bail!("{error}; left are (handler, messages, most claims) {left:?}")
    }

    /// Stops the nodes, counts, and says what came of it; also of a scene that was not played to its end.
    pub(crate) async fn end(mut self, played: anyhow::Result<()>, ticks: Ticks) -> Outcome {
        if let Err(error) = played {
            self.outcome.violation(format!("{error:#}"));
            // What is only late is not to be counted as lost.
            let _ = self.recover().await;
        }
        self.stop_all().await;
        if let Err(error) = audit::count(&self.pool, &self.ledger, ticks, &mut self.outcome).await {
            self.outcome
                .violation(format!("could not count: {error:#}"));
        }
        self.pool.close().await;
        self.outcome.seconds = self.begun.elapsed().as_secs_f64();
        self.keep_logs_unless_well();
        self.outcome
    }

    async fn stop_all(&mut self) {
        for index in 0..self.slots.len() {
            self.ask_to_stop(Place(index));
        }
        for slot in &mut self.slots {
            let Some(process) = &mut slot.process else {
                continue;
            };
            match process.end(Duration::from_secs(40)).await {
                Ok(status) if status.success() || !slot.is_node() => {}
                Ok(status) => {
                    let label = &slot.label;
                    // It had been ended before, and nobody wanted it again.
                    if status.code().is_some() {
                        self.outcome
                            .violation(format!("{label} ended with {status}"));
                    }
                }
                Err(error) => self.outcome.violation(format!("{}: {error}", slot.label)),
            }
        }
        let panics = self
            .node_logs()
            .lines()
            .filter(|line| line.contains("panicked"))
            .count();
        if panics > 0 {
            self.outcome
                .violation(format!("{panics} panics in the logs of nodes"));
        }
    }

    fn keep_logs_unless_well(&mut self) {
        if self.outcome.is_well() {
            return;
        }
        if let Some(logs) = self.logs.take() {
            let path = logs.keep();
            self.outcome
                .note(format!("what the processes logged: {}", path.display()));
        }
    }

    /// How many effects of a handler there are by now.
    pub(crate) async fn effects_of(&self, handler: &str) -> anyhow::Result<i64> {
        Ok(
            sqlx::query_scalar("select count(*) from effects where handler = $1")
                .bind(handler)
                .fetch_one(&self.pool)
                .await?,
        )
    }

    /// Notes how often a text stands in the logs of the nodes.
    pub(crate) fn note_log_lines(&mut self, what: &str, part: &str) -> usize {
        let count = self
            .node_logs()
            .lines()
            .filter(|line| line.contains(part))
            .count();
        self.outcome.note(format!("{what}: {count}"));
        count
    }

    /// Notes when the first effect came after a moment, such as a restart of the server.
    pub(crate) async fn until_next_effect(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        let handler_ticks = CRON;
        let before: Option<String> = sqlx::query_scalar("select max(at)::text from effects")
            .fetch_one(&self.pool)
            .await?;
        loop {
            self.tend()?;
            let is_there = sqlx::query_scalar::<_, bool>(
                "select exists (select from effects where at > $1::timestamptz and handler <> $2)",
            )
            .bind(before.as_deref().unwrap_or("-infinity"))
            .bind(handler_ticks)
            .fetch_one(&self.pool)
            .await;
            if let Ok(true) = is_there {
                return Ok(begun.elapsed());
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "no effect for {}",
                seconds(PATIENCE)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Slot {
    fn is_node(&self) -> bool {
        matches!(self.kind, Kind::Node { .. })
    }
}
