//! Events: what happened, as a type, and the envelope it travels in.
//!
//! Nothing in this room knows a database or waits for anything.
//!
//! - [`Event`] is what `#[derive(Event)]` implements.
//! - [`Envelope`] is an event with its identity, its time and where it came from.
//! - [`check_event_type`] and [`check_name`] are the grammar of the names that are stored.
//! - [`EncodeError`] says which events cannot be stored.
//! - [`is_traceparent`] knows the form of the W3C's trace context.
//! - [`PayloadProblem`] says where a payload does not fit the schema of its type.

mod encode;
mod envelope;
mod name;
mod outgoing;
mod schema;
mod trace;

pub use encode::EncodeError;
pub(crate) use encode::encode;
#[cfg(feature = "testing")]
pub(crate) use envelope::Body;
pub use envelope::{Envelope, EnvelopeMeta, PastError};
pub(crate) use envelope::{Headers, RawBody};
pub use name::{InvalidName, check_event_type, check_name};
pub(crate) use outgoing::{Cause, Delay, Outgoing};
pub use schema::PayloadProblem;
pub(crate) use schema::{Misfit, check_payload};
pub(crate) use trace::LONGEST_TRACESTATE;
pub use trace::is_traceparent;
#[cfg(feature = "otel")]
pub(crate) use trace::span_context;

use schemars::{JsonSchema, Schema};
use serde::{Serialize, de::DeserializeOwned};

/// A fact that has happened, as a Rust type.
///
/// Implemented by `#[derive(Event)]`, which also registers the type, so that its
/// JSON Schema is stored when the app starts.
///
/// # Examples
///
/// ```
/// use nexus::prelude::*;
///
/// /// A user has signed up.
/// #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// #[event(type = "user.created", version = 1, key = user_id)]
/// struct UserCreated {
///     user_id: u64,
///     email: String,
/// }
///
/// assert_eq!(UserCreated::EVENT_TYPE, "user.created");
/// assert_eq!(UserCreated::VERSION, 1);
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "an event is needed here",
    note = "add `#[derive(Event, Serialize, Deserialize, JsonSchema)]` to `{Self}`"
)]
pub trait Event: EventPayload {
    /// Everything the derive knows about the type.
    #[doc(hidden)]
    const META: EventMeta;

    /// The stable dotted name stored for this type, such as `user.created`.
    const EVENT_TYPE: &'static str = Self::META.event_type;

    /// The version of the schema; 1 unless `#[event(version = …)]` says otherwise.
    const VERSION: u32 = Self::META.version;

    /// The descriptor that is registered for this type.
    #[doc(hidden)]
    const DESCRIPTOR: &'static EventDescriptor = &EventDescriptor {
        meta: Self::META,
        schema: Self::schema,
    };

    /// The entity this event is about, from `#[event(key = field)]`; stored beside the event.
    fn event_key(&self) -> Option<String> {
        None
    }

    /// The JSON Schema of the payload.
    #[must_use]
    fn schema() -> Schema {
        schemars::schema_for!(Self)
    }
}

/// What an event's type must be able to do; implemented for every type that can.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an event",
    label = "missing a derive",
    note = "write `#[derive(Event, Serialize, Deserialize, JsonSchema)]`"
)]
pub trait EventPayload: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static {}

#[diagnostic::do_not_recommend]
impl<T: Serialize + DeserializeOwned + JsonSchema + Send + Sync + 'static> EventPayload for T {}

/// What can be the field of `#[event(key = …)]`: everything that has a text.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the key of an event",
    label = "not a key",
    note = "a key is stored as text: choose a field whose type implements `Display`, such as an id or a `String`"
)]
#[doc(hidden)]
pub trait EventKey {
    fn event_key(&self) -> String;
}

#[diagnostic::do_not_recommend]
impl<T: std::fmt::Display> EventKey for T {
    fn event_key(&self) -> String {
        self.to_string()
    }
}

/// What `#[derive(Event)]` knows about a type while compiling.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct EventMeta {
    pub event_type: &'static str,
    pub version: u32,
    pub origin: Origin,
}

/// A registered event type.
#[doc(hidden)]
#[derive(Debug)]
pub struct EventDescriptor {
    pub meta: EventMeta,
    pub schema: fn() -> Schema,
}

/// Where in the source an item was declared; shown in start-up errors and logs.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// `module_path!()::name`.
    pub rust_path: &'static str,
    /// The declaring crate, as it is called in paths.
    pub crate_name: &'static str,
    pub file: &'static str,
    pub line: u32,
}

impl Origin {
    /// From `module_path!()::name`, whose first segment is the name of the crate.
    #[must_use]
    pub const fn new(rust_path: &'static str, file: &'static str, line: u32) -> Self {
        let mut end = 0;
        while end < rust_path.len() && rust_path.as_bytes()[end] != b':' {
            end += 1;
        }
        let (crate_name, _) = rust_path.split_at(end);
        Self {
            rust_path,
            crate_name,
            file,
            line,
        }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ({}:{})", self.rust_path, self.file, self.line)
    }
}
