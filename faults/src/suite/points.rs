//! SIGKILL right before and right after each kind of commit.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::sync::oneshot;

use super::Plan;
use crate::{
    audit::Ticks,
    cluster::Cluster,
    proxy::{Deed, POINTS, Point, Side},
    report::Outcome,
    scene::{Node, PATIENCE, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "points").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("points");
    let nodes = [
        scene
            .add_node(Node::new(plan.lease()).behind_a_proxy())
            .await?,
        scene
            .add_node(Node::new(plan.lease()).behind_a_proxy())
            .await?,
    ];
    scene.ready().await?;
    let takes = Duration::from_millis(30);
    let emitter = scene.add_emitter(50.0, takes, true).await?;
    scene.emitted(50).await?;
    let rounds = plan.pick(1, 5);
    for _ in 0..rounds {
        for point in POINTS {
            for side in [Side::Before, Side::After] {
                let victim = if is_of_emitter(point) {
                    emitter
                } else {
                    nodes[random.usize(..nodes.len())]
                };
                let killed = scene.proxy(victim).arm(point, side, Deed::Kill);
                if point.name == "registration" {
                    scene.kill(victim).await?;
                }
                wait(scene, killed, point, side).await?;
                let begun = Instant::now();
                while scene.is_running(victim) {
                    ensure!(begun.elapsed() < PATIENCE, "a killed process lives on");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                scene.tend()?;
            }
        }
    }
    scene.outcome.note(format!(
        "kills: {rounds} before and {rounds} after each commit of {}",
        POINTS.map(|point| point.name).join(", ")
    ));
    scene.recover().await
}

/// Whether the commit is one of emitters; the others are those of nodes.
pub(super) fn is_of_emitter(point: Point) -> bool {
    point.name.starts_with("emit")
}

/// Waits for an armed deed, and has a foreign program send what a node may adopt meanwhile.
async fn wait(
    scene: &mut Scene,
    mut deed: oneshot::Receiver<()>,
    point: Point,
    side: Side,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        if point.name == "adopt" {
            scene.send_by_hand().await?;
        }
        match tokio::time::timeout(Duration::from_millis(100), &mut deed).await {
            Ok(done) => return done.context("the deed was called off"),
            Err(_) => ensure!(
                begun.elapsed() < PATIENCE,
                "{side:?} `{}` was not reached: has the statement changed? See `proxy::POINTS`",
                point.name
            ),
        }
        scene.tend()?;
    }
}
