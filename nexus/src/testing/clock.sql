-- Makes the clock of a test's database one that can be moved.

create table core.test_clock (shift interval not null, frozen_at timestamptz);
insert into core.test_clock values ('0');
-- Whoever may use the schema asks for the time.
grant select on core.test_clock to public;

create or replace function core.now() returns timestamptz
language sql stable parallel safe
return (select coalesce(frozen_at, now()) + shift from core.test_clock);

-- Moves the clock and returns the new time. What is held now (leases, heartbeats) moves along, because
-- no time has passed for who holds it; what waits (retries, schedules, retention) has come closer. What
-- nodes held that have crashed does not: `p_dead` is [{"queue", "msg_id", "read_ct"}].
create function core.test_advance(
    p_by interval, p_has_caretaker boolean, p_dead_nodes text[], p_live_nodes text[], p_dead jsonb
) returns timestamptz
language plpgsql
as $$
declare
    queues text[] := array(
        select queue_name from core.groups where to_regclass(format('pgmq.%I', 'q_' || queue_name)) is not null);
    tables text := 'core.nodes';
    queue text;
    before timestamptz := core.now();
    deadline timestamptz := clock_timestamp() + interval '2 seconds';
begin
    -- Nobody else sees it before the end.
    update core.test_clock set shift = shift + p_by;
    -- Where a node has been running all the time, the month that it is then has a partition. The lock that
    -- it takes comes before those on tables, as in core.maintain.
    if p_has_caretaker then
        perform core.ensure_partitions(1);
    end if;
    foreach queue in array queues loop
        tables := tables || format(', pgmq.%I', 'q_' || queue);
    end loop;
    -- A claim, or an extension, that goes by the old time must not be stored after the clock has moved:
    -- its lease would have ended before it began. Never waits while it holds one of the locks, and does
    -- without them where a transaction that is left open has written to a queue.
    loop
        begin
            execute format('lock table %s in exclusive mode nowait', tables);
            exit;
        exception when lock_not_available then
            exit when clock_timestamp() > deadline;
            perform pg_sleep(0.002);
        end;
    end loop;
    foreach queue in array queues loop
        execute format(
            'update pgmq.%I m set vt = vt + $1
             where read_ct > 0 and vt > $2 and not (headers ? ''settled'')
               and not exists (
                   select from jsonb_to_recordset($3) as d (queue text, msg_id bigint, read_ct integer)
                   where d.queue = $4 and d.msg_id = m.msg_id and d.read_ct = m.read_ct)', 'q_' || queue)
        using p_by, before, p_dead, queue;
    end loop;
    update core.nodes set last_heartbeat = last_heartbeat + p_by
    where core.test_works(node_id, last_heartbeat + p_by, p_dead_nodes, p_live_nodes);
    return core.now();
end
$$;

-- Stops the clock, or lets it go on from where it stands.
create function core.test_freeze(p_frozen boolean) returns timestamptz
language sql
as $$
    update core.test_clock
    set shift = case when p_frozen or frozen_at is null then shift else shift + (frozen_at - now()) end,
        frozen_at = case when p_frozen then coalesce(frozen_at, now()) end;
    select core.now();
$$;
