//! Handlers of event types that are known only at run time.

use std::{any::type_name, panic::Location, sync::Arc, time::Duration};

use serde_json::Value;

use super::{Backoff, Call, HandlerDescriptor, HandlerOptions, Trigger};
use crate::{
    event::{Envelope, Origin},
    handler::{Ctx, FromContext, Outcome, Result},
};

/// A handler of an event type that no Rust type stands for: its name comes from configuration, say. Give it to
/// [`App::handle`](crate::App::handle).
///
/// It is delivered the payload as it was emitted, as a [`Value`]; no schema is declared for the type. Everything else is as
/// with [`#[handler]`](macro@crate::handler): an own message for each event, attempts, backoff, dead letters. What it
/// does to a database is not tied to the completion, so it runs at least once; it reaches the database and emits by
/// [`Ctx::client`].
///
/// Its description is kept until the process ends, so make one for each start and not one for each event.
///
/// # Examples
///
/// ```standalone_crate
/// use nexus::prelude::*;
/// use nexus::UntypedHandler;
/// use serde_json::Value;
///
/// async fn log(event: Envelope<Value>, ctx: Ctx) -> nexus::Result {
///     println!("attempt {} of event {}: {}", ctx.attempt(), event.event_id(), event.event());
///     Ok(())
/// }
///
/// let event_type = std::env::var("WORKER_EVENT").unwrap_or("demo.event".to_owned());
/// let app = App::discover().handle(UntypedHandler::new(event_type, "log", log).max_attempts(3));
/// app.validate().unwrap();
/// ```
#[derive(Debug)]
#[must_use = "a handler does nothing until it is given to `App::handle`"]
pub struct UntypedHandler {
    event_type: String,
    version: u32,
    name: String,
    group: Option<String>,
    options: HandlerOptions,
    origin: Origin,
    call: Call,
}

impl UntypedHandler {
    /// Calls `run` for each event of the type. The name is the handler's identity in its group: messages wait under
    /// it, so it has to stay the same from one start to the next.
    ///
    /// Names that cannot be stored are start-up errors, as is a name that another handler of the group has.
    #[track_caller]
    pub fn new<F, Fut>(event_type: impl Into<String>, name: impl Into<String>, run: F) -> Self
    where
        F: Fn(Envelope<Value>, Ctx) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result> + Send + 'static,
    {
        let at = Location::caller();
        let run = Arc::new(run);
        let call: Box<super::CallFn> = Box::new(move |invocation| {
            let run = Arc::clone(&run);
            // Within the future, where a panic is that of the handler.
            Box::pin(async move {
                let event = invocation.take_untyped()?;
                let ctx = Ctx::from_context(invocation.context())?;
                run(event, ctx).await.map(|()| Outcome::default())
            })
        });
        Self {
            event_type: event_type.into(),
            version: 1,
            name: name.into(),
            group: None,
            options: HandlerOptions {
                max_attempts: None,
                backoff: None,
                timeout: None,
                concurrency: None,
                from: None,
            },
            origin: Origin::new(type_name::<F>(), at.file(), at.line()),
            call: Call(Box::leak(call)),
        }
    }

    /// The version of the event type that it takes; default 1, which events have that are emitted without one.
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// The group; default the app's name.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// Attempts before a message is dead-lettered, at least 1; default the [app's](crate::App::retry).
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.options.max_attempts = Some(attempts);
        self
    }

    /// How long failed attempts wait: `first`, then twice as long each time, up to `max`; default the
    /// [app's](crate::App::retry).
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        self.options.backoff = Some(Backoff { first, max });
        self
    }

    /// How long an attempt may take, up to 24 days; default 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = Some(timeout);
        self
    }

    /// How many attempts run at once in a node, at least 1; default 16.
    pub fn concurrency(mut self, attempts: u32) -> Self {
        self.options.concurrency = Some(attempts);
        self
    }

    /// As the macro leaves one. What the runtime knows of handlers lives as long as the process.
    pub(crate) fn into_descriptor(self) -> &'static HandlerDescriptor {
        let leak = |text: String| -> &'static str { text.leak() };
        Box::leak(Box::new(HandlerDescriptor {
            name: leak(self.name),
            group: self.group.map(leak),
            formerly: &[],
            origin: self.origin,
            trigger: Trigger::Untyped {
                event_type: leak(self.event_type),
                version: self.version,
            },
            batch: false,
            uses_tx: false,
            options: self.options,
            requires: |_| {},
            call: self.call,
        }))
    }
}
