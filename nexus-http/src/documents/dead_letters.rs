//! Dead letters, and what was done about them.

use jiff::Timestamp;
use nexus::client;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::PastError;

/// A message that will not be tried again by itself.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// Its id, in its group.
    dead_letter_id: i64,
    /// The group whose queue it came from.
    group: String,
    /// The handler that failed; null if the message was no envelope.
    handler: Option<String>,
    /// The event.
    event_id: Option<i64>,
    /// The event's type.
    event_type: Option<String>,
    /// In a few words why it is here.
    reason: String,
    /// The last error with its sources.
    error: Option<String>,
    /// What letters of one cause have in common.
    fingerprint: Option<String>,
    /// How many attempts were made, since the last redrive if there was one.
    attempts: u32,
    /// The errors of the attempts, oldest first; the newest ten.
    errors: Vec<PastError>,
    /// When it was given up.
    failed_at: Timestamp,
    /// How often it has been redriven.
    redriven: u32,
    /// The redrives, oldest first; the newest ten.
    redrives: Vec<PastRedrive>,
    /// Whether a redrive has replaced the payload.
    is_edited: bool,
    /// The original message.
    original_event: Value,
    /// For the parameter `cursor`: the page after this one.
    cursor: String,
}

impl From<client::DeadLetter> for DeadLetter {
    fn from(letter: client::DeadLetter) -> Self {
        Self {
            cursor: letter.cursor().to_string(),
            dead_letter_id: letter.id,
            group: letter.group,
            handler: letter.handler,
            event_id: letter.event_id,
            event_type: letter.event_type,
            reason: letter.reason,
            error: letter.error,
            fingerprint: letter.fingerprint,
            attempts: letter.attempts,
            errors: letter.errors.into_iter().map(PastError::from).collect(),
            failed_at: letter.failed_at,
            redriven: letter.redrive_count,
            redrives: letter.redrives.into_iter().map(PastRedrive::from).collect(),
            is_edited: letter.is_edited,
            original_event: letter.original,
        }
    }
}

/// A redrive that did not help.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PastRedrive {
    /// When it was.
    at: String,
    /// Who did it.
    by: String,
    /// How many attempts had been made until then, since the redrive before.
    attempts: u32,
    /// Why it had been a dead letter.
    reason: String,
    /// The last error until then.
    error: Option<String>,
    /// Since when it had been one.
    failed_at: String,
    /// Whether the payload was replaced.
    edited: bool,
}

impl From<client::PastRedrive> for PastRedrive {
    fn from(past: client::PastRedrive) -> Self {
        Self {
            at: past.at,
            by: past.by,
            attempts: past.attempts,
            reason: past.reason,
            error: past.error,
            failed_at: past.failed_at,
            edited: past.edited,
        }
    }
}

/// How many dead letters have one cause.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetterCause {
    /// The group.
    group: String,
    /// The handler.
    handler: Option<String>,
    /// The event type.
    event_type: Option<String>,
    /// What they have in common.
    fingerprint: Option<String>,
    /// How many there are.
    dead_letters: u64,
    /// When the oldest one was given up.
    first_failed_at: Timestamp,
    /// When the newest one was given up.
    last_failed_at: Timestamp,
    /// The id of the newest one.
    sample_id: i64,
    /// Why the newest one is here.
    sample_reason: Option<String>,
    /// The last error of the newest one.
    sample_error: Option<String>,
}

impl From<client::DeadLetterCause> for DeadLetterCause {
    fn from(cause: client::DeadLetterCause) -> Self {
        Self {
            group: cause.group,
            handler: cause.handler,
            event_type: cause.event_type,
            fingerprint: cause.fingerprint,
            dead_letters: cause.letters,
            first_failed_at: cause.first_failed_at,
            last_failed_at: cause.last_failed_at,
            sample_id: cause.sample_id,
            sample_reason: cause.sample_reason,
            sample_error: cause.sample_error,
        }
    }
}

/// What a redrive has done, or would do.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Redriven {
    /// How many dead letters were put back, or would be.
    messages: u64,
    /// For whom.
    handlers: Vec<RedrivenHandler>,
    /// What stays, although it was meant.
    left: Vec<LeftLetters>,
    /// How many of the ids are not there.
    missing: u64,
    /// When the last message is due.
    last_due_at: Option<Timestamp>,
    /// Whether nothing was changed.
    is_dry_run: bool,
}

/// Messages that were put back for one handler.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct RedrivenHandler {
    /// The handler; null for messages of foreign programs.
    handler: Option<String>,
    /// The version of the events.
    event_version: Option<u32>,
    /// How many.
    messages: u64,
    /// Whether a live node can run them now.
    is_live: bool,
}

/// Dead letters that were meant and are still there.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeftLetters {
    /// The handler.
    handler: Option<String>,
    /// The version of the events.
    event_version: Option<u32>,
    /// How many.
    dead_letters: u64,
    /// Why.
    why: String,
}

impl Redriven {
    /// Of what the client says.
    #[must_use]
    pub fn new(redriven: client::Redriven, is_dry_run: bool) -> Self {
        let handlers = redriven
            .handlers
            .into_iter()
            .map(|handler| RedrivenHandler {
                handler: handler.handler,
                event_version: handler.event_version,
                messages: handler.messages,
                is_live: handler.is_live,
            });
        let left = redriven.left.into_iter().map(|left| LeftLetters {
            handler: left.handler,
            event_version: left.event_version,
            dead_letters: left.letters,
            why: left.why.to_string(),
        });
        Self {
            messages: redriven.messages,
            handlers: handlers.collect(),
            left: left.collect(),
            missing: redriven.missing,
            last_due_at: redriven.last_due_at,
            is_dry_run,
        }
    }
}

/// What a purge has done, or would do.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Purged {
    /// How many dead letters were deleted, or would be.
    pub dead_letters: u64,
    /// Whether nothing was changed.
    pub is_dry_run: bool,
}
