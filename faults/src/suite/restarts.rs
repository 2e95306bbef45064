//! Postgres is stopped in immediate mode, as by a crash, and restarted.

use std::time::{Duration, Instant};

use super::{Plan, between};
use crate::{
    audit::Ticks,
    cluster::Cluster,
    report::{Outcome, spread},
    scene::{Node, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &mut Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "restarts").await?;
    let played = script(plan, cluster, &mut scene).await;
    // Whatever went wrong, the others need a server.
    cluster.run().await?;
    Ok(scene.end(played, Ticks::All).await)
}

async fn script(plan: &Plan, cluster: &mut Cluster, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("restarts");
    for _ in 0..3 {
        scene.add_node(Node::new(plan.lease())).await?;
    }
    scene.ready().await?;
    scene
        .add_emitter(60.0, Duration::from_millis(20), false)
        .await?;
    scene.emitted(60).await?;
    let (least, most) = plan.pick((3.0, 6.0), (5.0, 20.0));
    let end = Instant::now() + Duration::from_secs(plan.pick(15, 180));
    let (mut starts, mut effects) = (Vec::new(), Vec::new());
    while Instant::now() < end {
        scene.pass(between(&mut random, least, most)).await?;
        cluster.stop_at_once();
        scene.pass(between(&mut random, 0.0, 2.0)).await?;
        starts.push(cluster.run().await?);
        effects.push(scene.until_next_effect().await?);
    }
    scene.outcome.note(format!("restarts: {}", starts.len()));
    scene
        .outcome
        .note(format!("the server's own start: {}", spread(&starts)));
    scene.outcome.note(format!(
        "from then until the next effect: {}",
        spread(&effects)
    ));
    scene.recover().await?;
    cluster.check("faults_restarts")
}
