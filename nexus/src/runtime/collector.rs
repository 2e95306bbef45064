//! Collects the figures of the namespace, on one of its nodes: the one of those alive that started first.
//!
//! No lock says so, which somebody could hold and not collect: each node looks at the heartbeats of all. A node tells its
//! figures only as long as the others take it for alive, so that with the node that follows it there is still one.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::Node;
use crate::{
    client::{Families, NamespaceMetrics},
    store::{self, nodes},
};

/// How often to look who is first.
const EVERY: Duration = Duration::from_secs(5);

/// How soon to collect again: at every third look; if it takes long, after so many times as long.
const AGAIN_AFTER: Duration = Duration::from_millis(12_500);
const REST: u32 = 10;

/// How long one round may take before its connection counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// What this node has to tell of the namespace. All clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    state: Arc<Mutex<State>>,
}

/// Nothing at all, unless this node is the one that collects.
#[derive(Debug, Default)]
struct State {
    collected_at: Option<Timestamp>,
    metrics: Option<NamespaceMetrics>,
    /// Until then the others take this node for alive.
    until: Option<Instant>,
}

impl Figures {
    /// What there is to be told now: while the database is away, only when it was asked last.
    pub(crate) fn families(&self) -> Option<Families> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_valid = state.until.is_some_and(|until| Instant::now() < until);
        Some(Families {
            collected_at: state.collected_at?,
            metrics: state.metrics.clone().filter(|_| is_valid),
        })
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

pub(crate) async fn run(node: Arc<Node>) {
    let mut next = Instant::now();
    while !node.stop.is_cancelled() {
        let round = Box::pin(round(&node, next));
        next = match store::answered_within(PATIENCE, round).await {
            Ok(next) => next,
            Err(error) => {
                node.figures.change(|state| state.metrics = None);
                if !node.mend(&error).await {
                    node.trouble
                        .met("collect the metrics of the namespace", &error);
                }
                Instant::now()
            }
        };
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = node.stop.cancelled() => {}
        }
    }
    node.figures.change(|state| *state = State::default());
}

/// Looks who is first, and collects if it is this node and time to. Returns when it is time next.
async fn round(node: &Node, next: Instant) -> sqlx::Result<Instant> {
    let begun = Instant::now();
    if !is_first(node).await? {
        node.figures.change(|state| *state = State::default());
        return Ok(begun);
    }
    if begun < next {
        return Ok(next);
    }
    let mut connection = node.connection().await?;
    let metrics = NamespaceMetrics::collect(&mut connection, &node.row.namespace).await?;
    connection.give_back().await?;
    let pause = AGAIN_AFTER.max(REST * metrics.took);
    node.figures.change(|state| {
        state.collected_at = Some(metrics.collected_at);
        state.metrics = Some(metrics);
    });
    // It may have taken a while.
    is_first(node).await?;
    Ok(begun + pause)
}

/// Whether this node is the one that collects. Notes for how long what it has collected may be told.
async fn is_first(node: &Node) -> sqlx::Result<bool> {
    let asked_at = Instant::now();
    let mut connection = node.connection().await?;
    let namespace = &node.row.namespace;
    let first_for = nodes::first_of_the_live_for(&mut connection, namespace, node.epoch).await?;
    connection.give_back().await?;
    node.figures
        .change(|state| state.until = first_for.map(|first_for| asked_at + first_for));
    Ok(first_for.is_some())
}
