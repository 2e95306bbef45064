//! A registered use of a shared server.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Error, Options};

/// The database every embedded server has.
pub const DEFAULT_DATABASE: &str = "nexus";

/// A registered use of an embedded server, which runs at least until this is dropped.
///
/// Dropping it takes the registration back and does not wait: the server stops after its grace
/// time, if nobody else uses it. Keep it for as long as there are connections.
#[derive(Debug)]
pub struct Server {
    pub(crate) binaries: PathBuf,
    pub(crate) major: u32,
    pub(crate) data: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) started: bool,
    pub(crate) _registration: Registration,
}

/// A file in `users/` of the cluster's folder; the watcher keeps the server while one is there.
#[derive(Debug)]
pub(crate) struct Registration(pub(crate) PathBuf);

impl Drop for Registration {
    fn drop(&mut self) {
        // If this fails the entry counts until this process ends, which is late but safe.
        let _ = fs::remove_file(&self.0);
    }
}

impl Server {
    /// Joins the server that `options` describe, or starts it; creates the cluster if there is none.
    ///
    /// Looks at the variables `NEXUS_PG_…`, not at `DATABASE_URL`: see [`resolve`](crate::resolve).
    ///
    /// Blocks until the server accepts connections: around 20 ms when joining, seconds when the
    /// cluster must be created first, minutes when PostgreSQL must be downloaded. From async code,
    /// call it where blocking is allowed.
    ///
    /// # Errors
    ///
    /// See [`Error`]; each says what to do. Nothing is left running that a later call would not join.
    pub fn start(options: &Options) -> Result<Self, Error> {
        #[cfg(unix)]
        return crate::cluster::open(options);
        #[cfg(not(unix))]
        {
            let _ = options;
            Err(Error::Unsupported)
        }
    }

    /// As [`start`](Self::start), if there is a cluster already; `None` if there is not. For programs that only
    /// look.
    ///
    /// # Errors
    ///
    /// As of [`start`](Self::start).
    pub fn start_existing(options: &Options) -> Result<Option<Self>, Error> {
        #[cfg(unix)]
        return crate::cluster::open_made(options);
        #[cfg(not(unix))]
        {
            let _ = options;
            Err(Error::Unsupported)
        }
    }

    /// The connection string of one of its databases, such as [`DEFAULT_DATABASE`] or `postgres`.
    ///
    /// The database need not exist yet. The string says everything that matters (role, socket,
    /// port, no TLS), so that `PG*` variables of the environment change none of it.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        let database = percent_encoded(database.as_bytes(), b"");
        let socket = percent_encoded(self.socket.as_os_str().as_encoded_bytes(), b"/");
        format!("postgres://nexus@localhost:5432/{database}?host={socket}&sslmode=disable")
    }

    /// A command for a shell that opens one of its databases, such as [`DEFAULT_DATABASE`].
    ///
    /// It names role, socket, port and database, so that `PG*` variables of the environment change none of
    /// them. `psql` has to be on the path; the server's own is among its [programs](Self::binaries).
    #[must_use]
    pub fn psql(&self, database: &str) -> String {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
        let value = |value: &str| {
            if value.bytes().all(is_plain) {
                value.to_owned()
            } else {
                let escaped = value.replace('\\', r"\\").replace('\'', r"\'");
                format!("'{escaped}'")
            }
        };
        let socket = self.socket.to_string_lossy();
        let connection = format!(
            "host={} port=5432 user=nexus dbname={}",
            value(&socket),
            value(database)
        );
        // For the shell: what ends its quotes is written outside of them.
        format!("psql '{}'", connection.replace('\'', r"'\''"))
    }

    /// The folder with the programs of the PostgreSQL that was found: `postgres`, mostly `psql` too.
    ///
    /// A server that was joined may have been started from another folder with the same major version.
    #[must_use]
    pub fn binaries(&self) -> &Path {
        &self.binaries
    }

    /// The major version of the server: 15 or higher.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The data folder of the cluster.
    #[must_use]
    pub fn data_folder(&self) -> &Path {
        &self.data
    }

    /// What the server logs. Emptied whenever the server starts.
    #[must_use]
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// Whether this call started the server; `false` means that it joined one.
    #[must_use]
    pub fn was_started(&self) -> bool {
        self.started
    }
}

/// Leaves only what no part of a connection string gives a meaning to, and the bytes in `keep`.
fn percent_encoded(bytes: &[u8], keep: &[u8]) -> String {
    let mut encoded = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("writing to a string cannot fail");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_survives_any_database_and_folder() {
        let server = Server {
            binaries: PathBuf::new(),
            major: 18,
            data: PathBuf::new(),
            socket: PathBuf::from("/tmp/a b+c&d/ü"),
            log: PathBuf::new(),
            started: true,
            _registration: Registration(PathBuf::new()),
        };
        assert_eq!(
            server.url("my/db?"),
            "postgres://nexus@localhost:5432/my%2Fdb%3F?host=/tmp/a%20b%2Bc%26d/%C3%BC&sslmode=disable"
        );
    }

    #[test]
    fn a_psql_command_survives_any_database_and_folder() {
        let psql = |socket: &str, database: &str| {
            let server = Server {
                binaries: PathBuf::new(),
                major: 18,
                data: PathBuf::new(),
                socket: PathBuf::from(socket),
                log: PathBuf::new(),
                started: true,
                _registration: Registration(PathBuf::new()),
            };
            server.psql(database)
        };
        assert_eq!(
            psql("/dev/shm/nexus-0/s", "nexus"),
            "psql 'host=/dev/shm/nexus-0/s port=5432 user=nexus dbname=nexus'"
        );
        let odd = psql("/tmp/a 'b'", r"c\d");
        // What a shell makes of it is what libpq reads.
        let command = odd.replacen("psql", "printf %s", 1);
        let read = std::process::Command::new("sh")
            .args(["-c", &command])
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(read.stdout).unwrap(),
            r"host='/tmp/a \'b\'' port=5432 user=nexus dbname='c\\d'"
        );
    }
}
