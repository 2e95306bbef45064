-- Delayed emits: an event that is emitted later, unless it is cancelled before.
--
-- It is stored whole, under the id that it will have in the log. When it is due, a node appends it
-- to the log and enqueues it for the subscriptions of that moment.
--
-- Locks: none that anybody could wait for; core.emit is replaced in place.
-- Workers of the previous release keep running. They emit nothing that is delayed: what is due waits
-- for the first node of this release.

create table core.delayed_emits (
    -- Drawn when the event was asked for.
    event_id bigint primary key,
    namespace text not null,
    event_type text not null,
    payload jsonb not null,
    due_at timestamptz not null check (isfinite(due_at)),
    requested_at timestamptz not null default core.now(),
    producer_node_id text not null,
    -- As the log will have it: trace context, and what the emitter gave.
    metadata jsonb not null default '{}',
    event_version integer not null default 1,
    key text,
    correlation_id text not null,
    causation_id text,
    -- The key that it holds in core.idempotency_keys, which cancelling releases.
    idempotency_key text,
    -- When a node takes it up: when it is due, and later if that failed.
    next_try_at timestamptz not null check (isfinite(next_try_at)),
    failures integer not null default 0,
    -- Why the last try failed.
    error text
);

create index delayed_emits_next_try on core.delayed_emits (namespace, next_try_at, event_id);

do $$
begin
    alter table core.delayed_emits alter column payload set compression lz4;
exception when feature_not_supported then
    null; -- a server that was built without lz4 keeps its default
end
$$;

-- When an event with these options of core.emit is due; null if it is not delayed. Apart from
-- core.emit, so that only delayed emits pay for the time zone, which is that of a time without one.
create function core.due_at(p_options jsonb) returns timestamptz
language plpgsql stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
declare
    option text;
    value jsonb;
    due timestamptz;
begin
    for option, value in
        select o.key, o.value from jsonb_each(p_options) o
        where o.key in ('after', 'at') and o.value <> 'null'
    loop
        if due is not null then
            raise exception 'options "after" and "at" of core.emit exclude each other'
                using errcode = 'invalid_parameter_value';
        end if;
        -- A bare number has no unit, and 'tomorrow' would be a time as well.
        if jsonb_typeof(value) <> 'string'
            or (option = 'after' and value #>> '{}' !~ '[a-zA-Z:]')
            or (option = 'at' and value #>> '{}' !~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}')
        then
            raise exception 'option "%" of core.emit is %', option, value
                using errcode = 'invalid_parameter_value',
                      hint = 'give "after" an interval such as "5 minutes", "at" a time such as "2030-01-31T12:00:00Z"';
        end if;
        due := case option when 'after' then core.now() + (value #>> '{}')::interval
                           else (value #>> '{}')::timestamptz end;
    end loop;
    if due > core.now() + interval '10 years' then
        raise exception 'an event cannot be delayed until %, ten years is the most', due
            using errcode = 'invalid_parameter_value';
    end if;
    return due;
end
$$;

-- Emits from SQL what Client::emit emits from Rust. Options: "version" (1), "key",
-- "correlationId", "causationId", "idempotencyKey" (for 24 hours from when it is due),
-- "producerNodeId" ("sql"), "traceparent", "tracestate", "metadata", and one of "after" (an interval)
-- and "at" (a time).
create or replace function core.emit(
    p_namespace text, p_event_type text, p_payload jsonb, p_options jsonb default '{}'
) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    id bigint := nextval('core.event_log_event_id_seq');
    at timestamptz := core.now();
    version integer;
    producer text := coalesce(p_options ->> 'producerNodeId', 'sql');
    correlation text := coalesce(p_options ->> 'correlationId', id::text);
    metadata jsonb := coalesce(nullif(p_options -> 'metadata', 'null'), '{}');
    trace jsonb := jsonb_strip_nulls(jsonb_build_object(
        'traceparent', p_options ->> 'traceparent', 'tracestate', p_options ->> 'tracestate'));
    unknown text;
    known core.idempotency_keys;
    due timestamptz;
    plan core.fan_out_plan := core.plan_fan_out(p_namespace, p_event_type);
begin
    if p_event_type is null or p_event_type = '' then
        raise exception 'an event needs an event type' using errcode = 'invalid_parameter_value';
    end if;
    if octet_length(p_event_type) > 100 then
        raise exception 'event type "%…" is longer than 100 bytes', left(p_event_type, 40)
            using errcode = 'invalid_parameter_value';
    end if;
    select string_agg(k, ', ') into unknown from jsonb_object_keys(p_options) k
    where k not in ('version', 'key', 'correlationId', 'causationId', 'idempotencyKey',
                    'producerNodeId', 'traceparent', 'tracestate', 'metadata', 'after', 'at');
    if unknown is not null then
        raise exception 'unknown option of core.emit: %', unknown
            using errcode = 'invalid_parameter_value',
                  hint = 'known are version, key, correlationId, causationId, idempotencyKey, producerNodeId, traceparent, tracestate, metadata, after, at';
    end if;
    version := coalesce((p_options ->> 'version')::integer, 1);
    if version < 1 then
        raise exception 'versions of events count from 1, found %', version
            using errcode = 'invalid_parameter_value';
    end if;
    -- Its "envelope" is where adoption keeps the fields of a foreign program's envelope.
    if jsonb_typeof(metadata) <> 'object' or metadata ? 'envelope' then
        raise exception 'option "metadata" of core.emit must be an object without "envelope", found %', metadata
            using errcode = 'invalid_parameter_value';
    end if;

    if plan.version is null then
        raise exception 'namespace "%" is not known', p_namespace
            using errcode = 'foreign_key_violation',
                  hint = format('start an app in it, or call core.ensure_group(%L, ''default'')', p_namespace);
    end if;
    if p_options ?| '{after,at}' then
        due := core.due_at(p_options);
    end if;

    if p_options ->> 'idempotencyKey' is not null then
        insert into core.idempotency_keys as i (namespace, key, event_id, fingerprint, expires_at)
        values (p_namespace, p_options ->> 'idempotencyKey', id,
                core.event_fingerprint(p_event_type, coalesce(p_payload, 'null')), greatest(at, due) + interval '24 hours')
        on conflict (namespace, key) do update
            set event_id = case when i.expires_at <= at then excluded.event_id else i.event_id end,
                fingerprint = case when i.expires_at <= at then excluded.fingerprint else i.fingerprint end,
                expires_at = case when i.expires_at <= at then excluded.expires_at else i.expires_at end
        returning i.* into known;
        if known.fingerprint <> core.event_fingerprint(p_event_type, coalesce(p_payload, 'null')) then
            raise exception 'idempotency key "%" was used for another event (id %)', known.key, known.event_id
                using errcode = 'unique_violation';
        end if;
        if known.event_id <> id then
            return known.event_id;
        end if;
    end if;

    if due > at then
        insert into core.delayed_emits
            (event_id, namespace, event_type, payload, due_at, next_try_at, producer_node_id, metadata,
             event_version, key, correlation_id, causation_id, idempotency_key)
        values (id, p_namespace, p_event_type, coalesce(p_payload, 'null'), due, due, producer,
                metadata || trace, version, p_options ->> 'key', correlation,
                p_options ->> 'causationId', p_options ->> 'idempotencyKey');
        return id;
    end if;

    insert into core.event_log
        (event_id, namespace, event_type, payload, emitted_at, producer_node_id, metadata,
         event_version, key, correlation_id, causation_id, subscriptions_version)
    values (id, p_namespace, p_event_type, coalesce(p_payload, 'null'), at, producer,
            metadata || trace,
            version, p_options ->> 'key', correlation, p_options ->> 'causationId', plan.version);

    perform core.fan_out(plan.targets, id, version,
        core.envelope(p_namespace, p_event_type, coalesce(p_payload, 'null'), at, producer, version,
                      p_options ->> 'key', correlation, p_options ->> 'causationId'),
        trace);
    return id;
end
$$;

-- Cancels a delayed event: true if it was still waiting, so that it will never be. False if it has
-- been emitted, was cancelled before, or never was. It may be emitted anew under its idempotency key.
create function core.cancel(p_event_id bigint) returns boolean
language sql
begin atomic
    with cancelled as (
        delete from core.delayed_emits where event_id = p_event_id
        returning namespace, idempotency_key, event_id
    ), released as (
        delete from core.idempotency_keys i using cancelled c
        where (i.namespace, i.key, i.event_id) = (c.namespace, c.idempotency_key, c.event_id)
    )
    select exists (select from cancelled);
end;

-- Moves delayed events, which the caller has locked, to the log and into the queues of the
-- subscriptions of now; returns those queues.
create function core.emit_delayed(p_namespace text, p_event_ids bigint[]) returns text[]
language plpgsql
set search_path = pg_catalog, pg_temp
-- The statement has many steps, which look worth compiling and are not.
set jit = off
as $$
declare
    plan core.fan_out_plan;
    queues text[];
begin
    -- One statement, as in core.plan_fan_out, for many event types.
    select n.subscriptions_version, coalesce((
            select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name,
                                                'handler', s.handler, 'type', s.event_type))
            from core.subscriptions s
            where s.namespace = n.namespace
              and s.event_type in (select d.event_type from core.delayed_emits d
                                   where d.event_id = any (p_event_ids))), '[]')
    into plan.version, plan.targets
    from core.namespaces n
    where n.namespace = p_namespace;
    if plan.version is null then
        raise exception 'namespace "%" is not known', p_namespace using errcode = 'foreign_key_violation';
    end if;
    queues := array(select distinct t ->> 'queue' from jsonb_array_elements(plan.targets) t order by 1);

    execute
        'with d as materialized (
             delete from core.delayed_emits where event_id = any ($1)
             returning *, jsonb_strip_nulls(jsonb_build_object(
                 ''traceparent'', metadata -> ''traceparent'', ''tracestate'', metadata -> ''tracestate'')) as trace
         ), l as (
             insert into core.event_log
                 (event_id, namespace, event_type, payload, emitted_at, producer_node_id, metadata,
                  event_version, key, correlation_id, causation_id, subscriptions_version)
             select d.event_id, d.namespace, d.event_type, d.payload, core.now(), d.producer_node_id,
                    d.metadata || jsonb_build_object(''requestedAt'', core.iso_time(d.requested_at),
                                                     ''dueAt'', core.iso_time(d.due_at)),
                    d.event_version, d.key, d.correlation_id, d.causation_id, $3
             from d
         ), b as materialized (
             select d.event_id, d.event_type, d.event_version, d.due_at, d.trace,
                    core.envelope(d.namespace, d.event_type, d.payload, core.now(), d.producer_node_id,
                                  d.event_version, d.key, d.correlation_id, d.causation_id) as body
             from d
         ), t as materialized (
             select * from jsonb_to_recordset($2) as t (id bigint, queue text, handler text, type text)
         )'
        || coalesce((
            select string_agg(format(
                ', q%s as (
                     insert into pgmq.%I (vt, message, headers)
                     select core.now(), b.body, core.headers(b.event_id, b.event_version, t.id, t.handler, b.trace)
                     from b join t on t.type = b.event_type and t.queue = %L
                     order by b.due_at, b.event_id
                 )', q.n, 'q_' || q.queue, q.queue), '')
            from unnest(queues) with ordinality as q (queue, n)), '')
        || ' select'
    using p_event_ids, plan.targets, plan.version;
    return queues;
end
$$;

-- Emits delayed events that are due, at most `p_limit` and about 8 MB; those that another node has
-- locked are skipped. An event that cannot be emitted fails the whole call; unless `p_isolate`: then
-- what fails is split in halves until the event is alone, which is put off with the reason. Says also
-- when the next one is to be taken up: in microseconds, 0 or less if it is now, null if there is none.
create function core.emit_due(
    p_namespace text, p_limit integer, p_isolate boolean,
    out emitted integer, out queues text[], out failed bigint[], out errors text[], out next_in bigint
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    d record;
    ids bigint[] := '{}';
    bytes bigint := 0;
    -- Ranges of `ids` that are still to be emitted, the next one last.
    parts int4range[] := '{}';
    part int4range;
    middle integer;
begin
    emitted := 0; queues := '{}'; failed := '{}'; errors := '{}';
    for d in
        select event_id, pg_column_size(payload) as bytes from core.delayed_emits
        where namespace = p_namespace and next_try_at <= core.now()
        order by next_try_at, event_id limit p_limit for update skip locked
    loop
        ids := ids || d.event_id;
        bytes := bytes + d.bytes;
        exit when bytes > 8 * 1024 * 1024;
    end loop;

    if p_isolate and ids <> '{}' then
        parts := array[int4range(1, cardinality(ids) + 1)];
    elsif ids <> '{}' then
        queues := core.emit_delayed(p_namespace, ids);
        emitted := cardinality(ids);
    end if;
    while parts <> '{}' loop
        part := parts[cardinality(parts)];
        parts := trim_array(parts, 1);
        begin
            queues := queues || core.emit_delayed(p_namespace, ids[lower(part):upper(part) - 1]);
            emitted := emitted + upper(part) - lower(part);
        exception when others then
            -- What no event is to blame for fails the call: lost connections, deadlocks, missing
            -- resources, a shutdown, a server that only reads, somebody else's lock.
            if sqlstate ~ '^(08|40|53|57|58)' or sqlstate in ('25006', '55P03') then
                raise;
            end if;
            middle := (lower(part) + upper(part)) / 2;
            if middle > lower(part) then
                parts := parts || array[int4range(middle, upper(part)), int4range(lower(part), middle)];
            else
                update core.delayed_emits e
                set next_try_at = core.now() + least(interval '1 minute' * 2 ^ least(e.failures, 10), interval '1 hour'),
                    failures = e.failures + 1, error = sqlerrm
                where e.event_id = ids[middle];
                failed := failed || ids[middle];
                errors := errors || sqlerrm;
            end if;
        end;
    end loop;
    queues := array(select distinct q from unnest(queues) q);

    select (extract(epoch from min(next_try_at) - core.now()) * 1000000)::bigint into next_in
    from core.delayed_emits where namespace = p_namespace;
end
$$;
