//! The loops that move messages.
//!
//! - [`worker`] claims messages of one queue and starts attempts; one for each queue of the node.
//! - [`attempt`] runs a handler for a message and decides how the attempt ends.
//! - [`settle`] stores the verdicts, many in one statement.
//! - [`lease`] keeps claimed messages ours, and the node alive, from a thread of its own.
//! - [`scheduler`] fires ticks, [`adopter`] takes in what foreign programs send, [`caretaker`]
//!   does what has to be done from time to time, [`listener`] hears the doorbell.
//!
//! A message is in exactly one place at a time: in its queue, in a worker's buffer, in an attempt,
//! or on its way to be settled. From the claim until it is settled its lease is held by [`lease`].

mod adopter;
mod attempt;
mod caretaker;
mod lease;
mod listener;
mod scheduler;
mod settle;
mod worker;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::postgres::PgConnectOptions;
use tokio::sync::RwLock;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    client::Client, handler::Shared, registry::HandlerDescriptor, retry::RetryPolicy, store::nodes,
};

pub(crate) use lease::{Control, Duty, Leases};

/// A handler as this node runs it: its descriptor with all defaults filled in.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) descriptor: &'static HandlerDescriptor,
    pub(crate) group: String,
    pub(crate) queue: String,
    pub(crate) event_type: String,
    pub(crate) event_version: u32,
    pub(crate) retry: RetryPolicy,
    pub(crate) timeout: Duration,
    pub(crate) concurrency: usize,
    pub(crate) counts: Counts,
}

impl Route {
    pub(crate) fn name(&self) -> &'static str {
        self.descriptor.name
    }
}

/// What became of a handler's attempts since the node started.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) completed: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) snoozed: AtomicU64,
    pub(crate) dead_lettered: AtomicU64,
    pub(crate) lost: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

/// How a node runs; the app's settings with all defaults filled in.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) lease: Duration,
    pub(crate) batch_size: usize,
    /// Ceiling of the adaptive poll.
    pub(crate) idle_poll: Duration,
    pub(crate) max_body_bytes: i32,
    pub(crate) shutdown_timeout: Duration,
    pub(crate) retention: Duration,
}

/// What all loops of a node share.
pub(crate) struct Node {
    pub(crate) row: nodes::Node,
    pub(crate) epoch: i64,
    pub(crate) client: Client,
    pub(crate) options: PgConnectOptions,
    pub(crate) settings: Settings,
    pub(crate) shared: Arc<Shared>,
    pub(crate) leases: lease::Leases,
    /// No new work is taken; what runs goes on.
    pub(crate) stop: CancellationToken,
    /// What still runs is given up.
    pub(crate) abort: CancellationToken,
    /// Held for reading by all claimed work, for writing by a message that may kill its process:
    /// such a message runs alone.
    pub(crate) isolation: Arc<RwLock<()>>,
}

/// A node at work.
pub(crate) struct Running {
    pub(crate) node: Arc<Node>,
    pub(crate) routes: Vec<Arc<Route>>,
    control: Control,
    workers: TaskTracker,
    services: TaskTracker,
    settlers: TaskTracker,
}

/// Starts all loops of a node. The row of the node is registered already. `main_queue` is the one
/// of the namespace's default group.
pub(crate) fn start(
    node: Arc<Node>,
    control: Control,
    routes: Vec<Route>,
    main_queue: String,
) -> Running {
    let routes: Vec<Arc<Route>> = routes.into_iter().map(Arc::new).collect();
    let mut by_queue: BTreeMap<String, Vec<Arc<Route>>> = BTreeMap::new();
    for route in &routes {
        by_queue
            .entry(route.queue.clone())
            .or_default()
            .push(Arc::clone(route));
    }
    let (workers, services, settlers) =
        (TaskTracker::new(), TaskTracker::new(), TaskTracker::new());
    let mut queues: Vec<String> = by_queue.keys().cloned().collect();
    for (queue, routes) in by_queue {
        let settler = settle::start(&settlers, Arc::clone(&node), queue.clone());
        workers.spawn(worker::run(Arc::clone(&node), queue, routes, settler));
    }
    // Every node adopts, whatever its groups.
    if !queues.contains(&main_queue) {
        queues.push(main_queue);
    }
    services.spawn(adopter::run(Arc::clone(&node), queues));
    services.spawn(scheduler::run(Arc::clone(&node)));
    services.spawn(caretaker::run(Arc::clone(&node)));
    services.spawn(listener::run(Arc::clone(&node)));
    for tracker in [&workers, &services, &settlers] {
        tracker.close();
    }
    Running {
        node,
        routes,
        control,
        workers,
        services,
        settlers,
    }
}

impl Running {
    /// Takes no new work, lets what runs finish for as long as the shutdown timeout allows, gives
    /// back the rest, and forgets the node.
    pub(crate) async fn shutdown(self) {
        let Self {
            node,
            control,
            workers,
            services,
            settlers,
            ..
        } = self;
        node.stop.cancel();
        let timeout = node.settings.shutdown_timeout;
        if tokio::time::timeout(timeout, workers.wait()).await.is_err() {
            tracing::warn!(
                ?timeout,
                "handlers still run after the shutdown timeout, giving their messages back"
            );
            node.abort.cancel();
            workers.wait().await;
        }
        // The settlers end when the last worker has dropped its end of the channel.
        settlers.wait().await;
        services.wait().await;
        control.stop().await;
        let deregistered = async {
            let mut connection = node.client.pool().acquire().await?;
            nodes::deregister(&mut connection, &node.row.id, node.epoch).await
        };
        if let Err(error) = deregistered.await {
            tracing::warn!(%error, "could not deregister, other nodes notice within 15 s");
        }
        tracing::info!(node = node.row.id, "node stopped");
    }
}
