-- Who runs, and who wants what.
--
-- Locks: none. Workers of a previous release: there is none.

-- One version of an app. The live build that appeared last defines the app.
create table core.builds (
    namespace text not null references core.namespaces,
    app text not null,
    build_id text not null,
    first_seen_at timestamptz not null default core.now(),
    primary key (namespace, app, build_id)
);

-- Never starts over, not even when a node's row is gone: a process that wakes up after days is fenced.
create sequence core.node_epochs;

create table core.nodes (
    node_id text primary key,
    namespace text not null references core.namespaces,
    display_name text,
    description text,
    metadata jsonb not null default '{}',
    registered_at timestamptz not null default core.now(),
    last_heartbeat timestamptz not null default core.now(),
    app text,
    build_id text,
    -- The executable's file name: two different programs must not run under one app name.
    program text,
    -- Grows with each boot under the same id and fences the boot before.
    epoch bigint not null default nextval('core.node_epochs'),
    -- What the node can run: [{"group", "handler", "eventType", "eventVersion"}].
    handlers jsonb not null default '[]',
    unique (namespace, node_id)
);

create index nodes_namespace on core.nodes (namespace);

create function core.touch_node_heartbeat(p_node_id text) returns void
language sql
begin atomic
    update core.nodes set last_heartbeat = core.now() where node_id = p_node_id;
end;

-- A node that has not been heard of for this long counts as dead: five missed heartbeats.
create function core.is_live(p_last_heartbeat timestamptz) returns boolean
language sql stable parallel safe
return p_last_heartbeat > core.now() - interval '15 seconds';

-- What each app says an event type is.
create table core.event_types (
    namespace text not null references core.namespaces,
    event_type text not null,
    version integer not null,
    app text not null,
    schema jsonb not null,
    fingerprint text not null,
    registered_at timestamptz not null default core.now(),
    primary key (namespace, event_type, version, app)
);

-- A handler's durable wish for an event type. It outlives the nodes that run the handler.
create table core.subscriptions (
    subscription_id bigint generated always as identity primary key,
    namespace text not null references core.namespaces,
    group_name text not null,
    handler text not null,
    event_type text not null,
    app text not null,
    queue_name text not null,
    created_at timestamptz not null default core.now(),
    -- The clean cut: events of transactions that this snapshot did not see, and that were fanned
    -- out under an older version than this, still have to be delivered. Null once none can come.
    since_version bigint not null,
    since_snapshot pg_snapshot,
    -- No transaction that could owe us an event began before this.
    since_at timestamptz not null,
    -- The registering transaction, and later the first transaction id that can owe us nothing.
    cut_xid xid8 not null default pg_current_xact_id(),
    cut_settling boolean not null default false,
    unique (namespace, group_name, handler)
);

create index subscriptions_event_type on core.subscriptions (namespace, event_type);

-- When the oldest transaction of this database began, or a second before: a session shows what it does a moment after
-- it has begun. Sessions of other roles hide it from roles without pg_read_all_stats, as they hide their type; then a
-- day ago, which is long for an open transaction. To be asked before a snapshot is taken that it belongs to.
create function core.oldest_transaction_start() returns timestamptz
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select core.now() - interval '1 second' - (now() - least(
        now(),
        min(case when backend_type is null then now() - interval '1 day' else xact_start end),
        (select min(prepared) - interval '1 day' from pg_prepared_xacts where database = current_database())
    ))
    from pg_stat_activity
    where datname = current_database()
$$;

-- Makes subscriptions what the build declares: `p_handlers` is [{"group", "handler", "eventType"}].
-- Adds and changes, never removes: what a vanished handler was sent waits until somebody retires
-- the subscription. Returns the version that is in force afterwards.
create function core.subscribe(p_namespace text, p_app text, p_handlers jsonb) returns bigint
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
