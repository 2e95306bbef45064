//! `POST /events`

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, header},
};
use nexus::{
    client::{Emission, PayloadError},
    event::is_traceparent,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    cloud_events::{self, CloudEvent},
    extract::Body,
    openapi::{Emitting, Refusals},
    problem::{Kind, Problem},
};

pub(crate) fn routes() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new().routes(routes!(emit))
}

/// An event to be emitted, in the form of the original server. Fields that are not known are left out.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "eventType": "order.paid", "payload": { "order": 7, "amount": 12.5 } }))]
struct NewEvent {
    /// The event type. An app has to have declared it.
    #[schema(required, value_type = String)]
    event_type: Option<String>,
    /// The payload, which has to fit the declared schema; `{}` if it is not given.
    #[schema(nullable = false)]
    payload: Option<Value>,
    /// The version of the type; the newest declared one if it is not given.
    #[schema(minimum = 1, maximum = 2_147_483_647)]
    event_version: Option<u32>,
    /// The entity that the event is about.
    key: Option<String>,
    /// Joins the event to others that follow from one cause.
    correlation_id: Option<String>,
}

/// Whichever form it came in.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    pub(crate) event_type: String,
    pub(crate) event_version: Option<u32>,
    pub(crate) payload: Value,
    pub(crate) key: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) idempotency_key: Option<String>,
    pub(crate) traceparent: Option<String>,
    pub(crate) tracestate: Option<String>,
}

/// What was stored.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum Queued {
    /// One event.
    #[serde(rename_all = "camelCase")]
    #[schema(example = json!({ "status": "queued", "messageId": 4711 }))]
    One {
        /// `queued`
        status: &'static str,
        /// The event's id.
        message_id: i64,
    },
    /// All events of a batch.
    #[serde(rename_all = "camelCase")]
    #[schema(example = json!({ "status": "queued", "messageIds": [4711, 4712] }))]
    All {
        /// `queued`
        status: &'static str,
        /// The events' ids, in the order of the batch.
        message_ids: Vec<i64>,
    },
}

/// Emit an event, or a batch of them
///
/// The body is of the original server's form, or a CloudEvent 1.0: structured, as a batch, or binary (attributes
/// in headers `ce-…`, the body is the payload). All events of a batch are stored, or none. A CloudEvent is stored
/// once for its `source` and `id`; other events once for the header `Idempotency-Key`, each within 24 hours.
#[utoipa::path(post, path = "/events", tag = "events",
    params(
        ("Idempotency-Key" = Option<String>, Header, max_length = 1000, pattern = "^[!#-~]+$", description = "Stores one event once, however often it is sent within 24 hours."),
        ("traceparent" = Option<String>, Header, description = "W3C trace context, which handlers are given; another text is left out."),
        ("tracestate" = Option<String>, Header, description = "What belongs to `traceparent`; more than 512 characters are left out."),
    ),
    request_body(content(
        (NewEvent = "application/json"),
        (CloudEvent = "application/cloudevents+json"),
        (Vec<CloudEvent> = "application/cloudevents-batch+json"),
    )),
    responses(
        (status = 200, description = "It is stored, or was before under the same key.", body = Queued),
        Emitting,
        Refusals,
    ))]
async fn emit(
    State(service): Shared,
    headers: HeaderMap,
    Body(body): Body,
) -> Result<Json<Queued>, Problem> {
    let idempotency_key = text_of(&headers, "idempotency-key")?.map(unquoted);
    let text = |name| text_of(&headers, name).unwrap_or_default();
    let (traceparent, tracestate) = (text("traceparent"), text("tracestate"));
    let content_type = media_type(&headers);
    if content_type.as_deref() == Some(cloud_events::BATCH) {
        if idempotency_key.is_some() {
            return Err(Problem::new(
                Kind::Request,
                "the header `Idempotency-Key` is for one event: those of a batch have a `source` and an `id` each",
            ));
        }
        let events = cloud_events::batch(&body, service.settings.batch_events)?;
        return emit_all(&service, events).await;
    }
    let mut event = match content_type.as_deref() {
        Some(cloud_events::STRUCTURED) => cloud_events::structured(&body)?,
        _ if headers.contains_key("ce-specversion") => {
            cloud_events::binary(&headers, content_type.as_deref(), &body)?
        }
        Some(other) if is_json(other) => plain(&body)?,
        other => {
            return Err(Problem::new(
                Kind::MediaType,
                format!(
                    "the content type is {}, expected application/json, {} or {}, or headers `ce-…`",
                    other.unwrap_or("missing"),
                    cloud_events::STRUCTURED,
                    cloud_events::BATCH
                ),
            ));
        }
    };
    if let Some(key) = idempotency_key {
        event.idempotency_key = Some(key.to_owned());
    }
    if event.traceparent.is_none() {
        event.traceparent = traceparent.map(str::to_owned);
        event.tracestate = tracestate.map(str::to_owned);
    }
    let message_id = emission(&service, event).await?.await?;
    Ok(Json(Queued::One {
        status: "queued",
        message_id,
    }))
}

async fn emit_all(service: &Service, events: Vec<Incoming>) -> Result<Json<Queued>, Problem> {
    let mut emissions = Vec::with_capacity(events.len());
    for (index, event) in events.into_iter().enumerate() {
        let emission = emission(service, event).await;
        emissions.push(emission.map_err(|problem| problem.of_event(index))?);
    }
    let message_ids = service.client.emit_together(emissions).await?;
    Ok(Json(Queued::All {
        status: "queued",
        message_ids,
    }))
}

/// The event as it will be stored, once it is known to fit its type.
async fn emission(service: &Service, event: Incoming) -> Result<Emission<'_>, Problem> {
    let client = &service.client;
    let (event_type, version, payload) = (&event.event_type, event.event_version, &event.payload);
    let mut emission = match client.emit_json(event_type, version, payload).await {
        Err(PayloadError::UnknownType { .. }) if service.settings.allow_unknown_types => {
            client.emit_undeclared(event_type, version.unwrap_or(1), payload)?
        }
        other => other?,
    };
    if let Some(key) = event.key {
        emission = emission.event_key(key);
    }
    if let Some(id) = event.correlation_id {
        emission = emission.correlation_id(id);
    }
    if let Some(key) = event.idempotency_key {
        emission = emission.idempotency_key(key);
    }
    if let Some(traceparent) = event.traceparent.filter(|text| is_traceparent(text)) {
        emission = emission.traceparent(traceparent);
        if let Some(tracestate) = event.tracestate {
            emission = emission.tracestate(tracestate);
        }
    }
    Ok(emission)
}

fn plain(body: &[u8]) -> Result<Incoming, Problem> {
    let event: NewEvent = read(body)?;
    let event_type = event.event_type.filter(|given| !given.is_empty());
    Ok(Incoming {
        event_type: event_type
            .ok_or_else(|| Problem::new(Kind::Request, "eventType is required"))?,
        event_version: event.event_version,
        payload: event.payload.unwrap_or_else(|| json!({})),
        key: event.key,
        correlation_id: event.correlation_id,
        ..Incoming::default()
    })
}

/// Reads JSON, and says where it cannot.
pub(crate) fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, Problem> {
    let refused = |error: String| {
        Problem::new(
            Kind::Request,
            format!("the body cannot be understood: {error}"),
        )
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let read = serde_path_to_error::deserialize(&mut deserializer);
    let read = read.map_err(|error| refused(error.to_string()))?;
    let end = deserializer.end();
    end.map_err(|error| refused(error.to_string()))?;
    Ok(read)
}

/// A header's text.
fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Problem> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    value.to_str().map(Some).map_err(|_| {
        Problem::new(
            Kind::Request,
            format!("the header `{name}` has other characters than ASCII's"),
        )
    })
}

/// As a structured header it stands in quotes.
fn unquoted(text: &str) -> &str {
    let inner = text
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    inner.unwrap_or(text)
}

/// The content type without its parameters, in lower case.
fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let essence = value.split(';').next().unwrap_or_default();
    Some(essence.trim().to_ascii_lowercase())
}

pub(crate) fn is_json(media_type: &str) -> bool {
    matches!(media_type, "application/json" | "text/json")
        || (media_type.ends_with("+json") && !media_type.starts_with("application/cloudevents"))
}
