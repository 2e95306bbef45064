//! `nexus migrate`

use clap::Subcommand;
use nexus::{
    Database,
    client::{Adopted, RowCount, SchemaStatus, SchemaStep},
};
use serde_json::{Value, json};

use super::count;
use crate::{
    Global,
    console::{Cell, Console, GOOD, Table, WARN, indented},
    moments::full,
    session::{Missing, Place, explain},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Migrate {
    /// Show which migrations the database has; changes nothing
    #[command(
        after_help = "Example: nexus migrate status --database-url postgres://shop@localhost/shop"
    )]
    Status,
    /// Bring the schema to the version of this program, as an app does when it starts
    #[command(after_help = "Example: nexus migrate up --dry-run")]
    Up {
        /// Only tell what would be applied
        #[arg(long)]
        dry_run: bool,
    },
    /// Take over the schema of an original nexus-core, with its rows
    #[command(after_help = "\
In one transaction: the schema becomes core_original, where all of its rows stay, and what nexus can read is copied to its
own. docs/operations.md says what becomes of what, and how long it takes.

Example: nexus migrate adopt --dry-run")]
    Adopt {
        /// Give a namespace whose name nexus cannot have another one
        #[arg(long = "rename", value_name = "OLD=NEW", value_parser = renaming)]
        renames: Vec<(String, String)>,
        /// Do it although nodes of the original seem to run
        #[arg(long)]
        force: bool,
        /// Only tell what would be taken over
        #[arg(long)]
        dry_run: bool,
    },
    /// Take migrations back, with all that is in their tables; no app may be running
    #[command(after_help = "Example: nexus migrate down --to 17 --dry-run")]
    Down {
        /// The version to go back to; 0 removes the log, the queues and all that is in them
        #[arg(long, value_name = "VERSION")]
        to: u32,
        /// Only tell what would be taken back
        #[arg(long)]
        dry_run: bool,
    },
}

impl Migrate {
    pub(crate) async fn run(self, global: &Global, console: &Console) -> anyhow::Result<()> {
        let missing = match &self {
            Self::Up { dry_run: false } => Missing::IsMade,
            _ => Missing::IsAnError,
        };
        let place = Place::find(global, missing).await?;
        let database = &place.database;
        if let Self::Adopt {
            renames,
            force,
            dry_run,
        } = self
        {
            return adopt(database, renames, force, dry_run, console).await;
        }
        let before = match database.schema().await {
            Ok(status) => status,
            Err(error) => return Err(explain(error, database)),
        };
        match self {
            Self::Status | Self::Adopt { .. } => status(&before, &database.target(), console),
            Self::Up { dry_run } => {
                let missing = of(&before, |step| step.applied_at.is_none());
                if !dry_run && !missing.is_empty() {
                    console.begin("migrating");
                    let migrated = database.migrate().await;
                    console.clear();
                    migrated?;
                }
                let done = if dry_run {
                    "would be applied"
                } else {
                    "applied"
                };
                tell(&missing, done, dry_run, console)
            }
            Self::Down { to, dry_run } => {
                let applied = of(&before, |step| {
                    step.applied_at.is_some() && step.version > to
                });
                if !dry_run && !applied.is_empty() {
                    let target = database.target();
                    let steps = count(applied.len() as u64, "migration");
                    let what = match to {
                        0 => format!(
                            "the event log, the queues and all else of nexus in {target} will be deleted"
                        ),
                        _ => format!(
                            "{steps} of {target} will be taken back, with what is in their tables"
                        ),
                    };
                    console.ask(&what).await?;
                    console.begin("migrating");
                    let migrated = database.migrate_down(to).await;
                    console.clear();
                    migrated?;
                }
                let done = if dry_run {
                    "would be taken back"
                } else {
                    "taken back"
                };
                tell(&applied, done, dry_run, console)
            }
        }
    }
}

fn of(status: &SchemaStatus, is_meant: impl Fn(&SchemaStep) -> bool) -> Vec<SchemaStep> {
    let steps = status.steps.iter();
    steps.filter(|step| is_meant(step)).cloned().collect()
}

fn document(step: &SchemaStep) -> Value {
    json!({ "version": step.version, "name": step.name, "appliedAt": step.applied_at })
}

fn status(status: &SchemaStatus, target: &str, console: &Console) -> anyhow::Result<()> {
    let (version, needed) = (status.version(), status.needed());
    if console.is_json {
        return console.print_json(&json!({
            "database": target,
            "version": version,
            "needed": needed,
            "migrations": status.steps.iter().map(document).collect::<Value>(),
        }));
    }
    let mut table = Table::new(["migration", "applied"]);
    for step in &status.steps {
        table.row([
            step.name.into(),
            match step.applied_at {
                Some(at) => Cell::new(full(at), GOOD),
                None => Cell::new("not yet", WARN),
            },
        ]);
    }
    let what = match version {
        0 => format!("{target} has no schema of nexus; this program works with version {needed}"),
        _ if version == needed => {
            format!("{target} has version {version}, which this program works with")
        }
        _ => format!("{target} has version {version}, this program works with {needed}"),
    };
    console.print(&format!("{what}\n\n{}", table.text("")))
}

fn tell(steps: &[SchemaStep], done: &str, is_dry: bool, console: &Console) -> anyhow::Result<()> {
    if console.is_json {
        let names: Value = steps.iter().map(|step| step.name).collect();
        return console.print_json(&json!({ "migrations": names, "isDryRun": is_dry }));
    }
    let names: Vec<&str> = steps.iter().map(|step| step.name).collect();
    let steps = count(steps.len() as u64, "migration");
    console.print(&format!("{steps} {done}\n{}", indented(&names.join("\n"))))
}

fn renaming(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => {
            Ok((old.to_owned(), new.to_owned()))
        }
        _ => Err("expected OLD=NEW".to_owned()),
    }
}

async fn adopt(
    database: &Database,
    renames: Vec<(String, String)>,
    is_forced: bool,
    is_dry: bool,
    console: &Console,
) -> anyhow::Result<()> {
    let mut adoption = database.adopt();
    for (old, new) in renames {
        adoption = adoption.rename(old, new);
    }
    if is_forced {
        adoption = adoption.force();
    }
    let explained = |error| explain(error, database);
    let mut adopted = adoption.clone().dry_run().await.map_err(explained)?;
    if !is_dry {
        let what = format!(
            "the original nexus-core in {} with {} and {} will be taken over; nobody reaches its tables until that is done",
            database.target(),
            number(adopted.events, "event"),
            number(adopted.messages, "message"),
        );
        console.ask(&what).await?;
        console.begin("copying");
        let done = adoption.run().await;
        console.clear();
        adopted = done.map_err(explained)?;
    }
    if console.is_json {
        return console.print_json(&adopted_document(&adopted, is_dry));
    }
    console.print(&adopted_text(&adopted, is_dry))
}

fn number(rows: RowCount, what: &str) -> String {
    let about = if rows.is_estimate { "about " } else { "" };
    format!("{about}{}", count(rows.rows, what))
}

fn adopted_document(adopted: &Adopted, is_dry: bool) -> Value {
    let rows = |rows: RowCount| json!({ "rows": rows.rows, "isEstimate": rows.is_estimate });
    let namespaces = adopted.namespaces.iter();
    let zoned = adopted.zoned_tasks.iter();
    let unreadable = adopted.unreadable_tasks.iter();
    let left = adopted.left.iter();
    json!({
        "namespaces": namespaces.map(|(old, new)| json!({ "original": old, "namespace": new })).collect::<Value>(),
        "nodes": rows(adopted.nodes),
        "events": rows(adopted.events),
        "oldestEventAt": adopted.oldest_event_at,
        "messages": rows(adopted.messages),
        "deadLetters": rows(adopted.dead_letters),
        "tasks": adopted.tasks,
        "repeatedTasks": adopted.repeated_tasks,
        "zonedTasks": zoned.map(|(namespace, name)| json!({ "original": namespace, "name": name })).collect::<Value>(),
        "unreadableTasks": unreadable
            .map(|task| json!({ "original": task.namespace, "name": task.name, "error": task.error }))
            .collect::<Value>(),
        "cronJobs": adopted.cron_jobs,
        "isCronHidden": adopted.is_cron_hidden,
        "partmanTables": adopted.partman_tables,
        "left": left.map(|left| json!({ "what": left.what, "count": left.rows, "why": left.why })).collect::<Value>(),
        "isDryRun": is_dry,
    })
}

fn adopted_text(adopted: &Adopted, is_dry: bool) -> String {
    let mut table = Table::new(["", ">", ""]);
    let mut tell = |what: &str, number: u64, is_estimate: bool, note: String| {
        let about = if is_estimate { "about " } else { "" };
        table.row([what.into(), format!("{about}{number}").into(), note.into()]);
    };
    let renamed = adopted.namespaces.iter().filter(|(old, new)| old != new);
    let renamed: Vec<String> = renamed
        .map(|(old, new)| format!("{old} is {new}"))
        .collect();
    tell(
        "namespaces",
        adopted.namespaces.len() as u64,
        false,
        renamed.join(", "),
    );
    let nodes = "silent ones are forgotten after a day".to_owned();
    tell(
        "nodes",
        adopted.nodes.rows,
        adopted.nodes.is_estimate,
        nodes,
    );
    let since = adopted.oldest_event_at.map(|at| {
        format!(
            "since {}; nodes drop months that are older than their log_retention",
            full(at)
        )
    });
    tell(
        "events",
        adopted.events.rows,
        adopted.events.is_estimate,
        since.unwrap_or_default(),
    );
    let messages = "the first node takes them in".to_owned();
    tell(
        "messages",
        adopted.messages.rows,
        adopted.messages.is_estimate,
        messages,
    );
    let letters = adopted.dead_letters;
    tell(
        "dead letters",
        letters.rows,
        letters.is_estimate,
        "in group default".to_owned(),
    );
    let repeated = match adopted.repeated_tasks {
        0 => String::new(),
        number => format!("and {} of these, left out", count(number, "repetition")),
    };
    tell("scheduled tasks", adopted.tasks, false, repeated);
    tell(
        "jobs of pg_cron",
        adopted.cron_jobs,
        false,
        "unscheduled".to_owned(),
    );
    tell(
        "tables of pg_partman",
        adopted.partman_tables,
        false,
        "unregistered".to_owned(),
    );
    for left in &adopted.left {
        tell(
            left.what,
            left.rows,
            false,
            format!("left in core_original: {}", left.why),
        );
    }
    let done = if is_dry {
        "would be taken over"
    } else {
        "taken over"
    };
    let mut text = format!("{done}:\n{}", table.text("  "));
    for (namespace, name) in &adopted.zoned_tasks {
        text.push_str(&indented(&format!(
            "task {name} of {namespace} has a time zone, which the original ignored and nexus does not"
        )));
    }
    for task in &adopted.unreadable_tasks {
        text.push_str(&indented(&format!(
            "task {} of {} will be inactive: {}",
            task.name, task.namespace, task.error
        )));
    }
    if adopted.is_cron_hidden {
        text.push_str("  this role may not look into cron.job: have a superuser unschedule the jobs that call core.run_scheduled_task\n");
    }
    if !is_dry {
        text.push_str("  all rows of the original are kept in schema core_original; drop it when nobody needs it any more\n");
    }
    text
}
