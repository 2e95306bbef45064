//! The doorbell: LISTEN and NOTIFY.
//!
//! It is a hint, never truth: a ring that is lost costs a poll, a false one too. Nobody rings inside
//! a transaction that does work, because NOTIFY makes commits of the whole cluster wait for each
//! other (4 to 9 times slower).

use sqlx::PgConnection;

/// The channel of a namespace. The payload is the name of the queue that has news.
pub(crate) fn channel(namespace: &str) -> String {
    format!("nexus_{}", namespace.to_ascii_lowercase().replace('-', "_"))
}

/// Prepares a connection for [`ring`]: a ring may be lost in a crash.
pub(crate) async fn prepare_to_ring(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql("set synchronous_commit = off")
        .execute(connection)
        .await
        .map(drop)
}

/// The same for one transaction.
pub(crate) const TO_RING: &str = "set local synchronous_commit = off";

/// Tells every process that listens that the queues have news.
pub(crate) async fn ring(
    connection: &mut PgConnection,
    channel: &str,
    queues: &[String],
) -> sqlx::Result<()> {
    sqlx::query("select pg_notify($1, queue) from unnest($2::text[]) as u (queue)")
        .bind(channel)
        .bind(queues)
        .execute(connection)
        .await
        .map(drop)
}
