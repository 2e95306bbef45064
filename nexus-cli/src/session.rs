//! Which database and namespace are meant.

use std::{
    collections::HashMap,
    env,
    io::{self, IsTerminal},
    time::Duration,
};

use anyhow::Context as _;
use nexus::{Client, Database, Pooler, jiff::Timestamp};
use nexus_embedded::{DEFAULT_DATABASE, Options, Server};

use crate::{Global, console::Console, failure::usage};

/// A client of the namespace that is meant.
pub(crate) struct Session {
    pub(crate) client: Client,
    /// By the clock of the database.
    pub(crate) now: Timestamp,
    /// Where that is, without a password.
    pub(crate) target: String,
    _server: Option<Server>,
}

impl Session {
    pub(crate) async fn open(global: &Global) -> anyhow::Result<Self> {
        let place = Place::find(global, Missing::IsAnError).await?;
        let attached = Client::attach(&place.database, &place.namespace).await;
        let client = attached.map_err(|error| explain(error, &place.database))?;
        let now = client.database_time().await?;
        Ok(Self {
            client,
            now,
            target: place.database.target(),
            _server: place.server,
        })
    }

    /// Asks before something is done that cannot be undone, and says where that would be.
    pub(crate) async fn ask(&self, console: &Console, what: &str) -> anyhow::Result<()> {
        let (namespace, target) = (self.client.namespace(), &self.target);
        let asked = format!("namespace {namespace} at {target}: {what}");
        console.ask(&asked).await
    }
}

/// Says which database it is that has not got the right schema.
pub(crate) fn explain(error: nexus::client::ConnectError, database: &Database) -> anyhow::Error {
    let is_schema = matches!(error, nexus::client::ConnectError::Schema(_));
    let error = anyhow::Error::from(error);
    if is_schema {
        let target = database.target();
        error.context(format!(
            "{target} cannot be looked at; see `nexus migrate status`"
        ))
    } else {
        error
    }
}

/// What becomes of an embedded database that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    IsAnError,
    IsMade,
}

/// The database and the namespace that are meant. Nothing has been asked there yet.
pub(crate) struct Place {
    pub(crate) database: Database,
    pub(crate) namespace: String,
    /// With its password.
    pub(crate) url: String,
    pub(crate) pooler: Pooler,
    pub(crate) settings: Settings,
    server: Option<Server>,
}

impl Place {
    pub(crate) async fn find(global: &Global, missing: Missing) -> anyhow::Result<Self> {
        let settings = Settings::read()?;
        let named = global
            .database_url
            .clone()
            .map(|url| (url, "--database-url".to_owned()))
            .or_else(|| settings.first(&["CORE_DATABASE_URL", "DATABASE_URL"]));
        let (url, source, server) = if let Some((url, source)) = named {
            (url, source, None)
        } else {
            let server = embedded(missing).await?;
            let url = server.url(DEFAULT_DATABASE);
            (url, "the embedded database".to_owned(), Some(server))
        };
        let pooler = match settings.first(&["CORE_POOLER"]) {
            None => Pooler::Session,
            Some((mode, source)) => mode
                .parse()
                .map_err(|accepted| usage(format!("{source} is `{mode}`, expected {accepted}")))?,
        };
        // Who waits at a terminal wants to know at once that the database is away.
        let database = Database::from_url(&url, &source)?
            .connect_timeout(Duration::ZERO)
            .pooler(pooler)
            .pool_size(4);
        let namespace = global
            .namespace
            .clone()
            .or_else(|| settings.first(&["CORE_NAMESPACE"]).map(|(name, _)| name))
            .unwrap_or_else(|| "demo".to_owned());
        Ok(Self {
            database,
            namespace,
            url,
            pooler,
            settings,
            server,
        })
    }
}

async fn embedded(missing: Missing) -> anyhow::Result<Server> {
    let found = tokio::task::spawn_blocking(move || match missing {
        Missing::IsMade => Server::start(&Options::dev()).map(Some),
        Missing::IsAnError => Server::start_existing(&Options::dev()),
    });
    found.await.context("could not look for a database")??.ok_or_else(|| {
        usage(
            "no database is named, and this folder has no embedded one: give --database-url, set DATABASE_URL, or make \
             an embedded one by `nexus migrate up`",
        )
    })
}

/// The environment, and the file `.env` of this folder or of one around it. Variables that are set count more.
pub(crate) struct Settings {
    file: HashMap<String, String>,
}

impl Settings {
    pub(crate) fn read() -> anyhow::Result<Self> {
        let entries = match dotenvy::dotenv_iter() {
            Ok(entries) => entries,
            Err(error) if error.not_found() => {
                return Ok(Self {
                    file: HashMap::new(),
                });
            }
            Err(error) => return Err(error).context("could not read the file .env"),
        };
        let mut file = HashMap::new();
        for entry in entries {
            let (name, value) = entry.map_err(|error| match error {
                // Its text shows the line, which may hold a password.
                dotenvy::Error::LineParse(_, place) => usage(format!(
                    "a line of the file .env cannot be read, at its character {place}"
                )),
                error => anyhow::Error::from(error).context("could not read the file .env"),
            })?;
            file.insert(name, value);
        }
        Ok(Self { file })
    }

    /// What was given on the command line, else what the variable says.
    pub(crate) fn or<T>(
        &self,
        given: Option<T>,
        variable: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> anyhow::Result<Option<T>> {
        let set = self.first(&[variable]);
        let (None, Some((value, source))) = (&given, set) else {
            return Ok(given);
        };
        match read(&value) {
            Ok(value) => Ok(Some(value)),
            Err(why) => Err(usage(format!("{source} is `{value}`: {why}"))),
        }
    }

    /// The first of the variables that is set, in the environment or else in the file, and where that is.
    pub(crate) fn first(&self, variables: &[&str]) -> Option<(String, String)> {
        let is_set = |value: &String| !value.trim().is_empty();
        let set = variables.iter().find_map(|variable| {
            let value = env::var_os(variable)?.to_string_lossy().into_owned();
            is_set(&value).then(|| (value, (*variable).to_owned()))
        });
        set.or_else(|| {
            variables.iter().find_map(|variable| {
                let value = self.file.get(*variable).filter(|value| is_set(value))?;
                Some((value.clone(), format!("{variable} of the file .env")))
            })
        })
    }
}

/// Shows what the library warns of; `CORE_LOG_LEVEL` may ask for more.
pub(crate) fn log_to_stderr() {
    let filter = env::var("CORE_LOG_LEVEL")
        .ok()
        .and_then(|filter| tracing_subscriber::EnvFilter::try_new(filter).ok())
        // That a statement took its time is seen without a warning.
        .unwrap_or_else(|| tracing_subscriber::EnvFilter::new("warn,sqlx=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
}
