-- What the test kit asks a database: what is left to do, and when the next thing is due.
--
-- The functions are stable, so that all they look at is of one moment: what a handler of one queue
-- emits into another is seen in one of them. `p_dead_nodes` are those that will do nothing any more,
-- although their heartbeats are fresh; `p_live_nodes` those of the test that work, although theirs may be late: on a
-- busy machine they are.

create function core.test_works(
    p_node_id text, p_last_heartbeat timestamptz, p_dead_nodes text[], p_live_nodes text[]
) returns boolean
language sql stable
return p_node_id = any (p_live_nodes) or (core.is_live(p_last_heartbeat) and p_node_id <> all (p_dead_nodes));

create function core.test_messages(p_dead_nodes text[] default '{}', p_live_nodes text[] default '{}')
returns table (
    namespace text, group_name text, queue text, msg_id bigint, read_ct integer,
    -- 'due', 'nobody' (due, and no live node runs it), 'held' (claimed), 'foreign' (to be adopted),
    -- 'later' (waits for its time).
    state text,
    -- Until it is due or its lease ends; negative if it is due.
    due_in_micros bigint,
    handler text, event_version text, event_type text, event_id bigint, attempts integer, error text
)
language plpgsql stable
as $$
declare
    g core.groups;
    runnable text[] := array(
        select concat_ws(' ', n.namespace, h ->> 'group', h ->> 'handler', h ->> 'eventVersion')
        from core.nodes n, jsonb_array_elements(n.handlers) h
        where core.test_works(n.node_id, n.last_heartbeat, p_dead_nodes, p_live_nodes));
begin
    for g in select * from core.groups loop
        continue when to_regclass(format('pgmq.%I', 'q_' || g.queue_name)) is null;
        return query execute format(
            'select $1, $2, $3, m.msg_id, m.read_ct::integer,
                    case when m.vt > core.now() and m.read_ct > 0 and not is_foreign
                             and not m.headers ? ''settled'' then ''held''
                         when m.vt > core.now() then ''later''
                         when is_foreign then ''foreign''
                         when concat_ws('' '', $1, $2, m.headers ->> ''handler'', m.headers ->> ''eventVersion'')
                             = any ($4) then ''due''
                         else ''nobody'' end,
                    (extract(epoch from m.vt - core.now()) * 1000000)::bigint,
                    m.headers ->> ''handler'', m.headers ->> ''eventVersion'',
                    m.message ->> ''eventType'', (m.headers ->> ''eventId'')::bigint,
                    coalesce((m.headers ->> ''attempts'')::integer, 0),
                    m.headers -> ''errors'' -> -1 ->> ''error''
             from pgmq.%I m
             cross join lateral (select ((m.headers ->> ''handler'') is not null
                 and (m.headers ->> ''eventVersion'') ~ ''^[1-9][0-9]*$'') is not true) f (is_foreign)
             order by m.msg_id', 'q_' || g.queue_name)
        using g.namespace, g.group_name, g.queue_name, runnable;
    end loop;
end
$$;

-- What scheduled tasks and delayed emits are to do; `what` is a scheduled task or an event type.
create function core.test_timed(p_dead_nodes text[] default '{}', p_live_nodes text[] default '{}')
returns table (kind text, what text, due_in_micros bigint)
language plpgsql stable
as $$
begin
    -- What a later migration adds to a table is looked for in the row as a whole.
    return query
        select 'tick', t.name,
               (extract(epoch from coalesce(t.next_run_at, core.now()) - core.now()) * 1000000)::bigint
        from core.scheduled_tasks t
        where t.active and t.scheduler = 'nexus' and to_jsonb(t) ->> 'paused_at' is null
          and exists (select from core.nodes n
                      where n.namespace = t.namespace
                        and core.test_works(n.node_id, n.last_heartbeat, p_dead_nodes, p_live_nodes));
    if to_regclass('core.replays') is not null then
        -- One that is paced waits for its time.
        return query execute
            'select ''replay'', concat_ws('' '', r.group_name, r.handler),
                    coalesce((extract(epoch from r.paced_at + 1 / r.rate * interval ''1 second'' - core.now())
                              * 1000000)::bigint, 0)
             from core.replays r where r.state = ''running''';
    end if;
    if to_regclass('core.delayed_emits') is not null then
        return query execute
            'select ''delayed emit'', d.event_type,
                    (extract(epoch from (to_jsonb(d) ->> ''next_try_at'')::timestamptz - core.now()) * 1000000)::bigint
             from core.delayed_emits d';
    end if;
end
$$;

-- The subscriptions whose clean cut is open because of a transaction of this database that began before
-- it. Transactions of other databases hold it open as well, but owe nothing.
create function core.test_open_cuts()
returns table (handler text, event_type text, pid integer, query text)
language sql stable
as $$
    select s.handler, s.event_type, a.pid, a.query
    from core.subscriptions s
    join pg_stat_activity a on a.datname = current_database() and a.pid <> pg_backend_pid()
    where s.since_snapshot is not null
      and a.backend_type is distinct from 'autovacuum worker'
      and greatest(age(a.backend_xmin), age(a.backend_xid))
          >= age(s.cut_xid::xid) + s.cut_settling::integer
$$;

create function core.test_is_open(p_dead_nodes text[], p_live_nodes text[]) returns boolean
language plpgsql stable
as $$
begin
    return exists (select from core.test_messages(p_dead_nodes, p_live_nodes) where state <> 'later')
        or exists (select from core.test_timed(p_dead_nodes, p_live_nodes) where due_in_micros <= 0)
        or exists (select from core.test_open_cuts());
end
$$;

-- How long it is until the next thing is due; null if nothing waits. Ticks go on for ever.
create function core.test_next(p_with_ticks boolean, p_dead_nodes text[], p_live_nodes text[]) returns bigint
language sql stable
as $$
    select min(due_in_micros) from (
        select due_in_micros from core.test_messages(p_dead_nodes, p_live_nodes) where state = 'later'
        union all
        select due_in_micros from core.test_timed(p_dead_nodes, p_live_nodes) where p_with_ticks or kind <> 'tick'
    ) w
    where due_in_micros > 0
$$;
