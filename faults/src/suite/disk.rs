//! The disk of the database is full for a while.

use std::{
    fs::File,
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use super::Plan;
use crate::{
    audit::Ticks,
    cluster::Cluster,
    report::{Outcome, seconds},
    scene::{Node, PATIENCE, Scene},
};

/// Enough for a cluster, its log of 48 MB and the work of a few minutes.
const BYTES: u64 = 400 * 1024 * 1024;

pub(super) async fn play(plan: &Plan) -> anyhow::Result<Outcome> {
    let mut cluster = match Cluster::start_on(BYTES).await? {
        Ok(cluster) => cluster,
        Err(reason) => {
            return Ok(Outcome {
                skipped: Some(format!(
                    "no file system can be mounted here, which takes root: {reason}"
                )),
                ..Outcome::default()
            });
        }
    };
    let mut scene = Scene::new(&cluster, "disk").await?;
    let played = script(plan, &mut cluster, &mut scene).await;
    cluster.run().await?;
    Ok(scene.end(played, Ticks::All).await)
}

async fn script(plan: &Plan, cluster: &mut Cluster, scene: &mut Scene) -> anyhow::Result<()> {
    let mut nodes = Vec::new();
    for _ in 0..2 {
        nodes.push(scene.add_node(Node::new(plan.lease())).await?);
    }
    scene.ready().await?;
    let emitter = scene
        .add_emitter(60.0, Duration::from_millis(10), false)
        .await?;
    scene.emitted(60).await?;

    let ballast = cluster
        .mount()
        .context("the cluster has a file system of its own")?
        .join("ballast");
    let (mut crashes, mut resumed) = (0, Vec::new());
    for round in 0..plan.pick(2, 6) {
        let seen = scene.log(emitter).len();
        fill(&ballast)?;
        // Tables are what grows first. Now and then the write-ahead log shall be what finds no space: then
        // the server crashes.
        if round % 2 == 1 {
            exhaust_the_log(cluster).await;
        }
        // The emitters are told that there is no space, or that the server is gone.
        let begun = Instant::now();
        while !scene.log(emitter)[seen..].contains("No space left on device")
            && cluster.is_running()
        {
            ensure!(
                begun.elapsed() < PATIENCE,
                "the disk is full and nobody noticed"
            );
            // Some of what was freed since: the server keeps files for later.
            fill(&ballast)?;
            scene.pass(Duration::from_millis(200)).await?;
        }
        scene.pass(Duration::from_secs(plan.pick(2, 20))).await?;
        if !cluster.is_running() {
            crashes += 1;
        }
        std::fs::remove_file(&ballast)?;
        // Whoever watches over a server starts it again.
        cluster.run().await?;
        resumed.push(scene.until_next_effect().await?);
        scene.emitted(60).await?;
    }
    let told = scene
        .log(emitter)
        .lines()
        .find(|line| line.contains("No space left on device"))
        .map(str::to_owned);
    let log = cluster.log();
    let panics = log.lines().filter(|line| line.contains("PANIC")).count();
    scene.outcome.note(format!(
        "full {} times; the server gave up for good {crashes} times, and crashed {panics} times; work resumed after {}",
        resumed.len(),
        resumed.iter().map(|after| seconds(*after)).collect::<Vec<_>>().join(", ")
    ));
    match told {
        Some(line) => scene.outcome.note(format!("an emitter was told: {line}")),
        None => scene
            .outcome
            .note("no emitter was told: the server was gone first"),
    }
    scene.recover().await?;
    cluster.check("faults_disk")
}

/// Writes into the write-ahead log until the server says no, or is gone.
async fn exhaust_the_log(cluster: &Cluster) {
    let Ok(mut admin) = cluster.admin("postgres").await else {
        return;
    };
    let write = "select pg_logical_emit_message(false, 'fill', repeat('x', 1000000))";
    while sqlx::raw_sql(write).execute(&mut admin).await.is_ok() {}
}

/// Writes until there is no space.
fn fill(path: &std::path::Path) -> anyhow::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    let block = vec![0; 64 * 1024];
    while file.write_all(&block).is_ok() {}
    Ok(())
}
