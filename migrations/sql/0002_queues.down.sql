-- Drops nexus's queues with all messages in them. Schema pgmq and the queues of others stay.
-- Locks: ACCESS EXCLUSIVE on each queue. No worker may be running.

do $$
declare
    queue text;
begin
    for queue in select queue_name from core.groups loop
        perform pgmq.drop_queue(queue);
        perform pgmq.drop_queue(queue || '_dlq');
    end loop;
end
$$;

drop view core.queue_metrics;
drop function core.ensure_group(text, text);
drop function core.tune_queue(text, boolean);
drop table core.groups;
