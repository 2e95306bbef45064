//! What a node takes that does nothing, and what a long transaction does to one that is at work.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use sqlx::{Connection as _, PgConnection, PgPool};

use super::{
    Bench,
    app::{self, Apart, Job},
    report::{Idle, Measured, Report},
};

/// How long a node is watched, in seconds.
const WATCHED: u64 = 20;

/// How long the snapshot is held, in seconds.
const HELD: u64 = 60;

impl Bench {
    /// Emits and handles as fast as it goes, first without a snapshot and then with one that stays open.
    pub(crate) async fn snapshot(&self, report: &mut Report) -> anyhow::Result<()> {
        let bytes = self.arguments.payload_bytes;
        let database = self.server.database("snapshot").await?;
        let own = app::prepare(&database, "no_op").await?;
        let (node, _) = app::start(&database, "no_op", self.arguments.batch_size).await?;
        let emitter = app::client(&database).await?;
        let handled = || {
            let stats = node.stats();
            stats.iter().map(|stats| stats.completed).sum::<u64>()
        };
        let stop = AtomicBool::new(false);
        let emits = async {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                // What waits is kept small: it is the cycle that is measured, not the emits. To look into the
                // queue would be to walk over what the snapshot keeps there.
                if sent - handled() > 2_000 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    continue;
                }
                let jobs: Vec<Job> = (0..100).map(|id| Job::new(id, bytes)).collect();
                emitter.emit_all(&jobs).await?;
                sent += 100;
            }
            anyhow::Ok(())
        };
        let over = |seconds| async move {
            let (before, begun) = (handled(), Instant::now());
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            let count = (handled() - before).cast_signed();
            Measured::new(count, begun.elapsed(), None)
        };
        let measured = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let without = over(15).await;
            let mut holder = PgConnection::connect(database.url()).await?;
            sqlx::raw_sql("begin isolation level repeatable read; select 1")
                .execute(&mut holder)
                .await?;
            tokio::time::sleep(Duration::from_secs(HELD - 15)).await;
            let with = over(15).await;
            holder.close().await?;
            stop.store(true, Ordering::Relaxed);
            anyhow::Ok((without, with))
        };
        let (emits, measured) = tokio::join!(emits, measured);
        emits?;
        let (without, with) = measured?;
        report.ratio(
            "a snapshot held for 60 s, its last 15 s",
            0.5,
            without,
            with,
        );
        node.shutdown().await;
        emitter.pool().close().await;
        own.close().await;
        database.remove().await
    }

    pub(crate) async fn idle(&self, report: &mut Report) -> anyhow::Result<()> {
        let database = self.server.database("idle").await?;
        let own = app::prepare(&database, "no_op").await?;
        let node = Apart::start(&database, "no_op")?;
        tokio::time::sleep(Duration::from_secs(10)).await;
        let polls = polls(&own).await?;
        let cpu = cpu_ticks(node.id())?;
        tokio::time::sleep(Duration::from_secs(WATCHED)).await;
        let cpu = cpu_ticks(node.id())? - cpu;
        let resident = resident_mib(node.id())?;
        let after = self::polls(&own).await?;
        node.stop()?;
        // A tick is a hundredth of a second on Linux.
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let (percent, seconds) = (cpu as f64 / WATCHED as f64, WATCHED as f64);
        let (calls, micros) = (after.0 - polls.0, after.1 - polls.1);
        own.close().await;
        database.remove().await?;
        let in_flight = self.in_flight_mib().await?;
        report.idle(Idle {
            cpu_percent: percent,
            resident_mib: resident,
            in_flight_mib: in_flight,
            polls_per_second: calls / seconds,
            micros_per_poll: micros / calls.max(1.0),
        });
        Ok(())
    }

    /// The memory of a node whose handler holds a thousand messages.
    async fn in_flight_mib(&self) -> anyhow::Result<f64> {
        let database = self.server.database("in_flight").await?;
        let own = app::prepare(&database, "hold").await?;
        let client = app::client(&database).await?;
        let node = Apart::start(&database, "hold")?;
        app::fill(&client, &own, 1_000, self.arguments.payload_bytes).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let resident = resident_mib(node.id())?;
        let begun: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
            "select count(*) from {} where read_ct > 0",
            app::QUEUE
        )))
        .fetch_one(&own)
        .await?;
        anyhow::ensure!(begun == 1_000, "{begun} of 1,000 messages are in flight");
        drop(node);
        client.pool().close().await;
        own.close().await;
        database.remove().await?;
        Ok(resident)
    }
}

/// Polls of the queue so far, and the server's time for them in microseconds.
async fn polls(pool: &PgPool) -> anyhow::Result<(f64, f64)> {
    let text = format!(
        "select coalesce(sum(calls), 0)::float8, coalesce(sum(total_exec_time) * 1000, 0)::float8 from pg_stat_statements
         where dbid = (select oid from pg_database where datname = current_database())
           and query like 'select exists%interval%' and query like '%{}%'",
        app::QUEUE
    );
    Ok(sqlx::query_as(sqlx::AssertSqlSafe(text))
        .fetch_one(pool)
        .await?)
}

fn cpu_ticks(process: u32) -> anyhow::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The name, which may hold anything, stands in parentheses.
    let (_, fields) = stat.rsplit_once(')').unwrap_or(("", &stat));
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next().and_then(|field| field.parse::<u64>().ok());
    Ok(ticks().unwrap_or(0) + ticks().unwrap_or(0))
}

fn resident_mib(process: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.unwrap_or(0.0) / 1024.0)
}
