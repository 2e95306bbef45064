//! What does not fit together, found before anything runs, all of it at once.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    time::Duration,
};

use jiff::Timestamp;

use super::{CronDescriptor, HandlerDescriptor, TaskDescriptor, Trigger};
use crate::{
    event::{EventDescriptor, EventMeta, Origin, check_event_type, check_name},
    handler::{Requirements, StateMap},
    schedule::Schedule,
};

/// Something in the program that has to be mended before it can start; its text says where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Problem {
    text: String,
}

impl Problem {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into() }
    }
}

/// Every [`Problem`] of an app.
#[derive(Debug, Clone, thiserror::Error)]
pub struct Problems {
    problems: Vec<Problem>,
}

impl Problems {
    pub(crate) fn check(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Self { problems })
        }
    }

    /// One by one.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the app cannot start:")?;
        for problem in &self.problems {
            write!(f, "\n  - {problem}")?;
        }
        Ok(())
    }
}

/// The event type of the ticks of a `#[cron]` function.
pub(crate) fn tick_event_type(app: &str, handler: &str) -> String {
    format!(
        "tick.{}.{handler}",
        app.to_ascii_lowercase().replace('-', "_")
    )
}

/// The name that looks most like `name`, if one does.
pub(crate) fn nearest<'a>(name: &str, names: &BTreeSet<&'a str>) -> Option<&'a str> {
    names
        .iter()
        .map(|&known| (strsim::normalized_damerau_levenshtein(name, known), known))
        .filter(|(similarity, _)| *similarity > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, nearest)| nearest)
}

/// What can be meant instead of `name`: the nearest of the names that exist, and all of them.
pub(crate) fn known(name: &str, names: &BTreeSet<&str>) -> String {
    if names.is_empty() {
        return "there is none".to_owned();
    }
    let nearest = nearest(name, names);
    let all: Vec<&str> = names.iter().copied().collect();
    let all = all.join(", ");
    match nearest {
        Some(nearest) => format!("did you mean `{nearest}`? Known are {all}"),
        None => format!("known are {all}"),
    }
}

/// What to look for where a handler is missing that the source has.
pub(crate) const LINK_ITS_CRATE: &str = "the linker leaves out a crate that no source file mentions: if it is in such a one, mention that by `nexus::link!(its_crate);`";

/// Postgres holds `statement_timeout` in milliseconds as `integer`, which is 24.8 days.
const LONGEST_TIMEOUT: Duration = Duration::from_hours(24 * 24);

/// What belongs to an app.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) app: &'a str,
    pub(crate) handlers: &'a [&'static HandlerDescriptor],
    pub(crate) events: &'a [&'static EventDescriptor],
    pub(crate) tasks: &'a [&'static TaskDescriptor],
    pub(crate) states: &'a StateMap,
    /// Schedules have to come due after this.
    pub(crate) now: Timestamp,
    pub(crate) max_payload_bytes: usize,
}

/// Checks descriptors against each other and against the registered states.
pub(crate) fn validate(parts: &Parts<'_>) -> Vec<Problem> {
    let mut found = Found(Vec::new());
    check_events(parts, &mut found);
    check_handlers(parts, &mut found);
    check_former_names(parts, &mut found);
    check_schedules(parts, &mut found);
    found.0
}

struct Found(Vec<Problem>);

impl Found {
    fn push(&mut self, text: String) {
        self.0.push(Problem { text });
    }
}

fn check_events(parts: &Parts<'_>, found: &mut Found) {
    let mut types: BTreeMap<(&str, u32), Origin> = BTreeMap::new();
    for event in parts.events {
        let EventMeta {
            event_type,
            version,
            origin,
        } = event.meta;
        if let Some(other) = types.insert((event_type, version), origin) {
            found.push(format!(
                "event type `{event_type}` version {version} is declared by {other} and by {origin}: give one of them another `type` or `version`"
            ));
        }
        if event_type == "tick" || event_type.starts_with("tick.") {
            found.push(format!(
                "event type `{event_type}` is declared by {origin}: `tick.` is kept for the ticks of `#[cron]` functions, write another `type`"
            ));
        }
    }
}

fn check_handlers(parts: &Parts<'_>, found: &mut Found) {
    let mut names: BTreeMap<(&str, &str), (Origin, bool)> = BTreeMap::new();
    for handler in parts.handlers {
        let group = handler.group.unwrap_or(parts.app);
        let origin = handler.origin;
        let is_cron = matches!(handler.trigger, Trigger::Cron(_));
        if let Some((other, other_is_cron)) = names.insert((group, handler.name), (origin, is_cron))
            // Two of these are told as scheduled tasks: another group would not do.
            && !(is_cron && other_is_cron)
        {
            found.push(format!(
                "handler `{}` of group `{group}` is declared by {other} and by {origin}: give one of them another `name` or `group`",
                handler.name
            ));
        }
        if let Err(error) = check_name("group", group) {
            found.push(format!("{error}, in {origin}"));
        }
        if is_cron && let Err(error) = check_event_type(&tick_event_type(parts.app, handler.name)) {
            found.push(format!(
                "{error}, in {origin}: write `name = \"…\"` in `#[cron]`"
            ));
        }
        if let Trigger::Untyped {
            event_type,
            version,
        } = handler.trigger
        {
            check_untyped(handler, event_type, version, found);
        }
        let mut requirements = Requirements::new();
        (handler.requires)(&mut requirements);
        if requirements.tick && !is_cron {
            found.push(format!(
                "{origin} takes a `Tick`, which only `#[cron]` functions get"
            ));
        }
        let mut told = HashSet::new();
        for (type_id, type_name) in requirements.states {
            if !parts.states.has(type_id) && told.insert(type_id) {
                found.push(format!(
                    "{origin} takes `State<{type_name}>`, which is not registered: call `App::state` with a `{type_name}`"
                ));
            }
        }
    }
}

/// What the macro would have refused.
fn check_untyped(handler: &HandlerDescriptor, event_type: &str, version: u32, found: &mut Found) {
    let HandlerDescriptor {
        name,
        origin,
        options,
        ..
    } = handler;
    for refused in [check_event_type(event_type), check_name("handler", name)] {
        if let Err(error) = refused {
            found.push(format!("{error}, in {origin}"));
        }
    }
    if event_type == "tick" || event_type.starts_with("tick.") {
        found.push(format!(
            "handler `{name}` takes `{event_type}`, in {origin}: `tick.` is kept for the ticks of `#[cron]` functions"
        ));
    }
    let counts = [
        ("version", Some(version)),
        ("max_attempts", options.max_attempts),
        ("concurrency", options.concurrency),
    ];
    for (what, count) in counts {
        if count.is_some_and(|count| count == 0 || i32::try_from(count).is_err()) {
            found.push(format!(
                "`{what}` of handler `{name}` is not from 1 to {}, in {origin}",
                i32::MAX
            ));
        }
    }
    let is_possible = |timeout: Duration| !timeout.is_zero() && timeout <= LONGEST_TIMEOUT;
    if options.timeout.is_some_and(|timeout| !is_possible(timeout)) {
        found.push(format!(
            "`timeout` of handler `{name}` is not above zero and up to 24 days, in {origin}"
        ));
    }
}

/// A name that something had before belongs to it alone, now and then.
fn check_former_names(parts: &Parts<'_>, found: &mut Found) {
    let mut claimed: BTreeMap<(&str, &str), Origin> = BTreeMap::new();
    for handler in parts.handlers {
        let group = handler.group.unwrap_or(parts.app);
        let origin = handler.origin;
        for &former in handler.formerly {
            let in_use = parts
                .handlers
                .iter()
                .find(|other| other.name == former && other.group.unwrap_or(parts.app) == group);
            check_former_name("handler", former, origin, in_use.map(|h| h.origin), found);
            if let Some(other) = claimed.insert((group, former), origin) {
                claimed_twice("handler", former, other, origin, found);
            }
        }
    }
    let schedules: Vec<_> = schedules(parts).collect();
    let mut claimed: BTreeMap<&str, Origin> = BTreeMap::new();
    for schedule in &schedules {
        for &former in schedule.formerly {
            let in_use = schedules.iter().find(|other| other.name == former);
            // A function has said so as a handler.
            if !schedule.is_function || in_use.is_some_and(|other| !other.is_function) {
                let in_use = in_use.map(|other| other.origin);
                check_former_name("scheduled task", former, schedule.origin, in_use, found);
            }
            if let Some(other) = claimed.insert(former, schedule.origin)
                && !schedule.is_function
            {
                claimed_twice("scheduled task", former, other, schedule.origin, found);
            }
        }
    }
}

fn check_former_name(
    what: &str,
    former: &str,
    origin: Origin,
    in_use: Option<Origin>,
    found: &mut Found,
) {
    match in_use {
        Some(other) if other == origin => found.push(format!(
            "{what} `{former}` says that it was formerly `{former}`, in {origin}: take that name out of `formerly`"
        )),
        Some(other) => found.push(format!(
            "{origin} says that it was formerly `{former}`, which is the {what} of {other} now: take that name out of `formerly`, or give {other} another `name`"
        )),
        None => {}
    }
}

fn claimed_twice(what: &str, former: &str, other: Origin, origin: Origin, found: &mut Found) {
    if other == origin {
        found.push(format!(
            "{origin} names `{former}` twice in `formerly`: once is enough"
        ));
    } else {
        found.push(format!(
            "{other} and {origin} both say that they were formerly the {what} `{former}`: what waits for it can go to one of them only"
        ));
    }
}

/// What has a schedule: `#[cron]` functions, event types and constants. They share their names.
struct Scheduled {
    name: &'static str,
    formerly: &'static [&'static str],
    origin: Origin,
    cron: &'static CronDescriptor,
    is_function: bool,
}

fn schedules<'a>(parts: &Parts<'a>) -> impl Iterator<Item = Scheduled> + use<'a> {
    let functions = parts.handlers.iter().filter_map(|handler| {
        let Trigger::Cron(cron) = &handler.trigger else {
            return None;
        };
        Some(Scheduled {
            name: handler.name,
            formerly: handler.formerly,
            origin: handler.origin,
            cron,
            is_function: true,
        })
    });
    functions.chain(parts.tasks.iter().map(|task| Scheduled {
        name: task.name,
        formerly: task.formerly,
        origin: task.origin,
        cron: &task.schedule,
        is_function: false,
    }))
}

fn check_schedules(parts: &Parts<'_>, found: &mut Found) {
    let mut names: BTreeMap<&str, Scheduled> = BTreeMap::new();
    for schedule in schedules(parts) {
        let Scheduled { name, origin, .. } = schedule;
        let next = Schedule::parse(schedule.cron.expression, schedule.cron.time_zone)
            .and_then(|schedule| schedule.next_after(parts.now));
        if let Err(error) = next {
            found.push(format!("{error}, in {origin}"));
        }
        if let Err(error) = schedule.cron.misfire.unwrap_or_default().check() {
            found.push(format!("{error}, in {origin}"));
        }
        if let Some(other) = names.insert(name, schedule) {
            found.push(format!(
                "scheduled task `{name}` is declared by {} and by {origin}: its name is unique in the namespace, give one of them another `name`",
                other.origin
            ));
        }
    }
    for task in parts.tasks {
        let TaskDescriptor { name, origin, .. } = task;
        let payload = || (task.payload)(parts.max_payload_bytes);
        match payload() {
            Err(error) => found.push(format!(
                "scheduled task `{name}` cannot emit its event: {error}, in {origin}"
            )),
            // Each start would be another build.
            Ok(one) if payload().is_ok_and(|other| !one.says_the_same(&other)) => {
                found.push(format!(
                    "scheduled task `{name}` has another event each time that it is made, while the one made at the start is emitted at every tick, in {origin}: leave ids and times out of its `Default` (the envelope has them), or put `#[cron]` on an `async fn` that returns `Emit` of it"
                ));
            }
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{
        handler::Outcome,
        registry::{Call, HandlerOptions, TaskPayload},
        schedule::Misfire,
    };

    const fn at(line: u32) -> Origin {
        Origin::new("shop::item", "shop/src/lib.rs", line)
    }

    const fn event(event_type: &'static str, version: u32, line: u32) -> EventDescriptor {
        EventDescriptor {
            meta: EventMeta {
                event_type,
                version,
                origin: at(line),
            },
            schema: schemars::Schema::default,
        }
    }

    static PAID: EventDescriptor = event("order.paid", 1, 1);

    const fn handler(name: &'static str, line: u32) -> HandlerDescriptor {
        HandlerDescriptor {
            name,
            group: None,
            formerly: &[],
            origin: at(line),
            trigger: Trigger::Event(&PAID),
            batch: false,
            uses_tx: false,
            options: HandlerOptions {
                max_attempts: None,
                backoff: None,
                timeout: None,
                concurrency: None,
                from: None,
            },
            requires: |_| {},
            call: Call(&|_| Box::pin(async { Ok(Outcome::default()) })),
        }
    }

    const fn schedule(expression: &'static str) -> CronDescriptor {
        CronDescriptor {
            expression,
            time_zone: None,
            misfire: None,
            grace: None,
        }
    }

    const fn function(
        name: &'static str,
        expression: &'static str,
        line: u32,
    ) -> HandlerDescriptor {
        HandlerDescriptor {
            trigger: Trigger::Cron(schedule(expression)),
            ..handler(name, line)
        }
    }

    const fn task(name: &'static str, line: u32) -> TaskDescriptor {
        TaskDescriptor {
            name,
            formerly: &[],
            origin: at(line),
            schedule: schedule("@daily"),
            event: &PAID,
            payload: |_| {
                Ok(TaskPayload {
                    text: "null".to_owned(),
                    key: None,
                })
            },
        }
    }

    fn problems(
        handlers: &[&'static HandlerDescriptor],
        events: &[&'static EventDescriptor],
        tasks: &[&'static TaskDescriptor],
    ) -> Vec<String> {
        let problems = validate(&Parts {
            app: "shop",
            handlers,
            events,
            tasks,
            states: &StateMap::default(),
            now: Timestamp::UNIX_EPOCH,
            max_payload_bytes: 1000,
        });
        problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_app_whose_parts_fit_has_no_problem() {
        static HANDLERS: [HandlerDescriptor; 2] = [
            HandlerDescriptor {
                formerly: &["send"],
                ..handler("ship", 1)
            },
            function("nightly", "@daily", 2),
        ];
        static TASKS: [TaskDescriptor; 1] = [task("hourly", 3)];
        let handlers: Vec<_> = HANDLERS.iter().collect();
        assert_eq!(problems(&handlers, &[&PAID], &[&TASKS[0]]), [""; 0]);
    }

    #[test]
    fn events_of_one_type_and_version_and_reserved_types_are_found() {
        static EVENTS: [EventDescriptor; 4] = [
            event("order.paid", 1, 10),
            event("order.paid", 1, 20),
            event("order.paid", 2, 30),
            event("tick.mine", 1, 40),
        ];
        let events: Vec<_> = EVENTS.iter().collect();
        assert_eq!(
            problems(&[], &events, &[]),
            [
                "event type `order.paid` version 1 is declared by `shop::item` (shop/src/lib.rs:10) and by `shop::item` (shop/src/lib.rs:20): give one of them another `type` or `version`",
                "event type `tick.mine` is declared by `shop::item` (shop/src/lib.rs:40): `tick.` is kept for the ticks of `#[cron]` functions, write another `type`",
            ]
        );
    }

    #[test]
    fn names_that_stand_for_two_things_are_found() {
        static HANDLERS: [HandlerDescriptor; 8] = [
            handler("ship", 1),
            handler("ship", 2),
            // In another group it is another handler.
            HandlerDescriptor {
                group: Some("billing"),
                ..handler("ship", 3)
            },
            // A task's name is unique whatever its group.
            function("nightly", "@daily", 4),
            HandlerDescriptor {
                group: Some("billing"),
                ..function("nightly", "@daily", 5)
            },
            function("hourly", "@hourly", 6),
            // And is told once, also within a group.
            function("weekly", "@weekly", 8),
            function("weekly", "@weekly", 9),
        ];
        static TASKS: [TaskDescriptor; 1] = [task("hourly", 7)];
        let handlers: Vec<_> = HANDLERS.iter().collect();
        assert_eq!(
            problems(&handlers, &[], &[&TASKS[0]]),
            [
                "handler `ship` of group `shop` is declared by `shop::item` (shop/src/lib.rs:1) and by `shop::item` (shop/src/lib.rs:2): give one of them another `name` or `group`",
                "scheduled task `nightly` is declared by `shop::item` (shop/src/lib.rs:4) and by `shop::item` (shop/src/lib.rs:5): its name is unique in the namespace, give one of them another `name`",
                "scheduled task `weekly` is declared by `shop::item` (shop/src/lib.rs:8) and by `shop::item` (shop/src/lib.rs:9): its name is unique in the namespace, give one of them another `name`",
                "scheduled task `hourly` is declared by `shop::item` (shop/src/lib.rs:6) and by `shop::item` (shop/src/lib.rs:7): its name is unique in the namespace, give one of them another `name`",
            ]
        );
    }

    #[test]
    fn former_names_that_are_in_use_or_claimed_twice_are_found() {
        static HANDLERS: [HandlerDescriptor; 6] = [
            HandlerDescriptor {
                formerly: &["ship", "pack"],
                ..handler("ship", 1)
            },
            HandlerDescriptor {
                formerly: &["ship", "wrap"],
                ..handler("send", 2)
            },
            HandlerDescriptor {
                formerly: &["wrap"],
                ..handler("dispatch", 3)
            },
            // In another group it is another name.
            HandlerDescriptor {
                group: Some("billing"),
                formerly: &["ship"],
                ..handler("bill", 4)
            },
            function("nightly", "@daily", 5),
            HandlerDescriptor {
                formerly: &["evenly"],
                ..function("early", "@daily", 6)
            },
        ];
        static TASKS: [TaskDescriptor; 2] = [
            TaskDescriptor {
                formerly: &["nightly"],
                ..task("report", 7)
            },
            TaskDescriptor {
                formerly: &["evenly"],
                ..task("even", 8)
            },
        ];
        let handlers: Vec<_> = HANDLERS.iter().collect();
        let tasks: Vec<_> = TASKS.iter().collect();
        let item = |line: u32| format!("`shop::item` (shop/src/lib.rs:{line})");
        assert_eq!(
            problems(&handlers, &[], &tasks),
            [
                format!(
                    "handler `ship` says that it was formerly `ship`, in {}: take that name out of `formerly`",
                    item(1)
                ),
                format!(
                    "{} says that it was formerly `ship`, which is the handler of {} now: take that name out of `formerly`, or give {} another `name`",
                    item(2),
                    item(1),
                    item(1)
                ),
                format!(
                    "{} and {} both say that they were formerly the handler `ship`: what waits for it can go to one of them only",
                    item(1),
                    item(2)
                ),
                format!(
                    "{} and {} both say that they were formerly the handler `wrap`: what waits for it can go to one of them only",
                    item(2),
                    item(3)
                ),
                format!(
                    "{} says that it was formerly `nightly`, which is the scheduled task of {} now: take that name out of `formerly`, or give {} another `name`",
                    item(7),
                    item(5),
                    item(5)
                ),
                format!(
                    "{} and {} both say that they were formerly the scheduled task `evenly`: what waits for it can go to one of them only",
                    item(6),
                    item(8)
                ),
            ]
        );
    }

    #[test]
    fn schedules_that_never_come_due_and_events_that_cannot_be_emitted_are_found() {
        static HANDLERS: [HandlerDescriptor; 2] = [
            function("never", "0 0 31 2 *", 1),
            HandlerDescriptor {
                trigger: Trigger::Cron(CronDescriptor {
                    time_zone: Some("Europe/Berln"),
                    misfire: Some(Misfire::FireAll { cap: 0 }),
                    ..schedule("@daily")
                }),
                ..handler("nowhere", 2)
            },
        ];
        static TASKS: [TaskDescriptor; 3] = [
            TaskDescriptor {
                payload: |limit| {
                    Err(crate::event::EncodeError::TooLarge {
                        event_type: "order.paid".to_owned(),
                        bytes: limit + 1,
                        limit,
                    })
                },
                ..task("large", 3)
            },
            TaskDescriptor {
                payload: |_| {
                    Ok(TaskPayload {
                        text: format!("{{\"id\": \"{}\"}}", uuid::Uuid::new_v4()),
                        key: None,
                    })
                },
                ..task("other", 4)
            },
            // A map has another order each time.
            TaskDescriptor {
                payload: |_| {
                    let numbers: HashMap<u8, u8> = (0..100).map(|n| (n, n)).collect();
                    Ok(TaskPayload {
                        text: serde_json::to_string(&numbers).expect("it is a map of numbers"),
                        key: None,
                    })
                },
                ..task("map", 5)
            },
        ];
        let handlers: Vec<_> = HANDLERS.iter().collect();
        let tasks: Vec<_> = TASKS.iter().collect();
        let problems = problems(&handlers, &[], &tasks);
        assert_eq!(problems.len(), 5, "{problems:#?}");
        assert!(
            problems[4].starts_with(
                "scheduled task `other` has another event each time that it is made, "
            ) && problems[4].contains("lib.rs:4"),
            "{}",
            problems[4]
        );
        assert_eq!(
            problems[0],
            "cron expression `0 0 31 2 *` never comes due again, in `shop::item` (shop/src/lib.rs:1)"
        );
        assert!(problems[1].contains("`Europe/Berln`") && problems[1].contains("lib.rs:2"));
        assert!(problems[2].contains("cap from 1") && problems[2].contains("lib.rs:2"));
        assert!(problems[3].starts_with("scheduled task `large` cannot emit its event: "));
        assert!(problems[3].ends_with("in `shop::item` (shop/src/lib.rs:3)"));
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest_and_with_all() {
        let names = BTreeSet::from(["charge_card", "refund"]);
        assert_eq!(
            known("charge_crad", &names),
            "did you mean `charge_card`? Known are charge_card, refund"
        );
        assert_eq!(known("x", &names), "known are charge_card, refund");
        assert_eq!(known("x", &BTreeSet::new()), "there is none");
    }
}
