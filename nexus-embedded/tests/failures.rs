//! What a user reads when there is no server to be had.

#![cfg(unix)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nexus_embedded::{Error, Options, Server};
use support::{Folder, GRACE, eventually, is_root, may, query, spawn, wrapped};

fn dev(folder: &Folder) -> Options {
    Options::dev().data_folder(folder.path()).grace(GRACE)
}

fn failure(options: &Options) -> Error {
    Server::start(options).expect_err("this cannot start")
}

/// What another process says that uses `folder` with the programs in `binaries`.
fn said_with(folder: &Folder, binaries: &Path, profile: &str) -> String {
    let mut command = folder.other_process();
    command
        .env("NEXUS_PG_BIN", binaries)
        .env("NEXUS_TEST_PROFILE", profile);
    spawn(command).end()
}

#[test]
fn nothing_found() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let mut command = folder.other_process();
    command
        .env("NEXUS_PG_CACHE", &cache)
        .env("NEXUS_PG_OFFLINE", "1")
        .env("NEXUS_TEST_SEARCH_IN", "/nowhere/bin:/elsewhere/bin");
    // Whether it could be is not asked where it is forbidden.
    let (reason, way_out) = if cfg!(feature = "download") {
        (
            "a download is forbidden by NEXUS_PG_OFFLINE or by the program",
            "unset NEXUS_PG_OFFLINE to have one downloaded",
        )
    } else {
        (
            "this program cannot download one",
            "turn on the feature `download` of nexus to have one downloaded",
        )
    };
    assert_eq!(
        spawn(command).end(),
        format!(
            "failed no PostgreSQL 15 or newer found. Looked in: /nowhere/bin, /elsewhere/bin, {}; {reason}. \
             Do one of: set DATABASE_URL; set NEXUS_PG_BIN to a folder with initdb and postgres; \
             install PostgreSQL (Debian: apt-get install postgresql, macOS: brew install postgresql@18); {way_out}",
            cache.display()
        )
    );
}

#[test]
fn a_wrong_folder_of_programs_is_not_replaced_by_a_found_one() {
    let folder = Folder::new();
    assert_eq!(
        said_with(&folder, Path::new("/nowhere/bin"), "dev"),
        "failed NEXUS_PG_BIN is /nowhere/bin but there is no initdb: set it to a folder with initdb and postgres, \
         15 or newer, or unset it"
    );
}

#[test]
fn programs_that_are_too_old() {
    let folder = Folder::new();
    let old = folder.programs("postgres", "echo 'postgres (PostgreSQL) 14.1'; exit");
    let said = said_with(&folder, &old, "dev");
    assert!(
        said.contains(" but that is PostgreSQL 14: set it to "),
        "{said}"
    );
}

#[test]
fn data_of_another_major_version() {
    let folder = Folder::new();
    drop(Server::start(&dev(&folder)).expect("it starts"));
    folder.wait_until_stopped();
    let data = folder.cluster().join("data");
    fs::write(data.join("PG_VERSION"), "14\n").expect("a file");
    let major = folder
        .cluster()
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert_eq!(
        failure(&dev(&folder)).to_string(),
        format!(
            "{} was made by PostgreSQL 14, found {major}: point NEXUS_PG_BIN at 14, or delete the folder to start empty",
            data.display()
        )
    );
}

#[test]
fn a_socket_path_that_is_too_long() {
    let folder = Folder::new();
    let long = folder.path().join("d".repeat(100));
    let error = failure(&Options::dev().data_folder(&long));
    let length = long
        .canonicalize()
        .expect("it was created")
        .as_os_str()
        .len()
        + "/15/socket-0000/.s.PGSQL.5432".len();
    assert_eq!(
        error.to_string(),
        format!(
            "socket path is {length} bytes, the limit is 103: set NEXUS_PG_DATA to a shorter folder"
        )
    );
}

#[test]
fn a_server_that_exits_shows_its_last_words() {
    let folder = Folder::new();
    let programs = folder.programs(
        "postgres",
        "case $1 in -D) echo 'first words'; echo 'FATAL: the disk is on fire' >&2; exit 3;; esac",
    );
    let said = said_with(&folder, &programs, "dev");
    let log = folder.cluster().join("log");
    assert_eq!(
        said,
        format!(
            "failed postgres exited (exit status: 3). Last log lines: |  first words|  FATAL: the disk is on fire| \
             Full log: {}",
            log.display()
        )
    );
    assert_eq!(folder.users(), 0);
    // What was wrong is gone, and the cluster that had been created is good.
    drop(Server::start(&dev(&folder)).expect("it starts"));
}

#[test]
fn a_cluster_that_cannot_be_created_leaves_nothing() {
    let folder = Folder::new();
    let programs = folder.programs("initdb", "echo 'initdb: error: no space left' >&2; exit 1");
    let said = said_with(&folder, &programs, "dev");
    let initdb = programs.join("initdb");
    assert_eq!(
        said,
        format!(
            "failed could not create a PostgreSQL cluster: {} ended with exit status: 1. \
             Last lines: |  initdb: error: no space left|",
            initdb.display()
        )
    );
    let left: Vec<_> = fs::read_dir(folder.cluster())
        .expect("it exists")
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    assert!(
        !left
            .iter()
            .any(|name| name.to_string_lossy().starts_with("data")),
        "{left:?}"
    );
}

#[test]
fn a_half_made_cluster_is_made_anew() {
    let folder = Folder::new();
    // Its caller is killed half-way, and it goes on for as long as it has a folder to write to.
    let programs = folder.programs(
        "initdb",
        "touch \"$2/half\"; while [ -e \"$2\" ]; do sleep 0.05; done; exit 1",
    );
    let mut command = folder.other_process();
    command
        .env("NEXUS_PG_BIN", &programs)
        .env("NEXUS_TEST_PROFILE", "dev");
    let mut child = command.spawn().expect("it starts");
    eventually("the cluster is half made", || {
        let clusters = fs::read_dir(folder.path()).expect("it exists").flatten();
        let inside = clusters.filter_map(|cluster| fs::read_dir(cluster.path()).ok());
        inside
            .flatten()
            .flatten()
            .any(|entry| entry.path().join("half").exists())
    });
    child.kill().expect("it runs");
    child.wait().expect("it is killed");

    let server = Server::start(&dev(&folder)).expect("it starts");
    assert!(server.was_started());
    assert_eq!(query(&server, "select 1"), "1");
    let entries = fs::read_dir(folder.cluster()).expect("it exists").flatten();
    let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    assert!(!names.any(|name| name.starts_with("data.new")));
}

/// As a crash of the machine does without `fsync`.
fn break_data(folder: &Folder) {
    folder.wait_until_stopped();
    fs::write(folder.cluster().join("data/global/pg_control"), "").expect("a file");
}

#[test]
fn broken_data_are_replaced_for_tests() {
    let folder = Folder::new();
    drop(folder.start());
    break_data(&folder);
    let server = folder.start();
    assert_eq!(query(&server, "select 1"), "1");
}

#[test]
fn broken_data_are_kept_for_programs() {
    let folder = Folder::new();
    drop(Server::start(&dev(&folder)).expect("it starts"));
    break_data(&folder);
    for _ in 0..2 {
        let error = failure(&dev(&folder));
        assert!(matches!(error, Error::Exited { .. }), "{error}");
    }
}

#[test]
fn a_folder_anybody_can_write() {
    let folder = Folder::new();
    drop(Server::start(&dev(&folder)).expect("it starts"));
    folder.wait_until_stopped();
    let cluster = folder.cluster();
    fs::set_permissions(&cluster, fs::Permissions::from_mode(0o777)).expect("a folder");
    let error = failure(&dev(&folder));
    assert!(
        matches!(&error, Error::NotOurs { folder } if *folder == cluster),
        "{error}"
    );
}

#[test]
fn a_folder_that_cannot_be_created_names_the_cause() {
    let error = failure(&Options::dev().data_folder("/proc/nowhere"));
    assert_eq!(error.to_string(), "could not create folder /proc/nowhere");
    assert!(std::error::Error::source(&error).is_some());
}

#[test]
fn as_root_a_closed_folder() {
    if !is_root() {
        return; // Nobody is switched to.
    }
    let folder = Folder::new();
    let closed = folder.path().join("closed");
    fs::create_dir(&closed).expect("a folder");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("a folder");
    let error = failure(&Options::dev().data_folder(closed.join("data")));
    let Error::CannotEnter { user, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(
        error.to_string(),
        format!(
            "user '{user}' cannot enter {}: set NEXUS_PG_DATA to a folder it can reach",
            closed.display()
        )
    );
}

#[test]
fn as_root_closed_programs() {
    if !is_root() {
        return; // Nobody is switched to.
    }
    let folder = Folder::new();
    let programs = folder.programs("none", "");
    fs::set_permissions(&programs, fs::Permissions::from_mode(0o700)).expect("a folder");
    let said = said_with(&folder, &programs, "dev");
    assert!(
        said.contains(&format!(
            "who cannot enter or run {}: set NEXUS_PG_BIN",
            programs.display()
        )),
        "{said}"
    );
}

#[test]
fn as_root_without_anybody_to_become() {
    let folder = Folder::new();
    let users = folder.path().join("users");
    fs::write(&users, "root:x:0:0:root:/root:/bin/sh\n").expect("a file");
    let script = format!(
        "mount --bind '{}' /etc/passwd && exec \"$@\"",
        users.display()
    );
    let alone = ["unshare", "--mount", "/bin/sh", "-c", &script, "sh"];
    if !is_root() || !may(&alone) {
        return; // Nobody is switched to, or only by others.
    }
    assert_eq!(
        spawn(wrapped(&alone, &folder.other_process())).end(),
        "failed running as root, and PostgreSQL refuses that; no user 'postgres' or 'nobody' to run it as: \
         run as a normal user or set DATABASE_URL"
    );
}

#[test]
fn root_of_a_container_that_has_no_other_users() {
    let container = ["unshare", "--user", "--map-root-user"];
    if !may(&container) {
        return; // Not everywhere may one make such a container.
    }
    let folder = Folder::new();
    let said = spawn(wrapped(&container, &folder.other_process())).end();
    assert!(
        said.starts_with("failed cannot switch from root to '"),
        "{said}"
    );
    assert!(
        said.ends_with(
            "' (this container maps only uid 0): run as a normal user or set DATABASE_URL"
        ),
        "{said}"
    );
}

#[test]
fn something_else_in_place_of_the_data_is_not_deleted() {
    let folder = Folder::new();
    drop(Server::start(&dev(&folder)).expect("it starts"));
    folder.wait_until_stopped();
    let data = folder.cluster().join("data");
    fs::remove_file(data.join("PG_VERSION")).expect("a file");
    let error = failure(&dev(&folder));
    assert!(
        error
            .to_string()
            .ends_with(&format!(" to {}", data.display())),
        "{error}"
    );
    assert!(data.join("global").exists());
}
