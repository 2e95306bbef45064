-- Everything of nexus is in schema core; the queues went with 0002, schema pgmq stays.
-- Locks: ACCESS EXCLUSIVE on every table of the schema. No worker may be running.

drop schema core cascade;
