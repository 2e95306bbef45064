//! Appending to the log and enqueueing for every subscription, by one statement.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, PgConnection, Postgres, Row, SqlSafeStr, postgres::PgArguments};

use super::{JsonText, delayed_emits, micros, queue::Within, table};
use crate::event::{Delay, Outgoing};

/// Who gets the events of each type, as of one version of the namespace's subscriptions: whatever changes one
/// of them changes the version, too.
#[derive(Debug)]
pub(crate) struct Plan {
    version: i64,
    subscriptions: HashMap<String, Vec<Subscription>>,
}

#[derive(Debug)]
struct Subscription {
    id: i64,
    handler: String,
    queue: String,
    /// Versions that other handlers of the group take.
    other_versions: Vec<i32>,
}

impl Plan {
    /// What a client starts with: its first emit loads the plan.
    pub(crate) fn never_in_force() -> Self {
        Self {
            version: -1,
            subscriptions: HashMap::new(),
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
            "select n.subscriptions_version, s.event_type, s.subscription_id, s.handler, s.queue_name,
                    s.other_versions
             from core.namespaces n
             left join core.subscriptions s on s.namespace = n.namespace
             where n.namespace = $1
             order by s.subscription_id",
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
            subscriptions: HashMap::new(),
        };
        for row in &rows {
            let Some(event_type) = row.get::<Option<String>, _>(1) else {
                continue;
            };
            let subscription = Subscription {
                id: row.get(2),
                handler: row.get(3),
                queue: row.get(4),
                other_versions: row.get(5),
            };
            plan.subscriptions
                .entry(event_type)
                .or_default()
                .push(subscription);
        }
        Ok(Some(plan))
    }

    /// What each queue gets of these events.
    fn deliveries(&self, events: &[Outgoing], rows: Rows) -> BTreeMap<&str, Vec<Delivery<'_>>> {
        let mut deliveries: BTreeMap<&str, Vec<Delivery<'_>>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for event in events {
            let event_version = version(event);
            // Such an event is not fanned out now. Whether a time has passed, only the database knows.
            if matches!(event.delay, Some(Delay::After(_)))
                || !seen.insert((&event.event_type, event_version))
            {
                continue;
            }
            let Some((event_type, subscriptions)) =
                self.subscriptions.get_key_value(&event.event_type)
            else {
                continue;
            };
            for subscription in subscriptions {
                if subscription.other_versions.contains(&event_version) {
                    continue;
                }
                let mut headers = json!({
                    "eventId": 0,
                    "eventVersion": event.event_version,
                    "subscription": subscription.id,
                    "handler": subscription.handler,
                });
                if rows != Rows::Mixed {
                    add_trace(&mut headers, event);
                }
                let delivery = Delivery {
                    event_type,
                    event_version,
                    headers: headers.to_string(),
                };
                deliveries
                    .entry(&subscription.queue)
                    .or_default()
                    .push(delivery);
            }
        }
        deliveries
    }
}

/// A message to be, of each event of this type and version.
#[derive(Debug)]
struct Delivery<'a> {
    event_type: &'a str,
    event_version: i32,
    /// As `core.headers` makes them. The id is the server's to set; the trace as well if it differs.
    headers: String,
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
    rows: Rows,
    /// The queues, and whether one event makes several messages there.
    targets: Vec<(String, bool)>,
    completes: Option<(String, Within)>,
    keyed: bool,
    delays: bool,
}

/// What the events have in common. That is one parameter then: an array costs the server a table of its own,
/// and events of several types have to be joined with their subscriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Rows {
    /// It is one event: nothing is an array.
    One,
    /// Type, version, correlation, causation and trace.
    Alike,
    /// Nothing, or it was not worth a look.
    Mixed,
}

impl Rows {
    fn of(events: &[Outgoing]) -> Self {
        let [first, others @ ..] = events else {
            return Self::Mixed;
        };
        let is_alike = |event: &Outgoing| {
            event.event_type == first.event_type
                && event.event_version == first.event_version
                && event.correlation_id == first.correlation_id
                && event.causation_id == first.causation_id
                && event.traceparent == first.traceparent
                && event.tracestate == first.tracestate
        };
        match others {
            [] => Self::One,
            _ if others.iter().all(is_alike) => Self::Alike,
            _ => Self::Mixed,
        }
    }

    /// Whether a column is an array; `is_shared` says that it is one of those that [`Rows::Alike`] names.
    fn has_array(self, is_shared: bool) -> bool {
        match self {
            Self::One => false,
            Self::Alike => !is_shared,
            Self::Mixed => true,
        }
    }
}

type Query<'q> = sqlx::query::Query<'q, Postgres, PgArguments>;

/// Binds a column: all values, or the one that is the value of all.
fn bind<'q, T>(query: Query<'q>, is_array: bool, values: Vec<T>) -> Query<'q>
where
    T: sqlx::Encode<'q, Postgres> + sqlx::Type<Postgres> + sqlx::postgres::PgHasArrayType + 'q,
{
    if is_array {
        query.bind(values)
    } else {
        query.bind(values.into_iter().next())
    }
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
    let rows = Rows::of(events);
    let deliveries = plan.deliveries(events, rows);
    let shape = Shape {
        rows,
        targets: deliveries
            .iter()
            .map(|(&queue, of_queue)| (queue.to_owned(), rows == Rows::Mixed || of_queue.len() > 1))
            .collect(),
        completes: completion.map(|completion| (completion.queue.to_owned(), completion.within)),
        keyed: events.iter().any(|event| event.idempotency_key.is_some()),
        delays: events.iter().any(|event| event.delay.is_some()),
    };
    let text = statements.text(&shape);
    let (shared, own) = (rows.has_array(true), rows.has_array(false));
    let of_all = &events[..if shared { events.len() } else { 1 }];
    let traces: Vec<String> = of_all.iter().map(trace).collect();
    let envelope = envelope(emitter, events.first());
    let mut query = sqlx::query(AssertSqlSafe(&*text).into_sql_str())
        .persistent(emitter.is_kept)
        .bind(emitter.namespace)
        .bind(plan.version)
        .bind(emitter.producer);
    let texts = |get: fn(&Outgoing) -> Option<&str>| -> Vec<Option<&str>> {
        events.iter().map(get).collect()
    };
    let types = of_all
        .iter()
        .map(|event| event.event_type.as_str())
        .collect::<Vec<_>>();
    query = bind(query, shared, types);
    query = bind(query, shared, of_all.iter().map(version).collect());
    query = bind(
        query,
        shared,
        texts(|event| event.correlation_id.as_deref()),
    );
    query = bind(query, shared, texts(|event| event.causation_id.as_deref()));
    query = bind(
        query,
        shared,
        traces.iter().map(|trace| JsonText(trace)).collect(),
    );
    query = bind(
        query,
        own,
        events
            .iter()
            .map(|event| JsonText(&event.payload))
            .collect(),
    );
    query = bind(query, own, texts(|event| event.key.as_deref()));
    if let Some(completion) = completion {
        query = bind(query, own, source.to_vec())
            .bind(completion.msg_ids)
            .bind(completion.read_cts);
    }
    if shape.keyed {
        query = bind(query, own, texts(|event| event.idempotency_key.as_deref()))
            .bind(emitter.idempotency_ms);
    }
    if shape.delays {
        query = bind_delays(query, own, events);
    }
    query = bind_deliveries(query, &shape, &envelope, &deliveries);
    let row = query.fetch_one(connection).await?;
    let event_ids: Vec<i64> = row.get(0);
    // An event may be left out because nothing was completed; if all are, the plan says why.
    let is_in_force = row
        .get::<Option<bool>, _>(3)
        .unwrap_or(!event_ids.is_empty());
    if !is_in_force {
        return Ok(None);
    }
    let mut queues: BTreeSet<String> = deliveries.keys().map(|&queue| queue.to_owned()).collect();
    if events
        .iter()
        .any(|event| event.is_delayed_less_than(delayed_emits::NOTICED_WITHIN))
    {
        queues.insert(delayed_emits::BELL.to_owned());
    }
    Ok(Some(Stored {
        event_ids,
        completed: row.get(1),
        conflict: row.get(2),
        queues,
    }))
}

fn bind_delays<'q>(query: Query<'q>, is_array: bool, events: &[Outgoing]) -> Query<'q> {
    let after = |event: &Outgoing| match event.delay {
        Some(Delay::After(delay)) => Some(micros(delay)),
        _ => None,
    };
    let at = |event: &Outgoing| match event.delay {
        // Long past is past, and Postgres' calendar begins later than this one.
        Some(Delay::At(time)) => Some(time.as_microsecond().max(0)),
        _ => None,
    };
    let query = bind(query, is_array, events.iter().map(after).collect());
    bind(query, is_array, events.iter().map(at).collect())
}

fn bind_deliveries<'q>(
    mut query: Query<'q>,
    shape: &Shape,
    envelope: &'q str,
    deliveries: &'q BTreeMap<&str, Vec<Delivery<'_>>>,
) -> Query<'q> {
    let is_mixed = shape.rows == Rows::Mixed;
    if !is_mixed && !shape.targets.is_empty() {
        query = query.bind(JsonText(envelope));
    }
    for ((_, is_array), of_queue) in shape.targets.iter().zip(deliveries.values()) {
        let headers = of_queue.iter().map(|delivery| JsonText(&delivery.headers));
        query = bind(query, *is_array, headers.collect());
        if is_mixed {
            let types = of_queue.iter().map(|delivery| delivery.event_type);
            let versions = of_queue.iter().map(|delivery| delivery.event_version);
            query = query
                .bind(types.collect::<Vec<_>>())
                .bind(versions.collect::<Vec<_>>());
        }
    }
    query
}

fn version(event: &Outgoing) -> i32 {
    i32::try_from(event.event_version).unwrap_or(i32::MAX)
}

/// What the bodies of events that are alike share, as `core.envelope` has it. What they do not is added by the
/// server, as is the time.
fn envelope(emitter: Emitter<'_>, first: Option<&Outgoing>) -> String {
    let mut fields = json!({ "namespace": emitter.namespace, "producerNodeId": emitter.producer });
    if let Some(event) = first {
        fields["eventType"] = json!(event.event_type);
        fields["eventVersion"] = json!(event.event_version);
        if let Some(causation_id) = &event.causation_id {
            fields["causationId"] = json!(causation_id);
        }
    }
    fields.to_string()
}

/// The trace context as an object; {} without one.
fn trace(event: &Outgoing) -> String {
    let mut fields = json!({});
    add_trace(&mut fields, event);
    fields.to_string()
}

fn add_trace(fields: &mut Value, event: &Outgoing) {
    if let Some(traceparent) = &event.traceparent {
        fields["traceparent"] = json!(traceparent);
        if let Some(tracestate) = &event.tracestate {
            fields["tracestate"] = json!(tracestate);
        }
    }
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

/// Whether the plan is in force. Everything the statement does depends on it.
const IN_FORCE: &str =
    "exists (select from core.namespaces where namespace = $1 and subscriptions_version = $2)";

impl Shape {
    /// One statement of steps: each is a CTE named for what it does.
    ///
    /// `d` deletes completed messages. `e` draws the ids of the events, `k` claims idempotency keys, `w` stores
    /// the events that wait to be due, and `b` are the others: without keys and delays these four are left out.
    /// `l` appends to the log; of what it returns, `m` makes the bodies of the messages, and one `q…` for each
    /// queue enqueues them. To set a step up takes the server as long as an insert, so there are no more than
    /// needed.
    fn statement(&self) -> String {
        let parameters = self.parameters();
        let mut steps: Vec<String> = self
            .completes
            .iter()
            .map(|(queue, within)| complete_step(queue, *within, &parameters))
            .collect();
        let mut events = self.events(&parameters);
        if self.keyed || self.delays {
            steps.push(format!("e as materialized ({events})"));
            let Parameters {
                idempotency_key, ..
            } = &parameters;
            // An event whose key was used before is not stored again.
            let new_events = if self.keyed {
                steps.push(keys_step(&parameters, self.delays));
                format!(
                    "e left join k on k.key = {idempotency_key} where (k.event_id is null or k.event_id = e.event_id)"
                )
            } else {
                "e where true".to_owned()
            };
            if self.delays {
                steps.push(wait_step(&parameters, &new_events, self.keyed));
            }
            let is_due = if self.delays {
                "and e.due_at is null"
            } else {
                ""
            };
            events = format!("select e.* from {new_events} {is_due}");
        }
        steps.push(self.log_step(&parameters, &events));
        // The bodies are made once.
        let is_single = matches!(&self.targets[..], [(_, false)]);
        if !self.targets.is_empty() && !is_single {
            steps.push(format!(
                "m as materialized (select l.*, {} as body from l)",
                self.body(&parameters)
            ));
        }
        steps.extend(
            self.targets
                .iter()
                .enumerate()
                .map(|(index, (queue, _))| self.queue_step(&parameters, index, queue, is_single)),
        );

        // Ids are drawn, and rows stored, in the order of the events.
        let (mut event_ids, mut conflict) =
            ("select event_id from l".to_owned(), "null::text".to_owned());
        if self.keyed {
            let Parameters {
                idempotency_key,
                event_type,
                payload,
                ..
            } = &parameters;
            event_ids = format!(
                "select coalesce(k.event_id, e.event_id) from e left join k on k.key = {idempotency_key} order by e.n"
            );
            conflict = format!(
                "(select min(k.key) from e join k on k.key = {idempotency_key}
                  where k.fingerprint <> core.event_fingerprint({event_type}, {payload}))"
            );
        } else if self.delays {
            "select event_id from e order by n".clone_into(&mut event_ids);
        }
        let (completed, is_in_force) = if self.completes.is_some() {
            ("array(select msg_id from d)", IN_FORCE)
        } else {
            ("'{}'::bigint[]", "null::bool")
        };
        format!(
            "with {} select array({event_ids}), {completed}, {conflict}, {is_in_force}",
            steps.join(", ")
        )
    }

    /// In the order in which [`emit`] binds them.
    fn parameters(&self) -> Parameters {
        // The first three are always there: namespace, version of the plan, producer.
        let (last, mut arrays) = (Cell::new(3), Vec::new());
        let scalar = |of: &str| {
            last.set(last.get() + 1);
            format!("${}::{of}", last.get())
        };
        let mut column = |name: &'static str, of: &str, is_shared| {
            if self.rows.has_array(is_shared) {
                arrays.push((scalar(&format!("{of}[]")), name));
                format!("e.{name}")
            } else {
                scalar(of)
            }
        };
        let mut parameters = Parameters {
            event_type: column("event_type", "text", true),
            event_version: column("event_version", "int", true),
            correlation_id: column("correlation_id", "text", true),
            causation_id: column("causation_id", "text", true),
            trace: column("trace", "jsonb", true),
            payload: column("payload", "jsonb", false),
            key: column("key", "text", false),
            ..Parameters::default()
        };
        if self.completes.is_some() {
            parameters.source = column("source", "bigint", false);
            (parameters.msg_ids, parameters.read_cts) = (scalar("bigint[]"), scalar("int[]"));
        }
        if self.keyed {
            parameters.idempotency_key = column("idempotency_key", "text", false);
            parameters.period = scalar("bigint");
        }
        if self.delays {
            parameters.after = column("after_us", "bigint", false);
            parameters.at = column("at_us", "bigint", false);
        }
        if self.rows != Rows::Mixed && !self.targets.is_empty() {
            parameters.envelope = scalar("jsonb");
        }
        parameters.deliveries = self
            .targets
            .iter()
            .map(|(_, is_array)| {
                if self.rows == Rows::Mixed {
                    [scalar("jsonb[]"), scalar("text[]"), scalar("int[]")].join(", ")
                } else {
                    scalar(if *is_array { "jsonb[]" } else { "jsonb" })
                }
            })
            .collect();
        parameters.arrays = arrays;
        parameters
    }

    /// The events that are to be stored, with the ids that they get.
    fn events(&self, parameters: &Parameters) -> String {
        let Parameters {
            source,
            arrays,
            after,
            at,
            ..
        } = parameters;
        let rows = if arrays.is_empty() {
            "(select 1::bigint as n)".to_owned()
        } else {
            let (values, names): (Vec<&str>, Vec<&str>) = arrays
                .iter()
                .map(|(parameter, name)| (parameter.as_str(), *name))
                .unzip();
            format!(
                "unnest({}) with ordinality as e ({}, n)",
                values.join(", "),
                names.join(", ")
            )
        };
        let alias = if arrays.is_empty() { "e" } else { "" };
        let mut due_at = String::new();
        if self.delays {
            // Null for an event that is due by now.
            due_at = format!(
                "nullif(greatest(core.now(),
                            core.now() + {after} * interval '1 microsecond',
                            timestamptz 'epoch' + {at} * interval '1 microsecond'),
                        core.now()) as due_at,"
            );
        }
        // Nothing is completed under a plan that is not in force.
        let condition = if self.completes.is_some() {
            format!(
                "case when {source} is null then exists (select from d) else {source} in (select n from d) end"
            )
        } else {
            IN_FORCE.to_owned()
        };
        format!(
            "select nextval('core.event_log_event_id_seq') as event_id, {due_at} e.* from {rows} {alias} where {condition}"
        )
    }

    fn log_step(&self, parameters: &Parameters, events: &str) -> String {
        let Parameters {
            event_type,
            event_version,
            key,
            correlation_id,
            causation_id,
            trace,
            payload,
            ..
        } = parameters;
        let returned = match (self.targets.is_empty(), self.rows) {
            (true, _) => "event_id",
            (false, Rows::Mixed) => {
                "event_id, event_type, event_version, payload, key, correlation_id, causation_id, metadata"
            }
            (false, _) => "event_id, payload, key, correlation_id",
        };
        format!(
            "l as (
                 insert into core.event_log
                     (event_id, namespace, event_type, payload, emitted_at, producer_node_id, metadata,
                      event_version, key, correlation_id, causation_id, subscriptions_version)
                 select e.event_id, $1, {event_type}, {payload}, core.now(), $3, {trace},
                        {event_version}, {key}, coalesce({correlation_id}, e.event_id::text), {causation_id}, $2
                 from ({events}) e
                 returning {returned}
             )"
        )
    }

    /// The body of the message of an event in `l`, as `core.envelope` makes it.
    fn body(&self, Parameters { envelope, .. }: &Parameters) -> String {
        if self.rows == Rows::Mixed {
            return "core.envelope($1, l.event_type, l.payload, core.now(), $3, l.event_version, l.key,
                                  l.correlation_id, l.causation_id)"
                .to_owned();
        }
        // What is the same for all is made once. To set a field takes half as long as to make an object of it and to
        // join that, and the payload, which is copied each time, comes last.
        format!(
            "jsonb_set(
                 jsonb_set((select {envelope} || jsonb_build_object('emittedAt', core.iso_time(core.now()))),
                           '{{correlationId}}', to_jsonb(l.correlation_id))
                     || case when l.key is null then '{{}}' else jsonb_build_object('key', l.key) end,
                 '{{payload}}', l.payload)"
        )
    }

    fn queue_step(
        &self,
        parameters: &Parameters,
        index: usize,
        queue: &str,
        is_single: bool,
    ) -> String {
        let (deliveries, table) = (&parameters.deliveries[index], table(queue));
        let is_array = self.targets[index].1;
        let messages = match self.rows {
            Rows::Mixed => format!(
                "select core.now(), m.body, s.headers || m.metadata || jsonb_build_object('eventId', m.event_id)
                 from m join unnest({deliveries}) as s (headers, event_type, event_version)
                     on s.event_type = m.event_type and s.event_version = m.event_version
                 order by m.event_id"
            ),
            _ if is_single => format!(
                "select core.now(), {}, jsonb_set({deliveries}, '{{eventId}}', to_jsonb(l.event_id)) from l",
                self.body(parameters)
            ),
            // In the order of the events without being sorted: they are gone through once for each handler.
            _ if is_array => format!(
                "select core.now(), m.body, jsonb_set(s.headers, '{{eventId}}', to_jsonb(m.event_id))
                 from unnest({deliveries}) as s (headers) cross join m"
            ),
            _ => format!(
                "select core.now(), m.body, jsonb_set({deliveries}, '{{eventId}}', to_jsonb(m.event_id)) from m"
            ),
        };
        format!("q{index} as (insert into {table} (vt, message, headers) {messages})")
    }
}

/// The parameters as they are referred to: `$4::text`, or `e.event_type` for a column of the events that is an
/// array. Empty where they are not used.
#[derive(Debug, Default)]
struct Parameters {
    event_type: String,
    event_version: String,
    correlation_id: String,
    causation_id: String,
    trace: String,
    payload: String,
    key: String,
    source: String,
    msg_ids: String,
    read_cts: String,
    idempotency_key: String,
    period: String,
    after: String,
    at: String,
    envelope: String,
    /// Those of each queue.
    deliveries: Vec<String>,
    /// The arrays, and the names of their columns.
    arrays: Vec<(String, &'static str)>,
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
             using unnest({msg_ids}, {read_cts}) with ordinality as c (msg_id, read_ct, n)
             where q.msg_id = c.msg_id and q.read_ct = c.read_ct and {IN_FORCE} {condition}
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
fn keys_step(
    Parameters {
        period,
        event_type,
        payload,
        idempotency_key,
        ..
    }: &Parameters,
    delays: bool,
) -> String {
    let from = if delays {
        "coalesce(e.due_at, core.now())"
    } else {
        "core.now()"
    };
    format!(
        "k as (
             insert into core.idempotency_keys as i (namespace, key, event_id, fingerprint, expires_at)
             select distinct on ({idempotency_key} collate \"C\")
                    $1, {idempotency_key}, e.event_id, core.event_fingerprint({event_type}, {payload}),
                    {from} + {period} * interval '1 millisecond'
             from e where {idempotency_key} is not null
             order by {idempotency_key} collate \"C\", e.n
             on conflict (namespace, key) do update set
                 event_id = case when i.expires_at <= core.now() then excluded.event_id else i.event_id end,
                 fingerprint = case when i.expires_at <= core.now() then excluded.fingerprint else i.fingerprint end,
                 expires_at = case when i.expires_at <= core.now() then excluded.expires_at else i.expires_at end
             returning i.key, i.event_id, i.fingerprint
         )"
    )
}

fn wait_step(parameters: &Parameters, new_events: &str, keyed: bool) -> String {
    let Parameters {
        event_type,
        event_version,
        key,
        correlation_id,
        causation_id,
        trace,
        payload,
        ..
    } = parameters;
    let idempotency_key = if keyed {
        &parameters.idempotency_key
    } else {
        "null"
    };
    format!(
        "w as (
             insert into core.delayed_emits
                 (event_id, namespace, event_type, payload, due_at, next_try_at, producer_node_id, metadata,
                  event_version, key, correlation_id, causation_id, idempotency_key)
             select e.event_id, $1, {event_type}, {payload}, e.due_at, e.due_at, $3, {trace},
                    {event_version}, {key}, coalesce({correlation_id}, e.event_id::text), {causation_id},
                    {idempotency_key}
             from {new_events} and e.due_at is not null
         )"
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

    /// The versions that the handlers of a group take are part of the plan.
    #[tokio::test]
    async fn a_plan_ends_when_a_handler_takes_another_version() {
        let database = TestDatabase::new().await;
        let mut connection = database.pool().await.acquire().await.unwrap();
        sqlx::query("select core.ensure_group('demo', 'shop')")
            .execute(&mut *connection)
            .await
            .unwrap();
        for (taken, is_another) in [(1, true), (1, false), (2, true), (2, false)] {
            let before = Plan::load(&mut connection, "demo", true)
                .await
                .unwrap()
                .unwrap();
            let handlers = json!([
                {"group": "shop", "handler": "first", "eventType": "order.paid", "eventVersion": 1},
                {"group": "shop", "handler": "second", "eventType": "order.paid", "eventVersion": taken},
            ]);
            sqlx::query("select core.subscribe('demo', 'shop', $1)")
                .bind(&handlers)
                .execute(&mut *connection)
                .await
                .unwrap();
            let after = Plan::load(&mut connection, "demo", true)
                .await
                .unwrap()
                .unwrap();
            assert_eq!(
                before.version != after.version,
                is_another,
                "version {taken}"
            );
        }
    }
}
