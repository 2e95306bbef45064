//! What an app knows of itself: what is linked, what is kept of it, what does not fit, and whether the
//! names that are stored are still those that were committed.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
};

use nexus::{app::Catalogue, prelude::*, testing};

/// An order was paid.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.paid")]
struct OrderPaid {
    number: u32,
}

/// Nobody here takes it.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "order.shipped", version = 2)]
struct OrderShipped {
    parcel: String,
}

/// Only `invoice` takes it.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "invoice.asked")]
struct InvoiceAsked {
    number: u32,
}

/// A scheduled task that emits.
#[cron(
    "0 9 * * 1-5",
    misfire = "skip",
    grace = "5m",
    formerly = "early_morning"
)]
#[derive(Default, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "morning.came")]
struct MorningCame;

#[handler(
    max_attempts = 3,
    backoff = "fixed(5s)",
    timeout = "1m",
    concurrency = 2
)]
async fn ship_order(_order: OrderPaid, _tx: &mut Tx) -> nexus::Result {
    Ok(())
}

#[handler(group = "billing")]
async fn invoice(_asked: Batch<InvoiceAsked>) {}

#[cron("30 4 * * *", tz = "Europe/Berlin")]
async fn tidy_up() {}

#[cron("@hourly", group = "billing")]
async fn dunning() {}

fn app() -> App {
    App::discover().name("shop")
}

fn names(app: &App) -> (Vec<String>, Vec<String>, Vec<String>) {
    let description = app.describe();
    let handlers = description.handlers.iter();
    (
        handlers
            .map(|h| format!("{}/{}", h.group, h.name))
            .collect(),
        description
            .events
            .iter()
            .map(|e| e.event_type.clone())
            .collect(),
        description
            .schedules
            .iter()
            .map(|s| s.name.clone())
            .collect(),
    )
}

#[test]
fn everything_here_fits_together() {
    testing::assert_valid(&app());
}

#[test]
fn only_keeps_the_named_and_what_they_take() {
    let (handlers, events, schedules) = names(&app().only(["ship_order", "tidy_up"]));
    assert_eq!(handlers, ["shop/ship_order", "shop/tidy_up"]);
    assert_eq!(events, ["order.paid"]);
    assert_eq!(schedules, ["tidy_up"]);

    let (handlers, events, schedules) = names(&app().only(["morning_came"]));
    assert!(handlers.is_empty());
    assert_eq!(events, ["morning.came"]);
    assert_eq!(schedules, ["morning_came"]);
}

#[test]
fn groups_leave_out_what_only_others_take() {
    // The app's own group is what its handlers without a group are in, whenever it gets its name.
    let (handlers, events, schedules) = names(&App::discover().groups(["shop"]).name("shop"));
    assert_eq!(handlers, ["shop/ship_order", "shop/tidy_up"]);
    assert_eq!(events, ["morning.came", "order.paid", "order.shipped"]);
    assert_eq!(schedules, ["morning_came", "tidy_up"]);

    let (handlers, events, schedules) = names(&app().groups(["billing"]));
    assert_eq!(handlers, ["billing/dunning", "billing/invoice"]);
    assert_eq!(events, ["invoice.asked", "order.shipped"]);
    assert_eq!(schedules, ["dunning"]);
}

#[test]
fn an_unknown_name_is_answered_with_those_there_are() {
    let problems = app()
        .only(["ship_oder"])
        .groups(["billing"])
        .validate()
        .unwrap_err();
    let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "App::only names `ship_oder`, which is no handler or scheduled task; did you mean `ship_order`? Known are dunning, invoice, morning_came, ship_order, tidy_up",
            "App::groups names `billing`, which is the group of no handler; there is none; the linker leaves out a crate that no source file mentions: if it is in such a one, mention that by `nexus::link!(its_crate);`",
        ]
    );
}

#[test]
fn a_description_says_where_everything_is_and_how_it_runs() {
    let description = app().describe();
    let ship = description
        .handlers
        .iter()
        .find(|h| h.name == "ship_order")
        .unwrap();
    assert_eq!(
        (ship.event_type.as_str(), ship.event_version),
        ("order.paid", 1)
    );
    assert_eq!(
        (ship.max_attempts, ship.timeout_ms, ship.concurrency),
        (3, 60_000, 2)
    );
    assert_eq!((ship.backoff.first_ms, ship.backoff.max_ms), (5_000, 5_000));
    assert!(ship.transaction && !ship.batch);
    assert_eq!(ship.source.crate_name, "catalogue");
    assert_eq!(ship.source.rust_path, "catalogue::ship_order");
    assert!(
        ship.source.file.ends_with("tests/tests/catalogue.rs"),
        "{}",
        ship.source.file
    );
    let invoice = description
        .handlers
        .iter()
        .find(|h| h.name == "invoice")
        .unwrap();
    assert!(invoice.batch);
    assert_eq!(
        (
            invoice.max_attempts,
            invoice.timeout_ms,
            invoice.concurrency
        ),
        (10, 30_000, 16)
    );

    let tidy_up = description
        .schedules
        .iter()
        .find(|s| s.name == "tidy_up")
        .unwrap();
    assert_eq!(
        (tidy_up.expression.as_str(), tidy_up.time_zone.as_str()),
        ("30 4 * * *", "Europe/Berlin")
    );
    assert_eq!(tidy_up.misfire, nexus::Misfire::FireOnce);
    assert_eq!(tidy_up.grace_ms, 60_000);

    let text = description.to_string();
    let line = |word: &str| {
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(word));
        let line = line.unwrap_or_else(|| panic!("no {word} in\n{text}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(
        text.contains("4 handlers")
            && text.contains("4 event types")
            && text.contains("3 scheduled tasks"),
        "{text}"
    );
    assert!(
        line("shop/ship_order").starts_with("shop/ship_order order.paid v1 tx 3 attempts, 5s..5s 60s, 2 at once catalogue::ship_order ("),
        "{text}"
    );
    assert!(
        line("dunning").starts_with(
            "dunning @hourly UTC runs billing/dunning fire_once after 60s catalogue::dunning ("
        ),
        "{text}"
    );
    assert!(
        line("morning_came").starts_with(
            "morning_came 0 9 * * 1-5 UTC emits morning.came v1 skip after 300s formerly early_morning catalogue::MorningCame ("
        ),
        "{text}"
    );
    let json = serde_json::to_value(&description).unwrap();
    assert_eq!(json["schedules"][1]["misfire"], "skip");
    assert_eq!(json["schedules"][0]["effect"]["runs"]["group"], "billing");
    assert_eq!(json["events"][0]["source"]["crate"], "catalogue");
}

#[test]
fn the_committed_catalogue_is_that_of_this_app() {
    testing::assert_catalogue(&app(), "tests/catalogue.json");
}

/// The differences between this app and what its catalogue was with `old` instead of `new`.
fn renamed(new: &str, old: &str) -> Vec<String> {
    let catalogue = app().catalogue();
    let text = catalogue.to_string();
    assert!(text.contains(new), "{new} is not in {text}");
    let committed: Catalogue = text.replace(new, old).parse().unwrap();
    let differences = catalogue.differences(&committed);
    differences.iter().map(ToString::to_string).collect()
}

#[test]
fn a_renamed_event_handler_or_schedule_is_a_difference_that_says_what_to_write() {
    assert_eq!(
        renamed(r#""order.shipped""#, r#""order.sent""#),
        [
            "event type `order.sent` version 2 is gone, and `order.shipped` is new with the same schema. What is stored keeps the old name, and what subscribed to it gets nothing more. If only the Rust type was renamed, write `#[event(type = \"order.sent\")]`"
        ]
    );
    assert_eq!(
        renamed(r#""ship_order""#, r#""send_order""#),
        [
            "handler `send_order` of group `shop` is gone, and `ship_order` is new for the same event. If it is the same handler, write `formerly = \"send_order\"`, or `name = \"send_order\"` to keep the name: else what waits for `send_order` stays where it is"
        ]
    );
    assert_eq!(
        renamed(r#""tidy_up""#, r#""clean_up""#),
        [
            "handler `clean_up` of group `shop` is gone, and `tidy_up` is new for the same event. If it is the same handler, write `formerly = \"clean_up\"`, or `name = \"clean_up\"` to keep the name: else what waits for `clean_up` stays where it is",
            "scheduled task `clean_up` is gone, and `tidy_up` is new for the same times. If it is the same task, write `formerly = \"clean_up\"`, or `name = \"clean_up\"` to keep the name",
        ]
    );
    assert_eq!(
        renamed(r#""app": "shop""#, r#""app": "store""#),
        [
            "the app `store` is called `shop` now: its handlers without a group are in another group, what waits in the old one stays there. Keep the name by `App::name(\"store\")`"
        ]
    );
}

#[test]
fn a_rename_that_says_so_is_a_difference_that_needs_no_more_than_the_file() {
    let catalogue = app().catalogue();
    let text = catalogue.to_string();
    let before = text.replace(r#""morning_came""#, r#""early_morning""#);
    let start = before
        .find(
            r#",
      "formerly""#,
        )
        .unwrap();
    let end = start + before[start..].find(']').unwrap() + 1;
    let committed: Catalogue = format!("{}{}", &before[..start], &before[end..])
        .parse()
        .unwrap();
    let differences = catalogue.differences(&committed);
    let differences: Vec<String> = differences.iter().map(ToString::to_string).collect();
    assert_eq!(
        differences,
        [
            "scheduled task `early_morning` is `morning_came` now, as `formerly` says: its history goes with it"
        ]
    );
}

#[test]
fn whatever_else_changes_is_a_difference() {
    assert_eq!(
        renamed(
            r#""emits": "morning.came v1""#,
            r#""emits": "evening.came v1""#
        ),
        [
            "scheduled task `morning_came` emits morning.came v1 now; the file says that it emits evening.came v1"
        ]
    );
    assert_eq!(
        renamed("30 4 * * *", "30 5 * * *"),
        [
            "scheduled task `tidy_up` is due by `30 4 * * *` in Europe/Berlin now, and no longer by `30 5 * * *` in Europe/Berlin"
        ]
    );
    let schema = &app().describe().events[3].schema;
    assert_eq!(
        renamed(schema, "0123"),
        [
            "event type `order.shipped` version 2 has another schema. If what is stored under the old one does not decode any more, write `version = 3`"
        ]
    );
    let differences = renamed(r#""group": "billing""#, r#""group": "money""#);
    assert_eq!(
        differences[1],
        "handler `invoice` of group `money` is in group `billing` now: what waits for it in group `money` stays where it is, and nobody handles it"
    );
}

/// What `assert_catalogue` fails with.
fn failure(path: &std::path::Path) -> String {
    let failed = catch_unwind(AssertUnwindSafe(|| testing::assert_catalogue(&app(), path)));
    let payload = failed.expect_err("the catalogue was accepted");
    payload.downcast_ref::<String>().expect("a text").clone()
}

fn scratch(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

#[test]
fn a_difference_a_missing_and_a_broken_file_fail_with_what_to_run() {
    let how = "`NEXUS_CATALOGUE=overwrite cargo test` and commit the file";
    let missing = scratch("missing.json");
    let text = failure(&missing);
    assert_eq!(
        text,
        format!("there is no {}: to write it, run {how}", missing.display())
    );

    let broken = scratch("broken.json");
    std::fs::write(&broken, "{\"app\": 1}").unwrap();
    let text = failure(&broken);
    assert!(
        text.contains("is not a catalogue of nexus (invalid type") && text.contains(how),
        "{text}"
    );

    let old = scratch("old.json");
    std::fs::write(
        &old,
        app()
            .catalogue()
            .to_string()
            .replace("ship_order", "send_order"),
    )
    .unwrap();
    let text = failure(&old);
    assert!(
        text.contains(
            "\n  - handler `send_order` of group `shop` is gone, and `ship_order` is new"
        ),
        "{text}"
    );
    let if_meant = format!("\nIf all of this is meant, run {how}. Where something is missing");
    assert!(
        text.contains(&if_meant) && text.ends_with("`nexus::link!(its_crate);`."),
        "{text}"
    );
}
