//! The schema of nexus: the numbered SQL files of `sql/`, and what applies them.
//!
//! [`up`] brings a database to the newest version, [`verify`] only looks whether it is there, and
//! [`down`] goes back; [`adopt`](mod@adopt) takes over what an original nexus-core has left. The files are applied in order, each in a transaction of its own together
//! with its row in `core.schema_migrations`, under a lock on that table, so that any number of
//! processes may start at once. Tables of the application and its own migrations are not touched.
//!
//! All that is made belongs to the owner of schema `core`, whoever applies the files: the owner, a
//! member of that role, or a superuser. Other roles verify.
//!
//! The queues are pgmq's. Where the server offers the extension, it is created; elsewhere pgmq's
//! own SQL is installed, which needs no rights beyond those to create a schema.

pub mod adopt;
mod objects;

pub use objects::{Drift, OBJECTS, drift, objects};

use sqlx::{
    AssertSqlSafe, Connection, PgConnection, PgPool, Row,
    postgres::{PgConnectOptions, PgPoolOptions},
};

/// One step of the schema.
#[derive(Debug, Clone, Copy)]
pub struct Migration {
    /// Counts from 1 without gaps.
    pub version: i32,
    /// What it brings.
    pub name: &'static str,
    /// The SQL that applies it.
    pub up: &'static str,
    /// The SQL that takes it back.
    pub down: &'static str,
}

impl Migration {
    /// Changes when the file that applies it does.
    fn checksum(&self) -> String {
        fnv1a(self.up.bytes())
    }
}

macro_rules! migrations {
    ($($version:literal $name:literal),* $(,)?) => {
        &[$(Migration {
            version: $version,
            name: $name,
            up: include_str!(concat!("../sql/", $name, ".up.sql")),
            down: include_str!(concat!("../sql/", $name, ".down.sql")),
        }),*]
    };
}

/// Every step, oldest first.
pub const MIGRATIONS: &[Migration] = migrations![
    1 "0001_event_log",
    2 "0002_queues",
    3 "0003_nodes_and_subscriptions",
    4 "0004_emit",
    5 "0005_schedules",
    6 "0006_maintenance",
    7 "0007_renames",
    8 "0008_schedules",
    9 "0009_delayed_emits",
    10 "0010_pg_cron",
    11 "0011_checks",
    12 "0012_first_hour",
    13 "0013_dead_letters",
    14 "0014_replays",
    15 "0015_retire",
    16 "0016_roles",
    17 "0017_letters_by_place",
    18 "0018_versions_in_plan",
    19 "0019_paused_groups",
    20 "0020_tokens",
];

/// The version that this build works with.
#[must_use]
pub fn newest_version() -> i32 {
    MIGRATIONS.len().try_into().unwrap_or(i32::MAX)
}

/// Oldest supported `server_version_num`.
const OLDEST_SERVER: i32 = 15_00_00;

/// Oldest supported pgmq: from here on its SQL can be upgraded without the extension.
const OLDEST_PGMQ: (u32, u32) = (1, 8);

/// Serializes processes while there is no table to lock. Any 64-bit number will do, as long as nobody
/// else uses it.
const LOCK: i64 = 0x006e_6578_7573_0001;

/// How long to wait for other migrations, unless the connection says otherwise.
const LOCK_TIMEOUT: &str = "5min";

/// Why the schema is not what this build needs. Every step that is not mentioned as done was
/// rolled back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// Use a newer server.
    #[error("PostgreSQL 15 or newer is needed, this server is {found}")]
    ServerTooOld {
        /// The server's own version text.
        found: String,
    },
    /// Deploy the newer program, or go back with the newer program's `down`.
    #[error(
        "the schema has version {found}, this build knows versions up to {known}: deploy a build that is at least as new as the newest that ran here"
    )]
    SchemaTooNew {
        /// The version in the database.
        found: i32,
        /// The newest version of this build.
        known: i32,
    },
    /// The schema is missing or older than this build needs, and was not brought there: the text says
    /// which role has to do it.
    #[error("{}", too_old(*.found, *.needed, .role, .owner.as_deref(), *.may_migrate))]
    #[non_exhaustive]
    SchemaTooOld {
        /// The version in the database; 0 if there is no schema.
        found: i32,
        /// The version of this build.
        needed: i32,
        /// The role that connected.
        role: String,
        /// The role that owns the schema; `None` if there is none.
        owner: Option<String>,
        /// Whether the role that connected has the owner's rights.
        may_migrate: bool,
    },
    /// Another session holds the lock of migrations. Wait until it is done, or end it.
    #[error(
        "other migrations are not done yet: {holder} holds their lock: wait for it or end it, then start again"
    )]
    Locked {
        /// The session and its role.
        holder: String,
        /// What the server reported.
        source: sqlx::Error,
    },
    /// The database was migrated by a build whose file was another: one in development. Use another
    /// database, or delete the data of the embedded one.
    #[error(
        "migration {name} was applied to this database as another file than this build has: start with an empty database (development data can be deleted)"
    )]
    Edited {
        /// The file, without `.up.sql`.
        name: &'static str,
    },
    /// Something else owns schema `core`. Use another database.
    #[error(
        "schema `core` exists in this database and was not made by nexus: use another database, or rename that schema"
    )]
    ForeignSchema,
    /// Schema `core` is that of an original nexus-core. Take it over, or use another database.
    #[error(
        "schema `core` of this database is that of an original nexus-core: take it over by `nexus migrate adopt` (`Database::adopt`), which keeps its rows, or use another database"
    )]
    OriginalSchema,
    /// There is no schema of an original nexus-core that could be taken over; the text says what there is.
    #[error("nothing can be adopted: {reason}")]
    NotOriginal {
        /// What there is instead.
        reason: String,
    },
    /// Nodes of the original run, or somebody holds locks on its tables. Stop them first.
    #[error(
        "the original nexus-core is in use ({who}): stop its nodes, which would read messages that are nexus's then, and wait for five minutes, or force it"
    )]
    OriginalInUse {
        /// Who was found.
        who: String,
    },
    /// Namespaces of the original cannot have their names in nexus. Give them others.
    #[error("give these namespaces of the original other names: {}", .problems.join("; "))]
    OriginalNames {
        /// Which, and why.
        problems: Vec<String>,
    },
    /// Upgrade pgmq, or use a database without it.
    #[error(
        "pgmq {found} is installed, nexus needs 1.8 or newer: upgrade it with `alter extension pgmq update`"
    )]
    PgmqTooOld {
        /// The installed version.
        found: String,
    },
    /// The role may not do what is needed.
    #[error(
        "role `{role}` lacks rights in database `{database}`: {source}. Grant them (`{grant}`), or run the migrations with another role"
    )]
    NotAllowed {
        /// The role that connected.
        role: String,
        /// The database.
        database: String,
        /// The statement that gives the role what it needs.
        grant: String,
        /// What the server refused.
        source: sqlx::Error,
    },
    /// pgmq's SQL could not be installed.
    #[error("could not install pgmq")]
    Pgmq(#[source] pgmq::PgmqError),
    /// A file failed; it was rolled back, those before it are applied.
    #[error("migration {name} failed")]
    Apply {
        /// The file, without `.up.sql` or `.down.sql`.
        name: &'static str,
        /// What the server reported.
        source: sqlx::Error,
    },
    /// The database could not be asked.
    #[error("could not {doing}")]
    Database {
        /// What was attempted.
        doing: &'static str,
        /// What went wrong.
        source: sqlx::Error,
    },
}

fn too_old(found: i32, needed: i32, role: &str, owner: Option<&str>, may_migrate: bool) -> String {
    let migrate = "start an app of this build, or call `Database::migrate`,";
    match owner {
        Some(owner) if may_migrate => format!(
            "the schema has version {found}, this build needs {needed}: {migrate} as role `{owner}`"
        ),
        Some(owner) => format!(
            "the schema has version {found}, this build needs {needed}, and role `{role}` may not change it: {migrate} as role `{owner}`, which owns it"
        ),
        None => format!(
            "there is no schema `core` in this database, this build needs version {needed}: {migrate} as a role with `create` on the database"
        ),
    }
}

fn failed(doing: &'static str) -> impl FnOnce(sqlx::Error) -> MigrateError {
    move |source| MigrateError::Database { doing, source }
}

/// Brings the schema to the newest version and returns how many steps were applied.
///
/// Does nothing, and needs no rights beyond reading, if the schema is there already. A role that has
/// not got the rights of the schema's owner only verifies.
///
/// # Errors
///
/// [`MigrateError`]; the steps before the one that failed stay applied. Waits up to five minutes for
/// migrations of others, or for the `lock_timeout` of the connection.
pub async fn up(options: &PgConnectOptions) -> Result<usize, MigrateError> {
    let mut connection = PgConnection::connect_with(options)
        .await
        .map_err(failed("connect to migrate"))?;
    check_server(&mut connection).await?;
    let mut from = current_version(&mut connection).await?;
    if from == newest_version() {
        connection
            .close()
            .await
            .map_err(failed("close the migrating connection"))?;
        return Ok(0);
    }
    if from > 0 && !may_migrate(&mut connection).await? {
        return Err(old_schema(&mut connection, from).await?);
    }

    if from < 2 {
        lock_first(&mut connection).await?;
        // Another process may have done it while this one waited.
        from = current_version(&mut connection).await?;
        if from < 2 {
            ensure_pgmq(&mut connection, options).await?;
        }
    }
    let steps = MIGRATIONS.iter().filter(|step| step.version > from);
    let mut applied = 0;
    for step in steps {
        match apply(&mut connection, step).await {
            Ok(true) => {
                tracing::info!(migration = step.name, "applied a migration");
                applied += 1;
            }
            Ok(false) => {}
            Err(error) => return Err(explain(&mut connection, error).await),
        }
    }
    connection
        .close()
        .await
        .map_err(failed("close the migrating connection"))?;
    Ok(applied)
}

/// Checks that the schema is exactly what this build needs, changing nothing.
///
/// # Errors
///
/// [`MigrateError`] that says what is different.
pub async fn verify(connection: &mut PgConnection) -> Result<(), MigrateError> {
    check_server(connection).await?;
    let found = current_version(connection).await?;
    if found < newest_version() {
        return Err(old_schema(connection, found).await?);
    }
    Ok(())
}

/// Every step, oldest first, and when it was applied to this database, in microseconds since 1970; `None` if it
/// has not been. Changes nothing.
///
/// # Errors
///
/// [`MigrateError`]: the schema is newer than this build, or not its own, or may not be read.
pub async fn history(
    connection: &mut PgConnection,
) -> Result<Vec<(&'static Migration, Option<i64>)>, MigrateError> {
    check_server(connection).await?;
    let applied: Vec<(i32, i64)> = if current_version(connection).await? == 0 {
        Vec::new()
    } else {
        sqlx::query_as(
            "select version, (extract(epoch from applied_at) * 1000000)::bigint from core.schema_migrations",
        )
        .fetch_all(connection)
        .await
        .map_err(failed(READ))?
    };
    Ok(MIGRATIONS
        .iter()
        .map(|step| {
            let at = applied.iter().find(|(version, _)| *version == step.version);
            (step, at.map(|(_, at)| *at))
        })
        .collect())
}

async fn old_schema(
    connection: &mut PgConnection,
    found: i32,
) -> Result<MigrateError, MigrateError> {
    let doing = "ask for the owner of the schema";
    let (role, owner) = sqlx::query_as(
        "select current_user::text, (select pg_get_userbyid(nspowner)::text from pg_namespace where nspname = 'core')",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(failed(doing))?;
    Ok(MigrateError::SchemaTooOld {
        found,
        needed: newest_version(),
        role,
        owner,
        may_migrate: may_migrate(connection).await?,
    })
}

/// Whether the role is the owner of the schema, a member of it, or a superuser.
async fn may_migrate(connection: &mut PgConnection) -> Result<bool, MigrateError> {
    sqlx::query_scalar(
        "select coalesce((select pg_has_role(nspowner, 'member') from pg_namespace where nspname = 'core'), false)",
    )
    .fetch_one(connection)
    .await
    .map_err(failed("ask for the owner of the schema"))
}

/// Serializes the processes that find no schema, until the session ends.
async fn lock_first(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let waited = async {
        limit_lock_timeout(connection).await?;
        sqlx::query("select pg_advisory_lock($1)")
            .bind(LOCK)
            .execute(&mut *connection)
            .await?;
        sqlx::raw_sql("reset lock_timeout")
            .execute(&mut *connection)
            .await
    };
    match waited.await {
        Ok(_) => Ok(()),
        Err(source) => Err(locked(
            connection,
            source,
            &format!("locktype = 'advisory' and classid::bigint << 32 | objid::bigint = {LOCK}"),
        )
        .await),
    }
}

/// Waits for a limited time, unless the connection has a limit of its own. True if it had none.
async fn limit_lock_timeout(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query(
        "select set_config('lock_timeout', $1, false) where current_setting('lock_timeout') = '0'",
    )
    .bind(LOCK_TIMEOUT)
    .execute(connection)
    .await
    .map(|done| done.rows_affected() > 0)
}

/// Names whoever holds the lock, if that is what went wrong.
async fn locked(connection: &mut PgConnection, source: sqlx::Error, which: &str) -> MigrateError {
    let code = source
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code);
    if code.as_deref() != Some("55P03") {
        return failed("wait for other migrations")(source);
    }
    let text = format!(
        "select string_agg(format('session %s of role `%s`', pid, usename), ', ' order by pid)
         from pg_locks join pg_stat_activity using (pid)
         where granted and database = (select oid from pg_database where datname = current_database())
           and {which}"
    );
    let holder: sqlx::Result<Option<String>> = sqlx::query_scalar(AssertSqlSafe(text))
        .fetch_one(connection)
        .await;
    MigrateError::Locked {
        holder: holder
            .ok()
            .flatten()
            .unwrap_or_else(|| "another session".to_owned()),
        source,
    }
}

/// Takes the lock of migrations until the transaction ends, and the place of the schema's owner. Only the
/// owner can take this lock, whereas one by a number could be held by anybody.
async fn enter(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let owner: Option<String> = sqlx::query_scalar(
        "select quote_ident(pg_get_userbyid(nspowner)) from pg_namespace
         where nspname = 'core' and nspowner <> current_user::regrole
           -- A session that has given up rights by `set role` gets none back here.
           and pg_has_role(nspowner, 'member')",
    )
    .fetch_optional(&mut *connection)
    .await
    .map_err(failed("ask for the owner of the schema"))?;
    if let Some(owner) = owner {
        sqlx::raw_sql(AssertSqlSafe(format!("set local role {owner}")))
            .execute(&mut *connection)
            .await
            .map_err(failed("become the owner of the schema"))?;
    }
    let mut tx = connection
        .begin()
        .await
        .map_err(failed("wait for other migrations"))?;
    let waited = async {
        let is_limited = limit_lock_timeout(&mut tx).await?;
        sqlx::raw_sql("lock table core.schema_migrations in share row exclusive mode")
            .execute(&mut *tx)
            .await?;
        if is_limited {
            sqlx::raw_sql("set lock_timeout = 0")
                .execute(&mut *tx)
                .await?;
        }
        Ok(())
    };
    match waited.await {
        Ok(()) => tx
            .commit()
            .await
            .map_err(failed("wait for other migrations")),
        Err(source) => {
            // The savepoint, so that the holder can still be asked for.
            tx.rollback()
                .await
                .map_err(failed("wait for other migrations"))?;
            Err(locked(
                connection,
                source,
                "relation = 'core.schema_migrations'::regclass and mode not in ('AccessShareLock', 'RowShareLock')",
            )
            .await)
        }
    }
}

/// Takes the schema back to `version`; 0 removes it, with the queues and all that is in them.
/// Schema `pgmq` stays. No app may be running.
///
/// # Errors
///
/// [`MigrateError`]; the steps before the one that failed stay taken back.
pub async fn down(options: &PgConnectOptions, version: i32) -> Result<usize, MigrateError> {
    let mut connection = PgConnection::connect_with(options)
        .await
        .map_err(failed("connect to migrate"))?;
    let from = current_version(&mut connection).await?;
    let mut reverted = 0;
    for step in MIGRATIONS
        .iter()
        .rev()
        .filter(|step| step.version <= from && step.version > version)
    {
        match revert(&mut connection, step).await {
            Ok(is_reverted) => reverted += usize::from(is_reverted),
            Err(error) => return Err(explain(&mut connection, error).await),
        }
    }
    connection
        .close()
        .await
        .map_err(failed("close the migrating connection"))?;
    Ok(reverted)
}

/// False if another process has applied it meanwhile.
async fn apply(connection: &mut PgConnection, step: &Migration) -> Result<bool, MigrateError> {
    let wrong = |source| MigrateError::Apply {
        name: step.name,
        source,
    };
    let mut tx = connection.begin().await.map_err(wrong)?;
    if step.version > 1 {
        enter(&mut tx).await?;
        if is_applied(&mut tx, step).await.map_err(wrong)? {
            return Ok(false);
        }
    }
    pin_search_path(&mut tx).await.map_err(wrong)?;
    sqlx::raw_sql(step.up)
        .execute(&mut *tx)
        .await
        .map_err(wrong)?;
    sqlx::query("insert into core.schema_migrations (version, name, checksum) values ($1, $2, $3)")
        .bind(step.version)
        .bind(step.name)
        .bind(step.checksum())
        .execute(&mut *tx)
        .await
        .map_err(wrong)?;
    // What the step has added is granted to the roles that are bound to namespaces.
    sqlx::raw_sql(
        "do $$ begin
             if to_regproc('core.refresh_roles') is not null then perform core.refresh_roles(); end if;
         end $$",
    )
    .execute(&mut *tx)
    .await
    .map_err(wrong)?;
    tx.commit().await.map_err(wrong)?;
    Ok(true)
}

async fn is_applied(connection: &mut PgConnection, step: &Migration) -> sqlx::Result<bool> {
    sqlx::query_scalar("select exists (select from core.schema_migrations where version = $1)")
        .bind(step.version)
        .fetch_one(connection)
        .await
}

/// False if another process has taken it back meanwhile.
async fn revert(connection: &mut PgConnection, step: &Migration) -> Result<bool, MigrateError> {
    let wrong = |source| MigrateError::Apply {
        name: step.name,
        source,
    };
    let mut tx = connection.begin().await.map_err(wrong)?;
    enter(&mut tx).await?;
    if !is_applied(&mut tx, step).await.map_err(wrong)? {
        return Ok(false);
    }
    pin_search_path(&mut tx).await.map_err(wrong)?;
    sqlx::raw_sql(step.down)
        .execute(&mut *tx)
        .await
        .map_err(wrong)?;
    // The first step takes the history with it.
    if step.version > 1 {
        sqlx::query("delete from core.schema_migrations where version = $1")
            .bind(step.version)
            .execute(&mut *tx)
            .await
            .map_err(wrong)?;
    }
    tx.commit().await.map_err(wrong)?;
    Ok(true)
}

/// Keeps objects of other schemas from being taken for those that the files mean.
async fn pin_search_path(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql("set local search_path = pg_catalog, pg_temp")
        .execute(connection)
        .await
        .map(drop)
}

async fn check_server(connection: &mut PgConnection) -> Result<(), MigrateError> {
    let row = sqlx::query(
        "select current_setting('server_version_num')::int, current_setting('server_version')",
    )
    .fetch_one(connection)
    .await
    .map_err(failed("ask the server for its version"))?;
    supported(row.get(0), row.get(1))
}

fn supported(version_num: i32, found: String) -> Result<(), MigrateError> {
    if version_num < OLDEST_SERVER {
        return Err(MigrateError::ServerTooOld { found });
    }
    Ok(())
}

const READ: &str = "read the version of the schema";

/// The version of the schema; 0 if there is none.
async fn current_version(connection: &mut PgConnection) -> Result<i32, MigrateError> {
    // From the catalog: `to_regclass` raises for a role that may not use the schema, and its two
    // answers could be of before and after another process's migration.
    let is_there: Option<bool> = sqlx::query_scalar(
        "select exists (select from pg_class c
                        where c.relnamespace = n.oid and c.relname = 'schema_migrations')
         from pg_namespace n where n.nspname = 'core'",
    )
    .fetch_optional(&mut *connection)
    .await
    .map_err(failed("look for the schema"))?;
    match is_there {
        None => return Ok(0),
        Some(false) if adopt::is_original(connection).await? => {
            return Err(MigrateError::OriginalSchema);
        }
        Some(false) => return Err(MigrateError::ForeignSchema),
        Some(true) => {}
    }
    let read: Result<Vec<(i32, Option<String>)>, _> = sqlx::query_as(
        "select version, to_jsonb(m) ->> 'checksum' from core.schema_migrations m order by version",
    )
    .fetch_all(&mut *connection)
    .await;
    let applied = match read {
        Ok(applied) => applied,
        Err(source) => {
            let error = failed(READ)(source);
            return Err(explain(connection, error).await);
        }
    };
    let found = applied.last().map_or(0, |(version, _)| *version);
    if found > newest_version() {
        return Err(MigrateError::SchemaTooNew {
            found,
            known: newest_version(),
        });
    }
    for (step, (_, checksum)) in MIGRATIONS.iter().zip(&applied) {
        if checksum.as_deref() != Some(&*step.checksum()) {
            return Err(MigrateError::Edited { name: step.name });
        }
    }
    Ok(found)
}

/// Makes sure that pgmq is there: as it is, by the extension, or by its SQL.
async fn ensure_pgmq(
    connection: &mut PgConnection,
    options: &PgConnectOptions,
) -> Result<(), MigrateError> {
    if let Some(found) = pgmq_version(connection).await? {
        return accept_pgmq(found);
    }
    let offered: Vec<String> = sqlx::query_scalar(
        "select version from pg_available_extension_versions where name = 'pgmq'",
    )
    .fetch_all(&mut *connection)
    .await
    .map_err(failed("look for the extension pgmq"))?;
    if let Some(version) = newest_pgmq(&offered) {
        // Named, because the server's default may be an older one.
        let create = format!("create extension pgmq version '{version}'");
        match sqlx::raw_sql(AssertSqlSafe(create))
            .execute(&mut *connection)
            .await
        {
            Ok(_) => return Ok(()),
            Err(error) => {
                tracing::info!(%error, "could not create the extension pgmq, installing its SQL instead");
            }
        }
    }
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .connect_with(options.clone())
        .await
        .map_err(failed("connect to install pgmq"))?;
    let installed = install_pgmq_sql(&pool).await;
    pool.close().await;
    match installed {
        Ok(()) => Ok(()),
        Err(error) => Err(explain(connection, error).await),
    }
}

fn accept_pgmq(found: String) -> Result<(), MigrateError> {
    let mut parts = found.split('.').map(|part| part.parse().unwrap_or(0));
    if (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < OLDEST_PGMQ {
        return Err(MigrateError::PgmqTooOld { found });
    }
    Ok(())
}

/// The newest of these versions, if it is new enough. Made of digits and points only.
fn newest_pgmq(versions: &[String]) -> Option<&str> {
    let parts = |version: &str| -> Option<Vec<u32>> {
        version.split('.').map(|part| part.parse().ok()).collect()
    };
    versions
        .iter()
        .filter_map(|version| Some((parts(version)?, version.as_str())))
        .max()
        .map(|(_, version)| version)
        .filter(|version| accept_pgmq((*version).to_owned()).is_ok())
}

async fn install_pgmq_sql(pool: &PgPool) -> Result<(), MigrateError> {
    pgmq::install::install_sql_from_embedded(pool)
        .await
        .map_err(MigrateError::Pgmq)
}

/// The version of pgmq in this database, however it came there.
async fn pgmq_version(connection: &mut PgConnection) -> Result<Option<String>, MigrateError> {
    let doing = "look for pgmq";
    let extension: Option<String> =
        sqlx::query_scalar("select extversion from pg_extension where extname = 'pgmq'")
            .fetch_optional(&mut *connection)
            .await
            .map_err(failed(doing))?;
    if extension.is_some() {
        return Ok(extension);
    }
    let row = sqlx::query(
        "select to_regclass('pgmq.__pgmq_migrations') is not null, to_regclass('pgmq.meta') is not null",
    )
    .fetch_one(&mut *connection)
    .await
    .map_err(failed(doing))?;
    match (row.get(0), row.get(1)) {
        (true, true) => sqlx::query_scalar(
            "select version from pgmq.__pgmq_migrations
             order by string_to_array(version, '.')::int[] desc limit 1",
        )
        .fetch_optional(connection)
        .await
        .map_err(failed(doing)),
        // Installed by hand from pgmq's SQL, which leaves no version behind. Headers came with 1.5
        // and every function that is called here is older than 1.8.
        (false, true) => Ok(Some("1.8.0".to_owned())),
        _ => Ok(None),
    }
}

/// Turns "permission denied" into an error that says whose, where, and what to grant.
async fn explain(connection: &mut PgConnection, error: MigrateError) -> MigrateError {
    let only_reads = matches!(error, MigrateError::Database { doing: READ, .. });
    let (MigrateError::Apply { source, .. }
    | MigrateError::Database { source, .. }
    | MigrateError::Pgmq(pgmq::PgmqError::DatabaseError(source))) = &error
    else {
        return error;
    };
    if source
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .as_deref()
        != Some("42501")
    {
        return error;
    }
    let names: Result<(String, String, String), _> = sqlx::query_as(
        "select current_user::text, current_database()::text,
                case when $1 then format('select core.grant_namespace(%L, %L)', '<namespace>', current_user)
                     -- The owner of a schema that this role has nothing to do with.
                     else coalesce(
                         (select format('grant %I to %I', pg_get_userbyid(nspowner), current_user) from pg_namespace
                          where nspname = 'core' and not pg_has_role(nspowner, 'member')),
                         format('grant create on database %I to %I', current_database(), current_user)) end",
    )
    .bind(only_reads)
    .fetch_one(connection)
    .await;
    match (names, error) {
        (
            Ok((role, database, grant)),
            MigrateError::Apply { source, .. }
            | MigrateError::Database { source, .. }
            | MigrateError::Pgmq(pgmq::PgmqError::DatabaseError(source)),
        ) => MigrateError::NotAllowed {
            role,
            database,
            grant,
            source,
        },
        (_, error) => error,
    }
}

/// A text that changes whenever a migration does; the test kit names its template database by it.
#[must_use]
pub fn fingerprint() -> String {
    fnv1a(MIGRATIONS.iter().flat_map(|step| step.up.bytes()))
}

/// FNV-1a: stable across compilers, and nobody attacks these.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> String {
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_pgmq_that_is_offered_is_named() {
        let newest = |versions: &[&str]| {
            let versions: Vec<String> = versions.iter().map(|&v| v.to_owned()).collect();
            newest_pgmq(&versions).map(str::to_owned)
        };
        assert_eq!(newest(&["1.4.4", "1.10.0", "1.9.0"]).unwrap(), "1.10.0");
        assert_eq!(newest(&["1.8", "1.7.9", "unpackaged"]).unwrap(), "1.8");
        assert_eq!(newest(&["1.7.9", "1.5.0"]), None);
        assert_eq!(newest(&["9'; drop"]), None);
        assert_eq!(newest(&[]), None);
    }

    #[test]
    fn refuses_servers_before_15_by_name() {
        let error = supported(14_00_20, "14.20 (Debian)".to_owned()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "PostgreSQL 15 or newer is needed, this server is 14.20 (Debian)"
        );
        supported(15_00_00, "15.0".to_owned()).unwrap();
    }

    #[test]
    fn migrations_are_numbered_without_gaps_and_named_by_their_number() {
        for (index, step) in MIGRATIONS.iter().enumerate() {
            assert_eq!(usize::try_from(step.version).unwrap(), index + 1);
            assert!(
                step.name.starts_with(&format!("{:04}_", step.version)),
                "{}",
                step.name
            );
        }
    }
}
