use jiff::Timestamp;
use serde_json::Value;
use sqlx::PgConnection;

use crate::{
    schedule::{Schedule, ScheduleError},
    store::{
        nodes,
        scheduled_tasks::{self, TaskRow},
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
}

/// A `#[cron]` function.
#[derive(Debug)]
pub(crate) struct DeclaredTask {
    pub(crate) name: String,
    pub(crate) expression: String,
    pub(crate) time_zone: Option<String>,
    pub(crate) event_type: String,
}

impl DeclaredTask {
    pub(crate) fn next_after(&self, now: Timestamp) -> Result<Timestamp, ScheduleError> {
        Schedule::parse(&self.expression, self.time_zone.as_deref())?.next_after(now)
    }
}

impl Declaration {
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
                    next_run_at_micros: next.as_microsecond(),
                }),
                // Checked when the app started; since then its last time may have passed.
                Err(error) => tracing::error!(task = task.name, %error, "not scheduled"),
            }
        }
        subscriptions::declare_event_types(connection, namespace, app, &self.event_types).await?;
        subscriptions::subscribe(connection, namespace, app, &self.handlers).await?;
        scheduled_tasks::declare(connection, namespace, app, &tasks).await?;
        Ok(true)
    }
}
