//! The places of the runtime where the test kit looks on and interferes.
//!
//! Without feature `testing` every call here is nothing, and costs nothing.

#[cfg_attr(feature = "testing", path = "on.rs")]
#[cfg_attr(not(feature = "testing"), path = "off.rs")]
mod switch;

pub(crate) use switch::Points;
#[cfg(feature = "testing")]
pub use switch::{Attempt, Ended, Place};
#[cfg(feature = "testing")]
pub(crate) use switch::{Deed, Trap, ended};

/// A place of the runtime at which a test can let a node [fail](crate::testing::TestApp::fail_at) or
/// [crash](crate::testing::TestApp::crash_at).
///
/// Between *before* and *after* of a pair lies the moment in which the database stores the verdict: a
/// node that dies before it has stored nothing, one that dies after it does not know that it has.
#[cfg(feature = "testing")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Point {
    /// Messages have been claimed; no handler has been called for them.
    Claimed,
    /// The handler has succeeded. With `&mut Tx`: completion and events are stored in its transaction,
    /// which is not committed. Without: the statement that completes has not been sent.
    BeforeCommit,
    /// Completion and events are committed; the node has not heard of it.
    AfterCommit,
    /// The attempt failed, was snoozed or is to be given back; the queue has not been told.
    BeforeRetry,
    /// The message is back in its queue; the node has not heard of it.
    AfterRetry,
    /// The message is to be given up; the queue has not been told.
    BeforeDeadLetter,
    /// The message is a dead letter; the node has not heard of it.
    AfterDeadLetter,
    /// Ticks are fired in a transaction that is not committed.
    BeforeTick,
    /// Ticks are committed; the node has not heard of it.
    AfterTick,
    /// Messages of a replay are put into the queue in a transaction that is not committed.
    BeforeReplay,
    /// Messages of a replay are committed; the node has not heard of it.
    AfterReplay,
}

/// As it is with feature `testing`, for the runtime to name.
#[cfg(not(feature = "testing"))]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Point {
    BeforeCommit,
    AfterCommit,
    BeforeRetry,
    AfterRetry,
    BeforeDeadLetter,
    AfterDeadLetter,
    BeforeTick,
    AfterTick,
    BeforeReplay,
    AfterReplay,
}

/// A loop that sleeps for reasons of the clock, and has to look again when a test has moved it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sleeper {
    Scheduler,
    Adopter,
    Renamer,
    Delayed,
    Replayer,
}
