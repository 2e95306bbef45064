//! Fires the ticks of scheduled tasks, each once in the cluster.
//!
//! Every node looks; row locks keep them apart, and the unique key of `core.ticks` holds even if
//! the clock or a restart makes a task due twice.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use sqlx::Acquire;

use super::{
    Node,
    points::{Point, Sleeper},
};
use crate::{
    schedule::{Schedule, ScheduleError},
    store::{
        self, Failure,
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

/// Tasks fired in one transaction.
const MOST: i64 = 100;

/// A tick that was missed by no more than this is fired for its own time. After a longer outage
/// only the newest of the missed ticks is fired.
const GRACE: SignedDuration = SignedDuration::from_secs(60);

pub(crate) async fn run(node: Arc<Node>) {
    while !node.stop.is_cancelled() {
        let fired = tokio::time::timeout(PATIENCE, fire_due(&node)).await;
        let pause = match fired.unwrap_or_else(|_| Err(store::no_answer())) {
            Ok(pause) => pause,
            Err(error) => {
                if store::classify(&error) == Failure::MissingTable {
                    node.restore_queues(&error).await;
                }
                tracing::warn!(%error, "could not fire scheduled tasks, trying again");
                LONGEST_SLEEP
            }
        };
        tokio::select! {
            () = node.points.sleep(Sleeper::Scheduler, pause) => {}
            () = node.stop.cancelled() => {}
        }
    }
}

/// Fires what is due and returns how long to sleep.
async fn fire_due(node: &Node) -> sqlx::Result<Duration> {
    let namespace = &node.row.namespace;
    let mut connection = node.connection().await?;
    let mut tx = connection.begin().await?;
    let due = scheduled_tasks::lock_due(&mut tx, namespace, MOST).await?;
    let mut fired = false;
    for task in &due {
        match times(task) {
            Ok((Some(due_at), next)) => {
                let event_id = scheduled_tasks::fire(&mut tx, task.task_id, due_at, next).await?;
                fired |= event_id.is_some();
                tracing::debug!(task = task.name, %due_at, event_id, "fired a tick");
            }
            Ok((None, next)) => scheduled_tasks::set_next_run(&mut tx, task.task_id, next).await?,
            Err(error) => {
                tracing::error!(task = task.name, %error, "deactivated a scheduled task that cannot be computed");
                scheduled_tasks::deactivate(&mut tx, task.task_id).await?;
            }
        }
    }
    let is_of = |task: &str| due.iter().any(|due| due.name == task);
    if fired {
        node.points.reach(Point::BeforeTick, is_of).await?;
    }
    tx.commit().await?;
    if fired {
        node.points.reach(Point::AfterTick, is_of).await?;
    }
    if fired {
        node.client.bell().ring_all_here();
    }
    if !due.is_empty() {
        connection.give_back();
        // A task that was behind may be due again.
        return Ok(Duration::ZERO);
    }
    let until_next = scheduled_tasks::until_next(&mut connection, namespace).await?;
    connection.give_back();
    Ok(match until_next {
        Some(micros @ 1..) => {
            Duration::from_micros(micros.max(1_000).unsigned_abs()).min(LONGEST_SLEEP)
        }
        // Due, and locked by another node, which may have stopped in the middle of it.
        Some(_) => LOCKED_SLEEP,
        None => LONGEST_SLEEP,
    })
}

/// The due time to fire for, if there is one, and the one after it.
fn times(task: &Due) -> Result<(Option<Timestamp>, Timestamp), ScheduleError> {
    let schedule = Schedule::parse(&task.expression, task.time_zone.as_deref())?;
    let Some(at) = task.at else {
        return Ok((None, schedule.next_after(task.now)?));
    };
    let due_at = if task.now.duration_since(at) > GRACE {
        schedule.latest_due(at, task.now)
    } else {
        at
    };
    Ok((Some(due_at), schedule.next_after(due_at)?))
}
