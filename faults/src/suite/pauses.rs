//! A process is stopped beyond its lease and goes on: it must not notice too late that it has lost everything.

use std::time::{Duration, Instant};

use anyhow::ensure;
use rustix::process::Signal;

use super::{Plan, between};
use crate::{
    audit::Ticks,
    cluster::Cluster,
    proxy::{Deed, POINTS, Side},
    report::Outcome,
    scene::{Node, PATIENCE, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "pauses").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

/// Where a pause hurts most.
const MOMENTS: [(&str, Side); 6] = [
    ("claim", Side::After),
    ("complete", Side::Before),
    ("complete in a transaction", Side::Before),
    ("complete in a transaction", Side::After),
    ("retry", Side::Before),
    ("tick", Side::Before),
];

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("pauses");
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let node = Node::new(plan.lease()).behind_a_proxy();
        nodes.push(scene.add_node(node).await?);
    }
    scene.ready().await?;
    let takes = Duration::from_millis(100);
    scene.add_emitter(40.0, takes, false).await?;
    scene.emitted(80).await?;

    // Longer than the handler's timeout now and then: the server has given the transaction up by then.
    let longest = plan.pick(3.0, 30.0);
    let random_pauses = plan.pick(1, 12);
    for _ in 0..random_pauses {
        let node = nodes[random.usize(..nodes.len())];
        scene.signal(node, Signal::STOP);
        let pause = plan.lease() + between(&mut random, 1.0, longest);
        tokio::time::sleep(pause).await;
        scene.signal(node, Signal::CONT);
        scene.pass(between(&mut random, 0.5, 2.0)).await?;
    }
    let mut armed_pauses = 0;
    for _ in 0..plan.pick(1, 3) {
        for moments in MOMENTS.chunks(nodes.len()) {
            // One on each node, at the same time.
            let mut deeds = Vec::new();
            for (node, (name, side)) in nodes.iter().zip(moments) {
                let point = POINTS.into_iter().find(|point| point.name == *name);
                let point = point.expect("the moments have names of points");
                let pause = plan.lease() + between(&mut random, 1.0, 3.0);
                let deed = Deed::Pause(pause);
                deeds.push((*name, scene.proxy(*node).arm(point, *side, deed)));
                armed_pauses += 1;
            }
            for (name, mut deed) in deeds {
                let begun = Instant::now();
                while deed.try_recv().is_err() {
                    scene.pass(Duration::from_millis(50)).await?;
                    ensure!(begun.elapsed() < PATIENCE, "no pause at `{name}`");
                }
            }
            scene.pass(Duration::from_secs(1)).await?;
        }
    }
    scene.outcome.note(format!(
        "pauses: {random_pauses} at random, {armed_pauses} right at a commit, each of {:?} and more",
        plan.lease() + Duration::from_secs(1)
    ));
    let lost = scene.note_log_lines("leases that were lost", "lost a message");
    scene.note_log_lines("verdicts that were refused", "a verdict was refused");
    ensure!(lost > 0, "no lease was lost, so the pauses tested nothing");
    scene.recover().await
}
