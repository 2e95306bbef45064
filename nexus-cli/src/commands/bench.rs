//! `nexus bench`

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use nexus::{
    App, Client, Handle, StartError, UntypedHandler,
    client::{ConnectError, Leftovers},
};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinSet};

use super::count;
use crate::{
    Global,
    console::{Console, Table},
    failure::{Interrupted, usage},
    moments,
    session::{Missing, Place, Settings, explain},
};

/// The group, and the app, that all runs share.
const GROUP: &str = "bench";
const HANDLER: &str = "measure";

/// How long tidying up may take. The server's answers have their own limits below it.
const TIDYING: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
#[command(after_help = "\
A node in this process emits the events and handles them. It works in a namespace of its own, `bench`, or in the one that
--namespace names (CORE_NAMESPACE does not count here), and is refused where other handlers are subscribed to the type.
Afterwards its subscription is given up and its queue is empty; the events stay in the log until the retention has passed.

Example: nexus bench --total 2000 --concurrency 32")]
pub(crate) struct Bench {
    /// How many events; `BENCH_TOTAL`, else 200. Some more are emitted before, to warm up
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    total: Option<u32>,
    /// How many are emitted at once, and handled at once; `BENCH_CONCURRENCY`, else 16
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    concurrency: Option<u32>,
    /// Their type; `BENCH_EVENT_TYPE`, else `benchmark.event`
    #[arg(long, value_name = "TYPE")]
    event_type: Option<String>,
    /// Give up after so long, such as 90s or 10m
    #[arg(long, value_name = "DURATION", value_parser = moments::duration, default_value = "5m")]
    limit: Duration,
}

/// What a run is about.
struct Plan {
    namespace: String,
    event_type: String,
    total: usize,
    /// Events before those that are measured.
    warm_up: usize,
    concurrency: u32,
}

impl Bench {
    fn plan(self, global: &Global, settings: &Settings) -> anyhow::Result<Plan> {
        let number = |flag: Option<u32>, variable, most, default| match flag {
            Some(number) => Ok(number),
            None => from_settings(settings, variable, most, default),
        };
        let total = number(self.total, "BENCH_TOTAL", 1_000_000, 200)?;
        let concurrency = number(self.concurrency, "BENCH_CONCURRENCY", 256, 16)?;
        let named = || settings.first(&["BENCH_EVENT_TYPE"]);
        let event_type = self
            .event_type
            .or_else(|| named().map(|(name, _)| name))
            .unwrap_or_else(|| "benchmark.event".to_owned());
        Ok(Plan {
            namespace: global.namespace.clone().unwrap_or_else(|| GROUP.to_owned()),
            event_type,
            total: total as usize,
            // Statements are planned and connections made by then.
            warm_up: total.min(2 * concurrency) as usize,
            concurrency,
        })
    }

    pub(crate) async fn run(self, global: &Global, console: &Console) -> anyhow::Result<()> {
        let place = Place::find(global, Missing::IsAnError).await?;
        let limit = self.limit;
        let plan = self.plan(global, &place.settings)?;
        let run = Arc::new(Run::new(&plan));
        refuse_where_others_listen(&plan, &place).await?;
        console.begin("starting");
        let handle = start(&plan, &place, &run).await;
        let handle = handle.inspect_err(|_| console.clear())?;
        let measured = tokio::select! {
            measured = measure(&plan, &run, &handle, console) => measured,
            () = tokio::time::sleep(limit) => Err(anyhow::anyhow!(
                "{} of {} were handled within {limit:?}: see what holds the database up by `nexus status --namespace {}`, \
                 or give it longer by --limit",
                run.handled(),
                count((plan.warm_up + plan.total) as u64, "event"),
                plan.namespace
            )),
            _ = tokio::signal::ctrl_c() => Err(Interrupted.into()),
        };
        console.clear();
        let tidied = tokio::select! {
            tidied = tokio::time::timeout(TIDYING, tidy_up(&plan, &place, handle)) => {
                tidied.unwrap_or_else(|_| Err(anyhow::anyhow!("the database gave no answer within {TIDYING:?}")))
            }
            _ = tokio::signal::ctrl_c() => Err(Interrupted.into()),
        };
        if let Err(error) = tidied {
            console.say(&format!(
                "could not tidy up: {error:#}; once the node is gone, in 15 s at most, run `nexus groups retire {GROUP} {HANDLER} \
                 --drop --namespace {}`",
                plan.namespace
            ));
        }
        report(&plan, &measured?, console)
    }
}

fn from_settings(
    settings: &Settings,
    variable: &str,
    most: u32,
    default: u32,
) -> anyhow::Result<u32> {
    let Some((value, source)) = settings.first(&[variable]) else {
        return Ok(default);
    };
    let number = value.trim().parse().ok();
    number
        .filter(|number| (1..=most).contains(number))
        .ok_or_else(|| {
            usage(format!(
                "{source} is `{value}`, expected a number from 1 to {most}"
            ))
        })
}

/// Whoever else is subscribed to the type would be sent every event.
async fn refuse_where_others_listen(plan: &Plan, place: &Place) -> anyhow::Result<()> {
    let client = match Client::attach(&place.database, &plan.namespace).await {
        Ok(client) => client,
        // It is made by the start.
        Err(ConnectError::UnknownNamespace { .. }) => return Ok(()),
        Err(error) => return Err(explain(error, &place.database)),
    };
    let (namespace, event_type) = (&plan.namespace, &plan.event_type);
    let other = client.subscriptions().await?.into_iter().find(|other| {
        other.event_type == *event_type && (&*other.group, &*other.handler) != (GROUP, HANDLER)
    });
    if let Some(other) = other {
        anyhow::bail!(
            "handler `{}` of group `{}` in namespace `{namespace}` is subscribed to `{event_type}` and would be sent every \
             event: give another --event-type, or leave --namespace out",
            other.handler,
            other.group
        );
    }
    refuse_beside_another(plan, &client, None).await
}

/// Two runs would take each other's events.
async fn refuse_beside_another(
    plan: &Plan,
    client: &Client,
    own: Option<&str>,
) -> anyhow::Result<()> {
    let nodes = client.nodes().await?;
    let another = nodes.iter().find(|node| {
        let is_ours = |handler: &nexus::client::NodeHandler| handler.group == GROUP;
        node.is_live && Some(&*node.id) != own && node.handlers.iter().any(is_ours)
    });
    if let Some(node) = another {
        anyhow::bail!(
            "node `{}` handles group `{GROUP}` in namespace `{}` already: wait until that run is done (one that was killed \
             counts as live for 15 s), or give a --namespace of its own",
            node.id,
            plan.namespace
        );
    }
    Ok(())
}

async fn start(plan: &Plan, place: &Place, run: &Arc<Run>) -> anyhow::Result<Handle> {
    let of_handler = Arc::clone(run);
    let handler = UntypedHandler::new(&*plan.event_type, HANDLER, move |event, _| {
        of_handler.note(&event);
        async { Ok(()) }
    });
    let for_ever = Duration::from_hours(24 * 365 * 100);
    let app = App::discover()
        .name(GROUP)
        .namespace(&*plan.namespace)
        .display_name("nexus bench")
        .handle(handler.concurrency(plan.concurrency))
        .database_url(&*place.url)
        .pooler(place.pooler)
        .connect_timeout(Duration::ZERO)
        .pool_size(plan.concurrency.min(64) + 2)
        // Neither that of a node which works here, nor anything that would drop what others want to keep.
        .node_id(format!("bench-{}", &run.id[..12]))
        .log_retention(for_ever)
        .dead_letter_retention(for_ever)
        .shutdown_timeout(Duration::from_secs(2));
    let handle = match nexus::start(app).await {
        Ok(handle) => handle,
        Err(StartError::Connect(error)) => return Err(explain(error, &place.database)),
        Err(error) => return Err(error.into()),
    };
    let own = handle.node_id().to_owned();
    if let Err(error) = refuse_beside_another(plan, handle.client(), Some(&own)).await {
        handle.shutdown().await;
        return Err(error);
    }
    Ok(handle)
}

/// Leaves nothing but the events in the log, an empty queue, and the namespace.
async fn tidy_up(plan: &Plan, place: &Place, handle: Handle) -> anyhow::Result<()> {
    handle.shutdown().await;
    let client = Client::attach(&place.database, &plan.namespace).await?;
    client.retire(GROUP, HANDLER, Leftovers::Drop).await?;
    Ok(())
}

/// The events of this run, those of the warm-up first, and when each of them began to be handled.
struct Run {
    id: String,
    begun: Vec<OnceLock<Instant>>,
    handled: watch::Sender<usize>,
}

impl Run {
    fn new(plan: &Plan) -> Self {
        Self {
            id: uuid::Uuid::new_v4().simple().to_string(),
            begun: vec![OnceLock::new(); plan.warm_up + plan.total],
            handled: watch::Sender::new(0),
        }
    }

    fn payload(&self, number: usize) -> Value {
        json!({ "run": self.id, "number": number })
    }

    /// Once for each event, however often it is delivered. Those of a run that was killed do not count.
    fn note(&self, event: &Value) {
        if event["run"] != self.id {
            return;
        }
        let number = event["number"].as_u64().unwrap_or(u64::MAX);
        let begun = usize::try_from(number).ok().and_then(|n| self.begun.get(n));
        if begun.is_some_and(|begun| begun.set(Instant::now()).is_ok()) {
            self.handled.send_modify(|handled| *handled += 1);
        }
    }

    fn handled(&self) -> usize {
        *self.handled.borrow()
    }

    /// Waits until so many events were handled.
    async fn reaches(&self, handled: usize) {
        let mut now = self.handled.subscribe();
        // Fails without a sender, which is a field beside it.
        let _ = now.wait_for(|now| *now >= handled).await;
    }
}

/// What was measured.
struct Measured {
    produce: Duration,
    end_to_end: Duration,
    consume: Duration,
    /// Sorted.
    emits: Vec<Duration>,
    /// From the call of emit to that of the handler; sorted.
    starts: Vec<Duration>,
}

async fn measure(
    plan: &Plan,
    run: &Arc<Run>,
    handle: &Handle,
    console: &Console,
) -> anyhow::Result<Measured> {
    let client = handle.client();
    console.begin("warming up");
    emit(plan, run, client, 0..plan.warm_up).await?;
    run.reaches(plan.warm_up).await;
    // What a run before it has left there is gone as well then.
    handle.idle().await.context("could not look for messages")?;

    console.begin("measuring");
    let (bar, all) = (console.progress(), plan.warm_up + plan.total);
    let begun = Instant::now();
    let emitted = async {
        let emitted = emit(plan, run, client, plan.warm_up..all).await?;
        anyhow::Ok((emitted, begun.elapsed()))
    };
    let mut measured = std::pin::pin!(async {
        let (emitted, ()) = tokio::join!(emitted, run.reaches(all));
        emitted
    });
    let (emitted, produce) = loop {
        tokio::select! {
            measured = &mut measured => break measured?,
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                let handled = run.handled().saturating_sub(plan.warm_up);
                bar.set_message(format!("{handled} of {} handled", plan.total));
            }
        }
    };
    let begun_at = |number: usize| *run.begun[number].get().expect("every event was handled");
    let handled = (plan.warm_up..all).map(begun_at);
    let (first, last) = (handled.clone().min(), handled.max());
    let (first, last) = (first.unwrap_or(begun), last.unwrap_or(begun));
    let mut emits: Vec<Duration> = emitted.values().map(|(_, took)| *took).collect();
    let mut starts: Vec<Duration> = emitted
        .iter()
        .map(|(number, (at, _))| begun_at(*number).duration_since(*at))
        .collect();
    emits.sort_unstable();
    starts.sort_unstable();
    Ok(Measured {
        produce,
        end_to_end: last - begun,
        consume: last - first,
        emits,
        starts,
    })
}

/// Emits the events of these numbers, each task one after the other. Returns when each was emitted, and how long that
/// took.
async fn emit(
    plan: &Plan,
    run: &Arc<Run>,
    client: &Client,
    numbers: std::ops::Range<usize>,
) -> anyhow::Result<HashMap<usize, (Instant, Duration)>> {
    let mut emitters = JoinSet::new();
    for first in 0..plan.concurrency as usize {
        let (client, run) = (client.clone(), Arc::clone(run));
        let event_type = plan.event_type.clone();
        let own = numbers
            .clone()
            .skip(first)
            .step_by(plan.concurrency as usize);
        emitters.spawn(async move {
            let mut emitted = Vec::new();
            for number in own {
                let payload = run.payload(number);
                let at = Instant::now();
                client.emit_undeclared(&event_type, 1, &payload)?.await?;
                emitted.push((number, (at, at.elapsed())));
            }
            anyhow::Ok(emitted)
        });
    }
    let mut emitted = HashMap::new();
    while let Some(done) = emitters.join_next().await {
        emitted.extend(done.context("an emitter did not end")??);
    }
    Ok(emitted)
}

/// The duration that so many percent of all do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted[rank.saturating_sub(1).min(sorted.len() - 1)]
}

/// In milliseconds, to the microsecond.
fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

const PERCENTILES: [(&str, usize); 5] = [
    ("p50", 50),
    ("p90", 90),
    ("p95", 95),
    ("p99", 99),
    ("max", 100),
];

fn percentiles(sorted: &[Duration]) -> Value {
    let each = PERCENTILES.iter();
    each.map(|(name, percent)| ((*name).to_owned(), json!(ms(percentile(sorted, *percent)))))
        .collect()
}

fn report(plan: &Plan, measured: &Measured, console: &Console) -> anyhow::Result<()> {
    #[expect(clippy::cast_precision_loss, reason = "a million at most")]
    let rate = plan.total as f64 / measured.end_to_end.as_secs_f64();
    let rate = (rate * 100.0).round() / 100.0;
    if console.is_json {
        return console.print_json(&json!({
            "totalEvents": plan.total,
            "concurrency": plan.concurrency,
            "produceDurationMs": ms(measured.produce),
            "endToEndDurationMs": ms(measured.end_to_end),
            "consumerDurationMs": ms(measured.consume),
            "throughputPerSecond": rate,
            "emitMs": percentiles(&measured.emits),
            "emitToStartMs": percentiles(&measured.starts),
            "warmUpEvents": plan.warm_up,
            "namespace": plan.namespace,
            "eventType": plan.event_type,
        }));
    }
    let mut figures = Table::new(["", ">"]);
    for (name, value) in [
        ("totalEvents", plan.total.to_string()),
        ("concurrency", plan.concurrency.to_string()),
        ("produceDurationMs", ms(measured.produce).to_string()),
        ("endToEndDurationMs", ms(measured.end_to_end).to_string()),
        ("consumerDurationMs", ms(measured.consume).to_string()),
        ("throughputPerSecond", rate.to_string()),
    ] {
        figures.row([name.into(), value.into()]);
    }
    let mut spread = Table::new(["milliseconds", ">p50", ">p90", ">p95", ">p99", ">max"]);
    for (name, sorted) in [
        ("emit", &measured.emits),
        ("emit to start", &measured.starts),
    ] {
        let mut cells = vec![name.into()];
        let values = PERCENTILES.iter().map(|(_, p)| percentile(sorted, *p));
        cells.extend(values.map(|value| format!("{:.3}", ms(value)).into()));
        spread.push(cells);
    }
    console.print(&format!(
        "{}\n{}\n{} `{}` stay in the log of namespace {}\n",
        figures.text(""),
        spread.text(""),
        count((plan.warm_up + plan.total) as u64, "event"),
        plan.event_type,
        plan.namespace
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let sorted: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        let of = |sorted: &[Duration], percent| percentile(sorted, percent).as_millis();
        assert_eq!(of(&sorted, 50), 100);
        assert_eq!(of(&sorted, 99), 198);
        assert_eq!(of(&sorted, 100), 200);
        assert_eq!(of(&sorted[..1], 50), 1);
        assert_eq!(of(&sorted[..3], 50), 2);
    }
}
