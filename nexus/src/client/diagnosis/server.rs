//! The server, whatever is in the database.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::PgConnection;

use super::{Bounds, Finding, Severity};
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
    let switches = [
        (
            "fsync",
            &server.fsync,
            Severity::Error,
            "fsync-off",
            "a crash of the machine can lose the whole database",
        ),
        (
            "full_page_writes",
            &server.full_page_writes,
            Severity::Error,
            "full-page-writes-off",
            "a crash of the machine can tear pages apart",
        ),
        (
            "synchronous_commit",
            &server.synchronous_commit,
            Severity::Warning,
            "synchronous-commit-off",
            "a crash of the server loses the events that were emitted last, and handlers run again",
        ),
        (
            "autovacuum",
            &server.autovacuum,
            Severity::Error,
            "autovacuum-off",
            "nobody cleans the queues up, and claims get slower with every message",
        ),
        (
            "track_counts",
            &server.track_counts,
            Severity::Error,
            "autovacuum-off",
            "autovacuum does not see what there is to clean up, and claims get slower with every message",
        ),
    ];
    for (setting, value, severity, id, consequence) in switches {
        if value == "off" {
            let what = format!("{setting} is off: {consequence}");
            let help = format!("alter system set {setting} = on; select pg_reload_conf()");
            found.push(Finding::new(severity, id, what, help).about(setting));
        }
    }
    if server.sessions * 100 >= server.most_sessions * bounds.sessions_percent {
        let what = format!(
            "{} of {} connections are open",
            server.sessions, server.most_sessions
        );
        let help = "fewer or smaller pools, a pooler, or a higher max_connections: see `select usename, application_name, \
                    count(*) from pg_stat_activity group by 1, 2 order by 3 desc`";
        found.push(Finding::warning("connections-near-end", what, help).about("max_connections"));
    }
    if server.wal_level == "minimal" {
        let what = "wal_level is minimal: there can be no standby, and no backup by archived WAL";
        let help = "alter system set wal_level = replica, and restart the server";
        found.push(Finding::note("wal-level-minimal", what, help).about("wal_level"));
    }
    if server.idle_in_transaction_timeout == "0" {
        let what = "a transaction of this role may be left open for ever, which keeps queues from being cleaned up; \
                    handlers have limits of their own";
        let help = "alter role … set idle_in_transaction_session_timeout = '5min', above all for people's roles";
        let finding = Finding::note("idle-in-transaction-unlimited", what, help);
        found.push(finding.about("idle_in_transaction_session_timeout"));
    }
    Ok(found)
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
