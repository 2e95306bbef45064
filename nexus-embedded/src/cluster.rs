//! Creating, starting and joining a cluster.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::account;
use crate::discovery::{self, Binaries};
use crate::options::Profile;
use crate::place::{Place, remove_all};
use crate::process::{Process, reap};
use crate::server::{DEFAULT_DATABASE, Registration, Server};
use crate::watcher;
use crate::{Error, Options};

/// Longer than a recovery after a crash takes on a slow disk.
const LONGEST_START: Duration = Duration::from_mins(2);
const PAUSE: Duration = Duration::from_millis(5);

/// Lines of a log that go into an error.
const LAST_LINES: usize = 8;

pub(crate) fn open(options: &Options) -> Result<Server, Error> {
    let binaries = discovery::find(options)?;
    let mut place = Place::locate(options, binaries.major)?;
    let lock = place.lock()?;
    let registration = register(&place)?;
    watcher::settle(&place, &registration, || {
        postmaster(&place).map(|(process, _)| process)
    })?;

    let mut started = false;
    loop {
        match state(&place)? {
            State::Running(server) => {
                watcher::ensure(&place, &server, options.grace)?;
                if is_ready(&place, &server)? {
                    break;
                }
                // It ended before it was ready: start over.
            }
            State::Stopped(log) => {
                start(&place, &binaries, options, log)?;
                started = true;
                break;
            }
        }
    }
    drop(lock);
    Ok(Server {
        binaries: binaries.folder,
        major: binaries.major,
        data: place.data(),
        log: place.log(),
        socket: place.socket,
        started,
        _registration: registration,
    })
}

pub(crate) fn open_made(options: &Options) -> Result<Option<Server>, Error> {
    let binaries = discovery::find(options)?;
    if !Place::is_made(options, binaries.major)? {
        return Ok(None);
    }
    open(options).map(Some)
}

/// Tells the watcher that this process uses the server. The name says it all, so that it is
/// complete at once and cannot be mistaken for that of a later process with the same pid.
fn register(place: &Place) -> Result<Registration, Error> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let own = Process::find(std::process::id()).ok_or_else(|| Error::Io {
        attempt: "find out when this process started".to_owned(),
        source: io::Error::new(io::ErrorKind::NotFound, "no /proc and no `ps`"),
    })?;
    let path = place
        .users()
        .join(format!("{}-{}-{n}", own.pid, own.started));
    File::create(&path).map_err(Error::io(format!("create {}", path.display())))?;
    Ok(Registration(path))
}

enum State {
    /// Starting up or ready.
    Running(Process),
    /// The log, locked: no process of an earlier server is left.
    Stopped(File),
}

/// Finds out whether a server runs. Ends the effects of one that was killed.
fn state(place: &Place) -> Result<State, Error> {
    let log = place.open_log()?;
    let deadline = Instant::now() + LONGEST_START;
    loop {
        match postmaster(place) {
            Some((server, status)) if status.as_deref() != Some("stopping") => {
                return Ok(State::Running(server));
            }
            Some(_) => {}
            // Every process of a server inherits the lock on its log. So this also holds for
            // processes that survive a killed postmaster, and for a server in another container,
            // whose pid means nothing here. While any of them lives, a new server would destroy data.
            None => match log.try_lock() {
                Ok(()) => {
                    remove_stale(place)?;
                    return Ok(State::Stopped(log));
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => {
                    return Err(Error::Io {
                        attempt: format!("lock {}", place.log().display()),
                        source,
                    });
                }
            },
        }
        if Instant::now() > deadline {
            return Err(Error::Busy {
                folder: place.data(),
                reason: "processes of an earlier server, or a server in another container"
                    .to_owned(),
            });
        }
        thread::sleep(PAUSE);
    }
}

/// Removes the lock files of a server that was killed.
///
/// PostgreSQL would do so itself, but takes a pid that was given to another process of this user,
/// or that belongs to a zombie, for a running server.
fn remove_stale(place: &Place) -> Result<(), Error> {
    let files = [
        place.data().join("postmaster.pid"),
        place.socket.join(".s.PGSQL.5432"),
        place.socket.join(".s.PGSQL.5432.lock"),
    ];
    for file in files {
        match fs::remove_file(&file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Io {
                    attempt: format!("remove {}", file.display()),
                    source,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// The server on our data folder, and its status if it has one already: `starting`, `ready`, `stopping`.
fn postmaster(place: &Place) -> Option<(Process, Option<String>)> {
    let data = place.data();
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    let mut lines = text.lines();
    let process = Process::find(lines.next()?.trim().parse().ok()?)?;
    if !process.serves(&data) {
        return None;
    }
    // Line 8 of postmaster.pid, since PostgreSQL 10.
    Some((process, lines.nth(6).map(|status| status.trim().to_owned())))
}

/// Waits until a server that is not our child accepts connections; `false` if it ended instead.
fn is_ready(place: &Place, server: &Process) -> Result<bool, Error> {
    let deadline = Instant::now() + LONGEST_START;
    loop {
        match postmaster(place) {
            Some((process, status)) if process == *server => {
                if status.as_deref() == Some("ready") {
                    return Ok(true);
                }
            }
            _ => return Ok(false),
        }
        if Instant::now() > deadline {
            return Err(not_ready(place));
        }
        thread::sleep(PAUSE);
    }
}

fn not_ready(place: &Place) -> Error {
    Error::NotReady {
        seconds: LONGEST_START.as_secs(),
        lines: last_lines(&place.log()),
        log: place.log(),
    }
}

/// Starts a server, on a new cluster if there is none.
fn start(place: &Place, binaries: &Binaries, options: &Options, log: File) -> Result<(), Error> {
    let data = place.data();
    if let Some(account) = &place.account {
        for folder in [
            place.folder(),
            place.socket.parent().unwrap_or(place.folder()),
        ] {
            if let Some(folder) = account::first_closed(folder, account)? {
                return Err(Error::CannotEnter {
                    user: account.name.clone(),
                    folder,
                });
            }
        }
        if let Some(path) = account::first_closed(&binaries.folder.join("postgres"), account)? {
            return Err(Error::CannotRun {
                user: account.name.clone(),
                path,
            });
        }
    }
    place.empty_folder(&place.socket)?;

    let existed = data.join("PG_VERSION").exists();
    if existed {
        let version = fs::read_to_string(data.join("PG_VERSION")).map_err(Error::io(format!(
            "read {}",
            data.join("PG_VERSION").display()
        )))?;
        let made_by = version.trim().to_owned();
        if made_by != binaries.major.to_string() {
            return Err(Error::OtherMajor {
                folder: data,
                made_by,
                found: binaries.major,
            });
        }
    } else {
        create(place, binaries, options.profile)?;
    }

    let second_log = log.try_clone().map_err(Error::io("open the log twice"))?;
    match launch(place, binaries, options, log) {
        // Without fsync a crash of the machine leaves anything. These data are made to be lost.
        Err(Error::Exited { .. }) if existed && options.profile == Profile::Test => {
            create(place, binaries, options.profile)?;
            launch(place, binaries, options, second_log)
        }
        result => result,
    }
}

/// Creates the cluster beside its final place, so that it appears there complete or not at all.
fn create(place: &Place, binaries: &Binaries, profile: Profile) -> Result<(), Error> {
    place.remove_unfinished()?;
    // An `initdb` whose caller was killed may go on writing; it must not write into this one.
    let unfinished = place
        .folder()
        .join(format!("data.new-{}", std::process::id()));
    place.empty_folder(&unfinished)?;
    let result = fill(place, binaries, profile, &unfinished).and_then(|()| {
        let data = place.data();
        if profile == Profile::Test {
            remove_all(&data)?;
        }
        // This fails when there is something that is no cluster: not ours to delete.
        let attempt = format!("rename {} to {}", unfinished.display(), data.display());
        fs::rename(&unfinished, &data).map_err(Error::io(attempt))
    });
    if result.is_err() {
        // The first error counts; leftovers are removed by whoever tries next.
        let _ = remove_all(&unfinished);
    }
    result
}

fn fill(place: &Place, binaries: &Binaries, profile: Profile, data: &Path) -> Result<(), Error> {
    let program = binaries.folder.join("initdb");
    let mut command = account::command(&program, place.account.as_ref());
    command.arg("-D").arg(data);
    command.args([
        "--username=nexus",
        "--auth=trust",
        "--encoding=UTF8",
        "--locale=C",
        "--no-instructions",
    ]);
    if profile == Profile::Test {
        command.arg("--no-sync");
    }
    finish(place, &program, command, "")?;

    // No server runs yet, so that the rename publishes a cluster that has its database.
    let program = binaries.folder.join("postgres");
    let mut command = account::command(&program, place.account.as_ref());
    command.arg("--single").arg("-D").arg(data);
    command.args(["-c", "exit_on_error=on", "-c", "log_checkpoints=off"]);
    if profile == Profile::Test {
        command.args(["-c", "fsync=off"]);
    }
    command.arg("postgres");
    finish(
        place,
        &program,
        command,
        &format!("create database {DEFAULT_DATABASE}\n"),
    )
}

/// Runs a step of creating a cluster to its end.
fn finish(place: &Place, program: &Path, mut command: Command, input: &str) -> Result<(), Error> {
    let failed = |source| account::call_failed(program, place.account.as_ref(), source);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it does not read its input it has failed, and its status says so.
        let _ = stdin.write_all(input.as_bytes());
    }
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let printed = if stderr.is_empty() { stdout } else { stderr };
    Err(Error::Create {
        step: format!("{} ended with {status}", program.display()),
        output: last(&String::from_utf8_lossy(&printed)),
    })
}

/// Starts the server and its watcher, and waits until the server accepts connections.
fn launch(place: &Place, binaries: &Binaries, options: &Options, log: File) -> Result<(), Error> {
    log.set_len(0)
        .map_err(Error::io(format!("empty {}", place.log().display())))?;
    let shell = Path::new("/bin/sh");
    let mut command = account::command(shell, place.account.as_ref());
    // Whatever pipes this program has open must not stay open in a server that outlives it.
    command.args([
        "-c",
        "exec 3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-; exec \"$@\"",
        "sh",
    ]);
    command
        .arg(binaries.folder.join("postgres"))
        .arg("-D")
        .arg(place.data());
    command
        .arg("-c")
        .arg(list_of_one("unix_socket_directories", &place.socket));
    for setting in [
        "listen_addresses=",
        "unix_socket_permissions=0700",
        "port=5432",
        "logging_collector=off",
        "log_destination=stderr",
    ] {
        command.args(["-c", setting]);
    }
    if options.profile == Profile::Test {
        for setting in [
            "fsync=off",
            "synchronous_commit=off",
            "full_page_writes=off",
            "jit=off",
            "timezone=UTC",
            // Many tests at once, each with a pool of its own.
            "max_connections=1000",
            // Memory is where the data is; the default lets the log of changes grow to 1 GB.
            "max_wal_size=256MB",
        ] {
            command.args(["-c", setting]);
        }
    }
    for setting in &options.settings {
        command.arg("-c").arg(setting);
    }
    let stderr = log.try_clone().map_err(Error::io("open the log twice"))?;
    let mut child = command
        .stdout(log)
        .stderr(stderr)
        // Ctrl-C in a terminal goes to a whole group.
        .process_group(0)
        .spawn()
        .map_err(|source| account::call_failed(shell, place.account.as_ref(), source))?;
    // These are copies of the log that would keep it locked once the server has stopped.
    drop(command);

    let result = come_up(place, options, &mut child);
    reap(child)?;
    result
}

fn come_up(place: &Place, options: &Options, child: &mut Child) -> Result<(), Error> {
    // The watcher comes first, for the case that this process is killed while it waits.
    if let Some(server) = Process::find(child.id()) {
        watcher::ensure(place, &server, options.grace)?;
    }
    let deadline = Instant::now() + LONGEST_START;
    loop {
        let status = child.try_wait().map_err(Error::io("wait for postgres"))?;
        if let Some(status) = status {
            return Err(Error::Exited {
                status: status.to_string(),
                lines: last_lines(&place.log()),
                log: place.log(),
            });
        }
        match postmaster(place) {
            Some((process, Some(status))) if process.pid == child.id() && status == "ready" => {
                return Ok(());
            }
            _ => {}
        }
        if Instant::now() > deadline {
            return Err(not_ready(place));
        }
        thread::sleep(PAUSE);
    }
}

/// Names the one folder of a setting that is a list: quotes keep a comma from being a separator.
fn list_of_one(setting: &str, folder: &Path) -> OsString {
    let mut bytes = format!("{setting}=\"").into_bytes();
    for &byte in folder.as_os_str().as_bytes() {
        bytes.extend(if byte == b'"' {
            &b"\"\""[..]
        } else {
            std::slice::from_ref(&byte)
        });
    }
    bytes.push(b'"');
    OsString::from_vec(bytes)
}

fn last_lines(log: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(16 * 1024)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    last(&read().unwrap_or_default())
}

/// The last lines that say something, on a line each, below where they are put.
fn last(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        return "(none)".to_owned();
    }
    let mut shown = String::new();
    for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
        shown.push_str("\n  ");
        shown.push_str(line);
    }
    shown.push('\n');
    shown
}
