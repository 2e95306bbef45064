//! What a caller can choose.

use std::path::PathBuf;
use std::time::Duration;

/// The newest that nexus supports.
const DEFAULT_MAJOR: u32 = 18;

/// Which embedded server to use, and how.
///
/// Start from [`Options::dev`] or [`Options::test`]; the crate documentation compares them.
///
/// # Examples
///
/// ```
/// use nexus_embedded::Options;
/// use std::time::Duration;
///
/// let options = Options::test().grace(Duration::from_secs(5));
/// ```
#[derive(Debug, Clone)]
#[cfg_attr(
    not(all(unix, feature = "download")),
    allow(
        dead_code,
        reason = "without a server, or a download, there is less to choose"
    )
)]
pub struct Options {
    pub(crate) profile: Profile,
    pub(crate) data_folder: Option<PathBuf>,
    pub(crate) grace: Duration,
    pub(crate) settings: Vec<String>,
    pub(crate) search_in: Option<Vec<PathBuf>>,
    pub(crate) download_major: u32,
    pub(crate) offline: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Durable, one cluster per project.
    Dev,
    /// Fast and disposable, one cluster per user.
    Test,
}

impl Options {
    /// For running programs: data is kept in the project and is durable; grace of 3 seconds.
    #[must_use]
    pub fn dev() -> Self {
        Self::new(Profile::Dev, Duration::from_secs(3))
    }

    /// For tests: fast, shared by all tests of this user, not durable; grace of 30 seconds.
    ///
    /// A server that is killed loses what was committed last, and the data may vanish whenever no
    /// server runs. A cluster that no longer starts is replaced by an empty one.
    #[must_use]
    pub fn test() -> Self {
        Self::new(Profile::Test, Duration::from_secs(30))
    }

    fn new(profile: Profile, grace: Duration) -> Self {
        Self {
            profile,
            data_folder: None,
            grace,
            settings: Vec::new(),
            search_in: None,
            download_major: DEFAULT_MAJOR,
            offline: false,
        }
    }

    /// Keeps clusters below this folder, whatever `NEXUS_PG_DATA` says.
    ///
    /// The cluster gets a subfolder of its own, named for the major version. The folder is created
    /// if it is missing. A relative path counts from the current folder.
    #[must_use]
    pub fn data_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.data_folder = Some(folder.into());
        self
    }

    /// How long the server outlives its last user, give or take half a second.
    ///
    /// Counts when this call starts the server. A server that is joined keeps its grace.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Starts the server with this setting of PostgreSQL, such as `shared_buffers` with `1GB`.
    ///
    /// Counts when this call starts the server. A server that is joined keeps its settings.
    #[must_use]
    pub fn setting(mut self, name: impl std::fmt::Display, value: impl std::fmt::Display) -> Self {
        self.settings.push(format!("{name}={value}"));
        self
    }

    /// Looks for PostgreSQL in these folders, and not where installers put it.
    ///
    /// Each folder is a `bin` folder. `NEXUS_PG_BIN` still comes first, the cache and a download
    /// after them. A program that brings its own PostgreSQL adds [`offline`](Self::offline). No
    /// folder at all means: what is downloaded, whatever the machine has.
    #[must_use]
    pub fn search_in(mut self, folders: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        self.search_in = Some(folders.into_iter().map(Into::into).collect());
        self
    }

    /// The major version to take from the cache or to download where none is found; default 18.
    ///
    /// Of it the newest release is downloaded, and then kept: what is in the cache is not renewed.
    #[must_use]
    pub fn download_major(mut self, major: u32) -> Self {
        self.download_major = major;
        self
    }

    /// Downloads nothing, as with `NEXUS_PG_OFFLINE=1`. What was downloaded before is used.
    #[must_use]
    pub fn offline(mut self) -> Self {
        self.offline = true;
        self
    }
}
