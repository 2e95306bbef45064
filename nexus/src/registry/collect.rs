//! The only place that knows how descriptors are gathered: `linkme`, which needs no code before
//! `main`. Another collector would replace this file and the
//! attributes that the macros' `expand` writes.

use linkme::distributed_slice;

use super::{HandlerDescriptor, TaskDescriptor};
use crate::event::{EventDescriptor, Origin};

/// Every handler that is linked into the program.
#[doc(hidden)]
#[distributed_slice]
pub static HANDLERS: [&'static HandlerDescriptor];

/// Every event type that is linked into the program.
#[doc(hidden)]
#[distributed_slice]
pub static EVENTS: [&'static EventDescriptor];

/// Every `#[cron]` event type and constant that is linked into the program.
#[doc(hidden)]
#[distributed_slice]
pub static TASKS: [&'static TaskDescriptor];

/// Names crates that the program needs only for their handlers and events.
///
/// The linker leaves a dependency out that no source file mentions, and its handlers with it. One
/// mention is enough; a package's own library counts as a dependency of its binaries.
///
/// # Examples
///
/// ```standalone_crate
/// # extern crate serde as billing;
/// # extern crate serde_json as shipping;
/// nexus::link!(billing, shipping);
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! link {
    ($($dependency:ident),+ $(,)?) => {
        $(use ::$dependency as _;)+
    };
}

/// All handlers, each once.
pub(crate) fn handlers() -> Vec<&'static HandlerDescriptor> {
    unique_handlers(HANDLERS.iter().copied())
}

/// All event types, each once.
pub(crate) fn events() -> Vec<&'static EventDescriptor> {
    unique_events(EVENTS.iter().copied())
}

/// All scheduled tasks that emit, each once.
pub(crate) fn tasks() -> Vec<&'static TaskDescriptor> {
    unique_tasks(TASKS.iter().copied())
}

pub(super) fn unique_handlers(
    all: impl Iterator<Item = &'static HandlerDescriptor>,
) -> Vec<&'static HandlerDescriptor> {
    once_each(all, |handler| {
        (Place::of(handler.origin), handler.name, handler.group)
    })
}

pub(super) fn unique_events(
    all: impl Iterator<Item = &'static EventDescriptor>,
) -> Vec<&'static EventDescriptor> {
    once_each(all, |event| {
        let meta = &event.meta;
        (Place::of(meta.origin), meta.event_type, meta.version)
    })
}

pub(super) fn unique_tasks(
    all: impl Iterator<Item = &'static TaskDescriptor>,
) -> Vec<&'static TaskDescriptor> {
    once_each(all, |task| (Place::of(task.origin), task.name))
}

/// Where something was declared, in the order in which people look for it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    crate_name: &'static str,
    file: &'static str,
    line: u32,
    rust_path: &'static str,
}

impl Place {
    fn of(origin: Origin) -> Self {
        Self {
            crate_name: origin.crate_name,
            file: origin.file,
            line: origin.line,
            rust_path: origin.rust_path,
        }
    }
}

/// By identity, so that the order does not depend on the linker. A crate can be linked twice (a library
/// and its own unit tests) and then brings everything twice.
fn once_each<T, K: Ord>(all: impl Iterator<Item = T>, identity: impl Fn(&T) -> K) -> Vec<T> {
    let mut all: Vec<T> = all.collect();
    all.sort_by_cached_key(&identity);
    all.dedup_by(|next, kept| identity(next) == identity(kept));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        event::EventMeta,
        registry::{Call, CronDescriptor, HandlerOptions, Trigger},
    };

    fn origin(rust_path: &'static str, line: u32) -> Origin {
        Origin::new(rust_path, "src/lib.rs", line)
    }

    fn schedule() -> CronDescriptor {
        CronDescriptor {
            expression: "@hourly",
            time_zone: None,
            misfire: None,
            grace: None,
        }
    }

    fn handler(
        group: Option<&'static str>,
        name: &'static str,
        origin: Origin,
    ) -> &'static HandlerDescriptor {
        Box::leak(Box::new(HandlerDescriptor {
            name,
            group,
            formerly: &[],
            origin,
            trigger: Trigger::Cron(schedule()),
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
            call: Call(&|_| Box::pin(async { Ok(crate::handler::Outcome::default()) })),
        }))
    }

    fn event(event_type: &'static str, version: u32, origin: Origin) -> &'static EventDescriptor {
        Box::leak(Box::new(EventDescriptor {
            meta: EventMeta {
                event_type,
                version,
                origin,
            },
            schema: schemars::Schema::default,
        }))
    }

    fn task(name: &'static str, origin: Origin) -> &'static TaskDescriptor {
        Box::leak(Box::new(TaskDescriptor {
            name,
            formerly: &[],
            origin,
            schedule: schedule(),
            event: event("digest", 1, origin),
            payload: |_| unreachable!("nothing is emitted here"),
        }))
    }

    /// What a crate that is linked twice brings: the same declarations at other addresses.
    #[test]
    fn a_crate_that_is_linked_twice_counts_once() {
        let handlers = || {
            [
                handler(Some("billing"), "invoice", origin("a::invoice", 9)),
                handler(None, "invoice", origin("a::invoice", 9)),
                // Two of one name and place, from a `macro_rules!` used in two modules.
                handler(None, "remind", origin("a::x::remind", 3)),
                handler(None, "remind", origin("a::y::remind", 3)),
            ]
        };
        let found = unique_handlers(handlers().into_iter().chain(handlers()));
        let found: Vec<_> = found
            .iter()
            .map(|handler| (handler.origin.rust_path, handler.group))
            .collect();
        assert_eq!(
            found,
            [
                ("a::x::remind", None),
                ("a::y::remind", None),
                ("a::invoice", None),
                ("a::invoice", Some("billing")),
            ]
        );

        let events = || {
            [
                event("paid", 2, origin("a::PaidV2", 7)),
                event("paid", 1, origin("a::Paid", 5)),
            ]
        };
        let found = unique_events(events().into_iter().chain(events()));
        let versions: Vec<u32> = found.iter().map(|event| event.meta.version).collect();
        assert_eq!(versions, [1, 2]);

        let tasks = || {
            [
                task("weekly", origin("b::Digest", 1)),
                task("daily", origin("b::Digest", 1)),
                task("hourly", origin("a::HOURLY", 50)),
            ]
        };
        let found = unique_tasks(tasks().into_iter().chain(tasks()));
        let names: Vec<&str> = found.iter().map(|task| task.name).collect();
        assert_eq!(names, ["hourly", "daily", "weekly"]);
    }

    #[test]
    fn the_order_does_not_depend_on_the_linker() {
        let all = [
            handler(None, "c", origin("b::c", 1)),
            handler(None, "b", origin("a::b", 20)),
            handler(None, "a", origin("a::a", 3)),
        ];
        let names = |all: Vec<&'static HandlerDescriptor>| -> Vec<&str> {
            all.iter().map(|handler| handler.name).collect()
        };
        assert_eq!(names(unique_handlers(all.into_iter())), ["a", "b", "c"]);
        assert_eq!(
            names(unique_handlers(all.into_iter().rev())),
            ["a", "b", "c"]
        );
    }
}
