//! The life of a message in its queue: claimed, extended, and ended by a verdict.
//!
//! Every verdict is fenced by (`msg_id`, `read_ct`): the count grows with each claim, so a worker
//! whose lease ended and whose message was claimed again changes nothing, and sees that.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr, postgres::PgRow};

use super::{JsonText, micros, table};
use crate::event::PastError;

/// A handler with room for more messages.
#[derive(Debug, Clone)]
pub(crate) struct Want {
    pub(crate) handler: String,
    pub(crate) event_version: u32,
    pub(crate) slots: i32,
    /// Nothing that is due can be older than this (microseconds since 1970): skips the dead rows
    /// that a long transaction keeps at the head of the index.
    pub(crate) not_before_micros: i64,
}

/// A claimed message.
#[derive(Debug, Clone)]
pub(crate) struct Claimed {
    pub(crate) msg_id: i64,
    pub(crate) read_ct: i32,
    pub(crate) enqueued_at_micros: i64,
    /// `None` if the body is over the size limit; it was not sent then.
    pub(crate) body: Option<String>,
    pub(crate) headers: String,
}

/// What a claim brought, and when, by the clock of the database.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    pub(crate) messages: Vec<Claimed>,
    pub(crate) at_micros: i64,
    /// Messages were left because of their size.
    pub(crate) is_cut: bool,
}

/// How often a message may lose its lease without a verdict before it is claimed alone.
const SUSPECT_AFTER: i32 = 2;

/// How often the message has lost its lease. The claim that finds a loss counts it in the headers, so
/// the last one is not in there yet: it was read, and its reader left no verdict behind. Numbers that were
/// written by hand must not overflow, which would fail every claim of the queue.
const LOSSES: &str = "least(coalesce((m.headers ->> 'abandoned')::int, 0), 1000) + (m.read_ct > 0 and not m.headers ? 'settled')::int";

/// The predicate of the queue's index on messages that may have to be claimed alone, as
/// `core.tune_queue` has it: with two losses, the first one is in the headers.
const MAY_BE_SUSPECT: &str = "(m.headers ->> 'abandoned')::int >= 1";

/// What no claim looks for: the predicate of the queue's index on messages of foreign programs, as
/// `core.tune_queue` has it.
const FOREIGN: &str = "((m.headers ->> 'handler') is not null and (m.headers ->> 'eventVersion') ~ '^[1-9][0-9]*$') is not true";

/// How much one claim brings of each handler, in bytes of message bodies: up to this, and one message more.
pub(crate) const CLAIM_BYTES: i64 = 8 * 1024 * 1024;

/// About how many bytes of text a body has. What is stored as it is, as most messages are, is not
/// unpacked for that.
const BODY_BYTES: &str =
    "case when pg_column_compression(m.message) is null then pg_column_size(m.message)
    else octet_length(m.message::text) end";

/// That the group of the queue is not paused: looked up once a statement.
fn is_open(queue: &str) -> String {
    let table = table(queue);
    let queue = table.trim_start_matches("pgmq.q_");
    format!(
        "not exists (select from core.groups g where g.queue_name = '{queue}' and g.paused_at is not null)"
    )
}

/// Which messages a claim takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Which {
    /// Of each handler up to its free slots, oldest first.
    Ordinary,
    /// One that has lost its lease [`SUSPECT_AFTER`] times or more, which the ordinary claim leaves
    /// alone.
    Suspect,
}

/// Claims due messages of the wanted handlers.
pub(crate) async fn claim(
    connection: &mut PgConnection,
    queue: &str,
    wants: &[Want],
    which: Which,
    lease: Duration,
    max_body_bytes: i32,
) -> sqlx::Result<Claims> {
    let (table, is_open) = (table(queue), is_open(queue));
    let candidates = match which {
        Which::Ordinary => format!(
            "select c.place, c.fits
             from unnest($1::text[], $2::text[], $3::int[], $4::bigint[]) as w (handler, version, slots, not_before)
             cross join lateral (
                 select r.place, sum(r.bytes) over (order by r.vt, r.msg_id) - r.bytes < {CLAIM_BYTES} as fits
                 from (
                     select m.ctid as place, m.msg_id, m.vt, {BODY_BYTES} as bytes from {table} m
                     where m.headers ->> 'handler' = w.handler and m.headers ->> 'eventVersion' = w.version
                       and m.vt >= timestamptz 'epoch' + w.not_before * interval '1 microsecond'
                       and m.vt <= core.now()
                       and {LOSSES} < {SUSPECT_AFTER}
                     order by m.vt, m.msg_id
                     limit w.slots
                     for update skip locked
                 ) r
             ) c
             where {is_open}"
        ),
        Which::Suspect => format!(
            "select m.ctid as place, true as fits
             from unnest($1::text[], $2::text[], $3::int[], $4::bigint[]) as w (handler, version, slots, not_before)
             join {table} m on m.headers ->> 'handler' = w.handler and m.headers ->> 'eventVersion' = w.version
             where {MAY_BE_SUSPECT} and {LOSSES} >= {SUSPECT_AFTER} and m.vt <= core.now() and {is_open}
             order by m.msg_id limit 1
             for update of m skip locked"
        ),
    };
    // The rows are locked, so they stay where they are; `= any (array(…))` cannot turn into a hash join with a
    // sequential scan when the cached plan was made for an empty table. One that was changed between the
    // statement's snapshot and its lock is found there no more, and is left for the next claim. An abandoned
    // message is one that was read before, and whose last reader left no verdict behind.
    let text = format!(
        "with c as materialized ({candidates})
         update {table} q
         set vt = core.now() + $5 * interval '1 microsecond',
             read_ct = least(q.read_ct, 2147483646) + 1,
             last_read_at = core.now(),
             headers = case
                 when q.read_ct = 0 then q.headers
                 when q.headers ? 'settled' then q.headers - 'settled'
                 else q.headers || jsonb_build_object('abandoned', least(coalesce((q.headers ->> 'abandoned')::int, 0), 1000) + 1)
             end
         where q.ctid = any (array(select place from c where fits))
         returning {returning}",
        returning = returning("$6"),
    );
    let (handlers, versions) = names(wants);
    let slots: Vec<i32> = wants.iter().map(|want| want.slots).collect();
    let not_before: Vec<i64> = wants.iter().map(|want| want.not_before_micros).collect();
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(handlers)
        .bind(versions)
        .bind(slots)
        .bind(not_before)
        .bind(micros(lease))
        .bind(max_body_bytes)
        .fetch_all(connection)
        .await?;
    Ok(claims(rows))
}

/// What one wants of a claimed row. The size limit is on the text, which no stored size tells: 1e131071 takes ten
/// bytes. `offset 0` keeps the planner from making the text twice.
fn returning(max_body_bytes: &str) -> String {
    format!(
        "q.msg_id, q.read_ct, q.enqueued_at,
         (select case when octet_length(b.body) > {max_body_bytes} then null else b.body end
          from (select q.message::text as body offset 0) b),
         q.headers::text, core.now(), exists (select from c where not fits)"
    )
}

fn claims(rows: Vec<PgRow>) -> Claims {
    let mut claims = Claims::default();
    for row in rows {
        claims.at_micros = time(&row, 5);
        claims.is_cut = row.get(6);
        claims.messages.push(Claimed {
            msg_id: row.get(0),
            read_ct: row.get(1),
            enqueued_at_micros: time(&row, 2),
            body: row.get(3),
            headers: row.get(4),
        });
    }
    // `returning` promises no order.
    claims
        .messages
        .sort_unstable_by_key(|message| message.msg_id);
    claims
}

/// Claims due messages of one handler by deleting them, in the transaction that handles them: the locks of the
/// deleted rows are the leases. Leaves alone what has lost a lease, which such a claim could not count.
///
/// The transaction is begun with [`TO_DELETE`], whose settings end here. Returns the messages, whether some were left
/// because of their size, and the place of the last one in the queue's order.
pub(crate) async fn claim_by_deleting(
    connection: &mut PgConnection,
    queue: &str,
    (handler, event_version): (&str, u32),
    after: Place,
    limit: i32,
    max_body_bytes: i32,
) -> sqlx::Result<(Vec<Claimed>, bool, Place)> {
    let text = format!(
        "with c as materialized (
             select r.place, sum(r.bytes) over (order by r.vt, r.msg_id) - r.bytes < {CLAIM_BYTES} as fits
             from (
                 select m.ctid as place, m.msg_id, m.vt, {BODY_BYTES} as bytes from {table} m
                 where m.headers ->> 'handler' = $1 and m.headers ->> 'eventVersion' = $2
                   and (m.vt, m.msg_id) > (timestamptz 'epoch' + $3 * interval '1 microsecond', $4)
                   and m.vt <= core.now()
                   and {LOSSES} = 0 and {is_open}
                 order by m.vt, m.msg_id
                 limit $5
                 for update skip locked
             ) r
         )
         delete from {table} q
         where q.ctid = any (array(select place from c where fits))
         returning {returning}, q.vt",
        table = table(queue),
        is_open = is_open(queue),
        returning = returning("$6"),
    );
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(handler)
        .bind(event_version.to_string())
        .bind(after.vt_micros)
        .bind(after.msg_id)
        .bind(limit)
        .bind(max_body_bytes)
        .fetch_all(&mut *connection)
        .await?;
    if !rows.is_empty() {
        sqlx::raw_sql(DELETED).execute(connection).await?;
    }
    let places = rows.iter().map(|row| Place {
        vt_micros: time(row, 7),
        msg_id: row.get(0),
    });
    let last = places.max().unwrap_or(after);
    let Claims {
        messages, is_cut, ..
    } = claims(rows);
    Ok((messages, is_cut, last))
}

/// A place in the order in which messages are claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// Microseconds since 1970.
    pub(crate) vt_micros: i64,
    pub(crate) msg_id: i64,
}

/// Makes the transaction ready for [`claim_by_deleting`].
pub(crate) const TO_DELETE: &str = "set local enable_seqscan = off; set local enable_bitmapscan = off; set local enable_sort = off; set local jit = off; set local plan_cache_mode = force_generic_plan";

/// Gives the statements of the handler the settings that the session began with.
const DELETED: &str = "set local enable_seqscan to default; set local enable_bitmapscan to default; set local enable_sort to default; set local jit to default; set local plan_cache_mode to default";

/// Puts messages back that were deleted by a transaction which their handler has committed too early.
pub(crate) async fn put_back(
    connection: &mut PgConnection,
    queue: &str,
    messages: &[Claimed],
) -> sqlx::Result<()> {
    let text = format!(
        "insert into {table} (msg_id, read_ct, enqueued_at, vt, message, headers) overriding system value
         select u.msg_id, u.read_ct, timestamptz 'epoch' + u.enqueued_at * interval '1 microsecond', core.now(),
             u.message::jsonb, u.headers::jsonb
         from unnest($1::bigint[], $2::int[], $3::bigint[], $4::text[], $5::text[])
             as u (msg_id, read_ct, enqueued_at, message, headers)
         on conflict do nothing",
        table = table(queue)
    );
    let of = |message: &Claimed| message.body.clone();
    sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(messages.iter().map(|m| m.msg_id).collect::<Vec<_>>())
        .bind(messages.iter().map(|m| m.read_ct).collect::<Vec<_>>())
        .bind(
            messages
                .iter()
                .map(|m| m.enqueued_at_micros)
                .collect::<Vec<_>>(),
        )
        .bind(messages.iter().map(of).collect::<Vec<_>>())
        .bind(
            messages
                .iter()
                .map(|m| m.headers.clone())
                .collect::<Vec<_>>(),
        )
        .execute(connection)
        .await
        .map(drop)
}

/// Whether one of the wanted handlers has a message that is due. It takes the server a tenth of what a claim
/// does that finds nothing.
pub(crate) async fn has_due(
    connection: &mut PgConnection,
    queue: &str,
    wants: &[Want],
) -> sqlx::Result<bool> {
    if let [want] = wants {
        // Half of the work.
        let text = format!(
            "select exists (
                 select from {table} m
                 where m.headers ->> 'handler' = $1 and m.headers ->> 'eventVersion' = $2
                   and m.vt >= timestamptz 'epoch' + $3 * interval '1 microsecond' and m.vt <= core.now()
                   and {is_open})",
            table = table(queue),
            is_open = is_open(queue),
        );
        return sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
            .bind(&want.handler)
            .bind(want.event_version.to_string())
            .bind(want.not_before_micros)
            .fetch_one(connection)
            .await;
    }
    let text = format!(
        "select exists (
             select from unnest($1::text[], $2::text[], $3::bigint[]) as w (handler, version, not_before)
             join {table} m on m.headers ->> 'handler' = w.handler and m.headers ->> 'eventVersion' = w.version
                 and m.vt >= timestamptz 'epoch' + w.not_before * interval '1 microsecond' and m.vt <= core.now()
             where {is_open})",
        table = table(queue),
        is_open = is_open(queue),
    );
    let (handlers, versions) = names(wants);
    let not_before: Vec<i64> = wants.iter().map(|want| want.not_before_micros).collect();
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(handlers)
        .bind(versions)
        .bind(not_before)
        .fetch_one(connection)
        .await
}

/// The handlers and the versions.
fn names(wants: &[Want]) -> (Vec<&str>, Vec<String>) {
    wants
        .iter()
        .map(|want| (want.handler.as_str(), want.event_version.to_string()))
        .unzip()
}

/// A column with a time, in microseconds since 1970; 0 for one that is infinite. As the server sends it: to make a
/// number of it there took longer than to find the row.
fn time(row: &PgRow, column: usize) -> i64 {
    /// From 1970 to 2000, from which the server counts.
    const EPOCH: i64 = 946_684_800_000_000;
    let value = row.try_get_raw(column).ok();
    let bytes = value.and_then(|value| value.as_bytes().ok()?.try_into().ok());
    match bytes.map(i64::from_be_bytes) {
        None | Some(i64::MIN | i64::MAX) => 0,
        Some(micros) => micros.saturating_add(EPOCH),
    }
}

/// Prepares a connection for [`claim`].
pub(crate) async fn prepare_to_claim(connection: &mut PgConnection) -> sqlx::Result<()> {
    // A claim need not survive a crash of the server: one that is forgotten is a lease that has ended early. The
    // delete that completes the message tells both readers apart as ever, and is flushed.
    // A queue is often empty when it is analyzed; the plan made then must walk the index all the same, and
    // neither scan the table nor sort what waits. The settings make some plans look expensive enough to be
    // compiled, which takes a hundred times longer than to run them. The plan is made once: to make it takes
    // longer than to find that nothing waits.
    sqlx::raw_sql(
        "set enable_seqscan = off; set enable_bitmapscan = off; set enable_sort = off; set jit = off;
         set plan_cache_mode = force_generic_plan; set synchronous_commit = off",
    )
        .execute(connection)
        .await
        .map(drop)
}

/// The same for one transaction.
pub(crate) const TO_CLAIM: &str = "set local enable_seqscan = off; set local enable_bitmapscan = off; set local enable_sort = off; set local jit = off; set local synchronous_commit = off";

/// Prepares the transaction in the same way.
pub(crate) async fn walk_the_index(connection: &mut PgConnection) -> sqlx::Result<()> {
    sqlx::raw_sql(TO_CLAIM).execute(connection).await.map(drop)
}

/// Extends leases and returns the messages that are still ours.
///
/// `skip locked`, because a completion that is not committed yet would hold up all the others. What
/// it skips is not returned either: it is being ended by us or was taken from us.
pub(crate) async fn extend(
    connection: &mut PgConnection,
    queue: &str,
    msg_ids: &[i64],
    read_cts: &[i32],
    lease: Duration,
) -> sqlx::Result<Vec<i64>> {
    // A message that was given back keeps its `read_ct`; its new time must stand.
    let text = format!(
        "update {table} q
         set vt = core.now() + $3 * interval '1 microsecond'
         where q.msg_id = any (array(
             select m.msg_id
             from unnest($1::bigint[], $2::int[]) as u (msg_id, read_ct)
             join {table} m on m.msg_id = u.msg_id and m.read_ct = u.read_ct
                 and not m.headers ? 'settled'
             for update of m skip locked
         ))
         returning q.msg_id",
        table = table(queue)
    );
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(msg_ids)
        .bind(read_cts)
        .bind(micros(lease))
        .fetch_all(connection)
        .await
}

/// Which of the messages are no longer ours: claimed since, given back, or gone.
pub(crate) async fn lost(
    connection: &mut PgConnection,
    queue: &str,
    msg_ids: &[i64],
    read_cts: &[i32],
) -> sqlx::Result<Vec<i64>> {
    let text = format!(
        "select u.msg_id
         from unnest($1::bigint[], $2::int[]) as u (msg_id, read_ct)
         where not exists (
             select from {table} m
             where m.msg_id = u.msg_id and m.read_ct = u.read_ct and not m.headers ? 'settled')",
        table = table(queue)
    );
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(msg_ids)
        .bind(read_cts)
        .fetch_all(connection)
        .await
}

/// What a completion commits with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Within {
    /// Its own statement.
    Statement,
    /// A handler's transaction, begun with [`MARK_TRANSACTION`]. Nothing is completed if the handler
    /// has ended it by a statement of its own.
    HandlersTransaction,
}

/// Marks a handler's transaction: the setting ends with it.
pub(crate) const MARK_TRANSACTION: &str = "set local nexus.transaction = 'handler'";

impl Within {
    /// What has to hold for the completion, as the end of a `where`.
    pub(super) fn condition(self) -> &'static str {
        match self {
            Self::Statement => "",
            Self::HandlersTransaction => {
                "and current_setting('nexus.transaction', true) = 'handler'"
            }
        }
    }
}

/// Whether the transaction is still the one that was marked.
pub(crate) async fn is_marked(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "select coalesce(current_setting('nexus.transaction', true) = 'handler', false)",
    )
    .fetch_one(connection)
    .await
}

/// Ends attempts successfully: deletes the messages and returns those that were still ours.
pub(crate) async fn complete(
    connection: &mut PgConnection,
    queue: &str,
    within: Within,
    msg_ids: &[i64],
    read_cts: &[i32],
) -> sqlx::Result<Vec<i64>> {
    let (table, condition) = (table(queue), within.condition());
    if let ([msg_id], [read_ct]) = (msg_ids, read_cts) {
        // With arrays the server would plan the statement anew each time, which takes longer than to run it: it
        // believes that it gains by knowing how long they are.
        let text = format!(
            "delete from {table} q where q.msg_id = $1 and q.read_ct = $2 {condition} returning q.msg_id"
        );
        return sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
            .bind(msg_id)
            .bind(read_ct)
            .fetch_all(connection)
            .await;
    }
    let text = format!(
        "delete from {table} q
         using unnest($1::bigint[], $2::int[]) as c (msg_id, read_ct)
         where q.msg_id = c.msg_id and q.read_ct = c.read_ct {condition}
         returning q.msg_id"
    );
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(msg_ids)
        .bind(read_cts)
        .fetch_all(connection)
        .await
}

/// A message that goes back to its queue.
#[derive(Debug, Clone)]
pub(crate) struct Release {
    pub(crate) msg_id: i64,
    pub(crate) read_ct: i32,
    pub(crate) delay: Duration,
    /// Replaces `attempts` and `errors`, as [`failure_headers`] makes it; `None` leaves them (snoozed, given back).
    pub(crate) failure: Option<Value>,
}

/// The headers that remember failed attempts. The newest ten errors are kept.
pub(crate) fn failure_headers(attempts: u32, errors: &[PastError]) -> Value {
    json!({ "attempts": attempts, "errors": newest(errors) })
}

fn newest(errors: &[PastError]) -> &[PastError] {
    &errors[errors.len().saturating_sub(10)..]
}

/// Gives messages back to the queue: a retry, a snooze, or unstarted work at shutdown. Returns those
/// that were still ours.
pub(crate) async fn release(
    connection: &mut PgConnection,
    queue: &str,
    releases: &[Release],
) -> sqlx::Result<Vec<i64>> {
    // `settled` says that the claim before the next one left a verdict: it was not abandoned.
    let text = format!(
        "update {table} q
         set vt = core.now() + r.delay * interval '1 microsecond',
             headers = q.headers || r.patch || '{{\"settled\": true}}'
         from unnest($1::bigint[], $2::int[], $3::bigint[], $4::jsonb[]) as r (msg_id, read_ct, delay, patch)
         where q.msg_id = r.msg_id and q.read_ct = r.read_ct
         returning q.msg_id",
        table = table(queue)
    );
    let patches: Vec<String> = releases
        .iter()
        .map(|release| {
            release
                .failure
                .as_ref()
                .map_or_else(|| "{}".to_owned(), Value::to_string)
        })
        .collect();
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(
            releases
                .iter()
                .map(|release| release.msg_id)
                .collect::<Vec<_>>(),
        )
        .bind(
            releases
                .iter()
                .map(|release| release.read_ct)
                .collect::<Vec<_>>(),
        )
        .bind(
            releases
                .iter()
                .map(|release| micros(release.delay))
                .collect::<Vec<_>>(),
        )
        .bind(
            patches
                .iter()
                .map(|patch| JsonText(patch))
                .collect::<Vec<_>>(),
        )
        .fetch_all(connection)
        .await
}

/// A message that will not be tried again by itself.
#[derive(Debug, Clone)]
pub(crate) struct GivenUp {
    pub(crate) msg_id: i64,
    pub(crate) read_ct: i32,
    pub(crate) reason: &'static str,
    pub(crate) error: String,
    pub(crate) attempts: u32,
    pub(crate) errors: Vec<PastError>,
}

/// Moves a message to the dead letters of its queue; false if it was no longer ours.
pub(crate) async fn dead_letter(
    connection: &mut PgConnection,
    queue: &str,
    given_up: &GivenUp,
) -> sqlx::Result<bool> {
    let errors = json!(newest(&given_up.errors)).to_string();
    sqlx::query_scalar("select core.dead_letter($1, $2, $3, $4, $5, $6, $7)")
        .bind(queue)
        .bind(given_up.msg_id)
        .bind(given_up.read_ct)
        .bind(given_up.reason)
        .bind(&given_up.error)
        .bind(i32::try_from(given_up.attempts).unwrap_or(i32::MAX))
        .bind(JsonText(&errors))
        .fetch_one(connection)
        .await
}

/// A message that no subscription explains.
#[derive(Debug)]
pub(crate) struct Unexplained {
    pub(crate) msg_id: i64,
    pub(crate) read_ct: i32,
    pub(crate) handler: String,
    pub(crate) headers: String,
}

/// Due messages whose handler has no subscription in the queue's group, and never had another name there:
/// nobody will ever claim them. A minute old at least, so that a registration which is under way, or a
/// rename, is not met half-way.
pub(crate) async fn unexplained(
    connection: &mut PgConnection,
    queue: &str,
    limit: i64,
) -> sqlx::Result<Vec<Unexplained>> {
    // Walks the index from one name to the next, however many messages each has.
    let text = format!(
        "with recursive names as (
             (select m.headers ->> 'handler' as handler from {table} m
              where m.headers ->> 'handler' is not null order by m.headers ->> 'handler' limit 1)
             union all
             select (select m.headers ->> 'handler' from {table} m
                     where m.headers ->> 'handler' > n.handler order by m.headers ->> 'handler' limit 1)
             from names n where n.handler is not null
         ), unknown as materialized (
             select n.handler from names n
             join core.groups g on g.queue_name = $1
             where n.handler is not null
               and not exists (
                   select from core.subscriptions s
                   where s.namespace = g.namespace and s.group_name = g.group_name and s.handler = n.handler)
               and not exists (
                   select from core.renames r
                   where r.namespace = g.namespace and r.group_name = g.group_name and r.former = n.handler)
               -- What was left behind by a retired one shares the fate that was chosen.
               and not exists (
                   select from core.retirements t
                   where t.namespace = g.namespace and t.group_name = g.group_name
                     and t.settled_at is null and n.handler = any (t.names))
         )
         select m.msg_id, m.read_ct, u.handler, m.headers::text
         from unknown u
         join {table} m on m.headers ->> 'handler' = u.handler
         where m.vt <= core.now() and m.enqueued_at < core.now() - interval '1 minute'
         limit $2",
        table = table(queue)
    );
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(queue)
        .bind(limit)
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| Unexplained {
            msg_id: row.get(0),
            read_ct: row.get(1),
            handler: row.get(2),
            headers: row.get(3),
        })
        .collect())
}

/// A message of a foreign program that was taken in or refused.
#[derive(Debug)]
pub(crate) struct Adopted {
    pub(crate) msg_id: i64,
    pub(crate) event_id: Option<i64>,
    pub(crate) refused: Option<String>,
}

/// Those of the queues that have messages without our headers. To see that there are none takes less than to call
/// `core.adopt`.
pub(crate) async fn with_foreign(
    connection: &mut PgConnection,
    queues: &[String],
) -> sqlx::Result<Vec<String>> {
    let conditions: Vec<String> = queues
        .iter()
        .map(|queue| {
            let table = table(queue);
            format!("exists (select from {table} m where {FOREIGN} and m.vt <= core.now())")
        })
        .collect();
    // Not prepared: a plan that was made for an empty queue would read all of a long one.
    let text = format!("select array[{}]::bool[]", conditions.join(", "));
    let found: Vec<bool> = sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .persistent(false)
        .fetch_one(connection)
        .await?;
    let with_foreign = queues.iter().zip(found).filter(|&(_, found)| found);
    Ok(with_foreign.map(|(queue, _)| queue.clone()).collect())
}

/// Adopts messages without our headers; see `core.adopt`.
pub(crate) async fn adopt(
    connection: &mut PgConnection,
    namespace: &str,
    queue: &str,
    limit: i32,
    max_body_bytes: i32,
) -> sqlx::Result<Vec<Adopted>> {
    let rows = sqlx::query("select msg_id, event_id, refused from core.adopt($1, $2, $3, $4)")
        .bind(namespace)
        .bind(queue)
        .bind(limit)
        .bind(max_body_bytes)
        .fetch_all(connection)
        .await?;
    Ok(rows
        .into_iter()
        .map(|row| Adopted {
            msg_id: row.get(0),
            event_id: row.get(1),
            refused: row.get(2),
        })
        .collect())
}

/// Whether a due message of these handlers has to be claimed alone.
pub(crate) async fn has_suspect(
    connection: &mut PgConnection,
    queue: &str,
    wants: &[Want],
) -> sqlx::Result<bool> {
    let text = format!(
        "select exists (
             select from {table} m
             join unnest($1::text[], $2::text[]) as w (handler, version)
                 on m.headers ->> 'handler' = w.handler and m.headers ->> 'eventVersion' = w.version
             where {MAY_BE_SUSPECT} and {LOSSES} >= {SUSPECT_AFTER} and m.vt <= core.now() and {is_open})",
        table = table(queue),
        is_open = is_open(queue),
    );
    let (handlers, versions) = names(wants);
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(handlers)
        .bind(versions)
        .fetch_one(connection)
        .await
}

/// Whether anything is left for handlers (name and event version) of these queues, or to be adopted.
///
/// One statement, hence one state: what a handler of one queue emits into another is seen in one of
/// them.
pub(crate) async fn has_messages(
    connection: &mut PgConnection,
    queues: &BTreeMap<&str, Vec<(&str, u32)>>,
) -> sqlx::Result<bool> {
    let conditions: Vec<String> = queues
        .keys()
        .enumerate()
        .map(|(index, queue)| {
            format!(
                "exists (select from {table} m
                         join unnest(${handlers}::text[], ${versions}::text[]) as w (handler, version)
                             on m.headers ->> 'handler' = w.handler and m.headers ->> 'eventVersion' = w.version)
                 or exists (select from {table} m where {FOREIGN})",
                table = table(queue),
                handlers = 2 * index + 1,
                versions = 2 * index + 2,
            )
        })
        .collect();
    let text = format!("select {}", conditions.join(" or "));
    let mut query = sqlx::query_scalar(AssertSqlSafe(text).into_sql_str());
    for wants in queues.values() {
        let (handlers, versions): (Vec<&str>, Vec<String>) = wants
            .iter()
            .map(|(handler, version)| (*handler, version.to_string()))
            .unzip();
        query = query.bind(handlers).bind(versions);
    }
    query.fetch_one(connection).await
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use sqlx::{Postgres, pool::PoolConnection};

    use super::*;
    use crate::testing::TestDatabase;

    const QUEUE: &str = "core_events_demo";

    /// A queue with one message in it.
    async fn queue(database: &TestDatabase) -> PoolConnection<Postgres> {
        let mut connection = database.pool().await.acquire().await.unwrap();
        for statement in [
            "select core.ensure_group('demo', 'default')",
            "select pgmq.send('core_events_demo', '{}', '{\"handler\": \"h\", \"eventVersion\": 1}'::jsonb, 0)",
        ] {
            sqlx::query(statement)
                .execute(&mut *connection)
                .await
                .unwrap();
        }
        connection
    }

    async fn claim_for(
        connection: &mut PgConnection,
        which: Which,
        lease: Duration,
    ) -> Option<Claimed> {
        let claims = claim(connection, QUEUE, &wants(), which, lease, i32::MAX)
            .await
            .unwrap();
        claims.messages.into_iter().next()
    }

    fn wants() -> [Want; 1] {
        [Want {
            handler: "h".to_owned(),
            event_version: 1,
            slots: 1,
            not_before_micros: 0,
        }]
    }

    #[tokio::test]
    async fn what_was_given_back_is_not_extended() {
        let database = TestDatabase::new().await;
        let mut connection = queue(&database).await;
        let lease = Duration::from_secs(30);
        let claimed = claim_for(&mut connection, Which::Ordinary, lease)
            .await
            .unwrap();
        let (ids, counts) = ([claimed.msg_id], [claimed.read_ct]);
        let held = extend(&mut connection, QUEUE, &ids, &counts, lease).await;
        assert_eq!(held.unwrap(), ids);
        assert!(
            lost(&mut connection, QUEUE, &ids, &counts)
                .await
                .unwrap()
                .is_empty()
        );

        let back = Release {
            msg_id: claimed.msg_id,
            read_ct: claimed.read_ct,
            delay: Duration::ZERO,
            failure: None,
        };
        release(&mut connection, QUEUE, &[back]).await.unwrap();
        let held = extend(&mut connection, QUEUE, &ids, &counts, lease).await;
        assert!(held.unwrap().is_empty());
        let gone = lost(&mut connection, QUEUE, &ids, &counts).await;
        assert_eq!(gone.unwrap(), ids);

        // It is due, as it was told, and the next claim can be extended again.
        let claimed = claim_for(&mut connection, Which::Ordinary, lease)
            .await
            .unwrap();
        let counts = [claimed.read_ct];
        let held = extend(&mut connection, QUEUE, &ids, &counts, lease).await;
        assert_eq!(held.unwrap(), ids);
    }

    #[tokio::test]
    async fn a_poll_sees_what_a_claim_would_take() {
        let database = TestDatabase::new().await;
        let mut connection = queue(&database).await;
        let of = |handler: &str, event_version, not_before_micros| {
            [Want {
                handler: handler.to_owned(),
                event_version,
                not_before_micros,
                ..wants()[0].clone()
            }]
        };
        for (wants, expected) in [
            (of("h", 1, 0), true),
            (of("h", 2, 0), false),
            (of("other", 1, 0), false),
            // Nothing that was due before the year 3000.
            (of("h", 1, 32_503_680_000_000_000), false),
        ] {
            let found = has_due(&mut connection, QUEUE, &wants).await.unwrap();
            assert_eq!(found, expected, "{wants:?}");
            let wants = [of("another", 1, 0), wants].concat();
            let found = has_due(&mut connection, QUEUE, &wants).await.unwrap();
            assert_eq!(found, expected, "{wants:?}");
        }
        // While it is claimed it is not due.
        claim_for(&mut connection, Which::Ordinary, Duration::from_mins(1))
            .await
            .unwrap();
        assert!(!has_due(&mut connection, QUEUE, &wants()).await.unwrap());
    }

    #[tokio::test]
    async fn rows_with_the_largest_values_are_claimed_beside_others() {
        let database = TestDatabase::new().await;
        let mut connection = queue(&database).await;
        for (read_ct, enqueued_at, abandoned) in [
            (i32::MAX, "now", 0),
            (1, "infinity", 0),
            (0, "-infinity", 1),
            (1, "now", i32::MAX),
        ] {
            sqlx::query(
                "insert into pgmq.q_core_events_demo (vt, read_ct, enqueued_at, message, headers)
                 values (core.now(), $1, $2::timestamptz, '{}',
                         jsonb_build_object('handler', 'h', 'eventVersion', 1, 'abandoned', $3::int))",
            )
            .bind(read_ct)
            .bind(enqueued_at)
            .bind(abandoned)
            .execute(&mut *connection)
            .await
            .unwrap();
        }
        // Beside the one that was there: two have lost one lease, and two have lost more.
        let lease = Duration::from_mins(1);
        for (which, expected) in [
            (Which::Ordinary, 4),
            (Which::Suspect, 1),
            (Which::Suspect, 0),
        ] {
            let wants = [Want {
                slots: 100,
                ..wants()[0].clone()
            }];
            let claims = claim(&mut connection, QUEUE, &wants, which, lease, i32::MAX)
                .await
                .unwrap();
            assert_eq!(claims.messages.len(), expected, "{which:?}");
        }
    }

    #[tokio::test]
    async fn a_claim_takes_few_large_messages_and_says_that_more_are_there() {
        let database = TestDatabase::new().await;
        let mut connection = queue(&database).await;
        sqlx::query("truncate pgmq.q_core_events_demo")
            .execute(&mut *connection)
            .await
            .unwrap();
        // The first kind is stored in a hundredth of its size, the second one as it is.
        for text in [
            "repeat('x', 1000000)",
            "(select string_agg(md5(n::text), '') from generate_series(1, 31250) n)",
        ] {
            let send = format!(
                "insert into pgmq.q_core_events_demo (vt, message, headers)
                 select core.now(), to_jsonb({text}), '{{\"handler\": \"h\", \"eventVersion\": 1}}'
                 from generate_series(1, 12)"
            );
            sqlx::query(AssertSqlSafe(send).into_sql_str())
                .execute(&mut *connection)
                .await
                .unwrap();
        }
        let wants = [Want {
            slots: 100,
            ..wants()[0].clone()
        }];
        let lease = Duration::from_mins(1);
        let mut counts = Vec::new();
        loop {
            let claims = claim(
                &mut connection,
                QUEUE,
                &wants,
                Which::Ordinary,
                lease,
                i32::MAX,
            )
            .await
            .unwrap();
            counts.push(claims.messages.len());
            if !claims.is_cut {
                break;
            }
        }
        // Of a megabyte each.
        assert_eq!(counts, [9, 9, 6]);
    }

    #[tokio::test]
    async fn a_message_that_lost_its_lease_twice_is_claimed_alone() {
        let database = TestDatabase::new().await;
        let mut connection = queue(&database).await;
        for losses in 0..2 {
            assert!(
                !has_suspect(&mut connection, QUEUE, &wants()).await.unwrap(),
                "after {losses} losses"
            );
            assert!(
                claim_for(&mut connection, Which::Suspect, Duration::ZERO)
                    .await
                    .is_none()
            );
            let claimed = claim_for(&mut connection, Which::Ordinary, Duration::ZERO).await;
            assert!(claimed.is_some(), "after {losses} losses");
        }
        let beside_others = claim_for(&mut connection, Which::Ordinary, Duration::ZERO).await;
        assert!(beside_others.is_none());
        assert!(has_suspect(&mut connection, QUEUE, &wants()).await.unwrap());
        let alone = claim_for(&mut connection, Which::Suspect, Duration::ZERO)
            .await
            .unwrap();
        assert!(
            alone.headers.contains("\"abandoned\": 2"),
            "{}",
            alone.headers
        );
    }
}
