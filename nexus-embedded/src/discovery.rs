//! Finding a PostgreSQL on this machine.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::account;
use crate::cache::Cache;
use crate::{Error, NoDownload, Options};

const OLDEST_MAJOR: u32 = 15;

/// Where installers put PostgreSQL. One `*` stands for any characters within a folder's name.
const USUAL_PLACES: [&str; 7] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql*/bin",
];

/// A folder with `initdb` and `postgres`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binaries {
    pub(crate) folder: PathBuf,
    pub(crate) major: u32,
}

pub(crate) fn find(options: &Options) -> Result<Binaries, Error> {
    if let Some(folder) = env::var_os("NEXUS_PG_BIN").filter(|folder| !folder.is_empty()) {
        let folder = PathBuf::from(folder);
        return examine(&folder).map_err(|reason| Error::Binaries { folder, reason });
    }
    let mut looked_in = Vec::new();
    let found = if let Some(folders) = &options.search_in {
        looked_in.extend(folders.iter().map(|folder| folder.display().to_string()));
        newest(&mut looked_in, folders.clone())
    } else {
        let places = ["PATH", "pg_config --bindir"].iter().chain(&USUAL_PLACES);
        looked_in.extend(places.map(ToString::to_string));
        newest(&mut looked_in, everywhere())
    };
    if let Some(found) = found {
        return Ok(found);
    }
    let cache = Cache::locate()?;
    if let Some(cache) = &cache {
        looked_in.push(cache.folder.display().to_string());
    }
    cached(options, cache.as_ref()).map_err(|download| Error::NotFound {
        looked_in,
        download,
    })
}

/// What was downloaded before, or is now.
fn cached(options: &Options, cache: Option<&Cache>) -> Result<Binaries, NoDownload> {
    if let Some(cache) = cache
        && let Some(found) = cache.find(options.download_major)?
    {
        return Ok(found);
    }
    #[cfg(not(feature = "download"))]
    return Err(NoDownload::NotBuilt);
    #[cfg(feature = "download")]
    {
        let forbids = |value: std::ffi::OsString| !value.is_empty() && value != "0";
        if options.offline || env::var_os("NEXUS_PG_OFFLINE").is_some_and(forbids) {
            return Err(NoDownload::Forbidden);
        }
        let cache = cache.ok_or_else(|| NoDownload::Failed {
            cause: "this user has no home to keep it in; set NEXUS_PG_CACHE to a folder".to_owned(),
        })?;
        crate::download::download(cache, options.download_major)
    }
}

/// The newest of the `folders`; of equals the first, as what is in `PATH` is what the user works with.
/// Adds to `looked_in` what is wrong with the others.
fn newest(looked_in: &mut Vec<String>, folders: Vec<PathBuf>) -> Option<Binaries> {
    let mut seen = Vec::new();
    let mut best: Option<Binaries> = None;
    for folder in folders {
        let Ok(postgres) = folder.join("postgres").canonicalize() else {
            continue;
        };
        // A link in /usr/local/bin leads to the folder that has all the programs.
        let folder = match postgres.parent() {
            Some(real) if real.join("initdb").is_file() => real.to_owned(),
            _ => folder,
        };
        if seen.contains(&postgres) {
            continue;
        }
        seen.push(postgres);
        match examine(&folder) {
            Ok(found) if best.as_ref().is_none_or(|best| best.major < found.major) => {
                best = Some(found);
            }
            Ok(_) => {}
            Err(reason) => looked_in.push(format!("{} ({reason})", folder.display())),
        }
    }
    best
}

fn everywhere() -> Vec<PathBuf> {
    let mut folders = in_path("postgres");
    if !in_path("pg_config").is_empty()
        && let Ok(output) = account::command("pg_config", None).arg("--bindir").output()
    {
        folders.push(PathBuf::from(
            String::from_utf8_lossy(&output.stdout).trim(),
        ));
    }
    folders.extend(USUAL_PLACES.iter().flat_map(|place| expand(place)));
    folders.retain(|folder| folder.is_absolute());
    folders
}

/// The folders in `PATH` that hold `program`.
fn in_path(program: &str) -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .filter(|folder| folder.join(program).is_file())
        .collect()
}

/// The folders that `pattern` stands for.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let (before, after) = pattern
        .split_once('*')
        .expect("each of the usual places has one");
    let (parent, prefix) = before
        .rsplit_once('/')
        .expect("each of the usual places is absolute");
    let rest = after.trim_start_matches('/');
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path().join(rest))
        .collect()
}

/// The PostgreSQL in `folder`, or what is wrong with it.
pub(crate) fn examine(folder: &Path) -> Result<Binaries, String> {
    let folder = std::path::absolute(folder).map_err(|error| error.to_string())?;
    for program in ["initdb", "postgres"] {
        if !folder.join(program).is_file() {
            return Err(format!("there is no {program}"));
        }
    }
    let output = account::command(folder.join("postgres"), None)
        .arg("--version")
        .output()
        .map_err(|error| format!("its postgres does not run: {error}"))?;
    let version = String::from_utf8_lossy(&output.stdout);
    let version = version.trim();
    match major_of(version) {
        Some(major) if major >= OLDEST_MAJOR => Ok(Binaries { folder, major }),
        Some(major) => Err(format!("that is PostgreSQL {major}")),
        None => Err(format!(
            "its postgres does not tell its version, but {version:?}"
        )),
    }
}

/// 15 in `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`, 19 in `postgres (PostgreSQL) 19devel`.
fn major_of(version: &str) -> Option<u32> {
    let (_, number) = version.split_once("(PostgreSQL) ")?;
    let digits = number
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(number.len());
    number[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder whose `postgres` says that it is this version.
    fn fake(version: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder for a test");
        for program in ["initdb", "postgres"] {
            // In a process of its own: a child that another test starts while the file is open
            // for writing would make it busy.
            let status = std::process::Command::new("/bin/sh")
                .args([
                    "-c",
                    "printf '#!/bin/sh\\necho \"%s\"\\n' \"$1\" >\"$0\" && chmod 755 \"$0\"",
                ])
                .arg(folder.path().join(program))
                .arg(format!("postgres (PostgreSQL) {version}"))
                .status();
            assert!(status.expect("there is a shell").success());
        }
        folder
    }

    #[test]
    fn takes_the_newest_that_is_not_too_old() {
        let fakes = [fake("14.20"), fake("15.3"), fake("18beta1"), fake("16.9")];
        let folders: Vec<PathBuf> = fakes.iter().map(|fake| fake.path().to_owned()).collect();
        let found = newest(&mut Vec::new(), folders.clone()).expect("three of them are new enough");
        assert_eq!(
            (found.major, found.folder),
            (18, folders[2].canonicalize().expect("it exists"))
        );
    }

    #[test]
    fn an_error_says_what_is_wrong_with_what_was_found() {
        let (old, strange) = (fake("14.20"), fake("of sorts"));
        let folders = vec![
            old.path().to_owned(),
            strange.path().to_owned(),
            PathBuf::from("/nowhere"),
        ];
        let mut looked_in = vec!["PATH".to_owned()];
        assert_eq!(newest(&mut looked_in, folders), None);
        let error = Error::NotFound {
            looked_in,
            download: NoDownload::Forbidden,
        };
        let error = error.to_string();
        assert!(
            error.starts_with("no PostgreSQL 15 or newer found. Looked in: PATH, "),
            "{error}"
        );
        assert!(error.contains("(that is PostgreSQL 14)"), "{error}");
        assert!(
            error.contains(
                "(its postgres does not tell its version, but \"postgres (PostgreSQL) of sorts\")"
            ),
            "{error}"
        );
    }

    #[test]
    fn looks_into_folders_that_have_a_version_in_their_name() {
        let root = tempfile::tempdir().expect("a folder for a test");
        for name in ["postgresql@17", "postgresql", "redis"] {
            fs::create_dir(root.path().join(name)).expect("a folder for a test");
        }
        let pattern = format!("{}/postgresql*/bin", root.path().display());
        let mut found = expand(&pattern);
        found.sort();
        let expected = ["postgresql/bin", "postgresql@17/bin"].map(|name| root.path().join(name));
        assert_eq!(found, expected);
    }

    #[test]
    fn reads_the_version_of_releases_and_of_development_builds() {
        assert_eq!(
            major_of("postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)"),
            Some(15)
        );
        assert_eq!(major_of("postgres (PostgreSQL) 19devel"), Some(19));
        assert_eq!(major_of("postgres (PostgreSQL) 9.6.24"), Some(9));
        assert_eq!(major_of("usage: postgres"), None);
    }
}
