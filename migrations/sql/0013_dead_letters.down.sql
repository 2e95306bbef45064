-- Locks: ACCESS EXCLUSIVE on each queue of dead letters. No worker may be running.

drop function core.purge_dead_letters(text, text, jsonb, integer, bigint);
drop function core.redrive(text, text, jsonb, text, interval, integer, bigint, timestamptz, bigint, jsonb);
drop function core.plan_redrive(text, text, jsonb, bigint);
drop function core.is_run(text, text, text, text);
drop function core.letter_outcome(jsonb, jsonb, boolean);
drop function core.letter_targets(text, text);
drop function core.dead_letter_summary(text, jsonb, text, integer);
drop function core.dead_letters(text, text, jsonb, integer, timestamptz, bigint);
drop function core.letter_condition(jsonb);
drop function core.letters_table(text, text);

do $$
declare
    q text;
begin
    for q in
        select 'q_' || queue_name || '_dlq' from core.groups
        where to_regclass(format('pgmq.%I', 'q_' || queue_name || '_dlq')) is not null
    loop
        execute format('drop index if exists pgmq.%I, pgmq.%I, pgmq.%I, pgmq.%I',
                       q || '_vt_idx', q || '_handler_idx', q || '_type_idx', q || '_error_idx');
        execute format('create index %I on pgmq.%I (vt)', q || '_vt_idx', q);
        execute format('update pgmq.%I set headers = headers - ''{fingerprint,eventType}''::text[]
                        where jsonb_typeof(headers) = ''object''', q);
    end loop;
end
$$;

-- Moves one message to the dead letters of its queue. The body of a dead letter has the original
-- system's fields and who failed how often. Fenced by read_ct: false if the lease was lost.
create or replace function core.dead_letter(
    p_queue text, p_msg_id bigint, p_read_ct integer, p_reason text, p_error text,
    p_attempts integer, p_errors jsonb
) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    moved bigint;
begin
    execute format(
        'with d as (
             delete from pgmq.%1$I where msg_id = $1 and read_ct = $2 returning message, headers
         )
         insert into pgmq.%2$I (vt, message, headers)
         select core.now(),
                jsonb_build_object(''originalEvent'', message, ''reason'', $3,
                    ''failedAt'', core.iso_time(core.now()), ''error'', $4,
                    ''handler'', headers ->> ''handler'', ''attempts'', $5, ''errors'', $6),
                case when jsonb_typeof(headers) = ''object'' then headers - ''settled'' else ''{}'' end
                    || jsonb_build_object(''attempts'', $5, ''errors'', $6)
         from d
         returning msg_id',
        'q_' || p_queue, 'q_' || p_queue || '_dlq')
    into moved
    using p_msg_id, p_read_ct, p_reason, p_error, p_attempts, p_errors;
    return moved is not null;
end
$$;

-- Makes a queue's table fit for churn, and replaces pgmq's index on vt, which no statement of pgmq
-- can use (it compares with clock_timestamp()), by the one that a claim walks: for each handler and
-- event version the due messages in order. It keeps the name of pgmq's index, so that a repeated
-- pgmq.create does not bring the old one back.
create or replace function core.tune_queue(p_queue text, p_claimed boolean) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    q text := 'q_' || p_queue;
begin
    if p_claimed then
        execute format('drop index if exists pgmq.%I', q || '_vt_idx');
        execute format(
            'create index %I on pgmq.%I ((headers ->> ''handler''), (headers ->> ''eventVersion''), vt, msg_id)',
            q || '_vt_idx', q);
        -- The few messages that lost their lease before and may have to be run alone.
        execute format(
            'create index if not exists %I on pgmq.%I (msg_id) where (headers ->> ''abandoned'')::int >= 1',
            q || '_suspect_idx', q);
        -- What core.adopt looks for, by the same predicate: no claim finds these.
        execute format(
            'create index if not exists %I on pgmq.%I (msg_id)
             where ((headers ->> ''handler'') is not null and (headers ->> ''eventVersion'') ~ ''^[1-9][0-9]*$'') is not true',
            q || '_foreign_idx', q);
        execute format(
            'alter table pgmq.%I set (fillfactor = 70, autovacuum_vacuum_scale_factor = 0,
                 autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
                 autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000)', q);
    end if;
    begin
        execute format('alter table pgmq.%I alter column message set compression lz4', q);
    exception when feature_not_supported then
        null; -- a server that was built without lz4 keeps its default
    end;
end
$$;

drop function core.letter_headers(jsonb, text, text);
drop function core.error_fingerprint(text, text);
drop function core.normalize_error(text);
