//! What can be said of an app without a database, each as one line of a test.

use std::{
    env,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    app::{App, Catalogue},
    registry::LINK_ITS_CRATE,
};

/// The variable that makes [`assert_catalogue`] write the file.
const VARIABLE: &str = "NEXUS_CATALOGUE";

/// Fails unless everything of the app fits together: [`App::validate`] as a test.
///
/// It finds what no compiler can see, such as two crates that use one event type, before a start does.
/// Give it the app as the program makes it, with its states.
///
/// # Examples
///
/// ```standalone_crate
/// use nexus::prelude::*;
///
/// nexus::testing::assert_valid(&App::discover());
/// ```
///
/// # Panics
///
/// If something does not fit, with all that does not.
#[track_caller]
pub fn assert_valid(app: &App) {
    if let Err(problems) = app.validate() {
        panic!("{problems}");
    }
}

/// Fails if an event type, handler or scheduled task of the app is not what a committed file says: a rename in
/// Rust that would change a stored name is a failing test.
///
/// `path` is relative to the package of the test. Write the file, and write it again after a change that is
/// meant, by `NEXUS_CATALOGUE=overwrite cargo test`, and commit it. Name it `nexus.catalogue.json`, so that others
/// find it. See [`Catalogue`] for what is in it.
///
/// # Examples
///
/// ```no_run
/// # use nexus::prelude::*;
/// #[test]
/// fn stored_names_have_not_changed() {
///     nexus::testing::assert_catalogue(&App::discover().name("billing"), "nexus.catalogue.json");
/// }
/// ```
///
/// # Panics
///
/// If something differs, with what, and what to do about it; if the file is not there or cannot be
/// read; and if `NEXUS_CATALOGUE` has another value than `overwrite`.
#[track_caller]
pub fn assert_catalogue(app: &App, path: impl AsRef<Path>) {
    let path = absolute(path.as_ref());
    let overwrite = match env::var_os(VARIABLE) {
        None => false,
        Some(value) if value == "overwrite" => true,
        Some(value) => panic!(
            "{VARIABLE} is `{}`, only `overwrite` means something",
            value.display()
        ),
    };
    if let Err(text) = check(app, &path, overwrite) {
        panic!("{text}");
    }
}

/// Cargo and nextest tell a test its package. By hand it runs from where it stands.
fn absolute(path: &Path) -> PathBuf {
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let base = package.or_else(|| env::current_dir().ok());
    base.map_or_else(|| path.to_owned(), |base| base.join(path))
}

fn check(app: &App, path: &Path, overwrite: bool) -> Result<(), String> {
    let catalogue = app.catalogue();
    let shown = path.display();
    let how = format!("run `{VARIABLE}=overwrite cargo test` and commit the file");
    if overwrite {
        let text = catalogue.to_string();
        // Unchanged, it keeps its time, by which build scripts go.
        if fs::read_to_string(path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        return fs::write(path, text).map_err(|error| format!("cannot write {shown}: {error}"));
    }
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(format!("there is no {shown}: to write it, {how}"));
        }
        Err(error) => return Err(format!("cannot read {shown}: {error}")),
    };
    let committed: Catalogue = text.parse().map_err(|error: crate::app::CatalogueError| {
        let reason = std::error::Error::source(&error).map(ToString::to_string);
        format!(
            "{shown} is {error} ({}): to write it again, {how}",
            reason.unwrap_or_default()
        )
    })?;
    let differences = catalogue.differences(&committed);
    if differences.is_empty() {
        return Ok(());
    }
    let mut message = format!("the app is not what {shown} says:");
    for difference in &differences {
        let _ = write!(message, "\n  - {difference}");
    }
    let _ = write!(message, "\nIf all of this is meant, {how}.");
    if app.is_discovered() {
        let _ = write!(
            message,
            " Where something is missing that the source has: {LINK_ITS_CRATE}."
        );
    }
    Err(message)
}
