//! Whether the server is there, and whether it can work. Everybody may ask.

use axum::{Json, extract::State};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    problem::{Problem, ProblemDocument},
};

/// That it is well.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({ "status": "ok" }))]
struct Health {
    /// `ok`
    status: &'static str,
}

const OK: Json<Health> = Json(Health { status: "ok" });

pub(crate) fn routes() -> OpenApiRouter<std::sync::Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(live))
        .routes(routes!(ready))
}

/// The server is there
///
/// The original server's question; the same as `/health/live`.
#[utoipa::path(get, path = "/health", tag = "health", security(()),
    responses((status = 200, description = "It is there.", body = Health)))]
async fn health() -> Json<Health> {
    OK
}

/// The server is there
///
/// Says nothing about the database: a process is not to be restarted because that is away.
#[utoipa::path(get, path = "/health/live", tag = "health", security(()),
    responses((status = 200, description = "It is there.", body = Health)))]
async fn live() -> Json<Health> {
    OK
}

/// The server can work
///
/// Asks the database.
#[utoipa::path(get, path = "/health/ready", tag = "health", security(()),
    responses(
        (status = 200, description = "The database answers.", body = Health),
        (status = 503, description = "It does not.", body = ProblemDocument<'static>, content_type = "application/problem+json"),
    ))]
async fn ready(State(service): Shared) -> Result<Json<Health>, Problem> {
    service.client.database_time().await?;
    Ok(OK)
}
