//! What a workload costs the server.

use nexus_benches::BenchDatabase;
use serde::Serialize;
use sqlx::{Connection as _, PgConnection};

/// Per event.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Cost {
    /// `None` without `pg_stat_statements`.
    pub(crate) statements: Option<f64>,
    pub(crate) transactions: f64,
    pub(crate) wal_bytes: f64,
}

#[derive(Debug, Clone, Copy)]
struct Reading {
    statements: Option<i64>,
    transactions: i64,
    wal_bytes: i64,
}

/// Reads before and after. Whoever worked has to have closed its connections by then: the server counts some
/// things only when a session ends.
pub(crate) struct Meter {
    connection: PgConnection,
    before: Reading,
}

impl Meter {
    pub(crate) async fn start(database: &BenchDatabase) -> anyhow::Result<Self> {
        let mut connection = PgConnection::connect(database.url()).await?;
        let before = read(&mut connection).await?;
        Ok(Self { connection, before })
    }

    #[expect(clippy::cast_precision_loss, reason = "no run takes long enough")]
    pub(crate) async fn per_event(mut self, events: i64) -> anyhow::Result<Cost> {
        let after = read(&mut self.connection).await?;
        let per_event = |before: i64, after: i64| (after - before) as f64 / events as f64;
        Ok(Cost {
            statements: self
                .before
                .statements
                .zip(after.statements)
                .map(|(before, after)| per_event(before, after)),
            transactions: per_event(self.before.transactions, after.transactions),
            wal_bytes: per_event(self.before.wal_bytes, after.wal_bytes),
        })
    }
}

async fn read(connection: &mut PgConnection) -> anyhow::Result<Reading> {
    let is_there: bool = sqlx::query_scalar(
        "select exists (select from pg_extension where extname = 'pg_stat_statements')",
    )
    .fetch_one(&mut *connection)
    .await?;
    let mut statements = None;
    if is_there {
        let text = "select coalesce(sum(calls), 0)::bigint from pg_stat_statements
                    where dbid = (select oid from pg_database where datname = current_database())";
        statements = Some(sqlx::query_scalar(text).fetch_one(&mut *connection).await?);
    }
    let (transactions, wal_bytes) = sqlx::query_as(
        "select xact_commit + xact_rollback, (pg_current_wal_insert_lsn() - '0/0')::bigint
         from pg_stat_database where datname = current_database()",
    )
    .fetch_one(connection)
    .await?;
    Ok(Reading {
        statements,
        transactions,
        wal_bytes,
    })
}
