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
        let named = |variable| env::var_os(variable).filter(|folder| !folder.is_empty());
        if let Some(folder) = named("NEXUS_PG_CACHE") {
            let folder = std::path::absolute(&folder)
                .map_err(Error::io("find the folder in NEXUS_PG_CACHE"))?;
            return Ok(Some(Self { folder }));
        }
        let base = if account::own_uid()? == 0 {
            Some(PathBuf::from(USUAL.1))
        } else {
            named("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| Some(Path::new(&named("HOME")?).join(USUAL.0)))
                .filter(|folder| folder.is_absolute())
        };
        Ok(base.map(|base| Self {
            folder: base.join("nexus/pg"),
        }))
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
