-- Locks: ACCESS EXCLUSIVE on core.scheduled_tasks. Former names of scheduled tasks are forgotten.

-- Further down there are no paused tasks, only inactive ones. Without an app they are not taken for tasks that
-- their app has removed, which a deployment makes active again.
update core.scheduled_tasks set app = null where paused_at is not null and app is not null;

-- Fires what is due of a task that pg_cron fires: every due time since the last one that was fired,
-- as far as the misfire policy goes. pg_cron calls it; called at any other time it does no harm.
--
-- A due time counts as missed once it is later than the grace, or a minute if that is more: pg_cron
-- itself looks at the clock once a second, and then starts a process.
create or replace function core.fire_due(p_task_id uuid) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    task core.scheduled_tasks;
    zone text;
    due timestamptz[];
    missed integer;
    left_out integer;
begin
    -- Nodes fire under the same lock.
    select * into task from core.scheduled_tasks where task_id = p_task_id for update;
    if task.task_id is null or not task.active or task.paused_at is not null
        or task.scheduler <> 'pg_cron'
    then
        raise notice 'scheduled task % does not exist, is not active, is paused, or is fired by nodes', p_task_id;
        return;
    end if;
    zone := coalesce(task.timezone, 'UTC');
    task.next_run_at := coalesce(task.next_run_at,
                                 core.next_due(task.pg_cron_schedule, zone, task.due_after));
    if task.next_run_at > core.now() then
        update core.scheduled_tasks set next_run_at = task.next_run_at
        where task_id = p_task_id and next_run_at is null;
        raise notice 'scheduled task % is not due before %', p_task_id, task.next_run_at;
        return;
    end if;

    -- Somebody may have set the first of them by hand.
    due := array(
        select task.next_run_at
        union
        select * from core.due_times(task.pg_cron_schedule, zone, task.next_run_at, core.now())
        order by 1);
    select count(*) into missed from unnest(due) as due_at
    where due_at < core.now() - greatest(task.grace_ms, 60000) * interval '1 millisecond';
    left_out := greatest(0, missed - case task.misfire_policy
        when 'skip' then 0 when 'fire_once' then 1 else task.misfire_cap end);
    if left_out > 0 then
        insert into core.ticks (task_id, due_at, left_out_from, left_out)
        values (p_task_id, due[left_out], due[1], case when left_out <= 1000 then left_out end)
        on conflict do nothing;
        due := due[left_out + 1:];
    end if;
    if cardinality(due) > 0 then
        perform core.fire_ticks(
            task.namespace, array_fill(p_task_id, array[cardinality(due)]), due, false);
    end if;
    update core.scheduled_tasks
    set next_run_at = core.next_due(task.pg_cron_schedule, zone, core.now()),
        last_run_at = case when cardinality(due) > 0 then core.now() else last_run_at end,
        updated_at = core.now()
    where task_id = p_task_id;
end
$$;

alter table core.scheduled_tasks drop column formerly;
