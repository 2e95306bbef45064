//! What a worker does with a message, without a queue: for property tests, the fuzz target and benchmarks. No part of
//! the public API.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    event::{Envelope, Event, Headers, encode},
    handler::Delivery,
    schedule::Schedule,
};

/// Reads a message as a worker does.
///
/// # Errors
///
/// Why it would become a dead letter. Headers without the text `handler` are never claimed; their error
/// is empty.
pub fn decode_message<E: Event>(headers: &str, body: &str) -> Result<Envelope<E>, String> {
    let read = match serde_json::from_str::<Headers>(headers) {
        Ok(read) => read,
        Err(error) => {
            let handler = Headers::handler_in(headers);
            return Err(handler.map_or_else(String::new, |_| error.to_string()));
        }
    };
    let delivery =
        Delivery::read(read, body, "default", 1, 1).map_err(|error| error.to_string())?;
    let event = delivery.decode().map_err(|error| error.to_string())?;
    Ok(Envelope::new(Arc::clone(&delivery.meta), event))
}

/// Writes a payload as an emit does.
///
/// # Errors
///
/// It cannot be stored.
pub fn encode_payload<E: Event>(event: &E, limit: usize) -> Result<String, String> {
    encode(E::EVENT_TYPE, event, limit).map_err(|error| error.to_string())
}

/// Finds the first due time after another one.
///
/// # Errors
///
/// The expression or the zone cannot be read.
pub fn next_tick(
    expression: &str,
    time_zone: &str,
) -> Result<impl Fn(Timestamp) -> Option<Timestamp> + use<>, String> {
    let schedule =
        Schedule::parse(expression, Some(time_zone)).map_err(|error| error.to_string())?;
    Ok(move |after| schedule.next_after(after).ok())
}
