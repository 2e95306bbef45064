use std::{fmt, str::FromStr, time::Duration};

use crate::config;
use nexus_migrations::MigrateError;
use sqlx::{
    Connection, Executor, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

/// A Postgres database, by its URL. Never shows the password.
#[derive(Clone)]
pub struct Database {
    options: PgConnectOptions,
    /// Where the URL came from, for messages.
    source: String,
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
    /// No connection could be made: the server is away, or refuses the role, password or database. The
    /// cause says which.
    #[error("{source_name} is set but {target} is not usable: {cause}")]
    Unusable {
        /// Where the URL came from.
        source_name: String,
        /// Host, port and database.
        target: String,
        /// What went wrong.
        cause: sqlx::Error,
    },
    /// The schema is not what this build needs; [`MigrateError`] says what to do.
    #[error(transparent)]
    Schema(MigrateError),
    /// The namespace cannot be used, most often because of its name.
    #[error("could not use namespace `{namespace}`: {cause}")]
    Namespace {
        /// The namespace.
        namespace: String,
        /// What the database answered.
        cause: sqlx::Error,
    },
}

/// How long to wait for a connection from the pool, or for the server.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

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
        let options = PgConnectOptions::from_str(url).map_err(refused)?;
        Ok(Self {
            options: options.application_name("nexus"),
            source: source.to_owned(),
        })
    }

    /// Brings the schema to the version of this build. An app does this when it starts; any number of
    /// processes may do it at once.
    ///
    /// # Errors
    ///
    /// There is no connection, or the schema could not be brought to the version this build needs.
    pub async fn migrate(&self) -> Result<(), ConnectError> {
        // Asked first and without a pool, which would try again for a while: a server that is away
        // is reported as that, at once.
        let connection = PgConnection::connect_with(&self.options)
            .await
            .map_err(|cause| self.unusable(cause))?;
        // The session ends either way; closing it properly only spares the server a log line.
        let _ = connection.close().await;
        nexus_migrations::up(&self.options)
            .await
            .map(drop)
            .map_err(ConnectError::Schema)
    }

    pub(crate) fn options(&self) -> &PgConnectOptions {
        &self.options
    }

    pub(crate) async fn pool(&self, size: u32) -> Result<PgPool, ConnectError> {
        PgPoolOptions::new()
            .max_connections(size)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(|connection, _| {
                Box::pin(async move {
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
            })
            .connect_with(self.options.clone())
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
    pub(crate) fn target(&self) -> String {
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
