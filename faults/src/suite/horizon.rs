//! A transaction is held open, so that rows which are dead since are not removed: the queues' tables swell.

use std::time::{Duration, Instant};

use anyhow::ensure;
use sqlx::{Connection as _, PgConnection};

use super::Plan;
use crate::{
    app::Work,
    audit::Ticks,
    cluster::Cluster,
    report::Outcome,
    scene::{Node, Scene},
};

/// What the culprit calls itself.
const CULPRIT: &str = "nightly-report";

/// Work is kept waiting up to so much, so that the nodes are never idle.
const BACKLOG: i64 = 1_000;

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "horizon").await?;
    let url = cluster.url("faults_horizon");
    let played = script(plan, &url, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

async fn script(plan: &Plan, url: &str, scene: &mut Scene) -> anyhow::Result<()> {
    for _ in 0..2 {
        scene.add_node(Node::new(plan.lease())).await?;
    }
    scene.ready().await?;
    let client = scene.client().await?;
    let mut feed = Feed {
        client,
        next: 0,
        scene,
    };
    // Until caches, plans and connections are there.
    feed.throughput(Duration::from_secs(plan.pick(3, 10)))
        .await?;
    let free = feed
        .throughput(Duration::from_secs(plan.pick(8, 30)))
        .await?;

    let options: sqlx::postgres::PgConnectOptions = url.parse()?;
    let mut culprit = PgConnection::connect_with(&options.application_name(CULPRIT)).await?;
    sqlx::raw_sql("begin isolation level repeatable read; select pg_current_xact_id()")
        .execute(&mut culprit)
        .await?;
    let held_for = plan.pick(15, 60);
    let third = Duration::from_secs(held_for) / 3;
    let mut thirds = Vec::new();
    for _ in 0..3 {
        thirds.push(feed.throughput(third).await?);
    }
    let holder = feed.client.xmin_holder().await?;
    sqlx::raw_sql("rollback").execute(&mut culprit).await?;
    culprit.close().await?;

    let held = thirds.iter().sum::<f64>() / 3.0;
    let Feed { scene, .. } = feed;
    scene.outcome.note(format!(
        "throughput: {free:.0} events/s before, {held:.0} with a transaction open for {held_for} s \
         (thirds {:.0}, {:.0}, {:.0}): ratio {:.2}",
        thirds[0],
        thirds[1],
        thirds[2],
        held / free
    ));
    scene.outcome.require(held >= free / 2.0, || {
        format!("throughput fell to {:.2} of what it was", held / free)
    });
    let is_named = holder
        .as_ref()
        .is_some_and(|holder| holder.name == CULPRIT && holder.pid.is_some());
    scene.outcome.require(is_named, || {
        format!("`client.xmin_holder` names somebody else: {holder:?}")
    });
    let logs = scene.node_logs();
    let named = logs.lines().find(|line| line.contains(CULPRIT));
    scene.outcome.note(match named {
        Some(line) => format!("a node says: {line}"),
        None => "no node has named the culprit so far; `client.xmin_holder` does".to_owned(),
    });
    // Nodes name one that has been there for half a minute.
    scene.outcome.require(named.is_some() || held_for < 45, || {
        "no node names the culprit".to_owned()
    });
    scene.recover().await
}

struct Feed<'a> {
    scene: &'a mut Scene,
    client: nexus::Client,
    next: i64,
}

impl Feed<'_> {
    /// Keeps the nodes busy for so long; how many events a second `exact` has handled.
    async fn throughput(&mut self, time: Duration) -> anyhow::Result<f64> {
        let done = self.scene.effects_of("exact").await?;
        let begun = Instant::now();
        while begun.elapsed() < time {
            let waiting: i64 = sqlx::query_scalar(
                "select count(*) from pgmq.q_core_events_faults__small where headers ->> 'handler' = 'exact'",
            )
            .fetch_one(&self.scene.pool)
            .await?;
            if waiting < BACKLOG {
                self.emit(BACKLOG / 2).await?;
            } else {
                self.scene.pass(Duration::from_millis(100)).await?;
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        let done = self.scene.effects_of("exact").await? - done;
        ensure!(done > 0, "nothing was handled within {time:?}");
        #[expect(clippy::cast_precision_loss, reason = "it is far from 2^52")]
        let throughput = done as f64 / seconds;
        Ok(throughput)
    }

    async fn emit(&mut self, count: i64) -> anyhow::Result<()> {
        let works: Vec<Work> = (0..count)
            .map(|index| Work {
                number: crate::scene::BY_HAND + self.next + index + 1,
                takes_ms: 0,
            })
            .collect();
        self.next += count;
        let ids = self.client.emit_all(&works).await?;
        for (work, id) in works.iter().zip(ids) {
            self.scene
                .ledger
                .read(&format!("acknowledged {} {id}", work.number));
        }
        Ok(())
    }
}
