-- Scheduled tasks and their ticks.
--
-- Locks: none. Workers of a previous release: there is none.

create table core.scheduled_tasks (
    task_id uuid primary key default gen_random_uuid(),
    namespace text not null references core.namespaces,
    -- pg_cron's id of the job, if pg_cron fires the task.
    job_id bigint,
    name text not null,
    cron_expression text not null,
    event_type text not null,
    payload jsonb not null default '{}',
    timezone text,
    active boolean not null default true,
    created_at timestamptz not null default core.now(),
    updated_at timestamptz not null default core.now(),
    -- The app that declares the task; null for tasks made by hand.
    app text,
    scheduler text not null default 'nexus' check (scheduler in ('nexus', 'pg_cron')),
    -- When the task is due; null until a node has computed it.
    next_run_at timestamptz,
    last_run_at timestamptz,
    unique (namespace, name)
);

create index scheduled_tasks_namespace on core.scheduled_tasks (namespace);
create index scheduled_tasks_due on core.scheduled_tasks (namespace, next_run_at) where active;

-- A moment at which a task was due. The key is what makes a tick happen once in the cluster.
create table core.ticks (
    task_id uuid not null references core.scheduled_tasks on delete cascade,
    due_at timestamptz not null,
    event_id bigint not null,
    fired_at timestamptz not null default core.now(),
    primary key (task_id, due_at)
);

create index ticks_fired_at on core.ticks (fired_at);

-- Emits the task's event for one due time; null if that tick has been fired already.
create function core.fire_tick(p_task_id uuid, p_due_at timestamptz, p_next_run_at timestamptz)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    task core.scheduled_tasks;
    id bigint := nextval('core.event_log_event_id_seq');
    at timestamptz := core.now();
    plan core.fan_out_plan;
begin
    update core.scheduled_tasks
    set next_run_at = coalesce(p_next_run_at, next_run_at), last_run_at = at, updated_at = at
    where task_id = p_task_id
    returning * into task;

    insert into core.ticks (task_id, due_at, event_id) values (p_task_id, p_due_at, id)
    on conflict do nothing;
    if not found then
        return null;
    end if;

    plan := core.plan_fan_out(task.namespace, task.event_type);
    insert into core.event_log
        (event_id, namespace, event_type, payload, emitted_at, producer_node_id, scheduled_task_id,
         metadata, correlation_id, subscriptions_version)
    values (id, task.namespace, task.event_type, task.payload, at, 'scheduler', p_task_id,
            jsonb_build_object('jobId', task.job_id, 'dueAt', core.iso_time(p_due_at)), id::text,
            plan.version);
    perform core.fan_out(plan.targets, id, 1,
        core.envelope(task.namespace, task.event_type, task.payload, at, 'scheduler', 1, null, id::text, null)
            || jsonb_build_object('scheduledTaskId', p_task_id, 'dueAt', core.iso_time(p_due_at)));
    return id;
end
$$;

-- Runs a task now. pg_cron calls it; so can you.
create function core.run_scheduled_task(p_task_id uuid) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform from core.scheduled_tasks where task_id = p_task_id and active for update;
    if not found then
        raise notice 'scheduled task % does not exist or is not active', p_task_id;
        return;
    end if;
    perform core.fire_tick(p_task_id, clock_timestamp() + (core.now() - now()), null);
end
$$;
