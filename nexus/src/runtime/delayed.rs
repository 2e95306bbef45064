//! Emits delayed events once they are due.
//!
//! Every node looks; row locks keep them apart, and who emits an event deletes it in the same
//! transaction.

use std::{sync::Arc, time::Duration};

use super::{Node, points::Sleeper};
use crate::store::{
    self,
    delayed_emits::{self, BELL, Emitted, NOTICED_WITHIN},
};

/// How long to leave a due event to the node that has locked it, or to the transaction that is about
/// to cancel it.
const LOCKED_SLEEP: Duration = Duration::from_millis(100);

/// How long to wait after an error.
const ERROR_SLEEP: Duration = Duration::from_millis(500);

/// How long one round may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Events emitted in one transaction.
const MOST: i32 = 1_000;

pub(crate) async fn run(node: Arc<Node>) {
    let bell = node.client.bell().of(BELL);
    let mut most = MOST;
    while !node.stop.is_cancelled() {
        let pause = match store::answered_within(
            PATIENCE,
            store::despite_conflicts(|| emit_due(&node, most)),
        )
        .await
        {
            Ok(pause) => {
                most = MOST;
                pause
            }
            Err(error) => {
                node.trouble.met("emit delayed events", &error);
                // What takes too long together may not take too long in parts.
                most = (most / 10).max(1);
                ERROR_SLEEP
            }
        };
        tokio::select! {
            () = node.points.sleep(Sleeper::Delayed, pause) => {}
            () = bell.notified() => {}
            () = node.stop.cancelled() => {}
        }
    }
}

/// Emits what is due and returns how long to sleep.
async fn emit_due(node: &Node, most: i32) -> sqlx::Result<Duration> {
    let until_next = {
        let mut connection = node.connection().await?;
        let until_next = delayed_emits::until_next(&mut connection, &node.row.namespace).await?;
        connection.give_back().await?;
        until_next
    };
    let until_next = until_next.map(|micros| Duration::from_micros(micros.try_into().unwrap_or(0)));
    if until_next != Some(Duration::ZERO) {
        return Ok(sleep(until_next));
    }
    let emitted = match emit(node, most, false).await {
        Err(error) if !store::is_passing(&error) => {
            tracing::warn!(%error, "could not emit delayed events together, emitting them in parts");
            node.mend(&error).await;
            emit(node, most, true).await?
        }
        other => other?,
    };
    let Emitted {
        count,
        queues,
        failed,
        next_in,
    } = emitted;
    node.client.wake(queues);
    for (event_id, error) in &failed {
        tracing::error!(
            event_id,
            error,
            "could not emit a delayed event, it is kept and tried again later"
        );
    }
    if count > 0 || !failed.is_empty() {
        tracing::debug!(count, "emitted delayed events");
        return Ok(Duration::ZERO);
    }
    Ok(sleep(next_in))
}

/// How long to sleep if nothing could be emitted, and the next event is to be taken up then.
fn sleep(next_in: Option<Duration>) -> Duration {
    match next_in {
        Some(Duration::ZERO) => LOCKED_SLEEP,
        Some(next_in) => next_in.clamp(Duration::from_millis(1), NOTICED_WITHIN),
        None => NOTICED_WITHIN,
    }
}

async fn emit(node: &Node, most: i32, isolate: bool) -> sqlx::Result<Emitted> {
    let mut connection = node.connection().await?;
    let namespace = &node.row.namespace;
    let emitted = delayed_emits::emit_due(&mut connection, namespace, most, isolate).await?;
    connection.give_back().await?;
    Ok(emitted)
}
