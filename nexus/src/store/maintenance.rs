//! What has to be done from time to time, by whichever node gets to it.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection, SqlSafeStr};

use super::{Failure, classify, is_passing, micros, subscriptions::restore_queues};

/// Partitions ahead, subscriptions settled, expired rows forgotten; see `core.maintain`.
pub(crate) async fn maintain(connection: &mut PgConnection, namespace: &str) -> sqlx::Result<()> {
    sqlx::query("select core.maintain($1)")
        .bind(namespace)
        .execute(connection)
        .await
        .map(drop)
}

/// Makes again what was dropped by hand, a queue or a partition, if `error` says that it is missing.
/// False if it says something else.
pub(crate) async fn mend(
    connection: &mut PgConnection,
    namespace: &str,
    error: &sqlx::Error,
) -> sqlx::Result<bool> {
    match classify(error) {
        Failure::MissingTable => {
            tracing::error!(
                %error, namespace,
                "a queue is gone, restoring it empty; what waited in it is still in core.event_log"
            );
            restore_queues(connection, namespace).await?;
        }
        Failure::MissingPartition => ensure_partitions(connection).await?,
        _ => return Ok(false),
    }
    Ok(true)
}

/// Creates missing partitions of the log.
pub(crate) async fn ensure_partitions(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::query("select core.ensure_partitions()")
        .execute(connection)
        .await
        .map(drop)
}

/// Drops the partitions that ended longer ago than the retention, while emits go on. Returns their
/// names. One process at a time; others find nothing to do, as does a role that is not the owner.
pub(crate) async fn drop_expired_partitions(
    connection: &mut PgConnection,
    retention: Duration,
) -> sqlx::Result<Vec<String>> {
    let locked: Option<bool> = sqlx::query_scalar(
        "select case when pg_has_role(core.owner(), 'usage')
                then pg_try_advisory_lock(hashtextextended('nexus: drop partitions', 0)) end",
    )
    .fetch_one(&mut *connection)
    .await?;
    if locked == Some(false) {
        report_intruder(connection).await?;
    }
    if locked != Some(true) {
        return Ok(Vec::new());
    }
    // Detaching waits for every transaction that has used the log. It must not keep the caretaker
    // from its other work; what it leaves half done is finalized the next time.
    sqlx::query("select set_config('lock_timeout', '5s', false)")
        .execute(&mut *connection)
        .await?;
    let dropped = drop_expired(connection, retention).await;
    sqlx::raw_sql("reset lock_timeout")
        .execute(&mut *connection)
        .await?;
    sqlx::query("select pg_advisory_unlock(hashtextextended('nexus: drop partitions', 0))")
        .execute(connection)
        .await?;
    dropped
}

/// Any session can hold the lock; one that drops nothing would keep it from everybody.
async fn report_intruder(connection: &mut PgConnection) -> sqlx::Result<()> {
    let intruder: Option<String> = sqlx::query_scalar(
        "select core.name_sessions(array_agg(pid))
         from pg_locks join pg_stat_activity a using (pid)
         where locktype = 'advisory' and granted
           and database = (select oid from pg_database where datname = current_database())
           and classid::bigint << 32 | objid::bigint = hashtextextended('nexus: drop partitions', 0)
           and not pg_has_role(a.usesysid, core.owner(), 'usage')
         having count(*) > 0",
    )
    .fetch_optional(connection)
    .await?;
    if let Some(intruder) = intruder {
        tracing::warn!(
            "{intruder}, which does not own schema core, holds the lock for dropping expired partitions: end it"
        );
    }
    Ok(())
}

async fn drop_expired(
    connection: &mut PgConnection,
    retention: Duration,
) -> sqlx::Result<Vec<String>> {
    let expired: Vec<(String, String)> = sqlx::query_as(
        "select name, state from core.expired_partitions($1 * interval '1 microsecond')",
    )
    .bind(micros(retention))
    .fetch_all(&mut *connection)
    .await?;
    let mut dropped = Vec::new();
    for (name, state) in expired {
        // Names come from the catalog and match `event_log_YYYY_MM`. A plain detach would take a
        // lock that waits for, and then blocks, every emit.
        let mark = format!("comment on table core.{name} is 'expired'");
        let detach = format!("alter table core.event_log detach partition core.{name}");
        let drop = format!("drop table core.{name}");
        let steps = match &*state {
            "detached" => vec![drop],
            "detach pending" => vec![mark, format!("{detach} finalize"), drop],
            _ => vec![mark, format!("{detach} concurrently"), drop],
        };
        for step in steps {
            sqlx::raw_sql(AssertSqlSafe(step).into_sql_str())
                .execute(&mut *connection)
                .await?;
        }
        dropped.push(name);
    }
    Ok(dropped)
}

/// The same for one partition, within the caller's transaction: what behind a pooler in transaction mode is
/// possible. Emits wait for it, and it gives up after a moment if it has to wait for them.
pub(crate) async fn drop_an_expired_partition_within(
    connection: &mut PgConnection,
    retention: Duration,
) -> sqlx::Result<Vec<String>> {
    let found: Option<(String, String)> = sqlx::query_as(
        "select name, state from core.expired_partitions($1 * interval '1 microsecond')
         where state <> 'detach pending' limit 1",
    )
    .bind(micros(retention))
    .fetch_optional(&mut *connection)
    .await?;
    let Some((name, state)) = found else {
        return Ok(Vec::new());
    };
    let mut savepoint = connection.begin().await?;
    sqlx::raw_sql("set local lock_timeout = '200ms'")
        .execute(&mut *savepoint)
        .await?;
    let detach = if state == "detached" {
        String::new()
    } else {
        format!("alter table core.event_log detach partition core.{name};")
    };
    // Names come from the catalog and match `event_log_YYYY_MM`.
    let statement = AssertSqlSafe(format!("{detach} drop table core.{name}")).into_sql_str();
    match sqlx::raw_sql(statement).execute(&mut *savepoint).await {
        Ok(_) => {
            savepoint.commit().await?;
            Ok(vec![name])
        }
        Err(error) if is_passing(&error) => {
            savepoint.rollback().await?;
            tracing::debug!(%error, partition = name, "could not drop it now, trying again in a minute");
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Delivers what new subscriptions are still owed; see `core.settle_subscriptions`.
pub(crate) async fn settle_subscriptions(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<i32> {
    sqlx::query_scalar("select core.settle_subscriptions($1)")
        .bind(namespace)
        .fetch_one(connection)
        .await
}
