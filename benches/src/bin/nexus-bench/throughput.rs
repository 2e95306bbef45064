//! W1 to W4: how many events a second.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use nexus_benches::BenchDatabase;
use pgmq::{PGMQueueExt, types::Message};
use sqlx::{PgPool, postgres::PgPoolOptions};

use super::{
    Bench,
    app::{self, Job, QUEUE},
    cost::Meter,
    report::{Measured, Report},
};

/// As the client's statement does, and nothing else.
const LOG_INSERT: &str = "insert into core.event_log
    (namespace, event_type, payload, producer_node_id, correlation_id, subscriptions_version)
    select 'bench', 'bench.job', payload, 'bench', 'bench', 1 from unnest($1::jsonb[]) as u (payload)";

/// Runs `work` over and over in `tasks` tasks until the time is over; returns how often, and in which time.
async fn hammer<F, Fut>(tasks: usize, seconds: u64, work: F) -> anyhow::Result<(i64, Duration)>
where
    F: Fn(i64) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    let begun = Instant::now();
    let end = begun + Duration::from_secs(seconds);
    let next = Arc::new(AtomicI64::new(0));
    let mut running = tokio::task::JoinSet::new();
    for _ in 0..tasks {
        let (next, work) = (Arc::clone(&next), work.clone());
        running.spawn(async move {
            while Instant::now() < end {
                work(next.fetch_add(1, Ordering::Relaxed)).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    Ok((next.load(Ordering::Relaxed), begun.elapsed()))
}

async fn pool(database: &BenchDatabase, connections: u32) -> anyhow::Result<PgPool> {
    let options = PgPoolOptions::new()
        .min_connections(connections)
        .max_connections(connections);
    Ok(options.connect(database.url()).await?)
}

/// As `sqlx::types::Json` writes it.
fn payload(id: i64, bytes: usize) -> anyhow::Result<String> {
    Ok(serde_json::to_string(&Job::new(id, bytes))?)
}

impl Bench {
    pub(crate) async fn emit(&self, report: &mut Report) -> anyhow::Result<()> {
        let (seconds, bytes) = (self.arguments.seconds, self.arguments.payload_bytes);
        let database = self.server.database("emit").await?;
        app::prepare(&database, "no_op").await?.close().await;
        let meter = Meter::start(&database).await?;
        let pool = pool(&database, 8).await?;
        let by = pool.clone();
        let work = move |id| {
            let pool = by.clone();
            async move {
                sqlx::query(LOG_INSERT)
                    .bind(vec![sqlx::types::Json(Job::new(id, bytes))])
                    .execute(&pool)
                    .await?;
                Ok(())
            }
        };
        let (count, took) = hammer(8, seconds, work).await?;
        pool.close().await;
        let yardstick = Measured::new(count, took, Some(meter.per_event(count).await?));

        let meter = Meter::start(&database).await?;
        let client = app::client(&database).await?;
        let by = client.clone();
        let work = move |id| {
            let client = by.clone();
            async move {
                client.emit(&Job::new(id, bytes)).await?;
                Ok(())
            }
        };
        let (count, took) = hammer(8, seconds, work).await?;
        client.pool().close().await;
        let nexus = Measured::new(count, took, Some(meter.per_event(count).await?));
        report.ratio("W1 emit, 8 producers", 0.85, yardstick, nexus);
        database.remove().await
    }

    pub(crate) async fn emit_all(&self, report: &mut Report) -> anyhow::Result<()> {
        let (events, bytes) = (self.arguments.events, self.arguments.payload_bytes);
        let database = self.server.database("emit_all").await?;
        app::prepare(&database, "no_op").await?.close().await;
        let meter = Meter::start(&database).await?;
        let pool = pool(&database, 1).await?;
        let begun = Instant::now();
        for first in (0..events).step_by(1_000) {
            let payloads: Vec<_> = (first..first + 1_000)
                .map(|id| sqlx::types::Json(Job::new(id, bytes)))
                .collect();
            sqlx::query(LOG_INSERT)
                .bind(payloads)
                .execute(&pool)
                .await?;
        }
        let took = begun.elapsed();
        pool.close().await;
        let yardstick = Measured::new(events, took, Some(meter.per_event(events).await?));

        let meter = Meter::start(&database).await?;
        let client = app::client(&database).await?;
        let begun = Instant::now();
        for first in (0..events).step_by(1_000) {
            let jobs: Vec<Job> = (first..first + 1_000)
                .map(|id| Job::new(id, bytes))
                .collect();
            client.emit_all(&jobs).await?;
        }
        let took = begun.elapsed();
        client.pool().close().await;
        let nexus = Measured::new(events, took, Some(meter.per_event(events).await?));
        report.ratio("W2 emit_all of 1,000", 0.70, yardstick, nexus);
        database.remove().await
    }

    pub(crate) async fn drain(&self, report: &mut Report) -> anyhow::Result<()> {
        let (events, bytes) = (self.arguments.events, self.arguments.payload_bytes);
        let database = self.server.database("drain").await?;
        let own = app::prepare(&database, "no_op").await?;
        let emitter = app::client(&database).await?;
        app::fill(&emitter, &own, events, bytes).await?;
        // The same bodies for both.
        sqlx::raw_sql("select pgmq.create('yardstick')")
            .execute(&own)
            .await?;
        let copied = format!(
            "insert into pgmq.q_yardstick (vt, message) select now(), message from {QUEUE}"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(copied))
            .execute(&own)
            .await?;
        sqlx::raw_sql("analyze").execute(&own).await?;

        let meter = Meter::start(&database).await?;
        let queue = PGMQueueExt::new_with_pool(pool(&database, 2).await?).await;
        let begun = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..2 {
            let queue = queue.clone();
            running.spawn(async move {
                loop {
                    let messages: Vec<Message<serde_json::Value, Option<serde_json::Value>>> =
                        queue.read_batch("yardstick", 30, 500).await?;
                    if messages.is_empty() {
                        return anyhow::Ok(());
                    }
                    let ids: Vec<i64> = messages.iter().map(|message| message.msg_id).collect();
                    queue.delete_batch("yardstick", &ids).await?;
                }
            });
        }
        while let Some(ended) = running.join_next().await {
            ended??;
        }
        let took = begun.elapsed();
        queue.connection.close().await;
        let yardstick = Measured::new(events, took, Some(meter.per_event(events).await?));

        let nexus = self.drained_by(&database, &own, "no_op", events).await?;
        report.ratio("W3 drain, no-op handler", 0.90, yardstick, nexus);
        own.close().await;
        emitter.pool().close().await;
        database.remove().await
    }

    /// Lets one node handle all that waits, from its start on.
    async fn drained_by(
        &self,
        database: &BenchDatabase,
        pool: &PgPool,
        handler: &str,
        events: i64,
    ) -> anyhow::Result<Measured> {
        let meter = Meter::start(database).await?;
        let begun = Instant::now();
        let (node, _) = app::start(database, handler, self.arguments.batch_size).await?;
        let nodes = [node];
        app::completed(&nodes, events, pool).await?;
        let took = begun.elapsed();
        let [node] = nodes;
        node.shutdown().await;
        Ok(Measured::new(
            events,
            took,
            Some(meter.per_event(events).await?),
        ))
    }

    pub(crate) async fn transactions(
        &self,
        report: &mut Report,
        concurrency: u32,
    ) -> anyhow::Result<()> {
        let (events, bytes) = (self.arguments.events, self.arguments.payload_bytes);
        let handler = format!("insert_{concurrency}");
        let database = self.server.database(&handler).await?;
        let own = app::prepare(&database, &handler).await?;
        let meter = Meter::start(&database).await?;
        let pool = pool(&database, concurrency).await?;
        let by = pool.clone();
        let work = move |id| {
            let pool = by.clone();
            async move {
                sqlx::query("insert into effects (job_id, note) values ($1, 'done')")
                    .bind(id)
                    .execute(&pool)
                    .await?;
                Ok(())
            }
        };
        let (count, took) = hammer(concurrency as usize, self.arguments.seconds, work).await?;
        pool.close().await;
        let yardstick = Measured::new(count, took, Some(meter.per_event(count).await?));

        let emitter = app::client(&database).await?;
        app::fill(&emitter, &own, events, bytes).await?;
        let nexus = self.drained_by(&database, &own, &handler, events).await?;
        let target = if concurrency == 8 { 0.50 } else { 0.30 };
        let name = format!("W4 &mut Tx, {concurrency} at a time");
        report.ratio(&name, target, yardstick, nexus);
        own.close().await;
        emitter.pool().close().await;
        database.remove().await
    }

    pub(crate) async fn batch(&self, report: &mut Report) -> anyhow::Result<()> {
        let (events, bytes) = (self.arguments.events, self.arguments.payload_bytes);
        let database = self.server.database("batch").await?;
        let own = app::prepare(&database, "insert_all").await?;
        sqlx::raw_sql(
            "create table waiting (id bigserial primary key, payload jsonb not null); checkpoint",
        )
        .execute(&own)
        .await?;
        for first in (0..events).step_by(1_000) {
            let payloads: Result<Vec<_>, _> = (first..first + 1_000)
                .map(|id| payload(id, bytes))
                .collect();
            sqlx::query("insert into waiting (payload) select unnest($1::text[])::jsonb")
                .bind(payloads?)
                .execute(&own)
                .await?;
        }
        sqlx::raw_sql("analyze").execute(&own).await?;
        let meter = Meter::start(&database).await?;
        let pool = pool(&database, 8).await?;
        let begun = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let pool = pool.clone();
            running.spawn(async move {
                loop {
                    let mut transaction = pool.begin().await?;
                    let jobs: Vec<(i64, sqlx::types::Json<Job>)> = sqlx::query_as(
                        "delete from waiting where id = any (array(
                             select id from waiting order by id limit 100 for update skip locked))
                         returning id, payload",
                    )
                    .fetch_all(&mut *transaction)
                    .await?;
                    if jobs.is_empty() {
                        return anyhow::Ok(());
                    }
                    let ids: Vec<i64> = jobs.iter().map(|(_, job)| job.id).collect();
                    sqlx::query(
                        "insert into effects (job_id, note) select unnest($1::bigint[]), 'done'",
                    )
                    .bind(ids)
                    .execute(&mut *transaction)
                    .await?;
                    transaction.commit().await?;
                }
            });
        }
        while let Some(ended) = running.join_next().await {
            ended??;
        }
        let took = begun.elapsed();
        pool.close().await;
        let yardstick = Measured::new(events, took, Some(meter.per_event(events).await?));

        let emitter = app::client(&database).await?;
        app::fill(&emitter, &own, events, bytes).await?;
        let nexus = self
            .drained_by(&database, &own, "insert_all", events)
            .await?;
        report.ratio("W4 Batch with &mut Tx", 0.50, yardstick, nexus);
        own.close().await;
        emitter.pool().close().await;
        database.remove().await
    }

    /// Handles what waits by one node and by eight.
    pub(crate) async fn nodes(&self, report: &mut Report) -> anyhow::Result<()> {
        let (events, bytes) = (self.arguments.events * 2, self.arguments.payload_bytes);
        let mut rates = Vec::new();
        for nodes in [1, 8] {
            let database = self.server.database("nodes").await?;
            let own = app::prepare(&database, "no_op").await?;
            let emitter = app::client(&database).await?;
            app::fill(&emitter, &own, events, bytes).await?;
            let meter = Meter::start(&database).await?;
            let mut running = Vec::new();
            let begun = Instant::now();
            let starts =
                (0..nodes).map(|_| app::start(&database, "no_op", self.arguments.batch_size));
            for started in futures_util::future::join_all(starts).await {
                running.push(started?.0);
            }
            app::completed(&running, events, &own).await?;
            let took = begun.elapsed();
            for node in running {
                node.shutdown().await;
            }
            rates.push(Measured::new(
                events,
                took,
                Some(meter.per_event(events).await?),
            ));
            own.close().await;
            emitter.pool().close().await;
            database.remove().await?;
        }
        report.ratio("drain by 8 nodes against 1", 1.0, rates[0], rates[1]);
        Ok(())
    }
}
