//! The example `webhooks`, run as its `main` runs it, on a database of each test's own.

#[path = "../webhooks/main.rs"]
#[expect(dead_code, reason = "`main`, and what only a terminal needs")]
mod webhooks;

use std::{
    io::{self, Cursor, Read, Write},
    path::Path,
    sync::{Arc, Mutex},
};

use clap::Parser;
use indicatif::ProgressDrawTarget;
use nexus::{App, testing::TestDatabase};
use serde_json::{Value, json};
use sqlx::PgPool;
use webhooks::{Arguments, Console, Input};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/webhooks-sample.jsonl");

/// What a run printed.
#[derive(Debug)]
struct Printed {
    output: String,
    messages: Vec<String>,
}

impl Printed {
    fn summary(&self) -> Value {
        let last = self.output.lines().last().expect("something was printed");
        serde_json::from_str(last).expect("the last line is JSON")
    }
}

/// Collects what is written, for the test to read.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

async fn run(database: &TestDatabase, input: Input, options: &[&str]) -> nexus::Result<Printed> {
    let arguments = Arguments::parse_from(["webhooks", "-"].iter().chain(options));
    let messages = Shared::default();
    let mut console = Console::new(ProgressDrawTarget::hidden(), messages.clone());
    let mut output = Vec::new();
    let app = App::discover().database_url(database.url());
    webhooks::run(&arguments, app, input, &mut console, &mut output).await?;
    let messages = String::from_utf8(messages.0.lock().unwrap().clone()).unwrap();
    Ok(Printed {
        output: String::from_utf8(output).unwrap(),
        messages: messages.lines().map(str::to_owned).collect(),
    })
}

fn sample() -> Input {
    Input::open(Path::new(SAMPLE)).unwrap()
}

async fn run_sample(database: &TestDatabase, options: &[&str]) -> Printed {
    run(database, sample(), options).await.unwrap()
}

async fn run_lines(database: &TestDatabase, lines: impl Into<Vec<u8>>) -> Printed {
    let input = Input::new("the test", Cursor::new(lines.into()));
    run(database, input, &["--json"]).await.unwrap()
}

async fn number(pool: &PgPool, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(pool).await.unwrap()
}

/// Of a summary, what was read, emitted, rejected and handled.
fn counts(summary: &Value) -> [u64; 4] {
    ["lines", "emitted", "rejected", "handled"].map(|field| summary[field].as_u64().unwrap())
}

/// After a change that is meant: `NEXUS_CATALOGUE=overwrite cargo test -p nexus-examples`.
#[test]
fn the_stored_names_are_the_committed_ones() {
    let app = App::discover().name("webhooks");
    nexus::testing::assert_catalogue(&app, "webhooks/nexus.catalogue.json");
}

#[tokio::test]
async fn counts_the_sample() {
    let database = TestDatabase::new().await;
    let printed = run_sample(&database, &["--json"]).await;
    let summary = json!({
        "lines": 21, "emitted": 15, "rejected": 6, "handled": 45, "dead_lettered": 0,
        "by_type": {
            "github.check_run": 1, "github.fork": 1, "github.issue_comment": 1, "github.issues": 1,
            "github.other": 3, "github.pull_request": 1, "github.pull_request_review": 1,
            "github.push": 2, "github.release": 1, "github.star": 2, "github.workflow_run": 1,
        },
    });
    assert_eq!(printed.summary(), summary);
}

#[tokio::test]
async fn prints_only_the_summary_as_json() {
    let database = TestDatabase::new().await;
    let printed = run_lines(&database, r#"{"event":"ping","payload":{}}"#).await;
    let expected = r#"{"lines":1,"emitted":1,"rejected":0,"handled":3,"dead_lettered":0,"by_type":{"github.other":1}}"#;
    assert_eq!(printed.output, format!("{expected}\n"));
}

#[tokio::test]
async fn prints_tables_for_people() {
    let database = TestDatabase::new().await;
    let printed = run_sample(&database, &[]).await;
    let lines: Vec<Vec<&str>> = printed
        .output
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    for expected in [
        "21 lines: 15 emitted, 6 rejected",
        "45 messages handled, 0 dead-lettered",
        "github.push 2",
        "harbour/lantern 9 1 1 2 2 1 1 1 1",
        "(none) 2 0 0 0 0 0 0 0 0",
    ] {
        let expected: Vec<&str> = expected.split_whitespace().collect();
        assert!(
            lines.contains(&expected),
            "{expected:?} in {}",
            printed.output
        );
    }
}

#[tokio::test]
async fn says_what_is_wrong_with_which_line() {
    let database = TestDatabase::new().await;
    let mut messages = run_sample(&database, &["--json"]).await.messages;
    messages.sort();
    let mut expected = [
        "line 7: not JSON: expected ident at column 2",
        "line 12: no `github.issues`: at `payload.issue.number`: invalid type: string \"nine\", expected i64",
        "line 16: blank",
        "line 19: not JSON: EOF while parsing an object at column 90",
        "line 20: not a delivery: at `payload`: expected an object",
        "line 21: not a delivery: missing field `event`",
    ];
    expected.sort_unstable();
    assert_eq!(messages, expected);
}

#[tokio::test]
async fn keeps_statistics_of_each_repository() {
    let database = TestDatabase::new().await;
    run_sample(&database, &["--json"]).await;
    let rows: Vec<Value> = sqlx::query_scalar(
        "select to_jsonb(r) - 'namespace' from webhooks_repositories r order by repository",
    )
    .fetch_all(&database.pool().await)
    .await
    .unwrap();
    let row = |repository: Option<&str>, counts: [i64; 9]| {
        let [
            deliveries,
            issues,
            merged,
            comments,
            commits,
            releases,
            stars,
            forks,
            failures,
        ] = counts;
        json!({
            "repository": repository, "deliveries": deliveries, "issues_opened": issues,
            "pull_requests_merged": merged, "comments": comments, "commits": commits,
            "releases": releases, "stars": stars, "forks": forks, "failures": failures,
        })
    };
    let expected = [
        row(Some("harbour/buoy"), [4, 0, 0, 0, 0, 0, -1, 0, 0]),
        row(Some("harbour/lantern"), [9, 1, 1, 2, 2, 1, 1, 1, 1]),
        row(None, [2, 0, 0, 0, 0, 0, 0, 0, 0]),
    ];
    assert_eq!(rows, expected);
}

#[tokio::test]
async fn keeps_an_audit_copy_of_every_event() {
    let database = TestDatabase::new().await;
    run_sample(&database, &["--json"]).await;
    let pool = database.pool().await;
    let differences = "select count(*) from core.event_log l
        full join webhooks_audit a using (event_id)
        where (a.namespace, a.event_type, a.payload) is distinct from
              (l.namespace, l.event_type, l.payload)";
    assert_eq!(
        number(&pool, "select count(*) from webhooks_audit").await,
        15
    );
    assert_eq!(number(&pool, differences).await, 0);

    let star: Value = sqlx::query_scalar(
        "select payload from webhooks_audit where event_type = 'github.star' and sender = 'ada'
         and payload ->> 'action' = 'deleted'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    // The fields of the type, with the names that GitHub gave them.
    let expected = json!({
        "action": "deleted", "starred_at": null, "repository": {"full_name": "harbour/buoy"},
        "sender": {"login": "ada"},
    });
    assert_eq!(star, expected);

    let other: Value = sqlx::query_scalar(
        "select payload from webhooks_audit where payload ->> 'event' = 'Foo-Bar'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(
        other["payload"]["nested"],
        json!({"nothing": [null, {"at": null}]})
    );
}

#[tokio::test]
async fn indexes_the_words_of_every_event() {
    let database = TestDatabase::new().await;
    run_sample(&database, &["--json"]).await;
    let pool = database.pool().await;
    assert_eq!(
        number(&pool, "select count(*) from webhooks_index").await,
        15
    );
    let found: Vec<(String, Option<String>, String)> = sqlx::query_as(
        "select event_type, repository, subject from webhooks_index
         where words @@ to_tsquery('simple', 'wick') order by event_type",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let lantern = Some("harbour/lantern".to_owned());
    let expected = [
        (
            "github.pull_request",
            "pull request #8 closed: Trim the wick",
        ),
        (
            "github.push",
            "push to refs/heads/main: Trim the wick, Polish the glass",
        ),
    ]
    .map(|(event_type, subject)| (event_type.to_owned(), lantern.clone(), subject.to_owned()));
    assert_eq!(found, expected);
}

#[tokio::test]
async fn counts_a_file_twice_that_is_read_twice() {
    let database = TestDatabase::new().await;
    for _ in 0..2 {
        let summary = run_sample(&database, &["--json"]).await.summary();
        assert_eq!(counts(&summary), [21, 15, 6, 45]);
    }
    let pool = database.pool().await;
    assert_eq!(
        number(
            &pool,
            "select sum(deliveries)::bigint from webhooks_repositories"
        )
        .await,
        30
    );
    assert_eq!(
        number(&pool, "select count(*) from webhooks_audit").await,
        30
    );
}

#[tokio::test]
async fn counts_a_file_once_with_idempotency_keys() {
    let database = TestDatabase::new().await;
    let first = run_sample(&database, &["--json", "--idempotent"]).await;
    assert_eq!(counts(&first.summary()), [21, 15, 6, 45]);
    let second = run_sample(&database, &["--json", "--idempotent"]).await;
    assert_eq!(counts(&second.summary()), [21, 0, 6, 0]);
    assert_eq!(second.summary()["by_type"], json!({}));
    let for_people = run_sample(&database, &["--idempotent"]).await.output;
    assert!(
        for_people.starts_with("21 lines: 0 emitted, 6 rejected, 15 emitted before\n"),
        "{for_people}"
    );
    let deliveries = "select sum(deliveries)::bigint from webhooks_repositories";
    assert_eq!(number(&database.pool().await, deliveries).await, 15);
}

#[tokio::test]
async fn emits_a_line_once_that_is_there_twice() {
    let database = TestDatabase::new().await;
    // Blanks around a line are not its content.
    let lines = format!(
        "{0}\n{0}\r\n  {0}",
        r#"{"event":"ping","payload":{"zen":"calm"}}"#
    );
    let input = Input::new("the test", Cursor::new(lines));
    let printed = run(&database, input, &["--json", "--idempotent"])
        .await
        .unwrap();
    assert_eq!(counts(&printed.summary()), [3, 1, 0, 3]);
}

#[tokio::test]
async fn takes_every_other_name() {
    let database = TestDatabase::new().await;
    let lines = r#"
{"event":"","payload":{}}
{"event":"Foo Bar/☃","payload":{"repository":"text","sender":[],"action":7}}
{"event":"other","payload":{"repository":{"full_name":null}}}
{"event":"github.push","payload":{"ref":5}}
{"event":"ISSUES","payload":{"issue":null}}"#;
    let printed = run_lines(&database, lines.trim()).await;
    assert_eq!(
        counts(&printed.summary()),
        [5, 5, 0, 15],
        "{:?}",
        printed.messages
    );
    let repositories = "select count(*) from webhooks_repositories where repository is null";
    assert_eq!(number(&database.pool().await, repositories).await, 1);
}

#[tokio::test]
async fn reads_what_editors_and_systems_add_to_lines() {
    let database = TestDatabase::new().await;
    let ping = r#"{"event":"ping","payload":{}}"#;
    let mut lines = format!("\u{feff}{ping}\r\n\t{ping} \r\n\r\n{ping}\n\n").into_bytes();
    lines.extend(b"{\"event\":\"ping\",\"payload\":{\"zen\":\"\xff\"}}\n");
    lines.extend(ping.as_bytes());
    let printed = run_lines(&database, lines).await;
    assert_eq!(counts(&printed.summary()), [7, 4, 3, 12]);
    assert_eq!(
        printed.messages,
        [
            "line 3: blank",
            "line 5: blank",
            "line 6: not UTF-8: byte 35 is wrong"
        ]
    );
}

#[tokio::test]
async fn rejects_what_cannot_be_stored() {
    let database = TestDatabase::new().await;
    let large = "x".repeat(1024 * 1024);
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let long = format!(
        r#"{{"event":"ping","payload":{{"text":"{}"}}}}"#,
        "x".repeat(33 << 20)
    );
    let lines = [
        r#"{"event":"ping","payload":{"zen":"a\u0000b"}}"#.to_owned(),
        format!(r#"{{"event":"ping","payload":{{"zen":"{large}"}}}}"#),
        format!(r#"{{"event":"ping","payload":{{"zen":{deep}}}}}"#),
        long,
        r#"{"event":"ping","payload":{"n":1e999}}"#.to_owned(),
        r#"{"event":"issues","payload":{"action":"opened","issue":{"number":99999999999999999999,"title":""}}}"#.to_owned(),
        r#"["ping",{}]"#.to_owned(),
        r#"{"event":"star","payload":["created",null,null,null]}"#.to_owned(),
        // What does not matter may be anything: none of it is stored.
        format!(r#"{{"event":"star","payload":{{"action":"created","a":"\u0000","b":"{large}","c":{deep},"n":1e999}}}}"#),
    ]
    .join("\n");
    let printed = run_lines(&database, lines).await;
    assert_eq!(
        counts(&printed.summary()),
        [9, 1, 8, 3],
        "{:?}",
        printed.messages
    );
    let mut messages = printed.messages;
    messages.sort();
    let expected = [
        "line 1: event `github.other` holds the character U+0000, which Postgres cannot store",
        "line 2: the payload of event `github.other` has 1048617 bytes, the limit is 1048576",
        "line 3: the payload cannot be kept: recursion limit exceeded",
        "line 4: longer than 33554432 bytes",
        "line 5: the payload cannot be kept: number out of range",
        "line 6: no `github.issues`: at `payload.issue.number`: invalid type: floating point `1e+20`, expected i64",
        "line 7: not a delivery: an array, expected an object",
        "line 8: not a delivery: at `payload`: expected an object",
    ];
    assert_eq!(messages, expected);
}

#[tokio::test]
async fn handles_the_deepest_payload_that_it_takes() {
    let database = TestDatabase::new().await;
    let lines: Vec<String> = (100..140)
        .map(|depth| {
            let (open, close) = ("[".repeat(depth), "]".repeat(depth));
            format!(r#"{{"event":"ping","payload":{{"deep":{open}{close}}}}}"#)
        })
        .collect();
    let summary = run_lines(&database, lines.join("\n")).await.summary();
    let emitted = summary["emitted"].as_u64().unwrap();
    assert!((20..40).contains(&emitted), "{summary}");
    assert_eq!(
        (&summary["handled"], &summary["dead_lettered"]),
        (&json!(emitted * 3), &json!(0))
    );
}

#[tokio::test]
async fn handles_long_texts_and_names() {
    let database = TestDatabase::new().await;
    // Words that do not compress, so that no limit of an index entry is met by luck.
    let words: Vec<String> = (0_u64..60_000)
        .map(|n| format!("{:x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
        .collect();
    let name: String = words[..2_000].concat();
    let title = words[..50_000].join(" ");
    let line = json!({"event": "issues", "payload": {
        "action": "opened", "issue": {"number": 1, "title": title}, "repository": {"full_name": name},
    }});
    let printed = run_lines(&database, line.to_string()).await;
    assert_eq!(
        counts(&printed.summary()),
        [1, 1, 0, 3],
        "{:?}",
        printed.messages
    );
}

#[tokio::test]
async fn takes_an_empty_input() {
    let database = TestDatabase::new().await;
    let printed = run_lines(&database, "").await;
    assert_eq!(
        printed.output,
        "{\"lines\":0,\"emitted\":0,\"rejected\":0,\"handled\":0,\"dead_lettered\":0,\"by_type\":{}}\n"
    );
}

#[tokio::test]
async fn keeps_namespaces_apart() {
    let database = TestDatabase::new().await;
    run_sample(&database, &["--json"]).await;
    let summary = run_sample(&database, &["--json", "--namespace", "elsewhere"])
        .await
        .summary();
    assert_eq!(counts(&summary), [21, 15, 6, 45]);
    let pool = database.pool().await;
    let most = "select max(deliveries) from webhooks_repositories";
    assert_eq!(number(&pool, most).await, 9);
}

#[tokio::test]
async fn fails_when_reading_fails() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("the disk is gone"))
        }
    }
    let database = TestDatabase::new().await;
    let line = Cursor::new("{\"event\":\"ping\",\"payload\":{}}\n");
    let input = Input::new("the test", line.chain(Broken));
    let error = run(&database, input, &[]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "could not read the test after line 1: the disk is gone"
    );
}

#[tokio::test]
async fn succeeds_when_nobody_reads_the_summary() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let database = TestDatabase::new().await;
    let arguments = Arguments::parse_from(["webhooks", SAMPLE]);
    let app = App::discover().database_url(database.url());
    let mut console = Console::new(ProgressDrawTarget::hidden(), Closed);
    webhooks::run(&arguments, app, sample(), &mut console, &mut Closed)
        .await
        .unwrap();
}

#[test]
fn names_a_file_that_cannot_be_opened() {
    let error = Input::open(Path::new("no/such/file.jsonl")).err().unwrap();
    assert_eq!(
        error.to_string(),
        "could not open `no/such/file.jsonl`: No such file or directory (os error 2)"
    );
    let error = Input::open(Path::new(env!("CARGO_MANIFEST_DIR")))
        .err()
        .unwrap();
    assert!(
        error.to_string().ends_with("is a directory; give a file"),
        "{error}"
    );
}

#[test]
fn refuses_options_it_does_not_know() {
    for wrong in [
        &["webhooks"][..],
        &["webhooks", "-", "--jsno"],
        &["webhooks", "a", "b"],
    ] {
        assert_eq!(Arguments::try_parse_from(wrong).unwrap_err().exit_code(), 2);
    }
}
