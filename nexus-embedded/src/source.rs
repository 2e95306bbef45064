//! Which database a program uses.

use std::{env, fmt};

use crate::{DEFAULT_DATABASE, Error, Options, Server};

/// In this order; the first one that is set and not empty wins.
const VARIABLES: [&str; 2] = ["CORE_DATABASE_URL", "DATABASE_URL"];

/// Where the database comes from.
///
/// `Display` is one line for the log and `Debug` is for developers; neither shows a password.
#[non_exhaustive]
pub enum Source {
    /// A database somebody else runs.
    DatabaseUrl {
        /// The environment variable it was taken from.
        variable: &'static str,
        /// Its value, not checked in any way. May hold a password.
        url: String,
    },
    /// A server that runs at least until this is dropped.
    Embedded(Server),
}

/// Says which database to use, and starts the embedded server when no environment variable names one.
///
/// The order is in the crate documentation. Blocks as [`Server::start`] does.
///
/// # Errors
///
/// Those of [`Server::start`], and [`Error::NotUnicode`] for a variable with such a value. Whether
/// a database named by a variable can be used is found out by connecting; see [`Source::unusable`].
pub fn resolve(options: &Options) -> Result<Source, Error> {
    for variable in VARIABLES {
        match env::var(variable) {
            Ok(url) if !url.trim().is_empty() => {
                return Ok(Source::DatabaseUrl { variable, url });
            }
            Ok(_) | Err(env::VarError::NotPresent) => {}
            Err(env::VarError::NotUnicode(_)) => return Err(Error::NotUnicode { variable }),
        }
    }
    Server::start(options).map(Source::Embedded)
}

/// The folder with the programs of the PostgreSQL that an embedded server would run, for those who run one
/// themselves. Starts nothing, but downloads where nothing else is found, as [`Server::start`] does.
///
/// # Errors
///
/// There is none; [`Error`] says what to do.
pub fn programs(options: &Options) -> Result<std::path::PathBuf, Error> {
    #[cfg(unix)]
    return crate::discovery::find(options).map(|found| found.folder);
    #[cfg(not(unix))]
    {
        let _ = options;
        Err(Error::Unsupported)
    }
}

impl Source {
    /// The connection string: the variable's value, or that of the embedded [`DEFAULT_DATABASE`].
    #[must_use]
    pub fn url(&self) -> String {
        match self {
            Self::DatabaseUrl { url, .. } => url.clone(),
            Self::Embedded(server) => server.url(DEFAULT_DATABASE),
        }
    }

    /// The error to report when connecting to this database failed because of `cause`.
    ///
    /// It names where the database came from and how to use another one. `cause` is shown as it is.
    #[must_use]
    pub fn unusable(&self, cause: &dyn fmt::Display) -> Error {
        match self {
            Self::DatabaseUrl { variable, url } => Error::DatabaseUrl {
                variable,
                address: address(url),
                cause: cause.to_string(),
            },
            Self::Embedded(server) => Error::Embedded {
                log: server.log.clone(),
                cause: cause.to_string(),
            },
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DatabaseUrl { variable, url } => write!(f, "{variable} ({})", address(url)),
            Self::Embedded(server) => write!(
                f,
                "embedded PostgreSQL {} ({} {})",
                server.major,
                if server.started {
                    "started in"
                } else {
                    "joined in"
                },
                server.data.display()
            ),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DatabaseUrl { variable, url } => f
                .debug_struct("DatabaseUrl")
                .field("variable", variable)
                .field("address", &address(url))
                .finish(),
            Self::Embedded(server) => f.debug_tuple("Embedded").field(server).finish(),
        }
    }
}

/// `host:port/database` of a connection string, or a stand-in where that could show a password.
///
/// People paste passwords with `@`, `/` or `?` in them unencoded. Whatever cannot be told apart
/// from one is not shown.
fn address(url: &str) -> String {
    const HIDDEN: &str = "address not shown";
    let Some((_, rest)) = url.split_once("://") else {
        return HIDDEN.to_owned();
    };
    let (before, query) = rest.split_once(['?', '#']).unwrap_or((rest, ""));
    if query.contains('@') {
        return HIDDEN.to_owned();
    }
    let shown = before.rsplit_once('@').map_or(before, |(_, shown)| shown);
    let authority = shown.split('/').next().unwrap_or_default();
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    // Without a numeric port after it, a colon outside of an IPv6 address may precede a password.
    let is_safe = authority.ends_with(']')
        || authority
            .rsplit_once(':')
            .is_none_or(|(_, port)| is_port(port));
    if shown.is_empty() || !is_safe {
        HIDDEN.to_owned()
    } else {
        shown.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_never_shows_a_password() {
        for (url, expected) in [
            (
                "postgres://u:secret@db.example.com:5433/app?sslmode=require",
                "db.example.com:5433/app",
            ),
            ("postgres://db.example.com/app", "db.example.com/app"),
            ("postgres://u:secret@[::1]:5432/app", "[::1]:5432/app"),
            ("postgres://u:se@cr/et@db/app", "db/app"),
            ("postgres://u:secret?@db/app", "address not shown"),
            ("postgres://u:x@secret?@db/app", "address not shown"),
            ("postgres://db/app?password=se@cret", "address not shown"),
            ("postgres://u:secret/app", "address not shown"),
            ("host=db password=secret", "address not shown"),
            ("secret", "address not shown"),
        ] {
            let source = Source::DatabaseUrl {
                variable: "DATABASE_URL",
                url: url.to_owned(),
            };
            assert_eq!(address(url), expected, "{url}");
            for text in [
                format!("{source}"),
                format!("{source:?}"),
                source.unusable(&"refused").to_string(),
            ] {
                assert!(!text.contains("secret") && !text.contains("cret"), "{text}");
            }
        }
    }

    #[test]
    fn an_unusable_database_url_names_the_way_out() {
        let source = Source::DatabaseUrl {
            variable: "CORE_DATABASE_URL",
            url: "postgres://u:p@db:5432/app".to_owned(),
        };
        assert_eq!(
            source.unusable(&"connection refused").to_string(),
            "CORE_DATABASE_URL is set but db:5432/app is not usable: connection refused. \
             Unset it to use the embedded database"
        );
    }
}
