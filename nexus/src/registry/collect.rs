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

/// All handlers, each once: a crate that is linked twice (a library and its own unit tests)
/// brings its descriptors twice.
pub(crate) fn handlers() -> Vec<&'static HandlerDescriptor> {
    once_per_origin(HANDLERS.iter().copied(), |handler| {
        (handler.origin, handler.name)
    })
}

/// All event types, each once.
pub(crate) fn events() -> Vec<&'static EventDescriptor> {
    once_per_origin(EVENTS.iter().copied(), |event| {
        (event.meta.origin, event.meta.event_type)
    })
}

/// All scheduled tasks that emit, each once.
pub(crate) fn tasks() -> Vec<&'static TaskDescriptor> {
    once_per_origin(TASKS.iter().copied(), |task| (task.origin, task.name))
}

fn once_per_origin<T: Copy>(
    all: impl Iterator<Item = T>,
    identity: impl Fn(&T) -> (Origin, &'static str),
) -> Vec<T> {
    let mut found: Vec<T> = Vec::new();
    for item in all {
        if !found.iter().any(|known| identity(known) == identity(&item)) {
            found.push(item);
        }
    }
    found.sort_by_key(|item| {
        let (origin, name) = identity(item);
        (origin.crate_name, origin.file, origin.line, name)
    });
    found
}
