use std::{
    any::Any,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64},
    },
};

use sqlx::{Connection, PgPool};
use tokio::sync::{RwLock, Semaphore};
use tokio_util::sync::CancellationToken;

use super::{App, Handle, MigrateError, Preparation, StartError, register};
use crate::{
    client::{Bell, Client, ConnectError, Database, Limits},
    config::{Config, Environment, Pooler},
    handler::Shared,
    metrics::Times,
    registry::LINK_ITS_CRATE,
    runtime::{self, Control, Node, Settings},
    store,
};

/// Starts an app and returns once it is registered and its handlers are at work.
///
/// Sets up no logging, unlike [`run`](super::run()): what nexus logs goes to the program's `tracing`
/// subscriber, if it has one.
///
/// # Errors
///
/// [`StartError`] says what to do. Nothing runs then.
///
/// # Examples
///
/// ```no_run
/// # use nexus::prelude::*;
/// # async fn example() -> nexus::Result {
/// let app = nexus::start(App::discover().name("billing")).await?;
/// // … the rest of the program, which emits with `app.client()` …
/// app.shutdown().await;
/// # Ok(())
/// # }
/// ```
pub async fn start(app: App) -> Result<Handle, StartError> {
    Box::pin(start_unboxed(app)).await
}

async fn start_unboxed(app: App) -> Result<Handle, StartError> {
    let mut app = app;
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
    let database = Database::from_url(&url, source)?
        .connect_timeout(config.connect_timeout)
        .pooler(config.pooler);
    // Of the test kit's databases it is known that they are there.
    if !app.points.is_migrated() {
        Box::pin(prepare_schema(&database, embedded.as_ref())).await?;
    }
    let pool = database.pool(config.pool_size).await?;
    let own_pool = database.own_pool(OWN_CONNECTIONS).await?;
    prepare(std::mem::take(&mut app.preparations), &database, &pool).await?;
    let registered = register::register(&app, &config, &database, &pool).await?;

    let limits = Limits {
        payload_bytes: config.max_payload_bytes,
        ..Limits::default()
    };
    let bell = Bell::start(&database, &config.namespace);
    let client = Client::new(
        &database,
        pool,
        &config.namespace,
        &registered.node.id,
        limits,
        bell,
    );
    let fenced = CancellationToken::new();
    // A node whose id was taken stops, whoever waits for it.
    let stop = fenced.child_token();
    let leases = runtime::Leases::default();
    let alive = app.points.alive();
    let trouble = runtime::Trouble::default();
    let control = Control::start(runtime::Duty {
        options: database.options().clone(),
        pooler: database.mode(),
        trouble: trouble.clone(),
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
        is_first: registered.is_first,
        lender: database.lender(own_pool).for_loops(),
        transactions: Arc::new(Semaphore::new(config.pool_size.max(2) as usize - 1)),
        options: database.options().clone(),
        settings: Settings {
            lease: config.lease,
            batch_size: config.batch_size,
            idle_poll: config.idle_poll,
            max_body_bytes: i32::try_from(config.max_payload_bytes + 64 * 1024).unwrap_or(i32::MAX),
            shutdown_timeout: config.shutdown_timeout,
            retention: config.retention,
            letter_retention: config.letter_retention,
        },
        shared: Arc::new(Shared {
            states: app.states,
            client: client.clone(),
            shutdown: stop.clone(),
        }),
        client,
        leases,
        batches: Arc::default(),
        trouble,
        lateness: Times::default(),
        figures: runtime::Figures::default(),
        clock_ahead: AtomicI64::new(0),
        points: app.points,
        stop,
        abort: CancellationToken::new(),
        isolation: Arc::new(RwLock::new(())),
        alive: alive.drop_guard(),
        database: embedded.map(|embedded| Box::new(embedded) as Box<dyn Any + Send + Sync>),
    });
    let running = runtime::start(node, control, registered.routes, registered.main_queue);
    Ok(Handle { running, fenced })
}

/// Most connections that the loops of a node share, beside the one that each of them claims, listens
/// or beats with.
const OWN_CONNECTIONS: u32 = 4;

/// Does what [`App::before_start`] was given, while no other node of the database does.
async fn prepare(
    preparations: Vec<Preparation>,
    database: &Database,
    pool: &PgPool,
) -> Result<(), StartError> {
    if preparations.is_empty() {
        return Ok(());
    }
    let wrong = |source| StartError::Database {
        doing: "wait for other nodes that prepare the database",
        source,
    };
    let mut connection = database.lend(pool).await.map_err(wrong)?;
    let mut turn = connection.begin().await.map_err(wrong)?;
    store::nodes::await_turn(&mut turn).await.map_err(wrong)?;
    for preparation in preparations {
        preparation(pool.clone())
            .await
            .map_err(StartError::BeforeStart)?;
    }
    // Whatever becomes of the turn, what was prepared is there.
    if turn.rollback().await.is_ok() {
        let _ = connection.give_back().await;
    }
    Ok(())
}

async fn prepare_schema(
    database: &Database,
    embedded: Option<&Embedded>,
) -> Result<(), StartError> {
    let prepared = match database.mode() {
        Pooler::Session => database.migrate().await,
        // Migrations need a session of their own.
        Pooler::Transaction => {
            database.reach().await?;
            database.verify(&database.pool(1).await?).await
        }
    };
    prepared.map_err(|error| match error {
        ConnectError::Schema(error) => unusable_schema(error, embedded),
        other => StartError::Connect(other),
    })
}

/// Names the folder to delete, where the data are development data in a folder of ours.
fn unusable_schema(error: MigrateError, embedded: Option<&Embedded>) -> StartError {
    match (embedded.and_then(Embedded::folder), error) {
        (Some(folder), MigrateError::Edited { name }) => StartError::EmbeddedSchema {
            migration: name,
            folder,
        },
        (_, error) => StartError::Schema(error),
    }
}

/// The database that is started when no URL is given.
struct Embedded {
    url: String,
    #[cfg(feature = "embedded")]
    server: nexus_embedded::Source,
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
        if let nexus_embedded::Source::Embedded(server) = &server {
            let psql = server.psql(nexus_embedded::DEFAULT_DATABASE);
            tracing::info!("to look into it: {psql}");
        }
        Ok(Self {
            url: server.url(),
            server,
        })
    }

    #[cfg(not(feature = "embedded"))]
    #[expect(clippy::unused_async, reason = "it is, with the feature")]
    async fn start() -> Result<Self, StartError> {
        Err(StartError::NoDatabase)
    }

    /// All there is of it on disk.
    #[cfg(feature = "embedded")]
    fn folder(&self) -> Option<PathBuf> {
        match &self.server {
            nexus_embedded::Source::Embedded(server) => {
                server.data_folder().parent().map(Into::into)
            }
            _ => None,
        }
    }

    #[cfg(not(feature = "embedded"))]
    #[expect(clippy::unused_self, reason = "it is used, with the feature")]
    fn folder(&self) -> Option<PathBuf> {
        None
    }
}

/// A variable of the environment. What is not Unicode shows as U+FFFD, which no setting accepts.
pub(super) fn environment(variable: &str) -> Option<String> {
    let value = std::env::var_os(variable)?;
    Some(value.to_string_lossy().into_owned())
}

/// One line that says how much was collected from which crates, so that one that was not linked is missed;
/// and what it was, a line each.
fn log_collected(app: &App, node: &str, namespace: &str, database: &Database) {
    let description = app.describe();
    tracing::info!(
        app = app.name,
        namespace,
        node,
        database = database.target(),
        "collected {}{}",
        description.summary(),
        if app.is_discovered && description.handlers.is_empty() {
            format!(" ({LINK_ITS_CRATE})")
        } else {
            String::new()
        }
    );
    if tracing::enabled!(tracing::Level::DEBUG) {
        for line in description.lines() {
            tracing::debug!("collected {line}");
        }
    }
}
