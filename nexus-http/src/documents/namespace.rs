//! Groups, handlers, nodes, event types.

use jiff::Timestamp;
use nexus::client;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

/// How many there are, counted up to 1,000.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Depth {
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
pub struct Group {
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
pub struct Handler {
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

impl Handler {
    /// Of a handler of this group.
    #[must_use]
    pub fn new(group: String, handler: client::GroupHandler) -> Self {
        Self {
            group,
            handler: handler.name,
            event_type: handler.event_type,
            event_version: handler.event_version,
            app: handler.app,
            is_live: handler.is_live,
            messages: handler.depth.into(),
            lag_seconds: handler.lag.map(|lag| lag.as_secs_f64()),
        }
    }
}

impl From<client::Group> for Group {
    fn from(group: client::Group) -> Self {
        let lag_seconds = group.lag().map(|lag| lag.as_secs_f64());
        let handlers = group.handlers.into_iter();
        let handlers = handlers.map(|handler| Handler::new(group.name.clone(), handler));
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

/// A running process of an app.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Node {
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
pub struct NodeHandler {
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

/// An event type in one version, as an app declares it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventType {
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
pub struct EventTypeWithSchema {
    #[serde(flatten)]
    event_type: EventType,
    /// The JSON Schema of the payload.
    schema: Value,
}

impl From<client::DeclaredType> for EventType {
    fn from(declared: client::DeclaredType) -> Self {
        Self {
            event_type: declared.event_type,
            version: declared.version,
            app: declared.app,
            registered_at: declared.registered_at,
        }
    }
}

impl From<client::DeclaredType> for EventTypeWithSchema {
    fn from(mut declared: client::DeclaredType) -> Self {
        Self {
            schema: declared.schema.take(),
            event_type: declared.into(),
        }
    }
}
