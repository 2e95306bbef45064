//! The only place that wires the floors together.
//!
//! - [`App`] is what a program says of itself, [`StartError`] why it did not start;
//! - [`Description`] lists what it is made of, [`Catalogue`] what databases know of it;
//! - [`start`] finds the database, migrates, registers and starts the loops, and returns a
//!   [`Handle`];
//! - [`run`] does that and works until a signal.

mod catalogue;
mod describe;
mod handle;
mod metrics;
mod pg_cron;
mod register;
mod run;
mod select;
mod start;

pub use catalogue::{Catalogue, CatalogueError, Difference};
pub use describe::{
    Backoff, Description, EventDescription, HandlerDescription, ScheduleDescription, Source,
    TickEffect,
};
pub use handle::{Handle, HandlerStats};
pub use metrics::NodeMetrics;
pub use run::run;
pub use start::start;

pub use nexus_migrations::MigrateError;

pub use crate::{
    config::ConfigError,
    registry::{Problem, Problems},
};

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use serde_json::Value;
use sqlx::PgPool;

use crate::{
    client::ConnectError,
    config::{Overrides, Pooler},
    event::EventDescriptor,
    handler::StateMap,
    metrics::Counts,
    registry::{
        self, HandlerDescriptor, List, TaskDescriptor, Trigger, UntypedHandler, tick_event_type,
    },
    retry::RetryPolicy,
    runtime::{Points, Route},
};

use select::Filter;

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
    tasks: Vec<&'static TaskDescriptor>,
    /// By the linker; else they are a list in the source.
    is_discovered: bool,
    filters: Vec<Filter>,
    states: StateMap,
    overrides: Overrides,
    retry: RetryPolicy,
    scheduler: Scheduler,
    problems: Vec<Problem>,
    preparations: Vec<Preparation>,
    points: Arc<Points>,
}

/// What [`App::before_start`] was given.
type Preparation = Box<dyn FnOnce(PgPool) -> BoxFuture<'static, crate::Result> + Send + Sync>;

/// Who fires an app's scheduled tasks; see [`App::scheduler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Scheduler {
    /// The app's nodes. Every expression, seconds and time zone is possible, and a tick comes within
    /// milliseconds. The default.
    #[default]
    Nexus,
    /// The server, by the extension `pg_cron`: ticks come also while no node runs, and wait for one.
    ///
    /// It looks at the clock once a minute, so that a tick may come some seconds late, and knows no
    /// seconds, no `L`, `W` and `#`, and no time zone whose clock is changed (its own is UTC, or the
    /// server's `cron.timezone`). An app that has such tasks does not start, nor one whose server is
    /// not set up for it: `pg_cron` in `shared_preload_libraries`, `cron.database_name` the app's
    /// database, `create extension pg_cron` there, and `grant usage on schema cron` to the app's role.
    /// The server must let `pg_cron`'s jobs in as that role (`cron.use_background_workers = on`, or trust
    /// or a password file for connections from localhost).
    ///
    /// Each task is a job, which fires what has come due since the last time, by the task's misfire
    /// policy with a grace of at least a minute. What the server has not fired for a minute, nodes do,
    /// and warn. Tasks that a [`Client`](crate::Client) makes at run time are always fired by nodes.
    ///
    /// A paused task fires nothing from that moment on. Its job is paused, resumed or mended within
    /// seconds while a node of the app runs; a task that is resumed while none does goes on with the
    /// next node that starts.
    PgCron,
}

/// Why an app did not start. Nothing runs, and nothing was registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The program's handlers or events do not fit together; the text lists every problem with file and
    /// line. [`App::validate`] finds them in a test.
    #[error(transparent)]
    Problems(#[from] Problems),
    /// Variables of the environment have values that cannot be used; the text says what is accepted.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Config(Vec<ConfigError>),
    /// There is no database to connect to: no URL is given, and the feature `embedded` is off.
    #[error(
        "no database: set DATABASE_URL (or CORE_DATABASE_URL) to a PostgreSQL 15 or newer, or turn on the feature `embedded` of nexus to have one started for you"
    )]
    NoDatabase,
    /// The embedded database could not be started; the source says what to do. Or set `DATABASE_URL`.
    #[cfg(feature = "embedded")]
    #[error("could not start the embedded database")]
    Embedded(#[source] nexus_embedded::Error),
    /// The database cannot be used: it is away, or refuses the role.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The schema is not what this build needs and could not be brought there; [`MigrateError`] says what
    /// to do.
    #[error("could not prepare the schema")]
    Schema(#[source] MigrateError),
    /// The embedded database was made by a build in development that had another text of a migration.
    /// Delete the folder to start empty; what was in the database is lost.
    #[error(
        "migration {migration} was applied to the embedded database as another file than this build has: stop what uses it and delete {} to start empty",
        .folder.display()
    )]
    EmbeddedSchema {
        /// The file, without `.up.sql`.
        migration: &'static str,
        /// The folder of the cluster.
        folder: std::path::PathBuf,
    },
    /// What the program does in [`App::before_start`] failed; nexus has made its schema by then. Mend what the
    /// error says.
    #[error("what `App::before_start` does failed: {0}")]
    BeforeStart(crate::Error),
    /// The name of a namespace or group cannot name a queue.
    #[error("{reason}")]
    Name {
        /// Which name, and why.
        reason: String,
    },
    /// `pg_cron` cannot fire what the app schedules. Each problem says what to do; [`Scheduler::Nexus`]
    /// needs nothing of the server.
    #[error(transparent)]
    PgCron(Problems),
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
    /// A node of another namespace has the same id. Choose another `CORE_NODE_ID`.
    #[error("node id `{node}` is used by {holder}: choose another CORE_NODE_ID")]
    NodeIdTaken {
        /// The id.
        node: String,
        /// Who has it, as far as the role may see.
        holder: String,
    },
    /// The role may not run apps in the namespace. The source says which statement binds it, and who has
    /// to run it.
    #[error("the role may not run an app in namespace `{namespace}`")]
    Denied {
        /// The namespace.
        namespace: String,
        /// What the database answered.
        source: sqlx::Error,
    },
    /// A live app declares an event type, handler or scheduled task of this name differently.
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
            is_discovered: true,
            ..Self::of(registry::handlers(), registry::events(), registry::tasks())
        }
    }

    /// What [`app!`](crate::app!) makes of its list.
    #[doc(hidden)]
    pub fn of_list(list: &'static List) -> Self {
        Self::of(list.handlers(), list.events(), list.tasks())
    }

    fn of(
        handlers: Vec<&'static HandlerDescriptor>,
        events: Vec<&'static EventDescriptor>,
        tasks: Vec<&'static TaskDescriptor>,
    ) -> Self {
        Self {
            name: "default".to_owned(),
            display_name: None,
            description: None,
            metadata: Value::Object(serde_json::Map::new()),
            handlers,
            events,
            tasks,
            is_discovered: false,
            filters: Vec::new(),
            states: StateMap::default(),
            overrides: Overrides::default(),
            retry: RetryPolicy::default(),
            scheduler: Scheduler::default(),
            problems: Vec::new(),
            preparations: Vec::new(),
            points: Arc::default(),
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

    /// A name for people, stored beside the node's id in `core.nodes`. Default none.
    pub fn display_name(mut self, name: impl Into<String>) -> Self {
        self.display_name = Some(name.into());
        self
    }

    /// What the node is for, for people; stored in `core.nodes`. Default none.
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = Some(description.into());
        self
    }

    /// Anything worth knowing of the node, as a JSON object; stored in `core.nodes`. Default `{}`.
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.metadata = metadata;
        self
    }

    /// A stable id for this process, of 1 to 100 bytes: `CORE_NODE_ID`, default a new one at each start.
    /// Starting a second process with the same id stops the first.
    pub fn node_id(mut self, id: impl Into<String>) -> Self {
        self.overrides.node_id = Some(id.into());
        self
    }

    /// Registers the value that handlers take as [`State<T>`](crate::State). One per type: a second one
    /// takes the place of the first.
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

    /// Keeps only the handlers, `#[cron]` functions and scheduled tasks of these names, in whichever
    /// group. A name that stands for none of them is a start-up error.
    ///
    /// Of the event types only those remain that are taken by what is kept, or emitted by its scheduled
    /// tasks: a unit test with an app of its own declares nothing of its neighbours'. What such an app
    /// emits besides can be emitted and handled all the same; only its schema is not stored.
    pub fn only<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        let names = names.into_iter().map(str::to_owned).collect();
        self.filters.push(Filter::Only(names));
        self
    }

    /// Keeps the handlers and `#[cron]` functions of these groups, to run parts of a program as apps of
    /// their own. A group that has none of them is a start-up error.
    ///
    /// The app's own [name](Self::name) is the group of handlers that name none, and of event types and
    /// constants under `#[cron]`: scheduled tasks that emit are kept only if it is among the groups. Event
    /// types that only left-out handlers take are left out with them; all others stay.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # async fn example() -> nexus::Result {
    /// let billing = App::discover().name("billing").groups(["billing"]);
    /// let shipping = App::discover().name("shipping").groups(["shipping", "labels"]);
    /// # let _ = (nexus::start(billing).await?, nexus::start(shipping).await?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn groups<'a>(mut self, groups: impl IntoIterator<Item = &'a str>) -> Self {
        let groups = groups.into_iter().map(str::to_owned).collect();
        self.filters.push(Filter::Groups(groups));
        self
    }

    /// Adds a handler of an event type that is known only at run time; see [`UntypedHandler`], which has an example.
    pub fn handle(mut self, handler: UntypedHandler) -> Self {
        self.handlers.push(handler.into_descriptor());
        self
    }

    /// How failed attempts are repeated by handlers that do not say; default ten attempts, waiting
    /// 1 s and then twice as long each time, up to 10 minutes.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Who fires the app's scheduled tasks; default [`Scheduler::Nexus`], its nodes.
    ///
    /// It may be changed from one deployment to the next: both write the same ticks, so that none is
    /// lost or doubled, also while nodes of both kinds run. The newest of them decides.
    ///
    /// # Examples
    ///
    /// ```
    /// use nexus::{App, Scheduler};
    ///
    /// let app = App::discover().name("billing").scheduler(Scheduler::PgCron);
    /// ```
    pub fn scheduler(mut self, scheduler: Scheduler) -> Self {
        self.scheduler = scheduler;
        self
    }

    /// How long a claimed message is ours before another node may claim it; it is extended while
    /// the node lives. `CORE_VISIBILITY_TIMEOUT_SECONDS`, from 1 s to 12 h, default 10 s. A node that
    /// dies holds its messages up for this long. It is no limit for handlers: that is `timeout`.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.overrides.lease = Some(lease);
        self
    }

    /// Most messages in one claim and one [`Batch`](crate::Batch): `CORE_BATCH_SIZE`, default 100.
    pub fn batch_size(mut self, messages: usize) -> Self {
        self.overrides.batch_size = Some(messages.max(1));
        self
    }

    /// Longest wait between two polls of an idle queue: `CORE_IDLE_POLL_INTERVAL_MS`, from 1 ms to 60 s,
    /// default 250 ms. Emits through a [`Client`](crate::Client) are noticed sooner.
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

    /// How long a start waits for a database that is coming up: one that refuses connections, is not
    /// found by its name, is starting or recovering, or takes no writes yet. What it waits for is
    /// logged. `CORE_CONNECT_TIMEOUT_SECONDS`, up to a day, default 30 s; 0 does not wait. A wrong
    /// password, role or database is an error at once.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.overrides.connect_timeout = Some(timeout);
        self
    }

    /// What stands between the app and the server: `CORE_POOLER` (`session` or `transaction`), default
    /// [`Pooler::Session`], which is also right without a pooler.
    ///
    /// With [`Pooler::Transaction`] the node asks everything in transactions, leaves nothing behind in the
    /// sessions that it shares, and listens to no doorbell: what other processes emit is found by
    /// polling. It does not migrate: do that over a direct connection, by
    /// [`Database::migrate`](crate::Database::migrate) or another app. Your own statements have to run in
    /// transactions of [`Client::begin`](crate::Client::begin) or of handlers, because a prepared
    /// statement ends with its transaction. The start finds out that such a pooler is used without
    /// this, and refuses.
    pub fn pooler(mut self, pooler: Pooler) -> Self {
        self.overrides.pooler = Some(pooler);
        self
    }

    /// How long a stopping node waits for running handlers before it gives their messages back;
    /// default 30 s.
    pub fn shutdown_timeout(mut self, timeout: Duration) -> Self {
        self.overrides.shutdown_timeout = Some(timeout);
        self
    }

    /// Largest payload that may be emitted, in bytes of JSON as Postgres writes it (a blank after each
    /// comma and colon, numbers without exponents); default 1 MiB, at most 200 MiB. Bodies in queues
    /// may have 64 KiB more, for the envelope.
    pub fn max_payload_bytes(mut self, bytes: usize) -> Self {
        self.overrides.max_payload_bytes = Some(bytes);
        self
    }

    /// How long events stay in the log; default 183 days. Whole months are dropped, once their last day is
    /// older than this. Apps of one database share the log: the shortest retention counts.
    pub fn log_retention(mut self, retention: Duration) -> Self {
        self.overrides.retention = Some(retention);
        self
    }

    /// Does something with the database before the app registers and its handlers run: makes the program's own
    /// tables, whichever database it is, the embedded one and that of a test included. Called twice, both are
    /// done, in order.
    ///
    /// nexus's own schema is there by then. It runs at every start of every node, one node of a database at a
    /// time, in no transaction and with no limit of time: let it find out what is there already, as migrations
    /// do. A future that is dropped by a signal, or killed, has done what it has done.
    ///
    /// # Errors
    ///
    /// If it fails the app does not start: [`StartError::BeforeStart`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nexus::prelude::*;
    /// use sqlx::PgPool;
    ///
    /// async fn create_tables(pool: PgPool) -> nexus::Result {
    ///     // With files in a folder: `sqlx::migrate!().run(&pool).await?;`
    ///     sqlx::raw_sql("create table if not exists accounts (user_id bigint primary key)")
    ///         .execute(&pool)
    ///         .await?;
    ///     Ok(())
    /// }
    ///
    /// # async fn example() -> nexus::Result {
    /// nexus::run(App::discover().before_start(create_tables)).await
    /// # }
    /// ```
    pub fn before_start<F, Fut>(mut self, prepare: F) -> Self
    where
        F: FnOnce(PgPool) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = crate::Result> + Send + 'static,
    {
        self.preparations
            .push(Box::new(|pool| Box::pin(prepare(pool))));
        self
    }

    /// How long dead letters of the app's groups are kept: `CORE_DEAD_LETTER_RETENTION_DAYS`, default as
    /// long as the [log](Self::log_retention). Then a node of the app deletes them for good, a thousand at
    /// a time, and logs how many they were. Of apps that share a group the shortest retention counts.
    pub fn dead_letter_retention(mut self, retention: Duration) -> Self {
        self.overrides.letter_retention = Some(retention);
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
        let selected = self.selected();
        let mut problems = self.problems.clone();
        problems.extend(selected.problems);
        if let Err(error) = crate::event::check_name("app", &self.name) {
            problems.push(Problem::new(error.to_string()));
        }
        problems.extend(self.overrides.problems().into_iter().map(Problem::new));
        if !self.metadata.is_object() {
            problems.push(Problem::new("App::metadata is not a JSON object"));
        }
        problems.extend(registry::validate(&registry::Parts {
            app: &self.name,
            handlers: &selected.handlers,
            events: &selected.events,
            tasks: &selected.tasks,
            states: &self.states,
            now: jiff::Timestamp::now(),
            max_payload_bytes: self.max_payload(),
        }));
        Problems::check(problems)
    }

    /// As the configuration has it.
    fn max_payload(&self) -> usize {
        self.overrides
            .max_payload_bytes
            .unwrap_or(crate::config::DEFAULT_PAYLOAD_BYTES)
    }

    /// The app as the test kit starts it: in a database of its own, under an id of its own, quick to
    /// notice what was not announced, and keeping what a moved clock would make it forget.
    #[cfg(feature = "testing")]
    pub(crate) fn for_test(mut self, database_url: &str, node_id: String) -> Self {
        let overrides = &mut self.overrides;
        overrides.database_url = Some(database_url.to_owned());
        overrides.node_id.get_or_insert(node_id);
        // Twenty tests at once share the connections of one server.
        overrides.pool_size.get_or_insert(10);
        overrides.idle_poll.get_or_insert(Duration::from_millis(25));
        overrides
            .retention
            .get_or_insert(Duration::from_hours(24 * 365 * 100));
        self
    }

    #[cfg(feature = "testing")]
    pub(crate) fn is_discovered(&self) -> bool {
        self.is_discovered
    }

    #[cfg(feature = "testing")]
    pub(crate) fn points(&self) -> &Arc<Points> {
        &self.points
    }

    fn routes(&self, queue_of: impl Fn(&str) -> String) -> Vec<Route> {
        self.selected()
            .handlers
            .into_iter()
            .map(|descriptor| {
                let group = descriptor.group.unwrap_or(&self.name).to_owned();
                let options = &descriptor.options;
                let mut retry = self.retry;
                if let Some(backoff) = options.backoff {
                    retry = retry.with_backoff(backoff.first, backoff.max);
                }
                if let Some(max_attempts) = options.max_attempts {
                    retry = retry.with_max_attempts(max_attempts);
                }
                let (event_type, event_version) = match &descriptor.trigger {
                    Trigger::Event(event) => (event.meta.event_type.to_owned(), event.meta.version),
                    Trigger::Untyped {
                        event_type,
                        version,
                    } => ((*event_type).to_owned(), *version),
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
            .field("handlers", &self.selected().handlers.len())
            .finish_non_exhaustive()
    }
}
