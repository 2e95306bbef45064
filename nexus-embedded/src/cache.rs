//! The PostgreSQL that were downloaded, for all programs of a user.
//!
//! ```text
//! <cache>/
//!   lock                     held while one is downloaded; nothing else needs it
//!   <version>-<platform>/    bin, lib, share; appears complete or not at all
//!   new-<pid>/               one that is being unpacked, or was when its process was killed
//! ```
//!
//! Everything in it can be deleted while no server runs from it.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::account;
use crate::discovery::{self, Binaries};
use crate::{Error, NoDownload};

/// Where caches of users are, below their home; and that of root, whose home others cannot enter.
const USUAL: (&str, &str) = if cfg!(target_os = "macos") {
    ("Library/Caches", "/Library/Caches")
} else {
    (".cache", "/var/cache")
};

/// The folder of what was downloaded. It need not exist.
#[derive(Debug)]
pub(crate) struct Cache {
    pub(crate) folder: PathBuf,
}

impl Cache {
    /// The cache of this user; `None` if it has no home.
    pub(crate) fn locate() -> Result<Option<Self>, Error> {
        let uid = account::own_uid()?;
        let folder = folder(uid, |name| env::var_os(name).map(PathBuf::from));
        let folder = folder.map(std::path::absolute).transpose();
        let folder = folder.map_err(Error::io("find the folder of downloads"))?;
        Ok(folder.map(|folder| Self { folder }))
    }

    /// The newest of this major version.
    ///
    /// # Errors
    ///
    /// One is there but cannot be used. It is not for us to replace: if it was downloaded for a
    /// system it does not run on, it would be downloaded at every start.
    pub(crate) fn find(&self, major: u32) -> Result<Option<Binaries>, NoDownload> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(NoDownload::Failed {
                    cause: format!(
                        "could not list {}: {error}; set NEXUS_PG_CACHE to another folder",
                        self.folder.display()
                    ),
                });
            }
        };
        let newest = entries
            .flatten()
            .filter_map(|entry| {
                let version = version_in(entry.file_name().to_str()?)?;
                (version[0] == major).then_some((version, entry.path()))
            })
            // What somebody has deleted a part of is replaced.
            .filter(|(_, folder)| has_programs(folder))
            .max();
        let Some((_, folder)) = newest else {
            return Ok(None);
        };
        discovery::examine(&folder.join("bin"))
            .map(Some)
            .map_err(|reason| NoDownload::Failed {
                cause: format!(
                    "{} is what was downloaded before, but {reason}: delete that folder to have it downloaded again",
                    folder.display()
                ),
            })
    }

    /// Where this version belongs.
    #[cfg(feature = "download")]
    pub(crate) fn place_of(&self, version: &str) -> PathBuf {
        self.folder.join(format!("{version}-{}", platform()))
    }
}

/// Where a user's cache is, by the variables of the environment.
fn folder(uid: u32, variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let is_set = |folder: &PathBuf| !folder.as_os_str().is_empty();
    if let Some(folder) = variable("NEXUS_PG_CACHE").filter(is_set) {
        return Some(folder);
    }
    let base = if uid == 0 {
        Some(PathBuf::from(USUAL.1))
    } else {
        // A relative path in these means nothing.
        let of_caches = variable("XDG_CACHE_HOME").filter(|folder| folder.is_absolute());
        let home = variable("HOME").filter(|folder| folder.is_absolute());
        of_caches.or_else(|| Some(home?.join(USUAL.0)))
    };
    base.map(|base| base.join("nexus/pg"))
}

pub(crate) fn has_programs(folder: &Path) -> bool {
    let bin = folder.join("bin");
    bin.join("initdb").is_file() && bin.join("postgres").is_file()
}

/// 18.1.0 in the name `18.1.0-x86_64-linux-gnu`, where that is this platform.
fn version_in(name: &str) -> Option<[u32; 3]> {
    let (version, platform_in_name) = name.split_once('-')?;
    if platform_in_name != platform() {
        return None;
    }
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let version = [numbers.next()??, numbers.next()??, numbers.next()??];
    numbers.next().is_none().then_some(version)
}

/// What a program must be built for to run here, and to find its libraries.
fn platform() -> String {
    let libc = if cfg!(target_env = "musl") {
        "-musl"
    } else if cfg!(target_env = "gnu") {
        "-gnu"
    } else {
        ""
    };
    format!("{}-{}{libc}", env::consts::ARCH, env::consts::OS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_keeps_downloads_where_others_can_enter_and_users_in_their_home() {
        let place = |uid, set: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = set.iter().find(|(set, _)| *set == name);
                found.map(|(_, value)| PathBuf::from(value))
            };
            folder(uid, variable).map(|folder| folder.display().to_string())
        };
        let home = ("HOME", "/home/ada");
        let of_home = format!("/home/ada/{}/nexus/pg", USUAL.0);
        let of_root = format!("{}/nexus/pg", USUAL.1);
        assert_eq!(place(7, &[home]), Some(of_home.clone()));
        assert_eq!(place(0, &[home, ("XDG_CACHE_HOME", "/x")]), Some(of_root));
        for (value, expected) in [("/x", "/x/nexus/pg"), ("x", &of_home), ("", &of_home)] {
            let found = place(7, &[home, ("XDG_CACHE_HOME", value)]);
            assert_eq!(found.as_deref(), Some(expected), "{value:?}");
        }
        for uid in [0, 7] {
            let found = place(uid, &[home, ("NEXUS_PG_CACHE", "here")]);
            assert_eq!(found.as_deref(), Some("here"));
        }
        assert_eq!(place(7, &[("NEXUS_PG_CACHE", ""), ("HOME", "")]), None);
    }

    #[test]
    fn only_complete_names_for_this_platform_are_versions() {
        let platform = platform();
        assert_eq!(version_in(&format!("18.1.0-{platform}")), Some([18, 1, 0]));
        for name in [
            format!("18.1-{platform}"),
            format!("18.1.0.0-{platform}"),
            format!("new-{platform}"),
            "18.1.0-vax-ultrix".to_owned(),
            "18.1.0".to_owned(),
            "lock".to_owned(),
        ] {
            assert_eq!(version_in(&name), None, "{name}");
        }
    }
}
