use std::{fmt, future::IntoFuture};

use futures_util::future::BoxFuture;
use sqlx::PgConnection;

use super::{Client, EmitError};
use crate::event::{EncodeError, Outgoing};

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

    /// Stores the event once per key and namespace within 24 hours: a repetition returns the id of
    /// the first, another event type or payload under the same key is an error. At most 1,000 bytes.
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

    /// Passes a W3C trace context on to the handlers. Default: inherited from the event being
    /// handled.
    pub fn traceparent(self, traceparent: impl Into<String>) -> Self {
        let traceparent = traceparent.into();
        self.with(|outgoing| outgoing.traceparent = Some(traceparent))
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
            let events = vec![outgoing];
            let ids = match self.connection {
                Some(connection) => self.client.store_in(connection, &events).await?.event_ids,
                None => self.client.store(events).await?,
            };
            Ok(ids[0])
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
