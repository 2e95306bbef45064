-- Locks: ACCESS EXCLUSIVE on core.scheduled_tasks and core.ticks. No worker may be running. What was left
-- out is forgotten, paused tasks become inactive, and tasks emit version 1 without a key.

drop trigger reschedule on core.scheduled_tasks;
drop function core.reschedule();

update core.scheduled_tasks set active = false where paused_at is not null;

-- Emits the task's event for one due time; null if that tick has been fired already.
create or replace function core.fire_tick(p_task_id uuid, p_due_at timestamptz, p_next_run_at timestamptz)
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
create or replace function core.run_scheduled_task(p_task_id uuid) returns void
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

-- What the original system's queries read from cron.job and cron.job_run_details, which exist only
-- where pg_cron is installed: the same columns, for the tasks that nexus fires itself.
create or replace view core.cron_job with (security_invoker = true) as
select t.job_id as jobid, t.cron_expression as schedule,
       format('select core.run_scheduled_task(%L)', t.task_id) as command,
       coalesce(host(inet_server_addr()), 'localhost') as nodename,
       current_setting('port')::integer as nodeport,
       current_database()::text as database, current_user::text as username, t.active,
       format('%s_%s_%s', t.namespace, t.name, translate(t.task_id::text, '-', '_')) as jobname
from core.scheduled_tasks t;

create or replace view core.cron_job_run_details with (security_invoker = true) as
select j.jobid, k.event_id as runid, null::integer as job_pid, j.database, j.username, j.command,
       'succeeded' as status, format('emitted event %s', k.event_id) as return_message,
       k.fired_at as start_time, k.fired_at as end_time
from core.ticks k
join core.scheduled_tasks t using (task_id)
join core.cron_job j on j.jobid = t.job_id and j.command = format('select core.run_scheduled_task(%L)', t.task_id);

drop function core.run_task_now(uuid);
drop function core.fire_ticks(text, uuid[], timestamptz[], boolean);

delete from core.ticks where event_id is null;
alter table core.ticks
    drop column left_out,
    drop column left_out_from,
    drop column is_manual,
    alter column event_id set not null;

drop index core.scheduled_tasks_due;
create index scheduled_tasks_due on core.scheduled_tasks (namespace, next_run_at) where active;

alter table core.scheduled_tasks
    drop constraint finite,
    drop constraint event_type_fits,
    drop column due_after,
    drop column put_off_until,
    drop column last_error,
    drop column removed_at,
    drop column paused_at,
    drop column grace_ms,
    drop column misfire_cap,
    drop column misfire_policy,
    drop column event_key,
    drop column event_version,
    reset (fillfactor, autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold,
           autovacuum_vacuum_cost_delay);
