//! Reads the URL of a database without showing what is in it.

use sqlx::{
    ConnectOptions,
    postgres::{PgConnectOptions, PgSslMode},
};
use sqlx_core::Url;

/// The parameters that sqlx knows. It logs others with their values, and one of them may be a password
/// whose name is misspelled.
const PARAMETERS: [&str; 20] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    // Of libpq, without an equal here, and without a secret.
    "connect_timeout",
    "target_session_attrs",
];

/// `source` says in the log where the URL came from.
pub(super) fn options(url: &str, source: &str) -> sqlx::Result<PgConnectOptions> {
    let Some((_, rest)) = url.split_once("://") else {
        return Err(sqlx::Error::Configuration(
            "it does not begin with postgres://".into(),
        ));
    };
    if splits_a_password(rest) {
        return Err(sqlx::Error::Configuration(
            "characters such as / ? # @ in its user or password must be percent-encoded".into(),
        ));
    }
    let mut url = Url::parse(url).map_err(|error| sqlx::Error::Configuration(error.into()))?;
    let (known, unknown): (Vec<_>, Vec<_>) = url
        .query_pairs()
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .partition(|(name, _)| PARAMETERS.contains(&name.as_str()) || name.starts_with("options["));
    // Its error would show the value, into which a second `?` brings all that follows.
    for (name, value) in &known {
        if matches!(name.as_str(), "sslmode" | "ssl-mode") && value.parse::<PgSslMode>().is_err() {
            return Err(sqlx::Error::Configuration(
                "its parameter `sslmode` is one of disable, allow, prefer, require, verify-ca and verify-full".into(),
            ));
        }
    }
    if !unknown.is_empty() {
        let names: Vec<&str> = unknown.iter().map(|(name, _)| name.as_str()).collect();
        tracing::warn!(
            ?names,
            "{source} has parameters that are not known, and ignored"
        );
        url.set_query(None);
        if !known.is_empty() {
            url.query_pairs_mut().extend_pairs(known);
        }
    }
    PgConnectOptions::from_url(&url)
}

/// Whether what follows the scheme would be read such that a part of the password is taken for a host, a
/// database or a parameter, which are shown in messages.
fn splits_a_password(rest: &str) -> bool {
    let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = before.split_once('/').unwrap_or((before, ""));
    rest.contains('#')
        || path.contains('@')
        || !authority.contains('@')
            && query.split('&').any(|pair| {
                pair.split('=')
                    .next()
                    .is_some_and(|name| name.contains('@'))
            })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_that_is_not_encoded_is_taken_for_nothing_else() {
        for url in [
            "postgres://ada:12/s3cret@db/shop",
            "postgres://ada:12?s3cret@db/shop",
            "postgres://ada:12#s3cret@db/shop",
            "postgres://ada:s3/cr?et@db/shop",
        ] {
            let error = options(url, "the test").unwrap_err().to_string();
            assert!(error.contains("percent-encoded"), "{url}: {error}");
            assert!(!error.contains("s3"), "{url}: {error}");
        }
        for url in [
            "postgres://ada:s3cret@db/shop",
            "postgres://ada:s3@cret@db/shop",
            "postgres://ada:s3%2Fcr%23et@db/shop?sslmode=disable",
            "postgres:///shop?host=/tmp&user=ada@example.com&password=s3@cret",
            "postgres://db",
        ] {
            options(url, "the test").unwrap();
        }
    }

    #[test]
    fn parameters_that_are_not_known_are_left_out() {
        let read = options(
            "postgres://db/shop?passwort=s3cret&application_name=x",
            "the test",
        );
        assert_eq!(read.unwrap().get_application_name(), Some("x"));
        let error = options(
            "postgres://db/shop?sslmode=require?password=s3cret",
            "the test",
        );
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("verify-full") && !error.contains("s3cret"),
            "{error}"
        );
    }
}
