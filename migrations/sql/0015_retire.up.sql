-- Subscriptions that somebody retires because no build declares their handler any more.
--
-- The subscription is deleted at once, so that no later emit goes to it. What it was sent is moved in
-- batches, because a queue may hold millions. Transactions that began before may still send it more:
-- these messages share the fate of the others, until no such transaction can be left.
--
-- Locks: ACCESS EXCLUSIVE on core.subscriptions, briefly; no column is rewritten.
-- Workers of the previous release may keep running; they move nothing.

create table core.retirements (
    subscription_id bigint primary key,
    namespace text not null references core.namespaces,
    group_name text not null,
    handler text not null,
    -- The handler, and the names it had before, under which messages may still wait.
    names text[] not null,
    event_type text not null,
    queue_name text not null,
    -- What becomes of its messages.
    fate text not null check (fate in ('dead_letter', 'drop')),
    -- The version of the namespace's subscriptions from which on it is gone.
    version bigint not null,
    messages bigint not null default 0,
    retired_at timestamptz not null default core.now(),
    -- As in core.subscriptions.
    cut_xid xid8 not null default pg_current_xact_id(),
    cut_settling boolean not null default false,
    -- Nobody sends it anything any more; or a build declares the handler again.
    settled_at timestamptz
);

create index retirements_open on core.retirements (namespace) where settled_at is null;

comment on table core.retirements is 'Subscriptions that were retired, and what became of their messages.';

-- Events that were fanned out under an older version than this were sent to a subscription of the same
-- name, which was retired: their messages are still on their way, and not owed. Null for others.
alter table core.subscriptions add column owed_from bigint;

-- Gives messages their fate, whoever had claimed them, and returns how many were there.
create function core.move_leftovers(p_queue text, p_msg_ids bigint[], p_fate text, p_error text) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    m record;
    moved integer := 0;
begin
    if p_fate = 'drop' then
        execute format('delete from pgmq.%I where msg_id = any ($1)', 'q_' || p_queue) using p_msg_ids;
        get diagnostics moved = row_count;
        return moved;
    end if;
    for m in
        execute format(
            'select msg_id, read_ct,
                    case when headers ->> ''attempts'' ~ ''^[0-9]{1,9}$'' then (headers ->> ''attempts'')::integer
                         else 0 end as attempts,
                    coalesce(headers -> ''errors'', ''[]'') as errors
             from pgmq.%I where msg_id = any ($1) order by msg_id', 'q_' || p_queue)
        using p_msg_ids
    loop
        moved := moved + core.dead_letter(
            p_queue, m.msg_id, m.read_ct, 'Retired', p_error, m.attempts, m.errors)::integer;
    end loop;
    return moved;
end
$$;

-- Retires a subscription and returns its id; core.move_retired then does with its messages what p_fate
-- says, 'dead_letter' or 'drop'. Refused while a live node declares the handler.
create function core.retire(p_namespace text, p_group text, p_handler text, p_fate text) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s core.subscriptions;
    n core.nodes;
    gone core.retirements;
    r core.replays;
    in_force bigint;
begin
    -- As a node that registers takes them: it declares the handler before or after.
    perform pg_advisory_xact_lock(hashtextextended('nexus: register ' || p_namespace, 0));
    select subscriptions_version + 1 into in_force from core.namespaces
    where namespace = p_namespace for no key update;

    select * into s from core.subscriptions
    where (namespace, group_name, handler) = (p_namespace, p_group, p_handler) for update;
    if not found then
        select * into gone from core.retirements
        where (namespace, group_name, handler) = (p_namespace, p_group, p_handler)
        order by retired_at desc limit 1;
        raise exception 'handler "%" of group "%" is not subscribed in namespace "%"%', p_handler, p_group, p_namespace,
            case when gone.subscription_id is null then '' else format(': it was retired at %s', core.iso_time(gone.retired_at)) end
            using errcode = 'invalid_parameter_value';
    end if;
    select * into n from core.nodes
    where namespace = p_namespace and core.is_live(last_heartbeat)
      and handlers @> jsonb_build_array(jsonb_build_object('group', p_group, 'handler', p_handler))
    order by registered_at limit 1;
    if found then
        raise exception 'handler "%" of group "%" is declared by node "%" (app "%", build %)',
            p_handler, p_group, n.node_id, n.app, n.build_id
            using errcode = 'object_in_use',
                  hint = 'stop the nodes of builds that declare it first; one that was killed counts as live for 15 seconds';
    end if;

    delete from core.subscriptions where subscription_id = s.subscription_id;
    insert into core.retirements
        (subscription_id, namespace, group_name, handler, names, event_type, queue_name, fate, version)
    values (s.subscription_id, p_namespace, p_group, p_handler,
            array(select p_handler
                  union
                  select q.former from core.renames q
                  where (q.namespace, q.group_name, q.handler) = (p_namespace, p_group, p_handler)),
            s.event_type, s.queue_name, p_fate, in_force);
    perform core.assign_versions(p_namespace);
    for r in
        select * from core.replays p
        where p.namespace = p_namespace and p.state = 'running' and s.subscription_id = any (p.subscription_ids)
    loop
        if r.subscription_ids = array[s.subscription_id] then
            perform core.cancel_replay(p_namespace, r.replay_id, 'its handler was retired');
        else
            update core.replays set subscription_ids = array_remove(subscription_ids, s.subscription_id)
            where replay_id = r.replay_id;
        end if;
    end loop;
    update core.namespaces set subscriptions_version = in_force where namespace = p_namespace;
    return s.subscription_id;
end
$$;

-- Gives up to p_limit messages of a retired subscription their fate and returns how many; null if somebody
-- else is at it, or it is over.
create function core.move_retired(p_subscription_id bigint, p_limit integer) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    r core.retirements;
    is_last boolean;
    ids bigint[];
    moved integer;
begin
    select * into r from core.retirements
    where subscription_id = p_subscription_id and settled_at is null for update skip locked;
    if not found then
        return null;
    end if;
    -- Whether everybody has ended who may send it something, before this looks what there is. A redriven
    -- message stays: somebody has asked for it, and it waits for the handler to come back.
    is_last := r.cut_settling and pg_snapshot_xmin(pg_current_snapshot()) >= r.cut_xid;
    execute format(
        'select array(select msg_id from pgmq.%I
                      where headers ->> ''handler'' = any ($1) and headers ->> ''attempts'' is distinct from ''0''
                      limit $2 for update skip locked)', 'q_' || r.queue_name)
    into ids using r.names, p_limit;
    moved := core.move_leftovers(r.queue_name, ids, r.fate,
        format('the handler was retired at %s: no live build declared it', core.iso_time(r.retired_at)));
    if is_last then
        execute format(
            'select not exists (select from pgmq.%I
                                where headers ->> ''handler'' = any ($1)
                                  and headers ->> ''attempts'' is distinct from ''0'')', 'q_' || r.queue_name)
        into is_last using r.names;
    end if;
    update core.retirements t
    set messages = t.messages + moved, settled_at = case when is_last then core.now() end
    where t.subscription_id = r.subscription_id and (moved > 0 or is_last);
    -- As in core.settle_subscriptions: first no snapshot may be in use from before it was retired, then
    -- every transaction that wrote under such a one must have ended.
    if not r.cut_settling and not exists (
        select from pg_stat_activity
        where datname = current_database() and pid <> pg_backend_pid()
          and backend_type is distinct from 'autovacuum worker'
          and age(backend_xmin) >= age(r.cut_xid::xid))
    then
        update core.retirements
        set cut_settling = true, cut_xid = pg_snapshot_xmax(pg_current_snapshot())
        where subscription_id = r.subscription_id;
    end if;
    return moved;
end
$$;

-- Gives up to p_limit messages of one version their fate and returns how many. The subscription stays.
-- Refused while a live node runs the handler for that version.
create function core.retire_version(
    p_namespace text, p_group text, p_handler text, p_version integer, p_fate text, p_limit integer
) returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    s core.subscriptions;
    n core.nodes;
    ids bigint[];
begin
    perform pg_advisory_xact_lock(hashtextextended('nexus: register ' || p_namespace, 0));
    select * into s from core.subscriptions
    where (namespace, group_name, handler) = (p_namespace, p_group, p_handler);
    if not found then
        raise exception 'handler "%" of group "%" is not subscribed in namespace "%"', p_handler, p_group, p_namespace
            using errcode = 'invalid_parameter_value';
    end if;
    select * into n from core.nodes
    where namespace = p_namespace and core.is_live(last_heartbeat)
      and handlers @> jsonb_build_array(jsonb_build_object(
              'group', p_group, 'handler', p_handler, 'eventVersion', p_version))
    order by registered_at limit 1;
    if found then
        raise exception 'version % of handler "%" of group "%" is run by node "%" (app "%", build %)',
            p_version, p_handler, p_group, n.node_id, n.app, n.build_id
            using errcode = 'object_in_use',
                  hint = 'stop the nodes of builds that declare it first; one that was killed counts as live for 15 seconds';
    end if;
    execute format(
        'select array(select msg_id from pgmq.%I
                      where headers ->> ''handler'' = $1 and headers ->> ''eventVersion'' = $2::text
                        and headers ->> ''attempts'' is distinct from ''0''
                      limit $3 for update skip locked)', 'q_' || s.queue_name)
    into ids using p_handler, p_version, p_limit;
    return core.move_leftovers(s.queue_name, ids, p_fate,
        format('version %s was retired at %s: no live build ran it', p_version, core.iso_time(core.now())));
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
                  and l.subscriptions_version >= coalesce(s.owed_from, 0)
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

create or replace function core.subscribe(p_namespace text, p_app text, p_handlers jsonb) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    version bigint;
    changed boolean;
    r core.retirements;
    seen pg_snapshot;
    ids bigint[];
    -- By group and handler: the snapshot that the cut begins with, and the first version that is owed.
    back jsonb := '{}';
    -- Before any snapshot that a cut begins with is taken: a transaction that commits between the two would be in neither.
    oldest timestamptz := core.oldest_transaction_start();
begin
    -- Serializes registrations in the namespace; emits only read the row and are not held up.
    select subscriptions_version into version from core.namespaces
    where namespace = p_namespace for no key update;

    -- A handler that comes back while its retired subscription may still be sent messages. Those that are
    -- there share the fate of the others; those of transactions that are open go to the new subscription by
    -- the handler's name. Which is which, one snapshot tells, that its clean cut begins with.
    for r in
        select t.* from core.retirements t
        join jsonb_array_elements(p_handlers) h on h ->> 'group' = t.group_name and h ->> 'handler' = any (t.names)
        where t.namespace = p_namespace and t.settled_at is null
        order by t.subscription_id for update of t
    loop
        execute format(
            'select pg_current_snapshot(), array(
                 select q.msg_id from pgmq.%I q
                 join jsonb_array_elements($1) h
                     on h ->> ''group'' = $2 and h ->> ''handler'' = q.headers ->> ''handler''
                 where q.headers ->> ''handler'' = any ($3) and q.headers ->> ''attempts'' is distinct from ''0''
                 for update of q skip locked)', 'q_' || r.queue_name)
        into seen, ids using p_handlers, r.group_name, r.names;
        update core.retirements t
        set messages = t.messages + core.move_leftovers(r.queue_name, ids, r.fate,
                format('the handler was retired at %s: no live build declared it', core.iso_time(r.retired_at))),
            names = array(select n from unnest(t.names) n
                          where not exists (select from jsonb_array_elements(p_handlers) h
                                            where h ->> 'group' = r.group_name and h ->> 'handler' = n)),
            settled_at = case when exists (select from jsonb_array_elements(p_handlers) h
                                           where h ->> 'group' = r.group_name and h ->> 'handler' = r.handler)
                              then core.now() end
        where t.subscription_id = r.subscription_id;
        back := back || jsonb_build_object(r.group_name || '/' || r.handler, jsonb_build_object(
            'seen', seen::text, 'version', r.version, 'type', r.event_type));
    end loop;

    with wanted as (
        select h ->> 'group' as group_name, h ->> 'handler' as handler, h ->> 'eventType' as event_type,
               (h ->> 'eventVersion')::integer as event_version, h ->> 'from' as history,
               coalesce((b.back ->> 'seen')::pg_snapshot, pg_current_snapshot()) as seen,
               case when b.back ->> 'type' = h ->> 'eventType' then (b.back ->> 'version')::bigint end as owed_from,
               not exists (select from core.subscriptions s
                           where (s.namespace, s.group_name, s.handler) = (p_namespace, h ->> 'group', h ->> 'handler'))
                   as is_new
        from jsonb_array_elements(p_handlers) h
        cross join lateral (select back -> ((h ->> 'group') || '/' || (h ->> 'handler'))) b (back)
    ), stored as (
        insert into core.subscriptions as s
            (namespace, group_name, handler, event_type, event_version, app, queue_name,
             since_version, since_snapshot, first_snapshot, owed_from, since_at)
        select p_namespace, w.group_name, w.handler, w.event_type, w.event_version, p_app,
               core.queue_name(p_namespace, w.group_name), version + 1, w.seen, w.seen, w.owed_from, oldest
        from wanted w
        on conflict (namespace, group_name, handler) do update
            set event_type = excluded.event_type, event_version = excluded.event_version, app = excluded.app,
                since_version = excluded.since_version, since_snapshot = excluded.since_snapshot,
                first_snapshot = excluded.first_snapshot, owed_from = null, since_at = excluded.since_at,
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

