//! Which user the server runs as, and how its programs are called.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

/// A user to become, because this process is root and PostgreSQL refuses root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The user this process runs as.
pub(crate) fn own_uid() -> Result<u32, Error> {
    let printed = Command::new("id")
        .arg("-u")
        .stdin(Stdio::null())
        .output()
        .ok()
        .and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse().ok());
    match printed {
        Some(uid) => Ok(uid),
        // A small system without `id` has this folder, which belongs to the effective user.
        None => fs::metadata("/proc/self")
            .map(|folder| folder.uid())
            .map_err(Error::io("find out which user this is by `id -u`")),
    }
}

/// Who runs PostgreSQL on behalf of `own_uid`; `None` means that it is this user.
pub(crate) fn server_account(own_uid: u32) -> Result<Option<Account>, Error> {
    if own_uid != 0 {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    preferred(&users).map(Some).ok_or(Error::NoAccount)
}

fn preferred(users: &str) -> Option<Account> {
    ["postgres", "_postgres", "nobody"]
        .iter()
        .find_map(|name| accounts(users).find(|account| account.name == *name && account.uid != 0))
}

/// The lines of `/etc/passwd`: `name:password:uid:gid:…`.
fn accounts(users: &str) -> impl Iterator<Item = Account> {
    users.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        // macOS writes the numbers of `nobody` as -2.
        let mut number = |skip| -> Option<u32> {
            let number: i64 = fields.nth(skip)?.parse().ok()?;
            u32::try_from(number.rem_euclid(1 << 32)).ok()
        };
        Some(Account {
            name,
            uid: number(1)?,
            gid: number(0)?,
        })
    })
}

impl Account {
    /// The account that made an existing cluster, which is the only one that can serve it.
    ///
    /// It differs from the preferred one when `postgres` was created after `nobody` had been used.
    pub(crate) fn or_owner_of(self, data: &Path) -> Self {
        let Ok(folder) = fs::symlink_metadata(data) else {
            return self;
        };
        if folder.uid() == 0 || folder.uid() == self.uid {
            return self;
        }
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        accounts(&users)
            .find(|account| account.uid == folder.uid())
            .unwrap_or_else(|| Self {
                name: folder.uid().to_string(),
                uid: folder.uid(),
                gid: folder.gid(),
            })
    }
}

/// A call of `program` as the user the server runs as, with nothing of the caller's PostgreSQL settings.
pub(crate) fn command(program: impl AsRef<Path>, account: Option<&Account>) -> Command {
    let mut command = Command::new(program.as_ref());
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"PG") {
            command.env_remove(name);
        }
    }
    // Messages in English; and on macOS a server without a locale variable refuses to start.
    command.env("LC_ALL", "C");
    // Another user may not be able to enter the current folder.
    command.current_dir("/").stdin(Stdio::null());
    if let Some(account) = account {
        command.uid(account.uid).gid(account.gid);
    }
    command
}

/// What a failed call of [`command`] means.
pub(crate) fn call_failed(program: &Path, account: Option<&Account>, source: io::Error) -> Error {
    match (account, source.raw_os_error()) {
        // EPERM and EINVAL come from changing the user; starting a program gives neither.
        (Some(account), Some(1 | 22)) => Error::CannotSwitch {
            user: account.name.clone(),
            source,
        },
        (Some(account), Some(13)) => Error::CannotRun {
            user: account.name.clone(),
            path: program.to_owned(),
        },
        _ => Error::Io {
            attempt: format!("run {}", program.display()),
            source,
        },
    }
}

/// The first folder on the way to `folder` that `account` cannot enter.
///
/// Asked as that user, because permissions are more than mode bits.
pub(crate) fn first_closed(folder: &Path, account: &Account) -> Result<Option<PathBuf>, Error> {
    let mut way: Vec<&Path> = folder.ancestors().collect();
    way.reverse();
    let shell = Path::new("/bin/sh");
    let status = command(shell, Some(account))
        .args([
            "-c",
            "n=0; for folder; do n=$((n + 1)); [ -x \"$folder\" ] || exit $n; done",
            "sh",
        ])
        .args(&way)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|source| call_failed(shell, Some(account), source))?;
    Ok(match status.code() {
        Some(0) => None,
        Some(n) => Some(
            usize::try_from(n - 1)
                .ok()
                .and_then(|n| way.get(n))
                .unwrap_or(&folder)
                .to_path_buf(),
        ),
        None => Some(folder.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_is_preferred_to_nobody_and_root_is_never_chosen() {
        let nobody =
            "root:x:0:0:root:/root:/bin/sh\nnobody:*:-2:-2:Nobody:/var/empty:/usr/bin/false\n";
        let account = preferred(nobody).expect("there is nobody");
        assert_eq!(
            (account.name.as_str(), account.uid, account.gid),
            ("nobody", 4_294_967_294, 4_294_967_294)
        );

        let both = format!("{nobody}postgres:x:101:104::/var/lib/postgresql:/bin/bash\n");
        let account = preferred(&both).expect("there is postgres");
        assert_eq!(
            (account.name.as_str(), account.uid, account.gid),
            ("postgres", 101, 104)
        );

        assert_eq!(
            preferred("root:x:0:0:root:/root:/bin/sh\npostgres:x:0:0::/:/bin/sh\n"),
            None
        );
    }
}
