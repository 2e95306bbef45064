//! What has to be done from time to time, by whichever node gets to it.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sqlx::Connection;

use super::{Node, guard::Guard, scheduler};
use crate::{
    client::DeadLetterFilter,
    config::Pooler,
    event::Headers,
    registry::LINK_ITS_CRATE,
    store::{
        self, dead_letters, maintenance, pg_cron,
        queue::{self, GivenUp},
        replays, retirements, scheduled_tasks, subscriptions,
    },
};

/// New subscriptions are settled, and `pg_cron`, partitions and expired rows looked after, this often.
const EVERY: Duration = Duration::from_secs(2);
const MAINTAIN_EVERY: u32 = 30;

/// What nobody runs is reported at the start and then every ten minutes.
const REPORT_EVERY: u32 = 300;

/// Messages of retired subscriptions that are moved in one transaction.
const MOST: i32 = 1_000;

/// Messages of unknown handlers are looked for this often.
const EXPLAIN_EVERY: u32 = 5;

/// Messages given up in one round, of each queue.
const MOST_UNEXPLAINED: i64 = 100;

/// The oldest snapshot is looked for this often.
const GUARD_EVERY: u32 = 5;

/// How long one round may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) async fn run(node: Arc<Node>) {
    let mut round = 0_u32;
    let mut guard = Guard::default();
    while !node.stop.is_cancelled() {
        let care = Box::pin(care(&node, round.is_multiple_of(MAINTAIN_EVERY)));
        if let Err(error) = store::answered_within(PATIENCE, care).await {
            node.trouble.met("look after the database", &error);
        }
        if round.is_multiple_of(REPORT_EVERY)
            && let Err(error) = store::answered_within(PATIENCE, report(&node)).await
        {
            node.trouble
                .met("look for messages that nobody runs", &error);
        }
        if round.is_multiple_of(EXPLAIN_EVERY) {
            let care = give_up_unexplained(&node);
            if let Err(error) = store::answered_within(PATIENCE, care).await {
                node.trouble
                    .met("look for messages of unknown handlers", &error);
            }
        }
        if round.is_multiple_of(GUARD_EVERY)
            && let Err(error) = store::answered_within(PATIENCE, guard.look(&node)).await
        {
            node.trouble.met("look for the oldest snapshot", &error);
        }
        round = round.wrapping_add(1);
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = node.stop.cancelled() => {}
        }
    }
}

/// Each step has a connection, and so a transaction of its own behind a pooler.
async fn care(node: &Node, everything: bool) -> sqlx::Result<()> {
    if everything {
        maintain(node).await?;
    }
    if node.defines_app.load(Ordering::Relaxed) && is_any_missing(node).await? {
        tracing::warn!(
            "handlers of this node are not subscribed, somebody has retired them while it seemed dead; subscribing them again"
        );
        define_app(node).await?;
    }
    if !node.defines_app.load(Ordering::Relaxed) && define_app(node).await? {
        node.defines_app.store(true, Ordering::Relaxed);
        tracing::info!(
            app = node.row.app,
            "no newer build of this app is alive, this one defines subscriptions and schedules"
        );
    }
    if node.declaration.uses_pg_cron() {
        sync_jobs(node).await?;
    }
    if let Err(error) = scheduler::fire_overdue(node).await {
        node.trouble.met("fire what pg_cron has left", &error);
    }
    let mut connection = node.connection().await?;
    let namespace = &node.row.namespace;
    for id in retirements::open(&mut connection, namespace).await? {
        while retirements::move_messages(&mut connection, id, MOST).await? == Some(MOST)
            && !node.stop.is_cancelled()
        {
            connection.commit().await?;
        }
        connection.commit().await?;
    }
    let settled = maintenance::settle_subscriptions(&mut connection, namespace).await?;
    connection.give_back().await?;
    if settled > 0 {
        node.client.bell().ring_all_here();
    }
    if everything
        && let Err(error) = expire_letters(node).await
        && !node.mend(&error).await
    {
        node.trouble
            .met("delete dead letters whose retention has passed", &error);
    }
    Ok(())
}

async fn maintain(node: &Node) -> sqlx::Result<()> {
    let namespace = &node.row.namespace;
    let mut connection = node.connection().await?;
    maintenance::maintain(&mut connection, namespace).await?;
    connection.give_back().await?;

    let mut connection = node.connection().await?;
    let retention = node.settings.retention;
    let dropped = match node.client.pooler() {
        Pooler::Session => maintenance::drop_expired_partitions(&mut connection, retention).await?,
        Pooler::Transaction => {
            maintenance::drop_an_expired_partition_within(&mut connection, retention).await?
        }
    };
    connection.give_back().await?;
    for name in dropped {
        tracing::info!(
            partition = name,
            "dropped a partition of the event log, its retention has passed"
        );
    }

    let mut connection = node.connection().await?;
    replays::forget_old(&mut connection, namespace).await?;
    let rescheduled = scheduled_tasks::reschedule_the_future(&mut connection, namespace).await?;
    connection.give_back().await?;
    for name in rescheduled {
        tracing::warn!(
            task = name,
            "the clock was set back since a scheduled task ran, its next run is computed again"
        );
    }
    Ok(())
}

/// Gives up what waits for a handler that the group never had, or has no more: written by hand, most often.
async fn give_up_unexplained(node: &Node) -> sqlx::Result<()> {
    let mut connection = node.connection().await?;
    for queue in subscriptions::queues(&mut connection, &node.row.namespace).await? {
        for message in queue::unexplained(&mut connection, &queue, MOST_UNEXPLAINED).await? {
            let headers = serde_json::from_str::<Headers>(&message.headers);
            let (attempts, errors) = headers.map_or((0, Vec::new()), |headers| {
                (headers.attempts, headers.errors)
            });
            let given_up = GivenUp {
                msg_id: message.msg_id,
                read_ct: message.read_ct,
                reason: "Unknown handler",
                error: format!(
                    "no handler `{}` is subscribed in the group of this queue: redrive it once an app has it",
                    message.handler
                ),
                attempts,
                errors,
            };
            if queue::dead_letter(&mut connection, &queue, &given_up).await? {
                tracing::error!(
                    queue,
                    msg_id = message.msg_id,
                    "dead-lettered a message: {}",
                    given_up.error
                );
            }
        }
    }
    connection.give_back().await
}

/// Dead letters deleted by one statement, and how many statements there are in one round at most for a
/// group: the rest comes with the next round.
const LETTERS: i32 = 1_000;
const BATCHES_OF_LETTERS: usize = 20;

/// Deletes dead letters whose retention has passed: those of the groups that this node works for, and in
/// the main queue, from which every node adopts, those that no handler was named for.
async fn expire_letters(node: &Node) -> sqlx::Result<()> {
    let retention = node.settings.letter_retention;
    let own = node.row.handlers.as_array().into_iter().flatten();
    let mut groups: BTreeMap<&str, bool> = own
        .filter_map(|handler| Some((handler.get("group")?.as_str()?, true)))
        .collect();
    groups.entry("default").or_insert(false);
    for (group, is_own) in groups {
        let namespace = &node.row.namespace;
        let old = DeadLetterFilter::new().older_than(retention);
        let filter = if is_own { old } else { old.without_handler() }.json();
        let mut expired = 0;
        for _ in 0..BATCHES_OF_LETTERS {
            let mut connection = node.connection().await?;
            let batch =
                dead_letters::purge(&mut connection, namespace, group, &filter, LETTERS, None)
                    .await?;
            connection.give_back().await?;
            expired += batch;
            if batch < LETTERS.into() || node.stop.is_cancelled() {
                break;
            }
        }
        if expired > 0 {
            tracing::info!(
                group,
                letters = expired,
                ?retention,
                "deleted dead letters, their retention has passed"
            );
        }
    }
    Ok(())
}

/// Says which messages wait for a build that no node has: those of this app, and of apps that have no
/// node at all.
async fn report(node: &Node) -> sqlx::Result<()> {
    let nexus_node = &node.row;
    let namespace = &nexus_node.namespace;
    let mut connection = node.connection().await?;
    for row in subscriptions::list(&mut connection, namespace).await? {
        if row.app != nexus_node.app && row.is_app_live {
            continue;
        }
        let unserved = subscriptions::unserved_versions(&mut connection, namespace, &row).await?;
        let messages = |count: i64| {
            if count > subscriptions::MOST_COUNTED {
                format!("more than {}", subscriptions::MOST_COUNTED)
            } else {
                count.to_string()
            }
        };
        if row.is_live {
            for (version, count) in unserved {
                tracing::warn!(
                    group = row.group,
                    handler = row.handler,
                    event_type = row.event_type,
                    version,
                    waiting = messages(count),
                    "no live build runs this handler for this version; its messages wait until one does, or until they are retired (Client::retire_version)"
                );
            }
        } else {
            tracing::warn!(
                group = row.group,
                handler = row.handler,
                event_type = row.event_type,
                waiting = messages(unserved.iter().map(|(_, count)| count).sum()),
                "no live build declares this handler; what is sent to it waits until one does, or until it is retired (Client::retire). If this build should: {LINK_ITS_CRATE}"
            );
        }
    }
    connection.give_back().await
}

/// Pauses and resumes `pg_cron`'s jobs with their tasks, and makes again what somebody removed.
async fn sync_jobs(node: &Node) -> sqlx::Result<()> {
    let (namespace, app) = (&node.row.namespace, &node.row.app);
    let mut connection = node.connection().await?;
    let mut tx = connection.begin().await?;
    subscriptions::lock(&mut tx, namespace).await?;
    let changed = pg_cron::sync_jobs(&mut tx, namespace, app).await?;
    tx.commit().await?;
    connection.give_back().await?;
    if changed > 0 {
        tracing::info!(
            changed,
            "brought the jobs of pg_cron in line with the scheduled tasks"
        );
    }
    Ok(())
}

async fn is_any_missing(node: &Node) -> sqlx::Result<bool> {
    let mut connection = node.connection().await?;
    let row = &node.row;
    let is_missing =
        subscriptions::is_any_missing(&mut connection, &row.namespace, &row.handlers).await?;
    connection.give_back().await?;
    Ok(is_missing)
}

/// After a roll-back the build that was superseded defines the app again.
async fn define_app(node: &Node) -> sqlx::Result<bool> {
    let mut connection = node.connection().await?;
    let mut tx = connection.begin().await?;
    subscriptions::lock(&mut tx, &node.row.namespace).await?;
    let is_defined = node.declaration.declare(&node.row, &mut tx).await?;
    tx.commit().await?;
    connection.give_back().await?;
    Ok(is_defined)
}
