use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{Point, Sleeper};
use crate::{
    handler::{self, Checkpoints, Error},
    runtime::{Leases, Route, attempt::Message, settle::Verdict},
    store::queue::Claimed,
};

/// Where a test can interfere: a [`Point`] of the runtime, or a checkpoint of your own code by name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A place of the runtime.
    Runtime(Point),
    /// `nexus::checkpoint("name")` in a handler.
    Checkpoint(String),
}

impl From<Point> for Place {
    fn from(point: Point) -> Self {
        Self::Runtime(point)
    }
}

impl From<&str> for Place {
    fn from(name: &str) -> Self {
        Self::Checkpoint(name.to_owned())
    }
}

/// How a call of a handler ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// It succeeded.
    Completed,
    /// It failed and is tried again.
    Retried {
        /// The error with its sources.
        error: String,
        /// How long it waits before that.
        after: Duration,
    },
    /// It put itself off, which counts as no attempt.
    Snoozed {
        /// For how long.
        after: Duration,
    },
    /// It failed and is given up.
    DeadLettered {
        /// In a few words why: see [`DeadLetter::reason`](crate::client::DeadLetter::reason).
        reason: String,
        /// The error with its sources.
        error: String,
    },
    /// A batch failed as a whole; its halves follow.
    Split {
        /// The error with its sources.
        error: String,
    },
    /// The database was to blame; it counts as no attempt.
    Disturbed {
        /// What happened.
        why: String,
    },
    /// The transaction met a deadlock or a serialization failure; the handler is called again at once,
    /// and it counts as no attempt.
    Conflicted {
        /// The error with its sources.
        error: String,
    },
    /// The node stops and has given the message back.
    GivenBack,
    /// Its result did not count: the lease was lost meanwhile.
    Lost,
}

/// One call of a handler for one message, as a node has made it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// The handler.
    pub handler: String,
    /// The event's id.
    pub event_id: i64,
    /// The event's type.
    pub event_type: String,
    /// Which attempt it was; counts from 1. The same number comes again after an end that does not
    /// count, such as a snooze or a crash.
    pub number: u32,
    /// How many messages the call was made for; 1 unless the handler takes a batch.
    pub messages: usize,
    /// How it ended; `None` while it runs, and for good if the node crashed.
    pub ended: Option<Ended>,
    /// How long it took, or has been running.
    pub took: Duration,
}

#[derive(Debug)]
struct Record {
    attempt: Attempt,
    message: (String, i64, i32),
    since: Instant,
}

/// What a test has armed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deed {
    Fail,
    Panic,
    Crash,
}

/// An armed deed.
#[derive(Debug)]
pub(crate) struct Trap {
    pub(crate) place: Place,
    pub(crate) deed: Deed,
    /// Only for this handler.
    pub(crate) handler: Option<String>,
    pub(crate) left: Mutex<u32>,
    pub(crate) hits: watch::Sender<u32>,
}

/// A claimed message: its queue, its id and the claim.
type Held = (String, i64, i32);

/// What a test knows of a node and does to it.
#[derive(Debug, Default)]
pub(crate) struct Points {
    leases: OnceLock<Leases>,
    /// What the node held when it ended, and nobody holds any more.
    left_behind: Mutex<Vec<Held>>,
    /// Cancelled when the node crashes.
    life: CancellationToken,
    is_without_loops: AtomicBool,
    is_migrated: AtomicBool,
    /// Attempts are kept only for a test that may ask for them.
    is_watched: AtomicBool,
    alarms: [Notify; 5],
    traps: Mutex<Vec<Arc<Trap>>>,
    checkpoints: Mutex<BTreeSet<String>>,
    records: Mutex<Vec<Record>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the runtime asks.
impl Points {
    /// Cancelled by a crash; whoever holds it may cancel it for reasons of their own.
    pub(crate) fn alive(&self) -> CancellationToken {
        self.life.child_token()
    }

    /// Whether the schema is known to be what this build needs, so that nobody has to look.
    pub(crate) fn is_migrated(&self) -> bool {
        self.is_migrated.load(Ordering::Relaxed)
    }

    /// Whether a test looks on, which is to see each message with its lease.
    pub(crate) fn is_watched(&self) -> bool {
        self.is_watched.load(Ordering::Relaxed)
    }

    pub(crate) fn has_loops(&self) -> bool {
        !self.is_without_loops.load(Ordering::Relaxed)
    }

    /// Works until the node crashes: then the work is dropped where it stands.
    pub(crate) async fn while_alive<F: Future>(self: Arc<Self>, work: F) -> Option<F::Output> {
        self.life.run_until_cancelled(work).await
    }

    /// Calls a handler, whose checkpoints are then reported here.
    pub(crate) async fn handling<F: Future>(self: Arc<Self>, route: &Route, call: F) -> F::Output {
        let here = Handling {
            points: self,
            handler: route.name(),
        };
        handler::CHECKPOINTS.scope(Arc::new(here), call).await
    }

    /// A place is reached by handlers that `is_of` tells. An error stands for a database that gives
    /// no answer.
    pub(crate) async fn reach(
        &self,
        point: Point,
        is_of: impl Fn(&str) -> bool,
    ) -> sqlx::Result<()> {
        self.reach_with(point, is_of, Vec::new).await
    }

    /// The node has claimed messages, and holds no leases of them yet.
    pub(crate) async fn claimed(
        &self,
        queue: &str,
        messages: &[Claimed],
        is_of: impl Fn(&str) -> bool,
    ) -> sqlx::Result<()> {
        let in_hand = || {
            let held = |message: &Claimed| (queue.to_owned(), message.msg_id, message.read_ct);
            messages.iter().map(held).collect()
        };
        self.reach_with(Point::Claimed, is_of, in_hand).await
    }

    async fn reach_with(
        &self,
        point: Point,
        is_of: impl Fn(&str) -> bool,
        in_hand: impl FnOnce() -> Vec<Held>,
    ) -> sqlx::Result<()> {
        match self.spring(&Place::Runtime(point), is_of) {
            None => Ok(()),
            Some(Deed::Crash) => match self.die(in_hand()).await {},
            Some(Deed::Panic) => panic!("panicked at `{point:?}`, as the test asked"),
            Some(Deed::Fail) => Err(sqlx::Error::Io(std::io::Error::new(
                std::io::ErrorKind::ConnectionReset,
                format!("the connection was lost at `{point:?}`, as the test asked"),
            ))),
        }
    }

    /// Sleeps until a moved clock is a reason to look again.
    pub(crate) async fn sleep(&self, sleeper: Sleeper, duration: Duration) {
        let alarm = self.alarms[sleeper as usize].notified();
        // Whether it was the alarm or the time does not matter.
        let _ = tokio::time::timeout(duration, alarm).await;
    }

    pub(crate) fn begin(&self, route: &Route, messages: &[Message]) {
        if !self.is_watched() {
            return;
        }
        let since = Instant::now();
        lock(&self.records).extend(messages.iter().map(|message| {
            let meta = &message.delivery.meta;
            Record {
                attempt: Attempt {
                    handler: route.name().to_owned(),
                    event_id: meta.event_id(),
                    event_type: meta.event_type().to_owned(),
                    number: meta.attempt(),
                    messages: messages.len(),
                    ended: None,
                    took: Duration::ZERO,
                },
                message: (
                    route.queue.clone(),
                    message.lease.msg_id,
                    message.lease.read_ct,
                ),
                since,
            }
        }));
    }

    pub(crate) fn decided(&self, message: &Message, verdict: &Verdict) {
        self.end(message, || ended(verdict));
    }

    pub(crate) fn committed(&self, message: &Message) {
        self.end(message, || Ended::Completed);
    }

    pub(crate) fn split(&self, message: &Message, error: &Error) {
        let error = error.to_string();
        self.end(message, || Ended::Split { error });
    }

    pub(crate) fn disturbed(&self, message: &Message, why: &str) {
        let why = why.to_owned();
        self.end(message, || Ended::Disturbed { why });
    }

    pub(crate) fn conflicted(&self, message: &Message, error: &Error) {
        let error = error.to_string();
        self.end(message, || Ended::Conflicted { error });
    }

    pub(crate) fn lost(&self, message: &Message) {
        self.end(message, || Ended::Lost);
    }

    fn end(&self, message: &Message, ended: impl FnOnce() -> Ended) {
        let lease = &message.lease;
        let mut records = lock(&self.records);
        // The newest call for this claim; it stands near the end.
        let record = records.iter_mut().rev().find(|record| {
            record.attempt.ended.is_none()
                && (record.message.1, record.message.2) == (lease.msg_id, lease.read_ct)
                && record.attempt.event_id == message.delivery.meta.event_id()
        });
        if let Some(record) = record {
            record.attempt.took = record.since.elapsed();
            record.attempt.ended = Some(ended());
        }
    }

    fn spring(&self, place: &Place, is_of: impl Fn(&str) -> bool) -> Option<Deed> {
        let traps = lock(&self.traps);
        let trap = traps.iter().find(|trap| {
            let is_meant = trap.place == *place && trap.handler.as_deref().is_none_or(&is_of);
            if !is_meant {
                return false;
            }
            let mut left = lock(&trap.left);
            let springs = *left > 0;
            *left = left.saturating_sub(1);
            springs
        })?;
        trap.hits.send_modify(|hits| *hits += 1);
        Some(trap.deed)
    }

    async fn die(&self, in_hand: Vec<Held>) -> Infallible {
        lock(&self.left_behind).extend(in_hand);
        self.crash();
        std::future::pending().await
    }
}

/// What the test kit asks and does.
impl Points {
    pub(crate) fn without_loops(&self) {
        self.is_without_loops.store(true, Ordering::Relaxed);
    }

    pub(crate) fn watch(&self) {
        self.is_watched.store(true, Ordering::Relaxed);
    }

    pub(crate) fn set_migrated(&self) {
        self.is_migrated.store(true, Ordering::Relaxed);
    }

    pub(crate) fn arm(&self, trap: Arc<Trap>) {
        lock(&self.traps).push(trap);
    }

    pub(crate) fn of_node(&self, leases: Leases) {
        // A node starts once.
        let _ = self.leases.set(leases);
    }

    pub(crate) fn crash(&self) {
        self.note_left_behind();
        self.life.cancel();
    }

    /// The node is about to end: its leases go with what holds them.
    pub(crate) fn note_left_behind(&self) {
        let queues = self.leases.get().map(Leases::of_queues).unwrap_or_default();
        let held = queues.into_iter().flat_map(|(queue, leases)| {
            let held = leases
                .into_iter()
                .map(|lease| (lease.msg_id, lease.read_ct));
            held.map(move |(msg_id, read_ct)| (queue.clone(), msg_id, read_ct))
                .collect::<Vec<_>>()
        });
        lock(&self.left_behind).extend(held);
    }

    /// What the node held when it ended: queue, id, claim.
    pub(crate) fn left_behind(&self) -> Vec<(String, i64, i32)> {
        lock(&self.left_behind).clone()
    }

    pub(crate) fn has_crashed(&self) -> bool {
        self.life.is_cancelled()
    }

    /// Makes every loop look again.
    pub(crate) fn alarm(&self) {
        for alarm in &self.alarms {
            alarm.notify_one();
        }
    }

    /// The checkpoints that handlers have passed so far.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        lock(&self.checkpoints).iter().cloned().collect()
    }

    /// The calls of handlers, in the order in which they began.
    pub(crate) fn attempts(&self) -> Vec<Attempt> {
        lock(&self.records).iter().map(Record::now).collect()
    }

    /// The call that runs for a claimed message.
    pub(crate) fn running(&self, queue: &str, msg_id: i64, read_ct: i32) -> Option<Attempt> {
        lock(&self.records)
            .iter()
            .rev()
            .find(|record| {
                record.attempt.ended.is_none()
                    && record.message.0 == queue
                    && (record.message.1, record.message.2) == (msg_id, read_ct)
            })
            .map(Record::now)
    }
}

impl Record {
    fn now(&self) -> Attempt {
        let mut attempt = self.attempt.clone();
        if attempt.ended.is_none() {
            attempt.took = self.since.elapsed();
        }
        attempt
    }
}

/// How an attempt ends by its verdict.
pub(crate) fn ended(verdict: &Verdict) -> Ended {
    match verdict {
        Verdict::Complete { .. } => Ended::Completed,
        Verdict::Release {
            delay,
            failure: Some(failed),
        } => Ended::Retried {
            error: failed
                .errors
                .last()
                .map_or_else(String::new, |error| error.error.clone()),
            after: *delay,
        },
        Verdict::Release { delay, .. } if delay.is_zero() => Ended::GivenBack,
        Verdict::Release { delay, .. } => Ended::Snoozed { after: *delay },
        Verdict::DeadLetter { reason, error, .. } => Ended::DeadLettered {
            reason: (*reason).to_owned(),
            error: error.clone(),
        },
    }
}

/// A handler at work, for its checkpoints.
struct Handling {
    points: Arc<Points>,
    handler: &'static str,
}

impl Checkpoints for Handling {
    fn reached<'a>(&'a self, name: &'a str) -> BoxFuture<'a, handler::Result> {
        Box::pin(async move {
            lock(&self.points.checkpoints).insert(name.to_owned());
            let place = Place::Checkpoint(name.to_owned());
            match self
                .points
                .spring(&place, |handler| handler == self.handler)
            {
                None => Ok(()),
                Some(Deed::Fail) => Err(Error::retryable(format!(
                    "failed at checkpoint `{name}`, as the test asked"
                ))),
                Some(Deed::Panic) => panic!("panicked at checkpoint `{name}`, as the test asked"),
                Some(Deed::Crash) => match self.points.die(Vec::new()).await {},
            }
        })
    }
}
