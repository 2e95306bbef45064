//! Sessions of the server are ended, statements cancelled, a backend killed, and the whole server frozen.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{Plan, between};
use crate::{
    audit::Ticks,
    cluster::Cluster,
    report::Outcome,
    scene::{Node, Scene},
};

pub(super) async fn play(plan: &Plan, cluster: &mut Cluster) -> anyhow::Result<Outcome> {
    let mut scene = Scene::new(cluster, "sessions").await?;
    let played = script(plan, cluster, &mut scene).await;
    cluster.signal_all(Signal::CONT);
    cluster.run().await?;
    Ok(scene.end(played, Ticks::All).await)
}

/// One session of the app, in the middle of a statement if there is such a one.
const VICTIM: &str = "select pid from pg_stat_activity
     where usename = 'faults' and datname = current_database()
     order by state = 'idle', random() limit 1";

async fn script(plan: &Plan, cluster: &mut Cluster, scene: &mut Scene) -> anyhow::Result<()> {
    let mut random = plan.random("sessions");
    for _ in 0..3 {
        scene.add_node(Node::new(plan.lease())).await?;
    }
    scene.ready().await?;
    let takes = Duration::from_millis(20);
    scene.add_emitter(60.0, takes, false).await?;
    scene.emitted(60).await?;

    let (mut ended, mut cancelled, mut killed, mut frozen) = (0, 0, 0, 0);
    for _ in 0..plan.pick(1, 5) {
        let end = Instant::now() + Duration::from_secs(plan.pick(5, 10));
        while Instant::now() < end {
            // Cancelled now and then: an attempt that is cancelled counts, and ten are too many.
            let is_end = random.u8(..4) > 0;
            let text = if is_end {
                format!("select pg_terminate_backend(({VICTIM}))")
            } else {
                format!("select pg_cancel_backend(({VICTIM}))")
            };
            sqlx::query(sqlx::AssertSqlSafe(text))
                .execute(&scene.pool)
                .await?;
            *(if is_end { &mut ended } else { &mut cancelled }) += 1;
            scene.pass(between(&mut random, 0.02, 0.2)).await?;
        }

        // The server takes one that dies for a danger to its memory, and restarts all.
        let victim: Option<i32> = sqlx::query_scalar(VICTIM)
            .fetch_optional(&scene.pool)
            .await?;
        if let Some(pid) = victim.and_then(Pid::from_raw) {
            kill_process(pid, Signal::KILL)?;
            killed += 1;
        }
        scene.pass(Duration::from_millis(200)).await?;
        cluster.run().await?;
        scene.until_next_effect().await?;

        // Connections stay open, and nothing answers: neither what is asked, nor whoever connects.
        cluster.signal_all(Signal::STOP);
        scene
            .pass(plan.lease() + between(&mut random, 1.0, 5.0))
            .await?;
        cluster.signal_all(Signal::CONT);
        frozen += 1;
        scene.until_next_effect().await?;
    }
    scene.outcome.note(format!(
        "{ended} sessions ended, {cancelled} statements cancelled, {killed} backends killed, \
         {frozen} times the whole server frozen beyond the lease"
    ));
    scene.recover().await
}
