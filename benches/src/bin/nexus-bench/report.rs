//! What was measured, as a table and as JSON.

use std::{fmt, time::Duration};

use nexus_benches::{Spread, load, median};
use serde::Serialize;
use serde_json::{Value, json};

use super::cost::Cost;

/// A rate, and what it costs.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Measured {
    pub(crate) per_second: f64,
    cost: Option<Cost>,
}

impl Measured {
    #[expect(clippy::cast_precision_loss, reason = "no run takes long enough")]
    pub(crate) fn new(events: i64, took: Duration, cost: Option<Cost>) -> Self {
        Self {
            per_second: events as f64 / took.as_secs_f64(),
            cost,
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Pair {
    yardstick: Measured,
    nexus: Measured,
    ratio: f64,
}

/// All runs of a workload.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Runs {
    Ratio {
        target: f64,
        runs: Vec<Pair>,
    },
    Latency {
        target_ms: Option<(f64, f64)>,
        runs: Vec<Spread>,
    },
    Kill {
        runs: Vec<Kill>,
    },
    Idle {
        runs: Vec<Idle>,
    },
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Kill {
    seconds: f64,
    lost: i64,
    doubled: i64,
}

/// A node that has nothing to do; and its memory while its handler holds a thousand messages.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Idle {
    pub(crate) cpu_percent: f64,
    pub(crate) resident_mib: f64,
    pub(crate) in_flight_mib: f64,
    pub(crate) polls_per_second: f64,
    pub(crate) micros_per_poll: f64,
}

impl fmt::Display for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cpu_percent,
            resident_mib,
            in_flight_mib,
            polls_per_second,
            micros_per_poll,
        } = self;
        write!(
            f,
            "{cpu_percent:.2} % of a core, {resident_mib:.1} MiB ({in_flight_mib:.1} MiB with 1,000 messages in flight), {polls_per_second:.1} polls/s of {micros_per_poll:.1} µs"
        )
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Report {
    settings: Value,
    workloads: Vec<(String, Runs)>,
    #[serde(skip)]
    last: String,
}

impl Report {
    pub(crate) fn new(settings: &Value) -> Self {
        Self {
            settings: settings.clone(),
            workloads: Vec::new(),
            last: String::new(),
        }
    }

    fn of(&mut self, name: &str, new: Runs) -> &mut Runs {
        let place = self.workloads.iter().position(|(other, _)| other == name);
        let place = place.unwrap_or_else(|| {
            self.workloads.push((name.to_owned(), new));
            self.workloads.len() - 1
        });
        &mut self.workloads[place].1
    }

    pub(crate) fn ratio(&mut self, name: &str, target: f64, yardstick: Measured, nexus: Measured) {
        let ratio = nexus.per_second / yardstick.per_second;
        self.last = format!(
            "{name}: {:.0}/s of {:.0}/s, {ratio:.2}",
            nexus.per_second, yardstick.per_second
        );
        let new = Runs::Ratio {
            target,
            runs: Vec::new(),
        };
        if let Runs::Ratio { runs, .. } = self.of(name, new) {
            runs.push(Pair {
                yardstick,
                nexus,
                ratio,
            });
        }
    }

    pub(crate) fn latency(&mut self, name: &str, target_ms: Option<(f64, f64)>, spread: Spread) {
        self.last = format!("{name}: {spread}");
        eprintln!("{}", self.last);
        let new = Runs::Latency {
            target_ms,
            runs: Vec::new(),
        };
        if let Runs::Latency { runs, .. } = self.of(name, new) {
            runs.push(spread);
        }
    }

    pub(crate) fn kill(&mut self, took: Duration, lost: i64, doubled: i64) {
        let seconds = took.as_secs_f64();
        self.last =
            format!("W6: all done {seconds:.1} s after the kill, {lost} lost, {doubled} doubled");
        let name = "W6 kill in mid drain";
        if let Runs::Kill { runs } = self.of(name, Runs::Kill { runs: Vec::new() }) {
            runs.push(Kill {
                seconds,
                lost,
                doubled,
            });
        }
    }

    pub(crate) fn idle(&mut self, idle: Idle) {
        self.last = format!("idle: {idle}");
        if let Runs::Idle { runs } = self.of("idle node", Runs::Idle { runs: Vec::new() }) {
            runs.push(idle);
        }
    }

    /// The run that ended last, in a line.
    pub(crate) fn last(&self) -> &str {
        &self.last
    }

    pub(crate) fn json(&self) -> Value {
        json!({ "bench": "nexus-bench", "load": load(), "report": self })
    }
}

fn range(values: impl Iterator<Item = f64> + Clone) -> String {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(0.0, f64::max);
    format!("{low:.2}–{high:.2}")
}

fn cost(of: Option<Cost>) -> String {
    let Some(cost) = of else {
        return "–".to_owned();
    };
    let statements = cost
        .statements
        .map_or("–".to_owned(), |number| format!("{number:.3}"));
    format!(
        "{statements} / {:.3} / {:.0}",
        cost.transactions, cost.wal_bytes
    )
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "settings: {}\nload: {:?}\n", self.settings, load())?;
        writeln!(
            f,
            "| workload | yardstick/s | nexus/s | ratio (range) | target | statements / transactions / WAL bytes per event, yardstick | nexus |"
        )?;
        writeln!(f, "|---|---:|---:|---|---|---|---|")?;
        for (name, runs) in &self.workloads {
            if let Runs::Ratio { target, runs } = runs {
                let middle = median(runs, |run| run.ratio);
                writeln!(
                    f,
                    "| {name} | {:.0} | {:.0} | {:.2} ({}) | {target:.2} | {} | {} |",
                    middle.yardstick.per_second,
                    middle.nexus.per_second,
                    middle.ratio,
                    range(runs.iter().map(|run| run.ratio)),
                    cost(middle.yardstick.cost),
                    cost(middle.nexus.cost),
                )?;
            }
        }
        writeln!(
            f,
            "\n| workload | p50 ms | p99 ms (range) | max ms | target p50 / p99 |\n|---|---:|---|---:|---|"
        )?;
        for (name, runs) in &self.workloads {
            if let Runs::Latency { target_ms, runs } = runs {
                let middle = median(runs, |run| run.p99);
                writeln!(
                    f,
                    "| {name} | {:.1} | {:.1} ({}) | {:.1} | {} |",
                    middle.p50,
                    middle.p99,
                    range(runs.iter().map(|run| run.p99)),
                    middle.max,
                    target_ms.map_or("–".to_owned(), |(p50, p99)| format!("{p50} / {p99}"))
                )?;
            }
        }
        writeln!(f)?;
        for (name, runs) in &self.workloads {
            match runs {
                Runs::Kill { runs } => {
                    let all: Vec<String> = runs
                        .iter()
                        .map(|run| {
                            format!(
                                "{:.1} s ({} lost, {} doubled)",
                                run.seconds, run.lost, run.doubled
                            )
                        })
                        .collect();
                    writeln!(f, "{name}: all done after {}", all.join(", "))?;
                }
                Runs::Idle { runs } => {
                    let middle = median(runs, |run| run.cpu_percent);
                    writeln!(f, "{name}: {middle}")?;
                }
                Runs::Ratio { .. } | Runs::Latency { .. } => {}
            }
        }
        Ok(())
    }
}
