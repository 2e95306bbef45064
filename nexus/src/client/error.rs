use std::error::Error as StdError;

use crate::{event::EncodeError, store};

/// Why an event could not be emitted. Unless it is [`Unknown`](Self::Unknown), nothing was stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmitError {
    /// The event has no form that can be stored; emitting it again cannot succeed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// No connection could be had within 10 s; the source says whether the pool is exhausted or the
    /// server away. Emit again later.
    #[error("could not get a connection to emit")]
    Connect(#[source] sqlx::Error),
    /// The statement failed. In a transaction of yours, that transaction is aborted. A deadlock or a
    /// serialization failure has been tried again, unless it happened in a transaction of yours: run
    /// that again.
    #[error("could not append to the event log")]
    Append {
        /// What went wrong.
        source: sqlx::Error,
    },
    /// The commit was refused; the source says why.
    #[error("could not commit what was emitted")]
    Commit(#[source] sqlx::Error),
    /// The connection was lost while the event was stored, or the database gave no answer for 30 s.
    /// Whether it was stored is unknown. With an idempotency key it can be emitted again without
    /// being doubled.
    #[error(
        "it is unknown whether the event was stored, because the database gave no answer: emit it again with the same idempotency key"
    )]
    Unknown(#[source] sqlx::Error),
    /// The idempotency key was used before, for another type or payload. Use another key.
    #[error("idempotency key `{key}` was used for another event")]
    KeyUsedForAnotherEvent {
        /// The key.
        key: String,
    },
    /// No app has been started in the namespace, nor a client connected to it.
    #[error("namespace `{namespace}` is not known: start an app in it first")]
    UnknownNamespace {
        /// The namespace.
        namespace: String,
    },
    /// The table of a queue was dropped by hand. The next emit outside of your transaction, or the
    /// next start of an app, restores it.
    #[error(
        "the table of a queue is gone: emit outside of a transaction, or restart an app, to restore it"
    )]
    MissingQueue {
        /// What the server reported.
        source: sqlx::Error,
    },
    /// No partition of the log covers the time, because no app has been running for a year.
    #[error(
        "no partition of core.event_log covers the time: call core.ensure_partitions() or start an app"
    )]
    MissingPartition {
        /// What the server reported.
        source: sqlx::Error,
    },
    /// Subscriptions of the namespace change faster than this emit can follow. Emit again.
    #[error("the namespace's subscriptions keep changing")]
    PlanKeepsChanging,
}

/// Whether an error of the client says that the database is away or has no room, so that the same may succeed
/// later.
#[must_use]
pub fn is_unavailable(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<sqlx::Error>() {
            return store::is_away(error) || store::is_unanswered(error);
        }
        next = error.source();
    }
    false
}
