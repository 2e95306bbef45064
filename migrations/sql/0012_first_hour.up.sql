-- Renames of scheduled tasks that are kept, and a bound on what one run of pg_cron has to look at.
--
-- Locks: ACCESS EXCLUSIVE on core.scheduled_tasks, briefly; no column is rewritten. Workers of the previous
-- release may go on.

-- Names that the task had before, oldest first: a build from before a rename, which defines the app after a
-- roll-back, finds the task by them.
alter table core.scheduled_tasks add column formerly text[] not null default '{}';

-- Fires what is due of a task that pg_cron fires: every due time since the last one that was fired,
-- as far as the misfire policy goes. pg_cron calls it; called at any other time it does no harm.
--
-- A due time counts as missed once it is later than the grace, or a minute if that is more: pg_cron
-- itself looks at the clock once a second, and then starts a process.
--
-- An outage may have lasted for years. No more due times are computed than count: of the missed ones the
-- newest that are fired and a thousand that are left out, which then need no counting. One run fires no
-- more than a thousand ticks and eight megabytes of payloads; what is left is due at once.
create or replace function core.fire_due(p_task_id uuid) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    most_left_out constant integer := 1000;
    task core.scheduled_tasks;
    zone text;
    missed_until timestamptz;
    span interval;
    bound timestamptz;
    cap integer;
    most integer;
    left_out integer;
    missed timestamptz[] := '{}';
    due timestamptz[] := '{}';
    next_at timestamptz;
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

    missed_until := core.now() - greatest(task.grace_ms, 60000) * interval '1 millisecond';
    cap := case task.misfire_policy when 'skip' then 0 when 'fire_once' then 1 else task.misfire_cap end;
    most := greatest(1, least(1000, 8388608 / octet_length(task.payload::text)));

    -- Backwards, until there are enough.
    span := interval '1 day';
    while task.next_run_at < missed_until loop
        bound := greatest(task.next_run_at, missed_until - span);
        missed := array(
            select due_at from core.due_times(task.pg_cron_schedule, zone, bound, missed_until) as due_at
            where due_at < missed_until
            -- Somebody may have set the first of them by hand.
            union
            select task.next_run_at where bound = task.next_run_at
            order by 1);
        exit when bound = task.next_run_at or cardinality(missed) > cap + most_left_out;
        span := span * 4;
    end loop;
    left_out := greatest(0, cardinality(missed) - cap);
    if left_out > 0 then
        insert into core.ticks (task_id, due_at, left_out_from, left_out)
        values (p_task_id, missed[left_out], task.next_run_at,
                case when bound = task.next_run_at and left_out <= most_left_out then left_out end)
        on conflict do nothing;
        missed := missed[left_out + 1:];
    end if;

    -- Forwards, for what is within the grace, until there are more than are fired.
    span := interval '1 hour';
    while cardinality(missed) <= most loop
        bound := least(core.now(), greatest(task.next_run_at, missed_until) + span);
        due := array(
            select due_at from core.due_times(task.pg_cron_schedule, zone,
                                              greatest(task.next_run_at, missed_until), bound) as due_at
            union
            select task.next_run_at where task.next_run_at >= missed_until
            order by 1);
        exit when bound = core.now() or cardinality(missed || due) > most;
        span := span * 4;
    end loop;
    due := missed || due;
    next_at := due[most + 1];
    due := due[:most];
    if cardinality(due) > 0 then
        perform core.fire_ticks(
            task.namespace, array_fill(p_task_id, array[cardinality(due)]), due, false);
    end if;
    update core.scheduled_tasks
    set next_run_at = coalesce(next_at, core.next_due(task.pg_cron_schedule, zone, core.now())),
        last_run_at = case when cardinality(due) > 0 then core.now() else last_run_at end,
        updated_at = core.now()
    where task_id = p_task_id;
end
$$;
