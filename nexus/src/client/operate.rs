//! Looking after subscriptions, and what can go wrong with all that is looked after.

use std::time::Duration;

use jiff::Timestamp;

use super::{Client, lent::ANSWER, schedules::names};
use crate::{
    event::check_name,
    store::{self, scheduled_tasks, subscriptions},
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
    /// Some of it was done, and stays done. If the source is a lost connection, one batch more may be.
    /// The same call again does the rest.
    #[error("could not {doing} after the first {done}: call again for the rest")]
    Interrupted {
        /// What was attempted.
        doing: &'static str,
        /// How many were done.
        done: u64,
        /// What went wrong.
        source: sqlx::Error,
    },
    /// Give a rate from one message a day on.
    #[error("a rate of {messages} messages in {per:?} is refused: one message a day is the least")]
    Rate {
        /// How many messages.
        messages: u32,
        /// In which time.
        per: Duration,
    },
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
    /// The version of it that the handler takes; `None` if no build has said so yet.
    pub event_version: Option<u32>,
    /// The app that declared it last.
    pub app: String,
    /// Whether a live node can run the handler. If not, its messages wait.
    pub is_live: bool,
    /// How many messages wait for it or are being handled, up to 100,001.
    pub waiting: i64,
    /// How many of these wait in a version that no live node runs the handler for, up to 100,001 of each
    /// version: they wait for a build that does, or until they are [retired](Client::retire_version).
    pub unserved: i64,
}

pub(super) fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> OperateError {
    move |source| OperateError::Database { doing, source }
}

impl Client {
    /// Asks the database, which has to answer within [`ANSWER`].
    pub(super) async fn asked<T>(
        &self,
        doing: &'static str,
        work: impl Future<Output = sqlx::Result<T>>,
    ) -> Result<T, OperateError> {
        let answer = store::answered_within(ANSWER, work).await;
        answer.map_err(failed(doing))
    }

    /// Every subscription of the namespace, with what waits for it.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn subscriptions(&self) -> Result<Vec<Subscription>, OperateError> {
        let doing = "list subscriptions";
        let listed = async {
            let mut connection = self.lend().await?;
            let rows = subscriptions::list(&mut connection, self.namespace()).await?;
            let mut found = Vec::with_capacity(rows.len());
            for row in rows {
                let id = row.subscription_id;
                let waiting = subscriptions::waiting(&mut connection, id, &row.queue).await?;
                let unserved =
                    subscriptions::unserved_versions(&mut connection, self.namespace(), &row)
                        .await?;
                found.push(Subscription {
                    id,
                    group: row.group,
                    handler: row.handler,
                    event_type: row.event_type,
                    event_version: row.event_version.map(i32::unsigned_abs),
                    app: row.app,
                    is_live: row.is_live,
                    waiting,
                    unserved: unserved.iter().map(|(_, count)| count).sum(),
                });
            }
            connection.give_back().await?;
            Ok(found)
        };
        self.asked(doing, listed).await
    }

    /// The time by the clock of the database, which every time here is told by.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn database_time(&self) -> Result<Timestamp, OperateError> {
        let asked = async {
            let mut connection = self.lend().await?;
            let now = scheduled_tasks::now(&mut connection).await?;
            connection.give_back().await?;
            Ok(now)
        };
        self.asked("ask for the time", asked).await
    }

    pub(super) async fn queue_of(&self, group: &str) -> Result<String, OperateError> {
        check_name("group", group)?;
        let doing = "look for the group";
        let found = async {
            let mut connection = self.lend().await?;
            let queue = subscriptions::queue_of(&mut connection, self.namespace(), group).await?;
            let known = match &queue {
                Some(_) => Vec::new(),
                None => subscriptions::groups(&mut connection, self.namespace()).await?,
            };
            connection.give_back().await?;
            Ok((queue, known))
        };
        let (queue, known) = self.asked(doing, found).await?;
        queue.ok_or_else(|| OperateError::UnknownGroup {
            namespace: self.namespace().to_owned(),
            group: group.to_owned(),
            known,
        })
    }
}
