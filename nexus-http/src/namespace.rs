//! What there is in the namespace: groups, nodes, schemas.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
    documents::{EventType, EventTypeWithSchema, Group, Node},
    extract::{Path, Query},
    openapi::{Missing, Refusals},
    problem::{Kind, Problem},
};

pub(crate) fn reading() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(groups))
        .routes(routes!(nodes))
        .routes(routes!(schemas))
        .routes(routes!(schema))
}

pub(crate) fn steering() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::new()
        .routes(routes!(pause))
        .routes(routes!(resume))
}

/// List the groups with what waits in their queues
#[utoipa::path(get, path = "/groups", tag = "namespace",
    responses((status = 200, description = "The groups, by name.", body = Vec<Group>), Refusals))]
async fn groups(State(service): Shared) -> Result<Json<Vec<Group>>, Problem> {
    let groups = service.client.groups().await?;
    Ok(Json(groups.into_iter().map(Group::from).collect()))
}

async fn group(service: &Service, name: &str) -> Result<Json<Group>, Problem> {
    let groups = service.client.groups().await?;
    let found = groups.into_iter().find(|group| group.name == name);
    let group = found.ok_or_else(|| {
        let namespace = service.client.namespace();
        Problem::new(
            Kind::NotFound,
            format!("namespace `{namespace}` has no group `{name}`"),
        )
    })?;
    Ok(Json(group.into()))
}

/// Pause a group
///
/// No node claims its messages until it is resumed. What has been claimed already is handled.
#[utoipa::path(post, path = "/groups/{group}/pause", tag = "namespace",
    params(("group" = String, Path, description = "The group.")),
    responses((status = 200, description = "The group as it is now.", body = Group), Missing, Refusals))]
async fn pause(State(service): Shared, Path(name): Path<String>) -> Result<Json<Group>, Problem> {
    service.client.pause_group(&name).await?;
    group(&service, &name).await
}

/// Let the messages of a paused group be claimed again
#[utoipa::path(post, path = "/groups/{group}/resume", tag = "namespace",
    params(("group" = String, Path, description = "The group.")),
    responses((status = 200, description = "The group as it is now.", body = Group), Missing, Refusals))]
async fn resume(State(service): Shared, Path(name): Path<String>) -> Result<Json<Group>, Problem> {
    service.client.resume_group(&name).await?;
    group(&service, &name).await
}

/// List the nodes
///
/// Those that run, and those that died a while ago.
#[utoipa::path(get, path = "/nodes", tag = "namespace",
    responses((status = 200, description = "The nodes, by app and id.", body = Vec<Node>), Refusals))]
async fn nodes(State(service): Shared) -> Result<Json<Vec<Node>>, Problem> {
    let nodes = service.client.nodes().await?;
    Ok(Json(nodes.into_iter().map(Node::from).collect()))
}

/// List the event types that apps have declared
#[utoipa::path(get, path = "/schemas", tag = "namespace",
    responses((status = 200, description = "By type, the newest version first.", body = Vec<EventType>), Refusals))]
async fn schemas(State(service): Shared) -> Result<Json<Vec<EventType>>, Problem> {
    let declared = service.client.event_types().await?;
    Ok(Json(declared.into_iter().map(EventType::from).collect()))
}

/// Which version.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wanted {
    /// The version; the newest if it is not given.
    version: Option<u32>,
}

/// Show an event type with the JSON Schema of its payload
#[utoipa::path(get, path = "/schemas/{eventType}", tag = "namespace",
    params(("eventType" = String, Path, description = "The event type."), Wanted),
    responses((status = 200, description = "The latest declaration.", body = EventTypeWithSchema), Missing, Refusals))]
async fn schema(
    State(service): Shared,
    Path(event_type): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<EventTypeWithSchema>, Problem> {
    let declared = service.client.event_types().await?;
    let found = declared.into_iter().find(|declared| {
        let is_version = wanted
            .version
            .is_none_or(|version| version == declared.version);
        declared.event_type == event_type && is_version
    });
    let declared = found.ok_or_else(|| {
        Problem::new(
            Kind::NotFound,
            format!("no app has declared event type `{event_type}` in that version"),
        )
    })?;
    Ok(Json(declared.into()))
}
