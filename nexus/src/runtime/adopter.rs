//! Takes in what foreign programs send to the node's queues by plain `pgmq.send`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Node, points::Sleeper};
use crate::store::{self, queue};

/// Messages adopted in one transaction, at most.
const MOST: i32 = 100;

/// A transaction that takes longer is followed by one of fewer messages: they may be large, and wanted by
/// many handlers.
const LONG: Duration = Duration::from_secs(1);

/// How long a transaction may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Foreign programs ring no bell. While they send, the queues are looked at once every idle poll interval; after that
/// more and more seldom, up to this long apart, or one such interval.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

pub(crate) async fn run(node: Arc<Node>, queues: Vec<String>) {
    let mut most = MOST;
    let idle_poll = node.settings.idle_poll;
    let mut pause = idle_poll;
    while !node.stop.is_cancelled() {
        let found = with_foreign(&node, &queues).await;
        let mut more = false;
        for queue in &found {
            more |= adopt(&node, queue, &mut most).await;
        }
        pause = if found.is_empty() {
            (pause * 2).min(LONGEST_SLEEP.max(idle_poll))
        } else {
            idle_poll
        };
        if !more {
            tokio::select! {
                () = node.points.sleep(Sleeper::Adopter, pause) => {}
                () = node.stop.cancelled() => {}
            }
        }
    }
}

/// Those of the queues that have messages of foreign programs.
async fn with_foreign(node: &Node, queues: &[String]) -> Vec<String> {
    let looked = async {
        let mut connection = node.connection().await?;
        let found = queue::with_foreign(&mut connection, queues).await?;
        connection.give_back().await?;
        Ok(found)
    };
    match store::answered_within(PATIENCE, looked).await {
        Ok(found) => found,
        Err(error) => {
            failed(node, &error).await;
            Vec::new()
        }
    }
}

async fn failed(node: &Node, error: &sqlx::Error) {
    if !node.mend(error).await {
        node.trouble
            .met("look for messages of foreign programs", error);
    }
}

/// Adopts up to `most` messages and returns whether there may be more. Fits `most` to how long it takes.
async fn adopt(node: &Node, queue: &str, most: &mut i32) -> bool {
    let asked = *most;
    let began = Instant::now();
    let adopted = store::despite_conflicts(|| async {
        let mut connection = node.connection().await?;
        let bytes = node.settings.max_body_bytes;
        let adopted =
            queue::adopt(&mut connection, &node.row.namespace, queue, asked, bytes).await?;
        connection.give_back().await?;
        Ok(adopted)
    });
    let adopted = store::answered_within(PATIENCE, adopted).await;
    let took = began.elapsed();
    *most = if took >= PATIENCE {
        (asked / 8).max(1)
    } else if took >= LONG {
        (asked / 2).max(1)
    } else {
        (asked * 2).min(MOST)
    };
    let adopted = match adopted {
        Ok(adopted) => adopted,
        Err(error) => {
            failed(node, &error).await;
            return false;
        }
    };
    for message in &adopted {
        match (&message.refused, message.event_id) {
            (Some(reason), _) => {
                tracing::error!(
                    queue,
                    msg_id = message.msg_id,
                    "dead-lettered a foreign message: {reason}"
                );
            }
            (None, event_id) => {
                tracing::debug!(
                    queue,
                    msg_id = message.msg_id,
                    event_id,
                    "adopted a foreign message"
                );
            }
        }
    }
    if adopted.iter().any(|message| message.event_id.is_some()) {
        // Which queues it went to is known to the database only.
        node.client.bell().ring_all_here();
    }
    adopted.len() >= usize::try_from(asked).unwrap_or(usize::MAX)
}
