//! Crates of a workspace that are linked for nothing but their handlers: what is mentioned is there, what is
//! not is missing, and shows.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
};

use nexus::{prelude::*, testing::TestDatabase};
use nexus_tests::check_linked;
use serde_json::Value;

// `nexus_test_catalog` and `nexus_test_labels` are reached through these; `nexus_test_returns`, which
// this package depends on as well, is mentioned by its binary only.
nexus::link!(nexus_test_billing, nexus_test_shipping);

fn app() -> App {
    App::discover().name("shop")
}

#[test]
fn a_test_binary_has_what_the_crates_it_mentions_have() {
    check_linked(&app(), &["nexus_test_billing", "nexus_test_shipping"]);
    nexus::testing::assert_valid(&app());
}

#[test]
fn a_crate_that_is_not_mentioned_is_missing_and_shows() {
    let description = app().describe();
    assert!(
        !description.to_string().contains("allow_returns"),
        "{description}"
    );
    let problems = app().only(["allow_returns"]).validate().unwrap_err();
    assert!(
        problems.to_string().starts_with(
            "the app cannot start:\n  - App::only names `allow_returns`, which is no handler or scheduled task; known are"
        ),
        "{problems}"
    );
    let problems = problems.to_string();
    assert!(problems.ends_with(LINK), "{problems}");
    let problems = app().groups(["returns"]).validate().unwrap_err();
    assert!(problems.to_string().ends_with(LINK), "{problems}");
    // A name that was mistyped is not a crate that is missing, and a list is what it lists.
    let problems = app().only(["book_invoise"]).validate().unwrap_err();
    assert!(!problems.to_string().contains("link!"), "{problems}");
    let problems = nexus::app! {}
        .only(["allow_returns"])
        .validate()
        .unwrap_err();
    assert!(!problems.to_string().contains("link!"), "{problems}");
}

/// What is said where a crate may be missing.
const LINK: &str = "if it is in such a one, mention that by `nexus::link!(its_crate);`";

#[test]
fn a_binary_has_what_the_crates_it_mentions_have() {
    let output = Command::new(env!("CARGO_BIN_EXE_shop")).output().unwrap();
    assert!(output.status.success());
    let description: Value = serde_json::from_slice(&output.stdout).unwrap();
    let handlers: Vec<(&str, &str)> = description["handlers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|handler| {
            let crate_name = handler["source"]["crate"].as_str().unwrap();
            (crate_name, handler["name"].as_str().unwrap())
        })
        .collect();
    assert_eq!(
        handlers,
        [
            ("nexus_test_billing", "book_invoice"),
            ("nexus_test_billing", "price_product"),
            ("nexus_test_billing", "remind"),
            ("nexus_test_catalog", "index_product"),
            ("nexus_test_returns", "allow_returns"),
            ("nexus_test_shipping", "call_carrier"),
            ("nexus_test_labels", "count_label"),
            ("nexus_test_shipping", "measure_product"),
        ]
    );
}

#[tokio::test]
async fn the_start_says_what_came_from_which_crate_and_line() {
    let database = TestDatabase::new().await;
    let mut shop = Command::new(env!("CARGO_BIN_EXE_shop"))
        .arg("run")
        .env("CORE_DATABASE_URL", database.url())
        .env("CORE_LOG_LEVEL", "info,nexus=debug")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(shop.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .filter(|line| line.contains("collected"));
    let summary = lines.next().expect("the start says what it has collected");
    let counts = "collected 8 handlers from nexus_test_billing (3), nexus_test_catalog (1), nexus_test_labels (1), nexus_test_returns (1), nexus_test_shipping (2); 3 event types from nexus_test_billing (1), nexus_test_catalog (1), nexus_test_labels (1); 2 scheduled tasks from nexus_test_billing (1), nexus_test_shipping (1)";
    assert!(summary.contains(counts), "{summary}");
    let detail: Vec<String> = lines.take(13).collect();
    let wanted = [
        "handler billing/book_invoice, billing.invoice_sent v1",
        "event type labels.printed v1",
        "scheduled task call_carrier, 0 6 * * 1-5 Europe/Berlin, runs shipping/call_carrier",
        "of nexus_test_labels::count_label (tests/crates/labels/src/lib.rs:1",
    ];
    for wanted in wanted {
        assert!(
            detail.iter().any(|line| line.contains(wanted)),
            "no {wanted} in {detail:#?}"
        );
    }
    shop.kill().unwrap();
    shop.wait().unwrap();
}
