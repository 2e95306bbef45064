//! What a node tells Prometheus, written out when it is asked for. docs/metrics.md has the names.
//!
//! Labels have as many values as the program has groups and handlers. What is told of the namespace comes from
//! `client/namespace_metrics.rs`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};
use sqlx::PgPool;

use crate::{
    client::{Client, Families, NamespaceMetrics, text_of},
    metrics::{Counts, Times},
    runtime::{Figures, Route, Running},
};

/// What a node has counted, timed and holds, to be asked at any time: [`Handle::node_metrics`](crate::Handle::node_metrics).
///
/// Cheap to clone. Goes on telling what it counted when the node has stopped.
#[derive(Clone)]
pub struct NodeMetrics {
    namespace: String,
    routes: Vec<Arc<Route>>,
    client: Client,
    own_pool: PgPool,
    lateness: Times,
    figures: Figures,
}

impl fmt::Debug for NodeMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeMetrics").finish_non_exhaustive()
    }
}

impl NodeMetrics {
    pub(super) fn of(running: &Running) -> Self {
        let node = &running.node;
        Self {
            namespace: node.row.namespace.clone(),
            routes: running.routes.clone(),
            client: node.client.clone(),
            own_pool: node.lender.pool().clone(),
            lateness: node.lateness.clone(),
            figures: node.figures.clone(),
        }
    }

    /// The node's series in the text format of Prometheus, version 0.0.4, and those of the namespace if this is the node
    /// that collects them. Asks nothing of the database.
    #[must_use]
    pub fn text(&self) -> String {
        self.text_and(self.figures.families())
    }

    /// The node's series together with these of the namespace, which somebody has just asked for.
    #[must_use]
    pub fn text_with(&self, metrics: &NamespaceMetrics) -> String {
        self.text_and(Some(Families::of(metrics.clone())))
    }

    fn text_and(&self, families: Option<Families>) -> String {
        text_of(&self.namespace, |registry| {
            registry.register_collector(Box::new(self.clone()));
            if let Some(families) = families {
                registry.register_collector(Box::new(families));
            }
        })
    }
}

/// Name and help of what is counted by handler, and where.
type HandlerCounter = (&'static str, &'static str, fn(&Counts) -> &AtomicU64);

const HANDLER_COUNTERS: [HandlerCounter; 7] = [
    ("nexus_messages_claimed", "Messages claimed", |c| &c.claimed),
    (
        "nexus_messages_completed",
        "Messages whose handling is done",
        |c| &c.completed,
    ),
    (
        "nexus_messages_retried",
        "Attempts that failed and are tried again",
        |c| &c.retried,
    ),
    (
        "nexus_messages_snoozed",
        "Attempts that put themselves off",
        |c| &c.snoozed,
    ),
    (
        "nexus_messages_dead_lettered",
        "Messages that were given up",
        |c| &c.dead_lettered,
    ),
    (
        "nexus_messages_abandoned",
        "Messages that were given up because their leases ended again and again without a verdict",
        |c| &c.abandoned,
    ),
    (
        "nexus_leases_lost",
        "Verdicts refused because the lease was lost",
        |c| &c.lost,
    ),
];

impl Collector for NodeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut emitted = encoder.encode_descriptor(
            "nexus_events_emitted",
            "Events stored by this process",
            None,
            MetricType::Counter,
        )?;
        for (event_type, count) in self.client.emitted().counts() {
            let label = [("event_type", event_type.as_deref().unwrap_or("(others)"))];
            ConstCounter::new(count).encode(emitted.encode_family(&label)?)?;
        }
        for (name, help, of) in HANDLER_COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for route in &self.routes {
                let count = of(&route.counts).load(Ordering::Relaxed);
                ConstCounter::new(count).encode(family.encode_family(&labels(route))?)?;
            }
        }
        let mut running = encoder.encode_descriptor(
            "nexus_messages_running",
            "Messages in attempts at the moment",
            None,
            MetricType::Gauge,
        )?;
        for route in &self.routes {
            let count = route.counts.running.load(Ordering::Relaxed);
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            ConstGauge::new(count).encode(running.encode_family(&labels(route))?)?;
        }
        for (name, help, of) in [
            (
                "nexus_attempt_duration",
                "How long handlers run, whatever comes of it",
                (|c| &c.attempt) as fn(&Counts) -> &Times,
            ),
            (
                "nexus_emit_to_start",
                "From the emit, or the time an event was delayed to, to the start of its first attempt",
                |c| &c.wait,
            ),
        ] {
            let unit = Some(&Unit::Seconds);
            let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
            for route in &self.routes {
                let times = &of(&route.counts).0;
                times.encode(family.encode_family(&labels(route))?)?;
            }
        }
        let lateness = encoder.encode_descriptor(
            "nexus_tick_lateness",
            "From the due time of a tick to when this node fired it",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        self.lateness.0.encode(lateness)?;
        let mut pools = encoder.encode_descriptor(
            "nexus_pool_connections",
            "Connections of the node's pools: those of handlers and emits, and those of its loops",
            None,
            MetricType::Gauge,
        )?;
        for (pool, name) in [(self.client.pool(), "client"), (&self.own_pool, "node")] {
            for (state, count) in connections(pool) {
                let label = [("pool", name), ("state", state)];
                ConstGauge::new(count).encode(pools.encode_family(&label)?)?;
            }
        }
        Ok(())
    }
}

fn labels(route: &Route) -> impl EncodeLabelSet {
    [
        ("group", route.group.clone()),
        ("handler", route.name().to_owned()),
    ]
}

fn connections(pool: &PgPool) -> [(&'static str, i64); 3] {
    let idle = i64::try_from(pool.num_idle()).unwrap_or(i64::MAX);
    let open = i64::from(pool.size());
    let most = i64::from(pool.options().get_max_connections());
    [
        ("idle", idle),
        ("used", (open - idle).max(0)),
        ("most", most),
    ]
}
