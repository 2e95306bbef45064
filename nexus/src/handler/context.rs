use std::{
    any::{Any, TypeId, type_name},
    collections::HashMap,
    fmt,
    ops::Deref,
    sync::Arc,
};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Error, Result};
use crate::{client::Client, event::EnvelopeMeta};

/// What a handler may take after its event.
///
/// Implement it for types of your own that are made from what an attempt knows:
///
/// ```
/// use nexus::{Ctx, FromContext, handler::Context};
///
/// /// The key under which other systems recognise this delivery.
/// struct DeliveryKey(String);
///
/// impl FromContext for DeliveryKey {
///     fn from_context(context: &Context) -> nexus::Result<Self> {
///         Ok(Self(Ctx::from_context(context)?.meta().delivery_key()))
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler argument",
    label = "not a handler argument",
    note = "a handler takes its event first, then any of `State<T>`, `Ctx`, `Client` and `&mut Tx`; a `#[cron]` function takes no event",
    note = "for a shared value write `State<{Self}>` and register it with `App::state`"
)]
pub trait FromContext: Sized + Send {
    /// Makes the argument for one call.
    ///
    /// # Errors
    ///
    /// Fails the attempt.
    fn from_context(context: &Context) -> Result<Self>;

    /// Says what must be there when the app starts.
    fn require(requirements: &mut Requirements) {
        let _ = requirements;
    }
}

/// What is known while a handler runs; what [`FromContext`] makes arguments from. Other arguments can be
/// made of it in turn: `Ctx::from_context(context)`.
#[derive(Clone)]
pub struct Context {
    pub(crate) shared: Arc<Shared>,
    pub(crate) meta: Arc<EnvelopeMeta>,
    pub(crate) max_attempts: u32,
    pub(crate) lease_lost: CancellationToken,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("meta", &self.meta)
            .finish_non_exhaustive()
    }
}

/// What all handlers of a node share.
pub(crate) struct Shared {
    pub(crate) states: StateMap,
    pub(crate) client: Client,
    pub(crate) shutdown: CancellationToken,
}

/// A value that the app holds once and all handlers share.
///
/// Register it with [`App::state`](crate::App::state); a handler that takes a state nobody registered is a
/// start-up error. It derefs to the value. What changes needs a lock or an atomic inside.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { email: String }
/// struct Mailer {
///     sender: String,
/// }
///
/// #[handler]
/// async fn send_welcome(user: UserCreated, mailer: State<Mailer>) {
///     println!("{} writes to {}", mailer.sender, user.email);
/// }
///
/// let app = App::discover().state(Mailer { sender: "shop@example.com".to_owned() });
/// ```
pub struct State<T> {
    value: Arc<T>,
}

impl<T> Clone for State<T> {
    fn clone(&self) -> Self {
        Self {
            value: Arc::clone(&self.value),
        }
    }
}

impl<T> Deref for State<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for State<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}

impl<T: Send + Sync + 'static> FromContext for State<T> {
    fn from_context(context: &Context) -> Result<Self> {
        let value = context.shared.states.get::<T>().ok_or_else(|| {
            Error::permanent(format!("no state `{}` is registered", type_name::<T>()))
        })?;
        Ok(Self { value })
    }

    fn require(requirements: &mut Requirements) {
        requirements.state::<T>();
    }
}

/// The attempt itself: which delivery, which attempt, the client of the app, and whether to stop.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { email: String }
/// #[handler(max_attempts = 3)]
/// async fn send_welcome(user: UserCreated, ctx: Ctx) -> nexus::Result {
///     if ctx.is_last_attempt() {
///         println!("attempt {} for {} is the last", ctx.attempt(), user.email);
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Ctx {
    context: Context,
}

impl Ctx {
    /// Everything known of the event besides its payload. For a batch: of its first event.
    #[must_use]
    pub fn meta(&self) -> &EnvelopeMeta {
        &self.context.meta
    }

    /// Which attempt this is; counts from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.context.meta.attempt()
    }

    /// Whether a replay delivers the event: see [`EnvelopeMeta::replay_id`]. For a batch: its first event.
    #[must_use]
    pub fn is_replayed(&self) -> bool {
        self.context.meta.is_replayed()
    }

    /// Whether an error now leads to a dead letter instead of another attempt.
    #[must_use]
    pub fn is_last_attempt(&self) -> bool {
        self.attempt() >= self.context.max_attempts
    }

    /// The app's client, for emits that do not belong to the handler's transaction.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.context.shared.client
    }

    /// Completes when the result of this attempt no longer counts, because its lease was lost, or
    /// when the node is shutting down: a long handler should then come to an end.
    pub async fn cancelled(&self) {
        tokio::select! {
            () = self.context.lease_lost.cancelled() => {}
            () = self.context.shared.shutdown.cancelled() => {}
        }
    }
}

impl FromContext for Ctx {
    fn from_context(context: &Context) -> Result<Self> {
        Ok(Self {
            context: context.clone(),
        })
    }
}

impl FromContext for Client {
    fn from_context(context: &Context) -> Result<Self> {
        Ok(context.shared.client.clone())
    }
}

/// The moment a [`#[cron]`](macro@crate::cron) function runs for.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// #[cron("@daily", tz = "Europe/Berlin")]
/// async fn close_day(tick: Tick) {
///     // The day that was due, also if the function runs late or once more.
///     println!("the day until {}", tick.due_at());
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Tick {
    due_at: Timestamp,
    task_id: Uuid,
}

impl Tick {
    /// The moment the tick was due, which is at or before now. The same in every attempt.
    #[must_use]
    pub fn due_at(&self) -> Timestamp {
        self.due_at
    }

    /// The id of the scheduled task, in `core.scheduled_tasks`; it stays the same across builds.
    #[must_use]
    pub fn task_id(&self) -> Uuid {
        self.task_id
    }
}

impl FromContext for Tick {
    fn from_context(context: &Context) -> Result<Self> {
        let body = &context.meta.body;
        let task_id = body
            .scheduled_task_id
            .ok_or_else(|| Error::permanent("this event was not emitted by a scheduled task"))?;
        Ok(Self {
            due_at: body.due_at.unwrap_or(body.emitted_at),
            task_id,
        })
    }

    fn require(requirements: &mut Requirements) {
        requirements.tick = true;
    }
}

/// What handlers need to be there when the app starts; a [`FromContext`] of yours that reads a state adds
/// that state here.
#[derive(Debug)]
pub struct Requirements {
    pub(crate) states: Vec<(TypeId, &'static str)>,
    pub(crate) tick: bool,
}

impl Requirements {
    pub(crate) fn new() -> Self {
        Self {
            states: Vec::new(),
            tick: false,
        }
    }

    /// `App::state` must have been called with a `T`.
    pub fn state<T: 'static>(&mut self) {
        self.states.push((TypeId::of::<T>(), type_name::<T>()));
    }
}

/// The registered states, by type.
#[derive(Default)]
pub(crate) struct StateMap {
    values: HashMap<TypeId, Arc<dyn Any + Send + Sync>>,
}

impl StateMap {
    pub(crate) fn insert<T: Send + Sync + 'static>(&mut self, value: T) {
        self.values.insert(TypeId::of::<T>(), Arc::new(value));
    }

    pub(crate) fn has(&self, type_id: TypeId) -> bool {
        self.values.contains_key(&type_id)
    }

    fn get<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        let value = Arc::clone(self.values.get(&TypeId::of::<T>())?);
        value.downcast().ok()
    }
}
