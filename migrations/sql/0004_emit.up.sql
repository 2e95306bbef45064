-- Emitting from SQL, idempotency keys, adoption of what foreign programs send, dead letters.
--
-- Locks: none. Workers of a previous release: there is none.

create table core.idempotency_keys (
    namespace text not null,
    key text not null,
    event_id bigint not null,
    -- Of the event type and payload: another event under the same key is an error.
    fingerprint text not null,
    expires_at timestamptz not null,
    primary key (namespace, key)
);

create index idempotency_keys_expiry on core.idempotency_keys (expires_at);

create function core.event_fingerprint(p_event_type text, p_payload jsonb) returns text
language sql immutable parallel safe
return md5(p_event_type || ' ' || p_payload::text);

create function core.iso_time(p_at timestamptz) returns text
language sql stable strict parallel safe
return to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"');

-- An event as it travels: the body of a message. Optional fields are absent, not null.
create function core.envelope(
    p_namespace text, p_event_type text, p_payload jsonb, p_emitted_at timestamptz,
    p_producer_node_id text, p_event_version integer, p_key text,
    p_correlation_id text, p_causation_id text
) returns jsonb
language sql stable parallel safe
return jsonb_build_object(
        'namespace', p_namespace, 'eventType', p_event_type, 'payload', p_payload,
        'emittedAt', core.iso_time(p_emitted_at), 'producerNodeId', p_producer_node_id,
        'eventVersion', p_event_version, 'correlationId', p_correlation_id)
    || case when p_key is null then '{}' else jsonb_build_object('key', p_key) end
    || case when p_causation_id is null then '{}' else jsonb_build_object('causationId', p_causation_id) end;

-- The headers of one delivery. `p_trace` is {} or holds traceparent and tracestate.
create function core.headers(
    p_event_id bigint, p_event_version integer, p_subscription_id bigint, p_handler text, p_trace jsonb
) returns jsonb
language sql immutable parallel safe
return jsonb_build_object('eventId', p_event_id, 'eventVersion', p_event_version,
                          'subscription', p_subscription_id, 'handler', p_handler) || p_trace;

-- Which subscriptions an event goes to, and the version of that answer. Both are read by one
-- statement, so that the version noted in the log is the one that was delivered by.
create type core.fan_out_plan as (version bigint, targets jsonb);

create function core.plan_fan_out(p_namespace text, p_event_type text) returns core.fan_out_plan
language sql stable
begin atomic
    select n.subscriptions_version, coalesce((
        select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler))
        from core.subscriptions s
        where s.namespace = n.namespace and s.event_type = p_event_type), '[]')
    from core.namespaces n
    where n.namespace = p_namespace;
end;

-- Puts an event that is in the log into the queues of the planned subscriptions.
create function core.fan_out(
    p_targets jsonb, p_event_id bigint, p_event_version integer, p_body jsonb, p_trace jsonb default '{}'
) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    target record;
    sent integer := 0;
begin
    for target in select * from jsonb_to_recordset(p_targets) as t (id bigint, queue text, handler text) loop
        execute format('insert into pgmq.%I (vt, message, headers) values (core.now(), $1, $2)',
                       'q_' || target.queue)
        using p_body, core.headers(p_event_id, p_event_version, target.id, target.handler, p_trace);
        sent := sent + 1;
    end loop;
    return sent;
end
$$;

-- Emits from SQL what Client::emit emits from Rust. Options: "version" (1), "key",
-- "correlationId", "causationId", "idempotencyKey" (for 24 hours), "producerNodeId" ("sql"),
-- "traceparent", "tracestate", "metadata".
create function core.emit(
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

-- Moves one message to the dead letters of its queue. The body of a dead letter has the original
-- system's fields and who failed how often. Fenced by read_ct: false if the lease was lost.
create function core.dead_letter(
    p_queue text, p_msg_id bigint, p_read_ct integer, p_reason text, p_error text,
    p_attempts integer, p_errors jsonb
) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    moved bigint;
begin
    execute format(
        'with d as (
             delete from pgmq.%1$I where msg_id = $1 and read_ct = $2 returning message, headers
         )
         insert into pgmq.%2$I (vt, message, headers)
         select core.now(),
                jsonb_build_object(''originalEvent'', message, ''reason'', $3,
                    ''failedAt'', core.iso_time(core.now()), ''error'', $4,
                    ''handler'', headers ->> ''handler'', ''attempts'', $5, ''errors'', $6),
                case when jsonb_typeof(headers) = ''object'' then headers - ''settled'' else ''{}'' end
                    || jsonb_build_object(''attempts'', $5, ''errors'', $6)
         from d
         returning msg_id',
        'q_' || p_queue, 'q_' || p_queue || '_dlq')
    into moved
    using p_msg_id, p_read_ct, p_reason, p_error, p_attempts, p_errors;
    return moved is not null;
end
$$;

-- Takes in what foreign programs sent to a queue by plain pgmq.send: a message without our headers,
-- or whose headers no claim looks for. The predicate is that of an index of core.tune_queue.
-- It is deleted, appended to the log and fanned out to every subscription, all or nothing. What is
-- no envelope becomes a dead letter that says what was found. Returns one row a message.
create function core.adopt(p_namespace text, p_queue text, p_limit integer, p_max_bytes integer)
returns table (msg_id bigint, event_id bigint, refused text)
language plpgsql
set search_path = pg_catalog, pg_temp
-- For a time without a zone.
set timezone = 'UTC'
as $$
declare
    m record;
    body jsonb;
    field text;
    at timestamptz;
    version integer;
    plan core.fan_out_plan;
begin
    for m in execute format(
        'select q.msg_id, q.read_ct, q.enqueued_at,
                octet_length(q.message::text) > $2 as too_large
         from pgmq.%I q
         where ((q.headers ->> ''handler'') is not null and (q.headers ->> ''eventVersion'') ~ ''^[1-9][0-9]*$'') is not true
           and q.vt <= core.now()
         order by q.msg_id limit $1 for update skip locked', 'q_' || p_queue)
        using p_limit, p_max_bytes
    loop
        msg_id := m.msg_id;
        event_id := null;
        refused := null;
        begin
            if m.too_large then
                raise exception 'the message is larger than % bytes', p_max_bytes;
            end if;
            execute format('select message from pgmq.%I where msg_id = $1', 'q_' || p_queue)
                into body using m.msg_id;
            if jsonb_typeof(body) is distinct from 'object' then
                raise exception 'an envelope is a JSON object, found %', coalesce(jsonb_typeof(body), 'nothing');
            end if;
            if jsonb_typeof(body -> 'eventType') is distinct from 'string' or body ->> 'eventType' = '' then
                raise exception 'the envelope has no "eventType" text';
            end if;
            if octet_length(body ->> 'eventType') > 100 then
                raise exception 'the envelope''s "eventType" is longer than 100 bytes';
            end if;
            -- A field of the envelope that is null is as good as absent; numbers that name something
            -- become text.
            foreach field in array '{namespace,emittedAt,eventVersion,scheduledTaskId,dueAt,producerNodeId,key,correlationId,causationId}'::text[]
            loop
                if body -> field = 'null' then
                    body := body - field;
                elsif jsonb_typeof(body -> field) in ('object', 'array') then
                    raise exception 'the envelope''s "%" is an %', field, jsonb_typeof(body -> field);
                elsif body ? field then
                    body := body || jsonb_build_object(field, body ->> field);
                end if;
            end loop;
            if body ->> 'namespace' <> p_namespace then
                raise exception 'the envelope is for namespace "%", this queue belongs to "%"',
                    body ->> 'namespace', p_namespace;
            end if;
            if body ->> 'eventVersion' !~ '^[1-9][0-9]{0,8}$' then
                raise exception 'the envelope''s "eventVersion" is %, a whole number from 1 is needed',
                    body ->> 'eventVersion';
            end if;
            -- Without this, 'tomorrow' and 'infinity' would be times as well.
            if body ->> 'emittedAt' !~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}' then
                raise exception 'the envelope''s "emittedAt" is "%", a time as in ISO 8601 is needed',
                    body ->> 'emittedAt';
            end if;
            version := coalesce((body ->> 'eventVersion')::integer, 1);
            at := coalesce((body ->> 'emittedAt')::timestamptz, m.enqueued_at);
            event_id := nextval('core.event_log_event_id_seq');
            body := '{"payload": {}, "producerNodeId": "unknown"}'::jsonb || body
                || jsonb_build_object('namespace', p_namespace, 'emittedAt', core.iso_time(at),
                       'eventVersion', version,
                       'correlationId', coalesce(body ->> 'correlationId', event_id::text))
                || case when body ? 'scheduledTaskId'
                        then jsonb_build_object('scheduledTaskId', (body ->> 'scheduledTaskId')::uuid)
                        else '{}' end;

            plan := core.plan_fan_out(p_namespace, body ->> 'eventType');
            insert into core.event_log
                (event_id, namespace, event_type, payload, producer_node_id, scheduled_task_id, metadata,
                 event_version, key, correlation_id, causation_id, subscriptions_version)
            values (event_id, p_namespace, body ->> 'eventType', body -> 'payload', body ->> 'producerNodeId',
                    (body ->> 'scheduledTaskId')::uuid,
                    jsonb_build_object('messageId', m.msg_id, 'envelope', body - 'payload'),
                    version, body ->> 'key', body ->> 'correlationId', body ->> 'causationId',
                    plan.version);
            perform core.fan_out(plan.targets, event_id, version, body);
            execute format('delete from pgmq.%I where msg_id = $1', 'q_' || p_queue) using m.msg_id;
        exception
            -- What the message itself is to blame for. Anything else (a missing partition, a lost
            -- queue) fails the whole call, and the message stays where it is.
            when raise_exception or data_exception then
                event_id := null;
                refused := sqlerrm;
                perform core.dead_letter(p_queue, m.msg_id, m.read_ct, 'Malformed message', sqlerrm, 0, '[]');
        end;
        return next;
    end loop;
end
$$;
