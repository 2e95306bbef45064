//! Delivering events of the log once more.

use jiff::Timestamp;
use uuid::Uuid;

use super::{ANSWER, Client, OperateError, operate::failed};
use crate::{
    event::check_name,
    store::{self, replays},
};

/// Most events of a type that a dry run counts one by one.
const COUNTED: i32 = 100_000;

/// A replay about to be started: set bounds and options, then [`start`](Self::start) it, or look what it
/// would do by a [`dry_run`](Self::dry_run). Made by [`Client::replay`].
#[derive(Debug, Clone)]
#[must_use = "a replay does nothing until it is started"]
pub struct Replay<'a> {
    client: &'a Client,
    request: replays::Request,
}

impl Replay<'_> {
    /// Only to this handler of the group. Default: to every handler, but for functions that the clock
    /// runs: their old ticks are replayed only to a function that is named here, or by their
    /// [event type](Self::event_type).
    pub fn handler(mut self, handler: impl Into<String>) -> Self {
        self.request.handler = Some(handler.into());
        self
    }

    /// Only events of this type; call it again for several. Default: all that the handlers take.
    pub fn event_type(mut self, event_type: impl Into<String>) -> Self {
        self.request
            .event_types
            .get_or_insert_default()
            .push(event_type.into());
        self
    }

    /// Only events that were emitted at this time or later. Default: from the oldest in the log.
    pub fn since(mut self, at: Timestamp) -> Self {
        self.request.from_at = Some(at);
        self
    }

    /// Only events that were emitted before this time. Default: all that are in the log now.
    pub fn until(mut self, at: Timestamp) -> Self {
        self.request.until_at = Some(at);
        self
    }

    /// Only events with this id or a higher one. Default: no bound.
    pub fn first_id(mut self, event_id: i64) -> Self {
        self.request.from_id = Some(event_id);
        self
    }

    /// Only events with this id or a lower one. Default: no bound.
    pub fn last_id(mut self, event_id: i64) -> Self {
        self.request.until_id = Some(event_id);
        self
    }

    /// At most so many messages a second, from 0.0001 to a million; a message is one event for one
    /// handler. Default: as fast as they are handled.
    pub fn rate(mut self, messages_per_second: f64) -> Self {
        self.request.rate = Some(messages_per_second);
        self
    }

    /// How many of its messages may be in the queue at once, from 1 to 100,000; those that are being
    /// handled or wait for a retry count. Default 1,000.
    ///
    /// Whatever this is, not many more are put there than are handled in a second, because new
    /// events queue up behind them.
    pub fn max_waiting(mut self, messages: u32) -> Self {
        self.request.max_waiting = Some(messages);
        self
    }

    /// Starts the replay and returns its id. Nodes of the namespace drive it to its end, whichever live;
    /// nothing has to be awaited.
    ///
    /// The events that are in the log now are put into the queue in the order of their times; events of
    /// transactions that commit later are not among them. What is no longer in the log, because its
    /// month has passed the [retention](crate::App::log_retention), is not delivered. A handler is
    /// delivered the version that it takes; others are left out and counted.
    ///
    /// # Errors
    ///
    /// [`ReplayError::Refused`] says what does not fit.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it is awaited, the replay may have been started: [`Client::replays`] shows it.
    pub async fn start(self) -> Result<Uuid, ReplayError> {
        let doing = "start a replay";
        let client = self.client;
        check_name("group", &self.request.group).map_err(OperateError::from)?;
        let started = async {
            let mut connection = client.lend().await?;
            let id = replays::start(&mut connection, client.namespace(), &self.request).await?;
            connection.give_back().await?;
            Ok(id)
        };
        let id = store::answered_within(ANSWER, started)
            .await
            .map_err(|source| refused(doing, source))?;
        client.wake([replays::BELL.to_owned()]);
        Ok(id)
    }

    /// Counts what the replay would deliver now, and starts nothing.
    ///
    /// Up to 100,000 events of each type are counted; if there are more, the figures are an
    /// [estimate](ReplayEstimate::is_estimate).
    ///
    /// # Errors
    ///
    /// As of [`start`](Self::start).
    pub async fn dry_run(self) -> Result<ReplayEstimate, ReplayError> {
        let doing = "estimate a replay";
        let client = self.client;
        check_name("group", &self.request.group).map_err(OperateError::from)?;
        let counted = async {
            let mut connection = client.lend().await?;
            let namespace = client.namespace();
            let found =
                replays::estimate(&mut connection, namespace, &self.request, COUNTED).await?;
            connection.give_back().await?;
            Ok(found)
        };
        let found = store::answered_within(ANSWER, counted)
            .await
            .map_err(|source| refused(doing, source))?;
        Ok(ReplayEstimate {
            events: found.events.unsigned_abs(),
            messages: found.messages.unsigned_abs(),
            left_out: found.left_out.unsigned_abs(),
            is_estimate: found.is_estimate,
            first_at: found.first_at,
            last_at: found.last_at,
        })
    }
}

fn refused(doing: &'static str, source: sqlx::Error) -> ReplayError {
    match store::refusal(&source) {
        Some(reason) => ReplayError::Refused { reason },
        None => failed(doing)(source).into(),
    }
}

/// Why a replay could not be started or estimated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The request does not fit what the group has; the text says why, and what there is. Nothing was
    /// started.
    #[error("{reason}")]
    Refused {
        /// What does not fit.
        reason: String,
    },
    /// The group's name cannot be one, or the database could not be asked. After a lost connection it may
    /// have been started.
    #[error(transparent)]
    Operate(#[from] OperateError),
}

/// What a replay would deliver, from [`Replay::dry_run`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplayEstimate {
    /// Events between the bounds.
    pub events: u64,
    /// Messages: one for each event and handler.
    pub messages: u64,
    /// Messages that are left out, because the handler takes another version.
    pub left_out: u64,
    /// There are more events than were counted, so the figures come from the statistics of the database:
    /// right in magnitude, if the tables were analyzed lately.
    pub is_estimate: bool,
    /// When the first of the events was emitted. Older ones may have passed the retention.
    pub first_at: Option<Timestamp>,
    /// When the last was emitted.
    pub last_at: Option<Timestamp>,
}

/// How far a replay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReplayState {
    /// Nodes put its events into the queue.
    Running,
    /// All are put there; the last of them may still [wait](ReplayStatus::waiting).
    Finished,
    /// It was ended before: by [`Client::cancel_replay`], or because its handler was retired.
    Cancelled,
    /// It cannot go on; see [`ReplayStatus::error`].
    Failed,
}

/// A replay, as it is now.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReplayStatus {
    /// Its id; messages carry it.
    pub id: Uuid,
    /// The group that it delivers to.
    pub group: String,
    /// The handler; `None` for all of the group.
    pub handler: Option<String>,
    /// The event types that were asked for; `None` for all.
    pub event_types: Option<Vec<String>>,
    /// Messages a second; `None` is as fast as they are handled.
    pub rate: Option<f64>,
    /// How far it is.
    pub state: ReplayState,
    /// Why it failed or was cancelled, unless somebody has asked for it.
    pub error: Option<String>,
    /// Events it has gone through.
    pub events: u64,
    /// Messages it has put into the queue.
    pub messages: u64,
    /// Messages it has left out, because the handler takes another version.
    pub left_out: u64,
    /// Messages that were taken back when it was cancelled.
    pub taken_back: u64,
    /// Messages of it that are in the queue: not handled yet, being handled, or waiting for a retry.
    pub waiting: u64,
    /// When the event was emitted that it has got to; `None` before the first.
    pub position: Option<Timestamp>,
    /// When the newest event was emitted that was in the log when it was started: at this position it
    /// ends, unless it is bounded before; `None` if there was nothing.
    pub last_at: Option<Timestamp>,
    /// When it was started.
    pub created_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

impl ReplayStatus {
    fn new(row: replays::ReplayRow, waiting: i64) -> Self {
        Self {
            id: row.id,
            group: row.request.group,
            handler: row.request.handler,
            event_types: row.request.event_types,
            rate: row.request.rate,
            state: match row.state {
                replays::State::Running => ReplayState::Running,
                replays::State::Finished => ReplayState::Finished,
                replays::State::Cancelled => ReplayState::Cancelled,
                replays::State::Failed => ReplayState::Failed,
            },
            error: row.error,
            events: row.events.unsigned_abs(),
            messages: row.messages.unsigned_abs(),
            left_out: row.left_out.unsigned_abs(),
            taken_back: row.taken_back.unsigned_abs(),
            waiting: waiting.unsigned_abs(),
            position: row.position_at,
            last_at: row.last_at,
            created_at: row.created_at,
            finished_at: row.finished_at,
        }
    }
}

impl Client {
    /// Delivers events of the log once more, to a group or to one of its handlers. The group of handlers
    /// that name none is the app's name.
    ///
    /// Replayed deliveries are marked ([`EnvelopeMeta::replay_id`](crate::EnvelopeMeta::replay_id)); the
    /// events are those that were emitted, with their ids and times. What a handler emits meanwhile are
    /// new events. The guide says [when to replay what](crate::guide::replay).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::prelude::*;
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let yesterday = nexus::jiff::Timestamp::now() - std::time::Duration::from_hours(24);
    /// let replay = client.replay("billing").handler("book_invoice").since(yesterday);
    /// println!("{} messages", replay.clone().dry_run().await?.messages);
    /// let id = replay.rate(50.0).start().await?;
    /// # client.cancel_replay(id).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn replay(&self, group: impl Into<String>) -> Replay<'_> {
        Replay {
            client: self,
            request: replays::Request {
                group: group.into(),
                ..replays::Request::default()
            },
        }
    }

    /// The replays of the namespace, at most `limit`, newest first. Those that ended are kept for 30 days.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn replays(&self, limit: u32) -> Result<Vec<ReplayStatus>, OperateError> {
        let listed = async {
            let mut connection = self.lend().await?;
            let rows = replays::list(&mut connection, self.namespace(), limit.into()).await?;
            let mut found = Vec::with_capacity(rows.len());
            for row in rows {
                let waiting = replays::waiting(&mut connection, &row).await?;
                found.push(ReplayStatus::new(row, waiting));
            }
            connection.give_back().await?;
            Ok(found)
        };
        self.asked("list replays", listed).await
    }

    /// How far a replay is; `None` if there is none of this id in the namespace.
    ///
    /// # Errors
    ///
    /// The database could not be asked.
    pub async fn replay_status(&self, id: Uuid) -> Result<Option<ReplayStatus>, OperateError> {
        let looked = async {
            let mut connection = self.lend().await?;
            let status = match replays::find(&mut connection, self.namespace(), id).await? {
                Some(row) => {
                    let waiting = replays::waiting(&mut connection, &row).await?;
                    Some(ReplayStatus::new(row, waiting))
                }
                None => None,
            };
            connection.give_back().await?;
            Ok(status)
        };
        self.asked("look at a replay", looked).await
    }

    /// Ends a running replay, and takes back those of its messages that nobody is handling, also those that
    /// wait for a retry. False if it is not running.
    ///
    /// # Errors
    ///
    /// The database could not be asked. After a lost connection it may have been cancelled.
    pub async fn cancel_replay(&self, id: Uuid) -> Result<bool, OperateError> {
        let cancelled = async {
            let mut connection = self.lend().await?;
            let was_running = replays::cancel(&mut connection, self.namespace(), id).await?;
            connection.give_back().await?;
            Ok(was_running)
        };
        self.asked("cancel a replay", cancelled).await
    }
}
