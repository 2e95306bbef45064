-- What was retired stays so; messages that its queue still gets wait there.
--
-- Locks: ACCESS EXCLUSIVE on core.subscriptions. Nodes of this release may not be running.

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
        select h ->> 'group' as group_name, h ->> 'handler' as handler, h ->> 'eventType' as event_type,
               (h ->> 'eventVersion')::integer as event_version, h ->> 'from' as history,
               not exists (select from core.subscriptions s
                           where (s.namespace, s.group_name, s.handler) = (p_namespace, h ->> 'group', h ->> 'handler'))
                   as is_new
        from jsonb_array_elements(p_handlers) h
    ), stored as (
        insert into core.subscriptions as s
            (namespace, group_name, handler, event_type, event_version, app, queue_name,
             since_version, since_snapshot, first_snapshot, since_at)
        select p_namespace, w.group_name, w.handler, w.event_type, w.event_version, p_app,
               core.queue_name(p_namespace, w.group_name), version + 1, pg_current_snapshot(), pg_current_snapshot(),
               core.oldest_transaction_start()
        from wanted w
        on conflict (namespace, group_name, handler) do update
            set event_type = excluded.event_type, event_version = excluded.event_version, app = excluded.app,
                since_version = excluded.since_version, since_snapshot = excluded.since_snapshot,
                first_snapshot = excluded.first_snapshot, since_at = excluded.since_at,
                cut_xid = excluded.cut_xid, cut_settling = false
            where s.event_type <> excluded.event_type
        returning *
    ), replays as (
        insert into core.replays
            (namespace, group_name, handler, from_at, subscription_ids, queue_name, snapshot, last_at, position_at)
        select p_namespace, s.group_name, s.handler, h.from_at, array[s.subscription_id], s.queue_name,
               s.first_snapshot, core.newest_event(p_namespace, array[s.event_type]), coalesce(h.from_at, '-infinity')
        from stored s
        join wanted w using (group_name, handler)
        cross join lateral (select nullif(w.history, 'beginning')::timestamptz as from_at) h
        where w.is_new and w.history is not null
    )
    select exists (select from stored) into changed;

    update core.subscriptions s
    set event_version = (h ->> 'eventVersion')::integer
    from jsonb_array_elements(p_handlers) h
    where (s.namespace, s.group_name, s.handler) = (p_namespace, h ->> 'group', h ->> 'handler')
      and s.event_version is distinct from (h ->> 'eventVersion')::integer;
    perform core.assign_versions(p_namespace);

    if changed then
        version := version + 1;
        update core.namespaces set subscriptions_version = version where namespace = p_namespace;
    end if;
    return version;
end
$$;

create or replace function core.settle_subscriptions(p_namespace text) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s core.subscriptions;
    e record;
    target jsonb;
    snapshot_now pg_snapshot;
    sent integer := 0;
begin
    for s in
        select * from core.subscriptions
        where namespace = p_namespace and since_snapshot is not null
        order by subscription_id for update skip locked
    loop
        -- One statement, hence one snapshot: what it sees and what is noted as seen agree.
        select pg_current_snapshot(),
            array(
                select row(l.event_id, l.emitted_at)::core.log_position
                from core.event_log l
                where l.namespace = s.namespace and l.event_type = s.event_type
                  and l.emitted_at >= s.since_at and l.subscriptions_version < s.since_version
                  and not pg_visible_in_snapshot(l.tx_id, s.since_snapshot)
                order by l.event_id
            ) as owed
        into e;
        snapshot_now := e.pg_current_snapshot;
        target := jsonb_build_array(jsonb_build_object(
            'id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler, 'others', s.other_versions));
        for e in
            select l.event_id, l.event_version, core.logged_envelope(l) as body, core.logged_trace(l) as trace
            from unnest(e.owed) o
            join core.event_log l on (l.event_id, l.emitted_at) = (o.event_id, o.emitted_at)
        loop
            sent := sent + core.fan_out(target, e.event_id, e.event_version, e.body, e.trace);
        end loop;

        -- The cut is over in two steps. First no snapshot may be in use that was taken before the
        -- registration committed; sessions of other roles show theirs to everybody, but not their
        -- type. Then every transaction that wrote under such a snapshot must have ended.
        if not s.cut_settling then
            if not exists (
                select from pg_stat_activity
                where datname = current_database() and pid <> pg_backend_pid()
                  and backend_type is distinct from 'autovacuum worker'
                  and age(backend_xmin) >= age(s.cut_xid::xid)
            ) then
                update core.subscriptions
                set cut_settling = true, cut_xid = pg_snapshot_xmax(pg_current_snapshot()),
                    since_snapshot = snapshot_now
                where subscription_id = s.subscription_id;
            else
                update core.subscriptions set since_snapshot = snapshot_now
                where subscription_id = s.subscription_id;
            end if;
        else
            update core.subscriptions
            set since_snapshot = case when pg_snapshot_xmin(snapshot_now) >= s.cut_xid then null else snapshot_now end
            where subscription_id = s.subscription_id;
        end if;
    end loop;
    return sent;
end
$$;

drop function core.retire_version(text, text, text, integer, text, integer);
drop function core.move_retired(bigint, integer);
drop function core.retire(text, text, text, text);
drop function core.move_leftovers(text, bigint[], text, text);
drop table core.retirements;
alter table core.subscriptions drop column owed_from;
