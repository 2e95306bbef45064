//! Appending to the log and enqueueing for every subscription, by one statement.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::{JsonText, table};
use crate::event::Outgoing;

/// Which queues each event type goes to, as of one version of the namespace's subscriptions.
#[derive(Debug)]
pub(crate) struct Plan {
    version: i64,
    queues: HashMap<String, BTreeSet<String>>,
}

impl Plan {
    /// What a client starts with: its first emit loads the plan.
    pub(crate) fn never_in_force() -> Self {
        Self { version: -1, queues: HashMap::new() }
    }

    /// The plan that is in force, or `None` if the namespace is not known.
    pub(crate) async fn load(
        connection: &mut PgConnection,
        namespace: &str,
    ) -> sqlx::Result<Option<Self>> {
        // One statement, so that version and subscriptions belong together.
        let rows = sqlx::query(
            "select n.subscriptions_version, s.event_type, s.queue_name
             from core.namespaces n
             left join core.subscriptions s on s.namespace = n.namespace
             where n.namespace = $1
             group by 1, 2, 3",
        )
        .bind(namespace)
        .fetch_all(connection)
        .await?;
        let Some(first) = rows.first() else { return Ok(None) };
        let mut plan = Self { version: first.get(0), queues: HashMap::new() };
        for row in &rows {
            if let (Some(event_type), Some(queue)) =
                (row.get::<Option<String>, _>(1), row.get::<Option<String>, _>(2))
            {
                plan.queues.entry(event_type).or_default().insert(queue);
            }
        }
        Ok(Some(plan))
    }

    fn targets(&self, events: &[Outgoing]) -> BTreeSet<String> {
        let mut targets = BTreeSet::new();
        for event in events {
            if let Some(queues) = self.queues.get(&event.event_type) {
                targets.extend(queues.iter().cloned());
            }
        }
        targets
    }
}

/// Messages whose completion is stored together with events.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Completion<'a> {
    pub(crate) queue: &'a str,
    pub(crate) msg_ids: &'a [i64],
    pub(crate) read_cts: &'a [i32],
}

/// Who emits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Emitter<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) producer: &'a str,
    pub(crate) idempotency_ms: i64,
}

/// What was stored.
#[derive(Debug)]
pub(crate) struct Stored {
    /// The id of each event in the order given. For an idempotency key that was used before, the
    /// id of the event it was used for.
    pub(crate) event_ids: Vec<i64>,
    /// The messages that were completed; one that is missing had lost its lease.
    pub(crate) completed: Vec<i64>,
    /// An idempotency key was used before for another event.
    pub(crate) conflict: Option<String>,
    /// The queues that got messages.
    pub(crate) queues: BTreeSet<String>,
}

/// The statements, by what they depend on.
#[derive(Debug, Default)]
pub(crate) struct Statements {
    texts: Mutex<HashMap<Shape, Arc<str>>>,
}

/// What the text of the statement depends on: not the event types, of which there are many, but
/// the set of queues they go to, of which there are few. sqlx caches 100 statements a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shape {
    targets: BTreeSet<String>,
    completes: Option<String>,
    keyed: bool,
}

/// Appends `events` and enqueues them; completes messages in the same statement.
///
/// `source[i]` is the message whose handler returned event `i`: the event is stored only if that
/// message is completed. `None` as a result means that the plan is no longer in force and that
/// nothing was stored.
pub(crate) async fn emit(
    connection: &mut PgConnection,
    statements: &Statements,
    plan: &Plan,
    emitter: Emitter<'_>,
    events: &[Outgoing],
    completion: Option<Completion<'_>>,
    source: &[Option<i64>],
) -> sqlx::Result<Option<Stored>> {
    let shape = Shape {
        targets: plan.targets(events),
        completes: completion.map(|completion| completion.queue.to_owned()),
        keyed: events.iter().any(|event| event.idempotency_key.is_some()),
    };
    let text = statements.text(&shape);
    let column = |get: fn(&Outgoing) -> Option<&str>| -> Vec<Option<&str>> {
        events.iter().map(get).collect()
    };
    let types: Vec<&str> = events.iter().map(|event| event.event_type.as_str()).collect();
    let versions: Vec<i32> =
        events.iter().map(|event| i32::try_from(event.event_version).unwrap_or(i32::MAX)).collect();
    let payloads: Vec<JsonText<'_>> = events.iter().map(|event| JsonText(&event.payload)).collect();
    let mut query = sqlx::query(AssertSqlSafe(&*text).into_sql_str())
        .bind(emitter.namespace)
        .bind(plan.version)
        .bind(emitter.producer)
        .bind(types)
        .bind(versions)
        .bind(payloads)
        .bind(column(|event| event.key.as_deref()))
        .bind(column(|event| event.correlation_id.as_deref()))
        .bind(column(|event| event.causation_id.as_deref()))
        .bind(column(|event| event.traceparent.as_deref()))
        .bind(column(|event| event.tracestate.as_deref()));
    if let Some(completion) = completion {
        query = query.bind(source).bind(completion.msg_ids).bind(completion.read_cts);
    }
    if shape.keyed {
        query = query
            .bind(column(|event| event.idempotency_key.as_deref()))
            .bind(emitter.idempotency_ms);
    }
    let row = query.fetch_one(connection).await?;
    if !row.get::<bool, _>(0) {
        return Ok(None);
    }
    Ok(Some(Stored {
        event_ids: row.get(1),
        completed: row.get(2),
        conflict: row.get(3),
        queues: shape.targets,
    }))
}

impl Statements {
    fn text(&self, shape: &Shape) -> Arc<str> {
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(text) = texts.get(shape) {
            return Arc::clone(text);
        }
        let text: Arc<str> = shape.statement().into();
        texts.insert(shape.clone(), Arc::clone(&text));
        text
    }
}

impl Shape {
    fn statement(&self) -> String {
        // Parameters 1 to 11 are always there; what follows depends on the shape.
        let mut next = 12;
        let mut parameter = || {
            next += 1;
            format!("${}", next - 1)
        };
        let mut text = String::from(
            "with v as materialized (
                 select from core.namespaces where namespace = $1 and subscriptions_version = $2
             )",
        );
        let mut source_column = String::new();
        let mut only_completed = "";
        if let Some(queue) = &self.completes {
            let (source, msg_ids, read_cts) = (parameter(), parameter(), parameter());
            write!(
                text,
                ", d as (
                     delete from {table} q
                     using unnest({msg_ids}::bigint[], {read_cts}::int[]) as c (msg_id, read_ct)
                     where q.msg_id = c.msg_id and q.read_ct = c.read_ct and exists (select from v)
                     returning q.msg_id
                 )",
                table = table(queue)
            )
            .expect("writing to a string cannot fail");
            source_column = format!(", {source}::bigint[]");
            only_completed = "and (e.source is null or e.source in (select msg_id from d))";
        }
        let (mut key_column, mut period) = (String::new(), String::new());
        if self.keyed {
            key_column = format!(", {}::text[]", parameter());
            period = parameter();
        }
        write!(
            text,
            ", e as materialized (
                 select nextval('core.event_log_event_id_seq') as event_id, core.now() as emitted_at, e.*
                 from unnest($4::text[], $5::int[], $6::jsonb[], $7::text[], $8::text[], $9::text[],
                             $10::text[], $11::text[]{source_column}{key_column}) with ordinality
                     as e (event_type, event_version, payload, key, correlation_id, causation_id,
                           traceparent, tracestate{source}{idempotency_key}, n)
                 where exists (select from v) {only_completed}
             )",
            source = if self.completes.is_some() { ", source" } else { "" },
            idempotency_key = if self.keyed { ", idempotency_key" } else { "" },
        )
        .expect("writing to a string cannot fail");
        if self.keyed {
            // The id was drawn before, so a row that comes back with it is new. `do nothing` would
            // return no id for a key that another transaction has just used.
            write!(
                text,
                ", k as (
                     insert into core.idempotency_keys as i (namespace, key, event_id, fingerprint, expires_at)
                     select $1, e.idempotency_key, e.event_id, core.event_fingerprint(e.event_type, e.payload),
                            core.now() + {period}::bigint * interval '1 millisecond'
                     from e where e.idempotency_key is not null
                     order by e.idempotency_key
                     on conflict (namespace, key) do update set
                         event_id = case when i.expires_at <= core.now() then excluded.event_id else i.event_id end,
                         fingerprint = case when i.expires_at <= core.now() then excluded.fingerprint else i.fingerprint end,
                         expires_at = case when i.expires_at <= core.now() then excluded.expires_at else i.expires_at end
                     returning i.key, i.event_id, i.fingerprint
                 )"
            )
            .expect("writing to a string cannot fail");
        }
        let (join, event_ids, conflict) = if self.keyed {
            (
                "left join k on k.key = e.idempotency_key where k.event_id is null or k.event_id = e.event_id",
                "(select array_agg(coalesce(k.event_id, e.event_id) order by e.n)
                  from e left join k on k.key = e.idempotency_key)",
                "(select min(k.key) from e join k on k.key = e.idempotency_key
                  where k.fingerprint <> core.event_fingerprint(e.event_type, e.payload))",
            )
        } else {
            ("", "(select array_agg(e.event_id order by e.n) from e)", "null::text")
        };
        write!(
            text,
            ", l as (
                 insert into core.event_log
                     (event_id, namespace, event_type, payload, emitted_at, producer_node_id, metadata,
                      event_version, key, correlation_id, causation_id, subscriptions_version)
                 select e.event_id, $1, e.event_type, e.payload, e.emitted_at, $3,
                        case when e.traceparent is null then '{{}}'
                             else jsonb_strip_nulls(jsonb_build_object('traceparent', e.traceparent, 'tracestate', e.tracestate)) end,
                        e.event_version, e.key, coalesce(e.correlation_id, e.event_id::text), e.causation_id, $2
                 from e {join}
             )"
        )
        .expect("writing to a string cannot fail");
        if !self.targets.is_empty() {
            write!(
                text,
                ", b as materialized (
                     select e.event_id, e.event_type, e.event_version,
                            core.envelope($1, e.event_type, e.payload, e.emitted_at, $3, e.event_version, e.key,
                                          coalesce(e.correlation_id, e.event_id::text), e.causation_id) as body,
                            case when e.traceparent is null then '{{}}'
                                 else jsonb_strip_nulls(jsonb_build_object('traceparent', e.traceparent, 'tracestate', e.tracestate)) end as trace
                     from e {join}
                 )"
            )
            .expect("writing to a string cannot fail");
        }
        for (index, queue) in self.targets.iter().enumerate() {
            write!(
                text,
                ", q{index} as (
                     insert into {table} (vt, message, headers)
                     select core.now(), b.body,
                            core.headers(b.event_id, b.event_version, s.subscription_id, s.handler, b.trace)
                     from b join core.subscriptions s
                         on s.namespace = $1 and s.event_type = b.event_type and s.queue_name = '{queue}'
                     order by b.event_id
                 )",
                table = table(queue)
            )
            .expect("writing to a string cannot fail");
        }
        write!(
            text,
            " select exists (select from v), coalesce({event_ids}, '{{}}'), {completed}, {conflict}",
            completed = if self.completes.is_some() {
                "array(select msg_id from d)"
            } else {
                "'{}'::bigint[]"
            },
        )
        .expect("writing to a string cannot fail");
        text
    }
}
