//! A small app in a process of its own, for tests that kill it. What it does is in the events; where
//! and under which names it runs is in the environment.

use std::{io::Write, time::Duration};

use nexus::prelude::*;

/// Something to do, of which the database keeps a trace.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "victim.work")]
struct Work {
    number: i64,
    /// `hang`, `abort`, `dawdle` or nothing.
    then: String,
}

/// Declared here with other fields than in the tests that declare it, too.
#[derive(Debug, Serialize, Deserialize, JsonSchema, Event)]
#[event(type = "shared.fact")]
struct SharedFact {
    text: String,
}

#[handler(concurrency = 32)]
async fn work(work: Work, tx: &mut Tx) -> nexus::Result {
    sqlx::query("insert into effects (number) values ($1)")
        .bind(work.number)
        .execute(&mut **tx)
        .await?;
    say(&format!("working on {}", work.number));
    work.end().await;
    Ok(())
}

/// The same, many at once.
#[handler(concurrency = 1)]
async fn work_together(works: Batch<Work>, tx: &mut Tx) -> nexus::Result {
    let numbers: Vec<i64> = works.iter().map(|work| work.number).collect();
    sqlx::query("insert into effects (number) select unnest($1::bigint[])")
        .bind(&numbers)
        .execute(&mut **tx)
        .await?;
    for work in &works {
        work.end().await;
    }
    Ok(())
}

/// The same, in many slots.
#[handler(concurrency = 8)]
async fn work_side_by_side(works: Batch<Work>, tx: &mut Tx) -> nexus::Result {
    work_together(works, tx).await
}

impl Work {
    async fn end(&self) {
        let is_set = |variable| std::env::var_os(variable).is_some();
        match self.then.as_str() {
            "hang" if is_set("VICTIM_HANGS") => std::future::pending().await,
            "dawdle" => tokio::time::sleep(Duration::from_millis(20)).await,
            "abort" if !is_set("VICTIM_IS_MENDED") => std::process::abort(),
            _ => {}
        }
    }
}

#[handler]
async fn keep(_fact: SharedFact) {}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // The test may have stopped listening.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Runs until nothing is left to do, then exits with 0; or until `VICTIM_STAYS` is killed.
#[tokio::main]
async fn main() -> nexus::Result {
    let name = std::env::var("VICTIM_APP").unwrap_or_else(|_| "victim".to_owned());
    let mut app = App::discover()
        .name(name)
        .idle_poll(Duration::from_millis(25));
    if let Some(handlers) = std::env::var("VICTIM_HANDLERS")
        .ok()
        .filter(|names| !names.is_empty())
    {
        app = app.only(handlers.split(','));
    }
    if std::env::var_os("CORE_VISIBILITY_TIMEOUT_SECONDS").is_none() {
        app = app.lease(Duration::from_secs(1));
    }
    if std::env::var_os("VICTIM_STAYS").is_some() {
        return nexus::run(app).await;
    }
    let handle = nexus::start(app).await?;
    say("started");
    handle.idle().await?;
    handle.shutdown().await;
    Ok(())
}
