//! A batch at a time, its effects in the transaction that completes it.
#[path = "../contestant.rs"]
mod contestant;

use contestant::Job;
use nexus::prelude::*;

#[handler(group = "bench", concurrency = 8)]
async fn job(jobs: Batch<Job>, tx: &mut Tx) -> nexus::Result {
    let ids: Vec<i64> = jobs.iter().map(|job| job.id).collect();
    sqlx::query("INSERT INTO effects (job_id, note) SELECT unnest($1::bigint[]), 'done'")
        .bind(ids)
        .execute(&mut **tx)
        .await?;
    for job in &jobs {
        common::hit_id(job.id, job.ts);
    }
    Ok(())
}

#[tokio::main]
async fn main() {
    contestant::run().await;
}
