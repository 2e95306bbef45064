//! A Postgres of the suite's own, as durable as it is by default, which can be stopped and restarted.

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection as _, PgConnection, PgPool, postgres::PgPoolOptions};
use tempfile::TempDir;

use crate::mount::Mount;

/// The role of the app and its emitters, which is no superuser.
pub(crate) const ROLE: &str = "faults";

/// How long a server may take to start: crash recovery on a busy disk.
const LONGEST_START: Duration = Duration::from_mins(2);

/// The user that the server runs as; Postgres refuses to run as root.
#[derive(Debug, Clone, Copy)]
struct Account {
    uid: u32,
    gid: u32,
}

pub(crate) struct Cluster {
    programs: PathBuf,
    account: Option<Account>,
    data: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    postmaster: Option<Postmaster>,
    // Dropped in this order: the server has ended by then.
    mount: Option<Mount>,
    _folder: TempDir,
}

/// The server's first process, our child, and one that ends it should we be killed.
struct Postmaster {
    child: Child,
    heir: Child,
}

impl Cluster {
    /// Makes a cluster and starts it.
    pub(crate) async fn start() -> anyhow::Result<Self> {
        Self::make(None).await
    }

    /// The same on a file system of so many bytes; `None` where none can be mounted, with the reason.
    pub(crate) async fn start_on(bytes: u64) -> anyhow::Result<Result<Self, String>> {
        match Mount::new(bytes) {
            Ok(mount) => Self::make(Some(mount)).await.map(Ok),
            Err(reason) => Ok(Err(reason)),
        }
    }

    async fn make(mount: Option<Mount>) -> anyhow::Result<Self> {
        let programs = nexus_embedded::programs(&nexus_embedded::Options::dev())?;
        let account = account()?;
        // On a real disk, which memory is not: what is lost when a server is killed must show.
        let folder = tempfile::Builder::new()
            .prefix("nexus-faults.")
            .tempdir_in("/var/tmp")?;
        let data = mount
            .as_ref()
            .map_or_else(|| folder.path().to_owned(), |mount| mount.path().to_owned())
            .join("data");
        let socket = folder.path().join("socket");
        fs::create_dir(&socket)?;
        fs::create_dir(&data)?;
        if let Some(account) = account {
            for path in [folder.path(), &socket, &data] {
                chown(path, Some(account.uid), Some(account.gid))?;
            }
        }
        let mut cluster = Self {
            log: folder.path().join("log"),
            programs,
            account,
            data,
            socket,
            postmaster: None,
            mount,
            _folder: folder,
        };
        cluster.initialize()?;
        cluster.run().await?;
        let mut admin = cluster.admin("postgres").await?;
        sqlx::raw_sql("create role faults login")
            .execute(&mut admin)
            .await?;
        Ok(cluster)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        command
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null());
        if let Some(account) = self.account {
            command.uid(account.uid).gid(account.gid);
        }
        command
    }

    fn initialize(&self) -> anyhow::Result<()> {
        // The socket's folder is closed to others.
        let output = self
            .command("initdb")
            .args([
                "-U",
                "admin",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--data-checksums",
            ])
            .arg("-D")
            .arg(&self.data)
            .output()
            .context("could not run initdb")?;
        ensure!(
            output.status.success(),
            "initdb failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let mut settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{}'\nmax_connections = 700\ntimezone = 'UTC'\n",
            self.socket.display()
        );
        if self.mount.is_some() {
            settings.push_str("min_wal_size = 32MB\nmax_wal_size = 48MB\n");
        }
        let conf = self.data.join("postgresql.conf");
        let text = fs::read_to_string(&conf)? + &settings;
        fs::write(&conf, text)?;
        let closed = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o700);
        fs::set_permissions(&self.socket, closed)?;
        Ok(())
    }

    /// Starts the server and waits until it takes connections. Returns how long that took.
    pub(crate) async fn run(&mut self) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        loop {
            if self.postmaster.is_none() {
                self.launch()?;
            }
            if self.admin("postgres").await.is_ok() {
                return Ok(begun.elapsed());
            }
            if !self.is_running() {
                self.postmaster = None;
            }
            if begun.elapsed() > LONGEST_START {
                bail!("the server does not start: {}", self.last_words());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn launch(&mut self) -> anyhow::Result<()> {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let child = self
            .command("postgres")
            .arg("-D")
            .arg(&self.data)
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for us.
            .process_group(0)
            .spawn()
            .context("could not run postgres")?;
        // Reads until we are gone, in whatever way, and then ends the server.
        let heir = Command::new("/bin/sh")
            .args([
                "-c",
                "read -r line; kill -QUIT \"$1\"; kill -CONT \"$1\"",
                "heir",
            ])
            .arg(child.id().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        self.postmaster = Some(Postmaster { child, heir });
        Ok(())
    }

    /// Whether the server's first process lives.
    pub(crate) fn is_running(&mut self) -> bool {
        let Some(postmaster) = &mut self.postmaster else {
            return false;
        };
        !matches!(postmaster.child.try_wait(), Ok(Some(_)))
    }

    /// Sends a signal to every process of the server.
    pub(crate) fn signal_all(&self, signal: Signal) {
        let Some(postmaster) = &self.postmaster else {
            return;
        };
        let first = postmaster.child.id();
        let is_child = |process: &u32| parent_of(*process) == Some(first);
        let processes = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(is_child);
        for process in std::iter::once(first).chain(processes) {
            if let Some(pid) = Pid::from_raw(process.cast_signed()) {
                let _ = kill_process(pid, signal);
            }
        }
    }

    /// Stops the server in immediate mode: every process quits without writing anything more.
    pub(crate) fn stop_at_once(&mut self) {
        self.postmaster = None;
    }

    /// How to reach a database, for the app.
    pub(crate) fn url(&self, database: &str) -> String {
        let socket = self.socket.display();
        format!("postgres://{ROLE}@localhost:5432/{database}?host={socket}&sslmode=disable")
    }

    /// The server's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.join(".s.PGSQL.5432")
    }

    fn admin_options(&self, database: &str) -> sqlx::postgres::PgConnectOptions {
        sqlx::postgres::PgConnectOptions::new_without_pgpass()
            .socket(&self.socket)
            .port(5432)
            .username("admin")
            .database(database)
            .ssl_mode(sqlx::postgres::PgSslMode::Disable)
            .application_name("nexus-faults")
    }

    pub(crate) async fn admin(&self, database: &str) -> sqlx::Result<PgConnection> {
        PgConnection::connect_with(&self.admin_options(database)).await
    }

    /// The suite's own look into a database.
    pub(crate) fn pool(&self, database: &str) -> PgPool {
        PgPoolOptions::new()
            .max_connections(3)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy_with(self.admin_options(database))
    }

    /// Makes an empty database of the app's role.
    pub(crate) async fn create_database(&self, name: &str) -> anyhow::Result<()> {
        let mut admin = self.admin("postgres").await?;
        let text = format!("create database {name} owner {ROLE}");
        sqlx::raw_sql(sqlx::AssertSqlSafe(text))
            .execute(&mut admin)
            .await?;
        admin.close().await?;
        Ok(())
    }

    /// Removes a database, if it is there: files that nobody needs make a crash recovery longer.
    pub(crate) async fn drop_database(&self, name: &str) -> anyhow::Result<()> {
        let mut admin = self.admin("postgres").await?;
        let text = format!("drop database if exists {name} with (force)");
        sqlx::raw_sql(sqlx::AssertSqlSafe(text))
            .execute(&mut admin)
            .await?;
        admin.close().await?;
        Ok(())
    }

    /// The mounted file system, if the cluster has one of its own.
    pub(crate) fn mount(&self) -> Option<&Path> {
        self.mount.as_ref().map(Mount::path)
    }

    /// What the server has logged.
    pub(crate) fn log(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// Reads every page, which has a checksum, and compares every table with its indexes: what was damaged is
    /// an error.
    pub(crate) fn check(&self, database: &str) -> anyhow::Result<()> {
        let output = self
            .command("pg_amcheck")
            .arg("--install-missing")
            .args(["--heapallindexed", "--no-strict-names", "-U", "admin", "-h"])
            .arg(&self.socket)
            .arg("-d")
            .arg(database)
            .output()
            .context("could not run pg_amcheck")?;
        ensure!(
            output.status.success(),
            "pg_amcheck found damage: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}

impl Drop for Postmaster {
    fn drop(&mut self) {
        // First the one that would end the server: its pid may be another process' by then.
        let _ = self.heir.kill();
        let _ = self.heir.wait();
        if matches!(self.child.try_wait(), Ok(None))
            && let Some(pid) = Pid::from_raw(self.child.id().cast_signed())
        {
            let _ = kill_process(pid, Signal::QUIT);
            // It may be frozen, by a fault that was interrupted.
            let _ = kill_process(pid, Signal::CONT);
        }
        let _ = self.child.wait();
    }
}

fn parent_of(process: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

/// `None` if the server can run as this user.
fn account() -> anyhow::Result<Option<Account>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let ask = |what: &str, user: &str| -> Option<u32> {
        let output = Command::new("id").args([what, user]).output().ok()?;
        String::from_utf8_lossy(&output.stdout).trim().parse().ok()
    };
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|user| {
            Some(Account {
                uid: ask("-u", user)?,
                gid: ask("-g", user)?,
            })
        })
        .map(Some)
        .context(
            "running as root, and there is no user `postgres` or `nobody` to run PostgreSQL as",
        )
}
