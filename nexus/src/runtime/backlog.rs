//! Works off the backlog of a batch handler with a transaction, which claims by deleting.
//!
//! A handler of `Batch<E>` with `&mut Tx` has a transaction for all messages of a call anyway. It can claim in it: the
//! lock of a deleted row is the lease, the commit is the completion, and a crash gives the messages back at once. That
//! is one write for a message instead of two.
//!
//! What it cannot do is leave a trace when it is rolled back. So it does only what needs none, and claims with leases
//! do the rest: a message that has lost a lease, one that is alone, and whatever is in a batch that failed, which
//! counts as no attempt, as when a batch is split. A message that kills its process would be counted by nobody, so a
//! node that was not the first one, and may have such a death behind it, begins with leases.
//!
//! If a handler ends its transaction by a statement of its own, the messages are put back. That cannot be seen if the
//! handler does not return after it, because it times out or its process ends: then what it has committed stands, and
//! the messages are done.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    MOST_BYTES, Node, Route,
    attempt::{self, COMMITTED_BY_HAND, End, Message},
    lease::Lease,
};
use crate::{
    client::ANSWER,
    event::Headers,
    handler::Delivery,
    metrics::{Counted, add},
    store::{
        self,
        queue::{self, Claimed, Place},
    },
};

/// For so long a node that was not the first one claims with leases only.
const CAREFUL_FOR: Duration = Duration::from_mins(1);

/// For so long messages are claimed with leases after a batch that was rolled back.
pub(super) const REST: Duration = Duration::from_secs(10);

/// After so long it is the turn of what only a claim with leases takes.
const STINT: Duration = Duration::from_secs(1);

/// How long it may take to put messages back.
const PATIENCE: Duration = Duration::from_secs(10);

/// Since when the messages of a handler may be claimed by deleting, on a node that starts now; `None` if never.
pub(super) fn begins_at(node: &Node, route: &Route) -> Option<Instant> {
    let is_possible =
        route.descriptor.batch && route.descriptor.uses_tx && node.settings.batch_size > 1;
    let now = Instant::now();
    (is_possible && !node.points.is_watched()).then_some(if node.is_first {
        now
    } else {
        now + CAREFUL_FOR
    })
}

/// When the next stint may begin; `None` if never.
pub(super) type Next = Option<Instant>;

/// The messages of a handler that wait, as all slots that work them off at a time see them.
pub(super) struct Backlog {
    /// Of the payloads that the handler holds, on this node.
    bytes: Arc<AtomicUsize>,
    /// A batch was rolled back: the other slots are not to meet the same messages.
    is_spoilt: AtomicBool,
    /// What is older is claimed: without it each slot would walk past all messages of the others.
    frontier: Mutex<Place>,
}

impl Backlog {
    pub(super) fn new(bytes: &Arc<AtomicUsize>, not_before_micros: i64) -> Arc<Self> {
        Arc::new(Self {
            bytes: Arc::clone(bytes),
            is_spoilt: AtomicBool::new(false),
            frontier: Mutex::new(Place {
                vt_micros: not_before_micros,
                msg_id: 0,
            }),
        })
    }

    /// Handles one batch after the other, for a while or until there are no more. Returns when that may go on.
    pub(super) async fn work_off(&self, node: &Node, route: &Route) -> Next {
        let started_at = Instant::now();
        while started_at.elapsed() < STINT
            && !node.stop.is_cancelled()
            && !self.is_spoilt.load(Ordering::Relaxed)
            && self.bytes.load(Ordering::Relaxed) < MOST_BYTES
        {
            let Ok(beside) = Arc::clone(&node.isolation).try_read_owned() else {
                // A message runs alone or is about to.
                break;
            };
            let under_way = Counted::new(&node.batches, 1);
            match self.handle_batch(node, route).await {
                Batch::Full => {}
                Batch::Last => break,
                Batch::RolledBack => {
                    self.is_spoilt.store(true, Ordering::Relaxed);
                    return Some(Instant::now() + REST);
                }
                Batch::CommittedByHand => {
                    self.is_spoilt.store(true, Ordering::Relaxed);
                    return None;
                }
            }
            drop((under_way, beside));
        }
        Some(Instant::now())
    }

    fn frontier(&self) -> MutexGuard<'_, Place> {
        self.frontier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn handle_batch(&self, node: &Node, route: &Route) -> Batch {
        let mut tx = match attempt::begin(node, route, queue::TO_DELETE).await {
            Ok(tx) => tx,
            Err(end) => return rolled_back(node, route, &end),
        };
        let after = *self.frontier();
        let claims = queue::claim_by_deleting(
            &mut tx,
            &route.queue,
            (route.name(), route.event_version),
            after,
            i32::try_from(node.settings.batch_size).unwrap_or(i32::MAX),
            node.settings.max_body_bytes,
        );
        let claims = tokio::select! {
            claims = store::answered_within(ANSWER, claims) => claims,
            () = node.abort.cancelled() => return Batch::RolledBack,
        };
        let (claimed, is_cut, last) = match claims {
            Ok(claims) => claims,
            Err(error) => return rolled_back(node, route, &End::Disturbed(error)),
        };
        let frontier = last.max(*self.frontier());
        *self.frontier() = frontier;
        if claimed.len() < 2 {
            attempt::roll_back(tx).await;
            return Batch::Last;
        }
        let Some(messages) = read(route, &claimed) else {
            attempt::roll_back(tx).await;
            return Batch::RolledBack;
        };
        add(&route.counts.claimed, messages.len());
        attempt::note_waits(node, route, &messages);
        let running = Counted::new(&route.counts.running, messages.len());
        let is_last = claimed.len() < node.settings.batch_size && !is_cut;
        let size = messages.iter().map(|m| m.delivery.payload.len()).sum();
        let weight = Counted::new(&self.bytes, size);
        let end = attempt::call_in(node, route, tx, &messages).await;
        drop((weight, running));
        match end {
            End::Committed => {
                add(&route.counts.completed, messages.len());
                if is_last { Batch::Last } else { Batch::Full }
            }
            End::CommittedByHand => {
                put_back(node, route, &claimed).await;
                Batch::CommittedByHand
            }
            end => rolled_back(node, route, &end),
        }
    }
}

/// What became of a batch.
enum Batch {
    /// It is handled, and there may be more.
    Full,
    /// It is handled, and has left nothing, or nothing but what is to be claimed with leases.
    Last,
    RolledBack,
    CommittedByHand,
}

/// `None` if one of them is no message that can be handled, for which it has to be claimed with a lease.
fn read(route: &Route, claimed: &[Claimed]) -> Option<Vec<Message>> {
    claimed
        .iter()
        .map(|claimed| {
            let headers: Headers = serde_json::from_str(&claimed.headers).ok()?;
            let (msg_id, read_ct) = (claimed.msg_id, claimed.read_ct);
            // Counted as if it had been claimed with a lease.
            let reads = read_ct.saturating_add(1);
            let body = claimed.body.as_ref()?;
            let delivery = Delivery::read(headers, body, &route.group, msg_id, reads).ok()?;
            route.takes(delivery.meta.event_type()).then(|| Message {
                delivery,
                lease: Lease::of_deleted(msg_id, read_ct),
            })
        })
        .collect()
}

fn rolled_back(node: &Node, route: &Route, end: &End) -> Batch {
    match end {
        End::Disturbed(why) => {
            node.client.doubt().look_at(why);
            node.trouble
                .met("finish an attempt, which does not count", why);
        }
        End::Failed(error) | End::Conflicted(error) => {
            tracing::debug!(handler = route.name(), %error, "a batch failed, its messages are claimed with leases now");
        }
        _ => {}
    }
    Batch::RolledBack
}

async fn put_back(node: &Node, route: &Route, claimed: &[Claimed]) {
    let put_back = async {
        let mut connection = node.connection().await?;
        queue::put_back(&mut connection, &route.queue, claimed).await?;
        connection.give_back().await
    };
    match store::answered_within(PATIENCE, put_back).await {
        Ok(()) => tracing::warn!(
            handler = route.name(),
            messages = claimed.len(),
            "put messages back: {COMMITTED_BY_HAND}"
        ),
        Err(error) => {
            let msg_ids: Vec<i64> = claimed.iter().map(|claimed| claimed.msg_id).collect();
            tracing::error!(
                handler = route.name(), ?msg_ids, %error,
                "could not put messages back, which counts them as done: {COMMITTED_BY_HAND}"
            );
        }
    }
}
