//! The figures of a namespace, for whoever watches it.

use std::{fmt, time::Duration};

use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric, prometheus_text},
    metrics::{MetricType, gauge::ConstGauge},
    registry::{Registry, Unit},
};
use sqlx::{Connection, PgConnection};

use super::{Client, Depth, OperateError, XminHolder, horizon::holder};
use crate::store::{depths, horizon, subscriptions};

/// Counting stops here.
const MOST: u16 = 10_000;

/// Groups that are told apart, by name; the others are one.
const MOST_GROUPS: usize = 500;

/// The group of those that are not told apart. No group can be called so.
const OTHERS: &str = "(others)";

/// What a namespace is like at a moment, in figures.
///
/// What is counted is counted up to 10,000 ([`Depth::is_more`]), so that asking takes a moment however much there is.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NamespaceMetrics {
    /// The namespace.
    pub namespace: String,
    /// When the figures were collected, by the clock of the database.
    pub collected_at: Timestamp,
    /// How long that took.
    pub took: Duration,
    /// Its groups, by name. From the 501st on they are one, `(others)`: sums, the greatest lag, paused if all are.
    pub groups: Vec<GroupMetrics>,
    /// Nodes that have been heard of within 15 s.
    pub live_nodes: u64,
    /// Nodes that have not, and did not say that they stop. They are forgotten after a day.
    pub silent_nodes: u64,
    /// Scheduled tasks that have been due for more than a minute, and are neither paused nor inactive.
    pub overdue_schedules: Depth,
    /// Delayed events that are not emitted yet.
    pub delayed_emits: Depth,
    /// Replays that run.
    pub running_replays: Depth,
    /// Partitions of the event log that are there for months to come: twelve, if all is well.
    pub partitions_ahead: u64,
    /// How long until the first moment that no partition is there for, from which on no event could be emitted.
    pub partition_headroom: Duration,
    /// Who keeps the server from cleaning up, as [`Client::xmin_holder`] finds it.
    pub xmin_holder: Option<XminHolder>,
}

/// The figures of a group.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct GroupMetrics {
    /// Its name.
    pub name: String,
    /// How long its oldest message has been there that a node may claim, since it was due or came back; zero if there is
    /// none. Of what another program has put there and is not adopted yet it knows nothing.
    pub lag: Duration,
    /// Messages that wait or are being handled.
    pub depth: Depth,
    /// How many of those that were counted have failed before.
    pub failed: u64,
    /// Messages that a node has claimed and whose lease has not ended: buffered or running. Of 10,000 that are looked
    /// at each handler has the same share. Those of a batch that is claimed by deleting are not among them.
    pub leased: u64,
    /// Whether it is [paused](Client::pause_group).
    pub is_paused: bool,
    /// Dead letters.
    pub dead_letters: Depth,
}

impl Client {
    /// The figures of the namespace: what waits, for how long, what was given up, who runs, and what will go wrong some
    /// day. Two statements and one for each group, none of which walks through a large table.
    ///
    /// # Errors
    ///
    /// The database could not be asked, or one of the statements took longer than 10 s.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: &nexus::Client) -> nexus::Result {
    /// let metrics = client.namespace_metrics().await?;
    /// for group in &metrics.groups {
    ///     println!("{}: {} messages, the oldest for {:?}", group.name, group.depth, group.lag);
    /// }
    /// // What Prometheus is told.
    /// println!("{}", metrics.text());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn namespace_metrics(&self) -> Result<NamespaceMetrics, OperateError> {
        let collected = async {
            let mut connection = self.lend().await?;
            let metrics = NamespaceMetrics::collect(&mut connection, self.namespace()).await?;
            connection.give_back().await?;
            Ok(metrics)
        };
        self.asked("collect the metrics of the namespace", collected)
            .await
    }
}

impl NamespaceMetrics {
    pub(crate) async fn collect(
        connection: &mut PgConnection,
        namespace: &str,
    ) -> sqlx::Result<Self> {
        let begun = std::time::Instant::now();
        let most = i64::from(MOST);
        let mut tx = connection.begin().await?;
        depths::prepare(&mut tx).await?;
        let whole = depths::of_namespace(&mut tx, namespace, most).await?;
        let mut groups: Vec<GroupMetrics> = Vec::new();
        for row in subscriptions::group_rows(&mut tx, namespace).await? {
            let found = depths::of_group(&mut tx, &row.queue, most).await?;
            let group = GroupMetrics {
                name: row.group,
                lag: found.lag.unwrap_or_default(),
                depth: Depth::new(found.messages, MOST),
                failed: found.failed.unsigned_abs().min(u64::from(MOST)),
                leased: found.leased.unsigned_abs().min(u64::from(MOST)),
                is_paused: row.paused_at.is_some(),
                dead_letters: Depth::new(found.dead_letters, MOST),
            };
            push(&mut groups, group, MOST_GROUPS);
        }
        let holder_found = horizon::oldest_holder(&mut tx).await?;
        tx.commit().await?;
        Ok(Self {
            namespace: namespace.to_owned(),
            collected_at: whole.at,
            took: begun.elapsed(),
            groups,
            live_nodes: whole.live_nodes.unsigned_abs(),
            silent_nodes: whole.silent_nodes.unsigned_abs(),
            overdue_schedules: Depth::new(whole.overdue_tasks, MOST),
            delayed_emits: Depth::new(whole.delayed_emits, MOST),
            running_replays: Depth::new(whole.running_replays, MOST),
            partitions_ahead: whole.partitions_ahead.unsigned_abs(),
            partition_headroom: whole.headroom,
            xmin_holder: holder_found.map(holder),
        })
    }

    /// The figures in the text format of Prometheus, version 0.0.4. `docs/metrics.md` has the names.
    #[must_use]
    pub fn text(&self) -> String {
        text_of(&self.namespace, |registry| {
            registry.register_collector(Box::new(Families::of(self.clone())));
        })
    }

    fn encode_groups(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        type Of = fn(&GroupMetrics) -> u64;
        let mut lag = encoder.encode_descriptor(
            "nexus_group_lag",
            "How long the oldest message has been ready",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for group in &self.groups {
            let label = [("group", group.name.as_str())];
            ConstGauge::new(group.lag.as_secs_f64()).encode(lag.encode_family(&label)?)?;
        }
        for (name, help, of) in [
            (
                "nexus_group_depth",
                "Messages that wait or are being handled, counted up to 10000",
                (|group| group.depth.counted) as Of,
            ),
            (
                "nexus_group_leased",
                "Messages that a node has claimed and whose lease has not ended, of 10000 that are looked at",
                |group| group.leased,
            ),
            (
                "nexus_group_failed",
                "Of the messages that were counted, those that have failed before",
                |group| group.failed,
            ),
            (
                "nexus_group_paused",
                "Whether the group is paused: 1 or 0",
                |group| group.is_paused.into(),
            ),
            (
                "nexus_group_dead_letters",
                "Dead letters, counted up to 10000",
                |group| group.dead_letters.counted,
            ),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for group in &self.groups {
                let label = [("group", group.name.as_str())];
                ConstGauge::new(of(group)).encode(family.encode_family(&label)?)?;
            }
        }
        Ok(())
    }

    fn encode_whole(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut nodes = encoder.encode_descriptor(
            "nexus_nodes",
            "Nodes that are live, and those that fell silent",
            None,
            MetricType::Gauge,
        )?;
        for (state, count) in [("live", self.live_nodes), ("silent", self.silent_nodes)] {
            ConstGauge::new(count).encode(nodes.encode_family(&[("state", state)])?)?;
        }
        for (name, help, count) in [
            (
                "nexus_schedules_overdue",
                "Scheduled tasks that have been due for more than a minute, counted up to 10000",
                self.overdue_schedules.counted,
            ),
            (
                "nexus_delayed_emits_waiting",
                "Delayed events that are not emitted yet, counted up to 10000",
                self.delayed_emits.counted,
            ),
            (
                "nexus_replays_running",
                "Replays that run, counted up to 10000",
                self.running_replays.counted,
            ),
            (
                "nexus_partitions_ahead",
                "Partitions of the event log for months to come",
                self.partitions_ahead,
            ),
            (
                "nexus_xmin_transactions",
                "Transactions that have begun since the oldest one that keeps the server from cleaning up",
                self.xmin_holder
                    .as_ref()
                    .map_or(0, |holder| holder.transactions.unsigned_abs()),
            ),
        ] {
            gauge(encoder, name, help, None, count)?;
        }
        let seconds = Some(&Unit::Seconds);
        gauge(
            encoder,
            "nexus_partition_headroom",
            "Until the first moment that the event log has no partition for",
            seconds,
            self.partition_headroom.as_secs_f64(),
        )?;
        // Nobody is known to hold anything for no time; of a slot or a standby it is not known.
        let age = self
            .xmin_holder
            .as_ref()
            .map_or(Some(Duration::ZERO), |holder| holder.age);
        if let Some(age) = age {
            gauge(
                encoder,
                "nexus_xmin_age",
                "How long the oldest transaction is open that keeps the server from cleaning up",
                seconds,
                age.as_secs_f64(),
            )?;
        }
        gauge(
            encoder,
            "nexus_namespace_collection_duration",
            "How long it took to collect the figures of the namespace",
            seconds,
            self.took.as_secs_f64(),
        )
    }
}

/// Adds a group to those that are told apart, or to the one that stands for all others.
fn push(groups: &mut Vec<GroupMetrics>, mut group: GroupMetrics, most: usize) {
    if let Some(others) = groups.get_mut(most) {
        others.add(&group);
        return;
    }
    if groups.len() == most {
        OTHERS.clone_into(&mut group.name);
    }
    groups.push(group);
}

impl GroupMetrics {
    /// Makes of this one a group that stands for both.
    fn add(&mut self, other: &Self) {
        self.lag = self.lag.max(other.lag);
        self.depth.add(other.depth);
        self.failed += other.failed;
        self.leased += other.leased;
        self.is_paused &= other.is_paused;
        self.dead_letters.add(other.dead_letters);
    }
}

/// Writes what is registered, each series with the label `namespace`, in the text format of Prometheus.
pub(crate) fn text_of(namespace: &str, register: impl FnOnce(&mut Registry)) -> String {
    let namespace = ("namespace".into(), namespace.to_owned().into());
    let mut registry = Registry::with_labels(std::iter::once(namespace));
    register(&mut registry);
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

/// The figures of a namespace as Prometheus gets them; without figures, when they were collected last.
#[derive(Debug, Clone)]
pub(crate) struct Families {
    pub(crate) collected_at: Timestamp,
    pub(crate) metrics: Option<NamespaceMetrics>,
}

impl Families {
    pub(crate) fn of(metrics: NamespaceMetrics) -> Self {
        Self {
            collected_at: metrics.collected_at,
            metrics: Some(metrics),
        }
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        if let Some(metrics) = &self.metrics {
            metrics.encode_groups(&mut encoder)?;
            metrics.encode_whole(&mut encoder)?;
        }
        gauge(
            &mut encoder,
            "nexus_namespace_collected_timestamp",
            "When the figures of the namespace were collected last, in seconds since 1970",
            Some(&Unit::Seconds),
            self.collected_at.as_duration().as_secs_f64(),
        )
    }
}

/// Writes a gauge of one series.
fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: impl EncodeGaugeValue + fmt::Debug + Copy,
) -> fmt::Result {
    let gauge = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    ConstGauge::new(value).encode(gauge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_beyond_the_limit_are_one() {
        let mut groups = Vec::new();
        for (number, name) in (1_u8..).zip(["a", "b", "c", "d"]) {
            let group = GroupMetrics {
                name: name.to_owned(),
                lag: Duration::from_secs(u64::from(number % 4)),
                depth: Depth::new(i64::from(number), 3),
                failed: u64::from(number),
                leased: 10 * u64::from(number),
                is_paused: number != 3,
                dead_letters: Depth::new(0, 3),
            };
            push(&mut groups, group, 2);
        }
        let names: Vec<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "(others)"]);
        let others = &groups[2];
        assert_eq!(others.lag, Duration::from_secs(3));
        assert_eq!(others.depth.to_string(), "6+");
        assert_eq!((others.failed, others.leased), (7, 70));
        assert!(!others.is_paused);
        assert!(!others.dead_letters.is_more);
    }
}
