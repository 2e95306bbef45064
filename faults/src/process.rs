//! Processes of the app and of emitters.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
};

use crate::ledger::Ledger;

/// How a process is started.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    /// The URL of its database.
    pub(crate) url: String,
    /// What it logs is appended here.
    pub(crate) log: PathBuf,
    /// What it says is noted here.
    pub(crate) ledger: Ledger,
    /// Variables of its environment.
    pub(crate) environment: BTreeMap<String, String>,
}

/// A process that ends with us, in whatever way we end: it reads its standard input to the end.
pub(crate) struct Running {
    child: Child,
    pid: Pid,
    /// Kept apart: who waits for a child closes it.
    input: Option<ChildStdin>,
}

impl Running {
    /// Starts this program again with other arguments.
    pub(crate) fn start(arguments: &[String], start: &Start) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(&start.log)?;
        let mut command = Command::new(std::env::current_exe()?);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if ["PG", "CORE_", "DATABASE_URL"]
                .iter()
                .any(|start| name.starts_with(start))
            {
                command.env_remove(name);
            }
        }
        let mut child = command
            .args(arguments)
            .env("CORE_DATABASE_URL", &start.url)
            .envs(&start.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C is for us.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("could not start a process of the app")?;
        let pid = child
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()))
            .context("the process has no id")?;
        let said = child.stdout.take().context("its output is piped")?;
        let ledger = start.ledger.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(said).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                ledger.read(&line);
            }
        });
        let input = child.stdin.take();
        Ok(Self { child, pid, input })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal, if the process lives.
    pub(crate) fn signal(&mut self, signal: Signal) {
        // Until it has been waited for its id is its own.
        if self.is_running() {
            let _ = kill_process(self.pid, signal);
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end; kills it when that takes too long, and says so.
    pub(crate) async fn end(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        if let Ok(status) = tokio::time::timeout(patience, self.child.wait()).await {
            return Ok(status?);
        }
        self.child.kill().await?;
        anyhow::bail!("a process did not end within {patience:?} and was killed")
    }

    /// Closes its standard input, which ends an emitter gently.
    pub(crate) fn close_input(&mut self) {
        drop(self.input.take());
    }
}

/// The text of a log.
pub(crate) fn read_log(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}
