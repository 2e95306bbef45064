//! The loops that move messages.
//!
//! - [`worker`] claims messages of one queue and starts attempts; one for each queue of the node.
//! - [`attempt`] runs a handler for a message and decides how the attempt ends.
//! - [`backlog`] runs a batch handler whose transaction claims by deleting, while much waits.
//! - [`settle`] stores the verdicts, many in one statement.
//! - [`lease`] keeps claimed messages ours, and the node alive, from a thread of its own.
//! - [`scheduler`] fires ticks, [`delayed`] emits what has become due, [`adopter`] takes in what
//!   foreign programs send, [`caretaker`] does what has to be done from time to time, [`renamer`]
//!   moves what carries a former name of a handler, [`replayer`] delivers events of the log once more,
//!   [`listener`] hears the doorbell, [`collector`] collects the figures of the namespace.
//! - [`supervise`] starts a loop again that panicked, [`trouble`] says once what is wrong with the database.
//!
//! A message is in exactly one place at a time: in its queue, in a worker's buffer, in an attempt,
//! or on its way to be settled. From the claim until it is settled its lease is held by [`lease`].

mod adopter;
mod attempt;
mod backlog;
mod caretaker;
mod collector;
mod declaration;
mod delayed;
mod guard;
#[cfg(feature = "testing")]
pub(crate) mod isolated;
mod lease;
mod listener;
pub(crate) mod points;
mod renamer;
mod replayer;
mod scheduler;
mod settle;
mod span;
mod supervise;
mod trouble;
mod worker;

use std::{
    any::Any,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicUsize},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::{RwLock, Semaphore};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use crate::{
    client::{Client, Lender, Lent},
    config::Pooler,
    handler::Shared,
    metrics::{Counts, Times},
    registry::{HandlerDescriptor, Trigger},
    retry::RetryPolicy,
    store::{self, maintenance, nodes},
};

pub(crate) use collector::Figures;
pub(crate) use declaration::{Declaration, DeclaredTask};
pub(crate) use lease::{Control, Duty, Leases};
pub(crate) use points::Points;
pub(crate) use trouble::Trouble;

/// A handler gets no more messages while those that it holds, waiting or running, have so many bytes of
/// payload: a hundred of the largest ones must not take the memory of the process.
const MOST_BYTES: usize = 64 * 1024 * 1024;

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

    /// Whether a message of this event type can be for the handler. A tick is named for the function,
    /// which may have had another name when it was fired.
    pub(crate) fn takes(&self, event_type: &str) -> bool {
        event_type == self.event_type
            || matches!(self.descriptor.trigger, Trigger::Cron(_))
                && event_type.starts_with("tick.")
    }
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
    pub(crate) letter_retention: Duration,
}

/// What all loops of a node share.
pub(crate) struct Node {
    pub(crate) row: nodes::Node,
    pub(crate) epoch: i64,
    pub(crate) declaration: Declaration,
    /// False while a newer build of the app is alive.
    pub(crate) defines_app: AtomicBool,
    /// When it registered no other node was there, dead or alive.
    pub(crate) is_first: bool,
    pub(crate) client: Client,
    /// Connections of the loops themselves, so that handlers which hold every connection of the
    /// client's pool hold up nothing else.
    pub(crate) lender: Lender,
    /// How many handlers may hold a transaction: fewer than the client's pool has connections, so
    /// that what a handler emits beside its transaction never waits for another such handler.
    pub(crate) transactions: Arc<Semaphore>,
    pub(crate) options: PgConnectOptions,
    pub(crate) settings: Settings,
    pub(crate) shared: Arc<Shared>,
    pub(crate) leases: lease::Leases,
    /// How many batches are under way that were claimed by deleting, for which no lease is held.
    pub(crate) batches: Arc<AtomicUsize>,
    pub(crate) trouble: Trouble,
    /// How late ticks were fired.
    pub(crate) lateness: Times,
    /// What it has to tell of the namespace.
    pub(crate) figures: Figures,
    /// How far the clock of the database is ahead of this machine's, in microseconds.
    pub(crate) clock_ahead: AtomicI64,
    /// Where the test kit looks on.
    pub(crate) points: Arc<Points>,
    /// No new work is taken; what runs goes on.
    pub(crate) stop: CancellationToken,
    /// What still runs is given up.
    pub(crate) abort: CancellationToken,
    /// Held for reading by all claimed work, for writing by a message that may kill its process:
    /// such a message runs alone.
    pub(crate) isolation: Arc<RwLock<()>>,
    /// Ends the control thread with the last task of the node.
    #[expect(dead_code, reason = "it works by being dropped")]
    pub(crate) alive: DropGuard,
    /// The embedded database, which stops a while after its last user is gone.
    #[expect(dead_code, reason = "it works by being dropped")]
    pub(crate) database: Option<Box<dyn Any + Send + Sync>>,
}

/// A node at work.
pub(crate) struct Running {
    pub(crate) node: Arc<Node>,
    pub(crate) routes: Vec<Arc<Route>>,
    /// The queue of the namespace's default group, which every node adopts from.
    pub(crate) main_queue: String,
    control: Control,
    workers: TaskTracker,
    services: TaskTracker,
    settlers: TaskTracker,
    /// Ends services and settlers in the middle of what they do.
    give_up: CancellationToken,
}

/// How long each step of a shutdown may take once no handler runs any more. Only a database that
/// gives no answer takes so long.
const FAREWELL: Duration = Duration::from_secs(3);

/// How long it may take to make again what is missing before the connection counts as lost.
const MEND_PATIENCE: Duration = Duration::from_mins(1);

impl Node {
    pub(crate) async fn connection(&self) -> sqlx::Result<Lent> {
        self.lender.lend().await
    }

    /// Makes again what was dropped by hand, a queue or a partition, if `error` says that it is missing.
    /// False if it says something else, or that could not be done.
    pub(super) async fn mend(&self, error: &sqlx::Error) -> bool {
        let mended = async {
            let mut connection = self.connection().await?;
            let namespace = &self.row.namespace;
            let mended = maintenance::mend(&mut connection, namespace, error).await?;
            connection.give_back().await?;
            Ok(mended)
        };
        match store::answered_within(MEND_PATIENCE, mended).await {
            Ok(mended) => mended,
            Err(error) => {
                self.trouble.met("make again what is missing", &error);
                false
            }
        }
    }
}

/// A loop at work.
type Service = BoxFuture<'static, ()>;

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
    // A crash that a test asks for ends them as well.
    let give_up = node.points.alive();
    let mut queues: Vec<String> = by_queue.keys().cloned().collect();
    if !node.points.has_loops() {
        by_queue.clear();
    }
    for (queue, routes) in by_queue {
        let settler = settle::start(&settlers, Arc::clone(&node), queue.clone(), give_up.clone());
        let of = Arc::clone(&node);
        let worker = supervise::again("a worker", node.stop.clone(), move || {
            worker::run(
                Arc::clone(&of),
                queue.clone(),
                routes.clone(),
                settler.clone(),
            )
        });
        workers.spawn(Arc::clone(&node.points).while_alive(worker));
    }
    // Every node adopts, whatever its groups.
    if !queues.contains(&main_queue) {
        queues.push(main_queue.clone());
    }
    if node.points.has_loops() {
        let service = |what, start: Box<dyn Fn(Arc<Node>) -> Service + Send>| {
            let of = Arc::clone(&node);
            let service = supervise::again(what, node.stop.clone(), move || start(Arc::clone(&of)));
            services.spawn(give_up.clone().run_until_cancelled_owned(service));
        };
        service(
            "the adopter",
            Box::new(move |node| Box::pin(adopter::run(node, queues.clone()))),
        );
        service(
            "the scheduler",
            Box::new(|node| Box::pin(scheduler::run(node))),
        );
        service(
            "the emitter of delayed events",
            Box::new(|node| Box::pin(delayed::run(node))),
        );
        service(
            "the caretaker",
            Box::new(|node| Box::pin(caretaker::run(node))),
        );
        service("the renamer", Box::new(|node| Box::pin(renamer::run(node))));
        service(
            "the replayer",
            Box::new(|node| Box::pin(replayer::run(node))),
        );
        service(
            "the collector",
            Box::new(|node| Box::pin(collector::run(node))),
        );
        // A session behind a pooler in transaction mode is shared: nobody listens in it.
        if node.client.pooler() == Pooler::Session {
            service(
                "the listener",
                Box::new(|node| Box::pin(listener::run(node))),
            );
        }
    }
    for tracker in [&workers, &services, &settlers] {
        tracker.close();
    }
    Running {
        node,
        routes,
        main_queue,
        control,
        workers,
        services,
        settlers,
        give_up,
    }
}

impl Running {
    /// Stops without waiting for anything: for a test that has ended.
    #[cfg(feature = "testing")]
    pub(crate) fn abandon(&self) {
        self.node.stop.cancel();
        self.node.abort.cancel();
        self.give_up.cancel();
    }

    /// Takes no new work, lets what runs finish for as long as the shutdown timeout allows, gives
    /// back the rest, and forgets the node.
    pub(crate) async fn shutdown(self) {
        let Self {
            node,
            control,
            workers,
            services,
            settlers,
            give_up,
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
        let done = async { tokio::join!(settlers.wait(), services.wait()) };
        if tokio::time::timeout(FAREWELL, done).await.is_err() {
            tracing::error!(
                "the database gives no answer, stopping without it: messages come back when their leases end"
            );
            give_up.cancel();
            tokio::join!(settlers.wait(), services.wait());
        }
        control.stop().await;
        let deregistered = async {
            let mut connection = node.connection().await?;
            nodes::deregister(&mut connection, &node.row.id, node.epoch).await?;
            connection.give_back().await
        };
        if let Err(error) = store::answered_within(FAREWELL, deregistered).await {
            tracing::warn!(%error, "could not deregister, other nodes notice within 15 s");
        }
        // Closing waits for connections that are in use, by the program perhaps.
        let closed = async { tokio::join!(node.lender.close(), node.client.lender().close()) };
        let _ = tokio::time::timeout(FAREWELL, closed).await;
        tracing::info!(node = node.row.id, "node stopped");
    }
}
