//! Dead letters: listed, counted, redriven and purged. What a filter means is said once, by
//! `core.letter_condition`; filters come here as its JSON.

use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::{JsonText, micros, table, timestamp};

/// A dead letter as it is stored.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) msg_id: i64,
    pub(crate) failed_at: jiff::Timestamp,
    pub(crate) event_type: Option<String>,
    pub(crate) event_id: Option<i64>,
    pub(crate) fingerprint: Option<String>,
    /// Without the original if that is over the limit.
    pub(crate) body: Option<String>,
    pub(crate) headers: Option<String>,
}

/// Where a page of dead letters ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before {
    pub(crate) failed_at_micros: i64,
    pub(crate) msg_id: i64,
}

/// The dead letters of a group, newest first.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    filter: &str,
    limit: i64,
    before: Option<Before>,
    max_body_bytes: i64,
) -> sqlx::Result<Vec<Stored>> {
    // The size limit is on the text, as in a claim. `offset 0` keeps the planner from making it twice.
    let rows = sqlx::query(
        "select l.id, (extract(epoch from l.failed_at) * 1000000)::bigint, l.event_type, l.event_id, l.fingerprint,
                (select case when octet_length(b.body) <= $7 then b.body
                             when jsonb_typeof(l.letter) = 'object' then (l.letter || '{\"originalEvent\": null}')::text end
                 from (select l.letter::text as body offset 0) b),
                case when jsonb_typeof(l.headers) = 'object' then l.headers::text end
         from core.dead_letters($1, $2, $3, $4, timestamptz 'epoch' + $5 * interval '1 microsecond', $6) l",
    )
    .bind(namespace)
    .bind(group)
    .bind(JsonText(filter))
    .bind(i32::try_from(limit).unwrap_or(i32::MAX))
    .bind(before.map(|before| before.failed_at_micros))
    .bind(before.map(|before| before.msg_id))
    .bind(max_body_bytes)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Stored {
            msg_id: row.get(0),
            failed_at: timestamp(row.get(1)),
            event_type: row.get(2),
            event_id: row.get(3),
            fingerprint: row.get(4),
            body: row.get(5),
            headers: row.get(6),
        })
        .collect())
}

/// How many dead letters have one cause.
#[derive(Debug)]
pub(crate) struct Cause {
    pub(crate) group: String,
    pub(crate) handler: Option<String>,
    pub(crate) event_type: Option<String>,
    pub(crate) fingerprint: Option<String>,
    pub(crate) letters: i64,
    pub(crate) first_failed_at: jiff::Timestamp,
    pub(crate) last_failed_at: jiff::Timestamp,
    pub(crate) sample_id: i64,
    pub(crate) sample_reason: Option<String>,
    pub(crate) sample_error: Option<String>,
}

/// The dead letters of the namespace by cause; see `core.dead_letter_summary`.
pub(crate) async fn summary(
    connection: &mut PgConnection,
    namespace: &str,
    filter: &str,
) -> sqlx::Result<Vec<Cause>> {
    let rows = sqlx::query(
        "select group_name, handler, event_type, fingerprint, letters,
                (extract(epoch from first_failed_at) * 1000000)::bigint,
                (extract(epoch from last_failed_at) * 1000000)::bigint,
                sample_id, sample_reason, sample_error
         from core.dead_letter_summary($1, $2)",
    )
    .bind(namespace)
    .bind(JsonText(filter))
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Cause {
            group: row.get(0),
            handler: row.get(1),
            event_type: row.get(2),
            fingerprint: row.get(3),
            letters: row.get(4),
            first_failed_at: timestamp(row.get(5)),
            last_failed_at: timestamp(row.get(6)),
            sample_id: row.get(7),
            sample_reason: row.get(8),
            sample_error: row.get(9),
        })
        .collect())
}

/// The time, and the newest dead letter of a queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Horizon {
    pub(crate) at_micros: i64,
    pub(crate) msg_id: i64,
}

/// What is redriven or purged from now on ends here, so that what dies again meanwhile is left.
pub(crate) async fn horizon(connection: &mut PgConnection, queue: &str) -> sqlx::Result<Horizon> {
    let text = format!(
        "select (extract(epoch from core.now()) * 1000000)::bigint, (select coalesce(max(msg_id), 0) from {table})",
        table = table(&format!("{queue}_dlq"))
    );
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .fetch_one(connection)
        .await?;
    Ok(Horizon {
        at_micros: row.get(0),
        msg_id: row.get(1),
    })
}

/// What a redrive is told besides the letters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner<'a> {
    pub(crate) by: &'a str,
    pub(crate) pace: std::time::Duration,
    pub(crate) horizon: Horizon,
    pub(crate) payload: Option<&'a str>,
}

/// Letters that were put back, or would be, for one handler and version; or that stay.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) handler: Option<String>,
    pub(crate) event_version: Option<String>,
    /// `redrive` or `adopt`, or why it stays.
    pub(crate) what: String,
    pub(crate) letters: i64,
    pub(crate) is_live: bool,
    pub(crate) last_due_at: Option<jiff::Timestamp>,
}

/// Puts up to `limit` dead letters back by one statement; none when there are no more. See
/// `core.redrive`.
pub(crate) async fn redrive(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    filter: &str,
    manner: Manner<'_>,
    limit: i32,
    done: i64,
) -> sqlx::Result<Vec<Outcome>> {
    let rows = sqlx::query(
        "select handler, event_version, letters, is_live, (extract(epoch from last_due_at) * 1000000)::bigint
         from core.redrive($1, $2, $3, p_by => $4, p_pace => $5 * interval '1 microsecond', p_limit => $6,
                           p_until => $7, p_start => timestamptz 'epoch' + $8 * interval '1 microsecond',
                           p_done => $9, p_payload => $10)",
    )
    .bind(namespace)
    .bind(group)
    .bind(JsonText(filter))
    .bind(manner.by)
    .bind(micros(manner.pace))
    .bind(limit)
    .bind(manner.horizon.msg_id)
    .bind(manner.horizon.at_micros)
    .bind(done)
    .bind(manner.payload.map(JsonText))
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Outcome {
            handler: row.get(0),
            event_version: row.get(1),
            what: "redrive".to_owned(),
            letters: row.get(2),
            is_live: row.get(3),
            last_due_at: row.get::<Option<i64>, _>(4).map(timestamp),
        })
        .collect())
}

/// What [`redrive`] would put back and what it would leave; changes nothing.
pub(crate) async fn plan_redrive(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    filter: &str,
    limit: Option<i64>,
) -> sqlx::Result<Vec<Outcome>> {
    let rows = sqlx::query(
        "select handler, event_version, outcome, letters, is_live from core.plan_redrive($1, $2, $3, $4)",
    )
    .bind(namespace)
    .bind(group)
    .bind(JsonText(filter))
    .bind(limit)
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Outcome {
            handler: row.get(0),
            event_version: row.get(1),
            what: row.get(2),
            letters: row.get(3),
            is_live: row.get(4),
            last_due_at: None,
        })
        .collect())
}

/// Deletes up to `limit` dead letters by one statement and returns how many; see
/// `core.purge_dead_letters`.
pub(crate) async fn purge(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    filter: &str,
    limit: i32,
    until: Option<i64>,
) -> sqlx::Result<i64> {
    sqlx::query_scalar("select core.purge_dead_letters($1, $2, $3, $4, $5)")
        .bind(namespace)
        .bind(group)
        .bind(JsonText(filter))
        .bind(limit)
        .bind(until)
        .fetch_one(connection)
        .await
}

/// How many dead letters there are.
pub(crate) async fn count(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    filter: &str,
) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "select coalesce(sum(letters), 0)::bigint from core.plan_redrive($1, $2, $3)",
    )
    .bind(namespace)
    .bind(group)
    .bind(JsonText(filter))
    .fetch_one(connection)
    .await
}

/// What an edited payload has to fit.
#[derive(Debug)]
pub(crate) struct Editable {
    /// `None` if the original is no envelope.
    pub(crate) event_type: Option<String>,
    pub(crate) event_version: Option<String>,
    /// What the app of the handler has declared, else what was declared last.
    pub(crate) schema: Option<String>,
}

/// Looks at a dead letter that is to be redriven with another payload; `None` if it is not there.
pub(crate) async fn editable(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    queue: &str,
    msg_id: i64,
) -> sqlx::Result<Option<Editable>> {
    let text = format!(
        "select e.event_type, e.version, (
                    select t.schema::text from core.event_types t
                    where t.namespace = $1 and t.event_type = e.event_type and t.version::text = e.version
                    order by (exists (select from core.subscriptions s
                                      where s.namespace = $1 and s.group_name = $2 and s.app = t.app
                                        and s.handler in (select h.handler from core.letter_targets($1, $2) h
                                                          where h.name = q.headers ->> 'handler'))) desc,
                             t.registered_at desc
                    limit 1)
         from {table} q
         cross join lateral (
             select case when jsonb_typeof(q.message #> '{{originalEvent,eventType}}') = 'string'
                              and q.message -> 'originalEvent' ? 'payload' and q.headers ->> 'handler' is not null
                         then q.message #>> '{{originalEvent,eventType}}' end as event_type,
                    case when q.headers ->> 'eventVersion' ~ '^[1-9][0-9]*$' then q.headers ->> 'eventVersion' end as version
         ) e
         where q.msg_id = $3",
        table = table(&format!("{queue}_dlq"))
    );
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(namespace)
        .bind(group)
        .bind(msg_id)
        .fetch_optional(connection)
        .await?;
    Ok(row.map(|row| Editable {
        event_type: row.get(0),
        event_version: row.get(1),
        schema: row.get(2),
    }))
}
