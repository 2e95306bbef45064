use std::{error::Error as StdError, fmt, fmt::Write as _, time::Duration};

use sqlx::{error::DatabaseError, postgres::PgDatabaseError};

/// The result of a handler: `Ok` completes the attempt, `Err` fails it.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

/// Why an attempt failed, and whether another one can help.
///
/// Like `anyhow::Error` it takes any error by `?` and is itself not a `std::error::Error`. What
/// comes in by `?` is [retryable](Kind::Retryable).
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use nexus::{Error, ResultExt};
///
/// fn charge(amount: &str) -> nexus::Result<u64> {
///     // A number that does not parse today will not parse tomorrow: no further attempt.
///     let amount: u64 = amount.parse().permanent()?;
///     if amount > 1_000 {
///         return Err(Error::snooze(Duration::from_secs(60)));
///     }
///     Ok(amount)
/// }
///
/// assert!(charge("ten").unwrap_err().is_permanent());
/// ```
pub struct Error {
    kind: Kind,
    source: Box<dyn StdError + Send + Sync>,
}

/// What is done after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Try again after the handler's backoff, until its attempts are used up.
    Retryable,
    /// Dead-letter at once.
    Permanent,
    /// Try again after this time. The attempt is not counted.
    Snooze(Duration),
    /// The message does not decode into the event; dead-letter at once.
    #[doc(hidden)]
    Undecodable,
}

impl Error {
    /// An error after which another attempt is made.
    pub fn retryable(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            kind: Kind::Retryable,
            source: error.into(),
        }
    }

    /// An error that no further attempt can mend: the message is dead-lettered at once.
    pub fn permanent(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            kind: Kind::Permanent,
            source: error.into(),
        }
    }

    /// Not now: run the handler again after `delay`. Counts as no attempt.
    #[must_use]
    pub fn snooze(delay: Duration) -> Self {
        Self {
            kind: Kind::Snooze(delay),
            source: format!("snoozed for {delay:?}").into(),
        }
    }

    pub(crate) fn undecodable(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            kind: Kind::Undecodable,
            source: error.into(),
        }
    }

    /// What is done after this error.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the message is dead-lettered at once.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        matches!(self.kind, Kind::Permanent | Kind::Undecodable)
    }

    /// The same error, but not worth another attempt.
    #[must_use]
    pub fn into_permanent(self) -> Self {
        Self {
            kind: Kind::Permanent,
            ..self
        }
    }

    /// The error that was given, to downcast it.
    #[must_use]
    pub fn as_source(&self) -> &(dyn StdError + Send + Sync + 'static) {
        &*self.source
    }
}

impl<E: Into<Box<dyn StdError + Send + Sync>>> From<E> for Error {
    fn from(error: E) -> Self {
        Self {
            kind: Kind::Retryable,
            source: error.into(),
        }
    }
}

impl fmt::Display for Error {
    /// The error with all its sources, joined by `: `. Of an error of the server without the line of the
    /// server's own source, with which `sqlx` ends it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&with_sources(&*self.source))
    }
}

/// The text of an error and of all its sources.
pub(crate) fn with_sources(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut said = text.clone();
    let mut of_server = server_error(error);
    let mut source = error.source();
    while let Some(cause) = source {
        // Some errors print their source themselves; saying it twice helps nobody.
        let next = cause.to_string();
        if !said.ends_with(&next) {
            let _ = write!(text, ": {next}");
        }
        said = next;
        of_server = of_server.or_else(|| server_error(cause));
        source = cause.source();
    }
    match of_server {
        // `… at line 1392` is a line of the server's own source, and no use to who reads it.
        Some(error) => text.replace(&error.to_string(), error.message()),
        None => text,
    }
}

/// The error of the server, if `error` is one.
fn server_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a PgDatabaseError> {
    if let Some(error) = error.downcast_ref::<PgDatabaseError>() {
        return Some(error);
    }
    let boxed = match error.downcast_ref::<sqlx::Error>() {
        Some(error) => error.as_database_error(),
        None => error
            .downcast_ref::<Box<dyn DatabaseError>>()
            .map(|error| &**error),
    };
    boxed?.try_downcast_ref()
}

/// `main` prints an error this way, so it reads like `Display`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Says of an error, while it passes through `?`, whether another attempt can help.
pub trait ResultExt<T> {
    /// An error dead-letters the message at once.
    ///
    /// # Errors
    ///
    /// The same error, marked as permanent.
    fn permanent(self) -> Result<T>;

    /// An error runs the handler again after `delay`, without counting an attempt.
    ///
    /// # Errors
    ///
    /// The same error, marked to be snoozed.
    fn or_snooze(self, delay: Duration) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn permanent(self) -> Result<T> {
        self.map_err(|error| error.into().into_permanent())
    }

    fn or_snooze(self, delay: Duration) -> Result<T> {
        self.map_err(|error| Error {
            kind: Kind::Snooze(delay),
            ..error.into()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_std_errors_strings_and_anyhow() {
        fn std_error() -> Result<u8> {
            Ok("x".parse::<u8>()?)
        }
        fn text() -> Result {
            Err("no luck")?
        }
        fn anyhow_error() -> Result {
            Err(anyhow::anyhow!("inner").context("outer"))?
        }
        assert_eq!(std_error().unwrap_err().kind(), Kind::Retryable);
        assert_eq!(text().unwrap_err().to_string(), "no luck");
        assert_eq!(anyhow_error().unwrap_err().to_string(), "outer: inner");
    }
}
