//! End-to-end figures of nexus, each beside what plain SQL reaches in the same run.
//!
//! `cargo run --release -p nexus-benches --bin nexus-bench`
//!
//! A round runs every workload once, its yardstick first; each in a database of its own. A ratio is taken within a
//! round, so that a machine that is slower for a while does not count; the median of the rounds is reported, with
//! the lowest and the highest.

mod app;
mod cost;
mod footprint;
mod latency;
mod report;
mod scale;
mod throughput;

use clap::{Parser, Subcommand, ValueEnum};
use nexus_benches::{BenchServer, load};

use report::Report;

#[derive(Debug, Parser)]
#[command(about = "End-to-end figures of nexus beside what plain SQL reaches in the same run")]
struct Arguments {
    /// Workloads to run, all if none is named.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Workload>,
    /// How often each is run.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// How long a workload runs that is measured by time.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// How many events a workload takes that is measured by their number.
    #[arg(long, default_value_t = 50_000)]
    events: i64,
    /// Size of a payload as JSON, about.
    #[arg(long, default_value_t = 200)]
    payload_bytes: usize,
    /// How many messages a claim, and a batch, brings at most.
    #[arg(long, default_value_t = 500)]
    batch_size: usize,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// W1: emit one at a time, 8 producers.
    Emit,
    /// W2: emit 1,000 at once, one producer.
    EmitAll,
    /// W3: handle what waits, with a handler that does nothing.
    Drain,
    /// W4: an insert by a handler with `&mut Tx`, 8 at a time.
    Transaction,
    /// W4: the same, 32 at a time.
    Transactions,
    /// W4: an insert for all of a `Batch<E>` with `&mut Tx`.
    Batch,
    /// W5: from emit to the start of the handler.
    Pickup,
    /// W6: a node is killed in mid drain and started again.
    Kill,
    /// A snapshot is held open for a minute.
    Snapshot,
    /// 8 nodes against one.
    Nodes,
    /// From the start of a node to its first event.
    Start,
    /// A node that has nothing to do; and the memory of one that has a lot to do.
    Idle,
}

#[derive(Debug, Clone, Subcommand)]
enum Part {
    /// What an event costs as the work grows: payloads, subscriptions, handlers, nodes, what waits, the log.
    Scale {
        /// As far as a hundred million rows of the log: an hour, and 30 GB.
        #[arg(long)]
        long: bool,
    },
    /// Runs a node with one handler until it is killed or its standard input is closed.
    #[command(hide = true)]
    Node {
        /// The handler.
        handler: String,
    },
}

/// What all workloads are given.
struct Bench {
    server: BenchServer,
    arguments: Arguments,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(Part::Node { handler }) = &arguments.part {
        return app::run_apart(handler).await;
    }
    let bench = Bench {
        server: BenchServer::start()?,
        arguments,
    };
    if let Some(Part::Scale { long }) = bench.arguments.part {
        eprintln!("{}, load {:?}", bench.server, load());
        return bench.scale(long).await;
    }
    let mut report = Report::new(&bench.server.settings().await?);
    eprintln!("{}, load {:?}", bench.server, load());
    for round in 1..=bench.arguments.rounds.max(1) {
        for workload in Workload::value_variants() {
            let only = &bench.arguments.only;
            if only.is_empty() || only.contains(workload) {
                bench.run(*workload, &mut report).await?;
                eprintln!("round {round}: {}", report.last());
            }
        }
    }
    if bench.arguments.json {
        println!("{:#}", report.json());
    } else {
        print!("{report}");
    }
    Ok(())
}

impl Bench {
    async fn run(&self, workload: Workload, report: &mut Report) -> anyhow::Result<()> {
        match workload {
            Workload::Emit => self.emit(report).await,
            Workload::EmitAll => self.emit_all(report).await,
            Workload::Drain => self.drain(report).await,
            Workload::Transaction => self.transactions(report, 8).await,
            Workload::Transactions => self.transactions(report, 32).await,
            Workload::Batch => self.batch(report).await,
            Workload::Pickup => self.pickup(report).await,
            Workload::Kill => self.kill(report).await,
            Workload::Snapshot => self.snapshot(report).await,
            Workload::Nodes => self.nodes(report).await,
            Workload::Start => self.start(report).await,
            Workload::Idle => self.idle(report).await,
        }
    }
}
