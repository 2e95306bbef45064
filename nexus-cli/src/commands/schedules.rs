//! `nexus schedules`

use std::time::Duration;

use clap::{Args, Subcommand};
use nexus::{
    Misfire,
    client::{ScheduledTask, TaskRun},
    jiff::Timestamp,
};
use nexus_http::documents;
use serde_json::json;

use super::payload;
use crate::{
    console::{BAD, Cell, Console, GOOD, Table, WARN},
    moments::{self, full, relative},
    session::Session,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Schedules {
    /// List the scheduled tasks
    #[command(after_help = "Example: nexus schedules list")]
    List,
    /// Make a task that emits an event by the clock, or change one
    Add(Add),
    /// Pause a task until it is resumed, whatever is deployed meanwhile
    #[command(after_help = "Example: nexus schedules pause cleanup")]
    Pause {
        /// The task
        name: String,
    },
    /// Let a paused task go on from its next due time
    #[command(after_help = "Example: nexus schedules resume cleanup")]
    Resume {
        /// The task
        name: String,
    },
    /// Emit the event of a task now; its due times stay as they are
    #[command(after_help = "Example: nexus schedules run cleanup")]
    Run {
        /// The task
        name: String,
    },
    /// Remove a task that no app declares, with its history
    #[command(after_help = "Example: nexus schedules remove report-7 --yes")]
    Remove {
        /// The task
        name: String,
        /// Only tell whether it is there
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the newest runs of a task
    #[command(after_help = "Example: nexus schedules history cleanup --limit 50")]
    History {
        /// The task
        name: String,
        /// At most so many
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
        limit: u32,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
The payload is checked against the JSON Schema that an app has registered for the type.

Example: nexus schedules add report-7 '0 9 * * MON-FRI' report.due '{\"customer\": 7}' --tz Europe/Berlin")]
pub(crate) struct Add {
    /// Its name; the same name again changes the task
    name: String,
    /// When it is due: five fields, six with seconds first, or a name such as @hourly
    expression: String,
    /// The event type that it emits
    event_type: String,
    /// The payload, or - to read it from standard input
    #[arg(value_name = "JSON", allow_hyphen_values = true)]
    payload: String,
    /// The time zone that the expression counts in, such as Europe/Berlin; UTC if it is not given
    #[arg(long, value_name = "ZONE")]
    tz: Option<String>,
    /// What becomes of due times that no node was there to fire: `skip`, `fire_once` or `fire_all(CAP)`
    #[arg(long, default_value_t)]
    misfire: Misfire,
    /// How late a due time may be and still be fired for itself
    #[arg(long, value_name = "DURATION", value_parser = moments::duration, default_value = "60s")]
    grace: Duration,
    /// The version of the event type; the newest registered one if it is not given
    #[arg(long)]
    version: Option<u32>,
    /// The entity that the event is about
    #[arg(long)]
    key: Option<String>,
}

impl Schedules {
    pub(crate) async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let client = &session.client;
        match self {
            Self::List => {
                let tasks = client.schedules().await?;
                if console.is_json {
                    return console
                        .print_json_list(tasks.into_iter().map(documents::ScheduledTask::from));
                }
                if tasks.is_empty() {
                    return console.print("there is no scheduled task\n");
                }
                console.print(&table(&tasks, session.now).text(""))
            }
            Self::Add(add) => add.run(session, console).await,
            Self::Pause { name } => {
                client.pause_schedule(&name).await?;
                show(&name, session, console).await
            }
            Self::Resume { name } => {
                client.resume_schedule(&name).await?;
                show(&name, session, console).await
            }
            Self::Run { name } => {
                let event_id = client.run_schedule_now(&name).await?;
                if console.is_json {
                    console.print_json(&documents::Emitted { event_id })
                } else {
                    console.print(&format!("{event_id}\n"))
                }
            }
            Self::Remove { name, dry_run } => remove(&name, dry_run, session, console).await,
            Self::History { name, limit } => {
                let runs = client.schedule_history(&name, limit).await?;
                history(runs, session, console)
            }
        }
    }
}

impl Add {
    async fn run(self, session: &Session, console: &Console) -> anyhow::Result<()> {
        let payload = payload(&self.payload)?;
        let client = &session.client;
        let version = client
            .check_json(&self.event_type, self.version, &payload)
            .await?;
        let mut task = client
            .schedule_json(&self.name, &self.expression, &self.event_type, &payload)
            .event_version(version)
            .misfire(self.misfire)
            .grace(self.grace);
        if let Some(zone) = self.tz {
            task = task.tz(zone);
        }
        if let Some(key) = self.key {
            task = task.event_key(key);
        }
        task.await?;
        show(&self.name, session, console).await
    }
}

/// The task as it is now.
async fn show(name: &str, session: &Session, console: &Console) -> anyhow::Result<()> {
    let tasks = session.client.schedules().await?;
    let Some(task) = tasks.into_iter().find(|task| task.name == name) else {
        anyhow::bail!("scheduled task `{name}` was removed meanwhile");
    };
    if console.is_json {
        return console.print_json(&documents::ScheduledTask::from(task));
    }
    console.print(&table(&[task], session.now).text(""))
}

async fn remove(
    name: &str,
    is_dry: bool,
    session: &Session,
    console: &Console,
) -> anyhow::Result<()> {
    let tasks = session.client.schedules().await?;
    let Some(task) = tasks.iter().find(|task| task.name == name) else {
        let known: Vec<&str> = tasks.iter().map(|task| task.name.as_str()).collect();
        anyhow::bail!(
            "namespace `{}` has no scheduled task `{name}`; it has {}",
            session.client.namespace(),
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        );
    };
    if !is_dry {
        session
            .ask(
                console,
                &format!(
                    "scheduled task `{name}` ({}) will be removed with its history",
                    task.expression
                ),
            )
            .await?;
        session.client.unschedule(name).await?;
    }
    if console.is_json {
        return console.print_json(&json!({ "name": name, "isDryRun": is_dry }));
    }
    let is = if is_dry { "would be" } else { "is" };
    console.print(&format!("scheduled task `{name}` {is} removed\n"))
}

fn state(task: &ScheduledTask) -> Cell {
    if !task.is_active {
        Cell::new("inactive", BAD)
    } else if task.paused_at.is_some() {
        Cell::new("paused", WARN)
    } else {
        Cell::new("active", GOOD)
    }
}

pub(super) fn table(tasks: &[ScheduledTask], now: Timestamp) -> Table {
    let mut table = Table::new([
        "task",
        "state",
        "expression",
        "zone",
        "next",
        "last",
        "event type",
        "app",
        "error",
    ]);
    for task in tasks {
        let at = |at: Option<Timestamp>| at.map(|at| relative(now, at)).unwrap_or_default();
        table.row([
            (&task.name).into(),
            state(task),
            (&task.expression).into(),
            task.time_zone.as_deref().unwrap_or("UTC").into(),
            at(task.next_run_at).into(),
            at(task.last_run_at).into(),
            (&task.event_type).into(),
            task.app.as_deref().unwrap_or("-").into(),
            task.last_error.as_deref().unwrap_or_default().into(),
        ]);
    }
    table
}

fn history(runs: Vec<TaskRun>, session: &Session, console: &Console) -> anyhow::Result<()> {
    if console.is_json {
        return console.print_json_list(runs.into_iter().map(documents::TaskRun::from));
    }
    if runs.is_empty() {
        return console.print("it has not run in the last 30 days\n");
    }
    let mut table = Table::new(["due", "", "late by", ">event", "what"]);
    for run in runs {
        let late = run.fired_at.duration_since(run.due_at).unsigned_abs();
        let what = match (run.left_out, run.is_manual) {
            (Some(left), _) => {
                let count = left
                    .count
                    .map_or("more than 1000".to_owned(), |count| count.to_string());
                Cell::new(
                    format!(
                        "{count} due times were left out, since {}",
                        full(left.first)
                    ),
                    WARN,
                )
            }
            (None, true) => "by hand".into(),
            (None, false) => "".into(),
        };
        table.row([
            full(run.due_at).into(),
            relative(session.now, run.due_at).into(),
            moments::short(late).into(),
            run.event_id
                .map(|id| id.to_string())
                .unwrap_or_default()
                .into(),
            what,
        ]);
    }
    console.print(&table.text(""))
}
