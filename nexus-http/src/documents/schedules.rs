//! Scheduled tasks and their runs.

use jiff::Timestamp;
use nexus::client;
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

/// A cron expression that emits an event.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScheduledTask {
    /// Its id.
    task_id: Uuid,
    /// Its name.
    name: String,
    /// The app that declares it; null for a task that was made at run time.
    app: Option<String>,
    /// When it is due.
    cron_expression: String,
    /// The time zone; null is UTC.
    timezone: Option<String>,
    /// The event type that it emits.
    event_type: String,
    /// The version of that type.
    event_version: u32,
    /// What becomes of due times that no node was there to fire: `skip`, `fire_once`, `fire_all(100)`.
    misfire: String,
    /// How late a due time may be and still be fired for itself.
    grace_seconds: f64,
    /// Who fires it: `nexus` or `pg_cron`.
    scheduler: String,
    /// False if its app no longer declares it, or its next run could not be computed.
    is_active: bool,
    /// Since when it has been paused.
    paused_at: Option<Timestamp>,
    /// When it is due next.
    next_run_at: Option<Timestamp>,
    /// When it last emitted.
    last_run_at: Option<Timestamp>,
    /// Why a node made it inactive.
    last_error: Option<String>,
}

impl From<client::ScheduledTask> for ScheduledTask {
    fn from(task: client::ScheduledTask) -> Self {
        Self {
            task_id: task.id,
            name: task.name,
            app: task.app,
            cron_expression: task.expression,
            timezone: task.time_zone,
            event_type: task.event_type,
            event_version: task.event_version,
            misfire: task.misfire.to_string(),
            grace_seconds: task.grace.as_secs_f64(),
            scheduler: task.scheduler,
            is_active: task.is_active,
            paused_at: task.paused_at,
            next_run_at: task.next_run_at,
            last_run_at: task.last_run_at,
            last_error: task.last_error,
        }
    }
}

/// What became of a due time.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct TaskRun {
    /// When it was due.
    due_at: Timestamp,
    /// When it was fired, or left out.
    fired_at: Timestamp,
    /// The event that was emitted; null for due times that were left out.
    event_id: Option<i64>,
    /// Whether somebody ran it by hand.
    is_manual: bool,
    /// Due times in a row that nobody fired.
    left_out: Option<LeftOut>,
}

/// Due times in a row that nobody fired.
#[derive(Debug, Serialize, ToSchema)]
pub struct LeftOut {
    /// The oldest of them.
    first: Timestamp,
    /// The newest of them.
    last: Timestamp,
    /// How many they are; null if more than a thousand.
    count: Option<u64>,
}

impl From<client::TaskRun> for TaskRun {
    fn from(run: client::TaskRun) -> Self {
        Self {
            due_at: run.due_at,
            fired_at: run.fired_at,
            event_id: run.event_id,
            is_manual: run.is_manual,
            left_out: run.left_out.map(|left| LeftOut {
                first: left.first,
                last: left.last,
                count: left.count,
            }),
        }
    }
}

/// What a task has emitted.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Emitted {
    /// The event's id.
    pub event_id: i64,
}
