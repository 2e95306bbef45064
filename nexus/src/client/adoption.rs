//! Taking over the schema of an original nexus-core.

use jiff::Timestamp;
use nexus_migrations::adopt;

use super::{ConnectError, Database};
use crate::{schedule::Schedule, store};

/// Takes over the schema of an original nexus-core: set options, then [`run`](Self::run) it. Made by
/// [`Database::adopt`].
#[must_use = "nothing is adopted until it is run"]
#[derive(Debug, Clone)]
pub struct Adoption<'a> {
    database: &'a Database,
    how: adopt::How,
}

/// What an [`Adoption`] took over, or would.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Adopted {
    /// The namespaces: the name of each in the original, and that in nexus.
    pub namespaces: Vec<(String, String)>,
    /// The nodes. They are listed as silent, and forgotten when they have been so for a day.
    pub nodes: RowCount,
    /// The events of the log.
    pub events: RowCount,
    /// When the oldest of them was emitted. Nodes drop months that ended before their
    /// [`log_retention`](crate::App::log_retention).
    pub oldest_event_at: Option<Timestamp>,
    /// The scheduled tasks.
    pub tasks: u64,
    /// Repetitions of these, each of which the original fired: one row of several that say the same is enough.
    pub repeated_tasks: u64,
    /// Tasks whose expression or time zone nexus cannot read. They are there, and the first node makes them inactive.
    pub unreadable_tasks: Vec<UnreadableTask>,
    /// Tasks with a time zone, which the original ignored and nexus does not: namespace in the original, and name.
    pub zoned_tasks: Vec<(String, String)>,
    /// Messages that wait. The first node adopts them, as it does with those of foreign programs: they get an id, a second
    /// row in the log, and go to all subscriptions of their types.
    pub messages: RowCount,
    /// Dead letters, in the group `default`.
    pub dead_letters: RowCount,
    /// Jobs of `pg_cron` that ran the tasks and are unscheduled.
    pub cron_jobs: u64,
    /// Whether the role may not look for such jobs. They would run tasks beside the nodes: have a superuser unschedule
    /// them.
    pub is_cron_hidden: bool,
    /// Tables that `pg_partman` looked after and does not any more.
    pub partman_tables: u64,
    /// What has no place in nexus, and is in the schema of the original alone.
    pub left: Vec<LeftRows>,
}

/// How many rows there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RowCount {
    /// The number.
    pub rows: u64,
    /// It is more than 100,000, and from the statistics of the server; never after a [`run`](Adoption::run).
    pub is_estimate: bool,
}

/// A scheduled task that nexus cannot read.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnreadableTask {
    /// The namespace, as the original has it.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub error: String,
}

/// Rows of the original that have no place in nexus.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeftRows {
    /// What they are, such as `nodes`.
    pub what: &'static str,
    /// How many.
    pub rows: u64,
    /// Why.
    pub why: &'static str,
}

impl From<adopt::Count> for RowCount {
    fn from(count: adopt::Count) -> Self {
        Self {
            rows: count.rows,
            is_estimate: count.is_estimate,
        }
    }
}

impl From<adopt::Adopted> for Adopted {
    fn from(adopted: adopt::Adopted) -> Self {
        let unreadable = adopted.tasks.iter().filter_map(|task| {
            let schedule = Schedule::parse(&task.expression, task.time_zone.as_deref());
            let due = schedule.and_then(|schedule| schedule.next_after(Timestamp::now()));
            Some(UnreadableTask {
                namespace: task.namespace.clone(),
                name: task.name.clone(),
                error: due.err()?.to_string(),
            })
        });
        let zoned = adopted.tasks.iter().filter(|task| task.time_zone.is_some());
        Self {
            tasks: adopted.tasks.len() as u64,
            unreadable_tasks: unreadable.collect(),
            zoned_tasks: zoned
                .map(|task| (task.namespace.clone(), task.name.clone()))
                .collect(),
            namespaces: adopted.namespaces,
            nodes: adopted.nodes.into(),
            events: adopted.events.into(),
            oldest_event_at: adopted.oldest.map(store::timestamp),
            repeated_tasks: adopted.repeated_tasks,
            messages: adopted.messages.into(),
            dead_letters: adopted.letters.into(),
            cron_jobs: adopted.cron_jobs,
            is_cron_hidden: adopted.is_cron_hidden,
            partman_tables: adopted.partman_tables,
            left: adopted
                .left
                .into_iter()
                .map(|left| LeftRows {
                    what: left.what,
                    rows: left.rows,
                    why: left.why,
                })
                .collect(),
        }
    }
}

impl Adoption<'_> {
    /// Gives a namespace another name, where nexus cannot have the one of the original.
    pub fn rename(mut self, original: impl Into<String>, name: impl Into<String>) -> Self {
        self.how.names.insert(original.into(), name.into());
        self
    }

    /// Does it although nodes of the original were heard of within five minutes, or sessions have called its functions.
    /// What they read from a queue from then on is lost to nexus.
    pub fn force(mut self) -> Self {
        self.how.is_forced = true;
        self
    }

    /// Tells what [`run`](Self::run) would do. Changes nothing, and counts up to 100,000 of each.
    ///
    /// # Errors
    ///
    /// As of [`run`](Self::run).
    pub async fn dry_run(self) -> Result<Adopted, ConnectError> {
        self.database.reach_directly().await?;
        let planned = adopt::plan(&self.database.options, &self.how);
        let planned = Box::pin(planned).await.map_err(ConnectError::Schema)?;
        Ok(planned.into())
    }

    /// Does it, in one transaction: the schema of the original becomes `core_original`, that of nexus is made beside it, and
    /// the rows are copied. Takes as long as it takes, about a minute for a few million events, and keeps everybody
    /// from the original's tables meanwhile.
    ///
    /// Nothing refers to `core_original` afterwards; drop it when you are sure.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Schema`]: there is no such schema, it is in use, or the role has not got the rights of its owner.
    ///
    /// # Cancel safety
    ///
    /// Dropped while it is awaited, it is undone, unless the commit had been sent.
    pub async fn run(self) -> Result<Adopted, ConnectError> {
        self.database.reach_directly().await?;
        let adopted = adopt::adopt(&self.database.options, &self.how);
        let adopted = Box::pin(adopted).await.map_err(ConnectError::Schema)?;
        Ok(adopted.into())
    }
}

impl Database {
    /// Takes over the schema of an original nexus-core that is in this database, with its rows.
    ///
    /// `docs/operations.md` says what becomes of what.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # use nexus::Database;
    /// # async fn example(database: &Database) -> nexus::Result {
    /// let plan = database.adopt().dry_run().await?;
    /// println!("{} events in {} namespaces", plan.events.rows, plan.namespaces.len());
    /// database.adopt().run().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn adopt(&self) -> Adoption<'_> {
        Adoption {
            database: self,
            how: adopt::How::default(),
        }
    }
}
