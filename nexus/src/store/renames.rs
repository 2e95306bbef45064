//! Handlers that got another name: their subscription, and then the messages and dead letters that
//! still carry the old one.

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::{JsonText, maintenance, replays, table};

/// A handler of this build, and a name that it had before in its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rename {
    pub(crate) group: String,
    pub(crate) former: String,
    pub(crate) handler: String,
    /// What the handler takes now.
    pub(crate) event_type: String,
}

/// What became of a [`Rename`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The subscription has the new name, and all else that it had.
    Renamed,
    /// There was a subscription of the new name already; that of the former one is gone.
    Merged,
    /// The former name stands for another event type: nothing was changed.
    OtherEvent(String),
}

/// A former name that a live node of another app runs: (group, former name, app).
pub(crate) async fn other_app(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    renames: &[Rename],
) -> sqlx::Result<Option<(String, String, String)>> {
    sqlx::query_as(
        "select r.group_name, r.former, n.app
         from unnest($3::text[], $4::text[]) as r (group_name, former)
         join core.nodes n on n.namespace = $1 and n.app <> $2 and core.is_live(n.last_heartbeat)
             and n.handlers @> jsonb_build_array(jsonb_build_object('group', r.group_name, 'handler', r.former))
         order by 1, 2 limit 1",
    )
    .bind(namespace)
    .bind(app)
    .bind(column(renames, |rename| &rename.group))
    .bind(column(renames, |rename| &rename.former))
    .fetch_optional(connection)
    .await
}

fn column(renames: &[Rename], of: impl Fn(&Rename) -> &String) -> Vec<&str> {
    renames.iter().map(|rename| of(rename).as_str()).collect()
}

/// The renames that a build takes back by being older: it declares a former name, and not the handler
/// that has its subscription now. `handlers` is what `core.subscribe` takes.
pub(crate) async fn taken_back(
    connection: &mut PgConnection,
    namespace: &str,
    handlers: &Value,
) -> sqlx::Result<Vec<Rename>> {
    let handlers = handlers.to_string();
    let rows = sqlx::query(
        "with declared as (
             select h ->> 'group' as group_name, h ->> 'handler' as handler, h ->> 'eventType' as event_type
             from jsonb_array_elements($2) h
         )
         select r.group_name, r.handler, r.former, d.event_type
         from core.renames r
         join declared d on d.group_name = r.group_name and d.handler = r.former
         where r.namespace = $1
           and not exists (select from declared o where o.group_name = r.group_name and o.handler = r.handler)
           and not exists (select from core.subscriptions s
                           where s.namespace = r.namespace and s.group_name = r.group_name and s.handler = r.former)
         order by 1, 2",
    )
    .bind(namespace)
    .bind(JsonText(&handlers))
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Rename {
            group: row.get(0),
            former: row.get(1),
            handler: row.get(2),
            event_type: row.get(3),
        })
        .collect())
}

/// A subscription, as far as a rename goes by it.
#[derive(Debug)]
struct Subscribed {
    event_type: String,
    is_settled: bool,
}

async fn subscribed(
    connection: &mut PgConnection,
    namespace: &str,
    group: &str,
    handler: &str,
) -> sqlx::Result<Option<Subscribed>> {
    let row = sqlx::query(
        "select event_type, since_snapshot is null from core.subscriptions
         where namespace = $1 and group_name = $2 and handler = $3 for update",
    )
    .bind(namespace)
    .bind(group)
    .bind(handler)
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| Subscribed {
        event_type: row.get(0),
        is_settled: row.get(1),
    }))
}

/// Gives the subscription of the former name to the handler; `None` if there is none.
///
/// Messages follow later, by [`move_messages`]. The transaction must hold the
/// [lock](super::subscriptions::lock) on registrations.
pub(crate) async fn apply(
    connection: &mut PgConnection,
    namespace: &str,
    app: &str,
    rename: &Rename,
) -> sqlx::Result<Option<Outcome>> {
    let Rename {
        group,
        former,
        handler,
        event_type,
    } = rename;
    let Some(old) = subscribed(connection, namespace, group, former).await? else {
        return Ok(None);
    };
    // The ticks of a function are events named for it.
    let is_tick = |event_type: &str| event_type.starts_with("tick.");
    if old.event_type != *event_type && !(is_tick(&old.event_type) && is_tick(event_type)) {
        return Ok(Some(Outcome::OtherEvent(old.event_type)));
    }
    let new = subscribed(connection, namespace, group, handler).await?;
    let both_were_sent = new
        .as_ref()
        .is_some_and(|new| new.event_type == old.event_type);
    if new.is_some() {
        // What the former name is owed still has to be sent to it; see there.
        if !old.is_settled {
            maintenance::settle_subscriptions(connection, namespace).await?;
        }
        replays::give_to_handler(connection, namespace, group, former, handler).await?;
        sqlx::query("select core.remove_subscription($1, $2, $3)")
            .bind(namespace)
            .bind(group)
            .bind(former)
            .execute(&mut *connection)
            .await?;
    } else {
        sqlx::query(
            "update core.subscriptions set handler = $4, event_type = $5, app = $6
             where namespace = $1 and group_name = $2 and handler = $3",
        )
        .bind(namespace)
        .bind(group)
        .bind(former)
        .bind(handler)
        .bind(event_type)
        .bind(app)
        .execute(&mut *connection)
        .await?;
    }
    sqlx::query(
        "update core.namespaces set subscriptions_version = subscriptions_version + 1 where namespace = $1",
    )
    .bind(namespace)
    .execute(&mut *connection)
    .await?;
    remember(connection, namespace, rename, both_were_sent).await?;
    Ok(Some(if new.is_some() {
        Outcome::Merged
    } else {
        Outcome::Renamed
    }))
}

/// Stores the rename. Names that led to the former one lead to the handler now.
///
/// If both names were sent the same events, it is noted which of them the handler had on its own.
async fn remember(
    connection: &mut PgConnection,
    namespace: &str,
    rename: &Rename,
    both_were_sent: bool,
) -> sqlx::Result<()> {
    let Rename {
        group,
        former,
        handler,
        ..
    } = rename;
    // A name that is a handler again stands for no other one.
    let itself = json!([{ "group": group, "handler": handler }]);
    forget_names_in_use(connection, namespace, &itself).await?;
    sqlx::query(
        "insert into core.renames (namespace, group_name, former, handler) values ($1, $2, $3, $4)
         on conflict (namespace, group_name, former) do update
             set handler = excluded.handler, both_since = null, both_snapshot = null, both_at = null,
                 letters_until = 0, renamed_at = excluded.renamed_at",
    )
    .bind(namespace)
    .bind(group)
    .bind(former)
    .bind(handler)
    .execute(&mut *connection)
    .await?;
    if both_were_sent {
        // Of two subscriptions the older one had all that the newer one had.
        sqlx::query(
            "update core.renames r
             set both_since = s.since_version, both_snapshot = s.first_snapshot, both_at = s.since_at
             from core.subscriptions s
             where r.namespace = $1 and r.group_name = $2 and (r.former = $3 or r.handler = $3)
               and s.namespace = $1 and s.group_name = $2 and s.handler = $4
               and (r.both_since is null or r.both_since > s.since_version)",
        )
        .bind(namespace)
        .bind(group)
        .bind(former)
        .bind(handler)
        .execute(&mut *connection)
        .await?;
    }
    sqlx::query(
        "update core.renames set handler = $4, letters_until = 0
         where namespace = $1 and group_name = $2 and handler = $3",
    )
    .bind(namespace)
    .bind(group)
    .bind(former)
    .bind(handler)
    .execute(connection)
    .await
    .map(drop)
}

/// Names that are handlers of their own stand for no others. `handlers` is what `core.subscribe`
/// takes.
pub(crate) async fn forget_names_in_use(
    connection: &mut PgConnection,
    namespace: &str,
    handlers: &Value,
) -> sqlx::Result<()> {
    let handlers = handlers.to_string();
    sqlx::query("select core.forget_renames($1, $2)")
        .bind(namespace)
        .bind(JsonText(&handlers))
        .execute(connection)
        .await
        .map(drop)
}

/// A former name of a handler, and where what carries it lies.
#[derive(Debug, Clone)]
pub(crate) struct FormerName {
    pub(crate) group: String,
    pub(crate) former: String,
    pub(crate) handler: String,
    pub(crate) queue: String,
    subscription_id: i64,
    letters_until: i64,
}

/// The former names of these handlers (`[{"group", "handler"}]`).
pub(crate) async fn of_handlers(
    connection: &mut PgConnection,
    namespace: &str,
    handlers: &Value,
) -> sqlx::Result<Vec<FormerName>> {
    let handlers = handlers.to_string();
    let rows = sqlx::query(
        "select r.group_name, r.former, r.handler, s.queue_name, s.subscription_id, r.letters_until
         from core.renames r
         join core.subscriptions s using (namespace, group_name, handler)
         where r.namespace = $1
           and $2 @> jsonb_build_array(jsonb_build_object('group', r.group_name, 'handler', r.handler))
         order by 1, 2",
    )
    .bind(namespace)
    .bind(JsonText(&handlers))
    .fetch_all(connection)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| FormerName {
            group: row.get(0),
            former: row.get(1),
            handler: row.get(2),
            queue: row.get(3),
            subscription_id: row.get(4),
            letters_until: row.get(5),
        })
        .collect())
}

/// The place of a message in the index of its queue, among those of one handler.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    version: String,
    vt_micros: i64,
    msg_id: i64,
}

impl Place {
    /// Before all others.
    pub(crate) fn first() -> Self {
        Self {
            version: String::new(),
            vt_micros: 0,
            msg_id: 0,
        }
    }
}

/// Messages of a former name that were moved.
#[derive(Debug)]
pub(crate) struct Moved {
    /// Those that are now the handler's.
    pub(crate) messages: i64,
    /// Those that were left out, because their event had been sent to the handler as well.
    pub(crate) left_out: i64,
    /// Where to go on; `None` after the last one.
    pub(crate) next: Option<Place>,
}

/// Moves up to `limit` messages of a former name to the handler, in the order of the queue's index.
///
/// What a node holds a lease on stays: its verdict ends it, or gives it back to be moved. What the
/// message was first sent to stays in its headers, because a delivery's key must not change.
pub(crate) async fn move_messages(
    connection: &mut PgConnection,
    namespace: &str,
    name: &FormerName,
    from: &Place,
    limit: i64,
) -> sqlx::Result<Moved> {
    // A redriven message (`attempts` is 0) runs whatever was sent elsewhere: somebody has asked for it.
    let text = format!(
        "with batch as materialized (
             select m.msg_id, m.vt, m.headers ->> 'eventVersion' as version,
                    (m.headers ->> 'eventId')::bigint as event_id,
                    m.headers ->> 'attempts' = '0' as is_redriven
             from {table} m
             where m.headers ->> 'handler' = $1
               and (m.headers ->> 'eventVersion', m.vt, m.msg_id)
                   > ($4, timestamptz 'epoch' + $5 * interval '1 microsecond', $6)
               and not (m.read_ct > 0 and not m.headers ? 'settled' and m.vt > core.now())
               -- A name that has become a handler again by now keeps what is sent to it.
               and exists (select from core.renames r
                           where r.namespace = $8 and r.group_name = $9 and r.former = $1 and r.handler = $2)
             order by m.headers ->> 'eventVersion', m.vt, m.msg_id
             limit $7
             for update skip locked
         ), doubled as (
             delete from {table} q
             using batch b
             where q.msg_id = b.msg_id and b.is_redriven is not true
               -- The emit has sent the handler the event, or its clean cut owes it: the latter is the
               -- condition of core.settle_subscriptions.
               and exists (select from core.renames r
                           -- Another namespace may have used the same id, by hand.
                           join core.event_log l on l.event_id = b.event_id and l.namespace = r.namespace
                           where r.namespace = $8 and r.group_name = $9 and r.former = $1 and r.handler = $2
                             and (l.subscriptions_version >= r.both_since
                                  or l.emitted_at >= r.both_at
                                     and not pg_visible_in_snapshot(l.tx_id, r.both_snapshot)))
             returning q.msg_id
         ), moved as (
             update {table} q
             set headers = q.headers || jsonb_build_object('handler', $2::text, 'subscription', $3::bigint,
                     'formerly', coalesce(q.headers -> 'formerly', q.headers -> 'handler'))
             where q.msg_id = any (array(select msg_id from batch except select msg_id from doubled))
             returning 1
         )
         select (select count(*) from moved), (select count(*) from doubled),
                (select count(*) from batch), b.version, (extract(epoch from b.vt) * 1000000)::bigint, b.msg_id
         from (select) one
         left join lateral (select * from batch order by version desc, vt desc, msg_id desc limit 1) b on true",
        table = table(&name.queue)
    );
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(&name.former)
        .bind(&name.handler)
        .bind(name.subscription_id)
        .bind(&from.version)
        .bind(from.vt_micros)
        .bind(from.msg_id)
        .bind(limit)
        .bind(namespace)
        .bind(&name.group)
        .fetch_one(connection)
        .await?;
    let is_last = row.get::<i64, _>(2) < limit;
    let next = (!is_last).then(|| Place {
        version: row.get(3),
        vt_micros: row.get(4),
        msg_id: row.get(5),
    });
    Ok(Moved {
        messages: row.get(0),
        left_out: row.get(1),
        next,
    })
}

/// Gives dead letters of a former name to the handler, `limit` letters from where the last call has
/// stopped. Returns how many were given, and whether there are more to look at.
///
/// Each is looked at once, and those of the last minute again, because numbers are not handed out in the
/// order of commits.
pub(crate) async fn move_dead_letters(
    connection: &mut PgConnection,
    namespace: &str,
    name: &mut FormerName,
    limit: i64,
) -> sqlx::Result<(i64, bool)> {
    let text = format!(
        "with seen as materialized (
             select msg_id, enqueued_at, headers ->> 'handler' = $1 as is_former from {table}
             where msg_id > $3
               and exists (select from core.renames r
                           where r.namespace = $6 and r.group_name = $7 and r.former = $1 and r.handler = $2)
             order by msg_id limit $4
         ), moved as (
             update {table} q
             set headers = q.headers || jsonb_build_object('handler', $2::text, 'subscription', $5::bigint,
                     'formerly', coalesce(q.headers -> 'formerly', q.headers -> 'handler')),
                 message = case when jsonb_typeof(q.message) = 'object'
                     then q.message || jsonb_build_object('handler', $2::text) else q.message end
             from seen
             where q.msg_id = seen.msg_id and seen.is_former
             returning 1
         ), done as (
             select coalesce(max(msg_id) filter (where enqueued_at < core.now() - interval '1 minute'), $3) as until
             from seen
         ), noted as (
             update core.renames r set letters_until = greatest(r.letters_until, done.until)
             from done
             where r.namespace = $6 and r.group_name = $7 and r.former = $1 and r.letters_until < done.until
         )
         select (select count(*) from moved), (select count(*) from seen), (select coalesce(max(msg_id), $3) from seen)",
        table = table(&format!("{}_dlq", name.queue))
    );
    let row = sqlx::query(AssertSqlSafe(text).into_sql_str())
        .bind(&name.former)
        .bind(&name.handler)
        .bind(name.letters_until)
        .bind(limit)
        .bind(name.subscription_id)
        .bind(namespace)
        .bind(&name.group)
        .fetch_one(connection)
        .await?;
    name.letters_until = row.get(2);
    Ok((row.get(0), row.get::<i64, _>(1) >= limit))
}
