//! The protocol of leases, fences, verdicts and dead letters, as a model whose every state is looked at.
//!
//! Two nodes, one queue with its dead letters, and two operators who redrive. A step is one statement of
//! the database, or one thing that a node does between two of them. Any step of anybody may come next, so
//! a node that pauses for however long, at whatever place, needs no step of its own: the others go on. What
//! goes wrong is bounded by a number (`Protocol::faults`) and otherwise free: a process is killed, a lease
//! ends although its holder lives, an answer is lost, the server gives a transaction up, a node stops.
//!
//! Each action names the function that it stands for. `Bug`s are what the check must find: the tests ask
//! for a counterexample to each.
//!
//! # What is checked
//!
//! In every state: a message is in exactly one of queue, dead letters and done; what a handler's transaction
//! did is there if and only if the message is done; a verdict of a lost lease changes nothing; attempts are
//! the failures that were stored, and never more than allowed; losses of the lease are counted, each once,
//! and up to the cap; a suspect runs alone in its process. And whenever nothing is left to do but what may
//! or may not happen (faults, operators), every message is done or a dead letter. Each step that is not one
//! of those raises `State::rank`, which is bounded: so that moment comes.

#[cfg(test)]
mod checks;
#[cfg(test)]
mod protocol;
