//! Appending to the log and enqueueing for every subscription, by one statement.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection, Row, SqlSafeStr};

use super::{delayed_emits, micros, queue::Within, table};
use crate::event::{Delay, Outgoing};

/// Which queues each event type goes to, as of one version of the namespace's subscriptions.
#[derive(Debug)]
pub(crate) struct Plan {
    version: i64,
    queues: HashMap<String, BTreeSet<String>>,
}

impl Plan {
    /// What a client starts with: its first emit loads the plan.
    pub(crate) fn never_in_force() -> Self {
        Self {
            version: -1,
            queues: HashMap::new(),
        }
    }

    /// The plan that is in force, or `None` if the namespace is not known.
    pub(crate) async fn load(
        connection: &mut PgConnection,
        namespace: &str,
        is_kept: bool,
    ) -> sqlx::Result<Option<Self>> {
        // One statement, so that version and subscriptions belong together.
        let rows = sqlx::query(
            "select n.subscriptions_version, s.event_type, s.queue_name
             from core.namespaces n
             left join core.subscriptions s on s.namespace = n.namespace
             where n.namespace = $1
             group by 1, 2, 3",
        )
        .persistent(is_kept)
        .bind(namespace)
        .fetch_all(connection)
        .await?;
        let Some(first) = rows.first() else {
            return Ok(None);
        };
        let mut plan = Self {
            version: first.get(0),
            queues: HashMap::new(),
        };
        for row in &rows {
            if let (Some(event_type), Some(queue)) = (
                row.get::<Option<String>, _>(1),
                row.get::<Option<String>, _>(2),
            ) {
                plan.queues.entry(event_type).or_default().insert(queue);
            }
        }
        Ok(Some(plan))
    }

    fn targets(&self, events: &[Outgoing]) -> BTreeSet<String> {
        let mut targets = BTreeSet::new();
        for event in events {
            // Such an event is not fanned out now. Whether a time has passed, only the database knows.
            if matches!(event.delay, Some(Delay::After(_))) {
                continue;
            }
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
    pub(crate) within: Within,
    pub(crate) msg_ids: &'a [i64],
    pub(crate) read_cts: &'a [i32],
}

/// Who emits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Emitter<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) producer: &'a str,
    /// Whether the prepared statement is kept in the session.
    pub(crate) is_kept: bool,
    pub(crate) idempotency_ms: i64,
}

/// What was stored.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    /// The id of each event in the order given. For an idempotency key that was used before, the
    /// id of the event it was used for.
    pub(crate) event_ids: Vec<i64>,
    /// The messages that were completed; one that is missing had lost its lease.
    pub(crate) completed: Vec<i64>,
    /// An idempotency key was used before for another event.
    pub(crate) conflict: Option<String>,
    /// The queues that may have got messages, and the [`delayed_emits::BELL`] if an event is due soon:
    /// what is rung after the commit.
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
    completes: Option<(String, Within)>,
    keyed: bool,
    delays: bool,
}

/// Appends `events` and enqueues them; completes messages in the same statement.
///
/// `source[i]` is the completion, counted from 1, whose handler returned event `i`: the event is stored only
/// if that one is made; with `None` if any is. The message alone would not do: two claims of one message by
/// one node can be completed together, and only what the newer one returned counts. `None` as a result means
/// that the plan is no longer in force and that nothing was stored.
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
        completes: completion.map(|completion| (completion.queue.to_owned(), completion.within)),
        keyed: events.iter().any(|event| event.idempotency_key.is_some()),
        delays: events.iter().any(|event| event.delay.is_some()),
    };
    let text = statements.text(&shape);
    let column = |get: fn(&Outgoing) -> Option<&str>| -> Vec<Option<&str>> {
        events.iter().map(get).collect()
    };
    let types: Vec<&str> = events
        .iter()
        .map(|event| event.event_type.as_str())
        .collect();
    let versions: Vec<i32> = events
        .iter()
        .map(|event| i32::try_from(event.event_version).unwrap_or(i32::MAX))
        .collect();
    let bodies: Vec<String> = events
        .iter()
        .map(|event| open_body(emitter, event))
        .collect();
    let mut query = sqlx::query(AssertSqlSafe(&*text).into_sql_str())
        .persistent(emitter.is_kept)
        .bind(emitter.namespace)
        .bind(plan.version)
        .bind(emitter.producer)
        .bind(types)
        .bind(versions)
        .bind(bodies)
        .bind(column(|event| event.key.as_deref()))
        .bind(column(|event| event.correlation_id.as_deref()))
        .bind(column(|event| event.causation_id.as_deref()))
        .bind(events.iter().map(trace).collect::<Vec<_>>());
    if let Some(completion) = completion {
        query = query
            .bind(source)
            .bind(completion.msg_ids)
            .bind(completion.read_cts);
    }
    if shape.keyed {
        query = query
            .bind(column(|event| event.idempotency_key.as_deref()))
            .bind(emitter.idempotency_ms);
    }
    if shape.delays {
        let after = |event: &Outgoing| match event.delay {
            Some(Delay::After(delay)) => Some(micros(delay)),
            _ => None,
        };
        let at = |event: &Outgoing| match event.delay {
            // Long past is past, and Postgres' calendar begins later than this one.
            Some(Delay::At(time)) => Some(time.as_microsecond().max(0)),
            _ => None,
        };
        query = query
            .bind(events.iter().map(after).collect::<Vec<_>>())
            .bind(events.iter().map(at).collect::<Vec<_>>());
    }
    let row = query.fetch_one(connection).await?;
    if !row.get::<bool, _>(0) {
        return Ok(None);
    }
    let mut queues = shape.targets;
    if events
        .iter()
        .any(|event| event.is_delayed_less_than(delayed_emits::NOTICED_WITHIN))
    {
        queues.insert(delayed_emits::BELL.to_owned());
    }
    Ok(Some(Stored {
        event_ids: row.get(1),
        completed: row.get(2),
        conflict: row.get(3),
        queues,
    }))
}

/// The body of the message as JSON text, as `core.envelope` makes it, but for its end: the time of the emit, and
/// the id of the event where that is its correlation id, are the server's to add. One text, because parsing
/// JSON takes the server less than half the time of building it field by field.
fn open_body(emitter: Emitter<'_>, event: &Outgoing) -> String {
    let mut body = String::with_capacity(event.payload.len() + 256);
    let mut field = |name: &str, json: &dyn std::fmt::Display| {
        body.push(if body.is_empty() { '{' } else { ',' });
        // Writing to a string does not fail.
        let _ = write!(body, "\"{name}\":{json}");
    };
    let text = |text: &str| Value::from(text);
    field("namespace", &text(emitter.namespace));
    field("eventType", &text(&event.event_type));
    field("payload", &event.payload);
    field("producerNodeId", &text(emitter.producer));
    field("eventVersion", &event.event_version);
    let optional = [
        ("key", &event.key),
        ("correlationId", &event.correlation_id),
        ("causationId", &event.causation_id),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            field(name, &text(value));
        }
    }
    body
}

/// The trace context as fields of a JSON object, with a comma before each.
fn trace(event: &Outgoing) -> Option<String> {
    let text = |text: &str| Value::from(text);
    let traceparent = text(event.traceparent.as_deref()?);
    let mut fields = format!(",\"traceparent\":{traceparent}");
    if let Some(tracestate) = &event.tracestate {
        // Writing to a string does not fail.
        let _ = write!(fields, ",\"tracestate\":{}", text(tracestate));
    }
    Some(fields)
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
    /// One statement of steps: each is a CTE named for what it does.
    ///
    /// `v` is empty unless the plan is in force, and everything after it depends on it. `d` deletes
    /// completed messages, `e` draws the ids of the events and completes their bodies, `k` claims idempotency
    /// keys, `w` stores the events that wait to be due, `b` are the others, `l` appends them to the log, and
    /// one `q…` for each queue enqueues them.
    fn statement(&self) -> String {
        let parameters = self.parameters();
        let mut steps = vec![
            "v as materialized (
                 select from core.namespaces where namespace = $1 and subscriptions_version = $2
             )"
            .to_owned(),
        ];
        steps.extend(
            self.completes
                .as_ref()
                .map(|(queue, within)| complete_step(queue, *within, &parameters)),
        );
        steps.push(self.events_step(&parameters));
        if self.keyed {
            steps.push(keys_step(&parameters, self.delays));
        }
        // An event whose key was used before is not stored again.
        let new_events = if self.keyed {
            "e left join k on k.key = e.idempotency_key where (k.event_id is null or k.event_id = e.event_id)"
        } else {
            "e where true"
        };
        if self.delays {
            steps.push(wait_step(new_events, self.keyed));
        }
        let due_events = if self.keyed || self.delays {
            let is_due = if self.delays {
                "and e.due_at is null"
            } else {
                ""
            };
            steps.push(format!(
                "b as materialized (select e.* from {new_events} {is_due})"
            ));
            "b"
        } else {
            "e"
        };
        steps.push(log_step(due_events));
        steps.extend(
            self.targets
                .iter()
                .enumerate()
                .map(|(index, queue)| queue_step(index, queue, due_events)),
        );

        let (event_ids, conflict) = if self.keyed {
            (
                "(select array_agg(coalesce(k.event_id, e.event_id) order by e.n)
                  from e left join k on k.key = e.idempotency_key)",
                "(select min(k.key) from e join k on k.key = e.idempotency_key
                  where k.fingerprint <> core.event_fingerprint(e.event_type, e.body -> 'payload'))",
            )
        } else {
            (
                "(select array_agg(e.event_id order by e.n) from e)",
                "null::text",
            )
        };
        let completed = if self.completes.is_some() {
            "array(select msg_id from d)"
        } else {
            "'{}'::bigint[]"
        };
        format!(
            "with {} select exists (select from v), coalesce({event_ids}, '{{}}'), {completed}, {conflict}",
            steps.join(", ")
        )
    }

    /// Parameters 1 to 10 are always there; what follows depends on the shape, in the order in which
    /// [`emit`] binds it.
    fn parameters(&self) -> Parameters {
        let mut next = 11;
        let mut parameter = || {
            next += 1;
            format!("${}", next - 1)
        };
        let mut parameters = Parameters::default();
        if self.completes.is_some() {
            parameters.source = parameter();
            parameters.msg_ids = parameter();
            parameters.read_cts = parameter();
        }
        if self.keyed {
            parameters.keys = parameter();
            parameters.period = parameter();
        }
        if self.delays {
            parameters.after = parameter();
            parameters.at = parameter();
        }
        parameters
    }

    fn events_step(&self, parameters: &Parameters) -> String {
        let (mut arrays, mut columns, mut only_completed) = (String::new(), String::new(), "");
        let mut due_at = "";
        if self.completes.is_some() {
            arrays = format!(", {}::bigint[]", parameters.source);
            columns.push_str(", source");
            only_completed = "and case when e.source is null then exists (select from d)
                                        else e.source in (select n from d) end";
        }
        if self.keyed {
            arrays = format!("{arrays}, {}::text[]", parameters.keys);
            columns.push_str(", idempotency_key");
        }
        if self.delays {
            let Parameters { after, at, .. } = parameters;
            arrays = format!("{arrays}, {after}::bigint[], {at}::bigint[]");
            columns.push_str(", after_us, at_us");
            // Null for an event that is due by now.
            due_at = "nullif(greatest(core.now(),
                                 core.now() + e.after_us * interval '1 microsecond',
                                 timestamptz 'epoch' + e.at_us * interval '1 microsecond'),
                        core.now()) as due_at,";
        }
        // The time is the same for all, and written once.
        format!(
            "e as materialized (
                 select d.*, (d.open_body || (select ',\"emittedAt\":\"' || core.iso_time(core.now()) || '\"')
                              || case when d.correlation_id is null
                                      then ',\"correlationId\":\"' || d.event_id || '\"}}' else '}}' end)::jsonb as body
                 from (
                     select nextval('core.event_log_event_id_seq') as event_id, {due_at} e.*
                     from unnest($4::text[], $5::int[], $6::text[], $7::text[], $8::text[], $9::text[],
                                 $10::text[]{arrays}) with ordinality
                         as e (event_type, event_version, open_body, key, correlation_id, causation_id,
                               trace{columns}, n)
                     where exists (select from v) {only_completed}
                 ) d
             )"
        )
    }
}

/// The parameters that not every statement has; empty where they are not used.
#[derive(Debug, Default)]
struct Parameters {
    source: String,
    msg_ids: String,
    read_cts: String,
    keys: String,
    period: String,
    after: String,
    at: String,
}

fn complete_step(
    queue: &str,
    within: Within,
    Parameters {
        msg_ids, read_cts, ..
    }: &Parameters,
) -> String {
    format!(
        "d as (
             delete from {table} q
             using unnest({msg_ids}::bigint[], {read_cts}::int[]) with ordinality as c (msg_id, read_ct, n)
             where q.msg_id = c.msg_id and q.read_ct = c.read_ct and exists (select from v) {condition}
             returning q.msg_id, c.n
         )",
        table = table(queue),
        condition = within.condition()
    )
}

/// The id was drawn before, so a row that comes back with it is new. `do nothing` would return no id
/// for a key that another transaction has just used. Of several events with one key the first is
/// stored. Keys are taken in order of their bytes, so that two statements never wait for each other. A
/// delayed event keeps its key until the period after it is due.
fn keys_step(Parameters { period, .. }: &Parameters, delays: bool) -> String {
    let from = if delays {
        "coalesce(e.due_at, core.now())"
    } else {
        "core.now()"
    };
    format!(
        "k as (
             insert into core.idempotency_keys as i (namespace, key, event_id, fingerprint, expires_at)
             select distinct on (e.idempotency_key collate \"C\")
                    $1, e.idempotency_key, e.event_id, core.event_fingerprint(e.event_type, e.body -> 'payload'),
                    {from} + {period}::bigint * interval '1 millisecond'
             from e where e.idempotency_key is not null
             order by e.idempotency_key collate \"C\", e.n
             on conflict (namespace, key) do update set
                 event_id = case when i.expires_at <= core.now() then excluded.event_id else i.event_id end,
                 fingerprint = case when i.expires_at <= core.now() then excluded.fingerprint else i.fingerprint end,
                 expires_at = case when i.expires_at <= core.now() then excluded.expires_at else i.expires_at end
             returning i.key, i.event_id, i.fingerprint
         )"
    )
}

/// The trace context of event `e` as an object; {} without one.
const TRACE: &str =
    "case when e.trace is null then '{}'::jsonb else ('{' || substr(e.trace, 2) || '}')::jsonb end";

fn wait_step(new_events: &str, keyed: bool) -> String {
    let idempotency_key = if keyed { "e.idempotency_key" } else { "null" };
    format!(
        "w as (
             insert into core.delayed_emits
                 (event_id, namespace, event_type, payload, due_at, next_try_at, producer_node_id, metadata,
                  event_version, key, correlation_id, causation_id, idempotency_key)
             select e.event_id, $1, e.event_type, e.body -> 'payload', e.due_at, e.due_at, $3, {TRACE},
                    e.event_version, e.key, coalesce(e.correlation_id, e.event_id::text), e.causation_id,
                    {idempotency_key}
             from {new_events} and e.due_at is not null
         )"
    )
}

fn log_step(events: &str) -> String {
    format!(
        "l as (
             insert into core.event_log
                 (event_id, namespace, event_type, payload, emitted_at, producer_node_id, metadata,
                  event_version, key, correlation_id, causation_id, subscriptions_version)
             select e.event_id, $1, e.event_type, e.body -> 'payload', core.now(), $3, {TRACE},
                    e.event_version, e.key, coalesce(e.correlation_id, e.event_id::text), e.causation_id, $2
             from {events} e
         )"
    )
}

/// The headers as `core.headers` makes them; what an event does not change of them is written once for each
/// subscription.
fn queue_step(index: usize, queue: &str, events: &str) -> String {
    format!(
        "q{index} as (
             insert into {table} (vt, message, headers)
             select core.now(), e.body,
                    ('{{\"eventId\":' || e.event_id || ',\"eventVersion\":' || e.event_version
                        || coalesce(e.trace, '') || s.others)::jsonb
             from {events} e join (
                 select event_type, other_versions,
                        ',\"subscription\":' || subscription_id || ',\"handler\":' || to_json(handler) || '}}' as others
                 from core.subscriptions
                 where namespace = $1 and queue_name = '{literal}'
                 offset 0
             ) s on s.event_type = e.event_type
                 -- Versions that other handlers of the group take.
                 and e.event_version <> all (s.other_versions)
             order by e.event_id
         )",
        table = table(queue),
        literal = queue.replace('\'', "''")
    )
}

#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use crate::testing::TestDatabase;

    /// A node whose connection was silent for a while claims a message again that it has handled and not
    /// completed yet. Both completions then wait, and may be sent together.
    #[tokio::test]
    async fn of_two_claims_completed_together_only_the_newer_one_emits() {
        let database = TestDatabase::new().await;
        let mut connection = database.pool().await.acquire().await.unwrap();
        for statement in [
            "select core.ensure_group('demo', 'default')",
            "select pgmq.send('core_events_demo', '{}'::jsonb, '{}'::jsonb, 0)",
            "update pgmq.q_core_events_demo set read_ct = 2",
        ] {
            sqlx::query(statement)
                .execute(&mut *connection)
                .await
                .unwrap();
        }
        let msg_id: i64 = sqlx::query_scalar("select msg_id from pgmq.q_core_events_demo")
            .fetch_one(&mut *connection)
            .await
            .unwrap();
        let plan = Plan::load(&mut connection, "demo", true)
            .await
            .unwrap()
            .unwrap();
        let emitter = Emitter {
            namespace: "demo",
            producer: "test",
            idempotency_ms: 1_000,
            is_kept: true,
        };
        let returned = |by: &str| Outgoing {
            event_type: "fact.told".to_owned(),
            event_version: 1,
            payload: format!("{{\"by\": \"{by}\"}}"),
            key: None,
            idempotency_key: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            delay: None,
        };
        let completion = Completion {
            within: Within::Statement,
            queue: "core_events_demo",
            msg_ids: &[msg_id, msg_id],
            read_cts: &[1, 2],
        };
        let stored = emit(
            &mut connection,
            &Statements::default(),
            &plan,
            emitter,
            &[returned("the older"), returned("the newer")],
            Some(completion),
            &[Some(1), Some(2)],
        )
        .await
        .unwrap()
        .unwrap();
        assert_eq!(stored.completed, [msg_id]);
        let told: Vec<String> = sqlx::query_scalar("select payload ->> 'by' from core.event_log")
            .fetch_all(&mut *connection)
            .await
            .unwrap();
        assert_eq!(told, ["the newer"]);
    }
}
