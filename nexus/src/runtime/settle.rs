//! Stores verdicts, as many in one statement as have come together while the one before was stored.

use std::{sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Node, Route, Trouble, attempt, lease::Lease, points::Point, supervise};
use crate::{
    client::{CHUNK_BYTES, EmitError},
    event::{EnvelopeMeta, Outgoing, PastError},
    handler::{Error, with_sources},
    metrics::add,
    store::{
        self, Failure,
        event_log::Completion,
        queue::{self, GivenUp, Release, Within},
    },
};

/// Why a message is given up whose leases ended again and again without a verdict.
pub(crate) const ABANDONED: &str = "Abandoned";

/// How an attempt ends.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Done; these events are stored with the completion.
    Complete {
        emits: Vec<Outgoing>,
        meta: Arc<EnvelopeMeta>,
    },
    /// Back to the queue.
    Release {
        delay: Duration,
        failure: Option<Failed>,
    },
    /// Not to be tried again by itself.
    DeadLetter {
        reason: &'static str,
        error: String,
        failed: Failed,
    },
}

/// The attempts so far, with the one that has just failed.
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    pub(crate) attempts: u32,
    pub(crate) errors: Vec<PastError>,
}

/// A verdict on its way to be stored.
#[derive(Debug)]
pub(crate) struct Settlement {
    pub(crate) lease: Arc<Lease>,
    pub(crate) route: Arc<Route>,
    pub(crate) verdict: Verdict,
}

/// Where attempts hand in their verdicts.
#[derive(Debug, Clone)]
pub(crate) struct Settler {
    sender: mpsc::UnboundedSender<Settlement>,
}

impl Settler {
    pub(crate) fn settle(&self, lease: Arc<Lease>, route: Arc<Route>, verdict: Verdict) {
        lease.decide(true);
        // The settler ends only after the last sender is gone.
        let _ = self.sender.send(Settlement {
            lease,
            route,
            verdict,
        });
    }
}

/// How long a statement may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most verdicts in one statement: with a hundred, a handler that does nothing was faster than the flushes.
const MOST: usize = 500;

/// Starts the settler of a queue; it ends when every clone of the [`Settler`] is dropped,
/// or when it has to give up.
pub(crate) fn start(
    tracker: &TaskTracker,
    node: Arc<Node>,
    queue: String,
    give_up: CancellationToken,
) -> Settler {
    let (sender, receiver) = mpsc::unbounded_channel();
    let stop = node.stop.clone();
    let work = async move {
        // Kept by the outer future: verdicts that wait survive a panic over another one.
        let receiver = Mutex::new(receiver);
        supervise::again("a settler", stop, || async {
            let mut receiver = receiver.lock().await;
            let mut settlements = Vec::with_capacity(MOST);
            while receiver.recv_many(&mut settlements, MOST).await > 0 {
                store(&node, &queue, std::mem::take(&mut settlements)).await;
            }
        })
        .await;
    };
    tracker.spawn(give_up.run_until_cancelled_owned(work));
    Settler { sender }
}

async fn store(node: &Node, queue: &str, settlements: Vec<Settlement>) {
    let (mut completions, mut releases, mut dead) = (Vec::new(), Vec::new(), Vec::new());
    for settlement in settlements {
        match settlement.verdict {
            Verdict::Complete { .. } => completions.push(settlement),
            Verdict::Release { .. } => releases.push(settlement),
            Verdict::DeadLetter { .. } => dead.push(settlement),
        }
    }
    for completions in batches(completions) {
        complete(node, queue, completions).await;
    }
    if !releases.is_empty() {
        release(node, queue, releases).await;
    }
    for settlement in dead {
        dead_letter(node, queue, settlement).await;
    }
}

/// Cuts completions into what one statement may carry.
fn batches(completions: Vec<Settlement>) -> Vec<Vec<Settlement>> {
    let mut batches: Vec<Vec<Settlement>> = Vec::new();
    let mut bytes = 0;
    for completion in completions {
        let own: usize = match &completion.verdict {
            Verdict::Complete { emits, .. } => emits.iter().map(|event| event.payload.len()).sum(),
            _ => 0,
        };
        match batches.last_mut() {
            Some(batch) if bytes + own <= CHUNK_BYTES => {
                batch.push(completion);
                bytes += own;
            }
            _ => {
                batches.push(vec![completion]);
                bytes = own;
            }
        }
    }
    batches
}

/// What an operation that was repeated if need be has done.
struct Done<T> {
    done: T,
    /// An earlier try may have done it already, its answer lost.
    repeated: bool,
}

/// An error of an operation that is insisted on.
trait Caused: std::fmt::Display {
    /// The error of the database, if there is one.
    fn cause(&self) -> Option<&sqlx::Error>;

    fn unanswered() -> Self;
}

impl Caused for sqlx::Error {
    fn cause(&self) -> Option<&sqlx::Error> {
        Some(self)
    }

    fn unanswered() -> Self {
        store::no_answer()
    }
}

impl Caused for EmitError {
    fn cause(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Append { source } | Self::Connect(source) => Some(source),
            _ => None,
        }
    }

    fn unanswered() -> Self {
        Self::Connect(store::no_answer())
    }
}

/// Repeats an operation for as long as what went wrong may pass and a lease is left. `None` means
/// that it was given up: the messages come back when their leases end.
async fn insist<T, E: Caused, F: Future<Output = Result<T, E>>>(
    trouble: &Trouble,
    what: &'static str,
    queue: &str,
    settlements: &[Settlement],
    may_pass: impl Fn(&E) -> bool,
    operation: impl Fn() -> F,
) -> Result<Option<Done<T>>, E> {
    let mut pause = Duration::from_millis(20);
    let mut repeated = false;
    let mut conflicts = 0;
    loop {
        let done = tokio::time::timeout(PATIENCE, operation()).await;
        match done.unwrap_or_else(|_| Err(E::unanswered())) {
            Ok(done) => return Ok(Some(Done { done, repeated })),
            Err(error) if may_pass(&error) => {
                if settlements
                    .iter()
                    .all(|settlement| settlement.lease.remaining().is_zero())
                {
                    tracing::error!(
                        %error, queue, messages = settlements.len(),
                        "could not {what} before the leases ended, the messages will be delivered again"
                    );
                    return Ok(None);
                }
                let cause = error.cause();
                if cause.is_some_and(store::is_conflict) && conflicts < store::MOST_CONFLICTS {
                    // It was rolled back for certain, and is nobody's fault.
                    conflicts += 1;
                    store::pause_after_conflict(conflicts).await;
                    continue;
                }
                if let Some(cause) = cause {
                    trouble.met(what, cause);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
                repeated = true;
            }
            Err(error) => return Err(error),
        }
    }
}

fn may_pass(error: &sqlx::Error) -> bool {
    matches!(
        store::classify(error),
        Failure::Transient | Failure::Cancelled
    )
}

/// What a handler emits can take too long again and again.
fn completion_may_pass(error: &EmitError, emits: bool) -> bool {
    match error {
        EmitError::Append { source } if emits => store::classify(source) == Failure::Transient,
        EmitError::Append { source } | EmitError::Connect(source) => may_pass(source),
        _ => false,
    }
}

/// One try at completing, with the events that belong to it. Returns what was still ours, and the queues
/// that got something.
async fn complete_once(
    node: &Node,
    settlements: &[Settlement],
    events: &[Outgoing],
    source: &[Option<i64>],
    completion: Completion<'_>,
) -> Result<(Vec<i64>, Vec<String>), EmitError> {
    let Completion {
        within,
        queue,
        msg_ids,
        read_cts,
    } = completion;
    let is_of = |handler: &str| settlements.iter().any(|s| s.route.name() == handler);
    let reach = async |point| {
        let reached = node.points.reach(point, is_of).await;
        reached.map_err(EmitError::Connect)
    };
    reach(Point::BeforeCommit).await?;
    let mut connection = node.connection().await.map_err(EmitError::Connect)?;
    let done = if events.is_empty() {
        queue::complete(&mut connection, queue, within, msg_ids, read_cts)
            .await
            .map(|completed| (completed, Vec::new()))
            .map_err(|source| EmitError::Append { source })?
    } else {
        let client = &node.client;
        let stored = client
            .store_chunk(&mut connection, events, Some(completion), source)
            .await?;
        (stored.completed, stored.queues.into_iter().collect())
    };
    let given_back = connection.give_back().await;
    given_back.map_err(EmitError::Connect)?;
    reach(Point::AfterCommit).await?;
    Ok(done)
}

async fn complete(node: &Node, queue: &str, settlements: Vec<Settlement>) {
    let msg_ids: Vec<i64> = settlements.iter().map(|s| s.lease.msg_id).collect();
    let read_cts: Vec<i32> = settlements.iter().map(|s| s.lease.read_ct).collect();
    let (mut events, mut source) = (Vec::new(), Vec::new());
    for (place, settlement) in (1..).zip(&settlements) {
        if let Verdict::Complete { emits, .. } = &settlement.verdict {
            source.extend(emits.iter().map(|_| Some(place)));
            events.extend(emits.iter().cloned());
        }
    }
    let completion = Completion {
        within: Within::Statement,
        queue,
        msg_ids: &msg_ids,
        read_cts: &read_cts,
    };
    let emits = !events.is_empty();
    let transient = |error: &EmitError| completion_may_pass(error, emits);
    let (events, source) = (&events, &source);
    let operation = || complete_once(node, &settlements, events, source, completion);
    let stored = insist(
        &node.trouble,
        "complete messages",
        queue,
        &settlements,
        transient,
        operation,
    )
    .await;
    match stored {
        Ok(Some(Done {
            done: (completed, queues),
            repeated,
        })) => {
            node.client.wake(queues);
            for settlement in settlements {
                let counts = &settlement.route.counts;
                if completed.contains(&settlement.lease.msg_id) {
                    add(&counts.completed, 1);
                    if let Verdict::Complete { emits, .. } = &settlement.verdict {
                        node.client.emitted().add_all(emits);
                    }
                } else {
                    report_lost(queue, &settlement, repeated);
                }
                node.leases.end(queue, &settlement.lease);
            }
        }
        Ok(None) => settlements
            .iter()
            .for_each(|s| node.leases.end(queue, &s.lease)),
        // One of the events cannot be stored. Alone, each shows whether it is the one.
        Err(error) if settlements.len() > 1 => {
            tracing::warn!(%error, queue, "could not complete together, completing one by one");
            for settlement in settlements {
                Box::pin(complete(node, queue, vec![settlement])).await;
            }
        }
        Err(error) => {
            if let EmitError::MissingQueue { source } = &error {
                node.mend(source).await;
            }
            for settlement in settlements {
                let Verdict::Complete { meta, emits } = &settlement.verdict else {
                    continue;
                };
                tracing::error!(%error, queue, msg_id = settlement.lease.msg_id, "could not complete, trying again later");
                // What the handler emits is its own doing, so the attempt has failed.
                let is_to_blame = !emits.is_empty()
                    && matches!(&error, EmitError::Append { source }
                        if matches!(store::classify(source), Failure::Final | Failure::Cancelled));
                let verdict = if is_to_blame {
                    let error = Error::retryable(with_sources(&error));
                    attempt::failure(&settlement.route, meta, &error)
                } else {
                    Verdict::Release {
                        delay: Duration::from_secs(5),
                        failure: None,
                    }
                };
                let settlement = Settlement {
                    verdict,
                    ..settlement
                };
                Box::pin(store(node, queue, vec![settlement])).await;
            }
        }
    }
}

async fn release(node: &Node, queue: &str, settlements: Vec<Settlement>) {
    let rows: Vec<Release> = settlements
        .iter()
        .filter_map(|settlement| match &settlement.verdict {
            Verdict::Release { delay, failure } => Some(Release {
                msg_id: settlement.lease.msg_id,
                read_ct: settlement.lease.read_ct,
                delay: *delay,
                failure: failure
                    .as_ref()
                    .map(|failed| queue::failure_headers(failed.attempts, &failed.errors)),
            }),
            _ => None,
        })
        .collect();
    let stored = insist(
        &node.trouble,
        "give messages back",
        queue,
        &settlements,
        may_pass,
        || async {
            let is_of = |handler: &str| settlements.iter().any(|s| s.route.name() == handler);
            node.points.reach(Point::BeforeRetry, is_of).await?;
            let mut connection = node.connection().await?;
            let released = queue::release(&mut connection, queue, &rows).await?;
            connection.give_back().await?;
            node.points.reach(Point::AfterRetry, is_of).await?;
            Ok(released)
        },
    )
    .await;
    let stored = stored.unwrap_or_else(|error| {
        tracing::error!(%error, queue, "could not give messages back, they come back when their leases end");
        None
    });
    for settlement in &settlements {
        node.leases.end(queue, &settlement.lease);
        let Some(Done { done, repeated }) = &stored else {
            continue;
        };
        if !done.contains(&settlement.lease.msg_id) {
            report_lost(queue, settlement, *repeated);
            continue;
        }
        if let Verdict::Release { delay, failure } = &settlement.verdict {
            match failure {
                Some(_) => add(&settlement.route.counts.retried, 1),
                None if !delay.is_zero() => add(&settlement.route.counts.snoozed, 1),
                None => {}
            }
        }
    }
}

async fn dead_letter(node: &Node, queue: &str, settlement: Settlement) {
    let Verdict::DeadLetter {
        reason,
        error,
        failed,
    } = &settlement.verdict
    else {
        return;
    };
    let given_up = GivenUp {
        msg_id: settlement.lease.msg_id,
        read_ct: settlement.lease.read_ct,
        reason,
        error: error.clone(),
        attempts: failed.attempts,
        errors: failed.errors.clone(),
    };
    let only = std::slice::from_ref(&settlement);
    let operation = || async {
        let is_of = |handler: &str| settlement.route.name() == handler;
        node.points.reach(Point::BeforeDeadLetter, is_of).await?;
        let mut connection = node.connection().await?;
        let is_moved = queue::dead_letter(&mut connection, queue, &given_up).await?;
        connection.give_back().await?;
        node.points.reach(Point::AfterDeadLetter, is_of).await?;
        Ok(is_moved)
    };
    let stored = insist(
        &node.trouble,
        "dead-letter a message",
        queue,
        only,
        may_pass,
        operation,
    )
    .await;
    match stored {
        Ok(Some(Done { done: true, .. })) => {
            tracing::error!(
                queue,
                handler = settlement.route.name(),
                msg_id = settlement.lease.msg_id,
                attempts = failed.attempts,
                error,
                "dead-lettered: {reason}"
            );
            add(&settlement.route.counts.dead_lettered, 1);
            if *reason == ABANDONED {
                add(&settlement.route.counts.abandoned, 1);
            }
        }
        Ok(Some(Done { repeated, .. })) => report_lost(queue, &settlement, repeated),
        Ok(None) => {}
        Err(error) => {
            tracing::error!(%error, queue, msg_id = settlement.lease.msg_id, "could not dead-letter, the message will be delivered again");
        }
    }
    node.leases.end(queue, &settlement.lease);
}

fn report_lost(queue: &str, settlement: &Settlement, repeated: bool) {
    if repeated {
        // Whether it was stored or refused nobody can tell any more.
        tracing::warn!(
            queue,
            handler = settlement.route.name(),
            msg_id = settlement.lease.msg_id,
            "the answer to a verdict was lost, and the message is no longer ours: most likely the verdict was stored"
        );
        return;
    }
    add(&settlement.route.counts.lost, 1);
    tracing::warn!(
        queue,
        handler = settlement.route.name(),
        msg_id = settlement.lease.msg_id,
        "a verdict was refused: the lease was lost and another node has the message, or it is gone"
    );
}
