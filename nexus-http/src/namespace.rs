//! What there is in the namespace: groups, nodes, schemas.

use std::sync::Arc;

use axum::{Json, extract::State};
use jiff::Timestamp;
use nexus::client::{self, DeclaredType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    Service, Shared,
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

/// How many there are, counted up to 1,000.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Depth {
    /// How many were counted.
    counted: u64,
    /// There are more.
    is_more: bool,
}

impl From<client::Depth> for Depth {
    fn from(depth: client::Depth) -> Self {
        Self {
            counted: depth.counted,
            is_more: depth.is_more,
        }
    }
}

/// A group, with what waits in its queue.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Group {
    /// Its name.
    group: String,
    /// The name of its queue.
    queue: String,
    /// Since when no node claims its messages; null while they do.
    paused_at: Option<Timestamp>,
    /// Messages that wait or are being handled.
    messages: Depth,
    /// How many of those that were counted have failed before.
    failed: u64,
    /// How long the oldest message has been ready; null if none is.
    lag_seconds: Option<f64>,
    /// Dead letters.
    dead_letters: Depth,
    /// Its handlers, by name.
    handlers: Vec<Handler>,
}

/// A handler of a group, with what waits for it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Handler {
    /// The group.
    group: String,
    /// Its name.
    handler: String,
    /// The event type that it is subscribed to.
    event_type: String,
    /// The version of it that the handler takes; null if no build has said so yet.
    event_version: Option<u32>,
    /// The app that declared it last.
    app: String,
    /// Whether a live node can run it. If not, its messages wait.
    is_live: bool,
    /// Messages that wait for it or are being handled.
    messages: Depth,
    /// How long the oldest message has been ready; null if none is.
    lag_seconds: Option<f64>,
}

impl From<client::Group> for Group {
    fn from(group: client::Group) -> Self {
        let lag_seconds = group.lag().map(|lag| lag.as_secs_f64());
        let handlers = group.handlers.into_iter().map(|handler| Handler {
            group: group.name.clone(),
            handler: handler.name,
            event_type: handler.event_type,
            event_version: handler.event_version,
            app: handler.app,
            is_live: handler.is_live,
            messages: handler.depth.into(),
            lag_seconds: handler.lag.map(|lag| lag.as_secs_f64()),
        });
        Self {
            handlers: handlers.collect(),
            group: group.name,
            queue: group.queue,
            paused_at: group.paused_at,
            messages: group.depth.into(),
            failed: group.failed,
            lag_seconds,
            dead_letters: group.dead_letters.into(),
        }
    }
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

/// A running process of an app.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Node {
    /// Its id.
    node_id: String,
    /// The app that it runs.
    app: String,
    /// The build of the app.
    build_id: String,
    /// The executable's file name.
    program: String,
    /// The name that the app gave it.
    display_name: Option<String>,
    /// When it started.
    started_at: Timestamp,
    /// When it was last heard of.
    last_heartbeat: Timestamp,
    /// Whether that is less than 15 seconds ago.
    is_live: bool,
    /// What it can run.
    handlers: Vec<NodeHandler>,
}

/// A handler that a node can run.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct NodeHandler {
    /// The group.
    group: String,
    /// The handler.
    handler: String,
    /// The event type.
    event_type: String,
    /// The version of it.
    event_version: u32,
}

impl From<client::Node> for Node {
    fn from(node: client::Node) -> Self {
        let handlers = node.handlers.into_iter().map(|handler| NodeHandler {
            group: handler.group,
            handler: handler.handler,
            event_type: handler.event_type,
            event_version: handler.event_version,
        });
        Self {
            handlers: handlers.collect(),
            node_id: node.id,
            app: node.app,
            build_id: node.build_id,
            program: node.program,
            display_name: node.display_name,
            started_at: node.started_at,
            last_heartbeat: node.last_heartbeat,
            is_live: node.is_live,
        }
    }
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

/// An event type in one version, as an app declares it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct EventType {
    /// The stored name of the type.
    event_type: String,
    /// The version.
    version: u32,
    /// The app.
    app: String,
    /// Since when the app has declared it so.
    registered_at: Timestamp,
}

/// An event type with its schema.
#[derive(Debug, Serialize, ToSchema)]
struct EventTypeWithSchema {
    #[serde(flatten)]
    event_type: EventType,
    /// The JSON Schema of the payload.
    schema: Value,
}

impl From<&DeclaredType> for EventType {
    fn from(declared: &DeclaredType) -> Self {
        Self {
            event_type: declared.event_type.clone(),
            version: declared.version,
            app: declared.app.clone(),
            registered_at: declared.registered_at,
        }
    }
}

/// List the event types that apps have declared
#[utoipa::path(get, path = "/schemas", tag = "namespace",
    responses((status = 200, description = "By type, the newest version first.", body = Vec<EventType>), Refusals))]
async fn schemas(State(service): Shared) -> Result<Json<Vec<EventType>>, Problem> {
    let declared = service.client.event_types().await?;
    Ok(Json(declared.iter().map(EventType::from).collect()))
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
    Ok(Json(EventTypeWithSchema {
        event_type: EventType::from(&declared),
        schema: declared.schema,
    }))
}
