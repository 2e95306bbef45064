//! `nexus serve` over a real socket, and `nexus tokens`, which says who is let in.

use std::{path::Path, process::Stdio};

use nexus::{
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::{Postgres, Transaction};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
};

use super::{PATIENCE, end, next_line, nexus, program, signal, sqlx_count, until};

/// The program while it serves.
struct Served {
    child: Child,
    url: String,
    address: String,
    _folder: tempfile::TempDir,
}

impl Served {
    async fn start(database: &TestDatabase, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = serve(database, folder.path(), arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(line) = next_line(&mut lines).await else {
            let mut said = String::new();
            let mut stderr = child.stderr.take().unwrap();
            stderr.read_to_string(&mut said).await.unwrap();
            panic!("it did not start: {said}");
        };
        let start: Value = serde_json::from_str(&line).unwrap();
        super::check_documented(&start);
        Self {
            child,
            url: start["url"].as_str().unwrap().to_owned(),
            address: start["address"].as_str().unwrap().to_owned(),
            _folder: folder,
        }
    }

    async fn emit(&self, token: Option<&str>) -> StatusCode {
        let event =
            json!({ "eventType": "parcel.sent", "eventVersion": 2, "payload": { "parcel": 7 } });
        let mut request = http().post(format!("{}/events", self.url)).json(&event);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().await.unwrap().status()
    }

    /// Its exit code, and what it said.
    async fn ended(mut self) -> (i32, String) {
        let mut said = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        let ended = async {
            stderr.read_to_string(&mut said).await.unwrap();
            self.child.wait().await.unwrap().code().unwrap_or(-1)
        };
        let code = tokio::time::timeout(PATIENCE, ended)
            .await
            .expect("it ends");
        (code, said)
    }
}

fn serve(database: &TestDatabase, folder: &Path, arguments: &[&str]) -> Command {
    let mut command = program(folder);
    command
        .env("DATABASE_URL", database.url())
        .env("PORT", "0")
        .args(["serve", "--json"])
        .args(arguments);
    command
}

/// Built with other crates of the workspace, reqwest wants to be told who does TLS, which nothing here needs.
fn http() -> reqwest::Client {
    // It may have been said before.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

async fn shop() -> TestApp {
    TestApp::without_workers(App::discover().only(["lose"])).await
}

#[tokio::test]
async fn this_machine_is_served_until_there_is_a_token_and_then_whoever_has_it() {
    let app = shop().await;
    let served = Served::start(app.database(), &[]).await;
    // Neither this connection, which is kept for more requests, nor one without any holds up the end.
    let kept = http();
    let docs = kept.get(format!("{}/docs", served.url)).send().await;
    assert_eq!(docs.unwrap().status(), StatusCode::OK);
    let silent = TcpStream::connect(&served.address).await.unwrap();
    assert_eq!(served.emit(None).await, StatusCode::OK);

    let run = nexus(
        app.database(),
        &["tokens", "create", "frontend", "--scope", "emit"],
    )
    .await;
    assert!(
        run.err.contains("not shown again") && run.err.contains("nobody in namespace demo"),
        "{run:?}"
    );
    let token = run.ok().trim_end().to_owned();
    assert!(token.starts_with("nexus_"), "{token}");
    assert_eq!(served.emit(None).await, StatusCode::UNAUTHORIZED);
    assert_eq!(served.emit(Some(&token)).await, StatusCode::OK);
    let list = http().get(format!("{}/events", served.url));
    let list = list.bearer_auth(&token).send().await.unwrap();
    assert_eq!(list.status(), StatusCode::FORBIDDEN);

    let listed = nexus(app.database(), &["tokens", "list", "--json"])
        .await
        .json();
    assert_eq!(listed[0]["name"], "frontend");
    assert_eq!(listed[0]["scopes"], json!(["emit"]));
    assert_ne!(listed[0]["lastUsedAt"], Value::Null);
    let secret = token.rsplit('_').next().unwrap();
    assert!(!listed.to_string().contains(secret));
    let id = listed[0]["tokenId"].as_str().unwrap();
    nexus(app.database(), &["tokens", "revoke", id, "--yes"])
        .await
        .ok();
    assert_eq!(served.emit(Some(&token)).await, StatusCode::UNAUTHORIZED);

    signal(&served.child, "INT").await;
    let (code, said) = served.ended().await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("the namespace has no token"), "{said}");
    drop((kept, silent));
}

#[tokio::test]
async fn tokens_are_made_listed_and_revoked() {
    let app = shop().await;
    let run = async |arguments: &[&str]| {
        let arguments = [&["tokens"], arguments].concat();
        nexus(app.database(), &arguments).await
    };
    let nothing = run(&["list"]).await.ok();
    assert!(nothing.contains("only this machine is served"), "{nothing}");
    let scopes = ["--scope", "read", "--scope", "operate", "--scope", "read"];
    let made = run(&[
        &["create", "ops", "--expires-in", "2h", "--json"],
        &scopes[..],
    ]
    .concat())
    .await
    .json();
    assert_eq!(made["scopes"], json!(["operate", "read"]));
    assert_eq!(made["isInForce"], true);
    let known = app.client().token_of(made["token"].as_str().unwrap()).await;
    let id = made["tokenId"].as_str().unwrap();
    assert_eq!(known.unwrap().unwrap().id.to_string(), id);
    let shown = run(&["list"]).await.ok();
    assert!(
        shown.contains("ops") && shown.contains("ends in"),
        "{shown}"
    );

    let said = run(&["revoke", id]).await.failed(2);
    assert!(said.contains("give --yes"), "{said}");
    let plan = run(&["revoke", id, "--dry-run", "--json"]).await.json();
    assert_eq!(
        (&plan["isDryRun"], &plan["isInForce"]),
        (&json!(true), &json!(true))
    );
    let revoked = run(&["revoke", id, "--yes", "--json"]).await.json();
    assert_eq!(revoked["isInForce"], false);
    assert_ne!(revoked["revokedAt"], Value::Null);
    let again = run(&["revoke", id]).await.ok();
    assert!(again.contains("was revoked before"), "{again}");
    let listed = run(&["list"]).await.ok();
    assert!(listed.contains("revoked"), "{listed}");
}

#[tokio::test]
async fn a_token_that_cannot_be_made_is_refused_with_the_reason() {
    let app = shop().await;
    let create = async |arguments: &[&str]| {
        let arguments = [&["tokens", "create"], arguments].concat();
        nexus(app.database(), &arguments).await
    };
    let said = create(&["x", "--scope", "admin"]).await.failed(2);
    assert!(said.contains("expected emit, read or operate"), "{said}");
    let said = create(&["x"]).await.failed(2);
    assert!(said.contains("--scope"), "{said}");
    let said = create(&["", "--scope", "read"]).await.failed(1);
    assert!(said.contains("1 to 100 characters"), "{said}");
    let said = create(&["x", "--scope", "read", "--expires-in", "soon"])
        .await
        .failed(2);
    assert!(said.contains("expected a duration"), "{said}");
    let unknown = [
        "tokens",
        "revoke",
        "00000000-0000-4000-8000-000000000000",
        "--yes",
    ];
    let said = nexus(app.database(), &unknown).await.failed(1);
    assert!(said.contains("has no token"), "{said}");
    assert_eq!(app.client().tokens().await.unwrap(), []);
}

/// Keeps emits from being stored until it is dropped or rolled back.
async fn hold_emits(app: &TestApp) -> Transaction<'static, Postgres> {
    let mut holder = app.database().pool().await.begin().await.unwrap();
    sqlx::query("lock table core.event_log in exclusive mode")
        .execute(&mut *holder)
        .await
        .unwrap();
    holder
}

async fn until_emits_wait(app: &TestApp, number: i64) {
    let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()";
    until("so many emits wait for the lock", async || {
        sqlx_count(app.database(), waits).await == number
    })
    .await;
}

async fn until_it_stops(served: &Served) {
    until("it takes no more connections", async || {
        TcpStream::connect(&served.address).await.is_err()
    })
    .await;
}

#[tokio::test]
async fn a_request_that_is_under_way_ends_before_the_server_does() {
    let app = shop().await;
    let served = Served::start(app.database(), &[]).await;
    let holder = hold_emits(&app).await;
    let (answer, ()) = tokio::join!(served.emit(None), async {
        until_emits_wait(&app, 1).await;
        signal(&served.child, "TERM").await;
        until_it_stops(&served).await;
        holder.rollback().await.unwrap();
    });
    assert_eq!(answer, StatusCode::OK);
    let (code, said) = served.ended().await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("have 30 s to end"), "{said}");
    let stored = sqlx_count(app.database(), "select count(*) from core.event_log").await;
    assert_eq!(stored, 1);
}

#[tokio::test]
async fn a_request_that_does_not_end_is_given_up_and_told_of() {
    let app = shop().await;
    let holder = hold_emits(&app).await;
    // When the time is over, or at the second signal.
    for (patience, is_signalled_again) in [("0s", false), ("1h", true)] {
        let served = Served::start(app.database(), &["--shutdown-timeout", patience]).await;
        let event = json!({ "eventType": "parcel.sent", "payload": { "parcel": 7 } });
        let request = http().post(format!("{}/events", served.url)).json(&event);
        let request = tokio::spawn(request.send());
        until_emits_wait(&app, 1).await;
        signal(&served.child, "TERM").await;
        if is_signalled_again {
            until_it_stops(&served).await;
            signal(&served.child, "INT").await;
        }
        let (code, said) = served.ended().await;
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("may be done or not"), "{said}");
        assert!(request.await.unwrap().is_err());
        // The server of the database finds out that nobody is there any more.
        until_emits_wait(&app, 0).await;
    }
    holder.rollback().await.unwrap();
}

#[tokio::test]
async fn settings_come_from_the_command_line_the_environment_or_a_file() {
    let app = shop().await;
    let folder = tempfile::tempdir().unwrap();
    let run = async |variables: &[(&str, &str)], arguments: &[&str]| {
        let mut command = serve(app.database(), folder.path(), arguments);
        end(command.envs(variables.iter().copied())).await
    };
    for (variable, value, expected) in [
        ("PORT", "http", "PORT is `http`"),
        (
            "CORE_HTTP_LISTEN",
            "everywhere",
            "CORE_HTTP_LISTEN is `everywhere`",
        ),
        ("CORE_HTTP_TIMEOUT", "30", "expected a duration"),
        ("CORE_HTTP_TIMEOUT", "0s", "a timeout of zero"),
        (
            "CORE_HTTP_REQUESTS_PER_SECOND",
            "0",
            "CORE_HTTP_REQUESTS_PER_SECOND is `0`",
        ),
        (
            "CORE_HTTP_ALLOW_UNKNOWN_TYPES",
            "yes",
            "CORE_HTTP_ALLOW_UNKNOWN_TYPES is `yes`",
        ),
    ] {
        let said = run(&[(variable, value)], &[]).await.failed(2);
        assert!(said.contains(expected), "{said}");
    }
    std::fs::write(folder.path().join(".env"), "CORE_HTTP_BODY_BYTES=much\n").unwrap();
    let said = run(&[], &[]).await.failed(2);
    assert!(said.contains("of the file .env is `much`"), "{said}");

    let unknown = json!({ "eventType": "never.declared", "payload": {} });
    let served = Served::start(
        app.database(),
        &["--allow-unknown-types", "--batch-events", "1"],
    )
    .await;
    let post = async |body: &Value, kind: &str| {
        let request = http().post(format!("{}/events", served.url));
        let request = request.header("content-type", kind).body(body.to_string());
        request.send().await.unwrap().status()
    };
    assert_eq!(post(&unknown, "application/json").await, StatusCode::OK);
    let event = |id: &str| json!({ "specversion": "1.0", "id": id, "source": "/", "type": "parcel.sent", "data": {} });
    let batch = json!([event("1"), event("2")]);
    let batch = post(&batch, "application/cloudevents-batch+json").await;
    assert_eq!(batch, StatusCode::PAYLOAD_TOO_LARGE);

    let taken = served.address.rsplit(':').next().unwrap();
    let said = run(&[], &["--body-bytes", "9", "--port", taken])
        .await
        .failed(1);
    assert!(said.contains("could not listen on 127.0.0.1:"), "{said}");
}

#[tokio::test]
async fn a_namespace_is_made_a_schema_is_not_and_no_password_is_shown() {
    let database = TestDatabase::new().await;
    let served = Served::start(&database, &["--namespace", "mall", "--listen", "0.0.0.0"]).await;
    let ready = http()
        .get(format!("{}/health/ready", served.url))
        .send()
        .await;
    assert_eq!(ready.unwrap().status(), StatusCode::OK);
    signal(&served.child, "TERM").await;
    let (code, said) = served.ended().await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("all callers are refused but those of this machine"),
        "{said}"
    );

    let empty = TestDatabase::empty().await;
    let folder = tempfile::tempdir().unwrap();
    let said = end(&mut serve(&empty, folder.path(), &[])).await.failed(4);
    assert!(said.contains("nexus migrate status"), "{said}");

    let nobody = "postgres://shop:s3cret@127.0.0.1:1/shop";
    let said =
        end(serve(&empty, folder.path(), &[])
            .env("DATABASE_URL", format!("{nobody}?sslmode=nonsense")))
        .await
        .failed(2);
    assert!(!said.contains("s3cret"), "{said}");
}
