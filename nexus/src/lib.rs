//! Typed events for Rust on the Postgres you already run.
//!
//! Annotated structs are events, annotated functions handle them. An event is appended to a log and
//! put into the queue of every group that wants it, in one transaction, which can be that of your
//! own rows. Workers claim messages, run handlers, and store the outcome: done, to be tried again,
//! or a dead letter. Scheduled tasks tick once in the cluster. All of it lives in your database, in
//! schema `core` and in pgmq's queues; the first start creates both.
//!
//! ```no_run
//! use nexus::prelude::*;
//!
//! /// A user has signed up.
//! #[derive(Serialize, Deserialize, JsonSchema, Event)]
//! #[event(type = "user.created")]
//! struct UserCreated {
//!     email: String,
//! }
//!
//! #[handler]
//! async fn send_welcome(user: UserCreated) -> nexus::Result {
//!     println!("welcome, {}", user.email);
//!     Ok(())
//! }
//!
//! #[tokio::main]
//! async fn main() -> nexus::Result {
//!     nexus::run(App::discover().name("mailer")).await
//! }
//! ```
//!
//! Such a program depends on `tokio`, on `serde` (whose derives need it by name), and for statements of
//! its own on `sqlx`.
//!
//! # Where to read on
//!
//! 1. [`derive@Event`] and [`macro@handler`]: the two attributes, and all that they take.
//! 2. [`Client`]: how events are emitted, alone, in a transaction, or once per idempotency key.
//! 3. [`Tx`]: the transaction in which a handler's rows, emits and completion commit together.
//! 4. [`Error`] and [`ResultExt`]: whether a failed attempt is worth another one.
//! 5. [`Envelope`], [`Batch`], [`State`], [`Ctx`], [`FromContext`]: what else handlers take.
//! 6. [`macro@cron`] and [`Tick`]: functions that run by the clock.
//! 7. [`App`], [`run`], [`start`]: settings, and how an app begins and ends.
//! 8. [`client::DeadLetter`] and [`Client::redrive`]: what was given up.
//! 9. `testing` (feature of that name): a database per test, and a clock that moves.
//!
//! What is promised, and by which tests it is held, stands in the README; the format of messages and
//! the use from SQL in `docs/envelope.md`, every setting in `docs/configuration.md`.
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
//! | `testing` | the test kit; includes `embedded` |

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
pub use nexus_macros::{Event, app, cron, handler};
pub use retry::RetryPolicy;
pub use schedule::Misfire;

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
            Backoff, CronDescriptor, CronItem, EVENTS, HANDLERS, HandlerDescriptor, HandlerOptions,
            Initial, List, TASKS, TaskDescriptor, TaskPayload, Trigger,
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

    pub use linkme;
    pub use schemars;
    pub use serde;
}

/// The programs in the README compile.
#[cfg(all(doctest, feature = "testing"))]
#[doc = include_str!("../../README.md")]
struct Readme;
