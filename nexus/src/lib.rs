//! Typed events for Rust on the Postgres you already run.
//!
//! Annotated structs are events, annotated functions handle them. An event is appended to a log and
//! put into the queue of every group that wants it, in one transaction, which can be that of your
//! own rows. Workers claim messages, run handlers, and store the outcome: done, to be tried again,
//! or a dead letter. Scheduled tasks tick once in the cluster. All of it lives in your database, in
//! schema `core` and in pgmq's queues; the first start creates both.
//!
//! - A new reader begins with the steps below, and then picks a page of the [`guide`].
//! - The reference of the two attributes is at [`derive@Event`] and [`macro@handler`], that of settings at
//!   [`App`].
//! - The README says what is promised, and which tests hold it.
//!
#![doc = include_str!("guide/start.md")]
//!
//! # Where to read on
//!
//! | Page | Answers |
//! |---|---|
//! | [events](guide::events) | What is stored, under which name? How is it emitted, and what is refused? |
//! | [handlers](guide::handlers) | What does a handler take and return, how many run at once, in which group? |
//! | [transactions](guide::transactions) | What commits together, and what happens only once? |
//! | [retries](guide::retries) | Is a failed attempt worth another one, and when? |
//! | [dead letters](guide::dead_letters) | What becomes of the rest? How is it found, redriven, purged? |
//! | [schedules](guide::schedules) | When does a function run by the clock? |
//! | [testing](guide::testing) | How is all of this tested? |
//! | [deploying](guide::deploying) | How does it run with many nodes, versions and databases, and what is to be watched? |
//!
//! The format of messages, dead letters and the log, and the use from SQL and other languages, is in
//! `docs/envelope.md` of the repository; every setting and variable in `docs/configuration.md`.
//!
//! # What to know before the first deployment
//!
//! - A handler without `&mut Tx` runs *at least* once for each event. With it, its effects in the
//!   database happen once.
//! - Events come in no particular order.
//! - Handlers are found by the linker. A crate that is a dependency only for its handlers is named
//!   once, with [`link!`]; the start logs how many handlers came from which crates.
//! - A handler is known by group and name, an event by type and version. Messages and the log refer
//!   to them: keep them when you rename things in Rust.
//!
//! # Feature flags
//!
//! | Feature | |
//! |---|---|
//! | `macros` (default) | the derive and the attributes |
//! | `embedded` | without a database URL, start a PostgreSQL that is installed on the machine |
//! | `download` | where none is installed, download one; includes `embedded`, and brings an HTTP client with TLS |
//! | `testing` | the test kit; includes `embedded` |
//! | `otel` | traces of OpenTelemetry go on where an event is handled (`docs/tracing.md` of the repository) |

pub mod app;
pub mod client;
mod config;
pub mod event;
pub mod guide;
pub mod handler;
mod metrics;
#[doc(hidden)]
pub mod registry;
mod retry;
mod runtime;
mod schedule;
mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use app::{App, Handle, Scheduler, StartError, run, start};
pub use client::{Client, Database, EmitError};
pub use config::Pooler;
pub use event::{Envelope, EnvelopeMeta, Event, EventPayload};
pub use handler::{
    Batch, Ctx, Emit, Error, FromContext, Result, ResultExt, State, Tick, Tx, checkpoint,
};
pub use jiff;
#[cfg(feature = "macros")]
pub use nexus_macros::{Event, app, cron, handler};
pub use registry::UntypedHandler;
pub use retry::RetryPolicy;
pub use schedule::{Misfire, MisfireError};

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
        handler::{
            DerivedEvent, FromContext, Input, IntoOutcome, Invocation, Outcome, Requirements,
            Usable, Use,
        },
        registry::{
            Backoff, Call, CronDescriptor, CronItem, EVENTS, HANDLERS, HandlerDescriptor,
            HandlerOptions, History, Initial, List, TASKS, TaskDescriptor, TaskPayload, Trigger,
        },
        schedule::Misfire,
    };

    /// Passes a handler's future on. When it is not `Send`, rustc reports it here, where it still
    /// knows the function and names the value that is to blame.
    pub fn handler_future_must_be_send<F: Future + Send>(
        future: F,
    ) -> impl Future<Output = F::Output> + Send {
        future
    }

    #[cfg(feature = "testing")]
    pub use crate::testing::decoding::{decode_message, encode_payload, next_tick};
    pub use linkme;
    pub use schemars;
    pub use serde;
}

/// The programs in the README compile.
#[cfg(all(doctest, feature = "testing"))]
#[doc = include_str!("../../README.md")]
struct Readme;

/// So does that of its page about traces.
#[cfg(all(doctest, feature = "otel"))]
#[doc = include_str!("../../docs/tracing.md")]
struct Tracing;
