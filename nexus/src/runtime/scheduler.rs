//! Fires the ticks of scheduled tasks, each once in the cluster.
//!
//! Every node looks; row locks keep them apart, and the unique key of `core.ticks` holds even if
//! the clock or a restart makes a task due twice.

use std::{collections::HashSet, sync::Arc, time::Duration};

use jiff::SignedDuration;
use sqlx::{Acquire, PgConnection, types::Uuid};

use super::{
    Node,
    points::{Point, Sleeper},
};
use crate::{
    handler::with_sources,
    schedule::{Schedule, misfire},
    store::{
        self, nodes, pg_cron,
        scheduled_tasks::{self, Due},
    },
};

/// Longest sleep: how late a task is noticed that another node has changed, or whose time a moved
/// clock has brought.
const LONGEST_SLEEP: Duration = Duration::from_millis(500);

/// How long to leave a due task to the node that has locked it.
const LOCKED_SLEEP: Duration = Duration::from_millis(100);

/// How long a transaction may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Tasks of one transaction, which locks them. Small enough that the first of many need not wait for the
/// last, and that another node can take a share.
const MOST_TASKS: usize = 250;

/// Ticks of one transaction: what a task fires that has missed many shares it with the others.
const MOST_TICKS: usize = 1_000;

/// Payloads of one transaction, in bytes of their text, unless one alone has more. Each is written once for
/// the log and once for each handler.
const MOST_BYTES: usize = 8 * 1024 * 1024;

pub(crate) async fn run(node: Arc<Node>) {
    // Whether there was more to fire than one transaction takes when something was due last. Then two
    // are made at a time, from the first on: with 1,000 tasks due at once the last is fired a third sooner.
    let mut is_much = false;
    while !node.stop.is_cancelled() {
        let second = async {
            if is_much {
                round(&node).await
            } else {
                Round::NONE
            }
        };
        let (first, second) = tokio::join!(round(&node), second);
        if first.tasks + second.tasks > 0 {
            is_much = first.tasks.max(second.tasks) == MOST_TASKS;
        }
        tokio::select! {
            () = node.points.sleep(Sleeper::Scheduler, first.pause.min(second.pause)) => {}
            () = node.stop.cancelled() => {}
        }
    }
}

/// What one transaction found.
struct Round {
    /// How many tasks were due.
    tasks: usize,
    /// How long to sleep.
    pause: Duration,
}

impl Round {
    const NONE: Self = Self {
        tasks: 0,
        pause: LONGEST_SLEEP,
    };
}

async fn round(node: &Node) -> Round {
    let all = store::despite_conflicts(|| fire_due(node, Together::All));
    let error = match store::answered_within(PATIENCE, all).await {
        Ok(round) => return round,
        Err(error) => error,
    };
    if store::is_passing(&error) {
        node.trouble.met("fire scheduled tasks", &error);
        return Round::NONE;
    }
    tracing::warn!(%error, "could not fire scheduled tasks together, firing each apart");
    node.mend(&error).await;
    match store::answered_within(PATIENCE, fire_due(node, Together::Apart)).await {
        Ok(round) => round,
        Err(error) => {
            node.trouble.met("fire scheduled tasks", &error);
            Round::NONE
        }
    }
}

/// How tasks are fired that are due in one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Together {
    /// By one statement.
    All,
    /// One by one: a task whose event cannot be emitted holds up no other.
    Apart,
}

/// Fires what is due.
async fn fire_due(node: &Node, together: Together) -> sqlx::Result<Round> {
    let namespace = &node.row.namespace;
    let mut connection = node.connection().await?;
    let until_next = scheduled_tasks::until_next(&mut connection, namespace).await?;
    if let None | Some(1..) = until_next {
        connection.give_back().await?;
        let pause = until_next.map_or(LONGEST_SLEEP, |micros| {
            Duration::from_micros(micros.max(1_000).unsigned_abs()).min(LONGEST_SLEEP)
        });
        return Ok(Round { tasks: 0, pause });
    }
    let mut tx = connection.begin().await?;
    let mut due = scheduled_tasks::lock_due(&mut tx, namespace, MOST_TASKS).await?;
    leave_bytes(&mut due);
    if !due.is_empty() {
        if nodes::is_fenced(&mut tx, &node.row.id, node.epoch).await? {
            tracing::warn!(
                node = node.row.id,
                "fired no scheduled task: another process has started with this node's id"
            );
            return Ok(Round::NONE);
        }
        let (queues, fired) = match together {
            Together::All => fire(&mut tx, namespace, &due).await?,
            Together::Apart => fire_apart(&mut tx, namespace, &due).await?,
        };
        let is_of = |name: &str| {
            due.iter()
                .any(|task| task.name == name && fired.contains(&task.task_id))
        };
        if !fired.is_empty() {
            node.points.reach(Point::BeforeTick, is_of).await?;
        }
        tx.commit().await?;
        connection.give_back().await?;
        if !fired.is_empty() {
            node.points.reach(Point::AfterTick, is_of).await?;
        }
        for task in due.iter().filter(|task| fired.contains(&task.task_id)) {
            let late = task.at.map(|at| task.now.duration_since(at));
            if let Some(late) = late.and_then(|late| late.try_into().ok()) {
                node.lateness.took(late);
            }
        }
        node.client.wake(queues);
        // There may be more, or a task that was behind is due again.
        return Ok(Round {
            tasks: due.len(),
            pause: Duration::ZERO,
        });
    }
    tx.commit().await?;
    connection.give_back().await?;
    // Due, and locked by another node, which may have stopped in the middle of it.
    Ok(Round {
        tasks: 0,
        pause: LOCKED_SLEEP,
    })
}

/// Fires what `pg_cron` has not fired for a minute: it was down, as the server was, or cannot run its jobs.
pub(super) async fn fire_overdue(node: &Node) -> sqlx::Result<()> {
    let namespace = &node.row.namespace;
    let mut connection = node.connection().await?;
    let mut tx = connection.begin().await?;
    let mut overdue = scheduled_tasks::lock_overdue(&mut tx, namespace, MOST_TASKS).await?;
    leave_bytes(&mut overdue);
    for task in &mut overdue {
        // As in `core.fire_due`: a minute is nothing to pg_cron.
        task.grace = task.grace.max(Duration::from_mins(1));
    }
    let queues = if overdue.is_empty() {
        Vec::new()
    } else {
        fire_apart(&mut tx, namespace, &overdue).await?.0
    };
    tx.commit().await?;
    connection.give_back().await?;
    node.client.wake(queues);
    for task in &overdue {
        if let Some(due_at) = task.at {
            let failure = last_failure(node, task.task_id).await.ok().flatten();
            tracing::warn!(
                task = task.name, %due_at,
                pg_cron = failure,
                "pg_cron did not fire a scheduled task for a minute, a node took care of it"
            );
        }
    }
    Ok(())
}

/// Leaves tasks to the next transaction whose payloads are too much for one, the first excepted.
fn leave_bytes(due: &mut Vec<Due>) {
    let mut bytes = 0;
    let fitting = due.iter().take_while(|task| {
        bytes += task.payload_bytes;
        bytes <= MOST_BYTES
    });
    let kept = fitting.count().max(1);
    due.truncate(kept);
}

async fn last_failure(node: &Node, task_id: Uuid) -> sqlx::Result<Option<String>> {
    let mut connection = node.connection().await?;
    let failure = pg_cron::last_failure(&mut connection, task_id).await?;
    connection.give_back().await?;
    Ok(failure)
}

/// As [`fire`], but puts tasks off whose events cannot be emitted.
async fn fire_apart(
    tx: &mut PgConnection,
    namespace: &str,
    due: &[Due],
) -> sqlx::Result<(Vec<String>, HashSet<Uuid>)> {
    let (mut queues, mut fired) = (Vec::new(), HashSet::new());
    for task in due {
        let mut savepoint = tx.begin().await?;
        match fire(&mut savepoint, namespace, std::slice::from_ref(task)).await {
            Ok((its_queues, its_task)) => {
                savepoint.commit().await?;
                queues.extend(its_queues);
                fired.extend(its_task);
            }
            Err(error) if store::is_passing(&error) => return Err(error),
            Err(error) => {
                savepoint.rollback().await?;
                tracing::error!(
                    task = task.name, %error,
                    "could not emit the event of a scheduled task, trying again in a minute"
                );
                let reason = with_sources(&error);
                scheduled_tasks::put_off(tx, task.task_id, &reason).await?;
            }
        }
    }
    Ok((queues, fired))
}

/// Fires the ticks of locked tasks and returns the queues that got messages, and the tasks that ticked.
async fn fire(
    tx: &mut PgConnection,
    namespace: &str,
    due: &[Due],
) -> sqlx::Result<(Vec<String>, HashSet<Uuid>)> {
    let bytes: usize = due.iter().map(|task| task.payload_bytes).sum();
    let limit = (MOST_TICKS / due.len())
        .min(MOST_BYTES / bytes.max(1))
        .max(1);
    let mut ticks = Vec::new();
    let mut next_runs = Vec::new();
    let mut failed: Vec<(Uuid, String)> = Vec::new();
    for task in due {
        let fail = |error: &dyn std::error::Error| {
            tracing::error!(
                task = task.name, %error,
                "made a scheduled task inactive, whose next run cannot be computed"
            );
            (task.task_id, error.to_string())
        };
        let schedule = match Schedule::parse(&task.expression, task.time_zone.as_deref()) {
            Ok(schedule) => schedule,
            Err(error) => {
                failed.push(fail(&error));
                continue;
            }
        };
        let at = match task.at.map_or_else(|| schedule.next_after(task.after), Ok) {
            Ok(at) if at <= task.now => at,
            Ok(at) => {
                next_runs.push((task.task_id, at));
                continue;
            }
            Err(error) => {
                failed.push(fail(&error));
                continue;
            }
        };
        let grace = SignedDuration::try_from(task.grace).unwrap_or(SignedDuration::MAX);
        let firing = misfire::firing(&schedule, task.misfire, grace, at, task.now, limit);
        if let Some(left_out) = firing.left_out {
            tracing::warn!(
                task = task.name, first = %left_out.first, last = %left_out.last, count = left_out.count,
                "left out ticks of a scheduled task that were missed"
            );
            scheduled_tasks::leave_out(tx, task.task_id, left_out).await?;
        }
        ticks.extend(firing.due.into_iter().map(|due_at| (task.task_id, due_at)));
        match firing.next {
            Ok(next) => next_runs.push((task.task_id, next)),
            Err(error) => failed.push(fail(&error)),
        }
    }
    let mut queues = Vec::new();
    let mut fired = HashSet::new();
    if !ticks.is_empty() {
        let event_ids;
        (event_ids, queues) = scheduled_tasks::fire(tx, namespace, &ticks).await?;
        for ((task_id, due_at), event_id) in ticks.iter().zip(event_ids) {
            tracing::debug!(%task_id, %due_at, event_id, "fired a tick");
            if event_id.is_some() {
                fired.insert(*task_id);
            }
        }
    }
    scheduled_tasks::set_next_runs(tx, &next_runs, &fired).await?;
    for (task_id, error) in &failed {
        scheduled_tasks::deactivate(tx, *task_id, error, fired.contains(task_id)).await?;
    }
    Ok((queues, fired))
}
