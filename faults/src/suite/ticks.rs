//! Many scheduled tasks each second on nodes that are killed each second.

use std::time::{Duration, Instant};

use super::Plan;
use crate::{
    app::Pulsed,
    audit::Ticks,
    cluster::Cluster,
    report::Outcome,
    scene::{Node, Scene},
};

const TASKS: i64 = 200;

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "ticks").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("ticks");
    let mut nodes = Vec::new();
    for _ in 0..4 {
        nodes.push(scene.add_node(Node::new(plan.lease())).await?);
    }
    scene.ready().await?;
    let client = scene.client().await?;
    for task in 0..TASKS {
        let name = format!("pulse_{task}");
        client
            .schedule(name, "* * * * * *", &Pulsed { task })
            .await?;
    }
    client.pool().close().await;
    let seconds = plan.pick(15, 120);
    let mut next = Instant::now();
    for _ in 0..seconds {
        next += Duration::from_secs(1);
        scene
            .pass(next.saturating_duration_since(Instant::now()))
            .await?;
        scene.kill(nodes[random.usize(..nodes.len())]).await?;
    }
    scene.outcome.note(format!(
        "{TASKS} tasks each second and {seconds} kills, one each second"
    ));
    scene.recover().await
}
