-- Scheduled tasks that the extension pg_cron fires instead of a node.
--
-- pg_cron only says "look now", at the minute or later. What is due is computed here, from what the task
-- has fired so far: so a run that comes late, or not at all, or twice, loses and doubles no tick, and
-- needs no node. Nodes fire what pg_cron has left for a minute.
--
-- Nothing here needs the extension. Locks: ACCESS EXCLUSIVE on core.scheduled_tasks, briefly; no column is
-- rewritten. Workers of the previous release may go on: they leave such tasks alone, and a task that
-- they change is fired by nodes again.

alter table core.scheduled_tasks
    -- The expression as pg_cron reads it: five fields of numbers. Counts while scheduler is 'pg_cron'.
    add column pg_cron_schedule text;

create index scheduled_tasks_pg_cron
    on core.scheduled_tasks (namespace, coalesce(next_run_at, timestamptz 'epoch'))
    where active and paused_at is null and scheduler = 'pg_cron';

-- What is changed by hand counts from now on: due times of before, which the task missed or did not
-- have, are not fired. The columns are those that no run writes. What pg_cron was told of another
-- expression no longer holds.
create or replace function core.reschedule() returns trigger
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
    if (new.cron_expression, new.timezone) is distinct from (old.cron_expression, old.timezone) then
        new.scheduler := 'nexus';
        new.pg_cron_schedule := null;
    end if;
    if new.active and not old.active then
        new.removed_at := null;
        new.last_error := null;
    end if;
    return new;
end
$$;

-- The values of one field of a pg_cron schedule.
create function core.cron_values(p_field text, p_min integer, p_max integer) returns integer[]
language sql immutable strict
set search_path = pg_catalog, pg_temp
as $$
    select array_agg(v order by v)
    from regexp_split_to_table(p_field, ',') as item
    cross join regexp_match(item, '^(?:\*|(\d+)(?:-(\d+))?)(?:/(\d+))?$') as m
    cross join generate_series(
        coalesce(m[1]::integer, p_min),
        coalesce(m[2]::integer, m[1]::integer, p_max),
        coalesce(m[3]::integer, 1)) as v
$$;

-- The days of a pg_cron schedule, from one to another. If day-of-month and day-of-week are both
-- restricted, a day that fits one of them counts.
create function core.cron_days(p_schedule text, p_from date, p_to date) returns setof date
language sql stable strict
set search_path = pg_catalog, pg_temp
as $$
    with fields as materialized (
        select f[3] = '*' as any_day, core.cron_values(f[3], 1, 31) as days,
               core.cron_values(f[4], 1, 12) as months,
               f[5] = '*' as any_weekday, core.cron_values(f[5], 0, 6) as weekdays
        from string_to_array(p_schedule, ' ') as f
    )
    select d::date
    from fields
    cross join generate_series(p_from::timestamp, p_to::timestamp, interval '1 day') as d
    where extract(month from d) = any (months)
      and case when any_day or any_weekday
          then extract(day from d) = any (days) and extract(dow from d) = any (weekdays)
          else extract(day from d) = any (days) or extract(dow from d) = any (weekdays) end
    order by d
$$;

-- The due times of a pg_cron schedule, both bounds included. Only for time zones whose clocks are not
-- changed; pg_cron fires no others.
create function core.due_times(p_schedule text, p_timezone text, p_from timestamptz, p_to timestamptz)
returns setof timestamptz
language sql stable strict
set search_path = pg_catalog, pg_temp
as $$
    select due_at
    from core.cron_days(p_schedule, (p_from at time zone p_timezone)::date,
                        (p_to at time zone p_timezone)::date) as day
    cross join unnest(core.cron_values(split_part(p_schedule, ' ', 2), 0, 23)) as hour
    cross join unnest(core.cron_values(split_part(p_schedule, ' ', 1), 0, 59)) as minute
    cross join lateral (
        select (day + make_interval(hours => hour, mins => minute)) at time zone p_timezone) as t (due_at)
    where due_at between p_from and p_to
    order by due_at
$$;

-- The first due time after a moment. No schedule that pg_cron can have leaves more than eight years
-- out: those from one leap day to another around a year such as 2100.
create function core.next_due(p_schedule text, p_timezone text, p_after timestamptz) returns timestamptz
language sql stable strict
set search_path = pg_catalog, pg_temp
as $$
    -- The first of the days may be over.
    select min(due_at)
    from (
        select day
        from core.cron_days(p_schedule, (p_after at time zone p_timezone)::date,
                            (p_after at time zone p_timezone)::date + 3000) as day
        limit 2
    ) as days
    cross join lateral core.due_times(
        p_schedule, p_timezone, day::timestamp at time zone p_timezone,
        (day + interval '1 day') at time zone p_timezone - interval '1 minute') as due_at
    where due_at > p_after
$$;

-- Fires what is due of a task that pg_cron fires: every due time since the last one that was fired,
-- as far as the misfire policy goes. pg_cron calls it; called at any other time it does no harm.
--
-- A due time counts as missed once it is later than the grace, or a minute if that is more: pg_cron
-- itself looks at the clock once a second, and then starts a process.
create function core.fire_due(p_task_id uuid) returns void
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

-- The name of a task's job. pg_cron keeps 63 bytes of it; the task's id, which makes it unique, is kept
-- whole.
create function core.cron_job_name(p_namespace text, p_name text, p_task_id uuid) returns text
language sql immutable strict
set search_path = pg_catalog, pg_temp
as $$
    select left(p_namespace || '_' || p_name,
                greatest(0, 26 - (octet_length(p_namespace || p_name) - length(p_namespace || p_name))))
           || '_' || translate(p_task_id::text, '-', '_')
$$;

-- Makes the jobs of pg_cron, as far as they are this role's, what the tasks of an app say (null for all
-- apps), and returns how many it changed. Does nothing where pg_cron is missing or not this role's to use.
create function core.sync_cron_jobs(p_namespace text, p_app text) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    may_alter boolean;
    changed integer := 0;
    wanted record;
    job record;
    id bigint;
begin
    if not exists (select from pg_extension where extname = 'pg_cron')
        or not has_schema_privilege('cron', 'usage')
    then
        return 0;
    end if;
    may_alter := coalesce(has_function_privilege(
        to_regprocedure('cron.alter_job(bigint,text,text,text,text,boolean)')::oid, 'execute'), false);

    for job in
        select j.jobid
        from cron.job j
        left join core.scheduled_tasks t on j.command = format('select core.fire_due(%L)', t.task_id)
        where j.database = current_database() and j.username = current_user
          and starts_with(j.command, 'select core.fire_due(')
          -- Of the app, or of a task that is gone.
          and (t.namespace = p_namespace and (p_app is null or t.app = p_app)
               or t.task_id is null and starts_with(j.jobname::text, left(p_namespace || '_', 26)))
          and (t.task_id is null or not t.active or t.scheduler <> 'pg_cron'
               or j.jobname <> core.cron_job_name(t.namespace, t.name, t.task_id)
               or t.paused_at is not null and not may_alter)
    loop
        perform cron.unschedule(job.jobid);
        changed := changed + 1;
    end loop;

    for wanted in
        select t.task_id, t.job_id, t.pg_cron_schedule as schedule, t.paused_at is null as active,
               core.cron_job_name(t.namespace, t.name, t.task_id) as name,
               format('select core.fire_due(%L)', t.task_id) as command
        from core.scheduled_tasks t
        where t.namespace = p_namespace and (p_app is null or t.app = p_app)
          and t.active and t.scheduler = 'pg_cron'
          and (t.paused_at is null or may_alter)
        order by t.task_id
    loop
        select * into job from cron.job j
        where j.jobname = wanted.name and j.username = current_user;
        if not found or (job.schedule, job.command) is distinct from (wanted.schedule, wanted.command) then
            id := cron.schedule(wanted.name, wanted.schedule, wanted.command);
            changed := changed + 1;
            select * into job from cron.job j where j.jobid = id;
        end if;
        if job.active <> wanted.active then
            perform cron.alter_job(job.jobid, active => wanted.active);
            changed := changed + 1;
        end if;
        if wanted.job_id <> job.jobid then
            update core.scheduled_tasks set job_id = job.jobid where task_id = wanted.task_id;
        end if;
    end loop;
    return changed;
end
$$;

comment on function core.run_scheduled_task(uuid) is
    'Runs a task now, unless it is paused. What pg_cron calls is core.fire_due.';

create or replace view core.cron_job with (security_invoker = true) as
select t.job_id as jobid,
       case t.scheduler when 'pg_cron' then t.pg_cron_schedule else t.cron_expression end as schedule,
       case t.scheduler
           when 'pg_cron' then format('select core.fire_due(%L)', t.task_id)
           else format('select core.run_scheduled_task(%L)', t.task_id) end as command,
       coalesce(host(inet_server_addr()), 'localhost') as nodename,
       current_setting('port')::integer as nodeport,
       current_database()::text as database, current_user::text as username,
       t.active and t.paused_at is null as active,
       case t.scheduler
           when 'pg_cron' then core.cron_job_name(t.namespace, t.name, t.task_id)
           else format('%s_%s_%s', t.namespace, t.name, translate(t.task_id::text, '-', '_')) end as jobname
from core.scheduled_tasks t;

comment on view core.cron_job is
    'The scheduled tasks in the columns of pg_cron''s cron.job, whoever fires them.';

create or replace view core.cron_job_run_details with (security_invoker = true) as
select j.jobid, k.event_id as runid, null::integer as job_pid, j.database, j.username, j.command,
       'succeeded' as status, format('emitted event %s', k.event_id) as return_message,
       k.fired_at as start_time, k.fired_at as end_time
from core.ticks k
join core.scheduled_tasks t using (task_id)
join core.cron_job j on j.jobid = t.job_id
    and j.command in (format('select core.fire_due(%L)', t.task_id),
                      format('select core.run_scheduled_task(%L)', t.task_id))
where k.event_id is not null;
