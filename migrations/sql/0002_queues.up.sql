-- Groups and their pgmq queues.
--
-- Locks: none. Workers of a previous release: there is none.

create table core.groups (
    namespace text not null references core.namespaces,
    group_name text not null,
    queue_name text not null unique,
    created_at timestamptz not null default core.now(),
    primary key (namespace, group_name),
    check (core.check_queue_name(namespace, group_name))
);

-- Makes a queue's table fit for churn, and replaces pgmq's index on vt, which no statement of pgmq
-- can use (it compares with clock_timestamp()), by the one that a claim walks: for each handler and
-- event version the due messages in order. It keeps the name of pgmq's index, so that a repeated
-- pgmq.create does not bring the old one back.
create function core.tune_queue(p_queue text, p_claimed boolean) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q text := 'q_' || p_queue;
begin
    if p_claimed then
        execute format('drop index if exists pgmq.%I', q || '_vt_idx');
        execute format(
            'create index %I on pgmq.%I ((headers ->> ''handler''), (headers ->> ''eventVersion''), vt, msg_id)',
            q || '_vt_idx', q);
        -- The few messages that lost their lease before and may have to be run alone.
        execute format(
            'create index if not exists %I on pgmq.%I (msg_id) where (headers ->> ''abandoned'')::int >= 1',
            q || '_suspect_idx', q);
        -- What core.adopt looks for, by the same predicate: no claim finds these.
        execute format(
            'create index if not exists %I on pgmq.%I (msg_id)
             where ((headers ->> ''handler'') is not null and (headers ->> ''eventVersion'') ~ ''^[1-9][0-9]*$'') is not true',
            q || '_foreign_idx', q);
        execute format(
            'alter table pgmq.%I set (fillfactor = 70, autovacuum_vacuum_scale_factor = 0,
                 autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
                 autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000)', q);
    end if;
    begin
        execute format('alter table pgmq.%I alter column message set compression lz4', q);
    exception when feature_not_supported then
        null; -- a server that was built without lz4 keeps its default
    end;
end
$$;

-- Creates what a group needs and returns the name of its queue: the namespace, the queue, its
-- dead-letter queue. Calling it again changes nothing, and restores a queue that was dropped.
create function core.ensure_group(p_namespace text, p_group text) returns text
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    queue text;
    other text;
begin
    perform core.check_queue_name(p_namespace, p_group);
    queue := core.queue_name(p_namespace, p_group);
    -- One at a time in the namespace: two nodes that start together would both create the queue, or
    -- two spellings of the namespace.
    perform pg_advisory_xact_lock(hashtextextended('nexus: ' || core.queue_name_for_namespace(p_namespace), 0));

    select namespace into other from core.namespaces
    where core.queue_part(namespace) = core.queue_part(p_namespace) and namespace <> p_namespace;
    if found then
        raise exception 'namespace "%" is refused: it differs from the existing "%" only in case or in - and _',
            p_namespace, other using errcode = 'unique_violation';
    end if;
    insert into core.namespaces (namespace) values (p_namespace) on conflict do nothing;

    select group_name into other from core.groups
    where queue_name = queue and (namespace, group_name) <> (p_namespace, p_group);
    if found then
        raise exception 'group "%" is refused: it differs from the existing "%" only in case or in - and _',
            p_group, other using errcode = 'unique_violation';
    end if;
    insert into core.groups (namespace, group_name, queue_name)
    values (p_namespace, p_group, queue) on conflict do nothing;

    if to_regclass(format('pgmq.%I', 'q_' || queue)) is null then
        perform pgmq.create(queue);
        perform core.tune_queue(queue, true);
    end if;
    if to_regclass(format('pgmq.%I', 'q_' || queue || '_dlq')) is null then
        perform pgmq.create(queue || '_dlq');
        perform core.tune_queue(queue || '_dlq', false);
    end if;
    return queue;
end
$$;

revoke all on function core.ensure_group(text, text) from public;

-- What the original system's queries read from pgmq.meta, which has no such columns.
create view core.queue_metrics with (security_invoker = true) as
select m.queue_name, m.queue_length, m.newest_msg_age_sec as newest_msg_age_seconds,
       m.oldest_msg_age_sec as oldest_msg_age_seconds, m.total_messages
from pgmq.metrics_all() m
where m.queue_name like 'core\_events\_%';

comment on view core.queue_metrics is
    'Depth and ages of the queues in the columns of the original system. Counts every queue: not for frequent scraping.';
