-- Drops nexus's queues with all messages in them. Schema pgmq and the queues of others stay.
-- Locks: ACCESS EXCLUSIVE on each queue. No worker may be running.

do $$
declare
    queue text;
begin
    -- Restored first: where the queue's table is gone, drop_queue would leave its archive behind.
    for queue in select core.ensure_group(namespace, group_name) from core.groups loop
        perform pgmq.drop_queue(queue);
        perform pgmq.drop_queue(queue || '_dlq');
    end loop;
end
$$;

drop view core.queue_metrics;
drop function core.ensure_group(text, text);
drop function core.tune_queue(text, boolean);
drop table core.groups;
