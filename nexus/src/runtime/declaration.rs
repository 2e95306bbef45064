use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use sqlx::PgConnection;

use crate::{
    schedule::{Misfire, Schedule, ScheduleError},
    store::{
        nodes, pg_cron,
        renames::{self, Outcome, Rename},
        scheduled_tasks::{self, TaskRename, TaskRow},
        subscriptions::{self, EventTypeRow},
    },
};

/// What a build declares of its app: event types, subscriptions, scheduled tasks.
#[derive(Debug)]
pub(crate) struct Declaration {
    pub(crate) event_types: Vec<EventTypeRow>,
    /// `[{"group", "handler", "eventType", "eventVersion"}]`.
    pub(crate) handlers: Value,
    pub(crate) tasks: Vec<DeclaredTask>,
    /// Former names of handlers.
    pub(crate) renames: Vec<Rename>,
    /// Former names of scheduled tasks.
    pub(crate) task_renames: Vec<TaskRename>,
}

/// A scheduled task of the program: a `#[cron]` function, event type or constant.
#[derive(Debug, Clone)]
pub(crate) struct DeclaredTask {
    pub(crate) name: String,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) misfire: Misfire,
    pub(crate) grace: Duration,
    pub(crate) event_type: String,
    pub(crate) event_version: u32,
    /// JSON.
    pub(crate) payload: String,
    pub(crate) key: Option<String>,
    /// The expression as `pg_cron` reads it, if that is to fire the task.
    pub(crate) pg_cron_schedule: Option<String>,
}

impl DeclaredTask {
    pub(crate) fn next_after(&self, now: Timestamp) -> Result<Timestamp, ScheduleError> {
        Schedule::parse(&self.expression, self.time_zone.as_deref())?.next_after(now)
    }
}

impl Declaration {
    /// Whether the app was started with `pg_cron` as its scheduler, and has tasks.
    pub(crate) fn uses_pg_cron(&self) -> bool {
        self.tasks
            .iter()
            .any(|task| task.pg_cron_schedule.is_some())
    }

    /// Defines the node's app as this build declares it, unless a live build appeared after it: an old
    /// build that restarts in the middle of a roll-out takes nothing back. Returns whether it did.
    ///
    /// The transaction must hold the [lock](subscriptions::lock) on registrations.
    pub(crate) async fn declare(
        &self,
        node: &nodes::Node,
        connection: &mut PgConnection,
    ) -> sqlx::Result<bool> {
        let nodes::Node { namespace, app, .. } = node;
        if nodes::is_superseded(connection, node).await? {
            return Ok(false);
        }
        let now = scheduled_tasks::now(connection).await?;
        let mut tasks = Vec::with_capacity(self.tasks.len());
        for task in &self.tasks {
            match task.next_after(now) {
                Ok(next) => tasks.push(TaskRow {
                    name: task.name.clone(),
                    expression: task.expression.clone(),
                    time_zone: task.time_zone.clone(),
                    event_type: task.event_type.clone(),
                    event_version: task.event_version,
                    payload: task.payload.clone(),
                    key: task.key.clone(),
                    misfire: task.misfire,
                    grace: task.grace,
                    next_run_at: next,
                }),
                // Checked when the app started; since then its last time may have passed.
                Err(error) => tracing::error!(task = task.name, %error, "not scheduled"),
            }
        }
        self.rename(node, connection).await?;
        subscriptions::declare_event_types(connection, namespace, app, &self.event_types).await?;
        subscriptions::subscribe(connection, namespace, app, &self.handlers).await?;
        for task in scheduled_tasks::declare(connection, namespace, app, &tasks).await? {
            tracing::warn!(
                task,
                app,
                "this scheduled task was made at run time, from now on the app declares it"
            );
        }
        let for_pg_cron: Vec<(&str, &str)> = self
            .tasks
            .iter()
            .filter_map(|task| Some((task.name.as_str(), task.pg_cron_schedule.as_deref()?)))
            .collect();
        pg_cron::assign(connection, namespace, app, &for_pg_cron).await?;
        Ok(true)
    }

    /// Gives subscriptions and scheduled tasks of former names to the handlers and tasks that have them now.
    /// A build from before a rename, which defines the app after a roll-back, takes it back.
    async fn rename(&self, node: &nodes::Node, connection: &mut PgConnection) -> sqlx::Result<()> {
        let nodes::Node { namespace, app, .. } = node;
        let taken_back = renames::taken_back(connection, namespace, &self.handlers).await?;
        let mut task_renames = self.task_renames.clone();
        // The ticks of a function are events named for it.
        task_renames.extend(
            taken_back
                .iter()
                .filter(|rename| rename.event_type.starts_with("tick."))
                .map(|rename| TaskRename {
                    former: rename.former.clone(),
                    name: rename.handler.clone(),
                    event_type: Some(rename.event_type.clone()),
                }),
        );
        let names: Vec<&str> = self.tasks.iter().map(|task| task.name.as_str()).collect();
        task_renames.extend(scheduled_tasks::taken_back(connection, namespace, app, &names).await?);
        for rename in taken_back.iter().chain(&self.renames) {
            let Rename {
                group,
                former,
                handler,
                ..
            } = rename;
            match renames::apply(connection, namespace, app, rename).await? {
                None => {}
                Some(Outcome::Renamed) => {
                    tracing::info!(
                        group,
                        former,
                        handler,
                        "a handler is renamed, its messages follow"
                    );
                }
                Some(Outcome::Merged) => tracing::warn!(
                    group,
                    former,
                    handler,
                    "a handler and its former name were both subscribed; what only the former name was sent goes to the handler"
                ),
                Some(Outcome::OtherEvent(event_type)) => tracing::warn!(
                    group,
                    former,
                    handler,
                    "not renamed: the former name stands for `{event_type}`, which the handler does not take; what is sent to it waits"
                ),
            }
        }
        renames::forget_names_in_use(connection, namespace, &self.handlers).await?;
        scheduled_tasks::rename(connection, namespace, app, &task_renames).await
    }
}
