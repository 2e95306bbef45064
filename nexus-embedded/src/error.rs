//! What can go wrong, in words that say what to do next.

use std::path::PathBuf;
use std::{fmt, io};

/// Why there is no database to use. Each message says what to do about it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// There is no embedded server on this platform; set `DATABASE_URL`.
    Unsupported,
    /// An environment variable's value is not Unicode; correct or unset it.
    NotUnicode {
        /// Which variable.
        variable: &'static str,
    },
    /// The database named by an environment variable cannot be used; correct or unset it. See
    /// [`Source::unusable`](crate::Source::unusable).
    DatabaseUrl {
        /// Which variable named it.
        variable: &'static str,
        /// Host, port and database, without a password.
        address: String,
        /// What connecting to it failed with.
        cause: String,
    },
    /// The role in the variable's URL may not create databases; for test kits that need it to.
    MayNotCreateDatabases {
        /// Which variable named the role.
        variable: &'static str,
    },
    /// The embedded server runs but could not be used; its log may say why. See
    /// [`Source::unusable`](crate::Source::unusable).
    Embedded {
        /// The server's log.
        log: PathBuf,
        /// What connecting to it failed with.
        cause: String,
    },
    /// No PostgreSQL on this machine, or none that is new enough; the message lists the ways out.
    NotFound {
        /// Where it was looked for, and what was found that cannot be used.
        looked_in: Vec<String>,
        /// Why none was downloaded.
        download: NoDownload,
    },
    /// `NEXUS_PG_BIN` names a folder without a usable PostgreSQL; correct or unset it.
    Binaries {
        /// The folder it names.
        folder: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// This process is root and there is no other user to run PostgreSQL as; be a normal user.
    NoAccount,
    /// Root may not become the user PostgreSQL would run as; be a normal user.
    CannotSwitch {
        /// The user to switch to.
        user: String,
        /// The answer of the operating system.
        source: io::Error,
    },
    /// The user PostgreSQL runs as cannot reach the data; choose a folder it can enter.
    CannotEnter {
        /// The user PostgreSQL runs as.
        user: String,
        /// The first folder on the way that is closed.
        folder: PathBuf,
    },
    /// The user PostgreSQL runs as cannot reach its programs; install them where it can.
    CannotRun {
        /// The user PostgreSQL runs as.
        user: String,
        /// The first folder on the way that is closed, or the program.
        path: PathBuf,
    },
    /// A folder for data exists and belongs to somebody else; choose another one.
    NotOurs {
        /// The folder.
        folder: PathBuf,
    },
    /// The operating system allows 103 bytes for the path of a socket; choose a shorter folder.
    SocketPath {
        /// The path's length in bytes.
        length: usize,
    },
    /// The data was written by another major version, which cannot be read.
    OtherMajor {
        /// The data folder.
        folder: PathBuf,
        /// The major version that wrote the data.
        made_by: String,
        /// The major version that was found on this machine.
        found: u32,
    },
    /// The cluster could not be created; nothing is left of it.
    Create {
        /// Which step failed, and how it ended.
        step: String,
        /// The last lines it printed.
        output: String,
    },
    /// The server ended instead of accepting connections.
    Exited {
        /// How it ended.
        status: String,
        /// The last lines of its log.
        lines: String,
        /// The whole log.
        log: PathBuf,
    },
    /// The server did not accept connections in time. It stops by itself; trying again may help.
    NotReady {
        /// How long was waited, in seconds.
        seconds: u64,
        /// The last lines of its log.
        lines: String,
        /// The whole log.
        log: PathBuf,
    },
    /// Something else uses the data folder, and does not end or cannot be shared.
    Busy {
        /// The data folder.
        folder: PathBuf,
        /// What uses it.
        reason: String,
    },
    /// The file system or a program refused something this crate needs.
    Io {
        /// What was attempted, on what.
        attempt: String,
        /// The answer of the operating system.
        source: io::Error,
    },
}

/// Why no PostgreSQL was downloaded where none was found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoDownload {
    /// This program was built without the feature `download`; turn it on.
    NotBuilt,
    /// `NEXUS_PG_OFFLINE` or [`Options::offline`](crate::Options::offline) forbids it; allow it.
    Forbidden,
    /// It was tried; the cause says what to do where something can be done.
    Failed {
        /// What went wrong.
        cause: String,
    },
}

impl fmt::Display for NoDownload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt => f.write_str("this program cannot download one"),
            Self::Forbidden => {
                f.write_str("a download is forbidden by NEXUS_PG_OFFLINE or by the program")
            }
            Self::Failed { cause } => write!(f, "download failed: {cause}"),
        }
    }
}

impl Error {
    /// For `map_err`: names what was attempted.
    #[cfg(unix)]
    pub(crate) fn io(attempt: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let attempt = attempt.into();
        move |source| Self::Io { attempt, source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported => f.write_str("there is no embedded PostgreSQL on this platform: set DATABASE_URL"),
            Self::NotUnicode { variable } => write!(f, "the value of {variable} is not Unicode: correct or unset it"),
            Self::DatabaseUrl { variable, address, cause } => write!(
                f,
                "{variable} is set but {address} is not usable: {cause}. Unset it to use the embedded database"
            ),
            Self::MayNotCreateDatabases { variable } => write!(
                f,
                "the role in {variable} may not create databases; tests need that (alter role … createdb)"
            ),
            Self::Embedded { log, cause } => {
                write!(f, "the embedded PostgreSQL is not usable: {cause}. Its log: {}", log.display())
            }
            Self::NotFound { looked_in, download } => write!(
                f,
                "no PostgreSQL 15 or newer found. Looked in: {}; {download}. Do one of: set DATABASE_URL; \
                 set NEXUS_PG_BIN to a folder with initdb and postgres; install PostgreSQL \
                 (Debian: apt-get install postgresql, macOS: brew install postgresql@18){}",
                looked_in.join(", "),
                match download {
                    NoDownload::NotBuilt => "; turn on the feature `download` of nexus to have one downloaded",
                    NoDownload::Forbidden => "; unset NEXUS_PG_OFFLINE to have one downloaded",
                    NoDownload::Failed { .. } => "",
                }
            ),
            Self::Binaries { folder, reason } => write!(
                f,
                "NEXUS_PG_BIN is {} but {reason}: set it to a folder with initdb and postgres, \
                 15 or newer, or unset it",
                folder.display()
            ),
            Self::NoAccount => f.write_str(
                "running as root, and PostgreSQL refuses that; no user 'postgres' or 'nobody' to run it as: \
                 run as a normal user or set DATABASE_URL",
            ),
            Self::CannotSwitch { user, source } => {
                // EINVAL: the user has no number in here. Anything else: switching is forbidden.
                let why = if source.raw_os_error() == Some(22) {
                    "this container maps only uid 0".to_owned()
                } else {
                    source.to_string()
                };
                write!(
                    f,
                    "cannot switch from root to '{user}' ({why}): run as a normal user or set DATABASE_URL"
                )
            }
            Self::CannotEnter { user, folder } => write!(
                f,
                "user '{user}' cannot enter {}: set NEXUS_PG_DATA to a folder it can reach",
                folder.display()
            ),
            Self::CannotRun { user, path } => write!(
                f,
                "PostgreSQL runs as user '{user}', who cannot enter or run {}: set NEXUS_PG_BIN to a \
                 PostgreSQL it can reach, or run as a normal user",
                path.display()
            ),
            Self::NotOurs { folder } => write!(
                f,
                "{} is not a folder that only this user can change: remove it, or set NEXUS_PG_DATA to another folder",
                folder.display()
            ),
            Self::SocketPath { length } => write!(
                f,
                "socket path is {length} bytes, the limit is 103: set NEXUS_PG_DATA to a shorter folder"
            ),
            Self::OtherMajor { folder, made_by, found } => write!(
                f,
                "{} was made by PostgreSQL {made_by}, found {found}: point NEXUS_PG_BIN at {made_by}, \
                 or delete the folder to start empty",
                folder.display()
            ),
            Self::Create { step, output } => {
                write!(f, "could not create a PostgreSQL cluster: {step}. Last lines: {output}")
            }
            Self::Exited { status, lines, log } => write!(
                f,
                "postgres exited ({status}). Last log lines: {lines} Full log: {}",
                log.display()
            ),
            Self::NotReady { seconds, lines, log } => write!(
                f,
                "postgres does not accept connections after {seconds} s. Last log lines: {lines} Full log: {}",
                log.display()
            ),
            Self::Busy { folder, reason } => write!(
                f,
                "{} is in use by {reason}: end that, or set NEXUS_PG_DATA to another folder",
                folder.display()
            ),
            Self::Io { attempt, .. } => write!(f, "could not {attempt}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
