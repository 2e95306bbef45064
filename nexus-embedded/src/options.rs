//! What a caller can choose.

use std::path::PathBuf;
use std::time::Duration;

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
pub struct Options {
    #[cfg_attr(not(unix), expect(dead_code, reason = "there is no server to choose"))]
    pub(crate) profile: Profile,
    pub(crate) data_folder: Option<PathBuf>,
    pub(crate) grace: Duration,
    pub(crate) search_in: Option<Vec<PathBuf>>,
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
    /// The data may vanish whenever no server runs. A cluster that no longer starts is replaced
    /// by an empty one.
    #[must_use]
    pub fn test() -> Self {
        Self::new(Profile::Test, Duration::from_secs(30))
    }

    fn new(profile: Profile, grace: Duration) -> Self {
        Self {
            profile,
            data_folder: None,
            grace,
            search_in: None,
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

    /// Looks for PostgreSQL in these folders and nowhere else. `NEXUS_PG_BIN` still wins.
    ///
    /// For programs that bring their own PostgreSQL. Each folder is a `bin` folder.
    #[must_use]
    pub fn search_in(mut self, folders: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        self.search_in = Some(folders.into_iter().map(Into::into).collect());
        self
    }
}
