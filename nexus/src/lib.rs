//! Typed events for Rust on the Postgres you already run.

pub mod app;
pub mod client;
mod config;
pub mod event;
pub mod handler;
#[doc(hidden)]
pub mod registry;
mod retry;
mod runtime;
mod schedule;
mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use app::{App, Handle, StartError, run, start};
pub use client::{Client, Database, EmitError};
pub use event::{Envelope, EnvelopeMeta, Event, EventPayload};
pub use handler::{Batch, Ctx, Emit, Error, FromContext, Result, ResultExt, State, Tick, Tx};
pub use jiff;
#[cfg(feature = "macros")]
pub use nexus_macros::{Event, cron, handler};
pub use retry::RetryPolicy;

/// What nearly every file of an app needs.
pub mod prelude {
    pub use crate::{
        App, Batch, Client, Ctx, Emit, Envelope, Error, Event, ResultExt, State, Tick, Tx,
    };
    #[cfg(feature = "macros")]
    pub use crate::{cron, handler};
    pub use schemars::{self, JsonSchema};
    pub use serde::{self, Deserialize, Serialize};
}

/// What the macros' code refers to. No part of the public API.
#[doc(hidden)]
pub mod __private {
    pub use crate::{
        event::{EventDescriptor, EventKey, EventMeta, Origin},
        handler::{FromContext, Input, IntoOutcome, Invocation, Outcome, Requirements},
        registry::{
            Backoff, CronDescriptor, EVENTS, HANDLERS, HandlerDescriptor, HandlerOptions, Trigger,
        },
    };

    /// Passes a handler's future on. When it is not `Send`, rustc reports it here, where it still
    /// knows the function and names the value that is to blame.
    pub fn handler_future_must_be_send<F: Future + Send>(
        future: F,
    ) -> impl Future<Output = F::Output> + Send {
        future
    }

    pub use linkme;
    pub use schemars;
    pub use serde;
}
