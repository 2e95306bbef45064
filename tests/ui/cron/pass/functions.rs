//! What a `#[cron]` function can look like.

use std::time::Duration;

use nexus::{
    __private::{CronDescriptor, HANDLERS, HandlerDescriptor, Misfire, Trigger},
    prelude::*,
};

#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "report.requested")]
struct ReportRequested;

#[cron("*/5 * * * *")]
async fn every_five_minutes() {}

#[cron(
    " 0 9 * * MON-FRI ",
    tz = "Europe/Berlin",
    name = "standup",
    group = "office"
)]
async fn on_weekdays(tick: Tick, tx: &mut Tx) -> nexus::Result {
    println!("due at {}", tick.due_at());
    tx.emit(&ReportRequested)?;
    Ok(())
}

#[cron("*/10 * * * * *", max_attempts = 1, timeout = 5s, backoff = "fixed(1s)", concurrency = 1)]
async fn every_ten_seconds(tx: &mut Tx, state: State<u64>, ctx: Ctx) {
    drop((state, ctx));
    let _ = tx;
}

#[cron("@hourly")]
async fn every_hour(client: Client, _: Tick) -> Emit<ReportRequested> {
    drop(client);
    Emit(ReportRequested)
}

#[cron("@hourly", misfire = "fire_all(3)", grace = 5m)]
#[cron(
    "@daily",
    name = "every_day",
    formerly = "daily",
    group = "office",
    max_attempts = 2
)]
async fn several_times(_: Tick) {}

fn find(name: &str) -> (&'static HandlerDescriptor, &'static CronDescriptor) {
    let handler = HANDLERS.iter().find(|handler| handler.name == name);
    let handler = handler.expect("the function is registered");
    match &handler.trigger {
        Trigger::Cron(cron) => (handler, cron),
        other => panic!("{name} runs on {other:?}"),
    }
}

#[test]
fn schedules_are_stored_trimmed() {
    let (handler, cron) = find("standup");
    assert_eq!(
        (cron.expression, cron.time_zone),
        ("0 9 * * MON-FRI", Some("Europe/Berlin"))
    );
    assert_eq!(handler.group, Some("office"));
    assert!(handler.uses_tx && !handler.batch);
}

#[test]
fn cron_functions_take_the_options_of_handlers() {
    let (handler, cron) = find("every_ten_seconds");
    assert_eq!((cron.expression, cron.time_zone), ("*/10 * * * * *", None));
    let options = &handler.options;
    assert_eq!(
        (options.max_attempts, options.concurrency),
        (Some(1), Some(1))
    );
    assert_eq!(options.timeout, Some(Duration::from_secs(5)));
}

#[test]
fn arguments_are_optional() {
    assert!(!find("every_five_minutes").0.uses_tx);
    assert_eq!(find("every_hour").1.expression, "@hourly");
}

#[test]
fn each_attribute_is_a_task() {
    let ((hourly, often), (daily, rarely)) = (find("several_times"), find("every_day"));
    assert_eq!((often.expression, rarely.expression), ("@hourly", "@daily"));
    assert_eq!(often.misfire, Some(Misfire::FireAll { cap: 3 }));
    assert_eq!(often.grace, Some(Duration::from_mins(5)));
    assert_eq!((rarely.misfire, rarely.grace), (None, None));
    assert_eq!((hourly.group, daily.group), (None, Some("office")));
    assert_eq!(daily.options.max_attempts, Some(2));
    assert!(hourly.formerly.is_empty());
    assert_eq!(daily.formerly, ["daily"]);
}
