-- What has to be done from time to time, by whichever node gets to it.
--
-- Locks: none. Workers of a previous release: there is none.

create type core.log_position as (event_id bigint, emitted_at timestamptz);

-- Delivers what the clean cut owes: events that were fanned out before a subscription was known to
-- their transaction, and that committed after it was registered. Each run looks at what became
-- visible since the one before, so nothing is delivered twice. Returns the number of messages.
create function core.settle_subscriptions(p_namespace text) returns integer
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
            'id', s.subscription_id, 'queue', s.queue_name, 'handler', s.handler));
        for e in
            select l.*, p.trace
            from unnest(e.owed) o
            join core.event_log l on (l.event_id, l.emitted_at) = (o.event_id, o.emitted_at)
            cross join lateral (select jsonb_strip_nulls(jsonb_build_object(
                'traceparent', l.metadata ->> 'traceparent', 'tracestate', l.metadata ->> 'tracestate'))) p (trace)
        loop
            sent := sent + core.fan_out(target, e.event_id, e.event_version,
                core.envelope(s.namespace, e.event_type, e.payload, e.emitted_at, e.producer_node_id,
                              e.event_version, e.key, e.correlation_id, e.causation_id)
                    || case when e.scheduled_task_id is null then '{}'
                            else jsonb_strip_nulls(jsonb_build_object('scheduledTaskId', e.scheduled_task_id,
                                                                      'dueAt', e.metadata -> 'dueAt')) end
                    || coalesce(e.metadata -> 'envelope', '{}'),
                e.trace);
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

-- Creates partitions ahead, settles new subscriptions, forgets what has expired. Dropping old
-- partitions is not in here: it has to be done concurrently, which no function can.
create function core.maintain(p_namespace text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform core.ensure_partitions();
    perform core.settle_subscriptions(p_namespace);
    delete from core.idempotency_keys where namespace = p_namespace and expires_at <= core.now();
    delete from core.nodes where namespace = p_namespace and last_heartbeat < core.now() - interval '1 day';
    delete from core.ticks t using core.scheduled_tasks s
    where t.task_id = s.task_id and s.namespace = p_namespace and t.fired_at < core.now() - interval '30 days';
end
$$;
