//! Many users, one server; and it stops when the last one is gone, in whatever way it went.

#![cfg(unix)]

mod support;

use std::fs;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nexus_embedded::Server;
use support::{Folder, GRACE, eventually, is_alive, kill, query, spawn, wrapped};

#[test]
fn eight_processes_create_one_cluster() {
    let folder = Folder::new();
    let count = folder.path().join("count");
    fs::write(&count, "").expect("a file");
    fs::set_permissions(&count, std::os::unix::fs::PermissionsExt::from_mode(0o666))
        .expect("a file");
    let programs = folder.programs("initdb", &format!("echo made >>'{}'", count.display()));

    let starts: Vec<_> = (0..8)
        .map(|_| {
            let mut command = folder.other_process();
            command.env("NEXUS_PG_BIN", &programs);
            thread::spawn(move || spawn(command))
        })
        .collect();
    let others: Vec<_> = starts
        .into_iter()
        .map(|start| start.join().expect("it says something"))
        .collect();
    assert_eq!(folder.users(), 8);
    let said: Vec<_> = others.into_iter().map(support::Other::end).collect();

    let started: Vec<_> = said
        .iter()
        .filter_map(|said| said.strip_prefix("started "))
        .collect();
    let joined: Vec<_> = said
        .iter()
        .filter_map(|said| said.strip_prefix("joined "))
        .collect();
    assert_eq!((started.len(), joined.len()), (1, 7), "{said:#?}");
    assert!(joined.iter().all(|place| *place == started[0]), "{said:#?}");
    assert_eq!(
        fs::read_to_string(&count).expect("a file").lines().count(),
        1
    );
    folder.wait_until_stopped();
}

#[test]
fn stops_when_the_last_user_is_gone_and_not_before() {
    let folder = Folder::new();
    let first = folder.start();
    let second = folder.start();
    assert!(first.was_started() && !second.was_started());
    assert_eq!(first.url("x"), second.url("x"));
    drop(first);
    // The grace time is four looks.
    for _ in 0..8 {
        folder.wait_for_a_look();
    }
    assert_eq!(query(&second, "select 1"), "1");
    drop(second);
    folder.wait_until_stopped();
    eventually("the watcher has nothing left to do", || {
        !is_alive(folder.watcher())
    });
}

#[test]
fn data_is_kept_from_one_start_to_the_next() {
    let folder = Folder::new();
    let options = nexus_embedded::Options::dev()
        .data_folder(folder.path())
        .grace(GRACE);
    let server = Server::start(&options).expect("it starts");
    query(&server, "create table kept as select 42 as answer");
    assert_eq!(query(&server, "show fsync"), "on");
    assert_eq!(query(&server, "show synchronous_commit"), "on");
    drop(server);
    folder.wait_until_stopped();
    let server = Server::start(&options).expect("it starts again");
    assert!(server.was_started());
    assert_eq!(query(&server, "select answer from kept"), "42");
}

#[test]
fn a_killed_user_does_not_keep_the_server() {
    let folder = Folder::new();
    let mut other = spawn(folder.other_process());
    assert!(folder.server().is_some());
    other.child.kill().expect("it runs");
    other.child.wait().expect("it is killed");
    folder.wait_until_stopped();
    assert_eq!(folder.users(), 0);
}

#[test]
fn the_server_outlives_whoever_started_it() {
    let folder = Folder::new();
    let mut starter = spawn(folder.other_process());
    assert!(starter.said.starts_with("started "), "{}", starter.said);
    let server = folder.start();
    assert!(!server.was_started());
    starter.child.kill().expect("it runs");
    starter.child.wait().expect("it is killed");
    for _ in 0..8 {
        folder.wait_for_a_look();
    }
    assert_eq!(query(&server, "select 1"), "1");
}

#[test]
fn the_server_holds_no_pipe_of_whoever_started_it() {
    let folder = Folder::new();
    // As `cargo test 2>&1 | tail` in a shell that has some more pipes open.
    let pipes = ["/bin/sh", "-c", "exec \"$@\" 2>&1 3>&1 9>&1", "sh"];
    let starter = spawn(wrapped(&pipes, &folder.other_process()));
    assert!(starter.said.starts_with("started "), "{}", starter.said);
    let server = folder.start();

    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(starter.end()));
    receiver
        .recv_timeout(Duration::from_mins(1))
        .expect("the pipe ends with the program");
    assert_eq!(query(&server, "select 1"), "1");
}

#[test]
fn a_joiner_restarts_a_missing_watcher() {
    let folder = Folder::new();
    let first = folder.start();
    let server = folder.server();
    folder.kill_watcher();
    let before = folder.watcher();
    let second = folder.start();
    assert!(!second.was_started());
    assert_ne!(folder.watcher(), before);
    assert_eq!(folder.server(), server);
    drop((first, second));
    folder.wait_until_stopped();
}

#[test]
fn whoever_comes_while_the_server_stops_gets_a_new_one() {
    let folder = Folder::new();
    for _ in 0..8 {
        let server = folder.start();
        assert_eq!(query(&server, "select 1"), "1");
        drop(server);
        let mark = folder.cluster().join("stopping");
        eventually("the watcher stops the server", || {
            mark.exists() || folder.server().is_none()
        });
    }
}

#[test]
fn coming_and_going_never_meets_a_server_that_stops() {
    let folder = Folder::new();
    let options = folder.options().grace(Duration::ZERO);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..15 {
                    let server = Server::start(&options).expect("it starts or is joined");
                    assert_eq!(query(&server, "select 1"), "1");
                }
            });
        }
    });
}

#[test]
fn a_stop_whose_watcher_died_is_finished_by_the_next_user() {
    let folder = Folder::new();
    drop(folder.start());
    let first = folder.server();
    folder.kill_watcher();
    // It may have got as far as stopping the server, or was just about to.
    fs::write(folder.cluster().join("stopping"), "").expect("a file");
    let server = folder.start();
    assert!(server.was_started() && folder.server() != first);
    assert!(!folder.cluster().join("stopping").exists());
    assert_eq!(query(&server, "select 1"), "1");
}

#[test]
fn a_stop_whose_watcher_died_is_called_off_when_there_are_users() {
    let folder = Folder::new();
    let first = folder.start();
    folder.kill_watcher();
    fs::write(folder.cluster().join("stopping"), "").expect("a file");
    let second = folder.start();
    assert!(!second.was_started());
    assert!(!folder.cluster().join("stopping").exists());
    assert_eq!(query(&first, "select 1"), "1");
}

#[test]
fn a_killed_server_is_replaced() {
    let folder = Folder::new();
    let first = folder.start();
    let pid = folder.server().expect("it runs");
    kill(pid);
    // At once: some of its processes still live, and a new server has to wait for them.
    let second = folder.start();
    assert!(second.was_started() && folder.server() != Some(pid));
    assert_eq!(query(&second, "select 1"), "1");
    assert_eq!(query(&first, "select 1"), "1");
}

#[test]
fn what_was_committed_outlives_a_killed_server_and_its_watcher() {
    let folder = Folder::new();
    let options = nexus_embedded::Options::dev()
        .data_folder(folder.path())
        .grace(GRACE);
    let first = Server::start(&options).expect("it starts");
    query(&first, "create table kept as select 42 as answer");
    let pid = folder.server().expect("it runs");
    folder.kill_watcher();
    kill(pid);
    eventually("the server is dead", || !is_alive(pid));
    let url = first.url("nexus");
    let socket = url.split(['=', '&']).nth(1).expect("a folder");
    let stale = [
        folder.cluster().join("data/postmaster.pid"),
        std::path::Path::new(socket).join(".s.PGSQL.5432"),
    ];
    assert!(stale.iter().all(|file| file.exists()), "{stale:?}");

    let second = Server::start(&options).expect("it starts again");
    assert!(second.was_started());
    assert_eq!(second.url("nexus"), url);
    assert_eq!(query(&second, "select answer from kept"), "42");
    // And the new one is watched.
    drop((first, second));
    folder.wait_until_stopped();
}

#[test]
fn the_pid_of_something_else_in_postmaster_pid_does_not_matter() {
    let folder = Folder::new();
    drop(folder.start());
    folder.wait_until_stopped();
    let file = folder.cluster().join("data/postmaster.pid");
    let mut zombie = Zombie::of_the_owner(&folder.cluster().join("data"));
    for pid in [std::process::id(), zombie.0.id(), 999_999_999] {
        fs::write(
            &file,
            format!("{pid}\n/elsewhere\n1\n5432\n/tmp\n\n1 1\nready   \n"),
        )
        .expect("a file");
        let server = folder.start();
        assert!(server.was_started());
        assert_eq!(query(&server, "select 1"), "1");
        drop(server);
        folder.wait_until_stopped();
    }
    zombie.0.wait().expect("nobody waited for it");
}

/// A dead process that its parent has not asked about, of the user the server runs as.
struct Zombie(std::process::Child);

impl Zombie {
    fn of_the_owner(data: &std::path::Path) -> Self {
        use std::os::unix::{fs::MetadataExt, process::CommandExt};
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exit"]).current_dir("/");
        if support::is_root() {
            command.uid(fs::metadata(data).expect("it exists").uid());
        }
        let zombie = Self(command.spawn().expect("there is a shell"));
        eventually("the child is a zombie", || !is_alive(zombie.0.id()));
        zombie
    }
}

#[test]
fn a_folder_that_was_deleted_is_made_anew() {
    let folder = Folder::new();
    let first = folder.start();
    let pid = folder.server().expect("it runs");
    fs::remove_dir_all(folder.cluster()).expect("a folder");
    let second = folder.start();
    assert!(second.was_started());
    assert_eq!(query(&second, "select 1"), "1");
    // Nobody can use the old one any more.
    eventually("the old server has stopped", || !is_alive(pid));
    drop(first);
}

#[test]
fn another_process_may_have_any_postgres_settings() {
    let folder = Folder::new();
    let mut command = folder.other_process();
    for (name, value) in [
        ("PGDATA", "/nowhere"),
        ("PGPORT", "1"),
        ("PGOPTIONS", "-c nonsense=1"),
        ("PGTZ", "x"),
        ("LC_ALL", "xx_YY"),
    ] {
        command.env(name, value);
    }
    let other = spawn(command);
    assert!(other.said.starts_with("started "), "{}", other.said);
    other.end();
}
