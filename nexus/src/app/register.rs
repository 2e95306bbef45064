//! Registering a node: what it declares, checked against what others declare, in one transaction.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection, PgPool};

use super::{App, Scheduler, StartError, pg_cron, select::Selected};
use crate::{
    client::Database,
    config::Config,
    event::{EventDescriptor, Origin},
    registry::{TaskDescriptor, TaskPayload, Trigger},
    runtime::{Declaration, DeclaredTask, Route},
    schedule,
    store::{
        self,
        nodes::{self, Node},
        renames::{self, Rename},
        scheduled_tasks::{self, TaskRename},
        subscriptions::{self, EventTypeRow},
    },
};

/// A node that is registered.
pub(super) struct Registered {
    pub(super) node: Node,
    pub(super) declaration: Declaration,
    /// No newer build of the app is alive.
    pub(super) defines_app: bool,
    /// No node was there, and none has left one behind that died.
    pub(super) is_first: bool,
    pub(super) epoch: i64,
    pub(super) routes: Vec<Route>,
    /// The queue of the namespace's default group.
    pub(super) main_queue: String,
}

/// How long registering may take. Others that register are waited for, and locks on queues.
const PATIENCE: Duration = Duration::from_mins(2);

fn failed(doing: &'static str) -> impl Fn(sqlx::Error) -> StartError {
    move |source| StartError::Database { doing, source }
}

pub(super) async fn register(
    app: &App,
    config: &Config,
    database: &Database,
    pool: &PgPool,
) -> Result<Registered, StartError> {
    // On the heap, as it is large and its caller is the user's code.
    let registered = Box::pin(register_in_time(app, config, database, pool));
    let registered = tokio::time::timeout(PATIENCE, registered);
    let no_answer = |_| failed("register")(store::no_answer());
    registered.await.map_err(no_answer)?
}

async fn register_in_time(
    app: &App,
    config: &Config,
    database: &Database,
    pool: &PgPool,
) -> Result<Registered, StartError> {
    let mut connection = database
        .lend(pool)
        .await
        .map_err(failed("connect to register"))?;
    let selected = app.selected();
    let queues = ensure_groups(app, &selected, &config.namespace, &mut connection).await?;
    let routes = app.routes(|group| queues[group].clone());
    let event_types = event_type_rows(&selected.events);
    let handlers = handler_rows(&routes);
    let (mut tasks, origins) = declared_tasks(&routes, &selected.tasks, config.max_payload_bytes)?;
    if app.scheduler == Scheduler::PgCron {
        pg_cron::assign(&mut connection, &mut tasks, &origins)
            .await
            .map_err(failed("look for pg_cron"))?
            .map_err(StartError::PgCron)?;
    }
    let node = Node {
        id: config
            .node_id
            .clone()
            .unwrap_or_else(|| uuid::Uuid::new_v4().simple().to_string()[..12].to_owned()),
        namespace: config.namespace.clone(),
        app: app.name.clone(),
        build_id: build_id(app, &selected, &routes, &event_types, &tasks),
        program: program(),
        display_name: app.display_name.clone(),
        description: app.description.clone(),
        metadata: app.metadata.clone(),
        handlers: handlers.clone(),
    };

    let wrong = failed("register");
    let mut tx = connection.begin().await.map_err(&wrong)?;
    subscriptions::lock(&mut tx, &node.namespace)
        .await
        .map_err(&wrong)?;
    let declaration = Declaration {
        event_types,
        handlers,
        renames: renames(&routes),
        task_renames: task_renames(&routes, &selected.tasks),
        tasks,
    };
    check(&node, &declaration, &mut tx).await?;
    let defines_app = declaration.declare(&node, &mut tx).await.map_err(&wrong)?;
    if !defines_app {
        tracing::info!(
            app = node.app,
            "a newer build of this app is running, it defines subscriptions and schedules"
        );
    }
    let has_others = nodes::has_any(&mut tx, &node.namespace);
    let is_first = !has_others.await.map_err(&wrong)?;
    let Some(epoch) = nodes::register(&mut tx, &node).await.map_err(&wrong)? else {
        return Err(StartError::NodeIdTaken {
            node: node.id,
            holder: "a node in another namespace".to_owned(),
        });
    };
    tx.commit().await.map_err(&wrong)?;
    connection.give_back().await.map_err(&wrong)?;
    Ok(Registered {
        node,
        declaration,
        defines_app,
        is_first,
        epoch,
        routes,
        main_queue: queues["default"].clone(),
    })
}

/// Creates the queues of the app's groups, and the namespace's main queue, which every node adopts
/// from. Returns the queue of each group.
async fn ensure_groups(
    app: &App,
    selected: &Selected,
    namespace: &str,
    connection: &mut PgConnection,
) -> Result<BTreeMap<String, String>, StartError> {
    let mut queues = BTreeMap::new();
    let groups = selected
        .handlers
        .iter()
        .map(|handler| handler.group.unwrap_or(&app.name));
    for group in std::iter::once("default").chain(groups) {
        if queues.contains_key(group) {
            continue;
        }
        let queue = subscriptions::ensure_group(connection, namespace, group)
            .await
            .map_err(|source| match store::refusal(&source) {
                Some(reason) => StartError::Name { reason },
                None if store::is_denied(&source) => StartError::Denied {
                    namespace: namespace.to_owned(),
                    source,
                },
                None => failed("create a queue")(source),
            })?;
        queues.insert(group.to_owned(), queue);
    }
    Ok(queues)
}

/// Refuses what contradicts a live node or another live app.
async fn check(
    node: &Node,
    declaration: &Declaration,
    connection: &mut PgConnection,
) -> Result<(), StartError> {
    let wrong = failed("compare with other apps");
    let Declaration {
        event_types,
        handlers,
        tasks,
        renames,
        ..
    } = declaration;
    let Node { namespace, app, .. } = node;
    if let Some((other_node, other)) = nodes::other_program(connection, node)
        .await
        .map_err(&wrong)?
    {
        return Err(StartError::OtherProgram {
            namespace: namespace.clone(),
            app: app.clone(),
            other,
            node: other_node,
            this: node.program.clone(),
        });
    }
    if let Some(elsewhere) = nodes::same_id_elsewhere(connection, node)
        .await
        .map_err(&wrong)?
    {
        return Err(StartError::NodeIdTaken {
            node: node.id.clone(),
            holder: format!("a live node in namespace `{elsewhere}`"),
        });
    }
    let conflict = |what, other, advice| {
        Err(StartError::Conflict {
            what,
            other,
            this: app.clone(),
            advice,
        })
    };
    if let Some((event_type, version, other)) =
        subscriptions::other_declaration(connection, namespace, app, event_types)
            .await
            .map_err(&wrong)?
    {
        return conflict(
            format!("event type `{event_type}` version {version}"),
            other,
            "give the changed type another `version`, or share one type",
        );
    }
    if let Some((group, handler, event_type, other)) =
        subscriptions::other_handler(connection, namespace, app, handlers)
            .await
            .map_err(&wrong)?
    {
        return conflict(
            format!("handler `{handler}` of group `{group}` (there for `{event_type}`)"),
            other,
            "give one of them another `name` or `group`",
        );
    }
    if let Some((group, former, other)) = renames::other_app(connection, namespace, app, renames)
        .await
        .map_err(&wrong)?
    {
        return conflict(
            format!("handler `{former}` of group `{group}` (here it is in `formerly`)"),
            other,
            "take the name out of `formerly`, or stop the other app first",
        );
    }
    let names: Vec<String> = tasks.iter().map(|task| task.name.clone()).collect();
    if let Some((name, other)) = scheduled_tasks::other_app(connection, namespace, app, &names)
        .await
        .map_err(&wrong)?
    {
        return conflict(
            format!("scheduled task `{name}`"),
            other,
            "give one of them another `name`",
        );
    }
    Ok(())
}

fn handler_rows(routes: &[Route]) -> Value {
    routes
        .iter()
        .map(|route| {
            let mut row = json!({
                "group": route.group,
                "handler": route.name(),
                "eventType": route.event_type,
                "eventVersion": route.event_version,
            });
            if let Some(from) = route.descriptor.options.from {
                row["from"] = from.to_string().into();
            }
            row
        })
        .collect()
}

fn renames(routes: &[Route]) -> Vec<Rename> {
    let renames = routes.iter().flat_map(|route| {
        route.descriptor.formerly.iter().map(|former| Rename {
            group: route.group.clone(),
            former: (*former).to_owned(),
            handler: route.name().to_owned(),
            event_type: route.event_type.clone(),
        })
    });
    renames.collect()
}

fn task_renames(routes: &[Route], tasks: &[&'static TaskDescriptor]) -> Vec<TaskRename> {
    let rename = |former: &&str, name: &str, event_type: Option<&String>| TaskRename {
        former: (*former).to_owned(),
        name: name.to_owned(),
        event_type: event_type.cloned(),
    };
    let functions = routes
        .iter()
        .filter(|route| matches!(route.descriptor.trigger, Trigger::Cron(_)))
        .flat_map(|route| {
            let formerly = route.descriptor.formerly.iter();
            formerly.map(move |former| rename(former, route.name(), Some(&route.event_type)))
        });
    let emitting = tasks
        .iter()
        .flat_map(|task| task.formerly.iter().map(|f| rename(f, task.name, None)));
    functions.chain(emitting).collect()
}

/// The scheduled tasks of the program: its `#[cron]` functions, and what else emits by the clock; and
/// where each stands.
fn declared_tasks(
    routes: &[Route],
    emitting: &[&'static TaskDescriptor],
    max_payload_bytes: usize,
) -> Result<(Vec<DeclaredTask>, BTreeMap<String, Origin>), StartError> {
    let functions = routes.iter().filter_map(|route| {
        let Trigger::Cron(cron) = &route.descriptor.trigger else {
            return None;
        };
        // Ticks carry no payload.
        let payload = TaskPayload {
            text: "null".to_owned(),
            key: None,
        };
        let event = (route.event_type.as_str(), route.event_version);
        Some((
            route.name(),
            route.descriptor.origin,
            cron,
            event,
            Ok(payload),
        ))
    });
    let emitting = emitting.iter().map(|task| {
        let meta = &task.event.meta;
        let payload = (task.payload)(max_payload_bytes);
        let event = (meta.event_type, meta.version);
        (task.name, task.origin, &task.schedule, event, payload)
    });
    let mut tasks = Vec::new();
    let mut origins = BTreeMap::new();
    for (name, origin, cron, (event_type, event_version), payload) in functions.chain(emitting) {
        let refused = |reason: &dyn std::fmt::Display| StartError::Name {
            reason: format!("{reason}, in {origin}"),
        };
        origins.insert(name.to_owned(), origin);
        let payload = payload.map_err(|error| refused(&error))?;
        let task = DeclaredTask {
            name: name.to_owned(),
            expression: cron.expression.to_owned(),
            time_zone: cron.time_zone.map(str::to_owned),
            misfire: cron.misfire.unwrap_or_default(),
            grace: cron.grace.unwrap_or(schedule::DEFAULT_GRACE),
            event_type: event_type.to_owned(),
            event_version,
            payload: payload.text,
            key: payload.key,
            pg_cron_schedule: None,
        };
        task.misfire.check().map_err(|error| refused(&error))?;
        task.next_after(Timestamp::now())
            .map_err(|error| refused(&error))?;
        tasks.push(task);
    }
    Ok((tasks, origins))
}

fn event_type_rows(events: &[&'static EventDescriptor]) -> Vec<EventTypeRow> {
    let mut rows: Vec<EventTypeRow> = events
        .iter()
        .map(|event| {
            let schema = (event.schema)().to_value();
            EventTypeRow {
                event_type: event.meta.event_type.to_owned(),
                version: event.meta.version,
                fingerprint: fingerprint(&schema),
                schema: schema.to_string(),
            }
        })
        .collect();
    rows.sort_by(|a, b| (&a.event_type, a.version).cmp(&(&b.event_type, b.version)));
    rows
}

/// A hash of what a schema accepts: words for people do not count, nor does the order of fields.
pub(super) fn fingerprint(schema: &Value) -> String {
    fn essence(value: &Value, inside_properties: bool) -> Value {
        match value {
            Value::Object(fields) => {
                let mut fields: Vec<(&String, &Value)> = fields
                    .iter()
                    // A property may be called `title`; only keywords are words for people.
                    .filter(|(key, _)| {
                        inside_properties
                            || !matches!(
                                key.as_str(),
                                "title" | "description" | "examples" | "$comment"
                            )
                    })
                    .collect();
                fields.sort_by_key(|(key, _)| key.as_str());
                let fields: Map<String, Value> = fields
                    .into_iter()
                    .map(|(key, value)| {
                        let names = !inside_properties
                            && matches!(
                                key.as_str(),
                                "properties" | "$defs" | "definitions" | "patternProperties"
                            );
                        (key.clone(), essence(value, names))
                    })
                    .collect();
                Value::Object(fields)
            }
            Value::Array(items) => items.iter().map(|item| essence(item, false)).collect(),
            other => other.clone(),
        }
    }
    hash(&essence(schema, false).to_string())
}

fn hash(text: &str) -> String {
    let digest = Sha256::digest(text.as_bytes());
    digest
        .iter()
        .take(16)
        .fold(String::with_capacity(32), |mut text, byte| {
            write!(text, "{byte:02x}").expect("writing to a string cannot fail");
            text
        })
}

/// All of a task. Its payload may hold a map, which has another order at each start.
fn task_line(task: &DeclaredTask) -> String {
    let payload: serde_json::Result<Value> = serde_json::from_str(&task.payload);
    match payload {
        Ok(payload) => {
            let task = DeclaredTask {
                payload: in_order(&payload).to_string(),
                ..task.clone()
            };
            format!("{task:?}")
        }
        Err(_) => format!("{task:?}"),
    }
}

/// With the fields of its objects in the order of their names.
fn in_order(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
            fields.sort_by_key(|(key, _)| key.as_str());
            let fields = fields.into_iter();
            fields
                .map(|(key, value)| (key.clone(), in_order(value)))
                .collect()
        }
        Value::Array(items) => items.iter().map(in_order).collect(),
        other => other.clone(),
    }
}

/// What tells this version of the app from others: a hash of all that it declares.
fn build_id(
    app: &App,
    selected: &Selected,
    routes: &[Route],
    event_types: &[EventTypeRow],
    tasks: &[DeclaredTask],
) -> String {
    let mut lines: Vec<String> = routes
        .iter()
        .map(|route| {
            let Route {
                group,
                event_type,
                event_version,
                retry,
                timeout,
                concurrency,
                ..
            } = route;
            format!(
                "{group}/{} {event_type}@{event_version} {:?} {retry:?} {timeout:?} {concurrency} {:?} {:?}",
                route.name(),
                route.descriptor.trigger_text(),
                route.descriptor.formerly,
                route.descriptor.options.from
            )
        })
        .chain(
            selected
                .tasks
                .iter()
                .map(|task| format!("{} {:?}", task.name, task.formerly)),
        )
        .chain(
            event_types
                .iter()
                .map(|row| format!("{}@{} {}", row.event_type, row.version, row.fingerprint)),
        )
        .chain(tasks.iter().map(task_line))
        .collect();
    lines.sort_unstable();
    hash(&format!("{}\n{}", app.name, lines.join("\n")))
}

/// The executable's file name, without the hash that Cargo adds to tests.
fn program() -> String {
    let name = std::env::current_exe()
        .ok()
        .and_then(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .unwrap_or_else(|| "unknown".to_owned());
    match name.rsplit_once('-') {
        Some((stem, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            stem.to_owned()
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_people_do_not_change_a_fingerprint() {
        let schema = |description: &str| {
            json!({
                "title": "User", "description": description, "type": "object",
                "properties": { "title": { "type": "string", "description": description } },
            })
        };
        assert_eq!(fingerprint(&schema("old")), fingerprint(&schema("new")));
    }

    #[test]
    fn a_property_called_like_a_keyword_counts() {
        let with = json!({ "properties": { "title": { "type": "string" } } });
        let without = json!({ "properties": {} });
        assert_ne!(fingerprint(&with), fingerprint(&without));
    }
}
