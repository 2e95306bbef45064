//! Nodes and builds: who runs which version of which app.

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Executor, PgConnection, Row, SqlSafeStr, types::Json};

use super::{JsonText, timestamp};

/// A node as it registers.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) app: String,
    pub(crate) build_id: String,
    pub(crate) program: String,
    pub(crate) display_name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) metadata: Value,
    pub(crate) handlers: Value,
}

/// Waits until no other node of the database prepares it; until the transaction ends none does.
pub(crate) async fn await_turn(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::query("select pg_advisory_xact_lock(hashtextextended('nexus: before start', 0))")
        .execute(connection)
        .await
        .map(drop)
}

/// A live node of the same app that is another program.
pub(crate) async fn other_program(
    connection: &mut PgConnection,
    node: &Node,
) -> sqlx::Result<Option<(String, String)>> {
    sqlx::query_as(
        "select node_id, program from core.nodes
         where namespace = $1 and app = $2 and program <> $3 and core.is_live(last_heartbeat)
         order by registered_at limit 1",
    )
    .bind(&node.namespace)
    .bind(&node.app)
    .bind(&node.program)
    .fetch_optional(connection)
    .await
}

/// The namespace of a live node with this id elsewhere; ids are unique in the database.
pub(crate) async fn same_id_elsewhere(
    connection: &mut PgConnection,
    node: &Node,
) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(
        "select namespace from core.nodes
         where node_id = $1 and namespace <> $2 and core.is_live(last_heartbeat)",
    )
    .bind(&node.id)
    .bind(&node.namespace)
    .fetch_optional(connection)
    .await
}

/// Whether a live build appeared after this one, so that this one does not define the app. Notes
/// when the build appeared first.
pub(crate) async fn is_superseded(
    connection: &mut PgConnection,
    node: &Node,
) -> sqlx::Result<bool> {
    sqlx::query(
        "insert into core.builds (namespace, app, build_id) values ($1, $2, $3) on conflict do nothing",
    )
    .bind(&node.namespace)
    .bind(&node.app)
    .bind(&node.build_id)
    .execute(&mut *connection)
    .await?;
    sqlx::query_scalar(
        "select exists (
             select from core.builds mine
             join core.builds other using (namespace, app)
             join core.nodes n using (namespace, app)
             where mine.namespace = $1 and mine.app = $2 and mine.build_id = $3
               and other.build_id <> mine.build_id and other.first_seen_at > mine.first_seen_at
               and n.build_id = other.build_id and core.is_live(n.last_heartbeat))",
    )
    .bind(&node.namespace)
    .bind(&node.app)
    .bind(&node.build_id)
    .fetch_one(connection)
    .await
}

/// Whether nodes of the namespace are there, this one before it restarts among them: they run, or have died without
/// saying why.
pub(crate) async fn has_any(connection: &mut PgConnection, namespace: &str) -> sqlx::Result<bool> {
    sqlx::query_scalar("select exists (select from core.nodes where namespace = $1)")
        .bind(namespace)
        .fetch_one(connection)
        .await
}

/// Registers a boot of the node and returns its epoch, which fences the boot before; `None` if the id is
/// taken in another namespace, which the role may not be allowed to see.
pub(crate) async fn register(
    connection: &mut PgConnection,
    node: &Node,
) -> sqlx::Result<Option<i64>> {
    // Somebody's open transaction may hold the id.
    sqlx::query(
        "select set_config('lock_timeout', '30s', true) where current_setting('lock_timeout') = '0'",
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query("select core.free_node_id($1, $2)")
        .bind(&node.id)
        .bind(&node.namespace)
        .execute(&mut *connection)
        .await?;
    let epoch = insert(
        connection,
        node,
        None,
        "do update
             set app = excluded.app, build_id = excluded.build_id,
                 program = excluded.program, display_name = excluded.display_name,
                 description = excluded.description, metadata = excluded.metadata,
                 handlers = excluded.handlers, registered_at = core.now(),
                 last_heartbeat = core.now(), epoch = excluded.epoch
             where n.namespace = excluded.namespace",
    );
    match epoch.await {
        // Who may not see the other row is told that it may not change it.
        Err(error) if super::is_denied(&error) => Ok(None),
        epoch => epoch,
    }
}

/// Puts back the row of a node that was taken for dead and removed, under the epoch it has. A newer
/// boot that has registered meanwhile keeps the row: the next [`beat`] tells.
pub(crate) async fn restore(
    connection: &mut PgConnection,
    node: &Node,
    epoch: i64,
) -> sqlx::Result<()> {
    insert(connection, node, Some(epoch), "do nothing")
        .await
        .map(drop)
}

/// Inserts the row of a node, under a new epoch if none is given; returns the epoch unless there was
/// a row that stays.
async fn insert(
    connection: &mut PgConnection,
    node: &Node,
    epoch: Option<i64>,
    on_conflict: &'static str,
) -> sqlx::Result<Option<i64>> {
    let metadata = node.metadata.to_string();
    let handlers = node.handlers.to_string();
    let text = format!(
        "insert into core.nodes as n
             (node_id, namespace, app, build_id, program, display_name, description, metadata, handlers, epoch)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, coalesce($10, nextval('core.node_epochs')))
         on conflict (node_id) {on_conflict}
         returning epoch"
    );
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(&node.id)
        .bind(&node.namespace)
        .bind(&node.app)
        .bind(&node.build_id)
        .bind(&node.program)
        .bind(&node.display_name)
        .bind(&node.description)
        .bind(JsonText(&metadata))
        .bind(JsonText(&handlers))
        .bind(epoch)
        .fetch_optional(connection)
        .await
}

/// What a heartbeat found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beat {
    /// The node is registered.
    Alive,
    /// A newer boot has taken the node's id.
    Fenced,
    /// The row is gone, taken for dead and removed.
    Forgotten,
}

/// How long the others take the node for alive whatever becomes of it, counted from before this is called, if it is
/// the one of those alive that started first; `None` if it is not.
pub(crate) async fn first_of_the_live_for(
    connection: &mut PgConnection,
    namespace: &str,
    epoch: i64,
) -> sqlx::Result<Option<Duration>> {
    // As long as core.is_live has it.
    let first: Option<(i64, i64)> = sqlx::query_as(
        "select epoch, (extract(epoch from last_heartbeat + interval '15 seconds' - core.now()) * 1000000)::bigint
         from core.nodes
         where namespace = $1 and core.is_live(last_heartbeat) and app is not null
         order by epoch limit 1",
    )
    .bind(namespace)
    .fetch_optional(connection)
    .await?;
    Ok(first
        .filter(|(first, _)| *first == epoch)
        .map(|(_, micros)| Duration::from_micros(micros.max(0).unsigned_abs())))
}

/// Says that the node is alive, unless a newer boot has taken its id.
pub(crate) async fn beat(
    connection: &mut PgConnection,
    node_id: &str,
    epoch: i64,
) -> sqlx::Result<Beat> {
    let row = sqlx::query(
        "with b as (
             update core.nodes set last_heartbeat = core.now()
             where node_id = $1 and epoch = $2 returning 1
         )
         select exists (select from b), exists (select from core.nodes where node_id = $1)",
    )
    .bind(node_id)
    .bind(epoch)
    .fetch_one(connection)
    .await?;
    Ok(match (row.get(0), row.get(1)) {
        (true, _) => Beat::Alive,
        (false, true) => Beat::Fenced,
        (false, false) => Beat::Forgotten,
    })
}

/// Whether a newer boot has taken the node's id.
pub(crate) async fn is_fenced(
    connection: &mut PgConnection,
    node_id: &str,
    epoch: i64,
) -> sqlx::Result<bool> {
    sqlx::query_scalar("select exists (select from core.nodes where node_id = $1 and epoch > $2)")
        .bind(node_id)
        .bind(epoch)
        .fetch_one(connection)
        .await
}

/// Ends a transaction that has failed, and asks whether the server takes no writes: a standby, or one that was
/// made to take none.
pub(crate) async fn is_read_only_after_rollback(
    connection: &mut PgConnection,
) -> sqlx::Result<bool> {
    // One message, so that behind a pooler both are answered by the same server.
    let asked = sqlx::raw_sql(
        "rollback; select pg_is_in_recovery() or current_setting('default_transaction_read_only')::bool",
    );
    Ok(connection.fetch_one(asked).await?.get(0))
}

/// Forgets a node that has stopped, unless a newer boot has taken its id.
pub(crate) async fn deregister(
    connection: &mut PgConnection,
    node_id: &str,
    epoch: i64,
) -> sqlx::Result<()> {
    sqlx::query("select core.remove_node($1, $2)")
        .bind(node_id)
        .bind(epoch)
        .execute(connection)
        .await
        .map(drop)
}

/// A node that is or was there.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) id: String,
    pub(crate) app: String,
    pub(crate) build_id: String,
    pub(crate) program: String,
    pub(crate) display_name: Option<String>,
    pub(crate) registered_at: Timestamp,
    pub(crate) last_heartbeat: Timestamp,
    pub(crate) is_live: bool,
    pub(crate) handlers: Vec<Runnable>,
}

/// What a node says that it can run.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Runnable {
    pub(crate) group: String,
    pub(crate) handler: String,
    pub(crate) event_type: String,
    pub(crate) event_version: u32,
}

/// The nodes of a namespace.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Listed>> {
    let rows = sqlx::query(
        "select node_id, coalesce(app, ''), coalesce(build_id, ''), coalesce(program, ''), display_name,
                (extract(epoch from registered_at) * 1000000)::bigint,
                (extract(epoch from last_heartbeat) * 1000000)::bigint,
                core.is_live(last_heartbeat), handlers
         from core.nodes where namespace = $1 order by app, node_id",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Listed {
                id: row.get(0),
                app: row.get(1),
                build_id: row.get(2),
                program: row.get(3),
                display_name: row.get(4),
                registered_at: timestamp(row.get(5)),
                last_heartbeat: timestamp(row.get(6)),
                is_live: row.get(7),
                // What somebody has written there by hand is no reason to show nothing.
                handlers: serde_json::from_value(row.try_get::<Json<Value>, _>(8)?.0)
                    .unwrap_or_default(),
            })
        })
        .collect()
}

/// Forgets the nodes of a namespace that are not live, and returns which they were.
pub(crate) async fn reap(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<String>> {
    sqlx::query("select core.require_access('app', $1)")
        .bind(namespace)
        .execute(&mut *connection)
        .await?;
    sqlx::query_scalar(
        "with silent as materialized (
             select node_id, epoch from core.nodes
             where namespace = $1 and not core.is_live(last_heartbeat)
         ), forgotten as materialized (
             select node_id, core.remove_node(node_id, epoch) from silent
         )
         select node_id from forgotten order by 1",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::testing::TestDatabase;

    fn boot(build_id: &str) -> Node {
        Node {
            id: "a".to_owned(),
            namespace: "demo".to_owned(),
            app: "app".to_owned(),
            build_id: build_id.to_owned(),
            program: "program".to_owned(),
            display_name: None,
            description: None,
            metadata: Value::Null,
            handlers: Value::Null,
        }
    }

    #[tokio::test]
    async fn a_node_that_was_forgotten_takes_no_id_from_a_newer_boot() {
        let database = TestDatabase::new().await;
        let mut connection = database.pool().await.acquire().await.unwrap();
        sqlx::query("insert into core.namespaces (namespace) values ('demo')")
            .execute(&mut *connection)
            .await
            .unwrap();
        let (older, newer) = (boot("older"), boot("newer"));
        let first = register(&mut connection, &older).await.unwrap().unwrap();
        let second = register(&mut connection, &newer).await.unwrap().unwrap();
        restore(&mut connection, &older, first).await.unwrap();
        let beats = [
            beat(&mut connection, "a", first).await.unwrap(),
            beat(&mut connection, "a", second).await.unwrap(),
        ];
        assert_eq!(beats, [Beat::Fenced, Beat::Alive]);

        deregister(&mut connection, "a", second).await.unwrap();
        restore(&mut connection, &newer, second).await.unwrap();
        let beat = beat(&mut connection, "a", second).await.unwrap();
        assert_eq!(beat, Beat::Alive);
    }
}
