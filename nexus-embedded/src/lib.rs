//! A real PostgreSQL for development and tests, with nothing to set up.
//!
//! [`resolve`] answers one question: which database does this program use? The first of these wins.
//!
//! 1. `CORE_DATABASE_URL`, else `DATABASE_URL`, when set and not empty. Nothing is started, and
//!    nothing else is tried if that database turns out to be unusable.
//! 2. An embedded server run by the binaries in `NEXUS_PG_BIN`, a folder with `initdb` and `postgres`.
//! 3. An embedded server run by the newest PostgreSQL found on this machine, 15 or newer: in `PATH`,
//!    where `pg_config` points, and where Debian, Red Hat, Homebrew and Postgres.app install it.
//! 4. One run by a PostgreSQL that was downloaded before, of major version 18
//!    ([`Options::download_major`]).
//! 5. One run by a PostgreSQL that is downloaded now, with the feature `download`.
//!
//! Whichever it is, it ends in a connection string. When none of them is to be had, [`Error::NotFound`]
//! lists where was looked and what to do.
//!
//! ```no_run
//! use nexus_embedded::{Options, resolve};
//!
//! let source = resolve(&Options::dev())?;
//! println!("using {source}"); // names the source, never a password
//! let url = source.url(); // for sqlx, psql, anything that speaks to PostgreSQL
//! # Ok::<(), nexus_embedded::Error>(())
//! ```
//!
//! # What an embedded server is
//!
//! An ordinary PostgreSQL that listens on a Unix socket and on no network port. Its socket folder
//! is closed to other users, which is why it asks for no password. The role is `nexus`, a
//! superuser, and there is a database [`DEFAULT_DATABASE`]. Text is UTF-8, sorted as in locale `C`.
//!
//! | | [`Options::dev`] | [`Options::test`] |
//! |---|---|---|
//! | data | `.nexus/pg/<major>` in the project, kept | `/dev/shm/nexus-<uid>/<major>-test` if 1 GiB is free there, else `nexus-pg/` in `target/`; may be thrown away |
//! | as root | `/var/tmp/nexus-0/<hash of the project>/<major>` | as above, with `/var/tmp/nexus-0/` for `target/` |
//! | with `NEXUS_PG_DATA` | `$NEXUS_PG_DATA/<major>` | `$NEXUS_PG_DATA/<major>-test` |
//! | settings | PostgreSQL's own: durable | `fsync`, `synchronous_commit`, `full_page_writes`, `jit` off; time zone UTC; `max_connections` 1000, `max_wal_size` 256 MB |
//! | stops | 3 s after its last user | 30 s after its last user |
//!
//! The project is the nearest folder, from the current one upwards, that holds `Cargo.lock` or
//! `.git`; without one, the current folder.
//!
//! # Downloads
//!
//! With the feature `download` (on by default here, off in `nexus`), a machine without PostgreSQL
//! gets one: the newest release of the major version, from
//! <https://github.com/theseus-rs/postgresql-binaries>. Its checksum is compared before anything of
//! it is unpacked or run; what has none, or another one, is not used. It is kept in the cache, where
//! every program of this user finds it, with or without the feature, and is not renewed. Many
//! processes that need one at once download one. It is given up after 10 minutes.
//!
//! | | Cache |
//! |---|---|
//! | `NEXUS_PG_CACHE` set | that folder |
//! | as root | `/var/cache/nexus/pg`, on macOS `/Library/Caches/nexus/pg`: root's home is closed to the user that PostgreSQL runs as |
//! | `XDG_CACHE_HOME` set | `$XDG_CACHE_HOME/nexus/pg` |
//! | else | `~/.cache/nexus/pg`, on macOS `~/Library/Caches/nexus/pg` |
//!
//! A folder in it is named `<version>-<platform>`. To clear the cache, or to have a newer release
//! downloaded, delete it while no server runs from it.
//!
//! Proxies are taken from `HTTPS_PROXY` and the like. A `GITHUB_TOKEN` in the environment is sent
//! to GitHub, which answers more questions an hour to those it knows. The download sets the default
//! cryptography of `rustls` for this process, where none was set.
//!
//! Tests download from a stand-in that answers for GitHub; GitHub itself, and what is released
//! there, is not part of them.
//!
//! # Variables
//!
//! | Variable | Is |
//! |---|---|
//! | `CORE_DATABASE_URL`, `DATABASE_URL` | the database to use instead of an embedded one |
//! | `NEXUS_PG_BIN` | the folder of the PostgreSQL to run; nothing else is tried |
//! | `NEXUS_PG_DATA` | the folder for data |
//! | `NEXUS_PG_CACHE` | the folder for what was downloaded |
//! | `NEXUS_PG_OFFLINE` | forbids downloads, unless it is empty or `0` |
//!
//! # Sharing
//!
//! Every [`Server`] that names the same folder shares one PostgreSQL, across threads and processes:
//! the first one starts it, the others join it. It stops some time after the last [`Server`] was
//! dropped or its process ended, in whatever way: it is watched from outside, so `SIGKILL` leaves
//! nothing behind. Ctrl-C reaches your program and not the server. Containers cannot share a
//! server: they do not see each other's processes, and a second one is told so.
//!
//! # Root
//!
//! PostgreSQL refuses to run as root. When you are root it runs as the user `postgres`, else `nobody`.
//!
//! # Windows
//!
//! There is no embedded server: set `DATABASE_URL`. Everything else ends in [`Error::Unsupported`].

#![expect(clippy::doc_markdown, reason = "PostgreSQL is a name and not code")]

mod error;
mod options;
mod server;
mod source;

#[cfg(unix)]
mod account;
#[cfg(unix)]
mod cache;
#[cfg(unix)]
mod cluster;
#[cfg(unix)]
mod discovery;
#[cfg(all(unix, feature = "download"))]
mod download;
#[cfg(unix)]
mod place;
#[cfg(unix)]
mod process;
#[cfg(unix)]
mod watcher;

pub use error::{Error, NoDownload};
pub use options::Options;
pub use server::{DEFAULT_DATABASE, Server};
pub use source::{Source, programs, resolve};
