//! Looking after what was emitted: dead letters and subscriptions.

use serde::Deserialize;
use serde_json::Value;

use super::{Client, schedules::names};
use crate::{
    event::{PastError, check_name},
    store::{dead_letters, subscriptions},
};

/// Why a request could not be answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperateError {
    /// The group's name cannot be one; the text says what is accepted.
    #[error(transparent)]
    Name(#[from] crate::event::InvalidName),
    /// No app of this namespace has such a group. The group of handlers that name none is the app's name.
    #[error("namespace `{namespace}` has no group `{group}`; it has {}", names(.known))]
    UnknownGroup {
        /// The namespace.
        namespace: String,
        /// The group.
        group: String,
        /// The groups that there are.
        known: Vec<String>,
    },
    /// The database could not be asked.
    #[error("could not {doing}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// What went wrong.
        source: sqlx::Error,
    },
}

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
    /// The original message.
    pub original: Value,
    /// In a few words why it is here: `Attempts exhausted`, `Permanent error`, `Undecodable payload`,
    /// `Abandoned`, `Malformed message`, `Too large`.
    pub reason: String,
    /// The last error with its sources.
    pub error: Option<String>,
    /// How many attempts were made.
    pub attempts: u32,
    /// The errors of the attempts, oldest first; the newest ten.
    pub errors: Vec<PastError>,
    /// When it was given up.
    pub failed_at: jiff::Timestamp,
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

/// A handler's durable wish for an event type.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Subscription {
    /// Its id; messages carry it.
    pub id: i64,
    /// The group.
    pub group: String,
    /// The handler.
    pub handler: String,
    /// The event type.
    pub event_type: String,
    /// The app that declared it last.
    pub app: String,
    /// Whether a live node can run the handler. If not, its messages wait.
    pub is_live: bool,
    /// How many messages wait for it or are being handled.
    pub waiting: i64,
}

pub(super) fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> OperateError {
    move |source| OperateError::Database { doing, source }
}

impl Client {
    /// The newest dead letters of a group, at most `limit`, newest first. They stay where they are. The
    /// group of handlers that name none is the app's name.
    ///
    /// # Errors
    ///
    /// The group does not exist, or the database could not be asked.
    pub async fn dead_letters(
        &self,
        group: &str,
        limit: u32,
    ) -> Result<Vec<DeadLetter>, OperateError> {
        let doing = "list dead letters";
        let queue = self.queue_of(group).await?;
        let mut connection = self.pool().acquire().await.map_err(failed(doing))?;
        let stored = dead_letters::list(&mut connection, &queue, limit.into())
            .await
            .map_err(failed(doing))?;
        Ok(stored
            .into_iter()
            .map(|letter| {
                // A foreign program may have put anything there; show it rather than fail.
                let body = serde_json::from_str(&letter.body).unwrap_or_else(|error| Body {
                    original_event: serde_json::from_str(&letter.body).unwrap_or(Value::Null),
                    reason: "Malformed message".to_owned(),
                    error: Some(format!("this dead letter was not made by nexus: {error}")),
                    handler: None,
                    attempts: 0,
                    errors: Vec::new(),
                });
                DeadLetter {
                    id: letter.msg_id,
                    group: group.to_owned(),
                    handler: body.handler,
                    event_id: letter.event_id,
                    original: body.original_event,
                    reason: body.reason,
                    error: body.error,
                    attempts: body.attempts,
                    errors: body.errors,
                    failed_at: letter.failed_at,
                }
            })
            .collect())
    }

    /// Puts dead letters of a group back into its queue and returns how many there were.
    ///
    /// A redriven message keeps its event, its handler and the history of its errors, and has all
    /// its attempts before it. An id that is not there is no error.
    ///
    /// # Errors
    ///
    /// The group does not exist, or the database could not be asked.
    pub async fn redrive(&self, group: &str, ids: &[i64]) -> Result<u64, OperateError> {
        let doing = "redrive dead letters";
        let queue = self.queue_of(group).await?;
        let mut connection = self.pool().acquire().await.map_err(failed(doing))?;
        let count = dead_letters::redrive(&mut connection, &queue, ids)
            .await
            .map_err(failed(doing))?;
        self.wake([queue]);
        Ok(count)
    }

    /// Every subscription of the namespace, with what waits for it.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn subscriptions(&self) -> Result<Vec<Subscription>, OperateError> {
        let doing = "list subscriptions";
        let mut connection = self.pool().acquire().await.map_err(failed(doing))?;
        let rows = subscriptions::list(&mut connection, self.namespace())
            .await
            .map_err(failed(doing))?;
        let mut found = Vec::with_capacity(rows.len());
        for row in rows {
            let waiting = subscriptions::waiting(&mut connection, row.subscription_id, &row.queue)
                .await
                .map_err(failed(doing))?;
            found.push(Subscription {
                id: row.subscription_id,
                group: row.group,
                handler: row.handler,
                event_type: row.event_type,
                app: row.app,
                is_live: row.is_live,
                waiting,
            });
        }
        Ok(found)
    }

    async fn queue_of(&self, group: &str) -> Result<String, OperateError> {
        check_name("group", group)?;
        let mut connection = self
            .pool()
            .acquire()
            .await
            .map_err(failed("look for the group"))?;
        let queue = subscriptions::queue_of(&mut connection, self.namespace(), group)
            .await
            .map_err(failed("look for the group"))?;
        if let Some(queue) = queue {
            return Ok(queue);
        }
        Err(OperateError::UnknownGroup {
            namespace: self.namespace().to_owned(),
            group: group.to_owned(),
            known: subscriptions::groups(&mut connection, self.namespace())
                .await
                .map_err(failed("look for the group"))?,
        })
    }
}
