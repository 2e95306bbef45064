use std::{ops::Deref, sync::Arc, vec};

use serde_json::Value;

use super::{Context, DerivedEvent, Error, Result, Tx};
use crate::event::{Envelope, EnvelopeMeta, Event, EventDescriptor, Headers, RawBody};

/// What a handler's first argument may be: `E`, [`Envelope<E>`] or [`Batch<E>`] of an event `E`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the first argument of a handler",
    label = "expected `E`, `Envelope<E>` or `Batch<E>` of an event `E`",
    note = "the first argument of a handler is the event; everything else comes after it",
    note = "an event is a type with `#[derive(Event, Serialize, Deserialize, JsonSchema)]`"
)]
pub trait Input: Sized {
    /// The event the handler subscribes to.
    type Event: DerivedEvent;

    /// Whether the handler takes many messages at once.
    const BATCH: bool = false;

    /// The event's descriptor, so that generated code names an argument's type for one trait only.
    #[doc(hidden)]
    const EVENT: &'static EventDescriptor = <Self::Event as DerivedEvent>::USE.descriptor;

    /// Decodes the invocation's messages.
    ///
    /// # Errors
    ///
    /// The payload does not fit the event.
    fn take(invocation: &mut Invocation) -> Result<Self>;
}

#[diagnostic::do_not_recommend]
impl<E: DerivedEvent> Input for E {
    type Event = E;

    fn take(invocation: &mut Invocation) -> Result<Self> {
        let delivery = invocation.take_single()?;
        (E::USE.decode)(&delivery)
    }
}

impl<E: DerivedEvent> Input for Envelope<E> {
    type Event = E;

    fn take(invocation: &mut Invocation) -> Result<Self> {
        let delivery = invocation.take_single()?;
        let event = (E::USE.decode)(&delivery)?;
        Ok(Envelope::new(Arc::clone(&delivery.meta), event))
    }
}

impl<E: DerivedEvent> Input for Batch<E> {
    type Event = E;
    const BATCH: bool = true;

    fn take(invocation: &mut Invocation) -> Result<Self> {
        let mut items = Vec::with_capacity(invocation.deliveries.len());
        for (index, delivery) in std::mem::take(&mut invocation.deliveries)
            .into_iter()
            .enumerate()
        {
            match (E::USE.decode)(&delivery) {
                Ok(event) => items.push(Envelope::new(Arc::clone(&delivery.meta), event)),
                Err(error) => invocation.rejected.push(Rejected { index, error }),
            }
        }
        if items.is_empty() {
            return Err(Error::undecodable(
                "no message of the batch could be decoded",
            ));
        }
        Ok(Batch { items })
    }
}

/// Several events of one type, handled by one call.
///
/// Holds at least one and at most the app's batch size (100 by default). The call succeeds or
/// fails as a whole: after an error the batch is split in halves until the bad event is alone, so
/// only that one fails an attempt. Events that do not decode are taken out before.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { email: String }
/// #[handler]
/// async fn index(users: Batch<UserCreated>) -> nexus::Result {
///     let emails: Vec<&str> = users.iter().map(|user| user.email.as_str()).collect();
///     println!("{emails:?}");
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct Batch<E> {
    items: Vec<Envelope<E>>,
}

impl<E> Deref for Batch<E> {
    type Target = [Envelope<E>];

    fn deref(&self) -> &Self::Target {
        &self.items
    }
}

impl<E> IntoIterator for Batch<E> {
    type Item = Envelope<E>;
    type IntoIter = vec::IntoIter<Envelope<E>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter()
    }
}

impl<'a, E> IntoIterator for &'a Batch<E> {
    type Item = &'a Envelope<E>;
    type IntoIter = std::slice::Iter<'a, Envelope<E>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter()
    }
}

/// One call of a handler: what the generated code takes apart.
#[doc(hidden)]
#[derive(Debug)]
pub struct Invocation {
    pub(crate) context: Context,
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) rejected: Vec<Rejected>,
    pub(crate) tx: Option<Tx>,
}

impl Invocation {
    /// What [`FromContext`](super::FromContext) arguments are made from.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The handler's transaction.
    ///
    /// # Panics
    ///
    /// If the descriptor does not say that the handler takes one.
    pub fn tx(&mut self) -> &mut Tx {
        self.tx
            .as_mut()
            .expect("a descriptor with `uses_tx` is called with a transaction")
    }

    /// The one message, with its payload as it is.
    pub(crate) fn take_untyped(&mut self) -> Result<Envelope<Value>> {
        let delivery = self.take_single()?;
        let payload = serde_json::from_str(&delivery.payload).map_err(|error| {
            Error::undecodable(format!("the payload cannot be read as JSON: {error}"))
        })?;
        Ok(Envelope::new(delivery.meta, payload))
    }

    fn take_single(&mut self) -> Result<Delivery> {
        debug_assert_eq!(
            self.deliveries.len(),
            1,
            "a handler of one event gets one message"
        );
        self.deliveries
            .pop()
            .ok_or_else(|| Error::undecodable("there is no message"))
    }
}

/// A message of a batch that left before the handler ran.
#[derive(Debug)]
pub(crate) struct Rejected {
    pub(crate) index: usize,
    pub(crate) error: Error,
}

/// A message on its way into a handler.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    pub(crate) meta: Arc<EnvelopeMeta>,
    pub(crate) payload: Arc<str>,
}

impl Delivery {
    /// Reads the body of a message; the payload stays text.
    pub(crate) fn read(
        headers: Headers,
        body: &str,
        group: &str,
        message_id: i64,
        read_count: i32,
    ) -> serde_json::Result<Self> {
        let raw: RawBody<'_> = serde_json::from_str(body)?;
        let payload = raw.payload.get().into();
        let meta = EnvelopeMeta {
            body: raw.body,
            headers,
            group: group.to_owned(),
            message_id,
            read_count,
        };
        Ok(Self {
            meta: Arc::new(meta),
            payload,
        })
    }

    pub(crate) fn decode<E: Event>(&self) -> Result<E> {
        serde_json::from_str(&self.payload).map_err(|_| {
            // Only a payload that fails pays for finding out where.
            let deserializer = &mut serde_json::Deserializer::from_str(&self.payload);
            match serde_path_to_error::deserialize::<_, E>(deserializer) {
                Err(error) => Error::undecodable(format!(
                    "the payload is no `{}` (version {}): at `{}`: {}",
                    E::EVENT_TYPE,
                    E::VERSION,
                    error.path(),
                    error.inner()
                )),
                Ok(_) => Error::undecodable("the payload has text after its end"),
            }
        })
    }
}
