//! Folders, processes and queries for the tests. No test leaves a server behind.

#![allow(dead_code, reason = "each test program uses a part of this")]
#![allow(clippy::doc_markdown, reason = "PostgreSQL is a name and not code")]

#[cfg(feature = "download")]
pub(crate) mod github;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nexus_embedded::{Error, Options, Server, Source, resolve};
use tempfile::TempDir;

/// Long enough for a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_mins(1);
/// Short enough for a test to see a server stop.
pub(crate) const GRACE: Duration = Duration::from_millis(200);

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "this never came true: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn is_root() -> bool {
    let file = tempfile::tempfile().expect("a file for a test");
    file.metadata().expect("it has an owner").uid() == 0
}

/// Whether the process runs; a zombie does not.
pub(crate) fn is_alive(pid: u32) -> bool {
    let output = Command::new("ps")
        .args(["-o", "stat=", "-p", &pid.to_string()])
        .output();
    let state = String::from_utf8(output.expect("ps is installed").stdout).expect("letters");
    !state.trim().is_empty() && !state.trim().starts_with('Z')
}

/// A data folder of its own for a test. Dropping it waits for its server to stop.
pub(crate) struct Folder {
    folder: TempDir,
}

impl Folder {
    pub(crate) fn new() -> Self {
        // In memory where possible: these tests create many clusters.
        let parent = Some(PathBuf::from("/dev/shm")).filter(|folder| folder.is_dir());
        let folder = tempfile::Builder::new()
            .prefix("nx")
            .permissions(fs::Permissions::from_mode(0o755))
            .tempdir_in(parent.unwrap_or_else(std::env::temp_dir))
            .expect("a folder for a test");
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The only cluster below this folder.
    pub(crate) fn cluster(&self) -> PathBuf {
        let is_cluster = |path: &PathBuf| path.join("users").exists();
        let mut clusters = fs::read_dir(self.path())
            .expect("it exists")
            .flatten()
            .map(|entry| entry.path());
        clusters.find(is_cluster).expect("there is a cluster")
    }

    pub(crate) fn options(&self) -> Options {
        Options::test().data_folder(self.path()).grace(GRACE)
    }

    pub(crate) fn start(&self) -> Server {
        Server::start(&self.options()).expect("the server starts")
    }

    pub(crate) fn users(&self) -> usize {
        fs::read_dir(self.cluster().join("users"))
            .expect("it exists")
            .count()
    }

    /// The pid of the server that runs on this folder.
    pub(crate) fn server(&self) -> Option<u32> {
        let mut clusters = fs::read_dir(self.path())
            .ok()?
            .flatten()
            .map(|entry| entry.path());
        clusters.find_map(|cluster| {
            let text = fs::read_to_string(cluster.join("data/postmaster.pid")).ok()?;
            text.lines()
                .next()?
                .trim()
                .parse()
                .ok()
                .filter(|pid| is_alive(*pid))
        })
    }

    pub(crate) fn watcher(&self) -> u32 {
        let text = fs::read_to_string(self.cluster().join("watcher")).expect("there is a watcher");
        text.split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())
            .expect("it starts with the pid")
    }

    /// Kills the watcher, which only this test uses.
    pub(crate) fn kill_watcher(&self) {
        let pid = self.watcher();
        kill(pid);
        eventually("the watcher is dead", || !is_alive(pid));
    }

    pub(crate) fn wait_until_stopped(&self) {
        eventually("the server has stopped", || self.server().is_none());
    }

    /// Waits until the watcher has looked at the users once more.
    pub(crate) fn wait_for_a_look(&self) {
        let dead = self.cluster().join("users/999999999-1-0");
        fs::write(&dead, "").expect("an entry");
        eventually("the watcher removes a dead entry", || !dead.exists());
    }

    /// What a process started by the test needs to use this folder.
    pub(crate) fn other_process(&self) -> Command {
        let mut command = other_process();
        command.env("NEXUS_PG_DATA", self.path());
        command
    }

    /// A folder with programs that do `first` before, or instead of, what PostgreSQL's do.
    pub(crate) fn programs(&self, name: &str, first: &str) -> PathBuf {
        let folder = self.path().join(format!("bin-{name}"));
        fs::create_dir(&folder).expect("a folder for a test");
        let real = real_binaries();
        for program in ["initdb", "postgres"] {
            let path = folder.join(program);
            let script = if program == name { first } else { "" };
            let real = real.join(program);
            let script = format!("#!/bin/sh\n{script}\nexec '{}' \"$@\"", real.display());
            make_program("printf '%s\\n' \"$1\"", script.as_ref(), &path);
        }
        folder
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.server().is_some() {
            if Instant::now() > deadline {
                eprintln!("the server in {} does not stop", self.path().display());
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The folder of the PostgreSQL these tests run with.
pub(crate) fn real_binaries() -> &'static Path {
    &real().0
}

/// Its major version.
pub(crate) fn real_major() -> u32 {
    real().1
}

fn real() -> &'static (PathBuf, u32) {
    static REAL: OnceLock<(PathBuf, u32)> = OnceLock::new();
    REAL.get_or_init(|| {
        let folder = Folder::new();
        let server = folder.start();
        (server.binaries().to_owned(), server.major())
    })
}

/// Makes a program of what the shell command `print` prints for `argument`.
///
/// Not in this process: a child that another test starts at the wrong moment would have the file
/// open for writing, and a program that is open for writing cannot be run.
pub(crate) fn make_program(print: &str, argument: &OsStr, path: &Path) {
    let status = Command::new("/bin/sh")
        .arg("-c")
        .arg(format!("{print} >\"$0\" && chmod 755 \"$0\""))
        .arg(path)
        .arg(argument)
        .status();
    assert!(status.expect("there is a shell").success());
}

/// Kills a process that the test started.
pub(crate) fn kill(pid: u32) {
    Command::new("/bin/sh")
        .args(["-c", "kill -9 $0", &pid.to_string()])
        .status()
        .expect("there is a shell");
}

/// The answer of a query that returns one value.
pub(crate) fn query(server: &Server, statement: &str) -> String {
    let url = server.url("nexus");
    let psql = server.binaries().join("psql");
    let psql = if psql.exists() {
        psql
    } else {
        PathBuf::from("psql")
    };
    let output = Command::new(psql)
        .args(["-XAtq", "-c", statement, &url])
        // None of these may matter.
        .envs([
            ("PGPORT", "1"),
            ("PGHOST", "nowhere.invalid"),
            ("PGSSLMODE", "require"),
            ("PGUSER", "nobody"),
        ])
        .output()
        .expect("psql is installed");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .expect("text")
        .trim()
        .to_owned()
}

/// This test program, asked to play another process; see [`plays_another_process`].
pub(crate) fn other_process() -> Command {
    other_process_in(std::env::current_exe().expect("this is a program"))
}

pub(crate) fn other_process_in(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command
        .args([
            "--exact",
            "support::plays_another_process",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("NEXUS_TEST_PROCESS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    for name in [
        "DATABASE_URL",
        "CORE_DATABASE_URL",
        "NEXUS_PG_BIN",
        "NEXUS_PG_CACHE",
        "NEXUS_PG_DATA",
        "NEXUS_PG_OFFLINE",
    ] {
        command.env_remove(name);
    }
    command
}

/// The same process, started by way of `wrapper`, whose last arguments are a program and its own.
pub(crate) fn wrapped(wrapper: &[&str], process: &Command) -> Command {
    let mut command = Command::new(wrapper[0]);
    command
        .args(&wrapper[1..])
        .arg(process.get_program())
        .args(process.get_args())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    for (name, value) in process.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Whether this system lets the tests run something by way of `wrapper`.
pub(crate) fn may(wrapper: &[&str]) -> bool {
    wrapped(wrapper, &Command::new("true"))
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A process that holds a database until it is told to end, or is killed.
pub(crate) struct Other {
    pub(crate) child: Child,
    /// What it said about its database, on one line.
    pub(crate) said: String,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

/// Starts it and waits until it has a database or an error.
pub(crate) fn spawn(mut command: Command) -> Other {
    let mut child = command.spawn().expect("it starts");
    let stdin = child.stdin.take();
    let mut stdout = BufReader::new(child.stdout.take().expect("it is a pipe"));
    let mut line = String::new();
    let said = loop {
        line.clear();
        assert_ne!(
            stdout.read_line(&mut line).expect("text"),
            0,
            "it ended without a word"
        );
        if let Some(said) = line.trim_end().strip_prefix('@') {
            break said.to_owned();
        }
    };
    Other {
        child,
        said,
        stdin,
        stdout,
    }
}

impl Other {
    /// Lets go of the database, ends, and reads whatever was written to the end.
    pub(crate) fn end(mut self) -> String {
        drop(self.stdin.take());
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("text");
        assert!(self.child.wait().expect("it ends").success());
        self.said
    }
}

/// Not a test, but the other process of tests: resolves a database as its environment says, prints
/// a line about it, and holds it until its input ends.
#[test]
fn plays_another_process() {
    if std::env::var_os("NEXUS_TEST_PROCESS").is_none() {
        return;
    }
    let options = match std::env::var("NEXUS_TEST_PROFILE").as_deref() {
        Ok("dev") => Options::dev(),
        _ => Options::test(),
    };
    let mut options = options.grace(GRACE);
    if let Ok(folders) = std::env::var("NEXUS_TEST_SEARCH_IN") {
        options = options.search_in(folders.split_terminator(':'));
    }
    if let Ok(major) = std::env::var("NEXUS_TEST_MAJOR") {
        options = options.download_major(major.parse().expect("a major version"));
    }
    let source = if std::env::var_os("NEXUS_TEST_RUNTIME").is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime
            .expect("a runtime")
            .block_on(async { resolve(&options) })
    } else {
        resolve(&options)
    };
    let said = match &source {
        Ok(Source::Embedded(server)) => {
            let how = if server.was_started() {
                "started"
            } else {
                "joined"
            };
            format!(
                "{how} {} {}",
                server.url("nexus"),
                server.data_folder().display()
            )
        }
        Ok(source) => format!("{source} {}", source.url()),
        Err(error) => explain(error),
    };
    // The test harness may have begun a line.
    println!("\n@{}", said.replace('\n', "|"));
    std::io::stdout().flush().expect("somebody listens");
    std::io::stdin()
        .read_to_end(&mut Vec::new())
        .expect("somebody speaks");
}

fn explain(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("failed {error}: {source}"),
        None => format!("failed {error}"),
    }
}
