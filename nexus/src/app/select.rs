//! Which of the linked handlers, event types and scheduled tasks belong to the app.

use std::{collections::BTreeSet, fmt::Write as _};

use super::App;
use crate::{
    event::EventDescriptor,
    registry::{
        HandlerDescriptor, LINK_ITS_CRATE, Problem, TaskDescriptor, Trigger, known, nearest,
    },
};

/// What [`App::only`] and [`App::groups`] keep. Applied late, because the app's name, which is the
/// group of handlers that name none, may be given after them.
#[derive(Debug, Clone)]
pub(super) enum Filter {
    Only(Vec<String>),
    Groups(Vec<String>),
}

/// What belongs to the app.
#[derive(Debug, Default)]
pub(super) struct Selected {
    pub(super) handlers: Vec<&'static HandlerDescriptor>,
    pub(super) events: Vec<&'static EventDescriptor>,
    pub(super) tasks: Vec<&'static TaskDescriptor>,
    /// Filters that name what is not there.
    pub(super) problems: Vec<Problem>,
    /// Whether it is what the linker has collected, and not a list.
    is_discovered: bool,
}

impl App {
    pub(super) fn selected(&self) -> Selected {
        let mut selected = Selected {
            handlers: self.handlers.clone(),
            events: self.events.clone(),
            tasks: self.tasks.clone(),
            problems: Vec::new(),
            is_discovered: self.is_discovered,
        };
        for filter in &self.filters {
            match filter {
                Filter::Only(names) => selected.only(names),
                Filter::Groups(groups) => selected.groups(groups, &self.name),
            }
        }
        selected
    }
}

impl Selected {
    fn only(&mut self, names: &[String]) {
        let there: BTreeSet<&str> = self
            .handlers
            .iter()
            .map(|handler| handler.name)
            .chain(self.tasks.iter().map(|task| task.name))
            .collect();
        for name in names.iter().filter(|name| !there.contains(name.as_str())) {
            let known = self.known(name, &there);
            self.problems.push(Problem::new(format!(
                "App::only names `{name}`, which is no handler or scheduled task; {known}"
            )));
        }
        let is_kept = |name: &str| names.iter().any(|kept| kept == name);
        self.handlers.retain(|handler| is_kept(handler.name));
        self.tasks.retain(|task| is_kept(task.name));
        let used = self.used();
        self.events.retain(|event| used.contains(&identity(event)));
    }

    fn groups(&mut self, groups: &[String], app: &str) {
        let group_of = |handler: &HandlerDescriptor| handler.group.unwrap_or(app);
        let mut there: BTreeSet<&str> = self.handlers.iter().map(|h| group_of(h)).collect();
        if !self.tasks.is_empty() {
            there.insert(app);
        }
        for group in groups
            .iter()
            .filter(|group| !there.contains(group.as_str()))
        {
            let known = self.known(group, &there);
            self.problems.push(Problem::new(format!(
                "App::groups names `{group}`, which is the group of no handler; {known}"
            )));
        }
        let is_kept = |group: &str| groups.iter().any(|kept| kept == group);
        let used_by_all = self.used();
        self.handlers.retain(|handler| is_kept(group_of(handler)));
        if !is_kept(app) {
            self.tasks.clear();
        }
        let used = self.used();
        self.events.retain(|event| {
            used.contains(&identity(event)) || !used_by_all.contains(&identity(event))
        });
    }

    /// What there is instead of `name`, and why it may be missing.
    fn known(&self, name: &str, there: &BTreeSet<&str>) -> String {
        let mut text = known(name, there);
        if self.is_discovered && nearest(name, there).is_none() {
            let _ = write!(text, "; {LINK_ITS_CRATE}");
        }
        text
    }

    /// The event types that handlers take or scheduled tasks emit.
    fn used(&self) -> BTreeSet<(&'static str, u32)> {
        let taken = self
            .handlers
            .iter()
            .filter_map(|handler| match &handler.trigger {
                Trigger::Event(event) => Some(identity(event)),
                Trigger::Untyped { .. } | Trigger::Cron(_) => None,
            });
        taken
            .chain(self.tasks.iter().map(|task| identity(task.event)))
            .collect()
    }
}

fn identity(event: &EventDescriptor) -> (&'static str, u32) {
    (event.meta.event_type, event.meta.version)
}
