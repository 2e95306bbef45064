//! An app in a process of its own, for tests that measure its memory. Prints a line when it has started and, once its
//! standard input is closed, the most memory that it has had.

use std::{
    io::{Read, Write},
    time::Duration,
};

use nexus::prelude::*;

/// Something small.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "holder.small")]
struct Small {
    number: i64,
}

/// Something of up to a megabyte.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "holder.large")]
struct Large {
    number: i64,
    text: String,
}

/// What never ends.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "holder.endless")]
struct Endless {
    /// Keeps its thread as well.
    blocks: bool,
}

async fn note(tx: &mut Tx, kind: &str, numbers: &[i64]) -> nexus::Result {
    sqlx::query("insert into handled select $1, unnest($2::bigint[])")
        .bind(kind)
        .bind(numbers)
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[handler]
async fn take_small(small: Small, tx: &mut Tx) -> nexus::Result {
    note(tx, "small", &[small.number]).await
}

#[handler]
async fn take_large(large: Large, tx: &mut Tx) -> nexus::Result {
    assert!(large.text.len() > 1_000);
    note(tx, "large", &[large.number]).await
}

#[handler(concurrency = 4)]
async fn take_many(large: Batch<Large>, tx: &mut Tx) -> nexus::Result {
    let numbers: Vec<i64> = large.iter().map(|large| large.number).collect();
    note(tx, "many", &numbers).await
}

#[handler(concurrency = 2, timeout = "1h")]
async fn never_return(endless: Endless) {
    if endless.blocks {
        loop {
            std::thread::park();
        }
    }
    std::future::pending::<()>().await;
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The test may have stopped listening.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

#[tokio::main(worker_threads = 4)]
async fn main() -> nexus::Result {
    let app = App::discover()
        .name("holder")
        .only(["take_small", "take_large", "take_many", "never_return"])
        .idle_poll(Duration::from_millis(25));
    let _handle = Box::pin(nexus::start(app)).await?;
    say("started");
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await??;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .ok_or("the system does not say how much memory a process has had")?;
    say(peak.trim().trim_end_matches(" kB"));
    // Without a farewell: some handlers never return.
    std::process::exit(0);
}
