//! Which database is used, as which user, and where its data are.

#![cfg(unix)]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{
    Folder, eventually, is_alive, is_root, make_program, may, other_process, other_process_in,
    query, spawn, wrapped,
};

/// A user that is not root and has no part in these tests.
const NOBODY: u32 = 65_534;

#[test]
fn a_database_url_wins_and_nothing_is_started() {
    let folder = Folder::new();
    for (core, plain, expected) in [
        (
            "",
            "postgres://u:secret@db:1/a",
            "DATABASE_URL (db:1/a) postgres://u:secret@db:1/a",
        ),
        (
            "postgres://core/b",
            "postgres://plain/a",
            "CORE_DATABASE_URL (core/b) postgres://core/b",
        ),
        (
            "postgres://core/b",
            "",
            "CORE_DATABASE_URL (core/b) postgres://core/b",
        ),
    ] {
        let mut command = folder.other_process();
        // Nor does it matter that there would be nothing to start.
        command
            .env("CORE_DATABASE_URL", core)
            .env("DATABASE_URL", plain)
            .env("NEXUS_PG_BIN", "/nowhere");
        assert_eq!(spawn(command).end(), expected);
    }
    assert_eq!(fs::read_dir(folder.path()).expect("it exists").count(), 0);
}

#[test]
fn an_empty_database_url_is_none() {
    let folder = Folder::new();
    let mut command = folder.other_process();
    command
        .env("CORE_DATABASE_URL", "")
        .env("DATABASE_URL", " ");
    let said = spawn(command).end();
    assert!(
        said.starts_with("started postgres://nexus@localhost:5432/nexus?host="),
        "{said}"
    );
}

#[test]
fn the_server_is_of_this_user_or_as_root_of_another_and_closed_to_the_rest() {
    let folder = Folder::new();
    let server = folder.start();
    let pid = folder.server().expect("it runs");
    let output = Command::new("ps")
        .args(["-o", "uid=", "-p", &pid.to_string()])
        .output()
        .expect("ps is installed");
    let uid: u32 = String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .expect("a number");
    let cluster = fs::metadata(folder.cluster()).expect("it exists");
    assert_ne!(uid, 0);
    assert_eq!(
        cluster.mode() & 0o777,
        if is_root() { 0o711 } else { 0o700 }
    );
    let url = server.url("nexus");
    let socket = url.split(['=', '&']).nth(1).expect("a folder");
    for path in [server.data_folder(), Path::new(socket)] {
        let found = fs::metadata(path).expect("it exists");
        assert_eq!(
            (found.uid(), found.mode() & 0o777),
            (uid, 0o700),
            "{path:?}"
        );
    }
    assert_eq!(
        query(&server, "select current_user || ' ' || current_database()"),
        "nexus nexus"
    );
    assert_eq!(query(&server, "show listen_addresses"), "");
    for (setting, value) in [
        ("fsync", "off"),
        ("synchronous_commit", "off"),
        ("full_page_writes", "off"),
        ("jit", "off"),
        ("TimeZone", "UTC"),
        ("lc_collate", "C"),
        ("server_encoding", "UTF8"),
    ] {
        assert_eq!(
            query(&server, &format!("show {setting}")),
            value,
            "{setting}"
        );
    }
}

#[test]
fn as_root_without_a_user_postgres_it_is_nobody_even_when_there_is_one_later() {
    let folder = Folder::new();
    let users = folder.path().join("users");
    fs::write(
        &users,
        "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
    )
    .expect("a file");
    let script = format!(
        "mount --bind '{}' /etc/passwd && exec \"$@\"",
        users.display()
    );
    let without = ["unshare", "--mount", "/bin/sh", "-c", &script, "sh"];
    if !is_root() || !may(&without) {
        return; // Nobody is switched to, or only by others.
    }
    let said = spawn(wrapped(&without, &folder.other_process())).end();
    assert!(said.starts_with("started "), "{said}");
    folder.wait_until_stopped();
    let data = fs::metadata(folder.cluster().join("data")).expect("it exists");
    assert_eq!(data.uid(), NOBODY);
    let server = folder.start();
    assert_eq!(query(&server, "select 1"), "1");
}

#[test]
fn as_root_that_may_not_look_at_other_processes() {
    // What root may do in a container that nobody gave more rights.
    let container = [
        "setpriv",
        "--bounding-set=-sys_ptrace",
        "--inh-caps=-sys_ptrace",
    ];
    if !is_root() || !may(&container) {
        return; // Normal users look at their own processes.
    }
    let folder = Folder::new();
    let first = spawn(wrapped(&container, &folder.other_process()));
    let second = spawn(wrapped(&container, &folder.other_process()));
    assert!(first.said.starts_with("started "), "{}", first.said);
    assert!(second.said.starts_with("joined "), "{}", second.said);
    first.end();
    second.end();
}

/// This test program in a folder that a normal user can reach, with the user's own `project` in it.
struct Home {
    folder: Folder,
    program: PathBuf,
    project: PathBuf,
}

impl Home {
    fn new(project: &str) -> Self {
        let folder = Folder::new();
        let program = folder.path().join("program");
        let own = std::env::current_exe().expect("this is a program");
        make_program("cat \"$1\"", own.as_os_str(), &program);
        let project = folder.path().join(project);
        fs::create_dir_all(project.join("src/deep")).expect("a project");
        fs::write(project.join("Cargo.lock"), "").expect("a project");
        if is_root() {
            chown(&project, Some(NOBODY), Some(NOBODY)).expect("root may do this");
        }
        Self {
            folder,
            program,
            project,
        }
    }

    /// Another process of a normal user, somewhere in the project.
    fn process(&self) -> Command {
        let mut command = other_process_in(&self.program);
        command
            .current_dir(self.project.join("src/deep"))
            .env("NEXUS_TEST_PROFILE", "dev");
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

/// Waits for the server of a cluster that is not in a test's own folder.
fn wait_until_stopped(cluster: &Path) {
    let text = fs::read_to_string(cluster.join("watcher")).expect("there is a watcher");
    let server = text
        .split_whitespace()
        .nth(2)
        .and_then(|pid| pid.parse().ok());
    let server = server.expect("a pid");
    eventually("the server has stopped", || !is_alive(server));
}

#[test]
fn a_normal_user_has_the_data_in_the_project() {
    let home = Home::new("project");
    let other = spawn(home.process());
    let said = other.said.clone();
    let nexus = home
        .project
        .canonicalize()
        .expect("it exists")
        .join(".nexus");
    assert!(
        said.starts_with("started ") && said.contains(&*nexus.join("pg").to_string_lossy()),
        "{said}"
    );
    assert_eq!(
        fs::read_to_string(nexus.join(".gitignore")).expect("a file"),
        "*\n"
    );
    other.end();
    let data = PathBuf::from(said.rsplit_once(' ').expect("a folder").1);
    wait_until_stopped(data.parent().expect("a cluster"));
    drop(home.folder);
}

#[test]
fn a_deep_project_has_its_socket_elsewhere() {
    let home = Home::new(&"deep/".repeat(20));
    let other = spawn(home.process());
    let said = other.said.clone();
    assert!(
        said.starts_with("started ") && said.contains("?host=/tmp/nexus-"),
        "{said}"
    );
    other.end();
    let data = PathBuf::from(said.rsplit_once(' ').expect("a folder").1);
    wait_until_stopped(data.parent().expect("a cluster"));
    let socket = said
        .split_once("?host=")
        .and_then(|(_, rest)| rest.split_once('&'))
        .expect("a socket")
        .0;
    fs::remove_dir_all(socket).expect("nobody uses it any more");
    // Others may have theirs beside it.
    let _ = fs::remove_dir(Path::new(socket).parent().expect("it is not the root"));
}

#[test]
fn as_root_the_data_are_outside_of_the_project() {
    if !is_root() {
        return; // See the test above for normal users.
    }
    let home = Home::new("project");
    let mut command = other_process();
    command
        .current_dir(&home.project)
        .env("NEXUS_TEST_PROFILE", "dev");
    let said = spawn(command).end();
    let data = PathBuf::from(said.rsplit_once(' ').expect("a folder").1);
    assert!(data.starts_with("/var/tmp/nexus-0"), "{said}");
    let cluster = data.parent().expect("a cluster");
    wait_until_stopped(cluster);
    fs::remove_dir_all(cluster.parent().expect("the project's")).expect("nobody uses it any more");
    assert!(!home.project.join(".nexus").exists());
}

#[test]
fn what_only_looks_makes_no_cluster() {
    let folder = Folder::new();
    let options = nexus_embedded::Options::dev().data_folder(folder.path().join("data"));
    let found = nexus_embedded::Server::start_existing(&options).expect("it can look");
    assert!(found.is_none());
    assert!(!folder.path().join("data").exists());
    let made = nexus_embedded::Server::start(&options).expect("a server starts");
    let found = nexus_embedded::Server::start_existing(&options).expect("it can look");
    assert_eq!(found.expect("there is one").url("nexus"), made.url("nexus"));
}
