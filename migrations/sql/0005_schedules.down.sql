-- Locks: ACCESS EXCLUSIVE on the tables. No worker may be running.

drop view core.cron_job_run_details;
drop view core.cron_job;
drop function core.run_scheduled_task(uuid);
drop function core.fire_tick(uuid, timestamptz, timestamptz);
drop table core.ticks;
drop table core.scheduled_tasks;
