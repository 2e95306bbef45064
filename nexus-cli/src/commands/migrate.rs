//! `nexus migrate`

use clap::Subcommand;
use nexus::client::{SchemaStatus, SchemaStep};
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
        let before = match database.schema().await {
            Ok(status) => status,
            Err(error) => return Err(explain(error, database)),
        };
        match self {
            Self::Status => status(&before, &database.target(), console),
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
