//! `nexus doctor`: what it finds where apps work, on servers that are set up well and badly, and how it ends.

use nexus::{Client, Database, testing::TestDatabase};
use nexus_embedded::{DEFAULT_DATABASE, Options, Server};
use serde_json::Value;
use sqlx::{PgPool, postgres::PgPoolOptions};

use super::{end, nexus, program, reachable_folder, with_a_parcel};

/// The findings, each checked against the documentation, and the exit code.
async fn doctor(url: &str, namespace: &str) -> (i32, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let run = end(program(folder.path()).env("DATABASE_URL", url).args([
        "doctor",
        "--json",
        "--namespace",
        namespace,
    ]))
    .await;
    let found: Vec<Value> =
        serde_json::from_str(&run.out).unwrap_or_else(|error| panic!("{error}: {run:#?}"));
    for finding in &found {
        super::check_documented(finding);
        let id = finding["id"].as_str().unwrap();
        let is_documented = include_str!("../../../docs/cli.md").contains(&format!("`{id}`"));
        assert!(is_documented, "finding `{id}` is not in docs/cli.md");
    }
    (run.code, found)
}

fn pairs(found: &[Value]) -> Vec<(&str, &str)> {
    found
        .iter()
        .map(|finding| {
            (
                finding["id"].as_str().unwrap(),
                finding["subject"].as_str().unwrap_or_default(),
            )
        })
        .collect()
}

#[tokio::test]
async fn what_apps_leave_behind_is_found() {
    let (app, _) = with_a_parcel().await;
    let url = app.database().url();
    let (code, found) = doctor(url, "demo").await;
    let seen = pairs(&found);
    assert_eq!(code, 1);
    for expected in [
        ("dead-letters", "readers"),
        ("event-unhandled", "parcel.lost"),
    ] {
        assert!(seen.contains(&expected), "no {expected:?} in {found:#?}");
    }
    for unexpected in [
        "handler-not-live",
        "group-paused",
        "node-dead",
        "not-checked",
        "object-changed",
    ] {
        assert!(
            !seen.iter().any(|(id, _)| *id == unexpected),
            "{unexpected} in {found:#?}"
        );
    }

    nexus(app.database(), &["groups", "pause", "readers"])
        .await
        .ok();
    let shown = nexus(app.database(), &["doctor"]).await;
    assert_eq!(shown.code, 1);
    for expected in [
        "group readers has 1 dead letter [dead-letters]",
        "→ nexus dead-letters list readers --by-cause",
        "→ nexus groups resume readers",
    ] {
        assert!(
            shown.out.contains(expected),
            "no {expected} in\n{}",
            shown.out
        );
    }
    assert!(!shown.out.contains('\u{1b}'), "a pipe gets no colours");
    assert!(shown.err.contains("something is wrong: "), "{}", shown.err);

    let database = app.database().clone();
    app.shutdown().await;
    let (_, found) = doctor(database.url(), "demo").await;
    let seen = pairs(&found);
    for handler in ["pessimists/lose", "readers/refuse", "readers/stumble"] {
        assert!(
            seen.contains(&("handler-not-live", handler)),
            "no {handler} in {found:#?}"
        );
    }
}

#[tokio::test]
async fn a_database_that_nexus_cannot_work_with_is_a_finding_one_that_is_away_is_not() {
    let empty = TestDatabase::empty().await;
    let (code, found) = doctor(empty.url(), "demo").await;
    assert_eq!((code, pairs(&found)[0]), (1, ("schema-missing", "")));
    let schemas = "select count(*) from pg_namespace where nspname in ('core', 'pgmq')";
    assert_eq!(super::sqlx_count(&empty, schemas).await, 0);

    let folder = tempfile::tempdir().unwrap();
    let run = async |url: &str| {
        let mut command = program(folder.path());
        end(command.env("DATABASE_URL", url).arg("doctor")).await
    };
    let said = run("postgres://shop:s3cret@127.0.0.1:1/shop")
        .await
        .failed(3);
    assert!(
        said.contains("127.0.0.1:1/shop") && !said.contains("s3cret"),
        "{said}"
    );
    let said = end(program(folder.path()).arg("doctor")).await.failed(2);
    assert!(said.contains("no database is named"), "{said}");
}

/// A server of the test's own, which keeps what it is told, with a namespace `shop`.
struct Own {
    server: Server,
    url: String,
    pool: PgPool,
    _folder: tempfile::TempDir,
}

impl Own {
    async fn start(settings: &'static [(&'static str, &'static str)]) -> Self {
        let folder = reachable_folder();
        let data = folder.path().join("data");
        let server = tokio::task::spawn_blocking(move || {
            let mut options = Options::dev().data_folder(data);
            for (name, value) in settings {
                options = options.setting(name, value);
            }
            Server::start(&options)
        });
        let server = server.await.unwrap().unwrap();
        let url = server.url(DEFAULT_DATABASE);
        let database = Database::from_url(&url, "the test").unwrap();
        database.migrate().await.unwrap();
        Client::connect(&database, "shop").await.unwrap();
        let pool = PgPoolOptions::new().max_connections(8).connect(&url).await;
        Self {
            server,
            url,
            pool: pool.unwrap(),
            _folder: folder,
        }
    }

    async fn end(self) {
        self.pool.close().await;
        drop(self.server);
    }
}

#[tokio::test]
async fn a_healthy_server_is_clean_and_its_slow_statements_are_found() {
    let own = Own::start(&[
        ("shared_preload_libraries", "pg_stat_statements"),
        ("idle_in_transaction_session_timeout", "5min"),
    ])
    .await;
    let (code, found) = doctor(&own.url, "shop").await;
    // Loaded, but nobody has made it.
    assert_eq!(
        (code, pairs(&found)),
        (0, vec![("slow-statements-unknown", "")])
    );
    let made = sqlx::raw_sql("create extension pg_stat_statements")
        .execute(&own.pool)
        .await;
    made.unwrap();
    assert_eq!(doctor(&own.url, "shop").await, (0, vec![]));
    let folder = tempfile::tempdir().unwrap();
    let shown = end(program(folder.path()).env("DATABASE_URL", &own.url).args([
        "doctor",
        "--namespace",
        "shop",
    ]))
    .await;
    assert_eq!(shown.ok(), "nothing is wrong\n");

    let run = async |sql: &'static str| {
        sqlx::raw_sql(sql).execute(&own.pool).await.unwrap();
    };
    let ours = "select pg_sleep(1.1) from core.namespaces";
    let theirs = "select pg_sleep(1.2)";
    // As it was written, with what may be a secret in it.
    let secret = "do $$ begin perform pg_sleep(1.2), 's3cret'; end $$";
    tokio::join!(
        run(ours),
        run(ours),
        run(ours),
        run(theirs),
        run(theirs),
        run(theirs)
    );
    tokio::join!(run(secret), run(secret), run(secret));
    let (code, found) = doctor(&own.url, "shop").await;
    let of = |severity: &str| {
        let of_it = found
            .iter()
            .filter(|finding| finding["severity"] == severity);
        of_it
            .map(|finding| finding["what"].as_str().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(code, 1);
    let ([ours], [theirs]) = (&of("warning")[..], &of("note")[..]) else {
        panic!("{found:#?}");
    };
    assert!(
        ours.contains("3 times") && ours.contains("from core.namespaces"),
        "{ours}"
    );
    assert!(theirs.contains("3 times"), "{theirs}");
    own.end().await;
}

#[tokio::test]
async fn a_server_that_is_set_up_badly_is_found_out() {
    let own = Own::start(&[
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("synchronous_commit", "off"),
        ("autovacuum", "off"),
        ("track_counts", "off"),
        ("wal_level", "minimal"),
        ("max_wal_senders", "0"),
        ("max_connections", "14"),
    ])
    .await;
    let mut held = Vec::new();
    for _ in 0..8 {
        held.push(own.pool.acquire().await.unwrap());
    }
    let (code, found) = doctor(&own.url, "shop").await;
    assert_eq!(code, 1);
    let mut seen = pairs(&found);
    seen.sort_unstable();
    assert_eq!(
        seen,
        [
            ("autovacuum-off", "autovacuum"),
            ("autovacuum-off", "track_counts"),
            ("connections-near-end", "max_connections"),
            ("fsync-off", "fsync"),
            ("full-page-writes-off", "full_page_writes"),
            (
                "idle-in-transaction-unlimited",
                "idle_in_transaction_session_timeout"
            ),
            ("slow-statements-unknown", ""),
            ("synchronous-commit-off", "synchronous_commit"),
            ("wal-level-minimal", "wal_level"),
        ]
    );
    let severities: Vec<&str> = found
        .iter()
        .map(|finding| finding["severity"].as_str().unwrap())
        .collect();
    assert!(severities.is_sorted_by_key(|severity| {
        ["error", "warning", "note"]
            .iter()
            .position(|s| s == severity)
    }));
    drop(held);
    own.end().await;
}
