//! One event at a time, its effect in the transaction that completes it.
#[path = "../contestant.rs"]
mod contestant;

use contestant::Job;
use nexus::prelude::*;

#[handler(group = "bench", concurrency = 8)]
async fn job(job: Job, tx: &mut Tx) -> nexus::Result {
    sqlx::query(common::EFFECT_SQL)
        .bind(job.id)
        .execute(&mut **tx)
        .await?;
    common::hit_id(job.id, job.ts);
    Ok(())
}

#[tokio::main]
async fn main() {
    contestant::run().await;
}
