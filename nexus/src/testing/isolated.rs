use std::{panic::Location, time::Duration};

use jiff::Timestamp;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{Ended, TestApp};
use crate::{
    event::{Body, EnvelopeMeta, Event, Headers, Outgoing, PastError},
    handler::Delivery,
    registry::Trigger,
    runtime::{Route, isolated},
};

/// An envelope that a test shapes, for [`TestApp::run_handler`].
///
/// What is not said is as for an event that has just been emitted: attempt 1, now, event id 1.
///
/// # Examples
///
/// ```
/// # use nexus::prelude::*;
/// use nexus::testing::TestEnvelope;
///
/// # #[derive(Serialize, Deserialize, JsonSchema, Event)]
/// # struct OrderPlaced { order_id: i64 }
/// let third_try = TestEnvelope::of(&OrderPlaced { order_id: 7 })
///     .attempt(3)
///     .emitted_at("2026-03-29T01:30:00Z".parse().unwrap());
/// ```
#[derive(Debug, Clone)]
#[must_use = "an envelope does nothing until a handler is run with it"]
pub struct TestEnvelope {
    event_type: Option<String>,
    version: u32,
    payload: String,
    key: Option<String>,
    event_id: i64,
    emitted_at: Option<Timestamp>,
    attempt: u32,
    producer_node_id: String,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    traceparent: Option<String>,
    due_at: Option<Timestamp>,
    replay: Option<Uuid>,
}

impl TestEnvelope {
    /// With an event, and its key if it has one.
    ///
    /// # Panics
    ///
    /// If the event cannot be stored; the text says why.
    #[track_caller]
    pub fn of<E: Event>(event: &E) -> Self {
        match Outgoing::new(event, usize::MAX) {
            Ok(event) => Self {
                key: event.key,
                ..Self::new(Some(event.event_type), event.event_version, event.payload)
            },
            Err(error) => panic!("{error}"),
        }
    }

    /// With a payload that need not decode, as version 1 of an event type.
    pub fn raw(event_type: &str, payload: &Value) -> Self {
        Self::new(Some(event_type.to_owned()), 1, payload.to_string())
    }

    /// The tick of a `#[cron]` function, for a due time.
    pub fn tick(due_at: Timestamp) -> Self {
        Self {
            due_at: Some(due_at),
            emitted_at: Some(due_at),
            producer_node_id: "scheduler".to_owned(),
            ..Self::new(None, 1, "null".to_owned())
        }
    }

    fn new(event_type: Option<String>, version: u32, payload: String) -> Self {
        Self {
            event_type,
            version,
            payload,
            key: None,
            event_id: 1,
            emitted_at: None,
            attempt: 1,
            producer_node_id: "test".to_owned(),
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            due_at: None,
            replay: None,
        }
    }

    /// As if a replay delivered it.
    pub fn replayed(self) -> Self {
        Self {
            replay: Some(Uuid::from_u128(1)),
            ..self
        }
    }

    /// Which attempt the handler sees; counts from 1. Earlier ones have failed.
    pub fn attempt(self, attempt: u32) -> Self {
        Self {
            attempt: attempt.max(1),
            ..self
        }
    }

    /// The event's id.
    pub fn event_id(self, event_id: i64) -> Self {
        Self { event_id, ..self }
    }

    /// When the event was emitted; default now, by the clock of the database.
    pub fn emitted_at(self, at: Timestamp) -> Self {
        Self {
            emitted_at: Some(at),
            ..self
        }
    }

    /// The entity that the event is about; default what its type says.
    pub fn key(self, key: impl Into<String>) -> Self {
        Self {
            key: Some(key.into()),
            ..self
        }
    }

    /// Default: the event's id.
    pub fn correlation_id(self, id: impl Into<String>) -> Self {
        Self {
            correlation_id: Some(id.into()),
            ..self
        }
    }

    /// The id of the event whose handler emitted this one; default none.
    pub fn causation_id(self, id: impl Into<String>) -> Self {
        Self {
            causation_id: Some(id.into()),
            ..self
        }
    }

    /// The W3C trace context that the event was emitted under; default none.
    pub fn traceparent(self, traceparent: impl Into<String>) -> Self {
        Self {
            traceparent: Some(traceparent.into()),
            ..self
        }
    }

    /// The id of the node that emitted it; default `test`.
    pub fn producer_node_id(self, id: impl Into<String>) -> Self {
        Self {
            producer_node_id: id.into(),
            ..self
        }
    }

    fn deliver(self, route: &Route, namespace: &str, now: Timestamp) -> Delivery {
        let event_id = self.event_id;
        let emitted_at = self.emitted_at.unwrap_or(now);
        let errors = (1..self.attempt).map(|attempt| PastError {
            attempt,
            at: emitted_at.to_string(),
            error: "failed before the test".to_owned(),
        });
        let meta = EnvelopeMeta {
            body: Body {
                namespace: namespace.to_owned(),
                event_type: route.event_type.clone(),
                emitted_at,
                producer_node_id: self.producer_node_id,
                key: self.key,
                correlation_id: Some(self.correlation_id.unwrap_or_else(|| event_id.to_string())),
                causation_id: self.causation_id,
                scheduled_task_id: self.due_at.map(|_| Uuid::new_v4()),
                due_at: self.due_at,
                unknown: Map::new(),
            },
            headers: Headers {
                event_id,
                subscription: 1,
                handler: route.name().to_owned(),
                event_version: self.version,
                attempts: self.attempt - 1,
                errors: errors.collect(),
                formerly: None,
                abandoned: 0,
                redriven: 0,
                edited: false,
                replay: self.replay,
                traceparent: self.traceparent,
                tracestate: None,
            },
            group: route.group.clone(),
            message_id: 1,
            read_count: i32::try_from(self.attempt).unwrap_or(i32::MAX),
        };
        Delivery {
            meta: meta.into(),
            payload: self.payload.into(),
        }
    }
}

/// One envelope for a handler that takes one event; several are a batch.
impl From<TestEnvelope> for Vec<TestEnvelope> {
    fn from(envelope: TestEnvelope) -> Self {
        vec![envelope]
    }
}

/// What came of a handler that was run alone.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Ran {
    /// How the attempt ends. Of a batch: for each of its messages that was decoded.
    pub ended: Ended,
    /// Messages of a batch that were not decoded, by their place, with the error.
    pub rejected: Vec<(usize, String)>,
    /// How long it took.
    pub took: Duration,
    emits: Vec<Outgoing>,
}

impl Ran {
    /// Whether the handler succeeded.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        self.ended == Ended::Completed
    }

    /// The error of a handler that failed, with its sources.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        match &self.ended {
            Ended::Retried { error, .. } | Ended::DeadLettered { error, .. } => Some(error),
            Ended::Disturbed { why } => Some(why),
            _ => None,
        }
    }

    /// The events of a type that the handler has returned, or emitted with its transaction. Of a handler
    /// that failed there are none; what it emitted with a [`Client`](crate::Client) is in the log.
    ///
    /// # Panics
    ///
    /// If one does not decode, which its own type cannot.
    #[must_use]
    #[track_caller]
    pub fn emitted<E: Event>(&self) -> Vec<E> {
        self.emits
            .iter()
            .filter(|event| event.event_type == E::EVENT_TYPE && event.event_version == E::VERSION)
            .map(|event| {
                serde_json::from_str(&event.payload)
                    .unwrap_or_else(|error| panic!("a `{}`: {error}", E::EVENT_TYPE))
            })
            .collect()
    }
}

impl TestApp {
    /// Runs a handler with an envelope that you shape, without worker and queue, and stores what it did:
    /// its transaction is committed, and what it emits is emitted.
    ///
    /// It is run as a worker runs it: with the app's states, a timeout, a transaction if it takes one, and
    /// a verdict by its own settings. The verdict is returned instead of being stored; no message is
    /// involved, so nothing is completed, retried or dead-lettered. A batch that fails is not split.
    ///
    /// # Panics
    ///
    /// If the app has no such handler, if the envelope is of another event than it takes, or of several
    /// although it takes one.
    #[track_caller]
    pub fn run_handler(
        &self,
        handler: &str,
        envelopes: impl Into<Vec<TestEnvelope>>,
    ) -> impl Future<Output = Ran> {
        Box::pin(self.run_alone(Location::caller(), handler, envelopes.into(), true))
    }

    /// As [`run_handler`](Self::run_handler), but its transaction is rolled back, and nothing that it
    /// emits is stored: only looked at.
    ///
    /// # Panics
    ///
    /// As [`run_handler`](Self::run_handler).
    #[track_caller]
    pub fn rehearse_handler(
        &self,
        handler: &str,
        envelopes: impl Into<Vec<TestEnvelope>>,
    ) -> impl Future<Output = Ran> {
        Box::pin(self.run_alone(Location::caller(), handler, envelopes.into(), false))
    }

    async fn run_alone(
        &self,
        at: &'static Location<'static>,
        handler: &str,
        envelopes: Vec<TestEnvelope>,
        keeps: bool,
    ) -> Ran {
        self.check_handler(at, handler);
        let route = self
            .running_routes()
            .iter()
            .find(|route| route.name() == handler)
            .expect("it has been looked for");
        assert!(
            envelopes.len() == 1 || (route.descriptor.batch && !envelopes.is_empty()),
            "{at}: handler `{handler}` takes {}, here are {} envelopes",
            if route.descriptor.batch {
                "a batch of at least one"
            } else {
                "one event"
            },
            envelopes.len()
        );
        for envelope in &envelopes {
            let is_tick = matches!(route.descriptor.trigger, Trigger::Cron(_));
            let (event_type, version) = (&route.event_type, route.event_version);
            match &envelope.event_type {
                None => assert!(
                    is_tick,
                    "{at}: handler `{handler}` takes `{event_type}`, here is a tick"
                ),
                Some(found) => assert!(
                    found == event_type && envelope.version == version,
                    "{at}: handler `{handler}` takes `{event_type}` version {version}, here is `{found}` version {}",
                    envelope.version
                ),
            }
        }
        let now = self.database.now().await;
        let namespace = self.client().namespace();
        let deliveries = envelopes
            .into_iter()
            .map(|envelope| envelope.deliver(route, namespace, now))
            .collect();
        let began = std::time::Instant::now();
        let alone = isolated::run(&self.running().node, route, deliveries, keeps);
        // A crash that is armed ends it as well.
        let life = self.member.points.alive();
        match Box::pin(life.run_until_cancelled(alone)).await {
            Some((ended, rejected, emits)) => Ran {
                ended,
                rejected,
                took: began.elapsed(),
                emits,
            },
            None => Ran {
                ended: Ended::Lost,
                rejected: Vec::new(),
                took: began.elapsed(),
                emits: Vec::new(),
            },
        }
    }
}
