//! The program as people and scripts run it: what it prints, what it changes, and how it ends.

#[path = "cli/doctor.rs"]
mod doctor;
#[path = "cli/serve.rs"]
mod serve;

use std::{path::Path, process::Stdio, time::Duration};

use nexus::{
    Database,
    prelude::*,
    testing::{TestApp, TestDatabase},
};
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{ChildStdout, Command},
};

/// A parcel that left.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.sent", version = 2, key = parcel)]
struct ParcelSent {
    parcel: u32,
}

/// A parcel that nobody finds.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "parcel.lost", key = parcel)]
struct ParcelLost {
    parcel: u32,
}

/// Every parcel gets lost.
#[handler(group = "pessimists")]
async fn lose(sent: ParcelSent) -> Emit<ParcelLost> {
    Emit(ParcelLost {
        parcel: sent.parcel,
    })
}

/// Whoever cannot read it never will, unless the parcel has number 1000 or more.
#[handler(group = "readers")]
async fn refuse(sent: ParcelSent) -> nexus::Result {
    match sent.parcel {
        1_000.. => Ok(()),
        _ => Err(Error::permanent("the label is wet\u{1b}[2J")),
    }
}

/// Tries again much later.
#[handler(group = "readers", backoff = "fixed(1h)")]
async fn stumble(_sent: ParcelSent) -> nexus::Result {
    Err("the scanner is off".into())
}

/// How a run ended.
#[derive(Debug)]
struct Run {
    code: i32,
    out: String,
    err: String,
}

impl Run {
    /// What it printed, if all went well.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:#?}");
        self.out
    }

    /// The document that it printed, whose fields are promised.
    #[track_caller]
    fn json(self) -> Value {
        let out = self.ok();
        let document = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
        check_documented(&document);
        document
    }

    /// What it said, if it ended with this code and printed nothing.
    #[track_caller]
    fn failed(self, code: i32) -> String {
        assert_eq!((self.code, self.out.as_str()), (code, ""), "{self:#?}");
        self.err
    }
}

/// Every field of the program's own stands in its documentation.
#[track_caller]
fn check_documented(document: &Value) {
    const DOCUMENTED: &str = include_str!("../../docs/cli.md");
    match document {
        Value::Array(elements) => elements.iter().for_each(check_documented),
        Value::Object(fields) => {
            for (name, value) in fields {
                let is_documented = DOCUMENTED.contains(&format!("`{name}`"));
                assert!(is_documented, "field `{name}` is not in docs/cli.md");
                let is_foreign = ["payload", "metadata", "originalEvent", "schema", "rows"];
                let is_depth = value.get("isMore").is_some();
                if !is_foreign.contains(&name.as_str()) && !is_depth {
                    check_documented(value);
                }
            }
        }
        _ => {}
    }
}

/// The program without anything of this machine's environment.
fn program(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nexus"));
    for variable in [
        "CORE_DATABASE_URL",
        "DATABASE_URL",
        "CORE_NAMESPACE",
        "CORE_POOLER",
        "CORE_LOG_LEVEL",
        "NEXUS_PG_DATA",
        "PORT",
    ] {
        command.env_remove(variable);
    }
    command
        .current_dir(folder)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

async fn end(command: &mut Command) -> Run {
    let output = command.output().await.unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Runs it on a test's database, in a folder with nothing in it.
async fn nexus(database: &TestDatabase, arguments: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    end(program(folder.path())
        .env("DATABASE_URL", database.url())
        .args(arguments))
    .await
}

/// The commands that only look.
const LOOKS: [&[&str]; 10] = [
    &["status"],
    &["events", "list"],
    &["groups", "list"],
    &["handlers", "list"],
    &["dead-letters", "list"],
    &["dead-letters", "list", "--by-cause"],
    &["replay", "status"],
    &["schedules", "list"],
    &["nodes", "list"],
    &["schemas", "list"],
];

#[tokio::test]
async fn a_database_without_the_schema_is_said_to_have_none_and_gets_none() {
    let database = TestDatabase::empty().await;
    for look in LOOKS {
        let said = nexus(&database, look).await.failed(4);
        assert!(said.contains("there is no schema `core`"), "{said}");
        assert!(said.contains("nexus migrate status"), "{said}");
    }
    let status = nexus(&database, &["migrate", "status"]).await.ok();
    assert!(status.contains("has no schema of nexus"), "{status}");
    let plan = nexus(&database, &["migrate", "up", "--dry-run", "--json"]).await;
    let plan = plan.json();
    assert_eq!(plan["migrations"][0], "0001_event_log");
    assert_eq!(plan["isDryRun"], true);

    let schemas = "select count(*) from pg_namespace where nspname in ('core', 'pgmq')";
    let made: i64 = sqlx_count(&database, schemas).await;
    assert_eq!(made, 0);
}

async fn sqlx_count(database: &TestDatabase, query: &'static str) -> i64 {
    sqlx::query_scalar(query)
        .fetch_one(&database.pool().await)
        .await
        .unwrap()
}

#[tokio::test]
async fn the_schema_goes_up_and_down() {
    let database = TestDatabase::empty().await;
    let applied = nexus(&database, &["migrate", "up"]).await.ok();
    assert!(
        applied.contains("migrations applied\n  0001_event_log\n"),
        "{applied}"
    );
    let again = nexus(&database, &["migrate", "up"]).await.ok();
    assert_eq!(again, "0 migrations applied\n");
    let status = nexus(&database, &["migrate", "status", "--json"])
        .await
        .json();
    let newest = status["version"].as_u64().unwrap();
    assert_eq!(status["needed"].as_u64(), Some(newest));

    let before = (newest - 1).to_string();
    let down = ["migrate", "down", "--to", &before];
    let said = nexus(&database, &down).await.failed(2);
    assert!(said.contains("give --yes"), "{said}");
    let plan = [&down[..], &["--dry-run"]].concat();
    let plan = nexus(&database, &plan).await.ok();
    assert!(
        plan.starts_with("1 migration would be taken back"),
        "{plan}"
    );
    let status = nexus(&database, &["migrate", "status", "--json"])
        .await
        .json();
    assert_eq!(
        status["version"].as_u64(),
        Some(newest),
        "nothing was changed yet"
    );

    nexus(&database, &[&down[..], &["--yes"]].concat())
        .await
        .ok();
    let status = nexus(&database, &["migrate", "status", "--json"])
        .await
        .json();
    assert_eq!(status["version"].as_u64(), Some(newest - 1));
    let said = nexus(&database, &["status"]).await.failed(4);
    assert!(said.contains(&format!("has version {before}")), "{said}");
    nexus(&database, &["migrate", "down", "--to", "0", "--yes"])
        .await
        .ok();
    assert_eq!(
        sqlx_count(
            &database,
            "select count(*) from pg_namespace where nspname = 'core'"
        )
        .await,
        0
    );
}

#[tokio::test]
async fn an_empty_namespace_is_shown_and_an_unknown_one_is_not() {
    let database = TestDatabase::new().await;
    let url = Database::from_url(database.url(), "the test").unwrap();
    Client::connect(&url, "shop").await.unwrap();
    for look in LOOKS {
        let arguments = [look, &["--namespace", "shop"]].concat();
        nexus(&database, &arguments).await.ok();
        let arguments = [look, &["--namespace", "shop", "--json"]].concat();
        let shown = nexus(&database, &arguments).await.json();
        match look {
            ["status"] => assert_eq!(shown["nodes"], json!([])),
            ["groups", _] => assert_eq!(shown[0]["group"], "default"),
            _ => assert_eq!(shown, json!([]), "{look:?}"),
        }
        let said = nexus(&database, look).await.failed(1);
        assert!(
            said.contains("no namespace `demo`") && said.contains("it has shop"),
            "{said}"
        );
    }
    assert_eq!(
        sqlx_count(&database, "select count(*) from core.namespaces").await,
        1
    );
}

/// An app with a parcel that was handled, a dead letter of it, and a message that waits for its next attempt.
async fn with_a_parcel() -> (TestApp, i64) {
    let app = App::discover().only(["lose", "refuse", "stumble"]);
    let app = TestApp::start(app).await;
    let event_id = app.client().emit(&ParcelSent { parcel: 7 }).await.unwrap();
    app.settled().await;
    (app, event_id)
}

#[tokio::test]
async fn the_status_is_one_screen() {
    let (app, event_id) = with_a_parcel().await;
    let shown = nexus(app.database(), &["status"]).await.ok();
    for expected in [
        "1 live (1 of default)",
        "pessimists",
        "readers",
        "Permanent error",
        "the label is wet",
    ] {
        assert!(shown.contains(expected), "no {expected} in\n{shown}");
    }
    assert!(shown.lines().count() < 25, "{shown}");
    assert!(
        !shown.contains('\u{1b}'),
        "a pipe gets no colours, and no text of others steers a terminal"
    );

    let shown = nexus(app.database(), &["status", "--json"]).await.json();
    assert_eq!(shown["namespace"], "demo");
    assert_eq!(shown["nodes"][0]["isLive"], true);
    let readers = &shown["groups"][2];
    assert_eq!(readers["group"], "readers");
    assert_eq!(
        readers["messages"],
        json!({ "counted": 1, "isMore": false })
    );
    assert_eq!(readers["failed"], 1);
    assert_eq!(readers["deadLetters"]["counted"], 1);
    assert_eq!(readers["lagSeconds"], Value::Null);
    assert_eq!(shown["newestDeadLetters"][0]["eventId"], event_id);
    app.shutdown().await;
}

#[tokio::test]
async fn events_are_listed_by_what_they_are() {
    let (app, event_id) = with_a_parcel().await;
    let id = event_id.to_string();
    let list = async |arguments: &[&str]| {
        let arguments = [&["events", "list", "--json"], arguments].concat();
        let shown = nexus(app.database(), &arguments).await.json();
        let types = shown.as_array().unwrap().iter();
        types
            .map(|event| event["eventType"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(list(&[]).await, ["parcel.lost", "parcel.sent"]);
    assert_eq!(
        list(&["--oldest-first"]).await,
        ["parcel.sent", "parcel.lost"]
    );
    assert_eq!(list(&["--limit", "1"]).await, ["parcel.lost"]);
    assert_eq!(list(&["--type", "parcel.sent"]).await, ["parcel.sent"]);
    assert_eq!(list(&["--after-id", &id]).await, ["parcel.lost"]);
    assert_eq!(list(&["--correlation-id", &id]).await.len(), 2);
    assert_eq!(list(&["--key", "8"]).await.len(), 0);
    assert_eq!(list(&["--since", "1h"]).await.len(), 2);
    assert_eq!(list(&["--until", "1h"]).await.len(), 0);

    let shown = nexus(app.database(), &["events", "list", "--limit", "1"])
        .await
        .ok();
    assert!(
        shown.contains(r#"{"parcel":7}"#) && shown.contains("more: --before-id"),
        "{shown}"
    );
    let said = nexus(app.database(), &["events", "list", "--since", "soon"])
        .await
        .failed(2);
    assert!(said.contains("expected how long ago"), "{said}");
    app.shutdown().await;
}

#[tokio::test]
async fn an_event_is_shown_with_what_followed_and_what_became_of_it() {
    let (app, event_id) = with_a_parcel().await;
    let id = event_id.to_string();
    let shown = nexus(app.database(), &["events", "show", &id]).await.ok();
    for expected in [
        "├─ pessimists/lose: done",
        "├─ readers/refuse: dead letter 1, ",
        "│  attempt 1: the label is wet [2J",
        "├─ readers/stumble: attempt 2 is due in ",
        "│  attempt 1: the scanner is off",
        "parcel.lost",
    ] {
        assert!(shown.contains(expected), "no {expected} in\n{shown}");
    }
    let last = shown.lines().last().unwrap();
    assert!(
        last.starts_with("└─ ") && last.contains("parcel.lost"),
        "{shown}"
    );

    let shown = nexus(app.database(), &["events", "show", &id, "--json"])
        .await
        .json();
    assert_eq!(shown["payload"], json!({ "parcel": 7 }));
    let states: Vec<_> = shown["deliveries"].as_array().unwrap().iter().collect();
    assert_eq!(states[0]["state"], "done");
    assert_eq!(
        (&states[1]["state"], &states[1]["deadLetterId"]),
        (&json!("deadLetter"), &json!(1))
    );
    assert_eq!(
        (&states[2]["state"], &states[2]["attempts"]),
        (&json!("waiting"), &json!(1))
    );
    assert_eq!(shown["chain"][1]["causationId"], id);

    let said = nexus(app.database(), &["events", "show", "9999"])
        .await
        .failed(1);
    assert!(said.contains("no event 9999"), "{said}");
    app.shutdown().await;
}

#[tokio::test]
async fn the_log_is_followed_until_somebody_stops_it() {
    let app = TestApp::without_workers(App::discover().only(["lose"])).await;
    let folder = tempfile::tempdir().unwrap();
    app.client().emit(&ParcelSent { parcel: 1 }).await.unwrap();
    let tail = |arguments: &[&str]| {
        program(folder.path())
            .env("DATABASE_URL", app.database().url())
            .args(["events", "tail", "--json"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let parcel = |line: Option<String>| -> u64 {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        event["payload"]["parcel"].as_u64().unwrap()
    };
    let mut stopped = tail(&[]);
    let mut lines = BufReader::new(stopped.stdout.take().unwrap()).lines();
    // It follows once it has shown what was there.
    assert_eq!(parcel(next_line(&mut lines).await), 1);
    for number in 2..5 {
        app.client()
            .emit(&ParcelSent { parcel: number })
            .await
            .unwrap();
        assert_eq!(parcel(next_line(&mut lines).await), u64::from(number));
    }
    signal(&stopped, "INT").await;
    assert_eq!(stopped.wait().await.unwrap().code(), Some(0));

    // As `head` does.
    let mut closed = tail(&["--last", "1"]);
    let mut lines = BufReader::new(closed.stdout.take().unwrap()).lines();
    assert_eq!(parcel(next_line(&mut lines).await), 4);
    drop(lines);
    app.client().emit(&ParcelSent { parcel: 5 }).await.unwrap();
    assert_eq!(closed.wait().await.unwrap().code(), Some(0));
    app.shutdown().await;
}

/// How long anything may take: generous, because machines are shared.
const PATIENCE: Duration = Duration::from_mins(2);

async fn next_line(lines: &mut Lines<BufReader<ChildStdout>>) -> Option<String> {
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
    line.expect("a line is printed in time").unwrap()
}

/// Asks again and again, for what no signal announces.
async fn until(what: &str, ask: impl AsyncFn() -> bool) {
    let asked = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let is_so = tokio::time::timeout(PATIENCE, asked).await;
    is_so.unwrap_or_else(|_| panic!("within {PATIENCE:?} this did not happen: {what}"));
}

async fn signal(child: &tokio::process::Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    let sent = Command::new("/bin/sh")
        .args(["-c", "kill -s \"$1\" \"$0\"", &pid, name])
        .status()
        .await
        .unwrap();
    assert!(sent.success());
}

#[tokio::test]
async fn a_redrive_that_is_interrupted_harms_nothing() {
    let (app, _) = with_a_parcel().await;
    // Somebody holds the letter, so that the redrive has to wait.
    let mut holder = app.pool().begin().await.unwrap();
    sqlx::query("select from pgmq.q_core_events_demo__readers_dlq for update")
        .execute(&mut *holder)
        .await
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let redrive = program(folder.path())
        .env("DATABASE_URL", app.database().url())
        .args(["dead-letters", "redrive", "readers", "1"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let waits = "select count(*) from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock'";
    until("the redrive waits", async || {
        sqlx_count(app.database(), waits).await == 1
    })
    .await;
    signal(&redrive, "INT").await;
    let output = redrive.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(130));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("interrupted"), "{said}");
    until(
        "the server notices that nobody waits for the answer",
        async || sqlx_count(app.database(), waits).await == 0,
    )
    .await;
    holder.rollback().await.unwrap();
    assert_eq!(app.only_dead_letter().await.redrive_count, 0);
    app.shutdown().await;
}

#[tokio::test]
async fn what_is_emitted_is_held_to_its_schema() {
    let app = TestApp::start(App::discover().only(["lose"])).await;
    let database = app.database();
    let emit = [
        "emit",
        "parcel.sent",
        r#"{"parcel": 12}"#,
        "--idempotency-key",
        "k",
    ];
    let id: i64 = nexus(database, &emit).await.ok().trim().parse().unwrap();
    let again = nexus(database, &[&emit[..], &["--json"]].concat())
        .await
        .json();
    assert_eq!(again, json!({ "eventId": id }));
    app.settled().await;
    assert_eq!(app.only_emitted::<ParcelLost>().await.parcel, 12);

    let said = nexus(database, &["emit", "parcel.sent", r#"{"parcel": -1}"#])
        .await
        .failed(1);
    assert!(said.contains("at `parcel`: "), "{said}");
    let said = nexus(database, &["emit", "parcel.sank", "{}"])
        .await
        .failed(1);
    assert!(said.contains("declared are parcel.sent"), "{said}");
    let said = nexus(database, &["emit", "parcel.sent", "{", "--dry-run"])
        .await
        .failed(2);
    assert!(said.contains("not valid JSON"), "{said}");
    nexus(
        database,
        &["emit", "parcel.sent", r#"{"parcel": 13}"#, "--dry-run"],
    )
    .await
    .ok();
    nexus(
        database,
        &["emit", "parcel.sent", r#"{"parcel": 14}"#, "--after", "1h"],
    )
    .await
    .ok();
    let sent = app
        .client()
        .events()
        .event_type("parcel.sent")
        .list(10)
        .await
        .unwrap();
    assert_eq!(sent.len(), 1);
    assert_eq!(app.client().delayed(10).await.unwrap().len(), 1);
    app.shutdown().await;
}

#[tokio::test]
async fn dead_letters_are_shown_and_redriven() {
    let (app, event_id) = with_a_parcel().await;
    let database = app.database();
    let run =
        async |arguments: &[&str]| nexus(database, &[&["dead-letters"], arguments].concat()).await;
    let listed = run(&["list", "readers"]).await.ok();
    assert!(
        listed.contains("refuse") && listed.contains("Permanent error"),
        "{listed}"
    );
    let listed = run(&["list", "--json"]).await.json();
    assert_eq!(listed[0]["eventId"], event_id);
    let cause = listed[0]["fingerprint"].as_str().unwrap().to_owned();
    assert_eq!(
        run(&["list", "--handler", "stumble", "--json"])
            .await
            .json(),
        json!([])
    );
    let counted = run(&["list", "--by-cause", "--json"]).await.json();
    assert_eq!(
        (&counted[0]["deadLetters"], &counted[0]["fingerprint"]),
        (&json!(1), &json!(cause))
    );
    let shown = run(&["show", "readers", "1"]).await.ok();
    assert!(
        shown.contains("the label is wet") && shown.contains("\"parcel\": 7"),
        "{shown}"
    );
    assert!(
        run(&["show", "readers", "2"])
            .await
            .failed(1)
            .contains("no dead letter 2")
    );
    assert!(
        run(&["list", "writers"])
            .await
            .failed(1)
            .contains("it has default, pessimists, readers")
    );

    // Nothing is meant by nothing.
    assert!(
        run(&["redrive", "readers"])
            .await
            .failed(2)
            .contains("--all")
    );
    assert!(
        run(&["redrive", "readers", "1", "--all"])
            .await
            .failed(2)
            .contains("--all")
    );
    assert!(
        run(&["redrive", "readers", "--all"])
            .await
            .failed(2)
            .contains("give --yes")
    );
    let plan = run(&[
        "redrive",
        "readers",
        "--fingerprint",
        &cause,
        "--dry-run",
        "--json",
    ])
    .await
    .json();
    assert_eq!(
        (&plan["messages"], &plan["isDryRun"]),
        (&json!(1), &json!(true))
    );
    assert_eq!(app.dead_letters().await.len(), 1, "nothing was changed yet");

    // It dies again, with a history.
    let done = run(&["redrive", "readers", "1", "--by", "ada"]).await.ok();
    assert_eq!(done, "1 dead letter put back\n");
    app.settled().await;
    let letter = app.only_dead_letter().await;
    assert_eq!((letter.redrive_count, &*letter.redrives[0].by), (1, "ada"));
    let id = letter.id.to_string();
    let said = run(&["redrive", "readers", &id, "--payload", r#"{"parcel": "x"}"#])
        .await
        .failed(1);
    assert!(said.contains("at `parcel`: "), "{said}");
    run(&[
        "redrive",
        "readers",
        &id,
        "--payload",
        r#"{"parcel": 1000}"#,
    ])
    .await
    .ok();
    app.settled().await;
    assert!(app.dead_letters().await.is_empty());
    let missing = run(&["redrive", "readers", &id]).await;
    assert_eq!(missing.code, 1, "{missing:?}");
    app.shutdown().await;
}

#[tokio::test]
async fn dead_letters_are_purged() {
    let (app, _) = with_a_parcel().await;
    let database = app.database();
    let run = async |arguments: &[&str]| {
        nexus(
            database,
            &[&["dead-letters", "purge", "readers"], arguments].concat(),
        )
        .await
    };
    assert!(run(&[]).await.failed(2).contains("--all"));
    assert!(run(&["1"]).await.failed(2).contains("give --yes"));
    let plan = run(&["--all", "--dry-run"]).await.ok();
    assert_eq!(plan, "1 dead letter would be deleted\n");
    assert_eq!(app.dead_letters().await.len(), 1, "nothing was changed yet");
    assert_eq!(
        run(&["--older-than", "1h", "--yes"]).await.ok(),
        "0 dead letters deleted\n"
    );
    let purged = run(&["--type", "parcel.sent", "--yes", "--json"])
        .await
        .json();
    assert_eq!(purged, json!({ "deadLetters": 1, "isDryRun": false }));
    assert!(app.dead_letters().await.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn events_are_replayed() {
    let (app, _) = with_a_parcel().await;
    let database = app.database().clone();
    let run = async |arguments: &[&str]| nexus(&database, &[&["replay"], arguments].concat()).await;
    let start = ["start", "pessimists", "--handler", "lose"];
    let plan = run(&[&start[..], &["--dry-run", "--json"]].concat())
        .await
        .json();
    assert_eq!(
        (&plan["messages"], &plan["isEstimate"]),
        (&json!(1), &json!(false))
    );
    assert!(run(&start).await.failed(2).contains("give --yes"));
    let done = run(&[&start[..], &["--yes", "--wait", "--json"]].concat())
        .await
        .json();
    assert_eq!(
        (&done["state"], &done["messages"]),
        (&json!("finished"), &json!(1))
    );
    app.settled().await;
    let lost = app
        .client()
        .events()
        .event_type("parcel.lost")
        .list(10)
        .await
        .unwrap();
    assert_eq!(lost.len(), 2);

    let id = done["replayId"].as_str().unwrap();
    assert_eq!(run(&["status", "--json"]).await.json()[0]["replayId"], id);
    assert!(
        run(&["cancel", id])
            .await
            .failed(1)
            .contains("it is finished")
    );
    let said = run(&["start", "writers", "--yes"]).await.failed(1);
    assert!(said.contains("writers"), "{said}");
    let unknown = "00000000-0000-0000-0000-000000000000";
    assert!(
        run(&["status", unknown])
            .await
            .failed(1)
            .contains("no replay")
    );

    // Nobody is left to drive it.
    app.shutdown().await;
    let started = [&["replay"], &start[..], &["--yes"]].concat();
    let started = nexus(&database, &started).await.ok();
    let cancel = ["replay", "cancel", started.trim(), "--json"];
    let cancelled = nexus(&database, &cancel).await.json();
    assert_eq!(cancelled["state"], "cancelled");
    let said = nexus(&database, &cancel).await.failed(1);
    assert!(said.contains("it is cancelled"), "{said}");
}

#[tokio::test]
async fn tasks_are_made_steered_and_removed() {
    let app = TestApp::start(App::discover().only(["lose"])).await;
    let database = app.database();
    let run =
        async |arguments: &[&str]| nexus(database, &[&["schedules"], arguments].concat()).await;
    let add = [
        "add",
        "nightly",
        "0 3 * * *",
        "parcel.sent",
        r#"{"parcel": 3}"#,
    ];
    let options = [
        "--tz",
        "Europe/Berlin",
        "--misfire",
        "fire_all(3)",
        "--json",
    ];
    let made = run(&[&add[..], &options].concat()).await.json();
    assert_eq!(
        (&made["name"], &made["timezone"]),
        (&json!("nightly"), &json!("Europe/Berlin"))
    );
    assert_eq!(
        (&made["misfire"], &made["eventVersion"]),
        (&json!("fire_all(3)"), &json!(2))
    );
    let mut wrong = add;
    wrong[4] = r#"{"parcel": null}"#;
    assert!(run(&wrong).await.failed(1).contains("at `parcel`"));
    wrong = add;
    wrong[2] = "61 3 * * *";
    assert!(run(&wrong).await.failed(1).contains("61 3 * * *"));

    assert!(run(&["pause", "nightly"]).await.ok().contains("paused"));
    assert!(run(&["resume", "nightly"]).await.ok().contains("active"));
    let event_id = run(&["run", "nightly", "--json"]).await.json()["eventId"].clone();
    let history = run(&["history", "nightly", "--json"]).await.json();
    assert_eq!(
        (&history[0]["eventId"], &history[0]["isManual"]),
        (&event_id, &json!(true))
    );
    assert!(
        run(&["remove", "nightly"])
            .await
            .failed(2)
            .contains("give --yes")
    );
    run(&["remove", "nightly", "--dry-run"]).await.ok();
    assert!(run(&["list"]).await.ok().contains("nightly"));
    run(&["remove", "nightly", "--yes"]).await.ok();
    assert_eq!(run(&["list", "--json"]).await.json(), json!([]));
    assert!(
        run(&["run", "nightly"])
            .await
            .failed(1)
            .contains("it has none")
    );
    app.shutdown().await;
}

#[tokio::test]
async fn handlers_nodes_and_schemas_are_shown() {
    let (app, _) = with_a_parcel().await;
    let database = app.database();
    let listed = nexus(database, &["handlers", "list", "--group", "readers"])
        .await
        .ok();
    assert!(
        listed.contains("readers/refuse") && !listed.contains("pessimists"),
        "{listed}"
    );
    let shown = nexus(database, &["handlers", "show", "lose", "--json"])
        .await
        .json();
    assert_eq!(
        (&shown["group"], &shown["eventVersion"]),
        (&json!("pessimists"), &json!(2))
    );
    let node = shown["nodes"][0]["nodeId"].as_str().unwrap();
    assert!(
        nexus(database, &["nodes", "list"])
            .await
            .ok()
            .contains(node)
    );
    assert!(
        nexus(database, &["handlers", "show", "readers/refuse"])
            .await
            .ok()
            .contains(node)
    );
    assert!(
        nexus(database, &["handlers", "show", "write"])
            .await
            .failed(1)
            .contains("`write`")
    );

    let listed = nexus(database, &["schemas", "list", "--json"]).await.json();
    assert_eq!(
        (&listed[0]["eventType"], &listed[0]["version"]),
        (&json!("parcel.sent"), &json!(2))
    );
    let schema = nexus(database, &["schemas", "show", "parcel.sent"])
        .await
        .ok();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    assert_eq!(schema["properties"]["parcel"]["type"], "integer");
    let said = nexus(
        database,
        &["schemas", "show", "parcel.sent", "--version", "3"],
    )
    .await
    .failed(1);
    assert!(said.contains("it has 2"), "{said}");
    assert!(
        nexus(database, &["schemas", "show", "x"])
            .await
            .failed(1)
            .contains("parcel.sent")
    );
    app.shutdown().await;
}

#[tokio::test]
async fn silent_nodes_are_forgotten() {
    let app = TestApp::start(App::discover().only(["lose"])).await;
    sqlx::query(
        "insert into core.nodes (node_id, namespace, last_heartbeat)
         values ('dead', 'demo', core.now() - interval '1 minute')",
    )
    .execute(app.pool())
    .await
    .unwrap();
    let reap = ["nodes", "reap", "--json"];
    let plan = nexus(app.database(), &[&reap[..], &["--dry-run"]].concat())
        .await
        .json();
    assert_eq!(plan, json!({ "nodes": ["dead"], "isDryRun": true }));
    assert!(
        nexus(app.database(), &reap)
            .await
            .failed(2)
            .contains("give --yes")
    );
    let status = nexus(app.database(), &["status"]).await.ok();
    assert!(
        status.contains("1 live") && status.contains("dead silent since"),
        "{status}"
    );
    let done = nexus(app.database(), &[&reap[..], &["--yes"]].concat())
        .await
        .json();
    assert_eq!(done, json!({ "nodes": ["dead"], "isDryRun": false }));
    let status = nexus(app.database(), &["status"]).await.ok();
    assert!(
        status.contains("1 live") && !status.contains("silent"),
        "{status}"
    );
    app.shutdown().await;
}

#[tokio::test]
async fn sql_reads_and_writes_only_if_asked() {
    let (app, event_id) = with_a_parcel().await;
    let run =
        async |arguments: &[&str]| nexus(app.database(), &[&["sql"], arguments].concat()).await;
    let canned = run(&["--json"]).await.json();
    let names = canned.as_array().unwrap().iter();
    let names: Vec<_> = names.map(|query| query["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"queue-metrics"), "{names:?}");
    for name in names {
        let shown = run(&[name, "--json"]).await.json();
        assert!(shown[0]["rows"].is_array(), "{name}: {shown}");
    }
    let counted = run(&["events-by-type", "--json"]).await.json();
    assert_eq!(
        (&counted[0]["rows"][0]["count"], &counted[0]["affected"]),
        (&json!(1), &json!(2))
    );

    let several = "select event_id, payload, null as nothing, true as yes from core.event_log order by 1; select 1.5::float8 as x";
    let shown = run(&[several, "--json", "--limit", "1"]).await.json();
    let first =
        json!({ "event_id": event_id, "payload": { "parcel": 7 }, "nothing": null, "yes": true });
    assert_eq!(
        shown,
        json!([{ "rows": [first], "isMore": true, "affected": 0 }])
    );
    let shown = run(&["select 'a\u{1b}b' as x, null as y; select 2 where false"])
        .await
        .ok();
    assert_eq!(shown, "x    y\na b  null\n1 row\n\n0 rows\n");

    let delete = "delete from core.nodes";
    for text in [
        delete,
        "commit; delete from core.nodes",
        "select core.emit('demo', 'parcel.sent', '{}')",
    ] {
        let said = run(&[text]).await.failed(1);
        assert!(said.contains("read-only transaction"), "{said}");
    }
    assert!(run(&["selec"]).await.failed(1).contains("syntax error"));
    assert!(
        run(&[delete, "--write"])
            .await
            .failed(2)
            .contains("give --yes")
    );
    assert_eq!(
        sqlx_count(app.database(), "select count(*) from core.nodes").await,
        1
    );
    let update = "update core.nodes set description = 'mine'; select description from core.nodes";
    let done = run(&[update, "--write", "--yes", "--json"]).await.json();
    assert_eq!(
        (&done[0]["affected"], &done[1]["rows"][0]["description"]),
        (&json!(1), &json!("mine"))
    );
    let written = "select count(*) from core.nodes where description = 'mine'";
    assert_eq!(sqlx_count(app.database(), written).await, 1);
    app.shutdown().await;
}

#[tokio::test]
async fn a_group_is_paused_until_it_is_resumed() {
    let (app, _) = with_a_parcel().await;
    let database = app.database().clone();
    for _ in 0..2 {
        let shown = nexus(&database, &["groups", "pause", "pessimists"]).await;
        assert!(shown.ok().contains("pessimists (paused)"));
    }
    app.client().emit(&ParcelSent { parcel: 2 }).await.unwrap();
    let status = nexus(&database, &["status", "--json"]).await.json();
    let paused: Vec<(&Value, bool)> = status["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|group| (&group["group"], group["pausedAt"].is_string()))
        .filter(|(_, is_paused)| *is_paused)
        .collect();
    assert_eq!(paused, [(&json!("pessimists"), true)]);
    let resumed = nexus(&database, &["groups", "resume", "pessimists", "--json"]).await;
    assert_eq!(resumed.json()[0]["pausedAt"], Value::Null);
    app.drained().await;
    let lost = "select count(*) from core.event_log where event_type = 'parcel.lost'";
    assert_eq!(sqlx_count(&database, lost).await, 2);
    let said = nexus(&database, &["groups", "pause", "optimists"]).await;
    assert!(
        said.failed(1).contains("pessimists"),
        "names those that there are"
    );
    app.shutdown().await;
}

#[tokio::test]
async fn a_subscription_is_retired_once_nobody_declares_it() {
    let (app, _) = with_a_parcel().await;
    let database = app.database().clone();
    let retire = ["groups", "retire", "readers", "stumble"];
    let said = nexus(&database, &[&retire[..], &["--yes"]].concat())
        .await
        .failed(1);
    assert!(said.contains("stop its nodes first"), "{said}");
    app.shutdown().await;
    let plan = nexus(&database, &[&retire[..], &["--dry-run"]].concat())
        .await
        .ok();
    assert!(plan.contains("1 message would be dead letters"), "{plan}");
    assert!(
        nexus(&database, &retire)
            .await
            .failed(2)
            .contains("give --yes")
    );
    let done = nexus(&database, &[&retire[..], &["--yes", "--json"]].concat())
        .await
        .json();
    assert_eq!((&done["messages"], &done["left"]), (&json!(1), &json!(0)));
    let letters = nexus(&database, &["dead-letters", "list", "readers", "--json"])
        .await
        .json();
    assert_eq!(
        (&letters[0]["reason"], &letters[0]["handler"]),
        (&json!("Retired"), &json!("stumble"))
    );
    let said = nexus(&database, &[&retire[..], &["--yes"]].concat())
        .await
        .failed(1);
    assert!(said.contains("stumble"), "{said}");
}

#[tokio::test]
async fn the_database_is_named_by_option_environment_and_file_and_no_password_is_shown() {
    let database = TestDatabase::new().await;
    let folder = tempfile::tempdir().unwrap();
    let url = "postgres://ada:s3cret@127.0.0.1:1/shop";
    for (code, url) in [
        (3, url),
        (2, "postgres://ada:s3/cret@host/shop"),
        (2, "mysql://ada:s3cret@host"),
    ] {
        let option = end(program(folder.path()).args(["status", "--database-url", url])).await;
        let said = option.failed(code);
        assert!(said.contains("--database-url"), "{said}");
        assert!(!said.contains("s3"), "{said}");
    }
    // The environment counts more than the file.
    std::fs::write(
        folder.path().join(".env"),
        format!("CORE_DATABASE_URL={url}\nCORE_NAMESPACE=shop\n"),
    )
    .unwrap();
    let said = end(program(folder.path()).arg("status")).await.failed(3);
    assert!(
        said.contains("CORE_DATABASE_URL of the file .env"),
        "{said}"
    );
    assert!(!said.contains("s3"), "{said}");
    let mut program_on_database = program(folder.path());
    program_on_database.env("DATABASE_URL", database.url());
    let said = end(program_on_database.arg("status")).await.failed(1);
    assert!(said.contains("namespace `shop`"), "{said}");

    std::fs::write(
        folder.path().join(".env"),
        "DATABASE_URL='postgres://ada:s3cret\n",
    )
    .unwrap();
    let said = end(program(folder.path()).arg("status")).await.failed(2);
    assert!(said.contains(".env") && !said.contains("s3"), "{said}");
    let said = end(program(folder.path()).arg("stat")).await.failed(2);
    assert!(said.contains("status"), "{said}");
    let script = end(program(folder.path()).args(["completions", "bash"]))
        .await
        .ok();
    assert!(script.contains("dead-letters"), "{script}");
}

/// A folder which the user of a server of the test's own can reach.
fn reachable_folder() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory
    } else {
        Path::new("/tmp")
    };
    tempfile::Builder::new()
        .prefix("nx")
        .permissions(std::fs::Permissions::from_mode(0o755))
        .tempdir_in(parent)
        .unwrap()
}

#[tokio::test]
async fn only_migrate_up_makes_an_embedded_database() {
    let folder = reachable_folder();
    let data = folder.path().join("data");
    let run = async |arguments: &[&str]| {
        end(program(folder.path())
            .env("NEXUS_PG_DATA", &data)
            .args(arguments))
        .await
    };
    for look in [
        &["status"][..],
        &["migrate", "status"],
        &["migrate", "up", "--dry-run"],
    ] {
        let said = run(look).await.failed(2);
        assert!(said.contains("nexus migrate up"), "{said}");
    }
    assert!(!data.exists());
    run(&["migrate", "up"]).await.ok();
    let said = run(&["status"]).await.failed(1);
    assert!(said.contains("no namespace `demo`"), "{said}");
    // It stops by itself, and then its folder goes.
    let is_running = || {
        std::fs::read_dir(&data)
            .unwrap()
            .flatten()
            .any(|cluster| cluster.path().join("data/postmaster.pid").exists())
    };
    until("the server stops", async || !is_running()).await;
}

#[tokio::test]
async fn a_benchmark_has_the_fields_of_the_original_and_leaves_nothing_but_the_log() {
    let database = TestDatabase::new().await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(".env"), "BENCH_CONCURRENCY=3\n").unwrap();
    let run = end(program(folder.path())
        .env("DATABASE_URL", database.url())
        // Neither is its own: the one would end a node, the other is somebody's.
        .env("CORE_NODE_ID", "precious")
        .env("CORE_NAMESPACE", "demo")
        .env("BENCH_TOTAL", "40")
        .args(["bench", "--json"]))
    .await
    .json();
    assert_eq!(run["totalEvents"], 40);
    assert_eq!(run["concurrency"], 3);
    assert_eq!(run["eventType"], "benchmark.event");
    let number = |value: &Value| value.as_f64().unwrap();
    let (produce, end_to_end) = (
        number(&run["produceDurationMs"]),
        number(&run["endToEndDurationMs"]),
    );
    assert!(produce > 0.0 && end_to_end > 0.0, "{run:#}");
    assert!(number(&run["consumerDurationMs"]) <= end_to_end, "{run:#}");
    let rate = number(&run["throughputPerSecond"]);
    assert!(
        (rate - 40_000.0 / end_to_end).abs() < rate / 100.0,
        "{run:#}"
    );
    for spread in ["emitMs", "emitToStartMs"] {
        let spread = &run[spread];
        let sorted = ["p50", "p90", "p95", "p99", "max"].map(|name| number(&spread[name]));
        assert!(sorted.is_sorted() && sorted[0] > 0.0, "{spread}");
    }

    let bench = |arguments: &[&'static str]| [&["--namespace", "bench"], arguments].concat();
    let status = nexus(&database, &bench(&["status", "--json"])).await.json();
    assert_eq!(status["nodes"], json!([]));
    let groups = status["groups"].as_array().unwrap();
    let group = groups.iter().find(|group| group["group"] == "bench");
    assert_eq!(group.unwrap()["messages"]["counted"], 0);
    assert_eq!(group.unwrap()["handlers"], json!([]));
    let warm_up = run["warmUpEvents"].as_i64().unwrap();
    let logged = sqlx_count(&database, "select count(*) from core.event_log").await;
    assert_eq!(logged, 40 + warm_up);
    let made = sqlx_count(&database, "select count(*) from core.nodes").await;
    assert_eq!(made, 0);
}

#[tokio::test]
async fn a_benchmark_does_not_disturb_others() {
    let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let listen = nexus::UntypedHandler::new("benchmark.event", "listen", move |event, _| {
        let _ = sender.send(event.into_event());
        async { Ok(()) }
    });
    let app = App::discover().only(["listen"]).handle(listen);
    let app = TestApp::start(app).await;
    let database = app.database();
    let run = |arguments: &'static [&'static str]| async move {
        let all = [&["bench", "--total", "5"], arguments].concat();
        nexus(database, &all).await
    };
    let said = run(&["--namespace", "demo"]).await.failed(1);
    assert!(
        said.contains("handler `listen` of group `default` in namespace `demo` is subscribed to `benchmark.event`"),
        "{said}"
    );
    // Elsewhere it is no matter, nor is another type here.
    let alone = run(&[]).await.ok();
    assert!(
        alone.contains("throughputPerSecond") && alone.contains("10 events `benchmark.event` stay"),
        "{alone}"
    );
    let other = run(&[
        "--namespace",
        "demo",
        "--event-type",
        "other.event",
        "--json",
    ]);
    assert_eq!(other.await.json()["namespace"], "demo");
    app.settled().await;
    assert!(heard.try_recv().is_err());

    for (variable, value, said) in [
        (
            "BENCH_TOTAL",
            "many",
            "BENCH_TOTAL is `many`, expected a number from 1 to 1000000",
        ),
        (
            "BENCH_CONCURRENCY",
            "0",
            "BENCH_CONCURRENCY is `0`, expected a number from 1 to 256",
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let run = end(program(folder.path())
            .env("DATABASE_URL", database.url())
            .env(variable, value)
            .args(["bench"]))
        .await;
        let error = run.failed(2);
        assert!(error.contains(said), "{error}");
    }
    let said = run(&["--event-type", "No Type"]).await.failed(1);
    assert!(said.contains("event type `No Type` is refused"), "{said}");
    let empty = TestDatabase::empty().await;
    nexus(&empty, &["bench"]).await.failed(4);
    let made = "select count(*) from pg_namespace where nspname = 'core'";
    assert_eq!(sqlx_count(&empty, made).await, 0);
}

#[cfg(unix)]
#[tokio::test]
async fn a_benchmark_that_is_held_up_ends_and_tidies_up() {
    let database = TestDatabase::new().await;
    nexus(&database, &["bench", "--total", "1"]).await.ok();
    // Nothing is claimed in a paused group.
    nexus(
        &database,
        &["groups", "pause", "bench", "--namespace", "bench"],
    )
    .await
    .ok();
    let said = nexus(&database, &["bench", "--total", "3", "--limit", "2s"])
        .await
        .failed(1);
    assert!(
        said.contains("0 of 6 events were handled within 2s")
            && !said.contains("could not tidy up"),
        "{said}"
    );
    let waiting = "select count(*) from pgmq.q_core_events_bench__bench";
    assert_eq!(sqlx_count(&database, waiting).await, 0);

    let folder = tempfile::tempdir().unwrap();
    let child = program(folder.path())
        .env("DATABASE_URL", database.url())
        .args(["bench", "--total", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pool = database.pool().await;
    loop {
        let waits: i64 = sqlx::query_scalar(waiting).fetch_one(&pool).await.unwrap();
        if waits > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Another one beside it would take its events.
    let said = nexus(&database, &["bench"]).await.failed(1);
    assert!(
        said.contains("handles group `bench` in namespace `bench` already"),
        "{said}"
    );
    let id = child.id().unwrap().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().await;
    assert!(sent.unwrap().success());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert_eq!(sqlx_count(&database, waiting).await, 0);
    let left =
        "select (select count(*) from core.subscriptions) + (select count(*) from core.nodes)";
    assert_eq!(sqlx_count(&database, left).await, 0);
}

#[tokio::test]
async fn an_original_nexus_core_is_adopted() {
    let database = TestDatabase::empty().await;
    nexus(&database, &["migrate", "up"]).await.ok();
    // What stays is pgmq.
    nexus(&database, &["migrate", "down", "--to", "0", "--yes"])
        .await
        .ok();
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql(include_str!("../../tests/tests/adopt/original.sql"))
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    for refused in [&["migrate", "up"][..], &["status"], &["bench"]] {
        let said = nexus(&database, refused).await.failed(4);
        assert!(said.contains("nexus migrate adopt"), "{said}");
    }
    let adopt = ["migrate", "adopt"];
    let with = |arguments: &[&'static str]| [&adopt[..], arguments].concat();
    let plan = nexus(&database, &with(&["--dry-run", "--json"]))
        .await
        .json();
    assert_eq!(plan["events"], json!({"rows": 243, "isEstimate": false}));
    assert_eq!(plan["isDryRun"], true);
    let said = nexus(&database, &adopt).await.failed(2);
    assert!(
        said.contains("243 events and 4 messages will be taken over") && said.contains("--yes"),
        "{said}"
    );
    let said = nexus(&database, &with(&["--rename", "demo"]))
        .await
        .failed(2);
    assert!(said.contains("expected OLD=NEW"), "{said}");
    let done = with(&["--yes", "--rename", "demo=original"]);
    let done = nexus(&database, &done).await.ok();
    for told in [
        "taken over:",
        "demo is original",
        "and 2 repetitions of these, left out",
        "task report of demo has a time zone",
        "task month end of demo will be inactive: ",
        "left in core_original: the id has more than 100 bytes",
        "drop it when nobody needs it any more",
    ] {
        assert!(done.contains(told), "{told}: {done}");
    }
    let said = nexus(&database, &adopt).await.failed(4);
    assert!(said.contains("that of nexus already"), "{said}");

    let original =
        |arguments: &[&'static str]| [arguments, &["--namespace", "original", "--json"]].concat();
    let events = original(&["events", "list", "--limit", "3"]);
    let events = nexus(&database, &events).await.json();
    assert_eq!(events.as_array().unwrap().len(), 3);
    let letters = nexus(&database, &original(&["dead-letters", "list"]))
        .await
        .json();
    assert_eq!(letters[0]["error"], "Error: no mailbox 17");
    assert_eq!(letters[0]["originalEvent"]["namespace"], "original");
    let tasks = nexus(&database, &original(&["schedules", "list"]))
        .await
        .json();
    assert_eq!(tasks.as_array().unwrap().len(), 4);
}
