//! What is emitted while others are on their way to the database goes there together: one statement and one
//! commit for all that came meanwhile, as a server's group commit does it for transactions.

use std::{
    collections::VecDeque,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::{runtime::Handle, sync::oneshot};

use super::{Client, EmitError, connect::ACQUIRE_TIMEOUT};
use crate::{event::Outgoing, store};

/// Statements of a client that are under way before an emit waits for one of them to end.
const MOST_UNDER_WAY: usize = 2;

/// What goes together at most: that what waits behind it does not wait for long.
const MOST_EVENTS: usize = 500;
const MOST_BYTES: usize = 1024 * 1024;

impl Client {
    /// Stores an event, together with others if there are.
    pub(super) async fn store_one(&self, event: Outgoing) -> Result<i64, EmitError> {
        // These are more than a row, and may wait for what others do with the same key.
        if event.idempotency_key.is_some() || event.delay.is_some() {
            return Ok(self.store(&[event]).await?[0]);
        }
        let (number, mut answer) = {
            let mut state = self.coalescer().lock();
            let entered = state.enter(event);
            if state.under_way < MOST_UNDER_WAY {
                state.under_way += 1;
                let next = state.take();
                drop(state);
                let slot = Slot {
                    client: self.clone(),
                };
                // In a task of its own: others may wait for it, and who has asked for it may rest or be dropped.
                tokio::spawn(slot.send(next));
            }
            entered
        };
        // As long as for a connection, which is what those under way are at.
        let answered = tokio::time::timeout(ACQUIRE_TIMEOUT, &mut answer).await;
        let answered = match answered {
            Ok(answered) => answered,
            Err(_) if self.coalescer().lock().withdraw(number) => {
                return Err(EmitError::Connect(sqlx::Error::PoolTimedOut));
            }
            Err(_) => answer.await,
        };
        // The runtime that was to send it has ended.
        answered.unwrap_or_else(|_| Err(EmitError::Unknown(store::no_answer())))
    }
}

type Told = oneshot::Sender<Result<i64, EmitError>>;

#[derive(Default)]
pub(super) struct Coalescer {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    under_way: usize,
    waiting: VecDeque<Waiting>,
    numbers: u64,
}

struct Waiting {
    number: u64,
    event: Outgoing,
    told: Told,
}

impl Coalescer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn enter(&mut self, event: Outgoing) -> (u64, oneshot::Receiver<Result<i64, EmitError>>) {
        let (told, answer) = oneshot::channel();
        self.numbers += 1;
        self.waiting.push_back(Waiting {
            number: self.numbers,
            event,
            told,
        });
        (self.numbers, answer)
    }

    /// Whether the event still waited.
    fn withdraw(&mut self, number: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|waiting| waiting.number != number);
        self.waiting.len() < before
    }

    /// The first that wait, but for those that nobody waits for any more.
    fn take(&mut self) -> Vec<Waiting> {
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while taken.len() < MOST_EVENTS
            && let Some(next) = self.waiting.pop_front_if(|next| {
                bytes += next.event.payload.len();
                taken.is_empty() || bytes <= MOST_BYTES
            })
        {
            if !next.told.is_closed() {
                taken.push(next);
            }
        }
        taken
    }
}

/// The right to have a statement under way. What waits goes next when it ends, however that comes.
struct Slot {
    client: Client,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.client.coalescer().lock();
        // Without a runtime nothing can be sent; what waits goes with the next emit, or is told that it took too long.
        let runtime = Handle::try_current().ok();
        let next = runtime.map(|runtime| (runtime, state.take()));
        match next {
            Some((runtime, next)) if !next.is_empty() => {
                let slot = Self {
                    client: self.client.clone(),
                };
                drop(state);
                runtime.spawn(slot.send(next));
            }
            _ => state.under_way -= 1,
        }
    }
}

impl Slot {
    async fn send(self, waiting: Vec<Waiting>) {
        let (events, mut told): (Vec<Outgoing>, Vec<Told>) = waiting
            .into_iter()
            .map(|waiting| (waiting.event, waiting.told))
            .unzip();
        let error = match self.client.store(&events).await {
            Ok(ids) => {
                for (told, id) in told.into_iter().zip(ids) {
                    let _ = told.send(Ok(id));
                }
                return;
            }
            Err(error) => error,
        };
        if told.len() == 1 {
            let _ = told.remove(0).send(Err(error));
            return;
        }
        for (event, told) in events.into_iter().zip(told) {
            let stored = match for_all(&error) {
                Some(error) => Err(error),
                None if told.is_closed() => continue,
                // One of them is to blame, and must not be the others' misfortune.
                None => self.client.store(&[event]).await.map(|ids| ids[0]),
            };
            let _ = told.send(stored);
        }
    }
}

/// The error for each of several, if the database is to blame: each event alone would do no better, or may have been
/// stored.
fn for_all(error: &EmitError) -> Option<EmitError> {
    match error {
        EmitError::Connect(source) => Some(EmitError::Connect(copy(source))),
        EmitError::Commit(source) => Some(EmitError::Commit(copy(source))),
        EmitError::Unknown(source) => Some(EmitError::Unknown(copy(source))),
        EmitError::Append { source } if store::is_unanswered(source) => Some(EmitError::Append {
            source: copy(source),
        }),
        _ => None,
    }
}

fn copy(source: &sqlx::Error) -> sqlx::Error {
    match source {
        sqlx::Error::PoolTimedOut => sqlx::Error::PoolTimedOut,
        sqlx::Error::PoolClosed => sqlx::Error::PoolClosed,
        sqlx::Error::Io(error) => sqlx::Error::Io(io::Error::new(error.kind(), error.to_string())),
        other => sqlx::Error::Io(io::Error::other(other.to_string())),
    }
}
