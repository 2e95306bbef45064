//! A namespace: who works there, and what waits.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use sqlx::PgConnection;

use super::{Bounds, Finding};
use crate::store::{
    depths, diagnosis,
    nodes::{self as stored_nodes, Listed},
    scheduled_tasks, subscriptions,
};

/// Counting stops here.
const MOST: i64 = 1_000;

pub(super) async fn known(
    connection: &mut PgConnection,
    namespace: &str,
    is_known: &mut bool,
) -> sqlx::Result<Vec<Finding>> {
    let known = subscriptions::namespaces(connection).await?;
    *is_known = known.iter().any(|known| known == namespace);
    if *is_known {
        return Ok(Vec::new());
    }
    let have = if known.is_empty() {
        "it has none that this role may see".to_owned()
    } else {
        format!("it has {}", known.join(", "))
    };
    let finding = Finding::error(
        "namespace-unknown",
        format!("there is no namespace `{namespace}` in this database; {have}"),
        "--namespace names another one; an app that is started makes its own",
    );
    Ok(vec![finding.about(namespace)])
}

pub(super) async fn rights(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let rights = diagnosis::rights(connection, namespace).await?;
    let (role, owner) = (&rights.role, &rights.owner);
    let bind = format!("as role {owner}: select core.grant_namespace('{namespace}', '{role}')");
    let mut found = Vec::new();
    if !rights.may_run_apps {
        let what = if rights.may_read {
            format!(
                "role {role} may only look at namespace {namespace}: no app starts as it, and it emits nothing"
            )
        } else {
            format!("role {role} is not bound to namespace {namespace}: no app starts as it")
        };
        found.push(Finding::note("role-looks-only", what, bind.clone()).about(role));
    }
    if !rights.missing.is_empty() {
        let what = format!("role {role} lacks rights on {}", rights.missing.join(", "));
        found.push(Finding::error("rights-missing", what, bind).about(role));
    }
    Ok(found)
}

pub(super) async fn queues(
    connection: &mut PgConnection,
    bounds: Bounds,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let rights = diagnosis::rights(connection, namespace).await?;
    let queues = diagnosis::queues(connection, namespace, rights.may_run_apps).await?;
    let mut found = Vec::new();
    for queue in queues {
        let (group, table) = (&queue.group, format!("pgmq.q_{}", queue.name));
        let ensure = format!("select core.ensure_group('{namespace}', '{group}')");
        if !queue.is_there {
            found.push(
                Finding::error(
                    "queue-missing",
                    format!("queue {table} of group {group} is gone; events that waited in it are still in the log"),
                    format!("{ensure}, then `nexus replay start {group}` for what waited"),
                )
                .about(group),
            );
            continue;
        }
        if !queue.has_index {
            found.push(
                Finding::warning(
                    "queue-index-missing",
                    format!("{table} has not got the index that claims walk: each of them reads the whole queue"),
                    format!("select core.tune_queue('{}', true)", queue.name),
                )
                .about(group),
            );
        }
        if !queue.is_granted {
            found.push(
                Finding::error(
                    "rights-missing",
                    format!("role {} lacks rights on {table}", rights.role),
                    format!(
                        "as role {}: select core.grant_namespace('{namespace}', '{}')",
                        rights.owner, rights.role
                    ),
                )
                .about(&table),
            );
        }
        if !queue.is_vacuumed {
            found.push(
                Finding::warning(
                    "autovacuum-off",
                    format!("autovacuum is off for {table}: claims get slower with every message"),
                    format!("alter table {table} reset (autovacuum_enabled)"),
                )
                .about(&table),
            );
        }
        if queue.dead >= bounds.dead_rows && queue.dead > queue.live {
            found.push(
                Finding::warning(
                    "queue-bloat",
                    format!(
                        "{table} has about {} dead rows beside {} live ones",
                        queue.dead, queue.live
                    ),
                    format!("vacuum (verbose) {table}; if dead rows stay, see who keeps Postgres from cleaning up"),
                )
                .about(&table),
            );
        }
    }
    Ok(found)
}

/// As it is told: nothing is counted beyond the limit.
fn number(counted: i64, what: &str) -> String {
    match counted {
        1 => format!("1 {what}"),
        0..=MOST => format!("{counted} {what}s"),
        _ => format!("more than {MOST} {what}s"),
    }
}

pub(super) async fn groups(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let mut found = Vec::new();
    let there: BTreeSet<String> = diagnosis::queues(connection, namespace, false)
        .await?
        .into_iter()
        .filter(|queue| queue.is_there)
        .map(|queue| queue.name)
        .collect();
    for row in subscriptions::group_rows(connection, namespace).await? {
        let group = &row.group;
        if let Some(since) = row.paused_at {
            let since = since.strftime("%Y-%m-%d %H:%M:%S");
            found.push(
                Finding::warning(
                    "group-paused",
                    format!("group {group} has been paused since {since} UTC: its messages gather"),
                    format!("nexus groups resume {group}"),
                )
                .about(group),
            );
        }
        let letters = format!("{}_dlq", row.queue);
        if !there.contains(&letters) {
            continue;
        }
        let letters = depths::of_queue(connection, &letters, MOST).await?.messages;
        if letters > 0 {
            found.push(
                Finding::warning(
                    "dead-letters",
                    format!("group {group} has {}", number(letters, "dead letter")),
                    format!("nexus dead-letters list {group} --by-cause"),
                )
                .about(group),
            );
        }
    }
    Ok(found)
}

pub(super) async fn nodes(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let now = diagnosis::time(connection, true).await?;
    let tolerated = now.saturating_add(SignedDuration::from_secs(5));
    let tolerated = tolerated.unwrap_or(Timestamp::MAX);
    let mut found = Vec::new();
    // A process that is started again and again leaves many of them.
    let mut dead: BTreeMap<String, Vec<Listed>> = BTreeMap::new();
    for node in stored_nodes::list(connection, namespace).await? {
        if !node.is_live {
            dead.entry(node.app.clone()).or_default().push(node);
        } else if node.last_heartbeat > tolerated {
            let (id, ahead) = (&node.id, node.last_heartbeat.duration_since(now).as_secs());
            found.push(
                Finding::warning(
                    "clock-skew",
                    format!(
                        "node {id} of app {} was heard of {ahead} s from now: the clock of the server has gone back, \
                         and leases last that much longer",
                        node.app
                    ),
                    "let a time service such as chrony set the server's clock, before a failover those of all servers",
                )
                .about(id),
            );
        }
    }
    for (app, nodes) in dead {
        let Some(last) = nodes.iter().max_by_key(|node| node.last_heartbeat) else {
            continue;
        };
        let silent = now.duration_since(last.last_heartbeat).as_secs();
        let number = number(nodes.len().try_into().unwrap_or(i64::MAX), "node");
        found.push(
            Finding::warning(
                "node-dead",
                format!("{number} of app {app} fell silent without a goodbye, the last one, {}, {silent} s ago", last.id),
                "look why the process ended; nexus nodes reap forgets it, nodes do so after a day",
            )
            .about(app),
        );
    }
    Ok(found)
}

pub(super) async fn handlers(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let there: BTreeSet<String> = diagnosis::queues(connection, namespace, false)
        .await?
        .into_iter()
        .filter(|queue| queue.is_there)
        .map(|queue| queue.name)
        .collect();
    let mut found = Vec::new();
    for row in subscriptions::list(connection, namespace).await? {
        let (group, handler) = (&row.group, &row.handler);
        if !there.contains(&row.queue) {
            continue;
        }
        if !row.is_live {
            let id = row.subscription_id;
            let waiting = depths::of_handler(connection, id, &row.queue, MOST).await?;
            let waits = number(waiting.messages, "message");
            found.push(
                Finding::warning(
                    "handler-not-live",
                    format!("no live node runs {group}/{handler} of app {}: {waits} for it", row.app),
                    format!("start a build that has it; if there is none any more, nexus groups retire {group} {handler}"),
                )
                .about(format!("{group}/{handler}")),
            );
            continue;
        }
        for (version, waiting) in
            subscriptions::unserved_versions(connection, namespace, &row).await?
        {
            found.push(
                Finding::warning(
                    "version-not-live",
                    format!(
                        "no live node runs {group}/{handler} for version {version} of {}: {} for it",
                        row.event_type,
                        number(waiting, "message")
                    ),
                    "start a build that takes this version, or give its messages up by `Client::retire_version`",
                )
                .about(format!("{group}/{handler}")),
            );
        }
    }
    Ok(found)
}

pub(super) async fn unhandled(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let types = diagnosis::unhandled_types(connection, namespace).await?;
    Ok(types
        .into_iter()
        .map(|event_type| {
            Finding::note(
                "event-unhandled",
                format!("events of type {event_type} are in the log, and no handler is subscribed to them"),
                format!("nexus events list --type {event_type}; a handler with `from = \"beginning\"` gets them all"),
            )
            .about(event_type)
        })
        .collect())
}

pub(super) async fn schedules(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Finding>> {
    let tasks = scheduled_tasks::list(connection, namespace, None).await?;
    let mut found = Vec::new();
    for task in tasks {
        let name = &task.name;
        if let Some(error) = task.last_error.filter(|_| !task.active) {
            found.push(
                Finding::warning(
                    "schedule-inactive",
                    format!("scheduled task {name} does not run: {error}"),
                    "mend it, and start the app again; or nexus schedules remove it",
                )
                .about(name),
            );
        } else if task.paused_at.is_some() {
            found.push(
                Finding::note(
                    "schedule-paused",
                    format!("scheduled task {name} is paused"),
                    format!("nexus schedules resume {name}"),
                )
                .about(name),
            );
        }
    }
    Ok(found)
}
