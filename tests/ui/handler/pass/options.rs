//! Every option, in every spelling.

use std::time::Duration;

use nexus::{
    __private::{HANDLERS, HandlerDescriptor},
    prelude::*,
};

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "options.tested")]
struct Tested;

#[handler(
    group = "billing-eu",
    name = "with_all_options",
    formerly = ["all-options", "options"],
    from = "2026-01-31T00:00:00Z",
    max_attempts = 5,
    backoff = "exponential(1s..1h 30m)",
    timeout = "1m 30s",
    concurrency = 1_000
)]
async fn all(_: Tested) {}

#[handler(timeout = 250ms, backoff = fixed(5s), formerly = "unquoted", from = "beginning",)]
async fn without_quotes(_: Tested) {}

#[handler()]
async fn without_options(_: Tested) {}

fn find(name: &str) -> &'static HandlerDescriptor {
    HANDLERS
        .iter()
        .find(|handler| handler.name == name)
        .expect("the handler is registered")
}

#[test]
fn options_are_stored_as_written() {
    let handler = find("with_all_options");
    assert_eq!(handler.group, Some("billing-eu"));
    assert_eq!(handler.formerly, ["all-options", "options"]);
    assert!(handler.origin.rust_path.ends_with("::all"));
    let options = &handler.options;
    assert_eq!(
        options.from.map(|from| from.to_string()).as_deref(),
        Some("2026-01-31T00:00:00Z")
    );
    assert_eq!(
        (options.max_attempts, options.concurrency),
        (Some(5), Some(1_000))
    );
    assert_eq!(options.timeout, Some(Duration::from_secs(90)));
    let backoff = options.backoff.expect("the backoff is given");
    assert_eq!(
        (backoff.first, backoff.max),
        (Duration::from_secs(1), Duration::from_mins(90))
    );
}

#[test]
fn durations_need_no_quotes() {
    let options = &find("without_quotes").options;
    assert_eq!(options.timeout, Some(Duration::from_millis(250)));
    let backoff = options.backoff.expect("the backoff is given");
    assert_eq!(
        (backoff.first, backoff.max),
        (Duration::from_secs(5), Duration::from_secs(5))
    );
}

#[test]
fn options_left_out_are_the_apps() {
    let handler = find("without_options");
    let options = &handler.options;
    assert!(handler.group.is_none() && options.max_attempts.is_none());
    assert!(options.backoff.is_none() && options.timeout.is_none());
    assert!(options.concurrency.is_none());
}
