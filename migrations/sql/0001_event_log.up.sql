-- The event log, the namespaces it is divided by, and the clock that everything here is told by.
--
-- Locks: none that anybody could wait for; every object is new.
-- Workers of a previous release: there is none.

create schema core;

comment on schema core is 'nexus: typed events on Postgres';

-- Which of these files have been applied.
create table core.schema_migrations (
    version integer primary key,
    name text not null,
    -- Of the file as it was applied: a file that was edited afterwards is found out.
    checksum text not null,
    applied_at timestamptz not null default now()
);

-- The time, for every statement of nexus. It inlines to now(), so an index on a time is still used;
-- the test kit replaces it to move the clock.
--
-- Functions that should inline cannot pin a search_path; `return` and `begin atomic` bind the names
-- in them here and now instead.
create function core.now() returns timestamptz
language sql stable parallel safe
return now();

-- How a name appears inside the name of a queue. pgmq lower-cases the names of tables, and a
-- hyphen needs quoting everywhere, so names that differ only there are one queue. The collation
-- keeps an I an i where the database's own makes it something else (Turkish).
create function core.queue_part(p_name text) returns text
language sql immutable strict parallel safe
return lower(translate(p_name, '-', '_') collate "C");

-- The one place that knows how a queue is called.
create function core.queue_name(p_namespace text, p_group text) returns text
language sql immutable strict parallel safe
return 'core_events_' || core.queue_part(p_namespace)
    || case when core.queue_part(p_group) = 'default' then ''
            else '__' || core.queue_part(p_group) end;

create function core.queue_name_for_namespace(p_namespace text) returns text
language sql immutable strict parallel safe
return core.queue_name(p_namespace, 'default');

create function core.dead_letter_queue_name_for_namespace(p_namespace text) returns text
language sql immutable strict parallel safe
return core.queue_name_for_namespace(p_namespace) || '_dlq';

-- Raises with the reason when a namespace or group cannot name a queue. Returns true, so that it
-- can stand in a CHECK.
create function core.check_name(p_what text, p_name text) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    reason text;
    part text := core.queue_part(p_name);
begin
    reason := case
        when p_name is null or p_name = '' then 'it is empty'
        when p_name !~ '^[A-Za-z]' then 'it must start with a letter'
        when p_name !~ '^[A-Za-z0-9_-]+$' then 'only letters, digits, _ and - are allowed'
        when part ~ '__' then '__ separates namespace and group in the names of queues'
        when part ~ '_$' then 'it must not end in _ or -'
        when part ~ '_dlq$' then 'names that end in _dlq belong to dead-letter queues'
    end;
    if reason is not null then
        raise exception '% "%" is refused: %', p_what, p_name, reason
            using errcode = 'invalid_parameter_value';
    end if;
    return true;
end
$$;

-- The same for the two names together: pgmq allows 47 characters, and the dead-letter queue's name
-- is the longest one.
create function core.check_queue_name(p_namespace text, p_group text) returns boolean
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
declare
    longest text := core.queue_name(p_namespace, p_group) || '_dlq';
begin
    perform core.check_name('namespace', p_namespace), core.check_name('group', p_group);
    if length(longest) > 47 then
        raise exception 'namespace "%" with group "%" is refused: the queue name % has % characters, pgmq allows 47',
            p_namespace, p_group, longest, length(longest)
            using errcode = 'invalid_parameter_value',
                  hint = format('shorten the namespace or the group by %s characters', length(longest) - 47);
    end if;
    return true;
end
$$;

create table core.namespaces (
    namespace text primary key
        check (core.check_queue_name(namespace, 'default')),
    created_at timestamptz not null default core.now(),
    metadata jsonb not null default '{}',
    -- Grows with every change of the namespace's subscriptions. An emit that was planned under
    -- another version stores nothing, so a stale cache can never lose a delivery.
    subscriptions_version bigint not null default 0
);

create unique index namespaces_queue_part on core.namespaces (core.queue_part(namespace));

create table core.event_log (
    event_id bigserial,
    namespace text not null,
    event_type text not null,
    payload jsonb not null,
    emitted_at timestamptz not null default core.now(),
    producer_node_id text not null,
    scheduled_task_id uuid,
    metadata jsonb not null default '{}',
    event_version integer not null default 1,
    key text,
    correlation_id text,
    causation_id text,
    -- The transaction that emitted. A sequence number is no position in the log: a lower one may
    -- commit later.
    tx_id xid8 not null default pg_current_xact_id(),
    -- The version of the namespace's subscriptions that the event was fanned out under. Null if it
    -- was appended only, so that nobody is owed a delivery.
    subscriptions_version bigint,
    primary key (event_id, emitted_at)
) partition by range (emitted_at);

-- Half of a 2 KB payload's cost was pglz (measured: lz4 is 22 to 38 % faster).
do $$
begin
    alter table core.event_log alter column payload set compression lz4;
exception when feature_not_supported then
    null; -- a server that was built without lz4 keeps its default
end
$$;

create index event_log_type on core.event_log (namespace, event_type, emitted_at);
create index event_log_emitted_at on core.event_log using brin (emitted_at);

create function core.refuse_change_of_event_log() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'core.event_log is append-only: % is refused', tg_op
        using errcode = 'restrict_violation',
              hint = 'old partitions are dropped as a whole when the retention has passed';
end
$$;

create trigger append_only before update or delete or truncate on core.event_log
    for each statement execute function core.refuse_change_of_event_log();
-- Also in sessions that have triggers turned off by session_replication_role.
alter table core.event_log enable always trigger append_only;

-- Creates and attaches the monthly partitions from the current month on. A partition is created
-- plain and then attached: `create table … partition of` takes a lock on the log that one open
-- emit would hold up, and every other emit would queue behind it.
create function core.ensure_partitions(p_months_ahead integer default 12) returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
set timezone = 'UTC'
as $$
declare
    first_month timestamptz := date_trunc('month', core.now());
    month timestamptz;
    name text;
    created integer := 0;
begin
    perform pg_advisory_xact_lock(hashtextextended('nexus: partitions', 0));
    for i in 0 .. p_months_ahead loop
        month := first_month + make_interval(months => i);
        name := 'event_log_' || to_char(month, 'YYYY_MM');
        if to_regclass('core.' || name) is null then
            execute format('create table core.%I (like core.event_log including all)', name);
            execute format(
                'create trigger append_only before update or delete or truncate on core.%I
                     for each statement execute function core.refuse_change_of_event_log()', name);
            execute format('alter table core.%I enable always trigger append_only', name);
            execute format('alter table core.event_log attach partition core.%I for values from (%L) to (%L)',
                name, month, month + interval '1 month');
            created := created + 1;
        end if;
    end loop;
    return created;
end
$$;

revoke all on function core.ensure_partitions(integer) from public;

-- The partitions that ended before the retention, oldest first. One whose concurrent detach was
-- interrupted is `detach pending` and must be finalized; one that was detached and then not dropped
-- is `detached`. Only those that were marked by the comment 'expired' are ours to drop then: what
-- somebody detached by hand is theirs.
create function core.expired_partitions(p_retention interval)
returns table (name text, state text)
language sql stable
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
as $$
    select c.relname::text,
           case when i.inhparent is null then 'detached'
                when i.inhdetachpending then 'detach pending'
                else 'attached' end
    from pg_class c
    left join pg_inherits i on i.inhrelid = c.oid and i.inhparent = 'core.event_log'::regclass
    where c.relnamespace = 'core'::regnamespace and c.relkind = 'r'
      and c.relname ~ '^event_log_[0-9]{4}_[0-9]{2}$'
      and (i.inhparent is not null or obj_description(c.oid, 'pg_class') = 'expired')
      and to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month' <= core.now() - p_retention
    order by c.relname
$$;

create function core.append_event_log(
    p_namespace text,
    p_event_type text,
    p_payload jsonb,
    p_producer_node_id text,
    p_scheduled_task_id uuid default null,
    p_metadata jsonb default '{}'
) returns bigint
language sql
begin atomic
    insert into core.event_log (namespace, event_type, payload, producer_node_id, scheduled_task_id, metadata)
    values (p_namespace, p_event_type, p_payload, p_producer_node_id, p_scheduled_task_id, coalesce(p_metadata, '{}'))
    returning event_id;
end;

comment on function core.append_event_log is
    'Appends to the log only. To deliver the event as well, call core.emit.';

select core.ensure_partitions();
