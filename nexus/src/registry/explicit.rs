//! The parts of an app by name: what `nexus::app!` makes, and what `#[cron]` leaves for it.

use super::{
    HandlerDescriptor, TaskDescriptor, Trigger,
    collect::{unique_events, unique_handlers, unique_tasks},
};
use crate::event::{EventDescriptor, Origin};

/// What `#[cron]` makes of an item; a descriptor for each attribute.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub enum CronItem {
    /// A function, which runs.
    Function(&'static [&'static HandlerDescriptor]),
    /// A type or a constant, which is emitted.
    Emits(&'static [&'static TaskDescriptor]),
}

impl CronItem {
    const fn functions(&self) -> &'static [&'static HandlerDescriptor] {
        match self {
            Self::Function(handlers) => handlers,
            Self::Emits(_) => &[],
        }
    }

    const fn emits(&self) -> &'static [&'static TaskDescriptor] {
        match self {
            Self::Function(_) => &[],
            Self::Emits(tasks) => tasks,
        }
    }
}

/// The value of a type that `#[cron]` emits.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no default value, which `#[cron]` would emit",
    label = "`Default` is missing",
    note = "add `Default` to its derives, or put `#[cron]` on a constant: `const NAME: {Self} = …;`"
)]
#[doc(hidden)]
pub trait Initial {
    fn initial() -> Self;
}

#[diagnostic::do_not_recommend]
impl<T: Default> Initial for T {
    fn initial() -> Self {
        Self::default()
    }
}

/// What `nexus::app!` lists. Its checks run while the compiler evaluates constants, so they see the
/// declarations of all crates that the list names.
#[doc(hidden)]
#[derive(Debug)]
pub struct List {
    handlers: &'static [&'static HandlerDescriptor],
    crons: &'static [CronItem],
    events: &'static [&'static EventDescriptor],
}

impl List {
    #[must_use]
    pub const fn new(
        handlers: &'static [&'static HandlerDescriptor],
        crons: &'static [CronItem],
        events: &'static [&'static EventDescriptor],
    ) -> Self {
        Self {
            handlers,
            crons,
            events,
        }
    }

    /// The handlers, and the functions among what `#[cron]` made.
    pub(crate) fn handlers(&self) -> Vec<&'static HandlerDescriptor> {
        let crons = self.crons.iter().flat_map(CronItem::functions);
        unique_handlers(self.handlers.iter().chain(crons).copied())
    }

    /// The scheduled tasks that emit.
    pub(crate) fn tasks(&self) -> Vec<&'static TaskDescriptor> {
        unique_tasks(self.crons.iter().flat_map(CronItem::emits).copied())
    }

    /// The events that are listed, and those that handlers take and tasks emit.
    pub(crate) fn events(&self) -> Vec<&'static EventDescriptor> {
        let handled = self
            .handlers
            .iter()
            .filter_map(|handler| match handler.trigger {
                Trigger::Event(event) => Some(event),
                Trigger::Untyped { .. } | Trigger::Cron(_) => None,
            });
        let emitted = self.crons.iter().flat_map(CronItem::emits);
        let emitted = emitted.map(|task| task.event);
        unique_events(self.events.iter().copied().chain(handled).chain(emitted))
    }

    /// Compares each declaration with those before it.
    ///
    /// # Panics
    ///
    /// With all that does not fit together; in a constant, that is an error of the compiler.
    #[track_caller]
    pub const fn check(&self) {
        let mut problems = Problems::new();
        let mut at = 0;
        while let Some(event) = self.event(at) {
            let mut before = 0;
            while before < at {
                if let Some(other) = self.event(before)
                    && is_same_type(other, event)
                {
                    // The event of two handlers comes twice; one that is listed twice is a slip.
                    if is_at(&other.meta.origin, &event.meta.origin) {
                        if at < self.events.len() {
                            problems.listed_twice(&event.meta.origin);
                        }
                    } else if self.is_first(before) && self.is_first(at) {
                        problems.declared_twice(other, event);
                    }
                }
                before += 1;
            }
            at += 1;
        }
        let mut at = 0;
        while let Some(name) = self.name(at) {
            let mut before = 0;
            while before < at {
                if let Some(other) = self.name(before) {
                    problems.compare_names(&other, &name);
                }
                before += 1;
            }
            at += 1;
        }
        assert!(problems.length == 0, "{}", problems.as_str());
    }

    /// Those that are listed, then those of handlers, then those of tasks.
    const fn event(&self, mut index: usize) -> Option<&'static EventDescriptor> {
        if index < self.events.len() {
            return Some(self.events[index]);
        }
        index -= self.events.len();
        let mut at = 0;
        while at < self.handlers.len() {
            if let Trigger::Event(event) = self.handlers[at].trigger {
                if index == 0 {
                    return Some(event);
                }
                index -= 1;
            }
            at += 1;
        }
        let mut at = 0;
        while at < self.crons.len() {
            let tasks = self.crons[at].emits();
            if index < tasks.len() {
                return Some(tasks[index].event);
            }
            index -= tasks.len();
            at += 1;
        }
        None
    }

    /// Whether no event before is the same declaration.
    const fn is_first(&self, index: usize) -> bool {
        let mut before = 0;
        while before < index {
            if let (Some(other), Some(event)) = (self.event(before), self.event(index))
                && is_same_type(other, event)
                && is_at(&other.meta.origin, &event.meta.origin)
            {
                return false;
            }
            before += 1;
        }
        true
    }

    const fn name(&self, mut index: usize) -> Option<Unique> {
        if index < self.handlers.len() {
            return Some(Unique::of_handler(self.handlers[index]));
        }
        index -= self.handlers.len();
        let mut at = 0;
        while at < self.crons.len() {
            match self.crons[at] {
                CronItem::Function(handlers) => {
                    if index < handlers.len() {
                        return Some(Unique::of_handler(handlers[index]));
                    }
                    index -= handlers.len();
                }
                CronItem::Emits(tasks) => {
                    if index < tasks.len() {
                        return Some(Unique::of_task(tasks[index]));
                    }
                    index -= tasks.len();
                }
            }
            at += 1;
        }
        None
    }
}

/// A name that must be the only one of its kind.
struct Unique {
    name: &'static str,
    /// Of what runs; `None` is the app's own.
    group: Option<&'static str>,
    runs: bool,
    is_scheduled: bool,
    origin: Origin,
}

impl Unique {
    const fn of_handler(handler: &HandlerDescriptor) -> Self {
        Self {
            name: handler.name,
            group: handler.group,
            runs: true,
            is_scheduled: matches!(handler.trigger, Trigger::Cron(_)),
            origin: handler.origin,
        }
    }

    const fn of_task(task: &TaskDescriptor) -> Self {
        Self {
            name: task.name,
            group: None,
            runs: false,
            is_scheduled: true,
            origin: task.origin,
        }
    }

    const fn has_group_of(&self, other: &Self) -> bool {
        match (self.group, other.group) {
            (None, None) => true,
            (Some(one), Some(other)) => same(one, other),
            _ => false,
        }
    }
}

/// Text that is written while the compiler evaluates a constant: a line for each problem.
struct Problems {
    bytes: [u8; 4096],
    length: usize,
}

impl Problems {
    const fn new() -> Self {
        Self {
            bytes: [0; 4096],
            length: 0,
        }
    }

    const fn declared_twice(&mut self, one: &EventDescriptor, other: &EventDescriptor) {
        self.start();
        self.push("event type `");
        self.push(one.meta.event_type);
        self.push("` version ");
        self.push_number(one.meta.version);
        self.declared_by(&one.meta.origin, &other.meta.origin, "`type` or `version`");
    }

    const fn compare_names(&mut self, one: &Unique, other: &Unique) {
        if !same(one.name, other.name) {
            return;
        }
        if is_at(&one.origin, &other.origin) && one.has_group_of(other) {
            self.listed_twice(&one.origin);
        } else if one.is_scheduled && other.is_scheduled {
            self.start();
            self.push("scheduled task `");
            self.push(one.name);
            self.push("`");
            self.declared_by(&one.origin, &other.origin, "`name`");
        } else if one.runs && other.runs && one.has_group_of(other) {
            self.start();
            self.push("handler `");
            self.push(one.name);
            self.push("` of ");
            if let Some(group) = one.group {
                self.push("group `");
                self.push(group);
                self.push("`");
            } else {
                self.push("the app's own group");
            }
            self.declared_by(&one.origin, &other.origin, "`name` or `group`");
        }
    }

    const fn listed_twice(&mut self, origin: &Origin) {
        self.start();
        self.push("`");
        self.push(origin.rust_path);
        self.push("` is listed twice: remove one of them");
    }

    const fn declared_by(&mut self, one: &Origin, other: &Origin, advice: &str) {
        self.push(" is declared by ");
        self.push_origin(one);
        self.push(" and by ");
        self.push_origin(other);
        self.push(": give one of them another ");
        self.push(advice);
    }

    const fn push_origin(&mut self, origin: &Origin) {
        self.push("`");
        self.push(origin.rust_path);
        self.push("` (");
        self.push(origin.file);
        self.push(":");
        self.push_number(origin.line);
        self.push(")");
    }

    const fn start(&mut self) {
        if self.length > 0 {
            self.push("\n");
        }
    }

    const fn push_number(&mut self, number: u32) {
        const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
        if number >= 10 {
            self.push_number(number / 10);
        }
        self.push(DIGITS[(number % 10) as usize]);
    }

    /// What does not fit any more is left out; the first problems are enough to go on.
    const fn push(&mut self, text: &str) {
        let text = text.as_bytes();
        if self.length + text.len() > self.bytes.len() {
            return;
        }
        let mut at = 0;
        while at < text.len() {
            self.bytes[self.length] = text[at];
            self.length += 1;
            at += 1;
        }
    }

    const fn as_str(&self) -> &str {
        let (text, _) = self.bytes.split_at(self.length);
        match std::str::from_utf8(text) {
            Ok(text) => text,
            Err(_) => unreachable!(),
        }
    }
}

const fn is_same_type(one: &EventDescriptor, other: &EventDescriptor) -> bool {
    one.meta.version == other.meta.version && same(one.meta.event_type, other.meta.event_type)
}

/// Whether both are the same declaration; a crate that is linked twice has it twice.
const fn is_at(one: &Origin, other: &Origin) -> bool {
    one.line == other.line && same(one.rust_path, other.rust_path) && same(one.file, other.file)
}

const fn same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    if one.len() != other.len() {
        return false;
    }
    let mut at = 0;
    while at < one.len() {
        if one[at] != other[at] {
            return false;
        }
        at += 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::EventMeta,
        handler::Outcome,
        registry::{Call, CronDescriptor, HandlerOptions},
    };

    const fn event(event_type: &'static str, origin: Origin) -> EventDescriptor {
        EventDescriptor {
            meta: EventMeta {
                event_type,
                version: 12,
                origin,
            },
            schema: schemars::Schema::default,
        }
    }

    const fn schedule() -> CronDescriptor {
        CronDescriptor {
            expression: "@hourly",
            time_zone: None,
            misfire: None,
            grace: None,
        }
    }

    const fn handler(
        group: Option<&'static str>,
        name: &'static str,
        trigger: Trigger,
        rust_path: &'static str,
    ) -> HandlerDescriptor {
        HandlerDescriptor {
            name,
            group,
            formerly: &[],
            origin: Origin::new(rust_path, "src/lib.rs", 30),
            trigger,
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

    const fn task(name: &'static str, rust_path: &'static str) -> TaskDescriptor {
        TaskDescriptor {
            name,
            formerly: &[],
            origin: Origin::new(rust_path, "src/lib.rs", 5),
            schedule: schedule(),
            event: &DIGEST,
            payload: |_| unreachable!("nothing is emitted here"),
        }
    }

    static PAID: EventDescriptor = event("paid", Origin::new("a::Paid", "src/lib.rs", 1));
    static DIGEST: EventDescriptor = event("digest", Origin::new("a::Digest", "src/lib.rs", 2));
    static SENT: EventDescriptor = event("sent", Origin::new("a::Sent", "src/lib.rs", 3));
    static INVOICE: HandlerDescriptor = handler(
        Some("billing"),
        "invoice",
        Trigger::Event(&PAID),
        "a::invoice",
    );
    static REMIND: HandlerDescriptor = handler(None, "remind", Trigger::Event(&PAID), "a::remind");
    static TIDY_UP: HandlerDescriptor =
        handler(None, "tidy_up", Trigger::Cron(schedule()), "a::tidy_up");
    static HOURLY: TaskDescriptor = task("hourly", "a::HOURLY");

    #[test]
    fn events_come_along_with_what_needs_them() {
        static LIST: List = List::new(
            &[&INVOICE, &REMIND],
            &[CronItem::Emits(&[&HOURLY]), CronItem::Function(&[&TIDY_UP])],
            &[&SENT],
        );
        LIST.check();
        let types: Vec<_> = LIST.events().iter().map(|e| e.meta.event_type).collect();
        assert_eq!(types, ["paid", "digest", "sent"]);
        let names: Vec<_> = LIST.handlers().iter().map(|h| h.name).collect();
        assert_eq!(names, ["invoice", "remind", "tidy_up"]);
        let names: Vec<_> = LIST.tasks().iter().map(|t| t.name).collect();
        assert_eq!(names, ["hourly"]);
    }

    #[test]
    #[should_panic(
        expected = "event type `paid` version 12 is declared by `b::Paid` (src/b.rs:107) and by `a::Paid` (src/lib.rs:1): give one of them another `type` or `version`"
    )]
    fn finds_an_event_type_of_two_crates() {
        static OTHER: EventDescriptor = event("paid", Origin::new("b::Paid", "src/b.rs", 107));
        static LIST: List = List::new(&[&INVOICE], &[], &[&OTHER]);
        LIST.check();
    }

    #[test]
    #[should_panic(
        expected = "handler `invoice` of group `billing` is declared by `a::invoice` (src/lib.rs:30) and by `b::invoice` (src/lib.rs:30): give one of them another `name` or `group`\nhandler `remind` of the app's own group is declared by"
    )]
    fn finds_handlers_of_one_name() {
        static OTHER: HandlerDescriptor = handler(
            Some("billing"),
            "invoice",
            Trigger::Event(&PAID),
            "b::invoice",
        );
        static ANOTHER: HandlerDescriptor =
            handler(None, "remind", Trigger::Cron(schedule()), "b::remind");
        static LIST: List = List::new(
            &[&INVOICE, &OTHER, &REMIND],
            &[CronItem::Function(&[&ANOTHER])],
            &[],
        );
        LIST.check();
    }

    #[test]
    #[should_panic(
        expected = "scheduled task `tidy_up` is declared by `a::tidy_up` (src/lib.rs:30) and by `b::TIDY_UP` (src/lib.rs:5): give one of them another `name`"
    )]
    fn finds_tasks_of_one_name() {
        static OTHER: TaskDescriptor = task("tidy_up", "b::TIDY_UP");
        static LIST: List = List::new(
            &[],
            &[CronItem::Function(&[&TIDY_UP]), CronItem::Emits(&[&OTHER])],
            &[],
        );
        LIST.check();
    }

    #[test]
    fn a_handler_and_a_schedule_may_share_a_name() {
        static OTHER: TaskDescriptor = task("remind", "b::Remind");
        static LIST: List = List::new(&[&REMIND], &[CronItem::Emits(&[&OTHER])], &[]);
        LIST.check();
    }
}
