//! The server that tests run on, the template their databases are made from, and their end.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    path::Path,
    process::{Command, Stdio},
    str::FromStr,
    sync::{LazyLock, Mutex, PoisonError, mpsc},
};

use nexus_embedded::Source;
use sqlx::{ConnectOptions, Connection, postgres::PgConnectOptions};
use tokio::sync::OnceCell;

use super::{KIT, connect, execute};

/// Every database of the kit is called like this, and no other is touched.
const PREFIX: &str = "nexus_t_";

#[derive(Debug)]
pub(super) struct TestServer {
    source: Source,
    template: OnceCell<String>,
}

impl TestServer {
    /// The server, found or started once per process.
    pub(super) async fn get() -> &'static Self {
        static SERVER: OnceCell<TestServer> = OnceCell::const_new();
        SERVER
            .get_or_init(|| async {
                let resolve = || nexus_embedded::resolve(&nexus_embedded::Options::test());
                let source = tokio::task::spawn_blocking(resolve)
                    .await
                    .expect("looking for a server does not panic")
                    .unwrap_or_else(|error| panic!("tests need a PostgreSQL server: {error}"));
                let server = Self {
                    source,
                    template: OnceCell::new(),
                };
                if let Err(error) = execute(&server.admin_url(), "select 1").await {
                    panic!("{}", server.source.unusable(&error));
                }
                server.sweep().await;
                server
            })
            .await
    }

    /// The URL of one of the server's databases.
    pub(super) fn url(&self, database: &str) -> String {
        match &self.source {
            Source::Embedded(server) => server.url(database),
            source => {
                let options = PgConnectOptions::from_str(&source.url())
                    .expect("the URL has been connected to");
                // Written back with all that the URL held but the database.
                options.database(database).to_url_lossy().to_string()
            }
        }
    }

    fn admin_url(&self) -> String {
        match &self.source {
            Source::Embedded(server) => server.url("postgres"),
            source => source.url(),
        }
    }

    /// Runs a statement outside of every test's database.
    pub(super) async fn execute(&self, statement: &str) {
        if let Err(error) = execute(&self.admin_url(), statement).await {
            let code = error
                .as_database_error()
                .and_then(|error| error.code().map(String::from));
            if let Source::DatabaseUrl { variable, .. } = self.source {
                assert!(
                    code.as_deref() != Some("42501"),
                    "{}",
                    nexus_embedded::Error::MayNotCreateDatabases { variable }
                );
            }
            panic!("`{statement}` failed: {error}");
        }
    }

    /// A migrated database to copy, made once per server and schema.
    pub(super) async fn template(&self) -> &str {
        self.template
            .get_or_init(|| async {
                let mut hasher = DefaultHasher::new();
                (nexus_migrations::fingerprint(), KIT).hash(&mut hasher);
                let name = format!("{PREFIX}template_{:016x}", hasher.finish());
                let mut admin = connect(&self.admin_url())
                    .await
                    .expect("the server has been connected to");
                // One process makes it, the others wait.
                sqlx::query("select pg_advisory_lock(hashtextextended($1, 0))")
                    .bind(&name)
                    .execute(&mut admin)
                    .await
                    .expect("an advisory lock can be taken");
                let exists: bool = sqlx::query_scalar(
                    "select exists (select from pg_database where datname = $1)",
                )
                .bind(&name)
                .fetch_one(&mut admin)
                .await
                .expect("the catalog can be read");
                if !exists {
                    self.make_template(&name).await;
                }
                // Ends the lock as well.
                admin.close().await.expect("the connection can be closed");
                name
            })
            .await
    }

    async fn make_template(&self, name: &str) {
        // Under another name until it is complete, so that a half-made one is never used.
        let draft = format!("{}draft", own_prefix());
        self.execute(&format!("drop database if exists {draft} with (force)"))
            .await;
        self.execute(&format!("create database {draft}")).await;
        let url = self.url(&draft);
        let options =
            PgConnectOptions::from_str(&url).expect("the kit makes URLs that can be read");
        nexus_migrations::up(&options)
            .await
            .expect("the schema can be migrated");
        execute(&url, KIT)
            .await
            .expect("the kit's functions can be installed");
        self.execute(&format!("alter database {draft} rename to {name}"))
            .await;
    }

    /// Drops what tests of processes left behind that are no more.
    async fn sweep(&self) {
        let mut admin = connect(&self.admin_url())
            .await
            .expect("the server has been connected to");
        let machine = machine_prefix();
        let names: Vec<String> = sqlx::query_scalar(
            "select datname::text from pg_database where starts_with(datname, $1)",
        )
        .bind(&machine)
        .fetch_all(&mut admin)
        .await
        .expect("the catalog can be read");
        for name in names {
            let pid = name[machine.len()..].split('_').next().unwrap_or_default();
            let is_gone = pid.parse::<u32>().is_ok_and(|pid| !process_exists(pid));
            if is_gone {
                drop_later(name);
            }
        }
    }
}

/// The prefix of this process's databases. Databases of other machines and containers that use the
/// same server carry another one.
pub(super) fn own_prefix() -> String {
    format!("{}{}_", machine_prefix(), std::process::id())
}

fn machine_prefix() -> String {
    let mut hasher = DefaultHasher::new();
    machine().hash(&mut hasher);
    format!("{PREFIX}{:08x}_", hasher.finish() & 0xffff_ffff)
}

/// Where process ids mean the same as here: this machine, and on Linux this container, because
/// containers on one machine share its boot id and each count their processes from 1.
fn machine() -> &'static str {
    static MACHINE: LazyLock<String> = LazyLock::new(|| {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let processes = std::fs::read_link("/proc/self/ns/pid");
        if let (Ok(boot), Ok(processes)) = (boot, processes) {
            return format!("{boot}{}", processes.display());
        }
        let name = Command::new("uname").arg("-n").output();
        // As good as unique, so that what cannot be told apart is left alone.
        name.map_or_else(
            |_| std::process::id().to_string(),
            |name| String::from_utf8_lossy(&name.stdout).into_owned(),
        )
    });
    &MACHINE
}

fn process_exists(pid: u32) -> bool {
    if Path::new("/proc/self").exists() {
        Path::new(&format!("/proc/{pid}")).exists()
    } else {
        is_listed(pid)
    }
}

/// As [`process_exists`], for systems without /proc. `kill -0` would not do: it is refused for the
/// processes of others.
fn is_listed(pid: u32) -> bool {
    let ps = Command::new("ps")
        .args(["-p", &pid.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // Who cannot be asked about is kept.
    ps.map_or(true, |status| status.success())
}

/// Hands a database to a thread that drops it: dropping takes longer than most tests. What is left
/// when the process ends is swept by the next one.
pub(super) fn drop_later(name: String) {
    static JANITOR: Mutex<Option<mpsc::Sender<String>>> = Mutex::new(None);
    let mut janitor = JANITOR.lock().unwrap_or_else(PoisonError::into_inner);
    let sender = janitor.get_or_insert_with(|| {
        let (sender, receiver) = mpsc::channel::<String>();
        std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
            else {
                return;
            };
            runtime.block_on(async {
                let server = TestServer::get().await;
                for name in receiver {
                    // One that is in use, or gone already, is for the next sweep.
                    let _ = execute(
                        &server.admin_url(),
                        &format!("drop database if exists {name} with (force)"),
                    )
                    .await;
                }
            });
        });
        sender
    });
    // The thread ends only with the process.
    let _ = sender.send(name);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_that_are_no_more_are_told_from_those_that_run() {
        let own = std::process::id();
        assert!(process_exists(own) && is_listed(own));
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        assert!(!process_exists(child.id()));
        if Command::new("ps").output().is_ok() {
            assert!(!is_listed(child.id()));
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn another_container_on_this_machine_is_another_place() {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert!(machine().starts_with(&boot) && machine().len() > boot.len());
    }
}
