//! Looking at what was emitted.

use jiff::Timestamp;
use serde_json::Value;

use super::{Client, OperateError};
use crate::store::logged_events::{self, Committed, Moment, Wanted};

/// An event of the log.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LoggedEvent {
    /// Its id.
    pub event_id: i64,
    /// Its type.
    pub event_type: String,
    /// The version of the type.
    pub event_version: u32,
    /// When the transaction began that emitted it.
    pub emitted_at: Timestamp,
    /// The node or client that emitted it; `sql`, `scheduler` and `unknown` stand for what is none.
    pub producer: String,
    /// Its key.
    pub key: Option<String>,
    /// What it belongs to: the id of the first event of the chain, unless the emitter said something else.
    pub correlation_id: Option<String>,
    /// The id of the event whose handler emitted it.
    pub causation_id: Option<String>,
    /// The payload.
    pub payload: Value,
    /// Trace context, and what else came with it.
    pub metadata: Value,
}

/// Which events of the log to list; see [`Client::events`].
#[derive(Debug, Clone)]
#[must_use = "a query does nothing until `list` is awaited"]
pub struct Events<'a> {
    client: &'a Client,
    wanted: Wanted,
}

impl Events<'_> {
    /// Only events of this type.
    pub fn event_type(mut self, event_type: impl Into<String>) -> Self {
        self.wanted.event_type = Some(event_type.into());
        self
    }

    /// Only events with this key. No index knows of keys: give [`since`](Self::since) as well where the log is long.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.wanted.key = Some(key.into());
        self
    }

    /// Only events with this correlation id. No index knows of these: give [`since`](Self::since) as well where the log
    /// is long.
    pub fn correlation_id(mut self, id: impl Into<String>) -> Self {
        self.wanted.correlation_id = Some(id.into());
        self
    }

    /// Only events from this time on.
    pub fn since(mut self, at: Timestamp) -> Self {
        self.wanted.since = Some(at);
        self
    }

    /// Only events before this time.
    pub fn until(mut self, at: Timestamp) -> Self {
        self.wanted.until = Some(at);
        self
    }

    /// Only events with a lower id: the last one of a page leads to the next page.
    pub fn before_id(mut self, event_id: i64) -> Self {
        self.wanted.before_id = Some(event_id);
        self
    }

    /// Only events with a higher id: as [`before_id`](Self::before_id), where the oldest come first.
    pub fn after_id(mut self, event_id: i64) -> Self {
        self.wanted.after_id = Some(event_id);
        self
    }

    /// Lower ids first. Default: higher ids first.
    pub fn oldest_first(mut self) -> Self {
        self.wanted.is_oldest_first = true;
        self
    }

    /// At most `limit` events, in the order of their ids. Ids are given when an event is emitted, so one with a
    /// lower id may appear later: [`tail`](Self::tail) misses none.
    ///
    /// # Errors
    ///
    /// The database could not be asked, or it took too long.
    pub async fn list(self, limit: u32) -> Result<Vec<LoggedEvent>, OperateError> {
        let client = self.client;
        let listed = async {
            let mut connection = client.lend().await?;
            let namespace = client.namespace();
            let rows =
                logged_events::list(&mut connection, namespace, &self.wanted, limit.into()).await?;
            connection.give_back().await?;
            Ok(rows)
        };
        let rows = client.asked("list events", listed).await?;
        Ok(rows.into_iter().map(LoggedEvent::from).collect())
    }

    /// Follows the log from now on.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// let mut tail = client.events().event_type("order.paid").tail().await?;
    /// loop {
    ///     for event in tail.next(100).await? {
    ///         println!("{} {}", event.event_id, event.payload);
    ///     }
    ///     tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    /// }
    /// # }
    /// ```
    pub async fn tail(self) -> Result<EventTail, OperateError> {
        Ok(EventTail {
            told_until: moment(self.client).await?,
            page: None,
            client: self.client.clone(),
            wanted: self.wanted,
        })
    }
}

async fn moment(client: &Client) -> Result<Moment, OperateError> {
    let asked = async {
        let mut connection = client.lend().await?;
        let moment = logged_events::moment(&mut connection).await?;
        connection.give_back().await?;
        Ok(moment)
    };
    client.asked("look at the log", asked).await
}

/// The events of the log as their transactions commit, each once and none left out, however long its transaction
/// was open. Made by [`Events::tail`].
#[derive(Debug)]
pub struct EventTail {
    client: Client,
    wanted: Wanted,
    told_until: Moment,
    /// What was committed until then has been told up to this id.
    page: Option<(Moment, i64)>,
}

impl EventTail {
    /// At most `limit` of the events that were committed since the last call, in the order of their ids. An
    /// empty answer says that there are none at the moment: wait a little before you ask again.
    ///
    /// # Errors
    ///
    /// The database could not be asked. The next call returns what this one would have.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it is awaited, it has taken nothing.
    pub async fn next(&mut self, limit: u32) -> Result<Vec<LoggedEvent>, OperateError> {
        let (until, after_id) = match self.page.clone() {
            Some(page) => page,
            None => (moment(&self.client).await?, 0),
        };
        let wanted = Wanted {
            after_id: Some(after_id.max(self.wanted.after_id.unwrap_or(0))),
            is_oldest_first: true,
            committed: Some(Committed {
                after: self.told_until.clone(),
                before: until.clone(),
            }),
            ..self.wanted.clone()
        };
        let events = Events {
            client: &self.client,
            wanted,
        };
        let events = events.list(limit.max(1)).await?;
        match events.last() {
            Some(last) if events.len() >= limit.max(1) as usize => {
                self.page = Some((until, last.event_id));
            }
            _ => {
                self.told_until = until;
                self.page = None;
            }
        }
        Ok(events)
    }
}

impl From<logged_events::Logged> for LoggedEvent {
    fn from(row: logged_events::Logged) -> Self {
        Self {
            event_id: row.event_id,
            event_type: row.event_type,
            event_version: row.event_version.unsigned_abs(),
            emitted_at: row.emitted_at,
            producer: row.producer,
            key: row.key,
            correlation_id: row.correlation_id,
            causation_id: row.causation_id,
            payload: row.payload,
            metadata: row.metadata,
        }
    }
}

impl Client {
    /// The events of the namespace's log, newest first.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// for event in client.events().event_type("order.paid").list(20).await? {
    ///     println!("{} {} {}", event.event_id, event.emitted_at, event.payload);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn events(&self) -> Events<'_> {
        Events {
            client: self,
            wanted: Wanted::default(),
        }
    }

    /// One event of the namespace's log; `None` if it is not there, or no more.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn event(&self, event_id: i64) -> Result<Option<LoggedEvent>, OperateError> {
        let looked = async {
            let mut connection = self.lend().await?;
            let row = logged_events::get(&mut connection, self.namespace(), event_id).await?;
            connection.give_back().await?;
            Ok(row)
        };
        let row = self.asked("look for an event", looked).await?;
        Ok(row.map(LoggedEvent::from))
    }
}
