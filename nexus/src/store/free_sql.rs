//! SQL that somebody writes who looks into the database, and the queries that the original system's documentation
//! prints.

use futures_util::{StreamExt, TryStreamExt};
use serde_json::Value;
use sqlx::{
    AssertSqlSafe, Column, Either, Executor, PgConnection, Row, SqlSafeStr, TypeInfo, ValueRef,
    postgres::PgRow,
};

use crate::config::Pooler;

/// What came of one statement.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Vec<Value>>,
    /// There are more rows.
    pub(crate) is_cut: bool,
    pub(crate) affected: u64,
}

/// Prepares a connection, which is not to be used for anything else afterwards: the statements find the namespace in the
/// setting `nexus.namespace`.
pub(crate) async fn prepare(
    connection: &mut PgConnection,
    pooler: Pooler,
    namespace: &str,
    may_write: bool,
) -> sqlx::Result<()> {
    let is_pooled = pooler == Pooler::Transaction;
    if !may_write {
        // For the session, so that a `commit` among the statements does not end it.
        let read_only = if is_pooled {
            "set transaction read only"
        } else {
            "set default_transaction_read_only = on"
        };
        connection.execute(sqlx::raw_sql(read_only)).await?;
    }
    sqlx::query("select set_config('nexus.namespace', $1, $2)")
        .bind(namespace)
        .bind(is_pooled)
        .execute(connection)
        .await
        .map(drop)
}

/// Runs statements as they stand and returns at most `limit` rows of each. If they only read, nothing is asked for that
/// comes behind the limit, and the connection is in the middle of an answer then.
pub(crate) async fn run(
    connection: &mut PgConnection,
    text: String,
    limit: usize,
    may_write: bool,
) -> sqlx::Result<Vec<Outcome>> {
    let statements = sqlx::raw_sql(AssertSqlSafe(text).into_sql_str());
    let mut answers = connection.fetch_many(statements).boxed();
    let mut outcomes = Vec::new();
    let mut outcome = Outcome::default();
    while let Some(answer) = answers.try_next().await? {
        match answer {
            Either::Left(done) => {
                outcome.affected = done.rows_affected();
                outcomes.push(std::mem::take(&mut outcome));
            }
            Either::Right(_) if outcome.rows.len() >= limit => {
                outcome.is_cut = true;
                if !may_write {
                    outcomes.push(outcome);
                    return Ok(outcomes);
                }
            }
            Either::Right(row) => {
                if outcome.columns.is_empty() {
                    let columns = row.columns().iter();
                    outcome.columns = columns.map(|column| column.name().to_owned()).collect();
                }
                outcome.rows.push(values(&row)?);
            }
        }
    }
    Ok(outcomes)
}

/// Numbers, truth values and JSON as they are, everything else in the text of the server.
fn values(row: &PgRow) -> sqlx::Result<Vec<Value>> {
    (0..row.len())
        .map(|index| {
            let value = row.try_get_raw(index)?;
            if value.is_null() {
                return Ok(Value::Null);
            }
            let type_info = value.type_info();
            let text = value.as_str().map_err(sqlx::Error::Decode)?;
            let parsed = match type_info.name() {
                "BOOL" => Some(Value::Bool(text == "t")),
                "INT2" | "INT4" | "INT8" | "FLOAT4" | "FLOAT8" | "JSON" | "JSONB" => {
                    serde_json::from_str(text).ok()
                }
                _ => None,
            };
            Ok(parsed.unwrap_or_else(|| Value::String(text.to_owned())))
        })
        .collect()
}

/// Name, what it shows, and text. The namespace is in the setting `nexus.namespace`.
pub(crate) const CANNED: &[(&str, &str, &str)] = &[
    (
        "namespaces",
        "the namespaces",
        "select * from core.namespaces",
    ),
    (
        "nodes",
        "the nodes, and how long ago each was heard of",
        "select node_id, display_name, namespace, last_heartbeat, now() - last_heartbeat as time_since_heartbeat
from core.nodes
where namespace = current_setting('nexus.namespace')",
    ),
    (
        "active-nodes",
        "the nodes that were heard of in the last five minutes",
        "select node_id, display_name, last_heartbeat, now() - last_heartbeat as time_since_heartbeat
from core.nodes
where namespace = current_setting('nexus.namespace')
  and last_heartbeat > now() - interval '5 minutes'
order by last_heartbeat desc",
    ),
    (
        "events",
        "the newest hundred events",
        "select event_id, event_type, producer_node_id, emitted_at, payload
from core.event_log
where namespace = current_setting('nexus.namespace')
order by emitted_at desc
limit 100",
    ),
    (
        "events-by-type",
        "how many events of each type were emitted in the last 24 hours",
        "select event_type, count(*) as count, min(emitted_at) as first_event, max(emitted_at) as last_event
from core.event_log
where namespace = current_setting('nexus.namespace')
  and emitted_at > now() - interval '24 hours'
group by event_type
order by count desc",
    ),
    (
        "scheduled-tasks",
        "the scheduled tasks",
        "select name, cron_expression, event_type, active, updated_at
from core.scheduled_tasks
where namespace = current_setting('nexus.namespace')",
    ),
    (
        "queue-metrics",
        "depth and ages of all queues; counts every message",
        "select queue_name, queue_length, newest_msg_age_seconds, oldest_msg_age_seconds
from core.queue_metrics
where queue_name like 'core_events_%'",
    ),
    (
        "cron-jobs",
        "the scheduled tasks in the columns of pg_cron",
        "select jobid, schedule, command, nodename, nodeport, database, username, active
from core.cron_job
where jobname like '%' || current_setting('nexus.namespace') || '%'",
    ),
    (
        "cron-runs",
        "the newest fifty runs of scheduled tasks in the columns of pg_cron",
        "select j.jobname, jr.runid, jr.status, jr.return_message, jr.start_time, jr.end_time
from core.cron_job j
join core.cron_job_run_details jr on j.jobid = jr.jobid
where j.jobname like '%' || current_setting('nexus.namespace') || '%'
order by jr.start_time desc
limit 50",
    ),
    (
        "partitions",
        "the months of the event log",
        "select schemaname, tablename, tableowner
from pg_tables
where tablename like 'event_log%'",
    ),
];
