use std::{fmt, future::IntoFuture, time::Duration};

use futures_util::future::BoxFuture;
use serde_json::Value;

use super::{
    DeadLetterFilter, Redriven,
    redrive::{Job, signature},
};
use crate::{
    client::{Client, OperateError},
    event::{EncodeError, Event, Misfit, PayloadProblem, check_payload, encode},
    store::dead_letters,
};

/// Everything in a payload that does not fit its schema; at most 20 places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadProblems(Vec<PayloadProblem>);

impl PayloadProblems {
    pub(in crate::client) fn new(problems: Vec<PayloadProblem>) -> Self {
        Self(problems)
    }

    /// One by one.
    pub fn iter(&self) -> impl Iterator<Item = &PayloadProblem> {
        self.0.iter()
    }
}

impl fmt::Display for PayloadProblems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let before = if index == 0 { "" } else { "; " };
            write!(f, "{before}{problem}")?;
        }
        Ok(())
    }
}

/// Why a dead letter could not be redriven with another payload. It is where it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// The group or the database.
    #[error(transparent)]
    Operate(#[from] OperateError),
    /// It has been redriven or purged, or never was. List the group's letters.
    #[error("group `{group}` has no dead letter {id}")]
    NoSuchLetter {
        /// The group.
        group: String,
        /// The id.
        id: i64,
    },
    /// The original is no envelope, or was for no handler, so there is no payload to replace. Emit a new
    /// event, and purge the letter.
    #[error("dead letter {id} holds no event: emit a new event instead, and purge the letter")]
    NoEvent {
        /// The id.
        id: i64,
    },
    /// The typed payload is of another event type or version than the letter.
    #[error(
        "dead letter {id} is a `{event_type}` version {event_version}, the payload is a `{given_type}` version {given_version}"
    )]
    OtherEvent {
        /// The id.
        id: i64,
        /// The letter's event type.
        event_type: String,
        /// The letter's version.
        event_version: String,
        /// The payload's event type.
        given_type: &'static str,
        /// The payload's version.
        given_version: u32,
    },
    /// No app of the namespace has declared the type in this version, so the payload cannot be checked, and
    /// no handler could take it. Start a build that declares it.
    #[error(
        "no app has declared event type `{event_type}` version {event_version}, so the payload cannot be checked: start a build that has it"
    )]
    NoSchema {
        /// The event type.
        event_type: String,
        /// The version.
        event_version: String,
    },
    /// The declared schema cannot be used to check anything. Mend the type's `JsonSchema`.
    #[error(
        "the schema of event type `{event_type}` version {event_version} cannot be used: {why}"
    )]
    UnusableSchema {
        /// The event type.
        event_type: String,
        /// The version.
        event_version: String,
        /// What is wrong with it.
        why: String,
    },
    /// The payload has no form that can be stored.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The payload does not fit the declared schema.
    #[error(
        "the payload does not fit event type `{event_type}` version {event_version}: {problems}"
    )]
    Misfit {
        /// The event type.
        event_type: String,
        /// The version.
        event_version: String,
        /// What does not fit, and where.
        problems: PayloadProblems,
    },
}

/// A dead letter about to be put back with another payload: set options, then await it. Made by
/// [`Client::redrive_edited`] and [`Client::redrive_edited_as`].
#[must_use = "a redrive does nothing until it is awaited"]
#[derive(Debug)]
pub struct EditedRedrive<'a> {
    client: &'a Client,
    group: &'a str,
    id: i64,
    payload: Payload,
    by: Option<String>,
    is_dry: bool,
}

#[derive(Debug)]
enum Payload {
    Json(Value),
    Typed {
        event_type: &'static str,
        event_version: u32,
        text: Result<String, EncodeError>,
    },
}

impl EditedRedrive<'_> {
    /// Who does it: see [`Redrive::by`](super::Redrive::by).
    pub fn by(mut self, name: impl Into<String>) -> Self {
        self.by = Some(name.into());
        self
    }

    /// Only checks, tells what would be done, and changes nothing.
    pub fn dry_run(mut self) -> Self {
        self.is_dry = true;
        self
    }
}

/// The payload as it is sent, once it fits the letter.
async fn checked(
    client: &Client,
    group: &str,
    id: i64,
    payload: Payload,
) -> Result<String, EditError> {
    let doing = "look at a dead letter";
    let queue = client.queue_of(group).await?;
    let looked = async {
        let mut connection = client.lend().await?;
        let namespace = client.namespace();
        let letter = dead_letters::editable(&mut connection, namespace, group, &queue, id).await?;
        connection.give_back().await?;
        Ok(letter)
    };
    let letter = client
        .asked(doing, looked)
        .await?
        .ok_or_else(|| EditError::NoSuchLetter {
            group: group.to_owned(),
            id,
        })?;
    let (Some(event_type), Some(event_version)) = (letter.event_type, letter.event_version) else {
        return Err(EditError::NoEvent { id });
    };
    let text = match payload {
        Payload::Json(value) => encode(&event_type, &value, client.limits().payload_bytes)?,
        Payload::Typed {
            event_type: given_type,
            event_version: given_version,
            ..
        } if given_type != event_type || given_version.to_string() != event_version => {
            return Err(EditError::OtherEvent {
                id,
                event_type,
                event_version,
                given_type,
                given_version,
            });
        }
        Payload::Typed { text, .. } => text?,
    };
    let Some(schema) = letter.schema else {
        return Err(EditError::NoSchema {
            event_type,
            event_version,
        });
    };
    let check = || {
        let unusable = |error: serde_json::Error| Misfit::Schema(error.to_string());
        let schema = serde_json::from_str(&schema).map_err(unusable)?;
        check_payload(schema, &serde_json::from_str(&text).map_err(unusable)?)
    };
    match check() {
        Ok(()) => Ok(text),
        Err(Misfit::Schema(why)) => Err(EditError::UnusableSchema {
            event_type,
            event_version,
            why,
        }),
        Err(Misfit::Payload(problems)) => Err(EditError::Misfit {
            event_type,
            event_version,
            problems: PayloadProblems(problems),
        }),
    }
}

impl<'a> IntoFuture for EditedRedrive<'a> {
    type Output = Result<Redriven, EditError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self {
                client,
                group,
                id,
                payload,
                by,
                is_dry,
            } = self;
            let payload = checked(client, group, id, payload).await?;
            let job = Job {
                client,
                group,
                filter: &DeadLetterFilter::from(&[id]),
                limit: None,
                pace: Duration::ZERO,
                by: &signature(client, by.as_deref()),
                is_dry,
                payload: Some(&payload),
            };
            let redriven = job.run(None).await?;
            if redriven.missing > 0 {
                // Between the look and the statement.
                return Err(EditError::NoSuchLetter {
                    group: group.to_owned(),
                    id,
                });
            }
            Ok(redriven)
        })
    }
}

impl Client {
    /// Puts one dead letter back with another payload, which must fit the JSON Schema that the handler's
    /// app has declared for the event's type and version. Await it for what was done;
    /// [`dry_run`](EditedRedrive::dry_run) only checks.
    ///
    /// It is a [redrive](Self::redrive) in all else: the message keeps its event id, its key and its
    /// [delivery key](crate::EnvelopeMeta::delivery_key), so another system that knows the delivery
    /// key from a failed attempt may refuse the new payload. The event log is append-only and keeps the
    /// original, other handlers of the event are not touched, and the message remembers:
    /// [`EnvelopeMeta::is_edited`](crate::EnvelopeMeta::is_edited), and the history in [`DeadLetter`].
    ///
    /// Awaiting it fails with an [`EditError`]; the letter is where it was then.
    ///
    /// [`DeadLetter`]: super::DeadLetter::redrives
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # async fn example(client: &Client, letter: nexus::client::DeadLetter) -> nexus::Result {
    /// let mut payload = letter.original["payload"].clone();
    /// payload["amount"] = 12.into();
    /// client.redrive_edited("billing", letter.id, &payload).by("ada").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn redrive_edited<'a>(
        &'a self,
        group: &'a str,
        id: i64,
        payload: &Value,
    ) -> EditedRedrive<'a> {
        self.edited(group, id, Payload::Json(payload.clone()))
    }

    /// The same with a payload of the event's Rust type. It is checked all the same: the program that runs
    /// the handler may be of another build than this one.
    pub fn redrive_edited_as<'a, E: Event>(
        &'a self,
        group: &'a str,
        id: i64,
        event: &E,
    ) -> EditedRedrive<'a> {
        let payload = Payload::Typed {
            event_type: E::EVENT_TYPE,
            event_version: E::VERSION,
            text: encode(E::EVENT_TYPE, event, self.limits().payload_bytes),
        };
        self.edited(group, id, payload)
    }

    fn edited<'a>(&'a self, group: &'a str, id: i64, payload: Payload) -> EditedRedrive<'a> {
        EditedRedrive {
            client: self,
            group,
            id,
            payload,
            by: None,
            is_dry: false,
        }
    }
}
