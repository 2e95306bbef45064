use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;

use super::NodeMetrics;
use crate::{
    client::{ANSWER, Client},
    runtime::{Route, Running},
    store,
};

/// A running app: for embedding it in a larger program, and for tests.
///
/// Dropped without [`shutdown`](Self::shutdown), the node goes on until the runtime ends; its messages
/// then come back when their leases end.
#[must_use = "dropping the handle leaves the app running; call `shutdown`"]
pub struct Handle {
    pub(super) running: Running,
    pub(super) fenced: CancellationToken,
}

/// What became of a handler's attempts since the node started.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HandlerStats {
    /// The handler's group.
    pub group: String,
    /// The handler.
    pub handler: &'static str,
    /// The event type it takes.
    pub event_type: String,
    /// Messages whose handling is done.
    pub completed: u64,
    /// Attempts that failed and are tried again.
    pub retried: u64,
    /// Attempts that put themselves off.
    pub snoozed: u64,
    /// Messages that were given up.
    pub dead_lettered: u64,
    /// Verdicts that were refused because the lease had been lost: another node runs, or has run, the
    /// message.
    pub lost: u64,
}

fn stats(routes: &[Arc<Route>]) -> Vec<HandlerStats> {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    routes
        .iter()
        .map(|route| HandlerStats {
            group: route.group.clone(),
            handler: route.name(),
            event_type: route.event_type.clone(),
            completed: read(&route.counts.completed),
            retried: read(&route.counts.retried),
            snoozed: read(&route.counts.snoozed),
            dead_lettered: read(&route.counts.dead_lettered),
            lost: read(&route.counts.lost),
        })
        .collect()
}

impl Handle {
    /// The app's client.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.running.node.client
    }

    /// The id of this node.
    #[must_use]
    pub fn node_id(&self) -> &str {
        &self.running.node.row.id
    }

    /// What the handlers of this node have done so far.
    #[must_use]
    pub fn stats(&self) -> Vec<HandlerStats> {
        stats(&self.running.routes)
    }

    /// What this node has counted, timed and holds, in the text format of Prometheus
    /// (`text/plain; version=0.0.4`): for a route of yours that Prometheus scrapes. `docs/metrics.md` lists it.
    ///
    /// Of the nodes of a namespace one tells its figures as well, the one of those alive that started first; they are
    /// collected every 15 s, and left out while the database is away. Asks nothing of the database.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.node_metrics().text()
    }

    /// What [`metrics`](Self::metrics) writes, for a route that outlives this handle.
    #[must_use]
    pub fn node_metrics(&self) -> NodeMetrics {
        NodeMetrics::of(&self.running)
    }

    /// Waits until no message is left for this node's handlers, waiting for a retry included, none of a
    /// foreign program to be adopted, no delayed event that is due, and no replay to these handlers runs. With other emitters that moment may never come: put
    /// a timeout around it.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn idle(&self) -> sqlx::Result<()> {
        loop {
            if self.is_idle().await? {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn is_idle(&self) -> sqlx::Result<bool> {
        let node = &self.running.node;
        if store::answered_within(ANSWER, self.has_work()).await? {
            return Ok(false);
        }
        // A completed message is gone from its queue a moment before it is counted.
        Ok(node.leases.is_empty() && node.batches.load(Ordering::Relaxed) == 0)
    }

    async fn has_work(&self) -> sqlx::Result<bool> {
        let node = &self.running.node;
        let mut connection = node.connection().await?;
        // Before the queues, which these events move to.
        let namespace = &node.row.namespace;
        let until_next = store::delayed_emits::until_next(&mut connection, namespace).await?;
        if until_next.is_some_and(|micros| micros <= 0) {
            connection.give_back().await?;
            return Ok(true);
        }
        let handlers = &node.row.handlers;
        if store::replays::is_any_running(&mut connection, namespace, handlers).await? {
            return Ok(false);
        }
        // In the main queue, messages of foreign programs wait to be adopted.
        let mut queues = BTreeMap::from([(self.running.main_queue.as_str(), Vec::new())]);
        for route in &self.running.routes {
            let handlers = queues.entry(route.queue.as_str()).or_default();
            handlers.push((route.name(), route.event_version));
            // What still carries a former name is on its way.
            let formerly = route.descriptor.formerly.iter();
            handlers.extend(formerly.map(|&former| (former, route.event_version)));
        }
        let has_messages = store::queue::has_messages(&mut connection, &queues).await?;
        connection.give_back().await?;
        Ok(has_messages)
    }

    /// Completes when the node cannot go on, because another process has started with its id.
    pub fn fenced(&self) -> impl Future<Output = ()> + use<> {
        self.fenced.clone().cancelled_owned()
    }

    /// Stops gently: takes no new work, lets what runs finish within the shutdown timeout, gives
    /// the rest back without counting an attempt, and deregisters the node. Returns the final
    /// [`stats`](Self::stats). The client and its pool are closed with it.
    pub async fn shutdown(self) -> Vec<HandlerStats> {
        let routes = self.running.routes.clone();
        // Boxed, as the start is: neither is to make large what awaits it.
        Box::pin(self.running.shutdown()).await;
        stats(&routes)
    }

    #[cfg(feature = "testing")]
    pub(crate) fn running(&self) -> &Running {
        &self.running
    }

    /// Stops waiting for running handlers during [`shutdown`](Self::shutdown).
    pub(super) fn abort(&self) -> CancellationToken {
        self.running.node.abort.clone()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("node", &self.node_id())
            .finish_non_exhaustive()
    }
}
