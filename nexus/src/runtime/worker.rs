//! Claims the messages of one queue and starts attempts.
//!
//! One loop a queue and node. It asks for as many messages of each handler as the handler has room
//! for, so a slow handler never stands in the way of another, and it keeps a few in a buffer, so
//! that a fast handler does not wait for a round trip each time. Attempts go on while it asks.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use sqlx::{Connection, PgConnection};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, mpsc};

use super::{
    MOST_BYTES, Node, Route,
    attempt::{self, Message},
    backlog::{self, Backlog},
    settle::{ABANDONED, Failed, Settler, Verdict},
};
use crate::{
    client::{begin_if_pooled, commit_if_pooled},
    config::Pooler,
    event::Headers,
    handler::Delivery,
    metrics::{Counted, add},
    store::{
        self,
        queue::{self, Claimed, Claims, Want, Which},
    },
};

/// Shortest wait between two polls of an idle queue; it doubles up to the idle poll interval.
const SHORTEST_POLL: Duration = Duration::from_millis(25);

/// A claim walks past what has been claimed since the last vacuum, which is much while somebody holds a snapshot. So
/// it begins at the newest message of the last one, or if that has left nothing, this long before it: senders may
/// commit this much later than the due time they wrote. A sweep finds the others.
const LATE_SENDERS_MICROS: i64 = 100_000;

/// How often a claim begins at the oldest message, if that takes less than one in [`SWEEP_SHARE`] of the time.
const SWEEP_EVERY: Duration = Duration::from_millis(100);
const SWEEP_SHARE: u32 = 10;

/// How often it is asked whether a message has to run alone.
const LOOK_FOR_SUSPECTS_EVERY: Duration = Duration::from_secs(1);

/// How often a message may lose its lease without a verdict before it is dead-lettered.
const MOST_ABANDONMENTS: u32 = 10;

/// A handler that is faster than claims makes the database work on several at once.
const CLAIMS_AT_ONCE: usize = 2;

/// Messages of about this much work wait in the buffer. What waits here could run elsewhere.
const AHEAD: Duration = Duration::from_millis(250);

/// Longest time that a claim may take, whatever the lease.
const LONGEST_ANSWER: Duration = Duration::from_secs(30);

/// How long closing the connection may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// How fast a handler is, is measured over this time at least.
const MEASURE_OVER: Duration = Duration::from_millis(100);

/// A message that no slot has become free for within this time is given back.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// How long a message that may kill its process keeps all others out at most: a handler that runs
/// for an hour must not idle its node for so long.
const ALONE_AT_MOST: Duration = Duration::from_secs(30);

/// How long such a message waits for what runs to end, which keeps all others out as well. Then it runs
/// beside what still does.
const ALONE_WITHIN: Duration = Duration::from_secs(10);

/// A handler of this queue and the messages of it that this node holds.
struct Lane {
    route: Arc<Route>,
    buffer: VecDeque<Held>,
    running: usize,
    /// Those of them that work off the backlog.
    stints: usize,
    /// What these see.
    backlog: Arc<Backlog>,
    /// Since when a stint may begin.
    next_stint: backlog::Next,
    /// What claims that are out have asked for.
    coming: usize,
    /// How many messages may wait in the buffer: as many as the handler gets through in [`AHEAD`].
    prefetch: usize,
    measured_at: Instant,
    /// Messages started since.
    started: usize,
    /// Where a claim begins that is no sweep.
    not_before_micros: i64,
    /// Each lane is swept on its own: one that is busy has no room when another one's turn comes.
    next_sweep: Instant,
    /// The last claim brought all that was asked for.
    has_more: bool,
    /// Of the payloads that wait or run.
    bytes: Arc<AtomicUsize>,
}

/// A claimed message. The guard keeps messages that may kill the process from running beside it.
struct Held {
    message: Message,
    guard: Arc<OwnedRwLockReadGuard<()>>,
    since: Instant,
    weight: Counted,
}

impl Lane {
    fn new(node: &Node, route: Arc<Route>) -> Self {
        let bytes = Arc::default();
        Self {
            next_stint: backlog::begins_at(node, &route),
            route,
            buffer: VecDeque::new(),
            running: 0,
            stints: 0,
            backlog: Backlog::new(&bytes, 0),
            coming: 0,
            prefetch: 0,
            measured_at: Instant::now(),
            started: 0,
            not_before_micros: 0,
            next_sweep: Instant::now(),
            has_more: false,
            bytes,
        }
    }

    /// How many messages to ask for.
    fn room(&self, batch_size: usize) -> usize {
        if self.bytes.load(Ordering::Relaxed) >= MOST_BYTES {
            return 0;
        }
        let per_call = if self.route.descriptor.batch {
            batch_size
        } else {
            1
        };
        let running = self.running * per_call;
        // Nothing waits behind stints.
        let ahead = if self.stints > 0 { 0 } else { self.prefetch };
        let wanted = (self.route.concurrency * per_call).saturating_sub(running) + ahead;
        // A handler that is busy with all its slots asks again only when half its buffer is gone.
        let buffered = self.buffer.len() + self.coming;
        let missing = wanted.saturating_sub(buffered);
        if self.running >= self.route.concurrency && buffered > self.prefetch / 2 {
            0
        } else {
            missing.min(batch_size.max(self.route.concurrency))
        }
    }
}

/// Runs until the node stops; then gives back what was not started and waits for what runs.
pub(crate) async fn run(node: Arc<Node>, queue: String, routes: Vec<Arc<Route>>, settler: Settler) {
    let bell = node.client.bell().of(&queue);
    let stop = node.stop.clone();
    let (finished, mut ends) = mpsc::unbounded_channel::<Ended>();
    let mut worker = Worker::new(node, queue, routes, settler, finished);
    while !stop.is_cancelled() {
        worker.start_attempts();
        worker.start_stints();
        let claim_at = match worker.next_claim() {
            Some((rooms, at)) if Instant::now() >= at => {
                worker.send_claim(rooms);
                continue;
            }
            next => next.map(|(_, at)| at),
        };
        let has_buffered = worker.lanes.iter().any(|lane| !lane.buffer.is_empty());
        tokio::select! {
            Some(ended) = ends.recv() => {
                worker.ended(&ended);
                while let Ok(ended) = ends.try_recv() {
                    worker.ended(&ended);
                }
            }
            Some((claimer, answer)) = worker.out.next(), if !worker.out.is_empty() => worker.hear(claimer, answer),
            // Not listened to while a claim is out: it may ring for what the claim has just missed.
            () = bell.notified(), if worker.out.is_empty() => worker.ring(),
            () = tokio::time::sleep_until(claim_at.unwrap_or_else(Instant::now).into()), if claim_at.is_some() => {}
            () = tokio::time::sleep(LONGEST_WAIT), if has_buffered => {}
            guard = done(&mut worker.alone) => worker.send_for_suspect(guard),
            () = stop.cancelled() => {}
        }
    }
    // Every attempt holds a sender; the last one to end closes the channel.
    worker.stop().await;
    while ends.recv().await.is_some() {}
}

/// Waits for what may be under way.
async fn done<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

struct Worker {
    node: Arc<Node>,
    lanes: Vec<Lane>,
    intake: Intake,
    finished: mpsc::UnboundedSender<Ended>,
    /// [`CLAIMS_AT_ONCE`] of them, at home, or out on an errand: attempts start and end while the database is asked
    /// for more.
    at_home: Vec<Claimer>,
    out: FuturesUnordered<BoxFuture<'static, (Claimer, Answer)>>,
    poll: Duration,
    next_poll: Instant,
    /// The last claim found nothing and nobody has rung since: most likely the next one finds nothing either.
    is_quiet: bool,
    /// No claim before: after an error, and while a message runs alone.
    rest_until: Instant,
    looked_for_suspects_at: Option<Instant>,
    /// Completes when nothing else runs in this process, or has not ended in time. The buffers have to be
    /// emptied meanwhile, here and in the other workers, so nobody may wait for it without starting attempts.
    alone: Option<BoxFuture<'static, Option<OwnedRwLockWriteGuard<()>>>>,
    runs_alone: bool,
}

impl Worker {
    fn new(
        node: Arc<Node>,
        queue: String,
        routes: Vec<Arc<Route>>,
        settler: Settler,
        finished: mpsc::UnboundedSender<Ended>,
    ) -> Self {
        let at_home = (0..CLAIMS_AT_ONCE)
            .map(|_| Claimer::new(Arc::clone(&node), queue.clone()))
            .collect();
        let intake = Intake {
            node: Arc::clone(&node),
            queue,
            settler,
        };
        Self {
            lanes: routes
                .into_iter()
                .map(|route| Lane::new(&node, route))
                .collect(),
            node,
            intake,
            finished,
            at_home,
            out: FuturesUnordered::new(),
            poll: SHORTEST_POLL,
            next_poll: Instant::now(),
            is_quiet: false,
            rest_until: Instant::now(),
            looked_for_suspects_at: None,
            alone: None,
            runs_alone: false,
        }
    }

    /// How many messages each lane has room for, and when to ask for them; `None` while there is no room, or
    /// nobody to send.
    fn next_claim(&mut self) -> Option<(Vec<usize>, Instant)> {
        let batch_size = self.node.settings.batch_size;
        for lane in &mut self.lanes {
            lane.adapt(batch_size);
            lane.give_back_stale(&self.intake.settler);
        }
        if self.at_home.is_empty() || self.alone.is_some() {
            return None;
        }
        let rooms: Vec<usize> = self
            .lanes
            .iter()
            .map(|lane| lane.room(batch_size))
            .collect();
        if rooms.iter().all(|&room| room == 0) {
            return None;
        }
        // A lane that has made room and probably has more waiting does not wait for the poll.
        let is_hungry = self
            .lanes
            .iter()
            .zip(&rooms)
            .any(|(lane, &room)| room > 0 && lane.has_more);
        let at = if is_hungry {
            self.rest_until
        } else if self.out.is_empty() {
            self.next_poll.max(self.rest_until)
        } else {
            return None;
        };
        Some((rooms, at))
    }

    fn send_claim(&mut self, rooms: Vec<usize>) {
        let Ok(beside) = Arc::clone(&self.node.isolation).try_read_owned() else {
            // A message runs alone or is about to.
            self.rest_until = Instant::now() + SHORTEST_POLL;
            return;
        };
        for (lane, room) in self.lanes.iter_mut().zip(&rooms) {
            lane.coming += room;
        }
        let errand = Errand::claim(&mut self.lanes, rooms, beside, self.is_quiet);
        self.send(errand);
    }

    fn send(&mut self, errand: Errand) {
        if let Some(claimer) = self.at_home.pop() {
            self.out.push(claimer.go(errand));
        }
    }

    fn send_for_suspect(&mut self, alone: Option<OwnedRwLockWriteGuard<()>>) {
        self.alone = None;
        // If the claimers are all out, it is looked for again.
        self.send(Errand::ClaimSuspect(alone, wants_of_all(&self.lanes)));
    }

    fn hear(&mut self, claimer: Claimer, answer: Answer) {
        self.at_home.push(claimer);
        match answer {
            Answer::Claimed(claim, claims) => {
                self.poll = if claims.messages.is_empty() {
                    (self.poll * 2).min(self.node.settings.idle_poll)
                } else {
                    SHORTEST_POLL
                };
                self.next_poll = Instant::now() + self.poll;
                self.is_quiet = claims.messages.is_empty();
                let looked_at = self.looked_for_suspects_at;
                if looked_at.is_none_or(|at| at.elapsed() >= LOOK_FOR_SUSPECTS_EVERY) {
                    self.looked_for_suspects_at = Some(Instant::now());
                    self.send(Errand::LookForSuspects(wants_of_all(&self.lanes)));
                }
                self.intake.fill(&mut self.lanes, claim, claims);
                if self.is_quiet && self.out.is_empty() {
                    self.let_go();
                }
            }
            Answer::ClaimedSuspect {
                alone,
                sent_at,
                claims,
            } => self.start_suspect(alone, sent_at, claims),
            Answer::HasSuspect(true) => {
                let guard = Arc::clone(&self.node.isolation).write_owned();
                self.alone = Some(Box::pin(async move {
                    tokio::time::timeout(ALONE_WITHIN, guard).await.ok()
                }));
            }
            Answer::HasSuspect(false) => {}
            Answer::Failed(rooms) => {
                for (lane, room) in self.lanes.iter_mut().zip(rooms) {
                    lane.coming -= room;
                }
                self.rest_until = Instant::now() + self.node.settings.idle_poll;
            }
        }
    }

    /// Closes the connections that only a backlog needs.
    fn let_go(&mut self) {
        for claimer in &mut self.at_home[..CLAIMS_AT_ONCE - 1] {
            if let Some(connection) = claimer.connection.take() {
                tokio::spawn(farewell(connection));
            }
        }
    }

    fn ring(&mut self) {
        self.is_quiet = false;
        self.poll = SHORTEST_POLL;
        self.next_poll = Instant::now();
    }

    fn ended(&mut self, ended: &Ended) {
        let lane = &mut self.lanes[ended.lane];
        lane.running -= 1;
        if let Some(next) = ended.stint {
            lane.stints -= 1;
            lane.next_stint = match (lane.next_stint, next) {
                (Some(one), Some(other)) => Some(one.max(other)),
                _ => None,
            };
            // What it has left alone or rolled back is anywhere.
            lane.next_sweep = Instant::now();
            self.next_poll = Instant::now();
        }
        // Nodes that died one after the other leave many of them behind: one a second would take long.
        if std::mem::take(&mut self.runs_alone) {
            self.looked_for_suspects_at = None;
            self.next_poll = Instant::now();
        }
    }

    /// Starts as many attempts as the handlers have free slots for.
    fn start_attempts(&mut self) {
        let node = &self.node;
        let shortest_lease = node.settings.lease / 3;
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let size = if lane.route.descriptor.batch {
                node.settings.batch_size
            } else {
                1
            };
            while lane.running < lane.route.concurrency && !lane.buffer.is_empty() {
                let count = size.min(lane.buffer.len());
                let mut messages = Vec::with_capacity(count);
                let mut guards = Vec::with_capacity(count);
                for held in lane.buffer.drain(..count) {
                    let lease = &held.message.lease;
                    if lease.lost.is_cancelled() {
                        node.leases.end(&lane.route.queue, lease);
                    } else if lease.remaining() < shortest_lease {
                        // It was not extended in time. Started now, it could be claimed elsewhere.
                        give_back(&self.intake.settler, &lane.route, &held.message);
                    } else {
                        messages.push(held.message);
                        guards.push((held.guard, held.weight));
                    }
                }
                if messages.is_empty() {
                    continue;
                }
                lane.running += 1;
                lane.started += messages.len();
                let (node, route) = (Arc::clone(node), Arc::clone(&lane.route));
                let (settler, finished) = (self.intake.settler.clone(), self.finished.clone());
                let points = Arc::clone(&node.points);
                let slot = Slot {
                    finished,
                    ended: Ended {
                        lane: index,
                        stint: None,
                    },
                };
                tokio::spawn(points.while_alive(async move {
                    attempt::run(&node, &route, &settler, messages).await;
                    drop(guards);
                    drop(slot);
                }));
            }
        }
    }

    /// Lets those free slots work off the backlog whose handlers can do that.
    fn start_stints(&mut self) {
        for (index, lane) in self.lanes.iter_mut().enumerate() {
            let may_begin = lane.next_stint.is_some_and(|at| at <= Instant::now());
            if !may_begin || !lane.has_more || !lane.buffer.is_empty() {
                continue;
            }
            while lane.running < lane.route.concurrency {
                // The next claim tells whether there is more.
                lane.has_more = false;
                if lane.stints == 0 {
                    lane.backlog = Backlog::new(&lane.bytes, lane.not_before_micros);
                }
                lane.running += 1;
                lane.stints += 1;
                let (node, route) = (Arc::clone(&self.node), Arc::clone(&lane.route));
                let backlog = Arc::clone(&lane.backlog);
                // What it says if it panics.
                let ended = Ended {
                    lane: index,
                    stint: Some(Some(Instant::now() + backlog::REST)),
                };
                let finished = self.finished.clone();
                let slot = Slot { finished, ended };
                tokio::spawn(async move {
                    let next = backlog.work_off(&node, &route).await;
                    slot.leave(next);
                });
            }
        }
    }

    /// Starts the message that was claimed because it has lost its lease before, if there was one; `alone`
    /// says that nothing else runs, and keeps it so.
    fn start_suspect(
        &mut self,
        mut alone: Option<OwnedRwLockWriteGuard<()>>,
        sent_at: Instant,
        claims: Claims,
    ) {
        self.runs_alone = false;
        for claimed in claims.messages {
            let Some((index, (message, _))) = self.intake.take_in(&self.lanes, claimed, sent_at)
            else {
                continue;
            };
            let lane = &mut self.lanes[index];
            tracing::warn!(
                handler = lane.route.name(),
                msg_id = message.lease.msg_id,
                abandoned = message.delivery.meta.headers.abandoned,
                alone = alone.is_some(),
                "running a message alone, or beside what did not end in time, because it lost its lease repeatedly"
            );
            lane.running += 1;
            self.runs_alone = true;
            let (node, route) = (Arc::clone(&self.node), Arc::clone(&lane.route));
            let (settler, finished) = (self.intake.settler.clone(), self.finished.clone());
            let mut alone = alone.take();
            let slot = Slot {
                finished,
                ended: Ended {
                    lane: index,
                    stint: None,
                },
            };
            let points = Arc::clone(&node.points);
            tokio::spawn(points.while_alive(async move {
                let attempt = attempt::run(&node, &route, &settler, vec![message]);
                tokio::pin!(attempt);
                if tokio::time::timeout(ALONE_AT_MOST, &mut attempt)
                    .await
                    .is_err()
                {
                    alone = None;
                    attempt.await;
                }
                // Others run before the next one does.
                drop(alone);
                drop(slot);
            }));
        }
    }

    /// Gives back what was not started: what the server has given to us would wait until its lease ends.
    async fn stop(mut self) {
        while let Some((claimer, answer)) = self.out.next().await {
            match answer {
                Answer::Claimed(claim, claims) => {
                    self.intake.fill(&mut self.lanes, claim, claims);
                }
                Answer::ClaimedSuspect {
                    sent_at, claims, ..
                } => {
                    for claimed in claims.messages {
                        let taken = self.intake.take_in(&self.lanes, claimed, sent_at);
                        if let Some((index, (message, _))) = taken {
                            give_back(&self.intake.settler, &self.lanes[index].route, &message);
                        }
                    }
                }
                Answer::HasSuspect(_) | Answer::Failed(_) => {}
            }
            self.at_home.push(claimer);
        }
        for lane in &mut self.lanes {
            for held in lane.buffer.drain(..) {
                give_back(&self.intake.settler, &lane.route, &held.message);
            }
        }
        for claimer in self.at_home {
            if let Some(connection) = claimer.connection {
                farewell(connection).await;
            }
        }
    }
}

/// A handler's slot, which is free again when this is dropped, whatever happens to the attempt.
struct Slot {
    finished: mpsc::UnboundedSender<Ended>,
    ended: Ended,
}

impl Slot {
    /// Ends a stint.
    fn leave(mut self, next: backlog::Next) {
        self.ended.stint = Some(next);
    }
}

/// Who has left a slot of a lane.
#[derive(Debug, Clone, Copy)]
struct Ended {
    lane: usize,
    /// It has worked off the backlog; when that may go on.
    stint: Option<backlog::Next>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The worker is gone only if it panicked, or the whole runtime is.
        let _ = self.finished.send(self.ended);
    }
}

fn give_back(settler: &Settler, route: &Arc<Route>, message: &Message) {
    let verdict = Verdict::Release {
        delay: Duration::ZERO,
        failure: None,
    };
    settler.settle(Arc::clone(&message.lease), Arc::clone(route), verdict);
}

/// What the worker wants to know from the database.
enum Errand {
    Claim(Claim, Vec<Want>),
    /// Whether a message waits that has to run alone.
    LookForSuspects(Vec<Want>),
    /// One such message. The guard says that nothing else runs, and keeps it so.
    ClaimSuspect(Option<OwnedRwLockWriteGuard<()>>, Vec<Want>),
}

/// An ordinary claim, as it was when it was sent.
struct Claim {
    rooms: Vec<usize>,
    /// Where it begins in each lane.
    begins: Vec<Begin>,
    /// Keeps messages that have to run alone waiting.
    beside: Arc<OwnedRwLockReadGuard<()>>,
    sent_at: Instant,
    /// It is asked first whether anything is there at all.
    is_quiet: bool,
}

/// Where a claim begins among the due messages of a lane.
#[derive(Clone, Copy)]
enum Begin {
    /// At the oldest one: a sweep.
    Oldest,
    /// At this due time.
    Micros(i64),
}

enum Answer {
    Claimed(Claim, Claims),
    HasSuspect(bool),
    ClaimedSuspect {
        alone: Option<OwnedRwLockWriteGuard<()>>,
        sent_at: Instant,
        claims: Claims,
    },
    /// An error, which was reported; with what was asked for.
    Failed(Vec<usize>),
}

impl Errand {
    fn claim(
        lanes: &mut [Lane],
        rooms: Vec<usize>,
        beside: OwnedRwLockReadGuard<()>,
        is_quiet: bool,
    ) -> Self {
        let sent_at = Instant::now();
        let begins: Vec<Begin> = lanes
            .iter_mut()
            .zip(&rooms)
            .map(|(lane, &room)| {
                if room > 0 && lane.next_sweep <= sent_at {
                    lane.next_sweep = sent_at + SWEEP_EVERY;
                    Begin::Oldest
                } else {
                    Begin::Micros(lane.not_before_micros)
                }
            })
            .collect();
        let wants = lanes
            .iter()
            .zip(rooms.iter().zip(&begins))
            .filter(|&(_, (&room, _))| room > 0)
            .map(|(lane, (&room, &begin))| lane.want(room, begin))
            .collect();
        let claim = Claim {
            rooms,
            begins,
            beside: Arc::new(beside),
            sent_at,
            is_quiet,
        };
        Self::Claim(claim, wants)
    }
}

fn wants_of_all(lanes: &[Lane]) -> Vec<Want> {
    lanes
        .iter()
        .map(|lane| lane.want(1, Begin::Oldest))
        .collect()
}

/// Reads what was claimed.
struct Intake {
    node: Arc<Node>,
    queue: String,
    settler: Settler,
}

impl Intake {
    /// Puts what was claimed into the lanes' buffers.
    fn fill(&self, lanes: &mut [Lane], claim: Claim, claims: Claims) {
        let Claim {
            rooms,
            begins,
            beside,
            sent_at,
            ..
        } = claim;
        if claims.at_micros > 0 {
            let ahead = claims.at_micros - Timestamp::now().as_microsecond();
            self.node.clock_ahead.store(ahead, Ordering::Relaxed);
        }
        let mut counts = vec![0_usize; lanes.len()];
        let mut newest = vec![i64::MIN; lanes.len()];
        for claimed in claims.messages {
            let Some((index, message)) = self.take_in(lanes, claimed, sent_at) else {
                continue;
            };
            counts[index] += 1;
            newest[index] = newest[index].max(message.1);
            let weight = Counted::new(&lanes[index].bytes, message.0.delivery.payload.len());
            lanes[index].buffer.push_back(Held {
                message: message.0,
                guard: Arc::clone(&beside),
                since: sent_at,
                weight,
            });
        }
        for (index, lane) in lanes
            .iter_mut()
            .enumerate()
            .filter(|(index, _)| rooms[*index] > 0)
        {
            lane.coming -= rooms[index];
            lane.has_more = claims.is_cut || counts[index] >= rooms[index];
            // Everything older than the newest claimed is claimed, or everything that was due. A claim that brings
            // nothing does not tell the time.
            let next = if lane.has_more {
                newest[index]
            } else {
                claims.at_micros - LATE_SENDERS_MICROS
            };
            let next = (claims.at_micros > 0).then_some(next);
            lane.looked(begins[index], next, sent_at);
        }
    }

    /// Turns a claimed row into a message, or into the verdict on a row that is none.
    fn take_in(
        &self,
        lanes: &[Lane],
        claimed: Claimed,
        sent_at: Instant,
    ) -> Option<(usize, (Message, i64))> {
        let leases = &self.node.leases;
        let deadline = sent_at + self.node.settings.lease;
        let lease = leases.hold(&self.queue, claimed.msg_id, claimed.read_ct, deadline);
        let headers = serde_json::from_str::<Headers>(&claimed.headers);
        let handler = headers.as_ref().map_or_else(
            |_| Headers::handler_in(&claimed.headers),
            |headers| Some(headers.handler.clone()),
        );
        let version = headers.as_ref().map(|headers| headers.event_version).ok();
        let lane = lanes.iter().position(|lane| {
            Some(lane.route.name()) == handler.as_deref()
                && version.is_none_or(|version| lane.route.event_version == version)
        });
        let Some(index) = lane else {
            tracing::error!(
                queue = self.queue,
                msg_id = claimed.msg_id,
                "claimed a message of no handler of this node, its lease will end"
            );
            leases.end(&self.queue, &lease);
            return None;
        };
        let route = &lanes[index].route;
        add(&route.counts.claimed, 1);
        let refuse = |reason: &'static str, error: String, attempts: u32, errors| {
            let failed = Failed { attempts, errors };
            self.settler.settle(
                Arc::clone(&lease),
                Arc::clone(route),
                Verdict::DeadLetter {
                    reason,
                    error,
                    failed,
                },
            );
            None
        };
        let headers = match headers {
            Ok(headers) => headers,
            Err(error) => {
                return refuse(
                    "Malformed message",
                    format!("the headers cannot be read: {error}"),
                    0,
                    Vec::new(),
                );
            }
        };
        let (attempts, errors) = (headers.attempts, headers.errors.clone());
        if headers.abandoned >= MOST_ABANDONMENTS {
            let error = format!(
                "the lease ended {} times without a verdict: the handler may be killing its process, or running longer than its lease can be extended",
                headers.abandoned
            );
            return refuse(ABANDONED, error, attempts, errors);
        }
        let Some(body) = claimed.body else {
            let error = format!(
                "the message is larger than {} bytes",
                self.node.settings.max_body_bytes
            );
            return refuse("Too large", error, attempts, errors);
        };
        let (msg_id, read_ct) = (claimed.msg_id, claimed.read_ct);
        let delivery = match Delivery::read(headers, &body, &route.group, msg_id, read_ct) {
            Ok(delivery) => delivery,
            Err(error) => {
                return refuse(
                    "Malformed message",
                    format!("the body is no envelope: {error}"),
                    attempts,
                    errors,
                );
            }
        };
        let event_type = delivery.meta.event_type();
        if !route.takes(event_type) {
            let error = format!(
                "the message is a `{event_type}`, the handler takes `{}`",
                route.event_type
            );
            return refuse("Undecodable payload", error, attempts, errors);
        }
        Some((
            index,
            (Message { delivery, lease }, claimed.enqueued_at_micros),
        ))
    }
}

/// A connection of the worker for claims: one of its own, so that handlers which hold every connection
/// of the pool do not stop it.
struct Claimer {
    node: Arc<Node>,
    queue: String,
    connection: Option<PgConnection>,
}

impl Claimer {
    fn new(node: Arc<Node>, queue: String) -> Self {
        Self {
            node,
            queue,
            connection: None,
        }
    }

    /// Runs the errand, which is not to be cancelled: what the server gives to us is ours to give back.
    fn go(mut self, errand: Errand) -> BoxFuture<'static, (Self, Answer)> {
        Box::pin(async move {
            let answer = match errand {
                Errand::Claim(claim, wants) => {
                    match self.claim(&wants, Which::Ordinary, claim.is_quiet).await {
                        Some(claims) => Answer::Claimed(claim, claims),
                        None => Answer::Failed(claim.rooms),
                    }
                }
                Errand::LookForSuspects(wants) => {
                    Answer::HasSuspect(self.has_suspect(&wants).await)
                }
                Errand::ClaimSuspect(alone, wants) => {
                    let sent_at = Instant::now();
                    match self.claim(&wants, Which::Suspect, false).await {
                        Some(claims) => Answer::ClaimedSuspect {
                            alone,
                            sent_at,
                            claims,
                        },
                        None => Answer::Failed(Vec::new()),
                    }
                }
            };
            (self, answer)
        })
    }

    /// Whether a message waits that has to run alone.
    async fn has_suspect(&mut self, wants: &[Want]) -> bool {
        let (queue, patience, pooler) = (self.queue.clone(), self.patience(), self.pooler());
        let Some(connection) = self.connect().await else {
            return false;
        };
        let found = async {
            begin_if_pooled(connection, pooler, queue::TO_CLAIM).await?;
            let found = queue::has_suspect(connection, &queue, wants).await?;
            commit_if_pooled(connection, pooler).await?;
            Ok(found)
        };
        match store::answered_within(patience, found).await {
            Ok(found) => found,
            Err(error) => {
                self.failed(&error).await;
                false
            }
        }
    }

    async fn claim(&mut self, wants: &[Want], which: Which, is_quiet: bool) -> Option<Claims> {
        let (queue, patience, pooler) = (self.queue.clone(), self.patience(), self.pooler());
        let (lease, most) = (self.node.settings.lease, self.node.settings.max_body_bytes);
        let mut conflicts = 0;
        let claims = loop {
            let connection = self.connect().await?;
            let claimed = async {
                begin_if_pooled(connection, pooler, queue::TO_CLAIM).await?;
                let claims = if is_quiet && !queue::has_due(connection, &queue, wants).await? {
                    Claims::default()
                } else {
                    queue::claim(connection, &queue, wants, which, lease, most).await?
                };
                commit_if_pooled(connection, pooler).await?;
                Ok(claims)
            };
            match store::answered_within(patience, claimed).await {
                Ok(claims) => break claims,
                Err(error) if store::is_conflict(&error) && conflicts < store::MOST_CONFLICTS => {
                    conflicts += 1;
                    if pooler == Pooler::Transaction {
                        self.connection = None;
                    }
                    store::pause_after_conflict(conflicts).await;
                }
                Err(error) => {
                    self.failed(&error).await;
                    return None;
                }
            }
        };
        self.node.trouble.is_over();
        let is_of = |handler: &str| {
            let mut claimed = claims.messages.iter();
            claimed.any(|message| Headers::handler_in(&message.headers).as_deref() == Some(handler))
        };
        if !claims.messages.is_empty()
            && let Err(error) = self
                .node
                .points
                .claimed(&self.queue, &claims.messages, is_of)
                .await
        {
            self.failed(&error).await;
            return None;
        }
        Some(claims)
    }

    /// How long the database may take to answer. After half a lease what it has claimed could not be
    /// started any more, and the connection is most likely gone.
    fn patience(&self) -> Duration {
        (self.node.settings.lease / 2).min(LONGEST_ANSWER)
    }

    fn pooler(&self) -> Pooler {
        self.node.client.pooler()
    }

    async fn connect(&mut self) -> Option<&mut PgConnection> {
        if self.connection.is_none() {
            let pooler = self.pooler();
            let connected = async {
                let mut connection = PgConnection::connect_with(&self.node.options).await?;
                if pooler == Pooler::Session {
                    queue::prepare_to_claim(&mut connection).await?;
                }
                Ok::<_, sqlx::Error>(connection)
            };
            match store::answered_within(self.patience(), connected).await {
                Ok(connection) => self.connection = Some(connection),
                Err(error) => {
                    self.failed(&error).await;
                    return None;
                }
            }
        }
        self.connection.as_mut()
    }

    async fn failed(&mut self, error: &sqlx::Error) {
        if !self.node.mend(error).await {
            self.node.trouble.met("claim messages", error);
        }
        self.connection = None;
    }
}

async fn farewell(connection: PgConnection) {
    // The session ends either way; closing it properly only spares the server a log line.
    let _ = tokio::time::timeout(FAREWELL, connection.close()).await;
}

impl Lane {
    fn want(&self, room: usize, begin: Begin) -> Want {
        Want {
            handler: self.route.name().to_owned(),
            event_version: self.route.event_version,
            slots: room.try_into().unwrap_or(i32::MAX),
            not_before_micros: match begin {
                Begin::Oldest => 0,
                Begin::Micros(micros) => micros,
            },
        }
    }

    /// Notes where the next claims begin, after one that was sent then.
    fn looked(&mut self, begin: Begin, next: Option<i64>, sent_at: Instant) {
        if matches!(begin, Begin::Oldest) {
            let now = Instant::now();
            let pause = SWEEP_EVERY.max((now - sent_at) * SWEEP_SHARE);
            self.next_sweep = self.next_sweep.max(now + pause);
        }
        let Some(next) = next.map(|next| next.max(0)) else {
            return;
        };
        self.not_before_micros = match begin {
            Begin::Oldest => next,
            Begin::Micros(sent) if sent <= self.not_before_micros => {
                self.not_before_micros.max(next)
            }
            // A sweep has found older ones meanwhile, and they come first.
            Begin::Micros(_) => self.not_before_micros,
        };
    }

    /// Fits the buffer to how fast the handler is, so that a slow one keeps no messages that another
    /// node could handle.
    fn adapt(&mut self, batch_size: usize) {
        let over = self.measured_at.elapsed();
        if over < MEASURE_OVER {
            return;
        }
        let ahead = self.started as u128 * AHEAD.as_micros() / over.as_micros();
        // Claims follow each other, and there is something to work on meanwhile.
        let most = 2 * CLAIMS_AT_ONCE * batch_size.max(self.route.concurrency);
        self.prefetch = usize::try_from(ahead).unwrap_or(most).min(most);
        self.started = 0;
        self.measured_at = Instant::now();
    }

    /// Gives back what waits for too long, because the handler has become slow.
    fn give_back_stale(&mut self, settler: &Settler) {
        let is_stale = |held: &Held| held.since.elapsed() >= LONGEST_WAIT;
        if self.running < self.route.concurrency || !self.buffer.front().is_some_and(is_stale) {
            return;
        }
        for held in self.buffer.drain(..) {
            give_back(settler, &self.route, &held.message);
        }
    }
}
