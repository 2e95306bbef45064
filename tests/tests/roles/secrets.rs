//! Passwords are shown nowhere: not in errors, not by `Debug`, and not in what is logged at the level of
//! traces.

use std::{
    error::Error as StdError,
    fmt::{Debug, Write as _},
    sync::LazyLock,
    time::Duration,
};

use nexus::{App, Client, Database, client::Access};
use nexus_tests::Log;

use super::{ENCODED, MIDDLE, PASSWORD, Test};

/// What the tests of this program have logged, from the first call on.
pub(crate) fn logged() -> String {
    static LOG: LazyLock<Log> = LazyLock::new(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        log
    });
    LOG.text()
}

/// Servers that are not there are not waited for.
const SOON: Duration = Duration::from_millis(100);

/// Nothing that was said holds the password, in any form that it has on its way.
#[track_caller]
fn is_silent(what: &str, said: &str) {
    for secret in [PASSWORD, ENCODED, MIDDLE, "7@#", "7%40%23"] {
        assert!(!said.contains(secret), "{what} says {secret}: {said}");
    }
}

/// An error with its causes, for people and for developers.
fn told(error: &(dyn StdError + 'static)) -> String {
    let mut text = format!("{error:?} {error:#?}");
    let mut next = Some(error);
    while let Some(error) = next {
        let _ = write!(text, "\n{error}");
        next = error.source();
    }
    text
}

fn shown(value: &impl Debug) -> String {
    format!("{value:?} {value:#?}")
}

/// URLs that do not work, because of the server, the password, the role, the database, the parameters or
/// the text; and some that do.
fn urls(url: &str, role: &str) -> Vec<String> {
    let wrong = ENCODED.replace("secret", "secret0");
    let (before, after) = url.split_once(ENCODED).unwrap();
    let (authority, name) = after.split_once('/').unwrap();
    let database_name = name.split('?').next().unwrap();
    vec![
        format!("{before}{wrong}{after}"),
        format!("postgres://nobody_here:{ENCODED}{after}"),
        format!("{before}{ENCODED}{authority}/{database_name}_gone"),
        format!("{before}{ENCODED}@127.0.0.1:1/shop"),
        format!("{before}{ENCODED}@no.such.host.invalid/shop"),
        format!("{before}{ENCODED}@/no/such/socket/shop"),
        format!("{before}{ENCODED}@127.0.0.1:port/shop"),
        format!("{before}{ENCODED}{authority}/{database_name}?sslmode={ENCODED}x"),
        format!("{before}{ENCODED}{authority}/{database_name}?sslmode=disable?password={ENCODED}"),
        format!("{before}{ENCODED}{authority}/{database_name}?sslmode=verify-full"),
        format!("{before}{ENCODED}{authority}/{database_name}?passwort={ENCODED}"),
        format!("{before}{ENCODED}{authority}/{database_name}?options=-c%20role=nobody_here"),
        // As people paste them.
        format!("{before}{PASSWORD}{after}"),
        format!("{before}12/{MIDDLE}{after}"),
        format!("{before}12?{MIDDLE}{after}"),
        format!("{before}12#{MIDDLE}{after}"),
        format!("postgres//{role}:{PASSWORD}{after}"),
        format!("postgres:{role}:{PASSWORD}{after}"),
        PASSWORD.to_owned(),
    ]
}

#[tokio::test]
async fn passwords_are_shown_nowhere() {
    logged();
    let test = Test::new().await;
    let role = test.tenant("a", "app").await;
    let url = test.url_of(&role);
    let start = |url: &str| {
        nexus::start(
            App::discover()
                .only(["count"])
                .name("x")
                .namespace("a")
                .connect_timeout(SOON)
                .database_url(url),
        )
    };

    // What works.
    let app = App::discover()
        .only(["count"])
        .namespace("a")
        .database_url(&url);
    is_silent("an app", &shown(&app));
    let database = Database::from_url(&url, "the test").unwrap();
    is_silent("a database", &shown(&database));
    let client = Client::connect(&database, "a").await.unwrap();
    is_silent("a client", &shown(&client));
    is_silent("its pool", &shown(client.pool()));
    client.pool().close().await;
    let handle = start(&url).await.unwrap();
    is_silent("a handle", &shown(&handle));
    is_silent("a description", &shown(&app.describe()));
    handle.shutdown().await;
    is_silent("a test's database", &shown(&test.database));

    for (number, url) in urls(&url, &role).iter().enumerate() {
        let what = format!("URL {number}");
        match start(url).await {
            Ok(handle) => {
                handle.shutdown().await;
            }
            Err(error) => is_silent(&what, &told(&error)),
        }
        match Database::from_url(url, "the test") {
            Ok(database) => {
                let database = database.connect_timeout(SOON);
                is_silent(&what, &shown(&database));
                match database.migrate().await {
                    Ok(()) => drop(Client::connect(&database, "a").await.unwrap()),
                    // A pool would try again for a while.
                    Err(error) => is_silent(&what, &told(&error)),
                }
                let granted = database.grant_namespace("b", &role, Access::App).await;
                if let Err(error) = granted {
                    is_silent(&what, &told(&error));
                }
            }
            Err(error) => is_silent(&what, &told(&error)),
        }
    }
    // Refused after the connection was made.
    for error in [
        Client::connect(&database, "b")
            .await
            .err()
            .map(|error| told(&error)),
        database
            .create_roles("x")
            .await
            .err()
            .map(|error| told(&error)),
    ] {
        is_silent("a refusal", &error.expect("it is refused"));
    }

    let log = logged();
    assert!(
        log.contains("sqlx") && log.contains("node stopped"),
        "it is logged"
    );
    // The test makes its roles by a statement that holds their password, and sqlx logs statements.
    let others: String = log
        .lines()
        .filter(|line| !line.contains("create role") && !line.contains("password '"))
        .collect();
    is_silent("the log", &others);
    test.end().await;
}
