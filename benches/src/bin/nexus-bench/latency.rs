//! W5 and W6: how soon an event is handled.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use nexus::Client;
use nexus_benches::Spread;
use sqlx::PgPool;
use tokio::sync::Notify;

use super::{
    Bench,
    app::{self, Apart, Job},
    report::Report,
};

/// How long a workload runs at a rate, in seconds.
const SECONDS: u64 = 10;

/// What an emit does at least: a row of the log and one of a queue.
const PLAIN_EMIT: &str = "with l as (
        insert into core.event_log (namespace, event_type, payload, producer_node_id, correlation_id, subscriptions_version)
        values ('bench', 'bench.job', $1, 'bench', 'bench', 1) returning payload
    )
    insert into plain_queue (due, body) select now(), payload from l";

/// What a claim does at least.
const PLAIN_CLAIM: &str = "update plain_queue set due = now() + interval '30 s'
    where id = any (array(select id from plain_queue where due <= now() order by due limit 100 for update skip locked))
    returning id, body::text";

/// Who emits.
enum Emitter {
    Client(Client),
    /// By `core.emit`, in a program that rings no bell.
    Sql(PgPool),
}

impl Emitter {
    /// Emits at a steady rate.
    async fn emit_at(&self, per_second: u64, bytes: usize) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(Duration::from_nanos(1_000_000_000 / per_second));
        for id in 0..per_second * SECONDS {
            tick.tick().await;
            let job = Job::new(id.cast_signed(), bytes);
            match self {
                Self::Client(client) => {
                    client.emit(&job).await?;
                }
                Self::Sql(pool) => {
                    sqlx::query("select core.emit('bench', 'bench.job', $1)")
                        .bind(sqlx::types::Json(job))
                        .execute(pool)
                        .await?;
                }
            }
        }
        // The last ones are under way.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(())
    }
}

/// From an insert to the answer of a claim, by plain SQL: what nobody can be faster than on this machine, who writes a
/// log and flushes it. The claim is sent as soon as the insert is answered, on a connection that waits for that.
async fn plain_pickup(pool: &PgPool, per_second: u64, bytes: usize) -> anyhow::Result<Spread> {
    sqlx::raw_sql(
        "create table plain_queue (id bigint generated always as identity primary key, due timestamptz not null, body jsonb not null);
         create index on plain_queue (due, id)",
    )
    .execute(pool)
    .await?;
    let bell = Arc::new(Notify::new());
    let wanted = usize::try_from(per_second * SECONDS)?;
    let claims = tokio::spawn({
        let (pool, bell) = (pool.clone(), Arc::clone(&bell));
        async move {
            // Of its own: the setting is not for others.
            let mut connection = pool.acquire().await?.detach();
            sqlx::query("set synchronous_commit = off")
                .execute(&mut connection)
                .await?;
            let mut waits = Vec::new();
            while waits.len() < wanted {
                bell.notified().await;
                let rows: Vec<(i64, String)> = sqlx::query_as(PLAIN_CLAIM)
                    .fetch_all(&mut connection)
                    .await?;
                for (_, body) in &rows {
                    let job: Job = serde_json::from_str(body)?;
                    waits.push(app::millis_since(&job));
                }
                let ids: Vec<i64> = rows.into_iter().map(|(id, _)| id).collect();
                sqlx::query("delete from plain_queue where id = any ($1)")
                    .bind(ids)
                    .execute(&mut connection)
                    .await?;
            }
            anyhow::Ok(waits)
        }
    });
    let mut connection = pool.acquire().await?;
    let mut tick = tokio::time::interval(Duration::from_nanos(1_000_000_000 / per_second));
    for id in 0..per_second * SECONDS {
        tick.tick().await;
        sqlx::query(PLAIN_EMIT)
            .bind(sqlx::types::Json(Job::new(id.cast_signed(), bytes)))
            .execute(&mut *connection)
            .await?;
        bell.notify_one();
    }
    let waits = claims.await??;
    sqlx::query("drop table plain_queue").execute(pool).await?;
    Ok(Spread::of(waits))
}

impl Bench {
    pub(crate) async fn pickup(&self, report: &mut Report) -> anyhow::Result<()> {
        let bytes = self.arguments.payload_bytes;
        for per_second in [20, 300] {
            let database = self.server.database("pickup").await?;
            let own = app::prepare(&database, "note_wait").await?;
            let wanted = per_second * SECONDS;
            report.latency(
                &format!("W5 the same by plain SQL, {per_second}/s, one process"),
                None,
                plain_pickup(&own, per_second, bytes).await?,
            );

            let (node, waits) = app::start(&database, "note_wait", 100).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            let emitter = Emitter::Client(node.client().clone());
            emitter.emit_at(per_second, bytes).await?;
            let here = waits.lock().unwrap_or_else(PoisonError::into_inner).clone();
            anyhow::ensure!(here.len() as u64 == wanted, "{} of {wanted}", here.len());
            report.latency(
                &format!("W5 pickup, {per_second}/s, one process"),
                Some((1.5, 4.0)),
                Spread::of(here),
            );

            waits.lock().unwrap_or_else(PoisonError::into_inner).clear();
            let emitter = Emitter::Sql(own.clone());
            emitter.emit_at(per_second, bytes).await?;
            let foreign = waits.lock().unwrap_or_else(PoisonError::into_inner).clone();
            report.latency(
                &format!("W5 pickup, {per_second}/s, by core.emit"),
                Some((30.0, 60.0)),
                Spread::of(foreign),
            );
            node.shutdown().await;

            let node = Apart::start(&database, "note_wait")?;
            let client = app::client(&database).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            let emitter = Emitter::Client(client.clone());
            emitter.emit_at(per_second, bytes).await?;
            let apart = node.stop()?;
            anyhow::ensure!(apart.len() as u64 == wanted, "{} of {wanted}", apart.len());
            report.latency(
                &format!("W5 pickup, {per_second}/s, two processes"),
                Some((3.0, 8.0)),
                Spread::of(apart),
            );
            client.pool().close().await;
            own.close().await;
            database.remove().await?;
        }
        Ok(())
    }

    /// From the start of a node, on a schema that is there, to the start of the handler of a message that waits.
    pub(crate) async fn start(&self, report: &mut Report) -> anyhow::Result<()> {
        const STARTS: i64 = 10;
        let database = self.server.database("start").await?;
        let own = app::prepare(&database, "note_wait").await?;
        let client = app::client(&database).await?;
        let mut samples = Vec::new();
        for id in 0..STARTS {
            client
                .emit(&Job::new(id, self.arguments.payload_bytes))
                .await?;
            let begun = Instant::now();
            let (node, waits) = app::start(&database, "note_wait", 100).await?;
            while waits
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_empty()
            {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            samples.push(begun.elapsed().as_secs_f64() * 1_000.0);
            node.shutdown().await;
        }
        report.latency(
            "start of a node to its first event",
            None,
            Spread::of(samples),
        );
        client.pool().close().await;
        own.close().await;
        database.remove().await
    }

    /// Kills a node that is at work, starts it again at once, and waits until all is done.
    pub(crate) async fn kill(&self, report: &mut Report) -> anyhow::Result<()> {
        let events = self.arguments.events.min(20_000);
        let database = self.server.database("kill").await?;
        let own = app::prepare(&database, "insert_8").await?;
        let client = app::client(&database).await?;
        app::fill(&client, &own, events, self.arguments.payload_bytes).await?;
        let node = Apart::start(&database, "insert_8")?;
        let effects = || async {
            let count = sqlx::query_scalar::<_, i64>("select count(*) from effects");
            count.fetch_one(&own).await
        };
        while effects().await? < events / 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(node);
        let killed = Instant::now();
        let node = Apart::start(&database, "insert_8")?;
        app::drained(&own).await?;
        let took = killed.elapsed();
        node.stop()?;
        let (effects, distinct): (i64, i64) =
            sqlx::query_as("select count(*), count(distinct job_id) from effects")
                .fetch_one(&own)
                .await?;
        report.kill(took, events - distinct, effects - distinct);
        client.pool().close().await;
        own.close().await;
        database.remove().await
    }
}
