-- An original nexus-core as its documentation describes it and its code made it, with the rows of two namespaces. pgmq is
-- there already.

create schema core;

create table core.namespaces (
    namespace text primary key,
    created_at timestamptz not null default now(),
    metadata jsonb default '{}'
);

create table core.nodes (
    node_id text primary key,
    namespace text not null references core.namespaces,
    display_name text,
    description text,
    metadata jsonb default '{}',
    registered_at timestamptz not null default now(),
    last_heartbeat timestamptz not null default now(),
    unique (namespace, node_id)
);
create index idx_nodes_namespace on core.nodes (namespace);

create table core.event_log (
    event_id bigserial,
    namespace text not null,
    event_type text not null,
    payload jsonb not null,
    emitted_at timestamptz not null default now(),
    producer_node_id text not null,
    scheduled_task_id uuid,
    metadata jsonb default '{}',
    primary key (event_id, emitted_at)
) partition by range (emitted_at);
create index idx_event_log_namespace on core.event_log (namespace);
create index idx_event_log_event_type on core.event_log (event_type);

-- Some months that are over, this one, and some ahead.
do $$
declare
    month timestamptz;
begin
    for i in -9 .. 6 loop
        month := date_trunc('month', now()) + make_interval(months => i);
        execute format('create table core.%I partition of core.event_log for values from (%L) to (%L)',
                       'event_log_' || to_char(month, 'YYYYMM'), month, month + interval '1 month');
    end loop;
end
$$;

create table core.scheduled_tasks (
    task_id uuid primary key,
    namespace text not null references core.namespaces,
    job_id integer,
    name text not null,
    cron_expression text not null,
    event_type text not null,
    payload jsonb not null default '{}',
    timezone text,
    active boolean not null default true,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create index idx_scheduled_tasks_namespace on core.scheduled_tasks (namespace);

create function core.touch_node_heartbeat(p_node_id text) returns void language sql as $$
    update core.nodes set last_heartbeat = now() where node_id = p_node_id
$$;

create function core.append_event_log(
    p_namespace text, p_event_type text, p_payload jsonb, p_producer_node_id text,
    p_scheduled_task_id uuid default null, p_metadata jsonb default '{}'
) returns bigint language sql as $$
    insert into core.event_log (namespace, event_type, payload, producer_node_id, scheduled_task_id, metadata)
    values (p_namespace, p_event_type, p_payload, p_producer_node_id, p_scheduled_task_id, p_metadata)
    returning event_id
$$;

create function core.queue_name_for_namespace(p_namespace text) returns text language sql as $$
    select 'core_events_' || replace(p_namespace, '-', '_')
$$;

create function core.dead_letter_queue_name_for_namespace(p_namespace text) returns text language sql as $$
    select core.queue_name_for_namespace(p_namespace) || '_dlq'
$$;

create function core.run_scheduled_task(p_task_id uuid) returns void language plpgsql as $$
declare
    task core.scheduled_tasks;
    envelope jsonb;
begin
    select * into task from core.scheduled_tasks where task_id = p_task_id and active;
    if not found then
        raise notice 'no active task %', p_task_id;
        return;
    end if;
    envelope := jsonb_build_object('namespace', task.namespace, 'eventType', task.event_type, 'payload', task.payload,
        'emittedAt', now(), 'producerNodeId', 'scheduler', 'scheduledTaskId', task.task_id);
    perform pgmq.send(core.queue_name_for_namespace(task.namespace), envelope);
    perform core.append_event_log(task.namespace, task.event_type, task.payload, 'scheduler', task.task_id,
        jsonb_build_object('jobId', task.job_id));
    update core.scheduled_tasks set updated_at = now() where task_id = p_task_id;
end
$$;

insert into core.namespaces (namespace, created_at, metadata) values
    ('demo', '2025-06-01T10:00:00Z', '{"team": "shop"}'), ('my-shop', '2025-07-01T10:00:00Z', null);

insert into core.nodes (node_id, namespace, display_name, description, metadata, registered_at, last_heartbeat) values
    ('worker-1a2b3c', 'demo', 'worker', 'does the work', '{"role": "consumer"}', now() - interval '3 hours', now() - interval '1 hour'),
    ('server-1a2b3c', 'my-shop', null, null, null, now() - interval '30 hours', now() - interval '2 hours'),
    (repeat('n', 101), 'demo', null, null, null, now() - interval '3 hours', now() - interval '1 hour');

-- In each of nine months, with payloads and types of every kind.
insert into core.event_log (namespace, event_type, payload, emitted_at, producer_node_id, metadata)
select case when n % 3 = 0 then 'my-shop' else 'demo' end, 'user.created', jsonb_build_object('userId', n),
       now() - make_interval(days => n), 'server-1a2b3c', jsonb_build_object('messageId', n, 'redeliveryCount', 0)
from generate_series(1, 240) as n;
insert into core.event_log (namespace, event_type, payload, producer_node_id, scheduled_task_id, metadata) values
    ('demo', 'a list', '[1, {"two": 2}, null]', 'server-1a2b3c', null, null),
    ('demo', 'Order/Paid', '"text"', 'server-1a2b3c', null, '[1]'),
    ('demo', repeat('long.', 30), 'null', 'scheduler', '00000000-0000-0000-0000-000000000001', '{"jobId": 1}');

-- The first one three times, as it was scheduled at each start.
insert into core.scheduled_tasks (task_id, namespace, job_id, name, cron_expression, event_type, payload, timezone, active, created_at) values
    ('00000000-0000-0000-0000-000000000001', 'demo', 1, 'cleanup', '*/5 * * * *', 'maintenance.cleanup', '{"limit": 100}', null, true, now() - interval '3 days'),
    ('00000000-0000-0000-0000-000000000002', 'demo', 2, 'cleanup', '*/5 * * * *', 'maintenance.cleanup', '{"limit": 100}', null, true, now() - interval '2 days'),
    ('00000000-0000-0000-0000-000000000003', 'demo', 3, 'cleanup', '*/5 * * * *', 'maintenance.cleanup', '{"limit": 100}', null, false, now() - interval '1 day'),
    ('44444444-0000-0000-0000-000000000004', 'demo', 4, 'cleanup', '0 3 * * *', 'maintenance.cleanup', '{"limit": 7}', null, true, now() - interval '9 days'),
    ('00000000-0000-0000-0000-000000000005', 'demo', 5, 'report', '0 9 * * 1-5', 'report.due', '{}', 'Europe/Berlin', true, now()),
    ('00000000-0000-0000-0000-000000000006', 'demo', 6, 'month end', '0 0 $ * *', 'month.ended', '{}', null, true, now()),
    ('00000000-0000-0000-0000-000000000007', 'my-shop', null, 'stopped', '0 * * * *', 'hour.passed', '[]', null, false, now()),
    ('00000000-0000-0000-0000-000000000008', 'my-shop', 8, 'too long', '0 * * * *', repeat('x', 101), '{}', null, true, now());

-- The client's way to call queues keeps the hyphen, that of the functions above does not.
select pgmq.create(queue) from unnest('{core_events_demo,core_events_demo_dlq,core_events_my-shop,core_events_my-shop_dlq,my-shop_dlq}'::text[]) as queue;

select pgmq.send(queue, jsonb_build_object('namespace', namespace, 'eventType', 'user.created',
           'payload', jsonb_build_object('userId', id), 'emittedAt', '2025-11-01T10:00:00.000Z',
           'producerNodeId', 'server-1a2b3c', 'broadcast', false))
from (values ('core_events_demo', 'demo', 1001), ('core_events_demo', 'demo', 1002), ('core_events_my-shop', 'my-shop', 1003))
    as waiting (queue, namespace, id);
select pgmq.send('core_events_demo', '{"no": "envelope"}');
-- One was read by a node that died.
update pgmq.q_core_events_demo set read_ct = 7, vt = clock_timestamp() + interval '1 second' where message #>> '{payload,userId}' = '1002';

select pgmq.send(queue, jsonb_build_object(
           'originalEvent', jsonb_build_object('namespace', namespace, 'eventType', 'user.created', 'payload', jsonb_build_object('userId', id),
               'emittedAt', '2025-11-01T10:00:00.000Z', 'producerNodeId', 'server-1a2b3c'),
           'reason', 'Handler execution error', 'failedAt', '2025-11-01T10:00:01.000Z', 'error', 'Error: no mailbox 17'))
from (values ('core_events_demo_dlq', 'demo', 2001), ('core_events_my-shop_dlq', 'my-shop', 2002), ('my-shop_dlq', 'my-shop', 2003))
    as dead (queue, namespace, id);

-- What pg_partman keeps of the log.
create schema partman;
create table partman.part_config (parent_table text primary key, control text not null);
insert into partman.part_config values ('core.event_log', 'emitted_at'), ('public.other', 'at');
