//! Keeps claimed messages ours and the node alive.
//!
//! From a thread and a connection of its own, so that handlers which block every thread of the
//! async runtime, or hold every connection of the pool, cannot make the node look dead.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Trouble, supervise};
use crate::{
    client::{begin_if_pooled, commit_if_pooled, roll_back_if_pooled},
    config::Pooler,
    store::{
        self,
        nodes::{self, Beat},
        queue,
    },
};

/// How often leases are extended and the heartbeat is sent: three times a default lease.
const EVERY: Duration = Duration::from_secs(3);

/// How long closing the connection may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long a connection attempt or a round of statements may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(3);

/// The leases of one queue, by message.
type Held = HashMap<i64, Weak<Lease>>;

/// The messages this node holds, by queue.
///
/// Weakly: who has a message at hand keeps its lease. What is dropped without a verdict, because
/// something panicked, is not extended any more, and comes back when its lease ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leases {
    held: Arc<Mutex<HashMap<String, Held>>>,
}

/// A claimed message is ours until the deadline, which is extended while we hold it.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) msg_id: i64,
    pub(crate) read_ct: i32,
    /// Monotonic, and counted from before the claim was sent: never later than the server's.
    deadline: Mutex<Instant>,
    /// Cancelled when the message is no longer ours: its verdict would be refused.
    pub(crate) lost: CancellationToken,
    settled: AtomicBool,
    /// See [`decide`](Self::decide).
    decided: AtomicBool,
}

impl Lease {
    /// Of a message that the handler's own transaction has deleted: nobody can take it until that ends.
    pub(crate) fn of_deleted(msg_id: i64, read_ct: i32) -> Arc<Self> {
        Arc::new(Self::new(msg_id, read_ct, Instant::now()))
    }

    fn new(msg_id: i64, read_ct: i32, deadline: Instant) -> Self {
        Self {
            msg_id,
            read_ct,
            deadline: Mutex::new(deadline),
            lost: CancellationToken::new(),
            settled: AtomicBool::new(false),
            decided: AtomicBool::new(false),
        }
    }

    pub(crate) fn remaining(&self) -> Duration {
        let deadline = *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        deadline.saturating_duration_since(Instant::now())
    }

    /// Says whether a verdict on the message is on its way. Once it is stored the message is no
    /// longer ours, which is no loss; if it is refused, whoever stores it reports that.
    pub(crate) fn decide(&self, is_decided: bool) {
        self.decided.store(is_decided, Ordering::Release);
    }

    fn extend_to(&self, deadline: Instant) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }
}

impl Leases {
    pub(crate) fn hold(
        &self,
        queue: &str,
        msg_id: i64,
        read_ct: i32,
        deadline: Instant,
    ) -> Arc<Lease> {
        let lease = Arc::new(Lease::new(msg_id, read_ct, deadline));
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let before = held
            .entry(queue.to_owned())
            .or_default()
            .insert(msg_id, Arc::downgrade(&lease));
        drop(held);
        // We have claimed a message that an attempt of ours still holds: its lease had ended.
        if let Some(before) = before.and_then(|before| before.upgrade()) {
            self.lose(queue, &before, "this node has claimed it again");
        }
        lease
    }

    pub(crate) fn end(&self, queue: &str, lease: &Arc<Lease>) {
        lease.settled.store(true, Ordering::Release);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(messages) = held.get_mut(queue) {
            // A later claim of the same message holds a lease of its own under the same id.
            if messages
                .get(&lease.msg_id)
                .is_some_and(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(lease)))
            {
                messages.remove(&lease.msg_id);
            }
        }
    }

    /// Whether this node holds no message.
    pub(crate) fn is_empty(&self) -> bool {
        self.of_queues().is_empty()
    }

    pub(crate) fn of_queues(&self) -> Vec<(String, Vec<Arc<Lease>>)> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter_mut()
            .filter_map(|(queue, messages)| {
                messages.retain(|_, lease| lease.strong_count() > 0);
                let leases: Vec<_> = messages.values().filter_map(Weak::upgrade).collect();
                (!leases.is_empty()).then(|| (queue.clone(), leases))
            })
            .collect()
    }

    /// Marks what could not be extended in time as lost.
    fn expire(&self) {
        for (queue, leases) in self.of_queues() {
            for lease in leases
                .into_iter()
                .filter(|lease| lease.remaining().is_zero())
            {
                self.lose(&queue, &lease, "its lease could not be extended in time");
            }
        }
    }

    fn lose(&self, queue: &str, lease: &Arc<Lease>, why: &str) {
        if lease.decided.load(Ordering::Acquire) {
            return;
        }
        if !lease.settled.load(Ordering::Acquire) && !lease.lost.is_cancelled() {
            tracing::warn!(queue, msg_id = lease.msg_id, "lost a message: {why}");
            lease.lost.cancel();
        }
        self.end(queue, lease);
    }
}

/// The control thread of a node.
#[derive(Debug)]
pub(crate) struct Control {
    stop: Arc<Notify>,
    stopped: oneshot::Receiver<()>,
}

/// What the control thread works for.
pub(crate) struct Duty {
    pub(crate) options: PgConnectOptions,
    pub(crate) pooler: Pooler,
    pub(crate) trouble: Trouble,
    pub(crate) node: nodes::Node,
    pub(crate) epoch: i64,
    pub(crate) lease: Duration,
    pub(crate) leases: Leases,
    /// Cancelled when a newer boot has taken the node's id: this one has to stop.
    pub(crate) fenced: CancellationToken,
    /// Cancelled when nothing of the node is left: its tasks end with the program's async runtime,
    /// which this thread would outlive, holding leases for nobody.
    pub(crate) gone: CancellationToken,
}

impl Control {
    pub(crate) fn start(duty: Duty) -> std::io::Result<Self> {
        let stop = Arc::new(Notify::new());
        let (done, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let until = Arc::clone(&stop);
        std::thread::Builder::new()
            .name("nexus-control".to_owned())
            .spawn(move || {
                let gone = duty.gone.clone();
                let control =
                    supervise::again("the control thread", gone, || control(&duty, &until));
                runtime.block_on(control);
                // The receiver is gone if nobody waits for us.
                let _ = done.send(());
            })?;
        Ok(Self { stop, stopped })
    }

    pub(crate) async fn stop(self) {
        self.stop.notify_one();
        // An error means that the thread has ended already.
        let _ = self.stopped.await;
    }
}

async fn control(duty: &Duty, stop: &Notify) {
    let mut connection: Option<PgConnection> = None;
    // A short lease (tests, impatient users) is extended three times within it, too.
    let every = EVERY.min(duty.lease / 3);
    let mut conflicts = 0;
    loop {
        let pause = async {
            if conflicts > 0 {
                store::pause_after_conflict(conflicts).await;
            } else {
                tokio::time::sleep(every).await;
            }
        };
        tokio::select! {
            () = stop.notified() => break,
            () = duty.gone.cancelled() => break,
            () = pause => {}
        }
        let round = store::answered_within(PATIENCE.max(every), round(duty, &mut connection));
        let Some(round) = duty.gone.run_until_cancelled(round).await else {
            break;
        };
        match round {
            Ok(()) => {
                conflicts = 0;
                duty.trouble.is_over();
            }
            Err(error) => {
                let is_conflict = store::is_conflict(&error) && conflicts < store::MOST_CONFLICTS;
                conflicts = if is_conflict { conflicts + 1 } else { 0 };
                duty.trouble.met("send the heartbeat", &error);
                connection = None;
            }
        }
        duty.leases.expire();
    }
    if let Some(connection) = connection {
        // The session ends either way; closing it properly only spares the server a log line.
        let _ = tokio::time::timeout(FAREWELL, connection.close()).await;
    }
}

async fn round(duty: &Duty, connection: &mut Option<PgConnection>) -> sqlx::Result<()> {
    let connection = match connection {
        Some(connection) => connection,
        None => connection.insert(PgConnection::connect_with(&duty.options).await?),
    };
    for (queue, leases) in duty.leases.of_queues() {
        begin_if_pooled(connection, duty.pooler, "").await?;
        match extend(duty, connection, &queue, &leases).await {
            Ok(()) => commit_if_pooled(connection, duty.pooler).await?,
            // The worker reports a queue that is gone and restores it.
            Err(error) if store::classify(&error) == store::Failure::MissingTable => {
                roll_back_if_pooled(connection, duty.pooler).await?;
            }
            Err(error) => return Err(error),
        }
    }
    begin_if_pooled(connection, duty.pooler, "").await?;
    match nodes::beat(connection, &duty.node.id, duty.epoch).await? {
        Beat::Alive => {}
        Beat::Forgotten => {
            tracing::warn!(
                node = duty.node.id,
                "the node was taken for dead, registering again"
            );
            nodes::restore(connection, &duty.node, duty.epoch).await?;
        }
        Beat::Fenced => {
            if !duty.fenced.is_cancelled() {
                tracing::error!(
                    node = duty.node.id,
                    "another process has started with this node's id, stopping"
                );
                duty.fenced.cancel();
            }
        }
    }
    commit_if_pooled(connection, duty.pooler).await
}

async fn extend(
    duty: &Duty,
    connection: &mut PgConnection,
    queue: &str,
    leases: &[Arc<Lease>],
) -> sqlx::Result<()> {
    let sent_at = Instant::now();
    let msg_ids: Vec<i64> = leases.iter().map(|lease| lease.msg_id).collect();
    let read_cts: Vec<i32> = leases.iter().map(|lease| lease.read_ct).collect();
    let extended = queue::extend(connection, queue, &msg_ids, &read_cts, duty.lease).await?;
    let mut skipped: Vec<&Arc<Lease>> = Vec::new();
    for lease in leases {
        if extended.contains(&lease.msg_id) {
            lease.extend_to(sent_at + duty.lease);
        } else {
            skipped.push(lease);
        }
    }
    if skipped.is_empty() {
        return Ok(());
    }
    // Skipped means locked, by our own completion perhaps, or taken from us.
    let msg_ids: Vec<i64> = skipped.iter().map(|lease| lease.msg_id).collect();
    let read_cts: Vec<i32> = skipped.iter().map(|lease| lease.read_ct).collect();
    let lost = queue::lost(connection, queue, &msg_ids, &read_cts).await?;
    for lease in skipped
        .into_iter()
        .filter(|lease| lost.contains(&lease.msg_id))
    {
        duty.leases
            .lose(queue, lease, "another node has claimed it, or it is gone");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_whose_verdict_is_on_its_way_is_not_reported_as_lost() {
        let leases = Leases::default();
        let decided = leases.hold("q", 1, 1, Instant::now());
        let running = leases.hold("q", 2, 1, Instant::now());
        let again = leases.hold("q", 3, 1, Instant::now());
        decided.decide(true);
        again.decide(true);
        again.decide(false);
        leases.expire();
        assert!(!decided.lost.is_cancelled());
        assert!(running.lost.is_cancelled());
        assert!(again.lost.is_cancelled());
        // Whoever stores the verdict counts it first, and lets the message go then.
        assert!(!leases.is_empty());
        leases.end("q", &decided);
        assert!(leases.is_empty());
    }

    #[test]
    fn a_message_that_is_dropped_without_a_verdict_is_not_held() {
        let leases = Leases::default();
        let kept = leases.hold("q", 1, 1, Instant::now());
        drop(leases.hold("q", 2, 1, Instant::now()));
        drop(leases.hold("r", 3, 1, Instant::now()));
        let held = leases.of_queues();
        assert_eq!(held.len(), 1);
        assert!(Arc::ptr_eq(&held[0].1[0], &kept));
    }
}
