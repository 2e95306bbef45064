-- Takes the rights back that roles have got here; the roles stay. Apps must connect as the owner from now
-- on, and what was kept apart is not any more.
--
-- Locks: ACCESS EXCLUSIVE on every table of the schema, briefly.

lock table core.role_access in access exclusive mode;
do $$
declare
    bound regrole[] := array(select distinct a.role from core.role_access a join pg_roles on pg_roles.oid = a.role);
begin
    delete from core.role_access;
    perform core.set_privileges(r) from unnest(bound) r;
end
$$;

create or replace view core.queue_metrics with (security_invoker = true) as
select m.queue_name, m.queue_length, m.newest_msg_age_sec as newest_msg_age_seconds,
       m.oldest_msg_age_sec as oldest_msg_age_seconds, m.total_messages
from pgmq.metrics_all() m
where m.queue_name like 'core\_events\_%';

create or replace function core.ensure_partitions(p_months_ahead integer default 12) returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
set timezone = 'UTC'
as $$
declare
    first_month timestamptz := date_trunc('month', core.now());
    month timestamptz;
    name text;
    created integer := 0;
begin
    perform pg_advisory_xact_lock(hashtextextended('nexus: partitions', 0));
    for i in 0 .. p_months_ahead loop
        month := first_month + make_interval(months => i);
        name := 'event_log_' || to_char(month, 'YYYY_MM');
        if to_regclass('core.' || name) is null then
            execute format('create table core.%I (like core.event_log including all)', name);
            execute format(
                'create trigger append_only before update or delete or truncate on core.%I
                     for each statement execute function core.refuse_change_of_event_log()', name);
            execute format('alter table core.%I enable always trigger append_only', name);
            execute format('alter table core.event_log attach partition core.%I for values from (%L) to (%L)',
                name, month, month + interval '1 month');
            created := created + 1;
        end if;
    end loop;
    return created;
end
$$;

create or replace function core.ensure_group(p_namespace text, p_group text) returns text
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

create or replace function core.maintain(p_namespace text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.ensure_partitions();
    perform core.settle_subscriptions(p_namespace);
    delete from core.idempotency_keys where namespace = p_namespace and expires_at <= core.now();
    delete from core.nodes where namespace = p_namespace and last_heartbeat < core.now() - interval '1 day';
    delete from core.ticks t using core.scheduled_tasks s
    where t.task_id = s.task_id and s.namespace = p_namespace and t.fired_at < core.now() - interval '30 days';
end
$$;

drop function core.cancel(bigint);

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

create or replace function core.retire(p_namespace text, p_group text, p_handler text, p_fate text) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s core.subscriptions;
    n core.nodes;
    gone core.retirements;
    r core.replays;
    in_force bigint;
begin
    -- As a node that registers takes them: it declares the handler before or after.
    perform pg_advisory_xact_lock(hashtextextended('nexus: register ' || p_namespace, 0));
    select subscriptions_version + 1 into in_force from core.namespaces
    where namespace = p_namespace for no key update;

    select * into s from core.subscriptions
    where (namespace, group_name, handler) = (p_namespace, p_group, p_handler) for update;
    if not found then
        select * into gone from core.retirements
        where (namespace, group_name, handler) = (p_namespace, p_group, p_handler)
        order by retired_at desc limit 1;
        raise exception 'handler "%" of group "%" is not subscribed in namespace "%"%', p_handler, p_group, p_namespace,
            case when gone.subscription_id is null then '' else format(': it was retired at %s', core.iso_time(gone.retired_at)) end
            using errcode = 'invalid_parameter_value';
    end if;
    select * into n from core.nodes
    where namespace = p_namespace and core.is_live(last_heartbeat)
      and handlers @> jsonb_build_array(jsonb_build_object('group', p_group, 'handler', p_handler))
    order by registered_at limit 1;
    if found then
        raise exception 'handler "%" of group "%" is declared by node "%" (app "%", build %)',
            p_handler, p_group, n.node_id, n.app, n.build_id
            using errcode = 'object_in_use',
                  hint = 'stop the nodes of builds that declare it first; one that was killed counts as live for 15 seconds';
    end if;

    delete from core.subscriptions where subscription_id = s.subscription_id;
    insert into core.retirements
        (subscription_id, namespace, group_name, handler, names, event_type, queue_name, fate, version)
    values (s.subscription_id, p_namespace, p_group, p_handler,
            array(select p_handler
                  union
                  select q.former from core.renames q
                  where (q.namespace, q.group_name, q.handler) = (p_namespace, p_group, p_handler)),
            s.event_type, s.queue_name, p_fate, in_force);
    perform core.assign_versions(p_namespace);
    for r in
        select * from core.replays p
        where p.namespace = p_namespace and p.state = 'running' and s.subscription_id = any (p.subscription_ids)
    loop
        if r.subscription_ids = array[s.subscription_id] then
            perform core.cancel_replay(p_namespace, r.replay_id, 'its handler was retired');
        else
            update core.replays set subscription_ids = array_remove(subscription_ids, s.subscription_id)
            where replay_id = r.replay_id;
        end if;
    end loop;
    update core.namespaces set subscriptions_version = in_force where namespace = p_namespace;
    return s.subscription_id;
end
$$;

create or replace function core.retire_version(
    p_namespace text, p_group text, p_handler text, p_version integer, p_fate text, p_limit integer
) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s core.subscriptions;
    n core.nodes;
    ids bigint[];
begin
    perform pg_advisory_xact_lock(hashtextextended('nexus: register ' || p_namespace, 0));
    select * into s from core.subscriptions
    where (namespace, group_name, handler) = (p_namespace, p_group, p_handler);
    if not found then
        raise exception 'handler "%" of group "%" is not subscribed in namespace "%"', p_handler, p_group, p_namespace
            using errcode = 'invalid_parameter_value';
    end if;
    select * into n from core.nodes
    where namespace = p_namespace and core.is_live(last_heartbeat)
      and handlers @> jsonb_build_array(jsonb_build_object(
              'group', p_group, 'handler', p_handler, 'eventVersion', p_version))
    order by registered_at limit 1;
    if found then
        raise exception 'version % of handler "%" of group "%" is run by node "%" (app "%", build %)',
            p_version, p_handler, p_group, n.node_id, n.app, n.build_id
            using errcode = 'object_in_use',
                  hint = 'stop the nodes of builds that declare it first; one that was killed counts as live for 15 seconds';
    end if;
    execute format(
        'select array(select msg_id from pgmq.%I
                      where headers ->> ''handler'' = $1 and headers ->> ''eventVersion'' = $2::text
                        and headers ->> ''attempts'' is distinct from ''0''
                      limit $3 for update skip locked)', 'q_' || s.queue_name)
    into ids using p_handler, p_version, p_limit;
    return core.move_leftovers(s.queue_name, ids, p_fate,
        format('version %s was retired at %s: no live build ran it', p_version, core.iso_time(core.now())));
end
$$;

create or replace function core.drive_replay(
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

drop function core.forget_replays(text);
drop function core.give_up_subscription(text, text, text, text, bigint);
drop function core.take_delayed(text, bigint[]);
drop function core.remove_task(text, text);
drop function core.forget_renames(text, jsonb);
drop function core.remove_subscription(text, text, text);
drop function core.free_node_id(text, text);
drop function core.remove_node(text, bigint);
drop function core.forget_expired(text);
drop function core.lock_registrations(text);
drop function core.create_roles(text);
drop function core.revoke_namespace(text, text);
drop function core.grant_namespace(text, text, text);
drop function core.bind_role(text, text, text);
drop function core.ensure_role(text);
drop function core.lock_role_access();
drop function core.refresh_roles();
drop function core.set_privileges(regrole);
drop function core.set_privileges_on_queue(text, regrole, text);
drop function core.isolate(regclass, boolean, boolean, text, text);

alter table core.delayed_emits drop constraint delayed_emits_pkey, add primary key (event_id);
alter table core.retirements drop constraint queue_of_the_group;
alter table core.replays drop constraint queue_of_the_group;
alter table core.subscriptions drop constraint queue_of_the_group;
alter table core.groups drop constraint queue_of_the_group;

do $$
declare
    p record;
begin
    for p in select polname as name, polrelid::regclass as relation from pg_policy
             join pg_class c on c.oid = polrelid where c.relnamespace = 'core'::regnamespace loop
        execute format('drop policy %I on %s', p.name, p.relation);
    end loop;
    for p in select oid::regclass as relation from pg_class
             where relnamespace = 'core'::regnamespace and relrowsecurity loop
        execute format('alter table %s disable row level security', p.relation);
    end loop;
end
$$;

drop table core.role_access;
drop function core.access_condition(text, text);
drop function core.name_sessions(integer[]);
drop function core.require_access(text, text);
drop function core.caller_may(text, text);
drop function core.owner();
drop function core.caller();
