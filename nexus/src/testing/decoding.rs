//! Reading a message without a queue, for property tests and the fuzz target. No part of the public API.

use crate::{
    event::{Envelope, Event, Headers, encode},
    handler::Delivery,
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
    Ok(Envelope::new(delivery.meta.as_ref().clone(), event))
}

/// Writes a payload as an emit does.
///
/// # Errors
///
/// It cannot be stored.
pub fn encode_payload<E: Event>(event: &E, limit: usize) -> Result<String, String> {
    encode(E::EVENT_TYPE, event, limit).map_err(|error| error.to_string())
}
