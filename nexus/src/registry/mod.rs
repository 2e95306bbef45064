//! The descriptors that macros produce, and how they are collected.
//!
//! The linker gathers every descriptor of the program in two slices; see `collect`. What does not
//! fit together is found by `validate`, all of it at once, before anything runs.

mod collect;
mod explicit;
mod untyped;
mod validate;

pub use collect::{EVENTS, HANDLERS, TASKS};
pub(crate) use collect::{events, handlers, tasks};
pub use explicit::{CronItem, Initial, List};
pub use untyped::UntypedHandler;
pub(crate) use validate::{LINK_ITS_CRATE, Parts, known, nearest, tick_event_type, validate};
pub use validate::{Problem, Problems};

use std::{fmt, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;

use crate::{
    event::{EncodeError, Event, EventDescriptor, Origin, Outgoing},
    handler::{DerivedEvent, Invocation, Outcome, Requirements, Result},
    schedule::Misfire,
};

/// A registered handler: all that the macros know of it while compiling.
#[doc(hidden)]
#[derive(Debug)]
pub struct HandlerDescriptor {
    /// Identity within the group: `name = "…"` or the function's name.
    pub name: &'static str,
    /// `group = "…"`; `None` is the app's default group.
    pub group: Option<&'static str>,
    /// `formerly = "…"`: names in the same group under which messages may still wait for it.
    pub formerly: &'static [&'static str],
    pub origin: Origin,
    pub trigger: Trigger,
    /// Takes many messages at once.
    pub batch: bool,
    /// Takes `&mut Tx`.
    pub uses_tx: bool,
    pub options: HandlerOptions,
    /// Adds what the arguments need, such as the types of `State<T>`.
    pub requires: fn(&mut Requirements),
    pub call: Call,
}

/// The function, with its arguments taken from the invocation.
#[doc(hidden)]
#[derive(Clone, Copy)]
pub struct Call(pub &'static CallFn);

#[doc(hidden)]
pub type CallFn =
    dyn for<'a> Fn(&'a mut Invocation) -> BoxFuture<'a, Result<Outcome>> + Send + Sync;

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

impl HandlerDescriptor {
    /// The trigger in a form that changes when its meaning does.
    pub(crate) fn trigger_text(&self) -> (&'static str, Option<&'static str>) {
        match &self.trigger {
            Trigger::Event(event) => (event.meta.event_type, None),
            Trigger::Untyped { event_type, .. } => (event_type, None),
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
    /// [`UntypedHandler`]: events of this type, whose payload is any JSON.
    Untyped {
        event_type: &'static str,
        version: u32,
    },
    /// `#[cron]`: ticks of a scheduled task of the handler's name.
    Cron(CronDescriptor),
}

/// The schedule of a `#[cron]` item, checked while compiling.
#[doc(hidden)]
#[derive(Debug)]
pub struct CronDescriptor {
    /// Five fields, six with seconds first, or a name such as `@hourly`.
    pub expression: &'static str,
    /// IANA name; `None` is UTC.
    pub time_zone: Option<&'static str>,
    /// `misfire = "…"`; `None` is the default.
    pub misfire: Option<Misfire>,
    /// `grace = "…"`; `None` is the default.
    pub grace: Option<Duration>,
}

/// A `#[cron]` event type or constant: a scheduled task that emits an event.
#[doc(hidden)]
#[derive(Debug)]
pub struct TaskDescriptor {
    /// Identity within the namespace: `name = "…"`, or the item's name in snake case.
    pub name: &'static str,
    /// `formerly = "…"`: names that the task had before.
    pub formerly: &'static [&'static str],
    pub origin: Origin,
    pub schedule: CronDescriptor,
    pub event: &'static EventDescriptor,
    /// The event to emit; asked once, when the app starts.
    pub payload: fn(limit: usize) -> std::result::Result<TaskPayload, EncodeError>,
}

/// What a scheduled task emits.
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskPayload {
    /// JSON.
    pub text: String,
    /// `#[event(key = …)]`.
    pub key: Option<String>,
}

impl TaskPayload {
    /// Of the value that `#[cron]` stands on; `limit` is the most bytes that a payload may have.
    ///
    /// # Errors
    ///
    /// The event cannot be stored.
    pub fn of<E: Event>(event: &E, limit: usize) -> std::result::Result<Self, EncodeError> {
        Outgoing::new(event, limit).map(Self::from)
    }

    /// The same, of what `#[cron]` stands on.
    ///
    /// # Errors
    ///
    /// The event cannot be stored.
    pub fn of_derived<E: DerivedEvent>(
        event: &E,
        limit: usize,
    ) -> std::result::Result<Self, EncodeError> {
        (E::USE.outgoing)(event, limit).map(Self::from)
    }
}

impl TaskPayload {
    /// Whether another one says the same: maps have no order.
    pub(crate) fn says_the_same(&self, other: &Self) -> bool {
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
        self.key == other.key
            && (self.text == other.text || value(&self.text) == value(&other.text))
    }
}

impl From<Outgoing> for TaskPayload {
    fn from(outgoing: Outgoing) -> Self {
        Self {
            text: outgoing.payload,
            key: outgoing.key,
        }
    }
}

/// Options of `#[handler]`; `None` takes the app's default.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct HandlerOptions {
    pub max_attempts: Option<u32>,
    pub backoff: Option<Backoff>,
    pub timeout: Option<Duration>,
    pub concurrency: Option<u32>,
    /// `from = "…"`: what the handler is delivered of the log when it is new.
    pub from: Option<History>,
}

/// What a new handler is delivered of the event log.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    /// All that is in it.
    Beginning,
    /// What was emitted at a time or later; microseconds since 1970.
    Since { micros: i64 },
}

/// As `core.subscribe` reads it.
impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Beginning => f.write_str("beginning"),
            Self::Since { micros } => Timestamp::from_microsecond(*micros)
                .expect("the macro has read a time before the year 9999")
                .fmt(f),
        }
    }
}

/// `backoff = "exponential(1s..10m)"` or `"fixed(5s)"`.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    pub first: Duration,
    /// The ceiling; equal to `first` for a fixed delay.
    pub max: Duration,
}
