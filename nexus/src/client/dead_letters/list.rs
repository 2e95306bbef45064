use std::{fmt, future::IntoFuture, str::FromStr};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::DeadLetterFilter;
use crate::{
    client::{Client, OperateError},
    event::PastError,
    store::dead_letters::{self, Before, Stored},
};

/// A message that will not be tried again by itself.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeadLetter {
    /// Its id in the dead-letter queue; what [`Client::redrive`] takes.
    pub id: i64,
    /// The group whose queue it came from.
    pub group: String,
    /// The handler that failed; `None` if the message was no envelope.
    pub handler: Option<String>,
    /// The event; `None` if the message was no envelope.
    pub event_id: Option<i64>,
    /// The stored name of the event's type; `None` if the message was no envelope.
    pub event_type: Option<String>,
    /// The original message; null if it is over the size limit of this client.
    pub original: Value,
    /// In a few words why it is here: `Attempts exhausted`, `Permanent error`, `Undecodable payload`,
    /// `Abandoned`, `Malformed message`, `Too large`, `Unknown handler`.
    pub reason: String,
    /// The last error with its sources.
    pub error: Option<String>,
    /// What letters of one cause have in common: a hash of reason and error, without quoted values,
    /// addresses, ids and numbers. `None` if the letter was not made by nexus.
    pub fingerprint: Option<String>,
    /// How many attempts were made, since the last redrive if there was one.
    pub attempts: u32,
    /// The errors of the attempts, those before a redrive included, oldest first; the newest ten.
    pub errors: Vec<PastError>,
    /// When it was given up, by the clock of the database.
    pub failed_at: Timestamp,
    /// How often it has been redriven.
    pub redrive_count: u32,
    /// The redrives, oldest first; the newest ten.
    pub redrives: Vec<PastRedrive>,
    /// Whether a redrive has replaced the payload: then the event log has another one.
    pub is_edited: bool,
}

/// A redrive that did not help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct PastRedrive {
    /// When it was, ISO 8601.
    pub at: String,
    /// Who did it: see [`Redrive::by`](super::Redrive::by).
    pub by: String,
    /// How many attempts had been made until then, since the redrive before.
    #[serde(default)]
    pub attempts: u32,
    /// Why it had been a dead letter.
    #[serde(default)]
    pub reason: String,
    /// The last error until then; its first 500 characters.
    #[serde(default)]
    pub error: Option<String>,
    /// Since when it had been one, ISO 8601.
    #[serde(default)]
    pub failed_at: String,
    /// Whether the payload was replaced.
    #[serde(default)]
    pub edited: bool,
}

impl DeadLetter {
    fn new(group: &str, stored: Stored) -> Self {
        // A foreign program may have put anything there; show it rather than fail.
        let text = stored.body.as_deref().unwrap_or("null");
        let body = serde_json::from_str(text).unwrap_or_else(|error| Body {
            original_event: serde_json::from_str(text).unwrap_or(Value::Null),
            reason: "Malformed message".to_owned(),
            error: Some(format!("this dead letter was not made by nexus: {error}")),
            handler: None,
            attempts: 0,
            errors: Vec::new(),
        });
        let headers: Headers = stored
            .headers
            .and_then(|headers| serde_json::from_str(&headers).ok())
            .unwrap_or_default();
        Self {
            id: stored.msg_id,
            group: group.to_owned(),
            handler: body.handler,
            event_id: stored.event_id,
            event_type: stored.event_type,
            original: body.original_event,
            reason: body.reason,
            error: body.error,
            fingerprint: stored.fingerprint,
            attempts: body.attempts,
            errors: body.errors,
            failed_at: stored.failed_at,
            redrive_count: headers.redriven,
            redrives: headers.redrives,
            is_edited: headers.edited,
        }
    }

    /// Where the page that ends with this letter ends: see [`DeadLetters::after`].
    #[must_use]
    pub fn cursor(&self) -> DeadLetterCursor {
        DeadLetterCursor {
            failed_at_micros: self.failed_at.as_microsecond(),
            id: self.id,
        }
    }
}

/// The body of a dead letter, with the original system's fields.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    original_event: Value,
    reason: String,
    error: Option<String>,
    handler: Option<String>,
    #[serde(default)]
    attempts: u32,
    #[serde(default)]
    errors: Vec<PastError>,
}

/// What a redrive leaves in the headers.
#[derive(Default, Deserialize)]
struct Headers {
    #[serde(default)]
    redriven: u32,
    #[serde(default)]
    redrives: Vec<PastRedrive>,
    #[serde(default)]
    edited: bool,
}

/// Where a page of dead letters ended. As text it can travel, in the address of a web page for instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadLetterCursor {
    failed_at_micros: i64,
    id: i64,
}

impl fmt::Display for DeadLetterCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.failed_at_micros, self.id)
    }
}

/// A text that is no [`DeadLetterCursor`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no cursor of dead letters: give the text of one that `DeadLetter::cursor` returned"
)]
pub struct InvalidCursor(String);

impl FromStr for DeadLetterCursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, InvalidCursor> {
        let cursor = text.rsplit_once('-').and_then(|(at, id)| {
            let failed_at_micros = at.parse().ok()?;
            // As Postgres counts: it knows no later times.
            Timestamp::from_microsecond(failed_at_micros).ok()?;
            Some(Self {
                failed_at_micros,
                id: id.parse().ok()?,
            })
        });
        cursor.ok_or_else(|| InvalidCursor(text.to_owned()))
    }
}

/// A page of dead letters: set options, then await it. Made by [`Client::dead_letters`].
#[must_use = "nothing is asked until it is awaited"]
#[derive(Debug)]
pub struct DeadLetters<'a> {
    client: &'a Client,
    group: &'a str,
    limit: u32,
    filter: DeadLetterFilter,
    after: Option<DeadLetterCursor>,
}

impl DeadLetters<'_> {
    /// Only those that are meant. Default: all of the group.
    pub fn filter(self, filter: impl Into<DeadLetterFilter>) -> Self {
        Self {
            filter: filter.into(),
            ..self
        }
    }

    /// The page after the one that ended with this letter. What dies meanwhile comes before it and is not
    /// shown; what is redriven meanwhile is missing.
    pub fn after(self, cursor: DeadLetterCursor) -> Self {
        Self {
            after: Some(cursor),
            ..self
        }
    }
}

impl<'a> IntoFuture for DeadLetters<'a> {
    type Output = Result<Vec<DeadLetter>, OperateError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let doing = "list dead letters";
            let Self {
                client,
                group,
                limit,
                filter,
                after,
            } = self;
            client.queue_of(group).await?;
            let before = after.map(|cursor| Before {
                failed_at_micros: cursor.failed_at_micros,
                msg_id: cursor.id,
            });
            // As large as bodies in queues may be.
            let most = client.limits().payload_bytes.saturating_add(64 * 1024);
            let filter = filter.json();
            let listed = async {
                let mut connection = client.lend().await?;
                let stored = dead_letters::list(
                    &mut connection,
                    client.namespace(),
                    group,
                    &filter,
                    limit.into(),
                    before,
                    i64::try_from(most).unwrap_or(i64::MAX),
                )
                .await?;
                connection.give_back().await?;
                Ok(stored)
            };
            let stored = client.asked(doing, listed).await?;
            Ok(stored
                .into_iter()
                .map(|letter| DeadLetter::new(group, letter))
                .collect())
        })
    }
}

/// How many dead letters have one cause.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeadLetterCause {
    /// The group.
    pub group: String,
    /// The handler; `None` for messages that were no envelopes.
    pub handler: Option<String>,
    /// The stored name of the event's type.
    pub event_type: Option<String>,
    /// See [`DeadLetter::fingerprint`].
    pub fingerprint: Option<String>,
    /// How many there are.
    pub letters: u64,
    /// When the oldest one was given up.
    pub first_failed_at: Timestamp,
    /// When the newest one was given up.
    pub last_failed_at: Timestamp,
    /// The id of the newest one.
    pub sample_id: i64,
    /// Why the newest one is here: see [`DeadLetter::reason`].
    pub sample_reason: Option<String>,
    /// The last error of the newest one.
    pub sample_error: Option<String>,
}

impl Client {
    /// The newest dead letters of a group, at most `limit`, newest first; await it, or set a
    /// [filter](DeadLetters::filter) or the page's [start](DeadLetters::after) before. They stay where they
    /// are. The group of handlers that name none is the app's name.
    ///
    /// Awaiting it fails if the group does not exist, or the database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::{client::DeadLetterFilter, prelude::*};
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let filter = DeadLetterFilter::new().handler("charge_fee");
    /// let mut page = client.dead_letters("billing", 100).filter(filter.clone()).await?;
    /// while let Some(last) = page.last() {
    ///     for letter in &page {
    ///         println!("{} {}: {:?}", letter.id, letter.reason, letter.error);
    ///     }
    ///     let next = client.dead_letters("billing", 100).filter(filter.clone());
    ///     page = next.after(last.cursor()).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn dead_letters<'a>(&'a self, group: &'a str, limit: u32) -> DeadLetters<'a> {
        DeadLetters {
            client: self,
            group,
            limit,
            filter: DeadLetterFilter::new(),
            after: None,
        }
    }

    /// What died of what: the dead letters of all groups of the namespace by handler, event type and
    /// fingerprint of the error, the largest number first; at most 100 causes. Every letter that is
    /// meant is counted, which takes seconds where there are millions.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::{client::DeadLetterFilter, prelude::*};
    /// # async fn example(client: &Client) -> nexus::Result {
    /// for cause in client.dead_letter_summary(DeadLetterFilter::new()).await? {
    ///     println!(
    ///         "{} letters of {:?} since {}: {:?}",
    ///         cause.letters, cause.handler, cause.first_failed_at, cause.sample_error
    ///     );
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn dead_letter_summary(
        &self,
        filter: impl Into<DeadLetterFilter>,
    ) -> Result<Vec<DeadLetterCause>, OperateError> {
        let doing = "count dead letters";
        let filter = filter.into().json();
        let counted = async {
            let mut connection = self.lend().await?;
            let causes = dead_letters::summary(&mut connection, self.namespace(), &filter).await?;
            connection.give_back().await?;
            Ok(causes)
        };
        let causes = self.asked(doing, counted).await?;
        Ok(causes
            .into_iter()
            .map(|cause| DeadLetterCause {
                group: cause.group,
                handler: cause.handler,
                event_type: cause.event_type,
                fingerprint: cause.fingerprint,
                letters: cause.letters.unsigned_abs(),
                first_failed_at: cause.first_failed_at,
                last_failed_at: cause.last_failed_at,
                sample_id: cause.sample_id,
                sample_reason: cause.sample_reason,
                sample_error: cause.sample_error,
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_from_its_text() {
        for cursor in [
            DeadLetterCursor {
                failed_at_micros: 1_790_000_000_123_456,
                id: 17,
            },
            DeadLetterCursor {
                failed_at_micros: -5,
                id: 1,
            },
        ] {
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
        for bad in ["", "-", "17", "a-1", "1-b", "9223372036854775807-1"] {
            let error = bad.parse::<DeadLetterCursor>().unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("`{bad}` is no cursor")),
                "{error}"
            );
        }
    }
}
