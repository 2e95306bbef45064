//! Groups, event types and subscriptions: what an app declares.

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr, types::Json};

use super::{JsonText, table, timestamp};

/// Creates the group's queues if they are missing and returns the queue's name.
pub(crate) async fn ensure_group(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
) -> sqlx::Result<String> {
    sqlx::query_scalar("select core.ensure_group($1, $2)")
        .bind(namespace)
        .bind(group)
        .fetch_one(connection)
        .await
}

/// The queues of the namespace's groups.
pub(crate) async fn queues(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar("select queue_name from core.groups where namespace = $1 order by 1")
        .bind(namespace)
        .fetch_all(connection)
        .await
}

/// Restores every queue of the namespace whose table is gone.
pub(crate) async fn restore_queues(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<()> {
    sqlx::query(
        "select core.ensure_group(namespace, group_name) from core.groups where namespace = $1",
    )
    .bind(namespace)
    .execute(connection)
    .await
    .map(drop)
}

/// Serializes registrations of a namespace until the transaction ends; see `core.lock_registrations`.
pub(crate) async fn lock(connection: &mut PgConnection, namespace: &str) -> sqlx::Result<()> {
    sqlx::query("select core.lock_registrations($1)")
        .bind(namespace)
        .execute(connection)
        .await
        .map(drop)
}

/// An app's declaration of an event type.
#[derive(Debug, Clone)]
pub(crate) struct EventTypeRow {
    pub(crate) event_type: String,
    pub(crate) version: u32,
    pub(crate) schema: String,
    pub(crate) fingerprint: String,
}

/// The live app that declares one of the event types with another schema.
pub(crate) async fn other_declaration(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    event_types: &[EventTypeRow],
) -> sqlx::Result<Option<(String, i32, String)>> {
    sqlx::query_as(
        "select t.event_type, t.version, t.app
         from unnest($3::text[], $4::int[], $5::text[]) as m (event_type, version, fingerprint)
         join core.event_types t using (event_type, version)
         where t.namespace = $1 and t.app <> $2 and t.fingerprint <> m.fingerprint
           and exists (select from core.nodes n
                       where n.namespace = t.namespace and n.app = t.app and core.is_live(n.last_heartbeat))
         order by 1, 2 limit 1",
    )
    .bind(namespace)
    .bind(app)
    .bind(event_types.iter().map(|row| row.event_type.as_str()).collect::<Vec<_>>())
    .bind(event_types.iter().map(|row| i32::try_from(row.version).unwrap_or(i32::MAX)).collect::<Vec<_>>())
    .bind(event_types.iter().map(|row| row.fingerprint.as_str()).collect::<Vec<_>>())
    .fetch_optional(connection)
    .await
}

/// Stores what the app says its event types are.
pub(crate) async fn declare_event_types(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    event_types: &[EventTypeRow],
) -> sqlx::Result<()> {
    sqlx::query(
        "insert into core.event_types as t (namespace, app, event_type, version, schema, fingerprint)
         select $1, $2, * from unnest($3::text[], $4::int[], $5::jsonb[], $6::text[])
         on conflict (namespace, event_type, version, app) do update
             set schema = excluded.schema, fingerprint = excluded.fingerprint, registered_at = core.now()
             where t.fingerprint <> excluded.fingerprint",
    )
    .bind(namespace)
    .bind(app)
    .bind(event_types.iter().map(|row| row.event_type.as_str()).collect::<Vec<_>>())
    .bind(event_types.iter().map(|row| i32::try_from(row.version).unwrap_or(i32::MAX)).collect::<Vec<_>>())
    .bind(event_types.iter().map(|row| JsonText(&row.schema)).collect::<Vec<_>>())
    .bind(event_types.iter().map(|row| row.fingerprint.as_str()).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map(drop)
}

/// A handler that another live app declares for another event type: (group, handler, event type, app).
pub(crate) async fn other_handler(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    handlers: &Value,
) -> sqlx::Result<Option<(String, String, String, String)>> {
    let handlers = handlers.to_string();
    sqlx::query_as(
        "select s.group_name, s.handler, s.event_type, s.app
         from jsonb_array_elements($3) h
         join core.subscriptions s
             on s.namespace = $1 and s.group_name = h ->> 'group' and s.handler = h ->> 'handler'
         where s.app <> $2 and s.event_type <> h ->> 'eventType'
           and exists (select from core.nodes n
                       where n.namespace = s.namespace and n.app = s.app and core.is_live(n.last_heartbeat))
         order by 1, 2 limit 1",
    )
    .bind(namespace)
    .bind(app)
    .bind(JsonText(&handlers))
    .fetch_optional(connection)
    .await
}

/// Registers the handlers' subscriptions; see `core.subscribe`.
pub(crate) async fn subscribe(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    handlers: &Value,
) -> sqlx::Result<()> {
    let handlers = handlers.to_string();
    sqlx::query("select core.subscribe($1, $2, $3)")
        .bind(namespace)
        .bind(app)
        .bind(JsonText(&handlers))
        .execute(connection)
        .await
        .map(drop)
}

/// A subscription and whether anybody can serve it.
#[derive(Debug)]
pub(crate) struct SubscriptionRow {
    pub(crate) subscription_id: i64,
    pub(crate) group: String,
    pub(crate) handler: String,
    pub(crate) event_type: String,
    /// The version that the handler takes, if a build has said so.
    pub(crate) event_version: Option<i32>,
    pub(crate) app: String,
    pub(crate) queue: String,
    pub(crate) is_live: bool,
    /// Whether any node of its app is live.
    pub(crate) is_app_live: bool,
}

/// All subscriptions of the namespace.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<SubscriptionRow>> {
    let rows = sqlx::query(
        "select s.subscription_id, s.group_name, s.handler, s.event_type, s.app, s.queue_name,
                exists (
                    select from core.nodes n
                    where n.namespace = s.namespace and core.is_live(n.last_heartbeat)
                      and n.handlers @> jsonb_build_array(jsonb_build_object('group', s.group_name, 'handler', s.handler))),
                s.event_version,
                exists (select from core.nodes n
                        where n.namespace = s.namespace and n.app = s.app and core.is_live(n.last_heartbeat))
         from core.subscriptions s
         where s.namespace = $1
         order by s.group_name, s.handler",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| SubscriptionRow {
            subscription_id: row.get(0),
            group: row.get(1),
            handler: row.get(2),
            event_type: row.get(3),
            app: row.get(4),
            queue: row.get(5),
            is_live: row.get(6),
            event_version: row.get(7),
            is_app_live: row.get(8),
        })
        .collect())
}

/// How many messages wait for a handler, under a former name of it as well; one more than [`MOST_COUNTED`] at
/// most.
pub(crate) async fn waiting(
    connection: &mut PgConnection,
    subscription_id: i64,
    queue: &str,
) -> sqlx::Result<i64> {
    let text = format!(
        "select count(*) from (
             select from {table} q
             where q.headers ->> 'handler' in (
                 select s.handler from core.subscriptions s where s.subscription_id = $1
                 union
                 select r.former from core.subscriptions s
                 join core.renames r using (namespace, group_name, handler)
                 where s.subscription_id = $1)
             limit {MOST_COUNTED} + 1) counted",
        table = table(queue)
    );
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(subscription_id)
        .fetch_one(connection)
        .await
}

/// The groups of a namespace.
pub(crate) async fn groups(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar("select group_name from core.groups where namespace = $1 order by 1")
        .bind(namespace)
        .fetch_all(connection)
        .await
}

/// A group and its queue.
#[derive(Debug)]
pub(crate) struct GroupRow {
    pub(crate) group: String,
    pub(crate) queue: String,
    pub(crate) paused_at: Option<Timestamp>,
}

/// The groups of a namespace, by name.
pub(crate) async fn group_rows(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<GroupRow>> {
    let rows = sqlx::query(
        "select group_name, queue_name, (extract(epoch from paused_at) * 1000000)::bigint
         from core.groups where namespace = $1 order by 1",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| GroupRow {
            group: row.get(0),
            queue: row.get(1),
            paused_at: row.get::<Option<i64>, _>(2).map(timestamp),
        })
        .collect())
}

/// Counting stops here.
pub(crate) const MOST_COUNTED: i64 = 100_000;

/// The event versions of which messages wait for a handler and that no live node runs it for, with how many
/// there are, up to [`MOST_COUNTED`] and one.
pub(crate) async fn unserved_versions(
    connection: &mut PgConnection,
    namespace: &str,
    row: &SubscriptionRow,
) -> sqlx::Result<Vec<(String, i64)>> {
    // From one version to the next in the index of the queue, around those that somebody runs: what was
    // handled lately lies there still, and would be walked through. A version begins with a digit, hence
    // `z` is above all.
    let text = format!(
        "with recursive served as materialized (
             select distinct h ->> 'eventVersion' as version
             from core.nodes n cross join jsonb_array_elements(n.handlers) h
             where n.namespace = $1 and core.is_live(n.last_heartbeat)
               and h ->> 'group' = $2 and h ->> 'handler' = $3
         ), v (version) as (
             (select '' union select version from served)
             union all
             select (select m.headers ->> 'eventVersion' from {table} m
                     where m.headers ->> 'handler' = $3 and m.headers ->> 'eventVersion' > v.version
                       and m.headers ->> 'eventVersion'
                           < coalesce((select min(s.version) from served s where s.version > v.version), 'z')
                     order by m.headers ->> 'eventVersion' limit 1)
             from v where v.version is not null
         )
         select v.version, (
             select count(*) from (
                 select from {table} m
                 where m.headers ->> 'handler' = $3 and m.headers ->> 'eventVersion' = v.version
                 limit {MOST_COUNTED} + 1) counted)
         from v
         where v.version <> '' and v.version not in (select version from served)",
        table = table(&row.queue)
    );
    sqlx::query_as(AssertSqlSafe(text).into_sql_str())
        .bind(namespace)
        .bind(&row.group)
        .bind(&row.handler)
        .fetch_all(connection)
        .await
}

/// Whether one of these handlers (`[{"group", "handler"}]`) is not subscribed.
pub(crate) async fn is_any_missing(
    connection: &mut PgConnection,
    namespace: &str,
    handlers: &Value,
) -> sqlx::Result<bool> {
    let handlers = handlers.to_string();
    sqlx::query_scalar(
        "select exists (
             select from jsonb_array_elements($2) h
             where not exists (
                 select from core.subscriptions s
                 where (s.namespace, s.group_name, s.handler) = ($1, h ->> 'group', h ->> 'handler')))",
    )
    .bind(namespace)
    .bind(JsonText(&handlers))
    .fetch_one(connection)
    .await
}

/// Pauses or resumes a group; false if it was that already.
pub(crate) async fn set_paused(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    is_paused: bool,
) -> sqlx::Result<bool> {
    sqlx::query_scalar("select core.set_paused($1, $2, $3)")
        .bind(namespace)
        .bind(group)
        .bind(is_paused)
        .fetch_one(connection)
        .await
}

/// The queue of a group, if the group exists.
pub(crate) async fn queue_of(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(
        "select queue_name from core.groups where namespace = $1 and group_name = $2",
    )
    .bind(namespace)
    .bind(group)
    .fetch_optional(connection)
    .await
}

/// The namespaces that there are.
pub(crate) async fn namespaces(connection: &mut PgConnection) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar("select namespace from core.namespaces order by 1")
        .fetch_all(connection)
        .await
}

/// What an app says that an event type is.
#[derive(Debug)]
pub(crate) struct DeclaredRow {
    pub(crate) event_type: String,
    pub(crate) version: i32,
    pub(crate) app: String,
    pub(crate) schema: Value,
    pub(crate) registered_at: Timestamp,
}

/// What the apps of the namespace say their event types are, or that one of them is: by type, newest version
/// first, latest declaration first.
pub(crate) async fn declared(
    connection: &mut PgConnection,
    namespace: &str,
    event_type: Option<&str>,
) -> sqlx::Result<Vec<DeclaredRow>> {
    let rows = sqlx::query(
        "select event_type, version, app, schema, (extract(epoch from registered_at) * 1000000)::bigint
         from core.event_types
         where namespace = $1 and ($2::text is null or event_type = $2)
         order by event_type, version desc, registered_at desc, app",
    )
    .bind(namespace)
    .bind(event_type)
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(DeclaredRow {
                event_type: row.get(0),
                version: row.get(1),
                app: row.get(2),
                schema: row.try_get::<Json<_>, _>(3)?.0,
                registered_at: timestamp(row.get(4)),
            })
        })
        .collect()
}
