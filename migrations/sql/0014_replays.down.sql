-- Replays that are running end where they are; what they have put into queues stays there.
--
-- Locks: ACCESS EXCLUSIVE on core.subscriptions. Nodes of this release may not be running.

drop function core.cancel_replay(text, uuid, text);
drop function core.drive_replay(uuid, integer);
drop function core.estimate_replay(text, text, text, text[], timestamptz, timestamptz, bigint, bigint, integer);
drop function core.start_replay(text, text, text, text[], timestamptz, timestamptz, bigint, bigint, double precision, integer);
drop function core.replay_targets(text, text, text, text[]);
drop function core.newest_event(text, text[]);
drop table core.replays;

create or replace function core.subscribe(p_namespace text, p_app text, p_handlers jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    version bigint;
    changed boolean;
begin
    -- Serializes registrations in the namespace; emits only read the row and are not held up.
    select subscriptions_version into version from core.namespaces
    where namespace = p_namespace for no key update;

    with wanted as (
        select h ->> 'group' as group_name, h ->> 'handler' as handler, h ->> 'eventType' as event_type
        from jsonb_array_elements(p_handlers) h
    ), stored as (
        insert into core.subscriptions as s
            (namespace, group_name, handler, event_type, app, queue_name,
             since_version, since_snapshot, first_snapshot, since_at)
        select p_namespace, w.group_name, w.handler, w.event_type, p_app,
               core.queue_name(p_namespace, w.group_name), version + 1, pg_current_snapshot(), pg_current_snapshot(),
               core.oldest_transaction_start()
        from wanted w
        on conflict (namespace, group_name, handler) do update
            set event_type = excluded.event_type, app = excluded.app,
                since_version = excluded.since_version, since_snapshot = excluded.since_snapshot,
                first_snapshot = excluded.first_snapshot, since_at = excluded.since_at,
                cut_xid = excluded.cut_xid, cut_settling = false
            where s.event_type <> excluded.event_type
        returning 1
    )
    select exists (select from stored) into changed;

    if changed then
        version := version + 1;
        update core.namespaces set subscriptions_version = version where namespace = p_namespace;
    end if;
    return version;
end
$$;

create or replace function core.settle_subscriptions(p_namespace text) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s core.subscriptions;
    e record;
    target jsonb;
    snapshot_now pg_snapshot;
    sent integer := 0;
begin
    for s in
        select * from core.subscriptions
        where namespace = p_namespace and since_snapshot is not null
        order by subscription_id for update skip locked
    loop
        -- One statement, hence one snapshot: what it sees and what is noted as seen agree.
        select pg_current_snapshot(),
            array(
                select row(l.event_id, l.emitted_at)::core.log_position
                from core.event_log l
                where l.namespace = s.namespace and l.event_type = s.event_type
                  and l.emitted_at >= s.since_at and l.subscriptions_version < s.since_version
                  and not pg_visible_in_snapshot(l.tx_id, s.since_snapshot)
                order by l.event_id
            ) as owed
        into e;
        snapshot_now := e.pg_current_snapshot;
        target := jsonb_build_array(jsonb_build_object(
            'id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler));
        for e in
            select l.*, p.trace
            from unnest(e.owed) o
            join core.event_log l on (l.event_id, l.emitted_at) = (o.event_id, o.emitted_at)
            cross join lateral (select jsonb_strip_nulls(jsonb_build_object(
                'traceparent', l.metadata ->> 'traceparent', 'tracestate', l.metadata ->> 'tracestate'))) p (trace)
        loop
            sent := sent + core.fan_out(target, e.event_id, e.event_version,
                core.envelope(s.namespace, e.event_type, e.payload, e.emitted_at, e.producer_node_id,
                              e.event_version, e.key, e.correlation_id, e.causation_id)
                    || case when e.scheduled_task_id is null then '{}'
                            else jsonb_strip_nulls(jsonb_build_object('scheduledTaskId', e.scheduled_task_id,
                                                                      'dueAt', e.metadata -> 'dueAt')) end
                    || coalesce(e.metadata -> 'envelope', '{}'),
                e.trace);
        end loop;

        -- The cut is over in two steps. First no snapshot may be in use that was taken before the
        -- registration committed; sessions of other roles show theirs to everybody, but not their
        -- type. Then every transaction that wrote under such a snapshot must have ended.
        if not s.cut_settling then
            if not exists (
                select from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid()
                  and backend_type is distinct from 'autovacuum worker'
                  and age(backend_xmin) >= age(s.cut_xid::xid)
            ) then
                update core.subscriptions
                set cut_settling = true, cut_xid = pg_snapshot_xmax(pg_current_snapshot()),
                    since_snapshot = snapshot_now
                where subscription_id = s.subscription_id;
            else
                update core.subscriptions set since_snapshot = snapshot_now
                where subscription_id = s.subscription_id;
            end if;
        else
            update core.subscriptions
            set since_snapshot = case when pg_snapshot_xmin(snapshot_now) >= s.cut_xid then null else snapshot_now end
            where subscription_id = s.subscription_id;
        end if;
    end loop;
    return sent;
end
$$;

drop function core.logged_trace(core.event_log);
drop function core.logged_envelope(core.event_log);

create or replace function core.emit_delayed(p_namespace text, p_event_ids bigint[]) returns text[]
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

create or replace function core.fire_ticks(
    p_namespace text, p_task_ids uuid[], p_due_at timestamptz[], p_is_manual boolean,
    out event_ids bigint[], out queues text[]
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    version bigint;
    targets jsonb;
    enqueue text;
begin
    -- One statement, so that the version noted in the log is the one that was delivered by.
    select n.subscriptions_version, coalesce((
        select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name,
                                            'handler', s.handler, 'type', s.event_type))
        from core.subscriptions s
        where s.namespace = n.namespace and s.event_type in (
            select t.event_type from core.scheduled_tasks t where t.task_id = any (p_task_ids))), '[]')
    into version, targets
    from core.namespaces n
    where n.namespace = p_namespace;

    select array_agg(q), string_agg(format(
        ', %I as (
            insert into pgmq.%I (vt, message, headers)
            select core.now(), b.body,
                   core.headers(b.event_id, b.event_version, t.id, t.handler, ''{}'')
            from bodies b
            join jsonb_to_recordset($6) as t (id bigint, queue text, handler text, type text)
                on t.type = b.event_type and t.queue = %L
            order by b.n
        )', 'to_' || q, 'q_' || q, q), '')
    into queues, enqueue
    from (select distinct t.queue from jsonb_to_recordset(targets) as t (queue text)) as d (q);

    execute
        'with due as materialized (
            select d.n, d.due_at, d.event_id, t.task_id, t.job_id, t.event_type, t.event_version,
                   t.event_key, t.payload
            from (select u.*, nextval(''core.event_log_event_id_seq'') as event_id
                  from unnest($2, $3) with ordinality as u (task_id, due_at, n)) d
            join core.scheduled_tasks t on t.task_id = d.task_id and t.namespace = $1
        ), ticked as (
            insert into core.ticks (task_id, due_at, event_id, is_manual)
            select task_id, due_at, event_id, $4 from due order by task_id, due_at
            on conflict do nothing
            returning event_id
        ), fired as materialized (
            select due.* from due join ticked using (event_id)
        ), logged as (
            insert into core.event_log
                (event_id, namespace, event_type, payload, emitted_at, producer_node_id,
                 scheduled_task_id, metadata, event_version, key, correlation_id, subscriptions_version)
            select event_id, $1, event_type, payload, core.now(), ''scheduler'', task_id,
                   jsonb_build_object(''jobId'', job_id, ''dueAt'', core.iso_time(due_at)),
                   event_version, event_key, event_id::text, $5
            from fired order by n
        ), bodies as materialized (
            select n, event_id, event_type, event_version,
                   core.envelope($1, event_type, payload, core.now(), ''scheduler'', event_version,
                                 event_key, event_id::text, null)
                       || jsonb_build_object(''scheduledTaskId'', task_id,
                                             ''dueAt'', core.iso_time(due_at)) as body
            from fired
        )' || coalesce(enqueue, '') ||
        ' select array_agg(ticked.event_id order by u.n)
          from generate_subscripts($2, 1) as u (n)
          left join due on due.n = u.n
          left join ticked on ticked.event_id = due.event_id'
    into event_ids
    using p_namespace, p_task_ids, p_due_at, p_is_manual, version, targets;
end
$$;

create or replace function core.fan_out(
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

create or replace function core.plan_fan_out(p_namespace text, p_event_type text) returns core.fan_out_plan
language sql stable
begin atomic
    select n.subscriptions_version, coalesce((
        select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler))
        from core.subscriptions s
        where s.namespace = n.namespace and s.event_type = p_event_type), '[]')
    from core.namespaces n
    where n.namespace = p_namespace;
end;

drop function core.assign_versions(text);
alter table core.subscriptions drop column event_version, drop column other_versions;
