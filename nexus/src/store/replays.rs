//! Replays: events of the log that are delivered once more.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr, postgres::PgRow};
use uuid::Uuid;

use super::{JsonText, table, timestamp};

/// What is rung for a replay that was started. No queue has this name.
pub(crate) const BELL: &str = "replays";

/// What is to be replayed, and how.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) group: String,
    pub(crate) handler: Option<String>,
    pub(crate) event_types: Option<Vec<String>>,
    pub(crate) from_at: Option<Timestamp>,
    pub(crate) until_at: Option<Timestamp>,
    pub(crate) from_id: Option<i64>,
    pub(crate) until_id: Option<i64>,
    pub(crate) rate: Option<f64>,
    pub(crate) max_waiting: Option<u32>,
}

/// Starts a replay and returns its id; see `core.start_replay`.
pub(crate) async fn start(
    connection: &mut PgConnection,
    namespace: &str,
    request: &Request,
) -> sqlx::Result<Uuid> {
    let most = |most: u32| i32::try_from(most).unwrap_or(i32::MAX);
    sqlx::query_scalar(
        "select core.start_replay($1, $2, $3, $4,
             timestamptz 'epoch' + $5 * interval '1 microsecond',
             timestamptz 'epoch' + $6 * interval '1 microsecond', $7, $8, $9, $10)",
    )
    .bind(namespace)
    .bind(&request.group)
    .bind(&request.handler)
    .bind(&request.event_types)
    .bind(request.from_at.map(Timestamp::as_microsecond))
    .bind(request.until_at.map(Timestamp::as_microsecond))
    .bind(request.from_id)
    .bind(request.until_id)
    .bind(request.rate)
    .bind(request.max_waiting.map(most))
    .fetch_one(connection)
    .await
}

/// What a replay would deliver.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) events: i64,
    pub(crate) messages: i64,
    pub(crate) left_out: i64,
    pub(crate) is_estimate: bool,
    pub(crate) first_at: Option<Timestamp>,
    pub(crate) last_at: Option<Timestamp>,
}

/// Counts what a replay would deliver, looking at `limit` events of each type; see
/// `core.estimate_replay`.
pub(crate) async fn estimate(
    connection: &mut PgConnection,
    namespace: &str,
    request: &Request,
    limit: i32,
) -> sqlx::Result<Counted> {
    let row = sqlx::query(
        "select events, messages, left_out, is_estimate,
                (extract(epoch from first_at) * 1000000)::bigint, (extract(epoch from last_at) * 1000000)::bigint
         from core.estimate_replay($1, $2, $3, $4,
             timestamptz 'epoch' + $5 * interval '1 microsecond',
             timestamptz 'epoch' + $6 * interval '1 microsecond', $7, $8, $9)",
    )
    .bind(namespace)
    .bind(&request.group)
    .bind(&request.handler)
    .bind(&request.event_types)
    .bind(request.from_at.map(Timestamp::as_microsecond))
    .bind(request.until_at.map(Timestamp::as_microsecond))
    .bind(request.from_id)
    .bind(request.until_id)
    .bind(limit)
    .fetch_one(connection)
    .await?;
    Ok(Counted {
        events: row.get(0),
        messages: row.get(1),
        left_out: row.get(2),
        is_estimate: row.get(3),
        first_at: row.get::<Option<i64>, _>(4).map(timestamp),
        last_at: row.get::<Option<i64>, _>(5).map(timestamp),
    })
}

/// The running replays of the namespace, oldest first.
pub(crate) async fn running(
    connection: &mut PgConnection,
    namespace: &str,
) -> sqlx::Result<Vec<Uuid>> {
    sqlx::query_scalar(
        "select replay_id from core.replays where namespace = $1 and state = 'running'
         order by created_at, replay_id",
    )
    .bind(namespace)
    .fetch_all(connection)
    .await
}

/// Whether a replay runs that delivers to one of these handlers (`[{"group", "handler"}]`).
pub(crate) async fn is_any_running(
    connection: &mut PgConnection,
    namespace: &str,
    handlers: &Value,
) -> sqlx::Result<bool> {
    let handlers = handlers.to_string();
    sqlx::query_scalar(
        "select exists (
             select from core.replays r
             join core.subscriptions s on s.subscription_id = any (r.subscription_ids)
             where r.namespace = $1 and r.state = 'running'
               and $2 @> jsonb_build_array(jsonb_build_object('group', s.group_name, 'handler', s.handler)))",
    )
    .bind(namespace)
    .bind(JsonText(&handlers))
    .fetch_one(connection)
    .await
}

/// How far a replay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    Finished,
    Cancelled,
    Failed,
}

impl State {
    fn of(text: &str) -> Self {
        match text {
            "running" => Self::Running,
            "finished" => Self::Finished,
            "cancelled" => Self::Cancelled,
            _ => Self::Failed,
        }
    }
}

/// What a batch has done.
#[derive(Debug)]
pub(crate) struct Driven {
    pub(crate) sent: i32,
    /// When to go on; `None` once the replay is over.
    pub(crate) next_in: Option<Duration>,
    pub(crate) queue: String,
    pub(crate) state: State,
    pub(crate) error: Option<String>,
}

/// Puts the next messages of a replay into its queue; `None` if it is over or somebody else is at it. See
/// `core.drive_replay`.
pub(crate) async fn drive(
    connection: &mut PgConnection,
    replay_id: Uuid,
    limit: i32,
) -> sqlx::Result<Option<Driven>> {
    let row =
        sqlx::query("select sent, next_in, queue, state, error from core.drive_replay($1, $2)")
            .bind(replay_id)
            .bind(limit)
            .fetch_one(connection)
            .await?;
    Ok(row.get::<Option<i32>, _>(0).map(|sent| Driven {
        sent,
        next_in: row
            .get::<Option<i64>, _>(1)
            .map(|micros| Duration::from_micros(micros.try_into().unwrap_or(0))),
        queue: row.get(2),
        state: State::of(row.get(3)),
        error: row.get(4),
    }))
}

/// Ends a replay; see `core.cancel_replay`.
pub(crate) async fn cancel(
    connection: &mut PgConnection,
    namespace: &str,
    replay_id: Uuid,
) -> sqlx::Result<bool> {
    sqlx::query_scalar("select core.cancel_replay($1, $2)")
        .bind(namespace)
        .bind(replay_id)
        .fetch_one(connection)
        .await
}

/// A replay as it is stored.
#[derive(Debug)]
pub(crate) struct ReplayRow {
    pub(crate) id: Uuid,
    pub(crate) request: Request,
    pub(crate) state: State,
    pub(crate) error: Option<String>,
    pub(crate) events: i64,
    pub(crate) messages: i64,
    pub(crate) left_out: i64,
    pub(crate) taken_back: i64,
    pub(crate) position_at: Option<Timestamp>,
    pub(crate) last_at: Option<Timestamp>,
    pub(crate) created_at: Timestamp,
    pub(crate) finished_at: Option<Timestamp>,
    queue: String,
    message_ids: Vec<i64>,
}

const COLUMNS: &str = "replay_id, group_name, handler, event_types, state, error,
    events, messages, left_out, taken_back, from_id, until_id, rate, max_waiting, queue_name, message_ids,
    (extract(epoch from from_at) * 1000000)::bigint, (extract(epoch from until_at) * 1000000)::bigint,
    case when position_id > 0 then (extract(epoch from position_at) * 1000000)::bigint end,
    (extract(epoch from last_at) * 1000000)::bigint,
    (extract(epoch from created_at) * 1000000)::bigint, (extract(epoch from finished_at) * 1000000)::bigint";

fn read(row: &PgRow) -> ReplayRow {
    let at = |index: usize| row.get::<Option<i64>, _>(index).map(timestamp);
    ReplayRow {
        id: row.get(0),
        request: Request {
            group: row.get(1),
            handler: row.get(2),
            event_types: row.get(3),
            from_id: row.get(10),
            until_id: row.get(11),
            rate: row.get(12),
            max_waiting: Some(row.get::<i32, _>(13).unsigned_abs()),
            from_at: at(16),
            until_at: at(17),
        },
        state: State::of(row.get(4)),
        error: row.get(5),
        events: row.get(6),
        messages: row.get(7),
        left_out: row.get(8),
        taken_back: row.get(9),
        queue: row.get(14),
        message_ids: row.get(15),
        position_at: at(18),
        last_at: at(19),
        created_at: timestamp(row.get(20)),
        finished_at: at(21),
    }
}

/// The replays of the namespace, newest first.
pub(crate) async fn list(
    connection: &mut PgConnection,
    namespace: &str,
    limit: i64,
) -> sqlx::Result<Vec<ReplayRow>> {
    let text = format!(
        "select {COLUMNS} from core.replays where namespace = $1
         order by created_at desc, replay_id limit $2"
    );
    let rows = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(namespace)
        .bind(limit)
        .fetch_all(connection)
        .await?;
    Ok(rows.iter().map(read).collect())
}

/// One replay.
pub(crate) async fn find(
    connection: &mut PgConnection,
    namespace: &str,
    replay_id: Uuid,
) -> sqlx::Result<Option<ReplayRow>> {
    let text =
        format!("select {COLUMNS} from core.replays where namespace = $1 and replay_id = $2");
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(namespace)
        .bind(replay_id)
        .fetch_optional(connection)
        .await?;
    Ok(row.as_ref().map(read))
}

/// How many messages of a replay are in its queue.
pub(crate) async fn waiting(
    connection: &mut PgConnection,
    replay: &ReplayRow,
) -> sqlx::Result<i64> {
    let text = format!(
        "select count(*) from {} where msg_id = any ($1)",
        table(&replay.queue)
    );
    sqlx::query_scalar(AssertSqlSafe(text).into_sql_str())
        .bind(&replay.message_ids)
        .fetch_one(connection)
        .await
}

/// Lets running replays to a handler's former name deliver to the handler.
pub(crate) async fn give_to_handler(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    former: &str,
    handler: &str,
) -> sqlx::Result<()> {
    // To the handler once, if a replay goes to both names.
    sqlx::query(
        "update core.replays r
         set subscription_ids = array_append(
                 array_remove(array_remove(r.subscription_ids, o.subscription_id), n.subscription_id),
                 n.subscription_id)
         from core.subscriptions o, core.subscriptions n
         where r.namespace = $1 and r.state = 'running' and o.subscription_id = any (r.subscription_ids)
           and (o.namespace, o.group_name, o.handler) = ($1, $2, $3)
           and (n.namespace, n.group_name, n.handler) = ($1, $2, $4)",
    )
    .bind(namespace)
    .bind(group)
    .bind(former)
    .bind(handler)
    .execute(connection)
    .await
    .map(drop)
}

/// Forgets replays that ended a month ago.
pub(crate) async fn forget_old(connection: &mut PgConnection, namespace: &str) -> sqlx::Result<()> {
    sqlx::query("select core.forget_replays($1)")
        .bind(namespace)
        .execute(connection)
        .await
        .map(drop)
}
