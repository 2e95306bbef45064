//! Emitting, and looking after what was emitted.
//!
//! - [`Client`] emits events, with a transaction of yours or without, and cancels delayed ones.
//! - [`DeadLetter`] is what the client lists, redrives and purges, [`DeadLetterFilter`] says which.
//! - [`LoggedEvent`], [`Delivery`], [`Group`] and [`Node`] are what the client shows of events, of what became of
//!   them, of what waits, and of who runs.
//! - [`NamespaceMetrics`] are the figures of all that, for whoever watches it.
//! - [`DeclaredType`] is what apps say that an event type is; payloads without a Rust type are held to it.
//! - [`Tx`] is a transaction with emits in it.
//! - [`Retired`] is what becomes of a subscription that no build declares.
//! - [`Replay`] delivers events of the log once more.
//! - [`Access`] is what a role may do in a namespace, which [`Database`] grants and revokes.
//! - [`ScheduledTask`] is what the client lists, pauses, runs and makes of cron expressions.
//! - [`Finding`] is what [`Database`] finds to be wrong, or what will be.
//! - [`Adoption`] takes over the schema of an original nexus-core.
//! - [`Token`] is what a program shows that comes over HTTP.
//! - [`is_unavailable`] says of an error whether the database is to blame for it.
//! - `coalescer` sends together what is emitted at the same time, `wake` tells workers that there is something to do.

mod adoption;
mod coalescer;
mod connect;
mod dead_letters;
mod declared;
mod delayed;
mod deliveries;
mod diagnosis;
mod emission;
mod error;
mod executor;
mod groups;
mod horizon;
mod lent;
mod log;
mod namespace_metrics;
mod nodes;
mod operate;
mod pauses;
mod replays;
mod retire;
mod roles;
mod schedules;
mod sql;
mod tokens;
mod tx;
mod url;
mod wake;

pub use adoption::{Adopted, Adoption, LeftRows, RowCount, UnreadableTask};
pub use connect::{ConnectError, Database, SchemaStatus, SchemaStep};
pub use dead_letters::{
    DeadLetter, DeadLetterCause, DeadLetterCursor, DeadLetterFilter, DeadLetters, EditError,
    EditedRedrive, InvalidCursor, LeftLetters, LeftWhy, PastRedrive, PayloadProblems, Purge,
    Purged, Redrive, Redriven, RedrivenHandler,
};
pub use declared::{DeclaredType, PayloadError};
pub use delayed::DelayedEvent;
pub use deliveries::{Delivery, DeliveryState};
pub use diagnosis::{Finding, Severity};
pub use emission::{Emission, EmissionInTx, Emissions};
pub use error::{EmitError, is_unavailable};
pub use groups::{Depth, Group, GroupHandler};
pub use horizon::XminHolder;
pub(crate) use lent::{
    ANSWER, Doubt, Lender, Lent, begin_if_pooled, commit_if_pooled, roll_back_if_pooled,
    takes_no_writes,
};
pub use log::{EventTail, Events, LoggedEvent};
pub(crate) use namespace_metrics::{Families, text_of};
pub use namespace_metrics::{GroupMetrics, NamespaceMetrics};
pub use nodes::{Node, NodeHandler};
pub use operate::{OperateError, Subscription};
pub use replays::{Replay, ReplayError, ReplayEstimate, ReplayState, ReplayStatus};
pub use retire::{Leftovers, RetireError, Retired};
pub use roles::{Access, CreatedRole, RoleError};
pub use schedules::{LeftOut, ScheduleError, ScheduledTask, Scheduling, TaskRun};
pub use sql::{CannedQuery, SqlAccess, SqlError, SqlOutcome, canned_queries};
pub use tokens::{CreatedToken, InvalidScope, Scope, Token, TokenError};
pub(crate) use tx::NOT_WHOLE;
pub use tx::Tx;
pub(crate) use wake::Bell;

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use coalescer::Coalescer;
use sqlx::{Acquire, PgConnection, PgPool};

use crate::{
    config::Pooler,
    event::{Cause, EncodeError, Event, Outgoing},
    metrics::Emitted,
    store::{
        self, Failure,
        event_log::{self, Completion, Emitter, Plan, Statements, Stored},
        maintenance,
    },
};

tokio::task_local! {
    /// The event that the running handler handles; what it emits inherits from it.
    pub(crate) static CAUSE: Cause;
}

/// The event with what it inherits from the handler and the span that are under way.
fn inheriting(mut outgoing: Outgoing) -> Outgoing {
    let inherited = CAUSE.try_with(|cause| outgoing.inherit(Some(cause)));
    if inherited.is_err() {
        outgoing.inherit(None);
    }
    outgoing
}

/// Emits events. Cheap to clone; one for the whole program is enough.
///
/// A running app has one ([`Handle::client`](crate::Handle::client), an argument of handlers,
/// [`Ctx::client`](crate::Ctx::client)); a program that only emits makes one with [`Client::connect`]. It
/// works in one namespace. The guide says [what to emit how](crate::guide::events#emitting).
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    lender: Lender,
    namespace: String,
    producer: String,
    limits: Limits,
    plan: RwLock<Arc<Plan>>,
    statements: Statements,
    bell: Bell,
    emitted: Emitted,
    coalescer: Coalescer,
}

/// What a client holds events to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) payload_bytes: usize,
    pub(crate) idempotency: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            payload_bytes: 1024 * 1024,
            idempotency: Duration::from_hours(24),
        }
    }
}

/// Events in one statement, and their bytes: keeps one message to the server bounded.
const CHUNK_EVENTS: usize = 1_000;
pub(crate) const CHUNK_BYTES: usize = 8 * 1024 * 1024;

/// How often a plan may go out of force while one emit is being stored.
const PLAN_ATTEMPTS: usize = 10;

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("namespace", &self.inner.namespace)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client for a program that only emits, in `namespace`, which is created if it is new.
    ///
    /// The schema must be there: start an app first, or call
    /// [`Database::migrate`](Database::migrate). Opens up to [`Database::pool_size`] connections, and one to wake workers.
    /// Payloads may have up to 1 MiB.
    ///
    /// # Errors
    ///
    /// The database cannot be used (one that is coming up is waited for, see
    /// [`Database::connect_timeout`]), its schema is older or newer than this build needs, or the
    /// namespace cannot name a queue.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::{Client, Database};
    /// # async fn example() -> nexus::Result {
    /// let database = Database::from_url("postgres://shop@localhost/shop", "the command line")?;
    /// let client = Client::connect(&database, "shop").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(database: &Database, namespace: &str) -> Result<Self, ConnectError> {
        database.reach().await?;
        database.refuse_hidden_pooler().await?;
        let pool = database.client_pool().await?;
        database.verify(&pool).await?;
        let ensured = async {
            let mut lent = database.lend(&pool).await?;
            store::subscriptions::ensure_group(&mut lent, namespace, "default").await?;
            lent.give_back().await
        };
        store::answered_within(ANSWER, ensured)
            .await
            .map_err(|cause| ConnectError::Namespace {
                namespace: namespace.to_owned(),
                cause,
            })?;
        Ok(Self::of_no_app(database, pool, namespace))
    }

    /// A client for a program that looks after a namespace which is there already: it creates nothing. In
    /// all else as [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// [`ConnectError::UnknownNamespace`], or as of [`connect`](Self::connect).
    pub async fn attach(database: &Database, namespace: &str) -> Result<Self, ConnectError> {
        database.reach().await?;
        database.refuse_hidden_pooler().await?;
        let pool = database.client_pool().await?;
        database.verify(&pool).await?;
        let listed = async {
            let mut lent = database.lend(&pool).await?;
            let known = store::subscriptions::namespaces(&mut lent).await?;
            lent.give_back().await?;
            Ok(known)
        };
        let known = store::answered_within(ANSWER, listed)
            .await
            .map_err(|cause| ConnectError::Namespace {
                namespace: namespace.to_owned(),
                cause,
            })?;
        if !known.iter().any(|known| known == namespace) {
            return Err(ConnectError::UnknownNamespace {
                namespace: namespace.to_owned(),
                known,
            });
        }
        Ok(Self::of_no_app(database, pool, namespace))
    }

    fn of_no_app(database: &Database, pool: PgPool, namespace: &str) -> Self {
        let bell = Bell::start(database, namespace);
        let producer = format!(
            "client-{}",
            &uuid::Uuid::new_v4().simple().to_string()[..12]
        );
        let limits = Limits::default();
        Self::new(database, pool, namespace, &producer, limits, bell)
    }

    pub(crate) fn new(
        database: &Database,
        pool: PgPool,
        namespace: &str,
        producer: &str,
        limits: Limits,
        bell: Bell,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                lender: database.lender(pool),
                namespace: namespace.to_owned(),
                producer: producer.to_owned(),
                limits,
                plan: RwLock::new(Arc::new(Plan::never_in_force())),
                statements: Statements::default(),
                bell,
                emitted: Emitted::default(),
                coalescer: Coalescer::default(),
            }),
        }
    }

    /// The namespace that events are emitted in.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.inner.namespace
    }

    /// The pool of connections, for statements of your own: [`App::pool_size`](crate::App::pool_size)
    /// of them, or [`Database::pool_size`] after [`connect`](Self::connect). Emits and handlers' transactions share it. In
    /// a handler it is another connection than its `&mut Tx`.
    ///
    /// What you ask on it waits for the answer for as long as you do: put a timeout around it.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        self.inner.lender.pool()
    }

    /// Who emits: the node's id, or `client-…`.
    pub(crate) fn producer(&self) -> &str {
        &self.inner.producer
    }

    pub(crate) fn limits(&self) -> Limits {
        self.inner.limits
    }

    pub(crate) fn pooler(&self) -> Pooler {
        self.inner.lender.pooler()
    }

    pub(crate) fn doubt(&self) -> &Doubt {
        self.inner.lender.doubt()
    }

    pub(crate) fn lender(&self) -> &Lender {
        &self.inner.lender
    }

    /// A connection of the pool for a piece of work. Give it back, or it is closed.
    pub(crate) async fn lend(&self) -> sqlx::Result<Lent> {
        self.inner.lender.lend().await
    }

    /// Waits for an answer of the database, for [`ANSWER`] at most; the work then has to drop its
    /// connection.
    pub(crate) async fn answered<T, E>(
        &self,
        failed: impl FnOnce(sqlx::Error) -> E,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let answer = tokio::time::timeout(ANSWER, work).await;
        answer.unwrap_or_else(|_| Err(failed(store::no_answer())))
    }

    pub(crate) fn bell(&self) -> &Bell {
        &self.inner.bell
    }

    /// Emits an event; await it for the event's id, or set [options](Emission) first. Wakes the workers. Awaiting it
    /// fails with an [`EmitError`].
    ///
    /// It is committed when that is done. What a program emits at the same time without an idempotency key or a delay may
    /// share a statement and its commit, and yet each event is stored or refused for itself.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct UserCreated { user_id: u64 }
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let event_id = client.emit(&UserCreated { user_id: 7 }).await?;
    /// // With the same key within 24 hours: the same event, stored once.
    /// client.emit(&UserCreated { user_id: 8 }).idempotency_key("signup-8").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn emit<E: Event>(&self, event: &E) -> Emission<'_> {
        Emission::new(self, None, self.outgoing(event))
    }

    /// Emits an event with a transaction of yours: any `sqlx` transaction or connection.
    ///
    /// Nobody is woken after your commit, which nexus does not see: workers find the event by
    /// polling, within the poll interval (250 ms at most by default). [`begin`](Self::begin) wakes.
    /// Awaiting it fails with an [`EmitError`]; one that the server reports aborts your transaction.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct UserCreated { user_id: u64 }
    /// # async fn example(client: &Client, pool: sqlx::PgPool) -> nexus::Result {
    /// let mut tx = pool.begin().await?;
    /// sqlx::query("insert into users (id) values (7)").execute(&mut *tx).await?;
    /// client.emit_in(&mut tx, &UserCreated { user_id: 7 }).await?;
    /// tx.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn emit_in<'a, E: Event>(
        &'a self,
        connection: &'a mut PgConnection,
        event: &E,
    ) -> Emission<'a> {
        Emission::new(self, Some(connection), self.outgoing(event))
    }

    /// Emits several events in one transaction; await it for their ids, in order. Any number: they are
    /// sent in statements of up to 1,000 events and 8 MiB. After an error none of them was stored, unless
    /// its source is a lost connection: then all may be.
    pub fn emit_all<'a, E: Event>(&self, events: impl IntoIterator<Item = &'a E>) -> Emissions<'_> {
        let outgoing = events
            .into_iter()
            .map(|event| self.outgoing(event))
            .collect();
        Emissions::new(self, outgoing)
    }

    /// Begins a transaction for your statements and emits. Its commit wakes the workers; dropped without
    /// one it rolls back.
    ///
    /// # Errors
    ///
    /// No connection could be had within 10 s, or the database gave no answer within 30 s. Your own
    /// statements in the transaction wait for as long as you do.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct UserCreated { user_id: u64 }
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let mut tx = client.begin().await?;
    /// sqlx::query("insert into users (id) values (7)").execute(&mut *tx).await?;
    /// tx.emit(&UserCreated { user_id: 7 })?;
    /// tx.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn begin(&self) -> sqlx::Result<Tx> {
        let connection = self.inner.lender.acquire().await?;
        store::answered_within(ANSWER, Tx::begin(self, connection, "")).await
    }

    /// The event as it is stored, with what it inherits from the event being handled.
    pub(crate) fn outgoing<E: Event>(&self, event: &E) -> Result<Outgoing, EncodeError> {
        Outgoing::new(event, self.inner.limits.payload_bytes).map(inheriting)
    }

    /// Holds events to the limits, which options and returned events have not been yet.
    pub(crate) fn check<'a>(
        &self,
        events: impl IntoIterator<Item = &'a Outgoing>,
    ) -> Result<(), EncodeError> {
        let limit = self.inner.limits.payload_bytes;
        events.into_iter().try_for_each(|event| event.check(limit))
    }

    /// What was stored, for the metrics.
    pub(crate) fn emitted(&self) -> &Emitted {
        &self.inner.emitted
    }

    fn coalescer(&self) -> &Coalescer {
        &self.inner.coalescer
    }

    /// Wakes the workers of these queues, here and in other processes.
    pub(crate) fn wake(&self, queues: impl IntoIterator<Item = String>) {
        self.inner.bell.ring(queues);
    }

    /// Stores events in a transaction of their own.
    pub(crate) async fn store(&self, events: &[Outgoing]) -> Result<Vec<i64>, EmitError> {
        if events.is_empty() {
            return Ok(Vec::new());
        }
        let (mut mended, mut conflicts) = (false, 0);
        let stored = loop {
            match self.try_to_store(events).await {
                // A queue or partition that is missing can be made; nothing was stored yet.
                Err(
                    EmitError::MissingQueue { source } | EmitError::MissingPartition { source },
                ) if !mended => {
                    mended = true;
                    self.mend(&source).await?;
                }
                Err(EmitError::Append { source } | EmitError::Commit(source))
                    if store::is_conflict(&source) && conflicts < store::MOST_CONFLICTS =>
                {
                    conflicts += 1;
                    store::pause_after_conflict(conflicts).await;
                }
                other => break other?,
            }
        };
        self.emitted().add_all(events);
        self.wake(stored.queues);
        Ok(stored.event_ids)
    }

    async fn mend(&self, error: &sqlx::Error) -> Result<(), EmitError> {
        let failed = |source| EmitError::Append { source };
        let mended = async {
            let mut connection = self.lend().await.map_err(EmitError::Connect)?;
            maintenance::mend(&mut connection, &self.inner.namespace, error)
                .await
                .map_err(failed)?;
            connection.give_back().await.map_err(failed)
        };
        self.answered(failed, mended).await
    }

    async fn try_to_store(&self, events: &[Outgoing]) -> Result<Stored, EmitError> {
        let lent = store::answered_within(ANSWER, self.lend()).await;
        let mut connection = lent.map_err(EmitError::Connect)?;
        // A statement that is its own transaction is committed before its answer comes.
        let is_own_commit = self.pooler() == Pooler::Session
            && !events.iter().any(|event| event.idempotency_key.is_some())
            && chunks(events).len() == 1;
        let stored = match self.store_in(&mut connection, events, ANSWER).await {
            Ok(stored) => stored,
            Err(EmitError::Append { source }) if store::is_away(&source) => {
                self.doubt().look_at(&source);
                return Err(if is_own_commit && store::is_unanswered(&source) {
                    EmitError::Unknown(source)
                } else {
                    EmitError::Append { source }
                });
            }
            Err(error @ (EmitError::Commit(_) | EmitError::Unknown(_))) => return Err(error),
            Err(error) => {
                let _ = tokio::time::timeout(ANSWER, connection.give_up()).await;
                return Err(error);
            }
        };
        store::answered_within(ANSWER, connection.give_back())
            .await
            .map_err(not_committed)?;
        Ok(stored)
    }

    /// Stores events on a connection that may be in a transaction; wakes nobody. Each statement may take
    /// for as long as `patience`.
    pub(crate) async fn store_in(
        &self,
        connection: &mut PgConnection,
        events: &[Outgoing],
        patience: Duration,
    ) -> Result<Stored, EmitError> {
        if events.is_empty() {
            return Ok(Stored::default());
        }
        let failed = |source| EmitError::Append { source };
        let chunks = chunks(events);
        let keyed = events.iter().any(|event| event.idempotency_key.is_some());
        if chunks.len() == 1 && !keyed {
            return self.store_chunk_within(patience, connection, events).await;
        }
        // All or nothing: a key that was used for another event must not leave half behind.
        let begun = store::answered_within(patience, connection.begin()).await;
        let mut tx = begun.map_err(failed)?;
        let mut all = Stored::default();
        for chunk in chunks {
            let stored = self.store_chunk_within(patience, &mut tx, chunk).await?;
            if let Some(key) = stored.conflict {
                return Err(EmitError::KeyUsedForAnotherEvent { key });
            }
            all.event_ids.extend(stored.event_ids);
            all.queues.extend(stored.queues);
        }
        store::answered_within(patience, tx.commit())
            .await
            .map_err(not_committed)?;
        Ok(all)
    }

    async fn store_chunk_within(
        &self,
        patience: Duration,
        connection: &mut PgConnection,
        events: &[Outgoing],
    ) -> Result<Stored, EmitError> {
        let stored = self.store_chunk(connection, events, None, &[]);
        let stored = tokio::time::timeout(patience, stored).await;
        stored.unwrap_or_else(|_| {
            Err(EmitError::Append {
                source: store::no_answer(),
            })
        })
    }

    /// Stores events and completes messages by one statement, under the plan in force.
    pub(crate) async fn store_chunk(
        &self,
        connection: &mut PgConnection,
        events: &[Outgoing],
        completion: Option<Completion<'_>>,
        source: &[Option<i64>],
    ) -> Result<Stored, EmitError> {
        let Inner {
            namespace,
            producer,
            limits,
            plan,
            statements,
            ..
        } = &*self.inner;
        let emitter = Emitter {
            namespace,
            producer,
            // In a session that others use as well nothing may be left behind.
            is_kept: self.pooler() == Pooler::Session,
            idempotency_ms: limits
                .idempotency
                .as_millis()
                .try_into()
                .unwrap_or(i64::MAX),
        };
        let mut in_force = Arc::clone(&plan.read().unwrap_or_else(PoisonError::into_inner));
        for _ in 0..PLAN_ATTEMPTS {
            let stored = event_log::emit(
                connection, statements, &in_force, emitter, events, completion, source,
            )
            .await
            .map_err(|source| match store::classify(&source) {
                Failure::MissingTable => EmitError::MissingQueue { source },
                Failure::MissingPartition => EmitError::MissingPartition { source },
                _ => EmitError::Append { source },
            })?;
            if let Some(stored) = stored {
                return Ok(stored);
            }
            // On the same connection: a transaction with an old snapshot must get the plan that
            // this snapshot sees.
            let loaded = Plan::load(connection, namespace, emitter.is_kept)
                .await
                .map_err(|source| EmitError::Append { source })?
                .ok_or_else(|| EmitError::UnknownNamespace {
                    namespace: namespace.clone(),
                })?;
            // Not asked for again: a transaction with an older snapshot may put its own plan there.
            in_force = Arc::new(loaded);
            *plan.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&in_force);
        }
        Err(EmitError::PlanKeepsChanging)
    }
}

/// What is known after a commit that did not succeed.
fn not_committed(error: sqlx::Error) -> EmitError {
    if store::is_unanswered(&error) {
        EmitError::Unknown(error)
    } else {
        EmitError::Commit(error)
    }
}

/// Cuts events into what one statement may carry.
pub(crate) fn chunks(events: &[Outgoing]) -> Vec<&[Outgoing]> {
    let mut chunks = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, event) in events.iter().enumerate() {
        if index > start
            && (index - start == CHUNK_EVENTS || bytes + event.payload.len() > CHUNK_BYTES)
        {
            chunks.push(&events[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += event.payload.len();
    }
    if start < events.len() {
        chunks.push(&events[start..]);
    }
    chunks
}
