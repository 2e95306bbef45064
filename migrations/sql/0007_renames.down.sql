-- What still carries a former name waits for a handler of that name.

drop table core.renames;

create or replace function core.subscribe(p_namespace text, p_app text, p_handlers jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    version bigint;
    changed boolean;
begin
    -- Serializes registrations in the namespace; emits only read the row and are not held up.
    select subscriptions_version into version from core.namespaces
    where namespace = p_namespace for no key update;

    with wanted as (
        select h ->> 'group' as group_name, h ->> 'handler' as handler, h ->> 'eventType' as event_type
        from jsonb_array_elements(p_handlers) h
    ), stored as (
        insert into core.subscriptions as s
            (namespace, group_name, handler, event_type, app, queue_name, since_version, since_snapshot, since_at)
        select p_namespace, w.group_name, w.handler, w.event_type, p_app,
               core.queue_name(p_namespace, w.group_name), version + 1, pg_current_snapshot(),
               core.oldest_transaction_start()
        from wanted w
        on conflict (namespace, group_name, handler) do update
            set event_type = excluded.event_type, app = excluded.app,
                since_version = excluded.since_version, since_snapshot = excluded.since_snapshot,
                since_at = excluded.since_at, cut_xid = excluded.cut_xid, cut_settling = false
            where s.event_type <> excluded.event_type
        returning 1
    )
    select exists (select from stored) into changed;

    if changed then
        version := version + 1;
        update core.namespaces set subscriptions_version = version where namespace = p_namespace;
    end if;
    return version;
end
$$;

alter table core.subscriptions drop column first_snapshot;
