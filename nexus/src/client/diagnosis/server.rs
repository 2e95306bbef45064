//! The server, whatever is in the database.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::PgConnection;

use super::{Bounds, Finding};
use crate::store::{self, diagnosis, horizon};

pub(super) async fn settings(
    connection: &mut PgConnection,
    bounds: Bounds,
) -> sqlx::Result<Vec<Finding>> {
    let server = diagnosis::server(connection).await?;
    let mut found = Vec::new();
    if server.is_read_only {
        found.push(Finding::error(
            "read-only",
            "the server takes no writes: it is a standby, or `default_transaction_read_only` is on",
            "connect to the primary, or `alter database … reset default_transaction_read_only`",
        ));
    }
    let off = |value: &str| value == "off";
    if off(&server.fsync) {
        found.push(set(
            Finding::error(
                "fsync-off",
                "fsync is off: a crash of the machine can lose the whole database",
                "alter system set fsync = on; select pg_reload_conf()",
            ),
            "fsync",
        ));
    }
    if off(&server.full_page_writes) {
        found.push(set(
            Finding::error(
                "full-page-writes-off",
                "full_page_writes is off: a crash of the machine can tear pages apart",
                "alter system set full_page_writes = on; select pg_reload_conf()",
            ),
            "full_page_writes",
        ));
    }
    if off(&server.synchronous_commit) {
        found.push(set(Finding::warning(
            "synchronous-commit-off",
            "synchronous_commit is off: a crash of the server loses the last events that were emitted, and handlers run again",
            "alter role … reset synchronous_commit, or alter system reset synchronous_commit; select pg_reload_conf()",
        ), "synchronous_commit"));
    }
    for (name, value) in [
        ("autovacuum", &server.autovacuum),
        ("track_counts", &server.track_counts),
    ] {
        if off(value) {
            found.push(set(Finding::error(
                "autovacuum-off",
                format!("{name} is off: nobody cleans the queues up, and claims get slower with every message"),
                format!("alter system set {name} = on; select pg_reload_conf()"),
            ), name));
        }
    }
    if server.sessions * 100 >= server.most_sessions * bounds.sessions_percent {
        found.push(set(Finding::warning(
            "connections-near-end",
            format!("{} of {} connections are open", server.sessions, server.most_sessions),
            "fewer or smaller pools, a pooler, or a higher max_connections: see `select usename, application_name, \
             count(*) from pg_stat_activity group by 1, 2 order by 3 desc`",
        ), "max_connections"));
    }
    if server.wal_level == "minimal" {
        found.push(set(
            Finding::note(
                "wal-level-minimal",
                "wal_level is minimal: there can be no standby, and no backup by archived WAL",
                "alter system set wal_level = replica, and restart the server",
            ),
            "wal_level",
        ));
    }
    if server.idle_in_transaction_timeout == "0" {
        found.push(set(Finding::note(
            "idle-in-transaction-unlimited",
            "a transaction of this role may be left open for ever, which keeps queues from being cleaned up; handlers have limits of their own",
            "alter role … set idle_in_transaction_session_timeout = '5min', above all for people's roles",
        ), "idle_in_transaction_session_timeout"));
    }
    Ok(found)
}

fn set(finding: Finding, setting: &str) -> Finding {
    finding.about(setting)
}

pub(super) async fn horizon(
    connection: &mut PgConnection,
    bounds: Bounds,
) -> sqlx::Result<Vec<Finding>> {
    let Some(holder) = horizon::oldest_holder(connection).await? else {
        return Ok(Vec::new());
    };
    let is_long = holder.age.is_some_and(|age| age >= bounds.held_for);
    if !is_long && holder.transactions < bounds.held_transactions {
        return Ok(Vec::new());
    }
    let pid = holder.pid.map(|pid| format!(" {pid}")).unwrap_or_default();
    let user = holder
        .user
        .map(|user| format!(" of role {user}"))
        .unwrap_or_default();
    let age = holder
        .age
        .map(|age| format!(" for {} s", age.as_secs()))
        .unwrap_or_default();
    let what = format!(
        "{}{pid} `{}`{user} has kept Postgres from cleaning up{age}, {} transactions by now",
        holder.kind, holder.name, holder.transactions
    );
    let help = match (&*holder.kind, holder.pid) {
        ("prepared transaction", _) => {
            format!("rollback prepared {}, or commit it", quoted(&holder.name))
        }
        ("replication slot", _) => format!(
            "select pg_drop_replication_slot({}), unless somebody will read it",
            quoted(&holder.name)
        ),
        ("standby", _) => {
            "end the long query of the standby, or turn its hot_standby_feedback off".to_owned()
        }
        (_, Some(pid)) => format!("select pg_terminate_backend({pid})"),
        (_, None) => "end it".to_owned(),
    };
    let finding = Finding::warning("xmin-holder", what, help).about(holder.name);
    Ok(vec![finding])
}

/// As a literal of SQL.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

pub(super) async fn clocks(
    connection: &mut PgConnection,
    bounds: Bounds,
    before: Timestamp,
    has_schema: bool,
) -> sqlx::Result<Vec<Finding>> {
    let there = diagnosis::time(connection, has_schema).await?;
    let skew = skew(before, there, Timestamp::now());
    if skew < bounds.skew {
        return Ok(Vec::new());
    }
    let is_ahead = if there > before { "ahead of" } else { "behind" };
    Ok(vec![Finding::warning(
        "clock-skew",
        format!(
            "the clock of the database is {:.1} s {is_ahead} this machine's; nexus goes by the database's",
            skew.as_secs_f64()
        ),
        "let a time service such as chrony set both",
    )])
}

/// How far a clock is beside ours at least, that was read between two moments of ours.
fn skew(before: Timestamp, there: Timestamp, after: Timestamp) -> Duration {
    if there < before {
        before.duration_since(there).unsigned_abs()
    } else if there > after {
        there.duration_since(after).unsigned_abs()
    } else {
        Duration::ZERO
    }
}

pub(super) async fn slow_statements(
    connection: &mut PgConnection,
    bounds: Bounds,
) -> sqlx::Result<Vec<Finding>> {
    let unknown = |why: &str| {
        vec![Finding::note(
            "slow-statements-unknown",
            format!("{why}, so slow statements are not known"),
            "shared_preload_libraries = 'pg_stat_statements', restart the server, then create extension pg_stat_statements",
        )]
    };
    let Some(schema) = diagnosis::schema_of_statements(connection).await? else {
        return Ok(unknown("pg_stat_statements is not there"));
    };
    let slow = match diagnosis::slow_statements(connection, &schema, bounds.slow).await {
        Ok(slow) => slow,
        // Made, but not loaded when the server started.
        Err(error) if store::code(&error).as_deref() == Some("55000") => {
            return Ok(unknown("pg_stat_statements is not loaded"));
        }
        Err(error) => return Err(error),
    };
    let findings = slow.into_iter().map(|slow| {
        let what = format!(
            "{} ms on average, {} times: {}",
            slow.mean.as_millis(),
            slow.calls,
            slow.text
        );
        let help = format!(
            "explain (analyze, buffers) it; select * from {schema}.pg_stat_statements where queryid = {}",
            slow.query_id
        );
        let finding = if slow.is_ours {
            Finding::warning("slow-statement", what, help)
        } else {
            Finding::note("slow-statement", what, help)
        };
        finding.about(slow.query_id.to_string())
    });
    Ok(findings.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_told_from_a_slow_answer() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        assert_eq!(skew(at(10), at(12), at(15)), Duration::ZERO);
        assert_eq!(skew(at(10), at(7), at(15)), Duration::from_secs(3));
        assert_eq!(skew(at(10), at(19), at(15)), Duration::from_secs(4));
    }
}
