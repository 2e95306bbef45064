//! Scheduled tasks: look, pause, resume, run.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    documents::{Emitted, ScheduledTask, TaskRun},
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

/// List the scheduled tasks
#[utoipa::path(get, path = "/schedules", tag = "schedules",
    responses((status = 200, description = "The tasks, by name.", body = Vec<ScheduledTask>), Refusals))]
async fn list(State(service): Shared) -> Result<Json<Vec<ScheduledTask>>, Problem> {
    let tasks = service.client.schedules().await?;
    Ok(Json(tasks.into_iter().map(ScheduledTask::from).collect()))
}

async fn task(service: &Service, name: &str) -> Result<Json<ScheduledTask>, Problem> {
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
    responses((status = 200, description = "The task.", body = ScheduledTask), Missing, Refusals))]
async fn show(
    State(service): Shared,
    Path(name): Path<String>,
) -> Result<Json<ScheduledTask>, Problem> {
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
    responses((status = 200, description = "The runs, the newest first.", body = Vec<TaskRun>), Missing, Refusals))]
async fn history(
    State(service): Shared,
    Path(name): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<Vec<TaskRun>>, Problem> {
    let limit = page(wanted.limit)?;
    let runs = service.client.schedule_history(&name, limit).await?;
    Ok(Json(runs.into_iter().map(TaskRun::from).collect()))
}

/// Pause a task
///
/// Until it is resumed, whatever is deployed meanwhile.
#[utoipa::path(post, path = "/schedules/{name}/pause", tag = "schedules",
    params(("name" = String, Path, description = "The task.")),
    responses((status = 200, description = "The task as it is now.", body = ScheduledTask), Missing, Refusals))]
async fn pause(
    State(service): Shared,
    Path(name): Path<String>,
) -> Result<Json<ScheduledTask>, Problem> {
    service.client.pause_schedule(&name).await?;
    task(&service, &name).await
}

/// Let a paused task go on
///
/// From its next due time.
#[utoipa::path(post, path = "/schedules/{name}/resume", tag = "schedules",
    params(("name" = String, Path, description = "The task.")),
    responses((status = 200, description = "The task as it is now.", body = ScheduledTask), Missing, Refusals))]
async fn resume(
    State(service): Shared,
    Path(name): Path<String>,
) -> Result<Json<ScheduledTask>, Problem> {
    service.client.resume_schedule(&name).await?;
    task(&service, &name).await
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
