-- Replays: events of the log put into queues once more, and the history of new handlers. Subscriptions
-- that know which version of their event type the handler takes.
--
-- The set of events that a replay delivers is fixed when it is made: those that were visible in its
-- snapshot. Batches then go through the log by (emitted_at, event_id), and each moves the position in the
-- transaction that puts its messages into the queue, so that whoever drives it, and dies, loses and
-- doubles nothing.
--
-- Locks: ACCESS EXCLUSIVE on core.subscriptions, briefly; it is small, and no column is rewritten.
-- Workers of the previous release may keep running. What they emit goes to all handlers of the event type,
-- whichever version these take.

alter table core.subscriptions
    -- The version of the event type that the handler takes, as the build that defines the app declares it.
    -- Null if no build has said so since this column was made.
    add column event_version integer,
    -- Versions that other handlers of the group take and this one does not: the event goes to them alone.
    -- A version that nobody takes goes to all of the group, and waits for a build that can run it.
    add column other_versions integer[] not null default '{}';

-- Derives other_versions, within each group, from what the handlers take.
create function core.assign_versions(p_namespace text) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    update core.subscriptions s
    set other_versions = w.versions
    from (
        select o.subscription_id,
               coalesce(array_agg(distinct other.event_version)
                            filter (where other.event_version <> o.event_version), '{}') as versions
        from core.subscriptions o
        join core.subscriptions other using (namespace, group_name, event_type)
        where o.namespace = p_namespace
        group by o.subscription_id
    ) w
    where s.subscription_id = w.subscription_id and s.other_versions <> w.versions
$$;

create or replace function core.plan_fan_out(p_namespace text, p_event_type text) returns core.fan_out_plan
language sql stable
begin atomic
    select n.subscriptions_version, coalesce((
        select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler,
                                            'others', s.other_versions))
        from core.subscriptions s
        where s.namespace = n.namespace and s.event_type = p_event_type), '[]')
    from core.namespaces n
    where n.namespace = p_namespace;
end;

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
    for target in
        select * from jsonb_to_recordset(p_targets) as t (id bigint, queue text, handler text, others jsonb)
    loop
        continue when target.others @> to_jsonb(p_event_version);
        execute format('insert into pgmq.%I (vt, message, headers) values (core.now(), $1, $2)',
                       'q_' || target.queue)
        using p_body, core.headers(p_event_id, p_event_version, target.id, target.handler, p_trace);
        sent := sent + 1;
    end loop;
    return sent;
end
$$;

-- What is changed in the next two: the last line of the join with the subscriptions.

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
                                            'handler', s.handler, 'type', s.event_type,
                                            'others', s.other_versions))
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
            join jsonb_to_recordset($6) as t (id bigint, queue text, handler text, type text, others jsonb)
                on t.type = b.event_type and t.queue = %L
                    and (t.others @> to_jsonb(b.event_version)) is not true
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
                                                'handler', s.handler, 'type', s.event_type,
                                                'others', s.other_versions))
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
             select * from jsonb_to_recordset($2) as t (id bigint, queue text, handler text, type text, others jsonb)
         )'
        || coalesce((
            select string_agg(format(
                ', q%s as (
                     insert into pgmq.%I (vt, message, headers)
                     select core.now(), b.body, core.headers(b.event_id, b.event_version, t.id, t.handler, b.trace)
                     from b join t on t.type = b.event_type and t.queue = %L
                         and (t.others @> to_jsonb(b.event_version)) is not true
                     order by b.due_at, b.event_id
                 )', q.n, 'q_' || q.queue, q.queue), '')
            from unnest(queues) with ordinality as q (queue, n)), '')
        || ' select'
    using p_event_ids, plan.targets, plan.version;
    return queues;
end
$$;

-- The body of a logged event's messages, as the emit made it.
create function core.logged_envelope(l core.event_log) returns jsonb
language sql stable parallel safe
return core.envelope(l.namespace, l.event_type, l.payload, l.emitted_at, l.producer_node_id,
                     l.event_version, l.key, l.correlation_id, l.causation_id)
    || case when l.scheduled_task_id is null then '{}'
            else jsonb_strip_nulls(jsonb_build_object('scheduledTaskId', l.scheduled_task_id,
                                                      'dueAt', l.metadata -> 'dueAt')) end
    || coalesce(l.metadata -> 'envelope', '{}');

-- And their trace context.
create function core.logged_trace(l core.event_log) returns jsonb
language sql immutable parallel safe
return jsonb_strip_nulls(jsonb_build_object(
    'traceparent', l.metadata ->> 'traceparent', 'tracestate', l.metadata ->> 'tracestate'));

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
            'id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler, 'others', s.other_versions));
        for e in
            select l.event_id, l.event_version, core.logged_envelope(l) as body, core.logged_trace(l) as trace
            from unnest(e.owed) o
            join core.event_log l on (l.event_id, l.emitted_at) = (o.event_id, o.emitted_at)
        loop
            sent := sent + core.fan_out(target, e.event_id, e.event_version, e.body, e.trace);
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

create table core.replays (
    replay_id uuid primary key default gen_random_uuid(),
    namespace text not null references core.namespaces,
    -- What was asked for. Null: every handler of the group, every event type of these, no bound.
    group_name text not null,
    handler text,
    event_types text[],
    -- Both from are included, until_at is not, until_id is.
    from_at timestamptz,
    until_at timestamptz,
    from_id bigint,
    until_id bigint,
    -- Messages a second; null is as fast as they are handled.
    rate double precision check (rate >= 0.0001 and rate <= 1000000),
    -- Most of its messages that may be in the queue.
    max_waiting integer not null default 1000 check (max_waiting between 1 and 100000),
    -- The subscriptions it delivers to.
    subscription_ids bigint[] not null,
    queue_name text not null,
    -- Only events that are visible in this are replayed, and none that is newer than last_at was.
    snapshot pg_snapshot not null,
    last_at timestamptz,
    -- The last event that was looked at.
    position_at timestamptz not null,
    position_id bigint not null default 0,
    -- Up to when the rate has been used.
    paced_at timestamptz not null default core.now(),
    -- How many due messages may wait at present: what is handled in about a second.
    due_limit integer not null default 50,
    -- Messages that were put into the queue and were there when it was looked at last.
    message_ids bigint[] not null default '{}',
    events bigint not null default 0,
    messages bigint not null default 0,
    -- Deliveries that were left out, because the handler takes another version.
    left_out bigint not null default 0,
    -- Messages that were taken back when it was cancelled.
    taken_back bigint not null default 0,
    state text not null default 'running' check (state in ('running', 'finished', 'cancelled', 'failed')),
    error text,
    created_at timestamptz not null default core.now(),
    finished_at timestamptz,
    check ((state = 'running') = (finished_at is null))
);

create index replays_running on core.replays (namespace) where state = 'running';

comment on table core.replays is
    'Events of the log that are delivered once more. Nodes drive those that are running.';

-- The time of the newest event of these types that is in the log.
create function core.newest_event(p_namespace text, p_event_types text[]) returns timestamptz
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select max(n.emitted_at)
    from unnest(p_event_types) t (event_type)
    cross join lateral (
        select l.emitted_at from core.event_log l
        where l.namespace = p_namespace and l.event_type = t.event_type
        order by l.emitted_at desc limit 1) n
$$;

-- The subscriptions that a replay goes to; raises with the reason if there are none. Ticks of functions
-- run again only if it is said so: by the handler's name, or the event type.
create function core.replay_targets(p_namespace text, p_group text, p_handler text, p_event_types text[])
returns setof core.subscriptions
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    known text;
    unknown text;
begin
    if not exists (select from core.groups where namespace = p_namespace and group_name = p_group) then
        raise exception 'namespace "%" has no group "%"', p_namespace, p_group
            using errcode = 'invalid_parameter_value';
    end if;
    return query
        select * from core.subscriptions s
        where s.namespace = p_namespace and s.group_name = p_group
          and (p_handler is null or s.handler = p_handler)
          and (p_event_types is null or s.event_type = any (p_event_types))
          and (p_handler is not null or p_event_types is not null or s.event_type not like 'tick.%');
    if found and p_event_types is null then
        return;
    end if;
    if not exists (select from core.subscriptions s
                   where s.namespace = p_namespace and s.group_name = p_group
                     and (p_handler is null or s.handler = p_handler))
    then
        select string_agg(format('"%s"', s.handler), ', ' order by s.handler) into known
        from core.subscriptions s
        where s.namespace = p_namespace and s.group_name = p_group;
        raise exception 'group "%" of namespace "%" has no handler%', p_group, p_namespace,
            case when p_handler is null then '' else format(' "%s", it has %s', p_handler, coalesce(known, 'none')) end
            using errcode = 'invalid_parameter_value';
    end if;
    select string_agg(format('"%s"', t), ', ') into unknown
    from unnest(p_event_types) t
    where not exists (select from core.subscriptions s
                      where s.namespace = p_namespace and s.group_name = p_group and s.event_type = t
                        and (p_handler is null or s.handler = p_handler));
    if unknown is not null or p_event_types = '{}' then
        raise exception '% takes no events of type %',
            case when p_handler is null then format('group "%s"', p_group) else format('handler "%s"', p_handler) end,
            coalesce(unknown, 'that is not named')
            using errcode = 'invalid_parameter_value';
    end if;
    if p_event_types is null then
        raise exception 'group "%" has only functions that the clock runs: name one to replay its ticks', p_group
            using errcode = 'invalid_parameter_value';
    end if;
end
$$;

-- Replays what is in the log now, and returns the replay's id. Nodes deliver it.
create function core.start_replay(
    p_namespace text, p_group text, p_handler text, p_event_types text[],
    p_from_at timestamptz, p_until_at timestamptz, p_from_id bigint, p_until_id bigint,
    p_rate double precision, p_max_waiting integer
) returns uuid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    id uuid;
begin
    if p_from_at >= p_until_at or p_from_id > p_until_id then
        raise exception 'nothing lies between the bounds of the replay: % is not before %',
            case when p_from_at >= p_until_at then p_from_at::text else p_from_id::text end,
            case when p_from_at >= p_until_at then p_until_at::text else p_until_id::text end
            using errcode = 'invalid_parameter_value';
    end if;
    if p_rate not between 0.0001 and 1000000 or p_max_waiting not between 1 and 100000 then
        raise exception 'a replay has a rate of 0.0001 to 1000000 messages a second and 1 to 100000 waiting messages, not % and %',
            coalesce(p_rate::text, 'none'), coalesce(p_max_waiting, 1000)
            using errcode = 'invalid_parameter_value';
    end if;
    insert into core.replays
        (namespace, group_name, handler, event_types, from_at, until_at, from_id, until_id, rate, max_waiting,
         subscription_ids, queue_name, snapshot, last_at, position_at)
    select p_namespace, p_group, p_handler, p_event_types, p_from_at, p_until_at, p_from_id, p_until_id, p_rate,
           coalesce(p_max_waiting, 1000), array_agg(t.subscription_id), min(t.queue_name), pg_current_snapshot(),
           core.newest_event(p_namespace, array_agg(distinct t.event_type)), coalesce(p_from_at, '-infinity')
    from core.replay_targets(p_namespace, p_group, p_handler, p_event_types) t
    returning replay_id into id;
    return id;
end
$$;

-- What a replay would deliver now. Looks at no more than p_limit events of each type; if there are more,
-- the counts are an estimate by the planner's statistics.
create function core.estimate_replay(
    p_namespace text, p_group text, p_handler text, p_event_types text[],
    p_from_at timestamptz, p_until_at timestamptz, p_from_id bigint, p_until_id bigint, p_limit integer,
    out events bigint, out messages bigint, out left_out bigint, out is_estimate boolean,
    out first_at timestamptz, out last_at timestamptz
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    t record;
    found_events bigint;
    found_messages bigint;
    found_left_out bigint;
    first_found timestamptz;
    last_found timestamptz;
    total double precision;
    condition text;
    plan json;
begin
    events := 0; messages := 0; left_out := 0; is_estimate := false;
    for t in
        select s.event_type, count(*) filter (where s.event_version is null) as any_version,
               count(*) as handlers,
               coalesce(array_agg(s.event_version) filter (where s.event_version is not null), '{}') as versions
        from core.replay_targets(p_namespace, p_group, p_handler, p_event_types) s
        group by s.event_type
    loop
        condition := format(
            'l.namespace = %L and l.event_type = %L and l.emitted_at >= %L and l.emitted_at < %L
               and l.event_id between %s and %s',
            p_namespace, t.event_type, coalesce(p_from_at, '-infinity'), coalesce(p_until_at, 'infinity'),
            coalesce(p_from_id, 0), coalesce(p_until_id, 9223372036854775807));
        execute format(
            'select count(*), sum(n.runs), sum($1 - n.runs), min(emitted_at), max(emitted_at)
             from (select l.event_version, l.emitted_at from core.event_log l where %s
                   order by l.emitted_at limit %s) e
             cross join lateral (
                 select $2 + cardinality(array_positions($3, e.event_version)) as runs) n', condition, p_limit)
        into found_events, found_messages, found_left_out, first_found, last_found
        using t.handlers, t.any_version, t.versions;
        if found_events = p_limit then
            execute 'explain (format json) select from core.event_log l where ' || condition into plan;
            total := greatest(found_events, (plan -> 0 -> 'Plan' ->> 'Plan Rows')::double precision);
            found_messages := found_messages * (total / found_events);
            found_left_out := found_left_out * (total / found_events);
            found_events := total;
            last_found := least(p_until_at, core.newest_event(p_namespace, array[t.event_type]));
            is_estimate := true;
        end if;
        events := events + found_events;
        messages := messages + coalesce(found_messages, 0);
        left_out := left_out + coalesce(found_left_out, 0);
        first_at := least(first_at, first_found);
        last_at := greatest(last_at, last_found);
    end loop;
end
$$;

-- Puts the next messages of a replay into its queue, as many as it may at present, after looking at
-- p_limit events at most. `sent` is null if the replay is not running, or somebody else is at it. `next_in`
-- is when to call again, in microseconds; null once it is over.
create function core.drive_replay(
    p_replay_id uuid, p_limit integer,
    out sent integer, out next_in bigint, out queue text, out state text, out error text
)
language plpgsql
set search_path = pg_catalog, pg_temp
-- Statements of many partitions look worth compiling and are not.
set jit = off
as $$
declare
    r core.replays;
    waiting bigint[];
    due integer;
    oldest timestamptz;
    room integer;
    bucket interval;
    targets jsonb;
    b record;
begin
    select * into r from core.replays p
    where p.replay_id = p_replay_id and p.state = 'running' for update skip locked;
    if not found then
        return;
    end if;
    sent := 0; queue := r.queue_name; state := 'running'; next_in := 100000;

    select jsonb_agg(jsonb_build_object('id', s.subscription_id, 'handler', s.handler, 'type', s.event_type,
                                        'version', s.event_version))
    into targets
    from core.subscriptions s
    where s.subscription_id = any (r.subscription_ids)
      and (r.event_types is null or s.event_type = any (r.event_types));
    if targets is null then
        r.state := 'failed';
        r.error := 'no handler is subscribed any more that it could deliver to';
    end if;

    -- What waits of it: replayed events must not hold up new ones for longer than about a second.
    execute format(
        'select coalesce(array_agg(msg_id), ''{}''), count(*) filter (where vt <= core.now()),
                min(vt) filter (where vt <= core.now())
         from pgmq.%I where msg_id = any ($1)', 'q_' || r.queue_name)
    into waiting, due, oldest using r.message_ids;
    r.due_limit := case
        when due = 0 and cardinality(waiting) < cardinality(r.message_ids) then least(r.due_limit * 2, r.max_waiting)
        when oldest < core.now() - interval '1 second' then greatest(r.due_limit / 2, 10)
        else r.due_limit end;
    room := least(r.due_limit - due, r.max_waiting - cardinality(waiting));
    if r.rate is not null then
        -- A second's worth may be made up for, or one event.
        bucket := greatest(1, (jsonb_array_length(coalesce(targets, '[]')) + 1) / r.rate) * interval '1 second';
        if r.paced_at > core.now() + bucket then
            r.paced_at := core.now(); -- the clock was set back
        end if;
        r.paced_at := greatest(r.paced_at, core.now() - bucket);
        room := least(room, floor(r.rate * extract(epoch from core.now() - r.paced_at) + 0.000001));
    end if;

    if targets is not null and r.last_at is not null and room > 0 then
        execute format(
            'with target as materialized (
                 select * from jsonb_to_recordset($1) as t (id bigint, handler text, type text, version integer)
             ), looked_at as materialized (
                 select e.*,
                     e.event_id between $2 and $3
                         and (pg_visible_in_snapshot(e.tx_id, $4)
                              -- No transaction of this server: a dump of another one was restored.
                              or e.tx_id >= pg_snapshot_xmax(pg_current_snapshot())) as is_meant
                 from (select distinct type from target) t
                 cross join lateral (
                     -- Apart, because many events of one moment would be sorted for each batch.
                     (select l.event_id, l.emitted_at, l.event_type, l.event_version, l.tx_id,
                             pg_column_size(l.payload) as bytes
                      from core.event_log l
                      where l.namespace = $5 and l.event_type = t.type and l.emitted_at = $6 and l.event_id > $9
                        and l.emitted_at <= $7 and l.emitted_at < $8
                      order by l.event_id limit $10)
                     union all
                     (select l.event_id, l.emitted_at, l.event_type, l.event_version, l.tx_id,
                             pg_column_size(l.payload)
                      from core.event_log l
                      where l.namespace = $5 and l.event_type = t.type and l.emitted_at > $6
                        and l.emitted_at <= $7 and l.emitted_at < $8
                      order by l.emitted_at, l.event_id limit $10)) e
                 order by e.emitted_at, e.event_id limit $10
             ), counted as (
                 select e.*, count(t.id) as handlers,
                        count(t.id) filter (where t.version is null or t.version = e.event_version) as runs
                 from looked_at e left join target t on t.type = e.event_type and e.is_meant
                 group by e.event_id, e.emitted_at, e.event_type, e.event_version, e.tx_id, e.bytes, e.is_meant
             ), added as (
                 select c.*, sum(c.runs) over w - c.runs as before,
                        sum(c.bytes * c.runs) over w - c.bytes * c.runs as bytes_before
                 from counted c
                 window w as (order by c.emitted_at, c.event_id)
             ), taken as materialized (
                 -- A cut in what is in order: where the room, or 8 MB, are used up.
                 select * from added where before < $11 and bytes_before < 8388608
             ), put as (
                 insert into pgmq.%I (vt, message, headers)
                 select core.now(), core.logged_envelope(l),
                        core.headers(l.event_id, l.event_version, t.id, t.handler, core.logged_trace(l))
                            || jsonb_build_object(''replay'', $12)
                 from taken e
                 join core.event_log l on (l.event_id, l.emitted_at) = (e.event_id, e.emitted_at)
                 join target t on t.type = e.event_type and (t.version is null or t.version = e.event_version)
                 where e.is_meant
                 order by l.emitted_at, l.event_id, t.id
                 returning msg_id
             )
             select array(select msg_id from put) as ids,
                    (select count(*) from taken where is_meant) as events,
                    (select coalesce(sum(handlers - runs), 0) from taken) as left_out,
                    (select count(*) from taken) = (select count(*) from looked_at)
                        and (select count(*) from looked_at) < $10 as is_last,
                    p.emitted_at, p.event_id
             from (select) one
             left join lateral (select * from taken order by emitted_at desc, event_id desc limit 1) p on true',
            'q_' || r.queue_name)
        into b
        using targets, coalesce(r.from_id, 0), coalesce(r.until_id, 9223372036854775807), r.snapshot, r.namespace,
              r.position_at, r.last_at, coalesce(r.until_at, 'infinity'), r.position_id, p_limit, room, r.replay_id;
        sent := cardinality(b.ids);
        waiting := waiting || b.ids;
        r.position_at := coalesce(b.emitted_at, r.position_at);
        r.position_id := coalesce(b.event_id, r.position_id);
        r.events := r.events + b.events;
        r.messages := r.messages + sent;
        r.left_out := r.left_out + b.left_out;
        r.paced_at := r.paced_at + coalesce(sent / r.rate, 0) * interval '1 second';
        if b.is_last then
            r.state := 'finished';
        else
            -- At once if much was left out, or the messages are large.
            next_in := case when sent < room then 0 else 20000 end;
        end if;
    elsif targets is not null and r.last_at is null then
        r.state := 'finished';
    end if;
    if r.rate is not null and next_in > 0 then
        next_in := greatest(next_in,
            (extract(epoch from r.paced_at + 1 / r.rate * interval '1 second' - core.now()) * 1000000)::bigint);
    end if;
    if r.state <> 'running' then
        r.finished_at := core.now();
        next_in := null;
    end if;

    update core.replays p
    set position_at = r.position_at, position_id = r.position_id, paced_at = r.paced_at,
        due_limit = r.due_limit, message_ids = waiting, events = r.events, messages = r.messages,
        left_out = r.left_out, state = r.state, error = r.error, finished_at = r.finished_at
    where p.replay_id = r.replay_id
      and (sent > 0 or p.state <> r.state or p.position_id <> r.position_id or p.due_limit <> r.due_limit
           or cardinality(p.message_ids) <> cardinality(waiting));
    state := r.state;
    error := r.error;
end
$$;

-- Ends a running replay, and takes back those of its messages that nobody is handling. False if it is not
-- running.
create function core.cancel_replay(p_namespace text, p_replay_id uuid, p_error text default null) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    r core.replays;
    count bigint := 0;
begin
    select * into r from core.replays p
    where p.replay_id = p_replay_id and p.namespace = p_namespace and p.state = 'running' for update;
    if not found then
        return false;
    end if;
    if to_regclass(format('pgmq.%I', 'q_' || r.queue_name)) is not null then
        execute format(
            'with d as (
                 delete from pgmq.%1$I where msg_id = any (array(
                     select msg_id from pgmq.%1$I
                     where msg_id = any ($1) and headers ->> ''replay'' = $2
                       and not (read_ct > 0 and not headers ? ''settled'' and vt > core.now())
                     for update skip locked))
                 returning 1
             )
             select count(*) from d', 'q_' || r.queue_name)
        into count using r.message_ids, p_replay_id::text;
    end if;
    update core.replays p
    set state = 'cancelled', finished_at = core.now(), taken_back = count, error = p_error
    where p.replay_id = p_replay_id;
    return true;
end
$$;

-- Makes subscriptions what the build declares: `p_handlers` is
-- [{"group", "handler", "eventType", "eventVersion", "from"}]. Adds and changes, never removes: what a
-- vanished handler was sent waits until somebody retires the subscription. Returns the version that is in
-- force afterwards.
--
-- "from" is 'beginning' or a time: a new subscription is delivered its history by a replay, which is what
-- was visible in the snapshot that the clean cut begins with. So every event is delivered by one of them.
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
        select h ->> 'group' as group_name, h ->> 'handler' as handler, h ->> 'eventType' as event_type,
               (h ->> 'eventVersion')::integer as event_version, h ->> 'from' as history,
               not exists (select from core.subscriptions s
                           where (s.namespace, s.group_name, s.handler) = (p_namespace, h ->> 'group', h ->> 'handler'))
                   as is_new
        from jsonb_array_elements(p_handlers) h
    ), stored as (
        insert into core.subscriptions as s
            (namespace, group_name, handler, event_type, event_version, app, queue_name,
             since_version, since_snapshot, first_snapshot, since_at)
        select p_namespace, w.group_name, w.handler, w.event_type, w.event_version, p_app,
               core.queue_name(p_namespace, w.group_name), version + 1, pg_current_snapshot(), pg_current_snapshot(),
               core.oldest_transaction_start()
        from wanted w
        on conflict (namespace, group_name, handler) do update
            set event_type = excluded.event_type, event_version = excluded.event_version, app = excluded.app,
                since_version = excluded.since_version, since_snapshot = excluded.since_snapshot,
                first_snapshot = excluded.first_snapshot, since_at = excluded.since_at,
                cut_xid = excluded.cut_xid, cut_settling = false
            where s.event_type <> excluded.event_type
        returning *
    ), replays as (
        insert into core.replays
            (namespace, group_name, handler, from_at, subscription_ids, queue_name, snapshot, last_at, position_at)
        select p_namespace, s.group_name, s.handler, h.from_at, array[s.subscription_id], s.queue_name,
               s.first_snapshot, core.newest_event(p_namespace, array[s.event_type]), coalesce(h.from_at, '-infinity')
        from stored s
        join wanted w using (group_name, handler)
        cross join lateral (select nullif(w.history, 'beginning')::timestamptz as from_at) h
        where w.is_new and w.history is not null
    )
    select exists (select from stored) into changed;

    update core.subscriptions s
    set event_version = (h ->> 'eventVersion')::integer
    from jsonb_array_elements(p_handlers) h
    where (s.namespace, s.group_name, s.handler) = (p_namespace, h ->> 'group', h ->> 'handler')
      and s.event_version is distinct from (h ->> 'eventVersion')::integer;
    perform core.assign_versions(p_namespace);

    if changed then
        version := version + 1;
        update core.namespaces set subscriptions_version = version where namespace = p_namespace;
    end if;
    return version;
end
$$;
