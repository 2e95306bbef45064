//! What a `#[handler]` or `#[cron]` function means.

use std::time::Duration;

use proc_macro2::{Ident, Span};
use syn::{Attribute, ReturnType, Type, Visibility};

use crate::{duration::Backoff, history::History, misfire::Misfire};

/// A function that nexus can call.
pub(crate) struct Callable {
    pub(super) ident: Ident,
    pub(super) visibility: Visibility,
    /// `#[cfg]` and lint levels of the function, which hold for its descriptors too.
    pub(super) attributes: Vec<Attribute>,
    pub(super) arguments: Vec<Argument>,
    pub(super) output: ReturnType,
}

/// What one attribute makes of the function.
pub(crate) struct Registration {
    pub(super) trigger: Trigger,
    pub(super) name: String,
    /// Where the name stands: in the attribute, or that of the function.
    pub(super) name_at: Span,
    pub(super) group: Option<String>,
    pub(super) formerly: Vec<String>,
    pub(super) from: Option<History>,
    pub(super) max_attempts: Option<u32>,
    pub(super) backoff: Option<Backoff>,
    pub(super) timeout: Option<Duration>,
    pub(super) concurrency: Option<u32>,
}

impl Registration {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// What makes the function run.
pub(crate) enum Trigger {
    /// Events of its first argument's type.
    Event,
    Cron(Schedule),
}

/// A schedule that was checked.
pub(crate) struct Schedule {
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) misfire: Option<Misfire>,
    pub(crate) grace: Option<Duration>,
}

/// An argument, by where its value comes from.
pub(super) enum Argument {
    /// Decoded from the message.
    Event(Type),
    /// Made from the context of the attempt.
    Context(Type),
    /// The transaction of the attempt.
    Tx(Type),
}
