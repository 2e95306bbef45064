//! The faults, in the order in which they run.

mod clock;
mod deploys;
mod disk;
mod horizon;
mod kills;
mod malformed;
mod network;
mod pauses;
mod points;
mod restarts;
mod sessions;
mod ticks;

use std::time::Duration;

use anyhow::ensure;

use crate::{
    cluster::Cluster,
    report::{Outcome, table},
};

/// How hard and how long things are broken.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) is_long: bool,
    pub(crate) seed: u64,
}

impl Plan {
    pub(crate) fn new(is_long: bool, seed: Option<u64>) -> Self {
        Self {
            is_long,
            seed: seed.unwrap_or_else(|| fastrand::u64(..1_000_000)),
        }
    }

    /// The one of the form that runs.
    pub(crate) fn pick<T>(&self, short: T, long: T) -> T {
        if self.is_long { long } else { short }
    }

    /// The default in the long form; less in the short one, which waits for it again and again.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(self.pick(3, 10))
    }

    /// The choices of a fault, whichever others run.
    pub(crate) fn random(&self, fault: &str) -> fastrand::Rng {
        let name = fault.bytes().fold(self.seed, |seed, byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        fastrand::Rng::with_seed(name)
    }
}

/// A time between two.
pub(crate) fn between(random: &mut fastrand::Rng, least: f64, most: f64) -> Duration {
    Duration::from_secs_f64(least + (most - least) * random.f64())
}

/// A fault by its name.
pub(crate) struct Fault {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
}

const fn fault(name: &'static str, what: &'static str) -> Fault {
    Fault { name, what }
}

pub(crate) const FAULTS: [Fault; 12] = [
    fault(
        "kills",
        "SIGKILL of three workers and an emitter at random moments",
    ),
    fault(
        "points",
        "SIGKILL right before and after each kind of commit",
    ),
    fault(
        "restarts",
        "PostgreSQL is stopped in immediate mode and restarted, again and again",
    ),
    fault(
        "sessions",
        "sessions are ended, statements cancelled, a backend killed, the server frozen",
    ),
    fault(
        "network",
        "the line is slow, silent, cut, and cut between a commit and its answer",
    ),
    fault("pauses", "SIGSTOP beyond the lease, then SIGCONT"),
    fault(
        "deploys",
        "twenty nodes start, stop and are redeployed with other handlers and schedules",
    ),
    fault(
        "horizon",
        "a transaction is held open, which keeps dead rows from being removed",
    ),
    fault("disk", "the disk of the database is full for a while"),
    fault(
        "clock",
        "the clocks of nodes are an hour off, in both directions",
    ),
    fault(
        "ticks",
        "four nodes, 200 scheduled tasks each second, a kill each second",
    ),
    fault(
        "malformed",
        "malformed messages and headers are put into queues by hand",
    ),
];

/// The database of a fault.
pub(crate) fn database(fault: &str) -> String {
    format!("faults_{}", fault.replace('-', "_"))
}

/// Runs the faults and prints what came of them.
pub(crate) async fn run(plan: Plan, only: &[String], json: bool) -> anyhow::Result<Vec<Outcome>> {
    for name in only {
        ensure!(
            FAULTS.iter().any(|fault| fault.name == name),
            "there is no fault `{name}`; there are {}",
            FAULTS.map(|fault| fault.name).join(", ")
        );
    }
    let form = plan.pick("short", "long");
    println!("the {form} form, seed {}", plan.seed);
    let mut cluster = Cluster::start().await?;
    let mut outcomes = Vec::new();
    for fault in FAULTS {
        if !only.is_empty() && !only.iter().any(|name| name == fault.name) {
            continue;
        }
        println!("\n{}: {}", fault.name, fault.what);
        let outcome = play(fault.name, &plan, &mut cluster).await;
        cluster.drop_database(&database(fault.name)).await?;
        let outcome = outcome.unwrap_or_else(|error| {
            let mut outcome = Outcome::default();
            outcome.violation(format!("{error:#}"));
            outcome
        });
        let outcome = Outcome {
            fault: fault.name,
            ..outcome
        };
        println!(
            "  {} emitted, {} effects, {} lost, {} doubled, {} at least once again, recovery {:.1} s ({:.0} s)",
            outcome.emitted,
            outcome.effects,
            outcome.lost,
            outcome.doubled,
            outcome.again,
            outcome.recovery_seconds,
            outcome.seconds
        );
        print!("{}", outcome.details());
        if json {
            println!("{}", serde_json::to_string(&outcome)?);
        }
        outcomes.push(outcome);
    }
    println!("\n{form} form, seed {}\n\n{}", plan.seed, table(&outcomes));
    Ok(outcomes)
}

async fn play(name: &str, plan: &Plan, cluster: &mut Cluster) -> anyhow::Result<Outcome> {
    match name {
        "kills" => kills::play(plan, cluster).await,
        "points" => points::play(plan, cluster).await,
        "restarts" => restarts::play(plan, cluster).await,
        "sessions" => sessions::play(plan, cluster).await,
        "network" => network::play(plan, cluster).await,
        "pauses" => pauses::play(plan, cluster).await,
        "deploys" => deploys::play(plan, cluster).await,
        "horizon" => horizon::play(plan, cluster).await,
        "disk" => disk::play(plan).await,
        "clock" => clock::play(plan, cluster).await,
        "ticks" => ticks::play(plan, cluster).await,
        "malformed" => malformed::play(plan, cluster).await,
        _ => anyhow::bail!("fault `{name}` has no script"),
    }
}
