//! Nodes start, stop and are redeployed at random, each with handlers and schedules of its own.

use std::time::{Duration, Instant};

use super::{Plan, between};
use crate::{
    app::ALL,
    audit::Ticks,
    cluster::Cluster,
    report::Outcome,
    scene::{Node, Scene},
};

const NODES: usize = 20;

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "deploys").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::MayPause).await)
}

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("deploys");
    let mut nodes = vec![scene.add_node(Node::new(plan.lease())).await?];
    scene.ready().await?;
    scene
        .add_emitter(40.0, Duration::from_millis(10), false)
        .await?;
    while nodes.len() < NODES {
        let mut node = Node::new(plan.lease());
        node.only = some(&mut random);
        nodes.push(scene.add_node(node).await?);
    }
    let end = Instant::now() + Duration::from_secs(plan.pick(14, 120));
    let (mut stops, mut kills, mut starts) = (0, 0, 0);
    while Instant::now() < end {
        let node = nodes[random.usize(..nodes.len())];
        if !scene.is_running(node) {
            scene.redeploy(node, some(&mut random));
            scene.start(node)?;
            starts += 1;
        } else if random.u8(..3) == 0 {
            scene.remove(node).await?;
            kills += 1;
        } else {
            scene.ask_to_stop(node);
            stops += 1;
        }
        scene.pass(between(&mut random, 0.05, 0.4)).await?;
    }
    scene.outcome.note(format!(
        "nodes: {NODES}; {starts} redeployments, {stops} stops, {kills} kills"
    ));
    // What only a vanished handler can run waits for a build that has it: here it comes.
    for node in nodes {
        scene.redeploy(node, ALL.map(str::to_owned).to_vec());
        scene.ask_to_stop(node);
        scene.wait_for_end(node).await?;
        if random.bool() {
            scene.start(node)?;
        }
    }
    scene.add_node(Node::new(plan.lease())).await?;
    scene.recover().await
}

/// Some of the handlers and schedules, at least one.
fn some(random: &mut fastrand::Rng) -> Vec<String> {
    let mut names = ALL.to_vec();
    random.shuffle(&mut names);
    names.truncate(random.usize(1..=names.len()));
    names.into_iter().map(str::to_owned).collect()
}
