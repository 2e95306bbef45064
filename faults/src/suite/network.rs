//! The line to the database is slow, silent, deaf or cut, also exactly between a commit and its answer.

use std::time::Duration;

use super::{Plan, between, points::is_of_emitter};
use crate::{
    audit::Ticks,
    cluster::Cluster,
    proxy::{Deed, Line, POINTS, Side},
    report::Outcome,
    scene::{Node, Place, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "network").await?;
    let played = script(plan, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

/// What happens to lines.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// All are slow.
    SlowAll,
    /// One is cut.
    CutOne,
    /// All are cut.
    CutAll,
    /// One falls silent beyond the lease, and comes back.
    SilentOne,
    /// One falls silent beyond the lease, and is cut then.
    SilentThenCut,
    /// The answers on one are lost.
    DeafOne,
    /// None comes through.
    DownAll,
}

const ACTS: [Act; 7] = [
    Act::SlowAll,
    Act::CutOne,
    Act::CutAll,
    Act::SilentOne,
    Act::SilentThenCut,
    Act::DeafOne,
    Act::DownAll,
];

async fn script(plan: &Plan, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("network");
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let node = Node::new(plan.lease()).behind_a_proxy();
        nodes.push(scene.add_node(node).await?);
    }
    scene.ready().await?;
    let takes = Duration::from_millis(20);
    let emitter = scene.add_emitter(50.0, takes, true).await?;
    scene.emitted(50).await?;

    let rounds = plan.pick(1, 5);
    let mut cuts = 0;
    for _ in 0..rounds {
        cuts += cut_at_commits(scene, &nodes, emitter, &mut random).await?;
        let mut acts = ACTS;
        random.shuffle(&mut acts);
        for act in acts {
            let all = scene.proxied();
            let one = all[random.usize(..all.len())];
            perform(plan, scene, act, &all, one, &mut random).await?;
            scene.pass(between(&mut random, 0.3, 1.0)).await?;
        }
    }
    scene.outcome.note(format!(
        "{rounds} times each: slow, cut, silent beyond the lease, silent and then cut, answers lost, down; \
         {cuts} cuts right before or after a commit"
    ));
    scene.note_log_lines("leases that were lost", "lost a message");
    scene.note_log_lines("verdicts that were refused", "a verdict was refused");
    scene.recover().await
}

/// Cuts a connection right before and after each kind of commit; returns how many were.
async fn cut_at_commits(
    scene: &mut Scene,
    nodes: &[Place],
    emitter: Place,
    random: &mut fastrand::Rng,
) -> anyhow::Result<usize> {
    let mut cuts = 0;
    // A running node registers no more.
    for point in POINTS
        .into_iter()
        .filter(|point| point.name != "registration")
    {
        for side in [Side::Before, Side::After] {
            let victim = if is_of_emitter(point) {
                emitter
            } else {
                nodes[random.usize(..nodes.len())]
            };
            if point.name == "adopt" {
                scene.send_by_hand().await?;
            }
            let mut cut = scene.proxy(victim).arm(point, side, Deed::Cut);
            // Another node may do it, time and again.
            for _ in 0..40 {
                if point.name == "adopt" {
                    scene.send_by_hand().await?;
                }
                scene.pass(Duration::from_millis(50)).await?;
                if cut.try_recv().is_ok() {
                    cuts += 1;
                    break;
                }
            }
            scene.proxy(victim).disarm();
        }
    }
    Ok(cuts)
}

async fn perform(
    plan: &Plan,
    scene: &mut Scene,
    act: Act,
    all: &[Place],
    one: Place,
    random: &mut fastrand::Rng,
) -> anyhow::Result<()> {
    let beyond_the_lease = plan.lease() + between(random, 1.0, 4.0);
    match act {
        Act::SlowAll => {
            let most = Duration::from_millis(random.u64(5..=100));
            set_all(scene, all, Line::Slow(most));
            scene.pass(between(random, 2.0, 4.0)).await?;
        }
        Act::CutOne => scene.proxy(one).cut(),
        Act::CutAll => {
            for place in all {
                scene.proxy(*place).cut();
            }
        }
        Act::SilentOne | Act::SilentThenCut => {
            scene.proxy(one).set(Line::Silent);
            scene.pass(beyond_the_lease).await?;
            if let Act::SilentThenCut = act {
                scene.proxy(one).cut();
            }
        }
        Act::DeafOne => {
            scene.proxy(one).set(Line::Deaf);
            scene.pass(between(random, 1.0, 3.0)).await?;
        }
        Act::DownAll => {
            set_all(scene, all, Line::Down);
            scene.pass(between(random, 1.0, 3.0)).await?;
        }
    }
    set_all(scene, all, Line::Up);
    Ok(())
}

fn set_all(scene: &Scene, places: &[Place], line: Line) {
    for place in places {
        scene.proxy(*place).set(line);
    }
}
