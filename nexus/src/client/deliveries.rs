//! Looking at what became of events.

use jiff::Timestamp;

use super::{Client, OperateError};
use crate::{
    event::PastError,
    store::{
        deliveries::{self, Found},
        subscriptions,
    },
};

/// An event for one handler, and how far that is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Delivery {
    /// The event.
    pub event_id: i64,
    /// The group.
    pub group: String,
    /// The handler, by its present name.
    pub handler: String,
    /// How far it is.
    pub state: DeliveryState,
    /// How many attempts have failed so far. What is completed leaves no trace of its attempts, and
    /// counts none.
    pub attempts: u32,
    /// How they failed, oldest first; the newest ten.
    pub errors: Vec<PastError>,
}

/// How far a [`Delivery`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeliveryState {
    /// The message waits for a node, since then.
    Ready {
        /// Since when.
        since: Timestamp,
    },
    /// A node has the message, and runs it or will in a moment.
    Running {
        /// When the lease ends, unless it is extended.
        until: Timestamp,
    },
    /// An attempt has failed or was snoozed, and the next one is not due yet.
    Waiting {
        /// When it is.
        until: Timestamp,
    },
    /// It was given up.
    DeadLetter {
        /// What [`Client::redrive`] takes.
        id: i64,
        /// In a few words why: see [`DeadLetter::reason`](super::DeadLetter::reason).
        reason: String,
        /// The last error with its sources.
        error: Option<String>,
        /// When that was.
        failed_at: Timestamp,
    },
    /// The event was sent to the handler, and nothing of that is left: it was completed. Or its dead letter
    /// was purged, or it was dropped when an earlier subscription of that name was retired.
    Done,
    /// The handler subscribed later, or the event was only appended to the log. It has been delivered if a
    /// replay did that.
    NotSent,
}

impl Delivery {
    fn new(found: Found) -> Self {
        let state = match found.reason {
            Some(reason) => DeliveryState::DeadLetter {
                id: found.msg_id,
                reason,
                error: found.error,
                failed_at: found.at,
            },
            None if found.is_due => DeliveryState::Ready { since: found.at },
            None if found.is_held => DeliveryState::Running { until: found.at },
            None => DeliveryState::Waiting { until: found.at },
        };
        Self {
            event_id: found.event_id,
            group: found.group,
            handler: found.handler,
            state,
            attempts: found.attempts.unwrap_or(0),
            errors: serde_json::from_value(found.errors).unwrap_or_default(),
        }
    }
}

impl Client {
    /// What became of these events: for each of them every handler that it was, or would be, sent to, by
    /// event, group and handler.
    ///
    /// Walks through the queues of the namespace, which takes a second where a million messages wait.
    ///
    /// # Errors
    ///
    /// The database could not be asked, or it took longer than 30 s.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// for delivery in client.deliveries(&[17]).await? {
    ///     println!("{}/{}: {:?}", delivery.group, delivery.handler, delivery.state);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn deliveries(&self, event_ids: &[i64]) -> Result<Vec<Delivery>, OperateError> {
        let namespace = self.namespace();
        let looked = async {
            let mut connection = self.lend().await?;
            let groups = subscriptions::group_rows(&mut connection, namespace).await?;
            let found = deliveries::found(&mut connection, namespace, &groups, event_ids).await?;
            let targets = deliveries::targets(&mut connection, namespace, event_ids).await?;
            connection.give_back().await?;
            Ok((found, targets))
        };
        let (found, targets) = self
            .asked("look for the messages of events", looked)
            .await?;
        let mut found: Vec<Delivery> = found.into_iter().map(Delivery::new).collect();
        for target in targets {
            let is_found = found.iter().any(|delivery| {
                delivery.event_id == target.event_id
                    && delivery.group == target.group
                    && delivery.handler == target.handler
            });
            if !is_found {
                found.push(Delivery {
                    event_id: target.event_id,
                    group: target.group,
                    handler: target.handler,
                    state: if target.was_sent {
                        DeliveryState::Done
                    } else {
                        DeliveryState::NotSent
                    },
                    attempts: 0,
                    errors: Vec::new(),
                });
            }
        }
        found.sort_by_cached_key(|delivery| {
            let (group, handler) = (delivery.group.clone(), delivery.handler.clone());
            (delivery.event_id, group, handler)
        });
        Ok(found)
    }
}
