//! Scheduled tasks: look, pause, resume, run.

use std::sync::Arc;

use axum::{Json, extract::State};
use jiff::Timestamp;
use nexus::{
    Misfire,
    client::{ScheduledTask, TaskRun},
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use crate::{
    Service, Shared,
    events::page,
    extract::{Path, Query},
    openapi::{Missing, Refusals},
    problem::{Kind, Problem, ProblemDocument},
};

pub(crate) fn reading() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(show))
        .routes(routes!(history))
}

pub(crate) fn steering() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(run))
}

/// A cron expression that emits an event.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ScheduledTask)]
struct Task {
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

impl From<ScheduledTask> for Task {
    fn from(task: ScheduledTask) -> Self {
        Self {
            task_id: task.id,
            name: task.name,
            app: task.app,
            cron_expression: task.expression,
            timezone: task.time_zone,
            event_type: task.event_type,
            event_version: task.event_version,
            misfire: match task.misfire {
                Misfire::Skip => "skip".to_owned(),
                Misfire::FireOnce => "fire_once".to_owned(),
                Misfire::FireAll { cap } => format!("fire_all({cap})"),
                other => format!("{other:?}"),
            },
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
#[schema(as = TaskRun)]
struct Run {
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
struct LeftOut {
    /// The oldest of them.
    first: Timestamp,
    /// The newest of them.
    last: Timestamp,
    /// How many they are; null if more than a thousand.
    count: Option<u64>,
}

impl From<TaskRun> for Run {
    fn from(run: TaskRun) -> Self {
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

/// List the scheduled tasks
#[utoipa::path(get, path = "/schedules", tag = "schedules",
    responses((status = 200, description = "The tasks, by name.", body = Vec<Task>), Refusals))]
async fn list(State(service): Shared) -> Result<Json<Vec<Task>>, Problem> {
    let tasks = service.client.schedules().await?;
    Ok(Json(tasks.into_iter().map(Task::from).collect()))
}

async fn task(service: &Service, name: &str) -> Result<Json<Task>, Problem> {
    let tasks = service.client.schedules().await?;
    let found = tasks.into_iter().find(|task| task.name == name);
    let task = found.ok_or_else(|| {
        let namespace = service.client.namespace();
        Problem::new(
            Kind::NotFound,
            format!("namespace `{namespace}` has no scheduled task `{name}`"),
        )
    })?;
    Ok(Json(task.into()))
}

/// Show a scheduled task
#[utoipa::path(get, path = "/schedules/{name}", tag = "schedules",
    params(("name" = String, Path, description = "The task.")),
    responses((status = 200, description = "The task.", body = Task), Missing, Refusals))]
async fn show(State(service): Shared, Path(name): Path<String>) -> Result<Json<Task>, Problem> {
    task(&service, &name).await
}

/// How many.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wanted {
    /// At most so many; 50 if it is not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// Show the newest runs of a task
#[utoipa::path(get, path = "/schedules/{name}/history", tag = "schedules",
    params(("name" = String, Path, description = "The task."), Wanted),
    responses((status = 200, description = "The runs, the newest first.", body = Vec<Run>), Missing, Refusals))]
async fn history(
    State(service): Shared,
    Path(name): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<Vec<Run>>, Problem> {
    let limit = page(wanted.limit)?;
    let runs = service.client.schedule_history(&name, limit).await?;
    Ok(Json(runs.into_iter().map(Run::from).collect()))
}

/// Pause a task
///
/// Until it is resumed, whatever is deployed meanwhile.
#[utoipa::path(post, path = "/schedules/{name}/pause", tag = "schedules",
    params(("name" = String, Path, description = "The task.")),
    responses((status = 200, description = "The task as it is now.", body = Task), Missing, Refusals))]
async fn pause(State(service): Shared, Path(name): Path<String>) -> Result<Json<Task>, Problem> {
    service.client.pause_schedule(&name).await?;
    task(&service, &name).await
}

/// Let a paused task go on
///
/// From its next due time.
#[utoipa::path(post, path = "/schedules/{name}/resume", tag = "schedules",
    params(("name" = String, Path, description = "The task.")),
    responses((status = 200, description = "The task as it is now.", body = Task), Missing, Refusals))]
async fn resume(State(service): Shared, Path(name): Path<String>) -> Result<Json<Task>, Problem> {
    service.client.resume_schedule(&name).await?;
    task(&service, &name).await
}

/// What a task has emitted.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Emitted {
    /// The event's id.
    event_id: i64,
}

/// Emit the event of a task now
///
/// Its due times stay as they are.
#[utoipa::path(post, path = "/schedules/{name}/run", tag = "schedules",
    params(("name" = String, Path, description = "The task.")),
    responses(
        (status = 200, description = "The event.", body = Emitted),
        (status = 409, description = "The task is inactive.", body = ProblemDocument<'static>, content_type = "application/problem+json"),
        Missing,
        Refusals,
    ))]
async fn run(State(service): Shared, Path(name): Path<String>) -> Result<Json<Emitted>, Problem> {
    let event_id = service.client.run_schedule_now(&name).await?;
    Ok(Json(Emitted { event_id }))
}
