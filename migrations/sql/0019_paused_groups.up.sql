-- Groups that are paused: no message of theirs is claimed until they are resumed.
--
-- Locks: core.groups, for a moment. Workers of the previous release may keep running; to them no group is paused.

alter table core.groups add column paused_at timestamptz;

comment on column core.groups.paused_at is
    'Since when no message of the group is claimed; null while they are. Set by core.pause_group and core.resume_group.';

-- Pauses or resumes; false if the group was that already.
create function core.set_paused(p_namespace text, p_group text, p_is_paused boolean) returns boolean
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.require_access('app', p_namespace);
    update core.groups set paused_at = case when p_is_paused then core.now() end
    where namespace = p_namespace and group_name = p_group and (paused_at is not null) <> p_is_paused;
    if found then
        return true;
    end if;
    -- Refuses a group that is not there.
    perform core.letters_table(p_namespace, p_group);
    return false;
end
$$;

-- Keeps all nodes from claiming messages of a group. What they have claimed already is handled. False if it is paused.
create function core.pause_group(p_namespace text, p_group text) returns boolean
language sql
set search_path = pg_catalog, pg_temp
begin atomic
    select core.set_paused(p_namespace, p_group, true);
end;

-- Lets the messages of a group be claimed again; nodes see it at their next poll. False if it is not paused.
create function core.resume_group(p_namespace text, p_group text) returns boolean
language sql
set search_path = pg_catalog, pg_temp
begin atomic
    select core.set_paused(p_namespace, p_group, false);
end;

revoke all on function core.set_paused(text, text, boolean) from public;
select core.refresh_roles();
