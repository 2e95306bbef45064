//! Events and what became of them.

use jiff::Timestamp;
use nexus::client;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// An event of the log.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({
    "eventId": 4711, "eventType": "order.paid", "eventVersion": 1, "emittedAt": "2030-01-31T12:00:00Z",
    "producerNodeId": "client-4f2a", "key": "7", "correlationId": "4711", "causationId": null,
    "payload": { "order": 7, "amount": 12.5 }, "metadata": {}
}))]
pub struct Event {
    /// Its id.
    event_id: i64,
    /// Its type.
    event_type: String,
    /// The version of the type.
    event_version: u32,
    /// When the transaction began that emitted it.
    emitted_at: Timestamp,
    /// The node or client that emitted it; `sql`, `scheduler` and `unknown` stand for what is none.
    producer_node_id: String,
    /// The entity that it is about.
    key: Option<String>,
    /// What it belongs to: the id of the first event of the chain, unless the emitter said something else.
    correlation_id: Option<String>,
    /// The id of the event whose handler emitted it.
    causation_id: Option<String>,
    /// The payload.
    payload: Value,
    /// Trace context, and what else came with it.
    metadata: Value,
}

impl From<client::LoggedEvent> for Event {
    fn from(event: client::LoggedEvent) -> Self {
        Self {
            event_id: event.event_id,
            event_type: event.event_type,
            event_version: event.event_version,
            emitted_at: event.emitted_at,
            producer_node_id: event.producer,
            key: event.key,
            correlation_id: event.correlation_id,
            causation_id: event.causation_id,
            payload: event.payload,
            metadata: event.metadata,
        }
    }
}

/// An event with what became of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventWithDeliveries {
    #[serde(flatten)]
    event: Event,
    /// Every handler that it was, or would be, sent to.
    deliveries: Vec<EventDelivery>,
}

impl EventWithDeliveries {
    /// Of an event and its deliveries.
    pub fn new(event: client::LoggedEvent, deliveries: Vec<client::Delivery>) -> Self {
        Self {
            event: event.into(),
            deliveries: deliveries.into_iter().map(EventDelivery::from).collect(),
        }
    }
}

/// An event for one handler.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventDelivery {
    /// The group.
    group: String,
    /// The handler.
    handler: String,
    /// How many attempts have failed so far.
    attempts: u32,
    /// How they failed.
    errors: Vec<PastError>,
    /// How far it is.
    #[serde(flatten)]
    state: DeliveryState,
}

/// How an attempt failed.
#[derive(Debug, Serialize, ToSchema)]
pub struct PastError {
    /// Which attempt it was.
    attempt: u32,
    /// When it ended.
    at: String,
    /// The error with its sources.
    error: String,
}

impl From<nexus::event::PastError> for PastError {
    fn from(past: nexus::event::PastError) -> Self {
        Self {
            attempt: past.attempt,
            at: past.at,
            error: past.error,
        }
    }
}

/// How far a delivery is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "state", rename_all = "camelCase")]
pub enum DeliveryState {
    /// It waits for a node, since then.
    Ready {
        /// Since when.
        since: Timestamp,
    },
    /// A node has it; its lease ends then, unless it is extended.
    Running {
        /// Until when.
        until: Timestamp,
    },
    /// The next attempt is due then.
    Waiting {
        /// Until when.
        until: Timestamp,
    },
    /// It was given up.
    #[serde(rename_all = "camelCase")]
    DeadLetter {
        /// Its id, in its group.
        dead_letter_id: i64,
        /// In a few words why it is one.
        reason: String,
        /// The last error with its sources.
        error: Option<String>,
        /// When it was given up.
        failed_at: Timestamp,
    },
    /// It was completed.
    Done,
    /// The handler subscribed later.
    NotSent,
    /// Something that this release does not know.
    Unknown,
}

impl From<client::Delivery> for EventDelivery {
    fn from(delivery: client::Delivery) -> Self {
        let state = match delivery.state {
            client::DeliveryState::Ready { since } => DeliveryState::Ready { since },
            client::DeliveryState::Running { until } => DeliveryState::Running { until },
            client::DeliveryState::Waiting { until } => DeliveryState::Waiting { until },
            client::DeliveryState::DeadLetter {
                id,
                reason,
                error,
                failed_at,
            } => DeliveryState::DeadLetter {
                dead_letter_id: id,
                reason,
                error,
                failed_at,
            },
            client::DeliveryState::Done => DeliveryState::Done,
            client::DeliveryState::NotSent => DeliveryState::NotSent,
            _ => DeliveryState::Unknown,
        };
        Self {
            group: delivery.group,
            handler: delivery.handler,
            attempts: delivery.attempts,
            errors: delivery.errors.into_iter().map(PastError::from).collect(),
            state,
        }
    }
}
