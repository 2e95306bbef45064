//! The clocks of nodes are an hour off, in both directions.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use nexus::jiff::{SignedDuration, Timestamp};

use super::Plan;
use crate::{
    audit::Ticks,
    cluster::Cluster,
    report::Outcome,
    scene::{Node, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &Cluster) -> anyhow::Result<Outcome> {
    let Some(library) = library() else {
        return Ok(Outcome {
            skipped: Some(
                "there is no libfaketime on this machine (Debian: apt-get install libfaketime)"
                    .to_owned(),
            ),
            ..Outcome::default()
        });
    };
    let mut scene = Scene::new(cluster, "clock").await?;
    let played = script(plan, &library, &mut scene).await;
    Ok(scene.end(played, Ticks::All).await)
}

/// The library that tells a process another time.
fn library() -> Option<String> {
    let name = "faketime/libfaketime.so.1";
    let folders = std::fs::read_dir("/usr/lib").ok()?;
    folders
        .filter_map(|entry| Some(entry.ok()?.path().join(name)))
        .chain([
            format!("/usr/lib/{name}").into(),
            format!("/usr/lib64/{name}").into(),
        ])
        .find(|path| path.is_file())
        .map(|path| path.display().to_string())
}

const HOURS: [i64; 3] = [1, -1, 0];

async fn script(plan: &Plan, library: &str, scene: &mut Scene) -> anyhow::Result<()> {
    let mut nodes = Vec::new();
    for hours in HOURS {
        let mut node = Node::new(plan.lease());
        if hours != 0 {
            node.environment.extend([
                ("LD_PRELOAD".to_owned(), library.to_owned()),
                ("FAKETIME".to_owned(), format!("{hours:+}h")),
                // Only the time of day: what passes is measured as ever.
                ("FAKETIME_DONT_FAKE_MONOTONIC".to_owned(), "1".to_owned()),
                ("DONT_FAKE_MONOTONIC".to_owned(), "1".to_owned()),
            ]);
        }
        nodes.push((hours, scene.add_node(node).await?));
    }
    scene.ready().await?;
    scene
        .add_emitter(60.0, Duration::from_millis(10), false)
        .await?;
    scene.emitted(30).await?;
    for _ in 0..plan.pick(1, 4) {
        scene.pass(Duration::from_secs(plan.pick(6, 10))).await?;
        // A node of each clock starts while the others run, and registers by its own.
        for (_, node) in &nodes {
            scene.kill(*node).await?;
            scene.pass(Duration::from_secs(1)).await?;
        }
    }
    for (hours, node) in nodes {
        let log = scene.log(node);
        let shown: Timestamp = log
            .lines()
            .find_map(|line| line.strip_prefix("the clock shows "))
            .context("a node says what its clock shows")?
            .parse()?;
        let off = shown.duration_since(Timestamp::now()) - SignedDuration::from_hours(hours);
        ensure!(
            off.abs() < SignedDuration::from_mins(10),
            "the clock of a node that was to be {hours} h off shows {shown}"
        );
    }
    scene.recover().await?;

    // By the clock of the database nothing came early, or an hour late.
    let (early, late): (f64, f64) = sqlx::query_as(
        "select coalesce(min(late), 0)::float8, coalesce(max(late), 0)::float8 from (
             select extract(epoch from fired_at - due_at) as late from core.ticks
             union all
             select extract(epoch from emitted_at - (metadata ->> 'dueAt')::timestamptz)
             from core.event_log where event_type = 'fault.work' and metadata ? 'dueAt'
         ) l",
    )
    .fetch_one(&scene.pool)
    .await?;
    scene.outcome.note(format!(
        "ticks and delayed events came {:.0} to {:.0} ms after they were due",
        early * 1000.0,
        late * 1000.0
    ));
    // Kept to the millisecond in the log.
    ensure!(early > -0.002, "something came {early} s early");
    ensure!(late < 60.0, "something came {late} s late");
    Ok(())
}
