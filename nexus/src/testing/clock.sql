-- Makes the clock of a test's database one that can be moved.

create table core.test_clock (shift interval not null);
insert into core.test_clock values ('0');

create or replace function core.now() returns timestamptz
language sql stable parallel safe
return now() + (select shift from core.test_clock);

-- Moves the clock. What is held now (leases, heartbeats) moves along, because no time has passed for
-- who holds it; what waits (retries, schedules, retention) has come closer.
create function core.test_advance(p_by interval) returns void
language plpgsql
as $$
declare
    queue text;
    before timestamptz := core.now();
begin
    for queue in select queue_name from core.groups loop
        execute format(
            'update pgmq.%I set vt = vt + $1
             where read_ct > 0 and vt > $2 and not (headers ? ''settled'')', 'q_' || queue)
        using p_by, before;
    end loop;
    update core.nodes set last_heartbeat = last_heartbeat + p_by where core.is_live(last_heartbeat);
    update core.test_clock set shift = shift + p_by;
end
$$;
