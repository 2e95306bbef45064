//! What is counted and timed where it happens, for whoever asks. `app/metrics.rs` writes it out.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::histogram::Histogram;

use crate::event::Outgoing;

/// Upper bounds in seconds: from what a fast handler takes to what a slow one may.
const SECONDS: [f64; 16] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// Event types that are counted by name; all others are one. They come from other programs as well.
const MOST_TYPES: usize = 500;

/// How long something took, again and again.
#[derive(Debug, Clone)]
pub(crate) struct Times(pub(crate) Histogram);

impl Default for Times {
    fn default() -> Self {
        Self(Histogram::new(SECONDS))
    }
}

impl Times {
    pub(crate) fn took(&self, time: Duration) {
        self.0.observe(time.as_secs_f64());
    }
}

/// What became of a handler's messages since the node started.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) claimed: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) snoozed: AtomicU64,
    pub(crate) dead_lettered: AtomicU64,
    pub(crate) abandoned: AtomicU64,
    pub(crate) lost: AtomicU64,
    /// Messages in attempts at the moment.
    pub(crate) running: Arc<AtomicUsize>,
    /// From the first statement of a handler to its end.
    pub(crate) attempt: Times,
    /// From the emit to the first attempt.
    pub(crate) wait: Times,
}

pub(crate) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

/// Something that is counted until this is dropped: messages that run, the bytes of a payload among those of its handler.
pub(crate) struct Counted {
    counter: Arc<AtomicUsize>,
    count: usize,
}

impl Counted {
    pub(crate) fn new(counter: &Arc<AtomicUsize>, count: usize) -> Self {
        counter.fetch_add(count, Ordering::Relaxed);
        Self {
            counter: Arc::clone(counter),
            count,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counter.fetch_sub(self.count, Ordering::Relaxed);
    }
}

/// Events that a client has stored, by type.
#[derive(Debug, Default)]
pub(crate) struct Emitted {
    by_type: RwLock<HashMap<String, AtomicU64>>,
    others: AtomicU64,
}

impl Emitted {
    fn add(&self, event_type: &str, count: usize) {
        let known = self.by_type.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(counter) = known.get(event_type) {
            add(counter, count);
            return;
        }
        let is_full = known.len() >= MOST_TYPES;
        drop(known);
        if is_full {
            add(&self.others, count);
            return;
        }
        let mut known = self.by_type.write().unwrap_or_else(PoisonError::into_inner);
        add(known.entry(event_type.to_owned()).or_default(), count);
    }

    pub(crate) fn add_all(&self, events: &[Outgoing]) {
        for alike in events.chunk_by(|one, other| one.event_type == other.event_type) {
            self.add(&alike[0].event_type, alike.len());
        }
    }

    /// Each type with its count, in order; that of all others has no name.
    pub(crate) fn counts(&self) -> Vec<(Option<String>, u64)> {
        let known = self.by_type.read().unwrap_or_else(PoisonError::into_inner);
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let mut counts: Vec<_> = known
            .iter()
            .map(|(event_type, count)| (Some(event_type.clone()), read(count)))
            .collect();
        counts.sort_unstable();
        counts.extend(Some((None, read(&self.others))).filter(|(_, count)| *count > 0));
        counts
    }
}
