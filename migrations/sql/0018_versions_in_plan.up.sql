-- Who takes which version of an event type belongs to the version of the namespace's subscriptions, too: a
-- client that knows the subscriptions as of a version knows all of them, and its emits need not read them again.
--
-- Locks: none. Workers of the previous release may keep running.

-- Derives other_versions, within each group, from what the handlers take.
create or replace function core.assign_versions(p_namespace text) returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    with changed as (
        update core.subscriptions s
        set other_versions = w.versions
        from (
            select o.subscription_id,
                   coalesce(array_agg(distinct other.event_version)
                                filter (where other.event_version <> o.event_version), '{}') as versions
            from core.subscriptions o
            join core.subscriptions other using (namespace, group_name, event_type)
            where o.namespace = p_namespace
            group by o.subscription_id
        ) w
        where s.subscription_id = w.subscription_id and s.other_versions <> w.versions
        returning 1
    )
    update core.namespaces set subscriptions_version = subscriptions_version + 1
    where namespace = p_namespace and exists (select from changed)
$$;
