use std::{fmt, future::IntoFuture, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use sqlx::PgConnection;

use super::{Client, EmitError};
use crate::event::{Delay, EncodeError, LONGEST_TRACESTATE, Outgoing};

/// An event about to be emitted: set options, then await it for the event's id. Made by
/// [`Client::emit`] and [`Client::emit_in`].
///
/// Nothing is sent until it is awaited. Dropped while it is awaited, the event may or may not have
/// been stored.
#[must_use = "an emission does nothing until it is awaited"]
pub struct Emission<'a> {
    client: &'a Client,
    connection: Option<&'a mut PgConnection>,
    outgoing: Result<Outgoing, EncodeError>,
}

impl<'a> Emission<'a> {
    pub(super) fn new(
        client: &'a Client,
        connection: Option<&'a mut PgConnection>,
        outgoing: Result<Outgoing, EncodeError>,
    ) -> Self {
        Self {
            client,
            connection,
            outgoing,
        }
    }

    /// Emits the event so long from now, by the clock of the database; in a transaction of yours, from
    /// the moment it began. At most ten years. Default: at once, as with zero.
    ///
    /// Until it is due the event waits in `core.delayed_emits`, stored by the same commit as
    /// everything else; [`Client::cancel`] takes the id to remove it, [`Client::delayed`] shows it. When
    /// it is due, a node of the namespace appends it to the log and delivers it to the subscriptions
    /// of that moment; without a running node that is done by the first one that starts.
    /// [`Envelope::emitted_at`](crate::Envelope::emitted_at) is that moment. The log keeps in its
    /// `metadata` when the event was asked for (`requestedAt`) and when it was due (`dueAt`).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # use std::time::Duration;
    /// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
    /// # struct ReminderDue { order: u64 }
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let reminder = client
    ///     .emit(&ReminderDue { order: 7 })
    ///     .after(Duration::from_hours(48))
    ///     .await?;
    /// // The order has been paid meanwhile.
    /// let is_cancelled = client.cancel(reminder).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn after(self, delay: Duration) -> Self {
        self.with(|outgoing| outgoing.delay_by(delay))
    }

    /// Emits the event at that time, by the clock of the database, as [`after`](Self::after) does; at
    /// once if the time has passed. At most ten years ahead.
    pub fn at(self, time: Timestamp) -> Self {
        self.with(|outgoing| outgoing.delay = Some(Delay::At(time)))
    }

    /// Stores the event once per key and namespace within 24 hours: a repetition returns the id of
    /// the first, another event type or payload under the same key is an error. From 1 to 1,000 bytes.
    ///
    /// The hours count from when the event is due. A repetition moves nothing: a delayed event stays
    /// due when the first emit said. Cancelling the event releases its key.
    pub fn idempotency_key(self, key: impl Into<String>) -> Self {
        let key = key.into();
        self.with(|outgoing| outgoing.idempotency_key = Some(key))
    }

    /// Joins the event to others that follow from one cause. Default: inherited from the event being
    /// handled, else the event's own id.
    pub fn correlation_id(self, id: impl Into<String>) -> Self {
        let id = id.into();
        self.with(|outgoing| outgoing.correlation_id = Some(id))
    }

    /// The entity that the event is about, for [`Client::emit_json`]; default none. Typed events have theirs.
    pub fn event_key(self, key: impl Into<String>) -> Self {
        let key = key.into();
        self.with(|outgoing| outgoing.key = Some(key))
    }

    /// Passes a W3C trace context on to the handlers: a text of the form
    /// `00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01`; another is an error. Default: with the
    /// feature `otel` that of the span under way, else that of the event being handled.
    pub fn traceparent(self, traceparent: impl Into<String>) -> Self {
        let traceparent = traceparent.into();
        self.with(|outgoing| outgoing.join(traceparent))
    }

    /// Passes on what belongs to a [`traceparent`](Self::traceparent) that was set before: the `tracestate` of
    /// the W3C's trace context, such as `congo=t61rcWkgMzE`. More than 512 characters are left out.
    pub fn tracestate(self, tracestate: impl Into<String>) -> Self {
        let is_kept = |text: &String| !text.is_empty() && text.len() <= LONGEST_TRACESTATE;
        let tracestate = Some(tracestate.into()).filter(is_kept);
        self.with(|outgoing| outgoing.tracestate = tracestate)
    }

    pub(super) fn into_outgoing(self) -> Result<Outgoing, EncodeError> {
        self.outgoing
    }

    fn with(mut self, set: impl FnOnce(&mut Outgoing)) -> Self {
        if let Ok(outgoing) = &mut self.outgoing {
            set(outgoing);
        }
        self
    }
}

impl<'a> IntoFuture for Emission<'a> {
    type Output = Result<i64, EmitError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let outgoing = self.outgoing?;
            self.client.check([&outgoing])?;
            let Some(connection) = self.connection else {
                return self.client.store_one(outgoing).await;
            };
            let events = [outgoing];
            // How long to wait in a transaction of yours is your decision.
            let stored = self.client.store_in(connection, &events, Duration::MAX);
            let stored = stored.await?;
            // What becomes of the transaction nobody tells.
            self.client.emitted().add_all(&events);
            Ok(stored.event_ids[0])
        })
    }
}

impl fmt::Debug for Emission<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emission")
            .field("outgoing", &self.outgoing)
            .finish_non_exhaustive()
    }
}

/// Several events about to be emitted in one transaction: set options for all of them, then await it
/// for their ids, in order.
///
/// Nothing is sent until it is awaited. Dropped while it is awaited, all of the events may have been
/// stored, or none.
#[must_use = "an emission does nothing until it is awaited"]
#[derive(Debug)]
pub struct Emissions<'a> {
    client: &'a Client,
    outgoing: Result<Vec<Outgoing>, EncodeError>,
}

impl<'a> Emissions<'a> {
    pub(super) fn new(client: &'a Client, outgoing: Result<Vec<Outgoing>, EncodeError>) -> Self {
        Self { client, outgoing }
    }

    /// Emits the events so long from now; see [`Emission::after`]. Each can be cancelled by its id.
    pub fn after(self, delay: Duration) -> Self {
        self.with(|outgoing| outgoing.delay_by(delay))
    }

    /// Emits the events at that time; see [`Emission::at`].
    pub fn at(self, time: Timestamp) -> Self {
        self.with(|outgoing| outgoing.delay = Some(Delay::At(time)))
    }

    /// Joins the events to others that follow from one cause; see [`Emission::correlation_id`].
    pub fn correlation_id(self, id: impl Into<String>) -> Self {
        let id = id.into();
        self.with(|outgoing| outgoing.correlation_id = Some(id.clone()))
    }

    fn with(mut self, set: impl FnMut(&mut Outgoing)) -> Self {
        if let Ok(outgoing) = &mut self.outgoing {
            outgoing.iter_mut().for_each(set);
        }
        self
    }
}

impl<'a> IntoFuture for Emissions<'a> {
    type Output = Result<Vec<i64>, EmitError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let events = self.outgoing?;
            self.client.check(&events)?;
            self.client.store(&events).await
        })
    }
}

/// An event that is emitted with a [`Tx`](super::Tx), for options; without any it can be ignored.
///
/// Whether an option can be stored is found out when the transaction commits.
#[derive(Debug)]
pub struct EmissionInTx<'a> {
    outgoing: &'a mut Outgoing,
}

impl<'a> EmissionInTx<'a> {
    pub(super) fn new(outgoing: &'a mut Outgoing) -> Self {
        Self { outgoing }
    }

    /// Emits the event so long after the transaction began; see [`Emission::after`].
    ///
    /// To keep the id, which [`Client::cancel`] needs, use [`Client::emit_in`] with the transaction.
    pub fn after(&mut self, delay: Duration) -> &mut Self {
        self.outgoing.delay_by(delay);
        self
    }

    /// Emits the event at that time; see [`Emission::at`].
    pub fn at(&mut self, time: Timestamp) -> &mut Self {
        self.outgoing.delay = Some(Delay::At(time));
        self
    }

    /// Stores the event once per key and namespace; see [`Emission::idempotency_key`]. Another event
    /// under the same key fails the commit, and a handler's attempt.
    pub fn idempotency_key(&mut self, key: impl Into<String>) -> &mut Self {
        self.outgoing.idempotency_key = Some(key.into());
        self
    }

    /// Joins the event to others that follow from one cause; see [`Emission::correlation_id`].
    pub fn correlation_id(&mut self, id: impl Into<String>) -> &mut Self {
        self.outgoing.correlation_id = Some(id.into());
        self
    }

    /// Passes a W3C trace context on to the handlers; see [`Emission::traceparent`].
    pub fn traceparent(&mut self, traceparent: impl Into<String>) -> &mut Self {
        self.outgoing.join(traceparent.into());
        self
    }
}
