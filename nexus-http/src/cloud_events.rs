//! CloudEvents 1.0, as they come over HTTP.
//!
//! | Attribute | Becomes |
//! |---|---|
//! | `type`, `data` | event type and payload |
//! | `source` with `id` | the idempotency key |
//! | `partitionkey`, or else `subject` | the key |
//! | `correlationid`, `traceparent`, `tracestate` | correlation id and trace context |
//! | `eventversion` | the version of the event type |
//!
//! The others are left out: an event is emitted when it arrives.

use axum::http::HeaderMap;
use base64::Engine as _;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::{
    emit::{Incoming, is_json, read},
    problem::{Kind, Problem},
};

pub(crate) const STRUCTURED: &str = "application/cloudevents+json";
pub(crate) const BATCH: &str = "application/cloudevents-batch+json";

/// A CloudEvent 1.0. Attributes that are not named here are left out.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({
    "specversion": "1.0",
    "id": "A234-1234-1234",
    "source": "/shop/checkout",
    "type": "order.paid",
    "subject": "7",
    "data": { "order": 7, "amount": 12.5 }
}))]
pub(crate) struct CloudEvent {
    /// `1.0`
    specversion: String,
    /// With `source` it names the event, which is stored once within 24 hours.
    #[schema(min_length = 1)]
    id: String,
    /// Where it comes from.
    #[schema(min_length = 1)]
    source: String,
    /// The event type. An app has to have declared it.
    #[serde(rename = "type")]
    event_type: String,
    /// The entity that the event is about.
    subject: Option<String>,
    /// What `data_base64` is; JSON if it is not given.
    datacontenttype: Option<String>,
    /// The payload.
    #[schema(nullable = false)]
    data: Option<Value>,
    /// The payload as base64 of JSON, instead of `data`.
    data_base64: Option<String>,
    /// The entity that the event is about, rather than `subject`.
    partitionkey: Option<String>,
    /// Joins the event to others that follow from one cause.
    correlationid: Option<String>,
    /// W3C trace context.
    traceparent: Option<String>,
    /// What belongs to it.
    tracestate: Option<String>,
    /// The version of the event type; the newest declared one if it is not given.
    #[serde(default, deserialize_with = "number_or_text")]
    eventversion: Option<u32>,
}

/// In headers a number is a text.
fn number_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let given = Value::deserialize(deserializer)?;
    let version = match &given {
        Value::Null => return Ok(None),
        Value::String(text) => text.parse().ok(),
        other => other.as_u64().and_then(|number| number.try_into().ok()),
    };
    version.map(Some).ok_or_else(|| {
        serde::de::Error::custom(format_args!("eventversion is {given}, expected a version"))
    })
}

pub(crate) fn structured(body: &[u8]) -> Result<Incoming, Problem> {
    let event: CloudEvent = read(body)?;
    event.read()
}

pub(crate) fn batch(body: &[u8], most: usize) -> Result<Vec<Incoming>, Problem> {
    let events: Vec<CloudEvent> = read(body)?;
    if events.len() > most {
        return Err(Problem::new(
            Kind::TooLarge,
            format!("the batch has {} events, the limit is {most}", events.len()),
        ));
    }
    let events = events.into_iter().enumerate();
    events
        .map(|(index, event)| event.read().map_err(|problem| problem.of_event(index)))
        .collect()
}

/// The attributes are headers, the payload is the body.
pub(crate) fn binary(
    headers: &HeaderMap,
    content_type: Option<&str>,
    body: &[u8],
) -> Result<Incoming, Problem> {
    if let Some(other) = content_type.filter(|given| !is_json(given)) {
        return Err(Problem::new(
            Kind::MediaType,
            format!("the payload is {other}, expected JSON"),
        ));
    }
    let mut attributes = Map::new();
    for (name, value) in headers {
        if let Some(name) = name.as_str().strip_prefix("ce-") {
            // Some SDKs do not encode what they send.
            let text = str::from_utf8(value.as_bytes()).ok().and_then(decoded);
            let text = text.ok_or_else(|| {
                Problem::new(
                    Kind::Request,
                    format!("the header `ce-{name}` is not UTF-8, percent-encoded or not"),
                )
            })?;
            if attributes.insert(name.to_owned(), text.into()).is_some() {
                return Err(Problem::new(
                    Kind::Request,
                    format!("the header `ce-{name}` is there twice"),
                ));
            }
        }
    }
    for name in ["data", "data_base64", "datacontenttype"] {
        attributes.remove(name);
    }
    let mut event: CloudEvent = serde_json::from_value(attributes.into()).map_err(|error| {
        Problem::new(
            Kind::Request,
            format!("the headers `ce-…` are no CloudEvent: {error}"),
        )
    })?;
    if !body.is_empty() {
        event.data = Some(read(body)?);
    }
    event.read()
}

/// The text of a header, which may stand in quotes.
fn decoded(header: &str) -> Option<String> {
    let quoted = header
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'));
    let text = match quoted {
        Some(inner) => inner.replace("\\\"", "\"").replace("\\\\", "\\"),
        None => header.to_owned(),
    };
    let decoded = percent_decode_str(&text).decode_utf8().ok()?;
    Some(decoded.into_owned())
}

impl CloudEvent {
    fn read(self) -> Result<Incoming, Problem> {
        let refused = |detail: String| Err(Problem::new(Kind::Request, detail));
        if self.specversion != "1.0" {
            return refused(format!(
                "specversion is `{}`, expected `1.0`",
                self.specversion
            ));
        }
        let required = [("id", &self.id), ("source", &self.source)];
        if let Some((name, _)) = required.iter().find(|(_, value)| value.is_empty()) {
            return refused(format!("the attribute `{name}` is empty"));
        }
        let payload = match (self.data, self.data_base64) {
            (Some(_), Some(_)) => {
                return refused("there is either `data` or `data_base64`, not both".to_owned());
            }
            (None, Some(text)) => decode(&text, self.datacontenttype.as_deref())?,
            (data, None) => data.unwrap_or_default(),
        };
        Ok(Incoming {
            event_type: self.event_type,
            event_version: self.eventversion,
            payload,
            key: self.partitionkey.or(self.subject),
            correlation_id: self.correlationid,
            idempotency_key: Some(format!("{} {}", self.source, self.id)),
            traceparent: self.traceparent,
            tracestate: self.tracestate,
        })
    }
}

fn decode(text: &str, content_type: Option<&str>) -> Result<Value, Problem> {
    let essence = content_type.map(|given| {
        let essence = given.split(';').next().unwrap_or_default();
        essence.trim().to_ascii_lowercase()
    });
    if let Some(other) = essence.filter(|given| !is_json(given)) {
        return Err(Problem::new(
            Kind::MediaType,
            format!("`data_base64` is {other}, expected JSON"),
        ));
    }
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .map_err(|error| Problem::new(Kind::Request, format!("`data_base64` is none: {error}")))?;
    read(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_decoded_as_the_binding_says() {
        for (header, text) in [
            ("plain", "plain"),
            ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
            ("\"in \\\"quotes\\\"\"", "in \"quotes\""),
            ("100%", "100%"),
            ("Grüße", "Grüße"),
        ] {
            assert_eq!(decoded(header).as_deref(), Some(text), "{header}");
        }
        assert_eq!(decoded("%ff"), None);
    }
}
