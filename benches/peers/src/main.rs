//! nexus as a contestant: a handler that does nothing. With `BENCH_EFFECT=1` another program takes its place: that of a
//! batch with `&mut Tx`, or with `BENCH_VARIANT=single` that of one event at a time.
mod contestant;

use std::os::unix::process::CommandExt as _;

use contestant::Job;
use nexus::prelude::*;

#[handler(group = "bench")]
async fn job(job: Job) {
    common::hit_id(job.id, job.ts);
}

#[tokio::main]
async fn main() {
    if common::effect() {
        let single = std::env::var("BENCH_VARIANT").is_ok_and(|variant| variant == "single");
        let name = if single { "peer-nexus-single" } else { "peer-nexus-batch" };
        let program = std::env::current_exe().unwrap().with_file_name(name);
        panic!("{}", std::process::Command::new(program).args(std::env::args_os().skip(1)).exec());
    }
    contestant::run().await;
}
