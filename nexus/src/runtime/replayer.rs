//! Drives running replays: puts events of the log into queues, a batch in each transaction.
//!
//! Every node looks; row locks keep them apart. A batch moves the position of its replay in the
//! transaction that puts the messages, so that a node which dies in between leaves nothing half done.

use std::{sync::Arc, time::Duration};

use sqlx::Connection;
use uuid::Uuid;

use super::{
    Node,
    points::{Point, Sleeper},
};
use crate::store::{
    self,
    replays::{self, BELL, Driven, State},
};

/// How often to look for replays that somebody has started. Where the client did, it is rung.
const EVERY: Duration = Duration::from_secs(1);

/// How long to leave a replay to the node that is at it.
const TAKEN_SLEEP: Duration = Duration::from_millis(100);

/// How long one batch may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Events looked at in one transaction.
const MOST: i32 = 1_000;

pub(crate) async fn run(node: Arc<Node>) {
    let bell = node.client.bell().of(BELL);
    let mut most = MOST;
    while !node.stop.is_cancelled() {
        let pause = match drive_all(&node, most).await {
            Ok(pause) => {
                most = MOST;
                pause
            }
            Err(error) => {
                if !node.mend(&error).await {
                    node.trouble.met("replay events", &error);
                    // What takes too long together may not take too long in parts.
                    most = (most / 10).max(1);
                }
                EVERY
            }
        };
        tokio::select! {
            () = node.points.sleep(Sleeper::Replayer, pause) => {}
            () = bell.notified() => {}
            () = node.stop.cancelled() => {}
        }
    }
}

/// One batch of each running replay; returns how long to sleep.
async fn drive_all(node: &Node, most: i32) -> sqlx::Result<Duration> {
    let mut pause = EVERY;
    let mut failed = None;
    for id in store::answered_within(PATIENCE, running(node)).await? {
        if node.stop.is_cancelled() {
            break;
        }
        match store::answered_within(PATIENCE, drive(node, id, most)).await {
            Ok(Some(driven)) => {
                report(id, &driven);
                if driven.sent > 0 {
                    node.client.wake([driven.queue]);
                }
                pause = pause.min(driven.next_in.unwrap_or(EVERY));
            }
            Ok(None) => pause = pause.min(TAKEN_SLEEP),
            // The others are not to blame.
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(pause), Err)
}

async fn running(node: &Node) -> sqlx::Result<Vec<Uuid>> {
    let mut connection = node.connection().await?;
    let ids = replays::running(&mut connection, &node.row.namespace).await?;
    connection.give_back().await?;
    Ok(ids)
}

async fn drive(node: &Node, id: Uuid, most: i32) -> sqlx::Result<Option<Driven>> {
    let mut connection = node.connection().await?;
    let mut tx = connection.begin().await?;
    let driven = replays::drive(&mut tx, id, most).await?;
    let has_sent = driven.as_ref().is_some_and(|driven| driven.sent > 0);
    if has_sent {
        node.points.reach(Point::BeforeReplay, |_| true).await?;
    }
    tx.commit().await?;
    if has_sent {
        node.points.reach(Point::AfterReplay, |_| true).await?;
    }
    connection.give_back().await?;
    Ok(driven)
}

fn report(id: Uuid, driven: &Driven) {
    match driven.state {
        State::Running | State::Cancelled => {}
        State::Finished => tracing::info!(
            replay = %id,
            queue = driven.queue,
            "a replay has put all of its events into the queue"
        ),
        State::Failed => tracing::error!(
            replay = %id,
            queue = driven.queue,
            error = driven.error,
            "a replay cannot go on"
        ),
    }
}
