//! What a look at a database finds out: nothing here writes, waits for long, or counts a table.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgTransaction, Row, SqlSafeStr};

use super::timestamp;

/// Begins a transaction in which a check cannot write, wait for a lock, or go on for ever.
pub(crate) async fn begin(connection: &mut PgConnection) -> sqlx::Result<PgTransaction<'_>> {
    connection
        .begin_with(
            "begin transaction read only;
             set local search_path = pg_catalog, pg_temp;
             set local statement_timeout = '5s';
             set local lock_timeout = '1s';
             set local timezone = 'UTC';
             set local datestyle = 'ISO';
             set local jit = off",
        )
        .await
}

/// The time by the clock that nexus goes by, if its schema is there, else by the server's.
pub(crate) async fn time(
    connection: &mut PgConnection,
    has_schema: bool,
) -> sqlx::Result<Timestamp> {
    let text = if has_schema {
        "select (extract(epoch from core.now()) * 1000000)::bigint"
    } else {
        "select (extract(epoch from now()) * 1000000)::bigint"
    };
    let micros = sqlx::query_scalar(text).fetch_one(connection).await?;
    Ok(timestamp(micros))
}

/// Settings of the server that matter, as this session has them.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) is_read_only: bool,
    pub(crate) fsync: String,
    pub(crate) full_page_writes: String,
    pub(crate) synchronous_commit: String,
    pub(crate) autovacuum: String,
    pub(crate) track_counts: String,
    pub(crate) wal_level: String,
    pub(crate) idle_in_transaction_timeout: String,
    /// Sessions of all databases.
    pub(crate) sessions: i64,
    /// How many of them roles without particular rights can have.
    pub(crate) most_sessions: i64,
}

pub(crate) async fn server(connection: &mut PgConnection) -> sqlx::Result<Server> {
    let row = sqlx::query(
        "select pg_is_in_recovery() or current_setting('default_transaction_read_only') = 'on',
                current_setting('fsync'), current_setting('full_page_writes'),
                current_setting('synchronous_commit'), current_setting('autovacuum'),
                current_setting('track_counts'), current_setting('wal_level'),
                current_setting('idle_in_transaction_session_timeout'),
                -- From here everybody may know it; what kind of sessions others have, only some.
                (select coalesce(sum(numbackends), 0)::bigint from pg_stat_database),
                current_setting('max_connections')::bigint
                    - current_setting('superuser_reserved_connections')::bigint
                    - coalesce(current_setting('reserved_connections', true)::bigint, 0)",
    )
    .fetch_one(connection)
    .await?;
    Ok(Server {
        is_read_only: row.get(0),
        fsync: row.get(1),
        full_page_writes: row.get(2),
        synchronous_commit: row.get(3),
        autovacuum: row.get(4),
        track_counts: row.get(5),
        wal_level: row.get(6),
        idle_in_transaction_timeout: row.get(7),
        sessions: row.get(8),
        most_sessions: row.get(9),
    })
}

/// A statement that takes its time.
#[derive(Debug)]
pub(crate) struct Slow {
    pub(crate) query_id: i64,
    pub(crate) text: String,
    pub(crate) calls: i64,
    pub(crate) mean: Duration,
    /// It works on tables of nexus.
    pub(crate) is_ours: bool,
}

/// The schema of the extension `pg_stat_statements`, quoted; `None` if it is not there.
pub(crate) async fn schema_of_statements(
    connection: &mut PgConnection,
) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(
        "select quote_ident(n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace
         where e.extname = 'pg_stat_statements'",
    )
    .fetch_optional(connection)
    .await
}

/// The statements of this database that take longer than `from` on average, the most expensive ones first; `schema`
/// is what [`schema_of_statements`] says. Of others' statements only members of `pg_read_all_stats` see the text.
pub(crate) async fn slow_statements(
    connection: &mut PgConnection,
    schema: &str,
    from: Duration,
) -> sqlx::Result<Vec<Slow>> {
    let text = format!(
        r"select queryid, left(regexp_replace(query, '\s+', ' ', 'g'), 200), calls, mean_exec_time, query ~ '\m(core|pgmq)\.'
         from {schema}.pg_stat_statements
         where dbid = (select oid from pg_database where datname = current_database())
           and calls >= 3 and mean_exec_time >= $1 and queryid is not null
           -- Others are kept with their constants, which may be passwords.
           and query ~* '^\s*(select|insert|update|delete|merge|with)\M'
         order by total_exec_time desc limit 5"
    );
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(from.as_secs_f64() * 1000.0)
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| Slow {
            query_id: row.get(0),
            text: row.get(1),
            calls: row.get(2),
            mean: Duration::try_from_secs_f64(row.get::<f64, _>(3) / 1000.0).unwrap_or_default(),
            is_ours: row.get(4),
        })
        .collect())
}

/// This month and the next three, each with whether a partition of the log takes its events.
pub(crate) async fn months(connection: &mut PgConnection) -> sqlx::Result<Vec<(String, bool)>> {
    sqlx::query_as(
        r"with partition as (
             select b.bounds[1]::timestamptz as lower, b.bounds[2]::timestamptz as upper
             from pg_inherits i
             join pg_class c on c.oid = i.inhrelid
             cross join lateral regexp_match(pg_get_expr(c.relpartbound, c.oid), $$FROM \('(.+)'\) TO \('(.+)'\)$$) b (bounds)
             where i.inhparent = (select l.oid from pg_class l join pg_namespace n on n.oid = l.relnamespace
                                  where n.nspname = 'core' and l.relname = 'event_log')
               and not i.inhdetachpending and b.bounds is not null
         )
         select to_char(month, 'YYYY-MM'),
                exists (select from partition where lower <= greatest(month, core.now()) and upper >= month + interval '1 month')
         from generate_series(date_trunc('month', core.now()), date_trunc('month', core.now()) + interval '3 months',
                              interval '1 month') month
         order by month",
    )
    .fetch_all(connection)
    .await
}

/// A queue of a group, as the catalog and the statistics have it.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a question of its own to the catalog"
)]
pub(crate) struct Queue {
    pub(crate) group: String,
    /// Its name, without `q_`.
    pub(crate) name: String,
    pub(crate) is_there: bool,
    /// It has the index that claims walk, or needs none.
    pub(crate) has_index: bool,
    pub(crate) is_vacuumed: bool,
    /// Row versions that are dead but still there.
    pub(crate) dead: i64,
    pub(crate) live: i64,
    /// The role may do with it what it may do in the namespace.
    pub(crate) is_granted: bool,
}

/// The queues of a namespace's groups; asks nothing that a lock on one of them could hold up. `is_app` asks whether the role may also change them.
pub(crate) async fn queues(
    connection: &mut PgConnection,
    namespace: &str,
    is_app: bool,
) -> sqlx::Result<Vec<Queue>> {
    let rows = sqlx::query(
        "select g.group_name, q.name, c.oid is not null,
                not q.is_claimed or exists (
                    -- Two expressions and two columns. To ask for its definition would lock the table.
                    select from pg_index x join pg_class i on i.oid = x.indexrelid
                    where x.indrelid = c.oid and x.indisvalid and i.relname = 'q_' || q.name || '_vt_idx'
                      and x.indnatts = 4 and x.indkey[0] = 0 and x.indkey[1] = 0),
                not coalesce(c.reloptions @> array['autovacuum_enabled=false']
                             or c.reloptions @> array['autovacuum_enabled=off'], false),
                coalesce(s.n_dead_tup, 0), coalesce(s.n_live_tup, 0),
                coalesce(has_table_privilege(c.oid, 'select')
                         and (not $2 or has_table_privilege(c.oid, 'insert')
                                        and has_table_privilege(c.oid, 'update')
                                        and has_table_privilege(c.oid, 'delete')), true)
         from core.groups g
         cross join lateral (values (g.queue_name, true), (g.queue_name || '_dlq', false)) q (name, is_claimed)
         left join pg_class c
             on c.relnamespace = (select oid from pg_namespace where nspname = 'pgmq') and c.relname = 'q_' || q.name
         left join pg_stat_all_tables s on s.relid = c.oid
         where g.namespace = $1
         order by 1, 2",
    )
    .bind(namespace)
    .bind(is_app)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Queue {
            group: row.get(0),
            name: row.get(1),
            is_there: row.get(2),
            has_index: row.get(3),
            is_vacuumed: row.get(4),
            dead: row.get(5),
            live: row.get(6),
            is_granted: row.get(7),
        })
        .collect())
}

/// What the role may do in a namespace.
#[derive(Debug)]
pub(crate) struct Rights {
    pub(crate) role: String,
    /// Whose role the schema belongs to.
    pub(crate) owner: String,
    pub(crate) may_read: bool,
    pub(crate) may_run_apps: bool,
    /// Tables of `core` that it may not do with what it may do in the namespace.
    pub(crate) missing: Vec<String>,
}

pub(crate) async fn rights(connection: &mut PgConnection, namespace: &str) -> sqlx::Result<Rights> {
    let row = sqlx::query(
        "select current_user::text, pg_get_userbyid(core.owner())::text,
                core.caller_may('read', $1), core.caller_may('app', $1),
                array(
                    select 'core.' || c.relname from pg_class c
                    where c.relnamespace = (select oid from pg_namespace where nspname = 'core') and c.relkind in ('r', 'p')
                      and not c.relispartition
                      and exists (select from pg_policy p where p.polrelid = c.oid)
                      and (not has_table_privilege(c.oid, 'select')
                           or core.caller_may('app', $1) and (
                              exists (select from pg_policy p where p.polrelid = c.oid and p.polcmd = 'a')
                                  and not has_any_column_privilege(c.oid, 'insert')
                              or exists (select from pg_policy p where p.polrelid = c.oid and p.polcmd = 'w')
                                  and not has_any_column_privilege(c.oid, 'update')))
                    order by 1)",
    )
    .bind(namespace)
    .fetch_one(connection)
    .await?;
    Ok(Rights {
        role: row.get(0),
        owner: row.get(1),
        may_read: row.get(2),
        may_run_apps: row.get(3),
        missing: row.get(4),
    })
}

/// Types of events in the log that no handler is subscribed to, up to a hundred. Goes from one type to the next in
/// the index, however many events there are.
pub(crate) async fn unhandled_types(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<String>> {
    sqlx::query_scalar(
        "with recursive known (number, event_type) as (
             (select 1, l.event_type from core.event_log l where l.namespace = $1
              order by l.namespace, l.event_type limit 1)
             union all
             select k.number + 1,
                    (select l.event_type from core.event_log l
                     where l.namespace = $1 and l.event_type > k.event_type
                     order by l.namespace, l.event_type limit 1)
             from known k where k.event_type is not null and k.number < 1000
         )
         select k.event_type from known k
         where k.event_type is not null
           and not exists (select from core.subscriptions s
                           where s.namespace = $1 and s.event_type = k.event_type)
         order by 1 limit 100",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await
}
