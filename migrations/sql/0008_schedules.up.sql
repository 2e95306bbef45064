-- Scheduled tasks that emit any event, with a misfire policy each, that can be paused, and whose runs
-- are kept with what was left out.
--
-- Locks: ACCESS EXCLUSIVE on core.scheduled_tasks and core.ticks, briefly; both are small, and no column
-- is rewritten. Workers of the previous release may go on: they call core.fire_tick, which fires no
-- paused task; until they are gone all misfires are 'fire_once' to them.

alter table core.scheduled_tasks
    add column event_version integer not null default 1 check (event_version > 0),
    add column event_key text,
    -- What becomes of due times that are later than the grace: 'skip' leaves them out, 'fire_once' fires
    -- the newest, 'fire_all' the newest misfire_cap, which the other two do not look at.
    add column misfire_policy text not null default 'fire_once'
        check (misfire_policy in ('skip', 'fire_once', 'fire_all')),
    add column misfire_cap integer not null default 100 check (misfire_cap between 1 and 1000),
    add column grace_ms bigint not null default 60000 check (grace_ms >= 0),
    -- Paused by somebody, which a deployment does not undo. Null if not.
    add column paused_at timestamptz,
    -- When the app that declares the task stopped doing so, which made it inactive. Who sets "active" to
    -- false by hand leaves this null, and no deployment makes the task active again.
    add column removed_at timestamptz,
    -- Why a node made the task inactive.
    add column last_error text,
    -- Not fired before then, because its event could not be emitted; last_error says why.
    add column put_off_until timestamptz,
    -- No due time up to here counts: when the task was made, changed, or made active again.
    add column due_after timestamptz not null default core.now(),
    -- One row that cannot be read, or not be emitted, would hold up the others.
    add constraint finite check (isfinite(next_run_at) and isfinite(due_after) and isfinite(put_off_until)),
    add constraint event_type_fits check (octet_length(event_type) between 1 and 100),
    -- Each run writes next_run_at, so that rows move often.
    set (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
         autovacuum_vacuum_cost_delay = 0);

update core.scheduled_tasks set removed_at = updated_at where not active and app is not null;

-- A task whose first time is still to be computed comes first; the queries repeat the expression.
drop index core.scheduled_tasks_due;
create index scheduled_tasks_due
    on core.scheduled_tasks (namespace, coalesce(next_run_at, timestamptz 'epoch'))
    where active and paused_at is null and scheduler = 'nexus';

-- What is changed by hand counts from now on: due times of before, which the task missed or did not
-- have, are not fired. The columns are those that no run writes.
create function core.reschedule() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if (new.cron_expression, new.timezone) is distinct from (old.cron_expression, old.timezone)
        or (new.active and not old.active)
        or (new.paused_at is null and old.paused_at is not null)
    then
        new.due_after := core.now();
        if new.next_run_at is not distinct from old.next_run_at then
            new.next_run_at := null;
        end if;
    end if;
    if new.active and not old.active then
        new.removed_at := null;
        new.last_error := null;
    end if;
    return new;
end
$$;

create trigger reschedule before update of cron_expression, timezone, active, paused_at
    on core.scheduled_tasks for each row execute function core.reschedule();

-- A row without an event stands for due times that were left out: from left_out_from to due_at.
alter table core.ticks
    alter column event_id drop not null,
    add column is_manual boolean not null default false,
    add column left_out_from timestamptz,
    -- How many they were; null if too many to count.
    add column left_out bigint,
    add check ((event_id is null) = (left_out_from is not null));

-- Emits the events of tasks for due times, all by one statement. `event_ids` are in the order of the
-- arguments, null for a tick that was fired before; `queues` are those that got messages.
create function core.fire_ticks(
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

-- Emits the task's event for one due time; null if that tick was fired before, or the task is paused.
create or replace function core.fire_tick(p_task_id uuid, p_due_at timestamptz, p_next_run_at timestamptz)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    task core.scheduled_tasks;
    id bigint;
begin
    update core.scheduled_tasks
    set next_run_at = coalesce(p_next_run_at, next_run_at)
    where task_id = p_task_id
    returning * into task;
    if task.paused_at is null then
        id := (core.fire_ticks(task.namespace, array[p_task_id], array[p_due_at], false)).event_ids[1];
    end if;
    if id is not null then
        update core.scheduled_tasks set last_run_at = core.now(), updated_at = core.now()
        where task_id = p_task_id;
    end if;
    return id;
end
$$;

-- Emits the task's event now, as a tick beside the due ones, also of a task that is paused. Returns the
-- event's id.
create function core.run_task_now(p_task_id uuid) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    task core.scheduled_tasks;
    at timestamptz := clock_timestamp() + (core.now() - now());
    id bigint;
begin
    update core.scheduled_tasks set last_run_at = core.now(), updated_at = core.now()
    where task_id = p_task_id
    returning * into task;
    if not found then
        return null;
    end if;
    loop
        -- Due times are whole seconds: this must not take the place of one, nor of another such run.
        if at <> date_trunc('second', at) then
            id := (core.fire_ticks(task.namespace, array[p_task_id], array[at], true)).event_ids[1];
            exit when id is not null;
        end if;
        at := at + interval '1 microsecond';
    end loop;
    return id;
end
$$;

-- Runs a task now, unless it is paused. pg_cron calls it; so can you.
create or replace function core.run_scheduled_task(p_task_id uuid) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform from core.scheduled_tasks
    where task_id = p_task_id and active and paused_at is null for update;
    if not found then
        raise notice 'scheduled task % does not exist, is not active, or is paused', p_task_id;
        return;
    end if;
    perform core.run_task_now(p_task_id);
end
$$;

create or replace view core.cron_job with (security_invoker = true) as
select t.job_id as jobid, t.cron_expression as schedule,
       format('select core.run_scheduled_task(%L)', t.task_id) as command,
       coalesce(host(inet_server_addr()), 'localhost') as nodename,
       current_setting('port')::integer as nodeport,
       current_database()::text as database, current_user::text as username,
       t.active and t.paused_at is null as active,
       format('%s_%s_%s', t.namespace, t.name, translate(t.task_id::text, '-', '_')) as jobname
from core.scheduled_tasks t;

create or replace view core.cron_job_run_details with (security_invoker = true) as
select j.jobid, k.event_id as runid, null::integer as job_pid, j.database, j.username, j.command,
       'succeeded' as status, format('emitted event %s', k.event_id) as return_message,
       k.fired_at as start_time, k.fired_at as end_time
from core.ticks k
join core.scheduled_tasks t using (task_id)
join core.cron_job j on j.jobid = t.job_id and j.command = format('select core.run_scheduled_task(%L)', t.task_id)
where k.event_id is not null;
