//! Runs a handler without worker and queue, for the test kit.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Leases, Node, Route,
    attempt::{self, COMMITTED_BY_HAND, End, Message},
    points::{self, Ended},
};
use crate::{
    client::{ANSWER, Tx},
    event::Outgoing,
    handler::{Delivery, Error},
    store::queue,
};

/// Longer than any handler runs.
const LEASE: Duration = Duration::from_hours(24 * 365);

/// Calls the handler once and tells how the attempt would end, which messages of a batch were not
/// decoded, and what it emitted. What it did is stored if the test `keeps` it, and it succeeded.
pub(crate) async fn run(
    node: &Node,
    route: &Arc<Route>,
    deliveries: Vec<Delivery>,
    keeps: bool,
) -> (Ended, Vec<(usize, String)>, Vec<Outgoing>) {
    let leases = Leases::default();
    let messages: Vec<Message> = deliveries
        .into_iter()
        .zip(1_i64..)
        .map(|(delivery, msg_id)| Message {
            delivery,
            lease: leases.hold(&route.queue, msg_id, 1, Instant::now() + LEASE),
        })
        .collect();
    let (rejected, mut tx, result) = match attempt::begin_if_used(node, route).await {
        Ok(tx) => attempt::invoke(node, route, tx, &messages).await,
        Err(end) => (Vec::new(), None, Err(end)),
    };
    let result = match result {
        Ok(returned) => {
            let mut emits = tx.as_mut().map(Tx::take_outgoing).unwrap_or_default();
            emits.extend(returned);
            store(node, tx, emits, keeps).await
        }
        Err(end) => {
            if let Some(tx) = tx {
                attempt::roll_back(tx).await;
            }
            Err(end)
        }
    };
    let meta = &messages[0].delivery.meta;
    let by_verdict = |error: &Error| points::ended(&attempt::failure(route, meta, error));
    let (ended, emits) = match result {
        Ok(emits) => (Ended::Completed, emits),
        Err(End::Failed(error)) => (by_verdict(&error), Vec::new()),
        Err(End::CommittedByHand) => {
            let error = Error::permanent(COMMITTED_BY_HAND);
            (by_verdict(&error), Vec::new())
        }
        Err(End::Disturbed(why)) => {
            let why = why.to_string();
            (Ended::Disturbed { why }, Vec::new())
        }
        Err(End::Conflicted(error)) => {
            let error = error.to_string();
            (Ended::Conflicted { error }, Vec::new())
        }
        Err(End::Aborted) => (Ended::GivenBack, Vec::new()),
        Err(End::Committed | End::Succeeded(_)) => (Ended::Completed, Vec::new()),
        Err(End::Stolen(_)) => (Ended::Lost, Vec::new()),
    };
    let rejected = rejected
        .into_iter()
        .map(|rejected| (rejected.index, rejected.error.to_string()))
        .collect();
    (ended, rejected, emits)
}

async fn store(
    node: &Node,
    tx: Option<Tx>,
    emits: Vec<Outgoing>,
    keeps: bool,
) -> Result<Vec<Outgoing>, End> {
    let failed = |error| End::Failed(Error::from(error));
    // Options were set after the events were checked.
    if let Err(error) = node.client.check(&emits) {
        return Err(End::Failed(Error::permanent(error)));
    }
    let Some(mut tx) = tx else {
        if keeps {
            node.client
                .store(&emits)
                .await
                .map_err(|error| End::Failed(error.into()))?;
        }
        return Ok(emits);
    };
    if let Ok(false) = queue::is_marked(&mut tx).await {
        attempt::roll_back(tx).await;
        return Err(End::CommittedByHand);
    }
    // Stored even if it is rolled back: what the handler's statements have done to the transaction
    // shows here.
    let stored = match node.client.store_in(&mut tx, &emits, ANSWER).await {
        Ok(stored) => stored,
        Err(error) => {
            attempt::roll_back(tx).await;
            return Err(End::Failed(error.into()));
        }
    };
    if !keeps {
        attempt::roll_back(tx).await;
        return Ok(emits);
    }
    tx.commit_only().await.map_err(failed)?;
    node.client.wake(stored.queues);
    Ok(emits)
}
