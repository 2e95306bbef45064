//! Processes, told apart even when the system hands out a pid a second time.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use crate::Error;

/// A process that was alive when this was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// When it started, in the system's own notation, without blanks. `watcher.sh` forms the same.
    pub(crate) started: String,
}

impl Process {
    /// The process with this pid, unless it is dead or a zombie.
    pub(crate) fn find(pid: u32) -> Option<Self> {
        let started = if has_proc() {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The second field is a name in parentheses, which may itself hold some.
            let (_, fields) = stat.rsplit_once(") ")?;
            let mut fields = fields.split_whitespace();
            match fields.next()? {
                "Z" | "X" => return None,
                _ => fields.nth(18)?.to_owned(), // field 22 of the whole line
            }
        } else {
            let line = ps(pid, &["-o", "stat=", "-o", "lstart="])?;
            let (state, started) = line.trim().split_once(char::is_whitespace)?;
            if state.starts_with('Z') {
                return None;
            }
            started.split_whitespace().collect::<Vec<_>>().join("_")
        };
        Some(Self { pid, started })
    }

    pub(crate) fn is_alive(&self) -> bool {
        Self::find(self.pid).is_some_and(|process| process == *self)
    }

    /// Whether this is a server on this data folder: that is its current folder.
    pub(crate) fn serves(&self, data: &Path) -> bool {
        if !has_proc() {
            let line = ps(self.pid, &["-o", "command="]);
            return line.is_some_and(|line| line.contains(&*data.to_string_lossy()));
        }
        let folder = format!("/proc/{}", self.pid);
        match fs::read_link(format!("{folder}/cwd")) {
            Ok(current) => current == data,
            // Root of a container may not look, but anybody may see how a program was called.
            Err(_) => fs::read(format!("{folder}/cmdline")).is_ok_and(|line| {
                let data = data.as_os_str().as_encoded_bytes();
                line.split(|&byte| byte == 0)
                    .any(|argument| argument == data)
            }),
        }
    }

    /// Asks a server for a fast shutdown.
    pub(crate) fn interrupt(&self) {
        // The shell's own `kill`, because a small system may have no other. When it fails the
        // process is gone, which whoever waits for that sees.
        let _ = Command::new("/bin/sh")
            .args(["-c", "kill -INT \"$0\"", &self.pid.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn has_proc() -> bool {
    Path::new("/proc/self/stat").exists()
}

fn ps(pid: u32, columns: &[&str]) -> Option<String> {
    let output = Command::new("ps")
        // Every process must get the same answer, wherever its user thinks it is.
        .envs([("LC_ALL", "C"), ("TZ", "UTC0")])
        .args(columns)
        .args(["-ww", "-p", &pid.to_string()])
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let line = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!line.is_empty()).then_some(line)
}

/// Collects the exit status whenever `child` ends, so that it does not stay a zombie for as long
/// as this process runs.
pub(crate) fn reap(mut child: Child) -> Result<(), Error> {
    thread::Builder::new()
        .name("nexus-embedded-reaper".to_owned())
        .spawn(move || child.wait())
        .map(drop)
        .map_err(Error::io("start a thread"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_too() {
        let own = Process::find(std::process::id()).expect("this process is alive");
        assert!(own.is_alive());
        let other = Process {
            started: "1".to_owned(),
            ..own
        };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_zombie_is_not_alive() {
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read line"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("there is a shell");
        let process = Process::find(child.id()).expect("it waits for a line");
        drop(child.stdin.take());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while process.is_alive() {
            assert!(
                std::time::Instant::now() < deadline,
                "{process:?} should be a zombie"
            );
            thread::sleep(std::time::Duration::from_millis(1));
        }
        child.wait().expect("it was not waited for before");
    }
}
