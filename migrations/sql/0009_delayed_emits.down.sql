-- Locks: ACCESS EXCLUSIVE on the delayed events. Nodes of this release may not be running.

-- The release before would never emit what waits here, and nobody would notice.
lock table core.delayed_emits in access exclusive mode;
do $$
declare
    waiting bigint;
begin
    select count(*) into waiting from core.delayed_emits;
    if waiting > 0 then
        raise exception '% delayed events are waiting, and going back would lose them', waiting
            using errcode = 'object_in_use',
                  hint = 'cancel them first: select core.cancel(event_id) from core.delayed_emits';
    end if;
end
$$;

drop function core.emit_due(text, integer, boolean);
drop function core.emit_delayed(text, bigint[]);
drop function core.cancel(bigint);

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
                    'producerNodeId', 'traceparent', 'tracestate', 'metadata');
    if unknown is not null then
        raise exception 'unknown option of core.emit: %', unknown
            using errcode = 'invalid_parameter_value',
                  hint = 'known are version, key, correlationId, causationId, idempotencyKey, producerNodeId, traceparent, tracestate, metadata';
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

    if p_options ->> 'idempotencyKey' is not null then
        insert into core.idempotency_keys as i (namespace, key, event_id, fingerprint, expires_at)
        values (p_namespace, p_options ->> 'idempotencyKey', id,
                core.event_fingerprint(p_event_type, coalesce(p_payload, 'null')), at + interval '24 hours')
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

drop function core.due_at(jsonb);
drop table core.delayed_emits;
