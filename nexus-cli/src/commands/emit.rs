//! `nexus emit`

use std::time::Duration;

use clap::Args;
use nexus::jiff::Timestamp;
use serde_json::json;

use super::payload;
use crate::{console::Console, moments, session::Session};

#[derive(Debug, Args)]
#[command(after_help = "\
The payload is checked against the JSON Schema that an app has registered for the type.

Example: nexus emit user.created '{\"user_id\": 7}' --idempotency-key signup-7")]
pub(crate) struct Emit {
    /// The event type
    event_type: String,
    /// The payload, or - to read it from standard input
    #[arg(value_name = "JSON", allow_hyphen_values = true)]
    payload: String,
    /// The version of the type; the newest registered one if it is not given
    #[arg(long)]
    version: Option<u32>,
    /// The entity that the event is about
    #[arg(long)]
    key: Option<String>,
    /// Emit it once, however often this is repeated within 24 hours
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Join it to the events with this correlation id
    #[arg(long, value_name = "ID")]
    correlation_id: Option<String>,
    /// Emit it so long from now, such as 90s, 30m, 2h or 7d
    #[arg(long, value_name = "DURATION", value_parser = moments::duration, conflicts_with = "at")]
    after: Option<Duration>,
    /// Emit it then, such as 2030-01-31T12:00:00Z
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,
    /// Only check the payload
    #[arg(long)]
    dry_run: bool,
}

impl Emit {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let payload = payload(&self.payload)?;
        let client = &session.client;
        let mut emission = client
            .emit_json(&self.event_type, self.version, &payload)
            .await?;
        if let Some(key) = self.key {
            emission = emission.event_key(key);
        }
        if let Some(key) = self.idempotency_key {
            emission = emission.idempotency_key(key);
        }
        if let Some(id) = self.correlation_id {
            emission = emission.correlation_id(id);
        }
        if let Some(delay) = self.after {
            emission = emission.after(delay);
        }
        if let Some(time) = self.at {
            emission = emission.at(time);
        }
        if self.dry_run {
            drop(emission);
            return if console.is_json {
                console.print_json(&json!({ "eventId": null }))
            } else {
                console.print("the payload fits; nothing was emitted\n")
            };
        }
        let event_id = emission.await?;
        if console.is_json {
            console.print_json(&json!({ "eventId": event_id }))
        } else {
            console.print(&format!("{event_id}\n"))
        }
    }
}
