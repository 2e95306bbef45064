//! Where a cluster lives.
//!
//! ```text
//! <base>/<major>/       of this user; as root, the server's user may pass through but not write
//!   lock                held while the cluster is created, joined, started; holds the <key>
//!   users/              an empty file for each use: <pid>-<start of the process>-<n>
//!   watcher             who watches which server
//!   stopping            the watcher is about to stop the server
//!   log                 of the server, which holds a lock on it for as long as it runs
//!   data/ socket-<key>/ of the server's user, closed to others
//! ```
//!
//! The key differs each time the folder is made anew. A server whose folder was deleted removes its
//! socket when it ends, and must not remove that of the server that took its place.
//!
//! As root, nothing that root writes lies in a folder another user can write.

use std::env;
use std::fs::{self, DirBuilder, File, Permissions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::account::{self, Account};
use crate::options::Profile;
use crate::{Error, Options};

/// The port is part of the socket's name only.
const SOCKET_NAME: &str = ".s.PGSQL.5432";
const LONGEST_SOCKET_PATH: usize = 103;
/// As long as every key.
const NO_KEY: &str = "0000";
const SHARED_MEMORY: &str = "/dev/shm";
const SHARED_MEMORY_NEEDED: u64 = 1 << 30;

/// The folder of a cluster, and who may do what in it.
#[derive(Debug)]
pub(crate) struct Place {
    /// Absolute and without symbolic links, so that it compares equal to what processes report.
    folder: PathBuf,
    /// Where the socket is, once the place was locked; until then without its key.
    pub(crate) socket: PathBuf,
    pub(crate) account: Option<Account>,
}

impl Place {
    /// Whether the cluster of `options` has been made. Makes nothing, unless it is one for tests.
    pub(crate) fn is_made(options: &Options, major: u32) -> Result<bool, Error> {
        let uid = account::own_uid()?;
        let name = name(options, major);
        let base = match (chosen_base(options), options.profile) {
            (Some(folder), _) => folder,
            (None, Profile::Dev) => dev_base(uid)?,
            (None, Profile::Test) => usual_base(options.profile, uid, &name)?,
        };
        // It gets this name once it is complete.
        Ok(base.join(name).join("data").exists())
    }

    /// Decides where the cluster of `options` lives, and creates the folder if it is missing.
    pub(crate) fn locate(options: &Options, major: u32) -> Result<Self, Error> {
        let uid = account::own_uid()?;
        let account = account::server_account(uid)?;
        let name = name(options, major);
        let chosen = chosen_base(options);
        let base = match &chosen {
            Some(folder) => std::path::absolute(folder)
                .map_err(Error::io(format!("find {}", folder.display())))?,
            None => usual_base(options.profile, uid, &name)?,
        };
        fs::create_dir_all(&base)
            .map_err(Error::io(format!("create folder {}", base.display())))?;
        let base = base
            .canonicalize()
            .map_err(Error::io(format!("find {}", base.display())))?;
        let folder = base.join(name);
        own_folder(&folder, uid)?;
        create(&folder.join("users"), 0o700)?;

        let mut socket = folder.join("socket");
        if let Err(error) = check_socket_path(&socket) {
            // Where the user has chosen the folder, everything is in it or nothing is.
            if chosen.is_some() {
                return Err(error);
            }
            socket = PathBuf::from(format!("/tmp/nexus-{uid}"));
            own_folder(&socket, uid)?;
            socket.push(fingerprint(&folder));
        }
        let account = account.map(|account| account.or_owner_of(&folder.join("data")));
        Ok(Self {
            folder,
            socket,
            account,
        })
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    pub(crate) fn users(&self) -> PathBuf {
        self.folder.join("users")
    }

    pub(crate) fn watcher(&self) -> PathBuf {
        self.folder.join("watcher")
    }

    pub(crate) fn stopping(&self) -> PathBuf {
        self.folder.join("stopping")
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until nobody else creates, joins or starts this cluster. Dropping the file ends it.
    pub(crate) fn lock(&mut self) -> Result<File, Error> {
        let path = self.folder.join("lock");
        loop {
            let file = open_private(&path)?;
            file.lock()
                .map_err(Error::io(format!("lock {}", path.display())))?;
            // Somebody may have deleted the folder in the meantime: that lock excludes nobody.
            let locked = file
                .metadata()
                .map_err(Error::io(format!("examine {}", path.display())))?;
            if fs::metadata(&path)
                .is_ok_and(|found| (found.dev(), found.ino()) == (locked.dev(), locked.ino()))
            {
                self.socket = with_key(&self.socket, &key_in(&file, &path)?);
                return Ok(file);
            }
            own_folder(&self.folder, locked.uid())?;
            create(&self.users(), 0o700)?;
        }
    }

    /// The server's log, to be locked by the server. Created if missing.
    pub(crate) fn open_log(&self) -> Result<File, Error> {
        open_private(&self.log())
    }

    /// An empty folder that only the server's user can use, whatever was there before.
    pub(crate) fn empty_folder(&self, path: &Path) -> Result<(), Error> {
        remove_all(path)?;
        create(path, 0o700)?;
        if let Some(account) = &self.account {
            chown(path, Some(account.uid), Some(account.gid)).map_err(|source| {
                match source.raw_os_error() {
                    Some(1 | 22) => Error::CannotSwitch {
                        user: account.name.clone(),
                        source,
                    },
                    _ => Error::Io {
                        attempt: format!("give {} to user '{}'", path.display(), account.name),
                        source,
                    },
                }
            })?;
        }
        Ok(())
    }

    /// Removes clusters that were never finished, because whoever created them was killed.
    pub(crate) fn remove_unfinished(&self) -> Result<(), Error> {
        let entries = fs::read_dir(&self.folder)
            .map_err(Error::io(format!("list {}", self.folder.display())))?;
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with("data.new") {
                remove_all(&entry.path())?;
            }
        }
        Ok(())
    }
}

fn name(options: &Options, major: u32) -> String {
    match options.profile {
        Profile::Dev => major.to_string(),
        Profile::Test => format!("{major}-test"),
    }
}

/// Where clusters are to live, if somebody says so.
fn chosen_base(options: &Options) -> Option<PathBuf> {
    options.data_folder.clone().or_else(|| {
        env::var_os("NEXUS_PG_DATA")
            .filter(|folder| !folder.is_empty())
            .map(PathBuf::from)
    })
}

/// Where those of running programs live otherwise.
fn dev_base(uid: u32) -> Result<PathBuf, Error> {
    let project = project()?;
    Ok(if uid == 0 {
        Path::new("/var/tmp/nexus-0").join(fingerprint(&project))
    } else {
        project.join(".nexus").join("pg")
    })
}

/// Where clusters live when nobody says otherwise. Makes the folder around it.
fn usual_base(profile: Profile, uid: u32, name: &str) -> Result<PathBuf, Error> {
    let private_in = |parent: &str| {
        let folder = Path::new(parent).join(format!("nexus-{uid}"));
        own_folder(&folder, uid).map(|()| folder)
    };
    match profile {
        Profile::Dev if uid == 0 => {
            private_in("/var/tmp")?;
            dev_base(uid)
        }
        Profile::Dev => {
            let folder = project()?.join(".nexus");
            create(&folder, 0o755)?;
            let ignore = folder.join(".gitignore");
            if !ignore.exists() {
                fs::write(&ignore, "*\n")
                    .map_err(Error::io(format!("write {}", ignore.display())))?;
            }
            dev_base(uid)
        }
        Profile::Test => {
            // A cluster that is there stays in use when less is free, or there would be a second one.
            let running = format!("{SHARED_MEMORY}/nexus-{uid}/{name}/data/postmaster.pid");
            if Path::new(&running).exists() || has_shared_memory() {
                private_in(SHARED_MEMORY)
            } else if uid == 0 {
                private_in("/var/tmp")
            } else {
                Ok(target_folder()?.join("nexus-pg"))
            }
        }
    }
}

/// The nearest folder, from the current one upwards, with `Cargo.lock` or `.git`; else the current one.
fn project() -> Result<PathBuf, Error> {
    let current = env::current_dir().map_err(Error::io("find the current folder"))?;
    let project = current
        .ancestors()
        .find(|folder| folder.join("Cargo.lock").exists() || folder.join(".git").exists())
        .unwrap_or(&current);
    Ok(project.to_owned())
}

/// Cargo's `target` folder: around this program, else where Cargo would put it.
fn target_folder() -> Result<PathBuf, Error> {
    let program = env::current_exe().unwrap_or_default();
    if let Some(folder) = program
        .ancestors()
        .skip(1)
        .find(|folder| folder.join("CACHEDIR.TAG").exists())
    {
        return Ok(folder.to_owned());
    }
    match env::var_os("CARGO_TARGET_DIR").filter(|folder| !folder.is_empty()) {
        Some(folder) => {
            std::path::absolute(folder).map_err(Error::io("find the folder in CARGO_TARGET_DIR"))
        }
        None => Ok(project()?.join("target")),
    }
}

/// Whether a test cluster fits into memory. The standard library cannot ask; `df` can.
fn has_shared_memory() -> bool {
    if !Path::new(SHARED_MEMORY).is_dir() {
        return false;
    }
    let Ok(output) = Command::new("df")
        .args(["-Pk", SHARED_MEMORY])
        .stdin(Stdio::null())
        .output()
    else {
        return false;
    };
    let free_kib = String::from_utf8_lossy(&output.stdout)
        .lines()
        .last()
        .and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
    free_kib.is_some_and(|kib| kib >= SHARED_MEMORY_NEEDED / 1024)
}

/// The key of the cluster whose lock is `file`.
fn key_in(mut file: &File, path: &Path) -> Result<String, Error> {
    let attempt = || format!("read or write {}", path.display());
    let mut key = String::new();
    file.read_to_string(&mut key)
        .map_err(Error::io(attempt()))?;
    if key.len() != NO_KEY.len() {
        // It is new, or whoever made it was killed before it had written the key.
        let random = RandomState::new().build_hasher().finish();
        key = format!("{:04x}", random & 0xffff);
        file.set_len(0)
            .and_then(|()| file.write_all(key.as_bytes()))
            .map_err(Error::io(attempt()))?;
    }
    Ok(key)
}

fn with_key(socket: &Path, key: &str) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push("-");
    path.push(key);
    path.into()
}

fn check_socket_path(socket: &Path) -> Result<(), Error> {
    let length = with_key(socket, NO_KEY).join(SOCKET_NAME).as_os_str().len();
    if length > LONGEST_SOCKET_PATH {
        return Err(Error::SocketPath { length });
    }
    Ok(())
}

/// Creates the folder, or makes sure that nobody else has: some parents are open to everybody.
fn own_folder(path: &Path, uid: u32) -> Result<(), Error> {
    // The server's user must get through root's folders, to those that are its own.
    let mode = if uid == 0 { 0o711 } else { 0o700 };
    create(path, mode)?;
    let found =
        fs::symlink_metadata(path).map_err(Error::io(format!("examine {}", path.display())))?;
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        return Err(Error::NotOurs {
            folder: path.to_owned(),
        });
    }
    Ok(())
}

fn create(path: &Path, mode: u32) -> Result<(), Error> {
    match DirBuilder::new().mode(mode).create(path) {
        // The user's umask took some of the mode away.
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(mode)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
    .map_err(Error::io(format!("create folder {}", path.display())))
}

fn open_private(path: &Path) -> Result<File, Error> {
    File::options()
        .create(true)
        .read(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io(format!("open {}", path.display())))
}

pub(crate) fn remove_all(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::Io {
            attempt: format!("remove {}", path.display()),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// A short name for a path: 64-bit FNV-1a, which stays the same from one compiler to the next.
fn fingerprint(path: &Path) -> String {
    let hash = path
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_of_103_bytes_is_the_longest() {
        let socket = |length: usize| {
            let rest = "/".len() + "-0000/".len() + SOCKET_NAME.len();
            PathBuf::from(format!("/{}", "a".repeat(length - rest)))
        };
        assert!(check_socket_path(&socket(103)).is_ok());
        assert_eq!(
            check_socket_path(&socket(104))
                .expect_err("it is too long")
                .to_string(),
            "socket path is 104 bytes, the limit is 103: set NEXUS_PG_DATA to a shorter folder"
        );
    }

    #[test]
    fn names_folders_the_same_everywhere() {
        assert_eq!(fingerprint(Path::new("")), "cbf29ce484222325");
        assert_eq!(fingerprint(Path::new("a")), "af63dc4c8601ec8c");
    }
}
