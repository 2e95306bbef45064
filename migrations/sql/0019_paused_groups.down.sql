-- Locks: core.groups, for a moment. No worker may be running; paused groups go on.

drop function core.pause_group(text, text);
drop function core.resume_group(text, text);
drop function core.set_paused(text, text, boolean);
alter table core.groups drop column paused_at;
