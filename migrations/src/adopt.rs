//! Takes over the schema of an original nexus-core.
//!
//! One transaction: the schema becomes `core_original`, the files of `sql/` are applied beside it, and its rows are copied.
//! Messages stay in their queues where these are called as nexus calls them, and move there otherwise. Interrupted at any
//! moment, nothing has happened. What has no place in nexus stays in `core_original`, and is told.

use std::collections::BTreeMap;

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, postgres::PgConnectOptions};

use super::{
    LOCK, MIGRATIONS, MigrateError, apply, check_server, current_version, ensure_pgmq, explain,
    failed, pin_search_path,
};

/// Where the rows of the original stay.
pub const SCHEMA: &str = "core_original";

/// A node of the original beats each 30 s, and counts there as active for five minutes.
const SILENCE: &str = "5 minutes";

/// How long to wait for each lock, while others wait for those that are held already.
const LOCKS: &str = "10s";

/// Counting stops here when nothing is to be changed.
const MOST: i64 = 100_000;

/// How to take over.
#[derive(Debug, Clone, Default)]
pub struct How {
    /// Namespaces that get another name, by their old one.
    pub names: BTreeMap<String, String>,
    /// Also while nodes of the original seem to run.
    pub is_forced: bool,
}

/// How many there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// The number.
    pub rows: u64,
    /// From the statistics of the server, not counted.
    pub is_estimate: bool,
}

/// Rows that have no place in nexus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// What they are.
    pub what: &'static str,
    /// How many.
    pub rows: u64,
    /// Why they stay where they are.
    pub why: &'static str,
}

/// A scheduled task as the original has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// The original's name of its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its cron expression.
    pub expression: String,
    /// Its time zone, which the original never looked at.
    pub time_zone: Option<String>,
}

/// What was taken over, or would be.
#[derive(Debug, Clone, Default)]
pub struct Adopted {
    /// Namespaces: the old name of each, and the new one.
    pub namespaces: Vec<(String, String)>,
    /// Nodes.
    pub nodes: Count,
    /// Events of the log.
    pub events: Count,
    /// When the oldest of them was emitted, in microseconds since 1970.
    pub oldest: Option<i64>,
    /// Scheduled tasks, each once however often the original had it.
    pub tasks: Vec<Task>,
    /// Repetitions of these, which are one task each in nexus.
    pub repeated_tasks: u64,
    /// Messages that wait in the queues of the namespaces.
    pub messages: Count,
    /// Dead letters.
    pub letters: Count,
    /// Jobs of `pg_cron` that ran the tasks.
    pub cron_jobs: u64,
    /// Whether `pg_cron` is there and could not be looked at.
    pub is_cron_hidden: bool,
    /// Tables that `pg_partman` looked after.
    pub partman_tables: u64,
    /// What stays in the schema of the original alone.
    pub left: Vec<Left>,
}

/// Tells what [`adopt`] would do. Changes nothing.
///
/// # Errors
///
/// As of [`adopt`].
pub async fn plan(options: &PgConnectOptions, how: &How) -> Result<Adopted, MigrateError> {
    let mut connection = PgConnection::connect_with(options)
        .await
        .map_err(failed("connect to look at the original schema"))?;
    check_server(&mut connection).await?;
    let mut tx = connection.begin().await.map_err(failed(LOOK))?;
    let planned = look(&mut tx, how).await;
    let planned = match planned {
        Ok(planned) => planned,
        Err(error) => {
            tx.rollback().await.map_err(failed(LOOK))?;
            return Err(explain(&mut connection, error).await);
        }
    };
    tx.rollback().await.map_err(failed(LOOK))?;
    Ok(planned)
}

/// Takes over the schema of an original nexus-core and returns what was taken over.
///
/// # Errors
///
/// [`MigrateError`]; nothing has changed, but that pgmq may have been installed.
pub async fn adopt(options: &PgConnectOptions, how: &How) -> Result<Adopted, MigrateError> {
    let mut connection = PgConnection::connect_with(options)
        .await
        .map_err(failed("connect to adopt the original schema"))?;
    check_server(&mut connection).await?;
    if let Err(error) = check(&mut connection, how).await {
        return Err(explain(&mut connection, error).await);
    }
    ensure_pgmq(&mut connection, options).await?;
    let mut tx = connection.begin().await.map_err(failed(COPY))?;
    match Box::pin(adopt_in(&mut tx, how)).await {
        Ok(adopted) => {
            tx.commit().await.map_err(failed(COPY))?;
            Ok(adopted)
        }
        Err(error) => {
            tx.rollback().await.map_err(failed(COPY))?;
            Err(explain(&mut connection, error).await)
        }
    }
}

const LOOK: &str = "look at the original schema";
const COPY: &str = "adopt the original schema";

/// Whether schema `core` has the tables of an original nexus-core.
pub(super) async fn is_original(connection: &mut PgConnection) -> Result<bool, MigrateError> {
    sqlx::query_scalar(
        "select count(*) = 4
         from (values ('namespaces', 'namespace'), ('nodes', 'last_heartbeat'), ('event_log', 'producer_node_id'),
                      ('scheduled_tasks', 'cron_expression')) as o (relation, attribute)
         join pg_class c on c.relname = o.relation and c.relkind in ('r', 'p')
         join pg_namespace n on n.oid = c.relnamespace and n.nspname = 'core'
         join pg_attribute a on a.attrelid = c.oid and a.attname = o.attribute and not a.attisdropped",
    )
    .fetch_one(connection)
    .await
    .map_err(failed(LOOK))
}

/// Refuses what cannot be taken over, and who is at work there. Returns the namespaces.
async fn check(
    connection: &mut PgConnection,
    how: &How,
) -> Result<Vec<(String, String)>, MigrateError> {
    match current_version(connection).await {
        Err(MigrateError::OriginalSchema) => {}
        Err(error) => return Err(error),
        Ok(0) => return Err(nothing("there is no schema `core`")),
        Ok(_) => return Err(nothing("schema `core` is that of nexus already")),
    }
    let is_taken: bool =
        sqlx::query_scalar("select exists (select from pg_namespace where nspname = $1)")
            .bind(SCHEMA)
            .fetch_one(&mut *connection)
            .await
            .map_err(failed(LOOK))?;
    if is_taken {
        return Err(nothing(
            "schema `core_original`, which the original would become, exists: rename that or drop it",
        ));
    }
    // Who owns the original makes the schema beside it.
    let may_not: Option<String> = sqlx::query_scalar(
        "select format('role `%s`, which owns schema core, may not make schemas: run `grant create on database %I to %I`',
                       pg_get_userbyid(nspowner), current_database(), pg_get_userbyid(nspowner))
         from pg_namespace
         where nspname = 'core' and not has_database_privilege(nspowner, current_database(), 'create')",
    )
    .fetch_optional(&mut *connection)
    .await
    .map_err(failed(LOOK))?;
    if let Some(reason) = may_not {
        return Err(nothing(&reason));
    }
    let missing: Option<String> = sqlx::query_scalar(
        "select string_agg(format('%s.%s', o.relation, attribute), ', ')
         from (values ('namespaces', '{created_at,metadata}'::text[]),
                      ('nodes', '{node_id,namespace,display_name,description,metadata,registered_at}'),
                      ('event_log', '{event_id,namespace,event_type,payload,emitted_at,scheduled_task_id,metadata}'),
                      ('scheduled_tasks', '{task_id,namespace,job_id,name,event_type,payload,timezone,active,created_at,updated_at}'))
                  as o (relation, attributes)
         cross join unnest(o.attributes) as attribute
         where not exists (
             select from pg_attribute a
             join pg_class c on c.oid = a.attrelid and c.relname = o.relation
             join pg_namespace n on n.oid = c.relnamespace and n.nspname = 'core'
             where a.attname = attribute and not a.attisdropped)",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(failed(LOOK))?;
    if let Some(missing) = missing {
        return Err(nothing(&format!(
            "the schema is not that of the original as it is known, as it has no {missing}: add what is missing to it"
        )));
    }
    if !how.is_forced {
        refuse_in_use(connection).await?;
    }
    let names = namespaces(connection, how).await?;
    let problems = refused_names(&names, how);
    if problems.is_empty() {
        return Ok(names);
    }
    Err(MigrateError::OriginalNames { problems })
}

fn nothing(reason: &str) -> MigrateError {
    MigrateError::NotOriginal {
        reason: reason.to_owned(),
    }
}

/// Refuses while nodes of the original run: what they read from a queue from now on would be nexus's.
async fn refuse_in_use(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let who: Option<String> = sqlx::query_scalar(AssertSqlSafe(format!(
        "select string_agg(who, ', ') from (
             (select format('node `%s` was heard of at %s', node_id, to_char(last_heartbeat at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')) as who
              from core.nodes where last_heartbeat > now() - interval '{SILENCE}' order by node_id limit 10)
             union all
             (select format('session %s of role `%s` has called pgmq or the original''s functions', pid, usename)
              from pg_stat_activity
              where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'
                and query ~ '\\m(pgmq\\.(read|send|delete|archive|pop)\\M|core\\.(touch_node_heartbeat|append_event_log)\\M)'
              order by pid limit 10)) as busy"
    )))
    .fetch_one(connection)
    .await
    .map_err(failed(LOOK))?;
    match who {
        None => Ok(()),
        Some(who) => Err(MigrateError::OriginalInUse { who }),
    }
}

/// The namespaces that rows name, with the names that they are to have.
async fn namespaces(
    connection: &mut PgConnection,
    how: &How,
) -> Result<Vec<(String, String)>, MigrateError> {
    // Of the log by its index, from one name to the next.
    let found: Vec<String> = sqlx::query_scalar(
        "with recursive logged (namespace) as (
             (select min(namespace) from core.event_log)
             union all
             select (select min(l.namespace) from core.event_log l where l.namespace > logged.namespace)
             from logged where logged.namespace is not null
         )
         select namespace from (
             select namespace from core.namespaces union select namespace from core.nodes
             union select namespace from core.scheduled_tasks union select namespace from logged) as n
         where namespace is not null order by namespace collate \"C\"",
    )
    .fetch_all(connection)
    .await
    .map_err(failed(LOOK))?;
    let renamed = |old: String| {
        let new = how.names.get(&old).unwrap_or(&old).clone();
        (old, new)
    };
    Ok(found.into_iter().map(renamed).collect())
}

/// What cannot be a namespace of nexus, by the rules of `core.check_queue_name`; two that would be one; and names that
/// stand for nothing.
fn refused_names(names: &[(String, String)], how: &How) -> Vec<String> {
    let mut problems: Vec<String> = names
        .iter()
        .filter_map(|(old, new)| Some(format!("`{old}` as `{new}`: {}", refused_name(new)?)))
        .collect();
    let mut parts: BTreeMap<String, &str> = BTreeMap::new();
    for (old, new) in names {
        if let Some(other) = parts.insert(queue_part(new), old) {
            problems.push(format!(
                "`{other}` and `{old}`: as `{new}` they differ only in case or in - and _, and would share their queues"
            ));
        }
    }
    for old in how.names.keys() {
        if !names.iter().any(|(name, _)| name == old) {
            problems.push(format!("`{old}`: there is no such namespace"));
        }
    }
    problems
}

fn queue_part(name: &str) -> String {
    name.to_ascii_lowercase().replace('-', "_")
}

fn refused_name(name: &str) -> Option<&'static str> {
    let part = queue_part(name);
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
        Some("it must start with a letter")
    } else if !name.chars().all(is_allowed) {
        Some("only letters, digits, _ and - are allowed")
    } else if part.contains("__") || part.ends_with('_') || part.ends_with("_dlq") {
        Some("`__` within it, and `_` or `_dlq` at its end, belong to the names of queues")
    } else if name.len() > 31 {
        Some("it has more than 31 characters")
    } else {
        None
    }
}

/// All that is to be told, without changing anything.
async fn look(connection: &mut PgConnection, how: &How) -> Result<Adopted, MigrateError> {
    let namespaces = check(connection, how).await?;
    let wrong = || failed(LOOK);
    let mut planned = Adopted {
        nodes: counted(connection, "core.nodes").await.map_err(wrong())?,
        events: counted(connection, "core.event_log")
            .await
            .map_err(wrong())?,
        oldest: oldest(connection, "core").await.map_err(wrong())?,
        ..Adopted::default()
    };
    for (old, new) in &namespaces {
        for queue in queues(connection, old, new).await.map_err(wrong())? {
            let table = format!("pgmq.{}", queue.table);
            let count = counted(connection, &table).await.map_err(wrong())?;
            let sum = if queue.is_of_letters {
                &mut planned.letters
            } else {
                &mut planned.messages
            };
            sum.rows += count.rows;
            sum.is_estimate |= count.is_estimate;
        }
    }
    planned.namespaces = namespaces;
    (planned.tasks, planned.repeated_tasks) = tasks(connection, "core").await.map_err(wrong())?;
    planned.left = left(connection, "core").await.map_err(wrong())?;
    let left_nodes = planned.left.iter().filter(|left| left.what == NODES);
    planned.nodes.rows -= left_nodes.map(|left| left.rows).sum::<u64>();
    let jobs = cron_jobs(connection).await.map_err(wrong())?;
    planned.is_cron_hidden = jobs.is_none();
    planned.cron_jobs = jobs.unwrap_or_default().len() as u64;
    let tables = partman(connection).await.map_err(wrong())?;
    planned.partman_tables = tables.len() as u64;
    Ok(planned)
}

/// Up to [`MOST`] by counting, else by the statistics.
async fn counted(connection: &mut PgConnection, table: &str) -> sqlx::Result<Count> {
    let counted: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
        "select count(*) from (select from {table} limit {}) as t",
        MOST + 1
    )))
    .fetch_one(&mut *connection)
    .await?;
    if counted <= MOST {
        return Ok(Count {
            rows: counted.unsigned_abs(),
            is_estimate: false,
        });
    }
    let estimate: i64 = sqlx::query_scalar(
        "select coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint
         from pg_partition_tree($1::regclass) t join pg_class c on c.oid = t.relid where t.isleaf",
    )
    .bind(table)
    .fetch_one(&mut *connection)
    .await?;
    // Of a table that is not partitioned there is no tree.
    let estimate = if estimate > 0 {
        estimate
    } else {
        sqlx::query_scalar(
            "select greatest(reltuples, 0)::bigint from pg_class where oid = $1::regclass",
        )
        .bind(table)
        .fetch_one(connection)
        .await?
    };
    Ok(Count {
        rows: estimate.max(counted).unsigned_abs(),
        is_estimate: true,
    })
}

async fn oldest(connection: &mut PgConnection, schema: &str) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(AssertSqlSafe(format!(
        "select (extract(epoch from min(emitted_at)) * 1000000)::bigint from {schema}.event_log where isfinite(emitted_at)"
    )))
    .fetch_one(connection)
    .await
}

/// The tasks as nexus will have them, and how many more rows the original has that say the same: each start of a
/// node made another one.
async fn tasks(connection: &mut PgConnection, schema: &str) -> sqlx::Result<(Vec<Task>, u64)> {
    let rows = sqlx::query(AssertSqlSafe(format!(
        "select namespace, name, cron_expression, timezone from ({}) as t where place is not null order by namespace, name",
        told_tasks(schema)
    )))
    .fetch_all(&mut *connection)
    .await?;
    let tasks: Vec<Task> = rows
        .into_iter()
        .map(|row| Task {
            namespace: row.get(0),
            name: row.get(1),
            expression: row.get(2),
            time_zone: row.get(3),
        })
        .collect();
    let repeated: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
        "select count(*) from ({}) as t where copy > 1",
        told_tasks(schema)
    )))
    .fetch_one(connection)
    .await?;
    Ok((tasks, repeated.unsigned_abs()))
}

/// Each task with `copy`, which counts rows that say the same, and `place`, which counts different tasks of one name.
/// Null is the place of what stays behind.
fn told_tasks(schema: &str) -> String {
    format!(
        "select t.*, case when copy = 1 and octet_length(event_type) between 1 and 100 then
                     row_number() over (partition by namespace, name, copy = 1 order by active desc, created_at desc, task_id) end as place
         from (select t.*, row_number() over (
                   partition by namespace, name, cron_expression, event_type, payload, timezone
                   order by active desc, created_at desc, task_id) as copy
               from {schema}.scheduled_tasks t) as t"
    )
}

const NODES: &str = "nodes";

/// What has no place in nexus.
async fn left(connection: &mut PgConnection, schema: &str) -> sqlx::Result<Vec<Left>> {
    let conditions = [
        (
            NODES,
            "the id has more than 100 bytes, or none",
            "nodes where octet_length(node_id) not between 1 and 100",
        ),
        (
            "scheduled tasks",
            "the event type has more than 100 bytes, or none",
            "scheduled_tasks where octet_length(event_type) not between 1 and 100",
        ),
    ];
    let mut found = Vec::new();
    for (what, why, rows) in conditions {
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
            "select count(*) from {schema}.{rows}"
        )))
        .fetch_one(&mut *connection)
        .await?;
        if count > 0 {
            found.push(Left {
                what,
                rows: count.unsigned_abs(),
                why,
            });
        }
    }
    Ok(found)
}

/// A queue of the original.
struct Queue {
    /// Its table, quoted.
    table: String,
    /// Whether it is called as nexus calls it.
    is_in_place: bool,
    is_of_letters: bool,
}

/// The queues of a namespace. The original has called its dead letters in two ways, and its queues with and without
/// the hyphens of the namespace; pgmq calls tables in lower case.
async fn queues(connection: &mut PgConnection, old: &str, new: &str) -> sqlx::Result<Vec<Queue>> {
    let target = format!("core_events_{}", queue_part(new));
    let mut names = Vec::new();
    for spelt in [old.to_owned(), old.replace('-', "_")] {
        names.push((format!("core_events_{spelt}"), false));
        names.push((format!("core_events_{spelt}_dlq"), true));
        names.push((format!("{spelt}_dlq"), true));
    }
    let mut found: Vec<Queue> = Vec::new();
    for (name, is_of_letters) in names {
        let table: Option<String> = sqlx::query_scalar(
            "select quote_ident(c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = 'pgmq' and c.relname = 'q_' || lower($1) and c.relkind in ('r', 'p')",
        )
        .bind(&name)
        .fetch_optional(&mut *connection)
        .await?;
        let Some(table) = table else { continue };
        if found.iter().all(|queue| queue.table != table) {
            let end = if is_of_letters { "_dlq" } else { "" };
            found.push(Queue {
                is_in_place: table.trim_matches('"') == format!("q_{target}{end}"),
                table,
                is_of_letters,
            });
        }
    }
    Ok(found)
}

/// The jobs of `pg_cron` that run the original's tasks; `None` if it is there and may not be looked at. Those of other
/// roles are seen by superusers alone.
async fn cron_jobs(connection: &mut PgConnection) -> sqlx::Result<Option<Vec<i64>>> {
    let may_look: Option<bool> = sqlx::query_scalar(
        "select has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where n.nspname = 'cron' and c.relname = 'job'",
    )
    .fetch_optional(&mut *connection)
    .await?;
    match may_look {
        None => Ok(Some(Vec::new())),
        Some(false) => Ok(None),
        Some(true) => sqlx::query_scalar(
            "select jobid from cron.job
             where database = current_database() and command like '%core.run\\_scheduled\\_task(%' order by jobid",
        )
        .fetch_all(connection)
        .await
        .map(Some),
    }
}

/// The tables in which `pg_partman` keeps the log registered, quoted: in whichever schema it was installed.
async fn partman(connection: &mut PgConnection) -> sqlx::Result<Vec<String>> {
    let tables: Vec<String> = sqlx::query_scalar(
        "select format('%I.%I', n.nspname, c.relname)
         from pg_class c join pg_namespace n on n.oid = c.relnamespace
         join pg_attribute a on a.attrelid = c.oid and a.attname = 'parent_table'
         where c.relname = 'part_config' and c.relkind = 'r'",
    )
    .fetch_all(&mut *connection)
    .await?;
    let mut registered = Vec::new();
    for table in tables {
        let has: bool = sqlx::query_scalar(AssertSqlSafe(format!(
            "select exists (select from {table} where parent_table = 'core.event_log')"
        )))
        .fetch_one(&mut *connection)
        .await?;
        if has {
            registered.push(table);
        }
    }
    Ok(registered)
}

async fn adopt_in(connection: &mut PgConnection, how: &How) -> Result<Adopted, MigrateError> {
    lock(connection).await?;
    // Again, as another process may have been here, or a node come.
    let namespaces = check(connection, how).await?;
    let wrong = || failed(COPY);
    let mut adopted = unregister(connection).await.map_err(wrong())?;
    rename(connection).await.map_err(wrong())?;
    for step in MIGRATIONS {
        apply(connection, step).await?;
    }
    pin_search_path(connection).await.map_err(wrong())?;
    sqlx::raw_sql("set local timezone = 'UTC'")
        .execute(&mut *connection)
        .await
        .map_err(wrong())?;
    name(connection, &namespaces).await.map_err(wrong())?;
    adopted.namespaces = namespaces;
    adopted.oldest = oldest(connection, SCHEMA).await.map_err(wrong())?;
    adopted.events = copy_log(connection).await.map_err(wrong())?;
    adopted.nodes = copy_nodes(connection).await.map_err(wrong())?;
    (adopted.tasks, adopted.repeated_tasks) = copy_tasks(connection).await.map_err(wrong())?;
    adopted.left = left(connection, SCHEMA).await.map_err(wrong())?;
    // Last, as who sends to them waits from here to the commit.
    for (old, new) in &adopted.namespaces {
        let (messages, letters) = take_queues(connection, old, new).await.map_err(wrong())?;
        adopted.messages.rows += messages;
        adopted.letters.rows += letters;
    }
    Ok(adopted)
}

/// Keeps everybody from the original's tables, and waits for who is at them, but not for long.
async fn lock(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let locked = async {
        sqlx::raw_sql(AssertSqlSafe(format!(
            "set local lock_timeout = '{LOCKS}'; select pg_advisory_xact_lock({LOCK}); savepoint before"
        )))
        .execute(&mut *connection)
        .await?;
        // Another process may have renamed them while this one waited.
        let is_there: bool = sqlx::query_scalar("select to_regclass('core.event_log') is not null")
            .fetch_one(&mut *connection)
            .await?;
        if is_there {
            sqlx::raw_sql(
                "lock table core.namespaces, core.nodes, core.event_log, core.scheduled_tasks in access exclusive mode",
            )
            .execute(&mut *connection)
            .await?;
        }
        Ok(())
    };
    let locked: sqlx::Result<()> = locked.await;
    let Err(source) = locked else {
        return Ok(());
    };
    let is_timeout = source
        .as_database_error()
        .is_some_and(|error| error.code().as_deref() == Some("55P03"));
    if !is_timeout {
        return Err(failed("lock the original schema")(source));
    }
    let holders = async {
        sqlx::raw_sql("rollback to before")
            .execute(&mut *connection)
            .await?;
        sqlx::query_scalar(
            "select string_agg(distinct format('session %s of role `%s` holds a lock', a.pid, a.usename), ', ')
             from pg_locks l join pg_stat_activity a using (pid)
             join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
             where l.granted and l.pid <> pg_backend_pid() and n.nspname = 'core'
               and l.database = (select oid from pg_database where datname = current_database())",
        )
        .fetch_one(&mut *connection)
        .await
    };
    let who: sqlx::Result<Option<String>> = holders.await;
    Err(MigrateError::OriginalInUse {
        who: who
            .ok()
            .flatten()
            .unwrap_or_else(|| "another session holds a lock".to_owned()),
    })
}

/// Takes the tables from `pg_cron` and `pg_partman`, with the rights of who connected: those of the schema's owner may not do.
async fn unregister(connection: &mut PgConnection) -> sqlx::Result<Adopted> {
    let mut adopted = Adopted::default();
    match cron_jobs(connection).await? {
        None => adopted.is_cron_hidden = true,
        Some(jobs) => {
            for job in &jobs {
                sqlx::query("select cron.unschedule($1)")
                    .bind(job)
                    .execute(&mut *connection)
                    .await?;
            }
            adopted.cron_jobs = jobs.len() as u64;
        }
    }
    for table in partman(connection).await? {
        let done = sqlx::raw_sql(AssertSqlSafe(format!(
            "delete from {table} where parent_table = 'core.event_log'"
        )))
        .execute(&mut *connection)
        .await?;
        adopted.partman_tables += done.rows_affected();
    }
    Ok(adopted)
}

/// Makes room for the schema of nexus, which gets the same owner.
async fn rename(connection: &mut PgConnection) -> sqlx::Result<()> {
    let owner: Option<String> = sqlx::query_scalar(
        "select quote_ident(pg_get_userbyid(nspowner)) from pg_namespace
         where nspname = 'core' and nspowner <> current_user::regrole and pg_has_role(nspowner, 'member')",
    )
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(owner) = owner {
        sqlx::raw_sql(AssertSqlSafe(format!("set local role {owner}")))
            .execute(&mut *connection)
            .await?;
    }
    sqlx::raw_sql(AssertSqlSafe(format!(
        "alter schema core rename to {SCHEMA};
         comment on schema {SCHEMA} is 'An original nexus-core, whose rows nexus has copied to schema core. Drop it when nobody needs it any more.'"
    )))
    .execute(connection)
    .await
    .map(drop)
}

/// Notes what the namespaces are called now, where it can be looked up later.
async fn name(connection: &mut PgConnection, namespaces: &[(String, String)]) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(format!(
        "create table {SCHEMA}.adopted_namespaces (original text primary key, namespace text not null unique)"
    )))
    .execute(&mut *connection)
    .await?;
    let (old, new): (Vec<&str>, Vec<&str>) = namespaces
        .iter()
        .map(|(old, new)| (old.as_str(), new.as_str()))
        .unzip();
    sqlx::query(AssertSqlSafe(format!(
        "insert into {SCHEMA}.adopted_namespaces select * from unnest($1::text[], $2::text[])"
    )))
    .bind(old)
    .bind(new)
    .execute(&mut *connection)
    .await?;
    sqlx::query(AssertSqlSafe(format!(
        "insert into core.namespaces (namespace, created_at, metadata)
         select a.namespace, coalesce(n.created_at, now()), coalesce(n.metadata, '{{}}')
         from {SCHEMA}.adopted_namespaces a left join {SCHEMA}.namespaces n on n.namespace = a.original"
    )))
    .execute(connection)
    .await
    .map(drop)
}

/// With the months that are over, which nexus makes no partitions for.
async fn copy_log(connection: &mut PgConnection) -> sqlx::Result<Count> {
    sqlx::raw_sql(AssertSqlSafe(format!(
        "do $$
         declare
             month timestamptz;
             name text;
         begin
             for month in
                 select distinct date_trunc('month', emitted_at) from {SCHEMA}.event_log
             loop
                 name := 'event_log_' || to_char(month, 'YYYY_MM');
                 if to_regclass('core.' || name) is null then
                     execute format('create table core.%I (like core.event_log including all)', name);
                     execute format(
                         'create trigger append_only before update or delete or truncate on core.%I
                              for each statement execute function core.refuse_change_of_event_log()', name);
                     execute format('alter table core.%I enable always trigger append_only', name);
                     execute format('alter table core.%I enable row level security', name);
                     execute format('alter table core.event_log attach partition core.%I for values from (%L) to (%L)',
                         name, month, month + interval '1 month');
                 end if;
             end loop;
         end
         $$"
    )))
    .execute(&mut *connection)
    .await?;
    // Nobody is owed a delivery of these: what waits, waits in the queues.
    let copied = sqlx::query(AssertSqlSafe(format!(
        "insert into core.event_log
             (event_id, namespace, event_type, payload, emitted_at, producer_node_id, scheduled_task_id, metadata,
              correlation_id)
         select l.event_id, a.namespace, l.event_type, coalesce(l.payload, 'null'), l.emitted_at,
                coalesce(l.producer_node_id, 'unknown'), l.scheduled_task_id,
                case when l.metadata is null then '{{}}'
                     when jsonb_typeof(l.metadata) = 'object' then l.metadata
                     else jsonb_build_object('original', l.metadata) end,
                l.event_id::text
         from {SCHEMA}.event_log l join {SCHEMA}.adopted_namespaces a on a.original = l.namespace"
    )))
    .execute(&mut *connection)
    .await?;
    sqlx::raw_sql(
        "select setval('core.event_log_event_id_seq', max(event_id)) from core.event_log having max(event_id) > 0",
    )
    .execute(connection)
    .await?;
    Ok(exactly(copied.rows_affected()))
}

fn exactly(rows: u64) -> Count {
    Count {
        rows,
        is_estimate: false,
    }
}

async fn copy_nodes(connection: &mut PgConnection) -> sqlx::Result<Count> {
    let copied = sqlx::query(AssertSqlSafe(format!(
        "insert into core.nodes
             (node_id, namespace, display_name, description, metadata, registered_at, last_heartbeat)
         select n.node_id, a.namespace, n.display_name, n.description, coalesce(n.metadata, '{{}}'),
                coalesce(n.registered_at, now()), coalesce(n.last_heartbeat, n.registered_at, now())
         from {SCHEMA}.nodes n join {SCHEMA}.adopted_namespaces a on a.original = n.namespace
         where octet_length(n.node_id) between 1 and 100"
    )))
    .execute(connection)
    .await?;
    Ok(exactly(copied.rows_affected()))
}

/// A node computes when they are due, and says of those that it cannot read why they are inactive then.
async fn copy_tasks(connection: &mut PgConnection) -> sqlx::Result<(Vec<Task>, u64)> {
    sqlx::query(AssertSqlSafe(format!(
        "insert into core.scheduled_tasks
             (task_id, namespace, job_id, name, cron_expression, event_type, payload, timezone, active, created_at, updated_at)
         select t.task_id, a.namespace,
                coalesce(t.job_id, nextval(pg_get_serial_sequence('core.scheduled_tasks', 'job_id'))),
                -- Several of one name were several tasks.
                t.name || case when t.place = 1 then '' else '_' || left(t.task_id::text, 8) end,
                t.cron_expression, t.event_type, coalesce(t.payload, '{{}}'), t.timezone, coalesce(t.active, true),
                coalesce(t.created_at, now()), coalesce(t.updated_at, t.created_at, now())
         from ({}) as t join {SCHEMA}.adopted_namespaces a on a.original = t.namespace
         where t.place is not null",
        told_tasks(SCHEMA)
    )))
    .execute(&mut *connection)
    .await?;
    sqlx::raw_sql(
        "select setval(pg_get_serial_sequence('core.scheduled_tasks', 'job_id'), max(job_id))
         from core.scheduled_tasks having max(job_id) > 0",
    )
    .execute(&mut *connection)
    .await?;
    tasks(connection, SCHEMA).await
}

/// Makes the queues of a namespace those of nexus; what waits there is adopted by the first node, like all that
/// foreign programs send. Returns how many messages and dead letters there are.
async fn take_queues(
    connection: &mut PgConnection,
    old: &str,
    new: &str,
) -> sqlx::Result<(u64, u64)> {
    let queues = queues(connection, old, new).await?;
    let target: String = sqlx::query_scalar("select core.ensure_group($1, 'default')")
        .bind(new)
        .fetch_one(&mut *connection)
        .await?;
    for queue in &queues {
        let end = if queue.is_of_letters { "_dlq" } else { "" };
        if queue.is_in_place {
            sqlx::query("select core.tune_queue($1, $2)")
                .bind(format!("{target}{end}"))
                .bind(!queue.is_of_letters)
                .execute(&mut *connection)
                .await?;
            sqlx::query("update pgmq.meta set queue_name = lower(queue_name) where lower(queue_name) = $1 and queue_name <> $1")
                .bind(format!("{target}{end}"))
                .execute(&mut *connection)
                .await?;
        } else {
            sqlx::raw_sql(AssertSqlSafe(format!(
                "with moved as (delete from pgmq.{} returning read_ct, enqueued_at, vt, message, headers)
                 insert into pgmq.q_{target}{end} (read_ct, enqueued_at, vt, message, headers)
                 select * from moved order by enqueued_at",
                queue.table
            )))
            .execute(&mut *connection)
            .await?;
        }
    }
    if old != new {
        sqlx::query(AssertSqlSafe(format!(
            "update pgmq.q_{target} set message = message || jsonb_build_object('namespace', $2::text)
             where jsonb_typeof(message) = 'object' and message ->> 'namespace' = $1"
        )))
        .bind(old)
        .bind(new)
        .execute(&mut *connection)
        .await?;
        sqlx::query(AssertSqlSafe(format!(
            "update pgmq.q_{target}_dlq set message = jsonb_set(message, '{{originalEvent,namespace}}', to_jsonb($2::text))
             where jsonb_typeof(message -> 'originalEvent') = 'object' and message #>> '{{originalEvent,namespace}}' = $1"
        )))
        .bind(old)
        .bind(new)
        .execute(&mut *connection)
        .await?;
    }
    // By which dead letters are looked for.
    sqlx::raw_sql(AssertSqlSafe(format!(
        "update pgmq.q_{target}_dlq
         set headers = case when jsonb_typeof(headers) = 'object' then headers else '{{}}' end
             || core.letter_headers(message -> 'originalEvent', message ->> 'reason', message ->> 'error')
         where jsonb_typeof(message) = 'object' and message ? 'originalEvent'"
    )))
    .execute(&mut *connection)
    .await?;
    let counts: (i64, i64) = sqlx::query_as(AssertSqlSafe(format!(
        "select (select count(*) from pgmq.q_{target}), (select count(*) from pgmq.q_{target}_dlq)"
    )))
    .fetch_one(connection)
    .await?;
    Ok((counts.0.unsigned_abs(), counts.1.unsigned_abs()))
}
