-- Locks: ACCESS EXCLUSIVE on the keys. No worker may be running.

drop function core.adopt(text, text, integer, integer);
drop function core.dead_letter(text, bigint, integer, text, text, integer, jsonb);
drop function core.emit(text, text, jsonb, jsonb);
drop function core.fan_out(jsonb, bigint, integer, jsonb, jsonb);
drop function core.plan_fan_out(text, text);
drop type core.fan_out_plan;
drop function core.headers(bigint, integer, bigint, text, jsonb);
drop function core.envelope(text, text, jsonb, timestamptz, text, integer, text, text, text);
drop function core.iso_time(timestamptz);
drop function core.event_fingerprint(text, jsonb);
drop table core.idempotency_keys;
