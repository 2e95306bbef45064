-- Locks: ACCESS EXCLUSIVE on the tables. No worker may be running.

drop function core.subscribe(text, text, jsonb);
drop function core.oldest_transaction_start();
drop table core.subscriptions;
drop table core.event_types;
drop function core.is_live(timestamptz);
drop function core.touch_node_heartbeat(text);
drop table core.nodes;
drop sequence core.node_epochs;
drop table core.builds;
