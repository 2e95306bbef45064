//! What the benchmarks of nexus share: a database of their own on a durable server, and figures.

use std::fmt;

use nexus_embedded::{Options, Source};
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// The server that benchmarks run on: that of `CORE_DATABASE_URL` or `DATABASE_URL` if one is set, else
/// an embedded one that is as durable as Postgres is by default.
#[derive(Debug)]
pub struct BenchServer {
    source: Source,
}

/// A database for one run.
#[derive(Debug)]
pub struct BenchDatabase {
    name: String,
    url: String,
    server_url: String,
}

impl BenchServer {
    /// Finds or starts the server.
    ///
    /// # Errors
    ///
    /// There is none, with the reason and what to do.
    pub fn start() -> anyhow::Result<Self> {
        // Files of the write-ahead log are kept and used again, as on a server that has been running for a while: to
        // create one takes longer than what is measured.
        let mut options = Options::dev()
            .setting("shared_buffers", "1GB")
            .setting("max_wal_size", "4GB")
            .setting("min_wal_size", "3GB")
            .setting("checkpoint_timeout", "1h")
            .setting("shared_preload_libraries", "pg_stat_statements");
        // Not the server of the project, which has other settings and may be running.
        if std::env::var_os("NEXUS_PG_DATA").is_none() {
            options = options.data_folder("/var/tmp/nexus-bench");
        }
        let source = nexus_embedded::resolve(&options)?;
        Ok(Self { source })
    }

    /// What figures depend on.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn settings(&self) -> anyhow::Result<serde_json::Value> {
        let mut connection = PgConnection::connect(&self.source.url()).await?;
        let settings = sqlx::query_scalar(
            "select jsonb_object_agg(name, current_setting(name)) from pg_settings
             where name in ('server_version', 'shared_buffers', 'fsync', 'synchronous_commit', 'full_page_writes',
                            'max_wal_size', 'checkpoint_timeout', 'wal_compression', 'jit', 'shared_preload_libraries')",
        )
        .fetch_one(&mut connection)
        .await?;
        connection.close().await?;
        Ok(settings)
    }

    /// Creates an empty database, which nothing else uses.
    ///
    /// # Errors
    ///
    /// The role may not create databases.
    pub async fn database(&self, name: &str) -> anyhow::Result<BenchDatabase> {
        let name = format!("nexus_bench_{name}_{}", std::process::id());
        let server_url = self.source.url();
        execute(&server_url, format!("drop database if exists {name}")).await?;
        execute(&server_url, format!("create database {name}")).await?;
        // The path of the URL is the database: after the last `/` and before the options.
        let (base, options) = server_url.split_once('?').unwrap_or((&server_url, ""));
        let (server, _) = base.rsplit_once('/').unwrap_or((base, ""));
        let url = format!("{server}/{name}?{options}");
        // Counts statements where the server has it; without it they are not counted.
        let _ = execute(
            &url,
            "create extension if not exists pg_stat_statements".to_owned(),
        )
        .await;
        Ok(BenchDatabase {
            name,
            url,
            server_url,
        })
    }
}

impl fmt::Display for BenchServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl BenchDatabase {
    /// The URL to connect to.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Removes the database with all that is in it.
    ///
    /// # Errors
    ///
    /// The server cannot be reached.
    pub async fn remove(self) -> anyhow::Result<()> {
        let drop = format!("drop database if exists {} with (force)", self.name);
        execute(&self.server_url, drop).await
    }
}

async fn execute(url: &str, statement: String) -> anyhow::Result<()> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    Ok(())
}

/// How a figure is spread, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Spread {
    /// Half of the samples are at most this.
    pub p50: f64,
    /// 99 of 100 samples are at most this.
    pub p99: f64,
    /// The largest sample.
    pub max: f64,
}

impl Spread {
    /// Of samples in milliseconds; zeros without any.
    #[must_use]
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let rank = (samples.len() * percent).div_ceil(100).max(1);
            samples.get(rank - 1).copied().unwrap_or_default()
        };
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50, p99, max } = self;
        write!(f, "p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms")
    }
}

/// The run in the middle, by this figure of each.
///
/// # Panics
///
/// Without runs.
pub fn median<T>(runs: &[T], figure: impl Fn(&T) -> f64) -> &T {
    let mut sorted: Vec<&T> = runs.iter().collect();
    sorted.sort_by(|a, b| figure(a).total_cmp(&figure(b)));
    sorted[(sorted.len() - 1) / 2]
}

/// How busy the machine is with everything that runs on it: processes that ran or waited to, averaged
/// over the last minute. `None` where the system does not say.
#[must_use]
pub fn load() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let spread = Spread::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((spread.p50, spread.p99, spread.max), (100.0, 198.0, 200.0));
        let one = Spread::of(vec![7.0]);
        assert_eq!((one.p50, one.p99, one.max), (7.0, 7.0, 7.0));
    }

    #[test]
    fn the_median_is_a_run() {
        let figure = |run: &u32| f64::from(*run);
        assert_eq!(*median(&[3, 1, 2], figure), 2);
        assert_eq!(*median(&[2, 1], figure), 1);
    }
}
