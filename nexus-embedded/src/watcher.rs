//! What stops the server: a shell script that outlives every user, because users get killed.
//!
//! A user writes its entry and then looks for the mark `stopping`. The watcher writes the mark and
//! then looks for entries. So whichever comes second sees the other: the watcher steps back when
//! there is an entry, and a user that meets the mark waits until it is gone. The mark stays until
//! the server is gone, and users come one at a time, under the cluster's lock. When a watcher dies
//! the next user clears up behind it and starts another.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use crate::Error;
use crate::account;
use crate::place::Place;
use crate::process::{Process, reap};
use crate::server::Registration;

const SCRIPT: &str = include_str!("watcher.sh");
const FIRST_LOOK: Duration = Duration::from_secs(30);
const LONGEST_STOP: Duration = Duration::from_mins(2);

/// Starts a watcher for `server`, unless it has one.
pub(crate) fn ensure(place: &Place, server: &Process, grace: Duration) -> Result<(), Error> {
    if current(place).is_some_and(|(_, watched)| watched == *server) {
        return Ok(());
    }
    let pause = (grace / 4).clamp(Duration::from_millis(50), Duration::from_millis(500));
    let patience = grace.as_millis().div_ceil(pause.as_millis());
    let shell = Path::new("/bin/sh");
    // As this user, not the server's: it must see and signal the server, and remove entries.
    let child = account::command(shell, None)
        .args(["-c", SCRIPT, "nexus-embedded-watcher"])
        .arg(place.folder())
        .args([&server.pid.to_string(), &server.started])
        .args([
            &format!("{:.3}", pause.as_secs_f64()),
            &patience.to_string(),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // Ctrl-C in a terminal goes to a whole group.
        .process_group(0)
        .spawn()
        .map_err(|source| account::call_failed(shell, None, source))?;
    let pid = child.id();
    reap(child)?;

    // Until it says so the next user would take it for missing.
    let deadline = Instant::now() + FIRST_LOOK;
    while Instant::now() < deadline {
        if current(place).is_some_and(|(watcher, _)| watcher.pid == pid) || !server.is_alive() {
            return Ok(());
        }
        if Process::find(pid).is_none() {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    // Without one the server would run for ever.
    server.interrupt();
    Err(Error::Busy {
        folder: place.data(),
        reason: format!(
            "a server whose watcher (pid {pid}) does not come up; it was asked to stop"
        ),
    })
}

/// Waits for a stop that has begun, and ends one whose watcher died; `own` is the caller's entry.
pub(crate) fn settle(
    place: &Place,
    own: &Registration,
    running: impl Fn() -> Option<Process>,
) -> Result<(), Error> {
    let deadline = Instant::now() + LONGEST_STOP;
    let mut asked = false;
    while place.stopping().exists() {
        if current(place).is_none() {
            // The dead watcher signalled the server only if it found no entry after writing the
            // mark, and an entry made since then is ours: others wait for the lock.
            match running().filter(|_| !has_other_users(place, own)) {
                Some(server) if !asked => {
                    server.interrupt();
                    asked = true;
                }
                Some(_) => {}
                None => remove_mark(place)?,
            }
        }
        if Instant::now() > deadline {
            return Err(Error::Busy {
                folder: place.data(),
                reason: "a server that was told to stop and does not".to_owned(),
            });
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn remove_mark(place: &Place) -> Result<(), Error> {
    match fs::remove_file(place.stopping()) {
        // The watcher ended in the right order after all: first the mark, then itself.
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            attempt: format!("remove {}", place.stopping().display()),
            source,
        }),
        _ => Ok(()),
    }
}

/// The watcher that is alive, and the server it watches.
fn current(place: &Place) -> Option<(Process, Process)> {
    let line = fs::read_to_string(place.watcher()).ok()?;
    let mut fields = line.split_whitespace();
    let mut process = || {
        let pid = fields.next()?.parse().ok()?;
        Some(Process {
            pid,
            started: fields.next()?.to_owned(),
        })
    };
    let (watcher, server) = (process()?, process()?);
    watcher.is_alive().then_some((watcher, server))
}

fn has_other_users(place: &Place, own: &Registration) -> bool {
    let Ok(entries) = fs::read_dir(place.users()) else {
        return false;
    };
    entries
        .flatten()
        .filter(|entry| entry.path() != own.0)
        .any(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let parts = name
                .split_once('-')
                .and_then(|(pid, rest)| Some((pid, rest.rsplit_once('-')?.0)));
            parts.is_some_and(|(pid, started)| {
                pid.parse().is_ok_and(|pid| {
                    Process {
                        pid,
                        started: started.to_owned(),
                    }
                    .is_alive()
                })
            })
        })
}
