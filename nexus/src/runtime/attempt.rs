//! Runs a handler for one message, or for a batch, and decides how the attempt ends.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use jiff::Timestamp;
use tracing::Instrument as _;

use super::{
    Node, Route,
    lease::Lease,
    points::Point,
    settle::{Failed, Settler, Verdict},
    span,
    supervise::panic_text,
};
use crate::{
    client::{self, CAUSE, EmitError, NOT_WHOLE, Tx},
    event::{Cause, EnvelopeMeta, Outgoing, PastError},
    handler::{Context, Delivery, Error, Invocation, Kind, Rejected},
    metrics::{Counted, add},
    store::{
        self, Blame, Failure,
        event_log::{Completion, Stored},
        nodes, queue,
    },
};

/// A claimed message that can be handled.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) delivery: Delivery,
    pub(crate) lease: Arc<Lease>,
}

/// What keeps others from the messages while the handler runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Their leases; the messages are deleted when the handler has succeeded.
    Lease,
    /// The handler's transaction, which has deleted them.
    Deletion,
}

/// How a call of the handler ended.
pub(super) enum End {
    /// Everything is stored already, by the handler's own transaction.
    Committed,
    /// The handler succeeded; events to store with the completion.
    Succeeded(Vec<Outgoing>),
    Failed(Error),
    /// A deadlock or a serialization failure of its transaction, which was rolled back: the handler is
    /// called again at once. Counts as no attempt.
    Conflicted(Error),
    /// Not the handler's fault: a lost connection, a pool that is exhausted. Counts as no attempt.
    Disturbed(sqlx::Error),
    /// The handler has ended its transaction by a statement of its own.
    CommittedByHand,
    /// Some of the messages are no longer ours; the transaction was rolled back.
    Stolen(Vec<i64>),
    /// The node stops and does not wait any longer.
    Aborted,
}

/// Why a handler is given up that has ended its transaction itself.
pub(super) const COMMITTED_BY_HAND: &str = "the handler ended its transaction by a statement of its own, so its effect is not tied to the message: return `Ok` to commit, `Err` to roll back";

/// What becomes of a handler that returned `Ok` with a transaction that Postgres had aborted.
pub(super) const SWALLOWED: &str = "a statement of the handler failed and the handler returned `Ok` nevertheless; Postgres has aborted the transaction, so nothing of it can be stored: return the error, or run a statement that may fail in a savepoint (`tx.begin()`)";

/// How long a message waits that failed for reasons of ours.
const DISTURBED_DELAY: Duration = Duration::from_secs(1);

/// How long a database that answers takes for a rollback or a commit at most.
const PATIENCE: Duration = Duration::from_secs(2);

/// An error's text is cut here, so that ten of them fit into a message's headers.
const MAX_ERROR_BYTES: usize = 2_000;

/// Runs the handler for messages of its route; more than one only for batch handlers.
///
/// A panic of our own leaves the messages without a verdict: they come back when their leases end.
pub(crate) async fn run(
    node: &Node,
    route: &Arc<Route>,
    settler: &Settler,
    messages: Vec<Message>,
) {
    note_waits(node, route, &messages);
    let _running = Counted::new(&route.counts.running, messages.len());
    let run = AssertUnwindSafe(run_to_verdicts(node, route, settler, messages));
    if let Err(panic) = run.catch_unwind().await {
        tracing::error!(
            handler = route.name(),
            panic = panic_text(&*panic),
            "an attempt panicked outside of its handler, its messages come back when their leases end; this is an error in nexus, please report it"
        );
    }
}

/// Notes how long events have waited for their first attempt, by the clock of the database. One that was redriven or
/// replayed has waited for somebody.
pub(super) fn note_waits(node: &Node, route: &Route, messages: &[Message]) {
    let ahead = node.clock_ahead.load(Ordering::Relaxed);
    let now = Timestamp::now().as_microsecond().saturating_add(ahead);
    for meta in messages.iter().map(|message| &message.delivery.meta) {
        let headers = &meta.headers;
        let is_first = headers.attempts == 0 && headers.redriven == 0 && headers.replay.is_none();
        let waited = now.saturating_sub(meta.emitted_at().as_microsecond());
        if is_first {
            let waited = u64::try_from(waited).unwrap_or_default();
            route.counts.wait.took(Duration::from_micros(waited));
        }
    }
}

async fn run_to_verdicts(
    node: &Node,
    route: &Arc<Route>,
    settler: &Settler,
    messages: Vec<Message>,
) {
    // A batch that fails is split in halves until the bad message is alone.
    let mut waiting = vec![messages];
    while let Some(mut messages) = waiting.pop() {
        messages.retain(|message| !message.lease.lost.is_cancelled());
        if messages.is_empty() {
            continue;
        }
        let settle = |message: &Message, verdict| {
            node.points.decided(message, &verdict);
            settler.settle(Arc::clone(&message.lease), Arc::clone(route), verdict);
        };
        let (rejected, end) = call_despite_conflicts(node, route, &messages).await;
        // What could not be decoded has left the batch, each message to its own verdict.
        let mut index = 0;
        messages.retain(|message| {
            let error = rejected.iter().find(|rejected| rejected.index == index);
            index += 1;
            if let Some(rejected) = error {
                settle(
                    message,
                    failure(route, &message.delivery.meta, &rejected.error),
                );
            }
            error.is_none()
        });
        if messages.is_empty() {
            continue;
        }
        match end {
            End::Committed => {
                // Counted first: who waits until no lease is held then reads the counts.
                add(&route.counts.completed, messages.len());
                for message in &messages {
                    node.points.committed(message);
                    node.leases.end(&route.queue, &message.lease);
                }
            }
            End::Succeeded(emits) => {
                // The events go with the first message; a batch is completed by one statement.
                let mut emits = Some(emits);
                for message in &messages {
                    settle(
                        message,
                        Verdict::Complete {
                            emits: emits.take().unwrap_or_default(),
                            meta: Arc::clone(&message.delivery.meta),
                        },
                    );
                }
            }
            End::Failed(error) | End::Conflicted(error)
                if messages.len() > 1 && !matches!(error.kind(), Kind::Snooze(_)) =>
            {
                tracing::debug!(handler = route.name(), %error, messages = messages.len(), "a batch failed, splitting it");
                for message in &messages {
                    node.points.split(message, &error);
                }
                let second = messages.split_off(messages.len() / 2);
                waiting.push(second);
                waiting.push(messages);
            }
            End::Failed(error) | End::Conflicted(error) => {
                for message in &messages {
                    settle(message, failure(route, &message.delivery.meta, &error));
                }
            }
            End::Disturbed(why) => {
                tracing::debug!(
                    handler = route.name(),
                    "an attempt was disturbed and does not count: {why}"
                );
                node.client.doubt().look_at(&why);
                node.trouble
                    .met("finish an attempt, which does not count", &why);
                let why = why.to_string();
                for message in &messages {
                    node.points.disturbed(message, &why);
                    settle(message, give_back(DISTURBED_DELAY));
                }
            }
            End::Stolen(stolen) => {
                let (lost, ours) = messages
                    .into_iter()
                    .partition(|message| stolen.contains(&message.lease.msg_id));
                for message in &ours {
                    node.points
                        .disturbed(message, "another message of the batch was lost");
                }
                report_lost(node, route, lost);
                waiting.push(ours);
            }
            End::CommittedByHand | End::Aborted => {
                for message in &messages {
                    settle(message, give_back(Duration::ZERO));
                }
            }
        }
    }
}

/// Back to the queue, without counting an attempt.
fn give_back(delay: Duration) -> Verdict {
    Verdict::Release {
        delay,
        failure: None,
    }
}

fn report_lost(node: &Node, route: &Route, lost: Vec<Message>) {
    add(&route.counts.lost, lost.len());
    for message in lost {
        tracing::warn!(
            queue = route.queue,
            handler = route.name(),
            msg_id = message.lease.msg_id,
            "rolled back: the lease was lost and another node has the message, or it is gone"
        );
        node.points.lost(&message);
        node.leases.end(&route.queue, &message.lease);
    }
}

/// Calls the handler, and again from the start while its transaction meets deadlocks and serialization
/// failures: at once, a few times, as long as the messages are ours.
async fn call_despite_conflicts(
    node: &Node,
    route: &Route,
    messages: &[Message],
) -> (Vec<Rejected>, End) {
    let mut conflicts = 0;
    loop {
        node.points.begin(route, messages);
        let (rejected, end) = call_in_span(node, route, messages).await;
        let End::Conflicted(error) = end else {
            return (rejected, end);
        };
        if conflicts == store::MOST_CONFLICTS || node.abort.is_cancelled() {
            return (rejected, End::Conflicted(error));
        }
        conflicts += 1;
        for message in messages {
            node.points.conflicted(message, &error);
        }
        tracing::info!(
            handler = route.name(), %error, conflicts,
            "an attempt met a deadlock or a serialization failure and does not count, calling the handler again"
        );
        store::pause_after_conflict(conflicts).await;
        if let Err(end) = Box::pin(are_still_ours(node, route, messages)).await {
            return (rejected, end);
        }
    }
}

/// Asks the database: another node may have claimed the messages while the transactions waited for each
/// other.
async fn are_still_ours(node: &Node, route: &Route, messages: &[Message]) -> Result<(), End> {
    let msg_ids: Vec<i64> = messages.iter().map(|m| m.lease.msg_id).collect();
    let read_cts: Vec<i32> = messages.iter().map(|m| m.lease.read_ct).collect();
    let asked = async {
        let mut connection = node.connection().await?;
        let lost = queue::lost(&mut connection, &route.queue, &msg_ids, &read_cts).await?;
        connection.give_back().await?;
        Ok(lost)
    };
    match store::answered_within(PATIENCE, asked).await {
        Ok(lost) if lost.is_empty() => Ok(()),
        Ok(lost) => Err(End::Stolen(lost)),
        Err(error) => Err(End::Disturbed(error)),
    }
}

async fn call_in_span(node: &Node, route: &Route, messages: &[Message]) -> (Vec<Rejected>, End) {
    let span = span::of(route, messages);
    let (rejected, end) = call(node, route, messages).instrument(span.clone()).await;
    span::end(&span, &rejected, &end);
    (rejected, end)
}

/// Calls the handler once, in a transaction if it takes one, and commits that if it can.
///
/// What only some attempts do is boxed here and below: an attempt is a task, and the larger its future, the more
/// is copied for each message.
async fn call(node: &Node, route: &Route, messages: &[Message]) -> (Vec<Rejected>, End) {
    let tx = match begin_if_used(node, route).await {
        Ok(tx) => tx,
        Err(end) => return (Vec::new(), end),
    };
    let (rejected, tx, result) = invoke(node, route, tx, messages).await;
    let end = match (result, tx) {
        (Ok(emits), None) if messages.len() == 1 || emits.is_empty() => End::Succeeded(emits),
        (Ok(emits), tx) => {
            let completed: Vec<&Message> = messages
                .iter()
                .enumerate()
                .filter(|(index, _)| !rejected.iter().any(|rejected| rejected.index == *index))
                .map(|(_, message)| message)
                .collect();
            Box::pin(finish(node, route, tx, Hold::Lease, &completed, emits)).await
        }
        (Err(end), Some(tx)) => Box::pin(blame(tx, end)).await,
        (Err(end), None) => end,
    };
    let end = match end {
        End::CommittedByHand => End::Failed(Error::permanent(COMMITTED_BY_HAND)),
        end => end,
    };
    (rejected, end)
}

/// Calls the handler once for messages that its transaction has deleted, and commits if it can.
pub(super) async fn call_in(node: &Node, route: &Route, tx: Tx, messages: &[Message]) -> End {
    let span = span::of(route, messages);
    let end = commit_what_it_deleted(node, route, tx, messages)
        .instrument(span.clone())
        .await;
    span::end(&span, &[], &end);
    end
}

async fn commit_what_it_deleted(node: &Node, route: &Route, tx: Tx, messages: &[Message]) -> End {
    match invoke(node, route, Some(tx), messages).await {
        (rejected, Some(tx), Ok(emits)) if rejected.is_empty() => {
            let messages: Vec<&Message> = messages.iter().collect();
            finish(node, route, Some(tx), Hold::Deletion, &messages, emits).await
        }
        (rejected, tx, Ok(_)) => {
            if let Some(tx) = tx {
                roll_back(tx).await;
            }
            let error = rejected.into_iter().next().map(|rejected| rejected.error);
            End::Failed(error.unwrap_or_else(|| Error::retryable("the transaction is gone")))
        }
        (_, Some(mut tx), Err(end)) => {
            let is_marked = store::answered_within(PATIENCE, queue::is_marked(&mut tx)).await;
            let end = blame(tx, end).await;
            match is_marked {
                Ok(false) => End::CommittedByHand,
                _ => end,
            }
        }
        (_, None, Err(end)) => end,
    }
}

/// Gives up the transaction of a handler that failed, and decides whether the handler is to blame.
async fn blame(tx: Tx, end: End) -> End {
    let error = match end {
        End::Failed(error) if error.kind() == Kind::Retryable => error,
        other => {
            roll_back(tx).await;
            return other;
        }
    };
    match store::blame(error.as_source()) {
        Blame::Conflict => {
            roll_back(tx).await;
            End::Conflicted(error)
        }
        // A handler may have other connections, and may have made its transaction read-only itself.
        Blame::Lost | Blame::ReadOnly => match take_leave(tx).await {
            Ok(()) => End::Failed(error),
            Err(cause) => End::Disturbed(cause),
        },
        Blame::Other => {
            roll_back(tx).await;
            End::Failed(error)
        }
    }
}

/// Rolls back and closes the connection; an error says that it was lost, or leads to a server that takes no
/// writes.
async fn take_leave(mut tx: Tx) -> sqlx::Result<()> {
    let looked = nodes::is_read_only_after_rollback(&mut tx);
    if store::answered_within(PATIENCE, looked).await? {
        return Err(client::takes_no_writes());
    }
    Ok(())
}

/// Begins the transaction of a handler that takes one.
pub(super) async fn begin_if_used(node: &Node, route: &Route) -> Result<Option<Tx>, End> {
    if route.descriptor.uses_tx {
        Box::pin(begin(node, route, "")).await.map(Some)
    } else {
        Ok(None)
    }
}

/// Calls the handler once, with the transaction if it takes one, which is left open. The events are those
/// that it returned.
pub(super) async fn invoke(
    node: &Node,
    route: &Route,
    tx: Option<Tx>,
    messages: &[Message],
) -> (Vec<Rejected>, Option<Tx>, Result<Vec<Outgoing>, End>) {
    let first = &messages[0];
    let mut invocation = Invocation {
        context: Context {
            shared: Arc::clone(&node.shared),
            meta: Arc::clone(&first.delivery.meta),
            max_attempts: route.retry.max_attempts(),
            lease_lost: first.lease.lost.clone(),
        },
        deliveries: messages
            .iter()
            .map(|message| message.delivery.clone())
            .collect(),
        rejected: Vec::new(),
        tx,
    };
    let cause = cause(&first.delivery.meta);
    // A panic leaves the invocation's transaction behind, which is only dropped after it.
    let call = AssertUnwindSafe((route.descriptor.call.0)(&mut invocation)).catch_unwind();
    let call = Arc::clone(&node.points).handling(route, call);
    let mut handler = Box::pin(CAUSE.scope(cause.clone(), call));
    let lost = lost_of(messages);
    let begun_at = Instant::now();
    let result = tokio::select! {
        result = tokio::time::timeout(route.timeout, handler.as_mut()) => Ok(match result {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => Err(Error::retryable(format!("the handler panicked: {}", panic_text(&*panic)))),
            Err(_) => Err(Error::retryable(format!("the handler timed out after {:?}", route.timeout))),
        }),
        () = lost => {
            let gone = messages.iter().filter(|m| m.lease.lost.is_cancelled());
            Err(End::Stolen(gone.map(|m| m.lease.msg_id).collect()))
        }
        () = node.abort.cancelled() => Err(End::Aborted),
    };
    route.counts.attempt.took(begun_at.elapsed());
    // What the handler holds may panic when it is dropped half-way.
    let dropped = std::panic::catch_unwind(AssertUnwindSafe(|| drop(handler)));
    let result = match (result, dropped) {
        // The transaction is dropped, which closes its connection: a statement may still run.
        (Err(end), _) => return (Vec::new(), None, Err(end)),
        (Ok(Ok(_)), Err(panic)) => Err(Error::retryable(format!(
            "the handler panicked: {}",
            panic_text(&*panic)
        ))),
        (Ok(result), _) => result,
    };
    let Invocation { rejected, tx, .. } = invocation;
    let result = result.and_then(|outcome| {
        // An event that is returned has not been held to the limits yet.
        node.client
            .check(&outcome.emits)
            .map_err(Error::permanent)?;
        if tx.as_ref().is_some_and(|tx| !tx.is_whole()) {
            return Err(Error::retryable(NOT_WHOLE));
        }
        Ok(inherit(outcome.emits, &cause))
    });
    (rejected, tx, result.map_err(End::Failed))
}

/// Completes when one of the messages is lost.
async fn lost_of(messages: &[Message]) {
    match messages {
        [message] => message.lease.lost.cancelled().await,
        messages => {
            let lost = messages
                .iter()
                .map(|message| Box::pin(message.lease.lost.cancelled()));
            futures_util::future::select_all(lost).await;
        }
    }
}

/// Commits what the handler did, with the events it returned. What a batch emits belongs to all of
/// its messages: stored with all or not at all.
async fn finish(
    node: &Node,
    route: &Route,
    tx: Option<Tx>,
    hold: Hold,
    completed: &[&Message],
    returned: Vec<Outgoing>,
) -> End {
    let mut tx = match tx {
        Some(tx) => tx,
        None => match begin(node, route, "").await {
            Ok(tx) => tx,
            Err(end) => return end,
        },
    };
    let mut emits = tx.take_outgoing();
    emits.extend(returned);
    // A commit runs what was deferred to it, and no statement_timeout stops it.
    let took_too_long = tokio::time::sleep(route.timeout.saturating_add(PATIENCE));
    let no_answer = async {
        node.abort.cancelled().await;
        tokio::time::sleep(PATIENCE).await;
    };
    tokio::select! {
        end = commit(node, route, tx, hold, completed, &emits) => end,
        () = took_too_long => End::Failed(Error::retryable(format!(
            "storing its effect took longer than the timeout of {:?}", route.timeout
        ))),
        () = no_answer => End::Disturbed(store::no_answer()),
    }
}

/// What the handled event passes on to those that its handler emits.
fn cause(meta: &EnvelopeMeta) -> Cause {
    let correlation_id = meta
        .correlation_id()
        .map_or_else(|| meta.event_id().to_string(), str::to_owned);
    Cause {
        event_id: meta.event_id(),
        correlation_id: Some(correlation_id),
        traceparent: meta.headers.traceparent.clone(),
        tracestate: meta.headers.tracestate.clone(),
    }
}

fn inherit(mut emits: Vec<Outgoing>, cause: &Cause) -> Vec<Outgoing> {
    for event in &mut emits {
        event.inherit(Some(cause));
    }
    emits
}

/// Rolls back, or closes the connection, which rolls back as well: a statement of a handler that
/// timed out may still run, and a connection that is gone does not answer.
pub(super) async fn roll_back(tx: Tx) {
    let _ = tokio::time::timeout(PATIENCE, tx.rollback()).await;
}

/// Begins a handler's transaction; `settings` are statements that go with it.
pub(super) async fn begin(node: &Node, route: &Route, settings: &str) -> Result<Tx, End> {
    let begun = async {
        let leave = Arc::clone(&node.transactions)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        // sqlx limits how long a connection of the pool is waited for, and nothing else.
        let tx = store::answered_within(client::ANSWER, begin_now(node, route, settings)).await?;
        Ok(tx.with_leave(leave))
    };
    tokio::select! {
        begun = begun => begun.map_err(End::Disturbed),
        () = node.abort.cancelled() => Err(End::Aborted),
    }
}

async fn begin_now(node: &Node, route: &Route, more: &str) -> sqlx::Result<Tx> {
    let connection = node.client.lender().acquire().await?;
    // The server stops a statement when the handler's time is over. It gives the transaction up a while
    // later: the handler's own clock starts after `begin`, and a starved process sees it late.
    let ms = |time: Duration| time.as_millis().clamp(1, i32::MAX as u128);
    let settings = format!(
        "{}; set local statement_timeout = {}; set local idle_in_transaction_session_timeout = {}; {more}",
        queue::MARK_TRANSACTION,
        ms(route.timeout),
        ms(route.timeout.saturating_add(PATIENCE)),
    );
    Tx::begin(&node.client, connection, &settings).await
}

/// Stores completion and events with the handler's transaction, and commits if all messages are
/// still ours.
async fn commit(
    node: &Node,
    route: &Route,
    mut tx: Tx,
    hold: Hold,
    messages: &[&Message],
    emits: &[Outgoing],
) -> End {
    let msg_ids: Vec<i64> = messages
        .iter()
        .map(|message| message.lease.msg_id)
        .collect();
    let read_cts: Vec<i32> = messages
        .iter()
        .map(|message| message.lease.read_ct)
        .collect();
    let completion = (hold == Hold::Lease).then_some(Completion {
        within: queue::Within::HandlersTransaction,
        queue: &route.queue,
        msg_ids: &msg_ids,
        read_cts: &read_cts,
    });
    // Options were set after the events were checked.
    if let Err(error) = node.client.check(emits) {
        roll_back(tx).await;
        return End::Failed(Error::permanent(error));
    }
    let queues = match store_in(node, &mut tx, completion, emits).await {
        Ok(Some(Stored {
            conflict: Some(key),
            ..
        })) => {
            roll_back(tx).await;
            return End::Failed(Error::from(EmitError::KeyUsedForAnotherEvent { key }));
        }
        Ok(Some(stored)) if completion.is_none() || stored.completed.len() == msg_ids.len() => {
            stored.queues
        }
        Ok(None) => {
            roll_back(tx).await;
            return End::CommittedByHand;
        }
        Ok(Some(Stored { completed, .. })) => {
            roll_back(tx).await;
            return End::Stolen(
                msg_ids
                    .into_iter()
                    .filter(|id| !completed.contains(id))
                    .collect(),
            );
        }
        Err(EmitError::Append { source }) if store::is_conflict(&source) => {
            roll_back(tx).await;
            return End::Conflicted(Error::from(EmitError::Append { source }));
        }
        Err(EmitError::Append { source } | EmitError::Connect(source))
            if store::classify(&source) == Failure::Transient =>
        {
            return End::Disturbed(source);
        }
        Err(EmitError::MissingQueue { source }) => {
            roll_back(tx).await;
            node.mend(&source).await;
            return End::Disturbed(source);
        }
        Err(EmitError::Append { source }) if store::is_aborted(&source) => {
            roll_back(tx).await;
            return End::Failed(Error::retryable(SWALLOWED));
        }
        Err(error) => {
            roll_back(tx).await;
            return End::Failed(Error::from(error));
        }
    };
    let is_of = |handler: &str| handler == route.name();
    if let Err(error) = node.points.reach(Point::BeforeCommit, is_of).await {
        return End::Disturbed(error);
    }
    let decide = |is_decided| {
        for message in messages {
            message.lease.decide(is_decided);
        }
    };
    decide(true);
    let committed = match tx.commit_only().await {
        Ok(()) => node.points.reach(Point::AfterCommit, is_of).await,
        Err(error) => Err(error),
    };
    match committed {
        Ok(()) => {
            node.client.emitted().add_all(emits);
            node.client.wake(queues);
            End::Committed
        }
        Err(error) if store::is_conflict(&error) => {
            decide(false);
            End::Conflicted(Error::from(error))
        }
        // Refused: a constraint that is checked at the commit, most often.
        Err(error @ sqlx::Error::Database(_)) if store::classify(&error) != Failure::Transient => {
            decide(false);
            End::Failed(Error::from(error))
        }
        // Whether it was committed is unknown. If it was, the messages are gone, and the verdict
        // that follows finds nothing to change.
        Err(error) => End::Disturbed(error),
    }
}

/// Stores completion and events in the handler's transaction, by as many statements as it takes. The
/// first one completes: no event is stored in a transaction that the handler has ended itself, which `None` says.
async fn store_in(
    node: &Node,
    tx: &mut Tx,
    completion: Option<Completion<'_>>,
    emits: &[Outgoing],
) -> Result<Option<Stored>, EmitError> {
    let append = |source| EmitError::Append { source };
    let mut chunks = client::chunks(emits).into_iter();
    let mut stored = Stored::default();
    if let Some(completion) = completion {
        let (queue, within) = (completion.queue, completion.within);
        let (msg_ids, read_cts) = (completion.msg_ids, completion.read_cts);
        if let Some(first) = chunks.next() {
            let source = vec![None; first.len()];
            let first = node
                .client
                .store_chunk(tx, first, Some(completion), &source);
            stored = first.await?;
        } else {
            let completed = queue::complete(tx, queue, within, msg_ids, read_cts);
            stored.completed = completed.await.map_err(append)?;
        }
        if stored.completed.len() < msg_ids.len() {
            let is_ended = matches!(queue::is_marked(tx).await, Ok(false));
            return Ok((!is_ended).then_some(stored));
        }
    } else if !queue::is_marked(tx).await.map_err(append)? {
        return Ok(None);
    }
    for chunk in chunks {
        let more = node.client.store_chunk(tx, chunk, None, &[]).await?;
        stored.queues.extend(more.queues);
        stored.conflict = stored.conflict.or(more.conflict);
    }
    Ok(Some(stored))
}

/// As much of an error's text as is kept.
pub(super) fn cut(mut text: String) -> String {
    if text.len() > MAX_ERROR_BYTES {
        text.truncate(text.floor_char_boundary(MAX_ERROR_BYTES));
        text.push('…');
    }
    text
}

/// The verdict on a message whose attempt failed.
pub(super) fn failure(route: &Route, meta: &EnvelopeMeta, error: &Error) -> Verdict {
    if let Kind::Snooze(delay) = error.kind() {
        return Verdict::Release {
            delay,
            failure: None,
        };
    }
    let attempts = meta.attempt();
    let text = cut(error.to_string());
    // Postgres stores no U+0000, and an error's text may quote anything.
    let text = text.replace('\0', "\u{fffd}");
    let mut errors = meta.headers.errors.clone();
    errors.push(PastError {
        attempt: attempts,
        at: Timestamp::now().to_string(),
        error: text.clone(),
    });
    let failed = Failed { attempts, errors };
    let reason = match error.kind() {
        Kind::Undecodable => "Undecodable payload",
        Kind::Permanent => "Permanent error",
        _ if attempts >= route.retry.max_attempts() => "Attempts exhausted",
        _ => {
            let delay = route.retry.jittered_delay_after(attempts, fastrand::f64());
            tracing::warn!(
                handler = route.name(),
                event_id = meta.event_id(),
                attempt = attempts,
                ?delay,
                error = text,
                "attempt failed, trying again later"
            );
            return Verdict::Release {
                delay,
                failure: Some(failed),
            };
        }
    };
    Verdict::DeadLetter {
        reason,
        error: text,
        failed,
    }
}
