//! The descriptors that macros produce, and how they are collected.
//!
//! The linker gathers every descriptor of the program in two slices; see `collect`. What does not
//! fit together is found by `validate`, all of it at once, before anything runs.

mod collect;
mod validate;

pub use collect::{EVENTS, HANDLERS};
pub(crate) use collect::{events, handlers};
pub use validate::{Problem, Problems};
pub(crate) use validate::{tick_event_type, validate};

use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::{
    event::{EventDescriptor, Origin},
    handler::{Invocation, Outcome, Requirements, Result},
};

/// A registered handler: all that the macros know of it while compiling.
#[doc(hidden)]
#[derive(Debug)]
pub struct HandlerDescriptor {
    /// Identity within the group: `name = "…"` or the function's name.
    pub name: &'static str,
    /// `group = "…"`; `None` is the app's default group.
    pub group: Option<&'static str>,
    pub origin: Origin,
    pub trigger: Trigger,
    /// Takes many messages at once.
    pub batch: bool,
    /// Takes `&mut Tx`.
    pub uses_tx: bool,
    pub options: HandlerOptions,
    /// Adds what the arguments need, such as the types of `State<T>`.
    pub requires: fn(&mut Requirements),
    pub call: for<'a> fn(&'a mut Invocation) -> BoxFuture<'a, Result<Outcome>>,
}

impl HandlerDescriptor {
    /// The trigger in a form that changes when its meaning does.
    pub(crate) fn trigger_text(&self) -> (&'static str, Option<&'static str>) {
        match &self.trigger {
            Trigger::Event(event) => (event.meta.event_type, None),
            Trigger::Cron(cron) => (cron.expression, cron.time_zone),
        }
    }
}

/// What makes a handler run.
#[doc(hidden)]
#[derive(Debug)]
pub enum Trigger {
    /// `#[handler]`: events of this type.
    Event(&'static EventDescriptor),
    /// `#[cron]`: ticks of a scheduled task of the handler's name.
    Cron(CronDescriptor),
}

/// The schedule of a `#[cron]` function, checked while compiling.
#[doc(hidden)]
#[derive(Debug)]
pub struct CronDescriptor {
    /// Five fields, six with seconds first, or a name such as `@hourly`.
    pub expression: &'static str,
    /// IANA name; `None` is UTC.
    pub time_zone: Option<&'static str>,
}

/// Options of `#[handler]`; `None` takes the app's default.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct HandlerOptions {
    pub max_attempts: Option<u32>,
    pub backoff: Option<Backoff>,
    pub timeout: Option<Duration>,
    pub concurrency: Option<u32>,
}

/// `backoff = "exponential(1s..10m)"` or `"fixed(5s)"`.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    pub first: Duration,
    /// The ceiling; equal to `first` for a fixed delay.
    pub max: Duration,
}
