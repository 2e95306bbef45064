//! Who keeps the server from cleaning up what was deleted.
//!
//! A row version that somebody may still see is not removed. Queues delete and update all the time, and what
//! cannot be removed has to be walked past; so whoever has the oldest snapshot slows all of them down.

use std::time::Duration;

use sqlx::{PgConnection, Row};

/// What pins the horizon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// `session`, `prepared transaction`, `replication slot` or `standby`.
    pub(crate) kind: String,
    pub(crate) pid: Option<i32>,
    /// The session's application, the transaction's or slot's name, the standby's name.
    pub(crate) name: String,
    pub(crate) user: Option<String>,
    pub(crate) state: Option<String>,
    /// The oldest transaction id that it may see; it stays the same for as long as it is held.
    pub(crate) xmin: String,
    /// How many transactions have begun since.
    pub(crate) transactions: i64,
    /// How long it has been held, as far as the role may know.
    pub(crate) age: Option<Duration>,
}

/// Whoever holds the oldest snapshot that counts for this database.
///
/// Sessions of other roles show when their transaction began only to members of `pg_read_all_stats`. A
/// vacuum is left out, which pins nothing.
pub(crate) async fn oldest_holder(connection: &mut PgConnection) -> sqlx::Result<Option<Holder>> {
    let row = sqlx::query(
        "with held as (
             select 'session' as kind, a.pid, a.application_name as name, a.usename::text as user_name, a.state,
                    case when age(a.backend_xid) > age(a.backend_xmin) or a.backend_xmin is null
                         then a.backend_xid else a.backend_xmin end as xmin,
                    clock_timestamp() - a.xact_start as held_for
             from pg_stat_activity a
             where (a.backend_xmin is not null or a.backend_xid is not null)
               and a.pid <> pg_backend_pid() and a.datname = current_database()
               and a.backend_type not in ('autovacuum worker', 'walsender')
             union all
             select 'prepared transaction', null, p.gid, p.owner::text, null, p.transaction,
                    clock_timestamp() - p.prepared
             from pg_prepared_xacts p where p.database = current_database()
             union all
             select 'replication slot', s.active_pid, s.slot_name::text, null, null, s.xmin, null
             from pg_replication_slots s
             where s.xmin is not null and (s.database is null or s.database = current_database())
             union all
             select 'standby', r.pid, r.application_name, r.usename::text, r.state, r.backend_xmin, null
             from pg_stat_replication r where r.backend_xmin is not null
         )
         select kind, pid, coalesce(name, ''), user_name, state, xmin::text, age(xmin)::bigint,
                (extract(epoch from held_for) * 1000)::bigint
         from held order by age(xmin) desc, held_for desc nulls last limit 1",
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| Holder {
        kind: row.get(0),
        pid: row.get(1),
        name: row.get(2),
        user: row.get(3),
        state: row.get(4),
        xmin: row.get(5),
        transactions: row.get(6),
        age: row
            .get::<Option<i64>, _>(7)
            .map(|ms| Duration::from_millis(ms.max(0).unsigned_abs())),
    }))
}
