//! SIGKILL at random moments.

use std::time::Duration;

use super::{Plan, between};
use crate::{
    audit::Ticks,
    cluster::Cluster,
    report::Outcome,
    scene::{Node, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "kills").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("kills");
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(scene.add_node(Node::new(plan.lease())).await?);
    }
    scene.ready().await?;
    let takes = Duration::from_millis(30);
    let emitter = scene.add_emitter(60.0, takes, false).await?;
    scene.emitted(60).await?;
    let kills = plan.pick(15, 200);
    let mut of_emitters = 0;
    for _ in 0..kills {
        scene.pass(between(&mut random, 0.1, 1.2)).await?;
        scene.kill(nodes[random.usize(..nodes.len())]).await?;
        // Emitters are killed as well, beside the workers.
        if random.u8(..5) == 0 {
            scene.kill(emitter).await?;
            of_emitters += 1;
        }
    }
    scene.outcome.note(format!(
        "kills: {kills} of workers, {of_emitters} of emitters"
    ));
    scene.recover().await
}
