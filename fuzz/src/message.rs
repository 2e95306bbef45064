//! Reads messages as a worker does: no input may make it panic, or take memory or time without bounds.
//!
//! Input is the text of the headers, a line break, and the text of the body, as the claim gets them from
//! the database. `fuzz/run` builds this with coverage and runs it.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use nexus::{
    __private::{decode_message, encode_payload},
    Envelope, EventPayload,
    prelude::*,
};
use serde_json::Value;

/// Any JSON.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fuzz.any")]
#[serde(transparent)]
struct Any(Value);

/// Of each kind of field one.
#[derive(Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "fuzz.shaped")]
struct Shaped {
    id: i64,
    count: u32,
    weight: Option<f64>,
    #[serde(default)]
    text: String,
    #[serde(default)]
    parts: Vec<Shaped>,
    #[serde(default)]
    named: BTreeMap<String, Kind>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind")]
enum Kind {
    None,
    One { of: u8 },
    Many { of: Vec<u8> },
}

/// Asks for everything that a handler can ask for.
fn look_at<E: EventPayload>(envelope: &Envelope<E>) {
    let meta = envelope.meta();
    assert!(meta.attempt() >= 1);
    assert!(meta.delivery_key().starts_with(meta.namespace()));
    let _ = (meta.event_id(), meta.event_type(), meta.event_version());
    let _ = (meta.emitted_at().to_string(), meta.due_at());
    let _ = (meta.producer_node_id(), meta.key(), meta.correlation_id());
    let _ = (meta.causation_id(), meta.scheduled_task_id());
    let _ = (meta.traceparent(), meta.past_errors().len());
    for known in ["payload", "eventType", "emittedAt", "eventVersion"] {
        assert!(!meta.unknown_fields().contains_key(known));
    }
    let _ = format!("{meta:?}");
}

fuzz_target!(|data: &[u8]| {
    // What the database sends is UTF-8.
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (headers, body) = text.split_once('\n').unwrap_or((text, ""));
    match decode_message::<Any>(headers, body) {
        Ok(envelope) => {
            look_at(&envelope);
            // What was read can be emitted again and is read as the same.
            if let Ok(text) = encode_payload(envelope.event(), 1024 * 1024) {
                let again: Value = serde_json::from_str(&text).expect("it was written as JSON");
                assert_eq!(again, envelope.event().0);
            }
        }
        Err(_) => {
            // Whoever can be named gets a dead letter that says why. Headers that were `jsonb` name no field
            // twice.
            let Ok(once) = serde_json::from_str::<Value>(headers) else {
                return;
            };
            if once.get("handler").is_some_and(Value::is_string) {
                let read = decode_message::<Any>(&once.to_string(), body);
                assert!(read.is_ok() || read.is_err_and(|why| !why.is_empty()));
            }
        }
    }
    if let Ok(envelope) = decode_message::<Shaped>(headers, body) {
        look_at(&envelope);
        let _ = encode_payload(envelope.event(), 100);
    }
});
