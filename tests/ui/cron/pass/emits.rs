//! Event types and constants that the clock emits.

use std::time::Duration;

use nexus::{
    __private::{Misfire, TASKS, TaskDescriptor},
    prelude::*,
};

#[cron("0 9 * * MON-FRI", tz = "Europe/Berlin")]
#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
#[event(type = "emits.morning")]
struct MorningTick;

#[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
#[cron("0 18 * * *")]
#[event(type = "emits.evening", key = lamp)]
struct EveningTick {
    lamp: u8,
}

/// Attributes and derives in any order, and more of them than one.
#[derive(Serialize, Deserialize)]
#[cron("@daily", name = "first_of_two", misfire = "skip", grace = "90s")]
#[derive(JsonSchema, Event)]
#[cron("@weekly", misfire = fire_all(10), formerly = ["before", "even_before"])]
#[event(type = "emits.twice")]
#[derive(Default)]
enum Twice {
    #[default]
    Once,
}

/// A constant needs no `Default`.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "emits.digest", key = kind)]
pub(super) struct Digest {
    kind: std::borrow::Cow<'static, str>,
    full: bool,
}

#[cron("@hourly")]
const HOURLY: Digest = Digest {
    kind: std::borrow::Cow::Borrowed("short"),
    full: false,
};

#[cron(
    "30 2 * * SUN#1",
    name = "monthly",
    misfire = "fire_once",
    formerly = "hourly_once"
)]
#[cron("@yearly", name = "every_year")]
pub(super) const FULL_DIGEST: Digest = Digest {
    kind: std::borrow::Cow::Borrowed("full"),
    full: true,
};

#[cfg(any())]
mod absent {}

#[cron("@hourly")]
#[cfg(any())]
const LEFT_OUT: absent::Nothing = 0;

/// The macro gets its names, expressions and types from the outer one.
macro_rules! scheduled {
    ($($name:ident: $ty:ty = $value:expr, $expression:literal;)*) => {$(
        #[cron($expression)]
        const $name: $ty = $value;
    )*};
}

scheduled! {
    MADE_BY_A_MACRO: MorningTick = MorningTick, "@hourly";
    MADE_TOO: Twice = Twice::Once, "@daily";
}

fn find(name: &str) -> &'static TaskDescriptor {
    let task = TASKS.iter().find(|task| task.name == name);
    task.expect("the item is registered")
}

fn payload(name: &str) -> (String, Option<String>) {
    let payload = (find(name).payload)(1_000).expect("the event can be stored");
    (payload.text, payload.key)
}

#[test]
fn types_are_emitted_with_their_default() {
    let task = find("morning_tick");
    assert_eq!(task.event.meta.event_type, "emits.morning");
    assert_eq!(task.schedule.expression, "0 9 * * MON-FRI");
    assert_eq!(task.schedule.time_zone, Some("Europe/Berlin"));
    assert!(task.origin.rust_path.ends_with("::MorningTick"));
    assert!(task.schedule.misfire.is_none() && task.schedule.grace.is_none());
    assert_eq!(payload("morning_tick"), ("null".to_owned(), None));
    assert_eq!(
        payload("evening_tick"),
        ("{\"lamp\":0}".to_owned(), Some("0".to_owned()))
    );
    assert_eq!(payload("twice").0, "\"Once\"");
}

#[test]
fn constants_are_emitted_as_they_are() {
    assert_eq!(
        payload("hourly"),
        (
            "{\"kind\":\"short\",\"full\":false}".to_owned(),
            Some("short".to_owned())
        )
    );
    assert_eq!(payload("monthly").1.as_deref(), Some("full"));
    assert_eq!((HOURLY.full, FULL_DIGEST.full), (false, true));
    let of_ten_bytes = (find("hourly").payload)(10);
    assert!(of_ten_bytes.is_err(), "{of_ten_bytes:?}");
}

#[test]
fn each_attribute_is_a_task() {
    let (first, second) = (find("first_of_two"), find("twice"));
    assert_eq!(first.schedule.misfire, Some(Misfire::Skip));
    assert_eq!(first.schedule.grace, Some(Duration::from_secs(90)));
    assert_eq!(second.schedule.misfire, Some(Misfire::FireAll { cap: 10 }));
    assert_eq!(second.formerly, ["before", "even_before"]);
    assert_eq!(find("monthly").schedule.misfire, Some(Misfire::FireOnce));
    assert_eq!(find("monthly").formerly, ["hourly_once"]);
    assert_eq!(find("every_year").schedule.expression, "@yearly");
}

#[test]
fn tasks_are_registered_from_every_place() {
    #[derive(Serialize, Deserialize, JsonSchema, Event, Default)]
    #[event(type = "emits.local")]
    #[cron("@monthly")]
    struct LocalTick;

    #[cron("@monthly")]
    const LOCAL: LocalTick = LocalTick;

    for name in ["local_tick", "local", "made_by_a_macro", "made_too"] {
        assert_eq!(find(name).name, name);
    }
    assert!(!TASKS.iter().any(|task| task.name == "left_out"));
}
