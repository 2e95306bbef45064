//! What an event costs as the work grows, in one dimension at a time.

use std::{fmt, time::Instant};

use nexus::{Client, Handle, prelude::*};
use nexus_benches::{BenchDatabase, load};
use serde_json::json;
use sqlx::PgPool;

use super::{
    Bench,
    app::{self, Job, QUEUE},
    cost::{Cost, Meter},
};

/// Handlers that do nothing, all of one event.
macro_rules! no_ops {
    ($($name:ident)*) => {
        const NO_OPS: &[&str] = &[$(stringify!($name)),*];
        $(#[handler(concurrency = 100)]
        async fn $name(_job: Job) {})*
    };
}

no_ops! {
    n00 n01 n02 n03 n04 n05 n06 n07 n08 n09 n10 n11 n12 n13 n14 n15 n16 n17 n18 n19 n20 n21 n22 n23 n24
    n25 n26 n27 n28 n29 n30 n31 n32 n33 n34 n35 n36 n37 n38 n39 n40 n41 n42 n43 n44 n45 n46 n47 n48 n49
    n50 n51 n52 n53 n54 n55 n56 n57 n58 n59 n60 n61 n62 n63 n64 n65 n66 n67 n68 n69 n70 n71 n72 n73 n74
    n75 n76 n77 n78 n79 n80 n81 n82 n83 n84 n85 n86 n87 n88 n89 n90 n91 n92 n93 n94 n95 n96 n97 n98 n99
}

/// A point of a curve.
#[derive(Debug, Clone, Copy)]
struct Point {
    curve: &'static str,
    at: i64,
    per_second: f64,
    cost: Cost,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            curve,
            at,
            per_second,
            cost,
        } = self;
        let micros = 1e6 / per_second;
        let statements = cost
            .statements
            .map_or("–".to_owned(), |n| format!("{n:.3}"));
        write!(
            f,
            "| {curve} | {at} | {per_second:.0} | {micros:.0} | {statements} | {:.0} |",
            cost.wal_bytes
        )
    }
}

/// A database with as many handlers, and who emits into it.
struct Place {
    database: BenchDatabase,
    own: PgPool,
    client: Client,
    handlers: usize,
}

impl Place {
    async fn new(bench: &Bench, handlers: usize) -> anyhow::Result<Self> {
        let database = bench.server.database("scale").await?;
        let node = nexus::start(app_of(&database, handlers)).await?;
        node.shutdown().await;
        let own = PgPool::connect(database.url()).await?;
        let client = app::client(&database).await?;
        Ok(Self {
            database,
            own,
            client,
            handlers,
        })
    }

    /// Emits so many events, some at a time.
    async fn emit(
        &self,
        curve: &'static str,
        at: i64,
        events: i64,
        bytes: usize,
    ) -> anyhow::Result<Point> {
        // Under the limit of one statement, so that a call is one.
        let together = (4_000_000 / i64::try_from(bytes)?).clamp(1, 1_000);
        let meter = Meter::start(&self.database).await?;
        let begun = Instant::now();
        let mut id = 0;
        while id < events {
            let jobs: Vec<Job> = (id..events.min(id + together))
                .map(|id| Job::new(id, bytes))
                .collect();
            self.client.emit_all(&jobs).await?;
            id += together;
        }
        point(curve, at, events, begun, meter).await
    }

    /// Handles so many of the messages that wait, with as many nodes.
    async fn drain(
        &self,
        curve: &'static str,
        at: i64,
        messages: i64,
        nodes: usize,
    ) -> anyhow::Result<Point> {
        let mut running = Vec::new();
        let meter = Meter::start(&self.database).await?;
        let begun = Instant::now();
        let nodes = (0..nodes).map(|_| nexus::start(app_of(&self.database, self.handlers)));
        for started in futures_util::future::join_all(nodes).await {
            running.push(started?);
        }
        let completed = || -> u64 {
            let stats = running.iter().flat_map(Handle::stats);
            stats.map(|stats| stats.completed).sum()
        };
        while completed() < messages.unsigned_abs() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        let count = completed().cast_signed();
        let took = begun.elapsed();
        for node in running {
            node.shutdown().await;
        }
        #[expect(clippy::cast_precision_loss, reason = "no run takes long enough")]
        let per_second = count as f64 / took.as_secs_f64();
        let cost = meter.per_event(count).await?;
        Ok(Point {
            curve,
            at,
            per_second,
            cost,
        })
    }

    /// Lets so many messages wait, copies of one.
    async fn backlog(&self, messages: i64) -> anyhow::Result<()> {
        self.client.emit_all(&[Job::new(0, 200)]).await?;
        let copied = format!(
            "insert into {QUEUE} (vt, message, headers)
             select vt, message, headers from (select * from {QUEUE} limit 1) m, generate_series(2, {messages})"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(copied))
            .execute(&self.own)
            .await?;
        tidy(&self.own).await?;
        Ok(())
    }

    async fn leave(self) -> anyhow::Result<()> {
        self.own.close().await;
        self.client.pool().close().await;
        self.database.remove().await
    }
}

async fn point(
    curve: &'static str,
    at: i64,
    events: i64,
    begun: Instant,
    meter: Meter,
) -> anyhow::Result<Point> {
    #[expect(clippy::cast_precision_loss, reason = "no run takes long enough")]
    let per_second = events as f64 / begun.elapsed().as_secs_f64();
    let cost = meter.per_event(events).await?;
    Ok(Point {
        curve,
        at,
        per_second,
        cost,
    })
}

fn app_of(database: &BenchDatabase, handlers: usize) -> App {
    App::discover()
        .name("bench")
        .namespace("bench")
        .database_url(database.url())
        .only(NO_OPS[..handlers].iter().copied())
        .batch_size(500)
}

impl Bench {
    /// Prints a line for each point as it is measured. `is_long` goes as far as a hundred million rows of the log.
    pub(crate) async fn scale(&self, is_long: bool) -> anyhow::Result<()> {
        let events = self.arguments.events;
        println!("load: {:?}\n", load());
        println!(
            "| curve | at | events/s | µs per event | statements | WAL bytes per event |\n|---|---:|---:|---:|---:|---:|"
        );
        let mut points = Vec::new();
        let mut say = |point: Point| {
            println!("{point}");
            points.push(point);
        };
        for bytes in [200, 2_000, 64_000] {
            let place = Place::new(self, 1).await?;
            let count = events.min(200_000_000 / i64::try_from(bytes)?);
            let at = i64::try_from(bytes)?;
            say(place
                .emit("emit_all, bytes of a payload", at, count, bytes)
                .await?);
            say(place
                .drain("drain, bytes of a payload", at, count, 1)
                .await?);
            place.leave().await?;
        }
        for handlers in [1, 3, 10] {
            let place = Place::new(self, handlers).await?;
            let at = i64::try_from(handlers)?;
            say(place
                .emit("emit_all, subscriptions", at, events / 2, 200)
                .await?);
            place.leave().await?;
        }
        for handlers in [1, 10, 100] {
            let place = Place::new(self, handlers).await?;
            let at = i64::try_from(handlers)?;
            let count = events / at;
            place.emit("", at, count, 200).await?;
            tidy(&place.own).await?;
            say(place.drain("drain, handlers", at, count * at, 1).await?);
            place.leave().await?;
        }
        for nodes in [1, 2, 4, 8] {
            let place = Place::new(self, 1).await?;
            place.backlog(events * 2).await?;
            say(place
                .drain("drain, nodes", i64::try_from(nodes)?, events * 2, nodes)
                .await?);
            place.leave().await?;
        }
        for waiting in [10_000, 100_000, 1_000_000] {
            let place = Place::new(self, 1).await?;
            place.backlog(waiting).await?;
            say(place
                .emit("emit_all, messages waiting", waiting, events / 2, 200)
                .await?);
            say(place
                .drain("drain of 10,000, messages waiting", waiting, 10_000, 1)
                .await?);
            place.leave().await?;
        }
        let mut rows = vec![100_000, 1_000_000, 10_000_000];
        rows.extend(is_long.then_some(100_000_000));
        let place = Place::new(self, 1).await?;
        let mut have = 0;
        for rows in rows {
            fill_log(&place.own, rows - have).await?;
            have = rows;
            say(place
                .emit("emit_all, rows of the log", rows, events / 2, 200)
                .await?);
            say(place
                .drain("drain, rows of the log", rows, events / 2, 1)
                .await?);
        }
        place.leave().await?;
        if self.arguments.json {
            let points: Vec<_> = points
                .iter()
                .map(|point| json!({ "curve": point.curve, "at": point.at, "per_second": point.per_second, "cost": point.cost }))
                .collect();
            println!(
                "{:#}",
                json!({ "bench": "scale", "load": load(), "points": points })
            );
        }
        Ok(())
    }
}

async fn tidy(pool: &PgPool) -> anyhow::Result<()> {
    // Not together: several statements in one string are a transaction, in which there is no `vacuum`.
    for statement in ["vacuum analyze", "checkpoint"] {
        sqlx::raw_sql(statement).execute(pool).await?;
    }
    Ok(())
}

/// Rows as an emit writes them, but for their payload, which is small.
async fn fill_log(pool: &PgPool, rows: i64) -> anyhow::Result<()> {
    let mut left = rows;
    while left > 0 {
        let some = left.min(1_000_000);
        let text = format!(
            "insert into core.event_log (namespace, event_type, payload, producer_node_id, correlation_id, subscriptions_version)
             select 'bench', 'bench.job', '{{\"id\": 1}}', 'bench', '1', 1 from generate_series(1, {some})"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(text))
            .execute(pool)
            .await?;
        left -= some;
    }
    sqlx::raw_sql("analyze core.event_log; checkpoint")
        .execute(pool)
        .await?;
    Ok(())
}
