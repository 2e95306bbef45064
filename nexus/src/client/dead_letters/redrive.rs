use std::{fmt, future::IntoFuture, time::Duration};

use futures_util::future::BoxFuture;
use jiff::Timestamp;

use super::{Again, BATCH, DeadLetterFilter, horizon, interrupted};
use crate::{
    client::{ANSWER, Client, Lent, OperateError, operate::failed},
    store::{
        self,
        dead_letters::{self, Horizon, Manner, Outcome},
        timestamp,
    },
};

/// The slowest rate: one message a day.
const SLOWEST: Duration = Duration::from_hours(24);

/// What a redrive has done, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Redriven {
    /// How many dead letters were put back, or would be.
    pub messages: u64,
    /// For whom, the largest number first.
    pub handlers: Vec<RedrivenHandler>,
    /// What was left where it is, although it was meant. Not told if a [limit](Redrive::limit) was
    /// reached.
    pub left: Vec<LeftLetters>,
    /// How many of the given ids were not there: redriven or purged before, or never. Not told if a limit
    /// was reached.
    pub missing: u64,
    /// When the last message is due; later than now if there is a [rate](Redrive::rate).
    pub last_due_at: Option<Timestamp>,
}

impl Redriven {
    /// How many of the messages no live node can run: they wait until a build is deployed that can.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        let waiting = self.handlers.iter().filter(|handler| !handler.is_live);
        waiting.map(|handler| handler.messages).sum()
    }

    fn add(&mut self, outcome: Outcome) {
        let letters = outcome.letters.unsigned_abs();
        let event_version = outcome
            .event_version
            .and_then(|version| version.parse().ok());
        let why = match &*outcome.what {
            "redrive" | "adopt" => None,
            "no original" => Some(LeftWhy::NoOriginal),
            _ => Some(LeftWhy::Unsubscribed),
        };
        if let Some(why) = why {
            self.left.push(LeftLetters {
                handler: outcome.handler,
                event_version,
                letters,
                why,
            });
            return;
        }
        self.messages += letters;
        self.last_due_at = self.last_due_at.max(outcome.last_due_at);
        let known = self
            .handlers
            .iter_mut()
            .find(|known| known.handler == outcome.handler && known.event_version == event_version);
        if let Some(known) = known {
            known.messages += letters;
            known.is_live = outcome.is_live;
        } else {
            self.handlers.push(RedrivenHandler {
                handler: outcome.handler,
                event_version,
                messages: letters,
                is_live: outcome.is_live,
            });
        }
    }
}

/// Messages that were put back for one handler.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RedrivenHandler {
    /// The handler, by its present name. `None`: messages of foreign programs, which are adopted
    /// anew, and are dead letters again if they still cannot be.
    pub handler: Option<String>,
    /// The version of the events.
    pub event_version: Option<u32>,
    /// How many.
    pub messages: u64,
    /// Whether a live node can run them now. If not, they wait.
    pub is_live: bool,
}

/// Dead letters that were meant and are still there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeftLetters {
    /// The handler.
    pub handler: Option<String>,
    /// The version of the events.
    pub event_version: Option<u32>,
    /// How many.
    pub letters: u64,
    /// Why.
    pub why: LeftWhy,
}

/// Why a dead letter is not redriven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeftWhy {
    /// No handler of this name subscribes in the group any more, so nobody would ever run the message.
    /// Deploy a build that has it (`formerly = "…"` on a handler that was renamed), or purge.
    Unsubscribed,
    /// It holds no message, because something else than nexus has put it there. Purge it.
    NoOriginal,
}

impl fmt::Display for LeftWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsubscribed => "no handler of this name subscribes in the group",
            Self::NoOriginal => "it holds no message",
        })
    }
}

type Progress<'a> = Box<dyn FnMut(&Redriven) + Send + 'a>;

/// Dead letters about to be put back: set options, then await it. Made by [`Client::redrive`].
///
/// They are moved in batches of up to 500, each by a statement of its own. Dropped while it is awaited,
/// some batches were moved and the others not; the same redrive again moves the rest.
#[must_use = "a redrive does nothing until it is awaited"]
pub struct Redrive<'a> {
    client: &'a Client,
    group: &'a str,
    filter: DeadLetterFilter,
    limit: Option<u64>,
    rate: Option<(u32, Duration)>,
    by: Option<String>,
    is_dry: bool,
    progress: Option<Progress<'a>>,
}

impl<'a> Redrive<'a> {
    /// At most so many, the oldest first. Default: all that are meant and were there when it began.
    pub fn limit(mut self, limit: u64) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Lets at most so many messages become due in each span of time, spread evenly over it:
    /// `.rate(100, Duration::from_secs(60))`. Default: all are due at once.
    ///
    /// The messages are all in the queue when the redrive has ended, each with the time at which it is
    /// due, so nobody has to stay connected. Two redrives add up.
    pub fn rate(mut self, messages: u32, per: Duration) -> Self {
        self.rate = Some((messages, per));
        self
    }

    /// Who does it, for the history of the messages; at most 100 characters. Default: the id of this
    /// client's node, or `client-…`.
    pub fn by(mut self, name: impl Into<String>) -> Self {
        self.by = Some(name.into());
        self
    }

    /// Only tells what would be done, and changes nothing.
    pub fn dry_run(mut self) -> Self {
        self.is_dry = true;
        self
    }

    /// Is told after each batch what has been done so far.
    pub fn on_progress(mut self, told: impl FnMut(&Redriven) + Send + 'a) -> Self {
        self.progress = Some(Box::new(told));
        self
    }

    /// The time between two messages.
    fn pace(&self) -> Result<Duration, OperateError> {
        let Some((messages, per)) = self.rate else {
            return Ok(Duration::ZERO);
        };
        match per.checked_div(messages) {
            Some(pace) if pace <= SLOWEST => Ok(pace),
            _ => Err(OperateError::Rate { messages, per }),
        }
    }
}

impl<'a> IntoFuture for Redrive<'a> {
    type Output = Result<Redriven, OperateError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let pace = self.pace()?;
            let by = signature(self.client, self.by.as_deref());
            let job = Job {
                client: self.client,
                group: self.group,
                filter: &self.filter,
                limit: self.limit,
                pace,
                by: &by,
                is_dry: self.is_dry,
                payload: None,
            };
            job.run(self.progress).await
        })
    }
}

impl fmt::Debug for Redrive<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redrive")
            .field("group", &self.group)
            .field("filter", &self.filter)
            .field("limit", &self.limit)
            .field("rate", &self.rate)
            .field("by", &self.by)
            .field("is_dry", &self.is_dry)
            .finish_non_exhaustive()
    }
}

/// Who redrives, as the history will have it. Postgres stores no U+0000.
pub(super) fn signature(client: &Client, by: Option<&str>) -> String {
    by.unwrap_or(client.producer()).replace('\0', "\u{fffd}")
}

/// A redrive with all that it needs.
pub(super) struct Job<'a> {
    pub(super) client: &'a Client,
    pub(super) group: &'a str,
    pub(super) filter: &'a DeadLetterFilter,
    pub(super) limit: Option<u64>,
    pub(super) pace: Duration,
    pub(super) by: &'a str,
    pub(super) is_dry: bool,
    pub(super) payload: Option<&'a str>,
}

const DOING: &str = "redrive dead letters";

impl Job<'_> {
    pub(super) async fn run(
        &self,
        mut progress: Option<Progress<'_>>,
    ) -> Result<Redriven, OperateError> {
        let queue = self.client.queue_of(self.group).await?;
        let acquired = store::answered_within(ANSWER, self.client.lend()).await;
        let mut connection = acquired.map_err(failed(DOING))?;
        let horizon = horizon(self.client, &mut connection, &queue)
            .await
            .map_err(failed(DOING))?;

        let mut redriven = Redriven::default();
        let filters = self.filter.pieces(BATCH.unsigned_abs() as usize);
        if !self.is_dry {
            for filter in &filters {
                loop {
                    let batch = self
                        .batch(&mut connection, filter, horizon, redriven.messages)
                        .await
                        .map_err(interrupted(DOING, redriven.messages))?;
                    if batch.is_empty() {
                        break;
                    }
                    connection
                        .commit()
                        .await
                        .map_err(interrupted(DOING, redriven.messages))?;
                    for outcome in batch {
                        redriven.add(outcome);
                    }
                    self.client.wake([queue.clone()]);
                    if let Some(progress) = &mut progress {
                        progress(&redriven);
                    }
                }
            }
            if redriven.messages > 0 {
                tracing::info!(
                    group = self.group,
                    messages = redriven.messages,
                    by = self.by,
                    "redrove dead letters"
                );
            }
        }
        let is_cut = |redriven: &Redriven| {
            let limit = self.limit;
            limit.is_some_and(|limit| redriven.messages >= limit)
        };
        // What would be done, or is left now; nobody has asked for the latter who has asked for a few.
        let is_told = self.is_dry || !is_cut(&redriven);
        for filter in filters.iter().filter(|_| is_told) {
            let done = redriven.messages;
            let most = self.limit.map(|limit| room(limit, done));
            let (namespace, group) = (self.client.namespace(), self.group);
            let plan = dead_letters::plan_redrive(&mut connection, namespace, group, filter, most);
            let plan = store::answered_within(ANSWER, plan).await;
            let outcomes = plan.map_err(interrupted(DOING, if self.is_dry { 0 } else { done }))?;
            let is_told =
                |outcome: &Outcome| self.is_dry || !matches!(&*outcome.what, "redrive" | "adopt");
            for outcome in outcomes.into_iter().filter(is_told) {
                redriven.add(outcome);
            }
        }
        let given_back = connection.give_back().await;
        given_back.map_err(interrupted(
            DOING,
            if self.is_dry { 0 } else { redriven.messages },
        ))?;
        redriven
            .handlers
            .sort_by_key(|handler| std::cmp::Reverse(handler.messages));
        if self.is_dry && redriven.messages > 0 {
            let gaps = u32::try_from(redriven.messages - 1).unwrap_or(u32::MAX);
            let last = jiff::SignedDuration::try_from(self.pace.saturating_mul(gaps));
            redriven.last_due_at = last
                .ok()
                .and_then(|last| timestamp(horizon.at_micros).checked_add(last).ok());
        }
        if let (Some(ids), false) = (self.filter.id_count(), is_cut(&redriven)) {
            let left: u64 = redriven.left.iter().map(|left| left.letters).sum();
            redriven.missing = ids.saturating_sub(redriven.messages + left);
        }
        Ok(redriven)
    }

    async fn batch(
        &self,
        connection: &mut Lent,
        filter: &str,
        horizon: Horizon,
        done: u64,
    ) -> sqlx::Result<Vec<Outcome>> {
        let room = self.limit.map_or(i64::MAX, |limit| room(limit, done));
        let limit = i32::try_from(room).unwrap_or(BATCH).min(BATCH);
        if limit == 0 {
            return Ok(Vec::new());
        }
        let manner = Manner {
            by: self.by,
            pace: self.pace,
            horizon,
            payload: self.payload,
        };
        let done = i64::try_from(done).unwrap_or(i64::MAX);
        let (namespace, group) = (self.client.namespace(), self.group);
        let mut again = Again::default();
        loop {
            let batch =
                dead_letters::redrive(connection, namespace, group, filter, manner, limit, done);
            match store::answered_within(ANSWER, batch).await {
                Ok(batch) => return Ok(batch),
                Err(error) => again.after(error, self.client, connection).await?,
            }
        }
    }
}

/// How many more may be moved.
fn room(limit: u64, done: u64) -> i64 {
    i64::try_from(limit.saturating_sub(done)).unwrap_or(i64::MAX)
}

impl Client {
    /// Puts dead letters of a group back into its queue: by id (`&[17, 18]`), or those that a
    /// [filter](DeadLetterFilter) means. Await it for what was done; set a [rate](Redrive::rate), a
    /// [limit](Redrive::limit) or a [dry run](Redrive::dry_run) before.
    ///
    /// A redriven message keeps its event id, its handler, its
    /// [delivery key](crate::EnvelopeMeta::delivery_key), its correlation and trace, and the history of
    /// its errors; all its attempts are before it. Each letter is put back by one statement, or not
    /// at all: two redrives at once double nothing, and one that is killed loses nothing. Letters that
    /// die again meanwhile are not taken up again.
    ///
    /// A message that lost its lease twice before runs alone, as it would have: it may be killing its
    /// process. A letter whose handler no longer subscribes stays, and is told as
    /// [`left`](Redriven::left).
    ///
    /// Awaiting it fails if the group does not exist, the rate is none, or the database could not be
    /// asked; [`OperateError::Interrupted`] says how far it got.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::{client::DeadLetterFilter, prelude::*};
    /// # use std::time::Duration;
    /// # async fn example(client: &Client) -> nexus::Result {
    /// let filter = DeadLetterFilter::new().fingerprint("d41d8cd98f00b204");
    /// let plan = client.redrive("billing", filter.clone()).dry_run().await?;
    /// println!("{} messages, {} of them without a live node", plan.messages, plan.waiting());
    ///
    /// let done = client
    ///     .redrive("billing", filter)
    ///     .rate(100, Duration::from_secs(1))
    ///     .by("ada")
    ///     .await?;
    /// println!("{} messages, the last one is due at {:?}", done.messages, done.last_due_at);
    /// # Ok(())
    /// # }
    /// ```
    pub fn redrive<'a>(
        &'a self,
        group: &'a str,
        which: impl Into<DeadLetterFilter>,
    ) -> Redrive<'a> {
        Redrive {
            client: self,
            group,
            filter: which.into(),
            limit: None,
            rate: None,
            by: None,
            is_dry: false,
            progress: None,
        }
    }
}
