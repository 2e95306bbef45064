use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::config;
use jiff::Timestamp;
use nexus_migrations::MigrateError;
use sqlx::{
    Connection, Executor, PgConnection, PgPool, Row,
    postgres::{PgConnectOptions, PgPoolOptions},
};

use super::{
    lent::{self, Doubt},
    schedules::names,
};
use crate::{
    config::{DEFAULT_CONNECT_TIMEOUT, Pooler},
    store,
};

/// A Postgres database, by its URL. Never shows the password.
#[derive(Clone)]
pub struct Database {
    pub(super) options: PgConnectOptions,
    /// Where the URL came from, for messages.
    source: String,
    connect_timeout: Duration,
    pool_size: u32,
    pooler: Pooler,
    doubt: Doubt,
}

/// The migrations of a build, and which of them a database has.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SchemaStatus {
    /// Every migration of this build, oldest first.
    pub steps: Vec<SchemaStep>,
}

impl SchemaStatus {
    /// The version that the database has; 0 if there is no schema.
    #[must_use]
    pub fn version(&self) -> u32 {
        let applied = self.steps.iter().rev();
        applied
            .filter(|step| step.applied_at.is_some())
            .map(|step| step.version)
            .next()
            .unwrap_or(0)
    }

    /// The version that this build needs.
    #[must_use]
    pub fn needed(&self) -> u32 {
        self.steps.last().map_or(0, |step| step.version)
    }
}

/// A migration.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SchemaStep {
    /// Counts from 1.
    pub version: u32,
    /// What it brings.
    pub name: &'static str,
    /// When it was applied; `None` if it has not been.
    pub applied_at: Option<Timestamp>,
}

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The URL cannot be read. Mend it: `postgres://user:password@host:port/database`.
    #[error(
        "{source_name} is not a database URL such as postgres://user:password@host:5432/database"
    )]
    Url {
        /// Where the URL came from.
        source_name: String,
        /// What is wrong with it.
        source: sqlx::Error,
    },
    /// No connection could be made: the server refuses the role, password or database, or it is away and
    /// was not to be waited for. The cause says which.
    #[error("{source_name} is set but {target} is not usable: {cause}")]
    Unusable {
        /// Where the URL came from.
        source_name: String,
        /// Host, port and database.
        target: String,
        /// What went wrong.
        cause: sqlx::Error,
    },
    /// The database did not come up in the time that it was given
    /// ([`App::connect_timeout`](crate::App::connect_timeout),
    /// [`Database::connect_timeout`]). Start it, mend the URL, or wait longer.
    #[error("{source_name} is set but {target} is not usable after {waited:?} of waiting: {cause}")]
    NotUp {
        /// Where the URL came from.
        source_name: String,
        /// Host, port and database.
        target: String,
        /// How long it was waited for.
        waited: Duration,
        /// What went wrong the last time.
        cause: sqlx::Error,
    },
    /// A pooler in transaction mode stands before the server, and nexus was not told: it would lose what
    /// belongs to a session. Tell it, or connect directly.
    #[error(
        "{source_name} leads to a pooler in transaction mode at {target}: set CORE_POOLER=transaction (or `pooler(Pooler::Transaction)`), or connect to the server directly"
    )]
    Pooled {
        /// Where the URL came from.
        source_name: String,
        /// Host, port and database.
        target: String,
    },
    /// Migrations need a session of their own, which a pooler in transaction mode does not give. Migrate by
    /// [`Database::migrate`] over a direct connection, or start another app that has one.
    #[error(
        "{target} is reached through a pooler in transaction mode, over which nexus does not migrate: migrate over a direct connection first (`Database::migrate`)"
    )]
    MigratesPooled {
        /// Host, port and database.
        target: String,
        /// What is different from the schema that this build needs.
        source: Option<Box<MigrateError>>,
    },
    /// The schema is not what this build needs; [`MigrateError`] says what to do.
    #[error(transparent)]
    Schema(MigrateError),
    /// The namespace is not there: no app has been started in it, nor a client connected to it.
    #[error("there is no namespace `{namespace}` in this database; it has {}", names(.known))]
    UnknownNamespace {
        /// The namespace.
        namespace: String,
        /// The namespaces that there are, as far as the role may know.
        known: Vec<String>,
    },
    /// The namespace cannot be used, most often because of its name.
    #[error("could not use namespace `{namespace}`: {cause}")]
    Namespace {
        /// The namespace.
        namespace: String,
        /// What the database answered.
        cause: sqlx::Error,
    },
}

/// How long to wait for a connection from the pool.
pub(super) const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// Most connections of a client without an app.
const DEFAULT_POOL_SIZE: u32 = 10;

/// How long one try to connect may take while a start waits for the database.
const TRY_FOR: Duration = Duration::from_secs(10);

/// Longest pause between two such tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How often a start says again what it waits for.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// How often two connections are compared to find a pooler in transaction mode.
const LOOKS_FOR_POOLER: usize = 3;

impl Database {
    /// The database at `url`; `source` says in errors where the URL came from (`DATABASE_URL`). Connects
    /// to nothing yet.
    ///
    /// # Errors
    ///
    /// The URL cannot be read.
    pub fn from_url(url: &str, source: &str) -> Result<Self, ConnectError> {
        let refused = |error| ConnectError::Url {
            source_name: source.to_owned(),
            source: error,
        };
        if let Some(scheme) = config::other_scheme(url) {
            let reason = format!("it begins with {scheme}://");
            return Err(refused(sqlx::Error::Configuration(reason.into())));
        }
        let options = super::url::options(url, source).map_err(refused)?;
        Ok(Self {
            // A pooler refuses a setting at the start of a session that it does not know of; since
            // PostgreSQL 12 the server's default is as good.
            options: options.application_name("nexus").extra_float_digits(None),
            source: source.to_owned(),
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            pool_size: DEFAULT_POOL_SIZE,
            pooler: Pooler::Session,
            doubt: Doubt::default(),
        })
    }

    /// How long [`migrate`](Self::migrate) and [`Client::connect`](crate::Client::connect) wait for a
    /// database that is coming up, as [`App::connect_timeout`](crate::App::connect_timeout); default
    /// 30 s, zero does not wait. No variable of the environment is read.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// What stands before the server, as [`App::pooler`](crate::App::pooler); default
    /// [`Pooler::Session`]. No variable of the environment is read.
    #[must_use]
    pub fn pooler(mut self, pooler: Pooler) -> Self {
        self.pooler = pooler;
        self
    }

    /// Most connections of the pool of a [`Client`](crate::Client::connect); default 10, at least 2. As many emits
    /// as that run at once. They are opened when they are needed, and closed after ten minutes without use. An app
    /// has [`App::pool_size`](crate::App::pool_size).
    #[must_use]
    pub fn pool_size(mut self, connections: u32) -> Self {
        self.pool_size = connections.max(2);
        self
    }

    /// Brings the schema to the version of this build. An app does this when it starts; any number of
    /// processes may do it at once.
    ///
    /// Waits for the database to come up, for the [`connect_timeout`](Self::connect_timeout). A migration
    /// takes as long as it takes.
    ///
    /// # Errors
    ///
    /// There is no connection, or only one through a pooler in transaction mode, or the schema could not
    /// be brought to the version this build needs.
    pub async fn migrate(&self) -> Result<(), ConnectError> {
        self.reach_directly().await?;
        // Boxed, because it would make a large future of every start.
        Box::pin(nexus_migrations::up(&self.options))
            .await
            .map(drop)
            .map_err(ConnectError::Schema)
    }

    /// Which migrations have been applied, and which this build has. Changes nothing, and also answers for a
    /// database that has none.
    ///
    /// # Errors
    ///
    /// There is no connection, or [`ConnectError::Schema`]: the schema is newer than this build, was made by
    /// another program, or may not be read.
    pub async fn schema(&self) -> Result<SchemaStatus, ConnectError> {
        self.reach().await?;
        let pool = self.pool(1).await?;
        let asked = async {
            let mut lent = self.lend(&pool).await?;
            let history = nexus_migrations::history(&mut lent).await;
            lent.give_back().await?;
            Ok(history)
        };
        let history = store::answered_within(lent::ANSWER, asked)
            .await
            .map_err(|cause| self.unusable(cause))?
            .map_err(ConnectError::Schema)?;
        let steps = history.into_iter().map(|(step, applied)| SchemaStep {
            version: step.version.unsigned_abs(),
            name: step.name,
            applied_at: applied.map(store::timestamp),
        });
        Ok(SchemaStatus {
            steps: steps.collect(),
        })
    }

    /// Takes the schema back to `version`; 0 removes it, with the log, the queues and all that is in them.
    /// Schema `pgmq` stays. Returns how many migrations were taken back. No app may be running.
    ///
    /// # Errors
    ///
    /// As of [`migrate`](Self::migrate); the migrations before the one that failed stay taken back.
    pub async fn migrate_down(&self, version: u32) -> Result<usize, ConnectError> {
        self.reach_directly().await?;
        let version = i32::try_from(version).unwrap_or(i32::MAX);
        Box::pin(nexus_migrations::down(&self.options, version))
            .await
            .map_err(ConnectError::Schema)
    }

    /// Waits for the database to come up, and refuses a pooler, over which nothing is migrated.
    pub(super) async fn reach_directly(&self) -> Result<(), ConnectError> {
        self.reach().await?;
        if self.pooler == Pooler::Transaction {
            return Err(self.migrates_pooled(None));
        }
        self.refuse_hidden_pooler().await
    }

    /// Looks whether the schema is what this build needs, and changes nothing.
    pub(crate) async fn verify(&self, pool: &PgPool) -> Result<(), ConnectError> {
        let verified = async {
            let mut lent = self.lend(pool).await?;
            let verified = nexus_migrations::verify(&mut lent).await;
            lent.give_back().await?;
            Ok(verified)
        };
        store::answered_within(lent::ANSWER, verified)
            .await
            .map_err(|cause| self.unusable(cause))?
            .map_err(|error| match self.pooler {
                Pooler::Transaction => self.migrates_pooled(Some(Box::new(error))),
                Pooler::Session => ConnectError::Schema(error),
            })
    }

    fn migrates_pooled(&self, source: Option<Box<MigrateError>>) -> ConnectError {
        ConnectError::MigratesPooled {
            target: self.target(),
            source,
        }
    }

    /// Waits until the database takes connections and writes, for the connect timeout at most.
    ///
    /// Not by the pool, which tries again for a while whatever the reason, and does not say what it
    /// waits for.
    pub(crate) async fn reach(&self) -> Result<(), ConnectError> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        let mut said: Option<(Instant, String)> = None;
        loop {
            let left = self.connect_timeout.saturating_sub(begun.elapsed());
            let is_patient = !self.connect_timeout.is_zero();
            let patience = if is_patient {
                TRY_FOR.min(left.max(LONGEST_PAUSE))
            } else {
                TRY_FOR
            };
            let cause = match store::answered_within(patience, self.look()).await {
                Ok(()) => {
                    if said.is_some() {
                        tracing::info!(
                            database = self.target(),
                            waited = ?begun.elapsed(),
                            "the database is there"
                        );
                    }
                    return Ok(());
                }
                Err(cause) if !is_patient || !is_coming_up(&cause) => {
                    return Err(self.unusable(cause));
                }
                Err(cause) => cause,
            };
            if left.is_zero() {
                return Err(ConnectError::NotUp {
                    source_name: self.source.clone(),
                    target: self.target(),
                    waited: self.connect_timeout,
                    cause,
                });
            }
            let reason = cause.to_string();
            if said
                .as_ref()
                .is_none_or(|(at, before)| *before != reason || at.elapsed() >= SAY_EVERY)
            {
                tracing::warn!(
                    database = self.target(),
                    "waiting for the database for another {} s at most: {reason}",
                    left.as_secs()
                );
                said = Some((Instant::now(), reason));
            }
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Whether a connection can be made that takes writes.
    async fn look(&self) -> sqlx::Result<()> {
        let mut connection = PgConnection::connect_with(&self.options).await?;
        // As text, which is one message to the server and one back, whatever stands between.
        let row = connection
            .fetch_one(sqlx::raw_sql(
                "select current_setting('transaction_read_only')",
            ))
            .await?;
        let is_read_only = row.get::<String, _>(0) == "on";
        // The session ends either way; closing it properly only spares the server a log line.
        let _ = connection.close().await;
        if is_read_only {
            return Err(lent::takes_no_writes());
        }
        Ok(())
    }

    /// Refuses a pooler in transaction mode that nexus was not told of.
    ///
    /// Such a pooler lets two connections that are open at the same time use one session of the
    /// server, which nothing else does. Most recently used sessions come first, so that they do it
    /// unless others come in between.
    pub(crate) async fn refuse_hidden_pooler(&self) -> Result<(), ConnectError> {
        if self.pooler == Pooler::Transaction {
            return Ok(());
        }
        let compared = async {
            let mut one = PgConnection::connect_with(&self.options).await?;
            let mut two = PgConnection::connect_with(&self.options).await?;
            let mut is_shared = false;
            for _ in 0..LOOKS_FOR_POOLER {
                let session = sqlx::raw_sql("select pg_backend_pid()");
                let first: i32 = one.fetch_one(session).await?.get(0);
                let session = sqlx::raw_sql("select pg_backend_pid()");
                let second: i32 = two.fetch_one(session).await?.get(0);
                is_shared |= first == second;
            }
            let _ = tokio::join!(one.close(), two.close());
            Ok(is_shared)
        };
        match store::answered_within(lent::ANSWER, compared).await {
            Ok(false) => Ok(()),
            Ok(true) => Err(ConnectError::Pooled {
                source_name: self.source.clone(),
                target: self.target(),
            }),
            Err(cause) => Err(self.unusable(cause)),
        }
    }

    pub(crate) fn options(&self) -> &PgConnectOptions {
        &self.options
    }

    pub(crate) fn mode(&self) -> Pooler {
        self.pooler
    }

    pub(crate) async fn lend(&self, pool: &PgPool) -> sqlx::Result<lent::Lent> {
        self.lender(pool.clone()).lend().await
    }

    pub(crate) fn lender(&self, pool: PgPool) -> lent::Lender {
        lent::Lender::new(pool, self.pooler, self.doubt.clone())
    }

    /// The pool for emits and handlers.
    pub(crate) async fn pool(&self, size: u32) -> Result<PgPool, ConnectError> {
        self.pool_for(size, false).await
    }

    /// A pool for statements of our own alone. None of them is worth being compiled, which takes a second
    /// where some of them take a millisecond.
    pub(crate) async fn own_pool(&self, size: u32) -> Result<PgPool, ConnectError> {
        self.pool_for(size, true).await
    }

    /// The pool of a client without an app.
    pub(crate) async fn client_pool(&self) -> Result<PgPool, ConnectError> {
        self.pool(self.pool_size).await
    }

    async fn pool_for(&self, size: u32, is_own: bool) -> Result<PgPool, ConnectError> {
        let (doubt, pooler) = (self.doubt.clone(), self.pooler);
        let pool = PgPoolOptions::new()
            .max_connections(size)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            // We do it ourselves: sqlx waits for the answer for as long as the caller waits for a
            // connection, and a silent line would cost every caller all of its time.
            .test_before_acquire(false)
            .before_acquire(move |connection, meta| {
                let doubt = doubt.clone();
                Box::pin(async move { Ok(doubt.trusts(connection, meta, pooler).await) })
            });
        let pool = match self.pooler {
            // The setting would stay in a session that others get as well.
            Pooler::Transaction => pool,
            Pooler::Session => pool.after_connect(move |connection, _| {
                Box::pin(async move {
                    if is_own {
                        connection.execute("set jit = off").await?;
                    }
                    // Makes the server notice within a second that we closed a connection, and stop
                    // the statement that runs on it. A server on Windows cannot; there the
                    // statement_timeout of the handler's transaction ends it.
                    let asked = connection
                        .execute("set client_connection_check_interval = '1s'")
                        .await;
                    if let Err(error) = asked {
                        tracing::debug!(%error, "the server does not look for closed connections");
                    }
                    Ok(())
                })
            }),
        };
        pool.connect_with(self.options.clone())
            .await
            .map_err(|cause| self.unusable(cause))
    }

    pub(crate) fn unusable(&self, cause: sqlx::Error) -> ConnectError {
        ConnectError::Unusable {
            source_name: self.source.clone(),
            target: self.target(),
            cause,
        }
    }

    /// Host, port and database, without the password.
    #[must_use]
    pub fn target(&self) -> String {
        let database = self
            .options
            .get_database()
            .unwrap_or(self.options.get_username());
        match self.options.get_socket() {
            Some(socket) => format!("{}/{database}", socket.display()),
            None => {
                format!(
                    "{}:{}/{database}",
                    self.options.get_host(),
                    self.options.get_port()
                )
            }
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Database({})", self.target())
    }
}

/// Whether waiting can help: the server is away, starting, stopping, recovering or full, its name is not
/// known yet, or it takes no writes.
fn is_coming_up(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => !matches!(
            error.kind(),
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::InvalidInput
        ),
        error => store::is_away(error) && !matches!(error, sqlx::Error::Tls(_)),
    }
}
