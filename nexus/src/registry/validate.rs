//! What does not fit together, found before anything runs, all of it at once.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
};

use super::{HandlerDescriptor, Trigger};
use crate::{
    event::{EventDescriptor, Origin, check_event_type, check_name},
    handler::{Requirements, StateMap},
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

/// Checks descriptors against each other and against the registered states.
pub(crate) fn validate(
    app: &str,
    handlers: &[&'static HandlerDescriptor],
    events: &[&'static EventDescriptor],
    states: &StateMap,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut problem = |text: String| problems.push(Problem { text });

    let mut types: BTreeMap<(&str, u32), Origin> = BTreeMap::new();
    for event in events {
        let meta = &event.meta;
        if let Some(other) = types.insert((meta.event_type, meta.version), meta.origin) {
            problem(format!(
                "event type `{}` version {} is declared by {other} and by {}: give one of them another `type` or `version`",
                meta.event_type, meta.version, meta.origin
            ));
        }
    }

    let mut names: BTreeMap<(&str, &str), Origin> = BTreeMap::new();
    for handler in handlers {
        let group = handler.group.unwrap_or(app);
        let origin = handler.origin;
        if let Some(other) = names.insert((group, handler.name), origin) {
            problem(format!(
                "handler `{}` of group `{group}` is declared by {other} and by {origin}: give one of them another `name` or `group`",
                handler.name
            ));
        }
        if let Err(error) = check_name("group", group) {
            problem(format!("{error}, in {origin}"));
        }
        let is_cron = matches!(handler.trigger, Trigger::Cron(_));
        if is_cron && let Err(error) = check_event_type(&tick_event_type(app, handler.name)) {
            problem(format!(
                "{error}, in {origin}: write `name = \"…\"` in `#[cron]`"
            ));
        }
        let mut requirements = Requirements::new();
        (handler.requires)(&mut requirements);
        if requirements.tick && !is_cron {
            problem(format!(
                "{origin} takes a `Tick`, which only `#[cron]` functions get"
            ));
        }
        let mut told = HashSet::new();
        for (type_id, type_name) in requirements.states {
            if !states.has(type_id) && told.insert(type_id) {
                problem(format!(
                    "{origin} takes `State<{type_name}>`, which is not registered: call `App::state` with a `{type_name}`"
                ));
            }
        }
    }
    problems
}
