-- Handlers that have another name than before, and what still carries the old one.
--
-- A build that renames a handler changes its subscription at once. Messages and dead letters follow in
-- batches, because a queue may hold millions, and some of them are written after the rename by
-- transactions that began before it.
--
-- Locks: ACCESS EXCLUSIVE on core.subscriptions, briefly; it is small, and no column is rewritten.
-- Workers of the previous release may keep running: they finish what they have claimed, and verdicts do not
-- go by the handler's name.

create table core.renames (
    namespace text not null references core.namespaces,
    group_name text not null,
    former text not null,
    handler text not null,
    -- Both names were subscribed when the rename came: since_version, first_snapshot and since_at of the
    -- handler's own subscription, by which every event is known that was sent to the handler as well, or
    -- is owed to it. Such a message that waits for the former name is left out. Null if only the former
    -- name was subscribed.
    both_since bigint,
    both_snapshot pg_snapshot,
    both_at timestamptz,
    -- Dead letters up to this message have been looked at.
    letters_until bigint not null default 0,
    renamed_at timestamptz not null default core.now(),
    primary key (namespace, group_name, former),
    check (former <> handler)
);

comment on table core.renames is
    'Names that handlers had before. What waits for a former name is moved to the handler by its nodes.';

-- The clean cut's since_snapshot as it was first. That one moves on with what is sent and ends as null,
-- while this one tells for good which earlier events the subscription was owed. Null for a
-- subscription from before this column whose cut was over.
alter table core.subscriptions add column first_snapshot pg_snapshot;

update core.subscriptions set first_snapshot = since_snapshot where since_snapshot is not null;

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
            (namespace, group_name, handler, event_type, app, queue_name,
             since_version, since_snapshot, first_snapshot, since_at)
        select p_namespace, w.group_name, w.handler, w.event_type, p_app,
               core.queue_name(p_namespace, w.group_name), version + 1, pg_current_snapshot(), pg_current_snapshot(),
               core.oldest_transaction_start()
        from wanted w
        on conflict (namespace, group_name, handler) do update
            set event_type = excluded.event_type, app = excluded.app,
                since_version = excluded.since_version, since_snapshot = excluded.since_snapshot,
                first_snapshot = excluded.first_snapshot, since_at = excluded.since_at,
                cut_xid = excluded.cut_xid, cut_settling = false
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
