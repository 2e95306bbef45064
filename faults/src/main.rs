//! Breaks a small nexus app from outside, and counts what was lost and doubled.
//!
//! Real processes of the app run on a real Postgres of the suite's own, and are killed, paused, cut off, or
//! lose their database, disk or time. Exits with 1 if anything was lost or doubled, or a fault did not come to
//! pass. What is counted is said in [`audit`]; `docs/reliability.md` has the figures of a long run.
//!
//! - [`app`], [`emitter`]: what the processes do; this program again, with other arguments.
//! - [`cluster`], [`proxy`], [`mount`]: what can be broken.
//! - [`scene`]: a database with its processes; [`process`] is one of them, [`ledger`] what they said.
//! - [`suite`]: the faults, a file each.
//! - [`report`]: the table at the end.

mod app;
mod audit;
mod cluster;
mod emitter;
mod ledger;
mod mount;
mod process;
mod proxy;
mod report;
mod scene;
mod suite;

use std::{
    io::Read as _,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::{Parser, Subcommand};

/// Breaks a small nexus app from outside, and counts what was lost and doubled.
#[derive(Debug, Parser)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are flags of a command line"
)]
struct Arguments {
    #[command(subcommand)]
    role: Option<Role>,
    /// A few minutes (the default).
    #[arg(long)]
    short: bool,
    /// The whole suite, about forty minutes.
    #[arg(long, conflicts_with = "short")]
    long: bool,
    /// Only the faults of these names.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Repeats the choices of another run; the timing of the processes is never the same.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints a line of JSON for each fault as well.
    #[arg(long)]
    json: bool,
    /// A fault that cannot be run on this machine counts as one that does not hold.
    #[arg(long)]
    no_skips: bool,
    /// Lists the faults and ends.
    #[arg(long)]
    list: bool,
}

/// What a process of the suite does.
#[derive(Debug, Subcommand)]
enum Role {
    /// Works as a node of the app; started by the suite.
    #[command(hide = true)]
    Node(app::Settings),
    /// Emits; started by the suite.
    #[command(hide = true)]
    Emitter(emitter::Settings),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    match arguments.role {
        Some(Role::Node(settings)) => {
            // The suite is gone: nobody looks after this process any more.
            when_input_ends(|| std::process::exit(3));
            app::run(settings).await?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Role::Emitter(settings)) => {
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = Arc::clone(&stop);
            when_input_ends(move || stopped.store(true, Ordering::Relaxed));
            emitter::run(settings, stop).await?;
            Ok(ExitCode::SUCCESS)
        }
        None if arguments.list => {
            for fault in suite::FAULTS {
                println!("{:<12} {}", fault.name, fault.what);
            }
            Ok(ExitCode::SUCCESS)
        }
        None => {
            let plan = suite::Plan::new(arguments.long, arguments.seed);
            let outcomes = tokio::select! {
                outcomes = suite::run(plan, &arguments.only, arguments.json) => outcomes?,
                // What the suite has started ends with it.
                _ = tokio::signal::ctrl_c() => return Ok(ExitCode::from(130)),
                () = terminated() => return Ok(ExitCode::from(143)),
            };
            let is_well = outcomes.iter().all(|outcome| {
                outcome.is_well() && !(arguments.no_skips && outcome.skipped.is_some())
            });
            Ok(if is_well {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
    }
}

async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

fn when_input_ends(end: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        let mut ignored = [0; 64];
        while std::io::stdin()
            .read(&mut ignored)
            .is_ok_and(|count| count > 0)
        {}
        end();
    });
}
