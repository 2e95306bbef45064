//! A machine without a server to start: what is downloaded, kept, refused, and said.

#![cfg(all(unix, feature = "download"))]
#![expect(clippy::doc_markdown, reason = "PostgreSQL is a name and not code")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use support::github::{GitHub, Release, archive, archive_name, without_postgres};
use support::{Folder, eventually, is_root, may, real_major, spawn, wrapped};

/// What is in a folder, without the lock.
fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "lock")
        .collect();
    names.sort();
    names
}

/// The only PostgreSQL in a cache.
fn cached(cache: &Path) -> PathBuf {
    let names = names(cache);
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(
        names[0].starts_with(&format!("{}.99.0-", real_major())),
        "{names:?}"
    );
    cache.join(&names[0])
}

/// What a process says that cannot download what the server at `github` has.
fn refused(folder: &Folder, github: &GitHub, cache: &Path) -> String {
    let said = spawn(github.process(folder, cache)).end();
    let cause = said
        .strip_prefix("failed no PostgreSQL 15 or newer found. Looked in: ")
        .and_then(|rest| rest.strip_prefix(&*cache.to_string_lossy()))
        .and_then(|rest| rest.strip_prefix("; download failed: "));
    let ways_out = ". Do one of: set DATABASE_URL; set NEXUS_PG_BIN to a folder with initdb and postgres; \
         install PostgreSQL (Debian: apt-get install postgresql, macOS: brew install postgresql@18)";
    cause
        .and_then(|rest| rest.strip_suffix(ways_out))
        .unwrap_or_else(|| panic!("{said}"))
        .to_owned()
}

#[test]
fn is_downloaded_once_and_then_used_without_a_way_to_the_internet() {
    let folder = Folder::new();
    let cache = folder.path().join("some/cache");
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    // Closed to others, as root's files often are; the server's user must read them.
    let careful = ["/bin/sh", "-c", "umask 077; exec \"$@\"", "sh"];
    let first = spawn(wrapped(&careful, &github.process(&folder, &cache)));
    assert!(first.said.starts_with("started "), "{}", first.said);
    first.end();
    folder.wait_until_stopped();
    let found = cached(&cache);
    for path in [&found, &found.join("bin"), &found.join("bin/postgres")] {
        let mode = fs::metadata(path).expect("it exists").permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "{}", path.display());
    }
    assert_eq!(github.archives_asked_for(), 1);

    let asked = github.asked();
    for (offline, name) in [("1", "NEXUS_PG_OFFLINE"), ("", "NOTHING")] {
        let mut command = without_postgres(&folder, &cache);
        command.env(name, offline);
        let said = spawn(command).end();
        assert!(
            said.starts_with("started ") || said.starts_with("joined "),
            "{said}"
        );
    }
    assert_eq!(github.asked(), asked);
}

#[test]
fn what_is_installed_comes_before_what_was_downloaded() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let ran = folder.path().join("ran");
    fs::write(&ran, "").expect("a file");
    fs::set_permissions(&ran, fs::Permissions::from_mode(0o666)).expect("a file");
    let mark = format!("echo ran >>'{}'", ran.display());
    let github = GitHub::start(&folder, &Release::of(archive(&folder, &mark, &[])));
    spawn(github.process(&folder, &cache)).end();
    folder.wait_until_stopped();
    assert_ne!(fs::read_to_string(&ran).expect("a file"), "");

    fs::write(&ran, "").expect("a file");
    let mut command = without_postgres(&folder, &cache);
    command.env_remove("NEXUS_TEST_SEARCH_IN");
    let said = spawn(command).end();
    assert!(said.starts_with("started "), "{said}");
    assert_eq!(fs::read_to_string(&ran).expect("a file"), "");
}

#[test]
fn is_downloaded_from_within_a_runtime_too() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let mut command = github.process(&folder, &cache);
    command.env("NEXUS_TEST_RUNTIME", "1");
    let said = spawn(command).end();
    assert!(said.starts_with("started "), "{said}");
}

#[test]
fn many_processes_download_once() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let starts: Vec<_> = (0..6)
        .map(|_| {
            let command = github.process(&folder, &cache);
            thread::spawn(move || spawn(command))
        })
        .collect();
    for start in starts {
        let said = start.join().expect("it says something").end();
        assert!(
            said.starts_with("started ") || said.starts_with("joined "),
            "{said}"
        );
    }
    assert_eq!(github.archives_asked_for(), 1);
    cached(&cache);
}

#[test]
fn offline_nothing_is_asked_for() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let mut command = github.process(&folder, &cache);
    command.env("NEXUS_PG_OFFLINE", "1");
    assert_eq!(
        spawn(command).end(),
        format!(
            "failed no PostgreSQL 15 or newer found. Looked in: {}; a download is forbidden by NEXUS_PG_OFFLINE \
             or by the program. Do one of: set DATABASE_URL; set NEXUS_PG_BIN to a folder with initdb and postgres; \
             install PostgreSQL (Debian: apt-get install postgresql, macOS: brew install postgresql@18); \
             unset NEXUS_PG_OFFLINE to have one downloaded",
            cache.display()
        )
    );
    assert_eq!(github.asked(), 0);
    assert!(!cache.exists());
    // Said to be off.
    let mut command = github.process(&folder, &cache);
    command.env("NEXUS_PG_OFFLINE", "0");
    let said = spawn(command).end();
    assert!(said.starts_with("started "), "{said}");
}

#[test]
fn what_has_another_checksum_is_never_run() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let ran = folder.path().join("ran");
    let mark = format!("echo ran >>'{}'", ran.display());
    let mut release = Release::of(archive(&folder, &mark, &[]));
    let expected = String::from_utf8(release.assets[1].bytes.clone()).expect("text");
    let expected = expected.split(' ').next().expect("a checksum").to_owned();
    // Somebody changed the archive and nothing else.
    let archive = &mut release.assets[0];
    archive.bytes.push(0);
    archive.length += 1;
    let github = GitHub::start(&folder, &release);
    let cause = refused(&folder, &github, &cache);
    assert!(
        cause.starts_with("the archive has checksum ")
            && cause.ends_with(&format!(" and should have {expected}, so it is not used")),
        "{cause}"
    );
    assert_eq!(names(&cache), [""; 0]);
    assert!(!ran.exists());
}

#[test]
fn what_has_no_checksum_is_never_run() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let ran = folder.path().join("ran");
    let mark = format!("echo ran >>'{}'", ran.display());
    let mut release = Release::of(archive(&folder, &mark, &[]));
    release.assets.truncate(1);
    let github = GitHub::start(&folder, &release);
    assert_eq!(
        refused(&folder, &github, &cache),
        format!(
            "the archive {} has no checksum, so it is not used",
            archive_name(&release.version)
        )
    );
    assert_eq!(names(&cache), [""; 0]);
    assert!(!ran.exists());
}

#[test]
fn a_download_that_breaks_off_leaves_nothing() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let mut release = Release::of(archive(&folder, "", &[]));
    let half = release.assets[0].bytes.len() / 2;
    release.assets[0].bytes.truncate(half);
    let github = GitHub::start(&folder, &release);
    let cause = refused(&folder, &github, &cache);
    assert!(!cause.is_empty() && !cause.contains("checksum"), "{cause}");
    assert_eq!(names(&cache), [""; 0]);

    // The next one succeeds, with nothing to clear up.
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let said = spawn(github.process(&folder, &cache)).end();
    assert!(said.starts_with("started "), "{said}");
}

#[test]
fn an_archive_that_was_released_broken_leaves_nothing() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let mut whole = archive(&folder, "", &[]);
    whole.truncate(whole.len() / 2);
    let github = GitHub::start(&folder, &Release::of(whole));
    let cause = refused(&folder, &github, &cache);
    assert!(cause.starts_with("could not unpack "), "{cause}");
    assert_eq!(names(&cache), [""; 0]);
}

#[test]
fn an_archive_of_something_else() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let other = folder.path().join("other");
    fs::create_dir_all(other.join("postgresql-99/doc")).expect("a folder");
    let packed = Command::new("tar")
        .args(["-czf", "-", "-C"])
        .arg(&other)
        .arg("postgresql-99")
        .output()
        .expect("tar is installed");
    let github = GitHub::start(&folder, &Release::of(packed.stdout));
    let cause = refused(&folder, &github, &cache);
    assert!(
        cause.ends_with(" holds no bin/initdb and bin/postgres"),
        "{cause}"
    );
    assert_eq!(names(&cache), [""; 0]);
}

#[test]
fn nothing_for_this_platform_or_of_this_version() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let mut release = Release::of(archive(&folder, "", &[]));
    for asset in &mut release.assets {
        asset.name = asset.name.replace("postgresql-", "postgresql-vax-");
    }
    let github = GitHub::start(&folder, &release);
    let from = "https://github.com/theseus-rs/postgresql-binaries";
    let major = real_major();
    let cause = refused(&folder, &github, &cache);
    assert!(
        cause.starts_with(&format!("{from} has no PostgreSQL {major} for ")),
        "{cause}"
    );

    release.version = "9.6.1".to_owned();
    let github = GitHub::start(&folder, &release);
    assert_eq!(
        refused(&folder, &github, &cache),
        format!("{from} has no PostgreSQL {major}")
    );
}

#[test]
fn no_way_to_the_internet() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let said = spawn(without_postgres(&folder, &cache)).end();
    assert!(
        said.contains(
            "; download failed: could not download from https://github.com/theseus-rs/postgresql-binaries: "
        ),
        "{said}"
    );
    assert!(said.contains(". Do one of: set DATABASE_URL; "), "{said}");
}

#[test]
fn no_certificates_to_trust() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let mut command = without_postgres(&folder, &cache);
    command
        .env("SSL_CERT_FILE", "/nowhere")
        .env("SSL_CERT_DIR", "/nowhere");
    let said = spawn(command).end();
    assert!(
        said.contains("; download failed: this system has no certificates to know a server by; "),
        "{said}"
    );
}

#[test]
fn a_cache_that_cannot_be_written() {
    let folder = Folder::new();
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let cause = refused(&folder, &github, Path::new("/proc/nowhere/cache"));
    assert!(
        cause.starts_with("could not create /proc/nowhere")
            && cause.ends_with("; set NEXUS_PG_CACHE to a folder that can be written"),
        "{cause}"
    );
    // Found out before anything is fetched.
    assert_eq!(github.asked(), 0);
}

#[test]
fn as_root_a_cache_that_others_cannot_enter() {
    if !is_root() {
        return; // Nobody is switched to.
    }
    let folder = Folder::new();
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let closed = folder.path().join("closed");
    fs::create_dir(&closed).expect("a folder");
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("a folder");
    let cause = refused(&folder, &github, &closed.join("cache"));
    assert!(
        cause.starts_with("user '")
            && cause.ends_with(&format!(
                "' cannot enter {}: set NEXUS_PG_CACHE to a folder it can reach",
                closed.display()
            )),
        "{cause}"
    );
    assert_eq!(github.asked(), 0);
}

#[test]
fn a_full_disk_leaves_nothing() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    fs::create_dir(&cache).expect("a folder");
    let script = format!(
        "mount -t tmpfs -o size=1m tmpfs '{0}' && \"$@\"; ls -A '{0}' >'{0}.after'",
        cache.display()
    );
    let small = ["unshare", "--mount", "/bin/sh", "-c", &script, "sh"];
    if !is_root() || !may(&small) {
        return; // Only root can make a small disk.
    }
    let large = archive(&folder, "", &[("large", 8 << 20)]);
    let github = GitHub::start(&folder, &Release::of(large));
    let said = spawn(wrapped(&small, &github.process(&folder, &cache))).end();
    assert!(
        said.contains("could not unpack ") && said.contains("No space left on device"),
        "{said}"
    );
    let after = fs::read_to_string(folder.path().join("cache.after")).expect("it was listed");
    assert_eq!(after.trim(), "lock");
}

#[test]
fn whoever_is_killed_while_unpacking_leaves_nothing_that_is_used() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    // The half-made folder has its programs; what follows takes long enough to be met in the middle.
    let large = archive(&folder, "", &[("large", 192 << 20)]);
    let github = GitHub::start(&folder, &Release::of(large));
    let mut child = github.process(&folder, &cache).spawn().expect("it starts");
    let unpacks_the_large_one = || {
        let staging = names(&cache);
        let inside = staging
            .iter()
            .map(|name| cache.join(name))
            .flat_map(|staging| {
                let names = names(&staging);
                names.into_iter().map(move |name| staging.join(name))
            });
        inside
            .into_iter()
            .any(|unpacked| unpacked.join("large").exists())
    };
    eventually("the programs are unpacked", unpacks_the_large_one);
    child.kill().expect("it runs");
    child.wait().expect("it is killed");
    let left = names(&cache);
    assert!(
        left.len() == 1 && left[0].starts_with("new-"),
        "killed too late: {left:?}"
    );

    let small = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    let said = spawn(small.process(&folder, &cache)).end();
    assert!(said.starts_with("started "), "{said}");
    assert!(!cached(&cache).join("large").exists());
}

#[test]
fn what_does_not_run_here_is_not_downloaded_at_every_start() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let foreign = archive(&folder, "echo 'cannot find libfoo' >&2; exit 127", &[]);
    let github = GitHub::start(&folder, &Release::of(foreign));
    for _ in 0..2 {
        let cause = refused(&folder, &github, &cache);
        assert!(
            cause.starts_with(&*cached(&cache).to_string_lossy())
                && cause.ends_with(": delete that folder to have it downloaded again"),
            "{cause}"
        );
    }
    assert_eq!(github.archives_asked_for(), 1);
}

#[test]
fn a_cached_one_without_its_programs_is_replaced() {
    let folder = Folder::new();
    let cache = folder.path().join("cache");
    let github = GitHub::start(&folder, &Release::of(archive(&folder, "", &[])));
    drop(spawn(github.process(&folder, &cache)).end());
    folder.wait_until_stopped();
    fs::remove_file(cached(&cache).join("bin/initdb")).expect("a file");
    let said = spawn(github.process(&folder, &cache)).end();
    assert!(said.starts_with("started "), "{said}");
    assert!(cached(&cache).join("bin/initdb").exists());
    assert_eq!(github.archives_asked_for(), 2);
}
