use std::{borrow::Cow, fmt, ops::Deref, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value, value::RawValue};
use uuid::Uuid;

use super::trace;

/// An event with its identity, its time and where it came from.
///
/// Take it instead of the bare event when a handler needs more than the payload. It derefs to the
/// event.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct UserCreated { email: String }
/// #[handler]
/// async fn audit(user: Envelope<UserCreated>) -> nexus::Result {
///     println!("event {} at {}: {}", user.event_id(), user.emitted_at(), user.email);
///     Ok(())
/// }
/// ```
#[derive(Debug, Clone)]
pub struct Envelope<E> {
    meta: Arc<EnvelopeMeta>,
    event: E,
}

impl<E> Envelope<E> {
    pub(crate) fn new(meta: Arc<EnvelopeMeta>, event: E) -> Self {
        Self { meta, event }
    }

    /// The event itself.
    pub fn event(&self) -> &E {
        &self.event
    }

    /// Gives up the metadata and keeps the event.
    pub fn into_event(self) -> E {
        self.event
    }

    /// All that is known besides the payload.
    pub fn meta(&self) -> &EnvelopeMeta {
        &self.meta
    }

    /// See [`EnvelopeMeta::event_id`].
    pub fn event_id(&self) -> i64 {
        self.meta.event_id()
    }

    /// See [`EnvelopeMeta::emitted_at`].
    pub fn emitted_at(&self) -> Timestamp {
        self.meta.emitted_at()
    }

    /// See [`EnvelopeMeta::attempt`].
    pub fn attempt(&self) -> u32 {
        self.meta.attempt()
    }

    /// See [`EnvelopeMeta::delivery_key`].
    pub fn delivery_key(&self) -> String {
        self.meta.delivery_key()
    }

    /// See [`EnvelopeMeta::replay_id`].
    pub fn replay_id(&self) -> Option<Uuid> {
        self.meta.replay_id()
    }

    /// See [`EnvelopeMeta::is_replayed`].
    pub fn is_replayed(&self) -> bool {
        self.meta.is_replayed()
    }
}

impl<E> Deref for Envelope<E> {
    type Target = E;

    fn deref(&self) -> &E {
        &self.event
    }
}

/// What is known of a delivered event besides its payload.
#[derive(Debug, Clone)]
pub struct EnvelopeMeta {
    pub(crate) body: Body,
    pub(crate) headers: Headers,
    pub(crate) group: String,
    pub(crate) message_id: i64,
    pub(crate) read_count: i32,
}

impl EnvelopeMeta {
    /// The event's id: its place in the event log, the same for every handler and every attempt.
    #[must_use]
    pub fn event_id(&self) -> i64 {
        self.headers.event_id
    }

    /// The stored name of the event's type.
    #[must_use]
    pub fn event_type(&self) -> &str {
        &self.body.event_type
    }

    /// The version of the payload's schema, as the emitter declared it.
    #[must_use]
    pub fn event_version(&self) -> u32 {
        self.headers.event_version
    }

    /// The namespace the event was emitted in.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.body.namespace
    }

    /// When the event was emitted, by the clock of the database (by the emitter's for events of
    /// foreign programs).
    #[must_use]
    pub fn emitted_at(&self) -> Timestamp {
        self.body.emitted_at
    }

    /// The id of the node that emitted it; `scheduler` for ticks, `sql` for `core.emit`.
    #[must_use]
    pub fn producer_node_id(&self) -> &str {
        &self.body.producer_node_id
    }

    /// The entity the event is about, if its type names one.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.body.key.as_deref()
    }

    /// Shared by all events that follow from one cause; the first event's own id if nobody gave one.
    #[must_use]
    pub fn correlation_id(&self) -> Option<&str> {
        self.body.correlation_id.as_deref()
    }

    /// The id of the event whose handler emitted this one; `None` for what no handler emitted.
    #[must_use]
    pub fn causation_id(&self) -> Option<&str> {
        self.body.causation_id.as_deref()
    }

    /// The id of the scheduled task that emitted it, for ticks.
    #[must_use]
    pub fn scheduled_task_id(&self) -> Option<Uuid> {
        self.body.scheduled_task_id
    }

    /// The moment a tick was due; `None` for other events.
    #[must_use]
    pub fn due_at(&self) -> Option<Timestamp> {
        self.body.due_at
    }

    /// The W3C `traceparent` the event was emitted under. What another program wrote there and has not the
    /// form of one is left out.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.headers.traceparent.as_deref()
    }

    /// The W3C `tracestate` beside it.
    #[must_use]
    pub fn tracestate(&self) -> Option<&str> {
        self.headers.tracestate.as_deref()
    }

    /// Which run of this handler for this event this is; counts from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        // Headers can be written by hand.
        self.headers.attempts.saturating_add(1)
    }

    /// The errors of earlier attempts, oldest first; the newest ten are kept.
    #[must_use]
    pub fn past_errors(&self) -> &[PastError] {
        &self.headers.errors
    }

    /// How often the message has been redriven from the dead letters.
    /// [`attempt`](Self::attempt) counts from 1 again after each.
    #[must_use]
    pub fn redrive_count(&self) -> u32 {
        self.headers.redriven
    }

    /// Whether somebody has replaced the payload when the message was redriven: then the event log has
    /// another one under this [`event_id`](Self::event_id), and so have the other handlers of the event.
    #[must_use]
    pub fn is_edited(&self) -> bool {
        self.headers.edited
    }

    /// The subscription that the delivery is for.
    #[must_use]
    pub fn subscription_id(&self) -> i64 {
        self.headers.subscription
    }

    /// The id of the message in its pgmq queue. A redriven message gets a new one; use
    /// [`delivery_key`](Self::delivery_key) to recognise a delivery.
    #[must_use]
    pub fn message_id(&self) -> i64 {
        self.message_id
    }

    /// How often the message was read from its queue, this time included: pgmq's `read_ct`.
    #[must_use]
    pub fn redelivery_count(&self) -> i32 {
        self.read_count
    }

    /// Names this delivery of this event to this handler, the same for every attempt, also if the
    /// handler was renamed in between: the key for idempotent calls to other systems.
    ///
    /// A replay delivers under the same key, so that it repeats nothing outside by accident. Where that
    /// is what you want, add the [`replay_id`](Self::replay_id) to it.
    #[must_use]
    pub fn delivery_key(&self) -> String {
        let Self {
            body,
            headers,
            group,
            ..
        } = self;
        format!(
            "{}/{}/{group}/{}",
            body.namespace,
            headers.event_id,
            headers.formerly.as_deref().unwrap_or(&headers.handler)
        )
    }

    /// The replay that delivers the event once more, or as history to a new handler; `None` for what its
    /// emit has sent.
    #[must_use]
    pub fn replay_id(&self) -> Option<Uuid> {
        self.headers.replay
    }

    /// Whether a replay delivers the event.
    #[must_use]
    pub fn is_replayed(&self) -> bool {
        self.headers.replay.is_some()
    }

    /// Fields of the envelope that nexus does not know, as a foreign program sent them.
    #[must_use]
    pub fn unknown_fields(&self) -> &Map<String, Value> {
        &self.body.unknown
    }
}

/// How an earlier attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PastError {
    /// Which attempt it was.
    pub attempt: u32,
    /// When it ended, ISO 8601.
    pub at: String,
    /// The error with its sources.
    pub error: String,
}

/// The part of a message that nexus keeps in pgmq's `headers`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Headers {
    pub(crate) event_id: i64,
    pub(crate) subscription: i64,
    pub(crate) handler: String,
    /// The handler's name when the message was made, if it has another one now.
    #[serde(default)]
    pub(crate) formerly: Option<String>,
    pub(crate) event_version: u32,
    #[serde(default)]
    pub(crate) attempts: u32,
    #[serde(default)]
    pub(crate) errors: Vec<PastError>,
    #[serde(default)]
    pub(crate) abandoned: u32,
    #[serde(default)]
    pub(crate) redriven: u32,
    #[serde(default)]
    pub(crate) edited: bool,
    /// The replay that has sent the message.
    #[serde(default)]
    pub(crate) replay: Option<Uuid>,
    #[serde(default, deserialize_with = "trace::lenient")]
    pub(crate) traceparent: Option<String>,
    #[serde(default, deserialize_with = "trace::lenient_text")]
    pub(crate) tracestate: Option<String>,
}

impl Headers {
    /// The handler's name, also of headers that cannot be read as a whole: whatever else is in them is
    /// skipped, not read.
    pub(crate) fn handler_in(text: &str) -> Option<String> {
        #[derive(Deserialize)]
        struct Handler {
            handler: String,
        }
        serde_json::from_str::<Handler>(text)
            .ok()
            .map(|headers| headers.handler)
    }
}

/// The metadata in a message's body. The payload is cut out as text and decoded later, once.
#[derive(Debug, Clone)]
pub(crate) struct Body {
    pub(crate) namespace: String,
    pub(crate) event_type: String,
    pub(crate) emitted_at: Timestamp,
    pub(crate) producer_node_id: String,
    pub(crate) key: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) causation_id: Option<String>,
    pub(crate) scheduled_task_id: Option<Uuid>,
    pub(crate) due_at: Option<Timestamp>,
    pub(crate) unknown: Map<String, Value>,
}

/// A body with its payload still as text.
#[derive(Debug)]
pub(crate) struct RawBody<'a> {
    pub(crate) body: Body,
    pub(crate) payload: &'a RawValue,
}

impl<'de: 'a, 'a> Deserialize<'de> for RawBody<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(BodyVisitor)
    }
}

struct BodyVisitor;

impl<'de> de::Visitor<'de> for BodyVisitor {
    type Value = RawBody<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an envelope: an object with `eventType` and `payload`")
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut payload = None;
        let mut event_type = None;
        let mut emitted_at = None;
        let mut body = Body {
            namespace: String::new(),
            event_type: String::new(),
            emitted_at: Timestamp::UNIX_EPOCH,
            producer_node_id: String::new(),
            key: None,
            correlation_id: None,
            causation_id: None,
            scheduled_task_id: None,
            due_at: None,
            unknown: Map::new(),
        };
        while let Some(field) = map.next_key::<Cow<'de, str>>()? {
            match &*field {
                "payload" => payload = Some(map.next_value::<&'de RawValue>()?),
                "eventType" => event_type = Some(map.next_value()?),
                "namespace" => body.namespace = map.next_value()?,
                "emittedAt" => emitted_at = Some(map.next_value()?),
                "producerNodeId" => body.producer_node_id = map.next_value()?,
                "key" => body.key = map.next_value()?,
                "correlationId" => body.correlation_id = map.next_value()?,
                "causationId" => body.causation_id = map.next_value()?,
                "scheduledTaskId" => body.scheduled_task_id = map.next_value()?,
                // Only ticks have one; what a foreign program means by it is its own affair.
                "dueAt" => {
                    let value: Value = map.next_value()?;
                    match value.as_str().map(str::parse) {
                        Some(Ok(due_at)) => body.due_at = Some(due_at),
                        _ => {
                            body.unknown.insert("dueAt".to_owned(), value);
                        }
                    }
                }
                // The version is read from the headers, where the claim looks for it.
                "eventVersion" => {
                    map.next_value::<de::IgnoredAny>()?;
                }
                _ => {
                    body.unknown.insert(field.into_owned(), map.next_value()?);
                }
            }
        }
        body.event_type = event_type.ok_or_else(|| de::Error::missing_field("eventType"))?;
        body.emitted_at = emitted_at.ok_or_else(|| de::Error::missing_field("emittedAt"))?;
        let payload = payload.ok_or_else(|| de::Error::missing_field("payload"))?;
        Ok(RawBody { body, payload })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_that_is_none_costs_the_trace_and_not_the_message() {
        let read = |traceparent: Value, tracestate: Value| {
            let headers = serde_json::json!({
                "eventId": 1, "subscription": 1, "handler": "h", "eventVersion": 1,
                "traceparent": traceparent, "tracestate": tracestate,
            });
            let headers: Headers = serde_json::from_str(&headers.to_string()).unwrap();
            (headers.traceparent, headers.tracestate)
        };
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(
            read(good.into(), "a=b".into()),
            (Some(good.to_owned()), Some("a=b".to_owned()))
        );
        assert_eq!(read("xyz".into(), Value::Null), (None, None));
        assert_eq!(read(5.into(), serde_json::json!({})), (None, None));
    }

    #[test]
    fn reads_a_body_and_keeps_what_it_does_not_know() {
        let text = r#"{"payload": {"a": [1, 2]}, "eventType": "a.b", "emittedAt": "2026-01-02T03:04:05.678Z",
            "namespace": "demo", "producerNodeId": "n1", "broadcast": true, "eventVersion": 3}"#;
        let raw: RawBody = serde_json::from_str(text).unwrap();
        assert_eq!(raw.payload.get(), r#"{"a": [1, 2]}"#);
        assert_eq!(raw.body.event_type, "a.b");
        assert_eq!(raw.body.unknown["broadcast"], Value::Bool(true));
        assert_eq!(raw.body.emitted_at.to_string(), "2026-01-02T03:04:05.678Z");
    }

    #[test]
    fn finds_the_handler_beside_what_cannot_be_read() {
        let deep = "[".repeat(1_000) + &"]".repeat(1_000);
        for other in [format!("1{}", "0".repeat(400)), deep] {
            let text = format!(r#"{{"handler": "h", "attempts": {other}}}"#);
            assert!(serde_json::from_str::<Headers>(&text).is_err());
            assert_eq!(Headers::handler_in(&text).as_deref(), Some("h"));
        }
        assert_eq!(Headers::handler_in(r#"{"handler": 1}"#), None);
    }

    #[test]
    fn names_the_field_that_is_missing() {
        let error = serde_json::from_str::<RawBody>(r#"{"eventType": "a.b"}"#).unwrap_err();
        assert!(error.to_string().contains("emittedAt"), "{error}");
    }
}
