//! The only place that wires the floors together.

mod register;

use std::{
    any::Any,
    collections::BTreeMap,
    fmt,
    future::Future,
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tokio::sync::{RwLock, Semaphore};
use tokio_util::sync::CancellationToken;

pub use crate::{
    config::ConfigError,
    registry::{Problem, Problems},
};
pub use nexus_migrations::MigrateError;

use crate::{
    client::{Bell, Client, ConnectError, Database, Limits},
    config::{self, Config, Environment, Overrides},
    event::EventDescriptor,
    handler::{Shared, StateMap},
    registry::{self, HandlerDescriptor, Trigger, tick_event_type},
    retry::RetryPolicy,
    runtime::{self, Control, Counts, Node, Route, Running, Settings},
    store,
};

/// A program's handlers and how they run. Give it to [`run`] or [`start`].
///
/// Every setting has a default; those with a variable of the environment take that first and what
/// the builder says before all (`docs/configuration.md` lists them).
///
/// # Examples
///
/// ```no_run
/// use nexus::prelude::*;
///
/// #[tokio::main]
/// async fn main() -> nexus::Result {
///     nexus::run(App::discover().name("billing").namespace("shop")).await
/// }
/// ```
#[must_use = "an app does nothing until it is given to `nexus::run` or `nexus::start`"]
pub struct App {
    name: String,
    display_name: Option<String>,
    description: Option<String>,
    metadata: Value,
    handlers: Vec<&'static HandlerDescriptor>,
    events: Vec<&'static EventDescriptor>,
    states: StateMap,
    overrides: Overrides,
    problems: Vec<Problem>,
}

/// Why an app did not start. Nothing runs, and nothing was registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The program's handlers or events do not fit together.
    #[error(transparent)]
    Problems(#[from] Problems),
    /// Variables of the environment have values that cannot be used.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigError>),
    /// There is no database to connect to.
    #[error(
        "no database: set DATABASE_URL (or CORE_DATABASE_URL) to a PostgreSQL 15 or newer, or turn on the feature `embedded` of nexus to have one started for you"
    )]
    NoDatabase,
    /// The embedded database could not be started.
    #[cfg(feature = "embedded")]
    #[error("could not start the embedded database")]
    Embedded(#[source] nexus_embedded::Error),
    /// The database cannot be used.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The schema is not what this build needs and could not be brought there.
    #[error("could not prepare the schema")]
    Schema(#[source] MigrateError),
    /// The name of a namespace or group cannot name a queue.
    #[error("{reason}")]
    Name {
        /// Which name, and why.
        reason: String,
    },
    /// Two different programs share an app's name. Give one of them `App::name("…")`.
    #[error(
        "app `{app}` in namespace `{namespace}` is run by program `{other}` (node `{node}`), this is `{this}`: give one of them another name with `App::name`"
    )]
    OtherProgram {
        /// The namespace.
        namespace: String,
        /// The app.
        app: String,
        /// The program that runs.
        other: String,
        /// Its node.
        node: String,
        /// This program.
        this: String,
    },
    /// A live node of another namespace has the same id. Choose another `CORE_NODE_ID`.
    #[error(
        "node id `{node}` is used by a live node in namespace `{namespace}`: choose another CORE_NODE_ID"
    )]
    NodeIdTaken {
        /// The id.
        node: String,
        /// Where it is used.
        namespace: String,
    },
    /// Two apps declare something of one name differently.
    #[error("{what} is declared differently by app `{other}` and by app `{this}`: {advice}")]
    Conflict {
        /// The event type, handler or scheduled task.
        what: String,
        /// The app that runs already.
        other: String,
        /// This app.
        this: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// The database refused or failed while the app registered.
    #[error("could not {doing}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// What went wrong.
        source: sqlx::Error,
    },
    /// The operating system gave no thread.
    #[error("could not start the control thread")]
    Thread(#[source] std::io::Error),
}

impl App {
    /// An app with every handler and event type that is linked into the program.
    ///
    /// A crate that is a dependency only for its handlers must be named once in the source, with
    /// [`nexus::link!`](crate::link), or the linker leaves it out.
    pub fn discover() -> Self {
        Self {
            name: "default".to_owned(),
            display_name: None,
            description: None,
            metadata: Value::Object(serde_json::Map::new()),
            handlers: registry::handlers(),
            events: registry::events(),
            states: StateMap::default(),
            overrides: Overrides::default(),
            problems: Vec::new(),
        }
    }

    /// Names the app; default `default`. Replicas of a program share the name, different programs
    /// must not. It is the group of handlers that name none.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// The namespace: `CORE_NAMESPACE`, default `demo`. At most 31 characters, fewer with groups.
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.overrides.namespace = Some(namespace.into());
        self
    }

    /// A name for people, shown beside the node's id.
    pub fn display_name(mut self, name: impl Into<String>) -> Self {
        self.display_name = Some(name.into());
        self
    }

    /// What the node is for, for people.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = Some(description.into());
        self
    }

    /// Anything worth knowing of the node, as a JSON object.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    /// A stable id for this process: `CORE_NODE_ID`, default a new one at each start. Starting a
    /// second process with the same id stops the first.
    pub fn node_id(mut self, id: impl Into<String>) -> Self {
        self.overrides.node_id = Some(id.into());
        self
    }

    /// Registers the value that handlers take as [`State<T>`](crate::State). One per type.
    pub fn state<T: Send + Sync + 'static>(mut self, value: T) -> Self {
        self.states.insert(value);
        self
    }

    /// The database: `CORE_DATABASE_URL`, else `DATABASE_URL`, else the embedded one (feature
    /// `embedded`).
    pub fn database_url(mut self, url: impl Into<String>) -> Self {
        self.overrides.database_url = Some(url.into());
        self
    }

    /// Keeps only the handlers of these names; an unknown name is a start-up error.
    pub fn only<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let names: Vec<&str> = names.into_iter().collect();
        for name in &names {
            if !self.handlers.iter().any(|handler| handler.name == *name) {
                let known: Vec<&str> = self.handlers.iter().map(|handler| handler.name).collect();
                self.problems.push(Problem::new(format!(
                    "App::only names `{name}`, which is no handler; known are {}",
                    known.join(", ")
                )));
            }
        }
        self.handlers
            .retain(|handler| names.contains(&handler.name));
        self
    }

    /// How long a claimed message is ours before another node may claim it; it is extended while
    /// the node lives. `CORE_VISIBILITY_TIMEOUT_SECONDS`, default 10 s. A node that dies holds its
    /// messages up for this long.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.overrides.lease = Some(lease);
        self
    }

    /// Most messages in one claim and one [`Batch`](crate::Batch): `CORE_BATCH_SIZE`, default 100.
    pub fn batch_size(mut self, messages: usize) -> Self {
        self.overrides.batch_size = Some(messages.max(1));
        self
    }

    /// Longest wait between two polls of an idle queue: `CORE_IDLE_POLL_INTERVAL_MS`, default
    /// 250 ms. Emits through a [`Client`] are noticed sooner.
    pub fn idle_poll(mut self, interval: Duration) -> Self {
        self.overrides.idle_poll = Some(interval);
        self
    }

    /// Most connections of the pool; default 20. A handler with `&mut Tx` holds one while it runs.
    /// All but one may be held by such handlers. A node opens up to eight more of its own.
    pub fn pool_size(mut self, connections: u32) -> Self {
        self.overrides.pool_size = Some(connections.max(2));
        self
    }

    /// How long a stopping node waits for running handlers before it gives their messages back;
    /// default 30 s.
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.overrides.shutdown_timeout = Some(timeout);
        self
    }

    /// Largest payload that may be emitted, in bytes of JSON; default 1 MiB. Bodies in queues may
    /// have 64 KiB more, for the envelope.
    pub fn max_payload_bytes(mut self, bytes: usize) -> Self {
        self.overrides.max_payload_bytes = Some(bytes);
        self
    }

    /// How long events stay in the log; default 183 days. Whole months are dropped.
    pub fn log_retention(mut self, retention: Duration) -> Self {
        self.overrides.retention = Some(retention);
        self
    }

    /// Checks the app without a database and reports every problem at once, with file and line.
    ///
    /// [`run`] and [`start`] do it first. As a test it finds what no compiler can see, such as two
    /// crates that use one event type.
    ///
    /// # Errors
    ///
    /// Everything that does not fit together.
    pub fn validate(&self) -> Result<(), Problems> {
        let mut problems = self.problems.clone();
        if let Err(error) = crate::event::check_name("app", &self.name) {
            problems.push(Problem::new(error.to_string()));
        }
        problems.extend(self.overrides.problems().into_iter().map(Problem::new));
        if !self.metadata.is_object() {
            problems.push(Problem::new("App::metadata is not a JSON object"));
        }
        problems.extend(registry::validate(
            &self.name,
            &self.handlers,
            &self.events,
            &self.states,
        ));
        Problems::check(problems)
    }

    fn routes(&self, queue_of: impl Fn(&str) -> String) -> Vec<Route> {
        self.handlers
            .iter()
            .map(|&descriptor| {
                let group = descriptor.group.unwrap_or(&self.name).to_owned();
                let options = &descriptor.options;
                let mut retry = RetryPolicy::default();
                if let Some(backoff) = options.backoff {
                    retry = retry.with_backoff(backoff.first, backoff.max);
                }
                if let Some(max_attempts) = options.max_attempts {
                    retry = retry.with_max_attempts(max_attempts);
                }
                let (event_type, event_version) = match &descriptor.trigger {
                    Trigger::Event(event) => (event.meta.event_type.to_owned(), event.meta.version),
                    Trigger::Cron(_) => (tick_event_type(&self.name, descriptor.name), 1),
                };
                Route {
                    descriptor,
                    queue: queue_of(&group),
                    group,
                    event_type,
                    event_version,
                    retry,
                    timeout: options.timeout.unwrap_or(Duration::from_secs(30)),
                    concurrency: options.concurrency.unwrap_or(16).max(1) as usize,
                    counts: Counts::default(),
                }
            })
            .collect()
    }
}

impl fmt::Debug for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App")
            .field("name", &self.name)
            .field("handlers", &self.handlers.len())
            .finish_non_exhaustive()
    }
}

/// A running app: for embedding it in a larger program, and for tests.
///
/// Dropped without [`shutdown`](Self::shutdown), the node goes on until the runtime ends.
#[must_use = "dropping the handle leaves the app running; call `shutdown`"]
pub struct Handle {
    running: Running,
    fenced: CancellationToken,
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
    /// Verdicts that were refused because the lease had been lost.
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

    /// Waits until no message is left for this node's handlers, waiting for a retry included, and
    /// none of a foreign program to be adopted. With other emitters that moment may never come: put
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
        let mut connection = self.running.node.pool.acquire().await?;
        // In the main queue, messages of foreign programs wait to be adopted.
        let mut queues = BTreeMap::from([(self.running.main_queue.as_str(), Vec::new())]);
        for route in &self.running.routes {
            let handlers = queues.entry(route.queue.as_str()).or_default();
            handlers.push((route.name(), route.event_version));
        }
        if store::queue::has_messages(&mut connection, &queues).await? {
            return Ok(false);
        }
        // A completed message is gone from its queue a moment before it is counted.
        Ok(self.running.node.leases.is_empty())
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
        self.running.shutdown().await;
        stats(&routes)
    }

    /// Stops waiting for running handlers during [`shutdown`](Self::shutdown).
    fn abort(&self) -> CancellationToken {
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

/// Connects, migrates, registers, and works until SIGINT or SIGTERM; then stops gently. A second
/// signal gives up what still runs.
///
/// Logs to standard error, at the level of `CORE_LOG_LEVEL` (default `info`; a filter such as
/// `info,nexus=debug` works), unless the program has set up `tracing` itself.
///
/// # Errors
///
/// [`StartError`], or that this node had to stop because another took its id.
pub async fn run(app: App) -> crate::Result {
    let filter = config::log_filter(&Environment::new(&environment))
        .map_err(|error| StartError::Config(vec![error]))?;
    // An error means that the program has a subscriber of its own.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // No colours in files and pipes.
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
    let mut signals = Signals::new();
    let starting = start(app);
    tokio::pin!(starting);
    let (handle, is_signalled) = tokio::select! {
        handle = &mut starting => (handle?, false),
        // What has registered is to deregister; a database that gives no answer is not waited for.
        () = signals.next() => match tokio::time::timeout(Duration::from_secs(5), starting).await {
            Ok(handle) => (handle?, true),
            Err(_) => return Ok(()),
        },
    };
    let fenced = handle.fenced();
    let was_fenced = tokio::select! {
        () = async {}, if is_signalled => false,
        () = signals.next() => false,
        () = fenced => true,
    };
    tracing::info!("stopping, a second signal stops at once");
    let abort = handle.abort();
    let shutdown = handle.shutdown();
    tokio::pin!(shutdown);
    tokio::select! {
        _ = &mut shutdown => {}
        () = signals.next() => {
            abort.cancel();
            shutdown.await;
        }
    }
    if was_fenced {
        return Err("another process has started with this node's id".into());
    }
    Ok(())
}

/// SIGINT and SIGTERM. Made before the app starts: from then on a signal is kept until it is asked
/// for, and does not end a process that has just registered.
struct Signals {
    #[cfg(unix)]
    both: Option<[tokio::signal::unix::Signal; 2]>,
}

impl Signals {
    fn new() -> Self {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let both = signal(SignalKind::interrupt())
                .and_then(|interrupt| Ok([interrupt, signal(SignalKind::terminate())?]));
            Self { both: both.ok() }
        }
        #[cfg(not(unix))]
        Self {}
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        if let Some([interrupt, terminate]) = &mut self.both {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
        // Without a handler the signal ends the process, which is what it should do.
        let _ = tokio::signal::ctrl_c().await;
    }
}

/// Most connections that the loops of a node share, beside the one that each of them claims, listens
/// or beats with.
const OWN_CONNECTIONS: u32 = 4;

/// The database that is started when no URL is given.
struct Embedded {
    url: String,
    #[cfg(feature = "embedded")]
    _server: nexus_embedded::Source,
}

impl Embedded {
    #[cfg(feature = "embedded")]
    async fn start() -> Result<Self, StartError> {
        let options = nexus_embedded::Options::dev();
        // Starting a server takes a moment and blocks.
        let server = tokio::task::spawn_blocking(move || nexus_embedded::resolve(&options))
            .await
            .map_err(|error| StartError::Thread(std::io::Error::other(error)))?
            .map_err(StartError::Embedded)?;
        tracing::info!("{server}");
        Ok(Self {
            url: server.url(),
            _server: server,
        })
    }

    #[cfg(not(feature = "embedded"))]
    #[expect(clippy::unused_async, reason = "it is, with the feature")]
    async fn start() -> Result<Self, StartError> {
        Err(StartError::NoDatabase)
    }
}

/// A variable of the environment. What is not Unicode shows as U+FFFD, which no setting accepts.
fn environment(variable: &str) -> Option<String> {
    let value = std::env::var_os(variable)?;
    Some(value.to_string_lossy().into_owned())
}

/// Starts an app and returns once it is registered and its handlers are at work.
///
/// # Errors
///
/// [`StartError`] says what to do. Nothing runs then.
pub async fn start(app: App) -> Result<Handle, StartError> {
    app.validate()?;
    let lookup = environment;
    let config =
        Config::resolve(&app.overrides, &Environment::new(&lookup)).map_err(StartError::Config)?;
    let (url, source, embedded) = if let Some((url, source)) = config.database_url.clone() {
        (url, source, None)
    } else {
        let embedded = Embedded::start().await?;
        (
            embedded.url.clone(),
            "the embedded database",
            Some(embedded),
        )
    };
    let database = Database::from_url(&url, source)?;
    database.migrate().await.map_err(|error| match error {
        ConnectError::Schema(error) => StartError::Schema(error),
        other => StartError::Connect(other),
    })?;
    let pool = database.pool(config.pool_size).await?;
    let own_pool = database.pool(OWN_CONNECTIONS).await?;
    let registered = register::register(&app, &config, &pool).await?;

    let limits = Limits {
        payload_bytes: config.max_payload_bytes,
        ..Limits::default()
    };
    let bell = Bell::start(database.options().clone(), &config.namespace);
    let client = Client::new(pool, &config.namespace, &registered.node.id, limits, bell);
    let fenced = CancellationToken::new();
    // A node whose id was taken stops, whoever waits for it.
    let stop = fenced.child_token();
    let leases = runtime::Leases::default();
    let alive = CancellationToken::new();
    let control = Control::start(runtime::Duty {
        options: database.options().clone(),
        node: registered.node.clone(),
        epoch: registered.epoch,
        lease: config.lease,
        leases: leases.clone(),
        fenced: fenced.clone(),
        gone: alive.clone(),
    })
    .map_err(StartError::Thread)?;
    log_collected(&app, &registered.node.id, &config.namespace, &database);
    let node = Arc::new(Node {
        row: registered.node,
        epoch: registered.epoch,
        declaration: registered.declaration,
        defines_app: AtomicBool::new(registered.defines_app),
        pool: own_pool,
        transactions: Arc::new(Semaphore::new(config.pool_size.max(2) as usize - 1)),
        options: database.options().clone(),
        settings: Settings {
            lease: config.lease,
            batch_size: config.batch_size,
            idle_poll: config.idle_poll,
            max_body_bytes: i32::try_from(config.max_payload_bytes + 64 * 1024).unwrap_or(i32::MAX),
            shutdown_timeout: config.shutdown_timeout,
            retention: config.retention,
        },
        shared: Arc::new(Shared {
            states: app.states,
            client: client.clone(),
            shutdown: stop.clone(),
        }),
        client,
        leases,
        stop,
        abort: CancellationToken::new(),
        isolation: Arc::new(RwLock::new(())),
        alive: alive.drop_guard(),
        database: embedded.map(|embedded| Box::new(embedded) as Box<dyn Any + Send + Sync>),
    });
    let running = runtime::start(node, control, registered.routes, registered.main_queue);
    Ok(Handle { running, fenced })
}

/// One line that says what was collected: a crate that was not linked is missing here.
fn log_collected(app: &App, node: &str, namespace: &str, database: &Database) {
    let mut crates: Vec<&str> = app
        .handlers
        .iter()
        .map(|handler| handler.origin.crate_name)
        .collect();
    crates.sort_unstable();
    crates.dedup();
    tracing::info!(
        app = app.name,
        namespace,
        node,
        database = database.target(),
        "collected {} handlers and {} event types from crates {}",
        app.handlers.len(),
        app.events.len(),
        crates.join(", ")
    );
}
