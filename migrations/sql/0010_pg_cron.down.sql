-- Locks: ACCESS EXCLUSIVE on core.scheduled_tasks. No worker may be running. What pg_cron fired is fired
-- by nodes again; its jobs are removed as far as they are this role's.

update core.scheduled_tasks set scheduler = 'nexus' where scheduler = 'pg_cron';

do $$
begin
    perform core.sync_cron_jobs(namespace, null) from core.namespaces;
end
$$;

comment on function core.run_scheduled_task(uuid) is null;

create or replace view core.cron_job with (security_invoker = true) as
select t.job_id as jobid, t.cron_expression as schedule,
       format('select core.run_scheduled_task(%L)', t.task_id) as command,
       coalesce(host(inet_server_addr()), 'localhost') as nodename,
       current_setting('port')::integer as nodeport,
       current_database()::text as database, current_user::text as username,
       t.active and t.paused_at is null as active,
       format('%s_%s_%s', t.namespace, t.name, translate(t.task_id::text, '-', '_')) as jobname
from core.scheduled_tasks t;

comment on view core.cron_job is 'The scheduled tasks in the columns of pg_cron''s cron.job.';

create or replace view core.cron_job_run_details with (security_invoker = true) as
select j.jobid, k.event_id as runid, null::integer as job_pid, j.database, j.username, j.command,
       'succeeded' as status, format('emitted event %s', k.event_id) as return_message,
       k.fired_at as start_time, k.fired_at as end_time
from core.ticks k
join core.scheduled_tasks t using (task_id)
join core.cron_job j on j.jobid = t.job_id and j.command = format('select core.run_scheduled_task(%L)', t.task_id)
where k.event_id is not null;

drop function core.sync_cron_jobs(text, text);
drop function core.cron_job_name(text, text, uuid);
drop function core.fire_due(uuid);
drop function core.next_due(text, text, timestamptz);
drop function core.due_times(text, text, timestamptz, timestamptz);
drop function core.cron_days(text, date, date);
drop function core.cron_values(text, integer, integer);

-- What is changed by hand counts from now on: due times of before, which the task missed or did not
-- have, are not fired. The columns are those that no run writes.
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
    if new.active and not old.active then
        new.removed_at := null;
        new.last_error := null;
    end if;
    return new;
end
$$;

drop index core.scheduled_tasks_pg_cron;
alter table core.scheduled_tasks drop column pg_cron_schedule;
