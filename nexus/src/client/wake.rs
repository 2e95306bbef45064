//! Telling workers that there is something to do, here at once and elsewhere by a doorbell.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use sqlx::{Connection, PgConnection};
use tokio::sync::Notify;

use super::{
    Database,
    lent::{begin_if_pooled, commit_if_pooled},
};
use crate::{
    config::Pooler,
    store::{self, notify},
};

/// Other processes are told at once, but no sooner than this after the last time.
const PAUSE: Duration = Duration::from_millis(1);

/// The same after a time in which [`LOAD`] rings or more have gathered: to notify takes each process a moment.
const PAUSE_UNDER_LOAD: Duration = Duration::from_millis(5);
const LOAD: u32 = 5;

/// How long a ring may take before its connection counts as lost.
const RING_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the doorbell waits before it tries to connect again. Polling covers the gap.
const RECONNECT_AFTER: Duration = Duration::from_secs(1);

/// Rings the workers of this process, and a doorbell that those of other processes hear.
#[derive(Debug, Clone)]
pub(crate) struct Bell {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The workers of this process, by queue.
    local: Mutex<HashMap<String, Arc<Notify>>>,
    /// Queues that other processes have not been told of yet.
    pending: Mutex<Pending>,
    has_pending: Notify,
}

#[derive(Debug, Default)]
struct Pending {
    queues: BTreeSet<String>,
    /// How often it was rung for them.
    rings: u32,
}

impl Bell {
    /// Starts the doorbell; it stops when the last clone of the bell is dropped. Must be called
    /// inside a tokio runtime.
    pub(crate) fn start(database: &Database, namespace: &str) -> Self {
        let inner = Arc::new(Inner::default());
        tokio::spawn(doorbell(
            Arc::downgrade(&inner),
            database.clone(),
            notify::channel(namespace),
        ));
        Self { inner }
    }

    /// What a worker of the queue waits on.
    pub(crate) fn of(&self, queue: &str) -> Arc<Notify> {
        let mut local = self
            .inner
            .local
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Arc::clone(local.entry(queue.to_owned()).or_default())
    }

    /// Wakes the queues' workers in this process.
    pub(crate) fn ring_here(&self, queue: &str) {
        let local = self
            .inner
            .local
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = local.get(queue) {
            worker.notify_one();
        }
    }

    /// Wakes every worker in this process.
    pub(crate) fn ring_all_here(&self) {
        let local = self
            .inner
            .local
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for worker in local.values() {
            worker.notify_one();
        }
    }

    /// Wakes the queues' workers here, and soon in every process. Call it after the commit.
    pub(crate) fn ring(&self, queues: impl IntoIterator<Item = String>) {
        let queues: Vec<String> = queues.into_iter().collect();
        if queues.is_empty() {
            return;
        }
        for queue in &queues {
            self.ring_here(queue);
        }
        let mut pending = self
            .inner
            .pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        pending.queues.extend(queues);
        pending.rings += 1;
        drop(pending);
        self.inner.has_pending.notify_one();
    }
}

async fn doorbell(inner: Weak<Inner>, database: Database, channel: String) {
    let mut connection: Option<PgConnection> = None;
    loop {
        // Held weakly while waiting, so that the doorbell ends with the bell.
        let Pending { queues, rings } = {
            let Some(inner) = inner.upgrade() else { break };
            let waited =
                tokio::time::timeout(Duration::from_secs(1), inner.has_pending.notified()).await;
            if waited.is_err() {
                continue;
            }
            let mut pending = inner.pending.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *pending)
        };
        let queues: Vec<String> = queues.into_iter().collect();
        if queues.is_empty() {
            continue;
        }
        let rung = ring(&mut connection, &database, &channel, &queues);
        match store::answered_within(RING_TIMEOUT, rung).await {
            Ok(()) => {
                let is_loaded = rings >= LOAD;
                tokio::time::sleep(if is_loaded { PAUSE_UNDER_LOAD } else { PAUSE }).await;
            }
            Err(error) => {
                tracing::debug!(%error, "the doorbell lost its connection, workers poll meanwhile");
                connection = None;
                tokio::time::sleep(RECONNECT_AFTER).await;
            }
        }
    }
    if let Some(connection) = connection {
        // The session ends either way; closing it properly only spares the server a log line.
        let _ = connection.close().await;
    }
}

async fn ring(
    connection: &mut Option<PgConnection>,
    database: &Database,
    channel: &str,
    queues: &[String],
) -> sqlx::Result<()> {
    let pooler = database.mode();
    let connection = if let Some(connection) = connection {
        connection
    } else {
        let mut fresh = PgConnection::connect_with(database.options()).await?;
        if pooler == Pooler::Session {
            notify::prepare_to_ring(&mut fresh).await?;
        }
        connection.insert(fresh)
    };
    begin_if_pooled(connection, pooler, notify::TO_RING).await?;
    notify::ring(connection, channel, queues).await?;
    commit_if_pooled(connection, pooler).await
}
